// Products of quantized matrices with 8-bit activations on tensor cores: out[pair] = W[expert] x[row], for any number
// of rows, plain matrices and stacks of experts alike.
//
// One scheme serves decoding, verifying and prefill. The matrix is the 16-row operand of mma (A), activations are the
// 8-column one (B), so one row costs what eight do, and a column's arithmetic does not depend on the others: a row's
// result is bitwise the same alone and in any batch. Per superblock of 256 elements an output element is
//     acc = fma(d_w * d_x, sum of groups scale_g * (q_w . q_x)_g, acc) - (d_min * d_x) * sum of groups min_g * sum(q_x)_g
// with exact integers inside, superblocks in ascending order; n_splits warps take contiguous parts of the row and
// their results are added in ascending order. n_splits (1, 2, 4 or 8) is a constant of the matrix, whatever the rows.
//
// Weights ("tiles", see weights.cu): [matrix][row tile][superblock][16 rows][kBytes], so that a warp streams its tile
// from contiguous memory through a ring of asynchronous copies of its own, running ahead into its next work item.
// Activations (see activations.cuh): q [rows, kp] int8, scale [rows, kp / 256], sums [rows, kp / 256, 24], x [rows, k]
// float for dense codecs. Groups (see experts.cu): an item is (group of up to kColumns pairs of one expert, some tiles);
// pair p reads row p / divide of the activations and writes row p of out.
//
// Launch: blocks of 256 threads, 8 warps = n_splits * tiles; a fixed grid whose blocks take items in turn.
#include "codecs/all.cuh"

struct None {
  static constexpr bool kDense = true;
  static constexpr int kElements = 64;
  static constexpr int kBytes = 4;
};

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

static constexpr int kWarps = 8;
static constexpr int kRingBytes = 82 * 1024;

template <class C0, class C1, class C2, int kColumns>
struct Layout {
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kMax01 = C0::kBytes > C1::kBytes ? C0::kBytes : C1::kBytes;
  static constexpr int kStageBytes = 16 * (kMax01 > C2::kBytes ? kMax01 : C2::kBytes);
  static constexpr int kFit = kRingBytes / (kWarps * kStageBytes);
  static constexpr int kStages = kFit < 2 ? 2 : kFit > 6 ? 6 : kFit;
  static constexpr int kRing = kWarps * kStages * kStageBytes;
  static constexpr int kRows = kWarps * kColumns * 4;
  static constexpr int kSums = kWarps * kTiles * 4 * 32 * 4;
  static constexpr int kShared = kRing + kRows + kSums;
};

struct Inputs {
  const int8_t* q;
  const float* scale;
  const int16_t* sums;
  const float* x;
  int k;
};

// Calls f(Constant<0>), ... f(Constant<n - 1>).
template <int i>
struct Constant {
  static constexpr int value = i;
};
template <int i, int n, class F>
DEVICE void unroll(F&& f) {
  if constexpr (i < n) {
    f(Constant<i>{});
    unroll<i + 1, n>(f);
  }
}

// Adds one superblock's part of a tile's product to acc (mma's layout of a 16 x 8 result per column tile).
// stage: 16 rows of the superblock in shared memory; rows: the activations' row of each column, in shared memory.
template <class C, int kTiles>
DEVICE void multiply(const uint8_t* stage, int block, const Inputs& in, const int* rows, int n_tiles, int lane,
                     float (&acc)[kTiles][4]) {
  const int g = lane / 4, t = lane % 4;
  if constexpr (C::kDense) {
    const uint8_t* w0 = stage + g * C::kBytes;
    const uint8_t* w1 = w0 + 8 * C::kBytes;
    const int n = min_(C::kElements, in.k - block * C::kElements);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j < n_tiles) {
        const float* x0 = in.x + static_cast<int64_t>(rows[j * 8 + 2 * t]) * in.k + block * C::kElements;
        const float* x1 = in.x + static_cast<int64_t>(rows[j * 8 + 2 * t + 1]) * in.k + block * C::kElements;
#pragma unroll 4
        for (int e = 0; e < n; ++e) {
          float a = C::value(w0, e), b = C::value(w1, e), u = x0[e], v = x1[e];
          acc[j][0] = fma_(a, u, acc[j][0]);
          acc[j][1] = fma_(a, v, acc[j][1]);
          acc[j][2] = fma_(b, u, acc[j][2]);
          acc[j][3] = fma_(b, v, acc[j][3]);
        }
      }
    }
  } else {
    constexpr int kGroups = C::kElements / C::kGroup;
    const int n_blocks = (in.k + 255) / 256;
    const typename C::Row r0(stage + g * C::kBytes), r1(stage + (g + 8) * C::kBytes);
    const int8_t* columns[kTiles];
    int products[kTiles][4];
    float parts[kTiles][4];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      columns[j] = in.q + (static_cast<int64_t>(rows[j * 8 + g]) * n_blocks + block) * 256 + t * (C::kGroup / 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        products[j][i] = 0;
        parts[j][i] = 0.0f;
      }
    }
    unroll<0, kGroups>([&](auto s) {
      constexpr int S = decltype(s)::value;
      uint32_t a0[C::kGroup / 16], a1[C::kGroup / 16];
      r0.template group<S>(t, a0);
      r1.template group<S>(t, a1);
      const auto s0 = r0.scale(S), s1 = r1.scale(S);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j < n_tiles) {
          int d[4];
          if constexpr (C::kGroup == 32) {
            Word2 x = load_word2(columns[j] + S * 32);
            uint32_t a[4] = {a0[0], a1[0], a0[1], a1[1]}, b[2] = {x.x, x.y};
            mma_s8_k32(d, a, b);
          } else {
            uint32_t a[2] = {a0[0], a1[0]};
            mma_s8_k16(d, a, load_word(columns[j] + S * 16));
          }
          if constexpr (C::kFloatScale) {
            parts[j][0] = fma_(s0, static_cast<float>(d[0]), parts[j][0]);
            parts[j][1] = fma_(s0, static_cast<float>(d[1]), parts[j][1]);
            parts[j][2] = fma_(s1, static_cast<float>(d[2]), parts[j][2]);
            parts[j][3] = fma_(s1, static_cast<float>(d[3]), parts[j][3]);
          } else {
            products[j][0] += s0 * d[0];
            products[j][1] += s0 * d[1];
            products[j][2] += s1 * d[2];
            products[j][3] += s1 * d[3];
          }
        }
      }
    });
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j < n_tiles) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int64_t at = static_cast<int64_t>(rows[j * 8 + 2 * t + c]) * n_blocks + block;
          const float dx = in.scale[at];
          if constexpr (C::kFloatScale) {
            acc[j][c] = fma_(dx, parts[j][c], acc[j][c]);
            acc[j][2 + c] = fma_(dx, parts[j][2 + c], acc[j][2 + c]);
          } else {
            acc[j][c] = fma_(mul_(r0.d, dx), static_cast<float>(products[j][c]), acc[j][c]);
            acc[j][2 + c] = fma_(mul_(r1.d, dx), static_cast<float>(products[j][2 + c]), acc[j][2 + c]);
            if constexpr (C::kMinimum) {
              // Sums over groups of 16 come first, then those over groups of 32.
              const int16_t* sums = in.sums + at * 24 + (C::kGroup == 32 ? 16 : 0);
              int m0 = 0, m1 = 0;
#pragma unroll
              for (int w = 0; w < kGroups / 8; ++w) {
                const Word4 x = load_word4(sums + w * 8);
                m0 = dot2_low(x.x, r0.minimum_bytes[2 * w], m0);
                m0 = dot2_high(x.y, r0.minimum_bytes[2 * w], m0);
                m0 = dot2_low(x.z, r0.minimum_bytes[2 * w + 1], m0);
                m0 = dot2_high(x.w, r0.minimum_bytes[2 * w + 1], m0);
                m1 = dot2_low(x.x, r1.minimum_bytes[2 * w], m1);
                m1 = dot2_high(x.y, r1.minimum_bytes[2 * w], m1);
                m1 = dot2_low(x.z, r1.minimum_bytes[2 * w + 1], m1);
                m1 = dot2_high(x.w, r1.minimum_bytes[2 * w + 1], m1);
              }
              acc[j][c] = fma_(-mul_(r0.dmin, dx), static_cast<float>(m0), acc[j][c]);
              acc[j][2 + c] = fma_(-mul_(r1.dmin, dx), static_cast<float>(m1), acc[j][2 + c]);
            }
          }
        }
      }
    }
  }
}

// A warp's part of an item: superblocks [first, end) of one tile.
struct Part {
  const uint8_t* tile;
  int matrix;
  int first, end;
};

// The matrices of a launch. kGateUp: the tiles of two matrices of equal shape go in pairs; else up to three matrices
// stand below each other.
template <class C0, class C1, class C2, bool kGateUp>
struct Matrices {
  const uint8_t *w0, *w1, *w2;
  int rows0, rows1, rows2;
  int k, n_splits;

  template <class C>
  MEMBER int n_blocks() const {
    return (k + C::kElements - 1) / C::kElements;
  }
  MEMBER const uint8_t* base(int matrix) const { return matrix == 0 ? w0 : matrix == 1 ? w1 : w2; }
  MEMBER int n_rows(int matrix) const { return matrix == 0 ? rows0 : matrix == 1 ? rows1 : rows2; }
  MEMBER int n_tiles(int matrix) const { return (n_rows(matrix) + 15) / 16; }
  // Rows that stand above a matrix's in the output.
  MEMBER int offset(int matrix) const { return kGateUp || matrix == 0 ? 0 : matrix == 1 ? rows0 : rows0 + rows1; }
  // A block computes n_slots tiles at a time: a bundle.
  MEMBER int n_slots() const { return kWarps / n_splits; }
  MEMBER int n_bundles() const {
    return kGateUp ? ceil_div(n_tiles(0), n_slots() / 2) : ceil_div(n_tiles(0) + n_tiles(1) + n_tiles(2), n_slots());
  }
  // Which matrix and tile slot `slot` of a bundle is; matrix -1: none.
  MEMBER void find(int bundle, int slot, int& matrix, int& tile) const {
    if constexpr (kGateUp) {
      matrix = slot % 2;
      tile = bundle * (n_slots() / 2) + slot / 2;
      if (tile >= n_tiles(0)) matrix = -1;
    } else {
      tile = bundle * n_slots() + slot;
      matrix = 0;
      if (tile >= n_tiles(0)) {
        tile -= n_tiles(0);
        matrix = 1;
        if (tile >= n_tiles(1)) {
          tile -= n_tiles(1);
          matrix = tile < n_tiles(2) ? 2 : -1;
        }
      }
    }
  }
  template <class C>
  MEMBER Part part(int matrix, int tile, int expert, int split) const {
    const int n = n_blocks<C>();
    const int64_t at = (static_cast<int64_t>(expert) * n_tiles(matrix) + tile) * n * (16 * C::kBytes);
    return {base(matrix) + at, matrix, n * split / n_splits, n * (split + 1) / n_splits};
  }
  MEMBER Part locate(int bundle, int expert, int slot, int split) const {
    int matrix, tile;
    find(bundle, slot, matrix, tile);
    if (matrix == 0) return part<C0>(0, tile, expert, split);
    if (matrix == 1) return part<C1>(1, tile, expert, split);
    if (matrix == 2) return part<C2>(2, tile, expert, split);
    return {nullptr, -1, 0, 0};
  }
  MEMBER int stage_bytes(int matrix) const {
    return 16 * (matrix == 0 ? C0::kBytes : matrix == 1 ? C1::kBytes : C2::kBytes);
  }
};

template <class C0, class C1, class C2, int kColumns, bool kGateUp>
DEVICE void multiply_all(const Matrices<C0, C1, C2, kGateUp>& matrices, const int* groups, const int* pairs,
                         int max_groups, int divide, bool stacked, const Inputs& in, float* out, int out_stride) {
  using L = Layout<C0, C1, C2, kColumns>;
  constexpr int kTiles = L::kTiles, kStages = L::kStages;
  DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int n_splits = matrices.n_splits;
  const int slot = warp / n_splits, split = warp % n_splits;
  uint8_t* ring = shared + warp * (kStages * L::kStageBytes);
  int* rows = reinterpret_cast<int*>(shared + L::kRing) + warp * kColumns;
  float* sums = reinterpret_cast<float*>(shared + L::kRing + L::kRows);
  const int n_bundles = matrices.n_bundles();

  // The ring's writing end: the next superblock to copy, and the item that it belongs to.
  int ahead_item = blockIdx.x, ahead_block = 0, issued = 0;
  Part ahead = {nullptr, -1, 0, 0};
  auto enter = [&](int expert) {
    ahead = matrices.locate(ahead_item % n_bundles, expert, slot, split);
    ahead_block = ahead.first;
  };
  auto copy_stage = [&]() {
    const int bytes = matrices.stage_bytes(ahead.matrix);
    const uint8_t* from = ahead.tile + static_cast<int64_t>(ahead_block) * bytes;
    uint8_t* to = ring + issued % kStages * L::kStageBytes;
    for (int i = lane * 16; i < bytes; i += 512) copy_async(to + i, from + i);
    ++ahead_block;
    ++issued;
    copy_commit();
  };

  launch_next();
  // Weights of a plain matrix do not depend on earlier kernels: the first copies start before those have ended.
  if (!stacked && ahead_item < n_bundles) {
    enter(0);
    while (issued < kStages - 1 && ahead_block < ahead.end) copy_stage();
  }
  wait_for_previous();
  const int n_items = groups[0] * n_bundles;
  const int* expert_of = groups + 1;
  const int* first_of = groups + 1 + max_groups;
  const int* count_of = groups + 1 + 2 * max_groups;
  if (ahead.matrix < 0 && ahead_item < n_items) enter(expert_of[ahead_item / n_bundles]);
  auto issue = [&]() {
    while (ahead_item < n_items && ahead_block >= ahead.end) {
      ahead_item += gridDim.x;
      if (ahead_item < n_items) enter(expert_of[ahead_item / n_bundles]);
    }
    if (ahead_item < n_items) {
      copy_stage();
    } else {
      ++issued;
      copy_commit();  // an empty group keeps the count
    }
  };
  while (issued < kStages - 1) issue();

  int at = 0;  // superblocks taken out of the ring
  for (int item = blockIdx.x; item < n_items; item += gridDim.x) {
    const int group = item / n_bundles, bundle = item % n_bundles;
    const int first = first_of[group], count = count_of[group];
    const int n_tiles = (count + 7) / 8;
    const Part part = matrices.locate(bundle, expert_of[group], slot, split);
    sync_warp();
    for (int c = lane; c < kColumns; c += 32) rows[c] = pairs[first + min_(c, count - 1)] / divide;
    float acc[kTiles][4];
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[j][i] = 0.0f;
    for (int block = part.first; block < part.end; ++block) {
      copy_wait<kStages - 2>();
      sync_warp();
      issue();  // into the stage that was read in the last round
      const uint8_t* stage = ring + at % kStages * L::kStageBytes;
      if (Same<C0, C1>::value || part.matrix == 0) {
        if (Same<C0, C2>::value || part.matrix != 2)
          multiply<C0, kTiles>(stage, block, in, rows, n_tiles, lane, acc);
        else
          multiply<C2, kTiles>(stage, block, in, rows, n_tiles, lane, acc);
      } else if (Same<C1, C2>::value || part.matrix == 1) {
        multiply<C1, kTiles>(stage, block, in, rows, n_tiles, lane, acc);
      } else {
        multiply<C2, kTiles>(stage, block, in, rows, n_tiles, lane, acc);
      }
      ++at;
    }

    if (n_splits == 1 && !kGateUp) {
      int matrix, tile;
      matrices.find(bundle, slot, matrix, tile);
      if (matrix >= 0) {
        const int offset = matrices.offset(matrix), n_rows = matrices.n_rows(matrix);
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = j * 8 + lane % 4 * 2 + i % 2, row = tile * 16 + lane / 4 + i / 2 * 8;
            if (column < count && row < n_rows)
              out[static_cast<int64_t>(pairs[first + column]) * out_stride + offset + row] = acc[j][i];
          }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[(warp * kTiles * 4 + j * 4 + i) * 32 + lane] = acc[j][i];
      sync_block();
      // The warps of a slot (of a pair of slots) share the elements out among themselves.
      const int n_join = kGateUp ? 2 * n_splits : n_splits;
      auto total = [&](int slot_, int e) {
        const float* from = sums + (slot_ * n_splits * kTiles * 4 + e) * 32 + lane;
        float sum = from[0];
        for (int s = 1; s < n_splits; ++s) sum = add_(sum, from[s * kTiles * 4 * 32]);
        return sum;
      };
      const int front = warp / n_join * (n_join / n_splits);
      int matrix, tile;
      matrices.find(bundle, front, matrix, tile);
      if (matrix >= 0) {
        const int offset = matrices.offset(matrix), n_rows = matrices.n_rows(matrix);
        for (int e = warp % n_join; e < n_tiles * 4; e += n_join) {
          const int column = e / 4 * 8 + lane % 4 * 2 + e % 2, row = tile * 16 + lane / 4 + e / 2 % 2 * 8;
          float value = total(front, e);
          if constexpr (kGateUp) {
            const float up = total(front + 1, e);
            value = mul_(div_(value, add_(1.0f, exp_(-value))), up);
          }
          if (column < count && row < n_rows)
            out[static_cast<int64_t>(pairs[first + column]) * out_stride + offset + row] = value;
        }
      }
      sync_block();
    }
  }
  copy_wait<0>();
}

// out[p, :] = the rows of up to three matrices below each other (those not used: null, 0 rows, None) times activations.
template <class C0, class C1, class C2, int kColumns>
KERNEL(256, kColumns > 32 ? 1 : 2)
matmul(const int* groups, const int* pairs, int max_groups, int divide, int stacked, const int8_t* q,
       const float* scale, const int16_t* sums, const float* x, int k, const uint8_t* w0, int rows0, const uint8_t* w1,
       int rows1, const uint8_t* w2, int rows2, int n_splits, float* out, int out_stride) {
  const Matrices<C0, C1, C2, false> matrices = {w0, w1, w2, rows0, rows1, rows2, k, n_splits};
  multiply_all<C0, C1, C2, kColumns, false>(matrices, groups, pairs, max_groups, divide, stacked != 0,
                                                     {q, scale, sums, x, k}, out, out_stride);
}

// out[p, :] = silu(gate x) * (up x).
template <class CGate, class CUp, int kColumns>
KERNEL(256, kColumns > 32 ? 1 : 2)
gate_up(const int* groups, const int* pairs, int max_groups, int divide, int stacked, const int8_t* q,
        const float* scale, const int16_t* sums, const float* x, int k, const uint8_t* gate, const uint8_t* up, int rows,
        int n_splits, float* out, int out_stride) {
  const Matrices<CGate, CUp, CUp, true> matrices = {gate, up, nullptr, rows, rows, 0, k, n_splits};
  multiply_all<CGate, CUp, CUp, kColumns, true>(matrices, groups, pairs, max_groups, divide, stacked != 0,
                                                         {q, scale, sums, x, k}, out, out_stride);
}
