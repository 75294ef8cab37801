"""What a trace says of blocks and tokens: each line only what is new, and together all of it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from common.trace import LIVE_NAME, StepTrace, TraceWriter, files, read_trace
from tests.contract.engines import SmallEngine, SmallModels, kinds_of, number_of, prompts_of
from tests.http_checks import until

LOOK = "Look at core/step_tracer.py::StepTracer, and at common/trace/deltas.py."
LOOK_COPIES = "Look at core/step_tracer.py::StepTracer.transferred, and at worker/block_copier.py."


@pytest.mark.since(4)
def test_the_lines_of_a_trace_add_up(part: str, small_models: SmallModels, tmp_path: Path) -> None:
    """With preemptions, aborts and, where a part has it, a prefix cache: the block tables, the prompts, the answers and
    the cached blocks that a reader puts together from the lines are the engine's."""
    for kind, flags in kinds_of(part, small_models, with_ranks=False).items():
        path = tmp_path / f"{kind}.jsonl".replace("/", " ")
        engine = SmallEngine(
            part, small_models, **{"num_kv_blocks": 16, "max_num_seqs": 4, **flags, "trace": str(path)}
        )
        prompts = {str(number): prompt for number, prompt in enumerate(prompts_of(7, seed=5))}
        for name, prompt in prompts.items():
            engine.add(name, prompt, max_tokens=10)
        for _ in range(4):
            engine.step()
        engine.core.abort_requests(["1", "6"])
        engine.finish()
        engine.core.tracer.close()
        check(f"{part}, {kind}", path, engine, prompts)


@pytest.mark.since(4)
def test_a_live_trace_that_begins_again_is_complete(
    part: str, small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first step says all about its requests and about the prefix cache, also if the engine runs ahead."""
    write = TraceWriter.write
    monkeypatch.setattr(TraceWriter, "write", lambda writer, step: (write(writer, step), writer.flush()))
    for kind, flags in kinds_of(part, small_models, with_ranks=False).items():
        monkeypatch.setattr(files, "MAX_LIVE_BYTES", 3_000)
        path = tmp_path / f"{LIVE_NAME} {kind}".replace("/", " ")
        engine = SmallEngine(part, small_models, **{"max_num_seqs": 4, **flags, "trace": str(path)})
        prompts = {str(number): prompt for number, prompt in enumerate(prompts_of(8, seed=5))}
        for name, prompt in prompts.items():
            engine.add(name, prompt, max_tokens=12)
        engine.finish()
        monkeypatch.setattr(files, "MAX_LIVE_BYTES", 1_000_000)
        engine.generate([1, 2], max_tokens=4)  # even if the file is full now, some of these steps are in the next one
        engine.core.tracer.close()
        trace = read_trace(path)
        assert trace.header["restarts"] > 0, f"{part}, {kind}: the file has never begun again"
        check_beginning(f"{part}, {kind}", trace.steps, engine)


def check_beginning(where: str, steps: list[StepTrace], engine: SmallEngine) -> None:
    """Nothing refers to what is not in the trace, and all blocks are in it that are cached at the end."""
    seen, cached = set[str](), set[int]()
    for step in steps:
        for request in step.requests:
            if request.id not in seen:
                seen.add(request.id)
                assert request.prompt_token_ids and len(request.new_block_ids) == request.num_blocks, (
                    f"{where}, step {step.step}: the first line with request {request.id} has no prompt, or not all "
                    f"of its blocks: {request}. {LOOK}"
                )
        cached = (cached | set(step.cached_block_ids)) - set(step.uncached_block_ids)
    check_cached(where, cached, engine)


def check_cached(where: str, cached: set[int], engine: SmallEngine) -> None:
    if number_of(engine.part) >= 7:
        real = {block.block_id for block in engine.core.blocks.cached_blocks.values()}
        assert cached == real, f"{where}: the lines say that {sorted(cached)} are cached, {sorted(real)} are. {LOOK}"


def check(where: str, path: Path, engine: SmallEngine, prompts: dict[str, list[int]]) -> None:
    tables: dict[str, list[int]] = {}
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    cached, known = set[int](), set[int]()
    ended = set[str]()
    for step in read_trace(path).steps:
        for name in (*ended, *step.preempted, *step.aborted):
            tables.pop(name, None)
        for request in step.requests:
            if request.id in ended or request.id in step.aborted:
                continue  # it ended after this step was launched
            num_kept = request.num_blocks - len(request.new_block_ids)
            tables[request.id] = table = tables.get(request.id, [])[:num_kept] + request.new_block_ids
            assert len(table) == len(set(table)) == request.num_blocks, (
                f"{where}, step {step.step}: request {request.id} has {request.num_blocks} blocks, and by the lines "
                f"{table}. {LOOK}"
            )
            assert request.prompt_token_ids in ([], prompts[request.id]), f"{where}: {request.prompt_token_ids}. {LOOK}"
            tokens[request.id] += request.token_ids
            known |= {*request.prompt_token_ids, *request.token_ids}
        cached = (cached | set(step.cached_block_ids)) - set(step.uncached_block_ids)
        owned = [block for table in tables.values() for block in table]
        if number_of(engine.part) < 7:
            assert len(owned) == len(set(owned)), f"{where}, step {step.step}: two requests have a block. {LOOK}"
        ended |= set(step.finished) | set(step.aborted)
    for name, answer in engine.answers.items():
        if name not in ("1", "6"):
            assert tokens[name] == answer.token_ids, f"{where}, request {name}: {tokens[name]}, not {answer}. {LOOK}"
    check_cached(where, cached, engine)
    assert known >= {token for name in tokens for token in tokens[name]}, LOOK


@pytest.mark.since(12)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_copy_is_in_the_trace(part: str, num_ranks: int, small_models: SmallModels, tmp_path: Path) -> None:
    """Saves, and loads from host memory and from a folder, with the tokens that the engine has counted."""
    path, blocks = tmp_path / "trace.jsonl", tmp_path / "blocks"
    engine = SmallEngine(
        part, small_models, num_kv_blocks=24, tensor_parallel_size=num_ranks, trace=str(path),
        kv_offload_gib=2**-14, kv_offload_dir=str(blocks),
    )  # fmt: skip
    offloader = engine.core.offloader
    with mock.patch.object(type(offloader.cost), "num_to_load", lambda cost, num_host, num_found: num_found):
        prompts = [[each] * 40 for each in range(4, 12)]
        for prompt in prompts:
            engine.generate(prompt, max_tokens=1)
        until(
            lambda: sum(each.is_file() for each in blocks.rglob("*")) >= 80 * num_ranks,
            f"{part}: each block to be written on each rank",
        )
        for prompt in [prompts[-3], *prompts, [1, 2]]:  # the last one's step writes the transfers before it
            engine.generate(prompt, max_tokens=1)
    engine.core.tracer.close()
    steps = read_trace(path).steps
    transfers = [each for step in steps for each in step.transfers]
    tokens = {
        kind: sum(each.num_tokens for each in transfers if each.kind == kind) for kind in ("save", "load", "read")
    }
    stats = offloader.stats
    counted = {"save": stats.num_saved_tokens, "host and tiers": stats.num_host_tokens + stats.num_tier_tokens}
    where = f"{part}, {num_ranks} ranks"
    assert counted == {"save": tokens["save"], "host and tiers": tokens["load"] + tokens["read"]}, (
        f"{where}: the engine has copied {counted} tokens, the trace has {tokens}. {LOOK_COPIES}"
    )
    assert all(tokens.values()), f"{where}: expected copies of each kind, got {tokens}. {LOOK_COPIES}"
    for each in transfers:
        assert each.num_bytes * tokens["save"] == each.num_tokens * sum(
            other.num_bytes for other in transfers if other.kind == "save"
        ), f"{where}: {each} has another number of bytes per token than the rest. {LOOK_COPIES}"
        assert 0 < each.start_s < each.start_s + each.duration_s < steps[-1].end_s, f"{where}: {each}. {LOOK_COPIES}"
        assert (each.id is None) == (each.kind == "save"), f"{where}: only loads are for a request: {each}"
