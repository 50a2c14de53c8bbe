"""`draftwire workers`: what it prints of a status, and what it says when there is no router."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from shared.errors import DraftwireError
from shared.messages import Error, Ordered, OrderWorker, SessionStatus, Status, WorkerStatus
from shared.settings import Settings, load_settings
from tools import workers
from tools.workers import (
    fetch,
    order,
    print_workers,
    printable,
    session_line,
    show_workers,
    state_text,
    worker_cells,
    workers_json,
)

FAST = WorkerStatus(
    "fast", "cuda", "/models/small.gguf", "ok", "", 0, 0, 2, 4, 1500, 10_000, 4000, 0.83, 512, 1.43
)  # fmt: skip
LIAR = replace(FAST, instance="liar", state="demoted", reason="it floods", retry_ms=8000, n_sessions=0)
NEW = replace(FAST, instance="new", n_judged=0, rtt_us=0)
SESSION = SessionStatus(255, "verifier", "fast", "fastest", 120, 1, 0.9, 1.5)
STATUS = Status(1, "0", 9, 2, (), (LIAR, FAST, NEW), (SESSION, SessionStatus(7, "verifier", "", "x", 3, 0, 0.0, 1.0)))


def printed(status: Status) -> str:
    console = Console(file=io.StringIO(), width=160, markup=False, highlight=False)
    print_workers(status, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_row_has_the_figures_with_their_units() -> None:
    assert worker_cells(FAST) == (
        *("fast", "cuda", "small.gguf", "ok", "1.5 ms", "100", "4000", "83 % (512)", "2/4", "1.43x"),
    )


def test_what_is_not_measured_is_no_figure() -> None:
    """Before any proposal was judged, the assumptions behind the choice are not shown as measurements."""
    cells = worker_cells(NEW)
    assert cells[4:8] == ("-",) * 4
    assert cells[-1] == "1.43x ?"


def test_a_demoted_worker_says_why_and_until_when() -> None:
    assert "it floods" in worker_cells(LIAR)[3]
    assert "8 s" in worker_cells(LIAR)[3]


def test_every_worker_and_session_is_printed() -> None:
    text = printed(STATUS)
    assert text.index("fast") < text.index("liar") < text.index("new")
    assert session_line(SESSION) in text
    assert "nobody, x" in text


def test_a_session_says_who_and_why() -> None:
    line = session_line(SESSION)
    for part in ("00ff", "fast, fastest", "1.50x", "90 % accepted", "moved once"):
        assert part in line


def test_without_workers_it_says_so() -> None:
    assert "no draft worker" in printed(Status(1, "0", 9, 0, ()))


def test_json_has_every_figure() -> None:
    parsed = json.loads(json.dumps(workers_json(STATUS)))
    assert parsed["workers"][1]["acceptance"] == 0.83
    assert parsed["sessions"][0]["why"] == "fastest"


def test_without_a_router_there_is_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "router_status", lambda _settings: None)
    with pytest.raises(DraftwireError, match="no router answers") as error:
        fetch(load_settings(None, [f'run_dir="{tmp_path}"'], {}))
    assert "draftwire up" in error.value.remedy


def test_watching_shows_it_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until interrupted; one that is not to watch is shown once."""
    shown: list[Status] = []
    pauses = iter((None, None, KeyboardInterrupt()))

    def pause(seconds: float) -> None:
        assert seconds == 2.0
        if (interrupt := next(pauses)) is not None:
            raise interrupt

    monkeypatch.setattr(workers, "router_status", lambda _settings: STATUS)
    monkeypatch.setattr(workers.time, "sleep", pause)
    with pytest.raises(KeyboardInterrupt):
        show_workers(Settings(), shown.append, 2.0)
    assert len(shown) == 3
    show_workers(Settings(), shown.append, None)
    assert len(shown) == 4


def test_orders_stand_in_the_state() -> None:
    """Why it gets nothing, or everything."""
    drained = replace(FAST, state="drained", reason="drained by an operator", order="drain", there=True)
    assert state_text(drained) == "drained by an operator"
    assert state_text(replace(drained, there=False)) == "drained by an operator; away"
    assert state_text(replace(FAST, order="pin")).startswith("ok; new generations are pinned")
    assert state_text(replace(LIAR, order="pin")).startswith("demoted: it floods")


def test_what_peers_say_cannot_move_the_cursor() -> None:
    """A worker chooses its name."""
    evil = "a\x1b[2Jb"
    assert "\x1b" not in printed(replace(STATUS, workers=(replace(FAST, instance=evil, engine=evil, model=evil),)))
    assert printable("a\x1b\x07b\n") == "a\ufffd\ufffdb\ufffd"


def test_json_leaves_the_histograms_to_metrics() -> None:
    assert "round_trip" not in json.loads(json.dumps(workers_json(STATUS)))["workers"][0]


@pytest.mark.parametrize(
    ("answer", "session", "said"),
    [
        (Ordered(1, 0, True), 0, "fast is drained"),
        (Ordered(1, 1, True), 0, "fast is drained; 1 generation moved on"),
        (Ordered(1, 2, False, "cannot write it"), 0, "2 generations moved on; cannot write it; the router will have"),
        (Ordered(1, 1, False), 255, "fast drafts for 00000000000000ff; 1 generation moved on"),
        (Ordered(1, 0, False, "fast is away"), 255, "fast is to draft for 00000000000000ff; fast is away"),
    ],
)
def test_an_order_says_what_has_come_of_it(
    monkeypatch: pytest.MonkeyPatch, answer: Ordered, session: int, said: str
) -> None:
    asked: list[OrderWorker] = []

    def ask(_settings: Settings, question: OrderWorker, *_kinds: type, timeout_s: float) -> Ordered:
        assert timeout_s
        asked.append(question)
        return answer

    monkeypatch.setattr(workers, "ask_router", ask)
    assert said in order(Settings(), "fast", "drain", session)
    assert (asked[0].worker, asked[0].order, asked[0].session) == ("fast", "drain", session)


def test_an_order_that_is_refused_or_unheard_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = Error(1, "unknown_worker", "there is no draft worker 'x'", "known here: fast")
    answers = iter((refusal, None))
    monkeypatch.setattr(workers, "ask_router", lambda *_args, **_more: next(answers))
    with pytest.raises(DraftwireError, match="known here: fast") as error:
        order(Settings(), "x", "ban")
    assert error.value.code == "unknown_worker"
    with pytest.raises(DraftwireError, match="no router answers"):
        order(Settings(), "x", "ban")
