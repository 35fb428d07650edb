"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al. 2024).

Llama's layout with queries, keys and values in one weight, and gate and up in another. The 128k models stretch their
rotary positions by "longrope": one list of factors for sequences within the original context, another for longer ones.
"""

from __future__ import annotations

from typing import Any

from pagoda.models.config import Config, rope_params, size_table
from pagoda.models.gpt import GPT
from pagoda.models.llama import LLAMA_DEFAULTS, LLAMA_NAMES, llama_config


class Phi3(GPT):
    """Phi-3, Phi-3.5, Phi-4 and Phi-4-mini."""

    model_types = ("phi3",)
    architectures = ("Phi3ForCausalLM",)
    defaults = {
        **LLAMA_DEFAULTS,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    names = {
        **LLAMA_NAMES,
        "layers.{}.attn.qkv_proj": "model.layers.{}.self_attn.qkv_proj",
        "layers.{}.mlp.gate_up_proj": "model.layers.{}.mlp.gate_up_proj",
    }

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        rope = rope_params(hf)
        if rope["rope_type"] in ("su", "yarn"):  # what the first configurations called longrope
            rope["rope_type"] = "longrope"
        windows = (hf.get("sliding_window") or 0,) * hf["num_hidden_layers"]
        return llama_config(hf, rope=rope, qkv="concatenated", windows=windows, mlp="gated_fused")


_MINI = (32, 32, 32, 3072, 8192, 32064, 4096, {"sliding_window": 2047})
_MEDIUM = (40, 40, 10, 5120, 17920, 32064, 4096, {"sliding_window": 2047})
_PHI4 = (40, 40, 10, 5120, 17920, 100352, 16384, {"rope_theta": 250000.0})
Phi3.sizes = size_table(
    {"model_type": "phi3"},
    "num_hidden_layers num_attention_heads num_key_value_heads hidden_size intermediate_size vocab_size "
    "max_position_embeddings",
    {"Phi-3-mini-4k-instruct": _MINI, "Phi-3-medium-4k-instruct": _MEDIUM, "phi-4": _PHI4},
)
