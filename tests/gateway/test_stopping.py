"""Stop strings."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.stopping import StopMatcher

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For machines that others use too."""


def cut(text: str, stops: list[str]) -> tuple[str, str]:
    """The text before the earliest occurrence of a stop string, and which one that is (the shorter of two)."""
    found = sorted((text.find(stop), len(stop), stop) for stop in stops if stop in text)
    return (text[: found[0][0]], found[0][2]) if found else (text, "")


def run(chunks: list[str], stops: list[str]) -> tuple[list[str], str]:
    matcher = StopMatcher(stops)
    out = [matcher.feed(chunk) for chunk in chunks]
    return [*out, matcher.finish()], matcher.matched


texts = st.text("abc", max_size=40)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=5), max_size=5)


@unhurried
@given(st.lists(texts, max_size=12), stop_lists)
def test_any_cutting_into_chunks_gives_the_text_before_the_earliest_stop_string(
    chunks: list[str], stops: list[str]
) -> None:
    """What comes out does not depend on how the text was cut into chunks."""
    out, matched = run(chunks, stops)
    assert ("".join(out), matched) == cut("".join(chunks), stops)


@unhurried
@given(texts, stop_lists)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    """After each character, what is held back is shorter than the longest stop string, unless an earlier one waits."""
    matcher = StopMatcher(stops)
    sent = ""
    for at, character in enumerate(text, 1):
        sent += matcher.feed(character)
        if matcher.matched:
            break
        held = text[len(sent) : at]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_text_flows_at_once_when_it_cannot_be_a_stop_string() -> None:
    """Only a suffix that begins a stop string waits for more."""
    matcher = StopMatcher(["###"])
    assert matcher.feed("one #") == "one "
    assert matcher.feed("two") == "#two"
    assert matcher.feed("##") == ""
    assert matcher.feed("# three") == ""
    assert matcher.matched == "###"
    assert matcher.feed("more") == ""
    assert matcher.finish() == ""


@pytest.mark.parametrize(
    ("text", "expected"), [("xabcd", ("xa", "bc")), ("xabce", ("x", "abce")), ("xabc", ("xa", "bc"))]
)
def test_a_stop_string_waits_for_one_that_began_before_it(text: str, expected: tuple[str, str]) -> None:
    """The earliest beginning wins, even if it is completed later; else the other one stands."""
    out, matched = run(list(text), ["bc", "abce"])
    assert ("".join(out), matched) == expected


def test_a_text_that_ends_inside_a_stop_string_is_kept() -> None:
    """What was held back belongs to the text when it ends."""
    assert run(["ab", "c#", "#"], ["###"]) == (["ab", "c", "", "##"], "")
