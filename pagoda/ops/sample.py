"""The draw of a token from scores: temperature, top-k, top-p (nucleus, Holtzman et al. 2020), min-p.

On a CPU ops/cpu/sample.cpp computes it, from the same random numbers; a row's token depends on its own row alone.
"""

import torch
from torch import Tensor

from pagoda.ops import cpu


def sample(scores: Tensor, options: Tensor) -> Tensor:
    """(R,) int64: a token of each row of scores (R, n).

    options (R, 5) float32 on the CPU: temperature (0 takes the largest score), top_k (0: all), top_p (1: all), min_p (a
    share of the largest probability), chance (in [0, 1): which token, counted by probability).
    """
    if cpu.usable(scores) and scores.dtype in cpu.FLOATS and scores.stride(1) == 1:
        tokens = torch.empty(len(scores), dtype=torch.int64)
        sizes, options = (*scores.shape, scores.stride(0)), options.contiguous()
        cpu.kernels.sample(*cpu.pointers(tokens, scores, options), *sizes, cpu.FLOATS[scores.dtype])
        return tokens
    tokens = scores.max(-1).indices  # a quarter of argmax's time
    temperature, top_k, top_p, _, _ = options.T
    drawn, tops = temperature > 0, ((top_k > 0) & (top_k < scores.shape[1])) | (top_p < 1)
    for rows in (drawn & ~tops, drawn & tops):  # a draw from all tokens needs no order
        if rows.any():
            where = rows.nonzero()[:, 0].to(scores.device)
            tokens[where] = _draw(scores[where].float(), options[rows].to(scores.device), bool((rows & tops).any()))
    return tokens


def _draw(scores: Tensor, options: Tensor, tops: bool) -> Tensor:
    temperature, top_k, top_p, min_p, chance = options.T[..., None]
    probs = (scores / temperature).softmax(-1)
    probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0) if not tops else probs
    order = None
    if tops:
        full = probs.amax(-1, keepdim=True)
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        places = torch.arange(probs.shape[1], device=probs.device)
        kept = probs.masked_fill((top_k > 0) & (places >= top_k), 0.0)
        whole = torch.where(top_k > 0, kept.sum(-1, keepdim=True), 1.0)  # of which top_p is a share
        probs = kept.masked_fill((kept.cumsum(-1) - kept >= top_p * whole) & (places > 0), 0.0)
        probs = probs.masked_fill(probs < min_p * full, 0.0)
    sums = probs.cumsum(-1)
    last = sums[:, -1:]
    target = torch.minimum(chance * last, torch.nextafter(last, torch.zeros_like(last)))
    places = torch.searchsorted(sums, target, right=True)
    places.masked_fill_(places == probs.shape[1], 0)  # where scores are not numbers
    return (places if order is None else order.gather(1, places))[:, 0]
