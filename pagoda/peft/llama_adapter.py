"""LLaMA-Adapter (Zhang et al. 2023): in the upper layers every query also attends to a learned prompt.

The prompt's keys and values come from the layer's own projections, without positions; what is attended to has a softmax
of its own and is added through a gate that starts at zero. Adapter v2 (Gao et al. 2023) gives every linear layer a bias
and a factor besides, and trains the norms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pagoda.common import PagodaError
from pagoda.models.gpt import Attention
from pagoda.models.layers import LayerNorm, Linear, RMSNorm
from pagoda.ops.linear import linear
from pagoda.ops.rotary import rotary
from pagoda.peft import adapter
from pagoda.peft.adapter import Worn, hf_name
from pagoda.peft.bitfit import train_leaves

IN_PEFT = ("llama", "mistral", "gpt2")  # the families that PEFT has it for


class AdaptionPrompt(nn.Module):
    """adaption_prompt (1, length, n_embd) and adaption_gate (1,); hangs on an Attention as a hook on its result."""

    def __init__(self, n_embd: int, length: int, in_peft: str, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.in_peft = in_peft  # the family, where PEFT has the method for it
        self.adaption_prompt = nn.Parameter(torch.randn(1, length, n_embd, dtype=dtype, device=device))
        self.adaption_gate = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))

    def hook(self, attn: Attention, args: tuple, y: Tensor) -> Tensor:
        x, _, angles, *_ = args
        c = attn.config
        q, k, _ = attn.project(x)
        _, prompt_k, prompt_v = attn.project(self.adaption_prompt[0].to(x.dtype))
        if c.qk_norm:
            q, k, prompt_k = attn.q_norm(q), attn.k_norm(k), attn.k_norm(prompt_k)
        if angles is not None:
            q, _ = rotary(q, k, *angles)
        group = c.n_head // c.n_kv_head
        keys, values = (t.repeat_interleave(group, dim=1) for t in (prompt_k, prompt_v))  # (length, n_head, head_size)
        scores = torch.einsum("nhd,lhd->nhl", q, keys) * c.head_size**-0.5
        weights = self.adaption_gate * scores.float().softmax(-1)
        seen = torch.einsum("nhl,lhd->nhd", weights.to(x.dtype), values).flatten(1)
        if self.in_peft == "gpt2":  # PEFT leaves the output projection out there
            return y + seen
        y = y + attn.o_proj(seen)
        return y if self.in_peft else y - attn.o_proj(torch.zeros_like(seen[:1]))  # its bias is in y already


class Method(adapter.Method):
    def attach(self, dtype: torch.dtype, tensors: dict[str, Tensor] | None) -> None:
        o, c = self.options, self.model.config
        family = self.model.model_types[0]
        in_peft = family if o.peft_type == "ADAPTION_PROMPT" and family in IN_PEFT else ""
        if o.peft_type == "ADAPTION_PROMPT" and not in_peft:
            o.peft_type = "LLAMA_ADAPTER"
        n = o.layers or max(1, c.n_layer - 2)
        if n > c.n_layer:
            raise PagodaError(f"layers is {n}, but the model has {c.n_layer}")
        self.prompts: dict[str, AdaptionPrompt] = {}
        for i in range(c.n_layer - n, c.n_layer):
            attn = self.model.layers[i].attn
            prompt = AdaptionPrompt(c.n_embd, o.length, in_peft, dtype, self.model.device)
            attn.adaption = prompt
            attn.register_forward_hook(prompt.hook)
            self.prompts[hf_name(self.model, f"layers.{i}.attn.o_proj").rpartition(".")[0]] = prompt

    def named(self) -> dict[str, Tensor]:
        return {f"{path}.{n}": p for path, prompt in self.prompts.items() for n, p in prompt.named_parameters()}

    def config(self) -> dict[str, Any]:
        module = next(iter(self.prompts)).rpartition(".")[2]
        return {**super().config(), "adapter_layers": len(self.prompts), "target_modules": module}


class ScaledLinear(Worn):
    """A Linear as adapter_scale * (its result + adapter_bias), both (n_out,)."""

    def __init__(self, base: Linear, dtype: torch.dtype):
        super().__init__(base)
        self.adapter_bias = nn.Parameter(torch.zeros(self.n_out, dtype=dtype, device=self.weight.device))
        self.adapter_scale = nn.Parameter(torch.ones(self.n_out, dtype=dtype, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter_scale.to(x.dtype) * (linear(x, self.weight, self.bias) + self.adapter_bias.to(x.dtype))

    def own(self) -> dict[str, Tensor]:
        return {"adapter_bias": self.adapter_bias, "adapter_scale": self.adapter_scale}


class MethodV2(Method):
    def attach(self, dtype: torch.dtype, tensors: dict[str, Tensor] | None) -> None:
        super().attach(dtype, tensors)
        self.linears = adapter.LinearMethod(self.model, self.options)
        self.linears.wear(adapter.linears(self.model), lambda name, base: ScaledLinear(base, dtype))
        self.norms = train_leaves(self.model, "weight", (RMSNorm, LayerNorm))

    def named(self) -> dict[str, Tensor]:
        return {**super().named(), **self.linears.named(), **self.norms}
