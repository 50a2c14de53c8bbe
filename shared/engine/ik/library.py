"""The llama.h calls that the engine needs, bound with the types that make them cheap, and llama's log.

Invariant: nothing here is called with struct layouts of another version than the one they were written for.
"""

from __future__ import annotations

import ctypes
from collections import deque
from functools import cache
from typing import Any, cast

from shared.errors import EngineError

VERSION = "0.1.5"
_REMEDY = f'pip install "ik-llama-cpp-python=={VERSION}" (Linux x86-64, Python 3.10 to 3.13), or set engine = "numpy"'

_LOG_WARN, _LOG_ERROR, _LOG_CONTINUED = 3, 4, 5


class Log:
    """llama's own log lines, kept instead of being written to stderr."""

    def __init__(self, n_lines: int = 200) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=n_lines)
        self._partial = ""
        self._level = 0

    def add(self, level: int, text: str) -> None:
        """Take a piece of text as llama emits it: a line, several, or the continuation of one."""
        if level != _LOG_CONTINUED:
            self._level = level
        *lines, self._partial = (self._partial + text).split("\n")
        self._lines.extend((self._level, line.rstrip()) for line in lines if line.strip(" ."))

    def clear(self) -> None:
        self._lines.clear()
        self._partial = ""

    def lines(self) -> list[str]:
        """What is kept, oldest first."""
        return [line for _, line in self._lines]

    def reason(self, n: int = 3) -> str:
        """The last `n` error lines (warnings where there are none), joined; empty when nothing was logged."""
        for least in (_LOG_ERROR, _LOG_WARN):
            if found := [line for level, line in self._lines if least <= level < _LOG_CONTINUED]:
                return "; ".join(found[-n:])
        return ""


class CacheView(ctypes.Structure):
    """llama_kv_cache_view.

    max_contiguous: length of the longest run of free cells.
    """

    _fields_ = (
        ("n_cells", ctypes.c_int32),
        ("n_seq_max", ctypes.c_int32),
        ("token_count", ctypes.c_int32),
        ("used_cells", ctypes.c_int32),
        ("max_contiguous", ctypes.c_int32),
        ("max_contiguous_idx", ctypes.c_int32),
        ("cells", ctypes.c_void_p),
        ("cells_sequences", ctypes.c_void_p),
    )


class Library:
    """The bound functions; attribute names are llama.h's without the prefix.

    Raises:
        EngineError: `engine_unavailable`, when the package is missing, of another version, or cannot be loaded.
    """

    def __init__(self) -> None:
        try:
            import ik_llama_cpp
            from ik_llama_cpp import _ctypes_api as api
        except (ImportError, OSError) as error:  # OSError: the shared library itself
            raise EngineError(f"the ik engine is not installed: {error}", _REMEDY, "engine_unavailable") from error
        if ik_llama_cpp.__version__ != VERSION:
            raise EngineError(
                f"the ik engine needs ik-llama-cpp-python {VERSION}, installed is {ik_llama_cpp.__version__}",
                _REMEDY,
                "engine_unavailable",
            )
        self.api = api
        self._lib = api._lib
        pointer, int32, boolean = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
        self.decode = self._bind("llama_decode", int32, pointer, api.llama_batch)
        self.get_logits_ith = self._bind("llama_get_logits_ith", pointer, pointer, int32)
        self.kv_cache_seq_rm = self._bind("llama_kv_cache_seq_rm", boolean, pointer, int32, int32, int32)
        self.kv_cache_seq_cp = self._bind("llama_kv_cache_seq_cp", None, pointer, int32, int32, int32, int32)
        self.kv_cache_defrag = self._bind("llama_kv_cache_defrag", None, pointer)
        self.kv_cache_update = self._bind("llama_kv_cache_update", None, pointer)
        self._view_init = self._bind("llama_kv_cache_view_init", CacheView, pointer, int32)
        self._view_update = self._bind("llama_kv_cache_view_update", None, pointer, ctypes.POINTER(CacheView))
        self._view_free = self._bind("llama_kv_cache_view_free", None, ctypes.POINTER(CacheView))
        self.n_ctx_train = self._bind("llama_n_ctx_train", int32, pointer)
        self.n_layer = self._bind("llama_n_layer", int32, pointer)
        self.model_has_recurrent = self._bind("llama_model_has_recurrent", boolean, pointer)
        self.model_has_encoder = self._bind("llama_model_has_encoder", boolean, pointer)
        self.supports_gpu_offload = self._bind("llama_supports_gpu_offload", boolean)
        self.cpu_buffer_type = self._bind("ggml_backend_cpu_buffer_type", pointer)
        self._check_layout()

        self.log = Log()
        callback_type = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)
        # Kept here for the life of the process: llama calls it whenever it pleases.
        self._callback = callback_type(
            lambda level, text, _: self.log.add(level, (text or b"").decode("utf-8", "replace"))
        )
        self._bind("llama_log_set", None, callback_type, pointer)(self._callback, None)
        api.llama_backend_init()

    def kv_cache_view(self, context: int | None) -> CacheView:
        """How the context's cells are used; only the counts are valid. Looks at every cell."""
        view = self._view_init(context, 1)
        self._view_update(context, view)
        self._view_free(view)
        return cast(CacheView, view)

    def _bind(self, name: str, result: Any, *arguments: Any) -> Any:
        function = self._lib[name]  # a fresh object: the package's own binding keeps its types
        function.restype = result
        function.argtypes = arguments
        return function

    def _check_layout(self) -> None:
        """A library of another build (IK_LLAMA_CPP_LIB_PATH) would read settings from the wrong bytes."""
        model, context = self.api.llama_model_default_params(), self.api.llama_context_default_params()
        found = (
            model.n_seq_max, model.use_mmap, model.use_mlock, model.vocab_only, model.mtp, model.dry_run,
            context.n_batch, context.defrag_thold, context.type_k, context.type_v, context.logits_all,
            context.min_experts, context.thresh_experts, context.mtp, context.mtp_op_type, context.offload_policy,
        )  # fmt: skip
        expected = (1, True, False, False, False, False, 2048, -1.0, 1, 1, False, -1, 0.0, False, 0, None)
        if found != expected:
            raise EngineError(
                f"the ik_llama library's structures are not those of ik-llama-cpp-python {VERSION}",
                "unset IK_LLAMA_CPP_LIB_PATH, or build the library from that version's submodule",
                "engine_unavailable",
            )


@cache
def load_library() -> Library:
    """The process's one library. Raises `EngineError` (`engine_unavailable`)."""
    return Library()


def ik_unavailable() -> EngineError | None:
    """Why the ik engine cannot be used here; None when it can."""
    try:
        load_library()
    except EngineError as error:
        return error
    return None
