"""`Logits` over a dense array, for engines whose logits are in host memory anyway."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shared.engine.interface import Float32, Int32


class DenseLogits:
    """The wanted rows as one array.

    Args:
        logits: [n_rows, n_vocab] float32, C-contiguous; kept, not copied.
    """

    def __init__(self, logits: Float32) -> None:
        self._logits = logits

    @property
    def n_rows(self) -> int:
        return int(self._logits.shape[0])

    @property
    def n_vocab(self) -> int:
        return int(self._logits.shape[1])

    def top(self, k: int) -> tuple[Int32, Float32]:
        n_rows, n_vocab = self._logits.shape
        k = min(k, n_vocab)
        ids = np.empty((n_rows, k), np.int32)
        for row in range(n_rows):
            ids[row] = top_ids(self._logits[row], k)
        return ids, np.take_along_axis(self._logits, ids, axis=1)

    def log_sum_exp(self) -> npt.NDArray[np.float64]:
        out = np.empty(self.n_rows, np.float64)
        for row in range(self.n_rows):
            out[row] = log_sum_exp(self._logits[row])
        return out

    def gather(self, row: int, ids: Int32) -> Float32:
        return np.asarray(self._logits[row, ids], np.float32)

    def dense(self, row: int) -> Float32:
        return np.asarray(self._logits[row], np.float32)


def top_ids(logits: Float32, k: int) -> Int32:
    """The k largest of one row, by descending logit and then ascending id: [k] int32, for 1 <= k <= n_vocab."""
    if k == 1:
        return np.array([logits.argmax()], np.int32)
    n = len(logits)
    if k >= n:
        return np.argsort(-logits, kind="stable").astype(np.int32)
    kth = np.partition(logits, n - k)[n - k]
    above = np.flatnonzero(logits > kth)
    equal = np.flatnonzero(logits == kth)[: k - len(above)]
    above = above[np.argsort(-logits[above], kind="stable")]
    return np.concatenate([above, equal]).astype(np.int32)


def log_sum_exp(logits: Float32) -> float:
    """log(sum(exp(x))) of one row, accumulated in float64."""
    peak = float(logits.max())
    return peak + float(np.log(np.exp((logits - np.float32(peak)).astype(np.float32)).sum(dtype=np.float64)))
