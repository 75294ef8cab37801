"""common/checkpoint.py: find a model by name, load its weights, and report clearly what is missing or broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import checkpoint
from common.checkpoint import MODELS_DIR, check_safetensors, load_model, load_tokenizer, resolve_checkpoint
from common.errors import FieldError
from common.testing import small_model

PRESET = dict(
    model_type="llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=64, vocab_size=4096, max_position_embeddings=128, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small random model in the Hugging Face layout, with the shipped tokenizer."""
    path = tmp_path / "small"
    small_model("llama", seed=1).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).symlink_to(MODELS_DIR / "tiny" / name)
    return path


def refused(model: str | Path, *words: str, load: bool = False) -> None:
    with pytest.raises(FieldError) as caught:
        found = resolve_checkpoint(str(model))
        if load:
            load_tokenizer(found)
            load_model(found, torch.float32, "cpu")
    assert caught.value.field == "model", f"the error blames {caught.value.field!r}, expected 'model'"
    message = str(caught.value)
    assert "\n" not in message, f"an error is one line: {message!r}"
    for word in words:
        assert word in message, f"expected {word!r} in {message!r}"


def test_a_shipped_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # shipped models are found from anywhere
    found = resolve_checkpoint("tiny")
    assert found.directory == found.tokenizer_directory == MODELS_DIR / "tiny"
    assert (found.name, found.max_model_len) == ("tiny", 2048)
    eos = load_tokenizer(found).eos_token_id
    assert found.eos_token_ids == {eos}, (
        f"the model's end tokens are {set(found.eos_token_ids)}, its tokenizer on {eos}"
    )


def test_a_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory.parent)
    for model in (str(directory), "small", "./small"):
        found = resolve_checkpoint(model)
        assert (found.name, found.max_model_len) == (model, 256)
        assert found.directory is not None and found.directory.resolve() == directory.resolve()
    expected = small_model("llama", seed=1).state_dict()
    loaded = load_model(found, torch.float32, "cpu")
    assert not loaded.training and loaded.dtype == torch.float32
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), f"{name} was loaded with other values than it was saved with"
    assert load_model(found, torch.bfloat16, "cpu").dtype == torch.bfloat16


def write_generation_config(directory: Path, content: object) -> None:
    (directory / "generation_config.json").write_text(json.dumps(content))


def test_sampling_defaults_come_from_the_generation_config(directory: Path) -> None:
    named = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.05}
    write_generation_config(directory, {**named, "max_new_tokens": 9, "do_sample": True, "eos_token_id": 2})
    assert resolve_checkpoint(str(directory)).default_sampling == named
    write_generation_config(directory, {"temperature": 3.0})
    assert resolve_checkpoint(str(directory)).default_sampling == {"temperature": 3.0}, "only requests are limited to 2"
    write_generation_config(directory, {"temperature": None})
    assert resolve_checkpoint(str(directory)).default_sampling == {}
    assert resolve_checkpoint("random:llama-110m").default_sampling == {}
    assert resolve_checkpoint("tiny").default_sampling == {"temperature": 0.3}
    write_generation_config(directory, {"temperature": "hot"})
    with pytest.raises(FieldError, match="generation_config.json: temperature: expected a number") as caught:
        resolve_checkpoint(str(directory))
    assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("generation_config", "config_eos", "expected"),
    [
        ({"eos_token_id": [7, 9]}, 3, {7, 9}),
        ({"eos_token_id": 7}, 3, {7}),
        ({"eos_token_id": 0}, 3, {0}),
        ({"eos_token_id": None}, 3, {3}),
        ({}, [3, 4], {3, 4}),
        (None, 3, {3}),
        (None, None, set()),
        ({}, None, set()),
    ],
    ids=str,
)
def test_eos_ids_come_from_the_generation_config_first(
    directory: Path, generation_config: dict | None, config_eos: object, expected: set[int]
) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "eos_token_id": config_eos}))
    (directory / "generation_config.json").unlink(missing_ok=True)
    if generation_config is not None:
        write_generation_config(directory, generation_config)
    got = resolve_checkpoint(str(directory)).eos_token_ids
    assert got == expected, f"generation_config.json {generation_config}, config.json {config_eos}: got {set(got)}"


@pytest.mark.parametrize("model", ["owner/no-such-model", "Qwen/Qwen3-0.6B-absent"])
def test_a_hugging_face_id_while_offline(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    refused(model, repr(model), "not a directory", "could not be downloaded")


@pytest.mark.parametrize(
    "model", ["tinny", "", ".", "..", "/no/such/place", "./no/such", "a/b/c", "~/no-such", "../models", "training"]
)
def test_an_unknown_name(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    if model in (".", ".."):
        refused(model, "has no config.json")
    else:
        refused(model, repr(model), "neither a shipped model (", "tiny", "owner/name", "random:")


def test_a_bad_hugging_face_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    refused("owner/what is this?", "'owner/what is this?'", "could not be downloaded")


def test_a_directory_with_something_missing(directory: Path, tmp_path: Path) -> None:
    for name, word in (
        ("tokenizer_config.json", ""),
        ("tokenizer.json", "no tokenizer.json"),
        ("model.safetensors", "no *.safetensors"),
        ("config.json", "no config.json"),
    ):
        (directory / name).unlink()
        if word:
            refused(directory, str(directory), word)
        else:
            assert resolve_checkpoint(str(directory)), "tokenizer.json alone is enough"


def test_a_pickle_is_not_a_weight_file(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(directory, "safetensors only")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b"{", ["config.json", "cannot be read"]),
        ("config.json", b'{"model_type": "no-such-family"}', ["config.json", "cannot be read", "no-such-family"]),
        ("config.json", b'{"model_type": "t5", "eos_token_id": 1}', ["T5Config"]),
        ("generation_config.json", b"{", ["generation_config.json", "cannot be read"]),
        ("generation_config.json", b"[1]", ["generation_config.json", "cannot be read"]),
        ("tokenizer.json", b"{", ["bad tokenizer"]),
        ("tokenizer.json", b'{"version": "1.0"}', ["bad tokenizer"]),
        ("model.safetensors", b"", ["model.safetensors", "corrupt"]),
        ("model.safetensors", b"\x80" * 4000, ["model.safetensors", "corrupt"]),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0{}", ["21 tensors are missing", "lm_head.weight"]),
    ],
)
def test_a_broken_file(directory: Path, name: str, content: bytes, words: list[str]) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).write_bytes(content)
    refused(directory, str(directory), *words, load=True)


def test_truncated_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    check_safetensors(directory)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FieldError, match="^model: .*model.safetensors is corrupt"):
        check_safetensors(directory)


def test_tensors_missing_or_of_another_shape(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    refused(directory, "1 tensors are missing", "model.norm.weight", load=True)
    save_file({**tensors, "model.norm.weight": norm[:7].clone()}, path, metadata={"format": "pt"})
    refused(directory, "wrong shape", "model.norm.weight", load=True)


# Random weights


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(checkpoint.PRESETS, "small", PRESET)
    return "random:small"


def weights(model: str) -> dict[str, Any]:
    return load_model(resolve_checkpoint(model), torch.float32, "cpu").state_dict()


def test_a_preset_is_seeded_and_leaves_the_global_generator_alone(preset: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = weights(preset)
    assert torch.equal(torch.get_rng_state(), before), "making random weights moved torch's global generator"
    torch.manual_seed(6)
    second = weights(preset)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} of {preset} differs between two loads: it must be seeded"
    embedding = first["model.embed_tokens.weight"]
    assert embedding.std() > 0, "random weights that are all the same"


def test_a_preset_uses_the_shipped_tokenizer(preset: str) -> None:
    found = resolve_checkpoint(preset)
    assert found.directory is None and found.max_model_len == 128
    assert found.eos_token_ids == resolve_checkpoint("tiny").eos_token_ids
    assert load_tokenizer(found).decode(load_tokenizer(found).encode("Hi there")) == "Hi there"
    assert PRESET["model_type"] == "llama", "resolving a preset must not change the table of presets"


def test_an_unknown_preset(preset: str) -> None:
    for model in ("random:", "random:smaall", "random:random:small"):
        refused(model, "unknown preset", repr(model.removeprefix("random:")), "llama-110m", "small")


@pytest.mark.parametrize("name", sorted(checkpoint.PRESETS))
def test_the_shipped_presets_describe_real_models(name: str) -> None:
    found = resolve_checkpoint(f"random:{name}")
    config = found.config
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.vocab_size >= 4096, "the shipped tokenizer's ids must exist in the model"
    for key, value in checkpoint.PRESETS[name].items():
        got = config.rope_parameters["rope_theta"] if key == "rope_theta" else getattr(config, key)
        assert got == value, f"{name}: {key} is {got}, the table says {value}"


@pytest.mark.parametrize(
    ("name", "millions"), [("llama-110m", (105, 115)), ("qwen3-0.6b", (590, 600)), ("qwen3-8b", (8_150, 8_250))]
)
def test_the_shipped_presets_have_the_size_they_say(name: str, millions: tuple[int, int]) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(resolve_checkpoint(f"random:{name}").config)
    got = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions[0] < got < millions[1], f"{name}: expected {millions} million parameters, got {got:.1f}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_attention_heads", 7),
        ("num_attention_heads", 0),
        ("hidden_size", "big"),
        ("vocab_size", -5),
        ("max_position_embeddings", 0),
        ("num_hidden_layers", 1.5),
        ("num_key_value_heads", 5),
    ],
)
def test_a_config_that_no_model_can_have(directory: Path, name: str, value: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(FieldError) as caught:
        resolve_checkpoint(str(directory))
    message = str(caught.value)
    assert "config.json" in message and "\n" not in message, f"{name} = {value!r}: got {message!r}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_numbers(directory: Path, value: float) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[1]
    tensors[name].view(-1)[3] = value
    save_file(tensors, path, metadata={"format": "pt"})
    refused(directory, name, "NaN or infinity", load=True)


def test_weights_that_are_quantized(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith("proj.weight"))
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, path, metadata={"format": "pt"})
    refused(directory, name, "I8", "F32", load=True)


@pytest.mark.parametrize("template", ["{{ messages[0", "{{ raise_exception('no') }}", "{% for m in %}"])
def test_a_broken_chat_template_is_told_at_the_start(directory: Path, template: str) -> None:
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.jinja").write_text(template)
    refused(directory, "bad chat template", load=True)
