"""Objectives: what training minimises. An objective is a call, (model, rows on the device) to a sum of losses.

The loop divides the sums of all micro-batches and processes by the number of scored tokens that they have together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from pagoda.data.shards import Rows
from pagoda.models.batch import Batch
from pagoda.models.gpt import GPT


class Source(Protocol):
    """Training data: an endless sequence of rows, each a pure function of its index. Resuming is knowing the step."""

    n_rows: int  # of one epoch
    fingerprint: str  # of the tokens and what cut them into rows: a resumed run refuses other data

    def rows(self, first: int, n: int) -> Rows:
        """Rows first to first + n - 1."""


class Objective(Protocol):
    """One that says `pure` depends on nothing but model and rows: what it does on the first is done on others again."""

    def __call__(self, model: GPT, rows: Rows) -> Tensor:
        """The sum of the losses (nats) of all scored tokens, a scalar with a gradient."""


@dataclass
class NextToken:
    """Predict every scored token from those before it in its document: pretraining, and supervised finetuning."""

    z_loss: float = 0.0
    pure: ClassVar[bool] = True

    def __call__(self, model: GPT, rows: Rows) -> Tensor:
        device = rows.tokens.device
        batch = Batch.of(rows.lengths, device)
        return model(rows.tokens, batch, targets=rows.targets, z_loss=self.z_loss).sum()
