"""The router: the session table, the registry of peers, who drafts for whom, and fail-over.

It forwards between gateways, verifiers and draft workers, and is the only one that knows all three; changing a
session's draft worker is invisible to the verifier. It never holds anything back: a forwarded message costs one hop.
"""

from __future__ import annotations

import math
import random
import time

import numpy as np
import zmq

from services.router import policy
from services.router.peers import Peer, PeerTable
from services.router.sessions import Session
from shared import trace
from shared.errors import RequestError
from shared.messages import (
    Cancel,
    Close,
    Commit,
    Error,
    Finished,
    Generate,
    GetStatus,
    Goodbye,
    Hello,
    Message,
    OpenDraft,
    OpenTarget,
    PeerStatus,
    Ping,
    Pong,
    Proposal,
    Status,
    TargetStats,
    Tokens,
    Welcome,
)
from shared.peer import UNKNOWN_PEER
from shared.sampling.params import SamplingParams
from shared.service import Handler, Link, Service, version
from shared.settings import Settings

LOCAL, DRAFTS = "local", "drafts"


class RouterService(Service):
    """Two sockets: `local` for gateways, verifiers and the CLI, `drafts` for draft workers."""

    name = "router"

    def __init__(self, settings: Settings, instance: str = "") -> None:
        super().__init__(settings, instance)
        self._boot = random.getrandbits(64)
        self._peers = PeerTable()
        self._sessions: dict[int, Session] = {}
        self._requests: dict[tuple[bytes, int], int] = {}
        self._sockets: dict[str, Link] = {}

    async def start(self) -> None:
        self._sockets[LOCAL] = self._bind(
            LOCAL,
            self.settings.endpoint("router"),
            {Generate: self._on_generate, Cancel: self._on_cancel, Commit: self._on_commit, GetStatus: self._on_status},
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
                Error: lambda peer, message: self._on_error(name, peer, message),
            },
        )
        link.bind(endpoint)
        return link

    def idle(self) -> bool:
        return not self._sessions

    # -- peers --

    def _on_hello(self, link_name: str, peer_id: bytes, hello: Hello) -> None:
        if (hello.role == "draft") != (link_name == DRAFTS):
            self._reply(link_name, peer_id, Error(0, "wrong_socket", f"a {hello.role} has no business at this socket"))
            return
        known = self._peers.get(link_name, peer_id)
        if known is not None and known.hello == hello:
            known.heard(time.monotonic())
        else:
            previous = known or self._peers.named(hello.role, hello.instance)
            if previous is not None:
                self._lose(previous, "it has been replaced by a new process of the same name")
            if (mismatch := self._vocabulary_mismatch(hello)) is not None:
                self.log.error("draft_refused", instance=hello.instance, reason=mismatch.message)
                self._reply(link_name, peer_id, mismatch)
                return
            self._peers.add(Peer(peer_id, link_name, hello, time.monotonic()))
            self.log.info("peer_joined", role=hello.role, peer=hello.instance, engine=hello.engine, model=hello.model)
        self._reply(link_name, peer_id, Welcome(self._boot, self.settings.router.heartbeat_ms))
        self._reply(link_name, peer_id, Ping(time.monotonic_ns()))
        if known is None and hello.role == "verifier":
            self._refuse_mismatched_drafts()
        if known is None and hello.role == "draft":
            for session in self._sessions.values():
                if session.draft is None:
                    self._assign(session)

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
                self._lose(peer, "it is silent")
            elif not self._send(peer, Ping(time.monotonic_ns())):
                self._lose(peer, "its connection is gone")

    def _lose(self, peer: Peer, reason: str) -> None:
        """A peer is gone: its sessions move on (draft), end with an error (verifier), or are cancelled (gateway)."""
        if self._peers.get(peer.link_name, peer.id) is not peer:
            return
        self._peers.remove(peer)
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

    def _open(self, gateway: Peer, message: Generate) -> Session:
        if self.draining:
            raise RequestError("the router is shutting down", "try again when it is back", "draining")
        if len(self._sessions) >= self.settings.router.max_sessions:
            raise RequestError(
                f"all {self.settings.router.max_sessions} sessions are in use", "try again", "overloaded"
            )
        if (gateway.id, message.request) in self._requests:
            raise RequestError(f"request {message.request} is already in progress", "", "duplicate_request")
        verifiers = [p for p in self._peers.of("verifier") if not p.draining]
        if not verifiers:
            raise RequestError("no verifier is connected", "is it still loading? see its log", "no_verifier")
        verifier = min(verifiers, key=lambda p: len(p.sessions) / max(1, p.hello.n_slots))
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

        session = Session(random.getrandbits(63), gateway, verifier, message, message.tokens.tolist())
        self._sessions[session.id] = session
        self._requests[gateway.id, message.request] = session.id
        gateway.sessions.add(session.id)
        verifier.sessions.add(session.id)
        opened = self._send(
            verifier,
            OpenTarget(session.id, message.tokens, message.sampling, message.limits, message.speculation),
        )
        if not opened:
            self._forget(session)
            raise RequestError("the verifier takes no more messages", "try again", "overloaded")
        self.log.debug("session_opened", session=session.id, n_prompt=n_prompt)
        return session

    def _assign(self, session: Session) -> None:
        """Give a session a draft worker, if there is one for it."""
        speculation = session.request.speculation
        if speculation.n_max == 0:
            return
        fingerprint = session.verifier.hello.vocab_fingerprint
        candidates = {
            peer.hello.instance: peer
            for peer in self._peers.of("draft")
            if peer.hello.instance not in session.failed
            and not peer.draining
            and peer.hello.vocab_fingerprint in ("", fingerprint)
        }
        views = [
            policy.Worker(name, peer.rtt_us, len(peer.sessions), peer.hello.n_slots)
            for name, peer in candidates.items()
        ]
        chosen = policy.choose(views, speculation.draft)
        if chosen is None:
            return
        peer = candidates[chosen.instance]
        session.assigned(peer)
        peer.sessions.add(session.id)
        tokens = np.array(session.tokens, np.int32)
        sampling: SamplingParams = session.request.sampling
        stop_tokens = session.request.limits.stop_tokens
        opened = OpenDraft(session.id, tokens, sampling, stop_tokens, self.settings.router.window)
        if not self._send(peer, opened):
            self._lose(peer, "its connection is gone")

    def _unassign(self, session: Session) -> None:
        if session.draft is not None:
            session.draft.sessions.discard(session.id)
            session.draft = None

    def _on_proposal(self, peer_id: bytes, message: Proposal) -> None:
        peer = self._known(DRAFTS, peer_id)
        session = self._sessions.get(message.session)
        if peer is None or session is None or session.draft is not peer:
            return
        trace.mark("router.proposal", session.id, message.start)
        session.drafted(message)
        self._send(session.verifier, message)

    def _on_commit(self, peer_id: bytes, message: Commit) -> None:
        trace.mark("router.commit", message.session, message.start)
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
        session.committed(message)  # first, so that a worker which takes over now gets these tokens too
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
            self._send(session.gateway, Finished(session.request.request, message.finish, stats, session.draft_stats))
            self._forget(session)
        elif not alive:
            self._lose(session.gateway, "its connection is gone, or it does not read")

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
                session.failed.add(peer.hello.instance)
            self._unassign(session)
            self._assign(session)
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
        peers = tuple(
            PeerStatus(
                peer.hello.role,
                peer.hello.instance,
                peer.hello.engine,
                peer.hello.model,
                peer.hello.vocab_fingerprint,
                peer.hello.n_vocab,
                peer.hello.n_ctx,
                peer.hello.n_slots,
                len(peer.sessions),
                peer.hello.row_invariant,
                peer.rtt_us or 0,
                not peer.draining,
            )
            for peer in self._peers.all()
        )
        self._reply(LOCAL, peer_id, Status(message.ref, version(), self.uptime_s, len(self._sessions), peers))

    def _send(self, peer: Peer, message: Message) -> bool:
        return self._sockets[peer.link_name].send(message, peer.id)

    def _reply(self, link_name: str, peer_id: bytes, message: Message) -> None:
        self._sockets[link_name].send(message, peer_id)


SERVICE = RouterService
