"""From committed tokens to text."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.errors import ApiError
from services.gateway.generation import MAX_WAITING, Delta, Generation, Outcome, Transcript
from services.tokenizer.null import NullVocabulary
from services.tokenizer.service import decode
from shared.messages import Decode, Decoded, DraftStats, Finished, TargetStats, Tokens

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For machines that others use too."""

FIRST_BYTE = 16


class Detokenizer:
    """The null vocabulary, without a socket."""

    def __init__(self) -> None:
        self._vocabulary = NullVocabulary()

    async def decode(
        self, tokens: npt.NDArray[np.int32], carry: bytes = b"", *, first: bool = False, last: bool = False,
        special: bool = False,
    ) -> Decoded:  # fmt: skip
        await asyncio.sleep(0)
        return decode(self._vocabulary, Decode(1, tokens, carry, first, last, special))


def finished(reason: Any = "stop") -> Finished:
    return Finished(1, reason, TargetStats(n_prompt=3), DraftStats())


async def transcribe(
    events: list[Tokens | Finished | ApiError], stops: tuple[str, ...] = (), together: bool = True
) -> tuple[list[Delta], Outcome | None, list[str]]:
    """The deltas and the outcome; events arrive all at once, or one whenever the last has been taken."""
    generation = Generation(1, 3, lambda: None)
    cancelled: list[str] = []

    def cancel() -> None:
        cancelled.append("cancel")
        generation.put(finished("cancelled"))

    transcript = Transcript(generation, Detokenizer(), stops, cancel)
    feed = list(events)
    if together:
        for event in feed:
            generation.put(event)

    async def trickle() -> None:
        for event in feed:
            generation.put(event)
            await asyncio.sleep(0)

    task = None if together else asyncio.create_task(trickle())
    deltas = [delta async for delta in transcript.deltas(5.0)]
    if task is not None:
        await task
    return deltas, transcript.outcome, cancelled


def tokens_of(data: bytes) -> tuple[int, ...]:
    return tuple(byte + FIRST_BYTE for byte in data)


@unhurried
@given(
    st.text("ab é€😀", max_size=20),
    st.lists(st.integers(1, 8), min_size=30, max_size=30),
    st.lists(st.text("ab é", min_size=1, max_size=3), max_size=3),
    st.booleans(),
)
def test_text_does_not_depend_on_how_tokens_were_cut(
    text: str, sizes: list[int], stops: list[str], together: bool
) -> None:
    """Characters of several tokens and stop strings come out the same for any messages and any timing."""
    data, messages, at = text.encode(), [], 0
    for size in sizes:
        if at < len(data):
            messages.append(Tokens(1, tokens_of(data[at : at + size]), 0))
            at += size
    if at < len(data):
        messages.append(Tokens(1, tokens_of(data[at:]), 0))
    deltas, outcome, _ = asyncio.run(transcribe([*messages, finished()], tuple(stops), together))
    cut = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    assert outcome is not None
    assert "".join(delta.text for delta in deltas) == text[:cut]
    assert (outcome.stop_type == "word") == (cut < len(text))


def test_each_message_becomes_one_delta_with_its_own_pieces() -> None:
    """Tokens, pieces and the accepted count belong together, also when messages were read at once."""
    first, second = "aé".encode(), b"bc"
    deltas, outcome, _ = asyncio.run(
        transcribe([Tokens(1, tokens_of(first), 2), Tokens(1, tokens_of(second), 1), finished("length")])
    )
    assert deltas == [
        Delta("aé", tokens_of(first), ("a", "", "é"), 2),
        Delta("bc", tokens_of(second), ("b", "c"), 1),
    ]
    assert outcome is not None
    assert (outcome.stop_type, outcome.n_tokens, outcome.finish_reason) == ("limit", 5, "length")


def test_a_character_that_never_ends_is_replaced() -> None:
    """Bytes left over at the end become U+FFFD."""
    deltas, _, _ = asyncio.run(transcribe([Tokens(1, tokens_of(b"a\xe2\x82"), 0), finished()]))
    assert "".join(delta.text for delta in deltas) == "a�"


def test_a_stop_string_ends_the_generation_at_its_token() -> None:
    """The router is told, later tokens do not count, and the run is cut after the token that completed the match."""
    deltas, outcome, cancelled = asyncio.run(
        transcribe([Tokens(1, tokens_of(b"one STOP two"), 9), Tokens(1, tokens_of(b"three"), 0)], ("STOP",))
    )
    assert [(delta.text, len(delta.tokens), delta.n_accepted) for delta in deltas] == [("one ", 8, 8)]
    assert cancelled == ["cancel"]
    assert outcome is not None
    assert (outcome.stop_type, outcome.stopping_word, outcome.n_tokens) == ("word", "STOP", 8)
    assert outcome.finish_reason == "stop"


def test_a_stop_string_in_a_finished_generation_cancels_nothing() -> None:
    """There is nothing left to end."""
    _, outcome, cancelled = asyncio.run(transcribe([Tokens(1, tokens_of(b"one STOP"), 0), finished()], ("STOP",)))
    assert cancelled == []
    assert outcome is not None
    assert outcome.stop_type == "word"


def test_an_error_comes_after_the_tokens_before_it() -> None:
    """What was generated is not lost with the failure."""

    async def run() -> list[str]:
        generation = Generation(1, 3, lambda: None)
        generation.put(Tokens(1, tokens_of(b"ab"), 0))
        generation.put(ApiError(502, "lost", "router_lost"))
        deltas = Transcript(generation, Detokenizer(), (), lambda: None).deltas(5.0)
        texts = [(await anext(deltas)).text]
        with pytest.raises(ApiError, match="lost"):
            await anext(deltas)
        return texts

    assert asyncio.run(run()) == ["ab"]


@pytest.mark.parametrize("reason", ["cancelled", ""])
def test_a_cancellation_that_the_client_did_not_want_is_an_error(reason: str) -> None:
    """An answer that was cut short is never passed off as complete."""
    with pytest.raises(ApiError) as caught:
        asyncio.run(transcribe([Tokens(1, tokens_of(b"ab"), 0), finished(reason)]))
    assert (caught.value.status, caught.value.code) == (502, "cancelled")


def test_silence_is_an_error_after_the_timeout() -> None:
    """Nobody waits for ever."""
    with pytest.raises(ApiError) as caught:
        asyncio.run(Generation(1, 3, lambda: None).take(0.01))
    assert (caught.value.status, caught.value.code) == (503, "timeout")
    assert caught.value.retry_after_s > 0


def test_a_client_that_reads_too_slowly_loses_its_generation() -> None:
    """What waits is bounded; beyond that the generation is given up, once, and the client is told."""
    given_up: list[int] = []
    generation = Generation(1, 3, lambda: given_up.append(1))
    for _ in range(MAX_WAITING):
        generation.put(Tokens(1, (20,), 0))
    assert given_up == []
    for _ in range(3):
        generation.put(Tokens(1, (20,), 0))
    assert given_up == [1]
    with pytest.raises(ApiError) as caught:
        asyncio.run(generation.take(1.0))
    assert caught.value.code == "client_too_slow"
