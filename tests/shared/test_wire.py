"""Messages to frames and back: everything valid survives, everything else is a `WireError`."""

from __future__ import annotations

import math
import tracemalloc
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import messages, wire
from shared.errors import WireError
from shared.fields import Array, Range
from shared.messages import (
    MAX_RUN,
    PROTOCOL_VERSION,
    Cancel,
    Encoded,
    FullRows,
    Hello,
    Limits,
    Message,
    OpenSampling,
    Ping,
    Proposal,
    Verify,
    VerifyItem,
    Welcome,
)
from shared.sampling.params import SamplingParams

MESSAGE_TYPES = get_args(Message)
MOST = 5
"""Entries of a generated list or extent of a generated array, where the schema allows more."""

relaxed = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
thorough = settings(relaxed, max_examples=300)


# -- values from annotations, written independently of the codec --


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Valid values of a field, from its annotation."""
    bounds, array = None, None
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
        bounds = next((mark for mark in marks if isinstance(mark, Range)), None)
        array = next((mark for mark in marks if isinstance(mark, Array)), None)
    if array is not None:
        return arrays(array)
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is bool:
        return st.booleans()
    if hint is int:
        low, high = (int(bounds.low), int(bounds.high)) if bounds else (-(2**63), 2**64 - 1)
        return st.one_of(st.integers(low, high), st.sampled_from((low, high)))
    if hint is float:
        return st.floats(bounds.low, bounds.high) if bounds else st.floats(allow_nan=False)
    if hint in (str, bytes):
        low, high = (int(bounds.low), int(bounds.high)) if bounds else (0, MOST)
        plain = st.text(st.characters(exclude_categories=["Cs"]), min_size=low, max_size=min(high, low + MOST))
        return plain if hint is str else st.binary(min_size=low, max_size=min(high, low + MOST))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        low, high = (int(bounds.low), int(bounds.high)) if bounds else (0, MOST)
        return st.lists(values(arguments[0]), min_size=low, max_size=min(high, low + MOST)).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if origin in (Union, types.UnionType):
        return st.one_of(*(st.none() if entry is type(None) else values(entry) for entry in arguments))
    assert is_dataclass(hint), hint
    return records(typing.cast(type, hint))


def arrays(mark: Array) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(*[st.integers(0, MOST)] * mark.ndim)
    return st.builds(
        lambda shape, seed: np.random.default_rng(seed).integers(0, 99, shape).astype(mark.dtype),
        shapes,
        st.integers(0, 99),
    )


def records(cls: type) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls, include_extras=True)
    return st.builds(cls, *(values(hints[field.name]) for field in fields(cls)))


any_message: st.SearchStrategy[Any] = st.one_of(*map(records, MESSAGE_TYPES))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and a == b


def sent(message: Message) -> list[bytes]:
    """A message's frames as they come out of a socket."""
    return [bytes(frame) for frame in wire.encode(message)]


def header(message: Message) -> tuple[list[Any], list[bytes]]:
    """A message's field values as they stand in the header, to be spoilt, and its array frames."""
    first, *rest = sent(message)
    return list(msgpack.unpackb(first, use_list=False)[2]), rest


def decoded_or_error(frames: list[bytes]) -> Any:
    try:
        return wire.decode(frames)
    except WireError as error:
        return error


def refused(name: str, fields_: Any, frames: list[bytes], version: Any = PROTOCOL_VERSION) -> str:
    with pytest.raises(WireError) as caught:
        wire.decode([msgpack.packb((version, name, fields_)), *frames])
    return str(caught.value)


# -- round trips --


@pytest.mark.parametrize("cls", MESSAGE_TYPES, ids=lambda cls: cls.__name__)
def test_every_message_survives_the_wire(cls: type) -> None:
    """What is decoded equals what was encoded, field by field and type by type, whatever the valid values."""

    @relaxed
    @given(records(cls))
    def check(message: Any) -> None:
        assert same(message, wire.decode(sent(message)))

    check()


def test_every_message_class_is_in_the_union() -> None:
    """A message defined in messages.py cannot be forgotten in the codec: it is sent, or part of one that is."""
    parts = {
        *("Limits", "Speculation", "TargetStats", "DraftStats", "VerifyItem", "VerdictItem"),
        *("PeerStatus", "WorkerStatus", "SessionStatus", "StepDecision", "ClockEstimate", "TraceSource"),
        *("Histogram", "Totals", "ModelLabel"),
    }
    defined = {n for n, c in vars(messages).items() if is_dataclass(c) and c.__module__ == messages.__name__}
    assert defined - parts == {cls.__name__ for cls in MESSAGE_TYPES}


def test_description_lists_every_field() -> None:
    """`describe` names every message with its fields in wire order."""
    assert [(c, [n for n, _ in f]) for c, f in wire.describe()] == [
        (c, [f.name for f in fields(c)]) for c in MESSAGE_TYPES
    ]


def test_arrays_are_not_copied() -> None:
    """An array travels as a view of the sender's memory, and arrives as a view of the frame."""
    tokens = np.arange(1000, dtype=np.int32)
    frame = wire.encode(Encoded(1, tokens))[1]
    assert np.shares_memory(np.frombuffer(frame, np.int32), tokens)
    received = bytes(frame)
    decoded = wire.decode([wire.encode(Encoded(1, tokens))[0], received])
    assert isinstance(decoded, Encoded)
    assert np.shares_memory(decoded.tokens, np.frombuffer(received, np.int32))


@pytest.mark.parametrize("wrap", [bytes, bytearray], ids=["read-only frame", "writable frame"])
def test_decoded_arrays_are_read_only_and_typed(wrap: Any) -> None:
    """A decoded array has the declared dtype and shape and refuses to be written to."""
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    first, *rest = sent(FullRows(7, (0, 1), rows))
    decoded = wire.decode([first, *(memoryview(wrap(frame)) for frame in rest)])
    assert isinstance(decoded, FullRows)
    assert decoded.logits.dtype == np.float32
    assert decoded.logits.shape == (2, 3)
    with pytest.raises(ValueError, match="read-only"):
        decoded.logits[0, 0] = 1


def test_other_layouts_and_dtypes_are_converted() -> None:
    """A sliced, transposed or int64 array is sent as the schema's contiguous dtype."""
    rows = np.arange(12, dtype=np.float64).reshape(3, 4).T
    decoded = wire.decode(sent(FullRows(7, (0,), rows)))
    assert isinstance(decoded, FullRows)
    assert decoded.logits.dtype == np.float32
    assert (decoded.logits == rows).all()


# -- refusals --


@thorough
@given(any_message, st.data())
def test_damaged_frames_are_refused_or_harmless(message: Any, data: st.DataObject) -> None:
    """Flipped, cut, inserted, doubled or missing bytes and frames give a valid message or a `WireError`; no more."""
    frames = [bytearray(frame) for frame in sent(message)]
    for _ in range(data.draw(st.integers(1, 3))):
        frame = data.draw(st.sampled_from(frames)) if frames else bytearray()
        at = data.draw(st.integers(0, max(0, len(frame) - 1)))
        damage = data.draw(st.sampled_from(("flip", "cut", "insert", "drop frame", "double frame", "swap frames")))
        if damage == "flip" and frame:
            frame[at] ^= data.draw(st.integers(1, 255))
        elif damage == "cut":
            del frame[at:]
        elif damage == "insert":
            frame[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif damage == "drop frame" and frames:
            del frames[data.draw(st.integers(0, len(frames) - 1))]
        elif damage == "double frame":
            frames.append(bytearray(frame))
        elif damage == "swap frames":
            frames.reverse()
    decoded = decoded_or_error([bytes(frame) for frame in frames])
    assert isinstance(decoded, WireError) or same(decoded, wire.decode(sent(decoded))), "what is accepted is valid"


@thorough
@given(st.lists(st.binary(max_size=60), max_size=20))
def test_noise_is_refused(frames: list[bytes]) -> None:
    """Bytes that no peer has encoded are a `WireError`."""
    with pytest.raises(WireError):
        wire.decode(frames)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=3), st.binary()
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=2), inner, max_size=3)),
    max_leaves=8,
)


@thorough
@given(any_message, anything, st.data())
def test_a_field_of_another_type_is_refused_and_named(message: Any, value: Any, data: st.DataObject) -> None:
    """Any msgpack value in any field is either valid there or refused with the message's and the field's name."""
    name = type(message).__name__
    entries, frames = header(message)
    if not entries:
        return
    at = data.draw(st.integers(0, len(entries) - 1))
    entries[at] = value
    decoded = decoded_or_error([msgpack.packb((PROTOCOL_VERSION, name, entries)), *frames])
    if isinstance(decoded, WireError):
        assert decoded.message.startswith(f"{name}.{fields(message)[at].name}: ")
    else:
        assert same(decoded, wire.decode(sent(decoded)))


@pytest.mark.parametrize(
    ("message", "field", "value", "expected"),
    [
        (Cancel(1), "request", True, "an integer expected"),
        (Cancel(1), "request", -1, "from 0 to"),
        (Cancel(1), "request", 1.0, "an integer expected"),
        (Cancel(1), "request", "1", "an integer expected"),
        (Welcome(1, 2), "heartbeat_ms", 2**32, "from 0 to"),
        (Hello("draft", "x", 1), "role", "boss", "one of"),
        (Hello("draft", "x", 1), "instance", "x" * 201, "length 0 to 200"),
        (Hello("draft", "x", 1), "instance", b"x", "a string expected"),
        (Hello("draft", "x", 1), "row_invariant", 1, "true or false expected"),
        (Proposal(1, 2, 3, (4,)), "tokens", (), "length 1 to"),
        (Proposal(1, 2, 3, (4,)), "tokens", tuple(range(MAX_RUN + 1)), f"length 1 to {MAX_RUN}"),
        (Proposal(1, 2, 3, (4,)), "tokens", (2**31,), "from 0 to"),
        (Proposal(1, 2, 3, (4,)), "confidence", (math.nan,), "a number from"),
        (Proposal(1, 2, 3, (4,)), "q_ids", (1, 1), "a shape of 1 dimensions"),
        (Proposal(1, 2, 3, (4,)), "q_ids", (True,), "not a shape"),
        (Proposal(1, 2, 3, (4,)), "q_ids", (-1,), "not a shape"),
        (Proposal(1, 2, 3, (4,)), "q_ids", (1,), "frame is missing"),
        (Encoded(1, np.zeros(2, np.int32)), "tokens", (1,), "takes 4 bytes, the frame has 8"),
    ],
)
def test_the_refusal_says_what_is_wrong(message: Any, field: str, value: Any, expected: str) -> None:
    """The text names the field and what is expected there."""
    entries, frames = header(message)
    entries[[f.name for f in fields(message)].index(field)] = value
    text = refused(type(message).__name__, entries, frames)
    assert text.startswith(f"{type(message).__name__}.{field}: ")
    assert expected in text


@pytest.mark.parametrize("name", [f.name for f in fields(SamplingParams) if "float" in str(f.type)])
def test_nan_is_no_sampling_parameter(name: str) -> None:
    """NaN is refused wherever a float is expected, nested ones included."""
    if name == "logit_bias":
        params = SamplingParams(logit_bias=((1, math.nan),))
    else:
        params = SamplingParams(**{name: math.nan})
    message = OpenSampling(1, np.zeros(1, np.int32), 1, 10, params, Limits(1))
    with pytest.raises(WireError, match=f"OpenSampling.sampling: SamplingParams.{name}: "):
        wire.decode(sent(message))


def test_another_protocol_version_is_named() -> None:
    """The refusal names both versions and says what to do."""
    text = refused("Ping", (1,), [], version=PROTOCOL_VERSION + 6)
    assert f"protocol version {PROTOCOL_VERSION + 6} instead of {PROTOCOL_VERSION}" in text
    assert "same Draftwire version" in text


@pytest.mark.parametrize("version", [True, 1.0, "1", None, (1,)])
def test_a_version_is_an_integer(version: Any) -> None:
    """What merely equals or resembles the version is refused."""
    assert "protocol version" in refused("Ping", (1,), [], version=version)


@pytest.mark.parametrize("name", ["Limits", "VerifyItem", "_Schema", "object", "", None, 3, ("Ping",)])
def test_only_messages_are_message_types(name: Any) -> None:
    """Other classes of the project, and things that are no names, are unknown types."""
    assert "unknown message type" in refused(name, (1,), [])


@pytest.mark.parametrize("count", [0, 2])
def test_field_and_frame_counts_are_exact(count: int) -> None:
    """A message with a field or a frame too few or too many is refused; an empty array has no frame."""
    assert "1 fields expected" in refused("Ping", (1,) * count, [])
    assert "frame" in refused("Encoded", (1, (1,)), [bytes(4)] * count)
    assert "0 array frames expected" in refused("Encoded", (1, (0,)), [b""] * (count + 1))
    assert len(sent(Encoded(1, np.empty(0, np.int32)))) == 1


@pytest.mark.parametrize("depth", [100, 900, 1000, 1022, 1030, 100_000])
def test_a_depth_bomb_is_refused(depth: int) -> None:
    """Nesting does not exhaust the stack, in any place of the header."""
    bomb = b"\x91" * depth + b"\x01"
    for raw in (
        b"\x93" + bomb + b"\xa4Ping\x91\x01",
        b"\x93\x01" + bomb + b"\x91\x01",
        b"\x93\x01\xa4Ping" + bomb,
        b"\x93\x01\xa4Ping\x91" + bomb,
        b"\x93\x01\xa7Encoded\x92\x01" + bomb,
        bomb,
    ):
        with pytest.raises(WireError):
            wire.decode([raw])


def test_a_refusal_is_short() -> None:
    """The text of a refusal does not grow with what is refused."""
    assert len(refused("Ping", ("x" * 1_000_000,), [])) < 200
    assert len(refused("Ping", (tuple(range(100_000)),), [])) < 200
    assert len(refused("x" * 1_000_000, (), [])) < 200


@pytest.mark.parametrize(
    "shape", [(2**40,), (2**63,), (2**64 - 1,), (1 << 20, 1 << 20), (0, 2**62), (2**32, 2**32), (2**62, 4)]
)
def test_a_huge_shape_allocates_nothing(shape: tuple[int, ...]) -> None:
    """A declared shape is checked against the frame that is there before anything of its size is made."""
    name, entries = ("Encoded", (1, shape)) if len(shape) == 1 else ("FullRows", (1, (0,), shape))
    raw = msgpack.packb((PROTOCOL_VERSION, name, entries))
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            wire.decode([raw, bytes(64)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_an_oversize_array_is_refused() -> None:
    """More elements than the schema allows are refused even when the frame holds them all."""
    size = messages.MAX_CONTEXT + 1
    raw = msgpack.packb((PROTOCOL_VERSION, "Encoded", (1, (size,))))
    with pytest.raises(WireError, match=f"at most {messages.MAX_CONTEXT} elements"):
        wire.decode([raw, bytes(4 * size)])


def test_too_many_frames_and_too_long_headers_are_refused() -> None:
    """The number of frames and the size of a header are bounded before they are parsed."""
    with pytest.raises(WireError, match="frames"):
        wire.decode([])
    with pytest.raises(WireError, match="frames"):
        wire.decode([*sent(Ping(1)), *[b""] * wire.MAX_FRAMES])
    with pytest.raises(WireError, match="header has at most"):
        wire.decode([bytes(wire.MAX_HEADER_BYTES + 1)])


def test_trailing_bytes_are_refused() -> None:
    """A header is one msgpack value and nothing after it."""
    with pytest.raises(WireError, match="not msgpack"):
        wire.decode([sent(Ping(1))[0] + b"\x00"])


def test_nested_fields_are_named() -> None:
    """An error deep in a message tells the way to it."""
    verify = Verify(1, (VerifyItem(1, 0, 0, ()),), np.zeros((1, 1)), np.zeros((1, 1)), np.zeros(1))
    entries, frames = header(verify)
    entries[1] = ((1, 0, 0, ("x",), 0, ()),)
    assert refused("Verify", entries, frames).startswith("Verify.items: VerifyItem.tokens: an integer expected")
