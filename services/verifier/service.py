"""The verifier: owns the target engine and its KV cache; batches sessions continuously; checks runs of proposals."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from services.verifier.sampler_client import SamplerClient, Stopped
from services.verifier.stepper import Stepper
from shared import trace
from shared.engine.interface import Engine, EngineInfo
from shared.engine.registry import load_engine
from shared.errors import SettingsError
from shared.messages import (
    MAX_STEP_SESSIONS,
    Close,
    Commit,
    Error,
    GetExplanation,
    Hello,
    Message,
    OpenTarget,
    Proposal,
)
from shared.peer import RouterConnection
from shared.service import BlockingLink, EngineThread, Mailbox, Service, monotonic_us, version
from shared.settings import Settings

_FORGET = object()
_WAKE = object()


class VerifierService(Service):
    """The event loop talks to the router; the engine thread computes and talks to the sampler."""

    name = "verifier"

    def __init__(self, settings: Settings, instance: str = "") -> None:
        super().__init__(settings, instance)
        self._mailbox = Mailbox()
        self._thread = EngineThread(self, "engine", self._compute)
        # Running, so that a service that stops meanwhile cannot cancel what the engine thread will set.
        self._loaded: Future[EngineInfo] = Future()
        self._loaded.set_running_or_notify_cancel()
        self._connection: RouterConnection | None = None
        self._stopping = False
        self._n_sessions = 0
        """Without those whose last commit is not yet with the event loop."""
        self._stepper: Stepper | None = None

    async def start(self) -> None:
        self._thread.start()
        info = await asyncio.wrap_future(self._loaded)
        hello = Hello(
            "verifier",
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
            self.settings.endpoint("router"),
            hello,
            dict.fromkeys((OpenTarget, Proposal, Close, GetExplanation), self._receive),
            self._router_lost,
        )

    def _receive(self, _peer: bytes, message: Any) -> None:
        began = time.monotonic_ns()
        if isinstance(message, OpenTarget) and self.draining:
            self._send([Error(message.session, "draining", "the verifier is shutting down", "try again", 5)])
            return
        # A proposal that finds no room is lost; the next commit shows it, and it is sent again.
        arrived = monotonic_us(), message
        if not self._mailbox.put(arrived, force=isinstance(message, Close)) and isinstance(message, OpenTarget):
            self._send([Error(message.session, "overloaded", "the verifier is not keeping up", "try again", 1)])
        if isinstance(message, Proposal):
            trace.span("verifier.proposal", began, message.session, message.start, len(message.tokens))
        elif isinstance(message, OpenTarget):
            trace.span("verifier.open", began, message.session, 0, len(message.tokens))

    def _router_lost(self, reason: str) -> None:
        self.log.warning("sessions_dropped", reason=reason)
        self._mailbox.put(_FORGET, force=True)

    def idle(self) -> bool:
        return self._n_sessions == 0

    def held(self) -> dict[str, int]:
        if self._stepper is None:
            return {}
        return {"sessions": self._stepper.n_sessions, "slots": self._stepper.n_slots_taken}

    def drain(self) -> None:
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
            sent = self._connection.send(message)
            if isinstance(message, Commit):
                n, accepted = len(message.tokens), message.n_accepted
                trace.span("verifier.commit", began, message.session, message.start, n, accepted)
            if not sent:
                self.log.error("router_queue_full", message=type(message).__name__)

    # -- engine thread --

    def _compute(self) -> None:
        settings = self.settings.verifier
        engine = self._load()
        link = BlockingLink(self, self.settings.endpoint("sampler"))
        try:
            sampler = SamplerClient(link, engine.info.n_vocab, settings.top_k_rows, self.log, self._alive)
            self._stepper = Stepper(engine, sampler, settings, self._emit)
            self._steps(self._stepper)
        except Stopped:
            pass
        finally:
            link.close()
            engine.close()

    def _steps(self, stepper: Stepper) -> None:
        while not self._stopping:
            self._thread.beat()
            self._take(stepper, 0 if stepper.busy else 1.0)
            while not self._stopping and (patience := stepper.patience(monotonic_us())) > 0:
                began = time.monotonic_ns()
                came = self._take(stepper, patience)
                trace.span("verifier.wait", began)
                if not came:
                    stepper.give_up()
                    break
            began = time.monotonic_ns()
            if stepper.n_sessions:
                stepper.step()
                trace.span("verifier.step", began)
            stepper.flush()
            self._n_sessions = stepper.n_sessions

    def _take(self, stepper: Stepper, timeout_s: float) -> bool:
        """Take in what has arrived, or arrives in time; False: nothing."""
        values = self._mailbox.take(timeout_s)
        for value in values:
            if value is _FORGET:
                stepper.forget_all()
            elif value is not _WAKE:
                at_us, message = value
                stepper.receive(message, at_us)
        return bool(values)

    def _emit(self, messages: Sequence[Message]) -> None:
        self.loop.call_soon_threadsafe(self._send, messages)

    def _alive(self) -> bool:
        self._thread.beat()
        return not self._stopping

    def _load(self) -> Engine:
        try:
            settings = self.settings.verifier
            self.log.info("loading", model=settings.engine.model, engine=settings.engine.engine)
            engine = load_engine(settings.engine)
            if engine.info.n_slots > MAX_STEP_SESSIONS:
                raise SettingsError(f"verifier.engine.n_slots is {engine.info.n_slots}, at most {MAX_STEP_SESSIONS}")
            rows = engine.info.n_slots * (settings.n_max + 1)
            if engine.info.n_batch <= rows:
                raise SettingsError(
                    f"verifier.engine.n_batch is {engine.info.n_batch}, {engine.info.n_slots} slots with "
                    f"{settings.n_max} proposals each take {rows} rows and prompts need some too",
                    f"raise it above {rows}, or lower n_slots or verifier.n_max",
                )
        except BaseException as error:
            self._loaded.set_exception(error)
            raise
        self._loaded.set_result(engine.info)
        return engine


SERVICE = VerifierService
