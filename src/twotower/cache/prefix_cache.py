"""Prompts that begin alike are read once: the state after every so many tokens of a prompt, kept while there is room.

A tree whose edges are chunks of tokens. A node keeps the keys and values of its own chunk and the Mamba states after
it; what was used longest ago goes first, from the leaves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from twotower.cache.hybrid_cache import TowerState
from twotower.cache.pools import CacheSnapshot


@dataclass
class Node:
    """The text up to the end of one chunk. number: its name as a parent; 0 is the empty text."""

    number: int
    parent: Node | None
    snapshot: CacheSnapshot
    children: int = 0


class PrefixCache:
    """Keeps at most `budget` bytes, of texts cut into chunks of `chunk` tokens.

    query_tokens, hit_tokens: prompt tokens of the requests that came, and those of them that need not be read.
    """

    def __init__(self, chunk: int, budget: int) -> None:
        self.chunk = chunk
        self.budget = budget
        self.nodes: OrderedDict[tuple[int, tuple[int, ...]], Node] = OrderedDict()  # by parent and tokens; oldest first
        self.nbytes = 0
        self._made = 0
        self.query_tokens = 0
        self.hit_tokens = 0

    @property
    def asked(self) -> int:
        """Deprecated name of `query_tokens`, for users of the deprecated `LLM.prefixes`."""
        return self.query_tokens

    @property
    def found(self) -> int:
        """Deprecated name of `hit_tokens`."""
        return self.hit_tokens

    def restore(self, state: TowerState, slot: int, prompt: Sequence[int]) -> int:
        """Puts the longest known beginning of a prompt into an empty slot → its tokens. The last token that is given is
        never part of it: somebody has to ask what follows."""
        path = self._match(prompt, len(prompt) - 1)
        if path:
            state.restore(slot, [node.snapshot for node in path])
        self.query_tokens += len(prompt)
        self.hit_tokens += len(path) * self.chunk
        return len(path) * self.chunk

    def insert(self, state: TowerState, slot: int, prompt: Sequence[int], read: int) -> None:
        """Remembers the chunk that ends at `read`, if it is one and the text before it is known."""
        if not read or read % self.chunk or read > len(prompt):
            return
        path = self._match(prompt, read)
        if len(path) != read // self.chunk - 1:  # known already, or what came before is forgotten
            return
        parent = path[-1] if path else None
        snapshot = state.snapshot_row(slot, read - self.chunk, read)
        if not self._evict_for(snapshot.nbytes, spared=path):
            return
        self._made += 1
        key = (parent.number if parent else 0, tuple(prompt[read - self.chunk : read]))
        self.nodes[key] = Node(self._made, parent, snapshot)
        self.nbytes += snapshot.nbytes
        if parent is not None:
            parent.children += 1

    def clear(self) -> None:
        """Forgets everything."""
        self.nodes.clear()
        self.nbytes = 0

    def _match(self, prompt: Sequence[int], tokens: int) -> list[Node]:
        """The nodes of what is known of the first `tokens` of a prompt, now the most recently used."""
        path: list[Node] = []
        for start in range(0, tokens - self.chunk + 1, self.chunk):
            key = (path[-1].number if path else 0, tuple(prompt[start : start + self.chunk]))
            node = self.nodes.get(key)
            if node is None:
                break
            self.nodes.move_to_end(key)
            path.append(node)
        return path

    def _evict_for(self, nbytes: int, spared: Sequence[Node]) -> bool:
        """Forgets the oldest leaves until so many bytes fit → whether they do."""
        kept = {node.number for node in spared}
        while self.nbytes + nbytes > self.budget:
            leaf = next((k for k, node in self.nodes.items() if not node.children and node.number not in kept), None)
            if leaf is None:
                return False
            node = self.nodes.pop(leaf)
            self.nbytes -= node.snapshot.nbytes
            if node.parent is not None:
                node.parent.children -= 1
        return True
