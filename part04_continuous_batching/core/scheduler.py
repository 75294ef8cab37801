"""Who computes what in the next step: decided anew before every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from .block_manager import BlockManager
from .request import Request, RequestStatus


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step's work: the requests in it and how many of its missing tokens each computes; and who had to leave."""

    requests: list[Request]
    num_scheduled_tokens: list[int]
    preempted: list[Request]

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens)


class Scheduler:
    """Iteration-level scheduling (Orca, 2022), with vLLM's rules.

    There is no prefill phase and no decode phase: a request's num_computed_tokens chases its num_tokens. A decode lacks
    one token, a new request its whole prompt, a preempted one all that it had. Running requests come first, in order;
    then whole requests from the head of the queue, as long as the token budget, max_num_seqs and the blocks allow.
    """

    def __init__(
        self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, watermark: float = 0.01
    ) -> None:
        self.blocks, self.max_num_seqs, self.max_num_batched_tokens = blocks, max_num_seqs, max_num_batched_tokens
        self.watermark_blocks = int(watermark * blocks.num_blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def add_request(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> SchedulerOutput:
        """Give out this step's tokens, and the blocks they need."""
        output = SchedulerOutput([], [], [])
        self._schedule_running(output)
        if not output.preempted:  # who was short of blocks a moment ago does not invite more guests
            self._schedule_waiting(output)
        return output

    def _schedule_running(self, output: SchedulerOutput) -> None:
        """A block for each request that crosses into a new one; if there is none, the latest arrival has to leave."""
        # exercise: schedule_running
        for request in list(self.running):
            if request in output.preempted:
                break  # all that follow have left as well
            while not self.blocks.allocate(request.request_id, request.num_tokens):
                victim = self.running[-1]
                self.preempt(victim)
                output.preempted.append(victim)
                if victim is request:
                    return
            output.requests.append(request)
            output.num_scheduled_tokens.append(request.num_tokens - request.num_computed_tokens)
        # exercise: end

    def _schedule_waiting(self, output: SchedulerOutput) -> None:
        """First come, first served: if the head of the queue does not fit, nobody behind it is let past."""
        # exercise: schedule_waiting
        budget = self.max_num_batched_tokens - output.total_num_scheduled_tokens
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            num_new_tokens = request.num_tokens - request.num_computed_tokens
            if num_new_tokens > budget or not self._admit(request):
                break
            budget -= num_new_tokens
            self.running.append(self.waiting.popleft())
            request.status = RequestStatus.RUNNING
            output.requests.append(request)
            output.num_scheduled_tokens.append(num_new_tokens)
        # exercise: end

    def _admit(self, request: Request) -> bool:
        """Allocate a waiting request's blocks, unless that would leave fewer free than the watermark.

        Without it a request is let in with the last block, and the next step throws it out again. One that would run
        alone is let in anyway: nobody is there to be disturbed.
        """
        # exercise: admit
        num_free_after = self.blocks.num_free_blocks - self.blocks.num_blocks_for(request.num_tokens)
        if self.running and num_free_after < self.watermark_blocks:
            return False
        return self.blocks.allocate(request.request_id, request.num_tokens)
        # exercise: end

    def preempt(self, request: Request) -> None:
        """Take all blocks of a running request away; it waits at the head of the queue and computes all again.

        Its output is kept: the tokens are known, only their keys and values are gone.
        """
        # exercise: preempt
        self.running.remove(request)
        self.blocks.free(request.request_id)
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)
        self.num_preemptions += 1
        # exercise: end

    def finish(self, request: Request) -> None:
        """A running request has ended: its place and its blocks are free at once."""
        self.running.remove(request)
        self.blocks.free(request.request_id)

    def abort(self, request_ids: Iterable[str]) -> list[Request]:
        """Forget requests wherever they are. Returns those that were there; one that has ended is no error."""
        wanted, found = set(request_ids), []
        for queue in (self.waiting, self.running):
            for request in [request for request in queue if request.request_id in wanted]:
                queue.remove(request)
                self.blocks.free(request.request_id)
                request.status = RequestStatus.FINISHED_ABORTED
                found.append(request)
        return found
