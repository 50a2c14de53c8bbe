"""Launching attention.cu: attention over a paged KV cache.

Invariant: a query row's result is a function of its position, its query and the keys and values up to it. Which rows
share a step, how they are cut into tiles, which pages hold the keys and which of the two ways is taken change no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil, e, log2, sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.kernels.activations import GROUP, Activations
from shared.kernels.device import Buffer, Device

Int32 = npt.NDArray[np.int32]

PAGE_TOKENS = 64
"""Tokens of a page."""
SPLIT_KEYS = 128
"""Keys that one work item takes."""
TILE_ROWS = 16
"""Query heads of a tile, over rows and the heads of a group."""
WORK_INTS = 8
"""Numbers that describe a tile or an item."""
HEAD_DIMS = (32, 64, 96, 128, 256)
"""What the kernels are made for."""
CACHE_KINDS = ("f16", "q8_0", "q4_0")
"""The types of keys and values, both of one."""

_ATTEND_THREADS = 128
_APPEND_THREADS = 128
_MERGE_THREADS = 256
_COPY_THREADS = 256
_WORD = 16
_STRUCTS = {"f16": "F16Cache", "q8_0": "Q8Cache", "q4_0": "Q4Cache"}
_BITS = {"f16": 16, "q8_0": 8, "q4_0": 4}


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How keys and values lie in memory (see attention.cu). A layer is all pages' keys, then all their values, then,
    unless it is f16, the scales of keys and those of values.

    kind: one of CACHE_KINDS. head_dim: one of HEAD_DIMS.
    """

    kind: str
    head_dim: int
    n_kv_head: int

    @property
    def struct(self) -> str:
        """The cache type's name in attention.cu."""
        return _STRUCTS[self.kind]

    @property
    def section_bytes(self) -> tuple[int, ...]:
        """Of a page's keys, values, key scales and value scales, or of the first two."""
        cells = self.n_kv_head * PAGE_TOKENS * self.head_dim
        data, scales = cells * _BITS[self.kind] // 8, cells // 32 * 2
        return (data, data) if self.kind == "f16" else (data, data, scales, scales)

    @property
    def page_bytes(self) -> int:
        """Of a page, in one layer."""
        return sum(self.section_bytes)

    def layer(self, pool: Buffer, offset: int, n_pages: int) -> KvLayer:
        """A layer's cache, n_pages * page_bytes from `offset` on."""
        parts = []
        for nbytes in self.section_bytes:
            parts.append(pool.view(offset, (n_pages * nbytes,), np.uint8))
            offset += n_pages * nbytes
        keys, values, *scales = parts
        key_scales, value_scales = scales or (None, None)
        return KvLayer(self, keys, values, key_scales, value_scales)


@dataclass(frozen=True, slots=True)
class KvLayer:
    """A layer's cache; no scales for f16."""

    layout: CacheLayout
    keys: Buffer
    values: Buffer
    key_scales: Buffer | None
    value_scales: Buffer | None


class Span(NamedTuple):
    """Rows of a step, of one slot at consecutive positions: n_rows from `row` on, the first at position `start`."""

    row: int
    n_rows: int
    start: int
    slot: int


class Tile(NamedTuple):
    """Query heads that a block of `attend` takes: up to TILE_ROWS of a chunk's, flattened: row * group + head of group.

    row: the chunk's first, at position `start`. first: of the heads, a multiple of TILE_ROWS. last: position of the
    row of the last head.
    """

    row: int
    first: int
    n_heads: int
    start: int
    last: int
    slot: int

    @property
    def n_splits(self) -> int:
        return self.last // SPLIT_KEYS + 1


def plan_tiles(chunks: Sequence[Span], group: int) -> list[Tile]:
    """The query tiles of a step.

    Args:
        chunks: in ascending order of rows.
        group: query heads per key-value head.
    """
    tiles = []
    end = 0
    for row, n_rows, start, slot in chunks:
        if row < end or n_rows < 1:
            raise ValueError(f"{n_rows} rows from row {row} on, after row {end}: chunks are not empty, and ascend")
        end = row + n_rows
        for first in range(0, n_rows * group, TILE_ROWS):
            n_heads = min(TILE_ROWS, n_rows * group - first)
            tiles.append(Tile(row, first, n_heads, start, start + (first + n_heads - 1) // group, slot))
    return tiles


def whole_work(tiles: Sequence[Tile]) -> Int32:
    """[tiles, WORK_INTS] what `attend` does: the tiles."""
    work = np.zeros((len(tiles), WORK_INTS), np.int32)
    work[:, :6] = np.fromiter(chain.from_iterable(tiles), np.int32, 6 * len(tiles)).reshape(-1, 6)
    return work


def split_work(tiles: Sequence[Tile], pages: Int32, group: int, items: Int32, heads: Int32) -> int:
    """What `attend_splits` does, and where `merge_splits` finds its results.

    Args:
        pages: [slots, pages of a slot].
        group: query heads per key-value head.
        items: [at least the tiles' splits, WORK_INTS], written: each split of each tile in turn: the tile, but instead
            of the slot the split's index, and then the two pages of its keys (0 beyond the table, anything beyond the
            slot's pages).
        heads: [n_rows * group], written: of each head of a row's groups, TILE_ROWS * its tile's first item + its place
            in the tile; -1: in no tile.

    Returns:
        How many items there are.
    """
    heads[:] = -1
    before, slot, at = items[:0], -1, 0
    for row, first, n_heads, start, last, own_slot in tiles:
        n = last // SPLIT_KEYS + 1
        part = items[at : at + n]
        if own_slot == slot and n == len(before):
            part[:, 5:] = before[:, 5:]
        else:
            held = pages[own_slot, : 2 * n]
            part[:, 5] = np.arange(n)
            part[:, 6] = held[::2]
            part[-1, 7] = 0  # which has a second page or not
            part[: len(held) // 2, 7] = held[1::2]
        part[:, :5] = row, first, n_heads, start, last
        head = row * group + first
        heads[head : head + n_heads] = range(TILE_ROWS * at, TILE_ROWS * at + n_heads)
        before, slot, at = part, own_slot, at + n
    return at


def n_splits(n_keys: int) -> int:
    """Work items of a tile whose last row sees so many keys."""
    return ceil(n_keys / SPLIT_KEYS)


def item_bytes(layout: CacheLayout) -> int:
    """What `attend_splits` keeps for a work item, for all key-value heads."""
    return 4 * layout.n_kv_head * TILE_ROWS * (2 + layout.head_dim)


@dataclass(frozen=True, slots=True)
class Query:
    """The queries of a step, in device memory; int32 but for q. All but q must have been written by a copy, not by a
    kernel: kernels read it before those ahead of them are done.

    step: rows, (not used here), how much of `work` there is. positions: [rows]. pages: [slots, pages of a slot].
    work: [capacity, WORK_INTS] `whole_work` for `attend`, of `split_work` for `attend_splits`; 16-byte aligned.
    heads: [rows, group] of `split_work`, for `merge_splits`.
    q: halves [rows, n_head, head_dim].
    """

    step: Buffer
    positions: Buffer
    pages: Buffer
    work: Buffer
    heads: Buffer | None
    q: Buffer


def kernel_names(layout: CacheLayout) -> list[str]:
    """The instances in attention.cu that a cache needs."""
    return [
        _rope_append_name(layout),
        *(_attend_name(layout, whole) for whole in (False, True)),
        _merge_splits_name(layout),
        "copy_pages",
    ]


def rope_append(
    device: Device,
    step: Buffer,
    positions: Buffer,
    cells: Buffer,
    qkv: Buffer,
    q_norm: Buffer | None,
    k_norm: Buffer | None,
    eps: float,
    cos: Buffer,
    sin: Buffer,
    neox: bool,
    n_head: int,
    q: Buffer,
    cache: KvLayer,
    max_rows: int,
) -> None:
    """Normalize and rotate queries and keys; queries to q, keys and values to their places in the cache.

    Args:
        step, positions: as of `Query`, with max_rows positions.
        cells: int32 [max_rows] where in the cache, page * PAGE_TOKENS + position % PAGE_TOKENS; from a copy too.
        qkv: float32 [rows, (n_head + 2 n_kv_head) head_dim].
        q_norm, k_norm: float32 [head_dim], None for models without.
        cos, sin: float32 [positions, ..., rotated pairs of a head].
        neox: pairs are (i, i + pairs), else (2 i, 2 i + 1).
        q: halves [rows, n_head, head_dim], written.
        max_rows: sizes the grid.
    """
    layout = cache.layout
    warps = n_head + 2 * layout.n_kv_head
    device.launch(
        device.kernel("attention.cu", _rope_append_name(layout)),
        (max_rows, ceil(warps / (_APPEND_THREADS // 32))),
        _APPEND_THREADS,
        [
            *(step, positions, cells, qkv, q_norm, k_norm, float(eps), cos, sin, 2 * cos.shape[-1], int(neox)),
            *(n_head, layout.n_kv_head, q, cache.keys, cache.values, cache.key_scales, cache.value_scales),
        ],
    )


def attend(device: Device, query: Query, cache: KvLayer, out: Buffer) -> None:
    """out: float32 [rows, n_head * head_dim] = attention; for many rows."""
    _attend(device, query, cache, None, out, (query.work.shape[0], cache.layout.n_kv_head))


def attend_splits(device: Device, query: Query, cache: KvLayer, partials: Buffer) -> None:
    """The first half of attention for few rows.

    Args:
        partials: `item_bytes` for each item, written.
    """
    layout = cache.layout
    kernel = device.kernel("attention.cu", _attend_name(layout, False))
    blocks = device.blocks_per_multiprocessor(kernel, _ATTEND_THREADS, _attend_shared(layout))
    grid = min(query.work.shape[0] * layout.n_kv_head, device.n_multiprocessors * max(1, blocks))
    _attend(device, query, cache, partials, None, (grid,))


def merge_splits(
    device: Device,
    query: Query,
    cache: KvLayer,
    partials: Buffer,
    out: Buffer | None,
    quantized: Activations,
    max_rows: int,
) -> None:
    """The second half: the same bits as `attend` gives, and their 8-bit form, which may be all that is wanted.

    Args:
        partials: what `attend_splits` wrote.
        out: float32 [rows, n_head * head_dim]; rows without a tile become zeros.
    """
    layout, n_head = cache.layout, query.q.shape[1]
    device.launch(
        device.kernel("attention.cu", _merge_splits_name(layout)),
        (max_rows, ceil(n_head * layout.head_dim / GROUP)),
        _MERGE_THREADS,
        [
            *(query.step, query.positions, query.heads),
            *(partials, n_head, layout.n_kv_head, _scale(layout)),
            *(out, quantized.q, quantized.scale, quantized.sums),
        ],
        # m, l and eight outputs of each thread.
        4 * (2 + 8) * _MERGE_THREADS,
    )


def copy_pages(device: Device, pool: Buffer, layout: CacheLayout, n_layers: int, n_pages: int, pairs: Buffer) -> None:
    """In each layer of a pool, copy pages.

    Args:
        pool: the layers, one after the other, of n_pages each.
        pairs: int32 [n, 2], sources and targets; no page is both.
    """
    layer_bytes = n_pages * layout.page_bytes
    offset = 0
    for nbytes in layout.section_bytes:
        device.launch(
            device.kernel("attention.cu", "copy_pages"),
            (ceil(nbytes / _WORD / _COPY_THREADS), pairs.shape[0], n_layers),
            _COPY_THREADS,
            [pool.view(offset, (pool.nbytes - offset,), np.uint8), layer_bytes // _WORD, nbytes // _WORD, pairs],
        )
        offset += n_pages * nbytes


def _attend(
    device: Device,
    query: Query,
    cache: KvLayer,
    partials: Buffer | None,
    out: Buffer | None,
    grid: tuple[int, ...],
) -> None:
    layout = cache.layout
    device.launch(
        device.kernel("attention.cu", _attend_name(layout, out is not None)),
        grid,
        _ATTEND_THREADS,
        [
            *(query.step, query.work, query.pages, query.pages.shape[1], query.q),
            *(cache.keys, cache.values, cache.key_scales, cache.value_scales),
            *(query.q.shape[1], layout.n_kv_head, _scale(layout), partials, out),
        ],
        _attend_shared(layout),
    )


def _rope_append_name(layout: CacheLayout) -> str:
    return f"rope_append<{layout.head_dim}, {layout.struct}>"


def _attend_name(layout: CacheLayout, whole: bool) -> str:
    return f"attend<{layout.head_dim}, {layout.struct}, {'true' if whole else 'false'}>"


def _merge_splits_name(layout: CacheLayout) -> str:
    return f"merge_splits<{layout.head_dim}>"


def _scale(layout: CacheLayout) -> float:
    return log2(e) / sqrt(layout.head_dim)


def _attend_shared(layout: CacheLayout) -> int:
    """`Units` in attention.cu."""
    return 4 * 4 * TILE_ROWS * (layout.head_dim + 8 + 2)
