"""The router as a process, among gateways, verifiers and draft workers that a test plays."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
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
    Commit,
    DraftStats,
    Encoded,
    Error,
    Explanation,
    Finished,
    Generate,
    GetExplanation,
    GetStatus,
    GetTrace,
    Goodbye,
    Hello,
    Limits,
    Message,
    ModelLabel,
    OpenDraft,
    OpenTarget,
    Order,
    Ordered,
    OrderWorker,
    PeerStatus,
    Ping,
    Pong,
    Proposal,
    Speculation,
    Status,
    StepReport,
    TargetStats,
    Tokens,
    Totals,
    Trace,
    TraceSources,
    Verdict,
    VerdictItem,
    Welcome,
    WorkerStatus,
)
from shared.prefix import TokenPrefix
from shared.sampling.params import SamplingParams
from tests.gateway.fleet import CONFIG, Process

pytestmark = pytest.mark.pipeline

PATIENCE_S = 30.0
N_VOCAB, N_CTX = 100, 1000
PROMPT = [1, 2, 3]
SAMPLING = SamplingParams(seed=9, temperature=0.5)
SETTINGS = (
    "router.heartbeat_ms=50", "router.deadline_beats=100", "router.max_sessions=3", "router.window=5",
    "router.demotion_s=0",  # one router serves all tests, whose workers come and go with their sessions
)  # fmt: skip


class Peer:
    """One end of a connection to the router; answers pings whenever it is asked for a message."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], run_dir: Path, hello: Hello | None) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.sndhwm = self.socket.rcvhwm = 0
        link = "drafts" if hello is not None and hello.role == "draft" else "router"
        self.socket.connect(f"ipc://{run_dir / link}.sock")
        self.hello = hello
        self.lag_us = 0
        """How much slower than it is this peer seems to be."""
        self.clock_ahead_ns: int | None = None
        """How far its clock is ahead; None: it does not say."""
        self._heard: list[Any] = []

    def send(self, message: Message) -> None:
        self.socket.send_multipart(wire.encode(message))

    def _hear(self) -> None:
        message = wire.decode(self.socket.recv_multipart())
        if isinstance(message, Ping):
            ahead_ns = self.clock_ahead_ns
            clock_ns = 0 if ahead_ns is None else time.monotonic_ns() + ahead_ns
            self.send(Pong(max(0, message.sent_ns - self.lag_us * 1000), clock_ns))
        else:
            self._heard.append(message)

    def expect(self, *kinds: type) -> Any:
        """The next message of one of these kinds; what came before it, other than a Welcome, fails the test."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            while self._heard:
                message = self._heard.pop(0)
                if isinstance(message, kinds):
                    return message
                assert isinstance(message, Welcome), f"{message} instead of {kinds}"
            assert self.socket.poll(max(0, (deadline - time.monotonic()) * 1000)), f"no {kinds}"
            self._hear()

    def join(self) -> Welcome:
        assert self.hello is not None
        self.send(self.hello)
        return self.expect(Welcome)

    def refused(self, code: str) -> Error:
        error = self.expect(Error)
        assert error.code == code
        return error

    def nothing_before_now(self) -> None:
        """The router has handled all that this peer has sent, and has sent nothing before that but answers to it."""
        self.send(Encoded(1, np.empty(0, np.int32)))
        self.refused("unexpected_message")

    def status(self) -> Status:
        self.send(GetStatus(7))
        return self.expect(Status)

    def generate(self, request: int = 1, tokens: Sequence[int] = PROMPT, **fields: Any) -> None:
        options = {"sampling": SAMPLING, "limits": Limits(50, (9,)), **fields}
        self.send(Generate(request, np.array(tokens, np.int32), **options))


def draft_hello(name: str, fingerprint: str = "f", n_slots: int = 4) -> Hello:
    return Hello("draft", name, random.getrandbits(60), "e", "m", fingerprint, N_VOCAB, N_CTX, n_slots)


def verifier_hello(name: str = "verifier", fingerprint: str = "f") -> Hello:
    return Hello("verifier", name, random.getrandbits(60), "e", "m", fingerprint, N_VOCAB, N_CTX, 4, True)


class Net:
    """A router's clients."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._peers: list[Peer] = []
        self.cli = self.peer(None)

    def peer(self, hello: Hello | None) -> Peer:
        self._peers.append(Peer(self._context, self.run_dir, hello))
        return self._peers[-1]

    def joined(self, hello: Hello, lag_us: int = 0) -> Peer:
        peer = self.peer(hello)
        peer.lag_us = lag_us
        peer.join()
        return peer

    def gateway(self) -> Peer:
        return self.joined(Hello("gateway", "gateway", random.getrandbits(60)))

    def verifier(self, **fields: Any) -> Peer:
        return self.joined(verifier_hello(**fields))

    def draft(self, name: str = "a", lag_us: int = 0, **fields: Any) -> Peer:
        return self.joined(draft_hello(name, **fields), lag_us)

    def wait(self, condition: Callable[[Status], bool], *alive: Peer) -> Status:
        """Ask for the status until a condition holds; the peers named go on answering pings."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition(status := self.cli.status()):
            assert time.monotonic() < deadline, status
            for peer in alive:
                if peer.socket.poll(5):
                    peer._hear()
        return status

    def peer_status(self, instance: str) -> PeerStatus:
        return next(p for p in self.cli.status().peers if p.instance == instance)

    def close(self) -> None:
        for peer in self._peers:
            peer.socket.close()
        self._context.term()


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running router's run directory; it is still alive, and ends well, after all tests."""
    run_dir = tmp_path_factory.mktemp("router")
    process = Process("router", run_dir, *SETTINGS)
    process.logged("ready")
    yield run_dir
    assert process.running()
    process.stop()
    assert process.wait() == 0


@pytest.fixture
def net(router: Path) -> Iterator[Net]:
    """Clients of the module's router, which has forgotten all earlier ones."""
    net = Net(router)
    net.wait(lambda status: not status.peers and not status.n_sessions)
    yield net
    net.close()


@pytest.fixture
def own_router(tmp_path: Path) -> Iterator[Callable[..., tuple[Process, Net]]]:
    """Routers with settings of their own."""
    started: list[tuple[Process, Net]] = []

    def start(*overrides: str, settings: tuple[str, ...] = SETTINGS) -> tuple[Process, Net]:
        process = Process("router", tmp_path, *settings, *overrides)
        process.logged("ready")
        started.append((process, Net(tmp_path)))
        return started[-1]

    yield start
    for process, net in started:
        net.close()
        process.stop()


def commit(session: int, text: list[int], *tokens: int, finish: Any = "", stats: Any = None) -> Commit:
    """The verifier's next commit; `text` grows by it."""
    message = Commit(session, len(text), TokenPrefix(text).hash, tokens, 0, len(text) + len(tokens), finish, stats)
    text += tokens
    return message


# -- registration --


def test_a_peer_is_welcomed_and_pinged(net: Net) -> None:
    """Hello is answered by Welcome; Ping follows, and Pong makes the round trip known. Saying it again is harmless."""
    verifier = net.verifier()
    first = verifier.join()
    assert first.heartbeat_ms == 50
    assert verifier.join() == first
    status = net.wait(lambda s: bool(s.peers) and s.peers[0].rtt_us > 0, verifier)
    (peer,) = status.peers
    assert (peer.role, peer.instance, peer.vocab_fingerprint) == ("verifier", "verifier", "f")
    assert (peer.n_vocab, peer.n_ctx, peer.n_slots, peer.row_invariant, peer.alive) == (N_VOCAB, N_CTX, 4, True, True)


@pytest.mark.parametrize(
    "message",
    [
        Generate(1, np.array(PROMPT, np.int32), SAMPLING, Limits(5)),
        Commit(1, 0, 0, (1,), 0, 1),
        Pong(1),
        Goodbye("x"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_an_unknown_peer_is_told_so(net: Net, message: Message) -> None:
    """Whoever has not introduced itself, as after the router's restart, gets unknown_peer."""
    stranger = net.peer(None)
    stranger.send(message)
    stranger.refused("unknown_peer")


def test_an_unknown_worker_is_told_so(net: Net) -> None:
    """The same on the draft workers' socket."""
    worker = net.peer(draft_hello("a"))
    worker.send(Proposal(1, 0, 0, (1,)))
    worker.refused("unknown_peer")


def test_peers_have_their_own_socket(net: Net) -> None:
    """A draft worker at the local socket, or a verifier at the draft workers', is refused."""
    local, remote = net.peer(None), net.peer(draft_hello("a"))
    local.send(draft_hello("a"))
    local.refused("wrong_socket")
    remote.send(verifier_hello())
    remote.refused("wrong_socket")
    assert net.cli.status().peers == ()


def test_a_restarted_peer_replaces_its_predecessor(net: Net) -> None:
    """There is one peer of a name: the newest; the sessions of the old process move on."""
    net.verifier()
    gateway, old = net.gateway(), net.draft("a")
    gateway.generate()
    session = old.expect(OpenDraft).session
    new = net.draft("a")
    assert new.expect(OpenDraft).session == session
    assert [p.instance for p in net.cli.status().peers if p.role == "draft"] == ["a"]


def test_a_peer_that_begins_again_on_its_connection_gets_sessions(net: Net) -> None:
    """A worker that took the router for lost says Hello with a new boot: its session comes back to it, with all
    tokens."""
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate()
    session, text = worker.expect(OpenDraft).session, list(PROMPT)
    verifier.expect(OpenTarget)
    verifier.send(commit(session, text, 4))
    worker.expect(Commit)
    worker.hello = draft_hello("a")
    worker.join()
    assert worker.expect(OpenDraft).tokens.tolist() == text


# -- vocabulary --


def test_a_draft_with_another_vocabulary_is_refused(net: Net) -> None:
    """It is told both vocabularies and what to do, and is not registered; an n-gram drafter has none and is welcome."""
    net.verifier()
    worker = net.peer(draft_hello("a", fingerprint="other"))
    worker.send(draft_hello("a", fingerprint="other"))
    error = worker.refused("vocabulary_mismatch")
    assert "other" in error.message
    assert "f)" in error.message
    assert error.remedy
    net.draft("n", fingerprint="")
    assert sorted(p.instance for p in net.cli.status().peers) == ["n", "verifier"]


def test_a_draft_that_came_first_is_refused_too(net: Net) -> None:
    """When the target joins later, drafts of another vocabulary are told then; the others stay."""
    other, same = net.draft("a", fingerprint="other"), net.draft("b")
    net.verifier()
    other.refused("vocabulary_mismatch")
    assert sorted(p.instance for p in net.cli.status().peers) == ["b", "verifier"]
    same.nothing_before_now()


# -- a generation --


def test_a_generation_passes_through(net: Net) -> None:
    """Every message of one generation reaches whom it is for, with what it is to carry, and the figures at the end."""
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate(5, speculation=Speculation(n_max=3))
    opened = verifier.expect(OpenTarget)
    assert (opened.tokens.tolist(), opened.sampling, opened.limits) == (PROMPT, SAMPLING, Limits(50, (9,)))
    assert opened.speculation.n_max == 3
    drafting = worker.expect(OpenDraft)
    assert drafting.session == opened.session
    assert (drafting.tokens.tolist(), drafting.sampling) == (PROMPT, SAMPLING)
    assert (drafting.stop_tokens, drafting.window) == ((9,), 5)
    assert net.cli.status().n_sessions == 1

    text = list(PROMPT)
    proposal = Proposal(opened.session, 3, TokenPrefix(text).hash, (4, 5), (0.5, 0.25), prefill_us=30, decode_us=7)
    worker.send(proposal)
    forwarded = verifier.expect(Proposal)
    assert (forwarded.tokens, forwarded.prefix_hash, forwarded.confidence) == (
        (4, 5),
        proposal.prefix_hash,
        (0.5, 0.25),
    )
    first = commit(opened.session, text, 4, 5, 6)
    verifier.send(first)
    assert worker.expect(Commit) == first
    assert gateway.expect(Tokens) == Tokens(5, (4, 5, 6), 0)
    stats = TargetStats(n_prompt=3, rounds=2)
    verifier.send(commit(opened.session, text, 9, finish="stop", stats=stats))
    assert gateway.expect(Tokens).tokens == (9,)
    label = ModelLabel("m", "", "e")
    assert gateway.expect(Finished) == Finished(5, "stop", stats, DraftStats("a", 2, 30, 7, 0), label, label)
    assert worker.expect(Close) == Close(opened.session)
    assert net.cli.status().n_sessions == 0


def test_claimed_costs_stay_within_what_can_be_said(net: Net) -> None:
    """A worker that claims centuries for its proposals does not keep the client from its end."""
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate(5)
    opened = verifier.expect(OpenTarget)
    worker.expect(OpenDraft)
    for _ in range(3):
        worker.send(
            Proposal(opened.session, 3, TokenPrefix(PROMPT).hash, (4,), (0.5,), prefill_us=2**53, decode_us=2**53)
        )
        verifier.expect(Proposal)
    verifier.send(commit(opened.session, list(PROMPT), 9, finish="stop", stats=TargetStats()))
    assert gateway.expect(Tokens).tokens == (9,)
    assert gateway.expect(Finished).draft == DraftStats("a", 3, 2**53, 2**53, 0)


def test_the_nearest_worker_drafts(net: Net) -> None:
    """Of several workers the one with the lowest round trip gets the session, whoever came first."""
    net.verifier()
    gateway = net.gateway()
    far, near = net.draft("a", lag_us=90_000_000), net.draft("b", lag_us=10_000_000)
    net.wait(lambda s: sum(p.rtt_us > 0 for p in s.peers if p.role == "draft") == 2, far, near)
    for request in range(2):
        gateway.generate(request)
        near.expect(OpenDraft)
    far.nothing_before_now()


def test_the_end_says_what_computed(net: Net) -> None:
    """Target and draft by the file's name, the recipe and the engine: of the worker that drafted last, gone or not."""
    target = Hello("verifier", "v", 1, "ik", "/models/big-IQ4_KSS.gguf", "f", N_VOCAB, N_CTX, 4, True, "", "IQ4_KSS")
    verifier, gateway = net.joined(target), net.gateway()
    small = Hello("draft", "a", 2, "cuda", "embedded:draft", "f", N_VOCAB, N_CTX, 4, True, "", "Q4_K_M")
    worker = net.joined(small)
    for request, draft in ((1, "auto"), (2, "none"), (3, "auto")):
        gateway.generate(request, speculation=Speculation(draft))
        opened, text = verifier.expect(OpenTarget), list(PROMPT)
        if draft == "auto":
            worker.expect(OpenDraft)
        if request == 3:
            worker.send(Goodbye("draining"))
            net.wait(lambda s: not any(p.role == "draft" and p.n_sessions for p in s.peers), worker)
        verifier.send(commit(opened.session, text, 9, finish="stop", stats=TargetStats()))
        gateway.expect(Tokens)
        finished = gateway.expect(Finished)
        if request == 1:
            worker.expect(Close)
        assert finished.target_label == ModelLabel("big-IQ4_KSS.gguf", "IQ4_KSS", "ik")
        drafted = ModelLabel("pymoe-11m-a2m-draft-Q4_K_M.gguf", "Q4_K_M", "cuda")
        assert finished.draft_label == (drafted if draft == "auto" else ModelLabel())


def test_a_full_worker_gets_no_more(net: Net) -> None:
    """When the nearest worker's slots are in use, the next one drafts; with none left, the target decodes alone."""
    verifier, gateway = net.verifier(), net.gateway()
    near, far = net.draft("a", n_slots=1), net.draft("b", n_slots=1, lag_us=90_000_000)
    net.wait(lambda s: sum(p.rtt_us > 0 for p in s.peers if p.role == "draft") == 2, far, near)
    for request in range(3):
        gateway.generate(request)
        verifier.expect(OpenTarget)
    near.expect(OpenDraft)
    far.expect(OpenDraft)
    near.nothing_before_now()
    far.nothing_before_now()


@pytest.mark.parametrize("speculation", [Speculation("none"), Speculation(n_max=0), Speculation("model")])
def test_plain_decoding_on_request(net: Net, speculation: Speculation) -> None:
    """Without speculation, or with a configured worker that is not there, no other worker hears of the session."""
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate(speculation=speculation)
    verifier.expect(OpenTarget)
    worker.nothing_before_now()
    late = net.draft("b")
    late.nothing_before_now()


def test_a_worker_may_be_named(net: Net) -> None:
    """A request may ask for one worker, which gets it although another is nearer."""
    net.verifier()
    gateway, other, named = net.gateway(), net.draft("a"), net.draft("b", lag_us=90_000_000)
    gateway.generate(speculation=Speculation("b"))
    named.expect(OpenDraft)
    other.nothing_before_now()


def test_a_worker_that_joins_takes_over_plain_sessions(net: Net) -> None:
    """A session without a worker gets one as soon as there is one, with all tokens so far."""
    verifier, gateway = net.verifier(), net.gateway()
    gateway.generate()
    session, text = verifier.expect(OpenTarget).session, list(PROMPT)
    verifier.send(commit(session, text, 4, 5))
    gateway.expect(Tokens)
    assert net.draft("a").expect(OpenDraft).tokens.tolist() == text == [1, 2, 3, 4, 5]


def test_a_freed_place_goes_to_a_session_that_has_none(net: Net) -> None:
    """A generation that found every draft worker full gets one as soon as another generation has ended."""
    verifier = net.verifier()
    gateway, worker = net.gateway(), net.draft("a", n_slots=1)
    gateway.generate(1)
    first = worker.expect(OpenDraft).session
    gateway.generate(2)
    for _ in range(2):
        verifier.expect(OpenTarget)
    verifier.send(commit(first, list(PROMPT), 7, finish="length", stats=TargetStats()))
    worker.expect(Close)
    assert worker.expect(OpenDraft).session != first


def test_proposals_of_another_worker_are_not_forwarded(net: Net) -> None:
    """Only the worker that a session has been given to is heard for it; others, and unknown sessions, are not."""
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate()
    session = worker.expect(OpenDraft).session
    verifier.expect(OpenTarget)
    stranger = net.draft("b")
    stranger.send(Proposal(session, 3, 1, (66,)))
    stranger.nothing_before_now()
    worker.send(Proposal(session + 1, 3, 1, (67,)))
    worker.send(Proposal(session, 3, 1, (4,)))
    assert verifier.expect(Proposal).tokens == (4,)


# -- loss --


def test_a_lost_worker_is_replaced(net: Net) -> None:
    """When a worker's connection closes, another gets the session with prompt and commits; the client sees nothing."""
    verifier, gateway, lost = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate()
    session, text = verifier.expect(OpenTarget).session, list(PROMPT)
    lost.expect(OpenDraft)
    verifier.send(commit(session, text, 4, 5))
    lost.expect(Commit)
    heir = net.draft("b")
    lost.socket.close()
    verifier.send(commit(session, text, 6))
    opened = heir.expect(OpenDraft)
    seen = opened.tokens.tolist()
    if len(seen) < len(text):  # it took over before the last commit was there
        seen += heir.expect(Commit).tokens
    assert seen == text
    verifier.send(commit(session, text, 9, finish="stop"))
    assert [gateway.expect(Tokens).tokens for _ in range(3)] == [(4, 5), (6,), (9,)]
    assert gateway.expect(Finished).draft == DraftStats("b", 0, 0, 0, 1)
    heir.expect(Close)


def test_a_worker_lost_at_the_end_leaves_nothing_behind(
    own_router: Callable[..., tuple[Process, Net]],
) -> None:
    """When a worker is gone as its session ends, no other worker is given the session that is over."""
    _process, net = own_router("router.heartbeat_ms=60000")
    verifier, gateway, lost = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate()
    session, text = verifier.expect(OpenTarget).session, list(PROMPT)
    lost.expect(OpenDraft)
    heir = net.draft("b")
    lost.socket.close()
    for _ in range(20):  # time for the router's side to notice
        net.cli.status()
    verifier.send(commit(session, text, 9, finish="stop"))
    gateway.expect(Tokens)
    gateway.expect(Finished)
    heir.nothing_before_now()
    assert net.peer_status("b").n_sessions == 0


def test_a_draining_worker_gives_its_sessions_away(net: Net) -> None:
    """Goodbye moves a worker's sessions at once, and it gets no new ones."""
    net.verifier()
    gateway, leaving = net.gateway(), net.draft("a")
    gateway.generate(1)
    session = leaving.expect(OpenDraft).session
    heir = net.draft("b")
    leaving.send(Goodbye("draining"))
    assert heir.expect(OpenDraft).session == session
    gateway.generate(2)
    heir.expect(OpenDraft)


def test_a_worker_that_refuses_a_session_is_passed_over(net: Net) -> None:
    """A worker without room for a session does not get it again at once; with no other, the target decodes alone."""
    verifier, gateway, full = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate()
    session, text = full.expect(OpenDraft).session, list(PROMPT)
    verifier.expect(OpenTarget)
    full.send(Error(session, "no_slot", "all slots are in use"))
    full.nothing_before_now()
    assert net.draft("b").expect(OpenDraft).session == session
    verifier.send(commit(session, text, 9, finish="stop"))
    assert gateway.expect(Tokens).tokens == (9,)


def test_a_slot_that_a_refusal_leaves_free_is_given_away(net: Net) -> None:
    """To the session that waits for one; and who was refused is tried again later, since room may have come."""
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a", n_slots=1)
    gateway.generate(1)
    refused, text = worker.expect(OpenDraft).session, list(PROMPT)
    gateway.generate(2)
    waiting = {verifier.expect(OpenTarget).session for _ in range(2)} - {refused}
    worker.send(Error(refused, "out_of_pages", "the pool is full"))
    assert {worker.expect(OpenDraft).session} == waiting
    verifier.send(commit(*waiting, list(PROMPT), 9, finish="stop"))
    worker.expect(Close)
    for _ in range(40):
        verifier.send(commit(refused, text, 7))
    assert worker.expect(OpenDraft).session == refused


def test_a_session_that_outgrows_its_worker_gets_another_one(net: Net) -> None:
    """One whose cache holds it; workers that are too small do not get it in the first place."""
    verifier, gateway = net.verifier(), net.gateway()
    small = net.joined(replace(draft_hello("small"), n_ctx=24))
    gateway.generate(limits=Limits(200))
    session, text = small.expect(OpenDraft).session, list(PROMPT)
    verifier.expect(OpenTarget)
    large = net.draft("large", lag_us=100_000)
    net.joined(replace(draft_hello("tiny"), n_ctx=8)).nothing_before_now()
    for _ in range(40):
        verifier.send(commit(session, text, 7))
    assert written(large.expect(OpenDraft), large, text) == text
    assert worker_status(net, "small").n_sessions == 0


def test_a_worker_that_lost_a_commit_starts_again(net: Net) -> None:
    """After a lost commit the same worker is told everything anew."""
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate()
    session, text = worker.expect(OpenDraft).session, list(PROMPT)
    verifier.expect(OpenTarget)
    verifier.send(commit(session, text, 4))
    worker.expect(Commit)
    worker.send(Error(session, "lost_commit", "a commit was lost"))
    assert worker.expect(OpenDraft).tokens.tolist() == text


def test_a_lost_verifier_ends_its_generations(net: Net) -> None:
    """The client gets an error that says when to try again, the worker is told to stop."""
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate(5)
    session = verifier.expect(OpenTarget).session
    worker.expect(OpenDraft)
    verifier.socket.close()
    error = gateway.refused("verifier_lost")
    assert error.ref == 5
    assert error.retry_after_s > 0
    assert worker.expect(Close) == Close(session)
    assert net.cli.status().n_sessions == 0


def test_a_verifiers_error_reaches_the_client(net: Net) -> None:
    """An Error about a session ends it, with the verifier's words and the client's own number."""
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate(5)
    session = verifier.expect(OpenTarget).session
    worker.expect(OpenDraft)
    verifier.send(Error(session, "draining", "shutting down", "try again", 5))
    assert gateway.expect(Error) == Error(5, "draining", "shutting down", "try again", 5)
    worker.expect(Close)


def test_a_lost_gateway_cancels_its_generations(net: Net) -> None:
    """Nobody computes for a client that is gone."""
    verifier, gateway = net.verifier(), net.gateway()
    gateway.generate()
    session = verifier.expect(OpenTarget).session
    gateway.socket.close()
    assert verifier.expect(Close) == Close(session)
    verifier.send(commit(session, list(PROMPT), finish="cancelled"))
    net.wait(lambda status: status.n_sessions == 0, verifier)


def test_silence_is_failure(own_router: Callable[..., tuple[Process, Net]]) -> None:
    """A worker that keeps its connection but answers no ping is dropped after its deadline, its session moves on."""
    process, net = own_router("router.heartbeat_ms=20", "router.deadline_beats=10")
    verifier, gateway, mute, heir = net.peer(verifier_hello()), net.gateway(), net.draft("a"), net.draft("b")
    verifier.join()
    gateway.generate(speculation=Speculation("auto"))
    lively = (verifier, gateway, heir)
    net.wait(lambda s: all(p.instance != "a" for p in s.peers), *lively)
    assert {p.instance for p in net.cli.status().peers} == {"b", "verifier", "gateway"}
    process.logged("peer_lost", peer="a", reason="it is silent")
    heir.expect(OpenDraft)
    mute.socket.close()


# -- refusals --


def test_no_verifier(net: Net) -> None:
    """Without a target there is nothing to do but to try again later."""
    gateway = net.gateway()
    gateway.generate(5)
    error = gateway.refused("no_verifier")
    assert (error.ref, error.retry_after_s > 0) == (5, True)


@pytest.mark.parametrize(
    ("tokens", "fields", "code"),
    [
        ([], {}, "empty_prompt"),
        ([1] * N_CTX, {}, "context_exceeded"),
        ([1, N_VOCAB], {}, "bad_token"),
        ([1, -1], {}, "bad_token"),
        (PROMPT, {"sampling": SamplingParams(logit_bias=((N_VOCAB, 1.0),))}, "bad_token"),
        (PROMPT, {"sampling": SamplingParams(logit_bias=((-1, 1.0),))}, "bad_token"),
    ],
)
def test_a_request_that_cannot_be_served(net: Net, tokens: list[int], fields: Any, code: str) -> None:
    """It gets an error with its own number, a stable code and no advice to repeat it; nobody else hears of it."""
    verifier, gateway = net.verifier(), net.gateway()
    gateway.generate(5, tokens, **fields)
    error = gateway.refused(code)
    assert (error.ref, error.retry_after_s) == (5, 0)
    verifier.nothing_before_now()
    assert net.cli.status().n_sessions == 0


def test_the_longest_prompt_is_served(net: Net) -> None:
    """A prompt that leaves room for one token is taken."""
    verifier, gateway = net.verifier(), net.gateway()
    gateway.generate(5, [1] * (N_CTX - 1))
    assert len(verifier.expect(OpenTarget).tokens) == N_CTX - 1


def test_overload_is_refused(net: Net) -> None:
    """Beyond max_sessions a request is told to come back; when one has ended, there is room again."""
    verifier, gateway = net.verifier(), net.gateway()
    for request in range(4):
        gateway.generate(request)
    error = gateway.refused("overloaded")
    assert (error.ref, error.retry_after_s > 0) == (3, True)
    session = verifier.expect(OpenTarget).session
    verifier.send(commit(session, list(PROMPT), 9, finish="stop"))
    gateway.expect(Tokens)
    gateway.expect(Finished)
    gateway.generate(4)
    assert [len(verifier.expect(OpenTarget).tokens) for _ in range(3)] == [3] * 3


def test_a_number_in_use_is_refused(net: Net) -> None:
    """Two requests of one gateway cannot have one number at a time; those of two gateways can."""
    verifier, gateway = net.verifier(), net.gateway()
    gateway.generate(5)
    gateway.generate(5)
    gateway.refused("duplicate_request")
    other = net.joined(Hello("gateway", "other", 1))
    other.generate(5)
    assert verifier.expect(OpenTarget).session != verifier.expect(OpenTarget).session


def test_cancel(net: Net) -> None:
    """Cancel reaches the verifier as Close; its last commit ends the request. Unknown numbers are ignored."""
    verifier, gateway = net.verifier(), net.gateway()
    gateway.generate(5)
    session = verifier.expect(OpenTarget).session
    gateway.send(Cancel(77))
    gateway.send(Cancel(5))
    assert verifier.expect(Close) == Close(session)
    verifier.send(commit(session, list(PROMPT), finish="cancelled"))
    assert gateway.expect(Finished).reason == "cancelled"
    gateway.send(Cancel(5))
    gateway.nothing_before_now()


def test_a_commit_of_a_forgotten_session_is_answered_by_close(net: Net) -> None:
    """A verifier that works on what nobody waits for is told to stop; its last word about it needs no answer."""
    verifier = net.verifier()
    verifier.send(Commit(77, 0, 0, (1,), 0, 1))
    assert verifier.expect(Close) == Close(77)
    verifier.send(Commit(77, 0, 0, (1,), 0, 1, "stop"))
    verifier.nothing_before_now()


@pytest.mark.parametrize("start", [4, 2], ids=["a gap", "a repetition"])
def test_a_lost_commit_ends_the_generation(net: Net, start: int) -> None:
    """Text with a hole never reaches a client: the generation ends with an error and the verifier is told to stop."""
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate(5)
    session = verifier.expect(OpenTarget).session
    worker.expect(OpenDraft)
    verifier.send(Commit(session, start, 0, (7,), 0, start + 1))
    assert gateway.refused("lost_commit").ref == 5
    assert verifier.expect(Close) == Close(session)
    assert worker.expect(Close) == Close(session)


def test_a_drain_lets_generations_end(own_router: Callable[..., tuple[Process, Net]]) -> None:
    """After SIGTERM new requests are refused, the one in progress ends well, and the process exits with 0."""
    process, net = own_router()
    verifier, gateway = net.verifier(), net.gateway()
    gateway.generate(5)
    session = verifier.expect(OpenTarget).session
    process.signal(signal.SIGTERM)
    process.logged("draining")
    gateway.generate(6)
    assert gateway.refused("draining").ref == 6
    verifier.send(commit(session, list(PROMPT), 9, finish="stop"))
    gateway.expect(Tokens)
    assert gateway.expect(Finished).request == 5
    assert process.wait() == 0


# -- nonsense --


def nonsense(chance: random.Random, sessions: Sequence[int]) -> list[bytes]:
    """Malformed, truncated, wrong-typed or unexpected messages, and expected ones with arbitrary values."""
    tokens = np.array([chance.randrange(-2, 102) for _ in range(chance.randrange(5))] + [-1], np.int32)
    run = tuple(chance.randrange(200) for _ in range(chance.randrange(1, 5)))
    session, start = chance.choice([*sessions, 0, 77]), chance.randrange(9)
    bias = ((chance.randrange(-3, 103), -np.inf),) * chance.randrange(3)
    message: Message = chance.choice(
        (
            Generate(chance.randrange(3), tokens, SamplingParams(logit_bias=bias), Limits(1), Speculation(n_max=0)),
            Proposal(session, start, chance.randrange(99), run),
            Commit(session, start, 0, run, 0, start),
            Cancel(chance.randrange(3)),
            Pong(chance.choice((0, 2**64 - 1))),
            GetStatus(3),
            Error(session, "x", "y"),
            Hello("gateway", "nobody", chance.randrange(3)),
            OpenDraft(session, tokens, SAMPLING, (), 1),
            Verdict(1, (VerdictItem(1, (), 0),)),
            Encoded(1, tokens),
            Tokens(1, run, 0),
            Welcome(1, 1),
        )
    )
    frames = [bytearray(frame) for frame in wire.encode(message)]
    frame, kind = chance.choice(frames), chance.randrange(6)
    if kind == 0 and frame:
        frame[chance.randrange(len(frame))] ^= chance.randrange(1, 256)
    elif kind == 1:
        del frame[chance.randrange(len(frame) + 1) :]
    elif kind == 2:
        frames.append(bytearray(chance.randbytes(chance.randrange(5))))
    elif kind == 3:
        frames = [bytearray(chance.randbytes(chance.randrange(30))) for _ in range(chance.randrange(1, 4))]
    return [bytes(frame) for frame in frames]


def test_ten_thousand_bad_messages_do_not_end_it(net: Net) -> None:
    """5,000 at each socket, from registered peers: a generation in progress does not notice."""
    chance = random.Random(6)
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate()
    session, text = worker.expect(OpenDraft).session, list(PROMPT)
    verifier.expect(OpenTarget)
    hostile = (net.joined(Hello("gateway", "hostile", 1)), net.draft("hostile"))
    bomb = [b"\x93\x01\xa4Ping" + b"\x91" * 1000 + b"\x01"]
    for _ in range(50):
        for peer in hostile:
            for _ in range(99):
                peer.socket.send_multipart(nonsense(chance, [session]))
            peer.socket.send_multipart(bomb)
            peer.send(Verdict(1, (VerdictItem(1, (), 0),)))
            while True:  # all of the batch has been answered, or needs no answer
                assert peer.socket.poll(PATIENCE_S * 1000)
                answer = wire.decode(peer.socket.recv_multipart())
                if isinstance(answer, Error) and answer.message == "Verdict has no meaning here":
                    break
        worker.send(Proposal(session, len(text), TokenPrefix(text).hash, (4,)))
        assert verifier.expect(Proposal).tokens == (4,)
        last = commit(session, text, 4)
        verifier.send(last)
        assert worker.expect(Commit) == last
        assert gateway.expect(Tokens).tokens == (4,)
    assert net.cli.status().n_sessions == 1


# -- who drafts --

DEMOTING = ("router.demotion_s=0.3", "router.exploration=0")


def worker_status(net: Net, name: str) -> WorkerStatus:
    return next(w for w in net.cli.status().workers if w.instance == name)


def propose(worker: Peer, session: int, text: list[int], *tokens: int) -> None:
    worker.send(Proposal(session, len(text), TokenPrefix(text).hash, tokens, decode_us=10_000 * len(tokens)))


def written(opened: OpenDraft, worker: Peer, text: list[int]) -> list[int]:
    """What a worker that has just got a session knows of its text, once it has heard of all commits."""
    tokens = opened.tokens.tolist()
    while len(tokens) < len(text):
        tokens += worker.expect(Commit).tokens
    return tokens


def test_a_worker_that_nobody_knows_is_an_error(net: Net) -> None:
    """A name that is not configured and was never there is refused, with the names that could be meant."""
    verifier, gateway = net.verifier(), net.gateway()
    net.draft("somebody")
    gateway.generate(5, speculation=Speculation("sombody"))
    error = gateway.refused("unknown_draft")
    assert (error.ref, error.retry_after_s) == (5, 0)
    assert "'sombody'" in error.message
    assert "somebody" in error.remedy
    assert "model" in error.remedy, "configured, so that it may be asked for before it has loaded its model"
    verifier.nothing_before_now()


def test_a_worker_that_is_away_may_be_asked_for(net: Net) -> None:
    """The session decodes plainly until the worker that it names is there again."""
    verifier, gateway = net.verifier(), net.gateway()
    gone = net.draft("traveller")
    gone.send(Goodbye("draining"))
    net.wait(lambda status: all(p.instance != "traveller" for p in status.peers), verifier, gateway)
    gateway.generate(5, speculation=Speculation("traveller"))
    session = verifier.expect(OpenTarget).session
    assert worker_status(net, "traveller").state == "away"
    assert net.draft("traveller").expect(OpenDraft).session == session


@pytest.mark.parametrize("lie", ["token", "position", "hash", "flood", "malformed"])
def test_a_worker_that_lies_is_demoted(own_router: Callable[..., tuple[Process, Net]], lie: str) -> None:
    """Nothing of what it sends is forwarded; its session goes on elsewhere with every token; it is told to stop."""
    process, net = own_router(*DEMOTING)
    verifier, gateway, liar = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate()
    session, text = liar.expect(OpenDraft).session, list(PROMPT)
    verifier.expect(OpenTarget)
    verifier.send(commit(session, text, 4, 5))
    liar.expect(Commit)
    gateway.expect(Tokens)
    heir = net.draft("b")
    right = TokenPrefix(text).hash
    for i in range(20):
        if lie == "malformed":
            liar.socket.send_multipart([b"nonsense"])
        else:
            liar.send(
                {
                    "token": Proposal(session, len(text), right, (N_VOCAB,)),
                    "position": Proposal(session, len(text) + 90, right, (4,)),
                    "hash": Proposal(session, len(text), 1000 + i, (4,)),
                    "flood": Proposal(session, len(text), right, (4, 4, 4, 4, 4)),
                }[lie]
            )
    demoted = process.logged("worker_demoted", worker="a")
    assert demoted["retry_s"] == 0.3
    assert written(heir.expect(OpenDraft), heir, text) == text
    verifier.send(commit(session, text, 9, finish="stop"))
    assert [gateway.expect(Tokens).tokens for _ in range(1)] == [(9,)]
    gateway.expect(Finished)
    if lie != "flood":  # of which the first windows are as good as any
        verifier.nothing_before_now()


def test_a_demoted_worker_comes_back_on_probation(own_router: Callable[..., tuple[Process, Net]]) -> None:
    """After its back-off it gets one session, pinned to it or not; after 32 good tokens as many as it has slots."""
    process, net = own_router(*DEMOTING, "router.max_sessions=9")
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a")
    for _ in range(2):
        gateway.generate(1, speculation=Speculation("a"))
        first = worker.expect(OpenDraft).session
        verifier.expect(OpenTarget)
        for _ in range(9):
            worker.send(Proposal(first, 3, 0, (N_VOCAB,)))
        assert worker.expect(Close).session == first
        assert not next(p for p in net.cli.status().peers if p.instance == "a").alive
        assert worker_status(net, "a").state == "demoted"
        verifier.send(commit(first, list(PROMPT), 9, finish="stop"))
        gateway.expect(Tokens)
        gateway.expect(Finished)
        net.wait(lambda s: s.workers[0].state == "probation", worker, verifier, gateway)
        gateway.generate(2)
        session, text = worker.expect(OpenDraft).session, list(PROMPT)
        gateway.generate(3)
        for _ in range(2):
            verifier.expect(OpenTarget)
        assert worker_status(net, "a").n_sessions == 1
        for token in range(10, 42):
            propose(worker, session, text, token)
            verifier.expect(Proposal)
            if token < 41:
                verifier.send(commit(session, text, token))
                worker.expect(Commit)
                gateway.expect(Tokens)
        assert worker.expect(OpenDraft).session != session, "it has proved itself"
        assert worker_status(net, "a").state == "ok"
        for request in (2, 3):
            gateway.send(Cancel(request))
        for _ in range(2):
            ended = verifier.expect(Close).session
            known = text if ended == session else list(PROMPT)
            verifier.send(commit(ended, list(known), finish="cancelled"))
            worker.expect(Close)
            gateway.expect(Finished)
    first_line = process.logged("worker_demoted")
    assert first_line["retry_s"] == 0.3
    assert worker_status(net, "a").n_demotions == 2


def test_a_worker_that_stalls_is_demoted(own_router: Callable[..., tuple[Process, Net]]) -> None:
    """One that drafted well and then owes proposals for seconds, while commits go on, loses its session."""
    process, net = own_router(*DEMOTING)
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate()
    session, text = worker.expect(OpenDraft).session, list(PROMPT)
    verifier.expect(OpenTarget)
    propose(worker, session, text, 4)
    verifier.expect(Proposal)
    verifier.send(commit(session, text, 4))
    worker.expect(Commit)
    gateway.expect(Tokens)
    heir = net.draft("b")
    net.wait(
        lambda s: any(w.instance == "a" and w.state == "demoted" for w in s.workers), worker, verifier, gateway, heir
    )
    assert "stalls" in process.logged("worker_demoted", worker="a")["reason"]
    assert worker.expect(Close).session == session
    assert written(heir.expect(OpenDraft), heir, text) == text


def test_a_worker_that_comes_and_goes_is_kept_out(own_router: Callable[..., tuple[Process, Net]]) -> None:
    """The third time that it leaves a session within a minute it is demoted, though each time it is a new process."""
    process, net = own_router(*DEMOTING)
    net.verifier()
    gateway = net.gateway()
    gateway.generate()
    session = 0
    for _ in range(3):
        worker = net.draft("a")
        session = worker.expect(OpenDraft).session
    last = net.draft("a")
    assert process.logged("worker_demoted", worker="a")["reason"].startswith("it left its sessions")
    last.nothing_before_now()
    net.wait(lambda s: s.workers[0].state == "probation", last, gateway)
    assert last.expect(OpenDraft).session == session


def test_a_session_moves_to_a_better_worker(own_router: Callable[..., tuple[Process, Net]]) -> None:
    """A worker whose proposals are never right loses its session to another one, which gets every token so far."""
    process, net = own_router(*DEMOTING)
    verifier, gateway, bad = net.verifier(), net.gateway(), net.draft("bad")
    gateway.generate(1, limits=Limits(1000))
    session, text = bad.expect(OpenDraft).session, list(PROMPT)
    verifier.expect(OpenTarget)
    good = net.draft("good", lag_us=2000)
    for i in range(40):
        propose(bad, session, text, 98)
        verifier.expect(Proposal)
        verifier.send(commit(session, text, 10 + i))
        gateway.expect(Tokens)
        bad.expect(Commit)
        if net.cli.status().sessions[0].worker == "good":
            break
    assert bad.expect(Close).session == session
    moved = process.logged("draft_moved", worker="good", previous="bad")
    assert "faster than bad" in moved["why"]
    assert written(good.expect(OpenDraft), good, text) == text
    status = net.cli.status()
    (shown,) = status.sessions
    assert (shown.session, shown.worker, shown.n_moves) == (session, "good", 1)
    assert "faster than bad" in shown.why
    by_name = {w.instance: w for w in status.workers}
    assert by_name["bad"].acceptance < 0.5
    assert by_name["bad"].n_judged >= 6
    assert by_name["good"].speed_up > by_name["bad"].speed_up
    verifier.send(commit(session, text, 9, finish="stop"))
    assert gateway.expect(Tokens).tokens == (9,)
    assert gateway.expect(Finished).draft.worker_changes == 1


def test_prompt_lookup_takes_over_where_text_is_copied(own_router: Callable[..., tuple[Process, Net]]) -> None:
    """A model that drafts slowly loses a session that repeats its prompt to the n-gram worker, without a trial."""
    process, net = own_router(*DEMOTING)
    verifier, gateway = net.verifier(), net.gateway()
    lookup = net.joined(Hello("draft", "lookup", 1, "ngram", n_slots=256))
    model = net.draft("model")
    page = list(range(10, 30))
    gateway.generate(1, page, limits=Limits(1000))
    session, text = model.expect(OpenDraft).session, list(page)
    verifier.expect(OpenTarget)
    while net.cli.status().sessions[0].worker == "model":
        token = page[len(text) % len(page)]
        model.send(Proposal(session, len(text), TokenPrefix(text).hash, (token,), decode_us=300_000))
        verifier.expect(Proposal)
        verifier.send(commit(session, text, token))
        gateway.expect(Tokens)
        model.expect(Commit)
        assert len(text) - len(page) <= 24, net.cli.status()  # before the worker is reviewed against all others
    assert process.logged("draft_moved")["worker"] == "lookup"
    assert model.expect(Close).session == session
    assert written(lookup.expect(OpenDraft), lookup, text) == text


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_worker_costs_a_token(own_router: Callable[..., tuple[Process, Net]], seed: int) -> None:
    """Workers come, draft, lie, leave and die in any order: every session ends with every token, in order, and whoever
    gets a session is given exactly its text so far."""
    process, net = own_router("router.demotion_s=0.01", "router.exploration=0.5", "router.max_sessions=9")
    chance = random.Random(seed)
    verifier, gateway = net.verifier(), net.gateway()
    for request in range(3):
        gateway.generate(request, limits=Limits(1000))
    texts = {verifier.expect(OpenTarget).session: list(PROMPT) for _ in range(3)}
    heard: dict[int, list[int]] = {request: [] for request in range(3)}
    workers: list[Peer] = []
    held: dict[int, dict[int, list[int]]] = {}

    def listen(worker: Peer) -> None:
        """Take in what the router has sent to a worker."""
        while worker.socket.poll(0):
            worker._hear()
        mine = held.setdefault(id(worker), {})
        for message in worker._heard:
            if isinstance(message, OpenDraft):
                mine[message.session] = message.tokens.tolist()
                assert mine[message.session] == texts[message.session][: len(message.tokens)]
            elif isinstance(message, Commit) and message.session in mine:
                assert len(mine[message.session]) == message.start
                mine[message.session] += message.tokens
            elif isinstance(message, Close):
                mine.pop(message.session, None)
        worker._heard.clear()

    for step in range(400):
        session = chance.choice(list(texts))
        text = texts[session]
        kind = chance.randrange(8)
        if kind == 0 and len(workers) < 4:
            engine = chance.choice(("e", "ngram"))
            workers.append(net.joined(Hello("draft", chance.choice("abcd"), step, engine, n_slots=2)))
        elif kind == 1 and workers:
            leaving = workers.pop(chance.randrange(len(workers)))
            if chance.random() < 0.5:
                leaving.send(Goodbye("draining"))
            leaving.socket.close()
        elif kind <= 4 and workers:
            worker = chance.choice(workers)
            listen(worker)
            for own, tokens in held[id(worker)].items():
                start, prefix_hash = len(tokens), TokenPrefix(tokens).hash
                if chance.random() < 0.2:
                    start, prefix_hash = chance.choice(((start + 99, 1), (0, 1), (start, 2)))
                token = chance.choice((7, 8, N_VOCAB))
                worker.send(Proposal(own, start, prefix_hash, (token,), decode_us=chance.choice((0, 5000))))
        else:
            verifier.send(commit(session, text, chance.choice((7, 8))))
    for session, text in texts.items():
        verifier.send(commit(session, text, 9, finish="stop"))
    for _ in texts:
        while isinstance(message := gateway.expect(Tokens, Finished), Tokens):
            heard[message.request] += message.tokens
        assert message.reason == "stop"
    assert [PROMPT + tokens for tokens in heard.values()] == list(texts.values())
    net.wait(lambda status: status.n_sessions == 0, verifier, gateway)
    assert process.running()


def test_sessions_go_to_the_quicker_verifier(net: Net) -> None:
    """Once both say what their steps cost, the quick one gets the first two of three sessions; drafts serve both."""
    gateway = net.gateway()
    slow, quick = net.verifier(name="a-slow"), net.verifier(name="quick")
    worker = net.draft("a")
    slow.send(StepReport(((1, 300_000), (2, 400_000))))
    quick.send(StepReport(((1, 150_000), (2, 160_000), (3, 310_000))))
    slow.nothing_before_now()
    quick.nothing_before_now()
    for request in range(3):
        gateway.generate(request)
    sessions = {quick.expect(OpenTarget).session for _ in range(2)} | {slow.expect(OpenTarget).session}
    assert {worker.expect(OpenDraft).session for _ in range(3)} == sessions


def test_the_status_can_be_read_whatever_a_worker_says_of_itself(net: Net) -> None:
    """Times that cannot be, the longest and the shortest, do not make the router's answer unreadable."""
    verifier, gateway, boaster = net.verifier(), net.gateway(), net.draft("a")
    for prefill_us, decode_us in ((1, 2**53), (2**53, 1)):
        gateway.generate(1, list(range(20)))
        session, text = boaster.expect(OpenDraft).session, list(range(20))
        verifier.expect(OpenTarget)
        for _ in range(3):
            costs = {"prefill_us": prefill_us, "decode_us": decode_us}
            boaster.send(Proposal(session, len(text), TokenPrefix(text).hash, (5,), **costs))
            verifier.expect(Proposal)
            verifier.send(commit(session, text, 5))
            boaster.expect(Commit)
            gateway.expect(Tokens)
            assert worker_status(net, "a").n_sessions == 1
        verifier.send(commit(session, text, 9, finish="stop"))
        boaster.expect(Close)
        gateway.expect(Tokens)
        gateway.expect(Finished)


def test_a_report_that_cannot_be_is_refused(net: Net) -> None:
    """Rows that do not ascend from one are told so; nothing else changes."""
    verifier = net.verifier()
    verifier.send(StepReport(((2, 5), (1, 4))))
    verifier.refused("bad_report")


def test_an_explanation_comes_from_who_held_the_session(net: Net) -> None:
    """By the session's id or as the last one, also after its end, with the asker's own reference; else an empty one."""
    net.cli.send(GetExplanation(3, 0))
    assert not net.cli.expect(Explanation).decisions, "who held the last one is gone"
    verifier, gateway = net.verifier(), net.gateway()
    gateway.generate()
    session = verifier.expect(OpenTarget).session
    for asked in (0, session):
        net.cli.send(GetExplanation(4, asked))
        question = verifier.expect(GetExplanation)
        assert question.session == session
        answer = Explanation(question.ref, session, True, Speculation(n_max=2), ())
        verifier.send(answer)
        verifier.send(answer)  # once is enough
        assert net.cli.expect(Explanation) == replace(answer, ref=4)
        net.cli.nothing_before_now()
    net.cli.send(GetExplanation(5, session + 1))
    assert not net.cli.expect(Explanation).decisions


def recorded(ref: int, name: str = "x") -> Trace:
    """A process's answer to GetTrace."""
    return Trace(ref, "gateway", name, 7, "host", "clock", 9, ("a.b",), ("main",), np.ones((2, 9), np.int64), 0, 0)


def test_a_trace_is_gathered_from_all_that_worked_on_the_session(net: Net) -> None:
    """Also after its end: those that are there are asked and answer under their registered names, others are named."""
    verifier, gateway, first = net.verifier(), net.gateway(), net.draft("first")
    gateway.generate(request=5)
    session = verifier.expect(OpenTarget).session
    first.expect(OpenDraft)
    second = net.draft("second")
    net.wait(lambda status: len(status.peers) == 4, verifier, gateway, first, second)
    first.send(Goodbye("enough"))
    second.expect(OpenDraft)
    verifier.send(commit(session, list(PROMPT), 4, finish="stop"))
    gateway.expect(Tokens)
    gateway.expect(Finished)
    second.expect(Close)

    for asked in (0, session):
        net.cli.send(GetTrace(4, asked))
        sources = net.cli.expect(TraceSources)
        assert (sources.ref, sources.session) == (4, session)
        named = [(source.role, source.instance, bool(source.missing)) for source in sources.sources]
        assert named[0] == ("router", "router", False)
        assert sorted(named[1:]) == [
            ("draft", "first", True), ("draft", "second", False),
            ("gateway", "gateway", False), ("verifier", "verifier", False),
        ]  # fmt: skip
        own = net.cli.expect(Trace)
        assert (own.ref, own.role) == (4, "router")
        assert "router.generate" in {own.kinds[kind] for kind in own.marks[:, 2].tolist()}
        for peer, number in ((gateway, 5), (verifier, session), (second, session)):
            question = peer.expect(GetTrace)
            assert question.session == number
            peer.send(recorded(question.ref, "liar"))
            peer.send(recorded(question.ref))  # once is enough
            answer = net.cli.expect(Trace)
            assert peer.hello is not None
            assert (answer.ref, answer.role, answer.instance) == (4, peer.hello.role, peer.hello.instance)
            assert answer.marks.tolist() == recorded(1).marks.tolist()
        net.cli.nothing_before_now()
    net.cli.send(GetTrace(6, session + 1))
    assert not net.cli.expect(TraceSources).sources


def test_a_trace_says_how_far_the_clocks_are_apart(net: Net) -> None:
    """By what the peers' pongs say of theirs; of one that says nothing, nothing is known."""
    verifier, gateway, draft = net.verifier(), net.gateway(), net.draft()
    ahead_ns = 10**15
    draft.clock_ahead_ns = ahead_ns
    gateway.generate()
    session = verifier.expect(OpenTarget).session
    draft.expect(OpenDraft)
    net.wait(lambda status: all(peer.rtt_us for peer in status.peers), verifier, gateway, draft)
    net.cli.send(GetTrace(4, session))
    clocks = {source.role: source.clock for source in net.cli.expect(TraceSources).sources}
    assert clocks["router"] == clocks["verifier"] == clocks["gateway"] == ()
    for at in clocks["draft"]:
        assert abs(at.offset_ns - ahead_ns) <= at.uncertainty_ns
    assert clocks["draft"]
    verifier.send(commit(session, list(PROMPT), 4, finish="stop"))


def test_anyone_may_compare_clocks_with_the_router(net: Net) -> None:
    """Ping is answered without a registration, with the router's clock."""
    before = time.monotonic_ns()
    net.cli.send(Ping(before))
    answer = net.cli.expect(Pong)
    assert answer.sent_ns == before <= answer.clock_ns <= time.monotonic_ns()


# -- orders about workers --


def order(net: Net, worker: str, what: Any, session: int = 0) -> Ordered:
    net.cli.send(OrderWorker(3, worker, what, session))
    answer: Ordered = net.cli.expect(Ordered)
    assert answer.ref == 3
    return answer


def order_refused(net: Net, code: str, worker: str, what: Any, session: int = 0) -> Error:
    net.cli.send(OrderWorker(3, worker, what, session))
    error = net.cli.refused(code)
    assert error.ref == 3
    return error


@pytest.fixture
def orderly(net: Net) -> Iterator[Net]:
    """The module's router, on which no order stands, neither before nor after."""
    yield net
    for worker in net.cli.status().workers:
        if worker.order:
            order(net, worker.instance, "allow")


def banned(peer: Peer) -> Error:
    """The router's word to a banned worker; a Pong that was on its way may have been answered before it."""
    while (error := peer.expect(Error)).code == "unknown_peer":
        pass
    assert error.code == "banned"
    return error


def test_a_drained_worker_gets_nothing_until_allowed(orderly: Net) -> None:
    """Its sessions move on at once, with all tokens; it stays connected, and coming back does not help it."""
    net = orderly
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("a")
    gateway.generate(1)
    session, text = worker.expect(OpenDraft).session, list(PROMPT)
    verifier.expect(OpenTarget)
    verifier.send(commit(session, text, 4))
    worker.expect(Commit)
    other = net.draft("b")
    assert order(net, "a", "drain") == Ordered(3, 1, True, "")
    assert worker.expect(Close).session == session
    assert other.expect(OpenDraft).tokens.tolist() == text
    status = worker_status(net, "a")
    assert (status.state, status.reason, status.order, status.there) == (
        *("drained", "drained by an operator", "drain", True),
    )
    assert not net.peer_status("a").alive
    again = net.draft("a")
    gateway.generate(2)
    other.expect(OpenDraft)
    gateway.generate(3, speculation=Speculation("a"))
    again.nothing_before_now()
    order(net, "a", "allow")
    again.expect(OpenDraft)
    assert worker_status(net, "a").state == "ok"


def test_a_banned_worker_is_turned_away_until_allowed(orderly: Net) -> None:
    """It is told so at once and at every Hello, and when it is wanted again; nothing that it sends counts."""
    net = orderly
    net.verifier()
    gateway, worker = net.gateway(), net.draft("a")
    gateway.generate(1)
    session = worker.expect(OpenDraft).session
    assert order(net, "a", "ban").n_moved == 1
    assert worker.expect(Close).session == session
    told = banned(worker)
    assert "draft worker a" in told.message
    assert "allow a" in told.remedy
    assert told.retry_after_s > 0
    worker.send(Proposal(session, 3, TokenPrefix(PROMPT).hash, (5,)))
    worker.refused("unknown_peer")
    worker.send(draft_hello("a"))
    banned(worker)
    stranger = net.peer(draft_hello("a"))
    stranger.send(draft_hello("a"))
    stranger.refused("banned")
    status = worker_status(net, "a")
    assert (status.state, status.there, [p for p in net.cli.status().peers if p.role == "draft"]) == (
        "banned",
        False,
        [],
    )
    order(net, "a", "drain")
    stranger.refused("unknown_peer")  # the last one that asked: an invitation to say Hello
    stranger.join()
    assert worker_status(net, "a").there
    order(net, "a", "allow")
    assert stranger.expect(OpenDraft).session == session


def test_new_sessions_go_to_the_pinned_worker(orderly: Net) -> None:
    """Whatever its score; those that run stay where they are, and requests that name a worker or none get that."""
    net = orderly
    net.verifier()
    gateway, near, far = net.gateway(), net.draft("near"), net.draft("far", lag_us=400_000)
    net.wait(lambda s: all(w.rtt_us for w in s.workers if w.there), near, far)
    gateway.generate(1)
    near.expect(OpenDraft)
    order(net, "far", "pin")
    near.nothing_before_now()
    gateway.generate(2)
    pinned = far.expect(OpenDraft).session
    gateway.generate(3, speculation=Speculation("near"))
    near.expect(OpenDraft)
    session = next(s for s in net.cli.status().sessions if s.session == pinned)
    assert (session.worker, session.pin) == ("far", "far")
    assert "operator" in session.why


def test_only_one_worker_is_pinned(orderly: Net) -> None:
    """A worker has one order, and the pin is one: the newest counts."""
    net = orderly
    net.draft("a")
    net.draft("b")
    order(net, "a", "pin")
    order(net, "b", "pin")
    assert [worker_status(net, name).order for name in "ab"] == ["", "pin"]
    order(net, "b", "drain")
    assert worker_status(net, "b").order == "drain"


def test_a_pinned_session_falls_back_and_says_so(orderly: Net) -> None:
    """While its worker is away another drafts for it; when it is back it gets the session again."""
    net = orderly
    verifier, gateway, pinned, other = net.verifier(), net.gateway(), net.draft("a"), net.draft("b")
    order(net, "a", "pin")
    gateway.generate(1)
    session, text = pinned.expect(OpenDraft).session, list(PROMPT)
    verifier.expect(OpenTarget)
    pinned.send(Goodbye("x"))
    other.expect(OpenDraft)
    assert "pinned to a, which is away" in net.cli.status().sessions[0].why
    back = net.draft("a")
    heard: Any = None
    while not isinstance(heard, Close):
        verifier.send(commit(session, text, 4))
        heard = other.expect(Commit, Close)
    assert back.expect(OpenDraft).session == session
    assert "operator" in net.cli.status().sessions[0].why


def test_one_session_is_pinned_at_once(orderly: Net) -> None:
    """It moves with all its tokens, others do not; `allow` sets it free again."""
    net = orderly
    net.verifier()
    gateway, a = net.gateway(), net.draft("a")
    gateway.generate(1)
    gateway.generate(2)
    first, second = a.expect(OpenDraft).session, a.expect(OpenDraft).session
    b = net.draft("b")
    assert order(net, "b", "pin", first).n_moved == 1
    assert a.expect(Close).session == first
    assert b.expect(OpenDraft).tokens.tolist() == PROMPT
    assert {s.session: s.worker for s in net.cli.status().sessions} == {first: "b", second: "a"}
    assert worker_status(net, "b").order == ""
    order(net, "b", "allow")
    assert [s.pin for s in net.cli.status().sessions] == ["", ""]


def test_orders_that_cannot_be_followed_are_refused(orderly: Net) -> None:
    """A name that nobody knows, a session that is not there or wants no draft, a pin to a worker that is kept out."""
    net = orderly
    net.verifier()
    gateway = net.gateway()
    net.draft("a")
    assert "known here: a, " in order_refused(net, "unknown_worker", "nobody", "drain").remedy
    order_refused(net, "unknown_session", "a", "pin", session=77)
    gateway.generate(1, speculation=Speculation("none"))
    session = net.wait(lambda s: bool(s.sessions)).sessions[0].session
    order_refused(net, "no_draft_wanted", "a", "pin", session)
    order_refused(net, "bad_order", "a", "drain", session)
    gateway.generate(2, speculation=Speculation("model"))
    other = next(s.session for s in net.wait(lambda s: s.n_sessions == 2).sessions if s.session != session)
    order(net, "a", "ban")
    order_refused(net, "worker_shut", "a", "pin", other)
    away = order(net, "model", "pin", other)
    assert (away.n_moved, "model is away" in away.note) == (0, True)


def test_orders_outlive_the_router(own_router: Callable[..., tuple[Process, Net]]) -> None:
    """A router that is killed comes back with them; a worker that it has not seen yet is listed with its order."""
    process, net = own_router()
    net.draft("a")
    net.draft("b")
    order(net, "a", "ban")
    order(net, "b", "drain")
    process.signal(signal.SIGKILL)
    process.wait()
    process, net = own_router()
    assert process.logged("worker_order_stands", worker="a")["order"] == "ban"
    orders: dict[str, Order] = {w.instance: w.order for w in net.cli.status().workers}
    assert orders == {"a": "ban", "b": "drain"}
    worker = net.peer(draft_hello("a"))
    worker.send(draft_hello("a"))
    worker.refused("banned")
    order(net, "a", "allow")
    worker.refused("unknown_peer")
    worker.join()


def test_a_file_of_orders_that_is_damaged_is_ignored(
    tmp_path: Path, own_router: Callable[..., tuple[Process, Net]]
) -> None:
    """With a warning; the next order writes a good one."""
    (tmp_path / "orders.json").write_text('{"version": 1, "orders": {"a": "shoot"}}')
    process, net = own_router()
    assert "shoot" not in process.logged("orders_ignored")["reason"]
    net.draft("a")
    assert order(net, "a", "drain").kept
    assert '"a": "drain"' in (tmp_path / "orders.json").read_text()


def test_an_order_that_cannot_be_kept_says_so(tmp_path: Path, own_router: Callable[..., tuple[Process, Net]]) -> None:
    """It holds all the same."""
    _, net = own_router()
    net.draft("a")
    (tmp_path / "orders.json").mkdir()
    answer = order(net, "a", "drain")
    assert (answer.kept, "orders.json" in answer.note) == (False, True)
    assert worker_status(net, "a").state == "drained"


# -- what the status adds up --


def test_the_status_says_versions_and_uptimes(net: Net) -> None:
    """Of every peer; an uptime that has grown makes no new peer of it."""
    verifier = net.joined(replace(verifier_hello(), version="9.9", uptime_s=5000))
    assert verifier.hello is not None
    verifier.hello = replace(verifier.hello, uptime_s=5001)
    welcome = verifier.join()
    peer = net.peer_status("verifier")
    assert peer.version == "9.9"
    assert 5000 <= peer.uptime_s < 5000 + PATIENCE_S
    assert welcome.boot


def test_the_status_counts_tokens_and_times(net: Net) -> None:
    """Totals of generations and tokens; of each worker round trips, token times, and how soon it is back on the way."""
    verifier, gateway, worker = net.verifier(), net.gateway(), net.draft("timed")
    before = net.cli.status().totals
    gateway.generate(1)
    session, text = worker.expect(OpenDraft).session, list(PROMPT)
    verifier.expect(OpenTarget)
    worker.send(Proposal(session, 3, TokenPrefix(PROMPT).hash, (5, 6), decode_us=8000))
    verifier.expect(Proposal)
    verifier.send(replace(commit(session, text, 5, 9), n_accepted=1))
    worker.expect(Commit)
    worker.send(Proposal(session, 5, TokenPrefix(text).hash, (7,), decode_us=2000))
    verifier.expect(Proposal)
    verifier.send(commit(session, text, 8, finish="length", stats=TargetStats()))
    verifier.send(StepReport(((1, 5),), 30, 40))
    gateway.expect(Tokens)
    gateway.expect(Tokens)
    gateway.expect(Finished)
    status = net.wait(lambda s: s.peers[0].n_steps > 0, worker)
    gained = [getattr(status.totals, name) - getattr(before, name) for name in Totals.__dataclass_fields__]
    assert gained == [1, 1, 0, 3, 1, 3]
    timed = next(w for w in status.workers if w.instance == "timed")
    assert (sum(timed.token.counts), timed.token.sum_us) == (3, 10_000)
    assert sum(timed.reply.counts) == 1
    assert sum(timed.round_trip.counts) >= 1
    assert (status.peers[0].n_steps, status.peers[0].n_step_sessions) == (30, 40)


def test_a_reload_changes_limits_at_once(own_router: Callable[..., tuple[Process, Net]], tmp_path: Path) -> None:
    """The generation that runs goes on, one more is refused; a wrong file changes nothing, a window needs a restart."""
    process, net = own_router(settings=SETTINGS[:2])
    verifier, gateway = net.verifier(), net.gateway()
    gateway.generate(1)
    verifier.expect(OpenTarget)
    (tmp_path / CONFIG).write_text("[router]\nmax_sessions = 0\n")
    process.signal(signal.SIGHUP)
    assert "router.max_sessions" in process.logged("reload_refused")["reason"]
    (tmp_path / CONFIG).write_text(
        "[router]\nmax_sessions = 1\nwindow = 3\nexploration = 0.5\n[gateway]\nport = 7\n[draft.fresh]\nq_top_k = 3\n"
    )
    process.signal(signal.SIGHUP)
    line = process.logged("reloaded")
    assert {"router.exploration", "draft.fresh"} <= set(line["changed"])
    assert line["needs_restart"] == ["router.window"]
    gateway.generate(2)
    assert gateway.refused("overloaded").ref == 2
