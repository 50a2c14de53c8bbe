"""A draft worker that a test plays on the real wire: honest until it is told how to lie.

It knows what the target will write, so that its honest proposals are accepted, and its lies come from one that is
trusted.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgpack  # type: ignore[import-untyped]
import numpy as np
import zmq

from shared import wire
from shared.messages import (
    MAX_CONTEXT,
    MAX_RUN,
    Close,
    Commit,
    Error,
    Goodbye,
    Hello,
    Message,
    OpenDraft,
    Ping,
    Pong,
    Proposal,
    Tokens,
    Welcome,
)
from shared.peer import UNKNOWN_PEER
from shared.prefix import TokenPrefix

AHEAD = 6
"""Tokens that the liar proposes at a time."""
_POLL_MS = 50
_WELCOME_S = 5.0


@dataclass(slots=True)
class _Session:
    """tokens: all that are committed. sent: honest proposals so far."""

    id: int
    tokens: TokenPrefix
    sent: list[Proposal] = field(default_factory=list)
    n_complaints: int = 0


class Liar:
    """See the module's docstring. Runs in a thread until `close`.

    Attributes:
        lie: a key of LIES, or empty: honest. truths: token sequences, prompt and all, that the target writes.
    """

    def __init__(self, endpoint: str, instance: str = "liar") -> None:
        self.lie = ""
        self.truths: list[list[int]] = []
        self._endpoint = endpoint
        self._instance = instance
        self._random = random.Random(0)
        self._sessions: dict[int, _Session] = {}
        self._closed_sessions: list[int] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name=instance)
        self._thread.start()

    def close(self) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as self._socket:
            self._socket.linger = 0
            self._socket.reconnect_ivl = 50
            self._socket.connect(self._endpoint)
            heard, hello = 0.0, _hello(self._instance)
            while not self._ending.is_set():
                if time.monotonic() - heard > 1.0:
                    self._sessions.clear()
                    hello = _hello(self._instance)
                    self._send(hello)
                    heard = time.monotonic()
                if not self._socket.poll(_POLL_MS):
                    continue
                message = wire.decode(self._socket.recv_multipart())
                heard = time.monotonic()
                if isinstance(message, Error) and message.code == UNKNOWN_PEER:
                    self._sessions.clear()
                    self._send(hello)
                else:
                    self._receive(message)

    def _receive(self, message: object) -> None:
        if isinstance(message, Ping):
            self._send(Pong(message.sent_ns))
        elif isinstance(message, OpenDraft):
            session = _Session(message.session, TokenPrefix(message.tokens.tolist()))
            self._sessions[message.session] = session
            self._propose(session)
        elif isinstance(message, Commit) and (known := self._sessions.get(message.session)) is not None:
            known.tokens.append(message.tokens)
            self._propose(known)
        elif isinstance(message, Close) and self._sessions.pop(message.session, None) is not None:
            self._closed_sessions.append(message.session)

    def _propose(self, session: _Session) -> None:
        if self.lie:
            getattr(self, f"_lie_{self.lie}")(session)
            return
        ahead = self._ahead(session)
        if ahead:
            proposal = _proposal(session, ahead)
            session.sent.append(proposal)
            self._send(proposal)

    def _ahead(self, session: _Session) -> list[int]:
        """What the target will write next, as far as that is known."""
        own = session.tokens.tokens
        for truth in self.truths:
            if truth[: len(own)] == own:
                return truth[len(own) : len(own) + AHEAD]
        return []

    def _noise(self, count: int) -> list[int]:
        return [self._random.randrange(256) for _ in range(count)]

    # -- lies; each answers one commit --

    def _lie_garbage(self, session: _Session) -> None:
        """Random tokens at the right place."""
        self._send(_proposal(session, self._noise(AHEAD)))

    def _lie_half(self, session: _Session) -> None:
        """A truth that turns into garbage."""
        self._send(_proposal(session, [*self._ahead(session)[:2], *self._noise(AHEAD)]))

    def _lie_hash(self, session: _Session) -> None:
        """The right tokens for another prefix, and other tokens with the hash of an older one."""
        self._send(_proposal(session, self._ahead(session) or [1], prefix_hash=self._random.getrandbits(64)))
        older = self._random.randrange(len(session.tokens))
        self._send(_proposal(session, self._noise(AHEAD), prefix_hash=session.tokens.hashes[older]))

    def _lie_position(self, session: _Session) -> None:
        """Before what is known, with right and wrong hashes; after it; beyond the context."""
        end = len(session.tokens)
        for start in (0, 1, end - 1, end // 2):
            self._send(_proposal(session, self._noise(MAX_RUN), start=start, prefix_hash=session.tokens.hashes[start]))
            self._send(_proposal(session, self._noise(AHEAD), start=start))
        for start in (end + 1, end + 7, end + MAX_RUN + 1, 10_000, MAX_CONTEXT):
            self._send(_proposal(session, self._noise(AHEAD), start=start))

    def _lie_parking(self, session: _Session) -> None:
        """Every place for proposals that came too early is taken, by ones that never fit."""
        for ahead in range(2, 40):
            self._send(_proposal(session, self._noise(4), start=len(session.tokens) + ahead))

    def _lie_flood(self, session: _Session) -> None:
        """Hundreds of proposals a commit, which contradict each other."""
        for _ in range(300):
            self._send(_proposal(session, self._noise(MAX_RUN)))

    def _lie_foreign(self, session: _Session) -> None:
        """For sessions that are nobody's, have ended, or are another worker's."""
        for other in (0, session.id ^ 1, self._random.getrandbits(63), *self._closed_sessions[-3:]):
            self._send(_proposal(session, self._noise(AHEAD), of=other))

    def _lie_malformed(self, session: _Session) -> None:
        """Bytes that are no message."""
        good = [bytes(frame) for frame in wire.encode(_proposal(session, self._noise(AHEAD)))]
        header = bytearray(good[0])
        header[self._random.randrange(len(header))] ^= 1 << self._random.randrange(8)
        for frames in (
            [b""],
            [bytes(header), *good[1:]],
            [good[0][: len(good[0]) // 2]],
            [self._random.randbytes(200)],
            [*good, b"more"],
            [msgpack.packb([99, "Proposal", []])],
            [msgpack.packb([1, "Nonsense", []])],
            [b"\x91" * 5000],
            [b"x"] * 40,
        ):
            self._socket.send_multipart(frames, zmq.NOBLOCK)

    def _lie_outside(self, session: _Session) -> None:
        """Tokens that are in no vocabulary."""
        for token in (1 << 20, 2**31 - 1):
            self._send(_proposal(session, [*self._ahead(session)[:1], token]))

    def _lie_replay(self, session: _Session) -> None:
        """What it has sent before, in another order, twice, and late."""
        again = session.sent[-20:]
        self._random.shuffle(again)
        for proposal in (*again, *again):
            self._send(proposal)
        self._send(_proposal(session, self._ahead(session) or [1]))
        self._send(_proposal(session, self._ahead(session) or [1]))

    def _lie_confidence(self, session: _Session) -> None:
        """Confidences that are no probabilities, and distributions that are none."""
        tokens = self._noise(3)
        for confidence in ((float("nan"),) * 3, (1e300, -5.0, float("inf")), (0.999,) * 2):
            self._send(_proposal(session, tokens, confidence=confidence))
        ids = np.array([-7, 1 << 30, tokens[0]], np.int32)
        probs = np.array([0.5, np.nan, 0.5], np.float32)
        self._send(_proposal(session, tokens, q_counts=(1, 1, 1), q_ids=ids, q_probs=probs))

    def _lie_cost(self, session: _Session) -> None:
        """The truth, at a cost of centuries."""
        self._send(_proposal(session, self._ahead(session) or [1], cost_us=2**53))

    def _lie_impostor(self, session: _Session) -> None:
        """It speaks for the verifier, for a gateway, and for the router."""
        commit = Commit(session.id, len(session.tokens), session.tokens.hash, (1, 2), 0, len(session.tokens), "stop")
        self._send(commit)
        self._send(Close(session.id))
        self._send(Tokens(1, (1, 2), 0))
        self._send(Welcome(7, 10))

    def _lie_complaint(self, session: _Session) -> None:
        """It asks again and again for its session to be opened anew."""
        if session.n_complaints < 3:
            session.n_complaints += 1
            self._send(Error(session.id, "lost_commit", "a commit of this session was lost"))

    def _lie_silence(self, session: _Session) -> None:
        """It answers pings, and drafts nothing."""

    def _send(self, message: Message) -> None:
        with contextlib.suppress(zmq.Again):  # its queue is full: it lies too much
            self._socket.send_multipart(wire.encode(message), zmq.NOBLOCK)


LIES = tuple(name[len("_lie_") :] for name in vars(Liar) if name.startswith("_lie_"))


def _hello(instance: str, fingerprint: str = "") -> Hello:
    return Hello("draft", instance, random.getrandbits(64), "scripted", "", fingerprint, n_slots=64)


def _proposal(
    session: _Session,
    tokens: list[int],
    *,
    of: int | None = None,
    start: int | None = None,
    prefix_hash: int | None = None,
    confidence: tuple[float, ...] = (),
    q_counts: tuple[int, ...] = (),
    q_ids: np.ndarray[tuple[int], np.dtype[np.int32]] | None = None,
    q_probs: np.ndarray[tuple[int], np.dtype[np.float32]] | None = None,
    cost_us: int = 100,
) -> Proposal:
    """What would be right for a session, but for what is given."""
    return Proposal(
        session.id if of is None else of,
        len(session.tokens) if start is None else start,
        session.tokens.hash if prefix_hash is None else prefix_hash,
        tuple(tokens[:MAX_RUN]),
        confidence,
        q_counts,
        np.empty(0, np.int32) if q_ids is None else q_ids,
        np.empty(0, np.float32) if q_probs is None else q_probs,
        cost_us,
        cost_us,
    )


def join_with_another_vocabulary(endpoint: str) -> Callable[[], None]:
    """A worker of a foreign vocabulary comes; what is returned makes it go."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(endpoint)
    socket.send_multipart(wire.encode(_hello("stranger", "another vocabulary")))

    def leave() -> None:
        socket.close()
        context.term()

    return leave


def flap(endpoint: str, times: int) -> None:
    """A worker joins and goes, again and again, sometimes with a word."""
    with zmq.Context() as context:
        for number in range(times):
            with context.socket(zmq.DEALER) as socket:
                socket.linger = 50
                socket.connect(endpoint)
                socket.send_multipart(wire.encode(_hello("flapper")))
                if socket.poll(int(_WELCOME_S * 1000)) and number % 2:
                    socket.send_multipart(wire.encode(Goodbye("going")))
