"""worker/parallel.py: each rank has a part of every layer, and together they compute what one does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from common.checkpoint import MODELS_DIR, Checkpoint, resolve_checkpoint
from common.checkpoint_reader import open_checkpoint
from common.errors import FieldError
from common.testing import assert_same_greedy, reference_greedy
from part09_tensor_parallelism.worker.parallel import (
    ColumnParallelLinear,
    ParallelGroup,
    PipelineStage,
    RowParallelLinear,
    Shard,
    VocabParallelEmbedding,
    padded_vocab_size,
)
from part09_tensor_parallelism.worker.weights import load_decoder
from tests import local_ranks
from tests.contract.engines import SmallEngine

PART = "part09_tensor_parallelism"
LocalGroup = Any  # tests.local_ranks makes it for the part
on_all_ranks = functools.partial(local_ranks.on_all_ranks, PART)
on_a_grid = functools.partial(local_ranks.on_a_grid, PART)
LESSON = 'README "Two kinds of cuts"'
LOOK_KV = 'Look at worker/parallel.py::ParallelGroup.split_kv_heads; README "Heads".'
LOOK_COLUMN = f"Look at worker/parallel.py::ColumnParallelLinear.read; {LESSON}."
LOOK_ROW = f"Look at worker/parallel.py::RowParallelLinear.forward; {LESSON}."
LOOK_VOCAB = 'Look at worker/parallel.py::VocabParallelEmbedding.forward; README "The vocabulary".'
LOOK_LOGITS = 'Look at worker/parallel.py::VocabParallelEmbedding.logits; README "The vocabulary".'
TOLERANCE = 1e-4


class Stored:
    """A checkpoint in memory."""

    source = "a checkpoint in memory"

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors, self.num_bytes_read, self.unread = tensors, 0, set(tensors)

    def read(self, name: str, shape: tuple[int, ...], index: tuple[slice, ...] = ()) -> Tensor:
        tensor = self.tensors[name]
        assert tuple(tensor.shape) == shape, f"{name}: expected the full shape {list(tensor.shape)}, got {list(shape)}"
        part = tensor[index]
        self.num_bytes_read += part.nbytes
        return part


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).float()


def check_equal(got: Tensor, expected: Tensor, what: str, look: str) -> None:
    assert got.shape == expected.shape, f"{what}: expected shape {list(expected.shape)}, got {list(got.shape)}. {look}"
    wrong = (got != expected).nonzero()
    assert not len(wrong), (
        f"{what}: {len(wrong)} of {got.numel()} values differ, first at {wrong[0].tolist()}: expected "
        f"{float(expected[tuple(wrong[0])]):g}, got {float(got[tuple(wrong[0])]):g}. {look}"
    )


# Shards


@pytest.mark.parametrize(
    ("total", "size", "expected"),
    [
        (4, 1, [(0, 4)]),
        (4, 2, [(0, 2), (2, 4)]),
        (4, 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (1, 4, [(0, 1)] * 4),
        (3, 6, [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3), (2, 3)]),
        (8, 2, [(0, 4), (4, 8)]),
    ],
)
def test_which_kv_heads_a_rank_has(total: int, size: int, expected: list[tuple[int, int]]) -> None:
    """A query head's KV head is on the same rank: heads are shared in order."""
    got = [ParallelGroup(rank, size).split_kv_heads(total) for rank in range(size)]
    assert [(shard.start, shard.stop) for shard in got] == expected, (
        f"{total} KV heads on {size} ranks: expected {expected}, got {got}. {LOOK_KV}"
    )
    assert all(shard.total == total for shard in got), f"total is the number of all KV heads, {total}: {got}. {LOOK_KV}"


@pytest.mark.parametrize(("total", "size"), [(3, 2), (2, 3), (4, 6), (6, 4)])
def test_kv_heads_that_cannot_be_shared(total: int, size: int) -> None:
    for rank in range(size):
        try:
            got = ParallelGroup(rank, size).split_kv_heads(total)
        except FieldError as error:
            assert error.field == "tensor_parallel_size" and f"num_key_value_heads, {total}, got {size}" in str(
                error
            ), f"the error must name tensor_parallel_size and both numbers, got {error}. {LOOK_KV}"
        else:
            pytest.fail(f"{total} KV heads on {size} ranks cannot be shared: expected FieldError, got {got}. {LOOK_KV}")


def test_an_equal_share() -> None:
    assert [ParallelGroup(rank, 3).split("x", 12) for rank in range(3)] == [
        Shard(12, 4 * r, 4 * r + 4) for r in range(3)
    ]
    with pytest.raises(FieldError, match="tensor_parallel_size: expected a divisor of num_heads, 10, got 3"):
        ParallelGroup(0, 3).split("num_heads", 10)
    shard = Shard(4, 1, 3) * 5
    assert (shard, len(shard), shard.slice) == (Shard(20, 5, 15), 10, slice(5, 15))


# Layers


def column_layer(group: LocalGroup, reader: Stored, sizes: dict[str, int], in_features: int) -> ColumnParallelLinear:
    shards = {name: group.split(name, size) for name, size in sizes.items()}
    layer = ColumnParallelLinear(in_features, shards, bias=True).requires_grad_(False)
    try:
        layer.load(reader, "block.merged")
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise AssertionError(
            f"rank {group.rank} of {group.size}: what was read does not fit: {error}. {LOOK_COLUMN}"
        ) from error
    return layer


@pytest.mark.parametrize("size", [1, 2, 4])
def test_column_parallel(size: int) -> None:
    """Each projection of a merged layer is cut on its own, and each rank computes its rows without a collective."""
    sizes, hidden = {"q": 8, "k": 4, "v": 4}, numbers(3, 6, seed=9)
    tensors = {f"block.{name}.weight": numbers(rows, 6, seed=rows + i) for i, (name, rows) in enumerate(sizes.items())}
    tensors |= {f"block.{name}.bias": numbers(rows, seed=20 + i) for i, (name, rows) in enumerate(sizes.items())}

    def work(group: LocalGroup) -> tuple[dict[str, Tensor], list[Any]]:
        layer = column_layer(group, Stored(**tensors), sizes, 6)
        return dict(
            zip(sizes, layer(hidden).split([rows // size for rows in sizes.values()], dim=1), strict=True)
        ), group.calls

    got = on_all_ranks(size, work)
    for name in sizes:
        expected = F.linear(hidden, tensors[f"block.{name}.weight"], tensors[f"block.{name}.bias"])
        joined = torch.cat([outputs[name] for outputs, _ in got], dim=1)
        check_equal(joined, expected, f"{size} ranks: the columns of {name}, rank by rank", LOOK_COLUMN)
    assert not any(calls for _, calls in got), f"expected no collective, got {got[0][1]}. {LOOK_COLUMN}"


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_row_parallel(size: int, has_bias: bool) -> None:
    """The sum over the ranks is the output, on all of them, and the bias is in it once."""
    weight, bias, hidden = numbers(5, 8), numbers(5, seed=1), numbers(3, 8, seed=2)
    tensors = {"block.o.weight": weight} | ({"block.o.bias": bias} if has_bias else {})

    def work(group: LocalGroup) -> tuple[Tensor, list[Any]]:
        shard = group.split("inputs", 8)
        layer = RowParallelLinear(shard, {"o": 5}, has_bias, group).requires_grad_(False)
        layer.load(Stored(**tensors), "block.o")
        return layer(hidden[:, shard.slice]), group.calls

    expected = F.linear(hidden, weight, bias if has_bias else None)
    for rank, (output, calls) in enumerate(on_all_ranks(size, work)):
        what = f"rank {rank} of {size}, {'with' if has_bias else 'without'} bias"
        check_equal(output, expected, what, LOOK_ROW)
        assert size == 1 or calls == [("all_reduce", (3, 5))], (
            f"{what}: expected one all-reduce, got {calls}. {LOOK_ROW}"
        )


@pytest.mark.parametrize(
    ("vocab_size", "size", "padded"),
    [(1_010, 1, 1_010), (1_010, 2, 1_024), (32_003, 4, 32_064), (64, 4, 64), (65, 2, 128), (10, 4, 64), (100, 3, 192)],
)
def test_the_padded_vocabulary(vocab_size: int, size: int, padded: int) -> None:
    """The sizes of vLLM's rule: 1,010 are 512 on each of two ranks; 32,003 are 8,016 on each of four."""
    assert padded_vocab_size(vocab_size, size) == padded
    groups = [ParallelGroup(rank, size) for rank in range(size)]
    assert [len(VocabParallelEmbedding(vocab_size, 2, group).weight) for group in groups] == [padded // size] * size


@pytest.mark.parametrize(("vocab_size", "size"), [(1_010, 1), (1_010, 2), (1_010, 4), (130, 2), (10, 4), (100, 3)])
def test_vocab_parallel(vocab_size: int, size: int) -> None:
    """Every rank gets the vectors of all token ids, and the logits of all of them and of no padding."""
    weight, hidden = numbers(vocab_size, 4), numbers(3, 4, seed=1)
    edges = sorted(
        {0, vocab_size - 1, *(rank * padded_vocab_size(vocab_size, size) // size for rank in range(1, size))}
    )
    token_ids = torch.tensor([each for edge in edges for each in (edge - 1, edge) if 0 <= each < vocab_size])

    def work(group: LocalGroup) -> tuple[Tensor, Tensor, list[Any]]:
        layer = VocabParallelEmbedding(vocab_size, 4, group).requires_grad_(False)
        layer.weight.fill_(torch.nan)
        layer.load(Stored(**{"embed.weight": weight}), "embed")
        return layer(token_ids), layer.logits(hidden), group.calls

    for rank, (vectors, logits, calls) in enumerate(on_all_ranks(size, work)):
        what = f"vocabulary of {vocab_size}, rank {rank} of {size}"
        check_equal(vectors, weight[token_ids], f"{what}: vectors of {token_ids.tolist()}", LOOK_VOCAB)
        check_equal(logits, F.linear(hidden, weight), f"{what}: logits", LOOK_LOGITS)
        names = [name for name, _ in calls]
        assert size == 1 or names == ["all_reduce", "all_gather"], f"{what}: got collectives {calls}. {LOOK_VOCAB}"


# The model


def dense_attend(length: int) -> Callable[..., Tensor]:
    """Causal attention over one sequence, of the heads that it gets."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (each.transpose(0, 1)[None] for each in (query, key, value))
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    return attend


def write_random_model(directory: Path, family: str, **changes: Any) -> Checkpoint:
    torch.manual_seed(len(str(changes)))
    shape: dict[str, Any] = dict(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=12, num_key_value_heads=2,
        head_dim=8, vocab_size=1_010, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.3,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **changes}), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # transformers' biases are 0
    model.save_pretrained(directory)
    (directory / "tokenizer.json").symlink_to(MODELS_DIR / "tiny" / "tokenizer.json")
    return resolve_checkpoint(str(directory))


class StoredModel:
    """What SmallEngine needs of a model on disk."""

    def __init__(self, target: str) -> None:
        self.target = target

    def of(self, flags: dict[str, Any]) -> StoredModel:
        return self

    def loaded_once(self, part: str) -> AbstractContextManager[None]:
        return nullcontext()


NUM_ANSWER_TOKENS = 10
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, 1 KV head": ("llama", dict(num_key_value_heads=1)),
    "llama, 2 KV heads, tied": ("llama", dict(tie_word_embeddings=True)),
    "llama, 3 KV heads, biases": ("llama", dict(num_key_value_heads=3, attention_bias=True, mlp_bias=True)),
    "llama, vocabulary of 32,003": ("llama", dict(vocab_size=32_003, num_hidden_layers=2)),
    "qwen2, 2 KV heads": ("qwen2", {}),
    "qwen2, 4 KV heads, tied": ("qwen2", dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "qwen3, 2 KV heads": ("qwen3", dict(head_dim=16)),
    "qwen3, 12 KV heads, tied": ("qwen3", dict(num_key_value_heads=12, tie_word_embeddings=True)),
}
GRIDS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2), (4, 2)]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    checkpoint = write_random_model(tmp_path, family, **changes)
    token_ids = torch.randint(checkpoint.config.vocab_size, (20,), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference(token_ids[None]).logits[0]
    num_tested = 0
    for tp_size, num_stages in GRIDS:
        kv_heads = checkpoint.config.num_key_value_heads
        if (kv_heads % tp_size and tp_size % kv_heads) or num_stages > checkpoint.config.num_hidden_layers:
            continue

        def work(group: LocalGroup, stage: PipelineStage) -> Tensor | None:
            model = load_decoder(checkpoint, torch.float32, "cpu", group, stage)
            hidden = model(token_ids, torch.arange(20), dense_attend(20))
            return model.compute_logits(hidden) if stage.is_last else None

        for rank, logits in enumerate(on_a_grid(tp_size, num_stages, work)):
            if logits is None:
                continue
            difference = float((logits - expected).abs().max())
            assert logits.shape == expected.shape and difference <= TOLERANCE, (
                f"{name}, {tp_size} × {num_stages} ranks, rank {rank}: logits of shape {list(logits.shape)}, expected "
                f"transformers' within {TOLERANCE:g}, off by up to {difference:.2e}. "
                f"Look at worker/model.py::Attention; {LESSON}."
            )
        num_tested += 1
    assert num_tested >= 3, f"only {num_tested} grids divide this model"


ENGINE_GRIDS = [(2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids_equal_transformers(name: str, tmp_path: Path) -> None:
    """The whole engine, with chunks of a prompt, several requests in a step and preemption, on each grid."""
    family, changes = MODELS[name]
    checkpoint = write_random_model(tmp_path, family, **changes)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(checkpoint.config.vocab_size, (n,), generator=generator).tolist() for n in (1, 9, 20, 26)]
    expected = [reference_greedy(reference, prompt, NUM_ANSWER_TOKENS) for prompt in prompts]
    num_tested = 0
    for tp_size, num_stages in ENGINE_GRIDS:
        kv_heads = checkpoint.config.num_key_value_heads
        if kv_heads % tp_size and tp_size % kv_heads:
            continue
        engine = SmallEngine(
            PART, StoredModel(str(tmp_path)), tensor_parallel_size=tp_size, pipeline_parallel_size=num_stages,
            max_num_batched_tokens=12, max_num_seqs=4, num_kv_blocks=18,
        )  # fmt: skip
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, max_tokens=NUM_ANSWER_TOKENS)
        answers = engine.finish()
        where = f"{name}, {tp_size} × {num_stages} ranks"
        for number, (prompt, ids) in enumerate(zip(prompts, expected, strict=True)):
            assert_same_greedy(reference, prompt, answers[str(number)].token_ids, ids, f"{where}, request {number}")
        assert engine.core.scheduler.num_preemptions, f"{where}: this test needs a preemption"
        num_tested += 1
    assert num_tested >= 2, f"only {num_tested} grids divide this model"


def test_the_collectives_of_a_forward_pass() -> None:
    """Two all-reduces a layer and one for the embedding, each of all tokens' hidden states, and a gather of logits."""
    checkpoint = resolve_checkpoint("tiny")
    config, token_ids = checkpoint.config, torch.arange(7)

    def work(group: LocalGroup) -> list[Any]:
        model = load_decoder(checkpoint, torch.float32, "cpu", group)
        model.compute_logits(model(token_ids, token_ids, dense_attend(7))[-2:])
        return group.calls

    reduces = [("all_reduce", (7, config.hidden_size))] * (2 * config.num_hidden_layers + 1)
    for calls in on_all_ranks(2, work):
        assert calls == [*reduces, ("all_gather", (2, config.vocab_size // 2))], f"got {calls}. {LOOK_ROW}"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_reads_only_its_part(size: int) -> None:
    """The norms are on every rank; of the rest, each has an equal part."""
    checkpoint = resolve_checkpoint("tiny")
    models = on_all_ranks(size, lambda group: load_decoder(checkpoint, torch.float32, "cpu", group))
    with ExitStack() as stack:
        reader = open_checkpoint(checkpoint, torch.float32, "cpu", stack)
        stored = {name: reader._files[name].get_slice(name).get_shape() for name in reader.unread}  # type: ignore[attr-defined]
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in stored.items()}  # bf16
    norms = sum(num_bytes for name, num_bytes in sizes.items() if "norm" in name)
    expected = norms + (sum(sizes.values()) - norms) // size
    got = [model.num_bytes_read for model in models]
    assert got == [expected] * size, f"{size} ranks: expected {expected} bytes for each, got {got}. {LOOK_COLUMN}"


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 6])
def test_every_layer_is_in_one_stage(num_stages: int) -> None:
    stages = [PipelineStage(index, num_stages).layers(6) for index in range(num_stages)]
    assert [layer for stage in stages for layer in stage] == list(range(6)), f"got {stages}"
    assert max(map(len, stages)) - min(map(len, stages)) <= 1, f"got {stages}"
    with pytest.raises(FieldError, match="pipeline_parallel_size: expected at most num_hidden_layers, 6, got 7"):
        PipelineStage(0, 7).layers(6)
