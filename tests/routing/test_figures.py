"""What is learned of workers and sessions, against what was played; and how it fades."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.routing.figures import (
    MODEL_ACCEPTANCE_PRIOR,
    MODEL_TOKEN_PRIOR_S,
    PREFILL_PRIOR,
    FadingMean,
    SessionFigures,
    WorkerFigures,
)


def test_a_worker_that_was_never_measured_is_believed_to_be_good() -> None:
    figures = WorkerFigures("ik")
    assert figures.token_s(1, 5.0) == pytest.approx(MODEL_TOKEN_PRIOR_S)
    assert figures.acceptance(5.0) == pytest.approx(MODEL_ACCEPTANCE_PRIOR)
    assert figures.prefill_s(1000, 5.0) == pytest.approx(1000 / PREFILL_PRIOR)
    assert figures.stale(5.0)
    assert not figures.measured()


def test_what_was_played_is_learned() -> None:
    """Token time, prefill and acceptance come within a tenth after a hundred proposals."""
    chance, figures, now = random.Random(1), WorkerFigures("cuda"), 0.0
    for _ in range(100):
        n = chance.randint(1, 4)
        now += 0.03 * n
        figures.drafted(n, 0.03 * n * chance.uniform(0.7, 1.3), 1, now)
        figures.arrived(n, 0.03 * n * chance.uniform(0.5, 1.5), 1, now)
        figures.judged(sum(chance.random() < 0.6 for _ in range(n)), n, now)
    figures.prefilled(5000, 10.0, now)
    assert figures.token_s(1, now) == pytest.approx(0.03, rel=0.1)
    assert figures.acceptance(now) == pytest.approx(0.6, rel=0.1)
    assert figures.prefill_s(1000, now) == pytest.approx(2.0, rel=0.1)
    assert not figures.stale(now)


def test_a_worker_that_slows_down_is_noticed_within_a_hundred_tokens() -> None:
    figures = WorkerFigures("ik")
    figures.drafted(1000, 10.0, 1, 0.0)
    for i in range(100):
        figures.drafted(1, 0.05, 1, 0.05 * i)
    assert figures.token_s(1, 5.0) > 0.04


def test_load_is_learned_by_number_of_sessions() -> None:
    """Measured with one and with four sessions, the figures of both are kept apart; between them it interpolates."""
    figures = WorkerFigures("ik")
    for _ in range(50):
        figures.drafted(4, 0.04, 1, 0.0)
        figures.drafted(4, 0.16, 4, 0.0)
    assert figures.token_s(1, 0.0) == pytest.approx(0.01, rel=0.1)
    assert figures.token_s(4, 0.0) == pytest.approx(0.04, rel=0.1)
    assert 0.01 < figures.token_s(2, 0.0) < 0.04
    assert figures.token_s(8, 0.0) > figures.token_s(4, 0.0)


def test_a_worker_cannot_talk_itself_fast() -> None:
    """One that says that its tokens cost nothing is believed only as far as they arrive."""
    figures = WorkerFigures("ik")
    for i in range(100):
        figures.drafted(1, 1e-6, 1, 0.1 * i)
        figures.arrived(1, 0.1, 1, 0.1 * i)
    assert figures.token_s(1, 10.0) > 0.09


@given(st.floats(0, 1), st.integers(1, 500))
def test_stale_figures_heal(acceptance: float, trials: int) -> None:
    """After hours without news a worker is thought of as if it were new, whatever it was like."""
    figures = WorkerFigures("ik")
    figures.judged(round(acceptance * trials), trials, 0.0)
    figures.drafted(trials, trials * 3.0, 1, 0.0)
    assert figures.acceptance(24 * 3600.0) == pytest.approx(MODEL_ACCEPTANCE_PRIOR, abs=0.01)
    assert figures.token_s(1, 24 * 3600.0) == pytest.approx(MODEL_TOKEN_PRIOR_S, rel=0.01)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.5, 50), st.floats(0, 100)), min_size=1, max_size=20))
def test_a_mean_stays_within_what_was_observed(observations: list[tuple[float, float, float]]) -> None:
    mean, now = FadingMean(60, 100), 0.0
    for value, weight, passed in observations:
        now += passed
        mean.observe(value, weight, now)
    values = [value for value, _, _ in observations]
    assert min(values) - 1e-9 <= mean.value(now, 0.0, 0.0) <= max(values) + 1e-9


def test_an_easy_text_is_expected_to_be_easy_for_others_too() -> None:
    """What one worker shows of a text moves what is expected of another, which keeps its own usual level otherwise."""
    usual = {"a": WorkerFigures("ik"), "b": WorkerFigures("ik")}
    usual["a"].judged(400, 500, 0.0)
    usual["b"].judged(300, 500, 0.0)
    session = SessionFigures()
    assert session.ease(usual, 0.0) == 0.0
    session.judged("a", 98, 100, 0.0)
    ease = session.ease(usual, 0.0)
    assert ease > 0
    assert 0.6 < session.acceptance("b", 0.6, ease, 0.0) < session.acceptance("a", 0.8, ease, 0.0)
    hard = SessionFigures()
    hard.judged("a", 40, 100, 0.0)
    assert hard.acceptance("b", 0.6, hard.ease(usual, 0.0), 0.0) < 0.5
