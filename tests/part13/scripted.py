"""Part 13's engine over a scripted worker, whose prompts other engines fetch, and which fetches those of others."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import msgspec

from part13_disaggregation.core.engine import LLMEngine
from part13_disaggregation.core.kv_transfer import LEASE_ENDED, name_of
from part13_disaggregation.messages import (
    Confirm,
    Fetch,
    KVSource,
    KVTransferParams,
    Notice,
    Offer,
    Publish,
    Release,
    Transfer,
    TransferDone,
    Watch,
    Withdraw,
)
from tests.engine_checks import Before
from tests.part08.scripted import BeforeSpec, Drafter, set_drafter
from tests.part09.scripted import Checks as StagedChecks
from tests.part09.scripted import StagedExecutor
from tests.scripted import NOTHING, Part, ScriptedStep, contents, ids, make_scripted_engine, next_token

PART = Part("part13_disaggregation")
GARBAGE = (254, b"garbage!")
SOURCE = KVSource("tcp://elsewhere:1", "layout", 0, 1, 0, 1)
LOOK_OFFER = 'Look at core/kv_transfer.py::KVTransfer.save, note_leave and note_done; README "Delayed free".'
LOOK_FETCH = 'Look at core/kv_transfer.py::KVTransfer.find, load and note_done; README "What a waiting request does".'


@dataclass
class OfferedHere:
    """What the scripted worker knows of an offered prompt. ready: tokens that have been computed."""

    offer: Offer
    block_ids: list[int] = field(default_factory=list)
    ready: int = 0
    is_confirmed: bool = False
    is_withdrawn: bool = False


@dataclass
class Fetching:
    """num_launched: steps that were launched before; they run first."""

    fetch: Fetch
    num_launched: int
    has_begun: bool = False


class TransferExecutor(StagedExecutor):
    """Other engines fetch here at random times, and see whether the blocks hold what they were promised. What is
    fetched arrives at random times, and not always whole: until then, the blocks hold garbage, and nothing else may
    write there. prompts: what a name stands for, and the salt.
    """

    def __init__(self, part: Part, config: Any) -> None:
        super().__init__(part, config)
        self.rng, self.failing, self.patience = random.Random(0), 0.0, 0.5
        self.kv_sources: list[KVSource] = []
        self.prompts: dict[bytes, tuple[list[int], str | None]] = {}
        self.offers: dict[bytes, OfferedHere] = {}
        self.watches: dict[bytes, Watch | None] = {}  # None: answered
        self.fetches: list[Fetching] = []
        self.published: list[Publish] = []  # for the next step
        self.publishes: dict[int, list[Publish]] = {}  # of each step
        self.late: list[TransferDone] = []  # answers to what was released
        self.released = set[bytes]()
        self.counts: Counter[str] = Counter()

    def launch(self, step: Any) -> ScriptedStep:
        launched = super().launch(step)
        self.publishes[launched.number], self.published = self.published, []
        return launched

    def run(self, step: ScriptedStep) -> None:
        super().run(step)
        for each in self.publishes.pop(step.number, []) if step.error is None else []:
            if (offered := self.offers.get(each.name)) is not None:
                offered.block_ids, offered.ready = each.block_ids, each.num_tokens

    def check_offered(self, offered: OfferedHere) -> None:
        """What other engines would read now is the prompt's KV."""
        prompt, salt = self.prompts[offered.offer.name]
        block_size = self.config.block_size
        slots = [offered.block_ids[p // block_size] * block_size + p % block_size for p in range(offered.ready)]
        held, expected = [self.cache.get(slot, NOTHING)[1] for slot in slots], contents(prompt, salt)[: offered.ready]
        assert held == expected, (
            f"of an offered prompt, blocks {offered.block_ids} should hold {offered.ready} tokens, and hold something "
            f"else at positions {[p for p, pair in enumerate(zip(held, expected, strict=True)) if pair[0] != pair[1]]}"
            f". {LOOK_OFFER}"
        )

    def transfer(self, transfer: Transfer | Notice) -> None:
        decoded = msgspec.msgpack.Decoder(Transfer | Notice).decode(self.encode(transfer))  # type: ignore[arg-type]
        assert decoded == transfer, f"{transfer} does not survive the way to the worker"
        match decoded:
            case Offer():
                assert decoded.name not in self.offers, f"offered twice. {LOOK_OFFER}"
                self.offers[decoded.name] = OfferedHere(decoded)
            case Publish():
                assert decoded.name in self.offers, f"published, and not offered. {LOOK_OFFER}"
                self.published.append(decoded)
            case Confirm():
                if (offered := self.offers.get(decoded.name)) is not None:
                    assert offered.ready == offered.offer.num_tokens, f"confirmed too early. {LOOK_OFFER}"
                    offered.is_confirmed = True
                    self.check_offered(offered)
            case Withdraw():
                if decoded.name in self.offers:
                    self.offers[decoded.name].is_withdrawn = True
            case Watch():
                assert decoded.name not in self.watches, f"watched twice. {LOOK_FETCH}"
                self.watches[decoded.name] = decoded
            case Fetch():
                assert decoded.name in self.watches, f"fetched, and not watched. {LOOK_FETCH}"
                self.fetches.append(Fetching(decoded, len(self.launched)))
            case Release():
                assert decoded.name in self.watches, f"released, and not watched. {LOOK_FETCH}"
                watch = self.watches.pop(decoded.name)
                if watch is not None:
                    self.late.append(TransferDone(watch.transfer_id, error="released"))
                self.released.add(decoded.name)

    def finished_transfers(self, timeout_s: float) -> list[TransferDone]:
        finished, self.late = self.late, []
        for name, offered in list(self.offers.items()):
            if offered.is_confirmed:
                self.check_offered(offered)
            must = offered.is_withdrawn or (bool(timeout_s) and offered.is_confirmed)
            if (must and not finished) or (offered.is_confirmed and self.rng.random() < 0.2):
                del self.offers[name]
                self.counts["offers"] += 1
                error = "withdrawn" if offered.is_withdrawn else self.rng.choice(["released", LEASE_ENDED])
                finished.append(TransferDone(offered.offer.transfer_id, error=error))
        for name, watch in self.watches.items():
            if watch is not None and (bool(timeout_s) or self.rng.random() < self.patience):
                self.watches[name] = None
                fails = self.rng.random() < self.failing
                self.counts["watches that failed"] += fails
                num_tokens = 0 if fails else len(self.prompts[name][0])
                error = "no such engine" if fails else None
                finished.append(TransferDone(watch.transfer_id, num_tokens=num_tokens, error=error))
        for fetching in list(self.fetches):
            must = bool(timeout_s) or fetching.fetch.name in self.released
            if not fetching.has_begun and (must or self.rng.random() < self.patience):
                self.begin(fetching)
            if fetching.has_begun and (must or self.rng.random() < self.patience):
                self.fetches.remove(fetching)
                finished.append(self.end(fetching))
        return finished

    def begin(self, fetching: Fetching) -> None:
        fetching.has_begun = True
        while self.pending and self.pending[0].number <= fetching.num_launched:
            self.run(self.pending.popleft())
        self.cache.update((slot, GARBAGE) for slot in self.slots_of(fetching.fetch))

    def end(self, fetching: Fetching) -> TransferDone:
        fetch, slots = fetching.fetch, self.slots_of(fetching.fetch)
        held = [self.cache.get(slot, NOTHING) for slot in slots]
        assert all(each == GARBAGE for each in held), (
            f"blocks {fetch.block_ids} are being filled from elsewhere, and something else was written there: {held}. "
            f"{LOOK_FETCH}"
        )
        fails = self.rng.random() < self.failing or fetch.name in self.released
        num_tokens = self.rng.randrange(len(slots) + 1) if fails else len(slots)
        (prompt, salt), positions = self.prompts[fetch.name], range(fetch.start, fetch.start + num_tokens)
        expected = contents(prompt, salt)
        self.cache.update((slot, (prompt[p], expected[p])) for slot, p in zip(slots, positions, strict=False))
        self.counts["fetches"] += 1
        self.counts["fetches that failed"] += fails
        self.counts["fetched tokens"] += num_tokens
        return TransferDone(fetch.transfer_id, num_tokens=num_tokens, num_bytes=1, error="lost" if fails else None)

    def slots_of(self, fetch: Fetch) -> list[int]:
        block_size = self.config.block_size
        assert fetch.start % block_size == 0, f"{fetch} begins within a block. {LOOK_FETCH}"
        places = range(fetch.end - fetch.start)
        assert len(places) <= len(fetch.block_ids) * block_size, (
            f"{len(places)} tokens are fetched into {len(fetch.block_ids)} blocks of {block_size}. {LOOK_FETCH}"
        )
        return [fetch.block_ids[place // block_size] * block_size + place % block_size for place in places]


class Checks(StagedChecks):
    """Requests that wait for their KV may hold blocks; offers and fetches hold some, too."""

    def look_at(self, scheduler: Any) -> BeforeSpec:
        before = super().look_at(scheduler)
        before.waiting |= {each.request_id: each.num_tokens for each in [*scheduler.loading, *scheduler.loaded]}
        return before

    def check_decodes_first(self, scheduler: Any, output: Any, before: Before, what: str) -> None:
        if scheduler.connector.has_leaving_blocks:  # a decode may wait for a block that will soon be free
            scheduled = {*ids(output.requests), *ids(output.preempted)}
            before.at_end.update(set(before.running) - scheduled)
            if output.preempted:
                return
        super().check_decodes_first(scheduler, output, before, what)

    def check_hit(self, scheduler: Any, request: Any, num_cached: int, what: str) -> None:
        """What was fetched need not be whole blocks, but one token is left to compute."""
        if num_cached % scheduler.blocks.block_size:
            assert 0 <= num_cached == min(request.num_found_tokens, request.num_tokens - 1), (
                f"{what}: request {request.request_id} has {request.num_tokens} tokens, of which "
                f"{request.num_found_tokens} were found or fetched; it starts with {num_cached}. {LOOK_FETCH}"
            )
        else:
            super().check_hit(scheduler, request, num_cached, what)

    def check_engine(self, engine: Any, where: str) -> None:
        scheduler, blocks = engine.scheduler, engine.blocks
        held = {each.request_id for each in [*scheduler.loading, *scheduler.loaded]} & set(blocks.block_tables)
        tables = {name: blocks.block_tables.pop(name) for name in held}  # the rest is as before
        names = [*scheduler.running, *scheduler.waiting, *scheduler.loading, *scheduler.loaded]
        assert len(set(ids(names))) == len(names), f"{where}: a request is there twice: {ids(names)}. {self.LOOK_STEP}"
        self.loading_tables, self.leased = list(tables.values()), leased_blocks(engine)
        try:
            super().check_engine(engine, where)
        finally:
            blocks.block_tables |= tables
        for request in [*scheduler.loading, *scheduler.loaded]:
            assert request.status is self.part.request.RequestStatus.WAITING_FOR_KV and request.row is None, (
                f"{where}: {request} is loading. {LOOK_FETCH}"
            )

    def check_blocks(self, blocks: Any, where: str) -> None:
        """Every block is free, in tables, or leased by an offer or a fetch, as often as it has references."""
        free = [block.block_id for block in blocks.free_queue]
        tables = [block_id for table in [*blocks.block_tables.values(), *self.loading_tables] for block_id in table]
        assert sorted([*free, *({*tables, *self.leased})]) == list(range(1, blocks.num_blocks)), (
            f"{where}: each block is free, in a table or leased; tables {tables}, leased {self.leased}, free {free}. "
            f"{LOOK_OFFER}"
        )
        for block in blocks.pool[1:]:
            expected = tables.count(block.block_id) + self.leased[block.block_id]
            assert block.ref_count == expected, (
                f"{where}: block {block.block_id} is in {tables.count(block.block_id)} tables and has "
                f"{self.leased[block.block_id]} leases, its ref_count is {block.ref_count}. {LOOK_OFFER}"
            )
        hashed = {block.block_hash: block.block_id for block in blocks.pool if block.block_hash is not None}
        found = {block_hash: block.block_id for block_hash, block in blocks.cached_blocks.items()}
        assert hashed == found, f"{where}: {hashed} have a hash, {found} are found by theirs. {self.LOOK_NAME}"


def leased_blocks(engine: Any) -> Counter[int]:
    """How many offers and fetches have leased each block."""
    fetches = [each.transfer for each in engine.orders.pending.values() if isinstance(each.transfer, Fetch)]
    leased = [each.block_ids for each in [*engine.transfers.offered.values(), *fetches]]
    return Counter(block_id for block_ids in leased for block_id in block_ids)


checks = Checks(PART)


class NextTransfer:
    """Gives the next request that is added what the proxy would say of it."""

    def __init__(self, engine: LLMEngine) -> None:
        self.params: KVTransferParams | None = None
        self.num_asked = 0
        add_request, executor = engine.add_request, engine.executor
        assert isinstance(executor, TransferExecutor)

        def add(request_id: str, prompt: list[int], params: Any, *_: Any) -> None:
            given, self.params = self.params, None
            if given is not None:
                executor.prompts[name_of(given.transfer_id, prompt)] = (prompt, params.cache_salt)
            add_request(request_id, prompt, params, given)

        engine.add_request = add  # type: ignore[method-assign]

    def ask(self, is_fetched: bool, transfer_id: str | None = None) -> KVTransferParams:
        """transfer_id: of an earlier request."""
        self.num_asked += 1
        self.params = KVTransferParams(transfer_id or f"transfer {self.num_asked}", (SOURCE,) if is_fetched else ())
        return self.params


def scripted_engine(
    max_model_len: int = 64,
    script: Callable[[Sequence[int]], int] = next_token,
    kinds: Sequence[str] = (),
    seed: int = 0,
    failing: float = 0.0,
    patience: float = 0.5,
    **flags: Any,
) -> LLMEngine:
    """A real LLMEngine over the scripted worker. failing: how many transfers fail. patience: how likely it is that one
    goes on when core looks. The others are as for part 9's."""
    flags = {"speculative_method": "ngram" if kinds else "none", **flags}

    def make(part: Part, config: Any) -> TransferExecutor:
        executor = TransferExecutor(part, config)
        executor.rng, executor.failing, executor.patience = random.Random(seed), failing, patience
        return executor

    with mock.patch.object(PART.config, "check_draft_model"):
        engine: LLMEngine = make_scripted_engine(PART, make, max_model_len, script, **flags)
    if kinds:
        set_drafter(engine, Drafter(script, kinds))  # type: ignore[arg-type]
    checks.watch(engine.scheduler)
    return engine
