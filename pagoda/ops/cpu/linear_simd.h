// What the matrix product needs of the vectors of simd.h: a tile of 16 output rows as PARTS vectors, and the products of
// int8 quads. The integers agree bit for bit between all variants.
#pragma once
#include "simd.h"

constexpr int TILE = 16;         // output rows of a packed tile
constexpr int PARTS = TILE / W;  // vectors across a tile

// A loop over register arrays must disappear, or the arrays live in memory.
#undef UNROLL
#define UNROLL _Pragma("GCC unroll 16")

#if SIMD_AVX512
constexpr int MAX_ROWS = 12;      // rows of activations in a register tile: 12 sums in flight hide the latency of 5
constexpr int ALL_ROWS = 16;      // if there are no more, all of them beside one tile
constexpr int WIDE_TILES = 2;     // tiles side by side in the float kernel
constexpr int REGISTERS = 32;     // that sums and weights of a step may take
constexpr int SIGNED_BIAS = 128;  // dot4<8> gives this many times the sum of a too much

INLINE vf from_int(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vf as_float(vi a) { return _mm512_castsi512_ps(a); }
INLINE vi add_int(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi and_bits(vi a, uint32_t mask) { return _mm512_and_si512(a, set1_bits(mask)); }
template <int N> INLINE vi shift_left(vi a) { return _mm512_slli_epi32(a, N); }
template <int N> INLINE vi shift_right(vi a) { return _mm512_srai_epi32(a, N); }  // of signed integers
INLINE vf lookup16(const float* table, vi index) {  // by the low 4 bits of index
  return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
}
INLINE vf lookup256(const float* table, const uint8_t* index) {
  const vi at = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)index));
  vf part[8];  // by the low 5 bits, then one bit after the other
  UNROLL for (int i = 0; i < 8; i++) part[i] = _mm512_permutex2var_ps(load(table + 32 * i), at, load(table + 32 * i + 16));
  UNROLL for (int bit = 0; bit < 3; bit++) {
    const __mmask16 upper = _mm512_test_epi32_mask(at, set1_bits(32u << bit));
    UNROLL for (int i = 0; i < 4 >> bit; i++) part[i] = _mm512_mask_blend_ps(upper, part[2 * i], part[2 * i + 1]);
  }
  return part[0];
}
// acc + the sum of four products per lane: bytes of w with four signed bytes a, which are the same for all lanes. w is 0..15 at
// 4 BITS, and at 8 signed numbers passed through signed_operand.
template <int BITS> INLINE vi dot4(vi acc, vi w, vi a) { return _mm512_dpbusd_epi32(acc, w, a); }
// Of four bytes in memory: assembly, because GCC spends an instruction on the broadcast that the multiplication does on its own.
template <int BITS> INLINE vi dot4(vi acc, vi w, const int32_t* a) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*a));
  return acc;
}
INLINE vi signed_operand(vi w) { return _mm512_xor_si512(w, set1_bits(0x80808080)); }

#elif SIMD_AVX2
constexpr int MAX_ROWS = 6, ALL_ROWS = 6;
constexpr int WIDE_TILES = 1;
constexpr int REGISTERS = 15;
constexpr int SIGNED_BIAS = 0;

INLINE vf from_int(vi a) { return _mm256_cvtepi32_ps(a); }
INLINE vf as_float(vi a) { return _mm256_castsi256_ps(a); }
INLINE vi add_int(vi a, vi b) { return _mm256_add_epi32(a, b); }
INLINE vi and_bits(vi a, uint32_t mask) { return _mm256_and_si256(a, set1_bits(mask)); }
template <int N> INLINE vi shift_left(vi a) { return _mm256_slli_epi32(a, N); }
template <int N> INLINE vi shift_right(vi a) { return _mm256_srai_epi32(a, N); }
INLINE vf lookup16(const float* table, vi index) {
  vf low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  vf high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  return _mm256_blendv_ps(low, high, as_float(shift_left<28>(index)));  // chosen by bit 3
}
// The 16-bit sums of two products never saturate: 2 * 128 * 127 is below 2^15, and at 4 bits even the sum of a block's 8.
template <int BITS> constexpr bool IN_PAIRS = BITS == 4;
INLINE vi add_pairs(vi acc, vi products) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
}
INLINE vi signed_operand(vi w) { return w; }
template <int BITS> INLINE vi dot4(vi acc, vi w, const int32_t* quad) {
  const vi a = set1_bits(uint32_t(*quad));
  if (IN_PAIRS<BITS>) return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, a));
  return add_pairs(acc, _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w)));
}

#else
constexpr int MAX_ROWS = 4, ALL_ROWS = 4;
constexpr int WIDE_TILES = 1;
constexpr int REGISTERS = 15;
constexpr int SIGNED_BIAS = 0;

typedef int32_t vs __attribute__((vector_size(16)));
INLINE vf from_int(vi a) { return __builtin_convertvector((vs)a, vf); }
INLINE vf as_float(vi a) { return (vf)a; }
INLINE vi add_int(vi a, vi b) { return a + b; }
INLINE vi and_bits(vi a, uint32_t mask) { return a & mask; }
template <int N> INLINE vi shift_left(vi a) { return a << N; }
template <int N> INLINE vi shift_right(vi a) { return (vi)((vs)a >> N); }
INLINE vf lookup16(const float* table, vi i) {
  return vf{table[i[0] & 15], table[i[1] & 15], table[i[2] & 15], table[i[3] & 15]};
}
INLINE vi signed_operand(vi w) { return w; }
template <int BITS> INLINE vi dot4(vi acc, vi w, const int32_t* quad) {
  vi a = set1_bits(uint32_t(*quad));
  acc += (vi)(((vs)(w << 24) >> 24) * ((vs)(a << 24) >> 24));
  acc += (vi)(((vs)(w << 16) >> 24) * ((vs)(a << 16) >> 24));
  acc += (vi)(((vs)(w << 8) >> 24) * ((vs)(a << 8) >> 24));
  return acc + (vi)(((vs)w >> 24) * ((vs)a >> 24));
}
#endif

#if !SIMD_AVX2
template <int BITS> constexpr bool IN_PAIRS = false;  // whether dot4 sums two products in 16 bits each, for add_pairs to add up
INLINE vi add_pairs(vi acc, vi) { return acc; }
#endif

#if !SIMD_AVX512
INLINE vf lookup256(const float* table, const uint8_t* index) {
  float out[W];
  for (int i = 0; i < W; i++) out[i] = table[index[i]];
  return load(out);
}
#endif
