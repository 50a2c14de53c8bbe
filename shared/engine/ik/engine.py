"""ik_llama.cpp as an engine: all slots are sequences of one context with one KV cache of n_ctx * n_slots cells.

Invariants: `_lengths` says what llama's cache holds; a forward pass that fails leaves its slots truncated to where
their chunks started, and no other slot changed. Before every pass the used cells are the first ones (see `_Layout`).

`row_invariant` is False. Without flash attention a row was bitwise the same alone and in any batch of up to 24 rows
that started at the same offset in the cache; from 32 rows on llama takes other kernels, which quantize activations
otherwise (the embedded target: logits differ by 0.2 in the median, 1.8 at most).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.engine.dense import DenseLogits
from shared.engine.ik.library import VERSION, Library, load_library
from shared.engine.interface import Chunk, EngineInfo, EngineSettings, Float32
from shared.engine.slots import check_chunks, check_prefix
from shared.errors import EngineError, ModelError
from shared.model.gguf import GGUFFile, recipe_name, vocabulary_fingerprint
from shared.model.names import resolve_model

_NARROW = 24
"""Rows that llama computes at a time where its kernels for many rows are wrong."""

_CACHE_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}


class _BufferOverride(ctypes.Structure):
    """llama_model_tensor_buft_override: a regex over tensor names, and the buffer type that they go to."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


class IkEngine:
    """See the module's docstring and `Engine`.

    Raises:
        EngineError: the package is missing (`engine_unavailable`), or settings that this build cannot carry out.
        ModelError: the file is missing, damaged, or of an architecture that llama or rollback does not support.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._model: int | None = None
        self._context: int | None = None
        library = self._library = load_library()
        _check_settings(settings, library)
        path = resolve_model(settings.model)
        with GGUFFile.open(path) as file:
            architecture = str(file.metadata.get("general.architecture", ""))
            fingerprint = vocabulary_fingerprint(file)
            quant = recipe_name(file)
            narrow = has_odd_q4_1_rows(file)
        try:
            self._open(settings, path, architecture, fingerprint, quant, narrow)
        except BaseException:
            self.close()
            raise

    def _open(
        self, settings: EngineSettings, path: Path, architecture: str, fingerprint: str, quant: str, narrow: bool
    ) -> None:
        library, api = self._library, self._library.api
        library.log.clear()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = settings.n_gpu_layers
        model_params.ncmoe = settings.n_cpu_moe
        overrides = _buffer_overrides(settings.override_tensors, library)
        if overrides is not None:
            model_params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        self._model = api.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self._model:
            raise ModelError(
                f"{path}: ik_llama.cpp cannot load it: {library.log.reason() or 'it gives no reason'}",
                "check the file with `draftwire doctor`, or convert it to a supported architecture and quant type",
            )
        if library.model_has_recurrent(self._model) or library.model_has_encoder(self._model):
            raise ModelError(
                f"{path}: models of architecture {architecture!r} cannot be rolled back to an earlier position",
                "use a decoder-only model with plain attention layers",
            )

        trained = int(library.n_ctx_train(self._model))
        n_ctx = settings.n_ctx or min(trained, 4096)
        n_cells = n_ctx * settings.n_slots
        n_batch = min(settings.n_batch, n_cells)
        params = context_params(settings, architecture, n_cells, n_batch, api)
        if narrow:
            params.n_ubatch = min(n_batch, _NARROW)
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise EngineError(
                f"ik_llama.cpp cannot create a context of {settings.n_slots} x {n_ctx} tokens for {path}: "
                f"{library.log.reason() or 'it gives no reason'}",
                "lower n_ctx, n_slots or n_batch, or use another cache type",
            )

        n_vocab = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model)))
        self._info = EngineInfo(
            engine="ik",
            model=settings.model,
            architecture=architecture,
            n_vocab=n_vocab,
            n_ctx=n_ctx,
            n_slots=settings.n_slots,
            n_batch=n_batch,
            vocab_fingerprint=fingerprint,
            row_invariant=False,
            quant=quant,
        )
        self._lengths = [0] * settings.n_slots
        self._batch = _Batch(n_batch, n_ctx, settings.n_slots, api)
        self._layout = _Layout()
        self._logits: Float32 = np.empty((1, n_vocab), np.float32)
        self._logits_address = self._logits.ctypes.data

    @property
    def info(self) -> EngineInfo:
        return self._info

    def forward(self, chunks: Sequence[Chunk]) -> DenseLogits:
        self._check_open()
        n_vocab, lengths, batch = self._info.n_vocab, self._lengths, self._batch
        n_tokens = check_chunks(chunks, lengths, self._info.n_ctx, self._info.n_batch)
        n_rows = batch.fill(chunks, n_tokens)
        if int(batch.unsigned_tokens[:n_tokens].max()) >= n_vocab:
            raise EngineError(f"a token is outside the vocabulary of {n_vocab}", code="bad_token")
        for chunk in chunks:
            if chunk.start < lengths[chunk.slot]:
                self._remove(chunk.slot, chunk.start)
        if self._layout.has_holes:
            self._defragment()
        if n_rows > len(self._logits):
            self._logits = np.empty((n_rows, n_vocab), np.float32)
            self._logits_address = self._logits.ctypes.data
        try:
            self._decode(n_tokens, n_rows)
        except EngineError:
            self._layout.scatter()  # llama may have taken a part of the batch
            for chunk in chunks:
                self._remove(chunk.slot, chunk.start)
            raise
        for chunk in chunks:
            n = len(chunk.tokens)
            self._layout.append(chunk.slot, chunk.start, n)
            lengths[chunk.slot] = chunk.start + n
        return DenseLogits(self._logits[:n_rows])

    def _decode(self, n_tokens: int, n_rows: int) -> None:
        """Compute what `_batch` holds and copy the wanted rows out."""
        library = self._library
        library.log.clear()
        status = library.decode(self._context, self._batch.struct(n_tokens))
        if status != 0:
            reason = library.log.reason()
            raise EngineError(
                f"llama_decode failed with status {status}" + (f": {reason}" if reason else ""), code="decode_failed"
            )
        if n_rows == 0:
            return
        # llama keeps the wanted rows one after the other, in the order of the batch.
        first = int(self._batch.wanted[:n_tokens].argmax())
        address = library.get_logits_ith(self._context, first)
        if not address:
            raise EngineError(f"llama_decode gave no logits: {library.log.reason()}", code="decode_failed")
        ctypes.memmove(self._logits_address, address, n_rows * self._info.n_vocab * 4)

    def _defragment(self) -> None:
        """Move cells into the holes until none is left."""
        library, context = self._library, self._context
        free_run = -1
        while True:
            view = library.kv_cache_view(context)
            if view.max_contiguous == view.n_cells - view.used_cells:
                break
            if view.max_contiguous == free_run:
                raise EngineError("ik_llama.cpp does not defragment its KV cache", code="decode_failed")
            free_run = view.max_contiguous
            library.kv_cache_defrag(context)  # a bounded number of moves
            library.kv_cache_update(context)
        self._layout.compact()

    def length(self, slot: int) -> int:
        check_prefix(self._lengths, slot, 0)
        return self._lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        self._check_open()
        check_prefix(self._lengths, slot, length)
        if length < self._lengths[slot]:
            self._remove(slot, length)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self._check_open()
        check_prefix(self._lengths, source, length)
        check_prefix(self._lengths, target, 0)
        if source == target:
            self.truncate(target, length)
            return
        if self._lengths[target]:
            self._remove(target, 0)
        if length:
            self._library.kv_cache_seq_cp(self._context, source, target, 0, length)
            self._layout.share()
        self._lengths[target] = length

    def close(self) -> None:
        if self._context:
            self._library.api.llama_free(self._context)
        if self._model:
            self._library.api.llama_free_model(self._model)
        self._context = self._model = None

    def _remove(self, slot: int, start: int) -> None:
        """Drop the slot's cells at `start` and after."""
        self._library.kv_cache_seq_rm(self._context, slot, start, -1)
        self._layout.remove(slot, start, self._lengths[slot])
        self._lengths[slot] = start
        if not any(self._lengths):
            self._layout.compact()

    def _check_open(self) -> None:
        if not self._context:
            raise EngineError("the engine is closed", code="engine_closed")


class _Layout:
    """Whether the used cells of llama's cache are the first ones, without a hole among them.

    They have to be: llama (0.1.5, and later) looks for the last used cell only at every 32nd one
    (`llama_kv_cache_cell_max`), so behind a hole that covers such a cell it overlooks others, and computes attention
    without them: wrong logits or NaN, and no error. Cells are handed out in order, so taking back the latest ones
    leaves no hole; anything else is taken to leave one.
    """

    def __init__(self) -> None:
        self.has_holes = False
        self._runs: list[tuple[int, int, int]] = []  # slot, start, end of the latest cells, in order

    def append(self, slot: int, start: int, n: int) -> None:
        """The slot's tokens start .. start + n took the next cells."""
        end = start + n
        if self._runs and self._runs[-1][0] == slot and self._runs[-1][2] == start:
            _, start, _ = self._runs.pop()
        self._runs.append((slot, start, end))

    def remove(self, slot: int, start: int, end: int) -> None:
        """The slot's tokens start .. end gave their cells back."""
        while end > start and self._runs and self._runs[-1][0] == slot and self._runs[-1][2] == end:
            _, first, _ = self._runs.pop()
            end = max(start, first)
            if first < end:
                self._runs.append((slot, first, end))
        if end > start:
            self.scatter()

    def share(self) -> None:
        """Cells came to belong to two slots, so that they outlive either's removal."""
        self._runs.clear()

    def scatter(self) -> None:
        """There may be holes."""
        self.has_holes = True
        self._runs.clear()

    def compact(self) -> None:
        """There are no holes, in an order that is not known."""
        self.has_holes = False
        self._runs.clear()


class _Batch:
    """llama's batch, whose arrays are NumPy's: filled by slices, allocated once.

    tokens, positions: [n_batch] int32. wanted: [n_batch] int8.
    sequences: [n_batch], addresses of an int32 slot number each, which is how llama wants them.
    """

    def __init__(self, n_batch: int, n_ctx: int, n_slots: int, api: Any) -> None:
        self.tokens = np.zeros(n_batch, np.int32)
        self.unsigned_tokens = self.tokens.view(np.uint32)
        self.positions = np.zeros(n_batch, np.int32)
        self.wanted = np.zeros(n_batch, np.int8)
        self.sequences = np.zeros(n_batch, np.uintp)
        self._counts = np.ones(n_batch, np.int32)
        self._range = np.arange(n_ctx, dtype=np.int32)
        self._slots = np.arange(n_slots, dtype=np.int32)
        self._slot_addresses = [self._slots.ctypes.data + 4 * slot for slot in range(n_slots)]
        self._struct = api.llama_batch()
        types = dict(api.llama_batch._fields_)
        for name, array in (
            ("token", self.tokens),
            ("pos", self.positions),
            ("n_seq_id", self._counts),
            ("seq_id", self.sequences),
            ("logits", self.wanted),
        ):
            setattr(self._struct, name, ctypes.cast(array.ctypes.data, types[name]))

    def fill(self, chunks: Sequence[Chunk], n_tokens: int) -> int:
        """Lay the chunks out one after the other; returns the number of wanted rows."""
        n_rows = end = 0
        self.wanted[:n_tokens] = 0
        for chunk in chunks:
            first, end = end, end + len(chunk.tokens)
            self.tokens[first:end] = chunk.tokens
            self.positions[first:end] = self._range[chunk.start : chunk.start + end - first]
            self.sequences[first:end] = self._slot_addresses[chunk.slot]
            self.wanted[end - chunk.rows : end] = 1
            n_rows += chunk.rows
        return n_rows

    def struct(self, n_tokens: int) -> Any:
        """The llama_batch of the first `n_tokens`."""
        self._struct.n_tokens = n_tokens
        return self._struct


def context_params(settings: EngineSettings, architecture: str, n_cells: int, n_batch: int, api: Any) -> Any:
    """llama_context_params for a cache of `n_cells` tokens and batches of `n_batch`."""
    params = api.llama_context_default_params()
    params.n_ctx = n_cells
    params.n_batch = params.n_ubatch = n_batch
    params.n_seq_max = settings.n_slots
    params.n_threads = params.n_threads_batch = settings.threads or default_threads()
    params.flash_attn = settings.flash_attention
    params.type_k = _CACHE_TYPES[settings.cache_type_k]
    params.type_v = _CACHE_TYPES[settings.cache_type_v]
    # Without it Ling's experts are chosen without regard to their groups: logits 40 % off, and no warning.
    params.grouped_expert_routing = architecture == "bailingmoe2"
    return params


def has_odd_q4_1_rows(file: GGUFFile) -> bool:
    """Whether a model has Q4_1 matrices with rows that are no multiple of 256 (SmolLM2-135M).

    ik 0.1.5 computes garbage for it from 32 rows on: hardly any top token agrees with that of fewer rows.
    """
    return any(info.quant.name == "Q4_1" and info.shape[0] % 256 for info in file.tensors.values())


def default_threads() -> int:
    """Half of the cores that this process may use, 1 to 8: a target and a draft on one machine must not exceed them.

    ik's threads spin while they wait for each other; with more of them than cores, a step takes 100 times as long.
    """
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


def _check_settings(settings: EngineSettings, library: Library) -> None:
    for name, least in (("n_slots", 1), ("n_batch", 1), ("n_ctx", 0), ("threads", 0), ("n_cpu_moe", 0)):
        value = getattr(settings, name)
        if value < least:
            raise EngineError(f"{name} is {value}", f"it starts at {least}", "bad_settings")
    for name in ("cache_type_k", "cache_type_v"):
        value = getattr(settings, name)
        if value not in _CACHE_TYPES:
            raise EngineError(f"{name} is {value!r}", f"use one of {', '.join(_CACHE_TYPES)}", "bad_settings")
    if settings.cache_type_v != "f16" and not settings.flash_attention:
        raise EngineError(
            f"cache_type_v {settings.cache_type_v!r} needs flash attention",
            'set flash_attention, or cache_type_v = "f16"',
            "bad_settings",
        )
    if settings.flash_attention and settings.n_slots > 1 and settings.n_gpu_layers == 0:
        # Its CPU kernel computes garbage, or aborts the process (GGML_ASSERT(S > 0)), for a row whose mask hides the
        # first block of cells, which is every row of the second sequence in a shared cache.
        raise EngineError(
            f"ik_llama.cpp's flash attention on the CPU cannot serve {settings.n_slots} slots",
            "set n_slots = 1, or flash_attention = false",
            "bad_settings",
        )
    if settings.n_gpu_layers and not library.supports_gpu_offload():
        raise EngineError(
            f"n_gpu_layers is {settings.n_gpu_layers}, but the installed ik_llama.cpp is built for the CPU alone",
            f"set n_gpu_layers = 0, or install a CUDA build of ik-llama-cpp-python {VERSION}",
            "bad_settings",
        )


def _buffer_overrides(rules: Sequence[str], library: Library) -> Any:
    """A terminated array of llama_model_tensor_buft_override for rules like "regex=CPU"; None without rules."""
    if not rules:
        return None
    overrides = (_BufferOverride * (len(rules) + 1))()
    for override, rule in zip(overrides, rules, strict=False):
        pattern, separator, place = rule.rpartition("=")
        if not separator or not pattern or place != "CPU":
            raise EngineError(
                f"override_tensors has {rule!r}",
                'write each rule as "regex=CPU"; no other place is known',
                "bad_settings",
            )
        try:
            re.compile(pattern)  # llama's own complaint would look like one about the file
        except re.error as error:
            raise EngineError(
                f"override_tensors has {rule!r}: {error}",
                "write a regular expression over tensor names",
                "bad_settings",
            ) from None
        override.pattern = pattern.encode()
        override.buffer_type = library.cpu_buffer_type()
    return overrides
