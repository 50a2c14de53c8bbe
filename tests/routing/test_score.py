"""What a worker is worth in tokens a second: bounds, directions, and agreement with the whole model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.routing.score import STEP_PRIOR, Drafting, after_prefill, beside, expected_rate, step_cost
from shared.speculation.cost import Acceptance, Speculation, StepCost

draftings = st.builds(
    Drafting,
    st.floats(0.0001, 1.0),
    st.floats(0, 1.0),
    st.floats(0, 1).map(lambda a: (a,)),
    st.floats(0, 1),
)


@settings(deadline=None)
@given(draftings)
def test_speculation_never_counts_as_slower_than_plain(drafting: Drafting) -> None:
    """The verifier switches off what does not pay: the least is plain decoding; the most is a token a row for free."""
    plain = 1 / STEP_PRIOR.seconds(1)
    assert plain * 0.999 <= expected_rate(STEP_PRIOR, drafting) <= plain * 17


@settings(deadline=None, max_examples=50)
@given(st.floats(0.001, 0.3), st.floats(0, 0.3), st.floats(0.05, 0.97))
def test_it_is_the_best_length_of_the_model(token_s: float, rtt_s: float, acceptance: float) -> None:
    """The short cuts (rounding, an early end, no long runs) cost less than 3 %."""
    whole = Speculation(STEP_PRIOR, token_s, rtt_s, Acceptance((acceptance,)))
    best = max(whole.overlapped(n) for n in range(17))
    assert expected_rate(STEP_PRIOR, Drafting(token_s, rtt_s, (acceptance,))) == pytest.approx(best, rel=0.03)


def test_certain_acceptance_takes_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's event loop waits for the answer: no acceptance makes the model walk through thousands of steps."""
    steps = 0
    seconds = StepCost.seconds

    def counted(cost: StepCost, rows: int) -> float:
        nonlocal steps
        steps += 1
        return seconds(cost, rows)

    monkeypatch.setattr(StepCost, "seconds", counted)
    expected_rate(StepCost.linear(0.123, 0.0), Drafting(0.003, 0.001, (1.0,)))
    assert steps < 2000


def test_coverage_blends_with_plain_decoding() -> None:
    """A worker with something to propose for half of the text saves half of the time that it would save."""
    plain = 1 / STEP_PRIOR.seconds(1)
    whole, half, none = (expected_rate(STEP_PRIOR, Drafting(0.001, 0.001, (0.9,), c)) for c in (1.0, 0.5, 0.0))
    assert none == pytest.approx(plain)
    assert 1 / half == pytest.approx((1 / whole + 1 / plain) / 2)


def test_reported_steps() -> None:
    """Micros become seconds, noise does not fall, one point takes the usual slope; what does not ascend is refused."""
    assert step_cost([(1, 100_000), (4, 250_000)]).seconds(4) == pytest.approx(0.25)
    assert step_cost([(1, 100_000), (2, 90_000)]).seconds(2) == pytest.approx(0.1)
    assert step_cost([(1, 100_000)]).seconds(2) == pytest.approx(0.139)
    for points in ([], [(2, 5)], [(1, 5), (1, 6)], [(1, 5), (3, 6), (2, 6)]):
        with pytest.raises(ValueError, match="ascending"):
            step_cost(points)


def test_steps_shared_with_others_begin_further_up() -> None:
    shared = beside(STEP_PRIOR, 3)
    assert shared.seconds(1) == pytest.approx(STEP_PRIOR.seconds(4))
    assert shared.seconds(5) == pytest.approx(STEP_PRIOR.seconds(8))


@given(st.floats(1, 50), st.floats(0, 100), st.floats(1, 5000))
def test_prefill_costs_what_is_decoded_plainly_meanwhile(rate: float, prefill_s: float, left: float) -> None:
    """Between plain and full speed, and full speed where there is nothing to read."""
    plain = 1.0
    assert plain - 1e-9 <= after_prefill(rate, plain, prefill_s, left) <= rate + 1e-9
    assert after_prefill(rate, plain, 0.0, left) == pytest.approx(rate)
