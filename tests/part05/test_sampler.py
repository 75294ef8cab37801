"""worker/sampler.py: nothing is read back from the device, and the copies that are. What it computes: see part 3."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from common.sampling_params import SamplingParams
from part05_async_scheduling.worker import noise, sampler
from part05_async_scheduling.worker.sampler import LogprobsTensors, Sampler, SamplerOutput, SamplingState
from part05_async_scheduling.worker.stream import to_cpu
from tests.part05.no_reads import reads_of

LOOK_READS = 'Look at worker/sampler.py::Sampler.sample and what it calls; README "One step ahead".'
LOOK_COPY = "Look at worker/stream.py::to_cpu."
VOCAB_SIZE, MAX_LEN = 50, 12
KINDS: dict[str, dict[str, Any]] = {
    "greedy": dict(temperature=0),
    "drawn": dict(),
    "seeded": dict(seed=3),
    "top-k and top-p": dict(temperature=2.0, top_k=3, top_p=0.9, seed=8),
    "repetition": dict(seed=4, repetition_penalty=1.3),
    "presence, frequency and bias": dict(
        temperature=0, presence_penalty=1.0, frequency_penalty=1.0, logit_bias={5: 1.0}
    ),
    "min_tokens": dict(temperature=0, min_tokens=3, stop_token_ids=[9]),
    "logprobs": dict(logprobs=2),
}


def sample(fields: Sequence[dict[str, Any]]) -> list[str]:
    """Sample a batch of requests with these parameters. The calls that read values back."""
    tokens = torch.full((len(fields), MAX_LEN), 6)
    states = [SamplingState(SamplingParams(**each), row, 2, 4) for row, each in enumerate(fields)]
    logits = torch.randn(len(fields), VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    return reads_of(lambda: Sampler(frozenset({2, 3})).sample(logits, states, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_of_request_reads_nothing_back(kind: str) -> None:
    found = sample([KINDS[kind]] * 2)
    assert not found, f"{kind}: {found} read a tensor's values; on a GPU the launch then waits. {LOOK_READS}"


def test_a_mixed_batch_reads_nothing_back() -> None:
    """A read waits on a GPU for all steps that were launched before."""
    found = sample(list(KINDS.values()))
    assert not found, f"{found} read a tensor's values; on a GPU the launch then waits. {LOOK_READS}"
    for module in (sampler, noise):  # what torch's modes cannot see
        source = inspect.getsource(module).replace(inspect.getsource(LogprobsTensors), "")
        for name in (".item(", ".tolist(", ".nonzero(", ".cpu("):
            assert name not in source, f"{module.__name__} has a {name}…) outside of LogprobsTensors.of. {LOOK_READS}"


def test_the_watch_for_reads_sees_them() -> None:
    """Otherwise the tests above would prove nothing."""
    tensor = torch.tensor([1.0, 2.0])
    for work in (
        lambda: tensor[0].item(),
        lambda: tensor.tolist(),
        lambda: bool(tensor.sum()),
        lambda: tensor.nonzero(),
        lambda: tensor[tensor > 1],
        lambda: int(tensor[0]),
        lambda: tensor.to("cpu"),
        lambda: torch.where(tensor > 1),
        lambda: tensor.__setitem__(tensor > 1, 0),
        lambda: tensor.unique(),
    ):
        assert reads_of(work), f"{inspect.getsource(work).strip()} reads a value, and is not noticed"


def test_to_cpu_copies_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """And waits for none of the copies: an event says when they are complete."""
    waits, to = list[bool](), Tensor.to

    def note(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        waits.append(not kwargs.get("non_blocking"))
        return to(tensor, *args, **kwargs)

    ids, values = torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.25]])
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", note)
        sampled = SamplerOutput(torch.tensor([1]), LogprobsTensors(ids, values, torch.tensor([3])))
        output = to_cpu(sampled)
    assert waits == [False] * 4, f"four copies, of which none waits: got {waits}. {LOOK_COPY}"
    assert output.token_ids.tolist() == [1] and output.logprobs is not None, f"got {output}. {LOOK_COPY}"
    got = (output.logprobs.token_ids, output.logprobs.logprobs, output.logprobs.ranks)
    assert [each.tolist() for each in got] == [[[1, 2]], [[0.5, 0.25]], [3]], f"got {got}. {LOOK_COPY}"
    assert to_cpu(SamplerOutput(torch.tensor([1]), None)).logprobs is None, LOOK_COPY
