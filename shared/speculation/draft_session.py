"""One session's state in a draft worker: the committed tokens, and its own continuation of them.

Pure bookkeeping. The worker never waits for a verdict: it goes on from its own continuation up to a window ahead of the
last commit, and goes back only when a commit contradicts it. Invariant: `tokens[:committed]` is final; what follows is
the worker's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shared.messages import Commit, OpenDraft, Proposal
from shared.prefix import TokenPrefix
from shared.sampling.drafting import DraftToken

HOPELESS = 0.01
"""A draft stops where its confidence that all it has proposed is right falls under this. In simulations 0.001 to 0.03
left the speed as it was; this saved 40 % of the drafting (docs/measuring.md)."""


@dataclass(slots=True)
class Cost:
    """Engine time that no proposal has reported yet, in microseconds. n_prefilled: tokens read in prefill_us."""

    prefill_us: int = 0
    decode_us: int = 0
    n_prefilled: int = 0


class LostCommit(Exception):
    """A commit does not continue what this session knows: one before it was lost, and the session must be reopened."""


class DraftSession:
    """See the module's docstring.

    Args:
        n_ctx: positions that the drafter's cache holds.
    """

    def __init__(self, opened: OpenDraft, n_ctx: int) -> None:
        self.id = opened.session
        self.sampling = opened.sampling
        self.window = opened.window
        self.prefix = TokenPrefix(opened.tokens.tolist())
        self.committed = len(self.prefix)
        self.n_opened = self.committed
        """Tokens that it was opened with."""
        self.cached = 0
        """How many positions of the drafter's cache hold the prefix."""
        self.slot = -1
        self.cost = Cost()
        self.n_rolled_back = 0
        """How many of its own tokens the last commit contradicted."""
        self._n_ctx = n_ctx
        self._stop_tokens = frozenset(opened.stop_tokens)
        self._own: list[DraftToken] = []
        self._sent_at_commit = self.committed

    @property
    def room(self) -> int:
        """How many tokens may still be drafted now; 0 while the window is full, or the continuation has ended, or is so
        surely contradicted by the next commits that what follows is of no use."""
        if self._own and self._own[-1].token in self._stop_tokens:
            return 0
        if math.prod(_confidence(drafted) for drafted in self._own) < HOPELESS:
            return 0
        return max(0, min(self.window - len(self._own), self._n_ctx - len(self.prefix)))

    def append(self, drafted: DraftToken) -> None:
        """Go on with a drafted token."""
        self._own.append(drafted)
        self.prefix.append((drafted.token,))

    def commit(self, commit: Commit) -> Proposal | None:
        """Take a commit in; returns proposals to send again if the verifier seems to have lost them.

        Raises:
            LostCommit: see there.
        """
        if commit.start != self.committed or self.prefix.hashes[commit.start] != commit.prefix_hash:
            raise LostCommit
        end = commit.start + len(commit.tokens)
        agreed = self.prefix.agreement(commit.start, commit.tokens)
        contradicted = agreed < len(commit.tokens)
        self.n_rolled_back = len(self._own) - agreed if contradicted else 0
        if contradicted:
            self.prefix.truncate(commit.start + agreed)
            self.prefix.append(commit.tokens[agreed:])
            self.cached = min(self.cached, commit.start + agreed)
            self._own.clear()
        else:
            del self._own[:agreed]
        self.committed = end
        sent_before, self._sent_at_commit = self._sent_at_commit, len(self.prefix)
        # What was sent before the commit before this one has arrived by now, or never will.
        if not contradicted and max(commit.known, end) < min(sent_before, len(self.prefix)):
            return self.proposal(max(commit.known, end))
        return None

    def proposal(self, start: int) -> Proposal:
        """The drafted tokens from position `start` on, as a message, with the engine time not reported yet."""
        own = self._own[start - self.committed :]
        with_q = [d for d in own if len(d.q_ids)]
        message = Proposal(
            self.id,
            start,
            self.prefix.hashes[start],
            tuple(d.token for d in own),
            tuple(d.confidence for d in own),
            tuple(len(d.q_ids) for d in with_q),
            np.concatenate([d.q_ids for d in with_q]) if with_q else np.empty(0, np.int32),
            np.concatenate([d.q_probs for d in with_q]) if with_q else np.empty(0, np.float32),
            self.cost.prefill_us,
            self.cost.decode_us,
            self.cost.n_prefilled,
        )
        self.cost = Cost()
        return message


def _confidence(drafted: DraftToken) -> float:
    """Under rejection sampling a proposal's probability says nothing of whether it is accepted."""
    return 1.0 if len(drafted.q_ids) else drafted.confidence
