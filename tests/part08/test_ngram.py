"""core/ngram.py: what followed the first time that the text ended like this, found without a search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.sampling_params import SamplingParams
from part08_speculative_decoding.core.block_manager import BlockManager
from part08_speculative_decoding.core.ngram import NgramIndex, NgramProposer
from part08_speculative_decoding.core.request import Request

LESSON = 'README "Two proposers"'
LOOK_EXTEND = f"Look at core/ngram.py::NgramIndex.extend; {LESSON}."
LOOK_PROPOSE = f"Look at core/ngram.py::NgramIndex.propose; {LESSON}."
LOOK_PROPOSER = f"Look at core/ngram.py::NgramProposer.propose; {LESSON}."
LOOK_RELEASE = f"Look at core/ngram.py::NgramProposer.release; {LESSON}."
BLOCKS = BlockManager(2, 16)


def scan(token_ids: Sequence[int], min_n: int, max_n: int, num_tokens: int) -> list[int]:
    """The definition: the longest run at the end that was there before, the first place where it was."""
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
        f"text {list(token_ids)}, runs of {min_n} to {max_n} tokens, {num_tokens} wanted: expected {expected} ({why}), "
        f"got {got}. {LOOK_PROPOSE}"
    )


# What was noted


def test_every_run_is_noted_where_it_was_first_followed() -> None:
    index = index_of([5, 6, 5, 6, 7], 1, 2)
    expected = {(5,): 1, (6,): 2, (5, 6): 2, (6, 5): 3}
    assert index._next == expected, (
        f"text [5, 6, 5, 6, 7], runs of 1 and 2: expected {expected} (run: place of what followed first), got "
        f"{index._next}. 7 and [6, 7] were followed by nothing yet. {LOOK_EXTEND}"
    )
    assert index.token_ids == [5, 6, 5, 6, 7], f"the text itself: got {index.token_ids}. {LOOK_EXTEND}"


def test_a_text_may_come_in_pieces() -> None:
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


def test_runs_are_as_long_as_they_may_be_and_no_longer() -> None:
    index = index_of(range(10), 2, 3)
    lengths = sorted({len(run) for run in index._next})
    assert lengths == [2, 3], f"min_n=2, max_n=3: expected runs of these lengths, got {lengths}. {LOOK_EXTEND}"


class CountingList(list):
    """Counts how many tokens are read out of it."""

    num_read = 0

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        found = list.__getitem__(self, key)
        self.num_read += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        self.num_read += len(self)
        return list.__iter__(self)


@pytest.mark.parametrize("length", [50, 5_000])
def test_a_token_costs_the_same_however_long_the_text_is(length: int) -> None:
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
        f"text of {length} tokens: a proposal read {num_read} of them, expected at most 14. It looks up, it does not "
        f"search. {LOOK_PROPOSE}"
    )


# What is proposed


def test_the_rules_examples() -> None:
    check([1, 2, 3, 4, 1, 2, 3], 2, 2, 3, [4, 1, 2], "what followed [2, 3]")
    check([1, 3, 6, 2, 3, 4, 1, 2, 3], 1, 1, 2, [6, 2], "the first 3 is followed by 6")
    text = [1, 2, 3, 100, 1, 2, 3, 200, 1, 2, 3, 300, 1, 2, 3]
    check(text, 3, 3, 2, [100, 1], "the leftmost of three places")
    check([1, 2, 3, 4, 5], 1, 3, 2, [], "nothing was there before")


def test_the_longest_run_counts_even_if_a_shorter_one_was_there_earlier() -> None:
    check([3, 9, 1, 2, 3, 7, 8, 1, 2, 3], 1, 3, 2, [7, 8], "[1, 2, 3] tells more than [3]")
    check([3, 9, 1, 2, 3, 7, 8, 5, 2, 3], 1, 3, 2, [7, 8], "[2, 3] was there, [5, 2, 3] was not")
    check([3, 9, 1, 2, 3, 7, 8, 5, 5, 3], 1, 3, 2, [9, 1], "only [3] was there")
    check([3, 9, 1, 2, 3, 7, 8, 5, 5, 3], 2, 3, 2, [], "[3] is too short, min_n is 2")


def test_the_end_of_the_text_is_no_earlier_place() -> None:
    check([7, 8], 1, 2, 3, [], "8 was not followed by anything")
    check([7, 7], 1, 2, 3, [7], "the first 7 was followed by the second, and then the text ends")
    check([4, 4, 4, 4], 1, 2, 9, [4, 4], "[4, 4] was first followed at 2; two tokens are there")
    check([], 1, 2, 3, [], "there is no text")
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
        f"text {text}, runs of {min_n} to {min_n + more}, {num_tokens} wanted: a scan of the whole text finds "
        f"{expected}, the index {got}. {LOOK_PROPOSE}"
    )


# The proposer


def request_of(name: str, prompt: list[int], output: Sequence[int] = ()) -> Request:
    request = Request(name, prompt, SamplingParams(max_tokens=50), 100)
    request.output_token_ids += output
    return request


def test_it_follows_requests_that_grow() -> None:
    proposer = NgramProposer(1, 3)
    one, two = request_of("1", [1, 2, 3, 1, 2]), request_of("2", [9, 8, 9])
    proposer.propose([one, two], [2, 4], BLOCKS)
    got = (one.draft_token_ids, two.draft_token_ids)
    assert got == ([3, 1], [8, 9]), (
        f"[1, 2, 3, 1, 2] and [9, 8, 9]: expected ([3, 1], [8, 9]), got {got}. {LOOK_PROPOSER}"
    )
    one.output_token_ids += [4, 1, 2]  # the guess was wrong
    two.output_token_ids += [8]
    proposer.propose([two, one], [1, 3], BLOCKS)
    got = (one.draft_token_ids, two.draft_token_ids)
    assert got == ([3, 1, 2], [9]), f"both have grown: expected ([3, 1, 2], [9]), got {got}. {LOOK_PROPOSER}"
    one.output_token_ids += [5]
    proposer.propose([one], [3], BLOCKS)
    assert one.draft_token_ids == [], (
        f"5 is new: expected no guesses, and not those of before, got {one.draft_token_ids}. {LOOK_PROPOSER}"
    )
    known = proposer._indexes["1"].token_ids
    assert known == one.token_ids, f"expected each token once, {one.token_ids}, got {known}. {LOOK_PROPOSER}"


def test_a_request_s_text_is_its_own() -> None:
    proposer = NgramProposer(1, 2)
    one, two = request_of("1", [1, 2, 1]), request_of("2", [3, 1])
    proposer.propose([one, two], [2, 2], BLOCKS)
    assert two.draft_token_ids == [], f"1 is new in its text: expected [], got {two.draft_token_ids}. {LOOK_PROPOSER}"


def test_it_reads_only_what_is_new() -> None:
    proposer, request = NgramProposer(1, 2), request_of("1", [1, 2, 1])
    asked = list[tuple[int, int]]()

    class Watched(Request):
        def tokens_between(self, start: int, end: int) -> list[int]:
            asked.append((start, end))
            return super().tokens_between(start, end)

    request = Watched("1", [1, 2, 1], SamplingParams(), 100)
    proposer.propose([request], [2], BLOCKS)
    request.output_token_ids += [2, 2]
    proposer.propose([request], [2], BLOCKS)
    assert asked == [(0, 3), (3, 5)], (
        f"3 tokens, then 2 more: expected (0, 3) and (3, 5) read, got {asked}. {LOOK_PROPOSER}"
    )


def test_who_is_released_is_forgotten_and_may_return() -> None:
    proposer, request = NgramProposer(1, 2), request_of("1", [1, 2, 1])
    proposer.propose([request], [2], BLOCKS)
    proposer.release(["1", "nobody"])
    assert proposer._indexes == {}, f"expected nothing left, got {proposer._indexes}. {LOOK_RELEASE}"
    request.output_token_ids += [7, 2]
    proposer.propose([request], [2], BLOCKS)
    assert request.draft_token_ids == [1, 7], (
        f"preempted and back, [1, 2, 1, 7, 2]: expected [1, 7], got {request.draft_token_ids}. {LOOK_RELEASE}"
    )
    proposer.release(["1"])
    other = request_of("1", [5, 6, 5])  # another request with the id of one that has ended
    proposer.propose([other], [2], BLOCKS)
    assert other.draft_token_ids == [6, 5], f"expected [6, 5], got {other.draft_token_ids}. {LOOK_RELEASE}"
