"""python -m part07_prefix_caching.bench: prompts with a shared prefix, chats, and unrelated prompts.

Writes results/part07.json and results/part07.png. Everything runs in one process, in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import plotting
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.results import median, write_result
from common.sampling_params import SamplingParams
from common.workloads import nano_vllm_cpu, shared_prefix

from .config import EngineConfig
from .core.block_manager import BlockManager
from .core.engine import LLMEngine
from .core.request import Request
from .lab.radix_tree import RadixTree
from .lab.timeline import summary, traced

BLOCK_SIZE = 16
MODES = {"off": False, "on": True}
Conversation = list[list[int]]  # the user's questions, turn by turn


@dataclass(frozen=True, slots=True)
class BenchConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    large_model: str = option("random:llama-110m", "a model whose prompts take seconds")
    prefix_tokens: int = option(1_500, "tokens in the shared prefix")
    num_requests: int = option(12, "prompts that begin with the shared prefix", 2)
    repeats: int = option(3, "runs of each, in turns; medians are reported", 1)
    results_dir: str = option("results", "folder for the JSON and the plots")

    def __post_init__(self) -> None:
        check_minimums(self)


class Client:
    """Sends one request after the other and measures their TTFT."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine, self.ttfts_s, self.num_prompt_tokens = engine, list[float](), 0
        self._num_asked = 0

    def ask(self, prompt: list[int], max_tokens: int) -> list[int]:
        self._num_asked += 1
        self.num_prompt_tokens += len(prompt)
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self.engine.add_request(str(self._num_asked), prompt, params)
        started, answer = time.perf_counter(), list[int]()
        while self.engine.has_unfinished_requests:
            for output in self.engine.step():
                if not answer:
                    self.ttfts_s.append(time.perf_counter() - started)
                answer += output.token_ids
        return answer

    def report(self) -> dict[str, float]:
        scheduler = self.engine.scheduler
        return {
            "ttft_ms": 1e3 * median(self.ttfts_s[1:]),  # without the first request, which cannot hit
            "hit_rate": scheduler.num_hit_tokens / self.num_prompt_tokens,
            "tokens_computed": self.engine.executor.worker.runner.num_tokens_computed,
        }


def ask_with_prefix(client: Client, config: BenchConfig) -> None:
    for request in shared_prefix(config.num_requests, prefix_tokens=config.prefix_tokens, suffix_tokens=32):
        client.ask(request.prompt_token_ids or [], max_tokens=8)


def conversations(num_conversations: int = 4, num_turns: int = 5) -> list[Conversation]:
    return [
        [[100 + (37 * talk + 11 * turn + i) % 3_000 for i in range(40)] for turn in range(num_turns)]
        for talk in range(num_conversations)
    ]


def chat(client: Client, config: BenchConfig) -> None:
    """The conversations take turns. Each turn sends the whole conversation so far."""
    del config
    histories: list[list[int]] = [[] for _ in conversations()]
    for turn in zip(*conversations(), strict=True):
        for history, question in zip(histories, turn, strict=True):
            history += question
            history += client.ask(list(history), max_tokens=48)


def ask_unrelated(client: Client, config: BenchConfig) -> None:
    del config
    for request in nano_vllm_cpu():
        client.ask(request.prompt_token_ids or [], max_tokens=8)


WORKLOADS: dict[str, Callable[[Client, BenchConfig], None]] = {
    "shared prefix": ask_with_prefix,
    "chat": chat,
    "unrelated": ask_unrelated,
}


def measure_ttft(
    config: BenchConfig, model: str, repeats: int, workloads: Iterable[str] = WORKLOADS
) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for workload in workloads:
        run = WORKLOADS[workload]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in MODES}
        for _ in range(repeats):
            for name, is_on in MODES.items():
                client = Client(LLMEngine(EngineConfig(model=model, enable_prefix_caching=is_on, max_num_seqs=32)))
                run(client, config)
                runs[name].append(client.report())
        found[workload] = {
            name: {key: round(median([run[key] for run in each]), 4) for key in each[0]} for name, each in runs.items()
        }
    return found


def measure_overhead(config: BenchConfig) -> dict[str, dict[str, float]]:
    """What prefix caching costs where it cannot help: the engine's own work in a step, for unrelated prompts. Without
    async scheduling, so that none of it is hidden behind the model."""
    requests = nano_vllm_cpu()

    def run(engine: LLMEngine) -> None:
        for request in requests:
            params = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
            engine.add_request(request.request_id, request.prompt_token_ids or [], params)
        while engine.has_unfinished_requests:
            engine.step()

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in MODES}
    for _ in range(2 * config.repeats + 1):
        for name, is_on in MODES.items():
            settings = EngineConfig(
                model=config.model, max_num_seqs=32, enable_prefix_caching=is_on, async_scheduling=False
            )
            steps = traced(settings, run)
            host_s = sum(step.schedule_s + step.update_s for step in steps)
            runs[name].append(summary(steps) | {"host_share": host_s / (steps[-1].end_s - steps[0].start_s)})
    return {name: {key: round(median([run[key] for run in each]), 5) for key in each[0]} for name, each in runs.items()}


def compare_lookups(num_blocks: int = 400) -> dict[str, dict[str, dict[str, float]]]:
    """Hashes versus a radix tree, in a pool too small for all prompts: hit rate, and lookup time per prompt."""
    shared = shared_prefix(200, prefix_tokens=512, suffix_tokens=64, num_prefixes=20)
    prompts = {
        "20 prefixes": [request.prompt_token_ids or [] for request in shared],
        "chats": list(chat_prompts(40, 6)),
        "unrelated": [request.prompt_token_ids or [] for request in nano_vllm_cpu()],
    }
    return {
        name: {"hashes": run_hashes(each, num_blocks), "radix tree": run_tree(each, num_blocks)}
        for name, each in prompts.items()
    }


def chat_prompts(num_conversations: int, num_turns: int) -> Iterable[list[int]]:
    histories: list[list[int]] = [[] for _ in range(num_conversations)]
    for turn in zip(*conversations(num_conversations, num_turns), strict=True):
        for history, question in zip(histories, turn, strict=True):
            history += question
            yield list(history)


def run_hashes(prompts: list[list[int]], num_blocks: int) -> dict[str, float]:
    blocks, num_found, params = BlockManager(num_blocks + 1, BLOCK_SIZE), 0, SamplingParams(max_tokens=1)
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        request = Request(str(number), prompt, params, len(prompt) + 1)
        cached = blocks.find_cached(request)
        assert blocks.admit(request.request_id, len(prompt), cached), "the pool has room for one prompt"
        blocks.cache_full_blocks(request, len(prompt))
        blocks.free(request.request_id)
        num_found += len(cached) * BLOCK_SIZE
    return lookup_result(prompts, num_found, time.perf_counter() - started)


def run_tree(prompts: list[list[int]], num_blocks: int) -> dict[str, float]:
    tree, free, num_found = RadixTree(BLOCK_SIZE), list(range(num_blocks)), 0
    started = time.perf_counter()
    for prompt in prompts:
        cached, node = tree.match_prefix(prompt[:-1])
        tree.lock(node)
        num_new = -(-len(prompt) // BLOCK_SIZE) - len(cached)
        if num_new > len(free):
            free += tree.evict(num_new - len(free))
        new = [free.pop() for _ in range(num_new)]
        table, num_full = cached + new, len(prompt) // BLOCK_SIZE
        num_known = tree.insert(prompt, table[:num_full])
        free += table[len(cached) : num_known] + table[num_full:]
        tree.unlock(node)
        num_found += len(cached) * BLOCK_SIZE
    return lookup_result(prompts, num_found, time.perf_counter() - started)


def lookup_result(prompts: list[list[int]], num_found: int, seconds: float) -> dict[str, float]:
    return {
        "hit_rate": round(num_found / sum(map(len, prompts)), 4),
        "us_per_prompt": round(1e6 * seconds / len(prompts), 1),
    }


def plot(m: dict[str, Any], path: Path) -> None:
    model, found = next(iter(m["ttft"].items()))
    fig, (left, right) = plotting.panels(
        [(f"TTFT with {model}", "", "median TTFT (ms)"), ("Prefix cache hit rate", "", "prompt tokens cached (%)")]
    )
    for i, (name, color) in enumerate((("off", plotting.BASELINE_COLOR), ("on", plotting.COLORS[0]))):
        values = [found[workload][name]["ttft_ms"] for workload in WORKLOADS]
        bars = left.bar([x + 0.4 * i for x in range(len(values))], values, 0.36, color=color, label=f"caching {name}")
        plotting.label_bars(left, bars)
    left.set_xticks([x + 0.2 for x in range(len(WORKLOADS))], list(WORKLOADS))
    left.legend(loc="upper right")
    left.margins(y=0.2)
    bars = right.bar(range(len(WORKLOADS)), [100 * found[name]["on"]["hit_rate"] for name in WORKLOADS], 0.5)
    plotting.label_bars(right, bars)
    right.set_xticks(range(len(WORKLOADS)), list(WORKLOADS))
    right.set_ylim(0, 100)
    plotting.save(fig, path)


def report(console: Console, m: dict[str, Any]) -> None:
    for model, found in m["ttft"].items():
        table = Table("prompts", "caching", "hit rate", "tokens computed", "TTFT", title=model)
        for workload, runs in found.items():
            for name, run in runs.items():
                table.add_row(
                    workload, name, f"{100 * run['hit_rate']:.0f}%", f"{run['tokens_computed']:,.0f}",
                    f"{run['ttft_ms']:,.1f} ms",
                )  # fmt: skip
        console.print(table)
    off, on = m["overhead"]["off"], m["overhead"]["on"]
    console.print(
        f"unrelated prompts: the engine's own work is {100 * off['host_share']:.2f}% of the time without caching, "
        f"{100 * on['host_share']:.2f}% with it",
        highlight=False,
    )
    table = Table("prompts", "lookup", "hit rate", "µs per prompt")
    for name, ways in m["lookups"].items():
        for way, run in ways.items():
            table.add_row(name, way, f"{100 * run['hit_rate']:.1f}%", f"{run['us_per_prompt']:.0f}")
    console.print(table)


def run(config: BenchConfig) -> None:
    results = Path(config.results_dir)
    measurements: dict[str, Any] = {
        "ttft": {
            config.model: measure_ttft(config, config.model, config.repeats),
            config.large_model: measure_ttft(config, config.large_model, 1, ["shared prefix"]),
        },
        "overhead": measure_overhead(config),
        "lookups": compare_lookups(),
    }
    report(Console(), measurements)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    write_result(
        results / "part07.json",
        benchmark="part07",
        config=settings,
        seed=0,
        repeats=config.repeats,
        measurements=measurements,
    )
    plot(measurements, results / "part07.png")


def main() -> None:
    prog = "part07_prefix_caching.bench"
    config = parse_config(BenchConfig, "Prompts with a shared prefix, chats, and unrelated prompts.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
