// The draw of a token from each row of scores: temperature, top-k, top-p, min-p, and the place that chance points to.
//
// Bound: the exponential, then memory. A row (a vocabulary) is read twice, and its weights stay in the L2 cache. Nothing
// is sorted but the few candidates that can be among the top: those above a weight, which is lowered until there are
// enough of them.
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

#include <cmath>
#include <vector>

namespace {

constexpr int64_t SPAN = 256;  // weights that are added up as one when the place is sought

struct Options { float temperature, top_k, top_p, min_p, chance; };

template <class T> int64_t largest(const T* x, int64_t n) {
  vf best = set1(-std::numeric_limits<float>::infinity());
  int64_t whole = n / W * W;
  for (int64_t i = 0; i < whole; i += W) best = max(load(x + i), best);
  float most = reduce_max(best);
  for (int64_t i = whole; i < n; i++) most = std::max(most, to_float(x[i]));
  for (int64_t i = 0; i < n; i++)
    if (to_float(x[i]) == most) return i;
  return 0;
}

// The first place where the weights so far exceed this share of all; the last one with a weight at the most.
template <class F> int64_t reach(int64_t n, float target, F weight) {
  float sum = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; i++) {
    const float w = weight(i);
    if (w > 0) last = i;
    sum += w;
    if (sum > target) return i;
  }
  return last;
}

int64_t draw(const float* p, const float* spans, int64_t n, float chance) {
  const int64_t n_spans = (n + SPAN - 1) / SPAN;
  float total = 0, before = 0;
  for (int64_t s = 0; s < n_spans; s++) total += spans[s];
  const float target = chance * total;
  int64_t span = 0, last = 0;
  for (; span < n_spans; span++) {
    if (spans[span] > 0) last = span;
    if (before + spans[span] > target) break;
    before += spans[span];
  }
  if (span == n_spans) before -= spans[span = last];  // rounding
  const int64_t first = span * SPAN;
  return first + reach(std::min(SPAN, n - first), target - before, [=](int64_t i) { return p[first + i]; });
}

// Draws among the top_k likeliest, or among those that have top_p of all weight, `total`; the largest weight is 1.
int64_t draw_top(const float* p, int64_t n, float total, const Options& o) {
  static thread_local std::vector<std::pair<float, int64_t>> top;
  const size_t k = o.top_k > 0 ? std::min<size_t>(size_t(o.top_k), n) : 0;
  for (float least = 1e-2f;; least *= 1e-2f) {
    if (least < 1e-30f) least = 0;
    top.clear();
    float mass = 0;
    for (int64_t i = 0; i < n; i++)
      if (p[i] >= least) {
        top.push_back({p[i], i});
        mass += p[i];
      }
    if (least == 0 || (k ? top.size() >= k : mass >= o.top_p * total)) break;
  }
  auto likelier = [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; };
  if (k && k < top.size()) {
    std::nth_element(top.begin(), top.begin() + k, top.end(), likelier);
    top.resize(k);
  }
  std::sort(top.begin(), top.end(), likelier);
  float whole = total, sum = 0;
  if (k) {
    whole = 0;
    for (auto& c : top) whole += c.first;
  }
  size_t kept = 0;
  for (; kept < top.size() && (!kept || sum < o.top_p * whole) && top[kept].first >= o.min_p; kept++) sum += top[kept].first;
  return top[reach(kept, o.chance * sum, [](int64_t i) { return top[i].first; })].second;
}

}  // namespace

// tokens (rows,) int64 from scores (rows, n); options (rows, 5) float32: temperature (0: the largest score), top_k
// (0: all), top_p, min_p, chance in [0, 1).
void sample(ptr tokens, ptr scores, ptr options, int64_t rows, int64_t n, int64_t stride, int64_t dtype) {
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(rows, (1 << 13) / (n + 1) + 1, [=](int64_t begin, int64_t end) {
      static thread_local std::vector<float> memory;
      const int64_t n_spans = (n + SPAN - 1) / SPAN;
      if (int64_t(memory.size()) < n_spans * (SPAN + 1)) memory.resize(n_spans * (SPAN + 1));
      float *p = memory.data(), *spans = p + n_spans * SPAN;
      for (int64_t r = begin; r < end; r++) {
        const T* row = (const T*)scores + r * stride;
        const Options o = ((const Options*)options)[r];
        int64_t& token = ((int64_t*)tokens)[r];
        token = largest(row, n);
        const float most = to_float(row[token]);
        if (!(std::isfinite(1 / o.temperature) && std::isfinite(most))) continue;  // 0: the largest
        const bool tops = (o.top_k > 0 && o.top_k < n) || o.top_p < 1;
        const vf inverse = set1(1 / o.temperature), shift = set1(most), least = set1(tops ? 0 : o.min_p);
        float total = 0;
        for (int64_t s = 0; s < n_spans; s++) {
          vf sum = zero();
          const int64_t stop = std::min(n, (s + 1) * SPAN);
          int64_t i = s * SPAN;
          auto weight = [=](vf x) {
            vf w = exp(mul(sub(x, shift), inverse));
            return where_less(w, least, zero(), w);
          };
          for (; i + W <= stop; i += W) {
            vf w = weight(load(row + i));
            store(p + i, w);
            sum = add(sum, w);
          }
          float rest = 0;
          for (; i < stop; i++) rest += p[i] = reduce_max(weight(set1(to_float(row[i]))));
          spans[s] = reduce_add(sum) + rest;
          total += spans[s];
        }
        token = tops ? draw_top(p, n, total, o) : draw(p, spans, n, o.chance);
      }
    });
  });
}
