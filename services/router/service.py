"""The router: the session table, the registry of peers, who drafts for whom, and fail-over.

It forwards between gateways, verifiers and draft workers, and is the only one that knows all three; changing a
session's draft worker is invisible to the verifier. It never holds anything back: a forwarded message costs one hop.
"""

from __future__ import annotations

import math
import random
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import zmq

from services.router.assignment import Assignment
from services.router.health import LOST_SESSIONS
from services.router.held import Held, HeldSessions
from services.router.orders import FILE, MOST, Orders
from services.router.peers import Peer, PeerTable
from services.router.sessions import Session, Tally
from services.router.status import status_of
from services.router.workers import SHUT, WorkerRecord, WorkerTable
from shared import trace
from shared.clock import RoundTrip
from shared.errors import RequestError
from shared.messages import (
    MAX_SOURCES,
    Cancel,
    ClockEstimate,
    Close,
    Commit,
    Error,
    Explanation,
    Generate,
    GetExplanation,
    GetStatus,
    GetTrace,
    Goodbye,
    Hello,
    Message,
    OpenDraft,
    OpenTarget,
    Ordered,
    OrderWorker,
    Ping,
    Pong,
    Proposal,
    Role,
    Speculation,
    StepReport,
    TargetStats,
    Tokens,
    Trace,
    TraceSource,
    TraceSources,
    Welcome,
)
from shared.peer import BANNED, UNKNOWN_PEER
from shared.routing.lookup import LookupFigures
from shared.routing.policy import Asked, Candidate, Choice, Policy, Target, place
from shared.routing.score import STEP_PRIOR, beside, step_cost
from shared.sampling.params import SamplingParams
from shared.service import Handler, Link, Service, version
from shared.settings import Settings

LOCAL, DRAFTS = "local", "drafts"
_MAX_QUESTIONS = 1024
_BANNED_RETRY_S = 10
"""How often a banned worker asks; when the ban is lifted it is told at once."""
_PINNED = "an operator has pinned it to this worker"

_TARGET_PREFILL_PRIOR_S, _PREFILL_PRIOR_TOKENS = 1 / 250, 64


class RouterService(Service):
    """Two sockets: `local` for gateways, verifiers and the CLI, `drafts` for draft workers."""

    name = "router"

    def __init__(self, settings: Settings, instance: str = "") -> None:
        super().__init__(settings, instance)
        self._boot = random.getrandbits(64)
        self._peers = PeerTable()
        self._workers = WorkerTable(settings.router.demotion_s)
        self._policy = Policy(settings.router.exploration, random.Random())
        self._sessions: dict[int, Session] = {}
        self._requests: dict[tuple[bytes, int], int] = {}
        self._held = HeldSessions()
        self._questions: OrderedDict[int, tuple[bytes, int]] = OrderedDict()
        """Who asked for an explanation or a trace, and by which reference, by the reference that was passed on."""
        self._sockets: dict[str, Link] = {}
        self._orders = Orders(settings.run_path / FILE)
        self._turned_away: dict[str, bytes] = {}
        """Routing ids of banned workers that would come if they might."""
        self._tally = Tally()

    async def start(self) -> None:
        if self._orders.warning:
            self.log.warning("orders_ignored", file=FILE, reason=self._orders.warning)
        for name in self._orders:
            self.log.warning("worker_order_stands", worker=name, order=self._orders.of(name))
        self._sockets[LOCAL] = self._bind(
            LOCAL,
            self.settings.endpoint("router"),
            {
                Generate: self._on_generate,
                Cancel: self._on_cancel,
                Commit: self._on_commit,
                StepReport: self._on_step_report,
                GetStatus: self._on_status,
                OrderWorker: self._on_order,
                GetExplanation: self._on_get_explanation,
                Explanation: self._on_explanation,
                GetTrace: self._on_get_trace,
                Ping: lambda peer, message: self._reply(LOCAL, peer, Pong(message.sent_ns, time.monotonic_ns())),
            },
        )
        self._sockets[DRAFTS] = self._bind(DRAFTS, self.settings.endpoint("drafts"), {Proposal: self._on_proposal})
        self.every(self.settings.router.heartbeat_ms / 1000, self._heartbeat)

    def _bind(self, name: str, endpoint: str, own: dict[type, Handler]) -> Link:
        link = self.link(
            name,
            zmq.ROUTER,
            {
                **own,
                Hello: lambda peer, message: self._on_hello(name, peer, message),
                Pong: lambda peer, message: self._on_pong(name, peer, message),
                Goodbye: lambda peer, message: self._on_goodbye(name, peer, message),
                Trace: lambda peer, message: self._on_trace(name, peer, message),
                Error: lambda peer, message: self._on_error(name, peer, message),
            },
            on_refused=lambda peer, error: self._on_refused(name, peer, error),
        )
        link.bind(endpoint, "router" if name == LOCAL else name)
        return link

    def idle(self) -> bool:
        return not self._sessions

    def concerns(self, key: str) -> bool:
        # Of draft workers their names: what they load is their own business.
        return super().concerns(key) or (key.startswith("draft.") and key.count(".") == 1)

    def reloaded(self) -> None:
        self._policy.explore = self.settings.router.exploration
        self._workers.back_off(self.settings.router.demotion_s)

    # -- peers --

    def _on_hello(self, link_name: str, peer_id: bytes, hello: Hello) -> None:
        if (hello.role == "draft") != (link_name == DRAFTS):
            self._reply(link_name, peer_id, Error(0, "wrong_socket", f"a {hello.role} has no business at this socket"))
            return
        known = self._peers.get(link_name, peer_id)
        joined = known is None or known.hello != replace(hello, uptime_s=known.hello.uptime_s)
        if known is not None and not joined:
            known.heard(time.monotonic())
        else:
            previous = known or self._peers.named(hello.role, hello.instance)
            if previous is not None:
                self._lose(previous, "it has been replaced by a new process of the same name", LOST_SESSIONS)
            if (mismatch := self._vocabulary_mismatch(hello)) is not None:
                self.log.error("draft_refused", instance=hello.instance, reason=mismatch.message)
                self._reply(link_name, peer_id, mismatch)
                return
            if hello.role == "draft" and self._orders.of(hello.instance) == "ban":
                self._turn_away(hello.instance, peer_id)
                return
            peer = Peer(peer_id, link_name, hello, time.monotonic())
            self._peers.add(peer)
            if hello.role == "draft":
                self._workers.joined(peer, peer.heard_at).order = self._orders.of(hello.instance)
            self.log.info(
                "peer_joined",
                role=hello.role,
                peer=hello.instance,
                engine=hello.engine,
                model=hello.model,
                quant=hello.quant,
            )
        self._reply(link_name, peer_id, Welcome(self._boot, self.settings.router.heartbeat_ms))
        self._reply(link_name, peer_id, Ping(time.monotonic_ns()))
        if joined and hello.role == "verifier":
            self._refuse_mismatched_drafts()
        if joined and hello.role == "draft":
            self._offer(self._workers[hello.instance])

    def _offer(self, record: WorkerRecord) -> None:
        """A worker can take sessions that it could not before: those without one at once, the others if it pays."""
        for session in list(self._sessions.values()):
            if record.n_sessions >= record.n_slots:
                break
            if session.draft is None:
                self._assign(session)
            else:
                session.review_soon()

    def _vocabulary_mismatch(self, hello: Hello) -> Error | None:
        if hello.role != "draft" or not hello.vocab_fingerprint:
            return None
        targets = [p.hello for p in self._peers.of("verifier")]
        if not targets or any(t.vocab_fingerprint == hello.vocab_fingerprint for t in targets):
            return None
        target = targets[0]
        return Error(
            0,
            "vocabulary_mismatch",
            f"draft worker {hello.instance} has another vocabulary ({hello.model}: {hello.n_vocab} tokens, "
            f"{hello.vocab_fingerprint}) than the target ({target.model}: {target.n_vocab} tokens, "
            f"{target.vocab_fingerprint})",
            'draft with a model of the target\'s family, or with drafter = "ngram"',
        )

    def _refuse_mismatched_drafts(self) -> None:
        for peer in list(self._peers.of("draft")):
            if (mismatch := self._vocabulary_mismatch(peer.hello)) is not None:
                self.log.error("draft_refused", instance=peer.hello.instance, reason=mismatch.message)
                self._send(peer, mismatch)
                self._lose(peer, "its vocabulary is not the target's")

    def _on_pong(self, link_name: str, peer_id: bytes, message: Pong) -> None:
        peer = self._known(link_name, peer_id)
        if peer is not None:
            now_ns = time.monotonic_ns()
            peer.heard(now_ns / 1e9)
            if message.sent_ns <= now_ns:
                peer.measured((now_ns - message.sent_ns) // 1000)
                if message.clock_ns:
                    peer.clock.observe(RoundTrip(message.sent_ns, message.clock_ns, now_ns))
                if peer.hello.role == "draft" and peer.rtt_us is not None:
                    record = self._workers[peer.hello.instance]
                    record.figures.rtt_s = peer.rtt_us / 1e6
                    record.round_trip.observe((now_ns - message.sent_ns) / 1e9)

    def _on_goodbye(self, link_name: str, peer_id: bytes, message: Goodbye) -> None:
        peer = self._known(link_name, peer_id)
        if peer is None:
            return
        self.log.info("peer_draining", role=peer.hello.role, peer=peer.hello.instance, reason=message.reason)
        peer.draining = True
        if peer.hello.role == "draft":
            self._lose(peer, "it is draining")

    def _known(self, link_name: str, peer_id: bytes) -> Peer | None:
        """The peer behind a routing id; one that is not registered is asked to introduce itself."""
        peer = self._peers.get(link_name, peer_id)
        if peer is None:
            self._reply(link_name, peer_id, Error(0, UNKNOWN_PEER, "not registered here", "say Hello first"))
        return peer

    def _heartbeat(self) -> None:
        now = time.monotonic()
        deadline_s = self.settings.router.deadline_beats * self.settings.router.heartbeat_ms / 1000
        for peer in self._peers.all():
            if now - peer.heard_at > deadline_s:
                self._lose(peer, "it is silent", math.inf)
            elif not self._send(peer, Ping(time.monotonic_ns())):
                self._lose(peer, "its connection is gone", LOST_SESSIONS)
            elif peer.hello.role == "draft":
                self._look_at(self._workers[peer.hello.instance], peer, now)

    def _look_at(self, record: WorkerRecord, peer: Peer, now: float) -> None:
        """A worker's health: is its back-off over, does it owe proposals, has it become slow?"""
        if record.health.try_again(now):
            self.log.info("worker_on_probation", worker=record.name, demoted_for=record.health.reason)
            self._offer(record)
        sessions = [self._sessions[i] for i in peer.sessions if i in self._sessions]
        assignments = [s.assignment for s in sessions if s.assignment is not None]
        reading = sum(a.n_opened for a in assignments if not a.answered)
        owed_s = max((a.overdue_s(len(sessions), reading, now) for a in assignments), default=0.0)
        if owed_s:
            self._demote(record, f"it stalls: it has owed a proposal for {owed_s:.1f} s")
        elif record.degraded(now):
            for session in sessions:
                session.review_soon()

    def _on_refused(self, link_name: str, peer_id: bytes, error: Error) -> None:
        peer = self._peers.get(link_name, peer_id)
        if peer is not None and peer.hello.role == "draft":
            self._offend(self._workers[peer.hello.instance], f"its messages cannot be used: {error.message[:200]}")

    def _offend(self, record: WorkerRecord, reason: str, weight: float = 1.0) -> None:
        """A worker did something that no healthy one does; too much of that demotes it."""
        now = time.monotonic()
        if self.settings.router.demotion_s and record.health.offence(reason, now, weight):
            self._demoted(record, now)

    def _demote(self, record: WorkerRecord, reason: str) -> None:
        now = time.monotonic()
        if self.settings.router.demotion_s:
            record.health.demote(reason, now)
            self._demoted(record, now)

    def _demoted(self, record: WorkerRecord, now: float) -> None:
        """It gets no sessions for a while, and those that it has move on."""
        health = record.health
        self.log.warning(
            "worker_demoted", worker=record.name, reason=health.reason, retry_s=round(health.retry_s(now), 1)
        )
        self._move_on(record)

    def _move_on(self, record: WorkerRecord) -> int:
        """A worker is to have no sessions: those that it has go to others, or decode plainly; how many it had."""
        ids = sorted(record.peer.sessions) if record.peer is not None else []
        sessions = [self._sessions[i] for i in ids if i in self._sessions]
        for session in sessions:
            self._take_away(session)
            self._assign(session)
        return len(sessions)

    def _lose(self, peer: Peer, reason: str, fault: float = 0.0) -> None:
        """A peer is gone: its sessions move on (draft), end with an error (verifier), or are cancelled (gateway).

        fault: how much it counts against a draft worker that had sessions; infinity demotes it.
        """
        if self._peers.get(peer.link_name, peer.id) is not peer:
            return
        self._peers.remove(peer)
        if peer.hello.role == "draft":
            record = self._workers[peer.hello.instance]
            record.peer = None
            if peer.sessions and fault:
                self._offend(record, f"it left its sessions: {reason}", fault)
        self.log.warning(
            "peer_lost", role=peer.hello.role, peer=peer.hello.instance, reason=reason, sessions=len(peer.sessions)
        )
        for session_id in sorted(peer.sessions):
            session = self._sessions.get(session_id)
            if session is None:
                continue
            if peer.hello.role == "draft":
                self._unassign(session)
                self._assign(session)
            elif peer.hello.role == "verifier":
                self._fail(session, Error(0, "verifier_lost", f"the verifier is gone: {reason}", "try again", 5))
            else:
                self._send(session.verifier, Close(session_id))
        peer.sessions.clear()

    # -- sessions --

    def _on_generate(self, peer_id: bytes, message: Generate) -> None:
        began = time.monotonic_ns()
        gateway = self._known(LOCAL, peer_id)
        if gateway is None:
            return
        try:
            session = self._open(gateway, message)
        except RequestError as error:
            retry_s = 1 if error.code in ("overloaded", "no_verifier", "draining") else 0
            self._send(gateway, Error(message.request, error.code, error.message, error.remedy, retry_s))
            return
        self._assign(session)
        trace.span("router.generate", began, session.id, 0, len(message.tokens))

    def _open(self, gateway: Peer, message: Generate) -> Session:
        if self.draining:
            raise RequestError("the router is shutting down", "try again when it is back", "draining")
        if len(self._sessions) >= self.settings.router.max_sessions:
            raise RequestError(
                f"all {self.settings.router.max_sessions} sessions are in use", "try again", "overloaded"
            )
        if (gateway.id, message.request) in self._requests:
            raise RequestError(f"request {message.request} is already in progress", "", "duplicate_request")
        verifiers = {p.hello.instance: p for p in self._peers.of("verifier") if not p.draining}
        chosen = place([Target(name, len(p.sessions), p.hello.n_slots, p.step) for name, p in verifiers.items()])
        if chosen is None:
            raise RequestError("no verifier is connected", "is it still loading? see its log", "no_verifier")
        verifier = verifiers[chosen.instance]
        self._check_draft(message.speculation.draft)
        target = verifier.hello
        n_prompt = len(message.tokens)
        if n_prompt == 0:
            raise RequestError("the prompt is empty", "send at least one token", "empty_prompt")
        if n_prompt >= target.n_ctx:
            raise RequestError(
                f"the prompt has {n_prompt} tokens, the target's context holds {target.n_ctx} and needs room to answer",
                "shorten the prompt, or raise verifier.engine.n_ctx",
                "context_exceeded",
            )
        if any(not bias < math.inf for _, bias in message.sampling.logit_bias):
            raise RequestError("a logit_bias is not a number, or infinite", "-inf bans a token", "bad_logit_bias")
        ids = [int(message.tokens.min()), int(message.tokens.max()), *(i for i, _ in message.sampling.logit_bias)]
        for token in ids:
            if not 0 <= token < target.n_vocab:
                raise RequestError(f"token id {token} is outside 0..{target.n_vocab - 1}", "", "bad_token")

        session = Session(random.getrandbits(63), gateway, verifier, message, message.tokens.tolist(), time.monotonic())
        if message.speculation.draft == "auto":
            session.opened_pin = self._orders.pinned
        self._sessions[session.id] = session
        self._tally.n_opened += 1
        self._requests[gateway.id, message.request] = session.id
        gateway.sessions.add(session.id)
        verifier.sessions.add(session.id)
        held = Held(session.id, gateway, message.request, verifier)
        self._held.add(held, self._sessions, len(self._sessions))
        opened = self._send(
            verifier,
            OpenTarget(session.id, message.tokens, message.sampling, message.limits, message.speculation),
        )
        if not opened:
            self._tally.n_failed += 1
            self._forget(session)
            raise RequestError("the verifier takes no more messages", "try again", "overloaded")
        self.log.debug("session_opened", session=session.id, n_prompt=n_prompt)
        return session

    def _check_draft(self, wanted: str) -> None:
        """A worker that is only away for a time may be asked for, one that nobody knows may not."""
        known = self._known_workers()
        if wanted not in ("auto", "none", *known):
            raise RequestError(
                f"there is no draft worker {wanted[:40]!r}",
                f"workers known here: {', '.join(sorted(known)) or 'none'}; or auto, or none",
                "unknown_draft",
            )

    def _known_workers(self) -> set[str]:
        return {*self.settings.draft, *(record.name for record in self._workers)}

    def _assign(self, session: Session) -> None:
        """Give a session a draft worker, if there is one for it: the one that an operator wants, else the best."""
        if session.request.speculation.n_max == 0:
            return
        now = time.monotonic()
        candidates = self._candidates(session)
        asked = self._asked(session, now)
        pin = self._pin_of(session)
        choice = self._pinned(pin, asked, candidates, now)
        if choice is None:
            choice = self._policy.first(asked, candidates, now)
            if choice is not None and pin:
                choice = replace(choice, why=f"{choice.why}; pinned to {pin}, which {self._why_not(session, pin)}")
        if choice is not None:
            self._give(session, choice, now)

    def _pin_of(self, session: Session) -> str:
        """The worker that an operator wants for a session, or empty."""
        if session.pin:
            return session.pin
        return session.opened_pin if session.opened_pin == self._orders.pinned else ""

    def _pinned(self, pin: str, asked: Asked, candidates: Sequence[Candidate], now: float) -> Choice | None:
        """The worker of this name, if it can take a session."""
        if not pin:
            return None
        choice = self._policy.first(replace(asked, wanted=pin), candidates, now)
        return replace(choice, why=_PINNED) if choice is not None else None

    def _why_not(self, session: Session, name: str) -> str:
        """Why a session cannot have a worker, in words that follow its name."""
        record = self._workers.get(name)
        if record is None or record.peer is None:
            return "is away"
        if record.order in SHUT:
            return "is drained"
        if record.health.state == "demoted":
            return "is demoted"
        if record.n_sessions >= record.n_slots:
            return "has no free slot"
        return "has refused it" if name in session.refused else "cannot draft for it"

    def _candidates(self, session: Session) -> list[Candidate]:
        """The workers that can draft for a session, and for others if they have the slots."""
        fingerprints = ("", session.verifier.hello.vocab_fingerprint)
        return [
            record.candidate(session.id)
            for record in self._workers
            if record.peer is not None
            and not record.peer.draining
            and record.name not in session.refused
            and self._fits(session, record.peer)
            and record.hello.vocab_fingerprint in fingerprints
        ]

    def _fits(self, session: Session, worker: Peer) -> bool:
        """Whether a worker's cache has room for a session and a window beyond it."""
        n_ctx = worker.hello.n_ctx
        return not n_ctx or len(session.tokens) + self.settings.router.window < n_ctx

    def _asked(self, session: Session, now: float) -> Asked:
        """A session as the policy sees it."""
        verifier, n_tokens = session.verifier, len(session.tokens)
        open_to_all = session.request.speculation.draft == "auto"
        looking_up = open_to_all and any(r.peer and r.figures.looks_up for r in self._workers)
        if session.figures.lookup is None and looking_up:
            session.figures.lookup = LookupFigures(session.tokens)
        others = min(len(verifier.sessions), max(1, verifier.hello.n_slots)) - 1
        hidden_s = 0.0
        if n_tokens == session.n_prompt:
            prefill_s = n_tokens * verifier.prefill.value(now, _TARGET_PREFILL_PRIOR_S, _PREFILL_PRIOR_TOKENS)
            hidden_s = max(0.0, prefill_s - (now - session.opened_at))
        return Asked(
            session.request.speculation.draft,
            session.figures,
            n_tokens,
            session.tokens_left,
            session.request.speculation.n_max,
            session.figures.ease(self._workers.figures, now),
            beside(verifier.step or STEP_PRIOR, max(0, others)),
            (verifier.rtt_us or 0) / 1e6,
            hidden_s,
        )

    def _give(self, session: Session, choice: Choice, now: float) -> None:
        record = self._workers[choice.instance]
        peer = record.peer
        assert peer is not None  # candidates are registered
        stop_tokens, window = session.request.limits.stop_tokens, self.settings.router.window
        assignment = Assignment(record.figures, len(session.tokens), window, record.hello.n_ctx, stop_tokens, now)
        session.assigned(peer, assignment, choice)
        peer.sessions.add(session.id)
        tokens = np.array(session.tokens, np.int32)
        sampling: SamplingParams = session.request.sampling
        trace.mark("router.assign", session.id, len(tokens), len(tokens))
        if (held := self._held.get(session.id)) is not None:
            held.workers[record.name] = None
        if not self._send(peer, OpenDraft(session.id, tokens, sampling, stop_tokens, window)):
            self._lose(peer, "its connection is gone", LOST_SESSIONS)

    def _unassign(self, session: Session) -> None:
        if session.draft is not None:
            session.draft.sessions.discard(session.id)
            session.unassigned()

    def _take_away(self, session: Session) -> None:
        """A worker that is still there is to work on a session no more."""
        if session.draft is not None:
            self._send(session.draft, Close(session.id))
            self._unassign(session)

    def _review(self, session: Session) -> None:
        """Would another worker be better for a session by so much that a move pays?"""
        session.reviewed()
        if session.draft is not None and not self._fits(session, session.draft):
            self._take_away(session)
        worker = session.draft
        if worker is None:
            session.refused.clear()  # what had no room then may have some now
            self._assign(session)
            self._assign_waiting()
            return
        if self._to_pin(session):
            return
        now = time.monotonic()
        current = self._workers[worker.hello.instance].candidate(session.id)
        self._move(session, current, self._candidates(session), now)

    def _to_pin(self, session: Session) -> bool:
        """Give a session to the worker that an operator wants for it; True: it has that one now."""
        pin, now = self._pin_of(session), time.monotonic()
        if session.draft is not None and session.draft.hello.instance == pin:
            return True
        choice = self._pinned(pin, self._asked(session, now), self._candidates(session), now)
        if choice is not None:
            self._switch(session, choice, now)
        return choice is not None

    def _hold_against_lookup(self, session: Session) -> None:
        """Would prompt lookup be better now than the model that drafts, or a model than prompt lookup?"""
        session.held_against_lookup()
        on_trial = session.choice is not None and session.choice.trial
        if session.draft is None or session.figures.lookup is None or on_trial:
            return  # without one it is given the best as soon as there is one; a trial is to end
        if session.draft.hello.instance == self._pin_of(session):
            return
        now = time.monotonic()
        current = self._workers[session.draft.hello.instance].candidate(session.id)
        others = [c for c in self._candidates(session) if c.figures.looks_up != current.figures.looks_up]
        self._move(session, current, others, now)

    def _move(self, session: Session, current: Candidate, candidates: Sequence[Candidate], now: float) -> None:
        """Give a session to another worker, if one is better by enough."""
        choice = self._policy.again(self._asked(session, now), current, candidates, now)
        if choice is not None:
            self._switch(session, choice, now)

    def _switch(self, session: Session, choice: Choice, now: float) -> None:
        """Take a session from its worker, if it has one, and give it to another."""
        if session.draft is not None:
            previous = self._workers[session.draft.hello.instance]
            self.log.info(
                "draft_moved",
                session=session.id,
                worker=choice.instance,
                previous=previous.name,
                why=choice.why,
            )
            self._take_away(session)
            session.n_moves += 1
            session.n_lookup_moves += self._workers[choice.instance].figures.looks_up != previous.figures.looks_up
        self._give(session, choice, now)
        self._assign_waiting()

    def _on_proposal(self, peer_id: bytes, message: Proposal) -> None:
        began = time.monotonic_ns()
        peer = self._known(DRAFTS, peer_id)
        session = self._sessions.get(message.session)
        if peer is None or session is None or session.draft is not peer:
            return
        record, now = self._workers[peer.hello.instance], time.monotonic()
        assert session.assignment is not None  # as long as it has a worker
        n_vocab = session.verifier.hello.n_vocab
        if max(message.tokens) >= n_vocab:
            self._offend(record, f"token id {max(message.tokens)} is outside 0..{n_vocab - 1}")
            return
        received = session.assignment.propose(message, len(peer.sessions), now)
        if received.offence:
            self._offend(record, received.offence)
            return
        session.drafted(message)
        self._send(session.verifier, message)
        trace.span("router.proposal", began, session.id, message.start, len(message.tokens))
        self._tally.n_drafted += len(message.tokens)
        if message.decode_us:
            record.token.observe(message.decode_us / 1e6 / len(message.tokens), len(message.tokens))
        if received.anew and session.contradicted_at is not None:
            record.reply.observe(now - session.contradicted_at)
            session.contradicted_at = None
        if record.health.drafted(len(message.tokens), now):
            self.log.info("worker_readmitted", worker=record.name)
            self._offer(record)

    def _on_commit(self, peer_id: bytes, message: Commit) -> None:
        began = time.monotonic_ns()
        self._take_commit(peer_id, message)
        trace.span("router.commit", began, message.session, message.start, len(message.tokens), message.n_accepted)

    def _take_commit(self, peer_id: bytes, message: Commit) -> None:
        verifier = self._known(LOCAL, peer_id)
        session = self._sessions.get(message.session)
        if verifier is None:
            return
        if session is None or session.verifier is not verifier:
            if not message.finish:
                self._send(verifier, Close(message.session))
            return
        if message.start != len(session.tokens):
            self._send(verifier, Close(session.id))
            self._fail(session, Error(0, "lost_commit", "a part of the text was lost on the way", "try again", 1))
            return
        self._tally.n_tokens += len(message.tokens)
        self._tally.n_accepted += min(message.n_accepted, len(message.tokens))
        session.committed(message)  # first, so that a worker which takes over now gets these tokens too
        self._judge(session, message)
        if session.draft is not None:
            if message.finish:  # a worker that is gone is noticed later: no other one is to take over what has ended
                self._send(session.draft, Close(session.id))
            elif not self._send(session.draft, message):
                self._lose(session.draft, "its connection is gone")
        alive = True
        if message.tokens:
            alive = self._send(session.gateway, Tokens(session.request.request, message.tokens, message.n_accepted))
        if message.finish:
            stats = message.stats or TargetStats()
            self._send(session.gateway, session.finished(message.finish, stats))
            if (computed := stats.n_prompt - stats.n_cached) > 0 and stats.prefill_us:
                verifier.prefill.observe(stats.prefill_us / 1e6 / computed, computed, time.monotonic())
            self._tally.n_ended += 1
            self._forget(session)
        elif not alive:
            self._lose(session.gateway, "its connection is gone, or it does not read")
        elif session.review_in <= 0:
            self._review(session)
        elif session.lookup_in <= 0:
            self._hold_against_lookup(session)

    def _judge(self, session: Session, commit: Commit) -> None:
        """What a commit says of the proposals of a session's worker."""
        if session.draft is None or session.assignment is None:
            return
        now = time.monotonic()
        trials = session.assignment.commit(commit, now)
        if trials:
            worker = session.draft.hello.instance
            self._workers[worker].figures.judged(sum(trials), len(trials), now)
            session.figures.judged(worker, sum(trials), len(trials), now)
            if not all(trials):
                session.contradicted_at = now

    def _on_step_report(self, peer_id: bytes, message: StepReport) -> None:
        verifier = self._known(LOCAL, peer_id)
        if verifier is None:
            return
        verifier.n_steps, verifier.n_step_sessions = message.n_steps, message.n_step_sessions
        try:
            verifier.step = step_cost(message.points)
        except ValueError as error:
            self._reply(LOCAL, peer_id, Error(0, "bad_report", str(error)))

    def _on_cancel(self, peer_id: bytes, message: Cancel) -> None:
        session_id = self._requests.get((peer_id, message.request))
        if session_id is not None:
            self._send(self._sessions[session_id].verifier, Close(session_id))

    def _on_error(self, link_name: str, peer_id: bytes, message: Error) -> None:
        peer = self._peers.get(link_name, peer_id)
        session = self._sessions.get(message.ref)
        if peer is None:
            return
        self.log.warning(
            "peer_error", role=peer.hello.role, peer=peer.hello.instance, code=message.code, reason=message.message
        )
        if session is None:
            return
        if peer is session.draft:
            if message.code != "lost_commit":
                session.refused.add(peer.hello.instance)
            self._unassign(session)
            self._assign(session)
            self._assign_waiting()
        elif peer is session.verifier:
            self._fail(session, message)

    def _fail(self, session: Session, error: Error) -> None:
        """End a session with an error to its client."""
        self._send(
            session.gateway,
            Error(session.request.request, error.code, error.message, error.remedy, error.retry_after_s),
        )
        if session.draft is not None:
            self._send(session.draft, Close(session.id))
        self._tally.n_failed += 1
        self._forget(session)

    def _forget(self, session: Session) -> None:
        drafted = session.draft is not None
        self._unassign(session)
        session.gateway.sessions.discard(session.id)
        session.verifier.sessions.discard(session.id)
        self._sessions.pop(session.id, None)
        self._requests.pop((session.gateway.id, session.request.request), None)
        if drafted:
            self._assign_waiting()

    def _assign_waiting(self) -> None:
        """A slot of a draft worker is free: give it to the oldest session that has none."""
        for session in [s for s in self._sessions.values() if s.draft is None]:
            self._assign(session)
            if session.draft is not None:
                return

    # -- operations --

    def _on_status(self, peer_id: bytes, message: GetStatus) -> None:
        status = status_of(
            message.ref,
            version(),
            self.uptime_s,
            self._peers.all(),
            list(self._workers),
            list(self._sessions.values()),
            self._policy,
            self._orders,
            self._tally,
            self._pin_of,
            time.monotonic(),
        )
        self._reply(LOCAL, peer_id, status)

    def _on_order(self, peer_id: bytes, message: OrderWorker) -> None:
        answer: Ordered | Error
        try:
            answer = self._pin_session(message) if message.session else self._order(message)
        except RequestError as error:
            answer = Error(message.ref, error.code, error.message, error.remedy)
        self._reply(LOCAL, peer_id, answer)

    def _order(self, message: OrderWorker) -> Ordered:
        """Take an order about a worker, and do what follows from it at once."""
        name, order = message.worker, message.order
        self._check_ordered(name)
        previous = self._orders.of(name)
        if len(self._orders) >= MOST and not previous and order != "allow":
            raise RequestError(
                f"there are orders about {MOST} workers",
                "draftwire workers allow NAME takes one back",
                "too_many_orders",
            )
        unsaved = self._orders.give(name, "" if order == "allow" else order)
        self.log.warning("worker_ordered", worker=name, order=order, previous=previous, unsaved=unsaved)
        for record in self._workers:
            record.order = self._orders.of(record.name)
        ordered = self._workers.get(name)
        n_moved = 0
        if order == "allow":
            for session in self._sessions.values():
                if session.pin == name:
                    session.pin = ""
                    session.review_soon()
        if order in SHUT and ordered is not None:
            n_moved = self._move_on(ordered)
        if order == "ban" and ordered is not None and (peer := ordered.peer) is not None:
            self._lose(peer, "an operator has banned it")
            self._turn_away(name, peer.id)
        if order != "ban" and (peer_id := self._turned_away.pop(name, None)) is not None:
            self._reply(DRAFTS, peer_id, Error(0, UNKNOWN_PEER, "it may connect again", "say Hello"))
        if order not in SHUT and previous in SHUT and ordered is not None and ordered.peer is not None:
            self._offer(ordered)
        return Ordered(message.ref, n_moved, not unsaved, unsaved)

    def _pin_session(self, message: OrderWorker) -> Ordered:
        """One session is to go to a worker, and to stay there."""
        name = message.worker
        self._check_ordered(name)
        session = self._sessions.get(message.session)
        if session is None:
            raise RequestError(
                f"there is no generation {message.session:016x} in progress",
                "draftwire workers shows those there are",
                "unknown_session",
            )
        if message.order != "pin":
            raise RequestError("a single generation can only be pinned", "leave the session away", "bad_order")
        if session.request.speculation.n_max == 0 or session.request.speculation.draft == "none":
            raise RequestError("the request of this generation wants no draft", "", "no_draft_wanted")
        if (order := self._orders.of(name)) in SHUT:
            raise RequestError(
                f"there is an order about draft worker {name}: {order}",
                f"draftwire workers allow {name}",
                "worker_shut",
            )
        session.pin = name
        had = session.draft
        there = self._to_pin(session)
        self.log.warning("session_pinned", session=session.id, worker=name, there=there)
        note = "" if there else f"{name} {self._why_not(session, name)}; until it can, others draft"
        return Ordered(message.ref, int(session.draft is not had), False, note)

    def _check_ordered(self, name: str) -> None:
        known = {*self._known_workers(), *self._orders}
        if name not in known:
            raise RequestError(
                f"there is no draft worker {name[:40]!r}",
                f"known here: {', '.join(sorted(known))[:2000] or 'none'}",
                "unknown_worker",
            )

    def _turn_away(self, name: str, peer_id: bytes) -> None:
        """A banned worker is told so; it stays as it is and asks now and then."""
        if self._turned_away.get(name) != peer_id:
            self._turned_away[name] = peer_id
            self.log.warning("draft_banned", worker=name)
        error = Error(
            0,
            BANNED,
            f"an operator has banned draft worker {name}",
            f"draftwire workers allow {name}, where the router runs",
            _BANNED_RETRY_S,
        )
        self._reply(DRAFTS, peer_id, error)

    def _on_get_explanation(self, peer_id: bytes, message: GetExplanation) -> None:
        held = self._held.get(message.session)
        if held is None or not self._is_there(held.verifier):
            session = held.session if held is not None else message.session
            self._reply(LOCAL, peer_id, Explanation(message.ref, session, False, Speculation(), ()))
            return
        self._send(held.verifier, GetExplanation(self._passed_on(peer_id, message.ref), held.session))

    def _is_there(self, peer: Peer) -> bool:
        return self._peers.get(peer.link_name, peer.id) is peer

    def _passed_on(self, peer_id: bytes, ref: int) -> int:
        """The reference under which somebody else is asked what a peer has asked."""
        own = random.getrandbits(63)
        self._questions[own] = peer_id, ref
        if len(self._questions) > _MAX_QUESTIONS:
            self._questions.popitem(last=False)
        return own

    def _on_explanation(self, peer_id: bytes, message: Explanation) -> None:
        asked = self._questions.pop(message.ref, None)
        if self._known(LOCAL, peer_id) is not None and asked is not None:
            self._reply(LOCAL, asked[0], replace(message, ref=asked[1]))

    def _on_get_trace(self, peer_id: bytes, message: GetTrace) -> None:
        held = self._held.get(message.session)
        if held is None:
            self._reply(LOCAL, peer_id, TraceSources(message.ref, message.session, ()))
            return
        sources = [TraceSource("router", self.instance, "")]
        gateway = held.gateway if self._is_there(held.gateway) else None  # a new one counts its requests anew
        sources.append(self._traced("gateway", held.gateway.hello.instance, gateway, peer_id, message, held.request))
        others: list[tuple[Role, str]] = [("verifier", held.verifier.hello.instance)]
        others.extend(("draft", name) for name in held.workers)
        for role, name in others:
            sources.append(self._traced(role, name, self._peers.named(role, name), peer_id, message, held.session))
        self._reply(LOCAL, peer_id, TraceSources(message.ref, held.session, tuple(sources[:MAX_SOURCES])))
        own = trace.answer(GetTrace(message.ref, held.session), self.name, self.instance)
        self._reply(LOCAL, peer_id, own)

    def _traced(
        self, role: Role, name: str, peer: Peer | None, asker: bytes, question: GetTrace, number: int
    ) -> TraceSource:
        """Ask one that worked on a session; number: under which it records it."""
        if peer is None:
            return TraceSource(role, name, "it is not connected, or has been restarted since")
        if not self._send(peer, GetTrace(self._passed_on(asker, question.ref), number)):
            return TraceSource(role, name, "it takes no more messages")
        estimates = [ClockEstimate(e.at_ns, e.offset_ns, e.uncertainty_ns) for e in peer.clock.estimates()]
        return TraceSource(role, name, "", tuple(estimates))

    def _on_trace(self, link_name: str, peer_id: bytes, message: Trace) -> None:
        peer = self._known(link_name, peer_id)
        asked = self._questions.pop(message.ref, None)
        if peer is not None and asked is not None:
            named = replace(message, ref=asked[1], role=peer.hello.role, instance=peer.hello.instance)
            self._reply(LOCAL, asked[0], named)

    def _send(self, peer: Peer, message: Message) -> bool:
        return self._sockets[peer.link_name].send(message, peer.id)

    def _reply(self, link_name: str, peer_id: bytes, message: Message) -> None:
        self._sockets[link_name].send(message, peer_id)


SERVICE = RouterService
