"""What the router knows of each draft worker by name: its figures and its record outlive the process.

Invariant: one `WorkerRecord` a name; `peer` is there exactly while it is registered. Of more than a thousand names,
those that are away are forgotten, the oldest first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from services.router.health import Health
from services.router.peers import Peer
from shared.histograms import Times
from shared.messages import Hello, Order
from shared.routing.figures import WorkerFigures
from shared.routing.policy import Candidate

SHUT: Final = ("drain", "ban")
"""Orders under which a worker gets no sessions."""

_MOST_RECORDS = 1024
_DEGRADED = 1.5
"""Times its token time at the last look: its sessions are to be considered again."""


@dataclass(slots=True)
class WorkerRecord:
    """One draft worker. usual_token_s: of a session, at the last look. order: an operator's.

    round_trip, token, reply: as in `WorkerStatus`.
    """

    hello: Hello
    figures: WorkerFigures
    health: Health
    peer: Peer | None = None
    usual_token_s: float = 0.0
    order: Order = ""
    round_trip: Times = field(default_factory=Times)
    token: Times = field(default_factory=Times)
    reply: Times = field(default_factory=Times)

    @property
    def name(self) -> str:
        return self.hello.instance

    @property
    def n_sessions(self) -> int:
        return len(self.peer.sessions) if self.peer is not None else 0

    @property
    def n_slots(self) -> int:
        """How many sessions it may have now."""
        return 0 if self.order in SHUT else self.health.slots(self.hello.n_slots)

    def candidate(self, session: int) -> Candidate:
        """It as the policy sees it, for this session."""
        others = self.n_sessions - (self.peer is not None and session in self.peer.sessions)
        return Candidate(self.name, self.figures, others, self.n_slots)

    def degraded(self, now: float) -> bool:
        """Whether its tokens have become much slower since this was asked last."""
        token_s = self.figures.token_s(self.n_sessions, now)
        slower = 0 < self.usual_token_s * _DEGRADED < token_s
        if slower or not 0 < self.usual_token_s < token_s:
            self.usual_token_s = token_s
        return slower


class WorkerTable:
    """The draft workers by name.

    Args:
        first_back_off_s: of a demotion.
    """

    def __init__(self, first_back_off_s: float) -> None:
        self._first_back_off_s = first_back_off_s
        self._records: dict[str, WorkerRecord] = {}

    def back_off(self, first_s: float) -> None:
        """How long a demotion lasts the first time, from the next one on."""
        self._first_back_off_s = first_s
        for record in self._records.values():
            record.health.first_back_off_s = first_s

    def __iter__(self) -> Iterator[WorkerRecord]:
        return iter(self._records.values())

    def __getitem__(self, name: str) -> WorkerRecord:
        return self._records[name]

    def get(self, name: str) -> WorkerRecord | None:
        return self._records.get(name)

    def joined(self, peer: Peer, now: float) -> WorkerRecord:
        """A worker has registered; one of the same name, engine and model is believed to be as fast as before."""
        hello = peer.hello
        record = self._records.get(hello.instance)
        if record is None:
            away = (name for name, other in self._records.items() if other.peer is None)
            if len(self._records) >= _MOST_RECORDS and (oldest := next(away, None)) is not None:
                del self._records[oldest]
            record = WorkerRecord(hello, WorkerFigures(hello.engine), Health(self._first_back_off_s, now))
            self._records[hello.instance] = record
        elif (record.hello.engine, record.hello.model) != (hello.engine, hello.model):
            record.figures = WorkerFigures(hello.engine)
        record.hello, record.peer = hello, peer
        record.health.returned(now)
        return record

    @property
    def figures(self) -> dict[str, WorkerFigures]:
        return {name: record.figures for name, record in self._records.items()}
