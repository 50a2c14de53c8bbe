"""Many short sessions, with faults mixed in, leave nothing behind: no descriptor, no slot, no session, no memory.

LEAK_SESSIONS says how many (`make test-leaks` takes 1000). The processes that are measured live through all of it.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.pipeline.faults import N_PROMPTS, WORKERS, Fault, Injector, Reader, Schedule, Site, check
from tests.pipeline.liar import LIES
from tests.pipeline.processes import open_files, resident_bytes

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(1800)]

SESSIONS = int(os.environ.get("LEAK_SESSIONS", "40"))
WARM_UP = 60
"""Sessions before the first measurement: caches fill, allocators get their arenas, lazy imports happen."""
CONCURRENT = 4
N_SHORT = 12
MOST_GROWTH = 8 << 20
"""Bytes of resident memory that a process may gain; a session of these that left its KV cache would be far beyond."""
VICTIM = "garbage"
"""The worker that is killed now and then; the others are measured."""

Usage = dict[str, tuple[int, int]]
"""Descriptors and resident bytes, by process."""


def usage(site: Site) -> Usage:
    pids = {name: process.process.pid for name, process in site.processes.items() if name != VICTIM}
    return {name: (open_files(pid), resident_bytes(pid)) for name, pid in pids.items()}


def generate(site: Site, prompts: Sequence[str], seed: int) -> None:
    """A few short sessions at a time, one of them with a fault, some of which do not wait for their end."""
    chance = random.Random(seed)
    jobs = [(chance.choice(["greedy", "sampled"]), chance.randrange(N_PROMPTS)) for _ in range(CONCURRENT)]
    kind = chance.choice(["lie", "lie", "flap", "mismatch", "cancel", "cut", "hole", "weather", "stall", "kill", ""])
    what = {"lie": chance.choice(LIES), "stall": "ngram", "kill": VICTIM, "weather": "0"}.get(kind, "")
    faults = (Fault(kind, chance.randint(1, 6), 4, what),) if kind else ()
    injector = Injector(site, Schedule(seed, tuple(jobs), "auto", faults))
    drafts = ["liar" if kind == "lie" else "auto", *(chance.choice(["auto", *WORKERS]) for _ in jobs[1:])]
    readers = [
        Reader(
            site.stream(mode, prompts[index], draft=draft, n_predict=N_SHORT),
            injector.progress if number == 0 else lambda _: True,
        )
        for number, ((mode, index), draft) in enumerate(zip(jobs, drafts, strict=True))
    ]
    with ThreadPoolExecutor(CONCURRENT) as pool:
        following = [pool.submit(reader.follow) for reader in readers]
        try:
            for one in following:
                one.result()
        finally:
            injector.finish()
    for number, (reader, job) in enumerate(zip(readers, jobs, strict=True)):
        check(reader, site.plain[job], set(), n_tokens=N_SHORT, gone=number == 0 and kind == "cancel")


def assert_nothing_leaked(site: Site, before: Usage, patience_s: float = 10.0) -> None:
    """Descriptors are those of before once connections that have just ended are gone; memory has grown a little."""
    deadline = time.monotonic() + patience_s
    while True:
        after = usage(site)
        more = {name: after[name][0] - before[name][0] for name in before if after[name][0] > before[name][0]}
        if not more or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert not more, f"more descriptors than before: {more}"
    grown = {name: (after[name][1] - before[name][1]) >> 10 for name in before}
    print(f"KiB grown: {grown}")
    assert all(kib << 10 <= MOST_GROWTH for kib in grown.values()), f"KiB grown: {grown}"


def test_sessions_leave_nothing_behind(prompts: list[str]) -> None:
    """Every process has as many descriptors and about as much memory as before, and no session; slots are free."""
    with Site() as site:
        site.learn(prompts[:N_PROMPTS])
        for number in range(WARM_UP // CONCURRENT):
            generate(site, prompts, number)
        site.settle()
        before = usage(site)
        for number in range(SESSIONS // CONCURRENT):
            generate(site, prompts, WARM_UP + number)
        site.settle()
        assert_nothing_leaked(site, before)
    assert site.processes["sampler"].logged("draining")["sessions"] == 0
    assert site.processes["sampler"].logged("draining")["steps"] == 0


@pytest.mark.parametrize("defect", ["leak_descriptors", "leak_memory"])
def test_a_planted_leak_is_seen(prompts: list[str], defect: str) -> None:
    """The measurements can fail: a gateway that keeps something of each request does not pass."""
    with Site() as site:
        site.restart("gateway", ("-m", "tests.pipeline.planted", defect))
        site.settle()
        site.learn(prompts[:1])
        before = usage(site)
        for _ in range(8):
            Reader(site.stream("greedy", prompts[0], n_predict=N_SHORT)).read()
        site.settle()
        with pytest.raises(AssertionError, match="gateway"):
            assert_nothing_leaked(site, before, patience_s=1)
