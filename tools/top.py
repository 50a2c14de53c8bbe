"""`draftwire top`: a fleet at work, again and again: generations, draft workers, and what the last minute brought.

Everything comes from successive `Status` messages of the router. Invariant: a router that is away, or comes back with
nothing in its head, is something to show, not an end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shared.errors import DraftwireError
from shared.messages import SessionStatus, Status, Totals, WorkerStatus
from tools.status import duration
from tools.workers import printable, state_text

WINDOW_S = 60.0
_MOST_ROWS = 20
_BAR = 10

Fetch = Callable[[], Status | None]


@dataclass(frozen=True, slots=True)
class Sample:
    """A status, and when it came."""

    at: float
    status: Status


class Watch:
    """The statuses of the last minute, and what follows from more than one of them.

    Attributes:
        status: the last one; None until there was one. away_since: when the router has stopped answering, or None.
        problem: what was wrong with its last answer, or empty.
    """

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()
        self.away_since: float | None = None
        self.problem = ""

    def add(self, status: Status | None, now: float, problem: str = "") -> None:
        """The router's answer; None: it has not come, or could not be read."""
        self.problem = problem
        if status is None:
            self.away_since = now if self.away_since is None else self.away_since
            return
        self.away_since = None
        if self._samples and _restarted(self._samples[-1].status, status):
            self._samples.clear()
        self._samples.append(Sample(now, status))
        while len(self._samples) > 2 and now - self._samples[1].at >= WINDOW_S:
            self._samples.popleft()

    @property
    def status(self) -> Status | None:
        return self._samples[-1].status if self._samples else None

    def rates(self) -> dict[int, float]:
        """Tokens a second of each generation that was there the last two times."""
        if len(self._samples) < 2 or self.away_since is not None:
            return {}
        before, last = self._samples[-2], self._samples[-1]
        seconds = max(1e-3, last.at - before.at)
        tokens = {session.session: session.n_tokens for session in before.status.sessions}
        return {
            session.session: max(0, session.n_tokens - tokens[session.session]) / seconds
            for session in last.status.sessions
            if session.session in tokens
        }

    def lately(self) -> tuple[float, Totals]:
        """Over how many seconds, at most about a minute, and what was added to the totals in them."""
        if len(self._samples) < 2:
            return 0.0, Totals()
        first, last = self._samples[0], self._samples[-1]
        a, b = first.status.totals, last.status.totals
        gained = Totals(*(max(0, getattr(b, name) - getattr(a, name)) for name in Totals.__dataclass_fields__))
        return last.at - first.at, gained


def _restarted(before: Status, after: Status) -> bool:
    return after.uptime_s < before.uptime_s or after.totals.n_opened < before.totals.n_opened


def bar(share: float, width: int = _BAR) -> str:
    """A share of 1 as a bar."""
    full = round(width * min(1.0, max(0.0, share)))
    return "█" * full + "·" * (width - full)


def view(watch: Watch, now: float) -> RenderableType:
    """What is shown now."""
    status = watch.status
    parts: list[RenderableType] = []
    if watch.away_since is not None:
        reason = watch.problem or "the router does not answer"
        parts.append(Text(f"{reason}, since {duration(int(now - watch.away_since))}; trying again", "red"))
    if status is None:
        return Group(*parts or [Text("waiting for the router")])
    rates = watch.rates()
    parts.append(Text(_headline(status, sum(rates.values()))))
    parts.append(Text(_lately(watch)))
    if status.workers:
        parts += [Text(""), _workers(status)]
    if status.sessions:
        parts += [Text(""), _sessions(status, rates)]
    return Group(*parts)


def _headline(status: Status, rate: float) -> str:
    n = status.n_sessions
    verifiers = sum(peer.role == "verifier" and peer.alive for peer in status.peers)
    missing = "" if verifiers else "; no verifier is connected"
    return (
        f"router {printable(status.version)}, up {duration(status.uptime_s)}; "
        f"{n or 'no'} generation{'' if n == 1 else 's'}, {rate:.1f} tokens/s{missing}"
    )


def _lately(watch: Watch) -> str:
    seconds, gained = watch.lately()
    if not seconds:
        return "last minute: nothing to compare with yet"
    share = f"{100 * gained.n_accepted / gained.n_tokens:.0f} % of them drafted, " if gained.n_tokens else ""
    failed = f", {gained.n_failed} failed" if gained.n_failed else ""
    rate = gained.n_tokens / seconds
    return (
        f"last {duration(max(1, round(seconds)))}: {gained.n_tokens} tokens ({rate:.1f}/s), {share}"
        f"{gained.n_drafted} proposed, {gained.n_ended} generations ended{failed}"
    )


def _workers(status: Status) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading, right in (
        *(("worker", False), ("state", False), ("sessions", False), ("accepted", False), ("tokens/s", True)),
        *(("RTT", True), ("speed-up", True)),
    ):
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    workers = sorted(status.workers, key=lambda worker: worker.instance)
    for worker in workers[:_MOST_ROWS]:
        table.add_row(*_worker_cells(worker))
    if len(workers) > _MOST_ROWS:
        table.add_row(f"and {len(workers) - _MOST_ROWS} more")
    return table


def _worker_cells(worker: WorkerStatus) -> tuple[str, ...]:
    measured = worker.n_judged > 0
    return (
        printable(worker.instance),
        state_text(worker),
        f"{bar(worker.n_sessions / max(1, worker.n_slots))} {worker.n_sessions}/{worker.n_slots}",
        f"{bar(worker.acceptance)} {100 * worker.acceptance:.0f} %" if measured else "-",
        f"{1e6 / max(1, worker.token_us):.0f}" if measured else "-",
        f"{worker.rtt_us / 1000:.1f} ms" if worker.rtt_us else "-",
        f"{worker.speed_up:.2f}x{'' if measured else ' ?'}",
    )


def _sessions(status: Status, rates: dict[int, float]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading, right in (
        *(("generation", False), ("worker", False), ("tokens", True), ("tokens/s", True), ("accepted", False)),
        ("why", False),
    ):
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for session in status.sessions[:_MOST_ROWS]:
        table.add_row(*_session_cells(session, rates.get(session.session)))
    if status.n_sessions > _MOST_ROWS:
        table.add_row(f"and {status.n_sessions - _MOST_ROWS} more")
    return table


def _session_cells(session: SessionStatus, rate: float | None) -> tuple[str, ...]:
    return (
        f"{session.session:016x}",
        printable(session.worker) or "nobody",
        str(session.n_tokens),
        "-" if rate is None else f"{rate:.1f}",
        f"{bar(session.acceptance)} {100 * session.acceptance:.0f} %" if session.acceptance else "-",
        printable(session.why),
    )


def run_top(
    fetch: Fetch,
    console: Console,
    interval_s: float,
    count: int | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the fleet until interrupted, or so many times: in place on a terminal, else one snapshot after the other."""
    watch = Watch()
    live = Live(console=console, screen=True, auto_refresh=False) if console.is_terminal else None
    try:
        with live or nullcontext():
            shown = 0
            while True:
                started = clock()
                try:
                    watch.add(fetch(), clock())
                except DraftwireError as error:
                    watch.add(None, clock(), str(error))
                if live is not None:
                    live.update(view(watch, clock()), refresh=True)
                else:
                    console.print(view(watch, clock()))
                    console.print()
                shown += 1
                if shown == count:
                    return
                sleep(max(0.05, interval_s - (clock() - started)))
    except KeyboardInterrupt:
        return
