"""Fill the tables of part 15's KERNELS.md from results/part15.json: python -m tools.kernel_tables [--check].

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. --check: only compare; the exit status is 1 if a table
differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "part15_full_architecture" / "KERNELS.md", ROOT / "results" / "part15.json"
TABLE = re.compile(r"(?<=<!-- table: )(\w+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
OPERATIONS = ("norm", "rotary", "attention", "activation", "sampling", "W8A16", "W4A16", "grouped product")
MODELS = {"tiny": "`tiny`", "random:llama-110m": "110M"}
BEFORE = "torch, the references"
ROWS = {  # name in the results: what the page calls it
    "torch": BEFORE, "part 14's": BEFORE,  # the second: in results of older benchmarks
    "+ activation": "+ norm, rotary, activation", "+ sampling": "+ sampling", "+ packed matrices": "+ packed matrices",
    "megakernel": "megakernel",
}  # fmt: skip
COLUMNS = ("greedy_1", "greedy_32", "sampled_32", "operators_per_step")


def operations(m: dict[str, Any]) -> list[str]:
    heads = [f"{name}: torch | Numba | speedup" for name in MODELS.values()]
    lines = [f"| operation, 32 requests, one thread (µs) | {' | '.join(heads)} |", "|---" * 7 + "|"]
    for operation in OPERATIONS:
        cells = []
        for model in MODELS:
            found = m["operations"][model][f"{operation}, 32 rows"]
            cells += [microseconds(found["us"]["torch"]), microseconds(found["us"]["numba"])]
            cells += [f"{found['speedup']['numba']:.1f}"]
        lines.append(f"| {operation} | {' | '.join(cells)} |")
    return lines


def engines(m: dict[str, Any]) -> list[str]:
    heads = "| output tokens/s | greedy, batch 1 | greedy, batch 32 | sampled, batch 32 | operators per step |"
    lines = [heads, "|---" * 5 + "|"]
    for model, dtype in in_order(m["engines"]):
        rows = m["engines"][f"{model}, {dtype}"]
        for variant, label in ROWS.items():
            if variant in rows:
                cells = [f"{rows[variant][column]:,.0f}" for column in COLUMNS]
                lines.append(f"| {MODELS[model]}, {dtype}: {label} | {' | '.join(cells)} |")
    return lines


def prefill(m: dict[str, Any]) -> list[str]:
    lines = ["| prompt tokens/s | torch's products | packed copies |", "|---" * 3 + "|"]
    for model, dtype in in_order(m["prefill"]):
        speeds = m["prefill"][f"{model}, {dtype}"]
        lines.append(f"| {MODELS[model]}, {dtype} | {speeds['plain']:,.0f} | {speeds['packed copies']:,.0f} |")
    return lines


def in_order(names: Iterable[str]) -> list[list[str]]:
    """Models and dtypes, which the names consist of."""
    order = list(MODELS)
    return sorted((name.split(", ") for name in names), key=lambda each: (order.index(each[0]), each[1] != "float32"))


def microseconds(number: float) -> str:
    return f"{number:.1f}" if number < 10 else f"{number:,.0f}"


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "operations": operations, "engines": engines, "prefill": prefill,
}  # fmt: skip


def renew(text: str, measurements: dict[str, Any]) -> str:
    """The page with the tables of these measurements."""

    def table(match: re.Match[str]) -> str:
        lines = TABLES[match[1]](measurements)
        return f"{match[1]}{match[2]}\n" + "".join(f"{line}\n" for line in lines) + "\n"

    return TABLE.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    renewed = renew(text, json.loads(RESULTS.read_text(encoding="utf-8"))["measurements"])
    if options.check:
        sys.exit("the tables differ: run `python -m tools.kernel_tables`" if renewed != text else 0)
    PAGE.write_text(renewed, encoding="utf-8")


if __name__ == "__main__":
    main()
