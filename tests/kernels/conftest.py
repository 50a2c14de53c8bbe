"""Devices for the kernels' tests: the CPU's emulator everywhere, and an NVIDIA GPU where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from shared.kernels.device import Device
from shared.kernels.gpu import CudaDevice, cuda_unavailable
from shared.kernels.host.device import HostDevice

BACKENDS = ["host", pytest.param("gpu", marks=pytest.mark.gpu)]


def require(backend: str) -> None:
    """Skips the test where a backend is missing."""
    if backend == "host" and shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    if backend == "gpu" and (reason := cuda_unavailable()) is not None:
        pytest.skip(str(reason))


@pytest.fixture(scope="session", params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A device for the project's kernels."""
    require(request.param)
    device: Device = HostDevice() if request.param == "host" else CudaDevice()
    yield device
    device.close()
