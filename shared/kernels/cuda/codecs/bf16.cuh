// BF16: the upper halves of floats, as they are.
#pragma once
#include "codec.cuh"

struct BF16 {
  static constexpr bool kDense = true;
  static constexpr int kElements = 64;
  static constexpr int kSourceBytes = 128;
  static constexpr int kBytes = 128;

  DEVICE void repack(const uint8_t* source, uint8_t* out) { copy_bytes<kSourceBytes>(source, out); }

  DEVICE float value(const uint8_t* block, int i) {
    uint32_t bits = *reinterpret_cast<const uint16_t*>(block + 2 * i);
    return bits_to_float(bits << 16);
  }
};
