"""Part 4 as a user starts it: it serves, SIGTERM lets open streams finish, and the trace is complete."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx

import common
from common.trace import read_trace
from part04_continuous_batching import config

PART = "part04_continuous_batching"
ROOT = Path(config.__file__).parents[1]
LOOK = 'Look at __main__.py and common/serve.py; README "What you will see".'
LOOK_DRAIN = 'Look at async_engine.py::AsyncLLM.shutdown and common/serve.py; README "Between two threads".'
TIMEOUT_S = 300  # until a process that does not do as it should is killed; busy machines are slow
READY = re.compile(
    r"serving tiny on http://127\.0\.0\.1:(\d+) \(cpu, 300 tokens of context, 40 KV blocks of 8 tokens\)\n"
)


def test_it_serves_drains_and_leaves_a_complete_trace(tmp_path: Path) -> None:
    trace_path, errors_path = tmp_path / "trace.jsonl", tmp_path / "stderr"
    flags = ["--port", "0", "--device", "cpu", "--max-model-len", "300", "--block-size", "8", "--num-kv-blocks", "41"]
    command = [sys.executable, "-m", PART, *flags, "--trace", str(trace_path)]
    paths = os.pathsep.join(map(str, (ROOT, Path(common.__file__).parents[1])))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with errors_path.open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
    alarm = threading.Timer(TIMEOUT_S, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        ready = READY.fullmatch(line)
        assert ready, f"expected {READY.pattern!r}, got {line!r} and {errors_path.read_text()!r}. {LOOK}"
        url, ask = f"http://127.0.0.1:{ready[1]}/v1/completions", {"temperature": 0, "ignore_eos": True}
        whole = httpx.post(url, json={**ask, "prompt": [5] * 7, "max_tokens": 4}, timeout=TIMEOUT_S, trust_env=False)
        assert whole.status_code == 200 and whole.json()["usage"]["completion_tokens"] == 4, f"{whole.text}. {LOOK}"
        body = {**ask, "prompt": [6] * 10, "max_tokens": 100, "stream": True}
        with httpx.stream("POST", url, json=body, timeout=TIMEOUT_S, trust_env=False) as response:
            chunks = response.iter_text()
            text = next(chunks)
            process.send_signal(signal.SIGTERM)
            text += "".join(chunks)
        assert text.endswith("data: [DONE]\n\n"), f"the open stream must end, got {text[-200:]!r}. {LOOK_DRAIN}"
        last = json.loads(text.split("\n\n")[-3].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length", f"got {last}. {LOOK_DRAIN}"
        status = process.wait(TIMEOUT_S)
        assert status == 0, f"SIGTERM: expected status 0, got {status}: {errors_path.read_text()!r}. {LOOK_DRAIN}"
        assert process.stdout.read() == "", f"one line on stdout only. {LOOK}"
    finally:
        alarm.cancel()
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    assert errors_path.read_text() == "", f"stderr: {errors_path.read_text()!r}. {LOOK_DRAIN}"
    trace = read_trace(trace_path)
    finished = [request_id for step in trace.steps for request_id in step.finished]
    assert (trace.note, trace.header["part"], len(finished)) == (None, PART, 2), (
        f"both requests have ended, and the trace says {finished}, {trace.note}, {trace.header}. "
        'Look at step_tracer.py::StepTracer.close and async_engine.py::AsyncLLM._run; README "What you will see".'
    )
    num_tokens = sum(request.num_scheduled for step in trace.steps for request in step.requests)
    assert num_tokens == (7 + 4 - 1) + (10 + 100 - 1), f"expected 10 + 109 tokens computed, got {num_tokens}. {LOOK}"
    assert trace.steps[-1].num_blocks_free == trace.steps[-1].num_blocks_total == 40, f"got {trace.steps[-1]}. {LOOK}"
