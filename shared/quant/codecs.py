"""NumPy codecs: quantized blocks to float32, written out from the formats' layouts; the slow truth of every kernel.

Invariant: each output is computed as `scale * q` or `scale * q - minimum` in float32, with `scale` and `minimum`
themselves products in float32, so that values are bit-equal to ggml's scalar reference.

Layouts below are little-endian C structs; `d` and the like are float16. Low and high nibbles of a byte belong to
elements that are half a (sub-)block apart, never to neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.errors import ModelError
from shared.quant.types import (
    BF16,
    F16,
    F32,
    IQ4_NL,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    QuantType,
)

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

# Elements decoded at a time: bounds the temporaries and keeps them in the cache.
_PIECE: Final = 1 << 18

# The 16 levels of IQ4_NL and IQ4_XS.
IQ4_LEVELS: Final = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)


def has_codec(quant: QuantType) -> bool:
    """Whether `dequantize` knows the type."""
    return quant.id in _CODECS


def dequantize(raw: UInt8, quant: QuantType, name: str) -> Float32:
    """Decode whole blocks.

    Args:
        raw: [n_blocks * bytes_per_block] uint8, contiguous; whole rows one after the other (no type here has a row
            header, so rows need not be told apart).
        quant: the type of the blocks.
        name: the tensor's, for errors.

    Returns:
        [n_blocks * block_size] float32, a new array.

    Raises:
        ModelError: there is no NumPy codec for the type, or raw is no whole number of blocks.
    """
    codec = _CODECS.get(quant.id)
    if codec is None:
        raise ModelError(
            f"tensor {name!r} has type {quant.name}, which the numpy engine cannot decode",
            "use the ik engine, or requantize the model to a type such as Q4_K",
            "unsupported_quant_type",
        )
    n_blocks, rest = divmod(len(raw), quant.bytes_per_block)
    if rest:
        raise ModelError(
            f"tensor {name!r} has {len(raw)} bytes, no whole number of {quant.name} blocks", code="bad_gguf"
        )
    out = np.empty((n_blocks, quant.block_size), np.float32)
    blocks = raw.reshape(n_blocks, quant.bytes_per_block)
    step = max(1, _PIECE // quant.block_size)
    # A damaged scale may be infinite; what it gives is the model's business, not a warning's.
    with np.errstate(all="ignore"):
        for at in range(0, n_blocks, step):
            codec(blocks[at : at + step], out[at : at + step])
    return out.reshape(-1)


# Every codec: blocks [n, bytes_per_block] uint8 -> out [n, block_size] float32.


def _f32(blocks: UInt8, out: Float32) -> None:
    out[:, 0] = _little(blocks, "<f4")


def _f16(blocks: UInt8, out: Float32) -> None:
    out[:, 0] = _little(blocks, "<f2")


def _bf16(blocks: UInt8, out: Float32) -> None:
    """The upper half of a float32."""
    out[:, 0] = (_little(blocks, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q4_0(blocks: UInt8, out: Float32) -> None:
    """{f16 d; u8 qs[16]}: d * (q - 8); low nibbles are elements 0-15, high ones 16-31."""
    d, qs = _half(blocks, 0), blocks[:, 2:18]
    _nibbles(qs, out)
    out -= 8
    out *= d


def _q4_1(blocks: UInt8, out: Float32) -> None:
    """{f16 d; f16 m; u8 qs[16]}: d * q + m."""
    d, m, qs = _half(blocks, 0), _half(blocks, 2), blocks[:, 4:20]
    _nibbles(qs, out)
    out *= d
    out += m


def _q5_0(blocks: UInt8, out: Float32) -> None:
    """{f16 d; u32 qh; u8 qs[16]}: d * (q - 16); bit i of qh is bit 4 of element i."""
    d = _half(blocks, 0)
    _nibbles(blocks[:, 6:22], out)
    out += np.float32(16) * _bits(blocks[:, 2:6])
    out -= 16
    out *= d


def _q5_1(blocks: UInt8, out: Float32) -> None:
    """{f16 d; f16 m; u32 qh; u8 qs[16]}: d * q + m."""
    d, m = _half(blocks, 0), _half(blocks, 2)
    _nibbles(blocks[:, 8:24], out)
    out += np.float32(16) * _bits(blocks[:, 4:8])
    out *= d
    out += m


def _q8_0(blocks: UInt8, out: Float32) -> None:
    """{f16 d; i8 qs[32]}: d * q."""
    np.multiply(blocks[:, 2:34].view(np.int8), _half(blocks, 0), out=out)


def _q2_k(blocks: UInt8, out: Float32) -> None:
    """{u8 scales[16]; u8 qs[64]; f16 d; f16 dmin}: 16 sub-blocks of 16, d * scale * q - dmin * minimum.

    A scale is the low, a minimum the high nibble of scales[sub-block]. Half h of the block (128 elements) is in
    qs[32 h : 32 h + 32]; element 32 j + l of it in bits 2 j, 2 j + 1 of byte l.
    """
    n = len(blocks)
    scale = _half(blocks, 80) * (blocks[:, :16] & 15)  # [n, 16] float32
    minimum = _half(blocks, 82) * (blocks[:, :16] >> 4)
    qs = blocks[:, 16:80].reshape(n, 2, 1, 32)
    q = (qs >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3  # [n, 2, 4, 32]
    values = out.reshape(n, 16, 16)
    np.multiply(q.reshape(n, 16, 16), scale[:, :, None], out=values)
    values -= minimum[:, :, None]


def _q3_k(blocks: UInt8, out: Float32) -> None:
    """{u8 hmask[32]; u8 qs[64]; u8 scales[12]; f16 d}: 16 sub-blocks of 16, d * (scale - 32) * (q - 4).

    The low two bits of q lie in qs as in Q2_K; bit 2 of element 32 j + l is bit j of hmask[l]. The 6-bit scales: low
    nibbles of scales[0:8] and then high nibbles of them are bits 0-3 of scales 0-15; bits 4 and 5 of scale s are
    bits 2 (s // 4) and up of scales[8 + s % 4].
    """
    n = len(blocks)
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)  # [n, 16]
    high = (packed[:, None, 8:12] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3  # [n, 4, 4]
    scale = _half(blocks, 108) * ((low | high.reshape(n, 16) << 4).astype(np.float32) - np.float32(32))
    two = (blocks[:, 32:96].reshape(n, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3  # [n, 2, 4, 32]
    third = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # [n, 8, 32]
    q = (two.reshape(n, 8, 32) | third << 2).astype(np.float32) - np.float32(4)
    np.multiply(q.reshape(n, 16, 16), scale[:, :, None], out=out.reshape(n, 16, 16))


def _q4_k(blocks: UInt8, out: Float32) -> None:
    """{f16 d; f16 dmin; u8 scales[12]; u8 qs[128]}: 8 sub-blocks of 32, d * scale * q - dmin * minimum.

    Sub-blocks 2 j and 2 j + 1 are the low and the high nibbles of qs[32 j : 32 j + 32].
    """
    n = len(blocks)
    scale, minimum = _scales_k4(blocks)
    values = out.reshape(n, 8, 32)
    _nibbles(blocks[:, 16:144].reshape(n * 4, 32), values.reshape(n * 4, 64))
    values *= scale[:, :, None]
    values -= minimum[:, :, None]


def _q5_k(blocks: UInt8, out: Float32) -> None:
    """{f16 d; f16 dmin; u8 scales[12]; u8 qh[32]; u8 qs[128]}: as Q4_K; bit j of qh[l] is bit 4 of element 32 j + l."""
    n = len(blocks)
    scale, minimum = _scales_k4(blocks)
    values = out.reshape(n, 8, 32)
    _nibbles(blocks[:, 48:176].reshape(n * 4, 32), values.reshape(n * 4, 64))
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # [n, 8, 32]
    values += fifth << 4
    values *= scale[:, :, None]
    values -= minimum[:, :, None]


def _q6_k(blocks: UInt8, out: Float32) -> None:
    """{u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d}: 16 sub-blocks of 16, d * scale * (q - 32).

    In half h (128 elements): bits 0-3 of elements 0-63 are the low nibbles of ql[64 h : 64 h + 64], of 64-127 the high
    ones; bits 4 and 5 of element 32 j + l are bits 2 j and up of qh[32 h + l].
    """
    n = len(blocks)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)  # [n, 16]
    low = np.empty((n, 2, 2, 64), np.uint8)
    ql = blocks[:, :128].reshape(n, 2, 64)
    np.bitwise_and(ql, 15, out=low[:, :, 0])
    np.right_shift(ql, 4, out=low[:, :, 1])
    high = (blocks[:, 128:192].reshape(n, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    q = (low.reshape(n, 256) | high.reshape(n, 256) << 4).view(np.int8) - np.int8(32)
    np.multiply(q.reshape(n, 16, 16), scale[:, :, None], out=out.reshape(n, 16, 16))


def _iq4_nl(blocks: UInt8, out: Float32) -> None:
    """{f16 d; u8 qs[16]}: d * level[q]; nibbles as in Q4_0."""
    qs = blocks[:, 2:18]
    np.take(IQ4_LEVELS, qs & 15, out=out[:, :16])
    np.take(IQ4_LEVELS, qs >> 4, out=out[:, 16:])
    out *= _half(blocks, 0)


def _iq4_xs(blocks: UInt8, out: Float32) -> None:
    """{f16 d; u16 scales_h; u8 scales_l[4]; u8 qs[128]}: 8 sub-blocks of 32, d * (scale - 32) * level[q].

    Sub-block s is coded in qs[16 s : 16 s + 16] as in IQ4_NL. Bits 0-3 of its scale are a nibble of scales_l[s // 2]
    (low for even s), bits 4 and 5 are bits 2 s and up of scales_h.
    """
    n = len(blocks)
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(n, 8).astype(np.uint16)
    packed = _little(blocks[:, 2:4], "<u2").astype(np.uint16)[:, None]
    high = (packed >> np.arange(0, 16, 2, dtype=np.uint16)) & np.uint16(3)
    scale = _half(blocks, 0) * ((low | high << 4).astype(np.float32) - np.float32(32))
    qs = blocks[:, 8:136].reshape(n, 8, 16)
    values = out.reshape(n, 8, 32)
    values[:, :, :16] = IQ4_LEVELS[qs & 15]
    values[:, :, 16:] = IQ4_LEVELS[qs >> 4]
    values *= scale[:, :, None]


def _little(blocks: UInt8, dtype: str) -> npt.NDArray[np.generic]:
    """[n, itemsize] uint8 -> [n] of a little-endian dtype."""
    return np.ascontiguousarray(blocks).view(np.dtype(dtype))[:, 0]


def _half(blocks: UInt8, at: int) -> Float32:
    """The float16 at a byte offset of each block: [n, 1] float32."""
    return _little(blocks[:, at : at + 2], "<f2").astype(np.float32)[:, None]


def _nibbles(qs: UInt8, out: Float32) -> None:
    """qs [n, k] -> out [n, 2 k]: all low nibbles, then all high ones."""
    k = qs.shape[1]
    np.copyto(out[:, :k], qs & 15)
    np.copyto(out[:, k:], qs >> 4)


def _bits(packed: UInt8) -> UInt8:
    """[n, k] -> [n, 8 k]: the bits, lowest first."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _scales_k4(blocks: UInt8) -> tuple[Float32, Float32]:
    """d * scale and dmin * minimum of Q4_K and Q5_K: [n, 8] float32 each.

    12 bytes s hold eight 6-bit scales and minima. For j < 4: scale j is s[j] & 63, minimum j is s[j + 4] & 63. For
    j >= 4 the low nibble of s[j + 4] is bits 0-3 of scale j, the high one of minimum j; their bits 4 and 5 are the top
    two bits of s[j - 4] and of s[j].
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * minima


_CODECS: Final[Mapping[int, Callable[[UInt8, Float32], None]]] = MappingProxyType(
    {
        F32.id: _f32,
        F16.id: _f16,
        BF16.id: _bf16,
        Q4_0.id: _q4_0,
        Q4_1.id: _q4_1,
        Q5_0.id: _q5_0,
        Q5_1.id: _q5_1,
        Q8_0.id: _q8_0,
        Q2_K.id: _q2_k,
        Q3_K.id: _q3_k,
        Q4_K.id: _q4_k,
        Q5_K.id: _q5_k,
        Q6_K.id: _q6_k,
        IQ4_NL.id: _iq4_nl,
        IQ4_XS.id: _iq4_xs,
    }
)
