"""Gemma 1, 2 and 3 (Gemma Team 2024a, 2024b, 2025), the text models.

The embedding is multiplied by the root of its width, and norms store their weight around zero. Gemma 2 adds a norm
behind attention and MLP, caps on scores and logits, and a window in every other layer. Gemma 3 norms queries and keys
in place of the caps, has a window in five layers of six, and another rotary base there.
"""

from __future__ import annotations

from typing import Any

from pagoda.models.config import Config, layer_windows, only, rope_params, size_table
from pagoda.models.gpt import GPT
from pagoda.models.llama import LLAMA_NAMES, llama_config

_DEFAULTS = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
_DEFAULTS_2 = {
    **_DEFAULTS,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_POST_NORM_NAMES = {
    **LLAMA_NAMES,
    "layers.{}.post_norm_1": "model.layers.{}.post_attention_layernorm",
    "layers.{}.norm_2": "model.layers.{}.pre_feedforward_layernorm",
    "layers.{}.post_norm_2": "model.layers.{}.post_feedforward_layernorm",
}


def _gemma_config(hf: dict[str, Any], activation: str, **more: Any) -> Config:
    only(hf, use_bidirectional_attention=False)
    return llama_config(
        {**hf, "hidden_act": activation},
        norm_offset=1.0,
        embd_scale=hf["hidden_size"] ** 0.5,
        qkv_bias=hf["attention_bias"],
        attn_bias=hf["attention_bias"],
        **more,
    )


class Gemma(GPT):
    """Gemma 1 and CodeGemma."""

    model_types = ("gemma",)
    architectures = ("GemmaForCausalLM",)
    defaults = {**_DEFAULTS, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"}
    names = LLAMA_NAMES

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        act = hf["hidden_act"]
        return _gemma_config(hf, "gelu_pytorch_tanh" if act == "gelu" else act)  # its first configurations erred


class Gemma2(GPT):
    """Gemma 2."""

    model_types = ("gemma2",)
    architectures = ("Gemma2ForCausalLM",)
    defaults = {**_DEFAULTS_2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    names = _POST_NORM_NAMES

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        return _gemma_config(
            hf,
            hf["hidden_activation"],
            post_norm=True,
            attn_scale=hf["query_pre_attn_scalar"] ** -0.5,
            attn_softcap=hf["attn_logit_softcapping"] or 0.0,
            logit_softcap=hf["final_logit_softcapping"] or 0.0,
            windows=layer_windows(hf, hf["sliding_window"], [i % 2 == 0 for i in range(hf["num_hidden_layers"])]),
        )


class Gemma3(GPT):
    """Gemma 3: text models, and the text part of multimodal ones (saved as a text model)."""

    model_types = ("gemma3_text", "gemma3")
    architectures = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
    text_defaults = {
        **_DEFAULTS_2,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131072,
    }
    names = _POST_NORM_NAMES
    prefixes = (
        ("model.", "language_model.model."),
        ("model.", "model.language_model."),
        ("lm_head.", "language_model.lm_head."),
    )
    ignored = r"^(model\.)?(vision_tower|multi_modal_projector)\."

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        if hf["model_type"] == "gemma3":
            outer = {k: hf[k] for k in ("eos_token_id", "bos_token_id", "dtype", "tie_word_embeddings") if k in hf}
            hf = {**hf["text_config"], "tie_word_embeddings": True, **outer, "model_type": "gemma3_text"}
        hf = {**cls.text_defaults, **hf}
        only(hf, attn_logit_softcapping=None)
        every = hf.get("sliding_window_pattern") or 6
        full, local = _rope_pair(hf)
        config = _gemma_config(
            {**hf, "rope_parameters": full, "rope_scaling": None},
            hf["hidden_activation"],
            post_norm=True,
            qk_norm=True,
            attn_scale=hf["query_pre_attn_scalar"] ** -0.5,
            logit_softcap=hf.get("final_logit_softcapping") or 0.0,
            rope_local=local,
            windows=layer_windows(
                hf, hf["sliding_window"], [(i + 1) % every != 0 for i in range(hf["num_hidden_layers"])]
            ),
        )
        config.hf = hf
        return config


def _rope_pair(hf: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotary parameters of the layers without a window and of those with one, in either spelling."""
    new = hf.get("rope_parameters") or {}
    full = {**(new.get("full_attention") or {}), **(hf.get("rope_scaling") or {})}
    full = rope_params({"rope_parameters": full, "rope_theta": hf.get("rope_theta")}, theta=1e6)
    local = {"rope_parameters": new.get("sliding_attention"), "rope_theta": hf.get("rope_local_base_freq")}
    return full, rope_params(local, theta=10000.0)


_COLUMNS = "num_hidden_layers num_attention_heads num_key_value_heads hidden_size intermediate_size"
Gemma.sizes = size_table(
    {"model_type": "gemma", "vocab_size": 256000},
    _COLUMNS,
    {"gemma-2b": (18, 8, 1, 2048, 16384), "gemma-7b": (28, 16, 16, 3072, 24576)},
)
Gemma2.sizes = size_table(
    {"model_type": "gemma2", "vocab_size": 256000},
    _COLUMNS,
    {
        "gemma-2-2b": (26, 8, 4, 2304, 9216),
        "gemma-2-9b": (42, 16, 8, 3584, 14336),
        "gemma-2-27b": (46, 32, 16, 4608, 36864, {"head_dim": 128, "query_pre_attn_scalar": 144}),
    },
)
_LONG = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 1024}
_SHORT = {"vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512}
Gemma3.sizes = size_table(
    {"model_type": "gemma3_text", "vocab_size": 262208},
    _COLUMNS,
    {
        "gemma-3-270m": (18, 4, 1, 640, 2048, _SHORT),
        "gemma-3-1b-pt": (26, 4, 1, 1152, 6912, _SHORT),
        "gemma-3-4b-pt": (34, 8, 4, 2560, 10240, _LONG),
        "gemma-3-12b-pt": (48, 16, 8, 3840, 15360, _LONG),
        "gemma-3-27b-pt": (62, 32, 16, 5376, 21504, {**_LONG, "head_dim": 128, "query_pre_attn_scalar": 168}),
    },
)
