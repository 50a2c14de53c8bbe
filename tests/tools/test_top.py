"""`draftwire top`: what follows from successive statuses, and how it ends."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from rich.console import Console

from shared.errors import DraftwireError
from shared.messages import SessionStatus, Status, Totals, WorkerStatus
from tools.top import WINDOW_S, Watch, bar, run_top, view

WORKER = WorkerStatus("fast", "cuda", "m", "ok", "", 0, 0, 2, 4, 1500, 10_000, 0, 0.83, 512, 1.43, there=True)
SESSION = SessionStatus(255, "verifier", "fast", "fastest", 120, 1, 0.9, 1.5)


def status(at: int, uptime_s: int = 100, **totals: int) -> Status:
    session = replace(SESSION, n_tokens=at)
    return Status(1, "1.0", uptime_s, 1, (), (WORKER,), (session,), Totals(**{"n_opened": 5, **totals}))


def shown(watch: Watch, now: float, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(view(watch, now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Clock:
    """Time that passes only by sleeping; the sleep at `interrupt_at` is interrupted as by Ctrl-C."""

    def __init__(self, interrupt_at: int = -1) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []
        self._interrupt_at = interrupt_at

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        if len(self.sleeps) == self._interrupt_at:
            raise KeyboardInterrupt
        self.sleeps.append(seconds)
        self.now += seconds


def run(answers: Sequence[Status | DraftwireError | None], clock: Clock, count: int | None, terminal: bool) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=terminal, markup=False, highlight=False)
    coming: Iterator[Status | DraftwireError | None] = iter(answers)

    def fetch() -> Status | None:
        answer = next(coming)
        if isinstance(answer, DraftwireError):
            raise answer
        return answer

    run_top(fetch, console, 2.0, count, clock=clock.time, sleep=clock.sleep)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tokens_a_second_come_from_two_statuses() -> None:
    """Of each generation that was there both times, by the time between them."""
    watch = Watch()
    watch.add(status(100), 10.0)
    assert watch.rates() == {}
    watch.add(replace(status(130), sessions=(replace(SESSION, n_tokens=130), replace(SESSION, session=7))), 12.0)
    assert watch.rates() == {255: 15.0}


def test_totals_of_the_last_minute() -> None:
    """What was added in about a minute, however long it has been watched."""
    watch = Watch()
    for second in range(200):
        watch.add(status(1, 100 + second, n_tokens=10 * second, n_accepted=4 * second), float(second))
    seconds, gained = watch.lately()
    assert WINDOW_S <= seconds <= WINDOW_S + 1
    assert (gained.n_tokens, gained.n_accepted) == (10 * seconds, 4 * seconds)
    assert "last 1 min 0 s: 600 tokens (10.0/s), 40 % of them drafted" in shown(watch, 200.0)


def test_rows_have_bars_and_figures() -> None:
    watch = Watch()
    watch.add(status(100), 10.0)
    watch.add(status(130), 12.0)
    text = shown(watch, 12.0)
    assert "█████····· 2/4" in text
    assert "████████·· 83 %" in text
    row = next(line for line in text.splitlines() if line.startswith("00000000000000ff"))
    for part in ("fast", "130", "15.0", "90 %", "fastest"):
        assert part in row
    assert "1 generation, 15.0 tokens/s" in text


@pytest.mark.parametrize(("share", "text"), [(-1, "····"), (0.5, "██··"), (1, "████"), (7, "████")])
def test_bars(share: float, text: str) -> None:
    assert bar(share, 4) == text


def test_a_router_that_is_away_is_shown_with_what_was_last_known() -> None:
    """And since when; its rates are none any more."""
    watch = Watch()
    watch.add(status(100), 10.0)
    watch.add(status(130), 12.0)
    watch.add(None, 13.0)
    watch.add(None, 20.0)
    text = shown(watch, 20.0)
    assert "the router does not answer, since 7 s" in text
    assert "00000000000000ff" in text
    assert "0.0 tokens/s" in text
    watch.add(status(140, 109), 21.0)
    assert "does not answer" not in shown(watch, 21.0)


def test_a_router_that_has_restarted_begins_anew() -> None:
    """Its totals start at 0; what it had counted before is not subtracted."""
    watch = Watch()
    watch.add(status(100, 500, n_tokens=5000, n_opened=9), 10.0)
    watch.add(status(3, 1, n_tokens=3, n_opened=1), 12.0)
    assert watch.lately() == (0.0, Totals())
    watch.add(status(13, 2, n_tokens=13, n_opened=1), 13.0)
    assert watch.lately()[1].n_tokens == 10


def test_in_a_pipe_there_are_snapshots() -> None:
    """One after the other, without escape sequences, at the interval."""
    clock = Clock()
    text = run([status(1), status(11), status(21)], clock, 3, terminal=False)
    assert "\x1b" not in text
    assert text.count("router 1.0") == 3
    assert text.count("5.0 tokens/s") == 2
    assert clock.sleeps == [2.0, 2.0]


def test_on_a_terminal_it_draws_in_place_and_cleans_up() -> None:
    """On the terminal's other screen, which is left at the end."""
    text = run([status(1), status(11)], Clock(), 2, terminal=True)
    assert text.index("\x1b[?1049h") < text.index("router 1.0") < text.index("\x1b[?1049l")


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_ends_it_well(terminal: bool) -> None:
    """Without a traceback, and with the terminal as it was."""
    text = run([status(1), status(2)], Clock(interrupt_at=1), None, terminal)
    assert "router 1.0" in text
    assert text.count("\x1b[?1049h") == text.count("\x1b[?1049l") == terminal


def test_it_goes_on_without_a_router() -> None:
    """One that is away, or answers in another language, and comes back."""
    answers = [None, DraftwireError("the router's answer cannot be read: protocol version 3"), status(1)]
    text = run(answers, Clock(), 3, terminal=False)
    first, second, third = text.split("\n\n")[:3]
    assert "the router does not answer" in first
    assert "protocol version 3, since 2 s" in second
    assert third.startswith("router 1.0")
