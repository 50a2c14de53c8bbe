"""Reading GGUF files (versions 2 and 3, split ones too) through a memory map.

Invariant: whatever bytes a file holds, reading it gives values or a `ModelError`, never another exception, and never
allocates more than a small multiple of the file's own size: every count and length is checked against the bytes that
are left before anything is made of it.

Layout, all little-endian: "GGUF", u32 version, u64 tensors, u64 metadata entries; the entries (key, u32 kind, value);
the tensor table (name, u32 dimensions, u64 each, u32 quant type, u64 offset from the data's start); padding to
`general.alignment`; the tensors' data. A string is a u64 length and UTF-8 bytes; an array is u32 kind, u64 count and
its items.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from shared.errors import ModelError
from shared.quant.recipes import RECIPES
from shared.quant.types import BY_ID, QuantType

UInt8 = npt.NDArray[np.uint8]

# What `metadata` holds: a scalar, or an array of scalars as NumPy array, or of strings as a tuple.
MetadataValue: TypeAlias = "int | float | bool | str | tuple[str, ...] | npt.NDArray[np.generic]"

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_DEFAULT_ALIGNMENT: Final = 32
_MAX_ALIGNMENT: Final = 1 << 20
_MAX_DIMENSIONS: Final = 4
_MAX_NAME: Final = 1 << 16
_SPLIT_NAME: Final = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.DOTALL)

_KIND_BOOL: Final = 7
_KIND_STRING: Final = 8
_KIND_ARRAY: Final = 9
_SCALARS: Final[Mapping[int, np.dtype[np.generic]]] = MappingProxyType(
    {
        0: np.dtype("<u1"),
        1: np.dtype("<i1"),
        2: np.dtype("<u2"),
        3: np.dtype("<i2"),
        4: np.dtype("<u4"),
        5: np.dtype("<i4"),
        6: np.dtype("<f4"),
        _KIND_BOOL: np.dtype("?"),
        10: np.dtype("<u8"),
        11: np.dtype("<i8"),
        12: np.dtype("<f8"),
    }
)

_DAMAGED: Final = "the file is damaged or was not fully copied: download or convert it again"

_unpack_u32 = struct.Struct("<I").unpack_from
_unpack_u64 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a GGUF.

    shape: in GGUF's order: shape[0] is the length of a row, which is contiguous.
    quant: how its rows are coded.
    offset: of its first byte in its file.
    n_bytes: of its data.
    part: which file holds it: an index into `GGUFFile.paths`, 0 unless the model is split.
    """

    name: str
    shape: tuple[int, ...]
    quant: QuantType
    offset: int
    n_bytes: int
    part: int

    @property
    def n_elements(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def n_rows(self) -> int:
        """Rows of shape[0] elements."""
        return self.n_elements // self.shape[0]


@dataclass(frozen=True, slots=True)
class _Span:
    """Where one metadata value lies: [start, end) in the file; kind and count of an array's items, or count -1."""

    kind: int
    count: int
    start: int
    end: int


class _Part:
    """One mapped file and what its header says."""

    def __init__(self, path: Path, index: int) -> None:
        self.path = path
        self.data = _map(path)
        self._view = self.data.data
        self._end = len(self.data)
        self._at = 0
        self.spans: dict[str, _Span] = {}
        self.tensors: list[TensorInfo] = []
        self._header()
        for _ in range(self.n_metadata):
            self._entry()
        self._table(index)

    # --- primitives: each moves `_at` or raises ---------------------------------------------------------------------

    def _need(self, n: int, what: str) -> int:
        """Move over n bytes and return where they begin."""
        start = self._at
        if n > self._end - start:
            raise ModelError(
                f"{self.path} ends inside {what}: {n - (self._end - start)} bytes are missing", _DAMAGED, "truncated"
            )
        self._at = start + n
        return start

    def _u32(self, what: str) -> int:
        value: int = _unpack_u32(self._view, self._need(4, what))[0]
        return value

    def _u64(self, what: str) -> int:
        value: int = _unpack_u64(self._view, self._need(8, what))[0]
        return value

    def _name(self, what: str) -> str:
        length = self._u64(what)
        if length > _MAX_NAME:
            raise self.damaged(f"{what} has a length of {length} bytes")
        start = self._need(length, what)
        return self.text(start, start + length, what)

    def text(self, start: int, end: int, what: str) -> str:
        try:
            return str(self._view[start:end], "utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: {what} is not UTF-8: {error.reason}", _DAMAGED, "bad_utf8") from None

    def damaged(self, message: str, code: str = "bad_gguf") -> ModelError:
        return ModelError(f"{self.path}: {message}", _DAMAGED, code)

    # --- the sections ------------------------------------------------------------------------------------------------

    def _header(self) -> None:
        magic = bytes(self._view[:4])
        if magic != _MAGIC:
            if len(magic) < 4 and _MAGIC.startswith(magic):
                self._need(24, "its header")
            raise ModelError(
                f"{self.path} is not a GGUF: it begins with {magic!r}",
                "give a .gguf file, or convert the model with llama.cpp's convert_hf_to_gguf.py",
                "not_gguf",
            )
        self._need(4, "its header")
        version = self._u32("its header")
        if version not in _VERSIONS:
            if version & 0xFFFF == 0 and int.from_bytes(version.to_bytes(4, "big"), "little") in _VERSIONS:
                raise ModelError(
                    f"{self.path} is a big-endian GGUF", "convert it with gguf-convert-endian", "big_endian"
                )
            raise ModelError(
                f"{self.path} has GGUF version {version}; versions 2 and 3 are supported",
                "convert the model again with a current llama.cpp",
                "unsupported_version",
            )
        self.n_tensors = self._u64("its header")
        self.n_metadata = self._u64("its header")
        left = self._end - self._at
        # The shortest entry is an empty key, a kind and one byte; the shortest tensor an empty name and one dimension.
        for count, shortest, what in ((self.n_metadata, 13, "metadata entries"), (self.n_tensors, 32, "tensors")):
            if count * shortest > left:
                raise self.damaged(f"{count} {what} cannot fit in the {left} bytes after the header", "bad_count")

    def _entry(self) -> None:
        key = self._name("a metadata key")
        if key in self.spans:
            raise self.damaged(f"metadata key {key!r} occurs twice", "duplicate_key")
        kind = self._u32(f"the kind of {key!r}")
        if kind == _KIND_ARRAY:
            kind = self._u32(f"the kind of {key!r}")
            count = self._u64(f"the length of {key!r}")
            start = self._at
            if kind == _KIND_STRING:
                self._skip_strings(key, count)
            elif kind in _SCALARS:
                self._need(count * _SCALARS[kind].itemsize, f"the {count} items of {key!r}")
            else:
                raise self.damaged(f"metadata {key!r} is an array of kind {kind}, which GGUF does not define here")
        else:
            count = -1
            start = self._at
            if kind == _KIND_STRING:
                length = self._u64(f"the length of {key!r}")
                start = self._need(length, f"the text of {key!r}")
            elif kind in _SCALARS:
                self._need(_SCALARS[kind].itemsize, f"the value of {key!r}")
            else:
                raise self.damaged(f"metadata {key!r} has kind {kind}, which GGUF does not define")
        self.spans[key] = _Span(kind, count, start, self._at)

    def _skip_strings(self, key: str, count: int) -> None:
        end, at, view = self._end, self._at, self._view
        if count * 8 > end - at:
            raise self.damaged(f"{count} strings of {key!r} cannot fit in the last {end - at} bytes", "bad_count")
        try:
            for _ in range(count):
                at += 8 + _unpack_u64(view, at)[0]
        except (struct.error, OverflowError):
            at = end + 1
        if at > end:
            raise ModelError(f"{self.path} ends inside the strings of {key!r}", _DAMAGED, "truncated")
        self._at = at

    def _table(self, index: int) -> None:
        rows: list[tuple[str, tuple[int, ...], QuantType, int, int]] = []
        names: set[str] = set()
        for _ in range(self.n_tensors):
            name = self._name("a tensor's name")
            if name in names:
                raise self.damaged(f"tensor {name!r} occurs twice", "duplicate_tensor")
            names.add(name)
            what = f"the table entry of tensor {name!r}"
            n_dimensions = self._u32(what)
            if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
                raise self.damaged(f"tensor {name!r} has {n_dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}")
            shape = tuple(self._u64(what) for _ in range(n_dimensions))
            type_id = self._u32(what)
            offset = self._u64(what)
            quant = BY_ID.get(type_id)
            if quant is None:
                raise ModelError(
                    f"{self.path}: tensor {name!r} has quant type id {type_id}, which this version does not know",
                    "requantize the model with llama-quantize to a known type, or update Draftwire",
                    "unknown_quant_type",
                )
            if 0 in shape:
                raise self.damaged(f"tensor {name!r} has the empty shape {shape}")
            if shape[0] % quant.block_size:
                raise self.damaged(f"tensor {name!r} has rows of {shape[0]}, no multiple of {quant.name}'s block size")
            n_bytes = quant.bytes_per_row(shape[0])
            for size in shape[1:]:
                n_bytes *= size
            rows.append((name, shape, quant, offset, n_bytes))
        alignment = self._alignment()
        base = -(-self._at // alignment) * alignment
        missing, last = 0, ""
        for name, shape, quant, offset, n_bytes in rows:
            if offset % alignment:
                raise self.damaged(f"tensor {name!r} begins at {offset}, no multiple of the alignment {alignment}")
            over = base + offset + n_bytes - self._end
            if over > missing:
                missing, last = over, name
            self.tensors.append(TensorInfo(name, shape, quant, base + offset, n_bytes, index))
        if missing:
            raise ModelError(
                f"{self.path} ends inside its tensors' data ({last!r}): {missing} bytes are missing",
                _DAMAGED,
                "truncated",
            )
        end, before = 0, ""
        for info in sorted(self.tensors, key=lambda info: info.offset):
            if info.offset < end:
                raise self.damaged(f"the data of tensors {before!r} and {info.name!r} overlap")
            end, before = info.offset + info.n_bytes, info.name

    def _alignment(self) -> int:
        if "general.alignment" not in self.spans:
            return _DEFAULT_ALIGNMENT
        value = self.value("general.alignment")
        if not isinstance(value, int) or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
            raise self.damaged(f"general.alignment is {value!r}, not a power of two up to {_MAX_ALIGNMENT}")
        return value

    def value(self, key: str) -> MetadataValue:
        """Decode one metadata value; KeyError for an unknown key."""
        span = self.spans[key]
        if span.kind == _KIND_STRING:
            if span.count < 0:
                return self.text(span.start, span.end, f"metadata {key!r}")
            return self._strings(key, span)
        raw = self.data[span.start : span.end]
        if span.kind == _KIND_BOOL and len(raw) and raw.max() > 1:
            raise self.damaged(f"metadata {key!r} holds a boolean that is neither 0 nor 1")
        array = np.frombuffer(raw.tobytes(), _SCALARS[span.kind])
        if span.count >= 0:
            return array
        scalar: int | float | bool = array[0].item()
        return scalar

    def _strings(self, key: str, span: _Span) -> tuple[str, ...]:
        at, view = 0, self.data[span.start : span.end].tobytes()
        texts: list[str] = []
        try:
            for _ in range(span.count):
                start = at + 8
                at = start + _unpack_u64(view, at)[0]
                texts.append(view[start:at].decode())
        except UnicodeDecodeError as error:
            raise ModelError(
                f"{self.path}: item {len(texts)} of {key!r} is not UTF-8: {error.reason}", _DAMAGED, "bad_utf8"
            ) from None
        return tuple(texts)


class _Metadata(Mapping[str, MetadataValue]):
    """The metadata of one file; values are decoded when first asked for, and kept."""

    def __init__(self, part: _Part) -> None:
        self._part: _Part | None = part
        self._path = part.path
        self._keys = tuple(part.spans)
        self._values: dict[str, MetadataValue] = {}

    def __getitem__(self, key: str) -> MetadataValue:
        if key in self._values:
            return self._values[key]
        if self._part is None:
            if key in self._keys:
                raise _closed(self._path)
            raise KeyError(key)
        value = self._values[key] = self._part.value(key)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def close(self) -> None:
        self._part = None


class GGUFFile:
    """An open GGUF: metadata, tensor table and the mapped bytes of each tensor.

    `close` (or leaving a `with` block) drops the object's hold on the maps; arrays handed out before stay valid, and
    the memory is unmapped when the last of them goes.

    path: the file that was opened (the first part of a split model).
    paths: every part's file.
    metadata: the first part's metadata. Numbers, booleans and strings as such; arrays of strings as tuples, other
        arrays as read-only NumPy arrays. Reading a value raises `ModelError` when its bytes are no valid value.
    tensors: every part's tensors by name, in the files' order.
    """

    def __init__(self, parts: list[_Part]) -> None:
        self.path = parts[0].path
        self.paths = tuple(part.path for part in parts)
        self._metadata = _Metadata(parts[0])
        self.metadata: Mapping[str, MetadataValue] = self._metadata
        tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for info in part.tensors:
                if info.name in tensors:
                    raise part.damaged(f"tensor {info.name!r} occurs twice", "duplicate_tensor")
                tensors[info.name] = info
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self._parts: list[_Part] = parts

    @classmethod
    def open(cls, path: Path | str) -> GGUFFile:
        """Open a GGUF; of a split one, the first part.

        Raises:
            ModelError: the file or a part of it is missing, damaged or not supported. `code` is one of
                model_not_found, not_gguf, big_endian, unsupported_version, truncated, bad_count, bad_utf8, bad_gguf,
                duplicate_key, duplicate_tensor, unknown_quant_type, bad_split.
        """
        path = Path(path)
        first = _Part(path, 0)
        count = _split_number(first, "split.count", 1)
        if count <= 1:
            return cls([first])
        match = _SPLIT_NAME.match(path.name)
        if match is None:
            raise ModelError(
                f"{path} is a part of a model split into {count} files, but is not named like one",
                f"restore the names NAME-00001-of-{count:05}.gguf, or merge them with llama-gguf-split --merge",
                "bad_split",
            )

        def part_path(number: int) -> Path:
            return path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf")

        number = _split_number(first, "split.no", 0)
        if number != 0:
            raise ModelError(
                f"{path} is part {number + 1} of a model split into {count} files",
                f"give the first part, {part_path(1)}",
                "bad_split",
            )
        if int(match["count"]) != count:
            raise first.damaged(f"it says {count} parts, its name says {int(match['count'])}", "bad_split")
        for later in range(2, count + 1):
            if not part_path(later).is_file():
                raise ModelError(
                    f"{part_path(later)} is missing: the model is split into {count} files",
                    "download the missing part beside the first one",
                    "model_not_found",
                )
        parts = [first]
        for later in range(2, count + 1):
            part = _Part(part_path(later), later - 1)
            number = _split_number(part, "split.no", -1)
            if number != later - 1 or _split_number(part, "split.count", -1) != count:
                raise part.damaged(f"it is not part {later} of {count}, as its name says", "bad_split")
            parts.append(part)
        n_tensors = sum(part.n_tensors for part in parts)
        expected = _split_number(first, "split.tensors.count", n_tensors)
        if n_tensors != expected:
            raise first.damaged(f"the model has {expected} tensors, its parts hold {n_tensors}", "bad_split")
        return cls(parts)

    def raw(self, name: str) -> UInt8:
        """The mapped bytes of a tensor: [n_bytes] uint8, read-only.

        Raises:
            ModelError: no such tensor, or the file is closed.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.path} has no tensor {name!r}", code="missing_tensor")
        if not self._parts:
            raise _closed(self.path)
        return self._parts[info.part].data[info.offset : info.offset + info.n_bytes]

    def raw_metadata(self, key: str) -> bytes:
        """The bytes of a metadata value as they stand in the file, without its kind and an array's count.

        Raises:
            ModelError: no such key, or the file is closed.
        """
        if not self._parts:
            raise _closed(self.path)
        span = self._parts[0].spans.get(key)
        if span is None:
            raise ModelError(f"{self.path} has no metadata {key!r}", code="missing_metadata")
        return self._parts[0].data[span.start : span.end].tobytes()

    def close(self) -> None:
        """Let go of the maps. Metadata that was read before stays readable. A second call does nothing."""
        self._parts = []
        self._metadata.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def vocabulary_fingerprint(file: GGUFFile) -> str:
    """What must agree between a draft and a target: 32 hex digits (BLAKE2b-128).

    Covers the tokenizer's model, every token's bytes, every token's type, and the ids of the tokens that begin and end
    a text or a turn. Merges are left out: two tokenizers with equal tokens are interchangeable on token ids.

    Raises:
        ModelError: the file carries no vocabulary (code missing_metadata), or a broken one.
    """
    metadata = file.metadata
    model = metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str) or not isinstance(metadata.get("tokenizer.ggml.tokens"), tuple):
        raise ModelError(
            f"{file.path} carries no vocabulary",
            "convert the model again with its tokenizer, or give the first part of a split one",
            "missing_metadata",
        )
    digest = hashlib.blake2b(digest_size=16)

    def add(label: str, data: bytes) -> None:
        digest.update(f"{label}:{len(data)}:".encode())
        digest.update(data)

    add("model", model.encode())
    # Each token is preceded by its length in the file, so that no two vocabularies have the same bytes.
    add("tokens", file.raw_metadata("tokenizer.ggml.tokens"))
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        add("types", b"")
    elif isinstance(types, np.ndarray) and types.dtype.kind in "iu":
        add("types", types.astype("<i8").tobytes())
    else:
        raise ModelError(f"{file.path}: tokenizer.ggml.token_type is no array of integers", _DAMAGED, "bad_metadata")
    for name in ("bos", "eos", "eot"):
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ModelError(f"{file.path}: tokenizer.ggml.{name}_token_id is no integer", _DAMAGED, "bad_metadata")
        add(name, b"" if value is None else str(value).encode())
    return digest.hexdigest()


def recipe_name(file: GGUFFile) -> str:
    """How the model is quantized, in a word: llama.cpp's name of its recipe ("Q4_K_M").

    Where the file does not say, or says what is not known here, the quant type that holds most of its bytes.
    """
    number = file.metadata.get("general.file_type")
    if isinstance(number, int) and not isinstance(number, bool) and number in RECIPES:
        return RECIPES[number]
    n_bytes: dict[str, int] = {}
    for tensor in file.tensors.values():
        n_bytes[tensor.quant.name] = n_bytes.get(tensor.quant.name, 0) + tensor.n_bytes
    return max(n_bytes, key=lambda name: n_bytes[name], default="")


def _closed(path: Path) -> ModelError:
    return ModelError(f"{path} is closed", "read it before closing the file", "closed")


def _map(path: Path) -> UInt8:
    """The whole file: [size] uint8, read-only."""
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a directory", "give the GGUF file in it", "model_not_found")
        size = path.stat().st_size
        if size == 0:
            raise ModelError(f"{path} is empty: 24 bytes of its header are missing", _DAMAGED, "truncated")
        return np.asarray(np.memmap(path, np.uint8, "r", shape=(size,)))
    except FileNotFoundError:
        raise ModelError(f"there is no model file {path}", "give the path of a GGUF", "model_not_found") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}", "check the path and permissions", "model_not_found") from None


def _split_number(part: _Part, key: str, default: int) -> int:
    if key not in part.spans:
        return default
    value = part.value(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise part.damaged(f"{key} is no integer", "bad_split")
    return value
