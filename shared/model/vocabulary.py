"""Text to token ids and back, from a GGUF's own vocabulary.

Invariants:
* Encoding gives the ids that llama.cpp gives; `pretokenizers.py` names ik_llama.cpp's mistakes, which are not copied.
* Detokenizing is stateless: however a token sequence is cut into calls, the concatenated texts are the same.

Byte-level BPE ("gpt2", what nearly every MoE uses) runs on HF `tokenizers`; anything else on ik_llama.cpp's tokenizer.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence

from shared.errors import ModelError, RequestError
from shared.model.gguf import GGUFFile, MetadataValue, vocabulary_fingerprint
from shared.model.ik_vocabulary import IkTokenizer
from shared.model.pretokenizers import PRETOKENIZERS, PreTokenizer

Tokens: TypeAlias = "Sequence[int] | npt.NDArray[np.integer]"

# Token types of `tokenizer.ggml.token_type`.
_NORMAL: Final = 1
_UNKNOWN: Final = 2
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_BYTE: Final = 6
_MARKED: Final = (_UNKNOWN, _CONTROL, _USER_DEFINED)

# Tokens that end a generation whatever the metadata says, by their text: llama.cpp's list.
_END_TEXTS: Final = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>"),
)
# Fill-in-the-middle tokens: (names of the metadata's key, whether it ends a generation, texts where no key is there).
_FIM_TEXTS: Final[tuple[tuple[tuple[str, ...], bool, tuple[str, ...]], ...]] = (
    (
        ("fim_pre", "prefix"),
        False,
        (
            *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
            *("<|code_prefix|>", "<|prefix|>"),
        ),
    ),
    (
        ("fim_suf", "suffix"),
        False,
        (
            *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
            *("<|code_suffix|>", "<|suffix|>"),
        ),
    ),
    (
        ("fim_mid", "middle"),
        False,
        (
            *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
            *("<|code_middle|>", "<|middle|>"),
        ),
    ),
    (("fim_pad",), True, ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    (("fim_rep",), True, ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    (("fim_sep",), True, ("<|file_sep|>",)),
)
# Parts of OpenAI's harmony format, which llama.cpp always shows.
_SHOWN_TEXTS: Final = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

_DAMAGED: Final = "convert the model again"


class _Encoder(Protocol):
    def encode(self, text: str, parse_special: bool) -> list[int]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """The tokens of one model. Immutable; safe to use from several threads.

    name: of the model, from the file's metadata, else the file's name.
    fingerprint: what must agree between a draft and a target.
    bos_id: the token that begins a text, if there is one; add_bos: whether the model wants it; add_eos likewise.
    eog_ids: ascending; a generation ends with any of these.
    chat_template: Jinja source, if the file has one.
    context_length: positions that the model was made for, if the file says so.
    """

    name: str
    fingerprint: str
    n_vocab: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    eog_ids: tuple[int, ...]
    chat_template: str | None = field(repr=False)
    context_length: int | None
    _pieces: tuple[bytes, ...] = field(repr=False)
    _control: frozenset[int] = field(repr=False)
    _hidden: frozenset[int] = field(repr=False)
    _space_prefix: bool = field(repr=False)
    _encoder: _Encoder = field(repr=False)

    @classmethod
    def open(cls, path: Path | str) -> Vocabulary:
        """Read the vocabulary of a GGUF.

        Raises:
            ModelError: no such file, not a GGUF, no vocabulary in it, a broken one, or one of a kind that cannot be
                read here (code unknown_tokenizer).
        """
        with GGUFFile.open(path) as file:
            return cls._read(file)

    @classmethod
    def _read(cls, file: GGUFFile) -> Vocabulary:
        fingerprint = vocabulary_fingerprint(file)
        metadata = _Metadata(file.path, file.metadata)
        model = metadata.text("tokenizer.ggml.model") or ""
        pre = metadata.text("tokenizer.ggml.pre") or "default"
        tokens = metadata.texts("tokenizer.ggml.tokens")
        # llama.cpp's name for an entry without text.
        tokens = tuple(token or f"[EMPTY_{i}]" for i, token in enumerate(tokens))
        ids = {token: i for i, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            twice = next(i for i, token in enumerate(tokens) if ids[token] != i)
            raise ModelError(f"{file.path}: tokens {twice} and {ids[tokens[twice]]} have the same text", _DAMAGED)

        bos, eos = metadata.token("bos", len(tokens)), metadata.token("eos", len(tokens))
        encoder: _Encoder | None = None
        if model == "gpt2" and pre in PRETOKENIZERS:
            entry = PRETOKENIZERS[pre]
            add_bos = metadata.flag("tokenizer.ggml.add_bos_token", entry.add_bos)
            add_eos = metadata.flag("tokenizer.ggml.add_eos_token", False)
            kinds = metadata.kinds(len(tokens))
            eog = _classify(metadata, ids, kinds, eos)
            pieces = _pieces(tokens, kinds)
            control = frozenset(i for i, kind in enumerate(kinds) if kind == _CONTROL)
            unknown = frozenset(i for i, kind in enumerate(kinds) if kind == _UNKNOWN)
            space_prefix = False
            encoder = _BytePairEncoder(file.path, ids, kinds, metadata.texts("tokenizer.ggml.merges"), entry)
        else:
            what = f"tokenizer {model!r}" + (f" with pre-tokenizer {pre!r}" if model == "gpt2" else "")
            ik = IkTokenizer(file.path, what)
            if ik.n_vocab != len(tokens):
                raise ModelError(f"{file.path}: ik_llama.cpp reads {ik.n_vocab} of its {len(tokens)} tokens", _DAMAGED)
            bos, eos, add_bos, add_eos, eog = ik.bos_id, ik.eos_id, ik.add_bos, ik.add_eos, ik.eog_ids
            pieces, control, unknown = ik.pieces, ik.control, ik.unknown
            space_prefix = metadata.flag("tokenizer.ggml.add_space_prefix", model == "llama")
            encoder = ik
        for wanted, token, word in ((add_bos, bos, "bos"), (add_eos, eos, "eos")):
            if wanted and token is None:
                raise ModelError(
                    f"{file.path} asks for a {word.upper()} token and names none",
                    f"set tokenizer.ggml.{word}_token_id, or tokenizer.ggml.add_{word}_token to false",
                )
        return cls(
            name=metadata.text("general.name") or file.path.stem,
            fingerprint=fingerprint,
            n_vocab=len(tokens),
            bos_id=bos,
            eos_id=eos,
            add_bos=add_bos,
            add_eos=add_eos,
            eog_ids=eog,
            chat_template=metadata.text("tokenizer.chat_template"),
            context_length=metadata.integer(f"{metadata.text('general.architecture')}.context_length"),
            _pieces=pieces,
            _control=control,
            _hidden=control | unknown,
            _space_prefix=space_prefix,
            _encoder=encoder,
        )

    def encode(self, text: str, *, parse_special: bool, add_bos: bool | None = None) -> npt.NDArray[np.int32]:
        """Token ids of a text.

        Args:
            parse_special: whether control tokens written out in the text become those tokens; else they are plain
                text, as what a user typed must be.
            add_bos: None frames the text as the model wants it (BOS before, EOS after); True the same with BOS in any
                case; False adds neither, for a text that continues another or that a chat template has framed.

        Raises:
            RequestError: the text holds half of a surrogate pair, or BOS is asked of a vocabulary without one.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code_point = ord(text[error.start])
            raise RequestError(
                f"the text is not Unicode: character {error.start} is the lone surrogate U+{code_point:04X}",
                "send surrogates in pairs",
                "invalid_text",
            ) from None
        ids = self._encoder.encode(text, parse_special) if text else []
        if add_bos or (add_bos is None and self.add_bos):
            if self.bos_id is None:
                raise RequestError(f"the vocabulary of {self.name} has no BOS token", "leave add_bos out", "no_bos")
            ids.insert(0, self.bos_id)
        if add_bos is not False and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return np.array(ids, np.int32)

    def decode(self, tokens: Tokens, carry: bytes = b"", *, special: bool = False, first: bool) -> tuple[str, bytes]:
        """The text that a run of tokens completes, and the bytes that wait for the next run.

        Bytes that are no UTF-8 become U+FFFD exactly as `bytes.decode(errors="replace")` of the whole would have it.

        Args:
            carry: what the previous call for this stream returned; `flush` turns the last one into text.
            special: whether control tokens appear, as their text.
            first: these tokens begin a text of their own; vocabularies that put a space before every text take it off
                again. False for what continues a prompt.

        Raises:
            RequestError: an id that is not in the vocabulary.
        """
        pieces, hidden, n = self._pieces, self._hidden, self.n_vocab
        parts = [carry]
        for token in tokens.tolist() if isinstance(tokens, np.ndarray) else tokens:
            if not 0 <= token < n:
                raise self._no_such_token(token)
            if special or token not in hidden:
                parts.append(pieces[token])
        data = b"".join(parts)
        if first and self._space_prefix:
            data = data.removeprefix(b" ")
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(data)
        return text, decoder.getstate()[0]

    @staticmethod
    def flush(carry: bytes) -> str:
        """The text of the bytes that are left when a stream ends."""
        return carry.decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; of a control token its name.

        Raises:
            RequestError: an id that is not in the vocabulary.
        """
        if not 0 <= token < self.n_vocab:
            raise self._no_such_token(token)
        return self._pieces[token]

    def is_control(self, token: int) -> bool:
        """Whether a token gives no text of its own; False also for an id outside of the vocabulary."""
        return token in self._control

    def _no_such_token(self, token: int) -> RequestError:
        return RequestError(
            f"token id {token} is not in the vocabulary of {self.name}",
            f"its ids are 0 to {self.n_vocab - 1}",
            "invalid_token",
        )


class _BytePairEncoder:
    """Byte-level BPE, with tokens that are cut out of the text before any pattern sees it."""

    def __init__(
        self, path: Path, ids: dict[str, int], kinds: Sequence[int], merges: Sequence[str], pre: PreTokenizer
    ) -> None:
        # The first of two equal merges counts. No byte is written as a space.
        pairs: list[tuple[str, str]] = []
        for merge in dict.fromkeys(merges):
            left, _, right = merge.partition(" ")
            if not left or not right or " " in right:
                raise ModelError(f"{path}: merge {merge!r} is not two tokens with a space between", _DAMAGED)
            pairs.append((left, right))
        # A byte without a token gives none, but keeps its neighbours apart: it gets an id that encode takes out again.
        self._n_vocab = len(ids)
        lacking = [chr(character) for character in _byte_characters() if chr(character) not in ids]
        self._lacks_bytes = bool(lacking)
        try:
            model = BPE(
                vocab={**ids, **{text: len(ids) + i for i, text in enumerate(lacking)}},
                merges=pairs,
                ignore_merges=pre.ignore_merges,
            )
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise ModelError(f"{path}: its merges do not fit its tokens: {error}", _DAMAGED) from error
        self._tokenizer = Tokenizer(model)
        self._tokenizer.pre_tokenizer = PreTokenizerSequence(
            [Split(Regex(pattern), "isolated") for pattern in pre.patterns]
            + [ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        # Longer tokens are looked for first, wherever they stand, as llama.cpp does.
        marked = [(text, i) for text, i in ids.items() if kinds[i] in _MARKED]
        marked.sort(key=lambda item: -len(item[0].encode()))
        self._all = tuple(marked)
        self._user_defined = tuple((text, i) for text, i in marked if kinds[i] == _USER_DEFINED)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        ids: list[int] = []
        for part in _cut(text, self._all if parse_special else self._user_defined):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._tokenizer.encode(part, add_special_tokens=False).ids
        return [i for i in ids if i < self._n_vocab] if self._lacks_bytes else ids


def _cut(text: str, marked: Sequence[tuple[str, int]]) -> list[str | int]:
    """The text with every occurrence of a marked token replaced by its id, and the texts between."""
    parts: list[str | int] = [text]
    for mark, token in marked:
        if mark not in text:
            continue
        cut: list[str | int] = []
        for part in parts:
            if isinstance(part, int):
                cut.append(part)
                continue
            for i, piece in enumerate(part.split(mark)):
                if i:
                    cut.append(token)
                if piece:
                    cut.append(piece)
        parts = cut
    return parts


def _classify(metadata: _Metadata, ids: Mapping[str, int], kinds: list[int], eos: int | None) -> tuple[int, ...]:
    """The ids that end a generation, and corrections to `kinds` (in place), by llama.cpp's rules.

    Unlike llama.cpp, a file that names no EOS does not make token 11 one.
    """
    ends: set[int] = set()
    for keys, is_end, texts in _FIM_TEXTS:
        token = next((i for key in keys if (i := metadata.token(key, len(kinds))) is not None), None)
        if token is None:
            token = next((ids[text] for text in texts if text in ids), None)
            if token is None:
                continue
            kinds[token] = _CONTROL
        if is_end:
            ends.add(token)
    for text in _END_TEXTS:
        if text in ids:
            ends.add(ids[text])
            kinds[ids[text]] = _CONTROL
    for text in _SHOWN_TEXTS:
        if text in ids:
            kinds[ids[text]] = _USER_DEFINED
    ends |= {i for i in (eos, metadata.token("eot", len(kinds)), metadata.token("eom", len(kinds))) if i is not None}

    texts_of_ends = {text for text in _END_TEXTS if text in ids}
    # In these formats a turn goes on after <|end|>.
    calls = bool(texts_of_ends & {"<|call|>", "<|calls|>"})
    if "<|end|>" in texts_of_ends and calls and texts_of_ends & {"<|return|>", "<|flush|>"}:
        ends.discard(ids["<|end|>"])
        kinds[ids["<|end|>"]] = _USER_DEFINED
    if {"<|tool_response>", "</s>"} <= texts_of_ends:
        ends.discard(ids["</s>"])
        kinds[ids["</s>"]] = _NORMAL
    return tuple(sorted(ends))


def _byte_characters() -> dict[int, int]:
    """GPT-2's spelling of bytes: character that stands for a byte -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


def _pieces(tokens: Sequence[str], kinds: Sequence[int]) -> tuple[bytes, ...]:
    """The bytes of every token. A character that stands for no byte gives its UTF-8."""
    bytes_of = {character: chr(byte) for character, byte in _byte_characters().items()}
    pieces: list[bytes] = []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == _NORMAL:
            try:
                pieces.append(token.translate(bytes_of).encode("latin-1"))
            except UnicodeEncodeError:
                pieces.append(b"".join(_character_bytes(character, bytes_of) for character in token))
        elif kind in _MARKED:
            pieces.append(token.encode())
        elif kind == _BYTE and len(token) == 6 and token.startswith("<0x"):
            pieces.append(bytes.fromhex(token[3:5]))
        else:
            pieces.append(b"")
    return tuple(pieces)


def _character_bytes(character: str, bytes_of: Mapping[int, str]) -> bytes:
    byte = bytes_of.get(ord(character))
    return character.encode() if byte is None else byte.encode("latin-1")


class _Metadata:
    """Typed access to a GGUF's metadata: the wrong type is a ModelError, an absent key None."""

    def __init__(self, path: Path, values: Mapping[str, MetadataValue]) -> None:
        self._path = path
        self._values = values

    def text(self, key: str) -> str | None:
        value = self._values.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(key, "a text")

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key)
        if value is None:
            raise ModelError(f"{self._path} has no {key}", _DAMAGED, "missing_metadata")
        if not isinstance(value, tuple):
            raise self._wrong(key, "an array of texts")
        return value

    def integer(self, key: str) -> int | None:
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "an integer")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "a boolean")
        return value

    def token(self, name: str, n_vocab: int) -> int | None:
        """The id in `tokenizer.ggml.<name>_token_id`; one outside of the vocabulary counts as absent."""
        token = self.integer(f"tokenizer.ggml.{name}_token_id")
        return token if token is not None and 0 <= token < n_vocab else None

    def kinds(self, n_vocab: int) -> list[int]:
        """The type of every token; all normal where the file has no types."""
        key = "tokenizer.ggml.token_type"
        value = self._values.get(key)
        if value is None:
            return [_NORMAL] * n_vocab
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self._wrong(key, "an array of integers")
        if len(value) < n_vocab:
            raise ModelError(f"{self._path}: {key} has {len(value)} entries for {n_vocab} tokens", _DAMAGED)
        kinds: list[int] = value[:n_vocab].tolist()
        return kinds

    def _wrong(self, key: str, expected: str) -> ModelError:
        return ModelError(f"{self._path}: {key} is not {expected}", _DAMAGED, "bad_metadata")
