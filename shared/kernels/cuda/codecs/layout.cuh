// How device layouts are chosen, and what the codecs share for it.
//
// Bank conflicts. Lane 4 g + t decodes elements 8 t .. 8 t + 7 of every group of 32 (or 4 t .. 4 t + 3 of every group
// of 16) of row g, and the rows of a tile lie kBytes apart. Shared memory has 32 banks of a word, so `repack` puts the
// words where a warp's loads meet every bank equally often:
//   kBytes an odd multiple of 16 (112, 144, 176, 272): one word at 4 t, or two at 64 (t / 2) + 8 (t % 2)
//   kBytes an odd multiple of 8 (136): two words at 32 t
//   kBytes an odd multiple of 4 (84, 212): one word at 32 t; at 16 t, where a part is too small for that, at half speed
// Consecutive groups share a load.
//
// Signs. A number q of n bits with an offset, q - 2^(n-1), is kept with its top bit flipped, which makes it a two's
// complement, and `group` returns it in the top bits of its byte: 2^(8-n) times the number, with nothing to extend or
// to subtract. d is divided by 2^(8-n) instead. Powers of two are exact, so that nothing else changes.
#pragma once
#include "codec.cuh"

DEVICE float load_half(const uint8_t* p) { return half_to_float(*reinterpret_cast<const uint16_t*>(p)); }

// x << n, or x >> -n.
template <int n>
DEVICE uint32_t shift(uint32_t x) {
  return n >= 0 ? x << (n & 31) : x >> (-n & 31);
}

// Element l of a GGUF's block of 32 nibbles: low ones are elements 0-15, high ones 16-31.
DEVICE int block_nibble(const uint8_t* qs, int l) { return qs[l % 16] >> l / 16 * 4 & 15; }

// Where the 8 bytes are that hold lane t's numbers of part j = 0..3 of 128 bytes.
template <int kBytes>
DEVICE int lane_place(int t, int j) {
  return kBytes % 16 ? 32 * t + 8 * j : t / 2 * 64 + 16 * j + t % 2 * 8;
}

// 256 nibbles in 128 bytes, for groups of 32 and kBytes as of `lane_place`: the low nibbles of part j are elements
// 8 t .. 8 t + 7 of group 2 j, the high ones of group 2 j + 1.
template <int kBytes, class Element>
DEVICE void pack_nibbles(uint8_t* out, Element element) {
  for (int at = 0; at < 128; at++) {
    int i = at / 32 * 64 + at % 32;
    out[lane_place<kBytes>(i % 32 / 8, i / 64) + i % 8] = static_cast<uint8_t>(element(i) | element(i + 32) << 4);
  }
}
template <int kBytes>
DEVICE int packed_nibble(const uint8_t* qs, int i) {
  return qs[lane_place<kBytes>(i % 32 / 8, i / 64) + i % 8] >> i / 32 % 2 * 4 & 15;
}

// 256 bits in 32 bytes, for groups of 32: bit s of byte 16 h + 4 t + b is element 8 t + 4 h + b of group s.
template <class Element>
DEVICE void pack_bits(uint8_t* out, Element element) {
  for (int at = 0; at < 32; at++) {
    int l = at % 16 / 4 * 8 + at / 16 * 4 + at % 4, bits = 0;
    for (int s = 0; s < 8; s++) bits |= element(32 * s + l) << s;
    out[at] = static_cast<uint8_t>(bits);
  }
}
DEVICE int packed_bit(const uint8_t* qh, int i) {
  return qh[i / 4 % 2 * 16 + i % 32 / 8 * 4 + i % 4] >> i / 32 & 1;
}
// The bytes that hold a lane's bits of all groups.
DEVICE Word2 load_bits(const uint8_t* qh, int t) { return {load_word(qh + 4 * t), load_word(qh + 16 + 4 * t)}; }

// The scales of types of 32-element blocks: f16 d[8] at the start of a superblock; kFactor is a power of two.
template <int kFactor>
struct BlockScales {
  uint32_t halves[4];

  MEMBER explicit BlockScales(const uint8_t* block) {
    Word4 head = load_word4(block);
    halves[0] = head.x;
    halves[1] = head.y;
    halves[2] = head.z;
    halves[3] = head.w;
  }
  MEMBER float scale(int group) const {
    float d = half_to_float(static_cast<uint16_t>(halves[group / 2] >> group % 2 * 16));
    return kFactor == 1 ? d : mul_(d, 1.0f / kFactor);
  }
};
