"""Demotion and the way back, by the clock of a test."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.health import LOST_SESSIONS, Health


def back_off(health: Health, now: float) -> float:
    health.demote("x", now)
    return health.retry_s(now)


def prove(health: Health, now: float) -> None:
    assert health.try_again(now)
    while not health.drafted(8, now):
        pass


def test_the_way_back() -> None:
    """Demoted, it has no slots; after its back-off one; after 32 good tokens all."""
    health = Health(2.0, 0.0)
    assert (health.state, health.slots(4)) == ("ok", 4)
    health.demote("it stalls", 10.0)
    assert (health.state, health.reason, health.slots(4)) == ("demoted", "it stalls", 0)
    assert not health.try_again(11.9)
    assert health.try_again(12.0)
    assert (health.state, health.slots(4)) == ("probation", 1)
    assert [health.drafted(8, 13.0) for _ in range(4)] == [False, False, False, True]
    assert (health.state, health.slots(4), health.reason) == ("ok", 4, "")


def test_absence_is_no_part_of_the_back_off() -> None:
    """It must be there all the time: coming back starts it again."""
    health = Health(2.0, 0.0)
    health.demote("x", 10.0)
    health.returned(100.0)
    assert health.retry_s(100.0) == 2.0
    assert not health.try_again(101.0)
    assert health.try_again(102.0)


def test_the_back_off_doubles_up_to_a_limit_and_is_forgiven() -> None:
    health, now = Health(2.0, 0.0), 0.0
    seen = []
    for _ in range(12):
        seen.append(back_off(health, now))
        now += seen[-1]
        prove(health, now)
    assert seen[:4] == pytest.approx([2.0, 4.0, 8.0, 16.0], rel=0.01)
    assert seen[-1] == 600.0
    assert back_off(health, now + 24 * 3600) == 2.0


def test_single_offences_are_forgiven_many_are_not() -> None:
    """One a minute for hours is nothing, eight within a minute demote; on probation the first one does."""
    health = Health(2.0, 0.0)
    assert not any(health.offence("a lie", 60.0 * i) for i in range(500))
    now = 1e6
    assert [health.offence("a lie", now + i) for i in range(9)].index(True) in (7, 8)
    assert health.try_again(now + 60)
    assert health.offence("a lie", now + 61)


def test_what_is_sent_while_it_is_demoted_does_not_count() -> None:
    """Late messages of before; it is kept out for them already."""
    health = Health(2.0, 0.0)
    health.demote("a lie", 10.0)
    assert not any(health.offence("a lie", 10.0) for _ in range(2000))
    assert health.try_again(20.0)
    assert health.drafted(1000, 20.0)
    assert not health.offence("a lie", 21.0)


def test_however_often_it_was_demoted_it_is_forgiven() -> None:
    """Two hours of good behaviour after forty demotions: kept out for seconds again, as 5 minutes halve the time."""
    health, now = Health(2.0, 0.0), 0.0
    for _ in range(40):
        health.demote("a lie", now)
        now += 601.0
        assert health.try_again(now)
        health.drafted(1000, now)
    now += 7200.0
    health.demote("a lie", now)
    assert health.retry_s(now) == 2.0


def test_coming_and_going_demotes() -> None:
    """The third loss of sessions within a minute is too much, one every ten minutes is not."""
    health = Health(2.0, 0.0)
    assert [health.offence("gone", 20.0 * i, LOST_SESSIONS) for i in range(3)] == [False, False, True]
    calm = Health(2.0, 0.0)
    assert not any(calm.offence("gone", 600.0 * i, LOST_SESSIONS) for i in range(20))


@given(st.lists(st.tuples(st.sampled_from(("demote", "offend", "return", "try", "draft")), st.floats(0, 100))))
def test_it_never_gets_stuck(events: list[tuple[str, float]]) -> None:
    """Whatever happened, a worker that is there and behaves is trusted again within the longest back-off."""
    health, now = Health(2.0, 0.0), 0.0
    for kind, passed in events:
        now += passed
        if kind == "demote":
            health.demote("x", now)
        elif kind == "offend":
            health.offence("x", now)
        elif kind == "return":
            health.returned(now)
        elif kind == "try":
            health.try_again(now)
        else:
            health.drafted(8, now)
    now += 600.0
    health.try_again(now)
    for _ in range(4):
        health.drafted(8, now)
    assert health.slots(3) == 3
