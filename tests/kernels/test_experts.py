"""Expert selection and grouping against NumPy, and bitwise row invariance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from shared.engine.numpy import ops
from shared.kernels.activations import Activations
from shared.kernels.device import Device
from shared.kernels.experts import (
    Groups,
    Handover,
    expert_scores,
    norm_scores_select,
    norm_scores_select_name,
    select_experts,
)
from shared.kernels.norm import add_norm
from tests.kernels.arrays import PASS, Array, assert_same_bits, download, is_poison, poisoned, step_of, upload

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
    """ids, weights [rows, n_used]; pairs [n, rows_per_group]; groups [n, 2]: expert, count."""

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
    pairs, table = read_groups(device, groups)
    all_ids, all_weights = download(device, ids), download(device, weights)
    assert is_poison(all_ids[rows:])
    assert is_poison(all_weights[rows:])
    return Selection(all_ids[:rows], all_weights[:rows], pairs, table)


def poisoned_groups(device: Device, *arguments: int) -> Groups:
    groups = Groups.empty(device, *arguments)
    device.fill(groups.pairs, 0xA5)
    device.fill(groups.words, 0xA5)
    return groups


def read_groups(device: Device, groups: Groups) -> tuple[Array, Array]:
    """The pairs [n, rows_per_group], -1 beyond a group's count, and the groups [n, 2]: expert, count.

    Every word has the pass's number; behind the groups, they say that there is none.
    """
    pairs, words = download(device, groups.pairs), download(device, groups.words)[0]
    assert (words & 0xFFFFFFFF == PASS).all()
    count, expert, pair = words >> 32 & 127, words >> 39 & 511, words >> 48
    n = int((count > 0).sum())
    assert (words[n:] >> 32 == 0).all()
    count, expert, pair, pairs = (x[:n].astype(np.int32) for x in (count, expert, pair, pairs))
    pairs[count == 1, 0] = pair[count == 1]
    assert (pair[count != 1] == 0).all()
    pairs[np.arange(groups.rows_per_group) >= count[:, None]] = -1
    return pairs, np.stack([expert, count], axis=1)


def expected_groups(ids: Array, rows_per_group: int) -> tuple[Array, Array]:
    chosen = ids.reshape(-1)
    pairs, groups = [], []
    for expert in np.unique(chosen):
        own = np.flatnonzero(chosen == expert)
        for at in range(0, len(own), rows_per_group):
            group = own[at : at + rows_per_group]
            pairs.append(np.pad(group, (0, rows_per_group - len(group)), constant_values=-1))
            groups.append((expert, len(group)))
    return np.array(pairs), np.array(groups)


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
        (8, 2, False, 1.0, 2),
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
    """Expert 3 gets every row, expert 4 none; with two rows per group it has 17."""
    scores = random_scores(33, 8)
    scores[:, 3] = 10
    scores[:, 4] = -10
    selection = run_select(device, scores, 2, rows_per_group=8)
    assert_selection(selection, scores)
    experts, counts = selection.groups[:, 0], selection.groups[:, 1]
    assert counts[experts == 3].tolist() == [8, 8, 8, 8, 1]
    assert 4 not in experts
    by_two = run_select(device, scores, 2, rows_per_group=2)
    assert_selection(by_two, scores, rows_per_group=2)
    assert by_two.groups[by_two.groups[:, 0] == 3, 1].tolist() == 16 * [2] + [1]


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


def test_the_widest_selection(device: Device) -> None:
    """The most experts and slots: candidates of all slots and lanes, of several rows of a warp."""
    scores = random_scores(17, 512)
    # All of the best are in half of the lanes, so that every key of theirs is a candidate.
    scores[0] = np.where(np.arange(512) % 32 < 16, 100, 0) + np.arange(512) // 32
    assert_selection(run_select(device, scores, 16), scores)


def test_one_expert_per_row(device: Device) -> None:
    """n_used 1, and fewer experts than lanes."""
    for rows in (1, 5, 33):
        scores = random_scores(rows, 3)
        assert_selection(run_select(device, scores, 1), scores)


# --- one kernel for a few rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """x, part [rows, n_embd], norm_weight [n_embd], gate [n_expert, n_embd]."""

    x: Array
    part: Array
    norm_weight: Array
    gate: Array

    @classmethod
    def random(cls, rows: int, n_embd: int, n_expert: int) -> Step:
        rng = np.random.default_rng(rows * n_embd + n_expert)
        return cls(
            x=rng.normal(0, 3, (rows, n_embd)).astype(np.float32),
            part=rng.normal(0, 1, (rows, n_embd)).astype(np.float32),
            norm_weight=rng.normal(1, 0.3, n_embd).astype(np.float32),
            gate=rng.normal(0, 2 / n_embd**0.5, (n_expert, n_embd)).astype(np.float32),
        )


class Stepping:
    """A step's buffers, with room for max_rows rows."""

    def __init__(self, device: Device, step: Step, max_rows: int, n_used: int, rows_per_group: int) -> None:
        self.device, self.rows, self.max_rows = device, len(step.x), max_rows
        n_expert, n_embd = step.gate.shape
        self.step = step_of(device, self.rows)
        self.x, self.part = (poisoned(device, (max_rows, n_embd), "float32") for _ in range(2))
        device.write(self.x.view(0, step.x.shape), step.x)
        device.write(self.part.view(0, step.part.shape), step.part)
        self.norm_weight, self.gate = upload(device, step.norm_weight), upload(device, step.gate)
        self.x_out, self.h = (poisoned(device, (max_rows, n_embd), "float32") for _ in range(2))
        self.out = Activations.empty(device, max_rows, n_embd)
        for buffer in (self.out.q, self.out.scale, self.out.sums):
            device.fill(buffer, 0xA5)
        self.ids = poisoned(device, (max_rows, n_used), "int32")
        self.weights = poisoned(device, (max_rows, n_used), "float32")
        self.groups = poisoned_groups(device, max_rows, rows_per_group, n_used, n_expert)
        self.handover = Handover.empty(device, max_rows, n_expert)

    def fused(self, with_h: bool = True) -> None:
        norm_scores_select(
            self.device,
            self.step,
            self.x,
            self.x_out,
            self.part,
            self.norm_weight,
            1e-6,
            self.h if with_h else None,
            self.out,
            self.gate,
            True,
            2.5,
            self.handover,
            self.ids,
            self.weights,
            self.groups,
            self.max_rows,
        )

    def unfused(self) -> None:
        """The result of x in x."""
        device, step, rows = self.device, self.step, self.max_rows
        add_norm(device, step, self.x, self.part, None, 1, self.norm_weight, 1e-6, self.h, self.out, rows)
        scores = poisoned(device, (rows, self.gate.shape[0]), "float32")
        expert_scores(device, step, self.h, self.gate, scores, rows)
        select_experts(device, step, scores, True, 2.5, self.ids, self.weights, self.groups, rows)

    def results(self) -> list[Array]:
        """What both ways write, apart from x."""
        out, groups = self.out, self.groups
        buffers = (self.h, out.q, out.scale, out.sums, self.ids, self.weights, groups.pairs, groups.words)
        return [download(self.device, buffer) for buffer in buffers]

    def assert_handed_over(self) -> None:
        assert (download(self.device, self.handover.scores) == 0xFFFFFFFF).all()


FUSED = [
    # rows, max_rows, n_embd, n_expert, n_used: each kind of block, several rounds, parts of rounds and of blocks.
    (1, 1, 2048, 128, 8),
    (1, 4, 576, 40, 4),
    (3, 4, 2336, 10, 2),
    (0, 8, 576, 40, 4),
    (5, 8, 256, 33, 16),
    (8, 8, 32, 8, 8),
    (9, 16, 576, 40, 4),
    (13, 13, 2336, 6, 2),
    (16, 16, 288, 64, 1),
    (17, 32, 576, 40, 4),
    (32, 32, 2336, 12, 2),
    (2, 32, 6176, 5, 2),
    (3, 12, 8224, 5, 2),
]


@pytest.mark.parametrize(("rows", "max_rows", "n_embd", "n_expert", "n_used"), FUSED)
def test_one_kernel_gives_the_same_bits(
    device: Device, rows: int, max_rows: int, n_embd: int, n_expert: int, n_used: int
) -> None:
    """Everything that the three kernels write, to the last bit, and nothing else; x stays as it was."""
    step = Step.random(rows, n_embd, n_expert)
    one, three = (Stepping(device, step, max_rows, n_used, 8) for _ in range(2))
    one.fused()
    three.unfused()
    for array, expected in zip(one.results(), three.results(), strict=True):
        assert_same_bits(array, expected)
    assert_same_bits(download(device, one.x_out)[:rows], download(device, three.x)[:rows])
    assert is_poison(download(device, one.x_out)[rows:])
    assert_same_bits(download(device, one.x)[:rows], step.x)
    one.assert_handed_over()


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
@pytest.mark.parametrize("n_embd", [2048, 4096, 7168, 16384])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 16, 31, 32])
def test_one_kernel_of_models(device: Device, rows: int, n_embd: int) -> None:
    """The widths of large models; again and again, as a graph replays it."""
    step = Step.random(rows, n_embd, 256)
    one, three = (Stepping(device, step, rows, 8, 32) for _ in range(2))
    three.unfused()
    expected = three.results()
    for _ in range(50):
        one.fused()
    for array, other in zip(one.results(), expected, strict=True):
        assert_same_bits(array, other)
    one.assert_handed_over()


def test_one_kernel_replays(device: Device) -> None:
    """A graph that runs it on new rows each time, of changing number, without h."""
    first, second = Step.random(3, 576, 40), Step.random(7, 576, 40)
    one = Stepping(device, first, 8, 4, 8)
    graph = device.capture(lambda: one.fused(with_h=False))
    for step in (first, second, first):
        three = Stepping(device, step, 8, 4, 8)
        three.unfused()
        device.write(one.step.view(0, (1,)), np.array([len(step.x)], np.int32))
        device.write(one.x.view(0, step.x.shape), step.x)
        device.write(one.part.view(0, step.part.shape), step.part)
        for name in ("norm_weight", "gate"):
            device.write(getattr(one, name), getattr(step, name))
        graph.replay()
        _, *arrays = one.results()
        _, *expected = three.results()
        for array, other in zip(arrays[:-2], expected[:-2], strict=True):
            assert_same_bits(array[: len(step.x)], other[: len(step.x)])
        for array, other in zip(read_groups(device, one.groups), read_groups(device, three.groups), strict=True):
            assert_same_bits(array, other)
        one.assert_handed_over()
    assert is_poison(download(device, one.h))


def test_one_kernel_takes_broken_rows(device: Device) -> None:
    """NaN and infinities of one row end there, and do not keep anybody waiting."""
    step = Step.random(3, 576, 40)
    step.x[1, 5] = np.nan
    step.x[2, 7] = np.inf
    one, three = (Stepping(device, step, 4, 4, 8) for _ in range(2))
    # A NaN of the bits that mean: not yet.
    device.write(one.x.view(576 * 4, (1,), "uint32"), np.array([0xFFFFFFFF], np.uint32))
    one.fused()
    three.unfused()
    ids, groups = download(device, one.ids), read_groups(device, one.groups)
    np.testing.assert_array_equal(ids, download(device, three.ids))
    np.testing.assert_array_equal(groups[0], read_groups(device, three.groups)[0])
    assert_same_bits(download(device, one.weights)[0], download(device, three.weights)[0])
    assert np.isnan(download(device, one.weights)[1:3]).all()
    one.assert_handed_over()


def test_kernels_of_sizes() -> None:
    """Which instances there are, for who compiles them early."""
    names = [norm_scores_select_name(2048, 128, rows) for rows in (1, 4, 8, 16, 32)]
    assert names == [f"norm_scores_select<1, 4, {block}>" for block in ("4, 1", "4, 1", "8, 1", "8, 2", "8, 4")]
    assert norm_scores_select_name(7168, 256, 32) == "norm_scores_select<4, 8, 8, 2>"
