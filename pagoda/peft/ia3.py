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
        if tensors is not None:
            inside = {k.removesuffix(".ia3_l"): len(t) == 1 for k, t in tensors.items()}
        else:
            inside = self.choose(linears(self.model))
        self.wear(inside, lambda name, base: IA3Linear(base, inside[name], dtype))

    def choose(self, paths: dict[str, str]) -> dict[str, bool]:
        """The layers that the options mean, and whether each is scaled at its input."""
        o: IA3 = self.options
        ours = ("k_proj", "v_proj", "qkv_proj", "down_proj")
        names = (
            matching(self.model, o.targets) if o.targets else [n for n, path in paths.items() if path.endswith(ours)]
        )
        if o.feedforward:
            inside = set(matching(self.model, o.feedforward))
        else:
            inside = {n for n in names if paths[n].endswith("down_proj")}
        return {name: name in inside for name in names}

    def config(self) -> dict[str, Any]:
        inside = [name for name, layer in self.layers.items() if layer.feedforward]
        return {**super().config(), "feedforward_modules": shortest(self.model, inside) if inside else []}
