"""python -m part15_full_architecture.lab.preset_times: each preset on the same three loads, on this machine.

Writes results/part15_presets.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from common.cli import check_minimums, exit_on_error, option, parse_config
from common.load_client import LoadConfig, run_load
from common.load_report import LoadReport
from common.results import median, write_result
from common.serve import server_process
from common.workloads import WorkloadRequest, long_prompts, short_chat, with_arrivals

from ..preset import load_preset, names

PROG = "part15_full_architecture.lab.preset_times"
PART = PROG.partition(".")[0]
PLAIN = "no preset"
ELSEWHERE = ("multi_node_ray", "multi_node_torchrun")  # which need a cluster, a launcher
CHATS = 16
COLUMNS = {
    "ttft_ms": "one chat: TTFT p50 (ms)", "tpot_ms": "one chat: TPOT p50 (ms)",
    "tokens_per_s": "16 chats: output tokens/s", "itl_p99_ms": "chats and long prompts: ITL p99 (ms)",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PresetTimesConfig:
    repeats: int = option(3, "runs of each load; medians are reported", 1)
    presets: str = option("", "only these, comma-separated (default: all that need no cluster)")
    results_dir: str = option("results", "folder for the JSON")

    def __post_init__(self) -> None:
        check_minimums(self)


@contextlib.contextmanager
def deployed(name: str) -> Iterator[tuple[str, str]]:
    """A preset's URL and model, once all that it starts can answer."""
    flags = [] if name == PLAIN else ["--preset", name]
    starts, model = "engine", "tiny"
    if name != PLAIN:
        preset = load_preset(name)
        starts, model = preset.starts, str(preset.flags.get("model", model))
    engine_flags = ["--device", "cpu", "--no-log-stats"]
    with server_process(PART, *flags, *(engine_flags if starts == "engine" else ["--", *engine_flags])) as url:
        while httpx.get(f"{url}/health", trust_env=False, timeout=60).status_code != 200:
            time.sleep(0.1)
        yield url, model


def chats_and_long_prompts(seed: int) -> list[WorkloadRequest]:
    """Eight chats of 1,000 tokens, and while they decode, four prompts of about 1,500 tokens, one every half second."""
    chats = [replace(chat, max_tokens=1_000, ignore_eos=True) for chat in short_chat(8, seed)]
    prompts = long_prompts(4, seed, min_prompt_tokens=1_400, max_prompt_tokens=1_600, max_tokens=4)
    return chats + with_arrivals(prompts, [0.5 + 0.5 * number for number in range(len(prompts))])


def measure(url: str, model: str, seed: int) -> dict[str, float]:
    """seed: of the requests, so that no run finds the prompts of another one in a cache."""

    def run(requests: list[WorkloadRequest], max_concurrency: int | None = None) -> LoadReport:
        report = asyncio.run(run_load(LoadConfig(url, model, max_concurrency=max_concurrency), requests))
        assert not report.num_failed, f"{[each.error for each in report.results if each.error]}"
        return report

    one = run(short_chat(4, seed), max_concurrency=1)
    many = run(short_chat(CHATS, seed + 1))
    mixed = run(chats_and_long_prompts(seed + 2))
    assert one.ttft_s and one.tpot_s and mixed.itl_s
    return {
        "ttft_ms": 1e3 * one.ttft_s.p50, "tpot_ms": 1e3 * one.tpot_s.p50,
        "tokens_per_s": many.output_tokens_per_s, "itl_p99_ms": 1e3 * mixed.itl_s.p99,
    }  # fmt: skip


def measure_preset(name: str, repeats: int) -> dict[str, float]:
    with deployed(name) as (url, model):
        runs = [measure(url, model, 100 * number) for number in range(repeats + 1)][1:]  # the first one warms up
    return {key: round(median([run[key] for run in runs]), 1) for key in COLUMNS}


def run(config: PresetTimesConfig) -> None:
    chosen = config.presets.split(",") if config.presets else [name for name in names() if name not in ELSEWHERE]
    table, found = Table("preset", *COLUMNS.values(), box=SIMPLE), {}
    for name in [PLAIN, *chosen]:
        found[name] = measure_preset(name, config.repeats)
        table.add_row(name, *(f"{value:,.1f}" for value in found[name].values()))
    Console(width=120).print(table)
    write_result(
        Path(config.results_dir) / "part15_presets.json", benchmark="part15_presets", seed=0, repeats=config.repeats,
        config={key: value for key, value in asdict(config).items() if key != "results_dir"}, measurements=found,
    )  # fmt: skip


def main() -> None:
    config = parse_config(PresetTimesConfig, "Each preset on the same three loads.", PROG)
    exit_on_error(PROG, lambda: run(config))


if __name__ == "__main__":
    main()
