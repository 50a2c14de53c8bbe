"""The draft loop: take what has arrived, draft a turn for every session that has room, send it at once.

Runs on the engine thread and owns the drafter and the sessions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from services.draft.drafters import Drafter
from shared import trace
from shared.engine.slots import OUT_OF_PAGES
from shared.errors import EngineError
from shared.messages import MAX_CONTEXT, Close, Commit, Error, Message, OpenDraft
from shared.speculation.draft_session import DraftSession, LostCommit

Emit = Callable[[Sequence[Message]], None]


class Worker:
    """See the module's docstring.

    Args:
        emit: sends messages to the router.
    """

    def __init__(self, drafter: Drafter, emit: Emit) -> None:
        self._drafter = drafter
        self._emit = emit
        self._sessions: dict[int, DraftSession] = {}

    @property
    def n_sessions(self) -> int:
        return len(self._sessions)

    def receive(self, message: Any) -> None:
        """Take in an OpenDraft, Commit or Close."""
        if isinstance(message, Commit):
            self._commit(message)
        elif isinstance(message, OpenDraft):
            self._open(message)
        elif isinstance(message, Close):
            self._close(message.session)

    def forget_all(self) -> None:
        """Drop every session: the router that knew them is gone."""
        for session in list(self._sessions):
            self._close(session)

    def turn(self) -> bool:
        """Draft once for whoever has room; False when there is nothing to do until a message comes."""
        ready = [s for s in self._sessions.values() if s.room > 0 and s.cached < len(s.prefix)]
        if not ready:
            return False
        starts = {s.id: len(s.prefix) for s in ready}
        cached = [s.cached for s in ready]
        began = time.monotonic_ns()
        try:
            drafted = self._drafter.draft(ready)
        except EngineError as error:
            if error.code != OUT_OF_PAGES:
                raise
            self._no_room(error)
            return True
        for session, before in zip(ready, cached, strict=True):
            read, n = session.cached - before, len(session.prefix) - starts[session.id]
            if read or n:
                name = "draft.prefill" if before < session.n_opened and read > 1 else "draft.draft"
                trace.span(name, began, session.id, starts[session.id], read, n)
        if drafted:
            self._emit([session.proposal(starts[session.id]) for session in drafted])
        return True

    def _no_room(self, error: EngineError) -> None:
        """End the session that was opened last, also one that is waiting for a commit: it holds pages all the same.

        It has the least computed, and as none gives way to a newer one, the oldest goes on.
        """
        newest = next(reversed(self._sessions))
        self._close(newest)
        self._emit([Error(newest, error.code, error.message, error.remedy)])

    def _open(self, message: OpenDraft) -> None:
        began = time.monotonic_ns()
        self._close(message.session)
        n_ctx = self._drafter.info.n_ctx or MAX_CONTEXT
        session = DraftSession(message, n_ctx)
        if len(session.prefix) >= n_ctx:
            reason = f"{len(session.prefix)} tokens do not fit in the draft's context of {n_ctx}"
            self._emit([Error(session.id, "context_exceeded", reason, "raise n_ctx of this draft worker's engine")])
        elif self._drafter.open(session):
            self._sessions[session.id] = session
            trace.span("draft.opened", began, session.id, len(session.prefix), len(message.tokens), session.cached)
        else:
            self._emit([Error(session.id, "no_slot", "all slots of this draft worker are in use", "raise n_slots")])

    def _commit(self, message: Commit) -> None:
        session = self._sessions.get(message.session)
        if session is None:
            return
        began = time.monotonic_ns()
        try:
            again = session.commit(message)
        except LostCommit:
            self._close(session.id)
            self._emit([Error(session.id, "lost_commit", "a commit of this session was lost", "open it again")])
            return
        n = len(message.tokens)
        if session.n_rolled_back:
            trace.span("draft.rollback", began, session.id, message.start, n, session.n_rolled_back)
        else:
            trace.span("draft.keep", began, session.id, message.start, n)
        if again is not None:
            self._emit([again])

    def _close(self, session_id: int) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._drafter.close(session)
