"""Keys and HTTPS at a running gateway, as clients meet them."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.api_keys import ApiKey, KeyLimits, changed_keys, hash_key, new_key
from shared.messages import Cancel, Finished, Generate, Tokens
from tests.gateway.certificates import chain, self_signed
from tests.gateway.fleet import (
    DRAFT,
    PATIENCE_S,
    STATS,
    FakeRouter,
    Fleet,
    MakeFleet,
    Process,
    answer,
    endless,
    ids,
    silent,
)
from tests.gateway.test_service import error_of
from tests.shared.test_api_keys import NOW

USED = STATS.n_prompt + STATS.n_generated
"""Tokens that each answer of the scripted router took, by its own figures."""


def set_key(path: Path, name: str, secret: str, **fields: Any) -> None:
    with changed_keys(path) as keys:
        keys[name] = ApiKey(name, hash_key(secret.encode()), fields.pop("created", NOW), **fields)


@dataclass(frozen=True)
class Site:
    """A gateway with keys and HTTPS, and what its clients need."""

    fleet: Fleet
    keys: Path
    cert: Path
    secret: str
    """Of the key alice."""

    def reread(self, change: Any) -> None:
        """Change the file, and wait until the gateway has seen it."""
        mark = self.fleet.gateway.n_lines
        change()
        self.fleet.gateway.logged("api_keys_read", mark)

    def add(self, name: str, **fields: Any) -> str:
        secret = new_key()
        self.reread(lambda: set_key(self.keys, name, secret, **fields))
        return secret


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    place = tmp_path_factory.mktemp("site")
    keys, secret = place / "keys.toml", new_key()
    set_key(keys, "alice", secret)
    cert, key = self_signed(place, "here")
    fleet = Fleet(
        place,
        f'gateway.api_keys="{keys}"',
        f'gateway.tls_cert="{cert}"',
        f'gateway.tls_key="{key}"',
        verify=ssl.create_default_context(cafile=str(cert)),
    )
    yield Site(fleet, keys, cert, secret)
    fleet.close()


@pytest.fixture
def site(shared_site: Site) -> Site:
    shared_site.fleet.router.script = answer("fine")
    return shared_site


def refused(response: httpx.Response, code: str) -> str:
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = error_of(response)
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    return str(error["message"])


# --- Keys -------------------------------------------------------------------------------------------------------------


def test_the_openai_client_works_over_https(site: Site) -> None:
    """With its api_key, streaming and not; without it, its own error for that."""
    openai = pytest.importorskip("openai")
    with httpx.Client(trust_env=False, verify=ssl.create_default_context(cafile=str(site.cert))) as http:
        url = f"{site.fleet.url}/v1"
        assert url.startswith("https://")
        client = openai.OpenAI(base_url=url, api_key=site.secret, http_client=http, max_retries=0)
        assert client.models.list().data[0].id == "null"
        assert client.completions.create(model="null", prompt="x").choices[0].text == "fine"
        chunks = list(client.completions.create(model="null", prompt="x", stream=True))
        assert "".join(c.choices[0].text for c in chunks) == "fine"
        stranger = openai.OpenAI(base_url=url, api_key=new_key(), http_client=http, max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="not valid"):
            stranger.completions.create(model="null", prompt="x")
        limited = site.add("limited", limits=KeyLimits(requests_per_minute=1))
        narrow = openai.OpenAI(base_url=url, api_key=limited, http_client=http, max_retries=0)
        narrow.completions.create(model="null", prompt="x")
        with pytest.raises(openai.RateLimitError, match="requests_per_minute"):
            narrow.completions.create(model="null", prompt="x")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"), ("GET", "/models"), ("POST", "/tokenize"), ("POST", "/detokenize"),
        ("POST", "/v1/completions"), ("POST", "/completion"), ("POST", "/completions"),
        ("GET", "/"), ("GET", "/nothing"), ("GET", "//health"), ("GET", "/health/"), ("DELETE", "/v1/models"),
    ],
)  # fmt: skip
def test_what_needs_a_key(site: Site, method: str, path: str) -> None:
    """Everything but health and metrics, also what is not there; the answer to a stranger is the same for all."""
    asked = site.fleet.http.request(method, path, json={"prompt": "x", "content": "x", "tokens": [20]})
    assert "Bearer" in refused(asked, "missing_api_key")
    for headers in ({"Authorization": f"Bearer {site.secret}"}, {"X-Api-Key": site.secret}):
        known = site.fleet.http.request(
            method, path, json={"prompt": "x", "content": "x", "tokens": [20]}, headers=headers
        )
        assert known.status_code in (200, 404, 405)


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
def test_health_is_public(site: Site, path: str) -> None:
    """A monitor needs no key, and a wrong one harms nothing."""
    assert site.fleet.http.get(path).json() == {"status": "ok"}
    assert site.fleet.http.get(path, headers={"X-Api-Key": "wrong"}).status_code == 200


def test_keys_that_open_nothing(site: Site) -> None:
    """Unknown and revoked are one answer, expired another; the log can tell all of them, with the name."""
    past = NOW - timedelta(days=999)
    revoked, expired = site.add("gone", revoked=NOW), site.add("old", created=past, expires=past)
    unknown = [new_key(), site.secret[:-1], site.secret + "x", "x" * 10_000]
    messages = {refused(site.fleet.post("/completion", key, prompt="x"), "invalid_api_key") for key in unknown}
    messages.add(refused(site.fleet.post("/completion", revoked, prompt="x"), "invalid_api_key"))
    assert messages == {"this API key is not valid"}
    assert "old has expired" in refused(site.fleet.post("/completion", expired, prompt="x"), "expired_api_key")
    generated = [m for _, m in site.fleet.router.heard if isinstance(m, Generate)]
    assert site.fleet.post("/completion", site.secret, prompt="x").status_code == 200
    assert len([m for _, m in site.fleet.router.heard if isinstance(m, Generate)]) == len(generated) + 1


def test_a_stranger_with_a_large_body_is_answered(site: Site) -> None:
    """The refusal does not wait for the body, and the connection may be used again."""
    refused(site.fleet.http.post("/completion", content=b"x" * 6_000_000), "missing_api_key")
    assert site.fleet.http.get("/health").status_code == 200


def test_the_name_is_in_the_log_and_the_key_is_not(site: Site) -> None:
    """request_done says whose request it was; refusals are counted by address."""
    mark = site.fleet.gateway.n_lines
    site.fleet.post("/completion", site.secret, prompt="x")
    assert site.fleet.gateway.logged("request_done", mark)["api_key"] == "alice"
    stranger = new_key()
    site.fleet.post("/completion", stranger, prompt="x")
    line = site.fleet.gateway.logged("api_key_refused")
    assert line["source"] == "127.0.0.1"
    log = site.fleet.gateway.log_text
    for secret in (site.secret, stranger):
        assert secret not in log
        assert hash_key(secret.encode()).hex() not in log
        assert secret not in site.keys.read_text()


def test_revocation_takes_effect_while_the_gateway_runs(site: Site) -> None:
    """What is running goes on to its end; the next request is refused."""
    secret = site.add("bob")
    site.fleet.router.script = silent
    mark = site.fleet.router.n_heard
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(site.fleet.post, "/completion", secret, prompt="x")
        peer, generate = site.fleet.router.wait_for(Generate, mark)
        site.reread(lambda: set_key(site.keys, "bob", secret, revoked=NOW))
        refused(site.fleet.post("/completion", secret, prompt="x"), "invalid_api_key")
        site.fleet.router.tell(peer, Tokens(generate.request, ids("a"), 0))
        site.fleet.router.tell(peer, Finished(generate.request, "stop", STATS, DRAFT))
        assert running.result(PATIENCE_S).json()["content"] == "a"


def test_a_broken_file_keeps_the_old_keys(site: Site) -> None:
    """One error in the log, and everybody who could ask still can."""
    good, mark = site.keys.read_bytes(), site.fleet.gateway.n_lines
    site.keys.write_text("[keys.")
    line = site.fleet.gateway.logged("api_keys_unreadable", mark)
    assert line["level"] == "error"
    assert str(site.keys) in line["reason"]
    assert site.fleet.post("/completion", site.secret, prompt="x").status_code == 200
    refused(site.fleet.post("/completion", new_key(), prompt="x"), "invalid_api_key")
    site.reread(lambda: site.keys.write_bytes(good))


# --- Limits -----------------------------------------------------------------------------------------------------------


def over(response: httpx.Response, limit: str) -> int:
    assert response.status_code == 429
    error = error_of(response)
    assert (error["type"], error["code"]) == ("rate_limit_error", f"{limit}_exceeded")
    assert limit in error["message"]
    return int(response.headers["retry-after"])


def test_requests_at_a_time(site: Site) -> None:
    """A second request of the key is refused while the first runs, others are served, and then it may again."""
    secret = site.add("one", limits=KeyLimits(max_requests=1))
    site.fleet.router.script = silent
    mark, lines = site.fleet.router.n_heard, site.fleet.gateway.n_lines
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(site.fleet.post, "/completion", secret, prompt="x")
        peer, generate = site.fleet.router.wait_for(Generate, mark)
        assert over(site.fleet.post("/completion", secret, prompt="x"), "max_requests") == 1
        over(site.fleet.post("/tokenize", secret, content="x"), "max_requests")
        line = site.fleet.gateway.logged("request_done", lines, status=429)
        assert (line["api_key"], line["code"]) == ("one", "max_requests_exceeded")
        assert site.fleet.post("/tokenize", site.secret, content="x").status_code == 200
        site.fleet.router.tell(peer, Finished(generate.request, "stop", STATS, DRAFT))
        assert running.result(PATIENCE_S).status_code == 200
    site.fleet.router.script = answer("fine")
    assert site.fleet.post("/completion", secret, prompt="x").status_code == 200


def test_requests_per_minute(site: Site) -> None:
    """A minute's worth at once, of completions and of texts to tokenize; the list of models is free."""
    secret = site.add("few", limits=KeyLimits(requests_per_minute=2))
    assert site.fleet.post("/completion", secret, prompt="x").status_code == 200
    assert site.fleet.post("/tokenize", secret, content="x").status_code == 200
    for path in ("/completion", "/v1/completions", "/tokenize", "/detokenize"):
        assert 1 <= over(site.fleet.post(path, secret, prompt="x", content="x"), "requests_per_minute") <= 30
    assert site.fleet.http.get("/v1/models", headers={"X-Api-Key": secret}).status_code == 200


def test_tokens_per_minute(site: Site) -> None:
    """Prompt and answer are charged after the request, also of one that its client has cancelled."""
    secret = site.add("short", limits=KeyLimits(tokens_per_minute=2 * USED - 1))
    assert site.fleet.post("/completion", secret, prompt="x").status_code == 200
    site.fleet.router.script = endless("abc")
    lines = site.fleet.gateway.n_lines
    headers = {"X-Api-Key": secret}
    with site.fleet.http.stream("POST", "/completion", json={"prompt": "x", "stream": True}, headers=headers) as stream:
        assert next(stream.iter_lines()).startswith("data: ")
    line = site.fleet.gateway.logged("request_done", lines, api_key="short", status=499)
    assert line["predicted_n"] == STATS.n_generated
    assert 1 <= over(site.fleet.post("/completion", secret, prompt="x"), "tokens_per_minute") <= 6


# --- HTTPS ------------------------------------------------------------------------------------------------------------


def tls_socket(site: Site, receive_buffer: int = 0) -> ssl.SSLSocket:
    raw = socket.socket()
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.settimeout(PATIENCE_S)
    raw.connect(("127.0.0.1", int(site.fleet.url.rpartition(":")[2])))
    context = ssl.create_default_context(cafile=str(site.cert))
    return context.wrap_socket(raw, server_hostname="127.0.0.1")


def ask(site: Site, client: ssl.SSLSocket) -> None:
    body = b'{"prompt": "x", "stream": true}'
    head = f"POST /completion HTTP/1.1\r\nhost: x\r\nx-api-key: {site.secret}\r\ncontent-length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)


def test_only_tls_is_spoken(site: Site) -> None:
    """Plain HTTP at the port gets no answer."""
    with pytest.raises(httpx.TransportError):
        httpx.get(site.fleet.url.replace("https", "http") + "/health", trust_env=False)


@pytest.mark.parametrize(("option", "spoken"), [("-tls1_1", False), ("-tls1_2", True), ("-tls1_3", True)])
def test_versions_of_tls(site: Site, option: str, spoken: bool) -> None:
    """1.2 and 1.3, to a client that would take any."""
    address = site.fleet.url.removeprefix("https://")
    ended = subprocess.run(
        ["openssl", "s_client", "-connect", address, option, "-cipher", "ALL:@SECLEVEL=0"],
        input=b"",
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (ended.returncode == 0) is spoken, ended.stderr


def test_a_certificate_for_another_name_or_issuer_is_noticed(site: Site) -> None:
    """Clients that verify do so against what is served."""
    with pytest.raises(httpx.ConnectError, match=r"self.signed"):
        httpx.get(f"{site.fleet.url}/health", trust_env=False)
    with pytest.raises(httpx.ConnectError, match="mismatch"):
        httpx.get(
            f"{site.fleet.url.replace('127.0.0.1', 'localhost')}/health",
            verify=ssl.create_default_context(cafile=str(site.cert)),
            trust_env=False,
        )


def test_a_client_that_goes_away_cancels_its_generation(site: Site) -> None:
    """Behind TLS as without."""
    site.fleet.router.script = endless("abc")
    mark, lines = site.fleet.router.n_heard, site.fleet.gateway.n_lines
    client = tls_socket(site)
    ask(site, client)
    generate = site.fleet.router.wait_for(Generate, mark)[1]
    assert client.recv(10)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert site.fleet.router.wait_for(Cancel, mark)[1].request == generate.request
    assert site.fleet.gateway.logged("request_done", lines, status=499)["api_key"] == "alice"


def test_a_client_that_does_not_read_is_given_up(site: Site) -> None:
    """TLS gathers no endless answer: its generation is cancelled, and others are served meanwhile."""
    stop = threading.Event()

    def flood(router: FakeRouter, peer: bytes, message: Generate) -> None:
        def more() -> None:
            if not stop.is_set():
                for _ in range(200):
                    router.send(peer, Tokens(message.request, ids("x" * 60), 0))
                router.later(more)

        more()

    site.fleet.router.script = flood
    mark, lines = site.fleet.router.n_heard, site.fleet.gateway.n_lines
    client = tls_socket(site, 4096)
    try:
        ask(site, client)
        generate = site.fleet.router.wait_for(Generate, mark)[1]
        site.fleet.router.script = answer("fine")
        assert site.fleet.post("/completion", site.secret, prompt="y").json()["content"] == "fine"
        assert site.fleet.router.wait_for(Cancel, mark)[1].request == generate.request
        assert site.fleet.gateway.logged("client_too_slow", lines)
    finally:
        stop.set()
        client.close()


def test_a_chain_is_served(make_fleet: MakeFleet, tmp_path: Path) -> None:
    """A client that knows the root alone believes the leaf; and the gateway stops although it stays connected."""
    root, full, key = chain(tmp_path)
    fleet = make_fleet(
        f'gateway.tls_cert="{full}"', f'gateway.tls_key="{key}"', verify=ssl.create_default_context(cafile=str(root))
    )
    assert fleet.http.get("/health").json() == {"status": "ok"}
    address = json.loads((tmp_path / "gateway.json").read_text())
    assert address["scheme"] == "https"
    assert address["certificate"].strip() in (tmp_path / "leaf.crt").read_text()
    fleet.gateway.signal(signal.SIGTERM)
    assert fleet.gateway.wait() == 0


# --- Starting ---------------------------------------------------------------------------------------------------------


def ended(run_dir: Path, *overrides: str) -> dict[str, Any]:
    """What a gateway says that does not start."""
    process = Process("gateway", run_dir, *overrides)
    assert process.wait() == 78
    line = process.logged("stopped")
    process.stop()
    assert "listening" not in process.log_text
    return line


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_address_without_keys_does_not_start(tmp_path: Path, host: str) -> None:
    """One line that says what to do; TLS alone is no key."""
    cert, key = self_signed(tmp_path, "a")
    for more in ((), (f'gateway.tls_cert="{cert}"', f'gateway.tls_key="{key}"')):
        line = ended(tmp_path, f'gateway.host="{host}"', *more)
        assert line["code"] == "bad_settings"
        assert host in line["reason"]
        assert "draftwire api-keys add" in line["remedy"]
        assert "network.insecure" in line["remedy"]


def started(run_dir: Path, *overrides: str) -> Process:
    process = Process("gateway", run_dir, *overrides)
    process.logged("ready")
    process.stop()
    return process


def test_an_open_address_starts_with_a_flag_and_a_warning(tmp_path: Path) -> None:
    """network.insecure opens it, and each start says so."""
    process = started(tmp_path, 'gateway.host="0.0.0.0"', "network.insecure=true")
    assert process.logged("insecure_gateway")["level"] == "warning"


def test_an_open_address_with_keys_wants_tls(tmp_path: Path) -> None:
    """It starts, with a warning as long as keys would travel in clear."""
    keys = tmp_path / "keys.toml"
    set_key(keys, "a", new_key())
    cert, key = self_signed(tmp_path, "a")
    settings = ('gateway.host="0.0.0.0"', f'gateway.api_keys="{keys}"')
    assert started(tmp_path, *settings).logged("unencrypted_gateway")["level"] == "warning"
    quiet = started(tmp_path, *settings, f'gateway.tls_cert="{cert}"', f'gateway.tls_key="{key}"')
    assert '"level": "warning"' not in quiet.log_text


def test_bad_files_do_not_start(tmp_path: Path) -> None:
    """A file of keys that is missing or that others can write, a key that others can read: one line each."""
    keys = tmp_path / "keys.toml"
    assert "no file of API keys" in ended(tmp_path, f'gateway.api_keys="{keys}"')["reason"]
    set_key(keys, "a", new_key())
    keys.chmod(0o666)
    assert "others can write" in ended(tmp_path, f'gateway.api_keys="{keys}"')["reason"]
    cert, key = self_signed(tmp_path, "a")
    key.chmod(0o644)
    assert "others can use" in ended(tmp_path, f'gateway.tls_cert="{cert}"', f'gateway.tls_key="{key}"')["reason"]


@pytest.mark.parametrize(("forwarded", "source"), [(True, "203.0.113.9"), (False, "127.0.0.1")])
def test_the_address_behind_a_proxy(make_fleet: MakeFleet, tmp_path: Path, forwarded: bool, source: str) -> None:
    """X-Forwarded-For is believed if the settings say so, its last entry that is not the proxy itself."""
    keys = tmp_path / "keys.toml"
    set_key(keys, "a", new_key())
    fleet = make_fleet(f'gateway.api_keys="{keys}"', f"gateway.forwarded={str(forwarded).lower()}")
    headers = {"X-Forwarded-For": "198.51.100.1, 203.0.113.9"}
    assert fleet.http.get("/v1/models", headers=headers).status_code == 401
    assert fleet.gateway.logged("api_key_refused")["source"] == source
