"""Answers in OpenAI's shape and in llama-server's. Pure: values in, JSON objects out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.gateway.generation import Delta, Outcome
from services.gateway.requests import Completion
from services.gateway.timings import speculation_report, timings


class Format(Protocol):
    """How one request is answered. end: what closes a stream, after the last chunk."""

    @property
    def end(self) -> bytes: ...

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """A chunk of a stream; None where there is nothing to say."""

    def last_chunks(self, outcome: Outcome) -> list[dict[str, Any]]: ...

    def whole(self, deltas: list[Delta], outcome: Outcome) -> dict[str, Any]:
        """The answer to a request that does not stream."""


@dataclass(frozen=True, slots=True)
class OpenAIFormat:
    """POST /v1/completions, with the seed, `timings` and `draftwire` beside OpenAI's fields."""

    id: str
    model: str
    completion: Completion
    created: int = field(default_factory=lambda: int(time.time()))
    end: bytes = b"data: [DONE]\n\n"

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        if not delta.text and not self.completion.return_tokens:
            return None
        chunk = self._object(delta.text, None)
        if self.completion.include_usage:
            chunk["usage"] = None
        if self.completion.return_tokens:
            chunk |= _token_fields([delta])
        return chunk

    def last_chunks(self, outcome: Outcome) -> list[dict[str, Any]]:
        last = self._object("", outcome.finish_reason) | _figures(self.completion, outcome)
        if not self.completion.include_usage:
            return [last]
        usage = self._object("", None) | {"choices": [], "usage": _usage(outcome)}
        return [last | {"usage": None}, usage]

    def whole(self, deltas: list[Delta], outcome: Outcome) -> dict[str, Any]:
        answer = self._object("".join(delta.text for delta in deltas), outcome.finish_reason)
        answer["usage"] = _usage(outcome)
        if self.completion.return_tokens:
            answer |= _token_fields(deltas)
        return answer | _figures(self.completion, outcome)

    def _object(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}],
        }


@dataclass(frozen=True, slots=True)
class LlamaFormat:
    """POST /completion, as llama-server answers it, with the seed and `draftwire`."""

    id: str
    model: str
    completion: Completion
    end: bytes = b""

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        chunk = {"index": 0, "content": delta.text, "stop": False, "tokens": list(delta.tokens)}
        if self.completion.return_tokens:
            chunk |= _token_fields([delta])
        return chunk

    def last_chunks(self, outcome: Outcome) -> list[dict[str, Any]]:
        return [{"index": 0, "content": "", "tokens": []} | self._end(outcome)]

    def whole(self, deltas: list[Delta], outcome: Outcome) -> dict[str, Any]:
        answer: dict[str, Any] = {"index": 0, "content": "".join(delta.text for delta in deltas), "tokens": []}
        if self.completion.return_tokens:
            answer |= _token_fields(deltas)
        return answer | self._end(outcome)

    def _end(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "id": self.id,
            "model": self.model,
            "stop": True,
            "stop_type": outcome.stop_type,
            "stopping_word": outcome.stopping_word,
            "tokens_predicted": outcome.n_tokens,
            "tokens_evaluated": outcome.n_prompt,
            "tokens_cached": outcome.target.n_cached,
            "truncated": False,
            "generation_settings": self.completion.settings,
            **_figures(self.completion, outcome),
        }


def make_format(request_id: str, model: str, completion: Completion) -> Format:
    """The format that a request asked for."""
    if completion.shape == "openai":
        return OpenAIFormat(request_id, model, completion)
    return LlamaFormat(request_id, model, completion)


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + compact(value).encode() + b"\n\n"


def compact(value: dict[str, Any]) -> str:
    """JSON without spaces, in ASCII."""
    return json.dumps(value, separators=(",", ":"))


def _figures(completion: Completion, outcome: Outcome) -> dict[str, Any]:
    return {
        "seed": completion.sampling.seed,
        "timings": timings(outcome.target),
        "draftwire": speculation_report(outcome.target, outcome.draft),
    }


def _usage(outcome: Outcome) -> dict[str, Any]:
    return {
        "prompt_tokens": outcome.n_prompt,
        "completion_tokens": outcome.n_tokens,
        "total_tokens": outcome.n_prompt + outcome.n_tokens,
        "prompt_tokens_details": {"cached_tokens": outcome.target.n_cached},
    }


def _token_fields(deltas: list[Delta]) -> dict[str, Any]:
    """n_accepted is the number of proposed tokens; in a single delta they are its first ones."""
    return {
        "tokens": [token for delta in deltas for token in delta.tokens],
        "pieces": [piece for delta in deltas for piece in delta.pieces],
        "n_accepted": sum(delta.n_accepted for delta in deltas),
    }
