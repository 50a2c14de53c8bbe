"""Launching experts.cu: expert selection, and the groups of rows that products with experts work through.

`step` and `max_rows`: as in norm.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from shared.kernels.activations import Activations
from shared.kernels.device import Argument, Buffer, Device

_SCORE_EXPERTS = 4
_WARPS = 8
_GROUP_THREADS = 1024
_ROUND_ELEMENTS = 2048
_SLOTS = 16
_KEYS_AT_ONCE = 8
_ROWS_BYTES = 64 * 1024
"""Most shared memory of a block of `norm_scores_select` for its rows,"""
_FUSED_BYTES = 96 * 1024
"""and for these and its experts' weights, so that every GPU since compute capability 8.0 has it."""

FEW_ROWS = 32
"""Up to so many rows `norm_scores_select` takes, and `select_experts` is one kernel."""
MAX_EXPERTS = 512
MAX_EXPERTS_USED = _SLOTS
MAX_ROWS = 1024
"""What `select_experts` takes."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Pairs of a row and one of its experts, cut into groups of one expert (experts.cu).

    pairs: int32 [max_groups, rows_per_group], the pairs row * n_used + slot by ascending expert, then ascending; what
        is beyond a group's number of pairs means nothing.
    words: uint64 [n_layers, max_groups], what a group is and in which pass: products take it as soon as it is there.
        Each layer of a pass needs its own, since a product may look before its layer's experts are selected.
    layer: whose groups they are.
    """

    pairs: Buffer
    words: Buffer
    layer: int = 0

    @classmethod
    def empty(
        cls,
        device: Device,
        max_rows: int,
        rows_per_group: int,
        n_used: int,
        n_expert: int,
        n_layers: int = 1,
    ) -> Groups:
        """Room for the groups of `max_rows` rows; rows_per_group is a power of two, 2 to 64."""
        n_pairs = max_rows * n_used
        # An expert that has c >= 1 pairs has at most 1 + (c - 1) / rows_per_group groups.
        active = min(n_expert, n_pairs)
        max_groups = active + (n_pairs - active) // rows_per_group
        pairs = device.empty((max_groups, rows_per_group), "int32")
        return cls(pairs, device.zeros((n_layers, max_groups), "uint64"))

    @property
    def max_groups(self) -> int:
        return self.pairs.shape[0]

    @property
    def rows_per_group(self) -> int:
        return self.pairs.shape[1]

    @property
    def own_words(self) -> Buffer:
        """uint64 [max_groups], those of the layer."""
        return self.words.view(8 * self.layer * self.max_groups, (self.max_groups,))


@dataclass(frozen=True, slots=True)
class Handover:
    """How the blocks of `norm_scores_select` hand over their scores; between launches always as `empty` made it.

    scores: uint32 [rows, n_expert], all 0xffffffff.
    """

    scores: Buffer

    @classmethod
    def empty(cls, device: Device, max_rows: int, n_expert: int) -> Handover:
        """For steps of up to `max_rows` rows, of which FEW_ROWS are enough."""
        scores = device.empty((min(max_rows, FEW_ROWS), n_expert), "uint32")
        device.fill(scores, 0xFF)
        return cls(scores)


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
        max_rows: few rows take one kernel, which tests compare `norm_scores_select` with; more take two. The results
            are the same.
    """
    n_expert, n_used = scores.shape[1], ids.shape[1]
    both, select, group = select_experts_names(n_expert)
    selection: list[Argument] = [scores, n_expert, n_used, int(normalize), float(expert_scale), ids, weights]
    if max_rows <= FEW_ROWS:
        arguments = [step, *selection, *_group_arguments(groups)]
        shared = _few_rows_bytes(n_expert, n_used, max_rows)
        device.launch(device.kernel("experts.cu", both), (1,), 32 * _WARPS, arguments, shared)
        return
    grid = (ceil(max_rows / _WARPS),)
    kernel = device.kernel("experts.cu", select)
    device.launch(kernel, grid, 32 * _WARPS, [step, *selection], _key_bytes(n_expert))
    arguments = [step, n_expert, n_used, ids, *_group_arguments(groups)]
    shared = 64 * n_expert + 4 * (n_expert + 33)
    device.launch(device.kernel("experts.cu", group), (1,), _GROUP_THREADS, arguments, shared)


def norm_scores_select_name(n_embd: int, n_expert: int, max_rows: int) -> str:
    """The instance of `norm_scores_select` for a number of rows; the results are the same."""
    experts, rows = _fused_block(n_embd, max_rows)
    return f"norm_scores_select<{ceil(n_embd / _ROUND_ELEMENTS)}, {ceil(n_expert / 32)}, {experts}, {rows}>"


def norm_scores_select(
    device: Device,
    step: Buffer,
    x: Buffer,
    x_out: Buffer,
    part: Buffer,
    norm_weight: Buffer,
    eps: float,
    h: Buffer | None,
    out: Activations,
    gate_weight: Buffer,
    normalize: bool,
    expert_scale: float,
    handover: Handover,
    ids: Buffer,
    weights: Buffer,
    groups: Groups,
    max_rows: int,
) -> None:
    """`add_norm` with one part, `expert_scores` and `select_experts` of a few rows at once, with the same bits.

    Args:
        x, x_out, part: [rows, n_embd] float32, all of max_rows rows and different: x_out = x + part.
        norm_weight, eps, h, out: as of `add_norm`.
        gate_weight: [n_expert, n_embd] float32. ids, weights, groups: as of `select_experts`.
        max_rows: up to FEW_ROWS, and up to what `handover` is for.
    """
    n_expert, n_embd = gate_weight.shape
    n_used = ids.shape[1]
    experts, rows = _fused_block(n_embd, max_rows)
    early = min(n_embd, (_FUSED_BYTES - 4 * rows * n_embd) // (4 * experts) // 128 * 128)
    device.launch(
        device.kernel("experts.cu", norm_scores_select_name(n_embd, n_expert, max_rows)),
        (ceil(n_expert / experts) + 1, ceil(max_rows / rows)),
        32 * _WARPS,
        [
            *(step, max_rows, x, x_out, part, norm_weight, float(eps), n_embd, h, out.q, out.scale, out.sums),
            *(
                gate_weight,
                early,
                n_expert,
                n_used,
                int(normalize),
                float(expert_scale),
                handover.scores,
            ),
            *(ids, weights, *_group_arguments(groups)),
        ],
        max(4 * rows * (n_embd + _WARPS) + 4 * experts * early, _few_rows_bytes(n_expert, n_used, max_rows)),
    )


def _fused_block(n_embd: int, max_rows: int) -> tuple[int, int]:
    """Experts and rows of a block: about a block per multiprocessor with 128 experts, whatever the rows."""
    rows = 1
    while rows < 4 and 8 * rows < max_rows and 2 * rows * 4 * n_embd <= _ROWS_BYTES:
        rows *= 2
    return 4 if max_rows <= 4 else 8, rows


def _group_arguments(groups: Groups) -> list[Argument]:
    return [groups.rows_per_group.bit_length() - 1, groups.max_groups, groups.pairs, groups.own_words]


def _key_bytes(n_expert: int) -> int:
    """Shared memory of a block's warps for `select_row`."""
    return 8 * _WARPS * (_SLOTS + max(32, _SLOTS * ceil(n_expert / 32)) + _KEYS_AT_ONCE)


def _few_rows_bytes(n_expert: int, n_used: int, max_rows: int) -> int:
    """Shared memory of `FewRows`."""
    return _key_bytes(n_expert) + 8 * n_expert + 128 * n_used + 16 + 4 * max_rows * n_expert
