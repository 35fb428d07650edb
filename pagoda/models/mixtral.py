"""Mixtral: Mistral with a sparse mixture of experts in place of every MLP (Jiang et al. 2024).

The router picks two of eight experts per token; their weights are made to sum to one.
"""

from __future__ import annotations

from typing import Any

from pagoda.models.config import Config, size_table
from pagoda.models.gpt import GPT
from pagoda.models.llama import LLAMA_DEFAULTS, LLAMA_NAMES, llama_config


class Mixtral(GPT):
    """Mixtral 8x7B and 8x22B."""

    model_types = ("mixtral",)
    architectures = ("MixtralForCausalLM",)
    defaults = {
        **LLAMA_DEFAULTS,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    names = {**LLAMA_NAMES, "layers.{}.mlp.router": "model.layers.{}.block_sparse_moe.gate"}
    expert_names = {
        "layers.{}.mlp.gate_up": (
            "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
            "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
        ),
        "layers.{}.mlp.down": ("model.layers.{}.block_sparse_moe.experts.{}.w2.weight",),
    }

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        return llama_config(
            hf,
            theta=1e6,
            windows=(hf.get("sliding_window") or 0,) * hf["num_hidden_layers"],
            n_expert=hf["num_local_experts"],
            n_expert_per_token=hf["num_experts_per_tok"],
        )


Mixtral.sizes = size_table(
    {"model_type": "mixtral", "vocab_size": 32000, "num_key_value_heads": 8, "rope_theta": 1e6},
    "num_hidden_layers num_attention_heads hidden_size intermediate_size max_position_embeddings",
    {
        "Mixtral-8x7B-v0.1": (32, 32, 4096, 14336, 32768),
        "Mixtral-8x22B-v0.1": (56, 48, 6144, 16384, 65536),
    },
)
