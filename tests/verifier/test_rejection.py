"""Rejection sampling stays exact in the verifier: when a second worker's proposals replace the first one's, and when
the length controller chooses whether a proposal is verified."""

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
from shared.speculation.lengths import LengthController
from shared.speculation.target_session import TargetSession

PROMPT = [1, 2]
TARGET = np.array([0.0, 0.0, 0.0, 0.0], np.float32)
FIRST = np.array([2.0, 0.0, 0.0, 0.0], np.float32)
SECOND = np.array([0.0, 0.0, 2.0, 1.0], np.float32)
PARAMS = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, acceptance="rejection")
N_SEEDS = 6000


def offered(seed: int, workers: list[np.ndarray], controller: LengthController | None = None) -> TargetSession:
    """A session for whose first position each worker has proposed a token, in turn."""
    params = replace(PARAMS, seed=seed)
    calibration = None if controller is None else controller.calibration
    target = TargetSession(1, np.array(PROMPT, np.int32), params, Limits(10), Speculation(), 0, calibration)
    prefix_hash = TokenPrefix(PROMPT).hash
    for row in workers:
        drafted = draft(params, row, PROMPT, len(PROMPT))
        run, count = (drafted.token,), (len(drafted.q_ids),)
        target.offer(
            Proposal(
                *(1, len(PROMPT), prefix_hash, run, (float(drafted.confidence),)),
                q_counts=count,
                q_ids=drafted.q_ids,
                q_probs=drafted.q_probs,
            )
        )
    return target


def first_token(target: TargetSession, length: int) -> tuple[int, int]:
    """The first token committed when so many proposals are verified, and how many were accepted."""
    proposed = target.proposals(length)
    tokens = [p.token for p in proposed]
    logits = DenseLogits(np.stack([TARGET] * (length + 1)))
    rows = sparse_rows(
        logits, logits.top(4), logits.log_sum_exp(), 0, length + 1, 4, np.array(tokens, np.int32).reshape(-1)
    )
    distributions = [ProposalDistribution(*p.q) for p in proposed if p.q is not None]
    assert len(distributions) == length
    dense = dict.fromkeys(range(length + 1), TARGET)
    decision = decide(target.sampling, PROMPT, tokens, rows, dense, distributions)
    assert isinstance(decision, Decision)
    return (tokens[0] if decision.n_accepted else decision.token), decision.n_accepted


def p_value(workers: list[np.ndarray]) -> float:
    counts = np.bincount([first_token(offered(seed, workers), 1)[0] for seed in range(N_SEEDS)], minlength=4)
    return float(stats.chisquare(counts).pvalue)


def chosen() -> tuple[float, list[int]]:
    """The same where the controller says whether the one proposal is verified, and how often it said so; a second row
    costs half a step, and about half of the proposals are accepted."""
    controller = LengthController()
    for rows, seconds in ((1, 1.0), (2, 1.52)) * 3:
        controller.costs.observe(rows, seconds)
    counts, lengths = [0] * 4, [0, 0]
    for seed in range(N_SEEDS):
        target = offered(seed, [FIRST], controller)
        [length] = controller.choose([target.candidate()], 4)
        token, n_accepted = first_token(target, length)
        target.count_round(length, n_accepted)
        seconds = (1.0, 1.52)[length]
        controller.observe(1 + length, seconds, 1 + n_accepted, seconds)
        controller.observe(1, 1.0, 1, 1.0)  # a step without a proposal, as there are between
        counts[token] += 1
        lengths[length] += 1
    return float(stats.chisquare(counts).pvalue), lengths


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


def test_the_controllers_choice_makes_no_difference() -> None:
    """It learns what is accepted and verifies some proposals and leaves others; the first token stays uniform."""
    p, lengths = chosen()
    assert min(lengths) > N_SEEDS / 20
    assert p > 1e-4


def test_a_choice_by_the_drawn_tokens_probability_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the controller saw how probable the drawn token was, it would prefer some tokens; the check sees it."""
    entries = TargetSession._entries

    def with_confidence(self: TargetSession, proposal: Proposal) -> list[session_module.Proposed] | None:
        found = entries(self, proposal)
        for proposed in found or ():
            assert proposed.q is not None
            ids, probs = proposed.q
            proposed.confidence = float(probs[ids == proposed.token][0])
        return found

    monkeypatch.setattr(TargetSession, "_entries", with_confidence)
    p, lengths = chosen()
    assert min(lengths) > N_SEEDS / 20
    assert p < 1e-4
