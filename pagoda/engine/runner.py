"""A step of the engine through the model: works to scores. One flat forward, whatever the works are."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pagoda.engine.request import Sequence
from pagoda.engine.scheduler import Work
from pagoda.models.batch import Batch, Cache
from pagoda.models.gpt import GPT
from pagoda.ops import cpu
from pagoda.ops.cpu.record import Recording
from pagoda.ops.sample import sample

RECORDED_BYTES = 2**28  # of all recordings: each keeps the activations of its step


class Runner:
    """Runs a model over a paged cache, whose last page belongs to nobody. A draft model has a cache of its own, with
    the same blocks."""

    def __init__(self, model: GPT, cache: Cache):
        self.model, self.cache, self.size, self.device = model, cache, cache.page_size, model.device
        self.n_virtual = model.n_virtual
        self.by_length = model.rope is not None and model.rope.by_length
        self.chosen: list[int] | None = None
        self.decoders: dict[int, Decoder] = {}  # by their rows, the longest unused first
        self.most_recorded = 256  # rows
        if self.device.type == "cuda":  # the memory of all graphs, and the stream that they are recorded on
            self.graphs = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)

    @torch.inference_mode()
    def run(self, works: list[Work], record: bool = True, draws: list[tuple[float, ...]] | None = None) -> Tensor:
        """Scores (M, vocab_size) of what follows: for each work in turn, behind each of its last `scored` tokens. With
        `draws` (rows of what ops/sample.py takes) a recorded step chooses the next tokens, too: they are `chosen`."""
        self.chosen, n = None, len(works)
        if record and n <= self.most_recorded and all(w.n == 1 and w.scored == 1 and not w.drafts for w in works):
            return self._decode([w.sequence for w in works], draws)
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
        slots = torch.tensor(self.slots(sequences, lengths, past), device=self.device)
        places = dict(cache=self.cache, slots=slots, block_table=self.table(sequences))
        return Batch.of(lengths, self.device, past, scaling_lens=scaling, **places)

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

    def _decode(self, sequences: list[Sequence], draws: list[tuple[float, ...]] | None) -> Tensor:
        rows = recorded_rows(len(sequences))
        decoder = self.decoders.pop(rows, None)
        if decoder is None or not decoder.fits(sequences):
            decoder = Decoder(self, rows, max(len(s.blocks) for s in sequences))
        self.decoders[rows] = decoder
        logits = decoder(sequences, draws)
        if draws and decoder.chosen is not None:
            self.chosen = decoder.chosen[: len(sequences)].tolist()
        while sum(d.nbytes for d in self.decoders.values()) > RECORDED_BYTES:
            first = next(iter(self.decoders))
            if len(self.decoders) == 1:  # too large by itself: from now on by Python
                self.most_recorded = first - 1
            del self.decoders[first]
        return logits


def recorded_rows(n: int) -> int:
    """The rows of the recording that a step of n sequences uses: not one recording for every number."""
    step = 1 if n <= 4 else 2 if n <= 16 else 4 if n <= 64 else 16
    return -(-n // step) * step


class Decoder:
    """One more token for each of up to `rows` sequences. The tensors stay in place, so that the kernel calls can be
    recorded. Rows that no sequence needs write to the page that belongs to nobody."""

    def __init__(self, runner: Runner, rows: int, n_blocks: int):
        self.runner, self.model, self.rows = runner, runner.model, rows
        device, self.nobody = runner.device, runner.cache.n_pages - 1
        width = max(4, 2 * n_blocks) if device.type == "cpu" else n_blocks + 1  # room to grow
        # What every step changes, written through numpy: PyTorch would take longer.
        numbers = torch.zeros(3, rows, dtype=torch.int64)
        self.written = numbers.numpy()
        self.numbers = numbers.to(device)
        positions, slots, self.tokens = self.numbers
        table = torch.full((rows, width), self.nobody, dtype=torch.int32, device=device)
        scaling = torch.ones(rows, dtype=torch.int32, device=device) if runner.by_length else None
        places = dict(cache=runner.cache, slots=slots, block_table=table)
        self.batch = Batch.of([1] * rows, device, scaling_lens=scaling, **places)
        self.batch.positions = positions
        self.lengths = self.batch.seq_lens.numpy() if device.type == "cpu" else None
        self.draws = torch.zeros(rows, 5)
        # A cap on scores is no kernel's work, and a GPU's graph cannot hold a draw.
        self.chooses = cpu.usable(self.numbers) and not self.model.config.logit_softcap
        self.chosen: Tensor | None = None
        self.longest = min(width * runner.size, self.model.config.block_size)
        self.blocks: list[list[int]] = [[] for _ in range(rows)]  # what the table holds
        self.inputs: list[Tensor] | None = None  # the residual stream's start, then the angles' cosines and sines
        self.recording: Recording | Graph | None = None

    @property
    def nbytes(self) -> int:
        return self.recording.nbytes if self.recording is not None else 0

    def fits(self, sequences: list[Sequence]) -> bool:
        return max(len(s.blocks) for s in sequences) <= self.batch.block_table.shape[1]

    def __call__(self, sequences: list[Sequence], draws: list[tuple[float, ...]] | None = None) -> Tensor:
        """Scores (S, vocab_size) of what follows each sequence's last token."""
        b, n, idle = self.batch, len(sequences), self.rows - len(sequences)
        past = [self.runner.n_virtual + s.cached for s in sequences]
        slots = self.runner.slots(sequences, [1] * n, past) + [self.nobody * self.runner.size] * idle
        self.written[:] = past + [0] * idle, slots, [s.tokens[-1] for s in sequences] + [0] * idle
        if self.lengths is not None:
            self.lengths[:] = self.written[0] + 1
        else:
            self.numbers.copy_(torch.from_numpy(self.written))
            torch.add(b.positions, 1, out=b.seq_lens)
        with np.errstate(over="ignore"):  # a huge temperature is infinite
            self.draws.numpy()[:n] = draws or 0
        b.max_seq_len = max(past) + 1
        if b.scaling_lens is not None:
            b.scaling_lens.copy_(b.seq_lens)
        for i in range(self.rows):
            blocks = sequences[i].blocks if i < n else [self.nobody]
            if blocks != self.blocks[i]:
                self.blocks[i] = list(blocks)
                b.block_table[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        if b.positions.is_cpu:
            scores = self._recorded() if cpu.kernels is not None else self._scores()
        else:  # experts are asked for by the numbers of their rows
            scores = self._scores() if self.model.config.n_expert else self._behind_inputs()
        return self.model.cap_logits(scores[:n])

    def _scores(self, inputs: tuple | None = None) -> Tensor:
        x, angles = inputs or self._inputs()
        scores = self.model.head(self.model.transform(x, self.batch, *angles))
        if self.chooses:
            self.chosen = sample(scores, self.draws)
        return scores

    def _inputs(self) -> tuple[Tensor, tuple]:
        return self.model.embed_tokens(self.tokens, self.batch), self.model.angles(self.batch)

    def _recorded(self) -> Tensor:
        """The head's scores: by Python the first time, then by the recording. Where there is more to the embedding than
        kernels, the recording begins behind it; what cannot be recorded at all is done by Python."""
        if self.inputs is not None:
            return self._behind_inputs()
        if self.recording is not None:
            return self.recording()
        now, self.batch.max_seq_len = self.batch.max_seq_len, self.longest
        self.model.angles(self.batch)  # makes a table of them, long enough for all steps to come
        recording = Recording(self._scores)
        self.batch.max_seq_len = now
        if recording.complete:
            self.recording = recording
        else:
            self.inputs = []
        return recording.output

    def _behind_inputs(self) -> Tensor:
        x, angles = self._inputs()
        flat = [x, *(t for pair in angles if pair is not None for t in pair)]
        if self.recording is None:
            self.inputs = [t.clone() for t in flat]
            x, *rest = self.inputs
            pairs = iter(zip(rest[::2], rest[1::2]))
            angles = [None if pair is None else next(pairs) for pair in angles]
            function = partial(self._scores, (x, angles))
            self.recording = Recording(function) if x.is_cpu else Graph(function, *self.runner.graphs)
            return self.recording.output
        if not self.recording.complete:
            return self._scores((x, angles))
        for mine, new in zip(self.inputs, flat):
            mine.copy_(new)
        return self.recording()


class Graph:
    """What a `Recording` is on a CPU, a CUDA graph is on a GPU. The function must not wait for the device."""

    complete, nbytes = True, 0  # the graphs of a runner share their memory

    def __init__(self, function: Callable[[], Tensor], pool, stream: torch.cuda.Stream):
        self.graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # libraries make their workspaces for this stream
        collecting = gc.isenabled()
        gc.disable()  # a graph that nobody needs any more must not be destroyed meanwhile
        try:
            with torch.cuda.graph(self.graph, pool, stream, "thread_local"):
                self.output = function()
        finally:
            if collecting:
                gc.enable()
        self()

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.output
