"""JSON bodies to typed requests."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.errors import ApiError
from services.gateway.requests import (
    Completion,
    check_ids,
    parse_completion,
    parse_detokenize,
    parse_json,
    parse_tokenize,
)
from shared.messages import MAX_CONTEXT, MAX_RUN, Speculation
from shared.sampling.params import SamplingParams

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For machines that others use too."""


def parse(shape: Any = "openai", **body: Any) -> Completion:
    return parse_completion({"prompt": "x", **body}, shape)[0]


def test_defaults_are_openais_length_and_llama_servers_sampling() -> None:
    """A bare request gets 16 tokens from OpenAI's endpoint, all that fit from llama-server's, and a drawn seed."""
    openai, llama = parse("openai"), parse("llama")
    assert openai.max_tokens == 16
    assert llama.max_tokens == MAX_CONTEXT
    assert openai.sampling == SamplingParams(seed=openai.sampling.seed)
    assert openai.speculation == Speculation("auto", MAX_RUN)
    assert not openai.stream


def test_a_seed_is_drawn_when_none_is_given() -> None:
    """Missing and -1 mean a new seed each time, one that every JSON parser reads exactly; others are kept."""
    drawn = {parse(**body).sampling.seed for body in [{}, {"seed": -1}, {"seed": None}, {}]}
    assert len(drawn) == 4
    assert all(0 <= seed < 2**53 for seed in drawn)
    assert parse(seed=2**64 - 1).sampling.seed == 2**64 - 1
    assert parse(seed=0).sampling.seed == 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("abc", "abc"), ([1, 2], (1, 2)), (["abc"], "abc"), ([[1, 2]], (1, 2))],
)
def test_a_prompt_is_a_text_or_token_ids_or_a_list_of_one(prompt: Any, expected: Any) -> None:
    """The forms that OpenAI's clients send."""
    assert parse(prompt=prompt).prompt == expected


def test_all_fields_arrive() -> None:
    """Every sampling field lands where it belongs."""
    completion = parse(
        "llama", n_predict=7, temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=5, stop=["a", "b"], stream=True,
        presence_penalty=0.5, frequency_penalty=0.25, repeat_penalty=1.1, repeat_last_n=-1, ignore_eos=True,
        acceptance="rejection", draft="fast", return_tokens=True, logit_bias={"3": 1.5},
        stream_options={"include_usage": True}, **{"speculative.n_max": 4},
    )  # fmt: skip
    assert completion == Completion(
        shape="llama",
        prompt="x",
        max_tokens=7,
        sampling=SamplingParams(
            temperature=0.0, top_k=3, top_p=0.5, min_p=0.1, repeat_penalty=1.1, presence_penalty=0.5,
            frequency_penalty=0.25, repeat_last_n=4096, logit_bias=((3, 1.5),), seed=5, acceptance="rejection",
        ),
        speculation=Speculation("fast", 4),
        stop=("a", "b"),
        stream=True,
        include_usage=True,
        ignore_eos=True,
        return_tokens=True,
    )  # fmt: skip


def test_names_of_both_servers_are_understood() -> None:
    """max_tokens and n_predict, flat and nested speculation; a shape's own name wins."""
    assert parse("openai", n_predict=5).max_tokens == 5
    assert parse("llama", max_tokens=5).max_tokens == 5
    assert parse("openai", max_tokens=4, n_predict=5).max_tokens == 4
    assert parse("llama", max_tokens=4, n_predict=-1).max_tokens == MAX_CONTEXT
    assert parse(max_tokens=2**31 - 1).max_tokens == MAX_CONTEXT
    nested = parse(speculative={"n_max": 3, "n_min": 2, "p_min": 0.75}).speculation
    flat = parse(**{"speculative.n_max": 3, "speculative.n_min": 2, "speculative.p_min": 0.75}).speculation
    assert nested == flat == Speculation("auto", 3, 2, 0.75)
    assert parse(stop="x").stop == ("x",)
    assert parse(top_k=-1).sampling.top_k == 0


def test_logit_bias_in_both_forms() -> None:
    """OpenAI's object, llama-server's pairs; false bans; of two the later counts."""
    assert parse(logit_bias={"7": -100, "8": 2}).sampling.logit_bias == ((7, -100.0), (8, 2.0))
    assert parse(logit_bias=[[7, False], [8, 0.5], [8, 1]]).sampling.logit_bias == ((7, -math.inf), (8, 1.0))


BAD: list[tuple[str, Any, str]] = [
    ("prompt", None, "prompt"),
    ("prompt", "", "prompt"),
    ("prompt", [], "prompt"),
    ("prompt", [""], "prompt"),
    ("prompt", 5, "prompt"),
    ("prompt", {}, "prompt"),
    ("prompt", ["a", "b"], "prompt"),
    ("prompt", [1, "a"], "prompt[1]"),
    ("prompt", [1, -1], "prompt[1]"),
    ("prompt", [True], "prompt[0]"),
    ("prompt", [1.0], "prompt[0]"),
    ("prompt", "\ud800", "prompt"),
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", -2, "max_tokens"),
    ("max_tokens", "5", "max_tokens"),
    ("max_tokens", 1.5, "max_tokens"),
    ("max_tokens", True, "max_tokens"),
    ("temperature", "hot", "temperature"),
    ("temperature", -0.1, "temperature"),
    ("temperature", 1e300, "temperature"),
    ("top_p", 1.1, "top_p"),
    ("top_k", 1.5, "top_k"),
    ("min_p", [], "min_p"),
    ("seed", -2, "seed"),
    ("seed", 2**64, "seed"),
    ("seed", 1.0, "seed"),
    ("stop", 5, "stop"),
    ("stop", [""], "stop[0]"),
    ("stop", ["a", 5], "stop[1]"),
    ("stop", ["a"] * 17, "stop"),
    ("stop", ["a" * 257], "stop[0]"),
    ("stream", "yes", "stream"),
    ("stream", 1, "stream"),
    ("stream_options", True, "stream_options"),
    ("stream_options", {"include_usage": 1}, "stream_options.include_usage"),
    ("presence_penalty", 101, "presence_penalty"),
    ("frequency_penalty", "x", "frequency_penalty"),
    ("repeat_penalty", 0, "repeat_penalty"),
    ("repeat_last_n", 5000, "repeat_last_n"),
    ("logit_bias", 5, "logit_bias"),
    ("logit_bias", {"x": 1}, "logit_bias"),
    ("logit_bias", {"1": 101}, "logit_bias[1]"),
    ("logit_bias", {"1": True}, "logit_bias[1]"),
    ("logit_bias", {"99999999999": 1}, "logit_bias"),
    ("logit_bias", [[1]], "logit_bias"),
    ("logit_bias", [["word", 1]], "logit_bias"),
    ("logit_bias", [[i, 0] for i in range(1025)], "logit_bias"),
    ("ignore_eos", 0, "ignore_eos"),
    ("return_tokens", "true", "return_tokens"),
    ("draft", 5, "draft"),
    ("draft", "", "draft"),
    ("draft", "x" * 201, "draft"),
    ("speculative.n_max", MAX_RUN + 1, "speculative.n_max"),
    ("speculative.n_max", -1, "speculative.n_max"),
    ("speculative", 4, "speculative"),
    ("speculative", {"n_max": "4"}, "speculative.n_max"),
    ("speculative", {"n_max": 4, "n_min": 5}, "speculative.n_min"),
    ("speculative.p_min", 1.5, "speculative.p_min"),
    ("acceptance", "greedy", "acceptance"),
    ("acceptance", ["coupled"], "acceptance"),
    ("n", 2, "n"),
    ("best_of", 3, "best_of"),
    ("echo", True, "echo"),
    ("suffix", "end", "suffix"),
    ("logprobs", 0, "logprobs"),
    ("n_probs", 5, "n_probs"),
    ("response_format", {"type": "json_object"}, "response_format"),
    ("grammar", "root ::= x", "grammar"),
    ("json_schema", {}, "json_schema"),
    ("mirostat", 2, "mirostat"),
    ("typical_p", 0.5, "typical_p"),
    ("dry_multiplier", 0.8, "dry_multiplier"),
]


@pytest.mark.parametrize(("name", "value", "param"), BAD)
@pytest.mark.parametrize("shape", ["openai", "llama"])
def test_a_wrong_field_is_refused_by_name(shape: Any, name: str, value: Any, param: str) -> None:
    """400 with the field that is wrong, and a message that begins with it."""
    with pytest.raises(ApiError) as caught:
        parse(shape, **{name: value})
    assert caught.value.status == 400
    assert caught.value.param == param
    assert caught.value.message.startswith(param)


@pytest.mark.parametrize("name", ["response_format", "grammar", "json_schema", "n", "suffix", "logprobs"])
def test_what_cannot_be_done_is_called_unsupported(name: str) -> None:
    """A constraint on the answer is never dropped in silence."""
    with pytest.raises(ApiError, match="not supported") as caught:
        parse(**{name: {"type": "json_object"}})
    assert caught.value.code == "unsupported_field"


def test_neutral_values_of_unsupported_fields_pass() -> None:
    """Clients send defaults of everything; null counts as absent."""
    completion, unknown = parse_completion(
        {
            "prompt": "x", "n": 1, "best_of": 1, "echo": False, "suffix": None, "logprobs": None, "grammar": "",
            "response_format": {"type": "text"}, "mirostat": 0, "typical_p": 1.0, "top_n_sigma": -1,
            "temperature": None, "stop": None, "stream": None, "max_tokens": None, "logit_bias": None,
            "model": "any", "user": "me", "cache_prompt": True,
        },
        "openai",
    )  # fmt: skip
    assert completion.max_tokens == 16
    assert unknown == ["cache_prompt", "user"]


def test_ids_outside_of_the_vocabulary_are_refused() -> None:
    """Prompt and bias are checked against the vocabulary's size."""
    check_ids(parse(prompt=[0, 99]), 100)
    with pytest.raises(ApiError, match=r"prompt\[1\]: token id 100 is not in 0\.\.99"):
        check_ids(parse(prompt=[0, 100]), 100)
    with pytest.raises(ApiError, match=r"logit_bias: token id 100"):
        check_ids(parse(logit_bias={"100": 1}), 100)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b"null", b'{"a": NaN}', b'{"a": Infinity}', b"\xff\xfe{", b'{"a": "\xff"}',
     b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    """Malformed, truncated, too deep or of another type: 400, whatever the bytes."""
    with pytest.raises(ApiError) as caught:
        parse_completion(parse_json(body), "openai")
    assert caught.value.status == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
known = st.sampled_from(sorted({name for name, _, _ in BAD} | {"model", "user", "n_predict"}))


@unhurried
@given(st.dictionaries(known, json_values, max_size=6), st.sampled_from(["openai", "llama"]))
def test_any_json_object_is_parsed_or_refused(body: dict[str, Any], shape: Any) -> None:
    """No value of any field raises anything but an `ApiError` 400."""
    refusal = None
    try:
        completion, _ = parse_completion({"prompt": "x", **body}, shape)
        json.dumps(completion.settings, allow_nan=False)
    except ApiError as error:
        refusal = error
    assert refusal is None or (refusal.status == 400 and refusal.param)


def test_tokenize_and_detokenize_bodies() -> None:
    """Defaults as llama-server's; wrong fields by name."""
    asked = parse_tokenize({"content": "a"})
    assert (asked.add_special, asked.parse_special, asked.with_pieces) == (False, True, False)
    assert parse_detokenize({"tokens": [1, 2]}) == (1, 2)
    for parser, body, param in [
        (parse_tokenize, {}, "content"),
        (parse_tokenize, {"content": "a", "add_special": 1}, "add_special"),
        (parse_detokenize, {}, "tokens"),
        (parse_detokenize, {"tokens": "12"}, "tokens"),
        (parse_detokenize, {"tokens": [1, None]}, "tokens[1]"),
    ]:
        with pytest.raises(ApiError) as caught:
            parser(body)
        assert (caught.value.status, caught.value.param) == (400, param)
