"""Turn the engine's tokens into answers: text, which also shows where a stop string ends the answer."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from common.outputs import CompletionOutput, FinishReason
from common.sampling_params import SamplingParams

from ..messages import EngineCoreOutput
from .detokenizer import IncrementalDetokenizer


class OutputProcessor:
    """Detokenizes all unfinished requests. It knows nothing about steps and blocks (like vLLM's OutputProcessor)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._detokenizers: dict[str, IncrementalDetokenizer] = {}

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self._detokenizers[request_id] = IncrementalDetokenizer(self.tokenizer, params, prompt_token_ids)

    def remove(self, request_ids: Iterable[str]) -> None:
        """Forget requests. Unknown ids are ignored."""
        for request_id in request_ids:
            self._detokenizers.pop(request_id, None)

    def process(self, outputs: Iterable[EngineCoreOutput]) -> tuple[list[tuple[str, CompletionOutput]], list[str]]:
        """Returns (request_id, its new token and text) for each request that has not ended here, and the ids of
        requests that now end with a stop string. The engine does not know about these: the caller must abort them."""
        answers, stopped = [], []
        for output in outputs:
            detokenizer = self._detokenizers.get(output.request_id)
            if detokenizer is None:
                continue  # it ended here, and the engine did not know yet
            answer = self._extend(detokenizer, output)
            answers.append((output.request_id, answer))
            if answer.finish_reason:
                del self._detokenizers[output.request_id]
                if not output.finish_reason:
                    stopped.append(output.request_id)
        return answers, stopped

    def _extend(self, detokenizer: IncrementalDetokenizer, output: EngineCoreOutput) -> CompletionOutput:
        reasons: tuple[FinishReason | None, int | str | None] = (output.finish_reason, output.stop_reason)
        if output.finish_reason != "stop" or detokenizer.include_stop_str:  # otherwise a stop token, which is not shown
            stop_string = detokenizer.add(output.token_ids[0], is_last=output.finish_reason is not None)
            reasons = reasons if stop_string is None else ("stop", stop_string)
        text = detokenizer.take(finished=reasons[0] is not None)
        return CompletionOutput(
            0, text, output.token_ids, *reasons, output.logprobs, prompt_logprobs=output.prompt_logprobs
        )
