"""The shipped models and the corpus they were trained on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.training import train
from models.training.corpus.chat import write_conversation
from models.training.corpus.documents import Mix, make_batches, render_chat, write_step
from models.training.corpus.facts import load_facts, load_small_talk, parse_facts
from models.training.train import Phase, Rate, Recipe, Trainer, recipes

MODELS_DIR = Path(__file__).resolve().parents[2] / "models"
SHIPPED = ("tiny", "tiny-draft", "tiny-moe")


@pytest.mark.parametrize("name", SHIPPED)
def test_transformers_loads_a_shipped_model_unchanged(name: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(MODELS_DIR / name, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(MODELS_DIR / name)
    assert not info["missing_keys"] and not info["unexpected_keys"], f"{name}: {info}"
    assert model.dtype == torch.bfloat16, f"{name}: weights ship as bfloat16, got {model.dtype}"
    assert len(tokenizer) == model.config.vocab_size == 4_096
    assert model.config.max_position_embeddings == 2_048
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    shape = recipes()[name].config
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rope_parameters"):
        got, expected = getattr(model.config, field), getattr(shape, field)
        assert got == expected, f"{name}: {field} is {got}, the recipe says {expected}"


def test_the_models_share_a_tokenizer_and_stay_small() -> None:
    tokenizers = {(MODELS_DIR / name / "tokenizer.json").read_text(encoding="utf-8") for name in SHIPPED}
    assert len(tokenizers) == 1, "a draft model must speak its target's tokens"
    num_bytes = sum(path.stat().st_size for path in MODELS_DIR.rglob("*") if path.is_file())
    assert num_bytes <= 40_000_000, f"models/ holds {num_bytes:,} bytes; at most 40,000,000"


def test_training_renders_chats_as_the_template_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS_DIR / "tiny")
    rng = random.Random(0)
    for _ in range(50):
        messages = write_conversation(rng, load_facts())
        pieces = render_chat(messages)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert "".join(piece for piece, _ in pieces) == text
        assert [i for piece, _ in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)
        answers = [piece.removesuffix("<|im_end|>") for piece, trained in pieces if trained]
        assert answers == [m["content"] for m in messages if m["role"] == "assistant"]


def test_the_corpus_has_its_facts_and_holds_out_the_evaluation() -> None:
    facts = load_facts()
    assert len(facts) >= 300
    trained = {question.lower() for fact in facts for question in fact.questions}
    leaked = [question for fact in facts for question in fact.held_out if question.lower() in trained]
    assert not leaked, f"held-out phrasings that are trained as well: {leaked}"


def test_a_malformed_fact_is_named() -> None:
    with pytest.raises(ValueError, match=r"x\.txt:1: expected '# id'"):
        parse_facts("What is this?\n", "x.txt")
    with pytest.raises(ValueError, match="a has 1 Q, 0 T and 1 A lines"):
        parse_facts("# a\nQ: b?\nA: c.\n", "x.txt")


def test_a_training_step_weighs_each_kind_by_its_share() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS_DIR / "tiny").backend_tokenizer
    mix = Mix(num_chats=5, num_stories=2, repetition_tokens=300, pair_tokens=200, task_tokens=400, from_few=0.5)
    steps = [list(write_step(tokenizer, load_facts(), load_small_talk(), random.Random(7), mix, 0.5)) for _ in range(2)]
    assert steps[0] == steps[1], "the same seed must write the same documents"
    batches = make_batches(steps[0], pad_id=0, max_tokens=500)
    assert sum(len(batch.token_ids) for batch in batches) == len(steps[0]), "a document was lost or doubled"
    total = sum(weight for batch in batches for row in batch.weights for weight in row)
    assert total == pytest.approx(4.4), "chats, repetition, pairs and tasks weigh 1 each, stories 0.4"


def test_branches_start_at_the_fork_and_the_model_is_their_mean(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = train._llama(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    phase = Phase(2, Mix(1, 0), Rate("adamw", 1e-2), Rate("muon", 1e-2), 1e-2, warmup_steps=1)
    monkeypatch.setattr(train, "CHECKPOINT_DIR", tmp_path)
    recipe = Recipe(config, (phase, phase, phase), seed=0, num_branches=2)
    trainer = Trainer("test", recipe, torch.device("cpu"))
    starts = []
    while trainer.step < recipe.steps:
        trainer.train_step()
        if trainer.step == 5:  # in the middle of the last branch: stop and resume
            trainer.save_checkpoint()
            trainer = Trainer("test", recipe, torch.device("cpu"))
            trainer.resume()
        starts.append(len(trainer.ends))
    assert starts == [0, 1, 1, 2, 2, 3], f"weights kept after each step: the fork's, then each branch's; got {starts}"
    trainer.export(tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in exported.items():
        mean = sum(end[name] for end in trainer.ends) / 3
        assert torch.equal(tensor, mean.to(torch.bfloat16)), f"{name} is not the mean of the three ends"
    assert len({float(end["model.embed_tokens.weight"].sum()) for end in trainer.ends}) == 3, "the branches are one"
