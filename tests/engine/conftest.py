"""Engines for the cuda engine's tests: on the CPU's emulator everywhere, and on an NVIDIA GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.engine.cuda.engine import CudaEngine
from shared.engine.interface import EngineSettings
from shared.kernels.device import Device
from shared.kernels.gpu import CudaDevice
from shared.kernels.host.device import HostDevice
from tests.engine.tiny_models import TinyModel, write_tiny_model
from tests.kernels.conftest import BACKENDS, require

MakeEngine = Callable[..., CudaEngine]
ModelPath = Callable[[TinyModel], Path]


def open_device(backend: str) -> Device:
    return HostDevice() if backend == "host" else CudaDevice()


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    require(request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> ModelPath:
    """Where a tiny model is, written when first asked for."""
    folder = tmp_path_factory.mktemp("models")
    paths: dict[TinyModel, Path] = {}

    def path(model: TinyModel) -> Path:
        if model not in paths:
            paths[model] = write_tiny_model(folder / f"{len(paths)}.gguf", model)
        return paths[model]

    return path


@pytest.fixture(scope="module")
def make_engine(model_path: ModelPath) -> Iterator[MakeEngine]:
    """A cuda engine for a tiny model or a model's name, by backend, settings and graphs; the same one with empty slots
    when asked for again."""
    engines: dict[tuple[object, ...], CudaEngine] = {}

    def make(backend: str, model: TinyModel | str, *, graphs: bool = True, **settings: object) -> CudaEngine:
        key = backend, model, graphs, *sorted(settings.items())
        if key not in engines:
            name = model if isinstance(model, str) else str(model_path(model))
            made = EngineSettings(engine="cuda", model=name, **settings)  # type: ignore[arg-type]
            engines[key] = CudaEngine(made, devices=[open_device(backend)], graphs=graphs)
        for slot in range(engines[key].info.n_slots):
            engines[key].truncate(slot, 0)
        return engines[key]

    yield make
    for engine in engines.values():
        engine.close()
