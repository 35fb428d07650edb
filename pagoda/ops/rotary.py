"""Rotary position embedding (Su et al. 2021) and the write of keys and values into the pages of a cache."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pagoda.ops import cpu


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of their positions.

    q (N, n_head, head_size), k (N, n_kv_head, head_size); cos, sin (N, rotary_dim / 2) float32. Dimension i of the
    first half of rotary_dim pairs with dimension i of the second ("NeoX" layout); what lies behind rotary_dim passes.
    """
    if q.dtype in cpu.FLOATS and k.dtype == q.dtype and _angles_fit(cos, sin):
        if cpu.usable(q):
            return _kernel_rotary(q, k, cos, sin)
        if cpu.trains(q):
            return _Rotary.apply(q, k, cos, sin)
    return _rotate(torch.cat((q, k), 1), cos, sin).split((q.shape[1], k.shape[1]), 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half, n = cos.shape[-1], 2 * cos.shape[-1]
    cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]  # float32, and so are products
    a = x[..., :n].float()
    rotated = torch.addcmul(a * cos, a.roll(half, -1), sin).to(x.dtype)
    return rotated if n == x.shape[-1] else torch.cat((rotated, x[..., n:]), dim=-1)


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
    if _kernel_takes(k, v) and _pages_fit(k_pages, v_pages, slots, k_scale, v_scale):
        return _kernel_store(None, None, k, v, None, None, k_pages, v_pages, slots, k_scale, v_scale)
    for x, pages, scale in ((k, k_pages, k_scale), (v, v_pages, v_scale)):
        if scale is not None:
            step = x.float().abs().amax(-1) / 127
            scale.flatten(0, 1).index_copy_(0, slots, step)
            x = (x.float() / step.clamp_min(1e-30)[..., None]).round()
        pages.flatten(0, 1).index_copy_(0, slots, x.to(pages.dtype))


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
    if (
        _kernel_takes(q, k)
        and v.dtype == q.dtype
        and _angles_fit(cos, sin)
        and _pages_fit(k_pages, v_pages, slots, k_scale, v_scale)
    ):
        q = cpu.heads(q)
        q_out = q.new_empty(q.shape)
        _kernel_store(q_out, q, k, v, cos, sin, k_pages, v_pages, slots, k_scale, v_scale)
        return q_out
    q, k = rotary(q, k, cos, sin)
    store_kv(k, v, k_pages, v_pages, slots, k_scale, v_scale)
    return q


# The same by ops/cpu/rotary.cpp.


def _kernel_takes(a: Tensor, b: Tensor) -> bool:
    return cpu.usable(a) and a.dtype in cpu.FLOATS and b.dtype == a.dtype


def _angles_fit(cos: Tensor, sin: Tensor) -> bool:
    return cos.dtype == sin.dtype == torch.float32 and cos.is_contiguous() and sin.is_contiguous()


def _pages_fit(k_pages: Tensor, v_pages: Tensor, slots: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> bool:
    return (
        k_pages.dtype in cpu.DTYPE
        and v_pages.dtype == k_pages.dtype
        and (k_pages.dtype == torch.int8) == (k_scale is not None and v_scale is not None)
        and k_pages.is_contiguous()
        and v_pages.is_contiguous()
        and slots.dtype == torch.int64
        and slots.is_contiguous()
        and cpu.are_scales(k_scale, v_scale)
    )


def _kernel_store(q_out, q, k, v, cos, sin, k_pages, v_pages, slots, k_scale, v_scale) -> None:
    """Without q: only the write."""
    k, v = cpu.heads(k), cpu.heads(v)
    n, n_kv_head, head_size = k.shape
    n_head, half, q_stride = (0, 0, 0) if q is None else (q.shape[1], cos.shape[1], q.stride(0))
    n_slots = k_pages.shape[0] * k_pages.shape[1]
    cpu.kernels.rotary_store(
        *cpu.pointers(q_out, q, k, v, cos, sin, k_pages, v_pages, k_scale, v_scale, slots),
        *(n, n_slots, n_head, n_kv_head, head_size, half, q_stride, k.stride(0), v.stride(0)),
        *(cpu.DTYPE[k.dtype], cpu.DTYPE[k_pages.dtype]),
    )


def _kernel_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = cpu.heads(q), cpu.heads(k)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    n, n_head, head_size = q.shape
    sizes = n, n_head, k.shape[1], head_size, cos.shape[1], q.stride(0), k.stride(0)
    cpu.kernels.rotary(*cpu.pointers(q_out, k_out, q, k, cos, sin), *sizes, cpu.DTYPE[q.dtype])
    return q_out, k_out


class _Rotary(torch.autograd.Function):
    """The way back turns by the opposite angles."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _kernel_rotary(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k):
        cos, sin = ctx.saved_tensors
        return *_kernel_rotary(grad_q, grad_k, cos, -sin), None, None
