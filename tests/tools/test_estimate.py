"""`draftwire estimate`: what it prints, what its figures are, and what it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from shared.errors import SettingsError
from shared.messages import MAX_RUN
from shared.service import EXIT_CONFIG
from shared.speculation.cost import Acceptance
from tools.estimate import Estimate, estimate, estimate_lines, parse_acceptance, parse_speculation, print_estimate

ROOT = Path(__file__).resolve().parents[2]
PAIR = ("--target-tps", "6.25", "--draft-tps", "100")


def estimated(acceptance: str, *, draft_tps: float = 100, n_max: int = 16) -> Estimate:
    return estimate(parse_speculation(6.25, draft_tps, acceptance, 0.3, 0.39), n_max)


def printed(result: Estimate) -> list[str]:
    console = Console(file=io.StringIO(), width=80, markup=False, highlight=False)
    print_estimate(result, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def draftwire(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.cli", "estimate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_options_have_the_units_of_the_help() -> None:
    """Tokens/s become seconds, milliseconds too, and the slope is relative to one row."""
    speculation = parse_speculation(5, 100, "0.8", 250, 0.5)
    assert (speculation.draft_s, speculation.rtt_s) == (0.01, 0.25)
    assert [speculation.step.seconds(rows) for rows in (1, 2, 5)] == pytest.approx([0.2, 0.3, 0.6])


def test_every_length_has_its_figures() -> None:
    result = estimated("0.85", n_max=5)
    assert [row.n for row in result.rows] == [0, 1, 2, 3, 4, 5]
    assert set(result.rows[0].per_second.values()) == {6.25}
    row = result.rows[3]
    assert row.tokens == pytest.approx(1 + 0.85 + 0.85**2 + 0.85**3)
    round_s = 0.03 + 0.0003 + 0.16 * (1 + 3 * 0.39)
    assert row.per_second["sequential"] == pytest.approx(row.tokens / round_s)
    assert row.per_second["ideal"] == pytest.approx(row.tokens / (0.16 * (1 + 3 * 0.39)))


def test_the_best_of_each_way_is_the_highest_of_its_column() -> None:
    result = estimated("0.9,0.8,0.68")
    for name, best in result.best.items():
        column = [row.per_second[name] for row in result.rows]
        assert best.per_second == max(column) == column[best.n]
        assert best.speed_up == pytest.approx(best.per_second / 6.25)


def test_break_even_is_where_speculation_begins_to_pay() -> None:
    threshold = estimated("0.85").best["sequential"].break_even
    assert threshold is not None
    assert estimated(f"{threshold + 0.001}").best["sequential"].n > 0
    assert estimated(f"{threshold - 0.001}").best["sequential"].n == 0


@pytest.mark.parametrize(("text", "shares"), [("0.85", (0.85,)), ("1", (1.0,)), ("0.9, .8,0.8 ", (0.9, 0.8, 0.8))])
def test_acceptance_is_one_number_or_a_list_by_depth(text: str, shares: tuple[float, ...]) -> None:
    assert parse_acceptance(text) == Acceptance(shares)


# --- what is printed --------------------------------------------------------------------------------------------------


def test_a_star_marks_the_best_of_each_column() -> None:
    """One in each, in the row of the best length; the table fits into 80 columns."""
    result = estimated("0.85")
    lines = printed(result)
    starred = {name: [] for name in result.best}
    for line in lines:
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells:
            assert len(cells) == 6, "a row was wrapped"
            for name, cell in zip(starred, cells[2:], strict=True):
                if cell.endswith("*"):
                    starred[name].append(int(cells[0]))
    assert starred == {name: [best.n] for name, best in result.best.items()}


def test_words_say_that_it_pays_and_from_where_on() -> None:
    sequential, overlapped, waiting = estimate_lines(estimated("0.85"))
    assert sequential.startswith("sequential: speculation pays, 8.44 tokens/s instead of 6.25 with n = 3; ")
    assert sequential.endswith("from an acceptance of 0.45 on")
    assert overlapped.startswith("overlapped: speculation pays, 8.58 tokens/s instead of 6.25 with n = 3; ")
    assert overlapped.endswith("from an acceptance of 0.39 on")
    assert waiting.startswith("waiting: speculation pays, 8.81 tokens/s instead of 6.25 with n = 3; ")


def test_words_say_that_it_would_pay_with_a_better_draft() -> None:
    line = estimate_lines(estimated("0.2"))[1]
    assert line == "overlapped: speculation does not pay; it would from an acceptance of 0.39 on"


def test_words_say_that_no_acceptance_is_enough() -> None:
    """A draft slower than the target is no use, however good it is."""
    line = estimate_lines(estimated("0.9", draft_tps=5))[1]
    assert line == "overlapped: speculation does not pay; nor would it at any acceptance"


def test_the_command_prints_a_table_and_words() -> None:
    """With the defaults, in one go; nothing on stderr."""
    ended = draftwire(*PAIR, "--acceptance", "0.85")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "8.58 1.37x*" in ended.stdout
    assert ended.stdout.splitlines()[-1].startswith("waiting: speculation pays")


def test_the_command_prints_json() -> None:
    ended = draftwire(*PAIR, "--acceptance", "0.9,0.8", "--rtt", "2", "--slope", "0.3", "--n-max", "3", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    figures = json.loads(ended.stdout)
    assert figures["plain"] == 6.25
    assert [row["n"] for row in figures["rows"]] == [0, 1, 2, 3]
    assert set(figures["best"]) == {"sequential", "overlapped", "waiting", "ideal"}
    assert figures["best"]["overlapped"]["n"] == 3


@pytest.mark.parametrize("target_tps", [1e-9, 1e9])
@pytest.mark.parametrize("draft_tps", [1e-9, 1e9])
@pytest.mark.parametrize("rtt_ms", [0, 1e9])
def test_extreme_values_have_figures_too(target_tps: float, draft_tps: float, rtt_ms: float) -> None:
    result = estimate(parse_speculation(target_tps, draft_tps, "1", rtt_ms, 1e9), 2)
    assert all(value > 0 for row in result.rows for value in row.per_second.values())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected", "remedy"),
    [
        (("--target-tps", "0"), "--target-tps is 0", "above 0"),
        (("--draft-tps", "-3"), "--draft-tps is -3", "above 0"),
        (("--draft-tps", "inf"), "--draft-tps is inf", "above 0"),
        (("--target-tps", "1e-320"), "--target-tps is", "above 0"),
        (("--slope", "1e300"), "--slope is 1e+300", "0.39"),
        (("--rtt", "-1"), "--rtt is -1", "milliseconds"),
        (("--rtt", "nan"), "--rtt is nan", "milliseconds"),
        (("--slope", "-0.1"), "--slope is -0.1", "0.39"),
        (("--acceptance", "85"), "--acceptance has 85", "85 % is 0.85"),
        (("--acceptance", "nan"), "--acceptance has nan", "between 0 and 1"),
        (("--acceptance", "0.8;0.7"), "--acceptance is '0.8;0.7'", "such as 0.86,0.75"),
        (("--acceptance", ""), "--acceptance is ''", "such as 0.85"),
        (("--acceptance", "0.6,0.7"), "--acceptance is '0.6,0.7'", "repeat the lower value"),
        (("--n-max", "0"), "--n-max is 0", f"from 1 to {MAX_RUN}"),
        (("--n-max", str(MAX_RUN + 1)), f"--n-max is {MAX_RUN + 1}", f"from 1 to {MAX_RUN}"),
    ],
)
def test_impossible_values_are_refused_by_option(arguments: tuple[str, str], expected: str, remedy: str) -> None:
    """The error names the option and what to give instead."""
    options = {"--target-tps": "6", "--draft-tps": "100", "--acceptance": "0.8", "--rtt": "0", "--slope": "0"}
    options |= {"--n-max": "16", arguments[0]: arguments[1]}
    with pytest.raises(SettingsError) as raised:
        estimate(
            parse_speculation(
                float(options["--target-tps"]),
                float(options["--draft-tps"]),
                options["--acceptance"],
                float(options["--rtt"]),
                float(options["--slope"]),
            ),
            int(options["--n-max"]),
        )
    assert raised.value.message.startswith(expected)
    assert remedy in raised.value.remedy


def test_an_impossible_value_is_one_line_on_stderr() -> None:
    ended = draftwire(*PAIR, "--acceptance", "85")
    assert (ended.returncode, ended.stdout) == (EXIT_CONFIG, "")
    assert ended.stderr == "draftwire: error: --acceptance has 85 (probabilities lie between 0 and 1; 85 % is 0.85)\n"
