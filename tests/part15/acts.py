"""What shows that each feature of a row has acted: a matrix in which one silently did nothing would prove nothing."""

from __future__ import annotations

from itertools import pairwise

from common.checkpoint import resolve_checkpoint
from tests.part15.features import BLOCK_SIZE, FEATURES, MAX_MODEL_LEN, SMALL_BUDGET, Row, num_engines
from tests.part15.references import plain
from tests.part15.running import LOOK, Result

CODE_BYTES = 1  # of a key's or a value's number
FLOAT_BYTES = 4
DRAFT_MODEL = "tiny-draft"
BACKENDS = {"auto": "numba", "torch": "torch", "cuda": "cuda", "triton": "triton"}


def check_that_it_acts(row: Row, device: str, result: Result, where: str) -> None:
    def expect(condition: object, what: str) -> None:
        assert condition, f"{where}: expected {what}; counters: {dict(result.counts)}. {LOOK}"

    counts = result.counts
    behind = [num_processes(row)] * num_engines(row)
    expect(result.num_processes == behind, f"{behind} processes behind the servers, got {result.num_processes}")
    expect(counts["kv_block_bytes"] == kv_block_bytes(row), f"KV blocks of {kv_block_bytes(row)} bytes")
    if row["weights"] != "as they are" and row["drafts"] != "draft model":
        num_copies = num_engines(row) * int(row["data parallelism"])
        expect(counts["weight_bytes"] < num_copies * float_bytes(row), f"less than {num_copies} × {float_bytes(row):,} "
               "bytes of weights")  # fmt: skip
    if row["kernels"] != "auto" or device == "cpu":
        expect(result.backends == {BACKENDS[row["kernels"]]}, f"only {row['kernels']} kernels, got {result.backends}")
    if row["prefix caching"] == "on":
        expect(counts["prefix_cache_hits"], "prefix hits")
    else:
        expect(not counts["prefix_cache_hits"] or num_engines(row) > 1, "no prefix hits")
    if row["KV pool"] == "scarce":
        expect(counts["num_preemptions"], "preemptions")
    if row["drafts"] != "none":
        expect(counts["spec_decode_num_draft_tokens"], "draft tokens")
    if row["KV offloading"] != "none":
        names = ("host", "tier", "recomputed")
        expect(counts["kv_offload_saved_tokens"], "blocks to be saved in host memory")
        expect(sum(counts[f"kv_offload_{name}_tokens"] for name in names), "a prompt to be found again")
    if row["KV offloading"] in ("host and disk", "host and Redis"):
        expect(result.num_in_tier, "blocks in the tier below")
    if row["KV transfers"] != "none":
        expect(counts["kv_transfer_fetched_tokens"], "tokens from the prefill engine")
        expect(not counts["kv_transfer_failed"], "no transfer to fail")
    if row["model"] == "balanced experts":
        expect(counts["expert_balance_perc"] != num_engines(row), "experts to be placed by their loads")
    check_steps(row, result, where)


def float_bytes(row: Row) -> int:
    """Of the model's weights in float32."""
    return FLOAT_BYTES * sum(
        each.numel() for each in plain(FEATURES["model"][row["model"]]["model"]).model.parameters()
    )


def num_processes(row: Row) -> int:
    """Cores, and if a core has several ranks or shares experts, a process for each rank."""
    num_cores = int(row["data parallelism"])
    num_ranks = int(row["tensor parallelism"]) * int(row["stages"])
    is_alone = num_ranks == 1 and not (num_cores > 1 and FEATURES["model"][row["model"]].get("enable_expert_parallel"))
    return num_cores * (1 if is_alone else 1 + num_ranks)


def kv_block_bytes(row: Row) -> int:
    """Of all engines and cores; every rank of the last stage has the whole draft model."""
    num_bytes = BLOCK_SIZE * (FLOAT_BYTES if row["KV cache"] == "as it is" else CODE_BYTES)
    models = {FEATURES["model"][row["model"]]["model"]: 1}
    if row["drafts"] == "draft model":
        models[DRAFT_MODEL] = int(row["tensor parallelism"])
    numbers = 0
    for model, copies in models.items():
        config = resolve_checkpoint(model).config
        numbers += copies * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return num_engines(row) * int(row["data parallelism"]) * numbers * num_bytes


def check_steps(row: Row, result: Result, where: str) -> None:
    """By the trace: how large steps were, and whether they were scheduled ahead of results."""
    sizes = [[sum(each.num_scheduled for each in step.requests) for step in steps] for steps in result.steps]
    largest = max(max(each) for each in sizes)
    limits = {"default": (SMALL_BUDGET + 1, 512), "small": (2, SMALL_BUDGET), "none": (SMALL_BUDGET + 1, MAX_MODEL_LEN)}
    low, high = limits[row["chunks"]]
    assert low <= largest <= high, f"{where}: the largest step has {largest} tokens: expected {low} to {high}. {LOOK}"
    overlaps = [
        step.start_s + step.schedule_s + step.execute_s > following.start_s
        for steps in result.steps
        for step, following in pairwise(steps)
    ]
    if row["scheduling"] == "async" and row["drafts"] == "none":
        assert any(overlaps), f"{where}: expected a step to be scheduled before the one before it has ended. {LOOK}"
    if row["scheduling"] == "sync" and row["stages"] == "1":
        assert not any(overlaps), (
            f"{where}: expected no step to be scheduled before the one before it has ended. {LOOK}"
        )
