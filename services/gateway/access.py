"""Who may ask the gateway, and how much: API keys, the limits of each, and what is refused.

Invariant: without keys in the settings everybody may ask; with them nobody may without one, whatever happens to the
file: one that cannot be read changes nothing. No key is ever kept or logged, only its hash and its name.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from services.gateway.errors import ApiError
from shared.api_keys import ApiKey, KeyLimits, hash_key, read_keys
from shared.errors import SettingsError
from shared.logs import Logger
from shared.refusals import Refusals

_MINUTE_NS: Final = 60_000_000_000


class Bucket:
    """A limit per minute: it is full at first, with a minute's worth, and fills evenly up to that.

    Between any two moments t seconds apart, at most per_minute (1 + t / 60) units are taken one by one. Units may also
    be charged afterwards; the bucket is then in debt, and gives nothing until it has filled again.

    Time is in nanoseconds and a unit counts 6e10 parts, so that per_minute parts come each nanosecond: integers, exact.
    """

    def __init__(self, per_minute: int, now_ns: int) -> None:
        self._per_minute = per_minute
        self._parts = per_minute * _MINUTE_NS
        self._at_ns = now_ns

    @property
    def per_minute(self) -> int:
        return self._per_minute

    def wait_ns(self, now_ns: int) -> int:
        """How long until it holds one unit; 0 when it does."""
        self._fill(now_ns)
        return max(0, -((self._parts - _MINUTE_NS) // self._per_minute))

    def charge(self, units: int, now_ns: int) -> None:
        """Take so many units, also if it does not hold them."""
        self._fill(now_ns)
        self._parts -= units * _MINUTE_NS

    def change(self, per_minute: int, now_ns: int) -> None:
        """A new limit; what it holds stays, as far as it fits, and so does a debt."""
        self._fill(now_ns)
        self._per_minute = per_minute
        self._parts = min(self._parts, per_minute * _MINUTE_NS)

    def _fill(self, now_ns: int) -> None:
        gained = max(0, now_ns - self._at_ns) * self._per_minute
        self._parts = min(self._parts + gained, self._per_minute * _MINUTE_NS)
        self._at_ns = max(now_ns, self._at_ns)


def _changed(bucket: Bucket | None, per_minute: int, now_ns: int) -> Bucket | None:
    if not per_minute:
        return None
    if bucket is None:
        return Bucket(per_minute, now_ns)
    bucket.change(per_minute, now_ns)
    return bucket


def _seconds(ns: int) -> int:
    return -(-ns // 1_000_000_000)


class Caller:
    """Who has made a request: one key and what it has used; with an empty name, anybody, without limits."""

    def __init__(self, name: str, limits: KeyLimits, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.name = name
        self.n_running = 0
        self._limits = KeyLimits()
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._clock_ns = clock_ns
        self.change(limits)

    def change(self, limits: KeyLimits) -> None:
        """New limits; what has been used is not forgotten."""
        now = self._clock_ns()
        self._limits = limits
        self._requests = _changed(self._requests, limits.requests_per_minute, now)
        self._tokens = _changed(self._tokens, limits.tokens_per_minute, now)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A request in progress. Errors: `ApiError` 429 that names the limit; that uses nothing up."""
        now = self._clock_ns()
        limits = self._limits
        if limits.max_requests and self.n_running >= limits.max_requests:
            raise self._over("max_requests", f"{limits.max_requests} requests at a time", 1)
        if self._tokens is not None and (wait := self._tokens.wait_ns(now)):
            raise self._over("tokens_per_minute", f"{limits.tokens_per_minute} tokens a minute", _seconds(wait))
        if self._requests is not None:
            if wait := self._requests.wait_ns(now):
                raise self._over(
                    "requests_per_minute", f"{limits.requests_per_minute} requests a minute", _seconds(wait)
                )
            self._requests.charge(1, now)
        self.n_running += 1
        try:
            yield
        finally:
            self.n_running -= 1

    def charge(self, n_tokens: int) -> None:
        """A request has ended that took so many tokens, its prompt's and generated ones."""
        if self._tokens is not None:
            self._tokens.charge(n_tokens, self._clock_ns())

    def _over(self, limit: str, what: str, retry_after_s: int) -> ApiError:
        message = f"the limit {limit} of API key {self.name} is reached: {what}; try again in {retry_after_s} s"
        return ApiError(429, message, f"{limit}_exceeded", retry_after_s=retry_after_s)


ANYBODY: Final = Caller("", KeyLimits())


class KeyFile:
    """The keys of a file, read again when it has changed. Errors, at first: `SettingsError`."""

    def __init__(self, path: Path, log: Logger) -> None:
        self._path = path
        self._log = log
        self._seen = _signature(path)
        self.keys = tuple(read_keys(path).values())

    def refresh(self) -> bool:
        """Whether there are new keys. A file that cannot be read is logged once, and the old keys stay."""
        signature = _signature(self._path)
        if signature == self._seen:
            return False
        self._seen = signature
        try:
            self.keys = tuple(read_keys(self._path).values())
        except SettingsError as error:
            self._log.error("api_keys_unreadable", reason=error.message, remedy=error.remedy, kept=len(self.keys))
            return False
        self._log.info("api_keys_read", path=str(self._path), keys=len(self.keys))
        return True

    def find(self, key: bytes) -> ApiKey | None:
        """Compares with every hash in full, so that the time it takes says nothing."""
        digest = hash_key(key)
        found = None
        for candidate in self.keys:
            if hmac.compare_digest(candidate.sha256, digest):
                found = candidate
        return found


def _signature(path: Path) -> tuple[int, ...]:
    """What differs when a file has changed; nothing, when it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError as error:
        return (error.errno or 0,)
    return (status.st_ino, status.st_dev, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Access:
    """Finds out who makes a request.

    Args:
        path: of the file of keys; empty: nobody needs one.

    Raises:
        SettingsError: the file cannot be read.
    """

    def __init__(self, path: str, log: Logger) -> None:
        self.refusals = Refusals(log, "api_key_refused")
        self._file = KeyFile(Path(path), log) if path else None
        self._callers: dict[bytes, Caller] = {}
        self._take_over()
        if self._file is not None and not self._callers:
            log.warning("no_api_keys", path=path, remedy=f"draftwire api-keys add NAME --file {path}")

    @property
    def needs_keys(self) -> bool:
        return self._file is not None

    def tick(self) -> None:
        """Once a second: look at the file, and log refusals that are due."""
        if self._file is not None and self._file.refresh():
            self._take_over()
        self.refusals.flush()

    def close(self) -> None:
        """Log what has been refused and was not logged yet."""
        self.refusals.flush(everything=True)

    def caller(self, headers: Iterable[tuple[bytes, bytes]], source: str) -> Caller:
        """Whose key a request has. Errors: `ApiError` 401, which does not tell a revoked key from an unknown one.

        Args:
            headers: names in lower case. source: the address that it comes from.
        """
        if self._file is None:
            return ANYBODY
        key = presented_key(headers)
        if not key:
            self.refusals.add(source, "no key")
            raise ApiError(401, "no API key: send `Authorization: Bearer KEY` or `X-Api-Key: KEY`", "missing_api_key")
        found = self._file.find(key)
        state = found.state(datetime.now(timezone.utc)) if found is not None else "unknown"
        if found is None or state == "revoked":
            self.refusals.add(source, state if found is None else f"{state}: {found.name}")
            raise ApiError(401, "this API key is not valid", "invalid_api_key")
        if state == "expired":
            self.refusals.add(source, f"{state}: {found.name}")
            raise ApiError(401, f"API key {found.name} has expired", "expired_api_key")
        return self._callers[found.sha256]

    def _take_over(self) -> None:
        """Callers for the keys of the file; those that were there before keep what they have used."""
        old, self._callers = self._callers, {}
        for key in self._file.keys if self._file is not None else ():
            caller = old.get(key.sha256)
            if caller is None:
                caller = Caller(key.name, key.limits)
            else:
                caller.name = key.name
                caller.change(key.limits)
            self._callers[key.sha256] = caller


def presented_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key in a request's headers, that of Authorization first; empty if there is none."""
    other = b""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.strip().partition(b" ")
            if scheme.lower() == b"bearer" and key.strip():
                return key.strip()
        elif name == b"x-api-key":
            other = other or value.strip()
    return other


def source_of(client: tuple[str, int] | None) -> str:
    """The address of a client, for the log; what a proxy passes on may be anything."""
    try:
        return str(ipaddress.ip_address(client[0])) if client else "unknown"
    except ValueError:
        return "unknown"
