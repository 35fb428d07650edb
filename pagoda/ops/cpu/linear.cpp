// The product with a packed weight, y = x w^T + bias + add, the lookup of its rows, and the matrix in plain numbers.
//
// The rows of the matrix are cut into tiles of 16, the lanes of the vectors. Activations are broadcast, so one packed
// form serves one row and a whole prefill alike; every output adds up over k in one order, and its bits depend neither on
// the rows beside it nor on the threads, which divide the outputs and never the sum.
//
// What is computed. BITS4 and BITS8: activations are rounded per block of 32 to int8 (scale = absmax / 127), products
// are exact integers inside a block, blocks add up in float32. With Weight::fine an eighth of the blocks, those of each WINDOW
// with the largest scales, whose rounding errs most, get what is left of them rounded to int8 once more. BF16 and NF4 where the
// CPU has AVX512_BF16: activations are rounded to bf16 and multiplied in pairs, with NF4 by the 16 values rounded to bf16,
// whose sums over a block of 64 are scaled in float32. All else, and Weight::exact: float32 activations times the
// dequantized weight, k by k. With a matrix unit (amx.h) BF16 goes through it, and NF4 with the dequantized weights
// rounded to bf16 (one row only where it is Weight::invariant: that halves its speed); BITS4 and BITS8 do where rows are
// many, with the same integers and so the same bits.
//
// Bounds. One row: the packed bytes at memory speed (4 bits with scale and minimum: 20 bytes per 32 weights). Many
// rows: the multipliers; a block of 32 k x 16 outputs takes 8 VNNI instructions a row and 2 to 4 more to scale the sum;
// with a matrix unit the latter alone.
#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "amx.h"
#include "kernels.h"
#include "linear_views.h"
#include "parallel.h"

namespace {

enum Kind : int64_t { FLOAT32, BF16_PAIRS, NF4, BITS4, BITS8, BF16_SHORT };

// A packed weight. PackedWeight.kernel_view of formats.py writes it as a tensor of 64-bit words: keep the two in step.
struct Weight {
  Kind kind;
  int64_t n_out, n_in;
  int64_t exact;        // multiply unrounded activations
  int64_t invariant;    // NF4: one arithmetic for any number of rows
  int64_t fine;         // BITS4, BITS8 with groups of one block: round the blocks that err most twice
  int64_t group;        // BITS4, BITS8: blocks of 32 k that share a scale, 0: one float32 scale per row
  int64_t zero_point;   // BITS4: the quant that means zero, 8 or 0
  const uint8_t* quants;
  const void* scales;   // BITS4, BITS8: f16 (tiles, groups, 16), or float32 (tiles, 16) where group is 0; NF4: codes;
                        // BF16_SHORT: exponents, bytes (tiles, 16)
  const f16* minimums;  // BITS4: f16 (tiles, groups, 16) or null
  const float* codes;   // NF4: the 256 values of the codes,
  const float* absmax;  //      a factor for every 256 of them,
  const float* mean;    //      and what is added
  const uint32_t* escapes;  // BF16_SHORT: see linear_views.h,
  const int32_t* starts;    //      and where each tile's begin

  int64_t tiles() const { return (n_out + TILE - 1) / TILE; }
  int64_t units(int64_t k) const { return (n_in + k - 1) / k; }  // units of k elements in a padded row
  int64_t groups() const { return group ? (units(32) + group - 1) / group : 0; }
};

struct Product {
  const Weight* weight;
  void* y;          // (rows, n_out)
  const void* bias;  // (n_out,) or null
  const void* add;   // (rows, n_out) or null
};

constexpr int64_t WINDOW = 32;        // blocks, of which FINE are rounded twice
constexpr int64_t FINE = 4;
constexpr int64_t LONG = 1024;        // k of sums that are worth two integer tiles at a time, or rows in two groups
constexpr int64_t FEW_GROUPS = 6;     // of rows: they meet few tiles at a time, which stay in L1
constexpr int64_t CACHE = 384 << 10;  // bytes of weights that stay in a core's L2 while the rows pass by
constexpr int64_t AHEAD = 8192;       // bytes of weights that the first rows ask for in advance

// ---------------------------------------------------------------- activations
// Rows are taken in groups of nearly equal size, at most MAX_ROWS, or up to ALL_ROWS together (see `multiply`): then their
// weights come from memory evenly. In a group of R rows element k of row r lies at [k][r]: the kernel walks it with one pointer. A group's
// arrays begin at its first row times the length of a row.

struct Rows {
  const void* x;
  int64_t n, n_in, stride, dtype, n_groups;
  Rows(const void* x, int64_t n, int64_t n_in, int64_t stride, int64_t dtype, int64_t together)
      : x(x), n(n), n_in(n_in), stride(stride), dtype(dtype), n_groups(n <= together ? 1 : (n + MAX_ROWS - 1) / MAX_ROWS) {}
  int64_t first(int64_t group) const { return n * group / n_groups; }
  int count(int64_t group) const { return int(first(group + 1) - first(group)); }
};

struct Int8Rows {    // of every block of 32:
  int32_t* quads;    // 8 words of 4 int8
  float* scales;     // absmax / 127
  float* sums;       // scale * sum of the int8: multiplies the minimum
  int32_t* offset4;  // -8 * sum, what a zero point of 8 adds
  int32_t* offset8;  // -SIGNED_BIAS * sum
  int64_t next_word, next_row, next_block;  // from a word of quads to the next, and from row to row; among the others

  // n_blocks of R rows that begin at a block of the arrays: word by word, the rows side by side.
  Int8Rows group(int64_t block, int64_t R) const {
    return {quads + block * 8, scales + block, sums + block, offset4 + block, offset8 + block, R, 1, R};
  }
  // Rows from `row` on of arrays for all rows: the quads of a row side by side.
  Int8Rows from(int64_t row) const {
    return {quads + row * next_row, scales + row, sums + row, offset4 + row, offset8 + row, next_word, next_row, next_block};
  }
  int32_t* word(int64_t r, int64_t b, int64_t j) const { return quads + (b * 8 + j) * next_word + r * next_row; }
};

struct Residual {  // what the rounding of a block left, rounded in turn; the fields are those of Int8Rows
  int32_t quads[8];
  float scale, sum;
  int32_t offset4, offset8;
  int64_t block;
};
int64_t count_residuals(int64_t n_blocks) { return (n_blocks * FINE + WINDOW - 1) / WINDOW; }

// Where a window of a row begins. The last one has also what is behind it. A product adds a window's residuals behind its blocks.
struct Window {
  int64_t index, block, residual;

  static int64_t count(int64_t n_blocks) { return std::max<int64_t>(1, n_blocks / WINDOW); }
  Window next(int64_t n_blocks) const {
    if (index + 1 == count(n_blocks)) return {index + 1, n_blocks, count_residuals(n_blocks)};
    return {index + 1, block + WINDOW, residual + FINE};
  }
};

struct Activations {
  Int8Rows int8;
  Residual* residuals;  // (rows, count_residuals)
  float* f32;
  bf16* halves;  // in pairs, or row by row for the matrix unit
};

constexpr int N_VECTORS = 32 / W;  // of a block

// Block b of a row of n_in elements, with zeros behind its end.
template <class T> INLINE void load_block(const T* x, int64_t b, int64_t n_in, vf* v) {
  const int64_t inside = n_in - b * 32;
  if (inside >= 32) {
    UNROLL for (int i = 0; i < N_VECTORS; i++) v[i] = load(x + b * 32 + i * W);
    return;
  }
  float padded[32] = {};
  for (int64_t k = 0; k < inside; k++) padded[k] = to_float(x[b * 32 + k]);
  UNROLL for (int i = 0; i < N_VECTORS; i++) v[i] = load(padded + i * W);
}

// The block times `inverse` as int8, and the sum of these: NaN if a value is infinite or not a number.
INLINE float quantize_block(const vf* v, float inverse, int8_t* quants) {
  vf total = zero();
  UNROLL for (int i = 0; i < N_VECTORS; i++) {
    vf q = nearest(mul(v[i], set1(inverse)));
    total = add(total, q);
    store(quants + i * W, q);
  }
  return reduce_add(total);
}

// The residuals of row r, x, which has been rounded to `row`.
template <class T>
void find_residuals(const T* x, int64_t n_in, int64_t n_blocks, const Int8Rows& row, int64_t r, Residual* out) {
  thread_local std::vector<float> left;  // the scales that have not been chosen
  left.resize(n_blocks);
  for (int64_t b = 0; b < n_blocks; b++) left[b] = row.scales[b * row.next_block + r];
  for (Window window{}, next; window.block < n_blocks; window = next) {
    next = window.next(n_blocks);
    for (int64_t i = window.residual; i < next.residual; i++) {
      int64_t largest = window.block;
      for (int64_t b = largest + 1; b < next.block; b++)
        if (left[b] > left[largest]) largest = b;
      left[largest] = -1;
      out[i].block = largest;
    }
  }
  for (Residual* e = out; e < out + count_residuals(n_blocks); e++) {
    const int64_t b = e->block;
    float scale = row.scales[b * row.next_block + r];
    if (!(scale > 1e-32f)) scale = 0;
    int8_t quants[32];
    for (int j = 0; j < 8; j++) memcpy(quants + 4 * j, row.word(r, b, j), 4);
    vf v[N_VECTORS];
    load_block(x, b, n_in, v);
    UNROLL for (int i = 0; i < N_VECTORS; i++)  // what is left is at most scale / 2
      v[i] = scale > 0 ? fma(load(quants + i * W), set1(-scale), v[i]) : zero();
    const float sum = quantize_block(v, scale > 0 ? 250 / scale : 0, (int8_t*)e->quads);
    e->scale = scale / 250, e->sum = e->scale * sum;
    e->offset4 = -8 * int32_t(sum), e->offset8 = -SIGNED_BIAS * int32_t(sum);
  }
}

// Words of 32 bits change places: word i of row r goes to out[i * R + r]. words(r, i) gives W of a row's words from i on,
// zeros or anything behind the last.
template <class F> void spread_words(int64_t R, int64_t n_words, void* out, F words) {
  for (int64_t first = 0; first < n_words; first += W) {
    vi block[W];
    for (int64_t r = 0; r < W; r++) block[r] = r < R ? words(r, first) : set1_bits(0);
    transpose(block);
    for (int64_t i = 0; i < std::min<int64_t>(W, n_words - first); i++) {  // what is behind R words the next ones overwrite
      float* to = (float*)out + (first + i) * R;
      if ((first + i) * R + W <= n_words * R) store_bits(to, block[i]);
      else store_part(to, (vf)block[i], int(R));
    }
  }
}

// A block with a value that is not finite becomes NaN; one whose values are all below 1e-30 becomes 0.
void quantize_rows(const Rows& rows, int64_t first, int64_t n, int64_t n_blocks, const Int8Rows& out, Residual* residuals) {
  static thread_local std::vector<int8_t> memory;  // the rows one behind the other
  const int64_t length = n_blocks * 32;
  const bool spread = out.next_word != 1;
  if (spread) memory.resize(n * length + 4 * W);
  int8_t* quants = spread ? memory.data() : (int8_t*)out.word(0, 0, 0);
  with_float_type(rows.dtype, [&](auto type) {
    for (int64_t r = 0; r < n; r++) {
      auto x = (const decltype(type)*)rows.x + (first + r) * rows.stride;
      for (int64_t b = 0; b < n_blocks; b++) {
        vf v[N_VECTORS], top = zero();
        load_block(x, b, rows.n_in, v);
        UNROLL for (int i = 0; i < N_VECTORS; i++) top = max(absolute(v[i]), top);
        const float absmax = reduce_max(top);
        const float sum = quantize_block(v, absmax > 1e-30f ? 127 / absmax : 0, quants + r * length + b * 32);
        const bool finite = sum == sum;
        const int64_t at = b * out.next_block + r;
        out.scales[at] = finite ? absmax / 127 : NAN;
        out.sums[at] = out.scales[at] * sum;
        out.offset4[at] = finite ? -8 * int32_t(sum) : 0;
        out.offset8[at] = finite ? -SIGNED_BIAS * int32_t(sum) : 0;
      }
    }
    if (spread) spread_words(n, n_blocks * 8, out.quads, [&](int64_t r, int64_t i) { return load_bits(quants + r * length + i * 4); });
    for (int64_t r = 0; residuals && r < n; r++) {
      auto x = (const decltype(type)*)rows.x + (first + r) * rows.stride;
      find_residuals(x, rows.n_in, n_blocks, out, r, residuals + (first + r) * count_residuals(n_blocks));
    }
  });
}

// n elements (a multiple of 64) of every row of a group, zeros behind the end: as float32, or two by two as bf16.
template <class T> void spread_rows(const Rows& rows, int64_t group, int64_t n, T* out) {
  constexpr int64_t PAIR = 4 / sizeof(T), COUNT = W * PAIR;  // elements of a word, of a vector of words
  const int64_t first = rows.first(group);
  with_float_type(rows.dtype, [&](auto type) {
    using X = decltype(type);
    auto whole = [](const X* x) INLINE_LAMBDA {
      if constexpr (sizeof(T) == 4) return (vi)load(x);
      else if constexpr (std::is_same_v<X, bf16>) return load_bits(x);
      bf16 pairs[2 * W];
      store(pairs, load(x)), store(pairs + W, load(x + W));
      return load_bits(pairs);
    };
    spread_words(rows.count(group), n / PAIR, out + first * n, [&](int64_t r, int64_t word) {
      const int64_t k = word * PAIR, inside = rows.n_in - k;
      auto x = (const X*)rows.x + (first + r) * rows.stride + k;
      if (inside >= COUNT) return whole(x);
      X padded[COUNT] = {};
      if (inside > 0) memcpy(padded, x, inside * sizeof(X));
      return whole(padded);
    });
  });
}

// Rows first .. first + count - 1 as bf16, (row, n), zeros behind the end.
void copy_rows(const Rows& rows, int64_t first, int64_t count, int64_t n, bf16* out) {
  with_float_type(rows.dtype, [&](auto type) {
    for (int64_t r = first; r < first + count; r++) {
      auto x = (const decltype(type)*)rows.x + r * rows.stride;
      for_each_vector(rows.n_in, [&](int64_t i, auto load, auto store) { store(out + r * n + i, load(x + i)); });
      memset(out + r * n + rows.n_in, 0, (n - rows.n_in) * sizeof(bf16));
    }
  });
}

// ---------------------------------------------------------------- what is read next
// Asked for a little in every step: what is asked for in bursts the CPU forgets. Of one tile the first rows that meet it ask for
// what is AHEAD; of tiles side by side all rows together ask for the next ones.

struct Evenly {
  const char* now = nullptr;
  int64_t step = 0;  // bytes
  const char* until = now;

  Evenly() {}
  // What one of `passes` passes over a tile asks for in each of its steps, and `tiles` passes that are made together.
  Evenly(const char* next, int64_t bytes, int64_t pass, int64_t passes, int64_t tiles, int64_t steps)
      : now(next + bytes * pass / passes), step((bytes * tiles + passes * steps - 1) / (passes * steps)) {}
  INLINE void ask() {
    for (until += step; now < until; now += 64) prefetch(now);
  }
};

// ---------------------------------------------------------------- integer kernel

enum Scales { PER_ROW, PER_GROUP, WITH_MINIMUM };

// dot (T, N) += the products of one block of a part of T tiles with N of R rows. Its 32 k are 4 vectors at 4 bits (vector j:
// k = 4j..4j+3 in the low nibbles of a lane's bytes, 16 + 4j.. in the high ones) and 8 vectors at 8 bits. Behind each line of
// one tile one `later` is asked for.
template <int BITS, int R, int T, int N>
INLINE void dot_block(const uint8_t* const* q, const int32_t* quads, vi (*dot)[N], const uint8_t* later = nullptr) {
  vi line[T], v[T], sum[T][N];
  UNROLL for (int t = 0; t < T; t++)
    UNROLL for (int r = 0; r < N; r++) sum[t][r] = IN_PAIRS<BITS> ? set1_bits(0) : dot[t][r];
  auto multiply = [&](const int32_t* x) INLINE_LAMBDA {
    UNROLL for (int r = 0; r < N; r++) {
      if constexpr (T == 1) {
        sum[0][r] = dot4<BITS>(sum[0][r], v[0], x + r);
      } else {  // loads bound it: one for all tiles
        const vi quad = set1_bits(uint32_t(x[r]));
        UNROLL for (int t = 0; t < T; t++) sum[t][r] = dot4<BITS>(sum[t][r], v[t], quad);
      }
    }
  };
  UNROLL for (int j = 0; j < BITS; j++) {
    UNROLL for (int t = 0; t < T; t++) {
      line[t] = load_bits(q[t] + 64 * j);
      v[t] = BITS == 8 ? signed_operand(line[t]) : and_bits(line[t], 0x0f0f0f0f);
    }
    multiply(quads + j * R);
    if (BITS == 4) {
      UNROLL for (int t = 0; t < T; t++) v[t] = and_bits(shift_right<4>(line[t]), 0x0f0f0f0f);
      multiply(quads + (4 + j) * R);
    }
    if (later) prefetch<R == 1>(later + 64 * j);
  }
  UNROLL for (int t = 0; t < T; t++)
    UNROLL for (int r = 0; r < N; r++) dot[t][r] = IN_PAIRS<BITS> ? add_pairs(dot[t][r], sum[t][r]) : sum[t][r];
}

// acc + the product of what is left of a block with a part of a tile.
template <int BITS, Scales SCALES>
INLINE vf add_residual(const Weight& w, int64_t tile, int part, const Residual& x, vf acc) {
  const int64_t block = tile * w.units(32) + x.block, at = block * TILE + part * W;
  const uint8_t* q = w.quants + block * 64 * BITS + part * W * 4;
  vi dot[1][1] = {{set1_bits(BITS == 8 ? x.offset8 : w.zero_point ? x.offset4 : 0)}};
  dot_block<BITS, 1, 1, 1>(&q, x.quads, dot);
  acc = fma(from_int(dot[0][0]), mul(load((const f16*)w.scales + at), set1(x.scale)), acc);
  return SCALES == WITH_MINIMUM ? fma(load(w.minimums + at), set1(x.sum), acc) : acc;
}

// sums (T, R, 16) of the tiles from `tile` on; where there are less before `end`, of the last one again. Of one tile whether it
// comes from memory: what is AHEAD is then asked for. residuals (R, count_residuals), or null.
template <int BITS, Scales SCALES, int T, int R>
void integer_tiles(const Weight& w, int64_t tile, int64_t end, const Int8Rows& x, const Residual* residuals, bool from_memory,
                   Evenly ahead, float* sums) {
  constexpr int MOST = T > 1 ? 4 : R > MAX_ROWS ? (R + 1) / 2 : R, PASSES = (R + MOST - 1) / MOST;
  constexpr int N = (R + PASSES - 1) / PASSES;  // rows at a time
  const int64_t n_blocks = w.units(32), n_groups = w.groups();
  const int32_t* offsets = BITS == 8 ? (SIGNED_BIAS ? x.offset8 : nullptr) : (w.zero_point ? x.offset4 : nullptr);
  for (int part = 0; part < PARTS; part++) {
    const uint8_t* q[T];
    const f16 *scale[T], *minimum[T];
    UNROLL for (int t = 0; t < T; t++) {
      const int64_t i = std::min(tile + t, end - 1);
      q[t] = w.quants + i * n_blocks * 64 * BITS + part * W * 4;
      scale[t] = (const f16*)w.scales + i * n_groups * TILE + part * W;
      minimum[t] = w.minimums + i * n_groups * TILE + part * W;
    }
    vf acc[T][R];
    UNROLL for (int t = 0; t < T; t++)
      UNROLL for (int r = 0; r < R; r++) acc[t][r] = zero();
    int64_t left = w.group;
    Window window{0, n_blocks, 0};  // where the one begins that follows
    if (residuals) window = Window{}.next(n_blocks);
    for (int64_t b = 0, i = 0; b < n_blocks; window = window.next(n_blocks)) {
      for (; b < window.block; b++) {
        const bool ask = T == 1 && from_memory && part == 0;
        if (T > 1 && part == 0) ahead.ask();
        if (SCALES != PER_ROW && R <= 8 && ask) {  // of more rows a load more costs more than it saves
          prefetch(scale[0] + AHEAD / (4 * BITS));
          if (SCALES == WITH_MINIMUM) prefetch(minimum[0] + AHEAD / (4 * BITS));
        }
        auto multiply = [&](auto pass) INLINE_LAMBDA {
          constexpr int F = pass * N, C = std::max(std::min(N, R - F), 1);
          if (F >= R) return;
          const int64_t at = b * R + F;
          vi dot[T][C];
          UNROLL for (int t = 0; t < T; t++)
            UNROLL for (int r = 0; r < C; r++) dot[t][r] = offsets ? set1_bits(offsets[at + r]) : set1_bits(0);
          dot_block<BITS, R, T, C>(q, x.quads + b * 8 * R + F, dot, F == 0 && ask ? q[0] + AHEAD : nullptr);
          UNROLL for (int t = 0; t < T; t++) {
            const vf s = SCALES == PER_ROW ? zero() : load(scale[t]), m = SCALES == WITH_MINIMUM ? load(minimum[t]) : zero();
            UNROLL for (int r = 0; r < C; r++) {
              const vf by = SCALES == PER_ROW ? set1(x.scales[at + r]) : mul(s, set1(x.scales[at + r]));
              acc[t][F + r] = fma(from_int(dot[t][r]), by, acc[t][F + r]);
            }
            if (SCALES == WITH_MINIMUM)
              UNROLL for (int r = 0; r < C; r++) acc[t][F + r] = fma(m, set1(x.sums[at + r]), acc[t][F + r]);
          }
        };
        multiply(std::integral_constant<int, 0>());
        if constexpr (PASSES > 1) multiply(std::integral_constant<int, 1>());
        if constexpr (PASSES > 2) multiply(std::integral_constant<int, 2>());
        UNROLL for (int t = 0; t < T; t++) q[t] += 64 * BITS;
        if (SCALES != PER_ROW && --left == 0) {
          UNROLL for (int t = 0; t < T; t++) scale[t] += TILE, minimum[t] += TILE;
          left = w.group;
        }
      }
      for (; SCALES != PER_ROW && i < window.residual; i++)
        UNROLL for (int r = 0; r < R; r++)
          acc[0][r] = add_residual<BITS, SCALES>(w, tile, part, residuals[r * count_residuals(n_blocks) + i], acc[0][r]);
    }
    UNROLL for (int t = 0; t < T; t++) {
      const float* by = (const float*)w.scales + std::min(tile + t, end - 1) * TILE + part * W;
      const vf s = SCALES == PER_ROW ? load(by) : zero();
      UNROLL for (int r = 0; r < R; r++)
        store(sums + (t * R + r) * TILE + part * W, SCALES == PER_ROW ? mul(acc[t][r], s) : acc[t][r]);
    }
  }
}

using IntegerTiles = void (*)(const Weight&, int64_t, int64_t, const Int8Rows&, const Residual*, bool, Evenly, float*);
template <int BITS, Scales SCALES, int T, int... R>
constexpr std::array<IntegerTiles, sizeof...(R)> integer_kernels(std::integer_sequence<int, R...>) {
  return {integer_tiles<BITS, SCALES, T, R + 1>...};
}
using RowCounts = std::make_integer_sequence<int, ALL_ROWS>;

// `wide`: of WIDE_TILES, at most MAX_ROWS; made for 8 bits and a scale per row alone. What bounds the others is scaling sums.
IntegerTiles integer_kernel(const Weight& w, int R, bool wide) {
  static constexpr auto bits4 = integer_kernels<4, PER_GROUP, 1>(RowCounts());
  static constexpr auto bits4_minimum = integer_kernels<4, WITH_MINIMUM, 1>(RowCounts());
  static constexpr auto bits8 = integer_kernels<8, PER_GROUP, 1>(RowCounts());
  static constexpr auto bits8_row = integer_kernels<8, PER_ROW, 1>(RowCounts());
  static constexpr auto bits8_row_wide = integer_kernels<8, PER_ROW, WIDE_TILES>(std::make_integer_sequence<int, MAX_ROWS>());
  if (w.kind == BITS4) return w.minimums ? bits4_minimum[R - 1] : bits4[R - 1];
  if (w.group) return bits8[R - 1];
  return wide ? bits8_row_wide[R - 1] : bits8_row[R - 1];
}

// The block scales of an NF4 tile, (K / 64, 16): value of the code * factor of its 256 + mean, two roundings as in
// bitsandbytes. Plain loads: where a CPU guards against "Downfall", a gather costs more than multiplying the block.
void nf4_scales(const Weight& w, int64_t tile, float* scales) {
  const int64_t n = w.units(64);
  const uint8_t* codes = (const uint8_t*)w.scales + tile * n * TILE;
  prefetch(codes + AHEAD, n * TILE);
  for (int64_t b = 0; b < n;) {
    float factor[TILE];
    int64_t stop = n;  // until here the factors stay
    for (int i = 0; i < TILE; i++) {
      int64_t block = std::min(tile * TILE + i, w.n_out - 1) * n + b;
      factor[i] = w.absmax[block / 256];
      stop = std::min(stop, b + 256 - block % 256);
    }
    const int64_t count = (stop - b) * TILE;
    for (int64_t i = 0; i < count; i += W)
      store(scales + i, add(mul(lookup256(w.codes, codes + i), load(factor + i % TILE)), set1(*w.mean)));
    b = stop, codes += count, scales += count;
  }
}

// A tile of BF16_SHORT; numbers: room for 16. Few bytes a tile, but somewhere else: no stream that the CPU sees by itself.
const uint8_t* short_tile(const Weight& w, int64_t tile) {
  prefetch((const uint8_t*)w.scales + (tile + 12) * TILE), prefetch(w.starts + tile + 24);
  prefetch(w.escapes + w.starts[tile] + 32);
  return w.quants + (tile / 2 * 2 * w.units(8) + tile % 2) * ShortView::LINES * 64;
}

ShortView short_view(const Weight& w, int64_t tile, float* numbers) {
  for (int i = 0; i < TILE; i++) {
    const uint32_t bits = uint32_t(((const uint8_t*)w.scales)[tile * TILE + i]) << 23;
    memcpy(numbers + i, &bits, 4);
  }
  return {{}, short_tile(w, tile), w.escapes + w.starts[tile], numbers};
}

#if defined(__AVX512BF16__)
ShortPairView short_pair_view(const Weight& w, int64_t tile, bf16* numbers, uint8_t* made) {
  const vi exponents = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)w.scales + tile)));
  store_bits(numbers, shift_left<7>(exponents));
  return {{}, short_tile(w, tile), w.escapes + w.starts[tile], numbers, made};
}
#endif

// sums (T, R, 16) of T tiles over `steps` loads; x (steps * COUNT, R). Of a view with a BLOCK so many steps have a scale.
template <class View, int T, int R>
void float_tiles(const View* from, int64_t steps, const typename View::X* x, Evenly ahead, float* sums) {
  View views[T];
  UNROLL for (int t = 0; t < T; t++) views[t] = from[t];
  vf acc[T * PARTS][R], scaled[View::BLOCK ? T : 1][R];
  for (auto& tile : acc)
    for (vf& a : tile) a = zero();
  for (auto& tile : scaled)
    for (vf& a : tile) a = zero();
  constexpr int64_t STEP = View::LINES * View::BESIDE * 64;  // bytes
  const int64_t size = steps * STEP;  // of a tile; behind its end come others that are read beside it, then its successor
  for (int64_t step = 0; step < steps; step++, x += View::COUNT * R) {
    const int64_t at = step * STEP + AHEAD, next = at < size ? at : at + std::max(T / View::BESIDE - 1, 0) * size;
    typename View::V v[T * PARTS][View::COUNT];
    auto read = [&](int t) INLINE_LAMBDA {
      View& view = views[t / PARTS];
      if constexpr (R == 1 && View::LINES > 1) return view.load(step, t % PARTS, v[t], (const char*)view.p + next);
      if (R == 1 && t % PARTS == 0) prefetch<true>((const char*)view.p + next, View::LINES * 64);
      view.load(step, t % PARTS, v[t]);
    };
    auto multiply = [&](int t, int i, int r) INLINE_LAMBDA { acc[t][r] = View::multiply(acc[t][r], v[t][i], x + i * R + r); };
    if (R > 1) ahead.ask();
    // A row with all tiles, where the registers hold these: otherwise GCC keeps the rows in registers, and sums in memory.
    if constexpr (R > 1 && T * PARTS * (R + View::COUNT) <= REGISTERS) {
      UNROLL for (int t = 0; t < T * PARTS; t++) read(t);
      UNROLL for (int i = 0; i < View::COUNT; i++)
        UNROLL for (int r = 0; r < R; r++)
          UNROLL for (int t = 0; t < T * PARTS; t++) multiply(t, i, r);
    } else {
      UNROLL for (int t = 0; t < T * PARTS; t++) {
        read(t);
        UNROLL for (int i = 0; i < View::COUNT; i++)
          UNROLL for (int r = 0; r < R; r++) multiply(t, i, r);
      }
    }
    if constexpr (View::BLOCK > 0)
      if (step % View::BLOCK == View::BLOCK - 1)
        UNROLL for (int t = 0; t < T; t++) {
          const vf scale = load(views[t].scales + step / View::BLOCK * TILE);
          UNROLL for (int r = 0; r < R; r++) scaled[t][r] = fma(acc[t][r], scale, scaled[t][r]), acc[t][r] = zero();
        }
  }
  UNROLL for (int t = 0; t < T * PARTS; t++)
    UNROLL for (int r = 0; r < R; r++)
      store(sums + (t / PARTS * R + r) * TILE + t % PARTS * W, View::BLOCK ? scaled[t / PARTS][r] : acc[t][r]);
}

template <class View> using FloatTiles = void (*)(const View*, int64_t, const typename View::X*, Evenly, float*);
template <class View, int T, int... R>
constexpr std::array<FloatTiles<View>, sizeof...(R)> float_kernels(std::integer_sequence<int, R...>) {
  return {float_tiles<View, T, R + 1>...};
}

// ---------------------------------------------------------------- tiles as float32

template <class View> void unpack(View view, int64_t n, float* panel) {
  for (int64_t step = 0; step * View::COUNT < n; step++)
    for (int part = 0; part < PARTS; part++) {
      vf v[View::COUNT];
      view.load(step, part, v);
      for (int i = 0; i < View::COUNT; i++) store(panel + (step * View::COUNT + i) * TILE + part * W, v[i]);
    }
}

// Element I = 0..7 of the words of a block: byte I % 4 of its low or high nibbles, or byte I of signed bytes (I < 4).
template <int BITS, int I> INLINE vi quant(vi word) {
  if (BITS == 8) return shift_right<24>(shift_left<24 - I % 4 * 8>(word));
  return and_bits(shift_right<I % 4 * 8 + I / 4 * 4>(word), 15);
}

template <int BITS, int... I> void unpack_integers(const Weight& w, int64_t tile, float* panel, std::integer_sequence<int, I...>) {
  const uint8_t* q = w.quants + tile * w.units(32) * 64 * BITS;
  vi minus_zero = set1_bits(uint32_t(-w.zero_point));
  for (int64_t b = 0; b < w.units(32); b++, panel += 32 * TILE, q += 64 * BITS)
    for (int part = 0; part < PARTS; part++) {
      int64_t at = w.group ? (tile * w.groups() + b / w.group) * TILE + part * W : tile * TILE + part * W;
      vf s = w.group ? load((const f16*)w.scales + at) : load((const float*)w.scales + at);
      vf m = w.minimums ? load(w.minimums + at) : zero();
      for (int j = 0; j < BITS; j++) {
        vi word = load_bits(q + 64 * j + part * W * 4);
        auto put = [&](int i, vi v) {
          vf value = mul(from_int(add_int(v, minus_zero)), s);
          store(panel + (4 * j + i % 4 + i / 4 * 16) * TILE + part * W, w.minimums ? add(value, m) : value);
        };
        (put(I, quant<BITS, I>(word)), ...);
      }
    }
}

// The values that PackedWeight.dequantize gives, (n_in rounded up to 64, 16) at most; scratch holds a float per 4 of k.
void unpack_tile(const Weight& w, int64_t tile, float* panel, float* scratch) {
  if (w.kind == FLOAT32) unpack(Float32View{{}, (const float*)w.quants + tile * w.n_in * TILE}, w.n_in, panel);
  else if (w.kind == BF16_PAIRS) unpack(Bf16View{{}, w.quants + tile * w.units(2) * TILE * 4}, w.n_in, panel);
  else if (w.kind == BF16_SHORT) unpack(short_view(w, tile, scratch), w.n_in, panel);
  else if (w.kind == BITS4) unpack_integers<4>(w, tile, panel, std::make_integer_sequence<int, 8>());
  else if (w.kind == BITS8) unpack_integers<8>(w, tile, panel, std::make_integer_sequence<int, 4>());
  else {
    nf4_scales(w, tile, scratch);
    unpack(Nf4View{{}, w.quants + tile * w.units(64) * TILE * 32, scratch}, w.n_in, panel);
  }
}

// ---------------------------------------------------------------- driver

struct Task {
  Rows rows;
  Activations x;
  int64_t row_length;  // of x.f32 and x.halves
};

// What a weight wants the activations as; in *_LINES row by row, for the matrix unit.
enum Form { INT8_ROWS, FLOAT32_ROWS, PAIR_ROWS, INT8_LINES, BF16_LINES, N_FORMS };

Form form_of(const Weight& w, int64_t rows) {
  const bool integers = w.kind == BITS4 || w.kind == BITS8;
  if (w.exact || w.kind == FLOAT32) return FLOAT32_ROWS;
#if MATRIX_UNIT
  if (integers && rows >= 48) return INT8_LINES;  // so many that unpacking pays; for all weights alike, they share the rows
  if (!integers && (w.kind != NF4 || rows > 1 || w.invariant)) return BF16_LINES;
#endif
#if defined(__AVX512BF16__)
  if (!integers) return PAIR_ROWS;
#endif
  return integers ? INT8_ROWS : FLOAT32_ROWS;
}

// What a thread does: tiles begin..end for a band of the rows, one of `bands`.
struct Share {
  int64_t begin, end, band, bands;
  int64_t first(int64_t n_groups) const { return n_groups * band / bands; }  // of its groups of rows
  int64_t last(int64_t n_groups) const { return n_groups * (band + 1) / bands; }
};

// sums (R, 16): one tile of the rows from `row` on, plus bias and what is to be added, into y.
void write(const Product& p, const Rows& rows, int64_t row, int R, int64_t tile, const float* sums) {
  const int64_t n_out = p.weight->n_out, column = tile * TILE, count = std::min<int64_t>(TILE, n_out - column);
  with_float_type(rows.dtype, [&](auto type) {
    using T = decltype(type);
    auto bias = (const T*)p.bias + column;
    for (int r = 0; r < R; r++) {
      const int64_t at = (row + r) * n_out + column;
      for_each_vector(count, [&](int64_t i, auto load, auto store) {
        vf v = load(sums + r * TILE + i);
        if (p.bias) v = add(v, load(bias + i));
        if (p.add) v = add(v, load((const T*)p.add + at + i));
        store((T*)p.y + at + i, v);
      });
    }
  });
}

void integer_share(const Product& p, const Task& task, const Share& share) {
  const Weight& w = *p.weight;
  const int64_t n_blocks = w.units(32), tile_bytes = n_blocks * 64 * (w.kind == BITS4 ? 4 : 8);
  const int64_t first_group = share.first(task.rows.n_groups), n_groups = share.last(task.rows.n_groups) - first_group;
  const bool wide = w.kind == BITS8 && !w.group && task.rows.n_groups > 1 && w.n_in >= LONG;
  const int64_t width = wide ? WIDE_TILES : 1;
  const int64_t chunk = wide && n_groups <= FEW_GROUPS ? width : std::max<int64_t>(1, CACHE / tile_bytes / width) * width;
  alignas(64) float sums[std::max(WIDE_TILES * MAX_ROWS, ALL_ROWS) * TILE];
  for (int64_t from = share.begin, to; from < share.end; from = to) {
    to = std::min(share.end, from + chunk);
    const int64_t asked = (std::min(share.end, to + chunk) - to) * tile_bytes;
    for (int64_t g = 0; g < n_groups; g++) {
      const int64_t row = task.rows.first(first_group + g);
      const int R = task.rows.count(first_group + g);
      const IntegerTiles multiply = integer_kernel(w, R, wide);
      const Int8Rows x = task.x.int8.group(row * n_blocks, R);
      const Residual* residuals = w.fine ? task.x.residuals + row * count_residuals(n_blocks) : nullptr;
      for (int64_t tile = from; tile < to;) {
        Evenly ahead;
        if (wide)
          ahead = {(const char*)w.quants + to * tile_bytes, asked, g * (to - from) + tile - from, n_groups * (to - from), width, n_blocks};
        multiply(w, tile, to, x, residuals, g == 0, ahead, sums);
        float* sum = sums;
        for (const int64_t stop = std::min(to, tile + width); tile < stop; tile++, sum += R * TILE)
          write(p, task.rows, row, R, tile, sum);
      }
    }
  }
}

// What the groups of rows behind the first read where they are more than FEW_GROUPS: what the first has written down.
template <class View> const View& again(const View& view) { return view; }
#if defined(__AVX512BF16__)
inline PairView again(const ShortPairView& view) { return {{}, view.made}; }
#endif

// Multiplies T tiles at a time, by all rows before the next ones. make_view(tile, slot) gives the view of one, the slot-th of
// the T. Whether the views read the weight itself (from_memory) or what was made of it.
template <class View, int T, class RowCounts, class F>
void float_share(const Product& p, const Task& task, const Share& share, const typename View::X* x, int64_t steps,
                 bool from_memory, F make_view) {
  const int64_t row_words = task.row_length * sizeof(typename View::E) / sizeof(typename View::X);
  using Again = std::decay_t<decltype(again(std::declval<const View&>()))>;
  using Few = std::make_integer_sequence<int, std::min<int>(RowCounts::size(), MAX_ROWS)>;
  alignas(64) float sums[std::max<int>(T * Few::size(), RowCounts::size()) * TILE];
  View views[T];
  Again views_again[T];
  const int64_t first_group = share.first(task.rows.n_groups), n_groups = share.last(task.rows.n_groups) - first_group;
  const int64_t tile_bytes = steps * View::LINES * 64;
  for (int64_t from = share.begin, to; from < share.end; from = to) {
    to = std::min(share.end, from / T * T + T);
    const int64_t asked = from_memory ? (std::min(share.end, to + T) - to) * tile_bytes : 0;
    const bool one_stream = View::BESIDE == T && task.rows.n <= MAX_ROWS;  // read once, from its beginning to its end
    const int64_t distance = one_stream ? AHEAD : (to - from) * tile_bytes;
    for (int64_t tile = from; tile < to; tile++) views[tile - from] = make_view(tile, tile - from);
    auto multiply_group = [&](int64_t g, const auto* views_of_group) {
      using V = std::decay_t<decltype(*views_of_group)>;
      static constexpr auto wide = float_kernels<V, T>(Few()), narrow = float_kernels<V, 1>(RowCounts());
      const int64_t row = task.rows.first(first_group + g), n_steps = steps * View::COUNT / V::COUNT;
      const int R = task.rows.count(first_group + g), width = R <= MAX_ROWS && to - from == T ? T : 1;
      const auto multiply = width == T ? wide[R - 1] : narrow[R - 1];
      for (int64_t tile = from; tile < to;) {
        const Evenly ahead((const char*)views[0].p + distance, asked, g * (to - from) + tile - from,
                           n_groups * (to - from), width, n_steps);
        multiply(&views_of_group[tile - from], n_steps, x + row * row_words, ahead, sums);
        for (int t = 0; t < width; t++, tile++) write(p, task.rows, row, R, tile, sums + t * R * TILE);
      }
    };
    multiply_group(0, views);
    if (n_groups > FEW_GROUPS)
      for (int t = 0; t < T; t++) views_again[t] = again(views[t]);
    for (int64_t g = 1; g < n_groups; g++) {
      if (n_groups > FEW_GROUPS) multiply_group(g, views_again);
      else multiply_group(g, views);
    }
  }
}

// Memory of a thread, grown to the largest request, on a cache line: a vector must not straddle two.
float* room(std::vector<float>& memory, int64_t n) {
  if (int64_t(memory.size()) < n + 16) memory.resize(n + 16);
  return (float*)((uintptr_t(memory.data()) + 63) & ~uintptr_t(63));
}

#if MATRIX_UNIT
// BF16 and NF4: 32 rows and two tiles at a time, sums in four registers of the unit. A tile's pieces of 32 k lie one
// behind the other; all but those of BF16_PAIRS are made, for a chunk of tiles that stays in the cache.
void matrix_share(const Product& p, const Task& task, const Share& share) {
  const Weight& w = *p.weight;
  const int64_t steps = w.units(32), K = task.row_length, n_groups = (task.rows.n + 31) / 32;
  const bool plain = w.kind == BF16_PAIRS;
  const int64_t whole = plain ? w.n_in / 32 : steps;  // steps that lie in memory as the unit wants them
  const int64_t chunk = n_groups == 1 ? 2 : std::max<int64_t>(CACHE / (steps * 1024) / 2, 1) * 2;
  thread_local std::vector<float> memory;
  char* made = (char*)room(memory, chunk * K * TILE / 2 + K / 4);
  float* scales = (float*)made + chunk * K * TILE / 2;
  const MatrixUnit unit(int(std::min<int64_t>(UNIT_ROWS, task.rows.n)), 16);
  alignas(64) float sums[2 * 32 * TILE];
  for (int64_t from = share.begin; from < share.end; from += chunk) {
    const int64_t to = std::min(share.end, from + chunk);
    const char* tiles = (const char*)w.quants + from * w.units(2) * TILE * 4;
    int64_t tile_bytes = w.units(2) * TILE * 4;
    for (int64_t tile = from; tile < to; tile++) {
      if (w.kind == NF4) {
        char* pairs = made + (tile - from) * steps * 1024;
        nf4_scales(w, tile, scales);
        const Nf4View view{{}, w.quants + tile * K * TILE / 2, scales};
        for (int64_t step = 0; step < K / 8; step++) {
          vf v[8];
          view.load(step, 0, v);
          UNROLL for (int i = 0; i < 4; i++) store_pairs(pairs + (step * 4 + i) * 64, v[2 * i], v[2 * i + 1]);
        }
      } else if (w.kind == BF16_SHORT) {
        char* pairs = made + (tile - from) * steps * 1024;
        ShortPairView view = short_pair_view(w, tile, (bf16*)scales, (uint8_t*)pairs);
        for (int64_t step = 0; step < w.units(8); step++) {
          vi v[4];
          view.load(step, 0, v);
        }
        memset(pairs + w.units(8) * 256, 0, (steps * 4 - w.units(8)) * 256);
      } else if (whole < steps) {  // the last piece, with zeros behind it
        char* piece = made + (tile - from) * 1024;
        const int64_t rest = tile_bytes - whole * 1024;
        memcpy(piece, tiles + (tile - from) * tile_bytes + whole * 1024, rest);
        memset(piece + rest, 0, 1024 - rest);
      }
    }
    if (!plain) tiles = made, tile_bytes = steps * 1024;
    for (int64_t group = share.first(n_groups); group < share.last(n_groups); group++) {
      const int64_t row = group * 32, R = std::min<int64_t>(32, task.rows.n - row);
      for (int64_t tile = from; tile < to; tile += 2) {
        auto piece = [&](int64_t step, int n) {
          return step < whole ? tiles + (tile - from + n) * tile_bytes + step * 1024 : made + (tile - from + n) * 1024;
        };
        auto sum = [&](int m, int n) { return sums + (n * 2 + m) * UNIT_ROWS * TILE; };
        auto run = [&](auto M, auto N) {
          multiply_bf16<M, N>(task.x.halves + row * K, K * 2, steps, piece, 64, sum, 64, false);
          for (int n = 0; n < N; n++) write(p, task.rows, row, int(R), tile + n, sums + n * 32 * TILE);
        };
        with_count<2>(R > UNIT_ROWS ? 2 : 1, [&](auto M) { with_count<2>(std::min<int64_t>(2, to - tile), [&](auto N) { run(M, N); }); });
      }
    }
  }
}

// sums (16, 16) of one tile and the rows x, as integer_tiles: the same integers, and the same order of float32. Of `refined`
// rows there are residuals.
template <int BITS, Scales SCALES>
void integer_unit(const Weight& w, int64_t tile, const int8_t* quants, const Int8Rows& x, const Residual* residuals,
                  int64_t refined, float* sums) {
  const int64_t n_blocks = w.units(32), n_groups = w.groups();
  const f16* scale = (const f16*)w.scales + tile * n_groups * TILE;
  const f16* minimum = w.minimums + tile * n_groups * TILE;
  alignas(64) int32_t dots[2][UNIT_ROWS * TILE];
  vf acc[UNIT_ROWS];
  UNROLL for (int r = 0; r < UNIT_ROWS; r++) acc[r] = zero();
  const int64_t n_residuals = count_residuals(n_blocks);
  int64_t left = w.group;
  Window window = Window{}.next(n_blocks);
  for (int64_t b = 0, i = 0; b < n_blocks; b++) {
    if (b % 2 == 0)
      multiply_int8_blocks((const int8_t*)x.word(0, b, 0), x.next_row * 4, quants + b * 512, b + 1 < n_blocks, dots[0]);
    const int32_t* dot = dots[b % 2];
    const float *scales = x.scales + b * x.next_block, *x_sums = x.sums + b * x.next_block;
    if (SCALES == PER_ROW) {
      UNROLL for (int r = 0; r < UNIT_ROWS; r++) acc[r] = fma(from_int(load_bits(dot + r * TILE)), set1(scales[r]), acc[r]);
      continue;
    }
    const vf s = load(scale), m = SCALES == WITH_MINIMUM ? load(minimum) : zero();
    UNROLL for (int r = 0; r < UNIT_ROWS; r++) {
      acc[r] = fma(from_int(load_bits(dot + r * TILE)), mul(s, set1(scales[r])), acc[r]);
      if (SCALES == WITH_MINIMUM) acc[r] = fma(m, set1(x_sums[r]), acc[r]);
    }
    if (--left == 0) scale += TILE, minimum += TILE, left = w.group;
    if (refined && b + 1 == window.block) {
      for (; i < window.residual; i++)
        UNROLL for (int r = 0; r < UNIT_ROWS; r++)
          if (r < refined) acc[r] = add_residual<BITS, SCALES>(w, tile, 0, residuals[r * n_residuals + i], acc[r]);
      window = window.next(n_blocks);
    }
  }
  UNROLL for (int r = 0; r < UNIT_ROWS; r++) {
    if (SCALES == PER_ROW) acc[r] = mul(acc[r], load((const float*)w.scales + tile * TILE));
    store(sums + r * TILE, acc[r]);
  }
}

// BITS4 and BITS8: quants of 4 bits are unpacked for a chunk of tiles, which stays in the cache.
void integer_matrix_share(const Product& p, const Task& task, const Share& share) {
  const Weight& w = *p.weight;
  const int64_t n_blocks = w.units(32), chunk = std::max<int64_t>(1, CACHE / (n_blocks * 512));
  const int64_t n_groups = (task.rows.n + UNIT_ROWS - 1) / UNIT_ROWS;
  const auto multiply = w.kind == BITS8 ? w.group ? integer_unit<8, PER_GROUP> : integer_unit<8, PER_ROW>
                        : w.minimums    ? integer_unit<4, WITH_MINIMUM>
                                        : integer_unit<4, PER_GROUP>;
  thread_local std::vector<float> memory;
  auto made = (int8_t*)room(memory, w.kind == BITS4 ? chunk * n_blocks * 128 : 0);
  const MatrixUnit unit(UNIT_ROWS, 8);
  alignas(64) float sums[UNIT_ROWS * TILE];
  for (int64_t from = share.begin; from < share.end; from += chunk) {
    const int64_t to = std::min(share.end, from + chunk);
    const int8_t* quants = w.kind == BITS4 ? made : (const int8_t*)w.quants + from * n_blocks * 512;
    if (w.kind == BITS4)
      for (int64_t b = 0; b < (to - from) * n_blocks; b++)
        unpack_nibbles(w.quants + (from * n_blocks + b) * 256, int(w.zero_point), made + b * 512);
    for (int64_t group = share.first(n_groups); group < share.last(n_groups); group++) {
      const int64_t row = group * UNIT_ROWS, R = std::min<int64_t>(UNIT_ROWS, task.rows.n - row);
      for (int64_t tile = from; tile < to; tile++) {
        multiply(w, tile, quants + (tile - from) * n_blocks * 512, task.x.int8.from(row),
                 task.x.residuals + row * count_residuals(n_blocks), w.fine ? R : 0, sums);
        write(p, task.rows, row, int(R), tile, sums);
      }
    }
  }
}
#endif

template <class View, class F>
void view_share(const Product& p, const Task& task, const Share& share, const typename View::X* x, int64_t steps, F make_view,
                bool from_memory = true) {
  using One = std::make_integer_sequence<int, 1>;
  if (task.rows.n == 1) float_share<View, View::NARROW, One>(p, task, share, x, steps, from_memory, make_view);
  else float_share<View, View::WIDE, RowCounts>(p, task, share, x, steps, from_memory, make_view);
}

void run_share(const Product& p, const Task& task, const Share& share) {
  const Weight& w = *p.weight;
  const int64_t K = task.row_length;
  constexpr int64_t SLOTS = 4;  // tiles that a view takes at a time, at most
  const bool few = task.rows.n_groups == 1;  // each tile is used once: not worth writing it down dequantized
  thread_local std::vector<float> memory;
  const Form form = form_of(w, task.rows.n);
  if (form == INT8_ROWS) return integer_share(p, task, share);
#if MATRIX_UNIT
  if (form == BF16_LINES) return matrix_share(p, task, share);
  if (form == INT8_LINES) return integer_matrix_share(p, task, share);
#endif
#if defined(__AVX512BF16__)
  if (form == PAIR_ROWS && w.kind == NF4) {
    const int64_t n = K / 64 * TILE;
    float* scales = room(memory, SLOTS * n);
    auto view = [&](int64_t tile, int64_t slot) {
      nf4_scales(w, tile, scales + slot * n);
      return Nf4PairView{{}, w.quants + tile * K * TILE / 2, scales + slot * n};
    };
    return view_share<Nf4PairView>(p, task, share, (const uint32_t*)task.x.halves, K / 8, view);
  }
#endif
#if defined(__AVX512BF16__) && !MATRIX_UNIT
  if (form == PAIR_ROWS && w.kind == BF16_SHORT) {
    const int64_t n_groups = share.last(task.rows.n_groups) - share.first(task.rows.n_groups);
    const int64_t n = n_groups > FEW_GROUPS ? K * TILE / 2 : 0;  // words of a tile's pairs
    float *made = room(memory, SLOTS * (n + TILE)), *numbers = made + SLOTS * n;
    auto view = [&](int64_t tile, int64_t slot) {
      return short_pair_view(w, tile, (bf16*)(numbers + slot * TILE), n ? (uint8_t*)(made + slot * n) : nullptr);
    };
    return view_share<ShortPairView>(p, task, share, (const uint32_t*)task.x.halves, w.units(8), view);
  }
  if (form == PAIR_ROWS) {
    auto view = [&](int64_t tile, int64_t) { return PairView{{}, w.quants + tile * w.units(2) * TILE * 4}; };
    return view_share<PairView>(p, task, share, (const uint32_t*)task.x.halves, w.units(2), view);
  }
#endif
  if (w.kind == FLOAT32) {
    auto view = [&](int64_t tile, int64_t) { return Float32View{{}, (const float*)w.quants + tile * w.n_in * TILE}; };
    view_share<Float32View>(p, task, share, task.x.f32, w.n_in, view);
  } else if (w.kind == BF16_PAIRS && few) {
    auto view = [&](int64_t tile, int64_t) { return Bf16View{{}, w.quants + tile * w.units(2) * TILE * 4}; };
    view_share<Bf16View>(p, task, share, task.x.f32, w.units(2), view);
  } else if (w.kind == BF16_SHORT && few) {
    float* numbers = room(memory, SLOTS * TILE);
    auto view = [&](int64_t tile, int64_t slot) { return short_view(w, tile, numbers + slot * TILE); };
    view_share<ShortView>(p, task, share, task.x.f32, w.units(8), view);
  } else if (w.kind == NF4 && few) {
    const int64_t n = K / 64 * TILE;
    float* scales = room(memory, SLOTS * n);
    auto view = [&](int64_t tile, int64_t slot) {
      nf4_scales(w, tile, scales + slot * n);
      return Nf4View{{}, w.quants + tile * K * TILE / 2, scales + slot * n};
    };
    view_share<Nf4View>(p, task, share, task.x.f32, K / 8, view);
  } else {  // dequantized, then let all rows pass by
    float *panels = room(memory, (SLOTS + 1) * K * TILE), *scratch = panels + SLOTS * K * TILE;
    auto view = [&](int64_t tile, int64_t slot) {
      unpack_tile(w, tile, panels + slot * K * TILE, scratch);
      return Float32View{{}, panels + slot * K * TILE};
    };
    view_share<Float32View>(p, task, share, task.x.f32, w.n_in, view, false);
  }
}

// Room for the activations in the forms wanted: one block of memory, kept by the calling thread. For the matrix unit the
// rows are rounded up to its own number; what stands in those behind the last goes nowhere.
Activations allocate(int64_t rows, int64_t n_blocks, int64_t row_length, const bool* wanted, bool fine) {
  thread_local std::vector<float> memory;
  thread_local std::vector<Residual> residuals;
  if (fine && int64_t(residuals.size()) < rows * count_residuals(n_blocks))
    residuals.resize(rows * count_residuals(n_blocks));
  rows = (rows + 31) / 32 * 32;
  int64_t blocks = wanted[INT8_ROWS] || wanted[INT8_LINES] ? rows * n_blocks : 0;
  int64_t floats = wanted[FLOAT32_ROWS] ? rows * row_length : 0;
  int64_t halves = wanted[PAIR_ROWS] || wanted[BF16_LINES] ? rows * row_length / 2 : 0;
  float* p = room(memory, blocks * 12 + floats + halves);
  auto words = (int32_t*)p;
  return {{words, p + blocks * 8, p + blocks * 9, words + blocks * 10, words + blocks * 11, 1, n_blocks * 8, rows},
          fine ? residuals.data() : nullptr,
          p + blocks * 12,
          (bf16*)(p + blocks * 12 + floats)};
}

void multiply(const Product* products, int64_t n_products, const void* x, int64_t n_rows, int64_t x_stride, int64_t dtype) {
  if (n_rows == 0) return;
  const Weight& w = *products[0].weight;  // all have the same n_in
  // With bf16 in 12 bits two groups of rows and two tiles at a time are faster than all rows beside one.
  const bool two = form_of(w, n_rows) == PAIR_ROWS && w.kind == BF16_SHORT && w.n_in >= LONG;
  const Rows rows(x, n_rows, w.n_in, x_stride, dtype, two ? MAX_ROWS : ALL_ROWS);
  Task task{rows, {}, w.units(64) * 64};
  bool wanted[N_FORMS] = {}, fine = false;
  int64_t tiles = 0;
  for (int64_t i = 0; i < n_products; i++) {
    wanted[form_of(*products[i].weight, rows.n)] = true;
    fine |= products[i].weight->fine != 0;
    tiles += products[i].weight->tiles();
  }
  task.x = allocate(rows.n, w.units(32), task.row_length, wanted, fine);
  auto prepare = [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++) {
      const int64_t first = rows.first(group), n = rows.count(group), n_blocks = w.units(32);
      if (wanted[INT8_ROWS]) quantize_rows(rows, first, n, n_blocks, task.x.int8.group(first * n_blocks, n), task.x.residuals);
      if (wanted[INT8_LINES]) quantize_rows(rows, first, n, n_blocks, task.x.int8.from(first), task.x.residuals);
      if (wanted[FLOAT32_ROWS]) spread_rows(rows, group, task.row_length, task.x.f32);
      if (wanted[PAIR_ROWS]) spread_rows(rows, group, task.row_length, task.x.halves);
      if (wanted[BF16_LINES]) copy_rows(rows, first, n, task.row_length, task.x.halves);
    }
  };
  parallel_for(rows.n_groups, 16384 / (MAX_ROWS * task.row_length) + 1, prepare);

  // Every output is one thread's. Tiles are divided first, and the rows too where tiles are few for the threads.
  int64_t bands = tiles < 8 * max_threads() ? std::min<int64_t>(rows.n_groups, max_threads()) : 1;
  int64_t grain = 40000 / (rows.n * task.row_length * TILE / bands + 1) + 1;
  parallel_for(bands * tiles, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      int64_t band = begin / tiles, tile = begin % tiles, stop = std::min(tiles, tile + end - begin);
      begin += stop - tile;
      for (int64_t i = 0; i < n_products; i++) {
        int64_t n = products[i].weight->tiles(), from = std::max<int64_t>(tile, 0), to = std::min(stop, n);
        if (from < to)
          run_share(products[i], task, {from, to, band, bands});
        tile -= n, stop -= n;
      }
    }
  });
}

}  // namespace

void linear(ptr y, ptr weight, ptr x, ptr bias, ptr add, int64_t rows, int64_t x_stride, int64_t dtype) {
  auto w = (const Weight*)weight;
  Product product{w, (void*)y, (void*)bias, (void*)add};
  multiply(&product, 1, (void*)x, rows, x_stride, dtype);
}

void linear_many(std::vector<ptr> y, std::vector<ptr> weights, ptr x, int64_t rows, int64_t x_stride, int64_t dtype) {
  std::vector<Product> products;
  for (size_t i = 0; i < y.size(); i++) products.push_back({(const Weight*)weights[i], (void*)y[i], nullptr, nullptr});
  multiply(products.data(), y.size(), (void*)x, rows, x_stride, dtype);
}

// The bytes that a thread reads of the weights of a product with few rows, as `multiply` divides them.
std::vector<Span> share_of_weights(const std::vector<ptr>& weights, int64_t me, int64_t threads) {
  std::vector<Span> spans;
  int64_t tiles = 0;
  for (ptr weight : weights) tiles += ((const Weight*)weight)->tiles();
  int64_t begin = tiles * me / threads, end = tiles * (me + 1) / threads;
  for (ptr weight : weights) {
    auto& w = *(const Weight*)weight;
    const int64_t from = std::max<int64_t>(begin, 0), to = std::min(end, w.tiles());
    auto add = [&](const void* p, int64_t bytes_of_tile) {
      if (p && from < to) spans.push_back({(const char*)p + from * bytes_of_tile, (to - from) * bytes_of_tile});
    };
    if (w.kind == FLOAT32) add(w.quants, w.n_in * TILE * 4);
    if (w.kind == BF16_PAIRS) add(w.quants, w.units(2) * TILE * 4);
    if (w.kind == BF16_SHORT) add(w.scales, TILE), add(w.quants, w.units(8) * ShortView::LINES * 64);
    if (w.kind == NF4) add(w.quants, w.units(64) * TILE * 32), add(w.scales, w.units(64) * TILE);
    if (w.kind == BITS4 || w.kind == BITS8) {
      add(w.scales, w.group ? w.groups() * TILE * 2 : TILE * 4);
      add(w.minimums, w.groups() * TILE * 2);
      add(w.quants, w.units(32) * 64 * (w.kind == BITS4 ? 4 : 8));
    }
    begin -= w.tiles(), end -= w.tiles();
  }
  return spans;
}

// Rows of `size` bytes of a plain matrix.
void rows(ptr y, ptr weight, ptr ids, int64_t n, int64_t n_rows, int64_t size) {
  auto row = (const int64_t*)ids;
  check_rows(ids, n, n_rows);
  parallel_for(n, 65536 / (size + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) memcpy((char*)y + i * size, (const char*)weight + row[i] * size, size);
  });
}

void embedding(ptr y, ptr weight, ptr ids, int64_t n, int64_t dtype) {
  auto& w = *(const Weight*)weight;
  auto row = (const int64_t*)ids;
  check_rows(ids, n, w.n_out);
  parallel_for(n, 8, [&](int64_t begin, int64_t end) {
    int64_t K = w.units(64) * 64;
    std::vector<float> panel(K * TILE + K / 4);
    for (int64_t i = begin; i < end; i++) {
      unpack_tile(w, row[i] / TILE, panel.data(), panel.data() + K * TILE);
      with_float_type(dtype, [&](auto type) {
        auto out = (decltype(type)*)y + i * w.n_in;
        for (int64_t k = 0; k < w.n_in; k++) from_float(panel[k * TILE + row[i] % TILE], out + k);
      });
    }
  });
}

// Rows first .. first + rows - 1 of the matrix as plain numbers, (rows, n_in); first is a multiple of TILE.
void dequantize(ptr y, ptr weight, int64_t first, int64_t rows, int64_t dtype) {
  auto& w = *(const Weight*)weight;
  parallel_for((rows + TILE - 1) / TILE, 1, [&](int64_t begin, int64_t end) {
    const int64_t K = w.units(64) * 64;
    std::vector<float> panel(K * TILE + K / 4);
    for (int64_t tile = begin; tile < end; tile++) {
      unpack_tile(w, first / TILE + tile, panel.data(), panel.data() + K * TILE);
      const int64_t n = std::min<int64_t>(TILE, rows - tile * TILE);
      with_float_type(dtype, [&](auto type) {
        auto out = (decltype(type)*)y + tile * TILE * w.n_in;
        for (int64_t k = 0; k < w.n_in; k += W)
          for (int64_t part = 0; part < TILE; part += W) {
            vi block[W];
            for (int i = 0; i < W; i++) block[i] = load_bits(&panel[(k + i) * TILE + part]);
            transpose(block);
            for (int64_t r = part; r < std::min<int64_t>(n, part + W); r++) {
              if (k + W <= w.n_in) store(out + r * w.n_in + k, (vf)block[r - part]);
              else store_part(out + r * w.n_in + k, (vf)block[r - part], int(w.n_in - k));
            }
          }
      });
    }
  });
}
