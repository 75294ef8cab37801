"""python -m part01_simple_server.demo: questions and answers, and what the KV cache gains and costs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from common.cli import exit_on_error, option, parse_config
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .server import LLM, kv_bytes_per_token

QUESTIONS = (
    "What is a KV cache?",
    "Why is decode memory-bound?",
    "What is continuous batching?",
    "How many blocks of 16 tokens does a 100-token prompt need?",
    "hi, can you explain what speculative decoding is? thanks",
    "What is the capital of France?",
)
PAIRS = "Remember these pairs:\n- harbor: violin\n- lantern: tiger\n- maple: coin\n- rocket: honey\n- island: piano\n\n"
RECALL = PAIRS + "What is the value of lantern?"
STORY = "Tell me a story about Nora and a shy fox."


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")


def ask(llm: LLM, question: str, params: SamplingParams) -> str:
    body: Mapping = {"messages": [{"role": "user", "content": question}]}
    return llm.generate(encode_prompt(body, llm.tokenizer, llm.max_model_len), params).outputs[0].text


def show_answers(console: Console, llm: LLM) -> None:
    console.rule("1. Questions and answers")
    for question in (*QUESTIONS, RECALL):
        console.print(f"[bold cyan]Q[/] {question}", highlight=False)
        console.print(f"[bold green]A[/] {ask(llm, question, SamplingParams(temperature=0))}\n", highlight=False)
    params = SamplingParams(temperature=0.8, seed=7, max_tokens=200)
    console.print(f"[bold cyan]Q[/] {STORY}", highlight=False)
    console.print(f"[bold green]A[/] {ask(llm, STORY, params)}\n", highlight=False)


class Stopwatch(LLM):
    """The engine, recording how long each forward pass takes."""

    seconds: list[float]

    def forward(self, token_ids: list[int], first_position: int, cache: DynamicCache | None) -> torch.Tensor:
        started = time.perf_counter()
        logits = super().forward(token_ids, first_position, cache)
        if logits.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)
        return logits

    def time_tokens(self, prompt: list[int], num_tokens: int, use_cache: bool) -> tuple[list[int], list[float]]:
        """Generate num_tokens greedy token ids. Returns them and the seconds of each forward pass."""
        self.seconds = []
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        output = self.generate(prompt, params, use_cache)
        return output.outputs[0].token_ids, self.seconds


def show_cache_gain(console: Console, llm: Stopwatch, num_tokens: int = 384, window: int = 32) -> None:
    console.rule("2. The same text, with and without the KV cache")
    prompt = encode_prompt({"prompt": "Once upon a time there was"}, llm.tokenizer, llm.max_model_len)
    token_ids, seconds, positions = {}, {}, {}
    for use_cache in (True, False):
        llm.time_tokens(prompt, 8, use_cache)  # warm-up
        llm.num_positions_computed = 0
        token_ids[use_cache], seconds[use_cache] = llm.time_tokens(prompt, num_tokens, use_cache)
        positions[use_cache] = llm.num_positions_computed
    table = Table("output tokens", "with cache, ms per token", "without, ms per token", "ratio")
    for end in (window, *range(96, num_tokens + 1, 96)):
        cached, uncached = (sum(seconds[use][end - window : end]) / window * 1e3 for use in (True, False))
        table.add_row(f"{end - window + 1}–{end}", f"{cached:.2f}", f"{uncached:.2f}", f"{uncached / cached:.1f}×")
    console.print(table)
    same = "identical, token for token" if token_ids[True] == token_ids[False] else "NOT identical: that is a bug"
    console.print(
        f"For {len(prompt)} prompt tokens and {num_tokens} output tokens, the model computed {positions[True]:,} "
        f"positions with the cache and {positions[False]:,} without.\n"
        f"Total: {sum(seconds[True]):.2f} s with the cache, {sum(seconds[False]):.2f} s without. "
        f"The outputs are {same}.\n",
        highlight=False,
    )


@torch.inference_mode()
def show_cache_size(console: Console, llm: LLM, num_tokens: int = 100) -> None:
    console.rule("3. What the cache costs")
    config, dtype = llm.model.config, llm.model.dtype
    cache = DynamicCache(config=config)
    llm.forward(list(range(100, 100 + num_tokens)), 0, cache)
    layers: list[Any] = cache.layers
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    per_token = kv_bytes_per_token(config, dtype)
    weight_bytes = sum(parameter.nbytes for parameter in llm.model.parameters())
    console.print(
        f"Formula: 2 (key and value) × {config.num_hidden_layers} layers × {config.num_key_value_heads} KV heads × "
        f"{config.head_dim} numbers × {dtype.itemsize} bytes = {per_token:,} bytes per token.\n"
        f"Measured: {num_tokens} tokens in the cache take {measured:,} bytes = {measured // num_tokens:,} per token.\n"
        f"One request with a full context of {llm.max_model_len:,} tokens: "
        f"{per_token * llm.max_model_len / 1e6:.1f} MB; the weights take {weight_bytes / 1e6:.1f} MB.",
        highlight=False,
    )


def run(model: str) -> None:
    console = Console()
    llm = Stopwatch(EngineConfig(model=model))
    llm.seconds = []
    console.print(f"\n[bold]Part 1: the simplest LLM server.[/] Model {model}, on {llm.device}.\n", highlight=False)
    show_answers(console, llm)
    show_cache_gain(console, llm)
    show_cache_size(console, llm)


def main() -> None:
    prog = "part01_simple_server.demo"
    config = parse_config(DemoConfig, "Questions and answers, and what the KV cache gains and costs.", prog)
    exit_on_error(prog, lambda: run(config.model))


if __name__ == "__main__":
    main()
