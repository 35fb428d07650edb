"""Attention over a flat stream: ragged queries against ragged or paged keys and values.

One operation serves training batches, packed documents, prefills and decode steps. The reference below is a loop over
the sequences of the stream. On a GPU PyTorch's flash attention (Dao 2023) computes it where it can, for bf16 and
float16 without a soft cap or ALiBi; a decode step does not wait for the device, whichever way it goes. On a CPU
ops/cpu/attention.cpp computes it, and attention_backward.cpp its gradients (those of a cache excepted): there the bits
of a row's result depend neither on the rest of the batch nor on the number of threads. They do depend on whether at
most 8 queries of its sequence came in this step (decode) or more (prefill), in the last places. Over bf16 pages a
decode step multiplies pairs of bf16 where the CPU does, of float32 queries too; docs/kernels.md says what that costs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pagoda.ops import cpu


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    alibi: Tensor | None = None,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    max_seq_len: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v for every sequence of the stream on its own.

    q            (N, n_head, head_size); query heads share key heads in groups of n_head / n_kv_head
    k, v         without block_table: (N, n_kv_head, head_size), divided like q;
                 with it: pages (n_pages, page_size, n_kv_head, head_size)
    cu_seqlens   (S + 1,) int32: sequence s owns queries cu_seqlens[s] to cu_seqlens[s + 1]; max_seqlen is the longest
    block_table  (S, max_pages) int32: the pages of each sequence, in order
    seq_lens     (S,) int32: keys of each sequence, this step's included; its queries are the last of them;
                 max_seq_len is the longest
    window       a query sees the last `window` keys, itself included (0: all)
    softcap      scores become softcap * tanh(scores / softcap) (Gemma 2; 0: off)
    alibi        (n_head,) float32 slopes, added as slope * (key position - query position) (Press et al. 2021)
    k_scale      (n_pages, page_size, n_kv_head) float32: what an int8 cache is multiplied by; v_scale the same
    Returns (N, n_head, head_size) in q's dtype.
    """
    if _kernel_takes(q, k, v, cu_seqlens, block_table, seq_lens, k_scale, v_scale):
        return _kernel(
            q, k, v, cu_seqlens, scale, causal, window, softcap, alibi, block_table, seq_lens, k_scale, v_scale
        )
    if block_table is None and _kernel_trains(q, k, v, cu_seqlens) and not (softcap and alibi is not None):
        alibi = None if alibi is None else alibi.float().contiguous()
        run = _compiled if torch.compiler.is_compiling() else _Attention.apply
        out = run(q, k, v, cu_seqlens, alibi, scale, causal, window, softcap)
        return out[0] if torch.compiler.is_compiling() else out
    if alibi is None and not softcap and _flash_takes(q, k):
        return _flash(q, k, v, cu_seqlens, max_seqlen, scale, causal, window, block_table, seq_lens)
    if block_table is not None and max_seqlen == 1 and len(q) == len(seq_lens) and not q.is_cpu:
        return _decode(q, k, v, scale, window, softcap, alibi, block_table, seq_lens, k_scale, v_scale)
    parts, bounds = [], cu_seqlens.tolist()
    lengths = None if seq_lens is None else seq_lens.tolist()
    for s, (start, end) in enumerate(zip(bounds[:-1], bounds[1:])):
        if start == end:
            continue
        if block_table is None:
            keys, values = k[start:end], v[start:end]
        else:
            if lengths[s] < end - start:
                raise ValueError("seq_lens has fewer keys of a sequence than it has queries")
            pages = block_table[s, : -(-lengths[s] // k.shape[1])]
            keys = _gather(k, pages, lengths[s], k_scale, q.dtype)
            values = _gather(v, pages, lengths[s], v_scale, q.dtype)
        parts.append(_attend(q[start:end], keys, values, scale, causal, window, softcap, alibi))
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else q


def _gather(pages: Tensor, index: Tensor, length: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The first `length` rows (length, n_kv_head, head_size) of the pages in `index`: a view when it is one page."""
    if len(index) == 1:
        page = int(index)
        rows, steps = pages[page, :length], None if scale is None else scale[page, :length]
    else:
        rows = pages[index].flatten(0, 1)[:length]
        steps = None if scale is None else scale[index].flatten(0, 1)[:length]
    return rows.to(dtype) if steps is None else (rows.float() * steps[..., None]).to(dtype)


def _attend(q, k, v, scale, causal, window, softcap, alibi) -> Tensor:
    """One sequence: q (n_q, n_head, head_size) are the last n_q of the n_k positions of k and v."""
    n_q, n_head, _ = q.shape
    n_k, n_kv_head, _ = k.shape
    group, dtype = n_head // n_kv_head, q.dtype
    if cpu.emulates(q):
        q, k, v = q.float(), k.float(), v.float()
    if window >= n_k:
        window = 0
    if n_q == 1 and window:  # one query sees exactly the window: no mask needed
        k, v, n_k, window = k[-window:], v[-window:], window, 0
    masked = causal and n_q > 1
    if n_q > 1 and not softcap and alibi is None and q.is_cpu and not torch.is_grad_enabled():
        return _attend_tiles(q, k, v, scale, causal, window).to(dtype)
    if not softcap and alibi is None and not window and n_q == n_k and n_q > 1:
        heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
        y = F.scaled_dot_product_attention(*heads, is_causal=causal, scale=scale, enable_gqa=group > 1)
        return y[0].transpose(0, 1).to(dtype)

    if n_q == 1 and not softcap and alibi is None:  # the heads of a group as queries of one head: keys are read once
        grouped = (q.view(1, n_kv_head, group, -1), k.transpose(0, 1)[None], v.transpose(0, 1)[None])
        return F.scaled_dot_product_attention(*grouped, scale=scale).reshape(1, n_head, -1).to(dtype)

    # Scores by one batched product over key heads: the queries of a group read their keys once.
    grouped = q.view(n_q, n_kv_head, group, -1).permute(1, 2, 0, 3).reshape(n_kv_head, group * n_q, -1)
    scores = (grouped @ k.permute(1, 2, 0)).float() * scale  # (n_kv_head, group * n_q, n_k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if masked or window or alibi is not None:
        scores = scores.view(n_kv_head, group, n_q, n_k)
        distance = torch.arange(n_k, device=q.device) - torch.arange(n_k - n_q, n_k, device=q.device)[:, None]
        if alibi is not None:
            scores = scores + alibi.view(n_kv_head, group, 1, 1) * distance
        hidden = (distance > 0) if masked else torch.zeros_like(distance, dtype=torch.bool)
        if window:
            hidden = hidden | (distance <= -window)
        scores = scores.masked_fill(hidden, float("-inf")).view(n_kv_head, group * n_q, n_k)
    weights = scores.softmax(-1).to(v.dtype)
    y = weights @ v.transpose(0, 1)  # (n_kv_head, group * n_q, head_size)
    return y.view(n_kv_head, group, n_q, -1).permute(2, 0, 1, 3).reshape(n_q, n_head, -1).to(dtype)


def _attend_tiles(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int) -> Tensor:
    """The same for many queries on a CPU, by plain products for one key head and 128 queries at a time: a third faster
    than PyTorch's own there, and keys that no query of a tile sees cost nothing."""
    n_q, n_head, head_size = q.shape
    n_k, n_kv_head, _ = k.shape
    group, out = n_head // n_kv_head, torch.empty_like(q)
    square = torch.ones(128, 128, dtype=torch.bool)
    limit = q.new_full((128, 1, 128), float("inf")).masked_fill_(square.triu(1)[:, None], float("-inf"))
    for head in range(n_kv_head):
        heads = slice(head * group, (head + 1) * group)
        keys, values, queries = k[:, head].contiguous().T, v[:, head].contiguous(), q[:, heads]
        for start in range(0, n_q, 128):
            part = queries[start : start + 128]
            first, n = n_k - n_q + start, len(part)  # the position of its first query
            low, high = max(0, first - window + 1) if window else 0, first + n if causal else n_k
            scores = q.new_empty(n * group, high - low)
            torch.addmm(scores, part.reshape(-1, head_size), keys[:, low:high], beta=0, alpha=scale, out=scores)
            tile = scores.view(n, group, -1)
            if causal:  # only around the diagonal, and where a window ends, some keys are hidden
                near = tile[..., -n:]
                torch.minimum(near, limit[:n, :, :n], out=near)  # faster than a mask
            if window:
                tile[..., :n].masked_fill_(square[:n, :n].tril(first - window - low)[:, None], float("-inf"))
            out[start : start + n, heads] = (scores.softmax(-1) @ values[low:high]).view(n, group, -1)
    return out


def _flash_takes(q: Tensor, k: Tensor) -> bool:
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and k.dtype == q.dtype
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _flash(q, k, v, cu_seqlens, max_seqlen, scale, causal, window, block_table, seq_lens) -> Tensor:
    """What torch.nn.attention.varlen calls; before PyTorch 2.12 that takes no pages."""
    options, cu_keys, max_keys = {}, cu_seqlens, max_seqlen
    if block_table is not None:  # up to the table's end: a CUDA graph holds the call for longer sequences too
        options["seqused_k"], max_keys = seq_lens, block_table.shape[1] * k.shape[1]
        if _FLASH_PAGES and k.shape[1] % FLASH_PAGE == 0:
            options["block_table"], cu_keys = block_table, None
        else:
            k, v = k[block_table].flatten(0, 2), v[block_table].flatten(0, 2)
            cu_keys = torch.arange(0, len(k) + 1, max_keys, dtype=torch.int32, device=k.device)
    if window:
        options |= {"window_size_left": window - 1, "window_size_right": 0 if causal else -1}
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_keys, max_seqlen, max_keys, 0.0, causal, False, scale=scale, **options
    )[0]


_FLASH_PAGES = "block_table" in str(torch.ops.aten._flash_attention_forward.default._schema)
FLASH_PAGE = 256  # what the length of a page must be a multiple of


def _decode(q, k, v, scale, window, softcap, alibi, block_table, seq_lens, k_scale, v_scale) -> Tensor:
    """One query each, of all sequences together: every sequence's pages are gathered up to the table's end, so that
    nothing waits for the lengths (and a CUDA graph can hold the call)."""
    n, n_head, head_size = q.shape
    n_kv_head = k.shape[2]
    k, v = k[block_table].flatten(1, 2), v[block_table].flatten(1, 2)  # (S, keys, n_kv_head, head_size)
    if k_scale is not None:
        k, v = (x * s[block_table].flatten(1, 2)[..., None] for x, s in ((k, k_scale), (v, v_scale)))
    k, v = k.to(q.dtype), v.to(q.dtype)
    grouped = q.view(n, n_kv_head, -1, head_size)
    scores = (grouped @ k.permute(0, 2, 3, 1)).float() * scale  # (S, n_kv_head, group, keys)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(k.shape[1], device=q.device) - (seq_lens[:, None] - 1)  # (S, keys)
    if alibi is not None:
        scores = scores + alibi.view(n_kv_head, -1, 1) * distance[:, None, None]
    hidden = (distance > 0) | (distance <= -window) if window else distance > 0
    # What is behind a sequence's end may be anything, NaN too.
    v = v.masked_fill(hidden[..., None, None], 0)
    weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1).to(v.dtype)
    return (weights @ v.transpose(1, 2)).view(n, n_head, head_size)


def preferred_page_size(device: torch.device, longest: int) -> int:
    """Tokens per page of a cache for sequences of up to `longest` tokens.

    Small pages cost the kernel nothing. The reference reads a single page in place but must gather several, so that
    there a sequence gets one page of its own. Flash attention takes pages of FLASH_PAGE.
    """
    if device.type == "cuda":
        return min(FLASH_PAGE, longest)
    return 64 if device.type == "cpu" and cpu.kernels is not None else longest


def _kernel_takes(q, k, v, cu_seqlens, block_table, seq_lens, k_scale, v_scale) -> bool:
    if not (cpu.usable(q) and q.dtype in cpu.FLOATS and v.dtype == k.dtype and _are_bounds(cu_seqlens)):
        return False
    if block_table is None:
        return k.dtype in cpu.FLOATS
    return (
        k.dtype in cpu.DTYPE
        and (k.dtype == torch.int8) == (k_scale is not None and v_scale is not None)
        and k.is_contiguous()
        and v.is_contiguous()
        and block_table.dtype == torch.int32
        and block_table.stride(1) == 1
        and _are_bounds(seq_lens)
        and cpu.are_scales(k_scale, v_scale)
    )


def _are_bounds(x: Tensor) -> bool:
    return x.dtype == torch.int32 and x.is_contiguous()


def _kernel_trains(q, k, v, cu_seqlens) -> bool:
    takes = cpu.trains(q) or (torch.compiler.is_compiling() and cpu.kernels is not None and q.is_cpu)
    return takes and q.dtype in cpu.FLOATS and q.dtype == k.dtype == v.dtype and _are_bounds(cu_seqlens)


def _kernel(
    q, k, v, cu_seqlens, scale, causal, window, softcap, alibi,
    block_table=None, seq_lens=None, k_scale=None, v_scale=None, products=1, lse=None,
) -> Tensor:  # fmt: skip
    """`products`: 0 multiplies in float32 always, 1 in bf16 where the CPU does, 2 in bf16 even if emulated (tests).
    `lse` (N, n_head) float32 takes the log-sum-exp of each row of scores."""
    _, n_head, head_size = q.shape
    q = cpu.heads(q)
    out = torch.empty_like(q)
    if block_table is None:
        k, v, page_size, max_pages = cpu.heads(k), cpu.heads(v), 0, 0
        n_kv_head, strides = k.shape[1], (q.stride(0), k.stride(0), v.stride(0))
    else:
        _, page_size, n_kv_head, _ = k.shape
        max_pages, strides = block_table.stride(0), (q.stride(0), n_kv_head * head_size, n_kv_head * head_size)
    alibi = None if alibi is None else alibi.float().contiguous()
    tensors = cpu.pointers(out, q, k, v, cu_seqlens, block_table, seq_lens, k_scale, v_scale, alibi, lse)
    sizes = cu_seqlens.shape[0] - 1, n_head, n_kv_head, head_size, page_size, max_pages
    dtypes, options = (cpu.DTYPE[q.dtype], cpu.DTYPE[k.dtype]), (causal, window, scale, softcap, products)
    cpu.kernels.attention(*tensors, *sizes, *strides, *dtypes, *options)
    return out


# The same under gradients: kept is what goes in and out, and the log-sum-exp of each row of scores.


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, alibi: Tensor | None,
    scale: float, causal: bool, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, log-sum-exp (N, n_head) float32)."""
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    return _kernel(q, k, v, cu_seqlens, scale, causal, window, softcap, alibi, lse=lse), lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, alibi: Tensor | None, out: Tensor, lse: Tensor,
    scale: float, causal: bool, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    places = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    return _leave(places, grad, q, k, v, cu_seqlens, alibi, out, lse, scale, causal, window, softcap)


def _leave(places, grad, q, k, v, cu_seqlens, alibi, out, lse, scale, causal, window, softcap):
    """Writes the gradients of q, k and v to these places."""
    q, k, v, grad = cpu.heads(q), cpu.heads(k), cpu.heads(v), grad.contiguous()
    n, n_head, head_size = q.shape
    scratch = torch.empty(2, n, n_head, head_size) if k.shape[1] != n_head else None
    tensors = cpu.pointers(*places, scratch, grad, out, lse, q, k, v, cu_seqlens, alibi)
    sizes = cu_seqlens.shape[0] - 1, n_head, k.shape[1], head_size
    strides = (x.stride(0) for x in (q, k, v, *places[:2]))
    cpu.kernels.attention_backward(*tensors, *sizes, *strides, cpu.DTYPE[q.dtype], causal, window, scale, softcap)
    return places


def _joined(*parts: Tensor) -> Tensor | None:
    """The tensor (N, heads, head_size) whose heads the parts are, in this order, if there is one."""
    first, n_head = parts[0], sum(x.shape[1] for x in parts)
    at, stride = first.storage_offset(), (n_head * first.shape[2], first.shape[2], 1)
    storage = first.untyped_storage().data_ptr()
    for x in parts:
        if x.stride() != stride or x.storage_offset() != at or x.untyped_storage().data_ptr() != storage:
            return None
        at += x.shape[1] * x.shape[2]
    return first.as_strided((len(first), n_head, first.shape[2]), stride)


def split_heads(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """`x.split(sizes, dim=1)` of x (N, heads, head_size), whose gradient `attention` leaves in one piece."""
    return _SplitHeads.apply(x, sizes) if cpu.trains(x) else x.split(sizes, dim=1)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes):
        return x.split(sizes, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        whole = _joined(*grads)
        return torch.cat(grads, 1) if whole is None else whole, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, alibi, *options):
        q, k, v = cpu.heads(q), cpu.heads(k), cpu.heads(v)
        out, lse = _forward(q, k, v, cu_seqlens, alibi, *options)
        ctx.save_for_backward(q, k, v, cu_seqlens, alibi, out, lse)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kept = ctx.saved_tensors
        whole = _joined(*kept[:3])
        if whole is None:
            places = _backward(grad, *kept, *ctx.options)
        else:
            places = torch.empty_like(whole).split([x.shape[1] for x in kept[:3]], dim=1)
            _leave(places, grad, *kept, *ctx.options)
        return *places, None, None, None, None, None, None


# And as operations that torch.compile takes as they are. It would see pointers to no memory.

_compiled = torch.library.custom_op("pagoda::attention", _forward, mutates_args=())
_compiled_backward = torch.library.custom_op("pagoda::attention_backward", _backward, mutates_args=())


@_compiled.register_fake
def _(q, k, v, *_):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:2], dtype=torch.float32)


@_compiled_backward.register_fake
def _(grad, q, k, v, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]


def _way_back(ctx, grad, _):
    return *_compiled_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None, None


_compiled.register_autograd(_way_back, setup_context=_keep)
