"""A draft's next proposal, chosen as the target would choose.

Invariant: in coupled and greedy drafting, equal logits give the token that `acceptance.decide` gives; in rejection
drafting the proposal is sampled from exactly the sparse float32 distribution that goes on the wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from shared.engine.dense import log_sum_exp
from shared.engine.interface import Float32, Int32
from shared.sampling.acceptance import probabilities, sample
from shared.sampling.filters import Candidates, Float64, Tokens, candidates, changes, changes_logits, scores_of_row
from shared.sampling.noise import DRAFT
from shared.sampling.params import SamplingParams
from shared.sampling.rows import pick_surely

DEFAULT_DISTRIBUTION_SIZE: Final = 64
"""Most tokens of a proposal's distribution on the wire."""


@dataclass(frozen=True, slots=True)
class DraftToken:
    """One proposed token.

    confidence: how sure the draft is that the target says the same, in (0, 1]. Under coupled sampling the token's
        share in the softmax of what it was chosen by, noise included (`pick_surely`); else its own probability of it:
        filtered and tempered, for greedy unfiltered at T = 1.
    q_ids, q_probs: [k] int32, [k] float32: what it was sampled from, in rejection drafting; empty otherwise.
    """

    token: int
    confidence: float
    q_ids: Int32
    q_probs: Float32


_NO_IDS: Final = np.empty(0, np.int32)
_NO_PROBS: Final = np.empty(0, np.float32)


def draft(
    params: SamplingParams,
    row: Float32,
    history: Tokens,
    position: int,
    distribution_size: int = DEFAULT_DISTRIBUTION_SIZE,
) -> DraftToken:
    """Propose the token at `position`.

    Args:
        row: [n_vocab] float32, the draft model's logits after `history`.
        history: the sequence so far, the draft's own proposals included, or at least its last `repeat_last_n` tokens.
        position: of the token to propose: the whole sequence's length.
        distribution_size: the most tokens that rejection drafting keeps.

    Errors: `RequestError` if every token is banned.
    """
    changed = changes(params, history, (), len(row)) if changes_logits(params) else None
    if params.greedy:
        if changed is None:
            token = int(row.argmax())
            return DraftToken(token, float(np.exp(float(row[token]) - log_sum_exp(row))), _NO_IDS, _NO_PROBS)
        token = int(candidates(params, row, changed, 0).ids[0])
        z = scores_of_row(row, params, changed, 0)
        return DraftToken(token, 1.0 / float(np.exp(z - z[token]).sum()), _NO_IDS, _NO_PROBS)
    kept = candidates(params, row, changed, 0)
    if params.acceptance == "coupled":
        return DraftToken(*pick_surely(params, kept, position, len(row)), _NO_IDS, _NO_PROBS)
    q_ids, q_probs = sparsify(kept, probabilities(params, kept), distribution_size)
    token = sample(q_ids, q_probs.astype(np.float64), params.seed, position, DRAFT)
    return DraftToken(token, float(q_probs[q_ids == token][0]), q_ids, q_probs)


def sparsify(kept: Candidates, probs: Float64, size: int) -> tuple[Int32, Float32]:
    """The `size` most probable tokens, renormalised in float32, without those whose float32 probability is 0.

    Returns: ids [k] int32 and probabilities [k] float32, 1 <= k <= size.
    """
    ids = kept.ids
    if len(ids) > size:
        if kept.ranked:
            ids, probs = ids[:size], probs[:size]
        else:
            leaders = np.argpartition(probs, len(probs) - size)[-size:]
            ids, probs = ids[leaders], probs[leaders]
    out = (probs / probs.sum()).astype(np.float32)
    positive = out > 0
    if not positive.all():
        ids, out = ids[positive], out[positive]
    return ids, out
