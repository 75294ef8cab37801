"""Part 8 over HTTP: the same answers over HTTP, and counters of the draft tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import pytest

from common.sampling_params import SamplingParams
from common.trace import read_trace
from part08_speculative_decoding import config
from part08_speculative_decoding.config import EngineConfig
from part08_speculative_decoding.llm import LLM
from tests.forked_servers import Host, until
from tests.http_checks import COMPLETIONS

PART_DIR = Path(config.__file__).parent
LOOK = 'Look at api/output_processor.py and core/engine.py::LLMEngine._append; README "Several tokens from one step".'
LOOK_METRICS = 'Look at core/engine_core.py::EngineCore.stats; README "How many draft tokens".'
LOOK_FLAGS = 'Look at config.py::EngineConfig; README "How many draft tokens".'
FLAGS = ["--num-kv-blocks", "100", "--speculative-method"]
TEXT = "Repeat the words: apple river stone cloud apple river stone cloud apple river"
NUM_TOKENS = 30
ASK = {"temperature": 0, "ignore_eos": True, "prompt": TEXT, "max_tokens": NUM_TOKENS}


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_answers_over_http(llm: LLM, host: Host, tmp_path: Path, method: str) -> None:
    prompt = llm.tokenizer.encode(TEXT)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NUM_TOKENS)
    expected = llm.generate([prompt], params)[0].outputs[0].text
    trace = tmp_path / "trace"
    server = host.serve(PART_DIR.name, *FLAGS, method, "--trace", str(trace))
    whole = server.post(COMPLETIONS, ASK).json()
    assert whole["choices"][0]["text"] == expected, f"expected {expected!r}, got {whole}. {LOOK}"
    usage = (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"])
    assert usage == (len(prompt), NUM_TOKENS), f"usage: expected {(len(prompt), NUM_TOKENS)}, got {usage}. {LOOK}"
    stop = {**ASK, "stop": ["river"], "stream": True, "logprobs": 0, "stream_options": {"include_usage": True}}
    with server.stream(COMPLETIONS, stop) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
    cut = expected[: expected.index("river")]
    assert text == cut, f"streamed, stop 'river': expected {cut!r}, got {text!r}. {LOOK}"
    num_tokens = sum(
        len((chunk["choices"][0]["logprobs"] or {}).get("tokens", [])) for chunk in chunks if chunk["choices"]
    )
    assert chunks[-1]["usage"]["completion_tokens"] == num_tokens, f"{chunks[-1]}, {num_tokens} logprobs. {LOOK}"
    until(lambda: server.gauge("num_requests_running", LOOK_METRICS) == 0, f"the stopped request to end. {LOOK}")
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    counts = [server.gauge(f"spec_decode_{name}", LOOK_METRICS) for name in names]
    assert 0 < counts[0] <= counts[1] and 5 < counts[2] <= counts[1], f"{names}: got {counts}. {LOOK_METRICS}"
    os.kill(server.pid, signal.SIGTERM)
    server.check_end(0, "", LOOK)
    rows = [request for step in read_trace(trace).steps for request in step.requests]
    first = [row for row in rows if row.id == rows[0].id]
    got = (sum(row.num_drafts for row in rows) >= counts[1], sum(row.num_sampled for row in first))
    assert got == (True, NUM_TOKENS), f"the trace: expected all draft tokens and {NUM_TOKENS} tokens, got {got}. {LOOK}"


def test_command_lines(host: Host) -> None:
    """--help explains every flag; every other command line ends with status 2 and one line of error."""
    cases = {
        "no draft tokens": (["--num-speculative-tokens", "0"], ".*num-speculative-tokens.*at least 1.*"),
        "an unknown method": (["--speculative-method", "magic"], ".*speculative-method.*ngram.*"),
        "min above max": (["--prompt-lookup-min", "5"], ".*prompt-lookup-max.*5.*"),
    }
    for name, (argv, words) in cases.items():
        server = host.start(PART_DIR.name, *argv)
        server.check_end(2, rf"{PART_DIR.name}: error: {words}\n", f"That was {name}. {LOOK_FLAGS}")
        assert not server.stdout.read_text(), f"{name}: got {server.stdout.read_text()!r} on stdout. {LOOK_FLAGS}"
    server = host.start(PART_DIR.name, "--help")
    server.check_end(0, "", LOOK_FLAGS)
    output = server.stdout.read_text()
    for field in dataclasses.fields(EngineConfig):
        flag = "--" + field.name.replace("_", "-")
        assert re.search(rf"^  {flag}[ ,]", output, re.MULTILINE), f"--help lacks {flag}: {output}. {LOOK_FLAGS}"
