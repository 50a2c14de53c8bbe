"""`draftwire up` and `draftwire demo` with the real services and the embedded pair."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.service import EXIT_CONFIG
from shared.settings import load_settings
from tools.fleet import router_status
from tools.supervisor import read_gateway_file

pytestmark = pytest.mark.pipeline

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 200
SERVICES = {"sampler", "tokenizer", "router", "verifier", "draft model", "gateway"}


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DRAFTWIRE_")}
    return {**inherited, "NO_COLOR": "1", **more}


def draftwire(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.cli", *arguments],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A run directory whose sockets' paths are short enough, wherever pytest keeps its own."""
    with tempfile.TemporaryDirectory(prefix="dw-", dir="/tmp") as path:
        yield Path(path)


class Up:
    """A `draftwire up` in the background."""

    def __init__(self, run_dir: Path, *arguments: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.cli", "up", "--run-dir", str(run_dir), *arguments],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until(self, text: str) -> str:
        """Read what it says up to the first line with that text in it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if text in line:
                return line
            if "starting it again in 4 s" in line:
                break
        raise AssertionError(f"it ended, or never came up, without saying {text!r}: {self.lines}")

    def rest(self) -> int:
        """Read the rest of what it says, and wait for its end."""
        assert self.process.stderr is not None
        self.lines += self.process.stderr.read().splitlines()
        return self.process.wait(TIMEOUT_S)

    def children(self) -> dict[str, int]:
        """Its services' processes, by their label."""
        found: dict[str, int] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                if parent == self.process.pid and "service" in words:
                    name = words[words.index("service") + 1]
                    label = f"{name} {words[words.index('--instance') + 1]}" if "--instance" in words else name
                    found[label] = int(folder.name)
        return found


@contextlib.contextmanager
def up(run_dir: Path, *arguments: str) -> Iterator[Up]:
    running = Up(run_dir, "--set", "gateway.port=0", *arguments)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait(TIMEOUT_S)
        assert running.process.stderr is not None
        running.process.stderr.close()


def assert_gone(pids: list[int]) -> None:
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([fd], [], [], TIMEOUT_S)[0], f"process {pid} is still there"
        finally:
            os.close(fd)


def test_up_serves_restarts_and_ends(run_dir: Path) -> None:
    """The fleet serves a completion; a killed service comes back and it serves again; Ctrl-C ends every process."""
    question = ("generate", "def add(a, b):", "-t", "0", "-n", "8", "--run-dir", str(run_dir))
    with up(run_dir) as fleet:
        fleet.until("ready after")
        children = fleet.children()
        assert set(children) == SERVICES
        first = draftwire(*question)
        assert (first.returncode, len(first.stdout) > 8) == (0, True), first
        os.kill(children["sampler"], signal.SIGKILL)
        fleet.until("sampler was killed by SIGKILL; starting it again in 0.5 s")
        fleet.until("sampler is ready again")
        assert draftwire(*question).stdout == first.stdout
        children = {**children, **fleet.children()}
        fleet.process.send_signal(signal.SIGINT)
        assert fleet.rest() == 0
        assert fleet.lines[-1] == "draftwire: stopped"
        assert_gone(list(children.values()))
    assert read_gateway_file(run_dir) is None


def test_second_fleet_leaves_the_first_unharmed(run_dir: Path) -> None:
    """`up` in a run directory in use ends with one line, and the fleet that was there still answers."""
    with up(run_dir, "--set", "draft={}") as fleet:
        fleet.until("ready after")
        second = draftwire("up", "--run-dir", str(run_dir))
        assert second.returncode == EXIT_CONFIG
        assert second.stderr.count("\n") == 1
        assert str(fleet.process.pid) in second.stderr
        assert draftwire("generate", "x =", "-n", "2", "--run-dir", str(run_dir)).returncode == 0
        found = draftwire("doctor", "--run-dir", str(run_dir))
        assert found.returncode == 0, found.stdout
        assert "our gateway answers" in found.stdout


def test_killed_supervisor_leaves_no_service(run_dir: Path) -> None:
    """SIGKILL of `up` ends every service, and the next fleet can start in its place."""
    with up(run_dir) as fleet:
        fleet.until("ready after")
        children = fleet.children()
        assert set(children) == SERVICES
        fleet.process.kill()
        assert_gone(list(children.values()))
    with up(run_dir, "--set", "draft={}") as fleet:
        fleet.until("ready after")


def test_target_that_is_missing_ends_the_fleet(run_dir: Path) -> None:
    """Without its target nothing can run: one line names the file, and the status says not to try again."""
    with up(run_dir, "--set", "draft={}", "--set", "verifier.engine.model=/no/such.gguf") as fleet:
        fleet.until("cannot run: there is no model file /no/such.gguf")
        assert fleet.rest() == EXIT_CONFIG
    assert not any("Traceback" in line for line in fleet.lines), "".join(map(str, fleet.lines[-60:]))


def test_draft_model_that_is_missing_is_done_without(run_dir: Path) -> None:
    """A draft worker that cannot run is said so once, and the rest serves."""
    with up(run_dir, "--set", "draft.small.engine.model=/no/such.gguf") as fleet:
        fleet.until("ready after")
        [line] = [line for line in fleet.lines if "draft small cannot run" in line]
        assert "there is no model file /no/such.gguf" in line
        assert draftwire("generate", "x =", "-n", "2", "--run-dir", str(run_dir)).returncode == 0


def test_http_port_in_use_ends_the_fleet(run_dir: Path) -> None:
    """A taken port is one line with its number, and the status says not to try again."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with up(run_dir, "--set", f"gateway.port={port}", "--set", "draft={}") as fleet:
            assert str(port) in fleet.until("gateway cannot run")
            assert fleet.rest() == EXIT_CONFIG
    assert not any("Traceback" in line for line in fleet.lines), "".join(map(str, fleet.lines[-60:]))


def test_router_that_has_fallen_silent_is_no_status(run_dir: Path) -> None:
    """Asking for the status where nothing runs gives None instead of waiting for ever."""
    settings = load_settings(None, [f'run_dir="{run_dir}"'], {})
    assert router_status(settings, timeout_s=0.1) is None


@pytest.mark.parametrize("draft", ["none", "model", "ngram"])
def test_demo_shows_text_and_figures_and_cleans_up(draft: str) -> None:
    """The demo prints the completion with marks, whether texts agree, a table; it leaves no file and no process."""
    with tempfile.TemporaryDirectory(prefix="dw-", dir="/tmp") as folder:
        ended = draftwire("demo", "--draft", draft, "-n", "24", "--seed", "3", "--no-scene", TMPDIR=folder)
        assert list(Path(folder).iterdir()) == []
    assert ended.returncode == 0, ended
    assert "self.items.append(item)" in ended.stdout
    for row in ("tokens/s", "rounds", "mean acceptance length", "verify ms", "wait ms"):
        assert f"│ {row}" in ended.stdout
    if draft == "none":
        assert "speculative" not in ended.stdout
    else:
        assert "speculative" in ended.stdout
        assert re.search(r"text is identical in all \d completions|equal the first plain one", ended.stdout)
        assert "‹proposed by the draft and accepted›" in ended.stdout
    assert "all processes have ended" in ended.stderr


def test_demo_ends_on_an_emulated_machine() -> None:
    """With default engines it shows the same prompt at the pace of a large model, says so, and cleans up after it."""
    with tempfile.TemporaryDirectory(prefix="dw-", dir="/tmp") as folder:
        ended = draftwire("demo", "-n", "8", TMPDIR=folder)
        assert list(Path(folder).iterdir()) == []
    assert ended.returncode == 0, ended
    assert "The machine is emulated" in ended.stdout
    assert re.search(r"plain \d+\.\d+ tokens/s, speculative \d+\.\d+: \d\.\d\dx", ended.stdout)
    assert "One completion of 8 tokens each" in ended.stdout


def test_demo_with_numpy_is_exact(run_dir: Path) -> None:
    """With the row-invariant engine all completions have the same text, also when sampled."""
    arguments = ("--engine", "numpy", "-n", "12", "--temperature", "0.8", "--prompt", "def area(radius):\n")
    ended = draftwire("demo", *arguments, TMPDIR=str(run_dir))
    assert ended.returncode == 0, ended
    assert "text is identical in all" in ended.stdout


def test_demo_that_fails_says_why(run_dir: Path) -> None:
    """A demo whose fleet cannot run ends with one clear error and leaves nothing behind."""
    arguments = ("--draft", "none", "--set", "verifier.engine.model=/no/such.gguf")
    ended = draftwire("demo", *arguments, TMPDIR=str(run_dir))
    assert ended.returncode == 1
    assert "draftwire: error: the demo's fleet has ended" in ended.stderr
    assert "/no/such.gguf" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(run_dir.iterdir()) == []
