// F16: IEEE halves, as they are.
#pragma once
#include "layout.cuh"

struct F16 {
  static constexpr bool kDense = true;
  static constexpr int kElements = 64;
  static constexpr int kSourceBytes = 128;
  static constexpr int kBytes = 128;

  DEVICE void repack(const uint8_t* source, uint8_t* out) { copy_bytes<kSourceBytes>(source, out); }

  DEVICE float value(const uint8_t* block, int i) { return load_half(block + 2 * i); }
};
