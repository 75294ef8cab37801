"""worker/kv_wire.py, and its two sides over real sockets: what one engine has computed, the other one has."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import zmq

from part13_disaggregation.config import EngineConfig
from part13_disaggregation.messages import Confirm, Fetch, Offer, Publish, Release, TransferDone, Watch
from part13_disaggregation.torchrun import encrypt
from part13_disaggregation.worker import kv_sender
from part13_disaggregation.worker.kv_shard import KVShard
from part13_disaggregation.worker.kv_transfer import KVTransferAgent
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
    decode_to_receiver,
    decode_to_sender,
    encode,
)
from tests.part13.wires import (
    LEASE_S,
    NAME,
    NUM_TOKENS,
    SECRET,
    RealReceiver,
    RealSender,
    check_guards,
    held,
    make_shard,
    part_of,
    prompt_kv,
    slots_of,
    turn_until,
    wait_until_lost,
)

LOOK_WIRE = 'Look at worker/kv_wire.py; README "On the wire".'
LOOK_CHECKSUM = 'Look at worker/kv_wire.py::checksum; README "On the wire".'
LOOK_WAY = 'Look at worker/kv_sender.py and worker/kv_receiver.py::plan_shares; README "From engine to engine".'
LOOK_MEMORY = 'Look at worker/kv_receiver.py::make_memory and kv_sender.py::map_memory; README "On the wire".'
LOOK_LOST = 'Look at worker/kv_receiver.py::KVReceiver.handle and _lose; README "When an engine is lost".'
LOOK_SECRET = 'Look at torchrun.py::encrypt and kv_receiver.py::KVReceiver._connect; README "From engine to engine".'
LOOK_AGENT = 'Look at worker/kv_transfer.py::KVTransferAgent; README "From engine to engine".'
FROM, TO = [3, 1, 7, 2, 9, 4, 12, 6, 5, 10], [11, 6, 2, 9, 13, 4, 1, 7, 3, 5]
ALL = range(4)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


# Messages


@pytest.mark.parametrize(
    "message",
    [
        WatchPrompt(NAME, SharedMemory(1, 2, 3, "kv-1")), WatchPrompt(NAME, None),
        FetchPrompt(b"f", NAME, 1, 2, 3, 4, 5, 6),
        Ack(3), Heartbeat([NAME, b"b"]), ReleasePrompt(NAME, 2), Status(NAME, "waiting", 7), FetchEnded(b"f", "gone"),
        FetchEnded(b"f"), Piece(b"f", 1, 2, 3, 4, 5, 6, 7, "bfloat16", 8, 9),
    ],
)  # fmt: skip
def test_messages_survive_the_way(message: Any) -> None:
    """And each is understood by one side alone."""
    mine, other = decode_to_sender, decode_to_receiver
    if isinstance(message, Status | Piece | FetchEnded):
        mine, other = other, mine
    assert mine(encode(message)) == message, f"{message} became {mine(encode(message))}. {LOOK_WIRE}"
    with pytest.raises(msgspec.DecodeError):
        other(encode(message))


def test_checksum_covers_bytes_and_description() -> None:
    """Every bit of the bytes, and every field, but for the checksum itself."""
    data = bytes(range(200))
    piece = Piece(b"12345678", 1, 2, 3, 4, 5, 6, 7, "bfloat16", len(data))
    expected = checksum(piece, memoryview(data))
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert checksum(piece, memoryview(changed)) != expected, f"bit {bit} may change unnoticed. {LOOK_CHECKSUM}"
    for name in piece.__struct_fields__:
        value = getattr(piece, name)
        other = {int: lambda v: v + 1, str: lambda v: "float16", bytes: lambda v: b"87654321"}[type(value)](value)
        is_same = checksum(msgspec.structs.replace(piece, **{name: other}), memoryview(data)) == expected
        assert is_same == (name == "checksum"), f"{name} may change from {value!r} to {other!r}. {LOOK_CHECKSUM}"
    assert checksum(piece, memoryview(data[:-1])) != expected, f"a byte less. {LOOK_CHECKSUM}"


def test_checksum_is_the_same_on_both_sides() -> None:
    """The receiver decodes the piece, and has its bytes in a frame or in shared memory."""
    data = bytearray(os.urandom(1_000))
    piece = Piece(b"12345678", 1, 2, 3, 4, 5, 6, 7, "bfloat16", len(data))
    piece.checksum = checksum(piece, memoryview(bytes(data)))
    arrived = decode_to_receiver(encode(piece))
    assert isinstance(arrived, Piece) and checksum(arrived, memoryview(data)) == piece.checksum, LOOK_CHECKSUM


# From engine to engine


def transfer(
    stack: ExitStack, sources: list[KVShard], targets: list[KVShard], start: int = 0, is_shared: bool = False,
    num_tokens: int = NUM_TOKENS,
) -> tuple[list[RealSender], list[RealReceiver]]:  # fmt: skip
    """A prompt is computed by the ranks `sources`, and fetched by the ranks `targets`."""
    kv = prompt_kv(num_tokens)
    senders = [RealSender(shard) for shard in sources]
    receivers = [RealReceiver(shard, len(targets), is_shared) for shard in targets]
    for each in [*senders, *receivers]:
        stack.callback(each.close)
    sides = [*senders, *receivers]
    for receiver in receivers:
        receiver.receiver.watch(Watch(1, NAME, [each.source for each in senders]))
    for sender in senders:
        sender.compute(kv, FROM)
    assert turn_until(lambda: all(each.reports for each in receivers), *sides), f"no answer to the watch. {LOOK_WAY}"
    for receiver in receivers:
        block_ids = TO[start // receiver.shard.cache.block_size :]
        receiver.receiver.fetch(Fetch(2, NAME, start, num_tokens, block_ids), receiver)  # type: ignore[arg-type]
    assert turn_until(lambda: all(len(each.reports) == 2 for each in receivers), *sides), f"it never ends. {LOOK_WAY}"
    for receiver in receivers:
        got = receiver.reports[1]
        assert (got.num_tokens, got.error) == (num_tokens - start, None), f"got {got}. {LOOK_WAY}"
        expected = part_of(receiver.shard, kv, sources[0].dtype)[:, start:]
        assert torch.equal(held(receiver.shard, TO, num_tokens)[:, start:], expected), f"other KV. {LOOK_WAY}"
        check_guards(receiver.shard, set(slots_of(receiver.shard, TO, num_tokens)[start:]), LOOK_WAY)
    for sender in senders:
        assert not sender.reports, f"nobody has released it yet: {sender.reports}. {LOOK_WAY}"
    for receiver in receivers:
        receiver.receiver.release(NAME)
    assert turn_until(lambda: all(each.reports for each in senders), *sides), f"blocks are still held. {LOOK_WAY}"
    assert [each.reports[0].error for each in senders] == ["released"] * len(senders), LOOK_WAY
    return senders, receivers


LOW, HIGH = range(2), range(2, 4)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(
    ("sources", "targets"),
    [
        ([(ALL, ALL)], [(ALL, ALL)]),
        ([(ALL, LOW), (ALL, HIGH)], [(ALL, ALL)]),
        ([(ALL, ALL)], [(ALL, LOW), (ALL, HIGH)]),
        ([(ALL, LOW), (ALL, LOW), (ALL, HIGH), (ALL, HIGH)], [(ALL, LOW), (ALL, HIGH)]),
        ([(LOW, ALL), (HIGH, ALL)], [(ALL, LOW), (ALL, HIGH)]),
        ([(LOW, LOW), (LOW, HIGH), (HIGH, LOW), (HIGH, HIGH)], [(LOW, ALL), (HIGH, ALL)]),
    ],
    ids=["1 to 1", "tp 2 to 1", "1 to tp 2", "replicated", "pp 2 to tp 2", "tp 2 and pp 2 to pp 2"],
)  # fmt: skip
def test_ranks(stack: ExitStack, sources: Any, targets: Any, is_shared: bool) -> None:
    """Every rank gets all of its layers and heads, from whichever ranks have them."""
    senders, receivers = transfer(
        stack, [make_shard(*part) for part in sources], [make_shard(*part) for part in targets], is_shared=is_shared
    )
    sent = sum(each.sender.num_bytes_sent for each in senders)
    expected = sum(len(layers) * len(heads) for layers, heads in targets) * NUM_TOKENS * 2 * 8 * 4
    received = sum(each.receiver.num_bytes_received for each in receivers)
    assert sent == received == expected, f"expected {expected} bytes, sent {sent}, received {received}. {LOOK_WAY}"


@pytest.mark.parametrize("start", [0, 16])
@pytest.mark.parametrize("is_shared", [False, True])
def test_blocks_dtypes_and_small_pieces(
    stack: ExitStack, start: int, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long way through a small window: pieces of one token, of which 8 may be on their way."""
    monkeypatch.setattr(kv_sender, "PIECE_BYTES", 1)
    source, target = make_shard(dtype=torch.bfloat16), make_shard(block_size=8, num_blocks=16)
    [sender], [receiver] = transfer(stack, [source], [target], start, is_shared)
    [left] = [each.free_slots for each in sender.sender.receivers.values()]
    assert turn_until(lambda: sorted(left) == list(range(WINDOW)), sender, receiver), f"free slots: {left}. {LOOK_WAY}"


def test_shared_memory_carries_the_bytes(stack: ExitStack) -> None:
    """The receiver gives its own memory, which has no name in the file system; the sender writes there."""
    frames = list[int]()
    send = kv_sender.KVSender._send_piece

    def noted(sender: Any, receiver: Any, *rest: Any) -> None:
        send(sender, receiver, *rest)
        frames.append(receiver.memory is not None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_sender.KVSender, "_send_piece", noted)
        _, [receiver] = transfer(stack, [make_shard()], [make_shard()], is_shared=True)
    assert frames and all(frames), f"pieces that went through shared memory: {frames}. {LOOK_MEMORY}"
    [connection] = receiver.receiver.connections.values()
    assert connection.memory is not None and connection.view is not None
    assert connection.view[:].strip(b"\0"), f"nothing was written to it. {LOOK_MEMORY}"
    assert "memfd:" in str(Path(connection.memory.path).readlink()), f"{connection.memory}. {LOOK_MEMORY}"


def test_a_bit_that_flips_in_shared_memory(stack: ExitStack) -> None:
    """Between the sender's write and the receiver's read."""
    sender, receiver = RealSender(make_shard()), RealReceiver(make_shard(), is_shared=True)
    stack.callback(receiver.close), stack.callback(sender.close)
    sender.compute(prompt_kv(), FROM)
    receiver.receiver.watch(Watch(1, NAME, [sender.source]))
    assert turn_until(lambda: receiver.reports, sender, receiver)
    receiver.receiver.fetch(Fetch(2, NAME, 0, NUM_TOKENS, TO), receiver)  # type: ignore[arg-type]
    [connection] = receiver.receiver.connections.values()
    assert connection.view is not None and connection.memory is not None
    assert turn_until(lambda: sender.sender.num_bytes_sent, sender)
    start = (WINDOW - 1) * connection.memory.piece_bytes  # slots are taken from the last one on
    connection.view[start + 100] ^= 1
    assert turn_until(lambda: len(receiver.reports) == 2, sender, receiver)
    done = receiver.reports[1]
    assert (done.num_tokens, done.error) == (0, "a piece was damaged"), f"got {done}. {LOOK_CHECKSUM}"


def test_the_connection_is_lost(stack: ExitStack) -> None:
    """In the middle of a fetch: the engine ends. The fetch ends at once, and nothing of it is used."""
    sender, receiver = RealSender(make_shard()), RealReceiver(make_shard(), timeout_s=100.0)
    stack.callback(receiver.close), stack.callback(sender.close)
    sender.sender.offer(Offer(1, NAME, NUM_TOKENS))
    sender.sender.publish(NAME, FROM, 0, NUM_TOKENS)
    receiver.receiver.watch(Watch(1, NAME, [sender.source]))
    assert turn_until(lambda: receiver.reports, sender, receiver)
    receiver.receiver.fetch(Fetch(2, NAME, 0, NUM_TOKENS, TO), receiver)  # type: ignore[arg-type]
    assert turn_until(lambda: receiver.receiver.num_bytes_received, sender, receiver), LOOK_WAY
    sender.close()
    assert turn_until(lambda: len(receiver.reports) == 2, receiver), f"its loss was not noticed. {LOOK_LOST}"
    done = receiver.reports[1]
    assert done.num_tokens == 0 and "lost" in (done.error or ""), f"got {done}. {LOOK_LOST}"
    assert not receiver.receiver.connections and receiver.receiver.is_idle, LOOK_LOST


def test_all_ranks_are_lost_at_once(stack: ExitStack) -> None:
    """An engine of two ranks is killed. Nothing can be sent to either (zmq.Again), and all that was expected of them is
    answered: core would wait for it forever."""
    senders = [RealSender(make_shard(heads=heads)) for heads in (LOW, HIGH)]
    receiver = RealReceiver(make_shard(), timeout_s=100.0)
    for each in [receiver, *senders]:
        stack.callback(each.close)
    for number in range(4):
        receiver.receiver.watch(Watch(number, bytes([number]), [each.source for each in senders]))
    assert turn_until(lambda: all(len(each.sender.watchers) == 4 for each in senders), receiver, *senders)
    for each in senders:
        each.close()
    for connection in receiver.receiver.connections.values():
        wait_until_lost(connection)
    for _ in range(20):
        with contextlib.suppress(zmq.ZMQError):  # as in worker/kv_transfer.py::KVTransferAgent._try
            receiver.turn()
    answered = sorted(done.transfer_id for done in receiver.reports)
    assert answered == [0, 1, 2, 3], f"4 watches, and core has answers to {answered}. {LOOK_LOST}"


def test_nobody_listens(stack: ExitStack) -> None:
    """The engine has ended long ago: that is noticed at once, not after a timeout."""
    sender, receiver = RealSender(make_shard()), RealReceiver(make_shard(), timeout_s=100.0)
    stack.callback(receiver.close)
    sender.close()
    receiver.receiver.watch(Watch(1, NAME, [sender.source]))
    assert turn_until(lambda: receiver.reports, receiver), f"core waits for an answer. {LOOK_LOST}"
    assert receiver.reports[0].error and not receiver.receiver.connections, f"{receiver.reports}. {LOOK_LOST}"


@pytest.mark.parametrize("is_heard", [True, False])
def test_another_engine_takes_its_place(stack: ExitStack, is_heard: bool) -> None:
    """At the same address. It knows nothing of the prompt; new prompts are fetched from it."""
    first, receiver = RealSender(make_shard()), RealReceiver(make_shard(), timeout_s=100.0)
    stack.callback(receiver.close), stack.callback(first.close)
    first.compute(prompt_kv(), FROM)
    receiver.receiver.watch(Watch(1, NAME, [first.source]))
    assert turn_until(lambda: receiver.reports, first, receiver)
    first.close()
    if is_heard:
        assert turn_until(lambda: not receiver.receiver.connections, receiver), LOOK_LOST
    second = RealSender(make_shard())
    stack.callback(second.close)
    second.compute(prompt_kv(), FROM, b"new")
    receiver.receiver.watch(Watch(5, b"new", [second.source]))
    assert turn_until(lambda: [each for each in receiver.reports if each.transfer_id == 5], second, receiver), LOOK_LOST
    assert receiver.reports[-1].num_tokens == NUM_TOKENS, f"got {receiver.reports}. {LOOK_LOST}"


# Secrets


def test_a_receiver_with_another_secret_is_not_heard(stack: ExitStack) -> None:
    sender, receiver = RealSender(make_shard()), RealReceiver(make_shard(), secret="another secret", timeout_s=100.0)
    stack.callback(receiver.close), stack.callback(sender.close)
    sender.compute(prompt_kv(), FROM)
    receiver.receiver.watch(Watch(1, NAME, [sender.source]))
    assert turn_until(lambda: receiver.reports, sender, receiver), f"the handshake fails, and core waits. {LOOK_SECRET}"
    assert receiver.reports[0].error and not receiver.reports[0].num_tokens, f"{receiver.reports}. {LOOK_SECRET}"
    assert not sender.sender.receivers and not sender.sender.num_refused, f"it was heard. {LOOK_SECRET}"


@pytest.mark.parametrize("kind", ["plain", "other key"])
def test_a_stranger_is_not_heard(stack: ExitStack, kind: str) -> None:
    """Any program that can connect: it gets no byte of a prompt, and can release nothing."""
    sender = RealSender(make_shard())
    stack.callback(sender.close)
    sender.compute(prompt_kv(), FROM)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        if kind == "other key":
            encrypt(stranger, "another secret", is_server=False)
        stranger.connect(sender.source.address)
        for message in (WatchPrompt(NAME, None), FetchPrompt(b"f", NAME, 0, 4, 0, 4, 0, 20), ReleasePrompt(NAME, 1)):
            stranger.send(encode(message))
        end_s = time.monotonic() + 0.5
        while time.monotonic() < end_s:
            sender.turn()
            assert not stranger.poll(5), f"a stranger was answered. {LOOK_SECRET}"
    assert not sender.sender.receivers and not sender.reports, f"a stranger was heard. {LOOK_SECRET}"


def test_a_source_with_another_secret_is_not_believed(stack: ExitStack) -> None:
    """Someone else listens where the engine was: no prompt's name is told, and nothing of it is written."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as stranger:
        stranger.linger = 0
        encrypt(stranger, "another secret", is_server=True)
        stranger.bind("tcp://127.0.0.1:*")
        receiver = RealReceiver(make_shard(), timeout_s=100.0)
        stack.callback(receiver.close)
        source = receiver.shard.source(stranger.getsockopt_string(zmq.LAST_ENDPOINT))
        receiver.receiver.watch(Watch(1, NAME, [source]))
        assert turn_until(lambda: receiver.reports, receiver), f"core waits for an answer. {LOOK_SECRET}"
        assert receiver.reports[0].error and not stranger.poll(50), f"{receiver.reports}. {LOOK_SECRET}"


def test_garbage_from_a_real_peer(stack: ExitStack) -> None:
    """One that has the secret: an older version, say. The engine goes on."""
    sender, rng = RealSender(make_shard()), random.Random(3)
    stack.callback(sender.close)
    sender.compute(prompt_kv(), FROM)
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        encrypt(peer, SECRET, is_server=False)
        peer.connect(sender.source.address)
        for _ in range(50):
            peer.send_multipart([b"\xc1" + rng.randbytes(rng.randrange(20)) for _ in range(rng.randint(1, 3))])
        peer.send(b"")
        peer.send(encode(WatchPrompt(NAME, None)))
        assert turn_until(lambda: peer.poll(0), sender), f"a good message after bad ones gets no answer. {LOOK_WIRE}"
        assert decode_to_receiver(peer.recv()) == Status(NAME, "started", NUM_TOKENS), LOOK_WIRE
    assert sender.sender.num_refused == 51, f"of 51, {sender.sender.num_refused} were counted. {LOOK_WIRE}"


# The agent: both sides, in a thread


class Agent:
    """Of one rank. mark() is always reached."""

    def __init__(self, shard: KVShard, **flags: Any) -> None:
        config = EngineConfig(device="cpu", kv_connector="tcp", kv_transfer_secret=SECRET, **flags)
        self.shard, self.reports = shard, list[TransferDone]()
        self.agent = KVTransferAgent(shard, config, lambda: SimpleNamespace(wait=lambda: None), self.reports.append)

    def wait(self, count: int = 1) -> None:
        end_s = time.monotonic() + 10
        while len(self.reports) < count and time.monotonic() < end_s:
            time.sleep(0.002)
        assert len(self.reports) == count, f"expected {count} answers, got {self.reports}. {LOOK_AGENT}"


def test_agents_do_both(stack: ExitStack) -> None:
    """Each offers a prompt and fetches the other one's, at the same time."""
    kv, agents = prompt_kv(), [Agent(make_shard()), Agent(make_shard(block_size=8))]
    for each in agents:
        stack.callback(each.agent.close)
    names = [b"first", b"second"]
    for index, each in enumerate(agents):
        size = each.shard.cache.block_size
        slots = [FROM[p // size] * size + p % size for p in range(NUM_TOKENS)]
        each.shard.cache.data.flatten(1, 2)[:, slots] = kv + index
        each.agent.start(Offer(1, names[index], NUM_TOKENS))
        each.agent.start(Watch(2, names[1 - index], [agents[1 - index].agent.source]))
        for layer in range(4):
            each.agent.note_layer([Publish(names[index], FROM, NUM_TOKENS)], layer)
        each.agent.start(Confirm(names[index]))
    for index, each in enumerate(agents):
        each.wait()
        assert each.reports[0].num_tokens == NUM_TOKENS, f"got {each.reports}. {LOOK_AGENT}"
        table = [8, 11, 13, 14, 15] if index == 0 else [8, 11, 13]
        each.agent.start(Fetch(3, names[1 - index], 0, NUM_TOKENS, table))
        each.wait(2)
        assert each.reports[1].num_tokens == NUM_TOKENS, f"got {each.reports}. {LOOK_AGENT}"
        assert torch.equal(held(each.shard, table, NUM_TOKENS), kv + 1 - index), f"other KV. {LOOK_AGENT}"
    for index, each in enumerate(agents):
        each.agent.start(Release(names[1 - index]))
    for each in agents:
        each.wait(3)
        assert (each.reports[2].transfer_id, each.reports[2].error) == (1, "released"), f"{each.reports}. {LOOK_AGENT}"


def test_an_address_that_is_none(stack: ExitStack) -> None:
    """Core gets an answer, and the agent goes on."""
    agent = Agent(make_shard())
    stack.callback(agent.agent.close)
    source = msgspec.structs.replace(agent.agent.source, address="tcp://not an address")
    agent.agent.start(Watch(1, NAME, [source]))
    agent.wait()
    assert agent.reports[0].error and agent.reports[0].transfer_id == 1, f"got {agent.reports}. {LOOK_AGENT}"
    agent.agent.start(Release(NAME))
    agent.agent.start(Watch(2, b"b", [agent.agent.source]))  # itself
    agent.agent.start(Release(b"b"))
    agent.wait(2)
    assert (agent.reports[1].transfer_id, agent.reports[1].error) == (2, "released"), f"{agent.reports}. {LOOK_AGENT}"


def test_leases_end_in_the_agent(stack: ExitStack) -> None:
    """Nobody fetches it: its thread looks at the clock by itself."""
    agent = Agent(make_shard(), kv_lease=0.2)
    stack.callback(agent.agent.close)
    agent.agent.start(Offer(1, NAME, NUM_TOKENS))
    for layer in range(4):
        agent.agent.note_layer([Publish(NAME, FROM, NUM_TOKENS)], layer)
    agent.agent.start(Confirm(NAME))
    agent.wait()
    assert agent.reports[0].error == "the lease has ended", f"got {agent.reports}. {LOOK_AGENT}"
    assert agent.agent.heartbeat_s < 2 / 3 * 0.2 < LEASE_S, f"heartbeats must come more often. {LOOK_AGENT}"
