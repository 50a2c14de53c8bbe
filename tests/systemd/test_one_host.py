"""One host, systemd as PID 1: installed from the wheel, run as units, killed, drained, hung.

Greedy decoding of a NumPy target, so that every text can be compared with plain decoding's to the bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.fleet import Completion
from tests.systemd.containers import Host, Rig, until
from tests.systemd.generations import SERVICES, Running, complete, serves, wait_drafting

pytestmark = pytest.mark.timeout(900)

CONFIG = "/etc/draftwire/draftwire.toml"
DRAIN_S = 10.0
SETTINGS = f"""
run_dir = "/run/draftwire"
drain_s = {DRAIN_S}

[verifier]
n_max = 8

[verifier.engine]
engine = "numpy"
n_ctx = 512

[draft.model]
[draft.model.engine]
threads = 1
n_ctx = 512
"""
DRAFT = "draftwire-draft@model.service"
GATEWAY = "draftwire-gateway.service"
FIELD_PIPELINES = (
    r'(?<=draft_n\\":)[0-9]+.*n_accepted\\":[0-9]+',
    r'(?<=predicted_per_second\\":)[0-9.]+',
)
"""What scripts of llama.cpp's users grep a log for: proposed and accepted, and tokens/s."""
UNITS = [*(f"draftwire-{name}.service" for name in SERVICES), DRAFT]


@pytest.fixture(scope="module")
def host(rig: Rig) -> Host:
    """A host with the target and one draft worker, started."""
    host = rig.host("alpha")
    host.write(CONFIG, SETTINGS)
    host.draftwire("units", "install", "target", "draft@model")
    host.systemctl("start", "draftwire.target")
    return host


@pytest.fixture(scope="module")
def plain(host: Host) -> Completion:
    """What the target says by itself."""
    until(lambda: serves(host), "the gateway to serve")
    return complete(host, draft="none")


@pytest.fixture
def ready(host: Host, plain: Completion) -> Host:
    """The host, when everything runs and the draft worker drafts."""
    host.systemctl("start", "draftwire.target")
    host.wait_active(*UNITS)
    until(lambda: serves(host), "the gateway to serve")
    assert wait_drafting(host, "model").text == plain.text
    return host


@pytest.fixture
def other_settings(ready: Host) -> Iterator[Host]:
    """A host whose settings and drop-ins a test may change; they are put back at the end."""
    yield ready
    ready.write(CONFIG, SETTINGS)
    ready.run("rm", "-rf", "/etc/systemd/system/draftwire-verifier.service.d")
    ready.systemctl("daemon-reload")
    ready.systemctl("restart", "draftwire.target")


def kill(host: Host, unit: str) -> None:
    host.systemctl("kill", "--signal=KILL", unit)


def wait_restarted(host: Host, unit: str, before: int) -> None:
    """Wait until another process of a unit is ready."""

    def restarted() -> bool:
        return host.show(unit, "ActiveState") == "active" and host.main_pid(unit) not in (0, before)

    until(restarted, f"{unit} to come back")


def wait_stopped(host: Host) -> None:
    """Wait until every service has ended, which `systemctl stop` of a target does not; none had to be killed."""
    until(
        lambda: {host.show(unit, "ActiveState") for unit in UNITS} == {"inactive"}, "all services to stop", DRAIN_S + 15
    )
    assert {host.show(unit, "Result") for unit in UNITS} == {"success"}


def test_the_target_starts_ready(host: Host) -> None:
    """`systemctl start draftwire.target` returns when every service has said that it is ready."""
    assert [host.show(unit, "ActiveState") for unit in UNITS] == ["active"] * len(UNITS)
    assert {host.show(unit, "Type") for unit in UNITS} == {"notify"}
    until(lambda: serves(host), "the gateway to serve", 10)


def test_services_run_as_their_user_without_privileges(host: Host) -> None:
    """Every process is the user draftwire's and has no capability, and the run directory is closed to others."""
    for unit in UNITS:
        status = dict(
            line.split(":", 1) for line in host.run("cat", f"/proc/{host.main_pid(unit)}/status").stdout.splitlines()
        )
        uid = host.run("id", "-u", "draftwire").stdout.strip()
        assert set(status["Uid"].split()) == {uid}
        assert status["CapBnd"].strip("\t0") == status["CapEff"].strip("\t0") == ""
        assert status["NoNewPrivs"].strip() == "1"
        assert status["Seccomp"].strip() == "2"
    assert host.run("stat", "-c", "%U %a", "/run/draftwire").stdout.split() == ["draftwire", "700"]
    assert host.run("stat", "-c", "%G %a", "/etc/draftwire").stdout.split() == ["draftwire", "755"]


def test_installing_again_changes_nothing(host: Host) -> None:
    """A second `units install`, with or without the parts, reports everything as unchanged and leaves all running."""
    before = [host.main_pid(unit) for unit in UNITS]
    for words in (("target", "draft@model"), ()):
        lines = host.draftwire("units", "install", *words).stdout.splitlines()
        assert len(lines) > 9
        assert all(line.endswith(": unchanged") for line in lines)
    assert [host.main_pid(unit) for unit in UNITS] == before


def test_installing_needs_root_and_says_how(host: Host) -> None:
    """Anybody may look what would change; to do it, the line to type is given."""
    as_nobody = ("runuser", "-u", "nobody", "--", "/opt/draftwire/bin/draftwire", "units", "install")
    assert host.run(*as_nobody, "--dry-run").stdout.count(": unchanged") > 8
    ended = host.run(*as_nobody, "draft@model", check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip() == (
        "draftwire: error: units install needs root (sudo /opt/draftwire/bin/draftwire units install draft@model)"
    )


def test_speculation_gives_the_text_of_plain_decoding(ready: Host, plain: Completion) -> None:
    drafted = complete(ready, draft="model")
    assert drafted.tokens == plain.tokens
    assert drafted.final["timings"]["draft_n"] > 0


def test_a_killed_draft_worker_changes_no_token(ready: Host, plain: Completion) -> None:
    """A generation whose draft worker is killed goes on to the same text, and the worker comes back by itself."""
    before = ready.main_pid(DRAFT)
    running = Running(ready, draft="auto")
    running.reaches(4)
    kill(ready, DRAFT)
    running.end()
    assert running.completion is not None, running.error
    assert running.completion.tokens == plain.tokens
    wait_restarted(ready, DRAFT, before)
    assert wait_drafting(ready, "model").tokens == plain.tokens


@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_service_comes_back(ready: Host, plain: Completion, service: str) -> None:
    """A generation during which a service is killed has its text, or ends with one clear error; the next ones work."""
    unit = f"draftwire-{service}.service"
    before = ready.main_pid(unit)
    running = Running(ready)
    running.reaches(4)
    kill(ready, unit)
    running.end()
    if service in ("gateway", "router", "verifier"):
        assert running.error is not None
    if running.error is not None:
        assert running.error.message
        assert "Traceback" not in str(running.error)
    else:
        assert running.completion is not None
        assert running.completion.tokens == plain.tokens
    wait_restarted(ready, unit, before)
    until(lambda: serves(ready), "the gateway to serve")
    assert complete(ready).tokens == plain.tokens


def test_reload_changes_what_can_change_live(other_settings: Host) -> None:
    """`systemctl reload` keeps the processes, and each says what has changed; systemctl shows what they say they do."""
    host = other_settings
    before = [host.main_pid(unit) for unit in UNITS]
    host.write(f"{CONFIG}.d/50-log.toml", 'log_level = "debug"\n')
    host.systemctl("reload", *UNITS)
    for unit in UNITS:

        def reloaded(unit: str = unit) -> bool:
            return any(e["event"] == "reloaded" and e["changed"] == ["log_level"] for e in host.events(unit))

        until(reloaded, f"{unit} to reload")
        assert host.show(unit, "StatusText")
    assert [host.main_pid(unit) for unit in UNITS] == before
    host.run("rm", f"{CONFIG}.d/50-log.toml")


def test_failures_in_a_row_wait_longer(ready: Host) -> None:
    """The back-off grows with each failure, and a stop that goes well forgets it."""
    ready.systemctl("restart", DRAFT)
    waits: list[str] = []
    for _ in range(3):
        before = ready.main_pid(DRAFT)
        kill(ready, DRAFT)
        wait_restarted(ready, DRAFT, before)
        waits.append(ready.run("cat", "/run/draftwire/draftwire-draft@model.backoff").stdout.strip())
    assert waits == ["0", "1", "2"]
    ready.systemctl("restart", DRAFT)
    assert (
        ready.run("ls", "/run/draftwire").stdout.count("backoff") == 0
        or "draft@model.backoff" not in ready.run("ls", "/run/draftwire").stdout
    )


def test_stop_lets_a_generation_end(ready: Host, plain: Completion) -> None:
    """A generation that runs when the target is stopped gets its whole text; then everything has ended well."""
    running = Running(ready)
    running.reaches(4)
    ready.systemctl("stop", "draftwire.target")
    running.end()
    assert running.completion is not None, running.error
    assert running.completion.tokens == plain.tokens
    wait_stopped(ready)


def test_stop_ends_a_long_generation_in_time(ready: Host) -> None:
    """A generation longer than the drain ends with a clear error, and nothing has to be killed."""
    running = Running(ready, n_predict=450, draft="none")
    running.reaches(4)
    ready.systemctl("stop", "draftwire.target")
    running.end()
    wait_stopped(ready)
    if running.error is None:  # a machine that was fast enough
        assert running.completion is not None
        assert len(running.completion.tokens) == 450


def test_a_hung_engine_is_killed_by_the_watchdog(other_settings: Host) -> None:
    """An engine thread that does not return stops the beat: systemd ends the process, says where, starts it again."""
    host = other_settings
    unit = "draftwire-verifier.service"
    pace = "{ first_row_ms = 1, further_row_ms = 1, prefill_per_second = 0.001 }"  # a prompt of 10 tokens: 3 hours
    hangs = f'engine = "emulated"\ninner = "numpy"\npace = {pace}'
    host.write(CONFIG, SETTINGS.replace('engine = "numpy"', hangs))
    host.write(f"/etc/systemd/system/{unit}.d/watchdog.conf", "[Service]\nWatchdogSec=5\n")
    host.systemctl("daemon-reload")
    host.systemctl("restart", unit)
    until(lambda: serves(host), "the gateway to serve")
    before = host.main_pid(unit)
    running = Running(host, draft="none")
    wait_restarted(host, unit, before)
    running.end()
    assert running.error is not None
    messages = [str(entry.get("MESSAGE")) for entry in host.journal(unit)]
    assert any("Watchdog timeout" in message for message in messages)
    assert any("emulated.py" in message for message in messages), "no stack of the engine thread in the journal"


def test_bad_settings_end_a_service_once(other_settings: Host) -> None:
    """Exit status 78 is not tried again; after the file is put right, a start is enough."""
    host = other_settings
    unit = "draftwire-verifier.service"
    host.write(CONFIG, SETTINGS.replace("n_max = 8", "n_max = 8000"))
    host.run("systemctl", "restart", unit, check=False)
    until(lambda: host.show(unit, "ActiveState") == "failed", "the verifier to fail")
    assert host.show(unit, "ExecMainStatus") == "78"
    assert host.show(unit, "NRestarts") == "0"
    assert any("n_max" in str(entry.get("MESSAGE")) for entry in host.journal(unit)[-20:])
    host.write(CONFIG, SETTINGS)
    host.systemctl("start", unit)
    host.wait_active(unit)


def test_units_made_from_other_settings_say_so(other_settings: Host) -> None:
    """A service whose sandbox has no network, and whose settings want one now, names the command that helps."""
    host = other_settings
    unit = "draftwire-sampler.service"
    host.write(CONFIG, SETTINGS + '\n[endpoints]\nsampler = "tcp://127.0.0.1:7013"\n')
    host.run("systemctl", "restart", unit, check=False)
    until(lambda: host.show(unit, "ActiveState") == "failed", "the sampler to be refused")
    assert host.show(unit, "ExecMainStatus") == "78"
    assert any("draftwire units install" in str(entry.get("MESSAGE")) for entry in host.journal(unit)[-20:])
    host.draftwire("units", "install")
    host.systemctl("restart", unit, "draftwire-verifier.service")
    host.wait_active(unit)
    until(lambda: serves(host), "the gateway to serve")
    host.write(CONFIG, SETTINGS)
    host.draftwire("units", "install")


def test_the_journal_tells_what_speculation_gained(ready: Host, tmp_path: Path) -> None:
    """Report and plot from journald's own entries, the pipelines of the field, and fields to select by, agree."""
    host = ready
    drafted = [complete(host) for _ in range(3)]
    finals = [completion.final["timings"] for completion in drafted]
    session = drafted[-1].final["draftwire"]["session"]
    until(
        lambda: any(e["event"] == "request_done" and e["session"] == session for e in host.events(GATEWAY)),
        "the last request to be logged",
    )
    entries = [
        json.loads(line)
        for line in host.run(
            "journalctl", f"SESSION={session}", "EVENT=request_done", "--output=json"
        ).stdout.splitlines()
    ]
    assert [(e["SYSLOG_IDENTIFIER"], e["PRIORITY"], e["WORKER"]) for e in entries] == [
        ("draftwire-gateway", "6", "model")
    ]
    assert entries[0]["_SYSTEMD_UNIT"] == GATEWAY

    report = json.loads(host.draftwire("journal", "report", "--json").stdout)
    proposed, accepted, speeds = [], [], []
    for found in (
        host.run("sh", "-c", f"journalctl -u draftwire-gateway -o cat | grep -Po '{pattern}'").stdout.splitlines()
        for pattern in FIELD_PIPELINES
    ):
        if "n_accepted" in found[0]:
            proposed = [int(line.partition(",")[0]) for line in found]
            accepted = [int(line.rpartition(":")[2]) for line in found]
        else:
            speeds = [float(line) for line in found]
    configurations = report["configurations"]
    assert sum(c["draft_n"] for c in configurations) == sum(proposed) > 0
    assert sum(c["draft_n_accepted"] for c in configurations) == sum(accepted) > 0
    of_speed = [c["tokens_per_second"] for c in configurations if c["tokens_per_second"]["n"]]
    positive = [speed for speed in speeds if speed > 0]
    assert sum(c["n"] for c in of_speed) == len(positive)
    assert sum(c["n"] * c["mean"] for c in of_speed) == pytest.approx(sum(positive), rel=1e-6)
    assert {timing["predicted_per_second"] for timing in finals} <= set(speeds)

    assert "accepted" in host.draftwire("journal", "plot").stdout
    export = tmp_path / "export.jsonl"
    export.write_text(host.run("journalctl", "-u", "draftwire-gateway", "--output=json", "--all").stdout)
    subprocess.run(
        [sys.executable, "-m", "tools.cli", "journal", "plot", "--file", str(export), "-o", str(tmp_path / "plot")],
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_status_sees_all_services(ready: Host) -> None:
    """As an administrator, from the host's own configuration: exit status 0, 1 with a worker stopped, 0 again."""
    assert ready.draftwire("status").stdout.startswith("ok")
    ready.systemctl("stop", DRAFT)
    degraded = ready.draftwire("status", check=False)
    assert degraded.returncode == 1
    assert "model" in degraded.stdout.splitlines()[0]
    ready.systemctl("start", DRAFT)
    until(lambda: ready.draftwire("status", check=False).returncode == 0, "the worker to be seen again")


def test_units_verify_and_are_confined(host: Host, figures: list[str]) -> None:
    """`systemd-analyze verify` finds nothing, and `security` at most 2.0 for each service."""
    verified = host.run(
        "sh", "-c", "cd /etc/systemd/system && systemd-analyze verify draftwire*.service draftwire.target 2>&1"
    )
    assert verified.stdout == ""
    for unit in UNITS:
        lines = host.run("systemd-analyze", "security", "--no-pager", unit).stdout.splitlines()
        level = next(line for line in lines if "Overall exposure level" in line)
        figures.append(level.strip("→ "))
        assert float(level.split(": ")[1].split()[0]) <= 2.0


def test_the_host_serves_again_after_a_reboot(ready: Host, plain: Completion) -> None:
    """Enabled units start at boot, without anybody waiting for them."""
    ready.reboot()
    ready.wait_active(*UNITS)
    until(lambda: serves(ready), "the gateway to serve")
    assert wait_drafting(ready, "model").tokens == plain.tokens


def test_uninstall_leaves_what_is_the_administrators(ready: Host) -> None:
    """The services end and their units go; settings and drop-ins of the administrator's own stay."""
    override = "/etc/systemd/system/draftwire-router.service.d/override.conf"
    ready.write(override, "[Service]\nNice=1\n")
    ready.draftwire("units", "uninstall")
    assert ready.run("systemctl", "is-active", *UNITS, check=False).stdout.split() == ["inactive"] * len(UNITS)
    left = ready.run("find", "/etc/systemd/system", "-name", "draftwire*").stdout.split()
    assert left == ["/etc/systemd/system/draftwire-router.service.d"]
    assert ready.read(override) == "[Service]\nNice=1\n"
    assert ready.read(CONFIG) == SETTINGS
