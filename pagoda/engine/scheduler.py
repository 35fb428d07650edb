"""Which tokens of which sequences the next step computes: continuous batching.

Every step first gives each running sequence its next token, then spends what is left of its budget on prompts, in
pieces. When the cache is full the sequence that is last in order gives its blocks back and starts again later. The
order is priority, then arrival; a long prompt takes half a step at most while others wait for theirs.

What a sequence computes may not depend on its company. A kernel gives a row the same bits in any batch, but it has two
ways to attend: one for up to DECODE_ROWS queries of a sequence, one for more. So a prompt goes in by pieces of more,
and tokens that were made one by one come back after a preemption by pieces of few.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from pagoda.engine.blocks import Blocks
from pagoda.engine.options import EngineOptions
from pagoda.engine.request import Group, Sequence

DECODE_ROWS = 8  # the kernel's limit, see ops/attention.py
PIECE = 64  # a prompt is cut at multiples of this


@dataclass
class Work:
    """In this step: `n` tokens of a sequence, from what is in its cache on; scores are wanted for the last `scored`.
    There is room for `room` guesses behind them, which are `drafts`."""

    sequence: Sequence
    n: int
    scored: int
    room: int = 0
    drafts: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        s = self.sequence
        return s.tokens[s.cached : s.cached + self.n] + self.drafts


class Scheduler:
    def __init__(
        self,
        blocks: Blocks,
        options: EngineOptions,
        n_virtual: int = 0,
        recompute_beyond: int | None = None,
        prefix_caching: bool = True,
    ):
        self.blocks, self.options, self.n_virtual = blocks, options, n_virtual
        self.recompute_beyond, self.prefix_caching = recompute_beyond, prefix_caching
        self.waiting: list[Sequence] = []  # in order
        self.running: list[Sequence] = []  # in order
        self.copies: list[tuple[int, int]] = []  # blocks to copy before the step: from, to
        self.admitting = True  # False: nobody new
        self.preemptions = self.query_tokens = self.hit_tokens = 0

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=order)

    def fork(self, sequence: Sequence, index: int) -> Sequence:
        """Another answer to the same prompt: it shares all blocks until it writes."""
        other = sequence.fork(index)
        for block in other.blocks:
            self.blocks.share(block)
        insort(self.running, other, key=order)
        return other

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended: its blocks are free."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._give_back(sequence)

    def plan(self, n_draft: int = 0) -> list[Work]:
        """The next step, with room for n_draft guesses behind the last token of each sequence."""
        self.copies = []
        works: dict[Sequence, Work] = {}
        for s in list(self.running):
            if s not in self.running or not self._decodes(s):
                continue
            if s.cached + self.n_virtual == self.recompute_beyond:
                s.cached, s.n_prefill = 0, len(s.tokens)
                continue
            room = min(n_draft, s.group.most - len(s.tokens) + s.n_prompt - 1)
            room = 0 if s.group.request.sampling.beam_width else room
            if not self._reserve(s, 1 + room):
                room = 0
                while s in self.running and not self._reserve(s, 1):
                    for victim in self._preempt():
                        works.pop(victim, None)
            if s in self.running:
                works[s] = Work(s, 1, 1, room)
        budget = max(self.options.max_step_tokens - len(works), 2 * PIECE)
        for s in self.running:
            if s in works:
                continue
            n = self._piece(s, budget)
            if n and self._reserve(s, n):
                works[s] = self._prefill(s, n)
                budget -= n
        for s in [w for w in self.waiting if self.admitting or w.group.started]:
            if len(self.running) + self._room(s) > max(self.options.max_num_seqs, self._room(s)):
                break
            self._take_over(s)
            needed = self.n_blocks(len(s.tokens)) - len(s.blocks)
            n = self._piece(s, budget)
            if not n or needed > self.blocks.free or not self._reserve(s, n):
                self._give_back(s)
                break  # whoever comes later waits, too
            self.waiting.remove(s)
            insort(self.running, s, key=order)
            s.group.started = True
            if len(s.tokens) == s.n_prompt:
                s.group.cached_tokens = s.cached
                self.query_tokens += s.n_prompt
                self.hit_tokens += s.cached
            works[s] = self._prefill(s, n)
            budget -= n
        if not works and len(self.running) > 1:  # prompts wait for each other's blocks
            self._preempt()
            return self.plan(n_draft)
        return list(works.values())

    @property
    def n_tokens(self) -> int:
        """Of all sequences that run or wait."""
        return sum(len(s.tokens) for s in (*self.running, *self.waiting))

    def n_blocks(self, n: int) -> int:
        """Blocks that hold n tokens of a sequence."""
        return -(-(self.n_virtual + n) // self.blocks.size)

    def done(self, work: Work) -> None:
        """The work's tokens are in the cache."""
        s = work.sequence
        s.cached += work.n
        if self.prefix_caching and s.remembered < s.n_prompt // self.blocks.size and s.n_prefill == s.n_prompt:
            in_cache = s.tokens[: min(s.cached, s.n_prompt)]
            s.remembered = self.blocks.remember(root(s.group), in_cache, s.blocks, s.remembered)

    def _room(self, s: Sequence) -> int:
        """Sequences that a waiting one will become."""
        return s.group.request.sampling.answers if len(s.group.sequences) == 1 else 1

    def _decodes(self, s: Sequence) -> bool:
        """Whether its next token is due. Beams go on together."""
        beams = s.group.request.sampling.beam_width
        return all(b.decoding for b in s.group.live) if beams else s.decoding

    def _prefill(self, s: Sequence, n: int) -> Work:
        told = len(s.group.prompt_logprobs or [None])
        if s.group.request.sampling.prompt_logprobs is not None and told < min(s.cached + n + 1, s.n_prompt):
            return Work(s, n, n)
        return Work(s, n, int(s.cached + n == len(s.tokens)))

    def _piece(self, s: Sequence, budget: int) -> int:
        """How many of the sequence's tokens may go in, so that it computes what it would compute alone."""
        if s.cached >= s.n_prefill:
            waits = s.group.request.sampling.beam_width > 0  # its last token comes with those of the other beams
            return min(s.pending - waits, DECODE_ROWS, budget)
        left = s.n_prefill - s.cached
        if len(self.waiting) + len(self.running) > 1:
            budget = min(budget, max(self.options.max_step_tokens // 2, 2 * PIECE))
        if left <= budget:
            return left
        n = budget // PIECE * PIECE
        if left - n <= DECODE_ROWS:  # what stays behind must not be few
            n -= PIECE
        return max(n, 0)

    def _take_over(self, s: Sequence) -> None:
        """Blocks of earlier prompts that begin like this one's. A last piece is left to compute, not a small one."""
        if not self.prefix_caching or s.group.request.sampling.prompt_logprobs is not None:
            return
        found = self.blocks.find(root(s.group), s.tokens, s.n_prompt - DECODE_ROWS - 1)
        for block in found:
            self.blocks.share(block)
        s.blocks = found
        s.cached = s.drafted = len(found) * self.blocks.size
        s.remembered = len(found)

    def _reserve(self, s: Sequence, n: int) -> bool:
        """Blocks of its own for the next n tokens. False when there are not enough, and nothing has changed."""
        size = self.blocks.size
        first = (self.n_virtual + s.cached) // size if s.cached else 0
        shared = [i for i in range(first, len(s.blocks)) if self.blocks.owners[s.blocks[i]] > 1]
        missing = self.n_blocks(s.cached + n) - len(s.blocks)
        if len(shared) + max(missing, 0) > self.blocks.free:
            return False
        for i in shared:  # copy on write
            own = self.blocks.take()
            self.copies.append((s.blocks[i], own))
            self.blocks.release([s.blocks[i]])
            s.blocks[i] = own
        s.blocks += [self.blocks.take() for _ in range(missing)]
        return True

    def _preempt(self) -> list[Sequence]:
        """The last sequence (beams: all of them) gives its blocks back and waits; what it has said stays said."""
        last = self.running[-1]
        beams = last.group.request.sampling.beam_width
        victims = [s for s in self.running if s.group is last.group] if beams else [last]
        for s in victims:
            self.running.remove(s)
            self._give_back(s)
            self.add(s)
            self.preemptions += 1
        return victims

    def _give_back(self, s: Sequence) -> None:
        self.blocks.release(s.blocks)
        s.blocks, s.cached, s.drafted, s.remembered = [], 0, 0, 0


def order(s: Sequence) -> tuple[int, int, int]:
    return *s.group.order, s.index


def root(group: Group) -> tuple[str, str | None]:
    """Whose keys and values these are: an adapter's differ from the base model's."""
    return "", group.request.adapter
