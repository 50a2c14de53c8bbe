"""Who serves a session: the choice among workers whose figures a test makes up."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.routing.figures import SessionFigures, WorkerFigures
from shared.routing.lookup import LookupFigures
from shared.routing.policy import MARGIN, Asked, Candidate, Choice, Policy, Target, place
from shared.routing.score import step_cost
from shared.speculation.cost import StepCost

NOW = 1000.0


def worker(
    name: str,
    token_s: float | None = None,
    acceptance: float = 0.8,
    *,
    rtt_s: float | None = 0.001,
    prefill: float | None = None,
    others: int = 0,
    slots: int = 4,
    engine: str = "ik",
    at: float = NOW,
) -> Candidate:
    """A worker that was measured at a time, or not at all."""
    figures = WorkerFigures(engine)
    figures.rtt_s = rtt_s
    if token_s is not None:
        figures.drafted(1000, 1000 * token_s, others + 1, at)
        figures.arrived(1000, 1000 * token_s, others + 1, at)
        figures.judged(round(1000 * acceptance), 1000, at)
    if prefill is not None:
        figures.prefilled(20_000, 20_000 / prefill, at)
    return Candidate(name, figures, others, slots)


def policy(explore: float = 0.0) -> Policy:
    return Policy(explore, random.Random(1))


def first(candidates: list[Candidate], asked: Asked | None = None) -> Choice | None:
    return policy().first(asked or Asked(), candidates, NOW)


any_worker = st.builds(
    worker,
    st.sampled_from("abcde"),
    st.sampled_from((None, 0.005, 0.02, 0.2)),
    st.sampled_from((0.0, 0.5, 0.9)),
    rtt_s=st.sampled_from((None, 0.0, 0.05)),
    others=st.integers(0, 3),
    slots=st.integers(0, 3),
)
workers = st.lists(any_worker, max_size=4, unique_by=lambda candidate: candidate.instance)
wanted = st.sampled_from(("auto", "none", "a", "b", "z"))


@settings(deadline=None)
@given(workers, wanted)
def test_the_choice_is_the_best_of_all(candidates: list[Candidate], name: str) -> None:
    """No other allowed worker with a free slot promises more, or the same and is nearer."""
    asked = Asked(name)
    allowed = [c for c in candidates if c.n_slots > c.n_others and name in ("auto", c.instance)]
    choice = first(candidates, asked)
    if not allowed:
        assert choice is None
        return
    assert choice is not None
    chosen = next(c for c in allowed if c.instance == choice.instance)
    for other in allowed:
        mine, theirs = (policy().rate(asked, c, NOW) / asked.plain for c in (chosen, other))
        assert mine > theirs - 0.001
        if mine == theirs and other is not chosen:
            if chosen.figures.rtt_s is None:
                assert other.figures.rtt_s is None, "a measured worker goes before one that is not"
            elif chosen.figures.rtt_s == other.figures.rtt_s:
                assert (chosen.n_others, chosen.instance) < (other.n_others, other.instance)
            elif other.figures.rtt_s is not None:
                assert chosen.figures.rtt_s < other.figures.rtt_s


@settings(deadline=None)
@given(workers, wanted)
def test_the_order_of_the_candidates_does_not_matter(candidates: list[Candidate], name: str) -> None:
    """The same workers give the same choice, however they are listed."""
    assert len({first(list(order), Asked(name)) for order in itertools.permutations(candidates)}) == 1


@settings(deadline=None)
@given(workers, any_worker)
def test_a_move_pays_more_than_the_margin(candidates: list[Candidate], current: Candidate) -> None:
    """A session moves only to a worker with a free slot that promises more than staying, by a margin."""
    asked = Asked(n_tokens=50)
    choice = policy().again(asked, current, candidates, NOW)
    if choice is not None:
        chosen = next(c for c in candidates if c.instance == choice.instance)
        assert chosen.instance != current.instance
        assert chosen.n_others < chosen.n_slots
        assert choice.rate > policy().rate(asked, current, NOW) * (1 + MARGIN)


def test_none_means_none() -> None:
    """A request for plain decoding gets no worker, not even one that is called "none"."""
    assert first([worker("none")], Asked("none")) is None


def test_a_full_worker_is_passed_over() -> None:
    """The best worker is not chosen while all its slots are in use, not even by name."""
    best, other = worker("best", 0.005, 0.95, others=4), worker("other", 0.1, 0.3, slots=1)
    chosen = first([best, other])
    assert chosen is not None
    assert chosen.instance == "other"
    assert first([best, other], Asked("best")) is None


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (worker("z", 0.01, 0.9), worker("a", 0.01, 0.5)),
        (worker("z", 0.01, 0.8), worker("a", 0.2, 0.8)),
        (worker("z", 0.01, 0.8, rtt_s=0.001), worker("a", 0.01, 0.8, rtt_s=0.4)),
        (worker("z", 0.01, 0.9, rtt_s=0.03), worker("a", 0.15, 0.9, rtt_s=0.0001)),
        (worker("z", 0.01, 0.8), worker("a", 0.01, 0.0, engine="garbage")),
        (worker("z", 0.06, 0.8, others=0), worker("a", 0.03, 0.8, others=12, slots=99)),
    ],
    ids=["accepted", "fast", "near", "far but fast", "not garbage", "idle"],
)
def test_the_better_worker_is_chosen(good: Candidate, bad: Candidate) -> None:
    """What is accepted, time a token, round trip and load all count, each in tokens a second."""
    if bad.n_others:
        bad.figures.drafted(100, 100 * 0.25, 13, NOW)
    chosen = first([bad, good])
    assert chosen is not None
    assert chosen.instance == "z"


def test_a_worker_that_reads_slowly_is_not_for_long_prompts() -> None:
    """With nothing to hide it behind, an hour of prefill is worth no draft; for a short prompt it does not matter."""
    slow, weak = worker("slow", 0.005, 0.95, prefill=20), worker("weak", 0.05, 0.7, prefill=5000)
    long, short = Asked(n_tokens=20_000), Asked(n_tokens=20)
    chosen = [first([slow, weak], asked) for asked in (long, short)]
    assert [c.instance for c in chosen if c is not None] == ["weak", "slow"]
    assert policy().again(long, weak, [slow], NOW) is None
    assert policy().again(short, weak, [slow], NOW) is not None


def test_a_move_must_pay_in_what_is_left() -> None:
    """The same move that pays with 500 tokens left does not with 10."""
    near, far = worker("near", 0.2, 0.6), worker("far", 0.005, 0.9, prefill=1000)
    assert policy().again(Asked(n_tokens=3000, tokens_left=500), near, [far], NOW) is not None
    assert policy().again(Asked(n_tokens=3000, tokens_left=10), near, [far], NOW) is None


def test_a_pinned_session_stays() -> None:
    """A request that names a worker is not moved to a better one."""
    assert policy().again(Asked("near"), worker("near", 0.5, 0.1), [worker("far", 0.005, 0.9)], NOW) is None


def test_an_unknown_worker_is_tried_with_one_session_first() -> None:
    """A worker that just joined takes one session over, and the others only when it has been measured."""
    bad = worker("bad", 0.3, 0.3)
    assert policy().again(Asked(), bad, [worker("new")], NOW) is not None
    assert policy().again(Asked(), bad, [worker("new", others=1)], NOW) is None
    assert policy().again(Asked(), bad, [worker("new", 0.01, 0.8, others=1)], NOW) is not None


def test_old_figures_are_tried_again_by_a_share() -> None:
    """A worker that was bad three minutes ago gets about the share of new sessions, one that was bad just now none."""
    good = worker("good", 0.02, 0.6)
    trying = Policy(0.2, random.Random(3))
    choices = [trying.first(Asked(), [good, worker("old", 0.01, 0.2, at=NOW - 180)], NOW) for _ in range(300)]
    tried = [c for c in choices if c is not None and c.trial]
    assert 30 < len(tried) < 90
    assert {c.instance for c in tried} == {"old"}
    fresh = [trying.first(Asked(), [good, worker("new", 0.01, 0.2)], NOW) for _ in range(100)]
    assert not any(c.trial for c in fresh if c is not None)


def test_nothing_is_tried_that_cannot_be_better() -> None:
    """A worker so far away that the best draft would not help is not tried, nor with a session that is almost over."""
    trying = Policy(1.0, random.Random(3))
    good, hopeless = worker("good", 0.02, 0.6), worker("far", rtt_s=30.0)
    choice = trying.first(Asked(), [good, hopeless], NOW)
    assert choice is not None
    assert choice.instance == "good"
    choice = trying.first(Asked(tokens_left=20), [good, worker("old", 0.01, 0.2, at=NOW - 180)], NOW)
    assert choice is not None
    assert choice.instance == "good"


# -- verifiers --


def test_sessions_are_placed_by_load_until_speeds_are_known() -> None:
    """With one verifier silent about its steps, the one with fewest sessions for its slots gets the next."""
    quick = StepCost.linear(0.01, 0.3)
    chosen = place([Target("a", 2, 4, quick), Target("b", 1, 4, None)])
    assert chosen is not None
    assert chosen.instance == "b"
    assert place([]) is None


def test_sessions_are_placed_by_expected_speed() -> None:
    """Of two verifiers the quick one gets sessions until its slots are so shared that the slow one is faster."""
    quick, slow = step_cost([(1, 50_000), (2, 60_000)]), step_cost([(1, 150_000), (2, 200_000)])
    sessions = {"quick": 0, "slow": 0}
    order = []
    for _ in range(8):
        target = place([Target("quick", sessions["quick"], 2, quick), Target("slow", sessions["slow"], 2, slow)])
        assert target is not None
        sessions[target.instance] += 1
        order.append(target.instance)
    assert order[:3] == ["quick"] * 3
    assert sessions["quick"] > sessions["slow"] > 0


# -- prompt lookup beside a model --


def with_text(prompt: list[int], text: list[int]) -> Asked:
    """A session that has read a prompt and written a text."""
    lookup = LookupFigures(prompt)
    for start in range(0, len(text), 3):
        lookup.commit(text[start : start + 3])
    return Asked(figures=SessionFigures(lookup=lookup), n_tokens=len(prompt) + len(text))


def test_lookup_takes_over_where_text_is_copied() -> None:
    """With a model worker of average quality drafting, prompt lookup gets the session once it copies its prompt, and
    gives it back when it does not any more."""
    chance = random.Random(8)
    page, other = ([chance.randrange(8000) for _ in range(600)] for _ in range(2))
    model, lookup = worker("model", 0.02, 0.7), worker("lookup", engine="ngram", slots=256)
    copying, writing = with_text(page, page[:300]), with_text(page, other)
    choice = policy().again(copying, model, [model, lookup], NOW)
    assert choice is not None
    assert choice.instance == "lookup"
    assert policy().again(copying, lookup, [model, lookup], NOW) is None
    assert policy().again(writing, model, [model, lookup], NOW) is None
    choice = policy().again(writing, lookup, [model, lookup], NOW)
    assert choice is not None
    assert choice.instance == "model"


def test_the_way_back_from_lookup_is_counted() -> None:
    """A long text that the model takes minutes to read again stays with it, though it is being copied."""
    chance = random.Random(8)
    page = [chance.randrange(8000) for _ in range(600)]
    copying = with_text(page, page[:300])
    model, lookup = worker("model", 0.02, 0.7), worker("lookup", engine="ngram", slots=256)
    assert policy().again(replace(copying, n_tokens=1000), model, [model, lookup], NOW) is not None
    assert policy().again(replace(copying, n_tokens=10**6), model, [model, lookup], NOW) is None


def test_a_lookup_worker_that_does_not_look_up_is_found_out() -> None:
    """Proposals that are worse than what lookup would have given count against it."""
    chance = random.Random(8)
    page = [chance.randrange(8000) for _ in range(600)]
    asked = with_text(page, page[:300])
    lookup = worker("lookup", engine="ngram")
    before = policy().rate(asked, lookup, NOW)
    asked.figures.judged("lookup", 0, 60, NOW)
    assert before > 1.8 * asked.plain
    assert policy().rate(asked, lookup, NOW) < 1.2 * asked.plain
