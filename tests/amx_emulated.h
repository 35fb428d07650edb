// The tile instructions of AMX in plain C++, so that the kernels' `amx` variant runs on a CPU with AVX512_BF16 and no AMX.
//
// `make asan` and `make amx` force this file into every source (-include). It follows Intel's manual (the order of sums is
// that of TDPBF16PS); what would be a fault of the CPU ends the process with a word about it.
#pragma once
#define AMX_EMULATED 1
#if defined(__AMX_TILE__)
#include <immintrin.h>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulated {

struct Config { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; };
inline thread_local Config config;  // palette 0: none is loaded
inline thread_local uint32_t tiles[8][16][16];

inline void check(bool right, const char* what) {
  if (!right) fprintf(stderr, "AMX would fault: %s\n", what), abort();
}

inline void zero(int t) {
  check(config.palette == 1 && config.rows[t], "the tile has no shape");
  memset(tiles[t], 0, sizeof tiles[t]);
}

inline void release() { config = {}, memset(tiles, 0, sizeof tiles); }

inline void load_config(const void* from) {
  release();
  memcpy(&config, from, sizeof config);
  check(config.palette == 1 && config.start == 0, "palette or first row");
  for (uint8_t byte : config.reserved) check(byte == 0, "reserved bytes of the shapes");
  for (int t = 0; t < 16; t++) {
    const int rows = config.rows[t], bytes = config.row_bytes[t];
    check(t < 8 ? rows <= 16 && bytes <= 64 && !rows == !bytes : !rows && !bytes, "the shape of a tile");
  }
}

inline void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int r = 0; r < config.rows[t]; r++) memcpy(tiles[t][r], (const char*)from + r * stride, config.row_bytes[t]);
}

inline void store(int t, void* to, int64_t stride) {
  check(config.palette == 1 && config.rows[t], "the tile has no shape");
  for (int r = 0; r < config.rows[t]; r++) memcpy((char*)to + r * stride, tiles[t][r], config.row_bytes[t]);
}

inline void check_product(int c, int a, int b) {
  const auto bytes = config.row_bytes;
  check(config.palette == 1 && config.rows[c] && config.rows[a] && config.rows[b], "a tile has no shape");
  check(c != a && c != b && a != b, "a product of a tile with itself");
  check(config.rows[a] == config.rows[c] && bytes[a] == 4 * config.rows[b] && bytes[b] == bytes[c] && bytes[c] % 4 == 0,
        "shapes that do not fit together");
}

inline float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }  // denormals

inline float bf16(uint32_t high_half) {
  float x;
  memcpy(&x, &high_half, 4);
  return flush(x);
}

inline void multiply_bf16(int c, int a, int b) {
  check_product(c, a, b);
  for (int m = 0; m < config.rows[c]; m++) {
    float even[16] = {}, odd[16] = {}, sums[16];
    for (int k = 0; k < config.rows[b]; k++) {
      const float x = bf16(tiles[a][m][k] << 16), y = bf16(tiles[a][m][k] & 0xffff0000);
      for (int n = 0; n < 16; n++) {
        even[n] = flush(std::fma(x, bf16(tiles[b][k][n] << 16), even[n]));
        odd[n] = flush(std::fma(y, bf16(tiles[b][k][n] & 0xffff0000), odd[n]));
      }
    }
    memcpy(sums, tiles[c][m], sizeof sums);
    for (int n = 0; n < 16; n++) sums[n] = flush(flush(sums[n]) + flush(even[n] + odd[n]));
    memcpy(tiles[c][m], sums, config.row_bytes[c]);
  }
}

inline void multiply_int8(int c, int a, int b) {
  check_product(c, a, b);
  for (int m = 0; m < config.rows[c]; m++)
    for (int k = 0; k < config.rows[b]; k++)
      for (int n = 0; n < config.row_bytes[c] / 4; n++)
        for (int i = 0; i < 32; i += 8)
          tiles[c][m][n] += uint32_t(int8_t(tiles[a][m][k] >> i) * int8_t(tiles[b][k][n] >> i));
}

}  // namespace amx_emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig amx_emulated::load_config
#define _tile_release amx_emulated::release
#define _tile_loadd amx_emulated::load
#define _tile_stored amx_emulated::store
#define _tile_zero amx_emulated::zero
#define _tile_dpbf16ps amx_emulated::multiply_bf16
#define _tile_dpbssd amx_emulated::multiply_int8
#endif
