"""core/kv_transfer.py: what is offered and fetched, who waits for what, and when blocks are free again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest

from common.sampling_params import SamplingParams
from part13_disaggregation.core.block_manager import BlockManager
from part13_disaggregation.core.kv_connector import Orders
from part13_disaggregation.core.kv_transfer import KVTransfer, name_of
from part13_disaggregation.core.request import Request, RequestStatus
from part13_disaggregation.messages import (
    Confirm,
    Fetch,
    KVTransferParams,
    Offer,
    Publish,
    Release,
    TransferDone,
    Watch,
    Withdraw,
)
from tests.part13.scripted import SOURCE, NextTransfer, TransferExecutor, scripted_engine
from tests.scripted import answer_alone, contents, params_for

LOOK_ENDED = 'Look at core/kv_transfer.py::KVTransfer.add_request; README "From engine to engine".'
LOOK_OFFER = 'Look at core/kv_transfer.py::KVTransfer.save and note_leave; README "Delayed free".'
LOOK_FREE = 'Look at core/kv_transfer.py::KVTransfer.note_done and has_leaving_blocks; README "Delayed free".'
LOOK_CONFIRM = 'Look at core/kv_transfer.py::KVTransfer.note_result; README "From engine to engine".'
LOOK_FIND = 'Look at core/kv_transfer.py::KVTransfer.find and load; README "What a waiting request does".'
LOOK_WAIT = 'Look at core/kv_transfer.py::KVTransfer.is_waiting; README "What a waiting request does".'
LOOK_SCHEDULE = 'Look at core/scheduler.py::Scheduler._schedule_waiting; README "What a waiting request does".'
LOOK_RELEASE = 'Look at core/kv_transfer.py::KVTransfer._stop_using; README "Delayed free".'
LOOK_FAIL = 'Look at core/kv_transfer.py::KVTransfer._note_fetched and _note_failed; README "When an engine is lost".'
LOOK_NAME = 'Look at core/kv_transfer.py::name_of; README "From engine to engine".'
LOOK_RESET = 'Look at core/kv_transfer.py::KVTransfer.reset; README "Delayed free".'
PROMPT = [(37 * number) % 250 + 1 for number in range(100)]
BLOCK_SIZE = 16


class Engine:
    """An engine over a scripted worker, with blocks of 16 tokens. Transfers go on only when the test says so."""

    def __init__(self, num_blocks: int = 41, max_num_seqs: int = 4, failing: float = 0.0, **flags: Any) -> None:
        self.engine = scripted_engine(
            max_model_len=200, block_size=BLOCK_SIZE, num_kv_blocks=num_blocks, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=256, patience=1.0, failing=failing, **flags,
        )  # fmt: skip
        executor = self.engine.executor
        assert isinstance(executor, TransferExecutor)
        self.executor, self.next = executor, NextTransfer(self.engine)
        self.engine.scheduler.watermark_blocks = 0
        self.answers: dict[str, list[int]] = {}
        self.errors: dict[str, str] = {}
        self.seen: list[Any] = []
        transfer = executor.transfer
        executor.transfer = lambda order: (self.seen.append(order), transfer(order))[1]  # type: ignore[method-assign]

    def freeze(self) -> None:
        """No transfer goes on."""
        self.executor.finished_transfers = lambda timeout_s: []  # type: ignore[method-assign]

    def thaw(self) -> None:
        del self.executor.finished_transfers  # type: ignore[method-assign]

    def end(self, kind: type, num_tokens: int = 0, error: str | None = None) -> None:
        """While frozen: the first transfer of this kind ends. Of a fetch, num_tokens tokens have arrived."""
        pending = [each.transfer for each in self.engine.orders.pending.values() if isinstance(each.transfer, kind)]
        self.answer(pending[0], num_tokens, error)

    def answer(self, order: Any, num_tokens: int = 0, error: str | None = None) -> None:
        executor = self.executor
        match order:
            case Watch():
                if order.name in executor.watches:
                    executor.watches[order.name] = None
            case Offer():
                executor.offers.pop(order.name, None)
            case Fetch():
                [fetching] = [each for each in executor.fetches if each.fetch.transfer_id == order.transfer_id]
                executor.begin(fetching)
                executor.fetches.remove(fetching)
                (prompt, salt), slots = executor.prompts[order.name], executor.slots_of(order)[:num_tokens]
                for slot, position in zip(slots, range(order.start, order.end), strict=False):
                    executor.cache[slot] = (prompt[position], contents(prompt, salt)[position])
        executor.late = [each for each in executor.late if each.transfer_id != order.transfer_id]
        self.engine.orders.note_done(TransferDone(order.transfer_id, num_tokens=num_tokens, error=error))

    def ask(
        self, name: str, prompt: Sequence[int], max_tokens: int = 2, is_fetched: bool | None = None,
        transfer_id: str | None = None, **fields: Any,
    ) -> None:  # fmt: skip
        """is_fetched: from another engine; False: for another one; None: neither."""
        if is_fetched is not None:
            self.next.ask(is_fetched, transfer_id)
        self.engine.add_request(name, list(prompt), params_for(max_tokens, ignore_eos=True, **fields))

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for output in self.engine.step():
                self.answers.setdefault(output.request_id, []).extend(output.token_ids)
                if output.error:
                    self.errors[output.request_id] = output.error

    def run(self) -> None:
        for _ in range(300):
            if not self.engine.has_unfinished_requests:
                break
            self.step()
        assert not self.engine.has_unfinished_requests, (
            f"300 steps, and it goes on: running {self.engine.scheduler.running}, loading "
            f"{self.engine.scheduler.loading}, waiting {self.engine.scheduler.waiting}, pending "
            f"{self.engine.orders.pending}. {LOOK_WAIT}"
        )
        blocks = self.engine.blocks
        assert blocks.num_used_blocks == 0, f"idle, and {blocks.num_used_blocks} blocks are not free. {LOOK_FREE}"

    def orders(self, kind: type) -> list[Any]:
        return [each for each in self.seen if isinstance(each, kind)]

    def shares(self, name: str) -> list[tuple[int, int]]:
        """Of each step with this request: how many tokens counted as computed, and how many it computed."""
        work = [each for step in self.executor.launched for each in step.work if each.request_id == name]
        return [(each.start, each.end - each.start) for each in work]

    @property
    def num_free(self) -> int:
        return self.engine.blocks.num_free_blocks

    def check_answer(self, name: str, prompt: Sequence[int], max_tokens: int = 2) -> None:
        expected, got = answer_alone(list(prompt), max_tokens, ignore_eos=True), self.answers.get(name)
        assert got == expected, f"request {name!r}: expected {expected}, got {got}. {LOOK_FIND}"


# Fetching: the numbers of the rules


def test_100_tokens_and_nothing_here() -> None:
    """100 tokens into 7 blocks; then 99 count as computed, and the next step computes 1."""
    each = Engine()
    each.ask("a", PROMPT, is_fetched=True)
    each.run()
    [fetch] = each.orders(Fetch)
    assert (fetch.start, fetch.end, len(fetch.block_ids)) == (0, 100, 7), (
        f"100 tokens, 7 blocks; got {fetch}. {LOOK_FIND}"
    )
    assert each.shares("a")[0] == (99, 1), (
        f"expected 99 tokens that count as computed, and 1 to compute; got {each.shares('a')[0]}. {LOOK_FIND}"
    )
    each.check_answer("a", PROMPT)
    stats = each.engine.transfers.stats
    assert (stats.num_fetched_tokens, stats.num_fetched_bytes, stats.num_failed) == (100, 1, 0), f"{stats}. {LOOK_FIND}"
    assert len(each.orders(Release)) == 1, f"the other engine may free its blocks: {each.seen}. {LOOK_RELEASE}"


def test_48_of_100_tokens_are_here() -> None:
    """52 tokens into 4 blocks: the ones after the first 3."""
    each = Engine()
    each.ask("a", PROMPT[:49])
    each.run()
    each.ask("b", PROMPT, is_fetched=True)
    each.run()
    [fetch] = each.orders(Fetch)
    assert (fetch.start, fetch.end, len(fetch.block_ids)) == (48, 100, 4), (
        f"52 tokens, 4 blocks; got {fetch}. {LOOK_FIND}"
    )
    assert each.shares("b")[0] == (99, 1), f"got {each.shares('b')[0]}. {LOOK_FIND}"
    each.check_answer("b", PROMPT)


def test_all_of_it_is_here() -> None:
    """96 of 100 tokens are in the prefix cache, and 4 are less than a block. The other engine holds its blocks: it must
    hear that nobody will fetch them."""
    each = Engine()
    each.ask("a", PROMPT)
    each.run()
    each.ask("b", PROMPT, is_fetched=True)
    each.run()
    assert not each.orders(Fetch), f"nothing to fetch: {each.orders(Fetch)}. {LOOK_FIND}"
    [watch], [release] = each.orders(Watch), each.orders(Release)
    assert watch.name == release.name == name_of("transfer 1", PROMPT), f"{watch}, {release}. {LOOK_RELEASE}"
    assert each.shares("b")[0] == (96, 4), f"got {each.shares('b')[0]}. {LOOK_FIND}"
    each.check_answer("b", PROMPT)


@pytest.mark.parametrize(("num_here", "expected"), [(0, 17), (16, None), (0, None)])
def test_less_than_a_block_is_computed(num_here: int, expected: int | None) -> None:
    """A block, too: it is computed sooner than fetched."""
    length = 17 if expected else num_here + 16
    each = Engine()
    if num_here:
        each.ask("a", PROMPT[: num_here + 1])
        each.run()
    each.ask("b", PROMPT[:length], is_fetched=True)
    each.run()
    got = [fetch.end - fetch.start for fetch in each.orders(Fetch)]
    assert got == ([expected] if expected else []), f"{length} tokens, {num_here} here: fetched {got}. {LOOK_FIND}"
    each.check_answer("b", PROMPT[:length])


def test_tokens_end_within_a_block() -> None:
    """The fetched block table has room for all tokens, the part-filled block too; the answer goes on there."""
    each = Engine()
    each.ask("a", PROMPT[:33], max_tokens=20, is_fetched=True)
    each.run()
    assert [len(fetch.block_ids) for fetch in each.orders(Fetch)] == [3], LOOK_FIND
    each.check_answer("a", PROMPT[:33], 20)


def test_the_other_engine_has_less() -> None:
    """40 of 100 tokens are fetched, and 60 computed."""
    each = Engine()
    each.freeze()
    each.ask("a", PROMPT, is_fetched=True)
    each.step(3)
    each.end(Watch, num_tokens=40)
    each.step()
    [fetch] = each.orders(Fetch)
    assert (fetch.start, fetch.end, len(fetch.block_ids)) == (0, 40, 3), f"expected 40 tokens, got {fetch}. {LOOK_FIND}"
    assert len(each.engine.blocks.block_tables["a"]) == 7, f"it has blocks for all its tokens. {LOOK_FIND}"
    each.thaw()
    each.run()
    assert each.shares("a")[0] == (40, 60), f"got {each.shares('a')[0]}. {LOOK_FIND}"
    each.check_answer("a", PROMPT)


def test_prompt_logprobs_need_all_logits() -> None:
    each = Engine()
    each.executor.output = lambda step: None  # type: ignore[method-assign]
    each.ask("a", PROMPT, is_fetched=True, prompt_logprobs=1)
    each.step()
    assert not each.orders(Fetch) and each.shares("a") == [(0, 100)], f"got {each.shares('a')}. {LOOK_FIND}"
    assert len(each.orders(Release)) <= 1, LOOK_RELEASE


# Waiting


def test_a_request_waits_without_blocks() -> None:
    """Until the other engine has begun. If both waited for each other's blocks, neither would go on."""
    each = Engine(num_blocks=9)
    each.freeze()
    each.ask("a", PROMPT, is_fetched=True)
    each.step(3)
    scheduler = each.engine.scheduler
    assert [request.request_id for request in scheduler.loading] == ["a"], f"{scheduler.loading}. {LOOK_WAIT}"
    assert each.num_free == 8, f"it waits for the other engine, and holds {8 - each.num_free} of 8 blocks. {LOOK_WAIT}"
    each.ask("b", PROMPT[50:])
    each.step(4)
    each.check_answer("b", PROMPT[50:])
    each.thaw()
    each.run()
    each.check_answer("a", PROMPT)


def test_two_engines_full_of_each_other_do_not_deadlock() -> None:
    """This one is full of offers, which are not fetched yet, and of requests that wait for others. Its pool has room
    for one prompt. A fetch comes, and all go on."""
    each = Engine(num_blocks=9)
    each.freeze()
    each.ask("offer", PROMPT, max_tokens=1, is_fetched=False)
    each.step(3)
    each.ask("waiting", PROMPT[1:], is_fetched=True)
    each.ask("another offer", PROMPT[2:], max_tokens=1, is_fetched=False)
    each.step(3)
    assert each.num_free == 1, f"7 of 8 blocks are held by an offer: {each.num_free} are free. {LOOK_OFFER}"
    assert not each.shares("another offer"), f"it waits for blocks: {each.shares('another offer')}. {LOOK_OFFER}"
    each.end(Offer)
    each.step(3)
    assert each.shares("another offer"), f"7 blocks are free again, and it should have them. {LOOK_WAIT}"
    each.thaw()
    each.run()
    each.check_answer("waiting", PROMPT[1:])


def test_requests_that_wait_for_others_do_not_keep_out_those_that_need_not() -> None:
    """max_num_seqs is 2. Two requests wait for an engine that is full; a third one's KV is held by that engine, and
    would make room there. If it has to wait for the first two, nothing ever ends: heartbeats extend its lease."""
    each = Engine(max_num_seqs=2)
    each.freeze()
    for index in range(3):
        each.ask(str(index), PROMPT[index:], is_fetched=True)
    each.step(3)
    pending = list(each.engine.orders.pending.values())
    each.answer(pending[2].transfer, num_tokens=98)
    each.step(3)
    fetched = [fetch.name for fetch in each.orders(Fetch)]
    assert fetched == [name_of("transfer 3", PROMPT[2:])], (
        "request 2 could be fetched, which would free blocks of the other engine. It waits behind requests 0 and 1, "
        f"which hold no blocks and wait for that engine. {LOOK_SCHEDULE}"
    )


def test_those_that_waited_are_served_in_the_order_in_which_they_came() -> None:
    """max_num_seqs is 1. Request 0 runs; the other engine begins 1, 2 and 3 one after the other."""
    each = Engine(max_num_seqs=1)
    each.ask("0", PROMPT[:20], max_tokens=40)
    each.freeze()
    for name in "123":
        each.ask(name, PROMPT[int(name) :], is_fetched=True)
    each.step(2)
    for name in "123":
        each.end(Watch, num_tokens=100 - int(name))
        each.step()
    waiting = [request.request_id for request in each.engine.scheduler.waiting]
    assert waiting == ["1", "2", "3"], f"the order of the queue: {waiting}. {LOOK_SCHEDULE}"


def test_an_engine_that_offers_a_prompt_and_watches_it() -> None:
    """Two addresses of one engine, and the proxy takes them for two: it must not fail, whichever request ends first."""
    each = Engine()
    each.freeze()
    each.ask("p", PROMPT, max_tokens=1, is_fetched=False, transfer_id="one")
    each.ask("d", PROMPT, is_fetched=True, transfer_id="one")
    each.step(4)
    each.check_answer("p", PROMPT, 1)
    each.end(Watch, error="no answer for 10 s")
    each.end(Offer, error="the lease has ended")
    each.thaw()
    each.run()
    each.check_answer("d", PROMPT)


def test_a_late_answer_is_not_taken_for_another_watch() -> None:
    """A prompt that was given up, and so long ago that the engine has forgotten it, is watched anew."""
    each = Engine()
    each.freeze()
    each.engine.transfers._ended = deque(maxlen=0)
    each.ask("a", PROMPT, is_fetched=True, transfer_id="one")
    each.step()
    each.engine.abort_requests(["a"])
    each.step()
    each.ask("b", PROMPT, is_fetched=True, transfer_id="one")
    each.step()
    first, second = [pending.transfer for pending in each.engine.orders.pending.values()]
    each.answer(first, error="released")
    each.step(2)
    assert "b" not in each.answers, f"the answer was for request a. {LOOK_WAIT}"
    each.answer(second, num_tokens=100)
    each.thaw()
    each.run()
    each.check_answer("b", PROMPT)


def test_others_run_while_one_waits() -> None:
    each = Engine()
    each.freeze()
    each.ask("a", PROMPT, is_fetched=True)
    each.ask("b", PROMPT[:20], max_tokens=5)
    each.step(7)
    each.check_answer("b", PROMPT[:20], 5)
    assert "a" not in each.answers, LOOK_WAIT
    each.thaw()
    each.run()
    each.check_answer("a", PROMPT)


def test_nothing_is_found_before_it_has_arrived() -> None:
    """Another request with the same prompt must not read blocks that are being filled."""
    each = Engine()
    each.freeze()
    each.ask("a", PROMPT, is_fetched=True)
    each.step(2)
    each.end(Watch, num_tokens=100)
    each.step(2)
    assert len(each.orders(Fetch)) == 1
    each.ask("b", PROMPT)
    each.step(3)
    assert each.shares("b")[0] == (0, 100), f"nothing has arrived: got {each.shares('b')[0]}. {LOOK_FIND}"
    each.check_answer("b", PROMPT)
    each.thaw()
    each.run()
    each.ask("c", PROMPT)
    each.run()
    assert each.shares("c")[0] == (96, 4), f"now 6 blocks are found: got {each.shares('c')[0]}. {LOOK_FIND}"
    each.check_answer("a", PROMPT)


# Aborts at the decode engine


def test_abort_before_it_is_scheduled() -> None:
    """In the queue, behind others; or while it waits for the other engine. That engine frees its blocks."""
    for num_steps, num_others in ((0, 0), (3, 0), (2, 4)):
        each = Engine()
        each.freeze()
        for index in range(num_others):
            each.ask(f"other {index}", PROMPT[:5], max_tokens=30)
        each.ask("a", PROMPT, is_fetched=True)
        each.step(num_steps)
        each.engine.abort_requests(["a"])
        each.step()
        orders = [type(order).__name__ for order in each.seen]
        assert orders == ["Watch", "Release"], (
            f"aborted after {num_steps} steps: the orders are {orders}. {LOOK_RELEASE}"
        )
        assert not each.engine.transfers.watched and not each.engine.transfers._names, LOOK_RELEASE
        each.thaw()
        each.run()


def test_abort_while_fetching() -> None:
    """Its blocks are not reused until the fetch has ended: it still writes to them."""
    each = Engine(num_blocks=9)
    each.freeze()
    each.ask("a", PROMPT, is_fetched=True)
    each.step(2)
    each.end(Watch, num_tokens=100)
    each.step(2)
    assert each.num_free == 1, f"7 of 8 blocks are being filled, {each.num_free} are free. {LOOK_FIND}"
    each.engine.abort_requests(["a"])
    each.ask("b", PROMPT[3:])
    each.step(3)
    assert each.num_free == 1 and not each.shares("b"), (
        f"the fetch has not ended: expected 1 free block, got {each.num_free}; b ran {each.shares('b')}. {LOOK_FREE}"
    )
    assert len(each.orders(Release)) == 1, f"the fetch should end soon: {each.seen}. {LOOK_RELEASE}"
    assert each.engine.connector.has_leaving_blocks, f"7 blocks will soon be free. {LOOK_FREE}"
    each.end(Fetch, error="released")
    assert each.num_free == 8, f"the fetch has ended: {each.num_free} of 8 are free. {LOOK_FREE}"
    each.thaw()
    each.run()
    each.check_answer("b", PROMPT[3:])
    assert each.engine.transfers.stats.num_failed == 0, f"nobody wanted it any more: no failure. {LOOK_FAIL}"


def test_abort_before_a_late_answer() -> None:
    """The watch is answered after its request has gone."""
    each = Engine()
    each.freeze()
    each.ask("a", PROMPT, is_fetched=True)
    each.step(2)
    each.engine.abort_requests(["a"])
    each.step()
    each.end(Watch, num_tokens=100)
    each.step()
    assert not each.orders(Fetch) and not each.engine.has_unfinished_requests, LOOK_RELEASE


# Several requests of one transfer


def test_several_requests_of_one_transfer() -> None:
    """n = 3: one watch, one fetch, and one release when the last one has started."""
    each = Engine()
    for name in "abc":
        each.ask(name, PROMPT, is_fetched=True, transfer_id="one")
    each.run()
    counts = {kind.__name__: len(each.orders(kind)) for kind in (Watch, Fetch, Release)}
    assert counts == {"Watch": 1, "Fetch": 1, "Release": 1}, f"got {counts}. {LOOK_RELEASE}"
    for name in "abc":
        each.check_answer(name, PROMPT)
    assert each.shares("b")[0] == (96, 4), f"b finds the 6 blocks that a has fetched: {each.shares('b')}. {LOOK_FIND}"


def test_one_of_several_is_aborted() -> None:
    """The one that fetches: the others still need it. And the last one: then the other engine hears of it."""
    each = Engine()
    each.freeze()
    for name in "ab":
        each.ask(name, PROMPT, is_fetched=True, transfer_id="one")
    each.step(2)
    each.end(Watch, num_tokens=100)
    each.step(2)
    each.engine.abort_requests(["a"])
    each.step()
    assert not each.orders(Release), f"b still wants it. {LOOK_RELEASE}"
    assert not each.engine.connector.has_leaving_blocks, f"the fetch is not cut short: it may take long. {LOOK_FREE}"
    each.end(Fetch, num_tokens=100)
    each.step(2)
    assert len(each.orders(Fetch)) == 2, f"a's blocks are gone: b fetches for itself. {each.seen}. {LOOK_FIND}"
    each.engine.abort_requests(["b"])
    each.step()
    assert len(each.orders(Release)) == 1, LOOK_RELEASE
    each.thaw()
    each.run()


def test_the_same_prompt_is_offered_once() -> None:
    """Twice in one request: the first one is enough."""
    each = Engine()
    for name in "ab":
        each.ask(name, PROMPT, max_tokens=1, is_fetched=False, transfer_id="one")
    each.run()
    assert len(each.orders(Offer)) == 1 and each.engine.transfers.stats.num_offered == 1, f"{each.seen}. {LOOK_OFFER}"
    for name in "ab":
        each.check_answer(name, PROMPT, 1)


def test_the_second_request_of_an_offer_withdraws_nothing() -> None:
    """The first one offers the prompt, and goes on."""
    each = Engine()
    for name in "ab":
        each.ask(name, PROMPT, max_tokens=1, is_fetched=False, transfer_id="one")
    each.engine.abort_requests(["b"])
    each.run()
    assert not each.orders(Withdraw) and len(each.orders(Confirm)) == 1, f"{each.seen}. {LOOK_OFFER}"


@pytest.mark.parametrize("is_fetched", [True, False])
def test_a_second_request_that_comes_after_the_end(is_fetched: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The process that sends a request's choices was held up between two of them, and the first one's KV has been
    fetched meanwhile. The other engine knows nothing of it any longer; that is no failure."""
    each = Engine()
    for name in "ab":
        each.ask(name, PROMPT, is_fetched=is_fetched, transfer_id="one")
        each.run()
        each.check_answer(name, PROMPT)
    kinds = [Watch, Fetch, Release] if is_fetched else [Offer, Confirm]
    counts = [len(each.orders(kind)) for kind in kinds]
    assert counts == [1] * len(kinds), f"the second request orders nothing: {each.seen}. {LOOK_ENDED}"
    assert not each.engine.transfers.stats.num_failed and not caplog.messages, f"{caplog.messages}. {LOOK_ENDED}"
    assert each.shares("b")[0] == (96, 4), f"b finds what a has left: {each.shares('b')}. {LOOK_FIND}"


# What does not arrive


def test_a_part_of_it_arrives() -> None:
    """37 of 100 tokens: the other 63 are computed, and all blocks are right."""
    each = Engine()
    each.freeze()
    each.ask("a", PROMPT, is_fetched=True)
    each.step(2)
    each.end(Watch, num_tokens=100)
    each.step()
    each.end(Fetch, num_tokens=37, error="a piece was damaged")
    each.thaw()
    each.run()
    assert each.shares("a")[0] == (37, 63), f"37 tokens have arrived: got {each.shares('a')[0]}. {LOOK_FAIL}"
    each.check_answer("a", PROMPT)
    stats = each.engine.transfers.stats
    assert (stats.num_fetched_tokens, stats.num_failed) == (37, 1), f"got {stats}. {LOOK_FAIL}"
    assert len(each.orders(Fetch)) == 1 and len(each.orders(Release)) == 1, f"no second try. {LOOK_FAIL}"


def test_nothing_arrives() -> None:
    each = Engine()
    each.freeze()
    for name in "ab":
        each.ask(name, PROMPT, is_fetched=True, transfer_id="one")
    each.step(2)
    each.end(Watch, num_tokens=100)
    each.step()
    each.end(Fetch, error="the connection is lost")
    each.thaw()
    each.run()
    assert each.shares("a")[0] == (0, 100), f"all is computed: {each.shares('a')}. {LOOK_FAIL}"
    assert len(each.orders(Fetch)) == 1, f"nor does b try: {each.orders(Fetch)}. {LOOK_FAIL}"
    for name in "ab":
        each.check_answer(name, PROMPT)


def test_a_watch_that_fails() -> None:
    """No such engine: the prompt is computed here."""
    each = Engine(failing=1.0)
    each.ask("a", PROMPT, is_fetched=True)
    each.run()
    assert not each.orders(Fetch) and each.shares("a")[0] == (0, 100), f"got {each.shares('a')}. {LOOK_FAIL}"
    each.check_answer("a", PROMPT)
    assert each.engine.transfers.stats.num_failed == 1, f"{each.engine.transfers.stats}. {LOOK_FAIL}"


@pytest.mark.parametrize("kind", [Watch, Fetch])
def test_policy_fail(kind: type) -> None:
    """The request ends with an error that says why; others go on."""
    each = Engine(kv_load_failure_policy="fail")
    each.freeze()
    each.ask("a", PROMPT, is_fetched=True)
    each.ask("b", PROMPT[5:])
    each.step(2)
    if kind is Fetch:
        each.end(Watch, num_tokens=100)
        each.step()
    each.end(kind, error="the connection is lost")
    each.step(4)
    assert each.errors == {"a": "its KV has not arrived: the connection is lost"}, f"got {each.errors}. {LOOK_FAIL}"
    each.check_answer("b", PROMPT[5:])
    each.thaw()
    each.run()
    assert len(each.orders(Release)) == 1, f"the other engine may free its blocks. {LOOK_RELEASE}"


def test_policy_fail_computes_nothing() -> None:
    each = Engine(kv_load_failure_policy="fail")
    each.freeze()
    each.ask("a", PROMPT, is_fetched=True)
    each.step(2)
    pending = next(iter(each.engine.orders.pending.values()))
    each.executor.finished_transfers = lambda _: [  # type: ignore[method-assign]
        TransferDone(pending.transfer.transfer_id, error="the connection is lost")
    ]
    each.executor.watches[pending.transfer.name] = None  # type: ignore[union-attr]
    each.step()
    assert each.errors and not each.executor.launched, f"the request fails, and no step is launched. {LOOK_FAIL}"


def test_policy_fail_is_for_all_requests_of_a_transfer() -> None:
    """n = 2, and the policy says that nothing is computed here."""
    each = Engine(kv_load_failure_policy="fail")
    each.freeze()
    for name in "ab":
        each.ask(name, PROMPT, is_fetched=True, transfer_id="one")
    each.step(2)
    each.end(Watch, error="the connection is lost")
    each.thaw()
    each.run()
    assert set(each.errors) == {"a", "b"}, f"expected errors for a and b, got {each.errors}. {LOOK_FAIL}"


# Offers: the prefill engine


def test_an_offer_keeps_its_blocks() -> None:
    """Its request ends at once, with one token. 7 of 40 blocks stay until the other engine has fetched them."""
    each = Engine()
    each.freeze()
    each.ask("a", PROMPT, max_tokens=1, is_fetched=False)
    assert each.num_free == 40, f"before its first step, an offer holds nothing. {LOOK_OFFER}"
    each.step(3)
    each.check_answer("a", PROMPT, 1)
    assert not each.engine.scheduler.has_unfinished_requests and each.engine.has_unfinished_requests, LOOK_OFFER
    assert each.num_free == 33, (
        f"its request has ended, expected 33 free blocks of 40, got {each.num_free}. {LOOK_OFFER}"
    )
    [offer], [publish], [confirm] = each.orders(Offer), each.orders(Publish), each.orders(Confirm)
    assert offer.num_tokens == publish.num_tokens == 100 and len(publish.block_ids) == 7, f"{publish}. {LOOK_OFFER}"
    assert confirm.name == offer.name == name_of("transfer 1", PROMPT), LOOK_NAME
    each.ask("b", PROMPT)
    each.step(3)
    assert each.shares("b")[0] == (96, 4), f"its blocks are found here, too: {each.shares('b')}. {LOOK_OFFER}"
    assert each.num_free == 33, f"b has ended: {each.num_free} free. {LOOK_FREE}"
    each.end(Offer, error="released")
    assert each.num_free == 40, f"the offer has ended, and {each.num_free} of 40 are free. {LOOK_FREE}"
    assert each.engine.transfers.stats.num_expired == 0, LOOK_FREE


def test_only_the_prompts_blocks_are_kept() -> None:
    """Its answer has 28 tokens: 8 blocks, of which the prompt needs 7."""
    each = Engine()
    each.freeze()
    each.ask("a", PROMPT, max_tokens=28, is_fetched=False)
    each.step(22)
    assert each.num_free == 32, f"more than 112 tokens take 8 blocks: {40 - each.num_free}. {LOOK_OFFER}"
    each.step(15)
    assert each.num_free == 33, (
        f"its request has ended; 7 blocks are offered, held are {40 - each.num_free}. {LOOK_OFFER}"
    )
    assert len(each.orders(Publish)) == 1, f"answers are not published: {each.orders(Publish)}. {LOOK_OFFER}"


def test_a_lease_that_has_ended_is_counted() -> None:
    each = Engine()
    each.freeze()
    each.ask("a", PROMPT, max_tokens=1, is_fetched=False)
    each.step(3)
    each.end(Offer, error="the lease has ended")
    stats = each.engine.transfers.stats
    assert (stats.num_expired, stats.num_offered) == (1, 1) and each.num_free == 40, f"got {stats}. {LOOK_FREE}"


def test_chunks_are_published_as_they_are_computed() -> None:
    """A prompt in chunks of 30 tokens: the other engine may begin with the first one. It is confirmed once, after the
    step with its last tokens has succeeded."""
    each = Engine(long_prefill_token_threshold=30)
    each.freeze()
    each.ask("a", PROMPT, max_tokens=1, is_fetched=False)
    counts = []
    for _ in range(6):
        each.step()
        counts.append((len(each.orders(Publish)), len(each.orders(Confirm))))
    published = [publish.num_tokens for publish in each.orders(Publish)]
    assert published == [30, 60, 90, 100], f"expected 30, 60, 90, 100 tokens, got {published}. {LOOK_OFFER}"
    assert counts[3] == (4, 0) and counts[4] == (4, 1), (
        f"the fourth step is in flight, and not confirmed; then it is: (published, confirmed) {counts}. {LOOK_CONFIRM}"
    )
    assert counts[5] == (4, 1), f"confirmed once. {LOOK_CONFIRM}"
    tables = {tuple(publish.block_ids) for publish in each.orders(Publish)}
    assert len(tables) == 1 and len(next(iter(tables))) == 7, (
        f"the whole prompt's blocks, each time: {tables}. {LOOK_OFFER}"
    )


def test_what_is_cached_is_published_with_the_first_chunk() -> None:
    each = Engine()
    each.ask("a", PROMPT)
    each.run()
    each.ask("b", PROMPT, max_tokens=1, is_fetched=False)
    each.run()
    assert [publish.num_tokens for publish in each.orders(Publish)] == [100], f"{each.orders(Publish)}. {LOOK_OFFER}"


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_an_aborted_request_withdraws(num_steps: int) -> None:
    """In the queue, between its chunks: what is missing will not be computed."""
    each = Engine(long_prefill_token_threshold=30)
    each.freeze()
    each.ask("a", PROMPT, max_tokens=1, is_fetched=False)
    each.step(num_steps)
    each.engine.abort_requests(["a"])
    each.step(2)
    [withdraw] = each.orders(Withdraw)
    assert withdraw.name == name_of("transfer 1", PROMPT), LOOK_OFFER
    kept = 7 if num_steps else 0
    assert each.num_free == 40 - kept, (
        f"the worker has not answered, and may read {kept} blocks: {each.num_free} of 40 are free. {LOOK_FREE}"
    )
    assert each.engine.connector.has_leaving_blocks == bool(num_steps), f"they will soon be free. {LOOK_FREE}"
    each.end(Offer, error="withdrawn")
    assert each.num_free == 40, f"withdrawn: {each.num_free} of 40 are free. {LOOK_FREE}"
    each.step()
    assert not each.orders(Confirm) and len(each.orders(Withdraw)) == 1, f"{each.seen}. {LOOK_CONFIRM}"


def test_an_offer_is_not_about_to_leave() -> None:
    """It may be held for 30 seconds. A decode that needs a block must not wait for that: something is preempted."""
    each = Engine()
    each.freeze()
    each.ask("a", PROMPT, max_tokens=1, is_fetched=False)
    each.step(3)
    assert not each.engine.connector.has_leaving_blocks, f"its blocks are only offered. {LOOK_FREE}"


def test_blocks_that_another_request_has_are_not_leaving() -> None:
    """The withdrawn prompt's blocks are also in the table of a request with the same prompt."""
    each = Engine(long_prefill_token_threshold=48)
    each.freeze()
    each.ask("a", PROMPT[:48], max_tokens=5, is_fetched=False)
    each.step()
    each.ask("b", PROMPT[:49], max_tokens=30)
    each.step()
    each.engine.abort_requests(["a"])
    each.step()
    assert not each.engine.connector.has_leaving_blocks, f"all 3 of its blocks are b's, too. {LOOK_FREE}"


def test_a_preempted_request_withdraws() -> None:
    """It has not ended, and its blocks are needed; they are free once the worker has let go of them."""
    each = Engine(num_blocks=9)
    each.freeze()
    each.ask("first", PROMPT[:30], max_tokens=60)
    each.step(2)
    each.ask("offer", PROMPT[20:80], max_tokens=40, is_fetched=False)
    for _ in range(60):
        each.step()
        if each.engine.scheduler.num_preemptions:
            break
    assert each.engine.scheduler.num_preemptions == 1, "the test wants a preemption"
    each.step()
    assert len(each.orders(Withdraw)) == 1, f"the offer should end: {each.seen}. {LOOK_OFFER}"
    each.thaw()
    each.run()
    each.check_answer("first", PROMPT[:30], 60)
    each.check_answer("offer", PROMPT[20:80], 40)
    assert len(each.orders(Offer)) == 1 and len(each.orders(Publish)) == 1, (
        f"computed again, it is not offered again: the other engine was told that it is gone. {each.seen}. {LOOK_OFFER}"
    )


def test_a_failed_step_withdraws_and_is_not_confirmed() -> None:
    """What was sent before may be garbage."""
    each = Engine(long_prefill_token_threshold=60)
    each.ask("a", PROMPT, max_tokens=1, is_fetched=False)
    each.ask("b", PROMPT[1:], is_fetched=True)
    each.executor.result_error = ValueError("the device is on strike")
    with pytest.raises(ValueError, match="strike"):
        each.step(3)
    each.engine.fail(ValueError("the device is on strike"))
    assert not each.orders(Confirm), f"a failed step was confirmed. {LOOK_CONFIRM}"
    assert len(each.orders(Withdraw)) == 1 and len(each.orders(Release)) == 1, f"{each.seen}. {LOOK_RESET}"
    transfers = each.engine.transfers
    left = [transfers.offered, transfers.watched, transfers._names, transfers._completed, each.engine.orders.pending]
    assert not any(left) and each.num_free == 40, f"left are {left}, free {each.num_free} of 40. {LOOK_RESET}"
    each.ask("c", PROMPT, max_tokens=1, is_fetched=False)
    each.run()
    assert len(each.orders(Confirm)) == 1, f"the next prompt is confirmed. {LOOK_CONFIRM}"


def test_reset_prefix_cache_withdraws() -> None:
    """The weights may be about to change: nobody may fetch KV of the old ones."""
    each = Engine()
    each.freeze()
    each.ask("a", PROMPT, max_tokens=1, is_fetched=False)
    each.step(3)
    assert each.num_free == 33
    each.thaw()
    each.executor.rng.random = lambda: 1.0  # type: ignore[method-assign]
    assert each.engine.reset_prefix_cache(), f"no request is left. {LOOK_RESET}"
    assert len(each.orders(Withdraw)) == 1 and each.num_free == 40, (
        f"expected a withdrawal and 40 free blocks, got {each.orders(Withdraw)}, {each.num_free}. {LOOK_RESET}"
    )
    assert not each.engine.transfers.offered and not each.engine.has_unfinished_requests, LOOK_RESET


# Names


def test_names() -> None:
    """Equal for both engines, and only for them."""
    name = name_of("transfer 1", PROMPT)
    assert name == name_of("transfer 1", list(PROMPT)) and len(name) == 32, LOOK_NAME
    others = [
        name_of("transfer 2", PROMPT), name_of("transfer 1", PROMPT[:-1]), name_of("transfer 1", [*PROMPT[:50], 0]),
        name_of("transfer 1", [0, *PROMPT[1:]]), name_of("transfer 1", [PROMPT[1], PROMPT[0], *PROMPT[2:]]),
        name_of("transfer 1", [token + 2**16 for token in PROMPT]),
    ]  # fmt: skip
    assert name not in others, f"other tokens or another transfer have the same name. {LOOK_NAME}"


# Without an engine: orders of calls that are hard to bring about


class World:
    """A KVTransfer over a block manager."""

    def __init__(self, fails: bool = False) -> None:
        self.blocks, self.orders = BlockManager(41, BLOCK_SIZE), Orders()
        self.transfers = KVTransfer(self.blocks, self.orders, fails)

    def request(self, name: str, is_fetched: bool, transfer_id: str = "t", num_tokens: int = 100) -> Request:
        params = KVTransferParams(transfer_id, (SOURCE,) if is_fetched else ())
        request = Request(name, PROMPT[:num_tokens], SamplingParams(max_tokens=1), num_tokens + 1, kv_transfer=params)
        self.transfers.add_request(request)
        return request

    def take(self) -> list[Any]:
        new = list(self.orders.new)
        self.orders.new.clear()
        return new

    def done(self, order: Any, **fields: Any) -> None:
        self.orders.note_done(TransferDone(order.transfer_id, **fields))


def test_find_orders_nothing() -> None:
    """It may be called any number of times."""
    world = World()
    request = world.request("a", True)
    [watch] = world.take()
    assert watch.sources == [SOURCE] and world.transfers.is_busy, f"{watch}. {LOOK_FIND}"
    for _ in range(3):
        assert world.transfers.find(request, 0) is None and world.transfers.is_waiting(request), LOOK_WAIT
    world.done(watch, num_tokens=100)
    for num_on_device, expected in ((0, 100), (48, 52), (80, 20), (96, 0)):
        got = world.transfers.find(request, num_on_device)
        assert got == expected, f"{num_on_device} of 100 tokens are here: expected {expected}, got {got}. {LOOK_FIND}"
    world.transfers.watched[watch.name].num_tokens = 1_000
    got = world.transfers.find(request, 48)
    assert got == 52, f"the other engine says it has 1,000 tokens of 100: expected 52, got {got}. {LOOK_FIND}"
    assert not world.take() and not world.transfers.is_waiting(request), f"find() has ordered something. {LOOK_FIND}"
    assert world.transfers.find(Request("x", PROMPT, SamplingParams(), 101), 0) == 0, f"no transfer. {LOOK_FIND}"


def test_a_preempted_request_has_more_tokens_than_were_offered() -> None:
    """If it comes back while the prompt is still watched, only the prompt is fetched."""
    world = World()
    request = world.request("a", True)
    request.output_token_ids += range(10)
    world.done(*world.take(), num_tokens=100)
    assert world.transfers.find(request, 0) == 100, f"110 tokens, of which the other engine has 100. {LOOK_FIND}"


def test_load_leases_blocks_once_more() -> None:
    """A lease for the table, and one for the fetch."""
    world = World()
    request = world.request("a", True)
    world.done(*world.take(), num_tokens=100)
    assert world.blocks.admit("a", 100)
    world.transfers.load(request, 48, 52)
    [fetch] = world.take()
    table = world.blocks.block_tables["a"]
    assert fetch.block_ids == table[3:] and request.num_found_tokens == request.num_drafted_tokens == 48, (
        f"got {fetch}, {request.num_found_tokens} found, {request.num_drafted_tokens} drafted; {table}. {LOOK_FIND}"
    )
    assert world.transfers.is_waiting(request) and world.transfers.find(request, 0) is None, LOOK_WAIT
    counts = [world.blocks.pool[block_id].ref_count for block_id in table]
    assert counts == [1, 1, 1, 2, 2, 2, 2], f"leases of the 7 blocks: {counts}. {LOOK_FREE}"
    world.done(fetch, num_tokens=52, num_bytes=7, start_s=1.0, end_s=3.0)
    assert request.num_found_tokens == 100 and request.num_drafted_tokens == 48, f"{request}. {LOOK_FIND}"
    stats = world.transfers.stats
    assert (stats.num_fetched_bytes, stats.fetch_s) == (7, 2.0), f"{stats}. {LOOK_FIND}"
    assert [world.blocks.pool[block_id].ref_count for block_id in table] == [1] * 7, LOOK_FREE
    world.transfers.note_start(request)
    assert [type(order) for order in world.take()] == [Release] and not world.transfers.is_busy, LOOK_RELEASE
    world.transfers.note_leave(request)
    assert not world.take(), f"released twice. {LOOK_RELEASE}"


def test_a_new_watch_of_the_same_name_is_not_touched_by_an_old_fetch() -> None:
    """The first request was aborted while fetching, and the same transfer is asked for again."""
    world = World()
    world.transfers._ended = deque(maxlen=0)  # it was long ago
    first = world.request("a", True)
    world.done(*world.take(), num_tokens=100)
    world.blocks.admit("a", 100)
    world.transfers.load(first, 0, 100)
    [old] = world.take()
    world.transfers.note_leave(first)
    assert [type(order) for order in world.take()] == [Release], LOOK_RELEASE
    second = world.request("b", True)
    [watch] = world.take()
    world.done(old, error="released")
    assert world.transfers.stats.num_failed == 0 and world.transfers.is_waiting(second), f"it waits on. {LOOK_FAIL}"
    world.done(watch, num_tokens=100)
    assert world.transfers.find(second, 0) == 100, f"{world.transfers.watched}. {LOOK_FAIL}"


def test_a_request_that_finished_keeps_its_offer_and_others_withdraw() -> None:
    for status, is_kept in (
        (RequestStatus.FINISHED_LENGTH_CAPPED, True), (RequestStatus.FINISHED_STOPPED, True),
        (RequestStatus.RUNNING, False), (RequestStatus.PREEMPTED, False),
    ):  # fmt: skip
        world = World()
        request = world.request("a", False)
        world.take()
        request.status = status
        world.transfers.note_leave(request)
        assert bool(world.take()) != is_kept, f"status {status.name}: is kept {not is_kept}. {LOOK_OFFER}"
        world.transfers.note_leave(request)
        assert not world.take() and world.transfers.is_busy, f"left twice; the worker has not answered. {LOOK_OFFER}"


def test_two_steps_in_flight() -> None:
    """The first has the prompt's beginning, the second its end: it is confirmed with the second one."""
    world = World()
    request = world.request("a", False)
    world.take()
    world.blocks.admit("a", 100)
    for num_tokens in (60, 100):
        request.num_computed_tokens = num_tokens
        world.transfers.save(request, range(0))
        world.transfers.note_launch()
    assert [order.num_tokens for order in world.take()] == [60, 100], LOOK_OFFER
    world.transfers.save(request, range(0))
    world.transfers.note_result()
    assert not world.take(), f"the first step's result confirms nothing. {LOOK_CONFIRM}"
    world.transfers.note_result()
    assert [type(order) for order in world.take()] == [Confirm], LOOK_CONFIRM


def test_blocks_for_draft_tokens_are_not_offered() -> None:
    """The table may have got some before the prompt is published for the first time."""
    world = World()
    request = world.request("a", False)
    world.take()
    world.blocks.admit("a", 130)
    request.num_computed_tokens = 100
    world.transfers.save(request, range(0))
    [publish] = world.take()
    assert len(publish.block_ids) == 7, f"100 tokens are in 7 blocks; published are {publish.block_ids}. {LOOK_OFFER}"


def test_nothing_is_published_after_a_withdrawal() -> None:
    """The request was preempted and computes its prompt again, while the worker has not answered."""
    world = World()
    request = world.request("a", False)
    world.take()
    world.blocks.admit("a", 100)
    request.num_computed_tokens = 50
    world.transfers.save(request, range(0))
    world.transfers.note_leave(request)
    request.num_computed_tokens = 100
    world.transfers.save(request, range(0))
    orders = [type(order).__name__ for order in world.take()]
    assert orders == ["Publish", "Withdraw"], f"got {orders}. {LOOK_OFFER}"


def test_a_failed_fetch_is_not_tried_again() -> None:
    """Nor by another request of the same transfer."""
    world = World()
    first, second = world.request("a", True), world.request("b", True)
    world.done(*world.take(), num_tokens=100)
    world.blocks.admit("a", 100)
    world.transfers.load(first, 0, 100)
    world.done(*world.take(), num_tokens=30, error="the connection is lost")
    for request in (first, second):
        got = world.transfers.find(request, 0)
        assert got == 0, f"request {request.request_id} would fetch {got} tokens from a lost engine. {LOOK_FAIL}"


def computed_offer() -> tuple[World, Request, Offer]:
    """A prompt whose last tokens are in the step that is launched next."""
    world = World()
    request = world.request("a", False)
    [offer] = world.take()
    world.blocks.admit("a", 100)
    request.num_computed_tokens = 100
    world.transfers.save(request, range(0))
    world.take()
    return world, request, offer


def test_what_was_withdrawn_is_not_confirmed() -> None:
    """Aborted while its last step was in flight."""
    world, request, _ = computed_offer()
    world.transfers.note_launch()
    world.transfers.note_leave(request)
    world.transfers.note_result()
    orders = [type(order).__name__ for order in world.take()]
    assert orders == ["Withdraw"], f"expected a withdrawal alone, got {orders}. {LOOK_CONFIRM}"


@pytest.mark.parametrize("is_launched", [False, True])
def test_a_reset_forgets_the_steps(is_launched: bool) -> None:
    """The launch has failed, or its step. The same prompt comes again, and is confirmed when it is computed."""
    world, request, offer = computed_offer()
    if is_launched:
        world.transfers.note_launch()
    world.transfers.reset()
    assert [type(order) for order in world.take()] == [Withdraw], LOOK_RESET
    world.done(offer, error="withdrawn")
    world.request("again", False)
    world.take()
    world.transfers.note_launch()
    world.transfers.note_result()
    assert not world.take(), f"nothing of it is computed, and it is confirmed. {LOOK_RESET}"


def test_a_reset_releases() -> None:
    world = World()
    world.request("a", True)
    world.take()
    world.transfers.reset()
    assert [type(order) for order in world.take()] == [Release] and not world.transfers.is_busy, LOOK_RESET
