"""What each technique contributes: added one by one, and left out one by one, on the same work.

    python -m part15_full_architecture.lab.attribution

Writes results/part15_attribution.json and .png. Counters explain the times: steps, tokens computed, bytes read, and
operators of torch per output token.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from common import plotting
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.results import median, write_result
from common.sampling_params import SamplingParams
from common.stats import percentile
from common.threads import set_num_threads

from ..config import EngineConfig
from ..llm import LLM
from ..worker.model import DecoderModel
from ..worker.weight import Weight
from .operators import CallCounter, replaced_run

PROG = "part15_full_architecture.lab.attribution"
FULL: dict[str, Any] = {
    "max_num_seqs": 32, "max_num_batched_tokens": 256, "num_kv_blocks": 200, "speculative_method": "ngram",
    "kv_offload_gib": 0.25,
}  # fmt: skip
# What an engine without a technique has instead, in the order in which the course adds them.
WITHOUT: dict[str, dict[str, Any]] = {
    "continuous batching": {"max_num_seqs": 1},
    "async scheduling": {"async_scheduling": False},
    "chunked prefill": {"enable_chunked_prefill": False, "max_num_batched_tokens": 2_048},
    "prefix caching": {"enable_prefix_caching": False},
    "n-gram drafts": {"speculative_method": "none"},
    "KV offloading": {"kv_offload_gib": 0.0},
    "CPU kernels": {"kernels": "torch"},
    "packed matrices": {"pack_weights": False},
    "megakernel": {"megakernel": False},
}
NEEDS = {"KV offloading": "prefix caching"}  # which is left out with it
BEFORE = "one request at a time"


@dataclass(frozen=True, slots=True)
class AttributionConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    repeats: int = option(3, "runs, in turns; medians are reported", 1)
    results_dir: str = option("results", "folder for the JSON and the plot")

    def __post_init__(self) -> None:
        check_minimums(self)


@dataclass(frozen=True, slots=True)
class Work:
    """Bursts of requests: each begins when the one before has ended."""

    bursts: list[list[tuple[list[int], int]]]  # prompts and their numbers of output tokens

    @property
    def num_output_tokens(self) -> int:
        return sum(num_tokens for burst in self.bursts for _, num_tokens in burst)


@dataclass(slots=True)
class Counters:
    """Of one run. bytes_read: once a step, the weights that it reads, and each sequence's keys and values."""

    num_steps: int = 0
    num_tokens_computed: int = 0
    bytes_read: int = 0
    num_operators: int = 0
    token_times_s: list[list[float]] = field(default_factory=list)  # of each request, from its burst's beginning


def make_work(seed: int) -> Work:
    """Three bursts. The first one has 9 requests that share three prefixes of 400 tokens. The second one has prompts of
    1,000 tokens, which need the whole KV cache, and texts that repeat themselves. The third one has the first one's
    prefixes again."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(100, 3_900) for _ in range(count)]

    prefixes = [tokens(400) for _ in range(3)]

    def with_prefixes() -> list[tuple[list[int], int]]:
        return [(prefixes[number % 3] + tokens(16), 16) for number in range(9)]

    others = [(tokens(1_000), 8) for _ in range(4)] + [(tokens(12) * 3, 48) for _ in range(8)]
    rng.shuffle(others)
    return Work([with_prefixes(), others, with_prefixes()])


def variants() -> dict[str, dict[str, Any]]:
    """Name → flags: "+ x" has x and all before it; "- x" has all but x, and what needs x."""
    found, missing = {}, dict(WITHOUT)
    found[BEFORE] = flags_without(missing)
    for name in WITHOUT:
        del missing[name]
        found[f"+ {name}"] = flags_without(missing)
    for name in WITHOUT:
        left_out = [name, *(other for other, needed in NEEDS.items() if needed == name)]
        found[f"- {name}"] = flags_without(left_out)
    return found


def flags_without(names: Sequence[str] | dict[str, Any]) -> dict[str, Any]:
    flags = dict(FULL)
    for name in names:
        flags |= WITHOUT[name]
    return flags


def run_work(llm: LLM, work: Work, counts_operators: bool = False) -> tuple[float, Counters]:
    """Seconds, and counters. The caches are empty at the beginning."""
    engine, counters = llm.engine, Counters()
    assert engine.reset_prefix_cache(), "the engine is idle"
    runner = engine.executor.worker.runner  # type: ignore[attr-defined]
    steps_before, tokens_before = engine.num_steps, runner.num_tokens_computed
    start_s = time.perf_counter()
    with counting(runner, bytes_per_step(runner.model), engine.executor.bytes_per_block, counters, counts_operators):
        for number, burst in enumerate(work.bursts):
            answer(llm, burst, number, counters)
    seconds = time.perf_counter() - start_s
    counters.num_steps = engine.num_steps - steps_before
    counters.num_tokens_computed = runner.num_tokens_computed - tokens_before
    return seconds, counters


def answer(llm: LLM, burst: list[tuple[list[int], int]], number: int, counters: Counters) -> None:
    times: dict[str, list[float]] = {}
    begin_s = time.perf_counter()
    for index, (prompt, num_tokens) in enumerate(burst):
        request_id = f"{number} {index}"
        times[request_id] = []
        llm.engine.add_request(
            request_id, prompt, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        )
    while llm.engine.has_unfinished_requests:
        outputs = llm.engine.step()
        now_s = time.perf_counter() - begin_s
        for output in outputs:
            assert output.error is None, output.error
            times[output.request_id] += [now_s] * len(output.token_ids)
    counters.token_times_s += times.values()


def bytes_per_step(model: DecoderModel) -> int:
    """Of the weights that a step reads: of the embedding only a few rows, unless the LM head is the same matrix; of a
    matrix and its packed copy, one."""
    embedding, head = model.embed_tokens, model.output_embedding
    assert embedding is not None and head is not None, "the only stage has both"
    total = model.packed_bytes + sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, Weight) and module.packed is not None and module.data.numel():
            total -= module.packed.nbytes
    head_has_own_matrix = head is not embedding or (head.packed is not None and head.packed.nbytes > 0)
    return total - embedding.weight.nbytes if head_has_own_matrix else total


@contextmanager
def counting(
    runner: Any, weight_bytes: int, bytes_per_block: int, counters: Counters, counts_operators: bool
) -> Iterator[None]:
    """Inside, each step of the runner is counted."""
    run, bytes_per_token = runner.run, bytes_per_block // runner.config.block_size

    def run_counted(batch: Any, *rest: Any) -> Any:
        counters.bytes_read += weight_bytes + int(batch.metadata.context_lens.sum()) * bytes_per_token
        if not counts_operators:
            return run(batch, *rest)
        with CallCounter() as counter:
            result = run(batch, *rest)
        counters.num_operators += counter.num_calls
        return result

    with replaced_run(runner, run_counted):
        yield


def measure(config: AttributionConfig) -> dict[str, dict[str, float]]:
    """All variants in turns, so that a slow moment of the machine hits all of them."""
    set_num_threads(None)
    llms = {name: LLM(EngineConfig(model=config.model, **flags)) for name, flags in variants().items()}
    work, seconds = make_work(0), dict[str, list[float]]()
    found: dict[str, dict[str, float]] = {}
    for name, llm in llms.items():  # warms up, too
        _, counters = run_work(llm, work, counts_operators=True)
        found[name] = {
            "steps": counters.num_steps, "tokens_computed": counters.num_tokens_computed,
            "gigabytes_read": round(counters.bytes_read / 1e9, 2),
            "operators_per_token": round(counters.num_operators / work.num_output_tokens, 1),
        }  # fmt: skip
        seconds[name] = []
    latencies: dict[str, list[dict[str, float]]] = {name: [] for name in llms}
    for _ in range(config.repeats):
        for name, llm in llms.items():
            elapsed_s, counters = run_work(llm, work)
            seconds[name].append(elapsed_s)
            latencies[name].append(latency(counters))
    for name in llms:
        found[name]["tokens_per_s"] = round(work.num_output_tokens / median(seconds[name]), 1)
        for key in latencies[name][0]:
            found[name][key] = round(median([each[key] for each in latencies[name]]), 1)
    return found


def latency(counters: Counters) -> dict[str, float]:
    ttfts = [times[0] for times in counters.token_times_s]
    gaps = [b - a for times in counters.token_times_s for a, b in zip(times, times[1:], strict=False) if b > a]
    return {"ttft_p50_ms": 1e3 * percentile(ttfts, 50), "itl_p99_ms": 1e3 * percentile(gaps, 99)}


def plot(found: dict[str, dict[str, float]], path: Path) -> None:
    """Two waterfalls: bars of output tokens per second."""
    added = [name for name in found if not name.startswith("- ")]
    full = found[added[-1]]["tokens_per_s"]
    left_out = [name for name in found if name.startswith("- ")]
    fig, (first, second) = plotting.panels(
        [("Added one by one", "output tokens/s", ""), ("Left out one by one", "share of the full engine", "")],
        height_px=460,
    )
    speeds = [found[name]["tokens_per_s"] for name in added]
    starts = [0.0, *speeds[:-1]]
    colors = [plotting.BASELINE_COLOR, *([plotting.COLORS[0]] * (len(added) - 1))]
    first.barh(range(len(added)), [b - a for a, b in zip(starts, speeds, strict=True)], left=starts, color=colors)
    for row, speed in enumerate(speeds):
        first.text(max(speed, starts[row]) + max(speeds) * 0.02, row, f"{speed:,.0f}", va="center", fontsize=10)
    first.set_yticks(range(len(added)), added, fontsize=10)
    first.set_xlim(0, max(speeds) * 1.18)
    shares = [found[name]["tokens_per_s"] / full for name in left_out]
    second.barh(range(len(left_out)), [share - 1 for share in shares], left=1, color=plotting.COLORS[1])
    for row, share in enumerate(shares):
        if share < 0.25:  # beside the bar, it would be on its name
            second.text(share + 0.02, row, f"{share:.2f}", va="center", color="white", fontsize=10)
        else:
            second.text(min(share, 1) - 0.02, row, f"{share:.2f}", va="center", ha="right", fontsize=10)
    second.set_yticks(range(len(left_out)), left_out, fontsize=10)
    second.set_xlim(0, 1.3)
    second.axvline(1, color="gray", linewidth=1)
    for axes in (first, second):
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
    plotting.save(fig, path)


def report(console: Console, found: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(found.values())))
    table = Table("", *columns, box=SIMPLE)
    for name, values in found.items():
        table.add_row(name, *(f"{values[column]:,.1f}" for column in columns))
    console.print(table)


def run(config: AttributionConfig) -> None:
    results, found = Path(config.results_dir), measure(config)
    report(Console(width=140), found)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    write_result(
        results / "part15_attribution.json", benchmark="part15_attribution", config=settings, seed=0,
        repeats=config.repeats, measurements=found,
    )  # fmt: skip
    plot(found, results / "part15_attribution.png")


def main() -> None:
    config = parse_config(AttributionConfig, "What each technique contributes to the same work.", PROG)
    exit_on_error(PROG, lambda: run(config))


if __name__ == "__main__":
    main()
