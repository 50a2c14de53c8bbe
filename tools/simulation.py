"""What a policy of lengths would bring: the pipeline's own sessions and controller, in simulated time.

One session, a target and a draft on machines of their own, as in `shared.speculation.cost`, but with what the draft
really proposed (`tools.draft_trace`) in place of a probability. Simulated are the machines and the way between them;
what happens to proposals and commits is decided by the code that serves: `TargetSession`, `DraftSession`,
`LengthController`. Invariant: the text is the trace's, whatever a policy does, and time only moves forward.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from shared.messages import MAX_RUN, Commit, Limits, OpenDraft, Proposal, Speculation
from shared.sampling.drafting import DraftToken
from shared.sampling.params import SamplingParams
from shared.speculation.cost import StepCost
from shared.speculation.draft_session import DraftSession
from shared.speculation.lengths import Calibration, LengthController
from shared.speculation.target_session import TargetSession
from tools.draft_trace import Proposed, Trace

_NO_IDS = np.empty(0, np.int32)
_NO_PROBS = np.empty(0, np.float32)
_PROMPT = (0,)
_WRONG = 1 << 24
"""Added to a position it makes a token that no text has; right tokens are their positions."""


@dataclass(frozen=True, slots=True)
class Machine:
    """step: seconds of the target's pass. draft_s: seconds a proposed token. rtt_s: verifier to draft and back.

    overhead_s: of a step beyond its pass: choosing, committing. restart_s: what the draft needs beyond a token when a
    commit has contradicted it.
    """

    step: StepCost
    draft_s: float
    rtt_s: float
    overhead_s: float = 0.0
    restart_s: float = 0.0
    window: int = 32


class Policy(Protocol):
    """How many proposals a step verifies, and how long it waits for more; keeps what it learns from text to text."""

    calibration: Calibration

    def patience(self, session: TargetSession, now_s: float, next_s: float) -> float:
        """Seconds to wait for a proposal; 0: go. next_s: until the next one arrives, which only an oracle may use."""

    def length(self, session: TargetSession) -> int: ...

    def gave_up(self, session: TargetSession) -> None:
        """What was waited for has not come in time."""

    def learn(self, rows: int, seconds: float, tokens: int, elapsed_s: float) -> None: ...


PolicyT = TypeVar("PolicyT", bound=Policy)


class Adaptive:
    """The verifier's own controller."""

    def __init__(self) -> None:
        self.controller = LengthController()
        self.calibration = self.controller.calibration

    def patience(self, session: TargetSession, now_s: float, next_s: float) -> float:
        del next_s
        candidates = [session.candidate(round(now_s * 1e6))]
        wait = self.controller.patience(candidates, self.controller.choose(candidates, MAX_RUN), MAX_RUN)
        return 0.0 if wait is None else wait[0] + session.arrivals.slack_s

    def length(self, session: TargetSession) -> int:
        return self.controller.choose([session.candidate()], MAX_RUN)[0]

    def gave_up(self, session: TargetSession) -> None:
        session.arrivals.waited(False)

    def learn(self, rows: int, seconds: float, tokens: int, elapsed_s: float) -> None:
        self.controller.observe(rows, seconds, tokens, elapsed_s)


@dataclass
class Threshold:
    """Verifies proposals while the probability that all are right is at least `least`, `n_max` at most, and waits up to
    `most_wait_s` for the next one while those that are there all pass."""

    least: float
    n_max: int
    most_wait_s: float

    def __post_init__(self) -> None:
        self.calibration = Calibration()

    def patience(self, session: TargetSession, now_s: float, next_s: float) -> float:
        del now_s
        length = self.length(session)
        complete = length < len(session.chain) or length >= min(self.n_max, session.most)
        return 0.0 if complete or next_s > self.most_wait_s or next_s == math.inf else next_s

    def length(self, session: TargetSession) -> int:
        reach = session.candidate().reach
        return sum(share >= self.least for share in reach[: self.n_max])

    def gave_up(self, session: TargetSession) -> None:
        del session

    def learn(self, rows: int, seconds: float, tokens: int, elapsed_s: float) -> None:
        del rows, seconds, tokens, elapsed_s


class Oracle(Threshold):
    """Knows which proposals are right: verifies these alone, and waits up to `most_wait_s` while no wrong one is there.

    What better confidence could win at most.
    """

    def __init__(self, n_max: int, most_wait_s: float) -> None:
        super().__init__(0.0, n_max, most_wait_s)

    def length(self, session: TargetSession) -> int:
        return min(_agreeing(session, len(session.prefix) - len(_PROMPT), self.n_max), session.most)


@dataclass
class Outcome:
    """Of all texts played: seconds, committed tokens, steps, proposals verified and accepted."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    proposed: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class _Draft:
    """A draft worker on its machine: one token each draft_s, ahead of the last commit that it knows."""

    def __init__(self, trace: Trace, machine: Machine) -> None:
        self._trace = trace
        self._machine = machine
        self._session = DraftSession(
            OpenDraft(1, np.array(_PROMPT, np.int32), SamplingParams(), (), machine.window), 1 << 22
        )
        self._free_s = 0.0
        self._commits: deque[tuple[float, Commit]] = deque()
        self._sent: deque[tuple[float, Proposal]] = deque()  # with the times of their arrival
        self._lost: tuple[int, tuple[float, ...]] | None = None  # its wrong token, and what it goes on with

    def commit(self, at_s: float, commit: Commit) -> None:
        self._commits.append((at_s + self._machine.rtt_s / 2, commit))

    def next_arrival(self) -> float:
        """When the next proposal arrives if no commit comes before; infinite: none does."""
        while not self._sent and self._turn():
            pass
        return self._sent[0][0] if self._sent else math.inf

    def arrived(self, until_s: float) -> Iterable[tuple[float, Proposal]]:
        while self.next_arrival() <= until_s:
            yield self._sent.popleft()

    def _turn(self) -> bool:
        """Take what commits have come, and draft a token; False: there is nothing to do before the next commit."""
        if not self._session.room and not self._commits:
            return False
        if not self._session.room:
            self._free_s = max(self._free_s, self._commits[0][0])
        while self._commits and self._commits[0][0] <= self._free_s:
            self._take(self._commits.popleft()[1])
        if self._session.room:
            self._free_s += self._machine.draft_s
            start = len(self._session.prefix)
            self._session.append(self._next(start - len(_PROMPT)))
            self._sent.append((self._free_s + self._machine.rtt_s / 2, self._session.proposal(start)))
        return True

    def _take(self, commit: Commit) -> None:
        before = len(self._session.prefix)
        agreed = self._session.prefix.agreement(commit.start, commit.tokens)
        if agreed < len(commit.tokens) and before > commit.start + agreed:
            self._free_s += self._machine.restart_s
        if agreed < len(commit.tokens):
            self._lost = None
        again = self._session.commit(commit)
        if again is not None:
            self._sent.append((self._free_s + self._machine.rtt_s / 2, again))

    def _next(self, index: int) -> DraftToken:
        if self._lost is not None:
            at, confidences = self._lost
            confidence = confidences[index - at - 1] if index - at <= len(confidences) else 0.0
            return DraftToken(_WRONG + index, confidence, _NO_IDS, _NO_PROBS)
        proposed = self._trace[index] if index < len(self._trace) else Proposed(0.0, False)
        if not proposed.hit:
            self._lost = index, proposed.lost
        return DraftToken(index if proposed.hit else _WRONG + index, proposed.confidence, _NO_IDS, _NO_PROBS)


def play(traces: Sequence[Trace], machine: Machine, policy: Policy, n_max: int = 16) -> Outcome:
    """One text after the other, from its first token on, which the prompt gives; `policy` keeps what it learns."""
    outcome = Outcome()
    for trace in traces:
        _play(trace, machine, policy, n_max, outcome)
    return outcome


def _play(trace: Trace, machine: Machine, policy: Policy, n_max: int, outcome: Outcome) -> None:
    draft = _Draft(trace, machine)
    session = TargetSession(
        1,
        np.array(_PROMPT, np.int32),
        SamplingParams(),
        Limits(len(trace)),
        Speculation(n_max=n_max),
        0,
        policy.calibration,
    )
    now = ended = _commit(session, draft, 1, 0, 0.0)
    while (done := len(session.prefix) - len(_PROMPT)) < len(trace):
        _deliver(session, draft, now)
        while (wait := policy.patience(session, now, draft.next_arrival() - now)) > 0:
            known, arrives = session.known, draft.next_arrival()
            if arrives > now + wait:
                now += wait
                policy.gave_up(session)
                break
            now = max(now, arrives)
            _deliver(session, draft, now)
            if session.known > known:
                session.arrivals.waited(True)
        length = min(policy.length(session), session.most)
        accepted = _agreeing(session, done, length)
        seconds = machine.step.seconds(1 + length) + machine.overhead_s
        now += seconds
        policy.learn(1 + length, seconds, accepted + 1, now - ended)
        session.count_round(length, accepted)
        outcome.steps += 1
        outcome.proposed += length
        outcome.accepted += accepted
        outcome.tokens += accepted + 1
        outcome.seconds += now - ended
        ended = _commit(session, draft, accepted + 1, accepted, now)


def _agreeing(session: TargetSession, done: int, length: int) -> int:
    agreeing = 0
    for i, proposed in enumerate(session.proposals(length)):
        if proposed.token != done + i:
            break
        agreeing += 1
    return agreeing


def _deliver(session: TargetSession, draft: _Draft, now: float) -> None:
    for at, proposal in draft.arrived(now):
        session.offer(proposal, round(at * 1e6))


def _commit(session: TargetSession, draft: _Draft, count: int, accepted: int, now: float) -> float:
    start, prefix_hash = len(session.prefix), session.prefix.hash
    done = start - len(_PROMPT)
    tokens = tuple(range(done, done + count))
    session.commit(tokens, round(now * 1e6))
    draft.commit(now, Commit(1, start, prefix_hash, tokens, accepted, session.known))
    return now


def best(traces: Sequence[Trace], machine: Machine, policies: Iterable[PolicyT]) -> tuple[PolicyT, Outcome]:
    """The policy that is fastest on these traces; at least one."""
    played = [(policy, play(traces, machine, policy)) for policy in policies]
    return max(played, key=lambda entry: entry[1].rate)


def thresholds(machine: Machine) -> Iterator[Threshold]:
    """Overlapped policies that a user could configure, were lengths not chosen: all combinations of three numbers."""
    for least in (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8):
        for n_max in (4, 8, 16):
            for waits in (0.0, 1.1, 2.5, math.inf):
                yield Threshold(least, n_max, waits * machine.draft_s + (machine.rtt_s if waits else 0.0))


def oracles(machine: Machine) -> Iterator[Oracle]:
    for n_max in (8, 16):
        for waits in (0.0, 1.1, 2.5):
            yield Oracle(n_max, waits * machine.draft_s + (machine.rtt_s if waits else 0.0))
