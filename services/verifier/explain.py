"""What steps decided, kept for `draftwire explain`: the last decisions of the last sessions. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque

from shared.messages import Explanation, GetExplanation, Speculation, StepDecision

_LEAST_SESSIONS = 16
_MAX_DECISIONS = 512


class DecisionLog:
    """See the module's docstring. Invariant: its size is bounded, however many sessions come and however long they are.

    Args:
        adaptive: whether lengths are chosen.
        n_sessions: that it remembers, 16 at least; more than can run at a time, so that those that run stay.
    """

    def __init__(self, adaptive: bool, n_sessions: int) -> None:
        self._adaptive = adaptive
        self._most = max(_LEAST_SESSIONS, n_sessions)
        self._sessions: OrderedDict[int, tuple[Speculation, deque[StepDecision]]] = OrderedDict()

    def add(self, session: int, speculation: Speculation, decision: StepDecision) -> None:
        if session not in self._sessions:
            self._sessions[session] = speculation, deque(maxlen=_MAX_DECISIONS)
            if len(self._sessions) > self._most:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(session)
        self._sessions[session][1].append(decision)

    def answer(self, question: GetExplanation) -> Explanation:
        speculation, decisions = self._sessions.get(question.session, (Speculation(), ()))
        return Explanation(question.ref, question.session, self._adaptive, speculation, tuple(decisions))
