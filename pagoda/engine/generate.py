"""Generation: prefill the prompts in chunks, then decode all sequences together, one token a step.

Both are calls of the same flat forward. Each sequence owns its pages of the cache from start to end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pagoda.common import PagodaError
from pagoda.engine.options import Sampling
from pagoda.engine.sampling import Sampler
from pagoda.models.batch import Batch, Cache
from pagoda.models.gpt import GPT
from pagoda.ops.attention import preferred_page_size

PREFILL_TOKENS = 2048  # most tokens of one prefill step: bounds the memory of its activations


@dataclass
class Sequence:
    """A prompt and what has been generated behind it."""

    prompt: list[int]
    sampler: Sampler
    most: int  # new tokens at most
    new: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in the cache

    def __post_init__(self):
        self.left = len(self.prompt)  # tokens of the prompt that wait for prefill


@dataclass
class Timing:
    """Seconds and tokens of the two phases."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def summary(self) -> str:
        """One line for people."""
        parts = [
            f"{n} {what} tokens at {n / seconds:.1f} tokens/s"
            for n, what, seconds in (
                (self.prefill_tokens, "prompt", self.prefill_seconds),
                (self.decode_tokens, "new", self.decode_seconds),
            )
            if n
        ]
        return f"[{', '.join(parts)}]"


class Generator:
    """Runs a model over a fixed set of prompts: `prefill`, then `decode` again and again. Both yield (index, token).

    Who reads the tokens says when a sequence has ended (`stop`); one that reaches its limit ends by itself.
    """

    def __init__(
        self, model: GPT, prompts: list[list[int]], options: list[Sampling], kv_dtype: torch.dtype | None = None
    ):
        self.model, self.device = model, model.device
        context, vocab_size = model.config.block_size, model.config.vocab_size
        for p in prompts:
            if not p:
                raise PagodaError("the prompt is empty: give at least one token")
            if len(p) >= context:
                raise PagodaError(
                    f"the prompt has {len(p)} tokens and the model's context is {context}: "
                    f"shorten it to {context - 1} or less"
                )
            if max(p) >= vocab_size:
                raise PagodaError(f"token {max(p)} is outside the model's vocabulary of {vocab_size}")
        self.running = {
            i: Sequence(p, Sampler(o, p, vocab_size), min(o.max_new_tokens, context - len(p)))
            for i, (p, o) in enumerate(zip(prompts, options))
        }
        sizes = [len(s.prompt) + s.most for s in self.running.values()]
        self.page_size = preferred_page_size(self.device, max(sizes))
        n_pages = 0
        for s, size in zip(self.running.values(), sizes):
            count = -(-size // self.page_size)
            s.pages = list(range(n_pages, n_pages + count))
            n_pages += count
        rope = model.rope
        self.scaled_by_length = rope is not None and rope.by_length
        self.recompute_beyond = rope.recompute_beyond if rope is not None else None
        self.cache = Cache(model.cache_specs(), n_pages, self.page_size, kv_dtype or model.dtype, self.device)
        self.timing = Timing()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield from self.prefill()
        while self.running:
            yield from self.decode()

    def stop(self, index: int) -> None:
        """The sequence has ended: it takes part in no further step."""
        self.running.pop(index, None)

    @torch.inference_mode()
    def prefill(self) -> list[tuple[int, int]]:
        """Run all prompts through the model and choose each sequence's first token."""
        start = time.perf_counter()
        chosen = []
        while waiting := [(i, s) for i, s in self.running.items() if s.left]:
            step, budget = [], PREFILL_TOKENS
            for i, s in waiting:
                n = min(s.left, budget)
                if n:
                    step.append((i, s, s.prompt[s.cached : s.cached + n]))
                    budget -= n
            logits = self._step([s for _, s, _ in step], [t for _, _, t in step])
            for (i, s, tokens), row in zip(step, logits):
                s.left -= len(tokens)
                if not s.left:
                    chosen.append((i, self._choose(i, s, row)))
            self.timing.prefill_tokens += PREFILL_TOKENS - budget
        self.timing.prefill_seconds += time.perf_counter() - start
        return chosen

    @torch.inference_mode()
    def decode(self) -> list[tuple[int, int]]:
        """One more token of every running sequence."""
        start = time.perf_counter()
        step = list(self.running.items())
        for _, s in step:
            if s.cached == self.recompute_beyond:
                s.cached = 0
        tokens = [s.new[-1:] if s.cached else s.prompt + s.new for _, s in step]
        logits = self._step([s for _, s in step], tokens)
        chosen = [(i, self._choose(i, s, row)) for (i, s), row in zip(step, logits)]
        self.timing.decode_tokens += len(chosen)
        self.timing.decode_seconds += time.perf_counter() - start
        return chosen

    def _choose(self, index: int, s: Sequence, logits: Tensor) -> int:
        token = s.sampler(logits)
        s.new.append(token)
        if len(s.new) >= s.most:
            self.stop(index)
        return token

    def _step(self, sequences: list[Sequence], tokens: list[list[int]]) -> Tensor:
        """Write the tokens behind each sequence and return the scores (S, vocab_size) of what follows."""
        lengths = [len(t) for t in tokens]
        past = [s.cached for s in sequences]
        slots, width = [], max(len(s.pages) for s in sequences)
        for s, n in zip(sequences, lengths):
            slots += [
                s.pages[p // self.page_size] * self.page_size + p % self.page_size
                for p in range(s.cached, s.cached + n)
            ]
            s.cached += n
        batch = Batch.of(
            lengths,
            self.device,
            past,
            scaling_lens=self._lengths(sequences) if self.scaled_by_length else None,
            cache=self.cache,
            slots=torch.tensor(slots, device=self.device),
            block_table=torch.tensor(
                [s.pages + [0] * (width - len(s.pages)) for s in sequences], dtype=torch.int32, device=self.device
            ),
        )
        flat = torch.tensor([t for ts in tokens for t in ts], device=self.device)
        return self.model(flat, batch, logits_at=batch.last())

    def _lengths(self, sequences: list[Sequence]) -> Tensor:
        """(S,) int32: all tokens of each sequence, those that wait for a later chunk of prefill included."""
        return torch.tensor([len(s.prompt) + len(s.new) for s in sequences], dtype=torch.int32, device=self.device)
