"""Refusals in the log: everything is counted, little is written, and less is kept."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from shared.refusals import MAX_REASONS, MAX_SOURCES, OTHERS, REFUSALS_EVERY_S, Refusals
from tests.gateway.test_access import Clock, Log

EVENT = "somebody_refused"


def test_refusals_are_one_line_a_minute_for_each_address() -> None:
    """The first at once, the rest of its minute counted; an address that is quiet is forgotten."""
    log, clock = Log(), Clock()
    refusals = Refusals(log.logger, EVENT, clock.now_s)
    for _ in range(50):
        refusals.add("10.0.0.1", "no key")
    refusals.add("10.0.0.1", "unknown")
    refusals.add("10.0.0.2", "revoked: bob")
    refusals.flush()
    lines = log.of(EVENT)
    assert [(line["source"], line["count"]) for line in lines] == [("10.0.0.1", 1), ("10.0.0.2", 1)]
    clock.pass_s(60)
    refusals.flush()
    [line] = log.of(EVENT)[2:]
    assert (line["source"], line["count"]) == ("10.0.0.1", 50)
    assert line["reasons"] == {"no key": 49, "unknown": 1}
    clock.pass_s(60)
    refusals.flush()
    refusals.add("10.0.0.1", "no key")
    assert [line["count"] for line in log.of(EVENT)[3:]] == [1]
    assert refusals.n_refused == 53


def test_what_was_not_logged_is_logged_at_the_end() -> None:
    """A gateway that stops does not swallow its count."""
    log = Log()
    refusals = Refusals(log.logger, EVENT, Clock().now_s)
    refusals.add("a", "no key")
    refusals.add("a", "no key")
    refusals.flush(everything=True)
    assert [line["count"] for line in log.of(EVENT)] == [1, 1]


def test_many_addresses_take_no_more_memory() -> None:
    """Beyond a bound they are counted together, and every refusal is in some count."""
    log, clock = Log(), Clock()
    refusals = Refusals(log.logger, EVENT, clock.now_s)
    for n in range(MAX_SOURCES + 500):
        refusals.add(f"address {n}", "no key")
    assert len(refusals._sources) == MAX_SOURCES + 1
    assert len(log.lines) == MAX_SOURCES + 1
    clock.pass_s(60)
    refusals.flush()
    assert sum(line["count"] for line in log.lines) == MAX_SOURCES + 500
    assert log.lines[-1]["source"] == OTHERS
    clock.pass_s(60)
    refusals.flush()
    assert not refusals._sources


def test_a_caller_with_many_keys_takes_no_more_memory() -> None:
    """Reasons beyond a bound are counted together."""
    log, clock = Log(), Clock()
    refusals = Refusals(log.logger, EVENT, clock.now_s)
    for n in range(1000):
        refusals.add("a", f"key {n}")
    refusals.flush(everything=True)
    assert [line["count"] for line in log.lines] == [1, 999]
    assert len(log.lines[-1]["reasons"]) == MAX_REASONS + 1
    assert log.lines[-1]["reasons"][OTHERS] == 999 - MAX_REASONS


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 30)), max_size=200))
def test_no_source_is_logged_twice_a_minute_and_none_is_lost(knocks: list[tuple[int, float]]) -> None:
    """Whoever knocks how often: the lines' counts add up to what there was."""
    log, clock = Log(), Clock()
    refusals = Refusals(log.logger, EVENT, clock.now_s)
    lines_at: dict[str, list[float]] = {}
    for source, wait_s in knocks:
        clock.pass_s(wait_s)
        refusals.flush()
        n_lines = len(log.lines)
        refusals.add(str(source), "x")
        for line in log.lines[n_lines:]:
            lines_at.setdefault(line["source"], []).append(clock.now_s())
    refusals.flush(everything=True)
    assert sum(line["count"] for line in log.lines) == len(knocks) == refusals.n_refused
    for times in lines_at.values():
        assert all(later - earlier >= REFUSALS_EVERY_S for earlier, later in itertools.pairwise(times))
