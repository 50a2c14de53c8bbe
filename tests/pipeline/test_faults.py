"""Faults that never change a token: seeded runs, each with its own faults at its own moments.

FAULT_RUNS says how many (`make test-faults` takes 200), FAULT_SEED the first; a failure names its seed, and
`FAULT_SEED=17 FAULT_RUNS=1` repeats one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.pipeline.faults import N_PROMPTS, Fault, Reader, Schedule, Site, run, schedule

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(300)]

FIRST_SEED = int(os.environ.get("FAULT_SEED", "0"))
RUNS = int(os.environ.get("FAULT_RUNS", "10"))


class Sites:
    """One fleet for many runs; a new one after a failure."""

    def __init__(self, prompts: list[str]) -> None:
        self._prompts = prompts
        self._site: Site | None = None

    def get(self) -> Site:
        if self._site is None:
            self._site = Site()
            self._site.__enter__()
            self._site.learn(self._prompts)
        return self._site

    def drop(self) -> None:
        """After a failure, which may have left it in any state."""
        if self._site is not None:
            self._site.end()
            self._site = None

    def close(self) -> None:
        if self._site is not None:
            self._site.__exit__()


@pytest.fixture(scope="module")
def sites(prompts: list[str]) -> Iterator[Sites]:
    sites = Sites(prompts[:N_PROMPTS])
    yield sites
    sites.close()


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + RUNS))
def test_faults_change_no_token(sites: Sites, prompts: list[str], seed: int) -> None:
    """Whatever happens to workers, links and services: the text is plain decoding's, or there is one clear error."""
    plan = schedule(seed)
    print(plan)  # pytest shows it with a failure
    site = sites.get()
    try:
        run(site, plan, prompts)
    except BaseException:
        print(site.log_tail())
        sites.drop()
        raise


@pytest.mark.parametrize(
    ("service", "defect", "fault", "seen"),
    [
        ("sampler", "accept_a_refused_proposal", Fault("lie", 1, 30, "half"), "other tokens than"),
        ("verifier", "give_up_on_a_new_sampler", Fault("sampler", 5, 1), "sampler_lost_session"),
        ("verifier", "lose_cancelled_sessions", Fault("cancel", 5, 1), "1 sessions are left"),
    ],
)
def test_a_planted_defect_is_seen(
    sites: Sites, prompts: list[str], service: str, defect: str, fault: Fault, seen: str
) -> None:
    """The checks of a run can fail: each kind of them notices a defect that it is there for."""
    site = sites.get()
    site.restart(service, ("-m", "tests.pipeline.planted", defect))
    site.settle()
    with pytest.raises(AssertionError, match=seen):
        run(site, Schedule(0, (("greedy", 0),), "liar", (fault,)), prompts, patience_s=3)
    site.restart(service)
    site.settle()


def test_the_liar_is_one_to_be_believed(sites: Sites, prompts: list[str]) -> None:
    """The scripted worker speaks the wire: as long as it is honest, the target accepts what it proposes."""
    site = sites.get()
    honest = Reader(site.stream("greedy", prompts[0], draft="liar")).read()
    assert honest.final["draftwire"]["worker"] == "liar"
    assert honest.final["timings"]["draft_n_accepted"] > 0
