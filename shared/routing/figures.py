"""What is known of draft workers and sessions: token times by load, prefill, acceptance. All of it fades.

Pure: times are seconds of one monotonic clock, and arguments. Invariant: without news every figure returns to what is
assumed of a worker that was never measured, which is optimistic, so that one that was bad is tried again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from shared.routing.lookup import LookupFigures

ACCEPTANCE_PRIOR = {"garbage": 0.05}
MODEL_ACCEPTANCE_PRIOR = 0.8
"""Of a model's proposals, until some were judged."""
TOKEN_PRIOR_S = {"numpy": 0.05, "ngram": 0.0001, "garbage": 0.0001}
"""Seconds a token that a worker of this engine is believed to take at first."""
MODEL_TOKEN_PRIOR_S = 0.01
PREFILL_PRIOR = 1000.0
"""Prompt tokens a second, at first."""
LOAD_PRIOR = 0.3
"""By how much each further session lengthens a token, relative to one session, until measured."""
MODELLESS = frozenset({"ngram", "garbage"})
"""Engines that read no prompt, and may have nothing to propose."""

_STALE_S = 120.0
_TIME_HALF_LIFE_S, _MOST_TOKENS, _PRIOR_TOKENS = 120.0, 64.0, 2.0
_TRIAL_HALF_LIFE_S, _MOST_TRIALS, _PRIOR_TRIALS = 600.0, 512.0, 8.0
_SESSION_HALF_LIFE_S, _MOST_SESSION_TRIALS, _SESSION_PRIOR_TRIALS = 300.0, 128.0, 16.0
_MOST_PREFILL, _PRIOR_PREFILL = 20_000.0, 64.0


class FadingMean:
    """A mean in which what was observed halves with every half_life_s, and with more than `most` of newer weight."""

    def __init__(self, half_life_s: float, most: float) -> None:
        self._half_life_s = half_life_s
        self._most = most
        self._weight = 0.0
        self._mean = 0.0
        self.observed_at: float | None = None

    def observe(self, value: float, weight: float, now: float) -> None:
        """So many observations had this mean."""
        old = min(self.weight(now), max(0.0, self._most - weight))
        self._weight = old + weight
        self._mean += (value - self._mean) * weight / self._weight
        self.observed_at = now

    def weight(self, now: float) -> float:
        if self.observed_at is None:
            return 0.0
        return self._weight * math.pow(0.5, max(0.0, now - self.observed_at) / self._half_life_s)

    def value(self, now: float, prior: float, prior_weight: float) -> float:
        """The mean, in which the prior counts as so many observations."""
        weight = self.weight(now)
        return (weight * self._mean + prior_weight * prior) / (weight + prior_weight)


class TokenTimes:
    """Seconds a token of one session, by how many sessions the worker has.

    Each number of sessions has a mean of its own; the others speak for it too, the less the further away they are, with
    the prior's slope in between.
    """

    def __init__(self) -> None:
        self._by_load: dict[int, FadingMean] = {}

    def observe(self, seconds: float, n_tokens: int, load: int, now: float) -> None:
        mean = self._by_load.get(load)
        if mean is None:
            mean = self._by_load[load] = FadingMean(_TIME_HALF_LIFE_S, _MOST_TOKENS)
        mean.observe(seconds, n_tokens, now)

    def seconds(self, load: int, now: float, prior: float) -> float:
        load = max(1, load)
        total, weights = _PRIOR_TOKENS * prior * _slowed(load), _PRIOR_TOKENS
        for other, mean in self._by_load.items():
            weight = mean.weight(now) / (1 + abs(other - load)) ** 2
            total += weight * mean.value(now, 0.0, 0.0 if weight else 1.0) * _slowed(load) / _slowed(other)
            weights += weight
        return total / weights


def _slowed(load: int) -> float:
    return 1 + LOAD_PRIOR * (load - 1)


class WorkerFigures:
    """What is known of one draft worker. engine: as it says itself.

    What a worker says of its own time is believed only as far as its proposals arrive that fast.
    """

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.rtt_s: float | None = None
        self._reported = TokenTimes()
        self._spacing = TokenTimes()
        self._prefill = FadingMean(_TRIAL_HALF_LIFE_S, _MOST_PREFILL)  # seconds a token
        self._acceptance = FadingMean(_TRIAL_HALF_LIFE_S, _MOST_TRIALS)

    @property
    def _usual_acceptance(self) -> float:
        return ACCEPTANCE_PRIOR.get(self.engine, MODEL_ACCEPTANCE_PRIOR)

    @property
    def _usual_token_s(self) -> float:
        return TOKEN_PRIOR_S.get(self.engine, MODEL_TOKEN_PRIOR_S)

    @property
    def modelless(self) -> bool:
        return self.engine in MODELLESS

    @property
    def looks_up(self) -> bool:
        """Whether it drafts by prompt lookup."""
        return self.engine == "ngram"

    def drafted(self, n_tokens: int, seconds: float, load: int, now: float) -> None:
        """A proposal of so many tokens says that they took so long."""
        self._reported.observe(seconds / n_tokens, n_tokens, load, now)

    def arrived(self, n_tokens: int, spacing_s: float, load: int, now: float) -> None:
        """So many tokens arrived so long after those before them, and nothing else held them up."""
        self._spacing.observe(spacing_s / n_tokens, n_tokens, load, now)

    def prefilled(self, n_tokens: int, seconds: float, now: float) -> None:
        self._prefill.observe(seconds / n_tokens, n_tokens, now)

    def judged(self, hits: int, trials: int, now: float) -> None:
        """So many of the proposals whose predecessors were right were right too."""
        self._acceptance.observe(hits / trials, trials, now)

    def token_s(self, load: int, now: float) -> float:
        """Seconds a token of one session, when the worker has `load` sessions."""
        usual = self._usual_token_s
        return max(self._reported.seconds(load, now, usual), self._spacing.seconds(load, now, usual))

    def prefill_s(self, n_tokens: int, now: float) -> float:
        """Seconds until it has read so many tokens."""
        if self.modelless:
            return 0.0
        return n_tokens * self._prefill.value(now, 1 / PREFILL_PRIOR, _PRIOR_PREFILL)

    def has_prefilled(self) -> bool:
        """Whether its prefill was ever measured; short prompts do not tell."""
        return self._prefill.observed_at is not None

    def acceptance(self, now: float) -> float:
        """The probability that a proposal is right, given that those before it were."""
        return self._acceptance.value(now, self._usual_acceptance, _PRIOR_TRIALS)

    def n_trials(self, now: float) -> float:
        """How many judged proposals stand behind the acceptance."""
        return self._acceptance.weight(now)

    def measured(self) -> bool:
        """Whether any proposal of it was judged."""
        return self._acceptance.observed_at is not None

    def stale(self, now: float) -> bool:
        """Whether its figures are old or missing."""
        judged_at = self._acceptance.observed_at
        return judged_at is None or now - judged_at > _STALE_S

    def hopeful(self, now: float) -> tuple[float, float]:
        """Seconds a token and acceptance, as good as they may have become since they were measured."""
        return min(self._usual_token_s, self.token_s(1, now)), max(self._usual_acceptance, self.acceptance(now))


@dataclass(slots=True)
class SessionFigures:
    """What is known of one session. by_worker: acceptance of those that have drafted for it. lookup: how prompt lookup
    would have fared so far, None where no worker does it."""

    by_worker: dict[str, FadingMean] = field(default_factory=dict)
    lookup: LookupFigures | None = None

    def judged(self, worker: str, hits: int, trials: int, now: float) -> None:
        mean = self.by_worker.get(worker)
        if mean is None:
            mean = self.by_worker[worker] = FadingMean(_SESSION_HALF_LIFE_S, _MOST_SESSION_TRIALS)
        mean.observe(hits / trials, trials, now)

    def ease(self, known: Mapping[str, WorkerFigures], now: float) -> float:
        """How much easier than usual this text is to draft, in logits, by those that have drafted it."""
        shifts = total = 0.0
        for name, mean in self.by_worker.items():
            figures = known.get(name)
            if figures is None or figures.modelless:
                continue
            usual, weight = figures.acceptance(now), mean.weight(now)
            shifts += weight * (_logit(mean.value(now, usual, _SESSION_PRIOR_TRIALS)) - _logit(usual))
            total += weight
        return shifts / total if total else 0.0

    def acceptance(self, worker: str, usual: float, ease: float, now: float) -> float:
        """Of a worker's proposals for this session: what it has shown here, on top of what is usual."""
        prior = 1 / (1 + math.exp(-_logit(usual) - ease))
        mean = self.by_worker.get(worker)
        return prior if mean is None else mean.value(now, prior, _SESSION_PRIOR_TRIALS)


def _logit(probability: float) -> float:
    bounded = min(max(probability, 0.001), 0.999)
    return math.log(bounded / (1 - bounded))
