"""`draftwire journal plot` in the terminal: the scatter in braille dots, acceptance by depth as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from rich.console import Console
from rich.text import Text

from tools.journal import NO_MODEL
from tools.journal_plot import most_used
from tools.journal_report import percent, print_summary, short
from tools.journal_statistics import Float64, Requests, Summary

STYLES: Final = (
    *("bright_blue", "yellow", "green", "magenta", "bright_red"),
    *("cyan", "bright_green", "bright_black", "bright_yellow", "blue"),
)
_ROWS: Final = 16
_MARGIN: Final = 9
"""Columns of the numbers left of the dots."""
_MOST_DEPTHS: Final = 8
_DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""A braille character's dots: [4 rows] of [2 columns]."""
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"


class Canvas:
    """Points on a grid of braille characters, each of the style of what was drawn there last.

    Args:
        columns, rows: in characters.
        x, y: what the edges stand for.
    """

    def __init__(self, columns: int, rows: int, x: tuple[float, float], y: tuple[float, float]) -> None:
        self._columns, self._rows = columns, rows
        self._x, self._y = x, y
        self._dots = np.zeros((rows, columns), np.int32)
        self._lines = np.zeros((rows, columns), bool)
        self._style = np.full((rows, columns), -1, np.int32)

    def points(self, x: Float64, y: Float64, style: int) -> None:
        columns = _cells(x, self._x, 2 * self._columns)
        rows = 4 * self._rows - 1 - _cells(y, self._y, 4 * self._rows)
        for row, column in {*zip(rows.tolist(), columns.tolist(), strict=True)}:
            self._dots[row // 4, column // 2] |= _DOTS[row % 4][column % 2]
            self._style[row // 4, column // 2] = style

    def line(self, y: float, style: int) -> None:
        """A horizontal one, behind the points."""
        row = self._rows - 1 - int(_cells(np.array([y]), self._y, self._rows)[0])
        self._lines[row] = True
        self._style[row, self._dots[row] == 0] = style

    def row(self, row: int) -> Text:
        text = Text()
        for dots, line, style in zip(self._dots[row], self._lines[row], self._style[row], strict=True):
            text.append(chr(0x2800 + dots) if dots else "╌" if line else " ", STYLES[style] if style >= 0 else "")
        return text


def _cells(values: Float64, bounds: tuple[float, float], n: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    low, high = bounds
    return np.clip((values - low) / (high - low) * n, 0, n - 1).astype(np.int64)


def print_plot(requests: Requests, found: Sequence[Summary], title: str, console: Console) -> None:
    """Scatter, bars, and the statistics of each configuration below."""
    shown = most_used(found)
    console.print(title, soft_wrap=True)
    _print_scatter(requests, shown, console)
    _print_depths(shown, console)
    for index, summary in enumerate(shown):
        console.print(Text("●" if summary.draft != NO_MODEL else "╌", STYLES[index]), end=" ")
        print_summary(summary, console)
    if len(shown) < len(found):
        console.print(f"and {len(found) - len(shown)} configurations more, with fewer requests", soft_wrap=True)


def _print_scatter(requests: Requests, shown: Sequence[Summary], console: Console) -> None:
    clouds = [requests.groups[s.target, s.draft].points() for s in shown]
    plain = [s.speed.mean if s.draft == NO_MODEL and s.speed is not None else None for s in shown]
    x = np.concatenate([[], *(acceptance for acceptance, _ in clouds)]) * 100
    y = np.concatenate([[mean for mean in plain if mean is not None], *(speeds for _, speeds in clouds)])
    if not len(y):
        return
    columns = max(20, min(console.width, 120) - _MARGIN - 1)
    x_bounds, y_bounds = _bounds(x, 100.0), _bounds(y, float("inf"))
    canvas = Canvas(columns, _ROWS, x_bounds, y_bounds)
    for index, (acceptance, speeds) in enumerate(clouds):
        canvas.points(acceptance * 100, speeds, index)
    for index, mean in enumerate(plain):
        if mean is not None:
            canvas.line(mean, index)
    console.print("tokens/s")
    for row in range(_ROWS):
        marked = row % 5 == 0
        value = y_bounds[1] - (y_bounds[1] - y_bounds[0]) * row / (_ROWS - 1)
        console.print(Text(f"{value:{_MARGIN - 2}.2f} ┤" if marked else " " * (_MARGIN - 1) + "│") + canvas.row(row))
    console.print(" " * (_MARGIN - 1) + "└" + "─" * columns)
    left, right = f"{x_bounds[0]:.0f}%", f"{x_bounds[1]:.0f}% accepted"
    console.print(" " * _MARGIN + left + right.rjust(columns - len(left)))


def _bounds(values: Float64, most: float) -> tuple[float, float]:
    if not len(values):
        return 0.0, most
    low, high = float(values.min()), float(values.max())
    margin = max((high - low) * 0.05, abs(high) * 0.01, 1e-9)
    return max(0.0, low - margin), min(most, high + margin)


def _print_depths(shown: Sequence[Summary], console: Console) -> None:
    drafted = [(index, s) for index, s in enumerate(shown) if s.by_depth]
    if not drafted:
        return
    console.print("accepted by depth")
    width = max(10, min(console.width, 120) - _MARGIN - 10)
    for index, summary in drafted:
        console.print(Text(f"  {short(summary.draft)}", STYLES[index]))
        for depth, (proposed, accepted) in enumerate(summary.by_depth[:_MOST_DEPTHS], 1):
            rate = accepted / proposed if proposed else 0.0
            console.print(Text(f"{depth:{_MARGIN - 2}} ") + Text(bar(rate, width), STYLES[index]), percent(rate))


def bar(share: float, width: int) -> str:
    """A bar of a share of so many characters, to an eighth of one."""
    eighths = round(share * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")
