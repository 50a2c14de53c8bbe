"""The decisions that a verifier keeps for `draftwire explain`."""

from __future__ import annotations

from services.verifier.explain import DecisionLog
from shared.messages import GetExplanation, Speculation, StepDecision

BOUNDS = Speculation(n_max=3)


def decision(position: int) -> StepDecision:
    return StepDecision(position, 0, (0.5,), 1, 0, 1, 2, 5.0, 100, 150, 120)


def test_a_session_s_decisions_come_in_their_order() -> None:
    log = DecisionLog(True, 4)
    for position in (3, 5):
        log.add(7, BOUNDS, decision(position))
    answer = log.answer(GetExplanation(9, 7))
    assert (answer.ref, answer.session, answer.adaptive, answer.speculation) == (9, 7, True, BOUNDS)
    assert [d.position for d in answer.decisions] == [3, 5]


def test_an_unknown_session_has_none() -> None:
    assert DecisionLog(False, 4).answer(GetExplanation(1, 2)).decisions == ()


def test_what_is_kept_is_bounded() -> None:
    """The last steps of the last sessions."""
    log = DecisionLog(True, 4)
    for session in range(40):
        for position in range(600):
            log.add(session, BOUNDS, decision(position))
    assert log.answer(GetExplanation(1, 23)).decisions == ()
    assert [len(log.answer(GetExplanation(1, s)).decisions) for s in range(24, 40)] == [512] * 16
    assert log.answer(GetExplanation(1, 39)).decisions[-1].position == 599


def test_sessions_that_run_are_kept_however_many() -> None:
    """Those that go are the ones that have decided nothing for longest."""
    log = DecisionLog(True, 40)
    log.add(99, BOUNDS, decision(1))
    for position in range(5):
        for session in range(40):
            log.add(session, BOUNDS, decision(position))
    assert [len(log.answer(GetExplanation(1, s)).decisions) for s in range(40)] == [5] * 40
    assert log.answer(GetExplanation(1, 99)).decisions == ()
