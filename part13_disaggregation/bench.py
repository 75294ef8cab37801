"""python -m part13_disaggregation.bench: swap or recompute, TTFT by where a prefix is, and weights that don't fit.

Writes results/part12.json and results/part12.png.
"""

from __future__ import annotations

import contextlib
import gc
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from common import plotting
from common.checkpoint import MODELS_DIR, load_model, resolve_checkpoint
from common.cli import check_minimums, exit_on_error, option, parse_config
from common.results import median, write_result
from common.sampling_params import SamplingParams

from .config import EngineConfig
from .core.cost_model import Rate
from .core.engine import LLMEngine
from .core.executor import UniProcExecutor
from .lab.redis_server import is_installed, redis_server

BLOCK_SIZE = 16
SOURCES = ("recompute", "device", "host", "disk", "Redis")
BURST: dict[str, dict[str, Any]] = {"recompute": {}, "swap": {"kv_offload_gib": 2.0}}


@dataclass(frozen=True, slots=True)
class BenchConfig:
    models: str = option("tiny,random:llama-110m", "comma-separated")
    prefixes: str = option("16,32,64,128,256,512,1024,1900", "lengths of the prefix that comes back, in tokens")
    weights_model: str = option("random:llama-110m", "whose weights are offloaded")
    num_requests: int = option(16, "in the burst", 4)
    repeats: int = option(3, "runs of each, in turns; medians are reported", 1)
    results_dir: str = option("results", "folder for the JSON and the plot")

    def __post_init__(self) -> None:
        check_minimums(self)


def random_prompt(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(100, 4_000) for _ in range(num_tokens)]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def ask(engine: LLMEngine, prompt: list[int]) -> float:
    """TTFT in seconds, of a request that is alone."""
    started, ttft_s = time.perf_counter(), 0.0
    engine.add_request("ask", prompt, greedy(1))
    while engine.has_unfinished_requests:
        if engine.step():
            ttft_s = time.perf_counter() - started
    return ttft_s


def num_computed(engine: LLMEngine) -> int:
    assert isinstance(engine.executor, UniProcExecutor)
    return engine.executor.worker.runner.num_tokens_computed


# A burst


def run_burst(model: str, num_requests: int, flags: dict[str, Any]) -> tuple[dict[str, float], list[list[int]]]:
    """Requests that need four times the pool, all at once. They grow from 128 to 256 tokens. Returns figures, and the
    answers."""
    num_blocks = num_requests * 256 // BLOCK_SIZE // 4
    engine = LLMEngine(EngineConfig(model=model, num_threads=1, num_kv_blocks=num_blocks + 1, **flags))
    rng = random.Random(0)
    ask(engine, random_prompt(rng, 300))  # warm-up
    computed, answers = num_computed(engine), {str(number): list[int]() for number in range(num_requests)}
    started = time.perf_counter()
    for name in answers:
        engine.add_request(name, random_prompt(rng, 128), greedy(128))
    while engine.has_unfinished_requests:
        for output in engine.step():
            answers[output.request_id] += output.token_ids
    seconds = time.perf_counter() - started
    stats, wanted = engine.offloader.stats, num_requests * 255
    engine.shutdown()
    return {
        "seconds": seconds, "preemptions": engine.scheduler.num_preemptions,
        "tokens_recomputed": num_computed(engine) - computed - wanted, "tokens_loaded": stats.num_host_tokens,
        "loads_refused": stats.num_recomputed_tokens,
    }, list(answers.values())  # fmt: skip


def measure_burst(model: str, config: BenchConfig) -> dict[str, dict[str, float]]:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in BURST}
    for _ in range(config.repeats):
        answers = []
        for name, flags in BURST.items():
            found, token_ids = run_burst(model, config.num_requests, flags)
            runs[name].append(found)
            answers.append(token_ids)
        assert answers[0] == answers[1], f"{model}: offloading changed an answer"
    return {
        name: {key: round(median([each[key] for each in found]), 3) for key in found[0]} for name, found in runs.items()
    }


# A prefix that comes back


class Returning:
    """An engine whose prefix is where a source says when the next request comes."""

    def __init__(self, source: str, model: str, directory: str, url: str | None) -> None:
        flags = flags_for(source, directory, url, gib=1.0)
        config = EngineConfig(model=model, num_threads=1, max_model_len=2_048, num_kv_blocks=300, **flags)
        self.source, self.engine = source, LLMEngine(config)
        for _ in range(2):  # warm-up: touch all blocks
            self.measure(random_prompt(random.Random(1), 2_000))

    def measure(self, prompt: list[int]) -> float:
        """TTFT in seconds of a prompt that was answered before. Always loads, whatever the policy would do."""
        engine = self.engine
        ask(engine, prompt)
        if self.source != "device":
            engine.reset_prefix_cache()
        if self.source in ("disk", "Redis"):
            flush(engine)
            self._empty_host()
        engine.offloader.cost.compute = Rate()
        return ask(engine, prompt)

    def _empty_host(self) -> None:
        """No transfer is in flight."""
        host = self.engine.offloader.host
        for block_hash in list(host.blocks):
            host.free_slots.append(host.blocks.pop(block_hash).slot)


def measure_ttft(model: str, config: BenchConfig, directory: str, url: str | None) -> dict[str, dict[str, float]]:
    """source → prefix length → TTFT in ms, for the prefix and 8 new tokens."""
    sources = [source for source in SOURCES if source != "Redis" or url is not None]
    engines = [Returning(source, model, f"{directory}/{model.replace(':', '-')}", url) for source in sources]
    lengths = [int(length) for length in config.prefixes.split(",")]
    found: dict[str, dict[int, list[float]]] = {source: {length: [] for length in lengths} for source in sources}
    rng = random.Random(2)
    for _ in range(config.repeats):
        for length in lengths:
            prompt = random_prompt(rng, length + 8)
            for each in engines:
                found[each.source][length].append(1e3 * each.measure(prompt))
    for each in engines:
        each.engine.shutdown()
    engines.clear()
    gc.collect()
    return {
        source: {str(length): round(median(values), 2) for length, values in by_length.items()}
        for source, by_length in found.items()
    }


# Where it loses


def flags_for(source: str, directory: str, url: str | None, gib: float) -> dict[str, Any]:
    if source in ("off", "recompute", "device"):
        return {}
    places: dict[str, dict[str, Any]] = {"disk": {"kv_offload_dir": directory}, "Redis": {"kv_offload_url": url}}
    return {"kv_offload_gib": gib, **places.get(source, {})}


def measure_cost(model: str, config: BenchConfig, directory: str, url: str | None) -> dict[str, float]:
    """Seconds for prompts that never come back: what saving costs."""
    engines = {
        name: LLMEngine(
            EngineConfig(
                model=model, num_threads=1, num_kv_blocks=200, **flags_for(name, f"{directory}/cost", url, gib=1.0)
            )
        )
        for name in ("off", "host", "disk", "Redis")
        if name != "Redis" or url is not None
    }
    found: dict[str, list[float]] = {name: [] for name in engines}
    rng = random.Random(4)
    for repeat in range(2 * config.repeats + 1):
        prompts = [random_prompt(rng, 256) for _ in range(24)]
        for name, engine in engines.items():
            started = time.perf_counter()
            for number, prompt in enumerate(prompts):
                engine.add_request(str(number), prompt, greedy(4))
            while engine.has_unfinished_requests:
                engine.step()
            if repeat:  # the first one is the warm-up
                found[name].append(time.perf_counter() - started)
            flush(engine)
    for engine in engines.values():
        engine.shutdown()
    return {name: round(median(seconds), 4) for name, seconds in found.items()}


def flush(engine: LLMEngine) -> None:
    """Wait until the tiers have got what was saved."""
    assert isinstance(engine.executor, UniProcExecutor)
    if (copier := engine.executor.worker.copier) is not None:
        copier.flush()


# Weights that don't fit


@contextlib.contextmanager
def on_disk(model: str) -> Iterator[str]:
    """A directory with the model as a checkpoint, whose files can be mapped into memory."""
    checkpoint = resolve_checkpoint(model)
    if checkpoint.directory is not None:
        yield str(checkpoint.directory)
        return
    with tempfile.TemporaryDirectory(prefix="weights-") as directory:
        load_model(checkpoint, torch.float32, "cpu").save_pretrained(directory)
        for path in (MODELS_DIR / "tiny").iterdir():
            if path.name.startswith(("tokenizer", "chat_template")):
                (Path(directory) / path.name).write_bytes(path.read_bytes())
        gc.collect()
        yield directory


def measure_weights(config: BenchConfig, batch_sizes: tuple[int, ...] = (1, 16)) -> list[dict[str, Any]]:
    """Speed with more and more layers offloaded."""
    with on_disk(config.weights_model) as directory:
        total = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors")) / 2**30
        rows = []
        for share in (0.0, 0.2, 0.4, 0.6, 1.0):
            engine = LLMEngine(
                EngineConfig(model=directory, num_threads=1, max_model_len=512, cpu_offload_gb=share * total)
            )
            rows.append((engine, {size: list[float]() for size in batch_sizes}))
        answers: list[list[list[int]]] = []
        for _ in range(config.repeats):
            for engine, speeds in rows:
                for size in batch_sizes:
                    speed, token_ids = generate(engine, size)
                    speeds[size].append(speed)
                    answers.append(token_ids)
        assert all(each == other for each, other in zip(answers, answers[2:], strict=False)), "an answer changed"
        return [describe_weights(engine, speeds) for engine, speeds in rows]


def generate(engine: LLMEngine, num_requests: int, max_tokens: int = 16) -> tuple[float, list[list[int]]]:
    """Output tokens per second without the first token, and the answers."""
    rng = random.Random(3)
    answers = {str(number): list[int]() for number in range(num_requests)}
    for name in answers:
        engine.add_request(name, random_prompt(rng, 32), greedy(max_tokens))
    started = 0.0
    while engine.has_unfinished_requests:
        for output in engine.step():
            answers[output.request_id] += output.token_ids
        if not started and all(answers.values()):
            started = time.perf_counter()
    return num_requests * (max_tokens - 1) / (time.perf_counter() - started), list(answers.values())


def describe_weights(engine: LLMEngine, speeds: dict[int, list[float]]) -> dict[str, Any]:
    assert isinstance(engine.executor, UniProcExecutor)
    model = engine.executor.worker.model
    total = sum(parameter.nbytes for parameter in model.parameters())
    fetcher = model.fetcher
    fetched = 0 if fetcher is None or len(fetcher.layers) <= 2 else sum(
        parameter.nbytes for layer in fetcher.layers for parameter in layer.parameters()
    )  # fmt: skip
    steps_per_s = {size: median(values) / size for size, values in speeds.items()}
    return {
        "num_layers": model.num_layers, "num_offloaded": 0 if fetcher is None else len(fetcher.layers),
        "resident_share": round(1 - (0 if fetcher is None else fetcher.num_bytes_saved) / total, 3),
        "mb_per_step": round(fetched / 1e6, 1),
        "tokens_per_s": {str(size): round(median(values), 2) for size, values in speeds.items()},
        "gb_per_s": {str(size): round(fetched * rate / 1e9, 2) for size, rate in steps_per_s.items()},
    }  # fmt: skip


def measure_all(config: BenchConfig) -> dict[str, Any]:
    models = config.models.split(",")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-"))
        url = stack.enter_context(redis_server()) if is_installed() else None
        ttft = {model: measure_ttft(model, config, directory, url) for model in models}
        cost = {model: measure_cost(model, config, directory, url) for model in models}
    return {
        "ttft_ms": ttft,
        "unrelated_prompts_s": cost,
        "crossing": {model: crossings(found) for model, found in ttft.items()},
        "burst": {model: measure_burst(model, config) for model in models},
        "weights": measure_weights(config),
    }  # fmt: skip


def crossings(found: dict[str, dict[str, float]]) -> dict[str, int | None]:
    return {source: crossing(found, source) for source in found if source != "recompute"}


def crossing(found: dict[str, dict[str, float]], source: str) -> int | None:
    """The shortest prefix from which on loading is faster than computing, of those measured. None: it never is."""
    faster = [int(length) for length, ms in found[source].items() if ms < found["recompute"][length]]
    slower = [int(length) for length, ms in found[source].items() if ms >= found["recompute"][length]]
    return min((length for length in faster if length > max(slower, default=0)), default=None)


def plot(m: dict[str, Any], path: Path) -> None:
    models = sorted(m["ttft_ms"], key=lambda model: max(m["ttft_ms"][model]["recompute"].values()))
    labels = [(f"TTFT, {model.removeprefix('random:')}", "prefix (tokens)", "ms") for model in models]
    fig, axes = plotting.panels([*labels, ("Weights offloaded", "share resident (%)", "tokens/s, all resident = 1")])
    for ax, model in zip(axes, models, strict=False):
        for source, color in zip(SOURCES, (plotting.BASELINE_COLOR, *plotting.COLORS), strict=False):
            if source in m["ttft_ms"][model]:
                points = sorted((int(length), ms) for length, ms in m["ttft_ms"][model][source].items())
                ax.plot(*zip(*points, strict=True), "o-", color=color, label=source)
        ax.set_yscale("log")
        ax.set_ylim(4, 6_000)
        ax.set_xscale("log", base=4)
        ax.set_xticks([16, 64, 256, 1_024], ["16", "64", "256", "1,024"])
        ax.set_yticks([10, 100, 1_000], ["10", "100", "1,000"])
    axes[0].legend(fontsize=9, loc="upper left")
    for size in sorted(m["weights"][0]["tokens_per_s"], key=int):
        base = m["weights"][0]["tokens_per_s"][size]
        shares = [100 * row["resident_share"] for row in m["weights"]]
        ratios = [row["tokens_per_s"][size] / base for row in m["weights"]]
        label = "1 request" if size == "1" else f"{size} requests"
        axes[-1].plot(shares, ratios, "o-", label=label)
    axes[-1].set_ylim(0, 1.1)
    axes[-1].legend(fontsize=9)
    plotting.save(fig, path)


def report(console: Console, m: dict[str, Any]) -> None:
    for model, found in m["ttft_ms"].items():
        table = Table(f"{model}: TTFT, ms", *found["recompute"], box=SIMPLE)
        for source, points in found.items():
            table.add_row(source, *(f"{ms:,.1f}" for ms in points.values()))
        console.print(table)
        console.print(f"faster than recompute from: {m['crossing'][model]}", highlight=False)
        console.print(f"unrelated prompts, s: {m['unrelated_prompts_s'][model]}", highlight=False)
    for model, runs in m["burst"].items():
        for name, each in runs.items():
            console.print(f"burst, {model}, {name}: {each}", highlight=False)
    for row in m["weights"]:
        console.print(f"weights: {row}", highlight=False)


def run(config: BenchConfig) -> None:
    results, measurements = Path(config.results_dir), measure_all(config)
    report(Console(), measurements)
    settings = {key: value for key, value in asdict(config).items() if key != "results_dir"}
    write_result(
        results / "part12.json", benchmark="part12", config=settings, seed=0, repeats=config.repeats,
        measurements=measurements,
    )  # fmt: skip
    plot(measurements, results / "part12.png")


def main() -> None:
    prog = "part13_disaggregation.bench"
    config = parse_config(BenchConfig, "Swap or recompute, TTFT by where a prefix is, weights that don't fit.", prog)
    exit_on_error(prog, lambda: run(config))


if __name__ == "__main__":
    main()
