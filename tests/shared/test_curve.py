"""Who comes in through an encrypted socket, and who does not: a real service's port, and real connections to it."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from shared import wire
from shared.curve import AllowList
from shared.keys import AUTHORIZED, HostKey, authorize, load_host_key, new_host_key, revoke, to_z85, write_host_key
from shared.messages import GetStatus, Hello, Message, Pong, Welcome
from tests.gateway.fleet import Process

PATIENCE_S = 30.0
SILENCE_MS = 700
"""How long nothing may come where nothing must: many times what an answer takes."""

NOT_HERE = "drafts: not allowed at this socket"

pytestmark = pytest.mark.pipeline


class Router(Process):
    """A router process on TCP ports with keys; draft workers connect to `port`, others to `local_port`."""

    def __init__(self, directory: Path) -> None:
        self.keys = directory / "keys"
        with socket.socket() as probe, socket.socket() as other:
            for sock in (probe, other):
                sock.bind(("127.0.0.1", 0))
            self.port, self.local_port = probe.getsockname()[1], other.getsockname()[1]
        super().__init__(
            "router",
            directory / "run",
            "router.heartbeat_ms=100",
            f"network.keys={json.dumps(str(self.keys))}",
            f"endpoints.drafts=tcp://127.0.0.1:{self.port}",
            f"endpoints.router=tcp://127.0.0.1:{self.local_port}",
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        """Those that were logged so far."""
        return [event for event in map(json.loads, self.log_text.splitlines()) if event["event"] == name]


class Caller:
    """A draft worker's socket, as far as keys and the first words go."""

    def __init__(self, port: int, own: HostKey | None, server: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        if own is not None:
            self.socket.curve_publickey, self.socket.curve_secretkey = to_z85(own.public), to_z85(own.secret)
            self.socket.curve_serverkey = to_z85(server)
        self.socket.connect(f"tcp://127.0.0.1:{port}")

    def send(self, message: Message) -> None:
        self.socket.send_multipart(wire.encode(message))

    def hello(self, role: Any = "draft") -> None:
        self.send(Hello(role, "d", 1))

    def receive(self, timeout_ms: int = int(PATIENCE_S * 1000)) -> Any:
        return wire.decode(self.socket.recv_multipart()) if self.socket.poll(timeout_ms) else None

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@pytest.fixture
def host(tmp_path: Path) -> HostKey:
    key = new_host_key("target-box")
    write_host_key(tmp_path / "keys", key)
    return key


@pytest.fixture
def router(tmp_path: Path, host: HostKey) -> Iterator[Router]:
    del host
    running = Router(tmp_path)
    running.logged("ready")
    yield running
    running.stop()


@pytest.fixture
def callers() -> Iterator[list[Caller]]:
    made: list[Caller] = []
    yield made
    for caller in made:
        caller.close()


def test_a_key_that_is_authorized_comes_in(router: Router, host: HostKey, callers: list[Caller]) -> None:
    """Also while the router runs; its own host's key needs no entry."""
    guest = new_host_key("guest")
    authorize(router.keys, "guest", guest.public, ["draft"])
    for key in (guest, host):
        callers.append(Caller(router.port, key, host.public))
        callers[-1].hello()
        assert isinstance(callers[-1].receive(), Welcome)
    assert router.events("connection_refused") == []


def test_an_unknown_key_gets_nothing(router: Router, host: HostKey, callers: list[Caller]) -> None:
    """Nor one that may only do something else; each is logged once, with where it came from."""
    authorize(router.keys, "other", (other := new_host_key("other")).public, ["server", "operator"])
    stranger = new_host_key("stranger")
    for key in (stranger, other):
        callers.append(Caller(router.port, key, host.public))
        callers[-1].hello()
    line = router.logged("connection_refused")
    assert (line["source"], line["level"], line["count"]) == ("127.0.0.1", "warning", 1)
    assert next(reason.partition(" (")[0] for reason in line["reasons"]) in ("drafts: unknown key", NOT_HERE)
    for caller in callers:
        assert caller.receive(SILENCE_MS) is None
    assert router.events("peer_joined") == []
    assert len(router.events("connection_refused")) == 1  # once a minute and source, however often they knock


def test_a_revoked_key_gets_nothing_more(router: Router, host: HostKey, callers: list[Caller]) -> None:
    """Not even on the connection that it has: neither pings nor an answer; and it cannot come back."""
    guest = new_host_key("guest")
    authorize(router.keys, "guest", guest.public, ["draft"])
    callers.append(first := Caller(router.port, guest, host.public))
    first.hello()
    assert isinstance(first.receive(), Welcome)
    n_lines = router.n_lines
    revoke(router.keys, "guest")
    router.logged("keys_reloaded", n_lines)
    while (message := first.receive(0)) is not None:  # what was on its way
        first.send(Pong(getattr(message, "sent_ns", 0)))
    first.hello()
    assert first.receive(SILENCE_MS) is None
    router.logged("peer_lost")
    callers.append(again := Caller(router.port, guest, host.public))
    again.hello()
    assert again.receive(SILENCE_MS) is None
    reasons = " ".join(reason for line in router.events("connection_refused") for reason in line["reasons"])
    assert "revoked key" in reasons


def test_plain_text_and_port_scanners_are_refused(router: Router, callers: list[Caller]) -> None:
    """A client without keys gets nothing; somebody who talks HTTP, or just looks, is counted.

    Where a connection is over before it could be looked at, its source is unknown.
    """
    callers.append(plain := Caller(router.port, None, ""))
    plain.hello()
    line = router.logged("connection_refused")
    (reason,) = line["reasons"]
    assert reason.startswith(("drafts: it does not speak CURVE", "drafts: it hung up in the handshake"))  # who noticed
    assert line["source"] in ("127.0.0.1", "unknown")
    with socket.create_connection(("127.0.0.1", router.port), PATIENCE_S) as scanner:
        scanner.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        heard = b""
        with contextlib.suppress(ConnectionResetError):
            while data := scanner.recv(4096):
                heard += data
    assert heard[:1] in (b"", b"\xff")  # at most libzmq's greeting
    assert b"d" * 3 not in heard
    assert plain.receive(SILENCE_MS) is None
    assert router.events("peer_joined") == []


def test_a_server_with_another_key_is_not_talked_to(router: Router, callers: list[Caller]) -> None:
    """A client that expects another server's key sends nothing to this one."""
    callers.append(caller := Caller(router.port, load_host_key(router.keys), new_host_key("else").public))
    caller.hello()
    assert caller.receive(SILENCE_MS) is None
    assert router.events("peer_joined") == []


def test_a_role_needs_a_key_for_it(router: Router, host: HostKey, callers: list[Caller]) -> None:
    """At the socket for gateways, verifiers and operators, one is not taken for the other."""
    operator = new_host_key("operator")
    authorize(router.keys, "operator", operator.public, ["operator"])
    callers.append(caller := Caller(router.local_port, operator, host.public))
    caller.hello("verifier")
    refusal = caller.receive()
    assert refusal.code == "wrong_role"
    caller.send(GetStatus(3))
    assert caller.receive().ref == 3


def test_a_slip_in_the_list_changes_nothing(router: Router, host: HostKey, callers: list[Caller]) -> None:
    """Who was allowed stays allowed, and the log says what is wrong with the file."""
    guest = new_host_key("guest")
    authorize(router.keys, "guest", guest.public, ["draft"])
    callers.append(caller := Caller(router.port, guest, host.public))
    caller.hello()
    assert isinstance(caller.receive(), Welcome)
    (router.keys / AUTHORIZED).write_text("[[key]\n")
    caller.send(Hello("draft", "d", 2))
    line = router.logged("keys_not_reloaded")
    assert AUTHORIZED in line["reason"]
    while not isinstance(message := caller.receive(), Welcome):
        assert message is not None


def test_the_list_follows_its_file(tmp_path: Path) -> None:
    """When it is looked at; a key is good for the sockets that its roles name, until it is revoked."""
    guest, own = new_host_key("guest").public, new_host_key("own").public
    allowed = AllowList(tmp_path, own)
    assert (allowed.verdict(guest, "drafts"), allowed.verdict(own, "drafts")) == ("unknown key", "")
    authorize(tmp_path, "guest", guest, ["draft"])
    assert allowed.verdict(guest, "drafts") == "unknown key"
    allowed.look()
    assert allowed.verdict(guest, "drafts") == ""
    assert allowed.verdict(guest, "sampler") == "not allowed at this socket"
    assert [allowed.may_be(guest, role) for role in ("draft", "verifier")] == [True, False]
    revoke(tmp_path, "guest")
    allowed.look()
    assert allowed.verdict(guest, "drafts") == "revoked key"
    assert not allowed.may_be(guest, "draft")


def test_a_list_that_is_mended_by_its_mode_alone_is_read(tmp_path: Path) -> None:
    """What it says while others can write to it does not count; once they cannot, it does."""
    guest = new_host_key("guest").public
    authorize(tmp_path, "guest", guest, ["draft"])
    allowed = AllowList(tmp_path, new_host_key("own").public)
    revoke(tmp_path, "guest")
    (tmp_path / AUTHORIZED).chmod(0o666)
    allowed.look()
    assert allowed.verdict(guest, "drafts") == ""
    (tmp_path / AUTHORIZED).chmod(0o644)
    allowed.look()
    assert allowed.verdict(guest, "drafts") == "revoked key"


def test_a_server_s_new_key_is_taken_without_a_restart(router: Router, host: HostKey, tmp_path: Path) -> None:
    """A draft worker that expected another server gets in when the right one is authorized on its host."""
    guest = new_host_key("guest")
    mine = tmp_path / "guest"
    write_host_key(mine, guest)
    authorize(mine, "wrong", new_host_key("wrong").public, ["server"])
    authorize(router.keys, "guest", guest.public, ["draft"])
    worker = Process(
        "draft",
        tmp_path / "elsewhere",
        "draft={}",
        "draft.far.drafter=ngram",
        f"network.keys={json.dumps(str(mine))}",
        f"endpoints.drafts=tcp://127.0.0.1:{router.port}",
    )
    try:
        worker.logged("refused_by_server")
        revoke(mine, "wrong")
        authorize(mine, "target", host.public, ["server"])
        assert router.logged("peer_joined")["peer"] == "far"
    finally:
        worker.stop()
