"""core/block_manager.py: what is in a block has a name, may be in many tables, and stays until the block is needed."""

from __future__ import annotations

from itertools import islice
from typing import Any
from unittest import mock

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from part07_prefix_caching.core import block_manager
from part07_prefix_caching.core.block_manager import BlockManager, RegisteredBlock, hash_block
from part07_prefix_caching.core.free_queue import KVBlock
from part07_prefix_caching.core.request import Request
from tests.lives import run_lives
from tests.part07.scripted import check_blocks
from tests.scripted import params_for

LOOK_FIND = 'Look at core/block_manager.py::BlockManager.find_cached; README "A block\'s name".'
LOOK_HASH = 'Look at core/block_manager.py::BlockManager.hash_blocks and hash_block; README "A block\'s name".'
LOOK_NEEDED = 'Look at core/block_manager.py::BlockManager.num_blocks_needed; README "Free, and still there".'
LOOK_ALLOCATE = 'Look at core/block_manager.py::BlockManager.allocate; README "Free, and still there".'
LOOK_REGISTER = 'Look at core/block_manager.py::BlockManager.register; README "When a name is given".'
LOOK_FREE = 'Look at core/block_manager.py::BlockManager.free; README "Free, and still there".'
LOOK_FORGET = 'Look at core/block_manager.py::BlockManager.forget; README "When a name is given".'
LOOK_RESET = 'Look at core/block_manager.py::BlockManager.reset; README "What a client sees".'
COMMON = list(range(100, 148))  # 48 tokens: three blocks of 16


def request_of(name: str, tokens: list[int], salt: str | None = None) -> Request:
    return Request(name, list(tokens), params_for(50, cache_salt=salt), len(tokens) + 50)


def pool(num_usable: int, block_size: int = 16, **flags: Any) -> BlockManager:
    """A pool with num_usable blocks to hand out, and the null block."""
    return BlockManager(num_usable + 1, block_size, **flags)


def found(blocks: BlockManager, request: Request) -> list[int]:
    return [block.block_id for block in blocks.find_cached(request)]


def allocate(blocks: BlockManager, name: str, num_tokens: int, cached: list[KVBlock] | None = None) -> bool:
    """BlockManager.allocate; one that runs into an assertion half-way says so."""
    free = [block.block_id for block in islice(blocks.free_queue, blocks.num_blocks)]
    try:
        return blocks.allocate(name, num_tokens, cached or [])
    except AssertionError as error:
        found_ids = [block.block_id for block in cached or []]
        pytest.fail(
            f"request {name}: {num_tokens} tokens (block_size={blocks.block_size}), found {found_ids}, free {free}: "
            f"allocate() fails half-way with {str(error)!r}. {LOOK_ALLOCATE}"
        )


def admit(blocks: BlockManager, name: str, tokens: list[int], salt: str | None = None) -> tuple[Request, int]:
    """Look, allocate, compute all, register. Returns the request and how many of its tokens were found."""
    request = request_of(name, tokens, salt)
    cached = blocks.find_cached(request)
    is_allocated = allocate(blocks, name, len(tokens), cached)
    assert is_allocated, (
        f"request {name}: {len(tokens)} tokens, {len(cached)} blocks found, {blocks.num_free_blocks} blocks are free: "
        f"expected them to suffice. {LOOK_ALLOCATE}"
    )
    blocks.register(request, len(tokens))
    return request, len(cached) * blocks.block_size


def check_free(blocks: BlockManager, expected: list[int], what: str, look: str = LOOK_FREE) -> None:
    got = [block.block_id for block in islice(blocks.free_queue, blocks.num_blocks)]
    assert got == expected, (
        f"{what}: the free blocks, from the one that is used next, are {got}, expected {expected}. {look}"
    )


def check_table(blocks: BlockManager, name: str, expected: list[int], look: str = LOOK_ALLOCATE) -> None:
    got = blocks.block_tables.get(name)
    assert got == expected, f"request {name}: expected the table {expected}, got {got}. {look}"


def check_names(blocks: BlockManager, expected: list[int], what: str, look: str = LOOK_REGISTER) -> None:
    """expected: the blocks that can be found."""
    got = sorted(block.block_id for block in blocks.cached_blocks.values())
    assert got == expected, f"{what}: expected blocks {expected} to be findable, got {got}. {look}"


# The scenario of the lesson


def test_two_prompts_with_48_tokens_in_common() -> None:
    """Blocks of 16, ten to hand out. A has 48 + 7 tokens, B the same 48 + 5."""
    blocks = pool(10)
    admit(blocks, "A", COMMON + [1] * 7)
    check_table(blocks, "A", [1, 2, 3, 4])
    check_names(blocks, [1, 2, 3], "A fills three blocks and a bit")
    _, num_hit = admit(blocks, "B", COMMON + [2] * 5)
    assert num_hit == 48, f"B begins with the same 48 tokens: expected a hit of 48, got {num_hit}. {LOOK_FIND}"
    check_table(blocks, "B", [1, 2, 3, 5])
    counts = [blocks.pool[block_id].ref_count for block_id in range(1, 6)]
    assert counts == [2, 2, 2, 1, 1], (
        f"blocks 1 to 5: expected ref_count [2, 2, 2, 1, 1], got {counts}. {LOOK_ALLOCATE}"
    )
    assert blocks.num_free_blocks == 5, f"5 of 10 blocks are used, {blocks.num_free_blocks} are free. {LOOK_ALLOCATE}"
    blocks.free("A")
    check_free(blocks, [4, 6, 7, 8, 9, 10], "A is done, B holds 1 to 3")
    blocks.free("B")
    check_free(blocks, [5, 4, 6, 7, 8, 9, 10, 3, 2, 1], "A and B are done: unnamed first, then the ends of beginnings")
    check_names(blocks, [1, 2, 3], "all are free, and three are still there", LOOK_FREE)


# find_cached


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(1, 0), (15, 0), (16, 0), (17, 16), (31, 16), (32, 16), (33, 32), (48, 32), (49, 48)]
)
def test_the_same_prompt_twice(num_tokens: int, expected: int) -> None:
    """One token at least is left: the answer's first token is sampled from its logits."""
    blocks = pool(20)
    prompt = list(range(num_tokens))
    admit(blocks, "first", prompt)
    _, num_hit = admit(blocks, "second", prompt)
    assert num_hit == expected, (
        f"the same {num_tokens} tokens twice, block_size=16: expected {expected} of them to be found, got {num_hit}. "
        f"{LOOK_FIND}"
    )
    blocks.free("first")
    blocks.free("second")
    _, num_hit = admit(blocks, "third", prompt)
    assert num_hit == expected, f"and when nobody holds them any more: expected {expected}, got {num_hit}. {LOOK_FIND}"


def test_a_longer_and_a_shorter_prompt() -> None:
    blocks = pool(20, block_size=4)
    admit(blocks, "a", list(range(13)))
    for length, expected in ((3, 0), (4, 0), (5, 4), (12, 8), (13, 12), (30, 12)):
        got = len(blocks.find_cached(request_of("b", list(range(length))))) * 4
        assert got == expected, (
            f"13 tokens are there, {length} are asked for: expected {expected}, got {got}. {LOOK_FIND}"
        )


def test_salts() -> None:
    blocks = pool(30)
    cases = [("1", None, 0), ("2", "a", 0), ("3", "a", 32), ("4", "b", 0), ("5", None, 32), ("6", "b", 32)]
    for name, salt, expected in cases:
        _, got = admit(blocks, name, list(range(33)), salt)
        assert got == expected, (
            f"request {name} of {[case[:2] for case in cases]}, all of the same tokens: salt {salt!r} finds {got}, "
            f"expected {expected}. {LOOK_HASH}"
        )


@pytest.mark.parametrize(("position", "expected"), [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (11, 8), (12, 12)])
def test_a_token_that_differs(position: int, expected: int) -> None:
    """A name stands for all tokens up to there, so nothing is found from the block of the first difference on."""
    blocks = pool(20, block_size=4)
    admit(blocks, "a", list(range(16)))
    tokens = list(range(16))
    tokens[position] = 99
    got = len(blocks.find_cached(request_of("b", tokens))) * 4
    assert got == expected, (
        f"token {position} of 16 differs, block_size=4: expected {expected} found, got {got}. {LOOK_HASH}"
    )


def test_the_same_block_after_another_beginning_is_another_block() -> None:
    blocks = pool(20, block_size=4)
    admit(blocks, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    for tokens in ([5, 6, 7, 8, 9], [0, 0, 0, 0, 5, 6, 7, 8, 9], [1, 2, 3, 5, 4, 6, 7, 8, 9]):
        got = found(blocks, request_of("b", tokens))
        assert got == [], f"1 to 9 are there, {tokens} begin otherwise: expected nothing found, got {got}. {LOOK_HASH}"


def test_large_and_small_token_ids_are_not_mixed_up() -> None:
    names = {
        hash_block(b"parent", tokens) for tokens in ([1, 0], [256, 0], [0, 1], [65_536, 0], [1, 0, 0], [150_000, 1])
    }
    assert len(names) == 6, f"six blocks of different tokens have {len(names)} names. {LOOK_HASH}"


def test_the_first_miss_ends_it() -> None:
    """A later block is no use without those before it."""
    blocks = pool(20, block_size=4)
    request, _ = admit(blocks, "a", list(range(17)))
    missing = blocks.pool[blocks.block_tables["a"][1]]
    del blocks.cached_blocks[request.block_hashes[1]]
    missing.block_hash = None
    got = found(blocks, request_of("b", list(range(17))))
    assert got == [1], f"of blocks [1, 2, 3, 4], 2 has been forgotten: expected [1] to be found, got {got}. {LOOK_FIND}"


def test_to_look_changes_nothing() -> None:
    blocks = pool(6, block_size=4)
    admit(blocks, "a", list(range(9)))
    blocks.free("a")
    before = [block.block_id for block in blocks.free_queue]
    request = request_of("b", list(range(9)))
    for _ in range(3):
        got = found(blocks, request)
        assert got == [1, 2], f"expected blocks [1, 2] to be found, got {got}. {LOOK_FIND}"
    check_free(blocks, before, "find_cached() was called, and nothing allocated", LOOK_FIND)
    assert "b" not in blocks.block_tables, f"to look is not to take: {blocks.block_tables}. {LOOK_FIND}"


def test_two_managers_have_names_of_their_own() -> None:
    """Else somebody outside could prepare two texts with one name."""
    first, second = pool(4, block_size=4), pool(4, block_size=4)
    names = [manager.hash_blocks(request_of("a", list(range(8)))) for manager in (first, second)]
    assert set(names[0]).isdisjoint(names[1]), f"two managers gave the same names: {names}. {LOOK_HASH}"
    salted = [manager.hash_blocks(request_of("a", list(range(8)), "s")) for manager in (first, second)]
    assert set(salted[0]).isdisjoint(salted[1]), f"two managers gave the same names under a salt: {salted}. {LOOK_HASH}"
    again = first.hash_blocks(request_of("b", list(range(8))))
    assert again == names[0], f"one manager gave the same tokens two names: {names[0]}, {again}. {LOOK_HASH}"


def test_names_are_given_once_and_go_on_with_the_answer() -> None:
    blocks = pool(8, block_size=4)
    request = request_of("a", list(range(9)))
    calls = list[list[int]]()

    def counted(parent: bytes, token_ids: list[int]) -> bytes:
        calls.append(list(token_ids))
        return hash_block(parent, token_ids)

    with mock.patch.object(block_manager, "hash_block", counted):
        first = list(blocks.hash_blocks(request))
        assert calls == [[0, 1, 2, 3], [4, 5, 6, 7]], f"9 tokens, block_size=4: hashed {calls}. {LOOK_HASH}"
        for token_id in range(9, 17):
            request.output_token_ids.append(token_id)
            blocks.hash_blocks(request)
        expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
        assert calls == expected, (
            f"8 tokens were generated: expected each block hashed once, {expected}, got {calls}. {LOOK_HASH}"
        )
    assert request.block_hashes[:2] == first, f"names that were given have changed. {LOOK_HASH}"
    whole = blocks.hash_blocks(request_of("b", list(range(17))))
    assert request.block_hashes == whole, (
        f"prompt and answer have other names than a prompt of the same tokens: {request.block_hashes}, {whole}. "
        f"{LOOK_HASH}"
    )


@pytest.mark.parametrize(("start", "end"), [(0, 3), (0, 5), (0, 8), (3, 5), (5, 8), (6, 8), (4, 6), (5, 5), (2, 2)])
def test_tokens_between(start: int, end: int) -> None:
    request = request_of("a", list(range(5)))
    request.output_token_ids += [5, 6, 7]
    got = request.tokens_between(start, end)
    assert got == list(range(start, end)), (
        f"5 tokens and 3 more, those from {start} to {end}: got {got}. Look at core/request.py::Request.tokens_between; "  # noqa: E501
        'README "A block\'s name".'
    )


# num_blocks_needed


def test_what_a_request_takes_of_the_free_ones() -> None:
    blocks = pool(20, block_size=4)
    admit(blocks, "a", list(range(13)))  # blocks 1 to 4, three of them named
    cases = [(1, 0, 1), (4, 0, 1), (5, 0, 2), (14, 0, 4), (13, 3, 1), (14, 2, 2), (30, 3, 5)]
    for num_tokens, num_found, expected in cases:
        cached = [blocks.pool[block_id] for block_id in range(1, num_found + 1)]
        got = blocks.num_blocks_needed(num_tokens, cached)
        assert got == expected, (
            f"{num_tokens} tokens, block_size=4, {num_found} blocks found that somebody owns: expected {expected}, got "
            f"{got}. {LOOK_NEEDED}"
        )
    blocks.free("a")
    for num_tokens, num_found, _ in cases:
        cached = [blocks.pool[block_id] for block_id in range(1, num_found + 1)]
        expected, got = -(-num_tokens // 4), blocks.num_blocks_needed(num_tokens, cached)
        assert got == expected, (
            f"{num_tokens} tokens, block_size=4, {num_found} blocks found that nobody owns, and so are free: "
            "each leaves "
            f"the free queue as a new one does. Expected {expected}, got {got}. {LOOK_NEEDED}"
        )


def test_what_it_takes_of_a_beginning_that_is_half_owned() -> None:
    blocks = pool(8, block_size=4)
    admit(blocks, "a", list(range(13)))
    admit(blocks, "b", list(range(5)))
    blocks.free("a")  # 1 is b's as well; 2 and 3 are nobody's
    cached = blocks.find_cached(request_of("c", list(range(13))))
    got = blocks.num_blocks_needed(13, cached)
    assert got == 3, (
        f"13 tokens are 4 blocks; [1, 2, 3] are found, 1 has an owner: expected 3, got {got}. {LOOK_NEEDED}"
    )


# allocate


def test_revived_blocks_count() -> None:
    """Three blocks are free, and all three are found: there is none for the fourth."""
    blocks = pool(4, block_size=4)
    admit(blocks, "a", list(range(12)))
    blocks.free("a")
    admit(blocks, "other", [77] * 4)  # takes 4, which has no name
    request = request_of("b", list(range(13)))
    cached = blocks.find_cached(request)
    assert [block.block_id for block in cached] == [1, 2, 3], f"got {cached}. {LOOK_FIND}"
    before = [block.block_id for block in blocks.free_queue]
    got = allocate(blocks, "b", 13, cached)
    assert got is False, (
        f"13 tokens, block_size=4: 4 blocks, of which 3 are found and are all that is free. Expected False, got {got}: "
        f"a found block that nobody owned leaves the free queue. {LOOK_ALLOCATE}"
    )
    assert "b" not in blocks.block_tables, f"refused, and it has a table: {blocks.block_tables}. {LOOK_ALLOCATE}"
    check_free(blocks, before, "a refusal changes nothing", LOOK_ALLOCATE)
    check_names(blocks, [1, 2, 3, 4], "a refusal forgets nothing", LOOK_ALLOCATE)
    check_blocks(blocks, "after a refusal")


def test_all_or_nothing_with_blocks_that_others_own() -> None:
    blocks = pool(5, block_size=4)
    admit(blocks, "a", list(range(12)))
    request = request_of("b", [*range(12), *[50] * 9])
    cached = blocks.find_cached(request)
    assert allocate(blocks, "b", 21, cached) is False, f"3 found, 3 new, 2 free. {LOOK_ALLOCATE}"
    counts = [blocks.pool[block_id].ref_count for block_id in (1, 2, 3)]
    assert counts == [1, 1, 1], (
        f"b was refused: expected ref_count [1, 1, 1] for a's blocks, got {counts}. {LOOK_ALLOCATE}"
    )
    assert allocate(blocks, "b", 20, cached) is True, f"3 found, 2 new, 2 free. {LOOK_ALLOCATE}"
    check_table(blocks, "b", [1, 2, 3, 4, 5])
    check_blocks(blocks, "the pool is full")


def test_a_request_never_draws_its_own_beginning() -> None:
    """What it found stands at the front of the free queue, where new blocks are drawn from."""
    blocks = pool(4, block_size=4)
    admit(blocks, "a", list(range(12)))
    admit(blocks, "b", [60, 61, 62, 63])
    blocks.free("a")  # 3, 2, 1
    blocks.free("b")  # 4
    check_free(blocks, [3, 2, 1, 4], "a is done, then b")
    request = request_of("c", list(range(13)))
    cached = blocks.find_cached(request)
    assert allocate(blocks, "c", 13, cached), f"4 blocks are free, and all are needed. {LOOK_ALLOCATE}"
    check_table(blocks, "c", [1, 2, 3, 4])
    check_names(blocks, [1, 2, 3], "c took 4 for something else: its name is gone, theirs are not", LOOK_ALLOCATE)
    check_free(blocks, [], "all are c's", LOOK_ALLOCATE)
    check_blocks(blocks, "c has all four")


def test_a_table_grows_at_its_end() -> None:
    blocks = pool(10, block_size=4)
    admit(blocks, "a", list(range(9)))
    _, num_hit = admit(blocks, "b", list(range(9)))
    assert num_hit == 8
    check_table(blocks, "b", [1, 2, 4])
    for num_tokens, expected in (
        (9, [1, 2, 4]),
        (12, [1, 2, 4]),
        (13, [1, 2, 4, 5]),
        (3, [1, 2, 4, 5]),
        (21, [1, 2, 4, 5, 6, 7]),
    ):
        assert blocks.allocate("b", num_tokens) is True, f"{num_tokens} tokens, and enough are free. {LOOK_ALLOCATE}"
        check_table(blocks, "b", expected)
        check_blocks(blocks, f"b grew to {num_tokens} tokens")
    assert blocks.allocate("b", 41) is False, f"11 blocks of 4, and there are 10. {LOOK_ALLOCATE}"
    check_table(blocks, "b", [1, 2, 4, 5, 6, 7])
    assert blocks.allocate("b", 36) is True, f"9 blocks, it has 6, and 3 are free. {LOOK_ALLOCATE}"
    check_blocks(blocks, "nothing is free")


def test_only_a_request_without_blocks_takes_cached_ones() -> None:
    blocks = pool(10, block_size=4)
    admit(blocks, "a", list(range(9)))
    cached = blocks.find_cached(request_of("b", list(range(9))))
    with pytest.raises(AssertionError, match="request a has blocks already"):
        blocks.allocate("a", 20, cached)


# register


def test_only_full_blocks_have_names() -> None:
    blocks = pool(10, block_size=4)
    request = request_of("a", list(range(11)))
    assert blocks.allocate("a", 11)
    for num_tokens, expected in ((0, []), (3, []), (4, [1]), (7, [1]), (8, [1, 2]), (11, [1, 2])):
        blocks.register(request, num_tokens)
        check_names(blocks, expected, f"{num_tokens} of a's 11 tokens are computed, block_size=4")


def test_what_register_returns_and_that_it_can_be_repeated() -> None:
    blocks = pool(10, block_size=4)
    request = request_of("a", list(range(13)))
    assert blocks.allocate("a", 13)
    got = [blocks.register(request, num_tokens) for num_tokens in (8, 8, 9, 13, 13, 4)]
    names = request.block_hashes
    expected = [[RegisteredBlock("a", n, names[n - 1]) for n in each] for each in ([1, 2], [], [], [3], [], [])]
    assert got == expected, (
        f"8, 8, 9, 13, 13 and 4 tokens registered: expected blocks [1, 2], nothing, nothing, [3], nothing, "
        "nothing, got "
        f"{[[block.block_id for block in each] for each in got]}. {LOOK_REGISTER}"
    )
    assert request.num_registered_blocks == 3, f"expected 3 done, got {request.num_registered_blocks}. {LOOK_REGISTER}"
    check_blocks(blocks, "after register()")


def test_of_two_copies_the_first_stays_the_one_that_is_found() -> None:
    """a and b compute the same at the same time."""
    blocks = pool(10, block_size=4)
    requests = {name: request_of(name, list(range(9))) for name in "ab"}
    for name in "ab":
        assert blocks.allocate(name, 9)
    first = blocks.register(requests["a"], 9)
    second = blocks.register(requests["b"], 9)
    assert [block.block_id for block in first] == [1, 2] and second == [], (
        f"a registers [1, 2], b's copies [4, 5] are known already: got {first}, {second}. {LOOK_REGISTER}"
    )
    check_names(blocks, [1, 2], "two copies")
    assert requests["b"].num_registered_blocks == 2, f"a copy is done as well: {requests['b']}. {LOOK_REGISTER}"
    unnamed = [blocks.pool[block_id].block_hash for block_id in (4, 5)]
    assert unnamed == [None, None], f"two blocks of one name: {unnamed}. {LOOK_REGISTER}"
    check_blocks(blocks, "two copies")
    blocks.free("b")
    check_free(blocks, [4, 5, 6, 7, 8, 9, 10], "b's copies cannot be found, so they go first")
    assert found(blocks, request_of("c", list(range(9)))) == [1, 2], f"a's are found. {LOOK_REGISTER}"


def test_a_found_block_keeps_its_name_when_its_finder_registers() -> None:
    blocks = pool(10, block_size=4)
    admit(blocks, "a", list(range(9)))
    request = request_of("b", list(range(9)))
    assert blocks.allocate("b", 9, blocks.find_cached(request))
    got = blocks.register(request, 9)
    assert got == [], f"b found both of its full blocks: expected nothing new, got {got}. {LOOK_REGISTER}"
    check_blocks(blocks, "b registered what it had found")


def test_names_of_an_answer() -> None:
    """A second turn finds the first turn's answer too."""
    blocks = pool(10, block_size=4)
    request, _ = admit(blocks, "a", list(range(6)))
    request.output_token_ids += [6, 7, 8]
    assert blocks.allocate("a", 8)
    blocks.register(request, 8)
    blocks.free("a")
    _, num_hit = admit(blocks, "b", list(range(11)))
    assert num_hit == 8, (
        f"6 tokens and an answer of 3, 8 of them computed: expected 8 found, got {num_hit}. {LOOK_REGISTER}"
    )


# free, and what is forgotten


def test_the_tail_is_forgotten_first() -> None:
    blocks = pool(6, block_size=4)
    admit(blocks, "a", list(range(24)))
    blocks.free("a")
    check_free(blocks, [6, 5, 4, 3, 2, 1], "a is done: its last block is used again first")
    for number, expected in ((1, 20), (2, 16), (3, 12)):
        admit(blocks, f"other {number}", [50 + number] * 3)
        got = len(blocks.find_cached(request_of("b", list(range(25))))) * 4
        assert got == expected, (
            f"{number} of 6 blocks went to others: expected {expected} tokens found, got {got}. {LOOK_FREE}"
        )
        check_blocks(blocks, f"{number} blocks went to others")


def test_what_was_used_longest_ago_goes_first() -> None:
    blocks = pool(4, block_size=4)
    for name, token in (("a", 1), ("b", 2)):
        admit(blocks, name, [token] * 8)
    for name in "ba":
        blocks.free(name)
    check_free(blocks, [4, 3, 2, 1], "b was done before a")
    _, num_hit = admit(blocks, "c", [2] * 5)  # b's first block is used again; one of the others makes room
    assert num_hit == 4
    check_names(blocks, [1, 2, 3], "4 had to go", LOOK_ALLOCATE)
    blocks.free("c")
    check_free(blocks, [4, 2, 1, 3], "b's first block was used last")


def test_who_holds_none_may_free() -> None:
    blocks = pool(4, block_size=4)
    admit(blocks, "a", list(range(5)))
    for name in ("nobody", "a", "a"):
        blocks.free(name)
        check_blocks(blocks, f"{name} gave up its blocks")
    check_free(blocks, [2, 3, 4, 1], "a was freed twice")
    assert blocks.block_tables == {}, f"got {blocks.block_tables}. {LOOK_FREE}"


def test_a_shared_block_stays_with_whoever_is_left() -> None:
    blocks = pool(6, block_size=4)
    for name in "abc":
        admit(blocks, name, list(range(5)))
    for name, expected in (("b", 2), ("a", 1)):
        blocks.free(name)
        got = blocks.pool[1].ref_count
        assert got == expected, f"{name} gave up block 1: expected ref_count {expected}, got {got}. {LOOK_FREE}"
        check_blocks(blocks, f"{name} is done")
    blocks.free("c")
    check_free(blocks, [4, 2, 3, 5, 6, 1], "nobody has block 1 any more")


# Off, forget, reset


def test_without_caching_nothing_is_found_or_registered() -> None:
    blocks = pool(8, block_size=4, enable_prefix_caching=False)
    request = request_of("a", list(range(9)))
    assert blocks.allocate("a", 9)
    got = blocks.register(request, 9)
    assert got == [] and not blocks.cached_blocks, f"caching is off, and {got} was registered. {LOOK_REGISTER}"
    other = request_of("b", list(range(9)))
    got = found(blocks, other)
    assert got == [], f"caching is off, and {got} was found. {LOOK_FIND}"
    assert other.block_hashes == [], f"caching is off, and what is looked for was hashed. {LOOK_FIND}"
    assert request.block_hashes == [], f"caching is off, and what was computed was hashed. {LOOK_REGISTER}"
    blocks.free("a")
    check_free(blocks, [1, 2, 3, 4, 5, 6, 7, 8], "a is done")


def test_forget() -> None:
    blocks = pool(12, block_size=4)
    request, _ = admit(blocks, "a", list(range(13)))
    registered = [RegisteredBlock("a", n, request.block_hashes[n - 1]) for n in (1, 2, 3)]
    admit(blocks, "b", list(range(5)))  # has found 1
    admit(blocks, "c", [9] * 9)
    got = blocks.forget(registered[1:])
    assert got == {"a"}, (
        f"2 and 3 were never written, and only a holds them: expected {{'a'}}, got {got}. {LOOK_FORGET}"
    )
    assert found(blocks, request_of("d", list(range(13)))) == [1], f"1 is still there. {LOOK_FORGET}"
    got = blocks.forget(registered)
    assert got == {"a", "b"}, f"1 is a's and b's; 2 and 3 are forgotten already: got {got}. {LOOK_FORGET}"
    check_names(blocks, [6, 7], "c's are written", LOOK_FORGET)
    assert blocks.forget(registered) == set(), f"all is forgotten. {LOOK_FORGET}"
    check_blocks(blocks, "after forget()")


def test_forget_leaves_alone_what_has_another_name_by_now() -> None:
    blocks = pool(2, block_size=4)
    request, _ = admit(blocks, "a", list(range(5)))
    registered = [RegisteredBlock("a", 1, request.block_hashes[0])]
    blocks.free("a")
    admit(blocks, "b", [9] * 8)  # takes both blocks, and gives 1 another name
    got = blocks.forget(registered)
    assert got == set(), f"block 1 is b's, and b wrote it: {got}. {LOOK_FORGET}"
    check_names(blocks, [1, 2], "b's are written", LOOK_FORGET)


def test_reset() -> None:
    blocks = pool(6, block_size=4)
    admit(blocks, "a", list(range(9)))
    assert blocks.reset() is False, f"a holds blocks. {LOOK_RESET}"
    check_names(blocks, [1, 2], "a reset that was refused forgets nothing", LOOK_RESET)
    blocks.free("a")
    assert blocks.reset() is True, f"all are free. {LOOK_RESET}"
    check_names(blocks, [], "after a reset", LOOK_RESET)
    check_blocks(blocks, "after a reset")
    assert found(blocks, request_of("b", list(range(9)))) == [], f"all is forgotten. {LOOK_RESET}"
    _, num_hit = admit(blocks, "c", list(range(9)))
    assert num_hit == 0, f"all is forgotten, and {num_hit} were found. {LOOK_RESET}"


def test_the_smallest_pool() -> None:
    with pytest.raises(AssertionError, match="none to hand out"):
        BlockManager(1, 4)


# Any order of calls


class Pool(RuleBasedStateMachine):
    """Requests that begin alike come, grow and go; beside it what each block really holds.

    A block's content is written by whoever has it new: the tokens and all before them, and the salt. Who finds one must
    find its own beginning in it.
    """

    num_hits = num_evictions = 0

    @initialize(
        num_usable=st.integers(4, 16),
        block_size=st.sampled_from([1, 2, 3, 4]),
        is_on=st.sampled_from([True] * 7 + [False]),
    )
    def start(self, num_usable: int, block_size: int, is_on: bool) -> None:
        self.blocks = BlockManager(num_usable + 1, block_size, is_on)
        self.requests: dict[str, Request] = {}
        self.content: dict[int, Any] = {}  # block → (salt, all tokens up to its end), once it is full
        self.number = 0

    def key(self, request: Request, index: int) -> Any:
        return request.params.cache_salt, tuple(request.token_ids[: (index + 1) * self.blocks.block_size])

    def write(self, request: Request) -> None:
        """All its known tokens are computed."""
        table = self.blocks.block_tables[request.request_id]
        for index in range(request.num_tokens // self.blocks.block_size):
            key, block = self.key(request, index), self.blocks.pool[table[index]]
            assert block.ref_count == 1 or self.content[block.block_id] == key, (
                f"{request.request_id} would write {key} to block {block.block_id}, which others hold too. "
                f"{LOOK_ALLOCATE}"
            )
            self.content[block.block_id] = key

    prompts = st.tuples(
        st.integers(0, 2), st.sampled_from([3, 6, 8, 12, 16]), st.lists(st.integers(0, 1), min_size=1, max_size=4),
        st.sampled_from([None, None, None, "a"]),
    )  # fmt: skip

    @rule(prompts=st.lists(prompts, min_size=2, max_size=4), num_stay=st.integers(0, 2))
    def several_come(self, prompts: list[Any], num_stay: int) -> None:
        """And most of them go again."""
        for number, prompt in enumerate(prompts):
            before = set(self.requests)
            self.come(*prompt)
            for name in set(self.requests) - before if number >= num_stay else ():
                self.leave(name)

    def come(self, base: int, length: int, tail: list[int], salt: str | None) -> None:
        tokens = [0] * min(length, 3 * base) + [1] * (length - min(length, 3 * base)) + tail
        blocks, request = self.blocks, request_of(str(self.number), tokens, salt)
        self.number += 1
        cached = blocks.find_cached(request)
        known = {content: block_id for block_id, content in self.content.items() if blocks.pool[block_id].block_hash}
        wanted = 0
        while (wanted + 1) * blocks.block_size < len(tokens) and self.key(request, wanted) in known:
            wanted += 1
        assert len(cached) == wanted * blocks.enable_prefix_caching, (
            f"{tokens} with salt {salt!r}: {wanted} of its blocks are there one after the other, {len(cached)} found. "
            f"{LOOK_FIND}"
        )
        for index, block in enumerate(cached):
            assert self.content[block.block_id] == self.key(request, index), (
                f"{tokens} with salt {salt!r} found block {block.block_id} for its block {index}, which holds "
                f"{self.content[block.block_id]}. {LOOK_HASH}"
            )
        names = len(blocks.cached_blocks)
        is_free = [block.block_id for block in cached if block.ref_count == 0]
        num_needed = blocks.num_blocks_for(len(tokens)) - len(cached) + len(is_free)
        expected, free = num_needed <= blocks.num_free_blocks, [block.block_id for block in blocks.free_queue]
        got = allocate(blocks, request.request_id, len(tokens), cached)
        assert got is expected, (
            f"{num_needed} blocks are needed of {len(free)} that are free: expected {expected}, got {got}. "
            f"{LOOK_ALLOCATE}"
        )
        if not got:
            check_free(blocks, free, "a refusal changes nothing", LOOK_ALLOCATE)
            return
        table = blocks.block_tables[request.request_id]
        new = [block_id for block_id in free if block_id not in is_free][: len(table) - len(cached)]
        assert table == [block.block_id for block in cached] + new, (
            f"found {[block.block_id for block in cached]}, free {free}: expected those and then {new}, got {table}. "
            f"{LOOK_ALLOCATE}"
        )
        Pool.num_hits += bool(cached)
        Pool.num_evictions += names > len(blocks.cached_blocks)
        self.requests[request.request_id] = request
        self.write(request)
        blocks.register(request, len(tokens))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        request = self.requests[data.draw(st.sampled_from(sorted(self.requests)), "request")]
        if self.blocks.allocate(request.request_id, request.num_tokens + len(tokens)):
            request.output_token_ids += tokens
            self.write(request)
            self.blocks.register(request, request.num_tokens)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(sorted(self.requests)), "request"))

    def leave(self, name: str) -> None:
        del self.requests[name]
        before = [block.block_id for block in self.blocks.free_queue]
        table = self.blocks.block_tables[name]
        self.blocks.free(name)
        gone = [self.blocks.pool[block_id] for block_id in table if self.blocks.pool[block_id].ref_count == 0]
        named: list[KVBlock] = [block for block in reversed(gone) if block.block_hash is not None]
        unnamed = [block.block_id for block in gone if block.block_hash is None]
        check_free(self.blocks, unnamed + before + [block.block_id for block in named], f"{name} gave up {table}")

    @rule(is_asked_for=st.sampled_from([False] * 5 + [True]))
    def reset(self, is_asked_for: bool) -> None:
        if not is_asked_for:
            return
        names = len(self.blocks.cached_blocks)
        expected = not self.requests
        got = self.blocks.reset()
        assert got is expected, (
            f"{len(self.requests)} requests hold blocks: expected {expected}, got {got}. {LOOK_RESET}"
        )
        assert len(self.blocks.cached_blocks) == (0 if got else names), f"reset() is {got}. {LOOK_RESET}"

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "blocks"):
            check_blocks(self.blocks, "after some calls")
            used, free, total = self.blocks.num_used_blocks, self.blocks.num_free_blocks, self.blocks.num_blocks - 1
            assert used + free == total, f"used {used} + free {free}, expected {total} together. {LOOK_FREE}"
            assert set(self.blocks.block_tables) == set(self.requests), f"got {self.blocks.block_tables}. {LOOK_FREE}"


def test_any_order_of_calls() -> None:
    Pool.num_hits = Pool.num_evictions = 0
    run_lives(Pool, max_examples=60, stateful_step_count=30)
    got = (Pool.num_hits, Pool.num_evictions)
    assert min(got) >= 100, f"{got} (hits, evictions) are too few to prove anything"
