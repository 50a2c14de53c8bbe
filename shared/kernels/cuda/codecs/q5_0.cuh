// Q5_0: 8 blocks {f16 d; u32 qh; u8 qs[16]}, d * (q - 16); bit i of qh is bit 4 of element i.
// Device: {f16 d[8]; u8 qh[32]; u8 qs[128]}, of q ^ 16 bits 1-4 in qs as of pack_nibbles and bit 0 in qh as of
// pack_bits. `group` gives 8 (q - 16).
#pragma once
#include "layout.cuh"

struct Q50 {
  static constexpr bool kDense = false;
  static constexpr int kElements = 256;
  static constexpr int kSourceBytes = 176;
  static constexpr int kBytes = 176;
  static constexpr int kGroup = 32;
  static constexpr bool kFloatScale = true;
  static constexpr bool kMinimum = false;

  DEVICE void repack(const uint8_t* source, uint8_t* out) {
    for (int s = 0; s < 8; s++) copy_bytes<2>(source + 22 * s, out + 2 * s);
    auto flipped = [=](int i) {
      const uint8_t* at = source + i / 32 * 22;
      int fifth = at[2 + i % 32 / 8] >> i % 8 & 1;
      return (block_nibble(at + 6, i % 32) | fifth << 4) ^ 16;
    };
    pack_bits(out + 16, [=](int i) { return flipped(i) & 1; });
    pack_nibbles<kBytes>(out + 48, [=](int i) { return flipped(i) >> 1; });
  }

  DEVICE float value(const uint8_t* block, int i) {
    int q = (packed_nibble<kBytes>(block + 48, i) << 1 | packed_bit(block + 16, i)) ^ 16;
    return mul_(load_half(block + i / 32 * 2), static_cast<float>(q - 16));
  }

  struct Row : BlockScales<8> {
    const uint8_t* block;
    MEMBER explicit Row(const uint8_t* block_) : BlockScales<8>(block_), block(block_) {}

    template <int S>
    MEMBER void group(int t, uint32_t (&a)[2]) const {
      Word2 qs = load_word2(block + 48 + lane_place<kBytes>(t, S / 2));
      Word2 qh = load_bits(block + 16, t);
      a[0] = ((S % 2 ? qs.x : qs.x << 4) & 0xf0f0f0f0u) | (shift<3 - S>(qh.x) & 0x08080808u);
      a[1] = ((S % 2 ? qs.y : qs.y << 4) & 0xf0f0f0f0u) | (shift<3 - S>(qh.y) & 0x08080808u);
    }
  };
};
