"""python -m part07_prefix_caching.demo: prefix hits, cache salts, and the order of eviction."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from common.cli import exit_on_error, option, parse_config
from common.outputs import CompletionOutput, join_outputs
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .core.block_manager import BlockManager
from .core.request import Request
from .llm import LLM

STORY = "Once upon a time a shy fox lived beside a river. Every morning the fox looked for something new. " * 40
QUESTIONS = ("What is a KV cache?", "What is preemption?", "What is paged attention?", "What is continuous batching?")


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")


def answer(
    llm: LLM, prompt: list[int], max_tokens: int = 60, salt: str | None = None
) -> tuple[CompletionOutput, float]:
    """The answer, and its TTFT in milliseconds."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, cache_salt=salt)
    llm.engine.add_request("demo", prompt, params)
    llm.processor.add_request("demo", prompt, params)
    started, ttft_ms = time.perf_counter(), 0.0
    pieces: list[CompletionOutput] = []
    while llm.engine.has_unfinished_requests:
        outputs, stopped = llm.processor.process(llm.engine.step())
        llm.engine.abort_requests(stopped)
        pieces += [output for _, output in outputs]
        ttft_ms = ttft_ms or (1e3 * (time.perf_counter() - started) if pieces else 0.0)
    return join_outputs(pieces), ttft_ms


def show_shared_prefix(console: Console, llm: LLM) -> None:
    console.rule("1. A shared prefix")
    prefix = encode_prompt({"prompt": STORY}, llm.tokenizer, llm.max_model_len)
    console.print(f"Four prompts with the same first {len(prefix):,} tokens.\n", highlight=False)
    table = Table("prompt", "tokens", "cached tokens", "TTFT")
    for number, ending in enumerate((" One day", " At night", " In winter", " Then the fox"), start=1):
        prompt = prefix + encode_prompt({"prompt": ending}, llm.tokenizer, llm.max_model_len)
        output, ttft_ms = answer(llm, prompt, max_tokens=8)
        table.add_row(str(number), f"{len(prompt):,}", f"{output.num_cached_tokens:,}", f"{ttft_ms:.0f} ms")
    console.print(table)


def show_chat(console: Console, llm: LLM) -> None:
    console.rule("2. A chat")
    console.print("Every turn sends the whole conversation again. The model's own answers are cached, too.\n")
    messages: list[dict[str, str]] = []
    table = Table("question", "answer", "tokens", "cached")
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        prompt = encode_prompt({"messages": messages}, llm.tokenizer, llm.max_model_len)
        output, _ = answer(llm, prompt)
        messages.append({"role": "assistant", "content": output.text})
        table.add_row(f"[bold cyan]{question}[/]", output.text, str(len(prompt)), str(output.num_cached_tokens))
    console.print(table)


def show_salt(console: Console, llm: LLM) -> None:
    console.rule("3. A salt per tenant")
    prompt = encode_prompt({"prompt": "A prompt that is confidential. " * 8}, llm.tokenizer, llm.max_model_len)
    for who, salt in (("Ada", "ada"), ("Ada again", "ada"), ("Ben, with the same prompt", "ben")):
        output, _ = answer(llm, prompt, max_tokens=1, salt=salt)
        cached = f"{output.num_cached_tokens} of {len(prompt)} tokens cached"
        console.print(f"{who}: cache_salt={salt!r}, {cached}", highlight=False)
    console.print()


def show_order(console: Console) -> None:
    console.rule("4. The order of eviction")
    blocks, params = BlockManager(num_blocks=11, block_size=16), SamplingParams(max_tokens=1)
    common = list(range(48))
    requests = {"A": Request("A", common + [100] * 7, params, 100), "B": Request("B", common + [200] * 5, params, 100)}
    for name, request in requests.items():
        cached = blocks.find_cached(request)
        blocks.admit(name, request.num_tokens, cached)
        blocks.cache_full_blocks(request, request.num_tokens)
        console.print(
            f"{name}: {request.num_tokens} tokens, block table {blocks.block_tables[name]}, {len(cached)} cached"
        )
    for name in requests:
        blocks.free(name)
        order = ", ".join(f"{block.block_id}{'*' if block.block_hash else ''}" for block in blocks.free_queue)
        console.print(f"{name} ends. Free queue, front first: {order}", highlight=False)
    console.print("(* still cached)", highlight=False)


def run(model: str) -> None:
    console = Console()
    console.print(f"\n[bold]Part 7: prefix caching.[/] Model {model}.\n", highlight=False)
    llm = LLM(EngineConfig(model=model))
    answer(llm, [5] * 8, max_tokens=2)  # warm-up
    show_shared_prefix(console, llm)
    show_chat(console, llm)
    show_salt(console, llm)
    show_order(console)


def main() -> None:
    prog = "part07_prefix_caching.demo"
    config = parse_config(DemoConfig, "Prefix hits, cache salts, and the order of eviction.", prog)
    exit_on_error(prog, lambda: run(config.model))


if __name__ == "__main__":
    main()
