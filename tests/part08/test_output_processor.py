"""api/output_processor.py: several tokens of a request from one step, and a stop string that ends among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from common.outputs import CompletionOutput, Logprob, join_outputs
from common.sampling_params import SamplingParams
from part08_speculative_decoding.api.output_processor import OutputProcessor
from part08_speculative_decoding.messages import EngineCoreOutput

LOOK = 'Look at api/output_processor.py::OutputProcessor._extend; README "Several tokens from one step".'
WORDS = ["Nora", " met", " a", " fox", " on", " the", " way", " home", ".", " Good", " day", "!"]


class Words:
    """A tokenizer whose token n is the n-th word."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(WORDS[token_id] for token_id in token_ids)


def answer_of(
    pieces: Sequence[Sequence[int]], finish: tuple[Any, Any] = ("length", None), **fields: Any
) -> tuple[CompletionOutput, list[CompletionOutput], list[str]]:
    """The tokens come in these pieces, the last with the engine's reasons. Returns the answer, its pieces, and the ids
    of requests to stop."""
    processor, answers, stopped = OutputProcessor(Words()), list[CompletionOutput](), list[str]()  # type: ignore[arg-type]
    processor.add_request("a", [], SamplingParams(**fields))
    for number, piece in enumerate(pieces):
        reasons = finish if number == len(pieces) - 1 else (None, None)
        logprobs = [{token_id: Logprob(-float(token_id), 1)} for token_id in piece]
        found, ids = processor.process([EngineCoreOutput("a", list(piece), reasons[0], reasons[1], logprobs)])
        answers += [answer for _, answer in found]
        stopped += ids
    return join_outputs(answers), answers, stopped


CASES: list[tuple[str, dict[str, Any], tuple[Any, Any], tuple[str, int, Any, Any]]] = [
    ("no stop string", {}, ("length", None), ("Nora met a fox on the way home.", 9, "length", None)),
    ("it ends the first of several tokens", {"stop": [" fox"]}, ("length", None), ("Nora met a", 4, "stop", " fox")),
    ("it spans tokens", {"stop": ["fox on t"]}, ("length", None), ("Nora met a ", 6, "stop", "fox on t")),
    (
        "it ends with the last token",
        {"stop": ["home."]},
        ("length", None),
        ("Nora met a fox on the way ", 9, "stop", "home."),
    ),
    ("the earlier of two", {"stop": ["way", "fox"]}, ("length", None), ("Nora met a ", 4, "stop", "fox")),
    ("a stop token is not shown", {}, ("stop", 8), ("Nora met a fox on the way home", 9, "stop", 8)),
    ("a stop string before the stop token", {"stop": [" on"]}, ("stop", 8), ("Nora met a fox", 5, "stop", " on")),
    (
        "a stop string is not searched in a stop token",
        {"stop": ["."]},
        ("stop", 8),
        ("Nora met a fox on the way home", 9, "stop", 8),
    ),
    (
        "min_tokens",
        {"stop": ["fox", "way"], "min_tokens": 5},
        ("length", None),
        ("Nora met a fox on the ", 7, "stop", "way"),
    ),
]


@pytest.mark.parametrize(("what", "fields", "finish", "expected"), CASES, ids=[case[0] for case in CASES])
def test_the_answer_does_not_depend_on_the_number_of_tokens_a_step(
    what: str, fields: dict[str, Any], finish: tuple[Any, Any], expected: tuple[str, int, Any, Any]
) -> None:
    """One by one, in twos, threes and fives, all at once: the answer is the same, and cut at the same token."""
    tokens = list(range(9))
    for size in (1, 2, 3, 4, 5, 9):
        whole, pieces, stopped = answer_of([tokens[i : i + size] for i in range(0, 9, size)], finish, **fields)
        got = (whole.text, len(whole.token_ids), whole.finish_reason, whole.stop_reason)
        assert got == expected, f"{what}, {size} tokens a step: expected {expected}, got {got}. {LOOK}"
        assert len(whole.logprobs or []) == expected[1], (
            f"{what}, {size} tokens a step: expected log-probabilities of {expected[1]} tokens, got "
            f"{len(whole.logprobs or [])}. {LOOK}"
        )
        assert [next(iter(entry)) for entry in whole.logprobs or []] == whole.token_ids, (
            f"{what}: log-probabilities of other tokens. {LOOK}"
        )
        assert sum(piece.finish_reason is not None for piece in pieces) == 1, (
            f"{what}: it ends once, got {pieces}. {LOOK}"
        )
        is_early = len(pieces) < len(range(0, 9, size)) or (whole.finish_reason, whole.stop_reason) != finish
        knows = len(pieces) == len(range(0, 9, size))  # with its last piece the engine has ended it
        assert stopped == (["a"] if is_early and not knows else []), (
            f"{what}, {size} tokens a step: requests to stop {stopped}, and the engine has "
            f"{'ended it' if knows else 'not ended it'}. {LOOK}"
        )
