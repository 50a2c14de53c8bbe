"""The vocabulary of the null engine, which has no model file: ids of bytes, and ids with a made-up piece.

Invariant: `decode(encode(text))` is the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.engine.null import FIRST_ID
from shared.errors import RequestError

_N_BYTES = 256


class NullVocabulary:
    """Ids below FIRST_ID are control tokens, the next 256 are bytes, and any other is its number in hexadecimal."""

    name = "null"
    eog_ids: tuple[int, ...] = (0,)
    chat_template: str | None = None
    context_length: int | None = None

    def __init__(self, n_vocab: int = 8192) -> None:
        self.n_vocab = n_vocab
        self.fingerprint = f"null:{n_vocab}"
        controls = [f"<control {token}>".encode() for token in range(FIRST_ID)]
        single_bytes = [bytes([value]) for value in range(_N_BYTES)]
        numbers = [f" {token:x}".encode() for token in range(FIRST_ID + _N_BYTES, n_vocab)]
        self._pieces = [*controls, *single_bytes, *numbers]

    def encode(self, text: str, *, parse_special: bool, add_bos: bool | None = None) -> npt.NDArray[np.int32]:
        """The text's UTF-8, an id a byte; there are no special tokens to parse and there is no BOS."""
        del parse_special, add_bos
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + FIRST_ID

    def decode(
        self, tokens: Sequence[int], carry: bytes = b"", *, special: bool = False, first: bool
    ) -> tuple[str, bytes]:
        """See `Vocabulary.decode`."""
        del first
        parts = [carry]
        for token in tokens:
            if not 0 <= token < self.n_vocab:
                raise RequestError(
                    f"token id {token} is not in the null vocabulary",
                    f"its ids are 0 to {self.n_vocab - 1}",
                    "invalid_token",
                )
            if special or token >= FIRST_ID:
                parts.append(self._pieces[token])
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(b"".join(parts))
        return text, decoder.getstate()[0]

    @staticmethod
    def flush(carry: bytes) -> str:
        """The text of the bytes that are left when a stream ends."""
        return carry.decode(errors="replace")
