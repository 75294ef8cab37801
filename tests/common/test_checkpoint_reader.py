"""common/checkpoint_reader.py: read tensors by name, in full or in part, and report clearly what is wrong with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef

from common import checkpoint as checkpoints
from common import checkpoint_reader
from common.checkpoint import load_model, resolve_checkpoint
from common.checkpoint_reader import CheckpointReader, RandomReader, SafetensorsReader, fingerprint, open_checkpoint
from common.errors import FieldError

LOOK = "Look at common/checkpoint_reader.py::SafetensorsReader."
LOOK_RANDOM = "Look at common/checkpoint_reader.py::RandomReader."
NANO = dict(
    model_type="qwen3", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=64, vocab_size=4096, max_position_embeddings=128, tie_word_embeddings=True,
)  # fmt: skip
TENSORS = {
    "layer.weight": torch.arange(48 * 24).float().view(48, 24) / 7,
    "layer.bias": torch.arange(48).bfloat16(),
    "norm.weight": torch.arange(24).half(),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def reader(directory: Path) -> Iterator[SafetensorsReader]:
    with ExitStack() as stack:
        yield SafetensorsReader(directory, stack)


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(FieldError) as caught:
        call()
    assert caught.value.field == "model", f"expected the error to name 'model', got {caught.value.field!r}"
    message = str(caught.value)
    assert "\n" not in message, f"an error is one line: {message!r}"
    for word in words:
        assert word in message, f"expected {word!r} in {message!r}. {LOOK}"


def test_tensors_are_read_as_they_are_stored(reader: SafetensorsReader) -> None:
    assert reader.unread == set(TENSORS), f"nothing is read yet, got {reader.unread}. {LOOK}"
    for name, tensor in TENSORS.items():
        got = reader.read(name, tuple(tensor.shape))
        assert got.dtype == tensor.dtype and torch.equal(got, tensor), f"{name}: expected {tensor}, got {got}. {LOOK}"
        assert name not in reader.unread, f"{name} was read and counts as unread. {LOOK}"
    assert reader.unread == set(), f"all was read, got {reader.unread}. {LOOK}"


@pytest.mark.parametrize(
    "index",
    [
        (slice(0, 16),),
        (slice(16, 40),),
        (slice(None), slice(0, 12)),
        (slice(None), slice(12, 24)),
        (slice(8, 9), slice(20, 24)),
        (slice(0, 0),),
    ],
    ids=str,
)
def test_a_part_of_a_tensor(directory: Path, index: tuple[slice, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank reads only its rows or columns: the index goes to the mapped file, which is not read in full."""
    asked = []

    class Spy:
        def __init__(self, path: Path, framework: str) -> None:
            self.file = safe_open(path, framework)

        def __enter__(self) -> Spy:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_tensor(self, name: str) -> None:
            pytest.fail(f"{name} is read as a whole. {LOOK}")

        def get_slice(self, name: str) -> Any:
            stored = self.file.get_slice(name)

            class Slice:
                get_shape, get_dtype = stored.get_shape, stored.get_dtype

                def __getitem__(self, index: Any) -> Any:
                    asked.append(index)
                    return stored[index]

            return Slice()

    monkeypatch.setattr(checkpoint_reader, "safe_open", Spy)
    with ExitStack() as stack:
        got = SafetensorsReader(directory, stack).read("layer.weight", (48, 24), index)
    expected = TENSORS["layer.weight"][index]
    assert torch.equal(got, expected), f"layer.weight[{index}]: expected {expected}, got {got}. {LOOK}"
    assert asked == [index], f"layer.weight[{index}]: expected this index to reach the file, got {asked}. {LOOK}"


def test_the_shape_is_of_the_whole_tensor(reader: SafetensorsReader) -> None:
    rows = (slice(0, 24),)
    refused(lambda: reader.read("layer.weight", (24, 24), rows), "layer.weight", "[48, 24]", "expected [24, 24]")
    for shape in ((48,), (24, 48), (48, 24, 1)):
        refused(lambda shape=shape: reader.read("layer.weight", shape), "layer.weight", f"expected {list(shape)}")
    assert "layer.weight" in reader.unread, f"a tensor that was refused counts as read. {LOOK}"
    assert len(reader.read("layer.weight", (48, 24), rows)) == 24


def test_a_missing_tensor_is_named(reader: SafetensorsReader, directory: Path) -> None:
    refused(lambda: reader.read("head.weight", (3, 4)), f"{directory} lacks the tensor head.weight", "[3, 4]")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("int8", "I8"),
        ("uint8", "U8"),
        ("int32", "I32"),
        ("int64", "I64"),
        ("bool", "BOOL"),
        ("float64", "F64"),
        ("float8_e4m3fn", "F8_E4M3"),
        ("float8_e5m2", "F8_E5M2"),
    ],
)
def test_a_dtype_other_than_16_or_32_bit_floats_is_refused(tmp_path: Path, dtype: str, name: str) -> None:
    """Numbers that mean something only together with their scales must not be cast."""
    save_file({"layer.weight": torch.ones(4, 4).to(getattr(torch, dtype))}, tmp_path / "model.safetensors")
    words = (f"tensor layer.weight is stored as {name}", "expected one of F32, F16, BF16", str(tmp_path))
    with ExitStack() as stack:
        refused(lambda: SafetensorsReader(tmp_path, stack), *words)
        with pytest.MonkeyPatch.context() as patch:  # a tensor whose name is no weight's is refused when it is read
            patch.setattr(checkpoint_reader, "check_safetensors", lambda *_: None)
            reader = SafetensorsReader(tmp_path, stack)
        for index in ((), (slice(0, 2),)):
            refused(lambda index=index: reader.read("layer.weight", (4, 4), index), *words)


def test_shards(tmp_path: Path) -> None:
    shards = {"part-1.safetensors": ["layer.weight"], "part-2.safetensors": ["layer.bias", "norm.weight"]}
    for file, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, tmp_path / file)
    index = {name: file for file, names in shards.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with ExitStack() as stack:
        reader = SafetensorsReader(tmp_path, stack)
        for name, tensor in TENSORS.items():
            assert torch.equal(reader.read(name, tuple(tensor.shape)), tensor), f"{name} differs. {LOOK}"
    save_file({"layer.weight": TENSORS["layer.weight"], "norm.weight": TENSORS["norm.weight"]}, tmp_path / file)
    save_file({"layer.bias": TENSORS["layer.bias"], "layer.weight": TENSORS["layer.weight"]}, tmp_path / file)
    with ExitStack() as stack:
        refused(lambda: SafetensorsReader(tmp_path, stack), "tensor layer.weight is stored twice")


def test_missing_and_broken_files(directory: Path) -> None:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"

    def opened() -> None:
        with ExitStack() as stack:
            SafetensorsReader(directory, stack)

    content = single.read_bytes()
    single.write_bytes(content[: len(content) // 2])
    refused(opened, str(single), "corrupt")
    single.rename(directory / "weights.safetensors").write_bytes(content)
    refused(opened, "neither model.safetensors nor model.safetensors.index.json")
    for broken in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"norm.weight": 3}}', "\udcff"):
        index.write_bytes(broken.encode("utf-8", "surrogateescape"))
        refused(opened, str(index), "weight_map")
    index.write_text(json.dumps({"weight_map": {"norm.weight": "part-2.safetensors"}}))
    refused(opened, str(index), "part-2.safetensors")


# random:<preset>


@pytest.fixture
def nano(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(checkpoints.PRESETS, "nano", NANO)
    return "random:nano"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_tensors_equal_part_1s(nano: str, dtype: torch.dtype) -> None:
    found = resolve_checkpoint(nano)
    with ExitStack() as stack:
        reader: CheckpointReader = open_checkpoint(found, dtype, "cpu", stack)
    assert isinstance(reader, RandomReader) and reader.source == nano, f"got {reader}. {LOOK_RANDOM}"
    for name, parameter in load_model(found, dtype, "cpu").named_parameters():
        rows = (slice(0, 8),) if parameter.dim() == 2 else ()
        got = reader.read(name, tuple(parameter.shape), rows)
        assert torch.equal(got, parameter[rows]), f"{nano}: {name}{rows} differs from part 1's model. {LOOK_RANDOM}"
    assert not reader.unread, f"part 1's model lacks {reader.unread}. {LOOK_RANDOM}"


def test_random_tensors_are_not_held_twice(nano: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that was read is freed, so that loading never needs two models' memory."""
    found, storages = resolve_checkpoint(nano), dict[str, StorageWeakRef]()

    def watched(*arguments: Any) -> Any:
        model = load_model(*arguments)
        storages.update({name: StorageWeakRef(p.untyped_storage()) for name, p in model.named_parameters()})
        return model

    monkeypatch.setattr(checkpoint_reader, "load_model", watched)
    reader = RandomReader(found, torch.float32, "cpu")
    shapes = {name: tuple(p.shape) for name, p in load_model(found, torch.float32, "cpu").named_parameters()}
    for number, (name, shape) in enumerate(shapes.items(), start=1):
        reader.read(name, shape)
        alive = sum(not ref.expired() for ref in storages.values())
        assert alive == len(shapes) - number, (
            f"{number} of {len(shapes)} tensors were read: expected the others to be held, got {alive}. {LOOK_RANDOM}"
        )


def test_a_random_tensor_of_another_shape_is_named(nano: str) -> None:
    reader = RandomReader(resolve_checkpoint(nano), torch.float32, "cpu")
    refused(lambda: reader.read("model.norm.weight", (33,)), nano, "model.norm.weight", "[32]", "expected [33]")


def test_a_directory_has_a_reader_of_its_files() -> None:
    with ExitStack() as stack:
        reader = open_checkpoint(resolve_checkpoint("tiny"), torch.float32, "cpu", stack)
        assert isinstance(reader, SafetensorsReader), f"tiny is a directory: got {reader}. {LOOK}"
        assert "model.norm.weight" in reader.unread, f"tiny has more tensors than {sorted(reader.unread)[:4]}. {LOOK}"


# How much is read, and what tells two checkpoints apart


def test_the_bytes_of_all_parts_are_counted(reader: SafetensorsReader) -> None:
    reader.read("layer.weight", (48, 24), (slice(0, 16),))
    reader.read("layer.bias", (48,))
    assert reader.num_bytes_read == 16 * 24 * 4 + 48 * 2, f"got {reader.num_bytes_read}. {LOOK}"


def test_the_bytes_of_random_weights_are_counted(nano: str) -> None:
    reader = RandomReader(resolve_checkpoint(nano), torch.float32, "cpu")
    reader.read("model.embed_tokens.weight", (4096, 32), (slice(0, 100),))
    assert reader.num_bytes_read == 100 * 32 * 4, f"got {reader.num_bytes_read}. {LOOK_RANDOM}"


LOOK_FINGERPRINT = "Look at common/checkpoint_reader.py::fingerprint."


def copy_of_tiny(directory: Path) -> Path:
    shutil.copytree(checkpoints.MODELS_DIR / "tiny", directory)
    return directory


def change_weights(directory: Path) -> None:
    """All weights by a little, as another training run would."""
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header::2] = bytes(byte ^ 1 for byte in data[header::2])
    path.write_bytes(data)


def change_config(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rope_theta": 12_345.0, "rope_parameters": None}))


def test_the_same_checkpoint_has_the_same_fingerprint_wherever_it_is(tmp_path: Path) -> None:
    copies = [copy_of_tiny(tmp_path / name) for name in ("one", "two")]
    got = {fingerprint(resolve_checkpoint(str(path))) for path in (checkpoints.MODELS_DIR / "tiny", *copies)}
    assert len(got) == 1, f"three copies of tiny have {len(got)} fingerprints. {LOOK_FINGERPRINT}"


@pytest.mark.parametrize("change", [change_weights, change_config])
def test_another_checkpoint_has_another_fingerprint(tmp_path: Path, change: Callable[[Path], None]) -> None:
    directory = copy_of_tiny(tmp_path / "tiny")
    before = fingerprint(resolve_checkpoint(str(directory)))
    change(directory)
    assert fingerprint(resolve_checkpoint(str(directory))) != before, f"{change.__name__}. {LOOK_FINGERPRINT}"


def test_random_checkpoints_have_fingerprints_of_their_own(nano: str) -> None:
    got = [fingerprint(resolve_checkpoint(name)) for name in (nano, nano, "random:llama-110m", "random:qwen3-0.6b")]
    assert got[0] == got[1] and len(set(got)) == 3, f"got {got}. {LOOK_FINGERPRINT}"
