"""What every part is held to. Each test says from which part on."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from common.serve import single_threaded
from common.testing import assert_same_greedy
from common.threads import SPIN_LIMITS

ROOT = Path(__file__).parents[2]
MAX_FUNCTION_LINES = 70
TIMEOUT_S = 300
FIRST_LESSON = 'README of part 1, "{}"'

GREEDY_PROMPTS = [
    ("What is a KV cache?", True),
    ("Tell me a story about Nora and a shy fox.", True),
    ("Once upon a time there was", False),
    ("a", False),
    ("def add(a, b):\n    return", False),
    ("日本語のテキスト 🦊", False),
    ("Paged attention splits the cache into blocks of 16 tokens. " * 20, False),
]


# The answers


@pytest.mark.since(1)
def test_greedy_equals_transformers(engine: Any, reference: Any) -> None:
    prompts = [reference.encode(text, chat) for text, chat in GREEDY_PROMPTS]
    results = engine.generate(prompts, max_tokens=12)
    assert len(results) == len(prompts), f"{engine.part}: {len(prompts)} prompts, but {len(results)} results"
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        expected = reference.greedy(prompt, 12, reference.eos_token_ids)
        where = f"{engine.part}, request {number} of {len(prompts)} ({GREEDY_PROMPTS[number][0][:30]!r})"
        assert result.prompt_token_ids == prompt, (
            f"{where}: this is the answer to another prompt, or the prompt was changed"
        )
        assert_same_greedy(reference.model, prompt, result.outputs[0].token_ids, expected, where)


STOP_CASES: dict[str, dict[str, Any]] = {
    "EOS": {"max_tokens": 16},
    "EOS as the last permitted token": {"max_tokens": "end + 1"},
    "max_tokens before EOS": {"max_tokens": "end"},
    "max_tokens of 1": {"max_tokens": 1},
    "ignore_eos": {"max_tokens": 16, "ignore_eos": True},
    "stop_token_ids": {"max_tokens": 16, "ignore_eos": True, "stop_token_ids": "stop token"},
    "EOS before stop_token_ids": {"max_tokens": 16, "stop_token_ids": "stop token"},
    "min_tokens that are out in time": {"max_tokens": 16, "min_tokens": "end"},
    "min_tokens and ignore_eos": {"max_tokens": 16, "min_tokens": 16, "ignore_eos": True},
}


@pytest.mark.since(1)
@pytest.mark.parametrize("case", STOP_CASES)
def test_stop_rules(engine: Any, reference: Any, case: str) -> None:
    end, token = reference.end, reference.free_run[reference.end]
    values = {"end": end, "end + 1": end + 1, "stop token": [token]}
    fields = {name: values[v] if isinstance(v, str) else v for name, v in STOP_CASES[case].items()}
    stops = fields["max_tokens"] > end and (not fields.get("ignore_eos") or "stop_token_ids" in fields)
    count = end + 1 if stops else fields["max_tokens"]
    expected = reference.free_run[:count]
    reasons = ("stop" if stops else "length", token if fields.get("ignore_eos") and stops else None)

    [result] = engine.generate([reference.stop_prompt], **fields)
    output = result.outputs[0]
    where = f"{engine.part}, {case}: {fields}, token {token} ends a sequence and comes as number {end + 1}."
    look = f"Look for check_stop; {FIRST_LESSON.format('When to stop')}."
    assert output.token_ids == expected, f"{where} Expected tokens {expected}, got {output.token_ids}. {look}"
    got = (output.finish_reason, output.stop_reason)
    assert got == reasons, f"{where} Expected (finish_reason, stop_reason) {reasons}, got {got}. {look}"
    text = reference.decode(expected[:-1] if stops else expected)
    assert output.text == text, f"{where} Expected the text {text!r}, got {output.text!r}. {look}"
    usage = {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}
    assert result.usage == usage, f"{where} Expected usage {usage}, got {result.usage}"
    assert result.finished, f"{where} The result says that it is not finished"


@pytest.mark.since(1)
def test_min_tokens_holds_eos_back(engine: Any, reference: Any) -> None:
    end, token = reference.end, reference.free_run[reference.end]
    output = engine.generate([reference.stop_prompt], max_tokens=20, min_tokens=end + 3)[0].outputs[0]
    got = output.token_ids
    look = f"Look at how min_tokens changes the logits; {FIRST_LESSON.format('When to stop')}."
    assert got[:end] == reference.free_run[:end], f"{engine.part}: {got} against {reference.free_run}. {look}"
    assert len(got) >= end + 3 and token not in got[: end + 3], (
        f"{engine.part}: min_tokens={end + 3}, but {got} has the end token {token} earlier, or is shorter. {look}"
    )


@pytest.mark.since(3)
@pytest.mark.parametrize("kept", [False, True], ids=["cut off", "kept"])
def test_what_stops_an_answer_may_stay_in_its_text(engine: Any, reference: Any, kept: bool) -> None:
    look = "Look at api/detokenizer.py::find_stop and api/output_processor.py::_extend."
    end, token = reference.end, reference.free_run[reference.end]
    whole, special = reference.decode(reference.free_run), reference.decode([token])
    stop = whole[3:8]
    at = whole.index(stop)
    cases: dict[str, tuple[dict[str, Any], str, Any]] = {
        "a stop string": ({"stop": [stop]}, whole[: at + len(stop) * kept], stop),
        "a stop token": ({"stop_token_ids": [token]}, reference.decode(reference.free_run[: end + kept]), token),
        "an end of sequence": ({"ignore_eos": False}, reference.decode(reference.free_run[: end + kept]), None),
    }
    for name, (fields, text, reason) in cases.items():
        fields = {"ignore_eos": True, "max_tokens": 16, "include_stop_str_in_output": kept, **fields}
        output = engine.generate([reference.stop_prompt], **fields)[0].outputs[0]
        got = (output.text, output.finish_reason, output.stop_reason)
        assert got == (text, "stop", reason), (
            f"{engine.part}, {name} ({special!r} is token {token}), {fields}: expected {(text, 'stop', reason)}, got "
            f"{got}. {look}"
        )


@pytest.mark.since(3)
def test_special_tokens_may_stay_in_the_text(engine: Any, reference: Any) -> None:
    look = "Look at api/detokenizer.py::_decode, and at what decodes the prompt's last tokens."
    token = reference.tokenizer.convert_tokens_to_ids("<|im_end|>")
    fields = {"logit_bias": {token: 100.0}, "max_tokens": 3, "ignore_eos": True}
    prompt = [*reference.stop_prompt, token]
    for skip, text in ((True, ""), (False, "<|im_end|>" * 3)):
        output = engine.generate([prompt], skip_special_tokens=skip, **fields)[0].outputs[0]
        assert (output.token_ids, output.text) == ([token] * 3, text), (
            f"{engine.part}, skip_special_tokens={skip}: expected {text!r}, got {output.text!r}. {look}"
        )
    output = engine.generate([prompt], skip_special_tokens=False, stop=["im_end|><"], **fields)[0].outputs[0]
    assert (output.text, output.stop_reason) == ("<|", "im_end|><"), f"{engine.part}: got {output}. {look}"


@pytest.mark.since(1)
@pytest.mark.parametrize(("num_prompt_tokens", "count"), [(10, 6), (15, 1)])
def test_the_end_of_the_context_ends_the_answer(
    short_engine: Any, reference: Any, num_prompt_tokens: int, count: int
) -> None:
    prompt = list(range(100, 100 + num_prompt_tokens))
    output = short_engine.generate([prompt], max_tokens=100, ignore_eos=True)[0].outputs[0]
    expected = reference.greedy(prompt, count)
    assert (output.token_ids, output.finish_reason) == (expected, "length"), (
        f"{short_engine.part}: a prompt of {num_prompt_tokens} in a context of 16: expected {count} tokens, {expected} "
        f"and 'length', got {output.token_ids} and {output.finish_reason!r}. Look for check_stop; "
        f"{FIRST_LESSON.format('When to stop')}."
    )


@pytest.mark.since(1)
def test_a_seed_makes_an_answer_reproducible(engine: Any, reference: Any) -> None:
    fields = {"temperature": 5.0, "max_tokens": 12, "ignore_eos": True}
    answers = [
        engine.generate([reference.stop_prompt], seed=seed, **fields)[0].outputs[0].token_ids
        for seed in (7, None, 7, 8)
    ]
    look = f"Look at how noise is drawn; {FIRST_LESSON.format('Choosing a token')}."
    assert answers[0] == answers[2], f"{engine.part}: seed 7 twice gave {answers[0]} and {answers[2]}. {look}"
    assert answers[0] != answers[3], f"{engine.part}: seeds 7 and 8 gave the same answer at temperature 5. {look}"


# The folder


@pytest.mark.since(3)
def test_a_request_id_is_used_once(engine: Any) -> None:
    ids = [engine.generate([[5, 6], [7]], max_tokens=1)[number].request_id for _ in range(2) for number in (0, 1)]
    assert len(set(ids)) == 4, (
        f"two calls of LLM.generate, two prompts each: expected four ids, got {ids}. When a call fails, a step of "
        "its requests may still be in flight, and a request with the same id would get its tokens. "
        "Look at llm.py::LLM.generate."
    )


@pytest.mark.since(1)
@pytest.mark.parametrize("name", ["__init__.py", "__main__.py", "demo.py", "bench.py", "README.md", "exercises.md"])
def test_a_part_has_its_files(part_dir: Path, name: str) -> None:
    assert (part_dir / name).is_file(), f"{part_dir.name} has no {name}"
    assert (part_dir / name).stat().st_size, f"{part_dir.name}/{name} is empty"


@functools.cache
def nodes_of(source: str) -> list[ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The imports and the functions of a file. Many parts have the same one."""
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def parse_sources(part_dir: Path) -> dict[Path, list[Any]]:
    return {path: nodes_of(path.read_text(encoding="utf-8")) for path in sorted(part_dir.rglob("*.py"))}


def first_party_names() -> set[str]:
    """What can be imported from the root of the repository, but not by a part."""
    entries = (path for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir())
    return {path.stem for path in entries if not path.name.startswith(".")} - {"common"}


@pytest.mark.since(1)
def test_a_part_imports_no_other_part(part_dir: Path) -> None:
    forbidden = first_party_names()
    assert {"tests", part_dir.name} <= forbidden, f"this test looks in the wrong place: {forbidden}"
    for path, nodes in parse_sources(part_dir).items():
        depth = len(path.relative_to(part_dir).parts)
        for node in nodes:
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level <= depth, f"{path}:{node.lineno} imports from outside of the part"
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in forbidden, (
                    f"{path}:{node.lineno} imports {name}: a part imports the standard library, third-party packages, "
                    "common, and itself by relative imports; nothing else"
                )


@pytest.mark.since(1)
def test_functions_are_short(part_dir: Path) -> None:
    for path, nodes in parse_sources(part_dir).items():
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, (
                    f"{path.relative_to(ROOT)}::{node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}: split it"
                )


# The command


# One interpreter for all parts: what costs seconds, the imports of torch and transformers, comes first and once.
PROBE = """
import contextlib, importlib, io, json, os, pathlib, runpy, sys, threading
import common.checkpoint, common.cli

NO_SERVER = ["--host", "256.256.256.256"]  # so that a part that takes a bad flag does not serve for ever

def run(part, *argv):
    sys.modules.pop(part + ".__main__", None)  # run as `python -m` runs it
    sys.argv, output, errors = [part, *argv], io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            runpy.run_module(part, run_name="__main__", alter_sys=True)
        status = "none"
    except SystemExit as exit:
        status = exit.code
    return {"status": status, "stdout": output.getvalue(), "stderr": errors.getvalue()}

def names_of_threads():
    return sorted(thread.name for thread in threading.enumerate())

def probe(part):
    found = {"threads before": names_of_threads(), "environment before": dict(os.environ), "imported": []}
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        for path in sorted(pathlib.Path(part).rglob("*.py")):
            name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            importlib.import_module(name)
            found["imported"].append(name)
    found |= {"threads after": names_of_threads(), "printed": output.getvalue() + errors.getvalue()}
    found["environment after"] = dict(os.environ)
    return found | {"help": run(part, "--help"), "no threads": run(part, "--num-threads", "0", *NO_SERVER)}

print(json.dumps({part: probe(part) for part in sys.argv[1:]}))
"""


@pytest.fixture(scope="session")
def probes() -> dict[str, dict[str, Any]]:
    """For every part: what importing all of it does, its --help, and how it refuses a flag."""
    return run_probe(PROBE)


def run_probe(code: str) -> dict[str, dict[str, Any]]:
    """What code prints as JSON, run by one interpreter for all parts, which are its arguments."""
    parts = sorted(path.parent.name for path in ROOT.glob("part[0-9][0-9]_*/__init__.py"))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *parts], cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"looking at the parts failed: {done.stderr}"
    return json.loads(done.stdout)


@pytest.mark.since(1)
def test_importing_a_part_does_nothing(part: str, probes: dict[str, dict[str, Any]]) -> None:
    probe = probes[part]
    assert {part, f"{part}.__main__", f"{part}.config"} <= set(probe["imported"]), f"imported only {probe['imported']}"
    assert probe["threads after"] == probe["threads before"], (
        f"importing {part} starts threads: {probe['threads before']} became {probe['threads after']}"
    )
    assert not probe["printed"], f"importing {part} prints {probe['printed']!r}"
    before, after = probe["environment before"], probe["environment after"]
    assert after == before, f"importing {part} changes the environment: {dict(after.items() ^ before.items())}"


@pytest.mark.since(1)
def test_help_names_the_flags(part: str, probes: dict[str, dict[str, Any]]) -> None:
    run = probes[part]["help"]
    assert run["status"] in (0, None), f"python -m {part} --help: exit status {run['status']}, {run['stderr']}"
    for flag in ("--model", "--host", "--port", "--num-threads"):
        assert re.search(rf"^  {flag}\b", run["stdout"], re.MULTILINE), f"{part} --help lacks {flag}:\n{run['stdout']}"


# Threads


@pytest.mark.since(1)
def test_no_threads_is_an_error_that_names_the_flag(part: str, probes: dict[str, dict[str, Any]]) -> None:
    run = probes[part]["no threads"]
    words = rf"{part}: error: --num-threads: expected 1 to \d+ .*, got 0 .*\n"
    assert run["status"] == 2 and re.fullmatch(words, run["stderr"]), (
        f"python -m {part} --num-threads 0: expected status 2 and one line like {words!r}, got {run}. "
        "Look at config.py::EngineConfig."
    )


# One interpreter for all parts, which never gets as far as torch: each is run until it imports it.
SPIN_PROBE = """
import importlib.abc, json, os, runpy, sys
from common.threads import SPIN_VARIABLES

class Reached(BaseException):
    pass

class StopAtTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise Reached

def variables(part, **given):
    for name in SPIN_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(given)
    try:
        runpy.run_module(part, run_name="__main__", alter_sys=True)
    except Reached:
        return {name: os.environ[name] for name in SPIN_VARIABLES if name in os.environ}
    finally:
        for name in [name for name in sys.modules if name.startswith((part, "common"))]:
            del sys.modules[name]

sys.meta_path.insert(0, StopAtTorch())
parts = sys.argv[1:]
print(json.dumps({part: [variables(part), variables(part, OMP_WAIT_POLICY="ACTIVE")] for part in parts}))
"""


@pytest.fixture(scope="session")
def spin_probes() -> dict[str, Any]:
    """For every part: the variables that OpenMP finds, where none was set and where one was."""
    return run_probe(SPIN_PROBE)


@pytest.mark.since(1)
def test_a_server_limits_spinning_before_it_imports_torch(part: str, spin_probes: dict[str, Any]) -> None:
    unset, active = spin_probes[part]
    look = "OpenMP reads these when torch is imported. Look at the top of __main__.py and at common/threads.py."
    assert unset == SPIN_LIMITS, f"python -m {part}, none set: expected {SPIN_LIMITS}, got {unset}. {look}"
    assert active == {"OMP_WAIT_POLICY": "ACTIVE"}, f"python -m {part}: expected what was set, got {active}. {look}"


@pytest.mark.since(1)
def test_the_model_runs_with_num_threads(part: str, load_engine: Callable[..., Any]) -> None:
    """torch's setting in the thread that runs the model, whichever that is."""
    num_threads, found = min(2, os.cpu_count() or 1), set[int]()
    with single_threaded():  # which puts back what an engine in this thread changes
        engine = load_engine(num_threads=num_threads)
        hook = register_module_forward_pre_hook(lambda *_: found.add(torch.get_num_threads()))
        try:
            engine.generate([[5, 6, 7]], max_tokens=2)
        finally:
            hook.remove()
    assert found == {num_threads}, (
        f"{part}, num_threads={num_threads}: the model ran with {found}. Look for set_num_threads."
    )


@pytest.mark.since(5)
def test_the_core_leaves_a_core_to_the_api(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = importlib.import_module(f"{part}.core.engine_core")
    calls: list[str] = []

    def load(*_: Any) -> None:
        calls.append("load")
        raise OSError("no such model")

    monkeypatch.setattr(core, "leave_a_core", lambda: calls.append("leave_a_core"))
    monkeypatch.setattr(core, "LLMEngine", load)
    core._serve(None, None, SimpleNamespace(send=lambda _: None))
    assert calls == ["leave_a_core", "load"], (
        f"{part}: expected leave_a_core() in the core's process, before the engine is made, got {calls}. "
        "Look at core/engine_core.py."
    )
