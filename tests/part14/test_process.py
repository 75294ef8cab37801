"""The server with quantized weights, keys and values, in real processes."""

from __future__ import annotations

import re

import httpx
import pytest

from common.sampling_params import SamplingParams
from part14_quantization.config import EngineConfig
from part14_quantization.lab.quality import chat, text_of
from part14_quantization.llm import LLM
from tests.forked_servers import Host

PART = "part14_quantization"
QUESTION = "What is a KV cache?"


def metrics(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text
    return {name: float(value) for name, value in re.findall(r"^engine:(\w+) (\S+)$", text, re.MULTILINE)}


def ask(url: str) -> str:
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 48}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False).raise_for_status().json()
    return str(answer["choices"][0]["message"]["content"])


def test_two_ranks_with_int4_and_int8_kv(host: Host) -> None:
    """The answer is that of one rank; weights and KV blocks have the bytes that they should have."""
    flags = {"quantization": "int4", "kv_cache_dtype": "int8"}
    [expected] = LLM(EngineConfig(model="tiny", num_kv_blocks=64, device="cpu", **flags)).generate(  # type: ignore[arg-type]
        [chat(QUESTION)], SamplingParams(temperature=0, max_tokens=48)
    )
    arguments = ("--quantization", "int4", "--kv-cache-dtype", "int8", "--num-kv-blocks", "64")
    server = host.serve(PART, "--model", "tiny", *arguments, "--tensor-parallel-size", "2", forks_ranks=True)
    assert ask(server.url) == text_of(expected.outputs[0].token_ids), "the same answer. Look at worker/quantization/."
    found = metrics(server.url)
    linear, embedding, norms = 4_718_592 * 4.25 / 8, 4_096 * 256 * 4, 2 * 13 * 256 * 4
    assert found["weight_bytes"] == linear + embedding + norms, (
        f"{found['weight_bytes']:,.0f} bytes of weights on both ranks: expected {linear + embedding + norms:,.0f}: "
        "4.25 bits for each of 4,718,592 weights, and float32 for the others. See worker/quantization/weight.py."
    )
    assert found["kv_block_bytes"] == 16 * 1_536, "a block has 16 tokens of 1,536 bytes. See worker/kv_cache.py."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quantization", "int4", "--tensor-parallel-size", "4"), "o_proj: 64 input features on each rank"),
        (("--quantization", "int3"), "argument --quantization: invalid choice: 'int3'"),
        (("--quantization-group-size", "7"), "quantization-group-size: expected an even number"),
        (("--kv-cache-dtype", "int8", "--no-calculate-kv-scales"), "calculate_kv_scales: the checkpoint has"),
        (("--model", "tests/part14/checkpoints/gptq-v1", "--quantization", "int8"), "has no tokenizer.json"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be(host: Host, arguments: tuple[str, ...], message: str) -> None:
    """Before any rank starts, with status 2."""
    server = host.start(PART, *arguments)
    server.check_end(2, rf"(?s){PART}: error: (?!.*Traceback).*{message}.*", "See config.py::EngineConfig")
