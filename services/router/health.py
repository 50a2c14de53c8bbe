"""Which draft workers are trusted with sessions: demotion, and the way back. Pure: times are arguments, in seconds.

A worker is `ok`, `demoted` (it gets nothing, and must answer heartbeats for its back-off), or on `probation` (one
session, until it has drafted well). The back-off doubles with each demotion and is forgiven step by step. Invariant:
what is known of a worker belongs to its name and outlives its process, so that coming back is no way out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "probation", "demoted"]

LOST_SESSIONS = 3.0
"""Weight of going away with sessions: the third time soon after the first is too much."""
_MOST_OFFENCES = 8.0
_OFFENCE_FADES_S = 50.0
_MOST_BACK_OFF_S = 600.0
_FORGIVEN_S = 300.0
"""Good behaviour that halves the next back-off."""
_PROOF_TOKENS = 32


@dataclass(slots=True)
class Health:
    """One worker's record.

    Args:
        first_back_off_s: how long it is kept out the first time.
        since: when it was last heard of for the first time, that is, when its unbroken presence began.
    """

    first_back_off_s: float
    since: float
    state: State = "ok"
    reason: str = ""
    n_demotions: int = 0
    _back_off_s: float = 0.0
    _doublings: float = 0.0
    _changed_at: float = 0.0
    _offences: float = 0.0
    _offended_at: float = 0.0
    _proof: int = 0

    def returned(self, now: float) -> None:
        """It is there again after an absence, which is no part of its back-off."""
        self.since = now

    def offence(self, reason: str, now: float, weight: float = 1.0) -> bool:
        """It did something that no healthy worker does; True: it has just been demoted for doing so too often."""
        if self.state == "demoted":
            return False
        self._offences = max(0.0, self._offences - (now - self._offended_at) / _OFFENCE_FADES_S) + weight
        self._offended_at = now
        if self._offences < _MOST_OFFENCES and self.state != "probation":
            return False
        self.demote(reason, now)
        return True

    def demote(self, reason: str, now: float) -> None:
        """Keep it out from now on, for a back-off twice as long as the last one, less what was forgiven."""
        if self.state == "ok" and self.n_demotions:
            self._doublings = max(0.0, self._doublings - (now - self._changed_at) / _FORGIVEN_S)
        self._back_off_s = min(_MOST_BACK_OFF_S, self.first_back_off_s * 2**self._doublings)
        if self._back_off_s < _MOST_BACK_OFF_S:
            self._doublings += 1
        self.state, self.reason, self._changed_at = "demoted", reason, now
        self.n_demotions += 1
        self._offences = 0.0

    def retry_s(self, now: float) -> float:
        """How long it must still be there without a break, if it is demoted."""
        if self.state != "demoted":
            return 0.0
        return max(0.0, max(self._changed_at, self.since) + self._back_off_s - now)

    def try_again(self, now: float) -> bool:
        """Let it try if its back-off is over; True: it is on probation from now on. Only for a worker that is there."""
        if self.state != "demoted" or self.retry_s(now) > 0:
            return False
        self.state, self._proof = "probation", 0
        return True

    def drafted(self, n_tokens: int, now: float) -> bool:
        """It proposed so many tokens, and nothing was wrong with them; True: it has just proved itself."""
        if self.state != "probation":
            return False
        self._proof += n_tokens
        if self._proof < _PROOF_TOKENS:
            return False
        self.state, self.reason, self._changed_at = "ok", "", now
        return True

    def slots(self, n_slots: int) -> int:
        """How many sessions it may have."""
        return {"ok": n_slots, "probation": min(1, n_slots), "demoted": 0}[self.state]
