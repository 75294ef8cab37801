"""core/block_manager.py: full blocks are found by a hash, shared by several requests, and stay cached until reused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
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
from part07_prefix_caching.core.block_manager import BlockManager, hash_block
from part07_prefix_caching.core.free_queue import KVBlock
from part07_prefix_caching.core.request import Request
from tests.lives import run_lives
from tests.part07.scripted import check_blocks
from tests.scripted import params_for

LOOK_FIND = 'Look at core/block_manager.py::BlockManager.find_cached; README "A block\'s hash".'
LOOK_HASH = 'Look at core/block_manager.py::BlockManager.hash_blocks and hash_block; README "A block\'s hash".'
LOOK_ROOT = 'Look at core/block_manager.py::BlockManager._first_parent; README "A block\'s hash".'
LOOK_NEEDED = 'Look at core/block_manager.py::BlockManager.num_blocks_needed; README "Free, but still cached".'
LOOK_ADMIT = 'Look at core/block_manager.py::BlockManager.admit; README "Free, but still cached".'
LOOK_GROW = 'Look at core/block_manager.py::BlockManager.grow; README "Free, but still cached".'
LOOK_CACHE = 'Look at core/block_manager.py::BlockManager.cache_full_blocks; README "When a block is cached".'
LOOK_FREE = 'Look at core/block_manager.py::BlockManager.free; README "Free, but still cached".'
LOOK_UNCACHE = 'Look at core/block_manager.py::BlockManager.uncache; README "Free, but still cached".'
LOOK_RESET = 'Look at core/block_manager.py::BlockManager.reset; README "When a block is cached".'
ROOT = Path(block_manager.__file__).parents[2]
COMMON = list(range(100, 148))  # 48 tokens: three blocks of 16


def request_of(name: str, tokens: list[int], salt: str | None = None) -> Request:
    return Request(name, list(tokens), params_for(50, cache_salt=salt), len(tokens) + 50)


def pool(num_usable: int, block_size: int = 16, **flags: Any) -> BlockManager:
    """A pool with num_usable blocks to hand out, and the null block."""
    return BlockManager(num_usable + 1, block_size, **flags)


def found(blocks: BlockManager, request: Request) -> list[int]:
    return [block.block_id for block in blocks.find_cached(request)]


def free_ids(blocks: BlockManager) -> list[int]:
    return [block.block_id for block in islice(blocks.free_queue, blocks.num_blocks)]  # a broken list may be endless


def admit(blocks: BlockManager, name: str, num_tokens: int, cached: list[KVBlock] | None = None) -> bool:
    """BlockManager.admit; if it fails an assertion half-way, the message says so."""
    free = free_ids(blocks)
    try:
        return blocks.admit(name, num_tokens, cached or [])
    except AssertionError as error:
        cached_ids = [block.block_id for block in cached or []]
        pytest.fail(
            f"request {name}: {num_tokens} tokens (block_size={blocks.block_size}), cached {cached_ids}, free {free}: "
            f"admit() fails half-way with {str(error)!r}. {LOOK_ADMIT}"
        )


def serve(blocks: BlockManager, name: str, tokens: list[int], salt: str | None = None) -> tuple[Request, int]:
    """Find, admit, compute everything, cache. Returns the request and how many of its tokens were cached before."""
    request = request_of(name, tokens, salt)
    cached = blocks.find_cached(request)
    num_free, is_admitted = blocks.num_free_blocks, admit(blocks, name, len(tokens), cached)
    assert is_admitted, (
        f"request {name}: {len(tokens)} tokens, {len(cached)} blocks cached, {num_free} blocks free: expected admit() "
        f"to return True. {LOOK_ADMIT}"
    )
    blocks.cache_full_blocks(request, len(tokens))
    return request, len(cached) * blocks.block_size


def check_free(blocks: BlockManager, expected: list[int], what: str, look: str = LOOK_FREE) -> None:
    got = free_ids(blocks)
    assert got == expected, f"{what}: expected the free queue {expected} (front first), got {got}. {look}"


def check_table(blocks: BlockManager, name: str, expected: list[int], look: str = LOOK_ADMIT) -> None:
    got = blocks.block_tables.get(name)
    assert got == expected, f"request {name}: expected the block table {expected}, got {got}. {look}"


def check_cached(blocks: BlockManager, expected: list[int], what: str, look: str = LOOK_CACHE) -> None:
    """expected: the blocks that can be found."""
    got = sorted(block.block_id for block in blocks.cached_blocks.values())
    assert got == expected, f"{what}: expected the cached blocks {expected}, got {got}. {look}"


# The scenario of the lesson


def test_two_prompts_with_48_tokens_in_common() -> None:
    """Blocks of 16, ten to hand out. A has 48 + 7 tokens, B the same 48 + 5."""
    blocks = pool(10)
    serve(blocks, "A", COMMON + [1] * 7)
    check_table(blocks, "A", [1, 2, 3, 4])
    check_cached(blocks, [1, 2, 3], "A fills three blocks, and a fourth in part")
    _, num_hit = serve(blocks, "B", COMMON + [2] * 5)
    assert num_hit == 48, f"B begins with the same 48 tokens: expected a hit of 48, got {num_hit}. {LOOK_FIND}"
    check_table(blocks, "B", [1, 2, 3, 5])
    counts = [blocks.pool[block_id].ref_count for block_id in range(1, 6)]
    assert counts == [2, 2, 2, 1, 1], f"blocks 1 to 5: expected ref_count [2, 2, 2, 1, 1], got {counts}. {LOOK_ADMIT}"
    assert blocks.num_free_blocks == 5, f"5 of 10 blocks are used, {blocks.num_free_blocks} are free. {LOOK_ADMIT}"
    blocks.free("A")
    check_free(blocks, [4, 6, 7, 8, 9, 10], "A has ended, B uses 1 to 3")
    blocks.free("B")
    check_free(
        blocks, [5, 4, 6, 7, 8, 9, 10, 3, 2, 1], "A and B have ended: uncached blocks first, then the prefix's end"
    )
    check_cached(blocks, [1, 2, 3], "all blocks are free, three are still cached", LOOK_FREE)


# find_cached


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(1, 0), (15, 0), (16, 0), (17, 16), (31, 16), (32, 16), (33, 32), (48, 32), (49, 48)]
)
def test_the_same_prompt_twice(num_tokens: int, expected: int) -> None:
    """At least one token is computed: the answer's first token is sampled from its logits."""
    blocks = pool(20)
    prompt = list(range(num_tokens))
    serve(blocks, "first", prompt)
    _, num_hit = serve(blocks, "second", prompt)
    assert num_hit == expected, (
        f"the same {num_tokens} tokens twice, block_size=16: expected a hit of {expected}, got {num_hit}. {LOOK_FIND}"
    )
    blocks.free("first")
    blocks.free("second")
    _, num_hit = serve(blocks, "third", prompt)
    assert num_hit == expected, f"and after both have ended: expected a hit of {expected}, got {num_hit}. {LOOK_FIND}"


def test_a_longer_and_a_shorter_prompt() -> None:
    blocks = pool(20, block_size=4)
    serve(blocks, "a", list(range(13)))
    for length, expected in ((3, 0), (4, 0), (5, 4), (12, 8), (13, 12), (30, 12)):
        got = len(blocks.find_cached(request_of("b", list(range(length))))) * 4
        assert got == expected, (
            f"13 tokens are cached, the prompt has {length}: expected a hit of {expected}, got {got}. {LOOK_FIND}"
        )


def test_salts() -> None:
    blocks = pool(30)
    cases = [("1", None, 0), ("2", "a", 0), ("3", "a", 32), ("4", "b", 0), ("5", None, 32), ("6", "b", 32)]
    for name, salt, expected in cases:
        _, got = serve(blocks, name, list(range(33)), salt)
        assert got == expected, (
            f"request {name} of {[case[:2] for case in cases]}, all with the same tokens, salt {salt!r}: expected a "
            f"hit of {expected}, got {got}. {LOOK_HASH}"
        )


@pytest.mark.parametrize(("position", "expected"), [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (11, 8), (12, 12)])
def test_a_token_that_differs(position: int, expected: int) -> None:
    """A hash covers all tokens up to its block's end, so nothing is found from the first difference on."""
    blocks = pool(20, block_size=4)
    serve(blocks, "a", list(range(16)))
    tokens = list(range(16))
    tokens[position] = 99
    got = len(blocks.find_cached(request_of("b", tokens))) * 4
    assert got == expected, (
        f"token {position} of 16 differs, block_size=4: expected a hit of {expected}, got {got}. {LOOK_HASH}"
    )


def test_the_same_tokens_after_another_prefix_are_another_block() -> None:
    blocks = pool(20, block_size=4)
    serve(blocks, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    for tokens in ([5, 6, 7, 8, 9], [0, 0, 0, 0, 5, 6, 7, 8, 9], [1, 2, 3, 5, 4, 6, 7, 8, 9]):
        got = found(blocks, request_of("b", tokens))
        assert got == [], f"1 to 9 are cached, {tokens} begin differently: expected no hit, got {got}. {LOOK_HASH}"


def test_large_and_small_token_ids_are_not_mixed_up() -> None:
    hashes = {
        hash_block(b"parent", tokens) for tokens in ([1, 0], [256, 0], [0, 1], [65_536, 0], [1, 0, 0], [150_000, 1])
    }
    assert len(hashes) == 6, f"six blocks of different tokens have {len(hashes)} hashes. {LOOK_HASH}"


def test_the_first_miss_ends_the_lookup() -> None:
    """A later block is useless without those before it. a and b compute the same 8 tokens at once, so the first
    two blocks of a are cached, and the third of b. a ends, and its second block is evicted."""
    blocks = pool(7, block_size=4)
    requests = [request_of("a", list(range(9))), request_of("b", list(range(13)))]
    for request in requests:
        assert blocks.admit(request.request_id, request.num_tokens)
    for request in requests:
        blocks.cache_full_blocks(request, request.num_tokens)
    blocks.free("a")
    serve(blocks, "c", [50] * 5)
    got = found(blocks, request_of("d", list(range(17))))
    assert got == [1], (
        f"the second block of the prompt was evicted: expected the hit [1] (block 1), got {got}. {LOOK_FIND}"
    )


def test_a_lookup_changes_nothing() -> None:
    blocks = pool(6, block_size=4)
    serve(blocks, "a", list(range(9)))
    blocks.free("a")
    before, request = free_ids(blocks), request_of("b", list(range(9)))
    for _ in range(3):
        got = found(blocks, request)
        assert got == [1, 2], f"expected blocks [1, 2] to be found, got {got}. {LOOK_FIND}"
    check_free(blocks, before, "find_cached() was called, and nothing admitted", LOOK_FIND)
    assert "b" not in blocks.block_tables, f"b was not admitted, and has a table: {blocks.block_tables}. {LOOK_FIND}"


# Hashes


HASH_CASES: list[tuple[int, str | None]] = [(0, None), (0, "a"), (0, "b"), (0, "7"), (7, None), (7, "a")]  # seed, salt
HASH_SCRIPT = f"""
import json
from tests.part07.test_block_manager import hashes_of
print(json.dumps([hashes_of(seed, salt) for seed, salt in {HASH_CASES!r}]))
"""


def hashes_of(seed: int, salt: str | None) -> list[str]:
    """Of three blocks of 4, as a new BlockManager computes them."""
    blocks = pool(4, block_size=4, hash_seed=seed)
    return [block_hash.hex() for block_hash in blocks.hash_blocks(request_of("a", list(range(12)), salt))]


@pytest.mark.slow
def test_processes_agree_on_hashes() -> None:
    """Equal tokens, seed and salt: equal hashes, whatever the process. Another seed or salt: other hashes."""
    done = subprocess.run(
        [sys.executable, "-c", HASH_SCRIPT], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"the other process failed: {done.stderr}"
    here, there = [hashes_of(seed, salt) for seed, salt in HASH_CASES], json.loads(done.stdout)
    for (seed, salt), got, expected in zip(HASH_CASES, there, here, strict=True):
        assert len(set(got)) == 3 and got == expected, (
            f"seed {seed}, salt {salt!r}: expected the hashes {expected}, as in this process, got {got} in another. "
            f"{LOOK_ROOT}"
        )
    together = [block_hash for hashes in here for block_hash in hashes]
    assert len(set(together)) == 3 * len(HASH_CASES), (
        f"the same tokens under (seed, salt) {HASH_CASES}: expected no hash in common, got {here}. {LOOK_ROOT}"
    )


def test_no_salt_stands_for_a_block() -> None:
    """Else a client could choose a salt under which its blocks have the hashes of other prompts' blocks, and their keys
    and values would end up in those prompts' answers."""
    blocks, tokens = pool(4, block_size=4), list(range(65, 69))
    salt = "".join(f"{chr(token)}\0\0\0" for token in tokens)  # the bytes that are hashed for these tokens
    unsalted = blocks.hash_blocks(request_of("a", [*tokens, 1, 2, 3, 4]))
    salted = blocks.hash_blocks(request_of("b", [1, 2, 3, 4], salt))
    assert salted[0] != unsalted[1], (
        f"[1, 2, 3, 4] with salt {salt!r} has the hash of the second block of [65, 66, 67, 68, 1, 2, 3, 4]. {LOOK_ROOT}"
    )


def test_each_block_is_hashed_once_and_answers_continue_the_chain() -> None:
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
    assert request.block_hashes[:2] == first, f"hashes changed after they were computed. {LOOK_HASH}"
    whole = blocks.hash_blocks(request_of("b", list(range(17))))
    assert request.block_hashes == whole, (
        f"prompt and answer have other hashes than a prompt of the same tokens: expected {whole}, got "
        f"{request.block_hashes}. {LOOK_HASH}"
    )


@pytest.mark.parametrize(("start", "end"), [(0, 3), (0, 5), (0, 8), (3, 5), (5, 8), (6, 8), (4, 6), (5, 5), (2, 2)])
def test_tokens_between(start: int, end: int) -> None:
    request = request_of("a", list(range(5)))
    request.output_token_ids += [5, 6, 7]
    got, expected = request.tokens_between(start, end), list(range(start, end))
    assert got == expected, (
        f"tokens {start} to {end} of 5 prompt and 3 output tokens: expected {expected}, got {got}. Look at "
        'core/request.py::Request.tokens_between; README "A block\'s hash".'
    )


# num_blocks_needed


def test_how_many_free_blocks_a_request_takes() -> None:
    blocks = pool(20, block_size=4)
    serve(blocks, "a", list(range(13)))  # blocks 1 to 4, three of them cached
    cases = [(1, 0, 1), (4, 0, 1), (5, 0, 2), (14, 0, 4), (13, 3, 1), (14, 2, 2), (30, 3, 5)]
    for num_tokens, num_found, expected in cases:
        cached = [blocks.pool[block_id] for block_id in range(1, num_found + 1)]
        got = blocks.num_blocks_needed(num_tokens, cached)
        assert got == expected, (
            f"{num_tokens} tokens, block_size=4, {num_found} cached blocks that another request uses: expected "
            f"{expected}, got {got}. {LOOK_NEEDED}"
        )
    blocks.free("a")
    for num_tokens, num_found, _ in cases:
        cached = [blocks.pool[block_id] for block_id in range(1, num_found + 1)]
        expected, got = -(-num_tokens // 4), blocks.num_blocks_needed(num_tokens, cached)
        assert got == expected, (
            f"{num_tokens} tokens, block_size=4, {num_found} cached blocks that are free: each leaves the free queue, "
            f"as a new one does. Expected {expected}, got {got}. {LOOK_NEEDED}"
        )


def test_how_many_it_takes_if_only_some_of_the_cached_ones_are_free() -> None:
    blocks = pool(8, block_size=4)
    serve(blocks, "a", list(range(13)))
    serve(blocks, "b", list(range(5)))
    blocks.free("a")  # b uses 1 as well; 2 and 3 are free
    cached = blocks.find_cached(request_of("c", list(range(13))))
    got = blocks.num_blocks_needed(13, cached)
    assert got == 3, f"13 tokens are 4 blocks; [1, 2, 3] are cached, b uses 1: expected 3, got {got}. {LOOK_NEEDED}"


# admit and grow


def test_cached_blocks_that_are_free_count() -> None:
    """Three blocks are free, and all three are hits: none is free for the fourth."""
    blocks = pool(4, block_size=4)
    serve(blocks, "a", list(range(12)))
    blocks.free("a")
    serve(blocks, "other", [77] * 4)  # takes 4, which is not cached
    request = request_of("b", list(range(13)))
    cached = blocks.find_cached(request)
    got_ids = [block.block_id for block in cached]
    assert got_ids == [1, 2, 3], f"13 tokens, 12 of them as in a: expected blocks [1, 2, 3], got {got_ids}. {LOOK_FIND}"
    before = free_ids(blocks)
    got = admit(blocks, "b", 13, cached)
    assert got is False, (
        f"13 tokens, block_size=4: 4 blocks, of which 3 are cached and are all that is free. A cached block that is "
        f"free leaves the free queue: expected False, got {got}. {LOOK_ADMIT}"
    )
    assert "b" not in blocks.block_tables, f"refused, and it has a table: {blocks.block_tables}. {LOOK_ADMIT}"
    check_free(blocks, before, "a refusal changes nothing", LOOK_ADMIT)
    check_cached(blocks, [1, 2, 3, 4], "a refusal evicts nothing", LOOK_ADMIT)
    check_blocks(blocks, "after a refusal")


def test_all_or_nothing_with_shared_blocks() -> None:
    blocks = pool(5, block_size=4)
    serve(blocks, "a", list(range(12)))
    request = request_of("b", [*range(12), *[50] * 9])
    cached = blocks.find_cached(request)
    got = admit(blocks, "b", 21, cached)
    assert got is False, f"3 cached, 3 new, 2 free: expected False, got {got}. {LOOK_ADMIT}"
    counts = [blocks.pool[block_id].ref_count for block_id in (1, 2, 3)]
    assert counts == [1, 1, 1], f"b was refused: expected ref_count [1, 1, 1] of a's blocks, got {counts}. {LOOK_ADMIT}"
    got = admit(blocks, "b", 20, cached)
    assert got is True, f"3 cached, 2 new, 2 free: expected True, got {got}. {LOOK_ADMIT}"
    check_table(blocks, "b", [1, 2, 3, 4, 5])
    check_blocks(blocks, "the pool is full")


def test_a_request_does_not_overwrite_its_own_prefix() -> None:
    """Its cached blocks are at the front of the free queue, where new blocks are taken."""
    blocks = pool(4, block_size=4)
    serve(blocks, "a", list(range(12)))
    serve(blocks, "b", [60, 61, 62, 63])
    blocks.free("a")  # 3, 2, 1
    blocks.free("b")  # 4
    check_free(blocks, [3, 2, 1, 4], "a has ended, then b")
    cached = blocks.find_cached(request_of("c", list(range(13))))
    assert admit(blocks, "c", 13, cached), f"4 blocks are free, and all are needed: expected True. {LOOK_ADMIT}"
    check_table(blocks, "c", [1, 2, 3, 4])
    check_cached(blocks, [1, 2, 3], "c takes 4 for other tokens, so only 4 is evicted", LOOK_ADMIT)
    check_free(blocks, [], "c uses all", LOOK_ADMIT)
    check_blocks(blocks, "c uses all four")


def test_a_table_grows_at_its_end() -> None:
    blocks = pool(10, block_size=4)
    serve(blocks, "a", list(range(9)))
    _, num_hit = serve(blocks, "b", list(range(9)))
    assert num_hit == 8, f"expected a hit of 8, got {num_hit}. {LOOK_FIND}"
    check_table(blocks, "b", [1, 2, 4])
    for num_tokens, expected in (
        (9, [1, 2, 4]),
        (12, [1, 2, 4]),
        (13, [1, 2, 4, 5]),
        (21, [1, 2, 4, 5, 6, 7]),
    ):
        assert blocks.grow("b", num_tokens) is True, f"{num_tokens} tokens, and enough blocks are free. {LOOK_GROW}"
        check_table(blocks, "b", expected, LOOK_GROW)
        check_blocks(blocks, f"b grew to {num_tokens} tokens")
    assert blocks.grow("b", 41) is False, f"11 blocks of 4, and there are 10. {LOOK_GROW}"
    check_table(blocks, "b", [1, 2, 4, 5, 6, 7], LOOK_GROW)
    assert blocks.grow("b", 36) is True, f"9 blocks, it has 6, and 3 are free. {LOOK_GROW}"
    check_blocks(blocks, "no block is free")


def test_a_request_is_admitted_once() -> None:
    blocks = pool(10, block_size=4)
    serve(blocks, "a", list(range(9)))
    cached = blocks.find_cached(request_of("b", list(range(9))))
    with pytest.raises(AssertionError, match="request a already has a block table"):
        blocks.admit("a", 20, cached)
    check_blocks(blocks, "a was admitted twice")


# cache_full_blocks


def test_only_full_blocks_are_cached() -> None:
    blocks = pool(10, block_size=4)
    request = request_of("a", list(range(11)))
    assert blocks.admit("a", 11)
    for num_tokens, expected in ((0, []), (3, []), (4, [1]), (7, [1]), (8, [1, 2]), (11, [1, 2])):
        blocks.cache_full_blocks(request, num_tokens)
        check_cached(blocks, expected, f"{num_tokens} of a's 11 tokens are computed, block_size=4")


def test_caching_again_changes_nothing() -> None:
    blocks = pool(10, block_size=4)
    request = request_of("a", list(range(13)))
    assert blocks.admit("a", 13)
    for num_tokens, expected in ((8, 2), (8, 2), (9, 2), (13, 3), (13, 3)):
        blocks.cache_full_blocks(request, num_tokens)
        check_cached(blocks, [1, 2, 3][:expected], f"8, 8, 9, 13 and 13 of 13 tokens: now {num_tokens}")
        assert request.num_cached_blocks == expected, (
            f"8, 8, 9, 13 and 13 of 13 tokens: now {num_tokens}, expected num_cached_blocks {expected}, got "
            f"{request.num_cached_blocks}. {LOOK_CACHE}"
        )
    check_blocks(blocks, "after cache_full_blocks()")


def test_of_two_copies_the_first_stays_the_one_that_is_found() -> None:
    """a and b compute the same tokens at the same time."""
    blocks = pool(10, block_size=4)
    requests = {name: request_of(name, list(range(9))) for name in "ab"}
    for name in "ab":
        assert blocks.admit(name, 9)
    for name in "ab":
        blocks.cache_full_blocks(requests[name], 9)
        check_cached(blocks, [1, 2], f"two copies: a's blocks [1, 2], then b's [4, 5]; now {name}'s")
    got = requests["b"].num_cached_blocks
    assert got == 2, f"b's blocks are copies of cached ones: expected num_cached_blocks 2, got {got}. {LOOK_CACHE}"
    hashes = [blocks.pool[block_id].block_hash for block_id in (4, 5)]
    assert hashes == [None, None], f"two blocks with one hash: expected no hash for [4, 5], got {hashes}. {LOOK_CACHE}"
    check_blocks(blocks, "two copies")
    blocks.free("b")
    check_free(blocks, [4, 5, 6, 7, 8, 9, 10], "b's copies cannot be found, so they are reused first")
    got_ids = found(blocks, request_of("c", list(range(9))))
    assert got_ids == [1, 2], f"expected a's blocks [1, 2] to be found, got {got_ids}. {LOOK_CACHE}"


def test_a_hit_is_not_cached_again() -> None:
    blocks = pool(10, block_size=4)
    first, _ = serve(blocks, "a", list(range(9)))
    request = request_of("b", list(range(9)))
    assert blocks.admit("b", 9, blocks.find_cached(request))
    blocks.cache_full_blocks(request, 9)
    check_cached(blocks, [1, 2], "b's full blocks are both hits")
    got = [blocks.pool[block_id].block_hash for block_id in (1, 2)]
    assert got == first.block_hashes, (
        f"the hashes of b's hits have changed: {first.block_hashes} to {got}. {LOOK_CACHE}"
    )
    check_blocks(blocks, "b cached what it had found")


def test_answers_are_cached_too() -> None:
    """The second turn of a chat hits the first turn's answer as well."""
    blocks = pool(10, block_size=4)
    request, _ = serve(blocks, "a", list(range(6)))
    request.output_token_ids += [6, 7, 8]
    assert blocks.grow("a", 8)
    blocks.cache_full_blocks(request, 8)
    blocks.free("a")
    _, num_hit = serve(blocks, "b", list(range(11)))
    assert num_hit == 8, (
        f"6 prompt tokens and an answer of 3, 8 of them computed: expected a hit of 8, got {num_hit}. {LOOK_CACHE}"
    )


# free, and the order of eviction


def test_the_end_of_a_prefix_is_evicted_first() -> None:
    blocks = pool(6, block_size=4)
    serve(blocks, "a", list(range(24)))
    blocks.free("a")
    check_free(blocks, [6, 5, 4, 3, 2, 1], "a has ended: its last block is reused first")
    for number, expected in ((1, 20), (2, 16), (3, 12)):
        serve(blocks, f"other {number}", [50 + number] * 3)
        got = len(blocks.find_cached(request_of("b", list(range(25))))) * 4
        assert got == expected, (
            f"{number} of 6 blocks are used by others: expected a hit of {expected}, got {got}. {LOOK_FREE}"
        )
        check_blocks(blocks, f"{number} blocks are used by others")


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    blocks = pool(4, block_size=4)
    for name, token in (("a", 1), ("b", 2)):
        serve(blocks, name, [token] * 8)
    for name in "ba":
        blocks.free(name)
    check_free(blocks, [4, 3, 2, 1], "b has ended before a")
    _, num_hit = serve(blocks, "c", [2] * 5)  # hits b's first block, and needs another
    assert num_hit == 4, f"expected a hit of 4, got {num_hit}. {LOOK_FIND}"
    check_cached(blocks, [1, 2, 3], "4 is evicted", LOOK_ADMIT)
    blocks.free("c")
    check_free(blocks, [4, 2, 1, 3], "b's first block was used last")


def test_to_free_twice_is_no_error() -> None:
    blocks = pool(4, block_size=4)
    serve(blocks, "a", list(range(5)))
    for name in ("unknown", "a", "a"):
        blocks.free(name)
        check_blocks(blocks, f"{name} was freed")
    check_free(blocks, [2, 3, 4, 1], "a was freed twice")
    assert blocks.block_tables == {}, f"expected no table, got {blocks.block_tables}. {LOOK_FREE}"


def test_a_shared_block_is_free_when_its_last_lease_ends() -> None:
    blocks = pool(6, block_size=4)
    for name in "abc":
        serve(blocks, name, list(range(5)))
    for name, expected in (("b", 2), ("a", 1)):
        blocks.free(name)
        got = blocks.pool[1].ref_count
        assert got == expected, f"{name} has ended: expected ref_count {expected} for block 1, got {got}. {LOOK_FREE}"
        check_blocks(blocks, f"{name} has ended")
    blocks.free("c")
    check_free(blocks, [4, 2, 3, 5, 6, 1], "the last request with block 1 has ended")


# Without caching, uncache and reset


def test_without_caching_nothing_is_hashed_found_or_cached() -> None:
    blocks = pool(8, block_size=4, enable_prefix_caching=False)
    request = request_of("a", list(range(9)))
    assert blocks.admit("a", 9)
    blocks.cache_full_blocks(request, 9)
    check_cached(blocks, [], "caching is off")
    other = request_of("b", list(range(9)))
    got = found(blocks, other)
    assert got == [], f"caching is off: expected no hit, got {got}. {LOOK_FIND}"
    assert other.block_hashes == [], f"caching is off, and a lookup has hashed {other.block_hashes}. {LOOK_FIND}"
    assert request.block_hashes == [], f"caching is off, and a was hashed: {request.block_hashes}. {LOOK_CACHE}"
    blocks.free("a")
    check_free(blocks, [1, 2, 3, 4, 5, 6, 7, 8], "a has ended")


class Evictions:
    """Watches uncache() of a pool. hashes: of the blocks that it has evicted, in order."""

    def __init__(self, blocks: BlockManager) -> None:
        self.hashes: list[bytes] = []
        uncache = blocks.uncache

        def watched(block: KVBlock) -> None:
            block_hash = block.block_hash
            uncache(block)
            if block_hash is not None:
                self.hashes.append(block_hash)
                assert block.block_hash is None and block_hash not in blocks.cached_blocks, (
                    f"block {block.block_id} is uncached and can still be found. {LOOK_UNCACHE}"
                )

        blocks.uncache = watched  # type: ignore[method-assign]


def test_every_eviction_passes_through_uncache() -> None:
    """Whether a new request, a growing one or a reset needs the block; and nothing else calls it in vain."""
    blocks = pool(6, block_size=4)
    evictions = Evictions(blocks)
    first, _ = serve(blocks, "a", list(range(12)))
    second, _ = serve(blocks, "b", [50] * 12)
    assert evictions.hashes == [], f"the blocks were never used before: expected no eviction. {LOOK_UNCACHE}"
    blocks.free("a")
    blocks.free("b")
    assert evictions.hashes == [], f"a and b have ended, and their blocks stay cached. {LOOK_FREE}"
    blocks.admit("c", 9, blocks.find_cached(request_of("c", [*range(8), 60])))  # two hits, and one new block
    expected = first.block_hashes[2:]
    assert evictions.hashes == expected, (
        f"c is admitted with two hits and one new block, 3: expected 1 eviction, got {len(evictions.hashes)}. "
        f"{LOOK_UNCACHE}"
    )
    blocks.grow("c", 17)
    expected += second.block_hashes[:0:-1]
    assert evictions.hashes == expected, (
        f"c grew by two blocks, 6 and 5: expected 3 evictions in all, got {len(evictions.hashes)}. {LOOK_UNCACHE}"
    )
    blocks.reset()
    assert sorted(evictions.hashes) == sorted(first.block_hashes + second.block_hashes), (
        f"6 blocks were cached, and all are uncached: expected 6 evictions, got {len(evictions.hashes)}. {LOOK_RESET}"
    )
    check_cached(blocks, [], "after a reset", LOOK_RESET)


def test_reset() -> None:
    """Also with requests in the pool, and shared blocks: a failed step calls it."""
    blocks = pool(6, block_size=4)
    serve(blocks, "a", list(range(9)))
    serve(blocks, "b", list(range(9)))
    blocks.reset()
    check_cached(blocks, [], "after a reset", LOOK_RESET)
    check_blocks(blocks, "after a reset")
    free = sorted(free_ids(blocks))
    assert free == [1, 2, 3, 4, 5, 6] and not blocks.block_tables, (
        f"after a reset: expected all blocks to be free, got {free} and tables {blocks.block_tables}. {LOOK_RESET}"
    )
    _, num_hit = serve(blocks, "c", list(range(9)))
    assert num_hit == 0, f"after a reset: expected no hit, got {num_hit}. {LOOK_RESET}"


def test_the_smallest_pool() -> None:
    with pytest.raises(AssertionError, match="none to hand out"):
        BlockManager(1, 4)


# Any order of calls


class Pool(RuleBasedStateMachine):
    """Requests with shared prefixes are admitted, grow and end; beside it, what each block really holds.

    A block's content is written by the request that has it new: the tokens and all before them, and the salt. A hit
    must hold the request's own prefix.
    """

    num_hits = num_evictions = 0

    @initialize(
        num_usable=st.integers(4, 16),
        block_size=st.sampled_from([1, 2, 3, 4]),
        is_on=st.sampled_from([True] * 7 + [False]),
    )
    def start(self, num_usable: int, block_size: int, is_on: bool) -> None:
        self.blocks = BlockManager(num_usable + 1, block_size, is_on)
        self.evictions = Evictions(self.blocks)
        self.requests: dict[str, Request] = {}
        self.content: dict[int, Any] = {}  # block → (salt, all tokens up to its end), once it is full
        self.hashes: set[bytes] = set()  # that could be found after the last rule
        self.number = 0

    def key(self, request: Request, index: int) -> Any:
        return request.params.cache_salt, tuple(request.token_ids[: (index + 1) * self.blocks.block_size])

    def write(self, request: Request) -> None:
        """All its known tokens are computed."""
        table = self.blocks.block_tables[request.request_id]
        for index in range(request.num_tokens // self.blocks.block_size):
            key, block = self.key(request, index), self.blocks.pool[table[index]]
            assert block.ref_count == 1 or self.content[block.block_id] == key, (
                f"{request.request_id} would write {key} to block {block.block_id}, which others use too. {LOOK_ADMIT}"
            )
            self.content[block.block_id] = key

    prompts = st.tuples(
        st.integers(0, 2), st.sampled_from([3, 6, 8, 12, 16]), st.lists(st.integers(0, 1), min_size=1, max_size=4),
        st.sampled_from([None, None, None, "a"]),
    )  # fmt: skip

    @rule(prompts=st.lists(prompts, min_size=2, max_size=4), num_stay=st.integers(0, 2))
    def several_arrive(self, prompts: list[Any], num_stay: int) -> None:
        """And most of them end at once."""
        for number, prompt in enumerate(prompts):
            before = set(self.requests)
            self.arrive(*prompt)
            for name in set(self.requests) - before if number >= num_stay else ():
                self.end_one(name)

    def arrive(self, base: int, length: int, tail: list[int], salt: str | None) -> None:
        tokens = [0] * min(length, 3 * base) + [1] * (length - min(length, 3 * base)) + tail
        blocks, request = self.blocks, request_of(str(self.number), tokens, salt)
        self.number += 1
        cached = blocks.find_cached(request)
        known = {content: block_id for block_id, content in self.content.items() if blocks.pool[block_id].block_hash}
        wanted = 0
        while (wanted + 1) * blocks.block_size < len(tokens) and self.key(request, wanted) in known:
            wanted += 1
        assert len(cached) == wanted * blocks.enable_prefix_caching, (
            f"{tokens} with salt {salt!r}: {wanted} of its first blocks are cached, {len(cached)} were found. "
            f"{LOOK_FIND}"
        )
        for index, block in enumerate(cached):
            assert self.content[block.block_id] == self.key(request, index), (
                f"{tokens} with salt {salt!r} found block {block.block_id} for its block {index}, which holds "
                f"{self.content[block.block_id]}. {LOOK_HASH}"
            )
        num_evicted = len(self.evictions.hashes)
        free_hits = [block.block_id for block in cached if block.ref_count == 0]
        num_needed = blocks.num_blocks_for(len(tokens)) - len(cached) + len(free_hits)
        expected, free = num_needed <= blocks.num_free_blocks, free_ids(blocks)
        got = admit(blocks, request.request_id, len(tokens), cached)
        assert got is expected, (
            f"{num_needed} blocks are needed, {len(free)} are free: expected {expected}, got {got}. {LOOK_ADMIT}"
        )
        if not got:
            check_free(blocks, free, "a refusal changes nothing", LOOK_ADMIT)
            return
        table = blocks.block_tables[request.request_id]
        new = [block_id for block_id in free if block_id not in free_hits][: len(table) - len(cached)]
        assert table == [block.block_id for block in cached] + new, (
            f"cached {[block.block_id for block in cached]}, free {free}: expected those and then {new}, got {table}. "
            f"{LOOK_ADMIT}"
        )
        Pool.num_hits += bool(cached)
        Pool.num_evictions += len(self.evictions.hashes) > num_evicted
        self.requests[request.request_id] = request
        self.write(request)
        blocks.cache_full_blocks(request, len(tokens))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        request = self.requests[data.draw(st.sampled_from(sorted(self.requests)), "request")]
        if self.blocks.grow(request.request_id, request.num_tokens + len(tokens)):
            request.output_token_ids += tokens
            self.write(request)
            self.blocks.cache_full_blocks(request, request.num_tokens)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.end_one(data.draw(st.sampled_from(sorted(self.requests)), "request"))

    def end_one(self, name: str) -> None:
        del self.requests[name]
        before, table = free_ids(self.blocks), self.blocks.block_tables[name]
        self.blocks.free(name)
        freed = [self.blocks.pool[block_id] for block_id in table if self.blocks.pool[block_id].ref_count == 0]
        cached = [block.block_id for block in reversed(freed) if block.block_hash is not None]
        uncached = [block.block_id for block in freed if block.block_hash is None]
        check_free(self.blocks, uncached + before + cached, f"{name} ended, with blocks {table}")

    @rule(is_asked_for=st.sampled_from([False] * 9 + [True]))
    def reset(self, is_asked_for: bool) -> None:
        if is_asked_for:
            self.blocks.reset()
            self.requests.clear()
            check_cached(self.blocks, [], "after a reset", LOOK_RESET)
            num_free, total = self.blocks.num_free_blocks, self.blocks.num_blocks - 1
            assert num_free == total, f"after a reset: expected {total} free blocks, got {num_free}. {LOOK_RESET}"

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "blocks"):
            check_blocks(self.blocks, "after some calls")
            used, free, total = self.blocks.num_used_blocks, self.blocks.num_free_blocks, self.blocks.num_blocks - 1
            assert used + free == total, f"used {used} + free {free}: expected {total} together. {LOOK_FREE}"
            assert set(self.blocks.block_tables) == set(self.requests), (
                f"expected tables of {sorted(self.requests)}, got {self.blocks.block_tables}. {LOOK_FREE}"
            )

    @invariant()
    def evicts_in_one_place(self) -> None:
        if hasattr(self, "blocks"):
            now = set(self.blocks.cached_blocks)
            lost = self.hashes - now - set(self.evictions.hashes)
            assert not lost, (
                f"{len(lost)} blocks cannot be found any more, and uncache() was not called. {LOOK_UNCACHE}"
            )
            self.hashes = now


def test_any_order_of_calls() -> None:
    Pool.num_hits = Pool.num_evictions = 0
    run_lives(Pool, max_examples=60, stateful_step_count=30)
    got = (Pool.num_hits, Pool.num_evictions)
    assert min(got) >= 100, f"{got} (hits, evictions) are too few to prove anything"
