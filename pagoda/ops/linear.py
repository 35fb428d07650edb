"""The product with a weight matrix, and the lookup of its rows."""

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: x (..., n_in), weight (n_out, n_in)."""
    return F.linear(x, weight, bias)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight (n_rows, n) by ids (N,) int64: (N, n)."""
    return F.embedding(ids, weight)
