"""How many proposals a step verifies, and whether it waits for more: what brings most tokens a second.

Learns online what a step costs by its rows, how often proposals of a given confidence are accepted, and when the next
ones arrive. Pure: times come in as arguments, in seconds of one monotonic clock.

The rule is that of average reward: with `rate` the tokens a second reached so far, a step that takes s seconds must
bring more than rate * s tokens to be worth its time. So the proposals verified are those that maximize

    sum of reach - rate * cost(rows)        reach: the probability that a proposal and all before it are accepted

over all sessions of the step, and a step waits w seconds for further ones only if they add more than
rate * (w + their rows' cost). A rate that is too low at first chooses lengths that raise it, until nothing better is
left (policy iteration for semi-Markov decisions, Howard 1971).

Invariant: whatever it says changes speed alone.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

PRIOR_SLOPE = 0.3
"""What a further row costs relative to the first one, until two numbers of rows have been measured."""
_STEP_DECAY = 0.995  # of old steps, for the line
_OUTLIER = 2.0  # times the mean: longer steps count as so long
_BUCKET_TRUST = 3.0  # steps that the line counts for, beside those of just so many rows
# Confidences are told apart by these, and depths up to the third; trials that a prior counts for.
_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
_UNKNOWN = len(_EDGES) + 1
_DEPTHS = 3
_PRIOR_TRIALS = 4.0
_PARENT_TRIALS = 8.0
_MOST_TRIALS = 256.0  # then the older ones count half
_DOUBT = 1.6
_ARRIVAL_SHARE = 0.2  # of the newest arrival in what is usual
_RATE_DECAY = 0.98  # of old steps, for the rate
_AHEAD = 8
"""Proposals that waiting looks ahead."""
_EXPLORE_EVERY = 64
"""Steps after which a proposal is verified though none seems to pay."""


class StepCosts:
    """Seconds of a step by its rows.

    A line fitted to all steps, and the mean of the steps with just so many rows where there were some: what a row costs
    is not the same everywhere, as with products that take eight at a time. Old steps fade.
    """

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0
        self._means: dict[int, tuple[float, float]] = {}  # weight, seconds
        self._tried: set[int] = set()

    @property
    def known(self) -> bool:
        return self._weight > 0

    def observe(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took `seconds`.

        The first one of so many rows does not count, since engines prepare themselves then; what is far longer than the
        others counts in part.
        """
        if rows not in self._tried:
            self._tried.add(rows)
            return
        weight, mean = self._means.get(rows, (0.0, 0.0))
        if weight >= 1:
            seconds = min(seconds, _OUTLIER * mean)
        weight = weight * 0.98 + 1
        self._means[rows] = weight, mean + (seconds - mean) / weight
        for name, value in (
            ("_weight", 1.0),
            ("_rows", rows),
            ("_seconds", seconds),
            ("_rows_rows", rows * rows),
            ("_rows_seconds", rows * seconds),
        ):
            setattr(self, name, getattr(self, name) * _STEP_DECAY + value)

    def seconds(self, rows: int) -> float:
        """Expected of a step of `rows` rows; 0 before anything is known."""
        if not self.known:
            return 0.0
        base, slope = self._line()
        linear = base + slope * rows
        weight, mean = self._means.get(rows, (0.0, 0.0))
        return (weight * mean + _BUCKET_TRUST * linear) / (weight + _BUCKET_TRUST)

    def points(self, most: int) -> tuple[tuple[int, int], ...]:
        """(rows, microseconds) of 1, 2, 4, ... up to `most` rows, which do not fall; none before anything is known."""
        points: list[tuple[int, int]] = []
        rows = 1
        while self.known and rows <= most:
            points.append((rows, max(1, round(1e6 * self.seconds(rows)), points[-1][1] if points else 0)))
            rows *= 2
        return tuple(points)

    def _line(self) -> tuple[float, float]:
        """Seconds = first + second * rows, neither negative."""
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows_rows / self._weight - rows * rows
        if spread < 0.05:
            # Of one number of rows alone nothing can be told.
            first = seconds / (1 + PRIOR_SLOPE * (rows - 1))
            return first * (1 - PRIOR_SLOPE), first * PRIOR_SLOPE
        slope = (self._rows_seconds / self._weight - rows * seconds) / spread
        slope = min(max(slope, 0.0), seconds / rows)
        return seconds - slope * rows, slope


class Calibration:
    """How often proposals are accepted, given that those before them were, by the draft's confidence and the depth.

    parent: what holds for other sessions, believed until this one has seen enough; without one, the confidence itself.
    """

    def __init__(self, parent: Calibration | None = None) -> None:
        self._parent = parent
        self._counts: dict[tuple[int, int], tuple[float, float]] = {}  # trials, accepted

    def observe(self, depth: int, confidence: float | None, accepted: bool) -> None:
        """The proposal at `depth` (0: the first) was decided, and all before it were accepted."""
        key = _key(depth, confidence)
        trials, successes = self._counts.get(key, (0.0, 0.0))
        if trials >= _MOST_TRIALS:
            trials, successes = trials / 2, successes / 2
        self._counts[key] = trials + 1, successes + accepted
        if self._parent is not None:
            self._parent.observe(depth, confidence, accepted)

    def probability(self, depth: int, confidence: float | None) -> float:
        """That a proposal is accepted if those before it are."""
        trials, successes = self._counts.get(_key(depth, confidence), (0.0, 0.0))
        if self._parent is not None:
            prior, strength = self._parent.probability(depth, confidence), _PARENT_TRIALS
        else:
            prior, strength = 0.5 if confidence is None else confidence, _PRIOR_TRIALS
        return (successes + strength * prior) / (trials + strength)

    def hopeful(self, depth: int, confidence: float | None) -> float:
        """The same, with the benefit of the doubt for proposals without a confidence: what has seldom been seen would
        else never be, as it is verified only if it is believed in (optimism in the face of uncertainty, Lai and Robbins
        1985). Soon gone: it costs rows. A confidence needs none, being something to begin with.
        """
        if confidence is not None:
            return self.probability(depth, confidence)
        known = self if self._parent is None else self._parent
        trials, _ = known._counts.get(_key(depth, None), (0.0, 0.0))
        return min(1.0, self.probability(depth, None) + _DOUBT / (trials + _PRIOR_TRIALS))

    def typical(self, depth: int) -> float:
        """Of a proposal that is not there yet, whatever its confidence will be."""
        trials, successes = self._sums(depth)
        if self._parent is None:
            return (successes + _PRIOR_TRIALS * 0.5) / (trials + _PRIOR_TRIALS)
        prior = self._parent.typical(depth)
        return (successes + _PARENT_TRIALS * prior) / (trials + _PARENT_TRIALS)

    def _sums(self, depth: int) -> tuple[float, float]:
        own = [counts for (group, _), counts in self._counts.items() if group == min(depth, _DEPTHS - 1)]
        return sum(t for t, _ in own), sum(s for _, s in own)


def _key(depth: int, confidence: float | None) -> tuple[int, int]:
    return min(depth, _DEPTHS - 1), _UNKNOWN if confidence is None else bisect_right(_EDGES, confidence)


class Arrivals:
    """When a session's next proposals come: so long after a commit that contradicts the draft, or after the last ones.

    Both as they usually are; how often they came in time says whether to believe it. Events may be told late, after
    others that they came before: proposals that arrive during a step are seen when it has ended.
    """

    def __init__(self) -> None:
        self.restart_s: float | None = None
        """From a commit that contradicted the draft to its first new proposal."""
        self.token_s: float | None = None
        """Between proposals."""
        self.kept = 1.0
        """The share of expected arrivals that came while a step waited for them."""
        self._since: float | None = None
        self._after_commit = True
        self._last_commit: float | None = None

    def commit(self, at_s: float, contradicted: bool, left: int) -> None:
        """Tokens became final, which may contradict proposals; `left` still wait."""
        self._last_commit = at_s
        if contradicted:
            self._since, self._after_commit = at_s, True
        elif left:
            self._since = None  # how far the draft has come in the meantime is not known

    def stale(self, at_s: float) -> None:
        """Proposals came that the last commit had contradicted, though none were known then."""
        if self._last_commit is not None and at_s < self._last_commit:
            self._since, self._after_commit = self._last_commit, True

    def arrive(self, at_s: float, n: int) -> None:
        """n new proposals."""
        # What had arrived when the tokens became final does not answer them.
        if self._since is not None and at_s >= self._since:
            passed = at_s - self._since
            if self._after_commit:
                self.restart_s = _towards(self.restart_s, passed)
            else:
                self.token_s = _towards(self.token_s, passed / n)
        self._since, self._after_commit = at_s, False

    def waited(self, came: bool) -> None:
        self.kept += _ARRIVAL_SHARE * (came - self.kept)

    @property
    def slack_s(self) -> float:
        """How much later than usual a proposal may come and is still waited for."""
        usual = self.restart_s if self._after_commit else self.token_s
        return 0.5 * (usual or 0.0) + 0.0005

    def expected(self, now_s: float) -> float | None:
        """Seconds until the next proposal; None: not known, or overdue."""
        usual = self.restart_s if self._after_commit else self.token_s
        if usual is None or self._since is None:
            return None
        left = self._since + usual - now_s
        return max(0.0, left) if left > -self.slack_s else None


def _towards(old: float | None, new: float) -> float:
    return new if old is None else old + _ARRIVAL_SHARE * (new - old)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A session that decodes in the next step.

    reach: of each proposal that may be verified, in order: the probability that it and all before it are accepted.
    next_s: until the next proposal arrives, None where nothing is expected. token_s: between further ones. typical:
    acceptance of those. kept: how often arrivals kept their time. room: proposals beyond `reach` that might still be
    verified. least: where fewer would be verified, none are.
    """

    reach: Sequence[float]
    next_s: float | None = None
    token_s: float = 0.0
    typical: float = 0.5
    kept: float = 1.0
    room: int = 0
    least: int = 0


class LengthController:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.calibration = Calibration()
        self._tokens = 0.0
        self._seconds = 0.0
        self._steps = 0

    @property
    def rate(self) -> float:
        """Tokens a second reached lately, by all sessions; at first that of plain decoding, 0 before any step."""
        if self._seconds > 0:
            return self._tokens / self._seconds
        return 1 / self.costs.seconds(1) if self.costs.known else 0.0

    def observe(self, rows: int, seconds: float, tokens: int, elapsed_s: float) -> None:
        """A step of decoding sessions alone: its rows, what it took, committed tokens, and the time since the last one
        ended, waiting included."""
        self.costs.observe(rows, seconds)
        self._tokens = self._tokens * _RATE_DECAY + tokens
        self._seconds = self._seconds * _RATE_DECAY + elapsed_s
        self._steps += 1

    def choose(self, sessions: Sequence[Candidate], room: int) -> list[int]:
        """How many proposals of each session the next step verifies.

        room: rows of the step beyond one for each session.
        """
        best, left = [0] * len(sessions), room
        if not self.costs.known:
            # Without a figure what is there is verified, which gives one.
            for i, session in enumerate(sessions):
                there = min(len(session.reach), left)
                best[i] = there if there >= session.least else 0
                left -= best[i]
            return best
        rate, rows = self.rate, len(sessions)
        heap = [(-session.reach[0], i) for i, session in enumerate(sessions) if session.reach]
        heapq.heapify(heap)
        tried, gain, most = best.copy(), 0.0, 0.0
        cost = highest = self.costs.seconds(rows)
        while heap and left > 0:
            reach, i = heapq.heappop(heap)
            tried[i] += 1
            rows += 1
            left -= 1
            highest = max(highest, self.costs.seconds(rows))
            gain -= reach
            if gain - rate * (highest - cost) > most:
                most, best = gain - rate * (highest - cost), tried.copy()
            if tried[i] < len(sessions[i].reach):
                heapq.heappush(heap, (-sessions[i].reach[tried[i]], i))
        for i, session in enumerate(sessions):
            if 0 < best[i] < session.least:
                best[i] = 0  # the request wants so many or none
        if sum(best) == 0 and self._steps % _EXPLORE_EVERY == 0:
            # What is never tried is never known to have become worth it.
            first = max(range(len(sessions)), key=lambda i: max(sessions[i].reach, default=0.0), default=None)
            if first is not None and max(1, sessions[first].least) <= min(room, len(sessions[first].reach)):
                best[first] = max(1, sessions[first].least)
        return best

    def patience(self, sessions: Sequence[Candidate], lengths: Sequence[int], room: int) -> tuple[float, int] | None:
        """How long the step should wait for a proposal, in seconds, and of which session; None: it should go."""
        rate, rows = self.rate, len(sessions) + sum(lengths)
        if rate <= 0:
            return None
        best: tuple[float, float, int] | None = None
        cost = self.costs.seconds(rows)
        for i, (session, length) in enumerate(zip(sessions, lengths, strict=True)):
            if session.next_s is None or length < len(session.reach):
                continue
            reach = session.reach[-1] if session.reach else 1.0
            gain, wait = 0.0, session.next_s
            for ahead in range(1, min(_AHEAD, session.room, room - sum(lengths)) + 1):
                reach *= session.typical
                gain += reach
                worth = session.kept * gain - rate * (wait + max(0.0, self.costs.seconds(rows + ahead) - cost))
                if worth > 0 and (best is None or worth > best[0]):
                    best = worth, session.next_s, i
                wait += session.token_s
        return None if best is None else (best[1], best[2])
