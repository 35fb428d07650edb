"""GPT-NeoX: Pythia, Dolly, RedPajama-INCITE, GPT-NeoX-20B (Black et al. 2022; Biderman et al. 2023).

Layer norms and biases everywhere, rotary positions on a part of each head, attention and MLP side by side (not in
RedPajama), queries, keys and values fused in one weight, head by head.
"""

from __future__ import annotations

from typing import Any

from pagoda.models.config import Config, activation_name, config_of, rope_params, size_table
from pagoda.models.gpt import GPT


class GPTNeoX(GPT):
    """GPT-NeoX and its descendants."""

    model_types = ("gpt_neox",)
    architectures = ("GPTNeoXForCausalLM",)
    defaults = {
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
    names = {
        "embed": "gpt_neox.embed_in",
        "layers.{}.norm_1": "gpt_neox.layers.{}.input_layernorm",
        "layers.{}.norm_2": "gpt_neox.layers.{}.post_attention_layernorm",
        "layers.{}.attn.qkv_proj": "gpt_neox.layers.{}.attention.query_key_value",
        "layers.{}.attn.o_proj": "gpt_neox.layers.{}.attention.dense",
        "layers.{}.mlp.up_proj": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "layers.{}.mlp.down_proj": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    }
    prefixes = (("embed_out", "lm_head"),)

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        base = hf.get("rotary_emb_base") or hf.get("rope_theta") or 10000.0
        partial = hf.get("rotary_pct")
        return config_of(
            hf,
            norm="layer",
            norm_eps=hf["layer_norm_eps"],
            parallel_residual=hf["use_parallel_residual"],
            rope=rope_params({**hf, "rope_theta": base, "partial_rotary_factor": partial}, partial=0.25),
            qkv="grouped",
            qkv_bias=hf["attention_bias"],
            attn_bias=hf["attention_bias"],
            mlp="plain",
            mlp_bias=True,
            activation=activation_name(hf["hidden_act"]),
        )


_REDPAJAMA = {"rotary_pct": 1.0, "use_parallel_residual": False}
GPTNeoX.sizes = size_table(
    {"model_type": "gpt_neox", "eos_token_id": 0},
    "num_hidden_layers num_attention_heads hidden_size intermediate_size vocab_size",
    {
        "pythia-14m": (6, 4, 128, 512, 50304),
        "pythia-31m": (6, 8, 256, 1024, 50304),
        "pythia-70m": (6, 8, 512, 2048, 50304),
        "pythia-160m": (12, 12, 768, 3072, 50304),
        "pythia-410m": (24, 16, 1024, 4096, 50304),
        "pythia-1b": (16, 8, 2048, 8192, 50304),
        "pythia-1.4b": (24, 16, 2048, 8192, 50304),
        "pythia-2.8b": (32, 32, 2560, 10240, 50304),
        "pythia-6.9b": (32, 32, 4096, 16384, 50432),
        "pythia-12b": (36, 40, 5120, 20480, 50688),
        "gpt-neox-20b": (44, 64, 6144, 24576, 50432, {"hidden_act": "gelu_fast"}),
        "dolly-v2-3b": (32, 32, 2560, 10240, 50280),
        "dolly-v2-7b": (32, 32, 4096, 16384, 50280),
        "dolly-v2-12b": (36, 40, 5120, 20480, 50280),
        "RedPajama-INCITE-Base-3B-v1": (32, 32, 2560, 10240, 50432, _REDPAJAMA),
        "RedPajama-INCITE-7B-Base": (32, 32, 4096, 16384, 50432, _REDPAJAMA),
    },
)
