"""Write common/texts: what quantization is calibrated on, and what it is measured with.

    python -m models.training.texts

All of it comes from the corpus that the shipped models were trained on, with other seeds: conversations, stories, and
questions whose trained answers are known.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from models.training.corpus.chat import write_conversation
from models.training.corpus.documents import END, render_chat
from models.training.corpus.facts import load_facts, load_small_talk
from models.training.corpus.stories import write_story
from models.training.corpus.tasks import Pieces, write_task

TEXTS_DIR = Path(__file__).parents[2] / "common" / "texts"
NUM_CHATS, NUM_STORIES, NUM_TASKS = 120, 30, 6
TASK_TOKENS = 400
QUESTION_STEP = 10  # every tenth trained question


def write_texts(seed: str) -> list[Pieces]:
    """Conversations, stories and tasks, mixed: each as pieces of text, and whether a model is to predict a piece."""
    rng = random.Random(seed)
    facts, small_talk = load_facts(), load_small_talk()
    texts = [render_chat(write_conversation(rng, facts, small_talk, 0.1)) for _ in range(NUM_CHATS)]
    texts += [[(write_story(rng).text + END, True)] for _ in range(NUM_STORIES)]
    texts += [render_chat(write_task(rng, TASK_TOKENS)) for _ in range(NUM_TASKS)]
    rng.shuffle(texts)
    return texts


def write_questions() -> list[dict[str, str]]:
    pairs = [(question, fact.answer) for fact in load_facts() for question in fact.questions]
    return [{"question": question, "answer": answer} for question, answer in pairs[::QUESTION_STEP]]


def save(name: str, lines: Iterable[object]) -> None:
    TEXTS_DIR.mkdir(exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (TEXTS_DIR / name).write_text(text, encoding="utf-8")


def main() -> None:
    calibration = write_texts("calibration")
    save("calibration.jsonl", calibration)
    save("held_out.jsonl", (text for text in write_texts("held out") if text not in calibration))
    save("questions.jsonl", write_questions())


if __name__ == "__main__":
    main()
