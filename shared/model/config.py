"""What a model is: dimensions and variants, from a GGUF's metadata, for the architectures that our engines compute.

Invariant: a `ModelConfig` is consistent (every dimension positive, heads divisible, experts used <= experts); what the
code cannot compute faithfully is refused here with the remedy, never approximated. A new architecture is one entry in
`_ARCHITECTURES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final

import numpy as np

from shared.errors import ModelError
from shared.model.gguf import GGUFFile

_USE_IK: Final = "use the ik engine"


class RopeStyle(Enum):
    """Which elements of a head are rotated together.

    NEOX: i and i + rope_dim / 2. NORM: 2 i and 2 i + 1 (the converter permutes the q and k weights for it).
    """

    NEOX = "neox"
    NORM = "norm"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    base: of the frequencies base ** (-2 i / dim).
    dim: how many leading elements of each head are rotated; even.
    scale: positions are multiplied by it (1 / factor of linear scaling).
    llama3: frequencies are divided by the tensor rope_freqs.weight [dim / 2].
    """

    style: RopeStyle
    base: float
    dim: int
    scale: float
    llama3: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Dimensions and variants of a decoder-only transformer.

    context_length: the longest sequence it was trained for.
    n_embd: width of the residual stream. n_layer: its blocks.
    n_head, n_head_kv: attention heads of q, and of k and v. head_dim: of q and k; value_dim: of v.
    n_ff: width of a dense feed-forward. rms_eps: added to the mean square in RMSNorm.
    qk_norm: RMSNorm over each head of q and k before the rotation.
    n_expert: 0 for a dense model. n_expert_used: of them per token. n_expert_ff: width of an expert.
    norm_topk_prob: the chosen experts' softmax weights are divided by their sum; expert_scale multiplies them then.
    tied_output: the output matrix is the embedding matrix.
    """

    architecture: str
    n_vocab: int
    context_length: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    value_dim: int
    n_ff: int
    rms_eps: float
    rope: RopeConfig
    qk_norm: bool
    n_expert: int
    n_expert_used: int
    n_expert_ff: int
    norm_topk_prob: bool
    expert_scale: float
    tied_output: bool

    @classmethod
    def read(cls, file: GGUFFile) -> ModelConfig:
        """The configuration of an open GGUF.

        Raises:
            ModelError: the architecture or a variant of it is not supported (codes unsupported_architecture,
                unsupported_variant), or the metadata is missing or contradicts itself (bad_metadata).
        """
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelError(
                f"{file.path} does not say its architecture (general.architecture)",
                "give the first part of a split model, or convert the model again",
                "bad_metadata",
            )
        traits = _ARCHITECTURES.get(architecture)
        if traits is None:
            raise ModelError(
                f"{file.path} has architecture {architecture!r}; this engine computes {', '.join(_ARCHITECTURES)}",
                _USE_IK,
                "unsupported_architecture",
            )
        return _read(_Reader(file, architecture), traits)


@dataclass(frozen=True, slots=True)
class _Traits:
    """What the name of an architecture implies."""

    rope_style: RopeStyle
    qk_norm: bool
    # Whether the model has experts: always, never, or when the metadata counts some.
    experts: bool | None


_ARCHITECTURES: Final[Mapping[str, _Traits]] = MappingProxyType(
    {
        "qwen3moe": _Traits(RopeStyle.NEOX, qk_norm=True, experts=True),
        "qwen3": _Traits(RopeStyle.NEOX, qk_norm=True, experts=False),
        "llama": _Traits(RopeStyle.NORM, qk_norm=False, experts=None),
    }
)

SUPPORTED_ARCHITECTURES: Final = tuple(_ARCHITECTURES)


class _Reader:
    """Typed access to one architecture's metadata."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 31) -> int:
        full = f"{self.architecture}.{key}"
        value = self.file.metadata.get(full, default)
        if value is None:
            raise self.bad(f"lacks the metadata {full}")
        if isinstance(value, np.ndarray):
            # One value per layer: fine when they are all the same.
            if value.dtype.kind not in "iu" or not len(value) or (value != value[0]).any():
                raise self.unsupported(f"{full} differs from layer to layer")
            value = int(value[0])
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(f"has {full} = {value!r}, not an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        full = f"{self.architecture}.{key}"
        value = self.file.metadata.get(full, default)
        if value is None:
            raise self.bad(f"lacks the metadata {full}")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise self.bad(f"has {full} = {value!r}, not a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        full = f"{self.architecture}.{key}"
        value = self.file.metadata.get(full, default)
        if not isinstance(value, bool):
            raise self.bad(f"has {full} = {value!r}, not a boolean")
        return value

    def text(self, key: str, default: str) -> str:
        full = f"{self.architecture}.{key}"
        value = self.file.metadata.get(full, default)
        if not isinstance(value, str):
            raise self.bad(f"has {full} = {value!r}, not a string")
        return value

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.metadata

    def bad(self, message: str) -> ModelError:
        return ModelError(f"{self.file.path} {message}", "convert the model again", "bad_metadata")

    def unsupported(self, message: str) -> ModelError:
        return ModelError(
            f"{self.file.path}: {message}, which this engine cannot compute", _USE_IK, "unsupported_variant"
        )


def _read(reader: _Reader, traits: _Traits) -> ModelConfig:
    n_embd = reader.integer("embedding_length")
    n_head = reader.integer("attention.head_count")
    n_head_kv = reader.integer("attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        raise reader.bad(f"has {n_head} heads, no multiple of its {n_head_kv} key-value heads")
    if n_embd % n_head and not reader.has("attention.key_length"):
        raise reader.bad(f"has width {n_embd}, no multiple of its {n_head} heads")
    head_dim = reader.integer("attention.key_length", max(1, n_embd // n_head))
    experts = traits.experts
    n_expert = 0 if experts is False else reader.integer("expert_count", 0 if experts is None else None, low=0)
    if experts and not n_expert:
        raise reader.bad("has no experts, although its architecture is a mixture of experts")
    n_expert_used = reader.integer("expert_used_count", high=n_expert) if n_expert else 0
    # 1 is softmax, the only one that these architectures are known to use; 0 is "not said".
    if reader.integer("expert_gating_func", 1, low=0) > 1:
        raise reader.unsupported("its experts are not selected by a softmax")
    n_ff = reader.integer("feed_forward_length", 1 if n_expert else None)
    return ModelConfig(
        architecture=reader.architecture,
        n_vocab=_vocabulary_size(reader),
        context_length=reader.integer("context_length"),
        n_embd=n_embd,
        n_layer=reader.integer("block_count", high=1 << 16),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        value_dim=reader.integer("attention.value_length", head_dim),
        n_ff=n_ff,
        rms_eps=reader.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(reader, traits, head_dim),
        qk_norm=traits.qk_norm,
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        n_expert_ff=reader.integer("expert_feed_forward_length", n_ff) if n_expert else 0,
        norm_topk_prob=reader.flag("expert_weights_norm", True),
        expert_scale=reader.number("expert_weights_scale", 1.0),
        tied_output="output.weight" not in reader.file.tensors,
    )


def _rope(reader: _Reader, traits: _Traits, head_dim: int) -> RopeConfig:
    dim = reader.integer("rope.dimension_count", head_dim, high=head_dim)
    if dim % 2:
        raise reader.bad(f"rotates {dim} elements of each head, an odd number")
    factor = reader.number("rope.scale_linear", 1.0)
    kind = reader.text("rope.scaling.type", "linear" if factor != 1.0 else "none")
    if kind == "linear":
        factor = reader.number("rope.scaling.factor", factor)
    elif kind == "none":
        factor = 1.0
    else:
        raise reader.unsupported(f"its positions are scaled by {kind!r}")
    return RopeConfig(
        style=traits.rope_style,
        base=reader.number("rope.freq_base", 10000.0),
        dim=dim,
        scale=1.0 / factor,
        llama3="rope_freqs.weight" in reader.file.tensors,
    )


def _vocabulary_size(reader: _Reader) -> int:
    """The rows of the embedding matrix, which the metadata must not contradict."""
    embedding = reader.file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise reader.bad("lacks the matrix token_embd.weight")
    n_vocab = embedding.shape[1]
    if reader.integer("vocab_size", n_vocab) != n_vocab:
        raise reader.bad(f"has {n_vocab} rows in token_embd.weight, but says vocab_size {reader.integer('vocab_size')}")
    return n_vocab
