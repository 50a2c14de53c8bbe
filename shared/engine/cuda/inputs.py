"""What a pass is told: one small int32 array, written by the host and copied to the device at once.

The layout is fixed by a pass's capacity, so that a captured graph finds everything at the same address. Kernels know
the header: [0] rows, [1] wanted rows, [2] attention's work: query tiles, or their splits, [3] the pass's
number, [4] its place in a chain.

Invariant: only copies write it, and none while a pass runs, since kernels read it before those ahead of them are done.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.engine.interface import Chunk
from shared.kernels.attention import (
    PAGE_TOKENS,
    TILE_ROWS,
    WORK_INTS,
    Query,
    Span,
    n_splits,
    plan_tiles,
    split_work,
    whole_work,
)
from shared.kernels.device import Buffer, Device

_HEADER = 8


def max_tiles(rows: int, group: int, n_slots: int) -> int:
    """Query tiles of a pass at most: every chunk may begin a tile that it does not fill."""
    return rows * group // TILE_ROWS + min(rows, n_slots)


class Inputs:
    """Room for a pass of `rows` rows and `outs` wanted ones, on the host and on the device.

    step, tokens, positions, cells, out_rows: views of the device's array. query: what attention asks for.

    Args:
        group: query heads of a key-value head.
        max_items: the most splits of a pass that attends in splits; 0: the pass attends whole.
        pages: the page table, for attention. q: its queries.
    """

    def __init__(
        self, device: Device, rows: int, outs: int, group: int, max_items: int, pages: Buffer, q: Buffer
    ) -> None:
        n_slots, max_pages = pages.shape
        tiles = max_tiles(rows, group, n_slots)
        self._group, self._split = group, max_items > 0
        work = min(max_items, tiles * n_splits(max_pages * PAGE_TOKENS)) if self._split else tiles
        sizes = [_HEADER, rows, rows, rows, max(1, outs), rows * group if self._split else 0, work * WORK_INTS]
        # Every view starts at a multiple of 16 bytes.
        starts = np.concatenate([[0], np.cumsum([-(-size // 4) * 4 for size in sizes])])
        self.host = device.staging((int(starts[-1]),), np.int32)
        self.buffer = device.zeros(self.host.shape, np.int32)
        self._host = [self.host[a : a + n] for a, n in zip(starts[:-1].tolist(), sizes, strict=True)]
        self._items = self._host[6].reshape(work, WORK_INTS)
        views = [self.buffer.view(4 * a, (n,)) for a, n in zip(starts[:-1].tolist(), sizes, strict=True)]
        self.step, self.tokens, self.positions, self.cells, self.out_rows, heads, items = views
        self.query = Query(
            self.step,
            self.positions,
            pages,
            items.view(0, (work, WORK_INTS)),
            heads.view(0, (rows, group)) if self._split else None,
            q,
        )

    @property
    def n_rows(self) -> int:
        """Rows of the batch that was filled in."""
        return int(self.host[0])

    def fill(self, chunks: Sequence[Chunk], pages: npt.NDArray[np.int32], number: int) -> bool:
        """Describe a batch; False if it has more splits than there is room for.

        pages: the page table, with the pages that the batch writes. number: the pass's, from 1 on.
        """
        header, tokens, positions, cells, out_rows, heads, _ = self._host
        at = n_out = 0
        spans: list[Span] = []
        for chunk in chunks:
            n, start, rows = len(chunk.tokens), chunk.start, chunk.rows
            tokens[at : at + n] = chunk.tokens
            placed = np.arange(start, start + n, dtype=np.int32)
            positions[at : at + n] = placed
            cells[at : at + n] = pages[chunk.slot].take(placed // PAGE_TOKENS) * PAGE_TOKENS + placed % PAGE_TOKENS
            spans.append(Span(at, n, start, chunk.slot))
            at += n
            if rows:
                out_rows[n_out : n_out + rows] = range(at - rows, at)
                n_out += rows
        tiles = plan_tiles(spans, self._group)
        if self._split:
            if sum(tile.n_splits for tile in tiles) > len(self._items):
                return False
            n_work = split_work(tiles, pages, self._group, self._items, heads[: at * self._group])
        else:
            planned = whole_work(tiles)
            n_work = len(planned)
            self._items[:n_work] = planned
        header[:4] = at, n_out, n_work, number
        return True
