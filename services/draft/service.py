"""A draft worker: owns a draft engine (a model or n-grams) and its KV cache; proposes tokens ahead of verification."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from services.draft.drafters import Drafter, ModelDrafter, modelless
from services.draft.worker import Worker
from shared import trace
from shared.engine.registry import load_engine
from shared.errors import SettingsError
from shared.messages import Close, Commit, Error, Hello, Message, OpenDraft, Proposal
from shared.peer import RouterConnection
from shared.service import EngineThread, Mailbox, Service, version
from shared.settings import Settings

_FORGET = object()
_WAKE = object()


class DraftService(Service):
    """The event loop talks to the router, the engine thread drafts. The instance names its table, [draft.INSTANCE]."""

    name = "draft"

    def __init__(self, settings: Settings, instance: str = "") -> None:
        if not instance and settings.draft:
            instance = next(iter(settings.draft))
        super().__init__(settings, instance)
        self._mailbox = Mailbox()
        self._thread = EngineThread(self, "engine", self._compute)
        # Running, so that a service that stops meanwhile cannot cancel what the engine thread will set.
        self._loaded: Future[Drafter] = Future()
        self._loaded.set_running_or_notify_cancel()
        self._connection: RouterConnection | None = None
        self._worker: Worker | None = None
        self._stopping = False

    async def start(self) -> None:
        if self.instance not in self.settings.draft:
            known = ", ".join(sorted(self.settings.draft)) or "none"
            raise SettingsError(f"no draft worker {self.instance!r} is configured", f"configured: {known}")
        self._thread.start()
        info = (await asyncio.wrap_future(self._loaded)).info
        hello = Hello(
            "draft",
            self.instance,
            random.getrandbits(64),
            info.engine,
            info.model,
            info.vocab_fingerprint,
            info.n_vocab,
            info.n_ctx,
            info.n_slots,
            info.row_invariant,
            version(),
            info.quant,
        )
        self._connection = RouterConnection(
            self,
            self.settings.endpoint("drafts"),
            hello,
            dict.fromkeys((OpenDraft, Commit, Close), self._receive),
            self._router_lost,
        )

    def _receive(self, _peer: bytes, message: Any) -> None:
        began = time.monotonic_ns()
        # A commit that finds no room leaves a gap, which the next one shows: the session is opened again.
        if not self._mailbox.put(message, force=isinstance(message, Close)) and isinstance(message, OpenDraft):
            self._send([Error(message.session, "overloaded", "this draft worker is not keeping up", "", 1)])
        if isinstance(message, Commit):
            n, accepted = len(message.tokens), message.n_accepted
            trace.span("draft.commit", began, message.session, message.start, n, accepted)

    def _router_lost(self, reason: str) -> None:
        self.log.warning("sessions_dropped", reason=reason)
        self._mailbox.put(_FORGET, force=True)

    def concerns(self, key: str) -> bool:
        return key.startswith(f"draft.{self.instance}.") if key.startswith("draft.") else super().concerns(key)

    def held(self) -> dict[str, int]:
        return {} if self._worker is None else {"sessions": self._worker.n_sessions}

    def drain(self) -> None:
        # Its sessions move on to another worker at once; nothing is lost by leaving.
        if self._connection is not None:
            self._connection.goodbye("draining")

    def stop(self) -> None:
        self._stopping = True
        self._mailbox.put(_WAKE, force=True)
        self._thread.join(self.join_s)

    def _send(self, messages: Sequence[Message]) -> None:
        assert self._connection is not None
        for message in messages:
            began = time.monotonic_ns()
            # A proposal that cannot be queued is lost; the next commit shows it, and it is sent again.
            if self._connection.send(message) and isinstance(message, Proposal):
                trace.span("draft.proposal", began, message.session, message.start, len(message.tokens))

    # -- engine thread --

    def _compute(self) -> None:
        drafter = self._load()
        try:
            self._worker = worker = Worker(drafter, self._emit)
            busy = False
            while not self._stopping:
                self._thread.beat()
                for message in self._mailbox.take(0 if busy else 1.0):
                    if message is _FORGET:
                        worker.forget_all()
                    elif message is not _WAKE:
                        worker.receive(message)
                busy = worker.turn()
        finally:
            drafter.shut()

    def _emit(self, messages: Sequence[Message]) -> None:
        self.loop.call_soon_threadsafe(self._send, messages)

    def _load(self) -> Drafter:
        settings = self.settings.draft[self.instance]
        try:
            if settings.drafter != "model":
                drafter = modelless(settings.drafter)
            else:
                self.log.info("loading", model=settings.engine.model, engine=settings.engine.engine)
                drafter = ModelDrafter(load_engine(settings.engine), settings.q_top_k)
        except BaseException as error:
            self._loaded.set_exception(error)
            raise
        self._loaded.set_result(drafter)
        return drafter


SERVICE = DraftService
