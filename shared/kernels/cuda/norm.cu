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
//
// At few rows a block's time is that of its chain of loads, so loads wait for each other as little as they can: weights
// are under way before wait_for_previous, x and parts before it is known whether the step has the row.
#include "activations.cuh"

static constexpr int kThreads = 256;
static constexpr int kWarps = kThreads / 32;
static constexpr int kRoundElements = 8 * kThreads;
// Norm weights are loaded early if they are at most so many rounds: registers.
static constexpr int kEarlyRounds = 4;
// Grids of more rows do not load rows that the step may not have.
static constexpr unsigned kEagerRows = 32;

// Where a thread's elements of each round begin: only in the last one may they lie beyond the row, and are then loaded
// from its end.
template <int kRounds>
struct Place {
  int n_embd;
  MEMBER int at(int j) const { return j * kRoundElements + 8 * static_cast<int>(threadIdx.x); }
  MEMBER bool there(int j) const { return j + 1 < kRounds || at(j) < n_embd; }
  MEMBER uint32_t load_at(int j) const { return j + 1 < kRounds ? at(j) : min_(at(j), n_embd - 8); }

  MEMBER void load(const float* row, float (&values)[kRounds][8]) const {
#pragma unroll
    for (int j = 0; j < kRounds; j++) load_floats(row + load_at(j), values[j]);
  }
  MEMBER void store(float* row, const float (&values)[kRounds][8]) const {
#pragma unroll
    for (int j = 0; j < kRounds; j++) {
      if (there(j)) store_floats(row + at(j), values[j]);
    }
  }
  // Zeros for what was loaded beyond the row.
  MEMBER void clear_beyond(float (&values)[kRounds][8]) const {
    bool last = there(kRounds - 1);
    for (int i = 0; i < 8; i++) values[kRounds - 1][i] = last ? values[kRounds - 1][i] : 0.0f;
  }
  // As row `row` of q, scale and sums. `warp`: threadIdx.x / 32, uniform.
  MEMBER void quantize(const float (&values)[kRounds][8], int warp, uint32_t row, int8_t* q, float* scale,
                       int16_t* sums) const {
    int groups = static_cast<uint32_t>(n_embd + kActivationGroup - 1) / kActivationGroup;
#pragma unroll
    for (int j = 0; j < kRounds; j++) {
      int group = j * kWarps + warp;
      uint32_t to = row * groups + group;
      if (j + 1 < kRounds || group < groups)
        quantize_group(values[j], threadIdx.x % 32, q + to * kActivationGroup, scale + to,
                       sums + to * kActivationSums);
    }
  }
};

// The sum of squares of a row: each warp's into warp_sums [kWarps] in shared memory, and after a barrier
template <int kRounds>
DEVICE void sum_squares(const float (&values)[kRounds][8], float* warp_sums) {
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kRounds; j++)
    for (int i = 0; i < 8; i++) squares = fma_(values[j][i], values[j][i], squares);
  for (int mask = 16; mask; mask /= 2) squares = add_(squares, shuffle_xor(squares, mask));
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = squares;
}
// what the row's values are multiplied with, the same in every thread: 1 / sqrt(mean + eps), each step rounded.
DEVICE float inverse_norm(const float* warp_sums, int n_embd, float eps) {
  float parts[kWarps];
  load_floats(warp_sums, parts);
  float sum = parts[0];
  for (int warp = 1; warp < kWarps; warp++) sum = add_(sum, parts[warp]);
  float inverse = quotient(1.0f, root(add_(quotient(sum, static_cast<float>(n_embd)), eps)));
  return sum == kInfinity ? 0.0f : inverse;
}
template <int kRounds>
DEVICE void scale_row(float (&values)[kRounds][8], float inverse, const float (&norm_weights)[kRounds][8]) {
#pragma unroll
  for (int j = 0; j < kRounds; j++)
    for (int i = 0; i < 8; i++) values[j][i] = mul_(mul_(values[j][i], inverse), norm_weights[j][i]);
}

// Row `row` by one block into row `out` of h, q, scale and sums. `updated` is where x with the parts goes, null for
// nowhere. norm_weights: loaded where kRounds <= kEarlyRounds. Without `there`, which is uniform, nothing is written.
template <int kRounds>
DEVICE void norm_row(uint32_t row, const float* x, float* updated, const float* parts, const float* part_weights,
                     int n_parts, const float* norm_weight, float (&norm_weights)[kRounds][8], float eps, int n_embd,
                     bool there, int warp, uint32_t out, float* h, int8_t* q, float* scale, int16_t* sums) {
  DYNAMIC_SHARED(shared);
  float* warp_sums = reinterpret_cast<float*>(shared);
  Place<kRounds> place{n_embd};
  // Parts whose loads are under way together.
  static constexpr int kAhead = kRounds == 1 ? 8 : kRounds <= 3 ? 4 : 2;
  float values[kRounds][8];
  place.load(x + row * n_embd, values);
  parts += row * n_parts * n_embd;
  int lane = threadIdx.x % 32, n_weights = part_weights ? n_parts : 0;
  part_weights += row * n_parts;
#pragma unroll 1
  for (int left = n_parts; left > 0; left -= kAhead) {
    float part[kAhead][kRounds][8];
    float weight = lane < n_weights ? part_weights[lane] : 1.0f;  // of part `lane`
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      if (a >= left) break;
      place.load(parts + static_cast<uint32_t>(a * n_embd), part[a]);
    }
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      if (a >= left) break;
      float own = shuffle(weight, a);
#pragma unroll
      for (int j = 0; j < kRounds; j++)
        for (int i = 0; i < 8; i++) values[j][i] = fma_(own, part[a][j][i], values[j][i]);
    }
    parts += static_cast<uint32_t>(kAhead * n_embd);
    part_weights += kAhead;
    n_weights -= kAhead;
  }
  place.clear_beyond(values);
  if (kRounds > kEarlyRounds) place.load(norm_weight, norm_weights);
  sum_squares(values, warp_sums);
  sync_block();
  // Not before the barrier: loads must not wait for what decides it.
  if (!there) return;
  if (updated) place.store(updated + row * n_embd, values);
  scale_row(values, inverse_norm(warp_sums, n_embd, eps), norm_weights);
  if (h) place.store(h + out * n_embd, values);
  place.quantize(values, warp, out, q, scale, sums);
}

// Rows 0 .. step[0] - 1. x is written only if n_parts > 0.
template <int kRounds>
KERNEL(kThreads, 1)
add_norm(const int* step, float* x, const float* parts, const float* part_weights, int n_parts,
         const float* norm_weight, float eps, int n_embd, float* h, int8_t* q, float* scale, int16_t* sums) {
  launch_next();
  float norm_weights[kRounds][8];
  if (kRounds <= kEarlyRounds) Place<kRounds>{n_embd}.load(norm_weight, norm_weights);
  int warp = uniform(threadIdx.x / 32);
  wait_for_previous();
  uint32_t row = blockIdx.x, n_rows = uniform(step[0]);
  if (gridDim.x > kEagerRows && row >= n_rows) return;
  norm_row<kRounds>(row, x, n_parts ? x : nullptr, parts, part_weights, n_parts, norm_weight, norm_weights, eps, n_embd,
                    row < n_rows, warp, row, h, q, scale, sums);
}

// The same of rows out_rows[0 .. step[1] - 1] into rows 0 .. step[1] - 1 of h, q, scale and sums; x stays as it is.
template <int kRounds>
KERNEL(kThreads, 1)
output_norm(const int* step, const int* out_rows, const float* x, const float* parts, const float* part_weights,
            int n_parts, const float* norm_weight, float eps, int n_embd, float* h, int8_t* q, float* scale,
            int16_t* sums) {
  launch_next();
  float norm_weights[kRounds][8];
  if (kRounds <= kEarlyRounds) Place<kRounds>{n_embd}.load(norm_weight, norm_weights);
  int warp = uniform(threadIdx.x / 32);
  wait_for_previous();
  uint32_t out = blockIdx.x, row = out_rows[out], n_out = uniform(step[1]);
  if (out >= n_out) return;
  norm_row<kRounds>(row, x, nullptr, parts, part_weights, n_parts, norm_weight, norm_weights, eps, n_embd, true, warp,
                    out, h, q, scale, sums);
}

// Quantize the first n_rows[0] * rows_factor rows of x [rows, k], k a multiple of 32: a block of 256 threads per row,
// a warp per group of 256.
KERNEL(kThreads, 1)
quantize(const int* n_rows, int rows_factor, const float* x, int k, int8_t* q, float* scale, int16_t* sums) {
  launch_next();
  int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  wait_for_previous();
  uint32_t row = blockIdx.x;
  if (row >= static_cast<uint32_t>(uniform(n_rows[0]) * rows_factor)) return;
  uint32_t groups = static_cast<uint32_t>(k + kActivationGroup - 1) / kActivationGroup, first = row * groups;
#pragma unroll 1
  for (uint32_t group = warp; group < groups; group += kWarps) {
    uint32_t at = group * kActivationGroup + 8 * lane, to = first + group;
    float values[8] = {};
    if (at < k) load_floats(x + (row * k + at), values);
    quantize_group(values, lane, q + to * kActivationGroup, scale + to, sums + to * kActivationSums);
  }
}
