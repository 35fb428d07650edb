// bf16 in 12 bits, nothing lost: the exponents of trained weights are nearly all among 16 that follow each other, so a tile
// keeps its 16 most frequent ones and says in 4 bits which; sign and mantissa take 8, and the few exponents that are not
// among the 16 are listed. linear_views.h has the layout, and reads it. (DFloat11, Zhang et al. 2025, gets 11 bits out of
// the same by a Huffman code; fixed places are read by a vector at a time.)
#include <algorithm>
#include <numeric>

#include "kernels.h"
#include "linear_simd.h"
#include "parallel.h"

namespace {

int exponent(uint16_t x) { return x >> 7 & 255; }

// f(row, k, bits) for the elements of a tile.
template <class F> void for_each_element(ptr w, int64_t n_out, int64_t n_in, int64_t stride, int64_t tile, F f) {
  const int64_t n = std::min<int64_t>(TILE, n_out - tile * TILE);
  for (int64_t row = 0; row < n; row++) {
    auto x = (const uint16_t*)w + (tile * TILE + row) * stride;
    for (int64_t k = 0; k < n_in; k++) f(row, k, x[k]);
  }
}

}  // namespace

// exponents (tiles, 16): the most frequent ones of each tile, sorted; zeros in the places that are left. counts (tiles,): how
// many elements have another.
void bf16_exponents(ptr exponents, ptr counts, ptr w, int64_t n_out, int64_t n_in, int64_t stride) {
  parallel_for((n_out + TILE - 1) / TILE, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++) {
      int64_t frequency[256] = {}, others = 0;
      for_each_element(w, n_out, n_in, stride, tile, [&](int64_t, int64_t, uint16_t x) { frequency[exponent(x)]++; });
      int order[256];
      std::iota(order, order + 256, 0);
      std::stable_sort(order, order + 256, [&](int a, int b) { return frequency[a] > frequency[b]; });
      for (int i = TILE; i < 256; i++) others += frequency[order[i]];
      auto chosen = (uint8_t*)exponents + tile * TILE;
      for (int i = 0; i < TILE; i++) chosen[i] = frequency[order[i]] ? order[i] : 0;
      std::sort(chosen, chosen + TILE);  // padding has code 0, which had better not be infinity's
      ((int32_t*)counts)[tile] = int32_t(others);
    }
  });
}

// lines (tiles / 2, n_in / 8, 2, 3, 16) words, zeros before. escapes: a tile's begin at starts[tile], and end with one that is nowhere.
void bf16_lines(ptr lines, ptr escapes, ptr starts, ptr exponents, ptr w, int64_t n_out, int64_t n_in, int64_t stride) {
  parallel_for((n_out + TILE - 1) / TILE, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++) {
      uint8_t code[256];
      std::fill(code, code + 256, TILE);
      for (int i = 0; i < TILE; i++) code[((const uint8_t*)exponents)[tile * TILE + i]] = i;
      auto to = (uint16_t*)lines + (tile / 2 * ((n_in + 7) / 8) * 2 + tile % 2) * 96;
      auto first = (uint32_t*)escapes + ((const int32_t*)starts)[tile], escape = first;
      for_each_element(w, n_out, n_in, stride, tile, [&](int64_t row, int64_t k, uint16_t x) {
        const int64_t step = k / 8, pair = k / 2 % 4, half = row * 2 + k % 2;
        uint16_t* line = to + step * 192 + half;
        line[32 * (1 + pair / 2)] |= ((x >> 8 & 0x80) | (x & 0x7f)) << pair % 2 * 8;
        if (code[exponent(x)] < TILE) line[0] |= code[exponent(x)] << pair * 4;
        else *escape++ = uint32_t(k / 2 * 32 + half) << 8 | exponent(x);
      });
      std::sort(first, escape);
      *escape = ~0u;
    }
  });
}
