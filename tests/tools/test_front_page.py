"""The numbers on the front page are those of the result files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PARTS = sorted(path.name for path in ROOT.glob("part[0-9][0-9]_*"))


def of_batching(m: dict[str, Any]) -> list[str]:
    fast, slow = (m["batching"]["heavy-tailed"][name]["tokens_per_s"] for name in ("continuous", "static"))
    return [f"{fast:.0f} output", f"{slow:.0f} ", f"({fast / slow:.1f}×)"]


def of_speculation(m: dict[str, Any]) -> list[str]:
    fast, slow = (m["tasks"]["answers"][name]["tokens_per_s"] for name in ("draft_model", "none"))
    return [f"{fast:.0f} output", f"{slow:.0f} ", f"({fast / slow:.1f}×)"]


def of_ranks(m: dict[str, Any]) -> list[str]:
    two, one = (m["models"]["random:llama-110m"][name]["16"]["tokens_per_s"] for name in ("tp 2", "1 rank"))
    return [f"{two:.0f} output", f"{one:.0f} ", f"({two / one:.1f}×)"]


def of_routing(m: dict[str, Any]) -> list[str]:
    found = m["policies"]["long prefixes"]
    few, many = (found[f"this part's, {name}"]["computed_tokens"] for name in ("cache_aware", "round_robin"))
    return [f"{few:,.0f} prompt tokens", f"{many:,.0f} ", f"({1 - few / many:.0%} fewer)"]


def of_experts(m: dict[str, Any]) -> list[str]:
    found = m["models"]["random:moe-small"]
    shared, whole = found["dp 2, ep 2"], found["dp 2"]
    memory = [f"{each['expert_parameters'] / 1e6:.0f}M" for each in (shared, whole)]
    ratio = shared["tokens_per_s"]["64"] / whole["tokens_per_s"]["64"]
    return [f"{memory[0]} expert parameters on each of two engine cores", f"{memory[1]} ", f"({ratio:.0%}"]


def of_offloading(m: dict[str, Any]) -> list[str]:
    host, again = (m["ttft_ms"]["random:llama-110m"][source]["1900"] for source in ("host", "recompute"))
    return [f"TTFT {host:.0f} ms", f"{again / 1e3:.1f} s", f"({again / host:.0f}×"]


def of_disaggregation(m: dict[str, Any]) -> list[str]:
    return [f"{m['scripted'][name]['2']['itl_p99_ms']:.0f} ms" for name in ("apart", "together, chunks of 512")]


def of_quantization(m: dict[str, Any]) -> list[str]:
    speeds = {name: found["tokens_per_s_1"] for name, found in m["speed"].items()}
    int8, bf16, fp32 = (speeds[name] for name in ("int8, bf16", "bf16", "fp32"))
    return [f"{int8:.0f} output tokens/s", f"{bf16:.0f} in bfloat16", f"({int8 / bf16:.1f}×)", f"{fp32:.0f} in float32"]


def of_kernels(m: dict[str, Any]) -> list[str]:
    rows = m["engines"]["random:llama-110m, float32"]
    before = "torch" if "torch" in rows else "part 14's"  # the name in results of older benchmarks
    fast, slow = (rows[name]["sampled_32"] for name in ("megakernel", before))
    return [f"{fast:,.0f} output", f"{slow:,.0f} ", f"({fast / slow:.1f}×)"]


def of_health(m: dict[str, Any]) -> list[str]:
    answer, health = m["answers"][-1], m["health"]
    p99 = [f"{health[part]['p99_ms']:.0f} ms" for part in ("part 2", "part 1")]
    return [f"{answer['ttft_ms']:.0f} ms", f"{answer['streamed_ms']:.0f} ms", *p99]


def of_chunks(m: dict[str, Any]) -> list[str]:
    budgets = m["budgets"]["random:llama-110m"]
    return [f"{budgets[name]['itl_p99_ms'] / 1e3:.1f} s" for name in ("256", "whole")]


def test_the_table_has_all_parts() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| [")]
    assert len(PARTS) == len(rows) == 15, f"the course has fifteen parts; there are {len(PARTS)}, and {len(rows)} rows"


# What a part's row of the table has to say, from the measurements in its result file.
EXPECTED: dict[int, Callable[[dict[str, Any]], list[str]]] = {
    1: lambda m: [f"{m[f'{name}_tokens_per_s']:.0f} " for name in ("cached", "uncached")] + [f"({m['speedup']:.1f}×)"],
    2: of_health,
    3: lambda m: [f"{m['capacity']['chat'][name]['mean_requests']:.1f}" for name in ("paged", "contiguous")],
    4: of_batching,
    5: lambda m: [f"{m['scripted'][name]:.2f} s" for name in ("async", "sync")],
    6: of_chunks,
    7: lambda m: [f"{m['ttft']['tiny']['shared prefix'][name]['ttft_ms']:.0f} ms" for name in ("on", "off")],
    8: of_speculation,
    9: of_ranks,
    10: of_routing,
    11: of_experts,
    12: of_offloading,
    13: of_disaggregation,
    14: of_quantization,
    15: of_kernels,
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_the_row_of_a_part(part: str) -> None:
    number = int(part[4:6])
    row = next(line for line in README.splitlines() if line.startswith(f"| [{number}]({part}/README.md)"))
    measurements = json.loads((ROOT / "results" / f"part{number:02d}.json").read_text())["measurements"]
    missing = [text for text in EXPECTED[number](measurements) if text not in row]
    assert not missing, f"README's row of part {number} lacks {missing} of results/part{number:02d}.json: {row}"
    lesson = (ROOT / part / "README.md").read_text(encoding="utf-8")
    minutes = re.search(r"\*\*Time:\*\* (\d+) minutes to read", lesson)
    num_exercises = (ROOT / part / "exercises.md").read_text(encoding="utf-8").count("\n## ")
    assert minutes is not None and row.endswith(f"| {minutes[1]} min | {num_exercises} |"), (
        f"README's row of part {number} must end with the lesson's minutes and the number of exercises: {row}"
    )
