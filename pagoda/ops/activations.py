"""Activation functions by the field's names, and the gated product of SwiGLU-like MLPs (Shazeer 2020)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pagoda.ops import cpu
from pagoda.ops.recompute import made_by

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
}
_KERNELS = {name: i for i, name in enumerate(ACTIVATIONS)}  # their numbers in ops/cpu/activations.cpp
# What Hugging Face configurations call them.
HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "quick_gelu": "quick_gelu",
}


def activation(x: Tensor, act: str) -> Tensor:
    """`act(x)`, element by element."""
    if x.dtype in cpu.FLOATS and x.dim():
        if cpu.usable(x):
            return _kernel(x, None, act)
        if cpu.trains(x):
            return made_by(_Gated.apply(x, None, act), partial(activation, act=act), x)
    return ACTIVATIONS[act](x)


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """`act(gate) * up`, both (..., intermediate_size)."""
    if gate.dtype in cpu.FLOATS and up.dtype == gate.dtype and up.shape == gate.shape and gate.dim():
        if cpu.usable(gate):
            return _kernel(gate, up, act)
        if cpu.trains(gate):
            return made_by(_Gated.apply(gate, up, act), partial(gated, act=act), gate, up)
    y = ACTIVATIONS[act](gate)
    return y * up if torch.is_grad_enabled() else y.mul_(up)


def _kernel(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    y = gate.new_empty(gate.shape)
    gate, n_rows, stride = cpu.rows(gate)
    up, _, up_stride = (None, 0, 0) if up is None else cpu.rows(up)
    sizes = n_rows, gate.shape[-1], stride, up_stride
    cpu.kernels.gated(*cpu.pointers(y, gate, up), *sizes, cpu.DTYPE[gate.dtype], _KERNELS[act])
    return y


class _Gated(torch.autograd.Function):
    """The kernel and its way back; nothing is kept but the inputs."""

    @staticmethod
    def forward(ctx, gate, up, act):
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _kernel(gate, up, act)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad = grad.contiguous()
        d_gate, d_up = torch.empty_like(grad), None if up is None else torch.empty_like(grad)
        gate, n_rows, stride = cpu.rows(gate)
        up, _, up_stride = (None, 0, 0) if up is None else cpu.rows(up)
        tensors, sizes = cpu.pointers(d_gate, d_up, grad, gate, up), (n_rows, gate.shape[-1], stride, up_stride)
        cpu.kernels.gated_backward(*tensors, *sizes, cpu.DTYPE[gate.dtype], _KERNELS[ctx.act])
        return d_gate, d_up, None
