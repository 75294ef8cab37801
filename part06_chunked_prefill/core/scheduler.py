"""Who computes what in the next step: decided anew before every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from .block_manager import BlockManager
from .request import Request, RequestStatus


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step's work: the requests in it, how many tokens each had computed before and how many it computes now.

    Decodes come first. num_sampled_tokens: 1 for a request whose last known token is in the step, 0 for a chunk that
    ends before it. preempted: who had to leave for want of blocks. left: ids of all that stopped running, for whatever
    reason, since the step before; what a runner keeps for them can go.
    """

    requests: list[Request]
    num_computed_tokens: list[int]
    num_scheduled_tokens: list[int]
    num_sampled_tokens: list[int]
    preempted: list[Request]
    left: list[str]

    def add(self, request: Request, num_tokens: int) -> None:
        """The request computes some of what it lacks. What the step will bring is counted on from here on."""
        # exercise: add
        self.requests.append(request)
        self.num_computed_tokens.append(request.num_computed_tokens)
        self.num_scheduled_tokens.append(num_tokens)
        request.num_computed_tokens += num_tokens
        is_complete = request.num_computed_tokens == request.num_expected_tokens
        self.num_sampled_tokens.append(int(is_complete))
        request.num_output_placeholders += is_complete
        # exercise: end

    @property
    def sampled_requests(self) -> list[Request]:
        """Those that get a token from this step."""
        return [request for request, n in zip(self.requests, self.num_sampled_tokens, strict=True) if n]

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens)


class Scheduler:
    """Iteration-level scheduling (Orca, 2022), with vLLM's rules.

    There is no prefill phase and no decode phase: a request's num_computed_tokens chases its num_tokens. A decode lacks
    one token, a new request its whole prompt, a preempted one all that it had. One budget of tokens a step serves all:
    first every request that lacks one token, then chunks of those that lack more, in order, then new ones from the head
    of the queue, as long as max_num_seqs and the blocks allow (Sarathi-Serve, 2024).

    A step may be scheduled while the one before still runs: its tokens are not known, but their number is.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        *,
        enable_chunked_prefill: bool = True,
        long_prefill_token_threshold: int = 0,
        watermark: float = 0.01,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "a step must have room for a token of each request"
        self.blocks, self.max_num_seqs, self.max_num_batched_tokens = blocks, max_num_seqs, max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.long_prefill_token_threshold = long_prefill_token_threshold
        self.watermark_blocks = int(watermark * blocks.num_blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._left: list[str] = []

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def add_request(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> SchedulerOutput:
        """Give out this step's tokens, and the blocks they need."""
        output = SchedulerOutput([], [], [], [], [], self._left)
        self._schedule_running(output)
        if not output.preempted:  # who was short of blocks a moment ago does not invite more guests
            self._schedule_waiting(output)
        if output.requests:  # else no step is made of it, and nobody would be told
            self._left = []
        return output

    def _schedule_running(self, output: SchedulerOutput) -> None:
        """A token, and a block if need be, for each that lacks one; if there is no block, the latest has to leave.

        What they leave of the budget goes to chunks, which have their blocks already.
        """
        # exercise: schedule_running
        chunked = []
        for request in list(self.running):
            if request in output.preempted:
                break  # all that follow have left as well
            if request.num_expected_tokens >= request.max_num_tokens:
                continue  # a step in flight brings its last token
            if request.num_missing_tokens > 1:
                chunked.append(request)
                continue
            while not self.blocks.allocate(request.request_id, request.num_expected_tokens):
                victim = self.running[-1]
                self.preempt(victim)
                output.preempted.append(victim)
                if victim is request:
                    break
            else:
                output.add(request, 1)
        for request in chunked:
            if request not in output.preempted and (num_tokens := self._chunk_size(request, output)):
                output.add(request, num_tokens)
        # exercise: end

    def _schedule_waiting(self, output: SchedulerOutput) -> None:
        """First come, first served: if the head of the queue does not fit, nobody behind it is let past."""
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            num_tokens = self._chunk_size(request, output)
            if request.num_output_placeholders or num_tokens == 0 or not self._admit(request):
                break  # the first: it was preempted, and a step in flight brings it a token before it can go on
            self.running.append(self.waiting.popleft())
            request.status = RequestStatus.RUNNING
            output.add(request, num_tokens)

    def _chunk_size(self, request: Request, output: SchedulerOutput) -> int:
        """How many of its missing tokens a request may compute in this step; 0 if there is no room for it."""
        # exercise: chunk_size
        budget = self.max_num_batched_tokens - output.total_num_scheduled_tokens
        num_missing = request.num_missing_tokens
        if not self.enable_chunked_prefill:
            return num_missing if num_missing <= budget else 0
        return min(num_missing, budget, self.long_prefill_token_threshold or num_missing)
        # exercise: end

    def _admit(self, request: Request) -> bool:
        """Allocate a waiting request's blocks, unless that would leave fewer free than the watermark.

        It gets blocks for all its tokens, though the step may compute only some: a prompt that is let in with its first
        chunk alone would find the pool full half-way. Without the watermark it is let in with the last block, and the
        next step throws it out again. One that would run alone is let in anyway: nobody is there to be disturbed.
        """
        num_free_after = self.blocks.num_free_blocks - self.blocks.num_blocks_for(request.num_tokens)
        if self.running and num_free_after < self.watermark_blocks:
            return False
        return self.blocks.allocate(request.request_id, request.num_tokens)

    def preempt(self, request: Request) -> None:
        """Take all blocks of a running request away; it waits at the head of the queue and computes all again.

        Its output is kept: the tokens are known, only their keys and values are gone. A token in flight is still its
        own, and comes before it can be scheduled again.
        """
        self.running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def finish(self, request: Request) -> None:
        """A request has ended: its place and its blocks are free at once, also while a step that writes there runs.

        The next owner's step comes after that one. It may have been preempted meanwhile, and wait.
        """
        (self.running if request in self.running else self.waiting).remove(request)
        self._release(request)

    def abort(self, request_ids: Iterable[str]) -> list[Request]:
        """Forget requests wherever they are. Returns those that were there; one that has ended is no error."""
        wanted, found = set(request_ids), []
        for queue in (self.waiting, self.running):
            for request in [request for request in queue if request.request_id in wanted]:
                queue.remove(request)
                self._release(request)
                request.status = RequestStatus.FINISHED_ABORTED
                found.append(request)
        return found

    def _release(self, request: Request) -> None:
        self.blocks.free(request.request_id)
        self._left.append(request.request_id)
