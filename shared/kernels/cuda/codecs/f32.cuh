// F32: floats, as they are.
#pragma once
#include "codec.cuh"

struct F32 {
  static constexpr bool kDense = true;
  static constexpr int kElements = 64;
  static constexpr int kSourceBytes = 256;
  static constexpr int kBytes = 256;

  DEVICE void repack(const uint8_t* source, uint8_t* out) { copy_bytes<kSourceBytes>(source, out); }

  DEVICE float value(const uint8_t* block, int i) { return *reinterpret_cast<const float*>(block + 4 * i); }
};
