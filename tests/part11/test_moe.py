"""worker/moe.py, worker/expert_parallel.py: mixtures of experts, on one rank and on several."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from common.checkpoint import MODELS_DIR, Checkpoint, resolve_checkpoint
from common.errors import FieldError
from part11_expert_parallelism.worker.expert_moves import plan_moves, take_loads
from part11_expert_parallelism.worker.model import check_divisible
from part11_expert_parallelism.worker.parallel import Groups, ParallelGroup
from part11_expert_parallelism.worker.weights import load_decoder
from tests import local_ranks

PART = "part11_expert_parallelism"
on_expert_ranks = functools.partial(local_ranks.on_expert_ranks, PART)
on_all_ranks = functools.partial(local_ranks.on_all_ranks, PART)
LOOK_GATE = 'Look at worker/moe.py::TopKGate.forward; README "The gate".'
LOOK_DISPATCH = 'Look at worker/expert_parallel.py::plan_dispatch; README "There and back".'
LOOK_MOVES = 'Look at worker/expert_moves.py; README "Balancing".'
LOOK = "Look at worker/moe.py::MixtureOfExperts."
TOLERANCE = 1e-4


def dense_attend(length: int) -> Callable[..., Tensor]:
    """Causal attention over one sequence, of the heads that it gets."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not len(query):
            return query
        heads = (each.transpose(0, 1)[None] for each in (query, key, value))
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    return attend


def write_random_model(directory: Path, family: str, **changes: Any) -> Checkpoint:
    torch.manual_seed(len(str(changes)))
    shape: dict[str, Any] = dict(
        hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=12, num_key_value_heads=4,
        vocab_size=1_010, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.3,
        num_experts_per_tok=2, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    if family != "qwen2_moe":
        shape["head_dim"] = 8
    if family == "mixtral":
        shape |= dict(num_local_experts=8)
    else:
        shape |= dict(num_experts=8, moe_intermediate_size=16)
    if family == "qwen2_moe":
        shape |= dict(shared_expert_intermediate_size=32)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **changes}), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "gate.weight")):
            nn.init.normal_(parameter)  # transformers' are 0
    model.save_pretrained(directory)
    (directory / "tokenizer.json").symlink_to(MODELS_DIR / "tiny" / "tokenizer.json")
    return resolve_checkpoint(str(directory))


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, tied, one expert": ("mixtral", dict(tie_word_embeddings=True, num_experts_per_tok=1)),
    "qwen3, normalized": ("qwen3_moe", dict(norm_topk_prob=True)),
    "qwen3, not normalized": ("qwen3_moe", dict(norm_topk_prob=False)),
    "qwen3, all experts": ("qwen3_moe", dict(norm_topk_prob=True, num_experts=4, num_experts_per_tok=4)),
    "qwen3, some layers dense": ("qwen3_moe", dict(norm_topk_prob=True, decoder_sparse_step=2)),
    "qwen3, one layer dense": ("qwen3_moe", dict(norm_topk_prob=True, mlp_only_layers=[1])),
    "qwen2, shared expert": ("qwen2_moe", dict(norm_topk_prob=False)),
}


def reference_logits(directory: Path, token_ids: Tensor) -> Tensor:
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return reference(token_ids[None]).logits[0]


def check_logits(logits: Tensor, expected: Tensor, what: str, look: str = LOOK) -> None:
    difference = float("nan")
    if logits.shape == expected.shape:
        difference = float((logits - expected).abs().max()) if expected.numel() else 0.0
    assert difference <= TOLERANCE, (
        f"{what}: logits of shape {list(logits.shape)}, expected transformers' within {TOLERANCE:g}, off by up to "
        f"{difference:.2e}. {look}"
    )


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    check_all_grids(name, write_random_model(tmp_path, family, **changes), tmp_path)


def test_logits_of_the_shipped_model_equal_transformers() -> None:
    check_all_grids("tiny-moe", resolve_checkpoint("tiny-moe"), MODELS_DIR / "tiny-moe")


def check_all_grids(name: str, checkpoint: Checkpoint, directory: Path) -> None:
    """On one rank; on two that have a part of each expert; on ranks that have some experts, of one core or several."""
    sequences = [torch.randint(1_010, (n,), generator=torch.Generator().manual_seed(n)) for n in (20, 7)]
    expected = [reference_logits(directory, sequence) for sequence in sequences]

    def work(groups: Groups, core: int) -> Tensor:
        model = load_decoder(checkpoint, torch.float32, "cpu", groups)
        ids = sequences[core]
        return model.compute_logits(model(ids, torch.arange(len(ids)), dense_attend(len(ids))))

    for size in (1, 2):
        for logits in on_all_ranks(size, lambda group: work(Groups(group), 0)):
            check_logits(logits, expected[0], f"{name}, a part of each expert on each of {size} ranks", LOOK_GATE)
    for tp_size, num_cores in ((2, 1), (4, 1), (1, 2), (2, 2)):
        for number, logits in enumerate(on_expert_ranks(tp_size, num_cores, work)):
            what = f"{name}, {num_cores} cores of {tp_size} ranks, rank {number}"
            check_logits(logits, expected[number // tp_size], what)


# Tokens on their way


def run_mixture(tp_size: int, num_cores: int, sequences: list[Tensor], **kwargs: Any) -> list[tuple[Tensor, Any]]:
    """The hidden states of the shipped model on each rank, and its groups."""
    checkpoint = resolve_checkpoint("tiny-moe")

    def work(groups: Groups, core: int) -> tuple[Tensor, Any]:
        model = load_decoder(checkpoint, torch.float32, "cpu", groups)
        if (gate := kwargs.get("gate")) is not None:
            for mixture in model.mixtures:
                gate(mixture.gate.weight)
        ids = sequences[core]
        return model(ids, torch.arange(len(ids)), dense_attend(len(ids))), groups

    fields = {name: value for name, value in kwargs.items() if name != "gate"}
    return on_expert_ranks(tp_size, num_cores, work, **fields)


IDS = torch.arange(100, 113)


@pytest.mark.parametrize(("num_redundant_experts", "num_micro_batches"), [(0, 1), (4, 1), (0, 2)])
@pytest.mark.parametrize(("tp_size", "num_cores"), [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_ranks_without_tokens_take_part(
    tp_size: int, num_cores: int, num_tokens: int, num_redundant_experts: int, num_micro_batches: int
) -> None:
    """Core 0 has all tokens; the others have none, and their ranks compute for core 0's."""
    checkpoint = resolve_checkpoint("tiny-moe")
    alone = load_decoder(checkpoint, torch.float32, "cpu")
    ids = IDS[:num_tokens]
    with torch.inference_mode():
        expected = alone(ids, torch.arange(num_tokens), dense_attend(num_tokens))
    sequences = [ids, *[IDS[:0]] * (num_cores - 1)]
    fields = {"num_redundant_experts": num_redundant_experts, "num_micro_batches": num_micro_batches}
    for rank, (hidden, _) in enumerate(run_mixture(tp_size, num_cores, sequences, **fields)):
        if rank < tp_size:
            check_logits(hidden, expected, f"{num_cores} cores of {tp_size} ranks, rank {rank}")
        else:
            assert len(hidden) == 0


def test_all_tokens_to_one_expert() -> None:
    def favor_the_last(weight: Tensor) -> None:
        weight.zero_()
        weight[-2:, 0] = 1e-6  # two experts per token

    checkpoint = resolve_checkpoint("tiny-moe")
    alone = load_decoder(checkpoint, torch.float32, "cpu")
    for mixture in alone.mixtures:
        favor_the_last(mixture.gate.weight)
    with torch.inference_mode():
        expected = alone(IDS, torch.arange(13), dense_attend(13))
    for rank, (hidden, _) in enumerate(run_mixture(4, 1, [IDS], gate=favor_the_last)):
        check_logits(hidden, expected, f"rank {rank} of 4")


def test_a_token_is_sent_to_a_rank_once() -> None:
    """The bytes that leave a rank: its tokens' hidden states, expert numbers and weights, there; outputs, back."""
    checkpoint = resolve_checkpoint("tiny-moe")
    config = checkpoint.config
    chosen: dict[int, list[Tensor]] = {}

    def work(groups: Groups, core: int) -> Any:
        model = load_decoder(checkpoint, torch.float32, "cpu", groups)
        found = chosen.setdefault(groups.experts.rank, [])
        for mixture in model.mixtures:
            mixture.gate.register_forward_hook(lambda module, args, output: found.append(output[1]))
        model(IDS, torch.arange(13), dense_attend(13))
        return groups

    groups = on_expert_ranks(2, 1, work)
    row, back, per_rank = (
        4 * config.hidden_size + 12 * config.num_experts_per_tok,
        4 * config.hidden_size,
        config.num_experts // 2,
    )
    crossing = [sum(int((ids // per_rank == 1 - rank).any(dim=1).sum()) for ids in chosen[rank]) for rank in range(2)]
    expected = [crossing[rank] * row + crossing[1 - rank] * back for rank in range(2)]
    got = [each.experts.num_bytes_sent for each in groups]
    assert got == expected and all(crossing), (
        f"tokens that cross: {crossing}; expected {expected} bytes, got {got}. {LOOK_DISPATCH}"
    )


# Experts move


def test_where_experts_come_from() -> None:
    """Slots 0 to 2 are on rank 0, the others on rank 1."""
    found = plan_moves([0, 1, 2, 0, 3, 1], [0, 2, 1, 3, 1, 1], 3)
    assert found == {1: 2, 2: 1, 3: 4, 4: 5}, f"all experts are on the rank already, got {found}. {LOOK_MOVES}"
    found = plan_moves([0, 1, 0, 2], [0, 2, 1, 1], 2)
    assert found == {1: 3, 2: 1, 3: 1}, f"only one slot has each expert, got {found}. {LOOK_MOVES}"
    found = plan_moves([0, 0, 1, 1], [0, 1, 0, 1], 2)
    assert found == {1: 3, 2: 0}, f"copies take turns, got {found}. {LOOK_MOVES}"
    assert plan_moves([0, 1, 0, 2], [0, 1, 0, 2], 2) == {}, LOOK_MOVES


def test_loads_are_counted_anew() -> None:
    """Each token is counted once for each of its experts, by the rank that dispatches it."""

    def work(groups: Groups, core: int) -> tuple[list[list[int]], list[list[int]]]:
        model = load_decoder(resolve_checkpoint("tiny-moe"), torch.float32, "cpu", groups)
        model(IDS, torch.arange(13), dense_attend(13))
        return take_loads(model.mixtures), take_loads(model.mixtures)

    for tp_size, num_cores in ((2, 1), (1, 2)):
        for first, second in on_expert_ranks(tp_size, num_cores, work):
            sums = [sum(layer) for layer in first]
            assert sums == [2 * 13 * num_cores] * len(first), (
                f"{num_cores} cores of {tp_size} ranks: {sums}. {LOOK_MOVES}"
            )
            assert not any(map(sum, second)), f"counting starts again: {second}. {LOOK_MOVES}"


@pytest.mark.parametrize(("num_redundant", "size"), [(0, 3), (1, 2), (3, 4)])
def test_experts_that_cannot_be_divided(num_redundant: int, size: int) -> None:
    groups = Groups(ParallelGroup(0, size), ParallelGroup(0, size), num_redundant_experts=num_redundant)
    if size == 3:  # the heads can't be divided either
        groups.tensor.size = 1
    with pytest.raises(FieldError, match="num_redundant_experts"):
        check_divisible(resolve_checkpoint("tiny-moe").config, groups)


def test_a_model_without_experts() -> None:
    with pytest.raises(FieldError, match="enable_expert_parallel: the model has no experts"):
        check_divisible(resolve_checkpoint("tiny").config, Groups(ParallelGroup(0, 2), ParallelGroup(0, 2)))
