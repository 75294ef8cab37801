"""A rank: a worker in a process of its own, which takes part in every step."""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import fields

import torch
import zmq

from common import startup
from common.checkpoint import resolve_checkpoint
from common.checkpoint_reader import fingerprint
from common.errors import FieldError

from ..config import EngineConfig, resolve_config
from ..messages import (
    AllocateCache,
    CacheAllocated,
    Confirm,
    ExpertLoads,
    Fetch,
    Load,
    LookUp,
    MeasureExperts,
    Offer,
    Ping,
    PlaceExperts,
    Pong,
    Publish,
    RankFailed,
    RankLoaded,
    RankTimes,
    Release,
    Save,
    StartRank,
    StepInput,
    Stop,
    ToRank,
    Watch,
    Withdraw,
    decode_to_rank,
    encode,
)
from ..torchrun import Torchrun, encrypt
from .kv_cache import kv_bytes_per_block
from .launcher import find_addresses, join_groups
from .model import num_parameters
from .parallel import CollectiveError
from .stream import StepHandle
from .worker import Worker


def run_rank(rank: int, addresses: str, secret: str | None, directories: Sequence[str]) -> None:
    """The main function of a process that core has started: do what core says, until its process ends.

    addresses: of core's two sockets. directories: to remove if core is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is core's affair
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # at once, even in a collective
    threading.Thread(target=_end_with_parent, args=(directories,), name="parent-watch", daemon=True).start()
    Rank(rank, addresses, secret).run()


def run_torchrun_rank(torchrun: Torchrun, config: EngineConfig) -> None:
    """The main function of torchrun's processes but rank 0's: do what core says, until it says Stop or is silent.

    Raises FieldError or OSError if it finds no core.
    """
    torchrun.check(config)
    for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends them to all ranks; core finishes open requests
        signal.signal(number, signal.SIG_IGN)
    config = resolve_config(config, resolve_checkpoint(config.model))
    addresses = find_addresses(torchrun, config.distributed_timeout)
    Rank(torchrun.rank, addresses, config.distributed_secret, torchrun.local_rank, config).run()


class Rank:
    """Does what core says: one thread works, another one waits for the steps' results, and the main one receives.

    expected: what the config must be, if this process has a command line of its own.
    """

    def __init__(
        self, rank: int, addresses: str, secret: str | None, local_rank: int | None = None,
        expected: EngineConfig | None = None,
    ) -> None:  # fmt: skip
        self.rank, self.local_rank, self.expected = rank, rank if local_rank is None else local_rank, expected
        self.worker: Worker | None = None
        self.num_steps, self.has_failed = 0, False  # finished steps
        self._sending = threading.Lock()
        self._work: queue.SimpleQueue[ToRank] = queue.SimpleQueue()
        self._handles: queue.SimpleQueue[StepHandle] = queue.SimpleQueue()
        context = zmq.Context()
        self._orders, self._answers = context.socket(zmq.SUB), context.socket(zmq.PUSH)
        self._orders.setsockopt(zmq.RCVHWM, 0)
        self._answers.setsockopt(zmq.SNDHWM, 0)
        for socket, address in zip((self._answers, self._orders), reversed(addresses.split()), strict=True):
            if secret is not None:
                encrypt(socket, secret, is_server=False)
            socket.connect(address)
        self._orders.subscribe(b"")

    def run(self) -> None:
        """Never returns. After an error, the rank computes no more, and core ends it."""
        while True:
            if self.expected is not None and not self._orders.poll(2_000 * self.expected.distributed_timeout):
                sys.exit(f"error: rank {self.rank} has heard nothing from rank 0")
            try:
                self.handle(decode_to_rank(self._orders.recv()))
            except Exception as error:
                self.fail(error)

    def handle(self, message: ToRank) -> None:
        match message:
            case StartRank():
                threading.Thread(target=self.work, args=(message,), name="work", daemon=True).start()
            case Stop():
                if self.worker is not None:
                    self.worker.close()
                os._exit(2 if self.has_failed else 0)  # at once, even if another thread is in a collective
            case Ping():
                num_collectives = 0 if self.worker is None else self.worker.num_collectives
                self.send(Pong(self.rank, self.num_steps, num_collectives))
            case _:
                self._work.put(message)

    def work(self, start: StartRank) -> None:
        """Load the model, then do one thing after the other: exchanging tokens may take long. The main thread answers
        pings meanwhile."""
        try:
            worker = self.load(start)
            while True:
                self.do(worker, self._work.get())
        except Exception as error:
            self.fail(error)

    def do(self, worker: Worker, message: ToRank) -> None:
        match message:
            case AllocateCache():
                worker.allocate_cache(message.num_blocks, message.num_host_blocks, self.send)
                startup.end()  # of a process that torchrun has started
                self.send(CacheAllocated(self.rank, None if worker.agent is None else worker.agent.source))
            case StepInput():
                self._handles.put(worker.launch(message))
            case (
                Save()
                | Load()
                | LookUp()
                | Offer()
                | Watch()
                | Fetch()
                | Publish()
                | Confirm()
                | Withdraw()
                | Release()
            ):
                worker.transfer(message)
            case MeasureExperts():
                loads = worker.measure_experts()
                if worker.answers:
                    self.send(ExpertLoads(loads))
            case PlaceExperts():
                worker.place_experts(message.placements)

    def load(self, start: StartRank) -> Worker:
        self.worker = worker = self.make_worker(start)
        self.send(
            RankLoaded(
                rank=self.rank,
                num_blocks=worker.num_blocks_available(),
                fingerprint=fingerprint(worker.checkpoint),
                num_layers=worker.model.num_layers,
                num_heads=worker.model.num_heads,
                num_kv_heads=worker.model.num_kv_heads,
                num_parameters=num_parameters(worker.model),
                num_bytes_read=worker.model.num_bytes_read,
                kv_bytes_per_token=kv_bytes_per_block(worker.model, 1, worker.kv_format),
                bytes_per_block=worker.bytes_per_block,
                weight_bytes=worker.weight_bytes,
                kernels=worker.kernel_choices,
            )
        )
        threading.Thread(target=self.answer_steps, args=(worker,), name="answers", daemon=True).start()
        return worker

    def make_worker(self, start: StartRank) -> Worker:
        config = start.config
        if self.expected is not None:
            check_same(config, self.expected)
        torch.set_num_threads(max(1, torch.get_num_threads() // num_local_ranks(config)))
        groups = join_groups(config, self.rank, start.init_method, start.core, start.num_cores)
        if config.trace is not None:
            groups.tensor.log = groups.experts.log = []
        return Worker(config, groups, self.local_rank + start.core * config.num_ranks, start.seed)

    def answer_steps(self, worker: Worker) -> None:
        """Wait for each step's result, and send it if this rank answers."""
        while True:
            handle = self._handles.get()
            try:
                output = handle.result()
            except Exception as error:
                self.fail(error)
                return
            self.num_steps += 1
            if (log := worker.groups.tensor.log) is not None:
                collectives = [each for each in log if each.end_s <= output.end_s]
                del log[: len(collectives)]  # the next step may have begun
                self.send(RankTimes(self.rank, output.start_s, output.end_s, collectives))
            if worker.answers:
                self.send(output)

    def send(self, answer: object) -> None:
        with self._sending:
            self._answers.send(encode(answer))

    def fail(self, error: Exception) -> None:
        self.has_failed = True
        field = error.field if isinstance(error, FieldError) else None
        message = str(error) if isinstance(error, FieldError | OSError) else f"{type(error).__name__}: {error}"
        message = message.removeprefix(f"{field}: ")
        self.send(RankFailed(self.rank, field, message, isinstance(error, CollectiveError)))


def check_same(config: EngineConfig, expected: EngineConfig) -> None:
    """Raises FieldError naming a flag that this rank's command line has with another value than rank 0's."""
    for spec in fields(EngineConfig):
        theirs, ours = getattr(config, spec.name), getattr(expected, spec.name)
        if theirs != ours and spec.name != "trace":
            raise FieldError(spec.name, f"expected {theirs!r}, as on rank 0, got {ours!r}")


def num_local_ranks(config: EngineConfig) -> int:
    """How many ranks share this machine's cores."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if Torchrun.from_environment() else config.num_ranks


def _end_with_parent(directories: Sequence[str]) -> None:
    """End when core's process ends, even by SIGKILL, and remove directories, which it no longer can."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "run_rank is started by multiprocessing"
    parent.join()
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)
