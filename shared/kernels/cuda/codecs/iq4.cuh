// The sixteen levels of IQ4_NL and IQ4_XS, and their nibbles q.
// Device: 128 bytes; nibble n of word p of part j (see lane_place) is element 8 t + n of group 2 j + p, so that
// permute_bytes finds its selectors in a row.
#pragma once
#include "layout.cuh"

// Levels 4 j .. 4 j + 3, as signed bytes: -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113.
DEVICE uint32_t iq4_levels(int j) {
  return j < 2 ? (j == 0 ? 0xbfad9881u : 0xf6eaddcfu) : (j == 2 ? 0x26190d01u : 0x71594535u);
}

// The byte that element i is in.
template <int kBytes>
DEVICE int iq4_place(int i) {
  return lane_place<kBytes>(i % 32 / 8, i / 64) + i / 32 % 2 * 4 + i % 8 / 2;
}

// From the nibbles of a GGUF: `stride` bytes between its blocks of 32.
template <int kBytes>
DEVICE void iq4_repack(const uint8_t* qs, int stride, uint8_t* out) {
  for (int i = 0; i < 256; i += 2) {
    const uint8_t* group = qs + i / 32 * stride;
    int low = block_nibble(group, i % 32), high = block_nibble(group, i % 32 + 1);
    out[iq4_place<kBytes>(i)] = static_cast<uint8_t>(low | high << 4);
  }
}

// The level of element i.
template <int kBytes>
DEVICE int iq4_level(const uint8_t* qs, int i) {
  int q = qs[iq4_place<kBytes>(i)] >> i % 2 * 4 & 15;
  return static_cast<int8_t>(iq4_levels(q / 4) >> q % 4 * 8);
}

// The levels of eight nibbles: each is looked up by its low three bits among the lower and among the upper eight
// levels, and bit 3 chooses.
DEVICE void iq4_group(uint32_t qs, uint32_t (&a)[2]) {
  uint32_t index = qs & 0x77777777u;
  uint32_t choice = (qs >> 1 & 0x44444444u) | 0x32103210u;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    uint32_t lower = permute_bytes(iq4_levels(0), iq4_levels(1), index >> 16 * h);
    uint32_t upper = permute_bytes(iq4_levels(2), iq4_levels(3), index >> 16 * h);
    a[h] = permute_bytes(lower, upper, choice >> 16 * h);
  }
}
