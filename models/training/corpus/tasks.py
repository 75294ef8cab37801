"""Copy, list and recall tasks over prompts of up to 1,500 tokens.

Every task can only be solved by looking back into the prompt: its words are random each time.
This makes a small model learn induction heads, and it is what long-prompt benchmarks test.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from models.training.corpus.chat import Message
from models.training.corpus.stories import write_story

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
DAYS = tuple(
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August "
    "September October November December".split()
)
DRILL_WORDS = WORDS + NAMES + DAYS
TOKENS_PER_ENTRY = 6  # "- amber: copper\n" plus the questions; sizes a prompt of n tokens


def _ask(turns: list[tuple[str, str]], intro: str) -> Task:
    """A chat whose first question includes the material; later questions come without it."""
    messages: Task = []
    for number, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": f"{intro}\n\n{question}" if number == 0 else question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def key_value(rng: random.Random, num_tokens: int, num_questions: int = 10) -> Task:
    """Look up keys in a list of pairs."""
    count = min(max(2, num_tokens // TOKENS_PER_ENTRY), len(WORDS))
    keys = rng.sample(WORDS, count)
    pairs = {key: rng.choice(WORDS) for key in keys}
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
    count = min(max(3, num_tokens // 4), len(DRILL_WORDS))
    items = rng.sample(DRILL_WORDS, count)
    turns = [
        (
            f"What is the {'first' if at == 0 else 'last'} item?",
            f"The {'first' if at == 0 else 'last'} item is {items[at]}.",
        )
        for at in rng.sample((0, -1), 2)
    ]
    for _ in range(8):
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
    owners = rng.sample(NAMES, min(max(2, num_tokens // 25), 12))
    words = {owner: rng.choice(WORDS) for owner in owners}
    notes = [f"Note for {owner}: {word}." for owner, word in words.items()]
    paragraphs = [write_story(rng).text for _ in range(num_tokens // 165)]
    for note in notes:
        paragraphs.insert(rng.randrange(len(paragraphs) + 1), note)
    turns = [
        (f"What is the note for {owner}?", f"The note for {owner} is {words[owner]}.")
        for owner in rng.sample(owners, min(10, len(owners)))
    ]
    return _ask(turns, "Read this text.\n\n" + "\n".join(paragraphs))


Pieces = list[tuple[str, bool]]  # text, and whether the model is trained to predict it


def repetition(rng: random.Random, num_words: int, from_few: bool) -> Pieces:
    """A row of words and the same row again, up to four times: the simplest text that copying can predict.

    from_few: words come from a small set, so that one word does not determine the next; the words before it do.
    """
    pool = rng.sample(DRILL_WORDS, rng.randint(2, 12)) if from_few else DRILL_WORDS
    row = "".join(" " + rng.choice(pool) for _ in range(num_words))
    return [(row, False), (row * (1 if num_words > 40 else rng.randint(1, 4)), True)]


def pairs(rng: random.Random, num_tokens: int) -> Pieces:
    """Pairs of words, then all of them again in another order: recall without any other text."""
    keys = rng.sample(DRILL_WORDS, min(max(2, num_tokens // 10), 140))
    values = {key: rng.choice(DRILL_WORDS) for key in keys}
    pieces = [("".join(f"- {key}: {value}\n" for key, value in values.items()), False)]
    for key in rng.sample(keys, len(keys)):
        pieces += [(f"- {key}:", False), (f" {values[key]}\n", True)]
    return pieces


TASKS: tuple[tuple[Callable[[random.Random, int], Task], float], ...] = (
    (key_value, 0.3), (copy, 0.1), (list_items, 0.35), (notes_in_text, 0.25),
)  # fmt: skip


def write_task(rng: random.Random, num_tokens: int) -> Task:
    """A task of about num_tokens tokens, of a kind drawn by weight."""
    kinds, weights = zip(*TASKS, strict=True)
    return rng.choices(kinds, weights)[0](rng, num_tokens)
