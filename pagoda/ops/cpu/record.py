"""Recordings: the kernel calls of a function, to be made again without the Python between them.

A decode step of a small model lasts a few milliseconds, and the Python of its thirty layers would be as long again. A
step whose shapes stay the same makes the same calls on the same addresses, so the calls are written down once and
repeated; what changes (tokens, angles, lengths, the block table) changes inside the tensors. It is for a CPU what
CUDA graphs are for a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pagoda.ops import cpu

_ALLOCATIONS = {
    getattr(torch.ops.aten, name).default for name in ("empty_like", "new_empty", "empty_strided", "new_empty_strided")
} | {torch.ops.aten.empty.memory_format}


class Recording:
    """Runs `function()` once; calling the recording runs its kernels again and returns the same output tensor.

    `complete` says whether it did nothing but call kernels. Otherwise there is nothing to repeat, and the function has
    to be called as usual.
    """

    def __init__(self, function: Callable[[], Tensor]):
        self.calls: list[tuple[Callable, tuple]] = []
        self.program = cpu.kernels.Program()  # the same calls, for the extension to make
        self.kept: list[Tensor] = []  # the memory that the calls point into
        self.complete = True
        real, cpu.kernels = cpu.kernels, _Kernels(cpu.kernels, self.calls)
        try:
            with _Watch(self):
                self.output = function()
        finally:
            cpu.kernels = real
        if self.complete:
            for kernel, args in self.calls:
                if kernel.__name__ in ("linear", "linear_many"):
                    self.program.next_reads([args[1]] if kernel.__name__ == "linear" else args[1])
                getattr(self.program, kernel.__name__)(*args)
        else:
            self.kept.clear()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self.kept}
        self.nbytes = sum(storage.nbytes() for storage in storages.values())  # of the memory that it keeps

    def __call__(self) -> Tensor:
        self.program()
        return self.output

    def seconds(self, times: int = 20) -> dict[str, float]:
        """What the calls of each kernel take together: medians of so many repetitions, the longest first."""
        took: list[list[float]] = [[] for _ in self.calls]
        for _ in range(times):
            for of_call, (kernel, args) in zip(took, self.calls):
                start = time.perf_counter()
                kernel(*args)
                of_call.append(time.perf_counter() - start)
        total: Counter[str] = Counter()
        for of_call, (kernel, _) in zip(took, self.calls):
            total[kernel.__name__] += statistics.median(of_call)
        return dict(total.most_common())


class _Kernels:
    """Stands in for the kernels' module, and writes down what is called."""

    def __init__(self, module, calls: list):
        self._module, self._calls = module, calls

    def __getattr__(self, name: str) -> Callable:
        kernel = getattr(self._module, name)

        def call(*args):
            self._calls.append((kernel, args))
            return kernel(*args)

        return call


class _Watch(TorchDispatchMode):
    """Sees what PyTorch does meanwhile: it may make memory, or look at memory in another shape, and nothing else."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiles this, and hiding it from torch._dynamo takes two seconds to import that

    def __init__(self, recording: Recording):
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, Tensor)]
        self.recording.kept += made
        if func not in _ALLOCATIONS and not func.is_view:
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            views = made and all(t.untyped_storage().data_ptr() in given for t in made)
            self.recording.complete &= bool(views) and not func._schema.is_mutable
        return out
