"""What the sampler knows of a session, and its verdict on a step's rows. Pure.

The verifier's prefix is the authority: a question about an earlier position than this session's end is answered from
there, so that asking twice gives the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shared.engine.interface import Float32, Int32
from shared.errors import WireError
from shared.messages import FinishReason, OpenSampling, VerdictItem, Verify, VerifyItem
from shared.prefix import TokenPrefix
from shared.sampling.acceptance import Decision, NeedsRows, ProposalDistribution, decide
from shared.sampling.rows import SparseRows


@dataclass(frozen=True, slots=True)
class Question:
    """One session's part of a `Verify`, cut out of its arrays. first_row: index of its row 0 in the whole step."""

    item: VerifyItem
    rows: SparseRows
    distributions: tuple[ProposalDistribution, ...]
    first_row: int


def questions(verify: Verify, n_vocab: Mapping[int, int]) -> list[Question]:
    """Cut a step into its sessions' parts.

    Args:
        n_vocab: by session; a session that is not there gets 0, and no check of its ids.

    Raises:
        WireError: the arrays do not add up to the items.
    """
    n_rows = sum(len(item.tokens) + 1 for item in verify.items)
    if not (len(verify.top_ids) == len(verify.top_logits) == len(verify.lse) == n_rows):
        raise WireError(f"Verify: {n_rows} rows expected, got {len(verify.top_ids)}")
    if verify.top_ids.shape != verify.top_logits.shape:
        raise WireError("Verify: top_ids and top_logits differ in shape")
    out: list[Question] = []
    row = asked = asked_logits = q = 0
    for item in verify.items:
        count = len(item.tokens) + 1
        ids: Int32 = verify.asked_ids[asked : asked + item.n_asked]
        logits: Float32 = verify.asked_logits[asked_logits : asked_logits + count * item.n_asked]
        if len(ids) != item.n_asked or len(logits) != count * item.n_asked:
            raise WireError("Verify: fewer asked logits than the items declare")
        if item.q_counts and len(item.q_counts) != len(item.tokens):
            raise WireError("Verify: q_counts must have an entry for each token")
        distributions = []
        for n in item.q_counts:
            distributions.append(ProposalDistribution(verify.q_ids[q : q + n], verify.q_probs[q : q + n]))
            q += n
        rows = SparseRows(
            verify.top_ids[row : row + count],
            verify.top_logits[row : row + count],
            verify.lse[row : row + count],
            ids,
            logits.reshape(count, item.n_asked),
            n_vocab.get(item.session, 0),
        )
        out.append(Question(item, rows, tuple(distributions), row))
        row += count
        asked += item.n_asked
        asked_logits += count * item.n_asked
    if asked != len(verify.asked_ids) or asked_logits != len(verify.asked_logits):
        raise WireError("Verify: more asked logits than the items declare")
    if q != len(verify.q_ids) or q != len(verify.q_probs):
        raise WireError("Verify: q_ids and q_probs do not add up to q_counts")
    return out


class SamplingSession:
    """A session's parameters, limits and tokens so far."""

    def __init__(self, opened: OpenSampling) -> None:
        self.id = opened.session
        self.n_vocab = opened.n_vocab
        self._sampling = opened.sampling
        self._limits = opened.limits
        self._n_prompt = opened.n_prompt
        self._prefix = TokenPrefix(opened.tokens.tolist())

    def knows(self, item: VerifyItem) -> bool:
        """Whether this session holds the prefix that a question continues."""
        return item.start < len(self._prefix.hashes) and self._prefix.hashes[item.start] == item.prefix_hash

    def judge(self, question: Question, dense: Mapping[int, Float32]) -> VerdictItem | NeedsRows:
        """The verdict on a step's rows; commits it.

        Args:
            dense: whole rows [n_vocab] float32, by index among the question's own rows.
        """
        item = question.item
        self._prefix.truncate(item.start)
        decision = decide(
            self._sampling, self._prefix.tokens, item.tokens, question.rows, dense, question.distributions
        )
        if isinstance(decision, NeedsRows):
            return decision
        tokens, n_accepted, finish = self._limit(item.tokens, decision)
        self._prefix.append(tokens)
        return VerdictItem(self.id, tokens, n_accepted, finish, len(dense))

    def _limit(self, proposals: tuple[int, ...], decision: Decision) -> tuple[tuple[int, ...], int, FinishReason]:
        """Cut the run after the first stop token, and at the most tokens wanted."""
        tokens = (*proposals[: decision.n_accepted], decision.token)
        finish: FinishReason = ""
        if self._limits.stop_tokens:
            for index, token in enumerate(tokens):
                if token in self._limits.stop_tokens:
                    tokens, finish = tokens[: index + 1], "stop"
                    break
        left = self._limits.max_tokens - (len(self._prefix) - self._n_prompt)
        if len(tokens) > left or (len(tokens) == left and not finish):
            tokens, finish = tokens[: max(left, 0)], "length"
        return tokens, min(decision.n_accepted, len(tokens)), finish


def whole_rows(question: Question, rows: Mapping[int, Float32]) -> dict[int, Float32]:
    """Those of a step's whole rows that belong to one question, by index among its own rows."""
    count = len(question.item.tokens) + 1
    return {row - question.first_row: rows[row] for row in rows if 0 <= row - question.first_row < count}


def check_dense(logits: Float32, n_vocab: int) -> None:
    """Errors: `WireError` unless whole rows [n, n_vocab] are finite and as wide as the vocabulary."""
    if logits.shape[1] != n_vocab:
        raise WireError(f"FullRows: {n_vocab} logits a row expected, got {logits.shape[1]}")
    if not np.isfinite(logits).all():
        raise WireError("FullRows: a logit is not finite")
