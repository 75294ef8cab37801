"""python -m part13_disaggregation.lab.scripted_engine: a server whose model takes the time that a script says.

Everything but the model is real: the processes, the scheduler, the KV pool and its transfers. A step sleeps, so that
eight such engines need little of the processor, as if each had a device of its own. The engine core is another process:
it imports this module again, under another name, and so is changed as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..worker.model_runner import Batch, ModelRunner
from ..worker.sampler import SamplerOutput

STEP_S, TOKEN_S = 0.030, 0.0003  # of a step, and of each token in it beyond one per request
ANSWER_TOKEN = 1_000


def run(runner: ModelRunner, batch: Batch, note_layer: Callable[[int], None] | None = None) -> SamplerOutput:
    """In the place of ModelRunner.run."""
    seconds = STEP_S + TOKEN_S * (len(batch.positions) - len(batch.requests))
    for layer in range(runner.model.num_layers):
        time.sleep(seconds / runner.model.num_layers)
        if note_layer is not None:
            note_layer(layer)
    for row, known in batch.new_rows:
        runner.tokens.fill(row, known)
    token_ids = torch.full((len(batch.logits_indices),), ANSWER_TOKEN)
    runner.tokens.write(batch.output_indices, token_ids)
    return SamplerOutput(token_ids, None)


ModelRunner.run = run  # type: ignore[method-assign,assignment]

if __name__ == "__main__":
    from ..__main__ import main

    main()
