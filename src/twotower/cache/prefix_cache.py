"""`PrefixCache`: states after the first chunks of prompts, so that later requests do not read these chunks again.

The cache is a tree whose edges are chunks of tokens. A node has the keys and values of its chunk and the Mamba states
after it. The least recently used leaf is evicted first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from twotower.cache.hybrid_cache import TowerState
from twotower.cache.pools import CacheSnapshot


@dataclass
class Node:
    """A prefix that ends with one chunk. number: its id in the keys of its children; 0 is the empty prefix."""

    number: int
    parent: Node | None
    snapshot: CacheSnapshot
    children: int = 0


class PrefixCache:
    """Holds at most `budget` bytes of prefixes, in chunks of `chunk` tokens.

    query_tokens: prompt tokens of all requests so far. hit_tokens: those that were restored from the cache.
    """

    def __init__(self, chunk: int, budget: int) -> None:
        self.chunk = chunk
        self.budget = budget
        self.nodes: OrderedDict[tuple[int, tuple[int, ...]], Node] = (
            OrderedDict()
        )  # by parent and tokens, least recently used first
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
        """Restores the longest cached prefix of a prompt into an empty slot → the number of its tokens.

        The prefix never includes the last token of the prompt: a pass must read it to get the next logits.
        """
        path = self._match(prompt, len(prompt) - 1)
        if path:
            state.restore(slot, [node.snapshot for node in path])
        self.query_tokens += len(prompt)
        self.hit_tokens += len(path) * self.chunk
        return len(path) * self.chunk

    def insert(self, state: TowerState, slot: int, prompt: Sequence[int], read: int) -> None:
        """Caches the chunk that ends at token `read`, if it is a whole chunk and the prefix before it is cached.

        Texts with the long frequencies of LongRoPE are not cached: their first chunks are cached with the short ones,
        and all of them would be read again.
        """
        if not read or read % self.chunk or read > len(prompt):
            return
        if state.texts is not None and read >= state.texts.original_length:
            return
        path = self._match(prompt, read)
        if len(path) != read // self.chunk - 1:  # already cached, or the prefix before was evicted
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
        """Evicts everything."""
        self.nodes.clear()
        self.nbytes = 0

    def _match(self, prompt: Sequence[int], tokens: int) -> list[Node]:
        """The nodes of the longest cached prefix of the first `tokens` tokens, marked as most recently used."""
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
        """Evicts the least recently used leaves until `nbytes` fit → whether they fit. `spared` nodes stay."""
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
