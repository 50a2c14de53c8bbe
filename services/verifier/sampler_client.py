"""The verifier's exchange with the sampler: logits out, verdicts back, whatever happens to the sampler in between.

The sampler decides from what the verifier sends, and the verifier's own prefix is the authority, so asking again is
always safe: a sampler that has restarted says `resync`, gets the sessions opened again, and decides the same.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shared import trace
from shared.engine.interface import Float32, Int32, Logits
from shared.errors import WireError
from shared.logs import Logger
from shared.messages import (
    MAX_STEP_SESSIONS,
    CloseSampling,
    Error,
    FullRows,
    NeedRows,
    OpenSampling,
    Verdict,
    VerdictItem,
    Verify,
    VerifyItem,
)
from shared.sampling import rows as sparse
from shared.service import BlockingLink
from shared.speculation.target_session import TargetSession

_RETRY_MS = 1000
_MAX_RESYNCS = 3
_RENEW_AFTER = 10
"""Silences in a row after which the connection is made anew: long enough for a slow sampler to answer."""


class Stopped(Exception):
    """The verifier is to end while it waits for a verdict."""


class StepRefused(Exception):
    """The sampler cannot decide a step: its rows, or one session's parameters, are wrong.

    sessions: those that can only be ended; the others may ask again.
    """

    def __init__(self, sessions: frozenset[int], error: Error) -> None:
        super().__init__(error.message)
        self.sessions = sessions
        self.error = error


class SamplerClient:
    """Owned by the engine thread.

    Args:
        top_k_rows: how many logits of a row are sent.
        alive: called while waiting; False ends the wait with `Stopped`.
    """

    def __init__(
        self, link: BlockingLink, n_vocab: int, top_k_rows: int, log: Logger, alive: Callable[[], bool]
    ) -> None:
        self._link = link
        self._n_vocab = n_vocab
        self._top_k_rows = top_k_rows
        self._log = log
        self._alive = alive
        self._step = random.getrandbits(62)
        self.sample_us = 0
        """What the sampler spent on the last step."""

    def open(self, session: TargetSession) -> None:
        """Tell the sampler of a session; with its tokens so far, so also after the sampler has lost it."""
        self._link.send(
            OpenSampling(
                session.id,
                np.array(session.prefix.tokens, np.int32),
                session.n_prompt,
                self._n_vocab,
                session.sampling,
                session.limits,
            )
        )

    def close(self, sessions: Sequence[int]) -> None:
        for start in range(0, len(sessions), MAX_STEP_SESSIONS):
            self._link.send(CloseSampling(tuple(sessions[start : start + MAX_STEP_SESSIONS])))

    def question(self, items: Sequence[tuple[TargetSession, int]], logits: Logits) -> Verify:
        """The step's logits as a message; items: each session with its number of proposals, in the rows' order."""
        self._step += 1
        top_k = max(sparse.needed_top_k(session.sampling, self._top_k_rows) for session, _ in items)
        top_k = min(top_k, self._n_vocab)
        top_ids, top_logits = logits.top(top_k)
        wants_mass = any(sparse.needs_lse(session.sampling, top_k, self._n_vocab) for session, _ in items)
        lse = logits.log_sum_exp() if wants_mass else np.full(logits.n_rows, np.nan)
        parts: list[VerifyItem] = []
        asked_ids: list[Int32] = []
        asked_logits: list[Float32] = []
        q_ids: list[Int32] = []
        q_probs: list[Float32] = []
        row = 0
        for session, n_proposals in items:
            proposals = session.proposals(n_proposals)
            run = tuple(p.token for p in proposals)
            asked = sparse.asked_ids(session.sampling, session.prefix.tokens, run)
            if len(asked):
                asked_ids.append(asked)
                asked_logits.extend(logits.gather(row + j, asked) for j in range(n_proposals + 1))
            counts: list[int] = []
            if session.sampling.acceptance == "rejection" and not session.sampling.greedy:
                for proposed in proposals:
                    ids, probs = proposed.q or (np.array([proposed.token], np.int32), np.ones(1, np.float32))
                    q_ids.append(ids)
                    q_probs.append(probs)
                    counts.append(len(ids))
            parts.append(
                VerifyItem(session.id, len(session.prefix), session.prefix.hash, run, len(asked), tuple(counts))
            )
            row += n_proposals + 1
        return Verify(
            self._step,
            tuple(parts),
            top_ids,
            top_logits,
            lse,
            _joined(asked_ids, np.int32),
            _joined(asked_logits, np.float32),
            _joined(q_ids, np.int32),
            _joined(q_probs, np.float32),
        )

    def ask(self, verify: Verify, sessions: Sequence[TargetSession], logits: Logits) -> tuple[VerdictItem, ...]:
        """Send a step's logits and wait for its verdicts; `logits` serves rows that must travel whole.

        Raises:
            Stopped: see `alive`.
            StepRefused: asking again would be refused again.
        """
        self._link.send(verify)
        trace.mark("verifier.asked")
        asked = {verify.step}
        deadline = time.monotonic() + _RETRY_MS / 1000
        resyncs = n_silent = 0
        while True:
            try:
                message = self._link.receive(100)
            except WireError as error:
                self._log.error("sampler_reply_refused", reason=str(error))
                continue
            if not self._alive():
                raise Stopped
            if isinstance(message, NeedRows) and message.step in asked:
                full = np.stack([logits.dense(row) for row in message.rows])
                self._link.send(FullRows(message.step, message.rows, full))
            elif isinstance(message, Verdict) and message.step in asked:
                if not any(item.resync for item in message.items):
                    self.sample_us = message.sample_us
                    return message.items
                if message.step != verify.step:
                    continue  # it was asked before the sessions were opened again
                resyncs += 1
                if resyncs > _MAX_RESYNCS:
                    lost = frozenset(item.session for item in message.items if item.resync)
                    raise StepRefused(lost, Error(verify.step, "sampler_lost_session", "the sampler loses sessions"))
                for session, item in zip(sessions, message.items, strict=True):
                    if item.resync:
                        self._log.info("sampler_resync", session=session.id)
                        self.open(session)
                verify = self._again(verify, asked)
            elif isinstance(message, Error):
                self._log.error("sampler_error", code=message.code, reason=message.message)
                everyone = frozenset(session.id for session in sessions)
                if message.ref in everyone:
                    raise StepRefused(frozenset((message.ref,)), message)
                # 0: not even readable, so that it names neither.
                if message.ref == 0 or message.ref in asked:
                    raise StepRefused(everyone, message)
            elif message is None and time.monotonic() > deadline:
                self._log.warning("sampler_silent", step=verify.step)
                n_silent += 1
                if n_silent % _RENEW_AFTER == 0 and self._link.renew():
                    self._log.warning("sampler_connected_anew", remedy="does it let this host's key in? see its log")
                verify = self._again(verify, asked)
                deadline = time.monotonic() + _RETRY_MS / 1000

    def _again(self, verify: Verify, asked: set[int]) -> Verify:
        """Ask once more, under a new number: copies for a sampler that is away queue up, and all are answered."""
        self._step += 1
        again = replace(verify, step=self._step)
        asked.add(again.step)
        self._link.send(again)
        return again


def _joined(parts: Sequence[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)
