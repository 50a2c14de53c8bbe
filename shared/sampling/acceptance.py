"""From target rows to the accepted run and the next token: the coupled, the rejection and the greedy rule.

* **coupled**: the target's token is the argmax of z / T + g over what the filters keep, with noise g that the draft
  shares; a proposal is accepted iff it equals that token. The committed text is the target's own sample path, the same
  for any proposals (Daliri, Musco, Suresh 2024, "Coupling without communication and drafter-invariant speculative
  decoding": acceptance of at least (1 - TV) / (1 + TV)).
* **rejection**: accept proposal x with probability min(1, p(x) / q(x)), else sample from max(p - q, 0) normalised
  (Leviathan, Kalman, Matias 2023; Chen et al. 2023). Noise streams of draft and target are separate.
* **greedy**: T = 0 of the coupled rule, whichever is asked for.

Glossary: the *recovered* token replaces the first refused proposal; the *bonus* token follows a fully accepted run.

Invariant: the committed tokens are distributed as the target's filtered distribution, exactly; and whether a row was
decided from its sparse or its whole form changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from shared.engine.interface import Float32, Int32
from shared.errors import WireError
from shared.sampling.filters import Candidates, Float64, Tokens, candidates, changes, changes_logits, keep
from shared.sampling.noise import ACCEPT, RESIDUAL, gumbel, uniform
from shared.sampling.params import SamplingParams
from shared.sampling.rows import (
    SparseRows,
    choose_coupled,
    choose_from_row,
    choose_greedy,
    rank,
    settled_candidates,
    unsent_loses,
)

SMALLEST_TEMPERATURE: Final = 1e-30
"""Where probabilities (not coupled scores) divide by the temperature: smaller ones count as this, against overflow."""
_SUM_TOLERANCE: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Decision:
    """n_accepted proposals are committed, then `token` (the recovered or the bonus token)."""

    n_accepted: int
    token: int


@dataclass(frozen=True, slots=True)
class NeedsRows:
    """The sparse form of these rows (indexes, as in `SparseRows`) proves nothing: ask for the whole rows, and again."""

    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProposalDistribution:
    """What a proposal was sampled from, in rejection sampling.

    ids: [k] int32, distinct. probs: [k] float32, positive, summing to 1 but for rounding. A deterministic drafter's is
    one-hot.
    """

    ids: Int32
    probs: Float32

    @classmethod
    def one_hot(cls, token: int) -> ProposalDistribution:
        """The distribution of a proposal made without chance."""
        return cls(np.array([token], np.int32), np.ones(1, np.float32))

    def check(self, token: int) -> None:
        """Raise `WireError` unless this is a distribution from which `token` can have been sampled."""
        if self.ids.ndim != 1 or self.ids.shape != self.probs.shape or not len(self.ids):
            raise WireError("proposal distribution: ids and probabilities must be two equally long lists")
        total = float(self.probs.sum(dtype=np.float64))
        if not (np.isfinite(self.probs).all() and float(self.probs.min()) > 0 and abs(total - 1) <= _SUM_TOLERANCE):
            raise WireError("proposal distribution: probabilities must be positive and sum to 1")
        if len(set(self.ids.tolist())) != len(self.ids):
            raise WireError("proposal distribution: a token appears twice")
        if not (self.ids == token).any():
            raise WireError(f"proposal distribution: it cannot have given token {token}")


_NO_ROWS: Final[Mapping[int, Float32]] = MappingProxyType({})


def decide(
    params: SamplingParams,
    history: Tokens,
    proposals: Tokens,
    rows: SparseRows,
    dense_rows: Mapping[int, Float32] = _NO_ROWS,
    proposal_distributions: Sequence[ProposalDistribution] = (),
) -> Decision | NeedsRows:
    """How many proposals are accepted, and the token after them.

    Args:
        history: the whole sequence, prompt and committed tokens; row 0 predicts position len(history).
        proposals: n >= 0 tokens to verify, for positions len(history) and up.
        rows: n + 1 rows; row j is conditional on history + proposals[:j].
        dense_rows: whole rows [n_vocab] float32 by row index, as far as an earlier answer asked for them.
        proposal_distributions: for rejection at T > 0, one for each proposal; ignored otherwise.

    Rows after the first refusal are not judged. Returns `NeedsRows` for a row that is reached, not in `dense_rows`
    and not provable. Errors: `WireError` for rows or distributions that do not fit; `RequestError` if every token is
    banned.
    """
    proposed: list[int] = proposals.tolist() if isinstance(proposals, np.ndarray) else list(proposals)
    if len(rows.top_ids) != len(proposed) + 1:
        raise WireError(f"{len(rows.top_ids)} rows of logits for {len(proposed)} proposals, one more is needed")
    if params.greedy:
        if not changes_logits(params):
            return _accept_equal(rows.top_ids[:, 0].tolist(), proposed)
        return _decide_by_equality(params, history, proposed, rows, dense_rows)
    if params.acceptance == "coupled":
        return _decide_by_equality(params, history, proposed, rows, dense_rows)
    if len(proposal_distributions) != len(proposed):
        raise WireError(f"{len(proposal_distributions)} proposal distributions for {len(proposed)} proposals")
    return _decide_by_rejection(params, history, proposed, rows, dense_rows, proposal_distributions)


def _accept_equal(targets: list[int], proposed: list[int]) -> Decision:
    """The accepted run, given the target's token at every position."""
    for n, proposal in enumerate(proposed):
        if targets[n] != proposal:
            return Decision(n, targets[n])
    return Decision(len(proposed), targets[-1])


def _decide_by_equality(
    params: SamplingParams,
    history: Tokens,
    proposed: list[int],
    rows: SparseRows,
    dense_rows: Mapping[int, Float32],
) -> Decision | NeedsRows:
    position = len(history)
    changed = changes(params, history, proposed, rows.n_vocab) if changes_logits(params) else None
    ranked = rank(params, rows, changed)
    choices = choose_greedy(ranked) if params.greedy else choose_coupled(params, ranked, keep(params, ranked), position)
    for j, token in enumerate(choices.tokens):
        if not choices.decided[j]:
            row = dense_rows.get(j)
            if row is not None:
                token = choose_from_row(params, row, changed, j, position + j)
            elif not (choices.unknown[j] and unsent_loses(params, ranked, j, position + j, choices.scores[j])):
                return NeedsRows((j,))
        if j == len(proposed) or not accept_coupled(proposed[j], token):
            return Decision(j, token)
    raise AssertionError("unreachable: the last row always decides")


def accept_coupled(proposal: int, token: int) -> bool:
    """The coupled and the greedy rule: a proposal stands iff it is the target's own token."""
    return proposal == token


def _decide_by_rejection(
    params: SamplingParams,
    history: Tokens,
    proposed: list[int],
    rows: SparseRows,
    dense_rows: Mapping[int, Float32],
    distributions: Sequence[ProposalDistribution],
) -> Decision | NeedsRows:
    position = len(history)
    changed = changes(params, history, proposed, rows.n_vocab) if changes_logits(params) else None
    ranked = rank(params, rows, changed)
    kept = keep(params, ranked)
    unfiltered = params.top_p >= 1.0 and params.min_p <= 0.0 and not 0 < params.top_k < rows.n_vocab
    for j in range(len(proposed) + 1):
        # Unfiltered probabilities need the sum over the whole row, in one order: that of the whole row.
        target = None if unfiltered else settled_candidates(ranked, kept, j)
        if target is None:
            row = dense_rows.get(j)
            if row is None:
                return NeedsRows((j,))
            target = candidates(params, row, changed, j)
        p = probabilities(params, target)
        at = position + j
        if j == len(proposed):
            return Decision(j, sample(target.ids, p, params.seed, at, RESIDUAL))
        distribution = distributions[j]
        distribution.check(proposed[j])
        q = distribution.probs.astype(np.float64)
        q /= q.sum()
        p_proposed = float(p[target.ids == proposed[j]].sum())
        q_proposed = float(q[distribution.ids == proposed[j]][0])
        if not accept_rejection(uniform(params.seed, at, ACCEPT), p_proposed, q_proposed):
            left = residual(target, p, distribution.ids, q)
            return Decision(j, sample(target.ids, left, params.seed, at, RESIDUAL))
    raise AssertionError("unreachable: the last row always decides")


def accept_rejection(u: float, p: float, q: float) -> bool:
    """The rejection rule: u < p / q, for a uniform u in (0, 1)."""
    return u * q < p


def residual(target: Candidates, p: Float64, q_ids: Int32, q: Float64) -> Float64:
    """max(p - q, 0), not normalised, for the target's kept tokens: [n] float64; p itself if that is zero everywhere.

    (It is zero everywhere only if p = q, when nothing is refused but by rounding.)
    """
    order = np.argsort(q_ids)
    sorted_ids = q_ids[order]
    nearest = np.minimum(np.searchsorted(sorted_ids, target.ids), len(sorted_ids) - 1)
    common = np.where(sorted_ids[nearest] == target.ids, q[order][nearest], 0.0)
    left: Float64 = np.maximum(p - common, 0.0)
    return left if left.any() else p


def probabilities(params: SamplingParams, kept: Candidates) -> Float64:
    """The tempered distribution over one row's kept tokens, T > 0: [n] float64, summing to 1."""
    peak = kept.z[0] if kept.ranked else kept.z.max()
    p: Float64 = np.exp((kept.z - peak) * (1.0 / max(params.temperature, SMALLEST_TEMPERATURE)))
    p /= p.sum()
    return p


def sample(ids: Int32, weights: Float64, seed: int, position: int, stream: int) -> int:
    """One token with probability proportional to its weight, by the Gumbel-max trick; not all weights are 0."""
    chosen = weights > 0.0
    if not chosen.all():
        ids, weights = ids[chosen], weights[chosen]
    if len(ids) == 1:
        return int(ids[0])
    scores = np.log(weights)
    scores += gumbel(seed, position, ids, stream)
    return int(ids[scores.argmax()])
