// SPDX-License-Identifier: Apache-2.0
// AMX tiles in plain C++, to include before `layers_cpp.cpp` is read: what is written for them runs on processors
// that have none. As on those that have, tiles are there from `_tile_loadconfig` to `_tile_release`.

#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace at::cpu {
inline bool tiles_emulated() { return true; }
}  // namespace at::cpu
namespace at::native::cpublas {
inline bool tiles_emulated(ScalarType) { return true; }
}  // namespace at::native::cpublas

extern "C" {
std::atomic<long> tile_products{0};
}

namespace emulated {

constexpr int ROWS = 16, ROW_BYTES = 64;

inline thread_local bool configured = false;
alignas(64) inline thread_local char tiles[8][ROWS][ROW_BYTES];
inline thread_local float mistake = 0;  // or NaN, in all sums from then on

inline void expect(bool right) {
  if (!right) mistake = std::nanf("");
}
inline char (*tile(int index))[ROW_BYTES] {
  expect(configured);
  return tiles[index];
}

inline void configure(const void* from) {
  expect(!configured);  // or nobody has released them
  const auto* bytes = static_cast<const uint8_t*>(from);
  for (int i = 0; i < 8; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
    expect(bytes[0] == 1 && row_bytes == ROW_BYTES && bytes[48 + i] == ROWS);
  }
  configured = true;
  std::memset(tiles, 0, sizeof tiles);
}
inline void release() { configured = false; }

inline void zero(int index) { std::memset(tile(index), 0, sizeof tiles[0]); }
inline void load(int index, const void* from, int64_t stride) {
  for (int i = 0; i < ROWS; ++i) std::memcpy(tile(index)[i], static_cast<const char*>(from) + i * stride, ROW_BYTES);
}
inline void store(int index, void* to, int64_t stride) {
  for (int i = 0; i < ROWS; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tile(index)[i], ROW_BYTES);
}

inline float wide(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline void multiply_add(int c, int a, int b) {
  ++tile_products;
  auto* sums = reinterpret_cast<float(*)[16]>(tile(c));
  auto* left = reinterpret_cast<uint16_t(*)[32]>(tile(a));
  auto* right = reinterpret_cast<uint16_t(*)[32]>(tile(b));
  for (int i = 0; i < ROWS; ++i)
    for (int k = 0; k < 32; ++k)
      for (int j = 0; j < 16; ++j) sums[i][j] += wide(left[i][k]) * wide(right[k / 2][2 * j + k % 2]) + mistake;
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::configure
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply_add
#define init_amx tiles_emulated
#define could_pack tiles_emulated
