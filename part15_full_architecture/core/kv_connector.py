"""One interface for every place outside the device's pool that KV comes from and goes to."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..messages import Copy, Notice, Transfer, TransferDone
from .request import Request


class KVConnector(Protocol):
    """The scheduler's side of a place that KV comes from and goes to; the worker's side carries out its transfers.

    Nothing here waits. The scheduler asks, goes on with other requests, and asks again once is_waiting() is False.
    Modeled on vLLM's KVConnectorBase_V1; its names are in the README.
    """

    @property
    def is_busy(self) -> bool:
        """Whether step() must be called for it, even without requests."""
        ...

    @property
    def has_leaving_blocks(self) -> bool:
        """Whether there is a block that no request has, and that will be free as soon as a transfer ends."""
        ...

    def add_request(self, request: Request) -> None:
        """A request joins the queue."""
        ...

    def find(self, request: Request, num_on_device: int) -> int | None:
        """How many tokens to load after the first num_on_device ones. None: this isn't known yet. It may be called any
        number of times, and orders no load."""
        ...

    def load(self, request: Request, num_on_device: int, num_tokens: int) -> None:
        """Load what find() has found into the request's block table. Then request.num_found_tokens says how many of its
        first tokens are there."""
        ...

    def is_waiting(self, request: Request) -> bool:
        """Whether what the request waits for has not ended yet."""
        ...

    def note_start(self, request: Request) -> None:
        """The request starts to run, with what was loaded or without."""
        ...

    def save(self, request: Request, full: range) -> None:
        """After the next step, or one in flight, the request's first num_computed_tokens tokens have KV. full: the
        blocks that become full, as indices of its block table."""
        ...

    def note_leave(self, request: Request) -> None:
        """The request leaves the batch or the queue: finished, preempted or aborted. Its blocks are freed next, but for
        those that are leased."""
        ...

    def note_launch(self) -> None:
        """A step was launched, or none is in flight: then note_result() follows at once."""
        ...

    def note_result(self) -> None:
        """The first of the steps in flight has succeeded."""
        ...

    def note_done(self, transfer: Transfer, request: Request | None, done: TransferDone) -> None:
        """A transfer that it has ordered has ended."""
        ...

    def reset(self) -> None:
        """A step has failed, and all requests with it. Every transfer must end soon."""
        ...


@dataclass(frozen=True, slots=True)
class Pending:
    """A transfer that has not ended, who has ordered it, and the request that it was made for, if there is one."""

    transfer: Transfer
    connector: KVConnector
    request: Request | None
    start_s: float


@dataclass(slots=True)
class Orders:
    """What connectors have ordered from the worker. new: what it hasn't got yet. pending: what it hasn't answered."""

    new: deque[Transfer | Notice] = field(default_factory=deque)
    pending: dict[int, Pending] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def next_id(self) -> int:
        return next(self._ids)

    def add(self, transfer: Transfer, connector: KVConnector, request: Request | None = None) -> int:
        """Returns the transfer's id."""
        self.new.append(transfer)
        self.pending[transfer.transfer_id] = Pending(transfer, connector, request, time.monotonic())
        return transfer.transfer_id

    def note_done(self, done: TransferDone) -> Pending:
        """A transfer has ended. Returns what was ordered."""
        pending = self.pending.pop(done.transfer_id)
        pending.connector.note_done(pending.transfer, pending.request, done)
        return pending

    def drop_copies(self) -> None:
        """Copies that the worker hasn't got need not begin."""
        orders, self.new = self.new, deque()
        for order in orders:
            if isinstance(order, Copy):
                self.note_done(TransferDone(order.transfer_id))
            else:
                self.new.append(order)


class Connectors:
    """Several as one. The first one that has something to load for a request loads it. (vLLM's MultiConnector.)"""

    def __init__(self, connectors: Sequence[KVConnector]) -> None:
        self.connectors = connectors
        self._chosen: dict[str, KVConnector] = {}  # by request id: which one loads, or is waited for

    @property
    def is_busy(self) -> bool:
        return any(connector.is_busy for connector in self.connectors)

    @property
    def has_leaving_blocks(self) -> bool:
        return any(connector.has_leaving_blocks for connector in self.connectors)

    def add_request(self, request: Request) -> None:
        for connector in self.connectors:
            connector.add_request(request)

    def find(self, request: Request, num_on_device: int) -> int | None:
        for connector in self.connectors:
            self._chosen[request.request_id] = connector
            if (num_tokens := connector.find(request, num_on_device)) != 0:
                return num_tokens
        return 0

    def load(self, request: Request, num_on_device: int, num_tokens: int) -> None:
        self._chosen[request.request_id].load(request, num_on_device, num_tokens)

    def is_waiting(self, request: Request) -> bool:
        return self._chosen[request.request_id].is_waiting(request)

    def note_start(self, request: Request) -> None:
        self._chosen.pop(request.request_id, None)
        for connector in self.connectors:
            connector.note_start(request)

    def save(self, request: Request, full: range) -> None:
        for connector in self.connectors:
            connector.save(request, full)

    def note_leave(self, request: Request) -> None:
        self._chosen.pop(request.request_id, None)
        for connector in self.connectors:
            connector.note_leave(request)

    def note_launch(self) -> None:
        for connector in self.connectors:
            connector.note_launch()

    def note_result(self) -> None:
        for connector in self.connectors:
            connector.note_result()

    def note_done(self, transfer: Transfer, request: Request | None, done: TransferDone) -> None:
        raise AssertionError("transfers belong to one connector")

    def reset(self) -> None:
        self._chosen.clear()
        for connector in self.connectors:
            connector.reset()
