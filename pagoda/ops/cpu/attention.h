// What attention.cpp and attention_backward.cpp share: who attends to what, scores, small matrix products, and the form
// in which those want their second operand.
#pragma once
#include <algorithm>
#include <type_traits>

#include "amx.h"
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int MR = W == 16 ? 8 : 4, NV = 2;  // rows and vectors of a product in registers; MR divides a strip
constexpr float INF = std::numeric_limits<float>::infinity();

struct Problem {
  ptr out, q, k, v;
  const int32_t *cu_seqlens, *block_table, *seq_lens;
  const float *k_scale, *v_scale, *alibi;
  float* lse;  // null, or (rows, n_head): the logarithm of each softmax's denominator, for the backward pass
  int64_t n_seq, n_head, n_kv_head, head_size, page_size, max_pages, q_stride, k_stride, v_stride, q_dtype, kv_dtype;
  int64_t causal, window;
  float scale, softcap;

  int64_t group() const { return n_head / n_kv_head; }
  int64_t padded() const { return (head_size + 2 * W - 1) / (2 * W) * (2 * W); }
};

struct Sequence {  // one sequence of the stream
  const Problem& p;
  int64_t first, n_q, n_k;  // its first query's row; how many queries and keys
  const int32_t* pages;

  Sequence(const Problem& p, int64_t s) : p(p), first(p.cu_seqlens[s]), n_q(p.cu_seqlens[s + 1] - first) {
    n_k = p.seq_lens ? p.seq_lens[s] : n_q;
    pages = p.block_table ? p.block_table + s * p.max_pages : nullptr;
  }
  int64_t position(int64_t query) const { return n_k - n_q + query; }
  // Query sees keys low .. high - 1.
  int64_t low(int64_t query) const { return p.window ? std::max<int64_t>(0, position(query) - p.window + 1) : 0; }
  int64_t high(int64_t query) const { return p.causal ? position(query) + 1 : n_k; }
  // How many of the tile's keys, from `start` on, a strip of queries has to look at, whose last this is.
  int64_t seen(int64_t query, int64_t start) const;

  struct Place { int64_t row, run; };
  // The row of k and v (counted in tokens) where a key stands, and how many of those before `to` stand there one after the other.
  Place locate(int64_t key, int64_t to) const {
    if (!pages) return {first + key, to - key};
    int64_t page = key / p.page_size, end = (page + 1) * p.page_size;
    const Place place{pages[page] * p.page_size + key - page * p.page_size, 0};
    for (; end < to && pages[page + 1] == pages[page] + 1; page++) end += p.page_size;
    return {place.row, std::min(end, to) - key};
  }
  void locate(int64_t from, int64_t to, int64_t* rows) const {  // each one's row
    for (int64_t j = from; j < to;) {
      const auto [row, run] = locate(j, to);
      for (int64_t i = 0; i < run; i++) rows[j++ - from] = row + i;
    }
  }
};

// One head's keys or values, by token row.
template <class T> struct Heads {
  const T* base;
  int64_t stride, head_size;
  const float* scale;  // int8: one per token row, n_kv_head apart; otherwise nullptr
  int64_t scale_stride;

  Heads(ptr base, int64_t stride, const float* scale, const Problem& p, int64_t head)
      : base((const T*)base + head * p.head_size), stride(stride), head_size(p.head_size),
        scale(scale ? scale + head : nullptr), scale_stride(p.n_kv_head) {}
  INLINE const T* row(int64_t at) const { return base + at * stride; }
  INLINE float scale_of(int64_t at) const { return scale[at * scale_stride]; }
};

// Rows of n elements that stand `stride` apart from `at` on, as floats `to_stride` apart.
void read_rows(float* to, int64_t to_stride, ptr from, int64_t at, int64_t stride, int64_t rows, int64_t dtype, int64_t n) {
  with_float_type(dtype, [&](auto type) {
    auto row = (const decltype(type)*)from + at;
    for (int64_t r = 0; r < rows; r++, row += stride, to += to_stride)
      for_each_vector(n, [&](int64_t i, auto load, auto store) { store(to + i, load(row + i)); });
  });
}

template <class T> INLINE void write_row(T* to, const float* from, float factor, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto load, auto store) { store(to + i, mul(load(from + i), set1(factor))); });
}

// Turns a row's products q.k with keys start .. start + n - 1 (n a multiple of W) into scores, -infinity for the keys
// that the query does not see. Returns their maximum, or `before` if that is larger.
INLINE float score(const Sequence& s, float* x, int64_t n, int64_t start, int64_t query, int64_t head, float before) {
  static const float LANE[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Problem& p = s.p;
  const int64_t low = s.low(query) - start, high = s.high(query) - start;
  const vf scale = set1(p.scale), cap = set1(p.softcap), slope = set1(p.alibi ? p.alibi[head] : 0), hidden = set1(-INF);
  vf largest = set1(before);
  for (int64_t i = 0; i < n; i += W) {
    vf a = mul(load(x + i), scale);
    if (p.softcap) a = mul(cap, tanh(div(a, cap)));
    if (p.alibi) a = fma(slope, add(load(LANE), set1(float(start + i - s.position(query)))), a);
    if (i < low) a = where_less(load(LANE), set1(float(low - i)), hidden, a);
    if (i + W > high) a = where_less(load(LANE), set1(float(high - i)), a, hidden);
    store(x + i, a);
    largest = max(a, largest);
  }
  return reduce_max(largest);
}

// Scores become weights exp(score - maximum), by this exponential; returns their sum.
template <class Exp> INLINE float weigh(float* x, int64_t n, float maximum, Exp exp) {
  const vf shift = set1(maximum == -INF ? 0 : maximum);  // nothing seen yet: the weights are exp(-infinity) = 0
  vf total = zero();
  for (int64_t i = 0; i < n; i += W) {
    vf a = exp(sub(load(x + i), shift));
    store(x + i, a);
    total = add(total, a);
  }
  return reduce_add(total);
}

// What weights relative to the maximum `before` shrink by when the maximum grows to `now`.
INLINE vf shrink(vf before, vf now) {
  const vf lowest = set1(-std::numeric_limits<float>::max());  // -infinity twice (nothing seen yet) is no growth
  return exp(sub(max(before, lowest), max(now, lowest)));
}

// c (M, N * W) = [c +] a (M, depth) b (depth, N * W), all of c in registers. TRANSPOSED: a is (depth, M).
template <class Cell, int M, int N, bool TRANSPOSED>
void product_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc, bool accumulate) {
  vf acc[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] = accumulate ? load(c + m * ldc + n * W) : zero();
  for (int64_t i = 0; i < depth; i++) {
    vf row[N];
    for (int n = 0; n < N; n++) row[n] = load(b + i * ldb + n * W);
    for (int m = 0; m < M; m++) {
      const vf x = set1(TRANSPOSED ? a[i * lda + m] : a[m * lda + i]);
      for (int n = 0; n < N; n++) acc[m][n] = Cell::step(acc[m][n], x, row[n]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(c + m * ldc + n * W, acc[m][n]);
}

// c (rows, columns) = [c +] a (rows, depth) b (depth, columns); `rows` is a multiple of MR, `columns` of W.
template <class Cell, bool TRANSPOSED = false>
void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, int64_t columns, int64_t depth,
             float* c, int64_t ldc, bool accumulate) {
#if MATRIX_UNIT
  if constexpr (Cell::PER_CELL == 2) {  // rows, columns and depth are multiples of 32, 32 and 16
    for (int64_t n = 0; n < columns; n += 32)
      for (int64_t m = 0; m < rows; m += 32)
        multiply_bf16<2, 2>(
            a + m * lda, lda * 4, depth / 16, [&](int64_t i, int t) { return b + i * 16 * ldb + n + t * 16; }, ldb * 4,
            [&](int i, int t) { return c + (m + i * 16) * ldc + n + t * 16; }, ldc * 4, accumulate);
    return;
  }
#endif
  for (int64_t n = 0; n < columns; n += NV * W)  // b's column block stays in the L1 cache
    with_count<NV>(std::min<int64_t>(NV, (columns - n) / W), [&](auto N) {
      for (int64_t m = 0; m < rows; m += MR)
        product_block<Cell, MR, N, TRANSPOSED>(a + m * (TRANSPOSED ? 1 : lda), lda, b + n, ldb, depth, c + m * ldc + n, ldc, accumulate);
    });
}

constexpr int64_t KEYS = 64;  // rows of a tile that is packed
#if MATRIX_UNIT
constexpr int64_t STRIP = 32;
#else
constexpr int64_t STRIP = 16;  // rows of a tile of queries that are multiplied together, with no more keys than they see
#endif

inline int64_t Sequence::seen(int64_t query, int64_t start) const {
  return std::clamp<int64_t>((high(query) - start + STRIP - 1) / STRIP * STRIP, 0, KEYS);
}

// The keys or values of a tile as vectors: row(t, d) gives W cells of key t from cell d on, zeros past the ends.
template <class Cell, class T> struct TileRows {
  const Heads<T>& heads;
  const int64_t* at;
  int64_t begin, end;  // keys begin .. end - 1 of the tile exist

  INLINE vi row(int64_t t, int64_t d) const {
    const int64_t left = heads.head_size - d * Cell::PER_CELL;
    if (t < begin || t >= end || left <= 0) return set1_bits(0);
    const T* p = heads.row(at[t - begin]) + d * Cell::PER_CELL;
    if constexpr (Cell::PER_CELL == 2) {
      if (left >= 2 * W) return load_bits(p);
      T tail[2 * W] = {};
      memcpy(tail, p, left * sizeof(T));
      return load_bits(tail);
    } else {
      vf a = left >= W ? load(p) : load_part(p, int(left));
      return (vi)(heads.scale ? mul(a, set1(heads.scale_of(at[t - begin]))) : a);
    }
  }
};

// Keys, transposed: to (padded / PER_CELL, KEYS) cells.
template <class Cell, class T> void pack_keys(const TileRows<Cell, T>& keys, int64_t padded, float* to) {
  for (int64_t d = 0; d < padded / Cell::PER_CELL; d += W)
    for (int64_t j = 0; j < KEYS; j += W) {
      vi block[W];
      for (int t = 0; t < W; t++) block[t] = keys.row(j + t, d);
      transpose(block);
      for (int i = 0; i < W; i++) store_bits(to + (d + i) * KEYS + j, block[i]);
    }
}

// Values: to (KEYS / PER_CELL, padded) cells; a pair of bf16 takes them from two consecutive keys.
template <class Cell, class T> void pack_values(const TileRows<Cell, T>& values, int64_t padded, float* to) {
  if constexpr (Cell::PER_CELL == 2)
    for (int64_t j = 0; j < KEYS; j += 2)
      for (int64_t d = 0; d < padded; d += 2 * W) {
        uint16_t even[2 * W], odd[2 * W];
        store_bits(even, values.row(j, d / 2));
        store_bits(odd, values.row(j + 1, d / 2));
        for (int i = 0; i < 2; i++) interleave(even + i * W, odd + i * W, to + j / 2 * padded + d + i * W);
      }
  else
    for (int64_t j = 0; j < KEYS; j++)
      for (int64_t d = 0; d < padded; d += W) store_bits(to + j * padded + d, values.row(j, d));
}

}  // namespace
