"""`draftwire journal report`: what the statistics are as text and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from shared.errors import DraftwireError
from tools.journal import DEFAULT_UNIT, NO_MODEL, Counts, Label, Query, read_requests
from tools.journal_statistics import (
    Gain,
    Part,
    Requests,
    Spread,
    Summary,
    collect,
)

_MOST_PARTS: Final = 48
_MOST_DEPTHS: Final = 16


def load(query: Query) -> tuple[Requests, Counts]:
    """Read what there is.

    Raises:
        DraftwireError: a source cannot be read, or there is no request in it (code no_requests).
    """
    counts = Counts()
    requests = collect(read_requests(query, counts))
    if not len(requests):
        raise DraftwireError(_nothing(query, counts), _cure(query, counts), "no_requests")
    return requests, counts


def _nothing(query: Query, counts: Counts) -> str:
    where = ", ".join(query.files) or f"the journal (unit {', '.join(query.units) or DEFAULT_UNIT})"
    return "; ".join([f"no request_done among {counts.lines} lines of {where}", *remarks(counts)])


def _cure(query: Query, counts: Counts) -> str:
    if counts.outside:
        return "they are of other units or times: widen --unit, --since and --until"
    if counts.cut:
        return "export with `journalctl -o json --all`"
    if query.files:
        return "is it the log of a gateway? export it with `journalctl -u 'draftwire-gateway*' -o json --all`"
    return "name the gateway's unit with --unit; reading it needs root or the group systemd-journal"


def remarks(counts: Counts) -> list[str]:
    """What a reader should know of the lines that do not count."""
    said = list(counts.notes)
    if counts.bad:
        said.append(f"{counts.bad} bad lines left out (the first: {counts.first_bad})")
    if counts.cut:
        said.append(f"{counts.cut} entries without message, which `journalctl -o json --all` would have shown")
    return said


# --- text -------------------------------------------------------------------------------------------------------------


def print_report(requests: Requests, counts: Counts, found: Sequence[Summary], console: Console) -> None:
    """Each configuration with its figures."""
    _line(console, f"{title(requests)}, among {counts.lines:,} lines")
    for remark in remarks(counts):
        _line(console, remark)
    for summary in found:
        _line(console, "")
        print_summary(summary, console)
    if len(requests.lost):
        codes = ", ".join(f"{n} x {status}" for status, n in sorted(Counter(requests.lost.status).items()))
        _line(console, "")
        _line(console, f"ended before anything was computed, by status: {codes}")


def title(requests: Requests) -> str:
    """How many requests, from when to when."""
    return f"{_count(len(requests), 'request')}{_period(requests)}"


def print_summary(summary: Summary, console: Console) -> None:
    _line(console, heading(summary.target, summary.draft))
    ended = [f"{summary.n_failed} failed" * bool(summary.n_failed), f"{summary.n_cancelled} cancelled"]
    ended = [part for part in ended if part and not part.startswith("0 ")]
    bad = f" ({', '.join(ended)})" if ended else ""
    _line(
        console,
        f"  {_count(summary.n, 'request')}{bad}, {summary.tokens:,} tokens generated, "
        f"{summary.prompt_tokens:,} of prompts computed",
    )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for name in ("  ", "n", "mean", "median", "mode", "std", "min", "max", "overall"):
        table.add_column(name, justify="left" if name == "  " else "right", no_wrap=True)
    for name, spread, overall, form in (
        ("  accepted", summary.acceptance, summary.acceptance_overall, percent),
        ("  tokens/s", summary.speed, summary.speed_overall, speed),
    ):
        if spread is not None:
            table.add_row(name, *spread_cells(spread, form), form(overall))
    if table.row_count:
        console.print(table)
    if summary.gain is not None:
        _line(console, f"  gain      {gain_text(summary.gain, summary)}")
    if summary.by_depth:
        rates = [f"{percent(a / p if p else None)}" for p, a in summary.by_depth[:_MOST_DEPTHS]]
        more = f" ... to depth {len(summary.by_depth)}" if len(summary.by_depth) > _MOST_DEPTHS else ""
        _line(console, f"  by depth  {'  '.join(rates)}{more}")


def print_parts(parts: Sequence[Part], by: str, console: Console) -> None:
    """A row for each hour, day or worker of each configuration."""
    if not parts:
        return
    several = len({part.summary.target for part in parts}) > 1
    _line(console, "")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for name in (f"by {by}", *(["target"] if several else []), "draft"):
        table.add_column(name, overflow="fold")
    for name in ("n", "failed", "accepted", "tokens/s", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = parts if by == "worker" else parts[-_MOST_PARTS:]
    for part in shown:
        s = part.summary
        table.add_row(
            part.name or "(none)",
            *([short(s.target)] if several else []),
            short(s.draft) if s.draft != NO_MODEL else "plain",
            str(s.n),
            str(s.n_failed),
            percent(s.acceptance.mean if s.acceptance else None),
            speed(s.speed.mean if s.speed else None),
            f"{s.tokens:,}",
        )
    console.print(table)
    if len(shown) < len(parts):
        _line(console, f"(the last {len(shown)} of {len(parts)} rows; --json has all)")


def heading(target: Label, draft: Label) -> str:
    """A configuration in words."""
    return f"{described(target)}, {'without draft' if draft == NO_MODEL else f'drafted by {described(draft)}'}"


def described(label: Label) -> str:
    details = ", ".join(part for part in (label.quant, label.engine if label.model else "") if part)
    return f"{label.model or label.engine or '(not said)'}{f' ({details})' if details else ''}"


def short(label: Label) -> str:
    return label.model.removesuffix(".gguf") or label.engine or "(not said)"


def spread_cells(spread: Spread, form: Callable[[float | None], str]) -> tuple[str, ...]:
    return (
        str(spread.n),
        *(form(value) for value in (spread.mean, spread.median, spread.mode, spread.std, spread.min, spread.max)),
    )


def gain_text(gain: Gain, summary: Summary) -> str:
    """In a line: how much, how sure, against what, and what that is in time."""
    sure = ""
    if gain.low is not None and gain.high is not None:
        sure = f" (95 %: {_signed(gain.low)} to {_signed(gain.high)})"
    return (
        f"{_signed(gain.ratio)}{sure} mean tokens/s over {_count(gain.n_plain, 'request')} without draft; "
        f"{duration(summary.decode_s)} of decoding, plainly {duration(gain.plain_decode_s)}"
    )


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def speed(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def duration(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


def _signed(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _period(requests: Requests) -> str:
    period = requests.period()
    if period is None:
        return ""
    first, last = (f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M}" for at in period)
    return f" from {first} to {last}"


def _line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)


# --- JSON -------------------------------------------------------------------------------------------------------------


def report_json(
    requests: Requests, counts: Counts, found: Sequence[Summary], parts: Sequence[Part], by: str
) -> dict[str, Any]:
    """All of it, shares as fractions, times in UTC; docs/journal.md says what the names mean."""
    period = requests.period()
    first, last = (_utc(at) for at in period) if period is not None else (None, None)
    return {
        "requests": len(requests),
        "first": first,
        "last": last,
        "lines": {
            "read": counts.lines,
            "bad": counts.bad,
            "first_bad": counts.first_bad,
            "without_message": counts.cut,
            "outside": counts.outside,
        },
        "notes": counts.notes,
        "lost_by_status": {str(status): n for status, n in sorted(Counter(requests.lost.status).items())},
        "configurations": [_summary_json(summary, whole=True) for summary in found],
        "by": by,
        "parts": [{"name": part.name, **_summary_json(part.summary, whole=False)} for part in parts],
    }


def _summary_json(summary: Summary, *, whole: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "target": summary.target._asdict(),
        "draft": summary.draft._asdict(),
        "n": summary.n,
        "failed": summary.n_failed,
        "cancelled": summary.n_cancelled,
        "tokens": summary.tokens,
        "decode_s": round(summary.decode_s, 3),
        "draft_n": summary.proposed,
        "draft_n_accepted": summary.accepted,
        "acceptance": _spread_json(summary.acceptance, summary.acceptance_overall),
        "tokens_per_second": _spread_json(summary.speed, summary.speed_overall),
    }
    if whole:
        entry["prompt_tokens"] = summary.prompt_tokens
        entry["by_depth"] = [
            {"depth": depth, "draft_n": p, "draft_n_accepted": a, "acceptance": a / p if p else None}
            for depth, (p, a) in enumerate(summary.by_depth, 1)
        ]
        entry["gain"] = None if summary.gain is None else asdict(summary.gain)
    return entry


def _spread_json(spread: Spread | None, overall: float | None) -> dict[str, Any] | None:
    return None if spread is None else {**asdict(spread), "overall": overall}


def _utc(at: float) -> str | None:
    return f"{datetime.fromtimestamp(at, timezone.utc):%Y-%m-%dT%H:%M:%SZ}" if math.isfinite(at) else None
