"""python -m part13_disaggregation.demo: a prefix leaves the device and comes back: from host memory, and from disk."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from common.cli import exit_on_error, option, parse_config
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .core.executor import UniProcExecutor
from .llm import LLM

PROG = "part13_disaggregation.demo"
STORY = "Once upon a time a shy fox lived beside a river. Every morning the fox looked for something new. " * 40
QUESTION = "What is a KV cache?"
BLOCK_SIZE, NUM_BLOCKS, HOST_GIB, MAX_SEQS = 16, 101, 0.05, 16
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")


@dataclass(slots=True)
class Visit:
    """One answer, and where the KV cache of its prompt came from, in tokens."""

    token_ids: list[int]
    num_prompt_tokens: int
    num_on_device: int
    num_from_host: int
    num_from_disk: int
    ttft_ms: float


def visit(llm: LLM, prompt: list[int]) -> Visit:
    engine, stats, token_ids, num_found, ttft_s = llm.engine, llm.engine.offloader.stats, list[int](), 0, 0.0
    num_host, num_tier = stats.num_host_tokens, stats.num_tier_tokens
    started = time.perf_counter()
    engine.add_request("visit", prompt, GREEDY)
    while engine.has_unfinished_requests:
        for output in engine.step():
            ttft_s = ttft_s or time.perf_counter() - started
            num_found += output.num_cached_tokens or 0
            token_ids += output.token_ids
    num_host, num_tier = stats.num_host_tokens - num_host, stats.num_tier_tokens - num_tier
    return Visit(token_ids, len(prompt), num_found - num_host - num_tier, num_host, num_tier, 1e3 * ttft_s)


def make_llm(model: str, directory: str | None, **flags: object) -> LLM:
    """An engine with a small pool, so that it is full soon, and warmed up."""
    settings: dict[str, object] = {
        "model": model, "block_size": BLOCK_SIZE, "num_kv_blocks": NUM_BLOCKS, "max_num_seqs": MAX_SEQS,
        "kv_offload_gib": HOST_GIB, "kv_offload_dir": directory, **flags,
    }  # fmt: skip
    llm = LLM(EngineConfig(**settings))  # type: ignore[arg-type]
    llm.generate([[5] * 40], GREEDY)
    return llm


def show_tiers(console: Console, model: str, directory: str) -> None:
    console.rule("1. A prefix comes back")
    llm = make_llm(model, directory)
    story = encode_prompt({"prompt": STORY}, llm.tokenizer, llm.max_model_len)
    others = [[100 + number, *([200 + number] * (BLOCK_SIZE * (NUM_BLOCKS - 3) // 2))] for number in range(3)]
    console.print(
        f"Ada's prompt has {len(story):,} tokens. The device has room for {BLOCK_SIZE * (NUM_BLOCKS - 1):,}.\n",
        highlight=False,
    )
    table = Table("Ada's prompt comes", "device", "host", "disk", "computed", "TTFT")
    visits = list[Visit]()

    def add(when: str, llm: LLM) -> None:
        visits.append(each := visit(llm, story))
        num_found = each.num_on_device + each.num_from_host + each.num_from_disk
        counts = (each.num_on_device, each.num_from_host, each.num_from_disk, each.num_prompt_tokens - num_found)
        table.add_row(when, *(f"{count:,}" for count in counts), f"{each.ttft_ms:.0f} ms")

    add("for the first time", llm)
    add("once more", llm)
    llm.generate(others, GREEDY)
    add("after others filled the pool", llm)
    llm.engine.shutdown()
    llm = make_llm(model, directory)
    add("to a new engine", llm)
    llm.engine.shutdown()
    console.print(table)
    same = "the same" if all(each.token_ids == visits[0].token_ids for each in visits) else "NOT the same: a bug"
    console.print(f"The four answers are {same}.\n", highlight=False)


def show_preemption(console: Console, model: str) -> None:
    console.rule("2. More requests than the pool can hold")
    console.print(
        f"Eight requests of 150 tokens, which grow to 250. They need 128 blocks; the pool has {NUM_BLOCKS - 1}.\n",
        highlight=False,
    )
    table, answers = (
        Table("a preempted request is", "preemptions", "tokens computed", "loaded"),
        list[list[list[int]]](),
    )
    prompts = [[100 + 31 * number] + [(300 + 7 * number * i) % 3_000 + 100 for i in range(149)] for number in range(8)]
    for name, gib in (("computed again", 0.0), ("loaded from host memory", HOST_GIB)):
        llm = make_llm(model, None, kv_offload_gib=gib)
        executor, num_preemptions = llm.engine.executor, llm.engine.scheduler.num_preemptions
        assert isinstance(executor, UniProcExecutor)
        num_computed = executor.worker.runner.num_tokens_computed
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        answers.append([output.outputs[0].token_ids for output in outputs])
        table.add_row(
            name, str(llm.engine.scheduler.num_preemptions - num_preemptions),
            f"{executor.worker.runner.num_tokens_computed - num_computed:,}",
            f"{llm.engine.offloader.stats.num_host_tokens:,}",
        )  # fmt: skip
        llm.engine.shutdown()
    console.print(table)
    same = "the same" if answers[0] == answers[1] else "NOT the same: a bug"
    console.print(f"The answers are {same}.\n", highlight=False)


def show_weights(console: Console, model: str) -> None:
    console.rule("3. Weights that don't fit")
    table, answers = Table("layers fetched in each step", "weights on device", "tokens/s"), list[str]()
    for gib in (0.0, 0.004, 1.0):
        llm = make_llm(model, None, kv_offload_gib=0.0, cpu_offload_gb=gib)
        assert isinstance(llm.engine.executor, UniProcExecutor)
        decoder = llm.engine.executor.worker.model
        fetcher, total = decoder.fetcher, sum(parameter.nbytes for parameter in decoder.parameters())
        saved = 0 if fetcher is None else fetcher.num_bytes_saved
        prompt = encode_prompt({"messages": [{"role": "user", "content": QUESTION}]}, llm.tokenizer, 512)
        started = time.perf_counter()
        [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))
        speed = 48 / (time.perf_counter() - started)
        answers.append(str(llm.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)))
        count = 0 if fetcher is None else len(fetcher.layers)
        table.add_row(f"{count} of {decoder.num_layers}", f"{(total - saved) / 2**20:.1f} MiB", f"{speed:.0f}")
    console.print(table)
    same = "the same" if len(set(answers)) == 1 else "NOT the same: a bug"
    console.print(f"The three answers are {same}.\n", highlight=False)


def run(config: DemoConfig) -> None:
    console = Console()
    console.print(f"\n[bold]Part 12: KV offloading.[/] Model {config.model}.\n", highlight=False)
    with tempfile.TemporaryDirectory(prefix="kv-") as directory:
        show_tiers(console, config.model, directory)
    show_preemption(console, config.model)
    show_weights(console, config.model)


def main() -> None:
    config = parse_config(DemoConfig, "A prefix leaves the device and comes back.", PROG)
    exit_on_error(PROG, lambda: run(config))


if __name__ == "__main__":
    main()
