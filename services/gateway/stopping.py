"""Stop strings, matched in text that arrives in chunks.

Invariant: however a text is cut into chunks, what comes out is the text up to the earliest occurrence of any stop
string, or the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Holds back what may yet become a stop string, and cuts the text before one.

    The earliest beginning counts; of two that begin together, the shorter. A stop string that has been seen whole
    is therefore not decided while another that began before it may still be completed.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len)
        self._held = ""
        self.matched = ""
        """The stop string that ended the text, or empty."""

    def feed(self, text: str) -> str:
        """What is certain to belong to the text now. After a match: nothing more."""
        if self.matched or not self._stops:
            return "" if self.matched else text
        self._held += text
        undecided = self._undecided()
        at, stop = self._earliest()
        if stop and at <= undecided:
            return self._cut(at, stop)
        certain, self._held = self._held[:undecided], self._held[undecided:]
        return certain

    def finish(self) -> str:
        """The rest of a text that has ended."""
        if self.matched:
            return ""
        at, stop = self._earliest()
        if stop:
            return self._cut(at, stop)
        rest, self._held = self._held, ""
        return rest

    def _cut(self, at: int, stop: str) -> str:
        text, self._held = self._held[:at], ""
        self.matched = stop
        return text

    def _earliest(self) -> tuple[int, str]:
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(found, key=lambda entry: entry[0], default=(len(self._held), ""))

    def _undecided(self) -> int:
        """Where the longest suffix of what is held begins that could be the beginning of a stop string."""
        held = self._held
        first = len(held)
        for stop in self._stops:
            for at in range(max(0, len(held) - len(stop) + 1), first):
                if stop.startswith(held[at:]):
                    first = at
                    break
        return first
