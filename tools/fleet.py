"""Talking to a running fleet: HTTP to its gateway, and the router's own view of its peers.

Invariant: whatever is or is not listening there, the answer is a value or a `DraftwireError` with a remedy.
"""

from __future__ import annotations

import http.client
import json
import random
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from shared.errors import DraftwireError, RequestError, SettingsError, WireError
from shared.messages import Status
from shared.settings import Settings
from tools.supervisor import GatewayAddress, read_gateway_file

if TYPE_CHECKING:
    import zmq

_START_IT = "start one with `draftwire up`"


def find_gateway(settings: Settings, url: str = "") -> str:
    """The URL of the gateway: the one given, else that of the fleet in the run directory.

    Raises:
        DraftwireError: no fleet runs there.
    """
    return url or _own_gateway(settings).url


def _own_gateway(settings: Settings) -> GatewayAddress:
    address = read_gateway_file(settings.run_path)
    if address is None:
        raise DraftwireError(f"no gateway at {settings.run_path}", f"{_START_IT}, or give --url", "no_gateway")
    return address


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client shows and whom it believes. api_key: empty where none is needed. cacert: a PEM file with the
    issuers to believe in besides the system's.
    """

    api_key: str = ""
    cacert: Path | None = None


def open_gateway(
    settings: Settings, timeout_s: float, url: str = "", credentials: Credentials | None = None
) -> Gateway:
    """A client of the gateway at a URL, else of the fleet in the run directory.

    That one has left its certificate there, where nobody else can write: it is believed whoever issued it, and no
    other is.

    Raises:
        DraftwireError: no fleet runs there; a URL, key or file is wrong.
    """
    given = credentials or Credentials()
    if url:
        return Gateway(url, timeout_s, api_key=given.api_key, cacert=given.cacert)
    address = _own_gateway(settings)
    return Gateway(address.url, timeout_s, api_key=given.api_key, certificate=address.certificate)


def is_serving(settings: Settings) -> bool:
    """Whether the fleet's gateway says that it, and all it needs, is there."""
    try:
        return bool(open_gateway(settings, timeout_s=5).get("/health").get("status") == "ok")
    except (DraftwireError, AttributeError):
        return False


class Gateway:
    """A client of one gateway; each call makes its own connection.

    Args:
        url: "http://HOST:PORT", with an optional path before the gateway's own.
        timeout_s: longest silence before a call gives up.
        cacert: a PEM file with issuers to believe in besides the system's.
        certificate: the gateway's own as PEM, whatever name and issuer it has; any other is refused.

    Raises:
        SettingsError: the URL, the key or a file is wrong.
    """

    def __init__(
        self, url: str, timeout_s: float, *, api_key: str = "", cacert: Path | None = None, certificate: str = ""
    ) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise SettingsError(f"{url!r} is no URL of a gateway", "give http://HOST:PORT")
        self.url = url.rstrip("/")
        self._host = parts.hostname
        self._port = port
        self._path = parts.path.rstrip("/")
        self._timeout_s = timeout_s
        self._certificate = ssl.PEM_cert_to_DER_cert(certificate) if certificate else b""
        self._tls = _client_context(cacert, certificate) if parts.scheme == "https" else None
        if not all("!" <= c <= "~" for c in api_key):
            raise SettingsError("the API key has characters that no key has", "give it as it was printed")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str) -> Any:
        """The JSON answer to a GET."""
        with _Exchange(self, "GET", path, None) as exchange:
            return exchange.json()

    def health(self) -> dict[str, Any]:
        """What it says of itself: {"status": "ok"}, or what is missing or wrong."""
        with _Exchange(self, "GET", "/health", None, accepted=(200, 503)) as exchange:
            health = exchange.json()
            if not isinstance(health, dict) or not isinstance(health.get("status"), str):
                raise exchange.not_a_gateway()
            return health

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON answer to a POST."""
        with _Exchange(self, "POST", path, body) as exchange:
            return exchange.json()

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a POST that streams, up to its end; closing the iterator cancels the request."""
        with _Exchange(self, "POST", path, body) as exchange:
            yield from exchange.events()

    def connect(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        return _TlsConnection(self._host, self._port, self._timeout_s, self._tls, self._certificate)

    @property
    def encrypted(self) -> bool:
        return self._tls is not None

    def target(self, path: str) -> str:
        return self._path + path


def _client_context(cacert: Path | None, certificate: str) -> ssl.SSLContext:
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # it was made for the name that others use; `_TlsConnection` compares it whole
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # its issuer need not be known
        context.load_verify_locations(cadata=certificate)
    else:
        context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cacert is not None:
        try:
            context.load_verify_locations(cacert)
        except ssl.SSLError:
            raise SettingsError(f"--cacert: there is no certificate in {cacert}", "it must be a PEM file") from None
        except OSError as error:
            raise SettingsError(f"--cacert: cannot read {cacert}: {error.strerror}") from None
    return context


class _TlsConnection(http.client.HTTPSConnection):
    """Says nothing to a server that has another certificate than the one given, if one is."""

    def __init__(self, host: str, port: int | None, timeout_s: float, tls: ssl.SSLContext, certificate: bytes) -> None:
        super().__init__(host, port, timeout=timeout_s, context=tls)
        self._certificate = certificate

    def connect(self) -> None:
        super().connect()
        if self._certificate and self.sock.getpeercert(binary_form=True) != self._certificate:
            raise ssl.SSLCertVerificationError("it is not the one of this fleet")


class _Exchange:
    """One request and its response; as a context, it closes the connection and explains what went wrong."""

    def __init__(
        self,
        gateway: Gateway,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        accepted: Sequence[int] = (200,),
    ) -> None:
        self._gateway = gateway
        self._accepted = accepted
        self._connection = gateway.connect()
        self._request = (method, gateway.target(path), None if body is None else json.dumps(body).encode())

    def __enter__(self) -> _Exchange:
        method, path, body = self._request
        try:
            headers = self._gateway.headers | ({"Content-Type": "application/json"} if body else {})
            self._connection.request(method, path, body, headers)
        except ssl.SSLError as error:
            self._connection.close()
            raise self._untrusted(error) from None
        except OSError as error:
            self._connection.close()
            reason = error.strerror or str(error)
            raise DraftwireError(f"no gateway at {self._gateway.url}: {reason}", _START_IT, "no_gateway") from None
        try:
            self._response = self._connection.getresponse()
            if self._response.status not in self._accepted:
                raise _error(self._response.status, self._response.read(1 << 20))
        except BaseException as error:
            self._connection.close()
            raise self._explained(error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._response.close()
        self._connection.close()
        if error is not None:
            explained = self._explained(error)
            if explained is not error:
                raise explained from None

    def json(self) -> Any:
        raw = self._response.read()
        try:
            return json.loads(raw)
        except ValueError:
            raise self.not_a_gateway() from None

    def events(self) -> Iterator[dict[str, Any]]:
        last: dict[str, Any] = {}
        while line := self._response.readline(64 << 20):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                break
            try:
                event = json.loads(data)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                raise self.not_a_gateway()
            if "error" in event:
                raise _error(200, data)
            last = event
            yield event
        if not last.get("stop"):
            raise DraftwireError(
                f"the gateway at {self._gateway.url} ended the stream in the middle", "see its log", "stream_cut"
            )

    def _untrusted(self, error: ssl.SSLError) -> DraftwireError:
        url = self._gateway.url
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = getattr(error, "verify_message", "") or str(error)
            return DraftwireError(
                f"the certificate of {url} is not to be trusted: {reason}",
                "use the name that it was made for, and give the file of its issuer, or its own, with --cacert",
                "bad_certificate",
            )
        return DraftwireError(f"no HTTPS at {url}: {error.reason or error}", "is it an http:// address?", "no_gateway")

    def not_a_gateway(self) -> DraftwireError:
        return DraftwireError(f"what answers at {self._gateway.url} is no Draftwire gateway", "check --url")

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, TimeoutError):
            return DraftwireError(f"the gateway at {self._gateway.url} is silent", "see its log", "gateway_silent")
        if isinstance(error, http.client.RemoteDisconnected) and not self._gateway.encrypted:
            return DraftwireError(
                f"the gateway at {self._gateway.url} has closed the connection",
                "see its log; is it an https:// address?",
                "gateway_lost",
            )
        if isinstance(error, (OSError, http.client.HTTPException)):
            return DraftwireError(
                f"lost the gateway at {self._gateway.url}: {error or type(error).__name__}",
                "see its log",
                "gateway_lost",
            )
        return error


def _error(status: int, raw: bytes) -> DraftwireError:
    """What an error response says; OpenAI's shape, or whatever else came."""
    try:
        error = json.loads(raw)["error"]
        message, code = str(error["message"]), str(error.get("code") or "http_error")
    except (ValueError, KeyError, TypeError, AttributeError):
        return DraftwireError(f"the gateway answered with HTTP status {status}", "check --url and the gateway's log")
    remedy = "give its file with --api-key-file, or set DRAFTWIRE_API_KEY" if status == 401 else ""
    return RequestError(message, remedy, code)


JOIN_TIMEOUT_S = 15.0


def joined_workers(settings: Settings) -> Status:
    """Wait until the gateway can serve and the router knows every draft worker of the settings; the status then.

    Raises:
        DraftwireError: who is missing after JOIN_TIMEOUT_S.
    """
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    missing = {("draft", name) for name in settings.draft}
    while time.monotonic() < deadline:
        # In this order: a status from before it served may lack the verifier.
        status: Status | None = router_status(settings) if is_serving(settings) else None
        if status is not None:
            missing -= {(peer.role, peer.instance) for peer in status.peers if peer.alive}
            if not missing:
                return status
        time.sleep(0.05)
    who = ", ".join(" ".join(peer) for peer in sorted(missing)) or "the gateway, or what it needs,"
    raise DraftwireError(f"{who} did not come up in {JOIN_TIMEOUT_S:g} s", "see `draftwire doctor`", "not_joined")


def router_status(settings: Settings, timeout_s: float = 1.0) -> Any:
    """The router's `Status` of itself and its peers; None when no router answers."""
    from shared.messages import GetStatus, Status

    return ask_router(settings, GetStatus(random.getrandbits(63)), Status, timeout_s=timeout_s)


def dial(
    context: zmq.Context[zmq.Socket[bytes]], settings: Settings, service: Literal["router", "tokenizer", "sampler"]
) -> zmq.Socket[bytes]:
    """A socket to ask a service with; who opens it closes it. Errors: `SettingsError`, of endpoint and keys."""
    import zmq

    from shared import wire
    from shared.curve import Keys

    sock: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    try:
        sock.linger = 0
        sock.ipv6 = True
        sock.maxmsgsize = wire.MAX_MESSAGE_BYTES
        endpoint = settings.endpoint(service)
        Keys(settings, lambda *_event, **_fields: None).secure_client(sock, endpoint)
        sock.connect(endpoint)
    except BaseException:
        sock.close()
        raise
    return sock


def service_status(settings: Settings, name: Literal["tokenizer", "sampler"], timeout_s: float = 1.0) -> Any:
    """The `ServiceStatus` of one that the router does not know; None when it does not answer."""
    from shared.messages import GetStatus, ServiceStatus

    return _ask(settings, name, GetStatus(random.getrandbits(63)), (ServiceStatus,), timeout_s)


def ask_router(settings: Settings, question: Any, *kinds: type, timeout_s: float = 1.0) -> Any:
    """The router's answer to a message, of one of the kinds; None when it does not come in time.

    Raises:
        DraftwireError: what comes cannot be read.
    """
    return _ask(settings, "router", question, kinds, timeout_s)


def _ask(
    settings: Settings,
    service: Literal["router", "tokenizer", "sampler"],
    question: Any,
    kinds: tuple[type, ...],
    timeout_s: float,
) -> Any:
    import zmq

    from shared import wire

    with zmq.Context() as context, dial(context, settings, service) as sock:
        sock.send_multipart(wire.encode(question))
        while sock.poll(int(timeout_s * 1000)):
            try:
                message = wire.decode(sock.recv_multipart())
            except WireError as error:
                raise DraftwireError(f"the {service}'s answer cannot be read: {error}", code=error.code) from None
            if isinstance(message, kinds):
                return message
    return None
