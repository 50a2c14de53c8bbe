"""Slots of an engine: the rules that a batch must keep, and which session sits in which slot.

`SlotTable` is plain bookkeeping without an engine: it remembers the tokens that each slot's KV cache holds, also after
its session has ended, and places a new session where most of its prompt is already computed. Its one invariant: what
a `Placement` promises to be cached is a prefix of what the named slot really holds, and leaves at least the prompt's
last token to compute, since a session needs that token's logits. `place_session` does what a placement says, and asks
the engine for more; `with_eviction` gives up what ended sessions have left where an engine needs the room.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from shared.engine.interface import Chunk, Engine, Int32, PrefixCache
from shared.errors import EngineError

OUT_OF_PAGES = "out_of_pages"
"""The code of an engine that has no room for a batch now, and has changed nothing."""

_EMPTY: Int32 = np.empty(0, np.int32)
_T = TypeVar("_T")


def check_chunks(chunks: Sequence[Chunk], lengths: Sequence[int], n_ctx: int, n_batch: int) -> int:
    """Check a batch against the rules of `Engine.forward`, token values excepted.

    Args:
        lengths: tokens held by each slot; its length is the number of slots.

    Returns:
        The number of tokens in the batch.

    Raises:
        EngineError: naming the first rule that is broken, in its message and its code.
    """
    n_tokens = 0
    seen = 0
    for chunk in chunks:
        slot, start, n = chunk.slot, chunk.start, len(chunk.tokens)
        if not 0 <= slot < len(lengths):
            raise EngineError(f"slot {slot} is outside 0..{len(lengths) - 1}", code="bad_slot")
        if seen >> slot & 1:
            raise EngineError(f"slot {slot} appears twice in one batch", "send one chunk per slot", "duplicate_slot")
        seen |= 1 << slot
        if n == 0:
            raise EngineError(f"the chunk for slot {slot} has no tokens", code="empty_chunk")
        if not 0 <= start <= lengths[slot]:
            raise EngineError(
                f"slot {slot} holds {lengths[slot]} tokens, so a chunk cannot start at {start}", code="bad_start"
            )
        if start + n > n_ctx:
            raise EngineError(
                f"slot {slot} would hold {start + n} tokens, its context has room for {n_ctx}",
                "raise n_ctx, or shorten the prompt",
                "context_exceeded",
            )
        if not 0 <= chunk.rows <= n:
            raise EngineError(f"{chunk.rows} rows wanted of a chunk of {n} tokens", code="bad_rows")
        n_tokens += n
    if n_tokens == 0:
        raise EngineError("the batch has no chunks", code="empty_batch")
    if n_tokens > n_batch:
        raise EngineError(
            f"the batch has {n_tokens} tokens, one forward pass takes {n_batch}",
            "split it, or raise n_batch",
            "batch_too_large",
        )
    return n_tokens


def check_prefix(lengths: Sequence[int], slot: int, length: int) -> None:
    """Check that a slot exists and holds at least `length` tokens.

    Raises:
        EngineError: `bad_slot` or `bad_length`.
    """
    if not 0 <= slot < len(lengths):
        raise EngineError(f"slot {slot} is outside 0..{len(lengths) - 1}", code="bad_slot")
    if not 0 <= length <= lengths[slot]:
        raise EngineError(f"slot {slot} holds {lengths[slot]} tokens, not {length}", code="bad_length")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a session goes and what it finds there.

    slot: the session's slot.
    reuse_slot: the slot whose cache holds the shared prefix; `slot` itself: truncate it to `reuse_length`; another
        one: `copy_prefix(reuse_slot, slot, reuse_length)`. To be done before any other forward pass.
    reuse_length: tokens that need no computing, less than the prompt's length; 0 clears the slot.
    """

    slot: int
    reuse_slot: int
    reuse_length: int


class SlotTable:
    """Which session sits in which slot, and what each slot's cache holds.

    Args:
        n_slots: the engine's number of slots.
        min_copy: a prefix is copied from another slot only when that saves computing at least so many tokens.
        align: only multiples of so many tokens are reused. With an engine whose rows depend on their batch, and prompts
            computed in chunks of `align`, what is reused was computed as it would be anew.
    """

    def __init__(self, n_slots: int, *, min_copy: int = 16, align: int = 1) -> None:
        if n_slots < 1:
            raise EngineError(f"n_slots is {n_slots}", "an engine needs at least one slot", "bad_slot")
        self._cached: list[Int32] = [_EMPTY] * n_slots
        self._last_use = [0] * n_slots
        self._slots: dict[Hashable, int] = {}
        self._busy = [False] * n_slots
        self._min_copy = max(1, min_copy)
        self._align = align
        self._clock = 0

    @property
    def n_free(self) -> int:
        return len(self._busy) - len(self._slots)

    def slot(self, session: Hashable) -> int:
        """The slot of a session that has one."""
        try:
            return self._slots[session]
        except KeyError:
            raise EngineError(f"session {session!r} has no slot", code="unknown_session") from None

    def cached(self, slot: int) -> Int32:
        """The tokens that the slot's cache is known to hold: [n] int32, not to be written to."""
        return self._cached[slot]

    def acquire(self, session: Hashable, tokens: Int32) -> Placement | None:
        """Give a new session a slot; None when all are in use.

        Args:
            tokens: [n] int32, n >= 1, the session's prompt.

        Chosen is the free slot with the longest prefix in common with `tokens`; where a slot in use shares a longer
        one, the prefix is copied from it. A free slot's longer content is kept, by copying from it, while another free
        slot is empty. With nothing worth reusing it is the slot unused for longest. From then on, and until `record`,
        the table takes only the reused prefix to be in the slot.

        Raises:
            EngineError: the session has a slot already, or there are no tokens.
        """
        if session in self._slots:
            raise EngineError(f"session {session!r} has a slot already", code="duplicate_session")
        if len(tokens) == 0:
            raise EngineError("a session needs at least one token", code="empty_chunk")
        free = [slot for slot, busy in enumerate(self._busy) if not busy]
        if not free:
            return None

        tokens = np.array(tokens, np.int32)
        limit = len(tokens) - 1
        shared = [min(common_prefix(cached, tokens), limit) for cached in self._cached]
        shared = [length - length % self._align for length in shared]
        slot = max(free, key=lambda s: (shared[s], -self._last_use[s]))
        if shared[slot] < self._min_copy:  # too little to sacrifice a recent conversation for
            slot = min(free, key=lambda s: (len(self._cached[s]) > 0, self._last_use[s]))
        elif shared[slot] < min(limit, len(self._cached[slot])):
            empty = [s for s in free if len(self._cached[s]) == 0]
            slot = empty[0] if empty else slot
        source = max(range(len(shared)), key=lambda s: shared[s])
        if shared[source] - shared[slot] < self._min_copy:
            source = slot

        length = shared[source]
        self._slots[session] = slot
        self._busy[slot] = True
        self._cached[slot] = tokens[:length]
        self._touch(slot)
        return Placement(slot, source, length)

    def record(self, session: Hashable, tokens: Int32) -> None:
        """Say what the slot of a running session holds, so that others may share it: [n] int32, copied."""
        slot = self.slot(session)
        self._cached[slot] = np.array(tokens, np.int32)
        self._touch(slot)

    def release(self, session: Hashable, tokens: Int32) -> None:
        """End a session; `tokens` are what its slot's cache still holds: [n] int32, copied; empty if unknown."""
        self.record(session, tokens)
        slot = self._slots.pop(session)
        self._busy[slot] = False

    def evict(self) -> int | None:
        """Forget what the idle slot used least recently holds; the caller truncates it. None: no idle one holds any."""
        idle = [slot for slot, busy in enumerate(self._busy) if not busy and len(self._cached[slot])]
        if not idle:
            return None
        slot = min(idle, key=lambda s: self._last_use[s])
        self._cached[slot] = _EMPTY
        return slot

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._last_use[slot] = self._clock


def place_session(engine: Engine, table: SlotTable, session: Hashable, tokens: Int32) -> tuple[int, int] | None:
    """Give a new session a slot that holds as much of its prompt as any slot does, or what the engine remembers.

    Args:
        tokens: [n] int32, n >= 1, the prompt.

    Returns:
        The slot, and how many tokens of the prompt it holds, less than n; None when all slots are in use.

    Raises:
        EngineError: as `SlotTable.acquire`.
    """
    placement = table.acquire(session, tokens)
    if placement is None:
        return None
    slot, length = placement.slot, placement.reuse_length
    if placement.reuse_slot != slot:
        engine.copy_prefix(placement.reuse_slot, slot, length)
    else:
        engine.truncate(slot, length)
    if isinstance(engine, PrefixCache):
        length = engine.reuse_prefix(slot, tokens)
        table.record(session, tokens[:length])
    return slot, length


def with_eviction(engine: Engine, table: SlotTable, compute: Callable[[], _T]) -> _T:
    """Compute a pass; as long as the engine has no room for it, empty one idle slot and try again.

    Raises:
        EngineError: what `compute` raises; OUT_OF_PAGES once no idle slot holds anything.
    """
    while True:
        try:
            return compute()
        except EngineError as error:
            slot = table.evict() if error.code == OUT_OF_PAGES else None
            if slot is None:
                raise
            engine.truncate(slot, 0)


def common_prefix(a: Int32, b: Int32) -> int:
    """How many leading tokens two sequences share."""
    n = min(len(a), len(b))
    if n == 0 or a[0] != b[0]:
        return 0
    different = a[:n] != b[:n]
    first = int(different.argmax())
    return first if different[first] else n
