// RMS and layer norm over rows, alone or with the residual added first, and the way back.
//
// Bound: memory. A row is read once and written once (with a residual: two reads, two writes), 2 to 4 x n x the element's
// size; it stays in the L1 cache between the two passes. Sums are taken in W lanes, in the row's order, so a row's
// result depends on nothing but the row.
#include <array>
#include <memory>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace {

constexpr int64_t GRAIN = 1 << 14;  // elements that are worth a thread
constexpr int64_t BLOCK = 32;       // rows whose share in the gradient of a weight one thread adds up

// The row that is normed: x, or x + delta rounded to T as the model's residual stream holds it, written to sum.
template <class T> INLINE const T* residual(T* sum, const T* x, const T* delta, int64_t n) {
  if (!delta) return x;
  for_each_vector(n, [&](int64_t i, auto load, auto store) { store(sum + i, add(load(x + i), load(delta + i))); });
  return sum;
}

// The sum of (x - middle)^2. What lies behind the row must not count as zeros.
template <class T> INLINE float squares_around(const T* x, int64_t n, float middle) {
  vf squares = zero();
  const int64_t whole = n / W * W;
  for (int64_t i = 0; i < whole; i += W) {
    vf a = sub(load(x + i), set1(middle));
    squares = fma(a, a, squares);
  }
  float sum = reduce_add(squares);
  for (int64_t i = whole; i < n; i++) {
    const float a = to_float(x[i]) - middle;
    sum += a * a;
  }
  return sum;
}

template <class T, class F>
void over_rows(ptr out, ptr sum, ptr x, ptr delta, int64_t rows, int64_t n, int64_t x_stride, int64_t delta_stride, F f) {
  parallel_for(rows, GRAIN / (n + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      f((T*)out + r * n, residual((T*)sum + r * n, (const T*)x + r * x_stride,
                                  delta ? (const T*)delta + r * delta_stride : nullptr, n));
  });
}

// f(dx, dy, dsum, x, weight, sums) for every row; sums are the float32 rows for its block of rows, which add up to the
// gradients of weight (and bias): the bits do not depend on the number of threads.
template <size_t N, class F>
void backward_over_rows(ptr dx, const ptr (&gradients)[N], ptr dy, ptr dsum, ptr x, ptr weight, int64_t rows, int64_t n,
                        int64_t x_stride, int64_t dtype, int64_t weight_dtype, F f) {
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  const std::unique_ptr<float[]> memory(new float[N * blocks * n]);
  std::array<float*, N> first;
  for (size_t i = 0; i < N; i++) first[i] = gradients[i] ? memory.get() + i * blocks * n : nullptr;
  with_float_type(dtype, [&](auto type) {
    with_float_type(weight_dtype, [&](auto weight_type) {
      using T = decltype(type);
      using Weight = decltype(weight_type);
      parallel_for(blocks, GRAIN / (n * BLOCK + 1) + 1, [=](int64_t begin, int64_t end) {
        for (int64_t r = begin * BLOCK; r < std::min(end * BLOCK, rows); r++) {
          std::array<float*, N> sum = first;
          for (float*& to : sum) {
            if (!to) continue;
            to += r / BLOCK * n;
            if (r % BLOCK == 0) std::fill(to, to + n, 0.0f);
          }
          f((T*)dx + r * n, (const T*)dy + r * n, dsum ? (const T*)dsum + r * n : nullptr, (const T*)x + r * x_stride,
            (const Weight*)weight, sum);
        }
      });
      for (size_t k = 0; k < N; k++)
        if (first[k])
          parallel_for(n, GRAIN / (blocks + 1) + 1, [=](int64_t begin, int64_t end) {
            for_each_vector(end - begin, [&](int64_t i, auto load, auto store) {
              vf total = zero();
              for (int64_t b = 0; b < blocks; b++) total = add(total, load(first[k] + b * n + begin + i));
              store((Weight*)gradients[k] + begin + i, total);
            });
          });
    });
  });
}

}  // namespace

void add(ptr out, ptr x, ptr delta, int64_t n, int64_t dtype) {
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(n, GRAIN, [=](int64_t begin, int64_t end) {
      residual((T*)out + begin, (const T*)x + begin, (const T*)delta + begin, end - begin);
    });
  });
}

void rms_norm(ptr out, ptr sum, ptr x, ptr delta, ptr weight, int64_t rows, int64_t n, int64_t x_stride,
              int64_t delta_stride, int64_t dtype, int64_t weight_dtype, double eps, double offset) {
  with_float_type(dtype, [&](auto type) {
    with_float_type(weight_dtype, [&](auto weight_type) {
      using T = decltype(type);
      auto w = (const decltype(weight_type)*)weight;
      over_rows<T>(out, sum, x, delta, rows, n, x_stride, delta_stride, [=](T* y, const T* row) {
        vf squares = zero();
        for_each_vector(n, [&](int64_t i, auto load, auto) {
          vf a = load(row + i);
          squares = fma(a, a, squares);
        });
        vf scale = set1(1.0f / std::sqrt(reduce_add(squares) / n + float(eps)));
        vf shift = set1(float(offset));
        for_each_vector(n, [&](int64_t i, auto load, auto store) {
          store(y + i, mul(mul(load(row + i), scale), add(load(w + i), shift)));
        });
      });
    });
  });
}

void layer_norm(ptr out, ptr sum, ptr x, ptr delta, ptr weight, ptr bias, int64_t rows, int64_t n, int64_t x_stride,
                int64_t delta_stride, int64_t dtype, int64_t weight_dtype, double eps) {
  with_float_type(dtype, [&](auto type) {
    with_float_type(weight_dtype, [&](auto weight_type) {
      using T = decltype(type);
      auto w = (const decltype(weight_type)*)weight;
      auto b = (const decltype(weight_type)*)bias;
      over_rows<T>(out, sum, x, delta, rows, n, x_stride, delta_stride, [=](T* y, const T* row) {
        vf total = zero();
        for_each_vector(n, [&](int64_t i, auto load, auto) { total = add(total, load(row + i)); });
        const float middle = reduce_add(total) / n;
        const vf mean = set1(middle), scale = set1(1.0f / std::sqrt(squares_around(row, n, middle) / n + float(eps)));
        for_each_vector(n, [&](int64_t i, auto load, auto store) {
          vf a = mul(mul(sub(load(row + i), mean), scale), load(w + i));
          store(y + i, b ? add(a, load(b + i)) : a);
        });
      });
    });
  });
}

// dx = dsum + the gradient through the norm, where dsum (or 0) is what else reaches x; dweight and dbias (0: not wanted)
// are of weight's type.
void rms_norm_backward(ptr dx, ptr dweight, ptr dy, ptr dsum, ptr x, ptr weight, int64_t rows, int64_t n,
                       int64_t x_stride, int64_t dtype, int64_t weight_dtype, double eps, double offset) {
  const vf shift = set1(float(offset));
  backward_over_rows(dx, {dweight}, dy, dsum, x, weight, rows, n, x_stride, dtype, weight_dtype,
                     [=](auto* d, const auto* g, const auto* more, const auto* a, const auto* w, auto partial) {
    vf squares = zero(), products = zero();
    for_each_vector(n, [&](int64_t i, auto load, auto) {
      vf b = load(a + i);
      squares = fma(b, b, squares);
      products = fma(mul(load(g + i), add(load(w + i), shift)), b, products);
    });
    const float scale = 1.0f / std::sqrt(reduce_add(squares) / n + float(eps));
    const vf s = set1(scale), back = set1(reduce_add(products) / n * scale * scale * scale);
    for_each_vector(n, [&](int64_t i, auto load, auto store) {
      vf b = load(a + i), c = mul(load(g + i), s), grad = fnma(b, back, mul(c, add(load(w + i), shift)));
      store(d + i, more ? add(grad, load(more + i)) : grad);
      if (float* dw = partial[0]) store(dw + i, fma(c, b, load(dw + i)));
    });
  });
}

void layer_norm_backward(ptr dx, ptr dweight, ptr dbias, ptr dy, ptr dsum, ptr x, ptr weight, int64_t rows, int64_t n,
                         int64_t x_stride, int64_t dtype, int64_t weight_dtype, double eps) {
  backward_over_rows(dx, {dweight, dbias}, dy, dsum, x, weight, rows, n, x_stride, dtype, weight_dtype,
                     [=](auto* d, const auto* g, const auto* more, const auto* a, const auto* w, auto partial) {
    vf total = zero();
    for_each_vector(n, [&](int64_t i, auto load, auto) { total = add(total, load(a + i)); });
    const float middle = reduce_add(total) / n;
    vf mean = set1(middle), sum = zero(), products = zero();
    for_each_vector(n, [&](int64_t i, auto load, auto) {  // behind the row's end c is 0
      vf b = sub(load(a + i), mean), c = mul(load(g + i), load(w + i));
      sum = add(sum, c);
      products = fma(b, c, products);
    });
    const float scale = 1.0f / std::sqrt(squares_around(a, n, middle) / n + float(eps));
    const vf s = set1(scale), first = set1(reduce_add(sum) / n), second = set1(reduce_add(products) / n * scale * scale);
    for_each_vector(n, [&](int64_t i, auto load, auto store) {
      vf b = sub(load(a + i), mean), y = load(g + i), c = mul(y, load(w + i));
      vf grad = mul(fnma(b, second, sub(c, first)), s);
      store(d + i, more ? add(grad, load(more + i)) : grad);
      if (float* dw = partial[0]) store(dw + i, fma(mul(b, s), y, load(dw + i)));
      if (float* db = partial[1]) store(db + i, add(y, load(db + i)));
    });
  });
}
