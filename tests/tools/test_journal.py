"""Reading request_done lines: every form in which they come, from files and from a real journal, and junk between."""

from __future__ import annotations

import gzip
import io
import json
import math
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import DraftwireError
from tests.tools.journal_sample import START, entry, lines, request_done
from tools.journal import MAX_LINE, NOT_SAID, Counts, Done, Label, Query, parse_time, read_requests
from tools.journal_statistics import collect

REMOTE = "/usr/lib/systemd/systemd-journal-remote"


def fields(number: int = 1) -> dict[str, Any]:
    import random

    return request_done(number, random.Random(number), START + number)


EVERYTHING = Query()


def read(data: bytes, path: Path, query: Query = EVERYTHING) -> tuple[list[Done], Counts]:
    file = path / "lines"
    file.write_bytes(data)
    counts = Counts()
    return list(read_requests(replace(query, files=(str(file),)), counts)), counts


def export(entries: Sequence[dict[str, Any]]) -> bytes:
    """Entries in journald's export format, as systemd-journal-remote reads it."""
    return b"".join(
        b"".join(f"{name}={value}\n".encode() for name, value in fields.items() if name != "__CURSOR") + b"\n"
        for fields in entries
    )


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal directory as journald keeps it, with 300 entries, one of them of more than 4 KiB."""
    if not Path(REMOTE).exists() or shutil.which("journalctl") is None:
        pytest.skip("systemd-journal-remote and journalctl are not installed")
    entries = [json.loads(line) for line in lines(300)]
    long = json.loads(entries[0]["MESSAGE"])
    entries[0]["MESSAGE"] = json.dumps({**long, "code": "x" * 5000})
    directory = tmp_path / "journal"
    directory.mkdir()
    subprocess.run(
        [REMOTE, "-o", str(directory / "remote.journal"), "-"], input=export(entries), check=True, capture_output=True
    )
    return directory


def test_a_line_becomes_what_it_says(tmp_path: Path) -> None:
    """Names, numbers, depths and time are those of the line."""
    line = fields(1)
    [done], counts = read(json.dumps(line).encode(), tmp_path)
    assert (done.target, done.draft) == (
        Label("Ling-1T-smol-IQ4_KSS-00001-of-00012.gguf", "IQ4_KSS", "ik"),
        Label("Ling-flash-2.0-IQ1_KT.gguf", "IQ1_KT", "cuda"),
    )
    assert (done.worker, done.status, done.time) == ("gpu", 200, START + 1)
    assert (done.proposed, done.accepted) == (line["draft_n"], line["draft_n_accepted"])
    assert (done.prompt, done.tokens, done.decode_ms) == (900, line["predicted_n"], line["predicted_ms"])
    assert done.speed == line["predicted_per_second"]
    assert done.by_depth == tuple((d["draft_n"], d["draft_n_accepted"]) for d in line["draft_by_depth"])
    assert (counts.lines, counts.requests, counts.bad) == (1, 1, 0)


MESSAGE = json.dumps(fields(1))
FORMS = {
    "plain": MESSAGE,
    "with a priority": "<6>" + MESSAGE,
    "short": "Nov 28 09:39:12 box draftwire-gateway[4242]: " + MESSAGE,
    "export format": "MESSAGE=" + MESSAGE,
    "JSON": entry(fields(1), START + 1),
    "JSON, bytes": json.dumps({"MESSAGE": list(MESSAGE.encode())}, separators=(",", ":")),
    "JSON, spaced": json.dumps({"MESSAGE": list(MESSAGE.encode())}, separators=(" , ", " : ")),
    "JSON, twice": json.dumps({"MESSAGE": ["something else", MESSAGE]}, separators=(",", ":")),
    "JSON, with a priority": json.dumps({"MESSAGE": "<6>" + MESSAGE}),
    "carriage return": MESSAGE + "\r",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_line_is_understood_in_every_form(form: str, tmp_path: Path) -> None:
    """As printed, with prefixes, as exported, as text or as bytes: the same request; so packed, and without its end."""
    [expected], _ = read(MESSAGE.encode(), tmp_path)
    for data in (FORMS[form].encode(), FORMS[form].encode() + b"\n", gzip.compress(FORMS[form].encode())):
        [done], counts = read(data, tmp_path)
        assert done == expected
        assert counts.bad == 0


def test_other_lines_are_only_counted(tmp_path: Path) -> None:
    """Other events, other programs, a command line that names the event, empty lines: no requests, nothing bad."""
    others = [
        json.dumps({"event": "ready"}),
        json.dumps({"event": "other", "why": "request_done"}),
        json.dumps({"MESSAGE": "COMMAND=/usr/bin/grep request_done"}),
        json.dumps({"MESSAGE": json.dumps({"event": "other", "request_done": 1})}),
        json.dumps({"CODE": "request_done"}),
        "grep request_done",
        "",
        "[1, 2]",
    ]
    found, counts = read("\n".join(others).encode(), tmp_path)
    assert found == []
    assert (counts.lines, counts.bad, counts.cut) == (len(others), 0, 0)


def changed(**change: Any) -> str:
    line = {**fields(1), **change}
    return json.dumps({name: value for name, value in line.items() if value is not Ellipsis})


BAD = {
    "cut off": MESSAGE[:-20],
    "two in a line": MESSAGE + MESSAGE,
    "nested without end": "[" * 50 + '{"event": "request_done", "x": ' + "[" * 100_000,
    "huge number": MESSAGE.replace('"status": 200', '"status": ' + "9" * 5000),
    "exported, cut off": entry(fields(1), START)[:-30],
    "bytes that are none": json.dumps({"MESSAGE": [1, 2, 999]}, separators=(",", ":")),
    "no tokens": changed(predicted_n=...),
    "text for a number": changed(predicted_per_second="7.1"),
    "true for a number": changed(draft_n=True),
    "NaN": changed(predicted_ms=math.nan),
    "infinity": changed(predicted_per_second=math.inf),
    "negative": changed(draft_n_accepted=-1),
    "more than proposed": changed(draft_n=1, draft_n_accepted=2),
    "depths that skip": changed(draft_by_depth=[{"depth": 2, "draft_n": 1, "draft_n_accepted": 1}]),
    "depths that are none": changed(draft_by_depth=[1]),
    "more than proposed at a depth": changed(draft_by_depth=[{"depth": 1, "draft_n": 1, "draft_n_accepted": 2}]),
    "endless depths": changed(draft_by_depth=[{"depth": d, "draft_n": 0, "draft_n_accepted": 0} for d in range(9999)]),
    "a name that is none": changed(target_model=7),
    "an endless name": changed(worker="x" * 1000),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_counted_and_costs_no_other(kind: str, tmp_path: Path) -> None:
    """What should be a request and is not is left out, with a reason; lines before and after count."""
    found, counts = read(f"{MESSAGE}\n{BAD[kind]}\n{MESSAGE}\n".encode(), tmp_path)
    assert len(found) == counts.requests == 2
    assert counts.bad == 1
    assert counts.first_bad


def test_an_endless_line_is_skipped(tmp_path: Path) -> None:
    """Gigabytes without a line end are not kept; what follows is read."""
    for size in (MAX_LINE + 1, 2 * MAX_LINE, 5 * MAX_LINE + 77):
        found, counts = read(f"{MESSAGE}\n{'request_done' + 'x' * size}\n{MESSAGE}".encode(), tmp_path)
        assert len(found) == 2
        assert counts.lines == 3


def test_a_message_that_journalctl_left_out_is_said(tmp_path: Path) -> None:
    """Without --all journalctl writes null for long messages: these are counted apart, with the cure."""
    found, counts = read(b'{"MESSAGE":null}\n{"MESSAGE" : null}\n', tmp_path)
    assert (found, counts.cut, counts.bad) == ([], 2, 0)


def test_names_cannot_steer_a_terminal(tmp_path: Path) -> None:
    """Control characters and lone surrogates in a name become question marks."""
    [done], _ = read(changed(worker="a\x1b[31m\ud800\n").encode(), tmp_path)
    assert done.worker == "a?[31m??"


def test_lines_of_an_earlier_version_are_understood(tmp_path: Path) -> None:
    """Without the configuration: nobody knows with what a worker drafted, but it is no plain decoding."""
    names = [f"{side}_{name}" for side in ("target", "draft") for name in ("model", "quant", "engine")]
    drafted, plain = (dict.fromkeys(names, ...) | {"worker": worker} for worker in ("gpu", ""))
    found, counts = read(f"{changed(**drafted)}\n{changed(**plain)}".encode(), tmp_path)
    assert [done.draft for done in found] == [NOT_SAID, Label("", "", "")]
    assert counts.bad == 0


@pytest.mark.parametrize("time", [None, 7, "no time", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z"])
def test_a_request_without_time_counts(time: Any, tmp_path: Path) -> None:
    """But not where a period is asked for."""
    [done], _ = read(changed(time=time).encode(), tmp_path)
    assert math.isnan(done.time)
    found, counts = read(changed(time=time).encode(), tmp_path, Query(since=0))
    assert (found, counts.outside) == ([], 1)


def test_journalds_time_serves_where_the_line_has_none(tmp_path: Path) -> None:
    line = {name: value for name, value in fields(1).items() if name != "time"}
    [done], _ = read(entry(line, START + 5).encode(), tmp_path)
    assert done.time == START + 5


def test_a_period_and_units_are_kept(tmp_path: Path) -> None:
    """--since and --until include their ends; --unit takes names and patterns, as journalctl does."""
    data = "\n".join(entry(fields(n), START + n) for n in range(10)).encode()
    found, counts = read(data, tmp_path, Query(since=START + 2, until=START + 5))
    assert [done.time - START for done in found] == [2, 3, 4, 5]
    assert (counts.requests, counts.outside) == (4, 6)
    for units, n in (
        *((("draftwire-gateway",), 10), (("draftwire-gateway.service",), 10), (("draftwire-*",), 10)),
        *((("draftwire-router",), 0), (("draft",), 0), (("x", "draftwire-g*"), 10)),
    ):
        assert len(read(data, tmp_path, Query(units=units))[0]) == n
    assert read(MESSAGE.encode(), tmp_path, Query(units=("draftwire-gateway",)))[0] == []  # of no unit


def test_several_files_and_standard_input_are_read_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order given; "-" once is standard input, packed or not."""
    for name in "ab":
        (tmp_path / name).write_text(MESSAGE + "\n")
    for data in (MESSAGE.encode(), gzip.compress(MESSAGE.encode())):
        stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)))  # type: ignore[arg-type]
        monkeypatch.setattr(sys, "stdin", stdin)
        counts = Counts()
        assert len(list(read_requests(Query((str(tmp_path / "a"), "-", str(tmp_path / "b"))), counts))) == 3
        assert counts.lines == 3


def test_a_damaged_archive_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    """Cut off or garbled: what came before counts, and it is said."""
    whole = gzip.compress("\n".join(lines(900)).encode())
    garbled = bytearray(whole)
    garbled[len(whole) // 2 : len(whole) // 2 + 50] = b"x" * 50
    for data in (whole[: len(whole) // 2], bytes(garbled)):
        found, counts = read(data, tmp_path)
        assert 0 < len(found) < 300
        assert len(counts.notes) == 1


@pytest.mark.parametrize("kind", ["nothing", "unreadable"])
def test_what_cannot_be_opened_is_one_error(kind: str, tmp_path: Path) -> None:
    """It names the file and what to give instead."""
    path = Path("/proc/self/mem") if kind == "unreadable" else tmp_path / kind  # opens, even for root
    with pytest.raises(DraftwireError) as caught:
        list(read_requests(Query((str(path),)), Counts()))
    assert str(path) in caught.value.message
    assert caught.value.remedy


def test_without_journalctl_there_is_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DraftwireError, match="cannot run journalctl") as caught:
        list(read_requests(Query(), Counts()))
    assert "--file" in caught.value.remedy


# --- a real journal ---------------------------------------------------------------------------------------------------


def test_a_journal_directory_is_read(journal: Path) -> None:
    """Through journalctl: the same requests as in the entries that went in, long messages too; so its file alone."""
    counts = Counts()
    found = list(read_requests(Query((str(journal),)), counts))
    assert (counts.lines, counts.requests, counts.bad, counts.cut) == (300, 100, 0, 0)
    exact = Counts()
    file = journal.parent / "lines.jsonl"
    file.write_text("\n".join(lines(300)))
    assert sorted(found, key=lambda d: d.time) == list(read_requests(Query((str(file),)), exact))
    alone = Counts()
    assert len(list(read_requests(Query((str(journal / "remote.journal"),)), alone))) == 100


def test_units_and_times_of_a_journal_are_asked_of_journalctl(journal: Path) -> None:
    """So that it need not print what is not wanted; a unit that is not there is no requests, not an error."""
    counts = Counts()
    assert len(list(read_requests(Query((str(journal),), ("draftwire-gateway*",)), counts))) == 100
    assert counts.lines == 100
    counts = Counts()
    half = START + 7 * 86400 / 2
    assert len(list(read_requests(Query((str(journal),), since=half), counts))) == 50
    assert counts.lines == 150
    for unit in ("draftwire-router", "nothing-of-this-name*"):
        assert list(read_requests(Query((str(journal),), (unit,)), Counts())) == []


def test_an_export_of_a_journal_tells_what_is_missing(journal: Path, tmp_path: Path) -> None:
    """`journalctl -o json` without --all leaves the message of more than 4 KiB out."""
    for options, cut in (([], 1), (["--all"], 0)):
        out = subprocess.run(["journalctl", "-D", journal, "-o", "json", *options], capture_output=True, check=True)
        found, counts = read(out.stdout, tmp_path)
        assert (len(found), counts.cut, counts.lines) == (100 - cut, cut, 300)


def test_a_damaged_journal_is_no_crash(journal: Path) -> None:
    """Whatever journalctl makes of it: requests, or a DraftwireError."""
    file = journal / "remote.journal"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(bytes(data))
    for source in (journal, file):
        try:
            assert len(list(read_requests(Query((str(source),)), Counts()))) <= 100
        except DraftwireError as error:
            assert "journalctl" in str(error)  # noqa: PT017 (either is right)


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", datetime(2026, 3, 10, 15, 30)),
        ("today", datetime(2026, 3, 10)),
        ("yesterday", datetime(2026, 3, 9)),
        ("-7d", datetime(2026, 3, 3, 15, 30)),
        ("7 days ago", datetime(2026, 3, 3, 15, 30)),
        ("-2h", datetime(2026, 3, 10, 13, 30)),
        ("90min ago", datetime(2026, 3, 10, 14, 0)),
        ("1 week ago", datetime(2026, 3, 3, 15, 30)),
        ("-30s", datetime(2026, 3, 10, 15, 29, 30)),
        ("2026-01-31", datetime(2026, 1, 31)),
        ("2026-01-31 14:05", datetime(2026, 1, 31, 14, 5)),
        ("2026-01-31T14:05:06", datetime(2026, 1, 31, 14, 5, 6)),
        ("9:05", datetime(2026, 3, 10, 9, 5)),
        ("14:05:06", datetime(2026, 3, 10, 14, 5, 6)),
    ],
)
def test_times_are_understood(text: str, expected: datetime) -> None:
    """As people and journalctl write them, in local time."""
    assert parse_time(text, datetime(2026, 3, 10, 15, 30)) == expected.timestamp()


def test_times_with_a_zone_or_in_seconds_are_the_same_everywhere() -> None:
    now = datetime(2026, 3, 10)
    assert parse_time("2026-01-01T00:00:00Z", now) == START
    assert parse_time("2026-01-01 01:00+01:00", now) == START
    assert parse_time(f"@{START}.5", now) == START + 0.5


@given(st.text(max_size=20))
def test_any_text_is_a_time_or_an_error(text: str) -> None:
    try:
        assert math.isfinite(parse_time(text, datetime(2026, 3, 10)))
    except DraftwireError as error:
        assert error.code == "bad_time"  # noqa: PT017


# --- junk, and memory -------------------------------------------------------------------------------------------------

JUNK = st.one_of(
    st.binary(max_size=300),
    st.sampled_from([value.encode("utf-8", "surrogateescape") for value in BAD.values() if len(value) < 5000]),
    st.builds(lambda start, end: MESSAGE.encode()[start:end], st.integers(0, 2000), st.integers(0, 2000)),
    st.builds(
        lambda at, byte: MESSAGE.encode()[:at] + bytes([byte]) + MESSAGE.encode()[at + 1 :],
        st.integers(0, len(MESSAGE) - 1),
        st.integers(0, 255),
    ),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(JUNK, max_size=6), st.booleans())
def test_no_junk_between_lines_costs_a_line(tmp_path: Path, junk: list[bytes], packed: bool) -> None:
    """Whatever stands between good lines, the good ones are read, and nothing is raised."""
    data = b"".join(MESSAGE.encode() + b"\n" + piece + b"\n" for piece in junk) + MESSAGE.encode()
    good = data.split(b"\n").count(MESSAGE.encode())
    found, counts = read(gzip.compress(data, 1) if packed else data, tmp_path)
    [expected], _ = read(MESSAGE.encode(), tmp_path)
    assert found.count(expected) >= good >= len(junk) + 1
    assert counts.lines == data.count(b"\n") + 1
    assert counts.requests == len(found)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=2000))
def test_any_bytes_are_read(tmp_path: Path, data: bytes) -> None:
    """A file of junk has lines, and maybe a note; never anything else."""
    _, counts = read(data, tmp_path)
    assert counts.lines <= data.count(b"\n") + 1


def test_memory_does_not_grow_with_lines(tmp_path: Path) -> None:
    """Of a line that is no request nothing stays, of a request a row of eight numbers."""
    request, other = MESSAGE.encode() + b"\n", json.dumps({"event": "ready", "x": "y" * 200}).encode() + b"\n"
    bad = b'{"event": "request_done"}\n'

    def kept(data: bytes) -> tuple[int, int]:
        """Bytes kept after reading, and at the most while reading."""
        file = tmp_path / "lines"
        file.write_bytes(data)
        del data
        tracemalloc.start()
        requests = collect(read_requests(Query((str(file),)), Counts()))
        size, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        del requests
        return size, peak

    kept(request + other + bad)  # what is made once
    few, few_peak = kept(request + other * 6000 + bad * 30_000)
    many, many_peak = kept(request + other * 30_000 + bad * 90_000)
    assert abs(many - few) < 2000
    assert many_peak < few_peak + 200_000
    some, more = kept(request * 1000)[0], kept(request * 5000)[0]
    assert (more - some) / 4000 < 8 * 8 * 1.3
