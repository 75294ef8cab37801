"""Part 1 as a user starts it: processes, sockets, exit statuses. A start takes seconds, so each serves many checks."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

import common
import part01_simple_server
from common.checkpoint import MODELS_DIR
from part01_simple_server.config import EngineConfig
from tests.process_checks import (
    ServerProcess,
    check_command_lines,
    check_loopback_only,
    environment,
    serve,
)

JSON_HEADERS = b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
PART_DIR = Path(part01_simple_server.__file__).parent
PART = PART_DIR.name
COMMON_DIR = Path(common.__file__).parent
LOOK = 'Look at __main__.py; README "Bad input".'
BODY = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
READY = r"serving (?P<model>\S+) on http://(?P<host>\S+):(?P<port>\d+) \(\w+, \d+ tokens of context\)\n"


def generate(server: ServerProcess, body: bytes | dict) -> httpx.Response:
    return server.post("/generate", body)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`python -m part01_simple_server --port 0`, run by a copy of the part, common/ and models/ elsewhere."""
    root = tmp_path_factory.mktemp("copy")
    for source in (PART_DIR, COMMON_DIR):
        shutil.copytree(source, root / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "models" / "tiny").mkdir(parents=True)
    for path in (MODELS_DIR / "tiny").iterdir():
        (root / "models" / "tiny" / path.name).symlink_to(path)
    code = (
        "import json, runpy, sys, common.checkpoint, part01_simple_server as part\n"
        "print(json.dumps([part.__file__, common.__file__, str(common.checkpoint.MODELS_DIR)]), flush=True)\n"
        f"sys.argv = [{PART!r}, '--port', '0']\n"
        f"runpy.run_module({PART!r}, run_name='__main__', alter_sys=True)\n"
    )
    with serve(["-c", code], READY, root / "stderr", root, environment(), LOOK) as server:
        yield server


def test_a_copy_of_the_part_uses_nothing_outside_of_it(server: ServerProcess) -> None:
    root = server.stderr.parent.resolve()
    for found in json.loads(server.lines[0]):
        assert Path(found).resolve().is_relative_to(root), f"the copy in {root} uses {found}"


def test_defaults(server: ServerProcess) -> None:
    assert server.ready.group("model", "host") == ("tiny", "127.0.0.1"), f"got {server.lines[-1]!r}. {LOOK}"
    check_loopback_only(server.port, LOOK)
    health = server.get("/health")
    assert health.json() == {"status": "ok", "model": "tiny"}, health.text


@pytest.fixture(scope="module")
def answer(server: ServerProcess) -> httpx.Response:
    """The answer to BODY before anything else is asked."""
    answer = generate(server, BODY)
    assert answer.status_code == 200 and len(answer.json()["token_ids"]) == 4, answer.text
    return answer


def check_answers_the_same(server: ServerProcess, answer: httpx.Response) -> None:
    again = generate(server, BODY)
    assert again.json() == answer.json(), f"the same request later: {again.text} against {answer.text}"


def test_serves_over_a_socket_whatever_clients_do(server: ServerProcess, answer: httpx.Response) -> None:
    for bad, status in ((b"\xff", 400), (b'{"prompt": "Hi"}' + b" " * 1_000_000, 413)):
        refused = generate(server, bad)
        assert refused.status_code == status, f"expected {status}, got {refused.status_code}: {refused.text}. {LOOK}"
    with socket.create_connection(("127.0.0.1", server.port)) as broken:
        broken.sendall(b"POST /generate HTTP/1.1\r\n" + JSON_HEADERS + b"{")  # and disconnects
    check_answers_the_same(server, answer)


def copy_of_tiny(directory: Path, **replaced: bytes | None) -> Path:
    """A model directory in which some files, named without their ending, have another content or are missing."""
    directory.mkdir()
    for path in (MODELS_DIR / "tiny").iterdir():
        content = replaced.get(path.stem, b"")
        if content:
            (directory / path.name).write_bytes(content)
        elif content is not None:
            (directory / path.name).symlink_to(path)
    return directory


def broken_models(tmp_path: Path) -> dict[str, tuple[Path, list[str]]]:
    """What is wrong with each: the directory, and words that the error must have."""
    weights = (MODELS_DIR / "tiny" / "model.safetensors").read_bytes()
    models = {
        "no weights": (copy_of_tiny(tmp_path / "weightless", model=None), ["no *.safetensors"]),
        "no config": (copy_of_tiny(tmp_path / "configless", config=None), ["no config.json"]),
        "bad config": (copy_of_tiny(tmp_path / "misconfigured", config=b"{"), ["config.json", "cannot be read"]),
        "bad generation config": (
            copy_of_tiny(tmp_path / "misgenerating", generation_config=b"[1]"),
            ["generation_config.json", "cannot be read"],
        ),
        "bad tokenizer": (copy_of_tiny(tmp_path / "speechless", tokenizer=b'{"version": "1.0"}'), ["bad tokenizer"]),
        "weights are not safetensors": (copy_of_tiny(tmp_path / "garbage", model=b"\x80" * 5000), ["corrupt"]),
        "truncated weights": (copy_of_tiny(tmp_path / "short", model=weights[:-1]), ["model.safetensors", "corrupt"]),
    }
    tensors = load_file(MODELS_DIR / "tiny" / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    models["a tensor is missing"] = (copy_of_tiny(tmp_path / "less", model=None), ["missing", "model.norm.weight"])
    save_file(tensors, tmp_path / "less" / "model.safetensors", metadata={"format": "pt"})
    models["a tensor of another shape"] = (copy_of_tiny(tmp_path / "other", model=None), ["model.norm.weight"])
    tensors["model.norm.weight"] = norm[:7].clone()
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    return models


def test_help_and_bad_command_lines_and_broken_models(
    server: ServerProcess, answer: httpx.Response, tmp_path: Path
) -> None:
    """Meanwhile a client of the server says nothing."""
    cases: dict[str, tuple[list[str], list[str]]] = {
        "port in use": (["--port", str(server.port)], ["cannot listen on 127.0.0.1", str(server.port), "in use"]),
        "unknown flag": (["--modle", "tiny"], ["--modle"]),
        "abbreviated flag": (["--por", "0"], ["--por"]),
        "stray word": (["tiny"], ["tiny"]),
        "port is a word": (["--port", "http"], ["--port", "'http'"]),
        "port too high": (["--port", "65536"], ["--port", "65535", "65536"]),
        "negative port": (["--port", "-1"], ["--port", "-1"]),
        "context of one token": (["--max-model-len", "1"], ["--max-model-len", "at least 2", "1"]),
        "unknown dtype": (["--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        "unknown device": (["--device", "abacus"], ["--device", "'abacus'"]),
        "unknown host": (["--host", "256.256.256.256", "--port", "0"], ["cannot listen", "256.256.256.256"]),
        "unknown model": (["--port", "0", "--model", "tinny"], ["model", "'tinny'", "tiny"]),
        "missing directory": (["--port", "0", "--model", str(tmp_path / "none")], ["model", "none", "directory"]),
        "unknown preset": (["--port", "0", "--model", "random:gpt-9"], ["model", "'gpt-9'", "random:", "qwen3-0.6b"]),
    }
    for name, (directory, words) in broken_models(tmp_path).items():
        cases[name] = (["--port", "0", "--model", str(directory)], ["model", *words])
    with socket.create_connection(("127.0.0.1", server.port)):  # sends nothing, and must not block the server for long
        check_command_lines(PART_DIR, EngineConfig, cases, LOOK)
        check_answers_the_same(server, answer)


def test_sigterm_ends_it(server: ServerProcess) -> None:
    """The last test of this server."""
    server.process.send_signal(signal.SIGTERM)
    server.check_ends_after_sigterm(LOOK)
