"""LoRA adapters side by side on one model: every sequence of a batch wears its own, or none (Chen et al. 2023)."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from pagoda.common import PagodaError
from pagoda.models.gpt import GPT
from pagoda.models.layers import Linear
from pagoda.ops import cpu
from pagoda.ops.formats import PackedWeight, pack
from pagoda.ops.linear import linear
from pagoda.peft.adapter import Worn, adapters, linears
from pagoda.peft.files import load_adapter
from pagoda.peft.lora import LoRALinear

Update = tuple[Tensor | PackedWeight, Tensor | PackedWeight]  # A (rank, n_in), and B (n_out, rank) with the scale in it


class Adapters:
    """The adapters of a model, by name. The model wears them only while somebody asks for one."""

    def __init__(self, model: GPT):
        self.model = model
        self.paths: dict[str, str | Path] = {}
        self.layers: dict[str, Shared] = {}  # by our path
        self.rows: dict[str, Tensor] = {}  # of the stream, for each adapter that this step needs
        self.worn = False

    @property
    def names(self) -> list[str]:
        return list(self.paths)

    def load(self, name: str, path: str | Path) -> None:
        """Take up an adapter under a name. Raises PagodaError, and nothing has changed, for what cannot be shared."""
        if self.model.n_virtual:
            raise PagodaError("a model with virtual tokens takes no further adapters: serve its base instead")
        self._wear(False)
        before = {path: self.model.get_submodule(path) for path in linears(self.model).values()}
        own = list(adapters(self.model))
        try:
            load_adapter(self.model, path)
            added = adapters(self.model)[len(own) :]
            found = {p: self.model.get_submodule(p) for p in before}
            found = {p: layer for p, layer in found.items() if layer is not before[p]}
            plain = all(isinstance(m, LoRALinear) and m.lora_magnitude_vector is None for m in found.values())
            if len(added) != 1 or not found or not plain or self.model.n_virtual:
                kinds = "+".join(m.options.peft_type for m in added)
                raise PagodaError(f"{path}: adapters share a model only as plain LoRA, this is {kinds}: merge it")
            updates = {p: (self._packed(m.lora_A), self._packed(m.lora_B * m.scale)) for p, m in found.items()}
        finally:
            for layer_path, layer in before.items():
                self._put(layer_path, layer)
            adapters(self.model)[:] = own
            self.model.virtual = None
        self.drop(name)
        for layer_path, update in updates.items():
            if layer_path not in self.layers:
                self.layers[layer_path] = Shared(before[layer_path], self)
            self.layers[layer_path].updates[name] = update
        self.paths[name] = path

    def drop(self, name: str) -> None:
        self._wear(False)
        self.paths.pop(name, None)
        for path, layer in list(self.layers.items()):
            layer.updates.pop(name, None)
            if not layer.updates:
                del self.layers[path]

    def wear(self, pieces: list[tuple[str | None, int]]) -> bool:
        """Say which adapter each piece of the coming stream wears: (name or None, tokens). False when none does."""
        self.rows = {}
        if any(name is not None for name, _ in pieces):
            names = [name for name, n in pieces for _ in range(n)]
            order = sorted((i for i, name in enumerate(names) if name is not None), key=lambda i: names[i])
            device = self.model.device
            self.rows = {n: torch.tensor(list(rows), device=device) for n, rows in groupby(order, lambda i: names[i])}
        self._wear(bool(self.rows))
        return bool(self.rows)

    def _packed(self, weight: Tensor) -> Tensor | PackedWeight:
        """As the kernel reads it, whose results for a row do not depend on the others."""
        weight = weight.detach()
        if cpu.kernels is None or not weight.is_cpu:
            return weight
        return pack(weight.float(), "float32")

    def _wear(self, on: bool) -> None:
        if on != self.worn:
            for path, layer in self.layers.items():
                self._put(path, layer if on else layer.base)
            self.worn = on

    def _put(self, path: str, layer: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, layer)


class Shared(Worn):
    """A Linear with an update for some rows of the stream."""

    def __init__(self, base: Linear, shared: Adapters):
        nn.Module.__init__(self)
        self.n_in, self.n_out, self.weight, self.bias = base.n_in, base.n_out, base.weight, base.bias
        self.__dict__.update(base=base, shared=shared)  # no submodules of this one
        self.updates: dict[str, Update] = {}
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for name, rows in self.shared.rows.items():
            if name in self.updates:
                a, b = self.updates[name]
                y[rows] += linear(linear(x[rows], a), b)
        return y
