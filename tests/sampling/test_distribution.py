"""What the whole loop (draft, decide, commit, again) emits is distributed as the target's filtered distribution.

The joint distribution of the first three tokens of toy models is known exactly; the loop's frequencies over many
seeds are compared with it by chi-square. Seeds are fixed, so a verdict never changes; and planted errors in the
acceptance rules must be found by the same check.
"""

import itertools

import numpy as np
import pytest
from scipy import stats

from shared.engine.dense import log_sum_exp, top_ids
from shared.sampling import acceptance, drafting, noise
from shared.sampling.acceptance import NeedsRows, ProposalDistribution, decide
from shared.sampling.drafting import draft
from shared.sampling.params import SamplingParams
from shared.sampling.rows import SparseRows, asked_ids
from tests.sampling import reference

V = 12
PROMPT = [3, 3]
LENGTH = 3
ENOUGH_SEEDS_FOR_PLANTED_ERRORS = 3_000
THRESHOLD = 1e-4


class Toy:
    """A deterministic Markov model: logits are a table's row of the last token; as a verifier, K logits of it."""

    def __init__(self, table, top_k=V):
        self.table = table.astype(np.float32)
        self.top = np.array([top_ids(row, top_k) for row in self.table])
        self.top_logits = np.take_along_axis(self.table, self.top, axis=1)
        self.lse = np.array([log_sum_exp(row) for row in self.table])

    def rows(self, params, history, proposals):
        """Sparse rows after history, and after each proposal."""
        last = [history[-1], *proposals]
        asked = asked_ids(params, history, proposals)
        return SparseRows(
            self.top[last], self.top_logits[last], self.lse[last], asked, self.table[np.ix_(last, asked)], V
        )


def toys(top_k):
    """A target that sends top_k logits, and a draft that resembles it."""
    rng = np.random.default_rng(11)
    table = rng.normal(0, 1.5, (V, V))
    return Toy(table, top_k), Toy(table + rng.normal(0, 1.0, (V, V)))


def run(params, seed, target, drafter, on_round=None, draft_seed_offset=0):
    """The first LENGTH tokens of one generation, proposals verified and accepted, and the
    share of rounds that needed whole rows.

    Each round proposes 0 to 2 tokens, more or fewer with seed and position.
    """
    params = with_seed(params, seed)
    own = with_seed(params, seed + draft_seed_offset)
    tokens = list(PROMPT)
    rounds = verified = accepted = fallbacks = 0
    while len(tokens) < len(PROMPT) + LENGTH:
        proposals, distributions = [], []
        for _ in range((seed + len(tokens)) % 3):
            prefix = tokens + proposals
            got = draft(own, drafter.table[prefix[-1]], prefix, len(prefix), distribution_size=4)
            proposals.append(got.token)
            distributions.append(ProposalDistribution(got.q_ids, got.q_probs))
        if on_round:
            on_round(tokens, proposals)
        rows = target.rows(params, tokens, proposals)
        answer = decide(params, tokens, proposals, rows, {}, distributions)
        if isinstance(answer, NeedsRows):
            fallbacks += 1
            dense = {j: target.table[token] for j, token in enumerate([tokens[-1], *proposals])}
            answer = decide(params, tokens, proposals, rows, dense, distributions)
        # Only the first refused proposal is judged.
        verified += min(answer.n_accepted + 1, len(proposals))
        accepted += answer.n_accepted
        rounds += 1
        tokens += [*proposals[: answer.n_accepted], answer.token]
    return tuple(tokens[len(PROMPT) : len(PROMPT) + LENGTH]), verified, accepted, fallbacks / rounds


def with_seed(params, seed):
    """A copy with another seed; quicker than dataclasses.replace."""
    copy = object.__new__(SamplingParams)
    for name in SamplingParams.__dataclass_fields__:
        object.__setattr__(copy, name, getattr(params, name))
    object.__setattr__(copy, "seed", seed)
    return copy


def exact_distribution(params, target):
    """{three tokens: probability}, by the chain rule over the plain reference."""
    paths = {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for path, probability in paths.items():
            prefix = PROMPT + list(path)
            p = reference.distribution(params, target.table[prefix[-1]], prefix)
            longer |= {(*path, token): probability * p[token] for token in np.flatnonzero(p).tolist()}
        paths = longer
    return paths


def p_value(texts, exact):
    """Chi-square of texts against the exact distribution, rare ones pooled; 0 if an impossible one occurs."""
    counts = dict.fromkeys(exact, 0)
    for text in texts:
        if text not in counts:
            return 0.0
        counts[text] += 1
    observed, expected = [], []
    pooled_observed = pooled_expected = 0.0
    for text, probability in exact.items():
        mean = probability * len(texts)
        if mean >= 8:
            observed.append(counts[text])
            expected.append(mean)
        else:
            pooled_observed += counts[text]
            pooled_expected += mean
    if pooled_expected >= 8:
        observed.append(pooled_observed)
        expected.append(pooled_expected)
    elif expected:
        observed[-1] += pooled_observed
        expected[-1] += pooled_expected
    return float(stats.chisquare(observed, np.array(expected) * (sum(observed) / sum(expected))).pvalue)


FILTERED = SamplingParams(temperature=0.9, top_k=9, top_p=0.9, min_p=0.03)
PENALIZED = SamplingParams(
    temperature=1.1,
    top_k=0,
    top_p=0.95,
    min_p=0.02,
    repeat_penalty=1.4,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    repeat_last_n=3,
    logit_bias=((5, 0.8), (2, -np.inf)),
)
UNFILTERED = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


def rejecting(params):
    copy = with_seed(params, 0)
    object.__setattr__(copy, "acceptance", "rejection")
    return copy


@pytest.mark.parametrize(
    ("params", "top_k", "n_seeds", "fallbacks"),
    [
        pytest.param(FILTERED, 9, 20_000, (0, 0), id="coupled-filters"),
        pytest.param(rejecting(FILTERED), 9, 20_000, (0, 0), id="rejection-filters"),
        pytest.param(PENALIZED, 4, 20_000, (0.05, 0.95), id="coupled-penalties-few-logits"),
        pytest.param(rejecting(PENALIZED), 8, 20_000, (0.05, 0.95), id="rejection-penalties-few-logits"),
    ],
)
def test_three_tokens_follow_the_target_exactly(params, top_k, n_seeds, fallbacks):
    """The joint frequencies over many seeds; with few logits sent, both proofs and whole rows take part."""
    target, drafter = toys(top_k)
    texts, verified, accepted, shares = zip(*(run(params, s, target, drafter) for s in range(n_seeds)), strict=True)
    assert p_value(texts, exact_distribution(params, target)) > THRESHOLD
    assert 0.2 < sum(accepted) / sum(verified) < 0.95
    assert fallbacks[0] <= sum(shares) / n_seeds <= fallbacks[1]


def check(params, **how):
    """(p-value, acceptance rate) of a smaller run on complete rows."""
    target, drafter = toys(V)
    texts, verified, accepted, _ = zip(
        *(run(params, s, target, drafter, **how) for s in range(ENOUGH_SEEDS_FOR_PLANTED_ERRORS)), strict=True
    )
    return p_value(texts, exact_distribution(params, target)), sum(accepted) / sum(verified)


def test_planted_always_accept_is_found(monkeypatch):
    """Rejection sampling that accepts everything emits the draft's distribution, and the check says so."""
    monkeypatch.setattr(acceptance, "accept_rejection", lambda _u, _p, _q: True)
    assert check(rejecting(FILTERED))[0] < THRESHOLD


def test_planted_residual_without_subtraction_is_found(monkeypatch):
    """A recovered token sampled from p instead of max(p - q, 0) is found."""
    monkeypatch.setattr(acceptance, "residual", lambda _target, p, _q_ids, _q: p)
    assert check(rejecting(FILTERED))[0] < THRESHOLD


def test_planted_q_of_before_the_sparsification_is_found(monkeypatch):
    """Proposals sampled from another distribution than the one declared are found."""

    def sharpened(ids, weights, seed, position, stream):
        return acceptance.sample(ids, weights**2, seed, position, stream)

    monkeypatch.setattr(drafting, "sample", sharpened)
    assert check(rejecting(FILTERED))[0] < THRESHOLD


def test_planted_shared_noise_in_rejection_is_found(monkeypatch):
    """u of u < p/q taken from the noise that the proposal was sampled with is found."""
    monkeypatch.setattr(acceptance, "ACCEPT", noise.DRAFT)
    assert check(rejecting(FILTERED))[0] < THRESHOLD


def test_planted_acceptance_inside_the_nucleus_is_found(monkeypatch):
    """Coupled drafts accepted because the target's filters keep them, though not equal to its token, are found."""
    target, _ = toys(V)
    prefix = []

    def on_round(tokens, _proposals):
        prefix[:] = tokens

    def in_nucleus(proposal, _token):
        kept = reference.kept(FILTERED, target.table[prefix[-1]], prefix)[0]
        prefix.append(proposal)
        return proposal in kept

    monkeypatch.setattr(acceptance, "accept_coupled", in_nucleus)
    assert check(FILTERED, on_round=on_round)[0] < THRESHOLD


def test_the_check_passes_without_planted_errors_and_coupling_raises_acceptance():
    """The planted errors' check passes the true rules; independent draft noise stays exact but is accepted less."""
    p_coupled, rate_coupled = check(FILTERED)
    p_own, rate_own = check(FILTERED, draft_seed_offset=10**9)
    p_rejection, rate_rejection = check(rejecting(FILTERED))
    assert min(p_coupled, p_own, p_rejection) > THRESHOLD
    assert rate_coupled > rate_own + 0.15
    assert rate_rejection > rate_own + 0.15


@pytest.mark.parametrize("pair", range(6))
def test_coupled_acceptance_is_at_least_the_proven_bound(pair):
    """P(draft token = target token) >= (1 - TV) / (1 + TV), on random pairs from near to far."""
    rng = np.random.default_rng(pair)
    params = UNFILTERED
    row = rng.normal(0, 1.5, 20).astype(np.float32)
    other = (row + rng.normal(0, 0.2 + 0.4 * pair, 20)).astype(np.float32)
    p, q = (reference.distribution(params, r, []) for r in (row, other))
    distance = 0.5 * float(np.abs(p - q).sum())
    n = 4000
    equal = sum(draft(params, row, [], at).token == draft(params, other, [], at).token for at in range(n))
    bound = (1 - distance) / (1 + distance)
    assert equal / n > bound - 4 * np.sqrt(bound * (1 - bound) / n)
    assert equal / n < 1 - distance + 4 * np.sqrt(distance * (1 - distance) / n)


def test_probabilities_of_all_paths_sum_to_one():
    """The exact distribution that the others compare with is one."""
    for params, top_k in itertools.product((FILTERED, PENALIZED), (V,)):
        target, _ = toys(top_k)
        assert sum(exact_distribution(params, target).values()) == pytest.approx(1)
