"""AdaLoRA (Zhang et al. 2023): updates P diag(E) Q whose ranks shrink where they matter least, while they train.

After every step the importance of each weight is smoothed; on a cubic schedule the least important entries of E over
all layers are set to zero, until `rank` are left on average. An extra loss keeps P and Q orthogonal. Step by step this
is what PEFT does. The file holds the ranks that are left, and `rank_pattern` says which they were.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagoda.common import PagodaError
from pagoda.models.gpt import GPT
from pagoda.models.layers import Linear
from pagoda.ops.linear import linear
from pagoda.peft.adapter import LinearMethod, Worn, matching
from pagoda.peft.options import AdaLoRA


class SVDLinear(Worn):
    """A Linear plus scale * B diag(E) A x: lora_A (rank, n_in), lora_E (rank, 1), lora_B (n_out, rank)."""

    def __init__(self, base: Linear, rank: int, scale: float, dropout: float, dtype: torch.dtype):
        super().__init__(base)
        self.scale, self.dropout = scale, dropout
        where = {"dtype": dtype, "device": self.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, self.n_in, **where).normal_(0, 0.02))
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, **where))
        self.lora_B = nn.Parameter(torch.empty(self.n_out, rank, **where).normal_(0, 0.02))

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)
        low = linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return linear(low * (self.lora_E.flatten() * self.scale).to(x.dtype), self.lora_B.to(x.dtype), None, y)

    def own(self) -> dict[str, Tensor]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B, "lora_E": self.lora_E}

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * self.lora_B.float() @ (self.lora_A * self.lora_E).float(), bias


class Method(LinearMethod):
    def __init__(self, model: GPT, options: AdaLoRA):
        super().__init__(model, options)
        self.importance: dict[str, tuple[Tensor, Tensor]] = {}  # of each parameter: sensitivity, uncertainty
        self.kept: dict[str, Tensor] | None = None  # by layer: (rank,) bool

    def attach(self, dtype: torch.dtype, tensors: dict[str, Tensor] | None) -> None:
        o: AdaLoRA = self.options
        names = (
            matching(self.model, o.targets) if tensors is None else [k[:-7] for k in tensors if k.endswith(".lora_E")]
        )
        scale = o.alpha / (o.init_rank + 1e-5)
        ranks = {n: o.init_rank if tensors is None else len(tensors[f"{n}.lora_E"]) for n in names}
        self.wear(names, lambda name, base: SVDLinear(base, ranks[name], scale, o.dropout, dtype))
        if tensors is None and o.warmup_steps >= o.total_steps - o.final_steps:
            raise PagodaError(
                f"AdaLoRA has no step to take ranks away in: total_steps {o.total_steps} must be above "
                f"warmup_steps {o.warmup_steps} + final_steps {o.final_steps}"
            )

    def extra_loss(self) -> Tensor | float:
        factors = [m for layer in self.layers.values() for m in (layer.lora_A, layer.lora_B.T)]
        distances = [torch.linalg.norm(m @ m.T - torch.eye(len(m), dtype=m.dtype, device=m.device)) for m in factors]
        return self.options.orthogonal * sum(distances) / len(distances)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        o: AdaLoRA = self.options
        last = o.total_steps - o.final_steps
        if step < last:
            self.observe()
        if step > last:
            for name, kept in (self.kept or {}).items():
                self.layers[name].lora_E[~kept] = 0.0
        elif step == last or (step > o.warmup_steps and step % o.every == 0):
            self.allocate(self.budget(step))

    def budget(self, step: int) -> int:
        """How many ranks all layers together may have."""
        o: AdaLoRA = self.options
        first, final = o.init_rank * len(self.layers), o.rank * len(self.layers)
        left = 1 - (step - o.warmup_steps) / (o.total_steps - o.final_steps - o.warmup_steps)
        return int((first - final) * left**3 + final)

    def observe(self) -> None:
        """Smooth what |weight x gradient| says about each weight."""
        o: AdaLoRA = self.options
        for name, p in self.named().items():
            if p.grad is None:
                continue
            now = (p * p.grad).abs()
            mean, doubt = self.importance.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            mean = o.beta1 * mean + (1 - o.beta1) * now
            self.importance[name] = mean, o.beta2 * doubt + (1 - o.beta2) * (now - mean).abs()

    def allocate(self, budget: int) -> None:
        """Set the least important entries of E to zero, so that `budget` are left."""
        score = {name: mean * doubt for name, (mean, doubt) in self.importance.items()}
        scores = {
            name: score[f"{name}.lora_E"][:, 0] + score[f"{name}.lora_A"].mean(1) + score[f"{name}.lora_B"].mean(0)
            for name in self.layers
        }
        everything = torch.cat(list(scores.values()))
        if budget >= len(everything):
            return
        threshold = everything.kthvalue(len(everything) - budget).values
        self.kept = {name: s > threshold for name, s in scores.items()}
        for name, layer in self.layers.items():
            layer.lora_E[~self.kept[name]] = 0.0

    def memory(self) -> dict[str, Tensor]:
        pairs = {f"{name}:{i}": t for name, pair in self.importance.items() for i, t in enumerate(pair)}
        return pairs | {f"{name}:kept": mask for name, mask in (self.kept or {}).items()}

    def remember(self, memory: dict[str, Tensor]) -> None:
        self.importance = {n[:-2]: (t, memory[f"{n[:-2]}:1"]) for n, t in memory.items() if n.endswith(":0")}
        self.kept = {n[:-5]: mask for n, mask in memory.items() if n.endswith(":kept")} or None

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        for name, kept in (self.kept or {}).items():
            for leaf in ("lora_A", "lora_E"):
                state[f"{name}.{leaf}"] = state[f"{name}.{leaf}"][kept]
            state[f"{name}.lora_B"] = state[f"{name}.lora_B"][:, kept]
        return state

    def config(self) -> dict[str, Any]:
        kept = None if self.kept is None else {f"{name}.lora_E": mask.tolist() for name, mask in self.kept.items()}
        return {**super().config(), "rank_pattern": kept, "bias": "none"}
