"""worker/worker.py and worker/model_runner.py: a step's plain data in, sampled tokens out; and the size of the pool."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from common.checkpoint import resolve_checkpoint
from common.errors import FieldError
from common.sampling_params import MAX_LOGPROBS, SamplingParams
from common.testing import FAMILIES, assert_same_greedy, reference_greedy
from part03_paged_attention.config import EngineConfig, resolve_config
from part03_paged_attention.messages import NULL_BLOCK, NewRequest, ScheduledRequest, StepInput, StepOutput
from part03_paged_attention.worker.kv_cache import CPU_KV_CACHE_BYTES, kv_bytes_per_block
from part03_paged_attention.worker.sampler import SamplingState
from part03_paged_attention.worker.worker import Worker

LOOK_BLOCKS = 'Look at worker/worker.py::Worker.num_blocks_available; README "Blocks".'
LOOK_PROFILE = 'Look at worker/model_runner.py::ModelRunner.profile; README "Blocks".'
LOOK_RUN = 'Look at worker/model_runner.py::ModelRunner.execute; README "Static batches".'
BLOCK_SIZE = 4


@pytest.fixture
def make(small_directory: Callable[[str], Any]) -> Callable[..., Worker]:
    """A worker over a small random model, without a cache yet; flags are EngineConfig's."""

    def make(family: str = "llama", **flags: Any) -> Worker:
        config = EngineConfig(**{"model": str(small_directory(family)[0]), "device": "cpu", **flags})
        return Worker(resolve_config(config, resolve_checkpoint(config.model)))

    return make


@pytest.fixture
def make_ready(make: Callable[..., Worker]) -> Callable[..., Worker]:
    """One with a pool of 60 blocks of 4 tokens."""

    def make_ready(family: str = "llama", **flags: Any) -> Worker:
        worker = make(family, **{"block_size": BLOCK_SIZE, "max_num_seqs": 4, **flags})
        worker.allocate_cache(60)
        return worker

    return make_ready


# The size of the pool


def check_blocks(worker: Worker, expected: int, what: str) -> None:
    got = worker.num_blocks_available()
    assert got == expected, f"{what}: expected {expected} blocks, got {got}. {LOOK_BLOCKS}"


def test_the_pool_is_as_configured(make: Callable[..., Worker]) -> None:
    check_blocks(make(num_kv_blocks=123), 123, "--num-kv-blocks 123")
    check_blocks(make(num_kv_blocks=7, kv_cache_memory=10**9), 7, "--num-kv-blocks 7 and --kv-cache-memory")
    worker = make(kv_cache_memory=1_000_000, block_size=8)
    expected = 1_000_000 // kv_bytes_per_block(worker.model, 8)
    check_blocks(worker, expected, "--kv-cache-memory 1000000 --block-size 8")


def test_the_default_pool_on_a_cpu(make: Callable[..., Worker]) -> None:
    worker = make()
    check_blocks(worker, CPU_KV_CACHE_BYTES // kv_bytes_per_block(worker.model, 16), "no flags, on a CPU")


def test_a_pool_that_is_too_small_is_refused(make: Callable[..., Worker]) -> None:
    worker = make(kv_cache_memory=1_000)
    with pytest.raises(FieldError, match="expected at least 2") as caught:
        worker.num_blocks_available()
    assert caught.value.field == "kv_cache_memory", f"got {caught.value.field}. {LOOK_BLOCKS}"


def test_a_pool_larger_than_the_memory_is_refused(make: Callable[..., Worker]) -> None:
    worker = make(kv_cache_memory=10**15)
    with pytest.raises(FieldError, match="1,000,000,000,000,000 bytes, and cpu has") as caught:
        worker.num_blocks_available()
    assert caught.value.field == "kv_cache_memory", f"got {caught.value.field}. {LOOK_BLOCKS}"


class FakeCuda:
    """Of 1,000,000 bytes the weights take 100,000, the largest step 200,000 more, and another process 50,000."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1_000_000))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: self.calls.append("reset"))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", self.peak)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (620_000, 1_000_000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 330_000)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.calls.append("empty"))

    def peak(self, device: str) -> int:
        self.calls.append("peak")
        return 300_000


def test_the_pool_on_a_gpu_is_what_the_largest_step_leaves(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, cuda = make(gpu_memory_utilization=0.75), FakeCuda(monkeypatch)
    worker.device = "cuda:0"
    monkeypatch.setattr(worker.runner, "profile", lambda: cuda.calls.append("profile"))
    expected = (750_000 - 350_000) // kv_bytes_per_block(worker.model, 16)
    check_blocks(worker, expected, "75% of 1,000,000 bytes, 300,000 at the peak, 50,000 taken by others")
    assert cuda.calls == ["reset", "profile", "peak", "empty"], f"got {cuda.calls}. {LOOK_BLOCKS}"
    worker.config = resolve_config(
        EngineConfig(model=worker.config.model, device="cpu", gpu_memory_utilization=0.35), worker.checkpoint
    )
    with pytest.raises(FieldError, match=r"0\.35 leaves no room") as caught:
        worker.num_blocks_available()
    assert caught.value.field == "gpu_memory_utilization", f"got {caught.value.field}. {LOOK_BLOCKS}"


def test_the_cache_has_the_size_that_was_agreed_on(make: Callable[..., Worker]) -> None:
    worker = make(num_kv_blocks=50)
    worker.allocate_cache(20)  # another rank has fewer
    assert worker.runner.attention is not None
    assert worker.runner.attention.kv_cache.num_blocks == 20, f"expected 20 blocks. {LOOK_BLOCKS}"


def test_a_step_without_a_cache_is_a_bug(make: Callable[..., Worker]) -> None:
    step = StepInput([NewRequest(0, [5, 6], 2, SamplingParams())], [ScheduledRequest(0, 0, 2, [1])])
    with pytest.raises(AssertionError, match="set_cache"):
        make().execute(step)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_tokens", "num_seqs"), [(64, 3), (1, 1), (300, 7)])
def test_the_profiling_step_is_the_largest_one(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, family: str, num_tokens: int, num_seqs: int
) -> None:
    """It runs without a cache, on a CPU too: all tokens of the budget, and the sampler for all rows with all it can."""
    worker = make(family, max_num_batched_tokens=num_tokens, max_num_seqs=num_seqs)
    forwards, samples = list[int](), list[tuple[tuple[int, ...], list[SamplingState]]]()
    forward, sample = worker.model.forward, worker.runner.sampler.sample

    def watched_forward(input_ids: Tensor, *rest: Any) -> Tensor:
        forwards.append(len(input_ids))
        return forward(input_ids, *rest)

    def watched_sample(logits: Tensor, states: list[SamplingState], token_rows: Tensor) -> Any:
        samples.append((tuple(logits.shape), states))
        return sample(logits, states, token_rows)

    monkeypatch.setattr(worker.model, "forward", watched_forward)
    monkeypatch.setattr(worker.runner.sampler, "sample", watched_sample)
    worker.runner.profile()
    assert forwards == [num_tokens], f"expected a pass over {num_tokens} tokens, got {forwards}. {LOOK_PROFILE}"
    [(shape, states)] = samples
    assert shape == (num_seqs, 320), f"expected logits [{num_seqs}, 320], got {shape}. {LOOK_PROFILE}"
    for state in states:
        params = state.params
        missing = {
            "temperature": params.temperature == 0, "top-p": params.top_p == 1, "seed": params.seed is None,
            "penalties": params.presence_penalty == 0, "logprobs": params.logprobs != MAX_LOGPROBS,
        }  # fmt: skip
        assert not any(missing.values()), f"not switched on: {[n for n, m in missing.items() if m]}. {LOOK_PROFILE}"
    assert sorted(state.row for state in states) == list(range(num_seqs)), f"a row each, got {states}. {LOOK_PROFILE}"


def test_the_profiling_step_leaves_no_trace(make_ready: Callable[..., Worker]) -> None:
    worker, other = make_ready(), make_ready()
    worker.runner.profile()
    got, expected = (Driver(each, [[5, 6, 7]]).run(6) for each in (worker, other))
    assert got == expected, f"after profile(): expected {expected}, got {got}. {LOOK_PROFILE}"
    assert worker.runner.num_tokens_computed == 3 + 5, f"profiling counts as a step. {LOOK_PROFILE}"


# Steps


class Driver:
    """A core that only counts: rows, positions, and blocks from a shuffled pool, for one static batch.

    Every step goes through msgspec and back.
    """

    def __init__(
        self, worker: Worker, prompts: list[list[int]], params: SamplingParams | None = None, seed: int = 0
    ) -> None:
        self.worker, self.prompts = worker, prompts
        self.params = params or SamplingParams(temperature=0)
        rng = random.Random(seed)
        self.rows = rng.sample(range(4), len(prompts))
        self.pool = rng.sample(range(1, 60), 59)
        self.tables = [list[int]() for _ in prompts]
        self.outputs = [list[int]() for _ in prompts]

    def grow(self, number: int, num_tokens: int) -> list[int]:
        """The blocks that the request needs in addition to hold so many tokens."""
        num_new = -(-num_tokens // BLOCK_SIZE) - len(self.tables[number])
        new = [self.pool.pop() for _ in range(num_new)]
        self.tables[number] += new
        return new

    def step(self) -> None:
        is_prefill = not self.outputs[0]
        new = [
            NewRequest(row, prompt, len(prompt), self.params)
            for row, prompt in zip(self.rows, self.prompts, strict=True)
        ]
        shares = []
        for number, (row, prompt) in enumerate(zip(self.rows, self.prompts, strict=True)):
            end = len(prompt) + len(self.outputs[number])
            start = 0 if is_prefill else end - 1
            shares.append(ScheduledRequest(row, start, end - start, self.grow(number, end)))
        step = StepInput(new if is_prefill else [], shares)
        step = msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=StepInput)
        output = self.worker.execute(step)
        decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=StepOutput)
        assert decoded == output, f"StepOutput changed on its way: {output} → {decoded}. Look at messages.py."
        for token_ids, token_id in zip(self.outputs, output.token_ids, strict=True):
            token_ids.append(token_id)

    def run(self, num_steps: int, before: Callable[[int], object] = lambda number: None) -> list[list[int]]:
        for number in range(num_steps):
            before(number)
            self.step()
        return self.outputs

    def poison(self) -> None:
        """NaN in every slot that holds no token of these requests, and in the whole null block."""
        assert self.worker.runner.attention is not None
        cache = self.worker.runner.attention.kv_cache
        owned = torch.zeros(cache.num_blocks, BLOCK_SIZE, dtype=torch.bool)
        for number, table in enumerate(self.tables):
            num_stored = len(self.prompts[number]) + len(self.outputs[number]) - 1
            for position in range(num_stored if self.outputs[number] else 0):
                owned[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = True
        assert not owned[NULL_BLOCK].any()
        cache.data[:, ~owned] = torch.nan


PROMPTS = [[9, 8, 7, 6, 5], [1], [100, 200, 300, 1, 2, 3, 4, 5], [50] * 17]


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_over_plain_messages_equals_transformers(
    make_ready: Callable[..., Worker], small_directory: Callable[[str], Any], family: str, backend: str
) -> None:
    """Rows in any order, blocks from anywhere. The worker knows its tokens: core sends none back."""
    got = Driver(make_ready(family, attention_backend=backend), PROMPTS).run(12)
    reference = small_directory(family)[1]
    for number, prompt in enumerate(PROMPTS):
        where = f"{family}, {backend}, request {number}. {LOOK_RUN} Difference"
        assert_same_greedy(reference, prompt, got[number], reference_greedy(reference, prompt, 12), where)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("params", [dict(temperature=0, logprobs=3), dict(seed=4, repetition_penalty=1.3)], ids=str)
def test_nan_in_all_slots_that_no_request_owns_changes_nothing(
    make_ready: Callable[..., Worker], backend: str, params: dict[str, Any]
) -> None:
    """Before every step, in the null block too."""
    clean = Driver(make_ready(attention_backend=backend), PROMPTS, SamplingParams(**params)).run(12)
    poisoned = Driver(make_ready(attention_backend=backend), PROMPTS, SamplingParams(**params))
    got = poisoned.run(12, lambda number: poisoned.poison())
    assert got == clean, f"NaN in slots of no request: expected {clean}, got {got}. {LOOK_RUN}"


def test_rows_can_be_taken_over(make_ready: Callable[..., Worker]) -> None:
    """Longer and shorter requests follow each other in the same rows, and nothing says that the old ones left."""
    worker = make_ready()
    for seed, prompts in enumerate((PROMPTS, PROMPTS[:2], PROMPTS[::-1], [PROMPTS[1]], PROMPTS)):
        got = Driver(worker, prompts, seed=seed).run(5)
        expected = Driver(make_ready(), prompts, seed=7).run(5)
        assert got == expected, (
            f"batch {seed} on a worker that has been used: expected {expected}, got {got}. {LOOK_RUN}"
        )


def test_a_request_joins_again_with_its_output(make_ready: Callable[..., Worker]) -> None:
    """As after a preemption: its tokens so far come as token_ids, and a seeded answer goes on as if nothing were."""
    params = SamplingParams(seed=3, repetition_penalty=1.3, presence_penalty=0.5, logprobs=2)
    whole = Driver(make_ready(), [PROMPTS[0]], params).run(10)[0]
    worker = make_ready()
    first = Driver(worker, [PROMPTS[0]], params).run(4)[0]
    assert first == whole[:4], f"expected {whole[:4]}, got {first}. {LOOK_RUN}"
    tokens, got, table = PROMPTS[0] + first, list(first), [40, 41, 42, 43]
    shares = [ScheduledRequest(3, 0, len(tokens), table)]
    new = [NewRequest(3, tokens, len(PROMPTS[0]), params)]
    for _ in range(6):
        got += worker.execute(StepInput(new, shares)).token_ids
        new, shares = [], [ScheduledRequest(3, len(PROMPTS[0]) + len(got) - 1, 1, [])]
    assert got == whole, f"a request that joined again after 4 tokens: expected {whole}, got {got}. {LOOK_RUN}"
