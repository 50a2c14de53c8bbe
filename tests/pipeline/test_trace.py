"""`draftwire trace` of real fleets: the whole picture of a generation, one clock, and who is missing."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from shared.trace import MARKS
from tests.pipeline.fleet import CLI, Completion, Fleet, Process, collect, running_fleet
from tests.pipeline.processes import service_pid

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(300)]

AHEAD_S = 100_000
"""How far the monotonic clock of the far worker is ahead, exactly: a time namespace adds it."""
SHIFT = ("unshare", "--time", "--monotonic", str(AHEAD_S), sys.executable)
ROUNDING_US = 0.002

PROCESSES = ("gateway", "tokenizer", "router", "draft model", "verifier", "sampler")
NOT_ALWAYS = {"draft.rollback", "verifier.wait"}
"""Marks that a generation may do without."""

Event = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A trace file, read."""

    text: str

    @property
    def value(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.text)
        return value

    @property
    def events(self) -> list[Event]:
        events: list[Event] = self.value["traceEvents"]
        return events

    @property
    def about(self) -> dict[str, Any]:
        about: dict[str, Any] = self.value["otherData"]
        return about

    def of(self, name: str) -> list[Event]:
        """The spans and instants of a mark, by its whole name, in the order of time."""
        category, _, stage = name.partition(".")
        found = [e for e in self.events if (e.get("cat"), e["name"]) == (category, stage)]
        return sorted(found, key=lambda e: e["ts"])

    def paths(self, kind: str) -> list[list[Event]]:
        """The arrows of a kind, each as its ends and bends."""
        by_id: dict[int, list[Event]] = defaultdict(list)
        for event in self.events:
            if event["ph"] in "stf" and event["name"] == kind:
                by_id[event["id"]].append(event)
        return list(by_id.values())

    def process(self, name: str) -> dict[str, Any]:
        (process,) = [p for p in self.about["processes"] if p["name"] == name]
        return dict(process)


def end(event: Event) -> float:
    return float(event["ts"] + event.get("dur", 0.0))


def draftwire_trace(fleet: Fleet, *arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of the command."""
    command = [sys.executable, *CLI, "trace", *arguments, *fleet.options()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stdout, ended.stderr


def picture(fleet: Fleet, session: str, timeout_s: float = 30.0) -> tuple[Picture, str]:
    """The trace of a session that the command writes, and the table."""
    path = fleet.run_dir / "trace.json"
    status, out, error = draftwire_trace(fleet, session, "-o", str(path), "--timeout", str(timeout_s))
    assert (status, error) == (0, "")
    return Picture(path.read_text("utf-8")), out


def session_of(completion: Completion) -> str:
    session = completion.final["draftwire"]["session"]
    assert isinstance(session, str)
    return session


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with running_fleet("verifier.engine.engine=numpy", "draft.model.engine.threads=1") as running:
        yield running


@pytest.fixture(scope="module")
def done(fleet: Fleet, prompts: list[str]) -> Completion:
    """A generation, between two others."""
    first, done, _ = (fleet.complete(prompt, seed=1, draft="model") for prompt in prompts[:3])
    assert session_of(first) != session_of(done)
    return done


@pytest.fixture(scope="module")
def whole(fleet: Fleet, done: Completion) -> Picture:
    """Its picture."""
    return picture(fleet, session_of(done))[0]


def test_every_event_has_what_the_format_asks_for(whole: Picture) -> None:
    """Chrome's Trace Event Format: phase, time, process and thread; a span a duration, an arrow an identity."""
    named: dict[str, set[Any]] = {"process_name": set(), "thread_name": set()}
    for event in whole.events:
        assert {"ph", "ts", "pid", "tid", "name"} <= set(event)
        assert event["ph"] in "XiMstf"
        assert event["ts"] >= 0
        assert (event["ph"] == "X") == ("dur" in event)
        assert (event["ph"] in "stf") == ("id" in event)
        if event["ph"] == "M" and event["name"] in named:
            named[event["name"]].add((event["pid"], event["tid"]) if "thread" in event["name"] else event["pid"])
    others = [event for event in whole.events if event["ph"] != "M"]
    assert {event["pid"] for event in others} == named["process_name"]
    assert {(event["pid"], event["tid"]) for event in others} == named["thread_name"]


def test_spans_of_a_thread_lie_in_each_other_or_apart(whole: Picture) -> None:
    tracks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in whole.events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
    for track in tracks.values():
        around: list[Event] = []
        for event in sorted(track, key=lambda e: (e["ts"], -e["dur"])):
            while around and end(around[-1]) <= event["ts"] + ROUNDING_US:
                around.pop()
            assert not around or end(event) <= end(around[-1]) + ROUNDING_US, (around[-1], event)
            around.append(event)


def test_every_stage_of_every_process_is_there(whole: Picture) -> None:
    """With no process missing, and nothing of what was read or written."""
    assert {p["name"] for p in whole.about["processes"]} == set(PROCESSES)
    assert not whole.about["missing"]
    assert not any(p["notes"] for p in whole.about["processes"])
    seen = {f"{event['cat']}.{event['name']}" for event in whole.events if event["ph"] in "Xi"}
    assert set(MARKS) - NOT_ALWAYS <= seen <= set(MARKS)


def test_every_round_is_there_with_what_it_verified(whole: Picture, done: Completion) -> None:
    """As many as request_done counts, its proposals and accepted ones in all, one after the other in the text."""
    rounds = whole.of("verifier.round")
    timings = done.final["timings"]
    assert len(rounds) == done.final["draftwire"]["rounds"]
    assert sum(r["args"]["proposals"] for r in rounds) == timings["draft_n"] > 0
    assert sum(r["args"]["accepted"] for r in rounds) == timings["draft_n_accepted"]
    commits = {c["args"]["position"]: c["args"]["tokens"] for c in whole.of("verifier.commit")}
    assert sum(commits.values()) == len(done.tokens)
    at = rounds[0]["args"]["position"]
    for step in rounds:
        assert step["args"]["position"] == at
        assert step["args"]["rows"] == step["args"]["proposals"] + 1
        at += commits[at]


def test_a_verdict_lies_within_the_verifier_s_question(whole: Picture) -> None:
    asks, verdicts = whole.of("verifier.ask"), whole.of("sampler.verdict")
    assert len(verdicts) == len(asks)
    for ask, verdict in zip(asks, verdicts, strict=True):
        assert ask["ts"] <= verdict["ts"]
        assert end(verdict) <= end(ask)


def test_a_request_s_parts_are_in_their_order(whole: Picture) -> None:
    """Each stage begins after the one that it needs."""
    names = (
        "gateway.request", "gateway.encode", "tokenizer.encode", "gateway.generate", "router.generate", "verifier.open",
        "verifier.forward", "verifier.ask", "sampler.decide", "verifier.commit", "router.commit", "gateway.tokens",
        "gateway.detokenize", "tokenizer.decode",
    )  # fmt: skip
    firsts = [whole.of(name)[0]["ts"] for name in names]
    assert firsts == sorted(firsts)
    (request,) = whole.of("gateway.request")
    assert request["ts"] == 0
    assert whole.of("gateway.finished")[0]["ts"] <= end(request)


def test_arrows_point_forward_in_time_and_end_at_rounds(whole: Picture) -> None:
    """Every proposal that a round verified is led to; every commit to the worker but the last, which closes there."""
    for kind in ("proposal", "commit"):
        for path in whole.paths(kind):
            assert [event["ts"] for event in path] == sorted(event["ts"] for event in path)
            assert (path[0]["ph"], path[-1]["ph"]) == ("s", "f")
    rounds = {r["ts"] for r in whole.of("verifier.round") if r["args"]["proposals"]}
    assert {path[-1]["ts"] for path in whole.paths("proposal")} >= rounds
    commits = Counter(len(path) for path in whole.paths("commit"))
    assert commits[3] == len(whole.of("draft.commit")) >= len(whole.of("verifier.commit")) - 2


def test_while_it_runs_a_generation_is_shown_as_far_as_it_is(fleet: Fleet, prompts: list[str]) -> None:
    """By the id, or as the last one."""
    stream = fleet.stream(prompts[3], n_predict=200)
    first = [next(stream) for _ in range(3)]
    found, _ = picture(fleet, "")
    rest = collect(stream)
    assert found.about["session"] == session_of(rest)
    assert found.of("gateway.generate")
    assert not found.of("gateway.request")
    assert 0 < len(found.of("verifier.round")) <= rest.final["draftwire"]["rounds"]
    assert len(found.of("gateway.tokens")) >= len(first)


def test_an_unknown_session_is_an_error_of_one_line(fleet: Fleet, done: Completion) -> None:
    del done
    status, out, error = draftwire_trace(fleet, "deadbeef", "-o", "-")
    assert (status, out) == (1, "")
    assert error.count("\n") == 1
    assert "session 00000000deadbeef is not known" in error
    assert "request_done" in error


def test_a_process_that_does_not_answer_is_named(fleet: Fleet, done: Completion) -> None:
    """The rest is shown, with status 0."""
    tokenizer = service_pid("tokenizer", fleet.run_dir)
    os.kill(tokenizer, signal.SIGSTOP)
    try:
        found, _ = picture(fleet, session_of(done), timeout_s=2.0)
    finally:
        os.kill(tokenizer, signal.SIGCONT)
    (missing,) = found.about["missing"]
    assert missing == {"name": "tokenizer", "reason": f"it does not answer at {fleet.settings.endpoint('tokenizer')}"}
    assert len(found.of("verifier.round")) == done.final["draftwire"]["rounds"]
    fleet.wait_until_serving()


def shifts() -> bool:
    """Whether a process may be given another monotonic clock here."""
    try:
        return subprocess.run([*SHIFT, "-c", ""], capture_output=True, timeout=30).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def far(fleet: Fleet) -> Iterator[Process]:
    """A draft worker whose monotonic clock is AHEAD_S ahead of everybody else's."""
    if not shifts():
        pytest.skip("this machine lets nobody make a time namespace (unshare --time)")
    program = f"import os, sys; os.execvp('unshare', [*{SHIFT!r}, *{CLI!r}, *sys.argv[1:]])"
    arguments = ["service", "draft", "--instance", "far", *fleet.options("draft.far.engine.threads=1")]
    worker = Process(arguments, program=("-c", program))
    try:
        worker.wait_for("router_connected")
        yield worker
    finally:
        worker.stop()


@pytest.fixture(scope="module")
def far_done(fleet: Fleet, far: Process, prompts: list[str]) -> Completion:
    """A generation for which the far worker drafted."""
    del far
    done = fleet.complete(prompts[4], seed=1, draft="far")
    assert done.final["draftwire"]["worker"] == "far"
    return done


def test_another_clock_s_offset_is_known_within_what_is_said(fleet: Fleet, far_done: Completion) -> None:
    """Against the truth: the kernel adds exactly AHEAD_S."""
    found, table = picture(fleet, session_of(far_done))
    worker = found.process("draft far")
    assert not worker["same_clock"]
    assert abs(worker["offset_us"] - AHEAD_S * 1e6) <= worker["uncertainty_us"] < AHEAD_S * 1e6 / 2
    assert "100,000.0" in table or "99,999.9" in table
    assert all(found.process(name)["same_clock"] for name in ("gateway", "verifier", "sampler", "tokenizer"))


def test_what_another_clock_s_process_did_lines_up(fleet: Fleet, far_done: Completion) -> None:
    """A proposal arrives after it was sent and a commit after it was, within the stated uncertainty."""
    found, _ = picture(fleet, session_of(far_done))
    unsure_us = found.process("draft far")["uncertainty_us"] + ROUNDING_US
    assert len(found.of("draft.draft")) > 2
    (request,) = found.of("gateway.request")
    for name in ("draft.opened", "draft.draft", "draft.proposal", "draft.commit"):
        for event in found.of(name):
            assert event["ts"] >= request["ts"] - unsure_us
            assert name != "draft.commit" or end(event) <= end(request) + unsure_us
    for kind in ("proposal", "commit"):
        paths = found.paths(kind)
        assert len(paths) > 2
        for path in paths:
            for before, after in itertools.pairwise(path):
                assert after["ts"] >= before["ts"] - unsure_us


def test_a_worker_that_has_died_since_is_named(fleet: Fleet, far: Process, far_done: Completion) -> None:
    """What the others did for the session is shown."""
    far.kill()
    while any(peer.instance == "far" for peer in fleet.status().peers):
        fleet.process.wait_for('"peer_lost"')
    found, table = picture(fleet, session_of(far_done))
    assert [(entry["name"], entry["reason"]) for entry in found.about["missing"]] == [
        ("draft far", "it is not connected, or has been restarted since")
    ]
    assert "draft far" in table
    assert len(found.of("verifier.round")) == far_done.final["draftwire"]["rounds"]
