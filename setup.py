"""Builds the CPU kernels: the sources of pagoda/ops/cpu once per instruction set, as one extension module each.

Everything else about the package is in pyproject.toml. The build is optional: where there is no C++ compiler, or a
variant does not compile, installing prints one warning and Pagoda runs on its PyTorch reference operations.
The modules use OpenMP but are not linked to a runtime: `pagoda.ops.cpu` lends them the one inside PyTorch.
"""

import importlib.util
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("pagoda/ops/cpu")
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"]
VARIANTS = {"_portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    BF16 = [*AVX512, "-mavx512bf16"]
    VARIANTS |= {"_avx2": AVX2, "_avx512": AVX512, "_avx512_bf16": BF16}
    VARIANTS |= {"_amx": [*BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]}

# No -ffast-math and no contraction: a row must give the same bits in every unrolled copy of a loop.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-g0", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"] + os.environ.get(
    "PAGODA_CXXFLAGS", ""
).split()
if sys.platform == "linux":
    FLAGS.append("-fopenmp")


class BuildKernels(build_ext):
    """Compiles every (variant, source) pair on all cores, and only what changed. The bindings serve all variants."""

    def build_extensions(self):
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                bindings = pool.submit(self.compile_one, "bindings", str(FOLDER / "bindings.cpp"), [])
                kernels = [
                    [pool.submit(self.compile_one, ext.name, source, ext.extra_compile_args) for source in ext.sources]
                    for ext in self.extensions
                ]
            for ext, jobs in zip(self.extensions, kernels):
                objects = [job.result() for job in [bindings, *jobs]]
                path = self.get_ext_fullpath(ext.name)
                self.compiler.link_shared_object(objects, path, target_lang="c++", extra_postargs=ext.extra_link_args)
        except Exception as error:  # setuptools has a dozen error classes for "no compiler"
            self.warn(f"the CPU kernels were not built, Pagoda will run its slower PyTorch reference: {error}")
            self.extensions[:] = []

    def compile_one(self, folder, source, flags):
        import pybind11

        folder = os.path.join(self.build_temp, folder)
        target = Path(self.compiler.object_filenames([source], output_dir=folder)[0])
        newest = max(os.path.getmtime(path) for path in [source, __file__, *FOLDER.glob("*.h")])
        if self.force or not target.exists() or target.stat().st_mtime < newest:
            self.compiler.compile([source], folder, include_dirs=[pybind11.get_include()], extra_postargs=FLAGS + flags)
        return str(target)


def extensions():
    if os.name != "posix" or importlib.util.find_spec("pybind11") is None:
        return []
    sources = sorted(str(path) for path in FOLDER.glob("*.cpp") if path.name != "bindings.cpp")
    link = os.environ.get("PAGODA_LDFLAGS", "").split()
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    return [
        Extension(f"pagoda.ops.cpu.{name}", sources, extra_compile_args=flags, extra_link_args=link, optional=True)
        for name, flags in VARIANTS.items()
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
