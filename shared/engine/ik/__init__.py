"""ik_llama.cpp as an engine, through the pinned `ik-llama-cpp-python`; see `engine.py`."""

from shared.engine.ik.engine import IkEngine
from shared.engine.ik.library import ik_unavailable

__all__ = ["IkEngine", "ik_unavailable"]
