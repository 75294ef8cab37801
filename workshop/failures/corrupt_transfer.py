"""KV that is damaged between two engines: what came before it is used, the rest is computed, the answer is the same."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from part13_disaggregation.worker.kv_wire import WINDOW
from workshop.failures.checks import CheckFailed, until
from workshop.failures.clients import Answer, ask
from workshop.failures.lab import Lab
from workshop.failures.pairs import PART, Cluster, start_cluster
from workshop.failures.scenario import Choice, Scenario
from workshop.failures.servers import Server, resume

FLAGS = ("--kv-lease", "600", "--kv-transfer-timeout", "600")  # the decode engine is stopped for as long as you need
PREFILL_FLAGS = ("--max-num-batched-tokens", "16", "--max-num-seqs", "16")  # many small steps, and so many pieces
MAX_TOKENS = 24
PROMPT = " ".join(
    f"On day {day}, the old man and his dog went to the sea, and the cat waited in the house until they came home."
    for day in range(1, 25)
)
NUM_CHANGES = 40  # that are waited for before the decode engine is stopped, at the first try
HEAD, PAGE = 64, 4_096  # bytes


class SharedMemory:
    """The memory of the decode engine that the prefill engine writes pieces to, seen from a third process."""

    def __init__(self, decode: Server) -> None:
        """Raises CheckFailed if there is none: it is made with the first transfer."""
        assert decode.core is not None, "it is ready"
        self.pid = decode.core
        folder, found = Path(f"/proc/{self.pid}/fd"), dict[str, Path]()  # by name: some have two descriptors
        for path in folder.iterdir():
            with contextlib.suppress(OSError):  # it has been closed
                found[path.readlink().name] = path
        found = {name: path for name, path in found.items() if name.startswith("memfd:kv-")}
        if len(found) != 1:
            raise CheckFailed(f"shared memory in {folder}", "one file with the name memfd:kv-…", list(found))
        [self.path] = found.values()
        descriptor = os.open(self.path, os.O_RDONLY)
        self.data = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        os.close(descriptor)

    def heads(self) -> bytes:
        """The first bytes of each slot, which change with each piece that is written there."""
        slot_bytes = len(self.data) // WINDOW
        return b"".join(self.data[slot * slot_bytes : slot * slot_bytes + HEAD] for slot in range(WINDOW))

    def wait_for_changes(self, number: int, answer: Future[Answer]) -> None:
        """Until the heads have changed so often, or the answer is there."""
        last, num_changes = self.heads(), 0
        while num_changes < number and not answer.done():
            before, last = last, self.heads()
            num_changes += last != before
            time.sleep(0.0005)  # a step takes a few milliseconds

    def first_change(self, before: bytes) -> int | None:
        """The place of the first byte that has changed."""
        now = bytes(self.data)
        pages = range(0, len(now), PAGE)
        page = next((page for page in pages if now[page : page + PAGE] != before[page : page + PAGE]), None)
        return None if page is None else next(at for at in range(page, page + PAGE) if now[at] != before[at])


@dataclass(frozen=True, slots=True)
class Caught:
    """A transfer whose receiver is stopped. answer: to its request. before: the decode engine's counters before it.
    place: of a byte that was written after the stop, so that it has not been read."""

    answer: Future[Answer]
    before: dict[str, float]
    place: int


def run(lab: Lab) -> None:
    lab.title("What is running: a prefill engine, a decode engine, and the proxy in front of them")
    cluster = start_cluster(lab, 1, FLAGS, PREFILL_FLAGS)
    [decode] = cluster.decode
    lab.title("Before")
    expected = ask(cluster.proxy.url, PROMPT, MAX_TOKENS)
    counters = decode.counters()
    lab.say(f"A prompt of {expected.num_prompt_tokens} tokens; the answer: {expected.text.strip()[:70]!r} …")
    lab.say(f"tokens fetched from the prefill engine: {counters['kv_transfer_fetched_tokens']:.0f}, failed transfers: "
            f"{counters['kv_transfer_failed']:.0f}")  # fmt: skip
    lab.predict()
    memory = SharedMemory(decode)
    with ThreadPoolExecutor(1) as threads:
        try:
            caught = catch_transfer(cluster, memory, threads)
            damage(lab, memory, caught.place)
        finally:
            resume(memory.pid)
        got = caught.answer.result()
    check_recovery(lab, cluster, expected, got, caught.before)


def catch_transfer(cluster: Cluster, memory: SharedMemory, threads: ThreadPoolExecutor) -> Caught:
    """Send the prompt again, and stop the core of the decode engine when some of its KV has come.

    If that is too late, because all of it has come, try again and stop it earlier.
    """
    [decode], num_changes = cluster.decode, NUM_CHANGES
    while True:
        for engine in (cluster.prefill, decode):
            engine.reset_prefix_cache()
        before = decode.counters()
        answer = threads.submit(ask, cluster.proxy.url, PROMPT, MAX_TOKENS)
        memory.wait_for_changes(num_changes, answer)
        stop(memory.pid)
        content = bytes(memory.data)
        # The prefill engine goes on computing; nothing is read any more, so it stops sending after WINDOW pieces.
        until(lambda: not cluster.prefill.counters()["num_requests_running"], "the prompt to be computed")
        if (place := memory.first_change(content)) is not None:
            return Caught(answer, before, place)
        resume(memory.pid)
        answer.result()
        num_changes = max(1, num_changes // 2)


def stop(pid: int) -> None:
    """Stop a process. Returns when all of its threads stand still."""
    os.kill(pid, signal.SIGSTOP)

    def stands_still() -> bool:
        files = Path(f"/proc/{pid}/task").glob("*/stat")
        with contextlib.suppress(OSError):  # a thread has ended
            return all(file.read_text().rpartition(")")[2].split()[0] == "T" for file in files)
        return False

    until(stands_still, f"process {pid} to be stopped")


def damage(lab: Lab, memory: SharedMemory, place: int) -> None:
    """Let the learner change the byte at a place."""
    lab.title("The same prompt again, with empty caches")
    lab.say(f"In the middle of the transfer, the lab has stopped process {memory.pid}, the core of the decode engine "
            f"(SIGSTOP). Pieces of KV that it has not read yet are in its shared memory, {memory.path}.")  # fmt: skip
    byte = memory.data[place]
    lab.break_it(
        "Change a byte of a piece that is on its way.",
        f"printf '\\{byte ^ 0xFF:03o}' | dd of={memory.path} bs=1 seek={place} conv=notrunc",
        lambda: memory.data[place] != byte, "the byte has changed",
    )  # fmt: skip


def check_recovery(lab: Lab, cluster: Cluster, expected: Answer, got: Answer, before: dict[str, float]) -> None:
    """Raises CheckFailed."""
    [decode], num_tokens = cluster.decode, expected.num_prompt_tokens
    after = decode.counters()
    lab.title("After: the decode engine runs again (SIGCONT)")
    log = next((line for line in decode.said().splitlines() if "cannot fetch" in line), "no line with 'cannot fetch'")
    lab.say(f"log: {log}", "dim")
    num_fetched = int(after["kv_transfer_fetched_tokens"] - before["kv_transfer_fetched_tokens"])
    names = {"kv_transfer_failed": "failed transfers", "request_errors": "failed requests"}
    lab.table([
        ("tokens of the prompt that were fetched", num_tokens, num_fetched),
        ("tokens that the decode engine computed itself", 1, num_tokens - num_fetched),
        *((name, int(before[key]), int(after[key])) for key, name in names.items()),
        ("answer", expected.text.strip()[:25], got.text.strip()[:25]),
    ])  # fmt: skip
    lab.check("failed transfers", 1, int(after["kv_transfer_failed"] - before["kv_transfer_failed"]))
    lab.check_that("the cause in the log", "damaged" in log, "a piece was damaged", "a piece was damaged")
    is_part = num_fetched < num_tokens
    lab.check_that("tokens fetched before the damage", is_part, f"fewer than {num_tokens}", num_fetched)
    lab.check_answers("the answer", [expected.token_ids], [got.token_ids])
    for engine in (cluster.prefill, decode):
        engine.reset_prefix_cache()
    again = ask(cluster.proxy.url, PROMPT, MAX_TOKENS)
    lab.check_answers("the answer with the next transfer", [expected.token_ids], [again.token_ids])
    last = decode.counters()
    num_fetched = int(last["kv_transfer_fetched_tokens"] - after["kv_transfer_fetched_tokens"])
    lab.check("tokens that the next transfer has fetched", num_tokens, num_fetched)
    lab.wait_until_free(cluster.prefill, decode)


SCENARIO = Scenario(
    name="corrupt_transfer", part=13, minutes=8, run=run, needs_linux=True,
    about="KV is damaged on its way from the prefill engine to the decode engine",
    question="One byte of a prompt's KV changes after the prefill engine has sent it and before the decode engine "
             "reads it. What happens?",
    choices={
        "a": Choice("The answer differs: wrong keys and values raise no error.",
                    "each piece has a checksum of its bytes and of its description, which the receiver verifies."),
        "b": Choice("The decode engine asks for the piece again, and the answer is the same.",
                    "nothing is sent twice: whenever a transfer fails, the decode engine computes what is missing."),
        "c": Choice("The request fails, and the client has to send it again.",
                    "only with --kv-load-failure-policy fail; the default is recompute."),
        "d": Choice("The decode engine uses the tokens before the damage and computes the rest: the same answer.",
                    "the KV before the first gap is right, so it is kept, and the transfer counts as failed."),
    },
    answer="d",
    look={
        f"{PART}/worker/kv_wire.py::checksum": "of a piece's bytes and its description",
        f"{PART}/worker/kv_receiver.py::KVReceiver._store": "refuses a damaged piece, and all after it in that layer",
        f"{PART}/core/kv_transfer.py::KVTransfer._note_fetched": "counts what has come; the rest is computed",
    },
    vllm="get_block_ids_with_load_errors reports bad blocks; from the first one on, the request is recomputed, or it "
         "fails, by policy",
)  # fmt: skip
