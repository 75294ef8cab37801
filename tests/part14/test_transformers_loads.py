"""transformers, with compressed-tensors, loads what quantize.py writes, and computes the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.testing import assert_same_greedy, reference_greedy
from part14_quantization.quantize import QuantizeConfig, Quantizer
from part14_quantization.worker.model import DecoderModel
from part14_quantization.worker.quantization import products
from part14_quantization.worker.quantization.weight import QuantizedWeight
from tests.part14.small_checkpoints import load, logits, save_model

pytest.importorskip("compressed_tensors", reason="transformers needs it to load such checkpoints: pip install it")

LOOK = "See worker/quantization/writers.py::CompressedTensorsWriter."
PROMPT = [5, 311, 1_780, 42, 900, 77, 4_000, 13]
MAX_TOKENS = 12
TOLERANCE = 2e-3  # of logits: numbers are added in another order
W8A8_TOLERANCE = 0.6  # transformers divides the largest activation by 127.5, vLLM and so this engine by 127

CASES: dict[str, dict[str, Any]] = {
    "int4 in groups": dict(method="gptq", bits=4, group_size=16),
    "int4, whole rows": dict(method="awq", bits=4, group_size=-1),
    "int8 in groups": dict(method="rtn", bits=8, group_size=16),
    "int8, whole rows": dict(method="gptq", bits=8, group_size=-1),
    "fp8": dict(method="rtn", bits=8, group_size=-1, format="fp8"),
    "W8A8": dict(method="smoothquant", bits=8, group_size=-1),
}  # asymmetric ones are missing: transformers 5.23 with compressed-tensors 0.20.1 doesn't load its own either


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of each kind, with a bias on queries, keys and values, and an LM head of its own."""
    source = save_model(tmp_path_factory.mktemp("model"), "qwen2", tie_word_embeddings=False)

    def write(name: str) -> Path:
        out = tmp_path_factory.mktemp("out")
        config = QuantizeConfig(str(source.directory), str(out), num_rows=4, row_tokens=32, **CASES[name])
        Quantizer(config).run(mock.Mock())
        return out

    return write


def load_transformers(directory: Path) -> Any:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: names for kind, names in info.items() if kind != "error_msgs" and names}
    assert not wrong, f"transformers found tensors that it doesn't know or lacks: {wrong}. {LOOK}"
    return model.eval()


def dequantized(module: Any) -> Tensor:
    """A linear layer's numbers, in transformers."""
    from compressed_tensors.compressors import decompress_module

    if getattr(module, "quantization_scheme", None) is not None and module.quantization_status == "compressed":
        decompress_module(module)
    return module.weight.detach().float()


def quantize_tokens_as_transformers_does(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = rows.abs().amax(dim=-1, keepdim=True) / 127.5
    return (rows / scale).round().clamp(-128, 127).to(torch.int8), scale


def inputs_and_outputs(theirs: Any) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The logits for PROMPT, and what went into each of transformers' linear layers and came out, by the layer's name:
    [number of tokens, features]."""
    seen = dict[str, tuple[Tensor, Tensor]]()

    def watch(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.update({name: (inputs[0][0], output[0])})

    hooks = [
        module.register_forward_hook(watch(name.removeprefix("model.layers.")))
        for name, module in theirs.named_modules()
        if name.endswith("_proj")
    ]
    with torch.inference_mode():
        logits = theirs(torch.tensor([PROMPT])).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, seen


def check_layers(ours: DecoderModel, seen: dict[str, tuple[Tensor, Tensor]], name: str) -> None:
    """Each linear layer computes what transformers' does, from the same input. The whole model can't be compared so
    closely where activations become int8: the largest is divided by itself / 127.5, and whether that gives -127.5,
    which is rounded to -128, or a little less, rounded to -127, depends on the input's last bit."""
    for number, layer in ours.layers.items():
        for group, linear, parts in (
            ("self_attn", layer.self_attn.qkv_proj, ("q_proj", "k_proj", "v_proj")),
            ("self_attn", layer.self_attn.o_proj, ("o_proj",)),
            ("mlp", layer.mlp.gate_up_proj, ("gate_proj", "up_proj")),
            ("mlp", layer.mlp.down_proj, ("down_proj",)),
        ):
            pairs = [seen[f"{number}.{group}.{part}"] for part in parts]
            with torch.inference_mode():
                got, expected = linear(pairs[0][0]), torch.cat([output for _, output in pairs], -1)
            difference = float((got - expected).abs().max())
            assert difference < TOLERANCE, (
                f"{name}: layer {number}'s {parts} differ from transformers' by up to {difference:.4f}. {LOOK}"
            )


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_it(name: str, written: Callable[[str], Path]) -> None:
    directory = written(name)
    theirs, ours = load_transformers(directory), load(directory)
    expected, seen = inputs_and_outputs(theirs)
    with mock.patch.object(products, "quantize_tokens", quantize_tokens_as_transformers_does):
        check_layers(ours, seen, name)
    difference = float((logits(ours, PROMPT) - expected).abs().max())
    if name == "W8A8":
        assert TOLERANCE < difference < W8A8_TOLERANCE, (
            f"scales from 127 instead of 127.5 change logits by 0.3: got {difference:.4f}. {LOOK}"
        )
    else:
        assert difference < TOLERANCE, f"{name}: logits differ from transformers' by up to {difference:.4f}. {LOOK}"
        answer = list[int]()
        for _ in range(MAX_TOKENS):
            answer.append(int(logits(ours, [*PROMPT, *answer])[-1].argmax()))
        assert_same_greedy(theirs, PROMPT, answer, reference_greedy(theirs, PROMPT, MAX_TOKENS), name)
    layer, own = theirs.model.layers[1], ours.layers["1"]
    weights: dict[str, QuantizedWeight] = {"o_proj": own.self_attn.o_proj.weight, "down_proj": own.mlp.down_proj.weight}
    for path, weight in weights.items():
        numbers = dequantized(layer.self_attn.o_proj if path == "o_proj" else layer.mlp.down_proj)
        assert torch.allclose(numbers, weight.dequantized(), rtol=1e-5, atol=1e-7), (
            f"{name}: {path} begins {numbers[0, :3].tolist()} in transformers, and "
            f"{weight.dequantized()[0, :3].tolist()} in our engine. {LOOK}"
        )
