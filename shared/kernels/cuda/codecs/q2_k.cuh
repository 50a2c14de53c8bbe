// Q2_K: {u8 scales[16]; u8 qs[64]; f16 d; f16 dmin}: 16 groups of 16, d * scale * q - dmin * minimum. A scale is the
// low and a minimum the high nibble of a byte. Half h (128 elements) is in qs[32 h : 32 h + 32]; element 32 j + l of it
// in bits 2 j, 2 j + 1 of byte l.
// Device: the same, but bits 2 j, 2 j + 1 of byte 16 t + 4 c + b of qs are element 4 t + b of group 4 c + j.
#pragma once
#include "layout.cuh"

struct Q2K {
  static constexpr bool kDense = false;
  static constexpr int kElements = 256;
  static constexpr int kSourceBytes = 84;
  static constexpr int kBytes = 84;
  static constexpr int kGroup = 16;
  static constexpr bool kFloatScale = false;
  static constexpr bool kMinimum = true;

  DEVICE void repack(const uint8_t* source, uint8_t* out) {
    copy_bytes<16>(source, out);
    for (int at = 0; at < 64; at++) {
      int q = 0;
      for (int j = 0; j < 4; j++) {
        int i = at % 16 / 4 * 64 + j * 16 + at / 16 * 4 + at % 4;
        q |= (source[16 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3) << 2 * j;
      }
      out[16 + at] = static_cast<uint8_t>(q);
    }
    copy_bytes<4>(source + 80, out + 80);
  }

  DEVICE float value(const uint8_t* block, int i) {
    int q = block[16 + i % 16 / 4 * 16 + i / 64 * 4 + i % 4] >> i / 16 % 4 * 2 & 3;
    int scales = block[i / 16];
    float scale = mul_(load_half(block + 80), static_cast<float>(scales & 15));
    float minimum = mul_(load_half(block + 82), static_cast<float>(scales >> 4));
    return add_(mul_(scale, static_cast<float>(q)), -minimum);
  }

  struct Row {
    const uint8_t* block;
    float d, dmin;
    // Byte i of word j: scale or minimum 4 j + i.
    uint32_t scale_bytes[4], minimum_bytes[4];

    MEMBER explicit Row(const uint8_t* block_) : block(block_) {
      uint32_t tail = load_word(block + 80);
      d = half_to_float(static_cast<uint16_t>(tail));
      dmin = half_to_float(static_cast<uint16_t>(tail >> 16));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint32_t both = load_word(block + 4 * j);
        scale_bytes[j] = both & 0x0f0f0f0fu;
        minimum_bytes[j] = both >> 4 & 0x0f0f0f0fu;
      }
    }
    MEMBER int scale(int group) const { return scale_bytes[group / 4] >> group % 4 * 8 & 255; }

    template <int S>
    MEMBER void group(int t, uint32_t (&a)[1]) const {
      a[0] = load_word(block + 16 + 16 * t + S / 4 * 4) >> S % 4 * 2 & 0x03030303u;
    }
  };
};
