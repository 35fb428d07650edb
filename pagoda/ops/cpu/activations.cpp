// Activations, alone or as the gate of a product.
//
// Bound: memory (2 or 3 x rows x n x the element's size), or for long prefills the exponential, about 20 instructions a
// vector. Where gate and up are halves of one fused product they are read in place, by their row stride.
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace {

constexpr int64_t GRAIN = 1 << 13;  // elements that are worth a thread

// The share of the normal distribution below x, by Abramowitz & Stegun 7.1.26 (error 1e-7), without cancellation.
INLINE vf normal_below(vf x) {
  vf a = mul(absolute(x), set1(0.70710678f));
  vf t = div(set1(1), fma(a, set1(0.3275911f), set1(1)));
  vf p = fma(t, set1(1.061405429f), set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = mul(fma(p, t, set1(0.254829592f)), t);
  vf tail = mul(mul(p, set1(0.5f)), exp(sub(zero(), mul(a, a))));
  return where_less(x, zero(), tail, sub(set1(1), tail));
}

struct Silu { static vf of(vf x) { return mul(x, sigmoid(x)); } };
struct Gelu { static vf of(vf x) { return mul(x, normal_below(x)); } };
struct GeluTanh {  // 0.5 x (1 + tanh(u)) is x * sigmoid(2u)
  static vf of(vf x) {
    vf u = mul(x, fma(mul(x, x), set1(2 * 0.79788456f * 0.044715f), set1(2 * 0.79788456f)));
    return mul(x, sigmoid(u));
  }
};
struct Relu { static vf of(vf x) { return max(zero(), x); } };
struct Relu2 { static vf of(vf x) { vf y = max(zero(), x); return mul(y, y); } };
struct QuickGelu { static vf of(vf x) { return mul(x, sigmoid(mul(x, set1(1.702f)))); } };

// `unit` pieces of a row are shared out too, so that one wide row can use every thread.
template <class Act, class T>
void run(T* out, const T* gate, const T* up, int64_t rows, int64_t n, int64_t gate_stride, int64_t up_stride) {
  parallel_for(rows * ((n + GRAIN - 1) / GRAIN), rows > 0 && n > GRAIN ? 1 : GRAIN / (n + 1) + 1,
               [=](int64_t begin, int64_t end) {
    const int64_t pieces = (n + GRAIN - 1) / GRAIN;
    for (int64_t piece = begin; piece < end; piece++) {
      const int64_t r = piece / pieces, from = piece % pieces * GRAIN, length = std::min(GRAIN, n - from);
      T* y = out + r * n + from;
      const T *g = gate + r * gate_stride + from, *u = up + r * up_stride + from;
      if (up)
        for_each_vector(length, [&](int64_t i, auto load, auto store) { store(y + i, mul(Act::of(load(g + i)), load(u + i))); });
      else
        for_each_vector(length, [&](int64_t i, auto load, auto store) { store(y + i, Act::of(load(g + i))); });
    }
  });
}

}  // namespace

void gated(ptr out, ptr gate, ptr up, int64_t rows, int64_t n, int64_t gate_stride, int64_t up_stride, int64_t dtype,
           int64_t act) {
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    auto go = [&](auto kind) {
      run<decltype(kind)>((T*)out, (const T*)gate, (const T*)up, rows, n, gate_stride, up_stride);
    };
    switch (act) {  // the order of ACTIVATIONS in ops/activations.py
      case 0: return go(Silu{});
      case 1: return go(Gelu{});
      case 2: return go(GeluTanh{});
      case 3: return go(Relu{});
      case 4: return go(Relu2{});
      case 5: return go(QuickGelu{});
    }
  });
}
