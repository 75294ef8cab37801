"""Where KV blocks are kept below host memory: one interface for disk and Redis, and what happens when one fails."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar

from common.checkpoint import DTYPES, Checkpoint, default_dtype, resolve_checkpoint
from common.checkpoint_reader import fingerprint
from common.errors import FieldError

from ..config import EngineConfig
from .disk_tier import DiskTier
from .kv_cache import KVCache
from .parallel import Groups
from .quantization.choice import QuantizationFlags

LAYOUT = "KV blocks, layout 1"  # change it whenever the bytes of a block get another meaning
DIGEST_BYTES = 16
RETRY_S = 10.0  # how long a tier is left alone after it has failed

logger = logging.getLogger(__name__)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class KVTier(Protocol):
    """Keeps blocks under keys. It may lose a block at any time. Every method raises OSError if the tier doesn't work.

    name: for messages.
    """

    name: str

    def contains(self, keys: Sequence[str]) -> list[bool]: ...

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """What was written under each key, None if there is nothing (any more)."""
        ...

    def write(self, key: str, data: bytes) -> None: ...

    def delete(self, key: str) -> None: ...


class KVTiers:
    """All tiers of one rank, the fastest first. A block is written to each, and read from the first that has it.

    namespace: see namespace_of(). A tier that raises OSError is left alone for RETRY_S seconds, for what has failed:
    reading or writing. Its first failure is logged, and the next one only after it has worked again.
    """

    def __init__(self, tiers: Sequence[KVTier], namespace: str, num_bytes: int) -> None:
        self.tiers, self.namespace, self.num_bytes = tiers, namespace, num_bytes
        self._paused_until_s: dict[tuple[str, str], float] = {}
        self._damaged = set[str]()  # names of tiers that had a damaged block

    def lookup(self, hashes: Sequence[bytes]) -> int:
        """How many of the first blocks are in a tier, without a gap."""
        keys = [self._key(block_hash) for block_hash in hashes]
        found = [False] * len(keys)
        for tier in self.tiers:
            contained = self._try(tier, "read", [False] * len(keys), tier.contains, keys)
            found = [a or b for a, b in zip(found, contained, strict=True)]
        return found.index(False) if False in found else len(found)

    def read(self, hashes: Sequence[bytes]) -> list[bytes]:
        """The first blocks, without a gap: fewer than asked for if one is missing or damaged in all tiers."""
        blocks: list[bytes | None] = [None] * len(hashes)
        for tier in self.tiers:
            missing = [number for number, block in enumerate(blocks) if block is None]
            if not missing:
                break
            keys = [self._key(hashes[number]) for number in missing]
            nothing: list[bytes | None] = [None] * len(keys)
            found = self._try(tier, "read", nothing, self._read_from, tier, keys)
            for number, block in zip(missing, found, strict=True):
                blocks[number] = block
        first_gap = blocks.index(None) if None in blocks else len(blocks)
        return [block for block in blocks[:first_gap] if block is not None]

    def _read_from(self, tier: KVTier, keys: Sequence[str]) -> list[bytes | None]:
        """Blocks that are what was written. Others are deleted."""
        blocks: list[bytes | None] = []
        for key, data in zip(keys, tier.read(keys), strict=True):
            block = None if data is None else open_sealed(key, data)
            if data is not None and (block is None or len(block) != self.num_bytes):
                if tier.name not in self._damaged:
                    logger.warning("%s: block %s is damaged, and deleted, as all others will be", tier.name, key)
                self._damaged.add(tier.name)
                tier.delete(key)
                block = None
            blocks.append(block)
        return blocks

    def write(self, block_hash: bytes, block: bytes) -> None:
        """Write a block to all tiers that don't have it."""
        key = self._key(block_hash)
        for tier in self.tiers:
            self._try(tier, "write", None, write_new, tier, key, block)

    def _key(self, block_hash: bytes) -> str:
        return f"{self.namespace}-{block_hash.hex()}"

    def _try(
        self, tier: KVTier, what: str, otherwise: Result, call: Callable[Parameters, Result],
        *args: Parameters.args, **kwargs: Parameters.kwargs,
    ) -> Result:  # fmt: skip
        """What call(*args) returns; `otherwise` if it raises OSError, or has done so a short time ago."""
        paused_until_s = self._paused_until_s.get((tier.name, what))
        if paused_until_s is not None and time.monotonic() < paused_until_s:
            return otherwise
        try:
            result = call(*args, **kwargs)
        except OSError as error:
            if paused_until_s is None:
                logger.warning(
                    "%s: cannot %s KV blocks: %s. Requests go on without it.", tier.name, what, str(error).rstrip(".")
                )
            self._paused_until_s[tier.name, what] = time.monotonic() + RETRY_S
            return otherwise
        if paused_until_s is not None and self._paused_until_s.pop((tier.name, what), None) is not None:
            logger.warning("%s: can %s KV blocks again", tier.name, what)
        return result


def write_new(tier: KVTier, key: str, block: bytes) -> None:
    """Write a block if the tier doesn't have it."""
    if not tier.contains([key])[0]:
        tier.write(key, seal(key, block))


def seal(key: str, block: bytes) -> bytes:
    """A block as it is stored: a checksum of the key and the block, then the block."""
    return checksum(key, block) + block


def open_sealed(key: str, data: bytes) -> bytes | None:
    """The block in what was stored under a key. None if a bit has changed, or if it belongs to another key."""
    block = data[DIGEST_BYTES:]
    return block if data[:DIGEST_BYTES] == checksum(key, block) else None


def checksum(key: str, block: bytes) -> bytes:
    """A 128-bit hash of a key and what is stored under it."""
    digest = hashlib.blake2b(key.encode() + b"\0", digest_size=DIGEST_BYTES)
    digest.update(block)
    return digest.digest()


def make_tiers(
    config: EngineConfig, checkpoint: Checkpoint, groups: Groups, num_bytes: int, caches: Sequence[KVCache]
) -> KVTiers:
    """The tiers that a config names. num_bytes: of a block. caches: of the model and the draft model. Raises FieldError
    for a directory that can't be used, and for a URL that isn't one of Redis."""
    tiers = list[KVTier]()
    if config.kv_offload_dir is not None:
        try:
            tiers.append(DiskTier(config.kv_offload_dir, int(config.kv_offload_disk_gib * 2**30)))
        except (FileExistsError, NotADirectoryError) as error:
            raise FieldError("kv_offload_dir", f"{config.kv_offload_dir!r} is not a directory") from error
        except OSError as error:
            raise FieldError("kv_offload_dir", f"can't use {config.kv_offload_dir!r}: {error.strerror}") from error
    if config.kv_offload_url is not None:
        from .redis_tier import RedisTier  # which imports `redis`: engines without it need not

        try:
            tiers.append(RedisTier(config.kv_offload_url))
        except ValueError as error:
            raise FieldError("kv_offload_url", f"expected redis://host:port: {error}") from error  # has no password
    namespace = namespace_of(config, checkpoint, groups, num_bytes, caches) if tiers else ""
    return KVTiers(tiers, namespace, num_bytes)


def namespace_of(
    config: EngineConfig, checkpoint: Checkpoint, groups: Groups, num_bytes: int, caches: Sequence[KVCache]
) -> str:
    """What all keys of a rank begin with. Two engines have the same one only if they can use each other's blocks.

    It depends on the weights (see fingerprint) and how they are quantized, dtype, block size, this rank's share of
    layers and heads, the draft model, the bytes of a block, and what its codes mean. The block hashes add the tokens,
    the salt and the hash seed.
    """
    assert config.device is not None, "EngineConfig fills it in"
    dtype = default_dtype(config.device) if config.dtype == "auto" else DTYPES[config.dtype]
    tensor, stage = groups.tensor, groups.stage
    parts = [
        LAYOUT, fingerprint(checkpoint), str(dtype), f"{config.block_size} tokens, {num_bytes} bytes",
        f"rank {tensor.rank} of {tensor.size}, stage {stage.index} of {stage.num_stages}",
    ]  # fmt: skip
    parts.append(str(QuantizationFlags(config.quantization, config.quantization_group_size)))
    if config.speculative_method == "draft_model":
        flags = QuantizationFlags(config.speculative_quantization, config.quantization_group_size)
        parts += [fingerprint(resolve_checkpoint(config.speculative_model)), str(flags)]
    for cache in caches:
        parts.append(f"{cache.data.dtype}, {None if cache.scales is None else cache.scales.flatten().tolist()}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
