"""worker/quantization/gptq.py, calibration.py, smoothing.py and method.py: how a layer is quantized."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.checkpoint import Checkpoint
from part14_quantization.worker.model import DecoderModel
from part14_quantization.worker.moe import Experts, MixtureOfExperts
from part14_quantization.worker.quantization import gptq as gptq_module
from part14_quantization.worker.quantization.calibration import (
    InputStats,
    TextRunner,
    causal_attention,
    matrices,
    recording,
)
from part14_quantization.worker.quantization.gptq import gptq, inverse_factor, output_error, spread_error
from part14_quantization.worker.quantization.method import Method
from part14_quantization.worker.quantization.scheme import Quantized, Scheme, dequantize, encode, find_scales, quantize
from part14_quantization.worker.quantization.smoothing import (
    NUM_EXPONENTS,
    SHRINK_FACTORS,
    Pair,
    awq_factors,
    diagonal_blocks,
    find_pairs,
    quantize_clipped,
    smooth,
    smoothquant_factors,
)
from part14_quantization.worker.weight import Weight
from tests.part14.small_checkpoints import load, save_model

INT4 = Scheme(bits=4, group_size=8)
SCHEMES = {
    "int4": INT4,
    "int4, whole rows": Scheme(bits=4),
    "int4 with zero points": Scheme(bits=4, group_size=8, is_symmetric=False),
    "int8, groups of 16": Scheme(group_size=16),
    "int8 for int8 activations": Scheme(activations="int8"),
}
GPTQ, SPREAD, FACTOR, ERROR = (
    f"See worker/quantization/gptq.py::{name}." for name in ("gptq", "spread_error", "inverse_factor", "output_error")
)
STATS, RUNNER, RECORDING = (
    f"See worker/quantization/calibration.py::{name}." for name in ("InputStats.add", "TextRunner", "recording")
)
MOVE, PAIRS, AWQ, SMOOTHQUANT, CLIPPED = (
    f"See worker/quantization/smoothing.py::{name}."
    for name in ("Pair.move", "find_pairs", "awq_factors", "smoothquant_factors", "quantize_clipped")
)
MIXTURE = "See worker/quantization/smoothing.py::mixture_pairs."
METHOD = "See worker/quantization/method.py::Method.quantize_layer."


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(count: int, size: int, seed: int = 0) -> Tensor:
    """A few directions and some noise, with features of different sizes: as in real models."""
    sizes = 2.0 ** numbers(size, seed=seed + 2)
    return (
        numbers(count, 5, seed=seed) @ numbers(5, size, seed=seed + 1) + 0.3 * numbers(count, size, seed=seed)
    ) * sizes


def moment(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


# gptq.py


def test_output_error() -> None:
    inputs, matrix, rounded = correlated_inputs(50, 12), numbers(7, 12), numbers(7, 12, seed=5)
    wanted = ((inputs @ matrix.T - inputs @ rounded.T) ** 2).sum(dim=1).mean()
    got = output_error(matrix, rounded, moment(inputs))
    assert torch.allclose(got, wanted, rtol=1e-4), (
        f"the outputs' squared differences, summed over outputs, and their mean over inputs: expected {wanted}, got "
        f"{got}. {ERROR}"
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_outputs_change_less_than_with_round_to_nearest(name: str) -> None:
    scheme, ratios = SCHEMES[name], []
    for seed in range(20):
        matrix, seen = numbers(16, 48, seed=seed), moment(correlated_inputs(200, 48, seed=seed))
        codes, nearest = gptq(matrix, seen, scheme), quantize(matrix, scheme)
        errors = [float(output_error(matrix, dequantize(each, scheme), seen)) for each in (codes, nearest)]
        assert errors[0] < errors[1], (
            f"{name}, seed {seed}: GPTQ's outputs are off by {errors[0]:.4f}, round-to-nearest's by {errors[1]:.4f}: "
            f"expected less. {SPREAD}"
        )
        ratios.append(errors[0] / errors[1])
        assert torch.equal(codes.scale, nearest.scale), f"{name}: the scales are those of the given matrix. {GPTQ}"
        low, high = int(codes.codes.min()), int(codes.codes.max())
        assert scheme.min_code <= low <= high <= scheme.max_code, f"{name}: codes from {low} to {high}. {GPTQ}"
    mean = sum(ratios) / len(ratios)
    assert mean < 0.5, f"{name}: expected less than half of round-to-nearest's error, got {mean:.2f} of it. {SPREAD}"


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("diagonal", ["equal", "different"])
def test_independent_inputs_leave_nothing_to_make_up_for(name: str, diagonal: str) -> None:
    matrix = numbers(16, 48)
    seen = torch.eye(48) if diagonal == "equal" else torch.diag(numbers(48, seed=1).abs() + 0.1)
    codes, nearest = gptq(matrix, seen, SCHEMES[name]), quantize(matrix, SCHEMES[name])
    wrong = (codes.codes != nearest.codes).nonzero().tolist()
    assert not wrong, (
        f"{name}: {len(wrong)} codes aren't those of round-to-nearest, the first at row, column {wrong[0]}: errors "
        f"went to other columns, or codes to wrong places. {GPTQ}"
    )
    zeros = [None if each.zero is None else each.zero.tolist() for each in (codes, nearest)]
    assert zeros[0] == zeros[1], f"{name}: the zero points aren't those of round-to-nearest. {GPTQ}"


def without_damping() -> Any:
    return mock.patch.object(gptq_module, "DAMPING", 0.0)


def test_inverse_factor_by_hand() -> None:
    """The inverse of [[4, 2], [2, 2]] is [[½, -½], [-½, 1]]."""
    with without_damping():
        got = inverse_factor(torch.tensor([[4.0, 2.0], [2.0, 2.0]]))
    root = 0.5**0.5
    assert torch.allclose(got, torch.tensor([[root, -root], [0, root]])), f"got {got}. {FACTOR}"


@pytest.mark.parametrize("num_inputs", [2, 12, 200])
def test_inverse_factor(num_inputs: int) -> None:
    """With fewer inputs than features, the second moment has no inverse unless it is damped."""
    seen = moment(correlated_inputs(num_inputs, 24)).double()
    before = seen.clone()
    upper = inverse_factor(seen).double()
    assert torch.equal(seen, before), f"the second moment was changed. {FACTOR}"
    assert torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all(), f"not upper triangular. {FACTOR}"
    damped = seen + 0.01 * seen.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    product = upper.T @ upper @ damped
    assert torch.allclose(product, torch.eye(24, dtype=torch.float64), atol=1e-3), (
        f"{num_inputs} inputs: Uᵀ · U isn't the inverse of the second moment, damped by 1% of its mean diagonal: times "
        f"that, it differs from 1 by {(product - torch.eye(24)).abs().max():.4f}. {FACTOR}"
    )


def test_spread_error_by_hand() -> None:
    """Column 0 has become 2 instead of 2.4. The inverse's first row is ½, -½: column 1 moves as far, the other way."""
    with without_damping():
        upper = inverse_factor(torch.tensor([[4.0, 2.0], [2.0, 2.0]]))
    matrix = torch.tensor([[2.4, 1.2]])
    spread_error(matrix, 0, torch.tensor([2.0]), upper)
    assert torch.allclose(matrix[:, 1], torch.tensor([1.6])), f"expected 1.2 + 0.4, got {matrix[0, 1]}. {SPREAD}"


def test_the_last_column_has_nowhere_to_go() -> None:
    matrix = numbers(3, 4)
    before = matrix.clone()
    spread_error(matrix, 3, matrix[:, 3].round(), inverse_factor(moment(numbers(9, 4))))
    assert torch.equal(matrix[:, :3], before[:, :3]), f"columns before the last one changed. {SPREAD}"


@pytest.mark.parametrize("seed", range(5))
def test_spread_error_is_the_best_change(seed: int) -> None:
    """After any number of columns have become what they have become, the others are those that minimize the outputs'
    squared differences: the solution of a system of linear equations."""
    size = 10
    seen = moment(correlated_inputs(40, size, seed)).double()
    damped = seen + 0.01 * seen.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    original, upper = numbers(4, size, seed=seed), inverse_factor(seen)
    matrix, generator = original.clone(), torch.Generator().manual_seed(seed)
    for column in range(size - 1):
        rounded = matrix[:, column] + 0.3 * torch.randn(4, generator=generator)
        spread_error(matrix, column, rounded, upper)
        matrix[:, column] = rounded  # as gptq() has it elsewhere
        done, left = slice(0, column + 1), slice(column + 1, None)
        fixed = (matrix - original)[:, done].double()
        best = torch.linalg.solve(damped[left, left], -damped[left, done] @ fixed.T).T
        got = (matrix - original)[:, left].double()
        assert torch.allclose(got, best, rtol=1e-3, atol=1e-3 * float(best.abs().max())), (
            f"after column {column}, the columns after it should change by {best[0, :3].tolist()}, got "
            f"{got[0, :3].tolist()}. {SPREAD}"
        )


@pytest.mark.parametrize(
    ("row", "seen", "expected"),
    [
        # 2.4 becomes 2, so 1.2 becomes 1.6, and then 2; the last column is independent of both
        ([2.4, 1.2, 7.0], [[4.0, 2, 0], [2, 2, 0], [0, 0, 1]], [2, 2, 7]),
        # the same with the columns in another order: the one with the largest inputs comes first all the same
        ([1.2, 7.0, 2.4], [[2.0, 0, 2], [0, 1, 0], [2, 0, 4]], [2, 7, 2]),
        ([7.0, 2.4, 1.2], [[1.0, 0, 0], [0, 4, 2], [0, 2, 2]], [7, 2, 2]),
    ],
)
def test_gptq_by_hand(row: list[float], seen: list[list[float]], expected: list[int]) -> None:
    with without_damping():
        got = gptq(torch.tensor([row]), torch.tensor(seen), Scheme(bits=4))
    assert got.scale.item() == 1, f"7 is the largest number: expected scale 1, got {got.scale}. {GPTQ}"
    assert got.codes.tolist() == [expected], (
        f"row {row} with second moment {seen}: expected codes {expected}, got {got.codes.tolist()}. {GPTQ}"
    )


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_groups_of_different_sizes(is_symmetric: bool) -> None:
    """Columns are quantized in the order of their inputs, but each with the scale of its own group."""
    scheme = Scheme(bits=4, group_size=8, is_symmetric=is_symmetric)
    matrix = numbers(16, 48) * torch.logspace(-2, 2, 6).repeat_interleave(8)
    seen = moment(correlated_inputs(200, 48))
    codes = gptq(matrix, seen, scheme)
    scale, zero = find_scales(scheme.split(matrix), scheme)
    assert torch.equal(codes.scale, scale), f"the scales are those of the given matrix. {GPTQ}"
    assert zero is None or torch.equal(codes.zero, zero), f"the zero points are those of the given matrix. {GPTQ}"  # type: ignore[arg-type]
    difference = (dequantize(codes, scheme) - matrix).abs() / codes.scale.repeat_interleave(8, dim=1)
    assert difference.mean() < 8, f"numbers are {difference.mean():.1f} steps off in the mean: wrong groups? {GPTQ}"
    nearest = dequantize(quantize(matrix, scheme), scheme)
    errors = [float(output_error(matrix, each, seen)) for each in (dequantize(codes, scheme), nearest)]
    assert errors[0] < errors[1], f"outputs are off by {errors[0]:.4f}, with round-to-nearest {errors[1]:.4f}. {GPTQ}"


def test_codes_belong_to_the_scales_that_are_stored() -> None:
    matrix, seen = numbers(16, 48), moment(correlated_inputs(200, 48))
    coarse = gptq(matrix, seen, Scheme(), torch.bfloat16)
    scale, _ = find_scales(Scheme().split(matrix), Scheme())
    assert torch.equal(coarse.scale, scale.bfloat16().float()), f"the scales weren't rounded to bfloat16. {GPTQ}"
    independent = gptq(matrix, torch.eye(48), Scheme(), torch.bfloat16)
    wanted = encode(matrix, coarse.scale, None, Scheme())
    assert torch.equal(independent.codes, wanted.codes), f"the codes belong to other scales. {GPTQ}"


def test_inputs_that_are_always_0() -> None:
    """Such features have no influence, and there is nothing to divide by."""
    matrix, inputs = numbers(8, 32), correlated_inputs(100, 32)
    inputs[:, [3, 17]] = 0
    codes, nearest = gptq(matrix, moment(inputs), INT4), quantize(matrix, INT4)
    assert codes.scale.isfinite().all() and torch.equal(codes.codes[:, [3, 17]], nearest.codes[:, [3, 17]]), (
        f"columns 3 and 17 get no errors from others: expected codes {nearest.codes[0, [3, 17]].tolist()}, got "
        f"{codes.codes[0, [3, 17]].tolist()}. {FACTOR}"
    )
    silent = gptq(matrix, torch.zeros(32, 32), INT4)
    assert torch.equal(silent.codes, nearest.codes), f"no input is ever there: expected the nearest codes. {FACTOR}"


def test_the_matrix_stays_as_it_is() -> None:
    matrix, seen = numbers(8, 32), moment(correlated_inputs(100, 32))
    before = matrix.clone(), seen.clone()
    gptq(matrix, seen, INT4)
    assert torch.equal(matrix, before[0]) and torch.equal(seen, before[1]), f"gptq() changed its inputs. {GPTQ}"


# calibration.py


def test_statistics_by_hand() -> None:
    stats = InputStats.empty(2, torch.device("cpu"))
    stats.add(torch.tensor([[1.0, -4.0]]))
    stats.add(torch.tensor([[3.0, 0.0], [-2.0, 2.0]]))
    got = stats.num_inputs, stats.max_abs.tolist(), stats.mean_abs.tolist(), (3 * stats.second_moment).tolist()
    assert got[:2] == (3, [3.0, 4.0]), f"expected 3 inputs, the largest 3 and 4; got {got[:2]}. {STATS}"
    assert torch.allclose(torch.tensor(got[2]), torch.tensor([2.0, 2.0])), (
        f"means of |x|: 2 and 2, got {got[2]}. {STATS}"
    )
    assert torch.allclose(torch.tensor(got[3]), torch.tensor([[14.0, -8], [-8, 20]]), atol=1e-4), (
        f"the sum of x · xᵀ: expected [[14, -8], [-8, 20]], got {got[3]}. {STATS}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_in_pieces(dtype: torch.dtype) -> None:
    inputs = correlated_inputs(50, 12).to(dtype)
    whole, pieces = (InputStats.empty(12, torch.device("cpu")) for _ in range(2))
    whole.add(inputs)
    for piece in inputs.split([1, 20, 0, 3, 26]):
        pieces.add(piece)
    for name in ("second_moment", "mean_abs", "max_abs"):
        got, wanted = getattr(pieces, name), getattr(whole, name)
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5), f"{name} in pieces differs from in one go. {STATS}"
    assert torch.allclose(whole.second_moment, moment(inputs.float()), rtol=1e-4, atol=1e-5), f"x · xᵀ. {STATS}"
    assert pieces.num_inputs == whole.num_inputs == 50, f"got {pieces.num_inputs}. {STATS}"


ROWS = [list(range(5, 25)), list(range(300, 333)), [7, 7, 9]]
FAMILIES = ["llama", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "mixtral"]
HEADS = dict(num_attention_heads=6, num_key_value_heads=6)  # as many KV heads as heads
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    **{f"{family}, all heads": (family, HEADS) for family in FAMILIES},
    "llama with biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama with biases, all heads": ("llama", dict(attention_bias=True, mlp_bias=True, **HEADS)),
    "qwen3_moe, every other layer": ("qwen3_moe", dict(decoder_sparse_step=2)),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    found: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in found:
            family, changes = LAYERS[name]
            found[name] = save_model(tmp_path_factory.mktemp("model"), family, **changes)
        return found[name]

    return get


@pytest.fixture
def model_of(checkpoints: Callable[[str], Checkpoint]) -> Callable[[str], DecoderModel]:
    return lambda name: load(checkpoints(name))


@torch.inference_mode()
def first_layer(model: DecoderModel) -> tuple[Any, TextRunner, dict[str, list[InputStats]]]:
    layer = model.layers["0"]
    text = TextRunner(model, ROWS)
    return layer, text, text.measure(layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_runs_as_in_the_model(family: str, checkpoints: Callable[[str], Checkpoint]) -> None:
    model = load(checkpoints(family))
    reference = AutoModelForCausalLM.from_pretrained(checkpoints(family).directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        text = TextRunner(model, ROWS)
        for layer in model.layers.values():
            text.advance(layer)
        for hidden, row in zip(text.hidden, ROWS, strict=True):
            input_ids, positions = torch.tensor(row), torch.arange(len(row))
            own = model(input_ids, positions, causal_attention)
            assert torch.allclose(model.norm(hidden), own, atol=1e-5), f"{family}: not the model's own states. {RUNNER}"
            wanted = reference(input_ids[None]).logits[0]
            got = model.compute_logits(model.norm(hidden))
            assert torch.allclose(got, wanted, atol=1e-3), (
                f"{family}: logits after the last layer differ from transformers' by {(got - wanted).abs().max():.4f}. "
                f"{RUNNER}"
            )


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_what_goes_into_each_matrix(family: str, model_of: Callable[[str], DecoderModel]) -> None:
    layer, text, stats = first_layer(model_of(family))
    assert stats.keys() == matrices(layer).keys(), f"{family}: measured {list(stats)}. {RUNNER}"
    inputs = torch.cat([layer.input_layernorm(hidden) for hidden in text.hidden])
    check_stats(stats["self_attn.qkv_proj.weight"][0], inputs, f"{family}, qkv_proj")
    num_tokens = sum(map(len, ROWS))
    for path in stats:
        if "experts" not in path:
            count = stats[path][0].num_inputs
            assert len(stats[path]) == 1 and count == num_tokens, f"{family}, {path}: {count} inputs. {RUNNER}"
    if not isinstance(layer.mlp, MixtureOfExperts):
        return
    middle = [after_attention(layer, text, number) for number in range(len(ROWS))]
    tokens = layer.post_attention_layernorm(torch.cat(middle))
    _, expert_ids = layer.mlp.gate(tokens)
    experts = layer.mlp.experts
    for expert in range(layer.mlp.num_experts):
        own = tokens[(expert_ids == expert).any(dim=1)]
        check_stats(stats["mlp.experts.gate_up"][expert], own, f"{family}, expert {expert}, gate_up")
        gate, up = F.linear(own, experts.gate_up.data[expert]).chunk(2, dim=-1)
        check_stats(stats["mlp.experts.down"][expert], F.silu(gate) * up, f"{family}, expert {expert}, down")


def after_attention(layer: Any, text: TextRunner, row: int) -> Tensor:
    hidden = text.hidden[row]
    cos, sin = text.model.rotary_embedding(torch.arange(len(hidden)))
    return hidden + layer.self_attn(layer.input_layernorm(hidden), cos, sin, causal_attention)


def check_stats(stats: InputStats, inputs: Tensor, what: str) -> None:
    assert stats.num_inputs == len(inputs), f"{what}: {stats.num_inputs} inputs, expected {len(inputs)}. {RECORDING}"
    if len(inputs):
        for name, wanted in (
            ("second_moment", moment(inputs)),
            ("mean_abs", inputs.abs().mean(dim=0)),
            ("max_abs", inputs.abs().amax(dim=0)),
        ):
            got = getattr(stats, name)
            assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())), (
                f"{what}: {name} begins {got.flatten()[:3].tolist()}, expected {wanted.flatten()[:3].tolist()}. "
                f"{RECORDING}"
            )


@torch.inference_mode()
def test_measuring_leaves_no_trace(model_of: Callable[[str], DecoderModel]) -> None:
    model = model_of("qwen3_moe")
    text, layer = TextRunner(model, ROWS), model.layers["0"]
    before = [hidden.clone() for hidden in text.hidden]
    stats = text.measure(layer)
    assert all(map(torch.equal, before, text.hidden)), f"measure() changed the hidden states. {RUNNER}"
    counts = [each.num_inputs for entries in stats.values() for each in entries]
    text.advance(layer)
    assert counts == [each.num_inputs for entries in stats.values() for each in entries], (
        f"inputs were noted after the measuring. {RECORDING}"
    )
    for path, weight in matrices(layer).items():
        assert "grouped" not in vars(weight), f"{path}.grouped is still the recording one. {RECORDING}"
        assert not weight._forward_pre_hooks, f"{path} still has a hook. {RECORDING}"


def test_recording_ends_with_an_error() -> None:
    weight, stats = Weight(3, 4), [InputStats.empty(4, torch.device("cpu"))]
    with pytest.raises(ZeroDivisionError), recording(weight, stats):
        weight(torch.ones(2, 4))
        raise ZeroDivisionError
    weight(torch.ones(2, 4))
    assert stats[0].num_inputs == 2 and "grouped" not in vars(weight), f"{stats[0].num_inputs} inputs. {RECORDING}"


# smoothing.py


@torch.inference_mode()
def outputs(layer: Any, text: TextRunner) -> Tensor:
    return torch.cat(text._run(layer))


def random_factors(pair: Pair) -> Tensor:
    return 2.0 ** numbers(len(pair.inputs.mean_abs), seed=len(pair.users))


FACTORS: dict[str, Callable[[Pair], Tensor]] = {
    "random": random_factors,
    "awq": partial(awq_factors, scheme=INT4),
    "smoothquant": smoothquant_factors,
}


@pytest.mark.parametrize("find", FACTORS)
@pytest.mark.parametrize("name", LAYERS)
@torch.inference_mode()
def test_moving_factors_changes_no_output(name: str, find: str, model_of: Callable[[str], DecoderModel]) -> None:
    model = model_of(name)
    layer, text, stats = first_layer(model)
    before, matrix = outputs(layer, text), layer.self_attn.qkv_proj.weight.data.clone()
    smooth(layer, stats, FACTORS[find])
    after = outputs(layer, text)
    assert torch.allclose(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max())), (
        f"{name}, {find} factors: the layer's output changed by {(after - before).abs().max():.4f}, of numbers up to "
        f"{before.abs().max():.1f}: is a tensor that reads the features missing, or one that makes them? {PAIRS}"
    )
    assert not torch.allclose(layer.self_attn.qkv_proj.weight.data, matrix), f"{name}: nothing was moved. {MOVE}"


@pytest.mark.parametrize("name", LAYERS)
@torch.inference_mode()
def test_every_place_is_found(name: str, model_of: Callable[[str], DecoderModel]) -> None:
    """Each matrix reads features that get factors, but o_proj if several heads share a KV head."""
    layer, _, stats = first_layer(model_of(name))
    before = {path: weight.data.clone() for path, weight in matrices(layer).items()}
    biases = {path: bias.clone() for path, bias in layer.named_parameters() if path.endswith("bias")}
    smooth(layer, stats, lambda pair: torch.full_like(pair.inputs.mean_abs, 2.0))
    attention, unchanged = layer.self_attn, []
    for path, weight in matrices(layer).items():
        ratio = (weight.data / before[path]).nanmedian()  # rows that make features shrink again
        if path.endswith(("o_proj.weight", "down_proj.weight", "experts.down")) and ratio != 2:
            unchanged.append(path)
        if path == "self_attn.qkv_proj.weight":
            queries = weight.data[:8] / before[path][:8]
            assert torch.allclose(queries, torch.tensor(2.0)), f"{name}: qkv_proj reads the norm's features. {PAIRS}"
    wanted = [] if attention.num_heads == attention.num_kv_heads else ["self_attn.o_proj.weight"]
    assert unchanged == wanted, (
        f"{name}: no factors for {unchanged}, expected {wanted or 'factors everywhere'}. {PAIRS}"
    )
    for path, bias in biases.items():
        makes_features = path.endswith(("qkv_proj.bias", "gate_up_proj.bias")) and not (
            "qkv" in path and attention.num_heads != attention.num_kv_heads
        )
        changed = not torch.equal(layer.get_parameter(path), bias)
        assert changed == makes_features, f"{name}: {path} {'changed' if changed else 'stayed'}. {PAIRS}"


@pytest.mark.parametrize("name", LAYERS)
@torch.inference_mode()
def test_statistics_follow_the_factors(name: str, model_of: Callable[[str], DecoderModel]) -> None:
    """What is known about the inputs is true afterwards as well, since the matrices are quantized with it."""
    layer, text, stats = first_layer(model_of(name))
    smooth(layer, stats, random_factors)
    again = text.measure(layer)
    for path, entries in again.items():
        for number, wanted in enumerate(entries):
            got = stats[path][number]
            for field in ("second_moment", "mean_abs", "max_abs"):
                a, b = getattr(got, field), getattr(wanted, field)
                assert torch.allclose(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max())), (
                    f"{name}: {field} of {path}, {number}, begins {a.flatten()[:3].tolist()}, and measured again it "
                    f"begins {b.flatten()[:3].tolist()}: the factors weren't applied to it. {MOVE}"
                )


def pair_of(matrix: Tensor, inputs: Tensor) -> Pair:
    stats = InputStats.empty(inputs.shape[1], torch.device("cpu"))
    stats.add(inputs)
    return Pair([torch.ones(inputs.shape[1])], [matrix], stats)


def test_factors_move_by_hand() -> None:
    pair = pair_of(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]]))
    pair.others.append(torch.tensor([[10.0, 10.0]]))
    pair.makers.append(torch.ones(2, 3))
    pair.move(torch.tensor([2.0, 3.0]))
    inputs = pair.inputs
    got = [*pair.makers, *pair.users, *pair.others, inputs.mean_abs, inputs.max_abs, inputs.second_moment]
    wanted: list[Any] = [
        [1 / 2, 1 / 3], [[1 / 2] * 3, [1 / 3] * 3], [[2.0, 6]], [[20.0, 30]], [2.0, 2], [2.0, 2], [[4.0, 4], [4.0, 4]],
    ]  # fmt: skip
    for each, expected in zip(got, wanted, strict=True):
        assert torch.allclose(each, torch.tensor(expected)), f"expected {expected}, got {each.tolist()}. {MOVE}"


def test_smoothquant_makes_the_largest_equal() -> None:
    matrix, inputs = numbers(8, 12) * torch.logspace(-1, 1, 12), correlated_inputs(40, 12) * torch.logspace(2, -1, 12)
    pair = pair_of(matrix.clone(), inputs)
    factors = smoothquant_factors(pair)
    assert factors.shape == (12,), f"a factor for each feature: got {list(factors.shape)}. {SMOOTHQUANT}"
    pair.move(factors)
    largest_inputs, largest_weights = (inputs / factors).abs().amax(dim=0), pair.users[0].abs().amax(dim=0)
    assert torch.allclose(largest_inputs, largest_weights, rtol=1e-4), (
        f"with strength 0.5, each feature's largest input and weight become equal: got {largest_inputs[:3].tolist()} "
        f"and {largest_weights[:3].tolist()}. {SMOOTHQUANT}"
    )


def test_smoothquant_by_hand() -> None:
    """Inputs up to 8 and 2, weights up to 2 and 0.5 in two matrices: √(8 / 2) and √(2 / 0.5)."""
    pair = pair_of(torch.tensor([[1.0, -0.2], [-2.0, 0.1]]), torch.tensor([[-8.0, 1.0], [3.0, 2.0]]))
    pair.users.append(torch.tensor([[0.5, 0.5]]))
    for strength, expected in ((0.5, [2.0, 2.0]), (1.0, [8.0, 2.0]), (0.0, [0.5, 2.0])):
        got = smoothquant_factors(pair, strength)
        assert torch.allclose(got, torch.tensor(expected)), (
            f"strength {strength}: expected {expected}, got {got.tolist()}. {SMOOTHQUANT}"
        )


def test_features_that_are_always_0_have_factors() -> None:
    inputs, matrix = numbers(40, 16), numbers(8, 16)
    inputs[:, 3] = 0
    inputs[:, 7] *= 100
    matrix[:, 5] = 0
    for name in ("awq", "smoothquant"):
        factors = FACTORS[name](pair_of(matrix, inputs))
        assert factors[7] > 2 * factors[8], f"{name}: a feature of 0 and the others get none. {AWQ} {SMOOTHQUANT}"
        assert (factors.isfinite() & (factors > 0)).all(), (
            f"{name}: got factors {factors.tolist()}. {AWQ} {SMOOTHQUANT}"
        )


def test_awq_takes_the_best_exponent() -> None:
    """The outputs of all matrices that read the features count."""
    exponents = set()
    for seed in range(6):
        inputs = correlated_inputs(100, 32, seed=seed) * 2.0 ** (seed * numbers(32, seed=seed))
        pair = pair_of(numbers(8, 32, seed=seed), inputs)
        pair.users.append(numbers(4, 32, seed=seed + 1) * 3)
        errors = []
        for step in range(NUM_EXPONENTS):
            factors = (inputs.abs().mean(dim=0)) ** (step / NUM_EXPONENTS)
            errors.append(scaled_error(pair, factors / (factors.max() * factors.min()) ** 0.5))
        factors = awq_factors(pair, INT4)
        got, best = scaled_error(pair, factors), min(errors)
        exponents.add(errors.index(best))
        assert got <= best * 1.0001, (
            f"seed {seed}: with AWQ's factors the outputs are off by {got:.5f}; with exponent {errors.index(best)} / "
            f"{NUM_EXPONENTS}, the best, by {best:.5f}, and without factors by {errors[0]:.5f}. {AWQ}"
        )
        assert torch.allclose(factors.max() * factors.min(), torch.tensor(1.0), rtol=1e-3), (
            f"seed {seed}: the largest factor is {factors.max():.3f} and the smallest {factors.min():.3f}: expected "
            f"their product to be 1. {AWQ}"
        )
    assert len(exponents) > 1, "the cases all have the same best exponent: choose others in this test"


def scaled_error(pair: Pair, factors: Tensor) -> float:
    """How much the outputs change if the matrices are rounded after they were multiplied with factors."""
    users = [(user, dequantize(quantize(user * factors, INT4), INT4) / factors) for user in pair.users]
    return float(sum(output_error(user, rounded, pair.inputs.second_moment) for user, rounded in users))


def test_awq_keeps_columns_with_large_inputs() -> None:
    """One feature is 100 times as large as the others: AWQ multiplies its column by more."""
    inputs = numbers(200, 32)
    inputs[:, 5] *= 100
    factors = awq_factors(pair_of(numbers(64, 32), inputs), INT4)
    assert factors.argmax() == 5 and factors[5] > 2 * factors.median(), (
        f"feature 5 has by far the largest inputs: its factor is {factors[5]:.3f}, the median is "
        f"{factors.median():.3f}. {AWQ}"
    )


def group_errors(matrix: Tensor, codes: Quantized, seen: Tensor, scheme: Scheme) -> Tensor:
    """How much each group alone changes the outputs: [rows, num_groups]."""
    difference = (matrix - dequantize(codes, scheme)).double()
    size = matrix.shape[1] // codes.scale.shape[1]
    errors = [
        ((difference[:, start : start + size] @ seen[start : start + size, start : start + size].double())
         * difference[:, start : start + size]).sum(dim=1)
        for start in range(0, matrix.shape[1], size)
    ]  # fmt: skip
    return torch.stack(errors, dim=1)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMES)
def test_clipping_is_never_worse(name: str, scale_dtype: torch.dtype) -> None:
    scheme, num_better = SCHEMES[name], 0
    for seed in range(5):
        matrix, seen = numbers(16, 48, seed=seed), moment(correlated_inputs(100, 48, seed=seed))
        clipped, plain = quantize_clipped(matrix, seen, scheme, scale_dtype), quantize(matrix, scheme, scale_dtype)
        errors = [group_errors(matrix, codes, seen, scheme) for codes in (clipped, plain)]
        worse = errors[0] > errors[1] * 1.0001 + 1e-7
        assert not worse.any(), (
            f"{name}: clipped, row, group {worse.nonzero()[0].tolist()} changes outputs by {errors[0][worse][0]:.5f}, "
            f"not clipped by {errors[1][worse][0]:.5f}. {CLIPPED}"
        )
        num_better += int((errors[0] < 0.99 * errors[1]).sum())
        assert torch.equal(clipped.scale, clipped.scale.to(scale_dtype).float()), (
            f"scales aren't {scale_dtype}. {CLIPPED}"
        )
        again = encode(matrix, clipped.scale, clipped.zero, scheme)
        assert torch.equal(clipped.codes, again.codes), f"{name}: codes of other scales. {CLIPPED}"
    assert num_better > (50 if scheme.bits == 4 else 3), (
        f"{name}: only {num_better} of all groups became better. {CLIPPED}"
    )


def test_clipping_takes_the_best_scale_of_each_group() -> None:
    scheme = Scheme(bits=4, group_size=8, is_symmetric=False)
    matrix, seen = numbers(16, 48), moment(correlated_inputs(100, 48))
    scale, zero = find_scales(scheme.split(matrix), scheme)
    errors = torch.stack(
        [group_errors(matrix, encode(matrix, scale * each, zero, scheme), seen, scheme) for each in SHRINK_FACTORS]
    )
    got = group_errors(matrix, quantize_clipped(matrix, seen, scheme), seen, scheme)
    wrong = got > errors.amin(dim=0) * 1.001 + 1e-7
    assert not wrong.any(), (
        f"row, group {wrong.nonzero()[0].tolist()} changes outputs by {got[wrong][0]:.5f}; with the best factor of "
        f"its scale, by {errors.amin(dim=0)[wrong][0]:.5f}. {CLIPPED}"
    )
    found = SHRINK_FACTORS[0], round(min(SHRINK_FACTORS), 9), len(SHRINK_FACTORS)
    assert found == (1, 0.5, 11), (
        f"first and smallest factor, and how many: expected 1, 0.5, 11, got {found}. {CLIPPED}"
    )


def test_diagonal_blocks() -> None:
    blocks = diagonal_blocks(torch.arange(36).view(6, 6), 2)
    got = [block.tolist() for block in blocks]
    assert got == [[[0, 1], [6, 7]], [[14, 15], [20, 21]], [[28, 29], [34, 35]]], f"got {got}. {CLIPPED}"


# method.py


METHODS = {
    "rtn": (Scheme(bits=4, group_size=8), False),
    "gptq": (Scheme(bits=4, group_size=8), True),
    "awq": (Scheme(bits=4, group_size=8, is_symmetric=False), True),
    "smoothquant": (Scheme(activations="int8"), True),
}


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_a_layer_is_quantized(name: Any, family: str, model_of: Callable[[str], DecoderModel]) -> None:
    scheme, needs_text = METHODS[name]
    method, model = Method(name, scheme), model_of(family)
    assert method.needs_text == needs_text, f"{name}: needs_text is {method.needs_text}. {METHOD}"
    layer, text, stats = first_layer(model)
    originals = {path: weight.data.clone() for path, weight in matrices(layer).items()}
    norms = [layer.input_layernorm.weight.clone(), layer.post_attention_layernorm.weight.clone()]
    before = outputs(layer, text)
    found = method.quantize_layer(layer, stats if needs_text else {})
    assert found.keys() == originals.keys(), f"{name}: quantized were {list(found)}. {METHOD}"
    for path, weight in matrices(layer).items():
        wanted_count = len(weight.data) if weight.data.ndim == 3 else 1
        assert len(found[path]) == wanted_count, f"{name}, {path}: {len(found[path])} entries. {METHOD}"
        now = torch.stack([dequantize(codes, scheme) for codes in found[path]])
        assert torch.equal(now.view(weight.data.shape), weight.data), (
            f"{name}, {path}: the layer doesn't have the numbers that the codes stand for. {METHOD}"
        )
        if name == "rtn":
            wanted = quantize(originals[path], scheme)
            got = torch.stack([each.codes for each in found[path]]).view(weight.data.shape)
            assert torch.equal(got, wanted.codes), f"rtn, {path}: the codes aren't the nearest. {METHOD}"
    changed = [
        not torch.equal(norm, now.weight)
        for norm, now in zip(norms, (layer.input_layernorm, layer.post_attention_layernorm), strict=True)
    ]
    assert changed == [name in ("awq", "smoothquant")] * 2, f"{name}: norms changed: {changed}. {METHOD}"
    after = outputs(layer, text)
    relative = float((after - before).norm() / before.norm())
    assert 0 < relative < 0.3, f"{name}: the layer's output changed by {relative:.2f} of itself. {METHOD}"


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_each_matrix_is_rounded_for_its_own_inputs(
    name: Any, family: str, scale_dtype: torch.dtype, model_of: Callable[[str], DecoderModel]
) -> None:
    """Step by step: factors, then for each matrix, or expert's matrix, the codes."""
    scheme, _ = METHODS[name]
    layer, _, stats = first_layer(model_of(family))
    found = Method(name, scheme, scale_dtype).quantize_layer(layer, stats)
    layer, _, stats = first_layer(model_of(family))
    if name in ("awq", "smoothquant"):
        smooth(layer, stats, partial(awq_factors, scheme=scheme) if name == "awq" else smoothquant_factors)
    for path, weight in matrices(layer).items():
        parts = weight.data if weight.data.ndim == 3 else weight.data[None]
        for number, matrix in enumerate(parts):
            seen = stats[path][number].second_moment
            if name == "gptq":
                wanted = gptq(matrix, seen, scheme, scale_dtype)
            elif name == "awq":
                wanted = quantize_clipped(matrix, seen, scheme, scale_dtype)
            else:
                wanted = quantize(matrix, scheme, scale_dtype)
            got = found[path][number]
            assert torch.equal(got.codes, wanted.codes) and torch.equal(got.scale, wanted.scale), (
                f"{name}, {family}, {path}, {number}: {int((got.codes != wanted.codes).sum())} of "
                f"{wanted.codes.numel()} codes and {int((got.scale != wanted.scale).sum())} scales aren't what the "
                f"method makes of this matrix and its inputs. {METHOD}"
            )


@torch.inference_mode()
def test_gptq_and_awq_are_better_than_rtn(model_of: Callable[[str], DecoderModel]) -> None:
    errors = {}
    for name in ("rtn", "gptq", "awq"):
        layer, text, stats = first_layer(model_of("llama with biases, all heads"))
        before = outputs(layer, text)
        Method(name, INT4).quantize_layer(layer, stats)  # type: ignore[arg-type]
        errors[name] = float((outputs(layer, text) - before).norm())
    assert errors["gptq"] < errors["rtn"] and errors["awq"] < errors["rtn"], (
        f"the layer's output is off by {errors}. {METHOD}"
    )


@pytest.mark.parametrize("name", ["gptq", "awq", "smoothquant"])
@torch.inference_mode()
def test_experts_that_saw_no_token_are_rounded(name: Any, model_of: Callable[[str], DecoderModel]) -> None:
    """One token goes to two experts of four. Nothing is known about the others' inputs."""
    model = model_of("qwen3_moe")
    layer, text = model.layers["0"], TextRunner(model, [[5]])
    stats = text.measure(layer)
    used = [entry.num_inputs > 0 for entry in stats["mlp.experts.down"]]
    assert sum(used) == 2, f"got {used}. {RECORDING}"
    scheme = METHODS[name][0]
    originals = layer.mlp.experts.down.data.clone()
    found = Method(name, scheme).quantize_layer(layer, stats)
    experts: Experts = layer.mlp.experts
    for expert, was_used in enumerate(used):
        for path, weight in (("mlp.experts.gate_up", experts.gate_up), ("mlp.experts.down", experts.down)):
            assert weight.data[expert].isfinite().all(), f"{name}: {path}, {expert} isn't finite. {METHOD}"
        nearest = quantize(originals[expert], scheme)
        if not was_used:
            assert torch.equal(found["mlp.experts.down"][expert].codes, nearest.codes), (
                f"{name}: expert {expert} saw no token: expected the nearest codes for its down projection. {METHOD}"
            )


def test_paths_of_matrices(model_of: Callable[[str], DecoderModel]) -> None:
    got = list(matrices(model_of("qwen2_moe").layers["0"]))
    assert got == [
        "self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "mlp.experts.gate_up", "mlp.experts.down",
        "mlp.shared_expert.gate_up_proj.weight", "mlp.shared_expert.down_proj.weight",
    ], f"got {got}. See worker/quantization/calibration.py::matrices."  # fmt: skip


@torch.inference_mode()
def test_experts_count_as_much_as_they_are_used(model_of: Callable[[str], DecoderModel]) -> None:
    """What the norm makes goes to several experts: their inputs together are all tokens, once for each expert."""
    layer, text, stats = first_layer(model_of("qwen3_moe"))
    pair = find_pairs(layer, stats)[1]
    middle = torch.cat([after_attention(layer, text, number) for number in range(len(ROWS))])
    tokens = layer.post_attention_layernorm(middle)
    _, expert_ids = layer.mlp.gate(tokens)
    counts = expert_ids.flatten().bincount().tolist()
    assert len(set(counts)) > 1, f"each expert has {counts[0]} tokens: choose other rows in this test"
    seen = InputStats.empty(tokens.shape[1], torch.device("cpu"))
    seen.add(tokens.repeat_interleave(expert_ids.shape[1], dim=0))
    assert pair.inputs.num_inputs == seen.num_inputs, f"{pair.inputs.num_inputs} inputs. {MIXTURE}"
    for field in ("second_moment", "mean_abs", "max_abs"):
        got, wanted = getattr(pair.inputs, field), getattr(seen, field)
        assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.max())), (
            f"experts with {counts} tokens: {field} of all begins {wanted.flatten()[:3].tolist()}, got "
            f"{got.flatten()[:3].tolist()}. {MIXTURE}"
        )


def test_pairs_are_in_the_order_of_computation(model_of: Callable[[str], DecoderModel]) -> None:
    layer, _, stats = first_layer(model_of("llama, all heads"))
    pairs = find_pairs(layer, stats)
    users = [next(path for path, each in matrices(layer).items() if each.data is pair.users[0]) for pair in pairs]
    wanted = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert [user.removesuffix(".weight") for user in users] == wanted, f"got {users}. {PAIRS}"
