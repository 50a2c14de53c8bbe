"""Histograms of times: the bounds that whoever counts and whoever shows agree on. Pure."""

from __future__ import annotations

import bisect
from typing import Final

from shared.messages import MAX_MICROS, Histogram

BOUNDS_S: Final = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0, 300.0),
)
"""Upper bounds of the buckets, seconds; one more bucket holds what is longer."""

_MOST = 2**53


class Times:
    """Counts times; what a process says of itself may be anything, the counts fit into a message all the same."""

    __slots__ = ("_counts", "_sum_us")

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._sum_us = 0

    def observe(self, seconds: float, n: int = 1) -> None:
        """Something took so long, n times."""
        if not self._counts:
            self._counts = [0] * (len(BOUNDS_S) + 1)
        bucket = bisect.bisect_left(BOUNDS_S, seconds)
        self._counts[bucket] = min(_MOST, self._counts[bucket] + n)
        self._sum_us = min(MAX_MICROS, self._sum_us + round(n * seconds * 1e6))

    def message(self) -> Histogram:
        return Histogram(tuple(self._counts), self._sum_us)


def cumulative(histogram: Histogram) -> list[tuple[str, int]]:
    """Its buckets as Prometheus wants them: (upper bound, how many were at most that), the last one "+Inf"."""
    bounds = [*map(str, BOUNDS_S), "+Inf"]
    counts = histogram.counts if len(histogram.counts) == len(bounds) else (0,) * len(bounds)
    total, buckets = 0, []
    for bound, count in zip(bounds, counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets
