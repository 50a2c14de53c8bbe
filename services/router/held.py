"""Who worked on the last sessions, also those that have ended: whom `draftwire explain` and `trace` are about.

Invariant: besides the sessions in progress at most MAX_ENDED are remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, field

from services.router.peers import Peer

MAX_ENDED = 256


@dataclass(slots=True)
class Held:
    """One session. request: its number at the gateway. workers: names of those that drafted, in order."""

    session: int
    gateway: Peer
    request: int
    verifier: Peer
    workers: dict[str, None] = field(default_factory=dict)


class HeldSessions:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, Held] = OrderedDict()

    def add(self, held: Held, running: Container[int], n_running: int) -> None:
        """Remember a session just opened."""
        self._held[held.session] = held
        while len(self._held) > MAX_ENDED + n_running:
            self._held.pop(next(session for session in self._held if session not in running))

    def get(self, session: int) -> Held | None:
        """By its id; 0: the one opened last."""
        return self._held.get(session or next(reversed(self._held), 0))
