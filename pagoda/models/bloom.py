"""BLOOM and BLOOMZ (Le Scao et al. 2022; Muennighoff et al. 2022).

No position embedding but ALiBi: a penalty on distance in attention, with a slope per head; a norm behind the
embedding; queries, keys and values fused head by head; biases everywhere; a tied head.
"""

from __future__ import annotations

from typing import Any

from pagoda.models.config import Config, config_of, only, size_table
from pagoda.models.gpt import GPT


class Bloom(GPT):
    """BLOOM and its instructed siblings."""

    model_types = ("bloom",)
    architectures = ("BloomForCausalLM",)
    defaults = {
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
    }
    names = {
        "embed": "transformer.word_embeddings",
        "embed_norm": "transformer.word_embeddings_layernorm",
        "layers.{}.norm_1": "transformer.h.{}.input_layernorm",
        "layers.{}.attn.qkv_proj": "transformer.h.{}.self_attention.query_key_value",
        "layers.{}.attn.o_proj": "transformer.h.{}.self_attention.dense",
        "layers.{}.norm_2": "transformer.h.{}.post_attention_layernorm",
        "layers.{}.mlp.up_proj": "transformer.h.{}.mlp.dense_h_to_4h",
        "layers.{}.mlp.down_proj": "transformer.h.{}.mlp.dense_4h_to_h",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    }
    prefixes = (("transformer.", ""),)

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        only(hf, apply_residual_connection_post_layernorm=False)
        n_embd = hf.get("n_embed") or hf["hidden_size"]
        return config_of(
            hf,
            n_layer=hf.get("num_hidden_layers") or hf["n_layer"],
            n_head=hf.get("num_attention_heads") or hf["n_head"],
            n_embd=n_embd,
            intermediate_size=4 * n_embd,
            block_size=hf.get("seq_length") or 2048,  # what it was trained on: ALiBi itself knows no limit
            norm="layer",
            norm_eps=hf["layer_norm_epsilon"],
            embd_norm=True,
            positions="alibi",
            qkv="grouped",
            qkv_bias=True,
            attn_bias=True,
            mlp="plain",
            mlp_bias=True,
            activation="gelu_tanh",
        )


_ROWS = {
    "560m": (24, 16, 1024),
    "1b1": (24, 16, 1536),
    "1b7": (24, 16, 2048),
    "3b": (30, 32, 2560),
    "7b1": (30, 32, 4096),
    "": (70, 112, 14336),
}
Bloom.sizes = size_table(
    {"model_type": "bloom", "vocab_size": 250880},
    "n_layer n_head hidden_size",
    {f"{name}-{size}".rstrip("-"): row for name in ("bloom", "bloomz") for size, row in _ROWS.items()},
)
