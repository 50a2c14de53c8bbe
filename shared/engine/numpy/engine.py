"""The numpy engine: a decoder-only transformer in float32, in plain steps.

Invariant: a row's logits are bitwise a function of the model and the slot's tokens up to that row. Neither the other
rows of the batch, nor the slot, nor how the prefix was cut into batches, rolled back or copied changes a bit
(see `ops`, and `info.row_invariant`, which is checked against the loaded BLAS when the engine starts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.engine.dense import DenseLogits
from shared.engine.interface import Chunk, EngineInfo, EngineSettings, Float32
from shared.engine.numpy import ops
from shared.engine.numpy.weights import LayerWeights, Weights, float32_bytes, load_weights
from shared.engine.slots import check_chunks, check_prefix
from shared.errors import EngineError
from shared.model.config import ModelConfig, RopeStyle
from shared.model.gguf import GGUFFile, recipe_name, vocabulary_fingerprint
from shared.model.names import resolve_model
from shared.model.rope import rope_tables

_DEFAULT_MAX_CTX = 4096
_GIB = 1 << 30


class NumpyEngine:
    """See the module's docstring and `shared.engine.interface.Engine`.

    The KV cache is float32, which is what `cache_type_k` and `cache_type_v` "f16" (the default) and "f32" get.
    `threads` is a hint that is not needed here: the BLAS has its own (OPENBLAS_NUM_THREADS).

    Raises:
        ModelError: the model is missing, damaged, or not one that this engine computes.
        EngineError: a setting cannot be honoured (code bad_settings), or memory does not suffice
            (out_of_memory).
    """

    def __init__(self, settings: EngineSettings) -> None:
        _check_settings(settings)
        with GGUFFile.open(resolve_model(settings.model)) as file:
            config = ModelConfig.read(file)
            n_ctx = settings.n_ctx or min(config.context_length, _DEFAULT_MAX_CTX)
            cells = config.n_layer * settings.n_slots * config.n_head_kv * n_ctx
            _check_memory(
                float32_bytes(file), 4 * cells * (config.head_dim + config.value_dim), file.path, _available_bytes()
            )
            fingerprint = vocabulary_fingerprint(file)
            quant = recipe_name(file)
            self._weights: Weights | None = load_weights(file, config)
        self._config = config
        shape = (config.n_layer, settings.n_slots, config.n_head_kv, n_ctx)
        self._keys: Float32 = np.zeros((*shape, config.head_dim), np.float32)
        self._values: Float32 = np.zeros((*shape, config.value_dim), np.float32)
        self._lengths = [0] * settings.n_slots
        cos, sin = rope_tables(config.rope, self._weights.rope_factors, n_ctx)
        self._cos, self._sin = cos[:, None], sin[:, None]
        self._rotate = ops.rotate_neox if config.rope.style is RopeStyle.NEOX else ops.rotate_norm
        self._info = EngineInfo(
            engine="numpy",
            model=settings.model,
            architecture=config.architecture,
            n_vocab=config.n_vocab,
            n_ctx=n_ctx,
            n_slots=settings.n_slots,
            n_batch=settings.n_batch,
            vocab_fingerprint=fingerprint,
            row_invariant=all(ops.rows_are_independent(matrix) for matrix in self._weights.matrices),
            quant=quant,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    def length(self, slot: int) -> int:
        check_prefix(self._lengths, slot, 0)
        return self._lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        self._open_weights()
        check_prefix(self._lengths, slot, length)
        self._lengths[slot] = length

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self._open_weights()
        check_prefix(self._lengths, source, length)
        check_prefix(self._lengths, target, 0)
        if source != target:
            self._keys[:, target, :, :length] = self._keys[:, source, :, :length]
            self._values[:, target, :, :length] = self._values[:, source, :, :length]
        self._lengths[target] = length

    def close(self) -> None:
        self._weights = None
        self._keys = self._values = np.empty((0, 0, 0, 0, 0), np.float32)

    def forward(self, chunks: Sequence[Chunk]) -> DenseLogits:
        weights = self._check(chunks)
        for chunk in chunks:
            self._lengths[chunk.slot] = chunk.start
        places = [
            (chunk.slot, chunk.start + i) for chunk in chunks for i in range(len(chunk.tokens))
        ]  # (slot, position) of every row
        wanted = np.concatenate(
            [np.arange(len(chunk.tokens)) >= len(chunk.tokens) - chunk.rows for chunk in chunks]
        ).nonzero()[0]
        # [n, n_embd], the residual stream.
        x: Float32 = weights.embedding[np.concatenate([chunk.tokens for chunk in chunks])]
        last = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            rows = wanted if index == last else None
            x = self._attention(index, layer, x, chunks, places, rows)
            if len(x):
                x += self._ffn(layer, ops.rms_norm(x, layer.ffn_norm, self._config.rms_eps))
        for chunk in chunks:
            self._lengths[chunk.slot] = chunk.start + len(chunk.tokens)
        if not len(x):
            return DenseLogits(np.empty((0, self._info.n_vocab), np.float32))
        return DenseLogits(ops.linear(weights.output, ops.rms_norm(x, weights.output_norm, self._config.rms_eps)))

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: Float32,
        chunks: Sequence[Chunk],
        places: list[tuple[int, int]],
        rows: npt.NDArray[np.intp] | None,
    ) -> Float32:
        """Store the keys and values of all rows, and return x + attention of the given rows (None: of all)."""
        config = self._config
        heads, kv_heads, head_dim, value_dim = config.n_head, config.n_head_kv, config.head_dim, config.value_dim
        n = len(x)
        qkv = ops.linear(layer.qkv, ops.rms_norm(x, layer.attention_norm, config.rms_eps))
        n_q, n_k = heads * head_dim, kv_heads * head_dim
        q: Float32 = qkv[:, :n_q].reshape(n, heads, head_dim)
        k: Float32 = qkv[:, n_q : n_q + n_k].reshape(n, kv_heads, head_dim)
        v = qkv[:, n_q + n_k :].reshape(n, kv_heads, value_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(q, layer.q_norm, config.rms_eps)
            k = ops.rms_norm(k, layer.k_norm, config.rms_eps)
        positions = np.array([position for _, position in places])
        cos, sin = self._cos[positions], self._sin[positions]
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)

        keys, values = self._keys[index], self._values[index]
        at = 0
        for chunk in chunks:
            end, stop = at + len(chunk.tokens), chunk.start + len(chunk.tokens)
            keys[chunk.slot, :, chunk.start : stop] = k[at:end].transpose(1, 0, 2)
            values[chunk.slot, :, chunk.start : stop] = v[at:end].transpose(1, 0, 2)
            at = end

        if rows is not None:
            x, q, places = x[rows], q[rows], [places[row] for row in rows]
        mixed = np.empty((len(x), kv_heads, heads // kv_heads, value_dim), np.float32)
        scale = 1 / math.sqrt(head_dim)
        for row, (slot, position) in enumerate(places):
            grouped = q[row].reshape(kv_heads, heads // kv_heads, head_dim)
            prefix = slice(0, position + 1)
            ops.attend(grouped, keys[slot, :, prefix], values[slot, :, prefix], scale, mixed[row])
        if len(x):
            x = x + ops.linear(layer.output, mixed.reshape(len(x), -1))
        return x

    def _ffn(self, layer: LayerWeights, h: Float32) -> Float32:
        config = self._config
        if layer.select is None:
            return ops.linear(layer.down, ops.silu_product(ops.linear(layer.gate_up, h)))
        scores = ops.linear(layer.select, h)
        ids, weights = ops.select_experts(scores, config.n_expert_used, config.norm_topk_prob, config.expert_scale)
        return ops.expert_ffn(h, layer.gate_up, layer.down, ids, weights)

    def _check(self, chunks: Sequence[Chunk]) -> Weights:
        """Refuse a batch that breaks the interface's rules, before anything is changed."""
        weights = self._open_weights()
        check_chunks(chunks, self._lengths, self._info.n_ctx, self._info.n_batch)
        for chunk in chunks:
            low, high = int(chunk.tokens.min()), int(chunk.tokens.max())
            if low < 0 or high >= self._info.n_vocab:
                raise EngineError(
                    f"token id {low if low < 0 else high} is outside the vocabulary of {self._info.n_vocab}",
                    code="bad_token",
                )
        return weights

    def _open_weights(self) -> Weights:
        if self._weights is None:
            raise EngineError("the engine is closed", code="engine_closed")
        return self._weights


def _check_settings(settings: EngineSettings) -> None:
    for name in ("cache_type_k", "cache_type_v"):
        value = getattr(settings, name)
        if value not in ("f16", "f32"):
            raise EngineError(
                f"{name} = {value!r}: the numpy engine's KV cache is float32",
                f'set {name} = "f16", or use the ik engine',
                "bad_settings",
            )
    if settings.flash_attention:
        raise EngineError(
            "flash_attention = true: the numpy engine has none",
            "set flash_attention = false, or use the ik engine",
            "bad_settings",
        )
    if settings.n_gpu_layers or settings.n_cpu_moe or settings.override_tensors:
        raise EngineError(
            "the numpy engine runs on the CPU: it cannot honour n_gpu_layers, n_cpu_moe or override_tensors",
            "leave them out, or use the ik engine",
            "bad_settings",
        )
    for name, low in (("n_ctx", 0), ("n_slots", 1), ("n_batch", 1), ("threads", 0)):
        if getattr(settings, name) < low:
            raise EngineError(f"{name} = {getattr(settings, name)}", f"it starts at {low}", "bad_settings")


def _check_memory(weights: int, cache: int, path: Path, available: int | None) -> None:
    """Refuse what would not fit. All in bytes; available None: unknown, anything goes."""
    if available is None or weights + cache <= available:
        return
    missing = weights + cache - available
    raise EngineError(
        f"{path} needs {weights / _GIB:.1f} GiB as float32 and {cache / _GIB:.1f} GiB of KV cache; "
        f"{missing / _GIB:.1f} GiB of memory are missing",
        "use the ik engine, which keeps the weights quantized, or fewer slots and a shorter n_ctx",
        "out_of_memory",
    )


def _available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that can be had without swapping, or None where the system does not say."""
    try:
        text = meminfo.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable" and value.split()[:1] and value.split()[0].isdigit():
            return int(value.split()[0]) * 1024
    return None
