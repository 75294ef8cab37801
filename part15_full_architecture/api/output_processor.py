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
        """A stop string may end in the middle of a step's tokens; the tokens after it do not belong to the answer."""
        token_ids = output.token_ids
        reasons: tuple[FinishReason | None, int | str | None] = (output.finish_reason, output.stop_reason)
        for number, token_id in enumerate(output.token_ids, start=1):
            is_last = output.finish_reason is not None and number == len(output.token_ids)
            if is_last and output.finish_reason == "stop" and not detokenizer.include_stop_str:
                break  # a stop token is not shown
            if (stop_string := detokenizer.add(token_id, is_last)) is not None:
                token_ids, reasons = output.token_ids[:number], ("stop", stop_string)
                break
        text = detokenizer.take(finished=reasons[0] is not None)
        logprobs = None if output.logprobs is None else output.logprobs[: len(token_ids)]
        return CompletionOutput(
            0, text, token_ids, *reasons, logprobs, output.num_cached_tokens, output.prompt_logprobs
        )
