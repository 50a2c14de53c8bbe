"""The engine interface: ragged batches of sequences in, logits out; rollback by starting at an earlier position.

An engine owns `n_slots` KV caches ("slots"), each holding one sequence of up to `n_ctx` tokens, and computes one
forward pass at a time. It is single-threaded: one thread creates it and calls it. Which session sits in which slot,
and what to do with a slot's cached prefix, is the caller's business (`shared/engine/slots.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from shared.fields import Range
from shared.sampling.params import SamplingParams

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Pace:
    """What a machine takes for the passes of one model; 0: not given. How a pass's cost follows: `emulated.py`.

    first_row_ms: a pass of one row. further_row_ms: each further row of the same pass.
    prefill_per_second: tokens of prompts, whose rows are not wanted.
    """

    first_row_ms: Annotated[float, Range(0, 30_000)] = 0.0
    further_row_ms: Annotated[float, Range(0, 30_000)] = 0.0
    prefill_per_second: Annotated[float, Range(0, 1_000_000)] = 0.0


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to build an engine.

    engine: "auto" (ik where installed, else numpy), "ik", "numpy", "cuda"; for benchmarks of the pipeline "null" or
        "emulated".
    model: path of a GGUF (the first file of a split one), or "embedded:target" / "embedded:draft".
    n_ctx: tokens per slot; 0 takes the model's own context length, at most 4096.
    n_slots: sequences held at a time.
    n_batch: most rows of one forward pass.
    threads: CPU threads; 0 takes half of the cores, at most 8, so that a target and a draft fit on one machine.
    flash_attention: off by default: with it, ik's logits depend on the batch.
    cache_type_k, cache_type_v: KV cache types, "f16", "q8_0" or "q4_0" (a quantized V needs flash attention).
    n_gpu_layers, n_cpu_moe, override_tensors ("regex=CPU"): as in llama-server, for CUDA builds of ik.
    devices: GPUs by index, for the cuda engine: the model's layers in this order.
    kv_pages: pages of 64 tokens in the cuda engine's KV pool; 0: enough for n_slots full contexts.
    inner: the engine that computes inside the emulated one; all other settings are for it too.
    profile: whose speed is emulated, by name. role: of the profile's two models. pace: numbers in the profile's place.
    """

    engine: str = "auto"
    model: str = "embedded:target"
    n_ctx: int = 0
    n_slots: int = 4
    n_batch: int = 512
    threads: int = 0
    flash_attention: bool = False
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    n_gpu_layers: int = 0
    n_cpu_moe: int = 0
    override_tensors: tuple[str, ...] = field(default=())
    devices: tuple[int, ...] = (0,)
    kv_pages: int = 0
    inner: str = "auto"
    profile: str = ""
    role: Literal["target", "draft"] = "target"
    pace: Pace = field(default=Pace())

    @property
    def computing(self) -> str:
        """The engine that computes: of an emulated one the one inside."""
        return self.inner if self.engine == "emulated" else self.engine


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine runs and promises.

    vocab_fingerprint: see `shared.model.gguf.vocabulary_fingerprint`; draft and target must agree.
    row_invariant: a row's logits are bitwise the same alone and in any batch (docs/sampling.md).
    quant: the name of the model's quantization recipe ("Q4_K_M"); empty without a model.
    """

    engine: str
    model: str
    architecture: str
    n_vocab: int
    n_ctx: int
    n_slots: int
    n_batch: int
    vocab_fingerprint: str
    row_invariant: bool
    quant: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one slot's sequence in a forward pass.

    start: position of tokens[0]; at most the slot's length. What the slot holds at `start` and after is dropped
        first, so a rollback is a chunk that starts earlier.
    tokens: [n] int32, n >= 1.
    rows: how many of the last tokens' logits are wanted, 0 <= rows <= n.
    """

    slot: int
    start: int
    tokens: Int32
    rows: int


class Logits(Protocol):
    """The wanted rows of one forward pass, in the order of chunks and of tokens in a chunk.

    Valid until the engine's next call. `top` breaks ties by the lower token id and sorts by descending logit.
    """

    @property
    def n_rows(self) -> int: ...

    @property
    def n_vocab(self) -> int: ...

    def top(self, k: int) -> tuple[Int32, Float32]:
        """The k largest logits of every row: ids [n_rows, k] int32, logits [n_rows, k] float32."""

    def log_sum_exp(self) -> npt.NDArray[np.float64]:
        """log(sum(exp(logits))) over the whole vocabulary: [n_rows] float64. Each row's value depends on it alone."""

    def gather(self, row: int, ids: Int32) -> Float32:
        """The logits of the given token ids in one row: [len(ids)] float32."""

    def dense(self, row: int) -> Float32:
        """One whole row: [n_vocab] float32, a view that must not be written to."""


class Engine(Protocol):
    """See the module's docstring. Errors: `EngineError` for a batch that breaks the rules below."""

    @property
    def info(self) -> EngineInfo: ...

    def forward(self, chunks: Sequence[Chunk]) -> Logits:
        """One forward pass. At most one chunk per slot; at most `n_batch` tokens in all."""

    def length(self, slot: int) -> int:
        """How many tokens the slot's cache holds."""

    def truncate(self, slot: int, length: int) -> None:
        """Drop what the slot holds at `length` and after; 0 clears it."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Make slot `target` hold the first `length` tokens of slot `source`, without computing them."""

    def close(self) -> None:
        """Free the model and the caches; the engine must not be used afterwards."""


@dataclass(frozen=True, slots=True)
class Proposed:
    """What `Proposer.propose` chose, for every chunk in its order.

    tokens: [chunks, n] int32. confidences: [chunks, n] float32, the engine's own probability of each token: filtered
        and tempered; for greedy, unfiltered at T = 1.
    """

    tokens: Int32
    confidences: Float32


@runtime_checkable
class Proposer(Protocol):
    """An engine that also chooses tokens itself, for drafting: without a round trip to the host for every token."""

    @property
    def max_proposals(self) -> int:
        """Most tokens of one call."""

    def can_propose(self, params: SamplingParams) -> bool:
        """Whether tokens are chosen as these parameters want."""

    def propose(self, chunks: Sequence[Chunk], params: Sequence[SamplingParams], n: int) -> Proposed:
        """Feed each chunk, which wants one row, and then n times choose a token and, but for the last, feed it.

        A slot holds its chunk and n - 1 tokens more afterwards. Choices are coupled or greedy, over the leaders of
        each row: they may differ from those over whole rows, which can cost a proposal, never a token.
        """


@runtime_checkable
class PrefixCache(Protocol):
    """An engine that remembers prefixes beyond what its slots hold now."""

    def reuse_prefix(self, slot: int, tokens: Int32) -> int:
        """Let a slot hold as much of a prompt as is to be had without computing, and nothing else.

        That is the longest prefix of tokens[:-1] that the slot holds, or a longer one that the engine remembers.

        Args:
            tokens: [n] int32, n >= 1.

        Returns:
            The slot's length now, at most n - 1.

        Raises:
            EngineError: there is no such slot (code bad_slot), or no token (empty_chunk); nothing is changed then.
        """
