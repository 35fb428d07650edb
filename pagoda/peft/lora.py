"""LoRA (Hu et al. 2021): a linear layer's result plus (alpha / rank) B A x, with the layer itself frozen.

rsLoRA scales by alpha / sqrt(rank). DoRA (Liu et al. 2024) gives every row of W + B A a learned length. LoRA+ trains B
faster. Over packed weights it is QLoRA: gradients flow through the base's own bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagoda.models.layers import Linear
from pagoda.ops.formats import PackedWeight
from pagoda.ops.linear import linear
from pagoda.peft.adapter import LinearMethod, Worn, matching
from pagoda.peft.options import LoRA


class LoRALinear(Worn):
    """A Linear with an update: lora_A (rank, n_in), lora_B (n_out, rank), for DoRA lora_magnitude_vector (n_out,)."""

    def __init__(self, base: Linear, rank: int, scale: float, dropout: float, dora: bool, dtype: torch.dtype):
        super().__init__(base)
        self.scale, self.dropout = scale, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, self.n_in, dtype=dtype, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.n_out, rank, dtype=dtype, device=self.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_magnitude_vector = None
        if dora:
            self.register_buffer("squares", squares_of_rows(self.weight), persistent=False)
            self.lora_magnitude_vector = nn.Parameter(self.squares.sqrt().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)
        drops = self.training and self.dropout > 0
        inner = F.dropout(x, self.dropout) if drops else x
        low = linear(inner, self.lora_A.to(x.dtype)) * self.scale
        if self.lora_magnitude_vector is None:
            return linear(low, self.lora_B.to(x.dtype), None, y)
        if drops:
            base = linear(inner, self.weight)
        else:
            base = y if self.bias is None else y - self.bias.to(x.dtype)
        factor = (self.lora_magnitude_vector / self.lengths()).to(x.dtype)
        return y + (factor - 1) * base + factor * linear(low, self.lora_B.to(x.dtype))

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """(n_out,) float32: the norms of the rows of W + scale B A, without ever making that matrix."""
        a, b = self.lora_A.float(), self.lora_B.float() * self.scale
        cross = linear(a.to(self.weight.dtype), self.weight).float().T  # W A^T
        return (self.squares + ((2 * cross + b @ (a @ a.T)) * b).sum(1)).clamp_min(0).sqrt()

    def own(self) -> dict[str, Tensor]:
        own = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
        if self.lora_magnitude_vector is not None:
            own["lora_magnitude_vector"] = self.lora_magnitude_vector
        return own

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = weight + self.scale * self.lora_B.float() @ self.lora_A.float()
        if self.lora_magnitude_vector is not None:
            weight *= (self.lora_magnitude_vector.float() / weight.norm(dim=1))[:, None]
        return weight, bias


def squares_of_rows(weight: Tensor | PackedWeight) -> Tensor:
    """(n_out,) float32: the squared norm of every row."""
    if isinstance(weight, PackedWeight):
        return torch.cat([part.square().sum(1) for _, part in weight.chunks()])
    return torch.cat([part.detach().float().square().sum(1) for part in weight.split(1024)])


class Method(LinearMethod):
    def attach(self, dtype: torch.dtype, tensors: dict[str, Tensor] | None) -> None:
        o: LoRA = self.options
        if tensors is None:
            ranks = dict.fromkeys(matching(self.model, o.targets), o.rank)
        else:
            ranks = {
                k.removesuffix(".lora_A.weight"): len(t) for k, t in tensors.items() if k.endswith("lora_A.weight")
            }

        def make(name: str, base: Linear) -> LoRALinear:
            scale = o.alpha / (math.sqrt(ranks[name]) if o.rslora else ranks[name])
            return LoRALinear(base, ranks[name], scale, o.dropout, o.dora, dtype)

        self.wear(ranks, make)

    def lr_scale(self, name: str) -> float:
        return self.options.plus_ratio if name.endswith(".lora_B") else 1.0

    def config(self) -> dict[str, Any]:
        ranks = {name: len(layer.lora_A) for name, layer in self.layers.items()}
        pattern = {name: rank for name, rank in ranks.items() if rank != self.options.rank}
        config = {**super().config(), "rank_pattern": pattern, "bias": "none"}
        return {name: value for name, value in config.items() if name != "plus_ratio"}  # an unknown name to PEFT
