"""RMS and layer norm, alone or with the residual added first: statistics in float32, results in x's dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Root mean square norm over the last dimension (Zhang & Sennrich 2019): `x / rms(x) * (offset + weight)`.

    x (..., n), weight (n,). `offset` is 1 for the Gemma families, whose weights are stored around zero.
    """
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * (weight.float() + offset)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension (Ba et al. 2016). x (..., n), weight and bias (n,)."""
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """The residual step and the norm after it: `(x + delta, rms_norm(x + delta))`."""
    x = x + delta
    return x, rms_norm(x, weight, eps, offset)


def add_layer_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The residual step and the norm after it: `(x + delta, layer_norm(x + delta))`."""
    x = x + delta
    return x, layer_norm(x, weight, bias, eps)
