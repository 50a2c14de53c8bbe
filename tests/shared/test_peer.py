"""A draft worker that the router does not want: it keeps still, and comes as soon as it may."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from shared import wire
from shared.messages import Error, Hello, Message, Welcome
from shared.peer import BANNED, UNKNOWN_PEER
from tests.gateway.fleet import Process

pytestmark = pytest.mark.pipeline

PATIENCE_S = 60.0


class Router:
    """A router's socket for draft workers; a test says what it answers."""

    def __init__(self, run_dir: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(f"ipc://{run_dir / 'drafts.sock'}")
        self.peer = b""

    def hello(self) -> tuple[Hello, float]:
        """The next Hello, and when it came."""
        deadline = time.monotonic() + PATIENCE_S
        while self._socket.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            self.peer, *frames = self._socket.recv_multipart()
            message = wire.decode(frames)
            if isinstance(message, Hello):
                return message, time.monotonic()
        pytest.fail("no Hello")

    def waiting(self) -> list[Hello]:
        """The Hellos that have come and were not taken yet."""
        hellos = []
        while self._socket.poll(0):
            message = wire.decode(self._socket.recv_multipart()[1:])
            assert isinstance(message, Hello)
            hellos.append(message)
        return hellos

    def send(self, message: Message) -> None:
        self._socket.send_multipart([self.peer, *wire.encode(message)])

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    router = Router(tmp_path)
    yield router
    router.close()


@pytest.fixture
def worker(tmp_path: Path, router: Router) -> Iterator[Process]:
    del router
    worker = Process("draft", tmp_path, "draft.model.drafter=ngram")
    yield worker
    assert worker.running()
    worker.stop()
    assert worker.wait() == 0


def ban(retry_after_s: int) -> Error:
    return Error(0, BANNED, "an operator has banned it", "ask", retry_after_s)


def test_a_banned_worker_asks_as_seldom_as_it_is_told(router: Router, worker: Process) -> None:
    """It neither ends nor floods, says why once, and is welcome later."""
    router.hello()
    router.send(ban(2))
    worker.logged("banned", reason="an operator has banned it")
    router.waiting()
    banned_at = time.monotonic()
    _, asked_at = router.hello()
    assert asked_at - banned_at > 1.0  # instead of the usual 0.25
    router.send(ban(600))
    router.send(Error(0, UNKNOWN_PEER, "it is wanted again"))
    hello, _ = router.hello()
    router.send(Welcome(1, 500))
    worker.logged("router_connected")
    assert hello.uptime_s >= 1
    assert worker.log_text.count('"event": "banned"') == 1


def test_a_ban_ends_what_a_worker_is_doing(router: Router, worker: Process) -> None:
    """It drops its sessions, and comes back as one that has none."""
    first, _ = router.hello()
    router.send(Welcome(1, 500))
    worker.logged("router_connected")
    router.waiting()
    router.send(ban(600))
    worker.logged("sessions_dropped")
    router.send(Error(0, UNKNOWN_PEER, "it is wanted again"))
    again, _ = router.hello()
    assert again.boot != first.boot
    assert again.instance == first.instance
