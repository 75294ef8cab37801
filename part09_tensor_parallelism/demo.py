"""python -m part09_tensor_parallelism.demo: the same answer from one rank, from two, and from two stages."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.cli import exit_on_error, option, parse_config
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams
from common.trace import RankTrace, read_trace

from .config import EngineConfig
from .core.executor import MultiprocExecutor, UniProcExecutor
from .llm import LLM

QUESTION = "What is tensor parallelism?"
GRIDS = {"one rank": (1, 1), "tensor parallelism over 2 ranks": (2, 1), "2 pipeline stages": (1, 2)}
WIDTH = 64  # of the timeline, in characters


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")


def show_ranks(console: Console, llm: LLM) -> None:
    """What each rank has."""
    executor = llm.engine.executor
    if isinstance(executor, UniProcExecutor):
        parameters = sum(each.numel() for each in executor.worker.model.parameters())
        console.print(f"[dim]the only rank has {parameters:,} parameters[/]", highlight=False)
        return
    assert isinstance(executor, MultiprocExecutor)
    columns = ("rank", "layers", "query heads", "KV heads", "parameters", "bytes read", "KV bytes per token")
    table = Table(*columns)
    for each in executor.ranks_loaded:
        values = (each.rank, each.num_layers, each.num_heads, each.num_kv_heads, each.num_parameters)
        table.add_row(*(f"{value:,}" for value in (*values, each.num_bytes_read, each.kv_bytes_per_token)))
    console.print(table)


def timeline(ranks: list[RankTrace]) -> list[str]:
    """A line per rank: █ where it mostly computes, ░ where it is mostly in a collective."""
    start_s = min(each.start_s for each in ranks)
    cell_s = (max(each.start_s + each.duration_s for each in ranks) - start_s) / WIDTH
    lines = []
    for each in ranks:
        cells = ""
        for number in range(WIDTH):
            left_s = start_s + number * cell_s
            waiting_s = sum(
                max(0.0, min(left_s + cell_s, call.start_s + call.duration_s) - max(left_s, call.start_s))
                for call in each.collectives
            )
            cells += "░" if waiting_s > cell_s / 2 else "█"
        lines.append(f"rank {each.rank}  {cells}")
    return lines


def show_collectives(console: Console, trace: Path) -> None:
    """The collectives of the last decode step."""
    step = read_trace(trace).steps[-1]
    if not any(each.collectives for each in step.ranks):
        return
    calls = step.ranks[0].collectives
    counts = {name: sum(call.name == name for call in calls) for name in dict.fromkeys(call.name for call in calls)}
    sizes = {name: next(call.num_bytes for call in calls if call.name == name) for name in counts}
    words = ", ".join(f"{count} × {name} of {sizes[name]:,} bytes" for name, count in counts.items())
    in_calls = sum(call.duration_s for call in calls) / step.ranks[0].duration_s
    console.print(f"\nThe last step, of one token: {words}; {in_calls:.0%} of rank 0's time.", highlight=False)
    for line in timeline(step.ranks):
        console.print(line, highlight=False)
    console.print("[dim]█ computes   ░ in a collective, or waits for the other rank in it[/]")


def run(model: str) -> None:
    console = Console()
    console.print(f"\n[bold]Part 9: tensor parallelism.[/] Model {model}.\n", highlight=False)
    texts = set()
    with tempfile.TemporaryDirectory() as directory:
        for number, (name, (tp_size, num_stages)) in enumerate(GRIDS.items()):
            console.rule(f"{number + 1}. {name.capitalize()}")
            trace = Path(directory) / f"{number}.jsonl"
            llm = LLM(
                EngineConfig(
                    model=model, tensor_parallel_size=tp_size, pipeline_parallel_size=num_stages, trace=str(trace),
                    async_scheduling=False,
                )
            )  # fmt: skip
            try:
                show_ranks(console, llm)
                body = {"messages": [{"role": "user", "content": QUESTION}]}
                prompt = encode_prompt(body, llm.tokenizer, llm.max_model_len)
                [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=48))
            finally:
                llm.engine.shutdown()
            texts.add(str(llm.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)))
            console.print(f"[green]{sorted(texts)[-1].strip()}[/]", highlight=False)
            show_collectives(console, trace)
            console.print()
    same = "the same" if len(texts) == 1 else "NOT the same: that is a bug"
    console.print(f"The three answers are {same}.", highlight=False)


def main() -> None:
    prog = "part09_tensor_parallelism.demo"
    config = parse_config(DemoConfig, "The same answer from one rank, from two, and from two stages.", prog)
    exit_on_error(prog, lambda: run(config.model))


if __name__ == "__main__":
    main()
