"""One worker's work for one session: what it proposed, how fast, and whether it owes a proposal. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shared.messages import Commit, Proposal
from shared.routing.figures import WorkerFigures
from shared.routing.runs import ProposedRun, Received
from shared.speculation.draft_session import HOPELESS

_STALL_FLOOR_S = 2.0
_STALL_TOKENS = 50
_STALL_ROUND_TRIPS = 4
_STALL_PREFILLS = 4
_SLOWEST_PREFILL = 20.0
"""Tokens a second that a worker may read when nothing is known of how fast it does."""
_FIRST_PATIENCE_S = 60.0
"""For a worker that never proposed anything: engines prepare themselves when they are first used."""


class Assignment:
    """See the module's docstring.

    Args:
        worker: its figures, which this brings up to date.
        n_opened: tokens of the session when the worker got it.
        n_ctx: what its cache holds, 0 for any number.
    """

    def __init__(
        self, worker: WorkerFigures, n_opened: int, window: int, n_ctx: int, stop_tokens: Sequence[int], now: float
    ) -> None:
        self.n_opened = n_opened
        self.answered = False
        """Whether it has proposed anything yet; until then it reads the session's tokens."""
        self._worker = worker
        self._window = window
        self._n_ctx = n_ctx
        self._stop_tokens = frozenset(stop_tokens)
        self._run = ProposedRun(n_opened, window)
        self._arrived_at: float | None = None  # of the last proposal, if it left room for the next one
        self._owes_since: float | None = now
        self._reading = 0
        self._hope = 1.0
        """At most the worker's confidence in all that it has proposed beyond the last commit."""

    def propose(self, proposal: Proposal, load: int, now: float) -> Received:
        """A proposal has arrived, from a worker that has `load` sessions."""
        received = self._run.propose(proposal.start, proposal.prefix_hash, proposal.tokens)
        if received.offence:
            return received
        n_tokens = len(proposal.tokens)
        if received.anew:
            self._hope = 1.0
        if not proposal.q_counts:
            self._hope *= math.prod(proposal.confidence)
        if self.answered:
            if proposal.decode_us:
                self._worker.drafted(n_tokens, proposal.decode_us / 1e6, load, now)
            if received.continued and self._arrived_at is not None:
                self._worker.arrived(n_tokens, now - self._arrived_at, load, now)
        elif proposal.prefill_us and (n_read := min(proposal.n_prefilled, self.n_opened)) > self._window:
            self._worker.prefilled(n_read, proposal.prefill_us / 1e6, now)  # the rest its cache still held
        self.answered = True
        self._reading = 0
        self._arrived_at = now if self._has_room() else None
        if self._run.alive:  # what goes on against better knowledge answers nothing
            self._owes_since = self._arrived_at
        return received

    def commit(self, commit: Commit, now: float) -> list[bool]:
        """Tokens are final; returns a hit or a miss for each proposal that this decides."""
        trials = self._run.commit(commit.prefix_hash, commit.tokens)
        if self._run.last_token is None:
            self._hope = 1.0
        if not all(trials):
            self._arrived_at = None  # it starts again, a round trip later
        if self._owes_since is None and self._has_room():
            self._owes_since = now
        return trials

    def _has_room(self) -> bool:
        """Whether the worker can be expected to propose something."""
        full = self._n_ctx and self._run.end + self._window >= self._n_ctx
        waits = self._hope < HOPELESS  # for a commit, since going on is of no use
        return self._run.room > 0 and not full and not waits and self._run.last_token not in self._stop_tokens

    def overdue_s(self, load: int, reading: int, now: float) -> float:
        """How long the worker has owed a proposal, if that is longer than can be; else 0.

        load: sessions that it has. reading: tokens of those that it is still reading.
        """
        if self._worker.modelless or self._owes_since is None or not self._has_room():
            return 0.0
        self._reading = max(self._reading, reading)  # a pass that has begun goes on when its session has gone
        reading = self._reading
        patience_s = max(_STALL_FLOOR_S, _STALL_TOKENS * self._worker.token_s(load, now))
        patience_s += _STALL_ROUND_TRIPS * (self._worker.rtt_s or 0.0)
        if self._worker.has_prefilled():
            patience_s += _STALL_PREFILLS * self._worker.prefill_s(reading, now)
        else:
            patience_s += reading / _SLOWEST_PREFILL
        if not self._worker.measured():
            patience_s += _FIRST_PATIENCE_S
        owed_s = now - self._owes_since
        return owed_s if owed_s > patience_s else 0.0
