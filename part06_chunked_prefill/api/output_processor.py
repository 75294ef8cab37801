"""From the engine's tokens to answers: text, and the stop strings that only text can show."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from common.outputs import CompletionOutput, FinishReason
from common.sampling_params import SamplingParams

from ..messages import EngineCoreOutput
from .detokenizer import IncrementalDetokenizer


class OutputProcessor:
    """Detokenises for all requests that have not ended. It knows of no steps and no blocks (as vLLM's)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._detokenizers: dict[str, IncrementalDetokenizer] = {}

    def add_request(self, request_id: str, params: SamplingParams) -> None:
        self._detokenizers[request_id] = IncrementalDetokenizer(self.tokenizer, params.stop, params.min_tokens)

    def remove(self, request_ids: Iterable[str]) -> None:
        """Forget requests. One that has ended is no error."""
        for request_id in request_ids:
            self._detokenizers.pop(request_id, None)

    def process(self, outputs: list[EngineCoreOutput]) -> tuple[list[tuple[str, CompletionOutput]], list[str]]:
        """Returns (request_id, its new tokens and text) for each that is still wanted, and the ids of requests that
        ended by a stop string, which the engine does not know of and has to be told."""
        answers, stopped = [], []
        for output in outputs:
            detokenizer = self._detokenizers.get(output.request_id)
            if detokenizer is None:
                continue  # it ended here before the engine knew
            answer = self._extend(detokenizer, output)
            answers.append((output.request_id, answer))
            if answer.finish_reason:
                del self._detokenizers[output.request_id]
                if not output.finish_reason:
                    stopped.append(output.request_id)
        return answers, stopped

    def _extend(self, detokenizer: IncrementalDetokenizer, output: EngineCoreOutput) -> CompletionOutput:
        [token_id] = output.token_ids
        reasons: tuple[FinishReason | None, int | str | None] = (output.finish_reason, output.stop_reason)
        if output.finish_reason != "stop":  # a stop token is not shown
            stop_string = detokenizer.add(token_id, is_last=output.finish_reason is not None)
            if stop_string is not None:
                reasons = ("stop", stop_string)
        text = detokenizer.take(finished=reasons[0] is not None)
        return CompletionOutput(0, text, output.token_ids, *reasons, output.logprobs)


def join_outputs(outputs: list[CompletionOutput]) -> CompletionOutput:
    """One answer out of the pieces of a stream."""
    logprobs = [entry for output in outputs for entry in output.logprobs or []]
    return CompletionOutput(
        index=0,
        text="".join(output.text for output in outputs),
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        finish_reason=outputs[-1].finish_reason,
        stop_reason=outputs[-1].stop_reason,
        logprobs=logprobs or None,
    )
