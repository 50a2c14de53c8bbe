"""The tokenizer: text to token ids and back, from the target's own vocabulary.

Stateless: what a stream of tokens leaves unfinished travels with the caller as `carry`. Long texts are worked on in a
thread, so that they do not hold up the few tokens that running generations send.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt
import zmq

from services.tokenizer.null import NullVocabulary
from shared import trace
from shared.engine.interface import EngineSettings
from shared.errors import DraftwireError, RequestError
from shared.messages import (
    MAX_CONTEXT,
    Decode,
    Decoded,
    Describe,
    Description,
    Encode,
    Encoded,
    Error,
    GetStatus,
    GetTrace,
    Message,
    Ping,
    Pong,
    ServiceStatus,
)
from shared.model.names import resolve_model
from shared.model.vocabulary import Vocabulary
from shared.service import Link, Service, version
from shared.settings import Settings

LONG_TEXT = 16_384
"""Characters or tokens from which a request goes to the thread."""
MAX_WAITING = 64
"""Long requests that wait for the thread; more are refused."""
MAX_DECODED_BYTES = 8 << 20
"""Most text that one `Decoded` may carry."""


class VocabularyLike(Protocol):
    """What the service needs of a vocabulary; see `shared.model.vocabulary.Vocabulary`."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def eog_ids(self) -> tuple[int, ...]: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def context_length(self) -> int | None: ...

    def encode(self, text: str, *, parse_special: bool, add_bos: bool | None = None) -> npt.NDArray[np.int32]: ...

    def decode(
        self, tokens: Sequence[int], carry: bytes = b"", *, special: bool = False, first: bool
    ) -> tuple[str, bytes]: ...

    def flush(self, carry: bytes) -> str: ...


def open_vocabulary(engine: EngineSettings) -> VocabularyLike:
    """The vocabulary of an engine's model. Errors: `ModelError`."""
    if engine.computing == "null":
        return NullVocabulary()
    return Vocabulary.open(resolve_model(engine.model))


def describe(vocabulary: VocabularyLike, ref: int) -> Description:
    """The answer to `Describe`."""
    return Description(
        ref,
        vocabulary.name[:200],
        vocabulary.fingerprint,
        vocabulary.n_vocab,
        vocabulary.context_length or 0,
        vocabulary.eog_ids,
        vocabulary.chat_template or "",
    )


def encode(vocabulary: VocabularyLike, message: Encode) -> Encoded:
    """The answer to `Encode`; add_bos means: as the model wants it.

    Raises:
        RequestError: the text is no Unicode, or has more tokens than a message holds.
    """
    began = time.monotonic_ns()
    tokens = vocabulary.encode(
        message.text, parse_special=message.parse_special, add_bos=None if message.add_bos else False
    )
    if len(tokens) > MAX_CONTEXT:
        raise RequestError(
            f"the text has {len(tokens)} tokens, more than the {MAX_CONTEXT} of any context",
            "send less",
            "text_too_long",
        )
    trace.span("tokenizer.encode", began, 0, 0, len(message.text), len(tokens))
    return Encoded(message.ref, tokens)


def decode(vocabulary: VocabularyLike, message: Decode) -> Decoded:
    """The answer to `Decode`: a piece for every token, and one for the flushed carry with the last ones.

    Raises:
        RequestError: an id that is not in the vocabulary, or more text than a message holds.
    """
    began = time.monotonic_ns()
    pieces: list[str] = []
    carry, first, size = message.carry, message.first, 0
    for token in message.tokens.tolist():
        piece, carry = vocabulary.decode((token,), carry, special=message.special, first=first)
        pieces.append(piece)
        first = first and not piece and not carry
        size += len(piece.encode())
        if size > MAX_DECODED_BYTES:
            raise RequestError(
                f"the text of these tokens has more than {MAX_DECODED_BYTES} bytes", "send fewer", "text_too_long"
            )
    if message.last:
        pieces.append(vocabulary.flush(carry))
        carry = b""
    trace.span("tokenizer.decode", began, 0, 0, len(message.tokens))
    return Decoded(message.ref, tuple(pieces), carry)


class TokenizerService(Service):
    """One socket: four questions, and what was recorded of them."""

    name = "tokenizer"

    def __init__(self, settings: Settings, instance: str = "") -> None:
        super().__init__(settings, instance)
        self._thread = ThreadPoolExecutor(1, "long-texts")
        self._n_waiting = 0
        self._vocabulary: VocabularyLike
        self._link: Link

    async def start(self) -> None:
        self._vocabulary = open_vocabulary(self.settings.verifier.engine)
        self._link = self.link(
            "tokenizer",
            zmq.ROUTER,
            {
                Describe: self._on_describe,
                Encode: self._on_encode,
                Decode: self._on_decode,
                Ping: self._on_ping,
                GetTrace: self._on_get_trace,
                GetStatus: self._on_status,
            },
        )
        self._link.bind(self.settings.endpoint("tokenizer"), "tokenizer")
        self.log.info(
            "vocabulary_opened",
            model=self._vocabulary.name,
            n_vocab=self._vocabulary.n_vocab,
            fingerprint=self._vocabulary.fingerprint,
        )

    def concerns(self, key: str) -> bool:
        return super().concerns(key) or key.startswith("verifier.engine.")

    def idle(self) -> bool:
        return self._n_waiting == 0

    def stop(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _on_describe(self, peer: bytes, message: Describe) -> None:
        self._link.send(describe(self._vocabulary, message.ref), peer)

    def _on_ping(self, peer: bytes, message: Ping) -> None:
        self._link.send(Pong(message.sent_ns, time.monotonic_ns()), peer)

    def _on_get_trace(self, peer: bytes, message: GetTrace) -> None:
        self._link.send(trace.answer(message, self.name, self.instance), peer)

    def _on_status(self, peer: bytes, message: GetStatus) -> None:
        about = self._vocabulary.name[:200]
        self._link.send(ServiceStatus(message.ref, self.name, version(), self.uptime_s, self._n_waiting, about), peer)

    def _on_encode(self, peer: bytes, message: Encode) -> None:
        self._answer(peer, message.ref, len(message.text), lambda: encode(self._vocabulary, message))

    def _on_decode(self, peer: bytes, message: Decode) -> None:
        self._answer(peer, message.ref, len(message.tokens), lambda: decode(self._vocabulary, message))

    def _answer(self, peer: bytes, ref: int, size: int, work: Callable[[], Message]) -> None:
        if size < LONG_TEXT:
            self._link.send(_outcome(ref, work), peer)
        elif self._n_waiting >= MAX_WAITING:
            self._link.send(Error(ref, "overloaded", "too many long texts wait for the tokenizer", "", 1), peer)
        else:
            self._n_waiting += 1
            self._thread.submit(self._work, peer, ref, work)

    def _work(self, peer: bytes, ref: int, work: Callable[[], Message]) -> None:
        try:
            answer = _outcome(ref, work)
        except BaseException as error:  # a defect: ends the process, as it would on the event loop
            self.fail_threadsafe(error)
        else:
            self.loop.call_soon_threadsafe(self._worked, peer, answer)

    def _worked(self, peer: bytes, answer: Message) -> None:
        self._n_waiting -= 1
        self._link.send(answer, peer)


def _outcome(ref: int, work: Callable[[], Message]) -> Message:
    try:
        return work()
    except DraftwireError as error:
        return Error(ref, error.code, error.message[:4000], error.remedy)


SERVICE = TokenizerService
