"""Proposals against commits: what counts as right, and what no honest worker sends."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.messages import Commit, OpenDraft, Proposal
from shared.prefix import TokenPrefix
from shared.routing.runs import ProposedRun
from shared.sampling.drafting import DraftToken
from shared.sampling.params import SamplingParams
from shared.speculation.draft_session import DraftSession

PROMPT = [1, 2, 3]
WINDOW = 6


def hash_of(tokens: Sequence[int]) -> int:
    return TokenPrefix(tokens).hash


def run() -> ProposedRun:
    return ProposedRun(len(PROMPT), WINDOW)


def test_hits_and_misses_are_counted_in_order() -> None:
    """Of 4 5 6 7, with 4 5 9 final, two were right and one wrong; what follows a wrong one does not count."""
    worker = run()
    assert not worker.propose(3, hash_of(PROMPT), (4, 5)).offence
    assert not worker.propose(5, hash_of([*PROMPT, 4, 5]), (6, 7)).offence
    assert worker.commit(hash_of(PROMPT), (4,)) == [True]
    assert worker.commit(hash_of([*PROMPT, 4]), (5, 9)) == [True, False]
    assert worker.commit(hash_of([*PROMPT, 4, 5, 9]), (7,)) == []


def test_late_proposals_count_too() -> None:
    """A proposal that comes when its token is final already says as much of the worker."""
    worker = run()
    worker.commit(hash_of(PROMPT), (4, 5))
    worker.propose(3, hash_of(PROMPT), (4, 6))
    assert worker.commit(hash_of([*PROMPT, 4, 5]), (6,)) == [True, False]


def test_what_is_sent_again_counts_once() -> None:
    worker = run()
    for _ in range(2):
        worker.propose(3, hash_of(PROMPT), (4, 5))
    assert worker.commit(hash_of(PROMPT), (4,)) == [True]
    worker.propose(3, hash_of(PROMPT), (4, 5))
    assert worker.commit(hash_of([*PROMPT, 4]), (5,)) == [True]


def test_a_prefix_that_is_not_the_sessions_does_not_count() -> None:
    worker = run()
    worker.propose(3, 77, (4, 5))
    assert worker.commit(hash_of(PROMPT), (4, 5)) == []


@pytest.mark.parametrize(
    ("start", "prefix_hash", "tokens", "word"),
    [
        (2, hash_of(PROMPT[:2]), (3,), "before"),
        (3, hash_of([*PROMPT]), (4,) * 8, "window"),
        (40, 1, (4,), "window"),
        (5, 1, (6,), "hash"),
        (4, 1, (5,), "hash"),
    ],
)
def test_lies_are_recognized(start: int, prefix_hash: int, tokens: tuple[int, ...], word: str) -> None:
    worker = run()
    worker.propose(3, hash_of(PROMPT), (4, 5))
    worker.commit(hash_of(PROMPT), (4,))
    assert word in worker.propose(start, prefix_hash, tokens).offence


def test_a_flood_is_recognized() -> None:
    """The same window again and again is more than a worker has reason to send."""
    worker = run()
    answers = [worker.propose(3, hash_of(PROMPT), (4,) * WINDOW) for _ in range(5)]
    assert [bool(answer.offence) for answer in answers] == [False, False, True, True, True]


def test_room_is_what_the_window_leaves() -> None:
    worker = run()
    assert worker.room == WINDOW
    worker.propose(3, hash_of(PROMPT), (4, 5))
    assert (worker.room, worker.last_token) == (WINDOW - 2, 5)
    worker.commit(hash_of(PROMPT), (9,))
    assert (worker.room, worker.last_token) == (WINDOW, None)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 0.3))
def test_an_honest_worker_never_offends(seed: int, quality: float, lost: float) -> None:
    """A real draft session, commits and proposals that take any time in between, and proposals that get lost: no
    offence as long as nothing is lost, and of those that are judged as many are right as were drawn."""
    chance = random.Random(seed)
    text = [chance.randrange(50) for _ in range(120)]
    opened = OpenDraft(1, np.array(text[:3], np.int32), SamplingParams(), (), WINDOW)
    draft, watched = DraftSession(opened, 1 << 20), ProposedRun(3, WINDOW)
    to_worker: list[Commit] = []
    to_router: list[Proposal] = []
    committed, offences, losses, trials = 3, 0, 0, 0
    while committed < len(text):
        kind = chance.randrange(4)
        if kind == 0 and draft.room:
            start = len(draft.prefix)
            for _ in range(chance.randint(1, draft.room)):
                position = len(draft.prefix)
                right = position < len(text) and chance.random() < quality
                draft.append(DraftToken(text[position] if right else 99, 1.0, np.empty(0), np.empty(0)))
            to_router.append(draft.proposal(start))
        elif kind == 1 and to_router:
            proposal = to_router.pop(0)
            if chance.random() < lost:
                losses += 1
            else:
                offences += bool(watched.propose(proposal.start, proposal.prefix_hash, proposal.tokens).offence)
        elif kind == 2:
            n = min(chance.randint(1, 3), len(text) - committed)
            prefix_hash, end = hash_of(text[:committed]), committed + n
            judged = watched.commit(prefix_hash, text[committed:end])
            assert all(judged[:-1]), "nothing is judged after a miss in the same run"
            trials += len(judged)
            to_worker.append(Commit(1, committed, prefix_hash, tuple(text[committed:end]), 0, end))
            committed = end
        elif kind == 3 and to_worker:
            again = draft.commit(to_worker.pop(0))
            if again is not None:
                to_router.append(again)
    assert trials <= committed - 3
    assert offences <= losses
