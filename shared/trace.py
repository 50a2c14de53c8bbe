"""What this process did when: marks on its monotonic clock, for `draftwire trace` and `draftwire bench loopback`.

Always on. The last 65,536 marks are kept, in 3.4 MB that are taken up as they fill; a mark takes about half a
microsecond (docs/trace.md), from any thread. A mark holds numbers alone: a session's id, positions and counts, nothing
of what is read or written. Invariant: memory is bounded, and what is recorded never fails and never waits.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from time import monotonic_ns
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shared.clock import clock_id
from shared.messages import MAX_MARKS, GetTrace, Trace

CAPACITY: Final = 1 << 16
_BENCH_CAPACITY: Final = 1 << 21

NUMBERS: Final = 3
"""A mark's own, beside session and position."""

MARKS: Final[dict[str, tuple[str, ...]]] = {
    "gateway.request": ("prompt",),
    "gateway.read": (),
    "gateway.encode": ("prompt",),
    "gateway.generate": ("prompt",),
    "gateway.first_token": (),
    "gateway.tokens": ("tokens", "accepted"),
    "gateway.detokenize": ("tokens",),
    "gateway.finished": (),
    "tokenizer.encode": ("characters", "tokens"),
    "tokenizer.decode": ("tokens",),
    "router.generate": ("prompt",),
    "router.assign": ("tokens",),
    "router.proposal": ("tokens",),
    "router.commit": ("tokens", "accepted"),
    "draft.opened": ("prompt", "cached"),
    "draft.prefill": ("read", "drafted"),
    "draft.draft": ("read", "drafted"),
    "draft.proposal": ("tokens",),
    "draft.commit": ("tokens", "accepted"),
    "draft.keep": ("tokens",),
    "draft.rollback": ("tokens", "rolled_back"),
    "verifier.open": ("prompt",),
    "verifier.queue": ("prompt", "cached"),
    "verifier.proposal": ("tokens",),
    "verifier.wait": (),
    "verifier.step": (),
    "verifier.prefill": ("tokens", "rows"),
    "verifier.round": ("proposals", "accepted", "rows"),
    "verifier.forward": ("rows", "sessions"),
    "verifier.ask": ("rows",),
    "verifier.asked": (),
    "verifier.commit": ("tokens", "accepted"),
    "sampler.decide": ("sessions", "rows_needed"),
    "sampler.verdict": ("proposals", "accepted", "tokens"),
}
"""Every mark there is, with the names of its numbers. `docs/trace.md` says what each means."""

_KINDS: Final = {name: kind for kind, name in enumerate(MARKS)}

_RECORD: Final = np.dtype(
    [
        ("begin", "i8"),
        ("duration", "i8"),
        ("session", "u8"),
        ("thread", "u8"),
        ("position", "u4"),
        ("kind", "u4"),
        ("numbers", "u4", NUMBERS),
    ]
)
_STRUCT: Final = struct.Struct("=qqQQIIIII")
_SIZE: Final = _STRUCT.size
assert _RECORD.itemsize == _SIZE

# Taking a place and filling it are one step each under the interpreter's lock, so that threads never share a place.
_pack = _STRUCT.pack_into
_next = itertools.count().__next__
_buffer = bytearray(CAPACITY * _SIZE)
_mask = CAPACITY - 1


def mark(name: str, session: int = 0, position: int = 0, a: int = 0, b: int = 0, c: int = 0) -> None:
    """Record that something happens now. session: 0 where it belongs to none. a, b, c: the numbers of `MARKS`."""
    _pack(_buffer, (_next() & _mask) * _SIZE, monotonic_ns(), 0, session, get_ident(), position, _KINDS[name], a, b, c)


def span(name: str, begin_ns: int, session: int = 0, position: int = 0, a: int = 0, b: int = 0, c: int = 0) -> None:
    """Record that something ends now, which began at begin_ns, by `time.monotonic_ns`."""
    took, at = monotonic_ns() - begin_ns, (_next() & _mask) * _SIZE
    _pack(_buffer, at, begin_ns, took, session, get_ident(), position, _KINDS[name], a, b, c)


def record(name: str, begin_ns: int, end_ns: int, session: int, position: int = 0, a: int = 0) -> None:
    """Record what lies in the past."""
    at = (_next() & _mask) * _SIZE
    _pack(_buffer, at, begin_ns, end_ns - begin_ns, session, get_ident(), position, _KINDS[name], a, 0, 0)


def start() -> None:
    """Keep 2 million marks from now on, for `write`."""
    global _buffer, _mask
    _buffer = bytearray(_BENCH_CAPACITY * _SIZE)
    _mask = _BENCH_CAPACITY - 1


def _recorded() -> npt.NDArray[Any]:
    """[n] of `_RECORD`: a copy of what there is, in the order of its ends."""
    records = np.frombuffer(bytes(_buffer), _RECORD)
    records = records[records["begin"] != 0]
    ordered: npt.NDArray[Any] = records[np.argsort(records["begin"] + records["duration"], kind="stable")]
    return ordered


def answer(question: GetTrace, role: str, instance: str) -> Trace:
    """What this process has recorded of a session; see `Trace`."""
    records = _recorded()
    ends = records["begin"] + records["duration"]
    own = records["session"] == question.session if question.session else np.zeros(len(records), bool)
    since_ns, until_ns = question.since_ns, question.until_ns
    if own.any():
        since_ns = min(since_ns or int(records["begin"][own].min()), int(records["begin"][own].min()))
        until_ns = max(until_ns, int(ends[own].max()))
    nobodys = (records["session"] == 0) & (ends >= since_ns) & (records["begin"] <= until_ns)
    chosen = records[own | nobodys]
    n_cut = max(0, len(chosen) - MAX_MARKS)
    chosen = chosen[n_cut:]
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    idents, thread = np.unique(chosen["thread"], return_inverse=True)
    marks = np.empty((len(chosen), 6 + NUMBERS), np.int64)
    marks[:, 0], marks[:, 1] = chosen["begin"], chosen["duration"]
    marks[:, 2], marks[:, 3] = chosen["kind"], thread
    marks[:, 4], marks[:, 5] = chosen["session"] != 0, chosen["position"]
    marks[:, 6:] = chosen["numbers"]
    return Trace(
        question.ref,
        role,
        instance,
        os.getpid(),
        socket.gethostname()[:200],
        clock_id(),
        monotonic_ns(),
        tuple(MARKS),
        tuple(_thread_name(names.get(int(ident))) for ident in idents),
        marks,
        n_cut,
        int(records["begin"].min()) if len(records) > _mask else 0,
    )


def _thread_name(name: str | None) -> str:
    """As it is shown."""
    if name is None:
        return "ended thread"
    return "event loop" if name == threading.main_thread().name else name[:200]


@dataclass(frozen=True, slots=True)
class Mark:
    """One of `MARKS`; duration_ns: 0 for an instant."""

    begin_ns: int
    duration_ns: int
    name: str
    session: int
    position: int

    @property
    def end_ns(self) -> int:
        return self.begin_ns + self.duration_ns


def write(directory: Path, process: str) -> None:
    """Write what has been recorded to DIRECTORY/PROCESS-PID.jsonl."""
    names = tuple(MARKS)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{process}-{os.getpid()}.jsonl").open("w") as out:
        for begin, duration, session, _, position, kind, _ in _recorded().tolist():
            out.write(json.dumps((begin, duration, names[kind], session, position)) + "\n")


def read(directory: Path) -> Iterator[Mark]:
    """All marks of all processes, in no order."""
    for path in sorted(directory.glob("*.jsonl")):
        with path.open() as lines:
            for line in lines:
                yield Mark(*json.loads(line))
