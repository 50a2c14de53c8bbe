"""The acceptance rules, case by case."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import RequestError, WireError
from shared.sampling import noise
from shared.sampling.acceptance import Decision, NeedsRows, ProposalDistribution, decide, residual, sample
from shared.sampling.filters import Candidates
from shared.sampling.params import SamplingParams
from tests.sampling import reference

GREEDY = SamplingParams(temperature=0.0)
FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=1.2, top_k=0, top_p=1.0, min_p=0.0),
    SamplingParams(temperature=1.0, top_k=0, top_p=0.8, min_p=0.0, repeat_penalty=1.3, repeat_last_n=3),
    SamplingParams(temperature=0.0, frequency_penalty=0.8),
]


def table(seed, n_vocab=12, spread=2.0):
    """A toy model: logits after each token."""
    return np.random.default_rng(seed).normal(0, spread, (n_vocab, n_vocab)).astype(np.float32)


def generate(params, model, prompt, n_tokens, propose, top_k):
    """Decode with proposals from `propose(sequence)`; the text, and how many proposals were accepted."""
    tokens, accepted = list(prompt), 0
    while len(tokens) < len(prompt) + n_tokens:
        proposals = propose(tokens)
        logits = model[[*tokens[-1:], *proposals]]
        decision, _ = reference.decide_with_fallback(params, tokens, proposals, logits, top_k)
        tokens += [*proposals[: decision.n_accepted], decision.token]
        accepted += decision.n_accepted
    return tokens[: len(prompt) + n_tokens], accepted


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FILTERS),
    st.integers(0, 5),
    st.integers(1, 12),
    st.lists(st.lists(st.one_of(st.none(), st.integers(0, 11)), max_size=4), min_size=1, max_size=8),
)
def test_text_is_the_same_whatever_is_proposed(params, seed, top_k, guesses):
    """Coupled and greedy text does not depend on proposals, right or wrong, nor on their number or the logits sent.

    A guess of None is replaced by the token that plain decoding gives, so that accepted runs occur.
    """
    model = table(seed)
    plain, _ = generate(params, model, [3], 24, lambda _: [], 12)

    def propose(tokens):
        guess = guesses[len(tokens) % len(guesses)]
        after = plain[len(tokens) : len(tokens) + len(guess)]
        return [after[i] if g is None and i < len(after) else (g or 0) for i, g in enumerate(guess)]

    assert generate(params, model, [3], 24, propose, top_k)[0] == plain


def test_right_proposals_are_accepted_in_full():
    """Proposals that foretell the text are all accepted, and a bonus token follows each run."""
    model = table(1)
    plain, _ = generate(SamplingParams(), model, [3], 25, lambda _: [], 12)
    text, accepted = generate(SamplingParams(), model, [3], 25, lambda t: plain[len(t) : len(t) + 4], 12)
    assert text == plain
    assert accepted == 20


def test_greedy_takes_the_run_up_to_the_first_difference():
    """n_accepted counts equal proposals from the start; the token is the recovered one, or the bonus."""
    logits = np.zeros((4, 6), np.float32)
    logits[[0, 1, 2, 3], [2, 4, 1, 5]] = 1
    for proposals, expected in [
        ([2, 4, 1], Decision(3, 5)),
        ([2, 4, 0], Decision(2, 1)),
        ([0, 4, 1], Decision(0, 2)),
        ([2, 0, 1], Decision(1, 4)),
    ]:
        for acceptance in ("coupled", "rejection"):
            params = SamplingParams(temperature=0.0, acceptance=acceptance)
            rows = reference.make_rows(params, logits, [1], proposals, 1)
            assert decide(params, [1], proposals, rows) == expected
            assert decide(params, np.array([1], np.int32), np.array(proposals, np.int32), rows) == expected


def test_greedy_ties_go_to_the_lower_id():
    """Equal largest logits: the lower id, with and without bias."""
    logits = np.array([[1, 5, 5, 5]], np.float32)
    for params in (GREEDY, SamplingParams(temperature=0.0, logit_bias=((3, 0.0),))):
        assert reference.decide_with_fallback(params, [], [], logits, 2)[0] == Decision(0, 1)
    biased = SamplingParams(temperature=0.0, logit_bias=((0, 4.0),))
    assert reference.decide_with_fallback(biased, [], [], logits, 2)[0] == Decision(0, 0)


def test_rows_after_the_first_refusal_are_not_asked_for():
    """Only rows that are reached can be needed, and each only until it is supplied."""
    params = SamplingParams(temperature=1.0, top_k=0, top_p=0.9, min_p=0.0, seed=9)
    logits = np.random.default_rng(0).normal(0, 0.1, (3, 64)).astype(np.float32)
    first, _ = reference.coupled_token(params, logits[0], [1], 1)
    rows = reference.make_rows(params, logits, [1], [first, 0], 2)
    assert decide(params, [1], [first, 0], rows) == NeedsRows((0,))
    assert decide(params, [1], [first, 0], rows, {0: logits[0]}) == NeedsRows((1,))
    wrong = (first + 1) % 64
    assert decide(params, [1], [wrong, 0], rows, {0: logits[0]}) == Decision(0, first)


def test_number_of_rows_must_fit():
    """One row more than there are proposals; one distribution for each proposal in rejection sampling."""
    rows = reference.make_rows(GREEDY, np.zeros((2, 4), np.float32), [0], [1], 1)
    with pytest.raises(WireError, match="2 rows"):
        decide(GREEDY, [0], [1, 2], rows)
    with pytest.raises(WireError, match="0 proposal distributions"):
        decide(SamplingParams(acceptance="rejection"), [0], [1], rows)


def test_banning_every_token_is_an_error():
    """If bias leaves nothing to choose, the request is refused."""
    params = SamplingParams(logit_bias=tuple((i, -np.inf) for i in range(4)))
    rows = reference.make_rows(params, np.zeros((1, 4), np.float32), [], [], 4)
    with pytest.raises(RequestError, match="bans every token"):
        decide(params, [], [], rows, {0: np.zeros(4, np.float32)})


@pytest.mark.parametrize(
    ("ids", "probs", "match"),
    [
        ([1, 2], [1.0], "equally long"),
        ([], [], "equally long"),
        ([1, 2], [0.5, np.nan], "sum to 1"),
        ([1, 2], [1.5, -0.5], "sum to 1"),
        ([1, 2], [1.0, 0.0], "sum to 1"),
        ([1, 2], [0.3, 0.3], "sum to 1"),
        ([1, 1], [0.5, 0.5], "twice"),
        ([2, 3], [0.5, 0.5], "cannot have given token 1"),
    ],
)
def test_impossible_distributions_are_refused(ids, probs, match):
    """A distribution that is none, or that cannot have given the proposal, never reaches the rule."""
    params = SamplingParams(acceptance="rejection")
    rows = reference.make_rows(params, np.zeros((2, 4), np.float32), [0], [1], 4)
    distribution = ProposalDistribution(np.array(ids, np.int32), np.array(probs, np.float32))
    with pytest.raises(WireError, match=match):
        decide(params, [0], [1], rows, proposal_distributions=[distribution])


def test_residual_is_p_minus_q_where_positive():
    """Tokens that q favours get nothing; those q lacks keep all of p; p itself if nothing is left."""
    target = Candidates(np.array([5, 2, 9], np.int32), np.zeros(3), True)
    p = np.array([0.5, 0.25, 0.25])
    left = residual(target, p, np.array([9, 7, 5], np.int32), np.array([0.5, 0.25, 0.25]))
    assert left.tolist() == [0.25, 0.25, 0.0]
    assert residual(target, p, target.ids, p).tolist() == p.tolist()


def test_one_hot_proposals_are_accepted_with_the_targets_probability():
    """A deterministic drafter's proposal stands with probability p(x); a refused one is never the recovered token."""
    logits = np.array([[1.0, 0.0, 0.5, -1.0], [0, 0, 0, 0]], np.float32)
    n = 3000
    accepted = 0
    for seed in range(n):
        params = SamplingParams(temperature=1.0, top_k=0, top_p=0.999, min_p=0.0, seed=seed, acceptance="rejection")
        rows = reference.make_rows(params, logits, [0], [2], 4)
        decision = decide(params, [0], [2], rows, dict(enumerate(logits)), [ProposalDistribution.one_hot(2)])
        accepted += decision.n_accepted
        assert decision.n_accepted or decision.token != 2
    p = reference.distribution(SamplingParams(temperature=1.0, top_k=0, top_p=0.999, min_p=0), logits[0], [])[2]
    assert abs(accepted - n * p) < 4 * np.sqrt(n * p * (1 - p))


def test_sample_skips_tokens_without_weight():
    """A weight of 0 is never chosen, and a single token needs no noise."""
    ids = np.array([4, 1, 8], np.int32)
    drawn = {sample(ids, np.array([0.5, 0.0, 0.5]), seed, 0, noise.RESIDUAL) for seed in range(64)}
    assert drawn == {4, 8}
    assert sample(ids, np.array([0.0, 1e-300, 0.0]), 1, 0, noise.RESIDUAL) == 1
