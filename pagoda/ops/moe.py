"""A mixture of experts: each token goes through the few MLPs that a router picked for it (Shazeer et al. 2017)."""

import torch
from torch import Tensor

from pagoda.ops.activations import gated
from pagoda.ops.linear import linear


def route(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Router logits (N, n_expert) to the weights (N, top_k) float32 and indices (N, top_k) of the chosen experts.

    Softmax in float32 over all experts, then the top_k; `normalize` makes the chosen weights sum to one
    (as Mixtral always does and Qwen3-MoE by `norm_topk_prob`).
    """
    weights, experts = logits.float().softmax(-1).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, act: str) -> Tensor:
    """Sum over each token's experts e of weight * (act(gate_e x) * up_e x) down_e.

    x (N, n_embd); gate_up (n_expert, 2 * intermediate_size, n_embd), gate rows first; down (n_expert, n_embd,
    intermediate_size), or lists of PackedWeights; weights, experts (N, top_k). Tokens are grouped by expert, so that
    each expert is one product.
    """
    out = torch.zeros_like(x)
    for e in experts.unique().tolist():
        token, choice = (experts == e).nonzero(as_tuple=True)
        gate, up = linear(x[token], gate_up[e]).chunk(2, dim=-1)
        y = linear(gated(gate, up, act), down[e])
        out.index_add_(0, token, (y * weights[token, choice, None]).to(x.dtype))
    return out
