"""What a process records of itself: bounded, from any thread, and answered by session."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared import trace, wire
from shared.messages import MAX_MARKS, GetTrace, Trace

SESSION, OTHER = 2**63 - 1, 17


@pytest.fixture(autouse=True)
def ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one."""
    resize(monkeypatch, trace.CAPACITY)


def resize(monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    monkeypatch.setattr(trace, "_buffer", bytearray(capacity * trace._SIZE))
    monkeypatch.setattr(trace, "_mask", capacity - 1)
    monkeypatch.setattr(trace, "_next", itertools.count().__next__)


def asked(session: int, **fields: Any) -> Trace:
    """The answer, as it arrives."""
    answer = wire.decode(wire.encode(trace.answer(GetTrace(5, session, **fields), "verifier", "v")))
    assert isinstance(answer, Trace)
    return answer


def names(answer: Trace) -> list[str]:
    return [answer.kinds[kind] for kind in answer.marks[:, 2].tolist()]


def test_a_mark_is_given_with_all_that_was_recorded() -> None:
    began = time.monotonic_ns()
    trace.span("verifier.round", began, SESSION, 77, 4, 3, 5)
    ended = time.monotonic_ns()
    answer = asked(SESSION)
    assert (answer.ref, answer.role, answer.instance, answer.pid) == (5, "verifier", "v", os.getpid())
    begin, duration, kind, thread, own, position, *numbers = answer.marks[0].tolist()
    assert (begin, answer.kinds[kind], answer.threads[thread]) == (began, "verifier.round", "event loop")
    assert 0 <= duration <= ended - began
    assert (own, position, numbers) == (1, 77, [4, 3, 5])
    assert ended <= answer.now_ns <= time.monotonic_ns()
    assert (answer.n_cut, answer.oldest_ns) == (0, 0)


def test_of_other_marks_those_of_no_session_in_its_time_are_given() -> None:
    """Not another session's, nor what was before and after."""
    trace.mark("verifier.asked")
    trace.mark("verifier.open", SESSION)
    trace.mark("verifier.open", OTHER)
    trace.mark("verifier.wait")
    trace.mark("verifier.commit", SESSION)
    trace.mark("verifier.asked")
    answer = asked(SESSION)
    assert names(answer) == ["verifier.open", "verifier.wait", "verifier.commit"]
    assert answer.marks[:, 4].tolist() == [1, 0, 1]


def test_a_span_of_no_session_that_reaches_into_its_time_is_given() -> None:
    began = time.monotonic_ns()
    trace.mark("verifier.open", SESSION)
    trace.span("verifier.step", began)
    assert names(asked(SESSION)) == ["verifier.open", "verifier.step"]


def test_who_knows_no_sessions_is_asked_for_a_time() -> None:
    trace.mark("tokenizer.encode")
    since = time.monotonic_ns()
    trace.mark("tokenizer.decode")
    until = time.monotonic_ns()
    trace.mark("tokenizer.encode")
    assert names(asked(0, since_ns=since, until_ns=until)) == ["tokenizer.decode"]
    assert names(asked(SESSION)) == []


def test_only_the_last_marks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are overwritten, and the answer says how far back it reaches."""
    resize(monkeypatch, 8)
    for position in range(20):
        trace.mark("draft.keep", SESSION, position)
    answer = asked(SESSION)
    assert answer.marks[:, 5].tolist() == list(range(12, 20))
    assert answer.oldest_ns == answer.marks[0, 0] > 0


def test_an_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more is kept than a message holds, the oldest are left out, and counted."""
    resize(monkeypatch, 2 * trace.CAPACITY)
    for position in range(MAX_MARKS + 3):
        trace.mark("draft.keep", SESSION, position)
    answer = asked(SESSION)
    assert (len(answer.marks), answer.n_cut) == (MAX_MARKS, 3)
    assert answer.marks[0, 5] == 3


def test_threads_do_not_disturb_each_other() -> None:
    """Each mark of each thread is kept whole, with its thread."""
    n, n_threads = 5000, 4
    gate = threading.Barrier(n_threads)
    done = threading.Barrier(n_threads + 1)

    def work(number: int) -> None:
        gate.wait()
        for i in range(n):
            trace.mark("verifier.round", SESSION, i, number, i, i)
        done.wait()

    threads = [threading.Thread(target=work, args=(i,), name=f"t{i}", daemon=True) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    while len(asked(SESSION).marks) < n * n_threads:
        pass  # answering goes on beside the marking
    answer = asked(SESSION)
    done.wait()
    assert sorted(answer.threads) == [f"t{i}" for i in range(n_threads)]
    seen = {i: iter(range(n)) for i in range(n_threads)}
    for _, _, _, thread, _, position, number, *rest in answer.marks.tolist():
        assert answer.threads[thread] == f"t{number}"
        assert position == next(seen[number])
        assert rest == [position, position]


def test_nothing_is_lost_between_writing_and_reading(tmp_path: Path) -> None:
    began = time.monotonic_ns()
    trace.span("verifier.ask", began, SESSION, 3)
    trace.mark("verifier.asked", OTHER)
    trace.write(tmp_path / "new", "verifier-v")

    def read() -> Iterator[tuple[str, int, int]]:
        for mark in trace.read(tmp_path / "new"):
            yield mark.name, mark.session, mark.position
            assert began <= mark.begin_ns <= mark.end_ns <= time.monotonic_ns()

    assert list(read()) == [("verifier.ask", SESSION, 3), ("verifier.asked", OTHER, 0)]
