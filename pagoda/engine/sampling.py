"""From scores to tokens: penalties, bias, guides, temperature, top-k, top-p, min-p, and the draw.

A `Chooser` holds what one sequence remembers: counts, its guide, its own random numbers, one for each token. `choose`
treats all rows of a step together, and yet no row's result depends on the others.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.common import PagodaError
from pagoda.engine.guided import Guide
from pagoda.engine.options import Sampling
from pagoda.engine.request import TokenLogprob

CANDIDATES = 256  # of a nucleus, sorted before all others are
SPAN = 128  # scores that are looked at together first, where one of many is sought


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
            if bad := [t for t in tokens if not 0 <= t < vocab_size]:
                raise PagodaError(f"logit_bias names token {bad[0]}, outside the vocabulary of {vocab_size}")
            self.bias = torch.tensor(tokens), torch.tensor(values, dtype=torch.float32)

    @property
    def plain(self) -> bool:
        """Whether it takes the largest score as it is."""
        return self.options.temperature == 0 and not self.adjusts

    @property
    def adjusts(self) -> bool:
        early = len(self.ends) > 0 and self.n < self.options.min_new_tokens
        return early or any(x is not None for x in (self.seen, self.counts, self.bias, self.guide))

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


def choose(logits: Tensor, choosers: list[Chooser]) -> list[int]:
    """The next token of each row (R, vocab_size)."""
    tokens = [0] * len(choosers)
    if any(c.plain for c in choosers):
        best = largest(logits).tolist()
        tokens = [best[i] if c.plain else 0 for i, c in enumerate(choosers)]
    rest = [i for i, c in enumerate(choosers) if not c.plain]
    if rest:
        scores = logits if len(rest) == len(logits) else logits[torch.tensor(rest, device=logits.device)]
        scores = scores.float().cpu()
        if any(choosers[i].adjusts for i in rest):
            scores = scores.clone() if scores.data_ptr() == logits.data_ptr() else scores
            for row, i in zip(scores, rest):
                if choosers[i].adjusts:
                    attempt(choosers[i], choosers[i].adjust, row)
        for i, token in zip(rest, _draw(scores, [choosers[i] for i in rest])):
            tokens[i] = token
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


def _draw(scores: Tensor, choosers: list[Chooser]) -> list[int]:
    """A token of each row (R, vocab_size) at random, or the largest where the temperature is 0."""
    tokens, size = [0] * len(choosers), scores.shape[1]
    kinds: dict[int, list[int]] = {}  # how many candidates are sorted (0: none): the rows of a kind go together
    for i, c in enumerate(choosers):
        o = c.options
        if o.temperature == 0:
            tokens[i] = int(largest(scores[i : i + 1]))
        else:
            kinds.setdefault(min(o.top_k or (CANDIDATES if o.top_p < 1 else 0), size), []).append(i)
    chance = torch.tensor([c.random.random() for c in choosers])
    while kinds:
        top, rows = kinds.popitem()
        some = [choosers[i].options for i in rows]
        temperature, top_p, min_p = torch.tensor([(o.temperature, o.top_p, o.min_p) for o in some]).T[..., None]
        x = scores if len(rows) == len(choosers) else scores[torch.tensor(rows)]
        probs, index, whole = (x / temperature).softmax(-1), None, 1.0
        if top:
            probs, index = probs.topk(top)  # from the most likely down
            mass = probs.sum(-1, keepdim=True)
            whole = torch.where(torch.tensor([[o.top_k > 0] for o in some]), mass, 1.0)  # of which top_p is a share
            if top < size:  # is the nucleus among the candidates?
                wide = [j for j, short in enumerate((mass < top_p * whole)[:, 0].tolist()) if short]
                kinds.setdefault(size, []).extend(rows[j] for j in wide)
                rows = [-1 if j in wide else i for j, i in enumerate(rows)]
                if not kinds[size]:
                    del kinds[size]
            # Nucleus (Holtzman et al. 2020): drop what lies behind the first top_p of probability.
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p * whole, 0.0)
        if bool((min_p > 0).any()):
            probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
        places = reach(probs, chance[torch.tensor(rows)][:, None])
        chosen = (places if index is None else index.gather(1, places))[:, 0].tolist()
        for i, token in zip(rows, chosen):
            if i >= 0:
                tokens[i] = token
    return tokens


def spans(x: Tensor, fill: float) -> Tensor:
    """(R, n) as (R, n / SPAN, SPAN), filled up at the end."""
    missing = -x.shape[1] % SPAN
    return (F.pad(x, (0, missing), value=fill) if missing else x).unflatten(1, (-1, SPAN))


def largest(scores: Tensor) -> Tensor:
    """`scores.argmax(-1)` of (R, n), five times as fast: first the span, then the place in it."""
    parts = spans(scores, float("-inf"))
    span = parts.amax(-1).argmax(-1)
    return span * SPAN + parts[torch.arange(len(parts), device=span.device), span].argmax(-1)


def reach(weights: Tensor, share: Tensor) -> Tensor:
    """(R, 1): the first place where the weights (R, n) so far exceed this share (R, 1), below 1, of all."""
    parts = spans(weights, 0.0)
    sums = parts.sum(-1).cumsum(-1)
    last = sums[:, -1:]
    target = torch.minimum(share * last, torch.nextafter(last, torch.zeros((), dtype=last.dtype)))
    span = torch.searchsorted(sums, target, right=True)
    target = target - torch.where(span > 0, sums.gather(1, (span - 1).clamp_min(0)), 0.0)
    within = parts.gather(1, span[..., None].expand(-1, -1, SPAN))[:, 0].cumsum(-1)
    target = torch.minimum(target, torch.nextafter(within[:, -1:], torch.zeros((), dtype=last.dtype)))
    return span * SPAN + torch.searchsorted(within, target, right=True)
