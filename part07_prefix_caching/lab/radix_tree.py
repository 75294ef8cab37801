"""Another way to find a shared prefix: SGLang's radix tree (RadixAttention, 2023). For comparison only.

A hash finds a block directly. The tree stores the prompts themselves: a lookup walks down from the root, and where two
prompts differ, an edge is split.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

Page = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Node:
    """The pages between this node's parent and itself: their tokens, and the KV blocks that hold them.

    num_locks: how many running requests use this node or one below it.
    """

    pages: list[Page] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    parent: Node | None = None
    children: dict[Page, Node] = field(default_factory=dict)  # by their first page
    num_locks: int = 0
    last_used: int = 0


class RadixTree:
    """Prompts that share prefixes, in pages of page_size tokens. The least recently used leaf is evicted first.

    A locked node is never evicted, and neither is any node above it.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size, self.root = page_size, Node(num_locks=1)
        self._clock = itertools.count(1)

    def match_prefix(self, token_ids: Sequence[int]) -> tuple[list[int], Node]:
        """The blocks of the longest cached prefix, in whole pages, and the node where it ends."""
        node, blocks, pages = self.root, list[int](), self._pages(token_ids)
        while pages and (child := node.children.get(pages[0])) is not None:
            num_common = _num_common(child.pages, pages)
            if num_common < len(child.pages):
                child = self._split(child, num_common)
            child.last_used = next(self._clock)
            node, pages = child, pages[num_common:]
            blocks += child.blocks
        return blocks, node

    def insert(self, token_ids: Sequence[int], blocks: Sequence[int]) -> int:
        """Add a prompt, with a block for each whole page. Returns how many of its first pages were cached already: for
        those the tree keeps the blocks it has, and the caller frees the new ones."""
        pages = self._pages(token_ids)
        assert len(blocks) == len(pages), f"{len(pages)} pages, but {len(blocks)} blocks"
        known, node = self.match_prefix(token_ids)
        if len(known) < len(pages):
            leaf = Node(pages[len(known) :], list(blocks[len(known) :]), node, last_used=next(self._clock))
            node.children[leaf.pages[0]] = leaf
        return len(known)

    def lock(self, node: Node) -> None:
        """A request uses this node and all nodes above it."""
        self._add_locks(node, 1)

    def unlock(self, node: Node) -> None:
        self._add_locks(node, -1)

    def evict(self, num_blocks: int) -> list[int]:
        """Evict at least num_blocks blocks, or all unlocked ones. A parent that loses its last child becomes a leaf."""
        leaves = [(node.last_used, id(node), node) for node in self._nodes() if _is_evictable(node)]
        heapq.heapify(leaves)
        evicted: list[int] = []
        while leaves and len(evicted) < num_blocks:
            _, _, leaf = heapq.heappop(leaves)
            evicted += leaf.blocks
            parent = leaf.parent
            assert parent is not None, "the root is locked"
            del parent.children[leaf.pages[0]]
            if _is_evictable(parent):
                heapq.heappush(leaves, (parent.last_used, id(parent), parent))
        return evicted

    @property
    def num_blocks(self) -> int:
        return sum(len(node.blocks) for node in self._nodes())

    def _split(self, node: Node, num_pages: int) -> Node:
        """Split a node in two. Returns the upper one, which replaces the node below its parent."""
        upper = Node(node.pages[:num_pages], node.blocks[:num_pages], node.parent)
        upper.num_locks, upper.last_used = node.num_locks, node.last_used
        assert node.parent is not None, "the root has no pages to split"
        node.parent.children[upper.pages[0]] = upper
        node.pages, node.blocks, node.parent = node.pages[num_pages:], node.blocks[num_pages:], upper
        upper.children[node.pages[0]] = node
        return upper

    def _add_locks(self, node: Node | None, number: int) -> None:
        while node is not None:
            node.num_locks += number
            node = node.parent

    def _nodes(self) -> list[Node]:
        found, todo = [], [self.root]
        while todo:
            node = todo.pop()
            found.append(node)
            todo += node.children.values()
        return found

    def _pages(self, token_ids: Sequence[int]) -> list[Page]:
        starts = range(0, len(token_ids) - self.page_size + 1, self.page_size)
        return [tuple(token_ids[start : start + self.page_size]) for start in starts]


def _num_common(first: Sequence[Page], second: Sequence[Page]) -> int:
    """The length of the longest common prefix, in pages."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _is_evictable(node: Node) -> bool:
    return not node.children and not node.num_locks and node.parent is not None
