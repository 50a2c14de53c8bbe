"""Which tokens a request's filters keep, given logits: the same code for the draft's and the target's rows.

Order and meaning as in llama.cpp: logit_bias, penalties, top_k, top_p, min_p, and the temperature last. All
arithmetic on logits is float64. Terms: a token's *score* z is its logit after bias and penalties; tokens are *ranked*
by descending score, ties by ascending id; the filters keep a prefix of that ranking.

Invariant: a decision is a function of the whole row alone. `keep` works on the known head of a ranking and tells the
tokens that are kept for certain from those that may be; whenever the two agree, the same arithmetic on the same
operands in the same order has been done as with the whole row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.engine.dense import top_ids
from shared.engine.interface import Float32, Int32
from shared.errors import RequestError
from shared.sampling.params import SamplingParams

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Tokens = Sequence[int] | Int32
"""Token ids in order: a list, a tuple or an int32 array."""

_ROUNDING = 1e-9
"""Relative margin on sums of probabilities, far above the rounding of a float64 sum over any vocabulary."""
_HEADS = (512, 16384)
"""How many leaders of a whole row are tried before all of it is ranked, when only top_p limits them."""


def changes_logits(params: SamplingParams) -> bool:
    """Whether bias or penalties can change any logit."""
    return bool(params.logit_bias) or params.penalized


def active_top_k(params: SamplingParams, n_vocab: int) -> int:
    """top_k where it limits anything, else 0."""
    return params.top_k if params.top_k < n_vocab else 0


@dataclass(frozen=True, slots=True)
class Changes:
    """What bias and penalties do to R consecutive rows.

    ids: [M] int32, ascending and distinct: every token that they may change in some row.
    bias: [M] float64, 0 where there is none.
    counts: [R, M] int64, occurrences in each row's penalty window.
    """

    ids: Int32
    bias: Float64
    counts: Int64


def changes(params: SamplingParams, history: Tokens, proposals: Tokens, n_vocab: int) -> Changes:
    """The changes of len(proposals) + 1 rows, row j being conditional on history + proposals[:j].

    Args:
        history: the sequence before row 0, or at least its last `repeat_last_n` tokens.

    Errors: `RequestError` for a bias that is NaN or +inf, or one whose token is not in the vocabulary.
    """
    n_rows = len(proposals) + 1
    bias = dict(params.logit_bias)
    for token, value in bias.items():
        if not value < math.inf:
            raise RequestError(
                f"logit_bias of token {token} is {value}", "give a finite bias, or -inf to ban the token"
            )
        if not 0 <= token < n_vocab:
            raise RequestError(f"logit_bias names token {token}, outside the vocabulary of {n_vocab}")
    size = params.repeat_last_n if params.penalized else 0
    before = np.asarray(history[-size:] if size else (), np.int64)
    window = np.concatenate([before, np.asarray(proposals, np.int64)]) if size else before
    changed = np.unique(np.concatenate([np.fromiter(bias, np.int64, len(bias)), window]))
    added = np.array([bias.get(token, 0.0) for token in changed.tolist()], np.float64)
    counts = np.zeros((n_rows, len(changed)), np.int64)
    if size:
        index = np.searchsorted(changed, window)
        for row in range(n_rows):
            end = len(before) + row
            counts[row] = np.bincount(index[max(0, end - size) : end], minlength=len(changed))
    return Changes(changed.astype(np.int32), added, counts)


def adjust(params: SamplingParams, logits: Float64, bias: Float64, counts: Int64) -> Float64:
    """Scores of logits: bias first, then llama.cpp's penalties; all of one shape, or broadcasting to it."""
    z = logits + bias
    if not params.penalized:
        return z
    penalized = np.where(z <= 0, z * params.repeat_penalty, z / params.repeat_penalty)
    penalized -= counts * params.frequency_penalty
    penalized -= params.presence_penalty
    return np.where(counts > 0, penalized, z)


@dataclass(frozen=True, slots=True)
class Ranked:
    """The known tokens of R rows after bias and penalties, in rank order.

    ids: [R, C] int32.
    z: [R, C] float64 scores, descending, equal ones by ascending id. An entry that stands for no token has -inf.
    certain: [R] int64: the first `certain` entries are the row's true leaders; no unknown token outranks them.
    least_certain: the smallest of `certain`.
    bound: [R] float64: no unknown token's score is larger; -inf where every token is known.
    mass: bounds ([R], [R]) of sum(exp(z - z[:, 0])) over the whole vocabulary, or None where `keep` needs none.
    n_vocab: size of the vocabulary.
    """

    ids: Int32
    z: Float64
    certain: Int64
    least_certain: int
    bound: Float64
    mass: tuple[Float64, Float64] | None
    n_vocab: int


@dataclass(frozen=True, slots=True)
class Kept:
    """What the filters keep of `Ranked` rows, as far as can be told; both masks are prefixes of the ranking.

    sure: [R, W] bool, W <= C: kept for certain.
    possible: [R, W] bool: kept for certain or perhaps; no entry beyond W is kept. The same object as `sure` where
        nothing is in doubt in any row.
    unknown: [R] bool: an unknown token may be kept.
    """

    sure: Bool
    possible: Bool
    unknown: Bool


def needs_mass(params: SamplingParams, n_vocab: int, least_certain: int) -> bool:
    """Whether `keep` needs bounds of the whole vocabulary's mass."""
    top_k = active_top_k(params, n_vocab)
    return params.top_p < 1.0 and not 0 < top_k <= least_certain


def keep(params: SamplingParams, ranked: Ranked) -> Kept:
    """Apply top_k, top_p and min_p to the known head of R rankings.

    top_p keeps the shortest prefix whose probability reaches it, at least one token, among what top_k kept; min_p
    keeps tokens at least that probable relative to the most probable one.
    """
    top_k = active_top_k(params, ranked.n_vocab)
    z = ranked.z[:, :top_k] if top_k else ranked.z
    n_rows, width = z.shape
    if 0 < top_k <= ranked.least_certain:
        sure = np.ones((n_rows, width), np.bool_)
        if params.top_p < 1.0:
            mass = np.exp(z - z[:, :1]).cumsum(axis=1)
            np.less(mass[:, :-1], params.top_p * mass[:, -1:], out=sure[:, 1:])
        if params.min_p > 0.0:
            sure &= z >= z[:, :1] + math.log(params.min_p)
        return Kept(sure, sure, np.zeros(n_rows, np.bool_))

    certain = ranked.certain
    ranks = np.arange(width)
    known_rank: Bool = ranks < certain[:, None]
    possible: Bool = np.ones((n_rows, width), np.bool_)
    if top_k:
        sure, unknown = known_rank.copy(), certain < top_k
    else:
        sure, unknown = possible.copy(), ranked.bound > -math.inf
    if params.top_p < 1.0 and ranked.mass is not None:
        weights = np.exp(z - z[:, :1])
        mass = weights.cumsum(axis=1)
        mass_of_certain = np.where(certain > 0, mass[np.arange(n_rows), np.minimum(certain, width) - 1], 0.0)
        low, high = ranked.mass
        if top_k:
            complete = certain >= top_k
            low, high = mass_of_certain, np.where(complete, mass_of_certain, high)
        before = np.zeros((n_rows, width))
        before[:, 1:] = mass[:, :-1]
        first = ranks == 0
        sure &= known_rank & ((before < params.top_p * low[:, None]) | first)
        possible &= (before < params.top_p * high[:, None]) | first
        unknown = unknown & (mass_of_certain < params.top_p * high)
    if params.min_p > 0.0:
        threshold = z[:, :1] + math.log(params.min_p)
        probable = z >= threshold
        sure &= probable
        possible &= probable
        unknown = unknown & (ranked.bound >= threshold[:, 0])
    unsettled = certain == 0
    if unsettled.any():
        sure[unsettled] = False
        unknown = unknown | unsettled
    return Kept(sure, possible, unknown)


def mass_bounds(
    z: Float64, lse: Float64, old: Float64, new: Float64, bound: Float64, n_unknown: Int64, tolerance: float
) -> tuple[Float64, Float64]:
    """Bounds of sum(exp(z - z[:, 0])) over the whole vocabulary for R rows.

    Args:
        z: [R, C] scores of the known tokens, as in `Ranked`.
        lse: [R] log-sum-exp of the raw logits, or NaN where it was not computed.
        old, new: [R, M] logits of the changed tokens before, and scores after, bias and penalties.
        bound: [R] an upper bound of the unknown tokens' scores.
        n_unknown: [R] how many unknown tokens there are.
        tolerance: absolute error that `lse` may have.
    """
    peak = z[:, :1]
    safe = np.where(peak > -math.inf, peak, 0.0)
    known = np.exp(z - safe).sum(axis=1)
    low, high = known, known + n_unknown * np.exp(np.minimum(bound - safe[:, 0], 600.0))
    exponent = lse - safe[:, 0]
    # Where a ban or penalty took away a token that outweighs all others by e**300, the sum has no digit left.
    usable = exponent < 300.0
    if usable.any():
        raw = np.exp(np.where(usable, exponent, 0.0))
        lost = np.exp(np.minimum(old - safe, 300.0)).sum(axis=1)
        gained = np.exp(new - safe).sum(axis=1)
        error = raw * tolerance + (raw + lost + gained) * _ROUNDING
        estimate = raw - lost + gained
        low = np.where(usable, np.maximum(low, estimate - error), low)
        high = np.where(usable, np.minimum(high, estimate + error), high)
    return low * (1.0 - _ROUNDING), high * (1.0 + _ROUNDING)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Exactly the tokens that the filters keep in one row.

    ids: [n] int32. z: [n] float64 scores, at least one above -inf. ranked: whether they are in rank order; else by id.
    """

    ids: Int32
    z: Float64
    ranked: bool


def scores_of_row(row: Float32, params: SamplingParams, changed: Changes, at: int) -> Float64:
    """The scores of one whole row: [n_vocab] float64; `at` is the row's index in `changed.counts`."""
    z = row.astype(np.float64)
    z[changed.ids] = adjust(params, z[changed.ids], changed.bias, changed.counts[at])
    return z


def candidates(params: SamplingParams, row: Float32, changed: Changes | None, at: int) -> Candidates:
    """Apply the filters to one whole row; for greedy, the one best token.

    Args:
        row: [n_vocab] float32 logits.
        changed: None where `changes_logits(params)` is false; `at` is the row's index in it.

    Errors: `RequestError` if every token is banned.
    """
    n_vocab = len(row)
    top_k = active_top_k(params, n_vocab)
    if params.greedy:
        top_k = 1
    if top_k:
        # At most len(changed.ids) tokens can have lost their place among the raw leaders.
        ids = top_ids(row, min(top_k + (len(changed.ids) if changed else 0), n_vocab))
        if changed is None:
            z = row[ids].astype(np.float64)
        else:
            ids = np.union1d(ids, changed.ids)
            z = row[ids].astype(np.float64)
            place = np.searchsorted(ids, changed.ids)
            z[place] = adjust(params, z[place], changed.bias, changed.counts[at])
            ids, z = _rank(ids, z, top_k)
        _refuse_if_banned(z[0])
        if params.greedy:
            return Candidates(ids, z, True)
        certain = np.array([top_k])
        kept = keep(params, Ranked(ids[None], z[None], certain, top_k, z[-1:], None, n_vocab))
        n = int(np.count_nonzero(kept.sure))
        return Candidates(ids[:n], z[:n], True)

    z = row.astype(np.float64) if changed is None else scores_of_row(row, params, changed, at)
    peak = float(z.max())
    _refuse_if_banned(peak)
    ids = np.arange(n_vocab, dtype=np.int32)
    if params.min_p > 0.0:
        ids = np.flatnonzero(z >= peak + math.log(params.min_p)).astype(np.int32)
    if params.top_p >= 1.0:
        return Candidates(*_rank(ids, z[ids], len(ids)), True) if params.min_p > 0.0 else Candidates(ids, z, False)
    reach = params.top_p * float(np.exp(z - peak).sum())
    pool = z[ids]
    for size in _HEADS:
        if len(ids) <= size:
            break
        head = pool >= np.partition(pool, len(pool) - size)[len(pool) - size]
        if float(np.exp(pool[head] - peak).sum()) * (1.0 - _ROUNDING) > reach:
            ids, pool = ids[head], pool[head]
            break
    ids, pool = _rank(ids, pool, len(ids))
    mass = np.exp(pool - peak).cumsum()
    n = 1 + int(np.searchsorted(mass[:-1], reach))
    return Candidates(ids[:n], pool[:n], True)


def _rank(ids: Int32, z: Float64, limit: int) -> tuple[Int32, Float64]:
    """The `limit` leaders of tokens in ascending order of id, in rank order."""
    order = np.argsort(-z, kind="stable")[:limit]
    return ids[order].astype(np.int32, copy=False), z[order]


def _refuse_if_banned(best: float) -> None:
    if not best > -math.inf:
        raise RequestError("logit_bias bans every token", "leave at least one token that can be chosen")
