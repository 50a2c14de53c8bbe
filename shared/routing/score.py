"""What a draft worker is worth to a session: expected committed tokens a second if it drafts. Pure.

`shared/speculation/cost.py` is the model; here it is asked with rounded figures and remembers its answers, since the
same ones are asked for again and again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from shared.speculation.cost import Acceptance, Speculation, StepCost

STEP_PRIOR = StepCost.linear(0.15, 0.39)
"""Of a target that has not said what its steps cost: experts in RAM. Only ratios of scores matter."""
MOST_LENGTH = 16
_NEGLIGIBLE = 0.01
_MOST_ACCEPTANCE = 0.97
"""More is worth hardly more, and nearer to 1 the model takes the longer to compute, up to a second."""
_PATIENCE = 2
"""Lengths without a gain after which no longer one is tried."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """How a worker drafts for a session. token_s: seconds a token. rtt_s: from a verdict to the proposal that answers
    it, without the drafting. shares: as in `Acceptance`. coverage: the share of the text for which it has something to
    propose; the rest is decoded plainly."""

    token_s: float
    rtt_s: float
    shares: tuple[float, ...]
    coverage: float = 1.0


def step_cost(points: Sequence[tuple[int, int]]) -> StepCost:
    """From a verifier's report: (rows, microseconds), the first of one row. Errors: `ValueError`."""
    if not points or points[0][0] != 1 or list(points) != sorted(dict(points).items()):
        raise ValueError("steps are reported by ascending numbers of rows, the first of 1 row")
    seconds: Mapping[int, float] = {rows: max(1, us) / 1e6 for rows, us in points}
    if len(seconds) == 1:
        first = seconds[1]
        return StepCost.linear(_rounded(first), (STEP_PRIOR.seconds(2) - STEP_PRIOR.seconds(1)) / STEP_PRIOR.seconds(1))
    return StepCost.measured({rows: _rounded(value) for rows, value in seconds.items()})


@lru_cache(256)
def beside(step: StepCost, others: int) -> StepCost:
    """The steps of a session that shares them with others, each with a row."""
    if others == 0:
        return step
    return StepCost.measured({rows: step.seconds(rows + others) for rows in (1, 2, 3, 5, 9, MOST_LENGTH + 1)})


def expected_rate(step: StepCost, drafting: Drafting, n_max: int = MOST_LENGTH) -> float:
    """Committed tokens a second with the best length up to n_max; plain decoding is the least."""
    plain = 1 / step.seconds(1)
    best = _best_rate(
        step,
        _rounded(max(drafting.token_s, 1e-6)),
        _rounded(drafting.rtt_s),
        tuple(round(min(share, _MOST_ACCEPTANCE), 2) for share in drafting.shares),
        min(n_max, MOST_LENGTH),
    )
    return 1 / (drafting.coverage / best + (1 - drafting.coverage) / plain)


@lru_cache(4096)
def _best_rate(step: StepCost, token_s: float, rtt_s: float, shares: tuple[float, ...], n_max: int) -> float:
    speculation = Speculation(step, token_s, rtt_s, Acceptance(shares))
    best, at = speculation.plain(), 0
    for n in range(1, n_max + 1):
        rate = speculation.overlapped(n, negligible=_NEGLIGIBLE)
        if rate > best:
            best, at = rate, n
        elif n - at > _PATIENCE:
            break
    return best


def after_prefill(rate: float, plain: float, prefill_s: float, tokens_left: float) -> float:
    """Tokens a second over what is left of a session that decodes plainly until its new worker has read the text."""
    meanwhile = prefill_s * plain
    if meanwhile >= tokens_left:
        return plain
    return tokens_left / (prefill_s + (tokens_left - meanwhile) / rate)


def _rounded(value: float) -> float:
    """To three digits: figures are not better than that, and equal ones are remembered."""
    return float(f"{value:.2e}")
