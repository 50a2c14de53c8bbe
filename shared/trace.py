"""When what happened in this process: marks on the machine's monotonic clock, for `draftwire bench loopback`.

Off unless `trace_dir` is set; a mark then costs less than a microsecond. Processes of one machine share the clock.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_MARKS = 2_000_000


@dataclass(frozen=True, slots=True)
class Mark:
    """name: "process.event". session: 0 where it belongs to none. position: of the session's sequence."""

    time_ns: int
    name: str
    session: int
    position: int


_marks: list[tuple[int, str, int, int]] | None = None


def start() -> None:
    """Begin to record."""
    global _marks
    _marks = []


def mark(name: str, session: int = 0, position: int = 0) -> None:
    """Record that something happens now; from any thread."""
    if _marks is not None and len(_marks) < MAX_MARKS:
        _marks.append((time.monotonic_ns(), name, session, position))


def write(directory: Path, process: str) -> None:
    """Write what has been recorded to DIRECTORY/PROCESS-PID.jsonl."""
    if _marks is not None:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / f"{process}-{os.getpid()}.jsonl").open("w") as out:
            out.writelines(json.dumps(entry) + "\n" for entry in _marks)


def read(directory: Path) -> Iterator[Mark]:
    """All marks of all processes, in no order."""
    for path in sorted(directory.glob("*.jsonl")):
        with path.open() as lines:
            for line in lines:
                yield Mark(*json.loads(line))
