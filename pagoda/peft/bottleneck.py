"""Bottleneck adapters: a small MLP added to what attention or the MLP of a layer gives to the residual stream.

Behind it, y + up(act(down(y))): after both (Houlsby et al. 2019) or after the MLP (Pfeiffer et al. 2020). Beside it,
y + scale * up(act(down(x))) (He et al. 2022). `up` starts at zero, so that the model starts as it was.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagoda.peft import adapter
from pagoda.peft.options import Houlsby


class Bottleneck(nn.Module):
    """down (size, n_embd) and up (n_embd, size), with biases; hangs on a module as a hook on its result."""

    def __init__(self, n_embd: int, o: Houlsby, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.parallel, self.scale = o.parallel, getattr(o, "scale", 1.0)
        self.act, self.dropout = getattr(F, o.activation), o.dropout
        self.down = nn.Linear(n_embd, o.size, dtype=dtype, device=device)
        self.up = nn.Linear(o.size, n_embd, dtype=dtype, device=device)
        nn.init.normal_(self.down.weight, std=0.02)
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)

    def hook(self, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        x = args[0] if self.parallel else y
        inner = self.act(F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype)))
        inner = F.dropout(inner, self.dropout, self.training) * self.scale
        return y + F.linear(inner, self.up.weight.to(x.dtype), self.scale * self.up.bias.to(x.dtype))


class Method(adapter.Method):
    def attach(self, dtype: torch.dtype, tensors: dict[str, Tensor] | None) -> None:
        o: Houlsby = self.options
        name = o.peft_type.lower()
        self.bottlenecks: dict[str, Bottleneck] = {}
        for i, block in enumerate(self.model.layers):
            for place in o.places:
                module = getattr(block, place)
                bottleneck = Bottleneck(self.model.config.n_embd, o, dtype, self.model.device)
                module.add_module(name, bottleneck.train(self.model.training))
                module.register_forward_hook(bottleneck.hook)
                self.bottlenecks[f"layers.{i}.{place}.{name}"] = bottleneck

    def named(self) -> dict[str, Tensor]:
        return {f"{path}.{n}": p for path, b in self.bottlenecks.items() for n, p in b.named_parameters()}
