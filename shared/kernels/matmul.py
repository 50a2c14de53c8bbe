"""Launching matmul.cu: products of tiled matrices, plain or stacked by expert, with rows of activations.

Invariant: how a matrix's products are summed (`n_splits`) is a function of its shape alone, so that the rows of a step,
the device and the launch change no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from shared.kernels.activations import GROUP, SUMS, Activations
from shared.kernels.device import Argument, Buffer, Device
from shared.kernels.experts import Groups
from shared.kernels.weights import Codec, Tiles

THREADS = 256
COLUMNS = (8, 16, 32, 64)
"""Rows of activations that one work item takes, as compiled."""

_WARPS = 8
_MOST_SHARED = 99 * 1024 - 16
_MOST_QUANTIZED = 2048
"""Longest rows that are quantized by every block that needs them."""
_FULL = 1024
"""Warps that keep a GPU's memory busy."""


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Rows of a plain matrix: `count` int32 [1] of them on the device, `max_rows` at most."""

    count: Buffer
    max_rows: int

    @property
    def rows_per_group(self) -> int:
        return columns_for(self.max_rows)

    @property
    def max_groups(self) -> int:
        return ceil(self.max_rows / self.rows_per_group)


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Rows of a stack's matrices: `groups` of the pass whose number is `number`, int32 [1] on the device.

    The groups must have been selected in a pass of that number: a product waits for them, forever if need be.
    """

    groups: Groups
    number: Buffer

    @property
    def rows_per_group(self) -> int:
        return self.groups.rows_per_group

    @property
    def max_groups(self) -> int:
        return self.groups.max_groups


def columns_for(n_rows: int) -> int:
    """The smallest of COLUMNS that holds so many rows at a time, or the largest."""
    return next((columns for columns in COLUMNS if n_rows <= columns), COLUMNS[-1])


def shared_memory(codecs: Sequence[Codec], columns: int, n_blocks: int, k: int = 0) -> tuple[int, int]:
    """Stages of a warp's ring, and dynamic shared memory of a block, at most 99 KiB: `Layout` in matmul.cu, and room to
    quantize rows of k elements.

    At few rows a ring has no more stages than a warp has superblocks, so that blocks of later kernels find room too.

    Args:
        n_blocks: the most superblocks of a warp. k: 0 where rows are quantized already.
    """
    stage = _WARPS * 16 * max(codec.bytes for codec in codecs)
    few = columns == COLUMNS[0]
    rows, sums = _WARPS * 2 * columns * 4, _WARPS * 4 * 32 * 4 if few else 0
    rest = _MOST_SHARED - rows - sums - (_rounded_bytes(_MOST_QUANTIZED) if k else 0)
    stages = min(6, max(2, rest // stage))
    if few:
        stages = min(stages, n_blocks)
    return stages, stages * stage + rows + sums + _rounded_bytes(k)


def _rounded_bytes(k: int) -> int:
    return COLUMNS[0] * ceil(k / GROUP) * (GROUP + 2 * SUMS + 4)


def can_quantize(matrix: Tiles, columns: int) -> bool:
    """Whether `matmul` can round the activations to 8 bits itself, which saves few rows a launch."""
    return columns == COLUMNS[0] and not matrix.codec.dense and matrix.k <= _MOST_QUANTIZED


def matmul_name(matrices: Sequence[Tiles], columns: int, quantize: bool = False) -> str:
    """The instance of `matmul` for up to three matrices below each other."""
    names = [matrix.codec.struct for matrix in matrices]
    names += names[-1:] * (3 - len(names))
    return f"matmul<{', '.join(names)}, {columns}, {str(quantize).lower()}>"


def gate_up_name(gate: Tiles, up: Tiles, columns: int) -> str:
    """The instance of `gate_up` for two matrices."""
    return f"gate_up<{gate.codec.struct}, {up.codec.struct}, {columns}>"


def matmul(
    device: Device,
    matrices: Sequence[Tiles],
    rows: ExpertRows | PlainRows,
    x: Activations | None,
    floats: Buffer | None,
    out: Buffer,
    *,
    n_used: int = 0,
) -> None:
    """out[pair] = W x[pair], for every pair, or row of a plain matrix.

    Args:
        matrices: one to three, [n_rows, k] each, that stand below each other; of a stack the pair's expert.
        rows: which pairs go through which matrix of a stack, or how many rows there are.
        x: quantized rows, one per pair; None: they are made of `floats` (see `can_quantize`), with the same bits.
        floats: the rows as float32 [rows, k], needed without x, and where a matrix has a dense type.
        out: float32 [pairs, sum of n_rows].
        n_used: matrices of the stack that one row takes; 0 for a plain matrix.
    """
    first, *more = [(matrix.buffer, matrix.n_rows) for matrix in matrices] + [(None, 0)] * (3 - len(matrices))
    tiles = sum(ceil(matrix.n_rows / 16) for matrix in matrices)
    splits = n_splits(tiles * max(1, n_used), min(matrix.n_blocks for matrix in matrices), 8)
    kernel = device.kernel("matmul.cu", matmul_name(matrices, rows.rows_per_group, x is None))
    k = matrices[0].k
    stages, shared = shared_memory(
        [matrix.codec for matrix in matrices],
        rows.rows_per_group,
        max(ceil(matrix.n_blocks / splits) for matrix in matrices),
        k if x is None else 0,
    )
    activations = (x.q, x.scale, x.sums) if x is not None else (None, None, None)
    device.launch(
        kernel,
        (ceil(tiles * splits / _WARPS), rows.max_groups),
        THREADS,
        [
            *_rows(rows),
            1.0,
            *(*activations, floats, k),
            *(*first, *more[0], *more[1]),
            *(splits.bit_length() - 1, stages, out, sum(matrix.n_rows for matrix in matrices)),
        ],
        shared,
    )


def gate_up(
    device: Device,
    gate: Tiles,
    up: Tiles,
    rows: ExpertRows | PlainRows,
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
    kernel = device.kernel("matmul.cu", gate_up_name(gate, up, rows.rows_per_group))
    n_blocks = ceil(max(gate.n_blocks, up.n_blocks) / splits)
    stages, shared = shared_memory([gate.codec, up.codec], rows.rows_per_group, n_blocks)
    device.launch(
        kernel,
        (ceil(2 * tiles * splits / _WARPS), rows.max_groups),
        THREADS,
        [
            *_rows(rows),
            1.0 / max(1, n_used),
            *(x.q, x.scale, x.sums, floats, gate.k),
            *(gate.buffer, up.buffer, gate.n_rows, splits.bit_length() - 1, stages, out, gate.n_rows),
        ],
        shared,
    )


def _rows(rows: ExpertRows | PlainRows) -> tuple[Argument, ...]:
    """The kernels' arguments number, groups and pairs."""
    if isinstance(rows, PlainRows):
        return rows.count, None, None
    return rows.number, rows.groups.own_words, rows.groups.pairs


def n_splits(tiles: int, n_blocks: int, most: int) -> int:
    """How many warps share a tile's row: enough of them to keep a GPU busy when one row is computed.

    tiles: row tiles that one row of activations meets. n_blocks: superblocks of a row. most: a power of two.
    """
    splits = 1
    while splits < min(most, n_blocks) and tiles * splits < _FULL:
        splits *= 2
    return min(splits, most)
