"""Phi-1, Phi-1.5 and Phi-2 (Li et al. 2023).

Attention and MLP side by side behind one shared layer norm, rotary positions on a part of each head, biases
everywhere, in the head too.
"""

from __future__ import annotations

from typing import Any

from pagoda.models.config import Config, activation_name, config_of, only, rope_params, size_table
from pagoda.models.gpt import GPT
from pagoda.models.llama import LLAMA_NAMES


class Phi(GPT):
    """Phi-1 to Phi-2."""

    model_types = ("phi",)
    architectures = ("PhiForCausalLM",)
    defaults = {
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "qk_layernorm": False,
        "tie_word_embeddings": False,
    }
    names = {
        **LLAMA_NAMES,
        "layers.{}.attn.o_proj": "model.layers.{}.self_attn.dense",
        "layers.{}.mlp.up_proj": "model.layers.{}.mlp.fc1",
        "layers.{}.mlp.down_proj": "model.layers.{}.mlp.fc2",
        "norm": "model.final_layernorm",
    }

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        only(hf, qk_layernorm=False)
        return config_of(
            hf,
            n_kv_head=hf.get("num_key_value_heads") or 0,
            head_size=hf.get("head_dim") or 0,
            norm="layer",
            norm_eps=hf["layer_norm_eps"],
            parallel_residual=True,
            shared_norm=True,
            rope=rope_params(hf, partial=0.5),
            qkv_bias=True,
            attn_bias=True,
            mlp="plain",
            mlp_bias=True,
            activation=activation_name(hf["hidden_act"]),
            head_bias=True,
        )


Phi.sizes = size_table(
    {"model_type": "phi", "vocab_size": 51200},
    "num_hidden_layers num_attention_heads hidden_size intermediate_size partial_rotary_factor",
    {
        "phi-1": (24, 32, 2048, 8192, 0.5),
        "phi-1_5": (24, 32, 2048, 8192, 0.5),
        "phi-2": (32, 32, 2560, 10240, 0.4),
    },
)
