"""python -m part03_paged_attention.demo: block tables at work, and how many requests the same memory holds."""

from __future__ import annotations

import random
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.cli import exit_on_error, option, parse_config
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .core.engine import LLMEngine
from .lab.memory_map import memory_map, num_slots
from .llm import LLM

QUESTIONS = (
    "What is paged attention?",
    "What is a block table?",
    "What is a null block?",
    "Tell me a story about Nora and a shy fox.",
)
COLORS = ("red", "green", "yellow", "blue", "magenta", "cyan", "bright_red", "bright_green", "bright_blue")
CONTEXT, BUDGET_TOKENS = 512, 4_096


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")


def take_step(llm: LLM, texts: dict[str, str]) -> None:
    """One step of the engine. Appends each request's new text to its entry in texts."""
    answers, stopped = llm.processor.process(llm.engine.step())
    llm.engine.abort_requests(stopped)
    for request_id, answer in answers:
        texts[request_id] += answer.text


def show_answers(console: Console, llm: LLM) -> None:
    console.rule("1. Four requests, one batch, one pool")
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=60)
    prompts = [
        encode_prompt({"messages": [{"role": "user", "content": question}]}, llm.tokenizer, llm.max_model_len)
        for question in QUESTIONS
    ]
    for number, prompt in enumerate(prompts):
        llm.processor.add_request(str(number), prompt, params)
        engine.add_request(str(number), prompt, params)
    texts = {str(number): "" for number in range(len(prompts))}
    for _ in range(12):
        take_step(llm, texts)
    table = Table("request", "tokens", "block table", "last slot")
    for request in engine.running:
        block_table = engine.blocks.block_tables[request.request_id]
        position = request.num_tokens - 2
        slot = f"position {position} → block {block_table[-1]}, offset {position % 16}"
        table.add_row(QUESTIONS[int(request.request_id)], f"{request.num_tokens}", f"{block_table}", slot)
    console.print("After 12 steps:", table, "", sep="\n")
    while engine.has_unfinished_requests:
        take_step(llm, texts)
    for question, text in zip(QUESTIONS, texts.values(), strict=True):
        console.print(f"[bold cyan]Q[/] {question}\n[bold green]A[/] {text}\n", highlight=False)
    blocks = engine.blocks
    console.print(
        f"All four answers took {engine.num_steps} steps. Now {blocks.num_used_blocks} blocks are used and "
        f"{blocks.num_free_blocks} free; with the null block, the pool has {blocks.num_blocks}.\n",
        highlight=False,
    )


def fill_pool(model: str, block_size: int) -> LLMEngine:
    """An engine whose pool has room for BUDGET_TOKENS tokens, after 32 steps."""
    engine = LLMEngine(
        EngineConfig(
            model=model, max_model_len=CONTEXT, max_num_seqs=256, block_size=block_size,
            num_kv_blocks=BUDGET_TOKENS // block_size + 1,
        )
    )  # fmt: skip
    rng = random.Random(0)
    for number in range(64):
        prompt = [rng.randrange(64, 4096) for _ in range(rng.randint(16, 128))]
        params = SamplingParams(temperature=0, max_tokens=rng.randint(64, 256), ignore_eos=True)
        engine.add_request(str(number), prompt, params)
    for _ in range(32):
        engine.step()
    return engine


def show_memory(console: Console, model: str) -> None:
    console.rule("2. The same memory, contiguous and paged")
    console.print(
        f"The KV cache holds {BUDGET_TOKENS:,} tokens. 64 requests of 80 to 384 tokens each arrive at time zero; the "
        f"context is {CONTEXT} tokens.\n"
        "Contiguous: each request reserves the whole context. Paged: each request holds blocks of 16 tokens.\n"
        "A cell is 16 slots, a color is a request; · is free, ░ is reserved and empty.\n",
        highlight=False,
    )
    for name, block_size in (("Contiguous", CONTEXT), ("Paged", 16)):
        engine = fill_pool(model, block_size)
        used, reserved = num_slots(engine)
        console.print(
            f"[bold]{name}[/]: {len(engine.running)} requests run at once, "
            f"{100 * (1 - used / reserved):.0f}% of the slots they hold are empty.",
            highlight=False,
        )
        text = Text()
        for i, cell in enumerate(memory_map(engine, slots_per_cell=16)):
            if i and i % 64 == 0:
                text.append("\n")
            if cell is None:
                text.append("·", style="dim")
            else:
                text.append("█" if cell.num_used else "░", style=COLORS[cell.owner % len(COLORS)])
        console.print(text, "", sep="\n")


def run(model: str) -> None:
    console = Console()
    config = EngineConfig(model=model, num_kv_blocks=64)
    console.print(f"\n[bold]Part 3: paged attention.[/] Model {model}, on {config.device}.\n", highlight=False)
    llm = LLM(config)
    show_answers(console, llm)
    show_memory(console, model)


def main() -> None:
    prog = "part03_paged_attention.demo"
    config = parse_config(DemoConfig, "Block tables at work, and how many requests the same memory holds.", prog)
    exit_on_error(prog, lambda: run(config.model))


if __name__ == "__main__":
    main()
