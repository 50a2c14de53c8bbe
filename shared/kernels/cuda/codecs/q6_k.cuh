// Q6_K: {u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d}: 16 groups of 16, d * scale * (q - 32). In half h (128 elements)
// bits 0-3 of elements 0-63 are the low nibbles of ql[64 h : 64 h + 64], of 64-127 the high ones; bits 4 and 5 of
// element 32 j + l are bits 2 j and up of qh[32 h + l].
// Device: {u8 qh[128]; u8 ql[64]; i8 scales[16]; f16 d; u16 0}. Of q ^ 32, for element 4 t + b, bits 2-5 are the nibble
// s % 2 of byte 32 t + 4 (s / 2) + b of qh, s the group, and bits 0 and 1 are bits 2 (s % 4) and up of byte
// 16 t + 4 (s / 4) + b of ql. `group` gives 4 (q - 32).
#pragma once
#include "layout.cuh"

struct Q6K {
  static constexpr bool kDense = false;
  static constexpr int kElements = 256;
  static constexpr int kSourceBytes = 210;
  static constexpr int kBytes = 212;
  static constexpr int kGroup = 16;
  static constexpr bool kFloatScale = false;
  static constexpr bool kMinimum = false;

  DEVICE void repack(const uint8_t* source, uint8_t* out) {
    auto flipped = [=](int i) {
      int low = source[i / 128 * 64 + i % 64] >> i % 128 / 64 * 4 & 15;
      int high = source[128 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
      return (low | high << 4) ^ 32;
    };
    for (int at = 0; at < 128; at++) {
      int i = at % 32 / 4 * 32 + at / 32 * 4 + at % 4;
      out[at] = static_cast<uint8_t>(flipped(i) >> 2 | flipped(i + 16) >> 2 << 4);
    }
    for (int at = 0; at < 64; at++) {
      int bits = 0;
      for (int j = 0; j < 4; j++) bits |= (flipped(at % 16 / 4 * 64 + j * 16 + at / 16 * 4 + at % 4) & 3) << 2 * j;
      out[128 + at] = static_cast<uint8_t>(bits);
    }
    copy_bytes<18>(source + 192, out + 192);
    out[210] = out[211] = 0;
  }

  DEVICE float value(const uint8_t* block, int i) {
    int high = block[i % 16 / 4 * 32 + i / 32 * 4 + i % 4] >> i / 16 % 2 * 4 & 15;
    int low = block[128 + i % 16 / 4 * 16 + i / 64 * 4 + i % 4] >> i / 16 % 4 * 2 & 3;
    int q = (high << 2 | low) ^ 32;
    int8_t scale = static_cast<int8_t>(block[192 + i / 16]);
    return mul_(mul_(load_half(block + 208), static_cast<float>(scale)), static_cast<float>(q - 32));
  }

  struct Row {
    const uint8_t* block;
    float d;
    // Byte i of word j: scale 4 j + i.
    uint32_t scale_bytes[4];

    MEMBER explicit Row(const uint8_t* block_) : block(block_) {
      d = mul_(load_half(block + 208), 1.0f / 4);
#pragma unroll
      for (int j = 0; j < 4; j++) scale_bytes[j] = load_word(block + 192 + 4 * j);
    }
    MEMBER int scale(int group) const { return static_cast<int8_t>(scale_bytes[group / 4] >> group % 4 * 8); }

    template <int S>
    MEMBER void group(int t, uint32_t (&a)[1]) const {
      uint32_t high = load_word(block + 32 * t + S / 2 * 4);
      uint32_t low = load_word(block + 128 + 16 * t + S / 4 * 4);
      a[0] = ((S % 2 ? high : high << 4) & 0xf0f0f0f0u) | (shift<2 - S % 4 * 2>(low) & 0x0c0c0c0cu);
    }
  };
};
