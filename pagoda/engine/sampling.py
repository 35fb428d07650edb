"""From scores to tokens: penalties, bias, guides, and then the draw (ops/sample.py).

A `Chooser` holds what one sequence remembers: counts, its guide, its own random numbers, one for each token. `choose`
treats all rows of a step together, and yet no row's result depends on the others.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from pagoda.engine.guided import Guide
from pagoda.engine.options import Sampling
from pagoda.engine.request import TokenLogprob
from pagoda.ops.sample import sample


class Chooser:
    """How one sequence chooses. `ends` are the tokens that must not come before `min_new_tokens`."""

    def __init__(
        self,
        options: Sampling,
        prompt: list[int],
        vocab_size: int,
        index: int = 0,
        ends: list[int] | None = None,
        guide: Guide | None = None,
    ):
        self.options, self.guide, self.n = options, guide, 0
        seed = int.from_bytes(os.urandom(8), "little") if options.seed is None else options.seed + index
        self.random = random.Random(seed)
        self.ends = torch.tensor(ends or [], dtype=torch.int64)
        self.failed = ""  # why it can choose no more
        self.seen = self.counts = self.bias = None
        if options.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[torch.tensor(prompt, dtype=torch.int64)] = True
        if options.presence_penalty or options.frequency_penalty:
            self.counts = torch.zeros(vocab_size)
        if options.logit_bias:
            tokens, values = zip(*options.logit_bias.items())
            self.bias = torch.tensor(tokens), torch.tensor(values, dtype=torch.float32)

    @property
    def adjusts(self) -> bool:
        early = len(self.ends) > 0 and self.n < self.options.min_new_tokens
        return early or any(x is not None for x in (self.seen, self.counts, self.bias, self.guide))

    @property
    def ended(self) -> bool:
        """Whether the guide takes nothing more."""
        return self.guide is not None and self.guide.finished

    def draw(self) -> tuple[float, ...]:
        """How it draws, and what chance says this time: a row of what `ops.sample` takes."""
        o = self.options
        return o.temperature, o.top_k, o.top_p, o.min_p, self.random.random() if o.temperature else 0.0

    def adjust(self, scores: Tensor) -> None:
        """Change the scores (vocab_size,) in place: repetition penalty over prompt and answer (Keskar et al. 2019),
        presence and frequency over the answer, bias, what may not come yet, what the guide forbids."""
        o = self.options
        if self.seen is not None:
            penalized = torch.where(scores < 0, scores * o.repetition_penalty, scores / o.repetition_penalty)
            scores.copy_(torch.where(self.seen, penalized, scores))
        if self.counts is not None:
            scores -= o.frequency_penalty * self.counts + o.presence_penalty * (self.counts > 0)
        if self.bias is not None:
            scores[self.bias[0]] += self.bias[1]
        if self.n < o.min_new_tokens:
            scores[self.ends] = float("-inf")
        if self.guide is not None:
            self.guide.mask(scores)

    def copy(self) -> Chooser:
        """Another sequence that goes on from here (beams: they neither draw nor follow a guide)."""
        other = copy(self)
        other.seen = None if self.seen is None else self.seen.clone()
        other.counts = None if self.counts is None else self.counts.clone()
        return other

    def accept(self, token: int) -> None:
        """The token stands behind the others now."""
        self.n += 1
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        if self.guide is not None:
            self.guide.accept(token)


def choose(
    logits: Tensor,
    choosers: list[Chooser],
    draws: list[tuple[float, ...]] | None = None,
    tokens: list[int] | None = None,
) -> list[int]:
    """The next token of each row (R, vocab_size); `draws` and `tokens` where they are known already."""
    scores = logits
    if any(c.adjusts for c in choosers):
        scores = logits.float().cpu()
        scores = scores.clone() if scores.data_ptr() == logits.data_ptr() else scores
        for row, c in zip(scores, choosers):
            if c.adjusts:
                attempt(c, c.adjust, row)
    if tokens is None:
        tokens = sample(scores, torch.tensor(draws or [c.draw() for c in choosers])).tolist()
    for chooser, token in zip(choosers, tokens):
        attempt(chooser, chooser.accept, token)
    return tokens


def attempt(chooser: Chooser, function: Callable, *arguments) -> None:
    """What goes wrong for one sequence must not stop the others."""
    try:
        function(*arguments)
    except Exception as e:
        chooser.failed = chooser.failed or str(e) or type(e).__name__


def log_probabilities(logits: Tensor, tokens: list[int], tops: list[int]) -> list[TokenLogprob]:
    """What the model itself gives each row's token, and the `tops` most likely ones beside it."""
    scores = logits.float().log_softmax(-1)
    own = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    best = [[]] * len(tokens)
    if most := max(tops, default=0):
        values, places = (t.tolist() for t in scores.topk(most))
        best = [list(zip(p[:n], v[:n])) for p, v, n in zip(places, values, tops)]
    return [TokenLogprob(token, value, top) for token, value, top in zip(tokens, own, best)]
