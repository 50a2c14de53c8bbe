"""Rejection sampling stays exact when a second worker's proposals replace the first one's in the verifier."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from shared.engine.dense import DenseLogits
from shared.messages import Limits, Proposal, Speculation
from shared.prefix import TokenPrefix
from shared.sampling.acceptance import Decision, ProposalDistribution, decide
from shared.sampling.drafting import draft
from shared.sampling.params import SamplingParams
from shared.sampling.rows import sparse_rows
from shared.speculation import target_session as session_module
from shared.speculation.target_session import TargetSession

PROMPT = [1, 2]
TARGET = np.array([0.0, 0.0, 0.0, 0.0], np.float32)
FIRST = np.array([2.0, 0.0, 0.0, 0.0], np.float32)
SECOND = np.array([0.0, 0.0, 2.0, 1.0], np.float32)
PARAMS = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, acceptance="rejection")
N_SEEDS = 6000


def first_token(seed: int, workers: list[np.ndarray]) -> int:
    """The first committed token after each worker has proposed one for the same position, in turn."""
    params = replace(PARAMS, seed=seed)
    target = TargetSession(1, np.array(PROMPT, np.int32), params, Limits(10), Speculation(), 0)
    prefix_hash = TokenPrefix(PROMPT).hash
    for row in workers:
        drafted = draft(params, row, PROMPT, len(PROMPT))
        run, count = (drafted.token,), (len(drafted.q_ids),)
        target.offer(
            Proposal(1, len(PROMPT), prefix_hash, run, q_counts=count, q_ids=drafted.q_ids, q_probs=drafted.q_probs)
        )
    (proposed,) = target.proposals(1)
    assert proposed.q is not None
    logits = DenseLogits(np.stack([TARGET, TARGET]))
    rows = sparse_rows(logits, logits.top(4), logits.log_sum_exp(), 0, 2, 4, np.array([proposed.token], np.int32))
    dense = {0: TARGET, 1: TARGET}
    decision = decide(params, PROMPT, [proposed.token], rows, dense, [ProposalDistribution(*proposed.q)])
    assert isinstance(decision, Decision)
    return proposed.token if decision.n_accepted else decision.token


def p_value(workers: list[np.ndarray]) -> float:
    counts = np.bincount([first_token(seed, workers) for seed in range(N_SEEDS)], minlength=4)
    return float(stats.chisquare(counts).pvalue)


def test_one_worker_or_two_make_no_difference() -> None:
    """The first token of a uniform target is uniform, with one worker and with one that replaces another."""
    assert p_value([FIRST]) > 1e-4
    assert p_value([FIRST, SECOND]) > 1e-4


def test_keeping_the_first_workers_distribution_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """If equal tokens kept the first worker's q, which q counts would depend on what was drawn; the check sees it."""

    class Stubborn(session_module.Proposed):
        def __setattr__(self, name: str, value: object) -> None:
            if name != "q" or not hasattr(self, "q"):
                super().__setattr__(name, value)

    monkeypatch.setattr(session_module, "Proposed", Stubborn)
    assert p_value([FIRST, SECOND]) < 1e-4
