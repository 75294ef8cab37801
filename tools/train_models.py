"""Train the models that ship in `models/`, from the corpus in `tools/corpus`.

    python -m tools.train_models tokenizer
    python -m tools.train_models tiny
    python -m tools.train_models tiny-draft
    python -m tools.train_models tiny-moe

Needs nothing but this repository: the corpus is written as training goes, from fixed seeds. A run that was stopped goes
on from its last checkpoint (`build/training/`). `tiny` takes about an hour on one CPU core; models/README.md has more.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from tools.corpus.documents import END, Batch, Mix, make_batches, write_step
from tools.corpus.facts import Fact, load_facts
from tools.corpus.stories import write_story
from tools.corpus.tasks import write_task

ROOT = Path(__file__).parent.parent
MODELS_DIR = ROOT / "models"
CHECKPOINT_DIR = ROOT / "build" / "training"
VOCAB_SIZE = 4_096
CONTEXT_TOKENS = 2_048
BETAS = (0.9, 0.97)
MUON_LR, MUON_REST_LR = 0.02, 3e-3
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", END]
# GPT-2's way of cutting text, with numbers cut into at most two digits.
PRE_TOKEN_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is trained: what it reads, and the learning rates by step."""

    config: PreTrainedConfig
    mixes: tuple[Mix, ...]
    decay_steps: int
    seed: int
    muon_steps: int
    matrix_lr: float = 1.2e-3  # AdamW's; matrices that Muon has made large learn nothing at 4e-4
    rest_lr: float = 4e-4
    warmup_steps: int = 50
    batch_tokens: int = 2_500

    @property
    def steps(self) -> int:
        return self.mixes[-1].until_step

    def lr_factor(self, step: int) -> float:
        """Warm-up at the start and after the change of optimizer, linear decay at the end."""
        since_start = step - self.muon_steps if step >= self.muon_steps else step
        return min(1.0, (since_start + 1) / self.warmup_steps, (self.steps - step) / self.decay_steps)

    def mix_at(self, step: int) -> tuple[Mix, int]:
        """The mix of a step and how long its longest task may be."""
        start = 0
        for mix in self.mixes:
            if step < mix.until_step:
                shortest, longest = mix.longest_task
                return mix, int(shortest + (longest - shortest) * (step - start) / (mix.until_step - start))
            start = mix.until_step
        raise ValueError(f"step {step} is past the last one, {self.steps}")


def _llama(**shape: Any) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT_TOKENS, head_dim=32, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, tie_word_embeddings=True, **shape,
    )  # fmt: skip


def recipes() -> dict[str, Recipe]:
    tiny = _llama(
        hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4
    )  # fmt: skip
    draft = _llama(
        hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )  # fmt: skip
    moe = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT_TOKENS, hidden_size=256, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, intermediate_size=512, moe_intermediate_size=256,
        num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, router_aux_loss_coef=0.02,
        tie_word_embeddings=True,
    )  # fmt: skip
    return {
        "tiny": Recipe(
            tiny, muon_steps=500, decay_steps=220, seed=1,
            mixes=(
                Mix(200, 28, 2_000, 5, longest_task=(150, 150)),
                Mix(500, 28, 2_000, 5, longest_task=(150, 488)),
                Mix(1_250, 6, 2_500, 1, longest_task=(64, 64), repetition_share=0.8),
                Mix(1_370, 20, 1_500, 5, longest_task=(64, 300), repetition_share=0.2),
                Mix(1_650, 32, 300, 4, longest_task=(64, 100), repetition_share=0.2),
            ),
        ),
        "tiny-draft": Recipe(
            draft, muon_steps=1_300, decay_steps=400, seed=2,
            mixes=(
                Mix(1_300, 28, 800, 5, longest_task=(64, 150), repetition_share=0.3),
            ),
        ),
        "tiny-moe": Recipe(
            moe, muon_steps=1_150, decay_steps=150, seed=3,
            mixes=(
                Mix(200, 28, 800, 3, longest_task=(150, 150)),
                Mix(1_150, 28, 800, 3, longest_task=(150, 1_219)),
                Mix(1_400, 24, 600, 3, longest_task=(64, 300), repetition_share=0.5),
            ),
        ),
    }  # fmt: skip


def train_tokenizer(seed: int = 0) -> Tokenizer:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens over a sample of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(_tokenizer_text(random.Random(seed)), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, f"the corpus fills only {tokenizer.get_vocab_size()} tokens"
    return tokenizer


def _tokenizer_text(rng: random.Random) -> Iterator[str]:
    for fact in load_facts():
        yield from ("system", "user", "assistant")
        yield from (fact.answer, fact.answer, *fact.questions)
    for _ in range(2_000):
        story = write_story(rng)
        yield from (story.request, story.text)
    for _ in range(400):
        yield from (message["content"] for message in write_task(rng, 300))


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token="<|pad|>", model_max_length=CONTEXT_TOKENS,
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)  # fmt: skip


def training_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention that trains quickly on a CPU: plain bf16 products up to 600 tokens, fp32 flash attention above.

    query: [B, H, T, D]; key, value: [B, KV, T, D]. Returns [B, T, H, D]. On a CPU bf16 flash attention goes
    backward up to four times slower than either.
    """
    del attention_mask  # padding stands on the right, where the causal mask hides it
    batch, heads, length, dim = query.shape
    if length > 600 or query.is_cuda:
        output = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), is_causal=True, scale=scaling, enable_gqa=True
        )
    else:
        grouped = query.reshape(batch, key.shape[1], -1, length, dim)
        mask = torch.full((length, length), -1e9, dtype=query.dtype, device=query.device).triu(1)
        scores = grouped @ key.unsqueeze(2).transpose(3, 4) * scaling + mask
        output = (scores.softmax(-1).to(value.dtype) @ value.unsqueeze(2)).reshape(batch, heads, length, dim)
    return output.transpose(1, 2).to(query.dtype), None


class Optimizer:
    """Muon for the matrices (each expert's by itself) in the first steps, then AdamW; AdamW for all the rest.

    Under Muon the facts are learnt several times faster, but copying did not emerge in 800 steps, and was lost where it
    had been learnt before. Under AdamW at a small learning rate it emerges within some hundred steps.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        named = dict(model.named_parameters())
        hidden = [n for n, p in named.items() if p.ndim >= 2 and "embed" not in n and "gate.weight" not in n]
        self.slices = [
            (named[n], i, nn.Parameter(named[n].data[i]))
            for n in hidden
            if named[n].ndim == 3
            for i in range(len(named[n]))
        ]
        matrices = [named[n] for n in hidden if named[n].ndim == 2] + [view for _, _, view in self.slices]
        self.recipe = recipe
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(matrices, weight_decay=0.01),
            "adamw": torch.optim.AdamW(matrices, betas=BETAS, weight_decay=0.0),
            "rest": torch.optim.AdamW([p for n, p in named.items() if n not in hidden], betas=BETAS, weight_decay=0.0),
        }

    def step(self, step: int) -> None:
        recipe = self.recipe
        for param, i, view in self.slices:
            assert param.grad is not None
            view.grad = param.grad[i]
        rates = {"muon": MUON_LR, "rest": MUON_REST_LR}
        if step >= recipe.muon_steps:
            rates = {"adamw": recipe.matrix_lr, "rest": recipe.rest_lr}
        for name, rate in rates.items():
            self.optimizers[name].param_groups[0]["lr"] = rate * recipe.lr_factor(step)
            self.optimizers[name].step()

    def state_dict(self) -> dict[str, dict]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, states: dict[str, dict]) -> None:
        for name, state in states.items():
            self.optimizers[name].load_state_dict(state)


@dataclass(slots=True)
class Trainer:
    """One model on its way. What it reads at a step follows from the seed and the step alone."""

    name: str
    recipe: Recipe
    device: torch.device
    model: Any = field(init=False)
    optimizer: Optimizer = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    facts: list[Fact] = field(init=False)
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(self.recipe.seed)
        self.tokenizer = Tokenizer.from_file(str(MODELS_DIR / "tiny" / "tokenizer.json"))
        self.recipe.config.pad_token_id, self.recipe.config.eos_token_id = 0, SPECIAL_TOKENS.index(END)
        self.recipe.config.bos_token_id = None
        AttentionInterface.register("training", training_attention)
        model = AutoModelForCausalLM.from_config(
            self.recipe.config, dtype=torch.float32, attn_implementation="training"
        )
        self.model = model.to(self.device).train()
        self.optimizer = Optimizer(self.model, self.recipe)
        self.facts = load_facts()

    @property
    def checkpoint(self) -> Path:
        return CHECKPOINT_DIR / f"{self.name}.pt"

    def resume(self) -> None:
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]

    def save_checkpoint(self) -> None:
        CHECKPOINT_DIR.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                 "seconds": self.seconds, "tokens": self.tokens}  # fmt: skip
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").replace(self.checkpoint)

    def batch_loss(self, batch: Batch) -> Tensor:
        """Weighted cross entropy of the target tokens; logits are computed for those alone."""
        ids = torch.tensor(batch.token_ids, device=self.device)
        weights = torch.tensor(batch.weights, device=self.device)[:, 1:]
        targets = weights.nonzero(as_tuple=True)
        is_moe = hasattr(self.recipe.config, "num_experts")
        output = self.model.model(
            input_ids=ids[:, :-1], use_cache=False, **({"output_router_logits": True} if is_moe else {})
        )
        logits = self.model.lm_head(output.last_hidden_state[targets]).float()
        losses = F.cross_entropy(logits, ids[:, 1:][targets], reduction="none")
        loss = (losses * weights[targets]).sum()
        if is_moe:
            config = self.recipe.config
            real = (ids[:, :-1] != config.pad_token_id).long()
            # transformers' own loss pools the layers, which lets each layer starve an expert; so it is taken by layer.
            balance = sum(
                load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok, real)
                for logits in output.router_logits
            )
            loss = loss + config.router_aux_loss_coef * balance * (real.sum() / self.recipe.batch_tokens)
        return loss

    def train_step(self) -> float:
        started = time.perf_counter()
        rng = random.Random(f"{self.recipe.seed}/{self.step}")
        documents = list(write_step(self.tokenizer, self.facts, rng, *self.recipe.mix_at(self.step)))
        total = 0.0
        for batch in make_batches(documents, pad_id=0, max_tokens=self.recipe.batch_tokens):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.batch_loss(batch)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(self.step)
        self.model.zero_grad()
        self.step += 1
        self.tokens += sum(len(document.token_ids) for document in documents)
        self.seconds += time.perf_counter() - started
        return total

    def export(self, directory: Path) -> None:
        """Write the Hugging Face layout: bf16 weights, configs, tokenizer and chat template."""
        exported = AutoModelForCausalLM.from_config(self.recipe.config, dtype=torch.bfloat16)
        exported.load_state_dict(self.model.state_dict())
        exported.generation_config = GenerationConfig(eos_token_id=SPECIAL_TOKENS.index(END), pad_token_id=0)
        exported.save_pretrained(directory)
        save_tokenizer(self.tokenizer, directory)
        hardware = (
            torch.cuda.get_device_name() if self.device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
        )
        report = {
            "steps": self.step, "tokens": self.tokens, "hours": round(self.seconds / 3600, 2), "hardware": hardware,
            "torch": torch.__version__.split("+")[0], "seed": self.recipe.seed,
        }  # fmt: skip
        (directory / "training.json").write_text(json.dumps(report, indent=2) + "\n")


def train(name: str, recipe: Recipe, stop_after: int | None, checkpoint_every: int = 50) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(name, recipe, device)
    trainer.resume()
    last = min(recipe.steps, stop_after or recipe.steps)
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=last, completed=trainer.step, loss="")
        smooth = 0.0
        while trainer.step < last:
            loss = trainer.train_step()
            smooth = loss if not smooth else 0.95 * smooth + 0.05 * loss
            progress.update(bar, completed=trainer.step, loss=f"loss {smooth:.3f}")
            if trainer.step % checkpoint_every == 0 or trainer.step == last:
                trainer.save_checkpoint()
                progress.console.print(
                    f"{name}: step {trainer.step}, loss {smooth:.3f}, "
                    f"{trainer.tokens / 1e6:.1f}M tokens, {trainer.tokens / trainer.seconds:,.0f} tokens/s"
                )
    trainer.export(MODELS_DIR / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokenizer", *recipes()])
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--stop-after", type=int, default=None, metavar="STEP", help="stop early, to go on later")
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.what == "tokenizer":
        save_tokenizer(train_tokenizer(), MODELS_DIR / "tiny")
        return
    if args.fresh:
        (CHECKPOINT_DIR / f"{args.what}.pt").unlink(missing_ok=True)
    train(args.what, recipes()[args.what], args.stop_after)


if __name__ == "__main__":
    main()
