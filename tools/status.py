"""`draftwire status`: what of a fleet is there, since when, how it fares, and whether all is well.

Invariant: what is missing is a row and a sentence, never an error. The verdict follows from the facts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from rich.console import Console
from rich.table import Table

from shared.errors import DraftwireError
from shared.messages import PeerStatus, ServiceStatus, Status, WorkerStatus
from shared.settings import Settings
from tools.fleet import find_gateway, open_gateway, router_status, service_status
from tools.workers import printable, state_text, worker_json

Level = Literal["ok", "degraded", "not serving"]
EXIT_STATUS: Final[dict[Level, int]] = {"ok": 0, "degraded": 1, "not serving": 2}

ANSWER_S = 1.0
"""How long a service may take to answer."""
HEALTH_S = 5.0
"""How long the gateway may take; it asks the router itself."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found. url: of the gateway, by the run directory. failures: why a part could not be asked, by name."""

    url: str = ""
    health: dict[str, Any] | None = None
    router: Status | None = None
    tokenizer: ServiceStatus | None = None
    sampler: ServiceStatus | None = None
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """A process that is there, or should be. n_held, n_slots: sessions; uptime_s, n_held: None where not known."""

    service: str
    instance: str
    there: bool
    version: str = ""
    uptime_s: int | None = None
    n_held: int | None = None
    n_slots: int = 0
    detail: str = ""

    @property
    def name(self) -> str:
        return self.service if self.instance in ("", self.service) else f"{self.service} {self.instance}"


@dataclass(frozen=True, slots=True)
class Report:
    """What to say. problems: why it is not serving, or what is wrong while it does, the worst first."""

    level: Level
    verdict: str
    problems: tuple[str, ...]
    rows: tuple[Row, ...]
    workers: tuple[WorkerStatus, ...] = ()


def gather(settings: Settings) -> Facts:
    """Ask every part at the same time; whatever is or is not there."""
    failures: dict[str, str] = {}

    def attempt(part: str, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except DraftwireError as error:
            failures[part] = str(error)
            return None

    def ask_gateway() -> tuple[str, dict[str, Any] | None]:
        url = find_gateway(settings)
        return url, attempt("gateway", open_gateway(settings, HEALTH_S).health)

    with ThreadPoolExecutor(4) as pool:
        gateway = pool.submit(attempt, "gateway", ask_gateway)
        router = pool.submit(attempt, "router", lambda: router_status(settings, ANSWER_S))
        tokenizer = pool.submit(attempt, "tokenizer", lambda: service_status(settings, "tokenizer", ANSWER_S))
        sampler = pool.submit(attempt, "sampler", lambda: service_status(settings, "sampler", ANSWER_S))
        url, health = gateway.result() or ("", None)
        return Facts(url, health, router.result(), tokenizer.result(), sampler.result(), failures)


def judge(settings: Settings, facts: Facts) -> Report:
    """What the facts mean."""
    router = facts.router
    fatal: list[str] = []
    wrong: list[str] = []
    rows = [
        *_gateways(facts, fatal),
        _service("tokenizer", facts.tokenizer, settings.endpoint("tokenizer"), facts, fatal),
        _router(router, settings.endpoint("router"), facts, fatal),
        *_verifiers(router, fatal),
        _service("sampler", facts.sampler, settings.endpoint("sampler"), facts, fatal),
        *_drafts(router, settings.draft, wrong),
    ]
    if not any(row.there for row in rows):
        fatal = [f"no fleet answers at {settings.run_path} (start one with `draftwire up`)"]
    elif not fatal and (reason := _unhealthy(facts.health)):
        fatal.append(reason)
    versions = sorted({row.version for row in rows if row.version})
    if len(versions) > 1:
        who = "; ".join(f"{v}: {', '.join(r.name for r in rows if r.version == v)}" for v in versions)
        wrong.append(f"not all run the same version ({who})")
    level: Level = "not serving" if fatal else "degraded" if wrong else "ok"
    problems = (*fatal, *wrong)
    return Report(level, _verdict(level, problems, router), problems, tuple(rows), router.workers if router else ())


def _verdict(level: Level, problems: Sequence[str], router: Status | None) -> str:
    if level != "ok" or router is None:
        return f"{level}: {'; '.join(problems)}"
    counts = [
        (sum(peer.role == "verifier" and peer.alive for peer in router.peers), "verifier"),
        (sum(peer.role == "draft" and peer.alive for peer in router.peers), "draft worker"),
        (router.n_sessions, "generation"),
    ]
    return "ok: " + ", ".join(f"{n or 'no'} {what}{'' if n == 1 else 's'}" for n, what in counts) + " in progress"


def _unhealthy(health: dict[str, Any] | None) -> str:
    """What a gateway says that others do not see; empty: nothing."""
    if health is None or health["status"] == "ok":
        return ""
    missing = health.get("missing")
    if isinstance(missing, list) and missing:
        return f"the gateway waits for {', '.join(printable(str(part)) for part in missing)}"
    return f"the gateway says: {printable(str(health.get('reason', health['status'])))}"


def _gateways(facts: Facts, fatal: list[str]) -> list[Row]:
    peers = [peer for peer in facts.router.peers if peer.role == "gateway"] if facts.router is not None else []
    where = facts.url or "its address is in the run directory of its host"
    said = f", {facts.health['status']}" if facts.health is not None else ""
    rows = [_row(peer, where + said) for peer in peers]
    if not rows:
        reason = facts.failures.get("gateway", "")
        there = facts.health is not None
        rows.append(Row("gateway", "", there, detail=f"{where}{said}" if there else reason))
    if facts.url and facts.health is None:
        fatal.append(facts.failures.get("gateway", f"the gateway at {facts.url} does not answer"))
    elif not rows[0].there:
        fatal.append("there is no gateway")
    return rows


def _service(name: str, status: ServiceStatus | None, endpoint: str, facts: Facts, fatal: list[str]) -> Row:
    if status is not None:
        return Row(
            name, "", True, status.version, status.uptime_s, status.n_held, detail=printable(_file_name(status.about))
        )
    reason = facts.failures.get(name, f"no {name} answers at {endpoint}")
    fatal.append(reason)
    return Row(name, "", False, detail=reason)


def _router(status: Status | None, endpoint: str, facts: Facts, fatal: list[str]) -> Row:
    if status is not None:
        return Row("router", "", True, status.version, status.uptime_s, status.n_sessions)
    reason = facts.failures.get("router", f"no router answers at {endpoint}")
    fatal.append(reason)
    return Row("router", "", False, detail=reason)


def _verifiers(status: Status | None, fatal: list[str]) -> list[Row]:
    if status is None:
        return [Row("verifier", "", False, detail="not known without the router")]
    peers = [peer for peer in status.peers if peer.role == "verifier"]
    if not peers:
        fatal.append("no verifier is connected")
        return [Row("verifier", "", False, detail="not connected: is it still loading? see its log")]
    if not any(peer.alive for peer in peers):
        fatal.append("the verifier is shutting down")
    return [
        _row(peer, f"{peer.engine}, {_file_name(peer.model)}{'' if peer.alive else ', shutting down'}")
        for peer in peers
    ]


def _drafts(status: Status | None, configured: Sequence[str] | dict[str, Any], wrong: list[str]) -> list[Row]:
    """A row for each draft worker that is configured here, or that the router knows."""
    if status is None:
        return [Row("draft", name, False, detail="not known without the router") for name in configured]
    peers = {peer.instance: peer for peer in status.peers if peer.role == "draft"}
    workers = {worker.instance: worker for worker in status.workers}
    rows = []
    for name in sorted({*configured, *workers}):
        worker, peer = workers.get(name), peers.get(name)
        if worker is None:
            wrong.append(f"draft worker {name} is away")
            rows.append(
                Row("draft", name, False, detail="away: configured here, and never seen since the router started")
            )
            continue
        detail = ", ".join(_worker_figures(worker))
        if worker.state == "away" or (worker.state == "demoted" and not worker.there):
            wrong.append(f"draft worker {printable(name)} is away")
        elif worker.state == "demoted":
            wrong.append(f"draft worker {printable(name)} is demoted: {printable(worker.reason)}")
        if peer is not None:
            rows.append(_row(peer, detail))
        else:
            rows.append(Row("draft", printable(name), False, detail=detail))
    return rows


def _worker_figures(worker: WorkerStatus) -> list[str]:
    parts = [state_text(worker)]
    if not worker.there:
        return parts
    if worker.rtt_us:
        parts.append(f"{worker.rtt_us / 1000:.1f} ms away")
    if worker.n_judged:
        parts.append(f"{1e6 / max(1, worker.token_us):.0f} tokens/s")
        parts.append(f"{100 * worker.acceptance:.0f} % accepted")
        parts.append(f"{worker.speed_up:.2f}x")
    return parts


def _row(peer: PeerStatus, detail: str) -> Row:
    return Row(
        peer.role,
        printable(peer.instance),
        True,
        printable(peer.version),
        peer.uptime_s,
        peer.n_sessions,
        peer.n_slots,
        printable(detail),
    )


def _file_name(model: str) -> str:
    return model.rpartition("/")[2]


def duration(seconds: int) -> str:
    """A time in its two largest units."""
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    d, h = divmod(hours, 24)
    if d:
        return f"{d} d {h} h"
    if h:
        return f"{h} h {m} min"
    return f"{m} min {s} s" if m else f"{s} s"


def print_report(report: Report, console: Console) -> None:
    """The verdict, and a row for each process."""
    colour = {"ok": "green", "degraded": "yellow", "not serving": "red"}[report.level]
    console.print(report.verdict, style=colour, soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading, right in (("", False), ("version", False), ("up", True), ("sessions", True), ("", False)):
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in report.rows:
        held = "" if row.n_held is None else f"{row.n_held}/{row.n_slots}" if row.n_slots else str(row.n_held)
        table.add_row(
            row.name,
            row.version if row.there else "not there",
            "" if row.uptime_s is None else duration(row.uptime_s),
            held,
            row.detail,
            style=None if row.there else "red",
        )
    console.print(table)


def report_json(report: Report) -> dict[str, object]:
    """The report, for scripts."""
    return {
        "status": report.level,
        "exit_status": EXIT_STATUS[report.level],
        "verdict": report.verdict,
        "problems": list(report.problems),
        "services": [asdict(row) for row in report.rows],
        "workers": [worker_json(worker) for worker in report.workers],
    }
