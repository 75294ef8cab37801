"""Small models as transformers computes them, and dense attention to put under ours."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from common.checkpoint import MODELS_DIR, Checkpoint
from common.testing import small_model
from part03_paged_attention.worker.model import Attend, DecoderModel
from part03_paged_attention.worker.weights import load_decoder

torch.set_num_threads(1)  # for models this small a second thread only waits; on a busy machine it waits long


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """transformers' small model of a family with other settings. Biases and norm weights are random, not 0 and 1."""

    def build(family: str, seed: int, **changes: Any) -> Any:
        settings = {**small_model(family, seed).config.to_dict(), **changes}
        settings.pop("layer_types", None)  # transformers derives them from the other settings
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.uniform_(-0.5, 0.5)
        return model

    return build


@pytest.fixture(scope="session")
def load_directory() -> Callable[..., DecoderModel]:
    """Loads ours from a directory in Hugging Face's layout, its config.json included."""

    def load(directory: Path, dtype: torch.dtype = torch.float32) -> DecoderModel:
        config = AutoConfig.from_pretrained(directory)
        return load_decoder(Checkpoint(str(directory), config, directory, directory, frozenset()), dtype, "cpu")

    return load


@pytest.fixture
def load_ours(tmp_path: Path, load_directory: Callable[..., DecoderModel]) -> Callable[..., DecoderModel]:
    """Saves transformers' model and loads ours from what was saved."""

    def load(reference: Any, dtype: torch.dtype = torch.float32, **how: Any) -> DecoderModel:
        reference.save_pretrained(tmp_path, **how)
        return load_directory(tmp_path, dtype)

    return load


@pytest.fixture(scope="session")
def dense_attend() -> Callable[[list[int]], Attend]:
    """Causal attention without a cache, one sequence of the flat batch after the other."""

    def make(lengths: list[int]) -> Attend:
        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
            return torch.cat([attention(q, k, v) for q, k, v in parts])

        return attend

    return make


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last len(query) positions of a sequence attend to all of it and not to what comes later."""
    group_size = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    is_later = torch.ones(len(query), len(key)).triu(len(key) - len(query) + 1).bool()
    weights = scores.masked_fill(is_later, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@pytest.fixture
def cached_attend() -> Attend:
    """Attention of one sequence with a cache: it keeps every key and value that it is given."""
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if layer in cache:
            key, value = torch.cat((cache[layer][0], key)), torch.cat((cache[layer][1], value))
        cache[layer] = key, value
        return attention(query, key, value)

    return attend


@pytest.fixture(scope="session")
def small_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A small random model of a family, with tiny's tokenizer: where it lies, and as transformers loads it."""

    @functools.cache
    def make(family: str) -> tuple[Path, Any]:
        directory = tmp_path_factory.mktemp(family)
        reference = small_model(family, seed=1)
        reference.save_pretrained(directory)
        for path in (MODELS_DIR / "tiny").glob("*"):
            if path.name.startswith(("tokenizer", "chat_template")):
                shutil.copy(path, directory)
        return directory, reference

    return make
