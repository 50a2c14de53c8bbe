"""Arrays to and from a device, for the tests of kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shared.kernels.device import Buffer, Device

Array = npt.NDArray[Any]


def upload(device: Device, array: Array) -> Buffer:
    buffer = device.empty(array.shape, array.dtype)
    device.write(buffer, np.ascontiguousarray(array))
    return buffer


PASS = 0x7EDCBA98
"""The number of every step here."""


def step_of(device: Device, n_rows: int, n_out: int = 0) -> Buffer:
    """The sizes of a step, and its number, as kernels read them."""
    return upload(device, np.array([n_rows, n_out, 0, PASS], np.int32))


def download(device: Device, buffer: Buffer) -> Array:
    array = np.empty(buffer.shape, buffer.dtype)
    device.read(array, buffer)
    device.synchronize()
    return array


def poisoned(device: Device, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
    """Memory of 0xA5 bytes on every device."""
    buffer = device.empty(shape, dtype)
    device.fill(buffer, 0xA5)
    return buffer


def is_poison(array: Array) -> bool:
    """Whether nothing was written."""
    return bool((np.ascontiguousarray(array).view(np.uint8) == 0xA5).all())


def assert_same_bits(a: Array, b: Array) -> None:
    np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))
