"""What a pass is told: one small int32 array, written by the host and copied to the device at once.

The layout is fixed by a pass's capacity, so that a captured graph finds everything at the same address. Kernels know
the header: [0] rows, [1] wanted rows, [2] query tiles, [3] work items of attention (splits, for one key-value head).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.engine.interface import Chunk
from shared.kernels.attention import TILE_ROWS, Query, plan_tiles
from shared.kernels.device import Buffer, Device

_HEADER = 8


def max_tiles(rows: int, group: int, n_slots: int) -> int:
    """Query tiles of a pass at most: every chunk may begin a tile that it does not fill."""
    return rows * group // TILE_ROWS + min(rows, n_slots)


class Inputs:
    """Room for a pass of `rows` rows and `outs` wanted ones, on the host and on the device.

    step, tokens, positions, slots, out_rows: views of the device's array. query: what attention asks for.
    """

    def __init__(self, device: Device, rows: int, outs: int, tiles: int, pages: Buffer, q: Buffer) -> None:
        sizes = [_HEADER, rows, rows, rows, max(1, outs), tiles, tiles, tiles, tiles + 1]
        # Every view starts at a multiple of 16 bytes.
        starts = np.concatenate([[0], np.cumsum([-(-size // 4) * 4 for size in sizes])])
        self.host = device.staging((int(starts[-1]),), np.int32)
        self.buffer = device.zeros(self.host.shape, np.int32)
        self._host = [self.host[a : a + n] for a, n in zip(starts[:-1].tolist(), sizes, strict=True)]
        views = [self.buffer.view(4 * a, (n,)) for a, n in zip(starts[:-1].tolist(), sizes, strict=True)]
        self.step, self.tokens, self.positions, self.slots, self.out_rows, *tile_views = views
        row, first, count, item = tile_views
        self.query = Query(self.step, self.positions, self.slots, pages, (row, first, count, item), q)

    def fill(self, chunks: Sequence[Chunk], group: int) -> int:
        """Describe a batch; the number of attention's work items (for one key-value head).

        group: query heads of a key-value head.
        """
        header, tokens, positions, slots, out_rows, *tile_arrays = self._host
        at = n_out = 0
        spans = []
        for chunk in chunks:
            n = len(chunk.tokens)
            tokens[at : at + n] = chunk.tokens
            positions[at : at + n] = np.arange(chunk.start, chunk.start + n)
            slots[at : at + n] = chunk.slot
            out_rows[n_out : n_out + chunk.rows] = np.arange(at + n - chunk.rows, at + n)
            spans.append((at, n, chunk.start))
            at += n
            n_out += chunk.rows
        plan = plan_tiles(spans, group)
        planned: list[npt.NDArray[np.int32]] = [plan.tile_row, plan.tile_first, plan.tile_count, plan.tile_item]
        for target, values in zip(tile_arrays, planned, strict=True):
            target[: len(values)] = values
        header[:4] = at, n_out, plan.n_tiles, plan.n_items
        return plan.n_items
