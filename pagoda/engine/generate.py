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
from pagoda.ops import cpu
from pagoda.ops.attention import preferred_page_size
from pagoda.ops.cpu.record import Recording

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
            if n and seconds  # a phase that was interrupted has no time
        ]
        return f"[{', '.join(parts)}]"


class Generator:
    """Runs a model over a fixed set of prompts: `prefill`, then `decode` again and again. Both yield (index, token).

    Who reads the tokens says when a sequence has ended (`stop`); one that reaches its limit ends by itself.
    """

    def __init__(
        self, model: GPT, prompts: list[list[int]], options: list[Sampling], kv_dtype: torch.dtype | None = None
    ):
        if not prompts:
            raise PagodaError("no prompt: give at least one")
        self.model, self.device = model, model.device
        self.n_virtual = model.n_virtual  # tokens that an adapter puts before every sequence
        context, vocab_size = model.config.block_size - self.n_virtual, model.config.vocab_size
        for p in prompts:
            if not p:
                raise PagodaError("the prompt is empty: give at least one token")
            if len(p) >= context:
                raise PagodaError(
                    f"the prompt has {len(p)} tokens and the model's context is {context}: "
                    f"shorten it to {context - 1} or less"
                )
            if bad := [t for t in p if not 0 <= t < vocab_size]:
                raise PagodaError(f"token {bad[0]} is outside the model's vocabulary of {vocab_size}")
        self.running = {
            i: Sequence(p, Sampler(o, p, vocab_size), min(o.max_new_tokens, context - len(p)))
            for i, (p, o) in enumerate(zip(prompts, options))
        }
        sizes = [self.n_virtual + len(s.prompt) + s.most for s in self.running.values()]
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
        self.decoder: Decoder | None = None
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
            if s.cached + self.n_virtual == self.recompute_beyond:
                s.cached = 0
        sequences = [s for _, s in step]
        if all(s.cached for s in sequences):
            if self.decoder is None or self.decoder.sequences != sequences:
                self.decoder = Decoder(self, sequences)
            logits = self.decoder.step()
        else:
            self.decoder = None  # its positions would be those before this step
            logits = self._step(sequences, [s.new[-1:] if s.cached else s.prompt + s.new for s in sequences])
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
        slots = [slot for s, n in zip(sequences, lengths) for slot in self.slots(s, n)]
        for s, n in zip(sequences, lengths):
            s.cached += n
        batch = self.batch(sequences, lengths, past, slots)
        flat = torch.tensor([t for ts in tokens for t in ts], device=self.device)
        return self.model(flat, batch, logits_at=batch.last())

    def slots(self, s: Sequence, n: int) -> list[int]:
        """Where the next n tokens of a sequence go in the cache."""
        size, first = self.page_size, self.n_virtual + s.cached
        return [s.pages[p // size] * size + p % size for p in range(first, first + n)]

    def batch(self, sequences: list[Sequence], lengths: list[int], past: list[int], slots: list[int]) -> Batch:
        width = max(len(s.pages) for s in sequences)
        table = [s.pages + [0] * (width - len(s.pages)) for s in sequences]
        return Batch.of(
            lengths,
            self.device,
            [self.n_virtual + p for p in past],
            scaling_lens=self._lengths(sequences) if self.scaled_by_length else None,
            cache=self.cache,
            slots=torch.tensor(slots, device=self.device),
            block_table=torch.tensor(table, dtype=torch.int32, device=self.device),
        )

    def _lengths(self, sequences: list[Sequence]) -> Tensor:
        """(S,) int32: all tokens of each sequence, those that wait for a later chunk of prefill included."""
        totals = [self.n_virtual + len(s.prompt) + len(s.new) for s in sequences]
        return torch.tensor(totals, dtype=torch.int32, device=self.device)


class Decoder:
    """Decode steps of the same sequences. Their tensors stay in place, so that the kernel calls can be recorded."""

    def __init__(self, generator: Generator, sequences: list[Sequence]):
        self.generator, self.model, self.sequences = generator, generator.model, sequences
        past = [s.cached for s in sequences]
        slots = [slot for s in sequences for slot in generator.slots(s, 1)]
        self.batch = generator.batch(sequences, [1] * len(sequences), past, slots)
        self.tokens = torch.tensor([s.new[-1] for s in sequences], device=generator.device)
        self.inputs: list[Tensor] = []  # the residual stream's start, then the angles' cosines and sines
        self.recording: Recording | None = None
        self.started = False

    def step(self) -> Tensor:
        """Scores (S, vocab_size) of what follows each sequence's last token."""
        if self.started:
            self._advance()
        self.started = True
        x = self.model.embed_tokens(self.tokens, self.batch)
        angles = self.model.angles(self.batch)
        for s in self.sequences:
            s.cached += 1
        if cpu.kernels is None or not x.is_cpu:
            return self.model.logits(self.model.transform(x, self.batch, *angles))
        return self.model.cap_logits(self._recorded(x, angles))

    def _advance(self) -> None:
        """The batch of the next token, in the same tensors."""
        b, generator = self.batch, self.generator
        b.positions += 1
        b.seq_lens += 1
        b.max_seq_len += 1
        b.slots.copy_(torch.tensor([slot for s in self.sequences for slot in generator.slots(s, 1)]))
        self.tokens.copy_(torch.tensor([s.new[-1] for s in self.sequences]))
        if b.scaling_lens is not None:
            b.scaling_lens += 1

    def _recorded(self, x: Tensor, angles: tuple) -> Tensor:
        """The head's scores from the start of the residual stream: by Python the first time, then by its recording."""
        flat = [x, *(t for pair in angles if pair is not None for t in pair)]
        if self.recording is None:
            self.inputs = [t.clone() for t in flat]
            x, *rest = self.inputs
            pairs = iter(zip(rest[::2], rest[1::2]))
            angles = [None if pair is None else next(pairs) for pair in angles]
            self.recording = Recording(lambda: self.model.head(self.model.transform(x, self.batch, *angles)))
            return self.recording.output
        if not self.recording.complete:
            return self.model.head(self.model.transform(x, self.batch, *angles))
        for mine, new in zip(self.inputs, flat):
            mine.copy_(new)
        return self.recording()
