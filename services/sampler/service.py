"""The sampler: owns sampling parameters, seeds and penalties; from target logits it decides the accepted run."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

import zmq

from services.sampler.session import Question, SamplingSession, check_dense, questions, whole_rows
from shared import trace
from shared.engine.interface import Float32
from shared.errors import DraftwireError, WireError
from shared.messages import (
    CloseSampling,
    Error,
    FullRows,
    GetStatus,
    GetTrace,
    NeedRows,
    OpenSampling,
    Ping,
    Pong,
    ServiceStatus,
    Verdict,
    VerdictItem,
    Verify,
)
from shared.sampling.acceptance import NeedsRows
from shared.service import Link, Service, version
from shared.settings import Settings

MAX_SESSIONS = 4096
"""Sessions held for one verifier; the least recently opened go first, and are resynced if they are asked for."""


MAX_CLIENTS = 64
"""Verifiers remembered; those not heard for longest go first: routing ids of processes that are gone."""

CLIENT_S = 600.0
"""How long a silent verifier's sessions are kept; one that is heard again opens them anew, as after a restart."""


@dataclass(slots=True)
class Step:
    """A step in progress. dense: whole rows by index in the step. sample_us: spent so far."""

    number: int
    asked: list[Question]
    verdicts: list[VerdictItem | None]
    dense: dict[int, Float32] = field(default_factory=dict)
    sample_us: int = 0


@dataclass(slots=True)
class Client:
    """What is held for one verifier."""

    sessions: OrderedDict[int, SamplingSession] = field(default_factory=OrderedDict)
    step: Step | None = None
    heard_at: float = 0.0


class SamplerService(Service):
    """One socket, to verifiers; a verifier has one step in progress at a time."""

    name = "sampler"

    def __init__(self, settings: Settings, instance: str = "") -> None:
        super().__init__(settings, instance)
        self._clients: OrderedDict[bytes, Client] = OrderedDict()
        self._link: Link
        self._full_rows = 0
        self._rows = 0

    async def start(self) -> None:
        self._link = self.link(
            "sampler",
            zmq.ROUTER,
            {
                OpenSampling: self._on_open,
                CloseSampling: self._on_close,
                Verify: self._on_verify,
                FullRows: self._on_full_rows,
                Ping: self._on_ping,
                GetTrace: self._on_get_trace,
                GetStatus: self._on_status,
            },
        )
        self._link.bind(self.settings.endpoint("sampler"), "sampler")
        self.every(CLIENT_S / 10, self._forget_silent)

    def held(self) -> dict[str, int]:
        clients = self._clients.values()
        return {
            "sessions": sum(len(client.sessions) for client in clients),
            "steps": sum(client.step is not None for client in clients),
        }

    def drain(self) -> None:
        self.log.info("rows_sampled", rows=self._rows, full_rows=self._full_rows)

    def _on_status(self, peer: bytes, message: GetStatus) -> None:
        n_sessions = self.held()["sessions"]
        self._link.send(ServiceStatus(message.ref, self.name, version(), self.uptime_s, n_sessions), peer)

    def _client(self, peer: bytes) -> Client:
        client = self._clients.get(peer)
        if client is None:
            client = self._clients[peer] = Client()
            if len(self._clients) > MAX_CLIENTS:
                self._clients.popitem(last=False)
        self._clients.move_to_end(peer)
        client.heard_at = time.monotonic()
        return client

    def _forget_silent(self) -> None:
        """Verifiers that are gone do not say so."""
        while self._clients:
            peer, client = next(iter(self._clients.items()))
            if time.monotonic() - client.heard_at < CLIENT_S:
                return
            del self._clients[peer]

    def _on_open(self, peer: bytes, message: OpenSampling) -> None:
        sessions = self._client(peer).sessions
        sessions.pop(message.session, None)
        sessions[message.session] = SamplingSession(message)
        if len(sessions) > MAX_SESSIONS:
            sessions.popitem(last=False)

    def _on_close(self, peer: bytes, message: CloseSampling) -> None:
        sessions = self._client(peer).sessions
        for session in message.sessions:
            sessions.pop(session, None)

    def _on_verify(self, peer: bytes, message: Verify) -> None:
        started = time.monotonic_ns()
        client = self._client(peer)
        try:
            asked = questions(
                message, {i.session: s.n_vocab for i in message.items if (s := client.sessions.get(i.session))}
            )
        except WireError as error:
            self._refuse(peer, message.step, error)
            return
        for question in asked:
            try:
                if question.rows.n_vocab:
                    question.rows.check()
            except WireError as error:
                self._refuse(peer, question.item.session, error)
                return
        client.step = Step(message.step, asked, [None] * len(asked))
        self._rows += len(message.top_ids)
        self._decide(peer, client, started)

    def _on_full_rows(self, peer: bytes, message: FullRows) -> None:
        started = time.monotonic_ns()
        client = self._client(peer)
        step = client.step
        if step is None or step.number != message.step:
            return
        try:
            if len(message.logits) != len(message.rows):
                raise WireError("FullRows: as many rows as row numbers expected")
            n_vocab = max(question.rows.n_vocab for question in step.asked)
            check_dense(message.logits, n_vocab)
        except WireError as error:
            self._refuse(peer, message.step, error)
            return
        step.dense.update(zip(message.rows, message.logits, strict=True))
        self._full_rows += len(message.rows)
        self._decide(peer, client, started)

    def _decide(self, peer: bytes, client: Client, started_ns: int) -> None:
        step = client.step
        assert step is not None
        needed: list[int] = []
        for index, question in enumerate(step.asked):
            if step.verdicts[index] is not None:
                continue
            session = client.sessions.get(question.item.session)
            if session is None or not session.knows(question.item):
                step.verdicts[index] = VerdictItem(question.item.session, (), 0, resync=True)
                continue
            began = time.monotonic_ns()
            try:
                verdict = session.judge(question, whole_rows(question, step.dense))
            except DraftwireError as error:
                self._refuse(peer, question.item.session, error)
                return
            if isinstance(verdict, NeedsRows):
                needed.extend(question.first_row + row for row in verdict.rows)
            else:
                step.verdicts[index] = verdict
                item, n = question.item, len(verdict.tokens)
                accepted = min(verdict.n_accepted, len(item.tokens))
                trace.span("sampler.verdict", began, item.session, item.start, len(item.tokens), accepted, n)
        step.sample_us += (time.monotonic_ns() - started_ns) // 1000
        trace.span("sampler.decide", started_ns, 0, 0, len(step.asked), len(needed))
        if needed:
            self._link.send(NeedRows(step.number, tuple(needed)), peer)
            return
        verdicts = tuple(verdict for verdict in step.verdicts if verdict is not None)
        self._link.send(Verdict(step.number, verdicts, step.sample_us), peer)
        client.step = None

    def _on_ping(self, peer: bytes, message: Ping) -> None:
        self._link.send(Pong(message.sent_ns, time.monotonic_ns()), peer)

    def _on_get_trace(self, peer: bytes, message: GetTrace) -> None:
        self._link.send(trace.answer(message, self.name, self.instance), peer)

    def _refuse(self, peer: bytes, ref: int, error: DraftwireError) -> None:
        self.log.error("step_refused", ref=ref, code=error.code, reason=error.message)
        self._link.send(Error(ref, error.code, error.message[:4000], error.remedy), peer)


SERVICE = SamplerService
