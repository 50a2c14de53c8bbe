"""A session in a draft worker: its own continuation, and what commits do to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.messages import Commit, OpenDraft
from shared.prefix import TokenPrefix
from shared.sampling.drafting import DraftToken
from shared.sampling.params import SamplingParams
from shared.speculation.draft_session import DraftSession, LostCommit

NO_IDS, NO_PROBS = np.empty(0, np.int32), np.empty(0, np.float32)
PROMPT = (5, 6, 7)


def opened(window: int = 4, stop: Sequence[int] = (), n_ctx: int = 100, prompt: Sequence[int] = PROMPT) -> DraftSession:
    return DraftSession(OpenDraft(1, np.array(prompt, np.int32), SamplingParams(), tuple(stop), window), n_ctx)


def certain(token: int) -> DraftToken:
    return DraftToken(token, 0.9, NO_IDS, NO_PROBS)


def draft(session: DraftSession, *tokens: int) -> None:
    for token in tokens:
        assert session.room > 0
        session.append(certain(token))
        session.cached = len(session.prefix) - 1


def commit(session: DraftSession, *tokens: int, known: int | None = None) -> Commit:
    """The commit that follows what the session takes to be final. known: None means that all proposals arrived."""
    start = session.committed
    end = max(start + len(tokens), len(session.prefix))
    return Commit(1, start, session.prefix.hashes[start], tokens, 0, end if known is None else known)


def test_the_window_ends_the_drafting() -> None:
    """A worker runs at most a window ahead of the last commit; a commit makes room again."""
    session = opened(window=2)
    assert session.room == 2
    draft(session, 1, 2)
    assert session.room == 0
    session.commit(commit(session, 1))
    assert session.room == 1


def test_a_hopeless_draft_waits_for_the_next_commit() -> None:
    """What follows proposals of which one is surely wrong is of no use; what a commit confirms no longer counts."""
    session = opened(window=32)
    for token in range(6):
        assert session.room > 0
        session.append(DraftToken(token, 0.4, NO_IDS, NO_PROBS))
    assert session.room == 0
    session.commit(commit(session, 0))
    assert session.room > 0
    session.commit(commit(session, 99))
    assert session.room == 32


def test_probabilities_of_rejection_sampling_are_no_confidence() -> None:
    """There a token of probability 0.1 may well be accepted."""
    session = opened(window=32)
    for token in range(20):
        assert session.room > 0
        session.append(DraftToken(token, 0.1, np.array([token], np.int32), np.array([1.0], np.float32)))


def test_a_stop_token_ends_the_drafting() -> None:
    """Nothing is drafted after a token that would end the generation, until the target says otherwise."""
    session = opened(stop=(9,))
    draft(session, 1, 9)
    assert session.room == 0
    session.commit(commit(session, 1))
    assert session.room == 0
    session.commit(commit(session, 2))
    assert session.room == 4


def test_the_context_ends_the_drafting() -> None:
    """A worker drafts no more than its cache can hold, also when commits have grown past it."""
    session = opened(window=8, n_ctx=5)
    assert session.room == 2
    draft(session, 1, 2)
    assert session.room == 0
    session.commit(commit(session, 3, 4, 5, 6))
    assert session.room == 0


def test_an_agreeing_commit_keeps_the_continuation() -> None:
    """What the target has confirmed becomes final; the rest stays, and so does the cache."""
    session = opened()
    draft(session, 1, 2, 3)
    cached = session.cached
    assert session.commit(commit(session, 1, 2)) is None
    assert session.committed == 5
    assert session.prefix.tokens == [*PROMPT, 1, 2, 3]
    assert session.cached == cached


def test_a_contradicting_commit_rolls_back() -> None:
    """The continuation is dropped from the first difference on, with the cache of what is not true any more."""
    session = opened()
    draft(session, 1, 2, 3, 4)
    session.commit(commit(session, 1, 8))
    assert session.prefix.tokens == [*PROMPT, 1, 8]
    assert session.committed == 5
    assert session.cached == 4
    assert session.room == 4


def test_a_bonus_token_continues_an_accepted_run() -> None:
    """After a fully accepted run the cache keeps all that was fed; the last proposal and the bonus are to be fed."""
    session = opened()
    draft(session, 1, 2)
    session.commit(commit(session, 1, 2, 3))
    assert session.prefix.tokens == [*PROMPT, 1, 2, 3]
    assert session.cached == 4, "everything but the worker's own last token was fed"
    assert session.prefix.tokens[session.cached :] == [2, 3]


@pytest.mark.parametrize("kind", ["gap", "other text", "repeated"])
def test_a_lost_commit_is_noticed(kind: str) -> None:
    """A commit that does not continue what is known to be final is refused, and changes nothing."""
    session = opened()
    draft(session, 1, 2)
    first = commit(session, 1)
    if kind == "gap":
        wrong = Commit(1, 4, session.prefix.hashes[4], (2,), 0, 5)
    elif kind == "other text":
        wrong = Commit(1, 3, session.prefix.hashes[3] ^ 1, (1,), 0, 4)
    else:
        session.commit(first)
        wrong = first
    before = list(session.prefix.tokens), session.committed
    with pytest.raises(LostCommit):
        session.commit(wrong)
    assert (session.prefix.tokens, session.committed) == before


def test_lost_proposals_are_sent_again() -> None:
    """What was sent before the last commit but one and is still not known to the verifier goes out once more."""
    session = opened(window=6)
    draft(session, 1, 2, 3)
    assert session.commit(commit(session, 1, known=4)) is None, "the proposals may have crossed the commit"
    draft(session, 4)
    again = session.commit(commit(session, 2, known=5))
    assert again is not None
    assert (again.start, again.tokens) == (5, (3, 4))
    assert again.prefix_hash == TokenPrefix((*PROMPT, 1, 2)).hash


def test_known_proposals_are_not_sent_again() -> None:
    """While the verifier holds what was sent before the last commit, nothing is repeated."""
    session = opened(window=6)
    draft(session, 1, 2, 3)
    session.commit(commit(session, 1, known=6))
    draft(session, 4, 5)
    assert session.commit(commit(session, 2, known=6)) is None, "4 and 5 may still be on their way"


def test_only_the_lost_end_is_sent_again() -> None:
    """The repetition begins where the verifier's knowledge ends."""
    session = opened(window=8)
    draft(session, 1, 2, 3, 4, 5)
    session.commit(commit(session, 1, known=6))
    again = session.commit(commit(session, 2, known=6))
    assert again is not None
    assert (again.start, again.tokens) == (6, (4, 5))


def test_a_proposal_reports_its_cost_once() -> None:
    """Engine time travels with the next proposal and is then spent; a repetition costs nothing."""
    session = opened()
    session.cost.prefill_us, session.cost.decode_us, session.cost.n_prefilled = 70, 5, 3
    draft(session, 1)
    first = session.proposal(3)
    assert (first.prefill_us, first.decode_us, first.n_prefilled) == (70, 5, 3)
    again = session.proposal(3)
    assert (again.prefill_us, again.decode_us, again.n_prefilled) == (0, 0, 0)
    assert (again.tokens, again.confidence) == ((1,), (0.9,))


def test_distributions_travel_with_their_tokens() -> None:
    """Under rejection sampling each token's ids and probabilities are in the message, in order."""
    session = opened()
    for token, size in ((1, 2), (2, 3)):
        session.append(DraftToken(token, 0.5, np.arange(size, dtype=np.int32), np.full(size, 1 / size, np.float32)))
    message = session.proposal(3)
    assert message.q_counts == (2, 3)
    assert message.q_ids.tolist() == [0, 1, 0, 1, 2]
    assert message.q_probs.tolist() == pytest.approx([1 / 2] * 2 + [1 / 3] * 3)
    assert session.proposal(4).q_counts == (3,)


step = st.one_of(
    st.tuples(st.just("draft"), st.lists(st.integers(0, 2), min_size=1, max_size=4)),
    st.tuples(st.just("accept"), st.lists(st.integers(0, 2), min_size=1, max_size=1)),
    st.tuples(st.just("commit"), st.lists(st.integers(0, 2), min_size=1, max_size=5)),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(step, max_size=25), st.integers(1, 6))
def test_any_history_keeps_the_session_true(history: list[tuple[str, list[int]]], window: int) -> None:
    """The committed part is the commits' own text, the cache never holds what is not the prefix, the window holds."""
    session = opened(window)
    committed = list(PROMPT)
    cache: list[int] = []
    for kind, tokens in history:
        if kind == "draft":
            for token in tokens:
                if not session.room:
                    break
                cache = session.prefix.tokens[:]
                session.cached = len(cache)
                session.append(certain(token))
        else:
            if kind == "accept":
                tokens = session.prefix.tokens[session.committed :] + tokens
            again = session.commit(commit(session, *tokens, known=session.committed))
            committed += tokens
            if again is not None:
                assert again.prefix_hash == session.prefix.hashes[again.start]
                assert list(again.tokens) == session.prefix.tokens[again.start :]
        assert session.prefix.tokens[: session.committed] == committed
        assert session.prefix.hashes == TokenPrefix(session.prefix.tokens).hashes
        assert len(session.prefix) - session.committed <= window
        assert cache[: session.cached] == session.prefix.tokens[: session.cached]
        assert session.cached < len(session.prefix), "there is always a token to feed"
