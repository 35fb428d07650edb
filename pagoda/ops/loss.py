"""Cross-entropy of a linear head, computed chunk by chunk so that the logits of all tokens never exist at once."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from pagoda.common import trim_heap
from pagoda.ops import cpu
from pagoda.ops.formats import PackedWeight
from pagoda.ops.linear import linear, linear_transposed, multiplies, multiply, product_dtype

IGNORE = -100  # the target of a token that is not scored (PyTorch's own convention)
CHUNK_BYTES = 2048  # of a column of logits: what a chunk of rows has
BLOCK = 2048  # rows of the head, or of its gradient, that are cast at a time
LARGE = 2**24  # bytes of logits before which the heap's holes are given back
PIECE = 64  # rows of logits that the reference works on in float32


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 0,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, targets, reduction="none")` in float32, with gradients.

    hidden (N, n_embd), weight (vocab_size, n_embd), targets (N,) int64, -100 where nothing is scored. A packed weight
    takes no gradient. z_loss adds `z_loss * logsumexp(logits)^2` per scored token (Chowdhery et al. 2022, "PaLM").
    Returns (N,) float32: the loss per token in nats, 0 where nothing is scored. At most `chunk` rows of logits exist at
    a time, in hidden's dtype (0: 1,024, but 512 of float32).

    Where gradients are wanted, they are computed while the logits are there (as Liger Kernel does, Hsu et al. 2024),
    for a loss that is the sum over tokens; the way back scales them. If it turns out that tokens weigh differently in
    the loss, the head's gradients are computed again.
    """
    chunk = chunk or CHUNK_BYTES // hidden.element_size()
    if torch.compiler.is_compiling():
        return _reference(hidden, weight, targets, bias, softcap, z_loss, chunk)
    if not torch.is_grad_enabled():  # the same way: it never has a chunk of logits twice, or in float32
        return _with_gradients(hidden, weight, targets, bias, None, (False,) * 4, softcap, z_loss, chunk)[0]
    return _LinearCrossEntropy.apply(hidden, weight, targets, bias, softcap, z_loss, chunk)


def _reference(hidden, weight, targets, bias, softcap, z_loss, chunk) -> Tensor:
    """The definition. With gradients (`torch.compile`) each chunk's logits are computed again on the way back."""

    def losses(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = linear(hidden, weight, bias).float()
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        normalizer = logits.logsumexp(-1)
        picked = logits.gather(1, targets.masked_fill(targets == IGNORE, 0)[:, None])[:, 0]
        return torch.where(targets == IGNORE, 0.0, normalizer - picked + z_loss * normalizer.square())

    parts = zip(hidden.split(chunk), targets.split(chunk))
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(losses, h, t, use_reentrant=False) for h, t in parts])
    return torch.cat([losses(h, t) for h, t in parts])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, softcap, z_loss, chunk):
        ctx.packed = weight if isinstance(weight, PackedWeight) else None
        ctx.save_for_backward(hidden, None if ctx.packed else weight, targets, bias)
        ctx.options = softcap, z_loss, chunk
        losses, ctx.grads = _with_gradients(hidden, weight, targets, bias, None, ctx.needs_input_grad, *ctx.options)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        hidden, weight, targets, bias = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if upstream.stride(0) == 0 and len(upstream):  # one number for all, which nobody has to look at
            factor, uniform = upstream[0], True
        else:
            scored = upstream[targets != IGNORE]
            factor = float(scored[0]) if len(scored) else 1.0
            uniform = bool((scored == factor).all())
        if grads is None or not uniform:  # a second way back, or tokens that weigh differently
            weight = ctx.packed or weight
            _, grads = _with_gradients(hidden, weight, targets, bias, upstream, ctx.needs_input_grad, *ctx.options)
            factor = 1.0
        d_hidden, d_weight, d_bias = (None if g is None else g.mul_(factor) for g in grads)
        return d_hidden, d_weight, None, d_bias, None, None, None


def _with_gradients(hidden, weight, targets, bias, upstream, needed, softcap, z_loss, chunk):
    """(losses, gradients of hidden, weight and bias), for tokens that weigh `upstream` (N,), or 1 each.

    Accumulates in float32, but the gradient of a weight that meets only one chunk, which is rounded once. Of what is
    not `needed` (one truth for each) there is none.
    """
    if hidden.is_cpu and min(len(hidden), chunk) * weight.shape[0] * hidden.element_size() > LARGE:
        trim_heap()  # a training step is at its peak here
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    d_hidden = torch.zeros_like(hidden) if needed[0] else None
    d_weight = d_bias = None
    if needed[1]:
        once = 0 < len(hidden) <= chunk
        d_weight = torch.empty_like(weight) if once else torch.zeros_like(weight, dtype=torch.float32)
    if needed[3]:
        d_bias = torch.zeros_like(bias, dtype=torch.float32)
    dtype = product_dtype(hidden)
    for i in range(0, len(hidden), chunk):
        rows = slice(i, i + chunk)
        h = hidden[rows]
        d = _logits(h, weight, bias)
        _softmax(losses[rows], d, targets[rows], softcap, z_loss)
        if upstream is not None:
            d *= upstream[rows, None]
        d_h = None
        for block in _blocks(h, weight):
            part = d[:, block].to(dtype)
            if d_hidden is not None:
                back = linear_transposed(part, weight if isinstance(weight, PackedWeight) else weight[block])
                d_h = back if d_h is None else d_h + back
            if d_weight is not None:
                _add_product(d_weight[block], part.T, h.to(dtype), 0 if once else 1)
            if d_bias is not None:
                d_bias[block] += part.sum(0, dtype=torch.float32)
        if d_hidden is not None:
            d_hidden[rows] = d_h
        del d, part  # before the next chunk's come
    grads = d_hidden, d_weight, d_bias
    wanted = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    return losses, [None if g is None else g.to(w) for g, w in zip(grads, wanted)]


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """`total = beta * total + a @ b` for a beta of 0 or 1, in pieces where the types differ: PyTorch's sum of two types
    makes a copy of the second."""
    if total.dtype == a.dtype and not beta and total.is_contiguous() and multiplies(a, b):
        multiply(a, b, out=total)
    elif total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)  # what stands in `total` is not read for a beta of 0
    else:
        for rows, piece in zip(total.split(BLOCK), a.split(BLOCK)):
            rows.add_(piece @ b) if beta else rows.copy_(piece @ b)


def _blocks(hidden: Tensor, weight: Tensor | PackedWeight) -> Iterator[slice]:
    """The vocabulary in parts: one, unless the weight has to be cast for its products."""
    n = weight.shape[0]
    step = BLOCK if cpu.emulates(hidden) and not isinstance(weight, PackedWeight) else n
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _logits(hidden: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, PackedWeight) or not cpu.emulates(hidden):
        return linear(hidden, weight, bias)
    logits = hidden.new_empty(len(hidden), weight.shape[0])
    for block in _blocks(hidden, weight):
        logits[:, block] = linear(hidden, weight[block], None if bias is None else bias[block])
    return logits


def _softmax(losses: Tensor, logits: Tensor, targets: Tensor, softcap: float, z_loss: float) -> None:
    """Writes each row's loss, and over its logits the gradient of that loss."""
    if cpu.usable(logits) and logits.dtype in cpu.FLOATS and logits.is_contiguous():
        targets = targets.long().contiguous()
        tensors = cpu.pointers(losses, logits, targets)
        cpu.kernels.cross_entropy(*tensors, *logits.shape, cpu.DTYPE[logits.dtype], IGNORE, softcap, z_loss)
        return
    piece = PIECE if logits.is_cpu else max(len(logits), 1)
    for loss, rows, target in zip(losses.split(piece), logits.split(piece), targets.split(piece)):
        scored = (target != IGNORE)[:, None]
        x, index = rows, target[:, None].masked_fill(~scored, 0)
        if softcap:
            t = torch.tanh(rows.float() / softcap)
            x = softcap * t
        lse = x.float().logsumexp(-1, keepdim=True) if z_loss else 0.0
        d = x.log_softmax(-1, torch.float32)
        loss.copy_(torch.where(scored, z_loss * lse**2 - d.gather(1, index), 0.0)[:, 0])
        d.exp_().mul_(1 + 2 * z_loss * lse) if z_loss else d.exp_()
        d.scatter_(1, index, d.gather(1, index) - 1)
        if softcap:
            d *= 1 - t.square()
        torch.mul(d, scored, out=rows)
