"""Builds the CPU kernels: the sources of pagoda/ops/cpu once per instruction set, as one extension module each.

Everything else about the package is in pyproject.toml. The build is optional: where there is no C++ compiler, or a
variant does not compile, installing prints one warning and Pagoda runs on its PyTorch reference operations.
The modules use OpenMP but are not linked to a runtime: `pagoda.ops.cpu` lends them the one inside PyTorch.
"""

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
    VARIANTS |= {"_avx2": AVX2, "_avx512": AVX512, "_avx512_bf16": [*AVX512, "-mavx512bf16"]}

# No -ffast-math and no contraction: a row must give the same bits in every unrolled copy of a loop.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-g0", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"] + os.environ.get(
    "PAGODA_CXXFLAGS", ""
).split()
if sys.platform == "linux":
    FLAGS.append("-fopenmp")


class BuildKernels(build_ext):
    """Compiles every (variant, source) pair on all cores, and only what changed."""

    def build_extensions(self):
        jobs = [(ext, source) for ext in self.extensions for source in ext.sources]
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda job: self.compile_one(*job), jobs))
            for ext in self.extensions:
                mine = [obj for (owner, _), obj in zip(jobs, objects) if owner is ext]
                path = self.get_ext_fullpath(ext.name)
                self.compiler.link_shared_object(mine, path, target_lang="c++", extra_postargs=ext.extra_link_args)
        except Exception as error:  # setuptools has a dozen error classes for "no compiler"
            self.warn(f"the CPU kernels were not built, Pagoda will run its slower PyTorch reference: {error}")
            self.extensions[:] = []

    def compile_one(self, ext, source):
        folder = os.path.join(self.build_temp, ext.name)
        target = Path(self.compiler.object_filenames([source], output_dir=folder)[0])
        used = [path for path in ext.depends if Path(path).name in Path(source).read_text()]
        newest = max(os.path.getmtime(path) for path in [source, __file__, *used])
        if self.force or not target.exists() or target.stat().st_mtime < newest:
            self.compiler.compile(
                [source], folder, ext.define_macros, ext.include_dirs, extra_postargs=ext.extra_compile_args
            )
        return str(target)


def extensions():
    if os.name != "posix":
        return []
    try:
        import pybind11
    except ImportError:
        return []
    sources = sorted(str(path) for path in FOLDER.glob("*.cpp"))
    return [
        Extension(
            f"pagoda.ops.cpu.{name}",
            sources,
            include_dirs=[pybind11.get_include()],
            define_macros=[("PAGODA_MODULE", name)],
            extra_compile_args=FLAGS + flags,
            extra_link_args=os.environ.get("PAGODA_LDFLAGS", "").split()
            + (["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []),
            depends=sorted(str(path) for path in FOLDER.glob("*.h")),
            optional=True,
        )
        for name, flags in VARIANTS.items()
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
