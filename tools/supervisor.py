"""A fleet on one machine: every service as a child process, started, watched, restarted and ended together.

Used by `draftwire up`, by the demo and by tests. Each child has a session of its own, so that a terminal's Ctrl-C
reaches only the supervisor, which drains the gateway first and then the rest.

Invariants: at most one fleet uses a run directory; when the supervisor ends, however it ends, no child is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shared.errors import DraftwireError, SettingsError
from shared.service import EXIT_CONFIG, notify
from shared.settings import Settings, default_run_dir

Say = Callable[[str], None]
"""Takes one line for the operator."""

_PREFIX = re.compile(r"draftwire(?: [\w-]+)?: (?:error: )?")
"""How a Draftwire process begins the line in which it says why it ends."""
_MARGIN_S = 3.0
"""On top of the drain: for a service to stop its threads and free its engine."""
_MAX_LINE = 8192
_MAX_SOCKET_PATH = 103
_PR_SET_PDEATHSIG = 1
_BOOT = "import sys; sys.path[0] = sys.argv.pop(1); from tools.cli import main; main()"
"""Runs the CLI of this very installation; unlike `python -m`, it never imports from the current directory."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """Which process to run. essential: the fleet cannot do without it. waits_for: what its start-up is busy with."""

    service: str
    instance: str = ""
    waits_for: str = ""

    @property
    def essential(self) -> bool:
        return self.service != "draft"

    @property
    def label(self) -> str:
        return f"{self.service} {self.instance}" if self.instance else self.service

    @property
    def file_name(self) -> str:
        return f"{self.service}-{self.instance}" if self.instance else self.service


Command = Callable[[ChildSpec], Sequence[str]]
"""The command line that runs a child."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before a child starts again: first_s, doubling with each failure in a row, at most most_s.

    healthy_s: a child that was up for so long has recovered, and its failures are forgotten.
    """

    first_s: float = 0.5
    most_s: float = 30.0
    healthy_s: float = 60.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after the given number of failures in a row, counted from 1."""
        return float(min(self.most_s, self.first_s * 2 ** min(failures - 1, 30)))


def fleet_of(settings: Settings) -> list[ChildSpec]:
    """The children that a configuration asks for, in the order in which they start."""
    drafts = [
        ChildSpec("draft", name, f"loading {draft.engine.model}" if draft.drafter == "model" else "")
        for name, draft in settings.draft.items()
    ]
    return [
        ChildSpec("sampler"),
        ChildSpec("tokenizer", waits_for="reading the vocabulary"),
        ChildSpec("router"),
        ChildSpec("verifier", waits_for=f"loading {settings.verifier.engine.model}"),
        *drafts,
        ChildSpec("gateway"),
    ]


def service_command(settings: Settings, config: Path | None, overrides: Sequence[str]) -> Command:
    """Command lines that run the services of this installation under the given configuration."""
    root = Path(__file__).resolve().parents[1]
    shared = [] if config is None else ["--config", str(config.resolve())]
    for override in overrides:
        if not override.startswith("run_dir="):
            shared += ["--set", override]
    shared += ["--run-dir", str(settings.run_path.absolute())]
    shared += ["--supervisor", str(os.getpid())]

    def command(spec: ChildSpec) -> list[str]:
        instance = ["--instance", spec.instance] if spec.instance else []
        return [sys.executable, "-c", _BOOT, str(root), "service", spec.service, *instance, *shared]

    return command


def end_with_supervisor(pid: int) -> None:
    """Called by a child: have the kernel end this process when its supervisor, process `pid`, is gone.

    Only Linux can; elsewhere a supervisor that is killed with SIGKILL leaves its children to be ended by hand.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != pid:  # it was gone before the kernel was told
        raise SystemExit(1)


class RunDirectory:
    """A fleet's private directory, locked for as long as this object is open.

    Raises:
        SettingsError: it cannot be made or written, belongs to somebody else, or is in use by another fleet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        remedy = "choose another with --run-dir"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = path.stat()
            if info.st_uid != os.geteuid():
                raise SettingsError(f"the run directory {path} belongs to another user", remedy)
            if info.st_mode & 0o022:
                raise SettingsError(f"others can write to the run directory {path}", f"chmod go-w {path}, or {remedy}")
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SettingsError(f"cannot use the run directory {path}: {error.strerror}", remedy) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._lock, 20).decode("ascii", "replace").strip()
            os.close(self._lock)
            raise SettingsError(
                f"another fleet (process {holder or 'unknown'}) is using the run directory {path}",
                f"stop it, or {remedy}",
            ) from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())
        self._gateway_file.unlink(missing_ok=True)

    @property
    def _gateway_file(self) -> Path:
        return self.path / "gateway.json"

    def close(self) -> None:
        self._gateway_file.unlink(missing_ok=True)
        os.ftruncate(self._lock, 0)
        os.close(self._lock)


class _Child:
    """One child's state: how to hear from it, and how its last process ended."""

    def __init__(self, spec: ChildSpec, notify_path: Path) -> None:
        self.spec = spec
        self.notify_path = notify_path
        self.process: asyncio.subprocess.Process | None = None
        self.ready_at: float | None = None
        self.left_out = False
        self.n_starts = 0
        self.failures = 0
        self.last_line = ""
        self.task: asyncio.Task[None] | None = None
        notify_path.unlink(missing_ok=True)
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self.notify.bind(str(notify_path))

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    @property
    def ready(self) -> bool:
        """Whether its process has said so, and lives."""
        return self.ready_at is not None and self.running

    def signal(self, number: signal.Signals) -> None:
        """To the process; SIGKILL to its whole group."""
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    def heard(self) -> list[str]:
        """What the child has notified since the last call."""
        lines: list[str] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                lines += self.notify.recv(4096).decode("utf-8", "replace").splitlines()
        return lines

    def forget(self) -> None:
        """Drop what the process before the next one has left."""
        self.heard()
        self.ready_at = None

    def close(self) -> None:
        self.notify.close()
        self.notify_path.unlink(missing_ok=True)


class Supervisor:
    """Runs a fleet.

    Args:
        config, overrides: what the settings were made from; children read the same.
        log_dir: where each child's output goes, NAME.log; None: stdout is shared, stderr comes through `say`.
        say: gets a line for each thing that the operator should know.
        restart: whether a child that dies is started again; otherwise its death ends the fleet.
        serving: whether the fleet can serve, asked (in a thread) before `run` says that it does: that every process is
            ready does not mean that they have all found each other.
        children, command: what to run instead of the services that the settings name.

    Attributes:
        status: the exit status for `draftwire up`, once the fleet has ended.
        failure: why the fleet ended by itself, or empty.
    """

    def __init__(
        self,
        settings: Settings,
        config: Path | None = None,
        overrides: Sequence[str] = (),
        *,
        log_dir: Path | None = None,
        say: Say | None = None,
        restart: bool = True,
        backoff: Backoff | None = None,
        serving: Callable[[], bool] | None = None,
        children: Sequence[ChildSpec] | None = None,
        command: Command | None = None,
    ) -> None:
        self.settings = settings
        self.status = 0
        self.failure = ""
        self._say = say or _say
        self._log_dir = log_dir
        self._restart = restart
        self._serving = serving
        self._backoff = backoff or Backoff()
        self._specs = list(children) if children is not None else fleet_of(settings)
        self._command = command or service_command(settings, config, overrides)
        self._children: list[_Child] = []
        self._directory: RunDirectory | None = None
        self._changed = asyncio.Event()
        self._ending = asyncio.Event()
        self._started_at = time.monotonic()

    # -- for its owner --

    async def start(self) -> None:
        """Start every child; returns at once. Errors: `SettingsError` for a run directory that cannot be used."""
        self._started_at = time.monotonic()
        self._directory = RunDirectory(self.settings.run_path)
        if self._log_dir is not None:
            self._log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        loop = asyncio.get_running_loop()
        for number, spec in enumerate(self._specs):
            path = self._directory.path.absolute() / f"notify.{number}"
            if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
                raise SettingsError(
                    f"the socket path {path} is longer than {_MAX_SOCKET_PATH} bytes", "choose a shorter run_dir"
                )
            child = _Child(spec, path)
            self._children.append(child)
            loop.add_reader(child.notify.fileno(), self._hear, child)
        for child in self._children:
            child.task = asyncio.create_task(self._keep(child), name=child.spec.label)

    async def ready(self) -> bool:
        """Wait until every child is ready or left out; False when the fleet ends before that."""
        patience_s = 3.0
        while not self._ending.is_set():
            waiting = [child for child in self._children if not child.ready and not child.left_out]
            if not waiting:
                return True
            try:
                await asyncio.wait_for(self._changed.wait(), patience_s)
            except asyncio.TimeoutError:
                patience_s = 10.0
                what = ", ".join(
                    child.spec.label + (f" ({child.spec.waits_for})" if child.spec.waits_for else "")
                    for child in waiting
                )
                self._say(f"waiting for {what}")
        return False

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something about the children; it is looked at whenever one of them changes."""
        while not condition():
            await self._changed.wait()

    def pid(self, label: str) -> int | None:
        """The process of a child that is ready, by its label ("router", "draft model")."""
        for child in self._children:
            if child.spec.label == label and child.ready and child.process is not None:
                return child.process.pid
        return None

    def gateway_address(self) -> GatewayAddress | None:
        """Where the gateway listens, as it says itself."""
        return read_gateway_file(self.settings.run_path)

    def request_stop(self) -> None:
        """Drain and end the fleet; asked again, end it at once."""
        if self._ending.is_set():
            self._say("ending all processes at once")
            for child in self._children:
                child.signal(signal.SIGKILL)
        self._end()

    async def stop(self) -> None:
        """Drain the gateway, then the others; returns when every child is gone."""
        self._end()
        gateways = [child for child in self._children if child.spec.service == "gateway"]
        order = ("draft", "verifier", "router", "sampler", "tokenizer")
        others = sorted(
            (child for child in self._children if child.spec.service != "gateway"),
            key=lambda child: order.index(child.spec.service) if child.spec.service in order else len(order),
        )
        try:
            for stage in (gateways, others):
                await self._finish(stage)
        finally:
            loop = asyncio.get_running_loop()
            for child in self._children:
                child.signal(signal.SIGKILL)  # only if this very method was cancelled
                loop.remove_reader(child.notify.fileno())
                child.close()
            self._children.clear()
            if self._directory is not None:
                self._directory.close()
                self._directory = None

    async def run(self) -> int:
        """Start, say where the gateway listens, and stay until Ctrl-C, SIGTERM or a failure; the exit status."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in signals:
            loop.add_signal_handler(number, self.request_stop)
        try:
            await self.start()
            if await self.ready() and await self._serves():
                self._announce()
                notify("READY=1")
                await self._ending.wait()
            notify("STOPPING=1")
            if any(child.running for child in self._children):
                self._say("stopping (Ctrl-C again ends everything at once)")
        finally:
            await self.stop()
            for number in signals:
                loop.remove_signal_handler(number)
        self._say("stopped")
        return self.status

    # -- inside --

    async def _serves(self) -> bool:
        """Wait until the fleet can serve; False when it ends before that."""
        asked = 0
        while self._serving is not None and not await asyncio.to_thread(self._serving):
            asked += 1
            if asked % 100 == 0:
                self._say("waiting for the gateway to find the others")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ending.wait(), 0.1)
            if self._ending.is_set():
                return False
        return True

    def _announce(self) -> None:
        seconds = time.monotonic() - self._started_at
        address = self.gateway_address()
        if address is None:
            self._say(f"ready after {seconds:.1f} s")
            return
        path = self.settings.run_path
        where = "" if path == default_run_dir() else f" --run-dir {shlex.quote(str(path))}"
        if self.settings.gateway.api_keys:
            where += " --api-key-file FILE"
        self._say(f"ready after {seconds:.1f} s: {address.url}")
        self._say(f"try: draftwire generate{where} 'def main():'")

    def _notify_change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _end(self) -> None:
        self._ending.set()
        self._notify_change()

    def _hear(self, child: _Child) -> None:
        # Not "and is running": a quick child is ready before its start has been reported to this process.
        if "READY=1" in child.heard() and child.ready_at is None:
            child.ready_at = time.monotonic()
            self._say(f"{child.spec.label} is ready" + (" again" if child.n_starts > 1 else ""))
            self._notify_change()

    async def _keep(self, child: _Child) -> None:
        """Run a child, again and again, until the fleet ends or starting again cannot help."""
        while not self._ending.is_set():
            try:
                status = await self._run_once(child)
            except OSError as error:
                self._fail(child, f"cannot be started: {error}", 1)
                return
            self._notify_change()
            if self._ending.is_set():
                return
            reason = f": {child.last_line}" if child.last_line else ""
            if status == EXIT_CONFIG:
                if child.spec.essential or not self._restart:
                    self._fail(child, f"cannot run{reason}", EXIT_CONFIG)
                else:
                    child.left_out = True
                    self._say(f"{child.spec.label} cannot run{reason}; the others go on without it")
                    self._notify_change()
                return
            ended = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with exit status {status}"
            if not self._restart:
                self._fail(child, ended + reason, 1)
                return
            delay = self._backoff.delay(child.failures)
            self._say(f"{child.spec.label} {ended}{reason}; starting it again in {delay:g} s")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ending.wait(), delay)

    async def _run_once(self, child: _Child) -> int:
        """Start a child's process and wait for its end; its exit status, or minus the signal that killed it."""
        child.forget()
        child.last_line = ""
        environment = {k: v for k, v in os.environ.items() if k not in ("WATCHDOG_USEC", "WATCHDOG_PID")}
        environment["NOTIFY_SOCKET"] = str(child.notify_path)
        log: IO[bytes] | None = None
        if self._log_dir is not None:
            environment.pop("JOURNAL_STREAM", None)
            log = (self._log_dir / f"{child.spec.file_name}.log").open("ab", buffering=0)
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command(child.spec),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
            child.process = process
            child.n_starts += 1
            self._notify_change()
            if self._ending.is_set():
                child.signal(signal.SIGTERM)
            assert process.stderr is not None
            await self._pump(child, process.stderr, log)
            status = await process.wait()
        finally:
            if log is not None:
                log.close()
        healthy = child.ready_at is not None and time.monotonic() - child.ready_at >= self._backoff.healthy_s
        child.failures = 1 if healthy else child.failures + 1
        child.ready_at = None
        return status

    async def _pump(self, child: _Child, stream: asyncio.StreamReader, log: IO[bytes] | None) -> None:
        """Pass on a child's stderr line by line; the line that says why it ends is kept for the report."""
        rest = b""
        while chunk := await stream.read(4096):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _MAX_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._pass_on(child, line, log)
        if rest:
            self._pass_on(child, rest, log)

    def _pass_on(self, child: _Child, raw: bytes, log: IO[bytes] | None) -> None:
        if log is not None:
            log.write(raw + b"\n")
        line = raw.decode("utf-8", "replace").rstrip()
        if not line:
            return
        final = _PREFIX.match(line)
        child.last_line = line[final.end() :] if final else line.strip()
        if log is None and final is None:
            self._say(f"{child.spec.label}: {line}")

    def _fail(self, child: _Child, what: str, status: int) -> None:
        failure = f"{child.spec.label} {what}"
        self._say(failure)
        if not self.failure:
            self.status, self.failure = status, failure
        self._end()

    async def _finish(self, children: Sequence[_Child]) -> None:
        tasks = [child.task for child in children if child.task is not None]
        if not tasks:
            return
        for child in children:
            child.signal(signal.SIGTERM)
        _, late = await asyncio.wait(tasks, timeout=self.settings.drain_s + _MARGIN_S)
        if late:
            for child in children:
                if child.running:
                    self._say(f"{child.spec.label} does not stop; killing it")
                    child.signal(signal.SIGKILL)
            await asyncio.wait(late)


@dataclass(frozen=True, slots=True)
class GatewayAddress:
    """Where a gateway listens. certificate: its own as PEM, with scheme "https"."""

    host: str
    port: int
    scheme: str = "http"
    certificate: str = ""

    @property
    def url(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def read_gateway_file(run_path: Path) -> GatewayAddress | None:
    """Where the gateway of a run directory listens; None when there is none."""
    try:
        value = json.loads((run_path / "gateway.json").read_text("utf-8"))
        scheme, certificate = str(value.get("scheme", "http")), str(value.get("certificate", ""))
        return GatewayAddress(str(value["host"]), int(value["port"]), scheme, certificate)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DraftwireError(f"cannot read {run_path / 'gateway.json'}: {error}", "start the fleet again") from None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(line: str) -> None:
    print(f"draftwire: {line}", file=sys.stderr, flush=True)
