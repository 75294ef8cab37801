"""router/prefix_index.py: which replica has seen which beginning of a prompt."""

from __future__ import annotations

import random

import pytest

from part10_data_parallelism.router.prefix_index import CHUNK_CHARS, PrefixIndex, hash_chunks
from part10_data_parallelism.router.replica import Replica
from tests.part10.scripted import replicas_with, text_of

LOOK = 'Look at router/prefix_index.py::PrefixIndex.insert; README "Prefix affinity against load".'
LOOK_MATCH = 'Look at router/prefix_index.py::PrefixIndex.match; README "Prefix affinity against load".'
LOOK_REMOVE = 'Look at router/prefix_index.py::PrefixIndex.remove; README "Prefix affinity against load".'


def insert(index: PrefixIndex, text: str, replica: Replica) -> None:
    """PrefixIndex.insert, and then what it has noted must agree."""
    num_chunks = len(list(hash_chunks(text)))
    what = f"insert() of {num_chunks} chunks for {replica.url}"
    try:
        index.insert(text, replica)
    except LookupError as error:
        pytest.fail(f"{what} fails with {error!r}. {LOOK}")
    check_index(index, what, LOOK)


def check_index(index: PrefixIndex, what: str, look: str) -> None:
    """Both dicts hold the same pairs of a chunk and a replica, and not too many."""
    for replica, chunks in index.chunks.items():
        assert len(chunks) <= index.max_chunks, (
            f"{what}: {len(chunks)} chunks of {replica.url} are remembered, expected at most {index.max_chunks}. {look}"
        )
    pairs = {(chunk, replica) for replica, chunks in index.chunks.items() for chunk in chunks}
    held = {(chunk, replica) for chunk, replicas in index.holders.items() for replica in replicas}
    assert held <= pairs, (
        f"{what}: {len(held - pairs)} of {len(held)} entries in self.holders name a replica that does not have the "
        f"chunk in its `chunks`: a chunk must be entered in both, and leave both. {look}"
    )
    assert pairs <= held, (
        f"{what}: self.holders lacks {len(pairs - held)} of the {len(pairs)} chunks that the replicas have in their "
        f"`chunks`: a chunk must be entered in both, and what one replica forgets must not affect the others. {look}"
    )
    assert all(index.holders.values()), f"{what}: self.holders has chunks that no replica has. {look}"


def num_chunks_known(index: PrefixIndex, text: str, *replicas: Replica) -> int:
    return index.match(text, replicas)[1] // CHUNK_CHARS


def test_what_was_inserted_is_found() -> None:
    index, (first, second) = PrefixIndex(10_000), replicas_with(0, 0)
    common, tail = text_of(0, 3), text_of(1, 2)
    insert(index, common, first)
    insert(index, common + tail, second)
    for text, holders, num_chars in (
        (common + tail, [second], 5 * CHUNK_CHARS),
        (common + text_of(2, 4), [first, second], 3 * CHUNK_CHARS),
        (text_of(3, 2), [first, second], 0),
        (common[: CHUNK_CHARS + 5], [first, second], CHUNK_CHARS),
    ):
        got, got_chars = index.match(text, [first, second])
        assert (got, got_chars) == (holders, num_chars), (
            f"a text of {len(text)} characters: expected {len(holders)} replicas that have {num_chars} of them, got "
            f"{len(got)} that have {got_chars}. {LOOK}"
        )


def test_memory_is_bounded_and_ends_are_forgotten_first() -> None:
    index, (replica,) = PrefixIndex(8 * CHUNK_CHARS), replicas_with(0)
    old, new = text_of(0, 5), text_of(1, 6)
    insert(index, old, replica)
    insert(index, new, replica)
    num_kept = len(index.chunks[replica])
    assert num_kept == 8, f"5 and 6 chunks, room for 8: expected 8 to be remembered, got {num_kept}. {LOOK}"
    got = [num_chunks_known(index, text, replica) for text in (old, new)]
    assert got == [2, 6], (
        f"texts of 5 and 6 chunks, room for 8: expected the first 2 of the old one and all 6 of the new one to be "
        f"found, got {got}. A chunk cannot be found without all those before it, so the end of a text must be "
        f"forgotten before its beginning. {LOOK}"
    )


def test_a_text_longer_than_the_memory_keeps_its_beginning() -> None:
    index, (replica,) = PrefixIndex(4 * CHUNK_CHARS), replicas_with(0)
    insert(index, text_of(0, 9), replica)
    got = num_chunks_known(index, text_of(0, 9), replica)
    assert got == 4, f"a text of 9 chunks, room for 4: expected its first 4 to be found, got {got}. {LOOK}"


def test_what_is_used_again_is_kept() -> None:
    """A system prompt of 3 chunks, each time with another end of 2, and room for 8."""
    index, (replica,) = PrefixIndex(8 * CHUNK_CHARS), replicas_with(0)
    system_prompt = text_of(0, 3)
    for number in range(1, 10):
        insert(index, system_prompt + text_of(number, 2), replica)
        got = num_chunks_known(index, system_prompt, replica)
        assert got == 3, (
            f"text {number} begins with the same 3 chunks as all before it: expected them to be found, got {got}. "
            f"Chunks that are used again are the latest used. {LOOK}"
        )


def test_one_replica_keeps_what_another_one_forgets() -> None:
    index, (first, second) = PrefixIndex(4 * CHUNK_CHARS), replicas_with(0, 0)
    old, new = text_of(0, 4), text_of(1, 4)
    insert(index, old, first)
    insert(index, old, second)
    index.insert(new, first)
    got = num_chunks_known(index, old, second)
    assert got == 4, (
        f"both replicas have a text of 4 chunks, and the first one forgets it for a new text: expected all 4 to be "
        f"found at the second one, got {got}. {LOOK}"
    )
    got = num_chunks_known(index, old, first)
    assert got == 0, f"the first replica has forgotten the old text: expected 0 chunks to be found, got {got}. {LOOK}"
    check_index(index, "after insert() of a new text for the first replica", LOOK)


def test_only_replicas_that_are_available_count() -> None:
    index, (first, second) = PrefixIndex(10_000), replicas_with(0, 0)
    insert(index, text_of(0, 3), first)
    got = index.match(text_of(0, 3), [second])
    assert got == ([second], 0), f"the replica that has the text is not asked about: got {got}. {LOOK_MATCH}"


def test_equal_chunks_after_different_beginnings_are_different() -> None:
    index, (replica,) = PrefixIndex(10_000), replicas_with(0)
    insert(index, text_of(0, 1) + text_of(9, 1), replica)
    got = num_chunks_known(index, text_of(1, 1) + text_of(9, 1), replica)
    assert got == 0, f"only the second chunk is equal: expected 0 to be found, got {got}. {LOOK_MATCH}"


def test_a_removed_replica_leaves_nothing() -> None:
    index, (first, second) = PrefixIndex(10_000), replicas_with(0, 0)
    for replica in (first, second):
        insert(index, text_of(0, 3), replica)
    index.remove(first)
    got = index.match(text_of(0, 3), [first, second])
    assert got == ([second], 3 * CHUNK_CHARS), f"the first replica was removed: got {got}. {LOOK_REMOVE}"
    index.remove(second)
    assert not index.holders and not index.chunks, (
        f"both were removed: {len(index.holders)} chunks and {len(index.chunks)} replicas are left. {LOOK_REMOVE}"
    )


def test_random_lives_of_the_index_add_up() -> None:
    """match() says what can be read off the chunks of each replica, which are those used last."""
    rng, index = random.Random(0), PrefixIndex(40 * CHUNK_CHARS)
    replicas = replicas_with(0, 0, 0)
    for _ in range(1_000):
        text = text_of(rng.randrange(6), rng.randint(0, 4)) + text_of(rng.randrange(100), rng.randint(0, 5))
        if rng.random() < 0.02:
            index.remove(rng.choice(replicas))
            check_index(index, "after remove()", LOOK_REMOVE)
        elif rng.random() < 0.5:
            replica, hashes = rng.choice(replicas), list(hash_chunks(text))
            insert(index, text, replica)
            latest = list(index.chunks[replica])[-len(hashes) :] if hashes else []
            assert latest == hashes[::-1], (
                f"insert() of {len(hashes)} chunks: expected them to be the latest used, the beginning of the text "
                f"last of all. {LOOK}"
            )
        holders, num_chars = index.match(text, replicas)
        known = [_num_known(index, replica, text) for replica in replicas]
        expected = [replica for replica, chars in zip(replicas, known, strict=True) if chars == max(known)]
        assert (holders, num_chars) == (expected, max(known)), (
            f"the replicas have {known} characters of a text: expected the {len(expected)} that have {max(known)}, got "
            f"{len(holders)} that have {num_chars}. {LOOK_MATCH}"
        )


def _num_known(index: PrefixIndex, replica: Replica, text: str) -> int:
    number = 0
    for chunk in hash_chunks(text):
        if chunk not in index.chunks.get(replica, ()):
            break
        number += 1
    return min(number * CHUNK_CHARS, len(text))
