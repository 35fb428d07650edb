// Loops over threads: OpenMP with as many threads as torch.set_num_threads says (bindings.cpp keeps the two in step).
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#ifdef _OPENMP
#include <omp.h>
inline int max_threads() { return omp_get_max_threads(); }
#else
inline int max_threads() { return 1; }
#endif

// Threads that stay awake through many short loops: one makes them, the others look for the next one all the time. A loop
// then begins and ends in 0.2 microseconds instead of 0.7. The share of a thread that is not there, because the core does
// something else, is taken by the one that makes the loops: beside a busy process each loop would wait milliseconds.
class Team {
 public:
  static inline thread_local Team* current = nullptr;  // of the thread that makes the loops

  static constexpr int MOST = 64;  // threads

  explicit Team(int64_t threads) : threads(threads) {}

  // Calls f() here, with the other threads at hand. What one of those does while it waits is of its own: waiting(me)
  // gives an object whose fetch() does a little, or returns false, and whose done() is called behind every loop.
  template <class F, class Waiting> void open(F f, Waiting waiting) {
#ifdef _OPENMP
#pragma omp parallel num_threads(int(threads))
    if (const int me = omp_get_thread_num()) {
      work(me, waiting(me));
    } else {
      current = this;
      f();
      current = nullptr;
      closed.store(true, std::memory_order_release);
    }
#else
    f();
#endif
  }

  // f(me, threads) for every thread. The others copy f: it lies among variables that this thread keeps writing.
  template <class F> void run(const F& f) {
    loop = [](const void* f, int64_t me, int64_t threads) { F(*(const F*)f)(me, threads); };
    context = &f;
    busy.store(threads - 1, std::memory_order_relaxed);
    waiting_shares.store((~uint64_t(0) >> (64 - threads)) & ~uint64_t(1), std::memory_order_release);
    f(0, threads);
    for (int64_t other = 1; other < threads; other++)
      if (take(other)) f(other, threads), busy.fetch_sub(1, std::memory_order_relaxed);
    for (int64_t looks = 0; busy.load(std::memory_order_acquire) > 0; looks++) pause(looks);
  }

 private:
  bool take(int64_t share) {
    const uint64_t bit = uint64_t(1) << share;
    return waiting_shares.load(std::memory_order_relaxed) & bit && waiting_shares.fetch_and(~bit, std::memory_order_acq_rel) & bit;
  }
  template <class Waiting> void work(int64_t me, Waiting waiting) {
    for (int64_t looks = 0; !closed.load(std::memory_order_acquire);) {
      if (take(me)) {
        loop(context, me, threads);
        waiting.done();
        busy.fetch_sub(1, std::memory_order_release);
        looks = 0;
      } else if (!waiting.fetch()) {
        pause(looks++);
      }
    }
  }
  static void pause(int64_t looks) {
    if (looks > 10000) std::this_thread::yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
  }

  const int64_t threads;
  void (*loop)(const void*, int64_t, int64_t) = nullptr;
  const void* context = nullptr;
  alignas(64) std::atomic<uint64_t> waiting_shares{0};  // a bit for each thread whose share of the loop nobody has taken
  std::atomic<bool> closed{false};
  alignas(64) std::atomic<int64_t> busy{0};  // shares of others that are not done
};

// f(begin, end) on contiguous shares of 0..n. No thread is woken for less than two shares of `grain`: that costs
// about 2 microseconds.
template <class F> void parallel_for(int64_t n, int64_t grain, F f) {
  if (max_threads() == 1 || n < 2 * grain) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
  auto share = [n, f](int64_t me, int64_t threads) {
    int64_t begin = n * me / threads, end = n * (me + 1) / threads;
    if (begin < end) f(begin, end);
  };
  if (Team::current) return Team::current->run(share);
#ifdef _OPENMP
#pragma omp parallel firstprivate(share)
  share(omp_get_thread_num(), omp_get_num_threads());
#endif
}

// f(i) for i in 0..n, handed out one by one as threads become free: for items of unequal cost.
template <class F> void parallel_dynamic(int64_t n, F f) {
  if (max_threads() == 1 || n < 2) {
    for (int64_t i = 0; i < n; i++) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  auto items = [n, f, &next](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  };
  if (Team::current) return Team::current->run(items);
#ifdef _OPENMP
#pragma omp parallel firstprivate(items)
  items(0, 0);
#endif
}
