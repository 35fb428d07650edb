"""From scores to tokens: penalties, temperature, top-k, top-p, min-p, and the draw."""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda.engine.options import Sampling


class Sampler:
    """Chooses the tokens of one sequence. It keeps the counts that penalties need, and its own random state."""

    def __init__(self, options: Sampling, prompt: list[int], vocab_size: int):
        self.options = options
        self.generator = torch.Generator()
        if options.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(options.seed)
        self.seen = self.counts = None
        if options.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[torch.tensor(prompt, dtype=torch.int64)] = True
        if options.presence_penalty or options.frequency_penalty:
            self.counts = torch.zeros(vocab_size)

    def __call__(self, logits: Tensor) -> int:
        """The next token from its scores (vocab_size,)."""
        o = self.options
        if o.temperature == 0 and self.seen is None and self.counts is None:
            return int(logits.argmax())
        token = self._draw(self._penalize(logits.float().cpu()))
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        return token

    def _penalize(self, scores: Tensor) -> Tensor:
        """Repetition penalty over prompt and answer (Keskar et al. 2019); presence and frequency over the answer."""
        o = self.options
        if self.seen is not None:
            penalized = torch.where(scores < 0, scores * o.repetition_penalty, scores / o.repetition_penalty)
            scores = torch.where(self.seen, penalized, scores)
        if self.counts is not None:
            scores = scores - o.frequency_penalty * self.counts - o.presence_penalty * (self.counts > 0)
        return scores

    def _draw(self, scores: Tensor) -> int:
        o = self.options
        if o.temperature == 0:
            return int(scores.argmax())
        index = None
        if 0 < o.top_k < len(scores):
            scores, index = scores.topk(o.top_k)  # from the most likely down
        elif o.top_p < 1:
            scores, index = scores.sort(descending=True)
        probs = (scores / o.temperature).softmax(-1)
        if o.top_p < 1:  # nucleus (Holtzman et al. 2020): drop what lies behind the first top_p of probability
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= o.top_p, 0.0)
        if o.min_p > 0:
            probs = probs.masked_fill(probs < o.min_p * probs.max(), 0.0)
        place = int(torch.multinomial(probs, 1, generator=self.generator))
        return place if index is None else int(index[place])
