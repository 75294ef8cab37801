"""Checkpoints written by other people's tools (models/training/quantized_checkpoints.py): our engine reads what they
mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from common.checkpoint import Checkpoint
from common.errors import FieldError
from part14_quantization.worker.model import DecoderModel
from part14_quantization.worker.parallel import Groups, ParallelGroup
from part14_quantization.worker.quantization.calibration import causal_attention
from part14_quantization.worker.quantization.choice import compressed_tensors
from part14_quantization.worker.quantization.kv_codes import decode_kv, encode_kv
from part14_quantization.worker.quantization.weight import QuantizedWeight
from part14_quantization.worker.weights import load_decoder

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir())
ONE_RANK = ("ct-w4a16", "ct-w4a16-actorder", "gptq-desc-act")  # groups of 128 or of scattered columns
DOWN = "model.layers.0.mlp.down_proj"
LOOK = "Look at worker/quantization/layouts.py and choice.py."


def checkpoint(directory: Path) -> Checkpoint:
    return Checkpoint(directory.name, AutoConfig.from_pretrained(directory), directory, directory, frozenset())


def load(directory: Path, groups: Groups | None = None) -> DecoderModel:
    return load_decoder(checkpoint(directory), torch.float32, "cpu", groups)


def expected(name: str) -> dict[str, Tensor]:
    """What the tool reads from its checkpoint."""
    return load_file(CHECKPOINTS / name / "expected.safetensors")


@torch.inference_mode()
def logits(model: DecoderModel, input_ids: Tensor, attend: Callable[..., Tensor] = causal_attention) -> Tensor:
    hidden = model(input_ids, torch.arange(len(input_ids)), attend)
    return model.compute_logits(hidden)


def changed(name: str, to: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with other tensors, or another quantization_config."""
    shutil.copytree(CHECKPOINTS / name, to / name)
    tensors, config = load_file(to / name / "model.safetensors"), json.loads((to / name / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, to / name / "model.safetensors")
    (to / name / "config.json").write_text(json.dumps(config))
    return to / name


def test_there_are_checkpoints_of_all_kinds() -> None:
    methods = {
        json.loads((CHECKPOINTS / name / "config.json").read_text())["quantization_config"]["quant_method"]
        for name in NAMES
    }
    assert (len(NAMES), methods) == (13, {"compressed-tensors", "gptq", "awq"})


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_that_the_tool_reads(name: str) -> None:
    layer = load(CHECKPOINTS / name).layers["0"]
    found = {"q_proj.weight": layer.self_attn.qkv_proj.weight, "down_proj.weight": layer.mlp.down_proj.weight}
    for projection, wanted in expected(name).items():
        if projection in found:
            weight = found[projection]
            assert isinstance(weight, QuantizedWeight), f"{name}: {projection} isn't quantized. {LOOK}"
            got = weight.dequantized()[: len(wanted)]
            assert torch.allclose(got, wanted.float(), rtol=1e-3, atol=1e-6), (
                f"{name}: {projection} differs from what the tool reads by up to {(got - wanted).abs().max():.4f}: row "
                f"0 begins {got[0, :4].tolist()}, expected {wanted[0, :4].tolist()}. {LOOK}"
            )


def fake_quantized_kv(model: DecoderModel) -> Callable[..., Tensor]:
    """Attention to keys and values that were stored as FP8."""
    scales = model.stored_kv_scales
    assert scales is not None, f"the checkpoint has k_scale and v_scale. {LOOK}"

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rounded = [
            decode_kv(encode_kv(numbers, scale, torch.uint8), torch.float32) * scale.unsqueeze(-1)
            for numbers, scale in zip((key, value), scales[layer], strict=True)
        ]
        return causal_attention(layer, query, *rounded)

    return attend


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_the_tools(name: str) -> None:
    """llmcompressor divides the largest activation by 127.5; vLLM, and so this engine, by 127."""

    def round_tokens(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = rows.abs().amax(dim=-1, keepdim=True) / 127.5
        return (rows / scale).round().clamp(-128, 127).to(torch.int8), scale

    model, tool = load(CHECKPOINTS / name), expected(name)
    attend = fake_quantized_kv(model) if name == "ct-kv-fp8" else causal_attention
    with mock.patch("part14_quantization.worker.quantization.products.quantize_tokens", round_tokens):
        got = logits(model, tool["input_ids"][0], attend)
    assert torch.allclose(got, tool["logits"], atol=1e-4), (
        f"{name}: the logits differ from the tool's by up to {(got - tool['logits']).abs().max():.4f}. {LOOK}"
    )


def test_activations_are_rounded_as_vllm_does() -> None:
    tool = expected("ct-w8a8")
    got = logits(load(CHECKPOINTS / "ct-w8a8"), tool["input_ids"][0])
    difference = (got - tool["logits"]).abs().max()
    assert 1e-3 < difference < 0.2, (
        f"scales from 127 instead of 127.5 change logits by 0.14: got {difference:.4f}. See scheme.py::quantize_tokens."
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONE_RANK])
def test_each_rank_reads_its_part(name: str) -> None:
    """The parts of two ranks together are the whole."""
    whole = load(CHECKPOINTS / name).layers["0"]
    ranks = [load(CHECKPOINTS / name, Groups(ParallelGroup(rank, 2))).layers["0"] for rank in range(2)]
    for path, dim in (("mlp.down_proj", 1), ("self_attn.o_proj", 1)):
        parts = [rank.get_submodule(path).weight.dequantized() for rank in ranks]
        wanted = whole.get_submodule(path).weight.dequantized()
        assert torch.equal(torch.cat(parts, dim), wanted), (
            f"{name}: two ranks' parts of {path} aren't the whole. {LOOK}"
        )
    for path in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        outputs = list(whole.get_submodule(path).outputs.values())
        wanted = whole.get_submodule(path).weight.dequantized().split(outputs)
        parts = [rank.get_submodule(path).weight.dequantized().split([size // 2 for size in outputs]) for rank in ranks]
        for number, matrix in enumerate(wanted):
            assert torch.equal(torch.cat([part[number] for part in parts]), matrix), f"{name}: {path}, {number}. {LOOK}"


@pytest.mark.parametrize("name", ["gptq-desc-act", "ct-w4a16-actorder"])
def test_groups_of_scattered_columns_need_one_rank(name: str) -> None:
    with pytest.raises(FieldError, match=r"tensor_parallel_size: .*_proj has groups of scattered columns"):
        load(CHECKPOINTS / name, Groups(ParallelGroup(0, 2)))


def test_groups_must_not_be_on_two_ranks(tmp_path: Path) -> None:
    """64 input features in groups of 32 can't be divided among four ranks."""
    with pytest.raises(
        FieldError, match=r"o_proj: 16 input features on each rank aren't whole groups of 32: expected fewer ranks"
    ):
        load(CHECKPOINTS / "gptq-v1", Groups(ParallelGroup(0, 4)))


def set_key(key: str, value: object) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(_: dict[str, Tensor], settings: dict[str, Any]) -> None:
        *path, last = key.split(".")
        for each in path:
            settings = settings[each]
        settings[last] = value

    return change


def drop(part: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def set_all(part: str, value: float) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name].fill_(value)

    return change


WEIGHTS, INPUTS = "config_groups.group_0.weights", "config_groups.group_0.input_activations"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq-v1", set_key("checkpoint_format", "gptq_v2"), "zero points: expected 8 with sym, got 7"),
        ("gptq-v2", set_key("checkpoint_format", "marlin"), "checkpoint_format 'marlin' is not supported"),
        ("gptq-v1", set_key("bits", 3), "bits 3 is not supported: expected one of 4, 8"),
        ("gptq-v1", set_key("group_size", 64), r"scales has shape \[2, 64\], expected \[1, 64\]"),
        ("gptq-v1", drop("scales"), "lacks the tensor model.layers.0.self_attn.q_proj.scales"),
        ("gptq-v1", drop("qzeros"), "lacks the tensor model.layers.0.self_attn.q_proj.qzeros"),
        ("gptq-desc-act", drop("k_proj.g_idx"), "has its columns in another order"),
        ("gptq-desc-act", set_key("desc_act", False), "scattered columns .g_idx., but not by its config"),
        ("gptq-v1", set_all("g_idx", 99), "g_idx: expected 2 groups of 32 columns, got others"),
        ("gptq-v1", set_key("group_size", 0), "group_size 0 is not supported: expected one of -1, an even number"),
        ("gptq-v1", set_key("lm_head", True), "lm_head True is not supported"),
        ("gptq-v1", set_all("scales", -1), "scales: expected scales of at least 0, got -1"),
        ("ct-fp8", set_all("weight_scale", 256), "expected scales up to 128.0, got 256"),
        ("ct-w4a16", set_key("ignore", ["re:("]), "ignore: 're:.' is no regular expression"),
        ("ct-w4a16", set_key("config_groups", []), r"config_groups: expected an object, got \[\]"),
        ("ct-w4a16", set_key("config_groups.group_0.weights", "int4"), "weights: expected an object, got 'int4'"),
        ("ct-w8a8", set_key("config_groups.group_0.input_activations", [8]), r"input_activations: expected an object"),
        ("ct-w4a16", set_key("config_groups.group_0.targets", "Linear"), "targets 'Linear' is not supported"),
        ("ct-w4a16", set_key(f"{WEIGHTS}.group_size", None), "weights.group_size None is not supported"),
        ("ct-w4a16", set_key(f"{WEIGHTS}.dynamic", True), "weights.dynamic True is not supported"),
        ("gptq-v1", set_key("bits", 4.0), "bits 4.0 is not supported"),
        ("awq", set_key("bits", 4.0), "bits 4.0 is not supported"),
        ("ct-w8a16", set_key(f"{WEIGHTS}.num_bits", 8.0), "weights.num_bits 8.0 is not supported"),
        ("ct-w8a8", set_key(f"{INPUTS}.num_bits", [8]), "input_activations .* supported"),
        ("ct-w4a16", set_key("transform_config", {"R1": {}}), "transform_config .* is not supported"),
        ("ct-kv-fp8", set_all("k_scale", float("inf")), "k_scale.*infinity|k_scale: expected scales"),
        ("awq", set_key("version", "gemv"), "version 'gemv' is not supported: expected one of gemm"),
        ("awq", set_key("zero_point", False), "zero_point False is not supported"),
        ("awq", set_key("quant_method", "bitsandbytes"), "quant_method 'bitsandbytes' is not supported"),
        ("ct-w8a8", drop("weight_scale"), "lacks the tensor model.layers.0.self_attn.q_proj.weight_scale"),
        ("ct-w8a8", set_key("config_groups.group_0.input_activations.dynamic", False), "supported if they are dynamic"),
        ("ct-w4a16", set_key("config_groups.group_0.format", "marlin-24"), "format 'marlin-24' .* is not supported"),
        ("ct-w4a16", set_key(f"{WEIGHTS}.num_bits", 2), "format 'pack-quantized' with 2-bit int weights"),
        ("ct-w4a16", set_key(f"{WEIGHTS}.strategy", "block"), "strategy 'block' is not supported"),
        ("ct-kv-fp8", drop("v_scale"), "k_scale and v_scale for some layers only"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(
    name: str, change: Callable[[dict[str, Tensor], dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FieldError, match=message):
        load(changed(name, tmp_path, change))


def test_biases_of_zero_for_layers_without_any(tmp_path: Path) -> None:
    """AutoGPTQ writes them."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{DOWN}.bias"] = torch.zeros(64)

    load(changed("gptq-v1", tmp_path, change))
    with pytest.raises(FieldError, match="unknown tensor model.layers.0.mlp.down_proj.bias"):
        load(
            changed(
                "gptq-v2",
                tmp_path,
                lambda tensors, _: tensors.update({"model.layers.0.mlp.down_proj.bias": torch.ones(64)}),
            )
        )


def test_the_most_specific_group_counts(tmp_path: Path) -> None:
    """A name before a regular expression, before a class, in any order."""
    settings = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    names = {"a": settings, "b": {**settings, "targets": ["re:.*proj"]}, "c": {**settings, "targets": ["model.x_proj"]}}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    for exact in ("a", "b", "c"):
        groups = {
            name: {**group, "input_activations": inputs} if name == exact else group for name, group in names.items()
        }
        layout_for = compressed_tensors({"config_groups": groups, "format": "int-quantized"})
        found = {name: layout_for(name).scheme.activations == "int8" for name in ("model.x_proj", "y_proj", "other")}
        assert found == {"model.x_proj": exact == "c", "y_proj": exact == "b", "other": exact == "a"}, (
            f"{exact} quantizes activations: {found}. See choice.py::compressed_tensors."
        )


def test_a_damaged_scale_is_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight_scale"][3] = -1

    with pytest.raises(FieldError, match="down_proj.weight_scale: expected scales of at least 0, got -1"):
        load(changed("ct-fp8", tmp_path, change))


def test_one_scale_for_keys_and_values(tmp_path: Path) -> None:
    """Old checkpoints have kv_scale, which is for both."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in ("k_scale", "v_scale"):
            del tensors[f"model.layers.0.self_attn.{name}"]
        tensors["model.layers.0.self_attn.kv_scale"] = torch.tensor([0.5])

    scales = load(changed("ct-kv-fp8", tmp_path, change)).stored_kv_scales
    assert scales is not None and scales.tolist() == [[[0.5, 0.5], [0.5, 0.5]]], f"got {scales}. See weights.py."


def test_other_parts_refuse_quantized_checkpoints(tmp_path: Path) -> None:
    from part13_disaggregation.worker.weights import load_decoder as load_floats

    with pytest.raises(FieldError, match=r"is quantized \(gptq\): expected weights in one of F32, F16, BF16"):
        load_floats(checkpoint(CHECKPOINTS / "gptq-v1"), torch.float32, "cpu")


def test_zero_points_of_zero_borrow(tmp_path: Path) -> None:
    """gptq-v1-asym and gptq-v2 are the same weights. In version 1, a zero point of 0 borrows from its neighbor."""
    first, second = (load(CHECKPOINTS / name).layers["0"] for name in ("gptq-v1-asym", "gptq-v2"))
    a, b = first.self_attn.qkv_proj.weight, second.self_attn.qkv_proj.weight
    num_zeros = int((b.zero[:64] == -8).sum())
    assert num_zeros and torch.equal(a.zero[:64], b.zero[:64]), (
        f"{int((a.zero[:64] != b.zero[:64]).sum())} zero points differ; {num_zeros} are 0. See layouts.py::GPTQLayout."
    )
