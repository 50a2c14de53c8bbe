"""A peer's side of its connection to the router: registration, heartbeats, and noticing that either has restarted.

Used by the gateway, the verifier and the draft workers alike. The peer introduces itself until it is welcomed, answers
pings, says what it has recorded, and introduces itself again when the router says that it does not know it, or falls
silent.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

import zmq

from shared import trace
from shared.errors import SettingsError
from shared.messages import MAX_U32, Error, GetTrace, Goodbye, Hello, Message, Ping, Pong, Welcome
from shared.service import Handler, Service

UNKNOWN_PEER = "unknown_peer"
"""Code of the router's `Error` to a peer that it has no registration of."""

BANNED = "banned"
"""Code of the router's `Error` to a draft worker that an operator does not want: it keeps its model, and asks again
after `retry_after_s`, or as soon as the router says that it does not know it."""

REFUSED = frozenset({"vocabulary_mismatch"})
"""Codes of an `Error` to a `Hello` that make it pointless to try again."""

_RETRY_S = 0.25
_SILENT_BEATS = 8
_PATIENCE_S, _COMPLAIN_EVERY_S = 10.0, 60.0


class RouterConnection:
    """A registered connection to the router.

    Args:
        hello: how this peer introduces itself.
        handlers: for the messages of its own business.
        on_router_lost: called when the router has forgotten this peer's sessions (it restarted), or is silent.
    """

    def __init__(
        self,
        service: Service,
        endpoint: str,
        hello: Hello,
        handlers: dict[type, Handler],
        on_router_lost: Callable[[str], None],
    ) -> None:
        self._service = service
        self._hello = hello
        self._on_router_lost = on_router_lost
        self._error_handler = handlers.get(Error)
        self._router_boot = 0
        self._heartbeat_s = 0.5
        self._heard = time.monotonic()
        self.connected = False
        self._banned = False
        self._next_hello = 0.0
        self._link = service.link(
            "router",
            zmq.DEALER,
            {
                **handlers,
                Welcome: self._welcome,
                Ping: self._ping,
                GetTrace: self._get_trace,
                Error: self._error,
            },
        )
        self._link.connect(endpoint)
        self._endpoint = endpoint
        self._next_complaint = time.monotonic() + _PATIENCE_S
        self._introduce()
        service.every(_RETRY_S, self._check)

    def send(self, message: Message) -> bool:
        """Queue a message; False when the queue is full."""
        return self._link.send(message)

    def goodbye(self, reason: str) -> None:
        self._link.send(Goodbye(reason))

    def _lose(self, reason: str) -> None:
        """Drop what the sessions hold here, and come back as a new peer, so that the router drops them too."""
        self._hello = replace(self._hello, boot=random.getrandbits(64))
        self._on_router_lost(reason)

    def _introduce(self) -> None:
        self._link.send(replace(self._hello, uptime_s=min(MAX_U32, self._service.uptime_s)))

    def _check(self) -> None:
        if self.connected and time.monotonic() - self._heard > _SILENT_BEATS * self._heartbeat_s:
            self.connected = False
            self._next_complaint = time.monotonic() + _PATIENCE_S
            self._service.log.warning("router_silent")
            self._lose("the router is silent")
        if not self.connected and time.monotonic() >= self._next_hello:
            self._introduce()
            now = time.monotonic()
            if now >= self._next_complaint and not self._banned:
                self._next_complaint = now + _COMPLAIN_EVERY_S
                self._service.log.warning(
                    "router_unreachable",
                    endpoint=self._endpoint,
                    reason="it does not answer",
                    remedy="is it running, and the address right? trying on",
                )

    def _welcome(self, _peer: bytes, message: Welcome) -> None:
        self._heard = time.monotonic()
        self._heartbeat_s = message.heartbeat_ms / 1000
        if self._router_boot not in (0, message.boot):
            self._on_router_lost("the router has restarted")
        if not self.connected:
            self._service.log.info("router_connected")
        self._router_boot = message.boot
        self.connected = True
        self._banned = False

    def _ping(self, _peer: bytes, message: Ping) -> None:
        self._heard = time.monotonic()
        self._link.send(Pong(message.sent_ns, time.monotonic_ns()))

    def _get_trace(self, _peer: bytes, message: GetTrace) -> None:
        self._link.send(trace.answer(message, self._service.name, self._service.instance))

    def _error(self, peer: bytes, message: Error) -> None:
        if message.code == UNKNOWN_PEER:
            if self.connected:
                self._lose("the router has forgotten this peer")
            if self.connected or self._banned:
                self.connected, self._next_hello = False, 0.0
                self._introduce()
        elif message.code == BANNED:
            self._turned_away(message)
        elif message.code in REFUSED:
            raise SettingsError(message.message, message.remedy, message.code)
        elif self._error_handler is not None:
            self._error_handler(peer, message)
        else:
            self._service.log.error("router_error", code=message.code, reason=message.message)

    def _turned_away(self, message: Error) -> None:
        """Wait, quietly; what it took to load a model is not thrown away."""
        if not self._banned:
            self._service.log.warning("banned", reason=message.message, remedy=message.remedy)
        if self.connected:
            self.connected = False
            self._lose("the router wants nothing from this peer")
        self._banned = True
        self._next_hello = time.monotonic() + max(1, message.retry_after_s)
