"""Watching a real fleet, and ordering about in it: what is said is so, and no order changes a text."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.pipeline.fleet import MODES, START_S, Fleet, Process, collect, running_fleet
from tests.pipeline.processes import service_pid
from tools.fleet import find_gateway
from tools.workers import order

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
N_TOKENS = 48
SETTINGS = (
    # Rows that do not depend on the batch, at a pace that leaves time for an order between two tokens.
    "verifier.engine.engine=emulated",
    "verifier.engine.inner=numpy",
    "verifier.engine.model=embedded:draft",
    "verifier.engine.pace.first_row_ms=20",
    "verifier.engine.pace.further_row_ms=1",
    "verifier.engine.pace.prefill_per_second=100000",
    "verifier.engine.n_slots=2",
    "verifier.engine.n_ctx=256",
    "verifier.engine.n_batch=128",
    "draft.model.engine.engine=numpy",
    "draft.model.engine.n_ctx=256",
    "draft.lookup.drafter=ngram",
    "router.heartbeat_ms=250",
    "router.window=16",
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


def draftwire(fleet: Fleet, *command: str) -> Ended:
    ended = subprocess.run(
        [sys.executable, "-m", "tools.cli", *command, *fleet.options()],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in ended.stderr
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def until(condition: Callable[[], Any]) -> Any:
    """Wait for something of a fleet to become so."""
    deadline = time.monotonic() + START_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with running_fleet(*SETTINGS) as running:
        yield running


@pytest.fixture
def orderly(fleet: Fleet) -> Iterator[Fleet]:
    """A fleet in which no order stands afterwards."""
    yield fleet
    for name in ("model", "lookup"):
        order(fleet.settings, name, "allow")
    until(lambda: {w.instance for w in fleet.status().workers if w.there and not w.order} == {"model", "lookup"})


def state_of(fleet: Fleet, name: str) -> str:
    """As the router says it; empty while it has not met the worker."""
    return next((str(w.state) for w in fleet.status().workers if w.instance == name), "")


# -- orders --


@pytest.mark.parametrize("mode", MODES)
def test_orders_change_no_text(orderly: Fleet, prompts: list[str], mode: str) -> None:
    """Drained, pinned, banned and allowed in the middle of a generation: its tokens are plain decoding's."""
    fields = {**MODES[mode], "n_predict": N_TOKENS, "seed": 5}
    plain = collect(orderly.stream(prompts[0], draft="none", **fields))
    assert len(plain.tokens) == N_TOKENS
    n_moved, n_tokens = 0, 0

    def running() -> Any:
        (session,) = orderly.status().sessions
        return session

    def pin_to_the_other() -> None:
        session = running()
        other = {"model": "lookup", "lookup": "model"}[session.worker]
        assert order(orderly.settings, other, "pin", session.session).startswith(f"{other} drafts for")
        assert running().worker == other

    def shut(verb: Any) -> None:
        worker = running().worker
        said = order(orderly.settings, worker, verb)
        assert running().worker != worker, said
        order(orderly.settings, worker, "allow")
        until(lambda: state_of(orderly, worker) == "ok")

    acts = {4: pin_to_the_other, 10: lambda: shut("drain"), 16: lambda: shut("ban"), 22: pin_to_the_other}
    events = []
    for event in orderly.stream(prompts[0], **fields):
        events.append(event)
        n_tokens += len(event.get("tokens", ()))
        for at in [at for at in acts if at <= n_tokens]:
            acts.pop(at)()
            n_moved += 1
    assert (n_moved, acts) == (4, {})
    completion = collect(iter(events))
    assert completion.tokens == plain.tokens
    assert completion.text == plain.text
    assert completion.final["draftwire"]["worker_changes"] >= 2


def test_a_banned_worker_lives_and_comes_back(orderly: Fleet) -> None:
    """Its process is the same before, meanwhile and afterwards, over a restart of the router too."""
    pid = service_pid("draft model", orderly.run_dir)
    assert draftwire(orderly, "workers", "ban", "model").out == "model is banned\n"
    assert state_of(orderly, "model") == "banned"
    os.kill(service_pid("router", orderly.run_dir), signal.SIGKILL)
    orderly.process.wait_for("worker_order_stands")
    orderly.wait_until_serving()
    assert state_of(orderly, "model") == "banned"
    until(lambda: "lookup" in {p.instance for p in orderly.status().peers})
    assert "model" not in {p.instance for p in orderly.status().peers}
    assert draftwire(orderly, "workers", "allow", "model").out == "model is under no order\n"
    until(lambda: state_of(orderly, "model") == "ok")
    assert service_pid("draft model", orderly.run_dir) == pid


def test_an_order_about_nobody_is_one_line(fleet: Fleet) -> None:
    ended = draftwire(fleet, "workers", "drain", "nobody")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err == "draftwire: error: there is no draft worker 'nobody' (known here: lookup, model)\n"


def test_orders_are_shown(orderly: Fleet) -> None:
    """By `workers`, with and without --json; an option may stand before the verb."""
    draftwire(orderly, "workers", "drain", "lookup")
    assert "drained by an operator" in draftwire(orderly, "workers").out
    workers = json.loads(draftwire(orderly, "workers", "--json").out)["workers"]
    assert {w["instance"]: (w["state"], w["order"]) for w in workers} == {
        "model": ("ok", ""),
        "lookup": ("drained", "drain"),
    }
    allowed = draftwire(orderly, "workers", *orderly.options(), "allow", "lookup")
    assert allowed.status == 0, allowed


# -- metrics --


def test_metrics_add_up_to_the_timings(fleet: Fleet, prompts: list[str]) -> None:
    """The counters grow by the sums of what the answers' `timings` say, and workers' times are there."""

    def scrape() -> dict[str, float]:
        with urllib.request.urlopen(f"{find_gateway(fleet.settings)}/metrics", timeout=30) as response:
            text = response.read().decode()
        return {
            sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = scrape()
    answers = [
        fleet.complete(prompts[index], **MODES[mode], seed=index, draft=draft).final["timings"]
        for index, (mode, draft) in enumerate([("greedy", "model"), ("sampled", "model"), ("greedy", "none")])
    ]
    after = until(
        lambda: (
            (s := scrape())["draftwire:requests_total 200"] >= before.get("draftwire:requests_total 200", 0) + 3 and s
        )
    )

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    for name, key, scale in (
        *(("prompt_tokens_total", "prompt_n", 1), ("prompt_seconds_total", "prompt_ms", 1e-3)),
        *(("tokens_predicted_total", "predicted_n", 1), ("tokens_predicted_seconds_total", "predicted_ms", 1e-3)),
        ("spec_decode_num_draft_tokens_total", "draft_n", 1),
        ("spec_decode_num_accepted_tokens_total", "draft_n_accepted", 1),
    ):
        assert gained(f"llamacpp:{name}") == pytest.approx(scale * sum(a[key] for a in answers), abs=1e-5), name
    for position in range(max(len(a["draft_by_depth"]) for a in answers)):
        expected = sum(
            a["draft_by_depth"][position]["draft_n_accepted"] for a in answers if len(a["draft_by_depth"]) > position
        )
        assert gained(f"llamacpp:spec_decode_num_accepted_tokens_per_pos_total {position}") == expected
    assert gained("llamacpp:spec_decode_num_draft_tokens_total") > 0
    assert gained("draftwire:worker_token_seconds_count model") > 0
    assert after["draftwire:worker_round_trip_seconds_count model"] > 0
    until(
        lambda: (
            scrape()["llamacpp:n_decode_total"] - before["llamacpp:n_decode_total"]
            >= max(a["predicted_n"] for a in answers) / 2
        )
    )
    assert scrape()["llamacpp:n_busy_slots_per_decode"] == pytest.approx(1.0, abs=1.0)


# -- status and top; these leave the fleet as it should not be --


def status(fleet: Fleet) -> tuple[int, dict[str, Any]]:
    ended = draftwire(fleet, "status", "--json")
    return ended.status, json.loads(ended.out)


def test_status_of_a_fleet() -> None:
    """0 while all is well, 1 without a worker, 2 without the verifier; and 0 again when they are back."""
    with running_fleet(*SETTINGS, "draft.extra.drafter=ngram") as fleet:
        code, report = until(lambda: (s := status(fleet))[0] == 0 and s)
        assert report["status"] == "ok"
        services = {(row["service"], row["instance"]): row for row in report["services"]}
        assert len(services) == 8
        for row in services.values():
            assert row["there"]
            assert row["version"]
            assert row["uptime_s"] >= 0
        ended = draftwire(fleet, "status")
        assert ended.out.startswith("ok: 1 verifier, 3 draft workers, no generations in progress\n")

        pids = {name: service_pid(name, fleet.run_dir) for name in ("draft extra", "verifier")}
        os.kill(pids["draft extra"], signal.SIGSTOP)  # a dead one would be started again
        until(lambda: state_of(fleet, "extra") == "away")
        code, report = status(fleet)
        assert (code, report["problems"]) == (1, ["draft worker extra is away"])
        os.kill(pids["draft extra"], signal.SIGCONT)

        os.kill(pids["verifier"], signal.SIGSTOP)
        until(lambda: not any(p.role == "verifier" for p in fleet.status().peers))
        code, report = status(fleet)
        assert (code, report["status"]) == (2, "not serving")
        assert "no verifier is connected" in report["problems"]
        os.kill(pids["verifier"], signal.SIGCONT)
        until(lambda: status(fleet)[0] == 0)


def test_top_survives_a_restart_of_the_router_and_ends_well() -> None:
    """It says that the router is away, goes on when it is back, and ends on Ctrl-C with status 0."""
    with running_fleet(*SETTINGS) as fleet:
        top = Process(["top", "--interval", "0.2", *fleet.options()])
        try:
            top.wait_for("router ")
            router = service_pid("router", fleet.run_dir)
            os.kill(router, signal.SIGSTOP)
            top.wait_for("the router does not answer")
            os.kill(router, signal.SIGKILL)
            top.wait_for("router 0")
            fleet.wait_until_serving()
            top.wait_for("lookup")
            top.process.send_signal(signal.SIGINT)
            assert top.process.wait(30) == 0
            assert "Traceback" not in "".join(top.lines)
        finally:
            top.stop()


def test_status_while_the_router_is_away() -> None:
    """The rest has its rows; the reason is in the first line."""
    with running_fleet(*SETTINGS) as fleet:
        router = service_pid("router", fleet.run_dir)
        os.kill(router, signal.SIGSTOP)
        ended = draftwire(fleet, "status")
        os.kill(router, signal.SIGCONT)
        assert ended.status == 2
        first, *rows = ended.out.splitlines()
        assert first.startswith("not serving: no router answers")
        assert any(row.startswith("sampler") and "not there" not in row for row in rows)
