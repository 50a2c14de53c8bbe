"""ik_llama.cpp's own tokenizer, for vocabularies that `vocabulary.py` does not read itself, such as SentencePiece's.

Invariant: only the vocabulary is loaded, never the weights; whatever ik refuses becomes a `ModelError`.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import EngineError, ModelError

_ATTRIBUTE_UNKNOWN = 1 << 0
_ATTRIBUTE_CONTROL = 1 << 3


class IkTokenizer:
    """A vocabulary loaded by ik_llama.cpp.

    control, unknown: the ids that ik gives these attributes; pieces: the bytes of every token, control tokens too.
    """

    def __init__(self, path: Path, what: str) -> None:
        """Load the vocabulary of `path`; `what` names its kind in errors.

        Raises:
            ModelError: the package is missing, or refuses the file (code unknown_tokenizer).
        """
        # Here and not above: most vocabularies need no engine.
        from shared.engine.ik.library import load_library

        try:
            library = load_library()
        except EngineError as error:
            raise ModelError(
                f"{path}: its {what} is not among those that Draftwire reads itself, and ik_llama.cpp's reader is"
                f" missing: {error.message}",
                f"{error.remedy}; or use a model with a pre-tokenizer of shared/model/pretokenizers.py",
                "unknown_tokenizer",
            ) from error
        self._api = api = library.api
        parameters = api.llama_model_default_params()
        parameters.vocab_only = True
        library.log.clear()
        model = self._model = api.llama_model_load_from_file(os.fsencode(path), parameters)
        if not model:
            reason = library.log.reason() or "no reason given"
            raise ModelError(
                f"{path}: neither Draftwire nor ik_llama.cpp reads its {what}: {reason}",
                "convert the model with a tokenizer.ggml.pre that one of them knows",
                "unknown_tokenizer",
            )
        weakref.finalize(self, api.llama_free_model, model)

        def bind(name: str, *more: Any) -> Any:
            # An object of our own: the library's attribute is shared with its other users.
            return ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, *more)((name, api._lib))

        attribute_of = bind("llama_token_get_attr", ctypes.c_int32)
        self.n_vocab = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)))
        attributes = [attribute_of(model, i) for i in range(self.n_vocab)]
        self.control = frozenset(i for i, bits in enumerate(attributes) if bits & _ATTRIBUTE_CONTROL)
        self.unknown = frozenset(i for i, bits in enumerate(attributes) if bits & _ATTRIBUTE_UNKNOWN)
        self.eog_ids = tuple(i for i in range(self.n_vocab) if api.llama_token_is_eog(model, i))
        self.bos_id = _id(bind("llama_token_bos")(model))
        self.eos_id = _id(bind("llama_token_eos")(model))
        self.add_bos = bind("llama_add_bos_token")(model) == 1
        self.add_eos = bind("llama_add_eos_token")(model) == 1
        self.pieces = tuple(self._piece(i) for i in range(self.n_vocab))

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        data = text.encode()
        buffer: npt.NDArray[np.int32] = np.empty(len(data) + 16, np.int32)
        n = self._tokenize(data, buffer, parse_special)
        if n < 0:
            buffer = np.empty(-n, np.int32)
            n = self._tokenize(data, buffer, parse_special)
        ids: list[int] = buffer[:n].tolist()
        return ids

    def _tokenize(self, data: bytes, buffer: npt.NDArray[np.int32], parse_special: bool) -> int:
        pointer = buffer.ctypes.data_as(self._api.llama_token_p)
        # In 0.1.5 the first argument is the model.
        return int(self._api.llama_tokenize(self._model, data, len(data), pointer, len(buffer), False, parse_special))

    def _piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._api.llama_token_to_piece(self._model, token, buffer, size, 0, True)
            if n >= 0:
                return buffer.raw[:n]
            size = -n


def _id(token: int) -> int | None:
    return int(token) if token >= 0 else None
