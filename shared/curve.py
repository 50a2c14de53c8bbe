"""What protects a process's TCP sockets: CURVE keys, and at the door the list of keys that may come in (ZAP).

CurveZMQ (RFC 26) encrypts and authenticates; ZAP (RFC 27) asks for every new connection whether its key is allowed. The
list is read again when its file changes, and every message and every send is held against it, so that a key that is
revoked while it is connected gets nothing more from a second later on.

Invariant: a socket that others than this host's processes can reach is encrypted and closed to unknown keys, unless
`network.insecure` says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import zmq
from zmq.utils.monitor import parse_monitor_message

from shared.errors import SettingsError
from shared.keys import (
    AUTHORIZED,
    AuthorizedKey,
    HostKey,
    KeyRole,
    load_authorized,
    load_host_key,
    to_z85,
)
from shared.logs import Logger
from shared.refusals import MAX_SOURCES, REFUSALS_EVERY_S, Refusals
from shared.settings import Settings, is_loopback

ADMITTED: dict[str, frozenset[KeyRole]] = {
    "router": frozenset(("gateway", "verifier", "operator")),
    "drafts": frozenset(("draft",)),
    "tokenizer": frozenset(("gateway", "operator")),
    "sampler": frozenset(("verifier", "operator")),
}
"""Who may connect to a socket, by its name among the endpoints."""

HANDSHAKE_MS = 10_000
_LOOK_EVERY_S = 1.0
_ZAP = "inproc://zeromq.zap.01"
_RECONNECT_S = 1.0


class Keys:
    """This host's key and whom it trusts, read when first needed. Errors of its methods: `SettingsError`.

    Args:
        warn: gets an event's name and its fields when a socket is left open by `network.insecure`.
    """

    def __init__(self, settings: Settings, warn: Callable[..., Any]) -> None:
        self._settings = settings
        self._warn = warn
        self._host: HostKey | None = None
        self._loaded = False

    @property
    def host(self) -> HostKey | None:
        """This host's key; None where it has none."""
        if not self._loaded:
            self._host = load_host_key(self._settings.network.key_path)
            self._loaded = True
        return self._host

    def protects(self, endpoint: str) -> bool:
        """Whether an endpoint is to use CURVE: tcp:// does, except for loopback where there are no keys."""
        if not endpoint.startswith("tcp://"):
            return False
        _check_network(endpoint)
        if self.host is not None:
            return True
        if is_loopback(endpoint):
            return False
        remedy = "make keys with `draftwire keys init`, or use ipc:// or a loopback address"
        if self._settings.network.insecure:
            self._warn("insecure_endpoint", endpoint=endpoint, reason="whoever reaches it can use it", remedy=remedy)
            return False
        raise SettingsError(
            f"{endpoint} is open to the network and this host has no keys in {self._settings.network.key_path}", remedy
        )

    def secure_client(self, sock: zmq.Socket[bytes], endpoint: str) -> bool:
        """Prepare a socket to connect; whether it will be encrypted."""
        if not self.protects(endpoint):
            return False
        assert self.host is not None
        sock.curve_publickey = to_z85(self.host.public)
        sock.curve_secretkey = to_z85(self.host.secret)
        sock.curve_serverkey = to_z85(self._server())
        return True

    def secure_server(self, sock: zmq.Socket[bytes], endpoint: str, domain: str) -> bool:
        """Prepare a socket to bind; whether it will be encrypted, and asks ZAP by this domain."""
        if not self.protects(endpoint):
            return False
        assert self.host is not None
        sock.curve_server = True
        sock.curve_secretkey = to_z85(self.host.secret)
        sock.zap_domain = domain.encode()
        sock.handshake_ivl = HANDSHAKE_MS
        return True

    def _server(self) -> str:
        """The public key that whoever listens must prove to have."""
        assert self.host is not None
        path = self._settings.network.key_path / AUTHORIZED
        wanted = self._settings.network.server
        servers = [k for k in load_authorized(self._settings.network.key_path) if "server" in k.roles and not k.revoked]
        if wanted:
            key = next((k for k in servers if k.name == wanted), None)
            if key is None:
                known = ", ".join(k.name for k in servers) or "none"
                raise SettingsError(
                    f"network.server is {wanted!r}, which is no server in {path} (servers: {known})",
                    f"draftwire keys authorize {wanted} KEY --role server",
                )
            return key.public
        if len(servers) > 1:
            names = ", ".join(k.name for k in servers)
            raise SettingsError(f"{path} names several servers: {names}", "choose one with network.server")
        return servers[0].public if servers else self.host.public


def _check_network(endpoint: str) -> None:
    """libzmq would end the process where a sandbox leaves only AF_UNIX. Errors: `SettingsError`."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            raise SettingsError(
                f"{endpoint}: this process may not use the network",
                "its unit was made from other settings; make it anew: sudo draftwire units install",
            ) from None


def check_endpoints(settings: Settings, warn: Callable[..., Any] = lambda *_event, **_fields: None) -> None:
    """Whether every endpoint can be used as it stands. Errors: `SettingsError`. warn: as of `Keys`."""
    keys = Keys(settings, warn)
    names: tuple[Literal["router", "drafts", "tokenizer", "sampler"], ...] = (
        "router",
        "drafts",
        "tokenizer",
        "sampler",
    )
    protected = [name for name in names if keys.protects(settings.endpoint(name))]
    if protected and keys.host is not None:
        AllowList(settings.network.key_path, keys.host.public)


class AllowList:
    """Which keys may do what; `look` follows its file. This host's own key may do everything."""

    def __init__(self, directory: Path, own: str, log: Logger | None = None) -> None:
        self._directory = directory
        self._own = own
        self._log = log
        self._seen = self._stamp()
        self._keys = self._read()

    def verdict(self, public: str, domain: str) -> str:
        """Why a key may not come in, or empty if it may. public: 64 hexadecimal digits."""
        if public == self._own:
            return ""
        key = self._keys.get(public)
        if key is None:
            return "unknown key"
        if key.revoked:
            return "revoked key"
        return "" if ADMITTED.get(domain, frozenset()).intersection(key.roles) else "not allowed at this socket"

    def may_be(self, public: str, role: str) -> bool:
        """Whether a key may introduce itself as a gateway, a verifier or a draft worker."""
        key = self._keys.get(public)
        return public == self._own or (key is not None and not key.revoked and role in key.roles)

    def name(self, public: str) -> str:
        """What a key is called here, or its first digits."""
        key = self._keys.get(public)
        return key.name if key is not None else f"{public[:16]}..."

    def look(self) -> None:
        """Take in what has changed in the file."""
        seen = self._stamp()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = self._read()
        except SettingsError as error:  # what was allowed stays allowed: a slip of the hand must not stop the fleet
            if self._log is not None:
                self._log.error("keys_not_reloaded", reason=error.message, remedy=error.remedy)
            return
        if self._log is not None:
            self._log.info("keys_reloaded", keys=sum(not key.revoked for key in self._keys.values()))

    def _read(self) -> dict[str, AuthorizedKey]:
        return {key.public: key for key in load_authorized(self._directory)}

    def _stamp(self) -> tuple[int, ...]:
        try:
            info = (self._directory / AUTHORIZED).stat()
        except OSError:
            return ()
        return info.st_mtime_ns, info.st_ctime_ns, info.st_size, info.st_ino


class Gatekeeper:
    """Answers ZAP for all of a process's sockets, and knows which peer has which key. Lives on the event loop."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        loop: asyncio.AbstractEventLoop,
        allowed: AllowList,
        log: Logger,
    ) -> None:
        self.allowed = allowed
        self._log = log
        self._loop = loop
        self._refusals = Refusals(log, "connection_refused")
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ZAP)
        loop.add_reader(self._socket.fileno(), self._answer)
        self._look_again()

    @property
    def n_refused(self) -> int:
        """Connections and messages refused since the start."""
        return self._refusals.n_refused

    def refuse(self, source: str, reason: str, link: str) -> None:
        """Count a refusal; see `Refusals`."""
        self._refusals.add(source, f"{link}: {reason}")

    def _look_again(self) -> None:
        self.allowed.look()
        self._refusals.flush()
        self._timer = self._loop.call_later(_LOOK_EVERY_S, self._look_again)

    def _answer(self) -> None:
        self.allowed.look()
        while _readable(self._socket):
            version, request, domain, address, _identity, mechanism, *credentials = self._socket.recv_multipart()
            public, link, source = (
                "",
                domain.decode("ascii", "replace"),
                _plain_address(address.decode("ascii", "replace")),
            )
            if version != b"1.0" or mechanism != b"CURVE" or len(credentials) != 1 or len(credentials[0]) != 32:
                reason = f"mechanism {mechanism.decode('ascii', 'replace')}"
            else:
                public = credentials[0].hex()
                reason = self.allowed.verdict(public, link)
            if reason:
                named = f"{reason} ({self.allowed.name(public)})" if public else reason
                self.refuse(source, named, link)
                reply = (b"400", reason.encode(), b"")
            else:
                reply = (b"200", b"", public.encode())
            self._socket.send_multipart([b"1.0", request, *reply, b""])

    def close(self) -> None:
        self._refusals.flush(everything=True)
        self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()


class Door:
    """Watches the connections of one encrypted socket that listens, for those that never get as far as ZAP."""

    _EVENTS = (
        zmq.EVENT_ACCEPTED
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_DISCONNECTED
    )

    def __init__(self, sock: zmq.Socket[bytes], link: str, gate: Gatekeeper, loop: asyncio.AbstractEventLoop) -> None:
        self._link = link
        self._gate = gate
        self._sources: OrderedDict[int, str] = OrderedDict()
        self._failed = ""
        self._monitor = _Monitor(sock, self._EVENTS, loop, self._on_event)
        self.close = self._monitor.close

    def _on_event(self, event: int, value: int, _endpoint: str) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._sources[value] = _peer_address(value)
            while len(self._sources) > MAX_SOURCES:
                self._sources.popitem(last=False)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            self._failed = "it does not speak CURVE"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._failed = "it hung up in the handshake: it has no keys, expects another server, or is a scanner"
        else:
            # libzmq reports a failed handshake right before the end of the same connection.
            source = self._sources.pop(value, "unknown")
            if self._failed:
                self._gate.refuse(source, self._failed, self._link)
                self._failed = ""


class Caller:
    """Watches the connection of one encrypted socket that calls: says why it is refused, and tries on.

    libzmq gives up for good on a peer that breaks the protocol, such as a server that has no keys yet, and on one that
    does not let it in, as long as this host's key is not authorized there.
    """

    _EVENTS = (
        zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    )

    def __init__(
        self,
        sock: zmq.Socket[bytes],
        endpoint: str,
        link: str,
        keys: Keys,
        log: Logger,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._socket = sock
        self._endpoint = endpoint
        self._link = link
        self._keys = keys
        self._log = log
        self._loop = loop
        self._next_log = 0.0
        self._closed = self._reconnecting = False
        self._monitor = _Monitor(sock, self._EVENTS, loop, self._on_event)

    def _on_event(self, event: int, _value: int, _endpoint: str) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._next_log = 0.0
            return
        assert self._keys.host is not None
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            reason = "it does not let this host's key in"
            remedy = f"there: draftwire keys authorize {self._keys.host.name} {self._keys.host.public} --role ROLE"
        else:
            reason = "it does not prove to have the key that is authorized here as server, or has no keys"
            remedy = "compare `draftwire keys host` there with `draftwire keys list` here"
        if (now := time.monotonic()) >= self._next_log:
            self._next_log = now + REFUSALS_EVERY_S
            self._log.error("refused_by_server", link=self._link, endpoint=self._endpoint, reason=reason, remedy=remedy)
        if not self._reconnecting:
            self._reconnecting = True
            self._loop.call_later(_RECONNECT_S, self._reconnect)

    def _reconnect(self) -> None:
        """With the keys as they are now: another server may have been authorized meanwhile."""
        self._reconnecting = False
        if not self._closed:
            try:
                self._keys.secure_client(self._socket, self._endpoint)
            except SettingsError as error:
                self._log.error("keys_not_reloaded", reason=error.message, remedy=error.remedy)
            with contextlib.suppress(zmq.ZMQError):  # libzmq has forgotten it already
                self._socket.disconnect(self._endpoint)
            self._socket.connect(self._endpoint)

    def close(self) -> None:
        self._closed = True
        self._monitor.close()


class _Monitor:
    """A socket's events on the event loop."""

    def __init__(
        self,
        sock: zmq.Socket[bytes],
        events: int,
        loop: asyncio.AbstractEventLoop,
        handle: Callable[[int, int, str], None],
    ) -> None:
        self._watched = sock
        self._loop = loop
        self._handle = handle
        self._socket = sock.get_monitor_socket(events)
        loop.add_reader(self._socket.fileno(), self._read)
        loop.call_soon(self._read)
        self._closed = False

    def _read(self) -> None:
        while not self._closed and _readable(self._socket):
            event: Any = parse_monitor_message(self._socket.recv_multipart())
            self._handle(int(event["event"]), int(event["value"]), event["endpoint"].decode("utf-8", "replace"))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._socket.fileno())
            # In this order: libzmq's own thread blocks where an event finds no reader, or no room.
            while _readable(self._socket):
                self._socket.recv_multipart()
            self._watched.disable_monitor()
            self._socket.close()


def _readable(sock: zmq.Socket[bytes]) -> bool:
    return bool(int(sock.getsockopt(zmq.EVENTS)) & int(zmq.POLLIN))


def _peer_address(descriptor: int) -> str:
    """Who is at the other end of one of libzmq's sockets; "unknown" when it has been closed meanwhile."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            return _plain_address(str(sock.getpeername()[0]))
    except OSError:
        return "unknown"


def _plain_address(address: str) -> str:
    """An IPv4 address as such also where it comes through an IPv6 socket."""
    return address.removeprefix("::ffff:")


def key_of(frame: zmq.Frame) -> str:
    """The key of the peer that a message came from, as ZAP has noted it; empty where there is none."""
    try:
        return str(frame.get("User-Id"))
    except (zmq.ZMQError, KeyError, ValueError):
        return ""
