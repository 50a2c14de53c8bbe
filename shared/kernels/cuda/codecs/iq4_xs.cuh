// IQ4_XS: {f16 d; u16 scales_h; u8 scales_l[4]; u8 qs[128]}: 8 groups of 32, d * (scale - 32) * level[q]. Bits 0-3 of a
// scale are a nibble of scales_l, bits 4 and 5 two bits of scales_h, both in the order of the groups.
// Device: {f16 d; u8 scales[6]; u8 qs[128]}, qs as in iq4.cuh. scale - 32 as a two's complement of 6 bits: of groups
// 0-4 from bit 6 s of the second word on, of 5 and 6 in bits 16-21 and 22-27 of the first word, of 7 in the top four
// bits of the first (bits 0-3 of it) and the top two bits of the second word.
#pragma once
#include "iq4.cuh"

struct IQ4XS {
  static constexpr bool kDense = false;
  static constexpr int kElements = 256;
  static constexpr int kSourceBytes = 136;
  static constexpr int kBytes = 136;
  static constexpr int kGroup = 32;
  static constexpr bool kFloatScale = false;
  static constexpr bool kMinimum = false;

  DEVICE void repack(const uint8_t* source, uint8_t* out) {
    uint32_t words[2] = {static_cast<uint32_t>(source[0] | source[1] << 8), 0};
    for (int s = 0; s < 8; s++) {
      uint32_t low = source[4 + s / 2] >> s % 2 * 4 & 15;
      uint32_t high = (source[2 + s / 4] >> s % 4 * 2 & 3) ^ 2;
      uint32_t scale = low | high << 4;
      if (s < 5)
        words[1] |= scale << 6 * s;
      else if (s < 7)
        words[0] |= scale << (6 * s - 14);
      else {
        words[0] |= low << 28;
        words[1] |= high << 30;
      }
    }
    for (int at = 0; at < 8; at++) out[at] = static_cast<uint8_t>(words[at / 4] >> at % 4 * 8);
    iq4_repack<kBytes>(source + 8, 16, out + 8);
  }

  DEVICE float value(const uint8_t* block, int i) {
    Row row(block);
    float scale = mul_(row.d, static_cast<float>(row.scale(i / 32)));
    return mul_(scale, static_cast<float>(iq4_level<kBytes>(block + 8, i)));
  }

  struct Row {
    const uint8_t* block;
    Word2 head;
    float d;

    MEMBER explicit Row(const uint8_t* block_) : block(block_), head(load_word2(block_)) {
      d = half_to_float(static_cast<uint16_t>(head.x));
    }
    MEMBER int scale(int group) const {
      uint32_t top;  // the scale in bits 26-31
      if (group < 5)
        top = head.y << (26 - 6 * group);
      else if (group < 7)
        top = head.x << (40 - 6 * group);
      else
        top = (head.y & 0xc0000000u) | (head.x >> 2 & 0x3c000000u);
      return static_cast<int>(top) >> 26;
    }

    template <int S>
    MEMBER void group(int t, uint32_t (&a)[2]) const {
      Word2 qs = load_word2(block + 8 + lane_place<kBytes>(t, S / 2));
      iq4_group(S % 2 ? qs.y : qs.x, a);
    }
  };
};
