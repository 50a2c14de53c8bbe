// Floats as integers in the same order, to sort and search by.
#pragma once
#include "machine.cuh"

// Ascending with x; -0 and 0 are equal, every NaN is below -infinity, and 0 is below every float: nothing there.
DEVICE uint32_t order_of(float x) {
  uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 1;
  if (bits == 0x80000000u) bits = 0;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
// The float of an order above 0: the same value, though not the sign of a zero nor the bits of a NaN.
DEVICE float float_of_order(uint32_t order) { return bits_to_float(order >> 31 ? order & 0x7fffffffu : ~order); }

// Descending value, then ascending id: the larger key comes first. Different ids make different keys, all above 0.
DEVICE uint64_t rank_key(uint32_t order, int id) {
  return static_cast<uint64_t>(order) << 32 | ~static_cast<uint32_t>(id);
}
DEVICE uint32_t order_of_key(uint64_t key) { return static_cast<uint32_t>(key >> 32); }
DEVICE int id_of_key(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }
