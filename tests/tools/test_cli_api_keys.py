"""`draftwire api-keys`, and `draftwire generate` at a gateway that wants a key: real processes."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.api_keys import hash_key, read_keys
from shared.errors import DraftwireError
from shared.service import EXIT_CONFIG
from tests.gateway.certificates import openssl, self_signed
from tests.gateway.fleet import Fleet, Process, answer
from tests.tools.test_cli import Ended, draftwire
from tools.fleet import Gateway


def api_keys(path: Path, *arguments: str) -> Ended:
    return draftwire("api-keys", *arguments, "--file", str(path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


# --- The commands -----------------------------------------------------------------------------------------------------


def test_add_prints_the_key_once_and_keeps_its_hash(path: Path) -> None:
    """stdout is the key alone, for a script to take; the file has its hash, its limits and its end."""
    ended = api_keys(path, "add", "alice", "--max-requests", "2", "--expires", "2999-01-31")
    assert ended.status == 0, ended
    assert re.fullmatch(r"dw-[\w-]{43}\n", ended.out)
    secret = ended.out.strip()
    assert secret not in ended.err
    assert secret not in path.read_text()
    key = read_keys(path)["alice"]
    assert key.sha256 == hash_key(secret.encode())
    assert (key.limits.max_requests, key.limits.tokens_per_minute) == (2, 0)
    assert key.expires is not None
    assert key.expires.isoformat() == "2999-01-31T00:00:00+00:00"
    assert api_keys(path, "add", "bob").out != ended.out
    assert list(read_keys(path)) == ["alice", "bob"]


def test_the_setting_names_the_file(path: Path) -> None:
    """Without --file it is gateway.api_keys; without either, one line."""
    assert draftwire("api-keys", "add", "alice", "--set", f"gateway.api_keys={path}").status == 0
    assert "alice" in read_keys(path)
    draftwire("api-keys", "list").assert_one_line(EXIT_CONFIG, "which file", "gateway.api_keys")


def test_list_shows_names_states_and_limits(path: Path) -> None:
    """For people and as JSON; nothing of the key."""
    secret = api_keys(path, "add", "alice", "--tokens-per-minute", "500").out.strip()
    api_keys(path, "add", "bob")
    api_keys(path, "revoke", "bob")
    rows = [line.split() for line in api_keys(path, "list").out.splitlines()[1:]]
    assert [(row[0], row[1], row[-1]) for row in rows] == [("alice", "ok", "500"), ("bob", "revoked", "-")]
    ended = api_keys(path, "list", "--json")
    alice, bob = json.loads(ended.out)
    assert (alice["name"], alice["state"], alice["tokens_per_minute"]) == ("alice", "ok", 500)
    assert (bob["name"], bob["state"]) == ("bob", "revoked")
    assert hash_key(secret.encode()).hex() not in ended.out


def test_limits_change_what_is_given(path: Path) -> None:
    """The rest stays, the key too."""
    api_keys(path, "add", "alice", "--max-requests", "2", "--expires", "90d")
    before = read_keys(path)["alice"]
    assert api_keys(path, "limits", "alice", "--requests-per-minute", "5").status == 0
    after = read_keys(path)["alice"]
    assert (after.limits.max_requests, after.limits.requests_per_minute) == (2, 5)
    assert (after.sha256, after.expires) == (before.sha256, before.expires)
    api_keys(path, "limits", "alice", "--expires", "never", "--max-requests", "0")
    after = read_keys(path)["alice"]
    assert (after.expires, after.limits.max_requests) == (None, 0)


def test_a_revoked_name_may_be_given_again(path: Path) -> None:
    """To a new key; the old one opens nothing any more."""
    old = api_keys(path, "add", "alice").out.strip()
    assert api_keys(path, "revoke", "alice").status == 0
    assert read_keys(path)["alice"].revoked is not None
    new = api_keys(path, "add", "alice").out.strip()
    [key] = read_keys(path).values()
    assert key.sha256 == hash_key(new.encode()) != hash_key(old.encode())
    assert key.revoked is None


def test_mistakes_are_one_line_and_change_nothing(path: Path) -> None:
    """Each names the thing and what to do."""
    api_keys(path, "add", "alice")
    api_keys(path, "add", "bob")
    api_keys(path, "revoke", "bob")
    before = path.read_bytes()
    for arguments, parts in (
        (("add", "alice"), ("has a key alice already", "revoke")),
        (("add", "al ice"), ("'al ice'", "letters, digits")),
        (("add", "new", "--max-requests", "-1"), ("--max-requests is -1", "from 0 to")),
        (("add", "new", "--expires", "tomorrow"), ("'tomorrow'", "90d")),
        (("add", "new", "--expires", "2001-01-01"), ("which is over",)),
        (("add", "new", "--expires", "99999999999d"), ("--expires",)),
        (("revoke", "nobody"), ("no key nobody", "alice, bob")),
        (("revoke", "bob"), ("revoked already",)),
        (("limits", "nobody", "--max-requests", "1"), ("no key nobody",)),
        (("limits", "alice"), ("no limit given",)),
    ):
        api_keys(path, *arguments).assert_one_line(EXIT_CONFIG, *parts)
    assert path.read_bytes() == before


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    """One that others can write is not even read to be mended; no directory, no file, no keys in it."""
    path = tmp_path / "keys.toml"
    api_keys(path, "list").assert_one_line(EXIT_CONFIG, "no file of API keys", "api-keys add")
    api_keys(tmp_path / "no/keys.toml", "add", "a").assert_one_line(EXIT_CONFIG, "cannot use the directory")
    path.write_text("[gateway]\n")
    path.chmod(0o600)
    api_keys(path, "add", "a").assert_one_line(EXIT_CONFIG, "no file of API keys", str(path))
    path.write_text("")
    path.chmod(0o666)
    api_keys(path, "add", "a").assert_one_line(EXIT_CONFIG, "others can write", "chmod 640")
    assert path.read_text() == ""


# --- generate ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    fleet: Fleet
    cert: Path
    secret: str
    place: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A gateway with a key and a certificate for another name than the address that it serves at."""
    place = tmp_path_factory.mktemp("site")
    secret = api_keys(place / "keys.toml", "add", "alice").out.strip()
    cert, key = self_signed(place, "box", "DNS:localhost")
    fleet = Fleet(
        place,
        f'gateway.api_keys="{place}/keys.toml"',
        f'gateway.tls_cert="{cert}"',
        f'gateway.tls_key="{key}"',
        verify=ssl.create_default_context(cafile=str(cert)),
    )
    fleet.router.script = answer("fine")
    yield Site(fleet, cert, secret, place)
    fleet.close()


def test_generate_finds_its_own_fleet_over_https(site: Site, tmp_path: Path) -> None:
    """By its run directory, with the key from a file, from the environment or from an option."""
    file = tmp_path / "key"
    file.write_text(site.secret + "\n")
    here = ("generate", "x", "--run-dir", str(site.place))
    for ended in (
        draftwire(*here, "--api-key-file", str(file)),
        draftwire(*here, environment={"DRAFTWIRE_API_KEY": site.secret}),
        draftwire(*here, "--api-key", site.secret),
        draftwire(*here, "--api-key-file", str(file), environment={"DRAFTWIRE_API_KEY": "dw-wrong"}),
    ):
        assert (ended.status, ended.out) == (0, "fine\n"), ended


def test_generate_without_a_key_is_told_how_to_give_one(site: Site) -> None:
    """Missing or wrong: one line."""
    here = ("generate", "x", "--run-dir", str(site.place))
    draftwire(*here).assert_one_line(1, "no API key", "--api-key-file", "DRAFTWIRE_API_KEY")
    draftwire(*here, "--api-key", "dw-wrong").assert_one_line(1, "not valid", "--api-key-file")


def test_generate_verifies_a_gateway_elsewhere(site: Site) -> None:
    """By the name that was typed, against the system's issuers and those of --cacert."""
    port = site.fleet.url.rpartition(":")[2]
    key = ("--api-key", site.secret)
    good = f"https://localhost:{port}"
    ended = draftwire("generate", "x", "--url", good, "--cacert", str(site.cert), *key)
    assert (ended.status, ended.out) == (0, "fine\n"), ended
    draftwire("generate", "x", "--url", good, *key).assert_one_line(1, "not to be trusted", "--cacert")
    other_name = f"https://127.0.0.1:{port}"
    ended = draftwire("generate", "x", "--url", other_name, "--cacert", str(site.cert), *key)
    ended.assert_one_line(1, "not to be trusted", "127.0.0.1")
    ended = draftwire("generate", "x", "--url", f"http://localhost:{port}", *key)
    ended.assert_one_line(1, "closed the connection", "https://")


def test_generate_sends_no_key_to_who_has_another_certificate(site: Site, tmp_path: Path) -> None:
    """What listens where the fleet once was is not believed."""
    other, _ = self_signed(tmp_path, "other", "DNS:localhost")
    address = json.loads((site.place / "gateway.json").read_text())
    (tmp_path / "gateway.json").write_text(json.dumps(address | {"certificate": other.read_text()}))
    lines = site.fleet.gateway.n_lines
    ended = draftwire("generate", "x", "--run-dir", str(tmp_path), "--api-key", site.secret)
    ended.assert_one_line(1, "not to be trusted")
    assert "request_done" not in "".join(site.fleet.gateway.log_text.splitlines()[lines:])


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, tokenizer=False, router=False)
    yield fleet
    fleet.close()


def test_https_where_there_is_none(plain: Fleet) -> None:
    """One line that asks about the address."""
    url = plain.url.replace("http:", "https:")
    draftwire("generate", "x", "--url", url).assert_one_line(1, f"no HTTPS at {url}", "http:// address")


def test_files_that_hold_no_key(tmp_path: Path) -> None:
    """Missing, empty, two words, binary: one line each, before anything is sent."""
    file = tmp_path / "key"
    ask = ("generate", "x", "--url", "http://127.0.0.1:9", "--api-key-file", str(file))
    draftwire(*ask).assert_one_line(EXIT_CONFIG, "cannot read", str(file))
    for content in (b"", b"\n", b"two words", b"a\nb", b"\xff\xfe"):
        file.write_bytes(content)
        draftwire(*ask).assert_one_line(EXIT_CONFIG, "does not hold one API key")
    file.write_bytes(b"a\x01b")
    draftwire(*ask).assert_one_line(EXIT_CONFIG, "characters that no key has")
    (tmp_path / "ca").write_text("no certificate")
    ask = ("generate", "x", "--url", "https://127.0.0.1:9", "--cacert")
    draftwire(*ask, str(tmp_path / "ca")).assert_one_line(EXIT_CONFIG, "no certificate in")
    draftwire(*ask, str(tmp_path / "missing")).assert_one_line(EXIT_CONFIG, "cannot read")


def test_the_clients_pin_is_the_whole_certificate(site: Site, tmp_path: Path) -> None:
    """A certificate that the pinned one has issued is another certificate."""
    key, request, cert, extensions = (tmp_path / f"leaf.{suffix}" for suffix in ("key", "csr", "crt", "ext"))
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=leaf", "-keyout", str(key), "-out", str(request))
    extensions.write_text("subjectAltName=DNS:localhost\n")
    openssl(
        "x509", "-req", "-in", str(request), "-CA", str(site.cert), "-CAkey", str(site.place / "box.key"),
        "-CAcreateserial", "-days", "2", "-extfile", str(extensions), "-out", str(cert),
    )  # fmt: skip
    process = Process("gateway", tmp_path, f'gateway.tls_cert="{cert}"', f'gateway.tls_key="{key}"')
    try:
        port = process.logged("listening")["port"]
        url = f"https://localhost:{port}"
        with pytest.raises(DraftwireError, match="HTTP status 503"):  # the answer: trusted where its issuer is
            Gateway(url, 10, cacert=site.cert).get("/health")
        with pytest.raises(DraftwireError, match="not the one of this fleet"):
            Gateway(url, 10, certificate=site.cert.read_text()).get("/health")
    finally:
        process.stop()
