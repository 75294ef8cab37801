"""A request and where it is in its life."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch

from common.outputs import FinishReason
from common.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    """vLLM's names."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED_STOPPED = enum.auto()
    FINISHED_LENGTH_CAPPED = enum.auto()
    FINISHED_ABORTED = enum.auto()

    @property
    def is_finished(self) -> bool:
        return self not in (RequestStatus.WAITING, RequestStatus.RUNNING)


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and the tokens generated for it so far. A seeded request draws from a generator of its own.

    max_num_tokens: prompt and answer together get no longer than this.
    num_computed_tokens: how many of its tokens, from the first on, have their keys and values in the cache once the
    steps in flight have run. num_output_placeholders: how many tokens these steps will bring.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_num_tokens: int
    generator: torch.Generator | None = None
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_token_ids + self.output_token_ids

    @property
    def num_tokens(self) -> int:
        """Tokens that are known."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_expected_tokens(self) -> int:
        """Tokens that there will be once the steps in flight have run."""
        return self.num_tokens + self.num_output_placeholders

    def finish(self, finish_reason: FinishReason, stop_reason: int | None) -> None:
        stopped = finish_reason == "stop"
        self.status = RequestStatus.FINISHED_STOPPED if stopped else RequestStatus.FINISHED_LENGTH_CAPPED
        self.finish_reason, self.stop_reason = finish_reason, stop_reason
