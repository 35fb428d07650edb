"""RMS and layer norm, alone or with the residual added first: statistics in float32, results in x's dtype."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pagoda.ops import cpu
from pagoda.ops.recompute import made_by


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Root mean square norm over the last dimension (Zhang & Sennrich 2019): `x / rms(x) * (offset + weight)`.

    x (..., n), weight (n,). `offset` is 1 for the Gemma families, whose weights are stored around zero.
    """
    if _kernel_takes(x, weight):
        return _kernel_norm(x, None, weight, None, eps, offset)[1]
    if _kernel_trains(x, weight):
        return _trained(x, None, weight, None, eps, offset)[1]
    if weight.dtype == x.dtype and not offset:
        return F.rms_norm(x, weight.shape, weight, eps)  # the same, by one call
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * (weight.float() + offset if offset else weight)).to(x.dtype)  # a product with float32 is float32


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension (Ba et al. 2016). x (..., n), weight and bias (n,)."""
    if _kernel_takes(x, weight):
        return _kernel_norm(x, None, weight, bias, eps, None)[1]
    if _kernel_trains(x, weight):
        return _trained(x, None, weight, bias, eps, None)[1]
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def add(x: Tensor, delta: Tensor) -> Tensor:
    """The residual step alone: `x + delta`, both (..., n)."""
    like = delta.shape == x.shape and delta.dtype == x.dtype and delta.is_contiguous()
    if like and cpu.usable(x) and x.dtype in cpu.FLOATS and x.is_contiguous():
        y = x.new_empty(x.shape)
        cpu.kernels.add(y.data_ptr(), x.data_ptr(), delta.data_ptr(), x.numel(), cpu.DTYPE[x.dtype])
        return y
    return x + delta


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """The residual step and the norm after it: `(x + delta, rms_norm(x + delta))`."""
    if _kernel_takes(x, weight) and delta.dtype == x.dtype and delta.shape == x.shape:
        return _kernel_norm(x, delta, weight, None, eps, offset)
    if _kernel_trains(x, weight) and delta.dtype == x.dtype and delta.shape == x.shape:
        return _trained(x, delta, weight, None, eps, offset)
    x = x + delta
    return x, rms_norm(x, weight, eps, offset)


def add_layer_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The residual step and the norm after it: `(x + delta, layer_norm(x + delta))`."""
    if _kernel_takes(x, weight) and delta.dtype == x.dtype and delta.shape == x.shape:
        return _kernel_norm(x, delta, weight, bias, eps, None)
    if _kernel_trains(x, weight) and delta.dtype == x.dtype and delta.shape == x.shape:
        return _trained(x, delta, weight, bias, eps, None)
    x = x + delta
    return x, layer_norm(x, weight, bias, eps)


# The same by ops/cpu/norm.cpp.


def _kernel_takes(x: Tensor, weight: Tensor) -> bool:
    return cpu.usable(x) and _fits(x, weight)


def _kernel_trains(x: Tensor, weight: Tensor) -> bool:
    return cpu.trains(x) and _fits(x, weight)


def _fits(x: Tensor, weight: Tensor) -> bool:
    kinds = x.dtype in cpu.FLOATS and weight.dtype in cpu.FLOATS
    return kinds and weight.shape == x.shape[-1:] and weight.is_contiguous()


def _kernel_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, offset: float | None
) -> tuple[Tensor | None, Tensor]:
    """(x + delta, its norm), or (None, the norm of x). RMS norm where offset is a number, else layer norm."""
    y, total, delta_stride = x.new_empty(x.shape), None, 0
    x, n_rows, stride = cpu.rows(x)
    if delta is not None:
        total = y.new_empty(y.shape)
        delta, _, delta_stride = cpu.rows(delta)
    bias = None if bias is None else bias.to(weight.dtype).expand(weight.shape).contiguous()
    layout = n_rows, x.shape[-1], stride, delta_stride, cpu.DTYPE[x.dtype], cpu.DTYPE[weight.dtype]
    if offset is None:
        cpu.kernels.layer_norm(*cpu.pointers(y, total, x, delta, weight, bias), *layout, eps)
    else:
        cpu.kernels.rms_norm(*cpu.pointers(y, total, x, delta, weight), *layout, eps, offset)
    return total, y


# The same under gradients.


class _Norm(torch.autograd.Function):
    """As `_kernel_norm`. What was normed is kept."""

    @staticmethod
    def forward(ctx, x, delta, weight, bias, eps, offset):
        total, y = _kernel_norm(x, delta, weight, bias, eps, offset)
        ctx.save_for_backward(x if delta is None else total, weight)
        ctx.options, ctx.fused, ctx.bias_dtype = (eps, offset), delta is not None, None if bias is None else bias.dtype
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad):
        x, weight = ctx.saved_tensors
        eps, offset = ctx.options
        grad = grad.contiguous()
        grad_total = grad_total.contiguous() if ctx.fused else None
        dx = torch.empty_like(grad)
        x, n_rows, stride = cpu.rows(x)
        d_weight, d_bias = (torch.empty_like(weight) if wanted else None for wanted in ctx.needs_input_grad[2:4])
        layout = n_rows, x.shape[-1], stride, cpu.DTYPE[x.dtype], cpu.DTYPE[weight.dtype]
        if offset is None:
            tensors = cpu.pointers(dx, d_weight, d_bias, grad, grad_total, x, weight)
            cpu.kernels.layer_norm_backward(*tensors, *layout, eps)
            d_bias = None if d_bias is None else d_bias.to(ctx.bias_dtype)
        else:
            tensors = cpu.pointers(dx, d_weight, grad, grad_total, x, weight)
            cpu.kernels.rms_norm_backward(*tensors, *layout, eps, offset)
        return dx, dx if ctx.fused else None, d_weight, d_bias, None, None


def _trained(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, offset: float | None
) -> tuple[Tensor | None, Tensor]:
    total, y = _Norm.apply(x, delta, weight, bias, eps, offset)
    x = x if delta is None else total
    if offset is None:
        return total, made_by(y, partial(layer_norm, eps=eps), x, weight, bias)
    return total, made_by(y, partial(rms_norm, eps=eps, offset=offset), x, weight)
