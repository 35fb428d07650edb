"""The product with a weight matrix, and the lookup of its rows. Either takes a Tensor or a PackedWeight (formats.py).

For a Tensor these are PyTorch's own, except where PyTorch would emulate bf16: there products run in float32, and only
results are rounded. A weight of another dtype than x's (float32 masters under bf16 activations) is cast, and gets its
gradient in its own. For a PackedWeight the reference multiplies with the dequantized matrix, a
thousand rows at a time; on a CPU the kernel of `ops/cpu/linear.cpp` reads the packed form. There a row of the result
depends on its own row of x alone, bit for bit, whatever else is in the batch and however many threads run.
"""

import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pagoda.ops import cpu
from pagoda.ops.formats import PackedWeight
from pagoda.ops.recompute import SMALL, to_keep

_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in simd.h
CPU = torch.device("cpu")
MANY = 16  # rows that are worth converting or packing a weight for
LONGEST = 2**13  # bytes of a row of a matrix that the kernels multiply
SCRATCH = 2**22  # numbers of a matrix that is cast into memory which stays
_LOCAL = threading.local()
_ONEDNN = threading.Lock()  # who holds it may switch oneDNN off and on


def linear(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias + residual`: x (..., n_in), weight (n_out, n_in), bias (n_out,), residual (..., n_out)."""
    if not isinstance(weight, PackedWeight):
        y = _dense(x, weight, bias)
        return y if residual is None else y + residual
    if torch.is_grad_enabled():
        y = _PackedLinear.apply(x, weight)
        y = y if bias is None else y + bias
        return y if residual is None else y + residual
    address, n_out, n_in = weight.kernel_view() if cpu.usable(x) and x.dtype in _FLOATS else (0, 0, 0)
    if not address:
        return _reference(x, weight, bias, residual)
    x, rows, stride, lead = _rows(x, n_in)
    y = x.new(rows, n_out)  # half the cost of new_empty
    bias, residual = _like(bias, x, (n_out,)), _like(residual, x, (*(lead or (rows,)), n_out))
    plus = 0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr()
    cpu.kernels.linear(y.data_ptr(), address, x.data_ptr(), *plus, rows, stride, _FLOATS[x.dtype])
    return y if lead is None else y.view(*lead, n_out)


def linear_many(x: Tensor, weights: list[PackedWeight]) -> list[Tensor]:
    """`[linear(x, w) for w in weights]`, bit for bit, but x is rounded once and the threads wake once."""
    views = [w.kernel_view() for w in weights] if cpu.usable(x) and x.dtype in _FLOATS else []
    if not views or not all(address and n_in == x.shape[-1] for address, _, n_in in views):
        return [linear(x, w) for w in weights]
    x, rows, stride, lead = _rows(x, views[0][2])
    ys = [x.new(rows, n_out) for _, n_out, _ in views]
    pointers, addresses = [y.data_ptr() for y in ys], [address for address, _, _ in views]
    cpu.kernels.linear_many(pointers, addresses, x.data_ptr(), rows, stride, _FLOATS[x.dtype])
    return ys if lead is None else [y.view(*lead, y.shape[1]) for y in ys]


def embedding(ids: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """Rows of weight (n_rows, n) by ids (N,) int64: (N, n), for a PackedWeight in its `dtype`."""
    if not isinstance(weight, PackedWeight):
        if not (cpu.usable(ids) and ids.dtype == torch.int64 and weight.is_cpu and weight.is_contiguous()):
            return F.embedding(ids, weight)
        y, ids = weight.new_empty(*ids.shape, weight.shape[1]), ids.contiguous()
        size = weight.shape[1] * weight.element_size()
        cpu.kernels.rows(y.data_ptr(), weight.data_ptr(), ids.data_ptr(), ids.numel(), len(weight), size)
        return y
    takes = cpu.usable(ids) and ids.dtype == torch.int64 and weight.dtype in _FLOATS
    address, _, n = weight.kernel_view() if takes else (0, 0, 0)
    if not address:
        return weight.rows(ids).to(weight.dtype)
    y = torch.empty(len(ids), n, dtype=weight.dtype)
    ids = ids.contiguous()
    cpu.kernels.embedding(y.data_ptr(), address, ids.data_ptr(), len(ids), _FLOATS[weight.dtype])
    return y


def linear_transposed(y: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """`y @ weight`: y (..., n_out), weight (n_out, n_in); the way back through `linear`. No gradients."""
    dtype, grad = product_dtype(y), y.reshape(-1, y.shape[-1])
    if not isinstance(weight, PackedWeight):
        return product(_cast(grad, dtype, "y"), _cast(weight, dtype, "weight"), y.dtype).view(*y.shape[:-1], -1)
    total, shape = 0.0, (*y.shape[:-1], weight.shape[1])
    for rows, part in _chunks(weight, dtype):
        g = _cast(grad[:, rows], dtype, "y")
        if len(part) == weight.shape[0]:
            return product(g, part, y.dtype).view(shape)
        total = total + (g @ part).float()
    return total.to(y.dtype).view(shape)


def _chunks(weight: PackedWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """`weight.chunks()` in a dtype, by the kernel where there is one: then whole where that is small enough, and good
    until the next."""
    address, n_out, n_in = weight.kernel_view()
    if not address or cpu.kernels is None or dtype not in _FLOATS:
        yield from ((rows, part.to(dtype)) for rows, part in weight.chunks())
        return
    size = n_out if n_out * n_in <= SCRATCH else 1024
    for first in range(0, n_out, size):
        part = _scratch("weight", torch.Size((min(size, n_out - first), n_in)), dtype, CPU)
        cpu.kernels.dequantize(part.data_ptr(), address, first, len(part), _FLOATS[dtype])
        yield slice(first, first + len(part)), part


def product_dtype(x: Tensor) -> torch.dtype:
    """What products of x are fastest in: its own dtype, or float32 where PyTorch would emulate that."""
    return torch.float32 if cpu.emulates(x) else x.dtype


def product(a: Tensor, b: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """`a @ b + bias` of matrices, rounded to dtype once."""
    if multiplies(a, b):
        return multiply(a, b, bias).to(dtype)
    out = None if a.dtype == dtype else _scratch("result", torch.Size((len(a), b.shape[1])), a.dtype, a.device)
    y = torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    return y.to(dtype)


def multiplies(a: Tensor, b: Tensor) -> bool:
    """Whether ops/cpu/matmul.cpp takes a (m, k) and b (k, n): each lies row by row or column by column, a's rows have
    whole pairs of bf16, and k is small enough for the caches."""
    if not cpu.MULTIPLIES or cpu.kernels is None or not a.is_cpu or a.shape[1] * a.itemsize > LONGEST:
        return False
    if a.dtype != b.dtype or a.dtype not in (torch.float32, torch.bfloat16) or not a.numel() or not b.numel():
        return False
    if a.shape[1] != b.shape[0]:  # PyTorch says what is wrong
        return False
    if 1 not in a.stride() or 1 not in b.stride():
        return False
    return a.dtype == torch.float32 or a.stride(1) != 1 or a.stride(0) % 2 == a.shape[1] % 2 == 0


def multiply(
    a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None, sums: Tensor | None = None
) -> Tensor:
    """`a @ b + bias` by the kernel, (m, k) by (k, n). `sums` (m,) float32 takes the sums of a's rows, where those lie
    column by column."""
    (m, k), (a_stride, a_one), (b_stride, b_one), n = a.shape, a.stride(), b.stride(), b.shape[1]
    out = a.new_empty(m, n) if out is None else out
    bias = _like(bias, a, (n,))  # held: a copy must outlive the call
    tensors = cpu.pointers(out, a, b, bias, sums)
    strides = a_stride if a_one == 1 else a_one, b_stride if b_one == 1 else b_one
    cpu.kernels.matmul(*tensors, m, n, k, *strides, a_one != 1, b_one != 1, cpu.DTYPE[a.dtype])
    return out


def _weight_gradient(
    g: Tensor, x: Tensor | None, weight: torch.dtype, bias: torch.dtype | None, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the weight and the bias of `linear(x, ...)`, in these dtypes and as far as they are needed: x
    (N, n_in), and g (N, n_out), the gradient of the result."""
    turned = g.t()
    if all(needed) and multiplies(turned, x) and turned.stride(1) != 1:
        sums = torch.empty(len(turned), dtype=torch.float32)
        return multiply(turned, x, sums=sums).to(weight), sums.to(bias)
    return product(turned, x, weight) if needed[0] else None, g.sum(0).to(bias) if needed[1] else None


def _cast(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    return x if x.dtype == dtype else _scratch(name, x.shape, dtype, x.device).copy_(x)


def _scratch(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a matrix that one product needs in another dtype, and the next product again: fresh memory costs a
    page fault every 4 KB, and leaves the heap in pieces."""
    n = shape.numel()
    if n > SCRATCH or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    kept = _LOCAL.__dict__
    if (name, dtype) not in kept or len(kept[name, dtype]) < n:
        with torch.inference_mode(False):  # training uses it too
            kept[name, dtype] = torch.empty(n, dtype=dtype)
    return kept[name, dtype][:n].view(shape)


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        bias = None if bias is None else bias.to(x.dtype)
        if not (cpu.MULTIPLIES and x.is_cpu and x.dtype in (torch.float32, torch.bfloat16)):
            return F.linear(x, weight.to(x.dtype), bias)
        return _compiled(x.flatten(0, -2), weight.to(x.dtype), bias).view(*x.shape[:-1], len(weight))
    if torch.is_grad_enabled():
        small = x.nbytes <= SMALL and not cpu.MULTIPLIES and not hasattr(x, "recipe") and not cpu.emulates(x)
        if weight.dtype == x.dtype and (small or not x.is_cpu):  # PyTorch's own way back costs less Python
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return _Linear.apply(x, weight, bias)
    if weight.dtype == x.dtype and not cpu.emulates(x):
        if x.is_cpu and x.shape[:-1].numel() == 1:
            return _product_of_one_row(x, weight, bias)
        if x.dim() == 2 and len(x) >= MANY and multiplies(x, weight.T):
            return multiply(x, weight.T, bias)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    few = x.dim() != 2 or len(x) < MANY
    dtype = x.dtype if few else product_dtype(x)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def _product_of_one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch has two ways to it: oneDNN's product of matrices, and a loop of its own that reads bf16 twice as fast."""
    with _ONEDNN:
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)  # of the whole process: what another thread multiplies meanwhile is slower
        try:
            y = F.linear(x, weight)
        finally:
            torch._C._set_mkldnn_enabled(enabled)
    return y if bias is None else y + bias.to(x.dtype)


def _rows(x: Tensor, n_in: int) -> tuple[Tensor, int, int, torch.Size | None]:
    """x as rows: itself where it can be, their number, their stride; and the dimensions before the last unless one."""
    shape = x.shape
    if shape[-1] != n_in:
        raise ValueError(f"x has {shape[-1]} columns, the weight takes {n_in}")
    if len(shape) == 2:
        stride, one = x.stride()
        return (x, shape[0], stride, None) if one == 1 else (x.contiguous(), shape[0], n_in, None)
    return x.contiguous(), x.numel() // n_in, n_in, shape[:-1]


def _like(t: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """t of x's dtype and this shape, dense."""
    if t is None or (t.dtype == x.dtype and t.shape == shape and t.is_contiguous()):
        return t
    return t.to(x.dtype).expand(shape).contiguous()


def _reference(x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = torch.cat([F.linear(x.float(), part) for _, part in weight.chunks()], -1)
    y = y if bias is None else y + bias
    y = y if residual is None else y + residual
    return y.to(x.dtype)


class _Linear(torch.autograd.Function):
    """Weight and activations are cast for each product and kept as they are, or made again. What is frozen costs no
    product."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.make_x, kept = to_keep(x) if ctx.needs_input_grad[1] else (None, ())
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        dtype, rows = product_dtype(x), x.flatten(0, -2)
        bias = None if bias is None else bias.to(dtype)
        y = product(_cast(rows, dtype, "x"), _cast(weight, dtype, "weight").t(), x.dtype, bias)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, *kept = ctx.saved_tensors
        dtype, rows = product_dtype(grad), grad.flatten(0, -2)
        g = _cast(rows, dtype, "y")
        dx = x = None
        if weight is not None:
            dx = product(g, _cast(weight, dtype, "weight"), grad.dtype).view(*grad.shape[:-1], -1)
        if ctx.make_x is not None:
            x = _cast(ctx.make_x(*kept).flatten(0, -2), dtype, "x")
        return dx, *_weight_gradient(g, x, ctx.weight_dtype, ctx.bias_dtype, ctx.needs_input_grad[1:3])


class _PackedLinear(torch.autograd.Function):
    """Packed weights are frozen: the gradient goes to x only, through the dequantized matrix, chunk by chunk."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        with torch.no_grad():
            if weight.format == "nf4" and x.dtype == torch.float32:  # the kernel may round to bf16, training does not
                parts = [product(x.flatten(0, -2), part.T, x.dtype) for _, part in _chunks(weight, x.dtype)]
                return torch.cat(parts, 1).view(*x.shape[:-1], -1)
            return linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return linear_transposed(grad, ctx.weight), None


# And as operations that torch.compile takes as they are: its own product, and the two ways back, as a step of Python's.


@torch.library.custom_op("pagoda::product", mutates_args=())
def _product(a: Tensor, b: Tensor) -> Tensor:
    return product(a, b, a.dtype)


@torch.library.custom_op("pagoda::linear", mutates_args=())
def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight.t(), x.dtype, bias)


_product.register_fake(lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
_compiled.register_fake(lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _way_back(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    (x, weight), (to_x, to_weight, to_bias) = ctx.saved_tensors, ctx.needs_input_grad
    d_x, d_weight = _product(grad, weight) if to_x else None, _product(grad.t(), x) if to_weight else None
    return d_x, d_weight, grad.sum(0) if to_bias else None


_compiled.register_autograd(_way_back, setup_context=_keep)
