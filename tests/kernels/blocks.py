"""Random quantized matrices, as a GGUF holds them."""

from __future__ import annotations

import numpy as np

from shared.quant import types
from shared.quant.types import QuantType
from tests.kernels.arrays import Array

# Byte offsets of the float16 scales of a block, which must stay finite.
SCALES = {
    "Q4_0": (0,),
    "Q5_0": (0,),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def random_matrix(quant: QuantType, n_rows: int, k: int, seed: int = 0) -> Array:
    """Rows whose scales (and, for float types, values) are finite: [n_rows * bytes_per_row] uint8."""
    rng = np.random.default_rng([seed, n_rows, k])
    n = n_rows * k // quant.block_size
    if quant.name not in SCALES:
        values = rng.standard_normal(n).astype(np.float32)
        if quant is types.BF16:
            return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        return values.astype("<f4" if quant is types.F32 else "<f2").view(np.uint8)
    blocks = rng.integers(0, 256, (n, quant.bytes_per_block), dtype=np.uint8)
    for at in SCALES[quant.name]:
        blocks[:, at : at + 2] = rng.standard_normal(n).astype("<f2").view(np.uint8).reshape(n, 2)
    return blocks.reshape(-1)
