"""worker/kv_receiver.py: what is asked of which source, and what of the answers is used."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from part13_disaggregation.messages import Fetch, KVSource, Watch
from part13_disaggregation.worker import kv_receiver
from part13_disaggregation.worker.kv_receiver import plan_shares
from part13_disaggregation.worker.kv_shard import KVShard
from part13_disaggregation.worker.kv_transfer import KVTransferAgent
from part13_disaggregation.worker.kv_wire import (
    PIECE_BYTES,
    WINDOW,
    Ack,
    FetchEnded,
    FetchPrompt,
    Heartbeat,
    ReleasePrompt,
    Status,
    WatchPrompt,
    checksum,
    encode,
)
from tests.part13.wires import (
    LAYOUT,
    NAME,
    NUM_HEADS,
    NUM_LAYERS,
    NUM_TOKENS,
    TIMEOUT_S,
    RealReceiver,
    RealSender,
    ReceiverWorld,
    make_shard,
    turn_until,
    wait_until_lost,
)

LOOK_WATCH = 'Look at worker/kv_receiver.py::KVReceiver.watch and _note_status; README "From engine to engine".'
LOOK_FETCH = 'Look at worker/kv_receiver.py::KVReceiver.fetch and _finish; README "From engine to engine".'
LOOK_STORE = 'Look at worker/kv_receiver.py::KVReceiver._note_piece and _store; README "On the wire".'
LOOK_COUNT = 'Look at worker/kv_receiver.py::Receiving.num_tokens; README "On the wire".'
LOOK_PLAN = 'Look at worker/kv_receiver.py::plan_shares; README "From engine to engine".'
LOOK_RELEASE = 'Look at worker/kv_receiver.py::KVReceiver.release; README "Delayed free".'
LOOK_LOST = 'Look at worker/kv_receiver.py::KVReceiver._lose and send_heartbeats; README "When an engine is lost".'
LOOK_MEMORY = 'Look at worker/kv_receiver.py::connection_data; README "On the wire".'


def started(num_tokens: int = NUM_TOKENS, name: bytes = NAME) -> Status:
    return Status(name, "started", num_tokens)


def only_report(world: ReceiverWorld, look: str) -> Any:
    assert len(world.reports) == 1, f"expected one answer for core, got {world.reports}. {look}"
    return world.reports[0]


# Watching


def test_a_watch_is_answered_when_the_other_engine_has_begun() -> None:
    world = ReceiverWorld()
    world.watch()
    assert world.asked() == [WatchPrompt(NAME, None)], LOOK_WATCH
    for status in (Status(NAME, "unknown"), Status(NAME, "waiting", NUM_TOKENS), started(name=b"another")):
        world.say(status)
        assert not world.reports, f"{status}: it has not begun, and core was told {world.reports}. {LOOK_WATCH}"
    world.say(started())
    done = only_report(world, LOOK_WATCH)
    assert (done.transfer_id, done.num_tokens, done.error) == (1, NUM_TOKENS, None), f"got {done}. {LOOK_WATCH}"
    world.say(started())
    assert len(world.reports) == 1, f"told twice: {world.reports}. {LOOK_WATCH}"


def test_all_sources_must_have_begun() -> None:
    """Two ranks. The smaller number counts, should they differ."""
    world = ReceiverWorld(num_sources=2)
    world.watch()
    world.say(started(20), source=0)
    world.say(started(20), source=0)
    assert not world.reports, f"rank 1 has not begun: {world.reports}. {LOOK_WATCH}"
    world.say(started(17), source=1)
    done = only_report(world, LOOK_WATCH)
    assert done.num_tokens == 17, f"ranks have 20 and 17 tokens: expected 17, got {done.num_tokens}. {LOOK_WATCH}"


def test_another_model_is_not_watched() -> None:
    world = ReceiverWorld(sources=[KVSource("tcp://p", "another layout", 0, NUM_LAYERS, 0, NUM_HEADS)])
    world.watch()
    done = only_report(world, LOOK_WATCH)
    assert done.error == "the other engine has another model" and not done.num_tokens, f"got {done}. {LOOK_WATCH}"
    world.receiver.release(NAME)
    assert world.asked() == [ReleasePrompt(NAME, 1)], f"its blocks are free at once. {LOOK_RELEASE}"


def test_one_source_of_another_model_is_enough() -> None:
    good, bad = (KVSource(f"tcp://{name}", name, 0, NUM_LAYERS, h, 2) for name, h in ((LAYOUT, 0), ("bad", 2)))
    world = ReceiverWorld(sources=[good, bad])
    world.watch()
    assert only_report(world, LOOK_WATCH).error == "the other engine has another model", LOOK_WATCH


def test_what_is_gone_is_not_waited_for() -> None:
    world = ReceiverWorld()
    world.watch()
    world.say(Status(NAME, "gone"))
    done = only_report(world, LOOK_WATCH)
    assert done.error == "the other engine says: gone" and done.num_tokens == 0, f"got {done}. {LOOK_WATCH}"


def test_an_unknown_prompt_times_out() -> None:
    """The proxy asked both engines at once: the other one may hear of it a little later, but not much."""
    world = ReceiverWorld()
    world.watch()
    world.clock.s += TIMEOUT_S
    world.say(Status(NAME, "unknown"))
    assert not world.reports, f"{TIMEOUT_S} s after the watch, it may still come: {world.reports}. {LOOK_WATCH}"
    world.clock.s += 0.1
    world.say(Status(NAME, "waiting", NUM_TOKENS))
    assert not world.reports, f"it waits for blocks, which may take long: {world.reports}. {LOOK_WATCH}"
    world.say(Status(NAME, "unknown"))
    assert only_report(world, LOOK_WATCH).error == "the other engine says: unknown", LOOK_WATCH


# Fetching


def test_what_is_asked() -> None:
    """Positions 8 to 19, with two sources that have two heads each."""
    world = ReceiverWorld(num_sources=2)
    world.begin(start=8)
    for source, first_head in ((0, 0), (1, 2)):
        expected = FetchPrompt(world.fetch_id, NAME, 0, NUM_LAYERS, first_head, 2, 8, NUM_TOKENS)
        got = world.asked(source)[1:]
        assert got == [expected], f"source {source}: expected {expected}, got {got}. {LOOK_FETCH}"


@pytest.mark.parametrize("start", [0, 8])
def test_a_whole_fetch(start: int) -> None:
    """In any number of pieces; block ids begin with the block of position `start`."""
    world = ReceiverWorld()
    world.begin(start)
    world.asked()
    number = 0
    for begin, end in ((start, 13), (13, NUM_TOKENS)):
        for layer in range(NUM_LAYERS):
            world.send(layer, begin, end, number)
            assert world.asked() == [Ack(number % WINDOW)], f"piece {number} is acknowledged. {LOOK_STORE}"
            number += 1
    assert not world.reports, f"nothing counts until it is confirmed: {world.reports}. {LOOK_FETCH}"
    assert world.marks == 1, f"earlier steps may use the blocks: wait once before the first write. {LOOK_STORE}"
    world.end()
    done = only_report(world, LOOK_FETCH)
    num_bytes = (NUM_TOKENS - start) * NUM_LAYERS * world.shard.bytes_per_token(NUM_HEADS)
    assert (done.transfer_id, done.num_tokens, done.error) == (2, NUM_TOKENS - start, None), f"got {done}. {LOOK_FETCH}"
    assert done.num_bytes == num_bytes == world.receiver.num_bytes_received, f"got {done}. {LOOK_FETCH}"
    if not start:
        world.check_held(NUM_TOKENS, LOOK_STORE)
    assert not world.receiver.receiving and not world.receiver.num_refused, LOOK_FETCH


def test_the_mark_comes_before_the_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    log, write = list[str](), KVShard.write
    monkeypatch.setattr(ReceiverWorld, "wait", lambda _: log.append("wait"))
    monkeypatch.setattr(KVShard, "write", lambda *args: (log.append("write"), write(*args))[1])
    world = ReceiverWorld()
    world.begin()
    world.send(0, 0, 10, 0)
    world.send(0, 10, 20, 1)
    assert log == ["wait", "write", "write"], f"a step in flight may still use the blocks: {log}. {LOOK_STORE}"


def test_both_sources_must_end() -> None:
    world = ReceiverWorld(num_sources=2)
    world.begin()
    for source in (0, 1):
        for layer in range(NUM_LAYERS):
            world.send(layer, 0, NUM_TOKENS, layer, source)
    world.end(source=0)
    world.end(source=0)
    assert not world.reports, f"source 1 has not ended: {world.reports}. {LOOK_FETCH}"
    world.end(source=1)
    assert only_report(world, LOOK_FETCH).num_tokens == NUM_TOKENS, LOOK_FETCH
    world.check_held(NUM_TOKENS, LOOK_STORE)


def test_the_least_of_all_layers_and_sources_counts() -> None:
    """Layer 2 of source 1 ends at position 13."""
    world = ReceiverWorld(num_sources=2)
    world.begin()
    for source in (0, 1):
        for layer in range(NUM_LAYERS):
            end = 13 if (source, layer) == (1, 2) else NUM_TOKENS
            world.send(layer, 0, end, layer, source)
        world.end(source=source)
    done = only_report(world, LOOK_COUNT)
    assert (done.num_tokens, done.error) == (13, "a piece was lost"), f"expected 13 tokens, got {done}. {LOOK_COUNT}"
    world.check_held(13, LOOK_COUNT)


def test_what_is_withdrawn_is_not_used() -> None:
    """All pieces have come, but the step that computed them has failed."""
    for message in (FetchEnded(b"", "withdrawn"), Status(NAME, "gone")):
        world = ReceiverWorld()
        world.begin()
        for layer in range(NUM_LAYERS):
            world.send(layer, 0, NUM_TOKENS, layer)
        if isinstance(message, FetchEnded):
            message.fetch_id = world.fetch_id
        world.say(message)
        done = only_report(world, LOOK_FETCH)
        assert done.num_tokens == 0 and done.error, f"after {message}: expected no tokens, got {done}. {LOOK_FETCH}"


def test_one_source_that_withdraws_is_enough() -> None:
    world = ReceiverWorld(num_sources=2)
    world.begin()
    for source in (0, 1):
        for layer in range(NUM_LAYERS):
            world.send(layer, 0, NUM_TOKENS, layer, source)
    world.end("withdrawn", source=0)
    world.end(source=1)
    done = only_report(world, LOOK_FETCH)
    assert (done.num_tokens, done.error) == (0, "withdrawn"), f"got {done}. {LOOK_FETCH}"


def test_a_fetch_after_its_prompt_was_lost() -> None:
    world = ReceiverWorld()
    world.fetch()
    done = only_report(world, LOOK_FETCH)
    assert (done.transfer_id, done.num_tokens) == (2, 0) and done.error, (
        f"core waits for an answer: {done}. {LOOK_FETCH}"
    )


def test_sources_that_lack_layers() -> None:
    world = ReceiverWorld(sources=[KVSource("tcp://p", LAYOUT, 0, NUM_LAYERS - 1, 0, NUM_HEADS)])
    world.begin()
    done = only_report(world, LOOK_PLAN)
    assert done.error == "the other engine lacks some layers or heads" and not done.num_tokens, f"{done}. {LOOK_PLAN}"
    assert not [each for each in world.asked() if isinstance(each, FetchPrompt)], f"nothing to ask for. {LOOK_PLAN}"


# Pieces that are not as they should be


def with_layers(world: ReceiverWorld, *bad: int) -> None:
    """All layers but these, whole."""
    for number, layer in enumerate(range(NUM_LAYERS)):
        if layer not in bad:
            world.send(layer, 0, NUM_TOKENS, number)


@pytest.mark.parametrize("bit", [0, 1_003, 8 * 256 * 10 - 1])
def test_a_flipped_bit(bit: int) -> None:
    """In the bytes of layer 1's second piece: its first one, of 10 tokens, is good."""
    world = ReceiverWorld()
    world.begin()
    with_layers(world, 1)
    world.send(1, 0, 10, 4)
    piece, data = world.piece(1, 10, 20, 5)
    changed = bytearray(data)
    changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    world.say(piece, bytes(changed))
    assert world.asked()[-1] == Ack(5), f"a damaged piece is acknowledged, too: its slot is free. {LOOK_STORE}"
    world.end()
    done = only_report(world, LOOK_STORE)
    assert (done.num_tokens, done.error) == (10, "a piece was damaged"), f"expected 10 tokens, got {done}. {LOOK_STORE}"
    world.check_held(10, LOOK_STORE)


@pytest.mark.parametrize(
    "changed", [{"layer": 2}, {"start": 0, "end": 10}, {"dtype": "int32"}, {"slot": 6}, {"number": 9}]
)
def test_a_changed_description(changed: dict[str, Any]) -> None:
    """The checksum covers what a piece says of itself: else good bytes would go to the wrong place."""
    world = ReceiverWorld()
    world.begin()
    with_layers(world, 1, 2)
    world.send(1, 0, 10, 4)
    piece, data = world.piece(1, 10, 20, 5)
    world.say(msgspec.structs.replace(piece, **changed), data)
    world.send(2, 0, 20, 10)
    world.end()
    done = only_report(world, LOOK_STORE)
    assert done.num_tokens == 10 and done.error == "a piece was damaged", f"{changed}: got {done}. {LOOK_STORE}"
    world.check_held(10, LOOK_STORE)


def test_a_lost_piece() -> None:
    """Positions 5 to 9 of layer 3 never come. What follows them is not used."""
    world = ReceiverWorld()
    world.begin()
    with_layers(world, 3)
    for number, (start, end) in ((4, (0, 5)), (6, (10, 15)), (7, (15, 20))):
        world.send(3, start, end, number)
    world.end()
    done = only_report(world, LOOK_STORE)
    assert (done.num_tokens, done.error) == (5, "a piece was lost"), f"expected 5 tokens, got {done}. {LOOK_STORE}"
    world.check_held(5, LOOK_STORE)


def test_a_piece_that_is_replayed() -> None:
    """It is refused and counted, and the fetch goes on."""
    world = ReceiverWorld()
    world.begin()
    with_layers(world, 3)
    world.send(3, 0, 10, 4)
    again = world.piece(3, 0, 10, 4)
    world.shard.cache.data[3].flatten(0, 1)[world.BLOCKS[0] * 4].zero_()  # to see whether it is written again
    world.say(*again)
    assert world.receiver.num_refused == 1, f"the same piece again: {world.receiver.num_refused} refused. {LOOK_STORE}"
    assert not world.shard.cache.data[3].flatten(0, 1)[world.BLOCKS[0] * 4].any(), f"it was written again. {LOOK_STORE}"
    world.shard.cache.data[3].flatten(0, 1)[world.BLOCKS[0] * 4] = world.kv[3, 0]
    world.send(3, 10, 20, 5)
    world.end()
    done = only_report(world, LOOK_STORE)
    assert (done.num_tokens, done.error) == (NUM_TOKENS, None), f"got {done}. {LOOK_STORE}"
    world.check_held(NUM_TOKENS, LOOK_STORE)


def test_a_piece_of_a_foreign_fetch() -> None:
    """Of an earlier fetch: its blocks may be of another request by now."""
    world = ReceiverWorld()
    world.begin()
    world.send(0, 0, 20, 0, fetch_id=b"12345678")
    assert world.receiver.num_refused == 1 and world.asked()[-1] == Ack(0), f"refused, and acknowledged. {LOOK_STORE}"
    assert world.marks == 0 and world.receiver.num_bytes_received == 0, f"it was written. {LOOK_STORE}"
    with_layers(world)
    world.end()
    assert only_report(world, LOOK_STORE).num_tokens == NUM_TOKENS, LOOK_STORE


def test_a_piece_of_another_source() -> None:
    """Source 1 sends what source 0 was asked for."""
    world = ReceiverWorld(num_sources=2)
    world.begin()
    piece, data = world.piece(0, 0, 20, 0, source=0)
    world.say(piece, data, source=1)
    assert world.receiver.num_refused == 1 and world.receiver.num_bytes_received == 0, f"it was used. {LOOK_STORE}"


def test_pieces_after_the_end() -> None:
    """The fetch was released, and its last pieces are still on their way."""
    world = ReceiverWorld()
    world.begin()
    late = world.piece(0, 0, 20, 0)
    world.receiver.release(NAME)
    done = only_report(world, LOOK_RELEASE)
    assert (done.num_tokens, done.error) == (0, "released"), f"core waits for the fetch: {done}. {LOOK_RELEASE}"
    world.say(*late)
    world.say(FetchEnded(late[0].fetch_id))
    assert world.receiver.num_refused == 1 and len(world.reports) == 1, f"{world.reports}. {LOOK_STORE}"
    assert bool((world.shard.cache.data == -77.0).all()), f"a block that has another owner was written. {LOOK_STORE}"


@pytest.mark.parametrize(
    "fields",
    [
        {"layer": NUM_LAYERS}, {"layer": -1}, {"layer": 2**40}, {"first_head": 1}, {"num_heads": 3}, {"num_heads": 5},
        {"first_head": -1}, {"first_head": 2**40}, {"num_heads": 0}, {"number": -1},
    ],
)  # fmt: skip
def test_other_layers_and_heads_are_refused(fields: dict[str, int]) -> None:
    """With a checksum that is right."""
    world = ReceiverWorld()
    world.begin()
    for layer in range(3):
        world.send(layer, 0, 20, layer)
    world.send(3, 0, 10, 3)
    piece, data = world.piece(3, 10, 20, 4)
    piece = msgspec.structs.replace(piece, **fields)
    piece.checksum = checksum(piece, memoryview(data))
    world.say(piece, data)
    assert world.receiver.num_refused == 1, f"{fields}: refused are {world.receiver.num_refused}. {LOOK_STORE}"
    world.end()
    done = only_report(world, LOOK_STORE)
    assert done.num_tokens == 10 and done.error, f"{fields}: expected 10 tokens, got {done}. {LOOK_STORE}"
    world.check_held(10, LOOK_STORE)


@pytest.mark.parametrize(
    ("start", "end"),
    [(10, 21), (10, 24), (10, 2**40), (10, 10), (10, 4), (10, -3), (-10, 10), (24, 28), (12, 20), (5, 10)],
)
def test_other_positions_are_refused(start: int, end: int) -> None:
    """Positions 0 to 9 have come; 10 to 19 are expected. Its checksum and its size are right."""
    world = ReceiverWorld()
    world.begin()
    for layer in range(3):
        world.send(layer, 0, 20, layer)
    world.send(3, 0, 10, 3)
    num_tokens = max(0, end - start) if end < 100 else 10
    data = bytes(num_tokens * world.shard.bytes_per_token(NUM_HEADS))
    world.send(3, start, end, 4, data=data)
    if world.receiver.connections:  # else it was lost, with all that was expected of it
        world.end()
    done = only_report(world, LOOK_STORE)
    assert done.num_tokens in (0, 10) and done.error, (
        f"10 tokens are there; after a piece of positions {start} to {end - 1}, {done.num_tokens} should be: {done}. "
        f"{LOOK_STORE}"
    )
    world.check_held(10, LOOK_STORE)


def test_no_more_tokens_than_were_asked_for() -> None:
    """18 tokens, in blocks that have room for 20. With a checksum that is right."""
    world = ReceiverWorld()
    world.begin(end=18)
    for layer in range(NUM_LAYERS):
        world.send(layer, 0, 20, layer)
    if world.receiver.connections:
        world.end()
    done = only_report(world, LOOK_STORE)
    assert done.num_tokens <= 18, f"18 tokens were ordered, and {done.num_tokens} are said to be there. {LOOK_STORE}"


@pytest.mark.parametrize("change", [-1, 1, 32, 256, -2560])
@pytest.mark.parametrize("is_shared", [False, True])
def test_too_many_or_too_few_bytes(change: int, is_shared: bool) -> None:
    """A piece of 10 tokens with the bytes of more, or of none: it costs the connection, and nothing is written."""
    world = ReceiverWorld(is_shared=is_shared)
    world.begin()
    with_layers(world, 3)
    data = bytes(max(0, 10 * world.shard.bytes_per_token(NUM_HEADS) + change))
    world.send(3, 0, 10, 4, data=data)
    if world.receiver.connections:
        world.end()
    done = only_report(world, LOOK_STORE)
    assert done.num_tokens == 0 and done.error, f"{change} bytes: expected no tokens, got {done}. {LOOK_STORE}"
    world.check_held(0, LOOK_STORE)


def test_a_piece_whose_size_is_not_that_of_its_bytes() -> None:
    world = ReceiverWorld()
    world.begin()
    with_layers(world, 3)
    piece, data = world.piece(3, 0, 20, 4)
    piece.num_bytes -= 1
    piece.checksum = checksum(piece, memoryview(data))
    world.say(piece, data)
    world.end()
    done = only_report(world, LOOK_STORE)
    assert (done.num_tokens, done.error) == (0, "a piece was damaged"), f"got {done}. {LOOK_STORE}"


@pytest.mark.parametrize("dtype", ["garbage", "Tensor", "load", "float64", "", "bool"])
def test_a_dtype_that_does_not_fit(dtype: str) -> None:
    """It costs the connection at most; nothing of it is used."""
    world = ReceiverWorld()
    world.begin()
    with_layers(world, 3)
    world.send(3, 0, 20, 4, dtype=dtype)
    if world.receiver.connections:
        world.end()
    done = only_report(world, LOOK_STORE)
    assert done.num_tokens == 0 and done.error, f"dtype {dtype!r}: expected no tokens, got {done}. {LOOK_STORE}"
    world.check_held(0, LOOK_STORE)


def test_garbage_frames_are_counted() -> None:
    world, rng = ReceiverWorld(), np.random.default_rng(1)
    world.begin()
    garbage = [b"", b"\xc1", b"hello", encode(Ack(3)), encode(["Piece", 1])]
    garbage += [b"\xc1" + rng.bytes(30) for _ in range(50)]
    for each in garbage:
        world.say(each)
    assert world.receiver.num_refused == len(garbage), f"{world.receiver.num_refused} of {len(garbage)}. {LOOK_STORE}"
    with_layers(world)
    world.end()
    assert only_report(world, LOOK_STORE).num_tokens == NUM_TOKENS, f"after garbage, it goes on. {LOOK_STORE}"


def test_text_that_is_no_text_is_counted() -> None:
    """msgspec raises UnicodeDecodeError for it, which is no DecodeError."""
    world = ReceiverWorld()
    world.watch()
    world.say(b"\x92\xa5Piec\xbb\x03")
    assert world.receiver.num_refused == 1 and not world.reports, f"got {world.reports}. {LOOK_STORE}"


# Shared memory


def test_pieces_from_shared_memory() -> None:
    """The bytes are in the slot, and the message has no second frame."""
    world = ReceiverWorld(is_shared=True)
    world.begin()
    memory, view = world.connection().memory, world.connection().view
    assert memory is not None and view is not None, LOOK_MEMORY
    assert memory.piece_bytes >= PIECE_BYTES and len(view) == WINDOW * memory.piece_bytes, f"{memory}. {LOOK_MEMORY}"
    [watch, _] = world.asked()
    assert watch == WatchPrompt(NAME, memory), f"the source is told where it is: {watch}. {LOOK_MEMORY}"
    for layer in range(NUM_LAYERS):
        piece, data = world.piece(layer, 0, 20, layer, slot=7 - layer)
        start = piece.slot * memory.piece_bytes
        view[start : start + len(data)] = data
        world.say(piece)
    world.end()
    assert only_report(world, LOOK_MEMORY).num_tokens == NUM_TOKENS, f"got {world.reports}. {LOOK_MEMORY}"
    world.check_held(NUM_TOKENS, LOOK_MEMORY)
    world.receiver.close()


@pytest.mark.parametrize(
    "fields", [{"slot": WINDOW}, {"slot": -1}, {"slot": 2**40}, {"num_bytes": 2**40}, {"num_bytes": -1}]
)
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_slot_or_size_out_of_range(fields: dict[str, int], is_shared: bool) -> None:
    """There are no such bytes, nor are there any without shared memory."""
    world = ReceiverWorld(is_shared=is_shared)
    world.begin()
    with_layers(world, 3)
    piece, _ = world.piece(3, 0, 20, 4)
    piece = msgspec.structs.replace(piece, **fields)
    world.say(piece)
    world.end()
    done = only_report(world, LOOK_MEMORY)
    assert (done.num_tokens, done.error) == (0, "a piece was damaged"), f"{fields}: got {done}. {LOOK_MEMORY}"
    world.receiver.close()


def test_a_piece_ends_in_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots have room for one token. This piece says that it has two: its second one would be the next slot's."""
    monkeypatch.setattr(kv_receiver, "PIECE_BYTES", 1)
    world = ReceiverWorld(is_shared=True)
    world.begin()
    piece, data = world.piece(0, 0, 2, 0)
    view = world.connection().view
    assert view is not None
    view[: len(data)] = data
    world.say(piece)
    assert world.receiver.num_bytes_received == 0 and world.marks == 0, f"another piece's slot was read. {LOOK_MEMORY}"
    world.receiver.close()


def test_a_small_model_and_a_large_one_fit_in_a_slot() -> None:
    """A piece has one token at least, which may be more than PIECE_BYTES."""
    world = ReceiverWorld(is_shared=True)
    world.shard.head_dim = PIECE_BYTES
    world.watch()
    memory = world.connection().memory
    assert memory is not None and memory.piece_bytes == world.shard.bytes_per_token(NUM_HEADS), (
        f"{memory}. {LOOK_MEMORY}"
    )
    world.receiver.close()


def test_the_memory_is_closed_with_its_connection() -> None:
    world = ReceiverWorld(is_shared=True)
    world.watch()
    memory = world.connection().memory
    assert memory is not None
    world.receiver.close()
    with pytest.raises(OSError):
        os.fstat(memory.descriptor)


# Releases, losses and silence


def test_every_rank_releases_at_every_source() -> None:
    """Also what it fetched nothing from: each source waits for all ranks."""
    world = ReceiverWorld(make_shard(heads=range(2)), num_sources=2, num_ranks=2)
    world.begin()
    asked = [world.asked(source) for source in (0, 1)]
    assert [len(each) for each in asked] == [2, 1], f"all its heads are at source 0: {asked}. {LOOK_PLAN}"
    world.receiver.release(NAME)
    for source in (0, 1):
        got = world.asked(source)
        assert got == [ReleasePrompt(NAME, 2)], f"source {source}: got {got}. {LOOK_RELEASE}"
    world.receiver.release(NAME)
    assert world.asked(0) == [] and world.receiver.is_idle, f"released twice. {LOOK_RELEASE}"


def test_a_release_answers_the_watch() -> None:
    world = ReceiverWorld()
    world.watch()
    world.receiver.release(NAME)
    done = only_report(world, LOOK_RELEASE)
    assert (done.transfer_id, done.num_tokens, done.error) == (1, 0, "released"), f"got {done}. {LOOK_RELEASE}"
    world.say(started())
    assert len(world.reports) == 1, f"answered twice: {world.reports}. {LOOK_RELEASE}"


def test_a_silent_source_times_out() -> None:
    """Its machine is off: the connection stays, and no message comes."""
    world = ReceiverWorld()
    world.watch()
    world.clock.s += TIMEOUT_S
    world.receiver.send_heartbeats()
    assert not world.reports, f"{TIMEOUT_S} s of silence are allowed: {world.reports}. {LOOK_LOST}"
    world.clock.s += 0.1
    world.receiver.send_heartbeats()
    done = only_report(world, LOOK_LOST)
    assert done.error == f"no answer for {TIMEOUT_S:g} s", f"got {done}. {LOOK_LOST}"
    assert not world.receiver.connections and world.receiver.is_idle, f"the connection is given up. {LOOK_LOST}"


def test_a_source_that_answers_is_not_silent() -> None:
    """The silence begins with the first question that was not answered, not with the last one."""
    world = ReceiverWorld()
    world.watch()
    for _ in range(10):
        world.clock.s += 0.9 * TIMEOUT_S
        world.say(Status(NAME, "waiting", NUM_TOKENS))
        world.receiver.send_heartbeats()
    assert not world.reports, f"it answers every heartbeat: {world.reports}. {LOOK_LOST}"
    for _ in range(3):
        world.clock.s += 0.4 * TIMEOUT_S
        world.receiver.send_heartbeats()
    assert world.reports, f"three heartbeats within {1.2 * TIMEOUT_S} s were not answered. {LOOK_LOST}"


def test_a_source_that_was_asked_nothing_is_not_silent() -> None:
    world = ReceiverWorld()
    world.watch()
    world.say(started())
    world.receiver.release(NAME)
    world.clock.s += 100 * TIMEOUT_S
    world.receiver.send_heartbeats()
    assert world.receiver.connections, f"nothing was asked, so nothing is overdue. {LOOK_LOST}"
    assert world.asked()[1:] == [ReleasePrompt(NAME, 1)], f"and nothing is wanted: no heartbeat. {LOOK_LOST}"


def test_heartbeats_name_what_is_wanted() -> None:
    world = ReceiverWorld()
    world.watch()
    world.watch(2, b"b")
    world.asked()
    world.receiver.send_heartbeats()
    assert world.asked() == [Heartbeat([NAME, b"b"])], LOOK_LOST
    world.receiver.release(NAME)
    world.asked()
    world.receiver.send_heartbeats()
    assert world.asked() == [Heartbeat([b"b"])], f"what was released is not wanted. {LOOK_LOST}"


def test_heartbeats_name_what_this_source_has() -> None:
    """Another engine hears nothing of it."""
    world = ReceiverWorld()
    world.watch()
    elsewhere = KVSource("tcp://other", LAYOUT, 0, NUM_LAYERS, 0, NUM_HEADS)
    world.receiver.watch(Watch(7, b"b", [elsewhere]))
    world.asked()
    world.receiver.send_heartbeats()
    assert world.asked() == [Heartbeat([NAME])], f"the prompt b is at another engine. {LOOK_LOST}"


def test_a_fetch_ends_when_a_source_is_lost() -> None:
    """Half of the pieces have come. They were not confirmed, and the other source is told to let go."""
    world = ReceiverWorld(num_sources=2)
    world.begin()
    for layer in range(NUM_LAYERS):
        world.send(layer, 0, NUM_TOKENS, layer, source=1)
    world.end(source=1)
    world.asked(1)
    world.clock.s += TIMEOUT_S + 1
    other = world.connection(1)
    other.waiting_since_s = None
    world.receiver.send_heartbeats()
    done = only_report(world, LOOK_LOST)
    assert done.num_tokens == 0 and done.error == f"no answer for {TIMEOUT_S:g} s", f"got {done}. {LOOK_LOST}"
    assert ReleasePrompt(NAME, 1) in world.asked(1), f"source 1 still holds its blocks. {LOOK_LOST}"
    world.reports.clear()
    world.receiver.release(NAME)
    assert not world.reports, f"core's release finds nothing to do. {LOOK_LOST}"


def test_a_lost_source_costs_only_its_own_prompts() -> None:
    world = ReceiverWorld()
    world.watch()
    elsewhere = KVSource("tcp://other", LAYOUT, 0, NUM_LAYERS, 0, NUM_HEADS)
    world.receiver.watch(Watch(7, b"b", [elsewhere]))
    world.receiver._lose(world.connection(), "the connection is lost")
    assert [done.transfer_id for done in world.reports] == [1], f"only the first watch is lost. {LOOK_LOST}"
    assert list(world.receiver.watched) == [b"b"], LOOK_LOST


@pytest.mark.parametrize("kind", ["watch", "fetch"])
def test_an_order_to_a_source_that_was_lost_a_moment_ago(kind: str) -> None:
    """The socket refuses to send (zmq.Again), and the monitor's event is still to come. Core hears of it once: it has
    dropped the transfer with the first answer, and would fail every request at the second one."""
    source, target = RealSender(make_shard()), RealReceiver(make_shard())
    try:
        target.receiver.watch(Watch(1, NAME, [source.source]))
        assert source.socket.poll(5_000), "the source should hear of the watch"
        source.close()
        wait_until_lost(target.receiver.connections[source.source.address])
        if kind == "watch":
            order: Any = Watch(3, b"another", [source.source])
            answer_like_the_agent(target, lambda: target.receiver.watch(order), order)
        else:
            order = Fetch(3, NAME, 0, NUM_TOKENS, [1, 2, 3, 4, 5])
            answer_like_the_agent(target, lambda: target.receiver.fetch(order, target), order)  # type: ignore[arg-type]
        assert turn_until(lambda: not target.receiver.connections, target), f"nothing was noticed. {LOOK_LOST}"
        answers = [done.error for done in target.reports if done.transfer_id == 3]
        assert len(answers) == 1, (
            f"a {kind} at a source that has just been lost: expected one answer, got {answers}. {LOOK_LOST}"
        )
    finally:
        source.close()
        target.close()


def answer_like_the_agent(target: RealReceiver, work: Any, order: Any) -> None:
    """worker/kv_transfer.py::KVTransferAgent._answer, with this receiver."""
    agent: Any = SimpleNamespace(report=target.reports.append)
    KVTransferAgent._answer(agent, order, work)


# Who sends what


def connections(*parts: tuple[range, range]) -> Any:
    return [
        SimpleNamespace(source=KVSource(str(n), LAYOUT, layers.start, len(layers), heads.start, len(heads)))
        for n, (layers, heads) in enumerate(parts)
    ]


ALL, LOW, HIGH = range(4), range(2), range(2, 4)


@pytest.mark.parametrize(
    ("what", "sources", "own", "expected"),
    [
        ("tp 1 to tp 1", [(ALL, ALL)], (ALL, ALL), [(0, ALL, ALL)]),
        ("tp 2 to tp 1", [(ALL, LOW), (ALL, HIGH)], (ALL, ALL), [(0, ALL, LOW), (1, ALL, HIGH)]),
        ("tp 1 to tp 2", [(ALL, ALL)], (ALL, HIGH), [(0, ALL, HIGH)]),
        ("tp 2 to tp 2", [(ALL, LOW), (ALL, HIGH)], (ALL, HIGH), [(1, ALL, HIGH)]),
        ("tp 4 to tp 2", [(ALL, range(h, h + 1)) for h in ALL], (ALL, LOW), [(h, ALL, range(h, h + 1)) for h in LOW]),
        ("pp 2 to pp 1", [(LOW, ALL), (HIGH, ALL)], (ALL, ALL), [(0, LOW, ALL), (1, HIGH, ALL)]),
        ("pp 1 to pp 2", [(ALL, ALL)], (HIGH, ALL), [(0, HIGH, ALL)]),
        ("replicated heads to tp 1", [(ALL, LOW), (ALL, LOW), (ALL, HIGH), (ALL, HIGH)], (ALL, ALL),
         [(0, ALL, LOW), (2, ALL, HIGH)]),
        ("pp 2 and tp 2 to tp 1", [(LOW, LOW), (LOW, HIGH), (HIGH, LOW), (HIGH, HIGH)], (ALL, ALL),
         [(0, LOW, LOW), (1, LOW, HIGH), (2, HIGH, LOW), (3, HIGH, HIGH)]),
        ("a layer is missing", [(range(3), ALL)], (ALL, ALL), []),
        ("a head is missing", [(ALL, range(2))], (ALL, ALL), []),
        ("a stage is missing", [(range(2), ALL)], (range(2, 4), ALL), []),
        ("one quarter is missing", [(ALL, LOW), (LOW, HIGH)], (ALL, ALL), []),
        ("no source", [], (ALL, ALL), []),
    ],
)  # fmt: skip
def test_shares(what: str, sources: Any, own: tuple[range, range], expected: Any) -> None:
    """Every layer and head of the rank once, each from a source that has it."""
    shares = plan_shares(connections(*sources), make_shard(*own), 8)
    got = [(int(share.connection.source.address), share.layers, share.heads) for share in shares]
    assert got == expected, f"{what}: expected (source, layers, heads) {expected}, got {got}. {LOOK_PLAN}"
    for share in shares:
        assert share.arrived == dict.fromkeys(share.layers, 8), (
            f"{what}: each begins at 8: {share.arrived}. {LOOK_PLAN}"
        )


def test_layers_in_any_order() -> None:
    """Pieces of two layers may come in any order, but each layer's in its own."""
    world = ReceiverWorld()
    world.begin()
    for number, (layer, start, end) in enumerate(
        [(3, 0, 7), (0, 0, 20), (3, 7, 20), (2, 0, 20), (1, 0, 1), (1, 1, 20)]
    ):
        world.send(layer, start, end, number)
    world.end()
    assert only_report(world, LOOK_STORE).num_tokens == NUM_TOKENS, LOOK_STORE
    world.check_held(NUM_TOKENS, LOOK_STORE)


def test_other_dtypes_arrive() -> None:
    """The source has bfloat16; the numbers here are such that nothing is rounded."""
    world = ReceiverWorld()
    world.begin()
    for layer in range(NUM_LAYERS):
        data = world.kv[layer].to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
        world.send(layer, 0, NUM_TOKENS, layer, data=data, dtype="bfloat16")
    world.end()
    assert only_report(world, LOOK_STORE).num_tokens == NUM_TOKENS, f"got {world.reports}. {LOOK_STORE}"
    world.check_held(NUM_TOKENS, LOOK_STORE)


def test_two_fetches_at_once() -> None:
    """Each has an id of its own, and ends by itself."""
    world = ReceiverWorld()
    world.begin()
    world.watch(5, b"b")
    world.say(started(name=b"b"))
    world.reports.clear()
    first = world.fetch_id
    world.fetch(transfer_id=6, name=b"b")
    ids = [each for each in world.receiver.receiving if each != first]
    assert len(ids) == 1, f"two fetches have {len(world.receiver.receiving)} ids. {LOOK_FETCH}"
    world.say(FetchEnded(ids[0], "withdrawn"))
    assert [(done.transfer_id, done.num_tokens) for done in world.reports] == [(6, 0)], f"{world.reports}. {LOOK_FETCH}"
    assert list(world.receiver.receiving) == [first], f"the first fetch goes on. {LOOK_FETCH}"
