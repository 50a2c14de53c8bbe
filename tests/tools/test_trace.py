"""`draftwire trace`: from what processes answer to trace events, and what it says of what is missing."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from shared.clock import ClockMap, Estimate
from shared.errors import DraftwireError
from shared.messages import Trace
from shared.settings import load_settings
from shared.trace import MARKS
from tools.trace import MAX_NS, Collected, Moment, Part, _noted, _part, arrows, collect, print_collected, trace_json

SESSION = 0xABC
AHEAD_NS, UNSURE_NS = 10**13, 700
"""How far the draft worker's clock is ahead in these tests, and how well that is known."""

Row = tuple[str, int, int, int, int, int]
"""Name, begin and duration in nanoseconds, 1 if of the session, position, first number."""


def answer(role: str, rows: Sequence[Row], instance: str = "", ahead_ns: int = 0, **fields: Any) -> Trace:
    kinds = tuple(MARKS)
    marks = [
        (begin + ahead_ns, duration, kinds.index(name), 0, own, position, n, 0, 0)
        for name, begin, duration, own, position, n in rows
    ]
    values = {
        "ref": 1, "role": role, "instance": instance or role, "pid": 12, "host": "box", "clock": "here",
        "now_ns": 10**12, "kinds": kinds, "threads": ("event loop",),
        "marks": np.array(marks, np.int64).reshape(len(marks), 9), "n_cut": 0, "oldest_ns": 0,
    }  # fmt: skip
    return Trace(**{**values, **fields})


def part(role: str, rows: Sequence[Row]) -> Part:
    """Of a process on the router's clock, or of a worker that is far away."""
    if role == "draft":
        trace = answer(role, rows, "far", AHEAD_NS, clock="there")
        return _part(trace, [Estimate(500, AHEAD_NS, UNSURE_NS)], "here")
    return _part(answer(role, rows), [], "here")


def one_round() -> list[Part]:
    """A commit at 3, two proposals after it, the first of which arrives in time."""
    return [
        part("router", [
            ("router.commit", 1200, 50, 1, 3, 1), ("router.proposal", 2000, 20, 1, 4, 2),
            ("router.proposal", 9000, 20, 1, 6, 1),
        ]),
        part("draft", [
            ("draft.commit", 1300, 10, 1, 3, 1), ("draft.proposal", 1800, 30, 1, 4, 2),
            ("draft.proposal", 8800, 30, 1, 6, 1),
        ]),
        part("verifier", [
            ("verifier.commit", 1100, 20, 1, 3, 1), ("verifier.proposal", 2100, 5, 1, 4, 2),
            ("verifier.step", 2900, 5000, 0, 0, 0), ("verifier.round", 3000, 4000, 1, 4, 2),
            ("verifier.proposal", 9100, 5, 1, 6, 1),
        ]),
    ]  # fmt: skip


def starts(moments: Sequence[Moment]) -> list[tuple[str, int]]:
    return [(moment.name, moment.begin_ns) for moment in moments]


def test_arrows_lead_from_proposals_to_their_round_and_from_commits_to_the_worker() -> None:
    """Across clocks; a proposal that was never verified ends where it arrived."""
    found = {(kind, path[0].position): starts(path) for kind, path in arrows(one_round())}
    assert found == {
        ("proposal", 4): [
            ("draft.proposal", 1800), ("router.proposal", 2000), ("verifier.proposal", 2100), ("verifier.round", 3000),
        ],
        ("proposal", 6): [("draft.proposal", 8800), ("router.proposal", 9000), ("verifier.proposal", 9100)],
        ("commit", 3): [("verifier.commit", 1100), ("router.commit", 1200), ("draft.commit", 1300)],
    }  # fmt: skip


def test_of_proposals_for_the_same_position_the_last_one_is_what_a_round_verified() -> None:
    rows = [("verifier.proposal", at, 5, 1, 4, 2) for at in (10, 20, 99)]
    sent = [("router.proposal", at, 1, 1, 4, 2) for at in (5, 15, 90)]
    drafted = [("draft.proposal", at, 1, 1, 4, 2) for at in (2, 12, 80)]
    parts = [
        part("verifier", [*rows, ("verifier.round", 50, 9, 1, 4, 1)]),
        part("router", sent),
        part("draft", drafted),
    ]
    paths = [starts(path) for _, path in arrows(parts)]
    assert [path[-1] for path in paths] == [
        ("verifier.proposal", 10),
        ("verifier.round", 50),
        ("verifier.proposal", 99),
    ]


def test_events_are_in_chrome_s_format() -> None:
    """On one clock, in microseconds from the session's first mark, with names for processes and threads."""
    value = json.loads(json.dumps(trace_json(Collected(SESSION, tuple(one_round()), (("sampler", "silent"),)))))
    events = value["traceEvents"]
    (first,) = [e for e in events if e["name"] == "commit" and e.get("cat") == "verifier"]
    assert (first["ph"], first["ts"], first["dur"]) == ("X", 0.0, 0.02)
    assert first["args"] == {"position": 3, "tokens": 1, "accepted": 0}
    (drafted,) = [e for e in events if e.get("cat") == "draft" and e["ts"] == 0.7]
    assert drafted["name"] == "proposal"
    (step,) = [e for e in events if e["name"] == "step"]
    assert step["args"] == {}
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {1: "router (12 on box)", 2: "draft far (12 on box)", 3: "verifier (12 on box)"}
    assert value["otherData"]["session"] == "0000000000000abc"
    assert value["otherData"]["missing"] == [{"name": "sampler", "reason": "silent"}]
    draft = value["otherData"]["processes"][1]
    assert (draft["same_clock"], draft["offset_us"], draft["uncertainty_us"]) == (False, AHEAD_NS / 1000, 0.7)


def test_the_table_says_how_well_clocks_are_known_and_who_is_missing() -> None:
    console = Console(file=io.StringIO(), width=200, markup=False, highlight=False)
    parts = tuple(_noted(p, 0) for p in one_round())
    print_collected(Collected(SESSION, parts, (("draft [red]x", "it is not connected"),)), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "10,000.000000 s" in text
    assert "1 us" in text
    assert "the same clock" in text
    assert "draft [red]x" in text
    assert "it is not connected" in text


@pytest.mark.parametrize(
    "row",
    [
        (1, 1, 999, 0, 1, 1, 1, 1, 1),
        (1, 1, -1, 0, 1, 1, 1, 1, 1),
        (1, 1, list(MARKS).index("draft.keep"), 5, 1, 1, 1, 1, 1),
        (1, -5, list(MARKS).index("draft.keep"), 0, 1, 1, 1, 1, 1),
        (MAX_NS + 1, 5, list(MARKS).index("draft.keep"), 0, 1, 1, 1, 1, 1),
        # A worker that claims to be the verifier, with a proposal that would take for ever to follow.
        (1, 1, list(MARKS).index("verifier.proposal"), 0, 1, 1, 2**62, 1, 1),
    ],
)
def test_marks_that_make_no_sense_are_left_out_and_counted(row: tuple[int, ...]) -> None:
    good = (5, 1, list(MARKS).index("draft.keep"), 0, 1, 1, 1, 1, 1)
    bad = answer("draft", [], "far", marks=np.array([row, good], np.int64))
    found = _part(bad, [], "here")
    assert [moment.name for moment in found.moments] == ["draft.keep"]
    assert found.notes == ("1 marks make no sense",)


def test_marks_of_another_shape_are_left_out() -> None:
    found = _part(answer("draft", [], marks=np.ones((3, 2), np.int64)), [], "here")
    assert not found.moments
    assert found.notes


def test_what_a_process_no_longer_has_is_said() -> None:
    rows: list[Row] = [("verifier.commit", 1100, 20, 1, 3, 1)]
    cases = {
        "its oldest marks were overwritten": answer("verifier", rows, oldest_ns=1000),
        "its 4 oldest marks did not fit into the answer": answer("verifier", rows, n_cut=4),
        "it has recorded nothing of the session: restarted since?": answer("verifier", []),
    }
    for note, trace in cases.items():
        assert _noted(_part(trace, [], "here"), 900).notes == (note,)
    assert _noted(_part(answer("verifier", rows, oldest_ns=800), [], "here"), 900).notes == ()
    assert _noted(Part("tokenizer", answer("tokenizer", []), ClockMap(()), True, ()), 900).notes == ()


def test_without_a_router_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(DraftwireError, match="no router answers"):
        collect(load_settings(None, [f'run_dir="{tmp_path}"'], {}), 0, timeout_s=0.1)
