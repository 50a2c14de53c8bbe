"""One generation as its client sees it: committed tokens in, text out.

Invariant: the deltas' texts, joined, are the same however the tokens were cut into messages.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from services.gateway.errors import ApiError
from services.gateway.stopping import StopMatcher
from shared import trace
from shared.messages import Decoded, DraftStats, Finished, TargetStats, Tokens

StopType = Literal["eos", "limit", "word"]

MAX_WAITING = 4096
"""Messages that wait for a client to read; then its generation is given up."""
CANCEL_TIMEOUT_S = 5.0
"""How long a cancelled generation waits for its figures."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one `Tokens` message brought.

    text: to be appended to the answer. tokens, pieces: ids and what each of them completed, before stop strings hold
    back or cut the text. n_accepted: how many of the tokens, from the first, the draft had proposed.
    """

    text: str
    tokens: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    n_accepted: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a generation ended. n_tokens: that belong to the answer, a stop string's and an end token included."""

    stop_type: StopType
    stopping_word: str
    n_prompt: int
    n_tokens: int
    target: TargetStats
    draft: DraftStats

    @property
    def finish_reason(self) -> str:
        """OpenAI's word."""
        return "length" if self.stop_type == "limit" else "stop"


class Detokenizer(Protocol):
    """What is needed of a `TokenizerClient`."""

    async def decode(
        self,
        tokens: npt.NDArray[np.int32],
        carry: bytes = b"",
        *,
        first: bool = False,
        last: bool = False,
        special: bool = False,
    ) -> Decoded: ...


class Generation:
    """What the router has sent for one request, until its client takes it.

    Args:
        request: its number on the wire. n_prompt: tokens of the prompt.
        on_overflow: called when the client has let too much wait; an error then waits in its place.
    """

    def __init__(self, request: int, n_prompt: int, on_overflow: Callable[[], None]) -> None:
        self.request = request
        self.n_prompt = n_prompt
        self.finished: Finished | None = None
        self._on_overflow = on_overflow
        self._waiting: deque[Tokens | Finished | ApiError] = deque()
        self._arrival: asyncio.Future[bool] | None = None
        self._given_up = False

    @property
    def given_up(self) -> bool:
        return self._given_up

    def put(self, event: Tokens | Finished | ApiError) -> None:
        """Never blocks and never holds more than MAX_WAITING messages."""
        if isinstance(event, Finished):
            self.finished = event
        if self._given_up:
            return
        if isinstance(event, Tokens) and len(self._waiting) >= MAX_WAITING:
            self._given_up = True
            self._waiting.clear()
            event = ApiError(503, "the client reads too slowly; the rest of the answer was dropped", "client_too_slow")
            self._on_overflow()
        self._waiting.append(event)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(True)

    async def take(self, timeout_s: float) -> list[Tokens | Finished]:
        """All that waits, at least one. Errors: the `ApiError` that ended the generation, or 503 after the timeout."""
        if not self._waiting and not await self._arrives(timeout_s):
            raise ApiError(503, f"no token for {timeout_s:g} s", "timeout", retry_after_s=5)
        taken: list[Tokens | Finished] = []
        while self._waiting:
            event = self._waiting[0]
            if isinstance(event, ApiError):
                if taken:
                    break
                raise event
            taken.append(event)
            self._waiting.popleft()
        return taken

    async def _arrives(self, timeout_s: float) -> bool:
        """Whether something arrives in time. A bare future and timer: `wait_for` would make a task for each token."""
        loop = asyncio.get_running_loop()
        arrival: asyncio.Future[bool] = loop.create_future()
        self._arrival = arrival
        timer = loop.call_later(timeout_s, _set_unless_done, arrival)
        try:
            return await arrival
        finally:
            timer.cancel()
            self._arrival = None


def _set_unless_done(arrival: asyncio.Future[bool]) -> None:
    if not arrival.done():
        arrival.set_result(False)


class Transcript:
    """Turns a generation's tokens into deltas, and knows its outcome afterwards.

    Args:
        cancel: asks the router to end the generation.
    """

    def __init__(
        self, generation: Generation, detokenizer: Detokenizer, stops: tuple[str, ...], cancel: Callable[[], None]
    ) -> None:
        self._generation = generation
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)
        self._cancel = cancel
        self._carry = b""
        self._n_tokens = 0
        self.outcome: Outcome | None = None

    async def deltas(self, timeout_s: float) -> AsyncGenerator[Delta, None]:
        """The answer, piece by piece.

        Args:
            timeout_s: longest wait for the next token.

        Raises:
            ApiError: the generation has failed.
        """
        while self.outcome is None:
            events = await self._generation.take(timeout_s)
            runs = [event for event in events if isinstance(event, Tokens)]
            finished = self._generation.finished if not isinstance(events[-1], Tokens) else None
            for delta in await self._read(runs, finished is not None):
                yield delta
            if self._matcher.matched:
                if finished is None:
                    self._cancel()
                    finished = await self._await_end()
                self._conclude("word", finished)
            elif finished is not None:
                if finished.reason not in ("stop", "length"):
                    raise ApiError(502, "the generation was cancelled", "cancelled", retry_after_s=1)
                self._conclude("eos" if finished.reason == "stop" else "limit", finished)

    async def _read(self, runs: list[Tokens], last: bool) -> list[Delta]:
        pieces: tuple[str, ...] = ()
        if runs or (last and self._carry):
            tokens = np.array([token for run in runs for token in run.tokens], np.int32)
            began = time.monotonic_ns()
            decoded = await self._detokenizer.decode(tokens, self._carry, last=last)
            trace.span("gateway.detokenize", began, self._generation.request, 0, len(tokens))
            pieces, self._carry = decoded.pieces, decoded.carry
        deltas: list[Delta] = []
        at = 0
        for run in runs:
            own = pieces[at : at + len(run.tokens)]
            at += len(run.tokens)
            deltas.append(self._cut(run, own))
            if self._matcher.matched:
                return deltas
        if last:
            rest = self._matcher.feed("".join(pieces[at:])) + self._matcher.finish()
            if rest:
                deltas.append(Delta(rest))
        return deltas

    def _cut(self, run: Tokens, pieces: tuple[str, ...]) -> Delta:
        """The run up to the token that completes a stop string, if one does."""
        texts: list[str] = []
        for piece in pieces:
            texts.append(self._matcher.feed(piece))
            if self._matcher.matched:
                break
        kept = len(texts)
        self._n_tokens += kept
        return Delta("".join(texts), run.tokens[:kept], pieces[:kept], min(run.n_accepted, kept))

    async def _await_end(self) -> Finished | None:
        """The end of a generation that has been cancelled; None when it does not come: only its figures are lost."""
        deadline = time.monotonic() + CANCEL_TIMEOUT_S
        try:
            while self._generation.finished is None and (left := deadline - time.monotonic()) > 0:
                await self._generation.take(left)
        except ApiError:
            return None
        return self._generation.finished

    def _conclude(self, stop_type: StopType, finished: Finished | None) -> None:
        self.outcome = Outcome(
            stop_type,
            self._matcher.matched,
            self._generation.n_prompt,
            self._n_tokens,
            finished.target if finished else TargetStats(),
            finished.draft if finished else DraftStats(),
        )
