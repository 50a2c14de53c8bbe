"""Prompt lookup: the definition, and the index that answers like it under any extends and rollbacks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.engine.ngram import NgramIndex, propose


def test_proposes_what_followed_last_time() -> None:
    """The tokens after the earlier occurrence of the sequence's end are proposed."""
    assert propose([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]


def test_the_longest_match_wins_over_a_later_one() -> None:
    """A three-token match beats a two-token match that is more recent."""
    assert propose([1, 2, 3, 70, 9, 2, 3, 80, 1, 2, 3], 1) == [70]


def test_of_equal_matches_the_latest_wins() -> None:
    """Text tends to follow its most recent pattern."""
    assert propose([1, 2, 70, 5, 1, 2, 80, 6, 1, 2], 1) == [80]


def test_no_match_proposes_nothing() -> None:
    """Neither does a match shorter than min_ngram, nor a sequence too short to repeat anything."""
    assert propose([1, 2, 3, 4], 4) == []
    assert propose([7, 1, 8, 1], 4) == []
    assert propose([7, 1, 8, 1], 2, min_ngram=1) == [8, 1]
    assert propose([], 4) == []
    assert propose([5], 4, min_ngram=1) == []


def test_a_loop_is_continued_as_a_loop() -> None:
    """Where the copied text reaches the end of the sequence it goes on through the proposal."""
    assert propose([9, 1, 2, 3, 1, 2, 3], 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert propose([4, 4, 4], 3) == [4, 4, 4]


def test_asking_for_none_gives_none() -> None:
    """n = 0 is a valid question."""
    index = NgramIndex()
    index.extend([1, 2, 1, 2])
    assert index.propose(0) == propose([1, 2, 1, 2], 0) == []


def test_bad_lengths_are_refused() -> None:
    """Truncating beyond the sequence, or n-grams of no length, are errors."""
    index = NgramIndex()
    index.extend([1, 2])
    for length in (3, -1):
        with pytest.raises(ValueError, match="length"):
            index.truncate(length)
    for max_ngram, min_ngram in ((3, 0), (2, 3)):
        with pytest.raises(ValueError, match="n-gram"):
            NgramIndex(max_ngram, min_ngram)
    assert list(index.tokens) == [1, 2]


tokens = st.lists(st.integers(0, 2), max_size=12)


@given(
    st.integers(1, 3).flatmap(lambda low: st.tuples(st.just(low), st.integers(low, 5))),
    st.lists(st.one_of(tokens, st.integers(0, 20)), max_size=20),
)
def test_the_index_answers_like_a_scan(lengths: tuple[int, int], steps: list) -> None:
    """After any extends and truncates, the index proposes what a scan of the whole sequence does."""
    min_ngram, max_ngram = lengths
    index = NgramIndex(max_ngram, min_ngram)
    sequence: list[int] = []
    for step in steps:
        if isinstance(step, int):
            step = min(step, len(sequence))
            del sequence[step:]
            index.truncate(step)
        else:
            sequence += step
            index.extend(step)
        assert list(index.tokens) == sequence
        assert len(index) == len(sequence)
        for n in (1, 3, 8):
            assert index.propose(n) == propose(sequence, n, max_ngram, min_ngram)


@given(tokens, tokens, st.integers(0, 12))
def test_rollback_leaves_nothing_behind(kept: list[int], dropped: list[int], n: int) -> None:
    """Tokens that were rolled back are never proposed from: the index equals one that never saw them."""
    index, fresh = NgramIndex(), NgramIndex()
    index.extend(kept)
    index.extend(dropped)
    index.truncate(len(kept))
    fresh.extend(kept)
    assert index.propose(n) == fresh.propose(n)
    index.extend(dropped)
    fresh.extend(dropped)
    assert index.propose(n) == fresh.propose(n)
