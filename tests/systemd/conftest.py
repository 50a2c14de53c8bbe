"""The rig that all container tests share, and the figures that they report."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest

from tests.systemd.containers import Rig, missing

_FIGURES: list[str] = []


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    lacks = missing()
    if lacks:
        pytest.fail("these tests cannot run here; missing: " + "; ".join(lacks), pytrace=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # else nothing would be cleaned up
    rig = Rig()
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture(scope="session")
def figures() -> list[str]:
    """Lines to print at the end."""
    return _FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _FIGURES:
        terminalreporter.section("figures")
        for line in _FIGURES:
            terminalreporter.write_line(line)
