"""The gateway: HTTP on one side, the tokenizer and the router on the other.

Invariant: every request that came in whole gets an answer, refusals too, and every completion request one
`request_done` line, unless it had no key (`access.py`); a generation whose client has gone, or reads too slowly, is
cancelled at the router and holds nobody else up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import logging
import math
import os
import random
import socket
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import uvicorn

from services.gateway.access import ANYBODY, Access, Caller
from services.gateway.app import CLIENT_GONE, build_app
from services.gateway.errors import ApiError, bad_field, from_wire, unavailable
from services.gateway.generation import Generation, Outcome, Transcript
from services.gateway.metrics import Counters, Present, render
from services.gateway.requests import Completion, check_ids
from services.gateway.responses import compact
from services.gateway.timings import configuration, speculation_report, timings
from services.gateway.tls import leaf_of, server_context
from services.gateway.tokenizer import TokenizerClient
from shared import trace
from shared.errors import SettingsError
from shared.logs import Logger
from shared.messages import (
    MAX_CONTEXT,
    Cancel,
    DraftStats,
    Error,
    Finished,
    Generate,
    GetStatus,
    Hello,
    Limits,
    ModelLabel,
    Status,
    TargetStats,
    Tokens,
)
from shared.peer import RouterConnection
from shared.sampling.params import MAX_LOGIT_BIAS
from shared.service import Service, version
from shared.settings import GatewaySettings, Settings

ADDRESS_FILE: Final = "gateway.json"
"""In the run directory: {"scheme", "host", "port"} where HTTP is served; with HTTPS, "certificate" as PEM."""

STATUS_TIMEOUT_S = 2.0
FIGURES_TIMEOUT_S = 5.0
"""How long a cancelled generation's figures are waited for before its line is logged without them."""
LINGER_S = 60.0
"""How long a client may take to read what is left after its generation has ended."""
KEEP_ALIVE_S = 30
ACCESS_EVERY_S = 1.0
"""How often the file of API keys is looked at, and refusals that are due are logged."""
TLS_HANDSHAKE_S = 10.0
TLS_GOODBYE_S = 1.0
"""How long a client may take to begin and to end TLS; then its connection is cut."""
_BACKLOG = 512
_SEND_BUFFER = 128 << 10
"""Bytes of a response that the kernel keeps for a client; more would hide for long that it does not read."""


@dataclass(slots=True)
class Exchange:
    """One completion request, from its arrival to its log line.

    sent_ns: when the router was asked, 0 again with the first token. task: what answers it.
    """

    endpoint: str
    caller: Caller = ANYBODY
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    arrived_ns: int = field(default_factory=time.monotonic_ns)
    sent_ns: int = 0
    status: int = 200
    code: str = ""
    seed: int | None = None
    n_prompt: int = 0
    generation: Generation | None = None
    outcome: Outcome | None = None
    task: asyncio.Task[None] | None = None
    unread: Callable[[], None] = lambda: None


class GatewayService(Service):
    """See the module's docstring."""

    name = "gateway"

    def __init__(self, settings: Settings, instance: str = "") -> None:
        super().__init__(settings, instance)
        self._requests = itertools.count(1)
        self._exchanges: dict[int, Exchange] = {}
        """Generations that the router works on, by their number on the wire."""
        self._statuses: dict[int, asyncio.Future[Status]] = {}
        self._status: asyncio.Task[Status | None] | None = None
        self._n_admitted = 0
        self._counters = Counters()
        self._address_file: Path | None = None
        self._server: _Server
        self._serving: asyncio.Task[None] | None = None
        self.tokenizer: TokenizerClient
        self.router: RouterConnection
        self.access: Access

    async def start(self) -> None:
        settings = self.settings.gateway
        tls = server_context(settings.tls_cert, settings.tls_key)
        self.access = Access(settings.api_keys, self.log)
        listener = self._listen(tls is not None)
        try:
            self.tokenizer = TokenizerClient(self)
            self.router = RouterConnection(
                self,
                self.settings.endpoint("router"),
                Hello("gateway", self.instance, random.getrandbits(64), version=version()),
                {
                    Tokens: self._on_tokens,
                    Finished: self._on_finished,
                    Status: self._on_status,
                    Error: self._on_error,
                },
                self._on_router_lost,
            )
            host, port = listener.getsockname()[:2]
            address = {"scheme": "https" if tls is not None else "http", "host": host, "port": port}
            self._publish_address(address | ({"certificate": leaf_of(settings.tls_cert)} if tls is not None else {}))
        except BaseException:
            listener.close()
            raise
        self._server = _Server(build_app(self), settings, tls, self.log)
        self._serving = self.loop.create_task(self._server.serve(sockets=[listener]))
        self._serving.add_done_callback(self._on_server_end)
        self.every(ACCESS_EVERY_S, self.access.tick)
        self.log.info("listening", **address)

    def idle(self) -> bool:
        return self._serving is None or self._serving.done()

    def held(self) -> dict[str, int]:
        return {
            "requests": self._n_admitted,
            "generations": len(self._exchanges),
            "questions": len(self._statuses) + self.tokenizer.n_questions,
        }

    def drain(self) -> None:
        self.router.goodbye("draining")
        self._server.should_exit = True
        self.loop.call_later(max(0.0, self.settings.drain_s - 0.5), self._end_all, "the gateway is shutting down", 503)

    def stop(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            self.access.close()
        if self._address_file is not None:
            self._address_file.unlink(missing_ok=True)

    def _on_server_end(self, serving: asyncio.Task[None]) -> None:
        if not serving.cancelled() and (error := serving.exception()) is not None:
            self.fail(error)

    def _listen(self, encrypted: bool) -> socket.socket:
        """The listening socket; one that is open to the network says so in the log, or is refused."""
        settings = self.settings.gateway
        family, address = _resolve(settings.host, settings.port)
        is_open = settings.is_open(address[0], self.settings.network.insecure)
        listener = _listen(settings, family, address)
        if is_open and not self.access.needs_keys:
            self.log.warning(
                "insecure_gateway",
                host=address[0],
                reason="anybody on the network may ask",
                remedy="set gateway.api_keys, or serve at 127.0.0.1",
            )
        elif is_open and not encrypted:
            self.log.warning(
                "unencrypted_gateway",
                host=address[0],
                reason="keys and texts travel in clear",
                remedy="set gateway.tls_cert and gateway.tls_key",
            )
        return listener

    def _publish_address(self, address: dict[str, Any]) -> None:
        path = self.settings.run_path / ADDRESS_FILE
        fresh = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh.write_text(json.dumps(address) + "\n", encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            raise SettingsError(
                f"cannot write {path}: {error.strerror}", "choose another directory with run_dir"
            ) from None
        self._address_file = path

    # -- what the endpoints use --

    async def health(self) -> dict[str, Any]:
        """{"status": "ok"}; or what is missing or wrong, so that nothing can be generated now."""
        missing = [] if self.tokenizer.alive else ["tokenizer"]
        status = await self._router_status()
        verifiers = [p for p in status.peers if p.role == "verifier" and p.alive] if status is not None else []
        if status is None:
            missing.append("router")
        if not verifiers:
            missing.append("verifier")
        if missing:
            return {"status": "loading", "missing": missing}
        fingerprint = self.tokenizer.describe().vocab_fingerprint
        other = next((v for v in verifiers if v.vocab_fingerprint not in ("", fingerprint)), None)
        if other is not None:
            reason = f"the tokenizer has not the vocabulary of verifier {other.instance}"
            return {"status": "error", "missing": [], "reason": reason}
        return {"status": "ok"}

    async def metrics(self) -> bytes:
        """The body of `/metrics`."""
        status = await self._router_status()
        present = Present(version(), self.uptime_s, self._n_admitted, self.tokenizer.alive, status)
        return render(self._counters, present)

    @contextmanager
    def admitted(self, endpoint: str, caller: Caller) -> Iterator[Exchange]:
        """A place for one completion request; it is logged and its generation is over when the block ends.

        Raises:
            ApiError: 429 when all places are taken or the caller has had enough, 503 while shutting down.
        """
        exchange = Exchange(endpoint, caller)
        limit = self.settings.gateway.max_requests
        self._n_admitted += 1
        try:
            if self.draining:
                raise ApiError(503, "the gateway is shutting down", "draining", retry_after_s=5)
            if self._n_admitted > limit:
                raise ApiError(429, f"all {limit} requests are in use", "too_many_requests", retry_after_s=1)
            with caller.entered():
                yield exchange
        except ApiError as error:
            exchange.status, exchange.code = error.status, error.code
            raise
        except asyncio.CancelledError:
            exchange.status, exchange.code = CLIENT_GONE, "cancelled"
            raise
        except Exception:
            exchange.status, exchange.code = 500, "internal_error"
            raise
        finally:
            self._n_admitted -= 1
            exchange.unread()
            self._conclude(exchange)

    @asynccontextmanager
    async def generate(self, exchange: Exchange, completion: Completion) -> AsyncIterator[Transcript]:
        """Start a generation. Errors: `ApiError`, here for what is known at once and from the transcript later."""
        began = time.monotonic_ns()
        vocabulary = self.tokenizer.describe()
        check_ids(completion, vocabulary.n_vocab)
        exchange.seed = completion.sampling.seed
        if isinstance(completion.prompt, str):
            tokens = await self.tokenizer.encode(completion.prompt)
        else:
            tokens = np.array(completion.prompt, np.int32)
        encoded = time.monotonic_ns()
        exchange.n_prompt = len(tokens)
        if not len(tokens):
            raise bad_field("prompt", "encodes to no tokens", "empty_prompt")
        if len(tokens) >= MAX_CONTEXT:
            raise bad_field("prompt", f"{len(tokens)} tokens; no context holds as many", "context_exceeded")
        message = _generate_message(next(self._requests), tokens, completion, vocabulary.eog_ids)
        if not self.router.connected:
            raise unavailable("the router is not connected")
        asking = time.monotonic_ns()
        if not self.router.send(message):
            raise unavailable("the router takes no more messages")
        generation = Generation(message.request, len(tokens), lambda: self._give_up(exchange))
        exchange.generation = generation
        # Its number, by which marks are found, is new.
        trace.record("gateway.read", exchange.arrived_ns, began, message.request)
        trace.record("gateway.encode", began, encoded, message.request, 0, len(tokens))
        trace.span("gateway.generate", asking, message.request, 0, len(tokens))
        exchange.sent_ns = asking
        self._exchanges[message.request] = exchange
        transcript = Transcript(generation, self.tokenizer, completion.stop, lambda: self._cancel(message.request))
        try:
            yield transcript
        finally:
            exchange.outcome = transcript.outcome

    async def _router_status(self) -> Status | None:
        """One question at a time, whose answer is for all that wait: those who want it need no key."""
        if not self.router.connected:
            return None
        if self._status is None or self._status.done():
            self._status = self.loop.create_task(self._ask_for_status())
        return await asyncio.shield(self._status)

    async def _ask_for_status(self) -> Status | None:
        ref = next(self._requests)
        answer: asyncio.Future[Status] = self.loop.create_future()
        self._statuses[ref] = answer
        try:
            if not self.router.send(GetStatus(ref)):
                return None
            return await asyncio.wait_for(answer, STATUS_TIMEOUT_S)
        except asyncio.TimeoutError:
            return None
        finally:
            del self._statuses[ref]

    # -- what the router says --

    def _on_tokens(self, _peer: bytes, message: Tokens) -> None:
        began = time.monotonic_ns()
        exchange = self._exchanges.get(message.request)
        if exchange is not None and exchange.generation is not None:
            exchange.generation.put(message)
            if exchange.sent_ns:
                trace.record("gateway.first_token", exchange.sent_ns, began, message.request)
                exchange.sent_ns = 0
            trace.span("gateway.tokens", began, message.request, 0, len(message.tokens), message.n_accepted)

    def _on_finished(self, _peer: bytes, message: Finished) -> None:
        trace.mark("gateway.finished", message.request)
        self._end(message.request, message)

    def _on_status(self, _peer: bytes, message: Status) -> None:
        answer = self._statuses.get(message.ref)
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _on_error(self, _peer: bytes, message: Error) -> None:
        if not self._end(message.ref, from_wire(message)):
            self.log.warning("router_error", code=message.code, reason=message.message)

    def _on_router_lost(self, reason: str) -> None:
        self._end_all(f"the generation is lost: {reason}", 502)

    # -- how generations end --

    def _end_all(self, reason: str, status: int) -> None:
        code = "router_lost" if status == 502 else "draining"
        for request in list(self._exchanges):
            self._cancel(request)
            self._end(request, ApiError(status, reason, code, retry_after_s=1))

    def _end(self, request: int, event: Finished | ApiError) -> bool:
        """The router has nothing more to say about a request; False when it was not known."""
        exchange = self._exchanges.pop(request, None)
        if exchange is None or exchange.generation is None:
            return False
        exchange.generation.put(event)
        if exchange.task is None:  # its client has gone, and only the figures were waited for
            self._log_done(exchange)
        else:
            self._limit_reading(exchange)
        return True

    def _cancel(self, request: int) -> None:
        self.router.send(Cancel(request))

    def _give_up(self, exchange: Exchange) -> None:
        """The client has let too much wait."""
        self.log.warning("client_too_slow", request=exchange.id)
        if exchange.generation is not None:
            self._cancel(exchange.generation.request)
        self._limit_reading(exchange)

    def _limit_reading(self, exchange: Exchange) -> None:
        """Do not let a client that reads no more hold its place for ever."""
        exchange.unread()
        if exchange.task is not None:
            exchange.unread = self.loop.call_later(LINGER_S, self._cut, exchange).cancel

    def _cut(self, exchange: Exchange) -> None:
        if exchange.task is not None:
            self.log.warning("client_cut", request=exchange.id)
            exchange.task.cancel()

    def _conclude(self, exchange: Exchange) -> None:
        """The client has its answer, or is gone: end what the router still does for it, and log."""
        exchange.task = None
        generation = exchange.generation
        if generation is not None:
            trace.span("gateway.request", exchange.arrived_ns, generation.request, 0, exchange.n_prompt)
        if generation is None or generation.request not in self._exchanges:
            self._log_done(exchange)
            return
        self._cancel(generation.request)
        self.loop.call_later(FIGURES_TIMEOUT_S, self._forget, generation.request)

    def _forget(self, request: int) -> None:
        exchange = self._exchanges.pop(request, None)
        if exchange is not None:
            self._log_done(exchange)

    def _log_done(self, exchange: Exchange) -> None:
        """One line a request: figures only, nothing of what was written.

        `chunk` carries the timings once more as a JSON string, since scripts in the field look for llama-server's
        final stream chunk inside a log line; by depth they are outside of it alone, which those scripts rely on. With
        64 depths a line has 6 KiB: journald splits those over 48.
        """
        finished = exchange.generation.finished if exchange.generation is not None else None
        target = finished.target if finished is not None else TargetStats()
        draft = finished.draft if finished is not None else DraftStats()
        exchange.caller.charge(target.n_prompt + target.n_generated)
        labels = (finished.target_label, finished.draft_label) if finished is not None else (ModelLabel(), ModelLabel())
        measured = timings(target)
        total_s = (time.monotonic_ns() - exchange.arrived_ns) / 1e9
        self._counters.add(exchange.status, total_s, target, draft)
        if exchange.outcome is not None:
            finish: str = exchange.outcome.stop_type
        else:
            finish = "cancelled" if exchange.status == CLIENT_GONE else "error"
        plain = {name: value for name, value in measured.items() if name != "draft_by_depth"}
        self.log.info(
            "request_done",
            request=exchange.id,
            endpoint=exchange.endpoint,
            status=exchange.status,
            finish=finish,
            code=exchange.code,
            **({"api_key": exchange.caller.name} if exchange.caller.name else {}),
            seed=exchange.seed,
            n_prompt=exchange.n_prompt,
            total_ms=round(total_s * 1000, 3),
            **measured,
            **speculation_report(target, draft),
            **configuration(*labels),
            chunk=compact({"timings": plain}),
        )


def _generate_message(
    request: int, tokens: npt.NDArray[np.int32], completion: Completion, eog_ids: tuple[int, ...]
) -> Generate:
    sampling = completion.sampling
    stop_tokens = eog_ids
    if completion.ignore_eos:
        biases = dict(sampling.logit_bias) | dict.fromkeys(eog_ids, -math.inf)
        if len(biases) > MAX_LOGIT_BIAS:
            raise bad_field("logit_bias", f"at most {MAX_LOGIT_BIAS} entries, those of ignore_eos included")
        sampling = replace(sampling, logit_bias=tuple(biases.items()))
        stop_tokens = ()
    return Generate(request, tokens, sampling, Limits(completion.max_tokens, stop_tokens), completion.speculation)


def _resolve(host: str, port: int) -> tuple[int, tuple[Any, ...]]:
    """The family and the address to serve at. Errors: `SettingsError`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise SettingsError(f"gateway.host: {host!r} is no address: {error}", "give an address of this host") from None
    return family, address


def _listen(settings: GatewaySettings, family: int, address: tuple[Any, ...]) -> socket.socket:
    """A listening socket. Errors: `SettingsError`."""
    host, port = settings.host, settings.port
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)  # what it accepts inherits it
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(
                f"port {port} of {host} is in use", "stop what listens there, or choose another gateway.port"
            ) from None
        raise SettingsError(
            f"cannot listen on port {port} of {host}: {error.strerror}", "choose another gateway.host or gateway.port"
        ) from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn inside the service's own event loop: signals and logs are the service's business."""

    def __init__(self, app: Any, settings: GatewaySettings, tls: ssl.SSLContext | None, log: Logger) -> None:
        logger = logging.getLogger("uvicorn.error")
        logger.handlers = [_Forward(log)]
        logger.propagate = False
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=settings.forwarded,
            forwarded_allow_ips=["127.0.0.1", "::1"],
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=_BACKLOG,
        )
        super().__init__(config)
        self._tls_options: dict[str, Any] = {}
        if tls is not None:
            self._tls_options = {
                "ssl": tls,
                "ssl_handshake_timeout": TLS_HANDSHAKE_S,
                "ssl_shutdown_timeout": TLS_GOODBYE_S,
            }

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own servers would wait 30 s for a TLS client to say goodbye, and the drain with them."""
        await super().startup(sockets=[])
        protocol: Any = self.config.http_protocol_class
        for sock in sockets or ():
            server = await asyncio.get_running_loop().create_server(
                lambda: protocol(self.config, self.server_state, self.lifespan.state),
                sock=sock,
                backlog=_BACKLOG,
                **self._tls_options,
            )
            self.servers.append(server)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Forward(logging.Handler):
    """uvicorn's warnings and errors as lines of the service's own log."""

    def __init__(self, log: Logger) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        log = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        log("http_server", reason=record.getMessage().strip(), **({"exc_info": error} if error else {}))


SERVICE = GatewayService
