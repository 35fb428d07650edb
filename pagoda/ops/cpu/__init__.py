"""Chooses the CPU kernels that this machine runs best, once, at import.

The sources beside this file are compiled once per instruction set into `_portable`, `_avx2`, `_avx512`,
`_avx512_bf16` and `_amx`. `kernels` is the module chosen, or None when none was built or `PAGODA_KERNELS=reference`;
the operations in `pagoda/ops` look at it and run their PyTorch reference where it is None. `PAGODA_KERNELS` may also
name a variant (`portable`, `avx2`, `avx512`, `avx512_bf16`, `amx`) or `auto`.

Calling convention: pointers and strides are plain integers (0 is "no tensor"), strides count elements, dtypes are the
codes in `DTYPE`. The C++ side checks row numbers and lengths alone: the caller checks dtypes, shapes, strides and
devices (`usable`).
Threads: the kernels use the OpenMP runtime inside PyTorch and as many threads as `torch.set_num_threads` says.
"""

import ctypes
import glob
import importlib
import os
import platform
import warnings

import torch

from pagoda.common import PagodaError

VARIANTS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")  # best first
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # as in simd.h
FLOATS = {dtype: code for dtype, code in DTYPE.items() if dtype.is_floating_point}


def _share_openmp():
    """Makes the OpenMP runtime that PyTorch loaded visible to the kernels: one pool of threads owns the cores."""
    try:
        with open("/proc/self/maps") as maps:
            loaded = [line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line]
    except OSError:  # not Linux: the kernels are built without OpenMP there
        return
    loaded += glob.glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libgomp*.so*"))
    for path in loaded[:1]:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def load(variant: str):
    """Imports one variant. Raises ImportError where it was not built, or where the CPU lacks its instructions."""
    _share_openmp()
    supported = importlib.import_module("pagoda.ops.cpu._portable").supported_variants()
    if variant not in supported:
        raise ImportError(f"this CPU does not run the {variant} kernels")
    return importlib.import_module(f"pagoda.ops.cpu._{variant}")


def available() -> list[str]:
    """The variants that were built and that this CPU runs, best first."""
    found = []
    for variant in VARIANTS:
        try:
            load(variant)
        except ImportError:
            continue
        found.append(variant)
    return found


def _choose():
    wanted = os.environ.get("PAGODA_KERNELS") or "auto"
    if wanted == "reference":
        return None, wanted
    if wanted not in (*VARIANTS, "auto"):
        raise PagodaError(f"PAGODA_KERNELS={wanted}: expected auto, reference or one of {', '.join(VARIANTS)}")
    for variant in VARIANTS if wanted == "auto" else [wanted]:
        try:
            return load(variant), variant
        except ImportError as error:
            reason = error
    if wanted != "auto":
        raise PagodaError(f"PAGODA_KERNELS={wanted} cannot be used here: {reason}")
    missing = isinstance(reason, ModuleNotFoundError)
    why = "were not built (is there a C++ compiler?)" if missing else f"do not load ({reason})"
    warnings.warn(f"the CPU kernels {why}: using the PyTorch reference, which is slower", stacklevel=2)
    return None, "reference"


kernels, _path = _choose()


# Whether products of plain matrices are the kernels' too: elsewhere PyTorch's libraries are as fast, or faster.
MULTIPLIES = _path == "avx512_bf16"


def kernel_path() -> str:
    """The path in use: `amx`, `avx512_bf16`, `avx512`, `avx2`, `portable` or `reference`."""
    return _path


_NO_BF16 = (
    platform.machine() in ("x86_64", "AMD64") and not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()
)


def emulates(x: torch.Tensor) -> bool:
    """Whether PyTorch emulates products of this type here: without AVX512_BF16 bf16 is far slower than float32."""
    return _NO_BF16 and x.dtype == torch.bfloat16 and x.is_cpu


def usable(x: torch.Tensor) -> bool:
    """Whether a kernel may read `x` by its pointer: a plain CPU tensor, nobody wants a gradient, nobody traces.

    Costs 0.2 microseconds. Where gradients are enabled `trains` says what to do.
    """
    return (
        kernels is not None
        and x.is_cpu
        and not torch.is_grad_enabled()
        and type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
    )


def trains(x: torch.Tensor) -> bool:
    """Whether gradients are enabled and a kernel may read `x`: then an autograd.Function calls it, both ways."""
    return (
        kernels is not None
        and x.is_cpu
        and torch.is_grad_enabled()
        and type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
    )


def rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """x (..., n) as the kernels read it: the tensor, its number of rows and their stride. A matrix is never copied."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.shape[0], x.stride(0)
    x = x.contiguous()
    n = x.shape[-1]
    return x, x.numel() // max(n, 1), n


def heads(x: torch.Tensor) -> torch.Tensor:
    """x (N, n_head, head_size) with each row's heads side by side, rows apart by whatever stride: a copy if need be."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def are_scales(*tensors: torch.Tensor | None) -> bool:
    """Whether the kernels can read them as the scales of an int8 cache."""
    return all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in tensors)


def pointers(*tensors: torch.Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]
