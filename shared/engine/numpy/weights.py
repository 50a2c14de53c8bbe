"""A GGUF's tensors as float32 matrices, arranged as the numpy engine reads them.

Invariant: every tensor of the file is used, with the shape that the configuration implies; a file with a tensor that
the engine would ignore is refused, since its results would be wrong without a sign of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.engine.interface import Float32
from shared.model.config import ModelConfig
from shared.model.gguf import GGUFFile
from shared.model.tensors import TensorNames
from shared.quant.codecs import dequantize


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block. All arrays are float32, C-contiguous; matrices are [outputs, inputs].

    qkv: [n_head * head_dim + n_head_kv * (head_dim + value_dim), n_embd]: q, k and v stacked.
    q_norm, k_norm: [head_dim], or None where the architecture has none.
    output: [n_embd, n_head * value_dim].
    select: [n_expert, n_embd] of a mixture of experts, None of a dense model.
    gate_up, down: [n_expert, 2 * n_expert_ff, n_embd] (gate first) and [n_expert, n_embd, n_expert_ff];
        of a dense model [2 * n_ff, n_embd] and [n_embd, n_ff].
    """

    attention_norm: Float32
    qkv: Float32
    q_norm: Float32 | None
    k_norm: Float32 | None
    output: Float32
    ffn_norm: Float32
    select: Float32 | None
    gate_up: Float32
    down: Float32


@dataclass(frozen=True, slots=True)
class Weights:
    """The whole model.

    embedding: [n_vocab, n_embd]. output: [n_vocab, n_embd], the same array when tied. output_norm: [n_embd].
    rope_factors: [rope.dim / 2], by which frequencies are divided, or None.
    """

    embedding: Float32
    layers: tuple[LayerWeights, ...]
    output_norm: Float32
    output: Float32
    rope_factors: Float32 | None

    @property
    def matrices(self) -> tuple[Float32, ...]:
        """One matrix of every shape that `linear` is called with."""
        shapes: dict[tuple[int, ...], Float32] = {}
        candidates = [self.output]
        for layer in self.layers:
            candidates += [layer.qkv, layer.output, *_matrix(layer.gate_up), *_matrix(layer.down)]
            if layer.select is not None:
                candidates.append(layer.select)
        for matrix in candidates:
            shapes.setdefault(matrix.shape, matrix)
        return tuple(shapes.values())


def float32_bytes(file: GGUFFile) -> int:
    """The memory that `load_weights` fills."""
    return 4 * sum(info.n_elements for info in file.tensors.values())


def load_weights(file: GGUFFile, config: ModelConfig) -> Weights:
    """Dequantize every tensor.

    Raises:
        ModelError: a tensor is missing, has another shape or a type without a NumPy codec, or is not one of this
            architecture's.
    """
    loader = _Loader(file)
    embd, vocab = config.n_embd, config.n_vocab
    embedding = loader.take("token_embd.weight", (embd, vocab))
    layers = tuple(_layer(loader, config, f"blk.{layer}.") for layer in range(config.n_layer))
    output_norm = loader.take("output_norm.weight", (embd,))
    output = embedding if config.tied_output else loader.take("output.weight", (embd, vocab))
    factors = loader.take("rope_freqs.weight", (config.rope.dim // 2,)) if config.rope.llama3 else None
    loader.finish()
    return Weights(embedding, layers, output_norm, output, factors)


def _layer(loader: _Loader, config: ModelConfig, prefix: str) -> LayerWeights:
    embd, head = config.n_embd, config.head_dim
    n_q, n_k, n_v = config.n_head * head, config.n_head_kv * head, config.n_head_kv * config.value_dim

    def take(name: str, *shape: int) -> Float32:
        return loader.take(f"{prefix}{name}.weight", shape)

    qkv = np.concatenate([take("attn_q", embd, n_q), take("attn_k", embd, n_k), take("attn_v", embd, n_v)])
    if config.n_expert:
        n, ff = config.n_expert, config.n_expert_ff
        select = take("ffn_gate_inp", embd, n)
        gate_up = np.concatenate([take("ffn_gate_exps", embd, ff, n), take("ffn_up_exps", embd, ff, n)], axis=1)
        down = take("ffn_down_exps", ff, embd, n)
    else:
        select = None
        gate_up = np.concatenate([take("ffn_gate", embd, config.n_ff), take("ffn_up", embd, config.n_ff)])
        down = take("ffn_down", config.n_ff, embd)
    return LayerWeights(
        attention_norm=take("attn_norm", embd),
        qkv=qkv,
        q_norm=take("attn_q_norm", head) if config.qk_norm else None,
        k_norm=take("attn_k_norm", head) if config.qk_norm else None,
        output=take("attn_output", config.n_head * config.value_dim, embd),
        ffn_norm=take("ffn_norm", embd),
        select=select,
        gate_up=gate_up,
        down=down,
    )


class _Loader:
    """Takes tensors out of a file, dequantized."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._names = TensorNames(file, "numpy")

    def take(self, name: str, shape: tuple[int, ...]) -> Float32:
        """The tensor with its axes reversed to NumPy's order. shape: as in the GGUF, row length first."""
        info = self._names.take(name, shape)
        return dequantize(self._file.raw(name), info.quant, name).reshape(shape[::-1])

    def finish(self) -> None:
        """Refuse tensors that were not taken."""
        self._names.finish()


def _matrix(weights: Float32) -> tuple[Float32, ...]:
    """The matrix itself, or the first of a stack."""
    return (weights,) if weights.ndim == 2 else (weights[0],)
