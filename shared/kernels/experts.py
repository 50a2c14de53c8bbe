"""Launching experts.cu: expert selection, and the groups of rows that products with experts work through.

`step` and `max_rows`: as in norm.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from shared.kernels.device import Argument, Buffer, Device

_SCORE_EXPERTS = 4
_SELECT_ROWS = 8
_GROUP_THREADS = 1024
_FEW_ROWS = 16

MAX_EXPERTS = 512
MAX_EXPERTS_USED = 16
MAX_ROWS = 1024
"""What `select_experts` takes."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Pairs of a row and one of its experts, cut into groups of one expert (experts.cu).

    pairs: int32, the pairs row * n_used + slot by ascending expert, then ascending.
    table: int32 [1 + 3 * max_groups]: the number of groups, then the groups' experts, their beginnings in `pairs`, and
        their numbers of pairs (1 .. rows_per_group), each in an array of max_groups.
    """

    pairs: Buffer
    table: Buffer
    max_groups: int
    rows_per_group: int

    @classmethod
    def empty(cls, device: Device, max_rows: int, rows_per_group: int, n_used: int = 1, n_expert: int = 1) -> Groups:
        """Room for `max_rows` rows; the defaults are those of a plain matrix."""
        n_pairs = max_rows * n_used
        # An expert that has c >= 1 pairs has at most 1 + (c - 1) / rows_per_group groups.
        active = min(n_expert, n_pairs)
        max_groups = active + (n_pairs - active) // rows_per_group
        return cls(
            pairs=device.empty((n_pairs,), "int32"),
            table=device.empty((1 + 3 * max_groups,), "int32"),
            max_groups=max_groups,
            rows_per_group=rows_per_group,
        )


def expert_scores_name(max_rows: int) -> str:
    """The instance of `expert_scores` for a number of rows; the results are the same."""
    return f"expert_scores<{_score_rows(max_rows)}>"


def expert_scores(device: Device, step: Buffer, h: Buffer, weight: Buffer, scores: Buffer, max_rows: int) -> None:
    """scores [rows, n_expert] = h [rows, n_embd] times weight [n_expert, n_embd] transposed, all float32."""
    n_expert, n_embd = weight.shape
    device.launch(
        device.kernel("experts.cu", expert_scores_name(max_rows)),
        (ceil(n_expert / _SCORE_EXPERTS), ceil(max_rows / _score_rows(max_rows))),
        32 * _SCORE_EXPERTS,
        [step, h, weight, n_expert, n_embd, scores],
    )


def _score_rows(max_rows: int) -> int:
    """Rows of a block."""
    return 4 if max_rows <= 32 else 8


def select_experts_names(n_expert: int) -> list[str]:
    """The kernels that `select_experts` may use for a number of experts."""
    per_lane = ceil(n_expert / 32)
    return [f"select_and_group<{per_lane}>", f"select_experts<{per_lane}>", "group_experts"]


def select_experts(
    device: Device,
    step: Buffer,
    scores: Buffer,
    normalize: bool,
    expert_scale: float,
    ids: Buffer,
    weights: Buffer,
    groups: Groups,
    max_rows: int,
) -> None:
    """Each row's best experts with their weights, and the groups of all rows.

    Args:
        scores: [rows, n_expert] float32.
        normalize: divide a row's weights by their sum. expert_scale: multiplies the weights after that.
        ids: [rows, n_used] int32. weights: [rows, n_used] float32.
        max_rows: few rows take one kernel, more take two; the results are the same.
    """
    n_expert, n_used = scores.shape[1], ids.shape[1]
    both, select, group = select_experts_names(n_expert)
    selection: list[Argument] = [scores, n_expert, n_used, int(normalize), float(expert_scale), ids, weights]
    table: list[Argument] = [groups.rows_per_group, groups.max_groups, groups.pairs, groups.table]
    shared = 64 * n_expert + 4 * (n_expert + 32)
    if max_rows <= _FEW_ROWS:
        device.launch(device.kernel("experts.cu", both), (1,), _GROUP_THREADS, [step, *selection, *table], shared)
        return
    grid = (ceil(max_rows / _SELECT_ROWS),)
    device.launch(device.kernel("experts.cu", select), grid, 32 * _SELECT_ROWS, [step, *selection])
    arguments = [step, n_expert, n_used, ids, *table]
    device.launch(device.kernel("experts.cu", group), (1,), _GROUP_THREADS, arguments, shared)


def dense_groups(device: Device, step: Buffer, which: int, groups: Groups) -> None:
    """The groups of a plain matrix for step[which] rows: 0, all rows of the step, or 1, those with wanted logits."""
    device.launch(
        device.kernel("experts.cu", "dense_groups"),
        (1,),
        _GROUP_THREADS,
        [step, which, groups.rows_per_group, groups.max_groups, groups.pairs, groups.table],
    )
