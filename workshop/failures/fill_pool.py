"""A KV pool that is too small for the batch: requests are preempted, and every answer comes all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from workshop.failures.checks import CheckFailed
from workshop.failures.clients import GREEDY, HTTP, answers_in
from workshop.failures.lab import Lab
from workshop.failures.scenario import Choice, Scenario

PART = "part04_continuous_batching"
FLAGS = ("--num-threads", "1", "--device", "cpu", "--no-log-stats", "--model", "tiny")
LARGE, SMALL = 400, 25  # blocks, null block included
MAX_TOKENS, BLOCK_SIZE = 60, 16
PROMPTS = [
    f"Once upon a time there was a small {animal} that lived in a house by the sea with an old man and his dog. "
    f"One day, the {animal} said to the dog:"
    for animal in ("cat", "bird", "horse", "mouse", "fox", "duck", "cow", "bear")
]


def run(lab: Lab) -> None:
    lab.title("What is running")
    large = lab.start(PART, *FLAGS, "--num-kv-blocks", str(LARGE))
    small = lab.start(PART, *FLAGS, "--num-kv-blocks", str(SMALL))
    lab.wait_until_ready()
    body = {**GREEDY, "prompt": PROMPTS, "max_tokens": MAX_TOKENS}
    sent, received = lab.folder / "batch.json", lab.folder / "answers.json"
    sent.write_text(json.dumps(body), encoding="utf-8")
    lab.title(f"Before: {len(PROMPTS)} requests at once, with a pool of {large.num_blocks} blocks (and the null block)")
    expected = answers_in(post(large.url, body))
    before = large.counters()
    num_blocks = sum(-(-(len(large.tokenize(prompt)) + MAX_TOKENS) // BLOCK_SIZE) for prompt in PROMPTS)
    lab.say(f"the first answer: {expected[0].text.strip()[:90]!r} …")
    lab.say(f"preemptions: {before['num_preemptions']:.0f}; at their ends, the requests need {num_blocks} blocks of "
            f"{BLOCK_SIZE} tokens together. The other server has {small.num_blocks}.")  # fmt: skip
    lab.predict()
    url = f"{small.url}/v1/completions"
    lab.break_it(
        f"Send the same {len(PROMPTS)} requests to the server with {small.num_blocks} blocks.",
        f"curl -s {url} -H 'Content-Type: application/json' -d @{sent} -o {received}",
        lambda: read_answers(received) is not None, "the answers have come",
        do=lambda: received.write_text(json.dumps(post(small.url, body)), encoding="utf-8"),
    )  # fmt: skip
    lab.title("After")
    got = read_answers(received)
    assert got is not None, "break_it() has waited for it"
    found = answers_in(got)
    after = small.counters()
    num_preemptions = int(after["num_preemptions"])
    lab.table([
        ("KV blocks", large.num_blocks, small.num_blocks),
        ("answers", len(expected), len(found)),
        ("preemptions", int(before["num_preemptions"]), num_preemptions),
        ("failed requests", int(before["request_errors"]), int(after["request_errors"])),
        ("KV blocks in use", large.blocks_in_use(before), small.blocks_in_use(after)),
    ])  # fmt: skip
    lab.check_that("preemptions", num_preemptions > 0, "at least 1", num_preemptions)
    lab.check_answers("answers with both pools", [a.token_ids for a in expected], [a.token_ids for a in found])
    lab.wait_until_free(small)


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The response to a request with several prompts, whatever its status."""
    response = httpx.post(f"{url}/v1/completions", json=body, **HTTP)
    return dict(response.json())


def read_answers(path: Path) -> dict[str, Any] | None:
    """None if they have not come completely. Raises CheckFailed if an error has come instead."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if "choices" not in body:
        raise CheckFailed("the response to all requests", "a choice for each", body)
    return dict(body)


SCENARIO = Scenario(
    name="fill_pool", part=4, minutes=6, run=run,
    about="a KV pool too small for its requests: preemption, and the same answers",
    question="A server with too few KV blocks gets eight requests at once. Each of them fits alone, but not all "
             "together. What happens?",
    choices={
        "a": Choice("Some requests fail with an error: the pool is out of memory.",
                    "the engine refuses only a request that wouldn't fit even alone; the others take turns."),
        "b": Choice("The engine admits only as many requests as fit with their complete answers; none is preempted.",
                    "the length of an answer isn't known in advance, so a request is admitted as soon as its tokens so "
                    "far fit."),
        "c": Choice("The latest requests are preempted and computed again later; all answers are the same.",
                    "a preempted request loses its blocks but keeps its tokens, so prompt and output are computed "
                    "again in one prefill."),
        "d": Choice("The latest requests are preempted; their answers begin again and may differ.",
                    "output tokens are never thrown away: the client sees a pause, then the next token."),
    },
    answer="c",
    look={
        f"{PART}/core/scheduler.py::Scheduler._grow_or_preempt": "preempts the request that joined last",
        f"{PART}/core/scheduler.py::Scheduler.preempt": "frees its blocks and keeps its tokens",
    },
    vllm="Scheduler._preempt_request in v1/core/sched/scheduler.py",
)  # fmt: skip
