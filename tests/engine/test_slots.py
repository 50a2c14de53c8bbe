"""The slot table: placements, reuse of cached prefixes, and the rules of a batch."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.engine.interface import Chunk, Engine
from shared.engine.slots import (
    Placement,
    SlotTable,
    check_chunks,
    check_prefix,
    common_prefix,
    place_session,
    with_eviction,
)
from shared.errors import EngineError


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def run(first: int, last: int) -> np.ndarray:
    return np.arange(first, last, dtype=np.int32)


def test_new_sessions_take_empty_slots_until_none_is_left() -> None:
    """Each session has a slot of its own; when all are in use, the next one is refused."""
    table = SlotTable(2)
    assert table.acquire("a", ids(1, 2)) == Placement(0, 0, 0)
    assert table.acquire("b", ids(1, 2)) == Placement(1, 1, 0)
    assert table.acquire("c", ids(1, 2)) is None
    assert table.n_free == 0
    table.release("a", ids())
    assert table.n_free == 1
    assert table.acquire("c", ids(1, 2)) == Placement(0, 0, 0)


def test_a_continued_conversation_returns_to_its_slot() -> None:
    """A prompt that continues what a free slot holds is placed there, and only the new part is computed."""
    table = SlotTable(3)
    for session, first in (("a", 0), ("b", 1000), ("c", 2000)):
        table.acquire(session, run(first, first + 10))
    for session, first in (("a", 0), ("b", 1000), ("c", 2000)):
        table.release(session, run(first, first + 100))
    assert table.acquire("d", run(1000, 1150)) == Placement(1, 1, 100)


def test_the_last_prompt_token_is_always_computed() -> None:
    """The same prompt again reuses all of it but its last token, whose logits the session needs."""
    table = SlotTable(1)
    table.acquire("a", run(0, 50))
    table.release("a", run(0, 80))
    assert table.acquire("b", run(0, 50)) == Placement(0, 0, 49)


def test_a_prefix_is_copied_from_a_busy_slot() -> None:
    """A shared system prompt that a running session has computed is copied, not computed again."""
    table = SlotTable(2)
    table.acquire("a", run(0, 200))
    table.record("a", run(0, 200))
    assert table.acquire("b", np.concatenate([run(0, 150), run(900, 950)])) == Placement(1, 0, 150)


def test_nothing_is_copied_from_a_session_that_has_not_computed_its_prompt() -> None:
    """Until it is recorded, a running session's prompt is not taken to be in its slot."""
    table = SlotTable(2)
    table.acquire("a", run(0, 200))
    assert table.acquire("b", run(0, 200)) == Placement(1, 1, 0)


def test_a_copy_that_saves_little_is_not_made() -> None:
    """Less than `min_copy` tokens in common with a busy slot are computed again."""
    table = SlotTable(2, min_copy=16)
    table.acquire("a", run(0, 200))
    table.record("a", run(0, 200))
    assert table.acquire("b", np.concatenate([run(0, 15), run(900, 950)])) == Placement(1, 1, 0)
    table.release("b", ids())
    assert table.acquire("b", np.concatenate([run(0, 16), run(900, 950)])) == Placement(1, 0, 16)


def test_a_finished_conversation_survives_while_there_is_an_empty_slot() -> None:
    """A new conversation that shares only the system prompt copies it and leaves the finished one's slot whole."""
    table = SlotTable(2)
    table.acquire("a", run(0, 100))
    table.release("a", run(0, 100))
    assert table.acquire("b", np.concatenate([run(0, 50), run(900, 950)])) == Placement(1, 0, 50)
    table.release("b", np.concatenate([run(0, 50), run(900, 950)]))
    assert table.acquire("c", run(0, 120)) == Placement(0, 0, 100)


def test_without_a_shared_prefix_the_slot_unused_for_longest_is_taken() -> None:
    """Least recently used first, and a handful of tokens in common do not change that."""
    table = SlotTable(3)
    for session, first in (("a", 0), ("b", 1000), ("c", 2000)):
        table.acquire(session, run(first, first + 100))
    for session, first in (("c", 2000), ("a", 0), ("b", 1000)):
        table.release(session, run(first, first + 100))
    assert table.acquire("d", np.concatenate([run(1000, 1003), run(5000, 5100)])) == Placement(2, 2, 0)


def test_mistakes_are_refused_by_name() -> None:
    """A second slot for a session, an unknown session and an empty prompt are errors with a code."""
    table = SlotTable(1)
    table.acquire("a", ids(1))
    for code, mistake in (
        ("duplicate_session", lambda: table.acquire("a", ids(1))),
        ("empty_chunk", lambda: table.acquire("b", ids())),
        ("unknown_session", lambda: table.release("b", ids())),
        ("unknown_session", lambda: table.slot("b")),
        ("bad_slot", lambda: SlotTable(0)),
    ):
        with pytest.raises(EngineError) as caught:
            mistake()
        assert caught.value.code == code


def test_callers_may_reuse_their_arrays() -> None:
    """What the table remembers does not change when the caller's array does."""
    table = SlotTable(1)
    tokens = run(0, 50)
    table.acquire("a", tokens)
    table.release("a", tokens)
    tokens[:] = 7
    assert table.acquire("b", run(0, 51)) == Placement(0, 0, 50)


def test_idle_slots_are_evicted_from_the_one_unused_for_longest() -> None:
    """Each once, in the order of their last use; neither a running session's nor an empty one."""
    table = SlotTable(4)
    for session, first in (("a", 0), ("b", 1000), ("c", 2000), ("d", 3000)):
        table.acquire(session, run(first, first + 100))
    assert table.evict() is None
    for session, first in (("c", 2000), ("a", 0)):
        table.release(session, run(first, first + 100))
    table.release("d", ids())
    assert [table.evict() for _ in range(3)] == [2, 0, None]
    assert table.cached(0).tolist() == []
    assert table.acquire("e", run(2000, 2100)) == Placement(2, 2, 0)


def test_idle_slots_are_emptied_until_a_pass_fits() -> None:
    """One a try, and no more than it takes; what then does not fit, or fails otherwise, is the engine's own error."""
    table = SlotTable(3)
    for session, first in (("a", 0), ("b", 1000), ("c", 2000)):
        table.acquire(session, run(first, first + 10))
    for session, first in (("a", 0), ("b", 1000), ("c", 2000)):
        table.release(session, run(first, first + 10))
    engine: Any = Mock()
    full = EngineError("the pool is full", code="out_of_pages")
    assert with_eviction(engine, table, Mock(side_effect=[full, full, "logits"])) == "logits"
    assert engine.truncate.call_args_list == [call(0, 0), call(1, 0)]
    with pytest.raises(EngineError) as caught:
        with_eviction(engine, table, Mock(side_effect=EngineError("no such slot", code="bad_slot")))
    assert caught.value.code == "bad_slot"
    with pytest.raises(EngineError) as caught:
        with_eviction(engine, table, Mock(side_effect=full))
    assert caught.value is full
    assert engine.truncate.call_args_list[2:] == [call(2, 0)]


def test_a_session_is_placed_as_the_table_says() -> None:
    """The engine truncates the slot, or copies a prefix into it, and computes what is left; None without a slot."""
    table, engine = SlotTable(2), Mock(spec=Engine)
    assert place_session(engine, table, "a", run(0, 50)) == (0, 0)
    table.record("a", run(0, 50))
    assert place_session(engine, table, "b", run(0, 90)) == (1, 50)
    assert place_session(engine, table, "c", run(0, 90)) is None
    assert engine.mock_calls == [call.truncate(0, 0), call.copy_prefix(0, 1, 50)]


def test_an_engine_that_remembers_more_is_asked_for_it() -> None:
    """After the table's placement; and the table knows what the slot holds then, for others and for eviction."""
    table, engine = SlotTable(3), Mock()
    engine.reuse_prefix.side_effect = [64, 70]
    tokens = run(0, 90)
    assert place_session(engine, table, "a", tokens) == (0, 64)
    assert table.cached(0).tolist() == tokens[:64].tolist()
    assert place_session(engine, table, "b", run(0, 90)) == (1, 70)
    assert [c[0] for c in engine.mock_calls] == ["truncate", "reuse_prefix", "copy_prefix", "reuse_prefix"]
    assert engine.copy_prefix.call_args == call(0, 1, 64)
    slot, asked = engine.reuse_prefix.call_args.args
    assert (slot, asked.tolist()) == (1, run(0, 90).tolist())


short = st.lists(st.integers(0, 1), max_size=12)


@given(short, short)
def test_common_prefix_is_the_longest(a: list[int], b: list[int]) -> None:
    """Exactly the leading tokens that agree are counted."""
    n = common_prefix(np.array(a, np.int32), np.array(b, np.int32))
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(
        st.tuples(st.sampled_from(["acquire", "record", "release", "evict"]), st.integers(0, 3), short), max_size=40
    ),
)
def test_placements_only_promise_what_slots_hold(n_slots: int, min_copy: int, steps: list) -> None:
    """Against an engine that does as told: no slot is given twice, every reused prefix is really in its slot and leaves
    a token to compute, and a refusal means that all slots are in use. Only what an idle slot holds is evicted, and
    it is promised to no one afterwards."""
    table = SlotTable(n_slots, min_copy=min_copy)
    holds: list[list[int]] = [[] for _ in range(n_slots)]
    running: dict[int, tuple[int, list[int]]] = {}
    for action, session, tokens in steps:
        if action == "acquire" and session not in running and tokens:
            best = max(common_prefix(ids(*held), ids(*tokens)) for held in holds)
            placement = table.acquire(session, ids(*tokens))
            assert (placement is None) == (len(running) == n_slots)
            if placement is None:
                continue
            slot, source, length = placement.slot, placement.reuse_slot, placement.reuse_length
            assert slot not in {s for s, _ in running.values()}
            assert length < len(tokens)
            assert holds[source][:length] == tokens[:length]
            assert len(holds[source]) >= length
            assert length >= min(best, len(tokens) - 1) - (min_copy - 1)
            holds[slot] = tokens[:length]
            running[session] = (slot, tokens)
            assert table.slot(session) == slot
        elif action == "record" and session in running:
            slot, tokens = running[session]
            holds[slot] = tokens
            table.record(session, ids(*tokens))
        elif action == "release" and session in running:
            slot, _ = running.pop(session)
            holds[slot] = tokens
            table.release(session, ids(*tokens))
        elif action == "evict":
            idle = set(range(n_slots)) - {s for s, _ in running.values()}
            evicted = table.evict()
            assert (evicted is None) == (not any(holds[s] for s in idle))
            if evicted is not None:
                assert evicted in idle
                assert holds[evicted]
                holds[evicted] = []
        for slot, held in enumerate(holds):
            assert table.cached(slot).tolist() == held
        assert table.n_free == n_slots - len(running)


@pytest.mark.parametrize(
    ("code", "chunks"),
    [
        ("bad_slot", [Chunk(2, 0, ids(1), 1)]),
        ("bad_slot", [Chunk(-1, 0, ids(1), 1)]),
        ("duplicate_slot", [Chunk(1, 0, ids(1), 1), Chunk(1, 1, ids(1), 1)]),
        ("empty_chunk", [Chunk(0, 0, ids(), 0)]),
        ("empty_batch", []),
        ("bad_start", [Chunk(0, 4, ids(1), 1)]),
        ("bad_start", [Chunk(0, -1, ids(1), 1)]),
        ("context_exceeded", [Chunk(0, 3, run(0, 6), 1)]),
        ("bad_rows", [Chunk(0, 0, ids(1), 2)]),
        ("bad_rows", [Chunk(0, 0, ids(1), -1)]),
        ("batch_too_large", [Chunk(0, 0, run(0, 4), 1), Chunk(1, 0, run(0, 3), 1)]),
    ],
)
def test_a_batch_that_breaks_a_rule_is_refused_by_its_code(code: str, chunks: list[Chunk]) -> None:
    """Two slots of 8 tokens, holding 3 and 0; six tokens a batch."""
    with pytest.raises(EngineError) as caught:
        check_chunks(chunks, [3, 0], n_ctx=8, n_batch=6)
    assert caught.value.code == code


def test_a_good_batch_is_counted() -> None:
    """A rollback, an append and rows from none to all are within the rules."""
    assert check_chunks([Chunk(0, 1, run(0, 4), 0), Chunk(1, 0, ids(1, 2), 2)], [3, 0], n_ctx=8, n_batch=6) == 6
    check_prefix([3, 0], 0, 3)
    for slot, length, code in ((0, 4, "bad_length"), (0, -1, "bad_length"), (2, 0, "bad_slot")):
        with pytest.raises(EngineError) as caught:
            check_prefix([3, 0], slot, length)
        assert caught.value.code == code
