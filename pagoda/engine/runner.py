"""A step of the engine through the model: works to scores. One flat forward, whatever the works are."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from pagoda.engine.request import Sequence
from pagoda.engine.scheduler import Work
from pagoda.models.batch import Batch, Cache
from pagoda.models.gpt import GPT
from pagoda.ops import cpu
from pagoda.ops.cpu.record import Recording

RECORDED = 16  # most sequences of a recorded step: with more the arithmetic dwarfs the Python
RECORDINGS = 4  # kept: each holds the activations of its step


class Runner:
    """Runs a model over a paged cache. A draft model has one of its own, with the same blocks."""

    def __init__(self, model: GPT, cache: Cache):
        self.model, self.cache, self.size, self.device = model, cache, cache.page_size, model.device
        self.n_virtual = model.n_virtual
        self.by_length = model.rope is not None and model.rope.by_length
        self.decoders: OrderedDict[int, Decoder] = OrderedDict()

    @torch.inference_mode()
    def run(self, works: list[Work], record: bool = True) -> Tensor:
        """Scores (M, vocab_size) of what follows: for each work in turn, behind each of its last `scored` tokens."""
        n = len(works)
        if record and n <= RECORDED and all(w.n == 1 and w.scored == 1 and not w.drafts for w in works):
            return self._decode([w.sequence for w in works])
        pieces = [w.tokens for w in works]
        batch = self.batch([w.sequence for w in works], [len(p) for p in pieces])
        flat = torch.tensor([t for piece in pieces for t in piece], device=self.device)
        rows, end = [], 0
        for work, piece in zip(works, pieces):
            end += len(piece)
            rows += range(end - work.scored, end)
        return self.model(flat, batch, logits_at=torch.tensor(rows, dtype=torch.int64, device=self.device))

    @torch.inference_mode()
    def copy(self, blocks: list[tuple[int, int]]) -> None:
        for source, target in blocks:
            self.cache.copy(source, target)

    def batch(self, sequences: list[Sequence], lengths: list[int], past: list[int] | None = None) -> Batch:
        """The next tokens of each sequence, behind the `past` ones that are in the cache."""
        past = [self.n_virtual + p for p in (past or [s.cached for s in sequences])]
        scaling = None
        if self.by_length:  # a prompt's pieces go by its whole length
            totals = [self.n_virtual + len(s.tokens) for s in sequences]
            scaling = torch.tensor(totals, dtype=torch.int32, device=self.device)
        return Batch.of(
            lengths,
            self.device,
            past,
            scaling_lens=scaling,
            cache=self.cache,
            slots=torch.tensor(self.slots(sequences, lengths, past), device=self.device),
            block_table=self.table(sequences),
        )

    def slots(self, sequences: list[Sequence], lengths: list[int], past: list[int]) -> list[int]:
        """Where the next tokens of each sequence go in the cache."""
        size = self.size
        return [
            s.blocks[p // size] * size + p % size
            for s, n, first in zip(sequences, lengths, past)
            for p in range(first, first + n)
        ]

    def table(self, sequences: list[Sequence]) -> Tensor:
        width = max(len(s.blocks) for s in sequences)
        rows = [s.blocks + [0] * (width - len(s.blocks)) for s in sequences]
        return torch.tensor(rows, dtype=torch.int32, device=self.device)

    def _decode(self, sequences: list[Sequence]) -> Tensor:
        decoder = self.decoders.get(len(sequences))
        if decoder is None or not decoder.fits(sequences):
            decoder = self.decoders[len(sequences)] = Decoder(self, sequences)
            while len(self.decoders) > RECORDINGS:
                self.decoders.popitem(last=False)
        self.decoders.move_to_end(len(sequences))
        return decoder(sequences)


class Decoder:
    """One more token for each of S sequences. The tensors stay in place, so that the kernel calls can be recorded."""

    def __init__(self, runner: Runner, sequences: list[Sequence]):
        self.runner, self.model = runner, runner.model
        self.batch = runner.batch(sequences, [1] * len(sequences))
        width = max(4, 2 * self.batch.block_table.shape[1])  # room to grow
        self.batch.block_table = self.batch.block_table.new_zeros(len(sequences), width)
        self.blocks: list[list[int]] = [[]] * len(sequences)  # what the table holds
        self.inputs: list[Tensor] = []  # the residual stream's start, then the angles' cosines and sines
        self.recording: Recording | None = None

    def fits(self, sequences: list[Sequence]) -> bool:
        return max(len(s.blocks) for s in sequences) <= self.batch.block_table.shape[1]

    def __call__(self, sequences: list[Sequence]) -> Tensor:
        """Scores (S, vocab_size) of what follows each sequence's last token."""
        b, device = self.batch, self.runner.device
        past = [self.runner.n_virtual + s.cached for s in sequences]
        b.positions.copy_(torch.tensor(past))
        b.seq_lens.copy_(b.positions + 1)
        b.max_seq_len = max(past) + 1
        b.slots.copy_(torch.tensor(self.runner.slots(sequences, [1] * len(sequences), past)))
        if b.scaling_lens is not None:
            b.scaling_lens.copy_(b.seq_lens)
        for i, s in enumerate(sequences):
            if s.blocks != self.blocks[i]:
                self.blocks[i] = list(s.blocks)
                b.block_table[i, : len(s.blocks)] = torch.tensor(s.blocks, dtype=torch.int32)
        x = self.model.embed_tokens(torch.tensor([s.tokens[-1] for s in sequences], device=device), b)
        angles = self.model.angles(b)
        if cpu.kernels is None or not x.is_cpu:
            return self.model.logits(self.model.transform(x, b, *angles))
        return self.model.cap_logits(self._recorded(x, angles))

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
