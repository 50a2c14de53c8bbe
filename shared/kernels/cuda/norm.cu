// The residual stream between two operations: add what the last one computed, normalize, quantize for the next one.
//
//   x += sum over s of part_weights[s] * parts[s]      (in the order of s, from x on; without weights a plain sum)
//   h  = x / sqrt(mean(x * x) + eps) * norm_weight
//   q, scale, sums = h in 8 bits (activations.cuh)
//
// x [rows, n_embd], parts [rows, n_parts, n_embd], part_weights [rows, n_parts] or null, norm_weight [n_embd],
// h [rows, n_embd] or null where only the quantized row is wanted; all float32. n_embd is a multiple of 32.
//
// A block of 256 threads per row. Thread t of group-round j holds elements 2048 j + 8 t .. + 7 in registers, so a warp
// holds whole groups of 256, as quantization wants, and x is read once. kRounds = ceil(n_embd / 2048). The sum of
// squares has one order: a thread's elements ascending, the lanes as a tree, the warps ascending.
#include "activations.cuh"

static constexpr int kThreads = 256;
static constexpr int kRoundElements = 8 * kThreads;

// Sum over the block's threads, the same in each; `shared` is 8 floats.
DEVICE float sum_block(float x, float* shared) {
  for (int mask = 16; mask; mask /= 2) x = add_(x, shuffle_xor(x, mask));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  sync_block();
  float sum = shared[0];
  for (int warp = 1; warp < kThreads / 32; warp++) sum = add_(sum, shared[warp]);
  return sum;
}

// One row by one block; every pointer is the row's own. `updated` is where x with the parts goes, null for nowhere.
template <int kRounds>
DEVICE void norm_row(const float* x, float* updated, const float* parts, const float* part_weights, int n_parts,
                     const float* norm_weight, float eps, int n_embd, float* h, int8_t* q, float* scale,
                     int16_t* sums) {
  DYNAMIC_SHARED(shared);
  // Parts whose loads are under way together.
  static constexpr int kAhead = kRounds == 1 ? 8 : kRounds <= 3 ? 4 : 2;
  int thread = threadIdx.x, lane = thread % 32;
  float values[kRounds][8] = {};
#pragma unroll
  for (int j = 0; j < kRounds; j++) {
    int at = j * kRoundElements + 8 * thread;
    if (at < n_embd) load_floats(x + at, values[j]);
  }
  for (int first = 0; first < n_parts; first += kAhead) {
    float part[kAhead][kRounds][8], weight[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      int s = first + a;
      if (s >= n_parts) continue;
      weight[a] = part_weights ? part_weights[s] : 1.0f;
#pragma unroll
      for (int j = 0; j < kRounds; j++) {
        int at = j * kRoundElements + 8 * thread;
        if (at < n_embd) load_floats(parts + static_cast<int64_t>(s) * n_embd + at, part[a][j]);
      }
    }
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      if (first + a >= n_parts) continue;
#pragma unroll
      for (int j = 0; j < kRounds; j++) {
        if (j * kRoundElements + 8 * thread >= n_embd) continue;
        for (int i = 0; i < 8; i++) values[j][i] = fma_(weight[a], part[a][j][i], values[j][i]);
      }
    }
  }
  float squares = 0.0f;
  float norm_weights[kRounds][8];
#pragma unroll
  for (int j = 0; j < kRounds; j++) {
    int at = j * kRoundElements + 8 * thread;
    if (at < n_embd) load_floats(norm_weight + at, norm_weights[j]);
    if (updated && at < n_embd) store_floats(updated + at, values[j]);
    for (int i = 0; i < 8; i++) squares = fma_(values[j][i], values[j][i], squares);
  }
  float mean = div_(sum_block(squares, reinterpret_cast<float*>(shared)), static_cast<float>(n_embd));
  float inverse = div_(1.0f, sqrt_(add_(mean, eps)));
#pragma unroll
  for (int j = 0; j < kRounds; j++) {
    int at = j * kRoundElements + 8 * thread;
    if (at < n_embd) {
      for (int i = 0; i < 8; i++) values[j][i] = mul_(mul_(values[j][i], inverse), norm_weights[j][i]);
      if (h) store_floats(h + at, values[j]);
    }
    int group = at / kActivationGroup;
    if (group < ceil_div(n_embd, kActivationGroup))
      quantize_group(values[j], lane, q + group * kActivationGroup, scale + group, sums + group * kActivationSums);
  }
}

// Rows 0 .. step[0] - 1. x is written only if n_parts > 0.
template <int kRounds>
KERNEL(kThreads, 1)
add_norm(const int* step, float* x, const float* parts, const float* part_weights, int n_parts,
         const float* norm_weight, float eps, int n_embd, float* h, int8_t* q, float* scale, int16_t* sums) {
  launch_next();
  wait_for_previous();
  int64_t row = blockIdx.x;
  if (row >= step[0]) return;
  int64_t groups = ceil_div(n_embd, kActivationGroup);
  float* own = x + row * n_embd;
  norm_row<kRounds>(own, n_parts ? own : nullptr, parts + row * n_parts * n_embd,
                    part_weights ? part_weights + row * n_parts : nullptr, n_parts, norm_weight, eps, n_embd,
                    h ? h + row * n_embd : nullptr, q + row * groups * kActivationGroup, scale + row * groups,
                    sums + row * groups * kActivationSums);
}

// The same of rows out_rows[0 .. step[1] - 1] into rows 0 .. step[1] - 1 of h, q, scale and sums; x stays as it is.
template <int kRounds>
KERNEL(kThreads, 1)
output_norm(const int* step, const int* out_rows, const float* x, const float* parts, const float* part_weights,
            int n_parts, const float* norm_weight, float eps, int n_embd, float* h, int8_t* q, float* scale,
            int16_t* sums) {
  launch_next();
  wait_for_previous();
  int64_t out = blockIdx.x;
  if (out >= step[1]) return;
  int64_t row = out_rows[out];
  int64_t groups = ceil_div(n_embd, kActivationGroup);
  norm_row<kRounds>(x + row * n_embd, nullptr, parts + row * n_parts * n_embd,
                    part_weights ? part_weights + row * n_parts : nullptr, n_parts, norm_weight, eps, n_embd,
                    h ? h + out * n_embd : nullptr, q + out * groups * kActivationGroup, scale + out * groups,
                    sums + out * groups * kActivationSums);
}

// Quantize the first n_rows[0] * rows_factor rows of x [rows, k], k a multiple of 32: a block of 256 threads per row,
// a warp per group of 256.
KERNEL(kThreads, 1)
quantize(const int* n_rows, int rows_factor, const float* x, int k, int8_t* q, float* scale, int16_t* sums) {
  launch_next();
  wait_for_previous();
  int64_t row = blockIdx.x;
  if (row >= static_cast<int64_t>(n_rows[0]) * rows_factor) return;
  int64_t groups = ceil_div(k, kActivationGroup);
  int lane = threadIdx.x % 32;
  for (int group = threadIdx.x / 32; group < groups; group += kThreads / 32) {
    int at = group * kActivationGroup + 8 * lane;
    float values[8] = {};
    if (at < k) load_floats(x + row * k + at, values);
    int64_t to = row * groups + group;
    quantize_group(values, lane, q + to * kActivationGroup, scale + to, sums + to * kActivationSums);
  }
}
