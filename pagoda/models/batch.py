"""`Batch`: how a flat stream of tokens divides into sequences; and the memory that layers keep between steps.

The same description serves training (no cache), prefill, decode and any mixture of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from pagoda.common import PagodaError, use_huge_pages


@dataclass
class Batch:
    """S sequences that share a stream of N tokens.

    positions     (N,) int64: where each token stands in its sequence
    cu_seqlens    (S + 1,) int32: sequence s owns tokens cu_seqlens[s] to cu_seqlens[s + 1] of the stream
    seq_lens      (S,) int32: length of each sequence so far, this step's tokens included
    max_seqlen    the most tokens that a sequence has in this step; max_seq_len the longest sequence so far
    scaling_lens  (S,) int32: the lengths that rotary scaling by length goes by, seq_lens if None. While a prompt goes
                  in by chunks, this is its whole length, so that the chunks make no difference
    With a cache:
    cache         one entry per layer
    slots         (N,) int64: where each token's key and value are written: page * page_size + offset
    block_table   (S, max_pages) int32: the pages of each sequence, in order
    With a prefix before the sequences (peft/virtual.py):
    virtual       the keys and values that its tokens bring along
    """

    positions: Tensor
    cu_seqlens: Tensor
    seq_lens: Tensor
    max_seqlen: int
    max_seq_len: int
    scaling_lens: Tensor | None = None
    cache: Cache | None = None
    slots: Tensor | None = None
    block_table: Tensor | None = None
    virtual: VirtualKV | None = None

    @classmethod
    def of(
        cls, lengths: list[int], device: torch.device | str = "cpu", past: list[int] | None = None, **cache
    ) -> Batch:
        """From the number of new tokens of each sequence and of those before them (`past`, none by default)."""
        past = past or [0] * len(lengths)
        totals, bounds = [n + p for n, p in zip(lengths, past)], [0, *accumulate(lengths)]
        before = np.repeat([p - start for p, start in zip(past, bounds)], lengths).astype(np.int64)
        return cls(
            positions=torch.from_numpy(before + np.arange(bounds[-1])).to(device),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(totals, dtype=torch.int32, device=device),
            max_seqlen=max(lengths, default=0),
            max_seq_len=max(totals, default=0),
            **cache,
        )

    def token_lens(self) -> Tensor:
        """(N,) int64: for each token the length of its sequence, for rotary scaling."""
        lens = self.seq_lens if self.scaling_lens is None else self.scaling_lens
        return lens.long().repeat_interleave(self.cu_seqlens.diff().long(), output_size=len(self.positions))

    def last(self) -> Tensor:
        """(S,) int64: where in the stream each sequence's last token of this step stands."""
        return self.cu_seqlens[1:].long() - 1


@dataclass
class VirtualKV:
    """Keys and values that stand in every layer for those of some tokens: rows (M,) int64 of the stream, and for each
    layer the two tensors (M, n_kv_head, head_size)."""

    rows: Tensor
    layers: list[tuple[Tensor, Tensor]]

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of the stream, (N, n_kv_head, head_size) each, with these in their places."""
        own_k, own_v = self.layers[layer]
        return k.index_copy(0, self.rows, own_k.to(k.dtype)), v.index_copy(0, self.rows, own_v.to(v.dtype))


@dataclass(frozen=True)
class PagedKV:
    """What an attention layer asks a cache for: keys and values of `n_kv_head` heads, a page at a time."""

    n_kv_head: int
    head_size: int

    def allocate(self, n_pages: int, page_size: int, dtype: torch.dtype, new: Callable[..., Tensor]) -> PagedKVCache:
        """new(shape, dtype) gives the memory."""
        shape = (n_pages, page_size, self.n_kv_head, self.head_size)
        k, v = (new(shape, dtype) for _ in range(2))
        if dtype != torch.int8:
            return PagedKVCache(k, v)
        return PagedKVCache(k, v, *(new(shape[:3], torch.float32) for _ in range(2)))

    def page_bytes(self, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page of keys and values, scales included."""
        row = self.head_size * dtype.itemsize + (4 if dtype == torch.int8 else 0)
        return 2 * page_size * self.n_kv_head * row


@dataclass
class PagedKVCache:
    """Keys and values of one layer: (n_pages, page_size, n_kv_head, head_size); int8 ones with float32 scales."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def copy(self, source: int, target: int) -> None:
        """One page onto another."""
        for t in (self.k, self.v, self.k_scale, self.v_scale):
            if t is not None:
                t[target] = t[source]


class Cache:
    """The memory of all layers, as each declares it (`cache_spec`). Who owns which page is the engine's business."""

    ALIGNMENT, HUGE = 256, 2**21  # bytes: where a tensor begins; a large page of the system

    def __init__(self, specs: list[PagedKV], n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device):
        self.page_size, self.n_pages = page_size, n_pages
        self.token_bytes = max((spec.page_bytes(1, dtype) for spec in specs), default=0)  # of a layer
        size = n_pages * sum(spec.page_bytes(page_size, dtype) for spec in specs)
        try:
            self.memory = torch.empty(size + 4 * self.ALIGNMENT * len(specs), dtype=torch.uint8, device=device)
        except RuntimeError as e:  # torch's allocators raise it when memory runs out
            raise PagodaError(
                f"no memory for a key/value cache of {size / 2**30:.1f} GiB: ask for a shorter context"
            ) from e
        self.in_huge_pages = device.type != "cpu"  # a GPU's driver has large pages of its own
        free = self.memory

        def new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            nonlocal free
            n = math.prod(shape) * dtype.itemsize
            place, free = free[:n], free[-(-n // self.ALIGNMENT) * self.ALIGNMENT :]
            return place.view(dtype).view(shape)

        self.layers = [spec.allocate(n_pages, page_size, dtype, new) for spec in specs]

    def expect(self, n_tokens: int) -> None:
        """So many tokens are there or about to come. Where they fill half of a page of 2 MB in every tensor, what was
        not touched yet is taken in such pages, which are read 2 to 10 % faster. Fewer tokens would leave them empty."""
        if not self.in_huge_pages and n_tokens * self.token_bytes >= self.HUGE:  # keys and values: half of it each
            use_huge_pages(self.memory.data_ptr(), self.memory.nbytes)
            self.in_huge_pages = True

    def copy(self, source: int, target: int) -> None:
        """One page onto another, in every layer."""
        for layer in self.layers:
            layer.copy(source, target)
