"""worker/expert_parallel.py, TopKGate: which experts a token goes to, and how it gets there and back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from part11_expert_parallelism.worker.expert_parallel import (
    Placement,
    combine,
    pack_rows,
    plan_dispatch,
    share_of,
    unpack_rows,
)
from part11_expert_parallelism.worker.moe import TopKGate
from part11_expert_parallelism.worker.parallel import ParallelGroup

LOOK_GATE = 'Look at worker/moe.py::TopKGate.forward; README "The gate".'
LOOK_DISPATCH = 'Look at worker/expert_parallel.py::plan_dispatch; README "There and back".'
LOOK_COMBINE = 'Look at worker/expert_parallel.py::combine; README "There and back".'


# The gate


def gate_of(probs: list[list[float]], top_k: int, is_normalized: bool, dtype: torch.dtype = torch.float32) -> TopKGate:
    """A gate that gives token t the probabilities probs[t], if its hidden state is the t-th unit vector."""
    config = SimpleNamespace(
        model_type="qwen3_moe", num_experts=len(probs[0]), hidden_size=len(probs), num_experts_per_tok=top_k,
        norm_topk_prob=is_normalized,
    )  # fmt: skip
    gate = TopKGate(config).requires_grad_(False).to(dtype)
    gate.weight.copy_(torch.tensor(probs).log().T)
    return gate


PROBS = [[0.1, 0.4, 0.2, 0.3], [0.7, 0.05, 0.15, 0.1], [0.2, 0.2, 0.1, 0.5]]


def check_gate(gate: TopKGate, expected: list[list[float]], ids: list[list[int]], what: str) -> None:
    weights, expert_ids = gate(torch.eye(3, dtype=gate.weight.dtype))
    assert expert_ids.tolist() == ids, f"{what}: expected experts {ids}, got {expert_ids.tolist()}. {LOOK_GATE}"
    close = torch.allclose(
        weights.float(), torch.tensor(expected), atol=1e-2 if gate.weight.dtype != torch.float32 else 1e-6
    )
    assert close, f"{what}: expected weights {expected}, got {weights.tolist()}. {LOOK_GATE}"


def test_the_gate_takes_the_likeliest_experts() -> None:
    gate = gate_of(PROBS[:2] + [[0.22, 0.18, 0.1, 0.5]], 2, is_normalized=False)
    check_gate(gate, [[0.4, 0.3], [0.7, 0.15], [0.5, 0.22]], [[1, 3], [0, 2], [3, 0]], "not normalized")


def test_the_weights_add_up_to_1_if_the_config_says_so() -> None:
    gate = gate_of(PROBS[:2] + [[0.22, 0.18, 0.1, 0.5]], 2, is_normalized=True)
    expected = [[4 / 7, 3 / 7], [14 / 17, 3 / 17], [50 / 72, 22 / 72]]
    check_gate(gate, expected, [[1, 3], [0, 2], [3, 0]], "normalized")
    one = gate_of(PROBS[:2] + [[0.22, 0.18, 0.1, 0.5]], 1, is_normalized=True)
    check_gate(one, [[1.0]] * 3, [[1], [0], [3]], "normalized, one expert")


def test_all_experts() -> None:
    weights, expert_ids = gate_of(PROBS, 4, is_normalized=False)(torch.eye(3))
    assert sorted(expert_ids[0].tolist()) == [0, 1, 2, 3], f"got {expert_ids}. {LOOK_GATE}"
    assert torch.allclose(weights.sum(dim=1), torch.ones(3)), f"got {weights}. {LOOK_GATE}"


def test_the_softmax_is_computed_in_float32() -> None:
    """In bfloat16, 300 experts with logits that differ by little would get equal probabilities."""
    torch.manual_seed(0)
    hidden = torch.randn(50, 64, dtype=torch.bfloat16)
    config = SimpleNamespace(
        model_type="qwen3_moe", num_experts=300, hidden_size=64, num_experts_per_tok=8, norm_topk_prob=True
    )
    gate = TopKGate(config).requires_grad_(False).to(torch.bfloat16)
    gate.weight.copy_(0.02 * torch.randn(300, 64))
    weights, expert_ids = gate(hidden)
    assert weights.dtype == torch.bfloat16, (
        f"weights have the dtype of the hidden states, got {weights.dtype}. {LOOK_GATE}"
    )
    logits = torch.nn.functional.linear(hidden, gate.weight)
    expected = logits.softmax(dim=-1, dtype=torch.float32).topk(8, dim=-1)
    assert torch.equal(expert_ids, expected.indices), f"other experts than with a softmax in float32. {LOOK_GATE}"


# Dispatch and combine


def splits(*ranks_of_tokens: tuple[int, ...], num_ranks: int = 2) -> tuple[list[int], list[int]]:
    tokens, counts = plan_dispatch(torch.tensor(ranks_of_tokens), num_ranks)
    return tokens.tolist(), counts.tolist()


def test_four_tokens_on_two_ranks() -> None:
    """Four experts, two for each token: rank 0 has experts 0 and 1. Its own tokens choose (0, 1), (0, 2) and (3, 1)."""
    got = splits((0, 0), (0, 1), (1, 0))
    assert got == ([0, 1, 2, 1, 2], [3, 2]), (
        f"rank 0 sends tokens 0, 1, 2 to rank 0 and 1, 2 to rank 1: {got}. {LOOK_DISPATCH}"
    )
    got = splits((1, 1))
    assert got == ([0], [0, 1]), (
        f"experts 2 and 3 are both on rank 1, so the token is sent once: {got}. {LOOK_DISPATCH}"
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_no_tokens(num_ranks: int) -> None:
    tokens, counts = plan_dispatch(torch.empty(0, 2, dtype=torch.int64), num_ranks)
    assert (tokens.tolist(), counts.tolist()) == ([], [0] * num_ranks), f"got {tokens}, {counts}. {LOOK_DISPATCH}"


def test_every_token_reaches_every_rank_that_it_needs() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_ranks, top_k, num_tokens in [(2, 2, 50), (4, 3, 50), (8, 8, 20), (3, 1, 10)]:
        ranks = torch.randint(num_ranks, (num_tokens, top_k), generator=generator)
        tokens, counts = plan_dispatch(ranks, num_ranks)
        parts = tokens.split(counts.tolist())
        for rank, part in enumerate(parts):
            expected = [token for token in range(num_tokens) if rank in ranks[token]]
            assert part.tolist() == expected, (
                f"rank {rank} of {num_ranks}: expected {expected}, got {part}. {LOOK_DISPATCH}"
            )


def test_combine_adds_what_came_back_for_each_token() -> None:
    outputs = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    got = combine(outputs, torch.tensor([2, 0, 2]), 4)
    expected = torch.tensor([[10.0, 20.0], [0.0, 0.0], [101.0, 202.0], [0.0, 0.0]])
    assert torch.equal(got, expected), (
        f"token 2 came back from two ranks: expected {expected}, got {got}. {LOOK_COMBINE}"
    )
    half = combine(outputs.bfloat16(), torch.tensor([2, 0, 2]), 4)
    assert half.dtype == torch.bfloat16, (
        f"outputs in bfloat16 give a result in bfloat16, got {half.dtype}. {LOOK_COMBINE}"
    )
    assert combine(outputs[:0], torch.empty(0, dtype=torch.int64), 2).tolist() == [[0.0, 0.0]] * 2, LOOK_COMBINE


def test_the_shares_of_a_group() -> None:
    """Every token is in one share, also if there are fewer tokens than ranks."""
    for num_tokens in (0, 1, 3, 4, 9):
        for size in (1, 2, 4):
            shares = [list(range(num_tokens)[share_of(num_tokens, ParallelGroup(rank, size))]) for rank in range(size)]
            assert sum(shares, []) == list(range(num_tokens)), f"{num_tokens} tokens on {size} ranks: {shares}"


def test_rows_travel_together() -> None:
    for n in (0, 1, 3):
        hidden, ids, weights = torch.randn(n, 5, dtype=torch.bfloat16), torch.arange(2 * n).view(n, 2), torch.rand(n, 2)
        packed = pack_rows(hidden, ids, weights)
        assert packed.shape == (n, 2 * 5 + 8 * 2 + 4 * 2) and packed.dtype == torch.uint8
        like: list[Tensor] = [hidden, ids, weights]
        for got, column in zip(unpack_rows(packed, *like), like, strict=True):
            assert torch.equal(got, column), f"{n} rows: {got}, expected {column}"


# Placement


def test_copies_of_an_expert_take_turns() -> None:
    placement = Placement([0, 1, 2, 1, 0, 1], 3)
    got = placement.choose(torch.tensor([[0, 1]] * 6))
    assert got[:, 0].tolist() == [0, 4] * 3 and got[:, 1].tolist() == [1, 3, 5] * 2, f"got {got}"
    alone = [placement.choose(torch.tensor([[0, 1]]), first).tolist()[0] for first in range(3)]
    assert alone == [[0, 1], [4, 3], [0, 5]], f"ranks with one token each should not all take the first copy: {alone}"
