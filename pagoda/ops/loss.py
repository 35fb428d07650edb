"""Cross-entropy of a linear head, computed chunk by chunk so that the logits of all tokens never exist at once."""

import torch
from torch import Tensor

from pagoda.ops.formats import PackedWeight
from pagoda.ops.linear import linear, linear_transposed

IGNORE = -100  # the target of a token that is not scored (PyTorch's own convention)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    chunk: int = 1024,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, targets, reduction="none")` in float32, with gradients.

    hidden (N, n_embd), weight (vocab_size, n_embd), targets (N,) int64, -100 where nothing is scored. A packed weight
    takes no gradient.
    Returns (N,) float32: the loss per token in nats, 0 where nothing is scored. At most `chunk` rows of logits exist
    at a time, also in the backward pass, which computes them again (as in "Cut your losses", Wijmans et al. 2024).
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, bias, softcap, chunk)


def _logits(hidden: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, softcap: float) -> Tensor:
    logits = linear(hidden, weight, bias).float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, softcap, chunk):
        losses, normalizers = [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logits = _logits(h, weight, bias, softcap)
            normalizer = logits.logsumexp(-1)
            picked = logits.gather(1, t.clamp_min(0)[:, None])[:, 0]
            losses.append(torch.where(t == IGNORE, 0.0, normalizer - picked))
            normalizers.append(normalizer)
        if not losses:
            return hidden.new_zeros(0, dtype=torch.float32)
        ctx.packed = weight if isinstance(weight, PackedWeight) else None
        ctx.save_for_backward(hidden, None if ctx.packed else weight, targets, bias, torch.cat(normalizers))
        ctx.softcap, ctx.chunk = softcap, chunk
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, grad_loss):
        hidden, weight, targets, bias, normalizers = ctx.saved_tensors
        weight = ctx.packed or weight
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
        parts = [x.split(ctx.chunk) for x in (hidden, targets, normalizers, grad_loss)]
        for i, (h, t, normalizer, grad) in enumerate(zip(*parts)):
            logits = _logits(h, weight, bias, ctx.softcap)
            d = (logits - normalizer[:, None]).exp()  # the probabilities
            d.scatter_add_(1, t.clamp_min(0)[:, None], d.new_full((len(t), 1), -1.0))
            d *= torch.where(t == IGNORE, 0.0, grad)[:, None]
            if ctx.softcap:
                d *= 1 - (logits / ctx.softcap).square()
            if grad_bias is not None:
                grad_bias += d.sum(0)
            d = d.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[i * ctx.chunk : i * ctx.chunk + len(h)] = linear_transposed(d, weight)
            if grad_weight is not None:
                grad_weight += (d.T @ h).float()
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, None, grad_bias, None, None
