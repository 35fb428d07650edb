// The Python module: one line per kernel (the list is KERNELS in kernels.h).
//
// The GIL is kept during a call. A call lasts from a microsecond to a few milliseconds, less than the interval at which
// Python threads take turns anyway, and giving it up would make every operation of a decode step queue for it.
#include "program.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace py = pybind11;

// Whether there is a matrix unit, and Linux lets this process use it: it asks to be asked, since a thread's state grows by 8 KB.
static bool may_use_tiles() {
#if defined(AMX_EMULATED)  // tests/amx_emulated.h
  return true;
#elif defined(__linux__) && defined(__x86_64__)
  const long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  const bool there = __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8");
  return there && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

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

template <class... Args> static auto appended(void (*f)(Args...)) {
  return [f](Program& program, Args... args) { program.append([=] { f(args...); }); };
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
  bool bf16 = avx512 && HAS("avx512bf16");
  if (bf16) names.append("avx512_bf16");
  if (bf16 && may_use_tiles()) names.append("amx");
#undef HAS
#endif
  return names;
}

static void define(py::module_& m) {
  m.def("supported_variants", &supported_variants);
  py::class_<Program> program(m, "Program", py::module_local());
  program.def(py::init<>()).def("next_reads", &Program::next_reads).def("__call__", [](Program& program) {
    follow_torch_threads();
    program.run();
  });
  program.def("seconds", [](Program& program) {  // runs it: what each call took
    follow_torch_threads();
    std::vector<double> took;
    program.run(&took);
    return took;
  });
#define DEFINE(name)                  \
  m.def(#name, kernel(&name));        \
  program.def(#name, appended(&name));
  KERNELS(DEFINE)
#undef DEFINE
}

// This file is compiled once, for any CPU, and linked with each variant's kernels: Python enters by the module's name.
PYBIND11_MODULE(_portable, m, py::mod_gil_not_used()) { define(m); }
PYBIND11_MODULE(_avx2, m, py::mod_gil_not_used()) { define(m); }
PYBIND11_MODULE(_avx512, m, py::mod_gil_not_used()) { define(m); }
PYBIND11_MODULE(_avx512_bf16, m, py::mod_gil_not_used()) { define(m); }
PYBIND11_MODULE(_amx, m, py::mod_gil_not_used()) { define(m); }
