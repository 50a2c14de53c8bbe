"""Expert selection and grouping against NumPy, and bitwise row invariance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from shared.engine.numpy import ops
from shared.kernels.device import Device
from shared.kernels.experts import Groups, dense_groups, expert_scores, select_experts
from tests.kernels.arrays import Array, assert_same_bits, download, is_poison, poisoned, step_of, upload

ROWS = [1, 2, 3, 8, 16, 17, 31, 32, 33]
SPARE = 2  # rows of each buffer beyond those of the step


def run_scores(device: Device, h: Array, weight: Array) -> Array:
    """With SPARE rows more than the step has, which must stay as they were."""
    rows = len(h)
    padded = np.concatenate([h, np.full((SPARE, h.shape[1]), np.nan, np.float32)])
    scores = poisoned(device, (rows + SPARE, len(weight)), "float32")
    expert_scores(device, step_of(device, rows), upload(device, padded), upload(device, weight), scores, rows + SPARE)
    array = download(device, scores)
    assert is_poison(array[rows:])
    return array[:rows]


def score_inputs(rows: int, k: int, n_expert: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(rows + k)
    h = rng.normal(0, 1, (rows, k)).astype(np.float32)
    return h, rng.normal(0, 1 / k**0.5, (n_expert, k)).astype(np.float32)


@pytest.mark.parametrize("rows", ROWS)
def test_scores_agree_with_numpy(device: Device, rows: int) -> None:
    """Products in float32, within 2e-6 of the oracle where they are about 1."""
    h, weight = score_inputs(rows, 576, 10)
    np.testing.assert_allclose(run_scores(device, h, weight), ops.linear(weight, h), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("k", [32, 256, 576, 2048])
def test_scores_are_the_same_alone_and_in_a_batch(device: Device, k: int) -> None:
    """Bitwise row invariance, whatever number of rows a warp multiplies at a time."""
    h, weight = score_inputs(37, k, 10)
    together = run_scores(device, h, weight)
    np.testing.assert_allclose(together, ops.linear(weight, h), rtol=2e-6, atol=2e-6)
    for n in (1, 2, 3, 4, 5, 8, 27):
        assert_same_bits(run_scores(device, h[:n], weight), together[:n])
    for row in range(37):
        assert_same_bits(run_scores(device, h[row : row + 1], weight)[0], together[row])


@dataclass(frozen=True)
class Selection:
    """ids, weights [rows, n_used]; pairs [rows * n_used]; groups [n, 3]: expert, first, count."""

    ids: Array
    weights: Array
    pairs: Array
    groups: Array


def run_select(
    device: Device,
    scores: Array,
    n_used: int,
    *,
    normalize: bool = True,
    scale: float = 1.0,
    rows_per_group: int = 8,
) -> Selection:
    """With SPARE rows more than the step has, which must stay as they were."""
    rows, n_expert = scores.shape
    padded = np.concatenate([scores, np.full((SPARE, n_expert), np.nan, np.float32)])
    ids = poisoned(device, (rows + SPARE, n_used), "int32")
    weights = poisoned(device, (rows + SPARE, n_used), "float32")
    groups = poisoned_groups(device, rows + SPARE, rows_per_group, n_used, n_expert)
    step, scores_there = step_of(device, rows), upload(device, padded)
    select_experts(device, step, scores_there, normalize, scale, ids, weights, groups, rows + SPARE)
    pairs, table = read_groups(device, groups, rows * n_used)
    all_ids, all_weights = download(device, ids), download(device, weights)
    assert is_poison(all_ids[rows:])
    assert is_poison(all_weights[rows:])
    return Selection(all_ids[:rows], all_weights[:rows], pairs, table)


def poisoned_groups(device: Device, *arguments: int) -> Groups:
    groups = Groups.empty(device, *arguments)
    device.fill(groups.pairs, 0xA5)
    device.fill(groups.table, 0xA5)
    return groups


def read_groups(device: Device, groups: Groups, n_pairs: int) -> tuple[Array, Array]:
    """The pairs, and the groups [n, 3]: expert, first, count; what lies behind both must be untouched."""
    pairs, table = download(device, groups.pairs), download(device, groups.table)
    n = int(table[0])
    columns = table[1:].reshape(3, groups.max_groups)
    assert n <= groups.max_groups
    assert is_poison(pairs[n_pairs:])
    assert is_poison(columns[:, n:])
    return pairs[:n_pairs], columns[:, :n].T


def expected_groups(ids: Array, rows_per_group: int) -> tuple[Array, Array]:
    chosen = ids.reshape(-1)
    pairs = np.argsort(chosen, kind="stable")
    groups = []
    first = 0
    for expert in np.unique(chosen):
        end = first + int((chosen == expert).sum())
        for at in range(first, end, rows_per_group):
            groups.append((expert, at, min(rows_per_group, end - at)))
        first = end
    return pairs, np.array(groups)


def assert_selection(
    selection: Selection, scores: Array, normalize: bool = True, scale: float = 1.0, rows_per_group: int = 8
) -> None:
    """The oracle's experts, its weights within 5e-6 relative, and the groups of those experts."""
    ids, weights = ops.select_experts(scores, selection.ids.shape[1], normalize, scale)
    np.testing.assert_array_equal(selection.ids, ids)
    np.testing.assert_allclose(selection.weights, weights, rtol=5e-6)
    pairs, groups = expected_groups(selection.ids, rows_per_group)
    np.testing.assert_array_equal(selection.pairs, pairs)
    np.testing.assert_array_equal(selection.groups, groups)


def random_scores(rows: int, n_expert: int) -> Array:
    return np.random.default_rng(rows + n_expert).normal(0, 2, (rows, n_expert)).astype(np.float32)


@pytest.mark.parametrize("rows", ROWS)
def test_selection_agrees_with_numpy(device: Device, rows: int) -> None:
    """Experts, weights and groups, where warps have one row, several, or none."""
    scores = random_scores(rows, 40)
    assert_selection(run_select(device, scores, 4), scores)


@pytest.mark.parametrize(
    ("n_expert", "n_used", "normalize", "scale", "rows_per_group"),
    [
        (8, 2, False, 1.0, 1),
        (64, 6, False, 2.5, 16),
        (128, 8, True, 1.0, 32),
        (512, 16, True, 2.5, 8),
        (8, 8, True, 1, 8),
    ],
)
def test_selection_of_models(
    device: Device, n_expert: int, n_used: int, normalize: bool, scale: float, rows_per_group: int
) -> None:
    """Numbers of experts and ways to weight them that models have."""
    scores = random_scores(5, n_expert)
    selection = run_select(device, scores, n_used, normalize=normalize, scale=scale, rows_per_group=rows_per_group)
    assert_selection(selection, scores, normalize, scale, rows_per_group)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
@pytest.mark.parametrize("rows", [256, 1000, 1024])
def test_selection_on_large_steps(device: Device, rows: int) -> None:
    """Up to the most rows and pairs that the kernel takes."""
    scores = random_scores(rows, 512)
    assert_selection(run_select(device, scores, 16, rows_per_group=32), scores, rows_per_group=32)


def test_selection_is_the_same_alone_and_in_a_batch(device: Device) -> None:
    """Bitwise row invariance of ids and weights."""
    scores = random_scores(33, 40)
    together = run_select(device, scores, 4)
    for row in range(33):
        alone = run_select(device, scores[row : row + 1], 4)
        assert_same_bits(alone.ids[0], together.ids[row])
        assert_same_bits(alone.weights[0], together.weights[row])


def test_equal_scores_choose_the_lower_id(device: Device) -> None:
    """Ties, also between the two zeros."""
    scores = np.random.default_rng(1).integers(-1, 2, (8, 40)).astype(np.float32)
    scores[0] = 0
    scores[1] = np.where(np.arange(40) % 2, 0.0, -0.0)
    selection = run_select(device, scores, 8)
    assert_selection(selection, scores)
    assert selection.ids[0].tolist() == selection.ids[1].tolist() == list(range(8))


def test_an_expert_of_all_rows_is_cut_into_groups(device: Device) -> None:
    """Expert 3 gets every row, expert 4 none; with one row per group there are as many groups as pairs."""
    scores = random_scores(33, 8)
    scores[:, 3] = 10
    scores[:, 4] = -10
    selection = run_select(device, scores, 2, rows_per_group=8)
    assert_selection(selection, scores)
    experts, counts = selection.groups[:, 0], selection.groups[:, 2]
    assert counts[experts == 3].tolist() == [8, 8, 8, 8, 1]
    assert 4 not in experts
    assert len(run_select(device, scores, 2, rows_per_group=1).groups) == 66


def test_a_step_without_rows_has_no_groups(device: Device) -> None:
    """Zero rows write the number of groups and nothing else."""
    selection = run_select(device, np.empty((0, 40), np.float32), 4)
    assert len(selection.groups) == 0


def test_a_broken_model_selects_some_experts(device: Device) -> None:
    """NaN scores rank below all others and make the row's weights NaN; ids stay different and in range."""
    scores = random_scores(4, 40)
    scores[0] = np.nan
    scores[1, 5:] = np.nan
    scores[2] = -np.inf
    scores[3, 7] = np.inf
    selection = run_select(device, scores, 8)
    assert selection.ids[0].tolist() == selection.ids[2].tolist() == list(range(8))
    assert sorted(selection.ids[1][:5]) == list(range(5))
    assert selection.ids[1][5:].tolist() == [5, 6, 7]
    assert selection.ids[3][0] == 7
    assert np.isnan(selection.weights[:, 0]).all()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("rows", [0, 1, 8, 17, 33])
def test_dense_groups(device: Device, rows: int, which: int) -> None:
    """A plain matrix is expert 0, which has the rows in order: of the step, or of the wanted logits."""
    groups = poisoned_groups(device, 40, 8)
    dense_groups(device, step_of(device, *((rows, 5) if which == 0 else (5, rows))), which, groups)
    pairs, table = read_groups(device, groups, rows)
    assert pairs.tolist() == list(range(rows))
    assert table.tolist() == [[0, at, min(8, rows - at)] for at in range(0, rows, 8)]
