"""worker/weights.py and worker/linear.py: layers load every tensor of a checkpoint; an error names the tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from common import checkpoint as checkpoints
from common.checkpoint import PRESETS, load_model, resolve_checkpoint
from common.checkpoint_reader import SafetensorsReader
from common.errors import FieldError
from common.testing import FAMILIES, small_model
from part03_paged_attention.worker.model import DecoderModel
from part03_paged_attention.worker.weights import load_decoder, load_layers

WHERE = 'Look at worker/linear.py and worker/weights.py::load_layers; README "Half 1: a model of our own".'
NANO = dict(
    model_type="qwen3", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=64, vocab_size=4096, max_position_embeddings=128, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path, random_model: Any) -> Path:
    """A small qwen2, untied, in one file: biases and an output layer of its own."""
    random_model("qwen2", seed=1).save_pretrained(tmp_path)
    return tmp_path


def same_parameters(got: DecoderModel, expected: DecoderModel, what: str) -> None:
    pairs = zip(got.named_parameters(), expected.parameters(), strict=True)
    different = [name for (name, a), b in pairs if not torch.equal(a, b)]
    assert not different, f"{what}: expected the same parameters, {different} differ. {WHERE}"


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_projections_hold_queries_then_keys_then_values(family: str, random_model: Any, load_ours: Any) -> None:
    reference = random_model(family, seed=1, **({} if family == "qwen2" else {"attention_bias": True}))
    model = load_ours(reference)
    for number, (ours, theirs) in enumerate(zip(model.layers, reference.model.layers, strict=True)):
        attention, mlp = theirs.self_attn, theirs.mlp
        parts = {
            "qkv_proj": (ours.self_attn.qkv_proj, (attention.q_proj, attention.k_proj, attention.v_proj)),
            "gate_up_proj": (ours.mlp.gate_up_proj, (mlp.gate_proj, mlp.up_proj)),
        }
        for name, (merged, projections) in parts.items():
            for kind in ("weight", "bias"):
                if (got := getattr(merged, kind)) is None:
                    assert projections[0].bias is None, f"layer {number}: {name} lost its bias. {WHERE}"
                    continue
                expected = torch.cat([getattr(projection, kind) for projection in projections])
                assert torch.equal(got, expected), (
                    f"{family}, layer {number}: {name}.{kind} must be its projections' rows, one below the other: "
                    f"expected {list(expected.shape)}, got {list(got.shape)} or other values. {WHERE}"
                )


class Recorder:
    """A reader that keeps what layers ask for, and answers with ones."""

    source = "a test"

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.shapes, self.unread = device, dict[str, list[int]](), set[str]()

    def read(self, name: str, shape: tuple[int, ...], index: tuple[slice, ...] = ()) -> Tensor:
        assert name not in self.shapes, f"{name} is read twice. {WHERE}"
        self.shapes[name] = list(shape)
        return torch.ones(shape, device=self.device)[index]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_read_transformers_tensors_and_fill_every_parameter(family: str, random_model: Any) -> None:
    for seed in (0, 1):
        reference = random_model(family, seed)
        model, reader = DecoderModel(reference.config), Recorder()
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        load_layers(model, reader)
        expected = {name: list(parameter.shape) for name, parameter in reference.named_parameters()}
        assert reader.shapes == expected, (
            f"{family}: tensors (name, shape) that only the layers read or only transformers has: "
            f"{odd(reader.shapes, expected)}. {WHERE}"
        )
        unfilled = [name for name, parameter in model.named_parameters() if not (parameter == 1).all()]
        assert not unfilled, f"{family}: expected every parameter to be loaded, {unfilled} are not. {WHERE}"


@pytest.mark.parametrize("preset", [name for name, shape in PRESETS.items() if shape["model_type"] in FAMILIES])
def test_the_shapes_of_the_presets(preset: str) -> None:
    config, reader = resolve_checkpoint(f"random:{preset}").config, Recorder("meta")
    with torch.device("meta"):
        model, reference = DecoderModel(config), AutoModelForCausalLM.from_config(config)
    load_layers(model, reader)
    expected = {name: list(parameter.shape) for name, parameter in reference.named_parameters()}
    assert reader.shapes == expected, f"{preset}: (name, shape) in one only: {odd(reader.shapes, expected)}. {WHERE}"


def odd(got: dict[str, list[int]], expected: dict[str, list[int]]) -> list[tuple[str, list[int]]]:
    """Up to 4 entries that only one of the two has."""
    return [item for a, b in ((got, expected), (expected, got)) for item in a.items() if b.get(item[0]) != item[1]][:4]


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_equal_a_single_file(family: str, tmp_path: Path, random_model: Any, load_directory: Any) -> None:
    reference = random_model(family, seed=1)
    reference.save_pretrained(tmp_path / "single")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    num_files = len(list((tmp_path / "shards").glob("*.safetensors")))
    assert num_files > 2, f"the test wants several shards, transformers wrote {num_files}"
    single, shards = load_directory(tmp_path / "single"), load_directory(tmp_path / "shards")
    same_parameters(shards, single, f"{family} in {num_files} shards against one file")


def test_dtypes_are_converted_on_the_way(tmp_path: Path, random_model: Any, load_directory: Any) -> None:
    reference = random_model("llama", seed=1)
    for stored in (torch.float32, torch.bfloat16, torch.float16):
        reference.to(stored).save_pretrained(tmp_path / str(stored))
        for wanted in (torch.float32, torch.bfloat16, torch.float16):
            model = load_directory(tmp_path / str(stored), wanted)
            got = {parameter.dtype for parameter in model.parameters()}
            assert got == {wanted}, f"stored as {stored}: expected {wanted}, got {got}. {WHERE}"
            expected = reference.model.layers[1].self_attn.v_proj.weight.to(wanted)
            rows = model.layers[1].self_attn.qkv_proj.weight[-len(expected) :]
            assert torch.equal(rows, expected), f"{stored} to {wanted}: expected the converted values. {WHERE}"


def test_a_loaded_model_is_ready_for_inference(directory: Path, load_directory: Callable[..., DecoderModel]) -> None:
    model = load_directory(directory)
    assert not model.training, "expected eval mode: look at worker/weights.py::load_decoder"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == "cpu", f"{name} is on {tensor.device}: look at worker/weights.py::load_decoder"
        assert not tensor.requires_grad, f"{name} requires gradients: look at worker/weights.py::load_decoder"
        assert bool(tensor.isfinite().all()), f"{name} was never written: look at worker/weights.py::load_decoder"


def test_weights_load_into_a_model_that_was_built_directly(directory: Path, load_directory: Any) -> None:
    model = DecoderModel(AutoConfig.from_pretrained(directory))
    with ExitStack() as stack:
        load_layers(model, SafetensorsReader(directory, stack))
    same_parameters(model, load_directory(directory), "load_layers() against load_decoder()")
    assert torch.equal(model.rotary_embedding.table, load_directory(directory).rotary_embedding.table), (
        "the table of a model that was moved off the meta device differs: look at worker/weights.py::load_decoder"
    )


def test_leftovers_of_old_checkpoints_are_ignored(tmp_path: Path, random_model: Any, load_directory: Any) -> None:
    reference = random_model("llama", seed=0)  # tied
    reference.save_pretrained(tmp_path)
    expected = load_directory(tmp_path)
    extra = {"lm_head.weight": torch.ones(320, 48), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(tmp_path, lambda tensors: tensors | extra)
    same_parameters(load_directory(tmp_path), expected, f"with {sorted(extra)} in the file")


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def refused(load: Callable[[], Any], *words: str) -> None:
    with pytest.raises(FieldError) as caught:
        load()
    assert caught.value.field == "model", f"expected the error to name 'model', got {caught.value.field!r}"
    message = str(caught.value)
    assert "\n" not in message, f"an error is one line: {message!r}"
    for word in words:
        assert word in message, f"expected {word!r} in {message!r}. {WHERE}"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.self_attn.k_proj.weight", "[16, 48]"),
        ("model.layers.0.self_attn.v_proj.bias", "[16]"),
        ("model.layers.0.mlp.up_proj.weight", "[96, 48]"),
        ("model.layers.1.post_attention_layernorm.weight", "[48]"),
        ("model.embed_tokens.weight", "[320, 48]"),
        ("model.norm.weight", "[48]"),
        ("lm_head.weight", "[320, 48]"),
    ],
)
def test_a_missing_tensor_or_one_of_another_shape_is_named(
    name: str, shape: str, directory: Path, load_directory: Any
) -> None:
    original = load_file(directory / "model.safetensors")
    rewrite(directory, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    refused(lambda: load_directory(directory), f"lacks the tensor {name}", shape, str(directory))
    wrong = torch.cat([original[name], original[name][:1]])
    rewrite(directory, lambda tensors: original | {name: wrong})
    refused(lambda: load_directory(directory), name, shape, str(list(wrong.shape)), str(directory))
    rewrite(directory, lambda tensors: original | {name: original[name][:1]})  # would broadcast if it were copied
    refused(lambda: load_directory(directory), name, shape, "[1")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.self_attn.o_proj.bias",
        "norm.weight",
        "visual.weight",
    ],
)
def test_an_unknown_tensor_is_named(name: str, directory: Path, load_directory: Any) -> None:
    rewrite(directory, lambda tensors: tensors | {name: torch.ones(7, 3)})
    refused(lambda: load_directory(directory), f"unknown tensor {name}", str(directory))


def test_a_tied_checkpoint_with_an_untied_config_lacks_its_output_layer(tmp_path: Path, load_directory: Any) -> None:
    small_model("llama", seed=1).save_pretrained(tmp_path)  # untied
    rewrite(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if name != "lm_head.weight"})
    refused(lambda: load_directory(tmp_path), "lacks the tensor lm_head.weight")


@pytest.mark.parametrize(("stored", "expected"), [("int8", "I8"), ("float8_e4m3fn", "F8_E4M3"), ("int64", "I64")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_quantized_tensor_is_named(
    name: str, stored: str, expected: str, directory: Path, load_directory: Any
) -> None:
    """Its numbers mean something only together with their scales: a silent cast would load a model of noise."""
    rewrite(directory, lambda tensors: tensors | {name: tensors[name].to(getattr(torch, stored))})
    refused(lambda: load_directory(directory), f"tensor {name} is stored as {expected}", "F32, F16, BF16")


def test_another_architecture_is_refused_before_its_weights_are_read(tmp_path: Path, load_directory: Any) -> None:
    AutoConfig.for_model("gemma2").save_pretrained(tmp_path)
    refused(lambda: load_directory(tmp_path), "gemma2", *FAMILIES)
    refused(lambda: load_decoder(resolve_checkpoint("random:moe-small"), torch.float32, "cpu"), "qwen3_moe")


def test_a_tensor_is_freed_before_the_next_is_read() -> None:
    reference = small_model("llama", seed=1)
    tensors, alive = dict(reference.named_parameters()), list[weakref.ref]()

    class Watched(Recorder):
        def read(self, name: str, shape: tuple[int, ...], index: tuple[slice, ...] = ()) -> Tensor:
            held = sum(ref() is not None for ref in alive)
            assert held <= 1, f"{held} tensors are held while {name} is read: two models in memory. {WHERE}"
            tensor = tensors[name].detach().clone()
            alive.append(weakref.ref(tensor))
            return tensor

    load_layers(DecoderModel(reference.config), Watched())
    assert len(alive) == len(tensors), f"expected {len(tensors)} tensors to be read, got {len(alive)}"


@pytest.fixture
def nano(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(checkpoints.PRESETS, "nano", NANO)
    return "random:nano"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_random_weights_are_part_1s(nano: str, dtype: torch.dtype, dense_attend: Any) -> None:
    found = resolve_checkpoint(nano)
    reference, model, again = load_model(found, dtype, "cpu"), *(load_decoder(found, dtype, "cpu") for _ in range(2))
    same_parameters(again, model, "the same preset loaded twice")
    token_ids, positions = torch.arange(100, 120), torch.arange(20)
    logits, wanted = model.compute_logits(model(token_ids, positions, dense_attend([20]))), reference(token_ids[None])
    difference = float((logits - wanted.logits[0].float()).abs().max())
    assert difference < (1e-4 if dtype == torch.float32 else 0.05), (
        f"{nano}: logits differ by {difference:.2e}. {WHERE}"
    )
