"""`draftwire units`: what is rendered from which settings, and what installing into a tree does and leaves alone."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import SettingsError
from shared.settings import load_settings
from tools.units import (
    TARGET_SERVICES,
    Host,
    Parts,
    example_config,
    is_ours,
    is_stamped,
    parse_parts,
    render,
    stamp,
    unreadable,
)

ROOT = Path(__file__).resolve().parents[2]
EXEC = "/opt/draftwire/bin/draftwire"
SYSTEM = "etc/systemd/system"
FILES = {
    f"{SYSTEM}/draftwire.target",
    f"{SYSTEM}/draftwire-.service.d/10-common.conf",
    *(f"{SYSTEM}/draftwire-{name}.service" for name in TARGET_SERVICES),
    f"{SYSTEM}/draftwire-draft@.service",
    "etc/sysusers.d/draftwire.conf",
}
ALL = Parts(True, ("model",))
needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")


def rendered(*settings: str, parts: Parts = ALL) -> dict[str, str]:
    return render(Host(load_settings(None, settings, {}), Path(EXEC)), parts)


def unit(files: dict[str, str], name: str) -> str:
    return files[f"{SYSTEM}/{name}"]


def values(text: str, name: str) -> list[str]:
    """Every value that a unit's text gives a setting, in order."""
    return re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)


def units(*arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DRAFTWIRE_")}
    return subprocess.run(
        [sys.executable, "-m", "tools.cli", "units", *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONWARNINGS": "error"},
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def install(root: Path, *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    return units("install", *arguments, "--root", str(root), "--exec", EXEC, stdin=stdin)


def tree(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


# --- parts ------------------------------------------------------------------------------------------------------------


def test_parts_name_their_units() -> None:
    parts = parse_parts(["draft@a", "target", "draft@b-1", "draft@a"])
    assert parts == Parts(True, ("a", "b-1"))
    assert parts.units[0] == "draftwire.target"
    assert parts.units[-2:] == ["draftwire-draft@a.service", "draftwire-draft@b-1.service"]
    assert len(parts.units) == 1 + len(TARGET_SERVICES) + 2


@given(st.text(max_size=50))
def test_any_word_is_a_part_or_refused(word: str) -> None:
    """No word makes the name of a unit that systemd would read otherwise."""
    try:
        parts = parse_parts([word])
    except SettingsError:
        parts = Parts()
    assert not parts or parts.target or re.fullmatch(r"[A-Za-z0-9_-]{1,40}", parts.drafts[0])


# --- rendering --------------------------------------------------------------------------------------------------------


def test_rendering_leaves_nothing_open() -> None:
    """Every file is there, nothing of the templates' own language is left, and every file knows itself again."""
    for networked in ((), ('endpoints.drafts="tcp://127.0.0.1:7000"',)):
        files = rendered(*networked)
        assert set(files) == FILES
        for text in files.values():
            assert not re.search(r"@[A-Z_]+@|^#(if|else|endif)", text, re.MULTILINE)
            assert is_ours(text)


def test_services_run_the_executable_with_the_configuration() -> None:
    files = rendered()
    assert values(unit(files, "draftwire-router.service"), "ExecStart") == [
        f"{EXEC} service router --config /etc/draftwire/draftwire.toml"
    ]
    assert values(unit(files, "draftwire-draft@.service"), "ExecStart") == [
        f"{EXEC} service draft --instance %i --config /etc/draftwire/draftwire.toml"
    ]


def test_the_time_to_stop_follows_the_drain() -> None:
    """systemd kills 15 seconds after the drain has to be over."""
    common = unit(rendered("drain_s=42.5"), "draftwire-.service.d/10-common.conf")
    assert values(common, "TimeoutStopSec") == ["57.5"]


def test_a_service_gets_the_network_and_the_keys_only_with_an_endpoint_that_needs_them() -> None:
    local = rendered()
    for name in ("router", "tokenizer", "sampler", "verifier", "draft@"):
        text = unit(local, f"draftwire-{name}.service")
        assert values(text, "RestrictAddressFamilies") == ["AF_UNIX"]
        assert values(text, "IPAddressDeny") == ["any"]
        assert not values(text, "LoadCredential")
    networked = rendered('endpoints.drafts="tcp://127.0.0.1:7000"')
    for name, families in (("router", "AF_UNIX AF_INET AF_INET6 AF_NETLINK"), ("draft@", "AF_UNIX AF_INET AF_INET6")):
        text = unit(networked, f"draftwire-{name}.service")
        assert values(text, "RestrictAddressFamilies") == [families]
        assert not values(text, "IPAddressDeny")
        assert values(text, "LoadCredential") == ["host.key:/etc/draftwire/keys/host.key"]
        assert values(text, "SetCredential") == ["host.key:none"]
    for name in ("tokenizer", "sampler", "verifier", "gateway"):
        assert unit(networked, f"draftwire-{name}.service") == unit(local, f"draftwire-{name}.service")


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("verifier.engine.engine=cuda", ["draftwire-verifier.service"]),
        ("verifier.engine.n_gpu_layers=20", ["draftwire-verifier.service"]),
        ("draft.model.engine.engine=cuda", ["draftwire-draft@model.service"]),
        ("draft.model.drafter=ngram", []),
    ],
)
def test_what_computes_on_a_gpu_gets_it(setting: str, names: list[str]) -> None:
    """A drop-in opens the sandbox for those units, and for no other."""
    files = rendered(setting)
    found = {path: text for path, text in files.items() if path.endswith("gpu.conf")}
    assert list(found) == [f"{SYSTEM}/{name}.d/50-gpu.conf" for name in names]
    for text in found.values():
        assert values(text, "PrivateDevices") == ["no"]
        assert values(text, "MemoryDenyWriteExecute") == ["no"]


def test_what_cannot_stand_in_a_unit_is_refused() -> None:
    settings = load_settings(None, (), {})
    for bad in ("/opt/my draftwire/bin/draftwire", "/opt/%h/draftwire", "relative/draftwire", "/opt/$X"):
        with pytest.raises(SettingsError, match="cannot stand in a unit"):
            Host(settings, Path(bad))
    with pytest.raises(SettingsError, match="no name of a user"):
        Host(settings, Path(EXEC), user="Röt")
    for run_dir in ("/var/lib/draftwire", "/run", "/run/", "/run/../etc"):
        with pytest.raises(SettingsError, match="run_dir"):
            Host(load_settings(None, [f"run_dir={run_dir}"], {}), Path(EXEC))


def test_every_timeout_and_restart_is_there() -> None:
    """What a unit promises: it restarts whatever happens but bad settings, beats, and reloads."""
    files = rendered()
    common = unit(files, "draftwire-.service.d/10-common.conf")
    wanted = {"Type": "notify", "Restart": "always", "RestartPreventExitStatus": "78", "StartLimitIntervalSec": "0"}
    for name, value in wanted.items():
        assert values(common, name) == [value]
    assert values(common, "ExecReload") == ["/bin/kill -HUP $MAINPID"]
    for name in (*TARGET_SERVICES, "draft@"):
        text = unit(files, f"draftwire-{name}.service")
        assert values(text, "WatchdogSec")
        assert values(text, "WantedBy") == ["draftwire.target"]
        assert "Requires" not in text
        assert values(text, "SystemCallFilter")[0] == "@system-service", (
            "the first one decides that it is an allow list"
        )


@given(st.text(), st.text())
def test_a_changed_file_is_known_as_changed(text: str, more: str) -> None:
    """The checksum covers all that follows it."""
    text = text.replace("\r", "")
    assert is_ours(stamp(text))
    assert is_stamped(stamp(text))
    if more:
        assert not is_ours(stamp(text) + more)
    assert not is_ours(text)


# --- systemd's own opinion --------------------------------------------------------------------------------------------


def analyze(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments],
        cwd=folder,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:", "SYSTEMD_LOG_LEVEL": "warning"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(params=["local", "tcp", "gpu"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with the units for three kinds of settings."""
    config = tmp_path / "draftwire.toml"
    config.write_text(
        {
            "local": "",
            "tcp": "\n".join(
                ["[endpoints]", *(f'{name} = "tcp://127.0.0.1:7{i}00"' for i, name in enumerate(ENDPOINT_NAMES))]
            ),
            "gpu": '[verifier.engine]\nengine = "cuda"\n[draft.i.engine]\nengine = "cuda"\n',
        }[request.param]
    )
    # A program that exists: verify looks for it.
    ended = units("render", "--to", str(tmp_path / "units"), "--exec", "/bin/true", "--config", str(config))
    assert ended.returncode == 0, ended.stderr
    return tmp_path / "units"


ENDPOINT_NAMES = ("router", "drafts", "tokenizer", "sampler")


@needs_analyze
def test_systemd_accepts_every_unit(folder: Path) -> None:
    """`systemd-analyze verify` says nothing: no unknown setting, no missing unit, no cycle in the ordering."""
    names = [path.name for path in folder.glob("draftwire-*.service")]
    assert len(names) == len(TARGET_SERVICES) + 1
    verified = analyze(folder, "verify", *(f"./{name}" for name in (*names, "draftwire.target")))
    said = [line for line in verified.stderr.splitlines() if "nvidia" not in line]  # of machines without a driver
    assert said == []
    assert verified.returncode == 0 or "nvidia" in verified.stderr


@needs_analyze
@pytest.mark.parametrize("name", [*TARGET_SERVICES, "draft@"])
def test_the_sandbox_of_every_service_is_tight(folder: Path, name: str) -> None:
    """`systemd-analyze security` gives at most 2.0, also with a GPU, for which a service must keep more.

    Of a template it looks at an instance named "i".
    """
    if "offline" not in analyze(folder, "--help").stdout:
        pytest.skip("this systemd-analyze cannot look at files")
    ended = analyze(folder, "security", "--offline=true", "--threshold=20", f"./draftwire-{name}.service")
    assert ended.returncode == 0, ended.stdout + ended.stderr


# --- installing -------------------------------------------------------------------------------------------------------


def test_installing_writes_the_units_and_an_example_configuration(tmp_path: Path) -> None:
    ended = install(tmp_path, "target", "draft@model")
    assert ended.returncode == 0, ended.stderr
    files = tree(tmp_path)
    assert set(files) == {*FILES, "etc/draftwire/draftwire.toml"}
    assert files["etc/draftwire/draftwire.toml"] == example_config()
    assert load_settings(tmp_path / "etc/draftwire/draftwire.toml", (), {}).run_dir == "/run/draftwire"
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o644}


def test_installing_is_the_same_whatever_the_umask_is(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        install(tmp_path / "tree", "target")
    finally:
        os.umask(old)
    for path in (tmp_path / "tree").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_a_host_that_only_drafts_gets_no_other_services(tmp_path: Path) -> None:
    install(tmp_path, "draft@gpu0")
    assert {path.name for path in (tmp_path / SYSTEM).glob("*.service")} == {"draftwire-draft@.service"}


def test_installing_again_changes_nothing(tmp_path: Path) -> None:
    install(tmp_path, "target", "draft@model")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    ended = install(tmp_path, "target", "draft@model")
    assert ended.returncode == 0
    assert all(line.endswith(": unchanged") for line in ended.stdout.splitlines())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_configuration_is_never_overwritten(tmp_path: Path) -> None:
    config = tmp_path / "etc/draftwire/draftwire.toml"
    config.parent.mkdir(parents=True)
    config.write_text("drain_s = 99\n")
    install(tmp_path, "target", "--yes")
    assert config.read_text() == "drain_s = 99\n"
    common = (tmp_path / SYSTEM / "draftwire-.service.d/10-common.conf").read_text()
    assert values(common, "TimeoutStopSec") == ["114"]


def test_changed_settings_are_brought_in_by_installing_again(tmp_path: Path) -> None:
    """Without parts, what is installed is rendered anew; a drop-in that is not needed any more goes."""
    config = tmp_path / "etc/draftwire/draftwire.toml"
    config.parent.mkdir(parents=True)
    config.write_text('[verifier.engine]\nengine = "cuda"\n')
    install(tmp_path, "target")
    drop_in = tmp_path / SYSTEM / "draftwire-verifier.service.d/50-gpu.conf"
    assert drop_in.exists()
    config.write_text("drain_s = 1\n")
    ended = install(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert not drop_in.exists()
    assert f"{drop_in}: removed" in ended.stdout
    assert "10-common.conf: updated" in ended.stdout
    assert not (tmp_path / SYSTEM / "draftwire-draft@.service").exists()


def test_a_dry_run_shows_a_diff_and_changes_nothing(tmp_path: Path) -> None:
    install(tmp_path, "target")
    (tmp_path / "etc/draftwire/draftwire.toml").write_text("drain_s = 1\n")
    before = tree(tmp_path)
    ended = install(tmp_path, "--dry-run")
    assert ended.returncode == 0
    assert "\n-TimeoutStopSec=25\n+TimeoutStopSec=16\n" in ended.stdout
    assert "10-common.conf: would update" in ended.stdout
    assert tree(tmp_path) == before


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A tree in which somebody has changed the router's unit."""
    install(tmp_path, "target")
    router = tmp_path / SYSTEM / "draftwire-router.service"
    router.write_text(router.read_text() + "Nice=5\n")
    return tmp_path


def test_a_file_changed_by_hand_is_not_overwritten_unasked(changed: Path) -> None:
    """With nobody to ask, nothing at all is written, and the error names the file and --yes."""
    (changed / "etc/draftwire/draftwire.toml").write_text("drain_s = 1\n")
    before = tree(changed)
    for command in ("install", "uninstall"):
        options = ["--exec", EXEC] if command == "install" else []
        ended = units(command, "--root", str(changed), *options)
        assert ended.returncode == 1
        assert ended.stderr.count("\n") == 1
        assert "draftwire-router.service" in ended.stderr
        assert "--yes" in ended.stderr
        assert tree(changed) == before


@pytest.mark.parametrize(("answer", "overwritten"), [("y", True), ("n", False)])
def test_it_asks_before_overwriting_a_file_changed_by_hand(changed: Path, answer: str, overwritten: bool) -> None:
    """The question shows the difference; a file that is kept is kept, and one that is overwritten has a copy."""
    master, slave = pty.openpty()
    try:
        os.write(master, f"{answer}\n".encode())
        ended = install(changed, stdin=slave)
    finally:
        os.close(master)
        os.close(slave)
    assert ended.returncode == 0, ended.stderr
    assert "-Nice=5" in ended.stdout
    assert "was changed by hand" in ended.stdout
    router = changed / SYSTEM / "draftwire-router.service"
    assert ("Nice=5" in router.read_text()) is not overwritten
    copy = router.with_name(router.name + ".old")
    assert copy.exists() is overwritten
    assert not overwritten or "Nice=5" in copy.read_text()


def test_uninstalling_removes_what_was_installed_and_nothing_else(tmp_path: Path) -> None:
    install(tmp_path, "target", "draft@model")
    own = tmp_path / SYSTEM / "draftwire-router.service.d/override.conf"
    own.parent.mkdir()
    own.write_text("[Service]\nNice=1\n")
    other = tmp_path / SYSTEM / "draftwire-proxy.service"
    other.write_text("[Service]\nExecStart=/bin/true\n")
    dry = units("uninstall", "--dry-run", "--root", str(tmp_path))
    assert dry.stdout.count("would be removed") == len(FILES)
    ended = units("uninstall", "--root", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert set(tree(tmp_path)) == {
        "etc/draftwire/draftwire.toml",
        str(own.relative_to(tmp_path)),
        str(other.relative_to(tmp_path)),
    }
    assert "nothing is installed" in units("uninstall", "--root", str(tmp_path)).stdout
    assert units("uninstall", "--purge", "--yes", "--root", str(tmp_path)).returncode == 0
    assert not (tmp_path / "etc/draftwire").exists()


def test_a_host_without_parts_is_asked_for_them(tmp_path: Path) -> None:
    ended = install(tmp_path)
    assert ended.returncode == 78
    assert ended.stderr.startswith("draftwire: error: no units are installed here yet (say what this host runs: target")
    assert tree(tmp_path) == {}


@pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="systemd runs this machine")
def test_without_systemd_installing_says_so() -> None:
    ended = units("install", "target", "--exec", EXEC)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "systemd does not run this machine" in ended.stderr
    assert "draftwire up" in ended.stderr


# --- what a user may read ---------------------------------------------------------------------------------------------


def test_a_path_that_the_user_may_not_enter_is_named(tmp_path: Path) -> None:
    """Of a file in a private directory, the directory; also behind a symbolic link."""
    private, public = tmp_path / "private", tmp_path / "public"
    for folder, mode in ((tmp_path, 0o755), (private, 0o700), (public, 0o755)):
        folder.mkdir(exist_ok=True)
        folder.chmod(mode)
    for path in (private / "model", public / "model", public / "secret"):
        path.write_text("")
        path.chmod(0o644)
    (public / "secret").chmod(0o600)
    (public / "link").symlink_to(private / "model")
    outer = unreadable(tmp_path, "no-such-user")  # of pytest itself: its directory is the user's own
    expected = {
        "private/model": private,
        "public/model": None,
        "public/secret": public / "secret",
        "public/link": private,
    }
    for name, part in expected.items():
        assert unreadable(tmp_path / name, "no-such-user") == (outer or part)
