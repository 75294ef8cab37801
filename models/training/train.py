"""Train the models that ship in `models/`, from the corpus in `models/training/corpus`.

    python -m models.training.train tokenizer
    python -m models.training.train tiny
    python -m models.training.train tiny-draft
    python -m models.training.train tiny-moe
    python -m models.training.train tiny --tune       fine-tune the model in models/tiny; the others likewise

It needs only this repository: the corpus is generated during training, from fixed seeds. A stopped run resumes from its
last checkpoint (`build/training/`). `tiny` takes about two hours on one CPU core; models/README.md
has more.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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

from models.training.corpus.documents import END, Batch, Mix, make_batches, write_step
from models.training.corpus.facts import Fact, load_facts, load_small_talk
from models.training.corpus.stories import write_story
from models.training.corpus.tasks import write_task

MODELS_DIR = Path(__file__).parent.parent
CHECKPOINT_DIR = MODELS_DIR.parent / "build" / "training"
VOCAB_SIZE = 4_096
CONTEXT_TOKENS = 2_048
BETAS = (0.9, 0.97)
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", END]
# GPT-2's way of splitting text, with numbers split into at most two digits.
PRE_TOKEN_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Rate:
    """An optimizer ("muon" or "adamw") and its learning rate."""

    optimizer: str
    lr: float


@dataclass(frozen=True, slots=True)
class Phase:
    """Some steps of training: the data mix, and the learning rate of each parameter group.

    attention and mlp are the matrices; rest is the embeddings, norms and routers, with AdamW. Each phase starts
    with new optimizers and a warm-up; over the last decay_steps the rates fall to zero.
    """

    steps: int
    mix: Mix
    attention: Rate
    mlp: Rate
    rest_lr: float
    warmup_steps: int = 20
    decay_steps: int = 0

    def lr_factor(self, step: int) -> float:
        decay = (self.steps - step) / self.decay_steps if self.decay_steps else 1.0
        return min(1.0, (step + 1) / self.warmup_steps, decay)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is trained.

    num_branches: this many phases at the end are branches, which all start at the end of the phase before them. The
    model is the mean of the weights at that point and at the branch ends, which has a lower loss than each of them.
    """

    config: PreTrainedConfig
    phases: tuple[Phase, ...]
    seed: int
    num_branches: int = 0
    batch_tokens: int = 2_500
    start: str = ""  # the shipped model whose weights training starts from; random weights without one

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def is_fork(self, steps_done: int) -> bool:
        """Whether the phase before the branches ends after this many steps."""
        return bool(self.num_branches) and steps_done == sum(p.steps for p in self.phases[: -self.num_branches])

    def phase_at(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and the step's number in it."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise ValueError(f"step {step} is past the last one")


def _rates(attention_lr: float, rest_lr: float, mlp_lr: float = 5e-3) -> dict[str, Any]:
    """AdamW for the attention, where copying must emerge, and Muon for the MLPs, which learn the facts."""
    return {"attention": Rate("adamw", attention_lr), "mlp": Rate("muon", mlp_lr), "rest_lr": rest_lr}


# Copying first, from repeated words in longer and longer rows; then recall, in longer prompts; facts throughout.
# Drills stay a large part of each step: without them copying is lost within a hundred steps.
TINY = (
    Phase(350, Mix(10, 2, 2_000, longest_row=(5, 16)), **_rates(4e-4, 4e-4), warmup_steps=50),
    Phase(250, Mix(8, 1, 2_200, longest_row=(7, 53), from_few=0.2), **_rates(1.2e-3, 1e-3), warmup_steps=50),
    Phase(400, Mix(10, 1, 1_100, 700, 900, (7, 101), (60, 300), from_few=0.3), **_rates(1e-3, 1e-3)),
    Phase(150, Mix(10, 1, 500, 500, 2_200, (7, 88), (100, 267), from_few=0.4), **_rates(9e-4, 9e-4)),
    Phase(100, Mix(10, 1, 400, 300, 2_000, (7, 88), (80, 220), from_few=0.3), **_rates(9e-4, 9e-4)),
    Phase(150, Mix(8, 1, 900, 700, 1_800, (7, 121), (150, 356), from_few=0.3), **_rates(9e-4, 9e-4)),
    Phase(250, Mix(16, 2, 300, 200, 2_000, (7, 251), (400, 1_500), from_few=0.3), **_rates(8e-4, 8e-4)),
    Phase(350, Mix(30, 3, 300, 200, 900, (7, 251), (600, 1_500), from_few=0.3), **_rates(6e-4, 6e-4), decay_steps=250),
    Phase(
        300, Mix(36, 5, 150, 100, 1_000, (7, 236), (1_000, 1_562), from_few=0.3), **_rates(7e-4, 7e-4, 6e-3),
        decay_steps=300,
    ),
    # Two branches follow; the shipped model is the mean of their ends and of the end of the phase above.
    Phase(
        150, Mix(36, 4, 100, 100, 1_600, (7, 251), (1_500, 1_600), from_few=0.3), **_rates(7e-4, 7e-4, 6e-3),
        decay_steps=140,
    ),
    Phase(
        100, Mix(36, 3, 100, 100, 1_300, (7, 251), (1_500, 1_600), from_few=0.3), **_rates(2.5e-4, 2.5e-4, 2e-3),
        warmup_steps=5, decay_steps=95,
    ),
)  # fmt: skip
DRAFT = (
    Phase(400, Mix(10, 2, 2_000, longest_row=(5, 21)), **_rates(1e-3, 1e-3), warmup_steps=50),
    Phase(250, Mix(8, 1, 2_200, longest_row=(7, 65), from_few=0.2), **_rates(1.2e-3, 1e-3), warmup_steps=50),
    Phase(
        500, Mix(24, 6, 500, 300, 1_000, (7, 121), (100, 600), from_few=0.3), **_rates(1.2e-3, 1e-3),
        decay_steps=300,
    ),
)  # fmt: skip
MOE = (
    Phase(200, Mix(28, 3, 0, 0, 800, longest_task=(150, 150)), Rate("muon", 2e-2), Rate("muon", 2e-2), 3e-3, 50),
    Phase(950, Mix(28, 3, 0, 0, 800, longest_task=(150, 1_219)), Rate("muon", 2e-2), Rate("muon", 2e-2), 3e-3, 1, 150),
    Phase(
        250, Mix(24, 3, 300, 0, 300, longest_row=(15, 75), longest_task=(64, 300)),
        Rate("adamw", 1.2e-3), Rate("adamw", 1.2e-3), 4e-4, 50, 150,
    ),
)  # fmt: skip

# Fine-tuning: greetings and questions about the model itself, which are few, beside all that the model knows already.
# Copying lives in the attention, facts and small talk in the MLPs: so the attention hardly moves.
TINY_TUNING = (
    Phase(
        70, Mix(36, 3, 100, 100, 1_500, (7, 251), (1_500, 1_600), from_few=0.3, small_talk=0.2),
        **_rates(6e-5, 1.5e-4, 1.5e-3), warmup_steps=5, decay_steps=65,
    ),
    Phase(
        26, Mix(40, 2, 100, 100, 1_500, (7, 251), (1_500, 1_600), from_few=0.3, small_talk=0.3),
        **_rates(4e-5, 1e-4, 1.2e-3), warmup_steps=3, decay_steps=22,
    ),
)  # fmt: skip
DRAFT_TUNING = Phase(
    100, Mix(24, 4, 200, 150, 600, (7, 121), (100, 600), from_few=0.3, small_talk=0.2),
    **_rates(4e-4, 4e-4, 3e-3), warmup_steps=5, decay_steps=95,
)  # fmt: skip
MOE_TUNING = Phase(
    80, Mix(28, 3, 300, 0, 300, (15, 75), (64, 300), small_talk=0.2), Rate("adamw", 4e-4), Rate("adamw", 4e-4), 2e-4,
    warmup_steps=5, decay_steps=75,
)  # fmt: skip


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
        "tiny": Recipe(tiny, TINY, seed=1, num_branches=2),
        "tiny-draft": Recipe(draft, DRAFT, seed=2),
        "tiny-moe": Recipe(moe, MOE, seed=3),
    }


def tuning(name: str) -> Recipe:
    """The fine-tuning of a shipped model."""
    phases = {"tiny": TINY_TUNING, "tiny-draft": (DRAFT_TUNING,), "tiny-moe": (MOE_TUNING,)}
    recipe = recipes()[name]
    return replace(recipe, phases=phases[name], num_branches=0, seed=10 + recipe.seed, start=name)


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

    query: [B, H, T, D]; key, value: [B, KV, T, D]. Returns [B, T, H, D]. On a CPU the backward pass
    of bf16 flash attention is up to four times slower than either.
    """
    del attention_mask  # padding is on the right, where the causal mask hides it
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
    """One phase's optimizers: for attention, for the MLPs (each expert's matrices by themselves), for the rest.

    Muon learns facts several times faster, but copying does not emerge in the attention; with AdamW it does.
    """

    def __init__(self, model: nn.Module, phase: Phase) -> None:
        named = dict(model.named_parameters())
        matrices = {n for n, p in named.items() if p.ndim >= 2 and "embed" not in n and "gate.weight" not in n}
        self.slices = [
            (named[n], i, nn.Parameter(named[n].data[i]))
            for n in sorted(matrices)
            if named[n].ndim == 3
            for i in range(len(named[n]))
        ]
        groups = {
            "attention": [named[n] for n in named if n in matrices and "self_attn" in n],
            "mlp": [named[n] for n in named if n in matrices and "self_attn" not in n and named[n].ndim == 2]
            + [view for _, _, view in self.slices],
            "rest": [named[n] for n in named if n not in matrices],
        }
        rates = {"attention": phase.attention, "mlp": phase.mlp, "rest": Rate("adamw", phase.rest_lr)}
        self.phase, self.rates = phase, rates
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            name: torch.optim.Muon(group, weight_decay=0.01)
            if rates[name].optimizer == "muon"
            else torch.optim.AdamW(group, betas=BETAS, weight_decay=0.0)
            for name, group in groups.items()
        }

    def step(self, step: int) -> None:
        for param, i, view in self.slices:
            assert param.grad is not None
            view.grad = param.grad[i]
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = self.rates[name].lr * self.phase.lr_factor(step)
            optimizer.step()

    def state_dict(self) -> dict[str, dict]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, states: dict[str, dict]) -> None:
        for name, state in states.items():
            self.optimizers[name].load_state_dict(state)


@dataclass(slots=True)
class Trainer:
    """The training of one model. The data of a step depends only on the seed and the step."""

    name: str
    recipe: Recipe
    device: torch.device
    model: Any = field(init=False)
    optimizer: Optimizer = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    facts: list[Fact] = field(init=False)
    small_talk: list[Fact] = field(init=False)
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    ends: list[dict[str, Tensor]] = field(default_factory=list)  # weights to average: at the fork and the branch ends

    def __post_init__(self) -> None:
        torch.manual_seed(self.recipe.seed)
        self.tokenizer = Tokenizer.from_file(str(MODELS_DIR / "tiny" / "tokenizer.json"))
        self.recipe.config.pad_token_id, self.recipe.config.eos_token_id = 0, SPECIAL_TOKENS.index(END)
        self.recipe.config.bos_token_id = None
        AttentionInterface.register("training", training_attention)
        model = AutoModelForCausalLM.from_config(
            self.recipe.config, dtype=torch.float32, attn_implementation="training"
        )
        if self.recipe.start:
            trained = AutoModelForCausalLM.from_pretrained(MODELS_DIR / self.recipe.start, dtype=torch.float32)
            model.load_state_dict(trained.state_dict())
        self.model = model.to(self.device).train()
        self.optimizer = Optimizer(self.model, self.recipe.phases[0])
        self.facts, self.small_talk = load_facts(), load_small_talk()

    @property
    def computes_bf16(self) -> bool:
        """Whether the device has instructions for bf16. Without them, bf16 products take 30 times longer than fp32."""
        return self.device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()

    @property
    def checkpoint(self) -> Path:
        return CHECKPOINT_DIR / f"{self.name}{'-tuned' if self.recipe.start else ''}.pt"

    def resume(self) -> None:
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]
            self.ends = state["ends"]
            phase, step = self.recipe.phase_at(min(self.step, self.recipe.steps - 1))
            if step:  # a phase's first step creates new optimizers
                self.optimizer = Optimizer(self.model, phase)
                self.optimizer.load_state_dict(state["optimizer"])

    def save_checkpoint(self) -> None:
        CHECKPOINT_DIR.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                 "seconds": self.seconds, "tokens": self.tokens, "ends": self.ends}  # fmt: skip
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").replace(self.checkpoint)

    def batch_loss(self, batch: Batch) -> Tensor:
        """Weighted cross entropy of the target tokens; logits are computed only for those."""
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
            # transformers pools all layers, so a single layer could starve an expert; here the loss is per layer.
            balance = sum(
                load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok, real)
                for logits in output.router_logits
            )
            loss = loss + config.router_aux_loss_coef * balance * (real.sum() / self.recipe.batch_tokens)
        return loss

    def train_step(self) -> float:
        started = time.perf_counter()
        phase, step = self.recipe.phase_at(self.step)
        if step == 0:
            if self.ends:  # a branch
                self.model.load_state_dict(self.ends[0])
            self.optimizer = Optimizer(self.model, phase)
        rng = random.Random(f"{self.recipe.seed}/{self.step}")
        corpus = write_step(self.tokenizer, self.facts, self.small_talk, rng, phase.mix, step / phase.steps)
        documents = list(corpus)
        total = 0.0
        for batch in make_batches(documents, pad_id=0, max_tokens=self.recipe.batch_tokens):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.computes_bf16):
                loss = self.batch_loss(batch)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(step)
        self.model.zero_grad()
        self.step += 1
        if self.recipe.is_fork(self.step) or (self.ends and step + 1 == phase.steps):
            self.ends.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        self.tokens += sum(len(document.token_ids) for document in documents)
        self.seconds += time.perf_counter() - started
        return total

    def export(self, directory: Path) -> None:
        """Write the Hugging Face layout: bf16 weights, configs, tokenizer and chat template."""
        exported = AutoModelForCausalLM.from_config(self.recipe.config, dtype=torch.bfloat16)
        weights = self.model.state_dict()
        if self.ends:
            weights = {name: sum(end[name] for end in self.ends) / len(self.ends) for name in weights}
        exported.load_state_dict(weights)
        exported.generation_config = GenerationConfig(
            eos_token_id=SPECIAL_TOKENS.index(END), pad_token_id=0, do_sample=True, temperature=0.3
        )
        exported.save_pretrained(directory)
        save_tokenizer(self.tokenizer, directory)
        hardware = (
            torch.cuda.get_device_name() if self.device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
        )
        report = {
            "steps": self.step, "tokens": self.tokens, "hours": round(self.seconds / 3600, 2), "hardware": hardware,
            "torch": torch.__version__.split("+")[0], "seed": self.recipe.seed,
        }  # fmt: skip
        path = directory / "training.json"
        if self.recipe.start:
            report = {**json.loads(path.read_text()), "tuning": report}
        path.write_text(json.dumps(report, indent=2) + "\n")


def train(name: str, recipe: Recipe, stop_after: int | None, checkpoint_every: int = 10) -> None:
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
    parser.add_argument("--stop-after", type=int, default=None, metavar="STEP", help="stop early, to resume later")
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    parser.add_argument("--tune", action="store_true", help="fine-tune the shipped model instead")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.what == "tokenizer":
        save_tokenizer(train_tokenizer(), MODELS_DIR / "tiny")
        return
    recipe = tuning(args.what) if args.tune else recipes()[args.what]
    if args.fresh:
        (CHECKPOINT_DIR / f"{args.what}{'-tuned' if args.tune else ''}.pt").unlink(missing_ok=True)
    train(args.what, recipe, args.stop_after)


if __name__ == "__main__":
    main()
