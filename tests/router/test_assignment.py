"""One worker's work for a session: what it teaches of the worker, and when the worker owes a proposal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.router.assignment import Assignment
from shared.messages import Commit, Proposal
from shared.prefix import TokenPrefix
from shared.routing.figures import WorkerFigures

WINDOW = 4
PROMPT = list(range(50))


def proposal(text: list[int], *tokens: int, **costs: int) -> Proposal:
    return Proposal(1, len(text), TokenPrefix(text).hash, tokens, **costs)


def commit(text: list[int], *tokens: int) -> Commit:
    return Commit(1, len(text), TokenPrefix(text).hash, tokens, 0, len(text) + len(tokens))


def started(engine: str = "ik", n_ctx: int = 0, stop: tuple[int, ...] = ()) -> tuple[WorkerFigures, Assignment]:
    """A worker that was measured before, with a new session since 0 seconds."""
    figures = WorkerFigures(engine)
    figures.judged(9, 10, 0.0)
    figures.drafted(100, 1.0, 1, 0.0)
    figures.prefilled(5000, 5.0, 0.0)
    return figures, Assignment(figures, len(PROMPT), WINDOW, n_ctx, stop, 0.0)


def test_a_worker_with_room_owes_a_proposal() -> None:
    """Silence beyond its patience is overdue, in spite of commits that go on; a proposal ends it."""
    _, work = started()
    text = list(PROMPT)
    for second in range(1, 5):
        work.commit(commit(text, 7), float(second))
        text.append(7)
    assert work.overdue_s(1, 0, 1.0) == 0
    assert work.overdue_s(1, 0, 4.0) == 4.0
    work.propose(proposal(text, 8), 1, 4.5)
    assert work.overdue_s(1, 0, 5.0) == 0
    assert work.overdue_s(1, 0, 9.0) == 4.5


def test_a_worker_without_room_owes_nothing() -> None:
    """With a full window, a stop token drafted, its context full or no model, silence is right."""
    for work, tokens in (
        (started()[1], (7, 7, 7, 7)),
        (started(stop=(9,))[1], (9,)),
        (started(n_ctx=len(PROMPT) + WINDOW + 1)[1], (7,)),
        (started("ngram")[1], (7,)),
    ):
        work.propose(proposal(PROMPT, *tokens), 1, 1.0)
        assert work.overdue_s(1, 0, 1000.0) == 0


def test_a_worker_may_wait_for_the_verdict_on_what_is_hopeless() -> None:
    """As long as something of that is undecided; then it has to begin anew."""
    _, work = started()
    doubtful = replace(proposal(PROMPT, 7, 7), confidence=(0.05, 0.1))
    work.propose(doubtful, 1, 1.0)
    work.commit(commit(PROMPT, 7), 20.0)
    assert work.overdue_s(1, 0, 40.0) == 0
    work.commit(commit([*PROMPT, 7], 8), 50.0)
    assert work.overdue_s(1, 0, 51.0) == 0
    assert work.overdue_s(1, 0, 60.0) == 10.0


def test_what_its_cache_has_no_room_for_is_not_owed() -> None:
    """A session that outgrows it while it is still reading is no reason to call it silent."""
    _, work = started(n_ctx=len(PROMPT) + WINDOW + 2)
    assert work.overdue_s(1, 0, 9.0) == 9.0
    text = list(PROMPT)
    for second in range(3):
        work.commit(commit(text, 7), float(second))
        text.append(7)
    assert work.overdue_s(1, 0, 30.0) == 0


def test_proposals_sent_again_leave_a_hopeless_run_hopeless() -> None:
    _, work = started()
    work.propose(replace(proposal(PROMPT, 7, 7, 7), confidence=(0.05, 0.1, 0.9)), 1, 1.0)
    work.propose(replace(proposal([*PROMPT, 7], 7, 7), confidence=(0.1, 0.9)), 1, 2.0)
    assert work.overdue_s(1, 0, 100.0) == 0


def test_a_pass_that_has_begun_is_allowed_for_after_its_session_has_gone() -> None:
    """It reads a long prompt of another session, which is then cancelled: it cannot stop in the middle."""
    _, work = started()
    assert work.overdue_s(2, 8000, 5.0) == 0
    assert work.overdue_s(1, 0, 10.0) == 0
    assert work.overdue_s(1, 0, 60.0) == 60.0


def test_room_that_a_commit_makes_is_to_be_used() -> None:
    _, work = started()
    work.propose(proposal(PROMPT, 7, 7, 7, 7), 1, 1.0)
    work.commit(commit(PROMPT, 7), 50.0)
    assert work.overdue_s(1, 0, 51.0) == 0
    assert work.overdue_s(1, 0, 60.0) == 10.0


def test_going_on_against_a_commit_answers_nothing() -> None:
    """A worker that does not hear of what contradicts it is as good as silent."""
    _, work = started()
    work.propose(proposal(PROMPT, 7), 1, 1.0)
    work.commit(commit(PROMPT, 8), 2.0)
    own = [*PROMPT, 7]
    for second in range(3, 5):
        assert not work.propose(proposal(own, 7), 1, float(second)).offence
        own.append(7)
    assert work.overdue_s(1, 0, 6.0) == 5.0


def test_reading_takes_its_time() -> None:
    """A long prompt is waited for, longer where nothing is known of how fast the worker reads, or of anything."""
    _, known = started()
    assert known.overdue_s(1, 1000, 5.9) == 0
    assert known.overdue_s(1, 1000, 6.5) == 6.5
    figures = WorkerFigures("ik")
    figures.judged(9, 10, 0.0)
    assert Assignment(figures, 1000, WINDOW, 0, (), 0.0).overdue_s(1, 1000, 50.0) == 0
    assert Assignment(WorkerFigures("ik"), 50, WINDOW, 0, (), 0.0).overdue_s(1, 0, 60.0) == 0


def test_the_spacing_of_arrivals_counts_while_nothing_holds_the_worker_up() -> None:
    """It says that a token takes a millisecond, and they come every 100: believed is the latter. A window that was full
    is no pause of the worker."""
    figures, work = started()
    text = list(PROMPT)
    for i in range(60):
        work.propose(proposal(text, 7, decode_us=1000), 1, 0.1 * i)
        work.commit(commit(text, 7), 0.1 * i + 0.05)
        text.append(7)
    assert 0.08 < figures.token_s(1, 6.0) < 0.11
    figures, work = started()
    text = list(PROMPT)
    for i in range(20):
        work.propose(proposal(text, 7, 7, 7, 7, decode_us=40_000), 1, 5.0 * i)
        work.commit(commit(text, 7, 7, 7, 7), 5.0 * i + 4)
        text += [7] * 4
    assert figures.token_s(1, 100.0) < 0.012


def test_prefill_is_learned_from_the_first_proposal_alone() -> None:
    figures, work = WorkerFigures("ik"), None
    work = Assignment(figures, len(PROMPT), WINDOW, 0, (), 0.0)
    work.propose(proposal(PROMPT, 7, prefill_us=500_000, n_prefilled=len(PROMPT)), 1, 1.0)
    before = figures.prefill_s(1000, 1.0)
    work.propose(proposal([*PROMPT, 7], 7, prefill_us=900_000, n_prefilled=len(PROMPT)), 1, 2.0)
    assert figures.has_prefilled()
    assert before > 2
    assert abs(figures.prefill_s(1000, 1.0) - before) < 0.1


def test_what_a_cache_still_held_was_not_read() -> None:
    """A worker that gets a session back reads its end alone: that says what a token costs, not what the session does;
    nor can it have read more than it was given."""
    figures = WorkerFigures("ik")
    Assignment(figures, 20_000, 32, 0, (), 0.0).propose(
        Proposal(1, 20_000, 5, (7,), prefill_us=20_000_000, n_prefilled=20_000), 1, 20.0
    )
    before = figures.prefill_s(20_000, 20.0)
    for n_prefilled in (150, 20, 10**6):
        Assignment(figures, 20_000, 32, 0, (), 30.0).propose(
            Proposal(1, 20_000, 5, (7,), prefill_us=1000 * min(n_prefilled, 20_000), n_prefilled=n_prefilled), 1, 31.0
        )
    assert figures.prefill_s(20_000, 31.0) == pytest.approx(before, rel=0.02)
