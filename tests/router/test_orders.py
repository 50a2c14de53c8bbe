"""The file of orders: what is read is what was written, and nothing else is ever taken for orders."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.orders import MOST, Orders, parse_orders

names = st.text(max_size=200)
texts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(names, inner)
)


@given(st.one_of(st.text(), texts.map(json.dumps), texts.map(lambda v: json.dumps({"version": 1, "orders": v}))))
def test_whatever_stands_in_the_file(text: str) -> None:
    """It is orders, of which at most one is a pin, or a `ValueError` with a sentence."""
    try:
        orders = parse_orders(text)
    except ValueError as error:
        sentence = str(error)
    else:
        assert set(orders.values()) <= {"drain", "ban", "pin"}
        assert list(orders.values()).count("pin") <= 1
        return
    assert 0 < len(sentence) < 200


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"version": 2, "orders": {}}', '{"version": 1}', '{"version": 1, "orders": []}'),
        *('{"version": 1, "orders": {"a": "allow"}}', '{"version": 1, "orders": {"a": ["drain"]}}'),
        *('{"version": 1, "orders": {"a": ""}}', '{"version": 1, "orders": {"a": "pin", "b": "pin"}}'),
        json.dumps({"version": 1, "orders": {"x" * 201: "drain"}}),
        json.dumps({"version": 1, "orders": {str(n): "drain" for n in range(MOST + 1)}}),
        "[" * 100_000,
    ],
)
def test_what_is_no_file_of_orders(text: str, tmp_path: Path) -> None:
    """It counts as none, and there is a warning."""
    path = tmp_path / "orders.json"
    path.write_text(text)
    orders = Orders(path)
    assert (list(orders), orders.pinned) == ([], "")
    assert orders.warning


@given(st.lists(st.tuples(names, st.sampled_from(["", "drain", "ban", "pin"])), max_size=12))
def test_what_is_kept_is_what_was_ordered(given_orders: list[tuple[str, Any]]) -> None:
    """The last order of each worker, of pins only the last one; a new process reads just that."""
    expected: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "orders.json"
        orders = Orders(path)
        for name, order in given_orders:
            assert orders.give(name, order) == ""
            if order == "pin":
                expected = {n: o for n, o in expected.items() if o != "pin"}
            expected.pop(name, None)
            if order:
                expected[name] = order
        again = Orders(path)
        assert again.warning == ""
        assert {name: again.of(name) for name in again} == expected
        assert again.pinned == next((n for n, o in expected.items() if o == "pin"), "")
        assert [p.name for p in Path(directory).iterdir()] in ([], ["orders.json"])


def test_a_file_that_cannot_be_read_or_is_no_text(tmp_path: Path) -> None:
    """A directory in its place, or bytes that are no UTF-8: a warning."""
    assert Orders(tmp_path).warning
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    assert Orders(tmp_path / "x").warning
    (tmp_path / "y").write_bytes(b" " * ((1 << 20) + 1))
    assert "bytes" in Orders(tmp_path / "y").warning


def test_without_a_file_there_are_no_orders(tmp_path: Path) -> None:
    orders = Orders(tmp_path / "none" / "orders.json")
    assert (len(orders), orders.warning) == (0, "")
