#!/bin/bash
# Builds the CPU kernels in a temporary copy of the package and runs their tests on it: `make asan` with AddressSanitizer,
# `make amx` without (SANITIZE is empty). A matrix unit that the CPU lacks is emulated (amx_emulated.h) if it has AVX512_BF16.
# Takes some minutes, most of them the compiler's. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(realpath -s "${PYTHON:-python3}")
SANITIZE=${SANITIZE--fsanitize=address -fno-omit-frame-pointer -O1 -g1}
grep -qs amx_bf16 /proc/cpuinfo || EMULATE="-include tests/amx_emulated.h"
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

cp -r pagoda tests setup.py pyproject.toml "$copy"
[ -f README.md ] && cp README.md LICENSE "$copy"
cd "$copy"
rm -f pagoda/ops/cpu/*.so
"$PYTHON" -m pip install --quiet --disable-pip-version-check --target tools pybind11 "setuptools>=77"
PYTHONPATH="$copy/tools" PAGODA_CXXFLAGS="$SANITIZE ${EMULATE-}" PAGODA_LDFLAGS="${SANITIZE:+-fsanitize=address}" \
  "$PYTHON" setup.py --quiet build_ext --inplace
ls pagoda/ops/cpu/_portable*.so > /dev/null  # without a compiler, the build above only warns

# Python itself is not instrumented: the sanitizer comes in first, with the library of the exceptions that it watches, and
# Python's own leaks are not ours to report. What ends the process is told on its own standard error: pytest must not hold that.
env ${SANITIZE:+LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0} \
  PYTHONPATH="$copy" "$PYTHON" -m pytest -p no:cacheprovider --capture=sys "${@:-tests/ops}"
