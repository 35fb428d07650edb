"""The norm of all gradients together, and scaling them down to it (Pascanu et al. 2013)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pagoda.ops import cpu

PIECE = 2**18  # elements that the reference converts to float32 at a time, so that the copy stays in the cache


@torch.no_grad()
def norm_of(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all elements together, of any shape and type (sharded tensors whole); sums are float32 or wider."""
    squares, norms, tensors = torch.zeros((), dtype=torch.float64), [], list(tensors)
    if tensors and all(type(x) is Tensor and x.is_cuda for x in tensors):
        norms, tensors = torch._foreach_norm(tensors, 2, torch.float32), []
    for x in tensors:
        if _kernel_takes(x):
            cpu.kernels.square_sum(squares.data_ptr(), x.data_ptr(), x.numel(), cpu.DTYPE[x.dtype])  # adds to it
        else:
            norms.append(_norm(x))
    rest = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
    return math.hypot(math.sqrt(squares), rest)


@torch.no_grad()
def scale_(tensors: Iterable[Tensor], factor: float) -> None:
    """Every tensor times a factor, in place."""
    tensors = list(tensors)
    if all(type(x) is Tensor and x.is_cuda for x in tensors):
        torch._foreach_mul_(tensors, factor)
        return
    for x in tensors:
        if _kernel_takes(x):
            cpu.kernels.scale(x.data_ptr(), x.numel(), cpu.DTYPE[x.dtype], factor)
        else:
            x.mul_(factor)


def _norm(x: Tensor) -> Tensor:
    """0-dimensional, float32."""
    if hasattr(x, "full_tensor"):
        return torch.linalg.vector_norm(x, dtype=torch.float32).full_tensor()
    pieces = x.flatten().split(PIECE)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p, dtype=torch.float32) for p in pieces]))


def _kernel_takes(x: Tensor) -> bool:
    return cpu.usable(x) and x.dtype in cpu.FLOATS and x.is_contiguous()
