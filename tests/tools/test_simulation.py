"""Policies played on traces: against arithmetic, against the cost model's own formula, and against each other."""

from __future__ import annotations

import random

import pytest

from shared.speculation.cost import Acceptance, Speculation, StepCost
from tools.draft_trace import AHEAD, Proposed, Trace
from tools.simulation import Adaptive, Machine, Oracle, Threshold, best, oracles, play, thresholds

LING = Machine(StepCost.linear(0.160, 0.39), draft_s=0.010, rtt_s=0.0003, overhead_s=0.002)


def traces(n: int, length: int, seed: int = 1, skill: float = 0.9) -> list[Trace]:
    """A draft that knows how sure it is, and goes on as surely from a wrong token. skill: of being right, about."""
    chance = random.Random(seed)

    def sure() -> float:
        return chance.betavariate(10 * skill, 10 * (1 - skill))

    def proposed() -> Proposed:
        confidence = sure()
        hit = chance.random() < confidence
        return Proposed(confidence, hit, () if hit else tuple(sure() for _ in range(AHEAD)))

    return [tuple(proposed() for _ in range(length)) for _ in range(n)]


def constant(n: int, length: int, acceptance: float, seed: int = 1) -> list[Trace]:
    """Each proposal is right with the same probability, whatever happened before."""
    chance = random.Random(seed)
    lost = (acceptance,) * AHEAD

    def proposed() -> Proposed:
        hit = chance.random() < acceptance
        return Proposed(acceptance, hit, () if hit else lost)

    return [tuple(proposed() for _ in range(length)) for _ in range(n)]


class Fixed(Threshold):
    """Verifies n proposals as soon as they are there, and waits for them."""

    def __init__(self, n: int) -> None:
        super().__init__(0.0, n, 1e9)


def test_without_proposals_it_is_plain_decoding() -> None:
    outcome = play(traces(3, 50), LING, Threshold(0.0, 0, 0.0))
    assert (outcome.tokens, outcome.steps, outcome.proposed) == (3 * 49, 3 * 49, 0)
    assert outcome.rate == pytest.approx(1 / 0.162)


def test_a_perfect_draft_that_keeps_up_brings_n_and_one_a_step() -> None:
    perfect: list[Trace] = [tuple(Proposed(1.0, True) for _ in range(1 + 5 * 40))]
    outcome = play(perfect, LING, Fixed(4))
    assert (outcome.steps, outcome.proposed, outcome.accepted) == (40, 160, 160)
    first_wait = 6 * LING.draft_s  # for the text's first token, which the prompt gives, and the first four proposals
    assert outcome.seconds == pytest.approx(40 * (0.160 + 4 * 0.0624 + 0.002), abs=first_wait)


def test_what_is_not_right_is_not_committed() -> None:
    """A draft that is never right costs time and brings nothing; every step commits the target's own token."""
    wrong: list[Trace] = [tuple(Proposed(0.9, False, (0.9,) * AHEAD) for _ in range(60))]
    outcome = play(wrong, LING, Fixed(2))
    assert (outcome.tokens, outcome.accepted) == (59, 0)
    assert outcome.rate < 0.7 / 0.162


@pytest.mark.parametrize("acceptance", [0.6, 0.9])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("rtt_s", [0.0003, 0.05])
def test_it_agrees_with_the_estimate(acceptance: float, n: int, rtt_s: float) -> None:
    """The formula of `draftwire estimate`, worked out by other means, where its assumptions hold.

    It lets a draft drop the token that it is at when a commit contradicts it, which a real one cannot.
    """
    step = StepCost.linear(0.160, 0.39)
    machine = Machine(step, draft_s=0.010, rtt_s=rtt_s)
    outcome = play(constant(15, 400, acceptance), machine, Fixed(n))
    expected = Speculation(step, 0.010, rtt_s, Acceptance((acceptance,))).overlapped(n, wait_for=n)
    assert outcome.rate == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("skill", [0.8, 0.95])
@pytest.mark.parametrize("slope", [0.1, 0.39])
def test_the_controller_is_as_good_as_the_best_fixed_policy(skill: float, slope: float) -> None:
    """97 % of the fastest of the thresholds, which is chosen knowing the texts; it starts knowing nothing."""
    machine = Machine(StepCost.linear(0.160, slope), 0.010, 0.0003, 0.002)
    played = traces(10, 120, skill=skill)
    few = [p for p in thresholds(machine) if p.n_max == 16 and p.least in (0.4, 0.55, 0.7) and p.most_wait_s > 0.02]
    _, fastest = best(played, machine, few)
    assert play(played, machine, Adaptive()).rate >= 0.97 * fastest.rate


@pytest.mark.parametrize("draft_s", [0.010, 0.4])
def test_a_useless_draft_costs_little(draft_s: float) -> None:
    """At least 95 % of plain decoding, also where the draft is sure of itself."""
    chance = random.Random(3)
    wrong: list[Trace] = [
        tuple(Proposed(chance.random(), False, tuple(chance.random() for _ in range(AHEAD))) for _ in range(150))
        for _ in range(4)
    ]
    machine = Machine(LING.step, draft_s, 0.0003, 0.002)
    assert play(wrong, machine, Adaptive()).rate >= 0.95 / 0.162


def test_nobody_beats_who_knows() -> None:
    played = traces(6, 150)
    _, oracle = best(played, LING, oracles(LING))
    _, fastest = best(played, LING, [p for p in thresholds(LING) if p.n_max == 16 and p.least in (0.5, 0.6)])
    assert oracle.rate > fastest.rate
    assert oracle.proposed == oracle.accepted
    assert isinstance(next(oracles(LING)), Oracle)
