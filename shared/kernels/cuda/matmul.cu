// Products of quantized matrices with 8-bit activations on tensor cores: out[pair] = W[expert] x[row], for any number
// of rows, plain matrices and stacks of experts alike.
//
// One scheme serves decoding, verifying and prefill. The matrix is the 16-row operand of mma (A), activations are the
// 8-column one (B), so one row costs what eight do, and a column's arithmetic does not depend on the others: a row's
// result is bitwise the same alone and in any batch. Per superblock of 256 elements an output element is
//     acc = fma(d_w * d_x, sum of groups scale_g * (q_w . q_x)_g, acc)
//     acc = fma(-(d_min * d_x), sum of groups min_g * sum(q_x)_g, acc)
// with exact integers inside, superblocks in ascending order; n_splits warps take contiguous parts of the row and
// their results are added in ascending order. n_splits (1, 2, 4 or 8) is a constant of the matrix, whatever the rows.
//
// Weights ("tiles", see weights.cu): [matrix][row tile][superblock][16 rows][kBytes], so that a warp streams its tile
// from contiguous memory through a ring of asynchronous copies of its own.
// Activations (see activations.cuh): q [rows, kp] int8, scale [rows, kp / 256], sums [rows, kp / 256, 24], x [rows, k]
// float for dense codecs; each below 2^31 bytes. A group is up to kColumns pairs of one expert (see experts.cu), or rows
// of a plain matrix; pair p reads row p * per_row of the activations and writes row p of out.
//
// At few rows time is the longest chain of memory accesses. What says which weights and which rows a block needs is
// known before wait_for_previous: the number of rows of a plain matrix is one of the pass's inputs, groups are
// published. So weights are under way while the kernels before still run.
//
// Launch: grid (sets of tiles, groups), blocks of 256 threads, 8 warps = n_splits * tiles. Code is kept small: a launch
// fetches it anew, and at one row instructions cost as much time as the work.
#include "activations.cuh"
#include "codecs/all.cuh"

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

static constexpr int kWarps = 8;
// What a block gets on every GPU from compute capability 8.0 on, less a word of static shared memory, and what rounding
// rows of 2048 elements takes of it.
static constexpr int kMostShared = 99 * 1024 - 16;
static constexpr int kMostRounded = 8 * 8 * (256 + 2 * kActivationSums + 4);

template <class C0, class C1, class C2, int kColumns, bool kQuantize>
struct Layout {
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kMax01 = C0::kBytes > C1::kBytes ? C0::kBytes : C1::kBytes;
  static constexpr int kStageBytes = 16 * (kMax01 > C2::kBytes ? kMax01 : C2::kBytes);
  static constexpr int kRows = kWarps * 2 * kColumns * 4;
  static constexpr int kSums = kWarps * kTiles * 4 * 32 * 4;
  // With more columns the sums take the ring's place when it is done.
  static constexpr bool kOverlay = kTiles > 1;
  static constexpr int kRest = kMostShared - kRows - (kOverlay ? 0 : kSums) - (kQuantize ? kMostRounded : 0);
  static constexpr int kFit = kRest / (kWarps * kStageBytes);
  static constexpr int kStages = kFit < 2 ? 2 : kFit > 6 ? 6 : kFit;
  static_assert(!kOverlay || kSums <= kWarps * kStages * kStageBytes, "the sums do not fit the ring");
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

template <class C>
struct Type {
  using type = C;
};

// One superblock of the activations' columns, as a lane needs them: lane (g, t) multiplies column g of a column tile,
// and scales columns 2 t and 2 t + 1. rows: the activations' row of each column, in shared memory.
//
// With one column tile everything is loaded at once, before the weights are waited for: the two latencies overlap. With
// more, loads are made on use, since registers would not suffice and there is work to hide them behind.
template <class C, int kTiles>
struct Columns {
  static constexpr int kSums = C::kGroup == 32 ? 1 : 2;
  const Inputs& in;
  const int* rows;
  int block, n_blocks, g, t;
  const int8_t* q[kTiles];

  MEMBER Columns(const Inputs& in_, const int* rows_, int block_, int lane)
      : in(in_), rows(rows_), block(block_), n_blocks((in_.k + 255) / 256), g(lane / 4), t(lane % 4) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      q[j] = in.q + static_cast<uint32_t>((rows[j * 8 + g] * n_blocks + block) * 256 + t * (C::kGroup / 4));
  }
  MEMBER Word2 words(int j, int S) const { return load_word2(q[j] + S * 32); }
  MEMBER uint32_t word(int j, int S) const { return load_word(q[j] + S * 16); }
  MEMBER uint32_t at(int j, int c) const { return rows[j * 8 + 2 * t + c] * n_blocks + block; }
  MEMBER float scale(int j, int c) const { return in.scale[at(j, c)]; }
  // Sums over groups of 16 come first, then those over groups of 32.
  MEMBER Word4 sums(int j, int c, int w) const {
    return load_word4(in.sums + at(j, c) * 24 + (C::kGroup == 32 ? 16 : 0) + w * 8);
  }
};

template <class C>
struct Columns<C, 1> {
  static constexpr int kSums = C::kGroup == 32 ? 1 : 2;
  Word2 q[8];
  uint32_t q16[16];
  float scales[2];
  Word4 sum[2][kSums];

  MEMBER Columns(const Inputs& in, const int* rows, int block, int lane) {
    const int g = lane / 4, t = lane % 4, n_blocks = (in.k + 255) / 256;
    const int8_t* from = in.q + static_cast<uint32_t>((rows[g] * n_blocks + block) * 256 + t * (C::kGroup / 4));
    if constexpr (C::kGroup == 32) {
#pragma unroll
      for (int i = 0; i < 8; ++i) q[i] = load_word2(from + i * 32);
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) q16[i] = load_word(from + i * 16);
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint32_t at = rows[2 * t + c] * n_blocks + block;
      scales[c] = in.scale[at];
      if constexpr (C::kMinimum) {
#pragma unroll
        for (int w = 0; w < kSums; ++w) sum[c][w] = load_word4(in.sums + at * 24 + (C::kGroup == 32 ? 16 : 0) + w * 8);
      }
    }
  }
  MEMBER Word2 words(int, int S) const { return q[S]; }
  MEMBER uint32_t word(int, int S) const { return q16[S]; }
  MEMBER float scale(int, int c) const { return scales[c]; }
  MEMBER Word4 sums(int, int c, int w) const { return sum[c][w]; }
};

// Adds one superblock's part of a tile's product to acc (mma's layout of a 16 x 8 result per column tile), for the
// first kUse column tiles at most. stage: 16 rows of the superblock in shared memory.
template <class C, int kUse, int kTiles>
DEVICE void multiply(const uint8_t* stage, const Columns<C, kUse>& x, int n_tiles, int lane, float (&acc)[kTiles][4]) {
  constexpr int kGroups = C::kElements / C::kGroup;
  const int g = lane / 4, t = lane % 4;
  const typename C::Row r0(stage + g * C::kBytes), r1(stage + (g + 8) * C::kBytes);
  int products[kUse][4];
  float parts[kUse][4];
#pragma unroll
  for (int j = 0; j < kUse; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      products[j][i] = 0;
      parts[j][i] = 0.0f;
    }
  unroll<0, kGroups>([&](auto s) {
    constexpr int S = decltype(s)::value;
    uint32_t a0[C::kGroup / 16], a1[C::kGroup / 16];
    r0.template group<S>(t, a0);
    r1.template group<S>(t, a1);
    const auto s0 = r0.scale(S), s1 = r1.scale(S);
#pragma unroll
    for (int j = 0; j < kUse; ++j) {
      if (kUse == 1 || j < n_tiles) {
        int d[4];
        if constexpr (C::kGroup == 32) {
          const Word2 q = x.words(j, S);
          uint32_t a[4] = {a0[0], a1[0], a0[1], a1[1]}, b[2] = {q.x, q.y};
          mma_s8_k32(d, a, b);
        } else {
          uint32_t a[2] = {a0[0], a1[0]};
          mma_s8_k16(d, a, x.word(j, S));
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
  for (int j = 0; j < kUse; ++j) {
    if (kUse == 1 || j < n_tiles) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float dx = x.scale(j, c);
        if constexpr (C::kFloatScale) {
          acc[j][c] = fma_(dx, parts[j][c], acc[j][c]);
          acc[j][2 + c] = fma_(dx, parts[j][2 + c], acc[j][2 + c]);
        } else {
          acc[j][c] = fma_(mul_(r0.d, dx), static_cast<float>(products[j][c]), acc[j][c]);
          acc[j][2 + c] = fma_(mul_(r1.d, dx), static_cast<float>(products[j][2 + c]), acc[j][2 + c]);
          if constexpr (C::kMinimum) {
            int m0 = 0, m1 = 0;
#pragma unroll
            for (int w = 0; w < kGroups / 8; ++w) {
              const Word4 sum = x.sums(j, c, w);
              m0 = dot2_low(sum.x, r0.minimum_bytes[2 * w], m0);
              m0 = dot2_high(sum.y, r0.minimum_bytes[2 * w], m0);
              m0 = dot2_low(sum.z, r0.minimum_bytes[2 * w + 1], m0);
              m0 = dot2_high(sum.w, r0.minimum_bytes[2 * w + 1], m0);
              m1 = dot2_low(sum.x, r1.minimum_bytes[2 * w], m1);
              m1 = dot2_high(sum.y, r1.minimum_bytes[2 * w], m1);
              m1 = dot2_low(sum.z, r1.minimum_bytes[2 * w + 1], m1);
              m1 = dot2_high(sum.w, r1.minimum_bytes[2 * w + 1], m1);
            }
            acc[j][c] = fma_(-mul_(r0.dmin, dx), static_cast<float>(m0), acc[j][c]);
            acc[j][2 + c] = fma_(-mul_(r1.dmin, dx), static_cast<float>(m1), acc[j][2 + c]);
          }
        }
      }
    }
  }
}

// The same for dense codecs, with activations in float.
template <class C, int kTiles>
DEVICE void multiply_dense(const uint8_t* stage, int block, const Inputs& in, const int* rows, int n_tiles, int lane,
                           float (&acc)[kTiles][4]) {
  const int g = lane / 4, t = lane % 4;
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
}

// The matrices of a launch, in which 1 << split_shift warps share a tile. kGateUp: the tiles of two matrices of equal
// shape go in pairs; else up to three matrices stand below each other.
template <class C0, class C1, class C2, bool kGateUp>
struct Matrices {
  const uint8_t *w0, *w1, *w2;
  int rows0, rows1, rows2;
  int split_shift;

  MEMBER int n_rows(int matrix) const { return matrix == 0 ? rows0 : matrix == 1 ? rows1 : rows2; }
  // Rows that stand above a matrix's in the output.
  MEMBER int offset(int matrix) const { return kGateUp || matrix == 0 ? 0 : matrix == 1 ? rows0 : rows0 + rows1; }
  // Which matrix and tile slot `slot` of a block is; matrix -1: none.
  MEMBER void find(int slot, int& matrix, int& tile) const {
    const int slots_shift = 3 - split_shift;
    if constexpr (kGateUp) {
      matrix = slot & 1;
      tile = (blockIdx.x << (slots_shift - 1)) + (slot >> 1);
      if (tile * 16 >= rows0) matrix = -1;
    } else {
      tile = (blockIdx.x << slots_shift) + slot;
      const int tiles0 = (rows0 + 15) >> 4, tiles1 = (rows1 + 15) >> 4;
      matrix = 0;
      if (tile >= tiles0) {
        tile -= tiles0;
        matrix = 1;
        if (tile >= tiles1) {
          tile -= tiles1;
          matrix = tile * 16 < rows2 ? 2 : -1;
        }
      }
    }
  }
};

// Which pairs go through which matrix. groups: null for a plain matrix, else see experts.cu. number: of rows of a plain
// matrix, or that of the pass. per_row: 1 / pairs of a row.
struct Pairs {
  const int* number;
  const uint64_t* groups;
  const int* pairs;
  float per_row;
};

// A warp's part of a tile: superblocks [first, end), streamed through a ring of kStages in shared memory.
//
// A ring of fewer stages, enough for all superblocks, does as well.
template <class C, int kStages>
struct Stream {
  static constexpr int kBytes = 16 * C::kBytes;
  const uint8_t* from;
  uint8_t* ring;
  int left, at = 0, ahead = 0;

  MEMBER Stream(const uint8_t* tile, uint8_t* ring_, int first, int end, int lane)
      : from(tile + first * kBytes + lane * 16), ring(ring_), left(end - first) {}
  // The next superblock's copy, or an empty group that keeps the count.
  MEMBER void copy(int lane) {
    if (left > 0) {
      uint8_t* to = ring + ahead * kBytes + lane * 16;
#pragma unroll
      for (int i = 0; i < kBytes / 512; ++i) copy_async(to + i * 512, from + i * 512);
      if (lane < kBytes % 512 / 16) copy_async(to + kBytes / 512 * 512, from + kBytes / 512 * 512);
      from += kBytes;
      ahead = ahead + 1 == kStages ? 0 : ahead + 1;
      --left;
    }
    copy_commit();
  }
  // The next superblock; what was read last is overwritten from here on.
  MEMBER const uint8_t* next(int lane) {
    copy_wait<kStages - 2>();
    sync_warp();
    copy(lane);
    const uint8_t* stage = ring + at * kBytes;
    at = at + 1 == kStages ? 0 : at + 1;
    return stage;
  }
};

// Rounds the rows of a group's columns, x [rows, k], to 8 bits in shared memory, and lets `in` be these: column c is
// row c.
DEVICE void quantize_columns(Inputs& in, const int* rows, int count, uint8_t* shared) {
  const int n_blocks = (in.k + 255) >> 8, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int8_t* q = reinterpret_cast<int8_t*>(shared);
  int16_t* sums = reinterpret_cast<int16_t*>(q + 8 * n_blocks * 256);
  float* scale = reinterpret_cast<float*>(sums + 8 * n_blocks * kActivationSums);
#pragma unroll 1
  for (int c = 0; c < count; ++c)
#pragma unroll 1
    for (int block = warp; block < n_blocks; block += kWarps) {
      const int first = block * 256 + lane * 8, at = c * n_blocks + block;
      float x[8] = {};
      if (first < in.k) load_floats(in.x + static_cast<uint32_t>(rows[c] * in.k + first), x);
      quantize_group(x, lane, q + at * 256, scale + at, sums + at * kActivationSums);
    }
  in.q = q;
  in.sums = sums;
  in.scale = scale;
}

// kQuantize: the activations are floats, which the block rounds to 8 bits itself, as quantize (norm.cu) does.
template <class C0, class C1, class C2, int kColumns, bool kGateUp, bool kQuantize>
DEVICE void multiply_all(const Matrices<C0, C1, C2, kGateUp>& matrices, const Pairs& pairs, Inputs in, int stages,
                         float* out, int out_stride) {
  using L = Layout<C0, C1, C2, kColumns, kQuantize>;
  constexpr int kTiles = L::kTiles, kStages = L::kStages;
  DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int split_shift = matrices.split_shift, n_splits = 1 << split_shift;
  const int slot = warp >> split_shift, split = warp & (n_splits - 1);
  const int ring_bytes = stages * L::kStageBytes;
  uint8_t* ring = shared + warp * ring_bytes;
  uint8_t* beyond = shared + kWarps * ring_bytes;
  int* targets = reinterpret_cast<int*>(beyond) + warp * 2 * kColumns;
  int* rows = targets + kColumns;
  float* sums = reinterpret_cast<float*>(L::kOverlay ? shared : beyond + L::kRows);
  uint8_t* rounded = beyond + L::kRows + (L::kOverlay ? 0 : L::kSums);
  const int group = blockIdx.y;
  int matrix, tile;
  matrices.find(slot, matrix, tile);

  launch_next();
  // What the group is: its expert, and the activations' row and the pair of each column.
  int expert = 0, count, own = group * kColumns + lane % kColumns, front = group * kColumns;
  if (pairs.groups) {
    __shared__ int described;
    if (threadIdx.x == 0) {
      const uint32_t pass = static_cast<uint32_t>(pairs.number[0]);
      uint64_t word;
      while (static_cast<uint32_t>(word = published(pairs.groups + group)) != pass) not_yet();
      described = static_cast<int>(word >> 32);
    }
    sync_block();
    count = described & 127;
    expert = described >> 7 & 511;
    front = described >> 16;
    // A pair alone needs no list.
    own = count > 1 ? pairs.pairs[own] : front;
    // Any pair will do for columns that are not there, which are not written: the first one of all, or the lone one.
  } else {
    count = min_(kColumns, pairs.number[0] - group * kColumns);
  }
  if (count <= 0) {
    wait_for_previous();
    return;
  }
  float acc[kTiles][4];
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[j][i] = 0.0f;

  auto take = [&](auto codec, const uint8_t* base) {
    using C = typename decltype(codec)::type;
    const int n_blocks = (in.k + C::kElements - 1) / C::kElements;
    const int first = n_blocks * split >> split_shift;
    const int end = matrix < 0 ? first : n_blocks * (split + 1) >> split_shift;
    const int n_tiles_all = (matrices.n_rows(matrix) + 15) >> 4;
    const uint8_t* from =
        base + (static_cast<int64_t>(expert) * n_tiles_all + tile) * n_blocks * (16 * C::kBytes);
    Stream<C, kStages> stream(from, ring, first, end, lane);
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) stream.copy(lane);
#pragma unroll 1
    for (int c = lane; c < kColumns; c += 32) {
      if (c >= 32) own = pairs.groups ? pairs.pairs[group * kColumns + c] : group * kColumns + c;
      targets[c] = own;
      // Exact: pairs are far below 2^23.
      rows[c] = static_cast<int>(mul_(static_cast<float>(c < count ? own : front) + 0.5f, pairs.per_row));
    }
    sync_warp();
    wait_for_previous();
    if constexpr (kQuantize) {
      // Every warp comes here, with the same count.
      quantize_columns(in, rows, count, rounded);
      sync_block();
      if (lane < kColumns) rows[lane] = lane < count ? lane : 0;
      sync_warp();
    }
    const int n_tiles = (count + 7) >> 3;
    if constexpr (C::kDense) {
#pragma unroll 1
      for (int block = first; block < end; ++block)
        multiply_dense<C, kTiles>(stream.next(lane), block, in, rows, n_tiles, lane, acc);
    } else if (kTiles == 1 || n_tiles == 1) {
#pragma unroll 1
      for (int block = first; block < end; ++block) {
        const Columns<C, 1> x(in, rows, block, lane);
        multiply<C, 1, kTiles>(stream.next(lane), x, 1, lane, acc);
      }
    } else if constexpr (kTiles > 1) {
#pragma unroll 1
      for (int block = first; block < end; ++block) {
        const Columns<C, kTiles> x(in, rows, block, lane);
        multiply<C, kTiles, kTiles>(stream.next(lane), x, n_tiles, lane, acc);
      }
    }
  };
  if constexpr (Same<C0, C1>::value && Same<C0, C2>::value) {
    take(Type<C0>{}, matrix == 2 ? matrices.w2 : matrix == 1 ? matrices.w1 : matrices.w0);
  } else if (matrix == 1) {
    take(Type<C1>{}, matrices.w1);
  } else if (matrix == 2) {
    take(Type<C2>{}, matrices.w2);
  } else {
    take(Type<C0>{}, matrices.w0);
  }

  if (split_shift == 0 && !kGateUp) {
    if (matrix < 0) return;
    const int n_rows = matrices.n_rows(matrix);
    float* to = out + matrices.offset(matrix) + tile * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = j * 8 + lane % 4 * 2 + i % 2;
        if (column < count && tile * 16 + lane / 4 + i / 2 * 8 < n_rows)
          to[static_cast<int64_t>(targets[column]) * out_stride + i / 2 * 8] = acc[j][i];
      }
    return;
  }
  if constexpr (L::kOverlay) {
    copy_wait<0>();
    sync_block();
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[(warp * kTiles * 4 + j * 4 + i) * 32 + lane] = acc[j][i];
  sync_block();
  // The warps of a slot (of a pair of slots) share the elements out among themselves.
  const int join_shift = split_shift + (kGateUp ? 1 : 0);
  const int leader = warp >> join_shift << (join_shift - split_shift);
  matrices.find(leader, matrix, tile);
  if (matrix < 0) return;
  auto total = [&](int slot_, int e) {
    const float* from = sums + ((slot_ << split_shift) * kTiles * 4 + e) * 32 + lane;
    float sum = from[0];
#pragma unroll 1
    for (int s = 1; s < n_splits; ++s) sum = add_(sum, from[s * kTiles * 4 * 32]);
    return sum;
  };
  const int n_rows = matrices.n_rows(matrix), n_elements = (count + 7) >> 3 << 2;
  float* to = out + matrices.offset(matrix) + tile * 16 + lane / 4;
#pragma unroll 1
  for (int e = warp & ((1 << join_shift) - 1); e < n_elements; e += 1 << join_shift) {
    const int column = e / 4 * 8 + lane % 4 * 2 + e % 2, below = e / 2 % 2 * 8;
    float value = total(leader, e);
    if constexpr (kGateUp) {
      const float up = total(leader + 1, e);
      value = mul_(div_(value, add_(1.0f, exp_(-value))), up);
    }
    if (column < count && tile * 16 + lane / 4 + below < n_rows)
      to[static_cast<int64_t>(targets[column]) * out_stride + below] = value;
  }
}

// out[p, :] = the rows of up to three matrices below each other (those not used: null, 0 rows) times activations.
template <class C0, class C1, class C2, int kColumns, bool kQuantize>
KERNEL(256, kColumns > 32 ? 1 : 2)
matmul(const int* number, const uint64_t* groups, const int* pairs, float per_row, const int8_t* q, const float* scale,
       const int16_t* sums, const float* x, int k, const uint8_t* w0, int rows0, const uint8_t* w1, int rows1,
       const uint8_t* w2, int rows2, int split_shift, int stages, float* out, int out_stride) {
  const Matrices<C0, C1, C2, false> matrices = {w0, w1, w2, rows0, rows1, rows2, split_shift};
  multiply_all<C0, C1, C2, kColumns, false, kQuantize>(matrices, {number, groups, pairs, per_row},
                                                       {q, scale, sums, x, k}, stages, out, out_stride);
}

// out[p, :] = silu(gate x) * (up x).
template <class CGate, class CUp, int kColumns>
KERNEL(256, kColumns > 32 ? 1 : 2)
gate_up(const int* number, const uint64_t* groups, const int* pairs, float per_row, const int8_t* q,
        const float* scale, const int16_t* sums, const float* x, int k, const uint8_t* gate, const uint8_t* up,
        int rows, int split_shift, int stages, float* out, int out_stride) {
  const Matrices<CGate, CUp, CUp, true> matrices = {gate, up, nullptr, rows, rows, 0, split_shift};
  multiply_all<CGate, CUp, CUp, kColumns, true, false>(matrices, {number, groups, pairs, per_row}, {q, scale, sums, x, k},
                                                     stages, out, out_stride);
}
