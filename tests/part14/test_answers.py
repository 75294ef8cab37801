"""Greedy answers of quantized engines are those of their references: transformers with the numbers that the codes stand
for, and with a KV cache whose entries are rounded."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from common.checkpoint import resolve_checkpoint
from part14_quantization.core.cost_model import Rate
from tests.contract.engines import GROUP_SIZE, SmallEngine, SmallModels, prompts_of
from tests.lives import run_lives
from tests.part13.pairs import Pair

PART = "part14_quantization"
SEED = 14 * 7919**5
LOOK = 'Look at worker/quantization/ and worker/kv_cache.py; README "Quantized keys and values".'
INT4: dict[str, Any] = {"quantization": "int4", "quantization_group_size": GROUP_SIZE}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SmallModels:
    return SmallModels(tmp_path_factory.mktemp("small"))


def round_heads(numbers: Tensor, scale: Tensor, kind: str) -> Tensor:
    """numbers: [1, num_kv_heads, num_tokens, head_dim]; scale: [num_kv_heads]."""
    scale = scale.view(-1, 1, 1)
    if kind == "int8":
        return (numbers / scale).round().clamp(-127, 127) * scale
    return (numbers / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


class RoundedCache(DynamicCache):
    """transformers' KV cache, with entries that have been quantized and dequantized. scales: [num_layers, 2,
    num_kv_heads]."""

    def __init__(self, scales: Tensor, kind: str) -> None:
        super().__init__()
        self.scales, self.kind = scales, kind

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rounded = [
            round_heads(numbers, scale, self.kind)
            for numbers, scale in zip((key, value), self.scales[layer_idx], strict=True)
        ]
        return super().update(*rounded, layer_idx, *args, **kwargs)


class Reference:
    """Greedy answers of transformers with a rounded KV cache."""

    def __init__(self, models: SmallModels, scales: Tensor, kind: str) -> None:
        self.models, self.scales, self.kind = models, scales, kind
        self._answers: dict[tuple[int, ...], list[int]] = {}

    @torch.inference_mode()
    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        known = self._answers.get(tuple(prompt), [])
        if len(known) < num_tokens:
            model, ids = self.models.reference, torch.tensor([prompt])
            config = GenerationConfig(
                do_sample=False, max_new_tokens=num_tokens, eos_token_id=model.config.vocab_size, pad_token_id=0
            )
            cache = RoundedCache(self.scales, self.kind)
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, past_key_values=cache
            )
            known = self._answers[tuple(prompt)] = output[0, len(prompt) :].tolist()
        return known[:num_tokens]


def workers(engine: SmallEngine) -> list[Any]:
    executor = engine.core.executor
    return getattr(executor, "workers", None) or [executor.worker]


def scales_of(engine: SmallEngine) -> Tensor:
    """Of the whole model: layers of all stages, heads of all ranks."""
    stages: dict[int, list[Tensor]] = {}
    for worker in workers(engine):
        stages.setdefault(worker.groups.stage.index, []).append(worker.kv_format.scales)
    return torch.cat([torch.cat(heads, dim=2) for _, heads in sorted(stages.items())])


class QuantizedLife(RuleBasedStateMachine):
    """Adds and aborts requests and restarts the engine, with quantized weights, keys and values."""

    models: SmallModels
    counts: Counter[str]
    references: dict[tuple[str, str], Reference]
    root: Path
    prompts = [*prompts_of(5, longest=28)]

    @initialize(
        quantization=st.sampled_from(["auto", "int4", "int8"]), kv=st.sampled_from(["auto", "int8", "int8", "fp8"]),
        tp_size=st.sampled_from([1, 1, 2]), num_stages=st.sampled_from([1, 1, 2]), is_async=st.booleans(),
        budget=st.sampled_from([8, 16, 64]), num_kv_blocks=st.sampled_from([13, 15, 60]),
        method=st.sampled_from(["none", "ngram", "draft", "target"]), has_disk=st.booleans(),
    )  # fmt: skip
    def start(
        self, quantization: str, kv: str, tp_size: int, num_stages: int, is_async: bool, budget: int,
        num_kv_blocks: int, method: str, has_disk: bool,
    ) -> None:  # fmt: skip
        self.flags: dict[str, Any] = {
            "quantization": quantization, "quantization_group_size": GROUP_SIZE, "kv_cache_dtype": kv,
            "tensor_parallel_size": tp_size, "pipeline_parallel_size": num_stages, "async_scheduling": is_async,
            "max_num_batched_tokens": budget, "max_num_seqs": 4, "num_kv_blocks": num_kv_blocks,
            "speculative_method": method, "prompt_lookup_min": 1, "kv_offload_gib": 2e-3,
        }  # fmt: skip
        if quantization == "auto":
            del self.flags["quantization"]
        own = self.models.of(self.flags)
        if method in ("draft", "target"):
            self.flags |= {"speculative_method": "draft_model", "speculative_model": getattr(own, method)}
            self.flags |= {"speculative_quantization": quantization} if method == "target" else {}
        if has_disk:
            self.flags["kv_offload_dir"] = tempfile.mkdtemp(dir=self.root)
        self.asked: dict[str, tuple[list[int], int]] = {}
        self.aborted = set[str]()
        self.begin()
        if kv == "auto":
            self.greedy = own.greedy
        else:
            scales, key = scales_of(self.engine), (quantization, kv)
            reference = self.references.setdefault(key, Reference(own, scales, kv))
            assert torch.equal(scales, reference.scales), (
                f"{self.flags}: the scales are {scales.tolist()}, expected {reference.scales.tolist()}: they must not "
                "depend on the number of ranks. Look at worker/quantization/kv_codes.py::measure_scales."
            )
            self.greedy = reference.greedy

    def begin(self) -> None:
        self.engine = SmallEngine(PART, self.models, **self.flags)

    @rule(number=st.integers(0, 4), max_tokens=st.integers(1, 14))
    def ask(self, number: int, max_tokens: int) -> None:
        name, prompt = str(len(self.asked)), self.prompts[number]
        self.asked[name] = (prompt, max_tokens)
        self.engine.add(name, prompt, max_tokens=max_tokens)
        self.engine.core.offloader.cost.compute = Rate()  # nothing is measured: load whatever there is

    @rule(number=st.integers(0, 4), max_tokens=st.integers(1, 14))
    def ask_again(self, number: int, max_tokens: int) -> None:
        self.ask(number, max_tokens)

    @precondition(lambda self: self.engine.answers)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.engine.answers, key=int)), "request")
        if not self.engine.answers[name].ends:
            self.aborted.add(name)
        self.engine.core.abort_requests([name])

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
            self.engine.core.offloader.cost.compute = Rate()

    @rule()
    def restart(self) -> None:
        self.check()
        self.begin()
        self.counts["restarts"] += 1

    def check(self) -> None:
        core, answers = self.engine.core, self.engine.finish()
        for name in answers:
            prompt, max_tokens = self.asked[name]
            expected, got = self.greedy(prompt, max_tokens), answers[name].token_ids
            if name in self.aborted:
                expected = expected[: len(got)]
            assert got == expected, f"{self.flags}, request {name}: expected {expected}, got {got}. {LOOK}"
        self.engine.check_empty(LOOK)
        kind = self.flags["kv_cache_dtype"]
        self.counts[f"answers with KV in {kind}"] += len(answers)
        self.counts["prefix hits"] += core.scheduler.num_hit_tokens
        self.counts["tokens from host"] += core.offloader.stats.num_host_tokens
        self.counts["tokens from disk"] += core.offloader.stats.num_tier_tokens
        self.counts["preemptions"] += core.scheduler.num_preemptions
        self.counts["accepted draft tokens"] += core.speculation.stats.num_accepted_tokens
        for worker in workers(self.engine):
            worker.close()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.check()


def test_random_lives(models: SmallModels, tmp_path: Path) -> None:
    """Weights × keys and values × ranks × stages × chunks × prefix hits × preemption × drafts × offloading × aborts."""
    QuantizedLife.models, QuantizedLife.counts, QuantizedLife.root = models, Counter[str](), tmp_path
    QuantizedLife.references = {}
    run_lives(QuantizedLife, max_examples=40, stateful_step_count=30, seed=SEED)
    wanted = {
        "answers with KV in int8": 60, "answers with KV in fp8": 25, "prefix hits": 150, "tokens from host": 50,
        "tokens from disk": 30, "preemptions": 5, "restarts": 10, "accepted draft tokens": 40,
    }  # fmt: skip
    got = {name: QuantizedLife.counts[name] for name in wanted}
    assert all(got[name] >= count for name, count in wanted.items()), f"too few to prove anything: {got}"


def test_a_quantized_draft_model_for_a_target_that_is_not(models: SmallModels) -> None:
    """The answer is the target's, and the draft model, which is the target in int8, is nearly always right."""
    flags = {
        "speculative_method": "draft_model",
        "speculative_model": models.target,
        "speculative_quantization": "int8",
    }
    engine, prompt = SmallEngine(PART, models, **flags), list(range(30, 50))
    assert engine.generate(prompt, max_tokens=20) == models.greedy(prompt, 20), LOOK
    worker, stats = engine.worker, engine.core.speculation.stats
    sizes = [sum(each.nbytes for each in model.layers.parameters()) for model in (worker.drafter.model, worker.model)]
    assert sizes[0] < sizes[1] / 3, f"layers of {sizes[0]} bytes: expected a quarter of {sizes[1]}. See worker.py."
    assert stats.num_accepted_tokens > stats.num_draft_tokens / 2, f"few were accepted: {stats}. {LOOK}"


KV_KINDS = ("auto", "int8", "fp8")


@pytest.mark.parametrize("prefill_kv", KV_KINDS)
@pytest.mark.parametrize("decode_kv", KV_KINDS)
def test_a_transfer_between_kinds_of_caches(models: SmallModels, prefill_kv: str, decode_kv: str) -> None:
    """Codes travel as they are if both engines have the same; else they are converted. Numbers that are quantized by
    the decode engine are those that it would have computed itself."""
    prompt = [*prompts_of(3, longest=40)][2][:24] + list(range(30, 60))
    pair = Pair(
        models, {"kv_cache_dtype": prefill_kv, "tensor_parallel_size": 2}, {"kv_cache_dtype": decode_kv}, part=PART
    )
    try:
        got, stats = pair.answer(prompt, max_tokens=8), pair.stats
        num_tokens, per_token = stats.num_fetched_tokens, stats.num_fetched_bytes / stats.num_fetched_tokens
        numbers = 2 * 2 * 2 * 8  # two layers, keys and values, two KV heads of 8 numbers
        size = 4 if prefill_kv == "auto" else 1
        assert (num_tokens, per_token) == (len(prompt), numbers * size), (
            f"{prefill_kv} to {decode_kv}: fetched {num_tokens} tokens of {per_token} bytes, expected {len(prompt)} of "
            f"{numbers * size}. Look at worker/kv_shard.py."
        )
        if decode_kv in ("auto", prefill_kv) or prefill_kv == "auto":
            if prefill_kv == decode_kv == "auto":
                expected = models.greedy(prompt, 8)
            else:
                coded = pair.decode if decode_kv != "auto" else pair.prefill
                kind = decode_kv if decode_kv != "auto" else prefill_kv
                expected = Reference(models, scales_of(coded), kind).greedy(prompt, 8)
            if decode_kv != "auto" or prefill_kv == "auto":
                assert got == expected, f"{prefill_kv} to {decode_kv}: expected {expected}, got {got}. {LOOK}"
            else:  # the answer's own keys and values aren't rounded
                assert got[0] == expected[0], f"{prefill_kv} to {decode_kv}: expected {expected}, got {got}. {LOOK}"
    finally:
        pair.close()


def test_engines_with_other_weights_fetch_nothing(models: SmallModels) -> None:
    """The KV of int4 weights isn't that of float32 weights."""
    prompt, own = list(range(20, 60)), models.of(INT4)
    pair = Pair(own, {**INT4, "model": own.target}, {"model": own.target}, part=PART)
    try:
        assert pair.answer(prompt, max_tokens=4) == own.greedy(prompt, 4), LOOK
        assert pair.stats.num_fetched_tokens == 0, f"{pair.stats}: expected no transfer. See kv_shard.py::make_shard."
    finally:
        pair.close()


@pytest.mark.parametrize(
    "other", [{"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "fp8"}, {"quantization": "int8"}, {}], ids=str
)
def test_blocks_on_disk_are_for_engines_like_this_one(
    models: SmallModels, tmp_path: Path, other: dict[str, Any]
) -> None:
    own = models.of({"quantization": "int8"})  # so that all engines have the same checkpoint
    prompt, flags = list(range(20, 60)), {"model": own.target, "kv_offload_gib": 2e-3, "kv_offload_dir": str(tmp_path)}
    for settings, expected in (({}, 0), (other, 0 if other else 36), (other, 36)):
        engine = SmallEngine(PART, models, **{**flags, **settings})
        engine.core.offloader.cost.compute = Rate()
        engine.generate(prompt, max_tokens=3)
        found = engine.core.offloader.stats.num_tier_tokens
        for worker in workers(engine):
            worker.close()
        assert found == expected, (
            f"{settings}: loaded {found} tokens from disk, expected {expected}. See kv_tiers.py::namespace_of."
        )


def test_a_scale_that_text_exceeds() -> None:
    """Numbers that are larger than all in the calibration text become the largest code: see encode_kv()."""
    from part14_quantization.worker.quantization.kv_codes import decode_kv, encode_kv

    numbers, scale = torch.tensor([[[300.0, -300.0, 1.0]]]), torch.tensor([[1.0]])
    assert decode_kv(encode_kv(numbers, scale, torch.int8), torch.float32).tolist() == [[[127.0, -127.0, 1.0]]]
    assert decode_kv(encode_kv(2 * numbers, scale, torch.uint8), torch.float32).tolist() == [[[448.0, -448.0, 2.0]]]


def test_the_scales_of_tiny_are_the_largest_keys_and_values() -> None:
    """Measured with transformers on the same text."""
    from transformers import AutoModelForCausalLM

    from common.checkpoint import load_tokenizer
    from common.corpus import calibration_rows
    from part14_quantization.config import EngineConfig
    from part14_quantization.worker.worker import Worker

    checkpoint = resolve_checkpoint("tiny")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    [row] = calibration_rows(load_tokenizer(checkpoint), 1_024, 1)
    with torch.inference_mode():
        cache = model(torch.tensor([row]), use_cache=True).past_key_values
    worker = Worker(EngineConfig(model="tiny", kv_cache_dtype="int8", num_kv_blocks=10, max_model_len=64, device="cpu"))
    for layer, (scales, entries) in enumerate(zip(worker.kv_format.scales, cache.layers, strict=True)):
        for scale, numbers in zip(scales, (entries.keys, entries.values), strict=True):
            largest = numbers[0].abs().amax(dim=(1, 2)) / 127
            ratio = scale / largest
            assert ((ratio >= 0.9999) & (ratio <= 1.126)).all(), (
                f"layer {layer}: scales {scale.tolist()}, expected {largest.tolist()}, rounded up to eighths of a "
                "power of two. See kv_codes.py::measure_scales and round_up."
            )
