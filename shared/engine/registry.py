"""Engines by name. Heavy modules are imported only when their engine is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import structlog

from shared.engine.ik import ik_unavailable
from shared.engine.interface import Engine, EngineSettings
from shared.errors import EngineError, SettingsError

ENGINES = ("auto", "ik", "numpy", "cuda", "null", "emulated")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EngineAvailability:
    """Whether an engine can be used on this machine.

    reason: why not, or what it is for.
    remedy: what to do about it; empty when usable.
    """

    name: str
    usable: bool
    reason: str
    remedy: str = ""


def load_engine(settings: EngineSettings) -> Engine:
    """Build the engine that the settings name; call it on the thread that will use it.

    Raises:
        EngineError: an unknown or unavailable engine, or settings that it refuses.
        SettingsError: nothing that could be emulated.
        ModelError: the model file is missing, damaged or unsupported.
    """
    name = settings.engine
    if name == "auto":
        missing = ik_unavailable()
        name = "ik" if missing is None else "numpy"
        if missing is None:
            _log.info("engine_chosen", engine=name, model=settings.model)
        else:
            _log.warning("engine_chosen", engine=name, model=settings.model, reason=missing.message)
        settings = replace(settings, engine=name)
    if name == "ik":
        from shared.engine.ik import IkEngine

        return IkEngine(settings)
    if name == "numpy":
        from shared.engine.numpy.engine import NumpyEngine

        return NumpyEngine(settings)
    if name == "cuda":
        from shared.engine.cuda.engine import CudaEngine

        return CudaEngine(settings)
    if name == "null":
        from shared.engine.null import NullEngine

        return NullEngine(settings)
    if name == "emulated":
        from shared.engine.emulated import emulate, find_pace

        pace = find_pace(settings)
        if settings.inner == "emulated":
            raise SettingsError("an emulated engine cannot be inside another", "inner must compute")
        return emulate(load_engine(replace(settings, engine=settings.inner)), pace)
    raise EngineError(f"there is no engine {name!r}", f"use one of {', '.join(ENGINES)}", "unknown_engine")


def available_engines() -> list[EngineAvailability]:
    """Every engine with its state on this machine, in the order of preference; "auto" takes one of the first two."""
    missing = ik_unavailable()
    if missing is None:
        ik = EngineAvailability("ik", True, "ik_llama.cpp: any GGUF architecture, CPU")
    else:
        ik = EngineAvailability("ik", False, missing.message, missing.remedy)
    from shared.kernels.gpu import cuda_unavailable

    missing = cuda_unavailable()
    if missing is None:
        cuda = EngineAvailability("cuda", True, "CUDA kernels of our own, NVIDIA GPUs")
    else:
        cuda = EngineAvailability("cuda", False, missing.message, missing.remedy)
    return [
        ik,
        EngineAvailability("numpy", True, "pure NumPy, float32: the reference, slow"),
        cuda,
        EngineAvailability("null", True, "no model: measures the pipeline"),
        EngineAvailability(
            "emulated", True, "another engine at the speed of a hardware profile: measures the pipeline"
        ),
    ]
