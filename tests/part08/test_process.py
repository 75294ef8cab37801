"""Part 8 as a user starts it: the same answers over HTTP, and counters of the draft tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from common.sampling_params import SamplingParams
from common.trace import read_trace
from part08_speculative_decoding import config
from part08_speculative_decoding.config import EngineConfig
from part08_speculative_decoding.llm import LLM
from tests.http_checks import COMPLETIONS
from tests.process_checks import ServerProcess, check_command_lines, course_environment, serve

PART_DIR = Path(config.__file__).parent
LOOK = 'Look at api/output_processor.py and core/engine.py::LLMEngine._append; README "Several tokens from one step".'
LOOK_METRICS = 'Look at core/engine_core.py::EngineCore.stats; README "How many draft tokens".'
LOOK_FLAGS = 'Look at config.py::EngineConfig; README "How many draft tokens".'
READY = r"serving tiny on http://127\.0\.0\.1:(?P<port>\d+) \(.*\)\n"
FLAGS = ["--port", "0", "--device", "cpu", "--num-kv-blocks", "100", "--speculative-method"]
TEXT = "Repeat the words: apple river stone cloud apple river stone cloud apple river"
NUM_TOKENS = 30
ASK = {"temperature": 0, "ignore_eos": True, "prompt": TEXT, "max_tokens": NUM_TOKENS}


def gauge(server: ServerProcess, name: str) -> float:
    found = re.search(rf"\nengine:{name}(?:_total)? (\S+)\n", server.get("/metrics").text)
    assert found, f"/metrics has no engine:{name}. {LOOK_METRICS}"
    return float(found[1])


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_answers_over_http(llm: LLM, tmp_path: Path, method: str) -> None:
    prompt = llm.tokenizer.encode(TEXT)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NUM_TOKENS)
    expected = llm.generate([prompt], params)[0].outputs[0].text
    trace, command = tmp_path / "trace", ["-m", PART_DIR.name, *FLAGS, method]
    command += ["--trace", str(trace)]
    with serve(command, READY, tmp_path / "stderr", PART_DIR.parent, course_environment(PART_DIR), LOOK) as server:
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
        names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        counts = [gauge(server, f"spec_decode_{name}") for name in names]
        assert 0 < counts[0] <= counts[1] and 5 < counts[2] <= counts[1], f"{names}: got {counts}. {LOOK_METRICS}"
        server.check_a_chat_needs_no_max_tokens("Look at api/async_engine.py::AsyncLLM.__init__.")
        server.process.terminate()
        server.check_ends_after_sigterm(LOOK)
    rows = [request for step in read_trace(trace).steps for request in step.requests]
    first = [row for row in rows if row.id == rows[0].id]
    got = (sum(row.num_drafts for row in rows) >= counts[1], sum(row.num_sampled for row in first))
    assert got == (True, NUM_TOKENS), f"the trace: expected all draft tokens and {NUM_TOKENS} tokens, got {got}. {LOOK}"


def test_command_lines() -> None:
    cases = {
        "no draft tokens": (["--num-speculative-tokens", "0"], ["num-speculative-tokens", "at least 1"]),
        "an unknown method": (["--speculative-method", "magic"], ["speculative-method", "ngram"]),
        "min above max": (["--prompt-lookup-min", "5"], ["prompt-lookup-max", "5"]),
    }
    check_command_lines(PART_DIR, EngineConfig, cases, LOOK_FLAGS)
