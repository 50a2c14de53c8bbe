"""`draftwire journal report` as a person meets it, and its JSON."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.tools.journal_sample import lines
from tools.journal import Query
from tools.journal_report import duration, load, print_parts, print_report, report_json
from tools.journal_statistics import parts, summaries

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120


def draftwire(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DRAFTWIRE_")}
    ended = subprocess.run(
        [sys.executable, "-m", "tools.cli", "journal", *arguments],
        cwd=ROOT,
        env={**inherited, "NO_COLOR": "1", "COLUMNS": "100", "TZ": "UTC", **environment},
        input=stdin,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return subprocess.CompletedProcess(ended.args, ended.returncode, ended.stdout.decode(), ended.stderr.decode())


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A week of 400 requests among 1,200 lines, and a bad one."""
    path = tmp_path_factory.mktemp("sample") / "week.jsonl"
    path.write_text("\n".join(lines(1200)) + '\n{"event": "request_done"}\n')
    return path


def text(path: Path, by: Any = "day", width: int = 100) -> str:
    requests, counts = load(Query((str(path),)))
    out = io.StringIO()
    console = Console(file=out, width=width, markup=False, highlight=False)
    print_report(requests, counts, summaries(requests), console)
    print_parts(parts(requests, by, None), by, console)
    return out.getvalue()


def test_a_report_says_what_speculation_gained(sample: Path) -> None:
    """Every configuration with its figures, the gain, the depths, and a table by day; bad lines are said."""
    ended = draftwire("report", "--file", str(sample))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "400 requests from 2026-01-01 00:00 to 2026-01-07 23:" in ended.stdout
    assert "among 1,201 lines" in ended.stdout
    assert "1 bad lines left out (the first: draft_n is no whole number from 0 on)" in ended.stdout
    assert "(IQ4_KSS, ik), without draft" in ended.stdout
    assert "drafted by Ling-flash-2.0-IQ1_KT.gguf (IQ1_KT, cuda)" in ended.stdout
    assert "drafted by ngram" in ended.stdout
    assert ended.stdout.count("gain") == 3
    assert "2026-01-07" in ended.stdout


def test_json_has_the_same_figures(sample: Path) -> None:
    """Shares as fractions, times in UTC; nothing that is not JSON."""
    ended = draftwire("report", "--file", "-", "--json", "--by", "worker", stdin=sample.read_bytes())
    report = json.loads(ended.stdout, parse_constant=lambda name: pytest.fail(name))
    assert report["requests"] == 400
    assert report["first"] == "2026-01-01T00:00:00Z"
    assert report["lines"] == {
        "read": 1201,
        "bad": 1,
        "first_bad": "draft_n is no whole number from 0 on",
        "without_message": 0,
        "outside": 0,
    }
    plain, *drafted = report["configurations"]
    assert plain["draft"] == {"model": "", "quant": "", "engine": ""}
    assert plain["acceptance"] is None
    for configuration in drafted:
        assert configuration["gain"]["low"] < configuration["gain"]["ratio"] < configuration["gain"]["high"]
        assert configuration["gain"]["ratio"] == pytest.approx(
            configuration["tokens_per_second"]["mean"] / plain["tokens_per_second"]["mean"]
        )
        depths = configuration["by_depth"]
        assert sum(row["draft_n_accepted"] for row in depths) == configuration["draft_n_accepted"]
        mean = configuration["acceptance"]["mean"]
        assert f"{100 * mean:.1f}%" in text(sample)
    assert sum(part["n"] for part in report["parts"]) == 400
    assert {part["name"] for part in report["parts"]} == {"", "gpu", "gpu2", "lookup"}


def test_a_narrow_terminal_loses_no_figure(sample: Path) -> None:
    """80 columns are enough for every table."""
    assert "…" not in text(sample, width=80)


def test_long_tables_end_with_what_is_left_out(sample: Path) -> None:
    """The last hours are shown."""
    out = text(sample, by="hour")
    assert "(the last 48 of 400 rows; --json has all)" in out or "(the last 48 of " in out
    assert "2026-01-07 23:00" in out


def test_several_targets_are_told_apart(tmp_path: Path) -> None:
    other = [line.replace("Ling-1T", "Qwen3-480B") for line in lines(60, seed=1)]
    path = tmp_path / "two.jsonl"
    path.write_text("\n".join([*lines(60), *other]))
    out = text(path, width=160)
    assert "target" in out
    assert "Qwen3-480B-smol-IQ4_KSS-00001-of-00012 " in out


def test_requests_that_were_refused_are_said_by_status(tmp_path: Path) -> None:
    refused = {
        "event": "request_done", "status": 429, "draft_n": 0, "draft_n_accepted": 0, "prompt_n": 0, "predicted_n": 0,
        "predicted_ms": 0.0, "predicted_per_second": 0.0, "worker": "", "time": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    path = tmp_path / "refused.jsonl"
    path.write_text("\n".join([json.dumps(refused)] * 3 + [json.dumps({**refused, "status": 503})]))
    assert "ended before anything was computed, by status: 3 x 429, 1 x 503" in text(path)
    requests, counts = load(Query((str(path),)))
    assert report_json(requests, counts, [], [], "none")["lost_by_status"] == {"429": 3, "503": 1}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("report", "--file", "/nowhere/x.log"), ("cannot read /nowhere/x.log: No such file",)),
        (("report", "--file", "-"), ("no request_done among 0 lines of -", "journalctl -u")),
        (("report", "--file", "-", "--since", "soon"), ("'soon' is no time", "yesterday")),
        (("report", "--file", "-", "--by", "moon"), ("--by is 'moon'", "hour, day, worker or none")),
        (("plot", "--file", "-", "-o", "x.gif"), ("x.gif would be neither SVG nor PNG",)),
        (("plot", "--file", "-"), ("no request_done",)),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    """On stderr, with what to do; nothing on stdout."""
    ended = draftwire(*arguments)
    assert ended.returncode != 0
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("draftwire: error: ")
    for part in parts:
        assert part in ended.stderr


def test_an_empty_result_says_why(sample: Path, tmp_path: Path) -> None:
    """Outside the period, without messages, of another unit: each has its own cure."""
    ended = draftwire("report", "--file", str(sample), "--since", "2027-01-01")
    assert "widen --unit, --since and --until" in ended.stderr
    ended = draftwire("report", "--file", str(sample), "--unit", "draftwire-verifier")
    assert "widen --unit, --since and --until" in ended.stderr
    cut = tmp_path / "cut.jsonl"
    cut.write_text('{"MESSAGE":null}\n')
    ended = draftwire("report", "--file", str(cut))
    assert "1 entries without message" in ended.stderr
    assert "--all" in ended.stderr


@pytest.mark.parametrize(("seconds", "said"), [(5, "5.0 s"), (119.94, "119.9 s"), (600, "10.0 min"), (7200, "2.0 h")])
def test_durations_are_short(seconds: float, said: str) -> None:
    assert duration(seconds) == said
