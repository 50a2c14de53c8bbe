"""The largest logits and log-sum-exp against NumPy: exact selection whatever the ties, and broken logits."""

from __future__ import annotations

import numpy as np
import pytest

from shared.engine.dense import top_ids
from shared.kernels.device import Device
from shared.kernels.head import TOP, Chunks, gather_logits, top_chunks, top_merge
from tests.kernels.arrays import Array, assert_same_bits, download, is_poison, poisoned, step_of, upload

SPARE = 2  # rows of the grid and of each buffer beyond those of the step


def run_top(device: Device, logits: Array) -> tuple[Array, Array, Array]:
    """ids, values [rows, TOP] and log_sums [rows]; SPARE rows more than the step has must stay as they were."""
    rows, n_vocab = logits.shape
    padded = np.concatenate([logits, np.zeros((SPARE, n_vocab), np.float32)])
    step, n = step_of(device, 0, rows), rows + SPARE
    chunks = Chunks.empty(device, n, n_vocab)
    outputs = (
        poisoned(device, (n, TOP), "int32"),
        poisoned(device, (n, TOP), "float32"),
        poisoned(device, (n,), "float64"),
    )
    top_chunks(device, step, upload(device, padded), chunks, n)
    top_merge(device, step, n_vocab, chunks, *outputs, n)
    ids, values, log_sums = (download(device, buffer) for buffer in outputs)
    assert is_poison(ids[rows:])
    assert is_poison(values[rows:])
    assert is_poison(log_sums[rows:])
    return ids[:rows], values[:rows], log_sums[:rows]


def assert_top(logits: Array, ids: Array, values: Array) -> None:
    """The oracle's ids and their logits; -1 and -infinity beyond the vocabulary."""
    rows, n_vocab = logits.shape
    k = min(TOP, n_vocab)
    for row in range(rows):
        expected = top_ids(logits[row], k)
        np.testing.assert_array_equal(ids[row, :k], expected)
        np.testing.assert_array_equal(values[row, :k], logits[row, expected])
    assert (ids[:, k:] == -1).all()
    assert (values[:, k:] == -np.inf).all()


def assert_log_sums(logits: Array, log_sums: Array) -> None:
    """Within 1e-12 relative of float64."""
    wide = logits.astype(np.float64)
    peak = wide.max(axis=1)
    expected = peak + np.log(np.exp(wide - peak[:, None]).sum(axis=1))
    np.testing.assert_allclose(log_sums, expected, rtol=1e-12, atol=1e-12)


def random_logits(rows: int, n_vocab: int) -> Array:
    return np.random.default_rng(rows + n_vocab).normal(-2, 4, (rows, n_vocab)).astype(np.float32)


@pytest.mark.parametrize("n_vocab", [1, 100, 128, 129, 1000, 4096, 4097, 8192])
def test_top_of_vocabularies(device: Device, n_vocab: int) -> None:
    """Fewer logits than are selected, whole chunks, and a last chunk with fewer logits than are selected."""
    logits = random_logits(2, n_vocab) - np.float32(30)  # all negative, below what poisoned memory would rank as
    ids, values, log_sums = run_top(device, logits)
    assert_top(logits, ids, values)
    assert_log_sums(logits, log_sums)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 17, 31, 32, 33])
def test_top_of_rows(device: Device, rows: int) -> None:
    """Any number of rows."""
    logits = random_logits(rows, 1000)
    ids, values, log_sums = run_top(device, logits)
    assert_top(logits, ids, values)
    assert_log_sums(logits, log_sums)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
@pytest.mark.parametrize(("rows", "n_vocab"), [(1, 151936), (33, 151936), (256, 151936), (2, 262208)])
def test_top_of_large_vocabularies(device: Device, rows: int, n_vocab: int) -> None:
    """The vocabularies of large models."""
    logits = random_logits(rows, n_vocab)
    ids, values, log_sums = run_top(device, logits)
    assert_top(logits, ids, values)
    assert_log_sums(logits, log_sums)


def test_rows_are_the_same_alone_and_in_a_batch(device: Device) -> None:
    """Bitwise row invariance of everything."""
    logits = random_logits(5, 5000)
    together = run_top(device, logits)
    for row in range(5):
        for one, all_rows in zip(run_top(device, logits[row : row + 1]), together, strict=True):
            assert_same_bits(one[0], all_rows[row])


def test_equal_logits_come_by_id(device: Device) -> None:
    """Ties at and around the last place: few values, one value, the two zeros, all of the best in the last chunk."""
    rng = np.random.default_rng(2)
    logits = np.zeros((6, 5000), np.float32)
    logits[0] = rng.integers(-2, 3, 5000)
    logits[1] = 3.25
    logits[2] = np.where(rng.integers(0, 2, 5000), 0.0, -0.0)
    logits[3, rng.choice(5000, 127, replace=False)] = 1
    logits[4, rng.choice(5000, 129, replace=False)] = 1
    logits[5, 4500:] = np.arange(500) // 7
    ids, values, log_sums = run_top(device, logits)
    assert_top(logits, ids, values)
    assert_log_sums(logits, log_sums)


def test_extreme_logits(device: Device) -> None:
    """Masked logits (-infinity) count as zeros; values far apart, subnormal, and the largest that there are."""
    logits = random_logits(4, 5000)
    logits[0, 10:] = -np.inf
    logits[1, :4096] = -np.inf
    logits[2, ::2] = np.float32(3e38)
    logits[3] = np.arange(5000) * np.float32(1e-42)
    ids, values, log_sums = run_top(device, logits)
    assert_top(logits, ids, values)
    assert_log_sums(logits, log_sums)


def test_broken_logits(device: Device) -> None:
    """NaN ranks below -infinity and makes the log-sum-exp NaN, as +infinity does; nothing but -infinity gives that."""
    logits = random_logits(5, 5000)
    logits[0] = np.nan
    logits[1, 50:] = np.nan
    logits[2, 60:] = np.nan
    logits[2, 3] = -np.inf
    logits[3, 4500] = np.inf
    logits[4] = -np.inf
    ids, values, log_sums = run_top(device, logits)
    for row in range(5):
        broken = np.isnan(logits[row])
        expected = np.lexsort((np.arange(5000), np.where(broken, 0, -logits[row]), broken))[:TOP]
        np.testing.assert_array_equal(ids[row], expected)
        np.testing.assert_array_equal(values[row], logits[row, expected])
    assert np.isnan(log_sums[:4]).all()
    assert log_sums[4] == -np.inf


def test_gather_reads_one_row(device: Device) -> None:
    """The logits of the given ids, bit by bit, and nothing behind them."""
    logits = random_logits(3, 100)
    ids = np.random.default_rng(3).integers(0, 100, 300).astype(np.int32)
    out = poisoned(device, (310,), "float32")
    gather_logits(device, upload(device, logits), 1, upload(device, ids), out)
    array = download(device, out)
    assert_same_bits(array[:300], logits[1, ids])
    assert is_poison(array[300:])
