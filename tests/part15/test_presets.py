"""presets/: each starts with one flag, and answers as part 1 does."""

from __future__ import annotations

import functools
import os
import re
import signal
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from common.checkpoint import load_model, load_tokenizer, resolve_checkpoint
from common.cli import parse_configs
from common.errors import FieldError
from common.serve import ListenConfig, ServerConfig
from common.testing import reference_greedy
from part15_full_architecture.config import EngineConfig
from part15_full_architecture.disagg.config import DisaggConfig
from part15_full_architecture.preset import FOLDER, Preset, as_flags, load_preset, names, take_preset
from part15_full_architecture.router.config import RouterConfig
from tests.forked_servers import GREEDY, Host, until
from tests.http_checks import COMPLETIONS
from tests.process_checks import ServerClient

PART = "part15_full_architecture"
LOOK = "See preset.py::Preset and presets/README.md"
ENGINES = [name for name in names() if load_preset(name).starts == "engine" and "torchrun" not in name]
CONFIGS: dict[str, Sequence[type[Any]]] = {
    "engine": (ServerConfig, EngineConfig),
    "router": (ListenConfig, RouterConfig),
    "proxy": (ListenConfig, DisaggConfig),
}
PROMPT, NUM_TOKENS = "What is a KV cache?", 12


@pytest.mark.parametrize("name", names())
def test_all_flags_of_a_preset_exist(name: str) -> None:
    preset = load_preset(name)
    arguments = preset.command_line()
    place = arguments.index("--") if "--" in arguments else len(arguments)
    parse_configs(CONFIGS[preset.starts], "", name, arguments[:place])
    parse_configs(CONFIGS["engine"], "", name, arguments[place + 1 :])
    assert preset.purpose.endswith("."), f"presets/{name}.yaml: expected a sentence as purpose, got {preset.purpose!r}"


@pytest.mark.parametrize("name", names())
def test_every_preset_is_in_the_table(name: str) -> None:
    assert re.search(rf"^\| \[`?{name}`?\]\({name}.yaml\)", (FOLDER / "README.md").read_text(), re.MULTILINE), (
        f"presets/README.md has no row for {name}"
    )


def test_the_flags_of_the_user_win() -> None:
    preset, rest = take_preset(["--port", "1", "--preset", "laptop", "--max-num-seqs", "3"])
    assert preset is not None and preset.name == "laptop"
    server, config = parse_configs(CONFIGS["engine"], "", "", preset.command_line(rest))
    assert (server.port, config.max_num_seqs) == (1, 3), f"got {server.port}, {config.max_num_seqs}. {LOOK}"


def test_flags_of_a_router_and_of_its_engines() -> None:
    preset = Preset("", "", "router", {"replicas": 2}, {"num_threads": 1})
    assert preset.command_line(["--port", "1", "--", "--model", "m"]) == [
        "--replicas=2", "--port", "1", "--", "--num-threads=1", "--model", "m",
    ]  # fmt: skip
    assert preset.command_line(["--port", "1"]) == ["--replicas=2", "--port", "1", "--", "--num-threads=1"]


def test_flags_that_are_true_or_false() -> None:
    assert as_flags({"enable_eplb": True, "pack_weights": False}) == ["--enable-eplb", "--no-pack-weights"]


def test_a_preset_after_the_separator_belongs_to_the_engines() -> None:
    assert take_preset(["--port", "1", "--", "--preset", "laptop"]) == (
        None,
        ["--port", "1", "--", "--preset", "laptop"],
    )


@pytest.mark.parametrize("argv", [["--preset", "none"], ["--preset"], ["--preset=../config"]])
def test_a_preset_that_does_not_exist(argv: list[str]) -> None:
    with pytest.raises(FieldError, match="preset: expected one of disaggregated, dp_cache_aware, laptop, moe_ep"):
        take_preset(argv)


@functools.cache
def expected_ids(model: str) -> list[int]:
    """What transformers answers, and so part 1."""
    checkpoint = resolve_checkpoint(model)
    prompt = load_tokenizer(checkpoint).encode(PROMPT)
    return reference_greedy(load_model(checkpoint, torch.float32, "cpu"), prompt, NUM_TOKENS)


def check_answer(server: ServerClient, model: str) -> None:
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "return_token_ids": True}
    answer = server.post(COMPLETIONS, body)
    assert answer.status_code == 200, f"{answer.text}. {LOOK}"
    got = answer.json()["choices"][0]["token_ids"]
    expected = expected_ids(model)
    assert got == expected, f"expected transformers' tokens {expected}, got {got}. {LOOK}"


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_starts_with_one_flag(name: str, host: Host) -> None:
    server = host.serve(PART, "--preset", name, forks_ranks=True)
    check_answer(server, str(load_preset(name).flags.get("model", "tiny")))
    server.host.ask(end=True)
    until(lambda: not host.ask(alive=True)["alive"], "all processes to end")


@pytest.mark.parametrize("name", ["dp_cache_aware", "disaggregated"])
def test_a_router_and_its_engines_start_with_one_flag(name: str, host: Host) -> None:
    """Forked. tests/part13/test_process.py starts a proxy, and this one's engines, as a user does."""
    server = host.route(PART, "--preset", name, "--", "--device", "cpu")
    until(lambda: server.get("/health").status_code == 200, "all engines to start")
    check_answer(server, "tiny")
    os.kill(server.pid, signal.SIGTERM)
    server.check_end(0, r"(?s)(?!.*Traceback).*", LOOK)
