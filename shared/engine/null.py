"""An engine without a model, which takes no time: for tests and for measuring the pipeline around an engine.

After token t at position p the largest logit is at a pseudo-random id that depends on t and p alone, so a null draft
and a null target always agree. Ids below `FIRST_ID` never win, so no generation ends by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.engine.interface import Chunk, EngineInfo, EngineSettings, Float32, Int32
from shared.engine.slots import check_chunks, check_prefix
from shared.errors import EngineError

FIRST_ID = 16
PEAK = np.float32(32.0)
NEVER = np.float32(-1000.0)


def next_token(token: int, position: int, n_vocab: int) -> int:
    """The id with the largest logit after `token` at `position`; FIRST_ID <= id < n_vocab."""
    x = (token * 0x9E3779B1 + position * 0x85EBCA77 + 0x165667B1) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    x ^= x >> 13
    return FIRST_ID + x % (n_vocab - FIRST_ID)


class NullLogits:
    """`Logits` that are known by their peaks: PEAK there, NEVER below FIRST_ID, 0 elsewhere.

    Args:
        peaks: the winning id of every row, each FIRST_ID <= id < n_vocab.
    """

    def __init__(self, peaks: list[int], n_vocab: int) -> None:
        self._peaks = peaks
        self._n_vocab = n_vocab

    @property
    def n_rows(self) -> int:
        return len(self._peaks)

    @property
    def n_vocab(self) -> int:
        return self._n_vocab

    def top(self, k: int) -> tuple[Int32, Float32]:
        n_vocab = self._n_vocab
        k = min(k, n_vocab)
        ids = np.empty((len(self._peaks), k), np.int32)
        logits = np.zeros((len(self._peaks), k), np.float32)
        others = np.concatenate([np.arange(FIRST_ID, n_vocab), np.arange(FIRST_ID)]) if k > 1 else None
        for row, peak in enumerate(self._peaks):
            ids[row, 0] = peak
            if others is not None:
                before = min(peak - FIRST_ID, k - 1)
                ids[row, 1 : 1 + before] = others[:before]
                ids[row, 1 + before :] = others[before + 1 : k]
        logits[:, 0] = PEAK
        logits[:, n_vocab - FIRST_ID :] = NEVER
        return ids, logits

    def log_sum_exp(self) -> npt.NDArray[np.float64]:
        rest = (self._n_vocab - FIRST_ID - 1) * np.exp(-float(PEAK))
        return np.full(len(self._peaks), float(PEAK) + np.log1p(rest), np.float64)

    def gather(self, row: int, ids: Int32) -> Float32:
        logits = np.zeros(len(ids), np.float32)
        logits[ids < FIRST_ID] = NEVER
        logits[ids == self._peaks[row]] = PEAK
        return logits

    def dense(self, row: int) -> Float32:
        logits = np.zeros(self._n_vocab, np.float32)
        logits[:FIRST_ID] = NEVER
        logits[self._peaks[row]] = PEAK
        return logits


class NullEngine:
    """See the module's docstring.

    Args:
        settings: n_ctx (0 takes 4096), n_slots and n_batch count; the rest is ignored.
        n_vocab: size of the vocabulary, more than FIRST_ID.
    """

    def __init__(self, settings: EngineSettings, n_vocab: int = 8192) -> None:
        if n_vocab <= FIRST_ID:
            raise EngineError(f"a null engine's vocabulary needs more than {FIRST_ID} entries, not {n_vocab}")
        if settings.n_slots < 1 or settings.n_batch < 1 or settings.n_ctx < 0:
            raise EngineError(
                f"n_slots {settings.n_slots}, n_batch {settings.n_batch}, n_ctx {settings.n_ctx}: too small",
                "n_slots and n_batch start at 1, n_ctx at 0",
                "bad_settings",
            )
        self._info = EngineInfo(
            engine="null",
            model="null",
            architecture="null",
            n_vocab=n_vocab,
            n_ctx=settings.n_ctx or 4096,
            n_slots=settings.n_slots,
            n_batch=settings.n_batch,
            vocab_fingerprint=f"null:{n_vocab}",
            row_invariant=True,
        )
        self._lengths = [0] * settings.n_slots

    @property
    def info(self) -> EngineInfo:
        return self._info

    def forward(self, chunks: Sequence[Chunk]) -> NullLogits:
        n_vocab, lengths = self._info.n_vocab, self._lengths
        check_chunks(chunks, lengths, self._info.n_ctx, self._info.n_batch)
        peaks: list[int] = []
        for chunk in chunks:
            tokens = chunk.tokens.tolist()
            if min(tokens) < 0 or max(tokens) >= n_vocab:
                raise EngineError(
                    f"slot {chunk.slot}: a token is outside the vocabulary of {n_vocab}", code="bad_token"
                )
            position = chunk.start + len(tokens) - chunk.rows
            for token in tokens[len(tokens) - chunk.rows :]:
                peaks.append(next_token(token, position, n_vocab))
                position += 1
        for chunk in chunks:
            lengths[chunk.slot] = chunk.start + len(chunk.tokens)
        return NullLogits(peaks, n_vocab)

    def length(self, slot: int) -> int:
        check_prefix(self._lengths, slot, 0)
        return self._lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        check_prefix(self._lengths, slot, length)
        self._lengths[slot] = length

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        check_prefix(self._lengths, source, length)
        check_prefix(self._lengths, target, 0)
        self._lengths[target] = length

    def close(self) -> None:
        self._lengths = []
