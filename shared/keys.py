"""The keys of a host: its own CURVE key pair, and the public keys of others with what each may do.

A key directory holds `host.key`, which is secret, and `authorized.toml`. Public and secret keys are the 32 bytes of
CurveZMQ (Curve25519), written as 64 hexadecimal digits, which no shell and no TOML file minds. Under systemd the
secret comes from $CREDENTIALS_DIRECTORY/host.key instead, so that only root need be able to read it on disk.

Invariant: what is returned is complete and well-formed; what is written replaces the old file whole or not at all.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, cast, get_args

import zmq
from zmq.utils import z85

from shared.errors import SettingsError
from shared.files import make_directory, replace_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KeyRole = Literal["draft", "verifier", "gateway", "operator", "server"]
"""What a key may do. The first four connect here as such; a "server" is who TCP endpoints of others lead to."""
ROLES: tuple[KeyRole, ...] = get_args(KeyRole)

HOST_KEY = "host.key"
NO_CREDENTIAL = "none"
"""What the units hand over as `host.key` where the host has none: systemd cannot leave a credential away."""
AUTHORIZED = "authorized.toml"

_PUBLIC = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TIME = re.compile(r"[0-9T:.+Z-]{0,40}")
_FIELDS = {"name": str, "public": str, "roles": list, "added": str, "revoked": str}


@dataclass(frozen=True, slots=True)
class HostKey:
    """This host's key pair. public, secret: 64 hexadecimal digits each."""

    name: str
    public: str
    secret: str

    def __repr__(self) -> str:
        return f"HostKey({self.name}, {self.public})"


@dataclass(frozen=True, slots=True)
class AuthorizedKey:
    """Another host's public key. added, revoked: times in ISO 8601, revoked empty while the key is good."""

    name: str
    public: str
    roles: tuple[KeyRole, ...]
    added: str
    revoked: str = ""


def to_z85(key: str) -> bytes:
    """A key as libzmq wants it."""
    return z85.encode(bytes.fromhex(key))


def from_z85(key: bytes) -> str:
    """A key of libzmq's as 64 hexadecimal digits."""
    return z85.decode(key).hex()


# --- This host --------------------------------------------------------------------------------------------------------


def new_host_key(name: str) -> HostKey:
    """A fresh pair. Errors: `SettingsError` for a name that cannot be one."""
    public, secret = zmq.curve_keypair()
    return HostKey(_checked_name(name), from_z85(public), from_z85(secret))


def write_host_key(directory: Path, key: HostKey) -> Path:
    """Write `host.key`, readable by its owner alone; the directory is made if need be. Errors: `SettingsError`."""
    text = (
        "# The key of this host. Keep it secret: who has it is this host for all others.\n"
        f'name = "{key.name}"\npublic = "{key.public}"\nsecret = "{key.secret}"\n'
    )
    path = directory / HOST_KEY
    with _explained(path):
        make_directory(directory)
        replace_file(path, text, 0o600)
    return path


def host_key_path(directory: Path) -> Path | None:
    """Where this host's key is: systemd's credential, else in the directory; None where there is none."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if credentials and (path := Path(credentials) / HOST_KEY).exists() and _read_text(path).strip() != NO_CREDENTIAL:
        return path
    path = directory / HOST_KEY
    try:
        path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError(
            f"cannot look for the host key {path}: {error.strerror}", "run as the user whom it belongs to"
        ) from None
    return path


def load_host_key(directory: Path) -> HostKey | None:
    """This host's key, or None where there is none.

    Raises:
        SettingsError: it cannot be read, others can read it, or it is no key.
    """
    path = host_key_path(directory)
    if path is None:
        return None
    text = _read_text(path)
    if path.parent == directory and (mode := path.stat().st_mode & 0o077):
        # In systemd's directory of credentials the mode is systemd's business.
        raise SettingsError(
            f"others can read the host key {path} (mode {mode | path.stat().st_mode & 0o777:04o})", f"chmod 600 {path}"
        )
    table = _parse(path, text)
    values = [table.get(name) for name in ("name", "public", "secret")]
    if not all(isinstance(value, str) for value in values) or set(table) != {"name", "public", "secret"}:
        raise SettingsError(f"{path} is no host key", "make one with `draftwire keys init`")
    name, public, secret = cast("list[str]", values)
    for key in (public, secret):
        if not _PUBLIC.fullmatch(key):
            raise SettingsError(f"{path} is damaged: a key has 64 hexadecimal digits", "restore it from a backup")
    if from_z85(zmq.curve_public(to_z85(secret))) != public:
        raise SettingsError(f"{path} is damaged: its halves do not belong together", "restore it from a backup")
    return HostKey(name, public, secret)


# --- Others -----------------------------------------------------------------------------------------------------------


def load_authorized(directory: Path) -> list[AuthorizedKey]:
    """The keys of others, revoked ones too; none where there is no file.

    Raises:
        SettingsError: the file cannot be read, others can write to it, or something in it is wrong.
    """
    path = directory / AUTHORIZED
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
    if mode & 0o022:
        raise SettingsError(f"others can write to {path}", f"chmod go-w {path}")
    table = _parse(path, _read_text(path))
    entries = table.get("key", [])
    if set(table) - {"key"} or not isinstance(entries, list):
        raise SettingsError(f"{path}: only [[key]] tables are known here")
    keys = [_entry(path, number, entry) for number, entry in enumerate(entries, 1)]
    for what, values in (("name", [key.name for key in keys]), ("public key", [key.public for key in keys])):
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise SettingsError(f"{path}: the {what} {twice} is there twice", "remove one of them")
    return keys


def _entry(path: Path, number: int, entry: Any) -> AuthorizedKey:
    where = f"{path}, key {number}"
    if not isinstance(entry, dict):
        raise SettingsError(f"{where} is no table")
    for name, value in entry.items():
        if name not in _FIELDS:
            raise SettingsError(f"{where}: unknown field {name}", f"known: {', '.join(_FIELDS)}")
        if not isinstance(value, _FIELDS[name]):
            raise SettingsError(f"{where}: {name} must be of type {_FIELDS[name].__name__}")
    for name in ("name", "public", "roles"):
        if name not in entry:
            raise SettingsError(f"{where} has no {name}")
    for name in ("added", "revoked"):
        if not _TIME.fullmatch(entry.get(name, "")):
            raise SettingsError(f"{where}: {name} is no time", "such as 2026-11-28T10:00:00+00:00")
    return AuthorizedKey(
        _checked_name(entry["name"], where),
        checked_public(entry["public"], where),
        checked_roles(entry["roles"], where),
        entry.get("added", ""),
        entry.get("revoked", ""),
    )


def checked_public(text: str, where: str = "") -> str:
    """A public key as it is kept. Errors: `SettingsError`."""
    public = text.strip().lower()
    if not _PUBLIC.fullmatch(public):
        raise SettingsError(
            f"{where + ': ' if where else ''}{text[:80]!r} is no public key",
            "64 hexadecimal digits, as `draftwire keys host` prints them on the other host",
        )
    return public


def checked_roles(roles: Sequence[Any], where: str = "") -> tuple[KeyRole, ...]:
    """Roles in their usual order. Errors: `SettingsError`."""
    for role in roles:
        if role not in ROLES:
            raise SettingsError(
                f"{where + ': ' if where else ''}there is no role {role!r}", f"roles: {', '.join(ROLES)}"
            )
    if not roles:
        raise SettingsError(f"{where + ': ' if where else ''}a key needs a role", f"roles: {', '.join(ROLES)}")
    return tuple(role for role in ROLES if role in roles)


def _checked_name(name: str, where: str = "") -> str:
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{where + ': ' if where else ''}{name[:80]!r} cannot be a name",
            "letters, digits, '.', '-' and '_', at most 64",
        )
    return name


def authorize(directory: Path, name: str, public: str, roles: Sequence[str]) -> AuthorizedKey:
    """Let a key in, or change its roles.

    Raises:
        SettingsError: the name belongs to another key, the key has another name, or it was revoked.
    """
    fresh = AuthorizedKey(_checked_name(name), checked_public(public), checked_roles(roles), _now())
    with _changing(directory) as keys:
        for index, key in enumerate(keys):
            if key.public == fresh.public and key.revoked:
                raise SettingsError(
                    f"this key, {key.name}, was revoked at {key.revoked}",
                    "make a new one on that host: draftwire keys init --force",
                )
            if key.public == fresh.public and key.name != fresh.name:
                raise SettingsError(f"this key is authorized as {key.name}", f"use that name, or revoke {key.name}")
            if key.name == fresh.name and key.public != fresh.public:
                if not key.revoked:
                    raise SettingsError(f"{key.name} has another key", f"first: draftwire keys revoke {key.name}")
                # Its old key stays on record, so that it stays refused by name.
                taken = {k.name for k in keys}
                n = next(n for n in range(1, 10_000) if f"{key.name}.revoked{n}" not in taken)
                keys[index] = replace(key, name=f"{key.name}.revoked{n}")
        known = next((i for i, key in enumerate(keys) if key.public == fresh.public), None)
        if known is None:
            keys.append(fresh)
        else:
            fresh = keys[known] = replace(keys[known], roles=fresh.roles)
    return fresh


def revoke(directory: Path, which: str) -> AuthorizedKey:
    """Shut a key out, by its name or by the key itself; it stays on record. Errors: `SettingsError`."""
    with _changing(directory) as keys:
        index = next((i for i, key in enumerate(keys) if which in (key.name, key.public)), None)
        if index is None:
            known = ", ".join(key.name for key in keys if not key.revoked) or "none"
            raise SettingsError(f"no key {which[:80]!r} is authorized here", f"known: {known}")
        if not keys[index].revoked:
            keys[index] = replace(keys[index], revoked=_now())
        return keys[index]


@contextmanager
def _changing(directory: Path) -> Iterator[list[AuthorizedKey]]:
    path = directory / AUTHORIZED
    with _explained(path):
        make_directory(directory)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = load_authorized(directory)
        yield keys
        with _explained(path):
            replace_file(path, _formatted(keys), 0o644)
    finally:
        os.close(lock)


def _formatted(keys: Sequence[AuthorizedKey]) -> str:
    lines = ["# Keys that may connect here. Change it with `draftwire keys authorize` and `draftwire keys revoke`;"]
    lines.append("# running services notice.")
    for key in keys:
        lines += ["", "[[key]]", f'name = "{key.name}"', f'public = "{key.public}"']
        lines.append(f"roles = [{', '.join(f'{chr(34)}{role}{chr(34)}' for role in key.roles)}]")
        lines.append(f'added = "{key.added}"')
        if key.revoked:
            lines.append(f'revoked = "{key.revoked}"')
    return "\n".join(lines) + "\n"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not text") from None
    except OSError as error:
        raise SettingsError(
            f"cannot read {path}: {error.strerror}", "run as the user whom it belongs to, or as root"
        ) from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingsError(
            f"cannot write {path}: {error.strerror}", "run as root, or choose another directory with --dir"
        ) from None
