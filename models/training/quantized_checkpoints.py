"""Make the quantized checkpoints of tests/part14/checkpoints, each with the tool that such checkpoints come from.

    python -m models.training.quantized_checkpoints ct-w4a16 --out tests/part14/checkpoints

The source is a random Llama of one layer. Beside each checkpoint, `expected.safetensors` holds what the tool reads from
it: `logits` for `input_ids`, in float32, and two dequantized weights. The tools cannot share an environment, so each
has its own (Python 3.11 and the CPU build of torch). RECIPES names the environment of each checkpoint. The course
itself needs none of these packages.

llmcompressor (brings compressed-tensors 0.19.0 and transformers 5.17.0):

    pip install torch==2.13.0 llmcompressor==0.14.0.1

llmcompressor-0.13, the last release that writes `weight_g_idx` (brings compressed-tensors 0.18.0, transformers 5.14.1):

    pip install torch==2.13.0 llmcompressor==0.13.0

gptqmodel (declares torch 2.14.1 but runs with 2.13.0; on two cores its default of one worker fails):

    pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 torchao==0.18.0 \\
        tokenicer==0.0.14 device-smi==0.5.7 defuser==0.0.28 pypcre==0.6.4 logbar==0.4.15 threadpoolctl==3.8.0 \\
        pillow==13.0.0 protobuf==7.36.2 requests==2.34.2 setuptools==84.2.1
    pip install --no-deps --no-build-isolation gptqmodel==7.7.0
    export GPTQMODEL_CPU_WORKERS=2

autoawq (transformers 4.51.3 is the last release that its authors tested it with):

    pip install torch==2.13.0 transformers==4.51.3 accelerate==1.15.0 datasets==5.0.1 setuptools==84.2.1
    pip install --no-deps --no-build-isolation autoawq==0.2.9
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SEED = 14
HIDDEN_SIZE = 64
VOCAB_SIZE = 32
NUM_CALIBRATION_PROMPTS = 32
CALIBRATION_TOKENS = 64
NUM_INPUT_TOKENS = 16
SAVED_LINEARS = {
    "q_proj.weight": "model.layers.0.self_attn.q_proj",
    "down_proj.weight": "model.layers.0.mlp.down_proj",
}
KEPT_FILES = ("config.json", "model.safetensors", "quantize_config.json")
# What a tool writes into config.json from a tokenizer or a path, and the engine must not find there.
DROPPED_KEYS = ("_name_or_path", "bos_token", "eos_token", "pad_token")
FP8_KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One checkpoint: the environment it is made in, and the options that its tool gets."""

    environment: str
    options: Mapping[str, Any]
    hidden_size: int = HIDDEN_SIZE
    intermediate_size: int = 128


@dataclass(frozen=True, slots=True)
class Tool:
    """How one tool quantizes a model directory into another, and how it reads the result."""

    dtype: torch.dtype
    quantize: Callable[[Mapping[str, Any], Path, Path], None]
    expect: Callable[[Path, Tensor], dict[str, Tensor]]


def group_weights(num_bits: int = 4, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    """Options of llmcompressor for integer weights with one scale per 32 inputs."""
    weights = {"num_bits": num_bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | more}}}


RECIPES = {
    # The preset has groups of 128 inputs, so its layers are wider. In all the others a row has at least two groups.
    "ct-w4a16": Recipe("llmcompressor", {"scheme": "W4A16", "targets": ["Linear"]}, 128, 256),
    "ct-w4a16-asym": Recipe("llmcompressor", group_weights(symmetric=False)),
    "ct-w4a16-actorder": Recipe("llmcompressor-0.13", group_weights(symmetric=False, actorder="group")),
    "ct-w8a16": Recipe("llmcompressor", group_weights(num_bits=8)),
    "ct-w8a8": Recipe("llmcompressor", {"scheme": "W8A8", "targets": ["Linear"]}),
    "ct-fp8": Recipe("llmcompressor", {"scheme": "FP8_DYNAMIC", "targets": ["Linear"]}),
    "ct-kv-fp8": Recipe(
        "llmcompressor", {"scheme": "FP8_DYNAMIC", "targets": ["Linear"], "kv_cache_scheme": FP8_KV_CACHE}
    ),
    "gptq-v1": Recipe("gptqmodel", {"bits": 4, "group_size": 32}),
    "gptq-v1-asym": Recipe("gptqmodel", {"bits": 4, "group_size": 32, "sym": False}),
    "gptq-desc-act": Recipe("gptqmodel", {"bits": 4, "group_size": 32, "desc_act": True}),
    "gptq-8bit": Recipe("gptqmodel", {"bits": 8, "group_size": 32}),
    "gptq-v2": Recipe("gptqmodel", {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"}),
    "awq": Recipe("autoawq", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
}


def write_source(directory: Path, recipe: Recipe, dtype: torch.dtype) -> None:
    """Write the model to quantize, with a tokenizer, which some tools insist on."""
    config = LlamaConfig(
        hidden_size=recipe.hidden_size, intermediate_size=recipe.intermediate_size, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=recipe.hidden_size // 4, vocab_size=VOCAB_SIZE,
        max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    spread_weights(model)
    model.to(dtype).save_pretrained(directory)
    write_tokenizer(directory)


@torch.no_grad()
def spread_weights(model: nn.Module) -> None:
    """Random weights whose rows have means of their own and whose columns have outliers, so that zero points differ."""
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.normal_(1.0, 0.1, generator=generator)
            continue
        weight.normal_(0.0, 0.15, generator=generator)
        if "proj" in name:
            weight.add_(torch.randn(weight.shape[0], 1, generator=generator), alpha=0.1)
            weight[:, torch.randperm(weight.shape[1], generator=generator)[:3]] *= 4


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB_SIZE)}, unk_token="t0"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", pad_token="t0", bos_token="t1", eos_token="t2"
    ).save_pretrained(directory)


def calibration_ids() -> Tensor:
    """[NUM_CALIBRATION_PROMPTS, CALIBRATION_TOKENS], int64."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(VOCAB_SIZE, (NUM_CALIBRATION_PROMPTS, CALIBRATION_TOKENS), generator=generator)


def quantize_with_llmcompressor(options: Mapping[str, Any], source: Path, out: Path) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoTokenizer

    has_actorder = "actorder" in json.dumps(options)
    modifier = (GPTQModifier if has_actorder else QuantizationModifier)(ignore=["lm_head"], **options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    ids = calibration_ids()
    prompts = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(
        model=model, recipe=modifier, dataset=prompts, tokenizer=AutoTokenizer.from_pretrained(source),
        num_calibration_samples=NUM_CALIBRATION_PROMPTS, pipeline="basic",
    )  # fmt: skip
    model.save_pretrained(out, save_compressed=True)


@torch.inference_mode()
def expect_from_transformers(checkpoint: Path, input_ids: Tensor) -> dict[str, Tensor]:
    """transformers with compressed-tensors. It quantizes activations and the KV cache where the config says so."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    logits = model(input_ids).logits[0]  # the first pass replaces the packed weights by dequantized ones
    return {"logits": logits} | {name: model.get_parameter(f"{path}.weight") for name, path in SAVED_LINEARS.items()}


def quantize_with_gptqmodel(options: Mapping[str, Any], source: Path, out: Path) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(act_group_aware=False, offload_to_disk=False, **options)
    model = GPTQModel.load(str(source), config, device="cpu", dtype=torch.float16)
    prompts = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in calibration_ids()]
    model.quantize(prompts, batch_size=1, backend=BACKEND.GPTQ_TORCH)
    model.save(str(out))


@torch.inference_mode()
def expect_from_gptqmodel(checkpoint: Path, input_ids: Tensor) -> dict[str, Tensor]:
    """gptqmodel's torch kernel, with scales and activations in float32."""
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(checkpoint), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model.float()
    weights = {name: model.get_submodule(path).dequantize_weight().T for name, path in SAVED_LINEARS.items()}
    return {"logits": model(input_ids).logits[0]} | weights


def quantize_with_autoawq(options: Mapping[str, Any], source: Path, out: Path) -> None:
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    model = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu", safetensors=True)
    model.quantize(
        AutoTokenizer.from_pretrained(source), quant_config=dict(options), calib_data=calibration_ids().tolist(),
        max_calib_seq_len=CALIBRATION_TOKENS, apply_clip=False,
    )  # fmt: skip
    model.save_quantized(str(out))


@torch.inference_mode()
def expect_from_autoawq(checkpoint: Path, input_ids: Tensor) -> dict[str, Tensor]:
    """AutoAWQ's dequantize_gemm in a float32 Llama, since AutoAWQ's own forward pass rounds activations to float16."""
    from awq.utils.packing_utils import dequantize_gemm

    config = AutoConfig.from_pretrained(checkpoint)
    bits, group_size = config.quantization_config["bits"], config.quantization_config["group_size"]
    state = load_file(checkpoint / "model.safetensors")
    for path in [name.removesuffix(".qweight") for name in state if name.endswith(".qweight")]:
        qweight, qzeros, scales = (state.pop(f"{path}.{name}") for name in ("qweight", "qzeros", "scales"))
        state[f"{path}.weight"] = dequantize_gemm(qweight, qzeros, scales.float(), bits, group_size).T
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(state)
    return {"logits": model(input_ids).logits[0]} | {
        name: state[f"{path}.weight"] for name, path in SAVED_LINEARS.items()
    }


LLMCOMPRESSOR = Tool(torch.bfloat16, quantize_with_llmcompressor, expect_from_transformers)
TOOLS = {
    "llmcompressor": LLMCOMPRESSOR,
    "llmcompressor-0.13": LLMCOMPRESSOR,
    "gptqmodel": Tool(torch.float16, quantize_with_gptqmodel, expect_from_gptqmodel),
    "autoawq": Tool(torch.float16, quantize_with_autoawq, expect_from_autoawq),
}


def clean_config(path: Path) -> None:
    """Remove from config.json what belongs to the tokenizer or to this machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in DROPPED_KEYS}
    config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A temporary working directory, since some tools write logs into the current one."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            yield Path(scratch)
        finally:
            os.chdir(before)


def saved_linears(recipe: Recipe) -> list[str]:
    """Of a larger model, only the smaller weight, so that all checkpoints together stay below a megabyte."""
    return list(SAVED_LINEARS)[: 2 if recipe.hidden_size == HIDDEN_SIZE else 1]


def make_checkpoint(name: str, out_dir: Path) -> Path:
    """Quantize the source model as RECIPES[name] says, into out_dir/name. Returns that directory."""
    recipe = RECIPES[name]
    tool = TOOLS[recipe.environment]
    checkpoint = out_dir.resolve() / name
    checkpoint.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    input_ids = calibration_ids()[:1, :NUM_INPUT_TOKENS].contiguous()
    with scratch_directory() as scratch:
        written = scratch / "written"
        write_source(scratch / "source", recipe, tool.dtype)
        tool.quantize(recipe.options, scratch / "source", written)
        for file in (written / kept for kept in KEPT_FILES):
            if file.exists():
                shutil.copy(file, checkpoint)
        expected = tool.expect(written, input_ids)
    clean_config(checkpoint / "config.json")
    tensors = {"input_ids": input_ids, "logits": expected["logits"].float()}
    tensors |= {name: expected[name].to(torch.float16).contiguous() for name in saved_linears(recipe)}
    save_file(tensors, checkpoint / "expected.safetensors")
    return checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES, help="the checkpoint to make")
    parser.add_argument("--out", type=Path, required=True, help="the directory that gets a directory of that name")
    args = parser.parse_args()
    checkpoint = make_checkpoint(args.name, args.out)
    for file in sorted(checkpoint.iterdir()):
        print(f"{file.stat().st_size:>8,} {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
