"""Launching head.cu: the largest logits of each row, and log(sum(exp(logits))).

`step` and `max_rows`: as in norm.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from shared.kernels.device import Buffer, Device

TOP = 128
"""How many of a row's largest logits are selected."""

_CHUNK = 4096
_CHUNK_THREADS = 256
_CHUNK_SHARED_BYTES = 256
_MERGE_THREADS = 512
_MERGE_SHARED_BYTES = 512 + 8 * TOP
_GATHER_THREADS = 256


@dataclass(frozen=True, slots=True)
class Chunks:
    """What `top_chunks` leaves for `top_merge`.

    candidates: [rows, n_chunks, TOP] uint64. peaks: [rows, n_chunks] float32. sums: [rows, n_chunks] float64.
    """

    candidates: Buffer
    peaks: Buffer
    sums: Buffer

    @classmethod
    def empty(cls, device: Device, rows: int, n_vocab: int) -> Chunks:
        n_chunks = ceil(n_vocab / _CHUNK)
        return cls(
            candidates=device.empty((rows, n_chunks, TOP), "uint64"),
            peaks=device.empty((rows, n_chunks), "float32"),
            sums=device.empty((rows, n_chunks), "float64"),
        )


def top_chunks(device: Device, step: Buffer, logits: Buffer, out: Chunks, max_rows: int) -> None:
    """The first half: each chunk of the first step[1] rows of logits [rows, n_vocab] float32."""
    n_vocab = logits.shape[1]
    device.launch(
        device.kernel("head.cu", "top_chunks"),
        (ceil(n_vocab / _CHUNK), max_rows),
        _CHUNK_THREADS,
        [step, logits, n_vocab, out.candidates, out.peaks, out.sums],
        _CHUNK_SHARED_BYTES,
    )


def top_merge_name(n_vocab: int) -> str:
    """The instance of `top_merge` for a vocabulary."""
    return f"top_merge<{ceil(ceil(n_vocab / _CHUNK) * TOP / _MERGE_THREADS)}>"


def top_merge(
    device: Device,
    step: Buffer,
    n_vocab: int,
    chunks: Chunks,
    ids: Buffer,
    values: Buffer,
    log_sums: Buffer,
    max_rows: int,
) -> None:
    """The second half: each row's TOP largest logits, by descending logit and then ascending id.

    Args:
        ids: [rows, TOP] int32, -1 beyond the vocabulary. values: [rows, TOP] float32, -infinity there.
        log_sums: [rows] float64.
    """
    device.launch(
        device.kernel("head.cu", top_merge_name(n_vocab)),
        (max_rows,),
        _MERGE_THREADS,
        [step, n_vocab, chunks.candidates, chunks.peaks, chunks.sums, ids, values, log_sums],
        _MERGE_SHARED_BYTES,
    )


def gather_logits(device: Device, logits: Buffer, row: int, ids: Buffer, out: Buffer) -> None:
    """out [n] float32 = the logits of one row of logits [rows, n_vocab] at ids [n] int32."""
    device.launch(
        device.kernel("head.cu", "gather_logits"),
        (ceil(ids.size / _GATHER_THREADS),),
        _GATHER_THREADS,
        [logits, logits.shape[1], row, ids, ids.size, out],
    )
