"""Fleets for the tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.fleet import Fleet, MakeFleet, answer, verifier


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[MakeFleet]:
    """Fleets with settings of their own."""
    with contextlib.ExitStack() as stack:

        def make(*overrides: str, **options: Any) -> Fleet:
            fleet = Fleet(tmp_path, *overrides, **options)
            stack.callback(fleet.close)
            return fleet

        yield make


@pytest.fixture(scope="module")
def shared_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    yield fleet
    fleet.close()


@pytest.fixture
def fleet(shared_fleet: Fleet) -> Fleet:
    """The module's fleet, its router as it was at first."""
    shared_fleet.router.script = answer("")
    shared_fleet.router.peers = (verifier(),)
    return shared_fleet
