// Kernels that try each thing that machine.cuh offers, for test_device.py.
#include "codecs/q4_k.cuh"
#include "machine.cuh"

KERNEL(64, 1) scale(const float* x, float* y, int n, float factor) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = mul_(x[i], factor);
}

// Per thread: the xor partner's number as float, int, double and 64-bit integer, and a lane's as float and int.
KERNEL(64, 1) shuffles(int mask, float* floats, int* ints, double* doubles, uint64_t* longs, float* from, int* source) {
  int i = threadIdx.x;
  floats[i] = shuffle_xor(i + 0.5f, mask);
  ints[i] = shuffle_xor(i, mask);
  doubles[i] = shuffle_xor(i + 0.25, mask);
  longs[i] = shuffle_xor(static_cast<uint64_t>(i) << 40, mask);
  from[i] = shuffle(i + 0.5f, 7 * i % 32);
  source[i] = shuffle(i, 7 * i % 32);
}

// Words of bits that say which lanes' x is odd, and the block's count of them.
KERNEL(128, 1) votes(const int* x, uint32_t* words, int* count) {
  int i = threadIdx.x;
  uint32_t bits = vote(x[i] % 2);
  if (i % 32 == 0) words[i / 32] = bits;
  count[i] = sync_block_count(x[i] % 2) * 100 + count_bits(bits);
}

// Reverses each block's part of x, and sums it in a tree.
KERNEL(256, 1) reverse(const int* x, int* reversed, int* sums) {
  DYNAMIC_SHARED(memory);
  __shared__ int tree[256];
  int* values = reinterpret_cast<int*>(memory);
  int i = threadIdx.x, block = blockIdx.z * gridDim.y * gridDim.x + blockIdx.y * gridDim.x + blockIdx.x;
  values[i] = tree[i] = x[block * 256 + i];
  sync_block();
  reversed[block * 256 + i] = values[255 - i];
  for (int half = 128; half > 0; half /= 2) {
    if (i < half) tree[i] += tree[i + half];
    sync_block();
  }
  if (i == 0) sums[block] = tree[0];
}

// Fills `bytes` of dynamic shared memory with numbers, and sums them.
KERNEL(128, 1) large(int bytes, int* sum) {
  DYNAMIC_SHARED(memory);
  int* values = reinterpret_cast<int*>(memory);
  for (int i = threadIdx.x; i < bytes / 4; i += 128) values[i] = i;
  sync_block();
  int part = 0;
  for (int i = threadIdx.x; i < bytes / 4; i += 128) part += values[bytes / 4 - 1 - i];
  atomicAdd(sum, part);
}

KERNEL(128, 1) atomics(const int* x, int* sum, uint32_t* most, float* total) {
  int i = blockIdx.x * 128 + threadIdx.x;
  atomicAdd(sum, x[i]);
  atomicMax(most, static_cast<uint32_t>(x[i]));
  atomicAdd(total, static_cast<float>(x[i]));
}

// D = A B of one warp; A is [16, k], B is [8, k] (its columns in a row each), D is [16, 8].
template <class T>
DEVICE void store(const T (&d)[4], T* out) {
  int g = threadIdx.x / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; i++) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
KERNEL(32, 1) product_s8_k32(const int8_t* a, const int8_t* b, int* out) {
  int g = threadIdx.x / 4, t = threadIdx.x % 4, d[4];
  uint32_t x[4], y[2];
  for (int i = 0; i < 4; i++) x[i] = load_word(a + (g + i % 2 * 8) * 32 + i / 2 * 16 + 4 * t);
  for (int i = 0; i < 2; i++) y[i] = load_word(b + g * 32 + i * 16 + 4 * t);
  mma_s8_k32(d, x, y);
  store(d, out);
}
KERNEL(32, 1) product_s8_k16(const int8_t* a, const int8_t* b, int* out) {
  int g = threadIdx.x / 4, t = threadIdx.x % 4, d[4];
  uint32_t x[2] = {load_word(a + g * 16 + 4 * t), load_word(a + (g + 8) * 16 + 4 * t)};
  mma_s8_k16(d, x, load_word(b + g * 16 + 4 * t));
  store(d, out);
}
KERNEL(32, 1) product_f16_k16(const uint16_t* a, const uint16_t* b, float* out) {
  int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float d[4] = {1, 1, 1, 1};
  uint32_t x[4], y[2];
  for (int i = 0; i < 4; i++) x[i] = load_word(a + (g + i % 2 * 8) * 16 + i / 2 * 8 + 2 * t);
  for (int i = 0; i < 2; i++) y[i] = load_word(b + g * 16 + i * 8 + 2 * t);
  mma_f16_k16(d, x, y);
  store(d, out);
}

// Two groups of 16-byte copies per thread; waits for the `waited` first of them.
template <int waited>
KERNEL(32, 1) copies(const uint8_t* x, uint8_t* y) {
  DYNAMIC_SHARED(memory);
  for (int part = 0; part < 2; part++) {
    copy_async(memory + part * 512 + threadIdx.x * 16, x + part * 512 + threadIdx.x * 16);
    copy_commit();
  }
  if (waited > 0) copy_wait<2 - (waited > 0 ? waited : 1)>();
  sync_warp();
  for (int i = threadIdx.x; i < 1024; i += 32) y[i] = memory[i];
}

KERNEL(32, 1) integers(const uint32_t* a, const uint32_t* b, int* low, int* high, uint32_t* permuted) {
  int i = blockIdx.x * 32 + threadIdx.x;
  low[i] = dot2_low(a[i], b[i], i);
  high[i] = dot2_high(a[i], b[i], -i);
  permuted[i] = permute_bytes(a[i], b[i], 0x7150);
}

KERNEL(64, 1) widen(const uint16_t* halves, float* floats) {
  int i = blockIdx.x * 64 + threadIdx.x;
  floats[i] = half_to_float(halves[i]);
}
KERNEL(64, 1) narrow(const float* floats, uint16_t* halves, uint32_t* pairs) {
  int i = blockIdx.x * 64 + threadIdx.x;
  halves[i] = float_to_half(floats[i]);
  pairs[i] = floats_to_halves(floats[i], -floats[i]);
}
KERNEL(64, 1) arithmetic(const float* x, const float* y, float* out, int* rounded) {
  int i = blockIdx.x * 64 + threadIdx.x, n = gridDim.x * 64;
  out[i] = fma_(x[i], y[i], -1.f);
  out[n + i] = div_(x[i], y[i]);
  out[2 * n + i] = sqrt_(y[i]);
  out[3 * n + i] = exp2_(x[i]);
  out[4 * n + i] = exp_(x[i]);
  rounded[i] = round_(x[i]);
}

template <class Codec>
KERNEL(64, 1) decode(const uint8_t* source, float* out) {
  __shared__ __align__(16) uint8_t block[Codec::kBytes];
  if (threadIdx.x == 0) Codec::repack(source, block);
  sync_block();
  for (int i = threadIdx.x; i < Codec::kElements; i += 64) out[i] = Codec::value(block, i);
}

// Threads that have returned are not waited for.
KERNEL(128, 1) early_return(int* out) {
  if (threadIdx.x >= 96 || threadIdx.x == 5) return;
  sync_block();
  out[threadIdx.x] = 1;
}

// What a GPU leaves undefined.
KERNEL(64, 1) divergent_lanes(int* out) {
  if (threadIdx.x % 2) {
    out[threadIdx.x] = shuffle(1, 0);
  } else {
    sync_warp();
  }
}
KERNEL(64, 1) divergent_warps(int* out) {
  if (threadIdx.x < 32) {
    sync_block();
  } else {
    out[0] = sync_block_count(true);
  }
}
KERNEL(64, 1) half_a_warp(int* out) {
  if (threadIdx.x < 16) {
    out[0] = shuffle(1, 0);
  } else {
    sync_block();
  }
}
KERNEL(64, 1) mma_without_lane(int* out, int lane) {
  if (threadIdx.x == lane) return;
  int d[4];
  uint32_t a[2] = {0, 0};
  mma_s8_k16(d, a, 0);
  out[threadIdx.x] = d[0];
}
KERNEL(32, 1) past_shared(int at) {
  DYNAMIC_SHARED(memory);
  memory[at] = 1;
}
KERNEL(32, 1) misaligned_copy(const uint8_t* x) {
  DYNAMIC_SHARED(memory);
  copy_async(memory, x + 4);
}
KERNEL(64, 1) forgotten_barrier(int* out, int source) {
  __shared__ int value;
  if (threadIdx.x == source) value = 7 + blockIdx.x;
  out[blockIdx.x * 64 + threadIdx.x] = value;
}
