"""Refusals in the log: counted, one line a source and minute, in bounded memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from shared.logs import Logger

REFUSALS_EVERY_S: Final = 60.0
MAX_SOURCES: Final = 1024
"""Addresses whose refusals are counted apart; further ones are counted together, as OTHERS."""
MAX_REASONS: Final = 16
"""Reasons of one address that are counted apart, likewise."""
OTHERS: Final = "others"


class Refusals:
    """Counts who is refused, and logs it once a minute for each address that it comes from.

    The first of an address is logged at once, those that follow within a minute as one line when it is over.

    Args:
        event: of the lines. clock_s: seconds, monotonic.
    """

    def __init__(self, log: Logger, event: str, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._event = event
        self._clock_s = clock_s
        self._sources: dict[str, tuple[float, Counter[str]]] = {}
        self.n_refused = 0
        """Since the start."""

    def add(self, source: str, reason: str) -> None:
        self.n_refused += 1
        if source not in self._sources and len(self._sources) >= MAX_SOURCES:
            source = OTHERS
        if source in self._sources:
            reasons = self._sources[source][1]
            reasons[reason if reason in reasons or len(reasons) < MAX_REASONS else OTHERS] += 1
        else:
            self._sources[source] = (self._clock_s(), Counter())
            self._write(source, Counter({reason: 1}))

    def flush(self, everything: bool = False) -> None:
        """Log what has come in minutes that are over, and forget addresses that have been quiet."""
        now = self._clock_s()
        for source, (since, reasons) in list(self._sources.items()):
            if not everything and now - since < REFUSALS_EVERY_S:
                continue
            if reasons:
                self._write(source, reasons)
                self._sources[source] = (now, Counter())
            else:
                del self._sources[source]

    def _write(self, source: str, reasons: Counter[str]) -> None:
        self._log.warning(self._event, source=source, count=reasons.total(), reasons=dict(reasons))
