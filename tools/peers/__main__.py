"""Measure part 15 beside the engines that people use: python -m tools.peers [--write | --table].

`make peers` sets up their environments first. All engines get the same weights and the same requests, in turns; only
one computes at a time. --write writes results/peers.json and the table in results/README.md; --table rewrites only the
table.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from common.cli import check_minimums, exit_on_error, option, parse_config
from common.errors import FieldError
from common.results import median, read_result, write_result
from common.workloads import WorkloadRequest, nano_vllm_cpu

from .engines import BASELINE, PEERS, ROOT, Peer
from .processes import PeerError, Worker, one_core_taken

RESULT = ROOT / "results" / "peers.json"
MARKERS = ("<!-- peers:begin -->", "<!-- peers:end -->")
MODELS = ("tiny", "random:llama-110m")
DTYPES = ("float32", "bfloat16")
MACHINES = ("idle", "busy")
WORKLOADS = {"32 requests": 32, "one request": 1}  # of nano_vllm_cpu
NUM_SLOW = 4
BUSY_SHORTER = 4  # on a busy machine, answers are a quarter as long: some engines take minutes there
CHECK_REQUESTS, CHECK_TOKENS = 8, 16
WHOLE = ("models", "dtypes", "machines", "engines", "num_requests")  # flags that choose a part of the table
MIN_IDENTICAL = {"float32": 0.9, "bfloat16": 0.3}  # a wrong model agrees by chance only: once in 4,000 tokens


@dataclass(frozen=True, slots=True)
class PeersConfig:
    models: str = option(",".join(MODELS), "models, comma-separated")
    dtypes: str = option(",".join(DTYPES), "of weights, activations and KV cache")
    machines: str = option(",".join(MACHINES), "busy: another program keeps one core busy")
    engines: str = option("", "measure only these, separated by semicolons (default: all)")
    repeats: int = option(3, "runs of each, in turns; medians are reported", 1)
    budget_s: float = option(20.0, "no further run of an engine that has computed for so long in one cell of the table")
    num_requests: int = option(32, "requests in the larger workload", 2)
    write: bool = option(False, "write results/peers.json and the table")
    table: bool = option(False, "only rewrite the table")

    def __post_init__(self) -> None:
        check_minimums(self)
        allowed = {"dtypes": DTYPES, "machines": MACHINES, "engines": tuple(peer.name for peer in PEERS)}
        for name, values in allowed.items():
            if unknown := [value for value in self.chosen(name) if value not in values]:
                raise FieldError(name, f"expected some of {', '.join(values)}, got {unknown[0]!r}")
        if self.write and any(getattr(self, each.name) != each.default for each in fields(self) if each.name in WHOLE):
            raise FieldError("write", "expected all models, dtypes, machines, engines and requests")

    def chosen(self, name: str) -> list[str]:
        separator = ";" if name == "engines" else ","
        return [value.strip() for value in getattr(self, name).split(separator) if value.strip()]


@dataclass(slots=True)
class Found:
    """What a run has measured so far."""

    measurements: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, dict[str, str]]


def save_model(name: str, folder: Path) -> None:
    """Write a model as float32 weights, which every engine reads."""
    import torch

    from common.checkpoint import load_model, load_tokenizer, resolve_checkpoint

    checkpoint = resolve_checkpoint(name)
    load_model(checkpoint, torch.float32, "cpu").save_pretrained(folder)
    load_tokenizer(checkpoint).save_pretrained(folder)


def identical_share(answers: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """The share of tokens before each answer's first difference: what follows it has another context."""
    num_same = 0
    for answer, wanted in zip(answers, expected, strict=True):
        differs = [place for place, pair in enumerate(zip(answer, wanted, strict=True)) if pair[0] != pair[1]]
        num_same += differs[0] if differs else len(wanted)
    return num_same / sum(map(len, expected))


def check_requests() -> list[WorkloadRequest]:
    return [
        WorkloadRequest(f"check-{i}", 0.0, CHECK_TOKENS, request.prompt_token_ids, ignore_eos=True)
        for i, request in enumerate(nano_vllm_cpu(CHECK_REQUESTS, seed=2))
    ]


def check_answers(name: str, dtype: str, answers: list[list[int]], expected: list[list[int]]) -> float:
    """Returns the share of tokens that are those of transformers in float32. Raises PeerError if it computes another
    model."""
    share = identical_share(answers, expected)
    if share < MIN_IDENTICAL[dtype]:
        raise PeerError(
            f"{name} computes another model: in {dtype}, {share:.0%} of its tokens are those of transformers in "
            f"float32, expected at least {MIN_IDENTICAL[dtype]:.0%}"
        )
    return share


def reference_answers(folder: Path) -> list[list[int]]:
    """Of transformers in float32, to check_requests()."""
    [peer] = [peer for peer in PEERS if peer.name == BASELINE]
    with contextlib.closing(Worker(peer.name, peer.command(folder / "model", "float32", folder))) as worker:
        return worker.run(check_requests())[1]


def workload_on(machine: str, num_requests: int) -> list[WorkloadRequest]:
    """machine: idle or busy."""
    shorter = BUSY_SHORTER if machine == "busy" else 1
    return [replace(each, max_tokens=-(-each.max_tokens // shorter)) for each in nano_vllm_cpu(num_requests)]


def measure_cell(
    peers: Mapping[str, Peer], workers: Mapping[str, Worker], workload: list[WorkloadRequest], config: PeersConfig
) -> dict[str, dict[str, Any]]:
    """One workload, on all engines in turns: output tokens/s, the median and each run."""
    rates: dict[str, list[float]] = {name: [] for name in workers}
    spent_s = dict.fromkeys(workers, 0.0)
    for _ in range(config.repeats):
        for name, worker in workers.items():
            if spent_s[name] > config.budget_s:
                continue
            requests = workload[: NUM_SLOW if peers[name].slow_alone else None]
            seconds, _ = worker.run(requests)
            spent_s[name] += seconds
            rates[name].append(round(sum(request.max_tokens for request in requests) / seconds, 1))
    return {name: {"tokens_per_s": round(median(runs), 1), "runs": runs} for name, runs in rates.items()}


def measure_dtype(
    model: str, dtype: str, folder: Path, expected: list[list[int]], config: PeersConfig, found: Found
) -> None:
    """Load all engines, check what they compute, and measure them. expected: what reference_answers() returns."""
    names = config.chosen("engines") or [peer.name for peer in PEERS]
    peers = {peer.name: peer for peer in PEERS if peer.name in names and peer.reason_not_run(dtype) is None}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        shares: dict[str, float] = {}
        for name, peer in peers.items():
            files = folder / peer.module
            files.mkdir(exist_ok=True)
            workers[name] = worker = Worker(name, peer.command(folder / "model", dtype, files))
            stack.callback(worker.close)
            _, answers = worker.run(check_requests())  # it warms up, too
            shares[name] = round(check_answers(name, dtype, answers, expected), 3)
            found.versions[name] = worker.versions
            found.settings.setdefault(name, {})[dtype] = worker.settings
            print(f"{model} {dtype} {name}: identical tokens {shares[name]:.0%}", flush=True)
        cells: dict[str, Any] = {"identical_share": shares}
        for machine in config.chosen("machines"):
            with one_core_taken() if machine == "busy" else contextlib.nullcontext():
                cells[machine] = {}
                for workload, num_requests in WORKLOADS.items():
                    requests = workload_on(machine, min(num_requests, config.num_requests))
                    cells[machine][workload] = cell = measure_cell(peers, workers, requests, config)
                    rates = {name: values["tokens_per_s"] for name, values in cell.items()}
                    print(model, dtype, machine, workload, rates, flush=True)
        found.measurements.setdefault(model, {})[dtype] = cells


def measure(config: PeersConfig) -> None:
    found = Found({}, {}, {})
    for model in config.chosen("models"):
        with tempfile.TemporaryDirectory(prefix="peers-") as name:
            folder = Path(name)
            save_model(model, folder / "model")
            expected = reference_answers(folder)
            for dtype in config.chosen("dtypes"):
                measure_dtype(model, dtype, folder, expected, config, found)
                if config.write:
                    write(config, found)  # it takes an hour: what is done is done


def write(config: PeersConfig, found: Found) -> None:
    reasons = {peer.name: dict(peer.not_run) for peer in PEERS if peer.not_run}
    write_result(
        RESULT,
        benchmark="peers",
        config={
            "repeats": config.repeats,
            "budget_s": config.budget_s,
            "workloads": WORKLOADS,
            "busy_answers_are_shorter_by": BUSY_SHORTER,
            "settings": found.settings,
            "versions": found.versions,
            "not_run": reasons,
        },
        seed=0,
        repeats=config.repeats,
        measurements=found.measurements,
    )


def markdown(result: dict[str, Any]) -> str:
    """For each model, a row per engine, and a column per dtype, machine and workload: tokens/s."""
    machine = result["machine"]
    blocks = []
    for model in result["measurements"]:
        blocks.append(model_table(model, result["measurements"][model]))
    found = {
        f"{package} {version}" for each in result["config"]["versions"].values() for package, version in each.items()
    }
    versions = ", ".join(sorted(found))
    note = f"{machine['cpu_cores']} cores of an {machine['cpu']}; {versions}; medians of up to {result['repeats']} runs"
    return "\n\n".join([*blocks, f"({note}; [peers.json](peers.json).)"])


def model_table(model: str, found: dict[str, Any]) -> str:
    columns = [
        (dtype, machine, workload)
        for dtype in DTYPES
        for workload in WORKLOADS
        for machine in MACHINES
        if machine in found.get(dtype, {})
    ]
    lines = [f"| `{model}` | " + " | ".join(f"{dtype}, {load}, {machine}" for dtype, machine, load in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for peer in PEERS:
        cells = []
        for dtype, machine, workload in columns:
            value = found[dtype][machine][workload].get(peer.name)
            cells.append("" if value is None else f"{value['tokens_per_s']:,.0f}")
        lines.append(f"| {peer.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_table(result: dict[str, Any]) -> None:
    page = ROOT / "results" / "README.md"
    head, begin, rest = page.read_text("utf-8").partition(MARKERS[0])
    _, end, tail = rest.partition(MARKERS[1])
    assert begin and end, f"results/README.md lacks {MARKERS[0]} or {MARKERS[1]}"
    page.write_text(f"{head}{begin}\n\n{markdown(result)}\n\n{end}{tail}", "utf-8")


def run(config: PeersConfig) -> None:
    if not config.table:
        measure(config)
    if config.write or config.table:
        write_table(read_result(RESULT))


def main() -> None:
    prog = "tools.peers"
    config = parse_config(PeersConfig, __doc__ or "", prog)
    try:
        exit_on_error(prog, lambda: run(config))
    except PeerError as error:
        sys.exit(f"{prog}: error: {error}")


if __name__ == "__main__":
    main()
