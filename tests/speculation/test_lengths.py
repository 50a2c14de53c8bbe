"""The length controller as pure functions: choices against brute force, what is learned against what was played."""

from __future__ import annotations

import random
from itertools import product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.speculation.lengths import Arrivals, Calibration, Candidate, LengthController, StepCosts

BASE, SLOPE = 0.16, 0.0624


def learned(base: float = BASE, slope: float = SLOPE, most: int = 40, rate: float | None = None) -> LengthController:
    """A controller that has seen steps of all numbers of rows, and so many tokens a second."""
    controller = LengthController()
    for _ in range(30):
        for rows in range(1, most + 1):
            controller.costs.observe(rows, base + slope * (rows - 1))
    if rate is not None:
        controller._tokens, controller._seconds = rate, 1.0
        controller._steps = 1
    return controller


def worth(controller: LengthController, sessions: list[Candidate], lengths: tuple[int, ...]) -> float:
    tokens = sum(sum(s.reach[:n]) for s, n in zip(sessions, lengths, strict=True))
    return tokens - controller.rate * controller.costs.seconds(len(sessions) + sum(lengths))


reaches = st.lists(st.floats(0, 1), max_size=5).map(lambda ps: [prod(ps[: i + 1]) for i in range(len(ps))])


@settings(max_examples=200, deadline=None)
@given(st.lists(reaches, min_size=1, max_size=3), st.floats(1, 40), st.integers(0, 12))
def test_lengths_are_worth_most_of_all(all_reach: list[list[float]], rate: float, room: int) -> None:
    """No other lengths in the room bring more tokens for their time."""
    controller = learned(rate=rate)
    sessions = [Candidate(reach) for reach in all_reach]
    chosen = tuple(controller.choose(sessions, room))
    assert sum(chosen) <= room
    every = [n for n in product(*(range(len(r) + 1) for r in all_reach)) if sum(n) <= room]
    best = max(worth(controller, sessions, lengths) for lengths in every)
    assert worth(controller, sessions, chosen) == pytest.approx(best, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(reaches, st.integers(0, 4)), min_size=1, max_size=3), st.floats(1, 40), st.integers(0, 12))
def test_fewer_than_the_request_wants_are_none(wanted: list[tuple[list[float], int]], rate: float, room: int) -> None:
    for controller in (learned(rate=rate), LengthController()):
        sessions = [Candidate(reach, least=least) for reach, least in wanted]
        for _ in range(65):  # with a step that explores
            chosen = controller.choose(sessions, room)
            assert sum(chosen) <= room
            assert all(n == 0 or n >= session.least for n, session in zip(chosen, sessions, strict=True))
            controller.observe(len(sessions) + sum(chosen), BASE, 1, BASE)


def test_a_cost_in_stairs_is_climbed_where_it_pays() -> None:
    """Rows two to eight cost nothing more, nine costs as much again: seven proposals, though the first gains little."""
    controller = LengthController()
    for _ in range(400):
        for rows in range(1, 17):
            controller.costs.observe(rows, 0.1 if rows <= 8 else 0.2)
    controller._tokens, controller._seconds, controller._steps = 10.0, 1.0, 1
    assert controller.choose([Candidate([0.6**i for i in range(1, 13)])], 12) == [7]


def test_what_is_unknown_is_tried() -> None:
    assert LengthController().choose([Candidate([0.01] * 4), Candidate([0.5] * 3)], 5) == [4, 1]


def test_speculation_that_does_not_pay_is_tried_again_now_and_then() -> None:
    controller = learned(rate=6.0)
    lengths = []
    for _ in range(256):
        (n,) = controller.choose([Candidate([0.05, 0.0025])], 16)
        controller.observe(1 + n, BASE + SLOPE * n, 1, BASE + SLOPE * n)
        lengths.append(n)
    assert 1 <= sum(lengths) <= 8


@pytest.mark.parametrize("acceptance", [0.3, 0.7, 0.9])
def test_the_rate_reached_is_that_of_the_best_length(acceptance: float) -> None:
    """Played out with i.i.d. acceptance, as many proposals there as wanted: as quick as the best fixed length."""
    chance = random.Random(3)
    controller = LengthController()
    calibration = Calibration(controller.calibration)
    tokens = seconds = 0.0
    for step in range(6000):
        reach = [prod(calibration.hopeful(d, acceptance) for d in range(depth + 1)) for depth in range(16)]
        (n,) = controller.choose([Candidate(reach)], 16)
        accepted = next((d for d in range(n) if chance.random() >= acceptance), n)
        for depth in range(min(n, accepted + 1)):
            calibration.observe(depth, acceptance, depth < accepted)
        took = BASE + SLOPE * n
        controller.observe(1 + n, took, accepted + 1, took)
        if step >= 1000:
            tokens += accepted + 1
            seconds += took
    best = max(sum(acceptance**d for d in range(n + 1)) / (BASE + SLOPE * n) for n in range(17))
    assert tokens / seconds > 0.97 * best


def test_costs_are_learned_and_forgotten() -> None:
    """A line where little is known, the mean where it is; the first step of a kind, an outlier and old times fade."""
    costs = StepCosts()
    assert not costs.known
    costs.observe(1, 9.0)
    assert not costs.known
    for _ in range(20):
        costs.observe(1, 0.1)
    assert costs.seconds(1) == pytest.approx(0.1)
    assert costs.seconds(3) == pytest.approx(0.16)
    for _ in range(20):
        costs.observe(5, 0.12)
    assert costs.seconds(5) == pytest.approx(0.12, rel=0.02)
    assert 0.1 < costs.seconds(3) < 0.12
    costs.observe(1, 50.0)
    assert costs.seconds(1) < 0.13
    for _ in range(2000):
        costs.observe(1, 0.3)
        costs.observe(5, 0.3)
    assert costs.seconds(1) == pytest.approx(costs.seconds(5), rel=0.02) == pytest.approx(0.3, rel=0.02)


def test_calibration_learns_what_confidence_is_worth() -> None:
    """A draft that is too sure of itself is found out; what one session has seen helps the next one."""
    chance = random.Random(1)
    everybody = Calibration()
    first = Calibration(everybody)
    assert first.probability(0, 0.97) == pytest.approx(0.97, abs=0.01)
    assert first.probability(0, None) == pytest.approx(0.5)
    assert first.hopeful(0, None) == pytest.approx(0.9)
    for _ in range(500):
        first.observe(0, 0.97, chance.random() < 0.6)
    assert first.probability(0, 0.97) == pytest.approx(0.6, abs=0.08)
    assert first.hopeful(0, 0.97) == first.probability(0, 0.97)
    second = Calibration(everybody)
    assert second.probability(0, 0.97) == pytest.approx(0.6, abs=0.08)
    assert second.probability(1, 0.97) > 0.9
    assert second.typical(0) == pytest.approx(0.6, abs=0.08)
    for _ in range(500):
        second.observe(0, 0.97, chance.random() < 0.9)
    assert second.probability(0, 0.97) == pytest.approx(0.9, abs=0.08)


def test_arrivals_tell_when_the_next_proposal_comes() -> None:
    arrivals = Arrivals()
    arrivals.commit(1.0, contradicted=True, left=0)
    assert arrivals.expected(1.0) is None  # never seen
    # Told after the next step, which found nothing: it came 30 ms after the contradiction all the same.
    arrivals.commit(1.2, contradicted=False, left=0)
    arrivals.arrive(1.03, 1)
    arrivals.arrive(1.05, 2)
    assert arrivals.restart_s == pytest.approx(0.03)
    assert arrivals.token_s == pytest.approx(0.01)
    arrivals.commit(2.0, contradicted=True, left=0)
    assert arrivals.expected(2.01) == pytest.approx(0.02)
    assert arrivals.expected(2.04) == 0.0
    assert arrivals.expected(2.2) is None  # overdue: not to be waited for
    arrivals.arrive(2.03, 1)
    assert arrivals.expected(2.035) == pytest.approx(0.005)
    arrivals.commit(2.1, contradicted=False, left=3)
    assert arrivals.expected(2.1) is None


def test_a_contradiction_that_shows_later_starts_the_clock_anew() -> None:
    """A step without proposals made up a token that the draft on its way had not: it begins again there."""
    arrivals = Arrivals()
    arrivals.commit(1.0, contradicted=True, left=0)
    arrivals.commit(1.2, contradicted=False, left=0)
    arrivals.stale(1.03)
    arrivals.arrive(1.23, 1)
    assert arrivals.restart_s == pytest.approx(0.03)


def test_a_quick_draft_is_waited_for_and_a_slow_or_bad_one_is_not() -> None:
    controller = learned(rate=9.0)

    def patience(next_s: float | None, token_s: float = 0.01, typical: float = 0.9, kept: float = 1.0) -> bool:
        session = Candidate([], next_s=next_s, token_s=token_s, typical=typical, kept=kept, room=16)
        return controller.patience([session], [0], 16) is not None

    assert patience(0.01)
    assert not patience(None)
    assert not patience(0.3, token_s=0.3)
    assert not patience(0.01, typical=0.4)
    assert not patience(0.01, kept=0.3)
    # By hand: 0.9 + 0.81 + 0.729 tokens, against 9 a second of 30 ms and three rows.
    gain, cost = 0.9 + 0.81 + 0.729, 9.0 * (0.03 + 3 * SLOPE)
    assert gain > cost
    assert controller.patience([Candidate([], next_s=0.01, token_s=0.01, typical=0.9, room=16)], [0], 16) == (0.01, 0)


def test_no_waiting_where_not_even_what_is_there_is_used() -> None:
    controller = learned(rate=20.0)
    session = Candidate([0.5, 0.1], next_s=0.001, token_s=0.001, typical=0.99, room=16)
    (length,) = controller.choose([session], 16)
    assert length < 2
    assert controller.patience([session], [length], 16) is None
