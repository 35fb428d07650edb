"""Recordings: the kernel calls of a function, to be made again without the Python between them.

A decode step of a small model lasts a few milliseconds, and the Python of its thirty layers would be as long again. A
step whose shapes stay the same makes the same calls on the same addresses, so the calls are written down once and
repeated; what changes (tokens, angles, lengths, the block table) changes inside the tensors. It is for a CPU what
CUDA graphs are for a GPU.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pagoda.ops import cpu

_ALLOCATIONS = {
    getattr(torch.ops.aten, name).default for name in ("empty_like", "new_empty", "empty_strided", "new_empty_strided")
} | {torch.ops.aten.empty.memory_format}
_ONE_AT_A_TIME = threading.RLock()  # a recording stands in for the kernels of the whole process
_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # shapes, or Python, depend on values


class Recording:
    """Runs `function()` once; calling the recording runs its kernels again and returns the same output tensor.

    Without `operations` the function may make memory and call kernels, and nothing else. With them, what PyTorch
    computes between the kernels is repeated too, into the same memory, as long as neither shapes nor Python depend on
    values. `complete` says whether that is so. Otherwise there is nothing to repeat, and the function has to be called
    as usual.
    """

    def __init__(self, function: Callable[[], Tensor], operations: bool = False):
        self.calls: list[tuple[Callable, tuple]] = []
        self.operations, self.complete = operations, True
        self.parts: list[Callable[[], object]] = []  # the same: programs for the extension, and operations
        self.kept: list[torch.UntypedStorage] = []  # the memory that the calls point into
        with _ONE_AT_A_TIME:
            real, cpu.kernels = cpu.kernels, _Kernels(cpu.kernels, self.calls)
            try:
                with _Watch(self):
                    self.output = function()
            finally:
                cpu.kernels = real
        if self.complete:
            self._divide()
        else:
            self.calls.clear(), self.kept.clear()
        storages = {s.data_ptr(): s.nbytes() for s in self.kept}
        self.nbytes = sum(storages.values())  # of the memory that it keeps

    def _divide(self) -> None:
        program = None
        for call, args in self.calls:
            if isinstance(call, _Operation):
                self.parts.append(call)
                program = None
                continue
            if program is None:
                program = cpu.kernels.Program()
                self.parts.append(program)
            if call.__name__ in ("linear", "linear_many"):
                program.next_reads([args[1]] if call.__name__ == "linear" else args[1])
            getattr(program, call.__name__)(*args)

    def __call__(self) -> Tensor:
        for part in self.parts:
            part()
        return self.output

    def seconds(self, times: int = 20) -> dict[str, float]:
        """What the calls of each kernel take together: medians of so many repetitions, the longest first."""
        runs = []
        for _ in range(times):
            took: list[float] = []
            for part in self.parts:
                start = time.perf_counter()
                inside = part() if isinstance(part, _Operation) else part.seconds()
                took += inside or [time.perf_counter() - start]
            runs.append(took)
        total: Counter[str] = Counter()
        for (kernel, _), *of_call in zip(self.calls, *runs):
            total[kernel.__name__] += statistics.median(of_call)
        return dict(total.most_common())


class _Kernels:
    """Stands in for the kernels' module, and writes down what is called by the thread that made it."""

    def __init__(self, module, calls: list):
        self._module, self._calls, self._thread = module, calls, threading.get_ident()

    def __getattr__(self, name: str) -> Callable:
        kernel = getattr(self._module, name)
        if threading.get_ident() != self._thread:
            return kernel

        def call(*args):
            self._calls.append((kernel, args))
            return kernel(*args)

        return call


class _Operation:
    """What PyTorch computed, to be computed again with what stands in the same memory then."""

    def __init__(self, func: OpOverload, args: tuple, kwargs: dict, out: object):
        self.__name__ = str(func)
        # Other tensors of the same memory: who else holds a gradient must not find it shared.
        args, kwargs, made = tree_map_only(Tensor, Tensor.detach, (args, kwargs, _tensors(out)))
        self.run, self.made = partial(func, *args, **kwargs), [] if func._schema.is_mutable else made

    def __call__(self) -> None:
        out = self.run()
        for to, new in zip(self.made, _tensors(out)):
            to.copy_(new)


class _Watch(TorchDispatchMode):
    """Sees what PyTorch does meanwhile: it may make memory, view it in another shape, and compute what is repeated."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiles this, and hiding it from torch._dynamo takes two seconds to import that

    def __init__(self, recording: Recording):
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, recording = func(*args, **(kwargs or {})), self.recording
        made = _tensors(out)
        recording.kept += [t.untyped_storage() for t in made]
        if func in _ALLOCATIONS or func.is_view:
            return out
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        views = made and all(t.untyped_storage().data_ptr() in given for t in made)
        if views and not func._schema.is_mutable:
            return out
        if recording.operations and not _BY_VALUE & set(func.tags):
            recording.calls.append((_Operation(func, args, kwargs or {}, out), ()))
        else:
            recording.complete = False
        return out


def _tensors(out: object) -> list[Tensor]:
    return [t for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, Tensor)]
