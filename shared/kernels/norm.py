"""Launching norm.cu: sums of the residual stream, RMS norms, and quantization of rows.

`step` is int32 in device memory: the number of rows of this step, then the number of rows whose logits are wanted.
`max_rows` sizes the grid, which a graph fixes when it is captured.
"""

from __future__ import annotations

from math import ceil

from shared.kernels.activations import Activations
from shared.kernels.device import Buffer, Device

MAX_EMBD = 16384
"""The widest rows that the norms take."""

_THREADS = 256
_ROUND_ELEMENTS = 8 * _THREADS
_SHARED_BYTES = 4 * _THREADS // 32


def add_norm_name(n_embd: int) -> str:
    """The instance of `add_norm` for a width."""
    return f"add_norm<{ceil(n_embd / _ROUND_ELEMENTS)}>"


def output_norm_name(n_embd: int) -> str:
    """The instance of `output_norm` for a width."""
    return f"output_norm<{ceil(n_embd / _ROUND_ELEMENTS)}>"


def add_norm(
    device: Device,
    step: Buffer,
    x: Buffer,
    parts: Buffer | None,
    part_weights: Buffer | None,
    n_parts: int,
    norm_weight: Buffer,
    eps: float,
    h: Buffer | None,
    out: Activations,
    max_rows: int,
) -> None:
    """x += the weighted sum of each row's parts; h and out = the norm of x, for the first step[0] rows.

    Args:
        x: [rows, n_embd] float32; not written where n_parts is 0. x, parts and part_weights have max_rows rows, those
            beyond the step with any content.
        parts: [rows, n_parts, n_embd] float32. part_weights: [rows, n_parts] float32; None adds parts as they are.
        norm_weight: [n_embd] float32, n_embd a multiple of 32 up to 16384.
        h: [rows, n_embd] float32, or None where only `out` is wanted.
    """
    device.launch(
        device.kernel("norm.cu", add_norm_name(norm_weight.size)),
        (max_rows,),
        _THREADS,
        [
            *(step, x, parts, part_weights, n_parts, norm_weight, float(eps), norm_weight.size),
            *(h, out.q, out.scale, out.sums),
        ],
        _SHARED_BYTES,
    )


def output_norm(
    device: Device,
    step: Buffer,
    out_rows: Buffer,
    x: Buffer,
    parts: Buffer | None,
    part_weights: Buffer | None,
    n_parts: int,
    norm_weight: Buffer,
    eps: float,
    h: Buffer | None,
    out: Activations,
    max_rows: int,
) -> None:
    """`add_norm` of rows out_rows[: step[1]] of x and parts into the first rows of h and out; x is not written.

    out_rows: int32 [max_rows]. The others: as of `add_norm`.
    """
    device.launch(
        device.kernel("norm.cu", output_norm_name(norm_weight.size)),
        (max_rows,),
        _THREADS,
        [
            *(step, out_rows, x, parts, part_weights, n_parts, norm_weight, float(eps), norm_weight.size),
            *(h, out.q, out.scale, out.sums),
        ],
        _SHARED_BYTES,
    )


def quantize(device: Device, n_rows: Buffer, rows_factor: int, x: Buffer, out: Activations, max_rows: int) -> None:
    """out = the first n_rows[0] * rows_factor rows of x: [rows, out.k] float32, out.k a multiple of 32."""
    device.launch(
        device.kernel("norm.cu", "quantize"),
        (max_rows,),
        _THREADS,
        [n_rows, rows_factor, x, out.k, out.q, out.scale, out.sums],
    )
