"""Which layers go to which GPU: everything that can fit does, fairly shared out; what cannot is refused by device."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.engine.cuda.placement import RESERVE, ModelBytes, Room, check_devices, place_layers
from shared.errors import EngineError

GIB = 1 << 30
MIB = 1 << 20


def model(n_layers: int = 48, layer: int = 300 * MIB, *, tied: bool = False) -> ModelBytes:
    return ModelBytes(
        embedding=400 * MIB, layers=(layer,) * n_layers, output=0 if tied else 500 * MIB, tied=tied, loading=500 * MIB
    )


def rooms(*free: float) -> list[Room]:
    """GPUs of 80 GiB with so many GiB free."""
    return [Room(f"GPU {i}", int(gib * GIB), 80 * GIB) for i, gib in enumerate(free)]


def sizes(model: ModelBytes, *free: float, cache: int = 0, scratch: int = 0) -> list[int]:
    """How many layers each device gets."""
    shares = place_layers(model, cache, scratch, rooms(*free), "m.gguf")
    assert [layer for share in shares for layer in share.layers] == list(range(len(model.layers)))
    return [len(share.layers) for share in shares]


def test_one_device_has_everything() -> None:
    """All layers, and the bytes are the sum of all there is."""
    [share] = place_layers(model(tied=True), 10 * MIB, 200 * MIB, rooms(40), "m.gguf")
    assert share.layers == range(48)
    assert share.n_bytes == (400 + 500 + 200 + 48 * 310) * MIB + RESERVE


def test_layers_follow_free_memory() -> None:
    """Equal devices get equal shares, others in proportion to what is free, not to what they have."""
    assert sizes(model(), 40, 40) == [24, 24]
    bare = ModelBytes(0, (100 * MIB,) * 300, 0, False, 0)
    assert sizes(bare, 40, 40, 40, 40) == [75, 75, 75, 75]
    # The reserve, on both, counts too.
    assert sizes(bare, 60, 20) == [227, 73]
    assert sizes(bare, 20, 60) == [73, 227]
    # The one in the middle has neither embedding nor output.
    assert sizes(model(), 12, 12, 12) == [16, 17, 15]


def test_a_device_that_is_nearly_full_leaves_the_others_even() -> None:
    """What one device lacks is not piled on a single other one."""
    assert sizes(model(), 1.5, 60, 60) == [1, 24, 23]


def test_layers_of_different_sizes_are_weighed() -> None:
    """By bytes, not by number: the first half of the layers is twice as large."""
    uneven = ModelBytes(0, (200 * MIB,) * 20 + (100 * MIB,) * 20, 0, False, 0)
    assert sizes(uneven, 40, 40) == [15, 25]


def test_a_tied_embedding_is_on_both_ends() -> None:
    """The last device has it as the matrix of logits."""
    first, last = place_layers(model(2, tied=True), 0, 0, rooms(40, 40), "m.gguf")
    assert first.n_bytes == last.n_bytes == (400 + 300 + 500) * MIB + RESERVE


def test_cache_and_scratch_count() -> None:
    """A layer's KV cache is where the layer is, scratch memory on every device."""
    shares = place_layers(model(3), 70 * MIB, 90 * MIB, rooms(40, 80), "m.gguf")
    assert [share.n_bytes - RESERVE for share in shares] == [
        (400 + 300 + 70 + 90 + 500) * MIB,
        (500 + 2 * 370 + 90 + 500) * MIB,
    ]


@given(
    layers=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    free=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    ends=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    tied=st.booleans(),
)
def test_whatever_can_fit_fits(layers: list[int], free: list[int], ends: tuple[int, int], tied: bool) -> None:
    """Against every way to cut: if one fits, so does the answer, whose fullest device is no fuller than that of any;
    if none does, it is refused."""
    n = len(free)
    small = ModelBytes(ends[0], tuple(layers), ends[1], tied, 1)
    spaces = [Room(str(i), RESERVE + n, 1 << 40) for i, n in enumerate(free)]

    def used(cut: tuple[int, ...]) -> list[int]:
        out = [sum(layers[a:b]) + 1 + RESERVE for a, b in pairwise((0, *cut, len(layers)))]
        out[0] += ends[0]
        out[-1] += ends[1] + (ends[0] if tied and n > 1 else 0)
        return out

    def fullest(n_bytes: list[int]) -> float:
        return max(b / room.free for b, room in zip(n_bytes, spaces, strict=True))

    ways = [used(cut) for cut in combinations(range(1, len(layers)), n - 1)]
    if all(fullest(way) > 1 for way in ways):
        with pytest.raises(EngineError) as caught:
            place_layers(small, 0, 0, spaces, "m.gguf")
        assert caught.value.code == ("out_of_memory" if ways else "bad_settings")
        return
    shares = place_layers(small, 0, 0, spaces, "m.gguf")
    assert [share.layers.start for share in shares] == [0, *(share.layers.stop for share in shares[:-1])]
    assert shares[-1].layers.stop == len(layers)
    assert all(share.layers for share in shares)
    got = [share.n_bytes for share in shares]
    assert got == used(tuple(share.layers.stop for share in shares[:-1]))
    assert fullest(got) == min(map(fullest, ways))


def test_what_is_missing_is_told_by_device() -> None:
    """The refusal names each device that lacks memory, how many GiB, and what helps."""
    with pytest.raises(EngineError) as caught:
        place_layers(model(48, GIB), 0, GIB, rooms(20, 20), "m.gguf")
    # 24 layers, scratch memory, embedding or output, a raw copy and the reserve.
    assert "6.1 GiB are missing on GPU 0 (20.0 of 80.0 GiB free), 6.2 GiB are missing on GPU 1" in str(caught.value)
    assert "m.gguf needs 49.9 GiB for its weights, 0.0 GiB of KV cache and 2.0 GiB of scratch" in str(caught.value)
    assert caught.value.code == "out_of_memory"
    assert "name more devices" in caught.value.remedy
    with pytest.raises(EngineError) as caught:
        place_layers(model(2), 0, 0, rooms(1, 20), "m.gguf")
    assert "0.4 GiB are missing on GPU 0 (1.0 of 80.0 GiB free)" in str(caught.value)
    assert "GPU 1" not in str(caught.value)
    with pytest.raises(EngineError, match=r"missing on GPU 1 \(0\.0 of"):
        place_layers(model(3), 0, 0, rooms(40, 0, 40), "m.gguf")


def test_more_devices_than_layers() -> None:
    """A device without a layer is refused, not ignored."""
    assert sizes(model(3), 40, 40, 40) == [1, 1, 1]
    with pytest.raises(EngineError, match="2 layers, fewer than the 3 devices") as caught:
        place_layers(model(2), 0, 0, rooms(40, 40, 40), "m.gguf")
    assert (caught.value.code, caught.value.remedy) == ("bad_settings", "name fewer devices")


@pytest.mark.parametrize(
    ("devices", "what"), [((), "no GPU"), ((0, -2), "no GPU -2"), ((1, 0, 1), "a GPU twice"), ((0, 0), "a GPU twice")]
)
def test_lists_of_devices_that_are_refused(devices: tuple[int, ...], what: str) -> None:
    """With the list as it was given, and a remedy; any other is accepted."""
    with pytest.raises(EngineError, match=what) as caught:
        check_devices(devices)
    assert f"devices = {list(devices)}" in str(caught.value)
    assert caught.value.code == "bad_settings"
    assert caught.value.remedy
    check_devices((2, 0, 5))
