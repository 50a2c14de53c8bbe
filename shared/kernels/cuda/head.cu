// What sampling needs of the logits, so that whole rows stay on the device: logits [rows, n_vocab] float32.
//
//   ids, values [rows, 128]  the largest logits by descending value, then ascending id; a NaN ranks below everything.
//                            Exact, whatever the ties. Beyond the vocabulary: id -1, value -infinity
//   log_sums    [rows]       log(sum(exp(x))) in float64; NaN if +infinity or a NaN is in the row; -infinity adds
//                            nothing
//
// Two kernels. top_chunks cuts a row into chunks of 4096 and keeps each one's 128 largest as keys (order.cuh), in any
// order; top_merge selects among those and sorts. Both select by bisection: keys sit in registers, and a threshold that
// exactly 128 of them reach is searched between a bound that at least 128 reach and the largest. Since keys differ it
// exists, and a bisection ends wherever it first meets one: about 10 steps on smooth logits, never more than 64.
//
//   candidates uint64 [rows, n_chunks, 128]  0 where a chunk has fewer
//   peaks float32, sums float64 [rows, n_chunks]  a chunk's maximum, and its sum of exp(x - maximum)
#include "order.cuh"

static constexpr int kTop = 128;
static constexpr int kChunk = 4096;
static constexpr int kChunkThreads = 256;
static constexpr int kMergeThreads = 512;

// What the threads of a block exchange.
template <int kWarps>
struct Exchange {
  uint64_t low[kWarps], high[kWarps];
  double sums[kWarps];
  int counts[2][kWarps];
};

// A key that exactly min(kTop, n_valid) keys of the block reach; zeros are no keys, n_valid are others. `peak` becomes
// the largest key.
template <int kWarps, int n>
DEVICE uint64_t find_threshold(const uint64_t (&keys)[n], int n_valid, Exchange<kWarps>* shared, uint64_t& peak) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t high = 0;
#pragma unroll
  for (int i = 0; i < n; i++) high = max_(high, keys[i]);
  // kTop groups of threads: as many keys reach the least of their maxima.
  for (int mask = 1; mask < 32 * kWarps / kTop; mask *= 2) high = max_(high, shuffle_xor(high, mask));
  uint64_t low = high;
  for (int mask = 16; mask; mask /= 2) {
    low = min_(low, shuffle_xor(low, mask));
    high = max_(high, shuffle_xor(high, mask));
  }
  if (lane == 0) shared->low[warp] = low, shared->high[warp] = high;
  sync_block();
  for (int w = 0; w < kWarps; w++) {
    low = min_(low, shared->low[w]);
    high = max_(high, shared->high[w]);
  }
  peak = high;
  if (n_valid <= kTop) return 1;
  // Always kTop keys or more reach `low`, and fewer reach what is above `high`.
  for (int turn = 0; low < high; turn ^= 1) {
    uint64_t middle = high - (high - low) / 2;
    int count = 0;
#pragma unroll
    for (int i = 0; i < n; i++) count += keys[i] >= middle;
    for (int mask = 16; mask; mask /= 2) count += shuffle_xor(count, mask);
    if (lane == 0) shared->counts[turn][warp] = count;
    sync_block();
    count = shared->counts[turn][lane % kWarps];
    for (int mask = kWarps / 2; mask; mask /= 2) count += shuffle_xor(count, mask);
    if (count == kTop) return middle;
    if (count > kTop)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Write the keys that reach the threshold to `out`, in the order of threads.
template <int kWarps, int n>
DEVICE void compact(const uint64_t (&keys)[n], uint64_t threshold, Exchange<kWarps>* shared, uint64_t* out) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int count = 0;
#pragma unroll
  for (int i = 0; i < n; i++) count += keys[i] >= threshold;
  int scan = count;
  for (int distance = 1; distance < 32; distance *= 2) {
    int before = shuffle(scan, max_(0, lane - distance));
    if (lane >= distance) scan += before;
  }
  sync_block();
  if (lane == 31) shared->counts[0][warp] = scan;
  sync_block();
  int at = scan - count;
  for (int w = 0; w < warp; w++) at += shared->counts[0][w];
#pragma unroll
  for (int i = 0; i < n; i++) {
    if (keys[i] >= threshold) out[at++] = keys[i];
  }
}

// Grid (n_chunks, rows); rows beyond step[1] return. Dynamic shared memory: Exchange<8>, 256 bytes.
KERNEL(kChunkThreads, 1)
top_chunks(const int* step, const float* logits, int n_vocab, uint64_t* candidates, float* peaks, double* sums) {
  launch_next();
  wait_for_previous();
  static constexpr int kWarps = kChunkThreads / 32;
  static constexpr int kPerThread = kChunk / kChunkThreads;
  DYNAMIC_SHARED(memory);
  Exchange<kWarps>* shared = reinterpret_cast<Exchange<kWarps>*>(memory);
  int64_t row = blockIdx.y;
  if (row >= step[1]) return;
  int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int first = blockIdx.x * kChunk;
  int n_valid = min_(kChunk, n_vocab - first);
  const float* chunk = logits + row * n_vocab + first;
  int64_t at = row * gridDim.x + blockIdx.x;

  uint64_t keys[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; i++) {
    int element = i * kChunkThreads + thread;
    keys[i] = element < n_valid ? rank_key(order_of(chunk[element]), first + element) : 0;
  }
  uint64_t top;
  uint64_t threshold = find_threshold<kWarps>(keys, n_valid, shared, top);
  uint64_t* out = candidates + at * kTop;
  compact<kWarps>(keys, threshold, shared, out);
  for (int i = n_valid + thread; i < kTop; i += kChunkThreads) out[i] = 0;

  float peak = float_of_order(order_of_key(top));
  double sum = 0.0;
  if (peak != -kInfinity) {
#pragma unroll
    for (int i = 0; i < kPerThread; i++) {
      if (keys[i]) {
        float x = float_of_order(order_of_key(keys[i]));
        sum += exp(static_cast<double>(x) - static_cast<double>(peak));
      }
    }
  }
  for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane == 0) shared->sums[warp] = sum;
  sync_block();
  if (thread == 0) {
    for (int w = 1; w < kWarps; w++) sum += shared->sums[w];
    peaks[at] = peak;
    sums[at] = sum;
  }
}

// log(sum(exp(x))) of one row by one warp, in each lane.
DEVICE double merge_sums(const float* peaks, const double* sums, int n_chunks) {
  int lane = threadIdx.x % 32;
  float peak = -kInfinity;
  for (int c = lane; c < n_chunks; c += 32) peak = max_(peaks[c], peak);
  for (int mask = 16; mask; mask /= 2) peak = max_(peak, shuffle_xor(peak, mask));
  double sum = 0.0;
  for (int c = lane; c < n_chunks; c += 32) {
    // Nothing but -infinity adds nothing, though it is the peak.
    if (peaks[c] != -kInfinity)
      sum = fma_(sums[c], exp(static_cast<double>(peaks[c]) - static_cast<double>(peak)), sum);
  }
  for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  return static_cast<double>(peak) + log(sum);
}

// A block of 512 threads per row; rows beyond step[1] return. kPerThread = n_chunks * 128 / 512, rounded up. Dynamic
// shared memory: Exchange<16> and 128 keys, 1536 bytes.
template <int kPerThread>
KERNEL(kMergeThreads, 1)
top_merge(const int* step, int n_vocab, const uint64_t* candidates, const float* peaks, const double* sums, int* ids,
          float* values, double* log_sums) {
  launch_next();
  wait_for_previous();
  static constexpr int kWarps = kMergeThreads / 32;
  DYNAMIC_SHARED(memory);
  Exchange<kWarps>* shared = reinterpret_cast<Exchange<kWarps>*>(memory);
  uint64_t* best = reinterpret_cast<uint64_t*>(shared + 1);  // [kTop]
  int64_t row = blockIdx.x;
  if (row >= step[1]) return;
  int thread = threadIdx.x;
  int n_chunks = ceil_div(n_vocab, kChunk);
  // Of every chunk but the last, kTop.
  int n_valid = (n_chunks - 1) * kTop + min_(kTop, n_vocab - (n_chunks - 1) * kChunk);
  int n_best = min_(kTop, n_valid);
  candidates += row * n_chunks * kTop;

  uint64_t keys[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; i++) {
    int at = i * kMergeThreads + thread;
    keys[i] = at < n_chunks * kTop ? candidates[at] : 0;
  }
  uint64_t top;
  uint64_t threshold = find_threshold<kWarps>(keys, n_valid, shared, top);
  compact<kWarps>(keys, threshold, shared, best);
  sync_block();

  // A key's place is the number of larger ones, counted by four threads.
  int key = thread / 4;
  int place = 0;
  if (key < n_best) {
    for (int other = thread % 4; other < n_best; other += 4) place += best[other] > best[key];
  }
  place += shuffle_xor(place, 1);
  place += shuffle_xor(place, 2);
  if (thread % 4 == 0) {
    bool there = key < n_best;
    int64_t to = row * kTop + (there ? place : key);
    ids[to] = there ? id_of_key(best[key]) : -1;
    values[to] = there ? float_of_order(order_of_key(best[key])) : -kInfinity;
  }
  if (thread < 32) {
    double log_sum = merge_sums(peaks + row * n_chunks, sums + row * n_chunks, n_chunks);
    if (thread == 0) log_sums[row] = log_sum;
  }
}

// out[i] = logits[row, ids[i]] for i < n: a thread each, blocks of 256.
KERNEL(256, 1)
gather_logits(const float* logits, int n_vocab, int row, const int* ids, int n, float* out) {
  launch_next();
  wait_for_previous();
  int i = blockIdx.x * 256 + threadIdx.x;
  if (i < n) out[i] = logits[static_cast<int64_t>(row) * n_vocab + ids[i]];
}
