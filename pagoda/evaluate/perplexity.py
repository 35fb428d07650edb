"""Perplexity of a text: how surprised a model is, token by token.

The text is tokenized whole and cut into windows that do not overlap; the first token of a window is not scored. The
rest of the text, shorter than a window, is left out (unless the text is shorter than one window).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pagoda.common import PagodaError
from pagoda.engine.llm import LLM
from pagoda.engine.request import check_tokens
from pagoda.models.batch import Batch

STEP_TOKENS = 4096  # windows that share a forward pass hold at most so many tokens


@dataclass
class Perplexity:
    """perplexity is exp of the mean loss (nats) over the scored tokens."""

    perplexity: float
    loss: float
    tokens: int
    windows: int


def perplexity(llm: LLM, text: str, window: int = 1024, max_windows: int | None = None) -> Perplexity:
    """Score a text in windows of `window` tokens, the first `max_windows` of them."""
    context = llm.model.config.block_size
    if not 2 <= window <= context:
        raise PagodaError(f"window must be between 2 and the model's context of {context}, not {window}")
    if max_windows is not None and max_windows < 1:
        raise PagodaError(f"max_windows must be at least 1, not {max_windows}")
    ids = llm.tokenizer.encode(text)
    if len(ids) < 2:
        raise PagodaError("the text has fewer than two tokens: there is nothing to score")
    check_tokens(ids, llm.model.config.vocab_size)
    windows = [ids[i : i + window] for i in range(0, max(1, len(ids) - window + 1), window)][:max_windows]
    total = sum(loss for group in batches(windows) for loss in losses(llm, group))
    n = sum(len(w) - 1 for w in windows)
    return Perplexity(math.exp(total / n) if total / n < 700 else math.inf, total / n, n, len(windows))


def batches(windows: list[list[int]]) -> Iterator[list[list[int]]]:
    size = max(1, STEP_TOKENS // len(windows[0]))
    for i in range(0, len(windows), size):
        yield windows[i : i + size]


@torch.inference_mode()
def losses(llm: LLM, windows: list[list[int]]) -> list[float]:
    """Sum of the losses (nats) of each window."""
    device = llm.model.device
    tokens = torch.tensor([t for w in windows for t in w[:-1]], device=device)
    targets = torch.tensor([t for w in windows for t in w[1:]], device=device)
    lengths = [len(w) - 1 for w in windows]
    each = llm.model(tokens, Batch.of(lengths, device), targets=targets)
    return [part.double().sum().item() for part in each.split(lengths)]
