"""The rig that all container tests share."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for containers.py, as in tests/pipeline

from containers import Rig, missing


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
