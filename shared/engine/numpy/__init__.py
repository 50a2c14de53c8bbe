"""The numpy engine: float32, every step written out; the oracle, and the engine of platforms without wheels."""

from shared.engine.numpy.engine import NumpyEngine

__all__ = ["NumpyEngine"]
