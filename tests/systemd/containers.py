"""Hosts with systemd as PID 1, on this one machine: containers over an overlay of its own root file system.

Each host is a `systemd-nspawn -b` in a network namespace of its own (which survives a reboot of the host) and in a
cgroup of its own (or two managers would share one); the namespaces of two hosts are joined by a veth pair. What a host
writes goes to a tmpfs. Draftwire is built as a wheel and installed into /opt/draftwire, once, in a layer that all hosts
share.

Invariant: `Rig.close` leaves nothing behind, however far things have got: no process, mount, interface or cgroup.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.fleet import Gateway

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "draftwire" / "test-systemd"
PYTHON = "/usr/bin/python3"
PROGRAMS = {
    "systemd-nspawn": "apt-get install systemd-container",
    "nsenter": "apt-get install util-linux",
    "ip": "apt-get install iproute2",
    PYTHON: "apt-get install python3-venv",
}
FOLDERS = Path("/var/tmp").resolve()
START_S = 120.0
_CLONE_NEWNET = 0x40000000
_MARK = "dw-rig"


def missing() -> list[str]:
    """What this machine lacks to run these tests, each with a remedy."""
    lacks = [] if os.geteuid() == 0 else ["root: these tests mount file systems and start containers (sudo make ...)"]
    lacks += [f"{program}: {remedy}" for program, remedy in PROGRAMS.items() if shutil.which(program) is None]
    return lacks


def until(condition: Callable[[], Any], what: str, timeout_s: float = START_S) -> Any:
    """Wait for a condition to hold, and return its value; fails by saying what did not come about."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain: {what}"
        time.sleep(0.1)
    return value


def _run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    if ended.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}: {ended.returncode}\n{ended.stdout}{ended.stderr}")
    return ended


class Rig:
    """Everything that the hosts share. hosts: those that have booted."""

    def __init__(self) -> None:
        self.hosts: list[Host] = []
        self._closing = contextlib.ExitStack()
        try:
            sweep()
            self.folder = FOLDERS / f"{_MARK}-{os.getpid()}"  # short: socket paths and mount options are limited
            self.folder.mkdir()
            self._closing.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.mount("tmpfs", "tmpfs", self.folder)
            self.layer = self.folder / "layer"
            self._install()
        except BaseException:
            self.close()
            raise

    def mount(self, kind: str, source: str, target: Path, options: str = "") -> None:
        target.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", kind, *(["-o", options] if options else []), source, target)
        self._closing.callback(subprocess.run, ["umount", "-l", str(target)], check=False)

    def overlay(self, name: str, *lower: Path) -> Path:
        """A writable root file system over these layers and this machine's own."""
        upper, work, merged = (self.folder / name / part for part in ("upper", "work", "root"))
        for path in (upper, work):
            path.mkdir(parents=True)
        layers = ":".join(map(str, (*lower, Path("/"))))
        self.mount("overlay", "overlay", merged, f"lowerdir={layers},upperdir={upper},workdir={work}")
        return merged

    def _install(self) -> None:
        """/opt/draftwire in the shared layer. Dependencies are kept on disk from one run to the next."""
        key = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + Path(PYTHON).resolve().name.encode()).hexdigest()
        kept = CACHE / f"venv-{key[:16]}.tar"
        root = self.overlay("build")
        share = self.folder / "wheels"
        share.mkdir()
        _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", share, ROOT)
        (wheel,) = share.glob("draftwire-*.whl")
        (root / "opt").mkdir(exist_ok=True)
        shutil.rmtree(root / "opt/draftwire", ignore_errors=True)
        if kept.exists():
            _run("tar", "-C", root / "opt", "-xf", kept)
            script = f"/opt/draftwire/bin/pip install --quiet --no-deps --force-reinstall /wheels/{wheel.name}"
        else:
            script = f"{PYTHON} -m venv /opt/draftwire && /opt/draftwire/bin/pip install --quiet /wheels/{wheel.name}"
        pip = [f"--setenv={name}={value}" for name, value in os.environ.items() if name.startswith("PIP_")]
        nspawn = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--pipe", f"--bind-ro={share}:/wheels"]
        _run(*nspawn, *pip, "-D", root, "/bin/sh", "-c", script)
        if not kept.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            _run("tar", "-C", root / "opt", "-cf", f"{kept}.new", "draftwire")
            os.replace(f"{kept}.new", kept)
        self.layer.mkdir()
        (self.layer / "opt").mkdir()
        shutil.move(self.folder / "build/upper/opt/draftwire", self.layer / "opt/draftwire")

    def host(self, name: str, address: str = "") -> Host:
        """A running host; with an address on the network of this rig."""
        host = Host(self, name, address)
        self._closing.callback(host.close)
        host.prepare()
        host.boot()
        self.hosts.append(host)
        return host

    def join(self, one: Host, other: Host) -> None:
        """Lay a cable between two hosts."""
        ends = [(host, f"dw{uuid.uuid4().hex[:8]}") for host in (one, other)]
        _run("ip", "link", "add", ends[0][1], "type", "veth", "peer", "name", ends[1][1])
        for host, interface in ends:
            _run("ip", "link", "set", interface, "netns", host.netns)
            _run("ip", "-n", host.netns, "link", "set", interface, "name", "lan0")
            _run("ip", "-n", host.netns, "addr", "add", f"{host.address}/24", "dev", "lan0")
            _run("ip", "-n", host.netns, "link", "set", "lan0", "up")

    def close(self) -> None:
        self._closing.close()


class Host:
    """One container with systemd as PID 1."""

    def __init__(self, rig: Rig, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.netns = f"{_MARK}-{os.getpid()}-{name}"
        self.root = rig.overlay(name, rig.layer)
        self.console = rig.folder / name / "console"
        self._process: subprocess.Popen[bytes] | None = None
        self._cgroups: list[Path] = []

    def prepare(self) -> None:
        """What is to be there before it boots for the first time."""
        _run("ip", "netns", "add", self.netns)
        _run("ip", "-n", self.netns, "link", "set", "lo", "up")
        self._cgroups = _make_cgroups(self.netns)
        (self.root / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
        (self.root / "etc/hostname").write_text(f"{self.name}\n")
        (self.root / "var/log/journal").mkdir(exist_ok=True)  # the journal outlives a reboot
        # What this machine runs besides is not wanted there.
        shutil.rmtree(self.root / "etc/systemd/system/multi-user.target.wants", ignore_errors=True)
        for path in (self.root / "etc/systemd/system").glob("draftwire*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def boot(self) -> None:
        with self.console.open("ab") as console:
            self._process = subprocess.Popen(
                [
                    *("systemd-nspawn", "--register=no", "--keep-unit", "--quiet", "-b", "-D", str(self.root)),
                    *(f"--machine={self.netns}", f"--network-namespace-path=/run/netns/{self.netns}"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: _enter(self._cgroups),
            )
        self.wait_booted()

    def wait_booted(self) -> None:
        def booted() -> bool:
            state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
            return state in ("running", "degraded", "starting") and self._has_reached("multi-user.target")

        until(booted, f"{self.name} does not boot: {self.console.read_text(errors='replace')[-2000:]}")

    def _has_reached(self, target: str) -> bool:
        return self.run("systemctl", "is-active", target, check=False).stdout.strip() == "active"

    @property
    def leader(self) -> int | None:
        """PID 1 of the container, as this machine sees it."""
        assert self._process is not None
        assert self._process.poll() is None, self.console.read_text(errors="replace")[-2000:]
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else None

    def _inside(self, command: Sequence[str]) -> list[str]:
        leader = self.leader
        environment = [
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/root",
            "LANG=C.UTF-8",
        ]
        enter = ["nsenter", "-t", str(leader or 0), "-m", "-p", "-u", "-i", "-n", "--"]
        return [*enter, "env", "-i", *environment, *command]

    def run(
        self, *command: str, check: bool = True, stdin: str = "", timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """A command inside, as root."""
        ended = subprocess.run(
            self._inside(command), input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert not check or ended.returncode == 0, f"{command}: {ended.returncode}\n{ended.stdout}{ended.stderr}"
        return ended

    def draftwire(self, *arguments: str, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return self.run("/opt/draftwire/bin/draftwire", *arguments, check=check, stdin=stdin)

    def systemctl(self, *arguments: str) -> str:
        return self.run("systemctl", *arguments).stdout

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", "--value", f"--property={name}", unit).strip()

    def main_pid(self, unit: str) -> int:
        return int(self.show(unit, "MainPID"))

    def wait_active(self, *units: str) -> None:
        for unit in units:
            until(lambda unit=unit: self.show(unit, "ActiveState") == "active", f"{unit} on {self.name} to be active")

    def journal(self, unit: str = "") -> list[dict[str, Any]]:
        """The entries of a unit, or all, with their fields."""
        unit_options = [f"--unit={unit}"] if unit else []
        lines = self.run("journalctl", "--output=json", "--no-pager", *unit_options).stdout.splitlines()
        return [json.loads(line) for line in lines]

    def events(self, unit: str) -> list[dict[str, Any]]:
        """The JSON lines that a service has logged."""
        texts = [entry["MESSAGE"] for entry in self.journal(unit) if isinstance(entry.get("MESSAGE"), str)]
        return [json.loads(text) for text in texts if text.startswith("{")]

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def read(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text()

    def gateway(self, port: int = 8080, timeout_s: float = 60) -> NamespaceGateway:
        return NamespaceGateway(self.netns, f"http://127.0.0.1:{port}", timeout_s)

    def unplug(self) -> None:
        """Take the cable out."""
        _run("ip", "-n", self.netns, "link", "set", "lan0", "down")

    def plug(self) -> None:
        _run("ip", "-n", self.netns, "link", "set", "lan0", "up")

    def reboot(self) -> None:
        """Shut down in order and start again, as `reboot` does; returns when it is up.

        The container's manager goes with it, since it can only start a container again where /run is a tmpfs.
        """
        assert self._process is not None
        self.run("systemctl", "poweroff", check=False)
        self._process.wait(START_S)
        self.boot()

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(AssertionError, ProcessLookupError):
                if (leader := self.leader) is not None:
                    os.kill(leader, signal.SIGKILL)  # PID 1 of the container, and with it all that is in there
            self._process.kill()
            self._process.wait()
        subprocess.run(["ip", "netns", "del", self.netns], check=False, capture_output=True)
        shutil.rmtree(f"/run/systemd/nspawn/propagate/{self.netns}", ignore_errors=True)
        for folder in self._cgroups:
            _remove_cgroup(folder)


class NamespaceGateway(Gateway):
    """A client of a gateway inside a network namespace."""

    def __init__(self, netns: str, url: str, timeout_s: float) -> None:
        super().__init__(url, timeout_s)
        self._netns = netns
        self._seconds = timeout_s

    def connect(self) -> http.client.HTTPConnection:
        connection = super().connect()
        address = connection.host, connection.port
        connection.sock = in_namespace(self._netns, lambda: socket.create_connection(address, self._seconds))
        return connection


def in_namespace(netns: str, action: Callable[[], Any]) -> Any:
    """Do something on a thread that has entered a network namespace: sockets stay where they were made."""
    result: list[Any] = []

    def enter() -> None:
        try:
            with open(f"/run/netns/{netns}", "rb") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            result.append(action())
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


def sweep() -> None:
    """Remove what an earlier run has left that was killed before it could."""

    def left(name: str) -> bool:
        pid = name.removeprefix(f"{_MARK}-").partition("-")[0]
        return name.startswith(f"{_MARK}-") and pid.isdigit() and not Path(f"/proc/{pid}").exists()

    for _, mountpoint in _cgroup_mounts():
        for folder in mountpoint.rglob(f"{_MARK}-*"):
            if left(folder.name):
                for file in folder.rglob("cgroup.procs"):
                    for pid in file.read_text().split():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(pid), signal.SIGKILL)
                _remove_cgroup(folder)
    for path in Path("/run/netns").glob(f"{_MARK}-*"):
        if left(path.name):
            subprocess.run(["ip", "netns", "del", path.name], check=False, capture_output=True)
            shutil.rmtree(f"/run/systemd/nspawn/propagate/{path.name}", ignore_errors=True)
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for folder in FOLDERS.glob(f"{_MARK}-*"):
        if left(folder.name):
            for mounted in reversed(mounts):
                if Path(mounted) == folder or folder in Path(mounted).parents:
                    subprocess.run(["umount", "-l", mounted], check=False)
            shutil.rmtree(folder, ignore_errors=True)


def _cgroup_mounts() -> list[tuple[str, Path]]:
    """Hierarchies in which a systemd keeps its units, by their name in /proc/self/cgroup, and where they are."""
    found: list[tuple[str, Path]] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options):
            found.append(("" if kind == "cgroup2" else "name=systemd", Path(left.split()[4])))
    return found


def _make_cgroups(name: str) -> list[Path]:
    """A cgroup below this process's own in each hierarchy in which a systemd keeps its units."""
    mounts = dict(_cgroup_mounts())
    made: list[Path] = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in mounts:
            folder = mounts[controllers] / path.lstrip("/") / name
            folder.mkdir()
            made.append(folder)
    return made


def _enter(cgroups: Sequence[Path]) -> None:
    for folder in cgroups:
        (folder / "cgroup.procs").write_text("0")


def _remove_cgroup(folder: Path) -> None:
    """Remove a cgroup and those below it, as soon as what was in them has ended."""
    deadline = time.monotonic() + 10
    while folder.exists() and time.monotonic() < deadline:
        for path, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        time.sleep(0.05)
