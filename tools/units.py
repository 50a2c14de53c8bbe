"""The systemd units of a host: rendered from the templates in deploy/systemd, compared with what is there, written.

What depends on the settings (the time to stop, whether a service needs the network, the keys or a GPU) is rendered in,
so that `units install` is run again when those change.

Invariants: a file that somebody has changed by hand, recognised by the checksum in its first line, is neither written
nor removed unless the caller says so; the configuration file is never overwritten.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import pwd
import re
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.engine.interface import EngineSettings
from shared.errors import DraftwireError, SettingsError
from shared.files import make_directory, replace_file
from shared.settings import CONFIG_PATH, Settings, load_settings

SYSTEM = "etc/systemd/system"
SYSUSERS = "etc/sysusers.d/draftwire.conf"
TARGET = "draftwire.target"
COMMON = "draftwire-.service.d/10-common.conf"
GPU = "50-gpu.conf"
TARGET_SERVICES = ("gateway", "tokenizer", "router", "verifier", "sampler")
STOP_MARGIN_S = 15
"""On top of the drain: to end threads and to free an engine."""
ENDPOINTS = {
    "gateway": ("router", "tokenizer"),
    "tokenizer": ("tokenizer",),
    "router": ("router", "drafts"),
    "verifier": ("router", "sampler"),
    "sampler": ("sampler",),
    "draft": ("drafts",),
}
"""Which endpoints a service binds or connects to."""

_MARK = re.compile(r"# draftwire-units sha256:([0-9a-f]{64})\n")
_NOTE = "# Made by `draftwire units`. Changes belong into a drop-in: systemctl edit UNIT.\n"
_SAFE_PATH = re.compile(r"/[\w./+@:=,-]+", re.ASCII)
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
_INSTANCE = re.compile(r"[A-Za-z0-9_-]{1,40}")
_VARIABLE = re.compile(r"@[A-Z_]+@")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a host runs. target: gateway, tokenizer, router, verifier and sampler. drafts: names of draft workers."""

    target: bool = False
    drafts: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.target or bool(self.drafts)

    def __or__(self, other: Parts) -> Parts:
        return Parts(self.target or other.target, tuple(dict.fromkeys((*self.drafts, *other.drafts))))

    @property
    def services(self) -> list[str]:
        """The units of its services."""
        names = [f"draftwire-{name}.service" for name in TARGET_SERVICES] if self.target else []
        return names + [f"draftwire-draft@{name}.service" for name in self.drafts]

    @property
    def units(self) -> list[str]:
        return [TARGET, *self.services]


def parse_parts(words: Iterable[str]) -> Parts:
    """ "target" and "draft@NAME". Errors: `SettingsError`."""
    parts = Parts()
    for word in words:
        kind, _, name = word.partition("@")
        if word == "target":
            parts |= Parts(target=True)
        elif kind == "draft" and _INSTANCE.fullmatch(name):
            parts |= Parts(drafts=(name,))
        else:
            raise SettingsError(f"there is no part {word!r}", "target, or draft@NAME for the table [draft.NAME]")
    return parts


@dataclass(frozen=True, slots=True)
class Host:
    """What units are rendered for. executable: the `draftwire` that they run. config: the file that it reads."""

    settings: Settings
    executable: Path
    config: Path = CONFIG_PATH
    user: str = "draftwire"

    def __post_init__(self) -> None:
        keys = self.settings.network.key_path
        paths = ("the executable", self.executable), ("the configuration file", self.config), ("network.keys", keys)
        for what, path in paths:
            if not _SAFE_PATH.fullmatch(str(path)):
                raise SettingsError(
                    f"{what} {str(path)!r} cannot stand in a unit",
                    "an absolute path of letters, digits and ./+@:=,_- is needed",
                )
        if not _USER.fullmatch(self.user):
            raise SettingsError(f"{self.user!r} is no name of a user", "lower-case letters, digits, '_' and '-'")
        self.run_directory  # noqa: B018 (checked here rather than halfway through)

    @property
    def run_directory(self) -> str:
        """RuntimeDirectory=: where the sockets are, below /run."""
        run_dir = self.settings.run_dir or "/run/draftwire"
        inside = run_dir.removeprefix("/run/").strip("/")
        if not run_dir.startswith("/run/") or not inside or not _SAFE_PATH.fullmatch(run_dir) or ".." in run_dir:
            raise SettingsError(
                f"run_dir is {run_dir}, which systemd cannot make for the services", "a directory below /run"
            )
        return inside

    def networked(self, service: str) -> bool:
        """Whether one of a service's own endpoints is not a socket file."""
        return any(getattr(self.settings.endpoints, name).startswith("tcp://") for name in ENDPOINTS[service])


def settings_for(config: Path, root: Path = Path("/")) -> tuple[Settings, bool]:
    """What the services will read, and whether the file is there; without it the defaults.

    The environment of this process is none of theirs.
    """
    path = under(root, config)
    return (load_settings(path, (), {}), True) if path.exists() else (Settings(), False)


def default_executable() -> Path:
    """The `draftwire` beside the Python that runs this. Errors: `SettingsError` when there is none."""
    path = Path(sys.executable).parent / "draftwire"
    if not path.exists():
        raise SettingsError(f"there is no {path}", "give --exec PATH, the draftwire that the units are to run")
    return path


def under(root: Path, path: Path | str) -> Path:
    """A path of the host in the tree at `root`."""
    return root / str(path).lstrip("/")


# --- rendering --------------------------------------------------------------------------------------------------------


def _templates() -> Path:
    installed = Path(__file__).parent / "systemd_units"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[1] / "deploy" / "systemd"


def example_config() -> str:
    """A configuration to start from: the example's text, with the units' run directory."""
    for path in (_templates() / "draftwire.example.toml", _templates().parent / "draftwire.example.toml"):
        if path.exists():
            return path.read_text("utf-8").replace("# run_dir = ", "run_dir = ", 1)
    raise DraftwireError("the example configuration is not part of this installation", "install Draftwire again")


def render(host: Host, parts: Parts) -> dict[str, str]:
    """The files for a host, by their path below the root directory."""
    units = {TARGET: "target", COMMON: ""}
    if parts.target:
        units |= {f"draftwire-{name}.service": name for name in TARGET_SERVICES}
    if parts.drafts:
        units["draftwire-draft@.service"] = "draft"
    files = {f"{SYSTEM}/{name}": _render(host, name, service) for name, service in units.items()}
    gpu_units = [f"draftwire-draft@{name}.service" for name in parts.drafts if _draft_needs_gpu(host.settings, name)]
    if parts.target and needs_gpu(host.settings.verifier.engine):
        gpu_units.insert(0, "draftwire-verifier.service")
    for unit in gpu_units:
        files[f"{SYSTEM}/{unit}.d/{GPU}"] = _render(host, "gpu.conf", "")
    files[SYSUSERS] = _render(host, "draftwire.sysusers.conf", "")
    return files


def needs_gpu(engine: EngineSettings) -> bool:
    """Whether an engine computes on a GPU, so that its unit must not hide it."""
    return engine.computing == "cuda" or engine.n_gpu_layers > 0


def _draft_needs_gpu(settings: Settings, name: str) -> bool:
    draft = settings.draft.get(name)
    return draft is not None and draft.drafter == "model" and needs_gpu(draft.engine)


def _render(host: Host, name: str, service: str) -> str:
    text = (_templates() / name).read_text("utf-8")
    drain_s = host.settings.drain_s
    values = {
        "@EXEC@": str(host.executable),
        "@CONFIG@": str(host.config),
        "@KEYS@": str(host.settings.network.key_path),
        "@USER@": host.user,
        "@RUN@": host.run_directory,
        "@DRAIN@": f"{drain_s:g}",
        "@STOP@": f"{drain_s + STOP_MARGIN_S:g}",
    }
    text = _choose(text, service in ENDPOINTS and host.networked(service))
    return stamp(_VARIABLE.sub(lambda match: values[match[0]], text))


def _choose(text: str, networked: bool) -> str:
    """A template's lines without those between `#if network`, `#else` and `#endif` that do not hold."""
    lines: list[str] = []
    shown = True
    for line in text.splitlines(keepends=True):
        if line == "#if network\n":
            shown = networked
        elif line == "#else\n":
            shown = not networked
        elif line == "#endif\n":
            shown = True
        elif shown:
            lines.append(line)
    return "".join(lines)


def stamp(text: str) -> str:
    """A text with the line in front by which `is_ours` knows it again."""
    body = _NOTE + "\n" + text
    return f"# draftwire-units sha256:{hashlib.sha256(body.encode()).hexdigest()}\n{body}"


def is_stamped(text: str) -> bool:
    """Whether `draftwire units` made this file, perhaps changed since."""
    return _MARK.match(text) is not None


def is_ours(text: str) -> bool:
    """Whether a file is as `draftwire units` made it."""
    match = _MARK.match(text)
    return match is not None and hashlib.sha256(text[match.end() :].encode()).hexdigest() == match[1]


# --- what is there, and what is to be done ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """A file to write or to remove. touched: somebody changed it by hand, or it is not ours at all."""

    path: Path
    kind: Literal["create", "update", "remove", "unchanged"]
    old: str = ""
    new: str = ""
    touched: bool = False

    def diff(self) -> str:
        before, after = (str(self.path) if text else "/dev/null" for text in (self.old, self.new))
        lines = difflib.unified_diff(self.old.splitlines(True), self.new.splitlines(True), before, after)
        return "".join(line if line.endswith("\n") else line + "\n" for line in lines)

    def apply(self) -> None:
        """Do it. A file that was changed by hand is kept beside it, as FILE.old, which systemd does not read."""
        try:
            if self.touched:
                _write(self.path.with_name(self.path.name + ".old"), self.old)
            if self.kind == "remove":
                self.path.unlink(missing_ok=True)
            elif self.kind != "unchanged":
                _write(self.path, self.new)
        except OSError as error:
            raise DraftwireError(
                f"cannot write {self.path}: {error.strerror}", "is the file system read-only?"
            ) from None


def plan_install(root: Path, host: Host, parts: Parts) -> list[Change]:
    """What makes the tree at `root` hold the units of these parts; ours that no part needs any more are removed."""
    files = {under(root, path): text for path, text in render(host, parts).items()}
    changes = [_compare(path, text) for path, text in files.items()]
    stale = [path for path in _stamped_files(root) if path not in files and path.name == GPU]
    return changes + [_removal(path) for path in stale]


def plan_uninstall(root: Path) -> list[Change]:
    """The removal of every file that `plan_install` has ever made in the tree at `root`."""
    return [_removal(path) for path in _stamped_files(root)]


def installed_parts(root: Path) -> Parts:
    """The parts whose units are in the tree at `root`; of draft workers those that are enabled."""
    system = under(root, SYSTEM)
    drafts = [
        path.name.removeprefix("draftwire-draft@").removesuffix(".service")
        for path in sorted((system / f"{TARGET}.wants").glob("draftwire-draft@*.service"))
    ]
    return Parts((system / "draftwire-router.service").exists(), tuple(drafts))


def enabled_units(root: Path) -> set[str]:
    """Which of our units are started at boot."""
    system = under(root, SYSTEM)
    found = {path.name for path in (system / f"{TARGET}.wants").glob("draftwire-*")}
    return found | {path.name for path in (system / "multi-user.target.wants").glob(TARGET)}


def _compare(path: Path, new: str) -> Change:
    old = _read(path)
    if old is None:
        return Change(path, "create", "", new)
    return Change(path, "unchanged", old, new) if old == new else Change(path, "update", old, new, not is_ours(old))


def _removal(path: Path) -> Change:
    old = _read(path) or ""
    return Change(path, "remove", old, "", not is_ours(old))


def _stamped_files(root: Path) -> list[Path]:
    system = under(root, SYSTEM)
    patterns = (TARGET, "draftwire-*.service", "draftwire-*.service.d/*.conf")
    found = [path for pattern in patterns for path in sorted(system.glob(pattern))]
    return [path for path in (*found, under(root, SYSUSERS)) if is_stamped(_read(path) or "")]


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DraftwireError(f"cannot read {path}: {error.strerror}") from None


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and readable by everybody, as systemd wants units to be."""
    make_directory(path.parent)
    replace_file(path, text, 0o644)


def write_example_config(root: Path, config: Path) -> bool:
    """Make a configuration file where there is none; whether one was made."""
    path = under(root, config)
    if path.exists():
        return False
    try:
        _write(path, example_config())
    except OSError as error:
        raise DraftwireError(f"cannot write {path}: {error.strerror}") from None
    return True


# --- what the units' user may read ------------------------------------------------------------------------------------


def unreadable(path: Path, user: str) -> Path | None:
    """The first part of a path that a user may not read or enter, by its owner and mode; None when there is none."""
    try:
        entry = pwd.getpwnam(user)
        uid, groups = entry.pw_uid, set(os.getgrouplist(user, entry.pw_gid))
    except KeyError:
        uid, groups = -1, set()
    for part in dict.fromkeys((*_with_parents(path.absolute()), *_with_parents(path.resolve()))):
        try:
            info = part.stat()
        except PermissionError:
            return part.parent
        except OSError:
            return None  # it does not exist, which is for others to say
        wanted = stat.S_IXOTH if stat.S_ISDIR(info.st_mode) else stat.S_IROTH
        shift = 6 if info.st_uid == uid else 3 if info.st_gid in groups else 0
        if not info.st_mode & (wanted << shift):
            return part
    return None


def _with_parents(path: Path) -> list[Path]:
    return [*reversed(path.parents), path]


def access_problems(host: Host, parts: Parts) -> Iterator[tuple[str, str]]:
    """What the units' user could not read, with a remedy."""
    python = host.executable.parent / "python"
    programs = [host.executable, *([python] if python.exists() else [])]
    for program in programs:
        hidden = _hidden(program, host.user)
        if hidden:
            yield (
                f"{program} cannot be run by the user {host.user}: {hidden}",
                "install it under /opt, with a Python that is readable too: /usr/bin/python3 -m venv /opt/draftwire",
            )
            break
    engines = {"verifier": host.settings.verifier.engine} if parts.target else {}
    for name in parts.drafts:
        draft = host.settings.draft.get(name)
        if draft is not None and draft.drafter == "model":
            engines[f"draft {name}"] = draft.engine
    for service, engine in engines.items():
        if engine.model.startswith("/") and (hidden := _hidden(Path(engine.model), host.user)):
            yield f"the model of {service} cannot be read by the user {host.user}: {hidden}", "chmod or move it"


def _hidden(path: Path, user: str) -> str:
    if path.resolve().parts[1:2] == ("tmp",) or path.resolve().parts[1:3] == ("var", "tmp"):
        return f"{path} is in a directory for temporary files, of which a service has its own"
    part = unreadable(path, user)
    return f"it may not {'enter' if part.is_dir() else 'read'} {part}" if part else ""


# --- systemd ----------------------------------------------------------------------------------------------------------


def systemd_runs() -> bool:
    """Whether systemd is this machine's manager, as sd_booted(3) finds out."""
    return Path("/run/systemd/system").is_dir()


def call(*command: str) -> None:
    """Run one of systemd's programs. Errors: `DraftwireError` with what it said."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DraftwireError(f"there is no {command[0]}", "is this a machine with systemd?") from None
    if ended.returncode != 0:
        said = " ".join((ended.stderr or ended.stdout).split())[-500:]
        raise DraftwireError(f"{' '.join(command)} failed: {said or f'exit status {ended.returncode}'}")


def make_user(user: str, config: Path) -> None:
    """The units' user, if there is none; what root makes beside the configuration is then its group's to read."""
    try:
        pwd.getpwnam(user)
    except KeyError:
        call("systemd-sysusers", f"/{SYSUSERS}")
    if config.parent == CONFIG_PATH.parent and config.parent.stat().st_gid == 0:
        os.chown(config.parent, -1, pwd.getpwnam(user).pw_gid)


def activate(changed: bool, parts: Parts) -> list[str]:
    """Make systemd know the files and start the parts at boot; returns what was newly enabled."""
    if changed:
        call("systemctl", "daemon-reload")
    missing = [unit for unit in parts.units if unit not in enabled_units(Path("/"))]
    if missing:
        call("systemctl", "enable", "--quiet", *missing)
    return missing


def deactivate(units: Sequence[str]) -> None:
    """Stop everything of ours, and start it no more at boot."""
    call("systemctl", "stop", TARGET, "draftwire-*.service")
    if units:
        call("systemctl", "disable", "--quiet", *units)
