// Activations, alone or as the gate of a product, and the way back.
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

// Each has its value and its slope.
struct Silu {
  static vf of(vf x) { return mul(x, sigmoid(x)); }
  static vf slope(vf x) {
    vf s = sigmoid(x);
    return fma(mul(x, s), sub(set1(1), s), s);
  }
};
struct Gelu {
  static vf of(vf x) { return mul(x, normal_below(x)); }
  static vf slope(vf x) {
    vf density = mul(set1(0.39894228f), exp(mul(mul(x, x), set1(-0.5f))));
    return fma(x, density, normal_below(x));
  }
};
struct GeluTanh {  // 0.5 x (1 + tanh(u)) is x * sigmoid(2u), 2u = A x + B x^3
  static constexpr float A = 2 * 0.79788456f, B = 2 * 0.79788456f * 0.044715f;
  static vf of(vf x) {
    vf u = mul(x, fma(mul(x, x), set1(B), set1(A)));
    return mul(x, sigmoid(u));
  }
  static vf slope(vf x) {
    vf square = mul(x, x), s = sigmoid(mul(x, fma(square, set1(B), set1(A))));
    vf inner = mul(x, fma(square, set1(3 * B), set1(A)));
    return fma(mul(s, sub(set1(1), s)), inner, s);
  }
};
struct Relu {
  static vf of(vf x) { return max(zero(), x); }
  static vf slope(vf x) { return where_less(zero(), x, set1(1), zero()); }
};
struct Relu2 {
  static vf of(vf x) { vf y = max(zero(), x); return mul(y, y); }
  static vf slope(vf x) { vf y = max(zero(), x); return add(y, y); }
};
struct QuickGelu {
  static vf of(vf x) { return mul(x, sigmoid(mul(x, set1(1.702f)))); }
  static vf slope(vf x) {
    vf s = sigmoid(mul(x, set1(1.702f)));
    return fma(mul(mul(x, set1(1.702f)), s), sub(set1(1), s), s);
  }
};

template <class F> void with_activation(int64_t act, F f) {
  switch (act) {  // the order of ACTIVATIONS in ops/activations.py
    case 0: return f(Silu{});
    case 1: return f(Gelu{});
    case 2: return f(GeluTanh{});
    case 3: return f(Relu{});
    case 4: return f(Relu2{});
    case 5: return f(QuickGelu{});
  }
}

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
    with_activation(act, [&](auto kind) {
      run<decltype(kind)>((T*)out, (const T*)gate, (const T*)up, rows, n, gate_stride, up_stride);
    });
  });
}

// Of y = act(gate) * up: dgate and, with up, dup, all dense but gate and up.
void gated_backward(ptr dgate, ptr dup, ptr dy, ptr gate, ptr up, int64_t rows, int64_t n, int64_t gate_stride,
                    int64_t up_stride, int64_t dtype, int64_t act) {
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_activation(act, [&](auto kind) {
      using Act = decltype(kind);
      parallel_for(rows, GRAIN / (n + 1) + 1, [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
          T *dg = (T*)dgate + r * n, *du = (T*)dup + r * n;
          const T *d = (const T*)dy + r * n, *g = (const T*)gate + r * gate_stride, *u = (const T*)up + r * up_stride;
          for_each_vector(n, [&](int64_t i, auto load, auto store) {
            vf x = load(g + i), y = load(d + i);
            if (up) store(du + i, mul(y, Act::of(x)));
            store(dg + i, mul(up ? mul(y, load(u + i)) : y, Act::slope(x)));
          });
        }
      });
    });
  });
}
