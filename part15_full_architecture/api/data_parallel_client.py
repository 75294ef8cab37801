"""Several engine cores behind the interface of one: each has requests of its own, and a model, or all share experts."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.process import BaseProcess

import msgspec

from ..config import EngineConfig
from ..messages import (
    AbortRequests,
    AddRequest,
    CoreGroup,
    EngineCoreOutputs,
    FromCore,
    PrefixCacheReset,
    ResetPrefixCache,
    StartWave,
    ToCore,
)
from .core_client import CoreClient
from .load_balancer import LoadBalancer


class DataParallelClient:
    """Starts data_parallel_size engine cores, and sends each request to one of them.

    If one core dies, the server ends: its requests are lost, and the others could be too slow without it, or need its
    experts. Raises FieldError or OSError if a core cannot start.
    """

    def __init__(self, config: EngineConfig) -> None:
        num_cores = config.data_parallel_size
        self.balancer = LoadBalancer(num_cores)
        self.clients: list[CoreClient] = []
        self._directory = tempfile.TemporaryDirectory(prefix="llm-cores-", ignore_cleanup_errors=True)
        try:
            for core in range(num_cores):
                cores = CoreGroup(core, num_cores, self._directory.name) if config.enable_expert_parallel else None
                self.clients.append(CoreClient(config_of(config, core), False, cores))
            waiting = self.clients
            while waiting:  # for all at once: one that fails may be why another one waits
                waiting = [client for client in waiting if not client.is_ready()]
        except BaseException:
            self.shutdown()
            raise
        if config.device == "cpu":  # as in core/executor.py
            self._directory.cleanup()
        ready = [client.ready for client in self.clients]
        self.stats = [each.stats for each in ready]
        self.ready = msgspec.structs.replace(
            ready[0], num_kv_blocks=sum(each.num_kv_blocks - 1 for each in ready) + 1, stats=merge_stats(self.stats)
        )
        self.core_of: dict[str, int] = {}  # of each request that has not ended
        self._resets: list[deque[bool]] = [deque() for _ in self.clients]  # answers to ResetPrefixCache, of each core
        self._dead = self.clients[0]

    @property
    def processes(self) -> list[BaseProcess]:
        return [client.process for client in self.clients]

    def send(self, message: ToCore) -> None:
        """Queue a message at the core that it concerns, or at all. Never waits."""
        match message:
            case AddRequest():
                core = self.core_of[message.request_id] = self.balancer.choose()
                self.clients[core].send(message)
            case AbortRequests():
                self._abort(message.request_ids)
            case ResetPrefixCache():
                for client in self.clients:
                    client.send(message)

    def _abort(self, request_ids: Iterable[str]) -> None:
        by_core: dict[int, list[str]] = {}
        for request_id in request_ids:
            if (core := self.core_of.pop(request_id, None)) is not None:
                by_core.setdefault(core, []).append(request_id)
        for core, ids in by_core.items():
            self.clients[core].send(AbortRequests(ids))

    def watch(
        self, loop: asyncio.AbstractEventLoop, on_outputs: Callable[[], None], on_death: Callable[[], None]
    ) -> None:
        def note(dead: CoreClient) -> None:
            self._dead = dead
            on_death()

        for client in self.clients:
            client.watch(loop, on_outputs, lambda client=client: note(client))  # type: ignore[misc]

    def unwatch(self, loop: asyncio.AbstractEventLoop) -> None:
        for client in self.clients:
            client.unwatch(loop)

    def receive(self) -> list[FromCore]:
        """All messages that have arrived, as if they were one core's."""
        return [
            merged
            for core, client in enumerate(self.clients)
            for message in client.receive()
            if (merged := self._merge(core, message)) is not None
        ]

    def _merge(self, core: int, message: FromCore) -> FromCore | None:
        match message:
            case EngineCoreOutputs():
                self.stats[core] = stats = message.stats
                num_waiting, num_running = stats["num_requests_waiting"], stats["num_requests_running"]
                self.balancer.report(core, int(num_waiting), int(num_running))
                for output in message.outputs:
                    if output.finish_reason or output.error is not None:
                        self.core_of.pop(output.request_id, None)
                return EngineCoreOutputs(message.outputs, merge_stats(self.stats))
            case StartWave():
                for other, client in enumerate(self.clients):
                    if other != core:
                        client.send(message)
                return None
            case PrefixCacheReset():
                self._resets[core].append(message.was_reset)
                if not all(self._resets):
                    return None
                return PrefixCacheReset(all([answers.popleft() for answers in self._resets]))
        return message

    def wait_for_messages(self) -> None:
        self._dead.wait_for_messages()

    def describe_exit(self) -> str:
        return f"number {self.clients.index(self._dead)}, {self._dead.describe_exit()}"

    def shutdown(self) -> None:
        """Stop all processes. A second call does nothing."""
        for client in self.clients:
            if client.process.pid is not None:
                client.process.terminate()  # all of them, before waiting for one
        for client in self.clients:
            client.shutdown()
        self._directory.cleanup()


def config_of(config: EngineConfig, core: int) -> EngineConfig:
    """The config of one core: its share of the CPUs, its own GPU, its own trace."""
    num_cores = config.data_parallel_size
    return replace(
        config,
        num_threads=config.num_threads or max(1, (os.cpu_count() or 1) // num_cores),
        device=f"cuda:{core}" if config.device == "cuda" and config.num_ranks == 1 else config.device,
        trace=None if config.trace is None else f"{config.trace}.{core}",
    )


def merge_stats(stats: list[dict[str, float]]) -> dict[str, float]:
    """Sums; for shares, whose names end in _perc, the means."""
    merged = {name: sum(each[name] for each in stats) for name in stats[0]}
    return {name: value / len(stats) if name.endswith("_perc") else value for name, value in merged.items()}


def make_core_client(config: EngineConfig) -> CoreClient | DataParallelClient:
    return CoreClient(config) if config.data_parallel_size == 1 else DataParallelClient(config)
