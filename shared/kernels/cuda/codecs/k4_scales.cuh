// The scales of Q4_K and Q5_K: d, dmin and twelve bytes that hold eight 6-bit scales and minima.
#pragma once
#include "codec.cuh"

struct K4Scales {
  float d, dmin;
  // Byte i of word j: scale or minimum 4 j + i.
  uint32_t scale_bytes[2], minimum_bytes[2];

  MEMBER explicit K4Scales(const uint8_t* block) {
    Word4 head = load_word4(block);
    d = half_to_float(static_cast<uint16_t>(head.x));
    dmin = half_to_float(static_cast<uint16_t>(head.x >> 16));
    scale_bytes[0] = head.y & 0x3f3f3f3fu;
    minimum_bytes[0] = head.z & 0x3f3f3f3fu;
    scale_bytes[1] = (head.w & 0x0f0f0f0fu) | ((head.y >> 2) & 0x30303030u);
    minimum_bytes[1] = ((head.w >> 4) & 0x0f0f0f0fu) | ((head.z >> 2) & 0x30303030u);
  }
  MEMBER int scale(int group) const { return scale_bytes[group / 4] >> group % 4 * 8 & 255; }
  MEMBER int minimum(int group) const { return minimum_bytes[group / 4] >> group % 4 * 8 & 255; }
};
