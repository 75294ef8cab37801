"""api/output_processor.py: tokens become text, stop strings end an answer, and later tokens are ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.outputs import CompletionOutput, FinishReason, Logprob, join_outputs
from common.sampling_params import SamplingParams
from part05_async_scheduling.api.output_processor import OutputProcessor
from part05_async_scheduling.messages import EngineCoreOutput

LOOK = 'Look at api/output_processor.py::OutputProcessor.process; README "Two processes".'
LOOK_JOIN = "Look at common/outputs.py::join_outputs."
WORDS = ["Nora", " met", " a", " fox", " on", " the", " way", " home", ".", " Good", " day", "!"]


class Words:
    """A tokenizer whose token n is the n-th word; the last token is special."""

    end = len(WORDS)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(WORDS[token_id] for token_id in token_ids if token_id != self.end)


@pytest.fixture
def processor() -> OutputProcessor:
    return OutputProcessor(Words())  # type: ignore[arg-type]


def output_of(
    name: str, token_id: int, finish_reason: FinishReason | None = None, stop_reason: int | None = None, **fields: Any
) -> EngineCoreOutput:
    return EngineCoreOutput(name, [token_id], finish_reason, stop_reason, **fields)


def run(processor: OutputProcessor, outputs: list[EngineCoreOutput]) -> tuple[list[CompletionOutput], list[str]]:
    """One output after the other; the answers, and the ids of requests that ended with a stop string."""
    answers, stopped = list[CompletionOutput](), list[str]()
    for output in outputs:
        each, ids = processor.process([output])
        answers += [answer for _, answer in each]
        stopped += ids
    return answers, stopped


def check(got: list[CompletionOutput], expected: CompletionOutput, case: str) -> None:
    assert got, f"{case}: expected {expected}, got nothing. {LOOK}"
    joined = join_outputs(got)
    assert joined == expected, f"{case}: expected {expected}, got {joined}. {LOOK}"


def test_an_answer_is_its_tokens_text(processor: OutputProcessor) -> None:
    processor.add_request("a", [], SamplingParams())
    answers, stopped = run(
        processor, [output_of("a", number, "length" if number == 4 else None) for number in range(5)]
    )
    check(answers, CompletionOutput(0, "Nora met a fox on", [0, 1, 2, 3, 4], "length", None), "five tokens")
    reasons = [answer.finish_reason for answer in answers]
    assert reasons == [None] * 4 + ["length"], f"only the last says why it ended, got {reasons}. {LOOK}"
    assert stopped == [], f"the engine knows that it has ended: expected no ids, got {stopped}. {LOOK}"


def test_one_step_s_outputs_go_to_their_own_requests(processor: OutputProcessor) -> None:
    for name in "abc":
        processor.add_request(name, [], SamplingParams())
    first, stopped = processor.process([output_of("b", 1), output_of("a", 0), output_of("c", 2)])
    got = [(name, answer.text, answer.token_ids) for name, answer in first]
    assert got == [("b", " met", [1]), ("a", "Nora", [0]), ("c", " a", [2])], f"in the step's order: {got}. {LOOK}"
    second, _ = processor.process([output_of("a", 1, "length"), output_of("c", 3)])
    got = [(name, answer.text, answer.token_ids) for name, answer in second]
    assert got == [("a", " met", [1]), ("c", " fox", [3])] and stopped == [], f"got {got}, {stopped}. {LOOK}"


def test_a_stop_string_ends_the_answer_and_the_request_has_to_be_aborted(processor: OutputProcessor) -> None:
    """ " fox on" is completed by the fifth token; what may begin it is held back until then."""
    processor.add_request("a", [], SamplingParams(stop=[" fox on"]))
    answers, stopped = run(processor, [output_of("a", number) for number in range(5)])
    check(answers, CompletionOutput(0, "Nora met a", [0, 1, 2, 3, 4], "stop", " fox on"), "a stop string")
    assert [answer.text for answer in answers[3:]] == ["", ""], f"half a stop string was shown: {answers}. {LOOK}"
    assert stopped == ["a"], f"the engine does not know that it has ended: expected ['a'], got {stopped}. {LOOK}"


def test_a_token_too_late_is_ignored(processor: OutputProcessor) -> None:
    """The engine has launched one more step, or two, before the abort arrives."""
    processor.add_request("a", [], SamplingParams(stop=["fox"]))
    processor.add_request("b", [], SamplingParams())
    answers, stopped = run(processor, [output_of("a", number) for number in range(4)])
    assert stopped == ["a"] and answers[-1].finish_reason == "stop", f"got {answers}, {stopped}. {LOOK}"
    late, stopped = processor.process([output_of("a", 4), output_of("b", 0), output_of("a", 5, "length")])
    assert [(name, answer.text) for name, answer in late] == [("b", "Nora")], (
        f"request a has ended: expected an answer for b alone, got {late}. {LOOK}"
    )
    assert stopped == [], f"it was reported already: expected no ids, got {stopped}. {LOOK}"


def test_a_request_that_is_not_known_is_ignored(processor: OutputProcessor) -> None:
    processor.add_request("a", [], SamplingParams())
    processor.add_request("b", [], SamplingParams())
    processor.remove(iter(["a", "unknown", "a"]))
    answers, stopped = processor.process([output_of("a", 0, "length"), output_of("x", 1), output_of("b", 2)])
    assert [name for name, _ in answers] == ["b"] and stopped == [], f"got {answers}, {stopped}. {LOOK}"


def test_nothing_is_kept_of_ended_requests(processor: OutputProcessor) -> None:
    for name, stop in (("length", []), ("stop", []), ("string", ["Nora"]), ("removed", [])):
        processor.add_request(name, [], SamplingParams(stop=stop))
    processor.process([output_of("length", 0, "length"), output_of("stop", Words.end, "stop"), output_of("string", 0)])
    processor.remove(["removed"])
    assert not processor._detokenizers, f"all have ended, and kept is {list(processor._detokenizers)}. {LOOK}"


def test_the_last_token_completes_a_stop_string(processor: OutputProcessor) -> None:
    """The engine has ended it by length in the same step, so it is not reported."""
    processor.add_request("a", [], SamplingParams(stop=["fox"]))
    answers, stopped = run(
        processor, [output_of("a", number, "length" if number == 3 else None) for number in range(4)]
    )
    check(answers, CompletionOutput(0, "Nora met a ", [0, 1, 2, 3], "stop", "fox"), "stop string and length at once")
    assert stopped == [], f"the engine knows that it has ended, expected no ids, got {stopped}. {LOOK}"


def test_half_a_stop_string_is_shown_at_the_end(processor: OutputProcessor) -> None:
    processor.add_request("a", [], SamplingParams(stop=["fox on"]))
    answers, _ = run(processor, [output_of("a", number, "length" if number == 3 else None) for number in range(4)])
    check(answers, CompletionOutput(0, "Nora met a fox", [0, 1, 2, 3], "length", None), "half a stop string at the end")


@pytest.mark.parametrize("stop_reason", [None, 3])
def test_a_stop_token_is_not_shown(processor: OutputProcessor, stop_reason: int | None) -> None:
    """The model's end-of-sequence token, or one of stop_token_ids; token_ids has it. It completes no stop string."""
    processor.add_request("a", [], SamplingParams(stop=["fox"]))
    answers, stopped = run(processor, [output_of("a", 1), output_of("a", 2), output_of("a", 3, "stop", stop_reason)])
    check(answers, CompletionOutput(0, " met a", [1, 2, 3], "stop", stop_reason), "a stop token, ' fox'")
    assert stopped == [], f"the engine knows that it has ended, expected no ids, got {stopped}. {LOOK}"


def test_min_tokens_holds_stop_strings_back(processor: OutputProcessor) -> None:
    processor.add_request("a", [], SamplingParams(stop=["Nora"], min_tokens=3))
    answers, stopped = run(processor, [output_of("a", 0) for _ in range(4)])
    check(answers, CompletionOutput(0, "NoraNoraNora", [0] * 4, "stop", "Nora"), "min_tokens=3")
    assert stopped == ["a"], f"got {stopped}. {LOOK}"


def test_logprobs_are_passed_on(processor: OutputProcessor) -> None:
    processor.add_request("a", [], SamplingParams(logprobs=0))
    entries = [{number: Logprob(-0.5 * number, 1)} for number in range(3)]
    answers, _ = run(processor, [output_of("a", number, logprobs=[entries[number]]) for number in range(3)])
    check(answers, CompletionOutput(0, "Nora met a", [0, 1, 2], None, None, entries), "logprobs")


def test_join_outputs() -> None:
    pieces = [CompletionOutput(0, "a", [1], None, None), CompletionOutput(0, "", [2], None, None)]
    pieces.append(CompletionOutput(0, "b", [3], "stop", "c"))
    expected = CompletionOutput(0, "ab", [1, 2, 3], "stop", "c")
    assert join_outputs(pieces) == expected, f"expected {expected}, got {join_outputs(pieces)}. {LOOK_JOIN}"
    assert join_outputs(pieces[:1]) == pieces[0], f"one piece is itself. {LOOK_JOIN}"


@pytest.mark.parametrize("text", ["One fine day, Nora met a shy fox. 🦊 日本語のテキスト!", "héllo wörld " * 3])
def test_the_shipped_tokenizer_s_text(text: str) -> None:
    """Half characters wait; the pieces joined are the whole decode."""
    tokenizer = load_tokenizer(resolve_checkpoint("tiny"))
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    processor, last = OutputProcessor(tokenizer), len(token_ids) - 1
    processor.add_request("a", [], SamplingParams())
    outputs = [output_of("a", token_id, "length" if n == last else None) for n, token_id in enumerate(token_ids)]
    answers, _ = run(processor, outputs)
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    check(answers, CompletionOutput(0, whole, token_ids, "length", None), repr(text))
    assert not any("\ufffd" in answer.text for answer in answers), f"half a character was shown. {LOOK}"
