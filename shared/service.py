"""The life of a process, and its sockets.

A service declares its links and handlers in `start`; everything else, from settings to signals, is here. One event
loop a process (uvloop); handlers are plain functions that must not block. What computes does so on its own thread
(`EngineThread`).

Invariants: a send never blocks and never queues without bound; a bad message is answered and logged, and never ends
the process; a handler that raises does end it, loudly, for its supervisor to restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import uvloop
import zmq

from shared import logs, trace, wire
from shared.curve import AllowList, Caller, Door, Gatekeeper, Keys, key_of
from shared.errors import DraftwireError, ModelError, SettingsError, WireError
from shared.messages import Error, Hello, Message
from shared.settings import Settings, changed_keys, with_live

EXIT_CONFIG = 78
"""Exit status (EX_CONFIG of sysexits.h) when starting again cannot help: bad settings, bad model, refused by a peer."""

QUEUE_LENGTH = 1000
"""Messages that a socket queues for a peer and from it; beyond that, sends are refused."""

MAILBOX_LENGTH = 4 * QUEUE_LENGTH

_BURST = 64
_MAX_PEERS = 4096
_POLLIN = int(zmq.POLLIN)  # the enum's own & takes microseconds
_LOG_EVERY_S = 1.0
_STATUS_S = 5.0
_START_PATIENCE_S = 60.0
_MARGIN_S = 5.0

Handler = Callable[[bytes, Any], None]
"""Gets the peer's routing id (b"" on a dealer) and the message."""


def _new_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    sock = context.socket(kind)
    sock.linger = 200
    sock.sndhwm = sock.rcvhwm = QUEUE_LENGTH
    sock.maxmsgsize = wire.MAX_MESSAGE_BYTES
    sock.ipv6 = True
    if kind == zmq.ROUTER:
        sock.router_mandatory = 1
    else:
        sock.reconnect_ivl = 50
        sock.reconnect_ivl_max = 1000
    return sock


class Link:
    """One ZeroMQ socket on the event loop.

    Args:
        handlers: by message type; a message of another type is refused.
        fallback: gets what has no handler, instead of the refusal.
        on_refused: told which peer's message was refused, and how.
    """

    def __init__(
        self,
        service: Service,
        name: str,
        kind: int,
        handlers: dict[type, Handler],
        fallback: Handler | None = None,
        on_refused: Callable[[bytes, Error], None] | None = None,
    ) -> None:
        self.name = name
        self._service = service
        self._handlers = handlers
        self._fallback = fallback
        self._on_refused = on_refused
        self._kind = kind
        self._socket = _new_socket(service.context, kind)
        self._scheduled = False
        self._closed = False
        self._next_log = 0.0
        self._domain = ""
        self._gate: Gatekeeper | None = None
        self._peer_keys: OrderedDict[bytes, str] = OrderedDict()
        self._watchers: list[Door | Caller] = []
        self.n_refused = 0
        """Messages refused since the start: malformed, or of a type that is not expected here."""

    def bind(self, endpoint: str, domain: str = "") -> None:
        """Listen. domain: which keys may connect (`ADMITTED` of shared/curve.py), for tcp:// endpoints.

        Errors: `SettingsError` when the endpoint is taken or cannot be made, or is open to the network without keys.
        """
        if endpoint.startswith("ipc://"):
            _claim_socket_path(Path(endpoint[len("ipc://") :]))
        if self._service.keys.secure_server(self._socket, endpoint, domain):
            self._domain = domain
            self._gate = self._service.gatekeeper()
            self._watchers.append(Door(self._socket, domain, self._gate, self._service.loop))
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno == zmq.EADDRINUSE:
                raise SettingsError(
                    f"{endpoint} is in use", "is another fleet running? stop it, or choose another run_dir or port"
                ) from None
            raise SettingsError(f"cannot bind {endpoint}: {error.strerror}") from None
        if endpoint.startswith("tcp://"):
            self._service.log.info("socket_listening", link=domain, endpoint=endpoint, curve=self._gate is not None)
        self._watch()

    def connect(self, endpoint: str) -> None:
        """Errors: `SettingsError` when the endpoint cannot be one, or leads to the network and there are no keys."""
        service = self._service
        if service.keys.secure_client(self._socket, endpoint):
            self._watchers.append(Caller(self._socket, endpoint, self.name, service.keys, service.log, service.loop))
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise SettingsError(f"cannot connect to {endpoint}: {error.strerror}") from None
        self._watch()

    def _watch(self) -> None:
        self._service.loop.add_reader(self._socket.fileno(), self._pump)
        self._schedule()

    def send(self, message: Message, peer: bytes = b"") -> bool:
        """Queue a message; False when it cannot be: the peer is gone or its queue is full."""
        if self._closed or (self._gate is not None and self._is_shut_out(peer)):
            return False
        frames: Sequence[Any] = wire.encode(message)
        if self._kind == zmq.ROUTER:
            frames = [peer, *frames]
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.ENOTSOCK):
                return False
            raise
        finally:
            # The descriptor is edge-triggered, and sending may have eaten the edge of something that has arrived.
            if self._has_arrived():
                self._schedule()
        return True

    def _has_arrived(self) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & _POLLIN)

    def _schedule(self) -> None:
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._service.loop.call_soon(self._pump_scheduled)

    def _pump_scheduled(self) -> None:
        self._scheduled = False
        self._pump()

    def _pump(self) -> None:
        for _ in range(_BURST):
            if self._closed or not self._has_arrived():
                return
            if self._gate is not None:
                first = self._socket.recv(zmq.NOBLOCK, copy=False)
                peer, key = first.bytes, key_of(first)
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
                if self._is_known(peer, key):
                    self._receive(peer, frames)
                continue
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
            peer = frames.pop(0) if self._kind == zmq.ROUTER else b""
            self._receive(peer, frames)
        self._schedule()

    def _is_known(self, peer: bytes, key: str) -> bool:
        """Whether a message may be read: its sender's key has not been revoked since it connected."""
        assert self._gate is not None
        self._peer_keys[peer] = key
        self._peer_keys.move_to_end(peer)  # those not heard for longest are forgotten first
        while len(self._peer_keys) > _MAX_PEERS:
            self._peer_keys.popitem(last=False)
        if reason := self._gate.allowed.verdict(key, self._domain):
            self._gate.refuse(self._gate.allowed.name(key), reason, self._domain)
            return False
        return True

    def _is_shut_out(self, peer: bytes) -> bool:
        assert self._gate is not None
        return bool(self._gate.allowed.verdict(self._peer_keys.get(peer, ""), self._domain))

    def _receive(self, peer: bytes, frames: list[bytes]) -> None:
        try:
            message = wire.decode(frames)
        except WireError as error:
            self._refuse(peer, Error(0, error.code, error.message[:4000], error.remedy))
            return
        if isinstance(message, Hello) and not self._may_be(peer, message.role):
            self._refuse(peer, Error(0, "wrong_role", f"this key may not be a {message.role} here"))
            return
        handler = self._handlers.get(type(message), self._fallback)
        if handler is not None:
            try:
                handler(peer, message)
            except BaseException as error:
                self._service.fail(error)
                raise
        elif not isinstance(message, Error):
            self._refuse(peer, Error(0, "unexpected_message", f"{type(message).__name__} has no meaning here"))

    def _may_be(self, peer: bytes, role: str) -> bool:
        return self._gate is None or self._gate.allowed.may_be(self._peer_keys.get(peer, ""), role)

    def _refuse(self, peer: bytes, error: Error) -> None:
        self.n_refused += 1
        now = time.monotonic()
        if now >= self._next_log:
            self._next_log = now + _LOG_EVERY_S
            self._service.log.warning(
                "message_refused", link=self.name, code=error.code, reason=error.message, refused=self.n_refused
            )
        self.send(error, peer)
        if self._on_refused is not None:
            self._on_refused(peer, error)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for watcher in self._watchers:
                watcher.close()
            self._service.loop.remove_reader(self._socket.fileno())
            self._socket.close()


class BlockingLink:
    """A dealer socket for one thread that has nothing to do until the answer is there (the verifier's engine thread).

    A thread blocked in `receive` answers in half the time that an event loop needs, and a step cannot go on without
    its verdict.
    """

    def __init__(self, service: Service, endpoint: str) -> None:
        """Errors: `SettingsError`, as of `Link.connect`."""
        self._service = service
        self._endpoint = endpoint
        self._socket = _new_socket(service.context, zmq.DEALER)
        self._encrypted = service.keys.secure_client(self._socket, endpoint)
        self._socket.connect(endpoint)

    def renew(self) -> bool:
        """Connect anew if keys are in play: libzmq gives up on a peer that has not let it in. Errors: `SettingsError`.

        What is queued is lost. False where there was nothing to do.
        """
        if self._encrypted:
            with contextlib.suppress(zmq.ZMQError):  # libzmq has forgotten it already
                self._socket.disconnect(self._endpoint)
            self._service.keys.secure_client(self._socket, self._endpoint)
            self._socket.connect(self._endpoint)
        return self._encrypted

    def send(self, message: Message) -> bool:
        """Queue a message; False when the queue is full."""
        try:
            self._socket.send_multipart(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_ms: int) -> Message | None:
        """The next message, or None after the timeout. Errors: `WireError`."""
        if not self._socket.poll(timeout_ms):
            return None
        return wire.decode(self._socket.recv_multipart())

    def close(self) -> None:
        self._socket.close()


def _claim_socket_path(path: Path) -> None:
    """Make room for an ipc socket: its directory exists and is private, and no living process listens there.

    ZeroMQ itself would silently take over a socket file that another process is serving.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and not path.is_socket():
            raise SettingsError(f"{path} is in the way of a socket", "choose another endpoint or run_dir")
        if path.exists():
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(path))
                except (ConnectionRefusedError, FileNotFoundError):
                    path.unlink(missing_ok=True)
                else:
                    raise SettingsError(
                        f"{path} is in use by another process",
                        "is another fleet running? stop it, or choose another run_dir",
                    )
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied", str(path.parent))
    except OSError as error:
        raise SettingsError(
            f"cannot use the run directory {path.parent}: {error.strerror}", "choose another with run_dir"
        ) from None


S = TypeVar("S", bound="Service")


class Service(ABC):
    """A process: `run_service(Router, settings)` runs one to its end.

    Attributes:
        log: bound to the service and its instance. loop: the event loop. context: of all its sockets.
    """

    name: str

    def __init__(self, settings: Settings, instance: str = "") -> None:
        self.settings = settings
        self.read_settings: Callable[[], Settings] = lambda: settings
        """Reads the configuration again, for a reload."""
        self.instance = instance or self.name
        self.log = logs.configure(self.name, self.instance, settings.log_level)
        self.loop: asyncio.AbstractEventLoop
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.keys = Keys(settings, self.log.warning)
        self.draining = False
        self.threads: list[EngineThread] = []
        self.watchdog_s = int(os.environ.get("WATCHDOG_USEC", 0)) / 1e6 or math.inf
        self.join_s = 10.0
        """How long `stop` may wait for a thread to end."""
        self._links: list[Link] = []
        self._gatekeeper: Gatekeeper | None = None
        self._done: asyncio.Event
        self._failure: BaseException | None = None
        self._started_at = time.monotonic()
        self._ready = False
        self._healthy = True

    # -- what a service defines --

    @abstractmethod
    async def start(self) -> None:
        """Open links and load what is needed; the service is ready when this returns."""

    def idle(self) -> bool:
        """Whether nothing is in progress, so that a drain may end."""
        return True

    def held(self) -> dict[str, int]:
        """How much it holds of what requests need, by kind; logged when a drain begins.

        Any thread's state may be read. What is not 0 while nobody is served has leaked.
        """
        return {}

    def drain(self) -> None:  # noqa: B027 (optional)
        """Called once when the service is asked to stop: take no new work; what is in progress may end."""

    def stop(self) -> None:  # noqa: B027 (optional)
        """Called last, to end threads and free engines."""

    def healthy(self) -> bool:
        """Whether the watchdog may be told that all is well: no engine has been at one thing for `watchdog_s`."""
        return all(thread.beat_age_s < self.watchdog_s for thread in self.threads if thread.alive)

    def reloaded(self) -> None:  # noqa: B027 (optional)
        """Called after a reload has changed `settings`."""

    def concerns(self, key: str) -> bool:
        """Whether a setting ("verifier.n_max") means something to this service, so that a reload speaks of it."""
        return "." not in key or key.partition(".")[0] in ("endpoints", "network", self.name)

    def status_line(self) -> str:
        """What `systemctl status` shows."""
        held = ", ".join(f"{n} {what}" for what, n in self.held().items())
        return held or "ready"

    # -- what it uses --

    def link(
        self,
        name: str,
        kind: int,
        handlers: dict[type, Handler],
        fallback: Handler | None = None,
        on_refused: Callable[[bytes, Error], None] | None = None,
    ) -> Link:
        link = Link(self, name, kind, handlers, fallback, on_refused)
        self._links.append(link)
        return link

    def gatekeeper(self) -> Gatekeeper:
        """Who lets connections in, for this process's encrypted sockets. Errors: `SettingsError`."""
        if self._gatekeeper is None:
            assert self.keys.host is not None
            allowed = AllowList(self.settings.network.key_path, self.keys.host.public, self.log)
            self._gatekeeper = Gatekeeper(self.context, self.loop, allowed, self.log)
        return self._gatekeeper

    def every(self, seconds: float, action: Callable[[], None]) -> None:
        """Call `action` periodically from now on."""

        def tick() -> None:
            try:
                action()
            except BaseException as error:
                self.fail(error)
                raise
            self.loop.call_later(seconds, tick)

        self.loop.call_later(seconds, tick)

    def fail(self, error: BaseException) -> None:
        """End the process because of an error; from the event loop's thread."""
        if self._failure is None:
            self._failure = error
        self._done.set()

    def fail_threadsafe(self, error: BaseException) -> None:
        """`fail`, from another thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: the process is on its way out
            self.loop.call_soon_threadsafe(self.fail, error)

    @property
    def uptime_s(self) -> int:
        return int(time.monotonic() - self._started_at)

    # -- its life --

    async def _run(self) -> int:
        if self.settings.trace_dir:
            trace.start()
        self.loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, stopping.set)
        self.loop.add_signal_handler(signal.SIGHUP, self._reload)
        notify("STATUS=starting")
        self.every(_STATUS_S, self._notify_status)
        try:
            if not await self._started_before(stopping):
                self.log.info("stopped_while_loading")
                self.join_s = 0.1
                return 0
            self.log.info("ready", version=version())
            self._ready = True
            notify(f"READY=1\nSTATUS={self.status_line()}")
            if self.watchdog_s < math.inf:
                self.every(self.watchdog_s / 3, self._feed_watchdog)
            await _first(stopping.wait(), self._done.wait())
            if self._failure is None:
                self.log.info("draining", **self.held())
                # systemd then waits as long as the drain may take, whatever the unit's TimeoutStopSec.
                patience_us = int((self.settings.drain_s + self.join_s + _MARGIN_S) * 1e6)
                notify(f"STOPPING=1\nSTATUS=draining\nEXTEND_TIMEOUT_USEC={patience_us}")
                self.draining = True
                self.drain()
                deadline = time.monotonic() + self.settings.drain_s
                while not self.idle() and time.monotonic() < deadline and self._failure is None:
                    await asyncio.sleep(0.02)
        except BaseException as error:  # reported below, whatever it is
            self._failure = self._failure or error
        finally:
            self.stop()
            if self.settings.trace_dir:
                trace.write(Path(self.settings.trace_dir), f"{self.name}-{self.instance}")
            if any(thread.alive for thread in self.threads):
                # It hangs, or loads a model; its sockets would keep the context from ending.
                self.log.warning("engine_thread_abandoned")
                status = self._report()
                sys.stdout.flush()
                os._exit(status)
            for link in self._links:
                link.close()
            if self._gatekeeper is not None:
                self._gatekeeper.close()
            self.context.term()
        return self._report()

    def _notify_status(self) -> None:
        if self.draining:
            return
        if self._ready:
            notify(f"STATUS={self.status_line()}")
        else:  # a large model loads for as long as it takes; that the event loop turns shows that this process lives
            notify(f"EXTEND_TIMEOUT_USEC={int(_START_PATIENCE_S * 1e6)}")

    def _feed_watchdog(self) -> None:
        healthy = self.healthy()
        if healthy:
            notify("WATCHDOG=1")
        elif self._healthy:
            age_s = max(thread.beat_age_s for thread in self.threads)
            self.log.error("engine_hangs", silent_s=round(age_s, 1), reason="the watchdog is not fed any more")
        self._healthy = healthy

    def _reload(self) -> None:
        """On SIGHUP: read the configuration again; what can change while running does."""
        told = self._ready and not self.draining  # else READY=1 would say what is not so
        if told:
            notify(f"RELOADING=1\nMONOTONIC_USEC={monotonic_us()}")
        try:
            self._take_settings()
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            if told:
                notify("READY=1")

    def _take_settings(self) -> None:
        try:
            fresh = self.read_settings()
        except DraftwireError as error:
            self.log.error("reload_refused", reason=error.message, remedy=error.remedy)
        else:
            changed = {k: live for k, live in changed_keys(self.settings, fresh).items() if self.concerns(k)}
            self.settings = with_live(self.settings, fresh)
            logs.set_level(self.settings.log_level)
            self.reloaded()
            waiting = [key for key, live in changed.items() if not live]
            self.log.info("reloaded", changed=[key for key, live in changed.items() if live], needs_restart=waiting)

    async def _started_before(self, stopping: asyncio.Event) -> bool:
        """Start; False when the service is asked to stop before it is ready."""
        starting = asyncio.ensure_future(self.start())
        await _first(asyncio.shield(starting), stopping.wait(), self._done.wait())
        if starting.done():
            starting.result()
            return True
        starting.cancel()
        return False

    def _report(self) -> int:
        error = self._failure
        if error is None:
            self.log.info("stopped")
            return 0
        if isinstance(error, DraftwireError):
            self.log.error("stopped", code=error.code, reason=error.message, remedy=error.remedy)
            print(f"draftwire {self.name}: {error}", file=sys.stderr, flush=True)
            return EXIT_CONFIG if isinstance(error, (SettingsError, ModelError)) else 1
        self.log.error("crashed", exc_info=error)
        return 1


def run_service(
    cls: type[S], settings: Settings, instance: str = "", read_settings: Callable[[], Settings] | None = None
) -> int:
    """Run a service until it is told to stop; returns the process's exit status.

    read_settings: reads the configuration again, on SIGHUP; errors: `DraftwireError`.
    """
    sys.setswitchinterval(0.0005)  # an event loop and an engine thread share the interpreter; 5 ms would be a token
    service = cls(settings, instance)
    if read_settings is not None:
        service.read_settings = read_settings
    return uvloop.run(service._run())


async def _first(*awaitables: Any) -> None:
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def notify(state: str) -> None:
    """Tell the supervisor (systemd, or `draftwire up`) through $NOTIFY_SOCKET; silently nothing without one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock, contextlib.suppress(OSError):
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.send(state.encode())


class EngineThread:
    """The thread that computes: it runs one function to its end and beats at every turn of that function's loop.

    An exception there ends the process through `Service.fail`.
    """

    def __init__(self, service: Service, name: str, run: Callable[[], None]) -> None:
        self._service = service
        self._run = run
        self._beat = time.monotonic()
        service.threads.append(self)
        self._thread = threading.Thread(target=self._guard, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def beat(self) -> None:
        self._beat = time.monotonic()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def beat_age_s(self) -> float:
        return time.monotonic() - self._beat

    def join(self, timeout_s: float) -> None:
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _guard(self) -> None:
        try:
            self._run()
        except BaseException as error:  # handed to the event loop, which ends the process
            self._service.fail_threadsafe(error)


class Mailbox:
    """Hands values from the event loop to the engine thread, in order, and wakes it; bounded."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._condition = threading.Condition()

    def put(self, value: Any, *, force: bool = False) -> bool:
        """Queue a value; False when the mailbox is full and the value is not forced in."""
        with self._condition:
            if len(self._values) >= MAILBOX_LENGTH and not force:
                return False
            self._values.append(value)
            self._condition.notify()
            return True

    def take(self, timeout_s: float | None) -> list[Any]:
        """All values there are; waits up to timeout_s for the first one (None: forever, 0: not at all)."""
        with self._condition:
            if not self._values and timeout_s != 0:
                self._condition.wait(timeout_s)
            values, self._values = self._values, []
            return values


def monotonic_us() -> int:
    return time.monotonic_ns() // 1000


def version() -> str:
    """The installed version of Draftwire."""
    try:
        return metadata.version("draftwire")
    except metadata.PackageNotFoundError:
        return "unknown"
