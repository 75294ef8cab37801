"""Which request is served next if more come than the replicas should have at once."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict, deque

from common.serving import QueueFullError, ShutdownError


class FairQueue:
    """Lets max_running requests run at once, and max_waiting wait. Clients take turns: the requests of one that sends a
    thousand wait for each other, and those of others only for their turn.

    Everything runs on one event loop.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self.num_running = self.num_waiting = 0
        self._turns: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # by client; the next one is first

    async def acquire(self, client: str) -> None:
        """Wait for a turn; release() ends it. Raises QueueFullError."""
        if self.num_running < self.max_running and not self.num_waiting:
            self.num_running += 1
            return
        if self.num_waiting >= self.max_waiting:
            self._make_room(client)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.setdefault(client, deque()).append(turn)
        self.num_waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self._turns.get(client, ()):  # it still waits
                self._leave(client, turn)
            elif not turn.cancelled() and turn.exception() is None:  # its turn has just come
                self.release()
            raise

    def _make_room(self, client: str) -> None:
        """In a full queue, the latest request of the client that has the most is refused, or the new one if its client
        would then have as many. Raises QueueFullError for the new one."""
        full = QueueFullError(f"{self.num_waiting} requests are waiting (max_queued_requests: {self.max_waiting})")
        longest = max(self._turns, key=lambda each: len(self._turns[each]), default=client)
        if len(self._turns.get(longest, ())) <= len(self._turns.get(client, ())) + 1:
            raise full
        turn = self._turns[longest][-1]
        self._leave(longest, turn)
        if not turn.cancelled():
            turn.set_exception(full)

    def release(self) -> None:
        """A request has ended."""
        self.num_running -= 1
        self._start_next()

    def resize(self, max_running: int) -> None:
        """Replicas have come or gone. If none is left, those who wait get a ShutdownError."""
        self.max_running = max_running
        self._start_next()
        if not max_running:
            turns, self._turns, self.num_waiting = self._turns, OrderedDict(), 0
            for turn in itertools.chain(*turns.values()):
                if not turn.cancelled():
                    turn.set_exception(ShutdownError("no replica is available"))

    def _start_next(self) -> None:
        while self.num_waiting and self.num_running < self.max_running:
            turn = self._take_next()
            self.num_waiting -= 1
            if not turn.cancelled():  # else its client has just left
                self.num_running += 1
                turn.set_result(None)

    def _take_next(self) -> asyncio.Future[None]:
        """Take the next client's oldest request out of _turns. The client goes behind the others."""
        client, turns = next(iter(self._turns.items()))
        turn = turns.popleft()
        self._turns.move_to_end(client)
        if not turns:
            del self._turns[client]
        return turn

    def _leave(self, client: str, turn: asyncio.Future[None]) -> None:
        self._turns[client].remove(turn)
        if not self._turns[client]:
            del self._turns[client]
        self.num_waiting -= 1


class RetryBudget:
    """Retries are limited to a share of the requests: if all replicas fail, retries must not multiply the load.

    share: retries per request, on average. reserve: how many may come at once.
    """

    def __init__(self, share: float = 0.2, reserve: int = 10) -> None:
        self.share, self.reserve, self.balance = share, reserve, float(reserve)

    def note_request(self) -> None:
        self.balance = min(self.reserve, self.balance + self.share)

    def allows_retry(self) -> bool:
        """Whether there may be one more. If so, it is spent."""
        if self.balance < 1:
            return False
        self.balance -= 1
        return True
