"""Qwen 2, 2.5 and 3, and the mixture-of-experts models of Qwen 3.

Llama's layout; Qwen 2 has biases on queries, keys and values (Yang et al. 2024), Qwen 3 drops them and norms every
query and key head instead (Yang et al. 2025). A sliding window, where one is switched on, starts at some layer.
"""

from __future__ import annotations

from typing import Any

from pagoda.models.config import Config, layer_windows, size_table
from pagoda.models.gpt import GPT
from pagoda.models.llama import LLAMA_DEFAULTS, LLAMA_NAMES, llama_config

_DEFAULTS = {
    **LLAMA_DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _windows(hf: dict[str, Any]) -> tuple[int, ...]:
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    return layer_windows(hf, window, [i >= hf["max_window_layers"] for i in range(hf["num_hidden_layers"])])


class Qwen2(GPT):
    """Qwen 2 and 2.5, and what was distilled into them."""

    model_types = ("qwen2",)
    architectures = ("Qwen2ForCausalLM",)
    defaults = _DEFAULTS
    names = LLAMA_NAMES

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        return llama_config(hf, qkv_bias=True, windows=_windows(hf))


class Qwen3(GPT):
    """Qwen 3, the dense models."""

    model_types = ("qwen3",)
    architectures = ("Qwen3ForCausalLM",)
    defaults = {**_DEFAULTS, "head_dim": 128, "attention_bias": False}
    names = LLAMA_NAMES

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        bias = hf["attention_bias"]
        return llama_config(hf, qk_norm=True, qkv_bias=bias, attn_bias=bias, windows=_windows(hf))


class Qwen3MoE(GPT):
    """Qwen 3 with many small experts; some layers may keep one MLP."""

    model_types = ("qwen3_moe",)
    architectures = ("Qwen3MoeForCausalLM",)
    defaults = {
        **LLAMA_DEFAULTS,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    }
    names = {**LLAMA_NAMES, "layers.{}.mlp.router": "model.layers.{}.mlp.gate"}
    expert_names = {
        "layers.{}.mlp.gate_up": (
            "model.layers.{}.mlp.experts.{}.gate_proj.weight",
            "model.layers.{}.mlp.experts.{}.up_proj.weight",
        ),
        "layers.{}.mlp.down": ("model.layers.{}.mlp.experts.{}.down_proj.weight",),
    }

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        layers = range(hf["num_hidden_layers"])
        dense = set(hf.get("mlp_only_layers") or ()) | {i for i in layers if (i + 1) % hf["decoder_sparse_step"]}
        window = hf["sliding_window"] if hf["use_sliding_window"] else None
        return llama_config(
            hf,
            qk_norm=True,
            qkv_bias=hf["attention_bias"],
            attn_bias=hf["attention_bias"],
            windows=(window or 0,) * len(layers),
            n_expert=hf.get("num_local_experts") or hf["num_experts"],
            n_expert_per_token=hf["num_experts_per_tok"],
            moe_intermediate_size=hf["moe_intermediate_size"],
            normalize_experts=hf["norm_topk_prob"],
            dense_layers=tuple(sorted(dense)),
        )


_COLUMNS = (
    "num_hidden_layers num_attention_heads num_key_value_heads hidden_size intermediate_size max_position_embeddings"
)
_TIED = {"tie_word_embeddings": True}
_BIG = {"vocab_size": 152064, "rms_norm_eps": 1e-5}
Qwen2.sizes = size_table(
    {"model_type": "qwen2", "vocab_size": 151936, "rope_theta": 1e6},
    _COLUMNS,
    {
        "Qwen2-0.5B": (24, 14, 2, 896, 4864, 131072, _TIED),
        "Qwen2-1.5B": (28, 12, 2, 1536, 8960, 131072, _TIED),
        "Qwen2-7B": (28, 28, 4, 3584, 18944, 131072, {"vocab_size": 152064}),
        "Qwen2-72B": (80, 64, 8, 8192, 29568, 131072, _BIG),
        "Qwen2.5-0.5B": (24, 14, 2, 896, 4864, 32768, _TIED),
        "Qwen2.5-1.5B": (28, 12, 2, 1536, 8960, 131072, _TIED),
        "Qwen2.5-3B": (36, 16, 2, 2048, 11008, 32768, _TIED),
        "Qwen2.5-7B": (28, 28, 4, 3584, 18944, 131072, {"vocab_size": 152064}),
        "Qwen2.5-14B": (48, 40, 8, 5120, 13824, 131072, _BIG),
        "Qwen2.5-32B": (64, 40, 8, 5120, 27648, 131072, _BIG),
        "Qwen2.5-72B": (80, 64, 8, 8192, 29568, 131072, _BIG),
    },
)
Qwen3.sizes = size_table(
    {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "rope_theta": 1e6},
    _COLUMNS,
    {
        "Qwen3-0.6B": (28, 16, 8, 1024, 3072, 40960, _TIED),
        "Qwen3-1.7B": (28, 16, 8, 2048, 6144, 40960, _TIED),
        "Qwen3-4B": (36, 32, 8, 2560, 9728, 40960, _TIED),
        "Qwen3-8B": (36, 32, 8, 4096, 12288, 40960),
        "Qwen3-14B": (40, 40, 8, 5120, 17408, 40960),
        "Qwen3-32B": (64, 64, 8, 5120, 25600, 40960),
    },
)
Qwen3MoE.sizes = size_table(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "head_dim": 128,
        "rope_theta": 1e6,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    f"{_COLUMNS} moe_intermediate_size",
    {
        "Qwen3-30B-A3B": (48, 32, 4, 2048, 6144, 40960, 768),
        "Qwen3-235B-A22B": (94, 64, 4, 4096, 12288, 40960, 1536),
    },
)
