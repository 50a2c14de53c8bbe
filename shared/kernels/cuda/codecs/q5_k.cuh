// Q5_K: {f16 d; f16 dmin; u8 scales[12]; u8 qh[32]; u8 qs[128]}: 8 groups of 32, d * scale * q - dmin * minimum.
// Groups 2 j and 2 j + 1 are the low and the high nibbles of qs[32 j : 32 j + 32]; bit j of qh[l] is bit 4 of element
// 32 j + l.
// Device: the same, but qh as of pack_bits and qs as of pack_nibbles.
#pragma once
#include "k4_scales.cuh"
#include "layout.cuh"

struct Q5K {
  static constexpr bool kDense = false;
  static constexpr int kElements = 256;
  static constexpr int kSourceBytes = 176;
  static constexpr int kBytes = 176;
  static constexpr int kGroup = 32;
  static constexpr bool kFloatScale = false;
  static constexpr bool kMinimum = true;

  DEVICE void repack(const uint8_t* source, uint8_t* out) {
    copy_bytes<16>(source, out);
    pack_bits(out + 16, [=](int i) { return source[16 + i % 32] >> i / 32 & 1; });
    pack_nibbles<kBytes>(out + 48, [=](int i) { return source[48 + i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15; });
  }

  DEVICE float value(const uint8_t* block, int i) {
    int q = packed_nibble<kBytes>(block + 48, i) | packed_bit(block + 16, i) << 4;
    K4Scales scales(block);
    float scale = mul_(scales.d, static_cast<float>(scales.scale(i / 32)));
    float minimum = mul_(scales.dmin, static_cast<float>(scales.minimum(i / 32)));
    return add_(mul_(scale, static_cast<float>(q)), -minimum);
  }

  struct Row : K4Scales {
    const uint8_t* block;
    MEMBER explicit Row(const uint8_t* block_) : K4Scales(block_), block(block_) {}

    template <int S>
    MEMBER void group(int t, uint32_t (&a)[2]) const {
      Word2 qs = load_word2(block + 48 + lane_place<kBytes>(t, S / 2));
      Word2 qh = load_bits(block + 16, t);
      a[0] = ((S % 2 ? qs.x >> 4 : qs.x) & 0x0f0f0f0fu) | (shift<4 - S>(qh.x) & 0x10101010u);
      a[1] = ((S % 2 ? qs.y >> 4 : qs.y) & 0x0f0f0f0fu) | (shift<4 - S>(qh.y) & 0x10101010u);
    }
  };
};
