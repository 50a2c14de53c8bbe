"""A draft worker behind a LAN, the target at the pace of a slower machine: the text stays the target's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.pipeline.fleet import MODES, N_TOKENS, START_S, Completion, Fleet, collect, running_fleet
from tools.lan import Conditions, Lan, Link

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(600)]

N_TEXTS = 4
TARGET = (
    "verifier.engine.engine=emulated",
    "verifier.engine.inner=numpy",  # its rows do not depend on the batch, so the text must be the same to the token
    "verifier.engine.pace.first_row_ms=30",
    "verifier.engine.pace.further_row_ms=3",
    "verifier.engine.pace.prefill_per_second=10000",
    "verifier.engine.n_slots=2",
    "verifier.engine.n_ctx=512",
    "verifier.engine.n_batch=160",
    "router.heartbeat_ms=100",
    "draft={}",
)
WIFI = Conditions(delay_s=0.002, jitter_s=0.003, bytes_per_s=1e6, loss=0.02, rto_s=0.05)

Job = tuple[str, int]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with running_fleet(*TARGET) as running:
        yield running


@pytest.fixture(scope="module")
def plain(fleet: Fleet, prompts: list[str]) -> dict[Job, Completion]:
    """What the target writes by itself."""
    return {(mode, i): complete(fleet, prompts, (mode, i), draft="none") for mode in MODES for i in range(N_TEXTS)}


def complete(fleet: Fleet, prompts: list[str], job: Job, **fields: Any) -> Completion:
    mode, index = job
    return fleet.complete(prompts[index], **MODES[mode], seed=index, **fields)


@pytest.fixture(scope="module")
def link(fleet: Fleet) -> Iterator[Link]:
    """To the router's socket for draft workers, with a draft worker that knows the router by it alone."""
    with Lan() as lan:
        link = lan.link(fleet.settings.endpoint("drafts"), WIFI)
        worker = fleet.start_draft("far", f"endpoints.drafts={link.endpoint}", "draft.far.engine.threads=1")
        yield link
        worker.stop()


def wait_for_worker(fleet: Fleet, alive: bool) -> None:
    deadline = time.monotonic() + START_S
    while any(peer.instance == "far" and peer.alive for peer in fleet.status().peers) != alive:
        assert time.monotonic() < deadline, "".join(fleet.process.lines[-30:])
        time.sleep(0.05)


def test_a_slow_lan_changes_nothing(fleet: Fleet, link: Link, prompts: list[str], plain: dict[Job, Completion]) -> None:
    """Over a link with delay, jitter, little bandwidth and losses, texts are the target's own, and drafts are used."""
    before = link.n_bytes
    n_accepted = 0
    for job, expected in plain.items():
        completion = complete(fleet, prompts, job, draft="far")
        assert (completion.tokens, completion.text) == (expected.tokens, expected.text), job
        n_accepted += completion.final["timings"]["draft_n_accepted"]
    assert n_accepted > 0.1 * N_TOKENS * len(plain)
    assert link.n_bytes - before > 50 * N_TOKENS  # commits and proposals have come this way


@pytest.mark.parametrize("how", ["cut", "stall"])
def test_a_lan_that_fails_changes_nothing(
    fleet: Fleet, link: Link, prompts: list[str], plain: dict[Job, Completion], how: str
) -> None:
    """Where the link breaks or goes silent in mid-generation, the target goes on alone; afterwards it is drafted again.

    The worker's process has not ended, so it is the router's heartbeats that notice.
    """
    wait_for_worker(fleet, alive=True)
    events = fleet.stream(prompts[0], **MODES["greedy"], seed=0, n_predict=4 * N_TOKENS, draft="far")
    head = [next(events) for _ in range(4)]
    {"cut": link.cut, "stall": link.stall}[how]()
    broken = collect(iter([*head, *events]))
    assert broken.tokens[:N_TOKENS] == plain["greedy", 0].tokens
    wait_for_worker(fleet, alive=False)
    link.restore()
    wait_for_worker(fleet, alive=True)
    again = complete(fleet, prompts, ("greedy", 0), draft="far")
    assert again.tokens == plain["greedy", 0].tokens
    assert again.final["timings"]["draft_n_accepted"] > 0
