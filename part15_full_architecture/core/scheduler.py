"""Decides before every step which requests compute how many tokens in it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..messages import NewRequest, ScheduledRequest, StepInput
from .block_manager import BlockManager
from .free_queue import KVBlock
from .kv_connector import Connectors, KVConnector
from .request import Request, RequestStatus
from .speculation import Speculation


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
    def pairs(self) -> list[tuple[Request, ScheduledRequest]]:
        """Each request with its share of the step."""
        return list(zip(self.requests, self.step.requests, strict=True))


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
        speculation: Speculation | None = None, watermark: float = 0.01, num_stages: int = 1,
        connector: KVConnector | None = None,
    ) -> None:  # fmt: skip
        assert max_num_batched_tokens >= max_num_seqs, "a step must have room for one token of each request"
        self.blocks, self.max_num_seqs, self.max_num_batched_tokens = blocks, max_num_seqs, max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.long_prefill_token_threshold = long_prefill_token_threshold
        self.speculation, self.num_stages = speculation, num_stages
        self.connector = connector or Connectors([])
        self.watermark_blocks = int(watermark * blocks.num_blocks)
        self.waiting: deque[Request] = deque()
        self.loading: list[Request] = []  # wait for a transfer; those whose blocks are loaded have a block table
        self.loaded: deque[Request] = deque()  # have their blocks, and run next
        self.running: list[Request] = []
        self.free_rows = list(reversed(range(max_num_seqs)))
        self._arrivals = itertools.count()
        self.num_preemptions = 0
        self.num_queried_tokens = self.num_hit_tokens = 0

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.loading or self.loaded or self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.loading) + len(self.loaded)

    def add_request(self, request: Request) -> None:
        request.arrival = next(self._arrivals)
        self.waiting.append(request)
        self.connector.add_request(request)

    def schedule(self) -> SchedulerOutput:
        """Assign this step's tokens to requests, and allocate the blocks they need."""
        output = SchedulerOutput(StepInput([], []), [], [])
        self._schedule_running(output)
        if not output.preempted:  # after a preemption, admit no new requests
            self._sort_loading()
            self._schedule_loaded(output)
            if not self.loaded:
                self._schedule_waiting(output)
        return output

    def can_run_ahead(self) -> bool:
        """Whether a step can be scheduled while the previous one is in flight.

        Not if a request has draft tokens in flight, will get some from that step, or finds some by n-gram lookup: its
        next position depends on how many are accepted. With several pipeline stages, a request is in one step at a
        time, and others can be scheduled.
        """
        return self.num_stages > 1 or not any(
            request.num_output_placeholders > 1 or request.num_pending_drafts or self._look_up_drafts(request)
            for request in self.running
        )

    def _schedule_running(self, output: SchedulerOutput) -> None:
        """One token for every decode; then chunks from the rest of the budget. Their blocks were allocated already."""
        prefills = []
        num_spare = self.max_num_batched_tokens - len(self.running)  # budget for draft tokens
        num_left = -(-len(self.running) // self.num_stages)  # decodes: an equal share for each step in the pipeline
        for request in list(self.running):
            if request.status is RequestStatus.PREEMPTED:
                break  # so are all requests after it
            if self.num_stages > 1 and request.num_output_placeholders:
                continue  # its newest token is in flight
            if request.num_expected_tokens >= request.max_num_tokens:
                continue  # a step in flight produces its last token
            if request.num_new_tokens > 1:
                prefills.append(request)
                continue
            if not num_left:
                continue  # its token is for another step in the pipeline
            drafts, num_left = self._choose_drafts(request, num_spare), num_left - 1
            if self._grow_or_preempt(request, output):
                num_spare -= len(drafts)
                self._add(request, 1 + len(drafts), output, drafts)
        for request in prefills:  # none was preempted: a decode preempts only itself or requests behind it
            if num_tokens := self._chunk_size(request.num_new_tokens, output):
                self._add(request, num_tokens, output)

    def _grow_or_preempt(self, request: Request, output: SchedulerOutput) -> bool:
        """Give a request the block that its newest token may need. While none is free, preempt the latest request.

        Returns False if that was the request itself, or if a block will be free soon without a preemption.
        """
        while not self.blocks.grow(request.request_id, request.num_expected_tokens):
            if self.connector.has_leaving_blocks:
                return False
            victim = self.running[-1]
            self.preempt(victim)
            output.preempted.append(victim)
            if victim is request:
                return False
        return True

    def _choose_drafts(self, request: Request, num_spare: int) -> list[int]:
        """The draft tokens that a decode verifies in this step: at most num_spare, and none if blocks are short."""
        drafts, request.draft_token_ids = request.draft_token_ids, []
        if not request.num_output_placeholders:
            drafts = drafts or self._look_up_drafts(request)
        num_room = request.max_num_tokens - request.num_tokens - 1  # the answer's last token is not proposed
        drafts = drafts[: max(0, min(num_spare, num_room))]
        return drafts if drafts and self._allocate_draft_slots(request, len(drafts)) else []

    def _look_up_drafts(self, request: Request) -> list[int]:
        """Draft tokens from n-gram lookup, for a decode that has more than one token to go."""
        is_last = request.num_expected_tokens + 1 >= request.max_num_tokens
        if self.speculation is None or request.num_new_tokens > 1 or is_last:
            return []
        return self.speculation.look_up(request, len(self.running))

    def _num_next_drafts(self, request: Request, num_drafts: int) -> int:
        """How many draft tokens the worker proposes after this step, in which the request verifies num_drafts."""
        if self.speculation is None or self.speculation.method != "draft_model":
            return 0
        num_room = request.max_num_tokens - request.num_expected_tokens - num_drafts - 2
        num_tokens = min(self.speculation.num_tokens(request, len(self.running)), num_room)
        has_slots = num_tokens > 0 and self._allocate_draft_slots(request, num_drafts + num_tokens)
        return num_tokens if has_slots else 0

    def _allocate_draft_slots(self, request: Request, num_tokens: int) -> bool:
        """Allocate blocks for num_tokens tokens after the last expected one. Draft tokens never cause a preemption:
        they take a block only if one stays free for each other running request."""
        num_tokens += request.num_expected_tokens
        return self.blocks.grow(request.request_id, num_tokens, num_reserved=len(self.running) - 1)

    def _sort_loading(self) -> None:
        """Requests whose transfer has ended: those that have blocks run next, the others look again for theirs."""
        done = [request for request in self.loading if not self.connector.is_waiting(request)]
        for request in done:
            self.loading.remove(request)
        self.loaded += [request for request in done if request.request_id in self.blocks.block_tables]
        for request in [request for request in done if request.request_id not in self.blocks.block_tables]:
            request.status = RequestStatus.WAITING
            later = (place for place, other in enumerate(self.waiting) if other.arrival > request.arrival)
            self.waiting.insert(next(later, len(self.waiting)), request)

    def _schedule_loaded(self, output: SchedulerOutput) -> None:
        """Requests whose blocks have been loaded. They have room for all their tokens already. The last token is
        computed in any case, because its logits are needed."""
        while self.loaded and len(self.running) < self.max_num_seqs:
            num_found_tokens = min(self.loaded[0].num_found_tokens, self.loaded[0].num_tokens - 1)
            num_tokens = self._chunk_size(self.loaded[0].num_tokens - num_found_tokens, output)
            if not num_tokens:
                break
            request = self.loaded.popleft()
            self._start(request, num_found_tokens, output)
            self._add(request, num_tokens, output)

    def _schedule_waiting(self, output: SchedulerOutput) -> None:
        """First come, first served: if the head of the queue does not fit, the requests behind it wait too. A request
        that waits for a transfer leaves the queue meanwhile."""
        while self.waiting and self._num_admitted < self.max_num_seqs:
            request = self.waiting[0]
            if request.num_output_placeholders:
                break  # it was preempted, and first gets a token from a step in flight
            # A request that still needs prompt logprobs cannot use hits: the logits of cached tokens are not computed.
            may_hit = request.prompt_logprobs is None
            cached = self.blocks.find_cached(request) if may_hit else []
            num_cached_tokens = len(cached) * self.blocks.block_size
            num_to_load = self.connector.find(request, num_cached_tokens) if may_hit else 0
            if num_to_load is None:
                self._wait_for_transfer(request)
                continue
            num_tokens = self._chunk_size(request.num_tokens - num_cached_tokens, output)
            if not (num_tokens or num_to_load) or not self._admit(request, cached):
                break
            if num_to_load:
                self.connector.load(request, num_cached_tokens, num_to_load)
                self._wait_for_transfer(request)
                continue
            self._start(self.waiting.popleft(), num_cached_tokens, output)
            self._add(request, num_tokens, output)

    @property
    def _num_admitted(self) -> int:
        """Requests that run or will run soon. Those that wait for another engine without blocks don't keep others out:
        if these are what the other engine waits for, nothing would go on."""
        tables = self.blocks.block_tables
        num_loading = sum(each.kv_transfer is None or each.request_id in tables for each in self.loading)
        return len(self.running) + num_loading + len(self.loaded)

    def _wait_for_transfer(self, request: Request) -> None:
        """Move the head of the queue to those that wait for a transfer."""
        self.loading.append(self.waiting.popleft())
        request.status = RequestStatus.WAITING_FOR_KV

    def _chunk_size(self, num_new_tokens: int, output: SchedulerOutput) -> int:
        """How many of its new tokens a request may compute in this step; 0 if the budget has no room for it."""
        budget = self.max_num_batched_tokens - output.total_num_scheduled_tokens
        if not self.enable_chunked_prefill:
            return num_new_tokens if num_new_tokens <= budget else 0
        return min(num_new_tokens, budget, self.long_prefill_token_threshold or num_new_tokens)

    def _admit(self, request: Request, cached: list[KVBlock]) -> bool:
        """Allocate a waiting request's blocks, unless that would leave fewer free blocks than the watermark.

        It gets blocks for all its tokens, even if the step computes only some: a prompt with blocks for only its first
        chunk could find the pool full halfway. Without the watermark, a request is admitted into the last blocks and
        preempted one step later. A request that would run alone is exempt: it takes no blocks from others.
        """
        num_free_after = self.blocks.num_free_blocks - self.blocks.num_blocks_needed(request.num_tokens, cached)
        if self.blocks.block_tables and num_free_after < self.watermark_blocks:
            return False
        return self.blocks.admit(request.request_id, request.num_tokens, cached)

    def _start(self, request: Request, num_cached_tokens: int, output: SchedulerOutput) -> None:
        """Add an admitted request to the batch, and send all its tokens to the worker."""
        self.running.append(request)
        request.note("scheduled")
        request.num_computed_tokens = num_cached_tokens
        if request.num_cached_tokens is None:  # a preempted request that finds its own blocks does not count
            request.num_cached_tokens = num_cached_tokens
            self.num_queried_tokens += request.num_tokens if request.prompt_logprobs is None else 0
            self.num_hit_tokens += num_cached_tokens
        self.connector.note_start(request)
        request.status, request.row = RequestStatus.RUNNING, self.free_rows.pop()
        request.num_sent_tokens = request.num_tokens
        num_drafted, request.num_drafted_tokens = request.num_drafted_tokens, None
        output.step.new_requests.append(
            NewRequest(
                request.row, request.token_ids, len(request.prompt_token_ids), request.params,
                num_cached_tokens if num_drafted is None else num_drafted,
            )
        )  # fmt: skip

    def _add(self, request: Request, num_tokens: int, output: SchedulerOutput, drafts: Sequence[int] = ()) -> None:
        """Schedule the request's next num_tokens tokens in this step. From here on, they count as computed.

        drafts: the draft tokens, which are the last of these; each one may produce another token.

        Blocks that become full can be found at once, even by other requests of this step, because every layer writes
        all keys and values before it reads any.
        """
        is_sampled = num_tokens == request.num_new_tokens + len(drafts)
        request.num_pending_drafts = self._num_next_drafts(request, len(drafts)) if is_sampled else 0
        assert request.row is not None, f"request {request.request_id} is not in the batch"
        table = self.blocks.block_tables[request.request_id]
        new_block_ids, request.num_sent_blocks = table[request.num_sent_blocks :], len(table)
        output.requests.append(request)
        output.step.requests.append(
            ScheduledRequest(
                row=request.row, num_computed_tokens=request.num_computed_tokens, num_scheduled_tokens=num_tokens,
                is_sampled=is_sampled, new_block_ids=new_block_ids, draft_token_ids=list(drafts),
                num_next_drafts=request.num_pending_drafts, new_token_ids=self._new_token_ids(request),
            )
        )  # fmt: skip
        request.num_computed_tokens += num_tokens
        request.num_output_placeholders += is_sampled + len(drafts)
        self._cache_full_blocks(request, request.num_computed_tokens)

    def _cache_full_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Blocks that are full now can be found, and will be saved."""
        full = self.blocks.cache_full_blocks(request, min(num_computed_tokens, request.num_tokens))
        self.connector.save(request, full)

    def _new_token_ids(self, request: Request) -> list[int]:
        """The tokens that the first pipeline stages do not know yet."""
        if self.num_stages == 1:
            return []
        start, request.num_sent_tokens = request.num_sent_tokens, request.num_tokens
        return request.tokens_between(start, request.num_tokens)

    def preempt(self, request: Request) -> None:
        """Free all blocks of a running request and put it back at the head of the queue, to be computed again.

        It keeps its output: the tokens are known, only their keys and values are lost. A token in flight still counts,
        and arrives before the request is scheduled again.
        """
        self._leave(request)
        request.note("preempted")
        request.num_computed_tokens = 0
        request.status = RequestStatus.PREEMPTED
        request.draft_token_ids, request.num_pending_drafts = [], 0
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
        queues: tuple[deque[Request] | list[Request], ...] = (self.waiting, self.loading, self.loaded)
        found = [each for queue in (*queues, self.running) for each in queue if each.request_id in wanted]
        for request in found:
            if request.status is RequestStatus.RUNNING:
                self._leave(request)
            else:
                next(queue for queue in queues if request in queue).remove(request)
                self.connector.note_leave(request)
                self.blocks.free(request.request_id)  # a request whose blocks are loaded has some
            request.status = RequestStatus.FINISHED_ABORTED
        return found

    def reset(self) -> list[Request]:
        """Remove all requests and free all blocks. Returns the requests, running ones first."""
        requests = [*self.running, *self.loading, *self.loaded, *self.waiting]
        self.abort(request.request_id for request in requests)
        self.blocks.reset()
        return requests

    def _leave(self, request: Request) -> None:
        """Take a running request out of the batch, and free its row and blocks."""
        assert request.row is not None, f"request {request.request_id} is not in the batch"
        self.running.remove(request)
        self._cache_full_blocks(request, request.num_computed_tokens - request.num_output_placeholders)
        request.num_cached_blocks = 0
        self.connector.note_leave(request)
        self.blocks.free(request.request_id)
        self.free_rows.append(request.row)
        request.row, request.num_sent_blocks = None, 0
