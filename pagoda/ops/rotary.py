"""Rotary position embedding (Su et al. 2021) and the write of keys and values into the pages of a cache."""

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of their positions.

    q (N, n_head, head_size), k (N, n_kv_head, head_size); cos, sin (N, rotary_dim / 2) float32. Dimension i of the
    first half of rotary_dim pairs with dimension i of the second ("NeoX" layout); what lies behind rotary_dim passes.
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), dim=-1)


def store_kv(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write keys and values (N, n_kv_head, head_size) into pages (n_pages, page_size, n_kv_head, head_size).

    slots (N,) int64 says where: page * page_size + offset. int8 pages keep a float32 scale per token and head,
    (n_pages, page_size, n_kv_head): the largest magnitude / 127.
    """
    for x, pages, scale in ((k, k_pages, k_scale), (v, v_pages, v_scale)):
        if scale is not None:
            step = x.float().abs().amax(-1) / 127
            scale.flatten(0, 1)[slots] = step
            x = (x.float() / step.clamp_min(1e-30)[..., None]).round()
        pages.flatten(0, 1)[slots] = x.to(pages.dtype)


def rotary_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`rotary`, then `store_kv` of the rotated keys; returns the rotated queries."""
    q, k = rotary(q, k, cos, sin)
    store_kv(k, v, k_pages, v_pages, slots, k_scale, v_scale)
    return q
