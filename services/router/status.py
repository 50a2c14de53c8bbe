"""What the router knows, as a `Status` message: its peers, how it judges the draft workers, who drafts for whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.router.orders import Orders
from services.router.peers import Peer
from services.router.sessions import Session, Tally
from services.router.workers import SHUT, WorkerRecord
from shared.messages import MAX_MICROS, MAX_U32, Order, PeerStatus, SessionStatus, Status, WorkerState, WorkerStatus
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
    orders: Orders,
    tally: Tally,
    pin_of: Callable[[Session], str],
    now: float,
) -> Status:
    """The answer to `GetStatus`."""
    shut = {record.name for record in workers if record.health.state == "demoted" or record.order in SHUT}
    strangers = set(orders) - {record.name for record in workers}
    typical = _typical([p for p in peers if p.hello.role == "verifier"])
    return Status(
        ref,
        version,
        uptime_s,
        len(sessions),
        tuple(_peer(peer, shut, now) for peer in peers)[:_MOST],
        (
            *(_worker(record, typical, policy, now) for record in workers),
            *(_stranger(name, orders.of(name)) for name in sorted(strangers)),
        )[:_MOST],
        tuple(_session(session, pin_of(session), now) for session in sessions[:_MOST]),
        tally.message(),
    )


def _peer(peer: Peer, shut: set[str], now: float) -> PeerStatus:
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
        not peer.draining and not (hello.role == "draft" and hello.instance in shut),
        hello.version,
        peer.uptime_s(now),
        peer.n_steps,
        peer.n_step_sessions,
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
    reason = health.reason
    if record.order in SHUT:
        state, reason = _kept_out(record.order)
    elif record.peer is None and state != "demoted":
        state = "away"
    candidate = Candidate(record.name, figures, record.n_sessions, record.n_slots)
    return WorkerStatus(
        record.name,
        hello.engine,
        hello.model,
        state,
        reason,
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
        record.order,
        record.peer is not None,
        record.round_trip.message(),
        record.token.message(),
        record.reply.message(),
    )


def _kept_out(order: Order) -> tuple[WorkerState, str]:
    return ("banned", "banned by an operator") if order == "ban" else ("drained", "drained by an operator")


def _stranger(name: str, order: Order) -> WorkerStatus:
    """A worker of which nothing is known but an order."""
    state, reason = _kept_out(order) if order in SHUT else ("away", "")
    return WorkerStatus(name, "", "", state, reason, 0, 0, 0, 0, 0, 0, 0, 0.0, 0, 1.0, order)


def _session(session: Session, pin: str, now: float) -> SessionStatus:
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
        pin,
    )
