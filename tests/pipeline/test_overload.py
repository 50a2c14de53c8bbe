"""More than the fleet can do at once: it waits, up to a bound, and is refused beyond; nobody holds up the others."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.pipeline.fleet import START_S, Fleet, collect, running_fleet
from tests.pipeline.processes import resident_bytes, service_pid

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(300)]

N_SLOTS = 2
N_WAITING = 4
LONG = 120


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- more sessions than slots --


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Rows of the inner engine do not depend on the batch; its pace keeps the slots taken for a while."""
    with running_fleet(
        "verifier.engine.engine=emulated",
        "verifier.engine.inner=numpy",
        "verifier.engine.model=embedded:draft",
        "verifier.engine.pace.first_row_ms=25",
        "verifier.engine.pace.further_row_ms=1",
        "verifier.engine.pace.prefill_per_second=100000",
        f"verifier.engine.n_slots={N_SLOTS}",
        "verifier.engine.n_ctx=256",
        "verifier.engine.n_batch=128",
        f"verifier.max_waiting={N_WAITING}",
        "draft={}",
        "draft.lookup.drafter=ngram",
    ) as running:
        yield running


def test_three_times_as_many_as_slots_all_finish(fleet: Fleet, prompts: list[str]) -> None:
    """They wait for each other, and each gets the text that it gets alone."""
    alone = [fleet.complete(prompt, temperature=0.8, seed=1) for prompt in prompts[: 3 * N_SLOTS]]
    with ThreadPoolExecutor(3 * N_SLOTS) as pool:
        together = list(pool.map(lambda p: fleet.complete(p, temperature=0.8, seed=1), prompts[: 3 * N_SLOTS]))
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert [c.text for c in together] == [c.text for c in alone]


def test_beyond_the_bound_there_is_a_clear_refusal(fleet: Fleet, prompts: list[str]) -> None:
    """With all slots and all places to wait taken, a request is told so, and when to come back; the others finish."""
    running = [fleet.stream(prompt, temperature=0, n_predict=LONG, draft="none") for prompt in prompts[:N_SLOTS]]
    heads = [next(events) for events in running]  # their slots are taken, for LONG steps
    with ThreadPoolExecutor(N_WAITING) as pool:
        waiting = [pool.submit(fleet.complete, prompts[N_SLOTS + i], temperature=0) for i in range(N_WAITING)]
        wait_until(lambda: fleet.status().n_sessions == N_SLOTS + N_WAITING)
        refused = httpx.post(f"{fleet.gateway.url}/completion", json={"prompt": prompts[0], "n_predict": 4}, timeout=60)
        served = [collect(iter([head, *events])) for head, events in zip(heads, running, strict=True)]
        waited = [one.result() for one in waiting]
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    error = refused.json()["error"]
    assert error["code"] == "overloaded"
    assert f"{N_WAITING} generations wait" in error["message"]
    assert [len(c.tokens) for c in served] == [LONG] * N_SLOTS
    for index, completion in enumerate(waited):
        assert completion.tokens == fleet.complete(prompts[N_SLOTS + index], temperature=0, draft="none").tokens
        assert completion.final["draftwire"]["stages_ms"]["queue"] > max(
            c.final["draftwire"]["stages_ms"]["queue"] for c in served
        )


# -- clients that do not read --


@pytest.fixture(scope="module")
def fast_fleet() -> Iterator[Fleet]:
    """An engine that takes no time, so that buffers fill as fast as they can."""
    with running_fleet(
        "verifier.engine.engine=null",
        "verifier.engine.n_ctx=60000",
        "draft.model.engine.engine=null",
        "draft.model.engine.n_ctx=60000",
    ) as running:
        yield running


def deaf_client(fleet: Fleet, n_predict: int) -> socket.socket:
    """Asks for a long stream and reads none of it."""
    url = httpx.URL(fleet.gateway.url)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((url.host, url.port))
    body = json.dumps({"prompt": "abc", "n_predict": n_predict, "stream": True, "return_tokens": True}).encode()
    head = f"POST /completion HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    client.sendall(head.encode() + b"\r\n" + body)
    return client


def test_who_does_not_read_holds_nobody_up(fast_fleet: Fleet) -> None:
    """Its generation is ended with a log line once too much waits; meanwhile others stream, and no memory grows."""
    fleet = fast_fleet
    expected = fleet.complete("abc", n_predict=400)
    pids = {name: service_pid(name, fleet.run_dir) for name in ("gateway", "router", "verifier")}
    before = {name: resident_bytes(pid) for name, pid in pids.items()}
    deaf = deaf_client(fleet, 50_000)
    try:
        served = [fleet.complete("abc", n_predict=400) for _ in range(3)]
        fleet.process.wait_for('"client_too_slow"')
        wait_until(lambda: fleet.status().n_sessions == 0)
        served.append(fleet.complete("abc", n_predict=400))
        after = {name: resident_bytes(pid) for name, pid in pids.items()}
    finally:
        deaf.close()
    assert [c.tokens for c in served] == [expected.tokens] * 4
    grown = {name: (after[name] - before[name]) >> 20 for name in pids}
    assert all(mib < 64 for mib in grown.values()), grown
