"""A model's tensors on a device, in the layout of the kernels, still quantized.

Invariant: every tensor of the file is used or refused by name; nothing is unpacked for good.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shared.engine.interface import Float32
from shared.kernels.device import Buffer, Device
from shared.kernels.weights import Tiles, codec_of, repack, repack_kernel
from shared.model.config import ModelConfig
from shared.model.gguf import GGUFFile, TensorInfo
from shared.model.tensors import TensorNames
from shared.quant.codecs import dequantize, has_codec

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: see `shared.engine.numpy.weights.LayerWeights` for the maths.

    qkv: the matrices of q, k and v. q_norm, k_norm: [head_dim], or None. select: float32 [n_expert, n_embd], or None
    for a dense feed-forward. gate, up, down: matrices, or stacks of them by expert.
    """

    attention_norm: Buffer
    qkv: tuple[Tiles, Tiles, Tiles]
    q_norm: Buffer | None
    k_norm: Buffer | None
    output: Tiles
    ffn_norm: Buffer
    select: Buffer | None
    gate: Tiles
    up: Tiles
    down: Tiles


@dataclass(frozen=True, slots=True)
class Weights:
    """The whole model. rope_factors: [rope.dim / 2] on the host, by which frequencies are divided, or None."""

    embedding: Tiles
    layers: tuple[LayerWeights, ...]
    output_norm: Buffer
    output: Tiles
    rope_factors: Float32 | None

    @property
    def matrices(self) -> tuple[Tiles, ...]:
        layers = [m for layer in self.layers for m in (*layer.qkv, layer.output, layer.gate, layer.up, layer.down)]
        return (self.embedding, self.output, *layers)


def device_bytes(file: GGUFFile) -> int:
    """The memory that `load_weights` takes, the largest tensor's raw copy while loading included.

    Raises:
        ModelError: a tensor's type has no codec.
    """
    largest = max(info.n_bytes for info in file.tensors.values())
    return largest + sum(
        _tiles_bytes(info) if len(info.shape) > 1 else 4 * info.n_elements for info in file.tensors.values()
    )


def _tiles_bytes(info: TensorInfo) -> int:
    k, n_rows, *stack = info.shape
    return math.prod(stack) * codec_of(info.quant, info.name).bytes_per_matrix(n_rows, k)


def load_weights(device: Device, file: GGUFFile, config: ModelConfig, progress: Progress) -> Weights:
    """Copy every tensor to the device and bring it into the kernels' layout.

    Raises:
        ModelError: a tensor is missing, has another shape or a type without a codec, or is not one of this
            architecture's.
        EngineError: the device's memory does not suffice.
    """
    _build(_Check(file), config)  # all that can be refused, before gigabytes are read
    # Together they compile more quickly than one by one.
    matrices = [info for info in file.tensors.values() if len(info.shape) > 1]
    device.prepare([repack_kernel(codec_of(info.quant, info.name)) for info in matrices])
    return _build(_Loader(device, file, progress), config)


def _build(loader: _Take, config: ModelConfig) -> Weights:
    embd, vocab = config.n_embd, config.n_vocab
    embedding = loader.matrix("token_embd", embd, vocab)
    layers = tuple(_layer(loader, config, f"blk.{layer}.") for layer in range(config.n_layer))
    output_norm = loader.vector("output_norm", embd)
    output = embedding if config.tied_output else loader.matrix("output", embd, vocab)
    factors = loader.floats("rope_freqs", config.rope.dim // 2) if config.rope.llama3 else None
    loader.finish()
    return Weights(embedding, layers, output_norm, output, factors)


def _layer(loader: _Take, config: ModelConfig, prefix: str) -> LayerWeights:
    embd, head = config.n_embd, config.head_dim
    n_q, n_k, n_v = config.n_head * head, config.n_head_kv * head, config.n_head_kv * config.value_dim
    experts = (config.n_expert,) if config.n_expert else ()
    n_ff, kind = (config.n_expert_ff, "_exps") if config.n_expert else (config.n_ff, "")
    return LayerWeights(
        attention_norm=loader.vector(f"{prefix}attn_norm", embd),
        qkv=(
            loader.matrix(f"{prefix}attn_q", embd, n_q),
            loader.matrix(f"{prefix}attn_k", embd, n_k),
            loader.matrix(f"{prefix}attn_v", embd, n_v),
        ),
        q_norm=loader.vector(f"{prefix}attn_q_norm", head) if config.qk_norm else None,
        k_norm=loader.vector(f"{prefix}attn_k_norm", head) if config.qk_norm else None,
        output=loader.matrix(f"{prefix}attn_output", config.n_head * config.value_dim, embd),
        ffn_norm=loader.vector(f"{prefix}ffn_norm", embd),
        select=loader.vector(f"{prefix}ffn_gate_inp", embd, config.n_expert) if config.n_expert else None,
        gate=loader.matrix(f"{prefix}ffn_gate{kind}", embd, n_ff, *experts),
        up=loader.matrix(f"{prefix}ffn_up{kind}", embd, n_ff, *experts),
        down=loader.matrix(f"{prefix}ffn_down{kind}", n_ff, embd, *experts),
    )


class _Take(ABC):
    """Takes tensors out of a file."""

    def __init__(self, file: GGUFFile) -> None:
        self._names = TensorNames(file, "cuda")

    @abstractmethod
    def matrix(self, name: str, *shape: int) -> Tiles:
        """A matrix, or a stack of them. shape: as in the GGUF, row length first."""

    @abstractmethod
    def vector(self, name: str, *shape: int) -> Buffer:
        """A small tensor, as float32."""

    @abstractmethod
    def floats(self, name: str, *shape: int) -> Float32:
        """A small tensor on the host, with its axes reversed to NumPy's order."""

    def finish(self) -> None:
        """Refuse tensors that were not taken."""
        self._names.finish()

    def _take(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        return self._names.take(f"{name}.weight", shape)


class _Check(_Take):
    """Loads nothing: names, shapes and types are looked at, what it returns has no memory."""

    def matrix(self, name: str, *shape: int) -> Tiles:
        info = self._take(name, shape)
        k, n_rows, *stack = shape
        nowhere = Buffer(0, (0,), np.dtype(np.uint8), None)
        return Tiles(nowhere, codec_of(info.quant, info.name), n_rows, k, math.prod(stack))

    def vector(self, name: str, *shape: int) -> Buffer:
        self.floats(name, *shape)
        return Buffer(0, (0,), np.dtype(np.float32), None)

    def floats(self, name: str, *shape: int) -> Float32:
        info = self._take(name, shape)
        if not has_codec(info.quant):
            dequantize(np.empty(0, np.uint8), info.quant, info.name)
        return np.empty(0, np.float32)


class _Loader(_Take):
    """Copies tensors to a device."""

    def __init__(self, device: Device, file: GGUFFile, progress: Progress) -> None:
        super().__init__(file)
        self._file = file
        self._device = device
        self._progress = progress
        self._total = sum(info.n_bytes for info in file.tensors.values())
        self._done = 0
        # Raw blocks of one tensor at a time.
        self._source = device.empty((max(info.n_bytes for info in file.tensors.values()),), np.uint8)

    def matrix(self, name: str, *shape: int) -> Tiles:
        info = self._take(name, shape)
        k, n_rows, *stack = shape
        codec = codec_of(info.quant, info.name)
        tiles = Tiles(self._device.empty((_tiles_bytes(info),), np.uint8), codec, n_rows, k, math.prod(stack))
        source = self._source.view(0, (info.n_bytes,))
        self._device.write(source, np.ascontiguousarray(self._file.raw(info.name)))
        repack(self._device, source, info.quant, tiles)
        self._advance(info)
        return tiles

    def vector(self, name: str, *shape: int) -> Buffer:
        values = self.floats(name, *shape)
        buffer = self._device.empty(values.shape, np.float32)
        self._device.write(buffer, values)
        return buffer

    def floats(self, name: str, *shape: int) -> Float32:
        info = self._take(name, shape)
        values = dequantize(self._file.raw(info.name), info.quant, info.name).reshape(shape[::-1])
        self._advance(info)
        return values

    def _advance(self, info: TensorInfo) -> None:
        self._done += info.n_bytes
        self._progress(self._done, self._total)


class LoadingLog:
    """Reports progress at most every few seconds, and at the end.

    Args:
        report: called with the share done (0 to 1) and GiB per second.
    """

    def __init__(self, report: Callable[[float, float], None], every: float = 2.0) -> None:
        self._report = report
        self._every = every
        self._started = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= self._every or done == total:
            self._last = now
            self._report(done / total, done / max(now - self._started, 1e-9) / (1 << 30))
