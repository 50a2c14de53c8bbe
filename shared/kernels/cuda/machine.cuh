// What the kernels ask of the machine: PTX instructions under names, and nothing else.
//
// Kernels include no CUDA headers and use no inline PTX of their own, so that the same source also compiles with g++
// against host/emulator.h, which runs a grid on the CPU, thread by thread (DRAFTWIRE_EMULATE).
//
// Rounding is explicit wherever a value reaches a logit (fma, mul, add below): a result must not depend on which
// template instance computed it, and a compiler contracts a*b+c as it sees fit.
#pragma once

#ifdef DRAFTWIRE_EMULATE
#include "emulator.h"
#else

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#define DEVICE static __device__ __forceinline__
// A member function of a struct on the device.
#define MEMBER __device__ __forceinline__
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// The dynamic shared memory of a block, 16-byte aligned.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8_t name[]

#define kInfinity __int_as_float(0x7f800000)

DEVICE float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float mul_(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add_(float a, float b) { return __fadd_rn(a, b); }
DEVICE float div_(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float sqrt_(float a) { return __fsqrt_rn(a); }
DEVICE double fma_(double a, double b, double c) { return __fma_rn(a, b, c); }

// 2^x, about 2 ulp; 2^-inf is 0.
DEVICE float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// About 1 / x and 1 / sqrt(x), within 2 ulp.
DEVICE float reciprocal_(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float inverse_sqrt_(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// e^x through exp2_.
DEVICE float exp_(float x) { return exp2_(mul_(x, 1.4426950408889634f)); }

// IEEE half as its bits.
DEVICE float half_to_float(uint16_t bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}
DEVICE uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
// Two halves in a word: `low` in bits 0-15.
DEVICE uint32_t floats_to_halves(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }
// To the nearest integer, halves to even.
DEVICE int round_(float x) { return __float2int_rn(x); }

// Bytes of {b3..b0 = high, a3..a0 = low}, chosen by the nibbles of `selector`.
DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// Sum of two products of the signed halves of `a` with unsigned bytes 0, 1 (low) or 2, 3 (high) of `b`, plus c.
DEVICE int dot2_low(uint32_t a, uint32_t b, int c) {
  int d;
  asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DEVICE int dot2_high(uint32_t a, uint32_t b, int c) {
  int d;
  asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Tensor core products of a warp. Lane = 4 g + t. D is 16 x 8: d[0], d[1] are row g, columns 2 t, 2 t + 1; d[2], d[3]
// row g + 8. Which k an element of A and B stands for is the caller's choice, as long as A and B agree: lane (g, t)
// of A holds rows g (a[0], a[2]) and g + 8 (a[1], a[3]), lane (g, t) of B holds column g.

// D = A B, int8: k = 32, four k per register; a[0], a[1] go with b[0], a[2], a[3] with b[1].
DEVICE void mma_s8_k32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(0));
}
// D = A B, int8: k = 16; a[0] is row g, a[1] row g + 8.
DEVICE void mma_s8_k16(int (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b), "r"(0));
}
// D += A B, halves: k = 16, two k per register; a[0], a[1] go with b[0], a[2], a[3] with b[1].
DEVICE void mma_f16_k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Asynchronous copies of 16 bytes into shared memory, past L1; both addresses 16-byte aligned.
DEVICE void copy_async(void* shared, const void* global) {
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(at), "l"(global) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most `n` of this thread's committed groups are still under way.
template <int n>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Programmatic dependent launch. Every kernel calls wait_for_previous before it touches what an earlier kernel of the
// stream wrote, or writes what one reads. Only these may be loaded before it: weights; a pass's inputs, which a copy
// wrote before its first kernel; and what is published. Every grid must wait in some block, also one without work, or
// kernels behind it would not wait for those ahead of it. Without the launch attribute, and before compute capability
// 9.0, both do nothing.
DEVICE void launch_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A word for kernels that run already, and who takes it. What the publishing thread wrote before, or saw written before
// a barrier, is there for whoever has seen the word. Kernels start in order, each when all blocks of the one before it
// have started, so who is waited for is running.
DEVICE void publish(uint64_t* word, uint64_t x) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(x) : "memory");
}
DEVICE uint64_t published(const uint64_t* word) {
  uint64_t x;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(word) : "memory");
  return x;
}
// Called where `published` has not yet shown what is waited for.
DEVICE void not_yet() {}

#define FULL_WARP 0xffffffffu
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(FULL_WARP, x, mask); }
DEVICE int shuffle_xor(int x, int mask) { return __shfl_xor_sync(FULL_WARP, x, mask); }
DEVICE double shuffle_xor(double x, int mask) { return __shfl_xor_sync(FULL_WARP, x, mask); }
DEVICE uint64_t shuffle_xor(uint64_t x, int mask) { return __shfl_xor_sync(FULL_WARP, x, mask); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(FULL_WARP, x, lane); }
DEVICE double shuffle(double x, int lane) { return __shfl_sync(FULL_WARP, x, lane); }
DEVICE int shuffle(int x, int lane) { return __shfl_sync(FULL_WARP, x, lane); }
DEVICE uint32_t vote(bool x) { return __ballot_sync(FULL_WARP, x); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
// How many threads of the block say true; a barrier for all of them.
DEVICE int sync_block_count(bool x) { return __syncthreads_count(x); }
// The largest x of a warp's lanes.
DEVICE uint32_t max_of_warp(uint32_t x) { return __reduce_max_sync(FULL_WARP, x); }
DEVICE int count_bits(uint32_t x) { return __popc(x); }

#endif  // DRAFTWIRE_EMULATE

template <class T>
DEVICE T min_(T a, T b) {
  return a < b ? a : b;
}
template <class T>
DEVICE T max_(T a, T b) {
  return a > b ? a : b;
}
template <class T>
DEVICE T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// x where all lanes have the same x, which the compiler then knows.
DEVICE int uniform(int x) { return shuffle(x, 0); }

// a / b and sqrt(x) rounded as div_ and sqrt_ do (Markstein), without their branches for infinities and for what is
// beyond 2^-100 .. 2^100, which are much code; a zero for `a` and NaN come out right.
DEVICE float quotient(float a, float b) {
  float inverse = reciprocal_(b);
  inverse = fma_(fma_(-b, inverse, 1.0f), inverse, inverse);
  float y = mul_(a, inverse);
  return fma_(fma_(-b, y, a), inverse, y);
}
DEVICE float root(float x) {
  float inverse = inverse_sqrt_(x), y = mul_(x, inverse);
  return fma_(fma_(-y, y, x), mul_(inverse, 0.5f), y);
}

struct Word2 {
  uint32_t x, y;
};
struct alignas(16) Word4 {
  uint32_t x, y, z, w;
};
// Wide loads; the address must be a multiple of the size.
DEVICE uint32_t load_word(const void* p) { return *static_cast<const uint32_t*>(p); }
DEVICE Word2 load_word2(const void* p) {
  uint64_t both = *static_cast<const uint64_t*>(p);
  return {static_cast<uint32_t>(both), static_cast<uint32_t>(both >> 32)};
}
DEVICE Word4 load_word4(const void* p) { return *static_cast<const Word4*>(p); }
