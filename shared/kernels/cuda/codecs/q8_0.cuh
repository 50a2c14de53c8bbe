// Q8_0: 8 blocks {f16 d; i8 qs[32]}, d * q.
// Device: {f16 d[8]; i8 qs[256]}: in bytes 128 h .. 128 h + 127 of qs part j (see lane_place) is elements
// 8 t .. 8 t + 7 of group 4 h + j.
#pragma once
#include "layout.cuh"

struct Q80 {
  static constexpr bool kDense = false;
  static constexpr int kElements = 256;
  static constexpr int kSourceBytes = 272;
  static constexpr int kBytes = 272;
  static constexpr int kGroup = 32;
  static constexpr bool kFloatScale = true;
  static constexpr bool kMinimum = false;

  // Where element i is in qs.
  DEVICE int place(int i) { return i / 128 * 128 + lane_place<kBytes>(i % 32 / 8, i / 32 % 4) + i % 8; }

  DEVICE void repack(const uint8_t* source, uint8_t* out) {
    for (int s = 0; s < 8; s++) copy_bytes<2>(source + 34 * s, out + 2 * s);
    for (int i = 0; i < kElements; i++) out[16 + place(i)] = source[i / 32 * 34 + 2 + i % 32];
  }

  DEVICE float value(const uint8_t* block, int i) {
    int8_t q = static_cast<int8_t>(block[16 + place(i)]);
    return mul_(load_half(block + i / 32 * 2), static_cast<float>(q));
  }

  struct Row : BlockScales<1> {
    const uint8_t* block;
    MEMBER explicit Row(const uint8_t* block_) : BlockScales<1>(block_), block(block_) {}

    template <int S>
    MEMBER void group(int t, uint32_t (&a)[2]) const {
      Word2 qs = load_word2(block + 16 + S / 4 * 128 + lane_place<kBytes>(t, S % 4));
      a[0] = qs.x;
      a[1] = qs.y;
    }
  };
};
