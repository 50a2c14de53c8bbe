"""`draftwire journal plot`: files that hold what they should, a terminal picture with its points, and no matplotlib."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shared.errors import DraftwireError
from tests.tools.journal_sample import lines
from tests.tools.test_journal_report import draftwire
from tests.tools.test_journal_statistics import NGRAM, SMALL, TARGET, done
from tools.journal import NO_MODEL, Label
from tools.journal_plot import COLOURS, MOST_SHOWN, draw, targets, write_plots
from tools.journal_report import percent, speed
from tools.journal_statistics import Requests, collect, summaries
from tools.journal_terminal import STYLES, Canvas, bar, print_plot

REQUESTS = collect(
    [
        *(done(0, 0, 6.0 + i / 10, draft=NO_MODEL, worker="", time=i) for i in range(3)),
        *(done(100, 60 + i, 7.0 + i / 20, time=i, by_depth=((50, 45), (50, 15 + i))) for i in range(20)),
        *(done(100, 30 + i, 6.5 + i / 30, draft=NGRAM, time=i) for i in range(5)),
    ]
)


@pytest.fixture
def pyplot_free() -> None:
    pytest.importorskip("matplotlib")


pytestmark = pytest.mark.usefixtures("pyplot_free")


def test_both_formats_are_written_with_the_statistics(tmp_path: Path) -> None:
    """The SVG's text is text: every configuration and its figures; the PNG is a picture of some size."""
    from matplotlib.image import imread

    paths = targets([tmp_path / "week"])
    found = summaries(REQUESTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_plots(REQUESTS, found, "a week", paths)
    svg, png = paths
    said = " ".join("".join(ET.parse(svg).getroot().itertext()).split())
    assert "a week" in said
    for summary in found:
        for spread, form in ((summary.acceptance, percent), (summary.speed, speed)):
            if spread is not None:
                for name in ("mean", "median", "mode", "std", "min", "max"):
                    assert f"{name} {form(getattr(spread, name))}" in said
                assert f"n {spread.n}" in said
    assert "without draft" in said
    assert "drafted by small.gguf (Q4_K_M, cuda)" in said
    assert imread(png).shape[0] > 500
    assert len(np.unique(imread(png)[..., 0])) > 10


def test_points_and_depths_are_where_they_belong() -> None:
    """Acceptance against tokens/s for each request of a draft, a line at the mean without draft, rates by depth."""
    figure = draw(REQUESTS, summaries(REQUESTS), "x")
    scatter, depths = figure.axes
    plain, small, ngram = scatter.get_lines()
    assert plain.get_ydata()[0] == pytest.approx(6.1)
    np.testing.assert_allclose(small.get_xdata(), [60 + i for i in range(20)])
    np.testing.assert_allclose(small.get_ydata(), [7.0 + i / 20 for i in range(20)])
    assert len(ngram.get_xdata()) == 5
    [line] = depths.get_lines()
    np.testing.assert_allclose(line.get_data(), [[1, 2], [90.0, 100 * (15 * 20 + 190) / 1000]])


def test_the_same_requests_give_the_same_svg(tmp_path: Path) -> None:
    for name in "ab":
        write_plots(REQUESTS, summaries(REQUESTS), "x", [tmp_path / f"{name}.svg"])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_many_points_make_no_huge_svg(tmp_path: Path) -> None:
    requests = collect([done(100, i % 101, 5 + i / 20_000) for i in range(20_000)])
    write_plots(requests, summaries(requests), "x", [tmp_path / "many.svg"])
    assert (tmp_path / "many.svg").stat().st_size < 500_000


def test_any_name_is_drawn_without_warnings(tmp_path: Path) -> None:
    """Dollars, underscores and characters that the font lacks are neither mathematics nor a warning."""
    names = ("$x_{", "模型.gguf", "a\\b&<c>", "")
    requests = collect([done(draft=Label(name, "Q8_0", "ik"), speed=5 + i) for i, name in enumerate(names)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_plots(requests, summaries(requests), "x", targets([tmp_path / "names"]))
    assert "$x_{" in "".join(ET.parse(tmp_path / "names.svg").getroot().itertext())


@pytest.mark.parametrize(
    "requests",
    [
        collect([done(0, 0, 0.0, 0, status=502)]),
        collect([done(0, 0, 0.0, 0, target=NO_MODEL, draft=NO_MODEL, worker="")]),
        collect([done(0, 0, 6.0, draft=NO_MODEL, worker="")]),
        collect([done(10, 10, 6.0)]),
        collect([done(10, 0, 1e-6, by_depth=((0, 0),))]),
        collect([done(draft=Label(f"d{i}.gguf", "Q4_0", "ik")) for i in range(MOST_SHOWN + 3)]),
    ],
    ids=["failed", "refused", "plain", "one", "nothing accepted", "many"],
)
def test_little_is_drawn_too(requests: Requests, tmp_path: Path) -> None:
    """One request, none that counts, more configurations than colours: a picture all the same."""
    found = summaries(requests)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_plots(requests, found, "x", targets([tmp_path / "x"]))
    out = terminal(requests)
    assert ("3 configurations more" in out) == (len(found) > MOST_SHOWN)


def test_there_is_a_colour_for_each() -> None:
    assert len(COLOURS) == len(STYLES) == MOST_SHOWN


def test_outputs_are_named(tmp_path: Path) -> None:
    """SVG, PNG, or both where no suffix says which."""
    assert targets([tmp_path / "a.svg", tmp_path / "b.PNG"]) == [tmp_path / "a.svg", tmp_path / "b.PNG"]
    assert targets([tmp_path / "a"]) == [tmp_path / "a.svg", tmp_path / "a.png"]
    with pytest.raises(DraftwireError, match="neither SVG nor PNG"):
        targets([tmp_path / "a.pdf"])


def test_a_file_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DraftwireError, match="cannot write"):
        write_plots(REQUESTS, summaries(REQUESTS), "x", [tmp_path / "no" / "x.svg"])


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    """Before a million lines are read; the terminal needs none."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ImportError('not here')")
    log = "\n".join(lines(30)).encode()
    path = f"{tmp_path}:{Path(__file__).resolve().parents[2]}"
    ended = draftwire("plot", "--file", "-", "-o", str(tmp_path / "x"), stdin=log, PYTHONPATH=path)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1
    assert "draftwire[plot]" in ended.stderr
    ended = draftwire("plot", "--file", "-", stdin=log, PYTHONPATH=path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "accepted by depth" in ended.stdout


def test_the_command_draws_where_it_is_told(tmp_path: Path) -> None:
    """Into files with -o, into the terminal without or with --terminal; without a display and a home."""
    log = "\n".join(lines(90)).encode()
    ended = draftwire(
        "plot", "--file", "-", "-o", str(tmp_path / "x.png"), stdin=log, DISPLAY="", HOME="/nowhere", MPLBACKEND="tkagg"
    )
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr == f"wrote {tmp_path / 'x.png'}\n"
    ended = draftwire("plot", "--file", "-", "--terminal", "-o", str(tmp_path / "x.svg"), stdin=log)
    assert "tokens/s" in ended.stdout
    assert (tmp_path / "x.svg").is_file()


def test_reports_do_not_wait_for_matplotlib() -> None:
    """It is imported for files alone."""
    code = "import sys, tools.journal_plot, tools.journal_terminal; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the terminal -----------------------------------------------------------------------------------------------------


def terminal(requests: Requests, width: int = 100) -> str:
    out = io.StringIO()
    print_plot(requests, summaries(requests), "a week", Console(file=out, width=width, markup=False, highlight=False))
    return out.getvalue()


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 50)), min_size=1, max_size=30),
    st.integers(1, 30),
    st.integers(1, 10),
)
def test_each_point_has_its_dot(points: list[tuple[float, float]], columns: int, rows: int) -> None:
    """In the braille character of its place, at the corner of it that is nearest; nothing else is drawn."""
    canvas = Canvas(columns, rows, (0.0, 100.0), (0.0, 50.0))
    x, y = (np.array(values) for values in zip(*points, strict=True))
    canvas.points(x, y, 0)
    drawn = set()
    for row in range(rows):
        for column, character in enumerate(canvas.row(row).plain):
            bits = 0 if character == " " else ord(character) - 0x2800
            for bit, (dx, dy) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]):
                if bits >> bit & 1:
                    drawn.add((2 * column + dx, 4 * rows - 1 - (4 * row + dy)))
    expected = {
        (min(2 * columns - 1, int(px / 100 * 2 * columns)), min(4 * rows - 1, int(py / 50 * 4 * rows)))
        for px, py in points
    }
    assert drawn == expected


def test_the_terminal_shows_points_bars_and_statistics() -> None:
    """As wide as the terminal, no wider; the line of plain decoding, a bar for each depth."""
    for width in (60, 100, 300):
        out = terminal(REQUESTS, width)
        picture = out[: out.index("accepted by depth")].splitlines()
        assert max(map(len, picture)) <= width
        assert "╌" * 10 in out
        assert re.search("[\u2801-\u28ff]", out)
        bars = re.findall(r"^ +(\d) (█+)\S? (\S+)$", out, re.MULTILINE)
        assert [(depth, rate) for depth, _, rate in bars] == [("1", "90.0%"), ("2", "49.0%")]
        assert len(bars[0][1]) / len(bars[1][1]) == pytest.approx(90 / 49, rel=0.1)
        assert "mean" in out
    assert (TARGET, SMALL) in REQUESTS.groups


@pytest.mark.parametrize(
    ("share", "expected"), [(0, ""), (0.5, "█████"), (1, "██████████"), (1 / 80, "▏"), (0.56, "█████▋")]
)
def test_a_bar_is_exact_to_an_eighth(share: float, expected: str) -> None:
    assert bar(share, 10) == expected
