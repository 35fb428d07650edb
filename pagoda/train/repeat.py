"""The gradients of a small model's step, by the kernel calls of an earlier one (ops/cpu/record.py).

In a step of a few milliseconds the Python around the kernels, both ways, takes a fifth of the time. Where rows have the
shape of those before, the calls and the few other operations between them are written down once and repeated: on other
tokens, in the same memory, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pagoda.data.shards import Rows
from pagoda.models.gpt import GPT
from pagoda.ops import cpu
from pagoda.ops.cpu.record import Recording
from pagoda.train.options import Train

MOST = 2**28  # bytes that a recording may keep: all that is made in a step,
MADE = 48  # which is so many times the residual stream of all layers
Gradients = Callable[[Rows, float], Tensor]  # (rows, scored tokens of the step) to the loss; leaves the gradients


def repeats(model: GPT, o: Train, device: torch.device) -> bool:
    """Whether steps of a pretraining are small enough to be repeated, and do nothing that a recording cannot hold: what
    hooks on modules or parameters do is Python's."""
    c, n_tokens = model.config, o.micro_batch_size * o.seq_len
    stream, logits = 4 * n_tokens * c.n_embd * len(model.layers), 4 * n_tokens * c.vocab_size
    plain = not (c.n_expert or o.compile or o.release_gradients) and o.checkpointing == "none"
    plain &= o.global_batch_size == o.micro_batch_size
    hooks = [
        (m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks) for m in model.modules()
    ]
    hooks += [[p._backward_hooks, p._post_accumulate_grad_hooks] for p in model.parameters()]
    plain &= not any(map(any, hooks))
    return cpu.kernels is not None and device.type == "cpu" and plain and MADE * (stream + logits) <= MOST


class Repeated:
    """`gradients`, repeated while rows have the same shape. Another shape is recorded when it comes often in a row."""

    def __init__(self, model: GPT, gradients: Gradients):
        self.model, self.gradients = model, gradients
        self.recording: Recording | None = None
        self.recorded = self.last = None  # shapes
        self.streak, self.recordings = 0, 0

    def __call__(self, rows: Rows, scored: float) -> Tensor:
        shape = tuple(rows.lengths), rows.scored, scored
        self.streak = self.streak + 1 if shape == self.last else 1
        self.last = shape
        if self.recording is None or shape != self.recorded:
            if self.streak <= 1 + self.recordings:
                return self.gradients(rows, scored)
            return self._record(rows, scored)
        self.tokens.copy_(rows.tokens)
        self.targets.copy_(rows.targets)
        with torch.no_grad():
            loss = self.recording()
        for p, grad in self.left:
            p.grad = grad
        return loss

    def _record(self, rows: Rows, scored: float) -> Tensor:
        self.recording, self.recorded, self.recordings = None, self.last, self.recordings + 1
        self.tokens, self.targets = rows.tokens.clone(), rows.targets.clone()
        mine = Rows(self.tokens, self.targets, rows.lengths, rows.scored)
        recording = Recording(lambda: self.gradients(mine, scored), operations=True)
        if recording.complete:
            self.recording = recording
            self.left = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        else:
            self.recordings = 2**62  # it would not be the next time either
        return recording.output
