"""Decides before every step which requests compute how many tokens in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ..messages import NewRequest, ScheduledRequest, StepInput
from .block_manager import BlockManager
from .request import Request, RequestStatus


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: the worker's input, its requests in the same order, and the requests that were preempted for it."""

    step: StepInput
    requests: list[Request]
    preempted: list[Request]

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(request.num_scheduled_tokens for request in self.step.requests)

    @property
    def sampled_requests(self) -> list[Request]:
        """The requests that get a token from this step."""
        pairs = zip(self.requests, self.step.requests, strict=True)
        return [request for request, share in pairs if share.is_sampled]


class Scheduler:
    """Iteration-level scheduling (Orca, 2022), with vLLM's rules.

    There is no prefill phase and no decode phase: num_computed_tokens of a request catches up with its num_tokens. A
    decode has one token to compute, a new request its whole prompt, a preempted request all its tokens. All share the
    step's token budget: first all decodes, then chunks of prompts that are partly computed, then new requests from the
    head of the queue, as long as max_num_seqs and free blocks allow it (Sarathi-Serve, 2024).

    A step may be scheduled while the previous one runs: that step's tokens are not known yet, but their number is.
    """

    def __init__(
        self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, *,
        enable_chunked_prefill: bool = True, long_prefill_token_threshold: int = 0,
        watermark: float = 0.01,
    ) -> None:  # fmt: skip
        assert max_num_batched_tokens >= max_num_seqs, "a step must have room for one token of each request"
        self.blocks, self.max_num_seqs, self.max_num_batched_tokens = blocks, max_num_seqs, max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.long_prefill_token_threshold = long_prefill_token_threshold
        self.watermark_blocks = int(watermark * blocks.num_blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.free_rows = list(reversed(range(max_num_seqs)))
        self.num_preemptions = 0

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def add_request(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> SchedulerOutput:
        """Assign this step's tokens to requests, and allocate the blocks they need."""
        output = SchedulerOutput(StepInput([], []), [], [])
        self._schedule_running(output)
        if not output.preempted:  # after a preemption, admit no new requests
            self._schedule_waiting(output)
        return output

    def _schedule_running(self, output: SchedulerOutput) -> None:
        """One token for every decode; then chunks from the rest of the budget. Their blocks were allocated already."""
        # exercise: schedule_running
        prefills = []
        for request in list(self.running):
            if request.status is RequestStatus.PREEMPTED:
                break  # so are all requests after it
            if request.num_expected_tokens >= request.max_num_tokens:
                continue  # a step in flight produces its last token
            if request.num_new_tokens > 1:
                prefills.append(request)
            elif self._grow_or_preempt(request, output):
                self._add(request, 1, output)
        for request in prefills:  # none was preempted: a decode preempts only itself or requests behind it
            if num_tokens := self._chunk_size(request.num_new_tokens, output):
                self._add(request, num_tokens, output)
        # exercise: end

    def _grow_or_preempt(self, request: Request, output: SchedulerOutput) -> bool:
        """Give a request the block that its newest token may need. While none is free, preempt the latest request.

        Returns False if that was the request itself.
        """
        while not self.blocks.grow(request.request_id, request.num_expected_tokens):
            victim = self.running[-1]
            self.preempt(victim)
            output.preempted.append(victim)
            if victim is request:
                return False
        return True

    def _schedule_waiting(self, output: SchedulerOutput) -> None:
        """First come, first served: if the head of the queue does not fit, the requests behind it wait too."""
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if request.num_output_placeholders:
                break  # it was preempted, and first gets a token from a step in flight
            num_tokens = self._chunk_size(request.num_new_tokens, output)
            if not num_tokens or not self._admit(request):
                break
            self._start(self.waiting.popleft(), output)
            self._add(request, num_tokens, output)

    def _chunk_size(self, num_new_tokens: int, output: SchedulerOutput) -> int:
        """How many of its new tokens a request may compute in this step; 0 if the budget has no room for it."""
        # exercise: chunk_size
        budget = self.max_num_batched_tokens - output.total_num_scheduled_tokens
        if not self.enable_chunked_prefill:
            return num_new_tokens if num_new_tokens <= budget else 0
        return min(num_new_tokens, budget, self.long_prefill_token_threshold or num_new_tokens)
        # exercise: end

    def _admit(self, request: Request) -> bool:
        """Allocate a waiting request's blocks, unless that would leave fewer free blocks than the watermark.

        It gets blocks for all its tokens, even if the step computes only some: a prompt with blocks for only its first
        chunk could find the pool full halfway. Without the watermark, a request is admitted into the last blocks and
        preempted one step later. A request that would run alone is exempt: it takes no blocks from others.
        """
        num_free_after = self.blocks.num_free_blocks - self.blocks.num_blocks_for(request.num_tokens)
        if self.running and num_free_after < self.watermark_blocks:
            return False
        return self.blocks.admit(request.request_id, request.num_tokens)

    def _start(self, request: Request, output: SchedulerOutput) -> None:
        """Add an admitted request to the batch, and send all its tokens to the worker."""
        self.running.append(request)
        request.status, request.row = RequestStatus.RUNNING, self.free_rows.pop()
        output.step.new_requests.append(
            NewRequest(request.row, request.token_ids, len(request.prompt_token_ids), request.params)
        )

    def _add(self, request: Request, num_tokens: int, output: SchedulerOutput) -> None:
        """Schedule the request's next num_tokens tokens in this step. From here on, they count as computed."""
        # exercise: add
        is_sampled = num_tokens == request.num_new_tokens
        assert request.row is not None, f"request {request.request_id} is not in the batch"
        table = self.blocks.block_tables[request.request_id]
        new_block_ids, request.num_sent_blocks = table[request.num_sent_blocks :], len(table)
        output.requests.append(request)
        output.step.requests.append(
            ScheduledRequest(request.row, request.num_computed_tokens, num_tokens, is_sampled, new_block_ids)
        )
        request.num_computed_tokens += num_tokens
        request.num_output_placeholders += is_sampled
        # exercise: end

    def preempt(self, request: Request) -> None:
        """Free all blocks of a running request and put it back at the head of the queue, to be computed again.

        It keeps its output: the tokens are known, only their keys and values are lost. A token in flight still counts,
        and arrives before the request is scheduled again.
        """
        self._leave(request)
        request.num_computed_tokens = 0
        request.status = RequestStatus.PREEMPTED
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def finish(self, request: Request) -> None:
        """Free a finished request's row and blocks at once, even if a step in flight still writes to them.

        That is safe: the next owner's step runs later. If the request was preempted, it is in the waiting queue.
        """
        if request.row is None:
            self.waiting.remove(request)
        else:
            self._leave(request)

    def abort(self, request_ids: Iterable[str]) -> list[Request]:
        """Remove requests wherever they are. Returns those that were found; unknown ids are ignored."""
        wanted = set(request_ids)
        found = [request for request in (*self.waiting, *self.running) if request.request_id in wanted]
        for request in found:
            if request.status is RequestStatus.RUNNING:
                self._leave(request)
            else:
                self.waiting.remove(request)
            request.status = RequestStatus.FINISHED_ABORTED
        return found

    def reset(self) -> list[Request]:
        """Remove all requests and free all blocks. Returns the requests, running ones first."""
        requests = [*self.running, *self.waiting]
        self.abort(request.request_id for request in requests)
        self.blocks.reset()
        return requests

    def _leave(self, request: Request) -> None:
        """Take a running request out of the batch, and free its row and blocks."""
        assert request.row is not None, f"request {request.request_id} is not in the batch"
        self.running.remove(request)
        self.blocks.free(request.request_id)
        self.free_rows.append(request.row)
        request.row, request.num_sent_blocks = None, 0
