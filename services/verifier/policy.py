"""What one forward pass computes: whose prompt goes on, and how many proposals of whom are verified. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ready:
    """A session that wants to take part in the next step.

    pending: committed tokens that the cache lacks, at least 1. cached: the position that they start at.
    n_proposals: proposals that have arrived. n_max: most that may be verified. n_left: tokens until its limit.
    """

    pending: int
    cached: int
    n_proposals: int
    n_max: int
    n_left: int


@dataclass(frozen=True, slots=True)
class Share:
    """A session's part in the step: `pending` committed tokens, then `n_proposals` proposals.

    final: the pending tokens are all there, so this session gets rows and a verdict.
    """

    pending: int
    n_proposals: int
    final: bool


def speculation_length(session: Ready) -> int:
    """How many proposals to verify: those that have arrived, up to the limit; never one past the last token wanted."""
    return max(0, min(session.n_proposals, session.n_max, session.n_left - 1))


def plan(sessions: Sequence[Ready], n_batch: int, prefill_chunk: int) -> list[Share]:
    """Shares of the next step, in the order of `sessions`; a share without pending tokens sits this step out.

    Sessions that decode come first, since their clients are waiting for the next token; what room is left goes to
    prompts. Chunks of a prompt end at multiples of prefill_chunk, so that how a prompt is cut depends on nothing
    else; the proposals of a session are what is cut when room is short. A step that ends a prompt verifies none: it has
    many rows, whose values an engine without row invariance computes otherwise than those of a few.
    """
    shares = [Share(0, 0, False)] * len(sessions)
    room = n_batch
    decoding = [i for i, s in enumerate(sessions) if s.pending == 1]
    for i in decoding:
        if room > 0:
            length = min(speculation_length(sessions[i]), room - 1)
            shares[i] = Share(1, length, True)
            room -= 1 + length
    for i, session in enumerate(sessions):
        if session.pending == 1 or room <= 0:
            continue
        pending = min(session.pending, prefill_chunk - session.cached % prefill_chunk)
        if pending > room:
            continue
        shares[i] = Share(pending, 0, pending == session.pending)
        room -= pending
    return shares
