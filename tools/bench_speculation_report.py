"""How `draftwire bench speculation` shows and keeps what it has measured: tables, a scatter plot, JSON, CSV and SVG."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from rich.console import Console
from rich.table import Table

from shared import wire
from shared.errors import SettingsError
from shared.messages import Proposal
from tools.bench_speculation import SceneResult
from tools.bench_speculation_best import best_policy
from tools.bench_speculation_figures import CSV_COLUMNS, STAGES, Record, Spread, Summary, csv_rows, summarize
from tools.bench_speculation_scenes import Scene

FILES = ("results.json", "completions.csv", "scatter.svg")
_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#f0e442")  # Okabe, Ito 2008
_MARKS = "●▲■◆○△□◇"


# --- on the terminal --------------------------------------------------------------------------------------------------


def print_scene(result: SceneResult, console: Console) -> None:
    """Tables, the scatter plot, and what has to be known beside the figures."""
    scene = result.scene
    title = " ".join(part for part in (scene.name, scene.title and f"- {scene.title}") if part)
    console.print(f"\n{title}\n")
    console.print(_conditions(result))
    if not result.records:
        console.print("Nothing has been measured.")
        return
    summaries = summarize(result.records)
    tables = [speed_table(summaries)]
    if any(summary.proposed for summary in summaries):
        tables += [proposal_table(summaries), depth_table(summaries)]
    for table in (*tables, stage_table(summaries)):
        console.print(table)
        console.print()
    points = scatter_points(result.records)
    if points:
        console.print("\n".join(terminal_scatter(points)))
    for remark in REMARKS:
        for line in remark(result, summaries):
            console.print(line)
    with console.status("simulating policies over what was measured"):
        lines = best_policy(result)
    for line in lines:
        console.print(line)


def print_scenes(scenes: Sequence[Scene], console: Console) -> None:
    """What there is to measure."""
    table = Table(box=None, pad_edge=False)
    for name in ("scene", "what", "policies"):
        table.add_column(name)
    for scene in scenes:
        table.add_row(scene.name, scene.title, " ".join(scene.policies))
    console.print(table)


def _conditions(result: SceneResult) -> str:
    scene = result.scene
    engine = f"{result.target}{f', profile {scene.profile}' if scene.profile else ''}" or "no engine"
    sampling = "greedy" if scene.temperature == 0 else f"T = {scene.temperature:g}, top_p {scene.top_p:g}"
    parts = [
        f"Target: {engine}",
        sampling,
        f"{result.n_prompts} prompts x {result.tokens} tokens x {result.repeats}",
        f"RTT {scene.rtt_ms * result.time_scale:g} ms"
        + "".join(f", {worker} {rtt_ms * result.time_scale:g} ms" for worker, rtt_ms in scene.rtts),
        f"{scene.concurrency} at a time",
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
    ]
    line = "; ".join(parts) + "."
    for event in scene.events:
        where = "is away" if event.rtt_ms is None else f"is {event.rtt_ms * result.time_scale:g} ms away"
        line += f"\nFrom {100 * event.share:.0f} % of the turns on {event.worker} {where}."
    if result.time_scale != 1:
        line += (
            f"\nTIME SCALE {result.time_scale:g}: all paces and round trips are multiplied by it; what the processes "
            "and this machine take is not."
        )
    return line


def _table(title: str, *columns: str) -> Table:
    """Of policies; compact, since there is much to say."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1), pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def speed_table(summaries: Sequence[Summary]) -> Table:
    """Tokens a second, and what a reader sees of them."""
    table = _table(
        "Speed: tokens/s over completions; the speed-up of all together, and its median",
        *("n", "mean", "median", "std", "min", "max", "speed-up", "median", "TTFT ms", "ITL p50 ms", "p99"),
    )
    for summary in summaries:
        speed = summary.tokens_per_s
        table.add_row(
            summary.policy,
            str(summary.n),
            *(_number(getattr(speed, name, None), 2) for name in ("mean", "median", "std", "least", "most")),
            _times(summary.speed_up),
            _times(_median(summary.speed_ups)),
            _number(_median(summary.ttft_ms), 0),
            _number(summary.itl_p50_ms, 1),
            _number(summary.itl_p99_ms, 1),
        )
    return table


def proposal_table(summaries: Sequence[Summary]) -> Table:
    """What became of the proposals."""
    table = _table(
        "Proposals: accepted of verified; the rest for each token",
        *("accepted", "of", "length", "rows", "wasted", "stale", "drafted", "wire bytes"),
    )
    for summary in summaries:
        if summary.policy == "plain":
            continue
        table.add_row(
            summary.policy,
            _number(summary.acceptance_rate, 3),
            f"{summary.proposed:,}",
            _number(summary.mean_acceptance_length, 2),
            _number(summary.rows_per_token, 2),
            _number(summary.wasted_per_token, 2),
            _number(summary.stale_per_token, 2),
            _number(summary.drafted_per_token, 2),
            _number(summary.wire_bytes_per_token, 0),
        )
    return table


def depth_table(summaries: Sequence[Summary]) -> Table:
    """Acceptance by depth."""
    deepest = max(len(summary.by_depth) for summary in summaries)
    depths = [depth for depth in _DEPTHS if depth <= deepest]
    table = _table("Accepted of those verified at a depth", *(f"depth {depth}" for depth in depths))
    for summary in summaries:
        if summary.proposed:
            table.add_row(summary.policy, *(_depth(summary.by_depth, depth) for depth in depths))
    return table


def stage_table(summaries: Sequence[Summary]) -> Table:
    """Where the time went, as the pipeline itself says; drafting runs beside the target's steps, but in sequential."""
    table = _table("Stages: ms for each token", *(stage.replace("_", " ") for stage in STAGES))
    for summary in summaries:
        table.add_row(summary.policy, *(_number(summary.stages_ms_per_token[stage], 2) for stage in STAGES))
    return table


def _median(values: Spread | None) -> float | None:
    return None if values is None else values.median


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}x"


def _depth(by_depth: Sequence[tuple[int, int]], depth: int) -> str:
    if depth > len(by_depth) or not by_depth[depth - 1][0]:
        return ""
    verified, accepted = by_depth[depth - 1]
    return f"{accepted / verified:.2f} of {verified:,}"


# --- what has to be known beside the figures --------------------------------------------------------------------------


def _texts(result: SceneResult, summaries: Sequence[Summary]) -> list[str]:
    """Whether the texts are plain decoding's."""
    lines = []
    for summary in summaries:
        if summary.policy == "plain" or not summary.compared:
            continue
        if summary.same is None:
            lines.append(f"{summary.policy}: the rule promises the distribution, not the text.")
        elif summary.same < summary.compared:
            lines.append(
                f"{summary.policy}: {summary.same} of {summary.compared} texts are plain decoding's, "
                + (
                    "THOUGH THE ENGINE PROMISES ALL: a defect, please report it."
                    if result.row_invariant
                    else "near-ties of this engine have tipped over in the others."
                )
            )
        else:
            lines.append(f"{summary.policy}: all {summary.compared} texts are plain decoding's.")
    return lines


def _workers(result: SceneResult, summaries: Sequence[Summary]) -> list[str]:
    """Who drafted, where the router had a choice."""
    if len({record.worker for record in result.records if record.worker}) < 2:
        return []
    lines = []
    for summary in summaries:
        drafted = Counter(r.worker for r in result.records if r.policy == summary.policy and r.worker)
        if drafted:
            parts = ", ".join(f"{worker} {n}" for worker, n in sorted(drafted.items()))
            lines.append(f"{summary.policy}: completions by the worker that drafted last: {parts}.")
    return lines


def _router(result: SceneResult, _summaries: Sequence[Summary]) -> list[str]:
    """How near the router came to knowing its workers, where each was measured by itself too; one completion at a time.

    An oracle gives each completion to the worker that was fastest with it, or to none.
    """
    busy: dict[str, dict[int, float]] = {}
    for record in result.records:
        busy.setdefault(record.policy, {})[record.turn] = record.turn_busy_s
    pinned = [busy[name] for name in busy if name.startswith("adaptive@")]
    if "adaptive" not in busy or len(pinned) < 2 or result.scene.concurrency > 1:
        return []
    turns = sorted(set.intersection(*map(set, busy.values())))

    def share(of: Callable[[int], float], over: Sequence[int]) -> float:
        spent = sum(map(of, over))
        fastest = sum(min(one[turn] for one in (*pinned, busy["plain"])) for turn in over)
        return 100 * fastest / spent if spent else 0.0

    def router(turn: int) -> float:
        return busy["adaptive"][turn]

    at_random = share(lambda turn: sum(one[turn] for one in pinned) / len(pinned), turns)
    in_turn = share(lambda turn: pinned[turn % len(pinned)][turn], turns)
    later = share(router, turns[len(turns) // 2 :])
    return [
        f"router: {share(router, turns):.1f} % of the speed of an oracle that knows the fastest worker for each text;",
        f"  {later:.1f} % in the second half. At random {at_random:.1f} %, in turn {in_turn:.1f} %.",
    ]


def _overruns(result: SceneResult, _summaries: Sequence[Summary]) -> list[str]:
    """Whether emulated machines kept their time."""
    late = [found for found in result.overruns if found.overruns]
    lines = [
        f"  {found.process}: {found.overruns} of {found.passes} passes, by {found.overrun_ms:,.1f} ms in all"
        for found in late
    ]
    if late:
        lines.insert(
            0,
            "OVERRUNS: passes took longer than on the emulated machine, warm-up included. Figures with more than a few "
            "do not count: less load on this machine, or a larger --time-scale.",
        )
    return lines


def _wire(_result: SceneResult, summaries: Sequence[Summary]) -> list[str]:
    """What the wire bytes are, and what they would be if distributions travelled."""
    measured = [summary for summary in summaries if summary.wire_bytes_per_token is not None]
    if not measured:
        return []
    lines = [
        "Wire bytes: all that went over TCP between draft workers and router, both ways, from request to last token: "
        "ZeroMQ's frames and heartbeats too, headers of TCP and IP not."
    ]
    rejecting = [summary for summary in measured if summary.policy.endswith("+rejection")]
    for summary in rejecting:
        sizes = ", ".join(f"{name} {size:,}" for name, size in proposal_sizes().items())
        lines.append(
            f"{summary.policy}: a message that proposes one token has, encoded by shared/wire.py and not measured, in "
            f"bytes: {sizes}. With {summary.drafted_per_token or 0:.2f} drafted for each token committed, whole "
            "distributions over 157,184 entries would be "
            f"{(summary.drafted_per_token or 0) * proposal_bytes(157_184) / 1e6:,.1f} MB a token."
        )
    return lines


def _interruption(result: SceneResult, _summaries: Sequence[Summary]) -> list[str]:
    return ["INTERRUPTED: not all has been measured."] if result.interrupted else []


Remark = Callable[[SceneResult, Sequence[Summary]], list[str]]
REMARKS: tuple[Remark, ...] = (_texts, _workers, _router, _wire, _overruns, _interruption)
"""What is said below the tables of a scene, each from its result and summaries."""


def proposal_sizes() -> dict[str, int]:
    """Encoded bytes of a message that proposes one token, by what it says of the distribution."""
    return {
        "coupled": proposal_bytes(0),
        "the 64 most probable": proposal_bytes(64),
        "8,192 (the embedded vocabulary)": proposal_bytes(8192),
        "157,184 (Ling-1T's)": proposal_bytes(157_184),
    }


def proposal_bytes(n_entries: int) -> int:
    """Of one token, with a distribution of so many entries, as `shared/wire.py` encodes it."""
    ids = np.arange(n_entries, dtype=np.int32)
    probs = np.full(n_entries, 1 / max(1, n_entries), np.float32)
    counts = (n_entries,) if n_entries else ()
    message = Proposal(1 << 60, 1000, (1 << 64) - 1, (5000,), (0.5,), counts, ids, probs, 0, 10_000)
    return sum(len(frame) for frame in wire.encode(message))


# --- the scatter plot -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """A completion: acceptance rate and tokens/s."""

    policy: str
    acceptance: float
    tokens_per_s: float


def scatter_points(records: Iterable[Record]) -> list[Point]:
    """Completions that verified proposals."""
    return [
        Point(record.policy, record.acceptance_rate, record.tokens_per_s)
        for record in records
        if record.acceptance_rate is not None and record.tokens_per_s
    ]


def terminal_scatter(points: Sequence[Point], width: int = 64, height: int = 16) -> list[str]:
    """Lines of text: acceptance to the right, 0 to 1, tokens/s upwards from 0; a later policy covers an earlier one."""
    top = max(point.tokens_per_s for point in points)
    policies = list(dict.fromkeys(point.policy for point in points))
    cells = [[" "] * width for _ in range(height)]
    for point in points:
        row = height - 1 - round(point.tokens_per_s / top * (height - 1))
        cells[row][round(point.acceptance * (width - 1))] = _MARKS[policies.index(point.policy) % len(_MARKS)]
    labels = {0: f"{top:8.2f}", height - 1: f"{0:8.2f}"}
    lines = ["tokens/s against the share of verified proposals that were accepted, each completion:"]
    lines += [f"{labels.get(number, ' ' * 8)} │{''.join(row)}" for number, row in enumerate(cells)]
    lines.append(" " * 9 + "└" + "─" * width)
    lines.append(" " * 10 + "0" + "accepted".center(width - 2) + "1")
    lines.append("  ".join(f"{_MARKS[i % len(_MARKS)]} {policy}" for i, policy in enumerate(policies)))
    return lines


def scatter_svg(scenes: Sequence[tuple[str, Sequence[Point]]]) -> str:
    """A panel for each scene, below each other."""
    width, height, margin = 640, 360, 60
    parts = []
    for number, (name, points) in enumerate(scenes):
        top = max((point.tokens_per_s for point in points), default=1.0)
        policies = list(dict.fromkeys(point.policy for point in points))

        def at(point: Point, top: float = top) -> tuple[float, float]:
            return (
                margin + point.acceptance * (width - 2 * margin),
                height - margin - point.tokens_per_s / top * (height - 2 * margin),
            )

        parts.append(f'<g transform="translate(0 {number * height})">')
        parts.append(f'<text x="{margin}" y="24" font-weight="bold">{escape(name)}</text>')
        parts.append(
            f'<path d="M{margin} {margin}V{height - margin}H{width - margin}" fill="none" stroke="black"/>'
            f'<text x="{margin - 6}" y="{margin + 4}" text-anchor="end">{top:.1f}</text>'
            f'<text x="{margin - 6}" y="{height - margin + 4}" text-anchor="end">0</text>'
            f'<text x="{margin}" y="{margin - 10}">tokens/s</text>'
        )
        for tenth in range(0, 11, 2):
            x = margin + tenth / 10 * (width - 2 * margin)
            parts.append(f'<text x="{x:.1f}" y="{height - margin + 18}" text-anchor="middle">{tenth / 10:.1f}</text>')
        parts.append(f'<text x="{width / 2}" y="{height - 20}" text-anchor="middle">accepted of verified</text>')
        for point in points:
            x, y = at(point)
            colour = _COLOURS[policies.index(point.policy) % len(_COLOURS)]
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.7"/>')
        for line, policy in enumerate(policies):
            parts.append(
                f'<circle cx="{width - 170}" cy="{16 + 16 * line}" r="4" fill="{_COLOURS[line % len(_COLOURS)]}"/>'
                f'<text x="{width - 160}" y="{20 + 16 * line}">{escape(policy)}</text>'
            )
        parts.append("</g>")
    total = height * max(1, len(scenes))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        + "".join(parts)
        + "</svg>\n"
    )


# --- files ------------------------------------------------------------------------------------------------------------


def prepare_output(folder: Path) -> None:
    """Make the folder, or find out that it cannot be written before anything is measured. Errors: `SettingsError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILES[0]).open("a").close()
    except OSError as error:
        raise SettingsError(f"cannot write to {folder}: {error.strerror}", "choose another folder with --out") from None


def save(results: Sequence[SceneResult], folder: Path) -> None:
    """Write FILES into the folder."""
    records = [record for result in results for record in result.records]
    (folder / FILES[0]).write_text(json.dumps(results_json(results)) + "\n", "utf-8")
    with (folder / FILES[1]).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        writer.writerows(csv_rows(records))
    scenes = [(result.scene.name, scatter_points(result.records)) for result in results]
    (folder / FILES[2]).write_text(scatter_svg(scenes), "utf-8")


def results_json(results: Sequence[SceneResult]) -> dict[str, Any]:
    """All that was measured, with what it was measured on."""
    return {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "processor": platform.machine()},
        "proposal_bytes": proposal_sizes(),
        "scenes": [
            {
                **asdict(result),
                "policies": [
                    {**asdict(summary), "acceptance_rate": summary.acceptance_rate}
                    for summary in summarize(result.records)
                ],
            }
            for result in results
        ],
    }
