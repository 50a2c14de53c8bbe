"""Who is connected: one record per registered peer, with what its heartbeats say.

Invariant: at most one record per role and instance; a restarted peer replaces its predecessor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from shared.clock import ClockWatch
from shared.messages import MAX_U32, Hello, Role
from shared.routing.figures import FadingMean
from shared.speculation.cost import StepCost

_WINDOW = 32
_PREFILL_HALF_LIFE_S, _MOST_PREFILL = 600.0, 20_000.0


@dataclass(slots=True)
class Peer:
    """One registered peer. id: its routing id on `link_name`. sessions: those it works on. clock: against the router's.

    Of a verifier, step: what its steps cost, None until it has said so; prefill: its seconds a prompt token; n_steps,
    n_step_sessions: as it has reported them.
    """

    id: bytes
    link_name: str
    hello: Hello
    heard_at: float
    joined_at: float = field(init=False)
    rtts_us: list[int] = field(default_factory=list)
    sessions: set[int] = field(default_factory=set)
    draining: bool = False
    clock: ClockWatch = field(default_factory=ClockWatch)
    step: StepCost | None = None
    n_steps: int = 0
    n_step_sessions: int = 0
    prefill: FadingMean = field(default_factory=lambda: FadingMean(_PREFILL_HALF_LIFE_S, _MOST_PREFILL))

    def __post_init__(self) -> None:
        self.joined_at = self.heard_at

    @property
    def rtt_us(self) -> int | None:
        """Lowest of the last measured round trips: what the network takes, whatever the peer was busy with."""
        return min(self.rtts_us, default=None)

    def heard(self, now: float) -> None:
        self.heard_at = now

    def uptime_s(self, now: float) -> int:
        """How long its process has been running."""
        return min(MAX_U32, self.hello.uptime_s + max(0, int(now - self.joined_at)))

    def measured(self, rtt_us: int) -> None:
        self.rtts_us.append(rtt_us)
        del self.rtts_us[:-_WINDOW]


class PeerTable:
    """The registered peers, by routing id and by name."""

    def __init__(self) -> None:
        self._by_id: dict[tuple[str, bytes], Peer] = {}

    def get(self, link_name: str, peer_id: bytes) -> Peer | None:
        return self._by_id.get((link_name, peer_id))

    def named(self, role: Role, instance: str) -> Peer | None:
        return next((p for p in self.of(role) if p.hello.instance == instance), None)

    def of(self, role: Role) -> Iterator[Peer]:
        return (p for p in self._by_id.values() if p.hello.role == role)

    def all(self) -> list[Peer]:
        return list(self._by_id.values())

    def add(self, peer: Peer) -> None:
        self._by_id[peer.link_name, peer.id] = peer

    def remove(self, peer: Peer) -> None:
        self._by_id.pop((peer.link_name, peer.id), None)
