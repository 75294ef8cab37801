"""worker/kv_tiers.py, disk_tier.py and redis_tier.py: what comes back is what was written, or nothing."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint import resolve_checkpoint
from common.errors import FieldError
from part12_cpu_offloading.config import EngineConfig
from part12_cpu_offloading.lab.redis_server import free_port, redis_server
from part12_cpu_offloading.worker import kv_tiers, redis_tier
from part12_cpu_offloading.worker.disk_tier import DiskTier
from part12_cpu_offloading.worker.kv_tiers import KVTiers, make_tiers, namespace_of, open_sealed, seal
from part12_cpu_offloading.worker.parallel import Groups, ParallelGroup, PipelineStage
from part12_cpu_offloading.worker.redis_tier import RedisTier
from tests.part12.redis_for_tests import needs_redis

LOOK_SEAL = 'Look at worker/kv_tiers.py::seal and open_sealed; README "Damaged files".'
LOOK_TIERS = 'Look at worker/kv_tiers.py::KVTiers; README "Tiers below".'
LOOK_DISK = 'Look at worker/disk_tier.py::DiskTier; README "Tiers below".'
BLOCK = bytes(range(256)) * 4
MIB = 2**20


def tiers_over(*tiers: Any, num_bytes: int = len(BLOCK)) -> KVTiers:
    return KVTiers(tiers, "test", num_bytes)


def block_of(number: int) -> bytes:
    return random.Random(number).randbytes(len(BLOCK))


# Seals


def test_a_sealed_block_comes_back() -> None:
    assert open_sealed("key", seal("key", BLOCK)) == BLOCK, f"what was sealed is what is opened. {LOOK_SEAL}"
    assert open_sealed("key", seal("key", b"")) == b"", LOOK_SEAL


@pytest.mark.parametrize("byte", [0, 7, 15, 16, 17, 500, len(seal("key", BLOCK)) - 1])
def test_any_bit_that_changes_is_noticed(byte: int) -> None:
    for bit in range(8):
        data = bytearray(seal("key", BLOCK))
        data[byte] ^= 1 << bit
        assert open_sealed("key", bytes(data)) is None, (
            f"bit {bit} of byte {byte} has changed, and the block was taken. {LOOK_SEAL}"
        )


def test_a_block_of_another_key_is_noticed() -> None:
    assert open_sealed("other", seal("key", BLOCK)) is None, (
        f"a file that was renamed holds a block of another prefix: expected None. {LOOK_SEAL}"
    )


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 600])
def test_a_part_of_a_block_is_noticed(length: int) -> None:
    assert open_sealed("key", seal("key", BLOCK)[:length]) is None, f"only {length} bytes are left. {LOOK_SEAL}"


def test_a_short_block_with_a_good_checksum_is_damaged(tmp_path: Path) -> None:
    tiers = tiers_over(DiskTier(str(tmp_path), MIB))
    tiers.write(b"a", BLOCK[:-1])
    assert tiers.read([b"a"]) == [] and not list(tmp_path.glob("*.kv")), LOOK_TIERS


# Several tiers


class DictTier:
    """A tier that does as the test says. fails: operations that raise."""

    def __init__(self, name: str) -> None:
        self.name, self.data, self.fails, self.calls = name, dict[str, bytes](), set[str](), list[str]()

    def _call(self, what: str) -> None:
        self.calls.append(what)
        if what in self.fails:
            raise OSError("out of order")

    def contains(self, keys: Sequence[str]) -> list[bool]:
        self._call("contains")
        return [key in self.data for key in keys]

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        self._call("read")
        return [self.data.get(key) for key in keys]

    def write(self, key: str, data: bytes) -> None:
        self._call("write")
        self.data[key] = data

    def delete(self, key: str) -> None:
        self._call("delete")
        del self.data[key]


def test_each_block_comes_from_the_first_tier_that_has_it() -> None:
    fast, slow = DictTier("fast"), DictTier("slow")
    tiers, names = tiers_over(fast, slow), [b"a", b"b", b"c", b"d"]
    for number, name in enumerate(names):
        tiers.write(name, block_of(number))
    del fast.data["test-62"], slow.data["test-61"]  # b is only in the slow one, a only in the fast one
    del fast.data["test-64"], slow.data["test-64"]
    assert tiers.lookup(names) == 3 and tiers.lookup(names[:2]) == 2, LOOK_TIERS
    assert tiers.read(names) == [block_of(0), block_of(1), block_of(2)], f"three blocks, and no gap. {LOOK_TIERS}"


def test_a_damaged_block_comes_from_the_next_tier() -> None:
    fast, slow = DictTier("fast"), DictTier("slow")
    tiers = tiers_over(fast, slow)
    tiers.write(b"a", BLOCK)
    fast.data["test-61"] = b"x" + fast.data["test-61"][1:]
    assert tiers.read([b"a"]) == [BLOCK] and "test-61" not in fast.data, LOOK_TIERS


def test_a_block_that_is_there_is_not_written_again() -> None:
    tier = DictTier("tier")
    tiers = tiers_over(tier)
    tiers.write(b"a", BLOCK)
    tiers.write(b"a", BLOCK)
    assert tier.calls.count("write") == 1, LOOK_TIERS


def test_a_tier_that_fails_is_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(kv_tiers.time, "monotonic", lambda: now)
    bad, good = DictTier("bad"), DictTier("good")
    tiers = tiers_over(bad, good)
    bad.fails = {"contains", "read"}
    for name in (b"a", b"b", b"c"):
        tiers.write(name, BLOCK)
        assert tiers.read([name]) == [BLOCK] and tiers.lookup([name]) == 1, f"the other one has it. {LOOK_TIERS}"
    assert len(bad.calls) == 2, f"one call for reading and one for writing, then a pause; got {bad.calls}. {LOOK_TIERS}"
    assert len(caplog.records) == 2, f"one warning each, got {caplog.messages}. {LOOK_TIERS}"
    now += kv_tiers.RETRY_S + 1
    tiers.lookup([b"a"])
    assert len(bad.calls) == 3 and len(caplog.records) == 2, f"it still fails, and was said so. {LOOK_TIERS}"
    now, bad.fails = now + kv_tiers.RETRY_S + 1, set()
    tiers.write(b"d", BLOCK)
    assert tiers.read([b"d"]) == [BLOCK] and "test-64" in bad.data, f"it works again. {LOOK_TIERS}"
    assert len(caplog.records) == 4, f"and that is said, too: {caplog.messages}"


# Disk


def test_files_survive_and_are_shared(tmp_path: Path) -> None:
    first = tiers_over(DiskTier(str(tmp_path), MIB))
    second = tiers_over(DiskTier(str(tmp_path), MIB))
    first.write(b"a", BLOCK)
    assert second.read([b"a"]) == [BLOCK], f"another engine writes while this one runs. {LOOK_DISK}"
    assert tiers_over(DiskTier(str(tmp_path), MIB)).read([b"a"]) == [BLOCK], f"after a restart. {LOOK_DISK}"


def test_the_least_recently_used_files_go_first(tmp_path: Path) -> None:
    size = len(BLOCK) + kv_tiers.DIGEST_BYTES
    disk = DiskTier(str(tmp_path), 10 * size)
    tiers = tiers_over(disk)
    for number in range(10):
        tiers.write(bytes([number]), block_of(number))
        path = tmp_path / f"test-{number:02x}.kv"
        os.utime(path, (1_000 + number, 1_000 + number))
    tiers.read([bytes([0])])  # the oldest file is used again
    tiers.write(bytes([10]), block_of(10))
    left = sorted(int(path.stem[-2:], 16) for path in tmp_path.glob("*.kv"))
    assert left == [0, 3, 4, 5, 6, 7, 8, 9, 10], (
        f"expected 1 and 2 to go (10% of room is made), left are {left}. {LOOK_DISK}"
    )


def test_the_limit_holds_whoever_wrote_the_files(tmp_path: Path) -> None:
    size = len(BLOCK) + kv_tiers.DIGEST_BYTES
    engines = [tiers_over(DiskTier(str(tmp_path), 20 * size)) for _ in range(2)]
    for number in range(100):
        engines[number % 2].write(bytes([number]), block_of(number))
    total = sum(path.stat().st_size for path in tmp_path.glob("*.kv"))
    assert total <= 1.2 * 20 * size, f"two engines: {total} bytes, the limit is {20 * size}. {LOOK_DISK}"
    DiskTier(str(tmp_path), 20 * size)
    total = sum(path.stat().st_size for path in tmp_path.glob("*.kv"))
    assert total <= 20 * size, f"a new engine counts what is there: {total} bytes. {LOOK_DISK}"


def test_a_file_that_was_being_written_is_not_read(tmp_path: Path) -> None:
    code = (
        "import os; from part12_cpu_offloading.worker import disk_tier; "
        "disk_tier.Path.replace = lambda *_: os._exit(9); "
        f"disk_tier.DiskTier({str(tmp_path)!r}, 10**6).write('test-61', bytes(1000))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    [left] = tmp_path.iterdir()
    assert left.suffix == ".tmp", "killed just before the file gets its name"
    DiskTier(str(tmp_path), MIB)
    assert left.exists(), f"another engine may be writing it. {LOOK_DISK}"
    os.utime(left, (1_000, 1_000))
    tiers = tiers_over(DiskTier(str(tmp_path), MIB))
    assert tiers.lookup([b"a"]) == 0 and not list(tmp_path.iterdir()), f"what is left over is removed. {LOOK_DISK}"


def test_a_limit_below_one_block_keeps_nothing(tmp_path: Path) -> None:
    tiers = tiers_over(DiskTier(str(tmp_path), len(BLOCK) // 2))
    tiers.write(b"a", BLOCK)
    assert not list(tmp_path.iterdir()), f"a block larger than the limit was written. {LOOK_DISK}"


def test_foreign_files_are_misses(tmp_path: Path) -> None:
    (tmp_path / "test-61.kv").write_bytes(b"This is somebody's letter.")
    tiers = tiers_over(DiskTier(str(tmp_path), MIB))
    assert tiers.lookup([b"a"]) == 1 and tiers.read([b"a"]) == [], f"found, but not what it should be. {LOOK_DISK}"
    assert not list(tmp_path.iterdir()), f"and deleted. {LOOK_DISK}"


def test_two_threads_write_and_read(tmp_path: Path) -> None:
    size = len(BLOCK) + kv_tiers.DIGEST_BYTES
    errors = list[str]()

    def work(seed: int) -> None:
        rng, tiers = random.Random(seed), tiers_over(DiskTier(str(tmp_path), 8 * size))
        for _ in range(300):
            number = rng.randrange(20)
            tiers.write(bytes([number]), block_of(number))
            for found in tiers.read([bytes([number])]):
                if found != block_of(number):
                    errors.append(f"block {number} came back as another one")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, f"{errors[0]}. {LOOK_DISK}"


# What keys depend on


def config_for(**flags: Any) -> EngineConfig:
    return EngineConfig(**{"model": "tiny", "device": "cpu", "kv_offload_gib": 1.0, **flags})


def test_the_namespace_depends_on_all_that_makes_a_block() -> None:
    tiny = resolve_checkpoint("tiny")
    tp = [Groups(ParallelGroup(rank, 2)) for rank in range(2)]
    stages = [Groups(stage=PipelineStage(index, 2)) for index in range(2)]
    namespaces = [
        namespace_of(config_for(), tiny, Groups(), 1_000),
        namespace_of(config_for(), resolve_checkpoint("tiny-draft"), Groups(), 1_000),
        namespace_of(config_for(dtype="bfloat16"), tiny, Groups(), 1_000),
        namespace_of(config_for(block_size=8), tiny, Groups(), 1_000),
        namespace_of(config_for(), tiny, Groups(), 1_001),
        *(namespace_of(config_for(), tiny, groups, 1_000) for groups in (*tp, *stages)),
        namespace_of(config_for(speculative_method="draft_model"), tiny, Groups(), 1_000),
    ]
    assert len(set(namespaces)) == len(namespaces), 'Look at worker/kv_tiers.py::namespace_of; README "Tiers below".'
    same = namespace_of(config_for(max_num_seqs=3, dtype="float32", num_kv_blocks=9), tiny, Groups(), 1_000)
    assert same == namespaces[0], f"what doesn't change a block doesn't change its key. {LOOK_TIERS}"


def test_a_copy_of_a_model_is_the_same_model(tmp_path: Path) -> None:
    tiny = resolve_checkpoint("tiny")
    for path in Path(tiny.directory or "").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    copy = namespace_of(config_for(), resolve_checkpoint(str(tmp_path)), Groups(), 1)
    assert copy == namespace_of(config_for(), tiny, Groups(), 1), f"the weights count, not the path. {LOOK_TIERS}"
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[9] ^= 1  # in the header
    weights.write_bytes(data)
    assert namespace_of(config_for(), resolve_checkpoint(str(tmp_path)), Groups(), 1) != copy, (
        f"another file, another model. {LOOK_TIERS}"
    )


def test_bad_places_are_errors_that_name_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoint = resolve_checkpoint("tiny")
    for flags, field in (
        ({"kv_offload_dir": str(tmp_path / "file")}, "kv_offload_dir"),
        ({"kv_offload_url": "http://x"}, "kv_offload_url"),
    ):
        with pytest.raises(FieldError, match=field):
            make_tiers(config_for(**flags), checkpoint, Groups(), 1)


# Redis


@needs_redis
def test_blocks_come_back_from_redis() -> None:
    with redis_server() as url:
        first, second = tiers_over(RedisTier(url)), tiers_over(RedisTier(url))
        for number in range(5):
            first.write(bytes([number]), block_of(number))
        names = [bytes([number]) for number in range(6)]
        assert second.lookup(names) == 5 and second.read(names) == [block_of(number) for number in range(5)], LOOK_TIERS


@needs_redis
def test_a_poisoned_block_is_never_used() -> None:
    import redis

    with redis_server() as url:
        tiers, server = tiers_over(RedisTier(url)), redis.Redis.from_url(url)
        tiers.write(b"a", BLOCK)
        [key] = server.keys()
        server.setbit(key, 8 * 100 + 3, 1 - server.getbit(key, 8 * 100 + 3))
        assert tiers.lookup([b"a"]) == 1 and tiers.read([b"a"]) == [], f"one bit was flipped. {LOOK_SEAL}"
        assert not server.keys(), f"and the block is deleted. {LOOK_TIERS}"
        tiers.write(b"a", BLOCK)
        assert tiers.read([b"a"]) == [BLOCK], f"so that it can be written again. {LOOK_TIERS}"


@needs_redis
def test_redis_is_gone_and_comes_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(kv_tiers, "RETRY_S", 0.0)
    port = free_port()
    tiers = tiers_over(RedisTier(f"redis://127.0.0.1:{port}"))
    tiers.write(b"a", BLOCK)
    assert tiers.lookup([b"a"]) == 0 and tiers.read([b"a"]) == [], f"there is no server yet. {LOOK_TIERS}"
    assert len(caplog.records) == 2, f"one warning for reading and one for writing: {caplog.messages}"
    for _ in range(2):  # it is restarted, and empty again
        with redis_server(port=port):
            assert tiers.lookup([b"a"]) == 0, LOOK_TIERS
            tiers.write(b"a", BLOCK)
            assert tiers.read([b"a"]) == [BLOCK], f"the server is back. {LOOK_TIERS}"
        assert tiers.read([b"a"]) == [], f"the server is gone again. {LOOK_TIERS}"


@needs_redis
def test_redis_is_full(caplog: pytest.LogCaptureFixture) -> None:
    with redis_server("--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as url:
        big = os.urandom(2 * MIB)
        tiers = tiers_over(RedisTier(url), num_bytes=len(big))
        tiers.write(b"a", big)
        tiers.write(b"b", big)
        assert tiers.read([b"a"])[:1] in ([], [big]) and tiers.read([b"b"]) == [], LOOK_TIERS
    assert len(caplog.records) == 1 and "cannot write" in caplog.messages[0], f"one warning: {caplog.messages}"


def test_a_server_that_does_not_answer_costs_one_timeout(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It accepts connections, and says nothing."""
    monkeypatch.setattr(redis_tier, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        tiers = tiers_over(RedisTier(f"redis://127.0.0.1:{server.getsockname()[1]}"))
        for _ in range(20):
            assert tiers.lookup([b"a"]) == 0 and tiers.read([b"a"]) == [], LOOK_TIERS
    assert len(caplog.records) == 1, f"expected one warning, got {caplog.messages}. {LOOK_TIERS}"


def test_no_password_in_a_message() -> None:
    tier = RedisTier("redis://user:secret@127.0.0.1:1/3")
    assert "secret" not in tier.name and "127.0.0.1:1" in tier.name, tier.name


@pytest.mark.parametrize(
    "url",
    ["", "http://x", "redis://127.0.0.1:99999", "redis://127.0.0.1:0", "redis://h:1?foo=bar", "redis://h:1?retry=5",
     "redis://h:1?decode_responses=1", "redis://h:x"],
)  # fmt: skip
def test_urls_that_can_not_work_are_refused(url: str) -> None:
    with pytest.raises(ValueError):
        RedisTier(url)


def test_a_url_is_not_repeated_in_an_error() -> None:
    config = config_for(kv_offload_url="redis://:secret@127.0.0.1:99999")
    with pytest.raises(FieldError, match="Port out of range") as caught:
        make_tiers(config, resolve_checkpoint("tiny"), Groups(), 1)
    assert "secret" not in str(caught.value), f"it has a password: {caught.value}"


def test_a_host_that_is_no_name_is_a_failure_of_the_tier(caplog: pytest.LogCaptureFixture) -> None:
    tiers = tiers_over(RedisTier("redis://a..b:1"))
    assert tiers.lookup([b"a"]) == 0 and tiers.read([b"a"]) == [], LOOK_TIERS
    assert len(caplog.records) == 1, f"expected one warning, got {caplog.messages}. {LOOK_TIERS}"


def test_a_directory_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    tiers = tiers_over(DiskTier(str(tmp_path / "kv"), MIB))
    (tmp_path / "kv").rmdir()
    tiers.write(b"a", BLOCK)
    assert tiers.read([b"a"]) == [BLOCK], LOOK_DISK
