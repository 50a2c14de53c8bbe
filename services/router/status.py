"""What the router knows, as a `Status` message: its peers, how it judges the draft workers, who drafts for whom."""

from __future__ import annotations

from collections.abc import Sequence

from services.router.peers import Peer
from services.router.sessions import Session
from services.router.workers import WorkerRecord
from shared.messages import MAX_MICROS, MAX_U32, PeerStatus, SessionStatus, Status, WorkerState, WorkerStatus
from shared.routing.policy import Asked, Candidate, Policy
from shared.routing.score import STEP_PRIOR, beside

_MOST = 1024


def status_of(
    ref: int,
    version: str,
    uptime_s: int,
    peers: Sequence[Peer],
    workers: Sequence[WorkerRecord],
    sessions: Sequence[Session],
    policy: Policy,
    now: float,
) -> Status:
    """The answer to `GetStatus`."""
    demoted = {record.name for record in workers if record.health.state == "demoted"}
    typical = _typical([p for p in peers if p.hello.role == "verifier"])
    return Status(
        ref,
        version,
        uptime_s,
        len(sessions),
        tuple(_peer(peer, demoted) for peer in peers)[:_MOST],
        tuple(_worker(record, typical, policy, now) for record in workers)[:_MOST],
        tuple(_session(session, now) for session in sessions[:_MOST]),
    )


def _peer(peer: Peer, demoted: set[str]) -> PeerStatus:
    hello = peer.hello
    return PeerStatus(
        hello.role,
        hello.instance,
        hello.engine,
        hello.model,
        hello.vocab_fingerprint,
        hello.n_vocab,
        hello.n_ctx,
        hello.n_slots,
        len(peer.sessions),
        hello.row_invariant,
        peer.rtt_us or 0,
        not peer.draining and not (hello.role == "draft" and hello.instance in demoted),
    )


def _typical(verifiers: Sequence[Peer]) -> Asked:
    """One more session, at the verifier with the fewest."""
    verifier = min(verifiers, key=lambda p: len(p.sessions), default=None)
    if verifier is None:
        return Asked()
    others = min(len(verifier.sessions), max(0, verifier.hello.n_slots - 1))
    return Asked(step=beside(verifier.step or STEP_PRIOR, others), target_rtt_s=(verifier.rtt_us or 0) / 1e6)


def _worker(record: WorkerRecord, typical: Asked, policy: Policy, now: float) -> WorkerStatus:
    hello, figures, health = record.hello, record.figures, record.health
    state: WorkerState = health.state
    if record.peer is None and state != "demoted":
        state = "away"
    candidate = Candidate(record.name, figures, record.n_sessions, record.n_slots)
    return WorkerStatus(
        record.name,
        hello.engine,
        hello.model,
        state,
        health.reason,
        int(health.retry_s(now) * 1000),
        health.n_demotions,
        record.n_sessions,
        hello.n_slots,
        int(min(MAX_MICROS, (figures.rtt_s or 0.0) * 1e6)),
        int(min(MAX_MICROS, figures.token_s(max(1, record.n_sessions), now) * 1e6)),
        0 if figures.modelless else int(min(MAX_U32, 1 / max(1e-12, figures.prefill_s(1, now)))),
        figures.acceptance(now),
        int(figures.n_trials(now)),
        policy.rate(typical, candidate, now) / typical.plain,
    )


def _session(session: Session, now: float) -> SessionStatus:
    worker = session.draft.hello.instance if session.draft is not None else ""
    trials = session.figures.by_worker.get(worker)
    if session.choice is not None:
        why = session.choice.why
    elif session.request.speculation.n_max == 0 or session.request.speculation.draft == "none":
        why = "the request wants no draft"
    else:
        why = f"no worker for draft = {session.request.speculation.draft[:200]}"
    return SessionStatus(
        session.id,
        session.verifier.hello.instance,
        worker,
        why,
        len(session.tokens),
        session.n_moves,
        trials.value(now, 0.0, 0.0) if trials is not None and trials.weight(now) else 0.0,
        session.choice.speed_up if session.choice is not None else 1.0,
    )
