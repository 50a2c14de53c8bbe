"""The session table: what the router knows of each generation in progress.

Invariant: `tokens` is the prompt and every commit forwarded so far, so that any draft worker can take over at any time.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field

from services.router.assignment import Assignment
from services.router.peers import Peer
from shared.messages import (
    MAX_MICROS,
    MAX_U32,
    Commit,
    DraftStats,
    Finished,
    FinishReason,
    Generate,
    Hello,
    ModelLabel,
    Proposal,
    TargetStats,
    Totals,
)
from shared.model.names import model_file_name
from shared.routing.figures import SessionFigures
from shared.routing.policy import (
    LOOKUP_COMMITS,
    MOST_REVIEW_COMMITS,
    REVIEW_COMMITS,
    SOON_COMMITS,
    TRIAL_COMMITS,
    Choice,
)


@dataclass(slots=True)
class Tally:
    """What all generations add up to; see `Totals`."""

    n_opened: int = 0
    n_ended: int = 0
    n_failed: int = 0
    n_tokens: int = 0
    n_accepted: int = 0
    n_drafted: int = 0

    def message(self) -> Totals:
        return Totals(*astuple(self))


@dataclass(slots=True)
class Session:
    """One generation.

    draft: the worker that drafts for it now; assignment: its work, choice: why it was chosen. refused: by these
    instances, until it is considered again. review_in: commits until its worker is considered again; lookup_in: until
    it is held against prompt lookup. n_moves: all its moves, n_lookup_moves: those between a model and prompt lookup.
    pin: the worker that an operator wants for it; opened_pin: the one that new sessions went to when it was opened.
    contradicted_at: when its worker was, and has proposed nothing since.
    last_worker: to whom it was given last, also when that one is gone.
    """

    id: int
    gateway: Peer
    verifier: Peer
    request: Generate
    tokens: list[int]
    opened_at: float
    draft: Peer | None = None
    assignment: Assignment | None = None
    choice: Choice | None = None
    figures: SessionFigures = field(default_factory=SessionFigures)
    refused: set[str] = field(default_factory=set)
    review_in: int = REVIEW_COMMITS
    lookup_in: int = LOOKUP_COMMITS
    n_moves: int = 0
    n_lookup_moves: int = 0
    last_worker: Hello | None = None
    worker_changes: int = 0
    n_drafted: int = 0
    prefill_us: int = 0
    decode_us: int = 0
    pin: str = ""
    opened_pin: str = ""
    contradicted_at: float | None = None

    def assigned(self, worker: Peer, assignment: Assignment, choice: Choice) -> None:
        if self.last_worker is not None and self.last_worker.instance != worker.hello.instance:
            self.worker_changes += 1
        self.last_worker = worker.hello
        self.draft, self.assignment, self.choice = worker, assignment, choice
        self.reviewed()

    def unassigned(self) -> None:
        self.draft = self.assignment = self.choice = self.contradicted_at = None

    def reviewed(self) -> None:
        """Its worker was considered just now."""
        usual = min(MOST_REVIEW_COMMITS, REVIEW_COMMITS << min(self.n_moves - self.n_lookup_moves, 10))
        self.review_in = TRIAL_COMMITS if self.choice is not None and self.choice.trial else usual
        self.held_against_lookup()

    def held_against_lookup(self) -> None:
        """A model and prompt lookup were compared for it just now."""
        self.lookup_in = min(MOST_REVIEW_COMMITS, LOOKUP_COMMITS << min(self.n_lookup_moves, 10))

    def review_soon(self) -> None:
        """Other workers have become better, or its own has become worse."""
        self.review_in = min(self.review_in, SOON_COMMITS)

    def drafted(self, proposal: Proposal) -> None:
        """Count a run that the worker has sent for the first time (a resent one cost it nothing)."""
        if proposal.decode_us or proposal.prefill_us:
            self.n_drafted = min(MAX_U32, self.n_drafted + len(proposal.tokens))
        # A worker may say anything; the sum must fit into a message all the same.
        self.prefill_us = min(MAX_MICROS, self.prefill_us + proposal.prefill_us)
        self.decode_us = min(MAX_MICROS, self.decode_us + proposal.decode_us)

    def committed(self, commit: Commit) -> None:
        self.tokens.extend(commit.tokens)
        self.review_in -= 1
        self.lookup_in -= 1
        if self.figures.lookup is not None:
            self.figures.lookup.commit(commit.tokens)

    @property
    def n_prompt(self) -> int:
        return len(self.request.tokens)

    @property
    def tokens_left(self) -> int:
        """How many it may still generate."""
        return max(1, self.request.limits.max_tokens - (len(self.tokens) - self.n_prompt))

    def finished(self, reason: FinishReason, stats: TargetStats) -> Finished:
        """What its gateway is told at the end."""
        worker = self.last_worker.instance if self.last_worker is not None else ""
        return Finished(
            self.request.request,
            reason,
            stats,
            DraftStats(worker, self.n_drafted, self.prefill_us, self.decode_us, self.worker_changes),
            _label(self.verifier.hello),
            _label(self.last_worker),
        )


def _label(hello: Hello | None) -> ModelLabel:
    return ModelLabel() if hello is None else ModelLabel(model_file_name(hello.model), hello.quant, hello.engine)
