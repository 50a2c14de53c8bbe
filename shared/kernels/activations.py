"""Rows of activations in 8 bits, as the quantized products read them (cuda/activations.cuh)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from shared.kernels.device import Buffer, Device

GROUP = 256
"""Elements that share a scale; rows are padded with zeros to whole groups."""
SUMS = 24
"""Per group: the sums of its 16 runs of 16, then of its 8 runs of 32."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Quantized rows of width `k`: about scale * q.

    q: [rows, k padded] int8. scale: [rows, groups] float32. sums: [rows, groups, 24] int16, of q.
    """

    q: Buffer
    scale: Buffer
    sums: Buffer
    k: int

    @classmethod
    def empty(cls, device: Device, rows: int, k: int) -> Activations:
        groups = ceil(k / GROUP)
        return cls(
            q=device.empty((rows, groups * GROUP), "int8"),
            scale=device.empty((rows, groups), "float32"),
            sums=device.empty((rows, groups, SUMS), "int16"),
            k=k,
        )
