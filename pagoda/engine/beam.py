"""Beam search: the most likely answers as wholes. Scores and ends are those of transformers' `generate(num_beams=...)`.

An unfinished beam's score is the sum of its tokens' log-probabilities; a finished one's is divided by its length, the
end included, to the power of `length_penalty`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pagoda.engine.request import Group, Output, Sequence

if TYPE_CHECKING:
    from pagoda.engine.engine import Engine


def advance(engine: Engine, group: Group, live: list[Sequence], logits: Tensor) -> list[tuple[Group, Output]]:
    """One more token for all beams: logits (len(live), vocab_size). Answers come out when the search is over."""
    o = group.request.sampling
    width, ends = o.beam_width, {*engine._ends(o), *o.stop_token_ids}
    scores = logits.float().cpu()
    for row, s in zip(scores, live):
        s.chooser.adjust(row)
    scores = scores.log_softmax(-1) + torch.tensor([s.logprob for s in live])[:, None]
    enough = max(2, 1 + len(ends)) * width  # all ends may be among the likeliest
    values, places = scores.flatten().topk(min(enough, scores.numel()))
    going: list[tuple[Sequence, int, float]] = []
    last = len(live[0].new) + 1 >= group.most
    for rank, (value, place) in enumerate(zip(values.tolist(), places.tolist())):
        parent, token = live[place // scores.shape[1]], place % scores.shape[1]
        if token not in ends and not last:
            going.append((parent, token, value))
        elif rank < width and token in ends:
            keep(group, value, parent.new, 1, "stop")
        elif rank < width:
            keep(group, value, [*parent.new, token], 0, "length")
    if last or not going:
        return finish(engine, group)
    going = going[:width]
    best = going[0][2] / (len(live[0].new) + 1) ** o.length_penalty
    if len(group.finished) >= width and best <= group.finished[-1][0]:
        return finish(engine, group)
    parents = [parent for parent, _, _ in going]
    children = []
    for i, (parent, token, value) in enumerate(going):
        child = parent
        if parent in parents[i + 1 :]:  # the last child goes on in its parent's place
            child = engine.scheduler.fork(parent, len(group.sequences))
            child.chooser = parent.chooser.copy()
            group.sequences.append(child)
        children.append((child, token, value))
    for s in live:
        if s not in parents:
            end(engine, s)
    for child, token, value in children:
        child.tokens.append(token)
        child.chooser.accept(token)
        child.logprob = value
    return []


def keep(group: Group, value: float, tokens: list[int], end: int, reason: str) -> None:
    """A finished beam; the best `beam_width` are remembered."""
    o = group.request.sampling
    group.finished.append((value / (len(tokens) + end) ** o.length_penalty, list(tokens), reason))
    group.finished.sort(key=lambda beam: -beam[0])
    del group.finished[o.beam_width :]


def finish(engine: Engine, group: Group) -> list[tuple[Group, Output]]:
    for s in group.live:
        end(engine, s)
    engine.groups.pop(group, None)
    pieces = []
    for i, (_, tokens, reason) in enumerate(group.finished[: group.request.sampling.n]):
        out = Output(i, token_ids=tokens, finish_reason=reason, cached_tokens=group.cached_tokens)
        out.prompt_logprobs = group.prompt_logprobs if not i else None
        text = engine.text(group)
        if text is not None:
            out.text = "".join(text.push(t) for t in tokens if text.stopped is None)
            out.text += "" if text.stopped is not None else text.flush()
            if text.stopped is not None:
                out.finish_reason, out.stop_reason = "stop", text.stopped
        engine.new_tokens += len(tokens)
        pieces.append((group, out))
    return pieces


def end(engine: Engine, s: Sequence) -> None:
    s.finish_reason = "stop"
    engine.scheduler.remove(s)
