"""Part 8's engine whose worker and whose draft tokens follow scripts, and what holds of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from part08_speculative_decoding.core.engine import LLMEngine
from part08_speculative_decoding.core.request import Request
from part08_speculative_decoding.core.scheduler import Scheduler, SchedulerOutput
from part08_speculative_decoding.messages import EngineCoreOutput, ScheduledRequest, StepInput
from tests.engine_checks import Before, PrefixChecks
from tests.scripted import (
    Part,
    PrefixExecutor,
    ScriptedStep,
    Work,
    executor_of,
    make_scripted_engine,
    next_token,
    shares,
)

PART = Part("part08_speculative_decoding")
BY_PROMPT = "by prompt"
LESSON = 'README "Propose, then verify"'
LOOK_ADD = f"Look at core/scheduler.py::Scheduler._add; {LESSON}."
LOOK_DRAFTS = f"Look at core/scheduler.py::Scheduler._choose_drafts; {LESSON}."
LOOK_NEXT = f"Look at core/scheduler.py::Scheduler._num_next_drafts and _allocate_draft_slots; {LESSON}."
LOOK_AHEAD = f"Look at core/scheduler.py::Scheduler.can_run_ahead and core/engine.py::LLMEngine.step; {LESSON}."
LOOK_APPEND = 'Look at core/engine.py::LLMEngine._append; README "Several tokens from one step".'


class Drafter:
    """Proposes tokens that are right, wrong, right at first, too few or none: which, is a function of the text.

    With BY_PROMPT as the first of the kinds it is a function of the prompt's last token, so the same for all the
    answer. asked: how many draft tokens of whom it was asked for; by the worker, whose rows have no names, of "".
    """

    def __init__(self, script: Callable[[Sequence[int]], int], kinds: Sequence[str]) -> None:
        self.script, self.by_text = script, kinds[0] != BY_PROMPT
        self.kinds = [kind for kind in kinds if kind != BY_PROMPT]
        self.asked: list[tuple[str, int]] = []

    def propose(self, name: str, text: Sequence[int], num_prompt_tokens: int, count: int) -> list[int]:
        self.asked.append((name, count))
        number = zlib.crc32(bytes(text if self.by_text else text[num_prompt_tokens - 1 : num_prompt_tokens]), 7)
        right = list[int]()
        while len(right) < count:
            right.append(self.script([*text, *right]))
        half = number // 16 % (count + 1)
        wrong = [(token_id + 1) % 20 for token_id in right]
        drafts = {"right": right, "wrong": wrong, "half": right[:half] + wrong[half:], "few": right[:half], "none": []}
        return drafts[self.kinds[number % len(self.kinds)]]


class SpecExecutor(PrefixExecutor):
    """Verifies draft tokens, and proposes the next ones in the place of a draft model.

    problems also has requests without the blocks that a draft model needs.
    """

    def __init__(self, part: Part, config: Any) -> None:
        super().__init__(part, config)
        self.drafter: Drafter | None = None
        self.num_prompt_tokens: dict[int, int] = {}

    def prepare(self, step: StepInput, names: Sequence[str]) -> ScriptedStep:
        self.num_prompt_tokens |= {new.row: new.num_prompt_tokens for new in step.new_requests}
        for share in step.requests:
            num_sampled = share.num_scheduled_tokens if share.draft_token_ids else 1
            assert num_sampled == 1 + len(share.draft_token_ids) and (
                share.is_sampled or not share.draft_token_ids and not share.num_next_drafts
            ), f"{share}: draft tokens follow a request's newest token, and are sampled. {LOOK_ADD}"
        return super().prepare(step, names)

    def work_of(self, share: ScheduledRequest, name: str) -> Work:
        work = super().work_of(share, name)
        num_slots, last = len(self.tables[share.row]) * self.config.block_size, work.end + share.num_next_drafts
        assert not share.num_next_drafts or last <= num_slots, (
            f"request {name} computes positions up to {work.end - 1}, then the draft model proposes "
            f"{share.num_next_drafts} tokens: it computes the next token and all draft tokens but the last, so "
            f"expected slots for {last} positions, got {num_slots}. {LOOK_NEXT}"
        )
        return work

    def write(self, work: Work) -> None:
        self.tokens[work.row][work.num_known : work.end] = work.draft_token_ids
        super().write(work)

    def sample(self, work: Work, tokens: list[int]) -> list[int]:
        """The draft tokens that the script would have said itself, and one more token."""
        sampled = [self.script(tokens[: work.num_known])]
        for draft in work.draft_token_ids:
            if draft != sampled[-1]:
                break
            sampled.append(self.script(tokens[: work.num_known + len(sampled)]))
        return sampled

    def output(self, step: ScriptedStep) -> Any:
        works = [work for work in step.work if work.is_sampled]
        token_ids = [work.sampled for work in works]
        return self.part.messages.StepOutput(token_ids, [None] * len(works), [self.proposals(work) for work in works])

    def proposals(self, work: Work) -> list[int]:
        count = work.share.num_next_drafts
        if not count:
            return []
        assert self.drafter is not None, f"{work.share}: there is no draft model. {LOOK_NEXT}"
        text = self.tokens[work.row][: work.num_known + len(work.sampled)]
        return self.drafter.propose("", text, self.num_prompt_tokens[work.row], count)


def drafter_of(engine: LLMEngine) -> Drafter:
    """The drafter of a scripted engine with draft tokens of either method."""
    drafter: Drafter | None = executor_of(engine).drafter
    assert drafter is not None
    return drafter


@dataclass
class BeforeSpec(Before):
    drafts: dict[str, list[int]]  # proposals that are known, of each running request


class Checks(PrefixChecks):
    LOOK_STEP = (
        'Look at core/engine.py::LLMEngine.step, _update and core/scheduler.py; README "Several tokens from one step".'  # noqa: E501
    )
    LOOK_ADD = LOOK_ADD
    LOOK_SIZE = 'Look at core/scheduler.py::Scheduler._chunk_size; README of part 6, "Decodes first".'
    LOOK_RUNNING = 'Look at core/scheduler.py::Scheduler._schedule_running; README of part 6, "Decodes first".'
    LOOK_ADMIT = 'Look at core/scheduler.py::Scheduler._admit and _schedule_waiting; README of part 6, "Decodes first".'
    LOOK_LATE = 'Look at core/engine.py::LLMEngine._append; README of part 5, "Late tokens".'
    LOOK_ROWS = 'Look at core/scheduler.py::Scheduler._start, _leave and finish; README of part 5, "Placeholders".'
    LOOK_HIT = 'Look at core/scheduler.py::Scheduler._schedule_waiting; README of part 7, "A block\'s hash".'
    LOOK_HASH = 'Look at core/block_manager.py::hash_block and hash_blocks; README of part 7, "A block\'s hash".'
    LOOK_NAME = 'Look at core/scheduler.py::Scheduler._add, _leave; README "The draft model\'s KV cache".'
    LOOK_FREE = 'Look at core/block_manager.py::BlockManager; README of part 7, "Free, but still cached".'
    LOOK_QUEUE = 'Look at core/free_queue.py::FreeBlockQueue; README of part 7, "Free, but still cached".'
    LOOK_TOLD = 'Look at core/engine.py::LLMEngine._append; README of part 7, "What a client sees".'

    def look_at(self, scheduler: Scheduler) -> BeforeSpec:
        for request in scheduler.running:
            name, num_in_flight = request.request_id, request.num_output_placeholders
            assert num_in_flight <= 1 and not request.num_pending_drafts, (
                f"a step is scheduled while one in flight brings request {name} up to {num_in_flight} tokens and "
                f"{request.num_pending_drafts} draft tokens: its next position depends on how many are accepted. "
                f"{LOOK_AHEAD}"
            )
        drafts = {r.request_id: r.draft_token_ids or scheduler._look_up_drafts(r) for r in scheduler.running}
        return BeforeSpec(**vars(super().look_at(scheduler)), drafts=drafts)

    def check_decodes_first(self, scheduler: Scheduler, output: SchedulerOutput, before: Before, what: str) -> None:
        assert isinstance(before, BeforeSpec), "made by look_at"
        for request, share in shares(output):
            proposed, drafts = before.drafts.get(request.request_id, []), share.draft_token_ids
            assert drafts == proposed[: len(drafts)] or (output.preempted and not proposed), (  # with fewer running
                f"{what}: request {request.request_id} has the proposals {proposed}, and the step verifies {drafts}: "
                f"expected the first of them. {LOOK_DRAFTS}"
            )
        for request in output.preempted:
            assert not request.draft_token_ids and not request.num_pending_drafts, (
                f"{what}: request {request.request_id} was preempted and keeps its draft tokens. Look at "
                f"core/scheduler.py::Scheduler.preempt; {LESSON}."
            )
        super().check_decodes_first(scheduler, output, before, what)

    def check_sampled(self, request: Request, share: ScheduledRequest, what: str) -> None:
        name, num_drafts = request.request_id, len(share.draft_token_ids)
        num_samples = share.is_sampled * (1 + num_drafts)
        num_known = request.num_expected_tokens - num_samples  # without the tokens that this step brings
        end = share.num_computed_tokens + share.num_scheduled_tokens - num_drafts
        assert share.is_sampled is (end == num_known) and (share.is_sampled or not num_drafts), (
            f"{what}: request {name} has {num_known} tokens and {num_drafts} draft tokens, and computes those up to "
            f"{end}: expected is_sampled {end == num_known}, got {share.is_sampled}. {LOOK_ADD}"
        )
        most = request.num_expected_tokens + (1 + share.num_next_drafts if share.num_next_drafts else 0)
        assert most <= request.max_num_tokens, (
            f"{what}: request {name} would get {request.num_expected_tokens} tokens if all draft tokens are accepted, "
            f"{share.num_next_drafts} more are proposed then, and one follows: {most}, {request.max_num_tokens} are "
            f"allowed. {LOOK_DRAFTS if num_drafts else LOOK_NEXT}"
        )
        assert request.num_pending_drafts == share.num_next_drafts, (
            f"{what}: the worker proposes {share.num_next_drafts} tokens for request {name}, its num_pending_drafts is "
            f"{request.num_pending_drafts}. {LOOK_NEXT}"
        )

    def check_positions(
        self, scheduler: Scheduler, output: SchedulerOutput, before: Before, computed: dict[str, Any], what: str
    ) -> None:
        """computed: of each request, how many positions so far, and whether the last of them were sampled."""
        for request, share in shares(output):
            name, start = request.request_id, share.num_computed_tokens
            if name in before.waiting:
                self.check_hit(scheduler, request, start, what)
            else:
                known, was_sampled = computed[name]
                if was_sampled:  # it decodes; positions of rejected draft tokens are computed again
                    known = before.running[name][1] - 1
                assert start == known, (
                    f"request {name} computes positions from {start} on; those before {known} are computed: every "
                    f"position once, in order, until it is preempted, but for rejected draft tokens. {LOOK_APPEND}"
                )
            computed[name] = (start + share.num_scheduled_tokens, share.is_sampled)

    def check_placeholders(self, engine: LLMEngine, request: Request, where: str) -> None:
        found = [s for step in engine.in_flight for other, s in step.scheduled.pairs if other is request]
        num_in_flight = sum(share.is_sampled + len(share.draft_token_ids) for share in found)
        assert request.num_output_placeholders == num_in_flight, (
            f"{where}: request {request.request_id} gets up to {num_in_flight} tokens from the steps in flight: "
            f"expected as many placeholders, got {request.num_output_placeholders}. {LOOK_ADD}"
        )
        num_pending = sum(share.num_next_drafts for share in found) if request.row is not None else 0
        assert request.num_pending_drafts == num_pending, (
            f"{where}: the steps in flight propose {num_pending} tokens for request {request.request_id}, its "
            f"num_pending_drafts is {request.num_pending_drafts}. {LOOK_NEXT}"
        )

    def check_waiting(self, request: Request, where: str) -> None:
        super().check_waiting(request, where)
        assert not request.draft_token_ids, (
            f"{where}: request {request.request_id} waits with draft tokens {request.draft_token_ids}. {LOOK_APPEND}"
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
    """A real LLMEngine over the scripted worker, whose scheduler is watched; flags are EngineConfig's.

    kinds: of draft tokens, if there are any. They take the place of an n-gram lookup's, or with
    speculative_method="draft_model" of a draft model's, which never proposes too few.
    """
    flags = {"speculative_method": "ngram" if kinds else "none", **flags}
    with mock.patch.object(PART.config, "check_draft_model"):
        engine: LLMEngine = make_scripted_engine(PART, SpecExecutor, max_model_len, script, **flags)
    if kinds:
        set_drafter(engine, Drafter(script, kinds))
    watch(engine.scheduler)
    return engine


def set_drafter(engine: LLMEngine, drafter: Drafter) -> None:
    speculation = engine.speculation

    def look_up(request: Request, num_running: int) -> list[int]:
        num_tokens = speculation.num_tokens(request, num_running)
        if not num_tokens:
            return []
        return drafter.propose(request.request_id, request.token_ids, len(request.prompt_token_ids), num_tokens)

    executor_of(engine).drafter = drafter
    if speculation.method == "ngram":
        speculation.look_up = look_up  # type: ignore[method-assign]
