"""GPT-2 (Radford et al. 2019): learned positions, layer norms, biases, and a head tied to the embedding.

Its checkpoints keep linear weights as (n_in, n_out) ("Conv1D"); those of the hub leave out `transformer.` in front.
"""

from __future__ import annotations

from typing import Any

from pagoda.models.config import Config, activation_name, config_of, only, size_table
from pagoda.models.gpt import GPT, Attention, Block


class GPT2Attention(Attention):
    """Divides the scores by the layer's number besides, where the configuration says so (Mistral's GPT-2 replicas)."""

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        if config.hf["scale_attn_by_inverse_layer_idx"]:
            self.scale /= layer + 1


class GPT2Block(Block):
    attention_class = GPT2Attention


class GPT2(GPT):
    """GPT-2, small to XL."""

    model_types = ("gpt2",)
    architectures = ("GPT2LMHeadModel",)
    defaults = {
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    }
    names = {
        "embed": "transformer.wte",
        "pos_embed": "transformer.wpe",
        "layers.{}.norm_1": "transformer.h.{}.ln_1",
        "layers.{}.attn.qkv_proj": "transformer.h.{}.attn.c_attn",
        "layers.{}.attn.o_proj": "transformer.h.{}.attn.c_proj",
        "layers.{}.norm_2": "transformer.h.{}.ln_2",
        "layers.{}.mlp.up_proj": "transformer.h.{}.mlp.c_fc",
        "layers.{}.mlp.down_proj": "transformer.h.{}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    }
    transposed = ("qkv_proj", "o_proj", "up_proj", "down_proj")
    prefixes = (("transformer.", ""),)
    block_class = GPT2Block

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        only(hf, add_cross_attention=False)
        return config_of(
            hf,
            n_layer=hf["n_layer"],
            n_head=hf["n_head"],
            n_embd=hf["n_embd"],
            intermediate_size=hf.get("n_inner") or 4 * hf["n_embd"],
            block_size=hf["n_positions"],
            norm="layer",
            norm_eps=hf["layer_norm_epsilon"],
            positions="learned",
            qkv="concatenated",
            qkv_bias=True,
            attn_bias=True,
            attn_scale=0.0 if hf["scale_attn_weights"] else 1.0,
            mlp="plain",
            mlp_bias=True,
            activation=activation_name(hf["activation_function"]),
        )


GPT2.sizes = size_table(
    {"model_type": "gpt2", "vocab_size": 50257},
    "n_layer n_head n_embd",
    {
        "distilgpt2": (6, 12, 768),
        "gpt2": (12, 12, 768),
        "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280),
        "gpt2-xl": (48, 25, 1600),
    },
)
