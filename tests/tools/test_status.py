"""`draftwire status`: what facts are worth which verdict, and what is shown of them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from shared.messages import PeerStatus, Role, ServiceStatus, Status, WorkerStatus
from shared.settings import load_settings
from tools.status import EXIT_STATUS, Facts, Report, duration, gather, judge, print_report, report_json

SETTINGS = load_settings(None, ["draft.a.drafter=ngram", "run_dir=/tmp/dw-test"], {})


def peer(role: Role, name: str = "", **fields: object) -> PeerStatus:
    model = "" if role == "gateway" else f"/models/{role}.gguf"
    made = PeerStatus(role, name or role, "e", model, "f", 10, 100, 4, 1, True, 100, True, "1.0", 100_000)
    return replace(made, **fields)  # type: ignore[arg-type]


A = WorkerStatus("a", "e", "m", "ok", "", 0, 0, 1, 4, 1500, 10_000, 0, 0.8, 50, 1.5, there=True)
ROUTER = Status(1, "1.0", 50, 1, (peer("gateway"), peer("verifier"), peer("draft", "a")), (A,))
WELL = Facts(
    "http://127.0.0.1:8080",
    {"status": "ok"},
    ROUTER,
    ServiceStatus(1, "tokenizer", "1.0", 70, 0, "vocab"),
    ServiceStatus(1, "sampler", "1.0", 7200, 3),
)


def without(role: Role) -> Status:
    return replace(ROUTER, peers=tuple(p for p in ROUTER.peers if p.role != role))


def worker(**fields: object) -> Status:
    """The router's status with this of draft worker a."""
    status = ROUTER if fields.get("there", True) else without("draft")
    return replace(status, workers=(replace(A, **fields),))  # type: ignore[arg-type]


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=160, markup=False, highlight=False)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_all_is_well() -> None:
    """One line says so; every process has its row, with version, uptime and sessions."""
    report = judge(SETTINGS, WELL)
    assert (report.level, report.problems) == ("ok", ())
    assert report.verdict == "ok: 1 verifier, 1 draft worker, 1 generation in progress"
    lines = printed(report).splitlines()
    assert lines[0] == report.verdict
    names = [line.split("  ")[0] for line in lines[2:]]
    assert names == ["gateway", "tokenizer", "router", "verifier", "sampler", "draft a"]
    assert "1 d 3 h" in lines[2]
    assert "127.0.0.1:8080, ok" in lines[2]
    for part in ("1.0", "1/4", "1.5 ms away", "100 tokens/s", "80 % accepted", "1.50x"):
        assert part in lines[-1]


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        (replace(WELL, url="", health=None, router=without("gateway")), "there is no gateway"),
        (replace(WELL, health=None, failures={"gateway": "it is silent"}), "it is silent"),
        (replace(WELL, router=None), "no router answers at ipc:///tmp/dw-test/router.sock"),
        (replace(WELL, router=None, failures={"router": "protocol version 3"}), "protocol version 3"),
        (replace(WELL, tokenizer=None), "no tokenizer answers"),
        (replace(WELL, sampler=None), "no sampler answers"),
        (replace(WELL, router=without("verifier")), "no verifier is connected"),
        (
            replace(WELL, router=replace(ROUTER, peers=(peer("gateway"), peer("verifier", alive=False)))),
            "the verifier is shutting down",
        ),
        (
            replace(WELL, health={"status": "loading", "missing": ["tokenizer"]}),
            "the gateway waits for tokenizer",
        ),
        (
            replace(WELL, health={"status": "error", "missing": [], "reason": "another vocabulary"}),
            "the gateway says: another vocabulary",
        ),
    ],
)
def test_what_keeps_it_from_serving(facts: Facts, problem: str) -> None:
    """Exit status 2, and the reason in the first line; the others keep their rows."""
    report = judge(SETTINGS, facts)
    assert EXIT_STATUS[report.level] == 2
    assert report.verdict.startswith("not serving: ")
    assert problem in report.verdict
    assert len(printed(report).splitlines()) >= 8


@pytest.mark.parametrize(
    ("router", "problem"),
    [
        (worker(state="away", there=False), "draft worker a is away"),
        (replace(without("draft"), workers=()), "draft worker a is away"),
        (worker(state="demoted", reason="it floods", retry_ms=3000), "draft worker a is demoted: it floods"),
        (worker(state="demoted", reason="it left", there=False), "draft worker a is away"),
        (
            replace(ROUTER, peers=(*ROUTER.peers[:2], peer("draft", "a", version="0.9"))),
            "not all run the same version (0.9: draft a; 1.0: gateway, tokenizer, router, verifier, sampler)",
        ),
    ],
)
def test_what_degrades_it(router: Status, problem: str) -> None:
    """Exit status 1: it serves, and something is wrong."""
    report = judge(SETTINGS, replace(WELL, router=router))
    assert EXIT_STATUS[report.level] == 1
    assert report.verdict == f"degraded: {problem}"


@pytest.mark.parametrize(
    "router",
    [
        worker(state="drained", reason="drained by an operator", order="drain"),
        worker(state="drained", reason="drained by an operator", order="drain", there=False),
        worker(state="banned", reason="banned by an operator", order="ban", there=False),
        worker(state="probation", reason="it stalls"),
    ],
)
def test_what_an_operator_wants_is_well(router: Status) -> None:
    """Neither an order nor a worker that proves itself again is a fault; the row says it."""
    report = judge(SETTINGS, replace(WELL, router=router))
    assert report.level == "ok"
    assert router.workers[0].reason in printed(report).splitlines()[-1]


def test_where_nothing_runs() -> None:
    """One reason and what to do, not a list of everything that is missing."""
    report = judge(SETTINGS, Facts())
    assert report.verdict == "not serving: no fleet answers at /tmp/dw-test (start one with `draftwire up`)"
    assert not any(row.there for row in report.rows)


def test_a_gateway_elsewhere_counts() -> None:
    """One that the router knows, though its address is not in this run directory."""
    report = judge(SETTINGS, replace(WELL, url="", health=None, failures={"gateway": "no gateway at /run"}))
    assert report.level == "ok"


def test_json_for_scripts() -> None:
    parsed = json.loads(json.dumps(report_json(judge(SETTINGS, replace(WELL, sampler=None)))))
    assert (parsed["status"], parsed["exit_status"]) == ("not serving", 2)
    assert parsed["problems"] == ["no sampler answers at ipc:///tmp/dw-test/sampler.sock"]
    services = {row["service"]: row for row in parsed["services"]}
    assert (services["sampler"]["there"], services["verifier"]["uptime_s"]) == (False, 100_000)
    assert parsed["workers"][0]["acceptance"] == 0.8


def test_names_cannot_move_the_cursor() -> None:
    """What peers say of themselves is shown without control characters."""
    evil = "a\x1b[2J"
    router = replace(ROUTER, peers=(peer("gateway", evil, version=evil), peer("verifier", evil, model=evil)))
    router = replace(router, workers=(replace(A, instance=evil, reason=evil, state="demoted"),))
    assert "\x1b" not in printed(judge(SETTINGS, replace(WELL, router=router, health={"status": evil})))


def test_gathering_where_nothing_runs(tmp_path: Path) -> None:
    """Facts, not errors: nothing is there, and why."""
    facts = gather(load_settings(None, [f'run_dir="{tmp_path}"'], {}))
    assert (facts.health, facts.router, facts.tokenizer, facts.sampler) == (None, None, None, None)
    assert "no gateway" in facts.failures["gateway"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (90_000, "1 d 1 h")],
)
def test_durations(seconds: int, text: str) -> None:
    assert duration(seconds) == text
