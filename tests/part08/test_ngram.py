"""core/ngram.py: the tokens that followed an earlier occurrence of the end of the text, found without a search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.sampling_params import SamplingParams
from part08_speculative_decoding.config import EngineConfig
from part08_speculative_decoding.core.ngram import NgramIndex
from part08_speculative_decoding.core.request import Request
from part08_speculative_decoding.core.speculation import Speculation

LESSON = 'README "Two proposers"'
LOOK_EXTEND = f"Look at core/ngram.py::NgramIndex.extend; {LESSON}."
LOOK_PROPOSE = f"Look at core/ngram.py::NgramIndex.propose; {LESSON}."
LOOK_LOOK_UP = f"Look at core/speculation.py::Speculation.look_up; {LESSON}."


def scan(token_ids: Sequence[int], min_n: int, max_n: int, num_tokens: int) -> list[int]:
    """The definition: the longest run at the end that occurred before, and the tokens after its first occurrence."""
    for n in range(min(max_n, len(token_ids)), min_n - 1, -1):
        run = list(token_ids[len(token_ids) - n :])
        for start in range(len(token_ids) - n):
            if list(token_ids[start : start + n]) == run:
                return list(token_ids[start + n : start + n + num_tokens])
    return []


def index_of(token_ids: Sequence[int], min_n: int, max_n: int) -> NgramIndex:
    index = NgramIndex(min_n, max_n)
    index.extend(token_ids)
    return index


def check(token_ids: Sequence[int], min_n: int, max_n: int, num_tokens: int, expected: list[int], why: str) -> None:
    got = index_of(token_ids, min_n, max_n).propose(num_tokens)
    assert got == expected, (
        f"text {list(token_ids)}, runs of {min_n} to {max_n} tokens, up to {num_tokens} draft tokens: expected "
        f"{expected} ({why}), got {got}. {LOOK_PROPOSE}"
    )


# What is recorded


def test_every_run_is_recorded_at_its_first_occurrence() -> None:
    index = index_of([5, 6, 5, 6, 7], 1, 2)
    expected = {(5,): 1, (6,): 2, (5, 6): 2, (6, 5): 3}
    assert index._next == expected, (
        f"text [5, 6, 5, 6, 7], runs of 1 and 2: expected {expected} (run: position of the token after its first "
        f"occurrence), got {index._next}. Nothing follows 7 and [6, 7] yet. {LOOK_EXTEND}"
    )
    assert index.token_ids == [5, 6, 5, 6, 7], f"the text itself: got {index.token_ids}. {LOOK_EXTEND}"


def test_a_text_may_arrive_in_pieces() -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 1, 2]
    whole = index_of(text, 1, 3)
    for size in (1, 2, 5):
        index = NgramIndex(1, 3)
        for start in range(0, len(text), size):
            index.extend(text[start : start + size])
        assert (index._next, index.token_ids) == (whole._next, whole.token_ids), (
            f"{text} in pieces of {size}: expected the runs of the whole, {whole._next}, got {index._next}. "
            f"{LOOK_EXTEND}"
        )


def test_runs_have_min_n_to_max_n_tokens() -> None:
    index = index_of(range(10), 2, 3)
    lengths = sorted({len(run) for run in index._next})
    assert lengths == [2, 3], f"min_n=2, max_n=3: expected runs of these lengths, got {lengths}. {LOOK_EXTEND}"


class CountingList(list):
    """Counts how many of its tokens are read."""

    num_read = 0

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        found = list.__getitem__(self, key)
        self.num_read += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        self.num_read += len(self)
        return list.__iter__(self)


@pytest.mark.parametrize("length", [50, 5_000])
def test_a_token_costs_the_same_in_a_long_text(length: int) -> None:
    index = index_of([number * 7 % 31 for number in range(length)], 2, 4)
    index.token_ids = CountingList(index.token_ids)
    index.extend([3])
    num_read = index.token_ids.num_read
    assert num_read <= 2 + 3 + 4, (
        f"text of {length} tokens, one more, runs of 2 to 4: expected at most 9 tokens read, got {num_read}. "
        f"Only the runs that end here are new. {LOOK_EXTEND}"
    )
    index.propose(5)
    num_read = index.token_ids.num_read - num_read
    assert num_read <= 4 + 3 + 2 + 5, (
        f"text of {length} tokens: a proposal read {num_read} of them, expected at most 14. It is a "
        f"dictionary lookup, not a search. {LOOK_PROPOSE}"
    )


# What is proposed


def test_examples() -> None:
    check([1, 2, 3, 4, 1, 2, 3], 2, 2, 3, [4, 1, 2], "what followed [2, 3]")
    check([1, 3, 6, 2, 3, 4, 1, 2, 3], 1, 1, 2, [6, 2], "the first 3 is followed by 6")
    text = [1, 2, 3, 100, 1, 2, 3, 200, 1, 2, 3, 300, 1, 2, 3]
    check(text, 3, 3, 2, [100, 1], "the first of three occurrences")
    check([1, 2, 3, 4, 5], 1, 3, 2, [], "no run occurred before")


def test_the_longest_run_wins_over_an_earlier_shorter_one() -> None:
    check([3, 9, 1, 2, 3, 7, 8, 1, 2, 3], 1, 3, 2, [7, 8], "[1, 2, 3] is longer than [3]")
    check([3, 9, 1, 2, 3, 7, 8, 5, 2, 3], 1, 3, 2, [7, 8], "[2, 3] occurred before, [5, 2, 3] did not")
    check([3, 9, 1, 2, 3, 7, 8, 5, 5, 3], 1, 3, 2, [9, 1], "only [3] occurred before")
    check([3, 9, 1, 2, 3, 7, 8, 5, 5, 3], 2, 3, 2, [], "[3] is too short, min_n is 2")


def test_the_end_of_the_text_is_not_an_earlier_occurrence() -> None:
    check([7, 8], 1, 2, 3, [], "nothing follows 8")
    check([7, 7], 1, 2, 3, [7], "the first 7 is followed by the second, and then the text ends")
    check([4, 4, 4, 4], 1, 2, 9, [4, 4], "the first [4, 4] is followed by two tokens")
    check([], 1, 2, 3, [], "the text is empty")
    check([7], 2, 3, 3, [], "the text is shorter than any run")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    text=st.lists(st.integers(0, 3), max_size=40), min_n=st.integers(1, 3), more=st.integers(0, 3),
    num_tokens=st.integers(1, 6), cut=st.integers(0, 40),
)  # fmt: skip
def test_random_texts(text: list[int], min_n: int, more: int, num_tokens: int, cut: int) -> None:
    index = NgramIndex(min_n, min_n + more)
    index.extend(text[:cut])
    index.propose(num_tokens)
    index.extend(text[cut:])
    expected, got = scan(text, min_n, min_n + more, num_tokens), index.propose(num_tokens)
    assert got == expected, (
        f"text {text}, runs of {min_n} to {min_n + more}, up to {num_tokens} draft tokens: a scan of the whole "
        f"text finds {expected}, the index {got}. {LOOK_PROPOSE}"
    )


# Speculation.look_up


def speculation_of(min_n: int = 1, max_n: int = 2, num_tokens: int = 3) -> Speculation:
    config = EngineConfig(
        device="cpu", speculative_method="ngram", prompt_lookup_min=min_n, prompt_lookup_max=max_n,
        num_speculative_tokens=num_tokens,
    )  # fmt: skip
    return Speculation(config)


def request_of(name: str, prompt: list[int]) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=50), 100)


def check_look_up(speculation: Speculation, request: Request, expected: list[int], why: str) -> None:
    got = speculation.look_up(request, 1)
    assert got == expected, (
        f"request {request.request_id}, tokens {request.token_ids}: expected draft tokens {expected} ({why}), got "
        f"{got}. {LOOK_LOOK_UP}"
    )


def test_it_follows_requests_that_grow() -> None:
    speculation, one, two = speculation_of(1, 3), request_of("1", [1, 2, 3, 1, 2]), request_of("2", [9, 8, 9])
    check_look_up(speculation, one, [3, 1, 2], "after the first [1, 2]")
    check_look_up(speculation, two, [8, 9], "after the first [9]")
    one.output_token_ids += [4, 1, 2]  # the draft tokens were wrong
    two.output_token_ids += [8]
    check_look_up(speculation, two, [9, 8], "after the first [9, 8]: it is followed by 9 now")
    check_look_up(speculation, one, [3, 1, 2], "after the first [1, 2]")
    one.output_token_ids += [5]
    check_look_up(speculation, one, [], "5 is new, and earlier draft tokens are not offered again")
    assert one.ngram_index is not None and one.ngram_index.token_ids == one.token_ids, (
        f"expected each token once, {one.token_ids}, got {one.ngram_index}. {LOOK_LOOK_UP}"
    )


def test_each_request_has_its_own_index() -> None:
    speculation, one, two = speculation_of(), request_of("1", [1, 2, 1]), request_of("2", [3, 1])
    check_look_up(speculation, one, [2, 1], "after the first [1]")
    check_look_up(speculation, two, [], "1 is new in this text")


def test_it_reads_only_new_tokens() -> None:
    asked = list[tuple[int, int]]()

    class Watched(Request):
        def tokens_between(self, start: int, end: int) -> list[int]:
            asked.append((start, end))
            return super().tokens_between(start, end)

    speculation, request = speculation_of(), Watched("1", [1, 2, 1], SamplingParams(), 100)
    speculation.look_up(request, 1)
    request.output_token_ids += [2, 2]
    speculation.look_up(request, 1)
    speculation.look_up(request, 1)
    read = [token for start, end in asked for token in range(start, end)]
    assert read == list(range(5)), (
        f"3 tokens, then 2 more, then none: expected each token to be read once, got reads of {asked}. {LOOK_LOOK_UP}"
    )


def test_looking_twice_changes_nothing() -> None:
    """The scheduler looks before it decides whether to run ahead, and again when it schedules the request."""
    speculation, request = speculation_of(), request_of("1", [1, 2, 1])
    for _ in range(3):
        check_look_up(speculation, request, [2, 1], "after the first [1]")
    assert request.acceptance == 1.0 and speculation.stats.num_drafts == 0, (
        f"a lookup is not a verification, got {request.acceptance}, {speculation.stats}. {LOOK_LOOK_UP}"
    )


def test_tokens_in_flight_are_not_looked_up() -> None:
    """They are placeholders: their ids are unknown."""
    speculation, request = speculation_of(), request_of("1", [1, 2, 1])
    request.num_output_placeholders = 1
    check_look_up(speculation, request, [2, 1], "only known tokens count")


@pytest.mark.parametrize(
    ("flags", "num_running", "acceptance"),
    [
        ({"speculative_method": "none"}, 1, 1.0),
        ({"speculative_method": "draft_model"}, 1, 1.0),
        ({"speculative_max_num_seqs": 2}, 3, 1.0),
        ({}, 1, 0.1),
    ],
    ids=str,
)
def test_no_index_is_built_for_a_request_without_draft_tokens(
    flags: dict[str, Any], num_running: int, acceptance: float
) -> None:
    config = EngineConfig(**{"device": "cpu", "speculative_method": "ngram", "prompt_lookup_min": 1, **flags})
    speculation, request = Speculation(config), request_of("1", [1, 2, 1])
    request.acceptance, request.output_token_ids = acceptance, [2]
    got = speculation.look_up(request, num_running), request.ngram_index
    assert got == ([], None), (
        f"{flags}, {num_running} running, acceptance {acceptance}: expected no draft tokens, and no index built, got "
        f"{got}. {LOOK_LOOK_UP}"
    )
