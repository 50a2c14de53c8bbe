"""The gateway's side of the tokenizer's socket.

Every question is stateless, so one that was lost with a tokenizer that restarted is simply asked again; a tokenizer
that has fallen silent is noticed by its heartbeat (`Describe`), and then nobody waits for it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zmq

from services.gateway.errors import ApiError, from_wire, unavailable
from shared.messages import Decode, Decoded, Describe, Description, Encode, Encoded, Error, Message
from shared.service import Service

BEAT_S = 0.25
SILENT_S = 5.0
"""How long after its last answer the tokenizer counts as gone."""
ASK_AGAIN_S = 2.0
"""How long a question may stay unanswered before it is sent again."""
TIMEOUT_S = 60.0
SMALL = 16_384
"""Characters or tokens up to which a question is sent again."""


@dataclass(slots=True)
class _Question:
    message: Message
    answer: asyncio.Future[Any]
    asked_at: float
    sent_at: float
    small: bool


class TokenizerClient:
    """Asks the tokenizer. Errors of `encode` and `decode`: `ApiError`.

    Attributes:
        description: of the vocabulary; None until the tokenizer has been heard.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._refs = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._heard_at = 0.0
        self._beat_sent_at = 0.0
        self._beat_answered = True
        self._was_alive = False
        self.description: Description | None = None
        self._link = service.link(
            "tokenizer",
            zmq.DEALER,
            {
                Description: self._on_description,
                Encoded: self._on_answer,
                Decoded: self._on_answer,
                Error: self._on_error,
            },
        )
        self._link.connect(service.settings.endpoint("tokenizer"))
        self._beat()
        service.every(BEAT_S, self._beat)

    @property
    def n_questions(self) -> int:
        """How many wait for an answer."""
        return len(self._questions)

    @property
    def alive(self) -> bool:
        return self.description is not None and time.monotonic() - self._heard_at < SILENT_S

    def describe(self) -> Description:
        """The vocabulary's description. Errors: `ApiError` 503 while the tokenizer is not there."""
        if self.description is None or not self.alive:
            raise unavailable("the tokenizer does not answer")
        return self.description

    async def encode(self, text: str, *, parse_special: bool = True, add_bos: bool = True) -> npt.NDArray[np.int32]:
        """[n] int32."""
        question = Encode(next(self._refs), text, parse_special, add_bos)
        return cast(Encoded, await self._ask(question, len(text) <= SMALL)).tokens

    async def decode(
        self,
        tokens: npt.NDArray[np.int32],
        carry: bytes = b"",
        *,
        first: bool = False,
        last: bool = False,
        special: bool = False,
    ) -> Decoded:
        """See `Decode`."""
        question = Decode(next(self._refs), tokens, carry, first, last, special)
        return cast(Decoded, await self._ask(question, len(tokens) <= SMALL))

    async def _ask(self, message: Encode | Decode, small: bool) -> Encoded | Decoded:
        self.describe()
        now = time.monotonic()
        question = _Question(message, self._service.loop.create_future(), now, now, small)
        self._questions[message.ref] = question
        try:
            if not self._link.send(message):
                raise unavailable("the tokenizer takes no more questions")
            return cast("Encoded | Decoded", await question.answer)
        finally:
            del self._questions[message.ref]

    def _beat(self) -> None:
        now = time.monotonic()
        if self._beat_answered or now - self._beat_sent_at > ASK_AGAIN_S:
            self._beat_answered, self._beat_sent_at = False, now
            self._link.send(Describe(next(self._refs)))
        alive = self.alive
        if alive != self._was_alive:
            self._was_alive = alive
            self._service.log.info("tokenizer_connected" if alive else "tokenizer_silent")
        for question in self._questions.values():
            if question.answer.done():
                continue
            if not alive:
                question.answer.set_exception(unavailable("the tokenizer does not answer"))
            elif now - question.asked_at > TIMEOUT_S:
                question.answer.set_exception(
                    ApiError(503, f"the tokenizer took more than {TIMEOUT_S:g} s", "timeout", retry_after_s=1)
                )
            elif question.small and now - question.sent_at > ASK_AGAIN_S:
                question.sent_at = now
                self._link.send(question.message)

    def _on_description(self, _peer: bytes, message: Description) -> None:
        self._heard_at = time.monotonic()
        self._beat_answered = True
        self.description = message

    def _on_answer(self, _peer: bytes, message: Encoded | Decoded) -> None:
        self._heard_at = time.monotonic()
        question = self._questions.get(message.ref)
        if question is not None and not question.answer.done():
            question.answer.set_result(message)

    def _on_error(self, _peer: bytes, message: Error) -> None:
        self._heard_at = time.monotonic()
        question = self._questions.get(message.ref)
        if question is None:
            self._service.log.warning("tokenizer_error", code=message.code, reason=message.message)
        elif not question.answer.done():
            question.answer.set_exception(from_wire(message))
