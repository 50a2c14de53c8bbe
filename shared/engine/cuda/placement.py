"""Which layers of a model go to which device: consecutive ones, in the order in which the devices are named.

Plain arithmetic on bytes. Invariant: every device has a layer, and what is placed fits, or is refused with what lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from shared.errors import EngineError

_GIB = 1 << 30
RESERVE = _GIB // 4
"""Left free on each device for compiled code, graphs and the driver."""


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What a model takes on devices.

    embedding: on the first one. layers: each. output: what is behind the layers, on the last one; without the matrix of
        logits where it is `tied` to the embedding, which is then on both.
    loading: on each, while it is loaded.
    """

    embedding: int
    layers: tuple[int, ...]
    output: int
    tied: bool
    loading: int


@dataclass(frozen=True, slots=True)
class Room:
    """A device's memory, in bytes."""

    name: str
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Share:
    """What a device gets. n_bytes: its layers, their KV cache, and what it needs besides."""

    layers: range
    n_bytes: int


def check_devices(devices: Sequence[int]) -> None:
    """Refuse a list of GPUs that names none, one twice, or what is no index (code bad_settings)."""
    named = f"devices = {list(devices)}"
    if not devices:
        raise EngineError(f"{named} names no GPU", "name one or more by index: [0]", "bad_settings")
    if min(devices) < 0:
        raise EngineError(f"{named}: there is no GPU {min(devices)}", "indexes start at 0", "bad_settings")
    if len(set(devices)) < len(devices):
        raise EngineError(f"{named} names a GPU twice", "name each one once", "bad_settings")


def place_layers(model: ModelBytes, cache: int, scratch: int, rooms: Sequence[Room], path: str) -> list[Share]:
    """Share a model out in proportion to free memory.

    Args:
        cache: bytes of a layer's KV cache. scratch: bytes that every device needs for its passes.
        path: of the model, for errors.

    Raises:
        EngineError: there are more devices than layers (code bad_settings), or no way to share it out fits
            (out_of_memory).
    """
    if len(rooms) > len(model.layers):
        raise EngineError(
            f"{path} has {len(model.layers)} layers, fewer than the {len(rooms)} devices named",
            "name fewer devices",
            "bad_settings",
        )
    besides = [model.loading + scratch + RESERVE] * len(rooms)
    besides[0] += model.embedding
    besides[-1] += model.output
    if model.tied and len(rooms) > 1:
        besides[-1] += model.embedding
    layers = [n + cache for n in model.layers]
    shares = [
        Share(part, beside + sum(layers[part.start : part.stop]))
        for part, beside in zip(_least_full(layers, besides, [room.free for room in rooms]), besides, strict=True)
    ]
    lacking = [
        f"{_gib(share.n_bytes - room.free)} are missing on {room.name} "
        f"({room.free / _GIB:.1f} of {_gib(room.total)} free)"
        for share, room in zip(shares, rooms, strict=True)
        if share.n_bytes > room.free
    ]
    if lacking:
        caches, scratches = cache * len(layers), scratch * len(rooms)
        weights = sum(share.n_bytes for share in shares) - caches - scratches - RESERVE * len(rooms)
        raise EngineError(
            f"{path} needs {_gib(weights)} for its weights, {_gib(caches)} of KV cache and {_gib(scratches)} of "
            f"scratch memory; {', '.join(lacking)}",
            "use a smaller quantization, a shorter n_ctx, fewer n_slots or a quantized cache_type, free the GPU, or "
            "name more devices",
            "out_of_memory",
        )
    return shares


def _least_full(layers: Sequence[int], besides: Sequence[int], free: Sequence[int]) -> list[range]:
    """The consecutive shares whose fullest device is the least full; among these, whose second fullest is, and so on.

    If any shares fit, these do.

    Args:
        layers: bytes of each. besides: bytes of each device that do not depend on its layers. free: bytes of each.
    """
    before = [0, *accumulate(layers)]
    # For the devices so far, by how many layers they hold: how full each is, fullest first, and where their shares end.
    best: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = {0: ((), (0,))}
    for device, (beside, room) in enumerate(zip(besides, free, strict=True)):
        devices_left = len(free) - device - 1
        longer: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = {}
        for start, (fullness, ends) in best.items():
            for end in range(start + 1, len(layers) - devices_left + 1):
                full = (beside + before[end] - before[start]) / max(1, room)
                shares = tuple(sorted((*fullness, full), reverse=True)), (*ends, end)
                longer[end] = min(shares, longer.get(end, shares))
        best = longer
    return [range(start, end) for start, end in pairwise(best[len(layers)][1])]


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / _GIB:.1f} GiB"
