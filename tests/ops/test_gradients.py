"""The ways back of the operations against autograd through the formulas in float64, for every kernel variant."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_kernels import close, exact_attention, exact_rotary, strided
from torch._dynamo.backends.debugging import aot_eager

from pagoda.ops import cpu, recompute
from pagoda.ops.activations import ACTIVATIONS, activation, gated
from pagoda.ops.attention import attention, split_heads
from pagoda.ops.formats import FORMATS, pack
from pagoda.ops.linear import linear
from pagoda.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from pagoda.ops.optim import adamw_, adamw_takes, norm_of, scale_
from pagoda.ops.rotary import rotary

SHAPES = [(4, 4, 64), (9, 3, 64), (8, 1, 32), (6, 2, 80), (3, 3, 7)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[*(cpu.available() or []), "reference"])
def path(request, monkeypatch):
    """One kernel variant after the other, and the references."""
    monkeypatch.setattr(cpu, "kernels", None if request.param == "reference" else cpu.load(request.param))
    return request.param


def check(ours, exact, *inputs, slack=1.0, rounded_to=None):
    """Results and gradients of `ours(*inputs)` are those of `exact` in float64, for a random upstream gradient.

    rounded_to: what gradients were rounded to once, where that is less than their dtype
    """
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    doubles = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    results, expected = ours(*leaves), exact(*doubles)
    if torch.is_tensor(results):
        results, expected = [results], [expected]
    upstream = [torch.randn(y.shape).to(y.dtype) for y in results]
    torch.autograd.backward(results, upstream)
    torch.autograd.backward(expected, [u.double() for u in upstream])
    for y, e in zip(results, expected):
        close(y, e, slack=slack)
    for x, e in zip(leaves, doubles):
        if x.is_floating_point():
            assert x.grad.dtype == x.dtype
            close(x.grad, e.grad, rounded_to, slack)


def exact_stream(bounds, **options):
    def run(q, k, v):
        parts = [exact_attention(q[a:b], k[a:b], v[a:b], **options) for a, b in itertools.pairwise(bounds) if b > a]
        return torch.cat(parts)

    return run


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("n_head", "n_kv_head", "head_size"), [(4, 4, 64), (9, 3, 64), (8, 1, 32), (6, 2, 80), (3, 3, 7)]
)
def test_attention_over_documents_in_a_row(path, two_threads, dtype, n_head, n_kv_head, head_size):
    torch.manual_seed(0)
    bounds = [0, *itertools.accumulate([1, 0, 5, 48, 131, 49, 8])]
    q, k, v = (strided(bounds[-1], n, head_size, dtype=dtype) for n in (n_head, n_kv_head, n_kv_head))
    options = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "max_seqlen": 131, "scale": head_size**-0.5}
    slack = 2 if path == "reference" else 1  # the reference rounds the weights to bf16
    check(lambda *x: attention(*x, **options), exact_stream(bounds, scale=head_size**-0.5), q, k, v, slack=slack)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n_head", "n_kv_head", "head_size"), SHAPES)
def test_attention_of_heads_side_by_side(path, two_threads, dtype, n_head, n_kv_head, head_size):
    """What one product gave; the gradient too comes in one piece, and in pieces where a part has another use."""
    torch.manual_seed(0)
    bounds, sizes = [0, 5, 70, 201], [n_head, n_kv_head, n_kv_head]
    options = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "max_seqlen": 131, "scale": head_size**-0.5}
    exact = exact_stream(bounds, scale=head_size**-0.5)
    heads = torch.randn(201, sum(sizes), head_size).to(dtype)

    def twice(heads):
        q, k, v = split_heads(heads, sizes)
        return attention(q, k, v, **options), k * 2

    check(lambda x: attention(*split_heads(x, sizes), **options), lambda x: exact(*x.split(sizes, 1)), heads, slack=2)
    check(twice, lambda x: (exact(*x.split(sizes, 1)), x.split(sizes, 1)[1] * 2), heads, slack=3)


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.01])


@pytest.mark.parametrize(
    "options",
    [
        {"window": 37},
        {"window": 2},
        {"softcap": 1.0},
        {"alibi": SLOPES},
        {"causal": False},
        {"causal": False, "window": 50},
        {"window": 60, "softcap": 0.7, "alibi": SLOPES, "scale": 0.3},
    ],
)
def test_attention_options(path, options):
    torch.manual_seed(1)
    bounds, options = [0, 90, 95, 222], {"scale": 0.2, **options}
    q, k, v = (torch.randn(222, n, 48) for n in (4, 2, 2))
    offsets = torch.tensor(bounds, dtype=torch.int32)
    ours = lambda *x: attention(*x, cu_seqlens=offsets, max_seqlen=127, **options)  # noqa: E731
    check(ours, exact_stream(bounds, **options), q, k, v, slack=3)


def test_no_tokens_at_all(path):
    q = torch.empty(0, 4, 16, requires_grad=True)
    attention(q, q, q, cu_seqlens=torch.zeros(3, dtype=torch.int32), max_seqlen=0, scale=1.0).sum().backward()
    x, weight = torch.empty(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    gated(rms_norm(x, weight, 1e-5), x, "silu").sum().backward()
    assert not weight.grad.any()


def test_attention_has_the_same_bits_on_any_number_of_threads(kernels, two_threads):
    q, k, v = (torch.randn(300, n, 32) for n in (6, 2, 2))
    options = {"cu_seqlens": torch.tensor([0, 200, 207, 300], dtype=torch.int32), "max_seqlen": 200, "scale": 0.2}

    def grads():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            attention(*leaves, **options).square().sum().backward()
        return [x.grad for x in leaves]

    two = grads()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(two, grads()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "width"), [(1, 576), (3, 7), (65, 100), (300, 64)])
def test_norms(path, dtype, n, width):
    torch.manual_seed(2)
    x, delta = strided(n, width, dtype=dtype), strided(n, width, dtype=dtype, extra=9)
    weight, bias = (torch.rand(width) + 0.5).to(dtype), torch.randn(width).to(dtype)

    def exact_rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight)

    def exact_layer(x, weight, bias):
        return F.layer_norm(x, (width,), weight, bias, 1e-5)

    def rounded(x, delta):  # the residual stream is held in dtype: its rounding is no error of the norm
        return (x + delta) + ((x + delta).to(dtype).double() - (x + delta)).detach()

    def exact_add_rms(x, delta, weight):
        return (total := rounded(x, delta)), exact_rms(total, weight)

    def exact_add_layer(x, delta, weight, bias):
        return (total := rounded(x, delta)), exact_layer(total, weight, bias)

    check(lambda x, w: rms_norm(x, w, 1e-5, offset=1.0), exact_rms, x, weight, slack=3)
    check(lambda x, w: rms_norm(x, w, 1e-5, offset=1.0), exact_rms, x, weight.float(), slack=3)
    check(lambda x, d, w: add_rms_norm(x, d, w, 1e-5, offset=1.0), exact_add_rms, x, delta, weight, slack=3)
    if path == "reference" and dtype != torch.float32:
        return  # PyTorch's own layer norm adds up the weight's gradient in x's dtype
    check(lambda x, w, b: layer_norm(x, w, b, 1e-5), exact_layer, x, weight, bias, slack=3)
    check(lambda x, d, w, b: add_layer_norm(x, d, w, b, 1e-5), exact_add_layer, x, delta, weight, bias, slack=3)


@pytest.mark.parametrize("width", [16, 17, 33, 100])
def test_layer_norm_of_rows_far_from_zero(path, width):
    """As near to float64 as PyTorch's own in float32, to a factor: a variance is no difference of large sums."""
    x, weight, bias, grad = torch.randn(8, width) + 1000, torch.randn(width), torch.randn(width), torch.randn(8, width)

    def slope(norm, dtype):
        leaf = x.clone().to(dtype).requires_grad_()
        norm(leaf, *(t.to(dtype) for t in (weight, bias))).backward(grad.to(dtype))
        return leaf.grad.double()

    def torchs(x, weight, bias):
        return F.layer_norm(x, (width,), weight, bias, 1e-5)

    exact, theirs = slope(torchs, torch.float64), slope(torchs, torch.float32)
    ours = slope(lambda x, w, b: layer_norm(x, w, b, 1e-5), torch.float32)
    assert (ours - exact).abs().max() <= 4 * (theirs - exact).abs().max()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "head_size", "half"), [(1, 64, 32), (37, 64, 32), (5, 80, 10), (3, 6, 3)])
def test_rotary(path, dtype, n, head_size, half):
    q, k = strided(n, 6, head_size, dtype=dtype), strided(n, 2, head_size, dtype=dtype)
    angles = torch.rand(n, half) * 6
    cos, sin = angles.cos(), angles.sin()
    check(
        lambda q, k: rotary(q, k, cos, sin), lambda q, k: (exact_rotary(q, cos, sin), exact_rotary(k, cos, sin)), q, k
    )


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_activations(path, act, dtype):
    for shape in ((1, 1536), (67, 33)):
        gate, up = strided(*shape, dtype=dtype) * 3, strided(*shape, dtype=dtype)
        check(lambda x: activation(x, act), ACTIVATIONS[act], gate, slack=2)
        check(lambda g, u: gated(g, u, act), lambda g, u: ACTIVATIONS[act](g) * u, gate, up, slack=2)


@pytest.mark.parametrize(("x_dtype", "dtype"), [(d, d) for d in FLOATS] + [(torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_gives_gradients_in_each_dtype(path, x_dtype, dtype, bias):
    x, weight = torch.randn(33, 40).to(x_dtype), torch.randn(24, 40).to(dtype)
    more = [torch.randn(24).to(dtype)] if bias else []
    native = None if cpu.emulates(x) else x_dtype  # PyTorch's products of bf16 give bf16
    check(linear, F.linear, x, weight, *more, slack=2, rounded_to=native)
    check(linear, F.linear, x.view(3, 11, 40), weight, *more, slack=2, rounded_to=native)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_costs_no_product(monkeypatch, dtype, frozen):
    tensors = [torch.randn(33, 40, dtype=dtype), torch.randn(24, 40, dtype=dtype)]
    tensors[1 - frozen].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(*tensors)
    assert len(kept) == 1
    assert kept[0].data_ptr() == tensors[frozen].data_ptr()
    y.sum().backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad is not None


def test_a_norm_or_gate_before_a_product_is_not_kept(path, monkeypatch):
    """Kept are the norm's input and gate and up; the gradients are those of the operations one by one."""
    monkeypatch.setattr(recompute, "SMALL", 0)
    torch.manual_seed(3)
    x, delta = torch.randn(20, 16), torch.randn(20, 16)
    weight, up, down = torch.rand(16), torch.randn(2 * 24, 16), torch.randn(16, 24)

    def mlp(x, delta, weight, up, down):
        total, h = add_rms_norm(x, delta, weight, 1e-5)
        gate, value = linear(h, up).chunk(2, -1)
        return total + linear(gated(gate, value, "silu"), down)

    def exact(x, delta, weight, up, down):
        total = x + delta
        h = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        gate, value = (h @ up.T).chunk(2, -1)
        return total + (F.silu(gate) * value) @ down.T

    check(mlp, exact, x, delta, weight, up, down, slack=5)
    if path == "reference":
        return
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t):
        y = mlp(*(t.requires_grad_() for t in (x, delta, weight, up, down)))
    assert len(kept) == 5  # three weights, x + delta, and what gate and up share
    assert y.requires_grad


@pytest.mark.parametrize("change", ["result", "input"])
def test_what_was_changed_in_place_is_not_made_again(path, monkeypatch, change):
    monkeypatch.setattr(recompute, "SMALL", 0)
    x, weight, gain = torch.randn(20, 16), torch.randn(8, 16).requires_grad_(), torch.rand(16)
    y = rms_norm(x, gain, 1e-5)
    (y if change == "result" else x).mul_(3)
    expected = torch.ones(20, 8).T @ y
    linear(y, weight).sum().backward()
    close(weight.grad, expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_through_a_packed_weight(path, format, dtype):
    packed, x = pack(torch.randn(1100, 70), format), torch.randn(5, 70).to(dtype).requires_grad_()
    grad = torch.randn(5, 1100).to(dtype)
    linear(x, packed).backward(grad)
    close(x.grad, grad.double() @ packed.dequantize().double(), slack=2)


def test_traced_operations_are_the_references(path):
    """What torch.compile sees of all but attention: the same numbers, and no pointers."""

    def layer(x, weight, up):
        x, h = add_rms_norm(x, linear(x, up), weight, 1e-5)
        q = linear(h, up).view(6, 2, 8)
        q, k = rotary(q, q, torch.ones(6, 4), torch.zeros(6, 4))
        return activation(q, "silu") + gated(k, q, "gelu")

    inputs = [torch.randn(6, 16), torch.rand(16), torch.randn(16, 16)]
    check(torch.compile(layer, backend="aot_eager", fullgraph=True), layer, *inputs, slack=5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traced_products(path, dtype, frozen):
    """Where products are kernels, they are operations of their own, both ways."""
    x, weight, bias = (torch.randn(s).to(dtype).requires_grad_() for s in ((3, 10, 34), (20, 34), (20,)))
    weight.requires_grad_(not frozen)
    inputs, seen, found = [t for t in (x, weight, bias) if t.requires_grad], [], []

    def backend(graph, given):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, given)

    torch._dynamo.reset()
    for function in (torch.compile(linear, backend=backend, fullgraph=True), linear):
        y = function(x, weight, bias)
        found.append([y, *torch.autograd.grad(y, inputs, torch.linspace(-1, 1, 600).view(3, 10, 20).to(dtype))])
    for ours, expected in zip(*found, strict=True):
        loose = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, expected, rtol=loose, atol=loose)
    assert any("pagoda.linear" in target for target in seen) == cpu.MULTIPLIES


@pytest.mark.parametrize("options", [{}, {"window": 37, "softcap": 0.7}, {"alibi": SLOPES, "causal": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traced_attention(path, dtype, options):
    """There the kernels are operations of their own, both ways."""
    bounds, options = [0, 90, 95, 222], {"scale": 0.2, **options}
    q, k, v = (strided(222, n, 48, dtype=dtype) for n in (4, 2, 2))
    offsets = torch.tensor(bounds, dtype=torch.int32)
    ours = lambda *x: attention(*x, cu_seqlens=offsets, max_seqlen=127, **options)  # noqa: E731
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    whole = path != "reference"  # that asks for the sequences' lengths, one by one
    check(torch.compile(ours, backend=backend, fullgraph=whole), exact_stream(bounds, **options), q, k, v, slack=3)
    assert any("pagoda.attention" in target for target in seen) == (path != "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_gradients_and_their_scaling(path, two_threads, dtype):
    shapes = [(), (0,), (3,), (16384,), (129, 257), (5, 7, 1111)]
    tensors = [torch.randn(s, generator=torch.Generator().manual_seed(len(s))).to(dtype) for s in shapes]
    tensors.append(torch.randn(70, 50).to(dtype).T)  # by columns
    expected = torch.cat([t.double().flatten() for t in tensors]).norm().item()
    norm = norm_of(tensors)
    assert norm == pytest.approx(expected, rel=1e-5)
    if cpu.kernels is not None:
        torch.set_num_threads(1)
        assert norm_of(tensors) == norm
    scaled = [(t.double() * 0.37).to(dtype) for t in tensors]
    scale_(tensors, 0.37)
    for t, expected in zip(tensors, scaled):
        torch.testing.assert_close(t, expected, rtol=0.01 if dtype == torch.bfloat16 else 1e-3, atol=0)
    tensors[3][100] = float("inf")
    assert norm_of(tensors) == float("inf")
    tensors[4][100, 3] = float("nan")
    assert norm_of(tensors) != norm_of(tensors)


@pytest.mark.parametrize("dtype", FLOATS)
def test_adamw_is_torchs_in_float64(path, two_threads, dtype):
    """Also that the threads make no difference, and that each parameter counts its own steps."""
    options = dict(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    start = [torch.randn(s, generator=torch.Generator().manual_seed(3)).to(dtype) for s in [(), (0,), (5,), (129, 257)]]
    exact = [p.double().requires_grad_() for p in start]
    optimizer = torch.optim.AdamW(exact, **options)

    def own() -> list:
        return [
            (p.clone(), torch.empty_like(p), torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())) for p in start
        ]

    ours, alone = own(), own()
    if path == "reference":
        assert not adamw_takes(ours)
        return
    for step in range(3):
        trained = range(step % 2, 4)  # the first is left out of a step
        for i in trained:
            ours[i][1].copy_(torch.randn(start[i].shape, generator=torch.Generator().manual_seed(step)))
            alone[i][1].copy_(ours[i][1])
            exact[i].grad = ours[i][1].double()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            assert adamw_takes([ours[i] for i in trained])
            for threads, tensors in ((2, ours), (1, alone)):
                torch.set_num_threads(threads)
                adamw_([tensors[i] for i in trained], **options)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    for p, mine, other in zip(exact, ours, alone):
        torch.testing.assert_close(mine[0].double(), p.detach(), rtol=tolerance, atol=tolerance)
        assert torch.equal(mine[0], other[0])
    assert [int(t[4]) for t in ours] == [2, 3, 3, 3]


def test_adamw_in_bf16_rounds_by_chance(kernels, two_threads):
    """Steps of a fortieth of what bf16 can tell apart add up; the same in every run. NaN stays."""

    def after(steps):
        p, grad = torch.ones(20000, dtype=torch.bfloat16), torch.ones(20000, dtype=torch.bfloat16)
        own = p, grad, grad.clone(), grad.clone(), torch.full((), 1e5)  # averages that have settled
        for _ in range(steps):
            adamw_([own], lr=1e-4, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0)
        return own

    p, _, average, square, _ = after(50)
    assert abs(p.double().mean() - 0.995) < 3e-4
    assert p.unique().numel() > 2  # neighbours of the mean, each by its chance
    assert abs(average.double().mean() - 1) < 1e-3
    assert abs(square.double().mean() - 1) < 1e-3
    assert torch.equal(p, after(50)[0])
    own = after(1)
    own[1][7] = torch.nan
    adamw_([own], lr=1e-4, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0)
    assert own[0].isnan().nonzero().tolist() == [[7]]
