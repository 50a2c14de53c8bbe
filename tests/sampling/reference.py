"""Sampling written as plainly as possible, over whole rows, in loops: what the tests compare the fast code with."""

from __future__ import annotations

import math

import numpy as np

from shared.engine.dense import DenseLogits
from shared.sampling import noise
from shared.sampling.acceptance import Decision, NeedsRows, decide
from shared.sampling.rows import SparseRows, asked_ids, sparse_rows

EDGE = 1e-9


def scores(params, logits, window):
    """Logits after bias and penalties; `window` is the whole sequence before the position."""
    z = [float(x) for x in logits]
    for token, bias in params.logit_bias:
        z[token] += bias
    recent = list(window)[-params.repeat_last_n :] if params.repeat_last_n else []
    for token in set(recent):
        count = recent.count(token)
        z[token] = z[token] * params.repeat_penalty if z[token] <= 0 else z[token] / params.repeat_penalty
        z[token] -= count * params.frequency_penalty + params.presence_penalty
    return z


def kept(params, logits, window):
    """(kept ids in rank order, scores, whether a threshold was met so narrowly that rounding decides)."""
    z = scores(params, logits, window)
    ids = sorted(range(len(z)), key=lambda i: (-z[i], i))
    peak = z[ids[0]]
    narrow = False
    if params.temperature == 0:
        return ids[:1], z, narrow
    if 0 < params.top_k < len(z):
        ids = ids[: params.top_k]
    if params.top_p < 1:
        weights = [math.exp(z[i] - peak) for i in ids]
        reach = params.top_p * math.fsum(weights)
        n, mass = 1, weights[0]
        narrow |= abs(mass - reach) < EDGE
        while n < len(ids) and mass < reach:
            mass += weights[n]
            n += 1
            narrow |= abs(mass - reach) < EDGE
        ids = ids[:n]
    if params.min_p > 0:
        margins = [z[i] - peak - math.log(params.min_p) for i in ids]
        narrow |= any(abs(m) < EDGE for m in margins)
        ids = [i for i, m in zip(ids, margins, strict=True) if m >= 0]
    return ids, z, narrow


def distribution(params, logits, window):
    """The target distribution over the vocabulary, T > 0: [n_vocab] float64."""
    ids, z, _ = kept(params, logits, window)
    p = np.zeros(len(z))
    for i in ids:
        p[i] = math.exp((z[i] - z[ids[0]]) / params.temperature)
    return p / p.sum()


def coupled_token(params, logits, window, position):
    """(the greedy or coupled token, whether rounding decides)."""
    ids, z, narrow = kept(params, logits, window)
    if params.temperature == 0:
        return ids[0], False
    g = noise.gumbel_of_all(params.seed, position, len(z), noise.COUPLED)
    value = {i: z[i] + params.temperature * float(g[i]) for i in ids}
    best = sorted(ids, key=lambda i: -value[i])
    if len(best) > 1 and value[best[0]] - value[best[1]] < EDGE:
        narrow = True
    return best[0], narrow


def rejection(params, logits, window, position, proposal, q):
    """(accepted, token if not, whether rounding decides); q: {id: probability} or None for the bonus token."""
    p = distribution(params, logits, window)
    narrow = kept(params, logits, window)[2]
    weights = p
    if q is not None:
        total = math.fsum(q.values())
        u = noise.uniform(params.seed, position, noise.ACCEPT)
        narrow |= abs(u * q[proposal] / total - p[proposal]) < EDGE
        if u * q[proposal] / total < p[proposal]:
            return True, -1, narrow
        weights = np.array([max(p[i] - q.get(i, 0.0) / total, 0.0) for i in range(len(p))])
        narrow |= bool(((weights > 0) & (weights < EDGE)).any())
    g = noise.gumbel_of_all(params.seed, position, len(p), noise.RESIDUAL)
    value = [math.log(w) + float(x) if w > 0 else -math.inf for w, x in zip(weights, g, strict=True)]
    best = sorted(range(len(p)), key=lambda i: -value[i])
    narrow |= value[best[0]] - value[best[1]] < EDGE
    return False, best[0], narrow


def make_rows(params, logits, history, proposals, top_k) -> SparseRows:
    """The sparse rows that a verifier would send of [R, n_vocab] logits."""
    dense = DenseLogits(logits)
    k = min(top_k, dense.n_vocab)
    return sparse_rows(
        dense, dense.top(k), dense.log_sum_exp(), 0, dense.n_rows, k, asked_ids(params, history, proposals)
    )


def decide_with_fallback(params, history, proposals, logits, top_k, distributions=()) -> tuple[Decision, int]:
    """The decision as a sampler reaches it, and how many whole rows it asked for."""
    rows = make_rows(params, logits, history, proposals, top_k)
    rows.check()
    dense = {}
    while True:
        answer = decide(params, history, proposals, rows, dense, distributions)
        if not isinstance(answer, NeedsRows):
            return answer, len(dense)
        for row in answer.rows:
            assert row not in dense, "a row was asked for twice"
            dense[row] = logits[row]
