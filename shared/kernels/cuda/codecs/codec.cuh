// What a codec is: how one superblock of a quantized row decodes. The operations are templates over it.
//
// A codec is a struct with
//   kElements     elements of a superblock: 256, or 64 for the dense types; rows are padded to whole superblocks
//   kSourceBytes  of a superblock in a GGUF (of 32-element types: 8 blocks)
//   kBytes        of a superblock in device memory, a multiple of 4 (of 8 where kGroup is 32, for loads of two words)
//   repack(source, out)   one superblock from the GGUF's layout to the device's. `source` has an alignment of 2 only;
//                         an all-zero source must decode to zeros (that is how rows are padded)
//   value(block, i)       element i: the slow truth, bit-equal to gguf.quants.dequantize
//   kDense        true: F32, F16, BF16; no quantized activations, and nothing below exists
//
// and, for products with 8-bit activations on tensor cores,
//   kGroup        elements that share a scale: 32 or 16. A superblock has kElements / kGroup groups
//   kFloatScale   false: an element is d * scale * q, with an integer scale of |scale| <= 128 per group and one d per
//                 superblock; true: an element is scale * q with a float scale per group
//   kMinimum      whether dmin * minimum is subtracted, with a minimum per group (0..255)
//   Row           what a lane keeps of one row's superblock, built from the block's address (shared memory, 4-byte
//                 aligned; 16-byte aligned where kBytes is a multiple of 16), with
//                   d                     (unless kFloatScale)
//                   scale(S)              int, or float if kFloatScale; S is a compile-time constant after unrolling
//                   dmin, minimum_bytes[] (if kMinimum) byte i of word j is the minimum of group 4 j + i
//                   group<S>(t, a)        the lane's elements of group S as signed bytes: for kGroup 32 elements
//                                         8 t .. 8 t + 3 in a[0] and 8 t + 4 .. 8 t + 7 in a[1]; for kGroup 16
//                                         elements 4 t .. 4 t + 3 in a[0]; the lowest element in the lowest byte
// |sum of q * x over a group| must stay below 2^31 / (128 * kElements / kGroup) for |x| <= 127.
#pragma once
#include "machine.cuh"

template <int n>
DEVICE void copy_bytes(const uint8_t* source, uint8_t* out) {
  for (int i = 0; i < n; i += 2)
    *reinterpret_cast<uint16_t*>(out + i) = *reinterpret_cast<const uint16_t*>(source + i);
}
