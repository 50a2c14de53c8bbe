"""`draftwire bench engine`: what is measured, what is printed and written, and what is refused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shared.engine.interface import Chunk, EngineSettings, Pace
from shared.engine.null import NullEngine, NullLogits
from shared.errors import EngineError, SettingsError
from tools.bench_engine import bench_engine, engine_tables, parse_sizes, print_engine_bench, write_json

SETTINGS = EngineSettings(engine="null", n_ctx=64, n_slots=2, n_batch=32)
SIZES: dict[str, Any] = {"contexts": (8,), "prefills": (40,), "decode_tokens": 4, "repeats": 3}


class Recorder(NullEngine):
    """Notes each pass as (start, tokens, rows)."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self.passes: list[tuple[int, tuple[int, ...], int]] = []

    def forward(self, chunks: Any) -> NullLogits:
        chunk: Chunk
        [chunk] = chunks
        self.passes.append((chunk.start, tuple(chunk.tokens.tolist()), chunk.rows))
        return super().forward(chunks)


def test_every_number_of_rows_is_measured() -> None:
    """Each asked number of rows, and one row, is measured `repeats` times; costs are relative to one row."""
    bench = bench_engine(SETTINGS, **SIZES, rows=(4, 2))
    assert bench.info.engine == "null"
    [cost] = bench.contexts
    assert [row.rows for row in cost.rows] == [1, 2, 4]
    assert cost.rows[0].relative == 1.0
    spreads = [bench.prefills[0].per_second, cost.decode_per_second]
    spreads += [spread for row in cost.rows for spread in (row.forward_ms, row.read_ms, row.total_ms)]
    for spread in spreads:
        assert spread.n == 3
        assert 0 < spread.least <= spread.median <= spread.most
    for row in cost.rows:
        assert row.forward_ms.least + row.read_ms.least <= row.total_ms.least
        assert row.total_ms.most <= row.forward_ms.most + row.read_ms.most


def test_an_emulated_engine_is_measured_at_its_pace() -> None:
    """The figures are those of the profile, or a little slower, and the table says what was measured."""
    pace = Pace(first_row_ms=4, further_row_ms=3, prefill_per_second=4000)
    bench = bench_engine(
        replace(SETTINGS, engine="emulated", inner="null", pace=pace), **{**SIZES, "prefills": (29,)}, rows=(3,)
    )
    assert bench.info.engine == "emulated (null)"
    assert bench.prefills[0].per_second.most <= 29 / 0.011  # 4 ms for the last row, 7 for the 28 tokens before it
    assert bench.contexts[0].decode_per_second.most <= 250
    for row, least in zip(bench.contexts[0].rows, (4, 10), strict=True):
        assert row.forward_ms.least >= least


def test_several_contexts_and_prefills() -> None:
    """Each length is measured; context 0 is an empty cache, and rows are the model's own greedy continuation."""
    engine = Recorder(SETTINGS)
    bench = bench_engine(
        SETTINGS, contexts=(0, 8), prefills=(4, 40), decode_tokens=4, rows=(1, 3), repeats=2, load=lambda _: engine
    )
    assert [cost.context for cost in bench.contexts] == [0, 8]
    assert [prefill.tokens for prefill in bench.prefills] == [4, 40]
    for context in (0, 8):
        passes = [tokens for start, tokens, rows in engine.passes if (start, len(tokens), rows) == (context, 3, 3)]
        assert len(passes) == 3  # one of them to warm up
        first = passes[0][0]
        following = {tokens[0] for start, tokens, rows in engine.passes if start == context + 1 and rows == 1}
        assert passes == [(first, *passes[0][1:])] * 3
        assert following == {passes[0][1]}
    prefilled = [(start, len(tokens), rows) for start, tokens, rows in engine.passes[:9]]
    assert prefilled == [(0, 4, 1), (0, 32, 0), (32, 8, 1)] * 3


def test_random_tokens_are_fresh_in_every_pass() -> None:
    """With random_tokens no two passes of rows are alike; without, all of one size are."""
    for random_tokens, n in ((False, 1), (True, 4)):
        engine = Recorder(SETTINGS)
        bench_engine(SETTINGS, **SIZES, rows=(6,), random_tokens=random_tokens, load=lambda _, e=engine: e)
        assert len({tokens for _, tokens, rows in engine.passes if rows == 6}) == n


def test_the_table_gives_total_and_spread() -> None:
    """Per context a table of at most 80 columns, with forward, read and total times, and the figures above it."""
    bench = bench_engine(SETTINGS, **{**SIZES, "contexts": (0, 8)}, rows=(4, 2))
    file = io.StringIO()
    print_engine_bench(bench, Console(file=file, width=80))
    text = file.getvalue()
    assert text.startswith("null: null (null), loaded in ")
    for part in ("prefill of 40: ", "after 0 tokens of context", "after 8 tokens of context", "total ms", "relative"):
        assert part in text
    assert len(engine_tables(bench)) == 2
    assert text.count(" to ") == 1 + 2 * (1 + 1 + 3)  # prefill; for each context decode, caption, rows


def test_json_holds_every_figure(tmp_path: Path) -> None:
    """The file has the spreads of everything; one that cannot be written is known before anything is measured."""
    bench = bench_engine(SETTINGS, **SIZES, rows=(2,))
    path = tmp_path / "figures.json"
    write_json(path, None)
    write_json(path, bench)
    written = json.loads(path.read_text())
    assert written["info"]["engine"] == "null"
    assert written["contexts"][0]["context"] == 8
    assert set(written["contexts"][0]["rows"][1]) == {"rows", "forward_ms", "read_ms", "total_ms", "relative"}
    assert written["prefills"][0]["per_second"]["n"] == 3
    with pytest.raises(SettingsError, match="cannot write"):
        write_json(tmp_path / "none" / "figures.json", None)


@pytest.mark.parametrize(
    "change",
    [{"contexts": (61,)}, {"contexts": (0, 61)}, {"prefills": (8, 65)}, {"rows": (33,)}],
    ids=["context", "one of the contexts", "prefill", "rows"],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    """Longer than the context, or more rows than a batch."""
    with pytest.raises(EngineError) as caught:
        bench_engine(SETTINGS, **{**SIZES, "rows": (1,), **change})
    assert caught.value.code == "context_exceeded"


@pytest.mark.parametrize(
    "change",
    [{"repeats": 0}, {"prefills": (0,)}, {"rows": (0,)}, {"contexts": (-1,)}, {"contexts": ()}, {"prefills": ()}],
)
def test_sizes_that_measure_nothing_are_refused(change: dict[str, Any]) -> None:
    """Everything starts at 1 and contexts at 0; an empty list is none."""
    with pytest.raises(EngineError, match=r"start at [01]"):
        bench_engine(SETTINGS, **{**SIZES, **change})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8", (8,)), ("1-4", (1, 2, 3, 4)), ("8, 1-3,2", (1, 2, 3, 8)), ("0,4096", (0, 4096)), ("5-5", (5,))],
)
def test_sizes_are_numbers_and_ranges(text: str, expected: tuple[int, ...]) -> None:
    """A list is ascending, and each number is in it once."""
    assert parse_sizes("--context", text, least=0) == expected


@pytest.mark.parametrize("text", ["", "x", "1,", "-1", "1-", "4-1", "0", "0-3", "1-2-3", "1.5", "1-9999", "²"])
def test_what_is_no_list_of_sizes_is_refused(text: str) -> None:
    """The option and what it was are named, and what would be right."""
    with pytest.raises(SettingsError) as caught:
        parse_sizes("--rows", text)
    assert f"--rows is {text!r}" in caught.value.message
    assert "numbers" in caught.value.remedy
