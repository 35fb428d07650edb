"""The product with packed weights against float64, for every kernel variant: values, and the promise about bits."""

import pytest
import torch
from torch.nn.functional import pad

from pagoda.ops import cpu, formats
from pagoda.ops import linear as linear_module
from pagoda.ops.formats import FORMATS, GGUF_BLOCK, pack, pack_integers
from pagoda.ops.linear import embedding, linear, linear_many, multiplies, multiply

INTEGER = ["int8", "int4", "q4_0", "q4_1", "q8_0"]
# Sums of 1,024 and more go another way, and 2,100 have two windows of blocks that are rounded twice.
SHAPES = [(37, 100), (64, 64), (5, 7), (130, 257), (1, 33), (50, 1057), (20, 2100)]
ROWS = [1, 2, 7, 15, 25]
EPS = 2**-24


def rounded(x, fine=False):
    """The activations that the integer kernels multiply: blocks of 32 as int8 times absmax / 127, in float64.

    With `fine` (a GGUF file's own bits) an eighth of the blocks is exact to scale / 500, those with the largest scales
    of every 32 (the last ones and what is behind them).
    """
    blocks = pad(x.float(), (0, -x.shape[1] % 32)).view(len(x), -1, 32)
    absmax = blocks.abs().amax(-1, keepdim=True)
    quants = (blocks * torch.where(absmax > 1e-30, 127 / absmax, 0.0)).round()
    scale = absmax / 127
    values = quants.double() * scale.double()
    if fine:
        left = (blocks.double() - values).float()
        left = (left * (250 / scale)).round().nan_to_num(0.0).double() * (scale / 250).double()
        n_blocks, largest = scale.shape[1], []
        for start in range(0, max(n_blocks - 31, 1), 32):
            last = start + 64 > n_blocks
            n = -(-(n_blocks - start) // 8) if last else 4
            window = scale[:, start : None if last else start + 32, 0]
            largest.append(start + window.topk(n).indices)
        largest = torch.cat(largest, -1)
        values += torch.zeros_like(scale).scatter_(1, largest[..., None], 1.0) * left
    return values.flatten(1)[:, : x.shape[1]]


def assert_product(y, x, packed, plus=0.0, steps=None, slack=1e-30):
    """y = x w^T + plus, as closely as float32 sums of `steps` terms (every k, by default) permit.

    A sum of n terms in float32 differs by at most n * 2^-24 * the sum of their sizes; the terms' own roundings (scale
    times scale, times an integer) count as 8 more.
    """
    x, w = x.double(), packed.dequantize().double()
    sizes = x.abs() @ w.abs().T + (plus.abs() if torch.is_tensor(plus) else 0)
    if packed.minimums is not None:  # quant * scale and minimum cancel where the weight is small
        scale = packed._spread(packed.scales).flatten(0, 1)[: w.shape[0], : w.shape[1]].double()
        sizes = sizes + 2 * x.abs() @ (15 * scale).T
    error = (y.double() - (x @ w.T + plus)).abs()
    assert (error <= ((steps or x.shape[1]) + 8) * EPS * sizes + slack).all(), (error / sizes).max() / EPS


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_product_is_that_of_the_dequantized_matrix(kernels, format, shape):
    packed = pack(torch.randn(shape), format)
    packed.exact = True
    for rows in ROWS:
        x = torch.randn(rows, shape[1])
        assert_product(linear(x, packed), x, packed)


@pytest.mark.parametrize("format", INTEGER)
@pytest.mark.parametrize("shape", SHAPES)
def test_integer_product_is_that_of_the_rounded_activations(kernels, format, shape):
    packed = pack(torch.randn(shape), format)
    for rows in ROWS:
        x = torch.randn(rows, shape[1])
        fine = format in GGUF_BLOCK
        steps = 2 * (-(-shape[1] // 32)) + 40
        # What is left of a fine block may stand so near a half that it rounds the other way: here for two of a row.
        step = 2 * float(x.abs().max() / 127 / 250 * packed.dequantize().abs().max()) if fine else 1e-30
        assert_product(linear(x, packed), rounded(x, fine), packed, steps=steps, slack=step)


@pytest.mark.parametrize("format", INTEGER)
def test_integers_of_full_size_do_not_overflow(kernels, format):
    weight = torch.ones(20, 96)
    weight[:, ::32] = 0.0  # the others are the largest number of their format
    weight[10:] *= -1
    packed = pack(weight, format)
    for sign in (1.0, -1.0):
        x = torch.full((3, 96), sign)
        assert_product(linear(x, packed), rounded(x, format in GGUF_BLOCK), packed, steps=46)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(37, 100), (5, 7), (200, 330), (16, 64), (50, 1030)])
def test_bf16_in_12_bits_gives_the_bits_of_bf16(kernels, monkeypatch, shape, exact, two_threads):
    weight = torch.randn(shape)
    weight[torch.rand(shape) < 0.003] *= 2.0**-40  # exponents that are not in the table
    short = pack(weight, "bf16")
    monkeypatch.setattr(formats, "_pack_short", lambda weight: None)
    plain = pack(weight, "bf16")
    short.exact = plain.exact = exact
    assert (short.scales is None, plain.scales is None) == (False, True)
    for rows in (1, 2, 5, 12, 13, 16, 17, 24, 37, 70):
        x = torch.randn(rows, shape[1])
        assert torch.equal(linear(x, short), linear(x, plain))


@pytest.mark.parametrize("shape", SHAPES)
def test_product_in_bf16_is_that_of_the_rounded_matrix(kernels, shape):
    """With activations that bf16 holds exactly, so that no instruction set rounds them; NF4 may be rounded to bf16."""
    for format in ("bf16", "nf4"):
        packed = pack(torch.randn(shape), format)
        for rows in (1, 2, 7, 17, 33, 70):
            x = torch.randn(rows, shape[1]).bfloat16().float()
            rounding = 2**-8 * x.abs().double() @ packed.dequantize().abs().double().T if format == "nf4" else 0.0
            assert_product(linear(x, packed), x, packed, slack=rounding + 1e-30)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_groups(kernels, group_size, symmetric):
    packed = pack(torch.randn(37, 300), "int4", group_size, symmetric)
    for rows in ROWS:
        x = torch.randn(rows, 300)
        assert_product(linear(x, packed), rounded(x), packed, steps=64)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_extreme_quants_do_not_saturate(kernels, format):
    low, high = (-128, 127) if format == "int8" else (0, 15)
    for quant in (low, high):
        quants = torch.full((16, 320), quant, dtype=torch.int8 if low else torch.uint8)
        packed = pack_integers(quants, torch.ones(16, 1 if low else 10), None, format)
        for sign in (-1.0, 1.0):
            x = torch.full((3, 320), sign)
            torch.testing.assert_close(linear(x, packed), x @ packed.dequantize().T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("exact", "n_in"), [(False, 320), (True, 320), (False, 1088)])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(kernels, format, exact, n_in, two_threads):
    packed, other = pack(torch.randn(200, n_in), format), pack(torch.randn(72, n_in), "q8_0")
    packed.exact = exact
    packed.invariant = format == "nf4" and kernels.__name__.endswith("_amx")  # all else is so by itself
    x, bias, residual = torch.randn(200, n_in), torch.randn(200), torch.randn(200, 200)
    y = linear(x, packed, bias, residual)
    for first, last in ((0, 1), (0, 8), (0, 12), (4, 20), (0, 32), (3, 5), (7, 20), (20, 161)):
        rows = slice(first, last)
        assert torch.equal(linear(x[rows], packed, bias, residual[rows]), y[rows])
        assert torch.equal(linear_many(x[rows], [other, packed])[1], linear(x[rows], packed))
    torch.set_num_threads(1)
    assert torch.equal(linear(x, packed, bias, residual), y)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_activations(kernels, format, dtype):
    packed = pack(torch.randn(37, 100), format)
    x, bias, residual = torch.randn(9, 100).to(dtype), torch.randn(37).to(dtype), torch.randn(9, 37).to(dtype)
    y, same = linear(x, packed, bias, residual), linear(x.float(), packed, bias.float(), residual.float())
    assert y.dtype == dtype
    assert torch.equal(y, same.to(dtype))


def test_strides_and_leading_dimensions(kernels):
    packed, wide = pack(torch.randn(37, 100), "q4_1"), torch.randn(6, 230)
    y = linear(wide[:, 50:150].contiguous(), packed)
    assert torch.equal(linear(wide[:, 50:150], packed), y)
    assert torch.equal(linear(wide[:, 50:150].t().contiguous().t(), packed), y)
    assert torch.equal(linear(wide[:, 50:150].reshape(2, 3, 100), packed), y.view(2, 3, 37))
    assert torch.equal(linear(wide[0, 50:150], packed), y[0])
    assert linear(wide[:0, 50:150], packed).shape == (0, 37)
    with pytest.raises(ValueError, match="columns"):
        linear(wide, packed)


def test_what_is_added_may_be_of_another_dtype_shape_or_stride(kernels):
    packed, x = pack(torch.randn(37, 100), "int8"), torch.randn(6, 100)
    y, bias, residual = linear(x, packed), torch.randn(37, 2)[:, 0], torch.randn(37, 6).t()
    assert torch.equal(linear(x, packed, bias), linear(x, packed, bias.contiguous()))
    assert torch.equal(linear(x, packed, bias.double()), linear(x, packed, bias.contiguous()))
    torch.testing.assert_close(linear(x, packed, bias, residual), y + bias + residual)
    torch.testing.assert_close(linear(x, packed, bias[:1], bias), y + bias[0] + bias)
    torch.testing.assert_close(linear(x[0], packed, None, residual[0]), y[0] + residual[0])
    for wrong in (bias[:3], bias.repeat(2)):
        with pytest.raises(RuntimeError):
            linear(x, packed, wrong)
    with pytest.raises(ValueError, match="columns"):
        linear_many(x, [packed, pack(torch.randn(37, 64), "int8")])


def test_rows_by_ids_of_another_type(kernels):
    matrix, ids = torch.randn(10, 4), torch.tensor([1, 0, 9, 0], dtype=torch.int32)
    for weight in (matrix, pack(matrix, "float32")):
        assert torch.equal(embedding(ids, weight), matrix[ids])


def test_mixed_formats_in_one_call(kernels):
    weights = [pack(torch.randn(n, 96), format) for n, format in zip((40, 3, 16, 17, 33, 5, 64, 2), FORMATS)]
    for rows in (1, 30):
        x = torch.randn(rows, 96)
        for y, weight in zip(linear_many(x, weights), weights):
            assert torch.equal(y, linear(x, weight))


@pytest.mark.parametrize("format", FORMATS)
def test_not_a_number_and_infinity_stay_in_their_row(kernels, format):
    packed = pack(torch.randn(20, 70), format)
    clean = torch.randn(5, 70)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = clean.clone()
        x[1, 3] = bad
        y = linear(x, packed)
        assert not y[1].isfinite().any()
        assert torch.equal(y[[0, 2, 3, 4]], linear(clean, packed)[[0, 2, 3, 4]])
    assert torch.equal(linear(torch.zeros(2, 70), packed), torch.zeros(2, 20))
    assert linear(torch.full((1, 70), 1e-38), packed).abs().max() < 1e-35


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_is_the_dequantized_row(kernels, format, dtype):
    packed = pack(torch.randn(37, 100).to(dtype), format)
    ids = torch.tensor([36, 0, 17, 17, 5, 31, 32, 2, 3, 4] * 3)
    assert torch.equal(embedding(ids, packed), packed.dequantize(dtype)[ids])
    assert embedding(ids[:0], packed).shape == (0, 100)
    for outside in (-1, 37):
        with pytest.raises(IndexError):
            embedding(torch.tensor([outside]), packed)


@pytest.mark.parametrize("rows", [5, 60])  # few, and as many as a matrix unit multiplies
@pytest.mark.parametrize("format", INTEGER)
def test_variants_agree_on_the_integers(format, rows):
    """Integer products are exact, and AVX2, AVX-512 and AMX scale them by the same operations."""
    variants = [v for v in cpu.available() if v != "portable"]
    packed, x = pack(torch.randn(48, 96), format), torch.randn(rows, 96)
    results = []
    for variant in variants:
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "kernels", cpu.load(variant))
            results.append(linear(x, packed))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("format", FORMATS)
def test_reference_without_kernels(monkeypatch, format):
    monkeypatch.setattr(cpu, "kernels", None)
    packed, x, bias = pack(torch.randn(37, 100), format), torch.randn(3, 100), torch.randn(37)
    with torch.no_grad():
        assert_product(linear(x, packed, bias), x, packed, bias)
        assert torch.equal(linear_many(x, [packed])[0], linear(x, packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 70), (70,), (1, 1, 70)])
def test_one_row_of_plain_weights(dtype, shape):
    """It goes around oneDNN, which is switched off for it and must be on again."""
    x, bias = torch.randn(shape).to(dtype), torch.randn(37).to(dtype)
    wide = torch.randn(37, 140).to(dtype)
    for weight in (wide[:, :70].contiguous(), wide[:, 70:], torch.randn(70, 37).to(dtype).T):
        with torch.no_grad():
            for b in (None, bias):
                exact = x.double() @ weight.double().T + (0 if b is None else b.double())
                y = linear(x, weight, b)
                assert (y.dtype, y.shape) == (dtype, exact.shape)
                torch.testing.assert_close(
                    y.double(), exact, rtol=3 * torch.finfo(dtype).eps, atol=30 * torch.finfo(dtype).eps
                )
    assert torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize("format", FORMATS)
def test_gradient_of_the_activations(format):
    packed, residual = pack(torch.randn(37, 100), format), torch.randn(4, 37)
    packed.exact = True
    x, bias = torch.randn(4, 100, requires_grad=True), torch.randn(37, requires_grad=True)
    y = linear(x, packed, bias, residual)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ packed.dequantize(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, grad.sum(0))
    with torch.no_grad():
        assert torch.equal(linear(x.detach(), packed), linear(x, packed))


@pytest.mark.parametrize("rows", [5, 130])
def test_nf4_under_gradients_in_bf16(rows):
    packed, x = pack(torch.randn(2100, 96), "nf4"), torch.randn(rows, 96).bfloat16().requires_grad_()
    y = linear(x, packed)
    exact = x.detach().double() @ packed.dequantize().double().T
    torch.testing.assert_close(y.detach().double(), exact, rtol=2**-7, atol=0.1)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad.double(), grad.double() @ packed.dequantize().double(), rtol=2**-6, atol=1.0)


def test_memory_for_casts_that_an_inference_made_is_good_for_training():
    linear_module._LOCAL.__dict__.clear()
    weight, x = torch.randn(48, 96, requires_grad=True), torch.randn(5, 96)
    with torch.inference_mode():
        linear_module.linear_transposed(torch.randn(5, 48).bfloat16(), weight.detach())
    linear(x.bfloat16(), weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(48, -1), rtol=2**-6, atol=0.1)


def test_training_in_float32_does_not_round_nf4_to_bf16():
    packed, x = pack(torch.randn(48, 96), "nf4"), torch.randn(2, 20, 96, requires_grad=True)
    y = linear(x, packed)
    exact = x.detach().double() @ packed.dequantize().double().T
    torch.testing.assert_close(y.detach().double(), exact, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, packed.dequantize().sum(0).expand(2, 20, -1), rtol=1e-5, atol=1e-5)


def test_a_tensor_multiplies_as_in_pytorch():
    x, weight, bias, residual = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5), torch.randn(3, 5)
    torch.testing.assert_close(linear(x, weight, bias, residual), x @ weight.T + bias + residual)
    assert torch.equal(embedding(torch.tensor([4, 0]), weight), weight[[4, 0]])


# --- products of plain matrices


SIZES = [(1, 1, 2), (7, 5, 6), (16, 32, 16), (33, 31, 34), (40, 65, 130), (129, 96, 300)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)])
def test_products_of_matrices_in_either_order(kernels, two_threads, monkeypatch, dtype, m, n, k, turned):
    """Against float64. The same bits by one thread, by two, and for a row without the others."""
    monkeypatch.setattr(cpu, "MULTIPLIES", True)
    k += turned[0]  # pairs of bf16 that are packed may be odd
    a, b = torch.randn(k, m).T if turned[0] else torch.randn(m, k + 4)[:, :k], torch.randn(n, k).T
    b = b if turned[1] else b.contiguous()
    a, b, bias = a.to(dtype), b.to(dtype), torch.randn(n).to(dtype)
    assert multiplies(a, b) or 1 in (m, n)  # of a single column the strides do not say how it lies
    if not multiplies(a, b):
        return
    exact = a.double() @ b.double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    y = multiply(a, b, bias)
    torch.testing.assert_close(y.double(), exact + bias.double(), rtol=tolerance, atol=1e-4 * k**0.5)
    assert torch.equal(multiply(a, b, bias, out=torch.full_like(y, torch.nan)), y)
    torch.set_num_threads(1)
    assert torch.equal(multiply(a, b, bias), y)
    if not turned[0]:
        assert torch.equal(multiply(a[m // 2 :], b, bias), y[m // 2 :])
    elif a.stride(1) != 1:
        sums = torch.full((m,), torch.nan)
        assert torch.equal(multiply(a, b, bias, sums=sums), y)
        torch.testing.assert_close(sums.double(), a.double().sum(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_of_a_product_may_be_of_another_dtype_or_stride(kernels, monkeypatch, dtype):
    monkeypatch.setattr(cpu, "MULTIPLIES", True)
    x, weight, tolerance = torch.randn(32, 64).to(dtype), torch.randn(48, 64).to(dtype), 2**-7
    for bias in (torch.randn(48), torch.randn(48, 2)[:, 0], torch.randn(48).double(), torch.randn(1)):
        exact = x.double() @ weight.double().T + bias.double()
        torch.testing.assert_close(linear(x, weight, bias).double(), exact, rtol=tolerance, atol=20 * tolerance)
    for wrong in (weight[:, :32], weight.repeat(1, 2)):
        with pytest.raises(RuntimeError):
            linear(x, wrong)
    with pytest.raises(RuntimeError):
        linear(x, weight, torch.randn(3))


def test_what_the_products_do_not_take(monkeypatch):
    monkeypatch.setattr(cpu, "MULTIPLIES", True)
    a, b = torch.randn(4, 6), torch.randn(6, 8)
    assert multiplies(a, b) == (cpu.kernels is not None)
    assert not multiplies(a.double(), b.double())
    assert not multiplies(a, b.bfloat16())
    assert not multiplies(a[:, ::2], b[::2])
    assert not multiplies(a[:, :5].bfloat16().contiguous(), b[:5].bfloat16())  # half a pair
    assert not multiplies(a[:0], b)
    assert not multiplies(torch.randn(2, 4096), torch.randn(4096, 2))
    monkeypatch.setattr(cpu, "MULTIPLIES", False)
    assert not multiplies(a, b)
