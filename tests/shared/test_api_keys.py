"""The file of API keys: what it holds, when it is believed, and how it is written."""

from __future__ import annotations

import hashlib
import os
import stat
import string
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import api_keys
from shared.api_keys import ApiKey, KeyLimits, changed_keys, format_keys, hash_key, new_key, parse_keys, read_keys
from shared.errors import SettingsError

NOW = datetime(2026, 11, 28, 9, 30, tzinfo=timezone.utc)

times = st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31), timezones=st.just(timezone.utc)).map(
    lambda time: time.replace(microsecond=0)
)
names = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=40)
limits = st.builds(KeyLimits, st.integers(0, 10_000), st.integers(0, 1_000_000), st.integers(0, 1_000_000_000))
keys = st.builds(
    ApiKey, names, st.binary(min_size=32, max_size=32), times, st.none() | times, st.none() | times, limits
)


def key(name: str, secret: str = "dw-x") -> ApiKey:
    return ApiKey(name, hash_key(secret.encode()), NOW)


def refused(path: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        read_keys(path)
    assert "\n" not in str(caught.value)
    assert str(path) in caught.value.message
    return str(caught.value)


@given(st.lists(keys, max_size=5, unique_by=(lambda k: k.name, lambda k: k.sha256)))
def test_what_is_written_is_read_back(written: list[ApiKey]) -> None:
    """Names, hashes, times and limits survive the file, in their order."""
    by_name = {k.name: k for k in written}
    read = parse_keys(format_keys(by_name), "the file")
    assert read == by_name
    assert list(read) == list(by_name)


toml_like = st.lists(
    st.sampled_from(
        ["[keys.a]", "[keys]", "[[keys]]", "[other]", "sha256", " = ", '"' + "0f" * 32 + '"', "created", "expires",
         "2026-01-01T00:00:00Z", "2026-01-01", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "max_requests",
         "-1", "true", "1e9", "\n", "\n", "x", "[", "'", "a.b"]
    ) | st.text(max_size=5),
).map("".join)  # fmt: skip


@given(toml_like | st.text())
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    """A damaged file is a SettingsError that names it, whatever is in it."""
    refusal, parsed = "", {}
    try:
        parsed = parse_keys(text, "/etc/the file")
    except SettingsError as error:
        refusal = error.message
    assert refusal.startswith("/etc/the file" if refusal else "")
    assert all(k.name == name and len(k.sha256) == 32 for name, k in parsed.items())


GOOD = f'[keys.a]\nsha256 = "{"0f" * 32}"\ncreated = 2026-01-01T00:00:00Z\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[keys.a", "not valid TOML"),
        ("[gateway]\nport = 1", "no file of API keys"),
        (GOOD + "colour = 1", "keys.a: unknown key colour"),
        (GOOD + "max_requests = -1", "keys.a.max_requests is -1"),
        (GOOD + "max_requests = true", "keys.a.max_requests is True"),
        (GOOD + "expires = 2027-01-01", "keys.a.expires is no time"),
        (GOOD.replace("0f", "0F"), "keys.a.sha256 is no SHA-256 hash"),
        (GOOD.replace("created", "# created"), "keys.a has no created"),
        (GOOD.replace("keys.a", 'keys."a b"'), "letters, digits"),
        (GOOD + GOOD.replace("keys.a", "keys.b"), "a and b have the same key"),
        ("keys = 1", "no file of API keys"),
        ("[keys]\na = 1", "keys.a must be a table"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(text: str, expected: str) -> None:
    """The error names the entry and what is wrong there."""
    with pytest.raises(SettingsError) as caught:
        parse_keys(text, "F")
    assert expected in str(caught.value)


def test_a_key_is_random_and_its_hash_is_sha256() -> None:
    """dw- and 43 characters that need no quoting anywhere; the file keeps SHA-256 of all of it."""
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    alphabet = set(string.ascii_letters + string.digits + "-_")
    for one in made:
        assert one.startswith("dw-")
        assert len(one) == 46
        assert set(one) <= alphabet
        assert hash_key(one.encode()) == hashlib.sha256(one.encode()).digest()


def test_a_key_ends_when_it_expires_or_is_revoked() -> None:
    """It is good until the second it expires in; revoked is revoked, expired or not."""
    ends = ApiKey("a", bytes(32), NOW, expires=NOW)
    assert ends.state(NOW - timedelta(seconds=1)) == "ok"
    assert ends.state(NOW) == "expired"
    assert ApiKey("a", bytes(32), NOW, expires=NOW, revoked=NOW).state(NOW) == "revoked"


# --- The file ---------------------------------------------------------------------------------------------------------


def test_a_new_file_is_for_its_owner_and_no_others(tmp_path: Path) -> None:
    """Others cannot read it; root makes it readable for the directory's group, the gateway's."""
    path = tmp_path / "keys.toml"
    with changed_keys(path) as found:
        assert found == {}
        found["a"] = key("a")
    assert read_keys(path) == {"a": key("a")}
    assert stat.S_IMODE(path.stat().st_mode) == (0o640 if os.geteuid() == 0 else 0o600)
    assert os.listdir(tmp_path) == ["keys.toml"]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_writing_keeps_owner_and_group(tmp_path: Path) -> None:
    """What root changes stays readable for the gateway; a new file gets the group of its directory."""
    os.chown(tmp_path, 0, 1234)
    path = tmp_path / "keys.toml"
    with changed_keys(path) as found:
        found["a"] = key("a")
    assert path.stat().st_gid == 1234
    os.chown(path, 4321, 1235)
    path.chmod(0o600)
    with changed_keys(path) as found:
        found["b"] = key("b", "dw-y")
    after = path.stat()
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (4321, 1235, 0o600)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """The file that it points to is replaced."""
    (tmp_path / "real").mkdir()
    link = tmp_path / "keys.toml"
    link.symlink_to("real/keys.toml")
    with changed_keys(link) as found:
        found["a"] = key("a")
    assert link.is_symlink()
    assert list(read_keys(tmp_path / "real/keys.toml")) == ["a"]


def test_an_error_in_the_change_leaves_the_file_alone(tmp_path: Path) -> None:
    """All or nothing."""
    path = tmp_path / "keys.toml"
    with changed_keys(path) as found:
        found["a"] = key("a")
    before = path.read_bytes()

    def change() -> None:
        with changed_keys(path) as found:
            found.clear()
            raise SettingsError("no")

    with pytest.raises(SettingsError, match="no"):
        change()
    assert path.read_bytes() == before


def test_changes_at_the_same_time_all_arrive(tmp_path: Path) -> None:
    """Each waits for the one before it, so that none writes over another."""
    path = tmp_path / "keys.toml"

    def add(n: int) -> None:
        with changed_keys(path) as found:
            found[f"k{n}"] = key(f"k{n}", f"dw-{n}")

    threads = [threading.Thread(target=add, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_keys(path)) == {f"k{n}" for n in range(16)}


@pytest.mark.parametrize("mode", [0o660, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    """Whoever can write it could make a key; the remedy is a command."""
    path = tmp_path / "keys.toml"
    path.write_text(GOOD)
    path.chmod(mode)
    assert f"(chmod 640 {path})" in refused(path)


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner could make keys; root's and one's own are believed."""
    path = tmp_path / "keys.toml"
    path.write_text(GOOD)
    path.chmod(0o600)
    if path.stat().st_uid == 0:
        os.chown(path, 4321, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert "belongs to another user" in refused(path)


def test_what_is_no_file_of_keys_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing there, a directory, a pipe that nobody writes to, binary data, a file beyond any size."""
    assert "draftwire api-keys add" in refused(tmp_path / "missing.toml")
    refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    binary.chmod(0o600)
    assert "no text" in refused(binary)
    monkeypatch.setattr(api_keys, "MAX_FILE_BYTES", 10)
    binary.write_text("x" * 11)
    assert "larger than 10 bytes" in refused(binary)


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Writing into nothing is one line."""

    def change() -> None:
        with changed_keys(tmp_path / "no/keys.toml"):
            pass

    with pytest.raises(SettingsError, match="cannot use the directory"):
        change()
