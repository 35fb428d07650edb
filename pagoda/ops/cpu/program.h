// A recording's calls (record.py), made one after the other without Python between them.
//
// Bound: memory. What a decode step costs besides reading its weights is the many short moments in which nothing is read:
// loops that begin and end, and rows so small that one thread takes them alone. So the threads stay awake from the first
// call to the last (Team), and those that wait meanwhile fetch what their next products will read.
#pragma once
#include <chrono>
#include <exception>
#include <functional>

#include "kernels.h"
#include "parallel.h"

class Program {
 public:
  void append(std::function<void()> call) { calls.push_back({std::move(call), std::move(weights)}), weights.clear(); }
  void next_reads(std::vector<ptr> packed) { weights = std::move(packed); }  // by the call that is appended next

  // With `took` the seconds of each call are put behind what stands there.
  void run(std::vector<double>* took = nullptr) {
    auto before = std::chrono::steady_clock::now();
    auto make = [&](const Call& call) {
      call.make();
      if (!took) return;
      const auto after = std::chrono::steady_clock::now();
      took->push_back(std::chrono::duration<double>(after - before).count()), before = after;
    };
    const int threads = std::min(max_threads(), Team::MOST);
    if (threads == 1) {
      for (const Call& call : calls) make(call);
      return;
    }
    if (int(spans.size()) != threads || spans[0].size() != calls.size()) plan(threads);
    Team team(threads);
    std::atomic<int64_t> now{0};  // the call that is being made
    std::exception_ptr thrown;
    team.open([&] {
      try {
        for (const Call& call : calls) make(call), now.fetch_add(1, std::memory_order_relaxed);
      } catch (...) {
        thrown = std::current_exception();
      }
    }, [&](int64_t me) { return Upcoming{spans[me], now}; });
    if (thrown) std::rethrow_exception(thrown);
  }

 private:
  struct Call {
    std::function<void()> make;
    std::vector<ptr> weights;
  };

  // What a thread that waits fetches: its shares of the products from the present call on.
  struct Upcoming {
    static constexpr int64_t MOST = 256 << 10, LINES = 32;  // bytes that its L2 holds until they are used; lines at a time
    const std::vector<std::vector<Span>>& spans;
    const std::atomic<int64_t>& now;
    int64_t call = 0, span = 0, offset = 0, fetched = 0;

    // Whether there was something to fetch.
    bool fetch() {
      if (fetched >= MOST) return false;
      from(now.load(std::memory_order_relaxed));
      for (int64_t i = 0; i < LINES; i++) {
        while (call < int64_t(spans.size()) && span == int64_t(spans[call].size())) call++, span = offset = 0;
        if (call == int64_t(spans.size())) return i > 0;
        __builtin_prefetch(spans[call][span].from + offset, 0, 2);
        fetched += 64, offset += 64;
        if (offset >= spans[call][span].bytes) span++, offset = 0;
      }
      return true;
    }
    // The thread has done its share of the present call.
    void done() { from(now.load(std::memory_order_relaxed) + 1), fetched = 0; }
    void from(int64_t first) {
      if (call < first) call = first, span = offset = 0;
    }
  };

  void plan(int64_t threads) {
    spans.assign(threads, {});
    for (int64_t me = 0; me < threads; me++)
      for (const Call& call : calls) spans[me].push_back(share_of_weights(call.weights, me, threads));
  }

  std::vector<Call> calls;
  std::vector<ptr> weights;
  std::vector<std::vector<std::vector<Span>>> spans;  // of each thread, by call
};
