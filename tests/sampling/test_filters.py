"""Bias, penalties, top_k, top_p and min_p over whole rows."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared.errors import RequestError
from shared.sampling.filters import candidates, changes, changes_logits
from shared.sampling.params import SamplingParams
from tests.sampling import reference


@st.composite
def cases(draw):
    """A row of logits, often with ties, a history, and parameters."""
    n_vocab = draw(st.sampled_from([1, 2, 5, 12, 40, 700]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    row = rng.normal(0, draw(st.sampled_from([0.3, 2.0, 6.0])), n_vocab)
    step = draw(st.sampled_from([0.0, 0.0, 0.5]))
    row = (np.round(row / step) * step if step else row).astype(np.float32)
    tokens = st.integers(0, n_vocab - 1)
    bias = draw(
        st.dictionaries(tokens, st.sampled_from([-math.inf, -100.0, -1.5, 0.25, 8.0]), max_size=min(4, n_vocab - 1))
    )
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-300, 0.3, 0.8, 1.0, 5.0])),
        top_k=draw(st.sampled_from([0, 1, 3, 40, n_vocab, 2**31 - 1])),
        top_p=draw(st.sampled_from([0.0, 0.2, 0.7, 0.95, 0.999, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0])),
        repeat_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.7, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.4])),
        repeat_last_n=draw(st.sampled_from([0, 1, 4, 64])),
        logit_bias=tuple(bias.items()),
    )
    history = draw(st.lists(tokens, max_size=9))
    return params, row, history


@settings(max_examples=300, deadline=None)
@given(cases())
def test_same_tokens_as_the_plain_reference(case):
    """The kept tokens, their order and their scores are those of the plain loops."""
    params, row, history = case
    ids, z, narrow = reference.kept(params, row, history)
    assume(not narrow)
    changed = changes(params, history, (), len(row)) if changes_logits(params) else None
    got = candidates(params, row, changed, 0)
    if got.ranked:
        assert got.ids.tolist() == ids
    else:
        assert got.ids.tolist() == sorted(ids)
    np.testing.assert_allclose(got.z, [z[i] for i in got.ids], rtol=1e-12, atol=1e-12)


def test_penalties_follow_llama_cpp():
    """Repeat penalty divides positive, multiplies negative logits; then count x frequency and presence are taken."""
    params = SamplingParams(
        temperature=1.0, top_k=0, top_p=1, min_p=0, repeat_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25
    )
    row = np.array([4.0, -4.0, 1.0, 0.0], np.float32)
    got = candidates(params, row, changes(params, [0, 1, 1, 3], (), 4), 0)
    assert got.z.tolist() == [4 / 2 - 0.5 - 0.25, -4 * 2 - 1.0 - 0.25, 1.0, -0.75]


def test_window_slides_over_history_and_proposals():
    """Row j's window is the last repeat_last_n tokens of history + proposals[:j]; bias applies in every row."""
    params = SamplingParams(presence_penalty=1.0, repeat_last_n=2, logit_bias=((9, 1.0),))
    changed = changes(params, [1, 2, 3], [3, 5], 10)
    assert changed.ids.tolist() == [2, 3, 5, 9]
    assert changed.bias.tolist() == [0, 0, 0, 1]
    assert changed.counts.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 1, 1, 0]]


def test_top_p_is_taken_over_what_top_k_kept():
    """Equal halves after top_k=2: top_p=0.5 needs one token only, ties going to the lower id."""
    row = np.zeros(8, np.float32)
    params = SamplingParams(temperature=1.0, top_k=2, top_p=0.5, min_p=0.0)
    assert candidates(params, row, None, 0).ids.tolist() == [0]
    wide = SamplingParams(temperature=1.0, top_k=0, top_p=0.5, min_p=0.0)
    assert candidates(wide, row, None, 0).ids.tolist() == [0, 1, 2, 3]


def test_large_flat_rows_keep_the_exact_prefix():
    """With top_p alone, a flat row of a large vocabulary keeps as many tokens as its probability takes."""
    rng = np.random.default_rng(3)
    row = rng.normal(0, 0.7, 30_000).astype(np.float32)
    for top_p in (0.05, 0.5, 0.97):
        params = SamplingParams(temperature=1.0, top_k=0, top_p=top_p, min_p=0.0)
        order = np.argsort(-row, kind="stable")
        weights = np.exp(row[order].astype(np.float64))
        n = 1 + int((weights.cumsum() / weights.sum() < top_p).sum())
        assert candidates(params, row, None, 0).ids.tolist() == order[:n].tolist()


@pytest.mark.parametrize("top_k", [0, 2])
def test_banning_every_token_is_refused(top_k):
    """A request that bans the whole vocabulary gets an error, not a token."""
    params = SamplingParams(top_k=top_k, logit_bias=tuple((i, -math.inf) for i in range(3)))
    with pytest.raises(RequestError, match="bans every token"):
        candidates(params, np.zeros(3, np.float32), changes(params, [], (), 3), 0)


@pytest.mark.parametrize("bias", [((0, math.inf),), ((0, math.nan),), ((3, 1.0),), ((-1, 1.0),)])
def test_senseless_bias_is_refused(bias):
    """A bias of +inf or NaN, or on a token that does not exist, gets an error."""
    with pytest.raises(RequestError, match="logit_bias"):
        changes(SamplingParams(logit_bias=bias), [], (), 3)
