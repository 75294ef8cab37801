"""quantize.py and worker/quantization/writers.py: checkpoints that an engine loads, also after interruptions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

from common.checkpoint import PRESETS, Checkpoint, load_tokenizer, resolve_checkpoint
from common.corpus import calibration_rows
from part14_quantization import quantize
from part14_quantization.quantize import QuantizeConfig, Quantizer
from part14_quantization.worker.quantization.calibration import TextRunner, matrices
from part14_quantization.worker.quantization.choice import QuantizationFlags, choose_layouts
from part14_quantization.worker.quantization.method import Method
from part14_quantization.worker.quantization.scheme import Quantized, Scheme
from part14_quantization.worker.quantization.weight import QuantizedWeight
from part14_quantization.worker.quantization.writers import CompressedTensorsWriter, GPTQWriter
from tests.part14.small_checkpoints import TOKENIZER_FILES, load, refused, save_model

ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS, ROW_TOKENS = 4, 32
QUANTIZER = "See quantize.py::Quantizer.{}."
WRITER = "See worker/quantization/writers.py::{}."
COMPRESSED, GPTQ_WRITER = WRITER.format("CompressedTensorsWriter"), WRITER.format("GPTQWriter")
SPLIT_CODES, OTHER_TENSORS = WRITER.format("split_codes"), WRITER.format("other_tensors")
WRITE_TENSORS = "See quantize.py::write_tensors."
DIRECTORY = "See quantize.py::prepare_directory."


def flags(model: Path | str, out: Path, **changes: Any) -> QuantizeConfig:
    base = dict(method="rtn", group_size=16, num_rows=NUM_ROWS, row_tokens=ROW_TOKENS)
    return QuantizeConfig(str(model), str(out), **{**base, **changes})


def write(config: QuantizeConfig) -> Path:
    Quantizer(config).run(mock.Mock())
    return Path(config.out)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    found: dict[str, Checkpoint] = {}

    def get(family: str = "llama", **changes: Any) -> Checkpoint:
        key = f"{family} {changes}"
        if key not in found:
            found[key] = save_model(tmp_path_factory.mktemp("model"), family, **changes)
        return found[key]

    return get


# Methods and layouts


W8A8 = dict(bits=8, group_size=-1, activations="int8")
WRITTEN: dict[str, dict[str, Any]] = {
    **{
        f"{method}, {layout}, {bits} bits{'' if symmetric else ', zero points'}": dict(
            method=method, layout=layout, bits=bits, symmetric=symmetric
        )
        for method in ("rtn", "gptq", "awq")
        for layout in ("compressed-tensors", "gptq")
        for bits in (4, 8)
        for symmetric in (True, False)
    },
    **{f"{method}, W8A8": dict(method=method, **W8A8) for method in ("rtn", "gptq", "awq", "smoothquant")},
    "rtn, fp8": dict(format="fp8", bits=8, group_size=-1),
    "rtn, whole rows": dict(group_size=-1),
    "gptq, whole rows, zero points": dict(method="gptq", layout="gptq", group_size=-1, symmetric=False),
    "awq, groups of 8": dict(method="awq", group_size=8),
}
WITH_EXPERTS = [
    "rtn, compressed-tensors, 4 bits", "gptq, compressed-tensors, 4 bits, zero points", "gptq, gptq, 4 bits",
    "gptq, gptq, 8 bits, zero points", "awq, compressed-tensors, 4 bits", "smoothquant, W8A8", "rtn, fp8",
]  # fmt: skip


@torch.inference_mode()
def check_written(checkpoint: Checkpoint, out: Path, config: QuantizeConfig, what: str) -> None:
    """The checkpoint has what the method makes of each layer, of inputs as the layers before it, quantized, send
    them."""
    source, written = load(checkpoint), load(out)
    stored_dtype = checkpoint.config.dtype or torch.float32
    scale_dtype = torch.float16 if config.layout == "gptq" else stored_dtype
    method = Method(config.method, config.scheme, scale_dtype)
    rows = calibration_rows(load_tokenizer(checkpoint), ROW_TOKENS, NUM_ROWS)
    text = TextRunner(source, rows)
    has_other_norms = False
    for number, layer in source.layers.items():
        now = written.layers[number]
        norms = {name: value.clone() for name, value in layer.named_parameters() if "layernorm" in name}
        method.quantize_layer(layer, text.measure(layer) if method.needs_text else {})
        for path, weight in matrices(layer).items():
            got = now.get_submodule(path)
            assert isinstance(got, QuantizedWeight), f"{what}: layer {number}, {path} isn't quantized. {SPLIT_CODES}"
            assert (got.scheme.bits, got.scheme.kind) == (config.bits, config.format), f"{what}: {got.scheme}"
            assert got.scheme.activations == config.scheme.activations, f"{what}: {got.scheme}. {COMPRESSED}"
            numbers = got.dequantized()
            wrong = (numbers != weight.data).nonzero().tolist()
            assert not wrong, (
                f"{what}: layer {number}, {path}: {len(wrong)} of {numbers.numel()} numbers aren't what the method "
                f"makes of the matrix, at {wrong[0]} {numbers[tuple(wrong[0])]:.5f} instead of "
                f"{weight.data[tuple(wrong[0])]:.5f}. {COMPRESSED if config.layout != 'gptq' else GPTQ_WRITER}"
            )
        quantized = {path for path in matrices(layer)}
        for path, value in layer.named_parameters():
            if path.removesuffix(".data") not in quantized:
                wanted = value.to(stored_dtype).float()
                assert torch.equal(now.get_parameter(path), wanted), (
                    f"{what}: layer {number}, {path} isn't what the method makes of it. {OTHER_TENSORS}"
                )
                has_other_norms |= path in norms and not torch.equal(norms[path], value)
        text.advance(now)
    assert has_other_norms == (config.method in ("awq", "smoothquant")), f"{what}: norms with factors. {OTHER_TENSORS}"
    for name in ("embed_tokens", "norm", "lm_head"):
        module, got_module = getattr(source, name), getattr(written, name)
        assert (module is None) == (got_module is None), f"{what}: {name}. {QUANTIZER.format('_outside')}"
        if module is not None:
            assert torch.equal(module.weight, got_module.weight), (
                f"{what}: {name} changed. {QUANTIZER.format('_outside')}"
            )


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_what_the_method_makes(name: str, models: Callable[..., Checkpoint], tmp_path: Path) -> None:
    checkpoint = models()
    config = flags(checkpoint.directory, tmp_path / "out", **WRITTEN[name])
    check_written(checkpoint, write(config), config, name)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_mixtures_of_experts(name: str, models: Callable[..., Checkpoint], tmp_path: Path) -> None:
    checkpoint = models("qwen3_moe")
    config = flags(checkpoint.directory, tmp_path / "out", **WRITTEN[name])
    check_written(checkpoint, write(config), config, f"qwen3_moe, {name}")


@pytest.mark.parametrize("name", ["gptq, compressed-tensors, 4 bits, zero points", "awq, gptq, 8 bits"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_moe", "mixtral"])
def test_other_families(family: str, name: str, models: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """With biases, norms of queries and keys, a shared expert and its gate, other names, and an LM head."""
    checkpoint = models(family, tie_word_embeddings=False)
    config = flags(checkpoint.directory, tmp_path / "out", **WRITTEN[name])
    check_written(checkpoint, write(config), config, f"{family}, {name}")


@pytest.mark.parametrize("name", ["rtn, compressed-tensors, 4 bits", "gptq, gptq, 4 bits", "smoothquant, W8A8"])
def test_a_bfloat16_model(name: str, models: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """Its scales and norms are stored in bfloat16 too; GPTQ's scales in float16, as other engines expect them."""
    checkpoint = models(dtype=torch.bfloat16)
    config = flags(checkpoint.directory, tmp_path / "out", **WRITTEN[name])
    out = write(config)
    check_written(checkpoint, out, config, name)
    stored = load_file(out / "model-00001-of-00003.safetensors")
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in stored.items() if "q_proj" in name}
    scales = "scales" if config.layout == "gptq" else "weight_scale"
    wanted = torch.float16 if config.layout == "gptq" else torch.bfloat16
    assert dtypes[scales] == wanted, f"{name}: scales: expected {wanted}, got {dtypes}. {COMPRESSED}"
    norm = stored["model.layers.0.input_layernorm.weight"].dtype
    assert norm == torch.bfloat16, f"{name}: norms: got {norm}. {QUANTIZER.format('_quantize')}"
    outside = {tensor.dtype for tensor in load_file(out / "model-00003-of-00003.safetensors").values()}
    assert outside == {torch.bfloat16}, f"{name}: what isn't in layers: got {outside}. {QUANTIZER.format('_outside')}"


@pytest.mark.parametrize(
    "name", ["rtn, compressed-tensors, 4 bits, zero points", "rtn, gptq, 4 bits, zero points", "rtn, gptq, 8 bits"]
)
@pytest.mark.parametrize("group_size", [4, -1])
def test_sizes_that_are_not_whole_words(
    name: str, group_size: int, models: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    """20 and 60 rows, 44 and 60 columns: words of 8 codes are padded."""
    checkpoint = models(head_dim=10, intermediate_size=44)
    config = flags(checkpoint.directory, tmp_path / "out", **{**WRITTEN[name], "group_size": group_size})
    check_written(checkpoint, write(config), config, f"{name}, groups of {group_size}, odd sizes")


def test_a_random_model(tmp_path: Path) -> None:
    shape = dict(
        model_type="llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=64, vocab_size=4_096, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    with mock.patch.dict(PRESETS, {"small": shape}):
        config = flags("random:small", tmp_path / "out", method="gptq")
        check_written(resolve_checkpoint("random:small"), write(config), config, "random:small")


# Writers


def codes_of(rows: list[list[int]], zero: list[list[int]] | None = None, num_groups: int = 1) -> Quantized:
    scale = torch.arange(1.0, 1 + len(rows) * num_groups).view(len(rows), num_groups)
    zeros = None if zero is None else torch.tensor(zero, dtype=torch.int8)
    return Quantized(torch.tensor(rows, dtype=torch.int8), scale, zeros)


def hexadecimal(words: torch.Tensor) -> list[list[str]]:
    return [[f"{word & 2**32 - 1:08x}" for word in row] for row in words.tolist()]


def test_compressed_tensors_by_hand() -> None:
    """Codes plus 8 or 128 along the rows; zero points the same, down the columns."""
    writer = CompressedTensorsWriter(Scheme(bits=4, group_size=4, is_symmetric=False), torch.float16)
    got = writer.tensors("a", codes_of([[-8, -7, 0, 7, 1, 2, 3, 4]] * 2, [[-8, 7], [0, -1]], 2))
    names = {"a.weight_packed", "a.weight_scale", "a.weight_shape", "a.weight_zero_point"}
    assert set(got) == names, f"expected tensors {sorted(names)}, got {sorted(got)}. {COMPRESSED}"
    packed, zeros = hexadecimal(got["a.weight_packed"]), hexadecimal(got["a.weight_zero_point"])
    assert packed == [["cba9f810"]] * 2, f"codes: expected cba9f810 twice, got {packed}. {COMPRESSED}"
    assert zeros == [["00000080", "0000007f"]], (
        f"zero points 0 and 8, 15 and 7: expected 00000080 and 0000007f, got {zeros}. {COMPRESSED}"
    )
    assert got["a.weight_shape"].tolist() == [2, 8], f"got {got['a.weight_shape']}. {COMPRESSED}"
    scale = got["a.weight_scale"]
    assert scale.dtype == torch.float16 and scale.tolist() == [[1, 2], [3, 4]], f"scales: got {scale}. {COMPRESSED}"
    writer = CompressedTensorsWriter(Scheme(bits=8), torch.float16)
    got = writer.tensors("a", codes_of([[-128, -1, 0, 127, 1]]))
    packed = hexadecimal(got["a.weight_packed"])
    assert packed == [["ff807f00", "00000081"]], f"8 bits: expected ff807f00 and 00000081, got {packed}. {COMPRESSED}"
    assert set(got) == names - {"a.weight_zero_point"}, f"without zero points: got {sorted(got)}. {COMPRESSED}"


def test_codes_that_are_not_packed() -> None:
    for scheme, dtype in ((Scheme(activations="int8"), torch.int8), (Scheme("fp8"), torch.float8_e4m3fn)):
        codes = codes_of([[-8, 7, 56, 0]])
        got = CompressedTensorsWriter(scheme, torch.bfloat16).tensors("a", codes)
        assert set(got) == {"a.weight", "a.weight_scale"} and got["a.weight"].dtype == dtype, f"got {got}. {COMPRESSED}"
        stored = got["a.weight"].view(torch.int8).tolist()
        assert stored == codes.codes.tolist(), f"the codes as they are: got {stored}. {COMPRESSED}"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_by_hand(bits: int, symmetric: bool) -> None:
    """[columns / codes per word, rows]: the first code of a column of words in the lowest bits. Version 1, without
    zero points, stores 8 - 1 or 128 - 1; version 2 stores zero points as they are."""
    scheme = Scheme(bits=bits, group_size=4, is_symmetric=symmetric)
    rows = [[-8, -7, 0, 7, 1, 2, 3, 4], [7, 6, 5, 4, 3, 2, 1, 0]]
    zero = None if symmetric else [[-8, 7], [0, -1]]
    writer = GPTQWriter(scheme)
    got = writer.tensors("a", codes_of(rows, zero, 2))
    assert set(got) == {"a.qweight", "a.qzeros", "a.scales", "a.g_idx"}, f"got {set(got)}. {GPTQ_WRITER}"
    qweight, qzeros = hexadecimal(got["a.qweight"]), hexadecimal(got["a.qzeros"])
    if bits == 4:
        assert qweight == [["cba9f810", "89abcdef"]], f"codes plus 8: got {qweight}. {GPTQ_WRITER}"
        wanted = [["00000077"], ["00000077"]] if symmetric else [["00000080"], ["0000007f"]]
    else:
        assert qweight == [["87807978", "84858687"], ["84838281", "80818283"]], f"got {qweight}. {GPTQ_WRITER}"
        wanted = [["00007f7f"], ["00007f7f"]] if symmetric else [["00008078"], ["00007f87"]]
    assert qzeros == wanted, f"zero points {zero}: expected {wanted}, got {qzeros}. {GPTQ_WRITER}"
    scales, groups = got["a.scales"], got["a.g_idx"]
    assert scales.dtype == torch.float16 and scales.tolist() == [[1, 3], [2, 4]], f"got {scales}. {GPTQ_WRITER}"
    assert groups.dtype == torch.int32 and groups.tolist() == [0] * 4 + [1] * 4, f"g_idx: got {groups}. {GPTQ_WRITER}"
    settings = writer.settings()
    wanted_settings = {
        "quant_method": "gptq", "bits": bits, "group_size": 4, "sym": symmetric, "desc_act": False,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2", "lm_head": False,
    }  # fmt: skip
    assert settings == wanted_settings, f"expected {wanted_settings}, got {settings}. {GPTQ_WRITER}"


def test_gptq_with_one_group() -> None:
    writer = GPTQWriter(Scheme(bits=4))
    assert writer.settings()["group_size"] == -1, f"got {writer.settings()}. {GPTQ_WRITER}"
    got = writer.tensors("a", codes_of([[1] * 16]))["a.g_idx"].tolist()
    assert got == [0] * 16, f"all columns are group 0: got {got}. {GPTQ_WRITER}"


@pytest.mark.parametrize(
    ("scheme", "format", "weights", "inputs"),
    [
        (
            Scheme(bits=4, group_size=128), "pack-quantized",
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}, None,
        ),
        (
            Scheme(bits=8, is_symmetric=False), "pack-quantized",
            {"num_bits": 8, "type": "int", "strategy": "channel", "group_size": None, "symmetric": False}, None,
        ),
        (
            Scheme(activations="int8"), "int-quantized",
            {"num_bits": 8, "type": "int", "strategy": "channel", "group_size": None, "symmetric": True}, "int",
        ),
        (
            Scheme("fp8", group_size=128), "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "symmetric": True}, None,
        ),
        (
            Scheme("fp8", activations="fp8"), "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None, "symmetric": True}, "float",
        ),
    ],
)  # fmt: skip
def test_compressed_tensors_settings(scheme: Scheme, format: str, weights: dict[str, Any], inputs: str | None) -> None:
    settings = CompressedTensorsWriter(scheme, torch.bfloat16).settings()
    found = settings["quant_method"], settings["format"], settings["quantization_status"]
    assert found == ("compressed-tensors", format, "compressed"), f"got {found}. {COMPRESSED}"
    group = settings["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and group["weights"] == {**weights, "dynamic": False}, (
        f"{group}. {COMPRESSED}"
    )
    wanted = None
    if inputs is not None:
        wanted = {"num_bits": 8, "type": inputs, "strategy": "token", "symmetric": True, "dynamic": True}
    assert group["input_activations"] == wanted and group["output_activations"] is None, f"got {group}. {COMPRESSED}"


@pytest.mark.parametrize("name", ["lm_head", "model.layers.3.mlp.gate", "model.layers.0.block_sparse_moe.gate",
                                  "model.layers.1.mlp.shared_expert_gate"])  # fmt: skip
def test_gates_are_ignored(name: str) -> None:
    settings = CompressedTensorsWriter(Scheme(bits=4, group_size=16), torch.bfloat16).settings()
    layout_for = choose_layouts(mock.Mock(quantization_config=settings), QuantizationFlags())
    assert layout_for is not None and layout_for(name) is None, (
        f"{name} isn't quantized. {WRITER.format('NOT_QUANTIZED')}"
    )
    name = "model.layers.3.mlp.gate_proj"
    assert layout_for(name) is not None, f"{name} is quantized. {WRITER.format('NOT_QUANTIZED')}"


# A whole checkpoint


def test_a_checkpoint_is_complete(
    models: Callable[..., Checkpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "some" / "out"
    shutil.copytree(models().directory, source)  # type: ignore[arg-type]
    (source / "training.json").write_text("{}")  # which isn't true of what is written
    quantize.run(flags(source, out, method="gptq"))
    weights = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    found = sorted(file.name for file in out.iterdir())
    assert found == sorted([*weights, "config.json", "model.safetensors.index.json", *TOKENIZER_FILES]), (
        f"got {found}. {QUANTIZER.format('_finish')}"
    )
    for name in TOKENIZER_FILES:
        same = (out / name).read_bytes() == (source / name).read_bytes()
        assert same, f"{name} changed. {QUANTIZER.format('_finish')}"
    config, wanted = (json.loads((each / "config.json").read_text()) for each in (out, source))
    settings = config.pop("quantization_config")
    assert config == wanted, f"config.json: expected {wanted} and quantization_config. {QUANTIZER.format('_finish')}"
    assert settings["format"] == "pack-quantized", f"got {settings}. {QUANTIZER.format('_finish')}"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = {}
    for file in weights:
        with safe_open(out / file, framework="pt") as opened:
            names |= dict.fromkeys(opened.keys(), file)
            assert opened.metadata() == {"format": "pt"}, f"which transformers wants. {WRITE_TENSORS}"
    assert index["weight_map"] == names, f"the index isn't what the files have. {QUANTIZER.format('_finish')}"
    others = [name for name, file in names.items() if (file == weights[0]) != (".layers.0." in name)]
    assert not others, f"the first file has layer 0: {others} are in another one's. {QUANTIZER.format('_quantize')}"
    size = sum(tensor.nbytes for file in weights for tensor in load_file(out / file).values())
    assert index["metadata"]["total_size"] == size, (
        f"all tensors have {size} bytes: got {index['metadata']}. {QUANTIZER.format('_finish')}"
    )
    output = " ".join(capsys.readouterr().out.split())
    # 48 · (48 + 16 + 16 + 48 + 3 · 96) weights in each of 2 layers; 4 bits, and 32 of 16 weights' scale
    assert "39,936 weights of linear layers: 6.00 bits each with scales, 2.67 times smaller" in output, (
        f"got {output}. See quantize.py::run."
    )


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        (dict(group_size=16), 4 + 32 / 16),
        (dict(group_size=16, symmetric=False), 4 + (32 + 8) / 16),
        (dict(group_size=8, bits=8), 8 + 32 / 8),
    ],
)
def test_bits_of_a_weight(
    changes: dict[str, Any], bits: float, models: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    quantizer = Quantizer(flags(models().directory, tmp_path / "out", **changes))
    quantizer.run(mock.Mock())
    got = 8 * quantizer.num_bytes / quantizer.num_weights
    assert got == bits, f"{changes}: expected {bits} bits for each weight, got {got}. {QUANTIZER.format('_load')}"


def test_rows_are_not_longer_than_the_model_allows(tmp_path: Path) -> None:
    checkpoint = save_model(tmp_path / "model", max_position_embeddings=24)
    rows = list[Any]()
    with mock.patch.object(quantize, "TextRunner", lambda model, given: rows.extend(given) or TextRunner(model, given)):
        write(flags(checkpoint.directory, tmp_path / "out", method="gptq"))
    found = len(rows), {len(row) for row in rows}
    assert found == (NUM_ROWS, {24}), f"4 rows of at most 24 tokens: got {found}. {QUANTIZER.format('run')}"


def test_rows_that_are_longer_than_all_texts(models: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """There are none then, and gptq would round to nearest in silence."""
    quantizer = Quantizer(flags(models().directory, tmp_path / "out", method="gptq", row_tokens=10**6))
    allowed = mock.patch.object(Checkpoint, "max_model_len", 10**6)
    with allowed, refused("row_tokens", "expected at most .*, got 1000000", "See corpus.py::calibration_rows."):
        quantizer.run(mock.Mock())


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, cuda is allowed")
def test_cuda_without_a_gpu() -> None:
    with refused("device", "expected cpu, or cuda where torch sees a GPU", "See quantize.py::QuantizeConfig."):
        flags("tiny", Path("out"), device="cuda")


@torch.inference_mode()
def test_a_layer_stays_on_its_device(models: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """The device "meta" stands for a GPU here."""
    directory = models().directory
    out = write(flags(directory, tmp_path / "out", symmetric=False))
    quantizer = Quantizer(flags(directory, tmp_path / "other", symmetric=False))
    layer = quantizer.model.to("meta").layers["0"]
    quantizer._load(layer, "model.layers.0", out / "model-00001-of-00003.safetensors")
    devices = {name: parameter.device.type for name, parameter in layer.named_parameters()}
    assert set(devices.values()) == {"meta"}, f"got {devices}. {QUANTIZER.format('_load')}"


# Interruptions


class Interrupted(Exception):
    """Ctrl-C, say."""


def report_until(num_layers: int) -> mock.Mock:
    """A progress bar that interrupts the run when so many layers are done."""
    results = [None] * (num_layers - 1) + [Interrupted()]
    return mock.Mock(advance=mock.Mock(side_effect=results))


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def interrupted(config: QuantizeConfig, num_layers: int) -> None:
    with pytest.raises(Interrupted):
        Quantizer(config).run(report_until(num_layers))


@pytest.fixture
def quantized_layers() -> Iterator[list[Any]]:
    """The layers that a method has quantized."""
    found = list[Any]()
    original = Method.quantize_layer

    def quantize_layer(method: Method, layer: Any, stats: Any) -> Any:
        found.append(layer)
        return original(method, layer, stats)

    with mock.patch.object(Method, "quantize_layer", quantize_layer):
        yield found


RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("llama", dict(method="rtn")),
    "gptq": ("llama", dict(method="gptq", symmetric=False)),
    "awq": ("llama", dict(method="awq")),
    "smoothquant": ("llama", dict(method="smoothquant", bits=8, group_size=-1)),
    "gptq layout": ("llama", dict(method="gptq", layout="gptq")),
    "experts": ("qwen3_moe", dict(method="gptq")),
}


def same_files(got: Path, expected: Path, what: str) -> None:
    a, b = contents(got), contents(expected)
    different = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    assert not different, f"{what}: {different} aren't those of a run without interruptions. {QUANTIZER.format('run')}"


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_continues(
    name: str, models: Callable[..., Checkpoint], tmp_path: Path, quantized_layers: list[Any]
) -> None:
    """In bfloat16, so that what is stored differs from what is in memory."""
    family, changes = RESUMED[name]
    directory = models(family, num_hidden_layers=4, dtype=torch.bfloat16).directory
    expected = write(flags(directory, tmp_path / "expected", **changes))
    config = flags(directory, tmp_path / "out", **changes)
    for num_done, num_new in ((1, 1), (3, 2)):  # the second run is interrupted as well
        quantized_layers.clear()
        interrupted(config, num_done)
        assert len(quantized_layers) == num_new, (
            f"{name}: {len(quantized_layers)} layers. {QUANTIZER.format('_has_file')}"
        )
        assert not (tmp_path / "out" / "config.json").exists(), (
            f"an unfinished checkpoint. {QUANTIZER.format('_finish')}"
        )
    quantized_layers.clear()
    out = write(config)
    assert len(quantized_layers) == 1, (
        f"{name}: 3 of 4 layers were done: expected 1 to be quantized, got {len(quantized_layers)}. "
        f"{QUANTIZER.format('_has_file')}"
    )
    same_files(out, expected, f"{name}, interrupted after layers 1 and 3")


@pytest.mark.parametrize(("layer", "size"), [(0, 0), (0, 100), (0, -1), (1, 4), (2, 0), (2, -1)])
def test_a_truncated_file_is_written_again(
    layer: int, size: int, models: Callable[..., Checkpoint], tmp_path: Path, quantized_layers: list[Any]
) -> None:
    """After a power failure, say."""
    directory = models(num_hidden_layers=4).directory
    config = flags(directory, tmp_path / "out")
    interrupted(config, 3)
    file = tmp_path / "out" / f"model-0000{layer + 1}-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    quantized_layers.clear()
    out = write(config)
    assert len(quantized_layers) == 2, (
        f"layer {layer}'s file has {size} bytes, layer 3's isn't there: expected 2 layers to be quantized, got "
        f"{len(quantized_layers)}. {QUANTIZER.format('_has_file')}"
    )
    same_files(out, write(flags(directory, tmp_path / "expected")), f"layer {layer}'s file had {size} bytes")


def test_a_run_that_is_interrupted_at_the_end(
    models: Callable[..., Checkpoint], tmp_path: Path, quantized_layers: list[Any]
) -> None:
    """All layers are there, and a file for what isn't in layers, which has no end."""
    config = flags(models().directory, tmp_path / "out")
    with mock.patch.object(quantize.shutil, "copyfile", side_effect=Interrupted), pytest.raises(Interrupted):
        write(config)
    assert not (tmp_path / "out" / "config.json").exists(), f"config.json comes last. {QUANTIZER.format('_finish')}"
    file = tmp_path / "out" / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:1_000])
    quantized_layers.clear()
    out = write(config)
    assert not quantized_layers, f"{len(quantized_layers)} layers were quantized again. {QUANTIZER.format('_has_file')}"
    same_files(out, write(flags(models().directory, tmp_path / "expected")), "interrupted at the end")


def test_a_file_is_there_in_whole_or_not_at_all(tmp_path: Path) -> None:
    def save_file(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise Interrupted

    with mock.patch.object(quantize, "save_file", save_file), pytest.raises(Interrupted):
        quantize.write_tensors({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert not list(tmp_path.glob("*.safetensors")), f"got {list(tmp_path.iterdir())}. {WRITE_TENSORS}"


def test_a_file_gets_its_name_when_it_is_on_the_disk(tmp_path: Path) -> None:
    """A power failure after the renaming must not leave an empty file with the right name."""
    with mock.patch("os.fsync", side_effect=Interrupted), pytest.raises(Interrupted):
        quantize.write_tensors({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    found = list(tmp_path.glob("*.safetensors"))
    assert not found, f"{found} was renamed before it was written to the disk. See quantize.py::replace."


def test_a_full_disk(tmp_path: Path) -> None:
    """An error that the command line reports in one line."""
    full = mock.patch.object(quantize, "save_file", side_effect=SafetensorError("No space left on device"))
    with full, pytest.raises(OSError, match="cannot write .*model.unfinished: No space left"):
        quantize.write_tensors({"a": torch.ones(3)}, tmp_path / "model.safetensors")


def test_a_view_is_written_as_a_tensor(tmp_path: Path) -> None:
    """The columns of a matrix aren't one run of memory, which safetensors wants."""
    matrix = torch.arange(6.0).view(2, 3)
    quantize.write_tensors({"a": matrix.T}, tmp_path / "model.safetensors")
    got = load_file(tmp_path / "model.safetensors")["a"]
    assert torch.equal(got, matrix.T), f"expected {matrix.T.tolist()}, got {got.tolist()}. {WRITE_TENSORS}"


KILLED_IN_LAYER_3 = """
import os, signal
from part14_quantization import quantize

original, files = quantize.save_file, []

def save_file(tensors, file, metadata):
    files.append(file)
    if len(files) == 3:
        file.write_bytes(b"half of a file")
        os.kill(os.getpid(), signal.SIGKILL)
    original(tensors, file, metadata)

quantize.save_file = save_file
quantize.main()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL is for POSIX")
def test_a_process_that_is_killed(tmp_path: Path, quantized_layers: list[Any]) -> None:
    """SIGKILL, while `tiny`'s third layer is written."""
    config = flags("tiny", tmp_path / "out", method="smoothquant", bits=8, group_size=-1)
    given = {name: value for name, value in asdict(config).items() if name not in ("model", "symmetric", "device")}
    arguments = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", KILLED_IN_LAYER_3, "tiny", *arguments], cwd=ROOT, env=os.environ | threads,
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == -9, f"ended with {process.returncode}: {process.stderr[-500:]}"
    found = sorted(file.name for file in (tmp_path / "out").iterdir())
    done = [f"model-0000{number}-of-00007.safetensors" for number in (1, 2)]
    assert found == [*done, "model-00003-of-00007.unfinished", "quantize.json"], f"got {found}. {WRITE_TENSORS}"
    out = write(config)
    assert len(quantized_layers) == 4, (
        f"2 of 6 layers were done: expected 4 to be quantized, got {len(quantized_layers)}. "
        f"{QUANTIZER.format('_has_file')}"
    )
    same_files(out, write(replace(config, out=str(tmp_path / "expected"))), "killed in layer 3")


CHANGED: dict[str, dict[str, Any]] = {
    "method": dict(method="awq"),
    "bits": dict(bits=8),
    "group size": dict(group_size=8),
    "zero points": dict(symmetric=False),
    "format": dict(format="fp8", bits=8, group_size=-1),
    "activations": dict(W8A8),
    "layout": dict(layout="gptq"),
    "rows": dict(num_rows=5),
    "tokens in a row": dict(row_tokens=33),
}


@pytest.fixture
def unfinished(models: Callable[..., Checkpoint], tmp_path: Path) -> QuantizeConfig:
    config = flags(models().directory, tmp_path / "out")
    interrupted(config, 1)
    return config


@pytest.mark.parametrize("change", CHANGED)
def test_other_flags_need_another_directory(change: str, unfinished: QuantizeConfig) -> None:
    before = contents(Path(unfinished.out))
    with refused("out", "out: .* has an unfinished run with another model or other flags", DIRECTORY):
        Quantizer(replace(unfinished, **CHANGED[change]))
    assert contents(Path(unfinished.out)) == before, f"{change}: the directory changed. {DIRECTORY}"


def test_another_model_needs_another_directory(unfinished: QuantizeConfig, tmp_path: Path) -> None:
    """One of the same shape: another training of it."""
    other = save_model(tmp_path / "other", seed=1)
    with refused("out", "unfinished run with another model or other flags: expected another directory", DIRECTORY):
        Quantizer(replace(unfinished, model=str(other.directory)))


def test_the_same_model_elsewhere(unfinished: QuantizeConfig, tmp_path: Path) -> None:
    shutil.copytree(unfinished.model, tmp_path / "copy")
    write(replace(unfinished, model=str(tmp_path / "copy"), device="cpu"))  # and on a device that is named


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_state(text: str, unfinished: QuantizeConfig) -> None:
    (Path(unfinished.out) / "quantize.json").write_text(text)
    with refused("out", "expected another directory", DIRECTORY):
        Quantizer(unfinished)


def test_a_state_that_was_not_written_yet(models: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """A run was killed just after it had made the file: nothing else is there, so there is nothing to mix up."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "quantize.json").touch()
    out = write(flags(models().directory, tmp_path / "out"))
    assert (out / "config.json").is_file(), f"got {sorted(contents(out))}. {DIRECTORY}"


def test_two_runs_at_once(unfinished: QuantizeConfig) -> None:
    first = Quantizer(unfinished)
    with refused("out", "another run is writing to", DIRECTORY):
        Quantizer(unfinished)
    first.run(Progress(disable=True))


def test_a_directory_that_has_other_files(models: Callable[..., Checkpoint], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with refused("out", "out: .* isn't empty: expected an empty or a new directory", DIRECTORY):
        Quantizer(flags(models().directory, tmp_path))
    assert contents(tmp_path) == {"notes.txt": b"mine"}, f"the directory changed. {DIRECTORY}"


def test_a_finished_run_is_not_continued(models: Callable[..., Checkpoint], tmp_path: Path) -> None:
    config = flags(models().directory, tmp_path / "out")
    write(config)
    with refused("out", "isn't empty", DIRECTORY):
        Quantizer(config)


def test_a_quantized_model_is_refused(models: Callable[..., Checkpoint], tmp_path: Path) -> None:
    for layout, method in (("compressed-tensors", "compressed-tensors"), ("gptq", "gptq")):
        out = write(flags(models().directory, tmp_path / layout, layout=layout))
        message = rf"is quantized \({method}\): expected weights in one of F32, F16, BF16"
        with refused("model", message, QUANTIZER.format("__init__")):
            Quantizer(flags(out, tmp_path / "again"))
        assert not (tmp_path / "again").exists(), f"a directory was made for nothing. {QUANTIZER.format('__init__')}"


# Flags


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        (dict(bits=3), "bits", "expected 4 or 8, got 3"),
        (dict(bits=16), "bits", "expected 4 or 8, got 16"),
        (dict(group_size=0), "group_size", "expected -1 or an even number above 0, got 0"),
        (dict(group_size=7), "group_size", "expected -1 or an even number above 0, got 7"),
        (dict(group_size=1), "group_size", "got 1"),
        (dict(group_size=-2), "group_size", "got -2"),
        (dict(device="tpu"), "device", "expected cpu, or cuda where torch sees a GPU, got 'tpu'"),
        (dict(num_rows=0), "num_rows", "expected at least 1, got 0"),
        (dict(row_tokens=0), "row_tokens", "expected at least 1, got 0"),
        (dict(method="smoothquant"), "activations", "W8A8 needs --bits 8 --group-size -1, symmetric, and --format int"),
        (dict(method="smoothquant", bits=8), "activations", "W8A8 needs"),
        (dict(method="smoothquant", group_size=-1), "activations", "W8A8 needs"),
        (dict(activations="int8", bits=8, group_size=-1, symmetric=False), "activations", "W8A8 needs"),
        (dict(activations="int8", bits=8, group_size=-1, format="fp8"), "activations", "W8A8 needs"),
        (dict(format="fp8"), "format", "fp8 needs --bits 8 --group-size -1 --method rtn, symmetric"),
        (dict(format="fp8", bits=8), "format", "fp8 needs"),
        (dict(format="fp8", bits=8, group_size=-1, method="gptq"), "format", "fp8 needs"),
        (dict(format="fp8", bits=8, group_size=-1, symmetric=False), "format", "fp8 needs"),
        (dict(format="fp8", group_size=-1), "format", "fp8 needs"),
        (dict(format="fp8", bits=8, group_size=-1, layout="gptq"), "layout", "gptq has only integers"),
        (dict(**W8A8, layout="gptq"), "layout", "gptq has only integers, and no activations"),
        (dict(method="smoothquant", bits=8, group_size=-1, layout="gptq"), "layout", "expected compressed-tensors"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(changes: dict[str, Any], field: str, message: str) -> None:
    with refused(field, re.escape(message), "See quantize.py::QuantizeConfig."):
        flags("tiny", Path("out"), **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Scheme(bits=4, group_size=16)),
        (dict(bits=8, group_size=-1), Scheme(bits=8)),
        (dict(symmetric=False), Scheme(bits=4, group_size=16, is_symmetric=False)),
        (dict(format="fp8", bits=8, group_size=-1), Scheme("fp8", bits=8)),
        (dict(**W8A8), Scheme(bits=8, activations="int8")),
        (dict(method="smoothquant", bits=8, group_size=-1), Scheme(bits=8, activations="int8")),
    ],
)
def test_the_scheme_of_flags(changes: dict[str, Any], expected: Scheme) -> None:
    got = flags("tiny", Path("out"), **changes).scheme
    assert got == expected, f"{changes}: expected {expected}, got {got}. See quantize.py::QuantizeConfig.scheme."


def test_groups_that_do_not_fit(models: Callable[..., Checkpoint], tmp_path: Path) -> None:
    with refused("group_size", "expected a divisor of 48, the input features of", "See quantize.py::Quantizer."):
        write(flags(models().directory, tmp_path / "out", group_size=128))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out"], "argument --out: expected one argument"),
        (["--out", "OUT", "--method", "rnt"], "argument --method: invalid choice: 'rnt'"),
        (["--out", "OUT", "--bits", "5"], "error: --bits: expected 4 or 8, got 5"),
        (["--out", "OUT", "--no-symmetric", "--format", "fp8"], "error: --format: fp8 needs --bits 8"),
        (["--group-size", "8", "--out", "FULL"], "out: FULL isn't empty: expected an empty or a new directory"),
        (["--group-size", "8", "--out", "FULL/file"], "out: FULL/file is not a directory"),
    ],
)  # fmt: skip
def test_errors_on_the_command_line(
    arguments: list[str], message: str, models: Callable[..., Checkpoint], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One line, and exit status 2."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    places = {"OUT": str(tmp_path / "out"), "FULL": str(tmp_path / "full")}
    for name, place in places.items():
        arguments, message = [each.replace(name, place) for each in arguments], message.replace(name, place)
    directory = str(models().directory)
    capsys.readouterr()  # what transformers has written
    with mock.patch("sys.argv", ["quantize", directory, *arguments]), pytest.raises(SystemExit) as caught:
        quantize.main()
    output = capsys.readouterr()
    assert caught.value.code == 2 and message in output.err, (
        f"{arguments}: expected status 2 and {message!r}, got {caught.value.code} and {output.err!r}. "
        "See quantize.py::main."
    )
    assert output.err.count("\n") == 1 and not (tmp_path / "out").exists(), f"got {output.err}"


def test_a_run_from_the_command_line(models: Callable[..., Checkpoint], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--method", "rtn", "--group-size", "16", "--layout", "gptq", "--no-symmetric"]
    with mock.patch("sys.argv", ["quantize", str(models().directory), *arguments]):
        quantize.main()
    settings = AutoConfig.from_pretrained(out).quantization_config
    assert (settings["quant_method"], settings["sym"], settings["bits"]) == ("gptq", False, 4), f"got {settings}"
