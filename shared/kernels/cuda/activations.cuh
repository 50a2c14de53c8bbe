// Activations in 8 bits, as the quantized products read them.
//
// A row of k floats, padded with zeros to whole groups of 256, becomes
//   q      int8  [k_padded]          round(x * (127 / max|x|)), the maximum over the group
//   scale  float [k_padded / 256]    max|x| / 127, so that x is about scale * q; 0 for a group of zeros
//   sums   int16 [k_padded / 256, 24]  of q: over the group's 16 runs of 16, then over its 8 runs of 32; a codec with a
//                                    minimum per run multiplies it with these
#pragma once
#include "machine.cuh"

static constexpr int kActivationGroup = 256;
static constexpr int kActivationSums = 24;

// Eight floats at a 16-byte aligned address.
DEVICE void load_floats(const float* p, float (&x)[8]) {
  for (int half = 0; half < 2; half++) {
    Word4 words = load_word4(p + 4 * half);
    x[4 * half] = bits_to_float(words.x);
    x[4 * half + 1] = bits_to_float(words.y);
    x[4 * half + 2] = bits_to_float(words.z);
    x[4 * half + 3] = bits_to_float(words.w);
  }
}
DEVICE void store_floats(float* p, const float (&x)[8]) {
  Word4* words = reinterpret_cast<Word4*>(p);
  words[0] = {float_to_bits(x[0]), float_to_bits(x[1]), float_to_bits(x[2]), float_to_bits(x[3])};
  words[1] = {float_to_bits(x[4]), float_to_bits(x[5]), float_to_bits(x[6]), float_to_bits(x[7])};
}

// One group by one warp, all of its lanes: `x` is elements 8 lane .. 8 lane + 7. `q`, `scale` and `sums` are the
// group's own: 256 bytes (8-byte aligned), one float, 24 sums.
//
// A group whose maximum is too small for 127 / maximum to be finite counts as zeros. A NaN or an infinity makes the
// scale one, so that a broken model shows.
DEVICE void quantize_group(const float (&x)[8], int lane, int8_t* q, float* scale, int16_t* sums) {
  // Of the bits, whose order for |x| is that of the values, with NaN on top.
  uint32_t top = 0;
  for (int i = 0; i < 8; i++) top = max_(top, float_to_bits(x[i]) & 0x7fffffffu);
  float peak = bits_to_float(max_of_warp(top));
  bool zero = peak < 1e-35f;
  // 127 / peak; a quarter of both keeps the reciprocal of the largest in range.
  float inverse = zero ? 0.0f : quotient(127.0f / 4, mul_(peak, 0.25f));

  // Within -127 .. 127, and 0 for NaN.
  int value[8];
  for (int i = 0; i < 8; i++) value[i] = round_(mul_(x[i], inverse));
  uint32_t bytes[2];
  int sum = 0;
  for (int half = 0; half < 2; half++) {
    const int* v = value + 4 * half;
    bytes[half] = permute_bytes(permute_bytes(v[0], v[1], 0x0040), permute_bytes(v[2], v[3], 0x0040), 0x5410);
    sum += v[0] + v[1] + v[2] + v[3];
  }
  *reinterpret_cast<uint64_t*>(q + 8 * lane) = static_cast<uint64_t>(bytes[1]) << 32 | bytes[0];
  int sum16 = sum + shuffle_xor(sum, 1);
  int sum32 = sum16 + shuffle_xor(sum16, 2);
  if (lane % 2 == 0) sums[lane / 2] = static_cast<int16_t>(sum16);
  if (lane % 4 == 0) sums[16 + lane / 4] = static_cast<int16_t>(sum32);
  // peak / 127 as div_ rounds it, if not below 2^-100; NaN in between for an infinity.
  float rough = mul_(peak, 1.0f / 127), exact = fma_(fma_(-127.0f, rough, peak), 1.0f / 127, rough);
  if (lane == 0) *scale = zero ? 0.0f : exact == exact ? exact : rough;
}
