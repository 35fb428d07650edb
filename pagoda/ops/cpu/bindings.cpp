// The Python module: one line per kernel (the list is KERNELS in kernels.h).
//
// The GIL is kept during a call. A call lasts from a microsecond to a few milliseconds, less than the interval at which
// Python threads take turns anyway, and giving it up would make every operation of a decode step queue for it.
#include "kernels.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

// torch.set_num_threads reaches a thread only when that thread first asks PyTorch (or OpenMP on its behalf). Ask once.
static void follow_torch_threads() {
  thread_local bool asked = false;
  if (asked) return;
  asked = true;
  py::module_::import("torch").attr("get_num_threads")();
}

template <class... Args> static auto kernel(void (*f)(Args...)) {
  return [f](Args... args) {
    follow_torch_threads();
    f(args...);
  };
}

// The variants (names of __init__.py) whose instructions this CPU and its operating system support.
static py::list supported_variants() {
  py::list names;
  names.append("portable");
#if defined(__x86_64__)
  __builtin_cpu_init();
#define HAS(feature) __builtin_cpu_supports(feature)
  bool avx2 = HAS("avx2") && HAS("fma") && HAS("f16c") && HAS("bmi2");
  bool avx512 = avx2 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl") && HAS("avx512vnni");
  if (avx2) names.append("avx2");
  if (avx512) names.append("avx512");
  if (avx512 && HAS("avx512bf16")) names.append("avx512_bf16");
#undef HAS
#endif
  return names;
}

static void define(py::module_& m) {
  m.def("supported_variants", &supported_variants);
#define DEFINE(name) m.def(#name, kernel(&name));
  KERNELS(DEFINE)
#undef DEFINE
}

// This file is compiled once, for any CPU, and linked with each variant's kernels: Python enters by the module's name.
PYBIND11_MODULE(_portable, m, py::mod_gil_not_used()) { define(m); }
PYBIND11_MODULE(_avx2, m, py::mod_gil_not_used()) { define(m); }
PYBIND11_MODULE(_avx512, m, py::mod_gil_not_used()) { define(m); }
PYBIND11_MODULE(_avx512_bf16, m, py::mod_gil_not_used()) { define(m); }
