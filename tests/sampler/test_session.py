"""A session in the sampler, and how a step's arrays are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from services.sampler.session import Question, SamplingSession, check_dense, questions, whole_rows
from shared.errors import WireError
from shared.messages import Limits, OpenSampling, VerdictItem, Verify, VerifyItem
from shared.prefix import TokenPrefix
from shared.sampling.acceptance import NeedsRows
from shared.sampling.params import SamplingParams

N_VOCAB = 8
PROMPT = [1, 2, 3]
GREEDY = SamplingParams(temperature=0.0)


def opened(sampling: SamplingParams = GREEDY, max_tokens: int = 100, stop: Sequence[int] = ()) -> SamplingSession:
    tokens = np.array(PROMPT, np.int32)
    return SamplingSession(OpenSampling(1, tokens, len(PROMPT), N_VOCAB, sampling, Limits(max_tokens, tuple(stop))))


def item(text: Sequence[int], proposals: Sequence[int] = (), **fields: Any) -> VerifyItem:
    return VerifyItem(1, len(text), TokenPrefix(text).hash, tuple(proposals), **fields)


def step(items: Sequence[VerifyItem], winners: Sequence[int], **arrays: Any) -> Verify:
    """A step in which each row's largest logit is its winner's."""
    ids = np.array([[w, *(t for t in range(N_VOCAB) if t != w)] for w in winners], np.int32).reshape(-1, N_VOCAB)
    logits = np.zeros((len(winners), N_VOCAB), np.float32)
    logits[:, 0] = 9
    return Verify(1, tuple(items), ids, logits, np.full(len(winners), np.nan), **arrays)


def judge(
    session: SamplingSession, text: Sequence[int], proposals: Sequence[int], winners: Sequence[int]
) -> VerdictItem:
    question = questions(step([item(text, proposals)], winners), {1: N_VOCAB})[0]
    assert session.knows(question.item)
    verdict = session.judge(question, {})
    assert isinstance(verdict, VerdictItem)
    return verdict


# -- verdicts --


def test_an_accepted_run_and_its_bonus() -> None:
    """Proposals that are the target's own tokens are accepted up to the first that is not, then comes the target's."""
    session = opened()
    assert judge(session, PROMPT, [4, 5], [4, 5, 6]) == VerdictItem(1, (4, 5, 6), 2)
    assert judge(session, [*PROMPT, 4, 5, 6], [7, 7], [7, 1, 2]) == VerdictItem(1, (7, 1), 1)
    assert judge(session, [*PROMPT, 4, 5, 6, 7, 1], [], [0]) == VerdictItem(1, (0,), 0)


def test_asking_again_gives_the_same_verdict() -> None:
    """A question about an earlier position is answered from there, and what was decided after it is dropped."""
    session = opened(SamplingParams(seed=7, top_p=1.0, min_p=0.0, repeat_penalty=1.5, temperature=3.0))
    ids = np.arange(N_VOCAB, dtype=np.int32)
    verify = replace(
        step([item(PROMPT, [4, 4], n_asked=N_VOCAB)], [4, 5, 6]),
        asked_ids=ids,
        asked_logits=np.zeros(3 * N_VOCAB, np.float32),
    )
    question = questions(verify, {1: N_VOCAB})[0]
    first = session.judge(question, {})
    assert isinstance(first, VerdictItem)
    again = session.judge(question, {})
    assert again == first
    assert not session.knows(item([*PROMPT, *first.tokens, 0]))
    assert session.knows(item([*PROMPT, *first.tokens]))


def test_only_its_own_text_is_known() -> None:
    """A question is judged only when its prefix is this session's, by length and by hash."""
    session = opened()
    assert session.knows(item(PROMPT))
    assert session.knows(item(PROMPT[:2]))
    assert not session.knows(item([1, 2, 4]))
    assert not session.knows(item([*PROMPT, 4]))
    assert not session.knows(VerifyItem(1, 2**20, 0, ()))


def test_a_stop_token_cuts_the_run() -> None:
    """The run ends with the first stop token, accepted or the target's own; what follows it is dropped."""
    assert judge(opened(stop=[5]), PROMPT, [4, 5, 6], [4, 5, 6, 7]) == VerdictItem(1, (4, 5), 2, "stop")
    assert judge(opened(stop=[6]), PROMPT, [4, 5], [4, 5, 6]) == VerdictItem(1, (4, 5, 6), 2, "stop")
    assert judge(opened(stop=[5]), PROMPT, [5], [4, 5]) == VerdictItem(1, (4,), 0), "a refused stop token is none"


@pytest.mark.parametrize(
    ("most", "tokens", "n_accepted", "finish"),
    [(4, (4, 5, 6), 2, ""), (3, (4, 5, 6), 2, "length"), (2, (4, 5), 2, "length"), (1, (4,), 1, "length")],
)
def test_the_limit_cuts_the_run(most: int, tokens: tuple[int, ...], n_accepted: int, finish: Any) -> None:
    """No more tokens than wanted, and the last one of them says so."""
    assert judge(opened(max_tokens=most), PROMPT, [4, 5], [4, 5, 6]) == VerdictItem(1, tokens, n_accepted, finish)


def test_a_stop_token_at_the_limit_counts_as_stop() -> None:
    """When the last token wanted is a stop token, the text has ended by itself; one beyond the limit has not."""
    assert judge(opened(max_tokens=2, stop=[5]), PROMPT, [4, 5], [4, 5, 6]).finish == "stop"
    assert judge(opened(max_tokens=1, stop=[5]), PROMPT, [4, 5], [4, 5, 6]).finish == "length"


def test_limits_count_from_the_prompt() -> None:
    """A session opened again in mid-generation has only the rest of its tokens left."""
    tokens = np.array([*PROMPT, 4, 5], np.int32)
    session = SamplingSession(OpenSampling(1, tokens, len(PROMPT), N_VOCAB, GREEDY, Limits(3)))
    assert judge(session, [*PROMPT, 4, 5], [6], [6, 7]) == VerdictItem(1, (6,), 1, "length")


def test_whole_rows_decide_what_sparse_ones_cannot() -> None:
    """A row that proves nothing is asked for by its number; given whole, it is judged, counted, and nothing is lost."""
    session = opened(SamplingParams(temperature=50.0, top_k=0, top_p=1.0, min_p=0.0, seed=1))
    sparse = step([item(PROMPT, [4])], [4, 5])
    sparse = replace(sparse, top_ids=sparse.top_ids[:, :1].copy(), top_logits=sparse.top_logits[:, :1].copy())
    question = questions(sparse, {1: N_VOCAB})[0]
    dense: dict[int, Any] = {}
    answer = session.judge(question, dense)
    while isinstance(answer, NeedsRows):
        assert not set(answer.rows) & set(dense)
        for row in answer.rows:
            dense[row] = np.where(np.arange(N_VOCAB) == (4, 5)[row], np.float32(9), np.float32(0))
        answer = session.judge(question, dense)
    assert dense
    assert answer.full_rows == len(dense)
    complete = opened(SamplingParams(temperature=50.0, top_k=0, top_p=1.0, min_p=0.0, seed=1))
    assert answer.tokens == judge(complete, PROMPT, [4], [4, 5]).tokens


# -- cutting a step --


def test_a_step_is_cut_by_its_items() -> None:
    """Every item gets its own rows, asked logits and distributions, in order."""
    items = (
        item(PROMPT, [4], n_asked=2, q_counts=(2,)),
        item([1]),
        item([2], [5, 6], n_asked=1, q_counts=(1, 2)),
    )
    verify = step(
        items,
        range(6),
        asked_ids=np.array([0, 7, 3], np.int32),
        asked_logits=np.arange(7, dtype=np.float32),
        q_ids=np.array([4, 1, 5, 6, 2], np.int32),
        q_probs=np.array([0.5, 0.5, 1, 0.25, 0.75], np.float32),
    )
    first, second, third = questions(verify, {1: N_VOCAB})
    assert [q.first_row for q in (first, second, third)] == [0, 2, 3]
    assert [q.rows.top_ids[:, 0].tolist() for q in (first, second, third)] == [[0, 1], [2], [3, 4, 5]]
    assert first.rows.asked_logits.tolist() == [[0, 1], [2, 3]]
    assert second.rows.asked_logits.shape == (1, 0)
    assert third.rows.asked_ids.tolist() == [3]
    assert third.rows.asked_logits.tolist() == [[4], [5], [6]]
    assert [d.ids.tolist() for d in third.distributions] == [[5], [6, 2]]
    assert whole_rows(third, {0: np.zeros(1), 4: np.ones(1), 9: np.zeros(1)}).keys() == {1}


NO_IDS, NO_LOGITS = np.empty(0, np.int32), np.empty(0, np.float32)
ONE_ID, ONE_LOGIT = np.zeros(1, np.int32), np.zeros(1, np.float32)


@pytest.mark.parametrize(
    "verify",
    [
        step([item(PROMPT, [4])], [4]),
        step([item(PROMPT, [4])], [4, 5, 6]),
        replace(step([item(PROMPT)], [4]), top_logits=np.zeros((1, 3), np.float32)),
        replace(step([item(PROMPT)], [4]), lse=np.zeros(2)),
        step([item(PROMPT, n_asked=1)], [4]),
        step([item(PROMPT, n_asked=1)], [4], asked_ids=ONE_ID),
        step([item(PROMPT, n_asked=2**32 - 1)], [4], asked_ids=ONE_ID, asked_logits=ONE_LOGIT),
        step([item(PROMPT)], [4], asked_ids=ONE_ID, asked_logits=ONE_LOGIT),
        step([item(PROMPT)], [4], asked_logits=ONE_LOGIT),
        step([item(PROMPT, [4], q_counts=(1, 1))], [4, 5], q_ids=ONE_ID, q_probs=ONE_LOGIT),
        step([item(PROMPT, [4], q_counts=(2,))], [4, 5], q_ids=ONE_ID, q_probs=ONE_LOGIT),
        step([item(PROMPT, [4], q_counts=(1,))], [4, 5], q_ids=ONE_ID),
        step([item(PROMPT, [4])], [4, 5], q_ids=ONE_ID, q_probs=ONE_LOGIT),
    ],
)
def test_arrays_that_do_not_add_up_are_refused(verify: Verify) -> None:
    """Rows, asked logits and distributions are exactly those that the items declare."""
    with pytest.raises(WireError, match="Verify: "):
        questions(verify, {1: N_VOCAB})


@pytest.mark.parametrize("logits", [np.zeros((1, 7)), np.full((1, 8), np.nan), np.full((1, 8), np.inf)])
def test_whole_rows_are_checked(logits: Any) -> None:
    """A whole row is as wide as the vocabulary, and finite."""
    check_dense(np.zeros((2, 8), np.float32), 8)
    with pytest.raises(WireError, match="FullRows: "):
        check_dense(logits.astype(np.float32), 8)


def test_a_questions_rows_may_be_checked() -> None:
    """Cut rows keep the rules of sparse rows, so that `check` can tell damaged ones."""
    good: Question = questions(step([item(PROMPT)], [4]), {1: N_VOCAB})[0]
    good.rows.check()
    bad = step([item(PROMPT)], [4])
    bad.top_ids[0, 0] = N_VOCAB
    with pytest.raises(WireError):
        questions(bad, {1: N_VOCAB})[0].rows.check()
