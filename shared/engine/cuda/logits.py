"""`Logits` of a pass on the device: the leaders and the log-sum-exp were computed there, whole rows come on demand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shared.engine.dense import top_ids
from shared.engine.interface import Float32, Int32


class DeviceRows(Protocol):
    """What `CudaLogits` asks of a finished pass; every call waits for the device."""

    def leaders(self) -> tuple[Int32, Float32, npt.NDArray[np.float64]]:
        """ids [n, TOP], logits [n, TOP] and log-sum-exp [n] of all rows that there is room for."""

    def gather(self, row: int, ids: Int32) -> Float32: ...

    def dense(self, row: int) -> Float32: ...


class CudaLogits:
    """See `shared.engine.interface.Logits`. Nothing is waited for before the first question.

    Args:
        check: raises when the engine has computed something else since.
    """

    def __init__(self, rows: DeviceRows, n_rows: int, n_vocab: int, check: Callable[[], None]) -> None:
        self._rows = rows
        self._n_rows = n_rows
        self._n_vocab = n_vocab
        self._check = check
        self._leaders: tuple[Int32, Float32, npt.NDArray[np.float64]] | None = None

    @property
    def n_rows(self) -> int:
        return self._n_rows

    @property
    def n_vocab(self) -> int:
        return self._n_vocab

    def top(self, k: int) -> tuple[Int32, Float32]:
        k = min(k, self._n_vocab)
        ids, values, _ = self._wait()
        if k > ids.shape[1]:
            rows = [self.dense(row) for row in range(self._n_rows)]
            ids = np.stack([top_ids(row, k) for row in rows]) if rows else np.empty((0, k), np.int32)
            values = (
                np.stack([row[i] for row, i in zip(rows, ids, strict=True)]) if rows else np.empty((0, k), np.float32)
            )
        return ids[:, :k], values[:, :k]

    def log_sum_exp(self) -> npt.NDArray[np.float64]:
        return self._wait()[2]

    def gather(self, row: int, ids: Int32) -> Float32:
        known, values, _ = self._wait()
        ids = np.asarray(ids, np.int32)
        self._check_row(row)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._n_vocab:
            raise IndexError(f"a token id is outside the vocabulary of {self._n_vocab}")
        at = np.argsort(known[row])
        place = np.searchsorted(known[row], ids, sorter=at)
        found = at[np.minimum(place, len(at) - 1)]
        if (known[row][found] == ids).all():
            return np.asarray(values[row][found], np.float32)
        return self._rows.gather(row, ids)

    def dense(self, row: int) -> Float32:
        self._wait()
        self._check_row(row)
        return self._rows.dense(row)

    def _check_row(self, row: int) -> None:
        # The device has room for more rows than were wanted.
        if not 0 <= row < self._n_rows:
            raise IndexError(f"row {row} of {self._n_rows}")

    def _wait(self) -> tuple[Int32, Float32, npt.NDArray[np.float64]]:
        self._check()
        if self._leaders is None:
            ids, values, lse = self._rows.leaders()
            n = self._n_rows
            self._leaders = ids[:n].copy(), values[:n].copy(), lse[:n].copy()
        return self._leaders
