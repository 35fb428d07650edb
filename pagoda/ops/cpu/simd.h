// Vectors of float32 under one set of names, for AVX-512, AVX2 and anything else (GCC/Clang vector extensions).
//
// `vf` holds W floats, `vi` the same W lanes as 32-bit integers. All arithmetic is float32; bf16, f16 and int8 exist in
// memory only and are converted by load and store. The kernels use nothing but the names below.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#define SIMD_AVX512 1
#elif defined(__AVX2__)
#include <immintrin.h>
#define SIMD_AVX2 1
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")  // so that what is indexed stays in registers

// ---------------------------------------------------------------- element types (codes: DTYPE in __init__.py)
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
enum DType { F32 = 0, BF16 = 1, F16 = 2, I8 = 3 };

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

INLINE float to_float(float x) { return x; }
INLINE float to_float(int8_t x) { return x; }
INLINE float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
INLINE float to_float(f16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity, NaN
  float magnitude = float_of(rest << 13) * 0x1p112f;                              // rebias; exact for subnormals too
  return float_of(sign | bits_of(magnitude));
}
INLINE void from_float(float x, float* p) { *p = x; }
INLINE void from_float(float x, bf16* p) {  // round to nearest even, NaN stays NaN
  uint32_t u = bits_of(x);
  p->bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
INLINE void from_float(float x, f16* p) {
  uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) { p->bits = uint16_t(sign | 0x7e00); return; }
  if (rest >= 0x477ff000) { p->bits = uint16_t(sign | 0x7c00); return; }  // rounds past 65504
  if (rest < 0x38800000) {  // subnormal: let the float adder round
    p->bits = uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
    return;
  }
  p->bits = uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

// ---------------------------------------------------------------- the vector
#if SIMD_AVX512
constexpr int W = 16;
using vf = __m512;
using vi = __m512i;
INLINE vf zero() { return _mm512_setzero_ps(); }
INLINE vf set1(float x) { return _mm512_set1_ps(x); }
INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
INLINE vf fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where either is NaN
INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf absolute(vf a) { return _mm512_abs_ps(a); }
INLINE vf square_root(vf a) { return _mm512_sqrt_ps(a); }
INLINE vf nearest(vf a) { return _mm512_roundscale_ps(a, 8); }
INLINE vf copysign(vf magnitude, vf sign) {
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(0x7fffffff), _mm512_castps_si512(magnitude),
                                                       _mm512_castps_si512(sign), 0xca));
}
INLINE vf where_less(vf a, vf b, vf yes, vf no) {  // a < b ? yes : no
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
INLINE vf times_power_of_2(vf a, vf n) { return _mm512_scalef_ps(a, n); }  // a * 2^n, n integral
INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
INLINE vf load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE vf load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE vf load(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
INLINE void store(bf16* p, vf a) {
#if defined(__AVX512BF16__)
  __m256bh b = _mm512_cvtneps_pbh(a);
  memcpy(p, &b, 32);
#else
  vi u = _mm512_castps_si512(a);
  vi odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  vi rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}
INLINE void store(f16* p, vf a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
INLINE void store(int8_t* p, vf a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a))); }
INLINE float reduce_add(vf a) { return _mm512_reduce_add_ps(a); }
INLINE float reduce_max(vf a) { return _mm512_reduce_max_ps(a); }

INLINE vi load_bits(const void* p) { return _mm512_loadu_si512(p); }
INLINE vi set1_bits(uint32_t x) { return _mm512_set1_epi32(int(x)); }
INLINE void store_bits(void* p, vi a) { _mm512_storeu_si512(p, a); }
INLINE vf low_half(vi a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }  // bf16 in the low 16 bits
INLINE vf high_half(vi a) { return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(int(0xffff0000)))); }
INLINE void interleave(const void* a, const void* b, void* out) {  // 16-bit lanes a0 b0 a1 b1 ... of W elements each
  vi lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a));
  vi hi = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b));
  store_bits(out, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
}
// The four sums of four vectors. zip makes pairs of 16 bits of two vectors' elements.
INLINE void sum4(vf a, vf b, vf c, vf d, float* out) {
  auto halves = [](vf x, vf y) { return add(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee)); };
  const vf x = halves(a, c), y = halves(b, d);
  vf s = add(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));  // by four lanes a, c, b, d
  s = add(s, _mm512_permute_ps(s, 0xb1));
  s = add(s, _mm512_permute_ps(s, 0x4e));
  const __m512i order = _mm512_setr_epi32(0, 8, 4, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(order, s)));
}
INLINE void zip(vi a, vi b, vi& x, vi& y) { x = _mm512_unpacklo_epi16(a, b), y = _mm512_unpackhi_epi16(a, b); }
INLINE void transpose(vi (&r)[W]) {
  vi t[W];
  for (int i = 0; i < W; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < W; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int j = 0; j < 4; j++)
    for (int i = 0; i < W; i += 8) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

#elif SIMD_AVX2
constexpr int W = 8;
using vf = __m256;
using vi = __m256i;
INLINE vf zero() { return _mm256_setzero_ps(); }
INLINE vf set1(float x) { return _mm256_set1_ps(x); }
INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf absolute(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE vf square_root(vf a) { return _mm256_sqrt_ps(a); }
INLINE vf nearest(vf a) { return _mm256_round_ps(a, 8); }
INLINE vf copysign(vf magnitude, vf sign) {
  vf bit = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign));
}
INLINE vf where_less(vf a, vf b, vf yes, vf no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
INLINE vf times_power_of_2(vf a, vf n) {  // in two halves, so that 2^-149 .. 2^128 are reached
  auto power = [](__m256i k) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23)); };
  __m256i k = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(k, 1);
  return mul(mul(a, power(half)), power(_mm256_sub_epi32(k, half)));
}
INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
INLINE vf load(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE vf load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE vf load(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
INLINE void store(float* p, vf a) { _mm256_storeu_ps(p, a); }
INLINE void store(bf16* p, vf a) {
  vi u = _mm256_castps_si256(a);
  vi odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  vi rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  vi quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
  rounded = _mm256_srli_epi32(rounded, 16);
  vi packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
INLINE void store(f16* p, vf a) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
INLINE void store(int8_t* p, vf a) {
  vi i = _mm256_cvtps_epi32(a);
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}
INLINE float reduce_add(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE float reduce_max(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
INLINE vi load_bits(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE vi set1_bits(uint32_t x) { return _mm256_set1_epi32(int(x)); }
INLINE void store_bits(void* p, vi a) { _mm256_storeu_si256((__m256i*)p, a); }
INLINE vf low_half(vi a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
INLINE vf high_half(vi a) { return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(int(0xffff0000)))); }
INLINE void interleave(const void* a, const void* b, void* out) {
  vi lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)a));
  vi hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)b));
  store_bits(out, _mm256_or_si256(lo, _mm256_slli_epi32(hi, 16)));
}
INLINE void sum4(vf a, vf b, vf c, vf d, float* out) {
  __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
INLINE void zip(vi a, vi b, vi& x, vi& y) { x = _mm256_unpacklo_epi16(a, b), y = _mm256_unpackhi_epi16(a, b); }
INLINE void transpose(vi (&r)[W]) {
  vi t[W];
  for (int i = 0; i < W; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < W; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int j = 0; j < 4; j++) {
    t[j] = _mm256_permute2x128_si256(r[j], r[4 + j], 0x20);
    t[4 + j] = _mm256_permute2x128_si256(r[j], r[4 + j], 0x31);
  }
  for (int j = 0; j < W; j++) r[j] = t[j];
}

#else  // portable: four lanes, which SSE2 and NEON hold in one register
constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
typedef uint32_t vi __attribute__((vector_size(16)));
INLINE vf zero() { return vf{}; }
INLINE vf set1(float x) { return vf{x, x, x, x}; }
INLINE vf add(vf a, vf b) { return a + b; }
INLINE vf sub(vf a, vf b) { return a - b; }
INLINE vf mul(vf a, vf b) { return a * b; }
INLINE vf div(vf a, vf b) { return a / b; }
template <class F> INLINE vf lanes(F f) { return vf{f(0), f(1), f(2), f(3)}; }
INLINE vf fma(vf a, vf b, vf c) {
#ifdef __FP_FAST_FMAF
  return lanes([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
#else
  return a * b + c;
#endif
}
INLINE vf fnma(vf a, vf b, vf c) { return fma(-a, b, c); }
INLINE vf square_root(vf a) { return lanes([&](int i) { return std::sqrt(a[i]); }); }
INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf max(vf a, vf b) { return select((vi)(a > b), a, b); }
INLINE vf min(vf a, vf b) { return select((vi)(a < b), a, b); }
INLINE vf absolute(vf a) { return (vf)((vi)a & 0x7fffffffu); }
INLINE vf copysign(vf magnitude, vf sign) { return (vf)(((vi)magnitude & 0x7fffffffu) | ((vi)sign & 0x80000000u)); }
INLINE vf where_less(vf a, vf b, vf yes, vf no) { return select((vi)(a < b), yes, no); }
INLINE vf nearest(vf a) {  // adding 1.5 * 2^23 leaves no bits below the point; larger numbers are integers already
  vf magic = copysign(set1(0x1.8p23f), a);
  return where_less(absolute(a), set1(0x1p22f), (a + magic) - magic, a);
}
INLINE vf times_power_of_2(vf a, vf n) {
  typedef int32_t vs __attribute__((vector_size(16)));
  vs k = __builtin_convertvector(n, vs), half = k >> 1, rest = k - half;
  return a * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
}
template <class T> INLINE vf load(const T* p) { return lanes([&](int i) { return to_float(p[i]); }); }
INLINE vf load(const float* p) { vf a; memcpy(&a, p, 16); return a; }
template <class T> INLINE void store(T* p, vf a) { for (int i = 0; i < W; i++) from_float(a[i], p + i); }
INLINE void store(float* p, vf a) { memcpy(p, &a, 16); }
INLINE void store(int8_t* p, vf a) {
  a = nearest(min(max(a, set1(-128)), set1(127)));
  for (int i = 0; i < W; i++) p[i] = int8_t(a[i] == a[i] ? a[i] : 0);
}
INLINE float reduce_add(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
INLINE float reduce_max(vf a) {
  float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
INLINE vi load_bits(const void* p) { vi a; memcpy(&a, p, 16); return a; }
INLINE vi set1_bits(uint32_t x) { return vi{x, x, x, x}; }
INLINE void store_bits(void* p, vi a) { memcpy(p, &a, 16); }
INLINE vf low_half(vi a) { return (vf)(a << 16); }
INLINE vf high_half(vi a) { return (vf)(a & 0xffff0000u); }
INLINE void interleave(const void* a, const void* b, void* out) {
  const uint16_t *x = (const uint16_t*)a, *y = (const uint16_t*)b;
  uint32_t t[W];
  for (int i = 0; i < W; i++) t[i] = x[i] | uint32_t(y[i]) << 16;
  memcpy(out, t, 16);
}
INLINE void sum4(vf a, vf b, vf c, vf d, float* out) {
  const vf all[4] = {a, b, c, d};
  for (int i = 0; i < 4; i++) out[i] = reduce_add(all[i]);
}
INLINE void zip(vi a, vi b, vi& x, vi& y) {
  for (int i = 0; i < W; i++) {
    const int word = i / 2, shift = i % 2 * 16;
    x[i] = (a[word] >> shift & 0xffff) | b[word] >> shift << 16;
    y[i] = (a[W / 2 + word] >> shift & 0xffff) | b[W / 2 + word] >> shift << 16;
  }
}
INLINE void transpose(vi (&r)[W]) {
  vi t[W];
  for (int i = 0; i < W; i++) t[i] = vi{r[0][i], r[1][i], r[2][i], r[3][i]};
  for (int i = 0; i < W; i++) r[i] = t[i];
}
#endif

// ---------------------------------------------------------------- what follows is the same for all

// The first n < W elements, the other lanes 0; through a buffer, because tails are rare.
template <class T> INLINE vf load_part(const T* p, int n) {
  T buffer[W] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T> INLINE void store_part(T* p, vf a, int n) {
  T buffer[W];
  store(buffer, a);
  memcpy(p, buffer, n * sizeof(T));
}

// Calls f(i, load, store) for i = 0, W, 2W ... below n, where load(p) and store(p, a) respect the end of the row.
template <class F> INLINE void for_each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W)
    f(i, [](auto* p) { return load(p); }, [](auto* p, vf a) { store(p, a); });
  if (int left = int(n - i))
    f(i, [left](auto* p) { return load_part(p, left); }, [left](auto* p, vf a) { store_part(p, a, left); });
}

// Runs f(R) for the compile-time constant R = rows, at most MOST.
template <int MOST, class F> INLINE void with_count(int64_t rows, F f) {
  if (rows == MOST) f(std::integral_constant<int, MOST>());
  else if constexpr (MOST > 1) with_count<MOST - 1>(rows, f);
}

// 2W consecutive elements as two vectors, in whatever fixed order is cheapest for T: `place` tells which.
// For bf16 these are the even and the odd elements: a shift and a mask instead of two widening shuffles.
template <class T> INLINE void load_pair(const T* p, vf& a, vf& b) { a = load(p); b = load(p + W); }
INLINE void load_pair(const bf16* p, vf& a, vf& b) { vi both = load_bits(p); a = low_half(both); b = high_half(both); }
template <class T> INLINE int place(int i) { return i; }  // element i of the 2W stands at place(i) of a, b
template <> INLINE int place<bf16>(int i) { return i / 2 + (i & 1) * W; }

// 2W consecutive floats into that order, and back.
template <class T> INLINE void to_pair_order(const float* from, float* to) {
  for (int i = 0; i < 2 * W; i++) to[place<T>(i)] = from[i];
}
template <class T> INLINE void from_pair_order(const float* from, float* to) {
  for (int i = 0; i < 2 * W; i++) to[i] = from[place<T>(i)];
}
template <> INLINE void to_pair_order<bf16>(const float* from, float* to) {  // two loops, which the compiler vectorises
  for (int i = 0; i < W; i++) to[i] = from[2 * i];
  for (int i = 0; i < W; i++) to[W + i] = from[2 * i + 1];
}
template <> INLINE void from_pair_order<bf16>(const float* from, float* to) {
  for (int i = 0; i < W; i++) {
    to[2 * i] = from[i];
    to[2 * i + 1] = from[W + i];
  }
}

// 2W floats from where zip puts pairs, four by four into one vector and the other.
INLINE void from_zip_order(const float* from, float* to) {
  for (int i = 0; i < W; i += 4) memcpy(to + 2 * i, from + i, 16), memcpy(to + 2 * i + 4, from + W + i, 16);
}

// acc + a.low * b.low + a.high * b.high per 32-bit lane of two bf16: one instruction with AVX512_BF16.
INLINE vf dot_bf16(vf acc, vi a, vi b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
  return fma(high_half(a), high_half(b), fma(low_half(a), low_half(b), acc));
#endif
}

// The same with b in memory.
INLINE vf dot_bf16(vf acc, vi a, const bf16* b) {
#if defined(__AVX512BF16__)
  __m512bh bits;
  memcpy(&bits, b, sizeof bits);
  return _mm512_dpbf16_ps(acc, (__m512bh)a, bits);
#else
  return dot_bf16(acc, a, load_bits(b));
#endif
}

// Matrix products on 32-bit cells: a cell holds one float32, or a pair of bf16 that lie along the summed dimension.
struct Float32 {
  using Element = float;
  static constexpr int64_t PER_CELL = 1;
  static INLINE vf step(vf acc, vf a, vf b) { return fma(a, b, acc); }
};
struct PairsOfBf16 {
  using Element = bf16;
  static constexpr int64_t PER_CELL = 2;
  static INLINE vf step(vf acc, vf a, vf b) { return dot_bf16(acc, (vi)a, (vi)b); }
};

// e^x to 1 unit in the last place or two: 2^n * e^r with |r| <= ln(2)/2, r by its Taylor polynomial of degree 6
// (error 2e-8). NaN stays NaN, +infinity gives infinity, and what would be subnormal (slow) gives 0.
INLINE vf exp(vf of) {
  vf x = min(set1(89.0f), max(set1(-87.0f), of));  // the order of operands keeps NaN
  vf n = nearest(mul(x, set1(1.44269504f)));
  vf r = fnma(n, set1(-2.12194440e-4f), fnma(n, set1(0.693359375f), x));
  vf p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return where_less(of, set1(-87.0f), zero(), times_power_of_2(p, n));
}
// e^x for x <= 0 to 1e-7 (absolute), in two thirds of the instructions: 2^n * 2^r with |r| <= 1/2, 2^r by the polynomial of
// degree 5 that is 1 at 0 and nearest to it (relative error 9e-8). NaN stays NaN; -infinity gives 0.
INLINE vf exp_of_negative(vf x) {
  vf t = max(set1(-200.0f), mul(x, set1(1.44269504f)));  // the order of operands keeps NaN
  vf n = nearest(t), r = sub(t, n);
  vf p = set1(1.32647272e-3f);
  p = fma(p, r, set1(9.67151281e-3f));
  p = fma(p, r, set1(5.55073374e-2f));
  p = fma(p, r, set1(0.240222421f));
  p = fma(p, r, set1(0.693146978f));
  p = fma(p, r, set1(1.0f));
  return times_power_of_2(p, n);
}
INLINE vf sigmoid(vf x) { return div(set1(1), add(set1(1), exp(sub(zero(), x)))); }
INLINE vf tanh(vf x) {  // 1 - 2 / (e^2|x| + 1), and the odd series near 0 where that cancels
  vf a = absolute(x), s = mul(x, x);
  vf far = sub(set1(1), div(set1(2), add(exp(add(a, a)), set1(1))));
  vf p = fma(s, set1(62.0f / 2835), set1(-17.0f / 315));
  p = fma(s, p, set1(2.0f / 15));
  p = fma(s, p, set1(-1.0f / 3));
  vf near = fma(mul(a, s), p, a);
  return copysign(where_less(a, set1(0.25f), near, far), x);
}

// Asks for the lines of some bytes; of what will be read ONCE past the larger caches, where it would only drive out others.
template <bool ONCE = false> INLINE void prefetch(const void* p, int64_t bytes = 64) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i, 0, ONCE ? 0 : 3);
}

// Runs f(T{}) with the element type of a dtype code.
template <class F> INLINE void with_float_type(int64_t dtype, F f) {
  if (dtype == F32) f(float{});
  else if (dtype == BF16) f(bf16{});
  else f(f16{});
}
