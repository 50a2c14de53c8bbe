"""Launching matmul.cu: products of tiled matrices, plain or stacked by expert, with rows of activations.

Invariant: how a matrix's products are summed (`n_splits`) is a function of its shape alone, so that the rows of a step,
the device and the launch change no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from shared.kernels.activations import Activations
from shared.kernels.device import Buffer, Device, Kernel
from shared.kernels.experts import Groups
from shared.kernels.weights import Codec, Tiles

THREADS = 256
COLUMNS = (8, 16, 32, 64)
"""Rows of activations that one work item takes, as compiled."""

_WARPS = 8
_RING_BYTES = 82 * 1024
_FULL = 1024
"""Warps that keep a GPU's memory busy."""


def columns_for(n_rows: int) -> int:
    """The smallest of COLUMNS that holds so many rows at a time, or the largest."""
    return next((columns for columns in COLUMNS if n_rows <= columns), COLUMNS[-1])


def shared_bytes(codecs: Sequence[Codec], columns: int) -> int:
    """Dynamic shared memory of a block: `Layout::kShared` in matmul.cu."""
    stage = 16 * max(codec.bytes for codec in codecs)
    stages = min(6, max(2, _RING_BYTES // (_WARPS * stage)))
    return _WARPS * stages * stage + _WARPS * columns * 4 + _WARPS * columns // 8 * 4 * 32 * 4


def matmul_name(matrices: Sequence[Tiles], columns: int) -> str:
    """The instance of `matmul` for up to three matrices below each other."""
    names = [matrix.codec.struct for matrix in matrices]
    names += names[-1:] * (3 - len(names))
    return f"matmul<{', '.join(names)}, {columns}>"


def gate_up_name(gate: Tiles, up: Tiles, columns: int) -> str:
    """The instance of `gate_up` for two matrices."""
    return f"gate_up<{gate.codec.struct}, {up.codec.struct}, {columns}>"


def matmul(
    device: Device,
    matrices: Sequence[Tiles],
    groups: Groups,
    x: Activations,
    floats: Buffer | None,
    out: Buffer,
    *,
    n_used: int = 0,
) -> None:
    """out[pair] = W x[pair], for every pair of `groups`.

    Args:
        matrices: one to three, [rows, k] each, that stand below each other; of a stack the pair's expert.
        groups: which pairs go through which matrix of the stack.
        x: quantized rows, one per pair.
        floats: the rows as float32 [rows, k], needed where a matrix has a dense type.
        out: float32 [pairs, sum of rows].
        n_used: matrices of the stack that one row takes; 0: a plain matrix.
    """
    first, *more = [(matrix.buffer, matrix.n_rows) for matrix in matrices] + [(None, 0)] * (3 - len(matrices))
    tiles = sum(ceil(matrix.n_rows / 16) for matrix in matrices)
    splits = n_splits(tiles * max(1, n_used), min(matrix.n_blocks for matrix in matrices), 8)
    bundles = ceil(tiles * splits / _WARPS)
    kernel = device.kernel("matmul.cu", matmul_name(matrices, groups.rows_per_group))
    shared = shared_bytes([matrix.codec for matrix in matrices], groups.rows_per_group)
    device.launch(
        kernel,
        (_grid(device, kernel, groups.max_groups * bundles, shared),),
        THREADS,
        [
            *(groups.table, groups.pairs, groups.max_groups, 1, int(n_used > 0)),
            *(x.q, x.scale, x.sums, floats, matrices[0].k),
            *(*first, *more[0], *more[1]),
            *(splits, out, sum(matrix.n_rows for matrix in matrices)),
        ],
        shared,
    )


def gate_up(
    device: Device,
    gate: Tiles,
    up: Tiles,
    groups: Groups,
    x: Activations,
    floats: Buffer | None,
    out: Buffer,
    *,
    n_used: int = 0,
) -> None:
    """out[pair] = silu(gate x[row]) * (up x[row]), where pair = row * max(1, n_used) + slot.

    Args: as of `matmul`; out: float32 [pairs, gate.n_rows].
    """
    tiles = ceil(gate.n_rows / 16)
    splits = n_splits(2 * tiles * max(1, n_used), min(gate.n_blocks, up.n_blocks), 4)
    bundles = ceil(tiles * 2 * splits / _WARPS)
    kernel = device.kernel("matmul.cu", gate_up_name(gate, up, groups.rows_per_group))
    shared = shared_bytes([gate.codec, up.codec], groups.rows_per_group)
    device.launch(
        kernel,
        (_grid(device, kernel, groups.max_groups * bundles, shared),),
        THREADS,
        [
            *(groups.table, groups.pairs, groups.max_groups, max(1, n_used), int(n_used > 0)),
            *(x.q, x.scale, x.sums, floats, gate.k),
            *(gate.buffer, up.buffer, gate.n_rows, splits, out, gate.n_rows),
        ],
        shared,
    )


def n_splits(tiles: int, n_blocks: int, most: int) -> int:
    """How many warps share a tile's row: enough of them to keep a GPU busy when one row is computed.

    tiles: row tiles that one row of activations meets. n_blocks: superblocks of a row. most: a power of two.
    """
    splits = 1
    while splits < min(most, n_blocks) and tiles * splits < _FULL:
        splits *= 2
    return min(splits, most)


def _grid(device: Device, kernel: Kernel, n_items: int, shared: int) -> int:
    return min(n_items, device.n_multiprocessors * max(1, device.blocks_per_multiprocessor(kernel, THREADS, shared)))
