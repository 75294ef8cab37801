"""common/testing.py: the oracle for all parts passes correct answers and fails wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.testing import FAMILIES, TOP_2_TOLERANCE, assert_same_greedy, reference_greedy, small_model

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model("llama", seed=0)


def top(model: Any, text: list[int], count: int = 3) -> tuple[list[float], list[int]]:
    with torch.inference_mode():
        best = model(torch.tensor([text])).logits[0, -1].topk(count)
    return best.values.tolist(), best.indices.tolist()


def failure(model: Any, got: list[int], expected: list[int]) -> str:
    with pytest.raises(AssertionError) as caught:
        assert_same_greedy(model, PROMPT, got, expected, where="request 3")
    message = str(caught.value)
    assert message.startswith("request 3: "), f"a failure says where: {message}"
    return message


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_greedy_is_the_argmax_again_and_again(family: str) -> None:
    for seed in (0, 1):
        model = small_model(family, seed)
        text = list(PROMPT)
        for _ in range(12):
            text.append(top(model, text)[1][0])
        got = reference_greedy(model, PROMPT, 12)
        assert_same_greedy(model, PROMPT, got, text[3:], where=f"{family}, seed {seed}")
        assert len(set(got)) > 3, f"{family}, seed {seed}: a model that says only {got} tests little"


def test_reference_greedy_ends_on_any_of_the_eos_ids(model: Any) -> None:
    free = reference_greedy(model, PROMPT, 12)
    end = next(i for i in range(11, -1, -1) if free[i] not in free[:i])
    assert reference_greedy(model, PROMPT, 12, [319, free[end]]) == free[: end + 1]


def test_reference_greedy_without_eos_ids_ignores_the_models_own(model: Any) -> None:
    free = reference_greedy(model, PROMPT, 12)
    chatty = small_model("llama", seed=0)
    chatty.generation_config.eos_token_id = free[2]
    chatty.config.eos_token_id = free[2]
    got = reference_greedy(chatty, PROMPT, 12)
    assert got == free, f"no eos ids were given, so {free[2]} must not end it: expected {free}, got {got}"


def test_small_models_are_seeded_and_differ() -> None:
    first, again, other = (small_model("qwen3", seed).state_dict() for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    tied = [small_model("llama", seed).config.tie_word_embeddings for seed in (0, 1)]
    assert tied == [True, False], f"even seeds tie the embeddings, odd ones do not: got {tied}"


def test_equal_answers_pass(model: Any) -> None:
    expected = reference_greedy(model, PROMPT, 8)
    assert_same_greedy(model, PROMPT, expected, expected, where="same")
    assert_same_greedy(model, tuple(PROMPT), tuple(expected), expected, where="another kind of sequence")
    assert_same_greedy(model, PROMPT, [], [], where="nothing")


@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_planted_wrong_token_fails(model: Any, at: int) -> None:
    expected = reference_greedy(model, PROMPT, 8)
    values, indices = top(model, PROMPT + expected[:at])
    assert values[0] - values[1] > 10 * TOP_2_TOLERANCE, "this test needs a clear winner"
    for wrong in (indices[1], indices[2]):
        message = failure(model, [*expected[:at], wrong, *expected[at + 1 :]], expected)
        for word in (f"output token {at} ", f"position {3 + at}", f"expected {expected[at]}, got {wrong}", "a bug"):
            assert word in message, f"expected {word!r} in {message!r}"


def test_stopping_early_or_late_fails(model: Any) -> None:
    expected = reference_greedy(model, PROMPT, 8)
    for got in (expected[:5], [], [*expected, 9]):
        message = failure(model, got, expected)
        for word in (f"expected 8 tokens, got {len(got)}", "early or late", "stop rules"):
            assert word in message, f"expected {word!r} in {message!r}"


@pytest.fixture
def tied_model() -> tuple[Any, list[int], int]:
    """A model whose two best tokens after PROMPT are nearly tied: the second's output row is made the first's."""
    model = small_model("llama", seed=1)  # an odd seed: its output rows are not the embeddings
    best, second = top(model, PROMPT)[1][:2]
    with torch.no_grad():
        model.lm_head.weight[second] = model.lm_head.weight[best]
    return model, [best, second], top(model, PROMPT)[1][2]


def shift(model: Any, token: int, by: float) -> None:
    """Lower a token's logit after PROMPT by about `by`."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([PROMPT])).last_hidden_state[0, -1]
        model.lm_head.weight[token] -= by * hidden / hidden.dot(hidden)


def test_a_true_tie_passes_whatever_follows(tied_model: tuple[Any, list[int], int]) -> None:
    model, (best, second), third = tied_model
    values = top(model, PROMPT)[0]
    assert values[0] - values[1] <= TOP_2_TOLERANCE < values[1] - values[2], f"the tie was not made: {values}"
    assert_same_greedy(model, PROMPT, [second, 1, 2], [best, 3, 4], where="a tie")
    assert_same_greedy(model, PROMPT, [best, 1], [second, 3, 4], where="a tie, the other way, and another length")
    message = failure(model, [third, 1, 2], [best, 3, 4])
    assert f"expected {best}, got {third}" in message, f"the third best is no part of the tie: {message}"


@pytest.mark.parametrize(("gap", "passes"), [(5e-5, True), (3e-4, False)])
def test_a_tie_is_at_most_the_tolerance(tied_model: tuple[Any, list[int], int], gap: float, passes: bool) -> None:
    model, (best, second), _ = tied_model
    shift(model, second, gap)
    values, indices = top(model, PROMPT)
    assert indices[:2] == [best, second] and abs(values[0] - values[1] - gap) < 2e-5, f"expected {gap}, got {values}"
    if passes:
        assert_same_greedy(model, PROMPT, [second], [best], where="a tie")
    else:
        assert "so this is a bug" in failure(model, [second], [best])
