"""JSON bodies to typed requests.

Invariant: what comes out is complete and in range, and a field that is known here and wrong is refused by its name.
Fields that no one knows are left to the log; fields that would change the text and cannot be honoured are refused.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_type_hints

from services.gateway.errors import ApiError, bad_field
from shared.fields import Range
from shared.messages import MAX_CONTEXT, MAX_RUN, MAX_TEXT, Speculation
from shared.sampling.params import MAX_LOGIT_BIAS, MAX_PENALTY_WINDOW, SamplingParams

Shape = Literal["openai", "llama"]
"""Whose request and response this is: OpenAI's /v1/completions or llama-server's /completion."""

MAX_STOPS: Final = 16
MAX_STOP_LENGTH: Final = 256
MAX_SEED_BITS: Final = 53
"""Of the seeds drawn here: exact in every JSON parser, JavaScript's included."""

_MAX_TOKEN: Final = 2**31 - 1
_MAX_NAME: Final = 200
_DEFAULTS: Final = SamplingParams()

_NEUTRAL: Final[dict[str, Callable[[Any], bool]]] = {
    "n": lambda value: _is_number(value) and value == 1,
    "best_of": lambda value: _is_number(value) and value == 1,
    "echo": lambda value: value is False,
    "suffix": lambda value: value == "",
    "logprobs": lambda value: value is False,
    "n_probs": lambda value: _is_number(value) and value == 0,
    "response_format": lambda value: value == {"type": "text"},
    "grammar": lambda value: value == "",
    "json_schema": lambda _value: False,
    "typical_p": lambda value: _is_number(value) and value == 1,
    "top_n_sigma": lambda value: _is_number(value) and value <= 0,
    "mirostat": lambda value: _is_number(value) and value == 0,
    "dynatemp_range": lambda value: _is_number(value) and value == 0,
    "xtc_probability": lambda value: _is_number(value) and value == 0,
    "dry_multiplier": lambda value: _is_number(value) and value == 0,
}
"""Fields that would change what is answered, and which of their values ask for what is done anyway."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One request to complete a prompt.

    prompt: text, or token ids. max_tokens: MAX_CONTEXT means until the context is full.
    stop: strings that end the text, not part of it. n_max as in `Speculation`.
    return_tokens: chunks carry token ids, their texts, and how many of them the draft had proposed.
    """

    shape: Shape
    prompt: str | tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    speculation: Speculation
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    ignore_eos: bool = False
    return_tokens: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """As llama-server's `generation_settings`."""
        sampling = self.sampling
        return {
            "n_predict": -1 if self.max_tokens == MAX_CONTEXT else self.max_tokens,
            "seed": sampling.seed,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repeat_penalty,
            "repeat_last_n": sampling.repeat_last_n,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "logit_bias": [[token, bias if math.isfinite(bias) else False] for token, bias in sampling.logit_bias],
            "ignore_eos": self.ignore_eos,
            "stop": list(self.stop),
            "stream": self.stream,
            "draft": self.speculation.draft,
            "speculative.n_max": self.speculation.n_max,
            "speculative.n_min": self.speculation.n_min,
            "speculative.p_min": self.speculation.p_min,
            "acceptance": sampling.acceptance,
        }


@dataclass(frozen=True, slots=True)
class Tokenize:
    """POST /tokenize. add_special: frame the text as the model wants it."""

    content: str
    add_special: bool
    parse_special: bool
    with_pieces: bool


def parse_json(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. Errors: `ApiError` 400."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ApiError(400, f"the body is not valid JSON: {reason}", "invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    return value


def parse_completion(body: Mapping[str, Any], shape: Shape) -> tuple[Completion, list[str]]:
    """A request of either shape, and the names of the fields that are unknown. Errors: `ApiError` 400.

    Without a seed, or with -1, one is drawn.
    """
    fields = _Fields(body)
    for name, is_neutral in _NEUTRAL.items():
        value = fields.take(name)
        if value is not None and not is_neutral(value):
            raise bad_field(name, "not supported", "unsupported_field")
    prompt = _prompt(fields.take("prompt"))
    names = ("max_tokens", "n_predict") if shape == "openai" else ("n_predict", "max_tokens")
    completion = Completion(
        shape=shape,
        prompt=prompt,
        max_tokens=_max_tokens(fields, names, 16 if shape == "openai" else -1),
        sampling=_sampling(fields),
        speculation=_speculation(fields),
        stop=_stops(fields.take("stop")),
        stream=fields.flag("stream", False),
        include_usage=_include_usage(fields.take("stream_options")),
        ignore_eos=fields.flag("ignore_eos", False),
        return_tokens=fields.flag("return_tokens", False),
    )
    fields.take("model")
    return completion, fields.untaken


def check_ids(completion: Completion, n_vocab: int) -> None:
    """Every token id of the request is in the vocabulary, or an `ApiError` 400 names the one that is not."""
    if not isinstance(completion.prompt, str):
        check_tokens("prompt", completion.prompt, n_vocab)
    for token, _ in completion.sampling.logit_bias:
        if token >= n_vocab:
            raise bad_field("logit_bias", f"token id {token} is not in 0..{n_vocab - 1}", "bad_token")


def check_tokens(param: str, tokens: tuple[int, ...], n_vocab: int) -> None:
    """`check_ids` for one list."""
    if tokens and max(tokens) >= n_vocab:
        at = next(i for i, token in enumerate(tokens) if token >= n_vocab)
        raise bad_field(f"{param}[{at}]", f"token id {tokens[at]} is not in 0..{n_vocab - 1}", "bad_token")


def parse_tokenize(body: Mapping[str, Any]) -> Tokenize:
    """Errors: `ApiError` 400."""
    fields = _Fields(body)
    return Tokenize(
        content=_text("content", fields.take("content")),
        add_special=fields.flag("add_special", False),
        parse_special=fields.flag("parse_special", True),
        with_pieces=fields.flag("with_pieces", False),
    )


def parse_detokenize(body: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens. Errors: `ApiError` 400."""
    return _token_ids("tokens", body.get("tokens"))


class _Fields:
    """A JSON object's fields, each taken once; null counts as absent."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body
        self._taken: set[str] = set()

    @property
    def untaken(self) -> list[str]:
        return sorted(self._body.keys() - self._taken)

    def take(self, name: str) -> Any:
        self._taken.add(name)
        return self._body.get(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise bad_field(name, "true or false expected")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        return None if value is None else _integer(name, value, low, high)

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.take(name)
        return None if value is None else _number(name, value, low, high)

    def choice(self, name: str, choices: tuple[str, ...]) -> str | None:
        value = self.take(name)
        if value is not None and value not in choices:
            raise bad_field(name, f"one of {', '.join(map(repr, choices))} expected")
        return value  # type: ignore[no-any-return]


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise bad_field(name, "an integer expected")
    if not low <= value <= high:
        raise bad_field(name, f"an integer from {low} to {high} expected")
    return value


def _number(name: str, value: Any, low: float, high: float) -> float:
    if not _is_number(value):
        raise bad_field(name, "a number expected")
    if not low <= value <= high:
        raise bad_field(name, f"a number from {low:g} to {high:g} expected")
    return float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad_field(name, "a string expected" if value is not None else "required")
    try:
        n_bytes = len(value.encode())
    except UnicodeEncodeError as error:
        raise bad_field(name, f"character {error.start} is half of a surrogate pair", "invalid_text") from None
    if n_bytes > MAX_TEXT:
        raise bad_field(name, f"at most {MAX_TEXT} bytes, this has {n_bytes}", "text_too_long")
    return value


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise bad_field(name, "a list of token ids expected" if value is not None else "required")
    if len(value) >= MAX_CONTEXT:
        raise bad_field(name, f"fewer than {MAX_CONTEXT} tokens expected, this has {len(value)}", "context_exceeded")
    for at, token in enumerate(value):
        if type(token) is not int or not 0 <= token <= _MAX_TOKEN:
            raise bad_field(f"{name}[{at}]", f"a token id from 0 to {_MAX_TOKEN} expected")
    return tuple(value)


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        if len(value) > 1:
            raise bad_field("prompt", "one prompt per request; several, or a mixture, are not supported")
        value = value[0]
    prompt = _token_ids("prompt", value) if isinstance(value, list) else _text("prompt", value)
    if not prompt:
        raise bad_field("prompt", "must not be empty", "empty_prompt")
    return prompt


def _max_tokens(fields: _Fields, names: tuple[str, str], default: int) -> int:
    values = [(name, fields.integer(name, -1, _MAX_TOKEN)) for name in names]
    name, value = next(((name, value) for name, value in values if value is not None), (names[0], default))
    if value == 0:
        raise bad_field(name, "at least 1 expected, or -1 for as many as fit the context")
    return MAX_CONTEXT if value < 0 else min(value, MAX_CONTEXT)


def _bounds(name: str) -> Range:
    hint = get_type_hints(SamplingParams, include_extras=True)[name]
    return next(mark for mark in hint.__metadata__ if isinstance(mark, Range))


_FLOATS: Final = {
    name: _bounds(name)
    for name in ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
}


def _sampling(fields: _Fields) -> SamplingParams:
    values: dict[str, Any] = {}
    for name, bounds in _FLOATS.items():
        if (number := fields.number(name, bounds.low, bounds.high)) is not None:
            values[name] = number
    if (top_k := fields.integer("top_k", -1, _MAX_TOKEN)) is not None:
        values["top_k"] = max(0, top_k)
    if (window := fields.integer("repeat_last_n", -1, MAX_PENALTY_WINDOW)) is not None:
        values["repeat_last_n"] = MAX_PENALTY_WINDOW if window < 0 else window
    seed = fields.integer("seed", -1, 2**64 - 1)
    values["seed"] = random.getrandbits(MAX_SEED_BITS) if seed in (None, -1) else seed
    if (acceptance := fields.choice("acceptance", ("coupled", "rejection"))) is not None:
        values["acceptance"] = acceptance
    values["logit_bias"] = _logit_bias(fields.take("logit_bias"))
    return SamplingParams(**values)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        pairs = [(int(key) if key.isascii() and key.isdigit() and len(key) < 11 else key, value[key]) for key in value]
    elif isinstance(value, list):
        for entry in value:
            if not isinstance(entry, list) or len(entry) != 2:
                raise bad_field("logit_bias", "pairs [token id, bias] expected")
            pairs.append((entry[0], entry[1]))
    else:
        raise bad_field("logit_bias", "an object from token id to bias, or a list of pairs, expected")
    if len(pairs) > MAX_LOGIT_BIAS:
        raise bad_field("logit_bias", f"at most {MAX_LOGIT_BIAS} entries")
    biases: dict[int, float] = {}
    for token, bias in pairs:
        if type(token) is not int or not 0 <= token <= _MAX_TOKEN:
            raise bad_field("logit_bias", f"token ids expected, got {token!r:.40}")
        biases[token] = -math.inf if bias is False else _number(f"logit_bias[{token}]", bias, -100.0, 100.0)
    return tuple(biases.items())


def _speculation(fields: _Fields) -> Speculation:
    draft = fields.take("draft")
    if draft is None:
        draft = "auto"
    elif not isinstance(draft, str) or not 0 < len(draft) <= _MAX_NAME or not draft.isprintable():
        raise bad_field("draft", '"auto", "none" or a draft worker\'s name expected')
    nested = fields.take("speculative")
    if nested is not None and not isinstance(nested, dict):
        raise bad_field("speculative", "an object expected")

    def bound(name: str) -> Any:
        """Flat or nested, as clients send it; the flat one wins."""
        value = fields.take(f"speculative.{name}")
        return nested.get(name) if value is None and nested is not None else value

    n_max, n_min, p_min = bound("n_max"), bound("n_min"), bound("p_min")
    speculation = Speculation(
        draft,
        MAX_RUN if n_max is None else _integer("speculative.n_max", n_max, 0, MAX_RUN),
        0 if n_min is None else _integer("speculative.n_min", n_min, 0, MAX_RUN),
        0.0 if p_min is None else _number("speculative.p_min", p_min, 0.0, 1.0),
    )
    if speculation.n_min > speculation.n_max:
        raise bad_field("speculative.n_min", "it is above speculative.n_max")
    return speculation


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise bad_field("stop", "a string or a list of strings expected")
    if len(stops) > MAX_STOPS:
        raise bad_field("stop", f"at most {MAX_STOPS} strings")
    for at, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise bad_field(f"stop[{at}]", "a string expected")
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise bad_field(f"stop[{at}]", f"1 to {MAX_STOP_LENGTH} characters expected")
    return tuple(stops)


def _include_usage(value: Any) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict):
        raise bad_field("stream_options", "an object expected")
    usage = value.get("include_usage")
    if usage is not None and not isinstance(usage, bool):
        raise bad_field("stream_options.include_usage", "true or false expected")
    return bool(usage)
