"""What one forward pass computes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.verifier.policy import Ready, Share, plan, speculation_length

N_MAX = 4


def ready(pending: int, cached: int = 0, n_proposals: int = 0, n_max: int = N_MAX, n_left: int = 100) -> Ready:
    return Ready(pending, cached, n_proposals, n_max, n_left)


any_ready = st.builds(
    Ready, st.one_of(st.just(1), st.integers(1, 60)), st.integers(0, 60), st.integers(0, 9), st.integers(0, N_MAX),
    st.integers(1, 8),
)  # fmt: skip


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Ready], int, int]:
    """Sessions, n_batch and prefill_chunk, sized as the verifier sizes them: every decoder and one chunk fit."""
    sessions = draw(st.lists(any_ready, min_size=1, max_size=6))
    chunk = draw(st.integers(1, 20))
    return sessions, len(sessions) * (N_MAX + 1) + chunk + draw(st.integers(0, 9)), chunk


@given(any_ready)
def test_speculation_length_keeps_every_limit(session: Ready) -> None:
    """What has arrived, within n_max, and never past the last token wanted (the target's own is always one)."""
    length = speculation_length(session)
    assert 0 <= length <= min(session.n_proposals, session.n_max)
    assert length + 1 <= session.n_left
    assert length == min(session.n_proposals, session.n_max) or length + 1 == session.n_left


@settings(max_examples=300)
@given(situations())
def test_a_step_keeps_its_promises(situation: tuple[list[Ready], int, int]) -> None:
    """Never more rows than n_batch; every decoder takes part in full; prompts are cut at multiples of the chunk."""
    sessions, n_batch, chunk = situation
    shares = plan(sessions, n_batch, chunk)
    assert len(shares) == len(sessions)
    assert sum(share.pending + share.n_proposals for share in shares) <= n_batch
    assert any(share.pending for share in shares)
    for session, share in zip(sessions, shares, strict=True):
        assert 0 <= share.pending <= session.pending
        assert 0 <= share.n_proposals <= speculation_length(session)
        assert share.final == (share.pending == session.pending)
        if not share.final:
            assert share.n_proposals == 0
            assert share.pending <= chunk
            assert share.pending == 0 or (session.cached + share.pending) % chunk == 0
        if session.pending == 1:
            assert share == Share(1, speculation_length(session), True)


@settings(max_examples=200)
@given(situations())
def test_no_session_starves(situation: tuple[list[Ready], int, int]) -> None:
    """Planned again and again while others go on decoding, every prompt is finished in bounded time."""
    sessions, n_batch, chunk = situation
    steps = sum((s.cached % chunk + s.pending) // chunk + 1 for s in sessions)
    cuts: list[set[int]] = [set() for _ in sessions]
    for _ in range(steps):
        shares = plan(sessions, n_batch, chunk)
        for i, (session, share) in enumerate(zip(sessions, shares, strict=True)):
            if share.final:
                sessions[i] = replace(session, pending=1, cached=session.cached + share.pending)
            elif share.pending:
                cuts[i].add(session.cached + share.pending)
                sessions[i] = replace(
                    session, pending=session.pending - share.pending, cached=session.cached + share.pending
                )
    assert all(session.pending == 1 for session in sessions)
    assert all(cut % chunk == 0 for session_cuts in cuts for cut in session_cuts)


def test_the_cuts_of_a_prompt_do_not_depend_on_company() -> None:
    """A prompt is computed in the same pieces alone and beside decoding sessions."""
    alone, crowded = [], []
    for cuts, company in ((alone, []), (crowded, [ready(1, 50, 4), ready(1, 60, 2)])):
        session = ready(50, 3)
        while True:
            share = plan([*company, session], 40, 16)[-1]
            if share.pending:
                cuts.append(share.pending)
            if share.final:
                break
            session = replace(session, pending=session.pending - share.pending, cached=session.cached + share.pending)
    assert alone == crowded == [13, 16, 16, 5]


def test_decoding_goes_before_prompts() -> None:
    """When not everything fits, clients that already read are served; the prompt waits whole."""
    prompt, decoder = ready(20), ready(1, 7, 4)
    assert plan([prompt, decoder], 20, 16) == [Share(0, 0, False), Share(1, 4, True)]
    assert plan([prompt, decoder], 21, 16) == [Share(16, 0, False), Share(1, 4, True)]


def test_proposals_give_way_when_room_is_short() -> None:
    """A decoder's proposals are cut to the room that is left; its committed token is not."""
    assert plan([ready(1, 5, 4), ready(1, 5, 4)], 7, 1) == [Share(1, 4, True), Share(1, 1, True)]
    assert plan([ready(1, 5, 4), ready(1, 5, 4)], 6, 1) == [Share(1, 4, True), Share(1, 0, True)]


def test_the_end_of_a_prompt_verifies_nothing() -> None:
    """A prompt's last piece gets its row alone; the proposals that have arrived wait for the next step."""
    assert plan([ready(10, 0, 3)], 64, 16) == [Share(10, 0, True)]


def test_nobody_asks_for_nothing() -> None:
    """Without sessions there is nothing to plan; with n_max 0 or one token left there is no speculation."""
    assert plan([], 10, 4) == []
    assert plan([ready(1, 5, 4, n_max=0), ready(1, 5, 4, n_left=1)], 10, 4) == [Share(1, 0, True)] * 2
