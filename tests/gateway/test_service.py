"""The gateway over HTTP, with a real tokenizer and a scripted router."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.messages import (
    MAX_CONTEXT,
    Cancel,
    Error,
    Finished,
    Generate,
    Goodbye,
    Hello,
    Speculation,
    Tokens,
)
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
    refuse,
    silent,
    verifier,
)

COMPLETIONS = ["/v1/completions", "/completion", "/completions"]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, which has OpenAI's four members and nothing else."""
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


class RawClient:
    """A streaming client that can stop reading, or vanish."""

    def __init__(self, fleet: Fleet, path: str, body: dict[str, Any], receive_buffer: int = 0) -> None:
        host, port = fleet.url.removeprefix("http://").split(":")
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect((host, int(port)))
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
        self.socket.sendall(head.encode() + data)

    def read_until(self, mark: bytes) -> bytes:
        data = b""
        while mark not in data:
            more = self.socket.recv(65536)
            assert more, data[-500:]
            data += more
        return data

    def vanish(self) -> None:
        """Close with a reset, as a process that dies with unread data does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


# --- Health and models ------------------------------------------------------------------------------------------------


def test_health_is_ok_when_everyone_is_there(fleet: Fleet) -> None:
    """200 once tokenizer, router and verifier are there."""
    response = fleet.http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_health_names_a_missing_verifier(fleet: Fleet) -> None:
    """503 with what is missing; a verifier that is not alive counts as missing."""
    for peers in [(), (verifier(alive=False),)]:
        fleet.router.peers = peers
        response = fleet.http.get("/health")
        assert (response.status_code, response.json()) == (503, {"status": "loading", "missing": ["verifier"]})


def test_health_notices_a_tokenizer_with_another_vocabulary(fleet: Fleet) -> None:
    """Text would come out garbled, so the fleet is not healthy."""
    fleet.router.peers = (verifier("other"),)
    response = fleet.http.get("/health")
    assert response.status_code == 503
    assert response.json()["status"] == "error"
    assert "vocabulary" in response.json()["reason"]


def test_the_model_is_listed(fleet: Fleet) -> None:
    """OpenAI's list, from the tokenizer's description."""
    listed = fleet.http.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(entry["id"], entry["object"]) for entry in listed["data"]] == [("null", "model")]


# --- OpenAI's endpoint ------------------------------------------------------------------------------------------------


def test_a_completion_in_openais_shape(fleet: Fleet) -> None:
    """Text, usage, timings, seed and our own figures."""
    fleet.router.script = answer("héllo")
    mark = fleet.router.n_heard
    response = fleet.post("/v1/completions", prompt="x" * 10, seed=5, max_tokens=20)
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "text_completion"
    assert body["model"] == "null"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": "héllo", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 6,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert body["seed"] == 5
    assert body["timings"]["predicted_per_second"] == 50.0
    assert body["timings"]["draft_n_accepted"] == 7
    assert body["draftwire"]["mean_acceptance_length"] == 2.2
    assert body["draftwire"]["worker"] == "model"
    generate = fleet.router.wait_for(Generate, mark)[1]
    assert generate.tokens.tolist() == list(ids("x" * 10))
    assert generate.limits.max_tokens == 20
    assert generate.limits.stop_tokens == (0,)
    assert generate.sampling.seed == 5


def test_a_drawn_seed_is_returned(fleet: Fleet) -> None:
    """What the router was given is what the client can send again."""
    mark = fleet.router.n_heard
    seed = fleet.post("/v1/completions", prompt="x").json()["seed"]
    assert fleet.router.wait_for(Generate, mark)[1].sampling.seed == seed


def test_the_request_reaches_the_router(fleet: Fleet) -> None:
    """Token ids, bans, the choice of worker and of lengths; ignore_eos bans all end tokens and stops at none."""
    mark = fleet.router.n_heard
    response = fleet.post(
        "/completion", prompt=[20, 21], n_predict=-1, ignore_eos=True, logit_bias=[[30, False], [31, 1]],
        draft="fast", acceptance="rejection", **{"speculative.n_max": 3},
    )  # fmt: skip
    assert response.status_code == 200
    generate = fleet.router.wait_for(Generate, mark)[1]
    assert generate.tokens.tolist() == [20, 21]
    assert generate.limits.max_tokens == MAX_CONTEXT
    assert generate.limits.stop_tokens == ()
    assert dict(generate.sampling.logit_bias) == {30: float("-inf"), 31: 1.0, 0: float("-inf")}
    assert generate.sampling.acceptance == "rejection"
    assert generate.speculation == Speculation("fast", 3)


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_in_openais_shape(fleet: Fleet, include_usage: bool) -> None:
    """Chunks of text, one with the reason and the figures, one with usage if asked for, and [DONE]."""
    fleet.router.script = answer("héllo wörld", reason="length")
    events = fleet.stream(
        "/v1/completions", prompt="0123456789", stream_options={"include_usage": include_usage}, user="someone"
    )
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    if include_usage:
        usage = chunks.pop()
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 13
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "héllo wörld"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1]["timings"]["draft_n"] == 9
    assert "tokens" not in chunks[0]


def test_streamed_tokens_show_which_the_draft_had_proposed(fleet: Fleet) -> None:
    """With return_tokens each chunk carries one commit: ids, their texts, and how many were proposed."""
    fleet.router.script = answer("héllo", size=4, n_accepted=3)
    events = fleet.stream("/v1/completions", prompt="x", return_tokens=True)
    chunks = [json.loads(event) for event in events[:-1]]
    assert [(c["tokens"], c["pieces"], c["n_accepted"]) for c in chunks if "tokens" in c] == [
        (list(ids("hél")), ["h", "", "é", "l"], 3),
        (list(ids("lo")), ["l", "o"], 2),
    ]


def test_the_openai_client_works(fleet: Fleet) -> None:
    """The real client, streaming, not streaming and refused."""
    openai = pytest.importorskip("openai")
    fleet.router.script = answer("def f(): pass")
    with (
        httpx.Client(trust_env=False) as http,
        openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none", http_client=http, max_retries=0) as client,
    ):
        assert client.models.list().data[0].id == "null"
        whole = client.completions.create(model="null", prompt="x", max_tokens=50, seed=3)
        assert whole.choices[0].text == "def f(): pass"
        assert whole.usage.completion_tokens == 13
        stream = client.completions.create(
            model="null", prompt="x", stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(c.choices[0].text for c in chunks if c.choices) == "def f(): pass"
        assert chunks[-1].usage.completion_tokens == 13
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model="null", prompt="x", temperature=-1)
        fleet.router.script = refuse("no_verifier", 1)
        with pytest.raises(openai.InternalServerError, match="refused by the test"):
            client.completions.create(model="null", prompt="x")


# --- llama-server's endpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/completion", "/completions"])
@pytest.mark.parametrize(("reason", "stop_type"), [("stop", "eos"), ("length", "limit")])
def test_a_completion_in_llama_servers_shape(fleet: Fleet, path: str, reason: str, stop_type: str) -> None:
    """Content, why it ended, settings, counts and timings."""
    fleet.router.script = answer("hello", reason=reason)
    body = fleet.post(path, prompt="0123456789", n_predict=50, temperature=0.5, stop=["zzz"]).json()
    assert body["content"] == "hello"
    assert body["stop"] is True
    assert (body["stop_type"], body["stopping_word"]) == (stop_type, "")
    assert (body["tokens_evaluated"], body["tokens_predicted"], body["tokens_cached"]) == (10, 5, 4)
    settings = body["generation_settings"]
    assert (settings["n_predict"], settings["temperature"], settings["stop"]) == (50, 0.5, ["zzz"])
    assert settings["seed"] == body["seed"]
    assert body["timings"]["draft_by_depth"][1] == {"depth": 2, "draft_n": 4, "draft_n_accepted": 3}
    assert body["draftwire"]["stages_ms"]["target_prefill"] == 30.0


def test_a_stream_in_llama_servers_shape(fleet: Fleet) -> None:
    """Chunks with content and tokens, a last one with stop true and the figures, and nothing after it."""
    fleet.router.script = answer("hello")
    *chunks, last = [json.loads(event) for event in fleet.stream("/completion", prompt="x")]
    assert [(c["content"], c["stop"], c["tokens"]) for c in chunks] == [
        ("hel", False, list(ids("hel"))),
        ("lo", False, list(ids("lo"))),
    ]
    assert (last["content"], last["stop"], last["stop_type"]) == ("", True, "eos")
    assert last["timings"]["predicted_n"] == 12
    assert last["generation_settings"]["draft"] == "auto"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_the_text_and_cancels_the_rest(fleet: Fleet, stream: bool) -> None:
    """The stop string may straddle commits; the router is told to stop, and its figures still arrive."""
    fleet.router.script = endless("say one STOP and more ")
    mark = fleet.router.n_heard
    if stream:
        chunks = [json.loads(event) for event in fleet.stream("/completion", prompt="x", stop="STOP")]
        content, last = "".join(chunk["content"] for chunk in chunks), chunks[-1]
    else:
        last = fleet.post("/completion", prompt="x", stop=["never", "STOP"]).json()
        content = last["content"]
    generate, cancel = fleet.router.wait_for(Generate, mark)[1], fleet.router.wait_for(Cancel, mark)[1]
    assert cancel.request == generate.request
    assert content == "say one "
    assert (last["stop_type"], last["stopping_word"]) == ("word", "STOP")
    assert last["tokens_predicted"] == len("say one STOP")
    assert last["timings"]["predicted_n"] == STATS.n_generated


# --- /tokenize and /detokenize ----------------------------------------------------------------------------------------


def test_text_goes_to_tokens_and_back(fleet: Fleet) -> None:
    """What /tokenize gives, /detokenize takes back."""
    tokens = fleet.post("/tokenize", content="héllo 😀").json()["tokens"]
    assert tokens == list(ids("héllo 😀"))
    assert fleet.post("/detokenize", tokens=tokens).json() == {"content": "héllo 😀"}
    assert fleet.post("/tokenize", content="").json() == {"tokens": []}
    assert fleet.post("/detokenize", tokens=[]).json() == {"content": ""}


def test_tokens_with_their_pieces(fleet: Fleet) -> None:
    """Each token with the text that it completes."""
    assert fleet.post("/tokenize", content="aé", with_pieces=True).json() == {
        "tokens": [{"id": i, "piece": p} for i, p in zip(ids("aé"), ["a", "", "é"], strict=True)]
    }
    assert fleet.post("/tokenize", content="", with_pieces=True).json() == {"tokens": []}


def test_a_long_text_is_tokenized(fleet: Fleet) -> None:
    """Megabytes pass, while others are served."""
    text = "lorem ipsum " * 80_000
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(fleet.post, "/tokenize", content=text)
        assert fleet.post("/tokenize", content="a").json() == {"tokens": list(ids("a"))}
        assert len(long.result(PATIENCE_S).json()["tokens"]) == len(text)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [("/tokenize", {}, "content"), ("/tokenize", {"content": 5}, "content"), ("/detokenize", {"tokens": [8192]},
     "tokens[0]"), ("/detokenize", {"tokens": "x"}, "tokens")],
)  # fmt: skip
def test_wrong_bodies_of_the_tokenizer_endpoints(fleet: Fleet, path: str, body: dict[str, Any], param: str) -> None:
    """400 with the field that is wrong."""
    response = fleet.post(path, **body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/completion"])
def test_a_text_of_more_tokens_than_any_context_is_refused(fleet: Fleet, path: str) -> None:
    """400, although the body is within its limit."""
    text = "x" * (MAX_CONTEXT + 1)
    response = fleet.post(path, content=text, prompt=text)
    assert (response.status_code, error_of(response)["code"]) == (400, "text_too_long")


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMPLETIONS)
@pytest.mark.parametrize(
    ("body", "param"),
    [({"prompt": ""}, "prompt"), ({}, "prompt"), ({"prompt": [8192]}, "prompt[0]"), ({"prompt": "x", "n": 2}, "n"),
     ({"prompt": "x", "temperature": "hot"}, "temperature"), ({"prompt": "x", "logit_bias": {"8192": 1}}, "logit_bias"),
     ({"prompt": "x", "grammar": "root ::= x"}, "grammar"), ({"prompt": "x", "stream": "no"}, "stream")],
)  # fmt: skip
def test_wrong_fields_are_refused(fleet: Fleet, path: str, body: dict[str, Any], param: str) -> None:
    """400 in OpenAI's error shape, naming the field; the router never hears of it."""
    mark = fleet.router.n_heard
    response = fleet.post(path, **body)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert not [m for _, m in fleet.router.heard[mark:] if isinstance(m, Generate)]


def test_http_errors_are_json(fleet: Fleet) -> None:
    """Unknown paths, wrong methods and bodies that are no JSON."""
    for response, status, code in [
        (fleet.http.get("/nothing"), 404, "not_found"),
        (fleet.http.get("/health/"), 404, "not_found"),
        (fleet.http.get("/v1/completions"), 405, "method_not_allowed"),
        (fleet.http.post("/health"), 405, "method_not_allowed"),
        (fleet.http.post("/v1/completions", content=b"{"), 400, "invalid_json"),
        (fleet.http.post("/completion", content=b""), 400, "invalid_json"),
        (fleet.http.post("/tokenize", content=b"[1]"), 400, "invalid_json"),
    ]:
        assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert "POST" in fleet.http.get("/completion").headers["allow"]


@pytest.mark.parametrize(
    ("code", "status", "retry"),
    [("context_exceeded", 400, None), ("bad_token", 400, None), ("unknown_draft", 400, None),
     ("lost_commit", 503, "1"), ("overloaded", 503, "1"),
     ("no_verifier", 503, "1"), ("draining", 503, "1"), ("verifier_lost", 502, None), ("anything_else", 500, None)],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_the_routers_refusals(fleet: Fleet, code: str, status: int, retry: str | None, stream: bool) -> None:
    """Each has its HTTP status, also for a stream, and Retry-After where trying again helps."""
    fleet.router.script = refuse(code)
    response = fleet.post("/v1/completions", prompt="x", stream=stream)
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry
    error = error_of(response)
    assert error["code"] == code
    assert "refused by the test" in error["message"]


def test_the_routers_own_retry_time_is_passed_on(fleet: Fleet) -> None:
    """Retry-After says what the router said."""
    fleet.router.script = refuse("verifier_lost", 5)
    assert fleet.post("/completion", prompt="x").headers["retry-after"] == "5"


def test_an_error_in_a_stream_is_its_last_event(fleet: Fleet) -> None:
    """After the first token there is no status left to set: the error is an event, and [DONE] does not follow."""

    def script(router: FakeRouter, peer: bytes, message: Generate) -> None:
        router.send(peer, Tokens(message.request, ids("ab"), 0))
        router.send(peer, Error(message.request, "verifier_lost", "the verifier is gone", "try again", 5))

    fleet.router.script = script
    mark = fleet.gateway.n_lines
    events = [json.loads(event) for event in fleet.stream("/v1/completions", prompt="x")]
    assert events[0]["choices"][0]["text"] == "ab"
    assert len(events) == 2
    assert events[1]["error"]["code"] == "verifier_lost"
    line = fleet.gateway.logged("request_done", mark)
    assert (line["status"], line["finish"], line["code"]) == (502, "error", "verifier_lost")


def test_a_generation_that_the_fleet_cancels_is_an_error(fleet: Fleet) -> None:
    """A text that was cut short is never passed off as complete."""
    fleet.router.script = answer("ab", reason="cancelled")
    response = fleet.post("/v1/completions", prompt="x")
    assert (response.status_code, error_of(response)["code"]) == (502, "cancelled")


# --- Clients that go away, or do not read -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
def test_a_client_that_goes_away_cancels_its_generation(fleet: Fleet, path: str, stream: bool) -> None:
    """The router is told at once, and the log line still has the figures."""
    fleet.router.script = endless("abc")
    mark, lines = fleet.router.n_heard, fleet.gateway.n_lines
    client = RawClient(fleet, path, {"prompt": "x", "stream": stream})
    generate = fleet.router.wait_for(Generate, mark)[1]
    if stream:
        client.read_until(b"data: ")
    client.vanish()
    assert fleet.router.wait_for(Cancel, mark)[1].request == generate.request
    line = fleet.gateway.logged("request_done", lines, status=499)  # an answered request's line may come late
    assert (line["status"], line["finish"], line["code"]) == (499, "cancelled", "client_disconnected")
    assert line["predicted_n"] == STATS.n_generated


def test_a_client_that_goes_away_while_it_sends_is_forgotten(fleet: Fleet) -> None:
    """Half a request is logged as such and harms nobody."""
    lines = fleet.gateway.n_lines
    host, port = fleet.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b'POST /completion HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"prompt"')
    line = fleet.gateway.logged("request_done", lines, status=499)
    assert (line["status"], line["code"]) == (499, "client_disconnected")
    assert fleet.post("/completion", prompt="x").status_code == 200


def test_a_client_that_does_not_read_is_given_up_and_holds_nobody_up(fleet: Fleet) -> None:
    """Its generation is cancelled, others are served meanwhile, and when it reads on it finds the error."""
    flooding = threading.Event()
    stop = threading.Event()

    def flood(router: FakeRouter, peer: bytes, message: Generate) -> None:
        def more() -> None:
            if stop.is_set():
                return
            for _ in range(200):
                router.send(peer, Tokens(message.request, ids("x" * 60), 0))
            flooding.set()
            router.later(more)

        more()

    fleet.router.script = flood
    mark = fleet.router.n_heard
    client = RawClient(fleet, "/completion", {"prompt": "x", "stream": True}, receive_buffer=4096)
    try:
        assert flooding.wait(PATIENCE_S)
        generate = fleet.router.wait_for(Generate, mark)[1]
        fleet.router.script = answer("fine")
        assert fleet.post("/completion", prompt="y").json()["content"] == "fine"
        assert fleet.router.wait_for(Cancel, mark)[1].request == generate.request
        assert fleet.gateway.logged("client_too_slow")
        stop.set()
        assert b"reads too slowly" in client.read_until(b"client_too_slow")
    finally:
        stop.set()
        client.socket.close()


# --- The log ----------------------------------------------------------------------------------------------------------


def test_each_request_logs_one_line_with_llama_servers_names(fleet: Fleet) -> None:
    """Figures by name, those of the stages, and no text."""
    fleet.router.script = answer("SECRET-ANSWER")
    mark = fleet.gateway.n_lines
    body = fleet.post("/v1/completions", prompt="SECRET-PROMPT", seed=7).json()
    line = fleet.gateway.logged("request_done", mark, request=body["id"])
    assert line["endpoint"] == "/v1/completions"
    assert (line["status"], line["finish"], line["seed"]) == (200, "eos", 7)
    assert {**body["timings"], **body["draftwire"]}.items() <= line.items()
    assert line["service"] == "gateway"
    assert (line["target_model"], line["target_quant"], line["target_engine"]) == ("big.gguf", "IQ4_KSS", "ik")
    assert (line["draft_model"], line["draft_quant"], line["draft_engine"]) == ("small.gguf", "Q4_K_M", "cuda")
    assert "SECRET" not in fleet.gateway.log_text


def test_scripts_that_search_the_journal_find_their_figures(fleet: Fleet) -> None:
    """The patterns that scripts in the field use on llama-server's log match the line as it is written."""
    fleet.router.script = answer("ab")
    mark = fleet.gateway.n_lines
    fleet.post("/completion", prompt="x")
    line = json.dumps(fleet.gateway.logged("request_done", mark))
    drafted = re.search(r'(?<=draft_n\\":)[0-9]+.*n_accepted\\":[0-9]+', line)
    speed = re.search(r'(?<=predicted_per_second\\":)[0-9.]+', line)
    assert drafted is not None
    assert drafted.group() == r"9,\"draft_n_accepted\":7"
    assert speed is not None
    assert speed.group() == "50.0"


def test_refused_requests_are_logged_too(fleet: Fleet) -> None:
    """A refusal is a line with its status and code."""
    mark = fleet.gateway.n_lines
    fleet.post("/v1/completions", prompt="")
    line = fleet.gateway.logged("request_done", mark)
    assert (line["status"], line["finish"], line["code"]) == (400, "error", "empty_prompt")
    assert (line["prompt_n"], line["predicted_n"]) == (0, 0)


# --- Limits -----------------------------------------------------------------------------------------------------------


def test_requests_beyond_the_limit_are_refused(make_fleet: MakeFleet) -> None:
    """429 with Retry-After while all places are taken; a place that is free again is used."""
    fleet = make_fleet("gateway.max_requests=1")
    fleet.router.script = silent
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(fleet.post, "/completion", prompt="x")
        peer, generate = fleet.router.wait_for(Generate)
        refused = fleet.post("/v1/completions", prompt="x")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert error_of(refused)["type"] == "rate_limit_error"
        assert fleet.http.get("/health").status_code == 200
        fleet.router.tell(
            peer, Tokens(generate.request, ids("ok"), 0), Finished(generate.request, "stop", STATS, DRAFT)
        )
        assert first.result(PATIENCE_S).json()["content"] == "ok"
    fleet.router.script = answer("next")
    assert fleet.post("/completion", prompt="x").json()["content"] == "next"


def test_bodies_beyond_the_limit_are_refused(make_fleet: MakeFleet) -> None:
    """413, whether the size was announced or not; the limit itself passes."""
    fleet = make_fleet("gateway.max_body_bytes=2048")
    fleet.router.script = answer("ok")
    frame = len(json.dumps({"prompt": ""}, separators=(",", ":")))
    assert fleet.post("/completion", prompt="x" * (2048 - frame)).status_code == 200
    for path in [*COMPLETIONS, "/tokenize", "/detokenize"]:
        for content in (b"x" * 2049, iter([b"x" * 1500, b"x" * 1500])):
            response = fleet.http.post(path, content=content)
            assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


def test_silence_from_the_router_is_a_timeout(make_fleet: MakeFleet) -> None:
    """503 with Retry-After, and the generation is cancelled."""
    fleet = make_fleet("gateway.request_timeout_s=1")
    fleet.router.script = silent
    response = fleet.post("/completion", prompt="x")
    assert (response.status_code, error_of(response)["code"]) == (503, "timeout")
    assert int(response.headers["retry-after"]) > 0
    generate = fleet.router.wait_for(Generate)[1]
    assert fleet.router.wait_for(Cancel)[1].request == generate.request


# --- A fleet that is not complete -------------------------------------------------------------------------------------


def test_without_the_others_the_gateway_says_who_is_missing(make_fleet: MakeFleet) -> None:
    """It is ready, answers health with 503 and requests with 503 and a name, and tells right from wrong requests."""
    fleet = make_fleet(tokenizer=False, router=False)
    health = fleet.http.get("/health")
    assert health.status_code == 503
    assert health.json() == {"status": "loading", "missing": ["tokenizer", "router", "verifier"]}
    for method, path in [("POST", "/v1/completions"), ("POST", "/tokenize"), ("GET", "/v1/models")]:
        response = fleet.http.request(method, path, json={"prompt": "x", "content": "x"})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        error = error_of(response)
        assert (error["type"], error["code"]) == ("service_unavailable", "service_unavailable")
        assert "tokenizer" in error["message"]
    assert fleet.post("/v1/completions", prompt="").status_code == 400
    fleet.start_tokenizer()
    fleet.gateway.logged("tokenizer_connected")
    response = fleet.post("/v1/completions", prompt="x")
    assert response.status_code == 503
    assert "router" in error_of(response)["message"]


def test_a_tokenizer_that_restarts_costs_nothing(make_fleet: MakeFleet) -> None:
    """Questions that were lost with it are asked again, in the middle of a generation too."""
    fleet = make_fleet()
    fleet.router.script = silent
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fleet.stream, "/completion", prompt="x")
        peer, generate = fleet.router.wait_for(Generate)
        fleet.tokenizer.signal(signal.SIGKILL)
        fleet.tokenizer.wait()
        fleet.router.tell(
            peer, Tokens(generate.request, ids("still here"), 0), Finished(generate.request, "stop", STATS, DRAFT)
        )
        fleet.start_tokenizer()
        events = [json.loads(event) for event in running.result(PATIENCE_S)]
    assert "".join(event["content"] for event in events) == "still here"


def test_a_tokenizer_that_dies_is_noticed(make_fleet: MakeFleet) -> None:
    """Requests fail with 503 and its name instead of waiting."""
    fleet = make_fleet()
    fleet.tokenizer.signal(signal.SIGKILL)
    fleet.tokenizer.wait()
    fleet.gateway.logged("tokenizer_silent")
    response = fleet.post("/v1/completions", prompt="x")
    assert response.status_code == 503
    assert "tokenizer" in error_of(response)["message"]
    assert fleet.http.get("/health").json()["missing"] == ["tokenizer"]


def test_a_router_that_restarts_ends_what_it_has_forgotten(make_fleet: MakeFleet) -> None:
    """Generations in progress end with a clear error: 502 before the first token, an event after it."""
    fleet = make_fleet()
    fleet.router.script = silent
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(fleet.post, "/v1/completions", prompt="a")
        fleet.router.wait_for(Generate)
        stream = pool.submit(fleet.stream, "/v1/completions", prompt="b")
        peer, generate = fleet.router.wait_for(Generate, count=2)
        fleet.router.tell(peer, Tokens(generate.request, ids("begun"), 0))
        mark = fleet.router.n_heard
        fleet.router.restart()
        response, events = whole.result(PATIENCE_S), stream.result(PATIENCE_S)
    assert (response.status_code, error_of(response)["code"]) == (502, "router_lost")
    assert json.loads(events[0])["choices"][0]["text"] == "begun"
    assert json.loads(events[-1])["error"]["code"] == "router_lost"
    fleet.router.wait_for(Hello, mark)
    fleet.router.script = answer("again")
    assert fleet.post("/completion", prompt="x").json()["content"] == "again"


# --- Its life ---------------------------------------------------------------------------------------------------------


def test_the_address_is_published_and_withdrawn(make_fleet: MakeFleet, tmp_path: Path) -> None:
    """gateway.json in the run directory names a port that answers, until the gateway has stopped."""
    fleet = make_fleet()
    address = json.loads((tmp_path / "gateway.json").read_text())
    assert f"http://{address['host']}:{address['port']}" == fleet.url
    fleet.gateway.signal(signal.SIGTERM)
    assert fleet.gateway.wait() == 0
    assert not (tmp_path / "gateway.json").exists()


def test_a_taken_port_is_refused_before_ready(make_fleet: MakeFleet, tmp_path: Path) -> None:
    """A configuration error that names the port and what to do; the process is never ready."""
    fleet = make_fleet(tokenizer=False, router=False)
    port = fleet.url.rpartition(":")[2]
    second = Process("gateway", tmp_path / "other", f"gateway.port={port}")
    assert second.wait() == 78
    line = second.logged("stopped")
    second.stop()
    assert line["code"] == "bad_settings"
    assert port in line["reason"]
    assert "gateway.port" in line["remedy"]
    assert '"ready"' not in second.log_text


def test_a_host_that_is_no_address_is_refused(tmp_path: Path) -> None:
    """A configuration error that names the setting."""
    process = Process("gateway", tmp_path, 'gateway.host="not an address"')
    assert process.wait() == 78
    line = process.logged("stopped")
    process.stop()
    assert "gateway.host" in line["reason"]


def test_stopping_lets_running_generations_end(make_fleet: MakeFleet) -> None:
    """After SIGTERM the router hears Goodbye, what runs is answered, and the process ends well."""
    fleet = make_fleet()
    fleet.router.script = silent
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fleet.stream, "/v1/completions", prompt="x")
        peer, generate = fleet.router.wait_for(Generate)
        fleet.router.tell(peer, Tokens(generate.request, ids("a"), 0))
        fleet.gateway.signal(signal.SIGTERM)
        fleet.router.wait_for(Goodbye)
        fleet.router.tell(peer, Tokens(generate.request, ids("b"), 0), Finished(generate.request, "stop", STATS, DRAFT))
        events = running.result(PATIENCE_S)
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == "ab"
    assert fleet.gateway.wait() == 0


def test_stopping_does_not_wait_for_ever(make_fleet: MakeFleet) -> None:
    """What still runs when the time to drain is over ends with an error that says so."""
    fleet = make_fleet("drain_s=1")
    fleet.router.script = silent
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fleet.stream, "/v1/completions", prompt="x")
        peer, generate = fleet.router.wait_for(Generate)
        fleet.router.tell(peer, Tokens(generate.request, ids("a"), 0))
        fleet.gateway.signal(signal.SIGTERM)
        events = running.result(PATIENCE_S)
    assert json.loads(events[-1])["error"]["code"] == "draining"
    assert fleet.router.wait_for(Cancel)[1].request == generate.request
    assert fleet.gateway.wait() == 0
