"""How far another process's monotonic clock is from ours, from round trips.

Monotonic clocks of two hosts begin anywhere and drift apart by up to some 50 microseconds a second. One round trip says
that the peer read its clock somewhere between our sending and our receiving, as in NTP: taking the middle, the error is
at most half of the round trip, however unequal the two ways are. Pure, but for `clock_id`.
"""

from __future__ import annotations

import bisect
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


def _on_peer(estimate: Estimate) -> int:
    """Its time on the peer's clock."""
    return estimate.at_ns + estimate.offset_ns


class ClockMap:
    """A peer's clock in terms of ours, by estimates; none: it is the same clock.

    Between two estimates the offset is on the line through them, before the first and after the last as there.
    """

    def __init__(self, estimates: Sequence[Estimate]) -> None:
        self._estimates = sorted(estimates, key=_on_peer) or [Estimate(0, 0, 0)]
        self._peer_ns = [_on_peer(estimate) for estimate in self._estimates]

    def at(self, peer_ns: int) -> Estimate:
        """What holds when the peer's clock says peer_ns; its at_ns is that time on our clock."""
        after = bisect.bisect_left(self._peer_ns, peer_ns)
        left, right = self._estimates[max(0, after - 1)], self._estimates[min(after, len(self._estimates) - 1)]
        offset = left.offset_ns
        if left is not right:
            begin, end = self._peer_ns[after - 1 : after + 1]
            offset += (right.offset_ns - offset) * (peer_ns - begin) // (end - begin)
        return Estimate(peer_ns - offset, offset, max(left.uncertainty_ns, right.uncertainty_ns))

    def ours(self, peer_ns: int) -> int:
        """The peer's time on our clock."""
        return self.at(peer_ns).at_ns


def clock_id() -> str:
    """Processes with the same one read the same monotonic clock: the boot and the time namespace. Empty: not known."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/time').readlink()}"
    return ""
