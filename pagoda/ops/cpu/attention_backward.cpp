// The way back through attention: dq, dk, dv from dout, without ever holding all scores (Dao et al. 2022).
//
// Bound: multiplications, 10 x head_size per query head and visible key. A thread takes (sequence, query head) items. For
// each tile of keys it goes through the tiles of queries that see them, strip by strip and no further than a strip
// sees, computes their weights again from the log-sum-exp that the forward pass left, and adds up, in float32 or, for
// bf16 where the CPU multiplies that, in pairs:
//   weights P = exp(S - lse), dV += P^T dO, dP = dO V^T, dS = P (dP - rows of dO . O), dK += dS^T Q, dQ += dS K.
// The heads of a group leave their dk and dv in scratch, which is summed in their order: the bits do not depend on the
// number of threads.
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace {

constexpr int64_t TILE = KEYS;  // queries and keys of a tile

struct Gradients {
  ptr dq, dk, dv, dout;
  int64_t dq_stride, dk_stride;  // and of dv
  float *heads_dk, *heads_dv;  // (rows, n_head, head_size), where query heads share key heads
};

// Rows of `columns` floats transposed: (rows, columns) to (columns, rows). Both are multiples of W.
void transpose_rows(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < columns; c += W) {
      vi block[W];
      for (int i = 0; i < W; i++) block[i] = load_bits(from + (r + i) * columns + c);
      transpose(block);
      for (int i = 0; i < W; i++) store_bits(to + (c + i) * rows + r, block[i]);
    }
}

// S and dP of a strip of queries, of which `rows` from i on exist, and the keys of a tile that they see, (STRIP, TILE),
// become P and dS; rows behind become 0.
void weights_and_slopes(const Sequence& s, int64_t head, int64_t i, int64_t rows, int64_t start, int64_t seen, const float* delta,
                        float* x, float* dx) {
  const Problem& p = s.p;
  const vf scale = set1(p.scale), inverse_cap = set1(p.softcap ? 1 / p.softcap : 0), one = set1(1);
  for (int64_t r = 0; r < rows; r++) {
    float *weight = x + r * TILE, *grad = dx + r * TILE;
    score(s, weight, seen, start, i + r, head, -INF);
    const vf lse = set1(p.lse[(s.first + i + r) * p.n_head + head]), mean = set1(delta[i + r]);
    for (int64_t j = 0; j < seen; j += W) {
      const vf a = load(weight + j), w = exp(sub(a, lse));
      vf g = mul(mul(w, sub(load(grad + j), mean)), scale);
      if (p.softcap) {  // hidden keys have -infinity for a score: their slope is that of the cap's lower end, 0
        const vf t = mul(max(a, set1(-p.softcap)), inverse_cap);
        g = mul(g, fnma(t, t, one));
      }
      store(weight + j, w);
      store(grad + j, g);
    }
  }
  std::fill(x + rows * TILE, x + STRIP * TILE, 0.0f);
  std::fill(dx + rows * TILE, dx + STRIP * TILE, 0.0f);
}

// What a tile of queries sees of a tile of keys: f(first, rows, seen) for its strips.
template <class F> INLINE void for_strips(const Sequence& s, int64_t i, int64_t start, F f) {
  for (int64_t first = 0, rows = std::min(TILE, s.n_q - i); first < rows; first += STRIP) {
    const int64_t n = std::min(STRIP, rows - first), seen = s.seen(i + first + n - 1, start);
    if (seen) f(first, n, seen);
  }
}

// The same from the other side: f(key, first, n) for strips of keys, which queries first .. first + n - 1 see.
template <class F> INLINE void for_key_strips(const Sequence& s, int64_t i, int64_t start, F f) {
  const int64_t rows = std::min(TILE, s.n_q - i), end = (rows + STRIP - 1) / STRIP * STRIP;
  for (int64_t key = 0, first = 0; key < TILE; key += STRIP) {
    while (first < end && s.seen(i + std::min(first + STRIP, rows) - 1, start) <= key) first += STRIP;
    if (first < end) f(key, first, end - first);
  }
}

// Rows of dq, dk or dv (n, padded), from row `first` of the stream on, to where they belong.
void leave(ptr to, int64_t stride, int64_t dtype, const Problem& p, int64_t head, int64_t first, int64_t n, const float* from) {
  with_float_type(dtype, [&](auto type) {
    auto row = (decltype(type)*)to + first * stride + head * p.head_size;
    for (int64_t t = 0; t < n; t++) write_row(row + t * stride, from + t * p.padded(), 1, p.head_size);
  });
}

void leave_keys(const Problem& p, const Gradients& to, int64_t head, int64_t first, int64_t n, const float* dk, const float* dv) {
  if (p.group() == 1) {
    leave(to.dk, to.dk_stride, p.q_dtype, p, head, first, n, dk);
    leave(to.dv, to.dk_stride, p.q_dtype, p, head, first, n, dv);
  } else {
    leave((ptr)to.heads_dk, p.n_head * p.head_size, F32, p, head, first, n, dk);
    leave((ptr)to.heads_dv, p.n_head * p.head_size, F32, p, head, first, n, dv);
  }
}

// Each query's dout . out, and all of it at once.
void output_products(const Problem& p, const Gradients& to, const Sequence& s, int64_t head, float* delta) {
  with_float_type(p.q_dtype, [&](auto type) {
    const int64_t stride = p.n_head * p.head_size, at = s.first * stride + head * p.head_size;
    auto out = (const decltype(type)*)p.out + at, grad = (const decltype(type)*)to.dout + at;
    for (int64_t r = 0; r < s.n_q; r++, out += stride, grad += stride) {
      vf dot = zero();
      for_each_vector(p.head_size, [&](int64_t i, auto load, auto) { dot = fma(load(out + i), load(grad + i), dot); });
      delta[r] = reduce_add(dot);
    }
  });
}

void backward_head(const Problem& p, const Gradients& to, int64_t sequence, int64_t head) {
  const Sequence s(p, sequence);
  const int64_t d = p.head_size, padded = p.padded(), all = (s.n_q + TILE - 1) / TILE * TILE, kv_head = head / p.group();
  static thread_local std::vector<float> memory;
  const size_t size = all * (3 * padded + 1) + TILE * 6 * padded + 2 * TILE * TILE;
  if (memory.size() < size) memory.resize(size);
  float *q = memory.data(), *go = q + all * padded, *dq = go + all * padded, *delta = dq + all * padded;
  float *k = delta + all, *v = k + TILE * padded, *kt = v + TILE * padded, *vt = kt + TILE * padded;
  float *dk = vt + TILE * padded, *dv = dk + TILE * padded, *x = dv + TILE * padded, *dx = x + TILE * TILE;
  std::fill(padded == d ? dq : q, delta, 0.0f);
  if (padded != d) std::fill(k, x, 0.0f);
  else for (float* rows : {q, go}) std::fill(rows + s.n_q * padded, rows + all * padded, 0.0f);

  read_rows(q, padded, p.q, s.first * p.q_stride + head * d, p.q_stride, s.n_q, p.q_dtype, d);
  read_rows(go, padded, to.dout, (s.first * p.n_head + head) * d, p.n_head * d, s.n_q, p.q_dtype, d);
  output_products(p, to, s, head, delta);
  for (int64_t start = 0; start < s.n_k; start += TILE) {
    const int64_t n = std::min(TILE, s.n_k - start);
    for (float* rows : {k, v}) std::fill(rows + n * padded, rows + TILE * padded, 0.0f);
    std::fill(dk, x, 0.0f);
    read_rows(k, padded, p.k, (s.first + start) * p.k_stride + kv_head * d, p.k_stride, n, p.kv_dtype, d);
    read_rows(v, padded, p.v, (s.first + start) * p.v_stride + kv_head * d, p.v_stride, n, p.kv_dtype, d);
    transpose_rows(k, TILE, padded, kt);
    transpose_rows(v, TILE, padded, vt);
    for (int64_t i = 0; i < s.n_q; i += TILE) {
      const int64_t rows = std::min(TILE, s.n_q - i);
      if (s.high(i + rows - 1) <= start || s.low(i) >= start + n) continue;
      for_strips(s, i, start, [&](int64_t first, int64_t n, int64_t seen) {
        const int64_t row = (i + first) * padded;
        float *strip = x + first * TILE, *slopes = dx + first * TILE;
        product<Float32>(q + row, padded, kt, TILE, STRIP, seen, padded, strip, TILE, false);
        product<Float32>(go + row, padded, vt, TILE, STRIP, seen, padded, slopes, TILE, false);
        weights_and_slopes(s, head, i + first, n, start, seen, delta, strip, slopes);
        product<Float32>(slopes, TILE, k, padded, STRIP, padded, seen, dq + row, padded, true);
      });
      for_key_strips(s, i, start, [&](int64_t key, int64_t first, int64_t n) {
        const int64_t row = (i + first) * padded, at = first * TILE + key;
        product<Float32, true>(x + at, TILE, go + row, padded, STRIP, padded, n, dv + key * padded, padded, true);
        product<Float32, true>(dx + at, TILE, q + row, padded, STRIP, padded, n, dk + key * padded, padded, true);
      });
    }
    leave_keys(p, to, head, s.first + start, n, dk, dv);
  }
  leave(to.dq, to.dq_stride, p.q_dtype, p, head, s.first, s.n_q, dq);
}

#if defined(__AVX512BF16__)
// (STRIP, columns) floats of rows of TILE as bf16, and transposed.
void round_strip(const float* from, int64_t columns, bf16* plain, bf16* transposed) {
  for (int64_t r = 0; r < STRIP; r += W)
    for (int64_t c = 0; c < columns; c += W) {
      vi block[W];
      for (int i = 0; i < W; i++) {
        const vf row = load(from + (r + i) * TILE + c);
        if (plain) store(plain + (r + i) * TILE + c, row);
        block[i] = (vi)row;
      }
      transpose(block);
      for (int i = 0; i < W; i++) store(transposed + (c + i) * TILE + r, (vf)block[i]);
    }
}

// The same for bf16 in pairs: P and dS are rounded to bf16 for their products, sums are float32.
void backward_head_pairs(const Problem& p, const Gradients& to, int64_t sequence, int64_t head) {
  const Sequence s(p, sequence);
  const int64_t d = p.head_size, padded = p.padded(), depth = padded / 2, all = (s.n_q + TILE - 1) / TILE * TILE;
  const int64_t kv_head = head / p.group(), tile = TILE * depth;  // cells of a tile of rows
  static thread_local std::vector<float> memory;
  const size_t size = all * (4 * depth + padded + 1) + 3 * tile + 2 * TILE * padded + 3 * STRIP * TILE + TILE * TILE;
  if (memory.size() < size) memory.resize(size);
  float *q = memory.data(), *go = q + all * depth, *q_pairs = go + all * depth, *go_pairs = q_pairs + all * depth;
  float *dq = go_pairs + all * depth, *delta = dq + all * padded, *kt = delta + all, *vt = kt + tile, *k_pairs = vt + tile;
  float *dk = k_pairs + tile, *dv = dk + TILE * padded, *x = dv + TILE * padded, *dx = x + STRIP * TILE;
  bf16 *xt = (bf16*)(dx + STRIP * TILE), *dxt = xt + TILE * TILE, *dx_rows = dxt + TILE * TILE;
  using Rows = TileRows<PairsOfBf16, bf16>;
  const Heads<bf16> queries(p.q, p.q_stride, nullptr, p, head), grads(to.dout, p.n_head * d, nullptr, p, head);
  const Heads<bf16> keys(p.k, p.k_stride, nullptr, p, kv_head);
  const Heads<bf16> values(p.v, p.v_stride, nullptr, p, kv_head);
  int64_t at[TILE];
  std::fill(dq, delta, 0.0f);
  if (padded != d) std::fill(q, q_pairs, 0.0f);
  else for (float* rows : {q, go}) std::fill(rows + s.n_q * depth, rows + all * depth, 0.0f);
#if MATRIX_UNIT
  const MatrixUnit unit(UNIT_ROWS, 16);
#endif

  output_products(p, to, s, head, delta);
  for (int64_t i = 0; i < s.n_q; i += TILE) {
    const int64_t n = std::min(TILE, s.n_q - i);
    for (int64_t r = 0; r < n; r++) {
      at[r] = s.first + i + r;
      memcpy(q + (i + r) * depth, queries.row(at[r]), d * sizeof(bf16));
      memcpy(go + (i + r) * depth, grads.row(at[r]), d * sizeof(bf16));
    }
    pack_values(Rows{queries, at, 0, n}, padded, q_pairs + i * depth);
    pack_values(Rows{grads, at, 0, n}, padded, go_pairs + i * depth);
  }
  for (int64_t start = 0; start < s.n_k; start += TILE) {
    const int64_t n = std::min(TILE, s.n_k - start);
    for (int64_t t = 0; t < n; t++) at[t] = s.first + start + t;
    pack_keys(Rows{keys, at, 0, n}, padded, kt);
    pack_keys(Rows{values, at, 0, n}, padded, vt);
    pack_values(Rows{keys, at, 0, n}, padded, k_pairs);
    std::fill(dk, x, 0.0f);
    for (int64_t i = 0; i < s.n_q; i += TILE) {
      const int64_t rows = std::min(TILE, s.n_q - i);
      if (s.high(i + rows - 1) <= start || s.low(i) >= start + n) continue;
      for_strips(s, i, start, [&](int64_t first, int64_t n, int64_t seen) {
        const int64_t row = (i + first) * depth;
        product<PairsOfBf16>(q + row, depth, kt, TILE, STRIP, seen, depth, x, TILE, false);
        product<PairsOfBf16>(go + row, depth, vt, TILE, STRIP, seen, depth, dx, TILE, false);
        weights_and_slopes(s, head, i + first, n, start, seen, delta, x, dx);
        round_strip(x, seen, nullptr, xt + first);
        round_strip(dx, seen, dx_rows, dxt + first);
        product<PairsOfBf16>((float*)dx_rows, TILE / 2, k_pairs, padded, STRIP, padded, seen / 2, dq + (i + first) * padded, padded, true);
      });
      for_key_strips(s, i, start, [&](int64_t key, int64_t first, int64_t n) {
        const int64_t row = (i + first) * depth, at = key * TILE + first;
        product<PairsOfBf16>((float*)(xt + at), TILE / 2, go_pairs + row, padded, STRIP, padded, n / 2, dv + key * padded, padded, true);
        product<PairsOfBf16>((float*)(dxt + at), TILE / 2, q_pairs + row, padded, STRIP, padded, n / 2, dk + key * padded, padded, true);
      });
    }
    leave_keys(p, to, head, s.first + start, n, dk, dv);
  }
  leave(to.dq, to.dq_stride, p.q_dtype, p, head, s.first, s.n_q, dq);
}
#endif

}  // namespace

// All of one dtype, dout and out dense; scratch is (2, rows, n_head, head_size) float32, or 0 where no heads share a key
// head.
void attention_backward(ptr dq, ptr dk, ptr dv, ptr scratch, ptr dout, ptr out, ptr lse, ptr q, ptr k, ptr v,
                        ptr cu_seqlens, ptr alibi, int64_t n_seq, int64_t n_head, int64_t n_kv_head, int64_t head_size,
                        int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t dq_stride, int64_t dk_stride,
                        int64_t dtype, int64_t causal, int64_t window, double scale, double softcap) {
  const Problem p{out, q, k, v, (const int32_t*)cu_seqlens, nullptr, nullptr, nullptr, nullptr, (const float*)alibi,
                  (float*)lse, n_seq, n_head, n_kv_head, head_size, 0, 0, q_stride, k_stride, v_stride, dtype, dtype,
                  causal, window, float(scale), float(softcap)};
  const int64_t rows = p.cu_seqlens[n_seq], size = n_head * head_size, group = p.group();
  const Gradients to{dq, dk, dv, dout, dq_stride, dk_stride, (float*)scratch, (float*)scratch + rows * size};
  std::vector<int64_t> longest_first(n_seq);
  for (int64_t s = 0; s < n_seq; s++) longest_first[s] = s;
  std::stable_sort(longest_first.begin(), longest_first.end(),
                   [&](int64_t a, int64_t b) { return Sequence(p, a).n_q > Sequence(p, b).n_q; });
  auto head = backward_head;
#if defined(__AVX512BF16__)
  if (dtype == BF16) head = backward_head_pairs;
#endif
  parallel_dynamic(n_seq * n_head, [&](int64_t i) { head(p, to, longest_first[i / n_head], i % n_head); });
  if (group == 1) return;
  parallel_for(rows * n_kv_head, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(head_size);
    for (int64_t i = begin; i < end; i++)
      for (auto [from, result] : {std::pair{to.heads_dk, dk}, std::pair{to.heads_dv, dv}}) {
        from += i * group * head_size;
        for (int64_t j = 0; j < head_size; j++) sum[j] = from[j];
        for (int64_t h = 1; h < group; h++)
          for (int64_t j = 0; j < head_size; j++) sum[j] += from[h * head_size + j];
        leave(result, dk_stride, dtype, p, i % n_kv_head, i / n_kv_head, 1, sum.data());
      }
  });
}
