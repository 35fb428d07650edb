"""Activation functions by the field's names, and the gated product of SwiGLU-like MLPs (Shazeer 2020)."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
}
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
    return ACTIVATIONS[act](x)


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """`act(gate) * up`, both (..., intermediate_size)."""
    return ACTIVATIONS[act](gate) * up
