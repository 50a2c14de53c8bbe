"""Codecs and weights.cu: tiles hold what the GGUF holds, both ways to decode them agree, against the `gguf` package."""

from __future__ import annotations

import re
from dataclasses import astuple

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize as gguf_dequantize

from shared.errors import ModelError
from shared.kernels import weights
from shared.kernels.device import Device
from shared.kernels.launching import SOURCES
from shared.kernels.weights import CODECS, TILE_ROWS, Tiles, codec_of
from shared.quant import types
from shared.quant.types import BY_ID, QuantType
from tests.kernels.arrays import Array, assert_same_bits, download, is_poison, poisoned, step_of, upload
from tests.kernels.blocks import SCALES, random_matrix

QUANTS = [BY_ID[id_] for id_ in CODECS]
SCALED = [quant for quant in QUANTS if not CODECS[quant.id].dense]

names = pytest.mark.parametrize("quant", QUANTS, ids=lambda quant: quant.name)


@pytest.fixture(autouse=True)
def _kernels(device: Device) -> None:
    """Every kernel of weights.cu: to compile them together is quicker than one by one."""
    device.prepare(
        [
            kernel
            for codec in CODECS.values()
            for kernel in (
                weights.repack_kernel(codec),
                weights.dequantize_kernel(codec),
                weights.embed_kernel(codec),
                *([] if codec.dense else [weights.dequantize_kernel(codec, by_groups=True)]),
            )
        ]
    )


def random_rows(quant: QuantType, n_rows: int, k: int) -> Array:
    """[n_rows, bytes_per_row] uint8."""
    return random_matrix(quant, n_rows, k).reshape(n_rows, -1)


def expected_rows(quant: QuantType, raw: Array) -> Array:
    """What the `gguf` package decodes: [n_rows, k]."""
    return gguf_dequantize(raw, gguf.GGMLQuantizationType(quant.id)).astype(np.float32)


def lengths(quant: QuantType) -> tuple[int, int]:
    """Lengths of rows: whole superblocks, and, where the type has such rows, a part of one at the end."""
    return 512, 256 + (quant.block_size if quant.block_size > 1 else 3) if quant.block_size < 256 else 768


def repacked(device: Device, quant: QuantType, raw: Array, n_matrices: int, k: int) -> Tiles:
    """Rows of some matrices, as tiles."""
    codec = codec_of(quant, "x")
    n_rows = len(raw) // n_matrices
    buffer = device.empty((n_matrices * codec.bytes_per_matrix(n_rows, k),), np.uint8)
    tiles = Tiles(buffer, codec, n_rows, k, n_matrices)
    weights.repack(device, upload(device, raw.reshape(-1)), quant, tiles)
    return tiles


def decoded(device: Device, tiles: Tiles, *, by_groups: bool = False) -> Array:
    """[n_matrices * n_rows, k] float32."""
    out = device.empty((tiles.n_matrices * tiles.n_rows, tiles.k), np.float32)
    weights.dequantize(device, tiles, out, by_groups=by_groups)
    return download(device, out)


def test_the_table_says_what_the_headers_say() -> None:
    """Sizes and groups of every struct in cuda/codecs are those of its row in `CODECS`, and none is missing there."""
    found: set[tuple[str, int, int, int, int]] = set()
    for path in (SOURCES / "codecs").glob("*.cuh"):
        text = path.read_text("utf-8")
        constants = dict(re.findall(r"static constexpr \w+ (k\w+) = (\w+);", text))
        if "kDense" in constants:
            (struct,) = re.findall(r"^struct (\w+) \{", text, re.MULTILINE)
            group = int(constants.get("kGroup", "0"))
            assert constants["kDense"] == str(group == 0).lower()
            elements, source_bytes, n_bytes = (int(constants[key]) for key in ("kElements", "kSourceBytes", "kBytes"))
            found.add((struct, elements, source_bytes, n_bytes, group))
            assert f'#include "{path.name}"' in (SOURCES / "codecs" / "all.cuh").read_text("utf-8")
    assert found == {astuple(codec) for codec in CODECS.values()}


@names
def test_superblocks_are_whole_blocks_of_the_file(quant: QuantType) -> None:
    """A superblock has as many bytes in the file as its elements take there, and an address that loads can use."""
    codec = CODECS[quant.id]
    assert quant.bytes_per_row(codec.elements) == codec.source_bytes
    assert codec.bytes % (8 if codec.group == 32 else 4) == 0


@names
def test_tiles_decode_to_what_the_file_holds(device: Device, quant: QuantType) -> None:
    """Stacked matrices, last tiles and last superblocks that are not full: values are bit-equal to the gguf package's,
    and so are those decoded the way that products go."""
    for k in lengths(quant):
        raw = random_rows(quant, 2 * 19, k)
        tiles = repacked(device, quant, raw, 2, k)
        assert_same_bits(decoded(device, tiles), expected_rows(quant, raw))
        if not tiles.codec.dense:
            assert_same_bits(decoded(device, tiles, by_groups=True), expected_rows(quant, raw))


@names
def test_what_fills_tiles_up_is_zero(device: Device, quant: QuantType) -> None:
    """Rows after the last one and elements after a row's last one decode to zeros, both ways."""
    codec = codec_of(quant, "x")
    k = lengths(quant)[1]
    raw = random_rows(quant, 3, k)
    tiles = repacked(device, quant, raw, 1, k)
    whole = Tiles(tiles.buffer, codec, TILE_ROWS, tiles.n_blocks * codec.elements)
    for by_groups in (False, True)[: 1 if codec.dense else 2]:
        values = decoded(device, whole, by_groups=by_groups)
        assert_same_bits(values[:3, :k], expected_rows(quant, raw))
        assert (values[3:] == 0).all()
        assert (values[:, k:] == 0).all()


@names
def test_a_stack_is_filled_piece_by_piece(device: Device, quant: QuantType) -> None:
    """Repacking a stack's matrices one at a time, each into its part of the memory, equals repacking them together."""
    raw = random_rows(quant, 2 * 5, 256)
    together = repacked(device, quant, raw, 2, 256)
    apart = Tiles(device.empty(together.buffer.shape, np.uint8), together.codec, 5, 256, 2)
    for i in range(2):
        weights.repack(device, upload(device, raw[5 * i : 5 * i + 5].reshape(-1)), quant, apart.part(i))
    np.testing.assert_array_equal(download(device, together.buffer), download(device, apart.buffer))


@pytest.mark.parametrize("quant", SCALED, ids=lambda quant: quant.name)
def test_extreme_blocks_decode_the_same(device: Device, quant: QuantType) -> None:
    """Blocks whose bytes are all ones, or all zeros, with scales that are subnormal, huge, negative or zero."""
    scales = np.array([6e-8, -65504, 65504, -0.0, 1], np.float16)
    n = len(scales)
    per_row = 256 // quant.block_size
    for byte in (0x00, 0xFF):
        blocks = np.full((n, per_row, quant.bytes_per_block), byte, np.uint8)
        for at in SCALES[quant.name]:
            blocks[:, :, at : at + 2] = scales.view(np.uint8).reshape(n, 1, 2)
        raw = blocks.reshape(n, -1)
        tiles = repacked(device, quant, raw, 1, 256)
        assert_same_bits(decoded(device, tiles), expected_rows(quant, raw))
        assert_same_bits(decoded(device, tiles, by_groups=True), expected_rows(quant, raw))


@names
def test_embedding_takes_rows_of_the_table(device: Device, quant: QuantType) -> None:
    """Each row of the step gets its token's row of the table, or the chosen one's; rows beyond it are left alone."""
    k = lengths(quant)[1]
    raw = random_rows(quant, 35, k)
    tokens = np.array([34, 0, 17, 17, 1], np.int32)
    x = poisoned(device, (len(tokens), k), np.float32)
    given, chosen = tokens.copy(), np.full(5, 3, np.int32)
    given[2], chosen[2] = -1, tokens[2]
    table = repacked(device, quant, raw, 1, k)
    weights.embed(device, step_of(device, 4), upload(device, given), upload(device, chosen), table, x)
    values = download(device, x)
    assert_same_bits(values[:4], expected_rows(quant, raw)[tokens[:4]])
    assert is_poison(values[4:])


def test_a_type_without_a_codec_is_refused() -> None:
    """The error for a type that the kernels do not know names the tensor and the type, and says what to do."""
    with pytest.raises(ModelError, match=r"blk\.3\.ffn_up_exps.*IQ2_KL.*ik engine") as caught:
        codec_of(types.IQ2_KL, "blk.3.ffn_up_exps")
    assert caught.value.code == "unsupported_quant_type"


def test_tiles_of_another_type_or_size_are_refused(device: Device) -> None:
    """Repacking into tiles of another codec, or bytes that are not those of the matrix, is an error."""
    tiles = repacked(device, types.Q4_K, random_rows(types.Q4_K, 3, 256), 1, 256)
    source = device.zeros((3 * 144,), np.uint8)
    with pytest.raises(ValueError, match="Q4K do not hold Q6_K"):
        weights.repack(device, source, types.Q6_K, tiles)
    with pytest.raises(ValueError, match="288 bytes are not 1 x 3 rows of 144"):
        weights.repack(device, source.view(0, (288,)), types.Q4_K, tiles)
