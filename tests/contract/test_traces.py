"""What a trace says of blocks and tokens: each line only what is new, and together all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.trace import read_trace
from tests.contract.engines import SmallEngine, SmallModels, kinds_of, number_of, prompts_of

LOOK = "Look at core/step_tracer.py::StepTracer, and at common/trace/deltas.py."


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
    if number_of(engine.part) >= 7:
        real = {block.block_id for block in engine.core.blocks.cached_blocks.values()}
        assert cached == real, f"{where}: the lines say that {sorted(cached)} are cached, {sorted(real)} are. {LOOK}"
    assert known >= {token for name in tokens for token in tokens[name]}, LOOK
