"""python -m part15_full_architecture.demo: the same question with fewer and fewer bits, and what is gained."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from common.cli import exit_on_error, option, parse_config
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .lab.quality import chat, text_of
from .lab.rounding import linear_bytes, model_of, num_linear_weights, round_weights
from .lab.speed import decode_speeds
from .llm import LLM
from .worker.quantization.scheme import Scheme

PROG = "part15_full_architecture.demo"
QUESTION = "What is a KV cache?"
KV_MEMORY = 4 * 2**20
SPEED_TOKENS, SPEED_REPEATS = 16, 2
LADDER: list[tuple[str, dict[str, Any], int | None]] = [  # name, the engine's flags, bits of the rounded weights
    ("32 bits (float32)", {}, None),
    ("16 bits (bfloat16)", {"dtype": "bfloat16"}, None),
    ("8 bits (int8)", {"quantization": "int8"}, None),
    ("4 bits (int4)", {"quantization": "int4"}, None),
    ("3 bits", {}, 3),
    ("2 bits", {}, 2),
]
SPEEDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8, float32 activations": {"quantization": "int8"},
    "int4, float32 activations": {"quantization": "int4"},
    "int8, bfloat16 activations": {"quantization": "int8", "dtype": "bfloat16"},
}


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    speed_model: str = option("random:llama-110m", "the model whose speed is measured")


def engine(model: str, **flags: Any) -> LLM:
    return LLM(EngineConfig(**{"model": model, "num_kv_blocks": 256, **flags}))


def ask(llm: LLM) -> str:
    [output] = llm.generate([chat(QUESTION)], SamplingParams(temperature=0, max_tokens=48))
    return text_of(output.outputs[0].token_ids)


def ladder(console: Console, model: str) -> None:
    """The same answer, until there are too few bits for it."""
    console.rule("1. Fewer bits per weight")
    console.print(f"{QUESTION}\n", highlight=False)
    for name, flags, bits in LADDER:
        llm = engine(model, **flags)
        size: float = linear_bytes(model_of(llm))
        if bits is not None:
            scheme = Scheme(bits=bits, group_size=128)
            round_weights(model_of(llm), scheme)
            size = num_linear_weights(model_of(llm)) * (bits + 32 / 128) / 8  # if they were packed
        console.print(f"{name}, {size / 1e6:.1f} MB of linear layers:", highlight=False)
        console.print(textwrap.fill(ask(llm), 78, initial_indent="  ", subsequent_indent="  ") + "\n", highlight=False)


def speeds(console: Console, model: str) -> None:
    console.rule("2. Decode speed, one request")
    engines = {name: engine(model, **flags) for name, flags in SPEEDS.items()}
    found = decode_speeds(engines, 1, SPEED_TOKENS, SPEED_REPEATS)
    table = Table(model, "weights (MB)", "tokens/s", "times float32")
    for name, speed in found.items():
        size = engines[name].engine.executor.weight_bytes / 1e6
        table.add_row(name, f"{size:.0f}", f"{speed:.0f}", f"{speed / found['float32']:.1f}")
    console.print(table)


def kv_cache(console: Console, model: str) -> None:
    console.rule("3. Quantized keys and values")
    table = Table("KV cache", "bytes per token", f"tokens in {KV_MEMORY // 2**20} MiB", "answer")
    expected = None
    for kind in ("auto", "int8", "fp8"):
        llm = engine(model, num_kv_blocks=None, kv_cache_memory=KV_MEMORY, kv_cache_dtype=kind)
        blocks, answer = llm.engine.blocks, ask(llm)
        expected = expected or answer
        per_token = llm.engine.executor.bytes_per_block // blocks.block_size
        is_same = "the same" if answer == expected else "another one"
        name = "float32" if kind == "auto" else kind
        table.add_row(name, f"{per_token:,}", f"{blocks.num_blocks * blocks.block_size:,}", is_same)
    console.print(table)


def run(config: DemoConfig) -> None:
    console = Console(width=80)
    console.print(f"Part 14: quantization. Model {config.model}.\n", highlight=False)
    ladder(console, config.model)
    speeds(console, config.speed_model)
    kv_cache(console, config.model)


def main() -> None:
    exit_on_error(PROG, lambda: run(parse_config(DemoConfig, __doc__ or "", prog=PROG)))


if __name__ == "__main__":
    main()
