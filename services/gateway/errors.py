"""Errors as HTTP clients see them: OpenAI's shape, with a stable code.

Invariant: every refusal and every failure of a request is one `ApiError`, whether it becomes a response of its own or
an event in a stream that has begun.
"""

from __future__ import annotations

from typing import Any, Final

from shared.messages import Error

_TYPES: Final = {
    429: "rate_limit_error",
    499: "client_disconnected",
    500: "server_error",
    502: "server_error",
    503: "service_unavailable",
}

_STATUS_OF_CODE: Final = {
    "bad_request": 400,
    "bad_logit_bias": 400,
    "bad_token": 400,
    "context_exceeded": 400,
    "empty_prompt": 400,
    "invalid_text": 400,
    "invalid_token": 400,
    "text_too_long": 400,
    "unknown_draft": 400,
    "draining": 503,
    "lost_commit": 503,
    "no_verifier": 503,
    "out_of_pages": 503,
    "overloaded": 503,
    "verifier_lost": 502,
}
_PARAM_OF_CODE: Final = {
    "context_exceeded": "prompt",
    "empty_prompt": "prompt",
    "bad_logit_bias": "logit_bias",
    "bad_token": "prompt",
    "invalid_text": "prompt",
    "unknown_draft": "draft",
}


class ApiError(Exception):
    """A request that cannot be served.

    Args:
        status: of the response. code: a stable word for programs. param: the field that is wrong, if one is.
        retry_after_s: 0 where trying again does not help.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """As JSON, in OpenAI's shape."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": str(self.retry_after_s)} if self.retry_after_s else {}


def bad_field(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400: what a field must be."""
    return ApiError(400, f"{param}: {message}", code, param)


def unavailable(what: str, retry_after_s: int = 1) -> ApiError:
    """503: a part of the fleet is not there."""
    return ApiError(503, what, "service_unavailable", retry_after_s=retry_after_s)


def from_wire(error: Error) -> ApiError:
    """What a router or tokenizer answered, for the client."""
    status = _STATUS_OF_CODE.get(error.code, 500)
    message = f"{error.message} ({error.remedy})" if error.remedy else error.message
    retry_after_s = error.retry_after_s or (1 if status in (429, 503) else 0)
    return ApiError(status, message, error.code, _PARAM_OF_CODE.get(error.code), retry_after_s)
