"""What an optimizer does to all parameters or gradients together: their norm, scaling them down to it (Pascanu et al.
2013), and a step of AdamW. On a CPU ops/cpu/optim.cpp takes a whole list at once."""

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
        norms, tensors = [*torch._foreach_norm(tensors, 2, torch.float32)], []
    lists, rest = _for_kernel(tensors)
    for dtype, xs in lists.items():
        cpu.kernels.square_sum(squares.data_ptr(), cpu.pointers(*xs), [x.numel() for x in xs], cpu.DTYPE[dtype])
    norms += [_norm(x) for x in rest]
    others = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
    return math.hypot(math.sqrt(squares), others)


@torch.no_grad()
def scale_(tensors: Iterable[Tensor], factor: float) -> None:
    """Every tensor times a factor, in place."""
    tensors = list(tensors)
    if all(type(x) is Tensor and x.is_cuda for x in tensors):
        torch._foreach_mul_(tensors, factor)
        return
    lists, rest = _for_kernel(tensors)
    for dtype, xs in lists.items():
        cpu.kernels.scale(cpu.pointers(*xs), [x.numel() for x in xs], cpu.DTYPE[dtype], factor)
    for x in rest:
        x.mul_(factor)


Adam = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # parameter, gradient, averages of it and of its square, step


def adamw_takes(tensors: list[Adam]) -> bool:
    """Whether there is a kernel for `adamw_`: all on a CPU, the first four of one type."""
    lists, rest = _for_kernel([t for own in tensors for t in own[:4]])
    return not rest and len(lists) <= 1 and all(own[4].is_cpu for own in tensors)


def adamw_(tensors: list[Adam], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """A step of AdamW (Loshchilov and Hutter 2019) in place, as PyTorch's fused one, in float32 whatever the type.
    `step` is a float32 number that counts up. bf16 is rounded up or down by chance, in proportion (Gupta et al. 2015,
    "Deep Learning with Limited Numerical Precision"): rounded to the nearest, most steps of a weight would be lost, and
    the average of the squares would not shrink. The chance is a function of step and place: the same in every run."""
    if tensors:
        lists, sizes = [cpu.pointers(*ts) for ts in zip(*tensors)], [own[0].numel() for own in tensors]
        cpu.kernels.adamw(*lists, sizes, cpu.DTYPE[tensors[0][0].dtype], lr, *betas, eps, weight_decay)


def _norm(x: Tensor) -> Tensor:
    """0-dimensional, float32."""
    if hasattr(x, "full_tensor"):
        return torch.linalg.vector_norm(x, dtype=torch.float32).full_tensor()
    pieces = x.flatten().split(PIECE)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p, dtype=torch.float32) for p in pieces]))


def _for_kernel(tensors: list[Tensor]) -> tuple[dict[torch.dtype, list[Tensor]], list[Tensor]]:
    """Those that a kernel takes, by type, and the others."""
    lists, rest = {}, []
    for x in tensors:
        takes = type(x) is Tensor and x.is_cpu and x.dtype in cpu.FLOATS and x.is_contiguous()
        (lists.setdefault(x.dtype, []) if takes and cpu.kernels is not None else rest).append(x)
    return lists, rest
