"""A host's key, and the list of those that may connect."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import SettingsError
from shared.keys import (
    AUTHORIZED,
    HOST_KEY,
    ROLES,
    authorize,
    from_z85,
    load_authorized,
    load_host_key,
    new_host_key,
    revoke,
    to_z85,
    write_host_key,
)


def test_a_key_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """The pair is libzmq's, its file is for its owner alone, and no temporary file is left."""
    key = new_host_key("box-1")
    path = write_host_key(tmp_path / "keys", key)
    assert load_host_key(tmp_path / "keys") == key
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == [HOST_KEY]
    assert from_z85(zmq.curve_public(to_z85(key.secret))) == key.public
    assert key.secret not in repr(key)
    assert load_host_key(tmp_path) is None


@given(st.binary(min_size=32, max_size=32))
def test_keys_in_digits_are_those_of_libzmq(raw: bytes) -> None:
    """Both ways of writing 32 bytes lead back to each other."""
    assert from_z85(to_z85(raw.hex())) == raw.hex()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text.replace("secret", "secrets"), "is no host key"),
        (lambda _text: "name = 3\n", "is no host key"),
        (lambda text: text[:-10], "is not valid TOML"),
        (lambda text: text.replace('public = "', 'public = "00'), "64 hexadecimal digits"),
        (lambda text: text.replace(text.split('"')[3], "0" * 64), "do not belong together"),
        (lambda _text: "\x00\xff", "is not valid TOML"),
    ],
)
def test_a_damaged_key_is_refused(tmp_path: Path, change: object, expected: str) -> None:
    """The file is named, and what to do."""
    path = write_host_key(tmp_path, new_host_key("box"))
    assert callable(change)
    path.write_text(change(path.read_text()))
    with pytest.raises(SettingsError, match=expected) as caught:
        load_host_key(tmp_path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """A secret that is none protects nobody."""
    path = write_host_key(tmp_path, new_host_key("box"))
    path.chmod(mode)
    with pytest.raises(SettingsError, match=r"others can read the host key.*chmod 600"):
        load_host_key(tmp_path)


def test_systemd_s_credential_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its mode, which is systemd's business."""
    write_host_key(tmp_path / "disk", new_host_key("disk"))
    credential = write_host_key(tmp_path / "credentials", new_host_key("credential"))
    credential.chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    found = load_host_key(tmp_path / "disk")
    assert found is not None
    assert found.name == "credential"
    credential.chmod(0o640)
    credential.write_text("none")  # from the unit, which found no key
    found = load_host_key(tmp_path / "disk")
    assert found is not None
    assert found.name == "disk"
    credential.unlink()
    found = load_host_key(tmp_path / "disk")
    assert found is not None
    assert found.name == "disk"


def test_the_list_is_kept(tmp_path: Path) -> None:
    """Roles can be changed, a name or key that is taken is refused, and a revoked key stays out for good."""
    one, two = new_host_key("one").public, new_host_key("two").public
    assert authorize(tmp_path, "one", one.upper(), ["operator", "draft"]).roles == ("draft", "operator")
    authorize(tmp_path, "two", two, ["server"])
    authorize(tmp_path, "one", one, ["draft"])
    assert [(k.name, k.public, k.roles, k.revoked) for k in load_authorized(tmp_path)] == [
        ("one", one, ("draft",), ""),
        ("two", two, ("server",), ""),
    ]
    with pytest.raises(SettingsError, match=r"one has another key.*revoke one"):
        authorize(tmp_path, "one", new_host_key("x").public, ["draft"])
    with pytest.raises(SettingsError, match="authorized as one"):
        authorize(tmp_path, "three", one, ["draft"])
    gone = revoke(tmp_path, "one")
    assert gone.revoked
    assert revoke(tmp_path, one) == gone
    with pytest.raises(SettingsError, match=r"was revoked.*keys init --force"):
        authorize(tmp_path, "one", one, ["draft"])
    fresh = new_host_key("one").public
    authorize(tmp_path, "one", fresh, ["draft"])
    assert [(k.name, k.public, bool(k.revoked)) for k in load_authorized(tmp_path)] == [
        ("one.revoked1", one, True),
        ("two", two, False),
        ("one", fresh, False),
    ]
    with pytest.raises(SettingsError, match=r"no key 'nobody'.*known: two, one"):
        revoke(tmp_path, "nobody")
    assert [p.name for p in tmp_path.iterdir()] == [AUTHORIZED]


@pytest.mark.parametrize(
    ("name", "public", "roles", "expected"),
    [
        ("a b", "0" * 64, ["draft"], "cannot be a name"),
        ("a", "0" * 63, ["draft"], "is no public key"),
        ("a", "g" * 64, ["draft"], "is no public key"),
        ("a", "0" * 64, ["drafts"], "there is no role 'drafts'"),
        ("a", "0" * 64, [], "needs a role"),
    ],
)
def test_what_cannot_be_authorized_is_refused(
    tmp_path: Path, name: str, public: str, roles: list[str], expected: str
) -> None:
    """In one line, and nothing is written."""
    with pytest.raises(SettingsError, match=expected):
        authorize(tmp_path, name, public, roles)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[key]\n", "is not valid TOML"),
        ("[[keys]]\n", r"only \[\[key\]\] tables"),
        ("[[key]]\nname = 'a'\nroles = ['draft']\n", "key 1 has no public"),
        (f"[[key]]\nname = 'a'\npublic = '{'0' * 64}'\nroles = ['boss']\n", "no role 'boss'"),
        (f"[[key]]\nname = 'a'\npublic = '{'0' * 64}'\nroles = 'draft'\n", "roles must be of type list"),
        (f"[[key]]\nname = 'a'\npublic = '{'0' * 64}'\nroles = ['draft']\nuntil = ''\n", "unknown field until"),
        (f"[[key]]\nname = 'a'\npublic = '{'0' * 64}'\nroles = ['draft']\nadded = '\"'\n", "added is no time"),
        (2 * f"[[key]]\nname = 'a'\npublic = '{'0' * 64}'\nroles = ['draft']\n", "is there twice"),
    ],
)
def test_a_list_that_is_wrong_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    """With the file and the entry."""
    (tmp_path / AUTHORIZED).write_text(text)
    with pytest.raises(SettingsError, match=expected) as caught:
        load_authorized(tmp_path)
    assert AUTHORIZED in caught.value.message


def test_a_list_that_others_can_write_is_refused(tmp_path: Path) -> None:
    """Whoever can add a key to it could come in."""
    authorize(tmp_path, "a", "0" * 64, ROLES)
    (tmp_path / AUTHORIZED).chmod(0o666)
    with pytest.raises(SettingsError, match=r"others can write to .*chmod go-w"):
        load_authorized(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """With what to do instead."""
    tmp_path.chmod(0o500)
    with pytest.raises(SettingsError, match=r"cannot write .*run as root"):
        write_host_key(tmp_path, new_host_key("a"))


def test_no_change_is_lost_to_another_at_the_same_time(tmp_path: Path) -> None:
    """Whoever changes the list waits for whoever does so at that moment."""
    keys = {f"host{n}": new_host_key("x").public for n in range(16)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: authorize(tmp_path, item[0], item[1], ["draft"]), keys.items()))
    assert {key.name: key.public for key in load_authorized(tmp_path)} == keys
