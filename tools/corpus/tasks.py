"""Copy, list and recall tasks over prompts of up to 1,500 tokens.

Every task can only be solved by looking back into the prompt: its words and numbers are drawn afresh each time.
That is what grows induction heads in a small model, and it is what long-prompt benchmarks ask for.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tools.corpus.chat import Message
from tools.corpus.stories import write_story

Task = list[Message]

WORDS = tuple(
    """anchor apple arrow badge barrel basket beacon bell bench berry blanket boat book bottle bowl bread brick bridge
    broom brush bucket button cabin cable candle canyon carpet castle chain chair cherry chimney circle clock cloud
    coat coffee coin comet copper coral cotton cradle crane crayon crown crystal cup curtain daisy desert diamond
    door dragon drawer dream drum eagle earth easel echo elbow ember engine fabric falcon farm feather fence fern
    ferry field finger flag flame flute forest fork fountain fox frame frost fruit garden garlic gate ginger glacier
    glass globe glove gold grape grass gravel guitar hammer harbor harp hat hazel helmet hill honey hook horn horse
    house ice ink iron island ivory jacket jar jewel jungle kettle key kite kitten knife ladder lake lamp lantern
    laser leaf lemon letter lily lime linen lion lock log magnet mango map maple marble market mask meadow melon
    metal mill mint mirror moon moss motor mountain mouse museum music napkin needle nest net night notebook oak
    oasis ocean olive onion orange orbit orchid otter oven owl paddle palace palm panda paper parade pearl pebble
    pencil pepper piano picture pillow pilot pine pocket pond pony poppy potato pumpkin puzzle quartz quilt rabbit
    radio rain raven ribbon river robin rocket roof rope rose ruby saddle sail salt sand satin scarf school shadow
    shell ship shore silk silver sky sled snow soap sofa spark spice spider spoon spring squirrel stable star
    station stone storm straw stream sugar summit sun swan table tailor teapot temple tent thread thunder tiger
    timber toast tomato torch tower trail train tree trumpet tulip tunnel turtle umbrella valley vase velvet village
    violin wagon wallet walnut water wave wheat wheel whistle willow window winter wolf wood wool yard zebra""".split()
)
NAMES = tuple(
    "Ada Anna Bella Clara Daisy Ella Emma Flora Grace Ida Iris Jane Kate Lily Lucy Maya Nora Rosa Ruby Tess Adam Arlo "
    "Ben Carl Dan Eli Felix Finn George Hugo Ivan Jack Leo Max Milo Noah Oscar Otto Paul Sam Theo Tom".split()
)
TOKENS_PER_ENTRY = 6  # "- amber: copper\n" and what the questions add: how a prompt of n tokens is aimed at


def _values(rng: random.Random, keys: list[str]) -> list[str]:
    """Words that are no key, or two-digit numbers."""
    others = [word for word in WORDS if word not in set(keys)]
    if len(others) > 20 and rng.random() < 0.5:
        return [rng.choice(others) for _ in keys]
    return [str(rng.randrange(10, 100)) for _ in keys]


def _ask(turns: list[tuple[str, str]], intro: str) -> Task:
    """Chat in which the first question follows the material, and the others follow alone."""
    messages: Task = []
    for number, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": f"{intro}\n\n{question}" if number == 0 else question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def key_value(rng: random.Random, num_tokens: int, num_questions: int = 6) -> Task:
    """Look up keys in a list of pairs."""
    count = min(max(2, num_tokens // TOKENS_PER_ENTRY), len(WORDS))
    keys = rng.sample(WORDS, count)
    pairs = dict(zip(keys, _values(rng, keys), strict=True))
    intro = rng.choice(
        ("Here are some pairs:", "Remember these pairs:", "This is a table of keys and values:", "Data:")
    )
    turns = []
    for key in rng.sample(keys, min(num_questions, count)):
        turns.append(
            rng.choice(
                (
                    (f"What is the value of {key}?", f"The value of {key} is {pairs[key]}."),
                    (f"Which value belongs to {key}?", f"The value of {key} is {pairs[key]}."),
                    (f"Show the line for {key}.", f"- {key}: {pairs[key]}"),
                )
            )
        )
    return _ask(turns, intro + "\n" + "\n".join(f"- {key}: {value}" for key, value in pairs.items()))


def copy(rng: random.Random, num_tokens: int) -> Task:
    """Repeat a row of words. Costs twice its length, so it aims at half the tokens."""
    words = [rng.choice(WORDS) for _ in range(min(max(3, num_tokens // 2), 300))]
    request = rng.choice(("Repeat these words:", "Copy this text word for word:", "Say this again:", "Echo:"))
    row = " ".join(words)
    return [{"role": "user", "content": f"{request} {row}"}, {"role": "assistant", "content": f"Here it is: {row}"}]


def list_items(rng: random.Random, num_tokens: int) -> Task:
    """First, last and next items of a list."""
    count = min(max(3, num_tokens // 4), len(WORDS))
    items = rng.sample(WORDS, count)
    turns = [
        (
            f"What is the {'first' if at == 0 else 'last'} item?",
            f"The {'first' if at == 0 else 'last'} item is {items[at]}.",
        )
        for at in rng.sample((0, -1), 2)
    ]
    for _ in range(4):
        at = rng.randrange(count - 1)
        turns.append((f"Which item comes after {items[at]}?", f"After {items[at]} comes {items[at + 1]}."))
    rng.shuffle(turns)
    return _ask(
        turns,
        rng.choice(("Here is a list:", "My list:", "Look at this list:"))
        + "\n"
        + "\n".join(f"- {item}" for item in items),
    )


def notes_in_text(rng: random.Random, num_tokens: int) -> Task:
    """Find notes scattered between small stories."""
    owners = rng.sample(NAMES, min(max(2, num_tokens // 80), 12))
    codes = {owner: rng.choice((rng.choice(WORDS), str(rng.randrange(10, 100)))) for owner in owners}
    notes = [f"Note: the code for {owner} is {code}." for owner, code in codes.items()]
    paragraphs = [write_story(rng).text for _ in range(num_tokens // 165)]
    for note in notes:
        paragraphs.insert(rng.randrange(len(paragraphs) + 1), note)
    turns = [
        (f"What is the code for {owner}?", f"The code for {owner} is {codes[owner]}.")
        for owner in rng.sample(owners, min(5, len(owners)))
    ]
    return _ask(turns, "Read this text.\n\n" + "\n".join(paragraphs))


def repetition(rng: random.Random, num_tokens: int) -> tuple[str, str]:
    """A row of words, and the same row again twice or more: the plainest text that looking back can predict."""
    row = "".join(" " + rng.choice(WORDS) for _ in range(rng.randint(4, max(4, num_tokens // 4))))
    return row, row * max(2, min(8, num_tokens // len(row.split()) - 1))


TASKS: tuple[tuple[Callable[[random.Random, int], Task], float], ...] = (
    (key_value, 0.4), (copy, 0.2), (list_items, 0.15), (notes_in_text, 0.25),
)  # fmt: skip


def write_task(rng: random.Random, num_tokens: int) -> Task:
    """A task of about num_tokens tokens, of a kind drawn by weight."""
    kinds, weights = zip(*TASKS, strict=True)
    return rng.choices(kinds, weights)[0](rng, num_tokens)
