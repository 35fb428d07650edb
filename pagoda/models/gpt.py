"""`GPT`: the transformer that all families share. Read it from top to bottom.

A stream of N tokens (several sequences, one behind the other, divided by a `Batch`) goes through
embedding -> blocks (norm, attention, norm, MLP, each added to the residual stream) -> norm -> head.
There is no padding and no second model for inference: training batches, packed documents, prefills and decode steps
are the same call. A family (llama.py, gpt_neox.py, ...) subclasses `GPT`, says how its `config.json` becomes a
`Config` and what its checkpoint calls our parameters, and overrides what no other family does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pagoda.common import PagodaError
from pagoda.models.batch import Batch, PagedKV, PagedKVCache
from pagoda.models.config import Config
from pagoda.models.layers import (
    Embedding,
    FusedGatedMLP,
    GatedMLP,
    LayerNorm,
    Linear,
    MoE,
    PlainMLP,
    RMSNorm,
    linear_together,
    n_elements,
    set_weight,
    weights_of,
)
from pagoda.models.rope import Rope, alibi_slopes
from pagoda.ops.attention import attention, split_heads
from pagoda.ops.loss import linear_cross_entropy
from pagoda.ops.norm import add
from pagoda.ops.rotary import rotary, rotary_store, store_kv

Angles = tuple[Tensor, Tensor]  # cos and sin, (N, rotary_dim / 2) each


def make_norm(config: Config, n: int) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(n, config.norm_eps, config.norm_offset)
    return LayerNorm(n, config.norm_eps)


def make_mlp(config: Config, layer: int) -> nn.Module:
    c = config
    if c.n_expert and layer not in c.dense_layers:
        size = c.moe_intermediate_size or c.intermediate_size
        return MoE(c.n_embd, size, c.activation, c.n_expert, c.n_expert_per_token, c.normalize_experts)
    kind = {"gated": GatedMLP, "gated_fused": FusedGatedMLP, "plain": PlainMLP}[c.mlp]
    return kind(c.n_embd, c.intermediate_size, c.activation, c.mlp_bias)


class Attention(nn.Module):
    """Attention of one layer: project, rotate, remember, attend, project back."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        c = self.config = config
        self.layer, self.window, self.scale = layer, c.windows[layer], c.attn_scale
        if c.qkv == "separate":
            self.q_proj = Linear(c.n_embd, c.n_head * c.head_size, c.qkv_bias)
            self.k_proj = Linear(c.n_embd, c.n_kv_head * c.head_size, c.qkv_bias)
            self.v_proj = Linear(c.n_embd, c.n_kv_head * c.head_size, c.qkv_bias)
        else:
            self.qkv_proj = Linear(c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_size, c.qkv_bias)
        self.o_proj = Linear(c.n_head * c.head_size, c.n_embd, c.attn_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_size, c.norm_eps, c.norm_offset)
            self.k_norm = RMSNorm(c.head_size, c.norm_eps, c.norm_offset)

    def cache_spec(self) -> PagedKV:
        """The memory that this layer keeps between steps."""
        return PagedKV(self.config.n_kv_head, self.config.head_size)

    def forward(
        self, x: Tensor, batch: Batch, angles: Angles | None, slopes: Tensor | None, cache: PagedKVCache | None
    ) -> Tensor:
        """x (N, n_embd) to (N, n_embd)."""
        c = self.config
        q, k, v = self.project(x)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if batch.virtual is not None:
            if angles is not None:
                q, k = rotary(q, k, *angles)
            k, v, angles = *batch.virtual.put(self.layer, k, v), None
        options = dict(scale=self.scale, window=self.window, softcap=c.attn_softcap, alibi=slopes)
        options |= dict(cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        if cache is None:
            if angles is not None:
                q, k = rotary(q, k, *angles)
            y = attention(q, k, v, **options)
        else:
            pages = (cache.k, cache.v, batch.slots, cache.k_scale, cache.v_scale)
            if angles is not None:
                q = rotary_store(q, k, v, *angles, *pages)
            else:
                store_kv(k, v, *pages)
            options |= dict(block_table=batch.block_table, seq_lens=batch.seq_lens, max_seq_len=batch.max_seq_len)
            y = attention(q, cache.k, cache.v, k_scale=cache.k_scale, v_scale=cache.v_scale, **options)
        return self.o_proj(y.flatten(1))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, n_embd) to q (N, n_head, head_size), k and v (N, n_kv_head, head_size)."""
        c = self.config
        if c.qkv == "separate":
            projected = linear_together(x, self.q_proj, self.k_proj, self.v_proj)
            return tuple(y.view(len(x), -1, c.head_size) for y in projected)
        if c.qkv == "concatenated":
            heads = self.qkv_proj(x).unflatten(-1, (-1, c.head_size))
            return split_heads(heads, [c.n_head, c.n_kv_head, c.n_kv_head])
        heads = self.qkv_proj(x).view(len(x), c.n_kv_head, -1, c.head_size)  # grouped: per key head its queries, k, v
        return heads[:, :, :-2].reshape(len(x), c.n_head, c.head_size), heads[:, :, -2], heads[:, :, -1]


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream."""

    attention_class: ClassVar[type[Attention]] = Attention

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config = config
        self.norm_1 = make_norm(config, config.n_embd)
        self.attn = self.attention_class(config, layer)
        if not config.shared_norm:
            self.norm_2 = make_norm(config, config.n_embd)
        self.mlp = make_mlp(config, layer)
        if config.post_norm:
            self.post_norm_1 = make_norm(config, config.n_embd)
            self.post_norm_2 = make_norm(config, config.n_embd)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """x (N, n_embd) to (N, n_embd); context is what attention needs besides: batch, angles, slopes, cache."""
        if self.config.parallel_residual:
            h = self.norm_1(x)
            branches = add(self.attn(h, *context), self.mlp(h if self.config.shared_norm else self.norm_2(x)))
            return add(x, branches)
        a = self.attn(self.norm_1(x), *context)
        if self.config.post_norm:
            a = self.post_norm_1(a)
        x, h = self.norm_2(x, a)
        m = self.mlp(h)
        if self.config.post_norm:
            m = self.post_norm_2(m)
        return add(x, m)


class GPT(nn.Module):
    """A decoder-only language model.

    What a family states: `model_types` (of Hugging Face configurations), `sizes` (known models: name to config.json),
    `defaults` (what transformers takes for keys that a config.json leaves out), `read_config`, and `names` (our module
    to the checkpoint's; `{}` stands for the layer). For what is stored another way: `transposed` (modules with
    (n_in, n_out) weights), `expert_names` (MoE weights stored one by one), `prefixes` (how else a name may begin) and
    `ignored` (a pattern of weights that are no part of the language model).
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    architectures: ClassVar[tuple[str, ...]] = ()
    sizes: ClassVar[dict[str, dict[str, Any]]] = {}
    defaults: ClassVar[dict[str, Any]] = {}
    names: ClassVar[dict[str, str]] = {}
    transposed: ClassVar[tuple[str, ...]] = ()
    expert_names: ClassVar[dict[str, tuple[str, ...]]] = {}
    prefixes: ClassVar[tuple[tuple[str, str], ...]] = ()
    ignored: ClassVar[str] = ""
    block_class: ClassVar[type[Block]] = Block
    changes = 0  # of what the modules are: adapters that were put on or merged
    compute_dtype: torch.dtype | None = (
        None  # of the residual stream, where it is not the parameters' (mixed precision)
    )

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> Config:
        """A Hugging Face `config.json`, completed by `defaults`, as our `Config`."""
        raise NotImplementedError

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.embed = Embedding(c.vocab_size, c.n_embd, c.embd_scale)
        if c.positions == "learned":
            self.pos_embed = Embedding(c.block_size + c.position_offset, c.n_embd)
        if c.embd_norm:
            self.embed_norm = make_norm(c, c.n_embd)
        self.layers = nn.ModuleList(self.block_class(c, i) for i in range(c.n_layer))
        if c.final_norm:
            self.norm = make_norm(c, c.n_embd)
        self.head = Linear(c.n_embd, c.vocab_size, c.head_bias)
        self.tie()
        self.rope = Rope(c.rope, c.rotary_dim, c.block_size) if c.positions == "rotary" else None
        self.rope_local = Rope(c.rope_local, c.rotary_dim, c.block_size) if c.rope_local else None
        self.slopes = alibi_slopes(c.n_head) if c.positions == "alibi" else None
        self.virtual: nn.Module | None = None  # tokens before every sequence (peft/virtual.py)

    def forward(
        self,
        tokens: Tensor,
        batch: Batch | None = None,
        *,
        targets: Tensor | None = None,
        logits_at: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Logits, or with targets the loss per token.

        tokens     (N,) int64 ids, or embeddings (N, n_embd), divided by `batch` (one sequence without it);
                   or (B, T) ids, or (B, T, n_embd): B sequences of T tokens
        targets    like the ids: what each position should predict, -100 for nothing; returns (N,) or (B, T) float32
                   losses in nats, without ever holding all logits
        logits_at  (M,) int64: the places of the stream to give logits for (all without it): (M, vocab_size)
        z_loss     adds this times the squared log-normalizer of the scores to every loss (Chowdhery et al. 2022)
        """
        lead = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape
        if len(lead) == 2:
            batch = batch or Batch.of([lead[1]] * lead[0], tokens.device)
            tokens = tokens.flatten(0, 1)
        x = self.hidden(tokens, batch or Batch.of([len(tokens)], tokens.device))
        if targets is not None:
            cap = self.config.logit_softcap
            losses = linear_cross_entropy(x, self.head.weight, targets.flatten(), self.head.bias, cap, z_loss)
            return losses if len(lead) == 1 else losses.view(lead)
        if logits_at is not None:
            return self.logits(x[logits_at])
        return self.logits(x).unflatten(0, lead)

    def hidden(self, tokens: Tensor, batch: Batch) -> Tensor:
        """The stream behind the last norm: (N, n_embd)."""
        if self.virtual is None:
            return self.transform(self.embed_tokens(tokens, batch), batch, *self.angles(batch))
        tokens, batch, real = self.virtual(self, tokens, batch)
        return self.transform(self.embed_tokens(tokens, batch), batch, *self.angles(batch))[real]

    def transform(self, x: Tensor, batch: Batch, angles: Angles | None, local_angles: Angles | None) -> Tensor:
        """The blocks and the last norm: (N, n_embd) to (N, n_embd)."""
        if self.slopes is not None and self.slopes.device != x.device:
            self.slopes = self.slopes.to(x.device)
        for i, block in enumerate(self.layers):
            local = local_angles is not None and self.config.windows[i] > 0
            cache = batch.cache.layers[i] if batch.cache is not None else None
            x = block(x, batch, local_angles if local else angles, self.slopes, cache)
        return self.norm(x) if self.config.final_norm else x

    def embed_tokens(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Ids (N,) or embeddings (N, n_embd) to the start of the residual stream."""
        c = self.config
        x = tokens if tokens.is_floating_point() else self.embed(tokens)
        if c.positions == "learned":
            if batch.max_seq_len > c.block_size:
                raise PagodaError(f"{batch.max_seq_len} tokens do not fit the model's context of {c.block_size}")
            x = x + self.pos_embed(batch.positions + c.position_offset)
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        return self.embed_norm(x) if c.embd_norm else x

    def angles(self, batch: Batch) -> tuple[Angles | None, Angles | None]:
        """Rotary cosines and sines of the stream, for full layers and (where they differ) for layers with a window."""
        if self.rope is None:
            return None, None
        lengths = batch.token_lens() if self.rope.by_length else None
        angles = self.rope(batch.positions, lengths, batch.max_seq_len)
        if self.rope_local is None:
            return angles, None
        lengths = batch.token_lens() if self.rope_local.by_length else None
        return angles, self.rope_local(batch.positions, lengths, batch.max_seq_len)

    def logits(self, x: Tensor) -> Tensor:
        """The head: (M, n_embd) to (M, vocab_size), soft-capped where the family does."""
        return self.cap_logits(self.head(x))

    def cap_logits(self, logits: Tensor) -> Tensor:
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    @property
    def device(self) -> torch.device:
        return self.layers[0].norm_1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream (packed weights have types of their own)."""
        return self.layers[0].norm_1.weight.dtype

    @property
    def n_virtual(self) -> int:
        """Virtual tokens before every sequence; with a cache, whoever owns it leaves room for them."""
        return 0 if self.virtual is None else self.virtual.n

    def cache_specs(self) -> list[PagedKV]:
        """The memory that each layer keeps between steps."""
        return [block.attn.cache_spec() for block in self.layers]

    def tie(self) -> None:
        """Let the head share the embedding's weight where the configuration says so (again after loading)."""
        if self.config.tie_embeddings:
            set_weight(self.head, "weight", self.embed.weight)

    def fresh_weights(self, generator: torch.Generator | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor) of every parameter as the families' papers and transformers start: normal with
        `init_std`, biases 0, norms 1. For a model on the meta device too, one tensor in memory at a time."""
        for name, p in weights_of(self):
            module = self.get_submodule(name.rpartition(".")[0])
            is_norm = isinstance(module, RMSNorm | LayerNorm)
            if name == "head.weight" and self.config.tie_embeddings:
                continue
            if name.endswith(".bias"):
                yield name, torch.zeros(p.shape)
            elif is_norm:
                yield name, torch.full(p.shape, 1.0 - getattr(module, "offset", 0.0))
            else:
                yield name, torch.empty(p.shape).normal_(0.0, self.config.init_std, generator=generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Give the parameters fresh weights."""
        for name, weight in self.fresh_weights(generator):
            self.get_parameter(name).copy_(weight)

    def n_params(self) -> int:
        """Number of parameters, shared ones once."""
        return sum({id(w): n_elements(w) for _, w in weights_of(self)}.values())

    def flops_per_token(self, seq_len: int) -> float:
        """Operations of a token's forward pass at a context of seq_len: 2 per weight used, and attention's."""
        c = self.config
        used = sum(n_elements(m.weight) for m in self.modules() if isinstance(m, Linear))
        for m in self.modules():
            if isinstance(m, MoE):
                used += (n_elements(m.gate_up) + n_elements(m.down)) * m.top_k // len(m.gate_up)
        seen = sum(min(w, seq_len) if w else seq_len for w in c.windows)
        return 2 * used + 4 * c.n_head * c.head_size * seen / 2
