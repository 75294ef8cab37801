"""worker/weight_offload.py: which layers leave the device, what is fetched when, and the same logits."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.checkpoint import MODELS_DIR, Checkpoint, resolve_checkpoint
from common.errors import FieldError
from common.testing import small_model
from part12_cpu_offloading.config import EngineConfig
from part12_cpu_offloading.llm import LLM
from part12_cpu_offloading.worker.model import DecoderModel
from part12_cpu_offloading.worker.parallel import Groups
from part12_cpu_offloading.worker.weight_offload import CheckpointSource, HostSource, LayerFetcher, choose_layers
from part12_cpu_offloading.worker.weights import load_decoder
from tests.local_ranks import on_a_grid, on_expert_ranks
from tests.part12.test_answers import GREEDY

LOOK = 'Look at worker/weight_offload.py::LayerFetcher.{}; README "Weights that don\'t fit".'
LOOK_BEFORE = LOOK.format("before")
FAMILIES = ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "qwen2_moe"]
ALL = 2**40  # bytes: more than there are


@pytest.mark.parametrize(
    ("sizes", "num_bytes", "expected"),
    [
        ([10] * 6, 0, []),
        ([10] * 6, 1, [0, 2, 4]),  # 30 leave, two buffers of 10 come
        ([10] * 6, 10, [0, 2, 4]),
        ([10] * 6, 11, [0, 1, 3, 4]),
        ([10] * 6, 40, [0, 1, 2, 3, 4, 5]),
        ([10] * 6, 100, [0, 1, 2, 3, 4, 5]),  # as much as possible
        ([5, 10, 20, 10], 5, [0, 1, 2, 3]),  # 45 leave, two buffers of 20 come
    ],
)
def test_choose_layers(sizes: list[int], num_bytes: int, expected: list[int]) -> None:
    got = choose_layers(sizes, num_bytes)
    assert got == expected, f"layers of {sizes} bytes, {num_bytes} to save: expected {expected}, got {got}."


class ScriptedSource:
    """Fills a layer with its number. gate: if set, waits for it. started: the order of the fetches."""

    started: list[int]

    def __init__(self, number: int, started: list[int], done: list[int]) -> None:
        self.number, self.started, self.done, self.error = number, started, done, None

    def fill(self, layer: nn.Module) -> None:
        self.started.append(self.number)
        if self.error is not None:
            raise self.error
        for parameter in layer.parameters():
            parameter.fill_(self.number)
        self.done.append(self.number)


class Layers:
    def __init__(self, count: int) -> None:
        self.started, self.done = list[int](), list[int]()
        with torch.device("meta"):
            self.layers = [nn.Linear(3, 2 + number % 2).requires_grad_(False) for number in range(count)]
        self.sources = [ScriptedSource(number, self.started, self.done) for number in range(count)]
        self.fetcher = LayerFetcher(self.layers, self.sources, "cpu")

    @torch.inference_mode()
    def step(self) -> None:
        for number, layer in enumerate(self.layers):
            got = layer(torch.ones(1, 3))
            assert (got == 4.0 * number).all(), (
                f"layer {number} computed {got}, expected {4.0 * number}: its weights were not there, or another "
                f"layer's. {LOOK_BEFORE}"
            )


def test_two_layers_can_not_be_offloaded() -> None:
    with pytest.raises(FieldError, match="cpu_offload_gb: expected more than 2 layers"):
        choose_layers([10, 10], 5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_each_layer_has_its_weights_in_every_step(count: int) -> None:
    layers = Layers(count)
    for _ in range(5):
        layers.step()
    num_fetched = layers.fetcher.num_fetched
    expected = count if count <= 2 else 5 * count + 1
    assert num_fetched == expected, (
        f"{count} layers in 5 steps: expected {expected} fetches, got {num_fetched}. "
        f"{'Two buffers hold both layers for good.' if count <= 2 else ''} {LOOK_BEFORE}"
    )


def test_the_next_layer_is_fetched_while_one_computes() -> None:
    layers = Layers(4)
    layers.fetcher.wait(0)
    layers.layers[0].register_forward_hook(lambda *_: layers.fetcher.wait(1))
    layers.layers[0](torch.ones(1, 3))
    assert layers.started == [0, 1], (
        f"layer 0 computes: expected layer 1 to be fetched, and no other; fetched were {layers.started}. {LOOK_BEFORE}"
    )


def test_a_layer_waits_for_its_weights() -> None:
    layers, gate = Layers(4), threading.Event()
    layers.step()
    fill = layers.sources[1].fill
    layers.sources[1].fill = lambda layer: gate.wait(30) and fill(layer)  # type: ignore[assignment]
    threading.Timer(0.05, gate.set).start()
    layers.step()  # layer 1 computes with the right weights, however late they come
    layers.fetcher.wait(0)
    assert layers.done == [0, 1, 2, 3, 0, 1, 2, 3, 0], f"fetched were {layers.done}. {LOOK_BEFORE}"


def test_a_fetch_that_fails_is_an_error_of_the_step() -> None:
    layers = Layers(4)
    layers.step()
    for number in range(4):
        layers.sources[number].error = OSError("the disk is gone")
        with pytest.raises(OSError, match="the disk is gone"):
            layers.step()
            layers.step()  # the first layer was fetched before
        layers.sources[number].error = None
        layers.step()  # whatever came of the failed step, the next one has the right weights


def save_model(family: str, directory: Path) -> Checkpoint:
    small_model(family, seed=3, num_layers=5).save_pretrained(directory)
    (directory / "tokenizer.json").symlink_to(MODELS_DIR / "tiny" / "tokenizer.json")
    return resolve_checkpoint(str(directory))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_the_same(family: str, tmp_path: Path) -> None:
    checkpoint = save_model(family, tmp_path)
    models = [load_decoder(checkpoint, torch.float32, "cpu", None, num_bytes) for num_bytes in (0, 1, ALL)]
    tokens = torch.arange(7)
    logits = [run(model, tokens) for model in models for _ in range(3)]
    assert all(torch.equal(each, logits[0]) for each in logits), f"{family}: offloading changes logits. {LOOK_BEFORE}"
    counts = [0 if model.fetcher is None else len(model.fetcher.layers) for model in models]
    assert counts[0] == 0 < counts[1] < counts[2] == 5, f"layers offloaded: {counts}"
    assert all(isinstance(source, CheckpointSource) for source in models[2].fetcher.sources)  # type: ignore[union-attr]


@torch.inference_mode()
def run(model: DecoderModel, tokens: torch.Tensor) -> torch.Tensor:
    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return query * (1 + layer) + value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)

    return model.compute_logits(model(tokens, torch.arange(len(tokens), device=tokens.device), attend))


def test_each_rank_offloads_its_part(tmp_path: Path) -> None:
    checkpoint = save_model("llama", tmp_path)
    expected = run(load_decoder(checkpoint, torch.float32, "cpu"), torch.arange(7))

    def work(group: Any, stage: Any) -> Any:
        return run(load_decoder(checkpoint, torch.float32, "cpu", Groups(group, stage=stage), ALL), torch.arange(7))

    for got in on_a_grid("part12_cpu_offloading", 2, 1, work):
        assert torch.allclose(got, expected, atol=1e-5), f"tensor parallelism and offloading. {LOOK_BEFORE}"


def test_experts_on_several_ranks(tmp_path: Path) -> None:
    checkpoint = save_model("qwen3_moe", tmp_path)
    expected = run(load_decoder(checkpoint, torch.float32, "cpu"), torch.arange(7))

    def work(groups: Any, core: int) -> Any:
        model = load_decoder(checkpoint, torch.float32, "cpu", groups, ALL)
        devices = {mixture.loads.device.type for mixture in model.mixtures}
        assert devices == {"cpu"}, f"the tables of offloaded layers are on {devices}. Look at worker/weights.py."
        return run(model, torch.arange(7))

    for got in on_expert_ranks("part12_cpu_offloading", 2, 1, work):
        assert torch.allclose(got, expected, atol=1e-4), f"expert parallelism and offloading. {LOOK_BEFORE}"


def test_the_device_needs_less_memory() -> None:
    """Weights of offloaded layers are in two buffers."""
    model = load_decoder(resolve_checkpoint("tiny"), torch.float32, "cpu", None, ALL)
    assert model.fetcher is not None
    run(model, torch.arange(7))
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in model.parameters()}
    layer_bytes = sum(each.nbytes for each in model.layers["0"].parameters())
    outside = sum(each.nbytes for name, each in model.named_parameters() if not name.startswith("layers."))
    assert sum(storages.values()) <= outside + 2.01 * layer_bytes, (
        f"expected the embeddings and two layers, {outside + 2 * layer_bytes} bytes, got {sum(storages.values())}."
    )
    assert 3.99 * layer_bytes < model.fetcher.num_bytes_saved < 4.01 * layer_bytes


def test_random_weights_stay_in_host_memory() -> None:
    model = load_decoder(resolve_checkpoint("random:llama-110m"), torch.float32, "cpu", None, ALL)
    assert model.fetcher is not None and isinstance(model.fetcher.sources[0], HostSource), "there are no files"
    assert run(model, torch.arange(3)).isfinite().all()


@pytest.mark.parametrize(
    "flags",
    [{"cpu_offload_gb": 0.001}, {"cpu_offload_gb": 1.0}, {"cpu_offload_gb": 1.0, "speculative_method": "draft_model"}],
)
def test_the_answers_are_the_same(flags: dict[str, Any]) -> None:
    prompts = [[100 + number, 200, 300 + number] for number in range(4)]
    answers = [
        [
            output.outputs[0].token_ids
            for output in LLM(EngineConfig(model="tiny", num_threads=1, num_kv_blocks=40, **each)).generate(
                prompts, GREEDY
            )
        ]
        for each in ({}, flags)
    ]
    assert answers[0] == answers[1], LOOK_BEFORE


def test_no_thread_is_left_that_keeps_python_alive() -> None:
    before = threading.active_count()
    model = load_decoder(resolve_checkpoint("tiny"), torch.float32, "cpu", None, ALL)
    run(model, torch.arange(3))
    assert threading.active_count() <= before + 1


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"cpu_offload_gb": -1.0}, "cpu_offload_gb"),
        ({"cpu_offload_gb": float("nan")}, "cpu_offload_gb"),
        ({"kv_offload_gib": float("inf")}, "kv_offload_gib"),
        ({"kv_offload_dir": "x"}, "kv_offload_dir"),
        ({"kv_offload_gib": 1.0, "kv_offload_dir": ""}, "kv_offload_dir"),
        ({"kv_offload_gib": 1.0, "kv_offload_url": ""}, "kv_offload_url"),
        ({"kv_offload_url": "redis://x"}, "kv_offload_url"),
        ({"kv_offload_gib": 1.0, "enable_prefix_caching": False}, "kv_offload_gib"),
        (
            {"cpu_offload_gb": 1.0, "tensor_parallel_size": 2, "enable_expert_parallel": True, "enable_eplb": True},
            "cpu_offload_gb",
        ),
    ],
)
def test_bad_flags(flags: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        EngineConfig(**{"model": "tiny", "device": "cpu", **flags})
    assert caught.value.field == field, f"{caught.value}"


def test_too_little_host_memory_is_an_error() -> None:
    with pytest.raises(FieldError, match="kv_offload_gib"):
        LLM(EngineConfig(model="tiny", num_kv_blocks=4, kv_offload_gib=1e-6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a copy stream, events and pinned memory")
def test_layers_are_fetched_to_a_gpu() -> None:
    checkpoint, tokens = resolve_checkpoint("tiny"), torch.arange(7, device="cuda")
    resident = load_decoder(checkpoint, torch.float32, "cuda")
    offloaded = load_decoder(checkpoint, torch.float32, "cuda", None, ALL)
    assert offloaded.fetcher is not None and isinstance(offloaded.fetcher.sources[0], HostSource)
    for _ in range(20):
        assert torch.equal(run(offloaded, tokens), run(resident, tokens)), LOOK_BEFORE
