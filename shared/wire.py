"""Messages to frames and back.

A message is a multipart: first a msgpack header `[version, type name, [field, ...]]` with fields in the order of the
dataclass, then one raw frame for each array field that is not empty. An array's place in the header holds its shape;
dtype and number of dimensions are the schema's. Byte order is little-endian.

Invariant: `decode` returns a message whose every field has the declared type and range, or raises `WireError`;
nothing else, whatever the bytes.
"""

from __future__ import annotations

import math
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgpack  # type: ignore[import-untyped]
import numpy as np

from shared import messages
from shared.errors import WireError
from shared.fields import Array, Range
from shared.messages import PROTOCOL_VERSION, Message

if sys.byteorder != "little":
    raise ImportError("Draftwire's wire format is little-endian and has no byte swapping; this machine is big-endian")

MAX_HEADER_BYTES = 16 << 20
MAX_FRAMES = 16
MAX_MESSAGE_BYTES = 512 << 20

Frame = bytes | memoryview
Check = Callable[[Any], Any]
"""Takes a value as msgpack gave it, returns it as the dataclass wants it, or raises `WireError`."""


def encode(message: Message) -> list[Frame]:
    """A message as frames. Arrays are not copied: they must not change until the frames are sent."""
    schema = _SCHEMAS[type(message)]
    values: list[Any] = []
    frames: list[Frame] = [b""]
    for name, pack, array in schema.packers:
        value = getattr(message, name)
        if array is not None:
            contiguous = np.ascontiguousarray(value, array)
            if contiguous.size:
                frames.append(contiguous.data.cast("B"))
            values.append(contiguous.shape)
        else:
            values.append(pack(value) if pack is not None else value)
    frames[0] = typing.cast(bytes, msgpack.packb((PROTOCOL_VERSION, schema.name, values)))
    return frames


def decode(frames: Sequence[Frame]) -> Message:
    """Frames as a message. Arrays are read-only views of the frames.

    Raises:
        WireError: the frames are not a message of this protocol version; the text names the field.
    """
    if not frames or len(frames) > MAX_FRAMES:
        raise WireError(f"a message has 1 to {MAX_FRAMES} frames, this one has {len(frames)}")
    header = frames[0]
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"a message's header has at most {MAX_HEADER_BYTES} bytes, this one has {len(header)}")
    try:
        parsed = msgpack.unpackb(header, use_list=False)
    except Exception as error:  # msgpack documents no closed set of exceptions for bad input
        raise WireError(f"a message's header is not msgpack: {type(error).__name__}") from None
    if not isinstance(parsed, tuple) or len(parsed) != 3:
        raise WireError("a message's header is not [version, type, fields]")
    version, name, values = parsed
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise WireError(
            f"protocol version {_shown(version)} instead of {PROTOCOL_VERSION}",
            "run the same Draftwire version on all hosts",
        )
    schema = _BY_NAME.get(name) if isinstance(name, str) else None
    if schema is None:
        raise WireError(f"unknown message type {_shown(name)}")
    return typing.cast(Message, schema.build(values, frames))


def describe() -> list[tuple[type, list[tuple[str, str]]]]:
    """Every message type with its fields' names and annotations, for the documentation."""
    return [(cls, [(f.name, str(f.type)) for f in fields(cls)]) for cls in _SCHEMAS]


@dataclass(frozen=True, slots=True)
class _Schema:
    cls: type
    name: str
    packers: list[tuple[str, Callable[[Any], Any] | None, Any]]
    checks: list[tuple[str, Check | None, Array | None]]

    def build(self, values: Any, frames: Sequence[Frame]) -> Any:
        if type(values) is not tuple or len(values) != len(self.checks):
            count = len(values) if type(values) is tuple else type(values).__name__
            raise WireError(f"{self.name}: {len(self.checks)} fields expected, got {count}")
        arguments: list[Any] = []
        next_frame = 1
        for (field_name, check, array), value in zip(self.checks, values, strict=True):
            try:
                if array is not None:
                    size = _array_size(array, value)
                    if size and next_frame == len(frames):
                        raise WireError("its frame is missing")
                    arguments.append(_array(array, value, size, frames[next_frame] if size else b""))
                    next_frame += size > 0
                else:
                    arguments.append(check(value))  # type: ignore[misc]
            except WireError as error:
                raise WireError(f"{self.name}.{field_name}: {error.message}") from None
        if next_frame != len(frames):
            raise WireError(f"{self.name}: {next_frame - 1} array frames expected, got {len(frames) - 1}")
        return self.cls(*arguments)


_REPR = reprlib.Repr()
_REPR.maxstring = 60


def _shown(value: Any) -> str:
    """A refused value for people. Whatever its size and depth (a plain repr of a deep one raises RecursionError)."""
    return _REPR.repr(value)[:60]


def _array_size(mark: Array, shape: Any) -> int:
    if type(shape) is not tuple or len(shape) != mark.ndim:
        raise WireError(f"a shape of {mark.ndim} dimensions expected, got {_shown(shape)}")
    size = 1
    for extent in shape:
        if type(extent) is not int or extent < 0:
            raise WireError(f"not a shape: {_shown(shape)}")
        size *= extent
    if size > mark.max_size or any(extent > mark.max_size for extent in shape):
        raise WireError(f"at most {mark.max_size} elements, the shape {_shown(shape)} has {size}")
    return size


def _array(mark: Array, shape: tuple[int, ...], size: int, frame: Frame) -> Any:
    dtype = _DTYPES[mark.dtype]
    n_bytes = size * dtype.itemsize
    if len(frame) != n_bytes:
        raise WireError(f"{mark.dtype} {_shown(shape)} takes {n_bytes} bytes, the frame has {len(frame)}")
    array = np.frombuffer(frame, dtype)
    if mark.ndim > 1:
        array = array.reshape(shape)
    if array.flags.writeable:
        array.flags.writeable = False
    return array


def _check_bool(value: Any) -> bool:
    if type(value) is not bool:
        raise WireError(f"true or false expected, got {_shown(value)}")
    return value


def _check_int(bounds: Range | None) -> Check:
    low, high = (int(bounds.low), int(bounds.high)) if bounds else (-(2**63), 2**64 - 1)

    def check(value: Any) -> int:
        if type(value) is not int:
            raise WireError(f"an integer expected, got {_shown(value)}")
        if not low <= value <= high:
            raise WireError(f"an integer from {low} to {high} expected, got {value}")
        return value

    return check


def _check_float(bounds: Range | None) -> Check:
    low, high = (bounds.low, bounds.high) if bounds else (-math.inf, math.inf)

    def check(value: Any) -> float:
        if type(value) is not float and type(value) is not int:
            raise WireError(f"a number expected, got {_shown(value)}")
        if not low <= value <= high:  # NaN fails too
            raise WireError(f"a number from {low} to {high} expected, got {value}")
        return float(value)

    return check


def _check_sized(kind: type[str] | type[bytes], bounds: Range | None, noun: str) -> Check:
    high = int(bounds.high) if bounds else 1 << 20
    low = int(bounds.low) if bounds else 0

    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise WireError(f"{noun} expected, got {_shown(value)}")
        if not low <= len(value) <= high:
            raise WireError(f"{noun} of length {low} to {high} expected, got {len(value)}")
        return value

    return check


def _check_literal(choices: tuple[Any, ...]) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not str or value not in choices:
            raise WireError(f"one of {', '.join(map(repr, choices))} expected, got {_shown(value)}")
        return value

    return check


def _check_tuple(item: Check, bounds: Range | None) -> Check:
    low, high = (int(bounds.low), int(bounds.high)) if bounds else (0, 1 << 16)

    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple:
            raise WireError(f"a list expected, got {_shown(value)}")
        if not low <= len(value) <= high:
            raise WireError(f"a list of length {low} to {high} expected, got {len(value)}")
        return tuple([item(entry) for entry in value])

    return check


def _check_record(items: list[Check]) -> Check:
    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple or len(value) != len(items):
            raise WireError(f"a list of {len(items)} expected, got {_shown(value)}")
        return tuple([item(entry) for item, entry in zip(items, value, strict=True)])

    return check


def _check_dataclass(cls: type) -> Check:
    checks = [(f.name, _check_for(hint)) for f, hint in _annotated_fields(cls)]

    def check(value: Any) -> Any:
        if type(value) is not tuple or len(value) != len(checks):
            raise WireError(f"{cls.__name__} has {len(checks)} fields, got {_shown(value)}")
        arguments = []
        for (name, item), entry in zip(checks, value, strict=True):
            try:
                arguments.append(item(entry))
            except WireError as error:
                raise WireError(f"{cls.__name__}.{name}: {error.message}") from None
        return cls(*arguments)

    return check


def _check_for(hint: Any) -> Check:
    bounds: Range | None = None
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
        bounds = next((mark for mark in marks if isinstance(mark, Range)), None)
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is bool:
        return _check_bool
    if hint is int:
        return _check_int(bounds)
    if hint is float:
        return _check_float(bounds)
    if hint is str:
        return _check_sized(str, bounds, "a string")
    if hint is bytes:
        return _check_sized(bytes, bounds, "bytes")
    if origin is Literal:
        return _check_literal(arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _check_tuple(_check_for(arguments[0]), bounds)
    if origin is tuple:
        return _check_record([_check_for(argument) for argument in arguments])
    if origin in (Union, types.UnionType) and len(arguments) == 2 and arguments[1] is type(None):
        inner = _check_for(arguments[0])
        return lambda value: None if value is None else inner(value)
    if is_dataclass(hint):
        return _check_dataclass(typing.cast(type, hint))
    raise TypeError(f"no wire codec for {hint}")


def _packer_for(hint: Any) -> Callable[[Any], Any] | None:
    """How a field's value becomes something msgpack knows; None where it already is."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        inner = _packer_for(arguments[0])
        return None if inner is None else partial(_pack_each, inner)
    if origin in (Union, types.UnionType):
        inner = _packer_for(arguments[0])
        return None if inner is None else partial(_pack_optional, inner)
    if is_dataclass(hint):
        parts = [(f.name, _packer_for(sub)) for f, sub in _annotated_fields(typing.cast(type, hint))]
        return lambda value: [
            getattr(value, name) if pack is None else pack(getattr(value, name)) for name, pack in parts
        ]
    return None


def _pack_each(pack: Callable[[Any], Any], value: Any) -> list[Any]:
    return [pack(entry) for entry in value]


def _pack_optional(pack: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else pack(value)


def _annotated_fields(cls: type) -> list[tuple[Any, Any]]:
    hints = get_type_hints(cls, include_extras=True)
    return [(f, hints[f.name]) for f in fields(cls)]


def _array_mark(hint: Any) -> Array | None:
    return next((mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Array)), None)


def _schema(cls: type) -> _Schema:
    packers: list[tuple[str, Callable[[Any], Any] | None, Any]] = []
    checks: list[tuple[str, Check | None, Array | None]] = []
    for f, hint in _annotated_fields(cls):
        mark = _array_mark(hint)
        if mark is not None:
            packers.append((f.name, None, np.dtype(mark.dtype)))
            checks.append((f.name, None, mark))
        else:
            packers.append((f.name, _packer_for(hint), None))
            checks.append((f.name, _check_for(hint), None))
    return _Schema(cls, cls.__name__, packers, checks)


_DTYPES = {name: np.dtype(name) for name in ("int32", "int64", "float32", "float64")}
_SCHEMAS: dict[type, _Schema] = {cls: _schema(cls) for cls in get_args(messages.Message)}
_BY_NAME: dict[str, _Schema] = {schema.name: schema for schema in _SCHEMAS.values()}
