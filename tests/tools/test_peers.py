"""tools/peers: engines take turns in processes of their own; one that dies or computes something else is named."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.errors import FieldError
from common.results import read_result
from common.workloads import WorkloadRequest, nano_vllm_cpu
from tools.peers import __main__ as command_line
from tools.peers import engines
from tools.peers.__main__ import Found, PeersConfig
from tools.peers.engines import PEERS, VARIABLE, Peer
from tools.peers.processes import PeerError, Worker
from tools.peers.workers import hf_transformers, part15

ROOT = Path(__file__).parents[2]
TINY = ROOT / "models" / "tiny"
FAKE = """
import json, sys
name, log = sys.argv[1:]
print(json.dumps({"versions": {"fake": "1.0"}, "settings": {"threads": 2}}), flush=True)
for line in sys.stdin:
    work = json.loads(line)
    with open(log, "a") as file:
        print(name, len(work["prompts"]), file=file)
    pairs = zip(work["prompts"], work["max_tokens"])
    answers = [[token_id(prompt, place) for place in range(n)] for prompt, n in pairs]
    print(json.dumps({"seconds": seconds(len(answers)), "token_ids": answers}), flush=True)
"""
HELLO = 'print(\'{"versions": {}, "settings": {}}\', flush=True);'
REQUEST = WorkloadRequest("a", 0.0, 3, prompt_token_ids=[5, 6, 7], ignore_eos=True)


@dataclass(frozen=True)
class FakePeer(Peer):
    """A worker that answers at once. token_id, seconds: Python expressions."""

    log: Path = Path()
    token_id: str = "prompt[0] + place"
    seconds: str = "0.5"

    def command(self, model: Path, dtype: str, files: Path) -> list[str]:
        helpers = f"token_id = lambda prompt, place: {self.token_id}\nseconds = lambda count: {self.seconds}\n"
        return [sys.executable, "-c", helpers + FAKE, self.name, str(self.log)]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def measure_fakes(monkeypatch: pytest.MonkeyPatch, folder: Path, *peers: Peer, **flags: Any) -> Found:
    monkeypatch.setattr(command_line, "PEERS", peers)
    found = Found({}, {}, {})
    config = PeersConfig(machines="idle", **flags)
    expected = [
        [request.prompt_token_ids[0] + place for place in range(16)] for request in command_line.check_requests()
    ]
    command_line.measure_dtype("tiny", "float32", folder, expected, config, found)
    return found


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends_at, f"after {timeout_s} s: expected {what}"
        time.sleep(0.02)


def state(pid: int) -> tuple[str, int | None]:
    """A process's state, as one letter, and its process group. X: it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        letter, _, group, *_ = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
        return letter, int(group)
    return "X", None


def has_ended(pid: int) -> bool:
    """A process that nobody has waited for yet is a zombie, and counts as ended."""
    return state(pid)[0] in "ZX"


def test_engines_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    a = FakePeer("a", "a", None, log=log)
    b = FakePeer("b", "b", None, log=log, seconds="2.0", slow_alone=True)
    found = measure_fakes(monkeypatch, tmp_path, a, b, repeats=2)
    checks = [f"{name} {command_line.CHECK_REQUESTS}" for name in "ab"]
    rounds = ["a 32", f"b {command_line.NUM_SLOW}"] * 2 + ["a 1", "b 1"] * 2
    assert log.read_text("utf-8").splitlines() == checks + rounds, "first the check, then each workload in turns"
    cells = found.measurements["tiny"]["float32"]
    assert cells["identical_share"] == {"a": 1.0, "b": 1.0}
    num_tokens = sum(request.max_tokens for request in nano_vllm_cpu())
    assert cells["idle"]["32 requests"]["a"] == {
        "tokens_per_s": round(2 * num_tokens, 1),
        "runs": [2.0 * num_tokens] * 2,
    }
    few = sum(request.max_tokens for request in nano_vllm_cpu()[: command_line.NUM_SLOW])
    rate = cells["idle"]["32 requests"]["b"]["tokens_per_s"]
    assert rate == round(few / 2, 1), f"b answered {few} tokens in 2 s: expected {few / 2} tokens/s, got {rate}"
    assert found.versions["a"] == {"fake": "1.0"} and found.settings["a"] == {"float32": {"threads": 2}}


def test_an_engine_that_has_used_up_its_budget_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = FakePeer("slow", "slow", None, log=tmp_path / "log", seconds="10.0 * count")
    found = measure_fakes(monkeypatch, tmp_path, slow, repeats=3, budget_s=15.0)
    cell = found.measurements["tiny"]["float32"]["idle"]
    num_runs = {workload: len(cell[workload]["slow"]["runs"]) for workload in cell}
    assert num_runs == {"32 requests": 1, "one request": 2}, "320 s and 10 s a run, budget 15 s"


def test_a_peer_that_computes_another_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = FakePeer("bad", "bad", None, log=tmp_path / "log", token_id="prompt[0] + place + (place > 3)")
    with pytest.raises(PeerError, match="bad computes another model: in float32, 25% of its tokens"):
        measure_fakes(monkeypatch, tmp_path, bad)
    assert "bad 32" not in (tmp_path / "log").read_text("utf-8"), "nothing is measured"


@pytest.mark.parametrize(
    ("answer", "share"), [([[1, 2, 3], [4, 5]], 1.0), ([[1, 9, 3], [4, 5]], 0.6), ([[9, 2, 3], [9, 5]], 0.0)]
)
def test_tokens_after_the_first_difference_do_not_count(answer: list[list[int]], share: float) -> None:
    assert command_line.identical_share(answer, [[1, 2, 3], [4, 5]]) == share


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('out of memory')", "fake ended with status 1; the end of its output:\nout of memory"),
        ("import os; os.kill(os.getpid(), 9)", "fake ended with status -9"),
        ("print('Loading ...')", "fake wrote 'Loading ...\\\\n': expected a line of JSON"),
        ("print('[1]')", "expected an object"),
        ("print('{}')", "expected the field 'versions', of type dict"),
        ('print(\'{"error": "no such dtype"}\')', "fake failed: no such dtype"),
    ],
)
def test_a_worker_that_does_not_start_is_named(code: str, message: str) -> None:
    with pytest.raises(PeerError, match=message):
        Worker("fake", python(code))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; input(); sys.exit('segmentation fault')", "fake ended with status 1; .*\nsegmentation fault"),
        ("input(); print('{\"seconds\": 1.0}')", "expected the field 'token_ids', of type list"),
        ('input(); print(\'{"seconds": 1.0, "token_ids": [[1, 2]]}\')', r"answered with \[2\] tokens: expected \[3\]"),
        ("pass", "fake ended with status 0"),
    ],
)
def test_a_worker_that_fails_at_work_is_named(code: str, message: str) -> None:
    with contextlib.closing(Worker("fake", python(HELLO + code))) as worker, pytest.raises(PeerError, match=message):
        worker.run([REQUEST])


def test_a_worker_that_never_answers_is_ended() -> None:
    worker = Worker("fake", python(HELLO + "import time; time.sleep(1000)"))
    worker.timeout_s = 0.2
    with contextlib.closing(worker), pytest.raises(PeerError, match="fake ended with status -9"):
        worker.run([REQUEST])


def test_a_worker_and_its_processes_are_stopped_while_others_run() -> None:
    answers = (
        "import json, sys\nfor line in sys.stdin:\n    print(json.dumps({'seconds': 1.0, 'token_ids': [[1, 2, 3]]}))\n"
    )
    spins = "import os, sys\nif os.fork() == 0:\n    while True: pass\nsys.stdout.reconfigure(line_buffering=True)\n"
    with contextlib.closing(Worker("spins", python(f"{spins}{HELLO}\n{answers}"))) as worker:
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
        group = [pid for pid in pids if state(pid)[1] == worker.process.pid]
        for _ in range(2):
            wait_until(lambda: [state(pid)[0] for pid in group] == ["T", "T"], "both to be stopped")
            assert worker.run([REQUEST])[1] == [[1, 2, 3]], "it goes on when it is asked"


START_CHILD = """
import os, time
child = os.fork()
if child == 0:
    time.sleep(1000)
print('{"versions": {}, "settings": {"pids": [%d, %d]}}' % (os.getpid(), child), flush=True)
"""


def test_what_a_worker_has_started_ends_with_it() -> None:
    worker = Worker("fake", python(START_CHILD))
    worker.close()
    for pid in worker.settings["pids"]:
        wait_until(lambda pid=pid: has_ended(pid), f"process {pid} to end with the worker")


def test_workers_end_with_a_parent_that_is_killed() -> None:
    """Also while they are stopped."""
    code = f"""
        import json, time
        from tools.peers.processes import Worker, one_core_taken
        worker = Worker("fake", [{sys.executable!r}, "-c", {START_CHILD!r} + "time.sleep(1000)"])
        print(json.dumps(worker.settings["pids"]), flush=True)
        with one_core_taken():
            time.sleep(1000)
    """
    with subprocess.Popen(python(textwrap.dedent(code)), stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pids = json.loads(parent.stdout.readline())
        busy = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        wait_until(lambda: len(busy.read_text("utf-8").split()) == 3, "a worker, its guard and a busy process")
        pids += [int(pid) for pid in busy.read_text("utf-8").split()]
        parent.kill()
    for pid in pids:
        wait_until(lambda pid=pid: has_ended(pid), f"process {pid} to end with its parent")


def test_a_worker_keeps_what_libraries_print_out_of_the_protocol() -> None:
    code = """
        import os
        from tools.peers.workers.loop import Loaded, serve
        def load(model, dtype, files):
            print("Loading", model, flush=True)
            os.write(1, b"from C")
            def generate(prompts, max_tokens):
                return [[len(dtype)] * n for n in max_tokens]
            return Loaded(generate, {"files": str(files)})
        raise SystemExit(serve(load, "pytest"))
    """
    with contextlib.closing(Worker("fake", [*python(textwrap.dedent(code)), "model", "float32", "files"])) as worker:
        assert worker.settings == {"files": "files"} and set(worker.versions) == {"pytest"}
        seconds, token_ids = worker.run([REQUEST])
        assert token_ids == [[7, 7, 7]] and seconds >= 0
        with pytest.raises(PeerError, match="fake failed: Traceback[^$]*KeyError: 'max_tokens'"):
            worker.process.stdin.write('{"prompts": []}\n')  # type: ignore[union-attr]
            worker.run([REQUEST])


def test_engines_of_the_course_compute_the_same_tokens(tmp_path: Path) -> None:
    requests = sorted(nano_vllm_cpu(), key=lambda request: request.max_tokens)[:3]
    prompts, max_tokens = [list(r.prompt_token_ids or []) for r in requests], [r.max_tokens for r in requests]
    loaded = {
        way: hf_transformers.load(way, TINY, "float32", tmp_path) for way in ("one_by_one", "padded", "continuous")
    }
    loaded["part 15"] = part15.load(TINY, "float32", tmp_path)
    answers = {name: each.generate(prompts, max_tokens) for name, each in loaded.items()}
    for name, found in answers.items():
        assert found == answers["one_by_one"], f"{name} answered {found}, expected {answers['one_by_one']}"
    assert loaded["part 15"].generate(prompts, max_tokens) == answers["part 15"], "the prefix cache was reset"


def test_an_environment_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    vllm = next(peer for peer in PEERS if peer.name == "vLLM")
    with pytest.raises(OSError, match=f"{tmp_path}/vllm is missing: make peers sets it up, or {VARIABLE} names"):
        vllm.command(TINY, "float32", tmp_path)


def test_every_peer_has_a_worker() -> None:
    for peer in PEERS:
        assert (ROOT / "tools" / "peers" / "workers" / f"{peer.module}.py").is_file(), f"{peer.name}: {peer.module}"


@pytest.mark.parametrize(
    ("flags", "field"), [({"dtypes": "int8"}, "dtypes"), ({"engines": "vllm"}, "engines"), ({"repeats": 0}, "repeats"),
    ({"write": True, "models": "tiny"}, "write")],
)  # fmt: skip
def test_wrong_flags_are_refused(flags: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as error:
        PeersConfig(**flags)
    assert error.value.field == field


CHECK_GGUF = """
import sys
from pathlib import Path
import numpy as np
from gguf import GGUFReader
from safetensors.numpy import load_file
from tools.peers.gguf_file import write_gguf
model, path, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
write_gguf(model, path, dtype)
reader, weights = GGUFReader(path), load_file(model / "model.safetensors")
fields = {name: field.contents() for name, field in reader.fields.items()}
assert fields["general.architecture"] == "llama" and fields["llama.attention.head_count_kv"] == 4, fields
assert fields["llama.rope.freq_base"] == 500_000 and fields["llama.vocab_size"] == 4_096, fields
tensors = {tensor.name: tensor for tensor in reader.tensors}
assert len(tensors) == len(weights), sorted(tensors)
matrix = tensors["blk.1.attn_k.weight"]
expected = {"float32": "F32", "bfloat16": "BF16"}[dtype]
assert matrix.tensor_type.name == expected and tensors["blk.1.ffn_norm.weight"].tensor_type.name == "F32"
data = matrix.data
if dtype == "bfloat16":
    data = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
head = weights["model.layers.1.self_attn.k_proj.weight"][:32]
rows = data.reshape(128, 256)[:32]
assert np.array_equal(rows[0::2], head[:16]) and np.array_equal(rows[1::2], head[16:]), "halves are interleaved"
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_holds_the_checkpoint(tmp_path: Path, dtype: str) -> None:
    """The shipped weights are multiples of bfloat16, so that either dtype holds them exactly."""
    interpreter = Path(os.environ.get(VARIABLE, engines.ROOT / ".venv-peers")) / "other" / "bin" / "python"
    if not interpreter.exists():
        pytest.skip("the package gguf is only in the environment of `make peers`")
    command_line.save_model("tiny", tmp_path / "model")
    command = [str(interpreter), "-c", CHECK_GGUF, str(tmp_path / "model"), str(tmp_path / "model.gguf"), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_shows_what_was_measured() -> None:
    if not command_line.RESULT.exists():
        pytest.skip("results/peers.json has not been measured")
    table = command_line.markdown(read_result(command_line.RESULT))
    assert table in (ROOT / "results" / "README.md").read_text("utf-8"), (
        "The table in results/README.md is not that of results/peers.json: python -m tools.peers --table"
    )
