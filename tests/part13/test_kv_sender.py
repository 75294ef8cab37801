"""worker/kv_sender.py: leases, who is told what, and which pieces go out in which order."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from part13_disaggregation.worker import kv_sender
from part13_disaggregation.worker.kv_receiver import make_memory
from part13_disaggregation.worker.kv_sender import map_memory
from part13_disaggregation.worker.kv_wire import (
    WINDOW,
    Ack,
    FetchEnded,
    FetchPrompt,
    Heartbeat,
    Piece,
    ReleasePrompt,
    SharedMemory,
    Status,
    WatchPrompt,
    checksum,
    encode,
)
from tests.part13.wires import HEAD_DIM, NAME, NUM_HEADS, NUM_LAYERS, NUM_TOKENS, SenderWorld, make_shard

LOOK_LEASE = 'Look at worker/kv_sender.py::KVSender._extend_lease and check_leases; README "Delayed free".'
LOOK_RELEASE = 'Look at worker/kv_sender.py::KVSender._release and _end_if_released; README "Delayed free".'
LOOK_STATUS = 'Look at worker/kv_sender.py::KVSender._status and _tell_watchers; README "From engine to engine".'
LOOK_PIECES = 'Look at worker/kv_sender.py::Sending.next and KVSender._send_pieces; README "On the wire".'
LOOK_CONFIRM = 'Look at worker/kv_sender.py::KVSender.confirm and _end_fetches; README "From engine to engine".'
LOOK_MEMORY = 'Look at worker/kv_sender.py::map_memory and KVSender._send_piece; README "On the wire".'
LOOK_REFUSE = 'Look at worker/kv_sender.py::KVSender.receive and _fetch; README "On the wire".'
LOOK_LOST = 'Look at worker/kv_sender.py::KVSender.check_leases; README "When an engine is lost".'
BYTES_PER_TOKEN = 2 * NUM_HEADS * HEAD_DIM * 4


def fetch(fetch_id: bytes = b"f", start: int = 0, end: int = NUM_TOKENS, **fields: Any) -> FetchPrompt:
    found = FetchPrompt(fetch_id, NAME, 0, NUM_LAYERS, 0, NUM_HEADS, start, end)
    return msgspec.structs.replace(found, **fields)


def errors(world: SenderWorld) -> list[str | None]:
    return [done.error for done in world.reports]


# Leases


def test_a_lease_ends_at_its_end_and_not_before() -> None:
    """The receiver is killed: it says nothing more, and releases nothing."""
    world = SenderWorld(lease_s=2.0)
    world.compute()
    world.pass_s(2.0)
    assert not world.reports, f"2 s after it was computed, a lease of 2 s has not passed: {world.reports}. {LOOK_LEASE}"
    world.pass_s(0.001)
    assert errors(world) == ["the lease has ended"] and world.reports[0].transfer_id == 1, (
        f"2.001 s after: expected the offer's end, got {world.reports}; until then, its blocks are taken. {LOOK_LEASE}"
    )
    assert world.sender.num_expired == 1 and world.sender.is_idle, LOOK_LEASE


def test_a_lease_begins_when_the_prompt_is_confirmed() -> None:
    """A prompt may wait in the queue, and be computed, for longer than a lease."""
    world = SenderWorld(lease_s=2.0)
    world.offer()
    world.pass_s(100.0)
    world.publish()
    world.pass_s(100.0)
    assert not world.reports, f"it is not computed yet, so nobody can have fetched it: {world.reports}. {LOOK_LEASE}"
    world.sender.confirm(NAME)
    world.pass_s(1.9)
    assert not world.reports, f"1.9 s after it was confirmed: {world.reports}. {LOOK_LEASE}"
    world.pass_s(0.2)
    assert errors(world) == ["the lease has ended"], f"2.1 s after: {world.reports}. {LOOK_LEASE}"


def test_a_heartbeat_does_not_begin_a_lease() -> None:
    """While the prompt is computed, its request holds the blocks, however long that takes."""
    world = SenderWorld()
    world.offer()
    world.say(WatchPrompt(NAME, None))
    world.heartbeat()
    world.pass_s(100.0)
    assert not world.reports, f"it isn't computed yet, and its offer has ended: {world.reports}. {LOOK_LEASE}"


def test_a_heartbeat_extends_a_lease_by_two_thirds() -> None:
    """From when it is heard: 30 s, then 20 s after each heartbeat."""
    world = SenderWorld()
    world.say(WatchPrompt(NAME, None))
    world.compute()
    world.pass_s(29.0)
    world.heartbeat()  # until 49
    world.pass_s(20.0)
    assert not world.reports, f"20 s after a heartbeat, the lease should still run: {world.reports}. {LOOK_LEASE}"
    world.pass_s(0.1)
    assert errors(world) == ["the lease has ended"], (
        f"20.1 s after the last heartbeat, 49.1 s after it was computed: got {world.reports}. {LOOK_LEASE}"
    )


def test_a_heartbeat_never_shortens_a_lease() -> None:
    world = SenderWorld()
    world.say(WatchPrompt(NAME, None))
    world.compute()
    world.heartbeat()  # until 20, if it were not 30 already
    world.pass_s(30.0)
    assert not world.reports, f"a heartbeat in the first second ended the lease before its 30 s. {LOOK_LEASE}"
    world.pass_s(0.1)
    assert errors(world) == ["the lease has ended"], LOOK_LEASE


@pytest.mark.parametrize("message", [WatchPrompt(NAME, None), fetch()])
def test_whoever_asks_is_heard_of(message: Any) -> None:
    """A watch or a fetch in the last second counts like a heartbeat."""
    world = SenderWorld()
    world.compute()
    world.pass_s(29.0)
    world.say(message)
    world.pass_s(2.0)
    assert not world.reports, f"{message} came at 29 s; at 31 s, the lease has ended: {world.reports}. {LOOK_LEASE}"


def test_heartbeats_of_other_prompts_do_not_count() -> None:
    world = SenderWorld()
    world.compute()
    world.pass_s(29.0)
    world.say(Heartbeat([b"another prompt"]))
    world.pass_s(2.0)
    assert errors(world) == ["the lease has ended"], f"nobody asked for this prompt. {LOOK_LEASE}"


def test_a_receiver_is_told_that_the_lease_has_ended() -> None:
    """It is in the middle of a fetch. From then on, the blocks are of others."""
    world = SenderWorld(lease_s=2.0)
    world.offer()
    world.publish(layers=[0, 1])
    world.say(WatchPrompt(NAME, None), fetch())
    world.sender.confirm(NAME)  # some layers have not come: the rank will not send them
    world.heard()
    world.pass_s(2.1)
    assert world.messages() == [FetchEnded(b"f", "the lease has ended"), Status(NAME, "gone")], LOOK_LEASE
    world.publish()
    world.say(Ack(0))
    assert world.messages() == [], f"after its end, blocks of an offer were read and sent. {LOOK_LEASE}"


# Releases


def test_an_offer_ends_when_all_ranks_have_released_it() -> None:
    """The other engine has two ranks. One of them may still read."""
    world = SenderWorld()
    world.say(WatchPrompt(NAME, None), identity=b"d0")
    world.say(WatchPrompt(NAME, None), identity=b"d1")
    world.compute()
    world.say(ReleasePrompt(NAME, 2), identity=b"d0")
    assert not world.reports, f"1 of 2 ranks has released it, and it ended: {world.reports}. {LOOK_RELEASE}"
    world.say(ReleasePrompt(NAME, 2), identity=b"d0")
    assert not world.reports, f"the same rank again, and it counted twice. {LOOK_RELEASE}"
    world.say(ReleasePrompt(NAME, 2), identity=b"d1")
    assert errors(world) == ["released"], f"2 of 2 ranks: expected its end, got {world.reports}. {LOOK_RELEASE}"
    world.offer(transfer_id=2)
    assert len(world.reports) == 1, f"offered again, the old releases do not count: {world.reports}. {LOOK_RELEASE}"


def test_a_release_may_come_before_the_offer() -> None:
    """A client has left early, and this engine's scheduler is slow."""
    world = SenderWorld()
    world.say(ReleasePrompt(NAME, 2), identity=b"d0")
    world.offer()
    assert not world.reports, f"1 of 2 ranks: {world.reports}. {LOOK_RELEASE}"
    world.say(ReleasePrompt(NAME, 2), identity=b"d1")
    assert errors(world) == ["released"], f"got {world.reports}. {LOOK_RELEASE}"
    for identity in (b"d0", b"d1"):
        world.say(ReleasePrompt(b"another", 2), identity=identity)
    world.offer(b"another", 2)
    assert errors(world) == ["released", "released"], f"both came before the offer: {world.reports}. {LOOK_RELEASE}"
    assert world.reports[1].transfer_id == 2, f"{world.reports}. {LOOK_RELEASE}"


def test_early_releases_are_forgotten() -> None:
    """No offer ever came: nothing may grow forever."""
    world = SenderWorld()
    world.say(ReleasePrompt(NAME, 1))
    world.pass_s(30.0)
    assert world.sender.releases, f"after 30 s, it is still known. {LOOK_RELEASE}"
    world.pass_s(0.1)
    assert not world.sender.releases, f"after more than a lease: {world.sender.releases}. {LOOK_RELEASE}"


def test_nothing_is_sent_after_a_release() -> None:
    world = SenderWorld()
    world.offer()
    world.publish(layers=[0])
    for identity in (b"d0", b"d1"):
        world.say(WatchPrompt(NAME, None), fetch(), identity=identity)
    world.say(ReleasePrompt(NAME, 2), identity=b"d0")
    world.heard(b"d0"), world.heard(b"d1")
    world.publish(layers=[1])
    world.say(Ack(0), identity=b"d0")
    assert world.messages(b"d0") == [], f"a rank that has released a prompt gets more of it. {LOOK_RELEASE}"
    assert [each.layer for each in world.messages(b"d1")] == [1], f"the other one goes on. {LOOK_RELEASE}"


def test_blocks_are_not_read_after_the_end() -> None:
    """Not by a publish that was on its way, nor for an ack, a heartbeat or a confirm that comes late."""
    world = SenderWorld()
    world.say(WatchPrompt(NAME, None))
    world.offer()
    world.publish(layers=[0])
    world.say(fetch())
    world.sender.withdraw(NAME)
    assert errors(world) == ["withdrawn"], LOOK_RELEASE
    num_sent = world.sender.num_bytes_sent
    world.publish()
    world.sender.confirm(NAME)
    world.sender.withdraw(NAME)
    world.say(Ack(0), Heartbeat([NAME]), WatchPrompt(NAME, None))
    assert world.sender.num_bytes_sent == num_sent and len(world.reports) == 1, (
        f"after its end, an offer was read or reported again: {world.reports}. {LOOK_RELEASE}"
    )


# Who is told what


def test_statuses() -> None:
    """unknown, waiting, started, gone: and the watcher hears of each change."""
    world = SenderWorld()
    world.say(WatchPrompt(NAME, None))
    assert world.messages() == [Status(NAME, "unknown")], LOOK_STATUS
    world.offer()
    assert world.messages() == [Status(NAME, "waiting", NUM_TOKENS)], f"told when it is offered. {LOOK_STATUS}"
    world.publish(4, [0])
    assert world.messages() == [Status(NAME, "started", NUM_TOKENS)], (
        f"told when its first layer is there, and how many tokens it will have. {LOOK_STATUS}"
    )
    world.publish(8)
    assert world.messages() == [], f"told once. {LOOK_STATUS}"
    world.heartbeat()
    assert world.messages() == [Status(NAME, "started", NUM_TOKENS)], f"a heartbeat is answered. {LOOK_STATUS}"
    world.sender.withdraw(NAME)
    assert world.messages() == [Status(NAME, "gone")], LOOK_STATUS
    world.heartbeat()
    assert world.messages() == [Status(NAME, "gone")], f"who asks too late should not wait. {LOOK_STATUS}"
    world.pass_s(30.0)
    world.heartbeat()
    assert world.messages() == [Status(NAME, "gone")], f"nor who asks within a lease. {LOOK_STATUS}"
    world.pass_s(0.1)
    world.heartbeat()
    assert world.messages() == [Status(NAME, "unknown")], f"after a lease, it is forgotten. {LOOK_STATUS}"


def test_only_watchers_are_told() -> None:
    world = SenderWorld()
    world.say(WatchPrompt(b"another", None), identity=b"d1")
    world.heard(b"d1")
    world.compute()
    assert world.messages(b"d1") == [], f"of a prompt that it did not ask for. {LOOK_STATUS}"


# Pieces


def test_layers_are_sent_as_soon_as_they_are_computed() -> None:
    """The fetch came before anything was ready. Chunk by chunk, and layer by layer in each."""
    world = SenderWorld()
    world.offer()
    world.say(WatchPrompt(NAME, None))
    world.publish(4, [0])
    world.say(fetch(start=4))
    world.heard()
    got: list[tuple[int, int, int]] = []
    for num_tokens in (4, 10, 20):
        for layer in range(NUM_LAYERS):
            world.publish(num_tokens, [layer])
            pieces = world.messages()
            got += [(piece.layer, piece.start, piece.end) for piece in pieces]
            world.say(*[Ack(piece.slot) for piece in pieces])
    expected = [(layer, *span) for span in ((4, 10), (10, 20)) for layer in range(NUM_LAYERS)]
    assert got == expected, f"expected pieces {expected}, got {got}. {LOOK_PIECES}"
    world.say(Ack(0))
    assert world.messages() == [], f"all is sent, and not confirmed: the fetch has not ended. {LOOK_CONFIRM}"
    world.sender.confirm(NAME)
    assert world.messages() == [FetchEnded(b"f")], f"now it is right, and the receiver may use it. {LOOK_CONFIRM}"


def test_an_incomplete_fetch_does_not_end() -> None:
    """Confirmed, but one layer has not been noted: steps and layers are noted in different threads."""
    world = SenderWorld()
    world.offer()
    world.say(WatchPrompt(NAME, None))
    world.publish(layers=range(3))
    world.say(fetch())
    world.sender.confirm(NAME)
    assert not [each for each in world.messages() if isinstance(each, FetchEnded)], (
        f"layer 3 is missing. {LOOK_CONFIRM}"
    )
    world.publish(layers=[3])
    piece, ended = world.messages()
    assert piece.layer == 3 and ended == FetchEnded(b"f"), f"got {piece}, {ended}. {LOOK_CONFIRM}"


def test_a_publish_never_goes_back() -> None:
    """After a preemption, a prompt is computed again from its beginning, if it is still offered."""
    world = SenderWorld()
    world.offer()
    world.publish(20, [0])
    world.publish(8, [0])
    world.say(WatchPrompt(NAME, None), fetch(num_layers=1))
    assert [(each.start, each.end) for each in world.messages() if isinstance(each, Piece)] == [(0, 20)], LOOK_PIECES


def test_at_most_a_window_of_pieces_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that does not keep up must not fill the memory of either side."""
    monkeypatch.setattr(kv_sender, "PIECE_BYTES", BYTES_PER_TOKEN)
    world = SenderWorld()
    world.compute()
    world.say(WatchPrompt(NAME, None), fetch())
    pieces = [each for each in world.messages() if isinstance(each, Piece)]
    assert len(pieces) == WINDOW, f"{len(pieces)} pieces before the first ack, expected {WINDOW}. {LOOK_PIECES}"
    assert sorted(piece.slot for piece in pieces) == list(range(WINDOW)), f"each its own slot. {LOOK_PIECES}"
    for _ in range(3):  # the same ack again, and two that make no sense
        world.say(Ack(3))
        world.say(Ack(WINDOW), Ack(-1))
        [piece] = world.messages()
        assert piece.slot == 3, f"slot 3 is free: expected one piece there, got {piece}. {LOOK_PIECES}"
        pieces.append(piece)
    while len(pieces) < 80:
        world.say(Ack(pieces[len(pieces) - WINDOW].slot))
        pieces += [each for each in world.messages() if isinstance(each, Piece)]
    spans = [(piece.layer, piece.start, piece.end) for piece in pieces]
    expected = [(layer, token, token + 1) for layer in range(NUM_LAYERS) for token in range(NUM_TOKENS)]
    assert spans == expected, f"every token of every layer once, layer by layer. {LOOK_PIECES}"
    assert [piece.number for piece in pieces] == list(range(80)), f"pieces are numbered. {LOOK_PIECES}"


def test_a_slot_that_is_free_is_not_freed_again() -> None:
    """A replayed ack must not let two pieces into one slot."""
    world = SenderWorld()
    world.say(*[Ack(slot) for slot in (0, 1, 1, WINDOW, -1, 2**40)])
    free = sorted(world.sender.receivers[b"d0"].free_slots)
    assert free == list(range(WINDOW)), f"expected slots 0 to {WINDOW - 1} once, got {free}. {LOOK_PIECES}"


@pytest.mark.parametrize(
    ("most_bytes", "expected"),
    [(3, [1] * 20), (BYTES_PER_TOKEN * 7 // 2, [3] * 6 + [2]), (BYTES_PER_TOKEN * 2 - 1, [1] * 20), (10**6, [20])],
)
def test_pieces_have_a_limit(most_bytes: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many bytes, but one token at least."""
    monkeypatch.setattr(kv_sender, "PIECE_BYTES", most_bytes)
    world = SenderWorld()
    world.compute()
    world.say(WatchPrompt(NAME, None), fetch(num_layers=1))
    got: list[int] = []
    while pieces := [each for each in world.messages() if isinstance(each, Piece)]:
        got += [piece.end - piece.start for piece in pieces]
        world.say(*[Ack(piece.slot) for piece in pieces])
    assert got == expected, f"expected pieces of {expected} tokens, got {got}. {LOOK_PIECES}"


def test_fetches_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt must not keep out a short one of the same receiver."""
    monkeypatch.setattr(kv_sender, "PIECE_BYTES", BYTES_PER_TOKEN)
    world = SenderWorld()
    world.compute()
    world.offer(b"b", 2)
    world.publish(name=b"b")
    world.say(WatchPrompt(NAME, None), WatchPrompt(b"b", None), fetch(b"1"), fetch(b"2", name=b"b"))
    got = [each.fetch_id for each in world.messages() if isinstance(each, Piece)]
    assert got == [b"1"] * WINDOW, f"{got}. {LOOK_PIECES}"
    got = []
    for slot in range(WINDOW):
        world.say(Ack(slot))
        got += [each.fetch_id for each in world.messages() if isinstance(each, Piece)]
    assert sorted(got) == [b"1"] * 4 + [b"2"] * 4, f"expected turns, got {got}. {LOOK_PIECES}"


def test_what_a_piece_says_is_true() -> None:
    """Bytes, checksum, dtype and size."""
    world = SenderWorld(make_shard(dtype=torch.bfloat16))
    world.compute()
    world.say(WatchPrompt(NAME, None), fetch(start=8, end=15, first_head=1, num_heads=2))
    pieces = [(each, data) for each, data in world.heard() if isinstance(each, Piece)]
    assert len(pieces) == NUM_LAYERS, LOOK_PIECES
    for layer, (piece, data) in enumerate(pieces):
        expected = world.kv[layer, 8:15, :, 1:3].to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        assert data == expected, (
            f"layer {layer}: the bytes are others than tokens 8 to 14, heads 1 and 2. {LOOK_PIECES}"
        )
        got = (piece.layer, piece.first_head, piece.num_heads, piece.start, piece.end, piece.dtype, piece.num_bytes)
        assert got == (layer, 1, 2, 8, 15, "bfloat16", len(expected)), f"the piece says {got}. {LOOK_PIECES}"
        assert piece.checksum == checksum(piece, memoryview(data)), f"its checksum is wrong. {LOOK_PIECES}"
    assert world.sender.num_bytes_sent == sum(len(data) for _, data in pieces if data is not None), LOOK_PIECES


def test_a_stage_sends_its_layers_by_their_numbers_in_the_model() -> None:
    """Its first layer is layer 1 of the model, and 0 for its model runner; the receiver wants layers 2 and 3."""
    world = SenderWorld(make_shard(layers=range(1, 4)))
    world.offer()
    world.say(WatchPrompt(NAME, None))
    world.publish(layers=[2])
    world.say(fetch(first_layer=2, num_layers=2))
    [(piece, data)] = [(each, data) for each, data in world.heard() if isinstance(each, Piece)]
    assert piece.layer == 3 and data == world.kv[3].contiguous().numpy().tobytes(), f"{piece}. {LOOK_PIECES}"


# Shared memory


def test_pieces_go_through_shared_memory() -> None:
    """Then the message has no second frame, and the bytes are in the piece's slot."""
    memory, view = make_memory(NUM_TOKENS * BYTES_PER_TOKEN)
    try:
        world = SenderWorld()
        world.compute()
        world.say(WatchPrompt(NAME, memory), fetch())
        pieces = [(each, data) for each, data in world.heard() if isinstance(each, Piece)]
        assert all(data is None for _, data in pieces) and len(pieces) == NUM_LAYERS, LOOK_MEMORY
        for piece, _ in pieces:
            start = piece.slot * memory.piece_bytes
            data = view[start : start + piece.num_bytes]
            assert data == world.kv[piece.layer].numpy().tobytes(), f"slot {piece.slot} has others. {LOOK_MEMORY}"
            assert piece.checksum == checksum(piece, memoryview(data)), LOOK_MEMORY
    finally:
        os.close(memory.descriptor)


def test_a_piece_that_is_too_big_for_a_slot_goes_through_the_socket() -> None:
    """Else it would run into the next slot."""
    memory, view = make_memory(NUM_TOKENS * BYTES_PER_TOKEN - 1)
    try:
        world = SenderWorld()
        world.compute()
        world.say(WatchPrompt(NAME, memory), fetch())
        pieces = [(each, data) for each, data in world.heard() if isinstance(each, Piece)]
        assert all(data is not None and len(data) == each.num_bytes for each, data in pieces), LOOK_MEMORY
        assert not any(view[:]), f"shared memory was written all the same. {LOOK_MEMORY}"
    finally:
        os.close(memory.descriptor)


def test_memory_of_another_machine_is_not_mapped() -> None:
    """There is no such process here: pieces then have their bytes with them."""
    assert map_memory(SharedMemory(2**22 + 5, 3, 100, "kv-1")) is None, LOOK_MEMORY
    world = SenderWorld()
    world.compute()
    world.say(WatchPrompt(NAME, SharedMemory(2**22 + 5, 3, 2**20, "kv-1")), fetch())
    assert all(data is not None for each, data in world.heard() if isinstance(each, Piece)), LOOK_MEMORY


def test_memory_that_is_too_small_is_not_mapped() -> None:
    memory, _ = make_memory(100)
    try:
        assert map_memory(msgspec.structs.replace(memory, piece_bytes=10**9)) is None, LOOK_MEMORY
    finally:
        os.close(memory.descriptor)


def test_a_file_is_not_shared_memory() -> None:
    """In another container, the receiver's process id may be that of any process, and its descriptor that of any file:
    to write KV there would destroy it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "somebody's file"
        path.write_bytes(bytes(WINDOW * mmap.PAGESIZE))
        with path.open("r+b") as file:
            got = map_memory(SharedMemory(os.getpid(), file.fileno(), mmap.PAGESIZE, "kv-1"))
            assert got is None, f"{path.name!r} was opened for writing as if it were a receiver's memory. {LOOK_MEMORY}"


# Nonsense


@pytest.mark.parametrize(
    "fields",
    [
        {"first_layer": 1}, {"first_layer": -1}, {"num_layers": 5}, {"first_head": 3},
        {"first_head": -1, "num_heads": 1}, {"num_heads": 5}, {"start": -1}, {"end": NUM_TOKENS + 1},
        {"start": 8, "end": 8}, {"start": 9, "end": 4}, {"first_layer": 2**60}, {"end": 2**60},
    ],
)  # fmt: skip
def test_a_fetch_of_what_is_not_here_is_refused(fields: dict[str, int]) -> None:
    """Nothing is read outside of the pool's part and the prompt's blocks."""
    world = SenderWorld()
    world.compute()
    world.say(WatchPrompt(NAME, None))
    world.heard()
    world.say(fetch(**fields))
    assert world.messages() == [FetchEnded(b"f", "no such part")], f"with {fields}. {LOOK_REFUSE}"
    assert world.sender.num_bytes_sent == 0, f"with {fields}. {LOOK_REFUSE}"
    world.say(fetch(b"good"))
    assert len(world.messages()) == NUM_LAYERS + 1, f"a good fetch after one with {fields}. {LOOK_REFUSE}"


@pytest.mark.parametrize("fields", [{"num_heads": 0}, {"num_layers": 0}, {"num_heads": -2}, {"num_layers": -1}])
def test_a_fetch_of_nothing_is_refused(fields: dict[str, int]) -> None:
    """It must not end in a division by zero, again with every later message of this receiver."""
    world = SenderWorld()
    world.compute()
    world.say(WatchPrompt(NAME, None))
    world.heard()
    world.say(fetch(**fields))
    world.say(fetch(b"good"))
    ended = [each for each in world.messages() if isinstance(each, FetchEnded)]
    assert ended[-1] == FetchEnded(b"good"), f"a good fetch after one with {fields}: got {ended}. {LOOK_REFUSE}"


def test_a_fetch_of_an_unknown_prompt_is_refused() -> None:
    world = SenderWorld()
    world.say(fetch())
    assert world.messages() == [FetchEnded(b"f", "gone")], LOOK_REFUSE


def test_garbage_is_counted() -> None:
    world, rng = SenderWorld(), np.random.default_rng(0)
    world.compute()
    garbage = [b"", b"\xc1", b"hello", encode(Status(NAME, "gone")), encode(["Ack"]), encode(["Ack", "x"])]
    garbage += [rng.bytes(int(size)) for size in rng.integers(1, 40, 50)]
    world.say(*garbage)
    assert world.sender.num_refused == len(garbage), f"{world.sender.num_refused} of {len(garbage)}. {LOOK_REFUSE}"
    world.say(WatchPrompt(NAME, None))
    assert world.messages() == [Status(NAME, "started", NUM_TOKENS)], f"after garbage, it goes on. {LOOK_REFUSE}"


def test_text_that_is_no_text_is_counted() -> None:
    """msgspec raises UnicodeDecodeError for it, which is no DecodeError."""
    world = SenderWorld()
    world.say(b"\x92\xa3Ac\xbb\x03")
    assert world.sender.num_refused == 1, f"{world.sender.num_refused} refused. {LOOK_REFUSE}"


# Receivers that are lost


def test_a_lost_receiver_is_forgotten() -> None:
    """With its watches; and only after a lease without a word."""
    world = SenderWorld()
    world.say(WatchPrompt(NAME, None), WatchPrompt(b"b", None))
    world.pass_s(30.0)
    assert world.sender.receivers, f"30 s after it was heard of: forgotten too early. {LOOK_LOST}"
    world.pass_s(0.1)
    left = (world.sender.receivers, world.sender.watchers)
    assert left == ({}, {}), f"30.1 s after: expected nothing of it, got {left}. {LOOK_LOST}"
    world.compute()
    assert world.messages()[-1] == Status(b"b", "unknown"), f"it is told nothing more. {LOOK_LOST}"


def test_a_receiver_with_a_fetch_is_not_forgotten() -> None:
    world = SenderWorld()
    world.offer()
    world.publish(layers=[0])
    world.say(WatchPrompt(NAME, None), fetch())
    world.pass_s(100.0)
    world.heard()
    world.publish(layers=[1])
    assert [each.layer for each in world.messages()] == [1], f"its fetch goes on. {LOOK_LOST}"


def test_a_receiver_that_was_silent_for_long_gets_its_layers() -> None:
    """It was stopped for longer than a lease, while the prompt was still waiting for blocks; so it was forgotten. Then
    it is back: it sends heartbeats, hears that the prompt has started, and fetches."""
    world = SenderWorld()
    world.offer()
    world.say(WatchPrompt(NAME, None))
    world.pass_s(31.0)
    world.publish(layers=[0])
    world.heartbeat()
    world.say(fetch())
    world.publish(layers=range(1, NUM_LAYERS))
    world.sender.confirm(NAME)
    pieces = [each.layer for each in world.messages() if isinstance(each, Piece)]
    assert pieces == list(range(NUM_LAYERS)), (
        f"of layers 0 to 3, only {pieces} were sent, and its fetch never ends: heartbeats extend the lease. {LOOK_LOST}"
    )


def test_a_fetch_without_a_watch_does_no_harm() -> None:
    """The same receiver, once the prompt has gone: other prompts still reach it."""
    world = SenderWorld()
    world.offer()
    world.publish(layers=[0])
    world.say(fetch())
    world.sender.withdraw(NAME)
    world.compute(b"b", 2)
    world.say(WatchPrompt(b"b", None), fetch(b"2", name=b"b"))
    ended = [each for each in world.messages() if isinstance(each, FetchEnded)]
    assert FetchEnded(b"2") in ended, f"the fetch of the second prompt has not ended: {ended}. {LOOK_LOST}"
