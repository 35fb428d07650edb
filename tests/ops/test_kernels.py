"""The CPU kernels against the formulas in float64, on odd shapes, strides and page orders, for every variant."""

import itertools

import pytest
import torch

from pagoda.ops import attention as attention_file
from pagoda.ops import cpu
from pagoda.ops.activations import ACTIVATIONS, activation, gated
from pagoda.ops.attention import attention
from pagoda.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from pagoda.ops.rotary import rotary, rotary_store, store_kv

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# What rounding the result once costs, relative to the largest element.
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def close(result, exact, dtype=None, slack=1.0):
    assert result.shape == exact.shape
    scale = exact.abs().amax().clamp_min(1e-3) if exact.numel() else 1.0
    error = (result.double() - exact.double()).abs().amax() / scale if exact.numel() else 0.0
    assert error <= slack * ROUNDING[dtype or result.dtype], f"relative error {error:.2e}"


def strided(*shape, dtype=torch.float32, extra=5):
    """Random values whose rows stand apart, as a slice of a fused product's result."""
    n, width = shape[0], torch.Size(shape[1:]).numel()
    wide = torch.randn(n, width + extra).to(dtype)
    return wide[:, 2 : 2 + width].unflatten(1, shape[1:])


# ---------------------------------------------------------------------------------------------------------- attention


def exact_attention(q, k, v, scale, causal=True, window=0, softcap=0.0, alibi=None):
    """One sequence in float64: q (n_q, n_head, d) are the last of the positions of k, v (n_k, n_kv_head, d)."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(k)) - torch.arange(len(k) - len(q), len(k))[:, None]
    if alibi is not None:
        scores = scores + alibi.double()[:, None, None] * distance
    hidden = (distance > 0) & causal
    if window:
        hidden = hidden | (distance <= -window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


class Flat:
    """A stream of sequences with `queries[s]` new tokens of `lengths[s]`, their keys and values in shuffled pages."""

    def __init__(
        self, queries, lengths, n_head, n_kv_head, head_size, dtype, cache_dtype=None, page_size=16, **options
    ):
        self.queries, self.lengths = queries, lengths
        self.q = strided(sum(queries), n_head, head_size, dtype=dtype)
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
        self.options = {"scale": head_size**-0.5, **options}
        cache_dtype = cache_dtype or dtype
        counts = [-(-n // page_size) for n in lengths]
        order = torch.randperm(sum(counts) + 3).int()
        self.block_table = torch.full((len(lengths), max([1, *counts])), -(10**6), dtype=torch.int32)
        shape = (len(order), page_size, n_kv_head, head_size)
        self.pages = [torch.full(shape, 77).to(cache_dtype) for _ in range(2)]
        self.scales = (
            [torch.full(shape[:3], torch.nan) for _ in range(2)] if cache_dtype == torch.int8 else [None, None]
        )
        self.keys = []  # per sequence, what attention must see
        for s, n in enumerate(lengths):
            self.block_table[s, : counts[s]] = order[sum(counts[:s]) : sum(counts[: s + 1])]
            slots = (self.block_table[s].long()[:, None] * page_size + torch.arange(page_size)).flatten()[:n]
            rows = [torch.randn(n, n_kv_head, head_size).to(dtype) for _ in range(2)]
            store_kv(*rows, *self.pages, slots, *self.scales)
            read = [p.flatten(0, 1)[slots].double() for p in self.pages]
            if self.scales[0] is not None:
                read = [r * s.flatten(0, 1)[slots].double()[..., None] for r, s in zip(read, self.scales)]
            self.keys.append(read)

    def run(self, only=None, products=None):
        """Attention of the whole stream, or of sequence `only` alone."""
        chosen = range(len(self.queries)) if only is None else [only]
        bounds = self.cu_seqlens.tolist()
        q = torch.cat([self.q[bounds[s] : bounds[s + 1]] for s in chosen]) if only is not None else self.q
        counts = [self.queries[s] for s in chosen]
        cu_seqlens = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        lengths = torch.tensor([self.lengths[s] for s in chosen], dtype=torch.int32)
        table = self.block_table[list(chosen)]
        if products is not None:
            o = {"causal": True, "window": 0, "softcap": 0.0, "alibi": None, **self.options}
            rest = [o[name] for name in ("scale", "causal", "window", "softcap", "alibi")]
            return attention_file._kernel(q, *self.pages, cu_seqlens, *rest, table, lengths, *self.scales, products)
        return attention(
            q,
            *self.pages,
            cu_seqlens=cu_seqlens,
            max_seqlen=max([0, *counts]),
            block_table=table,
            seq_lens=lengths,
            max_seq_len=int(lengths.max()),
            k_scale=self.scales[0],
            v_scale=self.scales[1],
            **self.options,
        )

    def exact(self):
        bounds = self.cu_seqlens.tolist()
        parts = [
            exact_attention(self.q[bounds[s] : bounds[s + 1]], *self.keys[s], **self.options)
            for s in range(len(self.queries))
        ]
        return torch.cat(parts)


@pytest.mark.parametrize(("causal", "window"), [(False, 0), *((True, w) for w in (0, 1, 100, 128, 200))])
def test_reference_attention_of_many_queries(monkeypatch, causal, window):
    monkeypatch.setattr(cpu, "kernels", None)
    flat = Flat([300, 1, 2, 129], [300, 5, 40, 400], 6, 2, 16, torch.float32, window=window, causal=causal)
    with torch.no_grad():
        torch.testing.assert_close(flat.run().double(), flat.exact(), rtol=1e-4, atol=1e-5)


SHAPES = [(4, 4, 64), (9, 3, 64), (8, 1, 32), (6, 2, 80), (5, 5, 20), (2, 1, 128), (3, 3, 7)]


@pytest.mark.parametrize(("n_head", "n_kv_head", "head_size"), SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_over_shuffled_pages_matches_the_formula(kernels, n_head, n_kv_head, head_size, dtype):
    torch.manual_seed(0)
    flat = Flat([1, 3, 1, 40, 0, 70, 8, 1], [1, 5, 300, 40, 9, 201, 131, 128], n_head, n_kv_head, head_size, dtype)
    close(flat.run(), flat.exact())


@pytest.mark.parametrize(
    "options",
    [
        {"window": 37},
        {"window": 1},
        {"softcap": 5.0},
        {"alibi": torch.tensor([0.5, 0.25, 0.1, 0.01])},
        {"causal": False},
        {"causal": False, "window": 50},
        {"scale": -0.3},
        {"window": 130, "softcap": 3.0, "alibi": torch.tensor([0.5, 0.25, 0.1, 0.01]), "scale": 0.3},
    ],
)
def test_attention_options_match_the_formula(kernels, options):
    torch.manual_seed(1)
    flat = Flat([1, 5, 90, 8], [400, 205, 222, 8], 4, 2, 48, torch.float32, page_size=5, **options)
    close(flat.run(), flat.exact(), slack=3)


@pytest.mark.parametrize("page_size", [1, 3, 64, 512])
def test_any_page_size(kernels, page_size):
    torch.manual_seed(2)
    flat = Flat([1, 30], [150, 99], 4, 2, 32, torch.float32, page_size=page_size)
    close(flat.run(), flat.exact())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", [*FLOATS, torch.int8])
def test_query_and_cache_may_differ_in_dtype(kernels, dtype, cache_dtype):
    torch.manual_seed(3)
    flat = Flat([1, 2, 33], [140, 20, 70], 6, 2, 40, dtype, cache_dtype)
    close(flat.run(), flat.exact())


@pytest.mark.parametrize("head_size", [64, 36])
def test_prefill_in_pairs_of_bf16_matches_the_formula(kernels, head_size):
    """Rounding the weights to bf16 costs about as much again as rounding the result."""
    torch.manual_seed(4)
    flat = Flat([150, 9, 1], [150, 300, 50], 6, 2, head_size, torch.bfloat16)
    close(flat.run(products=2), flat.exact(), slack=2)
    close(flat.run(products=0), flat.exact())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 37}, {"softcap": 5.0, "window": 131}, {"causal": False}])
def test_decode_in_pairs_of_bf16_matches_the_formula(kernels, options, dtype):
    """Of rounded queries; the weights' rounding costs each value at most 2^-9 of itself."""
    torch.manual_seed(4)
    flat = Flat([1, 8, 3, 1, 2], [400, 205, 222, 1, 131], 6, 2, 64, dtype, torch.bfloat16, page_size=5, **options)
    got = flat.run(products=2)
    for s, rows in enumerate(got.split(flat.queries)):
        torch.testing.assert_close(flat.run(only=s, products=2), rows, rtol=0, atol=0)
    flat.q = flat.q.to(torch.bfloat16)
    torch.testing.assert_close(got.double(), flat.exact(), rtol=0, atol=2**-7)


def test_decode_over_many_thousand_keys_matches_the_formula(kernels):
    torch.manual_seed(5)
    flat = Flat([1, 2], [8900, 700], 2, 1, 32, torch.float32, page_size=48)
    close(flat.run(), flat.exact())


@pytest.mark.parametrize("dtype", FLOATS)
def test_ragged_keys_are_read_in_place_from_a_fused_product(kernels, dtype):
    torch.manual_seed(5)
    lengths = [5, 0, 1, 77, 130]
    fused = torch.randn(sum(lengths), (6 + 2 + 2) * 32).to(dtype)
    q, k, v = (x.unflatten(1, (-1, 32)) for x in fused.split([192, 64, 64], 1))
    bounds = [0, *itertools.accumulate(lengths)]
    out = attention(q, k, v, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), max_seqlen=130, scale=0.2)
    exact = [exact_attention(q[a:b], k[a:b], v[a:b], 0.2) for a, b in zip(bounds, bounds[1:]) if b > a]
    close(out, torch.cat(exact))


def test_no_tokens_at_all(kernels):
    q = torch.empty(0, 4, 16)
    zeros = torch.zeros(3, dtype=torch.int32)
    assert attention(q, q, q, cu_seqlens=zeros, max_seqlen=0, scale=1.0).shape == q.shape
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
    assert gated(torch.empty(0, 8), torch.empty(0, 8), "silu").shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 70])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(kernels, two_threads, dtype, window):
    torch.manual_seed(6)
    flat = Flat([1, 7, 200, 1, 30], [1500, 140, 333, 65, 30], 9, 3, 64, dtype, window=window)
    together = flat.run()
    alone = torch.cat([flat.run(only=s) for s in range(5)])
    assert torch.equal(together, alone)
    torch.set_num_threads(1)
    assert torch.equal(together, flat.run())


@pytest.mark.parametrize("window", [150, 151])
@pytest.mark.parametrize("n_head", [6, 8, 10])
def test_a_row_has_the_same_bits_however_the_prefill_is_cut(kernels, n_head, window):
    """Also a decode row beside the other drafts of a speculative step."""
    torch.manual_seed(7)
    whole = Flat([200], [200], n_head, 2, 64, torch.bfloat16, window=window)
    result = whole.run()
    for n, at_least in ((200 - 77, 9), (8, 1)):  # the last n queries as a step of their own
        whole.q, whole.queries = whole.q[-n:], [n]
        whole.cu_seqlens = torch.tensor([0, n], dtype=torch.int32)
        part = whole.run()
        if n >= at_least and n > 8:
            assert torch.equal(part, result[-n:])
    whole.q, whole.queries, whole.cu_seqlens = whole.q[-1:], [1], torch.tensor([0, 1], dtype=torch.int32)
    assert torch.equal(whole.run(), part[-1:])


CACHES = [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.int8)]


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES)
def test_decoding_has_the_same_bits_however_threads_divide_the_keys(kernels, two_threads, dtype, cache_dtype):
    """Between spans, or between the key heads of one."""
    torch.manual_seed(7)
    for n in (100, 257, 700, 2110, 4500):
        flat = Flat([1], [n], 9, 3, 64, dtype, cache_dtype, page_size=64)
        torch.set_num_threads(1)
        alone = flat.run()
        close(alone, flat.exact(), slack=3)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(alone, flat.run()), (n, threads)


@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES)
@pytest.mark.parametrize("window", [0, 333])
def test_a_decode_row_has_the_same_bits_beside_other_drafts(kernels, dtype, cache_dtype, window):
    torch.manual_seed(7)
    for n in (129, 700, 1551):
        flat = Flat([8], [n], 6, 2, 64, dtype, cache_dtype, page_size=16, window=window)
        beside = flat.run()
        for row in range(8):
            flat.lengths[0] = n - 7 + row
            q, flat.q, flat.queries = flat.q, flat.q[row : row + 1], [1]
            flat.cu_seqlens = torch.tensor([0, 1], dtype=torch.int32)
            assert torch.equal(flat.run()[0], beside[row]), (n, row)
            flat.q = q


@pytest.mark.parametrize("page_size", [6, 16, 64])
@pytest.mark.parametrize(("dtype", "cache_dtype"), CACHES)
def test_pages_side_by_side_are_read_as_scattered_ones_are(kernels, page_size, dtype, cache_dtype):
    torch.manual_seed(8)
    flat = Flat([1, 3, 1], [700, 90, 1100], 6, 2, 64, dtype, cache_dtype, page_size=page_size)
    scattered = flat.run()
    order = flat.block_table[flat.block_table >= 0].long()
    flat.pages = [p[order] for p in flat.pages]
    flat.scales = [s if s is None else s[order] for s in flat.scales]
    flat.block_table[flat.block_table >= 0] = torch.arange(len(order), dtype=torch.int32)
    assert torch.equal(flat.run(), scattered)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("lengths", [(0, 20), (20, 0), (20, 2)])
def test_fewer_keys_than_queries_are_an_error(kernels, monkeypatch, reference, lengths):
    flat = Flat((1, 3), (20, 20), 4, 2, 64, torch.float32)
    flat.lengths = lengths
    if reference:
        monkeypatch.setattr(cpu, "kernels", None)
    with pytest.raises(ValueError, match="fewer keys"):
        flat.run()


def test_lengths_and_scales_need_not_be_dense(kernels):
    flat = Flat((1, 1), (20, 50), 4, 2, 64, torch.float32, torch.int8)
    lengths, bounds = (torch.tensor(x, dtype=torch.int32)[::2] for x in ([20, 7, 50, 9], [0, 9, 1, 9, 2, 9]))
    wide = [torch.stack((s, s), -1)[..., 0] for s in flat.scales]
    tensors = dict(cu_seqlens=bounds, seq_lens=lengths, block_table=flat.block_table, k_scale=wide[0], v_scale=wide[1])
    y = attention(flat.q, *flat.pages, max_seqlen=1, max_seq_len=50, scale=0.125, **tensors)
    close(y, flat.exact())


def test_nan_and_infinity_reach_their_own_sequence_and_no_other(kernels):
    torch.manual_seed(8)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for queries in ([1, 1, 1], [20, 20, 20]):
            flat = Flat(queries, [20, 30, 40], 4, 2, 32, torch.float32)
            clean = flat.run()
            page = int(flat.block_table[1, 1])
            flat.pages[0][page, 0] = bad  # key 16 of the middle sequence
            flat.pages[1][page, 0] = bad
            out = flat.run()
            first, second, third = (slice(a, a + queries[0]) for a in (0, queries[0], 2 * queries[0]))
            assert torch.equal(out[first], clean[first])
            assert torch.equal(out[third], clean[third])
            assert not torch.equal(out[second], clean[second])
            flat.q[flat.cu_seqlens[1]] = torch.nan
            assert flat.run()[flat.cu_seqlens[1]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [401, 700])
def test_decoding_has_nan_and_infinity_where_the_formula_has(kernels, dtype, n):
    torch.manual_seed(8)
    for kind, key, bad in (
        (0, slice(None), -torch.inf),
        (0, n // 2, torch.nan),
        (1, n - 1, torch.inf),
        (1, 0, torch.inf),
    ):
        flat = Flat([1], [n], 6, 2, 64, dtype, page_size=n)
        flat.q = flat.q.abs() + 0.1
        flat.pages[kind][flat.block_table[0, 0], key] = bad
        flat.keys[0][kind][key] = bad
        out, exact = flat.run(), flat.exact()
        assert torch.equal(out.isnan(), exact.isnan())
        assert torch.equal(out.isinf(), exact.isinf())
        assert not out.isfinite().any()


# -------------------------------------------------------------------------------------------- rotary and cache writes


def exact_rotary(x, cos, sin):
    half = cos.shape[1]
    a, b, rest = x.double().split([half, half, x.shape[-1] - 2 * half], -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((a * c - b * s, b * c + a * s, rest), -1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "head_size", "half"), [(1, 64, 32), (37, 64, 32), (5, 80, 10), (3, 6, 3), (700, 32, 4)])
def test_rotary_matches_the_formula(kernels, dtype, n, head_size, half):
    q, k = strided(n, 6, head_size, dtype=dtype), strided(n, 2, head_size, dtype=dtype)
    angles = torch.rand(n, half) * 6
    for x, y in zip((q, k), rotary(q, k, angles.cos(), angles.sin())):
        close(y, exact_rotary(x, angles.cos(), angles.sin()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", [*FLOATS, torch.int8])
def test_rotary_store_is_rotary_then_store(kernels, dtype, cache_dtype):
    n, head_size = 19, 24
    q, k, v = (strided(n, heads, head_size, dtype=dtype) for heads in (4, 2, 2))
    angles = torch.rand(n, 8)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.randperm(6 * 5)[:n]
    results = []
    for fused in (True, False):
        pages = [torch.zeros(6, 5, 2, head_size, dtype=cache_dtype) for _ in range(2)]
        scales = [torch.zeros(6, 5, 2) if cache_dtype == torch.int8 else None for _ in range(2)]
        if fused:
            turned = rotary_store(q, k, v, cos, sin, *pages, slots, *scales)
        else:
            turned, turned_k = rotary(q, k, cos, sin)
            store_kv(turned_k, v, *pages, slots, *scales)
        results.append([turned, *pages, *(s for s in scales if s is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    values = pages[1].flatten(0, 1)[slots]
    if cache_dtype == torch.int8:
        step = scales[1].flatten(0, 1)[slots][..., None]
        assert torch.equal(step[..., 0], v.float().abs().amax(-1) / 127)
        assert torch.equal(values, (v.float() / step).round().to(torch.int8))
    else:
        assert torch.equal(values, v.to(cache_dtype))


@pytest.mark.parametrize("slot", [-1, 8])
def test_a_slot_outside_the_pages_is_an_error(kernels, slot):
    pages, k = torch.zeros(4, 4, 1, 16), torch.randn(2, 1, 16)
    with pytest.raises(IndexError):
        store_kv(k, k, pages[1:3], pages[1:3].clone(), torch.tensor([0, slot]))
    assert not pages.any()


def test_scales_of_a_wider_tensor_are_written_where_they_are(kernels):
    k, wide = torch.randn(3, 2, 16), torch.zeros(2, 1, 4, 4)
    pages = [torch.zeros(1, 4, 2, 16, dtype=torch.int8) for _ in range(2)]
    store_kv(k, k, *pages, torch.arange(3), wide[0][..., :2], wide[1][..., 2:])
    assert torch.equal(wide[0][0, :3, :2], k.abs().amax(-1) / 127)
    assert not wide[0][..., 2:].any()


def test_int8_cache_survives_zeros_and_poison(kernels):
    k = torch.zeros(3, 1, 16)
    k[1, 0, 3], k[2, 0, 3] = torch.nan, torch.inf
    pages, scales = (
        [torch.zeros(1, 4, 1, 16, dtype=torch.int8) for _ in range(2)],
        [torch.zeros(1, 4, 1) for _ in range(2)],
    )
    store_kv(k, k, *pages, torch.arange(3), *scales)
    assert scales[0][0, 0] == 0
    assert not pages[0][0, 0].any()
    assert not scales[0][0, 1:3].isfinite().any()


# -------------------------------------------------------------------------------------------- norms and activations


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "width"), [(1, 576), (3, 7), (65, 100), (300, 64), (2, 1)])
def test_norms_match_the_formula(kernels, dtype, n, width):
    x, delta = strided(n, width, dtype=dtype), strided(n, width, dtype=dtype, extra=9)
    weight, bias = torch.rand(width).to(dtype) + 0.5, torch.randn(width).to(dtype)

    def exact_rms(x):
        x = x.double()
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight.double())

    def exact_layer(x):
        return torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)

    slack = 20 if width == 1 else 1  # a variance of 0 leaves nothing but rounding
    close(rms_norm(x, weight, 1e-5, offset=1.0), exact_rms(x))
    close(rms_norm(x, weight.float(), 1e-5, offset=1.0), exact_rms(x))
    close(layer_norm(x, weight, bias, 1e-5), exact_layer(x), slack=slack)
    assert torch.allclose(layer_norm(x, weight, None, 1e-5) + bias, layer_norm(x, weight, bias, 1e-5), atol=0.1)
    total, y = add_rms_norm(x, delta, weight, 1e-5, offset=1.0)
    assert torch.equal(total, x + delta)
    close(y, exact_rms(total))
    total, y = add_layer_norm(x, delta, weight, bias, 1e-5)
    assert torch.equal(total, x + delta)
    close(y, exact_layer(total), slack=slack)


def test_weights_of_another_length_are_pytorchs_errors(kernels):
    x = torch.randn(2, 64)
    for weight in (torch.ones(8), torch.ones(80)):
        for norm in (lambda: rms_norm(x, weight, 1e-5), lambda: layer_norm(x, weight, None, 1e-5)):  # noqa: B023
            with pytest.raises(RuntimeError):
                norm()
    with pytest.raises(RuntimeError):
        layer_norm(x, torch.ones(64), torch.ones(8), 1e-5)
    assert activation(torch.tensor(1.0), "silu").shape == ()


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_activations_match_torch_in_float64(kernels, act, dtype):
    for shape in ((1, 1536), (67, 33), (2, 20000)):
        gate, up = strided(*shape, dtype=dtype) * 3, strided(*shape, dtype=dtype)
        exact = ACTIVATIONS[act](gate.double())
        close(activation(gate, act), exact)
        close(gated(gate, up, act), exact * up.double())
    extreme = torch.tensor([[-1e4, -90.0, -20.0, -0.0, 0.0, 1e-4, 20.0, 90.0, 1e4, torch.inf, torch.nan]]).to(dtype)
    ours, theirs = activation(extreme, act), ACTIVATIONS[act](extreme.double()).to(dtype)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.allclose(ours, theirs, rtol=0.02, atol=1e-6, equal_nan=True)


def test_norms_and_activations_have_the_same_bits_on_any_number_of_threads(kernels, two_threads):
    x = torch.randn(300, 576)
    calls = [lambda: rms_norm(x, x[0], 1e-5), lambda: gated(x, x + 1, "silu"), lambda: layer_norm(x, x[0], x[1], 1e-5)]
    two = [call() for call in calls]
    torch.set_num_threads(1)
    assert all(torch.equal(a, call()) for a, call in zip(two, calls))
    assert torch.equal(rms_norm(x[7:8], x[0], 1e-5), two[0][7:8])


def test_nan_and_infinity_stay_in_their_row(kernels):
    x = torch.randn(3, 50)
    x[1, 2] = torch.nan
    out = rms_norm(x, torch.ones(50), 1e-5)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    x[1, 2] = torch.inf
    assert layer_norm(x, torch.ones(50), None, 1e-5)[1].isnan().any()


def test_gradients_take_the_differentiable_reference(kernels):
    x = torch.randn(4, 16, requires_grad=True)
    with torch.enable_grad():
        gated(rms_norm(x, torch.ones(16), 1e-5), x, "silu").sum().backward()
    assert x.grad.isfinite().all()
