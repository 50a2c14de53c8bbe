"""Launching choose.cu: a draft's next tokens, chosen on the device."""

from __future__ import annotations

from typing import Final

import numpy as np

from shared.kernels.device import Buffer, Device
from shared.kernels.head import TOP

CHOICE: Final = np.dtype(
    [("seed", "u8"), ("temperature", "f8"), ("top_p", "f8"), ("min_p", "f8"), ("top_k", "i4"), ("position", "i4")]
)
"""A row's request: parameters as in `shared.sampling.params`, and the position of the first token to choose."""

KERNEL: Final = ("choose.cu", "choose")
"""For `Device.prepare`."""


def choose(
    device: Device,
    step: Buffer,
    choices: Buffer,
    ids: Buffer,
    values: Buffer,
    log_sums: Buffer,
    tokens: Buffer,
    history: Buffer,
    confidences: Buffer,
) -> None:
    """The token of each of the first step[1] rows, in the pass number step[4] of a chain.

    Args:
        choices: CHOICE [rows].
        ids, values, log_sums: the rows' leaders and log-sum-exp, as of `head.top_merge`.
        tokens: int32 [rows], what the next pass takes.
        history: int32, confidences: float32 in (0, 1], both [passes, rows].
    """
    device.launch(
        device.kernel(*KERNEL),
        (ids.shape[0],),
        TOP,
        [step, choices, ids, values, log_sums, tokens, history, confidences, history.shape[1]],
    )
