"""A model's tensors on devices, in the layout of the kernels, still quantized.

Invariant: every tensor of the file is used or refused by name; nothing is unpacked for good.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shared.engine.cuda.placement import ModelBytes
from shared.engine.interface import Float32
from shared.kernels.device import Buffer, Device
from shared.kernels.weights import Tiles, codec_of, repack, repack_kernel
from shared.model.config import ModelConfig
from shared.model.gguf import GGUFFile, TensorInfo
from shared.model.tensors import TensorNames
from shared.quant.codecs import dequantize, has_codec

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the name of the device that is being loaded."""

_EMBEDDING = "token_embd.weight"


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
class OutputWeights:
    """What turns the residual stream into logits."""

    norm: Buffer
    matrix: Tiles


@dataclass(frozen=True, slots=True)
class Weights:
    """What a device has of a model: consecutive layers, the embedding on the first device, the output on the last one.

    rope_factors: [rope.dim / 2] on the host, by which frequencies are divided, or None.
    """

    embedding: Tiles | None
    layers: tuple[LayerWeights, ...]
    output: OutputWeights | None
    rope_factors: Float32 | None


def measure_weights(file: GGUFFile, config: ModelConfig) -> ModelBytes:
    """The memory that `load_weights` takes, a raw copy of the largest tensor while loading included.

    Raises:
        ModelError: a tensor is missing, has another shape or a type without a codec, or is not one of this
            architecture's: all that can be refused, before gigabytes are read.
    """
    check = _Check(file)
    _build(check, config, range(config.n_layer), _rope_factors(check, config))
    check.finish()
    embedding = output = 0
    layers = [0] * config.n_layer
    for info in file.tensors.values():
        n_bytes = _tiles_bytes(info) if len(info.shape) > 1 else 4 * info.n_elements
        if info.name == _EMBEDDING:
            embedding = n_bytes
        elif info.name.startswith("blk."):
            layers[int(info.name.split(".")[1])] += n_bytes
        else:
            output += n_bytes
    largest = max(info.n_bytes for info in file.tensors.values())
    return ModelBytes(embedding, tuple(layers), output, config.tied_output, largest)


def _tiles_bytes(info: TensorInfo) -> int:
    k, n_rows, *stack = info.shape
    return math.prod(stack) * codec_of(info.quant, info.name).bytes_per_matrix(n_rows, k)


def load_weights(
    devices: Sequence[Device], shares: Sequence[range], file: GGUFFile, config: ModelConfig, progress: Progress
) -> list[Weights]:
    """Copy each device's share of the layers, and what is beside it, there, and bring it into the kernels' layout.

    Args:
        file: one that `measure_weights` accepts.

    Raises:
        EngineError: a device's memory does not suffice.
    """
    # Together they compile more quickly than one by one.
    matrices = [info for info in file.tensors.values() if len(info.shape) > 1]
    kernels = [repack_kernel(codec_of(info.quant, info.name)) for info in matrices]
    total = sum(info.n_bytes for info in file.tensors.values())
    if config.tied_output and len(devices) > 1:
        total += file.tensors[_EMBEDDING].n_bytes
    loader = _Loader(file, total, progress)
    weights: list[Weights] = []
    for device, layers in zip(devices, shares, strict=True):
        device.prepare(kernels)
        loader.use(device)
        factors = weights[0].rope_factors if weights else _rope_factors(loader, config)
        weights.append(_build(loader, config, layers, factors))
    return weights


def _rope_factors(loader: _Take, config: ModelConfig) -> Float32 | None:
    return loader.floats("rope_freqs", config.rope.dim // 2) if config.rope.llama3 else None


def _build(loader: _Take, config: ModelConfig, layers: range, factors: Float32 | None) -> Weights:
    """The share of the device that has these layers."""
    embd, vocab = config.n_embd, config.n_vocab
    embedding = loader.matrix("token_embd", embd, vocab) if layers.start == 0 else None
    loaded = tuple(_layer(loader, config, f"blk.{layer}.") for layer in layers)
    output = None
    if layers.stop == config.n_layer:
        norm = loader.vector("output_norm", embd)
        if not config.tied_output:
            output = OutputWeights(norm, loader.matrix("output", embd, vocab))
        else:
            output = OutputWeights(norm, embedding or loader.matrix("token_embd", embd, vocab))
    return Weights(embedding, loaded, output, factors)


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
    """Copies tensors to the device that it is told to use. total: bytes to copy in all."""

    def __init__(self, file: GGUFFile, total: int, progress: Progress) -> None:
        super().__init__(file)
        self._file = file
        self._progress = progress
        self._total = total
        self._done = 0

    def use(self, device: Device) -> None:
        self._device = device
        # Raw blocks of one tensor at a time.
        self._source = device.empty((max(info.n_bytes for info in self._file.tensors.values()),), np.uint8)

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
        self._progress(self._done, self._total, self._device.name)


class LoadingLog:
    """Reports progress at most every few seconds, and at the end.

    Args:
        report: called with the share done (0 to 1), GiB per second, and the device's name.
    """

    def __init__(self, report: Callable[[float, float, str], None], every: float = 2.0) -> None:
        self._report = report
        self._every = every
        self._started = self._last = time.monotonic()

    def __call__(self, done: int, total: int, device: str) -> None:
        now = time.monotonic()
        if now - self._last >= self._every or done == total:
            self._last = now
            self._report(done / total, done / max(now - self._started, 1e-9) / (1 << 30), device)
