"""Devices for the kernels' tests: the CPU's emulator everywhere, and an NVIDIA GPU where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.kernels.device import Device
from shared.kernels.gpu import CudaDevice, cuda_unavailable
from shared.kernels.host.device import HostDevice
from shared.kernels.launching import SOURCES
from tests.kernels.deferring import DeferringDevice

BACKENDS = ["host", pytest.param("gpu", marks=pytest.mark.gpu)]
SEVERAL = [*BACKENDS, pytest.param("gpus", marks=pytest.mark.gpu)]
"""For `open_several`."""


def require(backend: str) -> None:
    """Skips the test where a backend is missing."""
    if backend == "host" and shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    if backend == "gpu" and (reason := cuda_unavailable()) is not None:
        pytest.skip(str(reason))


def open_several(kind: str, n: int, sources: Path = SOURCES) -> list[Device]:
    """Devices that copy to each other: late ones of the emulator ("host"), all on the first GPU ("gpu"), or each on a
    GPU of its own ("gpus"); skips the test where these are missing."""
    require("host" if kind == "host" else "gpu")
    if kind == "host":
        return [DeferringDevice(sources, f"host {i}") for i in range(n)]
    if kind == "gpus" and (reason := cuda_unavailable(n - 1)) is not None:
        pytest.skip(str(reason))
    return [CudaDevice(i if kind == "gpus" else 0, sources=sources) for i in range(n)]


@pytest.fixture(scope="session", params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A device for the project's kernels."""
    require(request.param)
    device: Device = HostDevice() if request.param == "host" else CudaDevice()
    yield device
    device.close()
