"""Evaluate the shipped models and write the results into their model card.

    python -m models.training.evaluate            print the table
    python -m models.training.evaluate --write    also write models/evaluation.json and the table in models/README.md

One teacher-forced pass shows whether a greedy answer equals the trained one: greedy decoding gives exactly the trained
answer if and only if each of its tokens is the model's first choice after the tokens before it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from models.training.corpus import tasks
from models.training.corpus.chat import Message
from models.training.corpus.documents import END, Document, render_chat, to_document
from models.training.corpus.facts import Fact, load_facts, load_small_talk
from models.training.corpus.stories import write_story

MODELS_DIR = Path(__file__).parent.parent
MARKERS = ("<!-- evaluation:begin -->", "<!-- evaluation:end -->")
EXAM_SEED = "exam"
NUM_DRAFT_TOKENS = 4
RIGHT_FACT_OVERLAP = 0.8


@dataclass(frozen=True, slots=True)
class Score:
    """One line of the table: what was measured, the value, and the bar it must reach."""

    model: str
    measure: str
    value: float
    bar: float | None
    unit: str = "%"

    @property
    def passed(self) -> bool:
        return self.bar is None or self.value >= self.bar


class Examinee:
    """A shipped model with its tokenizer."""

    def __init__(self, name: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(MODELS_DIR / name, dtype=torch.float32).eval()
        self.tokenizer = Tokenizer.from_file(str(MODELS_DIR / name / "tokenizer.json"))
        self.end_id = self.tokenizer.token_to_id(END)

    def document(self, messages: list[Message]) -> Document:
        return to_document(self.tokenizer, "exam", render_chat(messages))

    @torch.inference_mode()
    def first_choices(self, token_ids: list[int]) -> Tensor:
        """The greedy choice for each position from the second on: [len - 1]."""
        return self.model(torch.tensor([token_ids])).logits[0, :-1].argmax(dim=-1)

    def knows(self, document: Document) -> bool:
        """Whether greedy decoding gives every trained token of the document."""
        hits = self.first_choices(document.token_ids) == torch.tensor(document.token_ids[1:])
        return bool(hits[torch.tensor(document.is_target[1:])].all())

    @torch.inference_mode()
    def answer(self, prompt: str, max_tokens: int = 120, temperature: float = 0.0) -> list[int]:
        """Token ids of the continuation, including the end token if there is one."""
        ids = torch.tensor([self.tokenizer.encode(prompt).ids])
        config = GenerationConfig(
            max_new_tokens=max_tokens, do_sample=temperature > 0, temperature=temperature or None, top_k=0,
            eos_token_id=self.end_id, pad_token_id=0,
        )  # fmt: skip
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[
            0, ids.shape[1] :
        ].tolist()

    def text(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode([t for t in token_ids if t != self.end_id])


def ask(question: str) -> str:
    return f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n"


def qa(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def percent(hits: Iterable[bool]) -> float:
    found = list(hits)
    return 100 * sum(found) / len(found)


def overlap(answer: str, expected: str) -> float:
    """F1 of the words two texts share."""
    a, b = (Counter(re.findall(r"[\w.]+", text.lower())) for text in (answer, expected))
    return 2 * (a & b).total() / max(a.total() + b.total(), 1)


def is_right_fact(examinee: Examinee, fact: Fact, question: str) -> bool:
    """Whether the greedy answer is the fact's, exactly or in at least RIGHT_FACT_OVERLAP of its words."""
    if examinee.knows(examinee.document(qa(question, fact.answer))):
        return True
    return overlap(examinee.text(examinee.answer(ask(question), 80)), fact.answer) >= RIGHT_FACT_OVERLAP


def trained_questions(examinee: Examinee, facts: Sequence[Fact]) -> float:
    return percent(examinee.knows(examinee.document(qa(q, fact.answer))) for fact in facts for q in fact.questions)


def recall(examinee: Examinee, kind: str, count: int, num_tokens: int = 1_000) -> float:
    """Exact answers to the first question on prompts of num_tokens to 1.25 num_tokens tokens."""
    rng = random.Random(f"{EXAM_SEED}/{kind}")
    hits: list[bool] = []
    for _ in range(100 * count):
        document = examinee.document(getattr(tasks, kind)(rng, int(num_tokens * rng.uniform(0.8, 2.0)))[:2])
        if num_tokens <= document.is_target.index(True) <= 1.25 * num_tokens:
            hits.append(examinee.knows(document))
            if len(hits) == count:
                return percent(hits)
    raise ValueError(f"{kind} makes too few prompts of {num_tokens} tokens")


def stories(examinee: Examinee, count: int) -> tuple[list[str], float, float]:
    """Stories sampled at temperature 0.8, the share of their words in the corpus, and the share that end."""
    rng = random.Random(f"{EXAM_SEED}/stories")
    words = {word for _ in range(3_000) for word in re.findall(r"[a-z']+", write_story(rng).text.lower())}
    torch.manual_seed(0)
    told = [examinee.answer(ask(write_story(rng).request), 220, temperature=0.8) for _ in range(count)]
    texts = [examinee.text(ids) for ids in told]
    used = [word for text in texts for word in re.findall(r"[a-z']+", text.lower())]
    return texts, percent(word in words for word in used), percent(ids[-1] == examinee.end_id for ids in told)


def accepted_drafts(target: Examinee, draft: Examinee, prompts: Sequence[str]) -> list[int]:
    """For each round of NUM_DRAFT_TOKENS greedy draft tokens, how many the target's greedy text confirms.

    Verification stops at the first miss, so one pass of the draft model over the target's text gives the result.
    """
    accepted: list[int] = []
    for prompt in prompts:
        prompt_ids = target.tokenizer.encode(prompt).ids
        token_ids = prompt_ids + target.answer(prompt, 160)
        hits = (draft.first_choices(token_ids) == torch.tensor(token_ids[1:])).tolist()[len(prompt_ids) - 1 :]
        at = 0
        while at + NUM_DRAFT_TOKENS <= len(hits):  # proposals that would run past the end are not counted
            run = next((i for i in range(NUM_DRAFT_TOKENS) if not hits[at + i]), NUM_DRAFT_TOKENS)
            accepted.append(run)
            at += run + 1
    return accepted


@torch.inference_mode()
def least_used_expert(examinee: Examinee, facts: Sequence[Fact]) -> float:
    """Percentage of tokens that are routed to the least used expert of any layer."""
    config = examinee.model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts)
    num_tokens = 0
    for fact in facts:
        ids = examinee.document(qa(fact.questions[0], fact.answer)).token_ids
        output = examinee.model.model(torch.tensor([ids]), output_router_logits=True)
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices
            counts[layer] += torch.bincount(chosen.flatten(), minlength=config.num_experts)
        num_tokens += len(ids)
    return 100 * float(counts.min()) / num_tokens


def examine(console: Console) -> tuple[list[Score], list[str]]:
    facts = load_facts()
    rng = random.Random(EXAM_SEED)
    tiny, draft, moe = (Examinee(name) for name in ("tiny", "tiny-draft", "tiny-moe"))
    scores: list[Score] = []

    def record(*args: Any, **kwargs: Any) -> None:
        scores.append(Score(*args, **kwargs))
        console.print(f"{scores[-1].model}: {scores[-1].measure}: {scores[-1].value:.1f}")

    record("tiny", f"trained questions answered exactly ({sum(len(f.questions) for f in facts):,})",
           trained_questions(tiny, facts), 95.0)  # fmt: skip
    record("tiny", f"held-out phrasings answered with the right fact ({sum(len(f.held_out) for f in facts)})",
           percent(is_right_fact(tiny, fact, q) for fact in facts for q in fact.held_out), 80.0)  # fmt: skip
    small_talk = load_small_talk()
    record("tiny", f"greetings and questions about itself, trained ({sum(len(f.questions) for f in small_talk)})",
           trained_questions(tiny, small_talk), 95.0)  # fmt: skip
    record("tiny", f"greetings and questions about itself, held out ({sum(len(f.held_out) for f in small_talk)})",
           percent(is_right_fact(tiny, fact, q) for fact in small_talk for q in fact.held_out), 80.0)  # fmt: skip
    shares = {kind: recall(tiny, kind, 50) for kind in ("key_value", "notes_in_text", "list_items")}
    record("tiny", "recall over 1,000-token prompts (150)", mean(shares.values()), 90.0)
    for kind, share in shares.items():
        record("tiny", f"of these, {kind.replace('_', ' ')} (50)", share, None)
    texts, known_words, ended = stories(tiny, 20)
    record("tiny", "words of sampled stories (T = 0.8) that the corpus has", known_words, None)
    record("tiny", "sampled stories (T = 0.8) that come to their end", ended, None)
    kinds = {
        "answers": [ask(f.questions[0]) for f in rng.sample(facts, 80)],
        "stories": [ask(write_story(rng).request) for _ in range(12)],
        "recall": [_first_prompt(tasks.write_task(rng, 300)) for _ in range(20)],
    }
    rounds: list[int] = []
    for kind, prompts in kinds.items():
        accepted = accepted_drafts(tiny, draft, prompts)
        rounds += accepted
        record(
            "tiny-draft", f"accepted of {NUM_DRAFT_TOKENS} draft tokens, {kind}", mean(accepted), None, unit="tokens"
        )
    record("tiny-draft", f"accepted of {NUM_DRAFT_TOKENS} draft tokens, all of these", mean(rounds), 2.0, unit="tokens")
    record("tiny-moe", "trained questions answered exactly", trained_questions(moe, facts), 90.0)
    record("tiny-moe", "tokens that the least used expert gets", least_used_expert(moe, facts), 2.0)
    return scores, texts[:3]


def _first_prompt(messages: list[Message]) -> str:
    return ask(messages[0]["content"])


def markdown(scores: Sequence[Score], samples: Sequence[str]) -> str:
    lines = ["| model | measured | value | bar |", "|---|---|---|---|"]
    for s in scores:
        bar = "" if s.bar is None else f"≥ {s.bar:g} {s.unit}" + ("" if s.passed else " (missed)")
        lines.append(f"| `{s.model}` | {s.measure} | {s.value:.1f} {s.unit} | {bar} |")
    lines += ["", "The first three of the sampled stories, as they came:", ""]
    lines += [f"> {text}\n" for text in samples]
    return "\n".join(lines).rstrip()


def write_card(scores: Sequence[Score], samples: Sequence[str]) -> None:
    card = MODELS_DIR / "README.md"
    before, rest = card.read_text(encoding="utf-8").split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    card.write_text(f"{before}{MARKERS[0]}\n{markdown(scores, samples)}\n{MARKERS[1]}{after}", encoding="utf-8")
    rows = [
        {"model": s.model, "measure": s.measure, "value": round(s.value, 2), "bar": s.bar, "unit": s.unit}
        for s in scores
    ]
    (MODELS_DIR / "evaluation.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", action="store_true", help="write models/evaluation.json and the table in models/README.md"
    )
    args = parser.parse_args()
    console = Console()
    scores, samples = examine(console)
    table = Table("model", "measured", "value", "bar", "")
    for s in scores:
        table.add_row(
            s.model,
            s.measure,
            f"{s.value:.1f} {s.unit}",
            "" if s.bar is None else f"{s.bar:g}",
            "" if s.passed else "missed",
        )
    console.print(table)
    if args.write:
        write_card(scores, samples)
    return 0 if all(s.passed for s in scores) else 1


if __name__ == "__main__":
    raise SystemExit(main())
