"""Tiny random models of every family, made by transformers, for tests that compare with it."""

import os
from pathlib import Path

import pytest
import torch
import transformers

from pagoda.models.batch import Batch, Cache

transformers.logging.set_verbosity_error()

GPU = os.environ.get("PAGODA_TEST_DEVICE", "cuda")  # with `cpu` and PAGODA_KERNELS=reference they run here
needs_gpu = pytest.mark.skipif(GPU == "cuda" and not torch.cuda.is_available(), reason="there is no GPU here")

SMALL = dict(vocab_size=96, num_hidden_layers=2, num_attention_heads=4, hidden_size=32)
KV = dict(SMALL, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64)


def rope(rope_type: str, theta: float = 10000.0, **more) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **more}}


LLAMA3 = rope(
    "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16, theta=100.0
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16, theta=1000.0)
YARN_TUNED = rope(
    "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8, beta_slow=2, mscale=0.7, mscale_all_dim=0.9
)
LONGROPE = rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.5, 2.0, 3.0, 4.0])
LONG_PARTIAL = rope("longrope", short_factor=[1.0, 1.2], long_factor=[1.5, 3.0], partial_rotary_factor=0.5)
QWEN3_MOE = dict(KV, head_dim=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
NEOX = dict(SMALL, intermediate_size=64, max_position_embeddings=64)
GPT2 = dict(vocab_size=96, n_layer=3, n_head=4, n_embd=32, n_positions=64)
PHI = dict(NEOX, num_key_value_heads=2)
GEMMA = dict(KV, head_dim=16)
GEMMA2 = dict(GEMMA, num_hidden_layers=4, sliding_window=6, query_pre_attn_scalar=24)
GEMMA3 = dict(GEMMA2, sliding_window_pattern=3)
BLOOM = dict(vocab_size=96, n_layer=2, n_head=4, hidden_size=32)
FALCON = dict(SMALL, max_position_embeddings=64)
FALCON_RW = dict(FALCON, alibi=True, bias=True, multi_query=False, parallel_attn=False)
OPT = dict(SMALL, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32)

# name: (model_type, options of transformers' configuration class)
VARIATIONS = {
    "llama": ("llama", KV),
    "llama-tied-biases-head_dim": (
        "llama",
        dict(KV, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16, rms_norm_eps=1e-3),
    ),
    "llama-gelu": ("llama", dict(KV, hidden_act="gelu")),
    "llama-linear": ("llama", dict(KV, **rope("linear", factor=4.0))),
    "llama-dynamic": ("llama", {**KV, "max_position_embeddings": 16, **rope("dynamic", factor=2.0)}),
    "llama-llama3": ("llama", dict(KV, **LLAMA3)),
    "llama-yarn": ("llama", dict(KV, **YARN)),
    "llama-yarn-tuned": ("llama", dict(KV, **YARN_TUNED)),
    "mistral": ("mistral", dict(KV, sliding_window=None)),
    "mistral-window": ("mistral", dict(KV, sliding_window=5)),
    "mixtral": ("mixtral", dict(KV, num_local_experts=4, num_experts_per_tok=2)),
    "mixtral-window": ("mixtral", dict(KV, num_local_experts=4, num_experts_per_tok=3, sliding_window=7)),
    "qwen2": ("qwen2", KV),
    "qwen2-tied": ("qwen2", dict(KV, tie_word_embeddings=True)),
    "qwen2-window": (
        "qwen2",
        dict(KV, num_hidden_layers=4, use_sliding_window=True, sliding_window=6, max_window_layers=2),
    ),
    "qwen2-layer_types": (
        "qwen2",
        dict(KV, use_sliding_window=True, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    ),
    "qwen3": ("qwen3", dict(KV, head_dim=16)),
    "qwen3-biases-yarn": ("qwen3", dict(KV, head_dim=16, attention_bias=True, tie_word_embeddings=True, **YARN)),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE),
    "qwen3_moe-normalized": (
        "qwen3_moe",
        dict(QWEN3_MOE, norm_topk_prob=True, use_sliding_window=True, sliding_window=6),
    ),
    "qwen3_moe-mixed": (
        "qwen3_moe",
        dict(QWEN3_MOE, num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[1]),
    ),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-sequential": (
        "gpt_neox",
        dict(NEOX, use_parallel_residual=False, hidden_act="gelu_fast", **rope("default", partial_rotary_factor=1.0)),
    ),
    "gpt_neox-no-bias": ("gpt_neox", dict(NEOX, attention_bias=False, hidden_act="gelu_new", tie_word_embeddings=True)),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied-inverse": (
        "gpt2",
        dict(GPT2, tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True, n_inner=40),
    ),
    "gpt2-unscaled": ("gpt2", dict(GPT2, scale_attn_weights=False, activation_function="relu")),
    "phi": ("phi", PHI),
    "phi-tied": ("phi", dict(PHI, tie_word_embeddings=True, **rope("default", partial_rotary_factor=0.75))),
    "phi3": ("phi3", dict(KV, pad_token_id=0)),
    "phi3-window-tied": ("phi3", dict(KV, pad_token_id=0, sliding_window=5, tie_word_embeddings=True)),
    "phi3-longrope": ("phi3", dict(KV, pad_token_id=0, original_max_position_embeddings=16, **LONGROPE)),
    "phi3-longrope-partial": (
        "phi3",
        dict(KV, pad_token_id=0, original_max_position_embeddings=16, **LONG_PARTIAL),
    ),
    "gemma": ("gemma", GEMMA),
    "gemma-biases-untied": ("gemma", dict(GEMMA, attention_bias=True, tie_word_embeddings=False, hidden_act="gelu")),
    "gemma2": ("gemma2", GEMMA2),
    "gemma2-no-caps": ("gemma2", dict(GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None)),
    "gemma2-low-caps": ("gemma2", dict(GEMMA2, attn_logit_softcapping=0.5, final_logit_softcapping=1.0)),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3-scaled-capped": (
        "gemma3_text",
        dict(
            GEMMA2,
            final_logit_softcapping=2.0,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        ),
    ),
    "bloom": ("bloom", BLOOM),
    "bloom-six-heads": ("bloom", dict(BLOOM, n_head=6, hidden_size=48, tie_word_embeddings=False)),
    "falcon-7b": ("falcon", FALCON),
    "falcon-40b": ("falcon", dict(FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon-11b": (
        "falcon",
        dict(
            FALCON,
            new_decoder_architecture=True,
            num_kv_heads=2,
            num_ln_in_parallel_attn=1,
            ffn_hidden_size=80,
            tie_word_embeddings=False,
        ),
    ),
    "falcon-rw": ("falcon", FALCON_RW),
    "opt": ("opt", OPT),
    "opt-350m": ("opt", dict(OPT, do_layer_norm_before=False, word_embed_proj_dim=16)),
    "opt-no-bias": ("opt", dict(OPT, enable_bias=False, _remove_final_layer_norm=True, tie_word_embeddings=False)),
}


def make(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A variation as transformers builds it, every parameter random: no norm of ones or bias of zeros hides a slip."""
    model_type, options = VARIATIONS[name]
    config = transformers.AutoConfig.for_model(model_type, **options)
    model = with_soft_caps(transformers.AutoModelForCausalLM.from_config(config))
    randomize(model, seed)
    return model.eval()


def with_soft_caps(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Not every version of transformers applies them in its other ways of attention."""
    if model.config.model_type == "gemma2":
        model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param_name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 1:
            p.copy_(0.2 * noise if param_name.endswith("bias") else p + 0.2 * noise)
        else:
            p.copy_(noise * (0.3 if "embed" in param_name or "wte" in param_name else 1.5 / p.shape[-1] ** 0.5))


def saved(name: str, path: Path, **options) -> transformers.PreTrainedModel:
    """The same, saved into path."""
    model = make(name)
    model.save_pretrained(path, **options)
    return model


def prompt(length: int, seed: int = 1, vocab_size: int = 96) -> torch.Tensor:
    return torch.randint(3, vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def hf_logits(model: transformers.PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return with_soft_caps(model)(ids[None]).logits[0]


@torch.no_grad()
def hf_greedy(model: transformers.PreTrainedModel, ids: torch.Tensor, n: int) -> list[int]:
    model.generation_config.eos_token_id = None
    out = model.generate(ids[None], max_new_tokens=n, do_sample=False, pad_token_id=0)
    return out[0, len(ids) :].tolist()


@torch.no_grad()
def greedy(model, prompts: list[torch.Tensor], n: int, page_size: int = 16, chunk: int = 10**9) -> list[list[int]]:
    """The n likeliest tokens behind each prompt, with a paged cache whose pages lie in shuffled order.

    All sequences share every step; prompts go in by chunks, so that steps mix prefills and decodes. Where longrope
    changes its factors, a sequence is computed again from its start, as transformers does.
    """
    n_pages = [-(-(len(p) + n) // page_size) for p in prompts]
    order = torch.randperm(sum(n_pages), generator=torch.Generator().manual_seed(2)).tolist()
    pages = [[order.pop() for _ in range(k)] for k in n_pages]
    table = torch.zeros(len(prompts), max(n_pages), dtype=torch.int32)
    for s, own in enumerate(pages):
        table[s, : len(own)] = torch.tensor(own)
    cache = Cache(model.cache_specs(), sum(n_pages), page_size, model.embed.weight.dtype, torch.device("cpu"))

    tokens, done = [p.tolist() for p in prompts], [0] * len(prompts)
    while True:
        live = [s for s, p in enumerate(prompts) if len(tokens[s]) < len(p) + n]
        if not live:
            return [t[len(p) :] for t, p in zip(tokens, prompts)]
        for s in live:
            limit = model.rope.recompute_beyond if model.rope else None
            if limit and done[s] == limit:
                done[s] = 0
        steps = {s: tokens[s][done[s] : done[s] + chunk] for s in live}
        slots = [
            pages[s][i // page_size] * page_size + i % page_size
            for s in live
            for i in range(done[s], done[s] + len(steps[s]))
        ]
        batch = Batch.of(
            [len(steps[s]) for s in live],
            past=[done[s] for s in live],
            scaling_lens=torch.tensor([len(tokens[s]) for s in live]),
            cache=cache,
            slots=torch.tensor(slots),
            block_table=table[live],
        )
        logits = model(torch.tensor([t for s in live for t in steps[s]]), batch, logits_at=batch.last())
        for s, row in zip(live, logits):
            done[s] += len(steps[s])
            if done[s] == len(tokens[s]):
                tokens[s].append(int(row.argmax()))


def generate(model, prompts: list[list[int]], sampling, kv_dtype: torch.dtype | None = None, **options):
    """The new tokens of each prompt; sampling is one for all, or a list. `options` are the engine's."""
    from pagoda.engine.engine import Engine
    from pagoda.engine.options import EngineOptions
    from pagoda.engine.request import Request

    engine = Engine(model, options=EngineOptions(kv_memory=0.05, **options), kv_dtype=kv_dtype)
    each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    tokens: list[list[int]] = [[] for _ in prompts]
    requests = [Request(list(p), o) for p, o in zip(prompts, each)]
    engine.run(requests, lambda i, piece: tokens[i].extend(piece.token_ids))
    return tokens
