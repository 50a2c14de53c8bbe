"""What can draft: a model, the session's own text (n-grams), or chance. One interface.

A drafter proposes for several sessions at once and leaves the deciding to others: whatever it says, the target's text
does not change.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared.engine.interface import Chunk, Engine, Proposer
from shared.engine.ngram import NgramIndex
from shared.engine.slots import SlotTable, place_session, with_eviction
from shared.sampling.drafting import DraftToken, draft
from shared.service import monotonic_us
from shared.settings import DrafterKind
from shared.speculation.draft_session import DraftSession

NO_IDS = np.empty(0, np.int32)
NO_PROBS = np.empty(0, np.float32)
MODELLESS_SLOTS = 256
PROPOSED_AT_A_TIME = 4
"""Fewer cost time a token, more make a session wait longer before it hears of a commit."""


@dataclass(frozen=True, slots=True)
class DrafterInfo:
    """As in `shared.messages.Hello`."""

    engine: str
    model: str
    vocab_fingerprint: str
    n_vocab: int
    n_ctx: int
    n_slots: int
    row_invariant: bool
    quant: str = ""


class Drafter(Protocol):
    """One thread owns it."""

    @property
    def info(self) -> DrafterInfo: ...

    def open(self, session: DraftSession) -> bool:
        """Make room for a session; False when there is none."""

    def close(self, session: DraftSession) -> None:
        """Free what the session holds."""

    def draft(self, sessions: Sequence[DraftSession]) -> list[DraftSession]:
        """One turn for sessions with room: append what is drafted; returns the sessions that got tokens.

        May do only a part (a long prompt takes several turns) or nothing (no n-gram matches).

        Raises:
            EngineError: OUT_OF_PAGES: there is no room for them all, and nothing has changed; another code is fatal.
        """

    def shut(self) -> None:
        """Free the engine."""


class ModelDrafter:
    """Drafts for each session a turn, all sessions in one forward pass: one token, or up to PROPOSED_AT_A_TIME where
    the engine chooses tokens itself."""

    def __init__(self, engine: Engine, q_top_k: int) -> None:
        self._engine = engine
        self._proposer = engine if isinstance(engine, Proposer) else None
        self._q_top_k = q_top_k
        self._slots = SlotTable(engine.info.n_slots)
        info = engine.info
        self.info = DrafterInfo(
            info.engine,
            info.model,
            info.vocab_fingerprint,
            info.n_vocab,
            info.n_ctx,
            info.n_slots,
            info.row_invariant,
            info.quant,
        )

    def open(self, session: DraftSession) -> bool:
        placed = place_session(self._engine, self._slots, session.id, np.array(session.prefix.tokens, np.int32))
        if placed is None:
            return False
        session.slot, session.cached = placed
        return True

    def close(self, session: DraftSession) -> None:
        self._engine.truncate(session.slot, session.cached)  # what the table does not know of, it could not evict
        self._slots.release(session.id, np.array(session.prefix.tokens[: session.cached], np.int32))

    def draft(self, sessions: Sequence[DraftSession]) -> list[DraftSession]:
        left = self._engine.info.n_batch
        chunks: list[Chunk] = []
        taking_part: list[DraftSession] = []
        for session in sessions:
            pending = session.prefix.tokens[session.cached :]
            count = min(len(pending), left)
            if count == 0:
                continue
            rows = 1 if count == len(pending) else 0
            chunks.append(Chunk(session.slot, session.cached, np.array(pending[:count], np.int32), rows))
            taking_part.append(session)
            left -= count
        if not chunks:
            return []
        started = monotonic_us()
        if self._proposer is not None and all(
            chunk.rows and self._proposer.can_propose(session.sampling)
            for chunk, session in zip(chunks, taking_part, strict=True)
        ):
            self._propose(self._proposer, chunks, taking_part, started)
            return taking_part
        logits = with_eviction(self._engine, self._slots, lambda: self._engine.forward(chunks))
        row = 0
        drafting: list[tuple[DraftSession, DraftToken | None, int]] = []
        for session, chunk in zip(taking_part, chunks, strict=True):
            session.cached += len(chunk.tokens)
            drafted = None
            if chunk.rows:
                tokens = session.prefix.tokens
                drafted = draft(session.sampling, logits.dense(row), tokens, len(tokens), self._q_top_k)
                row += 1
            drafting.append((session, drafted, len(chunk.tokens)))
        spent = monotonic_us() - started
        out: list[DraftSession] = []
        for session, drafted, n_tokens in drafting:
            _count(session, n_tokens, spent)
            if drafted is not None:
                session.append(drafted)
                out.append(session)
        return out

    def _propose(
        self, proposer: Proposer, chunks: Sequence[Chunk], sessions: Sequence[DraftSession], started: int
    ) -> None:
        """Several tokens for each session, whose chunks end its prefix."""
        n = min(PROPOSED_AT_A_TIME, proposer.max_proposals, *(session.room for session in sessions))
        sampling = [session.sampling for session in sessions]
        proposed = with_eviction(self._engine, self._slots, lambda: proposer.propose(chunks, sampling, n))
        spent = monotonic_us() - started
        for i, (session, chunk) in enumerate(zip(sessions, chunks, strict=True)):
            _count(session, len(chunk.tokens), spent)
            # The engine has fed every token but the last; those after a stop token are dropped.
            session.cached += len(chunk.tokens) - 1
            for token, confidence in zip(proposed.tokens[i].tolist(), proposed.confidences[i].tolist(), strict=True):
                if not session.room:
                    break
                session.append(DraftToken(token, confidence, NO_IDS, NO_PROBS))
                session.cached += 1

    def shut(self) -> None:
        self._engine.close()


class NgramDrafter:
    """Drafts what followed the last time the session's text ended like this; all it can in one turn."""

    info = DrafterInfo("ngram", "", "", 0, 0, MODELLESS_SLOTS, True)

    def __init__(self) -> None:
        self._indexes: dict[int, NgramIndex] = {}

    def open(self, session: DraftSession) -> bool:
        self._indexes[session.id] = NgramIndex()
        return True

    def close(self, session: DraftSession) -> None:
        self._indexes.pop(session.id, None)

    def draft(self, sessions: Sequence[DraftSession]) -> list[DraftSession]:
        out = []
        for session in sessions:
            started = monotonic_us()
            index = self._indexes[session.id]
            if len(index) > session.cached:
                index.truncate(session.cached)
            fresh = session.cached < len(session.prefix)
            if not fresh:
                continue  # nothing has matched at this position before, nothing will
            index.extend(session.prefix.tokens[session.cached :])
            session.cached = len(session.prefix)
            tokens = index.propose(session.room)
            session.cost.decode_us += monotonic_us() - started
            for token in tokens:
                if session.room:  # none after a stop token
                    session.append(_certain(token))
            if tokens:
                out.append(session)
        return out

    def shut(self) -> None:
        self._indexes.clear()


class GarbageDrafter:
    """Drafts tokens at random: what a broken or hostile worker would send, and the price of a useless one."""

    info = DrafterInfo("garbage", "", "", 0, 0, MODELLESS_SLOTS, True)

    def __init__(self) -> None:
        self._random = random.Random(0)

    def open(self, session: DraftSession) -> bool:
        del session
        return True

    def close(self, session: DraftSession) -> None:
        del session

    def draft(self, sessions: Sequence[DraftSession]) -> list[DraftSession]:
        for session in sessions:
            highest = max(session.prefix.tokens)
            for _ in range(session.room):
                session.append(_certain(self._random.randint(0, highest)))
        return list(sessions)

    def shut(self) -> None:
        pass


def _count(session: DraftSession, n_tokens: int, spent: int) -> None:
    """Book the time of a turn that fed so many tokens of a session."""
    # After a rollback or an accepted run one or two tokens are fed at once; more are a prompt.
    if n_tokens > session.window:
        session.cost.prefill_us += spent
        session.cost.n_prefilled += n_tokens
    else:
        session.cost.decode_us += spent


def _certain(token: int) -> DraftToken:
    return DraftToken(token, 1.0, NO_IDS, NO_PROBS)


def modelless(kind: DrafterKind) -> Drafter:
    """The drafter that needs no engine, by its kind."""
    return NgramDrafter() if kind == "ngram" else GarbageDrafter()
