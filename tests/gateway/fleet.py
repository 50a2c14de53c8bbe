"""A real gateway and a real tokenizer as processes, and a router that plays what a test tells it to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import zmq

from shared import wire
from shared.messages import (
    Cancel,
    DraftStats,
    Error,
    Finished,
    Generate,
    GetStatus,
    Hello,
    Message,
    ModelLabel,
    PeerStatus,
    Ping,
    Status,
    TargetStats,
    Tokens,
    Welcome,
)

PATIENCE_S = 60.0
FIRST_BYTE = 16
"""The null vocabulary's id of byte 0."""

RUNNER = """
import importlib, os, sys
from pathlib import Path
from shared.service import run_service
from shared.settings import load_settings
name, config, *overrides = sys.argv[1:]
read = lambda: load_settings(Path(config) if os.path.exists(config) else None, overrides)
sys.exit(run_service(importlib.import_module(f"services.{name}.service").SERVICE, read(), "", read))
"""
"""Runs a service; its configuration file may come to be later, for a reload."""

CONFIG = "draftwire.toml"

STATS = TargetStats(
    n_prompt=10, n_cached=4, n_generated=12, rounds=5, n_proposed=9, n_accepted=7, by_depth=((5, 4), (4, 3)),
    n_stale=2, full_rows=1, queue_us=1000, prefill_us=30_000, decode_us=240_000, verify_us=100_000, sample_us=5000,
    wire_us=2000, wait_us=3000,
)  # fmt: skip
DRAFT = DraftStats("model", 40, 2000, 9000, 1)
LABELS = (ModelLabel("big.gguf", "IQ4_KSS", "ik"), ModelLabel("small.gguf", "Q4_K_M", "cuda"))


class Process:
    """A service in a process of its own; its log lines are kept."""

    def __init__(self, name: str, run_dir: Path, *overrides: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("DRAFTWIRE_", "JOURNAL_"))}
        settings = (f'run_dir="{run_dir}"', 'verifier.engine.engine="null"', "gateway.port=0", *overrides)
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUNNER, name, str(run_dir / CONFIG), *settings],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        self._lines: list[dict[str, Any]] = []
        self._more = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._more:
                self._lines.append(json.loads(line))
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def logged(self, event: str, after: int = 0, **fields: Any) -> dict[str, Any]:
        """The first log line of this kind from line `after` on; waits for it."""
        with self._more:
            self._more.wait_for(lambda: _match(self._lines[after:], event, fields) or self._ended, PATIENCE_S)
            line = _match(self._lines[after:], event, fields)
            assert line is not None, f"no {event} {fields} in {self._lines[after:]}"
            return line

    @property
    def n_lines(self) -> int:
        with self._more:
            return len(self._lines)

    @property
    def log_text(self) -> str:
        with self._more:
            return "\n".join(map(json.dumps, self._lines))

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        status = self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    def stop(self) -> None:
        if self.running():
            self.signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _match(lines: list[dict[str, Any]], event: str, fields: dict[str, Any]) -> dict[str, Any] | None:
    for line in lines:
        if line["event"] == event and all(line.get(name) == value for name, value in fields.items()):
            return line
    return None


Script = Callable[["FakeRouter", bytes, Generate], None]


class FakeRouter:
    """A router whose answers to `Generate` are a test's script; everything it hears is kept.

    script: called on its own thread for each `Generate`. peers: what `Status` says. endless: requests that end when
    they are cancelled.
    """

    def __init__(self, run_dir: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._endpoint = f"ipc://{run_dir / 'router.sock'}"
        self._context = context
        self._commands: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._peers: set[bytes] = set()
        self._boot = 1
        self.heard: list[tuple[bytes, Message]] = []
        self._more = threading.Condition()
        self.script: Script = answer("")
        self.peers: tuple[PeerStatus, ...] = (verifier(),)
        self.endless: set[int] = set()
        self._socket = self._bind()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _bind(self) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.ROUTER)
        sock.linger = 0
        sock.sndhwm = 0
        sock.bind(self._endpoint)
        return sock

    def _run(self) -> None:
        pinged = 0.0
        while not self._stopping:
            for _ in range(len(self._commands)):
                self._commands.popleft()()
            if time.monotonic() - pinged > 0.1:
                pinged = time.monotonic()
                for peer in self._peers:
                    self.send(peer, Ping(time.monotonic_ns()))
            if self._socket.poll(5):
                peer, *frames = self._socket.recv_multipart()
                self._hear(peer, wire.decode(frames))
        self._socket.close()

    def _hear(self, peer: bytes, message: Message) -> None:
        if isinstance(message, Hello):
            self._peers.add(peer)
            self.send(peer, Welcome(self._boot, 500))
        elif isinstance(message, GetStatus):
            self.send(peer, Status(message.ref, "test", 1, 0, self.peers))
        elif isinstance(message, Generate):
            self.script(self, peer, message)
        elif isinstance(message, Cancel) and message.request in self.endless:
            self.send(peer, Finished(message.request, "cancelled", STATS, DRAFT))
        with self._more:
            self.heard.append((peer, message))
            self._more.notify_all()

    def send(self, peer: bytes, message: Message) -> None:
        """From a script."""
        self._socket.send_multipart([peer, *wire.encode(message)])

    def later(self, command: Callable[[], None]) -> None:
        """From a test: have it done on the router's thread."""
        self._commands.append(command)

    def tell(self, peer: bytes, *messages: Message) -> None:
        """From a test: send."""
        for message in messages:
            self.later(lambda message=message: self.send(peer, message))  # type: ignore[misc]

    def wait_for(self, kind: type, after: int = 0, count: int = 1) -> tuple[bytes, Any]:
        """The count-th message of this kind from the `after`-th message on."""

        def found() -> list[tuple[bytes, Message]]:
            return [entry for entry in self.heard[after:] if isinstance(entry[1], kind)]

        with self._more:
            assert self._more.wait_for(lambda: len(found()) >= count, PATIENCE_S), f"no {kind.__name__}"
            return found()[count - 1]

    @property
    def n_heard(self) -> int:
        with self._more:
            return len(self.heard)

    def restart(self) -> None:
        """Forget everything and come back as a new process would."""

        def restart() -> None:
            self._socket.close()
            self._peers.clear()
            self._boot += 1
            self._socket = self._bind()

        self.later(restart)

    def stop(self) -> None:
        self._stopping = True
        self._thread.join(PATIENCE_S)


def verifier(fingerprint: str = "null:8192", alive: bool = True) -> PeerStatus:
    return PeerStatus("verifier", "verifier", "null", "null", fingerprint, 8192, 4096, 4, 0, True, 100, alive)


def ids(text: str | bytes) -> tuple[int, ...]:
    """The null vocabulary's tokens of a text."""
    data = text.encode() if isinstance(text, str) else text
    return tuple(byte + FIRST_BYTE for byte in data)


def runs(tokens: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    return [tokens[at : at + size] for at in range(0, len(tokens), size)]


def answer(text: str | bytes, size: int = 3, n_accepted: int = 2, reason: Any = "stop") -> Script:
    """A script that answers with a text, `size` tokens at a time."""

    def script(router: FakeRouter, peer: bytes, message: Generate) -> None:
        for run in runs(ids(text), size):
            router.send(peer, Tokens(message.request, run, min(n_accepted, len(run))))
        router.send(peer, Finished(message.request, reason, STATS, DRAFT, *LABELS))

    return script


def endless(text: str) -> Script:
    """A script that sends a text, a token at a time, and ends only when it is cancelled."""

    def script(router: FakeRouter, peer: bytes, message: Generate) -> None:
        router.endless.add(message.request)
        for token in ids(text):
            router.send(peer, Tokens(message.request, (token,), 0))

    return script


def refuse(code: str, retry_after_s: int = 0) -> Script:
    """A script that answers with an error."""

    def script(router: FakeRouter, peer: bytes, message: Generate) -> None:
        router.send(peer, Error(message.request, code, "refused by the test", "", retry_after_s))

    return script


def silent(_router: FakeRouter, _peer: bytes, _message: Generate) -> None:
    """A script that does not answer: the test does."""


class Fleet:
    """A gateway with its tokenizer and a fake router, and an HTTP client."""

    def __init__(
        self,
        run_dir: Path,
        *overrides: str,
        tokenizer: bool = True,
        router: bool = True,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.run_dir = run_dir
        self._stack = contextlib.ExitStack()
        self._overrides = overrides
        try:
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            self._stack.callback(context.term)
            if router:
                self.router = FakeRouter(run_dir, context)
                self._stack.callback(self.router.stop)
            self.gateway = Process("gateway", run_dir, *overrides)
            self._stack.callback(self.gateway.stop)
            if tokenizer:
                self.start_tokenizer()
            address = self.gateway.logged("listening")
            self.url = f"{address['scheme']}://{address['host']}:{address['port']}"
            self.gateway.logged("ready")
            if router:
                self.gateway.logged("router_connected")
            if tokenizer:
                self.gateway.logged("tokenizer_connected")
            self.http = self._stack.enter_context(
                httpx.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False, verify=verify)
            )
        except BaseException:
            self.close()
            raise

    def start_tokenizer(self) -> None:
        self.tokenizer = Process("tokenizer", self.run_dir, *self._overrides)
        self._stack.callback(self.tokenizer.stop)
        self.tokenizer.logged("ready")

    def post(self, path: str, key: str = "", **body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.http.post(path, json=body, headers=headers)

    def stream(self, path: str, **body: Any) -> list[str]:
        """The data of all events."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            return [line[len("data: ") :] for line in response.iter_lines() if line.startswith("data: ")]

    def close(self) -> None:
        self._stack.close()


MakeFleet = Callable[..., Fleet]
