"""The shadow of the n-gram worker: what it says of a text is what the n-gram worker would have done with it."""

from __future__ import annotations

import random
from dataclasses import astuple

import pytest

from shared.engine.ngram import propose
from shared.routing.lookup import PRIOR, LookupFigures


def read(figures: LookupFigures, tokens: list[int], at_a_time: int = 2) -> None:
    for start in range(0, len(tokens), at_a_time):
        figures.commit(tokens[start : start + at_a_time])


def test_before_anything_is_known_it_says_the_prior() -> None:
    shares = LookupFigures([]).shares()
    assert (shares.coverage, shares.first, shares.further) == pytest.approx(
        (PRIOR.coverage, PRIOR.first, PRIOR.further)
    )


def test_a_copied_text_is_recognized() -> None:
    """A text that repeats its prompt is foretold almost everywhere."""
    chance = random.Random(2)
    page = [chance.randrange(8000) for _ in range(400)]
    figures = LookupFigures(page)
    read(figures, page)
    shares = figures.shares()
    assert min(shares.coverage, shares.first, shares.further) > 0.85


def test_a_text_that_repeats_nothing_is_recognized() -> None:
    chance = random.Random(2)
    figures = LookupFigures([chance.randrange(8000) for _ in range(400)])
    read(figures, [chance.randrange(8000) for _ in range(400)])
    assert figures.shares().coverage < 0.1


@pytest.mark.parametrize("n", [200, 600, 1024, 1025, 2048, 2060, 8000])
def test_a_prompt_that_ends_as_a_copy_is_recognized(n: int) -> None:
    """Once it is read, and before much is written: one that repeats itself promises a copy, one that does not promises
    less than usual; what is written then soon counts for more."""
    chance = random.Random(2)
    page, other = ([chance.randrange(8000) for _ in range(n)] for _ in range(2))
    half = page[: n // 2]
    copying, writing = LookupFigures([*half, *half]), LookupFigures(page)
    for figures, text in ((copying, half), (writing, other)):
        at = 0
        while figures.shares().weight < 9:
            figures.commit(text[at : at + 1])
            at += 1
        assert at <= 8192 / 1024
    assert min(astuple(copying.shares())[:3]) > 0.75
    assert writing.shares().coverage < 0.2
    read(copying, other[:60])
    assert copying.shares().coverage < 0.25


def test_its_shares_are_those_of_looking_up() -> None:
    """On a text of few words, coverage and first match a count of what the definition of lookup proposes."""
    chance = random.Random(4)
    prompt, text = ([chance.choice((1, 2, 3, 4, 5)) for _ in range(n)] for n in (10, 300))
    figures = LookupFigures(prompt)
    read(figures, text)
    whole = prompt + text
    last = range(len(whole) - 60, len(whole))  # three times what is remembered
    proposed = [propose(whole[:end], 1) for end in last]
    hits = [p == whole[end : end + 1] for end, p in zip(last, proposed, strict=True)]
    shares = figures.shares()
    assert shares.coverage == pytest.approx(sum(map(bool, proposed)) / len(proposed), abs=0.15)
    assert shares.first == pytest.approx(sum(hits) / sum(map(bool, proposed)), abs=0.15)


def test_a_long_prompt_is_read_in_pieces() -> None:
    """Neither the first call nor a commit reads more than a piece, and of a huge prompt only the end is read."""
    figures = LookupFigures(list(range(100_000)))
    calls = 1
    while figures.shares().weight == 0:
        figures.commit((1,))
        calls += 1
    assert 8192 / 1024 <= calls <= 8192 / 1024 + 1
