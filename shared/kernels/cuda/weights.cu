// Quantized matrices on the device: from a GGUF's rows to tiles, and back to floats.
//
// A matrix of n_rows x k becomes "tiles", [row tile][superblock][16 rows][kBytes]: rows go in tiles of 16, the last one
// filled up with rows of zeros, and a row in n_blocks = ceil(k / kElements) superblocks, the last one filled up with
// zeros. A warp that multiplies a tile thus reads contiguous memory. A stack of matrices (experts) lies one after the
// other, each filled up by itself.
//
// repack<Codec>             source [n_matrices, n_rows, row_bytes] as in the GGUF, at least 2-byte aligned -> tiles;
//                           grid (ceil(padded rows * n_blocks / 256), n_matrices)
// dequantize<Codec>         tiles -> out [n_matrices, n_rows, k] float by Codec::value; grid (n_rows, n_matrices)
// dequantize_groups<Codec>  the same through Codec::Row, as products read it: the same floats; not for dense types
// embed<Codec>              x[row] = row tokens[row] of a matrix, or chosen[row] where that is negative, for
//                           row < step[0]; x [grid, k] float; grid (rows)
// All in blocks of 256 threads.
#include "codecs/all.cuh"

static constexpr int kThreads = 256;
static constexpr int kTileRows = 16;

// Superblock `block` of row `row` of a matrix; rows count through a stack of matrices with the rows that fill them up.
template <class Codec>
DEVICE int64_t place(int64_t row, int block, int n_blocks) {
  return ((row / kTileRows * n_blocks + block) * kTileRows + row % kTileRows) * Codec::kBytes;
}

// Row `row` of matrix blockIdx.y, counted like that.
DEVICE int64_t stacked_row(int row, int n_rows) {
  return static_cast<int64_t>(blockIdx.y) * (ceil_div(n_rows, kTileRows) * kTileRows) + row;
}

template <class Codec>
KERNEL(256, 1)
repack(const uint8_t* source, uint8_t* out, int n_rows, int row_bytes) {
  wait_for_previous();
  launch_next();
  const int n_blocks = ceil_div(row_bytes, Codec::kSourceBytes);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = at / kTileRows / n_blocks * kTileRows + at % kTileRows;
  if (row >= ceil_div(n_rows, kTileRows) * kTileRows) return;
  const int block = static_cast<int>(at / kTileRows % n_blocks), offset = block * Codec::kSourceBytes;
  uint8_t* to = out + place<Codec>(stacked_row(static_cast<int>(row), n_rows), block, n_blocks);
  const int n_bytes = row < n_rows ? min_(Codec::kSourceBytes, row_bytes - offset) : 0;
  const uint8_t* from = source + (static_cast<int64_t>(blockIdx.y) * n_rows + row) * row_bytes + offset;
  alignas(4) uint8_t filled[Codec::kSourceBytes];
  if (n_bytes < Codec::kSourceBytes) {
    for (int i = 0; i < Codec::kSourceBytes; ++i) filled[i] = i < n_bytes ? from[i] : 0;
    from = filled;
  }
  Codec::repack(from, to);
}

// One row's floats, by the threads of a block.
template <class Codec>
DEVICE void decode_row(const uint8_t* tiles, int64_t row, int k, float* out) {
  const int n_blocks = ceil_div(k, Codec::kElements);
  for (int i = threadIdx.x; i < k; i += kThreads)
    out[i] = Codec::value(tiles + place<Codec>(row, i / Codec::kElements, n_blocks), i % Codec::kElements);
}

template <class Codec>
KERNEL(256, 1)
dequantize(const uint8_t* tiles, float* out, int n_rows, int k) {
  wait_for_previous();
  launch_next();
  const int row = blockIdx.x;
  decode_row<Codec>(tiles, stacked_row(row, n_rows), k, out + (static_cast<int64_t>(blockIdx.y) * n_rows + row) * k);
}

// Lane t's elements of groups S and up of one superblock, whose first n floats exist in `out`.
template <class Codec, int S>
DEVICE void decode_groups(const typename Codec::Row& row, int t, float* out, int n) {
  constexpr int kWords = Codec::kGroup / 16;
  uint32_t a[kWords];
  row.template group<S>(t, a);
  for (int i = 0; i < 4 * kWords; ++i) {
    int at = S * Codec::kGroup + t * 4 * kWords + i;
    float q = static_cast<float>(static_cast<int8_t>(a[i / 4] >> i % 4 * 8)), value;
    if constexpr (Codec::kFloatScale)
      value = mul_(row.scale(S), q);
    else
      value = mul_(mul_(row.d, static_cast<float>(row.scale(S))), q);
    if constexpr (Codec::kMinimum)
      value = add_(value, -mul_(row.dmin, static_cast<float>(row.minimum_bytes[S / 4] >> S % 4 * 8 & 255)));
    if (at < n) out[at] = value;
  }
  if constexpr ((S + 1) * Codec::kGroup < Codec::kElements) decode_groups<Codec, S + 1>(row, t, out, n);
}

template <class Codec>
KERNEL(256, 1)
dequantize_groups(const uint8_t* tiles, float* out, int n_rows, int k) {
  wait_for_previous();
  launch_next();
  const int row = blockIdx.x, n_blocks = ceil_div(k, Codec::kElements);
  out += (static_cast<int64_t>(blockIdx.y) * n_rows + row) * k;
  for (int i = threadIdx.x; i < 4 * n_blocks; i += kThreads) {
    const int block = i / 4, first = block * Codec::kElements;
    const typename Codec::Row decoded(tiles + place<Codec>(stacked_row(row, n_rows), block, n_blocks));
    decode_groups<Codec, 0>(decoded, i % 4, out + first, k - first);
  }
}

template <class Codec>
KERNEL(256, 1)
embed(const int* step, const int* tokens, const int* chosen, const uint8_t* tiles, float* x, int k) {
  wait_for_previous();
  launch_next();
  const int row = blockIdx.x;
  if (row >= step[0]) return;
  const int token = tokens[row] < 0 ? chosen[row] : tokens[row];
  decode_row<Codec>(tiles, token, k, x + static_cast<int64_t>(row) * k);
}
