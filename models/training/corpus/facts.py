"""Facts about LLM inference: what the shipped models can answer.

A file in `facts/` holds blocks separated by blank lines:

    # kv-cache-what          the fact's id
    Q: What is a KV cache?   trained phrasings, four or more
    T: ...                   held-out phrasings, one or more: never trained on
    A: ...                   the one answer, a single line
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

FACTS_DIR = Path(__file__).parent / "facts"
SMALL_TALK = Path(__file__).parent / "small_talk.txt"
MIN_QUESTIONS = 4
MAX_ANSWER_WORDS = 45


@dataclass(frozen=True, slots=True)
class Fact:
    """One answer, the questions trained on it and the questions held out for the evaluation."""

    fact_id: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str


@dataclass(slots=True)
class _Block:
    where: str
    fact_id: str = ""
    lines: dict[str, list[str]] = field(default_factory=lambda: {"Q": [], "T": [], "A": []})

    def finish(self) -> Fact:
        questions, held_out, answers = self.lines["Q"], self.lines["T"], self.lines["A"]
        if not self.fact_id:
            raise ValueError(f"{self.where}: a fact needs a line '# its-id'")
        if len(questions) < MIN_QUESTIONS or not held_out or len(answers) != 1:
            raise ValueError(
                f"{self.where}: {self.fact_id} has {len(questions)} Q, {len(held_out)} T and {len(answers)} A lines; "
                f"expected at least {MIN_QUESTIONS}, at least 1 and exactly 1"
            )
        if len(answers[0].split()) > MAX_ANSWER_WORDS:
            raise ValueError(f"{self.where}: {self.fact_id} answers in more than {MAX_ANSWER_WORDS} words")
        return Fact(self.fact_id, tuple(questions), tuple(held_out), answers[0])


def parse_facts(text: str, where: str) -> list[Fact]:
    """Read the blocks of one file. Raises ValueError naming the file, the line and the problem."""
    facts: list[Fact] = []
    block: _Block | None = None
    for number, raw in enumerate([*text.splitlines(), ""], start=1):
        line = raw.strip()
        if not line:
            if block:
                facts.append(block.finish())
            block = None
            continue
        block = block or _Block(f"{where}:{number}")
        if line.startswith("# "):
            block.fact_id = line[2:].strip()
        elif line[:2] in ("Q:", "T:", "A:"):
            block.lines[line[0]].append(line[2:].strip())
        else:
            raise ValueError(f"{where}:{number}: expected '# id', 'Q:', 'T:' or 'A:', got {line[:40]!r}")
    return facts


def load_small_talk() -> list[Fact]:
    """Greetings, thanks and questions about the model itself, which fine-tuning adds."""
    return parse_facts(SMALL_TALK.read_text(encoding="utf-8"), SMALL_TALK.name)


def load_facts(directory: Path = FACTS_DIR) -> list[Fact]:
    """All facts, sorted by file name. Raises ValueError on a repeated id or a question asked twice."""
    facts: list[Fact] = []
    seen: dict[str, str] = {}
    for path in sorted(directory.glob("*.txt")):
        for fact in parse_facts(path.read_text(encoding="utf-8"), path.name):
            for key in (f"# {fact.fact_id}", *fact.questions, *fact.held_out):
                if other := seen.get(key.lower()):
                    raise ValueError(f"{path.name}: {fact.fact_id}: {key!r} already appears in {other}")
                seen[key.lower()] = f"{path.name}: {fact.fact_id}"
            facts.append(fact)
    return facts


if __name__ == "__main__":
    loaded = load_facts()
    print(
        f"{len(loaded)} facts, {sum(len(f.questions) for f in loaded)} trained questions, "
        f"{sum(len(f.held_out) for f in loaded)} held out"
    )
