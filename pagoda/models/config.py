"""`Config`: what the base class needs to know about a model. Each family reads it from a Hugging Face `config.json`,
with the helpers below for what several families spell the same way. Dropout rates are not read: nothing here drops out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pagoda.common import PagodaError
from pagoda.ops.activations import HF_ACTIVATIONS


@dataclass
class Config:
    """The shape of a transformer and the variations that several families share.

    `hf` keeps the `config.json` that this was read from, for writing the model back.
    """

    # Size
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    intermediate_size: int
    block_size: int  # the longest context, in tokens
    n_kv_head: int = 0  # 0: as many as n_head
    head_size: int = 0  # 0: n_embd / n_head

    # Norms
    norm: str = "rms"  # rms | layer
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # 1: the stored weight is around zero (Gemma)
    qk_norm: bool = False  # RMS norm of every query and key head
    post_norm: bool = False  # a second norm behind attention and MLP, before the residual (Gemma 2 and 3)
    embd_norm: bool = False  # a norm behind the embedding (BLOOM)
    final_norm: bool = True

    # Residual stream
    parallel_residual: bool = False  # x + attention(norm(x)) + mlp(norm(x)) in one step
    shared_norm: bool = False  # ... with one norm for both branches
    embd_scale: float = 1.0  # the embedding is multiplied by this

    # Positions
    positions: str = "rotary"  # rotary | learned | alibi
    position_offset: int = 0  # added to learned positions (OPT: 2)
    rotary_dim: int = 0  # how much of a head rotates; 0: what rope says, or all of it
    rope: dict[str, Any] = field(default_factory=dict)  # rope_type, rope_theta, factor, ... (models/rope.py)
    rope_local: dict[str, Any] | None = None  # the same for layers with a window, where it differs (Gemma 3)

    # Attention
    qkv: str = "separate"  # separate | concatenated (q then k then v) | grouped (per key head: its queries, k, v)
    qkv_bias: bool = False
    attn_bias: bool = False  # of the output projection
    attn_scale: float = 0.0  # 0: 1 / sqrt(head_size)
    attn_softcap: float = 0.0
    windows: tuple[int, ...] = ()  # per layer: how many keys a query sees (0: all); empty: all in every layer

    # MLP
    mlp: str = "gated"  # gated | gated_fused (gate and up in one weight) | plain
    activation: str = "silu"
    mlp_bias: bool = False
    n_expert: int = 0
    n_expert_per_token: int = 0
    moe_intermediate_size: int = 0
    normalize_experts: bool = True  # the chosen experts' weights sum to one
    dense_layers: tuple[int, ...] = ()  # layers with a plain MLP in a mixture-of-experts model

    # Head
    tie_embeddings: bool = False
    head_bias: bool = False
    logit_softcap: float = 0.0

    init_std: float = 0.02
    hf: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "intermediate_size", "block_size"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise PagodaError(f"{name} must be a whole number above 0, not {size!r}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.rotary_dim = self.rotary_dim or int(self.head_size * self.rope.get("partial_rotary_factor", 1.0))
        self.attn_scale = self.attn_scale or self.head_size**-0.5
        self.windows = self.windows or (0,) * self.n_layer


# Our fields that most configurations spell alike.
COMMON_KEYS = {
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "intermediate_size": "intermediate_size",
    "block_size": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}


def config_of(hf: dict[str, Any], **own: Any) -> Config:
    """The fields that a family states, the others from COMMON_KEYS."""
    return Config(**{field: hf[key] for field, key in COMMON_KEYS.items() if field not in own}, **own)


def rope_params(hf: dict[str, Any], theta: float = 10000.0, partial: float = 1.0) -> dict[str, Any]:
    """Rotary parameters in the old spelling (`rope_theta`, `rope_scaling`, ...) or the new one (`rope_parameters`).

    theta and partial (how much of a head rotates) are the family's defaults.
    """
    params = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    for key, default in (("rope_theta", theta), ("partial_rotary_factor", partial)):
        if params.get(key) is None:
            params[key] = default if hf.get(key) is None else hf[key]
    params.setdefault("rope_type", params.get("type", "default"))
    if hf.get("original_max_position_embeddings"):
        params["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    return params


def layer_windows(hf: dict[str, Any], window: int | None, sliding: list[bool]) -> tuple[int, ...]:
    """The window of each layer (0: none), by `layer_types` where the configuration lists them, else by `sliding`."""
    if types := hf.get("layer_types"):
        if unknown := set(types) - {"full_attention", "sliding_attention"}:
            raise PagodaError(f"layer type '{unknown.pop()}' is not supported, only full and sliding attention")
        sliding = [t == "sliding_attention" for t in types]
    return tuple((window or 0) if s else 0 for s in sliding)


def activation_name(name: str) -> str:
    """Our name of an activation function in a Hugging Face configuration."""
    if name not in HF_ACTIVATIONS:
        raise PagodaError(f"activation '{name}' is not supported: known are {', '.join(HF_ACTIVATIONS)}")
    return HF_ACTIVATIONS[name]


def only(hf: dict[str, Any], **supported: Any) -> None:
    """Refuse other values of options that would change the results: these are the only ones that we support."""
    for key, value in supported.items():
        if hf.get(key, value) not in (None, value):
            raise PagodaError(f"{hf['model_type']} with {key} = {hf[key]!r} is not supported (only {value!r})")


def size_table(common: dict[str, Any], columns: str, rows: dict[str, tuple]) -> dict[str, dict[str, Any]]:
    """Known sizes, compactly: what all have in common, and by name the values of the columns; a dict may follow."""
    return {
        name: {**common, **dict(zip(columns.split(), row)), **(row[-1] if isinstance(row[-1], dict) else {})}
        for name, row in rows.items()
    }
