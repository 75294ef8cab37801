"""Which replica has seen which beginning of a prompt: the router's estimate of the replicas' prefix caches."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterator

from .replica import Replica

CHUNK_CHARS = 64  # about the text of a KV block


class PrefixIndex:
    """A radix tree whose edges are chunks of CHUNK_CHARS characters. A node is named by the hash of all text up to it,
    as a KV block is in part 7, so the tree needs no pointers: it is a dict from hashes to the replicas that have them.

    max_chars: per replica; the chunks that were used longest ago are forgotten first, long texts from their ends.
    """

    def __init__(self, max_chars: int) -> None:
        self.max_chunks = max(1, max_chars // CHUNK_CHARS)
        self.holders: dict[bytes, set[Replica]] = {}
        self.chunks: dict[Replica, OrderedDict[bytes, None]] = {}  # of each replica, the latest used last

    def match(self, text: str, replicas: Collection[Replica]) -> tuple[list[Replica], int]:
        """Of these replicas those that have most of the text's beginning, and how many characters that is."""
        best, num_chars = list(replicas), 0
        for number, chunk_hash in enumerate(hash_chunks(text), start=1):
            having = self.holders.get(chunk_hash, ())
            found = [replica for replica in best if replica in having]
            if not found:
                break
            best, num_chars = found, min(number * CHUNK_CHARS, len(text))
        return best, num_chars

    def insert(self, text: str, replica: Replica) -> None:
        """A replica has been sent a text. Beyond max_chunks, those of its chunks that were used longest ago are
        forgotten."""
        chunks = self.chunks.setdefault(replica, OrderedDict())
        for chunk_hash in reversed(list(hash_chunks(text))):  # the beginning last: it is the latest used
            chunks[chunk_hash] = None
            chunks.move_to_end(chunk_hash)
            self.holders.setdefault(chunk_hash, set()).add(replica)
        while len(chunks) > self.max_chunks:
            oldest, _ = chunks.popitem(last=False)
            self._release(oldest, replica)

    def remove(self, replica: Replica) -> None:
        for chunk_hash in self.chunks.pop(replica, ()):
            self._release(chunk_hash, replica)

    def _release(self, chunk_hash: bytes, replica: Replica) -> None:
        self.holders[chunk_hash].discard(replica)
        if not self.holders[chunk_hash]:
            del self.holders[chunk_hash]


def hash_chunks(text: str) -> Iterator[bytes]:
    """The hash of each chunk, which depends on all text before it. The last chunk may be a short one."""
    digest = hashlib.blake2b(digest_size=8)
    for start in range(0, len(text), CHUNK_CHARS):
        digest.update(text[start : start + CHUNK_CHARS].encode("utf-8", "surrogatepass"))
        yield digest.digest()
