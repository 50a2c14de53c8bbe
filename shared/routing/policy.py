"""Who serves a session: which verifier, which draft worker, and when it is worth changing. Pure: values in, a name out.

The worth of a worker is what `shared/routing/score.py` expects of it for this session. Invariant: a choice depends on
the candidates, not on their order; only `explore` brings in chance, which is given.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.routing.figures import SessionFigures, WorkerFigures
from shared.routing.lookup import PRIOR
from shared.routing.score import MOST_LENGTH, STEP_PRIOR, Drafting, after_prefill, expected_rate
from shared.speculation.cost import StepCost

MARGIN = 0.1
"""By how much a move must pay, relative to staying: less is within what figures are wrong by."""
REVIEW_COMMITS = 32
"""Commits of a session after which its worker is considered again; twice as many after each move, up to the most."""
MOST_REVIEW_COMMITS = 512
LOOKUP_COMMITS = 8
"""The same between a model and prompt lookup, where what decides is seen in the text itself."""
TRIAL_COMMITS = 16
"""The same for a session that tries a worker."""
SOON_COMMITS = 8
"""The same when a worker has come or has changed: not at once, as the figures of the first tokens are noise."""
MOST_TOKENS_LEFT = 512
"""What a move has to pay within: most generations end before their limit."""
_LEAST_FOR_TRIAL = 64


@dataclass(frozen=True, slots=True)
class Candidate:
    """A draft worker that may serve a session. n_others: sessions that it has beside this one."""

    instance: str
    figures: WorkerFigures
    n_others: int
    n_slots: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A session that needs a worker.

    wanted: "auto", "none" or an instance's name. n_tokens: that a worker must read. tokens_left: still to generate.
    ease: how much easier than usual it is to draft for, in logits. step: what the target's steps cost it. target_rtt_s:
    between router and verifier. hidden_s: of a worker's prefill, the part that hides behind the target's own.
    """

    wanted: str = "auto"
    figures: SessionFigures = field(default_factory=SessionFigures)
    n_tokens: int = 0
    tokens_left: int = MOST_TOKENS_LEFT
    n_max: int = MOST_LENGTH
    ease: float = 0.0
    step: StepCost = STEP_PRIOR
    target_rtt_s: float = 0.0
    hidden_s: float = 0.0

    @property
    def plain(self) -> float:
        return 1 / self.step.seconds(1)


@dataclass(frozen=True, slots=True)
class Choice:
    """A worker for a session. rate: tokens a second expected with it. plain: without one. why: in words."""

    instance: str
    rate: float
    plain: float
    why: str
    trial: bool = False

    @property
    def speed_up(self) -> float:
        return self.rate / self.plain


class Policy:
    """See the module's docstring.

    Args:
        explore: the share of new sessions that try a worker whose figures are old or missing; may be changed.
        chance: decides which.
    """

    def __init__(self, explore: float, chance: random.Random) -> None:
        self.explore = explore
        self._chance = chance

    def first(self, asked: Asked, candidates: Sequence[Candidate], now: float) -> Choice | None:
        """The worker for a session that has none; None: there is none for it, and it decodes plainly.

        Candidates are those that are alive, match the target's vocabulary and have not just refused this session. Of
        those with a free slot, the one with the highest expected rate. Where rates are equal the nearest, one that was
        not measured yet last, then the less busy one, then by name.
        """
        if asked.wanted == "none":
            return None
        free = [c for c in candidates if c.n_others < c.n_slots and asked.wanted in ("auto", c.instance)]
        if not free:
            return None
        rates = {c.instance: self._after_move(asked, c, now, asked.hidden_s) for c in free}
        best = min(free, key=lambda c: _order(rates[c.instance] / asked.plain, c))
        if asked.wanted != "auto":
            return Choice(best.instance, rates[best.instance], asked.plain, "the request names it")
        if (trial := self._trial(asked, free, best, rates[best.instance], now)) is not None:
            return trial
        why = "fastest" if len(free) > 1 else "the only one free"
        return Choice(best.instance, rates[best.instance], asked.plain, why)

    def _trial(
        self, asked: Asked, free: Sequence[Candidate], best: Candidate, rate: float, now: float
    ) -> Choice | None:
        if self.explore == 0 or self._chance.random() >= self.explore or asked.tokens_left < _LEAST_FOR_TRIAL:
            return None
        hopes = {
            c.instance: self._after_move(asked, c, now, asked.hidden_s, hopeful=True)
            for c in free
            if c is not best and c.n_others == 0 and c.figures.stale(now)
        }
        name = max(sorted(hopes), key=hopes.__getitem__, default=None)
        if name is None or hopes[name] <= rate * (1 + MARGIN):
            return None
        return Choice(name, hopes[name], asked.plain, "a trial, its figures are old", trial=True)

    def again(self, asked: Asked, current: Candidate, candidates: Sequence[Candidate], now: float) -> Choice | None:
        """The worker that a session should move to; None: it should stay.

        A move costs the reading of the session's tokens, during which it decodes plainly; one from a model to prompt
        lookup costs it when the session comes back. A worker that nothing is
        known of gets one session first.
        """
        if asked.wanted != "auto":
            return None
        stay = expected_rate(asked.step, self.drafting(asked, current, now), asked.n_max)
        open_to_all = [
            c
            for c in candidates
            if c.instance != current.instance
            and c.n_others < c.n_slots
            and (c.figures.measured() or c.figures.modelless or c.n_others == 0)
        ]
        if not open_to_all:
            return None
        # A text may not be a copy for long, so that the way back from lookup, which is the reading of it, counts too.
        back_s = current.figures.prefill_s(asked.n_tokens, now)
        rates = {
            c.instance: self._after_move(asked, c, now, 0.0, back_s=back_s if c.figures.looks_up else 0.0)
            for c in open_to_all
        }
        best = min(open_to_all, key=lambda c: _order(rates[c.instance] / asked.plain, c))
        rate = rates[best.instance]
        if rate <= stay * (1 + MARGIN):
            return None
        why = f"faster than {current.instance}: {rate / asked.plain:.2f}x instead of {stay / asked.plain:.2f}x"
        return Choice(best.instance, rate, asked.plain, why)

    def rate(self, asked: Asked, candidate: Candidate, now: float) -> float:
        """Tokens a second expected of a worker that has read the session's tokens."""
        return expected_rate(asked.step, self.drafting(asked, candidate, now), asked.n_max)

    def drafting(self, asked: Asked, candidate: Candidate, now: float) -> Drafting:
        """How a worker is expected to draft for a session."""
        figures = candidate.figures
        load = candidate.n_others + 1
        rtt_s = (figures.rtt_s or 0.0) + asked.target_rtt_s
        token_s = figures.token_s(load, now)
        if figures.looks_up:
            lookup = asked.figures.lookup
            shares = PRIOR if lookup is None else lookup.shares()
            # What the shadow says, unless the worker's own proposals were worse than the shadow's.
            shown = asked.figures.acceptance(candidate.instance, shares.lasting, 0.0, now)
            kept = min(1.0, shown / shares.lasting)
            first = kept * shares.first
            return Drafting(token_s, rtt_s, (first, first * kept * shares.further), shares.coverage)
        acceptance = asked.figures.acceptance(candidate.instance, figures.acceptance(now), asked.ease, now)
        return Drafting(token_s, rtt_s, (acceptance,))

    def _after_move(
        self,
        asked: Asked,
        candidate: Candidate,
        now: float,
        hidden_s: float,
        *,
        back_s: float = 0.0,
        hopeful: bool = False,
    ) -> float:
        """Tokens a second with a worker that has to read the session first. hidden_s: of that, what costs nothing.
        back_s: what reading costs when the session comes back."""
        drafting = self.drafting(asked, candidate, now)
        if hopeful:
            token_s, acceptance = candidate.figures.hopeful(now)
            drafting = Drafting(token_s, drafting.rtt_s, (acceptance,), drafting.coverage)
        rate = expected_rate(asked.step, drafting, asked.n_max)
        prefill_s = max(0.0, candidate.figures.prefill_s(asked.n_tokens, now) - hidden_s) + back_s
        return after_prefill(rate, asked.plain, prefill_s, min(MOST_TOKENS_LEFT, asked.tokens_left))


def _order(speed_up: float, candidate: Candidate) -> tuple[float, bool, float, int, str]:
    rtt_s = candidate.figures.rtt_s
    return -round(speed_up, 3), rtt_s is None, rtt_s or 0.0, candidate.n_others, candidate.instance


@dataclass(frozen=True, slots=True)
class Target:
    """A verifier that may take a session. step: None until it has said what its steps cost."""

    instance: str
    n_sessions: int
    n_slots: int
    step: StepCost | None


def place(targets: Sequence[Target]) -> Target | None:
    """The verifier for a new session: where it is expected to be fastest, beside those that are there already.

    Where more sessions are than slots, they share them. Until all have said what their steps cost, the one with fewest
    sessions for its slots.
    """

    def load(target: Target) -> float:
        return target.n_sessions / max(1, target.n_slots)

    steps = {t.instance: t.step for t in targets if t.step is not None}
    if len(steps) < len(targets):
        return min(targets, key=load, default=None)

    def rate(target: Target) -> float:
        sessions, slots = target.n_sessions + 1, max(1, target.n_slots)
        at_a_time = min(sessions, slots)
        return at_a_time / sessions / steps[target.instance].seconds(at_a_time)

    return max(targets, key=lambda t: (round(rate(t), 3), -load(t)), default=None)
