"""The documentation keeps up with the code: messages, settings, the example configuration, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest

from shared import messages, wire
from shared.engine.interface import EngineSettings
from shared.fields import LIVE, Range
from shared.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = ROOT / "deploy" / "draftwire.example.toml"


def table_rows(page: str) -> dict[str, list[str]]:
    """The rows of a page's tables: cells after the first, by what stands in `code` in the first."""
    rows: dict[str, list[str]] = {}
    for line in (ROOT / "docs" / page).read_text("utf-8").splitlines():
        if match := re.match(r"\| `([^`]+)` \|(.*)\|$", line):
            assert match[1] not in rows, f"{page} describes {match[1]} twice"
            rows[match[1]] = [cell.strip() for cell in match[2].split(" | ")]
    return rows


def records() -> Iterator[type]:
    """Every dataclass that travels: the messages, and what is inside them."""
    seen: set[type] = set()

    def walk(hint: Any) -> Iterator[type]:
        if isinstance(hint, type) and is_dataclass(hint):
            if hint not in seen:
                seen.add(hint)
                yield hint
                for inner in get_type_hints(hint, include_extras=True).values():
                    yield from walk(inner)
        else:
            for argument in get_args(hint):
                yield from walk(argument)

    for cls, _ in wire.describe():
        yield from walk(cls)


@pytest.fixture(scope="module")
def wire_rows() -> dict[str, list[str]]:
    return {
        name: cells
        for name, cells in table_rows("wire.md").items()
        if name[0].isupper()  # the others are error codes
    }


@pytest.mark.parametrize("cls", list(records()), ids=lambda cls: cls.__name__)
def test_wire_describes_every_message_with_its_fields(cls: type, wire_rows: dict[str, list[str]]) -> None:
    described = re.findall(r"`([a-z_]+)`", wire_rows[cls.__name__][1])
    names = [field.name for field in fields(cls)]
    assert described[: len(names)] == names


def test_wire_describes_no_message_that_is_gone(wire_rows: dict[str, list[str]]) -> None:
    assert set(wire_rows) == {cls.__name__ for cls in records()}


def test_wire_gives_the_protocol_version() -> None:
    text = (ROOT / "docs" / "wire.md").read_text("utf-8")
    assert f"`PROTOCOL_VERSION` is {messages.PROTOCOL_VERSION}." in text


def settings_keys() -> dict[str, tuple[Any, Any]]:
    """Every key as docs/configuration.md writes it, with its default and its annotation."""
    out: dict[str, tuple[Any, Any]] = {}

    def walk(value: Any, prefix: str) -> None:
        hints = get_type_hints(type(value), include_extras=True)
        for field in fields(value):
            inner = getattr(value, field.name)
            if isinstance(inner, EngineSettings):
                walk(EngineSettings(), "engine.")
            elif is_dataclass(inner):
                walk(inner, f"{prefix}{field.name}.")
            elif isinstance(inner, dict):
                walk(next(iter(inner.values())), f"{prefix}{field.name}.NAME.")
            else:
                out[prefix + field.name] = inner, hints[field.name]

    walk(Settings(), "")
    return out


def as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    return f"[{', '.join(map(as_toml, value))}]" if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("key", settings_keys())
def test_configuration_gives_every_key_with_default_and_range(key: str) -> None:
    default, hint = settings_keys()[key]
    cells = table_rows("configuration.md")[key]
    assert cells[0] == f"`{as_toml(default)}`"
    live = False
    if get_origin(hint) is Annotated:
        marks, hint = hint.__metadata__, get_args(hint)[0]
        live = LIVE in marks
        for bounds in (mark for mark in marks if isinstance(mark, Range)):
            assert cells[1] == f"{bounds.low:.0f} to {bounds.high:.0f}"
    assert ("(live)" in cells[-1]) == live
    if get_origin(hint) is Literal:
        assert cells[1] == ", ".join(get_args(hint))


def test_configuration_gives_no_key_that_is_gone() -> None:
    assert set(table_rows("configuration.md")) == set(settings_keys())


def test_the_example_configuration_is_the_default_one() -> None:
    """It loads, and what it says is the default, as it claims."""
    assert load_settings(EXAMPLE, environment={}) == Settings()


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert ROOT in linked.parents, target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_documentation_exist(page: Path) -> None:
    for name in re.findall(r"`((?:services|shared|tools|tests|deploy|docs)/[\w/.]*)", page.read_text("utf-8")):
        assert (ROOT / name).exists(), name
