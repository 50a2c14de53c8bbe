"""The cuda engine: a decoder-only transformer on quantized blocks, on one NVIDIA GPU or several.

Invariant: a row's logits are bitwise a function of the model and the slot's tokens up to that row. Neither the other
rows of a batch, nor how a prefix was cut into batches, rolled back or shared, nor the pages that hold it, nor whether a
pass is replayed as a graph, nor over how many GPUs the layers are spread changes a bit: every kernel keeps one order of
summation per output (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import structlog

from shared.engine.cuda.logits import CudaLogits
from shared.engine.cuda.pages import PageTable
from shared.engine.cuda.passes import MAX_CHAIN, Passes
from shared.engine.cuda.placement import Room, check_devices, place_layers
from shared.engine.cuda.weights import LoadingLog, load_weights, measure_weights
from shared.engine.interface import Chunk, EngineInfo, EngineSettings, Int32, Proposed
from shared.engine.slots import check_chunks, check_prefix, common_prefix
from shared.errors import EngineError
from shared.kernels.attention import CACHE_KINDS, HEAD_DIMS, PAGE_TOKENS, CacheLayout
from shared.kernels.device import Device
from shared.kernels.experts import MAX_EXPERTS, MAX_EXPERTS_USED, MAX_ROWS
from shared.kernels.gpu import CudaDevice
from shared.kernels.norm import MAX_EMBD
from shared.model.config import ModelConfig
from shared.model.gguf import GGUFFile, recipe_name, vocabulary_fingerprint
from shared.model.names import resolve_model
from shared.sampling.filters import changes_logits
from shared.sampling.params import SamplingParams

_DEFAULT_MAX_CTX = 4096
_GIB = 1 << 30

_log = structlog.get_logger(__name__)


class CudaEngine:
    """See the module's docstring and `shared.engine.interface.Engine`.

    Args:
        devices: where to run, in the order of the layers; by default the GPUs that the settings name.
        graphs: replay passes as graphs; without, every kernel is launched on its own (the bits are the same).

    Raises:
        ModelError: the model is missing, damaged, or not one that this engine computes.
        EngineError: a GPU cannot be used (code device_failed), a setting cannot be honoured (bad_settings), or a GPU's
            memory does not suffice (out_of_memory).
    """

    def __init__(self, settings: EngineSettings, *, devices: Sequence[Device] = (), graphs: bool = True) -> None:
        _check_settings(settings)
        self._devices: Sequence[Device] = devices or [CudaDevice(index) for index in settings.devices]
        with GGUFFile.open(resolve_model(settings.model)) as file:
            config = ModelConfig.read(file)
            _check_model(config, str(file.path))
            n_ctx = settings.n_ctx or min(config.context_length, _DEFAULT_MAX_CTX)
            max_pages = -(-n_ctx // PAGE_TOKENS)
            n_pages = settings.kv_pages or settings.n_slots * max_pages
            layout = CacheLayout(settings.cache_type_k, config.head_dim, config.n_head_kv)
            scratch = Passes.scratch_bytes(config, n_ctx, settings.n_batch)
            rooms = [Room(device.name, *device.memory()) for device in self._devices]
            shares = place_layers(
                measure_weights(file, config), n_pages * layout.page_bytes, scratch, rooms, str(file.path)
            )
            placed = [
                f"{room.name}: layers {share.layers.start} to {share.layers.stop - 1}, {share.n_bytes / _GIB:.1f} GiB"
                for room, share in zip(rooms, shares, strict=True)
            ]
            _log.info("model_placed", model=settings.model, devices=placed)
            fingerprint = vocabulary_fingerprint(file)
            quant = recipe_name(file)

            def report(share: float, speed: float, device: str) -> None:
                _log.info("model_loading", done=round(share, 3), gib_per_second=round(speed, 2), device=device)

            weights = load_weights(self._devices, [share.layers for share in shares], file, config, LoadingLog(report))
        self._passes: Passes | None = Passes(
            self._devices, config, weights, layout, n_ctx, settings.n_slots, n_pages, settings.n_batch, graphs
        )
        self._passes.prepare()
        self._pages = PageTable(settings.n_slots, max_pages, n_pages)
        self._lengths = [0] * settings.n_slots
        self._tokens = np.zeros((settings.n_slots, n_ctx), np.int32)  # what each slot holds, up to its length
        self._computed = 0
        self._info = EngineInfo(
            engine="cuda",
            model=settings.model,
            architecture=config.architecture,
            n_vocab=config.n_vocab,
            n_ctx=n_ctx,
            n_slots=settings.n_slots,
            n_batch=settings.n_batch,
            vocab_fingerprint=fingerprint,
            row_invariant=True,
            quant=quant,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    def length(self, slot: int) -> int:
        check_prefix(self._lengths, slot, 0)
        return self._lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        self._open()
        check_prefix(self._lengths, slot, length)
        self._lengths[slot] = length
        self._pages.truncate(slot, length)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self._open()
        check_prefix(self._lengths, source, length)
        check_prefix(self._lengths, target, 0)
        if source == target:
            self.truncate(target, length)
            return
        self._pages.share(source, target, length)
        self._tokens[target, :length] = self._tokens[source, :length]
        self._lengths[target] = length

    def reuse_prefix(self, slot: int, tokens: Int32) -> int:
        self._open()
        check_prefix(self._lengths, slot, 0)
        if len(tokens) == 0:
            raise EngineError("a prompt has at least one token", code="empty_chunk")
        wanted = np.asarray(tokens[:-1], np.int32)
        own = common_prefix(self._tokens[slot, : self._lengths[slot]], wanted)
        pages = self._pages.find(wanted)
        length = len(pages) * PAGE_TOKENS
        if length <= own:
            self.truncate(slot, own)
            return own
        self._pages.hold(slot, pages)
        self._tokens[slot, :length] = wanted[:length]
        self._lengths[slot] = length
        return length

    def close(self) -> None:
        if self._passes is None:
            return
        passes, self._passes = self._passes, None
        # Whatever fails, nothing is kept.
        with ExitStack() as stack:
            for device in self._devices:
                stack.callback(device.close)
            passes.close()

    def forward(self, chunks: Sequence[Chunk]) -> CudaLogits:
        passes = self._check(chunks)
        self._make_room(passes, chunks, 0)
        rows = passes.run(chunks, self._pages.table)
        self._extend(chunks, np.empty((len(chunks), 0), np.int32))
        this = self._computed

        def check() -> None:
            self._open()
            if self._computed != this:
                raise EngineError("these logits are of an earlier pass", "read them before the next", "stale_logits")

        return CudaLogits(rows, sum(chunk.rows for chunk in chunks), self._info.n_vocab, check)

    @property
    def max_proposals(self) -> int:
        return MAX_CHAIN

    def can_propose(self, params: SamplingParams) -> bool:
        # A chain's next token does not leave the GPU that chose it.
        return len(self._devices) == 1 and params.acceptance == "coupled" and not changes_logits(params)

    def propose(self, chunks: Sequence[Chunk], params: Sequence[SamplingParams], n: int) -> Proposed:
        if not 1 <= n <= MAX_CHAIN or any(chunk.rows != 1 for chunk in chunks) or len(params) != len(chunks):
            raise EngineError(f"proposals take 1 to {MAX_CHAIN} tokens and a row of each chunk", code="bad_rows")
        if not all(self.can_propose(p) for p in params):
            raise EngineError(
                "tokens are proposed on one GPU, greedily or coupled, without bias or penalties", code="bad_params"
            )
        passes = self._check(chunks, n - 1)
        self._make_room(passes, chunks, n - 1)
        proposed = passes.propose(chunks, self._pages.table, params, n)
        self._extend(chunks, proposed.tokens[:, :-1])
        return proposed

    def _make_room(self, passes: Passes, chunks: Sequence[Chunk], more: int) -> None:
        """Give each slot pages for its chunk and `more` tokens, or refuse and change nothing."""
        copies = self._pages.prepare([(c.slot, c.start, c.start + len(c.tokens) + more) for c in chunks])
        for chunk in chunks:
            self._lengths[chunk.slot] = chunk.start
        try:
            if self._pages.changed:
                passes.write_pages(self._pages.table)
                self._pages.changed = False
            if copies:
                passes.copy_pages(copies)
        except BaseException:
            # A page that was to be copied holds nothing yet.
            empty = {target for _, target in copies}
            for chunk in chunks:
                if self._pages.table[chunk.slot, chunk.start // PAGE_TOKENS] in empty:
                    self.truncate(chunk.slot, chunk.start // PAGE_TOKENS * PAGE_TOKENS)
            raise

    def _extend(self, chunks: Sequence[Chunk], more: Int32) -> None:
        """Note a pass's tokens and those that followed each chunk, [chunks, n]; pages that are full now may be reused.

        Not before the pass has been asked for, so that one that fails leaves what was computed.
        """
        self._computed += 1
        for chunk, following in zip(chunks, more, strict=True):
            middle = chunk.start + len(chunk.tokens)
            length = middle + len(following)
            held = self._tokens[chunk.slot, :length]
            held[chunk.start : middle] = chunk.tokens
            held[middle:] = following
            self._lengths[chunk.slot] = length
            if length // PAGE_TOKENS > chunk.start // PAGE_TOKENS:
                self._pages.register(chunk.slot, held)

    def _check(self, chunks: Sequence[Chunk], more: int = 0) -> Passes:
        """Refuse a batch that breaks the interface's rules or finds no room, before anything is changed.

        more: tokens that follow each chunk.
        """
        passes = self._open()
        check_chunks(chunks, self._lengths, self._info.n_ctx, self._info.n_batch)
        for chunk in chunks:
            low, high = int(chunk.tokens.min()), int(chunk.tokens.max())
            if low < 0 or high >= self._info.n_vocab:
                raise EngineError(
                    f"token id {low if low < 0 else high} is outside the vocabulary of {self._info.n_vocab}",
                    code="bad_token",
                )
        for chunk in chunks:
            if chunk.start + len(chunk.tokens) + more > self._info.n_ctx:
                raise EngineError(
                    f"slot {chunk.slot} has no room for {more} tokens after its chunk",
                    "ask for fewer",
                    "context_exceeded",
                )
        return passes

    def _open(self) -> Passes:
        if self._passes is None:
            raise EngineError("the engine is closed", code="engine_closed")
        return self._passes


def _check_settings(settings: EngineSettings) -> None:
    if settings.n_gpu_layers or settings.n_cpu_moe or settings.override_tensors:
        raise EngineError(
            "the cuda engine keeps the whole model on its GPUs: it cannot honour n_gpu_layers, n_cpu_moe or "
            "override_tensors",
            "leave them out, or use the ik engine",
            "bad_settings",
        )
    if settings.cache_type_k != settings.cache_type_v:
        raise EngineError(
            f"cache_type_k = {settings.cache_type_k!r} and cache_type_v = {settings.cache_type_v!r}: the cuda engine "
            "has one type for both",
            'set both to "f16", "q8_0" or "q4_0"',
            "bad_settings",
        )
    check_devices(settings.devices)
    for name, low in (("n_ctx", 0), ("n_slots", 1), ("n_batch", 1), ("kv_pages", 0)):
        if getattr(settings, name) < low:
            raise EngineError(f"{name} = {getattr(settings, name)}", f"it starts at {low}", "bad_settings")
    if settings.n_batch > MAX_ROWS:
        raise EngineError(f"n_batch = {settings.n_batch}", f"the cuda engine takes up to {MAX_ROWS}", "bad_settings")
    if settings.cache_type_k not in CACHE_KINDS:
        raise EngineError(
            f"cache_type_k = {settings.cache_type_k!r}", f"use one of {', '.join(CACHE_KINDS)}", "bad_settings"
        )


def _check_model(config: ModelConfig, path: str) -> None:
    """Refuse dimensions that no kernel is made for."""

    def refuse(what: str) -> EngineError:
        return EngineError(f"{path} has {what}", "use the ik engine", "unsupported_variant")

    if config.value_dim != config.head_dim:
        raise refuse(
            f"heads of {config.head_dim} for keys and {config.value_dim} for values: the cuda engine has one size"
        )
    if config.head_dim not in HEAD_DIMS:
        raise refuse(f"heads of {config.head_dim}; the cuda engine has kernels for {', '.join(map(str, HEAD_DIMS))}")
    for n_ff in (config.n_expert_ff,) if config.n_expert else (config.n_ff,):
        if n_ff % 32:
            raise refuse(f"a feed-forward of width {n_ff}; the cuda engine takes multiples of 32")
    if config.n_embd % 32 or config.n_embd > MAX_EMBD:
        raise refuse(f"width {config.n_embd}; the cuda engine takes multiples of 32 up to {MAX_EMBD}")
    if config.n_expert > MAX_EXPERTS or config.n_expert_used > MAX_EXPERTS_USED:
        raise refuse(
            f"{config.n_expert} experts, {config.n_expert_used} a token; the cuda engine takes {MAX_EXPERTS} and "
            f"{MAX_EXPERTS_USED}"
        )
