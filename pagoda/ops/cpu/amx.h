// The matrix unit of an x86 CPU that has one (AMX): eight registers of 16 rows x 64 bytes, and products of them.
//
// dot_bf16 adds to C (16, 16) float32 the product of A (16 rows, 32 bf16) and B (16 pairs, 16 columns, 2 bf16), dot_int8
// to C (16, 16) int32 that of A (16 rows, 4 x quads int8) and B (quads, 16 columns, 4 int8): B is a piece of a packed
// tile as it lies in memory. Every row of C has its own sum, in one order, whatever the other rows are.
#pragma once
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#include <immintrin.h>
#include <cstdint>
#include <cstring>

#define MATRIX_UNIT 1
constexpr int UNIT_ROWS = 16;

// The shapes of the registers while this lives: 0..3 are C, 4 and 5 A, 6 and 7 B. PyTorch's own products set them too,
// so each share of a thread's work does it anew.
struct MatrixUnit {
  MatrixUnit(int rows, int depth_words) {  // rows of A and C; words of 4 bytes in a row of A, which are rows of B
    struct { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = uint8_t(rows);
    shapes.row_bytes[4] = shapes.row_bytes[5] = uint16_t(4 * depth_words);
    shapes.rows[6] = shapes.rows[7] = uint8_t(depth_words);
    _tile_loadconfig(&shapes);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
};

// C (M x 16, N x 16) = [c +] A B in float32: steps of 32 along the depth; a, c and b in rows of bytes apart. Row block m
// of C goes to c(m, n).
template <int M, int N, class Input, class Output>
inline __attribute__((always_inline)) void multiply_bf16(const void* a, int64_t a_row, int64_t steps, Input b, int64_t b_row,
                                                         Output c, int64_t c_row, bool accumulate) {
  if (accumulate) {
    _tile_loadd(0, c(0, 0), c_row);
    if constexpr (N == 2) _tile_loadd(1, c(0, 1), c_row);
    if constexpr (M == 2) _tile_loadd(2, c(1, 0), c_row);
    if constexpr (M == 2 && N == 2) _tile_loadd(3, c(1, 1), c_row);
  } else {
    _tile_zero(0);
    if constexpr (N == 2) _tile_zero(1);
    if constexpr (M == 2) _tile_zero(2);
    if constexpr (M == 2 && N == 2) _tile_zero(3);
  }
  const char* x = (const char*)a;
  for (int64_t i = 0; i < steps; i++, x += 64) {
    _tile_loadd(6, b(i, 0), b_row);
    _tile_loadd(4, x, a_row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, b(i, 1), b_row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M == 2) {
      _tile_loadd(5, x + UNIT_ROWS * a_row, a_row);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c(0, 0), c_row);
  if constexpr (N == 2) _tile_stored(1, c(0, 1), c_row);
  if constexpr (M == 2) _tile_stored(2, c(1, 0), c_row);
  if constexpr (M == 2 && N == 2) _tile_stored(3, c(1, 1), c_row);
}

// dots (2, 16, 16) int32 = A B of a block of 32, and of the one behind it if there is one.
inline __attribute__((always_inline)) void multiply_int8_blocks(const int8_t* a, int64_t a_row, const int8_t* b, bool two, int32_t* dots) {
  _tile_zero(0);
  _tile_loadd(4, a, a_row);
  _tile_loadd(6, b, 64);
  _tile_dpbssd(0, 4, 6);
  if (two) {
    _tile_zero(1);
    _tile_loadd(5, a + 32, a_row);
    _tile_loadd(7, b + 512, 64);
    _tile_dpbssd(1, 5, 7);
  }
  _tile_stored(0, dots, 64);
  if (two) _tile_stored(1, dots + 256, 64);
}

// 16 words of two bf16: of `low` in the low halves, of `high` above them.
inline __attribute__((always_inline)) void store_pairs(void* out, __m512 low, __m512 high) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
}

// A block of 4-bit quants (4 vectors, the second half of k in the high nibbles) as 8 vectors of int8, less `zero_point`.
inline __attribute__((always_inline)) void unpack_nibbles(const uint8_t* q, int zero_point, int8_t* out) {
  const __m512i mask = _mm512_set1_epi8(15), zero = _mm512_set1_epi8(char(zero_point));
  for (int j = 0; j < 4; j++) {
    const __m512i v = _mm512_loadu_si512(q + 64 * j), high = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
    _mm512_storeu_si512(out + 64 * j, _mm512_sub_epi8(_mm512_and_si512(v, mask), zero));
    _mm512_storeu_si512(out + 64 * (4 + j), _mm512_sub_epi8(high, zero));
  }
}
#endif
