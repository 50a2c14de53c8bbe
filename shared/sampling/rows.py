"""Sparse rows of target logits, and the proof that they decide as the whole rows would.

A row carries its K largest logits, the log-sum-exp of all, and the logits of ids that the session asked for because
bias, penalties or the acceptance rule touch them. Every unsent token is then unchanged by bias and penalties and its
logit is at most the K-th one, and its noise is computable: enough to prove, nearly always, that no unsent token wins.

Invariant: `choose` returns exactly the token that the whole row gives, or says that it cannot tell; never an
approximation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from shared.engine.interface import Float32, Int32, Logits
from shared.errors import WireError
from shared.sampling.filters import (
    Bool,
    Candidates,
    Changes,
    Float64,
    Kept,
    Ranked,
    Tokens,
    adjust,
    candidates,
    changes_logits,
    mass_bounds,
    needs_mass,
)
from shared.sampling.noise import (
    COUPLED,
    GUMBEL_MAX,
    UInt32,
    gumbel,
    gumbel_of_words,
    words_of_all,
)
from shared.sampling.params import SamplingParams

DEFAULT_TOP_K: Final = 128
"""Logits sent per row unless configured otherwise."""
LSE_TOLERANCE: Final = 1e-4
"""Absolute error that an engine's log-sum-exp may have; inside it top_p is decided by the whole row."""

_SHARE_SLACK: Final = 8.0
"""What of an unfiltered row is behind the winner by more, in units of T, is left out of its share."""
_NO_IDS: Final = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class SparseRows:
    """What the verifier sends of R rows of target logits, in the order of positions.

    top_ids: [R, K] int32, the K largest logits' ids, by descending logit and then ascending id.
    top_logits: [R, K] float32.
    lse: [R] float64, log(sum(exp(logits))) over the whole vocabulary, accurate to `LSE_TOLERANCE`; NaN where it was
        not computed (`needs_lse`).
    asked_ids: [A] int32, ascending and distinct; the same for all rows.
    asked_logits: [R, A] float32.
    n_vocab: size of the vocabulary; 1 <= K <= n_vocab.
    """

    top_ids: Int32
    top_logits: Float32
    lse: Float64
    asked_ids: Int32
    asked_logits: Float32
    n_vocab: int

    def check(self) -> None:
        """Raise `WireError` unless everything above holds (the log-sum-exp's accuracy excepted)."""
        if self.top_ids.ndim != 2 or self.asked_ids.ndim != 1 or self.lse.ndim != 1:
            raise WireError("sparse rows: an array has the wrong number of dimensions")
        n_rows, k = self.top_ids.shape
        n_asked = len(self.asked_ids)
        if not (self.top_logits.shape == (n_rows, k) and self.lse.shape == (n_rows,)):
            raise WireError("sparse rows: top_ids, top_logits and lse differ in shape")
        if self.asked_logits.shape != (n_rows, n_asked):
            raise WireError("sparse rows: asked_ids and asked_logits differ in shape")
        if n_rows < 1 or not 1 <= k <= self.n_vocab:
            raise WireError(f"sparse rows: {n_rows} rows of {k} logits for a vocabulary of {self.n_vocab}")
        if not (np.isfinite(self.top_logits).all() and np.isfinite(self.asked_logits).all()):
            raise WireError("sparse rows: a logit is not finite")
        if self.top_ids.min() < 0 or self.top_ids.max() >= self.n_vocab:
            raise WireError("sparse rows: an id is outside the vocabulary")
        if k > 1:
            falls = self.top_logits[:, 1:] < self.top_logits[:, :-1]
            equal = self.top_logits[:, 1:] == self.top_logits[:, :-1]
            if not (falls | (equal & (self.top_ids[:, 1:] > self.top_ids[:, :-1]))).all():
                raise WireError("sparse rows: the leaders are not sorted by descending logit and ascending id")
        if not n_asked:
            return
        if self.asked_ids[0] < 0 or self.asked_ids[-1] >= self.n_vocab:
            raise WireError("sparse rows: an asked id is outside the vocabulary")
        if (np.diff(self.asked_ids) <= 0).any():
            raise WireError("sparse rows: asked ids are not ascending and distinct")


def needed_top_k(params: SamplingParams, configured: int = DEFAULT_TOP_K) -> int:
    """How many leading logits a row should carry so that the full row is seldom or never needed."""
    if params.greedy and not changes_logits(params):
        return 1
    wanted = 1 if params.greedy else params.top_k
    if not wanted:
        return configured
    # Each changed token can push at most one token out of the raw leaders.
    changed = len(params.logit_bias) + (params.repeat_last_n if params.penalized else 0)
    return min(configured, wanted + changed)


def needs_lse(params: SamplingParams, top_k: int, n_vocab: int) -> bool:
    """Whether rows of `top_k` logits should carry the log-sum-exp; without it nothing goes wrong, only slower."""
    return not params.greedy and needs_mass(params, n_vocab, top_k)


def asked_ids(params: SamplingParams, window_tokens: Tokens, proposals: Tokens) -> Int32:
    """The ids whose logits the sampler needs whatever their rank: [A] int32, ascending and distinct.

    Args:
        window_tokens: the sequence before row 0, or at least its last `repeat_last_n` tokens.
        proposals: the tokens to be verified.
    """
    parts = [np.array([token for token, _ in params.logit_bias], np.int32)] if params.logit_bias else []
    if params.penalized:
        parts += [np.asarray(window_tokens[-params.repeat_last_n :], np.int32), np.asarray(proposals, np.int32)]
    if params.acceptance == "rejection" and not params.greedy:
        parts.append(np.asarray(proposals, np.int32))
    return np.unique(np.concatenate(parts)) if parts else _NO_IDS


def sparse_rows(
    logits: Logits,
    top: tuple[Int32, Float32],
    lse: Float64 | None,
    first: int,
    count: int,
    top_k: int,
    asked: Int32,
) -> SparseRows:
    """The sparse rows of one session out of a forward pass.

    Args:
        top: `logits.top(k)` of the whole pass, k >= min(top_k, n_vocab).
        lse: `logits.log_sum_exp()` of the whole pass, or None.
        first, count: the session's rows in the pass.
        asked: `asked_ids` of the session.
    """
    rows = slice(first, first + count)
    asked_logits = np.empty((count, len(asked)), np.float32)
    if len(asked):
        for row in range(count):
            asked_logits[row] = logits.gather(first + row, asked)
    return SparseRows(
        top_ids=np.ascontiguousarray(top[0][rows, :top_k]),
        top_logits=np.ascontiguousarray(top[1][rows, :top_k]),
        lse=np.full(count, np.nan) if lse is None else lse[rows],
        asked_ids=asked,
        asked_logits=asked_logits,
        n_vocab=logits.n_vocab,
    )


def rank(params: SamplingParams, rows: SparseRows, changed: Changes | None) -> Ranked:
    """Rank the known tokens of sparse rows after bias and penalties.

    Args:
        changed: the changes of these rows; None where `changes_logits(params)` is false.

    Errors: `WireError` if a changed token was not asked for.
    """
    n_rows, k = rows.top_ids.shape
    n_vocab = rows.n_vocab
    top = rows.top_logits.astype(np.float64)
    if changed is None:
        bound = np.full(n_rows, -math.inf) if k == n_vocab else top[:, -1]
        mass = None
        if needs_mass(params, n_vocab, k):
            none = np.empty((n_rows, 0))
            unknown = np.full(n_rows, n_vocab - k)
            mass = mass_bounds(top, rows.lse, none, none, bound, unknown, LSE_TOLERANCE)
        return Ranked(rows.top_ids, top, np.full(n_rows, k), k, bound, mass, n_vocab)

    place = np.searchsorted(rows.asked_ids, changed.ids)
    if len(place) and (place[-1] >= len(rows.asked_ids) or not np.array_equal(rows.asked_ids[place], changed.ids)):
        raise WireError("sparse rows lack the logit of a token under bias or penalties", code="bad_rows")
    old = rows.asked_logits[:, place].astype(np.float64)
    new = adjust(params, old, changed.bias, changed.counts)
    bound = top[:, -1]
    last = rows.top_ids[:, -1:]
    if len(changed.ids):
        # A leader that is changed is known by its new score: its old entry stands for no token.
        nearest = np.minimum(np.searchsorted(changed.ids, rows.top_ids), len(changed.ids) - 1)
        twice = changed.ids[nearest] == rows.top_ids
    else:
        twice = np.zeros((n_rows, k), np.bool_)
    ids = np.concatenate(
        [np.where(twice, np.int32(n_vocab), rows.top_ids), np.broadcast_to(changed.ids, (n_rows, len(changed.ids)))],
        axis=1,
    )
    z = np.concatenate([np.where(twice, -math.inf, top), new], axis=1)
    order = np.lexsort((ids, -z), axis=-1)
    ids, z = np.take_along_axis(ids, order, axis=1), np.take_along_axis(z, order, axis=1)
    n_known = z.shape[1] - twice.sum(axis=1)
    # An unsent token comes after (bound, last) in rank order.
    certain = ((z > bound[:, None]) | ((z == bound[:, None]) & (ids <= last))).sum(axis=1)
    complete = n_known == n_vocab
    certain = np.where(complete, np.minimum(n_vocab, z.shape[1]), certain)
    bound = np.where(complete, -math.inf, bound)
    banned = z[:, 0] == -math.inf
    if banned.any():
        z[banned], certain[banned] = 0.0, 0
    least = int(certain.min())
    mass = None
    if needs_mass(params, n_vocab, least):
        mass = mass_bounds(z, rows.lse, old, new, bound, n_vocab - n_known, LSE_TOLERANCE)
    return Ranked(ids, z, certain, least, bound, mass, n_vocab)


@dataclass(frozen=True, slots=True)
class Choices:
    """The best surely kept token of each row, and what could still beat it.

    tokens: R token ids. scores: R float64 values of z + T * g. decided: whether nothing sent or unsent can beat it;
    unknown: whether only unsent tokens can.
    """

    tokens: list[int]
    scores: list[float]
    decided: list[bool]
    unknown: list[bool]


def choose_greedy(ranked: Ranked) -> Choices:
    """The highest-ranked token of each row."""
    decided: list[bool] = (ranked.certain > 0).tolist()
    n_rows = len(decided)
    return Choices(ranked.ids[:, 0].tolist(), ranked.z[:, 0].tolist(), decided, [False] * n_rows)


def choose_coupled(params: SamplingParams, ranked: Ranked, kept: Kept, position: int) -> Choices:
    """The largest z + T * g of each row's surely kept tokens; equal ones go to the higher rank.

    (The order of z + T * g is that of z / T + g, and does not overflow for a tiny T.)

    Args:
        position: of row 0's token; row j's is position + j.
    """
    certain_only = kept.possible is kept.sure
    width = int(kept.possible.sum(axis=1).max())
    n_rows = len(ranked.ids)
    if width == 1 and certain_only and not kept.unknown.any():
        return Choices(ranked.ids[:, 0].tolist(), ranked.z[:, 0].tolist(), [True] * n_rows, [False] * n_rows)
    width = max(width, 1)
    positions = np.arange(position, position + n_rows)[:, None]
    scores = gumbel(params.seed, positions, ranked.ids[:, :width], COUPLED)
    scores *= params.temperature
    scores += ranked.z[:, :width]
    sure = np.where(kept.sure[:, :width], scores, -math.inf)
    every = np.arange(n_rows)
    best = sure.argmax(axis=1)
    tokens: list[int] = ranked.ids[every, best].tolist()
    highest = sure[every, best]
    blocked = highest == -math.inf
    if not certain_only:
        doubtful = kept.possible[:, :width] & ~kept.sure[:, :width]
        blocked |= np.where(doubtful, scores, -math.inf).max(axis=1) >= highest
    beaten = kept.unknown & (ranked.bound + params.temperature * GUMBEL_MAX >= highest)
    decided: list[bool] = (~(blocked | beaten)).tolist()
    unknown: list[bool] = (beaten & ~blocked).tolist()
    return Choices(tokens, highest.tolist(), decided, unknown)


def unsent_loses(params: SamplingParams, ranked: Ranked, row: int, position: int, score: float) -> bool:
    """Whether the actual noise of the unsent tokens proves that none of them reaches `score` in one row."""
    words: UInt32 = words_of_all(params.seed, position, ranked.n_vocab, COUPLED)
    known = ranked.ids[row]
    words[known[known < ranked.n_vocab]] = 0
    highest = float(gumbel_of_words(words.max(keepdims=True))[0])
    return float(ranked.bound[row]) + params.temperature * highest < score


def settled_candidates(ranked: Ranked, kept: Kept, row: int) -> Candidates | None:
    """Exactly what the filters keep of one row, or None if that cannot be told from what is known."""
    sure: Bool = kept.sure[row]
    n = int(np.count_nonzero(sure))
    if kept.unknown[row] or n == 0 or int(np.count_nonzero(kept.possible[row])) != n:
        return None
    return Candidates(ranked.ids[row, :n], ranked.z[row, :n], True)


def choose_from_row(params: SamplingParams, row: Float32, changed: Changes | None, at: int, position: int) -> int:
    """The greedy or coupled token of one whole row: the truth that `choose_greedy` and `choose_coupled` prove.

    Args:
        row: [n_vocab] float32. changed, at: see `filters.candidates`. position: of the row's token.
    """
    return pick(params, candidates(params, row, changed, at), position, len(row))


def pick(params: SamplingParams, kept: Candidates, position: int, n_vocab: int) -> int:
    """The largest z + T * g (COUPLED noise) of one row's kept tokens; equal ones go to the higher rank."""
    if len(kept.ids) == 1:
        return int(kept.ids[0])
    ids, scores = _noisy(params, kept, position, n_vocab, 0.0)
    return int(ids[scores.argmax()])


def pick_surely(params: SamplingParams, kept: Candidates, position: int, n_vocab: int) -> tuple[int, float]:
    """`pick`, and the winner's share, in (0, 1], in the softmax of z / T + g, which all kept tokens are in.

    It tells how narrowly the token has won: others that share the noise, but see slightly other logits, pick the same
    one the more often the larger it is. That knows more than the token's probability, which leaves the noise out.
    """
    if len(kept.ids) == 1:
        return int(kept.ids[0]), 1.0
    ids, scores = _noisy(params, kept, position, n_vocab, _SHARE_SLACK)
    best = int(scores.argmax())
    with np.errstate(over="ignore"):  # at a tiny T the others are infinitely far behind
        behind = (scores - scores[best]) / params.temperature
    return int(ids[best]), 1.0 / float(np.exp(behind).sum())


def _noisy(
    params: SamplingParams, kept: Candidates, position: int, n_vocab: int, slack: float
) -> tuple[Int32, Float64]:
    """ids and z + T * g of kept tokens in the order of their rank; of a whole unfiltered row only of those that may
    win, or come as near to it as slack * T, which spares the others the noise's logarithms."""
    ids, z, temperature = kept.ids, kept.z, params.temperature
    if kept.ranked:
        scores = gumbel(params.seed, position, ids, COUPLED)
    else:
        words = words_of_all(params.seed, position, n_vocab, COUPLED)
        favourite = int(z.argmax())
        floor = float(z[favourite] + temperature * float(gumbel_of_words(words[favourite : favourite + 1])[0]))
        luckiest = temperature * (float(gumbel_of_words(words.max(keepdims=True))[0]) + slack)
        ids = np.flatnonzero(z + luckiest >= floor).astype(np.int32)
        ids = ids[np.argsort(-z[ids], kind="stable")]
        z = z[ids]
        scores = gumbel_of_words(words[ids])
    scores *= temperature
    scores += z
    return ids, scores
