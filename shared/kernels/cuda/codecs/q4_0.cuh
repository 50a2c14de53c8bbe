// Q4_0: 8 blocks {f16 d; u8 qs[16]}, d * (q - 8).
// Device: {f16 d[8]; u8 qs[128]}, q ^ 8 in nibbles as of pack_nibbles. `group` gives 16 (q - 8).
#pragma once
#include "layout.cuh"

struct Q40 {
  static constexpr bool kDense = false;
  static constexpr int kElements = 256;
  static constexpr int kSourceBytes = 144;
  static constexpr int kBytes = 144;
  static constexpr int kGroup = 32;
  static constexpr bool kFloatScale = true;
  static constexpr bool kMinimum = false;

  DEVICE void repack(const uint8_t* source, uint8_t* out) {
    for (int s = 0; s < 8; s++) copy_bytes<2>(source + 18 * s, out + 2 * s);
    pack_nibbles<kBytes>(out + 16, [=](int i) { return block_nibble(source + i / 32 * 18 + 2, i % 32) ^ 8; });
  }

  DEVICE float value(const uint8_t* block, int i) {
    int q = packed_nibble<kBytes>(block + 16, i) ^ 8;
    return mul_(load_half(block + i / 32 * 2), static_cast<float>(q - 8));
  }

  struct Row : BlockScales<16> {
    const uint8_t* block;
    MEMBER explicit Row(const uint8_t* block_) : BlockScales<16>(block_), block(block_) {}

    template <int S>
    MEMBER void group(int t, uint32_t (&a)[2]) const {
      Word2 qs = load_word2(block + 16 + lane_place<kBytes>(t, S / 2));
      a[0] = (S % 2 ? qs.x : qs.x << 4) & 0xf0f0f0f0u;
      a[1] = (S % 2 ? qs.y : qs.y << 4) & 0xf0f0f0f0u;
    }
  };
};
