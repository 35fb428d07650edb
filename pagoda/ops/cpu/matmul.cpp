// Products of matrices in float32, or in pairs of bf16 with float32 sums: what training multiplies.
//
// Bound: multiplications, 2 m n k. The libraries inside PyTorch copy both matrices first, and on AMD processors one of
// them multiplies no more than 8 numbers at a time. Here a thread packs 2 W columns of b, which stay in its caches, and
// meets them with a few rows of a after the other, read where they are (packed too if a lies turned). A result is summed along k
// in one go and rounded once, whatever the shape of the rest and the number of threads: same row, same bits.
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

#include <cstring>
#include <vector>

namespace {

constexpr int MR = W == 16 ? 8 : 4, NV = 2;  // what fits in the registers
constexpr int64_t COLUMNS = NV * W;
constexpr int64_t KEPT = 512 << 10;  // bytes of a packed at once
constexpr int64_t MANY = 64;         // rows that are worth packing b for

template <class Cell> struct Product {
  using T = typename Cell::Element;
  T* out;           // (m, n)
  const T *a, *b;   // (m, k) or turned (k, m); (k, n) or turned (n, k)
  const T* bias;    // (n), or null
  float* sums;      // (m), of a's rows, where a lies turned; or null
  int64_t m, n, k, a_stride, b_stride;
  bool a_turned, b_turned;

  int64_t cells() const { return (k + Cell::PER_CELL - 1) / Cell::PER_CELL; }

  // W columns of a (k, columns) matrix: to[i * stride + j] is cell i of column j, zeros where there are fewer columns. Each
  // column's sum goes to `sums`, unless that is null.
  void pack_columns(const T* from, int64_t from_stride, int64_t columns, float* to, int64_t stride, float* sums = nullptr) const {
    vf total = zero();
    for (int64_t i = 0; i < cells(); i++, to += stride) {
      const T* row = from + i * Cell::PER_CELL * from_stride;
      if constexpr (Cell::PER_CELL == 2) {
        const T* next = row + from_stride;
        T part[2][W] = {};
        if (columns < W || 2 * i + 1 == k) {
          const size_t bytes = std::min<int64_t>(columns, W) * sizeof(T);
          memcpy(part[0], row, bytes), row = part[0];
          if (2 * i + 1 < k) memcpy(part[1], next, bytes);
          next = part[1];
        }
        interleave(row, next, to);
        if (sums) total = add(total, add(load(row), load(next)));
      } else {
        const vf cells = columns < W ? load_part(row, int(columns)) : load(row);
        store(to, cells);
        total = add(total, cells);
      }
    }
    if (sums) columns < W ? store_part(sums, total, int(columns)) : store(sums, total);
  }

  // The same of a (columns, k) matrix.
  void pack_rows(const T* from, int64_t from_stride, int64_t columns, float* to, int64_t stride) const {
    for (int64_t i = 0; i < cells(); i += W) {
      const int64_t count = std::min<int64_t>(W, cells() - i), elements = k - i * Cell::PER_CELL;
      vi block[W];
      for (int64_t j = 0; j < W; j++) {
        T part[W * Cell::PER_CELL] = {};
        const T* row = from + j * from_stride + i * Cell::PER_CELL;
        if (j >= columns) row = part;
        else if (elements < W * Cell::PER_CELL) row = (const T*)memcpy(part, row, elements * sizeof(T));
        block[j] = load_bits(row);
      }
      transpose(block);
      for (int64_t t = 0; t < count; t++) store_bits(to + (i + t) * stride, block[t]);
    }
  }

  // M rows of a by the packed columns from `column` on. Cell i of row r is a[i * step + r * next].
  template <int M> void rows(const float* a, int64_t step, int64_t next, const float* packed, int64_t row, int64_t column) const {
    vf acc[M][NV];
    UNROLL for (int r = 0; r < M; r++)
      UNROLL for (int v = 0; v < NV; v++) acc[r][v] = zero();
    const int64_t depth = cells();
    for (int64_t i = 0; i < depth; i++) {
      vf columns[NV];
      UNROLL for (int v = 0; v < NV; v++) columns[v] = load(packed + i * COLUMNS + v * W);
      UNROLL for (int r = 0; r < M; r++) {
        const vf x = set1(a[i * step + r * next]);
        UNROLL for (int v = 0; v < NV; v++) acc[r][v] = Cell::step(acc[r][v], x, columns[v]);
      }
    }
    UNROLL for (int v = 0; v < NV; v++) {
      const int64_t at = column + v * W, left = n - at;
      if (left <= 0) continue;
      const vf more = !bias ? zero() : left < W ? load_part(bias + at, int(left)) : load(bias + at);
      UNROLL for (int r = 0; r < M; r++) {
        T* to = out + (row + r) * n + at;
        left < W ? store_part(to, add(acc[r][v], more), int(left)) : store(to, add(acc[r][v], more));
      }
    }
  }

  // Rows first .. last - 1 of the columns begin .. end - 1.
  void part(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    if (begin == end) return;
    const int64_t depth = cells();
    const int64_t at_once = a_turned ? std::max<int64_t>(KEPT / (depth * 4 * W), 1) * W : last - first;
    static thread_local std::vector<float> memory;
    const size_t size = depth * (COLUMNS + (a_turned ? at_once : 0)) + 16;
    if (memory.size() < size) memory.resize(size);
    float* columns = (float*)(((uintptr_t)memory.data() + 63) / 64 * 64);
    float* packed_a = columns + depth * COLUMNS;
    for (int64_t top = first; top < last; top += at_once) {
      const int64_t bottom = std::min(last, top + at_once);
      if (a_turned)
        for (int64_t r = top; r < bottom; r += W)
          pack_columns(a + r, a_stride, m - r, packed_a + (r - top) * depth, W, sums && !begin ? sums + r : nullptr);
      for (int64_t j = begin; j < end; j += COLUMNS) {
        for (int64_t c = j; c < j + COLUMNS; c += W) {
          float* to = columns + (c - j);
          if (b_turned) pack_rows(b + c * b_stride, b_stride, n - c, to, COLUMNS);
          else pack_columns(b + c, b_stride, std::max<int64_t>(n - c, 0), to, COLUMNS);
        }
        for (int64_t r = top; r < bottom; r += MR)
          with_count<MR>(std::min<int64_t>(MR, bottom - r), [&](auto M) {
            if (a_turned) rows<M>(packed_a + (r - top) / W * W * depth + (r - top) % W, W, 1, columns, r, j);
            else rows<M>((const float*)(a + r * a_stride), 1, a_stride / Cell::PER_CELL, columns, r, j);
          });
      }
    }
  }

  // Each thread has its rows; where those would be few, each group of threads, and in it each its columns.
  void run() const {
    if (!m || !n || !k) return;
    const int64_t threads = max_threads(), groups = std::clamp<int64_t>(m / MANY, 1, threads), across = (threads + groups - 1) / groups;
    auto cut = [](int64_t n, int64_t unit, int64_t i, int64_t parts) { return std::min(n, (n + unit - 1) / unit * i / parts * unit); };
    parallel_for(groups * across, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        part(cut(m, W, i / across, groups), cut(m, W, i / across + 1, groups), cut(n, COLUMNS, i % across, across), cut(n, COLUMNS, i % across + 1, across));
    });
  }
};

}  // namespace

// out (m, n) = a (m, k) b (k, n) + bias, in float32 or bf16. Turned matrices lie the other way round in memory; a that is
// not, in bf16, has an even stride, and k is even. There is some of each: k is not 0. Where a lies turned, `sums` takes the
// sums of its rows (m), in float32.
void matmul(ptr out, ptr a, ptr b, ptr bias, ptr sums, int64_t m, int64_t n, int64_t k, int64_t a_stride, int64_t b_stride,
            bool a_turned, bool b_turned, int64_t dtype) {
  if (dtype == BF16)
    Product<PairsOfBf16>{(bf16*)out, (bf16*)a, (bf16*)b, (bf16*)bias, (float*)sums, m, n, k, a_stride, b_stride, a_turned, b_turned}.run();
  else
    Product<Float32>{(float*)out, (float*)a, (float*)b, (float*)bias, (float*)sums, m, n, k, a_stride, b_stride, a_turned, b_turned}.run();
}
