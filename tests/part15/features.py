"""What part 15 can be told to do, feature by feature, and rows of values in which every pair that is allowed occurs.

A combination that is refused is not written down here: the engine's own checks say so.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from allpairspy import AllPairs

from common.checkpoint import DTYPES, resolve_checkpoint
from common.errors import FieldError
from part15_full_architecture.config import EngineConfig, resolve_config
from part15_full_architecture.kernel_names import parse_kernels
from part15_full_architecture.worker.kernels.autotune import Tuner
from part15_full_architecture.worker.kernels.ops import Situation, choose
from part15_full_architecture.worker.model import check_divisible
from part15_full_architecture.worker.parallel import Groups, ParallelGroup, PipelineStage
from part15_full_architecture.worker.quantization.choice import QuantizationFlags, prepare_layers
from part15_full_architecture.worker.weight_offload import choose_layers, num_bytes

Flags = dict[str, Any]
Row = dict[str, str]  # feature → one of its values
Pair = tuple[tuple[str, str], tuple[str, str]]

PLENTY = 160  # blocks
BLOCK_SIZE, MAX_MODEL_LEN, MAX_NUM_SEQS, SMALL_BUDGET = 8, 160, 16, 16
SECRET = "a secret of the tests"
# Engines that start beside others may be silent for longer than the defaults allow: a transfer would fail.
PATIENT = {"kv_transfer_secret": SECRET, "kv_transfer_timeout": 120.0, "kv_lease": 240.0}
OF_THE_TEST = "(of the test)"  # a directory or a server, which a test has to make
SHARED: Flags = {"model": "tiny-moe", "enable_expert_parallel": True}
HOST: Flags = {"kv_offload_gib": 0.01}
SMALL_HOST: Flags = {"kv_offload_gib": 0.001}  # some blocks are only in the tier below

RANKS = ("tensor parallelism", "stages", "data parallelism")
# The first value of each is what an engine does that is told nothing.
FEATURES: dict[str, dict[str, Flags]] = {
    "tensor parallelism": {"1": {}, "2": {"tensor_parallel_size": 2}},
    "stages": {"1": {}, "2": {"pipeline_parallel_size": 2}},
    "data parallelism": {"1": {}, "2": {"data_parallel_size": 2}},
    "model": {
        "dense": {"model": "tiny"}, "experts": {"model": "tiny-moe"}, "shared experts": {**SHARED, "enable_dbo": True},
        "balanced experts": {**SHARED, "enable_eplb": True, "eplb_step_interval": 8},
    },
    "weights": {
        "as they are": {}, **{name: {"quantization": name} for name in ("int8", "int4", "nf4", "fp8", "w8a8")},
    },
    "KV cache": {"as it is": {}, "int8": {"kv_cache_dtype": "int8"}, "fp8": {"kv_cache_dtype": "fp8"}},
    "prefix caching": {"on": {}, "off": {"enable_prefix_caching": False}},
    "KV offloading": {
        "none": {}, "host": HOST, "host and disk": {**SMALL_HOST, "kv_offload_dir": OF_THE_TEST},
        "host and Redis": {**SMALL_HOST, "kv_offload_url": OF_THE_TEST},
    },
    "KV transfers": {
        "none": {}, **{name: {"kv_connector": name, **PATIENT} for name in ("tcp", "shm")},
    },
    "kernels": {"auto": {}, **{name: {"kernels": name} for name in ("torch", "cuda", "triton")}},
    "drafts": {
        "none": {}, "n-gram": {"speculative_method": "ngram", "prompt_lookup_min": 1},
        "draft model": {"speculative_method": "draft_model"},
    },
    "chunks": {
        "default": {}, "small": {"max_num_batched_tokens": SMALL_BUDGET},
        "none": {"enable_chunked_prefill": False, "max_num_batched_tokens": MAX_MODEL_LEN},
    },
    "scheduling": {"async": {}, "sync": {"async_scheduling": False}},
    "weight offloading": {"no": {}, "yes": {"cpu_offload_gb": 1.0}},
    "padding": {"no": {}, "yes": {"cudagraph_capture_sizes": "1,2,4,8,16"}},
    "KV pool": {"plenty": {"num_kv_blocks": PLENTY}, "scarce": {"num_kv_blocks": 2}},  # scarce: see running.py
}  # fmt: skip
MAX_RANKS, MAX_EMULATED_RANKS = 4, 2  # in a row


@dataclass(frozen=True, slots=True)
class Machine:
    """What a matrix runs on. left_out: values for which it lacks something, and what that is."""

    device: str = "cpu"
    left_out: tuple[tuple[str, str, str], ...] = ()

    def values(self, feature: str) -> list[str]:
        out = {value for name, value, _ in self.left_out if name == feature}
        return [value for value in FEATURES[feature] if value not in out]


def flags_of(row: Mapping[str, str], device: str = "cpu") -> Flags:
    """A row as flags. It may have only some of the features."""
    flags: Flags = {
        "device": device, "dtype": "float32", "block_size": BLOCK_SIZE, "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_NUM_SEQS, "num_threads": 1,
    }  # fmt: skip
    for feature, value in row.items():
        flags |= FEATURES[feature][value]
    return flags


def num_engines(row: Mapping[str, str]) -> int:
    return 1 if row.get("KV transfers", "none") == "none" else 2


def num_ranks(row: Mapping[str, str]) -> int:
    sizes = [int(row.get(name, "1")) for name in RANKS]
    return num_engines(row) * sizes[0] * sizes[1] * sizes[2]


def is_fast(row: Mapping[str, str]) -> bool:
    """What takes long and adds no pair is left out: many processes, and emulated products of quantized matrices that
    are larger than an expert's."""
    if row.get("kernels") != "cuda":
        return num_ranks(row) <= MAX_RANKS
    has_products = row.get("weights") in ("int8", "int4", "fp8")
    return num_ranks(row) <= MAX_EMULATED_RANKS and not (has_products and row.get("model") == "dense")


def refusal(flags: Flags) -> str | None:
    """The error of an engine with these flags, None if it would start."""
    try:
        check(EngineConfig(**flags))
    except FieldError as error:
        return str(error)
    return None


def check(config: EngineConfig) -> None:
    """Raises the FieldError of an engine with this config: what it checks before it loads weights."""
    check_with_models(*((name, getattr(config, name)) for name in OF_MODELS))
    check_kernels(config.kernels, str(config.device), config.dtype)
    check_model(*(getattr(config, name) for name in OF_RANKS))


OF_MODELS = (
    "device", "model", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill",
    "speculative_method", "speculative_model",
)  # fmt: skip
OF_RANKS = (
    "model", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "quantization",
    "quantization_group_size", "enable_expert_parallel", "num_redundant_experts", "cpu_offload_gb",
)  # fmt: skip


@functools.cache
def check_with_models(*flags: tuple[str, Any]) -> None:
    """What resolve_config reads of a config."""
    config = EngineConfig(**dict(flags))
    resolve_config(config, resolve_checkpoint(config.model))


@functools.cache
def check_kernels(kernels: str, device: str, dtype: str) -> None:
    choose_all(kernels, device, dtype)


def choose_all(kernels: str, device: str, dtype: str, head_dim: int = 32) -> None:
    """As choose_kernels does, without compiling anything."""
    numbers = DTYPES.get(dtype, torch.float32)
    situation = Situation(torch.device(device), numbers, numbers, 8, 4, head_dim, 256, 4_096, num_ranks=2)
    for name, wanted in parse_kernels(kernels).items():
        choose(name, wanted, situation, Tuner())


@functools.cache
def check_model(
    model: str, tp_size: int, num_stages: int, num_cores: int, quantization: str, group_size: int,
    has_expert_parallelism: bool, num_redundant: int, offloaded_gib: float,
) -> None:  # fmt: skip
    """As core/executor.py and worker/weights.py do."""
    config, flags = resolve_checkpoint(model).config, QuantizationFlags(quantization, group_size)
    experts = ParallelGroup(0, tp_size * num_cores if has_expert_parallelism else 1)
    groups = Groups(ParallelGroup(0, tp_size), experts, PipelineStage(0, num_stages), num_redundant)

    def prepare(decoder: Any) -> None:
        prepare_layers(decoder, config, flags)
        choose_layers([num_bytes(layer) for layer in decoder.layers.values()], int(offloaded_gib * 2**30))

    check_divisible(config, groups, prepare)


class Matrix:
    """All pairs of a machine's values, and rows in which they occur."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.values = {name: values for name in FEATURES if (values := machine.values(name))}
        self.refusals = dict[str, Row]()  # error → a row for which it comes
        self._known = dict[tuple[tuple[str, str], ...], str | None]()

    def refusal(self, row: Row) -> str | None:
        """The error of a whole row, or of one whose other features have their first values."""
        key = tuple(sorted(row.items()))
        if key not in self._known:
            self._known[key] = error = refusal(flags_of(row, self.machine.device))
            if error is not None:
                self.refusals.setdefault(error, row)
        return self._known[key]

    def is_allowed(self, row: Row, must_be_fast: bool = False) -> bool:
        """Whether features can be added to a row so that an engine would start. Only ranks can make good what is
        refused; of other features, the first value does no harm."""
        open_values = [[(name, value) for value in self.values[name]] for name in RANKS if name not in row]
        candidates = ({**row, **dict(ranks)} for ranks in product(*open_values))
        return any((is_fast(each) or not must_be_fast) and self.refusal(each) is None for each in candidates)

    def allowed_pairs(self) -> set[Pair]:
        values = [(name, value) for name, own in self.values.items() for value in own]
        return {pair for pair in combinations(values, 2) if pair[0][0] != pair[1][0] and self.is_allowed(dict(pair))}

    @property
    def num_pairs(self) -> int:
        """Allowed or not."""
        return sum(len(one) * len(other) for one, other in combinations(self.values.values(), 2))

    def rows(self) -> list[Row]:
        """All pairs that are allowed, in few rows."""

        names = sorted(self.values, key=lambda name: -len(self.values[name]))

        def is_wanted(values: list[str]) -> bool:
            return self.is_allowed(dict(zip(names, values, strict=False)), must_be_fast=True)

        found = AllPairs([self.values[name] for name in names], filter_func=is_wanted)
        rows = [self._in_order(dict(zip(names, values, strict=True))) for values in found]
        missing = self.allowed_pairs() - pairs_of(rows)
        while missing:  # AllPairs ends when its next row would have no new pair
            rows.append(self._row_with(missing))
            missing -= pairs_of(rows[-1:])
        return rows

    def _row_with(self, missing: set[Pair]) -> Row:
        """A row with one of these pairs, and with as many of the others as the greedy choice finds."""
        row = dict(min(missing))
        assert self.is_allowed(row, must_be_fast=True), f"{row} is allowed, but only in rows that are too slow"
        for name in [name for name in self.values if name not in row]:
            gains = {
                value: len(missing & pairs_of([{**row, name: value}]))
                for value in self.values[name]
                if self.is_allowed({**row, name: value}, must_be_fast=True)
            }
            row[name] = max(gains, key=lambda value: gains[value])
        return self._in_order(row)

    def _in_order(self, row: Row) -> Row:
        return {name: row[name] for name in self.values}


def pairs_of(rows: Iterable[Row]) -> set[Pair]:
    order = list(FEATURES)
    return {
        pair for row in rows for pair in combinations(sorted(row.items(), key=lambda item: order.index(item[0])), 2)
    }
