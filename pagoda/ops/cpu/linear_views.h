// Views: how the float kernels of linear.cpp read a tile of a packed weight. load(step, part, v) gives the vectors of the next COUNT
// elements of k (or COUNT pairs of them), multiply adds the product of one with an element of the activations, broadcast.
#pragma once
#include "linear_simd.h"

namespace {

struct Multiply {
  static constexpr int LINES = 1;                      // of 64 bytes, that a step reads of a tile
  static constexpr int BESIDE = 1;                     // tiles whose steps lie beside each other
  static constexpr int WIDE = WIDE_TILES, NARROW = 1;  // tiles beside each other: of several rows, of one
  static constexpr int BLOCK = 0;                      // steps whose sum is scaled together
  using E = float;  // an element of the activations, and what the kernel broadcasts
  using X = float;
  using V = vf;
  static INLINE vf multiply(vf acc, vf w, const float* x) { return fma(w, set1(*x), acc); }
};

struct Float32View : Multiply {  // (K, 16) float32
  static constexpr int COUNT = 1;
  const float* p;
  INLINE void load(int64_t step, int part, vf* v) const { v[0] = ::load(p + step * TILE + part * W); }
};

struct Bf16View : Multiply {  // (K / 2, 16, 2) bf16
  static constexpr int COUNT = 2;
  const uint8_t* p;
  INLINE void load(int64_t step, int part, vf* v) const {
    vi both = load_bits(p + (step * TILE + part * W) * 4);
    v[0] = low_half(both), v[1] = high_half(both);
  }
};

// bf16 in 12 bits (pack_bf16.cpp): a step is 8 k, three lines of 16 words, and two tiles alternate step by step: so one row has two
// sums in flight (a product takes 6 cycles) and memory is read in one piece. The halves of a word belong to an even k and the next. In
// the first line they hold 4 bits for each of 4 such pairs, which of the tile's exponents it is, the first pair lowest; in the
// others 8 bits each, sign and mantissa, of the first two pairs and of the last two. Escapes have exponents of their own:
// in the order of the steps (place << 8 | exponent), where place is pair of k * 32 + row * 2 + k % 2; the last is nowhere.
INLINE bool escapes(const uint32_t* escape, int64_t step) { return *escape >> 15 == step; }

struct ShortView : Multiply {
  static constexpr int COUNT = 8, LINES = 3, BESIDE = 2;
  const uint8_t* p;
  const uint32_t* escape;
  const float* exponents;  // (16,): numbers without a mantissa

  INLINE void load(int64_t step, int part, vf* v, const char* later = nullptr) {
    const uint8_t* line = p + step * LINES * BESIDE * 64 + part * W * 4;
    if (later && part == 0) prefetch<true>(later, LINES * 64);
    const vi codes = load_bits(line), first = load_bits(line + 64), second = load_bits(line + 128);
    v[0] = number(codes, shift_left<16>(first)), v[1] = number(shift_right<16>(codes), first);
    v[2] = number(shift_right<4>(codes), shift_left<8>(first)), v[3] = number(shift_right<20>(codes), shift_right<8>(first));
    v[4] = number(shift_right<8>(codes), shift_left<16>(second)), v[5] = number(shift_right<24>(codes), second);
    v[6] = number(shift_right<12>(codes), shift_left<8>(second)), v[7] = number(shift_right<28>(codes), shift_right<8>(second));
    if (!escapes(escape, step)) return;
    float bits[8][W];
    for (int i = 0; i < 8; i++) store(bits[i], v[i]);
    for (const uint32_t* e = escape; escapes(e, step); e++) {
      const int row = *e >> 9 & 15;
      if (row / W == part) put_exponent(&bits[(*e >> 13 & 3) * 2 + (*e >> 8 & 1)][row % W], *e & 255);
    }
    for (int i = 0; i < 8; i++) v[i] = ::load(bits[i]);
    if (part == PARTS - 1)
      while (escapes(escape, step)) escape++;
  }

 private:
  // By the low 4 bits of `code`, and by the sign and mantissa in bits 16 to 23 of `rest`.
  INLINE vf number(vi code, vi rest) const {
    const vi sign = and_bits(shift_left<8>(rest), 0x80000000), mantissa = and_bits(rest, 0x7f0000);
    return as_float(add_int(add_int(sign, mantissa), (vi)lookup16(exponents, code)));
  }
  static void put_exponent(float* to, uint32_t exponent) {
    uint32_t bits;
    memcpy(&bits, to, 4);
    bits = (bits & 0x807fffff) | exponent << 23;
    memcpy(to, &bits, 4);
  }
};

const float NF4_VALUES[16] = {  // Dettmers et al. 2023, "QLoRA", appendix E
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// (K / 8, 16) words of 8 nibbles, even k in the low half and odd in the high one, the first of each lowest; scales (K / 64, 16) float32.
struct Nf4View : Multiply {
  static constexpr int COUNT = 8, NARROW = 4 / PARTS;  // 4 sums in flight
  const uint8_t* p;
  const float* scales;
  INLINE void load(int64_t step, int part, vf* v) const {
    vi word = load_bits(p + (step * TILE + part * W) * 4);
    vf s = ::load(scales + step / 8 * TILE + part * W);
    v[0] = mul(lookup16(NF4_VALUES, word), s);
    v[1] = mul(lookup16(NF4_VALUES, shift_right<16>(word)), s);
    v[2] = mul(lookup16(NF4_VALUES, shift_right<4>(word)), s);
    v[3] = mul(lookup16(NF4_VALUES, shift_right<20>(word)), s);
    v[4] = mul(lookup16(NF4_VALUES, shift_right<8>(word)), s);
    v[5] = mul(lookup16(NF4_VALUES, shift_right<24>(word)), s);
    v[6] = mul(lookup16(NF4_VALUES, shift_right<12>(word)), s);
    v[7] = mul(lookup16(NF4_VALUES, shift_right<28>(word)), s);
  }
};

#if defined(__AVX512BF16__)
struct MultiplyPairs {
  static constexpr int LINES = 1, BESIDE = 1, WIDE = WIDE_TILES, NARROW = 1, BLOCK = 0;
  using E = bf16;
  using X = uint32_t;
  using V = vi;
  static INLINE vf multiply(vf acc, vi w, const uint32_t* x) { return dot_bf16(acc, w, set1_bits(*x)); }
};

struct PairView : MultiplyPairs {  // (K / 2, 16, 2) bf16, multiplied pair by pair
  static constexpr int COUNT = 1;
  const uint8_t* p;
  INLINE void load(int64_t step, int part, vi* v) const { v[0] = load_bits(p + (step * TILE + part * W) * 4); }
};

struct ShortPairView : MultiplyPairs {  // as pairs of bf16, which are also written down if they will be needed again
  static constexpr int COUNT = 4, LINES = 3, BESIDE = 2, NARROW = 2;
  const uint8_t* p;
  const uint32_t* escape;
  const bf16* exponents;  // (32,): the 16 numbers twice, an index is 5 bits, of which the highest says nothing
  uint8_t* made;          // as PairView reads them, or null

  // With each line that is read one of `later` is asked for.
  INLINE void load(int64_t step, int, vi* v, const char* later = nullptr) {
    const uint8_t* line = p + step * LINES * BESIDE * 64;
    auto read = [&](int i) INLINE_LAMBDA {
      if (later) prefetch<true>(later + 64 * i);
      asm volatile("");  // here: the compiler would gather them
      return load_bits(line + 64 * i);
    };
    const vi codes = read(0), first = read(1);
    v[0] = pair(codes, low(first)), v[1] = pair(shift_right<4>(codes), high(first));
    const vi second = read(2);
    v[2] = pair(shift_right<8>(codes), low(second)), v[3] = pair(shift_right<12>(codes), high(second));
    if (escapes(escape, step)) {  // with no call: over one the kernel's sums would be in memory
      alignas(64) uint16_t bits[128];
      UNROLL for (int i = 0; i < 4; i++) store_bits(bits + 32 * i, v[i]);
      for (; escapes(escape, step); escape++) {
        uint16_t& b = bits[*escape >> 8 & 127];
        b = (b & 0x807f) | (*escape & 255) << 7;
      }
      UNROLL for (int i = 0; i < 4; i++) v[i] = load_bits(bits + 32 * i);
    }
    if (made)
      UNROLL for (int i = 0; i < 4; i++) store_bits(made + (step * 4 + i) * 64, v[i]);
  }

 private:
  // Signs and mantissas where bf16 has them, from the low and from the high bytes; other bits are anything.
  static INLINE vi high(vi bytes) { return _mm512_srai_epi16(bytes, 8); }
  static INLINE vi low(vi bytes) { return high(_mm512_slli_epi16(bytes, 8)); }
  // The low 4 bits of the halves of `code` say which exponent.
  INLINE vi pair(vi code, vi rest) const {
    const vi exponent = _mm512_permutexvar_epi16(code, load_bits(exponents));
    return _mm512_ternarylogic_epi32(rest, exponent, set1_bits(0x807f807f), 0xe4);  // of the first where the mask has ones
  }
};

struct Nf4PairView : MultiplyPairs {  // the same words as 4 pairs of unscaled bf16: a block's sum is scaled
  static constexpr int COUNT = 4, BLOCK = 8, WIDE = 2, NARROW = 4;
  const uint8_t* p;
  const float* scales;
  INLINE void load(int64_t step, int, vi* v) const {
    const vi word = load_bits(p + step * TILE * 4);
    v[0] = pair(word), v[1] = pair(shift_right<4>(word)), v[2] = pair(shift_right<8>(word)), v[3] = pair(shift_right<12>(word));
  }
  // The values that the lowest 4 bits of every 16 name.
  static INLINE vi pair(vi word) { return _mm512_permutexvar_epi16(word, load_bits(values.bits)); }
  struct Values {
    alignas(64) bf16 bits[32];  // NF4_VALUES twice: an index is 5 bits, of which the highest says nothing
    Values() {
      for (int i = 0; i < 32; i++) from_float(NF4_VALUES[i % 16], bits + i);
    }
  };
  static const Values values;
};
const Nf4PairView::Values Nf4PairView::values;
#endif

}  // namespace
