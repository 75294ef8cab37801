"""python -m part15_full_architecture.lab.kernel_demo: one answer from four backends, and CUDA kernels without a GPU."""

from __future__ import annotations

import subprocess
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common.cli import exit_on_error, option, parse_config
from common.sampling_params import SamplingParams

from ..config import EngineConfig
from ..llm import LLM
from ..worker.kernels.build import SOURCES, NoCompilerError, find_cxx
from .kernel_times import measure
from .quality import chat, text_of

PROG = "part15_full_architecture.lab.kernel_demo"
QUESTION = "What is a KV cache?"
NUM_ROWS = 32
REPEATS = 5
ENGINES: dict[str, dict[str, Any]] = {  # what is said of an engine, and its flags
    "torch, the references": {"kernels": "torch"},
    "numba, layer by layer": {"megakernel": False},
    "numba, in a megakernel, the default on a CPU": {},
    "cuda, emulated": {"kernels": "cuda"},
    "numba, steps padded to 1, 2, 4 … tokens": {"cudagraph_capture_sizes": "1,2,4,8,16,32"},
}
MISTAKES = {"barrier_in_a_branch": "", "missing_barrier": "thread"}  # program → the sanitizer that it needs


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")


def operations(console: Console, model: str) -> None:
    console.rule(f"1. The operations of a step, {NUM_ROWS} requests")
    torch.set_num_threads(1)
    found = measure(model, torch.float32, "cpu", REPEATS)
    table = Table(f"{model}, one thread", "torch (µs)", "numba (µs)", "torch / numba")
    for name, values in found.items():
        operation, _, rows = name.partition(", ")
        if rows == f"{NUM_ROWS} rows":
            times = values["us"]
            table.add_row(
                operation, *(f"{times[key]:,.0f}" for key in ("torch", "numba")), f"{values['speedup']['numba']:.1f}"
            )
    console.print(table)


def answers(console: Console, model: str) -> None:
    console.rule("2. One answer")
    console.print(f"{QUESTION}\n", highlight=False)
    first = None
    for name, flags in ENGINES.items():
        try:
            llm = LLM(EngineConfig(model=model, num_kv_blocks=256, **flags))
        except NoCompilerError as error:
            console.print(f"{name}: {error}", highlight=False)
            continue
        start_s = time.perf_counter()
        [output] = llm.generate([chat(QUESTION)], SamplingParams(temperature=0, max_tokens=24))
        seconds = time.perf_counter() - start_s
        token_ids = list(output.outputs[0].token_ids)
        is_same = "" if first is None else ", the same tokens" if token_ids == first else ", OTHER TOKENS"
        console.print(f"{name}: {seconds:.2f} s{is_same}", highlight=False)
        if first is None:
            first = token_ids
            console.print(
                textwrap.fill(text_of(token_ids), 78, initial_indent="  ", subsequent_indent="  "), highlight=False
            )


def mistakes(console: Console) -> None:
    console.rule("3. Mistakes that a GPU would not report")
    for name, sanitizer in MISTAKES.items():
        source = SOURCES / "cuda_on_cpu" / "mistakes" / f"{name}.cu"
        report = run_program(source, sanitizer)
        console.print(f"{name}.cu{f', compiled with -fsanitize={sanitizer}' if sanitizer else ''}:", highlight=False)
        console.print(textwrap.fill(report, 78, initial_indent="  ", subsequent_indent="  "), highlight=False)


def run_program(source: Path, sanitizer: str) -> str:
    """Compile a program with a kernel for this CPU, run it, and return the line that names its mistake."""
    with tempfile.TemporaryDirectory() as directory:
        flags = ["-std=c++17", "-O1", "-g", "-fno-strict-aliasing", "-pthread", "-x", "c++"]
        flags += [f"-fsanitize={sanitizer}"] if sanitizer else []
        program = f"{directory}/program"
        subprocess.run([find_cxx(), *flags, source.name, "-o", program], cwd=source.parent, check=True)
        done = subprocess.run([program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    lines = done.stdout.splitlines()
    found = next((line for line in lines if line.startswith(("error:", "SUMMARY:"))), lines[0])
    return found.replace(f"{source.parent}/", "")


def run(config: DemoConfig) -> None:
    console = Console(width=80)
    console.print(f"Part 15: CUDA kernels. Model {config.model}.\n", highlight=False)
    operations(console, config.model)
    answers(console, config.model)
    try:
        mistakes(console)
    except NoCompilerError as error:
        console.print(str(error), highlight=False)


def main() -> None:
    exit_on_error(PROG, lambda: run(parse_config(DemoConfig, __doc__ or "", prog=PROG)))


if __name__ == "__main__":
    main()
