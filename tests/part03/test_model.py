"""worker/model.py: the decoder computes what transformers computes, for each family and each feature of a config."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from common.checkpoint import load_model, resolve_checkpoint
from common.errors import FieldError
from common.testing import FAMILIES
from part03_paged_attention.worker.linear import RMSNorm
from part03_paged_attention.worker.model import Attend, DecoderModel, RotaryEmbedding, inverse_frequencies
from part03_paged_attention.worker.weights import load_decoder

LENGTHS = [1, 2, 7, 33]
TOLERANCE = 1e-4
README = 'README "Half 1: a model of our own"'
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=128,
)  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", dict(tie_word_embeddings=True)),
    "llama, untied": ("llama", dict(tie_word_embeddings=False)),
    "llama, head_dim given": ("llama", dict(head_dim=12)),
    "llama, no head_dim": ("llama", dict(head_dim=None)),
    "llama, attention biases": ("llama", dict(attention_bias=True)),
    "llama, MLP biases": ("llama", dict(mlp_bias=True)),
    "llama, Llama-3 RoPE": ("llama", dict(rope_parameters=LLAMA3)),
    "llama, other RoPE base": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=100.0))),
    "llama, large eps": ("llama", dict(rms_norm_eps=0.1)),
    "llama, a KV head each": ("llama", dict(num_key_value_heads=6)),
    "llama, one KV head": ("llama", dict(num_key_value_heads=1)),
    "llama, one layer": ("llama", dict(num_hidden_layers=1)),
    "qwen2, tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2, untied": ("qwen2", dict(tie_word_embeddings=False)),
    "qwen2, head_dim given": ("qwen2", dict(head_dim=12)),
    "qwen2, sliding window off": ("qwen2", dict(sliding_window=4, use_sliding_window=False, max_window_layers=0)),
    "qwen3, tied": ("qwen3", dict(tie_word_embeddings=True)),
    "qwen3, untied": ("qwen3", dict(tie_word_embeddings=False)),
    "qwen3, attention biases": ("qwen3", dict(attention_bias=True)),
    "qwen3, Llama-3 RoPE": ("qwen3", dict(rope_parameters=LLAMA3)),
    "qwen3, large eps": ("qwen3", dict(rms_norm_eps=0.1)),
}


def prompts(vocab_size: int, seed: int, lengths: list[int] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def reference_logits(reference: Any, sequences: list[Tensor]) -> Tensor:
    """Every sequence alone, one row a token."""
    return torch.cat([reference(sequence[None]).logits[0].float() for sequence in sequences])


def our_logits(model: DecoderModel, sequences: list[Tensor], dense_attend: Callable[[list[int]], Attend]) -> Tensor:
    """All sequences in one flat batch, one row a token."""
    lengths = [len(sequence) for sequence in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return model.compute_logits(model(torch.cat(sequences), positions, dense_attend(lengths)))


def assert_close(got: Tensor, expected: Tensor, what: str, where: str, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape, f"{what}: expected shape {list(expected.shape)}, got {list(got.shape)}. {where}"
    difference = float((got - expected).abs().max())
    assert difference <= tolerance, (
        f"{what}: expected transformers' values within {tolerance:g}, off by up to {difference:.2e}. {where}"
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_equal_transformers(
    family: str, seed: int, random_model: Any, load_ours: Any, dense_attend: Any
) -> None:
    reference = random_model(family, seed)
    model = load_ours(reference)
    sequences = prompts(reference.config.vocab_size, seed)
    where = f"Look at worker/model.py::Attention.forward, then MLP.forward and DecoderLayer.forward; {README}."
    for sequence in sequences:
        what = f"{family}, seed {seed}: logits of a sequence of {len(sequence)}"
        expected = reference_logits(reference, [sequence])
        assert_close(our_logits(model, [sequence], dense_attend), expected, what, where)


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_every_feature_of_a_config_counts(name: str, random_model: Any, load_ours: Any, dense_attend: Any) -> None:
    family, changes = VARIANTS[name]
    for seed in (0, 1):
        reference = random_model(family, seed, **changes)
        sequences = prompts(reference.config.vocab_size, seed)
        got = our_logits(load_ours(reference), sequences, dense_attend)
        where = f"Look at what the constructors in worker/model.py read from the config; {README}."
        assert_close(got, reference_logits(reference, sequences), f"{name} {changes}, seed {seed}: logits", where)


@torch.inference_mode()
def test_one_flat_batch_gives_what_each_sequence_gives_alone(
    random_model: Any, load_ours: Any, dense_attend: Any
) -> None:
    model = load_ours(random_model("qwen3", seed=1))
    sequences = prompts(model.config.vocab_size, seed=5, lengths=[7, 1, 33, 2, 1, 7])
    together = our_logits(model, sequences, dense_attend).split([len(sequence) for sequence in sequences])
    for number, (sequence, got) in enumerate(zip(sequences, together, strict=True)):
        alone = our_logits(model, [sequence], dense_attend)
        difference = float((got - alone).abs().max())
        assert difference < TOLERANCE, (
            f"sequence {number} of {len(sequences)} ({len(sequence)} tokens): together and alone differ by "
            f"{difference:.2e}, expected less than {TOLERANCE:g}. Rows must meet nowhere but in attend(): look at "
            f"worker/model.py::DecoderModel.forward; {README}."
        )


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_token_by_token_with_a_cache(family: str, random_model: Any, load_ours: Any, cached_attend: Attend) -> None:
    reference = random_model(family, seed=2)
    model = load_ours(reference)
    (sequence,) = prompts(reference.config.vocab_size, seed=3, lengths=[20])
    rows = []
    for first, end in [(0, 6), (6, 11), *((i, i + 1) for i in range(11, 20))]:
        hidden = model(sequence[first:end], torch.arange(first, end), cached_attend)
        rows.append(model.compute_logits(hidden))
    where = f"A token's angle follows its position, not its row: look at worker/model.py::RotaryEmbedding.forward; {README}."  # noqa: E501
    assert_close(torch.cat(rows), reference_logits(reference, [sequence]), f"{family}: logits by pieces", where)


@torch.inference_mode()
def test_attend_gets_each_layer_once_and_in_order(random_model: Any, load_ours: Any) -> None:
    model = load_ours(random_model("qwen3", seed=0, num_hidden_layers=3))
    calls = []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append((layer, tuple(query.shape), tuple(key.shape), tuple(value.shape)))
        return query

    hidden = model(torch.arange(5), torch.arange(5), attend)
    expected = [(layer, (5, 6, 16), (5, 2, 16), (5, 2, 16)) for layer in range(3)]
    where = f"Look at worker/model.py::Attention.forward; {README}."
    assert calls == expected, f"(layer, query, key, value) shapes: expected {expected}, got {calls}. {where}"
    assert hidden.shape == (5, 48), f"hidden states: expected [5, 48], got {list(hidden.shape)}. {where}"
    shape = (model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim)
    assert shape == (3, 6, 2, 16), f"(layers, heads, KV heads, head_dim): expected (3, 6, 2, 16), got {shape}. {where}"


@torch.inference_mode()
def test_logits_of_the_rows_that_are_asked_for(random_model: Any, load_ours: Any, dense_attend: Any) -> None:
    model = load_ours(random_model("llama", seed=1))
    hidden = model(torch.arange(9), torch.arange(9), dense_attend([9]))
    every, some = model.compute_logits(hidden), model.compute_logits(hidden[[8, 2]])
    where = f"Look at worker/model.py::DecoderModel.compute_logits; {README}."
    assert some.shape == (2, 320), f"two rows asked for: expected logits [2, 320], got {list(some.shape)}. {where}"
    assert torch.allclose(some, every[[8, 2]], atol=1e-5), f"rows 8 and 2: expected the same logits as of all. {where}"


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_bfloat16(family: str, random_model: Any, load_ours: Any, dense_attend: Any) -> None:
    reference = random_model(family, seed=0)
    model = load_ours(reference, torch.bfloat16)
    sequences = prompts(reference.config.vocab_size, seed=0)
    got, expected = our_logits(model, sequences, dense_attend), reference_logits(reference, sequences)
    rounded = reference_logits(reference.to(torch.bfloat16), sequences)
    error, allowed = float((got - expected).std()), 1.5 * float((rounded - expected).std())
    where = f"RMSNorm and RoPE's table compute in float32: look at worker/linear.py and worker/model.py; {README}."
    assert got.dtype == torch.float32, f"logits are float32 for the sampler, got {got.dtype}. {where}"
    assert model.norm.weight.dtype == torch.bfloat16, f"expected bfloat16 weights, got {model.norm.weight.dtype}"
    assert error <= allowed, (
        f"{family} in bfloat16: logits are off by {error:.3f} (standard deviation), transformers' in bfloat16 only by "
        f"{allowed / 1.5:.3f}. {where}"
    )


@torch.inference_mode()
def test_the_shipped_model(dense_attend: Any) -> None:
    checkpoint = resolve_checkpoint("tiny")
    reference = load_model(checkpoint, torch.float32, "cpu")
    model = load_decoder(checkpoint, torch.float32, "cpu")
    sequences = prompts(reference.config.vocab_size, seed=0, lengths=[1, 2, 7, 33, 150])
    got = our_logits(model, sequences, dense_attend)
    assert_close(got, reference_logits(reference, sequences), "tiny: logits", f"Look at worker/model.py; {README}.")


@pytest.mark.parametrize("shape", [(3, 48), (4, 6, 16)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@torch.inference_mode()
def test_rms_norm_is_the_formula(shape: tuple[int, ...], eps: float) -> None:
    torch.manual_seed(0)
    norm, x = RMSNorm(shape[-1], eps), torch.randn(shape)
    norm.weight.copy_(torch.rand(shape[-1]))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        rounded, weight = x.to(dtype).float(), norm.weight.to(dtype).float()
        expected = weight * rounded / (rounded.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        got = norm.to(dtype)(x.to(dtype))
        assert got.dtype == dtype, (
            f"expected {dtype} out as in, got {got.dtype}. Look at worker/linear.py::RMSNorm; {README}."
        )
        difference = float((got.float() - expected).abs().max())
        assert difference < tolerance, (
            f"eps {eps}, {dtype}: x / sqrt(mean(x²) + eps) · weight is missed by {difference:.2e}, expected less than "
            f"{tolerance}. Look at worker/linear.py::RMSNorm; {README}."
        )


LLAMA_3_1 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
LLAMA_3_2 = {**LLAMA_3_1, "factor": 32.0}
ROPES: dict[str, dict[str, Any]] = {
    "plain": dict(rope_type="default", rope_theta=10_000.0),
    "Qwen3": dict(rope_type="default", rope_theta=1_000_000.0),
    "Llama 3.1": dict(rope_type="llama3", rope_theta=500_000.0, **LLAMA_3_1),
    "Llama 3.2": dict(rope_type="llama3", rope_theta=500_000.0, **LLAMA_3_2),
    "small": LLAMA3,
}


def rope_config(rope: dict[str, Any], head_dim: int = 128, max_position_embeddings: int = 40_000) -> LlamaConfig:
    return LlamaConfig(head_dim=head_dim, max_position_embeddings=max_position_embeddings, rope_parameters=dict(rope))


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_inverse_frequencies_are_transformers_own(name: str, head_dim: int) -> None:
    config = rope_config(ROPES[name], head_dim)
    expected, got = LlamaRotaryEmbedding(config).inv_freq, inverse_frequencies(config)
    assert got.dtype == torch.float32, f"expected float32, got {got.dtype}"
    assert torch.equal(got, expected), (
        f"{name}, head_dim {head_dim}: expected {expected.tolist()}, got {got.tolist()}. "
        f"Look at worker/model.py::inverse_frequencies; {README}."
    )


def test_llama3_scaling_has_all_three_ranges() -> None:
    """Otherwise the comparison above would say little."""
    scaled = inverse_frequencies(rope_config(ROPES["Llama 3.1"]))
    ratio = inverse_frequencies(rope_config(dict(rope_type="default", rope_theta=500_000.0))) / scaled
    kinds = ((ratio - 1).abs() < 1e-6, (ratio - 8).abs() < 1e-4)
    between = ~(kinds[0] | kinds[1])
    counts = [int(kind.sum()) for kind in (*kinds, between)]
    assert min(counts) > 3, f"pairs kept, slowed by 8 and in between: expected some of each, got {counts}"


@pytest.mark.parametrize("name", ROPES)
def test_cosines_and_sines_are_transformers_own(name: str) -> None:
    config = rope_config(ROPES[name])
    positions = torch.tensor([0, 1, 17, 4095, 39_999, 3])
    cos, sin = RotaryEmbedding(config)(positions)
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    assert cos.shape == sin.shape == (6, 1, 64), f"expected [6, 1, 64], got {list(cos.shape)} and {list(sin.shape)}"
    for what, got, both_halves in (("cosines", cos, expected[0]), ("sines", sin, expected[1])):
        where = f"Look at worker/model.py::RotaryEmbedding; {README}."
        assert_close(got[:, 0], both_halves[0, :, :64], f"{name}: {what}", where, tolerance=1e-6)


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("name", ROPES)
def test_the_older_layout_of_rope_settings(name: str, key: str) -> None:
    settings = dict(ROPES[name])
    theta, rope_type = settings.pop("rope_theta"), settings.pop("rope_type")
    scaling = None if rope_type == "default" else {key: rope_type, **settings}
    old = SimpleNamespace(rope_theta=theta, rope_scaling=scaling, head_dim=64)
    expected = inverse_frequencies(rope_config(ROPES[name], head_dim=64))
    assert torch.equal(inverse_frequencies(old), expected), (
        f"{name}: rope_scaling={scaling}, rope_theta={theta} must equal rope_parameters={ROPES[name]}. "
        f"Look at worker/model.py::inverse_frequencies; {README}."
    )


def refused(config: Any, *words: str) -> None:
    with pytest.raises(FieldError) as caught, torch.device("meta"):
        DecoderModel(config)
    assert caught.value.field == "model", f"expected the error to name 'model', got {caught.value.field!r}"
    for word in words:
        assert word in str(caught.value), f"expected {word!r} in {str(caught.value)!r}"


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_another_rope_type_is_refused(rope_type: str) -> None:
    rope = dict(rope_type=rope_type, rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=1024)
    refused(rope_config(rope), rope_type, "'default'", "'llama3'")


def test_a_partial_rotation_is_refused() -> None:
    refused(rope_config({**ROPES["plain"], "partial_rotary_factor": 0.5}), "partial_rotary_factor", "0.5")


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2", "qwen3_moe"])
def test_another_architecture_is_refused(family: str) -> None:
    refused(AutoConfig.for_model(family), family, *FAMILIES)


def test_what_the_model_does_not_compute_is_refused() -> None:
    refused(AutoConfig.for_model("llama", hidden_act="gelu"), "gelu", "silu")
    window = dict(use_sliding_window=True, sliding_window=64, max_window_layers=1, num_hidden_layers=2)
    refused(AutoConfig.for_model("qwen2", **window), "sliding")


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_parameters_as_transformers(family: str, random_model: Any) -> None:
    reference = random_model(family, seed=1)
    expected = sum(parameter.numel() for parameter in reference.parameters())
    with torch.device("meta"):
        got = sum(parameter.numel() for parameter in DecoderModel(reference.config).parameters())
        again = AutoModelForCausalLM.from_config(reference.config)
    assert sum(parameter.numel() for parameter in again.parameters()) == expected
    assert got == expected, (
        f"{family}: expected {expected:,} parameters as transformers has, got {got:,}: a bias or a norm too many or "
        f"too few? Look at worker/model.py::Attention.__init__; {README}."
    )
