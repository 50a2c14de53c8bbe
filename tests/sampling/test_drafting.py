"""Drafting with the target's noise and filters."""

import dataclasses
import math

import numpy as np
import pytest

from shared.sampling.acceptance import Decision, ProposalDistribution, decide
from shared.sampling.drafting import draft
from shared.sampling.noise import COUPLED, gumbel
from shared.sampling.params import SamplingParams
from tests.sampling import reference

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, repeat_penalty=1.5, logit_bias=((3, 2.0), (4, -math.inf))),
    SamplingParams(temperature=0.9, top_k=0, top_p=1.0, min_p=0.0),
    SamplingParams(temperature=1.0, top_k=0, top_p=0.7, min_p=0.0, frequency_penalty=0.5),
    SamplingParams(temperature=1e-300, top_k=0, top_p=1.0, min_p=0.2, logit_bias=((3, 2.0),)),
]


@pytest.mark.parametrize("params", PARAMS)
def test_a_draft_with_the_targets_logits_is_always_accepted(params):
    """Same logits, same seed: the coupled and the greedy proposal are the target's own tokens."""
    rng = np.random.default_rng(2)
    for seed in range(40):
        seeded = dataclasses.replace(params, seed=seed)
        logits = rng.normal(0, 2, (4, 50)).astype(np.float32)
        history = [5, 3, 3]
        proposals: list[int] = []
        for row in logits[:3]:
            proposals.append(draft(seeded, row, history + proposals, 3 + len(proposals)).token)
        decision, _ = reference.decide_with_fallback(seeded, history, proposals, logits, 8)
        assert decision.n_accepted == 3


@pytest.mark.parametrize("params", PARAMS[3:5] + PARAMS[:1])
def test_confidence_is_the_winner_s_share_with_the_noise(params):
    """After filters and temperature, of the proposed token; of an unfiltered row what is far behind may be left out."""
    row = np.random.default_rng(3).normal(0, 2, 60).astype(np.float32)
    history = [7, 7, 1]
    for seed in range(20):
        got = draft(dataclasses.replace(params, seed=seed), row, history, 3)
        probs = reference.distribution(params, row, history)
        noisy = np.where(probs > 0, np.log(np.maximum(probs, 1e-300)), -np.inf) + gumbel(
            seed, 3, np.arange(60), COUPLED
        )
        shares = np.exp(noisy - noisy.max()) / np.exp(noisy - noisy.max()).sum()
        assert got.token == shares.argmax()
        assert got.confidence == pytest.approx(shares.max(), rel=1e-9 if params.top_p < 1 else 1e-3)
        assert len(got.q_ids) == len(got.q_probs) == 0


def test_confidence_tells_who_agrees_better_than_the_probability():
    """Of a draft whose logits are the target's with an error: log-loss of calibrated bins, as in the controller's use.

    The token's probability leaves out the noise that both share.
    """
    params = SamplingParams(temperature=0.9, top_k=0, top_p=1.0, min_p=0.0)
    rng = np.random.default_rng(11)
    shares, probs, agreed = [], [], []
    for seed in range(3000):
        target = rng.normal(0, 3, 40).astype(np.float32)
        row = (target + rng.normal(0, 0.7, 40)).astype(np.float32)
        seeded = dataclasses.replace(params, seed=seed)
        got = draft(seeded, row, [], 5)
        shares.append(got.confidence)
        probs.append(reference.distribution(params, row, [])[got.token])
        agreed.append(draft(seeded, target, [], 5).token == got.token)

    def log_loss(x):
        bins = np.searchsorted(np.quantile(x, np.linspace(0, 1, 11)[1:-1]), x)
        p = np.array([np.mean(np.array(agreed)[bins == b]) for b in range(10)]).clip(1e-3, 1 - 1e-3)[bins]
        return -np.mean(np.where(agreed, np.log(p), np.log(1 - p)))

    assert log_loss(shares) < 0.95 * log_loss(probs)


def test_greedy_confidence_is_the_softmax_probability():
    """Greedy has no temperature: the unfiltered probability at T = 1, after bias and penalties."""
    row = np.array([1.0, 3.0, 2.0], np.float32)
    got = draft(SamplingParams(temperature=0.0), row, [], 0)
    assert got.token == 1
    assert got.confidence == pytest.approx(1 / (1 + math.exp(-1) + math.exp(-2)), rel=1e-6)
    got = draft(SamplingParams(temperature=0.0, logit_bias=((1, -math.inf),)), row, [], 0)
    assert got.token == 2
    assert got.confidence == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-9)


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("params", PARAMS[3:] + PARAMS[:1])
def test_rejection_drafts_come_from_the_distribution_they_carry(params, size):
    """q holds at most `size` of the draft's likeliest kept tokens, sums to 1, and is what proposals follow."""
    row = np.random.default_rng(4).normal(0, 1, 30).astype(np.float32)
    params = dataclasses.replace(params, acceptance="rejection")
    n = 800
    drafts = [draft(dataclasses.replace(params, seed=seed), row, [2], 1, size) for seed in range(n)]
    q_ids, q_probs = drafts[0].q_ids, drafts[0].q_probs
    assert q_ids.dtype == np.int32
    assert q_probs.dtype == np.float32
    p = reference.distribution(params, row, [2])
    assert len(q_ids) == min(size, np.count_nonzero(p))
    assert set(q_ids.tolist()) == set(np.argsort(-p, kind="stable")[: len(q_ids)].tolist())
    np.testing.assert_allclose(q_probs, p[q_ids] / p[q_ids].sum(), rtol=1e-5)
    for got in drafts:
        ProposalDistribution(got.q_ids, got.q_probs).check(got.token)
        assert got.confidence == float(got.q_probs[got.q_ids == got.token][0])
    counts = np.bincount([got.token for got in drafts], minlength=30)[q_ids]
    spread = np.sqrt(n * q_probs * (1 - q_probs)) + 1
    assert (np.abs(counts - n * q_probs) < 5 * spread).all()


def test_identical_rejection_drafts_are_always_accepted():
    """q = p: u < p / q always holds."""
    logits = np.random.default_rng(5).normal(0, 2, (2, 40)).astype(np.float32)
    for seed in range(200):
        params = SamplingParams(seed=seed, top_k=20, acceptance="rejection")
        got = draft(params, logits[0], [1], 1)
        rows = reference.make_rows(params, logits, [1], [got.token], 32)
        decision = decide(
            params, [1], [got.token], rows, proposal_distributions=[ProposalDistribution(got.q_ids, got.q_probs)]
        )
        assert isinstance(decision, Decision)
        assert decision.n_accepted == 1
