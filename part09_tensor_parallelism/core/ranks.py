"""The ranks' processes, seen from core: start them, exchange messages, notice when one is lost."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from typing import TypeVar

import zmq

from ..config import EngineConfig
from ..messages import (
    FromRank,
    Ping,
    Pong,
    RankFailed,
    RankTimes,
    StartRank,
    StepOutput,
    Stop,
    ToRank,
    decode_from_rank,
    encode,
)
from ..torchrun import Torchrun, encrypt

GRACE_S = 2.0  # how long to look for the cause when a collective fails, and to wait for answers to a ping
SHUTDOWN_TIMEOUT_S = 2.0  # then a process is killed
FORKSERVER_LOST = 255  # multiprocessing's exit code for a process whose fork server is gone
LINGER_MS = 500  # for the last message to ranks on other machines

Answer = TypeVar("Answer", bound=FromRank)


# A process that imports what a rank needs, once, and then only forks.
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload([__name__.replace("core.ranks", "worker.rank_process")])


class RankDied(Exception):
    """A rank has ended, hangs or has failed, so its group can compute no more. field: the flag that is wrong, or
    None."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class Ranks:
    """The ranks' processes. All are told the same on one socket, and answer on another one.

    This process starts all ranks; under torchrun it starts rank 0, and torchrun the others. The sockets are files in a
    directory that only this user can enter; under torchrun they listen on its master_addr.

    run_rank: a process's main function. publish: tells torchrun's other processes the sockets' addresses.
    """

    def __init__(self, config: EngineConfig, run_rank: Callable[..., None], publish: Callable[..., None]) -> None:
        self.run_rank, self.publish = run_rank, publish
        self.num_ranks, self.tensor_parallel_size = config.num_ranks, config.tensor_parallel_size
        self.timeout_s, self.has_secret = float(config.distributed_timeout), config.distributed_secret is not None
        self.processes: list[BaseProcess] = []  # those that this process has started: the first ones
        self._failure: RankDied | None = None
        self._silent = set[int]()  # ranks that have not answered the last ping
        self._progress = [Pong(rank) for rank in range(config.num_ranks)]  # as of the last ping
        self._times: list[deque[RankTimes]] = [deque() for _ in range(config.num_ranks)]  # of each rank's steps
        self._results = deque[StepOutput]()
        self._context = zmq.Context()
        self._orders, self._answers = self._context.socket(zmq.XPUB), self._context.socket(zmq.PULL)
        self._poller = zmq.Poller()
        self._poller.register(self._answers, zmq.POLLIN)
        self._directory = tempfile.TemporaryDirectory(prefix="llm-ranks-", ignore_cleanup_errors=True)  # mode 0700
        try:
            self._start(config, Torchrun.from_environment())
        except BaseException:
            self.shutdown()
            raise

    def _start(self, config: EngineConfig, torchrun: Torchrun | None) -> None:
        self._orders.setsockopt(zmq.XPUB_VERBOSE, 1)  # tells of every rank that connects
        self._orders.setsockopt(zmq.SNDHWM, 0)  # a send must neither wait for a rank nor drop a message
        self._answers.setsockopt(zmq.RCVHWM, 0)
        directory = self._directory.name
        addresses, init_method = f"ipc://{directory}/orders ipc://{directory}/answers", f"file://{directory}/store"
        if torchrun is None:
            for socket, address in zip((self._orders, self._answers), addresses.split(), strict=True):
                socket.bind(address)
        else:
            addresses, init_method = self._listen(config, torchrun), "env://"
        left_behind = (directory, get_temp_dir())  # if this process is killed: the sockets, the fork server's own
        for rank in range(self.num_ranks if torchrun is None else 1):
            process = _FORKSERVER.Process(
                target=self.run_rank, args=(rank, addresses, config.distributed_secret, left_behind),
                name=f"rank-{rank}", daemon=True,
            )  # fmt: skip
            try:
                process.start()
            except (OSError, EOFError) as error:  # a socket's path is too long, or the fork server has died
                raise OSError(f"cannot start rank {rank}: {error}; TMPDIR is {tempfile.gettempdir()}") from error
            self.processes.append(process)
            self._poller.register(process.sentinel, zmq.POLLIN)
        self._wait_for_connections()
        self.send(StartRank(config, init_method, random.getrandbits(63)))

    def _listen(self, config: EngineConfig, torchrun: Torchrun) -> str:
        """Bind the sockets to free ports of master_addr, and tell the ranks on all machines which they are."""
        for socket in (self._orders, self._answers):
            if config.distributed_secret is not None:
                encrypt(socket, config.distributed_secret, is_server=True)
            socket.bind(f"tcp://{torchrun.master_addr}:*")
        addresses = " ".join(socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in (self._orders, self._answers))
        self.publish(torchrun, addresses, self.timeout_s)
        return addresses

    def _wait_for_connections(self) -> None:
        """Wait until all ranks are connected: what is sent before, they miss. Raises RankDied."""
        num_connected, deadline_s = 0, time.monotonic() + self.timeout_s
        while num_connected < self.num_ranks:
            if self._orders.poll(100):
                num_connected += self._orders.recv() == b"\x01"  # a subscription
            elif (dead := self._find_dead()) is not None:
                raise dead
            elif time.monotonic() > deadline_s:
                raise RankDied(
                    f"{num_connected} of {self.num_ranks} ranks have come within {self.timeout_s:g} s "
                    "(distributed_timeout)"
                    + ("; the others may have another distributed_secret" if self.has_secret else "")
                )

    def remove_directory(self) -> None:
        """Once all ranks are connected. Nothing is left behind then, whichever process is killed."""
        self._directory.cleanup()

    def send(self, message: ToRank) -> None:
        """Send a message to every rank. Never waits."""
        self._orders.send(encode(message), zmq.NOBLOCK)

    def receive(self, timeout_s: float) -> FromRank | None:
        """The next message of any rank, None if there is none for timeout_s. Raises RankDied."""
        deadline_s = time.monotonic() + timeout_s
        while self._failure is None:
            events = dict(self._poller.poll(int(1e3 * max(0.0, deadline_s - time.monotonic()))))
            if self._answers in events:  # before a rank's death, because its last message may say why
                match answer := decode_from_rank(self._answers.recv()):
                    case Pong():
                        self._silent.discard(answer.rank)
                    case RankFailed():
                        self._failure = self._find_cause(answer)
                    case _:
                        return answer
            elif events:
                self._failure = self._find_dead()
            else:
                return None
        raise self._failure

    def result(self) -> StepOutput:
        """The result of the next step. Raises RankDied, also if there is none for timeout_s."""
        while not self._results:
            self._receive_result()
        return self._results.popleft()

    def times(self) -> list[RankTimes]:
        """When each rank computed the next step, if the ranks tell. Raises RankDied as result() does."""
        while not all(self._times):
            self._receive_result()
        return [times.popleft() for times in self._times]

    def _receive_result(self) -> None:
        match answer := self.receive(self.timeout_s):
            case StepOutput():
                self._results.append(answer)
            case RankTimes():
                self._times[answer.rank].append(answer)
            case _:
                self._failure = self._find_cause()
                raise self._failure

    def all_results(self, kind: type[Answer]) -> list[Answer]:
        """A message of this kind from every rank, which may take any time. Raises RankDied."""
        answers: list[Answer] = []
        while len(answers) < self.num_ranks:
            if (answer := self.receive(self.timeout_s)) is None:
                self._ping()
                continue
            assert isinstance(answer, kind), f"expected {kind.__name__}, got {answer}"
            answers.append(answer)
        return answers

    def wait_for(self, requests: zmq.Socket[bytes]) -> None:
        """Wait until a socket has a message, while no step is in flight. Raises RankDied."""
        self._poller.register(requests, zmq.POLLIN)
        try:
            while requests not in (events := dict(self._poller.poll(int(1e3 * self.timeout_s)))):
                self.receive(0)  # pongs, or an error
                if not events:
                    self._ping()
        finally:
            self._poller.unregister(requests)

    def _ping(self) -> None:
        """Ask all ranks for an answer. Raises RankDied if one has not answered the time before."""
        if self._silent:
            self._failure = RankDied(f"rank {min(self._silent)} does not answer (distributed_timeout)")
            raise self._failure
        self._silent = set(range(self.num_ranks))
        self.send(Ping())

    def _find_dead(self) -> RankDied | None:
        for rank, process in enumerate(self.processes):
            process.join(0)
            if (status := process.exitcode) is not None:
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                if status == FORKSERVER_LOST:
                    how += ", or the fork server was killed, which knows how ranks end"
                return RankDied(f"rank {rank} {how}")
        return None

    def _find_cause(self, failed: RankFailed | None = None) -> RankDied:
        """Why a step has failed, or None: why it is late. A collective also fails because of another rank: one that has
        ended, has failed otherwise, does not answer, or has begun fewer collectives than the others."""
        self._silent = set(range(self.num_ranks))
        self.send(Ping())
        deadline_s = time.monotonic() + GRACE_S
        while (failed is None or failed.is_collective) and time.monotonic() < deadline_s:
            if (dead := self._find_dead()) is not None:
                return dead
            if self._answers.poll(50):
                answer = decode_from_rank(self._answers.recv())
                if isinstance(answer, RankFailed) and (failed is None or not answer.is_collective):
                    failed = answer
                elif isinstance(answer, Pong):
                    self._silent.discard(answer.rank)
                    self._progress[answer.rank] = answer
        last, first = min(self._progress, key=self._how_far), max(self._progress, key=self._how_far)
        if failed is not None and not failed.is_collective:
            return RankDied(f"rank {failed.rank}: {failed.message}", failed.field)
        if self._silent and failed is not None:  # at once, as a rule because the other end of a connection is gone
            return RankDied(f"rank {min(self._silent)} does not answer, and on rank {failed.rank}: {failed.message}")
        if self._silent:
            return RankDied(f"rank {min(self._silent)} has not answered for {self.timeout_s:g} s (distributed_timeout)")
        if failed is not None and self._how_far(last) == self._how_far(first):
            return RankDied(f"rank {failed.rank}: {failed.message}")
        return RankDied(
            f"a step has not ended for {self.timeout_s:g} s (distributed_timeout), and rank {last.rank} is behind: it "
            f"has finished {last.num_steps} steps and begun {last.num_collectives} collectives"
        )

    def _how_far(self, progress: Pong) -> tuple[int, int, int]:
        """Of ranks that have finished the same steps, those of later stages wait for those of earlier ones."""
        return progress.num_steps, progress.rank // self.tensor_parallel_size, progress.num_collectives

    def shutdown(self) -> None:
        """End the processes, with SIGKILL those that SIGTERM does not end. A second call does nothing."""
        if self._context.closed:
            return
        with contextlib.suppress(zmq.Again):
            self.send(Stop())
        for process in self.processes:
            process.terminate()
        deadline_s = time.monotonic() + SHUTDOWN_TIMEOUT_S
        for process in self.processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._context.destroy(linger=LINGER_MS)
        self._directory.cleanup()
