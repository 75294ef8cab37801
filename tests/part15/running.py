"""One row of features: real engines, requests over HTTP, and what /metrics and a trace say afterwards."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import redis

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.trace import StepTrace, read_trace
from part12_cpu_offloading.lab.redis_server import redis_server
from tests.forked_servers import ForkedServer, Host
from tests.part13.real_engines import Client, check_free, counters, proxied
from tests.part15.features import BLOCK_SIZE, SECRET, Flags, Row, flags_of, num_engines
from tests.process_checks import ServerClient

PART = "part15_full_architecture"
NUM_TOKENS = 12
AGAIN = 2  # the prompt that is asked for again, twice
NUM_EMULATED = 3  # prompts, if CUDA is emulated
LOOK = "Run this row alone (-k row and its number), then leave out one flag after the other. See combinations.md"

SHARED = (
    "A KV cache keeps the keys and values of all earlier tokens, so that a step computes only the new ones. ",
    "Once upon a time there was a small cat that lived in a house by the sea with an old man and his dog. ",
)
NUM_SHARED = 24  # tokens: three blocks
OWN = (
    (0, "Why?"), (1, "The cat"), (0, "How large is it for a model of six layers?"), (None, "one two three four " * 3),
    (1, "One day, the dog saw that the cat"), (0, SHARED[1] + "The cat asked the dog: what is"),
)  # fmt: skip


@functools.cache
def prompts() -> list[list[int]]:
    """Most of them begin like others; all have more tokens than a small budget; one repeats itself."""
    tokenizer = load_tokenizer(resolve_checkpoint("tiny"))
    shared = [tokenizer.encode(text)[:NUM_SHARED] for text in SHARED]
    return [[*([] if number is None else shared[number]), *tokenizer.encode(text)] for number, text in OWN]


def prompts_of(row: Row, device: str) -> list[list[int]]:
    is_emulated = row["kernels"] == "cuda" and device == "cpu"
    return prompts()[: NUM_EMULATED if is_emulated else len(prompts())]


def scarce_blocks(row: Row, device: str) -> int:
    """A pool in which the first prompts of an engine core have room, but not with their answers. One block is the null
    block, and one has to stay free when a request is admitted."""
    asked = prompts_of(row, device)
    largest = max(num_blocks([each], True, NUM_TOKENS) for each in asked)
    own, is_cached = asked[:: int(row["data parallelism"])], row["prefix caching"] == "on"
    for count in range(2, len(own) + 1):
        size = max(largest, num_blocks(own[:count], is_cached) + 1)
        if size < num_blocks(own[:count], is_cached, NUM_TOKENS):
            return size + 1
    raise AssertionError(f"no pool is too small for {own}: expected longer answers")


def num_blocks(asked: list[list[int]], is_cached: bool, num_tokens: int = 0) -> int:
    """Of prompts and so many tokens of each answer. is_cached: prompts share what they begin with."""
    found = set[tuple[int, ...]]()
    for number, prompt in enumerate(asked):
        whole = (*prompt, *[-1 - number] * num_tokens)  # the answers differ
        found |= {
            (0 if is_cached else number, *whole[: start + BLOCK_SIZE]) for start in range(0, len(whole), BLOCK_SIZE)
        }
    return len(found)


def command_line(flags: Flags) -> list[str]:
    """The flags as a user writes them."""
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


@dataclass
class Result:
    """What a row has done. answers: each prompt with the tokens that it got. counts: the counters of all engines.
    steps: the trace of each engine core. num_in_tier: files or keys. num_processes: for each engine, of its core and
    ranks. backends: that computed operations."""

    answers: list[tuple[list[int], list[int]]]
    counts: Counter[str]
    steps: list[list[StepTrace]]
    num_in_tier: int
    num_processes: list[int]
    backends: set[str]


def run_row(row: Row, device: str, host: Host, directory: Path) -> Result:
    """All prompts at once; then, with offloading, the device forgets its blocks; then one prompt again, twice."""
    asked = prompts_of(row, device)
    with tier_of(row, directory) as (flags, count_tier):
        traces = [directory / f"trace{number}" for number in range(num_engines(row))]
        engines = [host.serve(PART, *command_line({**flags_for(row, device, flags), "trace": each}), forks_ranks=True)
                   for each in traces]  # fmt: skip
        num_processes = [len(descendants(engine.pid)) for engine in engines]
        with in_front_of(engines) as client:
            answers = [*zip(asked, ask(client, asked), strict=True)]
            if row["KV offloading"] != "none":
                for engine in engines:
                    forget_blocks(engine)
            answers += [*zip([asked[AGAIN]] * 2, ask(client, [asked[AGAIN]] * 2), strict=True)]
            check_free(*engines)
        counts = Counter[str]()
        for engine in engines:
            counts.update(counters(engine))
        backends = set(re.findall(r'backend="(\w+)"', engines[0].get("/metrics").text))
        end(engines)
        return Result(answers, counts, steps_of(traces), count_tier(), num_processes, backends)


def flags_for(row: Row, device: str, places: Flags) -> Flags:
    flags = {**flags_of(row, device), **places}
    if row["KV pool"] == "scarce":
        flags["num_kv_blocks"] = scarce_blocks(row, device)
    return flags


@contextlib.contextmanager
def tier_of(row: Row, directory: Path) -> Iterator[tuple[Flags, functools.partial[int]]]:
    """The flag that says where the tier below host memory is, and what counts the blocks in it."""
    match row["KV offloading"]:
        case "host and disk":
            yield {"kv_offload_dir": directory / "disk"}, functools.partial(count_files, directory / "disk")
        case "host and Redis":
            with redis_server() as url:
                yield {"kv_offload_url": url}, functools.partial(count_keys, url)
        case _:
            yield {}, functools.partial(int)


def count_files(directory: Path) -> int:
    return sum(path.is_file() for path in directory.rglob("*"))


def count_keys(url: str) -> int:
    with redis.Redis.from_url(url) as server:
        return int(server.dbsize())


@contextlib.contextmanager
def in_front_of(engines: Sequence[ForkedServer]) -> Iterator[Client]:
    """A client of the engine, or of the proxy in front of a prefill engine and a decode engine."""
    if len(engines) == 1:
        yield Client(engines[0].url)
        return
    with proxied(engines[:1], engines[1:], part=PART, kv_transfer_secret=SECRET, health_interval=0.5) as (url, _):
        yield Client(url)


def ask(client: Client, asked: list[list[int]]) -> list[list[int]]:
    """One HTTP request, so that all prompts come at the same time. It becomes a request of the engine for each."""
    return client.ask_for_ids(asked, NUM_TOKENS)


def forget_blocks(engine: ServerClient) -> None:
    got = engine.post("/reset_prefix_cache", {})
    assert got.status_code == 200, f"all requests have ended: expected status 200, got {got.status_code}. {LOOK}"


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = list[int](children.get(pid, []))
    for child in found:  # which grows
        found += children.get(child, [])
    return found


def end(engines: Sequence[ForkedServer]) -> None:
    """As SIGTERM ends them, without an error."""
    for engine in engines:
        os.kill(engine.pid, signal.SIGTERM)
    for engine in engines:
        engine.check_end(0, r"(?s)(?!.*Traceback).*", LOOK)


def steps_of(traces: Sequence[Path]) -> list[list[StepTrace]]:
    """Of each engine core: with several of them, each has a file."""
    paths = [path for trace in traces for path in sorted(trace.parent.glob(f"{trace.name}*"))]
    return [list(read_trace(path).steps) for path in paths]
