"""`draftwire journal`: what the log says of many requests. As in `tools/cli.py`, commands import when they run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.errors import DraftwireError, SettingsError
from tools.cli_options import CONTEXT

if TYPE_CHECKING:
    from tools.journal import Query

journal_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings=CONTEXT)

UnitOption = Annotated[
    list[str] | None,
    typer.Option("--unit", "-u", metavar="U", help="The gateway's unit, or a pattern; default draftwire-gateway*."),
]
SinceOption = Annotated[
    str, typer.Option("--since", "-S", metavar="TIME", help='"2026-01-31 14:00", "today", "-7d", "2 hours ago".')
]
UntilOption = Annotated[str, typer.Option("--until", "-U", metavar="TIME", help="As --since.")]
FileOption = Annotated[
    list[str] | None,
    typer.Option(
        "--file", "-f", metavar="PATH|DIR|-", help="Lines in a file (.gz too), a journal's directory, or stdin."
    ),
]


@journal_app.callback()
def journal() -> None:
    """Say what many requests in the log add up to.

    Reads the gateway's request_done lines: from this machine's journal, or with --file from elsewhere.

    \b
    Examples:
      draftwire journal report --since -7d
      draftwire journal plot --since yesterday -o speed.svg
    """


@journal_app.command("report")
def report(
    unit: UnitOption = None,
    since: SinceOption = "",
    until: UntilOption = "",
    file: FileOption = None,
    by: Annotated[
        str, typer.Option("--by", metavar="hour|day|worker|none", help="Rows of the last table; default by length.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, one object.")] = False,
) -> None:
    """Say what speculation gained, this week for instance.

    For each configuration (target, draft, their quants and engines): requests, acceptance and tokens/s with mean,
    median, mode, standard deviation, least and most; acceptance by depth; the gain over requests of the same target
    without draft (some are needed: `"draft": "none"` in a request).

    \b
    mode       most frequent value, rounded to 1 % or 0.1 tokens/s; of several the smallest
    overall    of all tokens together; mean and the others are of requests
    gain       of mean tokens/s; 95 %: where it lies, as sure as that, by the spread of both

    \b
    Examples:
      draftwire journal report --since -7d
      draftwire journal report --unit 'draftwire-gateway*' --since today --by hour
      draftwire journal report --file draftwire.log          as printed by `draftwire up`
      draftwire journal report --file /var/log/journal/remote
      ssh box journalctl -u draftwire-gateway -o json --all | draftwire journal report --file -
      draftwire journal report --json | jq '.configurations[] | {draft, gain: .gain.ratio}'
    """
    from rich.console import Console

    from tools.journal_report import load, print_parts, print_report, report_json
    from tools.journal_statistics import UNITS, parts, summaries, usual_unit

    if by not in ("", *UNITS, "none"):
        raise SettingsError(f"--by is {by!r}", "hour, day, worker or none")
    requests, counts = load(_query(file, unit, since, until))
    rows = by or usual_unit(requests)
    found = summaries(requests)
    pieces = parts(requests, UNITS[rows], None) if rows in UNITS else []
    if as_json:
        print(json.dumps(report_json(requests, counts, found, pieces, rows), indent=2))
        return
    console = Console(markup=False, highlight=False, emoji=False)
    print_report(requests, counts, found, console)
    print_parts(pieces, rows, console)


@journal_app.command("plot")
def plot(
    unit: UnitOption = None,
    since: SinceOption = "",
    until: UntilOption = "",
    file: FileOption = None,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", metavar="FILE", help="FILE.svg or FILE.png; without suffix both."),
    ] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Draw here; what happens without -o, too.")] = False,
) -> None:
    """Draw acceptance against tokens/s, and acceptance by depth.

    A point for each request, a colour for each configuration; a dashed line is the mean of requests without draft. The
    statistics are below, as in `draftwire journal report`. Files need matplotlib: pip install 'draftwire[plot]'.

    \b
    Examples:
      draftwire journal plot --since -7d
      draftwire journal plot --since -7d -o week.svg
      draftwire journal plot --file draftwire.log -o week            week.svg and week.png
      draftwire journal plot --file - -o plot.png < exported.jsonl
    """
    from rich.console import Console

    from tools.journal_plot import require_matplotlib, targets, write_plots
    from tools.journal_report import load, remarks, title
    from tools.journal_statistics import summaries
    from tools.journal_terminal import print_plot

    paths = targets(output or [])
    if paths:
        require_matplotlib()
    requests, counts = load(_query(file, unit, since, until))
    found = summaries(requests)
    if not any(summary.speed for summary in found):
        raise DraftwireError(
            f"none of the {len(requests)} requests generated anything",
            "`draftwire journal report` says how they ended",
            "nothing_to_draw",
        )
    if paths:
        write_plots(requests, found, title(requests), paths)
        for path in paths:
            print(f"wrote {path}", file=sys.stderr)
    if terminal or not paths:
        print_plot(requests, found, title(requests), Console(markup=False, highlight=False, emoji=False))
    for remark in remarks(counts):
        print(remark, file=sys.stderr)


def _query(file: list[str] | None, unit: list[str] | None, since: str, until: str) -> Query:
    import math
    from datetime import datetime

    from tools.journal import Query, parse_time

    now = datetime.now()
    return Query(
        tuple(file or ()),
        tuple(unit or ()),
        parse_time(since, now) if since else -math.inf,
        parse_time(until, now) if until else math.inf,
    )
