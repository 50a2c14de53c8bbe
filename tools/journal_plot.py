"""`draftwire journal plot` into files: acceptance against tokens/s, acceptance by depth, the statistics below.

matplotlib is an extra (`pip install 'draftwire[plot]'`). It draws without a display, and nothing of it is global: no
pyplot, no state that outlives a call.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shared.errors import DraftwireError
from tools.journal import NO_MODEL
from tools.journal_report import gain_text, heading, percent, speed, spread_cells
from tools.journal_statistics import Group, Requests, Spread, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES: Final = (".svg", ".png")
MOST_SHOWN: Final = 10
"""Configurations: more could not be told apart."""
COLOURS: Final = (
    *("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#c51b7d"),
    *("#8c564b", "#17a2b8", "#7f7f7f", "#b8a000", "#393b79"),
)

_WIDTH_IN, _PANELS_IN, _LINE_IN = 11.0, 4.6, 0.17
_DPI: Final = 120
_VECTORS: Final = 4000
"""Of more points an SVG holds a picture."""
_COLUMNS: Final = ("n", "mean", "median", "mode", "std", "min", "max")


def targets(outputs: Sequence[Path]) -> list[Path]:
    """The files to write: one without suffix stands for an SVG and a PNG.

    Raises:
        DraftwireError: another format.
    """
    paths: list[Path] = []
    for output in outputs:
        if output.suffix.lower() in SUFFIXES:
            paths.append(output)
        elif output.suffix and not output.suffix[1:].isdigit():
            raise DraftwireError(
                f"{output} would be neither SVG nor PNG",
                "name it .svg or .png, or without suffix for both",
                "bad_format",
            )
        else:
            paths += [output.with_name(output.name + suffix) for suffix in SUFFIXES]
    return paths


def require_matplotlib() -> None:
    """Raises: DraftwireError where it is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise DraftwireError(
            f"plots need matplotlib: {error}",
            "pip install 'draftwire[plot]'; or --terminal, which needs nothing",
            "no_matplotlib",
        ) from None


def write_plots(requests: Requests, found: Sequence[Summary], title: str, paths: Sequence[Path]) -> None:
    """Draw once, write every file.

    Raises:
        DraftwireError: matplotlib is missing, or a file cannot be written.
    """
    require_matplotlib()
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of font caches
    style: Any = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "draftwire",
        "text.parse_math": False,  # a name may hold a dollar
        "font.size": 9,
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may hold characters that the font has not
        figure = draw(requests, found, title)
        for path in paths:
            metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
            try:
                figure.savefig(path, dpi=_DPI, metadata=metadata)
            except OSError as error:
                raise DraftwireError(
                    f"cannot write {path}: {error.strerror}", "choose another file with -o", "plot_unwritable"
                ) from None


def draw(requests: Requests, found: Sequence[Summary], title: str) -> Figure:
    """The figure: two panels, and below them what the colours mean with the figures of each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = most_used(found)
    footer = [line for index, summary in enumerate(shown) for line in _footer(summary, COLOURS[index])]
    if len(shown) < len(found):
        footer.append((f"and {len(found) - len(shown)} configurations more, with fewer requests", "black"))
    below = _LINE_IN * (len(footer) + 1)
    height = _PANELS_IN + below
    figure = Figure(figsize=(_WIDTH_IN, height))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, y=1 - 0.12 / height)
    axes = figure.subplots(
        1,
        2,
        width_ratios=(3, 2),
        gridspec_kw={
            "left": 0.06, "right": 0.98, "top": 1 - 0.45 / height, "bottom": (below + 0.6) / height, "wspace": 0.18,
        },
    )  # fmt: skip
    scatter, depths = axes
    for index, summary in enumerate(shown):
        group = requests.groups[summary.target, summary.draft]
        _scatter(scatter, group, summary, COLOURS[index])
        if summary.by_depth:
            rates = [(depth, 100 * a / p) for depth, (p, a) in enumerate(summary.by_depth, 1) if p]
            depths.plot(*zip(*rates, strict=True), marker="o", markersize=3, color=COLOURS[index])
    scatter.set_xlabel("accepted, % of a request's proposals")
    scatter.set_ylabel("tokens/s")
    depths.set_xlabel("depth")
    depths.set_ylabel("accepted, % of proposals at this depth")
    depths.set_ylim(0, 102)
    depths.xaxis.get_major_locator().set_params(integer=True)
    for panel in axes:
        panel.grid(alpha=0.25)
    for row, (text, colour) in enumerate(footer):
        figure.text(
            0.02, (below - _LINE_IN * (row + 0.8)) / height, text, color=colour, family="monospace", fontsize=7.5
        )
    return figure


def most_used(found: Sequence[Summary]) -> list[Summary]:
    """The configurations that are shown, in their order."""
    kept = sorted(sorted(range(len(found)), key=lambda i: -found[i].n)[:MOST_SHOWN])
    return [found[i] for i in kept]


def _scatter(axes: Axes, group: Group, summary: Summary, colour: str) -> None:
    if summary.draft == NO_MODEL:
        if summary.speed is not None:
            axes.axhline(summary.speed.mean, color=colour, linestyle="--", linewidth=1)
        return
    acceptance, speeds = group.points()
    axes.plot(
        100 * acceptance,
        speeds,
        linestyle="",
        marker="o",
        markersize=3,
        markeredgewidth=0,
        alpha=0.5 if len(speeds) < _VECTORS else 0.1,
        color=colour,
        rasterized=len(speeds) > _VECTORS,
    )


def _footer(summary: Summary, colour: str) -> list[tuple[str, str]]:
    mark = "--" if summary.draft == NO_MODEL else "o "
    lines = [(f"{mark} {heading(summary.target, summary.draft)}: {summary.n:,} requests", colour)]
    for name, spread, form in (("accepted", summary.acceptance, percent), ("tokens/s", summary.speed, speed)):
        if spread is not None:
            lines.append((f"     {name}  {_figures(spread, form)}", "black"))
    if summary.gain is not None:
        lines.append((f"     gain      {gain_text(summary.gain, summary)}", "black"))
    return lines


def _figures(spread: Spread, form: Any) -> str:
    return "  ".join(
        f"{name} {cell:<8}" for name, cell in zip(_COLUMNS, spread_cells(spread, form), strict=True)
    ).rstrip()
