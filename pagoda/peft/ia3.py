"""IA3 (Liu et al. 2022): learned factors for the channels of keys, values and the MLP's inside, 1 at the start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pagoda.models.layers import Linear
from pagoda.ops.linear import linear
from pagoda.peft.adapter import LinearMethod, Worn, linears, matching, shortest
from pagoda.peft.options import IA3


class IA3Linear(Worn):
    """A Linear whose result, or whose input with `feedforward`, is multiplied by ia3_l: (n_out, 1) or (1, n_in)."""

    def __init__(self, base: Linear, feedforward: bool, dtype: torch.dtype):
        super().__init__(base)
        self.feedforward = feedforward
        shape = (1, self.n_in) if feedforward else (self.n_out, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=dtype, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        factor = self.ia3_l.flatten().to(x.dtype)
        if self.feedforward:
            return linear(x * factor, self.weight, self.bias)
        return linear(x, self.weight, self.bias) * factor

    def own(self) -> dict[str, Tensor]:
        return {"ia3_l": self.ia3_l}

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scales_bias = bias is not None and not self.feedforward
        return weight * self.ia3_l.float(), bias * self.ia3_l.float().flatten() if scales_bias else bias


class Method(LinearMethod):
    def attach(self, dtype: torch.dtype, tensors: dict[str, Tensor] | None) -> None:
        o: IA3 = self.options
        paths = linears(self.model)
        if not o.targets:
            ours = ("k_proj", "v_proj", "qkv_proj", "down_proj")
            o.targets = ",".join(n for n, path in paths.items() if path.endswith(ours))
        if not o.feedforward:
            o.feedforward = ",".join(n for n in matching(self.model, o.targets) if paths[n].endswith("down_proj"))
        names = matching(self.model, o.targets)
        if tensors is not None:
            names = [k.removesuffix(".ia3_l") for k in tensors]
        inside = set(matching(self.model, o.feedforward)) if o.feedforward else set()
        self.wear(names, lambda name, base: IA3Linear(base, name in inside, dtype))

    def config(self) -> dict[str, Any]:
        inside = [name for name, layer in self.layers.items() if layer.feedforward]
        return {**super().config(), "feedforward_modules": shortest(self.model, inside) if inside else []}
