"""Which draft worker serves a session. Pure: values in, a name out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Worker:
    """A draft worker as the choice sees it. rtt_us: lowest recently measured round trip, None until measured."""

    instance: str
    rtt_us: int | None
    n_sessions: int
    n_slots: int


def choose(workers: Sequence[Worker], wanted: str) -> Worker | None:
    """The worker that drafts for a session, or None for plain decoding.

    Args:
        workers: those that are alive, match the target's vocabulary and have not failed this session.
        wanted: "auto", "none" or an instance's name.

    Of the workers with a free slot, the one with the lowest round trip; a worker not measured yet comes last; ties go
    to the less busy one and then by name.
    """
    if wanted == "none":
        return None
    free = [w for w in workers if w.n_sessions < w.n_slots and wanted in ("auto", w.instance)]
    return min(
        free,
        key=lambda w: (w.rtt_us is None, w.rtt_us or 0, w.n_sessions, w.instance),
        default=None,
    )
