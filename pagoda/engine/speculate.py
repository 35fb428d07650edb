"""Guesses of what comes next, so that one step can check several tokens (Leviathan et al. 2023; Saxena 2023).

A guess is always one definite token. The model then draws as it would without guesses, and a guess that is what was
drawn has saved a step: the answers, and their probabilities, are those of the model alone, whatever was guessed.
"""

from __future__ import annotations

import torch

from pagoda.engine.request import Sequence
from pagoda.engine.runner import Runner
from pagoda.engine.scheduler import Work

LONGEST = 4  # words of the text that are looked up


class PromptLookup:
    """What stood behind the last tokens when they stood in the text before."""

    def guess(self, works: list[Work]) -> None:
        for work in works:
            if work.room:
                work.drafts = lookup(work.sequence.tokens, work.room)

    def seen(self, works: list[Work]) -> None:
        """The works were computed; nothing to remember."""


def lookup(tokens: list[int], n: int) -> list[int]:
    """The n tokens behind the latest earlier place of the last LONGEST tokens, or of fewer."""
    for size in range(min(LONGEST, len(tokens) - 1), 1, -1):
        tail = tokens[-size:]
        last = tail[-1]
        for end in range(len(tokens) - 2, size - 2, -1):
            if tokens[end] == last and tokens[end - size + 1 : end + 1] == tail:
                return tokens[end + 1 : end + 1 + n]
    return []


class DraftModel:
    """A smaller model with the same vocabulary says what it would say. Its cache has the same blocks."""

    def __init__(self, runner: Runner):
        self.runner = runner

    @torch.inference_mode()
    def guess(self, works: list[Work]) -> None:
        works = [w for w in works if w.room]
        for i in range(max((w.room for w in works), default=0)):
            some = [w for w in works if i < w.room]
            pieces = [w.sequence.tokens[w.sequence.drafted :] + w.drafts if not i else w.drafts[-1:] for w in some]
            past = [w.sequence.drafted if not i else len(w.sequence.tokens) + i - 1 for w in some]
            batch = self.runner.batch([w.sequence for w in some], [len(p) for p in pieces], past)
            flat = torch.tensor([t for piece in pieces for t in piece], device=self.runner.device)
            likely = self.runner.model(flat, batch, logits_at=batch.last()).argmax(-1).tolist()
            for w, token in zip(some, likely):
                w.drafts.append(token)

    @torch.inference_mode()
    def seen(self, works: list[Work]) -> None:
        """Takes prompts in with the model, and forgets guesses that were wrong. Called before the works are done."""
        prompts: list[tuple[Sequence, list[int]]] = []
        for w in works:
            s = w.sequence
            if w.room:
                s.drafted = min(len(s.tokens) + len(w.drafts) - 1, s.cached + w.n)
            elif s.drafted < s.cached + w.n:
                prompts.append((s, s.tokens[s.drafted : s.cached + w.n]))
        if not prompts:
            return
        sequences = [s for s, _ in prompts]
        batch = self.runner.batch(sequences, [len(t) for _, t in prompts], [s.drafted for s in sequences])
        flat = torch.tensor([t for _, tokens in prompts for t in tokens], device=self.runner.device)
        self.runner.model.hidden(flat, batch)
        for s, tokens in prompts:
            s.drafted += len(tokens)
