"""The sampler as a process: verdicts over a real socket, and what it does with nonsense."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from shared import wire
from shared.messages import (
    Cancel,
    Close,
    CloseSampling,
    Encoded,
    Error,
    FullRows,
    Hello,
    Limits,
    Message,
    NeedRows,
    OpenSampling,
    Ping,
    Verdict,
    VerdictItem,
    Verify,
    VerifyItem,
)
from shared.prefix import TokenPrefix
from shared.sampling.params import SamplingParams
from tests.gateway.fleet import Process

pytestmark = pytest.mark.pipeline

N_VOCAB = 8
PROMPT = [1, 2, 3]
GREEDY = SamplingParams(temperature=0.0)
FLAT = SamplingParams(temperature=50.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
PATIENCE_MS = 30_000


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running sampler's run directory; it is still alive, and ends well, after all tests."""
    run_dir = tmp_path_factory.mktemp("sampler")
    process = Process("sampler", run_dir)
    process.logged("ready")
    yield run_dir
    assert process.running()
    process.stop()
    assert process.wait() == 0


class Verifier:
    """A verifier's end of the socket."""

    def __init__(self, run_dir: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._socket.connect(f"ipc://{run_dir / 'sampler.sock'}")

    def send(self, message: Message) -> None:
        self._socket.send_multipart(wire.encode(message))

    def send_raw(self, frames: Sequence[bytes]) -> None:
        self._socket.send_multipart(frames)

    def receive(self) -> Any:
        assert self._socket.poll(PATIENCE_MS), "no answer"
        return wire.decode(self._socket.recv_multipart())

    def ask(self, message: Message) -> Any:
        self.send(message)
        return self.receive()

    def open(self, sampling: SamplingParams = GREEDY, tokens: Sequence[int] = PROMPT, session: int = 1) -> None:
        limits = Limits(100)
        self.send(OpenSampling(session, np.array(tokens, np.int32), len(PROMPT), N_VOCAB, sampling, limits))

    def receive_until(self, step: int) -> tuple[Verdict, int]:
        """The verdict of a step, and how many errors came before it."""
        n_errors = 0
        while not (isinstance(message := self.receive(), Verdict) and message.step == step):
            n_errors += isinstance(message, Error)
        return message, n_errors

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@pytest.fixture
def verifier(sampler: Path) -> Iterator[Verifier]:
    verifier = Verifier(sampler)
    yield verifier
    verifier.close()


def verify(step: int, text: Sequence[int], proposals: Sequence[int], winners: Sequence[int], top_k: int = 8) -> Verify:
    ids = np.array([[w, *(t for t in range(N_VOCAB) if t != w)] for w in winners], np.int32)[:, :top_k]
    logits = np.zeros((len(winners), top_k), np.float32)
    logits[:, 0] = 9
    item = VerifyItem(1, len(text), TokenPrefix(text).hash, tuple(proposals))
    return Verify(step, (item,), ids, logits, np.full(len(winners), np.nan))


def whole(winner: int) -> np.ndarray:
    return np.where(np.arange(N_VOCAB) == winner, np.float32(9), np.float32(0))


def test_a_step_gets_its_verdict(verifier: Verifier) -> None:
    """Open, verify, verdict; the next step continues from there."""
    verifier.open()
    assert verifier.ask(verify(1, PROMPT, [4, 5], [4, 5, 6])).items == (VerdictItem(1, (4, 5, 6), 2),)
    assert verifier.ask(verify(2, [*PROMPT, 4, 5, 6], [7], [0, 1])).items == (VerdictItem(1, (0,), 0),)


def test_asking_again_gives_the_same_verdict(verifier: Verifier) -> None:
    """A repeated question, as after a lost answer, is decided as before, also after later ones."""
    verifier.open(SamplingParams(seed=3, temperature=9.0, top_p=1.0, min_p=0.0))
    first = verifier.ask(verify(1, PROMPT, [4, 5], [4, 5, 6])).items
    assert verifier.ask(verify(1, PROMPT, [4, 5], [4, 5, 6])).items == first
    verifier.ask(verify(2, [*PROMPT, *first[0].tokens], [], [0]))
    assert verifier.ask(verify(3, PROMPT, [4, 5], [4, 5, 6])).items == first


def test_an_unknown_session_is_asked_for(verifier: Verifier) -> None:
    """A session that the sampler does not hold, or holds with another text, is to be opened again; then it goes on."""
    question = verify(1, [*PROMPT, 4], [5], [5, 6])
    assert verifier.ask(question).items == (VerdictItem(1, (), 0, resync=True),)
    verifier.open(tokens=[*PROMPT, 5])
    assert verifier.ask(question).items == (VerdictItem(1, (), 0, resync=True),)
    verifier.open(tokens=[*PROMPT, 4])
    assert verifier.ask(question).items == (VerdictItem(1, (5, 6), 1),)
    verifier.send(CloseSampling((1,)))
    assert verifier.ask(question).items[0].resync


def test_only_the_lost_sessions_are_resynced(verifier: Verifier) -> None:
    """In a step with several sessions each has its own answer, and asking for all again is safe."""
    verifier.open()
    known, unknown = verify(1, PROMPT, [], [4]), replace(verify(1, PROMPT, [], [5]).items[0], session=2)
    both = replace(
        verify(1, PROMPT, [], [4]),
        items=(known.items[0], unknown),
        top_ids=np.tile(known.top_ids, (2, 1)),
        top_logits=np.tile(known.top_logits, (2, 1)),
        lse=np.full(2, np.nan),
    )
    assert verifier.ask(both).items == (VerdictItem(1, (4,), 0), VerdictItem(2, (), 0, resync=True))
    verifier.open(session=2)
    assert verifier.ask(both).items == (VerdictItem(1, (4,), 0), VerdictItem(2, (4,), 0))


def test_two_verifiers_do_not_share_sessions(verifier: Verifier, sampler: Path) -> None:
    """The same session number of another verifier is another session."""
    verifier.open()
    other = Verifier(sampler)
    try:
        assert other.ask(verify(1, PROMPT, [], [4])).items[0].resync
        assert not verifier.ask(verify(1, PROMPT, [], [4])).items[0].resync
    finally:
        other.close()


def test_rows_are_asked_for_and_given(verifier: Verifier) -> None:
    """What sparse rows cannot prove is decided by whole ones, as if they had been whole from the start."""
    verifier.open(FLAT)
    complete = verifier.ask(verify(1, PROMPT, [4, 5], [4, 5, 6])).items[0]
    asked: list[int] = []
    answer = verifier.ask(verify(2, PROMPT, [4, 5], [4, 5, 6], top_k=1))
    while isinstance(answer, NeedRows):
        assert answer.step == 2
        asked += answer.rows
        rows = np.stack([whole((4, 5, 6)[row]) for row in answer.rows])
        answer = verifier.ask(FullRows(2, answer.rows, rows))
    assert asked
    assert len(set(asked)) == len(asked)
    assert answer.items == (replace(complete, full_rows=len(asked)),)


def test_rows_of_another_step_are_ignored(verifier: Verifier) -> None:
    """Late rows of a step that is over, or unasked for, do not disturb the present one."""
    verifier.open(FLAT)
    assert isinstance(verifier.ask(verify(2, PROMPT, [], [4], top_k=1)), NeedRows)
    verifier.send(FullRows(1, (0,), whole(5)[None]))
    answer = verifier.ask(FullRows(2, (0,), whole(4)[None]))
    assert isinstance(answer, Verdict)
    verifier.send(FullRows(2, (0,), whole(5)[None]))
    assert verifier.ask(verify(3, PROMPT, [], [4])).items[0].tokens == answer.items[0].tokens


@pytest.mark.parametrize(
    ("spoil", "ref"),
    [
        (lambda v: replace(v, lse=np.zeros(3)), 5),
        (lambda v: replace(v, asked_ids=np.zeros(1, np.int32)), 5),
        (lambda v: replace(v, items=(replace(v.items[0], n_asked=2**32 - 1),)), 5),
        (lambda v: replace(v, top_ids=v.top_ids + N_VOCAB), 1),
        (lambda v: replace(v, top_ids=v.top_ids * 0), 1),
        (lambda v: replace(v, top_logits=np.full_like(v.top_logits, np.nan)), 1),
        (lambda v: replace(v, top_logits=-v.top_logits), 1),
        (lambda v: replace(v, top_ids=np.empty((1, 0), np.int32), top_logits=np.empty((1, 0), np.float32)), 1),
    ],
    ids=["lse", "asked", "n_asked", "ids", "twice", "nan", "unsorted", "no columns"],
)
def test_a_malformed_step_is_refused(verifier: Verifier, spoil: Any, ref: int) -> None:
    """What breaks the rules gets an Error that names the session, or the step where that cannot be told; nothing is
    changed by it.
    """
    verifier.open()
    good = verify(5, PROMPT, [], [4])
    refused = verifier.ask(spoil(good))
    assert isinstance(refused, Error)
    assert (refused.ref, refused.code) == (ref, "bad_message")
    assert verifier.ask(good).items == (VerdictItem(1, (4,), 0),)


@pytest.mark.parametrize("rows", [np.zeros((1, 7)), np.full((1, 8), np.nan), np.zeros((2, 8))])
def test_malformed_whole_rows_are_refused(verifier: Verifier, rows: np.ndarray) -> None:
    """Whole rows of the wrong shape, or not finite, get an Error; the right ones are still taken."""
    verifier.open(FLAT)
    assert isinstance(verifier.ask(verify(2, PROMPT, [], [4], top_k=1)), NeedRows)
    refused = verifier.ask(FullRows(2, (0,), rows.astype(np.float32)))
    assert isinstance(refused, Error)
    assert isinstance(verifier.ask(FullRows(2, (0,), whole(4)[None])), Verdict)


def test_distributions_that_cannot_be_are_refused(verifier: Verifier) -> None:
    """Under rejection sampling an impossible draft distribution is an Error, never a verdict."""
    verifier.open(SamplingParams(acceptance="rejection", temperature=1.0, top_k=0, top_p=1.0, min_p=0.0))
    step = verify(5, PROMPT, [4], [4, 5])
    step = replace(
        step,
        items=(replace(step.items[0], q_counts=(1,)),),
        q_ids=np.array([5], np.int32),
        q_probs=np.ones(1, np.float32),
    )
    answer = verifier.ask(step)
    while isinstance(answer, NeedRows):
        answer = verifier.ask(FullRows(5, answer.rows, np.stack([whole((4, 5)[row]) for row in answer.rows])))
    assert isinstance(answer, Error)
    assert answer.ref == 1


def nonsense(chance: random.Random) -> list[bytes]:
    """Malformed, truncated, wrong-typed, or out of place here, or valid with arbitrary values."""
    tokens = np.array([chance.randrange(-9, 9) for _ in range(chance.randrange(4))], np.int32)
    bias = ((chance.randrange(-2, 12), chance.choice((1.0, -np.inf, np.inf))),) * chance.randrange(2)
    sampling = SamplingParams(
        temperature=chance.choice((0.0, 1e-30, 1.0, 100.0)), top_k=chance.choice((0, 1, 2**31 - 1)),
        top_p=chance.choice((0.0, 0.5, 1.0)), min_p=chance.choice((0.0, 1.0)), logit_bias=bias,
        repeat_penalty=chance.choice((1.0, 0.01, 100.0)), repeat_last_n=chance.choice((0, 2, 64)),
        acceptance=chance.choice(("coupled", "rejection")),
    )  # fmt: skip
    limits = Limits(1, (chance.randrange(9),))
    n_vocab, n_prompt = chance.choice((0, 1, 8, 9, 2**32 - 1)), chance.randrange(9)
    texts = ([], PROMPT, tokens.tolist())
    question = verify(
        chance.randrange(3), chance.choice(texts), [chance.randrange(9) for _ in range(chance.randrange(3))],
        [chance.randrange(N_VOCAB) for _ in range(chance.randrange(1, 4))], chance.choice((1, 2, 8)),
    )  # fmt: skip
    full_rows = tuple(chance.sample(range(3), chance.randrange(1, 4)))
    message: Message = chance.choice(
        (
            OpenSampling(1, tokens, n_prompt, n_vocab, sampling, limits),
            question,
            FullRows(chance.randrange(3), full_rows, np.zeros((len(full_rows), 8), np.float32)),
            CloseSampling(tuple(range(chance.randrange(3)))),
            Hello("draft", "x", 1), Cancel(1), Close(1), Ping(1), Encoded(1, tokens),
            Verdict(1, (VerdictItem(1, (), 0),)), NeedRows(1, (0,)), Error(0, "x", "y"),
        )
    )  # fmt: skip
    frames = [bytearray(frame) for frame in wire.encode(message)]
    kind = chance.randrange(6)
    frame = chance.choice(frames)
    if kind == 0 and frame:
        frame[chance.randrange(len(frame))] ^= chance.randrange(1, 256)
    elif kind == 1:
        del frame[chance.randrange(len(frame) + 1) :]
    elif kind == 2:
        frames.append(bytearray(chance.randbytes(chance.randrange(5))))
    elif kind == 3:
        frames = [bytearray(chance.randbytes(chance.randrange(30))) for _ in range(chance.randrange(1, 4))]
    return [bytes(frame) for frame in frames]


def test_ten_thousand_bad_messages_do_not_end_it(verifier: Verifier) -> None:
    """After 10,000 malformed, truncated, wrong-typed and unexpected messages it is alive and answers as before."""
    chance = random.Random(5)
    bomb = [b"\x93\x01\xa4Ping" + b"\x91" * 1000 + b"\x01"]
    n_errors = 0
    for batch in range(100):
        for _ in range(99):
            verifier.send_raw(nonsense(chance))
        verifier.send_raw(bomb)
        verifier.open()
        number = 1000 + batch
        verifier.send(verify(number, PROMPT, [4, 5], [4, 5, 6]))
        verdict, refused = verifier.receive_until(number)
        assert verdict.items == (VerdictItem(1, (4, 5, 6), 2),)
        n_errors += refused
    assert n_errors > 3000
