"""The target's step loop: take what has arrived, compute one forward pass, ask the sampler, commit.

Runs on the engine thread and owns the engine, the slots and the sessions. A step verifies proposals that are there, as
many as the controller finds worth their rows, down to none; `patience` says whether some that come soon are worth
waiting for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from services.verifier import policy
from services.verifier.explain import DecisionLog
from services.verifier.sampler_client import SamplerClient, StepRefused
from shared import trace
from shared.engine.interface import Chunk, Engine
from shared.engine.slots import OUT_OF_PAGES, SlotTable, place_session, with_eviction
from shared.errors import EngineError
from shared.messages import (
    Close,
    Commit,
    Error,
    FinishReason,
    GetExplanation,
    Limits,
    Message,
    OpenTarget,
    Proposal,
    StepDecision,
    StepReport,
    VerdictItem,
)
from shared.service import monotonic_us
from shared.settings import VerifierSettings
from shared.speculation.lengths import Candidate, LengthController
from shared.speculation.target_session import TargetSession

Emit = Callable[[Sequence[Message]], None]

_ALIKE_ROWS = 24
"""Rows of a step of decoding sessions, for engines without row invariance: ik computes more of them otherwise
(docs/engines.md), so that texts would depend on the load."""
_REPORT_EVERY_US = 1_000_000
"""Between reports of what steps cost."""


class Stepper:
    """See the module's docstring.

    Args:
        emit: sends messages to the router; called once a step.
    """

    def __init__(self, engine: Engine, sampler: SamplerClient, settings: VerifierSettings, emit: Emit) -> None:
        self._engine = engine
        self._sampler = sampler
        self._emit = emit
        self._n_max = settings.n_max
        self._max_waiting = settings.max_waiting
        self.controller = LengthController()
        self._fixed = settings.length == "fixed"
        self._decisions = DecisionLog(not self._fixed, 2 * engine.info.n_slots)
        self._reported_us = 0
        self._n_steps = self._n_step_sessions = 0
        self._awaited: TargetSession | None = None
        self._last_us = 0
        """When the last step ended, if it was of decoding sessions alone; 0: it was not."""
        self._n_batch = engine.info.n_batch
        self._decode_rows = self._n_batch if engine.info.row_invariant else min(self._n_batch, _ALIKE_ROWS)
        # A chunk must fit beside the rows of every decoding session, or prompts could starve.
        reserved = engine.info.n_slots * (settings.n_max + 1)
        self._prefill_chunk = max(1, min(settings.prefill_chunk, self._n_batch - reserved))
        self._slots = SlotTable(engine.info.n_slots, align=1 if engine.info.row_invariant else self._prefill_chunk)
        self._waiting: dict[int, TargetSession] = {}  # in the order of arrival
        self._running: dict[int, TargetSession] = {}
        self._full = False
        """A session was refused for want of room, and none has ended since."""
        self._out: list[Message] = []

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def n_sessions(self) -> int:
        return len(self._running) + len(self._waiting)

    @property
    def n_slots_taken(self) -> int:
        return self._engine.info.n_slots - self._slots.n_free

    def receive(self, message: Any, at_us: int | None = None) -> None:
        """Take in an OpenTarget, Proposal, Close or GetExplanation, which arrived at `at_us`: now, if not given."""
        if isinstance(message, Proposal):
            session = self._running.get(message.session) or self._waiting.get(message.session)
            if session is not None and max(message.tokens) >= self._engine.info.n_vocab:
                session.counters.n_stale += len(message.tokens)
            elif session is not None:
                known = session.known
                session.offer(message, monotonic_us() if at_us is None else at_us)
                if session is self._awaited and session.known > known:
                    self._awaited = None
                    session.arrivals.waited(True)
        elif isinstance(message, OpenTarget):
            self._open(message)
        elif isinstance(message, Close):
            self._cancel(message.session)
        elif isinstance(message, GetExplanation):
            self._out.append(self._decisions.answer(message))

    def forget_all(self) -> None:
        """Drop every session: the router that knew them is gone."""
        ids = [*self._waiting, *self._running]
        self._waiting.clear()
        for session in list(self._running.values()):
            self._release(session)
        self._sampler.close(ids)

    def step(self) -> None:
        """One forward pass for whoever is ready, its verdicts and commits."""
        self._admit()
        sessions = list(self._running.values())
        candidates = {session.id: session.candidate() for session in sessions if session.pending == 1}
        lengths = self._lengths(candidates)
        ready = [self._ready(s, lengths.get(s.id, 0)) for s in sessions]
        shares = policy.plan(ready, self._n_batch, self._prefill_chunk)
        chunks: list[Chunk] = []
        taking_part: list[tuple[TargetSession, policy.Share]] = []
        for session, share in zip(sessions, shares, strict=True):
            if share.pending == 0:
                continue
            committed = session.prefix.tokens[session.cached : session.cached + share.pending]
            proposed = [p.token for p in session.proposals(share.n_proposals)]
            rows = share.n_proposals + 1 if share.final else 0
            chunks.append(Chunk(session.slot, session.cached, np.array(committed + proposed, np.int32), rows))
            taking_part.append((session, share))
        n_rows = sum(share.pending + share.n_proposals for _, share in taking_part)
        began = time.monotonic_ns()
        started = monotonic_us()
        try:
            logits = with_eviction(self._engine, self._slots, lambda: self._engine.forward(chunks))
        except EngineError as error:
            if error.code != OUT_OF_PAGES:
                raise
            self._no_room(error, taking_part[-1][0])
            self.flush()
            return
        trace.span("verifier.forward", began, 0, 0, n_rows, len(taking_part))
        self._n_steps += 1
        self._n_step_sessions += len(taking_part)
        deciding = [(s, share.n_proposals) for s, share in taking_part if share.final]
        pending = {s.id: share.pending for s, share in taking_part}
        question = self._sampler.question(deciding, logits) if deciding else None
        computed = monotonic_us()
        for session, share in taking_part:
            session.cached += share.pending
            if session.first_commit_us:
                session.counters.verify_us += computed - started
            else:
                session.counters.prefill_us += computed - started
        for session, share in taking_part:
            if not share.final:
                start = session.cached - share.pending
                trace.span("verifier.prefill", began, session.id, start, share.pending, n_rows)
        if question is not None:
            asking = time.monotonic_ns()
            try:
                verdicts = self._sampler.ask(question, [s for s, _ in deciding], logits)
            except StepRefused as refusal:
                self._refused(refusal, taking_part)
                self.flush()
                return
            decided = monotonic_us()
            trace.span("verifier.ask", asking, 0, 0, sum(1 + n for _, n in deciding))
            exchange_us, sample_us = decided - computed, self._sampler.sample_us
            n_committed = sum(len(verdict.tokens) for verdict in verdicts)
            self._explain(candidates, taking_part, verdicts, started, decided)
            self._learn(taking_part, started, decided, n_committed)
            for (session, n_proposals), verdict in zip(deciding, verdicts, strict=True):
                session.counters.full_rows += verdict.full_rows
                n_accepted, start = min(verdict.n_accepted, n_proposals), len(session.prefix)
                is_round = bool(session.first_commit_us or n_proposals)
                if session.first_commit_us:
                    session.counters.sample_us += sample_us
                    session.counters.wire_us += max(0, exchange_us - sample_us)
                else:
                    session.first_commit_us = decided
                if is_round:
                    session.count_round(n_proposals, n_accepted)
                session.cached += n_accepted
                self._commit(session, verdict.tokens, verdict.n_accepted, verdict.finish)
                if is_round:
                    trace.span("verifier.round", began, session.id, start, n_proposals, n_accepted, n_rows)
                else:
                    trace.span("verifier.prefill", began, session.id, start, pending[session.id], n_rows)
            self._report(decided)
        self.flush()

    def _no_room(self, error: EngineError, newest: TargetSession) -> None:
        """End the session of the step that was opened last; the others take their step again.

        It is the one with the least computed and waited for; and since none gives way to a newer one, the oldest goes
        on, and the others after it. No session is started in its place before another one has ended.
        """
        retry_s = 1 if len(self._running) > 1 else 0
        self._out.append(Error(newest.id, error.code, error.message, error.remedy, retry_s))
        self._release(newest)
        self._sampler.close([newest.id])
        self._full = bool(self._running)

    def _refused(self, refusal: StepRefused, taking_part: Sequence[tuple[TargetSession, policy.Share]]) -> None:
        """End the sessions that cannot be decided; for the others it is as if the step had not been."""
        for session, share in taking_part:
            if session.id in refusal.sessions:
                error = refusal.error
                self._out.append(Error(session.id, error.code, error.message, error.remedy))
                session.cached -= share.pending  # what the step has added may be what was wrong with it
                self._release(session)
                self._sampler.close([session.id])
            elif share.final:
                session.cached -= share.pending

    def flush(self) -> None:
        """Send what has been gathered for the router."""
        if self._out:
            self._emit(self._out)
            self._out = []

    def _open(self, message: OpenTarget) -> None:
        # Those that find a slot in the next step do not wait.
        if len(self._waiting) >= self._max_waiting + self._slots.n_free:
            reason = f"{len(self._waiting)} generations wait for a slot already"
            self._out.append(Error(message.session, "overloaded", reason, "try again", 1))
            return
        room = self._engine.info.n_ctx - len(message.tokens)
        limits = Limits(min(message.limits.max_tokens, room), message.limits.stop_tokens)
        n_max = min(self._n_max, message.speculation.n_max)
        speculation = replace(message.speculation, n_max=n_max, n_min=min(n_max, message.speculation.n_min))
        session = TargetSession(
            message.session,
            message.tokens,
            message.sampling,
            limits,
            speculation,
            monotonic_us(),
            self.controller.calibration,
        )
        self._waiting[session.id] = session

    def _admit(self) -> None:
        while self._waiting and self._slots.n_free and not self._full:
            session = next(iter(self._waiting.values()))
            prompt = np.array(session.prefix.tokens, np.int32)
            placed = place_session(self._engine, self._slots, session.id, prompt)
            if placed is None:
                return
            del self._waiting[session.id]
            session.slot, session.cached = placed
            session.counters.n_cached = session.cached
            session.counters.queue_us = monotonic_us() - session.opened_us
            trace.span("verifier.queue", session.opened_us * 1000, session.id, 0, session.n_prompt, session.cached)
            self._running[session.id] = session
            self._sampler.open(session)

    def patience(self, now_us: int) -> float:
        """Seconds to wait for more messages before the next step; 0: there is nothing worth waiting for.

        Whoever has waited in vain calls `give_up`.
        """
        if self._fixed or self._waiting or not self._running:
            return 0.0
        sessions = list(self._running.values())
        if any(session.pending > 1 for session in sessions):
            return 0.0
        candidates = [session.candidate(now_us) for session in sessions]
        if all(candidate.next_s is None for candidate in candidates):
            return 0.0
        room = max(0, self._decode_rows - len(sessions))
        wait = self.controller.patience(candidates, self.controller.choose(candidates, room), room)
        if wait is None:
            return 0.0
        seconds, which = wait
        self._awaited = sessions[which]
        return seconds + self._awaited.arrivals.slack_s

    def give_up(self) -> None:
        """What was waited for has not come."""
        if self._awaited is not None:
            self._awaited.arrivals.waited(False)
            self._awaited = None

    def _lengths(self, candidates: Mapping[int, Candidate]) -> dict[int, int]:
        """How many proposals of each decoding session are verified, by session."""
        if self._fixed:
            return {i: len(c.reach) if len(c.reach) >= c.least else 0 for i, c in candidates.items()}
        room = max(0, self._decode_rows - len(candidates))
        return dict(zip(candidates, self.controller.choose(list(candidates.values()), room), strict=True))

    def _explain(
        self,
        candidates: Mapping[int, Candidate],
        taking_part: Sequence[tuple[TargetSession, policy.Share]],
        verdicts: Sequence[VerdictItem],
        started: int,
        decided: int,
    ) -> None:
        """Note what the step decided for those that decode, on what was known before it."""
        rows = sum(share.pending + share.n_proposals for _, share in taking_part)
        costs, rate = self.controller.costs, self.controller.rate
        deciding = [(session, share.n_proposals) for session, share in taking_part if share.final]
        for (session, length), verdict in zip(deciding, verdicts, strict=True):
            if session.id in candidates:
                decision = StepDecision(
                    position=len(session.prefix),
                    waited_us=started - self._last_us if self._last_us else 0,
                    reach=tuple(candidates[session.id].reach),
                    length=length,
                    n_accepted=min(verdict.n_accepted, length),
                    n_sessions=len(taking_part),
                    rows=rows,
                    rate=rate,
                    step_us=round(1e6 * costs.seconds(rows)),
                    further_us=round(1e6 * costs.seconds(rows + 1)),
                    took_us=decided - started,
                )
                self._decisions.add(session.id, session.speculation, decision)

    def _learn(
        self, taking_part: Sequence[tuple[TargetSession, policy.Share]], started: int, decided: int, n_committed: int
    ) -> None:
        """Tell the controller of a step, if it was of decoding sessions alone."""
        if any(share.pending > 1 or not share.final for _, share in taking_part):
            self._last_us = 0
            return
        rows = sum(1 + share.n_proposals for _, share in taking_part)
        seconds = (decided - started) / 1e6
        elapsed = (decided - self._last_us) / 1e6 if self._last_us else seconds
        self.controller.observe(rows, seconds, n_committed, elapsed)
        self._last_us = decided

    def _report(self, now_us: int) -> None:
        """Tell the router what steps cost: now and then, and once more when there is nothing left to do."""
        if self.busy and now_us - self._reported_us < _REPORT_EVERY_US:
            return
        if points := self.controller.costs.points(self._n_max + 1):
            self._reported_us = now_us
            self._out.append(StepReport(points, self._n_steps, self._n_step_sessions))

    def _ready(self, session: TargetSession, n_proposals: int) -> policy.Ready:
        generated = len(session.prefix) - session.n_prompt
        return policy.Ready(
            session.pending,
            session.cached,
            n_proposals,
            session.speculation.n_max,
            session.limits.max_tokens - generated,
        )

    def _commit(self, session: TargetSession, tokens: Sequence[int], n_accepted: int, finish: FinishReason) -> None:
        start, prefix_hash = len(session.prefix), session.prefix.hash
        session.commit(tokens, monotonic_us())
        if start == session.n_prompt:
            self._slots.record(session.id, np.array(session.prefix.tokens[:start], np.int32))
        self._out.append(
            Commit(
                session.id,
                start,
                prefix_hash,
                tuple(tokens),
                n_accepted,
                session.known,
                finish,
                session.stats(monotonic_us()) if finish else None,
            )
        )
        if finish:
            self._release(session)
            self._sampler.close([session.id])

    def _cancel(self, session_id: int) -> None:
        session = self._running.get(session_id)
        if session is not None:
            self._commit(session, (), 0, "cancelled")
            return
        session = self._waiting.pop(session_id, None)
        if session is not None:
            start, prefix_hash = len(session.prefix), session.prefix.hash
            session.counters.queue_us = monotonic_us() - session.opened_us
            stats = session.stats(monotonic_us())
            self._out.append(Commit(session_id, start, prefix_hash, (), 0, session.known, "cancelled", stats))
        else:
            self._out.append(Error(session_id, "unknown_session", "the verifier does not hold this session", "", 0))

    def _release(self, session: TargetSession) -> None:
        self._full = False
        self._last_us = 0  # until the next step passes time that is nobody's
        if session is self._awaited:
            self._awaited = None
        self._engine.truncate(session.slot, session.cached)  # what the table does not know of, it could not evict
        self._slots.release(session.id, np.array(session.prefix.tokens[: session.cached], np.int32))
        del self._running[session.id]
