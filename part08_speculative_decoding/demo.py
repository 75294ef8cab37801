"""python -m part08_speculative_decoding.demo: how many tokens a step produces, and what stays the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from common.cli import exit_on_error, option, parse_config
from common.outputs import CompletionOutput
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .llm import LLM

WORDS = "apple river stone lantern bridge garden mirror market"
TASKS: dict[str, dict[str, Any]] = {
    "a question": {"messages": [{"role": "user", "content": "What is paged attention?"}]},
    "a story": {"prompt": "Once upon a time"},
    "copying": {"messages": [{"role": "user", "content": f"Repeat these words: {WORDS} {WORDS}"}]},
}
METHODS = {"none": "no speculation", "ngram": "n-gram lookup", "draft_model": "draft model"}
COLORS = ("cyan", "yellow")


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")


def answer(llm: LLM, prompt: list[int], params: SamplingParams) -> list[CompletionOutput]:
    """What each step produced."""
    llm.engine.add_request("demo", prompt, params)
    llm.processor.add_request("demo", prompt, params)
    pieces: list[CompletionOutput] = []
    while llm.engine.has_unfinished_requests:
        outputs, stopped = llm.processor.process(llm.engine.step())
        llm.engine.abort_requests(stopped)
        pieces += [output for _, output in outputs]
    return pieces


def show_steps(console: Console, llms: dict[str, LLM]) -> None:
    console.rule("1. Tokens per step")
    console.print("Each |…| group was produced by one step.\n")
    for task, body in TASKS.items():
        texts = []
        for method, llm in llms.items():
            prompt = encode_prompt(body, llm.tokenizer, llm.max_model_len)
            pieces = answer(llm, prompt, SamplingParams(temperature=0, max_tokens=48))
            texts.append("".join(piece.text for piece in pieces))
            num_tokens = sum(len(piece.token_ids) for piece in pieces)
            console.print(
                f"[bold]{task}[/], {METHODS[method]}: {num_tokens} tokens in {len(pieces)} steps, "
                f"{num_tokens / len(pieces):.1f} per step",
                highlight=False,
            )
            if method != "none":
                line = Text()
                for number, piece in enumerate(pieces):
                    line.append("|", style="dim")
                    line.append(piece.text, style=COLORS[number % 2])
                console.print(line)
        same = "the same" if len(set(texts)) == 1 else "NOT the same: that is a bug"
        console.print(f"[dim]The three answers are {same}.[/]\n", highlight=False)


def show_seeds(console: Console, llms: dict[str, LLM]) -> None:
    console.rule("2. Random sampling with a seed")
    params = SamplingParams(temperature=0.8, seed=7, max_tokens=40)
    texts = set()
    for method, llm in llms.items():
        prompt = encode_prompt(TASKS["a story"], llm.tokenizer, llm.max_model_len)
        pieces = answer(llm, prompt, params)
        texts.add("".join(piece.text for piece in pieces))
        console.print(f"temperature 0.8, seed {params.seed}, {METHODS[method]}: {len(pieces)} steps", highlight=False)
    same = "the same" if len(texts) == 1 else "NOT the same: that is a bug"
    console.print(f"The three texts are {same}: [green]{texts.pop().strip()}[/]\n", highlight=False)


def show_stats(console: Console, llms: dict[str, LLM]) -> None:
    console.rule("3. Acceptance")
    for method, llm in llms.items():
        stats = llm.engine.speculation.stats
        if stats.num_drafts:
            shares = ", ".join(f"{count / stats.num_drafts:.0%}" for count in stats.num_accepted_tokens_per_pos)
            console.print(
                f"{METHODS[method]}: {stats.num_draft_tokens} draft tokens verified in {stats.num_drafts} steps, "
                f"{stats.num_accepted_tokens} accepted; share of steps that accept draft token 1, 2, ...: {shares}",
                highlight=False,
            )


def run(model: str) -> None:
    console = Console()
    console.print(f"\n[bold]Part 8: speculative decoding.[/] Model {model}.\n", highlight=False)
    llms = {method: LLM(EngineConfig(model=model, speculative_method=method)) for method in METHODS}  # type: ignore[arg-type]
    show_steps(console, llms)
    show_seeds(console, llms)
    show_stats(console, llms)


def main() -> None:
    prog = "part08_speculative_decoding.demo"
    config = parse_config(DemoConfig, "How many tokens a step produces, and what stays the same.", prog)
    exit_on_error(prog, lambda: run(config.model))


if __name__ == "__main__":
    main()
