// Expert selection, and the grouping of rows by expert that the products with experts work through.
//
// A pair is a row with one of its n_used experts: pair row * n_used + slot. The pairs of an expert, ascending, are cut
// into groups of at most rows_per_group, and a group is what a block of an expert product takes on at a time. Groups
// are in the order of their experts, then of their pairs.
//   pairs   int32 [max_groups, rows_per_group]  each group's pairs; beyond its count anything
//   groups  uint64 [max_groups]                 a word each, from bit 0: number of the pass 32, number of pairs 7, expert
//                                               9, the pair if there is only one 14; all but the first 0 where no group is
// Groups are published (machine.cuh), so that products load their weights while they wait for activations. The number
// of the pass tells a group from an earlier pass's, and each layer has groups of its own.
//
// n_expert up to 512, n_used up to 16, rows up to 1024, rows_per_group = 1 << group_shift from 2 to 64.
#include "norm.cu"
#include "order.cuh"

struct Groups {
  int* pairs;
  uint64_t* words;
  int max_groups, shift;
  uint32_t pass;
  // step[3]: the number of the pass.
  MEMBER Groups(const int* step, int* pairs, uint64_t* words, int max_groups, int shift)
      : pairs(pairs), words(words), max_groups(max_groups), shift(shift), pass(static_cast<uint32_t>(step[3])) {}
  // How many groups an expert of `n_pairs` pairs makes.
  MEMBER int groups_of(int n_pairs) const { return (n_pairs + (1 << shift) - 1) >> shift; }
  // `pair` as number `at` of an expert whose groups begin at `first`.
  MEMBER void put(int first, int at, int pair) const { pairs[(first << shift) + at] = pair; }
  MEMBER uint64_t word(int n_pairs, int expert, int pair) const {
    return static_cast<uint64_t>(n_pairs | expert << 7 | pair << 16) << 32 | pass;
  }
  // Whether an expert's pair number `at` is alone in its group.
  MEMBER bool alone(int at, int n_pairs) const { return (at & ((1 << shift) - 1)) == 0 && at == n_pairs - 1; }
  // Publishes an expert's groups, from number `first` on, whose pairs a barrier separates from this. lone: its pair that
  // is alone in its group, if there is one.
  MEMBER void publish_groups(int first, int expert, int n_pairs, int lone) const {
#pragma unroll 1
    for (; n_pairs > 0; n_pairs -= 1 << shift, ++first)
      publish(words + first, word(min_(1 << shift, n_pairs), expert, n_pairs == 1 ? lone : 0));
  }
  // Publishes that there are no groups from number n on; by all threads of a block.
  MEMBER void publish_end(int n) const {
#pragma unroll 1
    for (int i = n + threadIdx.x; i < max_groups; i += blockDim.x) publish(words + i, word(0, 0, 0));
  }
};

// The inclusive prefix sum over a warp's lanes.
DEVICE int scan_warp(int x) {
  int lane = threadIdx.x % 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    int before = shuffle(x, max_(0, lane - distance));
    if (lane >= distance) x += before;
  }
  return x;
}

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
//
// Ranks come from comparing, not from n_used rounds of a maximum, each of which would wait for the last one. Of the
// lanes' best keys, the n_used-th is a threshold: what is below it is not chosen, and of what is not, few keys remain
// to be compared with each other. Both comparisons are one piece of code, run twice.
//
// `keys`: shared memory of the warp's own, 16-byte aligned, SelectKeys<kPerLane>::kCount of them. The first kMostUsed
// are the slots' keys afterwards, 0 from n_used on.
static constexpr int kMostUsed = 16;
static constexpr int kKeysAtOnce = 8;
template <int kPerLane>
struct SelectKeys {
  static constexpr int kCount = kMostUsed + (kPerLane > 2 ? kMostUsed * kPerLane : 32) + kKeysAtOnce;
};

template <int kPerLane>
DEVICE int select_row(const float* scores, int n_expert, int n_used, bool normalize, float expert_scale,
                      uint64_t* keys, int* ids, float* weights) {
  uint64_t* slots = keys;             // [kMostUsed]
  uint64_t* list = keys + kMostUsed;  // the lanes' best, then what is left
  int lane = threadIdx.x % 32;
  float own[kPerLane];
  uint64_t own_keys[kPerLane];  // 0: not there
  uint64_t top = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    int expert = 32 * i + lane;
    own[i] = expert < n_expert ? scores[expert] : -kInfinity;
    uint32_t order = order_of(own[i]);
    own_keys[i] = rank_key(expert < n_expert ? order : 0, expert < n_expert ? expert : -1);
    top = max_(top, own_keys[i]);
  }
  sync_warp();  // of who still reads a row before
  if (lane < kMostUsed) slots[lane] = 0;
  list[lane] = top;
  int n = 32;
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {
    sync_warp();
#pragma unroll 1
    for (int at = lane; at - lane < n; at += 32) {
      uint64_t key = at < n ? list[at] : 0;
      int rank = key == 0 ? kMostUsed : 0;
#pragma unroll 1
      for (int first = 0; first < n; first += kKeysAtOnce) {
#pragma unroll
        for (int i = 0; i < kKeysAtOnce; i += 2) {
          Word4 two = load_word4(list + first + i);
          rank += (static_cast<uint64_t>(two.y) << 32 | two.x) > key;
          rank += (static_cast<uint64_t>(two.w) << 32 | two.z) > key;
        }
      }
      if (rank < n_used) slots[rank] = key;
    }
    sync_warp();
    if (pass == 0) {
      uint64_t threshold = slots[n_used - 1];
      n = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; i++) {
        bool left = own_keys[i] >= threshold;
        uint32_t lanes = vote(left);
        if (left) list[n + count_bits(lanes & ((1u << lane) - 1))] = own_keys[i];
        n += count_bits(lanes);
      }
      n = uniform(n);
      if (lane < kKeysAtOnce) list[n + lane] = 0;
    }
  }
  float peak = float_of_order(order_of_key(slots[0]));
  uint64_t mine = lane < n_used ? slots[lane] : 0;  // the key of slot `lane`

  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; i++) total = add_(total, exp_(add_(own[i], -peak)));
#pragma unroll
  for (int mask = 16; mask; mask /= 2) total = add_(total, shuffle_xor(total, mask));
  float weight = lane < n_used ? quotient(exp_(add_(float_of_order(order_of_key(mine)), -peak)), total) : 0.0f;
  if (normalize) {
    float* all = reinterpret_cast<float*>(list);  // [kMostUsed], zeros from n_used on
    if (lane < kMostUsed) all[lane] = weight;
    sync_warp();
    float sum = 0.0f;
#pragma unroll
    for (int slot = 0; slot < kMostUsed; slot += 8) {
      float some[8];
      load_floats(all + slot, some);
      for (int i = 0; i < 8; i++) sum = add_(sum, some[i]);
    }
    weight = quotient(weight, sum);
  }
  if (lane < n_used) {
    ids[lane] = id_of_key(mine);
    weights[lane] = mul_(weight, expert_scale);
  }
  return id_of_key(mine);
}

// Selection and grouping of up to 32 rows at once by one block of kThreads.
//
// Which rows chose an expert is a word, whose bits say how many pairs it has and where each of them belongs.
template <int kPerLane>
struct FewRows {
  static constexpr int kKeys = SelectKeys<kPerLane>::kCount;

  uint64_t* keys;  // [kWarps, kKeys]
  uint32_t* rows;  // [n_expert]: bit r: row r chose it
  int* firsts;     // [n_expert]: its first group
  int* chosen;     // [32, n_used]
  int* n_groups;   // [4], of which the first is used
  float* scores;   // [rows, n_expert], filled by who uses this
  // In shared memory of 8 * kWarps * kKeys + 8 * n_expert + 128 * n_used + 16 + 4 * n_rows * n_expert bytes.
  MEMBER FewRows(uint8_t* shared, int n_expert, int n_used)
      : keys(reinterpret_cast<uint64_t*>(shared)),
        rows(reinterpret_cast<uint32_t*>(keys + kWarps * kKeys)),
        firsts(reinterpret_cast<int*>(rows + n_expert)),
        chosen(firsts + n_expert),
        n_groups(chosen + 32 * n_used),
        scores(reinterpret_cast<float*>(n_groups + 4)) {}

  // ids, weights [rows, n_used] from `scores` as select_row says, and the groups. warp and n_rows are uniform.
  MEMBER void select(int warp, int n_rows, int n_expert, int n_used, bool normalize, float expert_scale, int* ids,
                     float* weights, const Groups& groups) const {
    int thread = threadIdx.x, lane = threadIdx.x % 32;
    uint64_t* own_keys = keys + warp * kKeys;
#pragma unroll 1
    for (int expert = thread; expert < n_expert; expert += kThreads) rows[expert] = 0;
    sync_block();
    int id = 0;
#pragma unroll 1
    for (int row = warp; row < n_rows; row += kWarps) {
      uint32_t at = row * n_used;
      id = select_row<kPerLane>(scores + row * n_expert, n_expert, n_used, normalize, expert_scale, own_keys, ids + at,
                                weights + at);
      if (lane < n_used) {
        atomicAdd(rows + id, 1u << row);
        chosen[at + lane] = id;
      }
    }
    if (n_rows == 1) {
      // A group each, of the lower id first, whose key is the larger in its lower half.
      if (warp != 0) return;
      int rank = 0;
#pragma unroll 2
      for (int slot = 0; slot < kMostUsed; slot += 4) {
        Word4 two = load_word4(own_keys + slot), others = load_word4(own_keys + slot + 2);
        rank += two.x > ~static_cast<uint32_t>(id);
        rank += two.z > ~static_cast<uint32_t>(id);
        rank += others.x > ~static_cast<uint32_t>(id);
        rank += others.z > ~static_cast<uint32_t>(id);
      }
      // The word says it all, so it need not wait for what was written before.
      if (lane < n_used) *static_cast<volatile uint64_t*>(groups.words + rank) = groups.word(1, id, lane);
#pragma unroll 1
      for (int i = n_used + lane; i < groups.max_groups; i += 32)
        *static_cast<volatile uint64_t*>(groups.words + i) = groups.word(0, 0, 0);
      return;
    }
    sync_block();
    if (warp == 0) {
      // kPerLane consecutive experts per lane.
      int n_own = 0;
#pragma unroll 4
      for (int i = 0; i < kPerLane; i++) {
        int expert = lane * kPerLane + i;
        n_own += expert < n_expert ? groups.groups_of(count_bits(rows[expert])) : 0;
      }
      int end = scan_warp(n_own), first = end - n_own;
#pragma unroll 1
      for (int i = 0; i < kPerLane; i++) {
        int expert = lane * kPerLane + i;
        if (expert >= n_expert) break;
        firsts[expert] = first;
        first += groups.groups_of(count_bits(rows[expert]));
      }
      if (lane == 31) *n_groups = end;
    }
    sync_block();
    int* lone = reinterpret_cast<int*>(keys);  // [n_expert]; nobody needs the keys any more
#pragma unroll 1
    for (int row = warp; row < n_rows && lane < n_used; row += kWarps) {
      int pair = row * n_used + lane;
      int expert = chosen[pair];
      int at = count_bits(rows[expert] & ((1u << row) - 1));
      groups.put(firsts[expert], at, pair);
      if (groups.alone(at, count_bits(rows[expert]))) lone[expert] = pair;
    }
    sync_block();
#pragma unroll 1
    for (int expert = thread; expert < n_expert; expert += kThreads)
      groups.publish_groups(firsts[expert], expert, count_bits(rows[expert]), lone[expert]);
    groups.publish_end(*n_groups);
  }
};

// A step of a few rows between attention and the experts in one kernel: the norm of add_norm with one part and no
// weights, scores as of expert_scores, and selection and groups as of the kernels below, with the same bits.
//
// Grid (ceil(n_expert / kExperts) + 1, ceil(max_rows / kRows)), kThreads threads. Each block computes the norm of its
// kRows rows. The last of blockIdx.x writes them: x_out = x + part, not into x, which others still read, and h (null
// where not wanted), q, scale, sums. The others hold h in shared memory and compute a warp each the scores of kExperts
// experts. The last block of all, which has only written, waits for all scores, selects and groups.
//
// Scores are handed over in `handed` [rows, n_expert], all kNotYet between launches: a score that is there shows, so
// that neither fences nor a counter are needed, and who takes it puts kNotYet back. One block waits, and none waits for
// it, so that all that it waits for come to run.
//
// The first n_early (n_embd, or a multiple of 128) weights of each expert are copied into shared memory before the
// kernel waits for earlier ones.
//
// Dynamic shared memory: 4 * kRows * (n_embd + kWarps) + 4 * kExperts * n_early bytes, or what FewRows needs if that is
// more.
static constexpr uint32_t kNotYet = 0xffffffffu;  // a NaN that no score is
// The narrow rows of which all weights are copied early, so that there is no code for more: n_early == n_embd.
constexpr bool all_early(int rounds, int experts) { return rounds == 1 || (rounds == 2 && experts == 4); }

template <int kRounds, int kPerLane, int kExperts, int kRows>
KERNEL(kThreads, kRounds == 1 ? 2 : 1)
norm_scores_select(const int* step, int max_rows, const float* x, float* x_out, const float* part,
                   const float* norm_weight, float eps, int n_embd, float* h, int8_t* q, float* scale, int16_t* sums,
                   const float* weight, int n_early, int n_expert, int n_used, int normalize, float expert_scale,
                   uint32_t* handed, int* ids, float* weights, int group_shift, int max_groups, int* pairs,
                   uint64_t* words) {
  launch_next();
  static constexpr bool kAllEarly = all_early(kRounds, kExperts);
  if (kAllEarly) n_early = n_embd;
  DYNAMIC_SHARED(shared);
  float* own_h = reinterpret_cast<float*>(shared);  // [kRows, n_embd]
  float* warp_sums = own_h + kRows * n_embd;        // [kRows, kWarps]
  float* early = warp_sums + kRows * kWarps;        // [kExperts, n_early]
  int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32);
  bool writes = blockIdx.x == gridDim.x - 1;
  int expert = blockIdx.x * kExperts + warp;
  bool multiplies = !writes && warp < kExperts && expert < n_expert;
  weight += static_cast<uint32_t>(expert * n_embd);
  float* own_weight = early + warp * n_early;
  // n_early weights of the lane's expert from element `first` on.
  auto copy_weights = [&](int first) {
    float* to = own_weight + 4 * lane;
    const float* from = weight + (first + 4 * lane);
#pragma unroll 1
    for (int left = min_(n_early, n_embd - first) - 4 * lane; left > 0; left -= 4 * 128) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (left > 128 * i) copy_async(to + 128 * i, from + 128 * i);
      }
      to += 4 * 128;
      from += 4 * 128;
    }
    copy_commit();
  };

  if (multiplies) copy_weights(0);
  Place<kRounds> place{n_embd};
  float norm_weights[kRounds][8];
  if (kRounds <= kEarlyRounds) place.load(norm_weight, norm_weights);
  wait_for_previous();

  int n_all = step[0];
  int first_row = blockIdx.y * kRows;
  // Rows whose loads are under way together; with kRows of them, their values stay in registers.
  static constexpr int kAhead = kRounds * kRows <= 4 ? kRows : kRounds <= 2 ? 2 : 1;
  float values[kAhead][kRounds][8];
#pragma unroll 1
  for (int first = 0; first < kRows; first += kAhead) {
    float added[kAhead][kRounds][8];
#pragma unroll
    for (int r = 0; r < kAhead; r++) {
      // Rows that the step does not have are computed, but not used.
      uint32_t at = min_(first_row + first + r, max_rows - 1) * n_embd;
      place.load(x + at, values[r]);
      place.load(part + at, added[r]);
    }
#pragma unroll
    for (int r = 0; r < kAhead; r++) {
#pragma unroll
      for (int j = 0; j < kRounds; j++)
        for (int i = 0; i < 8; i++) values[r][j][i] = fma_(1.0f, added[r][j][i], values[r][j][i]);
      place.clear_beyond(values[r]);
      if (kAhead < kRows) place.store(own_h + (first + r) * n_embd, values[r]);
      sum_squares(values[r], warp_sums + (first + r) * kWarps);
    }
  }
  if (kRounds > kEarlyRounds) place.load(norm_weight, norm_weights);
  n_all = uniform(n_all);
  sync_block();

  int n_rows = min_(kRows, n_all - first_row);
#pragma unroll(kAhead < kRows ? 1 : kRows)
  for (int r = 0; r < kRows; r++) {
    float(&own)[kRounds][8] = values[kAhead < kRows ? 0 : r];
    float* shared_row = own_h + r * n_embd;
    if (kAhead < kRows) {
      place.load(shared_row, own);
      place.clear_beyond(own);
    }
    uint32_t row = first_row + r;
    if (writes && r >= n_rows) break;
    if (writes) place.store(x_out + row * n_embd, own);
    scale_row(own, inverse_norm(warp_sums + r * kWarps, n_embd, eps), norm_weights);
    // The barrier below separates it from what other threads read of it.
    if (!writes) {
      place.store(shared_row, own);
    } else {
      if (h) place.store(h + row * n_embd, own);
      place.quantize(own, warp, row, q, scale, sums);
    }
  }
  sync_block();

  if (multiplies && n_rows > 0) {
    // In the order of score_rows.
    float totals[kRows] = {};
    auto multiply = [&](const float* w_at, const float* h_at) {
      Word4 w = load_word4(w_at);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        Word4 v = load_word4(h_at + r * n_embd);
        totals[r] = fma_(bits_to_float(w.x), bits_to_float(v.x), totals[r]);
        totals[r] = fma_(bits_to_float(w.y), bits_to_float(v.y), totals[r]);
        totals[r] = fma_(bits_to_float(w.z), bits_to_float(v.z), totals[r]);
        totals[r] = fma_(bits_to_float(w.w), bits_to_float(v.w), totals[r]);
      }
    };
    const float* h_at = own_h + 4 * lane;
#pragma unroll 1
    for (int first = 0;;) {
      copy_wait<0>();  // of what the lane itself copied
      const float* w_at = own_weight + 4 * lane;
      int left = min_(n_early, n_embd - first) - 4 * lane;
#pragma unroll 1
      for (; left > 3 * 128; left -= 4 * 128, w_at += 4 * 128, h_at += 4 * 128) {
#pragma unroll
        for (int i = 0; i < 4; i++) multiply(w_at + 128 * i, h_at + 128 * i);
      }
#pragma unroll 1
      for (; left > 0; left -= 128, w_at += 128, h_at += 128) multiply(w_at, h_at);
      first += n_early;
      if (kAllEarly || first >= n_embd) break;
      copy_weights(first);
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
#pragma unroll
      for (int mask = 16; mask; mask /= 2) totals[r] = add_(totals[r], shuffle_xor(totals[r], mask));
      uint32_t bits = float_to_bits(totals[r]);
      if (bits == kNotYet) bits = 0x7fffffffu;  // another NaN
      if (lane == r && r < n_rows)
        *static_cast<volatile uint32_t*>(handed + static_cast<uint32_t>((first_row + r) * n_expert + expert)) = bits;
    }
  }
  if (!writes || blockIdx.y + 1 < gridDim.y) return;
  // Shared memory is used anew; the barrier above separates it from what it was used for.

  FewRows<kPerLane> few(shared, n_expert, n_used);
  // Scores of a thread that are under way together: all of 128 experts.
  static constexpr int kTake = kRows > 1 ? 8 : kExperts / 2;
  int n = n_all * n_expert;
#pragma unroll 1
  for (int base = 32 * warp; base < n; base += kTake * kThreads) {
    int left = n - base - lane;  // from the lane's first one on
    uint32_t* from = handed + static_cast<uint32_t>(base + lane);
    uint32_t taken[kTake];
    bool all;
#pragma unroll 1
    do {
      all = true;
#pragma unroll
      for (int i = 0; i < kTake; i++)
        taken[i] = i * kThreads < left ? *static_cast<volatile uint32_t*>(from + i * kThreads) : 0;
#pragma unroll
      for (int i = 0; i < kTake; i++) all = all && taken[i] != kNotYet;
    } while (vote(!all));
#pragma unroll
    for (int i = 0; i < kTake; i++) {
      if (i * kThreads < left) {
        few.scores[base + lane + i * kThreads] = bits_to_float(taken[i]);
        from[i * kThreads] = kNotYet;
      }
    }
  }
  few.select(warp, n_all, n_expert, n_used, normalize, expert_scale, ids, weights,
             Groups(step, pairs, words, max_groups, group_shift));
}

// For a few rows, up to 32, selection and groups at once: ids, weights [rows, n_used] from scores [rows, n_expert].
template <int kPerLane>
KERNEL(kThreads, 1)
select_and_group(const int* step, const float* scores, int n_expert, int n_used, int normalize, float expert_scale,
                 int* ids, float* weights, int group_shift, int max_groups, int* pairs, uint64_t* words) {
  launch_next();
  wait_for_previous();
  DYNAMIC_SHARED(shared);
  FewRows<kPerLane> few(shared, n_expert, n_used);
  int n_rows = uniform(step[0]);
#pragma unroll 4
  for (int i = threadIdx.x; i < n_rows * n_expert; i += kThreads) few.scores[i] = scores[i];
  few.select(uniform(threadIdx.x / 32), n_rows, n_expert, n_used, normalize, expert_scale, ids, weights,
             Groups(step, pairs, words, max_groups, group_shift));
}

// For more rows, the same in two kernels, since one multiprocessor alone is slow at selecting. First ids and weights, a
// warp per row. Dynamic shared memory: 8 * kWarps * kKeys bytes.
template <int kPerLane>
KERNEL(kThreads, 1)
select_experts(const int* step, const float* scores, int n_expert, int n_used, int normalize, float expert_scale,
               int* ids, float* weights) {
  launch_next();
  wait_for_previous();
  DYNAMIC_SHARED(shared);
  static constexpr int kKeys = SelectKeys<kPerLane>::kCount;
  int warp = uniform(threadIdx.x / 32);
  int row = blockIdx.x * kWarps + warp;
  if (row >= step[0]) return;
  select_row<kPerLane>(scores + row * n_expert, n_expert, n_used, normalize, expert_scale,
                       reinterpret_cast<uint64_t*>(shared) + warp * kKeys, ids + row * n_used,
                       weights + row * n_used);
}

// Then the groups, of up to 1024 rows, by one block of 1024 threads.
//
// A counting sort without atomics: warps take equal runs of consecutive rows, and as a row's experts all differ, a warp
// that takes its rows one by one counts in counters of its own without conflicts, and its pairs stay in order. Then
// thread e sums expert e's counters over the warps, and a scan over the experts says where each one's groups begin.
//
// Dynamic shared memory: 32 * n_expert counters of 2 bytes, then 4 * (n_expert + 33) bytes.
KERNEL(1024, 1)
group_experts(const int* step, int n_expert, int n_used, const int* ids, int group_shift, int max_groups, int* pairs,
              uint64_t* words) {
  launch_next();
  wait_for_previous();
  DYNAMIC_SHARED(shared);
  uint16_t* counters = reinterpret_cast<uint16_t*>(shared);        // [warp, n_expert]
  int* firsts = reinterpret_cast<int*>(counters + 32 * n_expert);  // [n_expert]
  int* warp_totals = firsts + n_expert;                            // [32]
  int* n_groups = warp_totals + 32;
  Groups groups(step, pairs, words, max_groups, group_shift);
  int n_rows = step[0];
  int thread = threadIdx.x, lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32);
  int rows_per_warp = max_(1, (n_rows + 31) >> 5);
  int first_row = warp * rows_per_warp, end_row = min_(first_row + rows_per_warp, n_rows);
  uint16_t* own = counters + warp * n_expert;

#pragma unroll 1
  for (int expert = lane; expert < n_expert; expert += 32) own[expert] = 0;
  sync_warp();
#pragma unroll 4
  for (int row = first_row; row < end_row; row++) {
    if (lane < n_used) own[ids[row * n_used + lane]]++;
    sync_warp();
  }
  sync_block();

  // Counters become the number of the expert's pairs in earlier warps.
  int n_pairs = 0;
  if (thread < n_expert) {
#pragma unroll 4
    for (int w = 0; w < 32; w++) {
      int count = counters[w * n_expert + thread];
      counters[w * n_expert + thread] = static_cast<uint16_t>(n_pairs);
      n_pairs += count;
    }
  }
  int n_own = groups.groups_of(n_pairs), end = scan_warp(n_own);
  if (lane == 31) warp_totals[warp] = end;
  sync_block();
  if (thread < n_expert) {
#pragma unroll 1
    for (int w = 0; w < warp; w++) end += warp_totals[w];
    firsts[thread] = end - n_own;
    if (thread == n_expert - 1) *n_groups = end;
  }
  sync_block();

#pragma unroll 1
  for (int row = first_row; row < end_row; row++) {
    if (lane < n_used) {
      int pair = row * n_used + lane;
      int expert = ids[pair];
      groups.put(firsts[expert], own[expert]++, pair);
    }
    sync_warp();
  }
  sync_block();
  if (thread < n_expert) {
    int first = firsts[thread], last = first + groups.groups_of(n_pairs) - 1;
    groups.publish_groups(first, thread, n_pairs, n_pairs > 0 ? pairs[last << group_shift] : 0);
  }
  groups.publish_end(*n_groups);
}
