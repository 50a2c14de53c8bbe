// Expert selection, and the grouping of rows by expert that the products with experts work through.
//
// A pair is a row with one of its n_used experts: pair row * n_used + slot. The pairs of an expert, ascending, are cut
// into groups of at most rows_per_group, and a group is what a block of an expert product takes on at a time.
//   pairs   int32 [n_pairs]             all pairs by ascending expert, then ascending
//   groups  int32 [1 + 3 * max_groups]  the number of groups, then three arrays of max_groups each: the group's expert,
//                                       where in `pairs` it begins, and how many pairs it has (1 .. rows_per_group)
// A plain matrix is one expert that has every row (dense_groups), so that the same products serve it.
#include "order.cuh"

struct Groups {
  int *n, *expert, *first, *count;
  MEMBER Groups(int* table, int max_groups)
      : n(table), expert(table + 1), first(table + 1 + max_groups), count(table + 1 + 2 * max_groups) {}
  // Group `i` of an expert whose `n_pairs` pairs begin at `begin`, as its group number `at`.
  MEMBER void set(int at, int expert_, int begin, int n_pairs, int i, int rows_per_group) const {
    expert[at] = expert_;
    first[at] = begin + i * rows_per_group;
    count[at] = min_(rows_per_group, n_pairs - i * rows_per_group);
  }
};

// scores [rows, n_expert] = h [rows, n_embd] times weight [n_expert, n_embd] transposed, float32, n_embd a multiple
// of 4.
//
// Grid (ceil(n_expert / 4), ceil(rows / kMost)), a warp per expert, which multiplies a load of its weights with up to
// kMost rows: 4, so that few rows spread over many multiprocessors, or 8, so that many rows load weights less often.
// One order of summation whatever the number of rows and kMost: lane l takes elements 128 i + 4 l .. + 3 for ascending
// i, then the lanes are added as a tree.
static constexpr int kScoreExperts = 4;

template <int kRows>
DEVICE void score_rows(const float* h, const float* weight, int n_rows, int n_expert, int n_embd, float* scores) {
  int lane = threadIdx.x % 32;
  float sums[kRows] = {};
#pragma unroll(kRows <= 2 ? 8 : 4)
  for (int at = 4 * lane; at < n_embd; at += 128) {
    Word4 w = load_word4(weight + at);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      // Rows that are not there repeat the last one, unwritten.
      Word4 x = load_word4(h + static_cast<int64_t>(min_(r, n_rows - 1)) * n_embd + at);
      sums[r] = fma_(bits_to_float(w.x), bits_to_float(x.x), sums[r]);
      sums[r] = fma_(bits_to_float(w.y), bits_to_float(x.y), sums[r]);
      sums[r] = fma_(bits_to_float(w.z), bits_to_float(x.z), sums[r]);
      sums[r] = fma_(bits_to_float(w.w), bits_to_float(x.w), sums[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    for (int mask = 16; mask; mask /= 2) sums[r] = add_(sums[r], shuffle_xor(sums[r], mask));
    if (lane == r && r < n_rows) scores[static_cast<int64_t>(r) * n_expert] = sums[r];
  }
}

template <int kMost>
KERNEL(32 * kScoreExperts, 1)
expert_scores(const int* step, const float* h, const float* weight, int n_expert, int n_embd, float* scores) {
  launch_next();
  wait_for_previous();
  int expert = blockIdx.x * kScoreExperts + threadIdx.x / 32;
  int64_t row = static_cast<int64_t>(blockIdx.y) * kMost;
  int n_rows = static_cast<int>(min_<int64_t>(kMost, step[0] - row));
  if (n_rows <= 0 || expert >= n_expert) return;
  h += row * n_embd;
  weight += static_cast<int64_t>(expert) * n_embd;
  scores += row * n_expert + expert;
  if (n_rows == 1)
    score_rows<1>(h, weight, n_rows, n_expert, n_embd, scores);
  else if (n_rows == 2)
    score_rows<2>(h, weight, n_rows, n_expert, n_embd, scores);
  else if (n_rows <= 4)
    score_rows<4>(h, weight, n_rows, n_expert, n_embd, scores);
  else
    score_rows<kMost>(h, weight, n_rows, n_expert, n_embd, scores);
}

// One row by one warp: softmax over all experts, then the n_used best scores, of equal ones the lower id first (a NaN
// ranks below everything). Lane s < n_used gets slot s's id; weights divided by their sum if `normalize`, then times
// expert_scale. kPerLane = ceil(n_expert / 32); expert 32 i + lane is the lane's i-th.
template <int kPerLane>
DEVICE int select_row(const float* scores, int n_expert, int n_used, bool normalize, float expert_scale, int* ids,
                      float* weights) {
  int lane = threadIdx.x % 32;
  float own[kPerLane];
  uint32_t orders[kPerLane];  // 0: not there, or chosen
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    int expert = 32 * i + lane;
    own[i] = expert < n_expert ? scores[expert] : -kInfinity;
    orders[i] = expert < n_expert ? order_of(own[i]) : 0;
  }
  uint64_t mine = 0;  // the key of slot `lane`
  float peak = 0.0f;
  for (int slot = 0; slot < n_used; slot++) {
    uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      if (orders[i]) best = max_(best, rank_key(orders[i], 32 * i + lane));
    }
    for (int mask = 16; mask; mask /= 2) best = max_(best, shuffle_xor(best, mask));
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      if (32 * i + lane == id_of_key(best)) orders[i] = 0;
    }
    if (slot == 0) peak = float_of_order(order_of_key(best));
    if (slot == lane) mine = best;
  }

  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    if (32 * i + lane < n_expert) total = add_(total, exp_(add_(own[i], -peak)));
  }
  for (int mask = 16; mask; mask /= 2) total = add_(total, shuffle_xor(total, mask));
  float weight = 0.0f;
  if (lane < n_used) weight = div_(exp_(add_(float_of_order(order_of_key(mine)), -peak)), total);
  if (normalize) {
    float sum = 0.0f;
    for (int slot = 0; slot < n_used; slot++) sum = add_(sum, shuffle(weight, slot));
    weight = div_(weight, sum);
  }
  if (lane < n_used) {
    ids[lane] = id_of_key(mine);
    weights[lane] = mul_(weight, expert_scale);
  }
  return id_of_key(mine);
}

// Grouping, by one block of 1024 threads: pairs and groups of all rows, n_expert up to 512, n_used up to 16, rows up to
// 1024. choose(row), called by a whole warp, gives lane s < n_used the expert of slot s, and leaves it in `ids`.
//
// A counting sort without atomics: warps take equal runs of consecutive rows, and as a row's experts all differ, a warp
// that takes its rows one by one counts in counters of its own without conflicts, and its pairs stay in order. Then
// thread e sums expert e's counters over the warps, and a scan over the experts says where each one's pairs and groups
// begin.
//
// Dynamic shared memory: 32 * n_expert counters of 2 bytes, then 4 * (n_expert + 32) bytes.
template <class Choose>
DEVICE void group_rows(int n_rows, int n_expert, int n_used, const int* ids, int rows_per_group, int max_groups,
                       int* pairs, int* groups, Choose choose) {
  DYNAMIC_SHARED(shared);
  uint16_t* counters = reinterpret_cast<uint16_t*>(shared);        // [warp, n_expert]
  int* begins = reinterpret_cast<int*>(counters + 32 * n_expert);  // [n_expert]
  int* warp_totals = begins + n_expert;                            // [32]
  int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int rows_per_warp = max_(1, ceil_div(n_rows, 32));
  int n_warps = ceil_div(n_rows, rows_per_warp);
  int first_row = warp * rows_per_warp, end_row = min_(first_row + rows_per_warp, n_rows);
  uint16_t* own = counters + warp * n_expert;

  if (warp < n_warps) {
    for (int expert = lane; expert < n_expert; expert += 32) own[expert] = 0;
    sync_warp();
  }
  for (int row = first_row; row < end_row; row++) {
    int expert = choose(row);
    if (lane < n_used) own[expert]++;
    sync_warp();
  }
  sync_block();

  // Counters become the number of the expert's pairs in earlier warps. Both sums of the scan in one word: groups in
  // the upper half, pairs in the lower one, each at most 16384.
  int n_pairs = 0, n_groups = 0;
  if (thread < n_expert) {
    for (int w = 0; w < n_warps; w++) {
      int count = counters[w * n_expert + thread];
      counters[w * n_expert + thread] = static_cast<uint16_t>(n_pairs);
      n_pairs += count;
    }
    n_groups = ceil_div(n_pairs, rows_per_group);
  }
  int scan = n_groups << 16 | n_pairs;
  for (int distance = 1; distance < 32; distance *= 2) {
    int before = shuffle(scan, max_(0, lane - distance));
    if (lane >= distance) scan += before;
  }
  if (lane == 31) warp_totals[warp] = scan;
  sync_block();
  if (thread < n_expert) {
    for (int w = 0; w < warp; w++) scan += warp_totals[w];
    int begin = (scan & 0xffff) - n_pairs;
    int end_group = scan >> 16;
    begins[thread] = begin;
    Groups out(groups, max_groups);
    for (int i = 0; i < n_groups; i++)
      out.set(end_group - n_groups + i, thread, begin, n_pairs, i, rows_per_group);
    if (thread == n_expert - 1) *out.n = end_group;
  }
  sync_block();

  for (int row = first_row; row < end_row; row++) {
    if (lane < n_used) {
      int pair = row * n_used + lane;
      int expert = ids[pair];
      pairs[begins[expert] + own[expert]++] = pair;
    }
    sync_warp();
  }
}

// For a few rows, all at once: ids, weights [rows, n_used] from scores [rows, n_expert] as select_row says, pairs and
// groups as group_rows says.
template <int kPerLane>
KERNEL(1024, 1)
select_and_group(const int* step, const float* scores, int n_expert, int n_used, int normalize, float expert_scale,
                 int* ids, float* weights, int rows_per_group, int max_groups, int* pairs, int* groups) {
  launch_next();
  wait_for_previous();
  group_rows(step[0], n_expert, n_used, ids, rows_per_group, max_groups, pairs, groups, [=](int row) {
    return select_row<kPerLane>(scores + static_cast<int64_t>(row) * n_expert, n_expert, n_used, normalize,
                                expert_scale, ids + row * n_used, weights + row * n_used);
  });
}

// For more rows, the same in two kernels, since one multiprocessor alone is slow at selecting. First ids and weights:
// blocks of 256 threads, a warp per row.
template <int kPerLane>
KERNEL(256, 1)
select_experts(const int* step, const float* scores, int n_expert, int n_used, int normalize, float expert_scale,
               int* ids, float* weights) {
  launch_next();
  wait_for_previous();
  int64_t row = blockIdx.x * 8 + threadIdx.x / 32;
  if (row >= step[0]) return;
  select_row<kPerLane>(scores + row * n_expert, n_expert, n_used, normalize, expert_scale, ids + row * n_used,
                       weights + row * n_used);
}
// Then pairs and groups.
KERNEL(1024, 1)
group_experts(const int* step, int n_expert, int n_used, const int* ids, int rows_per_group, int max_groups, int* pairs,
              int* groups) {
  launch_next();
  wait_for_previous();
  int lane = threadIdx.x % 32;
  group_rows(step[0], n_expert, n_used, ids, rows_per_group, max_groups, pairs, groups,
             [=](int row) { return lane < n_used ? ids[row * n_used + lane] : 0; });
}

// The groups of a plain matrix: step[which] rows, all of expert 0. One block of 1024 threads.
KERNEL(1024, 1)
dense_groups(const int* step, int which, int rows_per_group, int max_groups, int* pairs, int* groups) {
  launch_next();
  wait_for_previous();
  int n_rows = step[which];
  int n_groups = ceil_div(n_rows, rows_per_group);
  Groups out(groups, max_groups);
  for (int i = threadIdx.x; i < n_rows; i += 1024) pairs[i] = i;
  for (int i = threadIdx.x; i < n_groups; i += 1024) out.set(i, 0, 0, n_rows, i, rows_per_group);
  if (threadIdx.x == 0) *out.n = n_groups;
}
