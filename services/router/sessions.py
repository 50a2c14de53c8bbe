"""The session table: what the router knows of each generation in progress.

Invariant: `tokens` is the prompt and every commit forwarded so far, so that any draft worker can take over at any time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.router.peers import Peer
from shared.messages import Commit, DraftStats, Generate, Proposal

# What `DraftStats` can say: a worker's claims must not make a message that its reader refuses.
_MOST_TOKENS = 2**32 - 1
_MOST_US = 2**53


@dataclass(slots=True)
class Session:
    """One generation. draft: the worker that drafts for it now. failed: instances that must not get it again."""

    id: int
    gateway: Peer
    verifier: Peer
    request: Generate
    tokens: list[int]
    draft: Peer | None = None
    failed: set[str] = field(default_factory=set)
    last_worker: str = ""
    worker_changes: int = 0
    n_drafted: int = 0
    prefill_us: int = 0
    decode_us: int = 0

    def assigned(self, worker: Peer) -> None:
        if self.last_worker not in ("", worker.hello.instance):
            self.worker_changes += 1
        self.last_worker = worker.hello.instance
        self.draft = worker

    def drafted(self, proposal: Proposal) -> None:
        """Count a run that the worker has sent for the first time (a resent one cost it nothing)."""
        if proposal.decode_us or proposal.prefill_us:
            self.n_drafted = min(_MOST_TOKENS, self.n_drafted + len(proposal.tokens))
        self.prefill_us = min(_MOST_US, self.prefill_us + proposal.prefill_us)
        self.decode_us = min(_MOST_US, self.decode_us + proposal.decode_us)

    def committed(self, commit: Commit) -> None:
        self.tokens.extend(commit.tokens)

    @property
    def draft_stats(self) -> DraftStats:
        return DraftStats(self.last_worker, self.n_drafted, self.prefill_us, self.decode_us, self.worker_changes)
