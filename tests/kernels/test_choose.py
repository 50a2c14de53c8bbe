"""Tokens chosen on the device, against the host's sampling over the same rows."""

from __future__ import annotations

import numpy as np
import pytest

from shared.kernels.choose import CHOICE, choose
from shared.kernels.device import Device
from shared.kernels.head import TOP, Chunks, top_chunks, top_merge
from shared.sampling.drafting import draft
from shared.sampling.params import SamplingParams
from tests.kernels.arrays import Array, download, is_poison, poisoned, upload

PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, seed=7),
    SamplingParams(temperature=1.3, top_k=100, top_p=1.0, min_p=0.0, seed=2**63 + 5),
    SamplingParams(temperature=0.7, top_k=0, top_p=0.9, min_p=0.0, seed=1),
    SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.05, seed=3),
    SamplingParams(temperature=0.5, top_k=1, seed=4),
    SamplingParams(temperature=1e-3, top_k=5, seed=9),
    SamplingParams(temperature=50.0, top_k=7, top_p=0.999, min_p=0.0, seed=10),
]


def run(
    device: Device, logits: Array, params: list[SamplingParams], positions: list[int], in_chain: int = 0
) -> tuple[Array, Array]:
    """The tokens and confidences of all rows, with a spare row and other passes that must stay as they were."""
    rows, n_vocab = logits.shape
    step = upload(device, np.array([rows, rows, 0, 0, in_chain], np.int32))
    chunks = Chunks.empty(device, rows + 1, n_vocab)
    ids = device.empty((rows + 1, TOP), "int32")
    values = device.empty((rows + 1, TOP), "float32")
    log_sums = device.empty((rows + 1,), "float64")
    padded = upload(device, np.concatenate([logits, logits[:1]]))
    top_chunks(device, step, padded, chunks, rows + 1)
    top_merge(device, step, n_vocab, chunks, ids, values, log_sums, rows + 1)
    choices = np.zeros(rows + 1, CHOICE)
    for row, (p, position) in enumerate(zip(params, positions, strict=True)):
        choices[row] = (p.seed, p.temperature, p.top_p, p.min_p, p.top_k, position)
    tokens = poisoned(device, (rows + 1,), "int32")
    history, confidences = (poisoned(device, (3, rows + 1), kind) for kind in ("int32", "float32"))
    choose(device, step, upload(device, choices), ids, values, log_sums, tokens, history, confidences)
    fed, *logs = (download(device, buffer) for buffer in (tokens, history, confidences))
    assert is_poison(fed[rows:])
    for log in logs:
        assert is_poison(np.delete(log, in_chain, axis=0))
        assert is_poison(log[in_chain, rows:])
    assert fed[:rows].tolist() == logs[0][in_chain, :rows].tolist()
    return logs[0][in_chain, :rows], logs[1][in_chain, :rows]


@pytest.mark.parametrize("n_vocab", [100, 1000])
@pytest.mark.parametrize("params", PARAMS, ids=lambda p: f"T={p.temperature} k={p.top_k} p={p.top_p} m={p.min_p}")
def test_the_device_chooses_as_the_host(device: Device, params: SamplingParams, n_vocab: int) -> None:
    """The same token and confidence as `drafting.draft` over the whole row, where the filters keep leaders only."""
    rng = np.random.default_rng(n_vocab)
    n = 12
    logits = rng.normal(0, 4, (n, n_vocab)).astype(np.float32)
    positions = rng.integers(0, 100_000, n).tolist()
    tokens, confidences = run(device, logits, [params] * n, positions)
    for row in range(n):
        expected = draft(params, logits[row], (), positions[row])
        assert tokens[row] == expected.token
        np.testing.assert_allclose(confidences[row], expected.confidence, rtol=1e-3 if params.top_p == 1 else 1e-6)


def test_rows_have_requests_of_their_own(device: Device) -> None:
    """Every row by its own parameters; ties go to the lower id."""
    logits = np.random.default_rng(5).normal(0, 3, (len(PARAMS), 500)).astype(np.float32)
    logits[0, [17, 400]] = 50.0
    positions = list(range(len(PARAMS)))
    tokens, _ = run(device, logits, PARAMS, positions)
    assert tokens[0] == 17
    expected = [draft(p, row, (), i).token for i, (p, row) in enumerate(zip(PARAMS, logits, strict=True))]
    assert tokens.tolist() == expected


def test_a_chain_advances_its_positions(device: Device) -> None:
    """The noise is that of the position so many places further."""
    logits = np.random.default_rng(6).normal(0, 1, (1, 300)).astype(np.float32)
    params = SamplingParams(temperature=1.5, seed=3)
    for in_chain in range(3):
        tokens, _ = run(device, logits, [params], [40], in_chain)
        assert tokens[0] == draft(params, logits[0], (), 40 + in_chain).token


def test_unfiltered_sampling_is_confined_to_the_leaders(device: Device) -> None:
    """Without filters a token beyond the 128 leaders is never chosen, whatever its noise."""
    logits = np.zeros((1, 1000), np.float32)
    logits[0, 200:328] = 1e-3
    params = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=11)
    for position in range(20):
        tokens, _ = run(device, logits, [params], [position])
        assert 200 <= tokens[0] < 328
