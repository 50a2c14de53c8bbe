"""What the cuda engine's rows are compared with: the numpy engine, as it is and with the kernels' roundings.

`kernel_roundings` rounds where docs/kernels.md says that kernels do: activations to 8 bits before a product with a
quantized matrix (kernels/cuda/activations.cuh), queries, keys, values and attention's weights to halves
(kernels/cuda/attention.cu). What then is left are orders of summation, and values on the edge between two roundings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.engine.interface import Chunk, EngineSettings
from shared.engine.numpy import NumpyEngine, ops
from shared.model.config import ModelConfig
from shared.model.gguf import GGUFFile

GROUP = 256
UNIT = 32
DENSE = ("F32", "F16", "BF16")


def eight_bits(x: np.ndarray) -> np.ndarray:
    """x [n, k] as the kernels' 8-bit activations stand for it."""
    n, k = x.shape
    groups = np.pad(x, ((0, 0), (0, -k % GROUP))).reshape(n, -1, GROUP)
    peak = np.abs(groups).max(axis=2, keepdims=True)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    q = np.rint(groups * inverse)
    return np.asarray((q * (peak / np.float32(127))).reshape(n, -1)[:, :k], np.float32)


def halves(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def attend_in_halves(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, out: np.ndarray) -> None:
    """`ops.attend` with everything that tensor cores take in halves."""
    scores = np.matmul(halves(q), halves(keys).transpose(0, 2, 1)) * np.float32(scale)
    weights = np.empty_like(scores)
    peak = scores.max(axis=2, keepdims=True)
    for at in range(0, scores.shape[2], UNIT):
        unit = scores[:, :, at : at + UNIT]
        own = unit.max(axis=2, keepdims=True)
        weights[:, :, at : at + UNIT] = halves(np.exp(unit - own)) * np.exp(own - peak)
    out[:] = np.matmul(weights, halves(values)) / weights.sum(axis=2, keepdims=True)


@contextlib.contextmanager
def kernel_roundings(engine: NumpyEngine, *, dense: bool) -> Iterator[None]:
    """The numpy engine computes with the kernels' roundings. dense: its matrices are of float types."""
    assert engine._weights is not None
    plain = {id(layer.select) for layer in engine._weights.layers}
    linear = ops.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "attend", attend_in_halves)
        if not dense:
            patch.setattr(ops, "linear", lambda w, x: linear(w, x if id(w) in plain else eight_bits(x)))
        yield


def numpy_engine(path: Path | str, n_ctx: int = 512, n_slots: int = 1) -> NumpyEngine:
    return NumpyEngine(EngineSettings(engine="numpy", model=str(path), n_ctx=n_ctx, n_slots=n_slots, n_batch=n_ctx))


def numpy_rows(engine: NumpyEngine, tokens: np.ndarray) -> np.ndarray:
    """Every row of a sequence: [n, n_vocab] float32."""
    engine.truncate(0, 0)
    logits = engine.forward([Chunk(0, 0, tokens, len(tokens))])
    return np.stack([logits.dense(row).copy() for row in range(len(tokens))])


def steady_tokens(path: Path, n: int, margin: float = 0.12, seed: int = 0) -> np.ndarray:
    """Random tokens at which, in every layer, the last chosen expert's score is ahead of the next one's by `margin`
    standard deviations of the scores, so that rounding does not change a choice: [n] int32."""
    rng = np.random.default_rng(seed)
    with GGUFFile.open(path) as file:
        n_vocab = ModelConfig.read(file).n_vocab
    engine = numpy_engine(path)
    select = ops.select_experts
    margins: list[float] = []

    def watch(scores: np.ndarray, k: int, normalize: bool, scale: float) -> tuple[np.ndarray, np.ndarray]:
        if k < scores.shape[1]:
            ordered = np.sort(scores, axis=1)
            margins.append(float(((ordered[:, -k] - ordered[:, -k - 1]) / scores.std(axis=1)).min()))
        return select(scores, k, normalize, scale)

    tokens: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "select_experts", watch)
        while len(tokens) < n:
            token = int(rng.integers(n_vocab))
            margins.clear()
            engine.forward([Chunk(0, len(tokens), np.array([token], np.int32), 1)])
            if min(margins, default=margin) >= margin:
                tokens.append(token)
    engine.close()
    return np.array(tokens, np.int32)


def relative_errors(rows: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Each row's error relative to the spread of the true row: [n_rows]."""
    spread = truth - truth.mean(axis=1, keepdims=True)
    return np.asarray(np.linalg.norm(rows - truth, axis=1) / np.linalg.norm(spread, axis=1))


def divergences(rows: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """KL(truth || rows) of each row in nats: [n_rows] float64."""
    a, b = (x.astype(np.float64) - x.max(axis=1, keepdims=True) for x in (truth, rows))
    a -= np.log(np.exp(a).sum(axis=1, keepdims=True))
    b -= np.log(np.exp(b).sum(axis=1, keepdims=True))
    return np.asarray((np.exp(a) * (a - b)).sum(axis=1))
