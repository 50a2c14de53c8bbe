// Q4_K: {f16 d; f16 dmin; u8 scales[12]; u8 qs[128]}: 8 groups of 32, d * scale * q - dmin * minimum. On the device the
// nibbles lie where a warp's loads meet no bank conflict (layout.cuh).
#pragma once
#include "k4_scales.cuh"
#include "layout.cuh"

struct Q4K {
  static constexpr bool kDense = false;
  static constexpr int kElements = 256;
  static constexpr int kSourceBytes = 144;
  static constexpr int kBytes = 144;
  static constexpr int kGroup = 32;
  static constexpr bool kFloatScale = false;
  static constexpr bool kMinimum = true;

  DEVICE void repack(const uint8_t* source, uint8_t* out) {
    copy_bytes<16>(source, out);
    pack_nibbles<kBytes>(out + 16, [=](int i) { return source[16 + i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15; });
  }

  DEVICE float value(const uint8_t* block, int i) {
    int group = i / 32, q = packed_nibble<kBytes>(block + 16, i);
    K4Scales scales(block);
    float scale = mul_(scales.d, static_cast<float>(scales.scale(group)));
    float minimum = mul_(scales.dmin, static_cast<float>(scales.minimum(group)));
    return add_(mul_(scale, static_cast<float>(q)), -minimum);
  }

  struct Row : K4Scales {
    const uint8_t* block;
    MEMBER explicit Row(const uint8_t* block_) : K4Scales(block_), block(block_) {}

    template <int S>
    MEMBER void group(int t, uint32_t (&a)[2]) const {
      Word2 qs = load_word2(block + 16 + lane_place<kBytes>(t, S / 2));
      a[0] = (S % 2 ? qs.x >> 4 : qs.x) & 0x0f0f0f0fu;
      a[1] = (S % 2 ? qs.y >> 4 : qs.y) & 0x0f0f0f0fu;
    }
  };
};
