"""The life of a process and its sockets, seen from outside."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from shared import wire
from shared.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Decode,
    Decoded,
    Describe,
    Encoded,
    Error,
    GetStatus,
    Hello,
    Message,
    Ping,
    Pong,
    Tokens,
    Welcome,
)
from shared.service import EXIT_CONFIG, MAILBOX_LENGTH, QUEUE_LENGTH, Mailbox

pytestmark = pytest.mark.pipeline

PATIENCE_S = 30.0

TINY = '''
import sys
import time
from pathlib import Path
import zmq
from shared.errors import ModelError
from shared.messages import Cancel, Describe, Ping, Pong, Welcome
from shared.service import EngineThread, Service, run_service
from shared.settings import load_settings

class Tiny(Service):
    """Answers Ping with Pong; Cancel(n) fails in the way that n names; Welcome begins work that never ends."""

    name = "tiny"

    async def start(self):
        self.work = 0
        handlers = {Ping: self.ping, Cancel: self.cancel, Welcome: self.welcome, Describe: self.describe}
        self.answers = self.link("tiny", zmq.ROUTER, handlers)
        self.answers.bind(self.settings.endpoint("router"))

    def idle(self):
        return not self.work

    def ping(self, peer, message):
        self.answers.send(Pong(message.sent_ns), peer)

    def welcome(self, peer, message):
        self.work += 1

    def describe(self, peer, message):
        self.work = 0

    def cancel(self, peer, message):
        def fail():
            raise ModelError("the model is gone", "find it", "bad_model")
        def die():
            raise ZeroDivisionError
        if message.request == 1:
            raise ZeroDivisionError
        if message.request == 2:
            self.every(0.01, die)
        if message.request == 3:
            EngineThread(self, "engine", die).start()
        if message.request == 4:
            EngineThread(self, "engine", fail).start()
        if message.request == 5:
            EngineThread(self, "engine", lambda: time.sleep(60)).start()
        if message.request == 6:
            self.log.debug("chatter")

overrides = [a for a in sys.argv[1:] if not a.startswith("config=")]
path = next((Path(a[7:]) for a in sys.argv[1:] if a.startswith("config=")), None)

def read():
    # A run directory given as a flag would hide the file's.
    return load_settings(path, [] if path and path.read_text() else overrides)

sys.exit(run_service(Tiny, read(), "", read))
'''


class Process:
    """The tiny service."""

    def __init__(self, run_dir: Path, *overrides: str, **environment: str) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DRAFTWIRE_", "JOURNAL_", "NOTIFY_"))}
        self._process = subprocess.Popen(
            [sys.executable, "-c", TINY, f'run_dir="{run_dir}"', *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**inherited, **environment},
            text=True,
        )
        self.pid = self._process.pid
        self.errors = ""
        self._lines: list[dict[str, Any]] = []
        self._more = threading.Condition()
        self._ended = False
        self._readers = [threading.Thread(target=self._read_log), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_log(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._more:
                    self._lines.append(json.loads(line))
                    self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            self.errors = lines.read()

    def logged(self, event: str) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            return next((line for line in self._lines if line["event"] == event), None)

        with self._more:
            self._more.wait_for(lambda: found() or self._ended, PATIENCE_S)
            line = found()
            assert line is not None, f"no {event} in {self._lines}"
            return line

    def events(self, event: str) -> list[dict[str, Any]]:
        with self._more:
            return [line for line in self._lines if line["event"] == event]

    def running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        status = self._process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        return status

    def stop(self) -> None:
        if self.running():
            self._process.kill()
        self.wait()


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts tiny services, by default in the test's own run directory."""
    processes: list[Process] = []

    def start(*overrides: str, run_dir: Path = tmp_path, ready: bool = True, **environment: str) -> Process:
        processes.append(Process(run_dir, *overrides, **environment))
        if ready:
            processes[-1].logged("ready")
        return processes[-1]

    yield start
    for process in processes:
        process.stop()


class Client:
    def __init__(self, endpoint: str, queue_length: int = 0) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.sndhwm = 0
        self.socket.rcvhwm = queue_length
        self.socket.connect(endpoint)

    def send(self, message: Message) -> None:
        self.socket.send_multipart(wire.encode(message))

    def receive(self) -> Any:
        assert self.socket.poll(PATIENCE_S * 1000), "no answer"
        return wire.decode(self.socket.recv_multipart())

    def answers(self, number: int = 1) -> list[Error]:
        """The errors received until a Ping that is sent now is answered."""
        self.send(Ping(number))
        errors: list[Error] = []
        while not isinstance(message := self.receive(), Pong):
            errors.append(message)
        assert message == Pong(number)
        return errors

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    client = Client(f"ipc://{tmp_path / 'router.sock'}")
    yield client
    client.close()


# -- messages --


def test_a_message_without_a_handler_is_refused(start: Start, client: Client) -> None:
    """A well-formed message that has no meaning here gets an Error that names it; an Error gets none, ever."""
    start()
    client.send(GetStatus(1))
    client.send(Error(0, "x", "y"))
    (error,) = client.answers()
    assert (error.ref, error.code) == (0, "unexpected_message")
    assert "GetStatus" in error.message


def test_a_malformed_message_is_refused_with_the_reason(start: Start, client: Client) -> None:
    """The sender is told what is wrong, and for another version what to do; the log says so too, not once a message."""
    process = start()
    for _ in range(50):
        client.socket.send_multipart([b"\x93\x01\xa4Ping\x91\x01"])
    errors = client.answers()
    assert len(errors) == 50
    assert {error.code for error in errors} == {"bad_message"}
    assert f"protocol version 1 instead of {PROTOCOL_VERSION}" in errors[0].message
    assert errors[0].remedy
    line = process.logged("message_refused")
    assert (line["level"], line["link"]) == ("warning", "tiny")
    assert "protocol version" in line["reason"]
    assert len(process.events("message_refused")) < 10


def nonsense(chance: random.Random) -> list[bytes]:
    """Malformed, truncated, wrong-typed or unexpected messages."""
    tokens = np.array([chance.randrange(-9, 9) for _ in range(chance.randrange(4))], np.int32)
    message: Message = chance.choice(
        (Hello("draft", "x", 1), Encoded(1, tokens), Decode(1, tokens), Tokens(1, (1, 2), 1), Error(0, "x", "y"),
         GetStatus(1), Decoded(1, ("a", "b"), b""))
    )  # fmt: skip
    frames = [bytearray(frame) for frame in wire.encode(message)]
    frame, kind = chance.choice(frames), chance.randrange(6)
    if kind == 0 and frame:
        frame[chance.randrange(len(frame))] ^= chance.randrange(1, 256)
    elif kind == 1:
        del frame[chance.randrange(len(frame) + 1) :]
    elif kind == 2:
        frames.append(bytearray(chance.randbytes(chance.randrange(5))))
    elif kind == 3:
        frames = [bytearray(chance.randbytes(chance.randrange(30))) for _ in range(chance.randrange(1, 20))]
    elif kind == 4:
        frames = [bytearray(b"\x93\x01\xa4Ping" + b"\x91" * chance.choice((10, 999, 1020)) + b"\x01")]
    return [bytes(frame) for frame in frames]


def test_ten_thousand_bad_messages_do_not_end_it(start: Start, client: Client) -> None:
    """After 10,000 malformed, truncated, wrong-typed and unexpected messages the service answers as before."""
    process = start()
    chance = random.Random(1)
    n_refused = 0
    for batch in range(50):
        for _ in range(200):
            client.socket.send_multipart(nonsense(chance))
        n_refused += len(client.answers(batch))
    assert n_refused > 8000, "all but the errors among them are refused with a reply"
    assert process.running()
    process.signal(signal.SIGTERM)
    assert process.wait() == 0


def test_a_burst_is_answered_whole(start: Start, client: Client) -> None:
    """Many messages at once are all served, in order: none is left in the queue when the sender falls silent."""
    start()
    for number in range(QUEUE_LENGTH // 2):
        client.send(Ping(number))
    assert [client.receive().sent_ns for _ in range(QUEUE_LENGTH // 2)] == list(range(QUEUE_LENGTH // 2))


def test_a_peer_that_does_not_read_costs_nothing(start: Start, client: Client, tmp_path: Path) -> None:
    """Replies to a peer that is gone or does not read are dropped; others are served on."""
    process = start()
    deaf = Client(f"ipc://{tmp_path / 'router.sock'}", queue_length=1)
    for _ in range(20 * QUEUE_LENGTH):
        deaf.send(GetStatus(1))
    client.answers(5)
    deaf.close()
    client.answers(6)
    assert process.running()


# -- ends --


@pytest.mark.parametrize(
    ("failure", "status"),
    [(1, 1), (2, 1), (3, 1), (4, EXIT_CONFIG)],
    ids=["in a handler", "in periodic work", "in the engine thread", "a model error in the engine thread"],
)
def test_an_exception_ends_the_process(start: Start, client: Client, failure: int, status: int) -> None:
    """Whatever raises, and wherever, the process ends, says why, and with which status it is pointless to try again."""
    process = start()
    client.answers()
    client.send(Cancel(failure))
    assert process.wait() == status
    if status == EXIT_CONFIG:
        assert process.logged("stopped")["reason"] == "the model is gone"
        assert process.errors.splitlines()[-1] == "draftwire tiny: the model is gone (find it)"
    else:
        line = process.logged("crashed")
        assert line["level"] == "error"
        assert "ZeroDivisionError" in json.dumps(line)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_service(start: Start, client: Client, number: int) -> None:
    """SIGTERM and Ctrl-C end a service that has nothing to do at once, with status 0 and a word in the log."""
    process = start()
    client.answers()
    process.signal(number)
    assert process.wait() == 0
    process.logged("draining")
    process.logged("stopped")
    assert process.errors == ""


def test_work_in_progress_ends_first(start: Start, client: Client) -> None:
    """A drain waits for the work, and goes on answering until then."""
    process = start("drain_s=3600")
    client.send(Welcome(1, 1))
    client.answers()
    process.signal(signal.SIGTERM)
    process.logged("draining")
    client.answers()
    assert process.running()
    client.send(Describe(1))
    assert process.wait() == 0


def test_a_drain_has_a_deadline(start: Start, client: Client) -> None:
    """Work that does not end is left behind after drain_s; that is no failure."""
    process = start("drain_s=0.1")
    client.send(Welcome(1, 1))
    client.answers()
    process.signal(signal.SIGTERM)
    assert process.wait() == 0


# -- the run directory --


def refused(process: Process) -> str:
    """The one line on stderr of a process that could not start."""
    assert process.wait() == EXIT_CONFIG
    (line,) = process.errors.splitlines()
    assert line.startswith("draftwire tiny: ")
    assert process.events("ready") == []
    return line


def test_a_socket_in_use_is_refused(start: Start, client: Client) -> None:
    """A second fleet in the same run directory ends with one clear line, and the first one is unharmed."""
    start()
    second = start(ready=False)
    line = refused(second)
    assert "router.sock is in use by another process" in line
    assert "another run_dir" in line
    client.answers()


def test_a_port_in_use_is_refused(start: Start) -> None:
    """The same for a TCP endpoint."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(start(f'endpoints.router="tcp://127.0.0.1:{port}"', ready=False))
    assert f"tcp://127.0.0.1:{port} is in use" in line


def test_a_stale_socket_is_taken_over(start: Start, client: Client, tmp_path: Path) -> None:
    """The socket file of a process that was killed does not keep its successor from starting."""
    first = start()
    first.signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / "router.sock").exists()
    start()
    client.answers()


def test_the_run_directory_is_made_and_private(start: Start, tmp_path: Path) -> None:
    """A run directory that is not there is created, for its owner alone."""
    start(run_dir=tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_an_unusable_run_directory_is_refused(start: Start, tmp_path: Path) -> None:
    """A run directory that cannot be made ends the process with one line that names it."""
    (tmp_path / "file").write_text("x")
    line = refused(start(run_dir=tmp_path / "file" / "run", ready=False))
    assert f"cannot use the run directory {tmp_path}/file/run" in line
    assert "run_dir" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_run_directory_is_refused(start: Start, tmp_path: Path) -> None:
    """The same for one that its owner has closed."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert "Permission denied" in refused(start(run_dir=closed, ready=False))


# -- the supervisor --


@pytest.mark.parametrize("abstract", [False, True])
def test_the_supervisor_is_told(start: Start, tmp_path: Path, abstract: bool) -> None:
    """READY=1 when the sockets are bound, the watchdog's beat in time, STOPPING=1 at the end."""
    name = f"draftwire-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind("\0" + name if abstract else name)
        supervisor.settimeout(PATIENCE_S)
        environment = {"NOTIFY_SOCKET": ("@" if abstract else "") + name, "WATCHDOG_USEC": "30000"}
        process = start(ready=False, **environment)
        assert supervisor.recv(100) == b"STATUS=starting"
        assert supervisor.recv(100) == b"READY=1\nSTATUS=ready"
        assert (tmp_path / "router.sock").exists()
        assert [supervisor.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        process.signal(signal.SIGTERM)
        said = b"WATCHDOG=1"
        while said == b"WATCHDOG=1":
            said = supervisor.recv(100)
        # 10 s for the drain, 10 s for engine threads, and a margin.
        assert said == b"STOPPING=1\nSTATUS=draining\nEXTEND_TIMEOUT_USEC=25000000"
        assert process.wait() == 0


def test_a_supervisor_that_is_gone_is_no_failure(start: Start, client: Client, tmp_path: Path) -> None:
    """A NOTIFY_SOCKET that nobody listens at changes nothing."""
    start(NOTIFY_SOCKET=str(tmp_path / "nobody"))
    client.answers()


def test_journald_gets_priorities(start: Start, tmp_path: Path) -> None:
    """Under systemd each line starts with its priority, for journald to take off; elsewhere it is plain JSON."""
    completed = subprocess.run(
        [sys.executable, "-c", TINY, f'run_dir="{tmp_path}/{"x" * 200}"'],
        env={**os.environ, "JOURNAL_STREAM": "1:2"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert completed.returncode == EXIT_CONFIG
    (line,) = completed.stdout.splitlines()
    assert line.startswith("<3>{")
    assert json.loads(line[3:])["level"] == "error"
    ready = start().logged("ready")
    assert (ready["service"], ready["instance"], ready["level"]) == ("tiny", "tiny", "info")
    assert ready["pid"] > 0


def test_an_engine_that_hangs_starves_the_watchdog(start: Start, client: Client, tmp_path: Path) -> None:
    """The beat passes through the engine thread; a thread at one thing for too long is said to hang, and not fed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(PATIENCE_S)
        process = start(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="300000")
        while supervisor.recv(100) != b"WATCHDOG=1":
            pass
        client.send(Cancel(5))  # an engine thread that never beats
        assert process.logged("engine_hangs")["silent_s"] >= 0.3
        while select.select([supervisor], [], [], 0)[0]:  # what was said before
            supervisor.recv(100)
        # The event loop goes on, and says so every few seconds, but feeds nobody.
        assert supervisor.recv(100).startswith(b"STATUS=")
        assert process.running()  # to end it is the watchdog's business


# -- reloading --


def test_a_reload_takes_in_what_can_change(start: Start, client: Client, tmp_path: Path) -> None:
    """SIGHUP: the log level changes at once, a run directory cannot, and a file that is wrong changes nothing."""
    path = tmp_path / "draftwire.toml"
    path.write_text("")
    process = start(f"config={path}")
    path.write_text('log_level = "debug"\ndrain_s = 3\nrun_dir = "/elsewhere"\n')
    process.signal(signal.SIGHUP)
    reloaded = process.logged("reloaded")
    assert reloaded["changed"] == ["drain_s", "log_level"]
    assert reloaded["needs_restart"] == ["run_dir"]
    assert process.events("chatter") == []
    client.send(Cancel(6))
    assert process.logged("chatter")["level"] == "debug"
    path.write_text("drain_s = -1\n")
    process.signal(signal.SIGHUP)
    refused = process.logged("reload_refused")
    assert "drain_s" in refused["reason"]
    assert str(path) in refused["reason"]
    client.answers()


# -- the journal --


def test_journald_gets_fields_of_its_own(tmp_path: Path) -> None:
    """On journald's own stream, a line goes to its socket, with its priority and what one selects by."""
    received = log_to_journal(tmp_path, 'log.warning("worker_lost", worker="a\\nb", session=255, seconds=3)')
    assert received["PRIORITY"] == "4"
    assert received["SYSLOG_IDENTIFIER"] == "draftwire-draft-small"
    assert (received["EVENT"], received["SERVICE"], received["INSTANCE"]) == ("worker_lost", "draft", "small")
    assert (received["WORKER"], received["SESSION"]) == ("a\nb", "00000000000000ff")
    line = json.loads(received["MESSAGE"])
    assert (line["event"], line["session"], line["seconds"]) == ("worker_lost", "00000000000000ff", 3)
    assert "REQUEST" not in received


def log_to_journal(tmp_path: Path, statement: str) -> dict[str, str]:
    """The fields of the one entry that a process logs whose stdout is the journal's stream."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald, (tmp_path / "stream").open("w") as stream:
        journald.bind(str(tmp_path / "journal"))
        journald.settimeout(PATIENCE_S)
        info = os.fstat(stream.fileno())
        program = (
            "from shared import logs\n"
            f"logs.JOURNAL_SOCKET = {str(tmp_path / 'journal')!r}\n"
            f"log = logs.configure('draft', 'small', 'info')\n{statement}\n"
        )
        subprocess.run(
            [sys.executable, "-c", program],
            stdout=stream,
            env={**os.environ, "JOURNAL_STREAM": f"{info.st_dev}:{info.st_ino}"},
            timeout=PATIENCE_S,
            check=True,
        )
        data = journald.recv(1 << 20)
    assert (tmp_path / "stream").read_text() == ""
    fields: dict[str, str] = {}
    while data:
        head, _, rest = data.partition(b"\n")
        name, separator, value = head.partition(b"=")
        if not separator:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[9 + size :]
        fields[name.decode()] = value.decode()
        data = rest
    return fields


# -- the mailbox --


def test_a_mailbox_keeps_order_and_wakes_its_reader() -> None:
    """Values come out in the order that they went in, all at once; an empty box waits no longer than it is told."""
    mailbox = Mailbox()
    assert mailbox.take(0) == []
    assert mailbox.take(0.001) == []
    mailbox.put(1)
    mailbox.put(2)
    assert mailbox.take(0) == [1, 2]
    received: list[Sequence[int]] = []
    reader = threading.Thread(target=lambda: received.append(mailbox.take(PATIENCE_S)))
    reader.start()
    mailbox.put(3)
    reader.join(PATIENCE_S)
    assert received == [[3]]


def test_a_mailbox_is_bounded() -> None:
    """A full box takes nothing more, except what must not be lost; emptied, it takes again."""
    mailbox = Mailbox()
    assert all(mailbox.put(value) for value in range(MAILBOX_LENGTH))
    assert not mailbox.put(-1)
    assert mailbox.put(-2, force=True)
    assert mailbox.take(0) == [*range(MAILBOX_LENGTH), -2]
    assert mailbox.put(1)
