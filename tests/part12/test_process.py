"""Servers whose KV blocks outlive them, and Redis servers that are gone, silent, or come back."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from part12_cpu_offloading import config
from part12_cpu_offloading.lab.redis_server import free_port, redis_server
from tests.forked_servers import GREEDY, ForkedServer, Host, until
from tests.http_checks import COMPLETIONS
from tests.part12.redis_for_tests import needs_redis
from tests.process_checks import check_command_lines

PART_DIR = Path(config.__file__).parent
PART = PART_DIR.name
LOOK = 'Look at worker/kv_tiers.py::KVTiers and core/offload.py::Offloader; README "Tiers below".'
FLAGS = ["--num-threads", "1", "--num-kv-blocks", "64", "--model", "tiny", "--kv-offload-gib", "0.01"]
NO_TRACEBACK = r"(?![\s\S]*Traceback)[\s\S]*"
PROMPT = [(37 * number) % 3_900 + 100 for number in range(100)]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for what processes leave behind in /proc")


def serve(host: Host, *flags: str) -> ForkedServer:
    return host.serve(PART, *FLAGS, *flags, forks_ranks=True)


def end(server: ForkedServer) -> None:
    """After SIGTERM, it leaves nothing behind."""
    os.kill(server.pid, signal.SIGTERM)
    server.check_end(0, NO_TRACEBACK, LOOK)


def answer(server: ForkedServer, prompt: list[int]) -> str:
    body: dict[str, Any] = {**GREEDY, "model": "tiny", "prompt": prompt, "max_tokens": 8}
    response = server.post(COMPLETIONS, body)
    assert response.status_code == 200, f"{response.text}. {LOOK}"
    return str(response.json()["choices"][0]["text"])


def check_hit(server: ForkedServer, num_tokens: int) -> None:
    """Some time ago, prompts were answered; their blocks came from the tiers."""
    got = server.gauge("kv_offload_tier_tokens", LOOK)
    assert got == num_tokens, f"expected {num_tokens} tokens from the tiers, got {got}. {LOOK}"


@pytest.mark.parametrize("flags", [[], ["--tensor-parallel-size", "2"]], ids=["one rank", "tp 2"])
def test_blocks_survive_a_server_that_is_killed(host: Host, tmp_path: Path, flags: list[str]) -> None:
    disk = ["--kv-offload-dir", str(tmp_path / "kv"), *flags]
    server = serve(host, *disk)
    expected = answer(server, PROMPT)
    num_ranks = 1 + len(flags) // 2
    until(lambda: len(list((tmp_path / "kv").glob("*.kv"))) >= 6 * num_ranks, f"the files to be written. {LOOK}")
    os.kill(server.pid, signal.SIGKILL)
    server.check_end(-signal.SIGKILL, NO_TRACEBACK, LOOK)
    server = serve(host, *disk)
    assert answer(server, PROMPT) == expected, f"the same prompt, after a restart. {LOOK}"
    check_hit(server, 96)
    assert answer(server, [7, *PROMPT]) != "", LOOK


@needs_redis
def test_redis_is_silent_gone_and_back(host: Host) -> None:
    """Requests go on, and there is one warning for each kind of failure."""
    port = free_port()
    flags = ["--kv-offload-url", f"redis://127.0.0.1:{port}"]
    server = serve(host, *flags)  # without its Redis
    expected = answer(server, PROMPT)
    for number in range(3):
        answer(server, [200 + number, *PROMPT])
    said = server.stderr.read_text()
    assert said.count("cannot read") == said.count("cannot write") == 1, f"one warning each, got {said}. {LOOK}"
    end(server)
    with redis_server(port=port) as url:
        server = serve(host, *flags)
        assert answer(server, PROMPT) == expected
        until(lambda: num_keys(url) >= 6, f"six blocks in Redis. {LOOK}")
        end(server)
        server = serve(host, *flags)
        assert answer(server, PROMPT) == expected, f"computed by another server. {LOOK}"
        check_hit(server, 96)
        [pid] = [pid for pid in pids_of("redis-server") if f":{port}" in command_line(pid)]
        os.kill(pid, signal.SIGSTOP)
        for number in range(2):
            answer(server, [300 + number, *PROMPT])
        os.kill(pid, signal.SIGCONT)
        assert server.stderr.read_text().count("cannot read") == 1, f"{server.stderr.read_text()}. {LOOK}"
        end(server)


def num_keys(url: str) -> int:
    import redis

    return int(redis.Redis.from_url(url).dbsize())


def pids_of(name: str) -> list[int]:
    found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in found if name in command_line(pid)]


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def test_metrics_show_both_rates(host: Host) -> None:
    server = serve(host)
    answer(server, PROMPT)
    assert server.gauge("prompt_tokens_per_s", LOOK) > 0, LOOK
    assert server.gauge("kv_offload_saved_tokens", LOOK) >= 96, LOOK
    assert server.gauge("kv_offload_usage_perc", LOOK) > 0, LOOK
    for number in range(12):  # more than the device has room for
        answer(server, [400 + number, *PROMPT])
    answer(server, PROMPT)
    assert server.gauge("kv_offload_host_tokens", LOOK) >= 80, LOOK
    assert server.gauge("kv_offload_host_tokens_per_s", LOOK) > 0, LOOK


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--kv-offload-gib", "0.01", "--kv-offload-dir", config.__file__], "kv_offload_dir: .* is not a directory"),
        (["--kv-offload-gib", "0.01", "--kv-offload-url", "http://x"], "kv_offload_url: expected redis://host:port.*"),
        (["--kv-offload-gib", "0.000001"], "kv_offload_gib: .* hold 0 blocks .*"),
        (["--kv-offload-gib", "1000000"], "kv_offload_gib: 1,000,000.0 needs .* bytes, and cpu has .*"),
    ],
    ids=["a file as a directory", "another kind of server", "too small", "too large"],
)
def test_flags_that_the_core_refuses(host: Host, flags: list[str], error: str) -> None:
    server = host.start(PART, "--num-kv-blocks", "8", *flags)
    server.check_end(2, f"{PART}: error: {error}\n", LOOK)


def test_command_lines() -> None:
    host = ["--port", "0", "--kv-offload-gib", "0.01", "--num-kv-blocks", "8"]
    cases = {
        "a directory without host memory": (["--kv-offload-dir", "x"], ["kv-offload-dir", "kv_offload_gib"]),
        "a URL without host memory": (["--kv-offload-url", "redis://x"], ["kv-offload-url"]),
        "a negative size": (["--kv-offload-gib", "-1"], ["kv-offload-gib", "-1"]),
        "no prefix caching": ([*host, "--no-enable-prefix-caching"], ["kv-offload-gib", "enable_prefix_caching"]),
        "no room on disk": ([*host, "--kv-offload-dir", "x", "--kv-offload-disk-gib", "0"], ["kv-offload-disk-gib"]),
        "negative weights": (["--cpu-offload-gb", "-0.5"], ["cpu-offload-gb"]),
    }
    check_command_lines(PART_DIR, config.EngineConfig, cases, LOOK)
