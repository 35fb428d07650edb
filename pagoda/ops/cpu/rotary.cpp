// Rotary embedding, and the write of keys and values into the pages of a cache: apart, or both in one pass.
//
// Bound: memory. Each element of q, k and v is read once and written once; cos and sin are shared by a token's heads.
// Pages are contiguous (n_pages, page_size, n_kv_head, head_size), so slot = page * page_size + offset is a row of them.
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

#include <vector>

namespace {

constexpr int64_t GRAIN = 1 << 13;  // elements that are worth a thread

// y = x rotated, one head: dimension i of the first half pairs with i of the second, the rest passes through.
template <class T>
void rotate(T* y, const T* x, const float* cos, const float* sin, int64_t half, int64_t head_size) {
  for_each_vector(half, [&](int64_t i, auto load, auto store) {
    vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(y + i, fnma(b, s, mul(a, c)));
    store(y + half + i, fma(a, s, mul(b, c)));
  });
  if (y != x) memcpy(y + 2 * half, x + 2 * half, (head_size - 2 * half) * sizeof(T));
}

// One head of one token into the cache, converted.
template <class T, class C> void put(C* page, float*, const T* x, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto load, auto store) { store(page + i, load(x + i)); });
}
template <class T> void put(T* page, float*, const T* x, int64_t n) { memcpy(page, x, n * sizeof(T)); }
// int8: round(x / step) with step = the largest magnitude / 127. Anything that is not finite makes the step NaN.
template <class T> void put(int8_t* page, float* step, const T* x, int64_t n) {
  vf largest = zero(), poison = zero();
  for_each_vector(n, [&](int64_t i, auto load, auto) {
    vf a = load(x + i);
    largest = max(absolute(a), largest);
    poison = fma(a, zero(), poison);
  });
  *step = reduce_max(largest) / 127 + reduce_add(poison);
  const vf divisor = set1(*step > 1e-30f ? *step : 1e-30f);
  for_each_vector(n, [&](int64_t i, auto load, auto store) { store(page + i, div(load(x + i), divisor)); });
}

template <class F> void with_cache_type(int64_t dtype, F f) {
  if (dtype == I8) f(int8_t{});
  else with_float_type(dtype, f);
}

}  // namespace

void rotary(ptr q_out, ptr k_out, ptr q, ptr k, ptr cos, ptr sin, int64_t rows, int64_t n_head, int64_t n_kv_head,
            int64_t head_size, int64_t half, int64_t q_stride, int64_t k_stride, int64_t dtype) {
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(rows, GRAIN / ((n_head + n_kv_head) * head_size + 1) + 1, [=](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const float *c = (const float*)cos + r * half, *s = (const float*)sin + r * half;
        for (int64_t h = 0; h < n_head; h++)
          rotate((T*)q_out + (r * n_head + h) * head_size, (const T*)q + r * q_stride + h * head_size, c, s, half, head_size);
        for (int64_t h = 0; h < n_kv_head; h++)
          rotate((T*)k_out + (r * n_kv_head + h) * head_size, (const T*)k + r * k_stride + h * head_size, c, s, half, head_size);
      }
    });
  });
}

// With q_out == 0 nothing is rotated: the plain write into the cache.
void rotary_store(ptr q_out, ptr q, ptr k, ptr v, ptr cos, ptr sin, ptr k_pages, ptr v_pages, ptr k_scale, ptr v_scale,
                  ptr slots, int64_t rows, int64_t n_slots, int64_t n_head, int64_t n_kv_head, int64_t head_size, int64_t half,
                  int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t dtype, int64_t cache_dtype) {
  check_rows(slots, rows, n_slots);
  with_float_type(dtype, [&](auto type) {
    with_cache_type(cache_dtype, [&](auto cache_type) {
      using T = decltype(type);
      using C = decltype(cache_type);
      parallel_for(rows, GRAIN / ((n_head + 2 * n_kv_head) * head_size + 1) + 1, [=](int64_t begin, int64_t end) {
        std::vector<T> rotated(head_size);  // rounded to T first, as the reference does
        for (int64_t r = begin; r < end; r++) {
          const float *c = (const float*)cos + r * half, *s = (const float*)sin + r * half;
          if (q_out)
            for (int64_t h = 0; h < n_head; h++)
              rotate((T*)q_out + (r * n_head + h) * head_size, (const T*)q + r * q_stride + h * head_size, c, s, half,
                     head_size);
          const int64_t slot = ((const int64_t*)slots)[r];
          for (int64_t h = 0; h < n_kv_head; h++) {
            const int64_t at = slot * n_kv_head + h;
            const T* key = (const T*)k + r * k_stride + h * head_size;
            if (q_out) {
              rotate(rotated.data(), key, c, s, half, head_size);
              key = rotated.data();
            }
            put((C*)k_pages + at * head_size, (float*)k_scale + at, key, head_size);
            put((C*)v_pages + at * head_size, (float*)v_scale + at, (const T*)v + r * v_stride + h * head_size, head_size);
          }
        }
      });
    });
  });
}
