"""`draftwire explain`: what it says of decisions, and of what is not known."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from shared.errors import DraftwireError, SettingsError
from shared.messages import Explanation, Speculation, StepDecision
from shared.settings import load_settings
from tools.explain import explanation_json, fetch, parse_session, print_explanation, reason, summary

# 10 tokens/s, and a further row takes 62 ms, in which 0.62 tokens are made otherwise.
STEP = StepDecision(40, 3000, (0.9, 0.8, 0.5, 0.4), 2, 2, 1, 3, 10.0, 284_000, 346_000, 285_500)
EXPLAINED = Explanation(1, 255, True, Speculation(n_max=16), (STEP, replace(STEP, length=0, n_accepted=0, reach=())))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "the next would bring 0.50 tokens in 62.0 ms, in which 0.62 are made otherwise"),
        ({"length": 0, "reach": (0.1,)}, "the first would bring 0.10 tokens in 62.0 ms, in which 0.62"),
        ({"reach": ()}, "no proposal was there"),
        ({"length": 4}, "all that were there"),
        ({"length": 1}, "the next alone would pay (0.80 tokens"),
    ],
)
def test_a_reason_names_what_was_weighed(changes: dict[str, object], expected: str) -> None:
    assert expected in reason(EXPLAINED, replace(STEP, **changes))  # type: ignore[arg-type]


def test_the_request_s_bounds_are_reasons() -> None:
    bounded = replace(EXPLAINED, speculation=Speculation(n_max=4, n_min=6))
    assert reason(bounded, replace(STEP, length=4)) == "the limit, n_max"
    assert reason(bounded, replace(STEP, length=0)) == "fewer than n_min"


def test_the_summary_counts_steps_and_proposals() -> None:
    text = summary(EXPLAINED)
    assert "Session 00000000000000ff, its last 2 steps: 2 proposals verified, 2 accepted" in text
    assert "0 in 1, 2 in 1" in text
    assert "10.0 tokens/s" in text
    assert "not chosen" in summary(replace(EXPLAINED, adaptive=False))
    assert "p_min = 0.75" in summary(replace(EXPLAINED, speculation=Speculation(p_min=0.75)))


def test_only_the_last_steps_are_shown() -> None:
    console = Console(file=io.StringIO(), width=200, markup=False, highlight=False)
    print_explanation(replace(EXPLAINED, decisions=(replace(STEP, position=1111), STEP)), 1, console)
    assert isinstance(console.file, io.StringIO)
    assert "1111" not in console.file.getvalue()
    assert "346.0" not in console.file.getvalue()
    assert "284.0" in console.file.getvalue()


def test_json_has_every_decision_with_its_reason() -> None:
    value = json.loads(json.dumps(explanation_json(EXPLAINED)))
    assert value["session"] == "00000000000000ff"
    assert [d["reason"] for d in value["decisions"]][1] == "no proposal was there"


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "1" * 17])
def test_what_is_no_session_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="is no session"):
        parse_session(text)


def test_without_a_router_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.explain.ask_router", lambda *_args, **_more: None)
    with pytest.raises(DraftwireError, match="no router answers"):
        fetch(load_settings(None, [f'run_dir="{tmp_path}"'], {}), 0)


def test_a_session_that_nobody_knows_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.explain.ask_router", lambda *_args, **_more: replace(EXPLAINED, decisions=()))
    with pytest.raises(DraftwireError, match="no decisions of session 00000000000000ff"):
        fetch(load_settings(None, [f'run_dir="{tmp_path}"'], {}), 255)
