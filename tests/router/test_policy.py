"""Which draft worker serves a session."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from services.router.policy import Worker, choose

any_worker = st.builds(
    Worker, st.sampled_from("abcde"), st.one_of(st.none(), st.integers(0, 3)), st.integers(0, 3), st.integers(0, 3)
)
workers = st.lists(any_worker, max_size=5, unique_by=lambda worker: worker.instance)
wanted = st.sampled_from(("auto", "none", "a", "b", "z"))


@given(workers, wanted)
def test_the_choice_is_the_best_of_all(candidates: list[Worker], name: str) -> None:
    """No other allowed worker with a free slot is nearer, as near and less busy, or as busy and before it by name."""
    allowed = [w for w in candidates if w.n_slots > w.n_sessions and name in ("auto", w.instance)]
    chosen = choose(candidates, name)
    if not allowed:
        assert chosen is None
        return
    assert chosen in allowed
    for other in allowed:
        if other == chosen:
            continue
        if chosen.rtt_us is None:
            assert other.rtt_us is None, "a measured worker goes before one that is not"
        if chosen.rtt_us == other.rtt_us:
            assert chosen.n_sessions <= other.n_sessions
            assert chosen.n_sessions < other.n_sessions or chosen.instance < other.instance
        elif other.rtt_us is not None:
            assert chosen.rtt_us is not None
            assert chosen.rtt_us < other.rtt_us


@given(workers, wanted)
def test_the_order_of_the_candidates_does_not_matter(candidates: list[Worker], name: str) -> None:
    """The same workers give the same choice, however they are listed."""
    assert len({choose(order, name) for order in itertools.permutations(candidates)}) == 1


def test_none_means_none() -> None:
    """A request for plain decoding gets no worker, not even one that is called "none"."""
    assert choose([Worker("none", 1, 0, 4)], "none") is None


def test_a_full_worker_is_passed_over() -> None:
    """The nearest worker is not chosen while all its slots are in use, not even by name."""
    near, far = Worker("near", 1, 4, 4), Worker("far", 900, 0, 1)
    assert choose([near, far], "auto") is far
    assert choose([near, far], "near") is None
