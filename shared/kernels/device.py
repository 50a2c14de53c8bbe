"""Where kernels run: memory, launches and graphs behind one small interface.

`CudaDevice` (gpu.py) is an NVIDIA GPU through CuPy; `HostDevice` (host/device.py) compiles the same kernel sources
with g++ and runs a grid on the CPU, thread by thread, so that kernels and the engine around them are tested where there
is no GPU. Everything that a device is asked for is ordered on one stream: a copy or a launch sees what was asked for
before it. Devices do not wait for each other but where one copies to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Buffer:
    """An array in a device's memory.

    address: of its first byte there; aligned to 256 bytes unless it is a view.
    owner: keeps the memory alive; views share it.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object

    @property
    def size(self) -> int:
        n = 1
        for length in self.shape:
            n *= length
        return n

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def view(self, offset: int, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None) -> Buffer:
        """A part of this buffer: `offset` in bytes from its start; the dtype stays unless given."""
        kind = self.dtype if dtype is None else np.dtype(dtype)
        part = Buffer(self.address + offset, shape, kind, self.owner)
        if offset < 0 or offset + part.nbytes > self.nbytes:
            raise ValueError(f"{part.nbytes} bytes at {offset} are outside a buffer of {self.nbytes}")
        return part


Argument = Buffer | int | float | None
"""A kernel's argument: a buffer's address, an int32, a float32, or a null pointer."""


class Kernel(Protocol):
    """A compiled kernel; see `Device.kernel`."""

    @property
    def name(self) -> str: ...


class Graph(Protocol):
    """A recorded sequence of launches and copies."""

    def replay(self) -> None:
        """Run it again, on the same buffers, without waiting for it."""


class Device(Protocol):
    """See the module's docstring. Errors: `EngineError` with code out_of_memory, or device_failed."""

    @property
    def name(self) -> str: ...

    @property
    def n_multiprocessors(self) -> int: ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        """Memory with any content (a HostDevice fills it with 0xA5 bytes, so that reading it shows)."""

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer: ...

    def staging(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> AnyArray:
        """Host memory from and to which copies are quick (page-locked), zeroed."""

    def write(self, target: Buffer, source: AnyArray) -> None:
        """Copy into the device, C-contiguous, same number of bytes. Page-locked memory (`staging`) is read when the
        copy's turn comes, so it must not be changed before `synchronize`; other memory may be reused at once."""

    def read(self, target: AnyArray, source: Buffer) -> None:
        """Start copying out of the device into C-contiguous host memory; there after `synchronize`."""

    def copy_to(self, device: Device, target: Buffer, source: Buffer) -> None:
        """Copy from this device into another one's memory, of the same kind, without waiting for it; not in a capture.

        It is as if both had been asked for the copy: it comes after all that either was asked for before, and before
        all that either is asked for later.
        """

    def fill(self, target: Buffer, byte: int) -> None: ...

    def kernel(self, file: str, name: str) -> Kernel:
        """A kernel of cuda/<file> by its name, with template arguments ("matmul<Q4K, 1>"); compiled when new."""

    def prepare(self, kernels: Sequence[tuple[str, str]]) -> None:
        """Compile several kernels ((file, name) pairs) together, which is quicker than one by one."""

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], block: int, arguments: Sequence[Argument], shared: int = 0
    ) -> None:
        """Run a grid of up to three dimensions of blocks of `block` threads with `shared` bytes of dynamic memory."""

    def blocks_per_multiprocessor(self, kernel: Kernel, block: int, shared: int = 0) -> int:
        """How many blocks of a kernel fit a multiprocessor at a time."""

    def capture(self, record: Callable[[], None]) -> Graph:
        """Record what `record` asks of this device, without running it."""

    def synchronize(self) -> None:
        """Wait until everything asked for is done."""

    def close(self) -> None:
        """Free everything; the device must not be used afterwards."""
