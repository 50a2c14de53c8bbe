"""What speculation costs and brings: tokens/s from the cost of a step, the draft's speed, the delay and the acceptance.

Owns no state and does no I/O. Times are seconds, rates tokens/s, and a *length* n is the number of proposals that a
step verifies: n + 1 rows, the last committed token first. Invariant: length 0 is plain decoding, at the same rate in
every way of working.

A proposal counts only if all before it were accepted. With `reach(d)` the probability that the first d are, a step of
length n commits sum(reach(d) for d in 0..n) tokens, the recovered or bonus token included; that is
(1 - a^(n+1)) / (1 - a) if each is accepted with probability a (Leviathan et al. 2023, equation 1).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MOST_STEPS = 10_000
"""A run of steps without a restart is cut here, as if a proposal had been refused. Only near an acceptance of 1 are
runs so long, and one restart in so many steps hardly changes a rate."""

NEGLIGIBLE = 1e-9
"""The probability of a longer run at which it is left out; also the relative difference that is none."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one pass of the target, with all its rows read and decided, by the number of its rows.

    points: (rows, seconds), both ascending, the first of 1 row, at least two; linear between and beyond them.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        rows, seconds = [r for r, _ in self.points], [s for _, s in self.points]
        if len(rows) < 2 or rows[0] != 1 or rows != sorted(set(rows)):
            raise ValueError("the cost of a step is given for 1 row, then for more, in ascending order")
        if not (seconds[0] > 0 and math.isfinite(seconds[-1]) and seconds == sorted(seconds)):
            raise ValueError("seconds of a step are positive and do not fall with its rows")

    @classmethod
    def linear(cls, base_s: float, slope: float) -> StepCost:
        """One row takes base_s, each further one slope * base_s more.

        Where experts are read from RAM a slope of 0.39 was measured (Qwen3-Coder-480B-A35B, Ling-1T). 0: further rows
        are free, as for a dense model that is bound by reading its weights; 1: they cost as much as steps of their own.
        """
        return cls(((1, base_s), (2, base_s * (1 + slope))))

    @classmethod
    def measured(cls, seconds_by_rows: Mapping[int, float]) -> StepCost:
        """From a table, such as the medians of `draftwire bench engine`.

        A pass that was measured as quicker than one of fewer rows counts as equal to it: a policy must not ask for
        useless rows because of noise.
        """
        points, most = [], 0.0
        for rows, seconds in sorted(seconds_by_rows.items()):
            most = max(most, seconds)
            points.append((rows, most))
        return cls(tuple(points))

    def seconds(self, rows: int) -> float:
        """Of a pass with so many rows, at least 1."""
        right = min(max(1, bisect_left(self.points, rows, key=lambda point: point[0])), len(self.points) - 1)
        (rows_0, seconds_0), (rows_1, seconds_1) = self.points[right - 1], self.points[right]
        return seconds_0 + (seconds_1 - seconds_0) * (rows - rows_0) / (rows_1 - rows_0)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How far into a step's proposals the target agrees.

    shares: for depth 1, 2, ..., the share of the steps that accept the proposal at this depth, and so all before it
    too, as `draft_by_depth` and `draftwire bench acceptance` count. Beyond the list it goes on falling by the last
    factor, so that a single value is the acceptance of every proposal, independent of the others (i.i.d.).
    """

    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError("acceptance is one or more probabilities, each from 0 to 1")
        if list(self.shares) != sorted(self.shares, reverse=True):
            raise ValueError(
                "it cannot rise with the depth, since a proposal counts only if those before it were accepted"
            )

    def reach(self, depth: int) -> float:
        """The probability that the first `depth` proposals of a step are all accepted."""
        if depth == 0:
            return 1.0
        known = len(self.shares)
        if depth <= known:
            return self.shares[depth - 1]
        before = self.shares[-2] if known > 1 else 1.0
        return self.shares[-1] * (self.shares[-1] / before) ** (depth - known) if before else 0.0

    def tokens(self, n: int) -> float:
        """Expected committed tokens of a step that verifies n proposals, the recovered or bonus token included."""
        return math.fsum(self.reach(depth) for depth in range(n + 1))


@dataclass(frozen=True, slots=True)
class Speculation:
    """One session, a target and a draft on machines of their own.

    step: of the target. draft_s: seconds a proposed token. rtt_s: from a verdict to the arrival of a proposal that
    answers it, without the drafting: both ways between verifier and draft worker, half of it each.
    """

    step: StepCost
    draft_s: float
    rtt_s: float
    acceptance: Acceptance

    def __post_init__(self) -> None:
        if not 0 < self.draft_s < math.inf or not 0 <= self.rtt_s < math.inf:
            raise ValueError("drafting takes time, and a delay is not negative")

    def verify_s(self, n: int) -> float:
        """Seconds of a step that verifies n proposals."""
        return self.step.seconds(n + 1)

    def plain(self) -> float:
        """Tokens/s without speculation."""
        return 1 / self.verify_s(0)

    def sequential_round_s(self, n: int) -> float:
        """Seconds of a round in which target and draft take turns: draft n tokens, verify them, and the delay."""
        return n * self.draft_s + self.rtt_s + self.verify_s(n) if n else self.verify_s(0)

    def sequential(self, n: int) -> float:
        """Tokens/s when target and draft take turns, as in llama-server."""
        return self.acceptance.tokens(n) / self.sequential_round_s(n)

    def ideal(self, n: int) -> float:
        """Tokens/s if a refused proposal cost the draft no time: it always has n proposals of the right text ready.

        A round takes max(n draft_s, verify_s(n)). With a draft that keeps up, no way of working with lengths that do
        not look at the tokens is faster than the best n of this; lengths that follow the draft's confidence can be.
        """
        if n == 0:
            return self.plain()
        return self.acceptance.tokens(n) / max(n * self.draft_s, self.verify_s(n))

    def overlapped(self, n: int, wait_for: int = 0, negligible: float = NEGLIGIBLE) -> float:
        """Tokens/s when the draft goes on while the target verifies.

        A step begins when the one before it has ended and `wait_for` proposals (0 to n) have arrived, and verifies
        those that have, at most n. With `wait_for` 0 the target never waits: it decodes plainly until proposals
        arrive.

        The model. The draft works without a pause, a token every draft_s, and each leaves at once. A verdict on k
        proposals commits up to k + 1 tokens. If all k were accepted, the draft's own next token stands against the
        bonus token and is equal with the same probability as if it had been verified as proposal k + 1, so that the
        draft's text is still the committed one with probability reach(k + 1); its tokens that have arrived, or are
        under way, stay good. Otherwise everything it has drafted is void: rtt_s / 2 after the verdict the draft hears
        of it, drops the token that it is at, and starts again from the committed text, so that proposal j of the new
        run arrives rtt_s + j draft_s after the verdict. The same happens when the target overtakes the draft, that is,
        commits a token that the draft has not drafted when it hears of it.

        So the process renews itself with each restart, and between two of them every time is fixed: how many proposals
        each step finds depends only on the time since. What is summed here are tokens and seconds of one such run, each
        step weighted with the probability that the run gets that far; their quotient is the long-term rate
        (renewal-reward theorem).

        Assumed: acceptance depends on the depth in the step alone; times are constant; the draft's window never stops
        it, for which 2 n + 1 tokens are enough where drafting is faster than verifying.

        negligible: the probability at which a long run is left out; 0.01 takes a tenth of the time and is as good where
        the figures are estimates.
        """
        if not 0 <= wait_for <= n:
            raise ValueError("a step waits for 0 to n proposals")
        if n == 0:
            return self.plain()
        tokens_of = [self.acceptance.tokens(k) for k in range(n + 1)]
        tokens = seconds = now = 0.0  # now: since the verdict that made the draft start again
        used = 0  # tokens committed since, in step with those that the draft drafted
        probability = 1.0
        for _ in range(MOST_STEPS):
            begin = now
            arrived = max(0, self._drafted(now - self.rtt_s) - used)
            if arrived < wait_for:
                begin, arrived = self.rtt_s + (used + wait_for) * self.draft_s, wait_for
            k = min(arrived, n)
            end = begin + self.verify_s(k)
            tokens += probability * tokens_of[k]
            seconds += probability * (end - now)
            now, used = end, used + k + 1
            probability *= self.acceptance.reach(k + 1)
            if probability < negligible or self._drafted(now) < used:
                break
        return tokens / seconds

    def _drafted(self, elapsed: float) -> int:
        """Tokens that the draft completes in a time; one that is complete at its very end counts."""
        return int(max(0.0, elapsed) / self.draft_s + NEGLIGIBLE)


def best_length(rate: Callable[[int], float], n_max: int) -> int:
    """The length from 0 to n_max with the highest rate, the shortest of equals; 0: speculation does not pay."""
    best, highest = 0, rate(0)
    for n in range(1, n_max + 1):
        if (value := rate(n)) > highest * (1 + NEGLIGIBLE):
            best, highest = n, value
    return best


def break_even(pays: Callable[[float], bool]) -> float | None:
    """The least acceptance, to 0.0001, from which on speculation pays; None if it does not even at 1.

    Args:
        pays: whether it does at an acceptance; once it does, so it must at every higher one.
    """
    low, high = 0.0, 1.0
    if not pays(high):
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        if pays(middle):
            high = middle
        else:
            low = middle
    return high
