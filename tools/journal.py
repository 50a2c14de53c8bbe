"""Reading `request_done` lines: from journald, from exported files, from what `draftwire up` printed.

A source gives bytes, a line at a time. Lines that cannot hold a `request_done` are only counted; of the others, those
that are not what they should be are counted as bad and left out. Invariant: no input makes this raise anything but a
`DraftwireError`, and nothing is kept of a line beyond its `Done`.
"""

from __future__ import annotations

import fnmatch
import gzip
import json
import math
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, cast

from shared.errors import DraftwireError

DEFAULT_UNIT: Final = "draftwire-gateway*"
EVENT: Final = "request_done"
MAX_LINE: Final = 1 << 20
"""Longer lines are none of ours."""

_CHUNK: Final = 1 << 18
_MAX_NAME: Final = 300
_MAX_DEPTHS: Final = 1024
_LARGEST: Final = 1e15
_LAST_TIME: Final = 32503680000.0
"""The year 3000: later ones are no times."""
_NEEDLES: Final = (EVENT.encode(), b'"MESSAGE":[', b'"MESSAGE":null', b'"MESSAGE" : [', b'"MESSAGE" : null')
"""A line without any of these is another event's; a message given as bytes or as null cannot be told by its text."""
_NO_SUCH_UNIT: Final = "No data available"
"""What journalctl says of a pattern that no unit matches."""
_JOURNAL_MAGIC: Final = b"LPKSHHRH"
_GZIP_MAGIC: Final = b"\x1f\x8b"


class Label(NamedTuple):
    """A model as `request_done` names it; all empty: there was none."""

    model: str
    quant: str
    engine: str


NO_MODEL: Final = Label("", "", "")
NOT_SAID: Final = Label("(not said)", "", "")
"""A worker drafted, but the line, of an earlier version, does not say with what."""


@dataclass(frozen=True, slots=True)
class Done:
    """One `request_done` line.

    time: seconds since 1970, or NaN where the line has none. tokens: generated. decode_ms: for these. speed: in
    tokens/s. by_depth: (proposed, accepted) from depth 1 on.
    """

    time: float
    target: Label
    draft: Label
    worker: str
    status: int
    proposed: int
    accepted: int
    prompt: int
    tokens: int
    decode_ms: float
    speed: float
    by_depth: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class Counts:
    """What became of the lines.

    bad: that are no valid line though they should be; first_bad: why the first of them is not. cut: entries without
    message. outside: `request_done` of other units or times. notes: what else is to be said of the sources.
    """

    lines: int = 0
    requests: int = 0
    bad: int = 0
    cut: int = 0
    outside: int = 0
    first_bad: str = ""
    notes: list[str] = field(default_factory=list)

    def is_bad(self, reason: str) -> None:
        self.bad += 1
        self.first_bad = self.first_bad or reason


@dataclass(frozen=True, slots=True)
class Query:
    """What to read.

    files: files, directories of a journal, or "-"; none: this machine's journal. units: names or patterns; none: the
    gateway's in this machine's journal, all in files. since, until: seconds since 1970.
    """

    files: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    since: float = -math.inf
    until: float = math.inf


def read_requests(query: Query, counts: Counts) -> Iterator[Done]:
    """All requests, source by source, in the order of the lines.

    Raises:
        DraftwireError: a source cannot be read at all.
    """
    names: dict[str, str] = {}
    patterns = tuple(_unit_patterns(query.units))
    bounded = query.since > -math.inf or query.until < math.inf
    for source in query.files or (None,):
        with _open(source, query, counts) as stream:
            for line in _lines(stream, counts):
                try:
                    entry = _unwrap(line)
                    if entry is None:
                        continue
                    if entry.fields is None:
                        counts.cut += 1
                        continue
                    done = _done(entry, names)
                except (ValueError, RecursionError) as error:
                    counts.is_bad(str(error) or type(error).__name__)
                    continue
                other_unit = patterns and not stream.chosen and not _any_matches(patterns, entry.unit)
                if other_unit or (bounded and not query.since <= done.time <= query.until):
                    counts.outside += 1
                else:
                    counts.requests += 1
                    yield done


def parse_time(text: str, now: datetime) -> float:
    """A time as people and journalctl write it, as seconds since 1970; local, unless it says a time zone.

    Args:
        now: the local time, without time zone.

    Raises:
        DraftwireError: it is none.
    """
    text = text.strip()
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if text in ("now", "today", "yesterday"):
        return {"now": now, "today": today, "yesterday": today - timedelta(days=1)}[text].timestamp()
    if match := re.fullmatch(r"@(\d{1,12}(?:\.\d+)?)", text):
        return float(match[1])
    units = {"s": 1, "m": 60, "min": 60, "h": 3600, "hour": 3600, "d": 86400, "day": 86400, "w": 604800, "week": 604800}
    ago = re.fullmatch(r"-\s*(\d{1,9}) ?([a-z]+?)s?", text) or re.fullmatch(r"(\d{1,9}) ?([a-z]+?)s? ago", text)
    if ago and ago[2] in units:
        return now.timestamp() - int(ago[1]) * units[ago[2]]
    clock = re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", text)
    try:
        if clock:
            text = f"{today.date()} {text.rjust(8 if clock[1] else 5, '0')}"
        return datetime.fromisoformat(re.sub(r"Z$", "+00:00", text)).timestamp()
    except (ValueError, OverflowError):
        raise DraftwireError(
            f"{text!r} is no time that is understood here",
            'write "2026-01-31", "2026-01-31 14:00", "14:00", "today", "yesterday", "-7d" or "2 hours ago"',
            "bad_time",
        ) from None


# --- sources ----------------------------------------------------------------------------------------------------------


@contextmanager
def _open(source: str | None, query: Query, counts: Counts) -> Iterator[_Stream]:
    if source is None:
        with _journalctl([], query.units or (DEFAULT_UNIT,), query, counts) as stream:
            yield stream
        return
    if source == "-":
        yield _Stream(_unpacked(sys.stdin.buffer), "standard input")
        return
    path = Path(source)
    try:
        if path.is_dir():
            with _journalctl(["-D", source], query.units, query, counts) as stream:
                yield stream
            return
        with path.open("rb") as file:
            if file.peek(8)[:8] == _JOURNAL_MAGIC:
                with _journalctl(["--file", source], query.units, query, counts) as stream:
                    yield stream
            else:
                yield _Stream(_unpacked(file), source)
    except OSError as error:
        raise DraftwireError(
            f"cannot read {source}: {error.strerror or error}",
            'give a file of log lines, the directory of a journal, or "-" for standard input',
            "journal_unreadable",
        ) from None


def _unpacked(file: Any) -> IO[bytes]:
    """The bytes of a file, or those that are packed in it by gzip."""
    packed = file.peek(2)[:2] == _GZIP_MAGIC
    return cast(IO[bytes], gzip.GzipFile(fileobj=file) if packed else file)


@dataclass(frozen=True, slots=True)
class _Stream:
    """An open source, and what it is called. chosen: it has no lines of other units."""

    file: IO[bytes]
    name: str
    chosen: bool = False


@contextmanager
def _journalctl(arguments: Sequence[str], units: Sequence[str], query: Query, counts: Counts) -> Iterator[_Stream]:
    """The messages that `journalctl` prints, whole. It chooses the units; JSON would take it twice as long."""
    command = ["journalctl", *arguments, "-o", "cat", "--all", "--no-pager", "--quiet"]
    command += [f"--unit={unit}" for unit in units]
    for option, at in (("--since", query.since), ("--until", query.until)):
        if math.isfinite(at):
            command.append(f"{option}=@{at:.6f}")
    before = counts.lines
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, stderr=said)
        except OSError as error:
            raise DraftwireError(
                f"cannot run journalctl: {error.strerror}",
                "read exported lines with --file instead",
                "no_journalctl",
            ) from None
        assert process.stdout is not None
        finished = False
        try:
            yield _Stream(process.stdout, " ".join(["journalctl", *arguments]), chosen=True)
            finished = True
        finally:
            if not finished:
                process.kill()
            process.stdout.close()
            status = process.wait()
        if status:
            said.seek(0)
            reason = said.read(2000).decode(errors="replace").strip().rpartition("\n")[2]
            if counts.lines > before or _NO_SUCH_UNIT in reason:
                counts.notes.append(f"journalctl says: {reason}")
                return
            raise DraftwireError(
                f"{' '.join(command)} failed: {reason or f'exit status {status}'}",
                "members of the group systemd-journal, and root, may read the journal",
                "journalctl_failed",
            )


def _lines(stream: _Stream, counts: Counts) -> Iterator[bytes]:
    """The lines that may hold a `request_done`; all are counted."""
    rest, skipping = b"", False
    while True:
        try:
            chunk = stream.file.read(_CHUNK)
        except (OSError, EOFError, zlib.error) as error:
            counts.notes.append(f"{stream.name} cannot be read to its end: {error}")
            break
        if not chunk:
            break
        lines = (rest + chunk).split(b"\n")
        rest = lines.pop()
        if skipping:
            if not lines:
                rest = b""
                continue
            del lines[0]
            skipping = False
        counts.lines += len(lines)
        for line in lines:
            if any(needle in line for needle in _NEEDLES):
                yield line
        if len(rest) > MAX_LINE:
            counts.lines += 1
            counts.is_bad(f"a line is longer than {MAX_LINE} bytes")
            rest, skipping = b"", True
    if rest:
        counts.lines += 1
        if any(needle in rest for needle in _NEEDLES):
            yield rest


# --- lines ------------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """fields: of the event; None: journald's entry has no message. at: when journald got it, "" where unknown."""

    fields: dict[str, Any] | None
    unit: str
    at: Any


def _unwrap(line: bytes) -> _Entry | None:
    """The event in a line; None: another one, or none. Errors: ValueError, RecursionError."""
    start = line.find(b"{")
    if start < 0:
        return None
    value = json.loads(line[start:].decode(errors="replace"))
    if not isinstance(value, dict):
        return None
    if "event" in value:
        return _Entry(value, "", "") if value["event"] == EVENT else None
    if "MESSAGE" not in value:
        return None
    unit, at = value.get("_SYSTEMD_UNIT"), value.get("__REALTIME_TIMESTAMP")
    unit = unit if isinstance(unit, str) else ""
    messages = _messages(value["MESSAGE"])
    if not messages:
        return _Entry(None, unit, at)
    for message in messages:
        start = message.find("{")
        if start >= 0 and EVENT in message:
            fields = json.loads(message[start:])
            if isinstance(fields, dict) and fields.get("event") == EVENT:
                return _Entry(fields, unit, at)
    return None


def _messages(value: Any) -> list[str]:
    """A field of `journalctl -o json`: text, or the bytes of what is none; a list of these where it occurs again."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return []
    if value and all(type(item) is int for item in value):
        return [bytes(value).decode(errors="replace")]
    return [message for item in value if isinstance(item, (str, list)) for message in _messages(item)]


def _done(entry: _Entry, names: dict[str, str]) -> Done:
    """Errors: ValueError."""
    fields = entry.fields
    assert fields is not None

    def name(key: str) -> str:
        value = fields.get(key, "")
        if not isinstance(value, str) or len(value) > _MAX_NAME:
            raise ValueError(f"{key} is no name")
        known = names.get(value)
        if known is None:
            known = names[value] = "".join(c if c.isprintable() else "?" for c in value)
        return known

    proposed, accepted = _integer(fields, "draft_n"), _integer(fields, "draft_n_accepted")
    if accepted > proposed:
        raise ValueError("more is accepted than was proposed")
    draft, worker = Label(name("draft_model"), name("draft_quant"), name("draft_engine")), name("worker")
    return Done(
        _time(fields.get("time"), entry.at),
        Label(name("target_model"), name("target_quant"), name("target_engine")),
        NOT_SAID if worker and draft == NO_MODEL else draft,
        worker,
        _integer(fields, "status"),
        proposed,
        accepted,
        _integer(fields, "prompt_n"),
        _integer(fields, "predicted_n"),
        _number(fields, "predicted_ms"),
        _number(fields, "predicted_per_second"),
        _depths(fields.get("draft_by_depth", [])),
    )


def _number(fields: dict[str, Any], key: str) -> float:
    value = fields.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= _LARGEST:  # NaN is not
        raise ValueError(f"{key} is no number from 0 on")
    return float(value)


def _integer(fields: dict[str, Any], key: str) -> int:
    value = fields.get(key)
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(f"{key} is no whole number from 0 on")
    return value


def _depths(rows: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(rows, list) or len(rows) > _MAX_DEPTHS:
        raise ValueError("draft_by_depth is no list")
    result: list[tuple[int, int]] = []
    for depth, row in enumerate(rows, 1):
        if not isinstance(row, dict) or row.get("depth") != depth:
            raise ValueError("draft_by_depth does not go from depth 1 on")
        proposed, accepted = _integer(row, "draft_n"), _integer(row, "draft_n_accepted")
        if accepted > proposed:
            raise ValueError("more is accepted than was proposed")
        result.append((proposed, accepted))
    return tuple(result)


def _time(written: Any, at: Any) -> float:
    """When the line was written, or else when journald got it."""
    if isinstance(written, str):
        try:
            time = datetime.fromisoformat(written[:-1] + "+00:00" if written.endswith("Z") else written)
            seconds = (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp()
        except (ValueError, OverflowError):
            seconds = math.nan
    elif isinstance(at, str) and at.isascii() and at.isdigit() and len(at) < 20:
        seconds = int(at) / 1e6
    else:
        seconds = math.nan
    return seconds if 0 <= seconds <= _LAST_TIME else math.nan


def _any_matches(patterns: Sequence[str], unit: str) -> bool:
    return any(fnmatch.fnmatchcase(unit, pattern) for pattern in patterns)


def _unit_patterns(units: Sequence[str]) -> Iterator[str]:
    """As journalctl takes them: "draftwire-gateway" is that service; a pattern stays one."""
    for unit in units:
        yield unit
        if "." not in unit and not any(c in unit for c in "*?["):
            yield f"{unit}.service"
