"""The tokenizer at its socket."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import wire
from shared.messages import (
    MAX_CONTEXT,
    PROTOCOL_VERSION,
    Decode,
    Decoded,
    Describe,
    Description,
    Encode,
    Encoded,
    Error,
    Message,
    Ping,
)
from shared.model.gguf import GGUFFile, vocabulary_fingerprint
from shared.model.names import resolve_model
from shared.model.vocabulary import Vocabulary

PATIENCE_MS = 60_000
RUNNER = """
import sys
from services.tokenizer.service import SERVICE
from shared.service import run_service
from shared.settings import load_settings
sys.exit(run_service(SERVICE, load_settings(None, sys.argv[1:])))
"""


def start(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DRAFTWIRE_", "JOURNAL_"))}
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, f'run_dir="{run_dir}"', *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Stop it; its exit status and what was left of its log."""
    process.send_signal(signal.SIGTERM)
    log, _ = process.communicate(timeout=PATIENCE_MS / 1000)
    return process.returncode, log


class Client:
    """A dealer at the tokenizer's socket."""

    def __init__(self, run_dir: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.sndhwm = self.socket.rcvhwm = 0
        self.socket.connect(f"ipc://{run_dir / 'tokenizer.sock'}")
        self.refs = itertools.count(1)

    def send(self, message: Message) -> None:
        self.socket.send_multipart(wire.encode(message))

    def receive(self) -> Any:
        assert self.socket.poll(PATIENCE_MS), "no answer"
        return wire.decode(self.socket.recv_multipart())

    def ask(self, message: Any) -> Any:
        """The answer to this message; answers to others are passed over."""
        self.send(message)
        while (answer := self.receive()).ref != message.ref:
            pass
        return answer

    def encode(self, text: str, **options: bool) -> Any:
        return self.ask(Encode(next(self.refs), text, **options))

    def decode(self, tokens: list[int], carry: bytes = b"", **options: bool) -> Any:
        return self.ask(Decode(next(self.refs), np.array(tokens, np.int32), carry, **options))

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a tokenizer with the embedded target's vocabulary."""
    run_dir = tmp_path_factory.mktemp("run")
    process = start(run_dir)
    client = Client(run_dir)
    try:
        client.ask(Describe(next(client.refs)))
        yield client
        assert process.poll() is None
    finally:
        client.close()
        status, _ = finish(process)
    assert status == 0


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.open(resolve_model("embedded:target"))


def test_it_describes_the_targets_vocabulary(client: Client, vocabulary: Vocabulary) -> None:
    """Name, size, end tokens and the fingerprint that engines compute from the same file."""
    description = client.ask(Describe(next(client.refs)))
    assert isinstance(description, Description)
    with GGUFFile.open(resolve_model("embedded:target")) as file:
        assert description.vocab_fingerprint == vocabulary_fingerprint(file)
    assert description.n_vocab == 8192
    assert description.model == vocabulary.name
    assert {0, 2} <= set(description.eog_ids)
    assert description.n_ctx_train == vocabulary.context_length


def test_encoding_is_the_vocabularys(client: Client, vocabulary: Vocabulary) -> None:
    """The same ids as in the process; parse_special and add_bos are passed on."""
    for text in ["def f(x):\n    return x + 1\n", "", "héllo 😀", vocabulary.token_bytes(0).decode()]:
        for parse_special, add_bos in itertools.product([False, True], repeat=2):
            encoded = client.encode(text, parse_special=parse_special, add_bos=add_bos)
            expected = vocabulary.encode(text, parse_special=parse_special, add_bos=None if add_bos else False)
            assert isinstance(encoded, Encoded)
            assert encoded.tokens.tolist() == expected.tolist()
    assert client.encode(vocabulary.token_bytes(0).decode(), parse_special=True).tokens.tolist() == [0]
    assert len(client.encode(vocabulary.token_bytes(0).decode(), parse_special=False).tokens) > 1


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 8191), max_size=30), st.integers(1, 9), st.booleans())
def test_a_stream_of_tokens_gives_the_text_of_the_whole(
    client: Client, vocabulary: Vocabulary, tokens: list[int], size: int, special: bool
) -> None:
    """A piece for every token and one for the end; joined, they are the text, however the tokens are cut."""
    text, rest = vocabulary.decode(tokens, special=special, first=True)
    out, carry = "", b""
    for at in range(0, max(1, len(tokens)), size):
        part, last = tokens[at : at + size], at + size >= len(tokens)
        decoded = client.decode(part, carry, first=at == 0, last=last, special=special)
        assert isinstance(decoded, Decoded)
        assert len(decoded.pieces) == len(part) + last
        out, carry = out + "".join(decoded.pieces), decoded.carry
    assert out == text + vocabulary.flush(rest)
    assert carry == b""


def test_a_long_text_comes_back_and_does_not_hold_up_others(client: Client) -> None:
    """A short question that is asked after a long one is answered first."""
    text = "def f(x):\n    return x + 1\n" * 50_000
    long, short = next(client.refs), next(client.refs)
    client.send(Encode(long, text))
    client.send(Encode(short, "x"))
    first, second = client.receive(), client.receive()
    assert (first.ref, second.ref) == (short, long)
    decoded = client.decode(second.tokens.tolist(), first=True, last=True)
    assert "".join(decoded.pieces) == text


@pytest.mark.parametrize("token", [8192, 2**31 - 1])
def test_an_id_outside_of_the_vocabulary_is_refused(client: Client, token: int) -> None:
    """An Error with the question's ref."""
    answer = client.decode([5, token])
    assert isinstance(answer, Error)
    assert answer.code == "invalid_token"
    assert str(token) in answer.message


def test_more_tokens_than_any_context_are_refused(client: Client, vocabulary: Vocabulary) -> None:
    """A text whose tokens no message can carry gets an Error instead of silence."""
    face = len(vocabulary.encode("😀", parse_special=False, add_bos=False))
    answer = client.encode("😀" * (MAX_CONTEXT // face + 1))
    assert isinstance(answer, Error)
    assert answer.code == "text_too_long"


def test_more_text_than_a_message_holds_is_refused(client: Client, vocabulary: Vocabulary) -> None:
    """Tokens whose text would be larger than any message get an Error instead of silence."""
    longest = max(range(vocabulary.n_vocab), key=lambda token: len(vocabulary.token_bytes(token)))
    assert len(vocabulary.token_bytes(longest)) * (MAX_CONTEXT - 1) > 16 << 20
    answer = client.decode([longest] * (MAX_CONTEXT - 1), special=True)
    assert isinstance(answer, Error)
    assert answer.code == "text_too_long"


def test_a_carry_that_is_no_utf8_is_harmless(client: Client) -> None:
    """Whatever bytes come back, they become text and the carry stays small."""
    for carry in [b"\xff" * 64, b"\xf0\x9f", bytes(range(64))]:
        decoded = client.decode([5], carry, last=True)
        assert isinstance(decoded, Decoded)
        assert decoded.carry == b""


def bad_messages(n: int) -> Iterator[list[bytes]]:
    """Malformed, truncated, oversized and wrong-typed messages, and well-formed ones that have no meaning here."""
    rng = random.Random(5)
    good = [
        [bytes(frame) for frame in wire.encode(message)]
        for message in (
            Describe(1),
            Encode(1, "text", True, False),
            Decode(1, np.arange(3, dtype=np.int32), b"x", True, True, False),
            Ping(5),
        )
    ]
    odd: list[Any] = [None, True, -1, 2**64 - 1, 1.5, float("nan"), "x", b"x" * 65, "x" * 5000, [], [[1]], {}, [2**40]]

    def header(version: Any, name: Any, values: Any) -> bytes:
        packed: bytes = msgpack.packb((version, name, values))
        return packed

    def mutated() -> list[bytes]:
        frames = list(rng.choice(good))
        at = rng.randrange(len(frames))
        frame = bytearray(frames[at])
        for _ in range(rng.randint(1, 4)):
            if frame:
                frame[rng.randrange(len(frame))] = rng.randrange(256)
        frames[at] = bytes(frame)
        return frames

    def truncated() -> list[bytes]:
        frames = list(rng.choice(good))
        at = rng.randrange(len(frames))
        frames[at] = frames[at][: rng.randrange(max(1, len(frames[at])))]
        return frames[: rng.randint(1, len(frames))]

    def wrong_values() -> list[bytes]:
        name = rng.choice(["Describe", "Encode", "Decode", "Nothing", "Encoded", 7])
        values = [rng.choice(odd) for _ in range(rng.choice([0, 1, 4, 6, 30]))]
        frames = [header(rng.choice([PROTOCOL_VERSION] * 4 + [0, PROTOCOL_VERSION + 1, "1"]), name, values)]
        return frames + [rng.randbytes(rng.choice([0, 3, 12]))] * rng.randrange(3)

    def oversized() -> list[bytes]:
        return rng.choice(
            [
                [b"\x00"] * rng.randint(17, 100),
                [header(PROTOCOL_VERSION, "Encode", [1, "x" * 100, True, True]), *[b"y" * 100_000] * 3],
                [header(PROTOCOL_VERSION, "Decode", [1, [2**40], b"", False, False, False]), b"abcd"],
                [b"\xc6\xff\xff\xff\xff"],
                [b"\x91" * 5000],
            ]
        )

    def noise() -> list[bytes]:
        return [rng.randbytes(rng.randrange(60))]

    def untouched() -> list[bytes]:
        return rng.choice(good)

    kinds = [mutated, truncated, wrong_values, oversized, noise, untouched]
    for _ in range(n):
        yield rng.choice(kinds)()


def test_ten_thousand_bad_messages_leave_it_answering(tmp_path: Path) -> None:
    """Each is refused or answered, none ends the process, and the next good question is answered as before."""
    process = start(tmp_path)
    client = Client(tmp_path)
    try:
        before = client.encode("def f(): pass").tokens.tolist()
        n_answers = 0
        for n_sent, frames in enumerate(bad_messages(10_000), 1):
            client.socket.send_multipart(frames)
            if n_sent % 100 == 0:
                # The refs of mutated questions are anything: this one is told by its text.
                client.send(Encode(2**63 + n_sent, "def f(): pass"))
                while getattr(answer := client.receive(), "ref", 0) != 2**63 + n_sent:
                    n_answers += 1
                assert answer.tokens.tolist() == before
        assert n_answers > 9000
        assert process.poll() is None
    finally:
        client.close()
        status, log = finish(process)
    assert status == 0
    assert '"message_refused"' in log


@pytest.mark.parametrize("engine", [("engine=null",), ("engine=emulated", "inner=null")], ids=["null", "emulated"])
def test_the_null_engine_needs_no_model(tmp_path: Path, engine: tuple[str, ...]) -> None:
    """A fleet for benchmarks has a vocabulary without any file, also where its engine is paced."""
    process = start(
        tmp_path, *(f"verifier.engine.{setting}" for setting in engine), 'verifier.engine.model="/nowhere.gguf"'
    )
    client = Client(tmp_path)
    try:
        assert client.ask(Describe(next(client.refs))).vocab_fingerprint == "null:8192"
        tokens = client.encode("abc").tokens.tolist()
        assert client.decode(tokens, last=True).pieces == ("a", "b", "c", "")
    finally:
        client.close()
        finish(process)


def test_a_missing_model_is_a_configuration_error(tmp_path: Path) -> None:
    """The process ends with a status that tells its supervisor not to try again, and a line that names the file."""
    process = start(tmp_path, f'verifier.engine.model="{tmp_path / "none.gguf"}"')
    log, _ = process.communicate(timeout=PATIENCE_MS / 1000)
    assert process.returncode == 78
    assert "none.gguf" in log
    assert '"model_not_found"' in log
