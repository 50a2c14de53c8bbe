"""What the demo says about its completions, and how text is shown."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from shared.settings import load_settings
from tools.bench_speculation import SceneResult
from tools.bench_speculation_figures import STAGES, Overruns, Record
from tools.bench_speculation_scenes import Scene
from tools.demo import Completion, _sameness, _table, scene_lines
from tools.generate import TextWriter, figures_line, printable


def completion(text: str, per_second: float, accepted: int = 0, proposed: int = 0, length: float = 1.0) -> Completion:
    return Completion(
        text,
        {
            "timings": {
                "predicted_n": len(text),
                "predicted_per_second": per_second,
                "draft_n": proposed,
                "draft_n_accepted": accepted,
            },
            "draftwire": {
                "rounds": 5,
                "mean_acceptance_length": length,
                "stages_ms": {stage: float(number) for number, stage in enumerate(STAGES)},
            },
        },
    )


def rendered(plain: list[Completion], speculative: list[Completion]) -> list[list[str]]:
    """The table's rows as lists of their cells."""
    console = Console(file=io.StringIO(), width=100, no_color=True)
    console.print(_table(plain, speculative))
    output = console.file.getvalue()  # type: ignore[attr-defined]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]


def test_table_shows_medians_side_by_side() -> None:
    """Figures are medians of the repeats, the speed-up that of the medians; the acceptance rate pools all proposals."""
    plain = [completion("abc", 100.0), completion("abc", 300.0), completion("abc", 200.0)]
    fast = [
        completion("abc", 300.0, 1, 1, 2.0),
        completion("abc", 900.0, 0, 0, 4.0),
        completion("abc", 400.0, 5, 9, 3.0),
    ]
    rows = rendered(plain, fast)
    assert ["tokens/s", "200.0", "400.0"] in rows
    assert ["speed-up", "1.00x", "2.00x"] in rows
    assert ["acceptance rate", "-", "60.0 % (6 of 10)"] in rows
    assert ["mean acceptance length", "1.00", "3.00"] in rows
    assert ["verify ms", "4.0", "4.0"] in rows


def test_table_without_a_verified_proposal_claims_no_rate() -> None:
    """Drafts that always came too late have no acceptance rate, not one of 0 %."""
    rows = rendered([completion("abc", 100.0)], [completion("abc", 100.0)])
    assert ["acceptance rate", "-", "no proposals"] in rows


def test_table_without_speculation_has_one_column() -> None:
    """With no draft there is nothing to compare."""
    rows = rendered([completion("abc", 100.0)], [])
    assert ["tokens/s", "100.0"] in rows
    assert not any(row[0] == "speed-up" for row in rows)


def test_equal_texts_are_said_to_be_equal() -> None:
    """All completions, of both kinds, count."""
    assert "identical in all 3" in _sameness(
        [completion("a", 1)], [completion("a", 1), completion("a", 1)], "ik", False
    )


def test_a_flip_is_explained_where_the_engine_allows_one() -> None:
    """With an engine that is not row-invariant, the place is named and the reason given."""
    line = _sameness([completion("abcd", 1)], [completion("abXd", 1)], "ik", False)
    assert line.startswith("1 of 2 texts equal the first plain one; one leaves it after 2 characters. The ik engine's")
    assert "identical" not in line


def test_a_flip_is_not_excused_where_the_engine_forbids_it() -> None:
    """With a row-invariant engine, texts that differ are called just that."""
    line = _sameness([completion("abcd", 1)], [completion("abXd", 1)], "numpy", True)
    assert line == "The texts differ: only 1 of 2 equal the first plain one."


# --- the emulated machine ---------------------------------------------------------------------------------------------


def scene_result(text: str, overruns: tuple[Overruns, ...] = ()) -> SceneResult:
    """A plain completion of 4 tokens in 2 s, and a speculative one, of the text's letters, in 1 s."""

    def record(policy: str, tokens: str, seconds: float, proposed: int) -> Record:
        return Record(
            *("s", policy, 0, 0, 0, (1,), tuple(map(ord, tokens)), 0, 0.0, 40, 0.95, 0.05, "coupled", 0),
            *(len(tokens) / seconds, 1.0, (), 2, proposed, max(0, proposed - 1), (), 0, 0, "", {}),
            turn_busy_s=seconds,
            turn_tokens=len(tokens),
        )

    records = (record("plain", "abcd", 2.0, 0), record("adaptive", text, 1.0, 3))
    return SceneResult(
        Scene("s", ""), 1.0, 1, 4, 1, "emulated (ik)", False, records, overruns, False, load_settings(None, [], {})
    )


def test_the_emulated_machine_is_compared() -> None:
    """Both speeds, their ratio, and whether the texts agree."""
    lines = scene_lines(scene_result("abcd"))
    assert lines[0] == (
        "plain 2.00 tokens/s, speculative 4.00: 2.00x; 2 of 3 verified proposals accepted, the same text."
    )
    assert len(lines) == 2
    assert "differ by a near-tie" in scene_lines(scene_result("abcx"))[0]


def test_an_emulated_machine_that_was_not_reached_is_said() -> None:
    """The worst of those that were late is named."""
    late = (Overruns("verifier of plain", 9, 1, 2.0), Overruns("draft-model of adaptive", 90, 5, 31.0))
    *_, line = scene_lines(scene_result("abcd", late))
    assert "draft-model of adaptive: 5 of 90 passes, by 31 ms" in line


# --- text on the way to a terminal ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(stream: io.StringIO, events: list[dict[str, Any]], *, marks: bool, colour: bool) -> str:
    writer = TextWriter(stream, marks, colour)
    for event in events:
        writer.chunk(event)
    writer.end()
    return stream.getvalue()


EVENTS = [
    {"content": "ab", "pieces": ["a", "b"], "n_accepted": 2},
    {"content": "cd", "pieces": ["c", "d"], "n_accepted": 1},
    {"content": "e", "pieces": ["e"], "n_accepted": 1},
]


@pytest.mark.parametrize(
    ("marks", "colour", "expected"),
    [
        (False, True, "abcde\n"),
        (True, False, "‹abc›d‹e›\n"),
        (True, True, "\x1b[4;32mabc\x1b[0md\x1b[4;32me\x1b[0m\n"),
    ],
    ids=["plain", "text marks", "colour"],
)
def test_accepted_tokens_are_marked(marks: bool, colour: bool, expected: str) -> None:
    """Runs of accepted tokens are marked as one, and what is open at the end is closed."""
    assert written(io.StringIO(), EVENTS, marks=marks, colour=colour) == expected


def test_text_that_was_held_back_is_not_lost() -> None:
    """Where a chunk's text is not that of its tokens, it is written unmarked."""
    events = [{"content": "", "pieces": ["a"], "n_accepted": 1}, {"content": "ab", "pieces": ["b"], "n_accepted": 1}]
    assert written(io.StringIO(), events, marks=True, colour=False) == "ab\n"


def test_control_characters_do_not_reach_a_terminal() -> None:
    """A model cannot steer the terminal; a file gets the text as it is."""
    events = [{"content": "a\x1b[2Jb\n\tc"}]
    assert written(Terminal(), events, marks=False, colour=True) == "a\ufffd[2Jb\n\tc\n"
    assert written(io.StringIO(), events, marks=False, colour=False) == "a\x1b[2Jb\n\tc\n"
    assert printable("é\x07\x9b漢") == "é\ufffd\ufffd漢"


def test_figures_without_speculation() -> None:
    """A completion without proposals says so instead of a rate of nothing."""
    line = figures_line({"timings": {"predicted_n": 3, "predicted_ms": 1500.0, "predicted_per_second": 2.0}})
    assert line == "3 tokens in 1.50 s, 2.0 tokens/s; no proposals were verified"
