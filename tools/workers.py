"""`draftwire workers`: how the router judges the draft workers, and who drafts for what."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from shared.errors import DraftwireError
from shared.messages import SessionStatus, Status, WorkerStatus
from shared.settings import Settings
from tools.fleet import router_status

_MOST_SESSIONS = 20


def fetch(settings: Settings) -> Status:
    """The router's status.

    Raises:
        DraftwireError: no router answers.
    """
    status = router_status(settings)
    if not isinstance(status, Status):
        raise DraftwireError(
            f"no router answers at {settings.endpoint('router')}",
            "start a fleet with `draftwire up`, or name its run directory with --run-dir",
            "no_router",
        )
    return status


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
        worker.instance,
        worker.engine,
        worker.model.rpartition("/")[2] or "-",
        state_text(worker),
        f"{worker.rtt_us / 1000:.1f} ms" if worker.rtt_us else "-",
        f"{1e6 / max(1, worker.token_us):.0f}" if measured else "-",
        str(worker.prefill_per_s) if measured and worker.prefill_per_s else "-",
        f"{100 * worker.acceptance:.0f} % ({worker.n_judged})" if measured else "-",
        f"{worker.n_sessions}/{worker.n_slots}",
        f"{worker.speed_up:.2f}x{'' if measured else ' ?'}",
    )


def state_text(worker: WorkerStatus) -> str:
    """Its state in words, with the reason and when it may try again."""
    if worker.state == "demoted":
        return f"demoted: {worker.reason}; tries again in {worker.retry_ms / 1000:.0f} s"
    if worker.state == "probation":
        return f"probation, after: {worker.reason}"
    return worker.state


def session_line(session: SessionStatus) -> str:
    """Who drafts for a generation, and why."""
    who = session.worker or "nobody"
    parts = [f"session {session.session:016x} at {session.verifier}, {session.n_tokens} tokens: {who}, {session.why}"]
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
        "workers": [asdict(worker) for worker in status.workers],
        "sessions": [asdict(session) for session in status.sessions],
    }


def show_workers(settings: Settings, show: Callable[[Status], None], every_s: float | None) -> None:
    """Show the router's status once, or again and again until interrupted."""
    show(fetch(settings))
    while every_s is not None:
        time.sleep(every_s)
        show(fetch(settings))
