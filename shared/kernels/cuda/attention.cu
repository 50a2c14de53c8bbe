// Attention over a paged KV cache: rotary embedding and storing (rope_append), softmax(q K^T scale) V (attend,
// merge_splits), and copies of pages (copy_pages).
//
// Shapes. H query heads share KVH key-value heads, G = H / KVH each; a head has D elements. qkv float [rows,
// (H + 2 KVH) D], query heads first, then keys, then values. q half [rows, H, D]. out float [rows, H D].
//
// Cache. A page is 64 tokens of a slot; position p of a slot is token p % 64 of page pages[slot * max_pages + p / 64].
// Per layer four arrays, whose cells are what attend reads with wide loads:
//   keys   [page][KVH][64 tokens][D]     key_scales   half [page][KVH][64 tokens][D / 32]
//   values [page][KVH][D][64 tokens]     value_scales half [page][KVH][D / 32][64 tokens]
// F16Cache: halves, no scales. Q8Cache: ggml's q8_0, int8, one scale per 32 elements of a token's head. Q4Cache: ggml's
// q4_0, likewise, two numbers a byte: elements 2 i (low nibble) and 2 i + 1 of a key, tokens 2 i and 2 i + 1 of a
// value's element. What is not written may hold anything, NaN too.
//
// Step, int32, written by a copy that is done before any kernel of a pass starts, so that kernels read it before
// wait_for_previous: step[0] rows, step[2] length of work. positions[row]; cells[row] = page * 64 + position % 64, for
// its key and value. A chunk is rows of one slot at consecutive positions. A query tile is up to 16 of a chunk's
// query heads, flattened: f = i * G + g (row i of the chunk, head g of a group).
//   work [step[2]][8]: what a block does for a key-value head, `Work` below: a tile, or one of a tile's splits
//   heads [rows][G]: of head g of the row's groups, 16 * the first of its tile's splits, as an index of work, + its
//     place in the tile; -1: in no tile
//
// Arithmetic of a query row, a function of its position alone. Keys are cut into units of 32, splits of 4 units and
// spans of 8 splits. A unit is a softmax of its own, relative to its maximum m:
//   s = q . k    p = 2^((s - m) scale)    l = sum p    o = sum p v      (scale = log2(e) / sqrt(D))
// on tensor cores, p in halves, sums in float. Units are merged in ascending order into their split, splits into their
// span, spans into the result, each time as
//   M' = max(M, m)    L' = L 2^((M - M') scale) + l 2^((m - M') scale)    O' likewise    and in the end O / L,
// except that a part without a key for the row (m = -infinity) changes nothing. So a row does not see whether its tile
// reaches further than itself, nor which kernel merges. Its weights of later keys are 0, and tensor cores add 0 times a
// finite value as nothing, however large the value.
//
// attend: blocks of 128 threads; a warp computes a unit, mma's 16 rows being the tile's. Keys and values go from memory
// to registers in the layout that mma wants, without shared memory, because which k an element of mma stands for is
// free: lane (g, t) loads dims 8 t .. 8 t + 7 of every 32 of a key, 16 bytes of halves, for two steps of k = 16. Column
// c of score tile j is key 8 (c / 2) + 2 j + c % 2, so that lane t holds the scores of keys 8 t .. 8 t + 7, 16 bytes of
// a transposed value.
// Whole (prefill): a block per (tile, key-value head), heaviest first, goes through all splits and writes out.
// Otherwise (few rows): a block takes items (split of a tile, key-value head) in turn and writes M, L and O to a
// workspace [items][2 * 16 + 16 D] floats, from which merge_splits computes out, and out in 8 bits for the following
// product (activations.cuh): a block per (row, 256 outputs), of 8 warps that merge a span each.
//
// With few rows, time is the longest chain of memory accesses. Everything that says where something is comes from the
// step, before wait_for_previous; after it, each kernel loads once: rope_append heads, attend queries, keys and values
// together, merge_splits a span's partial results.
#include "activations.cuh"

static constexpr int kPageTokens = 64;
static constexpr int kUnitKeys = 32;
static constexpr int kSplitUnits = 4;
static constexpr int kSplitKeys = kUnitKeys * kSplitUnits;
static constexpr int kSpanSplits = 8;
static constexpr int kTileRows = 16;
static constexpr int kAttendThreads = 32 * kSplitUnits;
static constexpr int kMergeWarps = 8;
static constexpr int kAppendThreads = 128;

struct alignas(8) Float2 {
  float x, y;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};

// Quotients by one number, rounded as div_ does (Markstein), without its branches: two corrections by the exact rest.
// Only for numbers so small that their rest underflows, below 2^-100, and signs of zeros it may differ.
struct Divisor {
  float by, inverse;

  MEMBER explicit Divisor(float x) : by(x), inverse(div_(1.0f, x)) {}
  MEMBER float divide(float x) const {
    float y = mul_(x, inverse);
    y = fma_(fma_(-y, by, x), inverse, y);
    return fma_(fma_(-y, by, x), inverse, y);
  }
};

// Floats quantized to signed numbers become halves of number * scale, rounded once.

// Byte `byte` of a word, less `zero`.
DEVICE float byte_to_float(uint32_t word, int byte, float zero) {
  // The bits of 2^23 + byte.
  return add_(bits_to_float(permute_bytes(word, 0x4b000000u, 0x7440u + byte)), -8388608.0f - zero);
}
DEVICE uint32_t scaled_bytes(uint32_t low, int low_byte, uint32_t high, int high_byte, float zero, float low_scale,
                             float high_scale) {
  return floats_to_halves(mul_(byte_to_float(low, low_byte, zero), low_scale),
                          mul_(byte_to_float(high, high_byte, zero), high_scale));
}

// For what is stored, and queries: the nearest number that is finite in halves and, being 127 * 512 and 8 * 8128, also
// as a number times a scale. NaN stays, so that a broken model shows.
DEVICE float bounded(float x) {
  const float largest = 65024.0f;
  return x > largest ? largest : x < -largest ? -largest : x;
}

// The neighbours of a token that is stored, among the rows of its step: `before`, the values of the token at the
// position before it, or null; `after`, whether the next token is there.
struct Neighbours {
  const float* before;
  bool after;
};

// A cache type stores element 32 `group` + lane of a head by a warp, and loads elements 8 t .. 8 t + 7 of 32 of a key
// (Key), and element `dim` of the values of eight tokens from `token` on, a multiple of eight (Values); `halves` of
// either come later. `keys` and so on are those of one page and head.

struct F16Cache {
  using Key = Word4;
  using Values = Word4;
  struct Scales {};
  static constexpr int kBits = 16;

  template <int D>
  DEVICE void store_key(uint8_t* keys, uint16_t*, int token, int group, int lane, float x) {
    reinterpret_cast<uint16_t*>(keys)[token * D + 32 * group + lane] = float_to_half(x);
  }
  template <int D>
  DEVICE void store_value(uint8_t* values, uint16_t*, int token, int group, int lane, float x, const Neighbours&) {
    reinterpret_cast<uint16_t*>(values)[(32 * group + lane) * kPageTokens + token] = float_to_half(x);
  }
  template <int D>
  DEVICE Key load_key(const uint8_t* keys, const uint16_t*, int token, int group, int t) {
    return load_word4(keys + 2 * (token * D + 32 * group + 8 * t));
  }
  DEVICE Word4 halves(const Key& key) { return key; }
  DEVICE Scales load_scales(const uint16_t*, int, int) { return {}; }
  DEVICE Values load_values(const uint8_t* values, int dim, int token) {
    return load_word4(values + 2 * (dim * kPageTokens + token));
  }
  DEVICE Word4 halves(const Values& values, const Scales&) { return values; }
};

// The value scales of eight tokens, and as floats.
struct TokenScales {
  Word4 halves;
};
struct Scales8 {
  float of[8];
};
DEVICE Scales8 floats(const TokenScales& scales) {
  const uint32_t pairs[4] = {scales.halves.x, scales.halves.y, scales.halves.z, scales.halves.w};
  Scales8 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.of[2 * i] = half_to_float(static_cast<uint16_t>(pairs[i]));
    out.of[2 * i + 1] = half_to_float(static_cast<uint16_t>(pairs[i] >> 16));
  }
  return out;
}

DEVICE float warp_max(float x) {
  for (int mask = 16; mask; mask /= 2) x = max_(x, shuffle_xor(x, mask));
  return x;
}
DEVICE float magnitude(float x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }

struct Q8Cache {
  struct Key {
    Word2 numbers;
    uint16_t scale;
  };
  using Values = Word2;
  using Scales = TokenScales;
  static constexpr int kBits = 8;

  // To the nearest number, halves away from zero, as ggml does. `scale`: of the warp's 32 elements.
  DEVICE int quantize(float x, float& scale) {
    scale = div_(warp_max(magnitude(x)), 127.0f);
    const float scaled = mul_(x, scale == 0.0f ? 0.0f : div_(1.0f, scale));
    const int even = round_(scaled);
    const float rest = add_(scaled, -static_cast<float>(even));
    return even + (rest == 0.5f && scaled > 0.0f) - (rest == -0.5f && scaled < 0.0f);
  }
  template <int D>
  DEVICE void store_key(uint8_t* keys, uint16_t* scales, int token, int group, int lane, float x) {
    float scale;
    keys[token * D + 32 * group + lane] = static_cast<uint8_t>(quantize(x, scale));
    if (lane == 0) scales[token * (D / 32) + group] = float_to_half(scale);
  }
  template <int D>
  DEVICE void store_value(uint8_t* values, uint16_t* scales, int token, int group, int lane, float x,
                          const Neighbours&) {
    float scale;
    values[(32 * group + lane) * kPageTokens + token] = static_cast<uint8_t>(quantize(x, scale));
    if (lane == 0) scales[group * kPageTokens + token] = float_to_half(scale);
  }
  // Signed bytes are read as unsigned ones, 128 too high.
  DEVICE Word4 to_halves(Word2 bytes, const float (&d)[8]) {
    const uint32_t low = bytes.x ^ 0x80808080u, high = bytes.y ^ 0x80808080u;
    return {scaled_bytes(low, 0, low, 1, 128.0f, d[0], d[1]), scaled_bytes(low, 2, low, 3, 128.0f, d[2], d[3]),
            scaled_bytes(high, 0, high, 1, 128.0f, d[4], d[5]), scaled_bytes(high, 2, high, 3, 128.0f, d[6], d[7])};
  }
  template <int D>
  DEVICE Key load_key(const uint8_t* keys, const uint16_t* scales, int token, int group, int t) {
    return {load_word2(keys + token * D + 32 * group + 8 * t), scales[token * (D / 32) + group]};
  }
  DEVICE Word4 halves(const Key& key) {
    const float d = half_to_float(key.scale);
    return to_halves(key.numbers, {d, d, d, d, d, d, d, d});
  }
  DEVICE Scales load_scales(const uint16_t* scales, int group, int token) {
    return {load_word4(scales + group * kPageTokens + token)};
  }
  DEVICE Values load_values(const uint8_t* values, int dim, int token) {
    return load_word2(values + dim * kPageTokens + token);
  }
  DEVICE Word4 halves(const Values& values, const Scales& scales) { return to_halves(values, floats(scales).of); }
};

struct Q4Cache {
  struct Key {
    uint32_t numbers;
    uint16_t scale;
  };
  using Values = uint32_t;
  using Scales = TokenScales;
  static constexpr int kBits = 4;

  // `scale`: of the warp's 32 elements.
  DEVICE int quantize(float x, int lane, float& scale) {
    // The first element of the largest magnitude.
    const uint32_t largest = vote(magnitude(x) == warp_max(magnitude(x)));
    scale = mul_(shuffle(x, count_bits((largest & (0u - largest)) - 1u) % 32), -0.125f);
    const float inverse = scale == 0.0f ? 0.0f : div_(1.0f, scale);
    return min_(15, static_cast<int>(add_(mul_(x, inverse), 8.5f)));
  }
  template <int D>
  DEVICE void store_key(uint8_t* keys, uint16_t* scales, int token, int group, int lane, float x) {
    float scale;
    const int low = quantize(x, lane, scale), high = shuffle_xor(low, 1);
    if (lane % 2 == 0) keys[(token * D + 32 * group + lane) / 2] = static_cast<uint8_t>(low | high << 4);
    if (lane == 0) scales[token * (D / 32) + group] = float_to_half(scale);
  }
  // Two tokens share a byte: of two in one step the second writes it.
  template <int D>
  DEVICE void store_value(uint8_t* values, uint16_t* scales, int token, int group, int lane, float x,
                          const Neighbours& neighbours) {
    uint8_t* byte = values + (32 * group + lane) * (kPageTokens / 2) + token / 2;
    float scale;
    const int number = quantize(x, lane, scale);
    if (lane == 0) scales[group * kPageTokens + token] = float_to_half(scale);
    if (token % 2 == 0) {
      if (!neighbours.after) *byte = static_cast<uint8_t>(number);
    } else {
      float scale_before;
      const int low =
          neighbours.before ? quantize(bounded(neighbours.before[32 * group + lane]), lane, scale_before) : *byte & 15;
      *byte = static_cast<uint8_t>(low | number << 4);
    }
  }
  DEVICE Word4 to_halves(uint32_t bytes, const float (&d)[8]) {
    const uint32_t even = bytes & 0x0f0f0f0fu, odd = bytes >> 4 & 0x0f0f0f0fu;
    return {scaled_bytes(even, 0, odd, 0, 8.0f, d[0], d[1]), scaled_bytes(even, 1, odd, 1, 8.0f, d[2], d[3]),
            scaled_bytes(even, 2, odd, 2, 8.0f, d[4], d[5]), scaled_bytes(even, 3, odd, 3, 8.0f, d[6], d[7])};
  }
  template <int D>
  DEVICE Key load_key(const uint8_t* keys, const uint16_t* scales, int token, int group, int t) {
    return {load_word(keys + (token * D + 32 * group + 8 * t) / 2), scales[token * (D / 32) + group]};
  }
  DEVICE Word4 halves(const Key& key) {
    const float d = half_to_float(key.scale);
    return to_halves(key.numbers, {d, d, d, d, d, d, d, d});
  }
  DEVICE Scales load_scales(const uint16_t* scales, int group, int token) {
    return {load_word4(scales + group * kPageTokens + token)};
  }
  DEVICE Values load_values(const uint8_t* values, int dim, int token) {
    return load_word(values + (dim * kPageTokens + token) / 2);
  }
  DEVICE Word4 halves(const Values& values, const Scales& scales) { return to_halves(values, floats(scales).of); }
};

// A page of one head: bytes of its keys or values, and how many scales they have.
template <int D, class Cache>
static constexpr int kPageBytes = kPageTokens * D * Cache::kBits / 8;
template <int D>
static constexpr int kPageScales = kPageTokens * D / 32;

// ---- Storing

// How one head of one row is normalized and rotated, by a warp: lane has elements 32 i + lane.
template <int D>
struct Rotation {
  int other[D / 32];  // the element of the pair
  float weight[D / 32], cos[D / 32], sin[D / 32];
  bool normed;

  // norm: [D], or null. cosines, sines: of the row's position. Pairs: (i, i + rope_dim / 2) if neox, else (2 i,
  // 2 i + 1).
  MEMBER void load(const float* norm, const float* cosines, const float* sines, int rope_dim, bool neox, int lane) {
    normed = norm != nullptr;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const int e = 32 * i + lane, half = rope_dim / 2;
      const bool second = neox ? e >= half : e % 2 != 0;
      other[i] = neox ? (second ? e - half : e + half) : e ^ 1;
      const int angle = neox ? (second ? other[i] : e) : e / 2;
      if (e < rope_dim) {
        cos[i] = cosines[angle];
        sin[i] = second ? sines[angle] : -sines[angle];
      }
      weight[i] = normed ? norm[e] : 1.0f;
    }
  }

  // x[i] = element 32 i + lane. head: D floats of shared memory.
  MEMBER void apply(float eps, int rope_dim, int lane, float* head, float (&x)[D / 32]) const {
    if (normed) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < D / 32; ++i) squares = fma_(x[i], x[i], squares);
#pragma unroll
      for (int mask = 16; mask; mask /= 2) squares = add_(squares, shuffle_xor(squares, mask));
      const Divisor root(sqrt_(add_(div_(squares, static_cast<float>(D)), eps)));
#pragma unroll
      for (int i = 0; i < D / 32; ++i) x[i] = mul_(root.divide(x[i]), weight[i]);
    }
#pragma unroll
    for (int i = 0; i < D / 32; ++i) head[32 * i + lane] = x[i];
    sync_warp();
#pragma unroll
    for (int i = 0; i < D / 32; ++i)
      if (32 * i + lane < rope_dim) x[i] = fma_(x[i], cos[i], mul_(head[other[i]], sin[i]));
  }
};

// A block per (row, 4 heads of qkv), of a warp each: queries to q in halves, keys and values to the cache. q_norm,
// k_norm [D] or null. cos, sin: float [positions, rope_dim / 2].
template <int D, class Cache>
KERNEL(kAppendThreads, 4)
rope_append(const int* step, const int* positions, const int* cells, const float* qkv, const float* q_norm,
            const float* k_norm, float eps, const float* cos, const float* sin, int rope_dim, int neox, int n_head,
            int n_kv_head, uint16_t* q, uint8_t* keys, uint8_t* values, uint16_t* key_scales, uint16_t* value_scales) {
  launch_next();
  const int lane = threadIdx.x % 32, n_heads = n_head + 2 * n_kv_head;
  const int row = blockIdx.x, head = blockIdx.y * (kAppendThreads / 32) + threadIdx.x / 32;
  const int n_rows = step[0], position = positions[row], cell = cells[row];
  // Of the rows in the same byte, for values in 4 bits.
  const bool before = Cache::kBits == 4 && row > 0 && cells[row - 1] == cell - 1;
  const bool after = Cache::kBits == 4 && row + 1 < gridDim.x && row + 1 < n_rows && cells[row + 1] == cell + 1;
  Rotation<D> rotation;
  if (head < n_head + n_kv_head) {
    const int64_t at = static_cast<int64_t>(row < n_rows ? position : 0) * (rope_dim / 2);
    rotation.load(head < n_head ? q_norm : k_norm, cos + at, sin + at, rope_dim, neox != 0, lane);
  }
  wait_for_previous();
  if (row >= n_rows || head >= n_heads) return;

  const float* from = qkv + (static_cast<int64_t>(row) * n_heads + head) * D;
  float x[D / 32];
#pragma unroll
  for (int i = 0; i < D / 32; ++i) x[i] = from[32 * i + lane];
  __shared__ float rotated[kAppendThreads / 32][D];
  if (head < n_head + n_kv_head) rotation.apply(eps, rope_dim, lane, rotated[threadIdx.x / 32], x);
#pragma unroll
  for (int i = 0; i < D / 32; ++i) x[i] = bounded(x[i]);
  if (head < n_head) {
    uint16_t* to = q + (static_cast<int64_t>(row) * n_head + head) * D;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) to[32 * i + lane] = float_to_half(x[i]);
    return;
  }
  const int token = cell % kPageTokens, kv_head = (head - n_head) % n_kv_head;
  const int64_t page = static_cast<int64_t>(cell / kPageTokens) * n_kv_head + kv_head;
  if (head < n_head + n_kv_head) {
    uint8_t* to = keys + page * kPageBytes<D, Cache>;
    uint16_t* scales = key_scales + page * kPageScales<D>;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) Cache::template store_key<D>(to, scales, token, i, lane, x[i]);
  } else {
    const Neighbours neighbours = {before ? from - static_cast<int64_t>(n_heads) * D : nullptr, after};
    uint8_t* to = values + page * kPageBytes<D, Cache>;
    uint16_t* scales = value_scales + page * kPageScales<D>;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) Cache::template store_value<D>(to, scales, token, i, lane, x[i], neighbours);
  }
}

// ---- Attention

// What is known of a row after some of its keys: the greatest score, the sum of weights, and n of the outputs, both
// relative to that score.
template <int n>
struct Partial {
  float m, l, o[n];

  MEMBER void clear() {
    m = -kInfinity;
    l = 0.0f;
#pragma unroll
    for (int i = 0; i < n; ++i) o[i] = 0.0f;
  }
  // The only place where parts come together. Without branches, so that the loads of several parts go together.
  MEMBER void merge(float m_, float l_, const float (&o_)[n], float scale) {
    const bool any = m_ != -kInfinity;
    const float top = max_(m, m_);
    const float mine = exp2_(mul_(add_(m, -top), scale)), other = exp2_(mul_(add_(m_, -top), scale));
    m = any ? top : m;
    l = any ? fma_(l_, other, mul_(l, mine)) : l;
#pragma unroll
    for (int i = 0; i < n; ++i) o[i] = any ? fma_(o_[i], other, mul_(o[i], mine)) : o[i];
  }
  MEMBER void merge(const Partial& part, float scale) { merge(part.m, part.l, part.o, scale); }
};

// Of a split in the workspace.
template <int D>
static constexpr int kPartialFloats = kTileRows * (2 + D);

// A layer's cache, of one head.
struct Cells {
  const uint8_t *keys, *values;
  const uint16_t *key_scales, *value_scales;
};

// A tile, or one of its splits.
struct Work {
  int row;           // the chunk's first
  int first;         // flattened query head of the tile, a multiple of 16
  int count;         // heads of the tile
  int start;         // position of `row`
  int last;          // position of the tile's last row
  int which;         // a tile's slot, a split's index
  int page0, page1;  // of the split's keys

  MEMBER explicit Work(const int* record) {
    const Word4 a = load_word4(record), b = load_word4(record + 4);
    row = static_cast<int>(a.x), first = static_cast<int>(a.y), count = static_cast<int>(a.z);
    start = static_cast<int>(a.w), last = static_cast<int>(b.x), which = static_cast<int>(b.y);
    page0 = static_cast<int>(b.z), page1 = static_cast<int>(b.w);
  }
};
static constexpr int kWorkInts = 8;

// Shared memory of a block of attend: o of each warp's unit, in rows of D + 8 against bank conflicts, then m and l.
template <int D>
struct Units {
  static constexpr int kStride = D + 8;
  float o[kSplitUnits][kTileRows][kStride];
  float m[kSplitUnits][kTileRows], l[kSplitUnits][kTileRows];
};

// A warp's rows of the tile: g and g + 8. Elements 8 t .. 8 t + 7 of every 32; position -1: no row.
template <int D>
struct Queries {
  Word4 q[D / 32][2];
  int position[2], at[2];

  MEMBER Queries(const Work& work, int group, int kv_head, int n_head, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int place = lane / 4 + 8 * r, i = (work.first + place) / group, g = work.first + place - i * group;
      position[r] = place < work.count ? work.start + i : -1;
      at[r] = ((work.row + i) * n_head + kv_head * group + g) * D + 8 * (lane % 4);
    }
  }
  MEMBER void load(const uint16_t* from) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < D / 32; ++i)
        q[i][r] = position[r] >= 0 ? load_word4(from + at[r] + 32 * i) : Word4{0, 0, 0, 0};
  }
};

// The unit of keys first .. first + 31, which start at `token` of the page of `cells`, by one warp; last: of the tile.
// Early: all keys and values are under way before the first is needed, for more registers.
template <int D, class Cache, bool Early>
DEVICE void attend_unit(const Queries<D>& queries, const Cells& cells, int first, int token, int last, float scale,
                        int lane, Units<D>& units, int unit) {
  const int g = lane / 4, t = lane % 4;
  auto load_key = [&](int i, int j) {
    return Cache::template load_key<D>(cells.keys, cells.key_scales, token + 8 * (g / 2) + 2 * j + g % 2, i, t);
  };
  auto load_scales = [&](int i) { return Cache::load_scales(cells.value_scales, i, token + 8 * t); };
  auto load_values = [&](int i, int n) {
    return Cache::load_values(cells.values, 32 * i + 8 * n + g, token + 8 * t);
  };
  typename Cache::Key keys[D / 32][4];
  typename Cache::Values values[D / 32][4];
  typename Cache::Scales scales[D / 32];
  if constexpr (Early) {
#pragma unroll
    for (int i = 0; i < D / 32; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) keys[i][j] = load_key(i, j);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      scales[i] = load_scales(i);
#pragma unroll
      for (int n = 0; n < 4; ++n) values[i][n] = load_values(i, n);
    }
    // No load is put off beyond this.
    sync_warp();
  }

  float s[4][4] = {};
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    const Word4(&q)[2] = queries.q[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (!Early) keys[i][j] = load_key(i, j);
      const Word4 k = Cache::halves(keys[i][j]);
      mma_f16_k16(s[j], {q[0].x, q[1].x, q[0].y, q[1].y}, {k.x, k.y});
      mma_f16_k16(s[j], {q[0].z, q[1].z, q[0].w, q[1].w}, {k.z, k.w});
    }
  }

  uint32_t p[4][2];  // [score tile][row]
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float m = -kInfinity;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& score = s[j][2 * r + c];
        score = first + 8 * t + 2 * j + c > queries.position[r] ? -kInfinity : score;
        m = max_(m, score);
      }
    m = max_(m, shuffle_xor(m, 1));
    m = max_(m, shuffle_xor(m, 2));
    const float base = m == -kInfinity ? 0.0f : m;
    float l = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float p0 = exp2_(mul_(add_(s[j][2 * r], -base), scale));
      const float p1 = exp2_(mul_(add_(s[j][2 * r + 1], -base), scale));
      l = add_(add_(l, p0), p1);
      p[j][r] = floats_to_halves(p0, p1);
    }
    l = add_(l, shuffle_xor(l, 1));
    l = add_(l, shuffle_xor(l, 2));
    if (t == 0) {
      units.m[unit][g + 8 * r] = m;
      units.l[unit][g + 8 * r] = l;
    }
  }

  // Values beyond the tile's last key are cleared: 0 * NaN is not 0.
  uint32_t live[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int beyond = last - (first + 8 * t + 2 * w);
    live[w] = beyond > 0 ? 0xffffffffu : beyond == 0 ? 0x0000ffffu : 0u;
  }
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    if constexpr (!Early) scales[i] = load_scales(i);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if constexpr (!Early) values[i][n] = load_values(i, n);
      const Word4 v = Cache::halves(values[i][n], scales[i]);
      float o[4] = {};
      mma_f16_k16(o, {p[0][0], p[0][1], p[1][0], p[1][1]}, {v.x & live[0], v.y & live[1]});
      mma_f16_k16(o, {p[2][0], p[2][1], p[3][0], p[3][1]}, {v.z & live[2], v.w & live[3]});
      const int column = 32 * i + 8 * n + 2 * t;
      *reinterpret_cast<Float2*>(&units.o[unit][g][column]) = {o[0], o[1]};
      *reinterpret_cast<Float2*>(&units.o[unit][g + 8][column]) = {o[2], o[3]};
    }
  }
}

// One split of a tile by a block: thread i gets row i / 8, outputs 32 j + 4 (i % 8) .. + 3 as part.o[4 j] ...
// cell: page * KVH + key-value head of the warp's unit, if it has one.
template <int D, class Cache, bool Early>
DEVICE void attend_split(const Queries<D>& queries, const Cells& layer, int cell, int last, int split, float scale,
                         Units<D>& units, Partial<D / 8>& part) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = split * kSplitKeys + warp * kUnitKeys;
  if (first <= last) {
    const int64_t bytes = static_cast<int64_t>(cell) * kPageBytes<D, Cache>;
    const int64_t scales = static_cast<int64_t>(cell) * kPageScales<D>;
    const Cells cells = {layer.keys + bytes, layer.values + bytes, layer.key_scales + scales,
                         layer.value_scales + scales};
    attend_unit<D, Cache, Early>(queries, cells, first, first % kPageTokens, last, scale, lane, units, warp);
  }
  sync_block();
  const int row = threadIdx.x / 8, n_units = min_(kSplitUnits, (last - split * kSplitKeys) / kUnitKeys + 1);
  part.clear();
#pragma unroll
  for (int u = 0; u < kSplitUnits; ++u) {
    float o[D / 8];
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const Float4 x = *reinterpret_cast<const Float4*>(&units.o[u][row][32 * i + 4 * (threadIdx.x % 8)]);
      o[4 * i] = x.x, o[4 * i + 1] = x.y, o[4 * i + 2] = x.z, o[4 * i + 3] = x.w;
    }
    part.merge(u < n_units ? units.m[u][row] : -kInfinity, units.l[u][row], o, scale);
  }
  sync_block();
}

// work: a tile each if Whole, else a split.
template <int D, class Cache, bool Whole>
KERNEL(kAttendThreads, Whole && D <= 128 ? 4 : 2)
attend(const int* step, const int* work, const int* pages, int max_pages, const uint16_t* q, const uint8_t* keys,
       const uint8_t* values, const uint16_t* key_scales, const uint16_t* value_scales, int n_head, int n_kv_head,
       float scale, float* workspace, float* out) {
  launch_next();
  DYNAMIC_SHARED(shared);
  Units<D>& units = *reinterpret_cast<Units<D>*>(shared);
  const Cells layer = {keys, values, key_scales, value_scales};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = n_head / n_kv_head;
  const int row = threadIdx.x / 8, column = 4 * (threadIdx.x % 8);
  const int n_work = step[2];
  Partial<D / 8> part;
  if constexpr (Whole) {
    const int j = n_work - 1 - static_cast<int>(blockIdx.x), kv_head = blockIdx.y;
    const Work tile(work + kWorkInts * max_(0, j));
    Queries<D> queries(tile, group, kv_head, n_head, lane);
    const int* page = pages + tile.which * max_pages + warp / (kPageTokens / kUnitKeys);
    wait_for_previous();
    if (j < 0) return;
    queries.load(q);
    Partial<D / 8> total, span;
    total.clear();
    span.clear();
    const int n_splits = tile.last / kSplitKeys + 1;
    for (int split = 0; split < n_splits; ++split) {
      const bool some = split * kSplitKeys + warp * kUnitKeys <= tile.last;
      const int cell = (some ? page[split * (kSplitKeys / kPageTokens)] : 0) * n_kv_head + kv_head;
      attend_split<D, Cache, false>(queries, layer, cell, tile.last, split, scale, units, part);
      span.merge(part, scale);
      if (split % kSpanSplits == kSpanSplits - 1 || split == n_splits - 1) {
        total.merge(span, scale);
        span.clear();
      }
    }
    if (row < tile.count) {
      const Divisor sum(total.l);
      const int f = tile.first + row;
      const int64_t to = static_cast<int64_t>(tile.row + f / group) * n_head + kv_head * group + f % group;
#pragma unroll
      for (int i = 0; i < D / 32; ++i)
        *reinterpret_cast<Float4*>(out + to * D + 32 * i + column) = {
            sum.divide(total.o[4 * i]), sum.divide(total.o[4 * i + 1]), sum.divide(total.o[4 * i + 2]),
            sum.divide(total.o[4 * i + 3])};
    }
  } else {
    const int n_items = n_work * n_kv_head;
    auto cell_of = [&](const Work& split, int kv_head) {
      return (warp < kPageTokens / kUnitKeys ? split.page0 : split.page1) * n_kv_head + kv_head;
    };
    int item = blockIdx.x;
    Work split(work + kWorkInts * (item / n_kv_head));
    Queries<D> queries(split, group, item % n_kv_head, n_head, lane);
    int cell = cell_of(split, item % n_kv_head);
    // Always so where there is an item; asked lest a compiler put the arithmetic off until after the wait.
    if (queries.position[0] >= -1 && queries.position[1] >= -1 && queries.at[0] >= 0 && queries.at[1] >= 0 && cell >= 0)
      wait_for_previous();
    while (item < n_items) {
      queries.load(q);
      attend_split<D, Cache, D <= 128>(queries, layer, cell, split.last, split.which, scale, units, part);
      if (row < split.count) {
        float* to = workspace + static_cast<int64_t>(item) * kPartialFloats<D>;
        if (column == 0) *reinterpret_cast<Float2*>(to + 2 * row) = {part.m, part.l};
        to += 2 * kTileRows + row * D + column;
#pragma unroll
        for (int i = 0; i < D / 32; ++i)
          *reinterpret_cast<Float4*>(to + 32 * i) = {part.o[4 * i], part.o[4 * i + 1], part.o[4 * i + 2],
                                                     part.o[4 * i + 3]};
      }
      item += gridDim.x;
      if (item >= n_items) break;
      split = Work(work + kWorkInts * (item / n_kv_head));
      queries = Queries<D>(split, group, item % n_kv_head, n_head, lane);
      cell = cell_of(split, item % n_kv_head);
    }
  }
}

// out[row] = the splits of the workspace merged, and its 8-bit form. A block per (row, 256 outputs), a lane has eight
// of them. out: null where only the 8-bit form is wanted. Rows that no tile covers become zeros.
template <int D>
KERNEL(32 * kMergeWarps, 1)
merge_splits(const int* step, const int* positions, const int* heads, const float* workspace, int n_head,
             int n_kv_head, float scale, float* out, int8_t* q, float* q_scale, int16_t* q_sums) {
  launch_next();
  DYNAMIC_SHARED(shared);
  Partial<8>* spans = reinterpret_cast<Partial<8>*>(shared);  // [warp][lane]
  const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = n_head / n_kv_head;
  const int at = blockIdx.y * kActivationGroup + 8 * lane, head = at / D;
  const int n_rows = step[0], n_splits = positions[row] / kSplitKeys + 1, n_spans = ceil_div(n_splits, kSpanSplits);
  const int place = head < n_head ? heads[row * group + head % group] : -1;
  const bool mine = place >= 0;
  // The workspace has fewer than 2^31 floats.
  const int stride = n_kv_head * kPartialFloats<D>, row_of_tile = place % kTileRows;
  const int from = place / kTileRows * stride + head / group * kPartialFloats<D>;
  const int from_ml = from + 2 * row_of_tile, from_o = from + 2 * kTileRows + row_of_tile * D + at % D;
  wait_for_previous();
  if (row >= n_rows) return;

  Partial<8> total;
  total.clear();
  for (int first = 0; first < n_spans; first += kMergeWarps) {
    Partial<8> span;
    span.clear();
    const int split0 = (first + warp) * kSpanSplits;
    if (mine && split0 < n_splits) {
      // Loads of the whole span are under way before the first of them is needed.
      Float2 ml[kSpanSplits];
      float o[kSpanSplits][8];
#pragma unroll
      for (int i = 0; i < kSpanSplits; ++i) {
        const int split = min_(split0 + i, n_splits - 1) * stride;
        ml[i] = *reinterpret_cast<const Float2*>(workspace + (from_ml + split));
        load_floats(workspace + (from_o + split), o[i]);
      }
#pragma unroll
      for (int i = 0; i < kSpanSplits; ++i)
        span.merge(split0 + i < n_splits ? ml[i].x : -kInfinity, ml[i].y, o[i], scale);
    }
    if (n_spans > 1) {
      if (warp > 0) spans[threadIdx.x] = span;
      sync_block();
    }
    if (warp == 0) {
      total.merge(span, scale);
      for (int w = 1; w < min_(kMergeWarps, n_spans - first); ++w) total.merge(spans[32 * w + lane], scale);
    }
    if (first + kMergeWarps < n_spans) sync_block();
  }
  if (warp > 0) return;
  const Divisor sum(total.l);
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = mine ? sum.divide(total.o[i]) : 0.0f;
  const int width = n_head * D;
  if (out && at < width) store_floats(out + static_cast<int64_t>(row) * width + at, x);
  const int64_t to = static_cast<int64_t>(row) * ceil_div(width, kActivationGroup) + blockIdx.y;
  quantize_group(x, lane, q + to * kActivationGroup, q_scale + to, q_sums + to * kActivationSums);
}

// ---- Pages

// In each layer (blockIdx.z) of a pool, page pairs[2 i + 1] = page pairs[2 i] for pair i = blockIdx.y. Sizes in words
// of 16 bytes. No page is both a source and a target.
KERNEL(256, 1)
copy_pages(uint8_t* pool, int layer_words, int page_words, const int* pairs) {
  launch_next();
  wait_for_previous();
  const int word = blockIdx.x * 256 + threadIdx.x;
  if (word >= page_words) return;
  Word4* layer = reinterpret_cast<Word4*>(pool) + static_cast<int64_t>(blockIdx.z) * layer_words;
  const int source = pairs[2 * blockIdx.y], target = pairs[2 * blockIdx.y + 1];
  layer[static_cast<int64_t>(target) * page_words + word] = layer[static_cast<int64_t>(source) * page_words + word];
}
