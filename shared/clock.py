"""How far another process's monotonic clock is from ours, from round trips.

Monotonic clocks of two hosts begin anywhere and drift apart by up to some 50 microseconds a second. One round trip says
that the peer read its clock somewhere between our sending and our receiving, as in NTP: taking the middle, the error is
at most half of the round trip, however unequal the two ways are. Pure, but for `clock_id`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_WINDOW = 32
_FEW = 8
_MAX_ESTIMATES = 256


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """sent_ns, received_ns: on our clock. peer_ns: what the peer's clock said between them."""

    sent_ns: int
    peer_ns: int
    received_ns: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """At at_ns of our clock the peer's was ahead by offset_ns, give or take uncertainty_ns."""

    at_ns: int
    offset_ns: int
    uncertainty_ns: int


def estimate(trips: Iterable[RoundTrip]) -> Estimate | None:
    """By the shortest of some round trips; None: there were none."""
    best = min(trips, key=lambda trip: trip.received_ns - trip.sent_ns, default=None)
    if best is None:
        return None
    at = (best.sent_ns + best.received_ns) // 2
    return Estimate(at, best.peer_ns - at, (best.received_ns - best.sent_ns + 1) // 2)


class ClockWatch:
    """What heartbeats say of one peer's clock: an estimate for every 32 round trips, the last 256 of them.

    Drift is what several are kept for: an event is placed by those that were made about its time.
    """

    def __init__(self) -> None:
        self._trips: list[RoundTrip] = []
        self._settled: deque[Estimate] = deque(maxlen=_MAX_ESTIMATES - 1)

    def observe(self, trip: RoundTrip) -> None:
        self._trips.append(trip)
        if len(self._trips) == _WINDOW:
            settled = estimate(self._trips)
            assert settled is not None  # there are some
            self._settled.append(settled)
            self._trips.clear()

    def estimates(self) -> tuple[Estimate, ...]:
        """Oldest first; none before the first round trip."""
        if self._settled and len(self._trips) < _FEW:
            return tuple(self._settled)  # the best of a few may be far worse than the last that has settled
        latest = estimate(self._trips)
        return (*self._settled, latest) if latest is not None else ()


def offset_at(estimates: Sequence[Estimate], peer_ns: int) -> Estimate:
    """The offset when the peer's clock said peer_ns: between two estimates on the line through them, beyond the first
    and the last as there. Its uncertainty is the larger one of the two. estimates: at least one, oldest first.
    """
    after = next((i for i, e in enumerate(estimates) if e.at_ns + e.offset_ns >= peer_ns), len(estimates))
    if after == 0 or after == len(estimates):
        nearest = estimates[min(after, len(estimates) - 1)]
        return Estimate(peer_ns - nearest.offset_ns, nearest.offset_ns, nearest.uncertainty_ns)
    left, right = estimates[after - 1], estimates[after]
    begin, end = left.at_ns + left.offset_ns, right.at_ns + right.offset_ns
    offset = left.offset_ns + (right.offset_ns - left.offset_ns) * (peer_ns - begin) // max(1, end - begin)
    return Estimate(peer_ns - offset, offset, max(left.uncertainty_ns, right.uncertainty_ns))


def clock_id() -> str:
    """Processes with the same one read the same monotonic clock: the boot and the time namespace. Empty: not known."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/time').readlink()}"
    return ""
