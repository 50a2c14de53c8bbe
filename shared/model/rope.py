"""The angles of rotary position embedding (Su et al. 2021), the same for every engine of ours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shared.model.config import RopeConfig

Float32 = npt.NDArray[np.float32]


def rope_tables(rope: RopeConfig, factors: Float32 | None, n_ctx: int) -> tuple[Float32, Float32]:
    """Cosines and sines of every position: [n_ctx, rope.dim / 2] float32 each, computed in float64.

    factors: [rope.dim / 2], by which frequencies are divided (the tensor rope_freqs.weight), or None.
    """
    frequencies = rope.base ** (-2.0 * np.arange(rope.dim // 2) / rope.dim) * rope.scale
    if factors is not None:
        frequencies = frequencies / factors
    angles = np.arange(n_ctx)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
