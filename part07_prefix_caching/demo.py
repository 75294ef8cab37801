"""python -m part07_prefix_caching.demo: what is found again, who may find it, and what goes first."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from common.cli import exit_on_error, option, parse_config
from common.outputs import CompletionOutput
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams

from .api.output_processor import join_outputs
from .config import EngineConfig
from .core.block_manager import BlockManager
from .core.engine import LLM
from .core.request import Request

STORY = "Once upon a time a shy fox lived beside a river. Every morning the fox looked for something new. " * 40
QUESTIONS = ("What is a KV cache?", "What is preemption?", "What is paged attention?", "What is continuous batching?")


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")


def answer(
    llm: LLM, prompt: list[int], max_tokens: int = 60, salt: str | None = None
) -> tuple[CompletionOutput, float]:
    """The answer, and the milliseconds to its first token."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, cache_salt=salt)
    llm.engine.add_request("demo", prompt, params)
    llm.processor.add_request("demo", params)
    started, first_token_ms = time.perf_counter(), 0.0
    pieces: list[CompletionOutput] = []
    while llm.engine.has_unfinished_requests:
        outputs, stopped = llm.processor.process(llm.engine.step())
        llm.engine.abort_requests(stopped)
        pieces += [output for _, output in outputs]
        first_token_ms = first_token_ms or (1e3 * (time.perf_counter() - started) if pieces else 0.0)
    return join_outputs(pieces), first_token_ms


def show_shared_prefix(console: Console, llm: LLM) -> None:
    console.rule("1. The same beginning")
    prefix = encode_prompt({"prompt": STORY}, llm.tokenizer, llm.max_model_len)
    console.print(f"Four prompts that begin with the same {len(prefix):,} tokens.\n", highlight=False)
    table = Table("prompt", "tokens", "found in the cache", "first token after")
    for number, ending in enumerate((" One day", " At night", " In winter", " Then the fox"), start=1):
        prompt = prefix + encode_prompt({"prompt": ending}, llm.tokenizer, llm.max_model_len)
        output, first_token_ms = answer(llm, prompt, max_tokens=8)
        table.add_row(str(number), f"{len(prompt):,}", f"{output.num_cached_tokens:,}", f"{first_token_ms:.0f} ms")
    console.print(table)


def show_chat(console: Console, llm: LLM) -> None:
    console.rule("2. A chat")
    console.print("Every turn sends all that was said before. What the model said itself is found as well.\n")
    messages: list[dict[str, str]] = []
    table = Table("question", "answer", "tokens", "found")
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        prompt = encode_prompt({"messages": messages}, llm.tokenizer, llm.max_model_len)
        output, _ = answer(llm, prompt)
        messages.append({"role": "assistant", "content": output.text})
        table.add_row(f"[bold cyan]{question}[/]", output.text, str(len(prompt)), str(output.num_cached_tokens))
    console.print(table)


def show_salt(console: Console, llm: LLM) -> None:
    console.rule("3. Who may find it")
    prompt = encode_prompt({"prompt": "A secret that nobody may guess. " * 8}, llm.tokenizer, llm.max_model_len)
    for who, salt in (("Ada", "ada"), ("Ada again", "ada"), ("Ben, who guesses her prompt", "ben")):
        output, _ = answer(llm, prompt, max_tokens=1, salt=salt)
        found = f"{output.num_cached_tokens} of {len(prompt)} tokens found"
        console.print(f"{who}: cache_salt={salt!r}, {found}", highlight=False)
    console.print()


def show_order(console: Console) -> None:
    console.rule("4. What goes first when memory is short")
    blocks, params = BlockManager(num_blocks=11, block_size=16), SamplingParams(max_tokens=1)
    common = list(range(48))
    requests = {"A": Request("A", common + [100] * 7, params, 100), "B": Request("B", common + [200] * 5, params, 100)}
    for name, request in requests.items():
        cached = blocks.find_cached(request)
        blocks.allocate(name, request.num_tokens, cached)
        blocks.register(request, request.num_tokens)
        console.print(
            f"{name}: {request.num_tokens} tokens, blocks {blocks.block_tables[name]}, {len(cached)} of them found"
        )
    for name in requests:
        blocks.free(name)
        order = ", ".join(f"{block.block_id}{'*' if block.block_hash else ''}" for block in blocks.free_queue)
        console.print(f"{name} ends. Free, in the order of their next use: {order}", highlight=False)
    console.print("(* can be found)", highlight=False)


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
    config = parse_config(DemoConfig, "What is found again, who may find it, and what goes first.", prog)
    exit_on_error(prog, lambda: run(config.model))


if __name__ == "__main__":
    main()
