"""CUDA graphs: padding and static buffers, on a CPU; capture and replay where there is a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import FieldError
from part15_full_architecture.config import EngineConfig
from part15_full_architecture.messages import NULL_BLOCK
from part15_full_architecture.worker.attention import AttentionMetadata
from part15_full_architecture.worker.graphs import StepGraphs
from tests.contract.engines import SmallEngine, SmallModels

PART, LOOK = "part15_full_architecture", "See worker/graphs.py::StepGraphs"
PROMPTS = [[5, 6, 7], [11, 12, 13, 14, 15, 16, 17, 18, 19], [21], [31, 32, 33, 34, 35]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SmallModels:
    return SmallModels(tmp_path_factory.mktemp("models"))


class Recorder:
    """A model and an attention that note what they get, and answer with the input ids."""

    device, calls = "cpu", list[dict[str, Any]]()

    def __init__(self) -> None:
        self.calls = []

    def attend(self, metadata: AttentionMetadata, *rest: object) -> None:
        raise AssertionError("the model does not call it")

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> torch.Tensor:
        metadata = attend.args[0]
        self.calls.append({"input_ids": input_ids.clone(), "positions": positions.clone(), **vars(metadata)})
        self.calls[-1] = {
            name: each.clone() if isinstance(each, torch.Tensor) else each for name, each in self.calls[-1].items()
        }
        return input_ids.unsqueeze(1).float()


def step(
    query_lens: list[int], context_lens: list[int], width: int
) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
    num_tokens = sum(query_lens)
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    metadata = AttentionMetadata(
        slot_mapping=torch.arange(num_tokens) + 100,
        block_tables=torch.arange(1, len(query_lens) * width + 1, dtype=torch.int32).view(-1, width),
        query_start_loc=starts,
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        max_query_len=max(query_lens),
    )
    return torch.arange(num_tokens) + 50, torch.arange(num_tokens) + 7, metadata


@pytest.fixture
def graphs() -> tuple[StepGraphs, Recorder]:
    recorder = Recorder()
    made = StepGraphs(recorder, recorder, [1, 2, 4, 8], max_blocks=6)  # type: ignore[arg-type]
    made.capture()
    return made, recorder


@pytest.mark.parametrize(("num_tokens", "num_seqs", "size"), [(1, 1, 1), (3, 3, 4), (4, 4, 4), (5, 2, 8), (9, 9, None)])
def test_the_bucket_of_a_step(
    num_tokens: int, num_seqs: int, size: int | None, graphs: tuple[StepGraphs, Recorder]
) -> None:
    found = graphs[0].bucket(num_tokens, num_seqs)
    assert found == size, f"{num_tokens} tokens with buckets 1, 2, 4, 8: expected {size}, got {found}. {LOOK}.bucket"


def test_five_decodes_replay_eight(graphs: tuple[StepGraphs, Recorder]) -> None:
    made, recorder = graphs
    hidden = made.run(*step([1] * 5, [3, 4, 5, 6, 7], 2))
    assert hidden is not None and len(hidden) == 5, (
        f"the step has 5 tokens: got {None if hidden is None else len(hidden)}"
    )
    assert made.num_padded == 3, f"5 of 8 are real: expected 3 padded, got {made.num_padded}"
    call = recorder.calls[-1]
    assert call["input_ids"].tolist() == [50, 51, 52, 53, 54, 0, 0, 0], f"got {call['input_ids']}. {LOOK}.run"
    assert call["slot_mapping"].tolist() == [100, 101, 102, 103, 104, 0, 0, 0], (
        f"padding writes to slot 0, of the null block: got {call['slot_mapping'].tolist()}. {LOOK}._fill_padding"
    )
    assert call["context_lens"].tolist() == [3, 4, 5, 6, 7, 1, 1, 1], (
        f"got {call['context_lens']}. {LOOK}._fill_padding"
    )
    assert call["query_start_loc"].tolist() == list(range(9)), f"got {call['query_start_loc'].tolist()}"
    assert (call["block_tables"][5:] == NULL_BLOCK).all(), (
        f"padding reads the null block: got {call['block_tables'][5:]}"
    )


def test_nothing_of_an_earlier_step_remains(graphs: tuple[StepGraphs, Recorder]) -> None:
    made, recorder = graphs
    made.run(*step([1] * 8, [90] * 8, 6))
    made.run(*step([1] * 3, [3, 4, 5], 1))
    tables, slots = recorder.calls[-1]["block_tables"], recorder.calls[-1]["slot_mapping"]
    assert slots.tolist() == [100, 101, 102, 0], f"padding writes to slot 0: got {slots.tolist()}. {LOOK}._fill_padding"
    assert tables[:3, 0].tolist() == [1, 2, 3], f"the first column is this step's: got {tables}"
    stale = tables.clone()
    stale[:3, 0] = NULL_BLOCK
    assert not stale.any(), f"stale rows or columns of the step before: {tables.tolist()}. {LOOK}._fill_padding"


def test_padded_tokens_of_a_mixed_step_belong_to_no_sequence(graphs: tuple[StepGraphs, Recorder]) -> None:
    made, recorder = graphs
    made.run(*step([1, 4], [9, 4], 3))
    call = recorder.calls[-1]
    assert call["query_start_loc"].tolist() == [0, 1, 5, 5, 5, 5, 5, 5, 5], (
        f"sequences of padding have no tokens: got {call['query_start_loc'].tolist()}. {LOOK}._fill_padding"
    )
    assert call["context_lens"].tolist() == [9, 4, 0, 0, 0, 0, 0, 0], f"got {call['context_lens'].tolist()}"
    assert call["max_query_len"] == 8, "a captured kernel must be launched for the longest sequence that fits"


def test_a_larger_step_is_computed_as_usual(graphs: tuple[StepGraphs, Recorder]) -> None:
    assert graphs[0].run(*step([9], [9], 3)) is None, f"9 tokens do not fit into 8. {LOOK}.run"


def check_answers(expected: dict[str, list[int]], found: dict[str, list[int]], when: str, look: str) -> None:
    """Both: request → token ids. The message has the first tokens that differ."""
    for name, tokens in expected.items():
        if found[name] != tokens:
            pairs = zip(tokens, found[name], strict=False)
            at = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(tokens), len(found[name])))
            raise AssertionError(
                f"{when}: request {name} gets other tokens from position {at} on: expected {tokens[at : at + 5]}, "
                f"got {found[name][at : at + 5]}. {look}"
            )


@pytest.mark.parametrize(
    "flags",
    [
        {}, {"async_scheduling": False}, {"max_num_batched_tokens": 16, "max_num_seqs": 8},
        {"speculative_method": "ngram", "prompt_lookup_min": 1}, {"kv_cache_dtype": "int8"},
        {"tensor_parallel_size": 2}, {"kernels": "torch"},
    ],
    ids=str,
)  # fmt: skip
def test_padded_steps_give_the_same_answers(flags: dict[str, Any], models: SmallModels) -> None:
    answers = []
    for sizes in ("", "1,2,4,8,16"):
        engine = SmallEngine(PART, models, **flags, cudagraph_capture_sizes=sizes)
        for index, prompt in enumerate(PROMPTS):
            engine.add(str(index), prompt, max_tokens=12)
        answers.append({name: answer.token_ids for name, answer in engine.finish().items()})
    check_answers(answers[0], answers[1], f"with padding, {flags or 'default flags'}", f"{LOOK}._fill_padding and run")


def test_a_draft_model_has_graphs_of_its_own(models: SmallModels) -> None:
    answers = []
    for sizes in ("", "1,2,4,8,16"):
        flags = {"speculative_method": "draft_model", "speculative_model": models.draft}
        engine = SmallEngine(PART, models, **flags, cudagraph_capture_sizes=sizes)
        for index, prompt in enumerate(PROMPTS):
            engine.add(str(index), prompt, max_tokens=12, temperature=index / 4, seed=index)
        answers.append({name: answer.token_ids for name, answer in engine.finish().items()})
    check_answers(answers[0], answers[1], "with padded draft passes", LOOK)
    drafter = engine.worker.runner.drafter
    assert drafter.small_steps.num_replays > 12, (
        f"each draft pass fits into a bucket: got {drafter.small_steps.num_replays} replays. "
        "See worker/draft_model.py::DraftModelProposer._forward"
    )


@pytest.mark.parametrize("text", ["0", "4,x", "9000", "-1", "1,,2"])
def test_a_wrong_list_of_sizes_is_refused(text: str) -> None:
    with pytest.raises(FieldError, match="cudagraph_capture_sizes: expected numbers from 1 to 8192"):
        EngineConfig(cudagraph_capture_sizes=text)


def test_eager_engines_have_no_graphs() -> None:
    assert EngineConfig(enforce_eager=True, cudagraph_capture_sizes="1,2").graph_sizes((4,)) == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_on_a_gpu_give_the_same_answers(models: SmallModels, tmp_path: Path) -> None:
    answers = []
    for flags in ({"enforce_eager": True}, {}):
        engine = SmallEngine(PART, models, **{"device": "cuda", "dtype": "float32", **flags})
        for index, prompt in enumerate(PROMPTS):
            engine.add(str(index), prompt, max_tokens=12)
        answers.append({name: answer.token_ids for name, answer in engine.finish().items()})
    check_answers(answers[0], answers[1], "with CUDA graphs", LOOK)
