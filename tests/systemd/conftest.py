"""The rig that all container tests share, and the figures that they report."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Iterator

import pytest

from tests.systemd.containers import Rig, missing

_FIGURES: list[str] = []
_RIG = pytest.StashKey[Rig]()


@pytest.fixture(scope="session")
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    lacks = missing()
    if lacks:
        pytest.fail("these tests cannot run here; missing: " + "; ".join(lacks), pytrace=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # else nothing would be cleaned up
    rig = Rig()
    request.config.stash[_RIG] = rig
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture(scope="session")
def figures() -> list[str]:
    """Lines to print at the end."""
    return _FIGURES


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failure, show the end of each host's journal."""
    report = yield
    if report.failed and (rig := item.config.stash.get(_RIG, None)) is not None:
        for host in rig.hosts:
            journal = host.run("journalctl", "-u", "draftwire*", "-n", "40", "--no-pager", "-o", "short", check=False)
            report.sections.append((f"journal of {host.name}", journal.stdout))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _FIGURES:
        terminalreporter.section("figures")
        for line in _FIGURES:
            terminalreporter.write_line(line)
