"""The file of API keys: who may ask the gateway, and how much.

Invariant: the file holds no key, only hashes; it is replaced whole or not at all, and is not believed where somebody
else than its owner could have written it.

A key has 256 random bits. Nobody can try them out, so a plain SHA-256 protects it as well as a slow hash, which is
for passwords that people choose and would cost every request its time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_type_hints

from shared.errors import SettingsError
from shared.fields import Range
from shared.files import replace_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX: Final = "dw-"
MAX_KEYS: Final = 4096
"""Each request is compared with all of them."""
MAX_FILE_BYTES: Final = 4 << 20

_HEADER: Final = """\
# API keys of a Draftwire gateway, as SHA-256 hashes. Change them with `draftwire api-keys`, which writes the whole
# file anew: comments do not last.
"""


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What one key may have; 0: as much as it wants. max_requests: in progress at a time. tokens_per_minute: prompt
    and generated ones.
    """

    max_requests: Annotated[int, Range(0, 10_000)] = 0
    requests_per_minute: Annotated[int, Range(0, 1_000_000)] = 0
    tokens_per_minute: Annotated[int, Range(0, 1_000_000_000)] = 0


LIMIT_BOUNDS: Final[dict[str, Range]] = {
    name: get_args(hint)[1] for name, hint in get_type_hints(KeyLimits, include_extras=True).items()
}


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key. sha256: 32 bytes. Times are in UTC, to the second."""

    name: str
    sha256: bytes
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    limits: KeyLimits = KeyLimits()

    def state(self, now: datetime) -> str:
        """ "ok", "expired" or "revoked"."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "ok"


def new_key() -> str:
    """A key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: bytes) -> bytes:
    """What is kept and compared instead of a key: [32] bytes."""
    return hashlib.sha256(key).digest()


def is_name(name: str) -> bool:
    return 0 < len(name) <= 40 and all(c.isascii() and (c.isalnum() or c in "-_") for c in name)


# -- the text of the file --


def parse_keys(text: str, source: str) -> dict[str, ApiKey]:
    """The keys by name. Errors: `SettingsError` that names the source and the entry."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{source} is not valid TOML: {error}", "restore it, or make it anew") from None
    except RecursionError:
        raise SettingsError(f"{source} is nested too deeply", "restore it, or make it anew") from None
    keys = table.pop("keys", {})
    if table or not isinstance(keys, dict):
        raise SettingsError(f"{source} is no file of API keys", "it holds tables [keys.NAME] and nothing else")
    if len(keys) > MAX_KEYS:
        raise SettingsError(f"{source} has {len(keys)} keys", f"at most {MAX_KEYS}")
    parsed: dict[str, ApiKey] = {}
    owners: dict[bytes, str] = {}
    for name, entry in keys.items():
        key = _parse_key(name, entry, source)
        if key.sha256 in owners:
            raise SettingsError(f"{source}: {owners[key.sha256]} and {name} have the same key", "revoke one of them")
        owners[key.sha256] = name
        parsed[name] = key
    return parsed


def _parse_key(name: str, entry: Any, source: str) -> ApiKey:
    where = f"{source}: keys.{name[:64]}"
    if not is_name(name):
        raise SettingsError(f"{where}: names are letters, digits, '-' and '_', at most 40")
    if not isinstance(entry, dict):
        raise SettingsError(f"{where} must be a table")
    known = {"sha256", "created", "expires", "revoked", *LIMIT_BOUNDS}
    if unknown := sorted(set(entry) - known):
        raise SettingsError(f"{where}: unknown key {unknown[0][:64]}", f"known here: {', '.join(sorted(known))}")
    for needed in ("sha256", "created"):
        if needed not in entry:
            raise SettingsError(f"{where} has no {needed}", "make the key anew with `draftwire api-keys`")
    digest = entry["sha256"]
    if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise SettingsError(f"{where}.sha256 is no SHA-256 hash", "64 hexadecimal digits in lower case")
    times = {}
    for field in ("created", "expires", "revoked"):
        value = entry.get(field)
        if value is not None and not (isinstance(value, datetime) and value.tzinfo is not None):
            raise SettingsError(f"{where}.{field} is no time", "such as 2027-01-31T00:00:00Z")
        times[field] = None if value is None else _in_utc(value, f"{where}.{field}")
    limits = {}
    for field, bounds in LIMIT_BOUNDS.items():
        value = entry.get(field, 0)
        if type(value) is not int or not bounds.low <= value <= bounds.high:
            raise SettingsError(f"{where}.{field} is {value!r:.64}", f"a number from 0 to {bounds.high:.0f}")
        limits[field] = value
    created = times["created"]
    assert created is not None
    return ApiKey(name, bytes.fromhex(digest), created, times["expires"], times["revoked"], KeyLimits(**limits))


def _in_utc(value: datetime, where: str) -> datetime:
    try:
        return value.astimezone(timezone.utc).replace(microsecond=0)
    except OverflowError:
        raise SettingsError(f"{where} is out of range") from None


def format_keys(keys: Mapping[str, ApiKey]) -> str:
    """The text that `parse_keys` reads back."""
    lines = [_HEADER]
    for name, key in keys.items():
        lines.append(f'[keys.{name}]\nsha256 = "{key.sha256.hex()}"')
        for field in ("created", "expires", "revoked"):
            if (time := getattr(key, field)) is not None:
                lines.append(f"{field} = {format_time(time)}")
        lines += [f"{f.name} = {value}" for f in fields(KeyLimits) if (value := getattr(key.limits, f.name))]
        lines.append("")
    return "\n".join(lines)


def format_time(time: datetime) -> str:
    """In UTC and to the second, as TOML and ISO 8601 write it."""
    return time.replace(tzinfo=None).isoformat(timespec="seconds") + "Z"


# -- the file --


def read_keys(path: Path) -> dict[str, ApiKey]:
    """The keys by name. Errors: `SettingsError`, also for a file that others can write."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            _check_trusted(path, os.fstat(file.fileno()))
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise SettingsError(f"no file of API keys {path}", f"draftwire api-keys add NAME --file {path}") from None
    except OSError as error:
        remedy = f"chgrp it to this user's group and chmod 640 {path}" if isinstance(error, PermissionError) else ""
        raise SettingsError(f"cannot read {path}: {error.strerror}", remedy) from None
    if len(data) > MAX_FILE_BYTES:
        raise SettingsError(f"{path} is larger than {MAX_FILE_BYTES} bytes", "is it the file of API keys?")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is no text", "is it the file of API keys?") from None
    return parse_keys(text, str(path))


def _check_trusted(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SettingsError(f"{path} is no file", "give a file that `draftwire api-keys add` has made")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SettingsError(f"others can write {path}, and so make keys for themselves", f"chmod 640 {path}")
    if os.geteuid() != 0 and status.st_uid not in (0, os.geteuid()):
        raise SettingsError(f"{path} belongs to another user, who could make keys", f"sudo chown root {path}")


@contextmanager
def changed_keys(path: Path) -> Iterator[dict[str, ApiKey]]:
    """The keys of a file, to be changed in the block; written when that ends without an error.

    A file that is not there counts as empty. Nobody else changes it meanwhile.

    Raises:
        SettingsError: it cannot be read or written.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SettingsError(f"cannot use the directory {path.parent}: {error.strerror}", "create it") from None
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        keys = read_keys(path) if path.exists() else {}
        yield keys
        if len(keys) > MAX_KEYS:
            raise SettingsError(f"{path} would have {len(keys)} keys", f"at most {MAX_KEYS}; revoke some")
        _replace(path, format_keys(keys), directory)
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}", "do you need sudo?") from None
    finally:
        os.close(directory)


def _replace(path: Path, text: str, directory: int) -> None:
    """Write a file as a whole, for its owner alone; a group that may read it keeps that right.

    A new file that root makes is for the group of its directory to read: that of the gateway, in /etc/draftwire.
    """
    try:
        before = path.stat()
        owner, group, mode = before.st_uid, before.st_gid, 0o600 | before.st_mode & 0o040
    except FileNotFoundError:
        owner, group, mode = os.geteuid(), os.fstat(directory).st_gid, 0o640 if os.geteuid() == 0 else 0o600
    replace_file(path, text, mode, (owner if os.geteuid() == 0 else -1, group))
