// Q3_K: {u8 hmask[32]; u8 qs[64]; u8 scales[12]; f16 d}: 16 groups of 16, d * (scale - 32) * (q - 4). The low two bits
// of q lie in qs as in Q2_K; bit 2 of element 32 j + l is bit j of hmask[l]. Scales: low and then high nibbles of
// scales[0:8] are bits 0-3 of scales 0-15; bits 4 and 5 of scale s are bits 2 (s / 4) and up of scales[8 + s % 4].
// Device: {u8 qs[64]; u8 ql[32]; u8 scales[12]; f16 d; u16 0}. Of q ^ 4, bits 1 and 2 are bits 2 j, 2 j + 1 of byte
// 16 c + l of qs for element l of group 4 c + j, and bit 0 is bit j of byte 16 c + l of ql for element l of group
// 8 c + j. Scales as they were, but scale ^ 32. `group` gives 32 (q - 4), `scale` 4 (scale - 32).
#pragma once
#include "layout.cuh"

struct Q3K {
  static constexpr bool kDense = false;
  static constexpr int kElements = 256;
  static constexpr int kSourceBytes = 110;
  static constexpr int kBytes = 112;
  static constexpr int kGroup = 16;
  static constexpr bool kFloatScale = false;
  static constexpr bool kMinimum = false;

  DEVICE void repack(const uint8_t* source, uint8_t* out) {
    auto flipped = [=](int i) {
      int two = source[32 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
      int third = source[i % 32] >> i / 32 & 1;
      return (two | third << 2) ^ 4;
    };
    for (int at = 0; at < 64; at++) {
      int bits = 0;
      for (int j = 0; j < 4; j++) bits |= flipped(at / 16 * 64 + j * 16 + at % 16) >> 1 << 2 * j;
      out[at] = static_cast<uint8_t>(bits);
    }
    for (int at = 0; at < 32; at++) {
      int bits = 0;
      for (int j = 0; j < 8; j++) bits |= (flipped(at / 16 * 128 + j * 16 + at % 16) & 1) << j;
      out[64 + at] = static_cast<uint8_t>(bits);
    }
    copy_bytes<8>(source + 96, out + 96);
    for (int at = 8; at < 12; at++) out[96 + at] = source[96 + at] ^ 0xaa;
    copy_bytes<2>(source + 108, out + 108);
    out[110] = out[111] = 0;
  }

  DEVICE float value(const uint8_t* block, int i) {
    int s = i / 16;
    const uint8_t* scales = block + 96;
    int scale = ((scales[s % 8] >> s / 8 * 4 & 15) | (scales[8 + s % 4] >> s / 4 * 2 & 3) << 4) ^ 32;
    int two = block[i / 64 * 16 + i % 16] >> s % 4 * 2 & 3;
    int last = block[64 + i / 128 * 16 + i % 16] >> s % 8 & 1;
    int q = (two << 1 | last) ^ 4;
    return mul_(mul_(load_half(block + 108), static_cast<float>(scale - 32)), static_cast<float>(q - 4));
  }

  struct Row {
    const uint8_t* block;
    float d;
    // Byte i of word j: scale 4 j + i.
    uint32_t scale_bytes[4];

    MEMBER explicit Row(const uint8_t* block_) : block(block_) {
      Word4 tail = load_word4(block + 96);
      d = mul_(half_to_float(static_cast<uint16_t>(tail.w)), 1.0f / 128);
      scale_bytes[0] = (tail.x << 2 & 0x3c3c3c3cu) | (tail.z << 6 & 0xc0c0c0c0u);
      scale_bytes[1] = (tail.y << 2 & 0x3c3c3c3cu) | (tail.z << 4 & 0xc0c0c0c0u);
      scale_bytes[2] = (tail.x >> 2 & 0x3c3c3c3cu) | (tail.z << 2 & 0xc0c0c0c0u);
      scale_bytes[3] = (tail.y >> 2 & 0x3c3c3c3cu) | (tail.z & 0xc0c0c0c0u);
    }
    MEMBER int scale(int group) const { return static_cast<int8_t>(scale_bytes[group / 4] >> group % 4 * 8); }

    template <int S>
    MEMBER void group(int t, uint32_t (&a)[1]) const {
      uint32_t two = load_word(block + S / 4 * 16 + 4 * t);
      uint32_t last = load_word(block + 64 + S / 8 * 16 + 4 * t);
      a[0] = (shift<6 - S % 4 * 2>(two) & 0xc0c0c0c0u) | (shift<5 - S % 8>(last) & 0x20202020u);
    }
  };
};
