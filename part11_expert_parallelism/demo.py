"""python -m part11_expert_parallelism.demo: where tokens go, one answer from all grids, and a load that is balanced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from common.cli import exit_on_error, option, parse_config
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .core.executor import MultiprocExecutor, UniProcExecutor
from .lab.expert_map import PROMPTS, count_experts, heat_map, load_model
from .llm import LLM

PROG = "part11_expert_parallelism.demo"
QUESTION = "What is a mixture of experts?"
GRIDS: dict[str, dict[str, object]] = {
    "one rank": {},
    "tensor parallelism over 2 ranks": {"tensor_parallel_size": 2},
    "expert parallelism over 2 ranks": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}
NUM_ROUNDS, ANSWER_TOKENS = 4, 32
GREEDY = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny-moe", "a mixture of experts: a shipped model, a directory or a Hugging Face id")


def encode(tokenizer: Any, text: str) -> list[int]:
    return encode_prompt({"messages": [{"role": "user", "content": text}]}, tokenizer, 2_048)


def show_experts(console: Console, model: str) -> None:
    console.rule("1. Where the tokens go")
    decoder, tokenizer = load_model(model)
    top_k, count = decoder.mixtures[0].gate.top_k, decoder.mixtures[0].num_experts
    console.print(
        f"Each token goes to {top_k} of {count} experts in each layer. One column for each expert; the darker, the "
        "more tokens.\n",
        highlight=False,
    )
    maps = [heat_map(count_experts(decoder, [encode(tokenizer, text) for text in texts])) for texts in PROMPTS.values()]
    table = Table("", *PROMPTS, box=None, padding=(0, 3, 0, 0))
    for layer, lines in enumerate(zip(*maps, strict=True)):
        table.add_row(f"layer {layer}", *lines)
    console.print(table)
    console.print()


def show_ranks(console: Console, llm: LLM) -> None:
    """What each rank has."""
    executor = llm.engine.executor
    if isinstance(executor, UniProcExecutor):
        parameters = [sum(each.numel() for each in executor.worker.model.parameters())]
    else:
        assert isinstance(executor, MultiprocExecutor)
        parameters = [each.num_parameters for each in executor.ranks_loaded]
    console.print(f"[dim]parameters per rank: {', '.join(f'{each:,}' for each in parameters)}[/]", highlight=False)


def show_answers(console: Console, model: str) -> None:
    console.rule("2. One answer")
    texts = set()
    for name, flags in GRIDS.items():
        llm = LLM(EngineConfig(**{"model": model, **flags}))  # type: ignore[arg-type]
        try:
            console.print(f"[bold]{name.capitalize()}[/]")
            show_ranks(console, llm)
            [output] = llm.generate([encode(llm.tokenizer, QUESTION)], GREEDY)
        finally:
            llm.engine.shutdown()
        text = str(llm.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)).strip()
        texts.add(text)
        console.print(f"[green]{text}[/]\n", highlight=False)
    same = "the same" if len(texts) == 1 else "NOT the same: that is a bug"
    console.print(f"The three answers are {same}.\n", highlight=False)


def balance(console: Console, model: str) -> None:
    console.rule("3. A load is balanced")
    console.print(
        "Four ranks with expert parallelism write stories, round after round. Between two rounds, the experts are "
        "placed by the loads of the last one.\n",
        highlight=False,
    )
    llm = LLM(
        EngineConfig(
            model=model, tensor_parallel_size=4, enable_expert_parallel=True, enable_eplb=True,
            num_redundant_experts=4, eplb_step_interval=10**9,
        )
    )  # fmt: skip
    executor, answers = llm.engine.executor, list[list[list[int]]]()
    assert isinstance(executor, MultiprocExecutor)
    prompts = [encode(llm.tokenizer, text) for text in PROMPTS["stories"]]
    table = Table("round", "balancedness", "with the new placement")
    try:
        with Live(table, console=console, auto_refresh=False) as live:
            for number in range(NUM_ROUNDS):
                answers.append([output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)])
                balance = executor.balance_experts()
                assert balance is not None, "experts have got tokens"
                before, after = balance
                table.add_row(str(number + 1), f"{before:.2f}", f"{after:.2f}")
                live.refresh()
    finally:
        llm.engine.shutdown()
    same = "the same tokens" if all(each == answers[0] for each in answers) else "OTHER tokens: that is a bug"
    console.print(f"\nAll rounds gave {same}.", highlight=False)


def run(config: DemoConfig) -> None:
    console = Console()
    console.print(f"\n[bold]Part 11: expert parallelism.[/] Model {config.model}.\n", highlight=False)
    show_experts(console, config.model)
    show_answers(console, config.model)
    balance(console, config.model)


def main() -> None:
    config = parse_config(DemoConfig, "Where tokens go, one answer, and a load that is balanced.", PROG)
    exit_on_error(PROG, lambda: run(config))


if __name__ == "__main__":
    main()
