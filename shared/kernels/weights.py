"""Quantized matrices in a device's memory, as weights.cu lays them out: tiles of 16 rows.

Invariant: a matrix's numbers stay what the GGUF has, bit by bit; only where they lie changes. `CODECS` is the table of
quant types that the kernels decode: one row here and one header in cuda/codecs per type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import Final

from shared.errors import ModelError
from shared.kernels.device import Buffer, Device
from shared.quant.types import (
    BF16,
    F16,
    F32,
    IQ4_NL,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_K,
    Q5_0,
    Q5_K,
    Q6_K,
    Q8_0,
    QuantType,
)

THREADS: Final = 256
TILE_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class Codec:
    """How the kernels decode a type: the constants of its struct in cuda/codecs (see codec.cuh).

    struct: the struct's name, a template argument of kernels.
    elements: of a superblock; rows are filled up to whole ones.
    source_bytes, bytes: of a superblock in a GGUF and on the device.
    group: elements that share a scale; 0 for dense types (F32, F16, BF16).
    """

    struct: str
    elements: int
    source_bytes: int
    bytes: int
    group: int

    @property
    def dense(self) -> bool:
        return self.group == 0

    def n_blocks(self, k: int) -> int:
        """Superblocks of a row of k elements."""
        return ceil(k / self.elements)

    def bytes_per_matrix(self, n_rows: int, k: int) -> int:
        """Bytes of the tiles of an n_rows x k matrix."""
        return ceil(n_rows / TILE_ROWS) * TILE_ROWS * self.n_blocks(k) * self.bytes


CODECS: Final[Mapping[int, Codec]] = MappingProxyType(
    {
        F32.id: Codec("F32", 64, 256, 256, 0),
        F16.id: Codec("F16", 64, 128, 128, 0),
        BF16.id: Codec("BF16", 64, 128, 128, 0),
        Q4_0.id: Codec("Q40", 256, 144, 144, 32),
        Q5_0.id: Codec("Q50", 256, 176, 176, 32),
        Q8_0.id: Codec("Q80", 256, 272, 272, 32),
        Q2_K.id: Codec("Q2K", 256, 84, 84, 16),
        Q3_K.id: Codec("Q3K", 256, 110, 112, 16),
        Q4_K.id: Codec("Q4K", 256, 144, 144, 32),
        Q5_K.id: Codec("Q5K", 256, 176, 176, 32),
        Q6_K.id: Codec("Q6K", 256, 210, 212, 16),
        IQ4_NL.id: Codec("IQ4NL", 256, 144, 144, 32),
        IQ4_XS.id: Codec("IQ4XS", 256, 136, 136, 32),
    }
)
"""By the type's GGML id."""


def codec_of(quant: QuantType, name: str) -> Codec:
    """The codec of a tensor's type; `name` is the tensor's, for the error.

    Raises:
        ModelError: the kernels do not decode the type.
    """
    codec = CODECS.get(quant.id)
    if codec is None:
        raise ModelError(
            f"tensor {name!r} has type {quant.name}, which the cuda engine cannot decode",
            "use the ik engine, or requantize the model to a type such as Q4_K",
            "unsupported_quant_type",
        )
    return codec


@dataclass(frozen=True, slots=True)
class Tiles:
    """One matrix, or a stack of equal ones, in device memory.

    buffer: uint8 [n_matrices * bytes_per_matrix].
    """

    buffer: Buffer
    codec: Codec
    n_rows: int
    k: int
    n_matrices: int = 1

    @property
    def n_blocks(self) -> int:
        """Superblocks of a row."""
        return self.codec.n_blocks(self.k)

    @property
    def bytes_per_matrix(self) -> int:
        return self.codec.bytes_per_matrix(self.n_rows, self.k)

    def part(self, first: int, n_matrices: int = 1) -> Tiles:
        """Matrices of the stack from `first` on, in the same memory."""
        size = self.bytes_per_matrix
        return Tiles(self.buffer.view(first * size, (n_matrices * size,)), self.codec, self.n_rows, self.k, n_matrices)


def repack_kernel(codec: Codec) -> tuple[str, str]:
    """The kernel behind `repack`, for `Device.prepare`."""
    return "weights.cu", f"repack<{codec.struct}>"


def dequantize_kernel(codec: Codec, *, by_groups: bool = False) -> tuple[str, str]:
    """The kernel behind `dequantize`, for `Device.prepare`."""
    return "weights.cu", f"dequantize{'_groups' if by_groups else ''}<{codec.struct}>"


def embed_kernel(codec: Codec) -> tuple[str, str]:
    """The kernel behind `embed`, for `Device.prepare`."""
    return "weights.cu", f"embed<{codec.struct}>"


def repack(device: Device, source: Buffer, quant: QuantType, out: Tiles) -> None:
    """Whole matrices from a GGUF's layout into tiles.

    Args:
        source: uint8, all rows of all matrices one after the other, as in the file.
        quant: their type, the one that out.codec is for.
        out: as many matrices; `Tiles.part` fills a stack piece by piece.
    """
    codec = out.codec
    row_bytes = quant.bytes_per_row(out.k)
    if CODECS.get(quant.id) != codec:
        raise ValueError(f"tiles of {codec.struct} do not hold {quant.name}")
    if source.nbytes != out.n_matrices * out.n_rows * row_bytes:
        raise ValueError(f"{source.nbytes} bytes are not {out.n_matrices} x {out.n_rows} rows of {row_bytes}")
    n_superblocks = ceil(out.n_rows / TILE_ROWS) * TILE_ROWS * out.n_blocks
    device.launch(
        device.kernel(*repack_kernel(codec)),
        (ceil(n_superblocks / THREADS), out.n_matrices),
        THREADS,
        (source, out.buffer, out.n_rows, row_bytes),
    )


def dequantize(device: Device, tiles: Tiles, out: Buffer, *, by_groups: bool = False) -> None:
    """Decode everything.

    Args:
        out: float32 [n_matrices, n_rows, k].
        by_groups: go the way that products go, which gives the same; not for dense types.
    """
    device.launch(
        device.kernel(*dequantize_kernel(tiles.codec, by_groups=by_groups)),
        (tiles.n_rows, tiles.n_matrices),
        THREADS,
        (tiles.buffer, out, tiles.n_rows, tiles.k),
    )


def embed(device: Device, step: Buffer, tokens: Buffer, chosen: Buffer, table: Tiles, x: Buffer) -> None:
    """x[row] = row tokens[row] of the table, for the rows of the step.

    Args:
        step: int32, whose first number says how many rows there are.
        tokens: int32, a row's number in the table each; they must lie inside it.
        chosen: int32, where a token is negative the one to take.
        table: one matrix.
        x: float32 [rows at most, k].
    """
    device.launch(
        device.kernel(*embed_kernel(table.codec)),
        (x.shape[0],),
        THREADS,
        (step, tokens, chosen, table.buffer, x, table.k),
    )
