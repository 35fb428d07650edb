"""The modules that blocks are made of. They hold parameters; the arithmetic is in `pagoda.ops`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pagoda.ops.activations import activation, gated
from pagoda.ops.formats import PackedWeight, pack
from pagoda.ops.linear import embedding, linear, linear_many
from pagoda.ops.moe import moe, route
from pagoda.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm


class Linear(nn.Module):
    """`x @ weight.T + bias`: weight (n_out, n_in), a Parameter or a PackedWeight."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__()
        self.n_in, self.n_out = n_in, n_out
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.n_in}, {self.n_out}, bias={self.bias is not None}"


def linear_together(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """`[layer(x) for layer in layers]`; packed weights of plain Linears go through one call of the kernel."""
    if all(type(p) is Linear and isinstance(p.weight, PackedWeight) and p.bias is None for p in layers):
        return linear_many(x, [p.weight for p in layers])
    return [p(x) for p in layers]


class Embedding(nn.Module):
    """Rows of weight (n_rows, n_embd) by index, times a scale; the weight is a Parameter or a PackedWeight."""

    def __init__(self, n_rows: int, n_embd: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(n_rows, n_embd))

    def forward(self, ids: Tensor) -> Tensor:
        x = embedding(ids, self.weight)
        if self.scale == 1.0:
            return x
        return x * torch.tensor(self.scale, dtype=x.dtype)  # rounded to x's dtype first, as Gemma was trained


class RMSNorm(nn.Module):
    """`norm(x)`, or with a residual step `norm(x, delta)`, which returns (x + delta, norm(x + delta))."""

    def __init__(self, n: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(n))

    def forward(self, x: Tensor, delta: Tensor | None = None):
        if delta is None:
            return rms_norm(x, self.weight, self.eps, self.offset)
        return add_rms_norm(x, delta, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """`norm(x)`, or with a residual step `norm(x, delta)`, which returns (x + delta, norm(x + delta))."""

    def __init__(self, n: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(n))
        self.bias = nn.Parameter(torch.empty(n))

    def forward(self, x: Tensor, delta: Tensor | None = None):
        if delta is None:
            return layer_norm(x, self.weight, self.bias, self.eps)
        return add_layer_norm(x, delta, self.weight, self.bias, self.eps)


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` (SwiGLU, GeGLU; Shazeer 2020), gate and up in weights of their own."""

    def __init__(self, n_embd: int, intermediate_size: int, act: str, bias: bool):
        super().__init__()
        self.act = act
        self.gate_proj = Linear(n_embd, intermediate_size, bias)
        self.up_proj = Linear(n_embd, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, n_embd, bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linear_together(x, self.gate_proj, self.up_proj)
        return self.down_proj(gated(gate, up, self.act))


class FusedGatedMLP(nn.Module):
    """The same with gate and up in one weight, the gate's rows first (Phi-3)."""

    def __init__(self, n_embd: int, intermediate_size: int, act: str, bias: bool):
        super().__init__()
        self.act = act
        self.gate_up_proj = Linear(n_embd, 2 * intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, n_embd, bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(gated(gate, up, self.act))


class PlainMLP(nn.Module):
    """`down(act(up(x)))`."""

    def __init__(self, n_embd: int, intermediate_size: int, act: str, bias: bool):
        super().__init__()
        self.act = act
        self.up_proj = Linear(n_embd, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, n_embd, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(activation(self.up_proj(x), self.act))


class MoE(nn.Module):
    """A sparse mixture of gated MLPs behind a router.

    The experts' weights are stacked, (n_expert, rows, columns); packed ones are a list of PackedWeights.
    """

    def __init__(self, n_embd: int, intermediate_size: int, act: str, n_expert: int, top_k: int, normalize: bool):
        super().__init__()
        self.act, self.top_k, self.normalize = act, top_k, normalize
        self.router = Linear(n_embd, n_expert)
        self.gate_up = nn.Parameter(torch.empty(n_expert, 2 * intermediate_size, n_embd))
        self.down = nn.Parameter(torch.empty(n_expert, n_embd, intermediate_size))

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = route(self.router(x), self.top_k, self.normalize)
        return moe(x, self.gate_up, self.down, weights, experts, self.act)


def set_weight(module: nn.Module, name: str, weight: Tensor | PackedWeight | nn.ModuleList) -> None:
    """Give a module another weight under the same name, whatever kind it had before."""
    if hasattr(module, name):
        delattr(module, name)
    setattr(module, name, weight)


def pack_stack(weight: Tensor, format: str) -> nn.ModuleList:
    """Stacked experts (n_expert, rows, columns) as one PackedWeight each."""
    return nn.ModuleList(pack(expert, format) for expert in weight)


def dense(weight: Tensor | PackedWeight | nn.ModuleList, dtype: torch.dtype | None = None) -> Tensor:
    """A weight as a plain tensor: packed ones are dequantized."""
    if isinstance(weight, nn.ModuleList):
        return torch.stack([dense(w, dtype) for w in weight])
    if isinstance(weight, PackedWeight):
        return weight.dequantize(dtype or weight.dtype)
    return weight.full_tensor().detach() if hasattr(weight, "full_tensor") else weight.detach()  # from its shards


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor | PackedWeight | nn.ModuleList]]:
    """(name, weight) of every parameter, packed weights as one each; a shared one comes under each of its names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if is_packed(module):
            continue
        packed = [(name, child) for name, child in module.named_children() if is_packed(child)]
        for name, weight in [*module._parameters.items(), *packed]:
            if weight is not None:
                yield f"{prefix}.{name}" if prefix else name, weight


def is_packed(module: nn.Module) -> bool:
    """A PackedWeight, or a stack of them."""
    if isinstance(module, nn.ModuleList):
        return len(module) > 0 and isinstance(module[0], PackedWeight)
    return isinstance(module, PackedWeight)


def n_elements(weight: Tensor | PackedWeight | nn.ModuleList) -> int:
    """How many numbers a weight stands for, in whatever form."""
    return sum(map(n_elements, weight)) if isinstance(weight, nn.ModuleList) else weight.shape.numel()
