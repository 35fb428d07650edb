"""Activation functions by the field's names, and the gated product of SwiGLU-like MLPs (Shazeer 2020)."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from pagoda.ops import cpu

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
    if cpu.usable(x) and x.dtype in cpu.FLOATS:
        return _kernel(x, None, act)
    return ACTIVATIONS[act](x)


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """`act(gate) * up`, both (..., intermediate_size)."""
    if cpu.usable(gate) and gate.dtype in cpu.FLOATS and up.dtype == gate.dtype and up.shape == gate.shape:
        return _kernel(gate, up, act)
    return ACTIVATIONS[act](gate) * up


def _kernel(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    y = gate.new_empty(gate.shape)
    gate, n_rows, stride = cpu.rows(gate)
    up, _, up_stride = (None, 0, 0) if up is None else cpu.rows(up)
    cpu.kernels.gated(
        y.data_ptr(),
        gate.data_ptr(),
        cpu.pointer(up),
        n_rows,
        gate.shape[-1],
        stride,
        up_stride,
        cpu.DTYPE[gate.dtype],
        _KERNELS[act],
    )
    return y
