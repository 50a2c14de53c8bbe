"""What the kernel says of a fleet's processes."""

from __future__ import annotations

import os
from pathlib import Path


def service_pid(label: str, run_dir: Path) -> int:
    """The process of a service, by its name and, for a draft worker, its instance: "router", "draft model"."""
    name, _, instance = label.partition(" ")
    (pid,) = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _is_service(_arguments(entry), name, instance, str(run_dir))
    ]
    return pid


def _arguments(entry: Path) -> list[str]:
    try:
        return (entry / "cmdline").read_text().split("\0")
    except OSError:
        return []


def _is_service(arguments: list[str], name: str, instance: str, run_dir: str) -> bool:
    if "service" not in arguments or not any(run_dir in argument for argument in arguments):
        return False
    given = arguments[arguments.index("service") + 1 :]
    return given[:1] == [name] and (not instance or instance in given)


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    """How many file descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
