// IQ4_NL: 8 blocks {f16 d; u8 qs[16]}, d * level[q].
// Device: {f16 d[8]; u8 qs[128]}, qs as in iq4.cuh.
#pragma once
#include "iq4.cuh"

struct IQ4NL {
  static constexpr bool kDense = false;
  static constexpr int kElements = 256;
  static constexpr int kSourceBytes = 144;
  static constexpr int kBytes = 144;
  static constexpr int kGroup = 32;
  static constexpr bool kFloatScale = true;
  static constexpr bool kMinimum = false;

  DEVICE void repack(const uint8_t* source, uint8_t* out) {
    for (int s = 0; s < 8; s++) copy_bytes<2>(source + 18 * s, out + 2 * s);
    iq4_repack<kBytes>(source + 2, 18, out + 16);
  }

  DEVICE float value(const uint8_t* block, int i) {
    return mul_(load_half(block + i / 32 * 2), static_cast<float>(iq4_level<kBytes>(block + 16, i)));
  }

  struct Row : BlockScales<1> {
    const uint8_t* block;
    MEMBER explicit Row(const uint8_t* block_) : BlockScales<1>(block_), block(block_) {}

    template <int S>
    MEMBER void group(int t, uint32_t (&a)[2]) const {
      Word2 qs = load_word2(block + 16 + lane_place<kBytes>(t, S / 2));
      iq4_group(S % 2 ? qs.y : qs.x, a);
    }
  };
};
