"""Talking to a running fleet: HTTP to its gateway, and the router's own view of its peers.

Invariant: whatever is or is not listening there, the answer is a value or a `DraftwireError` with a remedy.
"""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

from shared.errors import DraftwireError, RequestError, SettingsError, WireError
from shared.messages import Status
from shared.settings import Settings
from tools.supervisor import read_gateway_file

_START_IT = "start one with `draftwire up`"


def find_gateway(settings: Settings, url: str = "") -> str:
    """The URL of the gateway: the one given, else that of the fleet in the run directory.

    Raises:
        DraftwireError: no fleet runs there.
    """
    if url:
        return url
    address = read_gateway_file(settings.run_path)
    if address is None:
        raise DraftwireError(f"no gateway at {settings.run_path}", f"{_START_IT}, or give --url", "no_gateway")
    host, port = address
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_serving(settings: Settings) -> bool:
    """Whether the fleet's gateway says that it, and all it needs, is there."""
    try:
        return bool(Gateway(find_gateway(settings), timeout_s=5).get("/health").get("status") == "ok")
    except (DraftwireError, AttributeError):
        return False


class Gateway:
    """A client of one gateway; each call makes its own connection.

    Args:
        url: "http://HOST:PORT", with an optional path before the gateway's own.
        timeout_s: longest silence before a call gives up.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
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
        self._https = parts.scheme == "https"
        self._timeout_s = timeout_s

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
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=self._timeout_s)

    def target(self, path: str) -> str:
        return self._path + path


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
            self._connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
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

    def not_a_gateway(self) -> DraftwireError:
        return DraftwireError(f"what answers at {self._gateway.url} is no Draftwire gateway", "check --url")

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, TimeoutError):
            return DraftwireError(f"the gateway at {self._gateway.url} is silent", "see its log", "gateway_silent")
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
    return RequestError(message, code=code)


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


def service_status(settings: Settings, name: Literal["tokenizer", "sampler"], timeout_s: float = 1.0) -> Any:
    """The `ServiceStatus` of one that the router does not know; None when it does not answer."""
    from shared.messages import GetStatus, ServiceStatus

    return _ask(settings.endpoint(name), f"the {name}", GetStatus(random.getrandbits(63)), (ServiceStatus,), timeout_s)


def ask_router(settings: Settings, question: Any, *kinds: type, timeout_s: float = 1.0) -> Any:
    """The router's answer to a message, of one of the kinds; None when it does not come in time.

    Raises:
        DraftwireError: what comes cannot be read.
    """
    return _ask(settings.endpoint("router"), "the router", question, kinds, timeout_s)


def _ask(endpoint: str, who: str, question: Any, kinds: tuple[type, ...], timeout_s: float) -> Any:
    import zmq

    from shared import wire

    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.maxmsgsize = wire.MAX_MESSAGE_BYTES
        sock.connect(endpoint)
        sock.send_multipart(wire.encode(question))
        while sock.poll(int(timeout_s * 1000)):
            try:
                message = wire.decode(sock.recv_multipart())
            except WireError as error:
                raise DraftwireError(f"{who}'s answer cannot be read: {error}", code=error.code) from None
            if isinstance(message, kinds):
                return message
    return None
