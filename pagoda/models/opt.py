"""OPT (Zhang et al. 2022): learned positions that start at row 2, layer norms, ReLU, biases, a tied head.

The 350m model alone norms behind each residual step instead of before each branch, and has an embedding narrower than
the stream, with a projection in and one out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pagoda.models.batch import Batch
from pagoda.models.config import Config, activation_name, config_of, only, size_table
from pagoda.models.gpt import GPT, Block
from pagoda.models.layers import Embedding, Linear


class OPTBlock(Block):
    """A block that can norm after the residual step (350m)."""

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        if self.config.hf["do_layer_norm_before"]:
            return super().forward(x, *context)
        x = self.norm_1(x + self.attn(x, *context))
        return self.norm_2(x + self.mlp(x))


class OPT(GPT):
    """OPT, 125m to 66b."""

    model_types = ("opt",)
    architectures = ("OPTForCausalLM",)
    defaults = {
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "activation_function": "relu",
        "init_std": 0.02,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    }
    names = {
        "embed": "model.decoder.embed_tokens",
        "pos_embed": "model.decoder.embed_positions",
        "project_in": "model.decoder.project_in",
        "project_out": "model.decoder.project_out",
        "layers.{}.norm_1": "model.decoder.layers.{}.self_attn_layer_norm",
        "layers.{}.attn.q_proj": "model.decoder.layers.{}.self_attn.q_proj",
        "layers.{}.attn.k_proj": "model.decoder.layers.{}.self_attn.k_proj",
        "layers.{}.attn.v_proj": "model.decoder.layers.{}.self_attn.v_proj",
        "layers.{}.attn.o_proj": "model.decoder.layers.{}.self_attn.out_proj",
        "layers.{}.norm_2": "model.decoder.layers.{}.final_layer_norm",
        "layers.{}.mlp.up_proj": "model.decoder.layers.{}.fc1",
        "layers.{}.mlp.down_proj": "model.decoder.layers.{}.fc2",
        "norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
    }
    prefixes = (("model.", ""),)
    block_class = OPTBlock

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        only(hf, layer_norm_elementwise_affine=True)
        return config_of(
            hf,
            intermediate_size=hf["ffn_dim"],
            norm="layer",
            norm_eps=1e-5,
            final_norm=hf["do_layer_norm_before"] and not hf["_remove_final_layer_norm"],
            positions="learned",
            position_offset=2,
            qkv_bias=hf["enable_bias"],
            attn_bias=hf["enable_bias"],
            mlp="plain",
            mlp_bias=hf["enable_bias"],
            activation=activation_name(hf["activation_function"]),
            init_std=hf["init_std"],
        )

    def __init__(self, config: Config):
        super().__init__(config)
        width = config.hf.get("word_embed_proj_dim") or config.n_embd
        self.project_in = self.project_out = None
        if width != config.n_embd:
            self.embed = Embedding(config.vocab_size, width)
            self.head = Linear(width, config.vocab_size)
            self.tie()
            self.project_in = Linear(width, config.n_embd)
            self.project_out = Linear(config.n_embd, width)

    def embed_tokens(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Ids (N,) or embeddings (N, word_embed_proj_dim) to the start of the residual stream."""
        x = tokens if tokens.is_floating_point() else self.embed(tokens)
        return super().embed_tokens(x if self.project_in is None else self.project_in(x), batch)

    def transform(self, x: Tensor, *context: Any) -> Tensor:
        """The blocks, and what the head reads: (N, n_embd) to (N, word_embed_proj_dim)."""
        x = super().transform(x, *context)
        return x if self.project_out is None else self.project_out(x)


OPT.sizes = size_table(
    {"model_type": "opt", "vocab_size": 50272},
    "num_hidden_layers num_attention_heads hidden_size ffn_dim",
    {
        "opt-125m": (12, 12, 768, 3072),
        "opt-350m": (24, 16, 1024, 4096, {"word_embed_proj_dim": 512, "do_layer_norm_before": False}),
        "opt-1.3b": (24, 32, 2048, 8192),
        "opt-2.7b": (32, 32, 2560, 10240),
        "opt-6.7b": (32, 32, 4096, 16384),
        "opt-13b": (40, 40, 5120, 20480),
        "opt-30b": (48, 56, 7168, 28672),
        "opt-66b": (64, 72, 9216, 36864),
    },
)
