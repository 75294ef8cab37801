"""A KV block on disk with a flipped byte: it is noticed, deleted and computed again, and the answer is the same."""

from __future__ import annotations

import itertools
from pathlib import Path

from workshop.failures.checks import until
from workshop.failures.clients import Answer, ask
from workshop.failures.lab import Lab
from workshop.failures.scenario import Choice, Scenario
from workshop.failures.servers import Server

PART = "part12_cpu_offloading"
FLAGS = ("--num-threads", "1", "--device", "cpu", "--no-log-stats", "--model", "tiny", "--num-kv-blocks", "64",
         "--kv-offload-gib", "0.00075")  # fmt: skip
BLOCK_SIZE, NUM_BLOCKS, DAMAGED = 16, 6, 3  # of the prompt; the damaged one counts from 1
MAX_TOKENS = 15  # the answer fills no block of its own
OFFSET = 1_000  # in the file: behind the checksum, in the block
TEXT = (
    "A KV cache keeps the keys and values of all earlier tokens, so that a step computes only the new ones. They are "
    "stored in blocks, and each request has a block table. A full block is found by a hash of its tokens and of all "
    "tokens before them. When the device has no room left, blocks are copied to host memory, and from there to files. "
    "If a prompt that begins with the same tokens comes later, its blocks are loaded, which takes less time than to "
    "compute them. A file may be damaged, so each has a checksum."
)


class Prompts:
    """Prompts of NUM_BLOCKS full blocks and one token. Their first words differ, and so do the hashes of all blocks."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder, self._numbers = server, folder, itertools.count()

    def next(self) -> list[int]:
        token_ids = self.server.tokenize(f"Text number {next(self._numbers)}. {TEXT}")[: NUM_BLOCKS * BLOCK_SIZE + 1]
        assert len(token_ids) == NUM_BLOCKS * BLOCK_SIZE + 1, f"TEXT has only {len(token_ids)} tokens"
        return token_ids

    def files(self) -> set[Path]:
        return set(self.folder.glob("*.kv"))

    def ask(self, prompt: list[int], max_tokens: int, num_new_files: int) -> tuple[Answer, set[Path]]:
        """The answer, and the files of the blocks that are new, once all of them are written."""
        before = self.files()
        answer = ask(self.server.url, prompt, max_tokens)
        until(lambda: len(self.files() - before) >= num_new_files, f"{num_new_files} new files in {self.folder}")
        return answer, self.files() - before

    def forget(self) -> None:
        """Other prompts take up all of host memory, which has room for eight blocks; the device forgets all of its."""
        for _ in range(2):
            self.ask(self.next(), 1, NUM_BLOCKS)
        self.server.reset_prefix_cache()


def run(lab: Lab) -> None:
    lab.title("What is running")
    folder = lab.folder / "kv"
    server = lab.start(PART, *FLAGS, "--kv-offload-dir", str(folder))
    lab.wait_until_ready()
    prompts = Prompts(server, folder)
    prompt = prompts.next()
    lab.title(f"Before: a prompt of {len(prompt)} tokens, {NUM_BLOCKS} full blocks")
    start = (DAMAGED - 1) * BLOCK_SIZE  # shorter prompts first, so that the file of one block is the only new one
    prompts.ask(prompt[: start + 1], 1, DAMAGED - 1)
    _, [file] = prompts.ask(prompt[: start + BLOCK_SIZE + 1], 1, 1)
    expected, _ = prompts.ask(prompt, MAX_TOKENS, NUM_BLOCKS - DAMAGED)
    whole, before, num_files = file.read_bytes(), server.counters(), len(prompts.files())
    lab.say(f"the answer: {expected.text.strip()[:70]!r} …")
    lab.say(f"{num_files} files in {folder}; block {DAMAGED} is {file.name}, {len(whole):,} bytes")
    lab.predict()
    lab.break_it(
        f"Change one byte of block {DAMAGED} on disk.",
        f"printf '\\{whole[OFFSET] ^ 0xFF:03o}' | dd of={file} bs=1 seek={OFFSET} conv=notrunc",
        lambda: file.read_bytes() != whole, "the file has changed",
    )  # fmt: skip
    damaged = file.read_bytes()
    lab.title("After: the device and host memory forget their blocks, and the same prompt comes again")
    answers = list[Answer]()

    def is_noticed() -> bool:
        """At once, unless the disk was so slow that the request went on without it."""
        prompts.forget()
        answers.append(ask(server.url, prompt, MAX_TOKENS))
        return "is damaged" in server.said()

    until(is_noticed, "a line in the log that says 'is damaged'")
    after = server.counters()
    log = next(line for line in server.said().splitlines() if "is damaged" in line)
    lab.say(f"log: {log}", "dim")
    num_loaded = int(after["kv_offload_tier_tokens"] - before["kv_offload_tier_tokens"])
    lab.table([
        ("tokens loaded from disk", int(before["kv_offload_tier_tokens"]), int(after["kv_offload_tier_tokens"])),
        ("tokens loaded from host memory", int(before["kv_offload_host_tokens"]), int(after["kv_offload_host_tokens"])),
        ("answer", expected.text.strip()[:25], answers[-1].text.strip()[:25]),
        ("failed requests", int(before["request_errors"]), int(after["request_errors"])),
    ])  # fmt: skip
    lab.check_answers("answers", [expected.token_ids] * len(answers), [answer.token_ids for answer in answers])
    lab.check_that("the block in the log", file.stem in log, file.stem, f"…{file.stem[-16:]}")
    lab.check(f"tokens loaded from disk, those of the blocks before number {DAMAGED}", start, num_loaded)
    until(lambda: file.exists(), f"the block to be computed again and written to {file.name}")
    lab.check_that("the file on disk", file.read_bytes() != damaged, "a new one", "deleted, and written again")
    lab.wait_until_free(server)


SCENARIO = Scenario(
    name="poison_block", part=12, minutes=6, run=run,
    about="a flipped byte in a KV block on disk",
    question=f"A prompt's {NUM_BLOCKS} blocks are on disk, and one byte of block {DAMAGED} is wrong. The same prompt "
             "comes again, and its blocks are neither on the device nor in host memory. What happens?",
    choices={
        "a": Choice("The answer differs: 16 tokens have wrong keys and values, and no error is raised.",
                    "that is what would happen without the checksum that each stored block has."),
        "b": Choice("Blocks 1 and 2 are loaded, the rest is computed; the answer is the same.",
                    "the damaged block counts as a miss, and KV is only useful without a gap, so loading ends before "
                    "it."),
        "c": Choice("Only the damaged block is computed; the other five are loaded, and the answer is the same.",
                    "a prefix is loaded up to the first gap; after it, everything is computed in one prefill."),
        "d": Choice("The request fails with an error that names the file.",
                    "a tier may lose a block at any time, so a request never depends on one; the log has a warning."),
    },
    answer="b",
    look={
        f"{PART}/worker/kv_tiers.py::open_sealed": "verifies the checksum",
        f"{PART}/worker/kv_tiers.py::KVTiers._read_from": "deletes a damaged block, and writes the warning",
        f"{PART}/worker/kv_tiers.py::KVTiers.read": "ends before the first gap",
    },
    vllm="its tiers on disk are in TieringOffloadingSpec; a load that fails is reported block by block, with "
         "get_block_ids_with_load_errors",
)  # fmt: skip
