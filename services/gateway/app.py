"""The HTTP endpoints: what is asked at which path, and how it is answered.

Invariants: whatever goes wrong is answered as JSON in OpenAI's error shape; once a stream has begun, as its last event.
Where keys are needed, a path that is not in PUBLIC_PATHS needs one, also a path that is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.access import Caller, source_of
from services.gateway.errors import ApiError
from services.gateway.generation import Delta, Outcome, Transcript
from services.gateway.metrics import CONTENT_TYPE
from services.gateway.requests import (
    Completion,
    Shape,
    check_tokens,
    parse_completion,
    parse_detokenize,
    parse_json,
    parse_tokenize,
)
from services.gateway.responses import Format, event, make_format

if TYPE_CHECKING:
    from services.gateway.service import Exchange, GatewayService

CLIENT_GONE = 499
"""The status of a request whose client has not waited; no client ever sees it."""

PUBLIC_PATHS = frozenset({"/health", "/v1/health", "/metrics"})
"""What anybody may ask, with or without a key."""

BODY_TIMEOUT_S = 60.0
"""How long a client may take to send a request's body."""


def build_app(gateway: GatewayService) -> Starlette:
    """The ASGI application of a gateway."""
    simple = _Simple(gateway)
    app = Starlette(
        routes=[
            Route("/health", simple.health, methods=["GET"]),
            Route("/v1/health", simple.health, methods=["GET"]),
            *([Route("/metrics", simple.metrics, methods=["GET"])] if gateway.settings.gateway.metrics else ()),
            Route("/v1/models", simple.models, methods=["GET"]),
            Route("/models", simple.models, methods=["GET"]),
            Route("/tokenize", simple.tokenize, methods=["POST"]),
            Route("/detokenize", simple.detokenize, methods=["POST"]),
            Route("/v1/completions", _Completions(gateway, "openai"), methods=["POST"]),
            Route("/completion", _Completions(gateway, "llama"), methods=["POST"]),
            Route("/completions", _Completions(gateway, "llama"), methods=["POST"]),
        ],
        exception_handlers={
            ApiError: _on_api_error,
            HTTPException: _on_http_error,
            Exception: _on_defect,
        },
        middleware=[Middleware(_Door, gateway)],
    )
    app.router.redirect_slashes = False
    return app


class _Door:
    """Lets in who may ask, and notes who it is; answers the others."""

    def __init__(self, app: ASGIApp, gateway: GatewayService) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in PUBLIC_PATHS:
            try:
                scope[_CALLER] = self._gateway.access.caller(scope["headers"], source_of(scope.get("client")))
            except ApiError as error:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


_CALLER = "draftwire.caller"


def caller_of(scope: Scope) -> Caller:
    """Who makes a request that needs a key where there are keys."""
    caller = scope[_CALLER]
    assert isinstance(caller, Caller)
    return caller


class _Simple:
    """The endpoints that answer at once."""

    def __init__(self, gateway: GatewayService) -> None:
        self._gateway = gateway

    async def health(self, _request: Request) -> Response:
        health = await self._gateway.health()
        if health["status"] == "ok":
            return JSONResponse(health)
        return JSONResponse(health, 503, {"retry-after": "1"})

    async def metrics(self, _request: Request) -> Response:
        return Response(await self._gateway.metrics(), headers={"content-type": CONTENT_TYPE})

    async def models(self, _request: Request) -> Response:
        vocabulary = self._gateway.tokenizer.describe()
        model = {
            "id": vocabulary.model,
            "object": "model",
            "created": 0,
            "owned_by": "draftwire",
            "meta": {"n_vocab": vocabulary.n_vocab, "n_ctx_train": vocabulary.n_ctx_train},
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def tokenize(self, request: Request) -> Response:
        with caller_of(request.scope).entered():
            return await self._tokenize(request)

    async def _tokenize(self, request: Request) -> Response:
        asked = parse_tokenize(await self._body(request))
        tokenizer = self._gateway.tokenizer
        tokens = await tokenizer.encode(asked.content, parse_special=asked.parse_special, add_bos=asked.add_special)
        if not asked.with_pieces:
            return JSONResponse({"tokens": tokens.tolist()})
        pieces = (await tokenizer.decode(tokens, last=True, special=True)).pieces
        ids = tokens.tolist()
        entries = [{"id": token, "piece": piece} for token, piece in zip(ids, pieces[: len(ids)], strict=True)]
        if entries:
            entries[-1]["piece"] += pieces[-1]
        return JSONResponse({"tokens": entries})

    async def detokenize(self, request: Request) -> Response:
        with caller_of(request.scope).entered():
            return await self._detokenize(request)

    async def _detokenize(self, request: Request) -> Response:
        tokens = parse_detokenize(await self._body(request))
        tokenizer = self._gateway.tokenizer
        check_tokens("tokens", tokens, tokenizer.describe().n_vocab)
        decoded = await tokenizer.decode(np.array(tokens, np.int32), first=True, last=True, special=True)
        return JSONResponse({"content": "".join(decoded.pieces)})

    async def _body(self, request: Request) -> dict[str, Any]:
        return parse_json(await read_body(request, self._gateway.settings.gateway.max_body_bytes))


class _Completions:
    """A completion endpoint, as an ASGI application: it watches for its client going away while it works."""

    def __init__(self, gateway: GatewayService, shape: Shape) -> None:
        self._gateway = gateway
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._serve(scope, receive, send)
        except ApiError as error:
            if error.status != CLIENT_GONE:
                raise

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        with self._gateway.admitted(scope["path"], caller_of(scope)) as exchange:
            body = parse_json(await read_body(request, self._gateway.settings.gateway.max_body_bytes))
            completion, unknown = parse_completion(body, self._shape)
            if unknown:
                self._gateway.log.debug("fields_ignored", request=exchange.id, fields=[n[:64] for n in unknown[:32]])
            await _while_connected(exchange, receive, self._answer(exchange, completion, scope, receive, send))

    async def _answer(
        self, exchange: Exchange, completion: Completion, scope: Scope, receive: Receive, send: Send
    ) -> None:
        timeout_s = self._gateway.settings.gateway.request_timeout_s
        async with self._gateway.generate(exchange, completion) as transcript:
            model = self._gateway.tokenizer.describe().model
            answer = make_format(exchange.id, model, completion)
            async with contextlib.aclosing(transcript.deltas(timeout_s)) as deltas:
                if completion.stream:
                    await self._stream(exchange, answer, deltas, transcript, send)
                    return
                gathered = [delta async for delta in deltas]
        await JSONResponse(answer.whole(gathered, _outcome(transcript)))(scope, receive, send)

    async def _stream(
        self,
        exchange: Exchange,
        answer: Format,
        deltas: AsyncGenerator[Delta, None],
        transcript: Transcript,
        send: Send,
    ) -> None:
        """The response begins with the first token, so that a refusal has a status of its own."""
        first = await anext(deltas, None)
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        try:
            if first is not None:
                await _send_chunk(send, answer.chunk(first))
            async for delta in deltas:
                await _send_chunk(send, answer.chunk(delta))
        except ApiError as error:
            exchange.status, exchange.code = error.status, error.code
            await _send_chunk(send, error.body)
        else:
            for chunk in answer.last_chunks(_outcome(transcript)):
                await _send_chunk(send, chunk)
            await send({"type": "http.response.body", "body": answer.end, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def _outcome(transcript: Transcript) -> Outcome:
    if transcript.outcome is None:
        raise RuntimeError("a transcript ended without an outcome")
    return transcript.outcome


async def _send_chunk(send: Send, chunk: dict[str, Any] | None) -> None:
    if chunk is not None:
        await send({"type": "http.response.body", "body": event(chunk), "more_body": True})


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body. Errors: `ApiError` 413 when it is larger than `limit` bytes, 408 when it is too slow."""
    too_large = ApiError(413, f"the body may have at most {limit} bytes", "body_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body took more than {BODY_TIMEOUT_S:g} s", "body_too_slow") from None
    except ClientDisconnect:
        raise _gone() from None


async def _while_connected(exchange: Exchange, receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work; stop it when the client goes away."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    exchange.task = task
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.wait({task, watch})
    if task.cancelled():
        raise _gone()
    task.result()


def _gone() -> ApiError:
    return ApiError(CLIENT_GONE, "the client has gone away", "client_disconnected")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        refusal = ApiError(404, "there is nothing at this path", "not_found")
    elif error.status_code == 405:
        refusal = ApiError(405, f"{request.method} is not allowed here", "method_not_allowed")
    else:
        refusal = ApiError(error.status_code, error.detail, "http_error")
    return JSONResponse(refusal.body, refusal.status, error.headers)


async def _on_defect(_request: Request, _error: Exception) -> Response:
    refusal = ApiError(500, "the gateway has a defect; its log says more", "internal_error")
    return JSONResponse(refusal.body, refusal.status)
