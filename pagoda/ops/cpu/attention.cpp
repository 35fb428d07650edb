// Attention of a flat stream of queries against ragged or paged keys and values, without ever holding all scores.
//
// Two ways through the same mathematics (online softmax: Milakov & Gimelshein 2018, Dao et al. 2022), chosen for each
// sequence by its number of queries alone:
//
// decode (at most DECODE_QUERIES queries). Bound: memory, n_keys x 2 x head_size x the cache element's size per key
//   head. The keys are cut at multiples of CHUNK positions. A thread takes (sequence, chunk, key head) items, reads
//   each key and value once for all query heads of the group, and leaves a maximum, a sum and a weighted value per row.
//   Those of SPAN chunks are merged in their order, then those of the spans; a thread that has all chunks of a span
//   merges them as it goes, while they are in its cache. Keys and values of bf16 are multiplied in pairs where the CPU
//   does that, queries and weights rounded to bf16; otherwise in float32.
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

constexpr int64_t DECODE_QUERIES = 8, CHUNK = 64, SPAN = 8;
constexpr int64_t TILE_ROWS = 96;  // query rows (queries x group) of a prefill item: what amortises packing its keys
constexpr int DECODE_ROWS = W == 16 ? 4 : 2;  // what fits in the registers

// ---------------------------------------------------------------------------------------------------------- decode

// Where consecutive keys or values stand. Behind the last there are 3 more of it, so that one can always take 4 at once.
template <class T> struct Rows {
  const T* of[CHUNK + 3];

  void find(ptr base, int64_t stride, const int64_t* at, int64_t n) {
    for (int64_t j = 0; j < n; j++) of[j] = (const T*)base + at[j] * stride;
    std::fill(of + n, of + n + 3, n ? of[n - 1] : nullptr);
  }
  // Reads `bytes` of each of n rows, in the order of memory: nothing has been asked for yet, and so it comes fastest.
  void touch(int64_t n, int64_t offset, int64_t bytes) const {
    for (int64_t j = 0; j < n; j++)
      for (int64_t b = 0; b < bytes; b += 64) (void)*((const volatile char*)(of[j] + offset) + b);
  }
};

// What a thread will need next, in the order in which it lies in memory: that decides, by a factor of two, how fast it
// comes. One line is asked for wherever one is read: what is asked for in bursts, of 4 even, the CPU forgets or has to wait for.
template <class T> struct Ahead {
  struct Part {  // the same heads of n rows
    const Rows<T>* rows;
    int64_t n, first, bytes;  // from where on, and how much, of a row
  };

  Ahead() {}
  Ahead(Part first, Part second, bool near) : parts{first, second}, near(near), more(-1) {}

  // The next n bytes, whose lines the caller is to ask for.
  INLINE const char* take(int64_t n) {
    n &= more;
    now += n;
    return now <= until ? now - n : scattered(n);
  }
  INLINE void ask(const char* line) const {
    if (near) __builtin_prefetch(line, 0, 0);
    else __builtin_prefetch(line);
    asm volatile("");  // here: the compiler would gather several
  }
  // Bytes first .. last - 1 of those that were taken.
  INLINE void ask(const char* taken, int64_t first, int64_t last) const {
    UNROLL for (int64_t i = (first + 63) / 64 * 64; i < last; i += 64) ask(taken + i);
  }

 private:
  // What does not lie in one piece is asked for here; the caller then asks for this object, and so it does behind the end.
  __attribute__((noinline)) const char* scattered(int64_t n) {
    for (now -= n; n > 0; n -= 64, now += 64) {
      if (now >= until && !follow()) {
        now = until = (const char*)this, more = 0;
        break;
      }
      if (until - now >= n) return (now += n) - n;
      ask(now);
    }
    return (const char*)this;
  }
  bool follow() {
    while (part < 2 && row == parts[part].n) part++, row = 0;
    if (part == 2) return false;
    const Part& p = parts[part];
    now = (const char*)p.rows->of[row++] + p.first, until = now + p.bytes;
    for (; row < p.n && (const char*)p.rows->of[row] + p.first == until; row++) until += p.bytes;
    return true;
  }

  Part parts[2] = {};
  bool near = false;  // into the first cache alone: all of it fits there
  int64_t more = 0;  // all bits, or none behind the end
  int64_t part = 0, row = 0;
  const char *now = (const char*)this, *until = now;  // rows that follow each other
};

// Some rows of some heads: row r of head h stands at h * by_head + r * by_row elements of `of`.
template <class F> struct Block {
  F* of;
  int64_t by_head, by_row;

  INLINE F* operator()(int64_t head, int64_t row) const { return of + head * by_head + row * by_row; }
};

// x[r][j] = q[r] . key j of each of some heads, for R rows and n keys (rounded up to fours). The first head begins at `offset` in
// each key. 4 keys meet all heads, and so they are read in the order of memory. q is laid out as load_pair reads the keys.
template <class T, int R>
void decode_scores(const T* const* keys, int64_t offset, int64_t heads, int64_t head_size, int64_t n, Block<const float> q,
                   Block<float> x, Ahead<T>& ahead) {
  for (int64_t j = 0; j < n; j += 4)
    for (int64_t head = 0; head < heads; head++) {
      vf acc[R][4];
      for (auto& row : acc)
        for (vf& a : row) a = zero();
      auto step = [&](int64_t d, auto key) INLINE_LAMBDA {
        constexpr int64_t BYTES = 2 * W * sizeof(T);
        const char* later = ahead.take(4 * BYTES);
        vf query[R][2];
        UNROLL for (int r = 0; r < R; r++) query[r][0] = load(q(head, r) + d), query[r][1] = load(q(head, r) + d + W);
        UNROLL for (int t = 0; t < 4; t++) {
          vf a, b;
          load_pair(key(t), a, b);
          UNROLL for (int r = 0; r < R; r++) acc[r][t] = fma(b, query[r][1], fma(a, query[r][0], acc[r][t]));
          ahead.ask(later, t * BYTES, (t + 1) * BYTES);
        }
      };
      const int64_t at = offset + head * head_size;
      int64_t d = 0;
      for (; d + 2 * W <= head_size; d += 2 * W) step(d, [&](int t) { return keys[j + t] + at + d; });
      if (d < head_size) {
        T tail[4][2 * W] = {};
        for (int t = 0; t < 4; t++) memcpy(tail[t], keys[j + t] + at + d, (head_size - d) * sizeof(T));
        step(d, [&](int t) { return (const T*)tail[t]; });
      }
      UNROLL for (int r = 0; r < R; r++) sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], x(head, r) + j);
    }
}

// The same with queries and keys in pairs of bf16: one instruction multiplies 2 W elements.
template <int R>
void decode_scores_in_pairs(const bf16* const* keys, int64_t offset, int64_t heads, int64_t head_size, int64_t n,
                            Block<const float> q, Block<float> x, Ahead<bf16>& ahead) {
  for (int64_t j = 0; j < n; j += 4)
    for (int64_t head = 0; head < heads; head++) {
      vf acc[R][4];
      for (auto& row : acc)
        for (vf& a : row) a = zero();
      const char* later = ahead.take(4 * 2 * head_size);
      for (int64_t d = 0; d < head_size; d += 2 * W) {
        vi query[R];
        UNROLL for (int r = 0; r < R; r++) query[r] = load_bits((const bf16*)q(head, r) + d);
        UNROLL for (int t = 0; t < 4; t++, later += 4 * W) {
          const vi key = load_bits(keys[j + t] + offset + head * head_size + d);
          UNROLL for (int r = 0; r < R; r++) acc[r][t] = dot_bf16(acc[r][t], query[r], key);
          ahead.ask(later);
        }
      }
      UNROLL for (int r = 0; r < R; r++) sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], x(head, r) + j);
    }
}

// o[r] = sum over j of x[r][j] * value j, for P load_pairs of elements from `offset` on; of the last pair `length` exist.
// weigh(j) comes before the weights from j on are read.
template <class T, int R, int P, class Weigh>
INLINE void decode_values_block(const T* const* values, int64_t offset, int64_t n, const float* x, float* o, int64_t padded,
                                int64_t length, Ahead<T>& ahead, Weigh weigh) {
  vf acc[R][2 * P];
  for (auto& row : acc)
    for (vf& a : row) a = zero();
  T tail[2 * W] = {};
  for (int64_t j = 0; j < n; j++) {
    weigh(j);
    constexpr int64_t BYTES = P * 2 * W * sizeof(T);
    ahead.ask(ahead.take(BYTES), 0, BYTES);
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
template <int R, int P, class Weigh>
INLINE void decode_values_block_in_pairs(const bf16* const* values, int64_t offset, int64_t skipped, int64_t n, const float* x,
                                         float* o, int64_t padded, Ahead<bf16>& ahead, Weigh weigh) {
  vf acc[R][2 * P];
  for (auto& row : acc)
    for (vf& a : row) a = zero();
  auto step = [&](int64_t position, const bf16* first, const bf16* second) INLINE_LAMBDA {
    const char* later = ahead.take(2 * P * 4 * W);
    vi value[2 * P];
    for (int i = 0; i < P; i++) zip(load_bits(first + 2 * W * i), load_bits(second + 2 * W * i), value[2 * i], value[2 * i + 1]);
    for (int r = 0; r < R; r++) {
      const vi weight = set1_bits(bits_of(x[r * CHUNK + position / 2]));
      for (int i = 0; i < 2 * P; i++) {
        acc[r][i] = dot_bf16(acc[r][i], weight, value[i]);
        if ((r * 2 * P + i) % R == 0) ahead.ask(later), later += 4 * W;
      }
    }
  };
  static const bf16 NOTHING[2 * W * P] = {};  // stands in for a pair's other half
  int64_t j = 0;
  if (skipped % 2 && n) step(skipped - 1, NOTHING, values[j++] + offset);
  for (; j + 1 < n; j += 2) weigh(j), step(skipped + j, values[j] + offset, values[j + 1] + offset);
  if (j < n) step(skipped + j, values[j] + offset, NOTHING);
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 2 * P; i++) store(o + r * padded + i * W, acc[r][i]);
}

// block(P, d, length) for all elements of a head, as many as the registers hold.
template <class Block> void decode_values(int64_t size, Block block) {
  constexpr int P = W == 16 ? 2 : 1;
  int64_t d = 0;
  for (; d + 2 * W * P <= size; d += 2 * W * P) block(std::integral_constant<int, P>(), d, 2 * W);
  for (; d < size; d += 2 * W) block(std::integral_constant<int, 1>(), d, std::min<int64_t>(2 * W, size - d));
}

// The largest of the products of R rows with n keys (a multiple of W), scaled as by `score`.
template <int R> INLINE void find_largest(const float* x, int64_t n, float scale, float* tail) {
  vf largest[R];
  UNROLL for (int r = 0; r < R; r++) largest[r] = set1(-INF);
  for (int64_t i = 0; i < n; i += W)
    UNROLL for (int r = 0; r < R; r++) largest[r] = max(mul(load(x + r * CHUNK + i), set1(scale)), largest[r]);
  UNROLL for (int r = 0; r < R; r++) tail[2 * r] = reduce_max(largest[r]);
}

// At most SPAN chunks of a sequence. A result of one, or of several, is for each key head and row `padded` floats, behind
// those of a block of rows their maximums and sums.
struct Span {
  int64_t sequence, chunk, n;
  int64_t q;        // where in the scratch memory the sequence's query heads (n_kv_head, n_q * group, padded) begin, as
                    // load_pair reads keys, or bf16
  int64_t results;  // and the results of its chunks,
  int64_t stride;   // so far apart
  bool merged;      // the first of them is the span's
};

// The keys and values of a chunk.
template <class T> struct Chunk {
  int64_t skipped, n, at[CHUNK];  // the chunk's first keys may be outside all windows
  Rows<T> keys, values;

  void find(const Problem& p, int64_t sequence, int64_t chunk) {
    const Sequence s(p, sequence);
    const int64_t start = chunk * CHUNK, from = std::max(start, s.low(0));
    skipped = from - start, n = std::min(start + CHUNK, s.high(s.n_q - 1)) - from;
    s.locate(from, from + n, at);
    keys.find(p.k, p.k_stride, at, n), values.find(p.v, p.v_stride, at, n);
  }
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

// One chunk, from position `start` on, against all rows (queries x group) of key heads first .. last - 1. Meanwhile what is
// ahead is asked for: the chunk's values while keys are read, the next keys while values are.
template <class T>
void decode_chunk(const Problem& p, const Sequence& s, const Chunk<T>& chunk, int64_t start, int64_t first, int64_t last, bool pairs,
                  const float* queries, float* results, Ahead<T> ahead) {
  const int64_t group = p.group(), padded = p.padded(), rows = s.n_q * group, size = p.head_size;
  const int64_t n = chunk.n, skipped = chunk.skipped, whole = (skipped + n + W - 1) / W * W, *at = chunk.at;
  const bool plain = !p.softcap && !p.alibi && s.low(s.n_q - 1) <= start && s.high(0) >= start + whole;
  // (heads, rows, CHUNK), behind them 3 that the last 4 scores may reach; scales of keys and of values (2, heads, CHUNK)
  static thread_local std::vector<float> memory;
  const int64_t heads = last - first;
  memory.resize(heads * (rows + 2) * CHUNK + 3);
  float *scores = memory.data(), *k_scales = scores + heads * rows * CHUNK + 3, *v_scales = k_scales + heads * CHUNK;
  if (p.k_scale) {
    std::fill(k_scales, v_scales + heads * CHUNK, 0.0f);
    for (int64_t j = 0; j < n; j++)
      for (int64_t head = 0; head < heads; head++) {
        const int64_t from = at[j] * p.n_kv_head + first + head, to = head * CHUNK + skipped + j;
        k_scales[to] = p.k_scale[from], v_scales[to] = p.v_scale[from];
      }
  }
  Ahead<T> nothing;
  auto for_each_block = [&](auto f) {  // of rows, as many as the registers hold
    for (int64_t r0 = 0; r0 < rows; r0 += DECODE_ROWS)
      with_count<DECODE_ROWS>(std::min<int64_t>(DECODE_ROWS, rows - r0), [&](auto R) { f(R, r0, r0 ? nothing : ahead); });
  };

  for_each_block([&](auto R, int64_t r0, Ahead<T>& ahead) {
    const Block<const float> q{queries + (first * rows + r0) * padded, rows * padded, padded};
    const Block<float> x{scores + r0 * CHUNK + skipped, rows * CHUNK, CHUNK};
    if constexpr (std::is_same_v<T, bf16>)
      if (pairs) return decode_scores_in_pairs<R>(chunk.keys.of, first * size, heads, size, n, q, x, ahead);
    decode_scores<T, R>(chunk.keys.of, first * size, heads, size, n, q, x, ahead);
  });
  for (int64_t head = first; head < last; head++) {
    for_each_block([&](auto R, int64_t r0, Ahead<T>& ahead) {
      float* x = scores + ((head - first) * rows + r0) * CHUNK;
      float* result = results + (head * rows + r0) * (padded + 2);
      float* tail = result + R * padded;
      auto multiply = [&](const float* scales) {  // of the keys or values
        for (int r = 0; p.k_scale && r < R; r++)
          for (int64_t j = 0; j < whole; j += W)
            store(x + r * CHUNK + j, mul(load(x + r * CHUNK + j), load(scales + (head - first) * CHUNK + j)));
      };
      multiply(k_scales);
      vf total[R];
      if (plain) {
        find_largest<R>(x, n, p.scale, tail);
        for (vf& t : total) t = zero();
      } else {
        for (int r = 0; r < R; r++) {
          float* row = x + r * CHUNK;
          std::fill(row, row + skipped, 0.0f);  // these and those behind the last key are hidden by `score`
          std::fill(row + skipped + n, row + whole, 0.0f);
          tail[2 * r] = score(s, row, whole, start, (r0 + r) / group, head * group + (r0 + r) % group, -INF);
          tail[2 * r + 1] = weigh(row, whole, tail[2 * r]);
        }
        multiply(v_scales);
        for (int r = 0; pairs && r < R; r++)
          for (int64_t j = 0; j < whole; j += W) store((bf16*)(x + r * CHUNK) + j, load(x + r * CHUNK + j));
      }
      bool fresh;
      // By the steps of `score` and `weigh`, W weights of each row: all at once would be a time in which nothing is read.
      auto weigh_some = [&](int64_t j) INLINE_LAMBDA {
        if (j % W || !fresh) return;
        for (int r = 0; r < R; r++) {
          float* row = x + r * CHUNK;
          const vf largest = set1(tail[2 * r] == -INF ? 0 : tail[2 * r]);
          const vf a = exp(sub(mul(load(row + j), set1(p.scale)), largest));
          total[r] = add(total[r], a);
          if (pairs) store((bf16*)row + j, a);
          else store(row + j, p.v_scale ? mul(a, load(v_scales + (head - first) * CHUNK + j)) : a);
        }
      };
      decode_values(size, [&](auto P, int64_t d, int64_t length) INLINE_LAMBDA {
        const int64_t offset = head * size + d;
        fresh = plain && d == 0;
        if constexpr (std::is_same_v<T, bf16>)
          if (pairs) return decode_values_block_in_pairs<R, P>(chunk.values.of, offset, skipped, n, x, result + d, padded, ahead, weigh_some);
        decode_values_block<T, R, P>(chunk.values.of, offset, n, x + skipped, result + d, padded, length, ahead, weigh_some);
      });
      for (int r = 0; plain && r < R; r++) tail[2 * r + 1] = reduce_add(total[r]);
    });
  }
}

// A sequence's queries, laid out as Span says.
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

// The results of several chunks or spans become one, for the rows of a key head; `to` may be the first of them. A block's
// maximums stand in the even lanes of its tail, and so do its sums one further on: all rows of it at once.
void decode_merge(const std::vector<const float*>& parts, int64_t rows, int64_t padded, float* to) {
  const int64_t n = parts.size();
  static thread_local std::vector<float> factors;
  factors.resize(n * W);
  for (int64_t r0 = 0; r0 < rows; r0 += DECODE_ROWS) {
    const int64_t R = std::min<int64_t>(DECODE_ROWS, rows - r0), block = r0 * (padded + 2), tail = block + R * padded;
    vf largest = set1(-INF), sum = zero();
    for (int64_t i = 0; i < n; i++) largest = max(load(parts[i] + tail), largest);
    for (int64_t i = 0; i < n; i++) {
      const vf factor = shrink(load(parts[i] + tail), largest);
      store(&factors[i * W], factor);
      sum = fma(factor, load(parts[i] + tail + 1), sum);
    }
    for (int64_t r = 0; r < R; r++)
      for (int64_t d = block + r * padded; d < block + (r + 1) * padded; d += W) {
        vf total = zero();
        for (int64_t i = 0; i < n; i++) total = fma(set1(factors[i * W + 2 * r]), load(parts[i] + d), total);
        store(to + d, total);
      }
    float largests[W], sums[W];
    store(largests, largest), store(sums, sum);
    for (int64_t r = 0; r < R; r++) to[tail + 2 * r] = largests[2 * r], to[tail + 2 * r + 1] = sums[2 * r];
  }
}

// A key head's rows of a sequence, from its result into the output.
template <class T> void decode_write(const Problem& p, const Sequence& s, bool pairs, const float* result, int64_t head) {
  const int64_t group = p.group(), padded = p.padded(), rows = s.n_q * group;
  std::vector<float> plain(padded);
  for (int64_t row = 0; row < rows; row++) {
    const int64_t r0 = row / DECODE_ROWS * DECODE_ROWS, R = std::min<int64_t>(DECODE_ROWS, rows - r0);
    const float *block = result + r0 * (padded + 2), *value = block + (row - r0) * padded, *tail = block + R * padded + 2 * (row - r0);
    for (int64_t d = 0; d < padded; d += 2 * W) (pairs ? from_zip_order : from_pair_order<T>)(value + d, &plain[d]);
    const int64_t out_row = (s.first + row / group) * p.n_head + head * group + row % group;
    with_float_type(p.q_dtype, [&](auto type) { write_row((decltype(type)*)p.out + out_row * p.head_size, plain.data(), 1 / tail[1], p.head_size); });
    if (p.lse) p.lse[out_row] = tail[0] + std::log(tail[1]);
  }
}

template <class T> void decode(const Problem& p, const std::vector<int64_t>& sequences, int64_t products) {
  struct Item { int64_t span, chunk; };
  const bool pairs = in_pairs<T>(products) && p.head_size % (2 * W) == 0;
  const int64_t heads = p.n_kv_head, padded = p.padded();
  static thread_local std::vector<Span> own_spans;
  static thread_local std::vector<Item> own_items;
  auto &spans = own_spans;  // threads share this one's
  auto &items = own_items;
  spans.clear(), items.clear();
  std::vector<int64_t> firsts;  // each sequence's first span, and behind the last the number of spans
  int64_t size = 0, longest = 0, most = 0;  // results of a span
  for (int64_t index : sequences) {
    const Sequence s(p, index);
    const int64_t end = (s.high(s.n_q - 1) + CHUNK - 1) / CHUNK, rows = s.n_q * p.n_head, stride = rows * (padded + 2), q = size;
    firsts.push_back(spans.size());
    size += rows * padded;
    for (int64_t c = s.low(0) / CHUNK, next; c < end; c = next) {
      next = std::min(end, (c / SPAN + 1) * SPAN);
      for (int64_t i = c; i < next; i++) items.push_back({int64_t(spans.size()), i});
      spans.push_back({index, c, next - c, q, size, stride, false});
      size += (next - c) * stride;
    }
    longest = std::max(longest, s.n_k);
    most = std::max(most, SPAN * stride);
  }
  const int64_t n_sequences = firsts.size();
  firsts.push_back(spans.size());
  static thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < size + 2 * W) memory.resize(size + 2 * W);  // merging reads past the last result
  float* scratch = memory.data();
  for (int64_t i = 0; i < n_sequences; i++)
    decode_queries<T>(p, Sequence(p, sequences[i]), pairs, scratch + spans[firsts[i]].q);
  auto merge = [&](const Span& span, float* results, int64_t head, float* to) {  // the span's, at `results`
    const int64_t width = span.stride / heads;
    static thread_local std::vector<const float*> parts;
    parts.clear();
    for (int64_t i = 0; i < span.n; i++) parts.push_back(results + i * span.stride + head * width);
    decode_merge(parts, width / (padded + 2), padded, to + head * width);
  };

  parallel_for(items.size() * heads, longest >= 48 ? 1 : 8, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> own;  // of a span that is all this thread's: its results stay in the cache
    own.resize(most + 2 * W);
    Chunk<T> chunks[2];
    const int64_t head_bytes = p.head_size * sizeof(T);
    const bool near = CHUNK * heads * head_bytes <= 24 << 10;
    auto part = [&](const Rows<T>& rows, int64_t n, int64_t first, int64_t last) {
      return typename Ahead<T>::Part{&rows, n, first * head_bytes, (last - first) * head_bytes};
    };
    for (int64_t i = begin, turn = 0; i < end; turn ^= 1) {
      const int64_t first = i % heads, last = std::min(heads, first + end - i);
      const Item item = items[i / heads];
      Span& span = spans[item.span];
      const int64_t before = item.chunk - span.chunk, from = i / heads - before;  // the span's first item
      const bool alone = from * heads >= begin && (from + span.n) * heads <= end;
      Chunk<T>&now = chunks[turn], &next = chunks[turn ^ 1];
      if (i == begin) {
        now.find(p, span.sequence, item.chunk);
        now.keys.touch(now.n, first * p.head_size, (last - first) * head_bytes);
      }
      i += last - first;
      if (i < end) next.find(p, spans[items[i / heads].span].sequence, items[i / heads].chunk);
      const Ahead<T> ahead(part(now.values, now.n, first, last), part(next.keys, i < end ? next.n : 0, 0, std::min(heads, end - i)), near);
      float* results = alone ? own.data() : scratch + span.results;
      decode_chunk<T>(p, Sequence(p, span.sequence), now, item.chunk * CHUNK, first, last, pairs, scratch + span.q,
                      results + before * span.stride, ahead);
      if (alone && before == span.n - 1) {
        for (int64_t head = 0; head < heads; head++) merge(span, results, head, scratch + span.results);
        span.merged = true;
      }
    }
  });
  parallel_for(n_sequences * heads, longest >= 2048 ? 1 : 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = firsts[i / heads], last = firsts[i / heads + 1];
      const Sequence s(p, sequences[i / heads]);
      const int64_t head = i % heads, rows = s.n_q * p.group(), at = head * rows * (padded + 2);
      static thread_local std::vector<const float*> parts;
      parts.clear();
      for (int64_t j = first; j < last; j++) {
        float* results = scratch + spans[j].results;
        if (!spans[j].merged) merge(spans[j], results, head, results);
        parts.push_back(results + at);
      }
      float* result = scratch + spans[first].results + at;
      if (parts.size() > 1) decode_merge(parts, rows, padded, result);
      decode_write<T>(p, s, pairs, result, head);
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
