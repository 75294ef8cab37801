"""KV that goes from engine to engine, beside the model: a thread that sends and receives."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import zmq

from common.errors import FieldError

from ..config import EngineConfig
from ..messages import Confirm, Fetch, KVSource, Notice, Offer, Publish, Release, TransferDone, Watch, Withdraw
from ..torchrun import encrypt
from .kv_receiver import KVReceiver
from .kv_sender import KVSender
from .kv_shard import KVShard
from .stream import Mark

END_TIMEOUT_S = 1.0  # for a thread that waits for a step: it ends with the process
MAX_LATE_MESSAGES = 1_000
HEARTBEATS = 6  # in the time of a lease (vLLM: one in 5 of 30 s)
logger = logging.getLogger(__name__)


class KVTransferAgent:
    """A rank's side of all transfers with other engines. An engine may send and receive at the same time.

    mark: of the stream of steps, see Stream.mark(). report: called in another thread with the answer to each transfer.
    """

    def __init__(
        self, shard: KVShard, config: EngineConfig, mark: Callable[[], Mark], report: Callable[[TransferDone], None]
    ) -> None:
        assert config.kv_transfer_secret is not None, "EngineConfig asks for it"
        self.mark, self.report, self.is_on_gpu = mark, report, shard.cache.data.device.type == "cuda"
        self.device = shard.cache.data.device
        self._work: deque[Callable[[], None]] = deque()
        self._wake_end, self._wake = socket.socketpair()
        self._wake_end.setblocking(False)
        self._wake.setblocking(False)
        self._is_ending = False
        self.receiver = KVReceiver(
            shard, config.kv_transfer_secret, config.num_ranks, config.kv_transfer_timeout,
            config.kv_connector == "shm", report,
        )  # fmt: skip
        requests = self.receiver.context.socket(zmq.ROUTER)
        requests.setsockopt(zmq.SNDHWM, 0)
        encrypt(requests, config.kv_transfer_secret, is_server=True)
        try:
            requests.bind(f"tcp://{config.kv_transfer_host}:*")
        except zmq.ZMQError as error:
            self.receiver.context.destroy(linger=0)
            raise FieldError("kv_transfer_host", f"can't listen at {config.kv_transfer_host!r}: {error}") from error
        self.source: KVSource = shard.source(requests.getsockopt_string(zmq.LAST_ENDPOINT))
        self.sender = KVSender(requests, shard, config.kv_lease, report)
        self.heartbeat_s = min(config.kv_lease / HEARTBEATS, config.kv_transfer_timeout / 2)
        self._thread = threading.Thread(target=self._run, name="kv-transfer", daemon=True)
        self._thread.start()

    def start(self, order: Offer | Watch | Fetch | Notice) -> None:
        """Returns before it is done. (A Publish is for note_layer().)"""
        match order:
            case Offer():
                self._soon(lambda: self.sender.offer(order))
            case Confirm():
                self._soon(lambda: self.sender.confirm(order.name))
            case Withdraw():
                self._soon(lambda: self.sender.withdraw(order.name))
            case Watch():
                self._soon(lambda: self._answer(order, lambda: self.receiver.watch(order)))
            case Fetch():
                mark = self.mark()
                self._soon(lambda: self._answer(order, lambda: self.receiver.fetch(order, mark)))
            case Release():
                self._soon(lambda: self.receiver.release(order.name))

    def _answer(self, order: Watch | Fetch, work: Callable[[], None]) -> None:
        """Begin an order, or say that it can't be done: core waits for it."""
        try:
            work()
        except Exception as error:
            logger.exception("a transfer of KV can't begin")
            self.report(TransferDone(order.transfer_id, error=f"{type(error).__name__}: {error}"))

    def note_layer(self, published: Sequence[Publish], layer: int) -> None:
        """The model has computed a layer of a step, in which these prompts got further. Called where the step runs."""
        mark = self.mark() if self.is_on_gpu else None  # on a GPU, the layer has only been launched

        def publish() -> None:
            if mark is not None:
                mark.wait()
            for each in published:
                self.sender.publish(each.name, each.block_ids, layer, each.num_tokens)

        self._soon(publish)

    def close(self) -> None:
        """End the thread. Other engines notice that the connection is lost."""
        self._is_ending = True
        self._soon(lambda: None)
        self._thread.join(END_TIMEOUT_S)

    def _soon(self, work: Callable[[], None]) -> None:
        """Let the thread do something, in the order of the calls."""
        self._work.append(work)
        with contextlib.suppress(OSError):  # it was woken already, or has ended
            self._wake.send(b"x")

    def _run(self) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream(self.device)) if self.is_on_gpu else nullcontext()
        with torch.inference_mode(), stream:
            poller, requests = self.receiver.poller, self.sender.socket
            poller.register(self._wake_end, zmq.POLLIN)
            poller.register(requests, zmq.POLLIN)
            next_s = time.monotonic() + self.heartbeat_s
            while not self._is_ending:
                ready = dict(poller.poll(int(1e3 * max(0.0, next_s - time.monotonic())) + 1))
                if self._wake_end.fileno() in ready:
                    self._wake_end.recv(65_536)
                while self._work:
                    self._try(self._work.popleft())
                self._handle(ready)
                if time.monotonic() >= next_s:
                    for _ in range(MAX_LATE_MESSAGES):  # what has come in time, but was not read, counts
                        if not (ready := dict(poller.poll(0))).keys() - {self._wake_end.fileno()}:
                            break
                        self._handle(ready)
                    self._try(self.sender.check_leases)
                    self._try(self.receiver.send_heartbeats)
                    next_s = time.monotonic() + self.heartbeat_s
            self.sender.socket.close(linger=0)
            self.receiver.close()
            self._wake.close()
            self._wake_end.close()

    def _handle(self, ready: Mapping[object, int]) -> None:
        """Messages of the sockets that the poller has found ready."""
        if self.sender.socket in ready:
            self._try(self.sender.receive)
        self._try(partial(self.receiver.handle, ready))

    def _try(self, work: Callable[[], None]) -> None:
        """One transfer that goes wrong must not end the others."""
        try:
            work()
        except Exception:
            logger.exception("a transfer of KV failed")
