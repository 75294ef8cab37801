"""Two real engines in this process: one computes prompts, the other one fetches their KV and answers."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

from common.sampling_params import SamplingParams
from tests.contract.engines import Answer, SmallEngine, SmallModels

PART = "part13_disaggregation"
SECRET = "a secret of tests"
MAX_ROUNDS = 2_000  # of steps that wait 5 ms, if there is nothing else to do
LOOK = 'Look at worker/kv_sender.py, worker/kv_receiver.py and core/kv_transfer.py; README "From engine to engine".'


class Pair:
    """prefill, decode: the engines. flags, prefill_flags, decode_flags: of both, and of one. part: theirs."""

    def __init__(
        self, models: SmallModels, prefill_flags: dict[str, Any] | None = None,
        decode_flags: dict[str, Any] | None = None, part: str = PART, **flags: Any,
    ) -> None:  # fmt: skip
        self.models = models
        self.flags = {"kv_connector": "tcp", "kv_transfer_secret": SECRET, **flags}
        self.prefill_flags, self.decode_flags = prefill_flags or {}, decode_flags or {}
        self.prefill = SmallEngine(part, models, **{**self.flags, **self.prefill_flags})
        self.decode = SmallEngine(part, models, **{**self.flags, **self.decode_flags})
        self._kv_params = importlib.import_module(f"{part}.messages").KVTransferParams
        self._ids = itertools.count()

    def params(self, **fields: Any) -> SamplingParams:
        return SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields})

    def offer(self, prompt: list[int], name: str, transfer_id: str, **fields: Any) -> None:
        """What the proxy asks of the engine that computes the prompt."""
        self.prefill.answers[name] = Answer()
        params = self.params(**{**fields, "max_tokens": 1})
        self.prefill.core.add_request(name, prompt, params, self._kv_params(transfer_id))

    def fetch(self, prompt: list[int], name: str, transfer_id: str, **fields: Any) -> None:
        """What it asks of the one that answers."""
        self.decode.answers[name] = Answer()
        sources = tuple(self.prefill.core.executor.kv_sources)
        self.decode.core.add_request(name, prompt, self.params(**fields), self._kv_params(transfer_id, sources))

    def ask(self, prompt: list[int], **fields: Any) -> str:
        """Both. Returns the request's id."""
        name = str(next(self._ids))
        self.offer(prompt, name, name, **fields)
        self.fetch(prompt, name, name, **fields)
        return name

    def step(self) -> None:
        for engine in (self.prefill, self.decode):
            if engine.core.has_unfinished_requests:
                engine.step()

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Step both until nothing is left, or until then."""
        for _ in range(MAX_ROUNDS):
            if until is not None and until():
                return
            if not any(engine.core.has_unfinished_requests for engine in (self.prefill, self.decode)):
                assert until is None, f"nothing is left, and it has not come to that. {LOOK}"
                return
            self.step()
        pending = [engine.core.orders.pending for engine in (self.prefill, self.decode)]
        raise AssertionError(f"{MAX_ROUNDS} rounds, and {pending} are pending. {LOOK}")

    def answer(self, prompt: list[int], **fields: Any) -> list[int]:
        name = self.ask(prompt, **fields)
        self.run()
        return self.decode.answers[name].token_ids

    @property
    def stats(self) -> Any:
        """The part's KVTransferStats, of the engine that fetches."""
        return self.decode.core.transfers.stats

    def check_empty(self) -> None:
        for engine in (self.prefill, self.decode):
            engine.check_empty(LOOK)
            left = [engine.core.orders.pending, engine.core.transfers.offered, engine.core.transfers.watched]
            assert not any(left), f"transfers are left: {left}. {LOOK}"

    def workers(self, engine: SmallEngine) -> list[Any]:
        """Of all its ranks."""
        executor = engine.core.executor
        return getattr(executor, "workers", None) or [executor.worker]

    def end(self, engine: SmallEngine) -> None:
        for worker in self.workers(engine):
            worker.close()

    def close(self) -> None:
        self.end(self.prefill)
        self.end(self.decode)
