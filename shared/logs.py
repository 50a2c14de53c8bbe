"""Log lines: one JSON object a line, for journald and for people with `jq`.

Under systemd a line goes to journald's own socket, with fields to select by (`journalctl SESSION=...`); where that
cannot be, to stdout, begun by a `<6>`-style priority which journald takes off again. Elsewhere lines go to stdout. No
prompt, no generated text and no local variables ever enter a log line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, cast

import structlog

LogLevel = Literal["debug", "info", "warning", "error"]

JOURNAL_SOCKET = "/run/systemd/journal/socket"

_PRIORITY = {"critical": 2, "error": 3, "exception": 3, "warning": 4, "info": 6, "debug": 7}
_FIELDS = ("event", "service", "instance", "session", "worker", "request")
"""What of a line is also a field of the journal's own, in capitals."""

Logger = structlog.typing.FilteringBoundLogger

_threshold = logging.INFO


def configure(service: str, instance: str, level: LogLevel) -> Logger:
    """Set up this process's log and return a logger bound to the service and its instance."""
    set_level(level)
    native = _is_journal(sys.stdout.fileno() if _has_descriptor() else -1)
    identifier = f"draftwire-{service}" if instance == service else f"draftwire-{service}-{instance}"
    structlog.configure(
        processors=[
            _drop_below_threshold,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            _session_in_hex,
            _render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=lambda *_args: _Output(identifier, native, prefixed="JOURNAL_STREAM" in os.environ),
        cache_logger_on_first_use=True,
    )
    return cast(Logger, structlog.get_logger().bind(service=service, instance=instance, pid=os.getpid()))


def set_level(level: LogLevel) -> None:
    """The least severity that is logged from now on."""
    global _threshold
    _threshold = getattr(logging, level.upper())


def _drop_below_threshold(_logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if getattr(logging, "ERROR" if method == "exception" else method.upper()) < _threshold:
        raise structlog.DropEvent
    return event


def _session_in_hex(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if isinstance(event.get("session"), int):
        event["session"] = f"{event['session']:016x}"
    return event


_to_json = structlog.processors.JSONRenderer()


def _render(logger: object, method: str, event: MutableMapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    fields = {name.upper(): str(event[name]) for name in _FIELDS if event.get(name)}
    return (_to_json(logger, method, event), _PRIORITY[method], fields), {}


class _Output:
    """Where lines go: to journald's socket if `native`, else to stdout, with priorities if `prefixed`."""

    def __init__(self, identifier: str, native: bool, prefixed: bool) -> None:
        self._identifier = identifier
        self._prefixed = prefixed
        self._journal: socket.socket | None = None
        if native:
            self._journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def _write(self, line: str, priority: int, fields: Mapping[str, str]) -> None:
        if self._journal is not None:
            # journald that is away for a moment, or a line that is too long for a datagram
            with contextlib.suppress(OSError):
                entry = {"MESSAGE": line, "PRIORITY": str(priority), "SYSLOG_IDENTIFIER": self._identifier, **fields}
                self._journal.sendto(journal_entry(entry), JOURNAL_SOCKET)
                return
        prefix = f"<{priority}>" if self._prefixed else ""
        sys.stdout.write(f"{prefix}{line}\n")
        sys.stdout.flush()

    debug = info = warning = error = critical = exception = _write


def journal_entry(fields: Mapping[str, str]) -> bytes:
    """An entry in the journal's native protocol (systemd, JOURNAL_NATIVE_PROTOCOL)."""
    parts: list[bytes] = []
    for name, value in fields.items():
        data = value.encode("utf-8", "replace")
        if b"\n" in data:
            parts.append(name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n")
        else:
            parts.append(name.encode() + b"=" + data + b"\n")
    return b"".join(parts)


def _has_descriptor() -> bool:
    try:
        sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    return True


def _is_journal(descriptor: int) -> bool:
    """Whether a descriptor is the stream that systemd connected to journald, as $JOURNAL_STREAM names it."""
    named = os.environ.get("JOURNAL_STREAM", "")
    try:
        info = os.fstat(descriptor)
    except OSError:
        return False
    return named == f"{info.st_dev}:{info.st_ino}"
