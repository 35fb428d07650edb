// Loops over threads: OpenMP with as many threads as torch.set_num_threads says (bindings.cpp keeps the two in step).
#pragma once
#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
inline int max_threads() { return omp_get_max_threads(); }
inline int thread_index() { return omp_get_thread_num(); }
#else
inline int max_threads() { return 1; }
inline int thread_index() { return 0; }
#endif

// f(begin, end) on contiguous shares of 0..n. No thread is woken for less than two shares of `grain`: that costs
// about 2 microseconds.
template <class F> void parallel_for(int64_t n, int64_t grain, F f) {
  if (max_threads() == 1 || n < 2 * grain) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel
  {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t begin = n * me / threads, end = n * (me + 1) / threads;
    if (begin < end) f(begin, end);
  }
#endif
}

// f(i) for i in 0..n, handed out one by one as threads become free: for items of unequal cost.
template <class F> void parallel_dynamic(int64_t n, F f) {
  if (max_threads() == 1 || n < 2) {
    for (int64_t i = 0; i < n; i++) f(i);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < n; i++) f(i);
#endif
}
