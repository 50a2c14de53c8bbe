"""The text depends on the target and the seed alone, whatever drafts, however far ahead, and whatever dies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from shared.kernels.gpu import cuda_unavailable
from tests.pipeline.fleet import MODES, N_TOKENS, Completion, Fleet, Process, collect, running_fleet

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(900)]

TARGET = (
    "verifier.engine.n_slots=4",
    "verifier.engine.n_ctx=512",
    "verifier.engine.n_batch=160",
    "verifier.n_max=16",
    "verifier.prefill_chunk=64",
)
CONCURRENT = 3


@dataclass(frozen=True)
class Engines:
    """What computes: settings of the target, and of a draft worker's engine.

    least_accepted: proposals to be accepted per token; a target that takes half a millisecond seldom finds any in time.
    quick: a step may always be over before a worker has answered the one before.
    """

    target: tuple[str, ...]
    draft: str
    least_accepted: float
    quick: bool

    def worker(self, instance: str) -> str:
        """The setting that gives a draft worker its engine."""
        return f"draft.{instance}.engine.{self.draft}"


# Both models of the pair on the CPU, the target with an engine whose rows do not depend on the batch; or on a GPU.
ENGINES = {
    "numpy": Engines(("verifier.engine.engine=numpy", *TARGET), "threads=1", 0.2, quick=False),
    "cuda": Engines(("verifier.engine.engine=cuda", *TARGET), "engine=cuda", 0.05, quick=True),
}

Texts = dict[tuple[str, int], Completion]


def run_all(fleet: Fleet, prompts: list[str], complete: Callable[..., Completion], **fields: Any) -> Texts:
    """Every prompt in every mode, a few at a time, so that steps hold rows of several sessions."""
    jobs = [(mode, index) for index in range(len(prompts)) for mode in MODES]

    def run(job: tuple[str, int]) -> Completion:
        mode, index = job
        return complete(fleet, prompts[index], **MODES[mode], seed=1000 + index, **fields)

    with ThreadPoolExecutor(CONCURRENT) as pool:
        return dict(zip(jobs, pool.map(run, jobs), strict=True))


def complete(fleet: Fleet, prompt: str, **fields: Any) -> Completion:
    return fleet.complete(prompt, **fields)


def proposed(texts: Texts) -> int:
    return sum(c.final["timings"]["draft_n"] for c in texts.values())


def accepted(texts: Texts) -> int:
    return sum(c.final["timings"]["draft_n_accepted"] for c in texts.values())


def assert_same(texts: Texts, plain: Texts) -> None:
    for job, completion in texts.items():
        assert completion.tokens == plain[job].tokens, job
        assert completion.text == plain[job].text, job


@pytest.fixture(scope="module", params=["numpy", pytest.param("cuda", marks=pytest.mark.gpu)])
def engines(request: pytest.FixtureRequest) -> Engines:
    if request.param == "cuda" and (reason := cuda_unavailable()) is not None:
        pytest.skip(str(reason))
    return ENGINES[request.param]


@pytest.fixture(scope="module")
def fleet(engines: Engines) -> Iterator[Fleet]:
    drafts = (engines.worker("model"), "draft.ngram.drafter=ngram", "draft.garbage.drafter=garbage")
    # No demotion: a worker that is killed again and again is to get the next session all the same.
    with running_fleet(*engines.target, *drafts, "router.window=16", "router.demotion_s=0") as running:
        yield running


@pytest.fixture(scope="module")
def plain(fleet: Fleet, prompts: list[str]) -> Texts:
    """What the target writes by itself."""
    texts = run_all(fleet, prompts, complete, draft="none")
    assert proposed(texts) == 0
    assert all(len(c.tokens) == N_TOKENS for c in texts.values())
    return texts


@pytest.mark.parametrize("n_max", [1, 4, 16])
def test_model_draft_changes_nothing(
    engines: Engines, fleet: Fleet, prompts: list[str], plain: Texts, n_max: int
) -> None:
    """With the model drafting, and up to n_max proposals a step, the text is the target's own."""
    texts = run_all(fleet, prompts, complete, draft="model", **{"speculative.n_max": n_max})
    assert_same(texts, plain)
    assert accepted(texts) > engines.least_accepted * N_TOKENS * len(texts) * min(n_max, 2) / 2


def test_ngram_draft_changes_nothing(fleet: Fleet, prompts: list[str], plain: Texts) -> None:
    """With prompt lookup drafting, the text is the target's own."""
    texts = run_all(fleet, prompts, complete, draft="ngram", **{"speculative.n_max": 4})
    assert_same(texts, plain)
    assert accepted(texts) > 0


def test_garbage_draft_changes_nothing(fleet: Fleet, prompts: list[str], plain: Texts) -> None:
    """With a worker that floods the verifier with random tokens, the text is the target's own.

    Most of them come too late: the target's own token has contradicted them before a step could verify them.
    """
    texts = run_all(fleet, prompts, complete, draft="garbage", **{"speculative.n_max": 4})
    assert_same(texts, plain)
    stale = sum(c.final["draftwire"]["n_stale"] for c in texts.values())
    assert proposed(texts) + stale > N_TOKENS * len(texts)
    assert accepted(texts) < 0.1 * (proposed(texts) + stale)


@pytest.mark.parametrize("window", [1, 4])
def test_window_changes_nothing(engines: Engines, prompts: list[str], plain: Texts, window: int) -> None:
    """However far the draft may run ahead, the text is the target's own."""
    with running_fleet(*engines.target, engines.worker("model"), f"router.window={window}") as other:
        texts = run_all(other, prompts, complete, draft="model")
    assert_same(texts, plain)
    assert sum(c.final["draftwire"]["n_drafted"] for c in texts.values()) > N_TOKENS * len(texts) / 4
    assert accepted(texts) > 0 or (window == 1 and engines.quick)


def test_killed_draft_changes_nothing(engines: Engines, fleet: Fleet, prompts: list[str], plain: Texts) -> None:
    """A draft worker killed in mid-generation changes no token; pinned to it, the session goes on alone."""
    workers: list[Process] = []
    try:
        for (mode, index), expected in plain.items():
            victim = fleet.start_draft("victim", engines.worker("victim"))
            workers.append(victim)
            longer = {"n_predict": 3 * N_TOKENS}  # so that the kill comes well before the end
            events = fleet.stream(prompts[index], **MODES[mode], **longer, seed=1000 + index, draft="victim")
            completion = collect(killing(victim, events, after=3 + index % 5))
            assert completion.tokens[:N_TOKENS] == expected.tokens, (mode, index)
            assert completion.final["draftwire"]["worker"] == "victim"
            lost = fleet.process.wait_for('"peer_lost"')
            assert '"peer": "victim"' in lost
            assert '"sessions": 1' in lost, "the generation had ended before its worker was killed"
            victim.stop()
    finally:
        for worker in workers:
            worker.stop()


def killing(victim: Process, events: Iterator[dict[str, Any]], after: int) -> Iterator[dict[str, Any]]:
    """Pass events on and kill the worker after some of them."""
    for count, event in enumerate(events):
        if count == after:
            victim.kill()
        yield event


def test_killed_draft_is_replaced(engines: Engines, prompts: list[str], plain: Texts) -> None:
    """When the worker of an unpinned session is killed, another one takes over in mid-generation."""
    with running_fleet(*engines.target, "draft={}", "router.window=16") as bare:
        workers = {name: bare.start_draft(name, engines.worker(name)) for name in ("first", "second")}
        try:
            events = bare.stream(prompts[0], **MODES["greedy"], seed=1000, n_predict=400)
            head = [next(events)]
            (busy,) = [peer.instance for peer in bare.status().peers if peer.role == "draft" and peer.n_sessions]
            workers[busy].kill()
            completion = collect(iter([*head, *events]))
        finally:
            for worker in workers.values():
                worker.stop()
    assert completion.tokens[:N_TOKENS] == plain["greedy", 0].tokens
    assert completion.final["draftwire"]["worker"] == ({*workers} - {busy}).pop()
    assert completion.final["draftwire"]["worker_changes"] == 1
