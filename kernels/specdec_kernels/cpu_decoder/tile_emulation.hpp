// AMX tiles in plain C++, for testing the tile code on CPUs without AMX. Not for speed.
#pragma once
namespace emulation {
struct Tile {
  int rows = 0, colsb = 0;
  uint8_t data[16][64] = {};
};
inline thread_local Tile tiles[8];

inline void configure(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  for (int i = 0; i < 8; ++i) {
    tiles[i] = Tile{};
    uint16_t colsb;
    std::memcpy(&colsb, bytes + 16 + 2 * i, 2);
    tiles[i].colsb = colsb;
    tiles[i].rows = bytes[48 + i];
  }
}
inline void load(int i, const void* base, int64_t stride) {
  std::memset(tiles[i].data, 0, sizeof(tiles[i].data));
  for (int r = 0; r < tiles[i].rows; ++r)
    std::memcpy(tiles[i].data[r], static_cast<const uint8_t*>(base) + r * stride, tiles[i].colsb);
}
inline void store(int i, void* base, int64_t stride) {
  for (int r = 0; r < tiles[i].rows; ++r)
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, tiles[i].data[r], tiles[i].colsb);
}
inline void multiply(int c, int a, int b) {
  for (int m = 0; m < tiles[c].rows; ++m)
    for (int n = 0; n < tiles[c].colsb / 4; ++n) {
      float sum;
      std::memcpy(&sum, tiles[c].data[m] + 4 * n, 4);
      for (int k = 0; k < tiles[a].colsb / 4; ++k)
        for (int j = 0; j < 2; ++j) {
          bf16 left, right;
          std::memcpy(&left, tiles[a].data[m] + 4 * k + 2 * j, 2);
          std::memcpy(&right, tiles[b].data[k] + 4 * n + 2 * j, 2);
          sum += to_float(left) * to_float(right);
        }
      std::memcpy(tiles[c].data[m] + 4 * n, &sum, 4);
    }
}
}  // namespace emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulation::configure(config)
#define _tile_release() ((void)0)
#define _tile_zero(i) std::memset(emulation::tiles[i].data, 0, 1024)
#define _tile_loadd(i, base, stride) emulation::load(i, base, stride)
#define _tile_stored(i, base, stride) emulation::store(i, base, stride)
#define _tile_dpbf16ps(c, a, b) emulation::multiply(c, a, b)
