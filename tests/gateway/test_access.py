"""Keys, limits and refusals, without HTTP and with a clock of the test's own."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.access import (
    Access,
    Bucket,
    Caller,
    KeyFile,
    presented_key,
    source_of,
)
from services.gateway.errors import ApiError
from shared.api_keys import ApiKey, KeyLimits, changed_keys, hash_key
from shared.logs import Logger
from tests.shared.test_api_keys import NOW, key

SECOND = 1_000_000_000
MINUTE = 60 * SECOND


class Log:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __getattr__(self, level: str) -> Callable[..., None]:
        return lambda event, **fields: self.lines.append({"level": level, "event": event, **fields})

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    @property
    def logger(self) -> Logger:
        return cast(Logger, self)


class Clock:
    def __init__(self) -> None:
        self.ns = 0

    def now_ns(self) -> int:
        return self.ns

    def now_s(self) -> float:
        return self.ns / SECOND

    def pass_s(self, seconds: float) -> None:
        self.ns += int(seconds * SECOND)


# --- Buckets ----------------------------------------------------------------------------------------------------------

steps = st.lists(st.integers(0, 3 * SECOND) | st.integers(0, 2 * MINUTE), max_size=25)


@given(st.integers(1, 40), steps)
@settings(deadline=None)
def test_a_bucket_never_gives_more_than_a_minutes_worth_and_what_flows_in(per_minute: int, steps: list[int]) -> None:
    """Between any two moments t apart, at most per_minute (1 + t / 60 s) units, asked for as often as possible."""
    bucket = Bucket(per_minute, 0)
    now, taken_at = 0, []
    for step in steps:
        now += step
        assert taken_at or not bucket.wait_ns(now)  # it is full at first
        while not bucket.wait_ns(now):
            bucket.charge(1, now)
            taken_at.append(now)
    for i, first in enumerate(taken_at):
        for j in range(i, len(taken_at)):
            assert (j - i + 1) * MINUTE <= per_minute * (MINUTE + taken_at[j] - first)


@given(st.integers(1, 1000), st.lists(st.tuples(st.integers(0, MINUTE), st.integers(0, 3000)), max_size=30))
def test_a_bucket_holds_what_arithmetic_says(per_minute: int, steps: list[tuple[int, int]]) -> None:
    """Against exact fractions, with charges into debt: the wait is the first nanosecond at which a unit is there."""
    bucket = Bucket(per_minute, 0)
    level, now = Fraction(per_minute), 0
    for step, units in steps:
        now += step
        level = min(Fraction(per_minute), level + Fraction(step * per_minute, MINUTE))
        wait = bucket.wait_ns(now)
        assert level + Fraction(wait * per_minute, MINUTE) >= 1
        assert wait == 0 or level + Fraction((wait - 1) * per_minute, MINUTE) < 1
        bucket.charge(units, now)
        level -= units


def test_a_clock_that_goes_back_gives_nothing() -> None:
    """Time that was counted is not counted again."""
    bucket = Bucket(60, 0)
    bucket.charge(60, 0)
    assert bucket.wait_ns(SECOND) == 0
    bucket.charge(1, SECOND)
    assert bucket.wait_ns(0) > 0
    assert bucket.wait_ns(SECOND) == SECOND


# --- Limits of a key --------------------------------------------------------------------------------------------------


def refused(caller: Caller) -> ApiError:
    with pytest.raises(ApiError) as caught, caller.entered():
        pass
    assert caught.value.status == 429
    assert caught.value.headers == {"retry-after": str(caught.value.retry_after_s)}
    return caught.value


def test_requests_at_a_time() -> None:
    """The one too many is refused with the limit's name, and one that ends makes room, however it ends."""
    caller = Caller("alice", KeyLimits(max_requests=2))
    with caller.entered():
        with contextlib.suppress(RuntimeError), caller.entered():
            error = refused(caller)
            raise RuntimeError
        with caller.entered():
            assert caller.n_running == 2
    assert caller.n_running == 0
    assert (error.code, error.retry_after_s) == ("max_requests_exceeded", 1)
    assert "max_requests of API key alice" in error.message


def test_requests_per_minute() -> None:
    """A minute's worth at once, then refusals that use nothing up, and after Retry-After it works."""
    clock = Clock()
    caller = Caller("alice", KeyLimits(requests_per_minute=12), clock.now_ns)
    for _ in range(12):
        with caller.entered():
            pass
    for _ in range(100):
        error = refused(caller)
    assert (error.code, error.retry_after_s) == ("requests_per_minute_exceeded", 5)
    clock.pass_s(4.9)
    assert refused(caller).retry_after_s == 1
    clock.pass_s(0.1)
    with caller.entered():
        pass
    refused(caller)


def test_tokens_per_minute() -> None:
    """What a request took is charged when it has ended; the debt is waited for, and no request is taken meanwhile."""
    clock = Clock()
    caller = Caller("alice", KeyLimits(tokens_per_minute=600, requests_per_minute=2), clock.now_ns)
    with caller.entered():
        pass
    caller.charge(650)
    error = refused(caller)
    assert (error.code, error.retry_after_s) == ("tokens_per_minute_exceeded", 6)  # 51 tokens at 10 a second
    clock.pass_s(5)
    refused(caller)
    clock.pass_s(1)
    with caller.entered():  # the refusals have used up no request
        pass


def test_new_limits_do_not_forget_what_was_used() -> None:
    """A debt stays; a limit that is taken away lets everything through."""
    clock = Clock()
    caller = Caller("alice", KeyLimits(tokens_per_minute=60), clock.now_ns)
    caller.charge(90)
    caller.change(KeyLimits(tokens_per_minute=120))
    assert refused(caller).retry_after_s == 16  # 31 tokens at 2 a second
    caller.change(KeyLimits())
    for _ in range(100):
        with caller.entered():
            caller.charge(1_000_000)


# --- Headers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], b""),
        ([(b"authorization", b"Bearer abc")], b"abc"),
        ([(b"authorization", b"bearer   abc ")], b"abc"),
        ([(b"x-api-key", b" abc ")], b"abc"),
        ([(b"x-api-key", b"other"), (b"authorization", b"Bearer abc")], b"abc"),
        ([(b"authorization", b"Basic abc"), (b"x-api-key", b"other")], b"other"),
        ([(b"authorization", b"abc")], b""),
        ([(b"authorization", b"Bearer ")], b""),
        ([(b"authorization", b"")], b""),
    ],
)
def test_where_the_key_stands(headers: list[tuple[bytes, bytes]], expected: bytes) -> None:
    """Authorization: Bearer first, else X-Api-Key."""
    assert presented_key(headers) == expected


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (("192.168.1.7", 1), "192.168.1.7"),
        (("2001:DB8:0::1", 1), "2001:db8::1"),
        (('evil", "level": "x', 1), "unknown"),
        (("x" * 100_000, 1), "unknown"),
        (None, "unknown"),
    ],
)
def test_only_an_address_enters_the_log(client: tuple[str, int] | None, expected: str) -> None:
    """A proxy hands on what its client has written."""
    assert source_of(client) == expected


# --- The file ---------------------------------------------------------------------------------------------------------


def write(path: Path, *keys: ApiKey) -> None:
    with changed_keys(path) as found:
        found.clear()
        found.update({k.name: k for k in keys})


def test_a_changed_file_is_read_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    """One error for each broken state of the file, the old keys meanwhile, and the new ones when it is whole again."""
    path, log = tmp_path / "keys.toml", Log()
    write(path, key("a"))
    file = KeyFile(path, log.logger)
    assert not file.refresh()
    path.write_text("[keys.a")
    for _ in range(5):
        assert not file.refresh()
    path.unlink()
    for _ in range(5):
        assert not file.refresh()
    assert [line["level"] for line in log.of("api_keys_unreadable")] == ["error", "error"]
    assert [k.name for k in file.keys] == ["a"]
    write(path, key("b"))
    assert file.refresh()
    assert [k.name for k in file.keys] == ["b"]
    os.chmod(path, 0o666)
    assert not file.refresh()
    assert "others can write" in log.of("api_keys_unreadable")[-1]["reason"]


def caller(access: Access, secret: str) -> Caller:
    return access.caller([(b"authorization", f"Bearer {secret}".encode())], "10.0.0.1")


def test_use_outlives_a_new_file(tmp_path: Path) -> None:
    """A key that is still there keeps what is in progress and its debt, under a new limit and a new name too."""
    path, log = tmp_path / "keys.toml", Log()
    limited = ApiKey("a", hash_key(b"dw-x"), NOW, limits=KeyLimits(tokens_per_minute=60))
    write(path, limited)
    access = Access(str(path), log.logger)
    with caller(access, "dw-x").entered():
        caller(access, "dw-x").charge(1000)
        write(path, ApiKey("b", hash_key(b"dw-x"), NOW, limits=KeyLimits(tokens_per_minute=61)), key("c", "dw-y"))
        access.tick()
        assert caller(access, "dw-x").n_running == 1
        assert "API key b" in refused(caller(access, "dw-x")).message
        with caller(access, "dw-y").entered():
            pass


def test_without_a_file_everybody_may_ask() -> None:
    """No setting, no keys, no names."""
    access = Access("", Log().logger)
    assert access.caller([], "10.0.0.1").name == ""
    assert not access.needs_keys


def test_an_empty_file_lets_nobody_in_and_says_so(tmp_path: Path) -> None:
    """It is no way of switching keys off."""
    path, log = tmp_path / "keys.toml", Log()
    write(path)
    access = Access(str(path), log.logger)
    assert log.of("no_api_keys")
    with pytest.raises(ApiError) as caught:
        caller(access, "dw-x")
    assert caught.value.status == 401
    assert "dw-x" not in json.dumps(log.lines) + json.dumps(caught.value.body)
