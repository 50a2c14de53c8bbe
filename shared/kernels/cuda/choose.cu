// A draft's next token of each wanted row, chosen as the target would choose (shared/sampling): greedy, or coupled
// sampling with the filters top_k, top_p and min_p over the row's 128 leaders.
//
//   scores    z + T * g over the kept leaders, g the Gumbel noise of (seed, position, token id); the largest wins,
//             equal ones by rank. Tokens beyond the leaders are left out: that can cost a proposal, never a token.
//   confidence  of the chosen token: its share in the softmax of scores / T, which says how narrowly it has won; for
//             greedy its probability of all at T = 1
//
// One block of 128 threads a row, thread r for the leader of rank r; float64 throughout, as on the host.
#include "machine.cuh"

static constexpr int kLeaders = 128;

// One row's request; the layout is that of `CHOICE` in choose.py. position: of the first token of a chain.
struct Choice {
  uint64_t seed;
  double temperature, top_p, min_p;
  int top_k;
  int position;
};

DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

// Philox4x32-10, word `token % 4` of counter (token / 4, position, 0, 0): see shared/sampling/noise.py.
DEVICE uint32_t noise_word(uint64_t seed, uint32_t position, uint32_t token) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = token >> 2, c1 = position, c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t h0 = multiply_high(c0, 0xD2511F53u), l0 = c0 * 0xD2511F53u;
    const uint32_t h1 = multiply_high(c2, 0xCD9E8D57u), l1 = c2 * 0xCD9E8D57u;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint32_t word = token & 3;
  return word == 0 ? c0 : word == 1 ? c1 : word == 2 ? c2 : c3;
}

DEVICE double gumbel(uint64_t seed, uint32_t position, uint32_t token) {
  const double u = (static_cast<double>(noise_word(seed, position, token)) + 0.5) * 0x1p-32;
  return -log(-log(u));
}

// The sum over ranks 0 .. own, and over all: warps by shuffles, then warp by warp.
DEVICE double prefix_sum(double x, double* of_warp, double& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double before = shuffle(x, max_(lane - step, 0));
    if (lane >= step) x += before;
  }
  if (lane == 31) of_warp[warp] = x;
  sync_block();
  double base = 0.0;
  total = 0.0;
  for (int w = 0; w < kLeaders / 32; ++w) {
    if (w == warp) base = total;
    total += of_warp[w];
  }
  sync_block();
  return base + x;
}

// For row < step[1] of the pass number step[4] of a chain: tokens[row], which the next pass takes, and the same in
// history[step[4], row] with its confidence, both [passes, max_rows]. ids, values [rows, 128] are the leaders by
// descending logit, id -1 beyond the vocabulary; log_sums [rows] is of whole rows.
KERNEL(kLeaders, 1)
choose(const int* step, const Choice* choices, const int* ids, const float* values, const double* log_sums, int* tokens,
       int* history, float* confidences, int max_rows) {
  launch_next();
  wait_for_previous();
  const int row = blockIdx.x, rank = threadIdx.x;
  if (row >= step[1]) return;
  __shared__ double of_warp[kLeaders / 32];
  __shared__ double best_scores[kLeaders / 32];
  __shared__ int best_ranks[kLeaders / 32];
  const int at = step[4] * max_rows + row;
  const Choice choice = choices[row];
  const int id = ids[row * kLeaders + rank];
  const double z = values[row * kLeaders + rank], z0 = values[row * kLeaders];
  const double mass_of_all = exp(log_sums[row] - z0);

  if (choice.temperature == 0.0) {
    if (rank == 0) {
      tokens[row] = history[at] = id;
      confidences[at] = static_cast<float>(1.0 / mass_of_all);
    }
    return;
  }
  const int limit = choice.top_k > 0 ? min_(choice.top_k, kLeaders) : kLeaders;
  bool kept = id >= 0 && rank < limit;
  double mass;
  const double weight = kept ? exp(z - z0) : 0.0;
  const double before = prefix_sum(weight, of_warp, mass) - weight;
  // Without top_k, top_p is of the whole vocabulary.
  if (choice.top_k <= 0) mass = mass_of_all;
  if (choice.top_p < 1.0 && rank > 0) kept = kept && before < choice.top_p * mass;
  if (choice.min_p > 0.0) kept = kept && z >= z0 + log(choice.min_p);

  const double own = kept ? z + choice.temperature * gumbel(choice.seed, choice.position + step[4], id) : -1e300;
  double score = own;
  int best = rank;
  for (int mask = 16; mask; mask /= 2) {
    const double other = shuffle_xor(score, mask);
    const int other_rank = shuffle_xor(best, mask);
    if (other > score || (other == score && other_rank < best)) {
      score = other;
      best = other_rank;
    }
  }
  if (rank % 32 == 0) {
    best_scores[rank / 32] = score;
    best_ranks[rank / 32] = best;
  }
  sync_block();
  score = best_scores[0];
  best = best_ranks[0];
  for (int w = 1; w < kLeaders / 32; ++w)
    if (best_scores[w] > score) {
      score = best_scores[w];
      best = best_ranks[w];
    }
  double all;
  prefix_sum(kept ? exp((own - score) / choice.temperature) : 0.0, of_warp, all);
  if (rank == 0) {
    tokens[row] = history[at] = ids[row * kLeaders + best];
    confidences[at] = static_cast<float>(1.0 / all);
  }
}
