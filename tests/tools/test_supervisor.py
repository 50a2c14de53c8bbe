"""The supervisor's own logic, with small stub processes in place of the services."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from shared.errors import SettingsError
from shared.service import EXIT_CONFIG
from shared.settings import DraftSettings, Settings
from tools import supervisor as module
from tools.supervisor import (
    Backoff,
    ChildSpec,
    GatewayAddress,
    RunDirectory,
    Supervisor,
    fleet_of,
    read_gateway_file,
    service_command,
)

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60
QUICK = Backoff(first_s=0.01, most_s=0.05, healthy_s=60)

STUB = """
import os, signal, socket, sys
name, journal, mode = sys.argv[1:4]

def note(event):
    fd = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{event} {name} {os.getpid()}\\n".encode())
    os.close(fd)

def end(number, frame):
    note("term")
    if mode == "stubborn":
        return
    note("end")
    sys.exit(0)

signal.signal(signal.SIGTERM, end)
if "--supervisor" in sys.argv:
    sys.path.insert(0, os.environ["STUB_ROOT"])
    from tools.supervisor import end_with_supervisor
    end_with_supervisor(int(sys.argv[sys.argv.index("--supervisor") + 1]))
note("start")
print("out of", name, flush=True)
if mode == "config":
    print("a warning", file=sys.stderr)
    print(f"draftwire {name.split()[0]}: there is no model file x (give another)", file=sys.stderr, flush=True)
    sys.exit(78)
if mode == "crash":
    print("Traceback", file=sys.stderr)
    sys.exit("ValueError: no such thing")
if mode == "chatty":
    print("[half a", end=" ", file=sys.stderr, flush=True)
    print("line]", file=sys.stderr, flush=True)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.sendto(b"STATUS=fine\\nREADY=1", os.environ["NOTIFY_SOCKET"])
while True:
    signal.pause()
"""


class Fleet:
    """A supervisor of stubs, what it has said, and what the stubs have noted ("start gateway 123")."""

    def __init__(self, tmp_path: Path, modes: dict[str, str], **options: object) -> None:
        self.journal = tmp_path / "journal"
        self.said: list[str] = []
        settings = Settings(run_dir=str(tmp_path / "run"), drain_s=20)
        specs = [ChildSpec(*label.split(" ")) for label in modes]
        arguments: dict[str, object] = {"backoff": QUICK, **options}
        self.supervisor = Supervisor(
            settings,
            say=self.said.append,
            children=specs,
            command=lambda spec: [sys.executable, "-c", STUB, spec.label, str(self.journal), modes[spec.label]],
            **arguments,  # type: ignore[arg-type]
        )

    def notes(self, event: str) -> list[str]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [line.partition(" ")[2].rpartition(" ")[0] for line in lines if line.startswith(event + " ")]

    def run(self, scenario: Callable[[Supervisor], Awaitable[None]]) -> None:
        """Run a scenario with the fleet started, and stop the fleet."""

        async def whole() -> None:
            try:
                await self.supervisor.start()
                await scenario(self.supervisor)
            finally:
                await self.supervisor.stop()

        asyncio.run(asyncio.wait_for(whole(), TIMEOUT_S))


async def replaced(supervisor: Supervisor, label: str, old: int) -> int:
    """Wait until another process of that label is ready; its pid."""
    await supervisor.until(lambda: supervisor.pid(label) not in (None, old))
    pid = supervisor.pid(label)
    assert pid is not None
    return pid


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pids: Sequence[int]) -> None:
    """Wait until the processes, which need not be ours, have ended."""
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([fd], [], [], TIMEOUT_S)[0], f"process {pid} is still there"
        finally:
            os.close(fd)


# --- starting ---------------------------------------------------------------------------------------------------------


def test_fleet_is_ready_when_every_child_says_so(tmp_path: Path) -> None:
    """`ready` returns after every child's READY=1; each child leads a session of its own and is said to be ready."""
    fleet = Fleet(tmp_path, {"router": "good", "verifier": "good", "draft small": "good", "gateway": "good"})

    async def scenario(supervisor: Supervisor) -> None:
        assert await supervisor.ready()
        pids = [supervisor.pid(label) for label in ("router", "verifier", "draft small", "gateway")]
        assert all(pid is not None and os.getsid(pid) == pid for pid in pids)
        assert len(set(pids)) == 4

    fleet.run(scenario)
    assert sorted(line for line in fleet.said if line.endswith("is ready")) == [
        "draft small is ready",
        "gateway is ready",
        "router is ready",
        "verifier is ready",
    ]


def test_readiness_is_heard_before_the_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that is ready before its start has been reported to the supervisor (a busy machine) is not missed."""
    fleet = Fleet(tmp_path, {"router": "good"})
    start, hear = asyncio.create_subprocess_exec, Supervisor._hear
    heard = asyncio.Event()

    def noted(supervisor: Supervisor, child: Any) -> None:
        hear(supervisor, child)
        if child.ready_at is not None:
            heard.set()

    async def reported_late(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*arguments, **options)
        await heard.wait()
        return process

    monkeypatch.setattr(Supervisor, "_hear", noted)
    monkeypatch.setattr(module.asyncio, "create_subprocess_exec", reported_late)

    async def scenario(supervisor: Supervisor) -> None:
        assert await asyncio.wait_for(supervisor.ready(), 20)
        assert supervisor.pid("router") is not None

    fleet.run(scenario)


def test_waiting_names_what_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a child takes long to start, the operator reads which one and what it is busy with."""
    real_wait_for = asyncio.wait_for
    monkeypatch.setattr(module.asyncio, "wait_for", lambda awaitable, _s: real_wait_for(awaitable, 0.01))
    said: asyncio.Event = asyncio.Event()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("waiting"):
            said.set()

    settings = Settings(run_dir=str(tmp_path / "run"))
    supervisor = Supervisor(
        settings,
        say=say,
        children=[ChildSpec("verifier", waits_for="loading big.gguf")],
        command=lambda _spec: [sys.executable, "-c", "import signal; signal.pause()"],
    )

    async def scenario() -> None:
        await supervisor.start()
        ready = asyncio.create_task(supervisor.ready())
        await said.wait()
        await supervisor.stop()
        assert not await ready

    asyncio.run(real_wait_for(scenario(), TIMEOUT_S))
    assert "waiting for verifier (loading big.gguf)" in lines


def test_children_are_those_of_the_settings() -> None:
    """One process for each service and for each [draft.X] table, with the gateway last."""
    settings = Settings(draft={"a": DraftSettings(), "b": DraftSettings(drafter="ngram")})
    assert [spec.label for spec in fleet_of(settings)] == [
        "sampler",
        "tokenizer",
        "router",
        "verifier",
        "draft a",
        "draft b",
        "gateway",
    ]


def test_services_run_this_very_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child's command finds our code from any directory, also one that has a package called `tools` of its own."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/__init__.py").write_text("raise SystemExit('the wrong tools')\n")
    monkeypatch.chdir(tmp_path)
    command = service_command(Settings(run_dir=str(tmp_path / "run")), None, ["log_level=nonsense"])(
        ChildSpec("router")
    )
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert ended.returncode == EXIT_CONFIG
    assert "log_level is 'nonsense'" in ended.stderr


# --- children that die ------------------------------------------------------------------------------------------------


def test_killed_child_is_started_again(tmp_path: Path) -> None:
    """A child that is killed comes back and is said so; the others are left alone."""
    fleet = Fleet(tmp_path, {"router": "good", "verifier": "good"})

    async def scenario(supervisor: Supervisor) -> None:
        assert await supervisor.ready()
        router, verifier = supervisor.pid("router"), supervisor.pid("verifier")
        assert router is not None
        os.kill(router, signal.SIGKILL)
        await replaced(supervisor, "router", router)
        assert supervisor.pid("verifier") == verifier

    fleet.run(scenario)
    assert "router was killed by SIGKILL; starting it again in 0.01 s" in fleet.said
    assert "router is ready again" in fleet.said


@pytest.mark.parametrize(("healthy_s", "delays"), [(60.0, ["0.01", "0.02", "0.04", "0.05"]), (0.0, ["0.01"] * 4)])
def test_back_off_grows_until_a_child_was_healthy(tmp_path: Path, healthy_s: float, delays: list[str]) -> None:
    """Each failure in a row doubles the wait up to a limit; a child that was up long enough begins anew."""
    fleet = Fleet(tmp_path, {"router": "good"}, backoff=Backoff(0.01, 0.05, healthy_s))

    async def scenario(supervisor: Supervisor) -> None:
        assert await supervisor.ready()
        pid = supervisor.pid("router")
        for _ in delays:
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            pid = await replaced(supervisor, "router", pid)

    fleet.run(scenario)
    assert [line.split()[-2] for line in fleet.said if "starting it again" in line] == delays


def test_back_off_is_from_half_a_second_to_half_a_minute() -> None:
    """The default waits, also after very many failures."""
    assert [Backoff().delay(n) for n in (1, 2, 3, 7, 8, 10_000)] == [0.5, 1.0, 2.0, 30.0, 30.0, 30.0]


def test_child_that_crashes_at_start_is_reported_with_its_last_words(tmp_path: Path) -> None:
    """The line about a death carries the exit status and the last line of stderr."""
    fleet = Fleet(tmp_path, {"sampler": "crash"})
    fleet.run(lambda supervisor: supervisor.until(lambda: len(fleet.notes("start")) >= 3))
    assert "sampler ended with exit status 1: ValueError: no such thing; starting it again in 0.01 s" in fleet.said
    assert "sampler: Traceback" in fleet.said


def test_essential_child_with_bad_settings_ends_the_fleet(tmp_path: Path) -> None:
    """EXIT_CONFIG is not tried again: the fleet ends with that status and says the child's reason once."""
    fleet = Fleet(tmp_path, {"router": "good", "verifier": "config"})

    async def scenario(supervisor: Supervisor) -> None:
        assert not await supervisor.ready()

    fleet.run(scenario)
    assert fleet.supervisor.status == EXIT_CONFIG
    assert fleet.notes("start").count("verifier") == 1
    assert [line for line in fleet.said if "no model file" in line] == [
        "verifier cannot run: there is no model file x (give another)"
    ]
    assert "verifier: a warning" in fleet.said


def test_draft_with_bad_settings_leaves_the_rest_running(tmp_path: Path) -> None:
    """A draft worker is not essential: it is left out and said so, and the fleet is ready without it."""
    fleet = Fleet(tmp_path, {"router": "good", "draft small": "config"})

    async def scenario(supervisor: Supervisor) -> None:
        assert await supervisor.ready()
        assert supervisor.pid("router") is not None
        assert supervisor.pid("draft small") is None

    fleet.run(scenario)
    assert fleet.supervisor.status == 0
    assert fleet.notes("start").count("draft small") == 1
    assert "draft small cannot run: there is no model file x (give another); the others go on without it" in fleet.said


def test_without_restart_a_death_ends_the_fleet(tmp_path: Path) -> None:
    """With restart off (the demo), the first death is the fleet's failure."""
    fleet = Fleet(tmp_path, {"router": "good", "draft small": "good"}, restart=False)

    async def scenario(supervisor: Supervisor) -> None:
        assert await supervisor.ready()
        pid = supervisor.pid("draft small")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await supervisor.until(lambda: bool(supervisor.failure))

    fleet.run(scenario)
    assert fleet.supervisor.failure == "draft small was killed by SIGKILL"
    assert fleet.supervisor.status == 1
    assert len(fleet.notes("start")) == 2


def test_command_that_cannot_be_run_ends_the_fleet(tmp_path: Path) -> None:
    """A missing program is said, not tried for ever."""
    said: list[str] = []
    settings = Settings(run_dir=str(tmp_path / "run"))
    supervisor = Supervisor(
        settings, say=said.append, children=[ChildSpec("router")], command=lambda _spec: [str(tmp_path / "missing")]
    )

    async def scenario() -> None:
        await supervisor.start()
        assert not await supervisor.ready()
        await supervisor.stop()

    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))
    assert supervisor.status == 1
    assert "router cannot be started" in said[0]


# --- output -----------------------------------------------------------------------------------------------------------


def test_stderr_is_passed_on_by_whole_lines(tmp_path: Path) -> None:
    """What a child writes to stderr appears with its name, however it was cut when it was written."""
    fleet = Fleet(tmp_path, {"router": "chatty"})

    async def scenario(supervisor: Supervisor) -> None:
        assert await supervisor.ready()

    fleet.run(scenario)
    assert "router: [half a line]" in fleet.said


def test_output_can_go_to_files(tmp_path: Path) -> None:
    """With a log directory, stdout and stderr of each child are in a file of its own, also across restarts."""
    logs = tmp_path / "logs"
    fleet = Fleet(tmp_path, {"router": "good", "draft small": "config"}, log_dir=logs)

    async def scenario(supervisor: Supervisor) -> None:
        assert await supervisor.ready()
        pid = supervisor.pid("router")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await replaced(supervisor, "router", pid)

    fleet.run(scenario)
    assert (logs / "router.log").read_text() == "out of router\n" * 2
    assert "out of draft small\n" in (logs / "draft-small.log").read_text()
    assert "a warning\ndraftwire draft: there is no model file x" in (logs / "draft-small.log").read_text()


# --- ending -----------------------------------------------------------------------------------------------------------


def test_gateway_ends_before_anything_else_is_asked_to(tmp_path: Path) -> None:
    """Stopping drains the gateway while all it needs is still there, then the others, draft workers first."""
    fleet = Fleet(tmp_path, {"tokenizer": "good", "router": "good", "draft small": "good", "gateway": "good"})

    async def scenario(supervisor: Supervisor) -> None:
        assert await supervisor.ready()

    fleet.run(scenario)
    events = [line.rpartition(" ")[0] for line in fleet.journal.read_text().splitlines()]
    events = [event for event in events if not event.startswith("start")]
    assert events[:2] == ["term gateway", "end gateway"]
    assert sorted(fleet.notes("end")) == ["draft small", "gateway", "router", "tokenizer"]


def test_child_that_ignores_the_drain_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time for draining, SIGKILL; and said so."""
    monkeypatch.setattr(module, "_MARGIN_S", -19.9)
    fleet = Fleet(tmp_path, {"router": "stubborn"})
    pids: list[int | None] = []

    async def scenario(supervisor: Supervisor) -> None:
        assert await supervisor.ready()
        pids.append(supervisor.pid("router"))

    fleet.run(scenario)
    assert "router does not stop; killing it" in fleet.said
    assert pids[0] is not None
    assert not alive(pids[0])


def test_second_request_to_stop_kills_at_once(tmp_path: Path) -> None:
    """Who asks twice does not wait for a drain."""
    fleet = Fleet(tmp_path, {"router": "stubborn"})

    async def scenario(supervisor: Supervisor) -> None:
        assert await supervisor.ready()
        supervisor.request_stop()
        supervisor.request_stop()
        await supervisor.stop()

    fleet.run(scenario)
    assert "ending all processes at once" in fleet.said
    assert "router does not stop; killing it" not in fleet.said


def test_stopping_during_back_off_starts_nothing_again(tmp_path: Path) -> None:
    """A child that waits to be started again is not, once the fleet ends."""
    fleet = Fleet(tmp_path, {"sampler": "crash"}, backoff=Backoff(first_s=3600, most_s=3600))
    fleet.run(lambda supervisor: supervisor.until(lambda: any("in 3600 s" in line for line in fleet.said)))
    assert len(fleet.notes("start")) == 1


MAIN = """
import asyncio, sys
from pathlib import Path
from shared.settings import Settings
from tools.supervisor import ChildSpec, Supervisor
run_dir, stub, journal, mode, labels = sys.argv[1:6]
import os
command = lambda spec: [sys.executable, "-c", stub, spec.label, journal, mode, "--supervisor", str(os.getpid())]
specs = [ChildSpec(*label.split(" ")) for label in labels.split(",")]
supervisor = Supervisor(Settings(run_dir=run_dir, drain_s=20), children=specs, command=command)
sys.exit(asyncio.run(supervisor.run()))
"""


@contextlib.contextmanager
def separate(tmp_path: Path, mode: str = "good") -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A supervisor in a process of its own, ready; with the pids of its children."""
    journal = tmp_path / "journal"
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, str(tmp_path / "run"), STUB, str(journal), mode, "router,draft small,gateway"],
        cwd=ROOT,
        env={**os.environ, "STUB_ROOT": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "ready after" in line:
                break
        yield process, [int(line.split()[-1]) for line in journal.read_text().splitlines()]
    finally:
        process.kill()
        process.wait(TIMEOUT_S)
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_ends_all_children(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM or a closed terminal end the supervisor with status 0 and every child with a drain."""
    with separate(tmp_path) as (process, pids):
        assert len(pids) == 3
        assert all(map(alive, pids))
        process.send_signal(number)
        assert process.wait(TIMEOUT_S) == 0
        assert not any(map(alive, pids))
    assert (tmp_path / "journal").read_text().count("end ") == 3


def test_killed_supervisor_leaves_no_child(tmp_path: Path) -> None:
    """Even SIGKILL of the supervisor ends every child, and the run directory can be used again."""
    with separate(tmp_path, "stubborn") as (process, pids):
        assert len(pids) == 3
        process.kill()
        process.wait(TIMEOUT_S)
        wait_for_end(pids)
    RunDirectory(tmp_path / "run").close()


# --- the run directory ------------------------------------------------------------------------------------------------


def test_run_directory_is_made_private(tmp_path: Path) -> None:
    """It is created with its parents, for its owner only, and says who holds it."""
    path = tmp_path / "a" / "run"
    directory = RunDirectory(path)
    assert path.stat().st_mode & 0o777 == 0o700
    assert (path / "lock").read_text() == f"{os.getpid()}\n"
    directory.close()


def test_run_directory_is_used_by_one_fleet(tmp_path: Path) -> None:
    """A second fleet is refused with the first one's process and a remedy, until the first one ends."""
    first = RunDirectory(tmp_path / "run")
    with pytest.raises(SettingsError, match=rf"process {os.getpid()}\) is using the run directory.*--run-dir"):
        RunDirectory(tmp_path / "run")
    first.close()
    RunDirectory(tmp_path / "run").close()


def test_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """A path that cannot be a directory is a settings error with a remedy."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"cannot use the run directory .*Not a directory.*--run-dir"):
        RunDirectory(tmp_path / "file" / "run")


def test_run_directory_that_others_can_write(tmp_path: Path) -> None:
    """Sockets are not put where other users could put theirs."""
    path = tmp_path / "run"
    path.mkdir()
    path.chmod(0o777)
    with pytest.raises(SettingsError, match="others can write"):
        RunDirectory(path)


def test_run_directory_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that somebody else made in a shared place is not trusted."""
    monkeypatch.setattr(os, "geteuid", lambda: 987654)
    with pytest.raises(SettingsError, match="belongs to another user"):
        RunDirectory(tmp_path / "run")


def test_gateway_address_does_not_outlive_its_fleet(tmp_path: Path) -> None:
    """Where the gateway listened is forgotten when a fleet starts and when it ends."""
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    (path / "gateway.json").write_text(json.dumps({"host": "127.0.0.1", "port": 1}))
    directory = RunDirectory(path)
    assert read_gateway_file(path) is None
    (path / "gateway.json").write_text(json.dumps({"host": "127.0.0.1", "port": 2}))
    assert read_gateway_file(path) == GatewayAddress("127.0.0.1", 2)
    directory.close()
    assert read_gateway_file(path) is None


def test_run_directory_too_long_for_a_socket(tmp_path: Path) -> None:
    """A path in which no socket fits is a settings error, and nothing is started."""
    fleet = Fleet(tmp_path / ("x" * 100), {"router": "good"})
    with pytest.raises(SettingsError, match="shorter run_dir"):
        fleet.run(lambda supervisor: supervisor.until(lambda: False))
    assert fleet.notes("start") == []
