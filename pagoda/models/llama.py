"""Llama and the many models of its shape: Llama 1 to 3.x, Code Llama, Alpaca, Vicuna, LongChat, TinyLlama, SmolLM2,
and Mistral with its sliding window.

RMS norm, rotary positions, SwiGLU, grouped heads, no biases (Touvron et al. 2023; Jiang et al. 2023).
"""

from __future__ import annotations

from typing import Any

from pagoda.models.config import Config, activation_name, config_of, only, rope_params, size_table
from pagoda.models.gpt import GPT

# What checkpoints of Llama's layout call our modules; Qwen, Gemma and Phi-3 start from this table.
LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "layers.{}.norm_1": "model.layers.{}.input_layernorm",
    "layers.{}.attn.q_proj": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attn.k_proj": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attn.v_proj": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "layers.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "layers.{}.attn.o_proj": "model.layers.{}.self_attn.o_proj",
    "layers.{}.norm_2": "model.layers.{}.post_attention_layernorm",
    "layers.{}.mlp.gate_proj": "model.layers.{}.mlp.gate_proj",
    "layers.{}.mlp.up_proj": "model.layers.{}.mlp.up_proj",
    "layers.{}.mlp.down_proj": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
# What transformers takes for keys that a config.json of these layouts leaves out.
LLAMA_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}


class Llama(GPT):
    """Llama 1 to 3.x, and the many models of its shape."""

    model_types = ("llama",)
    architectures = ("LlamaForCausalLM", "LLaMAForCausalLM")
    defaults = {**LLAMA_DEFAULTS, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False}
    names = LLAMA_NAMES

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        return llama_config(hf, qkv_bias=hf["attention_bias"], attn_bias=hf["attention_bias"], mlp_bias=hf["mlp_bias"])


class Mistral(GPT):
    """Mistral 7B: Llama with a sliding window in every layer."""

    model_types = ("mistral",)
    architectures = ("MistralForCausalLM",)
    defaults = {
        **LLAMA_DEFAULTS,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }
    names = LLAMA_NAMES

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        return llama_config(hf, windows=(hf["sliding_window"] or 0,) * hf["num_hidden_layers"])


def llama_config(hf: dict[str, Any], theta: float = 10000.0, **more: Any) -> Config:
    """What the configurations of Llama's layout have in common; `more` are the fields where a family differs."""
    if "rope" not in more:
        more["rope"] = rope_params(hf, theta)
        only(more["rope"] | {"model_type": hf["model_type"]}, partial_rotary_factor=1.0)
    return config_of(
        hf,
        n_kv_head=hf.get("num_key_value_heads") or 0,
        head_size=hf.get("head_dim") or 0,
        norm_eps=hf["rms_norm_eps"],
        activation=activation_name(hf["hidden_act"]),
        **more,
    )


_LLAMA3 = {"rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": 128001}
_LLAMA31 = {
    **_LLAMA3,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_LLAMA32 = {**_LLAMA31, "rope_scaling": {**_LLAMA31["rope_scaling"], "factor": 32.0}, "tie_word_embeddings": True}
_SMOLLM2 = {"tie_word_embeddings": True, "rope_theta": 100000.0, "bos_token_id": 0, "eos_token_id": 0}
_LONGCHAT = {"rms_norm_eps": 1e-6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
_COLUMNS = (
    "vocab_size num_hidden_layers num_attention_heads num_key_value_heads hidden_size intermediate_size "
    "max_position_embeddings"
)
_COMMON = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2}
Llama.sizes = size_table(
    {"model_type": "llama", **_COMMON},
    _COLUMNS,
    {
        "llama-7b": (32000, 32, 32, 32, 4096, 11008, 2048, {"rms_norm_eps": 1e-6}),
        "llama-13b": (32000, 40, 40, 40, 5120, 13824, 2048, {"rms_norm_eps": 1e-6}),
        "llama-30b": (32000, 60, 52, 52, 6656, 17920, 2048, {"rms_norm_eps": 1e-6}),
        "llama-65b": (32000, 80, 64, 64, 8192, 22016, 2048, {"rms_norm_eps": 1e-6}),
        "Llama-2-7b-hf": (32000, 32, 32, 32, 4096, 11008, 4096),
        "Llama-2-13b-hf": (32000, 40, 40, 40, 5120, 13824, 4096),
        "Llama-2-70b-hf": (32000, 80, 64, 8, 8192, 28672, 4096),
        "CodeLlama-7b-hf": (32016, 32, 32, 32, 4096, 11008, 16384, {"rope_theta": 1e6}),
        "CodeLlama-13b-hf": (32016, 40, 40, 40, 5120, 13824, 16384, {"rope_theta": 1e6}),
        "CodeLlama-34b-hf": (32000, 48, 64, 8, 8192, 22016, 16384, {"rope_theta": 1e6}),
        "Meta-Llama-3-8B": (128256, 32, 32, 8, 4096, 14336, 8192, _LLAMA3),
        "Meta-Llama-3-70B": (128256, 80, 64, 8, 8192, 28672, 8192, _LLAMA3),
        "Llama-3.1-8B": (128256, 32, 32, 8, 4096, 14336, 131072, _LLAMA31),
        "Llama-3.1-70B": (128256, 80, 64, 8, 8192, 28672, 131072, _LLAMA31),
        "Llama-3.2-1B": (128256, 16, 32, 8, 2048, 8192, 131072, {**_LLAMA32, "head_dim": 64}),
        "Llama-3.2-3B": (128256, 28, 24, 8, 3072, 8192, 131072, {**_LLAMA32, "head_dim": 128}),
        "vicuna-7b-v1.5": (32000, 32, 32, 32, 4096, 11008, 4096),
        "vicuna-13b-v1.5": (32000, 40, 40, 40, 5120, 13824, 4096),
        "longchat-7b-16k": (32000, 32, 32, 32, 4096, 11008, 16384, _LONGCHAT),
        "TinyLlama-1.1B-Chat-v1.0": (32000, 22, 32, 4, 2048, 5632, 2048),
        "SmolLM2-135M": (49152, 30, 9, 3, 576, 1536, 8192, _SMOLLM2),
        "SmolLM2-360M": (49152, 32, 15, 5, 960, 2560, 8192, _SMOLLM2),
        "SmolLM2-1.7B": (49152, 24, 32, 32, 2048, 8192, 8192, {**_SMOLLM2, "rope_theta": 130000.0}),
    },
)
Mistral.sizes = size_table(
    {"model_type": "mistral", **_COMMON},
    _COLUMNS,
    {
        "Mistral-7B-v0.1": (32000, 32, 32, 8, 4096, 14336, 32768, {"sliding_window": 4096}),
        "Mistral-7B-v0.3": (32768, 32, 32, 8, 4096, 14336, 32768, {"rope_theta": 1e6, "sliding_window": None}),
    },
)
