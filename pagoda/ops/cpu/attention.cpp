// Attention of a flat stream of queries against ragged or paged keys and values, without ever holding all scores.
//
// Two ways through the same mathematics (online softmax: Milakov & Gimelshein 2018, Dao et al. 2022), chosen for each
// sequence by its number of queries alone:
//
// decode (at most DECODE_QUERIES queries). Bound: memory, n_keys x 2 x head_size x the cache element's size per key
//   head. The keys are cut into spans, first short ones, so that few keys keep several threads busy, then of SPAN, so that
//   little is done that is not reading. A thread takes (sequence, span, key head) items, reads each key and then each
//   value once for all query heads of the group, and leaves a maximum, a sum and a weighted value per row, which are
//   merged in the order of the spans. Keys and values of bf16 are multiplied in pairs where the CPU does that, queries and
//   weights rounded to bf16; otherwise in float32.
// prefill (more queries). Bound: multiplications, 4 x head_size per query head and visible key. A thread takes
//   (sequence, key head, tile of queries) items and goes through tiles of KEYS keys: the keys are packed transposed, the
//   values as they are, and scores and outputs are small matrix products from registers, in float32 or, where queries
//   and cache are bf16 and the CPU multiplies bf16, in pairs of bf16 with float32 sums (the weights are then rounded to
//   bf16, as PyTorch's own flash attention does). A strip of queries meets only those keys of a tile that its last
//   query sees, in steps of a strip; tiles that no query of the item sees are skipped.
//
// Spans, chunks and tiles stand at fixed key positions and masked keys weigh exactly 0, so the bits of a row's result depend on
// nothing else in the batch and not on the number of threads. Between decode and prefill the last bits differ.
#include "attention.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

#include <vector>

namespace {

constexpr int64_t DECODE_QUERIES = 8, SPAN = 512, SHORTEST_SPAN = 128;
constexpr int64_t CHUNK = 16;  // values that meet a head before the next head does; vectors of weights
constexpr int64_t ROW = SPAN + 16;  // from one row of scores to the next; powers of 2 would share few places in a cache
constexpr int64_t TILE_ROWS = 96;  // query rows (queries x group) of a prefill item: what amortises packing its keys
constexpr int DECODE_ROWS = W == 16 ? 4 : 2;  // what fits in the registers

// ---------------------------------------------------------------------------------------------------------- decode

// Keys from .. to - 1 of a sequence. Their result is for each key head and row `padded` floats, behind those of a block of
// rows their maximums and sums.
struct Span {
  int64_t sequence, from, to;
  int64_t before;   // how many keys the spans before it have
  int64_t q;        // where in the scratch memory the sequence's query heads (n_kv_head, n_q * group, padded) begin, as
                    // load_pair reads keys, or bf16,
  int64_t results;  // and the results

  // Where the span ends that holds this position. Longer ones are at most half of what stands before them.
  static int64_t end(int64_t position) {
    int64_t size = SHORTEST_SPAN;
    while (size < SPAN && position >= 4 * size) size *= 2;
    return (position / size + 1) * size;
  }
  int64_t start() const { return from / CHUNK * CHUNK; }  // the position of the first score
};

// Key heads first .. last - 1 of a span, a thread's work.
struct Item {
  const Span* span;
  int64_t first, last;
};

// Keys or values from .. to - 1 of an item, where they stand at equal distances.
template <class T> struct Run {
  const T* at;
  int64_t from, to, stride;  // elements from one to the next
  int64_t bytes;             // of each, of the item's heads

  INLINE const T* operator[](int64_t position) const { return at + (position - from) * stride; }
};

// A thread's way: the keys of an item, its values, the keys of the next.
template <class T> class Walk {
 public:
  Walk() {}
  Walk(const Problem& p, const Item* item, const Item* end) : p(&p), item(item), end(end), position(item->span->from) {}

  Run<T> next() {  // behind the end an empty one
    if (item == end) return {};
    const auto [span, first, last] = *item;
    const int64_t from = position, stride = values ? p->v_stride : p->k_stride;
    const auto [row, run] = Sequence(*p, span->sequence).locate(from, span->to);
    position = from + run;
    const T* at = (const T*)(values ? p->v : p->k) + row * stride + first * p->head_size;
    if (position == span->to) {
      item += values, values = !values;
      if (item != end) position = item->span->from;
    }
    return {at, from, from + run, stride, (last - first) * p->head_size * int64_t(sizeof(T))};
  }

 private:
  const Problem* p = nullptr;
  const Item *item = nullptr, *end = nullptr;
  int64_t position = 0;
  bool values = false;
};

// What a thread will need next, in the order in which it lies in memory: that decides, by a factor of two, how fast it
// comes. One line is asked for wherever one is read: what is asked for in bursts, of 4 even, the CPU forgets or has to wait for.
// NEAR: into the first cache alone, where all that is under way fits there.
template <class T, bool NEAR> class Ahead {
 public:
  Ahead() {}  // of nothing
  // From the beginning of the way on, `distance` bytes before they are read. The first ones come fastest if they are just read.
  Ahead(const Walk<T>& walk, int64_t distance) : walk(walk), more(-1) {
    for (int64_t i = 0; i < distance; i += 64) (void)*(const volatile char*)take(64);
  }

  // The next n bytes, whose lines the caller is to ask for.
  INLINE const char* take(int64_t n) {
    n &= more;
    now += n;
    return now <= until ? now - n : scattered(n);
  }
  INLINE void ask(const char* line) const {
    prefetch<NEAR>(line);
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
    if (pieces == 0) {
      const Run<T> run = walk.next();
      pieces = run.to - run.from, bytes = run.bytes, stride = run.stride * sizeof(T);
      if (pieces == 0) return false;
      if (bytes == stride) bytes *= pieces, pieces = 1;
      piece = (const char*)run.at - stride;
    }
    pieces--, now = piece += stride, until = now + bytes;
    return true;
  }

  Walk<T> walk;
  int64_t more = 0;  // all bits, or none behind the end
  int64_t pieces = 0, bytes = 0, stride = 0;                            // of the run those that follow
  const char *piece = nullptr, *now = (const char*)this, *until = now;  // the last one, what of it was not taken yet, its end
};

// Some rows of some heads: row r of head h stands at h * by_head + r * by_row elements of `of`.
template <class F> struct Block {
  F* of;
  int64_t by_head, by_row;

  INLINE F* operator()(int64_t head, int64_t row) const { return of + head * by_head + row * by_row; }
};

// x[r][j] = q[r] . key j of each of some heads, for R rows and the keys of a run (rounded up to fours, by the last one). 4 keys
// meet all heads, and so they are read in the order of memory. q is laid out as load_pair reads the keys.
template <class T, int R, class A>
void decode_scores(const Run<T>& keys, int64_t heads, int64_t head_size, Block<const float> q, Block<float> x, A& ahead) {
  for (int64_t j = keys.from; j < keys.to; j += 4) {
    const T* key_at[4];
    for (int t = 0; t < 4; t++) key_at[t] = keys[std::min(j + t, keys.to - 1)];
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
      const int64_t at = head * head_size;
      int64_t d = 0;
      for (; d + 2 * W <= head_size; d += 2 * W) step(d, [&](int t) { return key_at[t] + at + d; });
      if (d < head_size) {
        T tail[4][2 * W] = {};
        for (int t = 0; t < 4; t++) memcpy(tail[t], key_at[t] + at + d, (head_size - d) * sizeof(T));
        step(d, [&](int t) { return (const T*)tail[t]; });
      }
      UNROLL for (int r = 0; r < R; r++) sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], x(head, r) + j - keys.from);
    }
  }
}

// The same with queries and keys in pairs of bf16: one instruction multiplies 2 W elements.
template <int R, class A>
void decode_scores_in_pairs(const Run<bf16>& keys, int64_t heads, int64_t head_size, Block<const float> q, Block<float> x, A& ahead) {
  for (int64_t j = keys.from; j < keys.to; j += 4) {
    const bf16* key_at[4];
    for (int t = 0; t < 4; t++) key_at[t] = keys[std::min(j + t, keys.to - 1)];
    for (int64_t head = 0; head < heads; head++) {
      vf acc[R][4];
      for (auto& row : acc)
        for (vf& a : row) a = zero();
      const char* later = ahead.take(4 * 2 * head_size);
      for (int64_t d = 0; d < head_size; d += 2 * W) {
        vi query[R];
        UNROLL for (int r = 0; r < R; r++) query[r] = load_bits((const bf16*)q(head, r) + d);
        UNROLL for (int t = 0; t < 4; t++, later += 4 * W) {
          const vi key = load_bits(key_at[t] + head * head_size + d);
          UNROLL for (int r = 0; r < R; r++) acc[r][t] = dot_bf16(acc[r][t], query[r], key);
          ahead.ask(later);
        }
      }
      UNROLL for (int r = 0; r < R; r++) sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], x(head, r) + j - keys.from);
    }
  }
}

// o[r] += sum of weights[r * ROW + j] * value j over n values of a head, `stride` apart, for P load_pairs of elements; of the
// last pair `length` exist.
template <class T, int R, int P, class A>
INLINE void decode_values_block(const T* value_at, int64_t stride, int64_t n, const float* weights, float* o, int64_t padded,
                                int64_t length, A& ahead) {
  vf acc[R][2 * P];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 2 * P; i++) acc[r][i] = load(o + r * padded + i * W);
  T tail[2 * W] = {};
  for (int64_t j = 0; j < n; j++, value_at += stride, weights++) {
    constexpr int64_t BYTES = P * 2 * W * sizeof(T);
    ahead.ask(ahead.take(BYTES), 0, BYTES);
    const T* row = value_at;
    if (P == 1 && length < 2 * W) row = (const T*)memcpy(tail, row, length * sizeof(T));
    vf value[2 * P];
    for (int i = 0; i < P; i++) load_pair(row + 2 * W * i, value[2 * i], value[2 * i + 1]);
    for (int r = 0; r < R; r++) {
      vf weight = set1(weights[r * ROW]);
      for (int i = 0; i < 2 * P; i++) acc[r][i] = fma(weight, value[i], acc[r][i]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 2 * P; i++) store(o + r * padded + i * W, acc[r][i]);
}

// The same with weights and values in pairs of bf16, P of whole vectors. A pair begins at an even position, so that it is the
// same one whatever the run is: `odd` is whether the first value's is not. Elements come in zip's order.
template <int R, int P, class A>
INLINE void decode_values_block_in_pairs(const bf16* value_at, int64_t stride, int64_t n, bool odd, const float* weights, float* o,
                                         int64_t padded, A& ahead) {
  vf acc[R][2 * P];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 2 * P; i++) acc[r][i] = load(o + r * padded + i * W);
  static const bf16 NOTHING[2 * W * P] = {};  // stands in for a pair's other half
  const bf16* first = odd ? NOTHING : value_at;
  for (int64_t j = -int64_t(odd); j < n; j += 2, weights++) {
    const char* later = ahead.take(2 * P * 4 * W);
    const bf16* second = j + 1 == n ? NOTHING : value_at + (j + 1) * stride;
    vi value[2 * P];
    for (int i = 0; i < P; i++) zip(load_bits(first + 2 * W * i), load_bits(second + 2 * W * i), value[2 * i], value[2 * i + 1]);
    UNROLL for (int r = 0; r < R; r++) {
      const vi weight = set1_bits(bits_of(weights[r * ROW]));
      UNROLL for (int i = 0; i < 2 * P; i++) {
        acc[r][i] = dot_bf16(acc[r][i], weight, value[i]);
        if ((r * 2 * P + i) % R == 0) ahead.ask(later), later += 4 * W;
      }
    }
    first = second + stride;
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 2 * P; i++) store(o + r * padded + i * W, acc[r][i]);
}

// block(P, d, length) for all elements of a head, as many as the registers hold.
template <class Block> INLINE void decode_values(int64_t size, Block block) {
  constexpr int P = W == 16 ? 2 : 1;
  int64_t d = 0;
  for (; d + 2 * W * P <= size; d += 2 * W * P) block(std::integral_constant<int, P>(), d, 2 * W);
  for (; d < size; d += 2 * W) block(std::integral_constant<int, 1>(), d, std::min<int64_t>(2 * W, size - d));
}

// The largest of the products of R rows with n keys (a multiple of W), scaled as by `score`.
template <int R> INLINE void decode_largest(const float* x, int64_t n, float scale, float* tail) {
  vf largest[R];
  UNROLL for (int r = 0; r < R; r++) largest[r] = set1(-INF);
  for (int64_t i = 0; i < n; i += W)
    UNROLL for (int r = 0; r < R; r++) largest[r] = max(mul(load(x + r * ROW + i), set1(scale)), largest[r]);
  UNROLL for (int r = 0; r < R; r++) tail[2 * r] = reduce_max(largest[r]);
}

// At least `size` floats from the beginning of a cache line on: vectors that lie in two lines are read twice.
float* aligned(std::vector<float>& memory, size_t size) {
  if (memory.size() < size + 15) memory.resize(size + 15);
  return (float*)((uintptr_t(memory.data()) + 63) / 64 * 64);
}

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

// An item with all its rows (queries x group): first its keys, then maximums, then its values.
template <class T, class A> class Decode {
 public:
  Decode(const Problem& p, const Item& item, bool pairs, float* scratch)
      : p(p), span(*item.span), s(p, span.sequence), first(item.first), heads(item.last - first), rows(s.n_q * p.group()),
        padded(p.padded()), skipped(span.from - span.start()), n(span.to - span.from),
        whole((skipped + n + CHUNK - 1) / CHUNK * CHUNK), pairs(pairs),
        plain(p.scale > 0 && !p.softcap && !p.alibi && s.low(s.n_q - 1) <= span.from && s.high(0) >= span.to),
        queries(scratch + span.q + first * rows * padded), shared(scratch + span.results + first * rows * (padded + 2)) {
    static thread_local std::vector<float> memory;
    const size_t size = heads * (rows * (ROW + W + padded + 2) + 2 * ROW);
    scores = aligned(memory, size), k_scales = scores + heads * rows * ROW, v_scales = k_scales + heads * ROW;
    totals = v_scales + heads * ROW, results = totals + heads * rows * W;
    std::fill(totals, scores + size, 0.0f);
    if (!p.k_scale) return;
    int64_t at[SPAN];
    s.locate(span.from, span.to, at);
    std::fill(k_scales, v_scales + heads * ROW, 0.0f);
    for (int64_t j = 0; j < n; j++)
      for (int64_t head = 0; head < heads; head++) {
        const int64_t from = at[j] * p.n_kv_head + first + head, to = head * ROW + skipped + j;
        k_scales[to] = p.k_scale[from], v_scales[to] = p.v_scale[from];
      }
  }

  void meet_keys(const Run<T>& keys, A& ahead) {
    for_each_block([&](auto R, int64_t r0) {
      A& of_block = r0 ? nothing : ahead;
      const Block<const float> q{queries + r0 * padded, rows * padded, padded};
      const Block<float> x{scores + r0 * ROW + keys.from - span.start(), rows * ROW, ROW};
      if constexpr (std::is_same_v<T, bf16>)
        if (pairs) return decode_scores_in_pairs<R>(keys, heads, p.head_size, q, x, of_block);
      decode_scores<T, R>(keys, heads, p.head_size, q, x, of_block);
    });
  }

  // Behind all keys. The largest scores; the weights themselves come where their values do, if they come by nothing but
  // `weigh`: all at once would be a time in which nothing is read.
  void find_largest() {
    for (int64_t head = 0; head < heads; head++)
      for_each_block([&](auto R, int64_t r0) {
        float *x = scores_of(head, r0), *tail = result_of(head, r0) + R * padded;
        multiply(x, R, k_scales, head);
        for (int r = 0; r < R; r++) {
          float* row = x + r * ROW;
          std::fill(row, row + skipped, plain ? -INF : 0);  // where no keys are; `score` hides those places itself
          std::fill(row + skipped + n, row + whole, plain ? -INF : 0);
          if (plain) continue;
          const int64_t query = (r0 + r) / p.group(), in_group = (r0 + r) % p.group();
          tail[2 * r] = score(s, row, whole, span.start(), query, (first + head) * p.group() + in_group, -INF);
          tail[2 * r + 1] = weigh(row, whole, tail[2 * r], exp_of_negative);
        }
        if (plain) return decode_largest<R>(x, whole, p.scale, tail);
        multiply(x, R, v_scales, head);
        for (int r = 0; pairs && r < R; r++)
          for (int64_t i = 0; i < whole; i += W) store((bf16*)(x + r * ROW) + i, load(x + r * ROW + i));
      });
  }

  // CHUNK values at a time, which all heads meet, so that they are read nearly in the order of memory.
  void meet_values(const Run<T>& values, A& ahead) {
    auto each_chunk = [&](auto f) INLINE_LAMBDA {
      for (int64_t from = values.from, to; from < values.to; from = to) {
        to = std::min((from / CHUNK + 1) * CHUNK, values.to);
        for (int64_t head = 0; head < heads; head++) f(from, to, head);
      }
    };
    if (rows <= DECODE_ROWS)
      with_count<DECODE_ROWS>(rows, [&](auto R) {
        each_chunk([&](int64_t from, int64_t to, int64_t head) INLINE_LAMBDA { meet_chunk<R>(values, from, to, head, 0, ahead); });
      });
    else
      each_chunk([&](int64_t from, int64_t to, int64_t head) {
        for_each_block([&](auto R, int64_t r0) { meet_chunk<R>(values, from, to, head, r0, r0 ? nothing : ahead); });
      });
  }

  void finish() {
    for (int64_t head = 0; plain && head < heads; head++)
      for_each_block([&](auto R, int64_t r0) {
        for (int r = 0; r < R; r++) result_of(head, r0)[R * padded + 2 * r + 1] = reduce_add(load(total_of(head, r0 + r)));
      });
    std::copy_n(results, heads * rows * (padded + 2), shared);
  }

 private:
  template <int R> INLINE void meet_chunk(const Run<T>& values, int64_t from, int64_t to, int64_t head, int64_t r0, A& ahead) {
    const int64_t i = from - span.start(), chunk = i / CHUNK * CHUNK;
    float *x = scores_of(head, r0), *result = result_of(head, r0);
    if (plain && (i == chunk || from == span.from))  // by the steps of `score` and `weigh`
      for (int r = 0; r < R; r++) {
        float *row = x + r * ROW, *total = total_of(head, r0 + r), largest = result[R * padded + 2 * r];
        if (largest == -INF) largest = 0;
        const vf scale = set1(p.scale), shift = set1(largest);
        vf sum = load(total);
        UNROLL for (int64_t j = chunk; j < chunk + CHUNK; j += W) {
          const vf a = exp_of_negative(sub(mul(load(row + j), scale), shift));
          sum = add(sum, a);
          if (pairs) store((bf16*)row + j, a);
          else store(row + j, p.v_scale ? mul(a, load(v_scales + head * ROW + j)) : a);
        }
        store(total, sum);
      }
    decode_values(p.head_size, [&](auto P, int64_t d, int64_t length) INLINE_LAMBDA {
      const T* at = values[from] + head * p.head_size + d;
      if constexpr (std::is_same_v<T, bf16>)
        if (pairs)
          return decode_values_block_in_pairs<R, P>(at, values.stride, to - from, i % 2, x + i / 2, result + d, padded, ahead);
      decode_values_block<T, R, P>(at, values.stride, to - from, x + i, result + d, padded, length, ahead);
    });
  }
  template <class F> void for_each_block(F f) const {  // of rows, as many as the registers hold
    for (int64_t r0 = 0; r0 < rows; r0 += DECODE_ROWS)
      with_count<DECODE_ROWS>(std::min<int64_t>(DECODE_ROWS, rows - r0), [&](auto R) { f(R, r0); });
  }
  void multiply(float* x, int64_t n_rows, const float* scales, int64_t head) const {  // of the keys or values
    for (int64_t r = 0; p.k_scale && r < n_rows; r++)
      for (int64_t i = 0; i < whole; i += W) store(x + r * ROW + i, mul(load(x + r * ROW + i), load(scales + head * ROW + i)));
  }
  float* scores_of(int64_t head, int64_t row) const { return scores + (head * rows + row) * ROW; }
  float* total_of(int64_t head, int64_t row) const { return totals + (head * rows + row) * W; }
  float* result_of(int64_t head, int64_t row) const { return results + (head * rows + row) * (padded + 2); }

  const Problem& p;
  const Span& span;
  const Sequence s;
  const int64_t first, heads, rows, padded;
  const int64_t skipped, n, whole;  // scores: first there may be some of no key, then n, in all a multiple of CHUNK
  const bool pairs, plain;          // plain: all queries see all keys, and a score is a scaled product
  A nothing;
  const float* queries;
  float* shared;  // where the results belong; another thread has read what stands there, and so it is written only once
  float *results, *totals, *scores, *k_scales, *v_scales;  // (heads, rows): padded + 2, W, ROW; (heads): ROW, ROW
};

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

// The results of several spans become one, for the rows of a key head; `to` may be the first of them. A block's
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
  const bool pairs = in_pairs<T>(products) && p.head_size % (2 * W) == 0;
  const int64_t heads = p.n_kv_head, padded = p.padded();
  static thread_local std::vector<Span> own_spans;
  auto& spans = own_spans;  // threads share this one's
  spans.clear();
  std::vector<int64_t> firsts;  // each sequence's first span, and behind the last the number of spans
  int64_t size = 0, n_keys = 0;
  for (int64_t index : sequences) {
    const Sequence s(p, index);
    const int64_t end = s.high(s.n_q - 1), rows = s.n_q * p.n_head, q = size;
    firsts.push_back(spans.size());
    size += rows * padded;
    for (int64_t from = s.low(0), to; from < end; from = to) {
      to = std::min(end, Span::end(from));
      spans.push_back({index, from, to, n_keys, q, size});
      size += (rows * (padded + 2) + 15) / 16 * 16, n_keys += to - from;
    }
  }
  const int64_t n_sequences = firsts.size();
  firsts.push_back(spans.size());
  static thread_local std::vector<float> memory;
  float* scratch = aligned(memory, size + 2 * W);  // merging reads past the last result
  for (int64_t i = 0; i < n_sequences; i++)
    decode_queries<T>(p, Sequence(p, sequences[i]), pairs, scratch + spans[firsts[i]].q);

  const int64_t share = n_keys * heads / max_threads();
  parallel_for(n_keys * heads, 64, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<Item> items;
    items.clear();
    for (const Span& span : spans) {
      const int64_t n = span.to - span.from;
      // Which head is the first of those whose share begins here. To read a part of each key costs more than to do a quarter
      // of a span too much; where a share is two spans and more, a half.
      auto head_at = [&](int64_t here) {
        const int64_t inside = here - span.before * heads, all = n * heads, spare = 2 * all <= share ? all / 2 : all / 4;
        if (inside <= spare) return int64_t(0);
        return inside >= all - spare ? heads : std::clamp<int64_t>((inside + n / 2) / n, 1, heads);
      };
      if (head_at(begin) < head_at(end)) items.push_back({&span, head_at(begin), head_at(end)});
    }
    if (items.empty()) return;
    Walk<T> walk(p, items.data(), items.data() + items.size());
    const int64_t distance = std::max<int64_t>(8 << 10, CHUNK * heads * p.head_size * sizeof(T));
    auto go = [&](auto ahead) {
      for (const Item& item : items) {
        Decode<T, decltype(ahead)> decode(p, item, pairs, scratch);
        for (Run<T> run{}; run.to < item.span->to;) decode.meet_keys(run = walk.next(), ahead);
        decode.find_largest();
        for (Run<T> run{}; run.to < item.span->to;) decode.meet_values(run = walk.next(), ahead);
        decode.finish();
      }
    };
    if (2 * distance <= 32 << 10) go(Ahead<T, true>(walk, distance));
    else go(Ahead<T, false>(walk, distance));
  });
  // What another thread has read is slow to write to: little is left to this one.
  parallel_for(n_sequences * heads, 1 + n_sequences * heads * (1 << 16) / size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = firsts[i / heads], last = firsts[i / heads + 1];
      const Sequence s(p, sequences[i / heads]);
      const int64_t head = i % heads, rows = s.n_q * p.group(), at = head * rows * (padded + 2);
      static thread_local std::vector<const float*> parts;
      parts.clear();
      for (int64_t j = first; j < last; j++) parts.push_back(scratch + spans[j].results + at);
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
        sums[r] = sums[r] * shrinks[i] + weigh(x + i * KEYS, seen, largest[r], [](vf a) INLINE_LAMBDA { return exp(a); });
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
    const Sequence sequence(p, s);
    const int64_t n_q = sequence.n_q;
    if (n_q > sequence.n_k) throw std::invalid_argument("seq_lens has fewer keys of a sequence than it has queries");  // a ValueError
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
