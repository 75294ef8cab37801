"""The engine for programs without a server."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.errors import FieldError
from common.outputs import CompletionOutput, RequestOutput, join_outputs
from common.sampling_params import SamplingParams

from .api.output_processor import OutputProcessor
from .config import EngineConfig
from .core.engine import LLMEngine
from .core.validation import check_request


class LLM:
    """Prompts in, answers out, in order."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises FieldError if there are to be several engine cores, which only the server has."""
        if config.data_parallel_size > 1:
            raise FieldError("data_parallel_size", f"expected 1 without a server, got {config.data_parallel_size}")
        self.engine = LLMEngine(config)
        self.max_model_len = self.engine.limits.max_model_len
        self.tokenizer = load_tokenizer(resolve_checkpoint(config.model))
        self.processor = OutputProcessor(self.tokenizer)
        self._request_ids = map(str, itertools.count())

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """Answer all prompts, with one SamplingParams for all of them or one for each.

        Raises FieldError for a request that can never be served, before any is queued, and whatever a step raises.
        """
        all_params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(all_params) != len(prompts):
            raise FieldError("params", f"expected one, or {len(prompts)} (one for each prompt), got {len(all_params)}")
        for prompt, each in zip(prompts, all_params, strict=True):
            check_request(prompt, each, self.engine.limits)
        pieces: dict[str, list[CompletionOutput]] = {next(self._request_ids): [] for _ in prompts}
        try:
            for request_id, prompt, each in zip(pieces, prompts, all_params, strict=True):
                self.processor.add_request(request_id, list(prompt), each)
                self.engine.add_request(request_id, list(prompt), each)
            while self.engine.has_unfinished_requests:
                answers, stopped = self.processor.process(self.engine.step())
                self.engine.abort_requests(stopped)
                for request_id, answer in answers:
                    pieces[request_id].append(answer)
        except Exception as error:
            self.engine.fail(error)
            raise
        finally:  # after Ctrl-C as well: no request may be left in the engine
            self.engine.abort_requests(pieces)
            self.processor.remove(pieces)
        return [
            RequestOutput(request_id, list(prompt), [join_outputs(outputs)], finished=True)
            for (request_id, outputs), prompt in zip(pieces.items(), prompts, strict=True)
        ]
