"""common/outputs.py: the pieces of a stream as one answer."""

from __future__ import annotations

from common.outputs import CompletionOutput, Logprob, join_outputs

LOOK = "Look at common/outputs.py::join_outputs."


def test_join_outputs() -> None:
    pieces = [CompletionOutput(0, "", [5], None, None), CompletionOutput(0, "ab ", [7, 8], None, None)]
    last = CompletionOutput(0, "c", [9], "stop", "END")
    got, expected = join_outputs([*pieces, last]), CompletionOutput(0, "ab c", [5, 7, 8, 9], "stop", "END")
    assert got == expected, f"expected {expected}, got {got}. {LOOK}"


def test_join_outputs_keeps_logprobs_and_cached_tokens() -> None:
    """Cached tokens are counted in the first piece, when the prompt was computed."""
    first, second = {5: Logprob(-1.0, 1)}, {7: Logprob(-2.0, 3)}
    pieces = [
        CompletionOutput(0, "a", [5], None, None, [first], num_cached_tokens=16),
        CompletionOutput(0, "b", [7], "length", None, [second]),
    ]
    expected = CompletionOutput(0, "ab", [5, 7], "length", None, [first, second], num_cached_tokens=16)
    got = join_outputs(pieces)
    assert got == expected, f"expected {expected}, got {got}. {LOOK}"
