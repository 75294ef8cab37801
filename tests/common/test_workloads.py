"""common/workloads.py: the same requests every time, with the distributions that the docstrings promise."""

import statistics
from collections import Counter
from dataclasses import FrozenInstanceError

import pytest

from common.workloads import (
    DEFAULT_FIRST_ID,
    DEFAULT_VOCAB_SIZE,
    QUESTIONS,
    WORKLOADS,
    WorkloadRequest,
    build_workload,
    poisson_arrivals,
    with_arrivals,
)

TOKEN_WORKLOADS = [name for name in WORKLOADS if name != "short_chat"]


def prompt_of(request: WorkloadRequest) -> list[int]:
    assert request.prompt_token_ids is not None, f"{request.request_id} has no prompt_token_ids"
    return request.prompt_token_ids


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_depends_on_its_arguments_alone(name: str) -> None:
    first = build_workload(name, num_requests=12, seed=3)
    assert first == build_workload(name, num_requests=12, seed=3), f"{name}: two calls with seed 3 differ"
    assert first != build_workload(name, num_requests=12, seed=4), f"{name}: seeds 3 and 4 give the same requests"


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_number_of_requests_and_their_unique_ids(name: str) -> None:
    ids = [request.request_id for request in build_workload(name, num_requests=45)]
    assert len(set(ids)) == 45, f"{name}: expected 45 different request ids, got {len(set(ids))}"


@pytest.mark.parametrize("name", TOKEN_WORKLOADS)
def test_token_ids_stay_in_their_range(name: str) -> None:
    used = {i for request in build_workload(name, first_id=10, vocab_size=20) for i in prompt_of(request)}
    assert used == set(range(10, 20)), f"{name}: expected ids 10..19, got {min(used)}..{max(used)} ({len(used)} ids)"
    default = [i for request in build_workload(name) for i in prompt_of(request)]
    assert min(default) >= DEFAULT_FIRST_ID, f"{name} uses id {min(default)}, where tokenizers keep special tokens"
    assert max(default) < DEFAULT_VOCAB_SIZE, f"{name} uses id {max(default)}, outside the tiny models' vocabulary"


def test_short_chat_asks_every_question_before_it_repeats_one() -> None:
    asked = [
        request.messages[0]["content"] for request in build_workload("short_chat", num_requests=50) if request.messages
    ]
    assert len(asked) == 50, "every request of short_chat is a chat"
    assert sorted(asked[: len(QUESTIONS)]) == sorted(QUESTIONS)
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 40, "a question appears twice in QUESTIONS"


def test_long_prompts_fill_their_range() -> None:
    lengths = [len(prompt_of(r)) for r in build_workload("long_prompts", num_requests=200)]
    assert 512 <= min(lengths) < 550 and 986 < max(lengths) <= 1024, f"lengths {min(lengths)}..{max(lengths)}"


def test_shared_prefix_shares_exactly_the_prefix() -> None:
    prompts = [prompt_of(r) for r in build_workload("shared_prefix", num_requests=8, prefix_tokens=40, suffix_tokens=9)]
    assert {len(prompt) for prompt in prompts} == {49}
    assert len({tuple(prompt[:40]) for prompt in prompts}) == 1, "the first 40 tokens must be the same in all requests"
    assert len({tuple(prompt[40:]) for prompt in prompts}) == 8, "what follows the prefix must differ"


def test_shared_prefixes_are_even_but_not_in_turn() -> None:
    requests = build_workload("shared_prefix", num_requests=32, num_prefixes=4, prefix_tokens=16)
    prefixes = [tuple(prompt_of(r)[:16]) for r in requests]
    assert sorted(Counter(prefixes).values()) == [8, 8, 8, 8]
    assert len(set(prefixes[::4])) > 1, "round robin over 4 replicas would send one prefix to each"


def test_heavy_tailed_has_a_tail() -> None:
    requests = build_workload("heavy_tailed", num_requests=1000)
    lengths = sorted(request.max_tokens for request in requests)
    assert all(request.ignore_eos for request in requests), "output lengths are exact only with ignore_eos"
    assert (lengths[0], lengths[-1]) == (4, 512), "of 1000 lengths some are clipped at either end"
    assert statistics.median(lengths) == pytest.approx(48, rel=0.15)
    assert lengths[900] / lengths[500] == pytest.approx(3.6, rel=0.2), "p90 / p50 of a log-normal with sigma 1 is 3.6"


def test_bursts_arrive_together() -> None:
    arrivals = [request.arrival_s for request in build_workload("bursts", num_requests=10, burst_size=4, gap_s=1.5)]
    assert arrivals == [0.0] * 4 + [1.5] * 4 + [3.0] * 2


def test_nano_vllm_is_the_published_benchmark() -> None:
    requests = build_workload("nano_vllm", first_id=0, vocab_size=10_001)
    assert len(requests) == 256
    assert sum(len(prompt_of(r)) for r in requests) == 142_827, "prompt tokens differ from nano-vllm's README"
    assert sum(r.max_tokens for r in requests) == 133_966, "output tokens differ from nano-vllm's README"
    assert prompt_of(requests[0])[:4] == [6311, 6890, 663, 4242], "token ids differ from nano-vllm's bench.py"
    assert {(r.arrival_s, r.ignore_eos, r.temperature) for r in requests} == {(0.0, True, 0.6)}


def test_nano_vllm_keeps_its_lengths_in_a_small_vocabulary() -> None:
    published, small = build_workload("nano_vllm", first_id=0, vocab_size=10_001), build_workload("nano_vllm")
    for request, other in zip(published, small, strict=True):
        assert (len(prompt_of(request)), request.max_tokens) == (len(prompt_of(other)), other.max_tokens)


def test_nano_vllm_cpu_is_small() -> None:
    requests = build_workload("nano_vllm_cpu")
    assert len(requests) == 32
    assert all(16 <= len(prompt_of(r)) <= 256 and 16 <= r.max_tokens <= 128 for r in requests)


def test_poisson_arrivals_have_exponential_gaps() -> None:
    arrivals = poisson_arrivals(4000, requests_per_s=5.0, seed=1)
    gaps = [later - earlier for earlier, later in zip(arrivals, arrivals[1:], strict=False)]
    assert min(gaps) >= 0, "arrivals must ascend"
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.1), "an exponential's deviation equals its mean"
    assert arrivals != poisson_arrivals(4000, requests_per_s=5.0, seed=2)


def test_a_request_rate_changes_the_arrivals_and_nothing_else() -> None:
    at_once, spaced = build_workload("nano_vllm_cpu"), build_workload("nano_vllm_cpu", request_rate=2.0)
    assert [request.arrival_s for request in spaced] == poisson_arrivals(32, 2.0, seed=0)
    assert with_arrivals(spaced, [0.0] * 32) == at_once


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("short_chats", {}, "'short_chats' does not exist; choose one of short_chat,"),
        (
            "short_chat",
            {"vocab_size": 100},
            "'short_chat' has no option vocab_size; it has num_requests, seed, max_tokens",
        ),
        ("bursts", {"request_rate": 0.0}, "requests_per_s=0.0 must be positive"),
    ],
)
def test_build_workload_refuses(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_workload(name, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one"),
        ({"prompt_token_ids": []}, "not empty"),
        ({"prompt_token_ids": [1], "messages": [{"role": "user", "content": "hi"}]}, "exactly one"),
        ({"prompt_token_ids": [1], "max_tokens": 0}, "max_tokens=0"),
        ({"prompt_token_ids": [1], "arrival_s": -1.0}, "arrival_s=-1.0"),
        ({"prompt_token_ids": [1], "cancel_after_chunks": -1}, "cancel_after_chunks=-1"),
    ],
)
def test_an_invalid_request_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"r7: .*{message}"):
        WorkloadRequest(**{"request_id": "r7", "arrival_s": 0.0, "max_tokens": 1, **fields})  # type: ignore[arg-type]


def test_a_request_is_frozen() -> None:
    (request,) = build_workload("short_chat", num_requests=1)
    with pytest.raises(FrozenInstanceError):
        request.max_tokens = 3  # type: ignore[misc]
