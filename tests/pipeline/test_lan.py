"""The LAN of the tests: bytes stay as they are and in order; what is asserted of times is that it takes no less."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tools.lan import SEGMENT_BYTES, Conditions, Lan, Line, Link, Wire

PATIENCE_S = 30


def line(conditions: Conditions, *ready: float, wire: Wire | None = None, n_bytes: int = 1000) -> list[float]:
    """When segments that are ready at these times arrive."""
    one = Line(wire or Wire(), random.Random(0))
    return [one.arrival(now, n_bytes, conditions) for now in ready]


# -- the model --


def test_a_segment_takes_the_delay() -> None:
    """Segments that are far enough apart each arrive after the delay, and at once where there is none."""
    assert line(Conditions(), 1.0, 2.0) == [1.0, 2.0]
    assert line(Conditions(delay_s=0.25), 1.0, 2.0) == [1.25, 2.25]


def test_segments_share_the_bandwidth() -> None:
    """They leave one after the other, also those of another connection in the same direction."""
    conditions = Conditions(delay_s=0.5, bytes_per_s=2000)
    wire = Wire()
    assert line(conditions, 1.0, 1.0, 5.0, wire=wire) == [2.0, 2.5, 6.0]
    assert line(conditions, 5.1, wire=wire) == [6.5]


def test_jitter_is_bounded_and_overtakes_nothing() -> None:
    """Each segment is late by up to the jitter, differently, and none arrives before the one before it."""
    arrivals = line(Conditions(delay_s=1.0, jitter_s=0.5), *(i * 0.01 for i in range(200)))
    assert arrivals == sorted(arrivals)
    late = [at - i * 0.01 - 1.0 for i, at in enumerate(arrivals)]
    assert min(late) >= 0
    assert max(late) <= 0.5
    assert len({round(x, 3) for x in late}) > 50


def test_a_lost_segment_holds_up_those_after_it() -> None:
    """It arrives a retransmission later, and what was sent meanwhile with it."""
    assert line(Conditions(loss=1.0, rto_s=0.2), 1.0, 2.0) == [1.2, 2.2]
    arrivals = line(Conditions(loss=0.05, rto_s=0.2), *(i * 0.01 for i in range(1000)))
    late = [at - i * 0.01 for i, at in enumerate(arrivals)]
    lost = [i for i, x in enumerate(late) if abs(x - 0.2) < 1e-9]
    assert 25 <= len(lost) <= 75
    assert late[lost[0] + 1] == pytest.approx(0.19)
    assert 0.0 in late


# -- real sockets --


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as running:
        yield running


class Server:
    """Sends back what it gets, a connection at a time each in its own thread."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._echo, args=(connection,))
            thread.start()
            self._threads.append(thread)

    def _echo(self, connection: socket.socket) -> None:
        with closing(connection):
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                pass

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in (self._accepting, *self._threads):
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@pytest.fixture(params=["tcp", "ipc"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The endpoint of a server that echoes."""
    if request.param == "tcp":
        listening = socket.create_server(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
    else:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        endpoint = f"ipc://{tmp_path / 's'}"
    echo = Server(listening)
    yield endpoint
    echo.close()


def connect(link: Link) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), PATIENCE_S)


def receive(connection: socket.socket, n_bytes: int) -> bytes:
    data = b""
    while len(data) < n_bytes:
        part = connection.recv(1 << 16)
        assert part, f"the connection ended after {len(data)} bytes"
        data += part
    return data


def echoed(connection: socket.socket, data: bytes = b"x") -> float:
    """Seconds until data has come back as it was."""
    started = time.monotonic()
    connection.sendall(data)
    assert receive(connection, len(data)) == data
    return time.monotonic() - started


def test_bytes_stay_as_they_are(lan: Lan, server: str) -> None:
    """Whatever the conditions, what arrives is what was sent, in order, and an end of sending is passed on."""
    link = lan.link(server, Conditions(0.002, 0.005, 4e6, 0.02, 0.01))
    data = random.Random(1).randbytes(100 * SEGMENT_BYTES + 7)
    with connect(link) as connection:
        sending = threading.Thread(target=connection.sendall, args=(data,))
        sending.start()
        assert receive(connection, len(data)) == data
        sending.join(PATIENCE_S)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert link.n_bytes == 2 * len(data)


def test_conditions_hold_both_ways_and_can_change(lan: Lan, server: str) -> None:
    """A delay counts in each direction; new conditions hold for an open connection; links have their own."""
    link, other = lan.link(server), lan.link(server, Conditions(loss=1.0, rto_s=0.06))
    with connect(link) as connection, connect(other) as slower:
        echoed(connection)
        link.conditions = Conditions(delay_s=0.05)
        assert echoed(connection) >= 0.1
        link.conditions = Conditions(bytes_per_s=100_000)
        assert echoed(connection, bytes(5 * SEGMENT_BYTES)) >= 5 * SEGMENT_BYTES / 100_000
        assert echoed(slower) >= 0.12


def test_a_stall_keeps_what_was_sent(lan: Lan, server: str) -> None:
    """In a black hole nothing arrives and nothing breaks; afterwards everything arrives."""
    link = lan.link(server)
    with connect(link) as connection:
        echoed(connection)
        link.stall()
        connection.sendall(b"one")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(PATIENCE_S)
        link.restore()
        echoed_now = receive(connection, 3)
        assert echoed_now == b"one"
        echoed(connection)


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_a_cut_ends_connections(lan: Lan, server: str) -> None:
    """Open connections end, new ones too; after it is restored new ones work; another link notices nothing."""
    link, other = lan.link(server), lan.link(server)
    with connect(link) as connection, connect(other) as untouched:
        echoed(connection)
        link.cut()
        assert ended(connection)
        with connect(link) as refused:
            assert ended(refused)
        echoed(untouched)
        link.restore()
        with connect(link) as again:
            echoed(again)


def test_a_server_that_is_not_there_is_an_ended_connection(lan: Lan, tmp_path: Path) -> None:
    """A link may be made before its server; who connects too early is dropped."""
    with connect(lan.link(f"ipc://{tmp_path}/none")) as connection:
        assert ended(connection)
