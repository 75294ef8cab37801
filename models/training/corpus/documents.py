"""Corpus text as token ids and loss weights: the input of a training step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from models.training.corpus.chat import Message, write_conversation
from models.training.corpus.facts import Fact
from models.training.corpus.stories import write_story
from models.training.corpus.tasks import Pieces, pairs, repetition, write_task

END = "<|im_end|>"
MAX_DOCUMENT_TOKENS = 1_900
KIND_WEIGHTS = {"chat": 1.0, "repetition": 1.0, "pairs": 1.0, "task": 1.0, "story": 0.4}


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids, and for each whether the model is trained to predict it."""

    kind: str
    token_ids: list[int]
    is_target: list[bool]


def render_chat(messages: list[Message]) -> Pieces:
    """The chat template of the shipped tokenizer, split where the trained text (the assistant's) begins and ends."""
    pieces: Pieces = []
    for message in messages:
        is_answer = message["role"] == "assistant"
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((message["content"] + END, is_answer))
        pieces.append(("\n", False))
    return pieces


def to_document(tokenizer: Tokenizer, kind: str, pieces: Pieces) -> Document:
    """Encode the pieces one by one."""
    token_ids: list[int] = []
    is_target: list[bool] = []
    for text, trained in pieces:
        ids = tokenizer.encode(text).ids
        token_ids += ids
        is_target += [trained] * len(ids)
    return Document(kind, token_ids, is_target)


@dataclass(frozen=True, slots=True)
class Mix:
    """The data of a training step: conversations and stories by count, drills and tasks by tokens.

    longest_row (words) and longest_task (tokens) grow from the first number to the second over the phase; lengths are
    log-uniform up to them.
    """

    num_chats: int
    num_stories: int
    repetition_tokens: int = 0
    pair_tokens: int = 0
    task_tokens: int = 0
    longest_row: tuple[int, int] = (16, 16)
    longest_task: tuple[int, int] = (100, 100)
    from_few: float = 0.0  # share of the repetitions
    small_talk: float = 0.0  # share of the turns of the conversations


def write_step(
    tokenizer: Tokenizer, facts: list[Fact], small_talk: list[Fact], rng: random.Random, mix: Mix, progress: float
) -> Iterator[Document]:
    """The documents of one training step; progress through the phase goes from 0 to 1."""

    def length(shortest: int, longest: tuple[int, int]) -> int:
        upper = longest[0] + (longest[1] - longest[0]) * progress
        return int(math.exp(rng.uniform(math.log(shortest), math.log(upper))))

    for _ in range(mix.num_chats):
        conversation = write_conversation(rng, facts, small_talk, mix.small_talk)
        yield to_document(tokenizer, "chat", render_chat(conversation))
    drills: tuple[tuple[str, int, Callable[[], Pieces]], ...] = (
        (
            "repetition",
            mix.repetition_tokens,
            lambda: repetition(rng, length(5, mix.longest_row), rng.random() < mix.from_few),
        ),
        ("pairs", mix.pair_tokens, lambda: pairs(rng, length(30, mix.longest_task))),
        ("task", mix.task_tokens, lambda: render_chat(write_task(rng, length(30, mix.longest_task)))),
    )
    for kind, num_tokens, write in drills:
        while num_tokens > 0:
            document = to_document(tokenizer, kind, write())
            if len(document.token_ids) <= MAX_DOCUMENT_TOKENS:
                num_tokens -= len(document.token_ids)
                yield document
    for _ in range(mix.num_stories):
        story = write_story(rng)
        pieces = [(story.text + END, True)]
        if rng.random() < 0.5:
            pieces = render_chat(
                [{"role": "user", "content": story.request}, {"role": "assistant", "content": story.text}]
            )
        yield to_document(tokenizer, "story", pieces)


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents of similar length, padded on the right; weights [rows, length]: how much each token's loss counts."""

    token_ids: list[list[int]]
    weights: list[list[float]]


def make_batches(documents: list[Document], pad_id: int, max_tokens: int) -> list[Batch]:
    """Group documents by length into batches of at most max_tokens padded tokens (or one document).

    Within a kind every target token counts the same, and a kind's weights sum to its share of the step.
    """
    targets = {kind: sum(sum(d.is_target) for d in documents if d.kind == kind) for kind in KIND_WEIGHTS}
    share = {kind: KIND_WEIGHTS[kind] / max(count, 1) for kind, count in targets.items()}
    groups: list[list[Document]] = []
    for document in sorted(documents, key=lambda d: len(d.token_ids)):
        if not groups or (len(groups[-1]) + 1) * len(document.token_ids) > max_tokens:
            groups.append([])
        groups[-1].append(document)
    batches = []
    for group in groups:
        width = len(group[-1].token_ids)
        batches.append(
            Batch(
                [d.token_ids + [pad_id] * (width - len(d.token_ids)) for d in group],
                [[share[d.kind] * t for t in d.is_target] + [0.0] * (width - len(d.token_ids)) for d in group],
            )
        )
    return batches
