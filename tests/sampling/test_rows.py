"""Sparse rows decide as whole rows do, or say that they cannot."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.engine.dense import DenseLogits
from shared.errors import WireError
from shared.sampling import noise
from shared.sampling.acceptance import Decision, NeedsRows, ProposalDistribution, decide
from shared.sampling.drafting import draft
from shared.sampling.params import SamplingParams
from shared.sampling.rows import asked_ids, needed_top_k, needs_lse, sparse_rows
from tests.sampling import reference

WIDTHS = (1, 4, 16, 64)


@st.composite
def verifications(draw):
    """Parameters, a history, proposals with their distributions, and the rows that judge them."""
    n_vocab = draw(st.sampled_from([2, 7, 30, 200]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(0, 3))
    logits = rng.normal(0, draw(st.sampled_from([0.3, 2.0, 5.0])), (n + 1, n_vocab))
    logits[:, rng.integers(0, n_vocab, 3)] += draw(st.sampled_from([0.0, 6.0]))
    step = draw(st.sampled_from([0.0, 0.0, 0.5, 4.0]))
    logits = (np.round(logits / step) * step if step else logits).astype(np.float32)
    tokens = st.integers(0, n_vocab - 1)
    bias = draw(
        st.dictionaries(
            tokens, st.sampled_from([-math.inf, -100.0, -1.5, 0.25, 8.0, 900.0]), max_size=min(4, n_vocab - 1)
        )
    )
    plain = draw(st.booleans())
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-300, 0.3, 0.8, 1.0, 5.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 3, 40, n_vocab])),
        top_p=draw(st.sampled_from([0.0, 0.2, 0.5, 0.7, 0.95, 0.999, 1.0, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.001, 0.05, 0.5, 1.0])),
        repeat_penalty=1.0 if plain else draw(st.sampled_from([1.0, 1.3, 0.5])),
        presence_penalty=0.0 if plain else draw(st.sampled_from([0.0, 0.7, -2.0])),
        frequency_penalty=0.0 if plain else draw(st.sampled_from([0.0, 0.4])),
        repeat_last_n=draw(st.sampled_from([0, 1, 4, 64])),
        logit_bias=() if plain else tuple(bias.items()),
        seed=draw(st.integers(0, 2**64 - 1)),
        acceptance=draw(st.sampled_from(["coupled", "rejection"])),
    )
    history = draw(st.lists(tokens, max_size=9))
    proposals: list[int] = []
    distributions = []
    for j in range(n):
        prefix = history + proposals
        guess = draw(st.sampled_from(["target", "near", "any"]))
        row = logits[j] + (0 if guess == "target" else rng.normal(0, 1 if guess == "near" else 9, n_vocab))
        token = draft(
            params, row.astype(np.float32), prefix, len(prefix), distribution_size=draw(st.sampled_from([2, 64]))
        )
        proposals.append(token.token)
        distributions.append(
            ProposalDistribution(token.q_ids, token.q_probs)
            if len(token.q_ids)
            else ProposalDistribution.one_hot(token.token)
        )
    return params, history, proposals, distributions, logits


def plain_decision(params, history, proposals, distributions, logits):
    """The decision in plain loops over whole rows, and whether it hangs on rounding."""
    narrow = False
    for j in range(len(proposals) + 1):
        prefix = history + proposals[:j]
        proposal = proposals[j] if j < len(proposals) else None
        if params.acceptance == "coupled" or params.temperature == 0:
            token, close = reference.coupled_token(params, logits[j], prefix, len(prefix))
            accepted = token == proposal
        else:
            q = None
            if proposal is not None:
                q = dict(zip(distributions[j].ids.tolist(), distributions[j].probs.tolist(), strict=True))
            accepted, token, close = reference.rejection(params, logits[j], prefix, len(prefix), proposal, q)
        narrow |= close
        if not accepted:
            return Decision(j, token), narrow
    raise AssertionError("the last row always decides")


@settings(max_examples=400, deadline=None)
@given(verifications())
def test_decision_is_that_of_the_whole_rows_for_any_number_of_logits_sent(case):
    """For K = 1, 4, 16, 64 and all, the decision is the same, and the one of plain loops over whole rows."""
    params, history, proposals, distributions, logits = case
    n_vocab = logits.shape[1]
    decisions = [
        reference.decide_with_fallback(params, history, proposals, logits, k, distributions)[0]
        for k in (*WIDTHS, needed_top_k(params), n_vocab)
    ]
    assert len(set(decisions)) == 1
    expected, narrow = plain_decision(params, history, proposals, distributions, logits)
    if not narrow:
        assert decisions[0] == expected


@settings(max_examples=100, deadline=None)
@given(verifications())
def test_log_sum_exp_off_by_its_tolerance_or_missing_changes_nothing(case):
    """An engine's log-sum-exp may err by the tolerance, or be absent, without touching any decision."""
    params, history, proposals, distributions, logits = case
    expected, _ = reference.decide_with_fallback(params, history, proposals, logits, 16, distributions)
    rows = reference.make_rows(params, logits, history, proposals, 16)
    whole = dict(enumerate(logits))
    for lse in (rows.lse + 9e-5, rows.lse - 9e-5, rows.lse * np.nan):
        changed = dataclasses.replace(rows, lse=lse)
        assert decide(params, history, proposals, changed, whole, distributions) == expected


def peaked_rows(n_rows, n_vocab, seed):
    """Rows shaped as a language model's: a few likely tokens high above a wide bulk."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2.0, (n_rows, n_vocab))
    for row in logits:
        n_likely = 40
        likely = rng.choice(n_vocab, n_likely, replace=False)
        row[likely] = 19 - rng.uniform(1, 3.5) * np.log(np.arange(1, n_likely + 1)) + rng.normal(0, 0.4, n_likely)
    return logits.astype(np.float32)


@pytest.mark.parametrize(
    ("params", "most_whole_rows"),
    [
        (SamplingParams(), 0),
        (SamplingParams(temperature=0.0), 0),
        (SamplingParams(temperature=0.0, repeat_penalty=1.1, logit_bias=((5, 3.0),)), 0),
        (SamplingParams(repeat_penalty=1.1, presence_penalty=0.5, logit_bias=((5, -math.inf),)), 0),
        (SamplingParams(top_k=0), 0),
        (SamplingParams(top_k=0, top_p=0.95, min_p=0.0), 4),
        (SamplingParams(top_k=0, top_p=1.0, min_p=0.0, temperature=0.8), 8),
        (SamplingParams(acceptance="rejection"), 0),
        (SamplingParams(acceptance="rejection", top_k=0, top_p=0.95, min_p=0.0), 4),
    ],
)
def test_realistic_rows_seldom_need_their_whole_form(params, most_whole_rows):
    """On peaked rows of 8,192 logits, 128 of them prove the token: for nearly all of 80 rows, by default for all."""
    logits = peaked_rows(80, 8192, 1)
    history = list(range(100, 160))
    whole = 0
    for j in range(len(logits)):
        seeded = dataclasses.replace(params, seed=j)
        _, n_whole = reference.decide_with_fallback(seeded, history, [], logits[j : j + 1], 128)
        whole += n_whole
    assert whole <= most_whole_rows


def test_an_unsent_token_can_win_and_is_found():
    """A flat row whose luckiest token is not sent: the whole row is asked for, and that token is returned."""
    params = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=4)
    row = np.linspace(0, -0.1, 500).astype(np.float32)
    luckiest = int((row + noise.gumbel_of_all(4, 3, 500, noise.COUPLED)).argmax())
    assert luckiest >= 4
    rows = reference.make_rows(params, row[None], [1, 2, 3], [], 4)
    assert decide(params, [1, 2, 3], [], rows) == NeedsRows((0,))
    assert decide(params, [1, 2, 3], [], rows, {0: row}) == Decision(0, luckiest)


def test_sent_leaders_may_all_be_banned():
    """If bias takes away every leader that was sent, the whole row decides."""
    params = SamplingParams(temperature=0.0, logit_bias=((0, -math.inf), (1, -math.inf)))
    row = np.array([9, 8, 7, 6], np.float32)
    rows = reference.make_rows(params, row[None], [], [], 2)
    assert decide(params, [], [], rows) == NeedsRows((0,))
    assert decide(params, [], [], rows, {0: row}) == Decision(0, 2)


def test_needed_top_k():
    """One logit for plain greedy; else what top_k can need after bias and penalties, at most what is configured."""
    assert needed_top_k(SamplingParams(temperature=0.0)) == 1
    assert needed_top_k(SamplingParams(temperature=0.0, logit_bias=((1, 1.0), (2, 1.0)))) == 3
    assert needed_top_k(SamplingParams(top_k=40)) == 40
    assert needed_top_k(SamplingParams(top_k=40, presence_penalty=1.0, repeat_last_n=10)) == 50
    assert needed_top_k(SamplingParams(top_k=40, presence_penalty=1.0, repeat_last_n=1000)) == 128
    assert needed_top_k(SamplingParams(top_k=0), configured=64) == 64
    assert needed_top_k(SamplingParams(top_k=500), configured=64) == 64


def test_needs_lse():
    """The log-sum-exp matters only where top_p is taken over more tokens than are sent."""
    assert not needs_lse(SamplingParams(), 40, 8192)
    assert not needs_lse(SamplingParams(temperature=0.0, top_k=0), 128, 8192)
    assert not needs_lse(SamplingParams(top_k=0, top_p=1.0), 128, 8192)
    assert needs_lse(SamplingParams(top_k=0), 128, 8192)
    assert needs_lse(SamplingParams(top_k=200), 128, 8192)


def test_asked_ids():
    """Asked for: biased ids, the penalty window, proposals that enter it, and proposals in rejection."""
    bias = ((7, 1.0), (3, -1.0))
    assert asked_ids(SamplingParams(), [1, 2], [4]).tolist() == []
    assert asked_ids(SamplingParams(logit_bias=bias), [1, 2], [4]).tolist() == [3, 7]
    penalized = SamplingParams(logit_bias=bias, repeat_penalty=1.1, repeat_last_n=2)
    assert asked_ids(penalized, [9, 5, 7], np.array([4, 5], np.int32)).tolist() == [3, 4, 5, 7]
    rejection = SamplingParams(acceptance="rejection")
    assert asked_ids(rejection, [1, 2], [6, 4, 6]).tolist() == [4, 6]
    assert asked_ids(rejection, [], []).dtype == np.int32


def good_rows():
    return reference.make_rows(
        SamplingParams(logit_bias=((2, 1.0), (5, 1.0))), np.arange(12, dtype=np.float32).reshape(2, 6), [], [0], 3
    )


@pytest.mark.parametrize(
    "damage",
    [
        {"top_ids": np.array([[5, 4, 6], [5, 4, 3]], np.int32)},
        {"top_ids": np.array([[5, 4, -1], [5, 4, 3]], np.int32)},
        {"top_ids": np.array([[5, 4], [5, 4]], np.int32)},
        {"top_ids": np.array([5, 4, 3], np.int32)},
        {"top_logits": np.array([[5, 4, np.nan], [11, 10, 9]], np.float32)},
        {"top_logits": np.array([[5, 3, 4], [11, 10, 9]], np.float32)},
        {"top_logits": np.array([[5, 5, 3], [11, 10, 9]], np.float32)},
        {"lse": np.zeros(3)},
        {"asked_ids": np.array([5, 2], np.int32)},
        {"asked_ids": np.array([2, 2], np.int32)},
        {"asked_ids": np.array([2, 6], np.int32)},
        {"asked_ids": np.array([2], np.int32)},
        {"asked_logits": np.array([[2, np.inf], [8, 11]], np.float32)},
        {"n_vocab": 2},
    ],
)
def test_malformed_rows_are_refused(damage):
    """Rows that break a rule of their docstring are refused as a bad message."""
    good_rows().check()
    with pytest.raises(WireError):
        dataclasses.replace(good_rows(), **damage).check()


def test_rows_without_a_penalized_token_are_refused():
    """If the verifier did not send an asked logit, that is an error and not a wrong token."""
    params = SamplingParams(logit_bias=((4, 1.0),))
    with pytest.raises(WireError, match="under bias or penalties"):
        decide(params, [], [0], good_rows())


def test_rows_of_one_session_out_of_a_pass():
    """Rows are cut out of a pass that other sessions share."""
    logits = np.random.default_rng(0).normal(0, 3, (6, 50)).astype(np.float32)
    params = SamplingParams(logit_bias=((9, 1.0),))
    dense = DenseLogits(logits)
    rows = sparse_rows(dense, dense.top(20), None, 2, 3, 10, asked_ids(params, [], []))
    rows.check()
    assert rows.top_ids[0].tolist() == np.argsort(-logits[2], kind="stable")[:10].tolist()
    assert rows.asked_logits[:, 0].tolist() == logits[2:5, 9].tolist()
    assert np.isnan(rows.lse).all()
