"""Predicted rates against field figures, a simulation and counting by hand; the best length; impossible input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.speculation.cost import Acceptance, Speculation, StepCost, best_length, break_even
from tests.speculation.simulation import Machines, simulate, simulate_sequential

N_MAX = 16


def ling(acceptance: float, rtt_s: float = 0.0) -> Speculation:
    """Ling-1T with its experts in RAM, Ling-flash drafting on a GPU, as logged by ik_llama.cpp."""
    return Speculation(StepCost.linear(0.160, 0.39), 0.010, rtt_s, Acceptance((acceptance,)))


probabilities = st.floats(0, 1)
speculations = st.builds(
    lambda base, slope, draft, rtt, shares: Speculation(
        StepCost.linear(base, slope), base * draft, base * rtt, Acceptance(tuple(sorted(shares, reverse=True)))
    ),
    st.floats(0.001, 1),
    st.floats(0, 1.5),
    st.floats(0.01, 2),
    st.floats(0, 3),
    st.lists(st.floats(0, 0.99), min_size=1, max_size=4),
)


# --- the cost of a step -----------------------------------------------------------------------------------------------


def test_a_linear_step_costs_as_much_more_for_every_further_row() -> None:
    cost = StepCost.linear(0.2, 0.25)
    assert [cost.seconds(rows) for rows in (1, 2, 3, 17)] == pytest.approx([0.2, 0.25, 0.3, 1.0])


def test_a_measured_step_is_interpolated_and_goes_on_beyond_the_table() -> None:
    cost = StepCost.measured({8: 0.40, 1: 0.10, 2: 0.16, 4: 0.26})
    assert [cost.seconds(rows) for rows in (1, 2, 3, 4, 6, 8, 10)] == pytest.approx(
        [0.10, 0.16, 0.21, 0.26, 0.33, 0.40, 0.47]
    )


def test_a_measured_step_never_gets_cheaper_with_more_rows() -> None:
    """8 rows measured as quicker than 4 count as taking as long."""
    cost = StepCost.measured({1: 0.1, 4: 0.3, 8: 0.2, 16: 0.5})
    assert [cost.seconds(rows) for rows in (4, 6, 8, 12)] == pytest.approx([0.3, 0.3, 0.3, 0.4])


@given(st.dictionaries(st.integers(2, 64), st.floats(0.001, 10), min_size=1), st.floats(0.001, 10))
def test_the_cost_is_monotone_whatever_was_measured(table: dict[int, float], one_row: float) -> None:
    cost = StepCost.measured({**table, 1: one_row})
    seconds = [cost.seconds(rows) for rows in range(1, 80)]
    assert all(b >= a * (1 - 1e-12) for a, b in itertools.pairwise(seconds))


@pytest.mark.parametrize(
    "table",
    [{}, {1: 0.1}, {2: 0.1, 4: 0.2}, {1: 0.0, 2: 0.1}, {1: -1.0, 2: 0.1}, {1: 0.1, 2: math.inf}],
)
def test_an_impossible_cost_is_refused(table: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="step"):
        StepCost.measured(table)


def test_a_negative_slope_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fall"):
        StepCost.linear(0.1, -0.1)


# --- acceptance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_tokens_of_independent_acceptance_are_the_known_formula(a: float, n: int) -> None:
    assert Acceptance((a,)).tokens(n) == pytest.approx((1 - a ** (n + 1)) / (1 - a))


def test_certain_acceptance_commits_every_proposal_and_the_bonus_token() -> None:
    assert Acceptance((1.0,)).tokens(5) == 6


def test_tokens_by_depth_are_the_sum_over_all_outcomes() -> None:
    """Counted by hand over the conditional probabilities .8, .5, .25: run of 0, 1, 2 or 3 and one token more."""
    acceptance = Acceptance((0.8, 0.4, 0.1))
    assert acceptance.tokens(3) == pytest.approx(1 * 0.2 + 2 * 0.8 * 0.5 + 3 * 0.4 * 0.75 + 4 * 0.1)


def test_beyond_the_list_acceptance_falls_by_the_last_factor() -> None:
    acceptance = Acceptance((0.8, 0.4))
    assert [acceptance.reach(depth) for depth in range(5)] == pytest.approx([1, 0.8, 0.4, 0.2, 0.1])
    assert [Acceptance((0.8, 0.0, 0.0)).reach(depth) for depth in (3, 4, 9)] == [0, 0, 0]


@pytest.mark.parametrize("shares", [(), (1.1,), (-0.1,), (math.nan,), (0.5, 0.6)])
def test_impossible_acceptance_is_refused(shares: Sequence[float]) -> None:
    with pytest.raises(ValueError, match=r"acceptance|depth"):
        Acceptance(tuple(shares))


# --- against field figures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "speed_up", "length"),
    [(0.7, 1.23, 2), (0.8, 1.37, 2), (0.85, 1.46, 3), (0.9, 1.60, 4), (0.95, 1.80, 6), (0.98, 2.03, 11)],
)
def test_the_limit_of_overlapping_for_ling(a: float, speed_up: float, length: int) -> None:
    """The project's figures for the best that overlapping can reach; they count 1 ms a step for the exchange."""
    step = StepCost.linear(0.161, 0.39 * 0.160 / 0.161)
    speculation = Speculation(step, 0.010, 0, Acceptance((a,)))
    assert best_length(speculation.ideal, N_MAX) == length
    assert round(speculation.ideal(length) * 0.160, 2) == speed_up


@pytest.mark.parametrize(
    ("a", "speed_up"), [(0.7, 1.17), (0.8, 1.28), (0.85, 1.35), (0.9, 1.45), (0.95, 1.62), (0.98, 1.80)]
)
def test_the_best_of_taking_turns_for_ling(a: float, speed_up: float) -> None:
    """The project's figures for sequential drafting; they count 1 ms a round beyond drafting and verifying."""
    speculation = ling(a, rtt_s=0.001)
    rate = speculation.sequential(best_length(speculation.sequential, N_MAX))
    assert round(rate / speculation.plain(), 2) == speed_up


# --- against a simulation ---------------------------------------------------------------------------------------------

LING, GPU = StepCost.linear(0.160, 0.39), StepCost.measured({1: 0.00194, 2: 0.00217, 4: 0.00258, 8: 0.00323})

CASES = [
    # step, seconds a drafted token, delay, conditional acceptance by depth, n, wait_for
    (LING, 0.0101, 0.0003, (0.85,), 3, 0),
    (LING, 0.0101, 0.0003, (0.85,), 3, 1),
    (LING, 0.0101, 0.0003, (0.85,), 3, 3),
    (LING, 0.0101, 0.0003, (0.5,), 1, 0),
    (LING, 0.0101, 0.0003, (0.95,), 8, 0),
    (LING, 0.0101, 0.0403, (0.9, 0.8, 0.6), 4, 0),
    (LING, 0.0101, 0.0403, (0.9, 0.8, 0.6), 4, 4),
    (LING, 0.0097, 0.3107, (0.95,), 6, 0),  # a delay of two steps
    (LING, 0.0097, 0.3107, (0.95,), 6, 6),
    (LING, 0.0903, 0.0203, (0.8,), 4, 0),  # a draft hardly quicker than the target
    (LING, 0.0903, 0.0203, (0.8,), 4, 2),
    (LING, 0.1703, 0.0203, (0.9,), 2, 0),  # a slower one, which the target overtakes
    (LING, 0.1703, 0.0203, (0.9,), 2, 1),
    (GPU, 0.00047, 0.00031, (0.8,), 4, 0),
    (GPU, 0.00047, 0.00031, (0.8,), 4, 2),
]


@pytest.mark.parametrize(("step", "draft_s", "rtt_s", "chance", "n", "wait_for"), CASES)
def test_overlapped_is_what_a_simulation_finds(
    step: StepCost, draft_s: float, rtt_s: float, chance: Sequence[float], n: int, wait_for: int
) -> None:
    """Within three standard errors of 20,000 steps."""
    measured = simulate(Machines(step.seconds, draft_s, rtt_s, chance), n, wait_for, steps=1000, runs=20, seed=1)
    predicted = Speculation(step, draft_s, rtt_s, shares(chance)).overlapped(n, wait_for)
    assert measured.error < 0.01 * measured.rate
    assert abs(predicted - measured.rate) <= 3 * measured.error + 1e-3 * measured.rate  # the latter: the cold start


@pytest.mark.parametrize(("step", "draft_s", "rtt_s", "chance", "n", "wait_for"), CASES)
def test_sequential_is_what_a_simulation_finds(
    step: StepCost, draft_s: float, rtt_s: float, chance: Sequence[float], n: int, wait_for: int
) -> None:
    """Within three standard errors of 20,000 rounds."""
    del wait_for
    measured = simulate_sequential(Machines(step.seconds, draft_s, rtt_s, chance), n, rounds=1000, runs=20, seed=1)
    predicted = Speculation(step, draft_s, rtt_s, shares(chance)).sequential(n)
    assert abs(predicted - measured.rate) <= 3 * measured.error


def shares(chance: Sequence[float]) -> Acceptance:
    """From conditional probabilities by depth; deeper ones are as the last."""
    return Acceptance(tuple(itertools.accumulate([*chance, chance[-1]], lambda a, b: a * b)))


# --- overlapping ------------------------------------------------------------------------------------------------------


def test_a_draft_that_keeps_up_makes_a_chain_of_two_states() -> None:
    """Either a full step, or a plain one after a refusal: the rate from the two states' equilibrium."""
    a, n, v0, v = 0.8, 3, 0.160, 0.160 * (1 + 3 * 0.39)
    full = a / (a + 1 - a ** (n + 1))  # from plain to full with a, back with 1 - a^(n+1)
    tokens = full * (1 - a ** (n + 1)) / (1 - a) + (1 - full)
    assert ling(a, rtt_s=0.0003).overlapped(n) == pytest.approx(tokens / (full * v + (1 - full) * v0))


def test_certain_acceptance_makes_every_step_a_full_one() -> None:
    assert ling(1.0).overlapped(4) == pytest.approx(5 / (0.160 * (1 + 4 * 0.39)), rel=1e-3)


def test_a_draft_that_is_never_in_time_changes_nothing() -> None:
    """The target overtakes a draft slower than itself in every step."""
    slow = Speculation(StepCost.linear(0.1, 0.39), 0.11, 0, Acceptance((0.9,)))
    assert slow.overlapped(4) == pytest.approx(slow.plain())
    assert best_length(slow.overlapped, N_MAX) == 0


def test_waiting_pays_where_drafting_is_quick_and_refusals_are_many() -> None:
    """With three of ten proposals refused, Ling decodes plainly so often that even taking turns is faster; waiting 10
    ms for a proposal is faster than both."""
    speculation = ling(0.7, rtt_s=0.0003)
    never, turns, waiting = (
        rate(best_length(rate, N_MAX)) / speculation.plain()
        for rate in (speculation.overlapped, speculation.sequential, lambda n: speculation.overlapped(n, wait_for=n))
    )
    assert (round(never, 2), round(turns, 2), round(waiting, 2)) == (1.15, 1.17, 1.19)


@given(speculations, st.integers(0, N_MAX), st.integers(0, N_MAX))
def test_no_way_of_working_is_faster_than_its_steps(speculation: Speculation, n: int, wait_for: int) -> None:
    """Every rate is positive, and at most the best ratio of tokens to seconds of any step up to that length."""
    limit = max(speculation.acceptance.tokens(k) / speculation.verify_s(k) for k in range(n + 1)) * (1 + 1e-9)
    assert 0 < speculation.sequential(n) <= limit
    assert 0 < speculation.overlapped(n, min(n, wait_for)) <= limit
    assert 0 < speculation.ideal(n) <= limit


@given(speculations)
def test_length_0_is_plain_decoding(speculation: Speculation) -> None:
    for rate in (speculation.sequential, speculation.overlapped, speculation.ideal):
        assert rate(0) == speculation.plain() == pytest.approx(1 / speculation.step.seconds(1))


def test_waiting_for_more_than_is_verified_is_refused() -> None:
    with pytest.raises(ValueError, match="waits for"):
        ling(0.8).overlapped(2, wait_for=3)


@pytest.mark.parametrize(("draft_s", "rtt_s"), [(0.0, 0.0), (-1.0, 0.0), (math.inf, 0.0), (0.1, -0.1), (0.1, math.nan)])
def test_impossible_times_are_refused(draft_s: float, rtt_s: float) -> None:
    with pytest.raises(ValueError, match="drafting takes time"):
        Speculation(LING, draft_s, rtt_s, Acceptance((0.5,)))


# --- the best length --------------------------------------------------------------------------------------------------


@given(speculations, st.integers(0, N_MAX))
def test_the_best_length_is_found_by_brute_force(speculation: Speculation, n_max: int) -> None:
    """No length is faster by more than rounding, and none shorter is as fast."""
    for rate in (speculation.sequential, speculation.overlapped, speculation.ideal):
        best = best_length(rate, n_max)
        rates = [rate(n) for n in range(n_max + 1)]
        assert rates[best] >= max(rates) * (1 - 1e-6)
        assert all(earlier < rates[best] for earlier in rates[:best])


@given(speculations)
def test_nothing_accepted_means_no_speculation(speculation: Speculation) -> None:
    hopeless = Speculation(speculation.step, speculation.draft_s, speculation.rtt_s, Acceptance((0.0,)))
    assert best_length(hopeless.sequential, N_MAX) == best_length(hopeless.overlapped, N_MAX) == 0


def test_the_shortest_of_equal_lengths_is_best() -> None:
    assert best_length(lambda n: (1.0, 2.0, 2.0)[n], 2) == 1
    assert best_length(lambda _: 1.0, 5) == 0


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.39, 0.9999, 1.0])
def test_break_even_finds_the_threshold(threshold: float) -> None:
    found = break_even(lambda a: a >= threshold)
    assert found is not None
    assert 0 <= found - threshold <= 1e-4


def test_there_may_be_no_break_even() -> None:
    assert break_even(lambda _: False) is None


def test_overlapped_pays_from_an_acceptance_of_the_slope_on() -> None:
    """A proposal that is there already pays if it is accepted more often than its row costs."""
    found = break_even(lambda a: best_length(ling(a, 0.0003).overlapped, N_MAX) > 0)
    assert found == pytest.approx(0.39, abs=1e-3)


def test_taking_turns_pays_from_where_one_proposal_does() -> None:
    """(1 + a) steps must be worth 1.39 steps, 10 ms of drafting and 5 ms of delay."""
    found = break_even(lambda a: best_length(ling(a, 0.005).sequential, N_MAX) > 0)
    assert found == pytest.approx(0.39 + 15 / 160, abs=1e-3)
