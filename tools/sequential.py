"""Speculative decoding as in llama-server: draft, then verify, in turn, in one process, with nothing between them.

What careful users of one machine run, and so what overlapped drafting is compared with: draft up to `n_max` tokens,
stop before the first whose probability is under `p_min`, verify them in one pass, begin again. Drafting and accepting
use the pipeline's own functions, so that the text is the same and so is the acceptance of equal proposals.

Invariant: for a target whose rows do not depend on the batch, the text is the pipeline's plain one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shared.engine.interface import Chunk, Engine, Float32, Logits
from shared.sampling.acceptance import Decision, decide
from shared.sampling.drafting import draft
from shared.sampling.params import SamplingParams
from shared.sampling.rows import DEFAULT_TOP_K, asked_ids, needed_top_k, needs_lse, sparse_rows

_SLOT = 0
_PREFILL_CHUNK = 256
"""As the verifier's default: an engine without row invariance computes a prompt otherwise when it is cut otherwise."""


@dataclass(frozen=True, slots=True)
class SequentialCompletion:
    """One completion.

    tokens: the continuation. times_s: when each pass of the target committed tokens, and how many, since the start;
    the first one is the end of the prompts. rounds: passes after that. by_depth: (verified, accepted) for each depth.
    n_drafted: tokens that the draft chose, those of too small a probability included.
    draft_prefill_s, draft_s, target_prefill_s, verify_s: in the engines, with the reading of the rows.
    """

    tokens: tuple[int, ...]
    times_s: tuple[tuple[float, int], ...]
    rounds: int
    by_depth: tuple[tuple[int, int], ...]
    n_drafted: int
    draft_prefill_s: float
    draft_s: float
    target_prefill_s: float
    verify_s: float


class SequentialDecoder:
    """See the module's docstring. Uses one slot of each engine, and forgets what it holds between completions.

    Args:
        n_max: most proposals of a round. p_min: a proposal of a smaller probability, as the draft sees it, ends the run
            and is not verified; 0 always drafts n_max.
        greedy_drafts: the draft's most probable tokens also where the target samples, as llama-server drafts.
        clock: in seconds; for tests.
    """

    def __init__(
        self,
        target: Engine,
        draft_engine: Engine,
        n_max: int,
        p_min: float,
        greedy_drafts: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target = target
        self._draft = draft_engine
        self._n_max = n_max
        self._p_min = p_min
        self._greedy_drafts = greedy_drafts
        self._clock = clock

    def complete(
        self, prompt: Sequence[int], sampling: SamplingParams, max_tokens: int, stop_tokens: Sequence[int] = ()
    ) -> SequentialCompletion:
        """Continue a prompt by up to max_tokens tokens, ending with a stop token. Acceptance is coupled or greedy.

        Errors: `EngineError` for a prompt that the context does not hold.
        """
        drafting = replace(sampling, temperature=0.0) if self._greedy_drafts else sampling
        started = self._clock()
        tokens = list(prompt)
        # Both prompts come before the first token, so that the draft's is not charged to decoding.
        row = self._prefill(self._target, tokens)
        decision = self._decide(sampling, tokens, (), row)
        target_prefilled = self._clock()
        self._prefill(self._draft, tokens)
        n_draft_cached = len(tokens)
        prefilled = self._clock()
        tokens.append(decision.token)
        times = [(prefilled - started, 1)]
        by_depth = [[0, 0] for _ in range(self._n_max)]
        rounds = n_drafted = 0
        draft_s = verify_s = 0.0
        end = len(prompt) + max_tokens
        while len(tokens) < end and tokens[-1] not in stop_tokens:
            began = self._clock()
            proposals, n_draft_cached, chosen = self._propose(
                tokens, n_draft_cached, min(self._n_max, end - len(tokens) - 1), drafting, stop_tokens
            )
            drafted = self._clock()
            chunk = Chunk(_SLOT, len(tokens) - 1, np.array([tokens[-1], *proposals], np.int32), len(proposals) + 1)
            logits = self._target.forward([chunk])
            decision = self._decide(sampling, tokens, proposals, logits)
            now = self._clock()
            rounds, n_drafted = rounds + 1, n_drafted + chosen
            draft_s, verify_s = draft_s + drafted - began, verify_s + now - drafted
            for depth in range(len(proposals)):
                by_depth[depth][0] += 1
                by_depth[depth][1] += depth < decision.n_accepted
            # Whatever the draft holds beyond the accepted run is dropped by starting earlier. It never holds a last
            # proposal that was accepted, which it has chosen but not computed: the next round begins with that one.
            n_draft_cached = min(n_draft_cached, len(tokens) + decision.n_accepted)
            committed = _until_stop([*proposals[: decision.n_accepted], decision.token], stop_tokens)
            tokens += committed
            times.append((now - started, len(committed)))
        while by_depth and not by_depth[-1][0]:
            by_depth.pop()
        return SequentialCompletion(
            tuple(tokens[len(prompt) :]),
            tuple(times),
            rounds,
            tuple((verified, accepted) for verified, accepted in by_depth),
            n_drafted,
            prefilled - target_prefilled,
            draft_s,
            target_prefilled - started,
            verify_s,
        )

    def _prefill(self, engine: Engine, tokens: Sequence[int]) -> Logits:
        """Compute a prompt into an empty slot; the last token's row."""
        engine.truncate(_SLOT, 0)
        size = min(_PREFILL_CHUNK, engine.info.n_batch)
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            last = start + size >= len(tokens)
            logits = engine.forward([Chunk(_SLOT, start, np.array(part, np.int32), int(last))])
        return logits

    def _propose(
        self, tokens: list[int], n_cached: int, n: int, sampling: SamplingParams, stop_tokens: Sequence[int]
    ) -> tuple[list[int], int, int]:
        """Proposals for a round, how many positions the draft holds then, and how many tokens it has chosen."""
        sequence = tokens.copy()
        chosen = 0
        while len(sequence) - len(tokens) < n and (len(sequence) == len(tokens) or sequence[-1] not in stop_tokens):
            logits = self._draft.forward([Chunk(_SLOT, n_cached, np.array(sequence[n_cached:], np.int32), 1)])
            n_cached = len(sequence)
            drafted = draft(sampling, logits.dense(0), sequence, len(sequence))
            chosen += 1
            if drafted.confidence < self._p_min:
                break
            sequence.append(drafted.token)
        return sequence[len(tokens) :], n_cached, chosen

    def _decide(
        self, sampling: SamplingParams, history: Sequence[int], proposals: Sequence[int], logits: Logits
    ) -> Decision:
        """What the sampler says to these rows."""
        top_k = min(needed_top_k(sampling, DEFAULT_TOP_K), logits.n_vocab)
        lse = logits.log_sum_exp() if needs_lse(sampling, top_k, logits.n_vocab) else None
        asked = asked_ids(sampling, history, proposals)
        rows = sparse_rows(logits, logits.top(top_k), lse, 0, len(proposals) + 1, top_k, asked)
        whole: dict[int, Float32] = {}
        while True:
            decision = decide(sampling, history, proposals, rows, whole)
            if isinstance(decision, Decision):
                return decision
            whole |= {row: logits.dense(row) for row in decision.rows}


def _until_stop(tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
    """The tokens up to and with the first stop token."""
    for n, token in enumerate(tokens, 1):
        if token in stop_tokens:
            return tokens[:n]
    return tokens
