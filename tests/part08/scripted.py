"""Part 8's engine whose model and whose guesses follow scripts, and what holds of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from part08_speculative_decoding.core.block_manager import BlockManager
from part08_speculative_decoding.core.engine import LLMEngine
from part08_speculative_decoding.core.request import Request, RequestStatus
from part08_speculative_decoding.core.scheduler import Scheduler, SchedulerOutput
from part08_speculative_decoding.messages import EngineCoreOutput
from part08_speculative_decoding.worker.sampler import SamplerOutput
from tests.engine_checks import Before, PrefixChecks
from tests.scripted import Part, PrefixRunner, ScriptedStep, Work, ids, make_scripted_engine, next_token

PART = Part("part08_speculative_decoding")
BY_PROMPT = "by prompt"
LOOK_ADD = 'Look at core/scheduler.py::SchedulerOutput.add; README "Guess, then check".'
LOOK_GUESS = 'Look at core/scheduler.py::Scheduler._schedule_running; README "Guess, then check".'
LOOK_PROPOSE = 'Look at core/engine.py::LLMEngine._propose; README "Guess, then check".'
LOOK_APPEND = 'Look at core/engine.py::LLMEngine._append; README "What the step brought".'


class GuessRunner(PrefixRunner):
    """Puts the guesses into the token buffer, and says how many of them stand."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args[:-1])
        self.draft_model = None

    def shares(self, scheduled: SchedulerOutput) -> Iterator[tuple[Request, int, int, int]]:
        for request, start, end, num_sampled in super().shares(scheduled):
            drafts = request.draft_token_ids
            assert len(drafts) == max(0, num_sampled - 1), (
                f"request {request.request_id} gets {num_sampled} tokens at most and has the guesses {drafts}. "
                f"{LOOK_ADD}"
            )
            yield request, start, end, num_sampled

    def write(self, work: Work) -> None:
        self.write_tokens(work.output_places[:-1], work.draft_ids)  # where the token goes that is sampled in its place
        super().write(work)

    def sampler_output(self, step: ScriptedStep) -> SamplerOutput:
        output = super().sampler_output(step)
        if not any(work.draft_ids for work in step.work):
            return output
        return replace(output, num_accepted=torch.tensor(self.num_accepted(step), dtype=torch.int64))

    def num_accepted(self, step: ScriptedStep) -> list[int]:
        """Of each request that gets a token, how many guesses stand."""
        found, first = list[int](), 0
        for work in step.work:
            if work.output_places:
                sampled = step.sampled[first : first + len(work.draft_ids)]
                pairs = enumerate(zip(work.draft_ids, sampled, strict=True))
                found.append(next((i for i, (guess, token) in pairs if guess != token), len(sampled)))
                first += len(work.output_places)
        return found


class ScriptedProposer:
    """Right, wrong, right at first, too few or none at all: as a number made from the request's text says.

    BY_PROMPT, as the first of the kinds: as one made from its prompt's last token says, so always alike.
    It remembers requests until they are released, and looks whether whom it is asked for can be asked for.
    """

    def __init__(self, engine: LLMEngine, script: Callable[[Sequence[int]], int], kinds: Sequence[str]) -> None:
        self.engine, self.script = engine, script
        self.by_text, self.kinds = kinds[0] != BY_PROMPT, [kind for kind in kinds if kind != BY_PROMPT]
        self.known: dict[str, Request] = {}
        self.error: Exception | None = None  # raised by the next call
        self.asked: list[tuple[str, int]] = []

    def propose(self, requests: list[Request], counts: list[int], blocks: BlockManager) -> None:
        assert requests and len(requests) == len(counts), f"{len(requests)} requests, counts {counts}. {LOOK_PROPOSE}"
        self.asked += zip(ids(requests), counts, strict=True)
        for request, count in zip(requests, counts, strict=True):
            self.check(request, count, blocks)
            request.draft_token_ids = self.guess(request, count)
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def guess(self, request: Request, count: int) -> list[int]:
        text = request.token_ids
        number = zlib.crc32(bytes(text if self.by_text else request.prompt_token_ids[-1:]), 7)
        right = list[int]()
        while len(right) < count:
            right.append(self.script(text + right))
        half = number // 16 % (count + 1)
        wrong = [(token_id + 1) % 20 for token_id in right]
        guesses = {"right": right, "wrong": wrong, "half": right[:half] + wrong[half:], "few": right[:half], "none": []}
        return guesses[self.kinds[number % len(self.kinds)]]

    def check(self, request: Request, count: int, blocks: BlockManager) -> None:
        name = request.request_id
        assert request.status is RequestStatus.RUNNING and not request.num_output_placeholders, (
            f"guesses for request {name}, {request.status}, {request.num_output_placeholders} tokens in flight: "
            f"expected one that runs and all of whose tokens are known. {LOOK_PROPOSE}"
        )
        room = request.max_num_tokens - request.num_tokens - 1
        assert 1 <= count <= room, (
            f"{count} guesses for request {name}, of {request.num_tokens} tokens and {request.max_num_tokens} at most: "
            f"one place is for the token after them, so expected 1 to {room}. {LOOK_PROPOSE}"
        )
        num_slots = len(blocks.block_tables[name]) * blocks.block_size
        assert num_slots >= request.num_tokens + count - 1, (
            f"{count} guesses for request {name}, of {request.num_tokens} tokens, with room for {num_slots}: expected "
            f"{request.num_tokens + count - 1}, all but the last guess. {LOOK_PROPOSE}"
        )
        last = self.known.setdefault(name, request)
        assert last is request, f"request {name} came back as another, and was not released. {LOOK_PROPOSE}"

    def release(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.known.pop(request_id, None)


def proposer_of(engine: LLMEngine) -> ScriptedProposer:
    assert isinstance(engine.proposer, ScriptedProposer)
    return engine.proposer


@dataclass
class BeforeGuesses(Before):
    drafts: dict[str, list[int]]  # of those that ran
    guessing: set[str]  # whose guesses are in flight


class Checks(PrefixChecks):
    LOOK_STEP = 'Look at core/engine.py::LLMEngine.step, _update and core/scheduler.py; README "What the step brought".'
    LOOK_ADD = LOOK_ADD
    LOOK_SIZE = 'Look at core/scheduler.py::Scheduler._chunk_size; README of part 6, "Decodes first".'
    LOOK_RUNNING = 'Look at core/scheduler.py::Scheduler._schedule_running; README of part 6, "Decodes first".'
    LOOK_ADMIT = 'Look at core/scheduler.py::Scheduler._admit and _schedule_waiting; README of part 6, "Decodes first".'
    LOOK_LATE = 'Look at core/engine.py::LLMEngine._append; README of part 5, "A token too late".'
    LOOK_ROWS = 'Look at worker/token_buffer.py::TokenBuffer, core/scheduler.py::Scheduler._release; README of part 5, "A token too late".'  # noqa: E501
    LOOK_HIT = 'Look at core/scheduler.py::Scheduler._schedule_waiting; README of part 7, "A block\'s name".'
    LOOK_HASH = 'Look at core/block_manager.py::hash_block and hash_blocks; README of part 7, "A block\'s name".'
    LOOK_NAME = 'Look at core/scheduler.py::Scheduler._add, _release; README "A cache that keeps step".'
    LOOK_FREE = 'Look at core/block_manager.py::BlockManager; README of part 7, "Free, and still there".'
    LOOK_QUEUE = 'Look at core/free_queue.py::FreeBlockQueue; README of part 7, "Free, and still there".'
    LOOK_TOLD = 'Look at core/engine.py::LLMEngine._append_all; README of part 7, "What a client sees".'

    def look_at(self, scheduler: Scheduler) -> BeforeGuesses:
        before = super().look_at(scheduler)
        before.at_end |= self.waiting_to_guess(scheduler)
        return BeforeGuesses(
            **vars(before),
            drafts={r.request_id: list(r.draft_token_ids) for r in scheduler.running},
            guessing={r.request_id for r in scheduler.running if r.num_output_placeholders and r.draft_token_ids},
        )

    def waiting_to_guess(self, scheduler: Scheduler) -> set[str]:
        """Who cannot go on before it is known what the steps in flight bring."""
        num_guesses, num_running = scheduler.speculation.num_tokens, len(scheduler.running)
        return {
            r.request_id
            for r in scheduler.running
            if r.num_output_placeholders and (r.draft_token_ids or num_guesses(r, num_running))
        }

    def check_decodes_first(
        self, scheduler: Scheduler, output: SchedulerOutput, before: BeforeGuesses, what: str
    ) -> None:
        self.check_guesses(output, before, what)
        if output.preempted:  # with fewer running, others may guess again, and wait for what is in flight
            before.at_end |= self.waiting_to_guess(scheduler) - set(ids(output.requests))
        super().check_decodes_first(scheduler, output, before, what)

    def check_guesses(self, output: SchedulerOutput, before: BeforeGuesses, what: str) -> None:
        for request, num_tokens, num_sampled in zip(
            output.requests, output.num_scheduled_tokens, output.num_sampled_tokens, strict=True
        ):
            name = request.request_id
            assert name not in before.guessing, (
                f"{what}: guesses of request {name} are in flight, nobody knows how many stand. It has to wait. "
                f"{LOOK_GUESS}"
            )
            if num_sampled > 1:
                guessed, scheduled = before.drafts[name], request.draft_token_ids
                assert num_tokens == num_sampled and scheduled == guessed[: len(scheduled)], (
                    f"{what}: request {name} guessed {guessed}, computes {num_tokens} tokens with the guesses "
                    f"{scheduled}: expected its own token and the first of its guesses. {LOOK_GUESS}"
                )
        for request in output.preempted:
            assert not request.draft_token_ids and request.draft_probs is None, (
                f"{what}: request {request.request_id} was preempted and keeps its guesses. Look at core/scheduler.py::"
                f'Scheduler.preempt; README "Guess, then check".'
            )

    def check_sampled(self, request: Request, start: int, num_tokens: int, num_sampled: int, what: str) -> None:
        name, num_drafts = request.request_id, len(request.draft_token_ids)
        end = request.num_expected_tokens - num_sampled  # without the tokens that this step brings
        expected = 1 + num_drafts if start + num_tokens == end + num_drafts else 0
        assert num_sampled == expected and (num_sampled or num_drafts == 0), (
            f"{what}: request {name} has {end} tokens and {num_drafts} guesses, and computes those from {start} to "
            f"{start + num_tokens}: expected num_sampled_tokens {expected}, got {num_sampled}. {LOOK_ADD}"
        )
        assert request.num_expected_tokens <= request.max_num_tokens, (
            f"{what}: request {name} would get {request.num_expected_tokens} tokens if all guesses stood, "
            f"{request.max_num_tokens} are allowed. {LOOK_GUESS}"
        )

    def check_positions(
        self, scheduler: Scheduler, output: SchedulerOutput, before: Before, computed: dict[str, Any], what: str
    ) -> None:
        """computed: of each request, how many positions so far, and whether a token came of the last ones."""
        counts = (output.num_computed_tokens, output.num_scheduled_tokens, output.num_cached_tokens)
        for request, start, num_tokens, num_cached in zip(output.requests, *counts, strict=True):
            name = request.request_id
            self.check_hit(scheduler, request, num_cached, before, what)
            known, had_token = (num_cached, False) if name in before.waiting else computed[name]
            if had_token:  # it decodes; guesses that fell have to be computed again
                known = before.running[name][1] - 1
            assert start == known, (
                f"request {name} computes positions from {start} on; those before {known} are computed: every position "
                f"once, in order, until it is preempted, but for guesses that fell. {LOOK_APPEND}"
            )
            computed[name] = (start + num_tokens, start + num_tokens >= request.num_tokens)

    def check_placeholders(self, engine: LLMEngine, request: Request, where: str) -> None:
        num_in_flight = sum(
            num_sampled
            for step in engine.in_flight
            for other, num_sampled in zip(step.scheduled.requests, step.scheduled.num_sampled_tokens, strict=True)
            if other is request
        )
        assert request.num_output_placeholders == num_in_flight, (
            f"{where}: request {request.request_id} gets up to {num_in_flight} tokens from the steps in flight: "
            f"expected as many placeholders, got {request.num_output_placeholders}. {LOOK_ADD}"
        )

    def check_tokens(self, output: EngineCoreOutput, where: str) -> None:
        assert output.token_ids, f"{where}: an output without tokens, {output}. {LOOK_APPEND}"


checks = Checks(PART)
watch, take_step, run_dry = checks.watch, checks.take_step, checks.run_dry


def scripted_engine(
    max_model_len: int = 64,
    script: Callable[[Sequence[int]], int] = next_token,
    kinds: Sequence[str] = (),
    **flags: Any,
) -> LLMEngine:
    """A real LLMEngine over the scripted model, whose scheduler is watched; flags are EngineConfig's.

    kinds: of guesses, if there are any.
    """
    flags = {"speculative_method": "ngram" if kinds else "none", **flags}
    engine = make_scripted_engine(PART, GuessRunner, max_model_len, script, **flags)
    if kinds:
        engine.proposer = ScriptedProposer(engine, script, kinds)
    watch(engine.scheduler)
    return engine
