"""Estimating another clock by round trips: never wrong by more than it says."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.clock import ClockMap, ClockWatch, Estimate, RoundTrip, estimate

NANOS = st.integers(0, 10**9)
OFFSET = st.integers(-(10**18), 10**18)


def trip(sent_ns: int, out_ns: int, back_ns: int, offset_ns: int) -> RoundTrip:
    """A round trip whose ways took so long, to a clock that is really ahead by offset_ns."""
    return RoundTrip(sent_ns, sent_ns + out_ns + offset_ns, sent_ns + out_ns + back_ns)


@given(OFFSET, st.lists(st.tuples(NANOS, NANOS, NANOS), min_size=1, max_size=40))
def test_the_error_is_at_most_half_of_the_shortest_round_trip(offset: int, delays: list[tuple[int, int, int]]) -> None:
    """However unequal the ways are; and that half is what is given as the uncertainty."""
    found = estimate(trip(sent, out, back, offset) for sent, out, back in delays)
    assert found is not None
    assert found.uncertainty_ns == (min(out + back for _, out, back in delays) + 1) // 2
    assert abs(found.offset_ns - offset) <= found.uncertainty_ns


def test_without_a_round_trip_nothing_is_estimated() -> None:
    assert estimate(()) is None
    assert ClockWatch().estimates() == ()


@given(st.integers(-(10**18), 10**18), st.integers(-100, 100), st.integers(2, 12), st.randoms())
def test_steady_drift_is_taken_out(offset: int, ppm: int, n: int, chance: random.Random) -> None:
    """A mark between two estimates is placed within their uncertainty, though the clock has drifted by far more."""
    watch, started = ClockWatch(), 10**15

    def peer(at_ns: int) -> int:
        return at_ns + offset + (at_ns - started) * ppm // 10**6

    for beat in range(32 * n):
        sent = started + beat * 500_000_000
        read, received = sent + chance.randrange(200_000), sent + 200_000 + chance.randrange(10**7)
        watch.observe(RoundTrip(sent, peer(read), received))
    estimates = watch.estimates()
    assert len(estimates) == n
    clock = ClockMap(estimates)
    for _ in range(20):
        at = chance.randrange(estimates[0].at_ns, estimates[-1].at_ns)
        found = clock.at(peer(at))
        assert abs(found.at_ns - at) <= found.uncertainty_ns + 1000  # of the drift of half a round trip, and rounding


@given(st.lists(st.tuples(OFFSET, OFFSET, NANOS), max_size=6), st.lists(st.integers(0, 2**62), max_size=20))
def test_any_estimates_give_a_time(estimates: list[tuple[int, int, int]], times: list[int]) -> None:
    """A peer may say anything of its clock."""
    clock = ClockMap([Estimate(*values) for values in estimates])
    for time_ns in times:
        found = clock.at(time_ns)
        assert found.at_ns + found.offset_ns == time_ns


def test_beyond_the_estimates_the_nearest_holds() -> None:
    clock = ClockMap([Estimate(1000, 50, 3), Estimate(2000, 70, 9)])
    assert clock.at(500) == Estimate(450, 50, 3)
    assert clock.at(1560) == Estimate(1500, 60, 9)
    assert clock.at(9070) == Estimate(9000, 70, 9)
    assert ClockMap([]).ours(7) == 7


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (31, 1), (32, 1), (39, 1), (40, 2), (32 * 300, 255)])
def test_few_round_trips_do_not_displace_a_settled_estimate(n: int, expected: int) -> None:
    """And the number of estimates is bounded."""
    watch = ClockWatch()
    for beat in range(n):
        watch.observe(trip(beat * 10**9, 10, 10, 5))
    assert len(watch.estimates()) == expected
    assert {e.offset_ns for e in watch.estimates()} == {5}
