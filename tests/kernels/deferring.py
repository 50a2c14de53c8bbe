"""A device of the emulator that is late, as a GPU may be, so that what nothing waits for shows as wrong data."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from pathlib import Path

from shared.kernels.device import AnyArray, Buffer, Device, Graph
from shared.kernels.host.device import HostDevice
from shared.kernels.launching import SOURCES


class DeferringGraph:
    def __init__(self, device: DeferringDevice, calls: list[Callable[[], object]]) -> None:
        self._device = device
        self._calls = calls

    def replay(self) -> None:
        self._device.n_replays += 1
        for call in self._calls:
            self._device._do(call)


class DeferringDevice(HostDevice):
    """Does what it is asked for when somebody waits for it, and no sooner: its own caller, or another device to or
    from which it copies."""

    def __init__(self, sources: Path = SOURCES, name: str = "host") -> None:
        super().__init__(sources)
        self.name = name
        self.free_bytes = self.total_bytes = 1 << 40
        self.n_launches = self.n_replays = 0
        self.copied_bytes: list[int] = []
        self._queue: deque[Callable[[], object]] = deque()
        self._n_asked = self._n_begun = 0

    def memory(self) -> tuple[int, int]:
        return self.free_bytes, self.total_bytes

    def write(self, target: Buffer, source: AnyArray) -> None:
        # Pageable memory is read at once.
        super().write(target, source if source in self._staging else source.copy())

    def launch(self, *arguments: object, **options: object) -> None:
        self.n_launches += 1
        super().launch(*arguments, **options)  # type: ignore[arg-type]

    def copy_to(self, device: Device, target: Buffer, source: Buffer) -> None:
        assert isinstance(device, DeferringDevice)
        assert self._record is None
        assert device._record is None
        assert target.nbytes == source.nbytes
        self.copied_bytes.append(source.nbytes)
        earlier = device._n_asked

        def copy() -> None:
            device._catch_up(earlier)
            ctypes.memmove(target.address, source.address, source.nbytes)

        self._do(copy)
        asked = self._n_asked
        device._do(lambda: self._catch_up(asked))

    def capture(self, record: Callable[[], None]) -> Graph:
        graph = super().capture(record)
        return DeferringGraph(self, graph._calls)  # type: ignore[attr-defined]

    def synchronize(self) -> None:
        super().synchronize()
        self._catch_up(self._n_asked)

    def close(self) -> None:
        self.synchronize()
        super().close()

    def _do(self, call: Callable[[], object]) -> None:
        if self._record is None:
            self._n_asked += 1
            self._queue.append(call)
        else:
            super()._do(call)

    def _catch_up(self, to: int) -> None:
        """Do what was asked for, up to the number `to`."""
        while self._n_begun < to:
            self._n_begun += 1
            self._queue.popleft()()
