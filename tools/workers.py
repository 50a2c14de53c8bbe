"""`draftwire workers`: how the router judges the draft workers, who drafts for what, and an operator's orders."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from shared.errors import DraftwireError, RequestError
from shared.messages import Error, Ordered, OrderWorker, SessionStatus, Status, WorkerStatus
from shared.settings import Settings
from tools.fleet import ask_router, router_status

_MOST_SESSIONS = 20
_HISTOGRAMS = ("round_trip", "token", "reply")


def fetch(settings: Settings) -> Status:
    """The router's status.

    Raises:
        DraftwireError: no router answers.
    """
    status = router_status(settings)
    if not isinstance(status, Status):
        raise _no_router(settings)
    return status


def _no_router(settings: Settings) -> DraftwireError:
    return DraftwireError(
        f"no router answers at {settings.endpoint('router')}",
        "start a fleet with `draftwire up`, or name its run directory with --run-dir",
        "no_router",
    )


def order(settings: Settings, worker: str, verb: Literal["drain", "ban", "pin", "allow"], session: int = 0) -> str:
    """Give the router an order about a draft worker; what has come of it, in one line.

    Raises:
        DraftwireError: no router answers, or it refuses.
    """
    question = OrderWorker(random.getrandbits(63), worker[:200], verb, session)
    answer = ask_router(settings, question, Ordered, Error, timeout_s=5.0)
    if isinstance(answer, Error):
        raise RequestError(answer.message, answer.remedy, answer.code)
    if not isinstance(answer, Ordered):
        raise _no_router(settings)
    done = {"drain": "is drained", "ban": "is banned", "pin": "is pinned", "allow": "is under no order"}[verb]
    if session:
        done = f"drafts for {session:016x}" if not answer.note else f"is to draft for {session:016x}"
    parts = [f"{worker} {done}"]
    if answer.n_moved:
        parts.append(f"{answer.n_moved} generation{'s' if answer.n_moved > 1 else ''} moved on")
    if answer.note:
        parts.append(printable(answer.note))
    if not session and not answer.kept:
        parts.append("the router will have forgotten this when it restarts")
    return "; ".join(parts)


def workers_table(status: Status) -> Table:
    """A row for each draft worker there was since the router started."""
    table = Table()
    for heading, right in (
        *(("name", False), ("engine", False), ("model", False), ("state", False), ("RTT", True), ("tokens/s", True)),
        *(("prefill/s", True), ("accepted", True), ("sessions", True), ("speed-up", True)),
    ):
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for worker in sorted(status.workers, key=lambda w: w.instance):
        table.add_row(*worker_cells(worker))
    return table


def worker_cells(worker: WorkerStatus) -> tuple[str, ...]:
    """A worker's row; what is not known yet is a dash."""
    measured = worker.n_judged > 0
    return (
        printable(worker.instance),
        printable(worker.engine) or "-",
        printable(worker.model.rpartition("/")[2]) or "-",
        state_text(worker),
        f"{worker.rtt_us / 1000:.1f} ms" if worker.rtt_us else "-",
        f"{1e6 / max(1, worker.token_us):.0f}" if measured else "-",
        str(worker.prefill_per_s) if measured and worker.prefill_per_s else "-",
        f"{100 * worker.acceptance:.0f} % ({worker.n_judged})" if measured else "-",
        f"{worker.n_sessions}/{worker.n_slots}",
        f"{worker.speed_up:.2f}x{'' if measured else ' ?'}",
    )


def state_text(worker: WorkerStatus) -> str:
    """Its state in words, with the reason and when it may try again, and an operator's order."""
    if worker.state == "demoted":
        text = f"demoted: {printable(worker.reason)}; tries again in {worker.retry_ms / 1000:.0f} s"
    elif worker.state == "probation":
        text = f"probation, after: {printable(worker.reason)}"
    elif worker.state == "drained":
        text = worker.reason + ("" if worker.there else "; away")
    elif worker.state == "banned":
        text = worker.reason
    else:
        text = worker.state
    return f"{text}; new generations are pinned to it" if worker.order == "pin" else text


def session_line(session: SessionStatus) -> str:
    """Who drafts for a generation, and why."""
    who, why = printable(session.worker) or "nobody", printable(session.why)
    where = printable(session.verifier)
    parts = [f"session {session.session:016x} at {where}, {session.n_tokens} tokens: {who}, {why}"]
    if session.pin and not session.worker:
        parts.append(f"pinned to {printable(session.pin)}")
    if session.worker:
        parts.append(f"expected {session.speed_up:.2f}x")
    if session.acceptance:
        parts.append(f"{100 * session.acceptance:.0f} % accepted")
    if session.n_moves:
        parts.append(f"moved {session.n_moves} times" if session.n_moves > 1 else "moved once")
    return ", ".join(parts)


def print_workers(status: Status, console: Console) -> None:
    """The table, and a line for each generation."""
    if status.workers:
        console.print(workers_table(status))
    else:
        console.print("no draft worker has registered", soft_wrap=True)
    for session in status.sessions[:_MOST_SESSIONS]:
        console.print(session_line(session), soft_wrap=True)
    if (more := status.n_sessions - _MOST_SESSIONS) > 0:
        console.print(f"and {more} more")


def workers_json(status: Status) -> dict[str, object]:
    """Workers and sessions with the names of `WorkerStatus` and `SessionStatus`."""
    return {
        "workers": [worker_json(worker) for worker in status.workers],
        "sessions": [asdict(session) for session in status.sessions],
    }


def worker_json(worker: WorkerStatus) -> dict[str, Any]:
    """A worker's figures, without the histograms, which are for /metrics."""
    return {name: value for name, value in asdict(worker).items() if name not in _HISTOGRAMS}


def printable(text: str) -> str:
    """What a peer says of itself, without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def show_workers(settings: Settings, show: Callable[[Status], None], every_s: float | None) -> None:
    """Show the router's status once, or again and again until interrupted."""
    show(fetch(settings))
    while every_s is not None:
        time.sleep(every_s)
        show(fetch(settings))
