"""Find a model by name and load its weights and its tokenizer.

A name is one of the shipped models (`tiny`), a directory, a Hugging Face id (`Qwen/Qwen3-0.6B`), or `random:<preset>`:
a real model's shapes with seeded random weights, so that speed can be measured at real sizes without a download.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from common.errors import FieldError
from common.light_configs import import_checks
from common.sampling_params import SamplingParams

import_checks()

MODELS_DIR = Path(__file__).resolve().parent.parent / "models"
RANDOM_PREFIX = "random:"
RANDOM_SEED = 0
SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # as vLLM reads them
FLOAT_DTYPES = ("F32", "F16", "BF16")  # safetensors' names
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
]

# Shapes of published models: llama2.c's stories110M, Qwen3-0.6B, Qwen3-8B; the MoE shape is our own.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-110m": dict(
        model_type="llama", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
        head_dim=64, intermediate_size=2048, vocab_size=32_000, max_position_embeddings=4_096, tie_word_embeddings=True,
    ),
    "qwen3-0.6b": dict(
        model_type="qwen3", hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=3072, vocab_size=151_936, max_position_embeddings=40_960,
        tie_word_embeddings=True, rms_norm_eps=1e-6, rope_theta=1_000_000.0,
    ),
    "qwen3-8b": dict(
        model_type="qwen3", hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=12_288, vocab_size=151_936, max_position_embeddings=40_960,
        tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=1_000_000.0,
    ),
    "moe-small": dict(
        model_type="qwen3_moe", hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, intermediate_size=1024, moe_intermediate_size=512, num_experts=16, num_experts_per_tok=4,
        norm_topk_prob=True, vocab_size=32_000, max_position_embeddings=4_096, tie_word_embeddings=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that was found. directory is None for random weights, which use the shipped tokenizer.

    default_sampling: fields of SamplingParams for requests that do not name them, from generation_config.json.
    """

    name: str
    config: Any
    directory: Path | None
    tokenizer_directory: Path
    eos_token_ids: frozenset[int]
    default_sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def max_model_len(self) -> int:
        """The context length in tokens: prompt plus answer."""
        return self.config.max_position_embeddings


def resolve_checkpoint(model: str) -> Checkpoint:
    """Find a model by name. Raises FieldError("model", …) saying what was looked for and what is missing."""
    if model.startswith(RANDOM_PREFIX):
        return _random_checkpoint(model)
    directory = _find_directory(model)
    if not (directory / "config.json").is_file():
        raise FieldError("model", f"{directory} has no config.json")
    if not any(directory.glob("*.safetensors")):
        raise FieldError("model", f"{directory} has no *.safetensors file (weights load from safetensors only)")
    if not (directory / "tokenizer.json").is_file() and not (directory / "tokenizer_config.json").is_file():
        raise FieldError("model", f"{directory} has no tokenizer.json")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # huggingface_hub raises its own errors for wrong types
        raise FieldError("model", f"{directory}/config.json cannot be read: {_first_line(error)}") from error
    _check_config(directory, config)
    generation_config = _read_generation_config(directory)
    default_sampling = {name: value for name in SAMPLING_DEFAULTS if (value := generation_config.get(name)) is not None}
    try:
        SamplingParams(**default_sampling)
    except FieldError as error:
        raise FieldError("model", f"{directory}/generation_config.json: {error}") from error
    eos_token_ids = _eos_token_ids(generation_config, config)
    return Checkpoint(model, config, directory, directory, eos_token_ids, default_sampling)


def _check_config(directory: Path, config: Any) -> None:
    """Raises FieldError naming the first size that is invalid."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    sizes = {name: getattr(config, name, None) for name in (*names, "intermediate_size", "max_position_embeddings")}
    for name, value in sizes.items():
        if value is not None and (type(value) is not int or value < 1):
            raise FieldError("model", f"{directory}/config.json: {name}: expected an integer above 0, got {value!r}")
    heads, kv_heads = sizes["num_attention_heads"] or 1, sizes["num_key_value_heads"] or 1
    if heads % kv_heads:
        raise FieldError("model", f"{directory}/config.json: {heads} attention heads cannot share {kv_heads} KV heads")
    if sizes["head_dim"] is None and (hidden_size := sizes["hidden_size"] or heads) % heads:
        message = f"hidden_size {hidden_size} is not a multiple of {heads} attention heads"
        raise FieldError("model", f"{directory}/config.json: {message}")


def _find_directory(model: str) -> Path:
    if (MODELS_DIR / model / "config.json").is_file() and "/" not in model and model not in ("", ".", ".."):
        return MODELS_DIR / model
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        shipped = ", ".join(sorted(p.name for p in MODELS_DIR.glob("*/") if (p / "config.json").is_file()))
        raise FieldError(
            "model", f"{model!r} is neither a shipped model ({shipped}), nor a directory, nor a Hugging Face id "
            f"(owner/name), nor {RANDOM_PREFIX}<{'|'.join(PRESETS)}>"
        )  # fmt: skip
    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise FieldError(
            "model", f"{model!r} is not a directory and could not be downloaded: {_first_line(error)}"
        ) from error


def _random_checkpoint(model: str) -> Checkpoint:
    preset = model.removeprefix(RANDOM_PREFIX)
    if preset not in PRESETS:
        raise FieldError("model", f"unknown preset {preset!r}: expected {RANDOM_PREFIX}<{'|'.join(PRESETS)}>")
    shape = dict(PRESETS[preset])
    tokenizer_directory = MODELS_DIR / "tiny"
    shipped = AutoConfig.from_pretrained(tokenizer_directory)
    eos_token_ids = _eos_token_ids(_read_generation_config(tokenizer_directory), shipped)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    config.eos_token_id = next(iter(eos_token_ids))
    return Checkpoint(model, config, None, tokenizer_directory, eos_token_ids)


def _read_generation_config(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items()) if path.is_file() else {}
    except (ValueError, AttributeError) as error:
        raise FieldError("model", f"{path} cannot be read: {_first_line(error)}") from error


def _eos_token_ids(generation_config: Mapping[str, Any], config: Any) -> frozenset[int]:
    """The ids in generation_config.json (chat models have more than one), else those in config.json."""
    eos = generation_config.get("eos_token_id")
    eos = config.eos_token_id if eos is None else eos
    return frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Raises FieldError if the tokenizer's files cannot be read, or its chat template is broken."""
    directory = checkpoint.tokenizer_directory
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception on a malformed tokenizer.json
        raise FieldError("model", f"{directory}: bad tokenizer: {_first_line(error)}") from error
    if tokenizer.chat_template is not None:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        except Exception as error:  # whatever its expressions raise
            raise FieldError("model", f"{directory}: bad chat template: {_first_line(error)}") from error
    return tokenizer


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Any:
    """Load the transformers model in eval mode. Raises FieldError on a corrupt file or missing tensors."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    if checkpoint.directory is None:
        with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []), torch.device(device):
            torch.manual_seed(RANDOM_SEED)
            return AutoModelForCausalLM.from_config(checkpoint.config, dtype=dtype).eval()
    check_not_quantized(checkpoint)
    check_safetensors(checkpoint.directory)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except ValueError as error:  # not a text generation model
        raise FieldError("model", f"{checkpoint.directory}: {_first_line(error)}") from error
    model, info = loaded
    if wrong := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise FieldError(
            "model", f"{checkpoint.directory}: {len(wrong)} tensors are missing or have the wrong shape: {wrong[0]} …"
        )
    for name, parameter in model.named_parameters():
        check_finite(str(checkpoint.directory), name, parameter.data)
    return model.to(device).eval()


def check_finite(source: str, name: str, tensor: torch.Tensor) -> None:
    """Raises FieldError for a tensor with NaN or infinity in it: any answer would be noise."""
    if tensor.dtype == torch.float8_e4m3fn:  # which has no sum
        tensor = tensor.float()
    if not tensor.sum(dtype=torch.float32).isfinite():
        raise FieldError("model", f"{source}: tensor {name} holds NaN or infinity")


def check_not_quantized(checkpoint: Checkpoint) -> None:
    """Raises FieldError for a checkpoint whose config says that its weights are quantized."""
    if settings := getattr(checkpoint.config, "quantization_config", None):
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise FieldError(
            "model", f"{checkpoint.directory} is quantized ({method or 'by an unknown method'}): expected weights in "
            f"one of {', '.join(FLOAT_DTYPES)}",
        )  # fmt: skip


def check_safetensors(
    directory: Path, allowed: Sequence[str] = FLOAT_DTYPES, files: Sequence[Path] = ()
) -> None:  # fmt: skip
    """Read the header of each weight file, or of these files. Raises FieldError naming the first file that is corrupt
    or truncated, or the first weight or bias that has a dtype that isn't allowed, such as quantized weights.
    """
    for path in files or sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise FieldError("model", f"{path} is corrupt: {_first_line(error)}") from error
        for name, dtype in dtypes.items():
            if name.endswith((".weight", ".bias")) and dtype not in allowed:
                expected = ", ".join(allowed)
                raise FieldError(
                    "model", f"{directory}: tensor {name} is stored as {dtype}, expected one of {expected}"
                )


def check_draft_model(speculative_model: str, target: Checkpoint, max_model_len: int) -> None:
    """Raises FieldError("speculative_model", …) if the draft model is missing or does not fit the target."""
    try:
        draft = resolve_checkpoint(speculative_model)
    except FieldError as error:
        raise FieldError("speculative_model", str(error).removeprefix(f"{error.field}: ")) from None
    if draft.max_model_len < max_model_len:
        sizes = f"{draft.max_model_len} tokens, and max_model_len is {max_model_len}"
        raise FieldError("speculative_model", f"its context has {sizes}: expected at least as many")
    if draft.config.vocab_size != target.config.vocab_size:
        sizes = f"{draft.config.vocab_size} tokens, the target's {target.config.vocab_size}"
        raise FieldError("speculative_model", f"its vocabulary has {sizes}: expected the same tokenizer")


def default_dtype(device: str) -> torch.dtype:
    """float32 on a CPU, so that all engines produce the same tokens; bfloat16 on a GPU."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
