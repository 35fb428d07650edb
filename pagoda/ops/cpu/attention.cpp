// Attention of a flat stream of queries against ragged or paged keys and values, without ever holding all scores.
//
// Two ways through the same mathematics (online softmax: Milakov & Gimelshein 2018, Dao et al. 2022), chosen for each
// sequence by its number of queries alone:
//
// decode (at most DECODE_QUERIES queries). Bound: memory, n_keys x 2 x head_size x the cache element's size per key
//   head. The keys are cut at multiples of CHUNK positions. A thread takes (sequence, chunk, key head) items, reads
//   each key and value once for all query heads of the group, and leaves a maximum, a sum and a weighted value per row;
//   these are combined in the order of the chunks. Keys and values of bf16 are multiplied in pairs where the CPU does
//   that, queries and weights rounded to bf16; otherwise in float32.
// prefill (more queries). Bound: multiplications, 4 x head_size per query head and visible key. A thread takes
//   (sequence, key head, tile of queries) items and goes through tiles of KEYS keys: the keys are packed transposed, the
//   values as they are, and scores and outputs are small matrix products from registers, in float32 or, where queries
//   and cache are bf16 and the CPU multiplies bf16, in pairs of bf16 with float32 sums (the weights are then rounded to
//   bf16, as PyTorch's own flash attention does). A strip of queries meets only those keys of a tile that its last
//   query sees, in steps of a strip; tiles that no query of the item sees are skipped.
//
// Chunks and tiles stand at fixed key positions and masked keys weigh exactly 0, so the bits of a row's result depend on
// nothing else in the batch and not on the number of threads. Between decode and prefill the last bits differ.
#include "attention.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

#include <vector>

namespace {

constexpr int64_t DECODE_QUERIES = 8, CHUNK = 64;
constexpr int64_t TILE_ROWS = 96;  // query rows (queries x group) of a prefill item: what amortises packing its keys
constexpr int DECODE_ROWS = W == 16 ? 4 : 2;  // what fits in the registers

// ---------------------------------------------------------------------------------------------------------- decode

// Where consecutive keys or values stand. Behind the last there are W more of it, so that one can always take W at once.
template <class T> struct Rows {
  const T* of[CHUNK + W];

  Rows(ptr base, int64_t stride, const int64_t* at, int64_t n) {
    for (int64_t j = 0; j < n; j++) of[j] = (const T*)base + at[j] * stride;
    std::fill(of + n, of + n + W, n ? of[n - 1] : nullptr);
  }
};

// Rows that will be needed, of the heads first .. last - 1, fetched into all caches a little at a time in the order in
// which they lie in memory: that decides, by a factor of two, how fast they come.
template <class T> struct Ahead {
  const T *const *row, *const *end;
  int64_t first, bytes, lines;  // of a row; lines of a head
  const char *now = nullptr, *until = nullptr;  // what is fetched: rows that follow each other

  Ahead(const Rows<T>& rows, int64_t n, int64_t head_size, int64_t first, int64_t last)
      : row(rows.of), end(rows.of + n), first(first * head_size), bytes((last - first) * head_size * sizeof(T)),
        lines((head_size * sizeof(T) + 63) / 64) {}
  INLINE void next(int64_t keys) {  // one head of each
    for (int64_t i = keys * lines; i > 0; i--, now += 64) {
      if (now >= until && !follow()) return;
      __builtin_prefetch(now);
    }
  }

 private:
  bool follow() {
    if (row == end) return false;
    now = (const char*)(*row++ + first), until = now + bytes;
    for (; row != end && (const char*)(*row + first) == until; row++) until += bytes;
    return true;
  }
};

// x[r][j] = q[r] . key j, for R rows and n keys (rounded up to fours); the head begins at `offset` in each row. q is laid
// out as load_pair reads the keys. Meanwhile fetch is told how many keys were read, as in all of these.
template <class T, int R, class F>
void decode_scores(const T* const* keys, int64_t offset, int64_t head_size, int64_t n, const float* q, int64_t padded, float* x, F fetch) {
  for (int64_t j = 0; j < n; j += 4) {
    fetch(std::min<int64_t>(4, n - j));
    vf acc[R][4];
    for (auto& row : acc)
      for (vf& a : row) a = zero();
    auto step = [&](int64_t d, auto key) INLINE_LAMBDA {
      UNROLL for (int t = 0; t < 4; t++) {
        vf a, b;
        load_pair(key(t), a, b);
        UNROLL for (int r = 0; r < R; r++)
          acc[r][t] = fma(b, load(q + r * padded + d + W), fma(a, load(q + r * padded + d), acc[r][t]));
      }
    };
    int64_t d = 0;
    for (; d + 2 * W <= head_size; d += 2 * W) step(d, [&](int t) { return keys[j + t] + offset + d; });
    if (d < head_size) {
      T tail[4][2 * W] = {};
      for (int t = 0; t < 4; t++) memcpy(tail[t], keys[j + t] + offset + d, (head_size - d) * sizeof(T));
      step(d, [&](int t) { return (const T*)tail[t]; });
    }
    UNROLL for (int r = 0; r < R; r++) sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], x + r * CHUNK + j);
  }
}

// The same with queries and keys in pairs of bf16: one instruction multiplies 2 W elements. n is rounded up to W.
template <int R, class F>
void decode_scores_in_pairs(const bf16* const* keys, int64_t offset, int64_t head_size, int64_t n, const float* q, int64_t padded,
                            float* x, F fetch) {
  for (int64_t j = 0; j < n; j += W) {
    for (int r = 0; r < R; r++) {
      fetch((std::min<int64_t>(W, n - j) + r) / R);
      vf acc[W];
      UNROLL for (vf& a : acc) a = zero();
      for (int64_t d = 0; d < head_size; d += 2 * W) {
        const vi query = load_bits((const bf16*)(q + r * padded) + d);
        UNROLL for (int t = 0; t < W; t++) acc[t] = dot_bf16(acc[t], query, keys[j + t] + offset + d);
      }
      store(x + r * CHUNK + j, sums(acc));
    }
  }
}

// o[r] = sum over j of x[r][j] * value j, for P load_pairs of elements from `offset` on; of the last pair `length` exist.
template <class T, int R, int P, class F>
INLINE void decode_values_block(const T* const* values, int64_t offset, int64_t n, const float* x, float* o, int64_t padded,
                                int64_t length, F fetch) {
  vf acc[R][2 * P];
  for (auto& row : acc)
    for (vf& a : row) a = zero();
  T tail[2 * W] = {};
  for (int64_t j = 0; j < n; j++) {
    fetch(1);
    const T* row = values[j] + offset;
    if (P == 1 && length < 2 * W) row = (const T*)memcpy(tail, row, length * sizeof(T));
    vf value[2 * P];
    for (int i = 0; i < P; i++) load_pair(row + 2 * W * i, value[2 * i], value[2 * i + 1]);
    for (int r = 0; r < R; r++) {
      vf weight = set1(x[r * CHUNK + j]);
      for (int i = 0; i < 2 * P; i++) acc[r][i] = fma(weight, value[i], acc[r][i]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 2 * P; i++) store(o + r * padded + i * W, acc[r][i]);
}

// The same with weights and values in pairs of bf16, P of whole vectors. x[r] holds the weights of the chunk's positions 0,
// 1, 2 ..., where the keys stand from `skipped` on: a pair is the same one in every step. Elements come in zip's order.
template <int R, int P, class F>
INLINE void decode_values_block_in_pairs(const bf16* const* values, int64_t offset, int64_t skipped, int64_t n, const float* x,
                                         float* o, int64_t padded, F fetch) {
  vf acc[R][2 * P];
  for (auto& row : acc)
    for (vf& a : row) a = zero();
  auto step = [&](int64_t position, const bf16* first, const bf16* second) INLINE_LAMBDA {
    vi value[2 * P];
    for (int i = 0; i < P; i++) zip(load_bits(first + 2 * W * i), load_bits(second + 2 * W * i), value[2 * i], value[2 * i + 1]);
    for (int r = 0; r < R; r++) {
      const vi weight = set1_bits(bits_of(x[r * CHUNK + position / 2]));
      for (int i = 0; i < 2 * P; i++) acc[r][i] = dot_bf16(acc[r][i], weight, value[i]);
    }
  };
  static const bf16 NOTHING[2 * W * P] = {};  // stands in for a pair's other half
  int64_t j = 0;
  if (skipped % 2 && n) fetch(1), step(skipped - 1, NOTHING, values[j++] + offset);
  for (; j + 1 < n; j += 2) {
    fetch(2);
    step(skipped + j, values[j] + offset, values[j + 1] + offset);
  }
  if (j < n) fetch(1), step(skipped + j, values[j] + offset, NOTHING);
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 2 * P; i++) store(o + r * padded + i * W, acc[r][i]);
}

// block(P, d, length, fetch) for all elements of a head, as many as the registers hold.
template <class Block, class F> void decode_values(int64_t size, Block block, F fetch) {
  constexpr int P = W == 16 ? 2 : 1;
  auto nothing = [](int64_t) {};
  int64_t d = 0;
  for (; d + 2 * W * P <= size; d += 2 * W * P) {
    if (d == 0) block(std::integral_constant<int, P>(), d, 2 * W, fetch);
    else block(std::integral_constant<int, P>(), d, 2 * W, nothing);
  }
  for (; d < size; d += 2 * W) block(std::integral_constant<int, 1>(), d, std::min<int64_t>(2 * W, size - d), nothing);
}

struct DecodeItem {
  int64_t sequence, chunk;
  const float* q;  // the sequence's query heads (n_kv_head, n_q * group, padded), as load_pair reads keys, or bf16
  float* result;   // per key head and row: padded floats, then for each row of a block its maximum and its sum
};

// Whether what is multiplied meets as pairs of bf16 in one instruction, where keys and values are bf16; queries and the
// weights of the softmax are rounded to it. Otherwise everything is multiplied in float32.
template <class T> bool in_pairs(int64_t products) {
#if defined(__AVX512BF16__)
  const bool native = true;
#else
  const bool native = false;
#endif
  return std::is_same_v<T, bf16> && (products == 2 || (products == 1 && native));
}

// One chunk of keys against all rows (queries x group) of key heads first .. last - 1. Keys are taken 16 at a time for
// all heads. What comes next is fetched meanwhile, evenly: the chunk's values while keys are read, the next chunk's keys
// while values are read. The keys of a thread's first chunk, `cold`, are fetched at once.
template <class T>
void decode_chunk(const Problem& p, const DecodeItem& item, const DecodeItem* next, int64_t first, int64_t last, bool pairs, bool cold) {
  struct Keys {
    int64_t skipped, n, at[CHUNK];
    Keys(const Sequence& s, int64_t start) {
      const int64_t from = std::max(start, s.low(0));
      skipped = from - start;
      n = std::min(start + CHUNK, s.high(s.n_q - 1)) - from;
      s.locate(from, from + n, at);
    }
  };
  const Sequence s(p, item.sequence);
  const int64_t group = p.group(), padded = p.padded(), rows = s.n_q * group, start = item.chunk * CHUNK, n_heads = last - first;
  const Keys now(s, start), later = next ? Keys(Sequence(p, next->sequence), next->chunk * CHUNK) : now;
  const int64_t n = now.n, skipped = now.skipped, whole = (skipped + n + W - 1) / W * W, *at = now.at, size = p.head_size;
  const Rows<T> keys(p.k, p.k_stride, at, n), values(p.v, p.v_stride, at, n), next_keys(p.k, p.k_stride, later.at, later.n);
  static thread_local std::vector<float> memory;  // (n_heads, rows, CHUNK); scores come up to W at a time, the last may reach past
  memory.resize(n_heads * rows * CHUNK + W);
  float* scores = memory.data();
  auto for_each_block = [&](int64_t head, auto f) {  // rows of one head, as many as the registers hold
    for (int64_t r0 = 0; r0 < rows; r0 += DECODE_ROWS)
      with_count<DECODE_ROWS>(std::min<int64_t>(DECODE_ROWS, rows - r0), [&](auto R) {
        const int64_t at = head * rows + r0;
        f(R, r0, item.q + at * padded, scores + (at - first * rows) * CHUNK, item.result + at * (padded + 2));
      });
  };

  if (cold) Ahead<T>(keys, n, size, first, last).next(n * n_heads);
  Ahead<T> values_ahead(values, n, size, first, last), keys_ahead(next_keys, next ? later.n : 0, size, 0, p.n_kv_head);
  for (int64_t j = 0; j < n; j += 16) {
    const int64_t count = std::min<int64_t>(16, n - j);
    for (int64_t head = first; head < last; head++) {
      for_each_block(head, [&](auto R, int64_t r0, const float* q, float* x, float*) {
        auto fetch = [&](int64_t keys) { if (r0 == 0) values_ahead.next(keys); };
        if constexpr (std::is_same_v<T, bf16>)
          if (pairs) return decode_scores_in_pairs<R>(keys.of + j, head * size, size, count, q, padded, x + skipped + j, fetch);
        decode_scores<T, R>(keys.of + j, head * size, size, count, q, padded, x + skipped + j, fetch);
      });
    }
  }
  for (int64_t head = first; head < last; head++) {
    for_each_block(head, [&](auto R, int64_t r0, const float*, float* x, float* result) {
      auto fetch = [&](int64_t keys) { if (r0 == 0) keys_ahead.next(keys); };
      for (int r = 0; r < R; r++) {
        float *row = x + r * CHUNK, *tail = result + R * padded + 2 * r;
        if (p.k_scale)
          for (int64_t j = 0; j < n; j++) row[skipped + j] *= p.k_scale[at[j] * p.n_kv_head + head];
        std::fill(row, row + skipped, 0.0f);  // these and those behind the last key are hidden by `score`
        std::fill(row + skipped + n, row + whole, 0.0f);
        tail[0] = score(s, row, whole, start, (r0 + r) / group, head * group + (r0 + r) % group, -INF);
        tail[1] = weigh(row, whole, tail[0]);
        if (p.v_scale)
          for (int64_t j = 0; j < n; j++) row[skipped + j] *= p.v_scale[at[j] * p.n_kv_head + head];
        if (pairs)
          for (int64_t j = 0; j < whole; j += W) store((bf16*)row + j, load(row + j));
      }
      decode_values(size, [&](auto P, int64_t d, int64_t length, auto fetch) INLINE_LAMBDA {
        const int64_t offset = head * size + d;
        if constexpr (std::is_same_v<T, bf16>)
          if (pairs) return decode_values_block_in_pairs<R, P>(values.of, offset, skipped, n, x, result + d, padded, fetch);
        decode_values_block<T, R, P>(values.of, offset, n, x + skipped, result + d, padded, length, fetch);
      }, fetch);
    });
  }
}

// A sequence's queries, laid out as DecodeItem says.
template <class T> void decode_queries(const Problem& p, const Sequence& s, bool pairs, float* to) {
  const int64_t group = p.group(), padded = p.padded();
  float plain[2 * W];
  for (int64_t head = 0; head < p.n_kv_head; head++)
    for (int64_t r = 0; r < s.n_q * group; r++, to += padded) {
      const int64_t at = (s.first + r / group) * p.q_stride + (head * group + r % group) * p.head_size;
      for (int64_t d = 0; d < p.head_size; d += 2 * W) {
        const int64_t length = std::min<int64_t>(2 * W, p.head_size - d);
        std::fill(plain + length, plain + 2 * W, 0.0f);
        read_rows(plain, 0, p.q, at + d, 0, 1, p.q_dtype, length);
        if (pairs) store((bf16*)to + d, load(plain)), store((bf16*)to + d + W, load(plain + W));
        else to_pair_order<T>(plain, to + d);
      }
    }
}

// Combines the chunks of one (sequence, query head): `results` of consecutive chunks are `stride` apart.
template <class T>
void decode_combine(const Problem& p, const Sequence& s, bool pairs, const float* results, int64_t n_chunks, int64_t stride, int64_t head) {
  const int64_t group = p.group(), padded = p.padded(), rows = s.n_q * group;
  std::vector<float> total(2 * padded);
  for (int64_t row = 0; row < rows; row++) {
    const int64_t r0 = row / DECODE_ROWS * DECODE_ROWS, R = std::min<int64_t>(DECODE_ROWS, rows - r0);
    const float* block = results + (head * rows + r0) * (padded + 2);
    const float *value = block + (row - r0) * padded, *tail = block + R * padded + 2 * (row - r0);
    float largest = -INF, sum = 0;
    for (int64_t c = 0; c < n_chunks; c++) largest = std::max(largest, tail[c * stride]);
    std::fill(total.begin(), total.end(), 0.0f);
    for (int64_t c = 0; c < n_chunks; c++) {
      const vf factor = shrink(set1(tail[c * stride]), set1(largest));
      sum += reduce_max(factor) * tail[c * stride + 1];
      for (int64_t d = 0; d < padded; d += W)
        store(&total[d], fma(factor, load(value + c * stride + d), load(&total[d])));
    }
    float* plain = &total[padded];
    for (int64_t d = 0; d < padded; d += 2 * W) (pairs ? from_zip_order : from_pair_order<T>)(&total[d], plain + d);
    const int64_t out_row = (s.first + row / group) * p.n_head + head * group + row % group;
    with_float_type(p.q_dtype, [&](auto type) { write_row((decltype(type)*)p.out + out_row * p.head_size, plain, 1 / sum, p.head_size); });
    if (p.lse) p.lse[out_row] = largest + std::log(sum);
  }
}

template <class T> void decode(const Problem& p, const std::vector<int64_t>& sequences, int64_t products) {
  struct Share {  // one sequence's part of the scratch memory; a chunk's results take `stride`
    int64_t sequence, n_chunks, stride;
    size_t q, results;
  };
  const bool pairs = in_pairs<T>(products) && p.head_size % (2 * W) == 0;
  std::vector<Share> shares;
  size_t size = 0, n_items = 0;
  int64_t longest = 0;
  for (int64_t index : sequences) {
    const Sequence s(p, index);
    const int64_t n_chunks = (s.high(s.n_q - 1) + CHUNK - 1) / CHUNK - s.low(0) / CHUNK, rows = s.n_q * p.n_head;
    const int64_t stride = rows * (p.padded() + 2);
    shares.push_back({index, n_chunks, stride, size, size + rows * p.padded()});
    size += rows * p.padded() + n_chunks * stride;
    n_items += n_chunks;
    longest = std::max(longest, s.n_k);
  }
  static thread_local std::vector<float> memory;
  if (memory.size() < size) memory.resize(size);
  float* scratch = memory.data();

  std::vector<DecodeItem> items;
  items.reserve(n_items);
  for (const Share& share : shares) {
    const Sequence s(p, share.sequence);
    decode_queries<T>(p, s, pairs, scratch + share.q);
    for (int64_t c = 0; c < share.n_chunks; c++)
      items.push_back({share.sequence, s.low(0) / CHUNK + c, scratch + share.q, scratch + share.results + c * share.stride});
  }
  const int64_t heads = p.n_kv_head;
  parallel_for(items.size() * heads, longest >= 48 ? 1 : 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t first = i % heads, last = std::min(heads, first + end - i);
      const DecodeItem* item = &items[i / heads];
      const bool cold = i == begin;
      i += last - first;
      decode_chunk<T>(p, *item, i < end ? item + 1 : nullptr, first, last, pairs, cold);
    }
  });
  parallel_for(shares.size() * heads, longest >= 2048 ? 1 : 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Share& share = shares[i / heads];
      decode_combine<T>(p, Sequence(p, share.sequence), pairs, scratch + share.results, share.n_chunks, share.stride, i % heads);
    }
  });
}

// --------------------------------------------------------------------------------------------------------- prefill

struct PrefillItem { int64_t sequence, head, first, n; };  // queries first .. first + n - 1

template <class Cell, class T> void prefill_tile(const Problem& p, const PrefillItem& item) {
  const Sequence s(p, item.sequence);
  const int64_t group = p.group(), padded = p.padded(), rows = item.n * group, depth = padded / Cell::PER_CELL;
  const int64_t all_rows = (rows + STRIP - 1) / STRIP * STRIP;  // those behind the last are never read
  static thread_local std::vector<float> scratch;
  const size_t size = all_rows * (depth + padded + 2) + KEYS * 2 * padded + STRIP * (2 * KEYS + 1);
  if (scratch.size() < size) scratch.resize(size);
  float *q = scratch.data(), *k = q + all_rows * depth, *v = k + KEYS * depth, *o = v + KEYS / Cell::PER_CELL * padded;
  float *largest = o + all_rows * padded, *sums = largest + all_rows;
  float *x = sums + all_rows, *pairs = x + STRIP * KEYS, *shrinks = pairs + STRIP * KEYS;  // of a strip
#if MATRIX_UNIT
  const MatrixUnit unit(UNIT_ROWS, 16);
#endif
  std::fill(q, q + all_rows * depth, 0.0f);
  std::fill(o, largest, 0.0f);
  std::fill(largest, sums, -INF);
  std::fill(sums, shrinks + STRIP, 0.0f);
  for (int64_t r = 0; r < rows; r += group) {  // the heads of a group stand side by side
    const int64_t at = (s.first + item.first + r / group) * p.q_stride + item.head * group * p.head_size;
    if (Cell::PER_CELL == 1) read_rows(q + r * depth, depth, p.q, at, p.head_size, group, p.q_dtype, p.head_size);
    else for (int64_t i = 0; i < group; i++) memcpy(q + (r + i) * depth, (const bf16*)p.q + at + i * p.head_size, p.head_size * sizeof(bf16));
  }

  const Heads<T> keys(p.k, p.k_stride, p.k_scale, p, item.head), values(p.v, p.v_stride, p.v_scale, p, item.head);
  const int64_t low = s.low(item.first), high = s.high(item.first + item.n - 1);
  for (int64_t start = low / KEYS * KEYS; start < high; start += KEYS) {
    const int64_t begin = std::max(low, start), end = std::min(high, start + KEYS);
    int64_t at[KEYS];
    s.locate(begin, end, at);
    pack_keys(TileRows<Cell, T>{keys, at, begin - start, end - start}, padded, k);
    pack_values(TileRows<Cell, T>{values, at, begin - start, end - start}, padded, v);
    for (int64_t first = 0; first < rows; first += STRIP) {
      const int64_t n = std::min(STRIP, rows - first), seen = s.seen(item.first + (first + n - 1) / group, start);
      if (!seen) continue;
      product<Cell>(q + first * depth, depth, k, KEYS, STRIP, seen, depth, x, KEYS, false);
      for (int64_t i = 0, r = first; i < n; i++, r++) {
        shrinks[i] = largest[r];
        largest[r] = score(s, x + i * KEYS, seen, start, item.first + r / group, item.head * group + r % group, largest[r]);
      }
      for (int64_t i = 0; i < STRIP; i += W) store(shrinks + i, shrink(load(shrinks + i), load(largest + first + i)));
      for (int64_t i = 0, r = first; i < n; i++, r++) {
        sums[r] = sums[r] * shrinks[i] + weigh(x + i * KEYS, seen, largest[r]);
        if (shrinks[i] != 1) {
          const vf factor = set1(shrinks[i]);
          for (int64_t d = 0; d < padded; d += W) store(o + r * padded + d, mul(load(o + r * padded + d), factor));
        }
        if (Cell::PER_CELL == 2)
          for (int64_t j = 0; j < seen; j += W) store((bf16*)(pairs + i * KEYS / 2) + j, load(x + i * KEYS + j));
      }
      product<Cell>(Cell::PER_CELL == 2 ? pairs : x, KEYS / Cell::PER_CELL, v, padded, STRIP, padded, seen / Cell::PER_CELL,
                    o + first * padded, padded, true);
    }
  }
  with_float_type(p.q_dtype, [&](auto type) {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = (s.first + item.first + r / group) * p.n_head + item.head * group + r % group;
      write_row((decltype(type)*)p.out + row * p.head_size, o + r * padded, 1 / sums[r], p.head_size);
      if (p.lse) p.lse[row] = largest[r] + std::log(sums[r]);
    }
  });
}

template <class T> void prefill(const Problem& p, const std::vector<int64_t>& sequences, int64_t products) {
  const bool pairs = in_pairs<T>(products) && p.q_dtype == BF16;
  const int64_t step = std::max<int64_t>(1, TILE_ROWS / p.group());
  std::vector<PrefillItem> items;
  for (int64_t index : sequences) {
    const int64_t n_q = Sequence(p, index).n_q;
    for (int64_t first = (n_q - 1) / step * step; first >= 0; first -= step)  // the last see most keys: they go first
      for (int64_t head = 0; head < p.n_kv_head; head++) items.push_back({index, head, first, std::min(step, n_q - first)});
  }
  parallel_dynamic(items.size(), [&](int64_t i) {
    if constexpr (std::is_same_v<T, bf16>)
      if (pairs) return prefill_tile<PairsOfBf16, T>(p, items[i]);
    prefill_tile<Float32, T>(p, items[i]);
  });
}

}  // namespace

// products: 0 float32 throughout, 1 bf16 products where the CPU has them, 2 bf16 products even if emulated (for tests).
void attention(ptr out, ptr q, ptr k, ptr v, ptr cu_seqlens, ptr block_table, ptr seq_lens, ptr k_scale, ptr v_scale,
               ptr alibi, ptr lse, int64_t n_seq, int64_t n_head, int64_t n_kv_head, int64_t head_size, int64_t page_size,
               int64_t max_pages, int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t q_dtype,
               int64_t kv_dtype, int64_t causal, int64_t window, double scale, double softcap, int64_t products) {
  const Problem p{out, q, k, v, (const int32_t*)cu_seqlens, (const int32_t*)block_table, (const int32_t*)seq_lens,
                  (const float*)k_scale, (const float*)v_scale, (const float*)alibi, (float*)lse, n_seq, n_head, n_kv_head,
                  head_size, page_size, max_pages, q_stride, k_stride, v_stride, q_dtype, kv_dtype, causal, window, float(scale),
                  float(softcap)};
  std::vector<int64_t> few, many;
  for (int64_t s = 0; s < n_seq; s++) {
    const int64_t n_q = Sequence(p, s).n_q;
    if (n_q > 0) (n_q <= DECODE_QUERIES ? few : many).push_back(s);
  }
  auto run = [&](auto type) {
    using T = decltype(type);
    if (!many.empty()) prefill<T>(p, many, products);
    if (!few.empty()) decode<T>(p, few, products);
  };
  if (kv_dtype == I8) run(int8_t{});
  else with_float_type(kv_dtype, run);
}
