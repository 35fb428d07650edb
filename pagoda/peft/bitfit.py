"""BitFit (Ben Zaken et al. 2022): the biases train, nothing else. There is nothing to add, so nothing to merge."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pagoda.common import PagodaError
from pagoda.peft import adapter


class Method(adapter.Method):
    mergeable = True

    def attach(self, dtype: torch.dtype, tensors: dict[str, Tensor] | None) -> None:
        self.biases = train_leaves(self.model, "bias", dtype=dtype)
        if not self.biases:
            raise PagodaError(f"this {type(self.model).__name__} has no biases: BitFit has nothing to train; use lora")

    def named(self) -> dict[str, Tensor]:
        return self.biases

    def merge(self) -> None:
        for p in self.biases.values():
            p.requires_grad_(False)
            p.data = p.data.to(self.model.dtype)


def train_leaves(
    model: nn.Module, leaf: str, kind: type | tuple = nn.Module, dtype: torch.dtype | None = None
) -> dict[str, nn.Parameter]:
    """The parameters of this name in modules of this kind, by transformers' names: owned from now on, and trainable."""
    found = {}
    for path, module in model.named_modules():
        p = getattr(module, leaf, None)
        name = adapter.hf_name(model, path)
        if name and isinstance(module, kind) and isinstance(p, nn.Parameter):
            setattr(module, leaf, nn.Parameter(p.detach().to(dtype or p.dtype, copy=True)))
            found[f"{name}.{leaf}"] = getattr(module, leaf)
    return found
