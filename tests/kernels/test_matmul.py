"""Products of quantized matrices with activations, plain and by expert, against NumPy; bitwise row invariance."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest

from shared.kernels.activations import Activations
from shared.kernels.device import Device
from shared.kernels.experts import Groups
from shared.kernels.matmul import (
    COLUMNS,
    ExpertRows,
    PlainRows,
    can_quantize,
    columns_for,
    gate_up,
    gate_up_name,
    matmul,
    matmul_name,
    n_splits,
    shared_memory,
)
from shared.kernels.norm import quantize
from shared.kernels.weights import CODECS, Tiles, codec_of, repack
from shared.quant import types
from shared.quant.codecs import dequantize
from shared.quant.types import BY_ID, QuantType
from tests.kernels.arrays import PASS, Array, assert_same_bits, download, is_poison, poisoned, step_of, upload
from tests.kernels.blocks import random_matrix

QUANTS = [BY_ID[i] for i in CODECS]
# 33 and more are cut into groups of 64.
ROWS = [1, 2, 3, 8, 16, 17, 31, 32, 33, 256]


class Matrix:
    """A stack of random matrices: on the device, and as the float32 values that it holds."""

    def __init__(self, device: Device, quant: QuantType, *shape: int, seed: int = 0) -> None:
        *stack, n_rows, k = shape
        raw = random_matrix(quant, prod(stack) * n_rows, k, seed)
        codec = codec_of(quant, "random")
        n = prod(stack)
        self.tiles = Tiles(device.empty((n * codec.bytes_per_matrix(n_rows, k),), "uint8"), codec, n_rows, k, n)
        repack(device, upload(device, raw), quant, self.tiles)
        self.values: Array = dequantize(raw, quant, "random").reshape(shape)


class Rows:
    """Random activations: on the device, as floats and quantized, and what the quantized ones stand for."""

    def __init__(self, device: Device, rows: int, k: int, size: float = 1.0) -> None:
        self.floats: Array = np.random.default_rng(1).normal(0, size, (rows, k)).astype(np.float32)
        self.floats[:, : k // 2] *= np.float32(0.01)
        self.quantized = Activations.empty(device, rows, k)
        self.on_device = upload(device, self.floats)
        quantize(device, step_of(device, rows), 1, self.on_device, self.quantized, rows)
        q, scale = download(device, self.quantized.q), download(device, self.quantized.scale)
        self.rounded: Array = (q.astype(np.float64) * np.repeat(scale, 256, axis=1))[:, :k]

    def seen_by(self, matrix: Matrix) -> Array:
        """The activations that a product with the matrix uses."""
        return self.floats.astype(np.float64) if matrix.tiles.codec.dense else self.rounded


def plain(device: Device, rows: int) -> PlainRows:
    return PlainRows(step_of(device, rows).view(0, (1,)), rows)


def chosen(device: Device, ids: Array, columns: int, n_expert: int) -> ExpertRows:
    """The groups of rows that go through the experts ids [rows, n_used]."""
    rows, n_used = ids.shape
    groups = Groups.empty(device, rows, columns, n_used, n_expert)
    order = np.argsort(ids.ravel(), kind="stable").astype(np.int32)
    words = np.full(groups.max_groups, PASS, np.uint64)
    pairs = np.full((groups.max_groups, columns), -1, np.int32)
    n = at = 0
    for expert, count in zip(*np.unique(ids, return_counts=True), strict=True):
        for first in range(at, at + count, columns):
            part = order[first : min(first + columns, at + count)]
            words[n] += np.uint64((len(part) | int(expert) << 7 | (int(part[0]) << 16 if len(part) == 1 else 0)) << 32)
            if len(part) > 1:
                pairs[n, : len(part)] = part
            n += 1
        at += count
    device.write(groups.pairs, pairs)
    device.write(groups.own_words, words)
    return ExpertRows(groups, step_of(device, rows).view(12, (1,)))


def assert_close(actual: Array, expected: Array, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of each row's size: sums of exact products in float32."""
    size = np.linalg.norm(expected, axis=-1, keepdims=True) / np.sqrt(expected.shape[-1])
    np.testing.assert_array_less(np.abs(actual - expected) / (size + 1e-30), 20 * tolerance)
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


def run(
    device: Device,
    matrices: list[Matrix],
    rows: Rows,
    groups: ExpertRows | PlainRows,
    n_pairs: int,
    n_used: int = 0,
    *,
    quantized: bool = True,
) -> Array:
    n = sum(m.tiles.n_rows for m in matrices)
    out = poisoned(device, (n_pairs + 1, n), "float32")
    x = rows.quantized if quantized else None
    matmul(device, [m.tiles for m in matrices], groups, x, rows.on_device, out, n_used=n_used)
    result = download(device, out)
    assert is_poison(result[n_pairs:])
    return result[:n_pairs]


@pytest.mark.parametrize("quant", QUANTS, ids=lambda q: q.name)
def test_every_type_multiplies(device: Device, quant: QuantType) -> None:
    """Products of every type are those of its dequantized values with the activations, in float32 accuracy."""
    k = 512 if quant.block_size == 256 else 320  # the second fills up its last superblock
    matrix, rows = Matrix(device, quant, 40, k), Rows(device, 3, k)
    out = run(device, [matrix], rows, plain(device, 3), 3)
    assert_close(out, rows.seen_by(matrix) @ matrix.values.T.astype(np.float64))


@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_rows(device: Device, rows: int) -> None:
    """Right at every number of rows, across the edges of the compiled widths."""
    matrix, x = Matrix(device, types.Q4_K, 48, 768), Rows(device, rows, 768)
    out = run(device, [matrix], x, plain(device, rows), rows)
    assert_close(out, x.rounded @ matrix.values.T.astype(np.float64))


def test_three_matrices_of_different_types_stand_below_each_other(device: Device) -> None:
    """As q, k and v do; also where a matrix's rows do not fill its last tile, and with a dense one among them."""
    quants = (types.Q4_K, types.F16, types.Q6_K)
    matrices = [Matrix(device, q, n, 512, seed=n) for q, n in zip(quants, (72, 24, 16), strict=True)]
    x = Rows(device, 5, 512)
    out = run(device, matrices, x, plain(device, 5), 5)
    at = 0
    for matrix in matrices:
        end = at + matrix.tiles.n_rows
        assert_close(out[:, at:end], x.seen_by(matrix) @ matrix.values.T.astype(np.float64))
        at = end


def expert_case(rows: int, n_expert: int, n_used: int) -> Array:
    """Chosen experts: 0 by every row, the last by none, the others at random: [rows, n_used]."""
    rng = np.random.default_rng(rows)
    others = [rng.choice(np.arange(1, n_expert - 1), n_used - 1, replace=False) for _ in range(rows)]
    return np.concatenate([np.zeros((rows, 1), int), np.array(others).reshape(rows, -1)], axis=1).astype(np.int32)


@pytest.mark.parametrize("rows", ROWS)
def test_experts_take_their_rows(device: Device, rows: int) -> None:
    """Every pair goes through its own expert, whether an expert has all rows, some or none."""
    ids = expert_case(rows, 6, 3)
    matrix, x = Matrix(device, types.Q4_K, 6, 32, 256), Rows(device, rows * 3, 256)
    out = run(device, [matrix], x, chosen(device, ids, columns_for(rows), 6), rows * 3, n_used=3)
    expected = np.einsum("pk,pnk->pn", x.rounded, matrix.values[ids.ravel()].astype(np.float64))
    assert_close(out, expected)


@pytest.mark.parametrize("quants", [(types.Q4_K, types.Q4_K), (types.Q6_K, types.Q8_0), (types.F32, types.BF16)])
@pytest.mark.parametrize("rows", [1, 3, 17, 33])
def test_gate_and_up(device: Device, quants: tuple[QuantType, QuantType], rows: int) -> None:
    """silu(gate) * up by expert, for each pair of its row's activations."""
    ids = expert_case(rows, 6, 3)
    gate, up = (Matrix(device, q, 6, 48, 512, seed=i) for i, q in enumerate(quants))
    # Gates of about 1, where silu bends.
    x = Rows(device, rows, 512, 1 / np.linalg.norm(gate.values, axis=-1).mean())
    n_pairs = rows * 3
    out = poisoned(device, (n_pairs + 1, 48), "float32")
    groups = chosen(device, ids, columns_for(rows), 6)
    gate_up(device, gate.tiles, up.tiles, groups, x.quantized, x.on_device, out, n_used=3)
    result = download(device, out)
    assert is_poison(result[n_pairs:])
    by_pair = [np.repeat(x.seen_by(m), 3, axis=0) for m in (gate, up)]
    g, u = (
        np.einsum("pk,pnk->pn", a, m.values[ids.ravel()].astype(np.float64))
        for a, m in zip(by_pair, (gate, up), strict=True)
    )
    assert_close(result[:n_pairs], g * 0.5 * (1 + np.tanh(g / 2)) * u, 5e-6)


@pytest.mark.parametrize("quant", [types.Q4_K, types.Q6_K, types.Q8_0, types.F16], ids=lambda q: q.name)
def test_a_row_is_the_same_alone_and_in_any_batch(device: Device, quant: QuantType) -> None:
    """Bit by bit, for every compiled width and place in the batch."""
    matrix = Matrix(device, quant, 32, 768)
    x = Rows(device, 33, 768)
    together = run(device, [matrix], x, plain(device, 33), 33)
    for row in (0, 6, 7, 8, 31, 32):
        one = Rows.__new__(Rows)
        one.floats = x.floats[row : row + 1]
        one.on_device = upload(device, one.floats)
        one.quantized = Activations.empty(device, 1, 768)
        quantize(device, step_of(device, 1), 1, one.on_device, one.quantized, 1)
        assert_same_bits(run(device, [matrix], one, plain(device, 1), 1)[0], together[row])
    for n in (2, 9, 17):
        assert_same_bits(run(device, [matrix], x, plain(device, n), n), together[:n])


def test_experts_rows_are_the_same_in_any_group(device: Device) -> None:
    """A pair's product has the same bits whatever other pairs its expert has."""
    ids = expert_case(33, 6, 3)
    matrix, x = Matrix(device, types.Q4_K, 6, 32, 256), Rows(device, 99, 256)
    results = [run(device, [matrix], x, chosen(device, ids, columns, 6), 99, n_used=3) for columns in COLUMNS]
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("quant", [types.Q4_K, types.Q6_K, types.Q8_0], ids=lambda q: q.name)
@pytest.mark.parametrize("k", [256, 768, 2048])
def test_rows_quantized_on_the_way_give_the_same_bits(device: Device, quant: QuantType, k: int) -> None:
    """For plain matrices and for experts, with rows that a group's columns do not fill."""
    matrix, x = Matrix(device, quant, 32, k), Rows(device, 5, k)
    assert can_quantize(matrix.tiles, 8)
    assert not can_quantize(matrix.tiles, 16)
    assert_same_bits(
        run(device, [matrix], x, plain(device, 5), 5), run(device, [matrix], x, plain(device, 5), 5, quantized=False)
    )
    ids = expert_case(3, 6, 3)
    stack, x = Matrix(device, quant, 6, 32, k), Rows(device, 9, k)
    groups = chosen(device, ids, 8, 6)
    before = run(device, [stack], x, groups, 9, n_used=3)
    assert_same_bits(before, run(device, [stack], x, groups, 9, n_used=3, quantized=False))


def test_every_instance_fits_every_gpu() -> None:
    """No block asks for more shared memory than the smallest GPU gives one: 99 KiB."""
    most = 99 * 1024 - 16  # a word is static
    for codec, other in product(CODECS.values(), repeat=2):
        for columns, n_blocks in product(COLUMNS, (1, 3, 16)):
            assert shared_memory([codec, other], columns, n_blocks)[1] <= most
        assert codec.dense or shared_memory([codec], 8, 16, 2048)[1] <= most


def test_how_a_row_is_split_follows_from_the_shape() -> None:
    """Few tiles are split among more warps, but never into more parts than a row has superblocks."""
    assert n_splits(9496, 8, 8) == 1
    assert n_splits(128, 16, 8) == 8
    assert n_splits(4, 2, 8) == 2
    assert n_splits(4, 1, 8) == 1
    assert n_splits(4, 100, 4) == 4


def test_plain_rows_round_up(device: Device) -> None:
    """Groups of a plain matrix: of the compiled width that holds all rows, or several of the largest."""
    count = step_of(device, 5).view(0, (1,))
    cases = {1: (8, 1), 8: (8, 1), 9: (16, 1), 33: (64, 1), 64: (64, 1), 65: (64, 2), 512: (64, 8)}
    for max_rows, (columns, groups) in cases.items():
        rows = PlainRows(count, max_rows)
        assert (rows.rows_per_group, rows.max_groups) == (columns, groups)


def test_names_of_instances(device: Device) -> None:
    """A template argument for each of three matrices, the last repeated."""
    a, b = Matrix(device, types.Q4_K, 16, 256).tiles, Matrix(device, types.Q6_K, 16, 256).tiles
    assert matmul_name([a, b], 8) == "matmul<Q4K, Q6K, Q6K, 8, false>"
    assert matmul_name([a], 64) == "matmul<Q4K, Q4K, Q4K, 64, false>"
    assert gate_up_name(a, b, 16) == "gate_up<Q4K, Q6K, 16>"
