"""Falcon (Almazrouei et al. 2023), in its three layouts.

7B: one key head for all queries, attention and MLP side by side behind a shared norm. 40B and later
(`new_decoder_architecture`): several key heads, and a norm for each branch (11B: shared again). The first ones,
falcon-rw: ALiBi, as many key heads as queries, biases, one branch behind the other.
"""

from __future__ import annotations

from typing import Any

from pagoda.models.bloom import Bloom
from pagoda.models.config import Config, activation_name, config_of, only, rope_params, size_table
from pagoda.models.gpt import GPT


class Falcon(GPT):
    """Falcon, old and new."""

    model_types = ("falcon",)
    architectures = ("FalconForCausalLM",)
    defaults = {
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "max_position_embeddings": 2048,
        "activation": "gelu",
        "tie_word_embeddings": True,
    }
    names = Bloom.names

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        new, n_head = hf["new_decoder_architecture"], hf["num_attention_heads"]
        if new:
            only(hf, parallel_attn=True)
        n_kv_head = 1 if hf["multi_query"] and not new else hf.get("num_kv_heads") if new else n_head
        n_embd = hf.get("n_embed") or hf["hidden_size"]
        return config_of(
            hf,
            n_kv_head=n_kv_head or n_head,
            n_embd=n_embd,
            intermediate_size=hf.get("ffn_hidden_size") or 4 * n_embd,
            norm="layer",
            norm_eps=hf["layer_norm_epsilon"],
            parallel_residual=hf["parallel_attn"],
            shared_norm=hf["parallel_attn"] and not (new and hf.get("num_ln_in_parallel_attn") in (None, 2)),
            positions="alibi" if hf["alibi"] else "rotary",
            rope=rope_params(hf),
            qkv="grouped",
            qkv_bias=hf["bias"],
            attn_bias=hf["bias"],
            mlp="plain",
            mlp_bias=hf["bias"],
            activation=activation_name(hf["activation"]),
        )

    def __init__(self, config: Config):
        super().__init__(config)
        if config.parallel_residual and not config.shared_norm:
            two = {"layers.{}.norm_1": "transformer.h.{}.ln_attn", "layers.{}.norm_2": "transformer.h.{}.ln_mlp"}
            self.names = {**self.names, **two}
        if self.slopes is not None:
            # Scaled like the scores, and rounded as they were in training. (transformers rounds their products with the
            # positions as well, which moves its logits a little on long texts.)
            self.slopes = self.slopes.bfloat16().float() * config.attn_scale


_NEW = {"new_decoder_architecture": True, "num_kv_heads": 8}
_RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
_11B = {
    **_NEW,
    "num_ln_in_parallel_attn": 1,
    "max_position_embeddings": 8192,
    "rope_theta": 500042.0,
    "tie_word_embeddings": False,
}
Falcon.sizes = size_table(
    {"model_type": "falcon"},
    "num_hidden_layers num_attention_heads hidden_size vocab_size",
    {
        "falcon-rw-1b": (24, 32, 2048, 50304, _RW),
        "falcon-7b": (32, 71, 4544, 65024),
        "falcon-11B": (60, 32, 4096, 65024, _11B),
        "falcon-40b": (60, 128, 8192, 65024, _NEW),
        "falcon-180B": (80, 232, 14848, 65024, _NEW),
    },
)
