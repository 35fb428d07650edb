"""Who owns which block of the key/value cache: a pool with reference counts, and what it remembers of prompts.

A block is a page of `size` tokens in every layer. A full block of a prompt is remembered under what it holds and what
stands before it, so that a later prompt that begins alike takes it over. The tokens themselves are compared, not a hash
of them: no other text can ever be mistaken for it. A block without an owner stays remembered until its memory is
needed, the longest unused first.
"""

from __future__ import annotations

from collections.abc import Hashable

Key = tuple[Hashable, tuple[int, ...]]  # the node before (at the start: whose cache it is), and the block's tokens


class Blocks:
    """`n` blocks of `size` tokens."""

    def __init__(self, n: int, size: int):
        self.n, self.size = n, size
        self.owners = [0] * n
        self.fresh = list(range(n - 1, -1, -1))  # nobody's, and nothing remembered: the last one is taken first
        self.idle: dict[int, None] = {}  # nobody's but remembered, the longest unused first
        self.block_of: dict[Key, int] = {}
        self.key_of: dict[int, Key] = {}
        self.node_of: dict[int, int] = {}  # a remembered block's number in the tree of texts, never given twice
        self.nodes = 0

    @property
    def free(self) -> int:
        return len(self.fresh) + len(self.idle)

    @property
    def used(self) -> int:
        return self.n - self.free

    def take(self) -> int:
        """A block for one owner. Raises IndexError when there is none."""
        if self.fresh:
            block = self.fresh.pop()
        elif self.idle:
            block = next(iter(self.idle))
            del self.idle[block]
            self._forget(block)
        else:
            raise IndexError("no free block")
        self.owners[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more owner."""
        if not self.owners[block]:
            del self.idle[block]
        self.owners[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One owner less of each; the last ones will be forgotten first."""
        for block in reversed(blocks):
            self.owners[block] -= 1
            if self.owners[block]:
                continue
            if block in self.key_of:
                self.idle[block] = None
            else:
                self.fresh.append(block)

    def find(self, root: Hashable, tokens: list[int], most: int) -> list[int]:
        """The remembered blocks that hold the beginning of these tokens, `most` tokens at most."""
        found: list[int] = []
        node = root
        for start in range(0, most - self.size + 1, self.size):
            block = self.block_of.get((node, tuple(tokens[start : start + self.size])))
            if block is None:
                break
            found.append(block)
            node = self.node_of[block]
        return found

    def remember(self, root: Hashable, tokens: list[int], blocks: list[int], known: int) -> int:
        """The first blocks hold these tokens; the first `known` were remembered before. Returns how many are now."""
        node = root if not known else self.node_of.get(blocks[known - 1])
        for i in range(known, len(tokens) // self.size):
            key = (node, tuple(tokens[i * self.size : (i + 1) * self.size]))
            if node is None or key in self.block_of:  # another sequence's block already holds this text
                return i
            block = blocks[i]
            self.nodes += 1
            self.block_of[key], self.key_of[block], self.node_of[block] = block, key, self.nodes
            node = self.nodes
        return max(known, len(tokens) // self.size)

    def clear(self) -> None:
        """Remember nothing (the weights have changed)."""
        for block in list(self.key_of):
            self._forget(block)
        self.fresh += self.idle
        self.idle.clear()

    def _forget(self, block: int) -> None:
        if block in self.key_of:
            del self.block_of[self.key_of.pop(block)]
            del self.node_of[block]
