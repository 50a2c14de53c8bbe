"""Attention over the paged cache against NumPy in float64, and its bits: alone, in any batch, in any pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from shared.engine.numpy import ops
from shared.kernels.activations import Activations
from shared.kernels.attention import (
    CACHE_KINDS,
    PAGE_TOKENS,
    CacheLayout,
    KvLayer,
    Query,
    Span,
    Tile,
    attend,
    attend_splits,
    copy_pages,
    item_bytes,
    merge_splits,
    plan_tiles,
    rope_append,
    split_work,
    whole_work,
)
from shared.kernels.device import Buffer, Device
from tests.kernels.arrays import Array, assert_same_bits, download, is_poison, poisoned, upload

EPS = 1e-6
SPARE = 2  # rows and tiles of grids and buffers beyond those of the step


@dataclass(frozen=True)
class Chunk:
    """n rows of a slot from position `start` on."""

    slot: int
    start: int
    n: int


def places(chunks: Sequence[Chunk]) -> tuple[Array, Array]:
    """positions and slots of the rows."""
    pairs = [(chunk.start + i, chunk.slot) for chunk in chunks for i in range(chunk.n)]
    positions, slots = np.array(pairs, np.int32).T
    return positions.copy(), slots.copy()


def quantized(x: Array, kind: str) -> tuple[Array, Array]:
    """ggml's numbers, unsigned for q4_0, and scales in halves: x [..., d] -> [..., d], [..., d / 32]."""
    groups = x.astype(np.float32).reshape(*x.shape[:-1], -1, 32)
    if kind == "q8_0":
        d = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    else:
        d = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1) / np.float32(-8)
    scaled = groups * np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    if kind == "q8_0":
        numbers = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    else:
        numbers = np.minimum(15, (scaled + np.float32(8.5)).astype(np.int8)).astype(np.uint8)
    return numbers.reshape(x.shape), d[..., 0].astype(np.float16)


class Cache:
    """A layer's cache in NumPy, as the device has it; what is not stored is 0xFF bytes: NaN where there are halves."""

    def __init__(self, layout: CacheLayout, n_slots: int, n_ctx: int, seed: int = 0) -> None:
        per_slot = -(-n_ctx // PAGE_TOKENS)
        n_pages = n_slots * per_slot + 1
        self.layout = layout
        self.pages = np.random.default_rng(seed).permutation(n_pages)[1:].reshape(n_slots, per_slot).astype(np.int32)
        self._packed = 2 if layout.kind == "q4_0" else 1
        dtype = {"f16": np.float16, "q8_0": np.int8, "q4_0": np.uint8}[layout.kind]
        heads, d = layout.n_kv_head, layout.head_dim
        self.keys = self._garbage((n_pages, heads, PAGE_TOKENS, d // self._packed), dtype)
        self.values = self._garbage((n_pages, heads, d, PAGE_TOKENS // self._packed), dtype)
        self.key_scales = self._garbage((n_pages, heads, PAGE_TOKENS, d // 32), np.float16)
        self.value_scales = self._garbage((n_pages, heads, d // 32, PAGE_TOKENS), np.float16)

    @staticmethod
    def _garbage(shape: tuple[int, ...], dtype: type) -> Array:
        array = np.empty(shape, dtype)
        array.view(np.uint8)[:] = 0xFF
        return array

    def put(self, slot: int, position: int, key: Array, value: Array) -> None:
        """key, value: [n_kv_head, head_dim]."""
        page, token = self.pages[slot, position // PAGE_TOKENS], position % PAGE_TOKENS
        if self.layout.kind == "f16":
            self.keys[page, :, token], self.values[page, :, :, token] = key, value
            return
        k, self.key_scales[page, :, token] = quantized(key, self.layout.kind)
        v, self.value_scales[page, :, :, token] = quantized(value, self.layout.kind)
        if self.layout.kind == "q8_0":
            self.keys[page, :, token], self.values[page, :, :, token] = k, v
        else:
            self.keys[page, :, token] = k[:, ::2] | k[:, 1::2] << 4
            byte = self.values[page, :, :, token // 2]
            byte[:] = byte & 15 | v << 4 if token % 2 else byte & 240 | v

    def get(self, slot: int, n: int) -> tuple[Array, Array]:
        """Keys and values of the first n positions, float32 [n, n_kv_head, head_dim] each."""
        keys, values = [], []
        for position in range(n):
            page, token = self.pages[slot, position // PAGE_TOKENS], position % PAGE_TOKENS
            k, v = self.keys[page, :, token], self.values[page, :, :, token // self._packed]
            if self.layout.kind == "q4_0":
                k = np.stack([k & 15, k >> 4], -1).reshape(len(k), -1).astype(np.int8) - 8
                v = (v >> token % 2 * 4 & 15).astype(np.int8) - 8
            k, v = k.astype(np.float32), v.astype(np.float32)
            if self.layout.kind != "f16":
                k = k * np.repeat(self.key_scales[page, :, token].astype(np.float32), 32, -1)
                v = v * np.repeat(self.value_scales[page, :, :, token].astype(np.float32), 32, -1)
            keys.append(k)
            values.append(v)
        return np.stack(keys), np.stack(values)

    def _arrays(self) -> list[Array]:
        scales = [] if self.layout.kind == "f16" else [self.key_scales, self.value_scales]
        return [self.keys, self.values, *scales]

    def upload(self, device: Device) -> KvLayer:
        """In a pool of one layer, behind some bytes."""
        n_pages, front = len(self.keys), 256
        pool = poisoned(device, (front + n_pages * self.layout.page_bytes,), "uint8")
        layer = self.layout.layer(pool, front, n_pages)
        for buffer, array in zip(self._buffers(layer), self._arrays(), strict=True):
            device.write(buffer, array)
        return layer

    def download(self, device: Device, layer: KvLayer) -> None:
        for buffer, array in zip(self._buffers(layer), self._arrays(), strict=True):
            device.read(array, buffer)
        device.synchronize()

    @staticmethod
    def _buffers(layer: KvLayer) -> list[Buffer]:
        parts = (layer.keys, layer.values, layer.key_scales, layer.value_scales)
        return [part for part in parts if part is not None]


def padded(array: Array) -> Array:
    """With SPARE rows of garbage."""
    return np.concatenate([array, np.full((SPARE, *array.shape[1:]), -7, array.dtype)])


def upload_query(
    device: Device, cache: Cache, chunks: Sequence[Chunk], q: Array, split: bool, tails: int | None = None
) -> Query:
    """tails: how many of each chunk's last rows have queries; None: all."""
    positions, _ = places(chunks)
    ends = np.cumsum([chunk.n for chunk in chunks])
    wanted = [chunk.n if tails is None else tails for chunk in chunks]
    group = q.shape[1] // cache.layout.n_kv_head
    spans = [
        Span(int(end) - n, n, chunk.start + chunk.n - n, chunk.slot)
        for chunk, end, n in zip(chunks, ends, wanted, strict=True)
    ]
    tiles = plan_tiles(spans, group)
    work, heads = whole_work(tiles), None
    if split:
        work = np.zeros((sum(tile.n_splits for tile in tiles), 8), np.int32)
        rows = np.zeros((len(positions), group), np.int32)
        assert split_work(tiles, cache.pages, group, work, rows.reshape(-1)) == len(work)
        heads = upload(device, padded(rows))
    return Query(
        upload(device, np.array([len(positions), 0, len(work)], np.int32)),
        upload(device, padded(positions)),
        upload(device, cache.pages),
        upload(device, padded(work)),
        heads,
        upload(device, q),
    )


# ---- rope_append


def tables(n_ctx: int, dim: int) -> tuple[Array, Array]:
    """cos and sin [n_ctx, dim / 2]."""
    angles = np.arange(n_ctx)[:, None] * 100.0 ** (-2.0 * np.arange(dim // 2) / dim)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def append(
    device: Device,
    cache: Cache,
    chunks: Sequence[Chunk],
    qkv: Array,
    norms: tuple[Array, Array] | None,
    dim: int,
    neox: bool,
) -> Array:
    """Returns q [rows, n_head, head_dim] half; the cache has the rest."""
    layout, rows = cache.layout, len(qkv)
    n_head = qkv.shape[1] // layout.head_dim - 2 * layout.n_kv_head
    n_ctx = cache.pages.shape[1] * PAGE_TOKENS
    cos, sin = (upload(device, table) for table in tables(n_ctx, dim))
    layer = cache.upload(device)
    q = poisoned(device, (rows + SPARE, n_head, layout.head_dim), "float16")
    weights: tuple[Buffer | None, Buffer | None] = (None, None)
    if norms is not None:
        weights = (upload(device, norms[0]), upload(device, norms[1]))
    positions, slots = places(chunks)
    cells = cache.pages[slots, positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS
    step = [upload(device, array) for array in (np.array([rows], np.int32), padded(positions), padded(cells))]
    rope_append(device, *step, upload(device, qkv), *weights, EPS, cos, sin, neox, n_head, q, layer, rows + SPARE)
    cache.download(device, layer)
    out = download(device, q)
    assert is_poison(out[rows:])
    return out[:rows]


def random_qkv(layout: CacheLayout, rows: int, n_head: int) -> Array:
    rng = np.random.default_rng(rows)
    return rng.normal(0, 2, (rows, (n_head + 2 * layout.n_kv_head) * layout.head_dim)).astype(np.float32)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize(("head_dim", "dim"), [(32, 32), (64, 64), (64, 20), (96, 96), (128, 64), (256, 256)])
def test_queries_and_keys_are_normalized_and_rotated(
    device: Device, head_dim: int, dim: int, neox: bool, normed: bool
) -> None:
    """As the numpy engine does it; elements from rope.dim on are not rotated."""
    layout, n_head = CacheLayout("f16", head_dim, 2), 3 * 2
    chunks = [Chunk(1, 62, 3), Chunk(0, 0, 1)]
    positions, slots = places(chunks)
    cache = Cache(layout, 2, 100)
    qkv = random_qkv(layout, len(positions), n_head)
    rng = np.random.default_rng(0)
    norms = rng.normal(1, 0.2, (2, head_dim)).astype(np.float32)

    q = append(device, cache, chunks, qkv, (norms[0], norms[1]) if normed else None, dim, neox)

    heads = qkv.reshape(len(qkv), -1, head_dim)
    expected_q, expected_k, v = heads[:, :n_head], heads[:, n_head : n_head + 2], heads[:, n_head + 2 :]
    if normed:
        expected_q, expected_k = (
            ops.rms_norm(expected_q, norms[0], EPS),
            ops.rms_norm(expected_k, norms[1], EPS),
        )
    cos, sin = (table[positions][:, None] for table in tables(128, dim))
    rotate = ops.rotate_neox if neox else ops.rotate_norm
    np.testing.assert_allclose(q.astype(np.float32), rotate(expected_q, cos, sin), rtol=1e-3, atol=1e-5)
    expected_k = rotate(expected_k, cos, sin)
    for row, (position, slot) in enumerate(zip(positions, slots, strict=True)):
        page, token = cache.pages[slot, position // PAGE_TOKENS], position % PAGE_TOKENS
        np.testing.assert_allclose(cache.keys[page, :, token].astype(np.float32), expected_k[row], rtol=1e-3, atol=1e-5)
        assert_same_bits(cache.values[page, :, :, token], v[row].astype(np.float16))
    assert np.isnan(cache.keys).sum() == cache.keys.size - len(qkv) * 2 * head_dim
    assert np.isnan(cache.values).sum() == cache.values.size - len(qkv) * 2 * head_dim


@pytest.mark.parametrize("kind", CACHE_KINDS)
@pytest.mark.parametrize("cuts", [(0, 7), (0, 1, 4, 5, 7), (0, 3, 7)])
def test_keys_and_values_are_stored_as_ggml_would(device: Device, kind: str, cuts: tuple[int, ...]) -> None:
    """However the tokens were cut into steps, and also over what a rollback left."""
    layout, start = CacheLayout(kind, 64, 2), 61
    cache, expected = Cache(layout, 1, 100), Cache(layout, 1, 100)
    heads = random_qkv(layout, cuts[-1], 2).reshape(cuts[-1], -1, 64)
    heads[0, 4, :32] = 0
    heads[1, 2:, :6] = 127, 0.5, -0.5, 1.5, 2.5, -2.5  # halves between two numbers of q8_0
    for i in range(len(heads)):
        expected.put(0, start + i, heads[i, 2:4], heads[i, 4:])
    # Rope of dim 0 rotates nothing. First other tokens are there, which are rolled back.
    append(device, cache, [Chunk(0, start, cuts[-1])], heads[::-1].reshape(len(heads), -1), None, 0, True)
    for first, end in pairwise(cuts):
        qkv = np.ascontiguousarray(heads[first:end].reshape(end - first, -1))
        append(device, cache, [Chunk(0, start + first, end - first)], qkv, None, 0, True)
    for got, wanted in zip(cache.get(0, start + cuts[-1]), expected.get(0, start + cuts[-1]), strict=True):
        assert_same_bits(got[start:], wanted[start:])


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_what_halves_cannot_hold_is_bounded(device: Device, kind: str) -> None:
    """Queries, keys and values stay finite, also as numbers times a scale; NaN shows."""
    layout, n = CacheLayout(kind, 32, 1), 3
    cache = Cache(layout, 1, n)
    heads = random_qkv(layout, n, 1).reshape(n, 3, 32)
    heads[0, :, 0], heads[1, :, 1], heads[2, :, 2] = 1e30, -np.inf, 65519
    q = append(device, cache, [Chunk(0, 0, n)], heads.reshape(n, -1), None, 0, True)
    for got in (q, *cache.get(0, n)):
        assert np.abs(got.reshape(n, -1)).max(1).tolist() == [65024] * n
        assert got[0].flat[0] > 0 > got[1].flat[1]
    heads[0, 0, 0] = np.nan
    assert np.isnan(append(device, cache, [Chunk(0, 0, n)], heads.reshape(n, -1), None, 0, True)[0, 0, 0])


# ---- attend


@dataclass(frozen=True)
class Case:
    """A filled cache, and queries for a step."""

    cache: Cache
    chunks: tuple[Chunk, ...]
    q: Array  # [rows, n_head, head_dim] half

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.cache.layout.n_kv_head


def make_case(
    kind: str,
    head_dim: int,
    n_kv_head: int,
    group: int,
    chunks: Sequence[Chunk],
    page_seed: int = 0,
    magnitudes: int = 0,
) -> Case:
    """magnitudes: values of a token are multiplied by a power of two, from minus to plus so many."""
    layout = CacheLayout(kind, head_dim, n_kv_head)
    n_slots = max(chunk.slot for chunk in chunks) + 1
    cache = Cache(layout, n_slots, max(chunk.start + chunk.n for chunk in chunks), page_seed)
    rng = np.random.default_rng(head_dim + group)
    for slot in range(n_slots):
        n = max(chunk.start + chunk.n for chunk in chunks if chunk.slot == slot)
        keys, values = rng.normal(0, 1, (2, n, n_kv_head, head_dim)).astype(np.float32)
        values *= np.exp2(rng.integers(-magnitudes, magnitudes + 1, (n, 1, 1), np.int32)).astype(np.float32)
        for position in range(n):
            cache.put(slot, position, keys[position], values[position])
    rows = sum(chunk.n for chunk in chunks)
    q = rng.normal(0, 1.5, (rows, n_kv_head * group, head_dim)).astype(np.float16)
    return Case(cache, tuple(chunks), q)


def whole(device: Device, case: Case) -> Array:
    rows, n_head, head_dim = case.q.shape
    query = upload_query(device, case.cache, case.chunks, case.q, False)
    out = poisoned(device, (rows + SPARE, n_head * head_dim), "float32")
    attend(device, query, case.cache.upload(device), out)
    result = download(device, out)
    assert is_poison(result[rows:])
    return result[:rows]


def splits(device: Device, case: Case, tails: int | None = None) -> tuple[Array, Array]:
    """The result, and its 8-bit form as float32 with the padding."""
    rows, n_head, head_dim = case.q.shape
    query = upload_query(device, case.cache, case.chunks, case.q, True, tails)
    layer = case.cache.upload(device)
    out = poisoned(device, (rows + SPARE, n_head * head_dim), "float32")
    small = Activations.empty(device, rows + SPARE, n_head * head_dim)
    partials = poisoned(device, ((query.work.shape[0] - SPARE) * item_bytes(layer.layout),), "uint8")
    attend_splits(device, query, layer, partials)
    merge_splits(device, query, layer, partials, out, small, rows + SPARE)
    result, numbers, scale = (download(device, buffer) for buffer in (out, small.q, small.scale))
    assert is_poison(result[rows:])
    return result[:rows], (numbers[:rows].reshape(rows, -1, 256) * scale[:rows, :, None]).reshape(rows, -1)


def reference(case: Case) -> Array:
    """[rows, n_head * head_dim] in float64."""
    layout = case.cache.layout
    positions, slots = places(case.chunks)
    cells = [case.cache.get(slot, int(positions[slots == slot].max()) + 1) for slot in range(max(slots) + 1)]
    out = np.empty(case.q.shape)
    for row, (position, slot) in enumerate(zip(positions, slots, strict=True)):
        keys, values = (x[: position + 1].astype(np.float64) for x in cells[slot])
        q = case.q[row].astype(np.float64).reshape(layout.n_kv_head, case.group, -1)
        scores = np.einsum("hgd,khd->hgk", q, keys) / np.sqrt(layout.head_dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[row] = np.einsum("hgk,khd->hgd", weights, values).reshape(-1, layout.head_dim)
    return out.reshape(len(out), -1)


CASES = [
    ("f16", 64, 2, 4, [Chunk(0, 0, 1)]),
    ("f16", 64, 1, 8, [Chunk(0, 30, 3)]),
    ("f16", 64, 2, 3, [Chunk(0, 120, 17)]),
    ("f16", 64, 1, 1, [Chunk(0, 0, 33)]),
    ("f16", 64, 1, 4, [Chunk(1, 62, 2), Chunk(0, 255, 1), Chunk(2, 127, 8)]),
    ("f16", 32, 1, 20, [Chunk(0, 126, 3)]),
    ("f16", 96, 1, 2, [Chunk(0, 63, 2)]),
    ("f16", 128, 2, 4, [Chunk(0, 94, 3), Chunk(1, 31, 1)]),
    ("f16", 256, 1, 1, [Chunk(0, 159, 2)]),
    ("q8_0", 64, 2, 3, [Chunk(0, 127, 8), Chunk(1, 5, 1)]),
    ("q8_0", 128, 1, 4, [Chunk(0, 64, 2)]),
    ("q4_0", 64, 2, 3, [Chunk(0, 127, 8), Chunk(1, 5, 1)]),
    ("q4_0", 128, 1, 4, [Chunk(0, 64, 2)]),
]


@pytest.mark.parametrize(("kind", "head_dim", "n_kv_head", "group", "chunks"), CASES)
def test_attention_over_stored_keys(
    device: Device, kind: str, head_dim: int, n_kv_head: int, group: int, chunks: list[Chunk]
) -> None:
    """Both ways give the same bits, close to float64 over what the cache holds; cells beyond a row do not count."""
    case = make_case(kind, head_dim, n_kv_head, group, chunks)
    out, small = splits(device, case)
    assert_same_bits(whole(device, case), out)
    np.testing.assert_allclose(out, reference(case), atol=3e-3)
    width = out.shape[1]
    padded = np.pad(out, ((0, 0), (0, small.shape[1] - width)))
    peaks = np.abs(padded.reshape(len(out), -1, 256)).max(-1).repeat(256, -1)
    assert (np.abs(small - padded) <= peaks / 253).all()
    assert (small[:, width:] == 0).all()


@pytest.mark.parametrize("start", [1000, 8300])
def test_many_keys_are_merged_in_spans(device: Device, start: int) -> None:
    """Beyond 8 splits, and beyond the 8 spans that a block merges at a time."""
    case = make_case("q8_0", 32, 1, 2, [Chunk(0, start, 26)])
    out, _ = splits(device, case)
    assert_same_bits(whole(device, case), out)
    np.testing.assert_allclose(out, reference(case), atol=3e-3)


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_a_row_has_the_same_bits_in_any_batch_and_any_pages(device: Device, kind: str) -> None:
    """Alone, behind other slots' rows, in tiles that begin elsewhere, and with its keys in other pages.

    Values differ in magnitude, so that a large one of a later row would show if it left a trace in the tensor cores.
    """
    chunks = [Chunk(1, 28, 7), Chunk(0, 122, 9), Chunk(2, 0, 1)]
    case = make_case(kind, 64, 1, 3, chunks, magnitudes=10)
    together, _ = splits(device, case)
    positions, slots = places(chunks)
    elsewhere = make_case(kind, 64, 1, 3, chunks, page_seed=1, magnitudes=10)
    assert (elsewhere.cache.pages != case.cache.pages).any()
    for row in (0, 4, 6, 7, 12, 15, 16):
        alone = (Chunk(int(slots[row]), int(positions[row]), 1),)
        for cache in (case.cache, elsewhere.cache):
            out, _ = splits(device, Case(cache, alone, case.q[row : row + 1]))
            assert_same_bits(out[0], together[row])
    cut = (Chunk(1, 28, 3),)
    assert_same_bits(whole(device, Case(elsewhere.cache, cut, case.q[:3])), together[:3])


def test_only_rows_with_tiles_are_computed(device: Device) -> None:
    """The others of a chunk become zeros, whatever the workspace held."""
    case = make_case("f16", 64, 2, 4, [Chunk(0, 40, 5), Chunk(1, 130, 3)])
    everything, _ = splits(device, case)
    tails, _ = splits(device, case, tails=2)
    wanted = [3, 4, 6, 7]
    assert_same_bits(tails[wanted], everything[wanted])
    assert not np.delete(tails, wanted, 0).any()


def test_scores_of_any_size_are_safe(device: Device) -> None:
    """Softmax is relative to the greatest score, also where units differ by more than exp can hold."""
    case = make_case("f16", 64, 1, 4, [Chunk(0, 200, 3)])
    big = Case(case.cache, case.chunks, (case.q * np.float16(60)).astype(np.float16))
    out, _ = splits(device, big)
    np.testing.assert_allclose(out, reference(big), atol=3e-3)


# ---- The rest


def test_tiles_cover_each_query_head_once() -> None:
    """In order, at most 16 each."""
    tiles = plan_tiles([Span(0, 3, 126, 1), Span(5, 11, 0, 0)], group=6)
    assert tiles == [
        Tile(0, 0, 16, 126, 128, 1),
        Tile(0, 16, 2, 126, 128, 1),
        Tile(5, 0, 16, 0, 2, 0),
        Tile(5, 16, 16, 0, 5, 0),
        Tile(5, 32, 16, 0, 7, 0),
        Tile(5, 48, 16, 0, 10, 0),
        Tile(5, 64, 2, 0, 10, 0),
    ]
    work = whole_work(tiles)
    assert [Tile(*row) for row in work[:, :6].tolist()] == tiles
    assert work.dtype == np.int32
    assert plan_tiles([], 4) == []
    assert whole_work([]).shape == (0, 8)


def test_each_tile_has_the_splits_that_its_last_row_needs() -> None:
    """With the pages of their keys, and in reach of the query heads that they are for."""
    pages = np.array([[9, 8, 7], [4, 5, 6]], np.int32)
    tiles = plan_tiles([Span(1, 2, 127, 1), Span(4, 1, 5, 0)], group=9)
    assert [tile.n_splits for tile in tiles] == [2, 2, 1]
    items, heads = np.full((6, 8), 77, np.int32), np.full((5, 9), 77, np.int32)
    assert split_work(tiles, pages, 9, items, heads.reshape(-1)) == 5
    assert (items[5] == 77).all()
    items = items[:5]
    assert [tuple(row) for row in items[:, :5].tolist()] == [tiles[i][:5] for i in (0, 0, 1, 1, 2)]
    assert items[:, 5].tolist() == [0, 1, 0, 1, 0]
    assert items[[0, 2, 4], 6:].tolist() == [[4, 5], [4, 5], [9, 8]]
    assert items[[1, 3], 6:].tolist() == [[6, 0], [6, 0]]
    assert heads[1:3].tolist() == [list(range(9)), [9, 10, 11, 12, 13, 14, 15, 32, 33]]
    assert heads[4].tolist() == list(range(64, 73))
    assert (heads[[0, 3]] == -1).all()


@pytest.mark.parametrize("chunks", [[(2, 1), (0, 1)], [(0, 2), (1, 1)], [(0, 0)]])
def test_chunks_out_of_order_are_refused(chunks: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        plan_tiles([Span(row, n, 0, 0) for row, n in chunks], 4)


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_pages_are_copied_in_every_layer(device: Device, kind: str) -> None:
    """Keys, values and scales, and no other pages are touched."""
    layout, n_layers, n_pages = CacheLayout(kind, 96, 1), 3, 6
    pool = np.random.default_rng(0).integers(0, 256, n_layers * n_pages * layout.page_bytes, np.uint8)
    buffer = upload(device, pool)
    pairs = np.array([[4, 0], [2, 5]], np.int32)
    copy_pages(device, buffer, layout, n_layers, n_pages, upload(device, pairs))
    for layer in pool.reshape(n_layers, -1):
        at = 0
        for nbytes in layout.section_bytes:
            section = layer[at : at + n_pages * nbytes].reshape(n_pages, nbytes)
            section[pairs[:, 1]] = section[pairs[:, 0]]
            at += n_pages * nbytes
    assert_same_bits(download(device, buffer), pool)
