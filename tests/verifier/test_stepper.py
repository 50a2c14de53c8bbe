"""The target's step loop, with the real sampler's logic behind it and an engine that knows its cache by heart."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from services.sampler.service import SamplerService
from services.verifier.sampler_client import SamplerClient, Stopped
from services.verifier.stepper import Stepper
from shared import wire
from shared.engine.dense import DenseLogits
from shared.engine.interface import Chunk, EngineInfo, EngineSettings
from shared.engine.null import NullEngine, next_token
from shared.engine.slots import check_chunks, check_prefix, common_prefix
from shared.errors import EngineError
from shared.messages import (
    Close,
    CloseSampling,
    Commit,
    Error,
    Explanation,
    FullRows,
    GetExplanation,
    Limits,
    Message,
    NeedRows,
    OpenSampling,
    OpenTarget,
    Proposal,
    Speculation,
    StepReport,
    TargetStats,
    Verify,
)
from shared.prefix import TokenPrefix
from shared.sampling.params import SamplingParams
from shared.settings import Settings, VerifierSettings

N_VOCAB = 48
GREEDY = SamplingParams(temperature=0.0)
COUPLED = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=11)
PENALIZED = SamplingParams(seed=4, top_k=20, repeat_penalty=1.3, logit_bias=((3, 2.0),))


def row_after(text: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(TokenPrefix(text).hash).normal(0, 2, N_VOCAB).astype(np.float32)


class HistoryEngine:
    """Its logits depend on every token that a slot really holds, so that a wrong cache shows in the text."""

    def __init__(self, n_slots: int, n_ctx: int, n_batch: int) -> None:
        self.info = EngineInfo("history", "", "", N_VOCAB, n_ctx, n_slots, n_batch, "f", True)
        self.held: list[list[int]] = [[] for _ in range(n_slots)]
        self.n_computed = 0
        self.most_slots = 0

    def forward(self, chunks: Sequence[Chunk]) -> DenseLogits:
        self.n_computed += check_chunks(
            chunks, [len(h) for h in self.held], self.info.n_ctx, self.info.n_batch
        )  # a chunk that starts after the slot's end, and every other broken rule, raises here
        self.most_slots = max(self.most_slots, len(chunks))
        rows = []
        for chunk in chunks:
            held = self.held[chunk.slot]
            del held[chunk.start :]
            for index, token in enumerate(chunk.tokens.tolist()):
                held.append(token)
                if index >= len(chunk.tokens) - chunk.rows:
                    rows.append(row_after(held))
        return DenseLogits(np.array(rows, np.float32).reshape(-1, N_VOCAB))

    def length(self, slot: int) -> int:
        return len(self.held[slot])

    def truncate(self, slot: int, length: int) -> None:
        check_prefix([len(h) for h in self.held], slot, length)
        del self.held[slot][length:]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        check_prefix([len(h) for h in self.held], source, length)
        self.held[target] = self.held[source][:length]

    def close(self) -> None:
        self.held = []


PAGE = 4


class PagedEngine(HistoryEngine):
    """The same with pages of a few tokens, which all slots take from one pool."""

    def __init__(self, n_pages: int, n_slots: int, n_ctx: int = 128, n_batch: int = 40) -> None:
        super().__init__(n_slots, n_ctx, n_batch)
        self.n_pages = n_pages

    def forward(self, chunks: Sequence[Chunk]) -> DenseLogits:
        lengths = [len(h) for h in self.held]
        for chunk in chunks:
            lengths[chunk.slot] = chunk.start + len(chunk.tokens)
        if sum(-(-length // PAGE) for length in lengths) > self.n_pages:
            raise EngineError("the pool is full", "raise kv_pages", "out_of_pages")
        return super().forward(chunks)


class RememberingEngine(HistoryEngine):
    """Whole pages of every text that a slot has ever held can be had again."""

    def __init__(self, n_slots: int, n_ctx: int = 128, n_batch: int = 40) -> None:
        super().__init__(n_slots, n_ctx, n_batch)
        self.known: set[tuple[int, ...]] = set()
        self.n_gained = 0

    def forward(self, chunks: Sequence[Chunk]) -> DenseLogits:
        logits = super().forward(chunks)
        self.known |= {tuple(held[:end]) for held in self.held for end in range(PAGE, len(held) + 1, PAGE)}
        return logits

    def reuse_prefix(self, slot: int, tokens: np.ndarray) -> int:
        text = tokens[:-1].tolist()
        own = common_prefix(np.array(self.held[slot]), np.array(text))
        found = [end for end in range(PAGE, len(text) + 1, PAGE) if tuple(text[:end]) in self.known]
        length = max([own, *found])
        self.n_gained += length - own
        self.held[slot] = text[:length]
        return length


class DirectLink:
    """Stands for the socket to a sampler: the real service's handlers, called at once, and its answers."""

    def __init__(self, sampler: SamplerService) -> None:
        self._handlers: dict[type, Callable[[bytes, Any], None]] = {
            OpenSampling: sampler._on_open,
            CloseSampling: sampler._on_close,
            Verify: sampler._on_verify,
            FullRows: sampler._on_full_rows,
        }
        self._answers: deque[Message] = deque()
        self.kinds: list[type] = []
        self.silent = 0
        """How many messages are lost from now on."""
        self.away = 0
        """How often the sampler is waited for in vain from now on, until a new one gets all that was sent meanwhile."""
        self._held: list[Message] = []
        self._restart = sampler._clients.clear
        sampler._link = Mock(send=lambda message, _peer: self._answers.append(message) or True)

    def renew(self) -> bool:
        return False  # no keys

    def send(self, message: Message) -> bool:
        if self.silent:
            self.silent -= 1
            return True
        if self.away:
            self._held.append(message)
            return True
        received: Any = wire.decode([bytes(frame) for frame in wire.encode(message)])
        self._handlers[type(received)](b"verifier", received)
        return True

    def receive(self, timeout_ms: int) -> Message | None:
        assert timeout_ms > 0
        if self.away:
            self.away -= 1
            if not self.away:
                self._restart()
                held, self._held = self._held, []
                for message in held:
                    self.send(message)
            return None
        if not self._answers:
            return None
        message = self._answers.popleft()
        self.kinds.append(type(message))
        return message


class World:
    """A stepper with everything around it."""

    def __init__(self, n_slots: int = 2, n_ctx: int = 128, n_batch: int = 40, **settings: Any) -> None:
        self.engine: Any = HistoryEngine(n_slots, n_ctx, n_batch)
        self.sampler = SamplerService(Settings())
        self.link: Any = DirectLink(self.sampler)
        self.alive = True
        self.settings = VerifierSettings(
            **{"n_max": 4, "length": "fixed", "top_k_rows": 8, "prefill_chunk": 16, **settings}
        )
        self.commits: dict[int, list[Commit]] = {}
        self.texts: dict[int, list[int]] = {}
        self.prompts: dict[int, list[int]] = {}
        self.errors: list[Error] = []
        self.reports: list[StepReport] = []
        self.build()

    def build(self) -> None:
        client = SamplerClient(
            self.link, self.engine.info.n_vocab, self.settings.top_k_rows, Mock(), lambda: self.alive
        )
        self.stepper = Stepper(self.engine, client, self.settings, self.hear)

    def hear(self, messages: Sequence[Message]) -> None:
        for commit in messages:
            if isinstance(commit, Error):
                self.errors.append(commit)
                continue
            if isinstance(commit, StepReport):
                self.reports.append(commit)
                continue
            assert isinstance(commit, Commit)
            text = self.texts[commit.session]
            assert commit.start == len(text)
            assert commit.prefix_hash == TokenPrefix(text).hash
            assert commit.n_accepted <= len(commit.tokens)
            assert (commit.stats is not None) == bool(commit.finish)
            text += commit.tokens
            assert commit.known >= len(text)
            self.commits[commit.session].append(commit)

    def open(
        self, session: int, prompt: Sequence[int], sampling: SamplingParams = GREEDY, max_tokens: int = 12,
        stop: Sequence[int] = (), **speculation: Any,
    ) -> None:  # fmt: skip
        self.prompts[session], self.texts[session], self.commits[session] = list(prompt), list(prompt), []
        limits = Limits(max_tokens, tuple(stop))
        self.stepper.receive(
            OpenTarget(session, np.array(prompt, np.int32), sampling, limits, Speculation(**speculation))
        )

    def propose(self, session: int, run: Sequence[int]) -> None:
        """As a draft worker that knows all commits."""
        text = self.texts[session]
        self.stepper.receive(Proposal(session, len(text), TokenPrefix(text).hash, tuple(run)))

    def finished(self, session: int) -> bool:
        commits = self.commits[session]
        return bool(commits) and bool(commits[-1].finish)

    def generated(self, session: int) -> list[int]:
        return self.texts[session][len(self.prompts[session]) :]

    def stats(self, session: int) -> TargetStats:
        stats = self.commits[session][-1].stats
        assert stats is not None
        return stats

    def run(self, before_step: Callable[[], None] = lambda: None) -> None:
        for _ in range(500):
            if not self.stepper.n_sessions:
                self.stepper.flush()
                return
            before_step()
            self.stepper.step()
        raise AssertionError("the sessions never end")

    def draft_badly(self, expected: dict[int, list[int]], chance: random.Random) -> None:
        """Now and then propose to a session how its text goes on, often with a mistake."""
        for session, text in expected.items():
            done = len(self.generated(session))
            run = text[done : done + chance.randint(1, 6)]
            if run and chance.random() < 0.8:
                if chance.random() < 0.5:
                    run[chance.randrange(len(run))] = chance.randrange(N_VOCAB)
                self.propose(session, run)


MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    monkeypatch.setattr("shared.service.logs.configure", lambda *_: Mock())
    worlds: list[World] = []

    def make(**options: Any) -> World:
        worlds.append(World(**options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.sampler.context.term()
        assert not world.errors, "a test that expects errors takes them away"


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    return make_world()


@pytest.fixture
def plain(make_world: MakeWorld) -> Callable[..., list[int]]:
    """What a session generates alone, without proposals."""

    def generate(prompt: Sequence[int], **options: Any) -> list[int]:
        world = make_world(n_slots=1)
        world.open(1, prompt, **options)
        world.run()
        return world.generated(1)

    return generate


def greedy(prompt: Sequence[int], n: int) -> list[int]:
    text = list(prompt)
    for _ in range(n):
        text.append(int(row_after(text).argmax()))
    return text[len(prompt) :]


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, N_VOCAB, n).tolist()


# -- text --


def test_plain_decoding_is_the_targets_text(world: World) -> None:
    """Without any draft, greedy generation is the argmax of each row, one token a step, and ends at its limit."""
    world.open(1, prompt(20))
    world.run()
    assert world.generated(1) == greedy(prompt(20), 12)
    assert [len(c.tokens) for c in world.commits[1]] == [1] * 12
    assert [c.finish for c in world.commits[1]] == [""] * 11 + ["length"]
    assert world.stats(1).n_proposed == 0


def test_right_proposals_make_fewer_steps(world: World) -> None:
    """Accepted runs are committed at once with a bonus token; the figures of the last commit tell it all."""
    expected = greedy(prompt(20), 12)
    world.open(1, prompt(20))

    def draft() -> None:
        done = len(world.generated(1))
        if done and not world.finished(1):
            world.propose(1, expected[done : done + 6] or [0])

    world.run(draft)
    assert world.generated(1) == expected
    assert [(len(c.tokens), c.n_accepted) for c in world.commits[1]] == [(1, 0), (5, 4), (5, 4), (1, 0)]
    stats = world.stats(1)
    assert (stats.n_prompt, stats.n_generated, stats.rounds) == (20, 12, 3)
    assert (stats.n_proposed, stats.n_accepted) == (8, 8)
    assert stats.by_depth == ((2, 2),) * 4


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED, PENALIZED], ids=["greedy", "coupled", "penalized"])
@pytest.mark.parametrize("n_max", [0, 1, 4])
def test_no_draft_changes_the_text(
    make_world: MakeWorld, plain: Callable[..., list[int]], sampling: SamplingParams, n_max: int
) -> None:
    """Right, half right and wrong proposals, of several sessions at once with rollbacks in between: the same text."""
    chance = random.Random(n_max)
    prompts = [prompt(n, seed=n) for n in (1, 5, 16, 17, 33)]
    expected = [plain(p, sampling=sampling, max_tokens=20) for p in prompts]
    world = make_world(n_slots=3, n_max=n_max)
    for session, tokens in enumerate(prompts):
        world.open(session, tokens, sampling=sampling, max_tokens=20)
    world.run(lambda: world.draft_badly(dict(enumerate(expected)), chance))
    for session, text in enumerate(expected):
        assert world.generated(session) == text
        stats = world.stats(session)
        assert stats.n_accepted == sum(c.n_accepted for c in world.commits[session])
        assert sum(p for p, _ in stats.by_depth) == stats.n_proposed
        assert len(stats.by_depth) <= n_max
    assert world.engine.most_slots == 3


def test_rows_that_prove_nothing_travel_whole(make_world: MakeWorld, plain: Callable[..., list[int]]) -> None:
    """With few logits per row the sampler asks for whole rows: the text is the same, and they are counted."""
    expected = plain(prompt(9), sampling=COUPLED)
    world = make_world(top_k_rows=1)
    world.open(1, prompt(9), sampling=COUPLED)
    world.run()
    assert world.generated(1) == expected
    assert NeedRows in world.link.kinds
    assert world.stats(1).full_rows == world.link.kinds.count(NeedRows)


def test_a_null_target_accepts_a_null_draft(world: World) -> None:
    """The engine without a model goes through the same loop: proposals by its rule are all accepted."""
    world.engine = NullEngine(EngineSettings(engine="null", n_slots=2), N_VOCAB)
    world.build()
    world.open(1, [20, 21], max_tokens=21)

    def draft() -> None:
        text = list(world.texts[1])
        for _ in range(4):
            text.append(next_token(text[-1], len(text) - 1, N_VOCAB))
        world.propose(1, text[-4:])

    world.stepper.step()
    world.run(draft)
    assert len(world.generated(1)) == 21
    assert [c.n_accepted for c in world.commits[1]] == [0, 4, 4, 4, 4]


# -- lengths --


class CostlyEngine(HistoryEngine):
    """Passes whose rows cost as on a large machine; the clock is the test's."""

    def __init__(self, row_invariant: bool = True) -> None:
        super().__init__(2, 512, 160)
        self.info = replace(self.info, row_invariant=row_invariant)
        self.now_us = 1_000_000
        self.rows: list[int] = []

    def forward(self, chunks: Sequence[Chunk]) -> DenseLogits:
        rows = sum(chunk.rows for chunk in chunks)
        self.rows.append(rows)
        self.now_us += 160_000 + 62_400 * (rows - 1)
        return super().forward(chunks)


def adaptive_world(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, engine: CostlyEngine) -> World:
    monkeypatch.setattr("services.verifier.stepper.monotonic_us", lambda: engine.now_us)
    world = make_world(n_max=16, length="adaptive")
    world.engine = engine
    world.build()
    return world


def test_the_router_hears_what_steps_cost(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a second at most and at the end, by rows, and they do not fall; nothing before a step has been measured."""
    engine = CostlyEngine()
    world = adaptive_world(make_world, monkeypatch, engine)
    world.open(1, [20, 21], max_tokens=60)
    n_steps = 0
    while not world.commits[1] or not world.commits[1][-1].finish:
        world.propose(1, greedy(world.texts[1], 3))
        world.stepper.step()
        n_steps += 1
    assert 3 <= len(world.reports) <= engine.now_us / 1e6 + 1
    assert (world.reports[-1].n_steps, world.reports[-1].n_step_sessions) == (n_steps, n_steps)
    points = dict(world.reports[-1].points)
    assert list(points) == [1, 2, 4, 8, 16]
    assert points[1] == pytest.approx(160_000, rel=0.15)
    assert points[4] == pytest.approx(160_000 + 3 * 62_400, rel=0.05)


def test_decisions_are_kept_with_their_grounds(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there, what was verified and accepted, and the prices: every step of the decoding, in order."""
    world = adaptive_world(make_world, monkeypatch, CostlyEngine())
    world.open(1, [20, 21], max_tokens=30)
    while not world.commits[1] or not world.commits[1][-1].finish:
        world.propose(1, greedy(world.texts[1], 3))
        world.stepper.step()
    world.stepper.receive(GetExplanation(5, 1))
    explanation = world.stepper._out.pop()
    assert isinstance(explanation, Explanation)
    decoding = [commit for commit in world.commits[1][1:] if commit.tokens]
    assert [d.position for d in explanation.decisions] == [commit.start for commit in decoding]
    assert [d.n_accepted for d in explanation.decisions] == [commit.n_accepted for commit in decoding]
    assert sum(d.length for d in explanation.decisions) > 0
    for decision in explanation.decisions:
        assert decision.length <= len(decision.reach) <= 3
        assert list(decision.reach) == sorted(decision.reach, reverse=True)
        assert decision.rows == 1 + decision.length
        assert decision.took_us == 160_000 + 62_400 * decision.length


@pytest.mark.parametrize("right", [True, False])
def test_proposals_are_verified_as_long_as_it_pays(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    """Right ones nearly all at a time, wrong ones hardly ever; the text is the target's either way."""
    engine = CostlyEngine()
    world = adaptive_world(make_world, monkeypatch, engine)
    expected = greedy([20, 21], 200)
    world.open(1, [20, 21], max_tokens=200)

    def draft() -> None:
        done = len(world.generated(1))
        run = expected[done : done + 16]
        world.propose(1, run if right else [(token + 1) % N_VOCAB for token in run] or [1])

    world.run(draft)
    assert world.generated(1) == expected
    lengths = [rows - 1 for rows in engine.rows]
    if right:
        assert sum(lengths[10:]) / len(lengths[10:]) > 12
    else:
        assert sum(lengths[40:]) <= 6
        assert len(lengths) >= 200


def test_steps_stay_small_without_row_invariance(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine that computes many rows otherwise than few, decoding sessions never ask so many."""
    engine = CostlyEngine(row_invariant=False)
    world = adaptive_world(make_world, monkeypatch, engine)
    expected = {session: greedy([20, session], 100) for session in (1, 2)}
    for session in expected:
        world.open(session, [20, session], max_tokens=100)

    def draft() -> None:
        for session, text in expected.items():
            done = len(world.generated(session))
            if text[done : done + 16]:
                world.propose(session, text[done : done + 16])

    world.run(draft)
    assert {session: world.generated(session) for session in expected} == expected
    assert 20 < max(engine.rows) <= 24


def test_a_step_waits_for_what_is_known_to_come_soon(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """After misses that the draft answered in 10 ms, though not for what did not come, nor with fixed lengths."""
    engine = CostlyEngine()
    world = adaptive_world(make_world, monkeypatch, engine)
    expected = greedy([20, 21], 400)
    world.open(1, [20, 21], max_tokens=400)
    world.stepper.step()
    for _ in range(30):
        done = len(world.generated(1))
        world.propose(1, [*expected[done : done + 3], (expected[done + 3] + 1) % N_VOCAB])
        world.stepper.step()
        if world.stepper.patience(engine.now_us) > 0:
            break
        text, done = world.texts[1], len(world.generated(1))
        engine.now_us += 10_000
        world.stepper.receive(
            Proposal(1, len(text), TokenPrefix(text).hash, tuple(expected[done : done + 1])), engine.now_us
        )
    patience = world.stepper.patience(engine.now_us)
    assert 0.01 <= patience < 0.03
    for _ in range(10):
        world.stepper.patience(engine.now_us)
        world.stepper.give_up()
    assert world.stepper.patience(engine.now_us) == 0
    engine.now_us += 1_000_000
    assert world.stepper.patience(engine.now_us) == 0


# -- sessions --


def test_sessions_wait_for_slots(make_world: MakeWorld) -> None:
    """More sessions than slots: they wait in order of arrival, all finish, none mixes with another."""
    world = make_world(n_slots=2)
    for session in range(5):
        world.open(session, prompt(10, seed=session), max_tokens=3 + session)
    world.stepper.step()
    assert world.stepper.n_sessions == 5
    assert [bool(world.commits[session]) for session in range(5)] == [True, True, False, False, False]
    order: list[int] = []

    def note() -> None:
        order.extend(s for s in range(5) if world.finished(s) and s not in order)

    world.run(note)
    note()
    assert order == [0, 1, 2, 3, 4]
    for session in range(5):
        assert world.generated(session) == greedy(prompt(10, seed=session), 3 + session)
        assert (world.stats(session).queue_us > 0) or session < 2


def test_beyond_the_bound_sessions_are_refused(make_world: MakeWorld) -> None:
    """Free slots count, also before a step has filled them; who is refused is told to come back, and may."""
    world = make_world(n_slots=2, max_waiting=1)
    for session in range(4):
        world.open(session, prompt(6, seed=session), max_tokens=3)
    world.stepper.step()
    assert [(e.ref, e.code, e.retry_after_s) for e in world.errors] == [(3, "overloaded", 1)]
    world.open(4, prompt(6, seed=4), max_tokens=3)
    world.run()
    assert [e.ref for e in world.errors] == [3, 4]
    world.errors.clear()
    world.open(3, prompt(6, seed=3), max_tokens=3)
    world.run()
    for session in range(4):
        assert world.generated(session) == greedy(prompt(6, seed=session), 3)


def test_a_long_prompt_does_not_stop_the_others(make_world: MakeWorld) -> None:
    """While a prompt is computed in chunks, a decoding session gets a token in every step."""
    world = make_world(n_slots=2, prefill_chunk=8, n_batch=30)
    world.open(1, prompt(5), max_tokens=30)
    world.stepper.step()
    world.open(2, prompt(60, seed=2), max_tokens=2)
    before = len(world.generated(1))
    steps = 0
    while not world.commits[2]:
        world.stepper.step()
        steps += 1
    assert steps == 8
    assert len(world.generated(1)) == before + steps
    world.run()
    assert world.generated(2) == greedy(prompt(60, seed=2), 2)


def test_cancel_while_waiting(make_world: MakeWorld) -> None:
    """A session that has no slot yet ends with an empty commit; the others do not notice."""
    world = make_world(n_slots=1)
    for session in (1, 2, 3):
        world.open(session, prompt(6, seed=session))
    world.stepper.step()
    world.stepper.receive(Close(2))
    world.run()
    assert [(c.tokens, c.finish) for c in world.commits[2]] == [((), "cancelled")]
    assert world.stats(2).queue_us > 0
    for session in (1, 3):
        assert world.generated(session) == greedy(prompt(6, seed=session), 12)


@pytest.mark.parametrize("steps", [1, 2, 5], ids=["in the first chunk", "in the prompt", "in decoding"])
def test_cancel_while_running(make_world: MakeWorld, steps: int) -> None:
    """A running session ends at once with what it has, and its slot serves the next one with a true cache."""
    world = make_world(n_slots=1, prefill_chunk=16)
    world.open(1, prompt(40))
    for _ in range(steps):
        world.stepper.step()
    world.stepper.receive(Close(1))
    world.stepper.flush()
    assert world.commits[1][-1].finish == "cancelled"
    assert world.generated(1) == greedy(prompt(40), max(0, steps - 2))
    assert not world.stepper.busy
    world.open(2, prompt(40))
    world.run()
    assert world.generated(2) == greedy(prompt(40), 12)
    assert world.stats(2).n_cached == min(39, 16 * steps)


def test_unknown_sessions_change_nothing(world: World) -> None:
    """Proposals for a session that has ended, or never was, are ignored; a Close of one is answered."""
    world.open(1, prompt(6))
    world.run()
    before = len(world.commits[1])
    world.stepper.receive(Close(1))
    world.stepper.receive(Close(77))
    world.propose(1, [1, 2])
    world.stepper.flush()
    assert len(world.commits[1]) == before
    assert world.stepper.n_sessions == 0
    assert [(error.ref, error.code) for error in world.errors] == [(1, "unknown_session"), (77, "unknown_session")]
    world.errors.clear()


def test_forgetting_frees_everything(make_world: MakeWorld) -> None:
    """When the router is gone, running and waiting sessions end without a word, and the slots are free."""
    world = make_world(n_slots=1)
    for session in (1, 2):
        world.open(session, prompt(6, seed=session))
    world.stepper.step()
    heard = len(world.commits[1])
    world.stepper.forget_all()
    world.stepper.flush()
    assert world.stepper.n_sessions == 0
    assert len(world.commits[1]) == heard
    assert world.sampler._clients[b"verifier"].sessions == {}
    world.open(3, prompt(6, seed=1))
    world.run()
    assert world.generated(3) == greedy(prompt(6, seed=1), 12)


def test_a_shared_prompt_is_computed_once(world: World) -> None:
    """The next session with the same beginning reuses the cache, from its own slot or another's; same text."""
    world.open(1, prompt(40))
    world.run()
    computed = world.engine.n_computed
    world.open(2, prompt(40))
    world.open(3, [*prompt(36), 1, 2], max_tokens=4)
    world.run()
    assert world.generated(2) == greedy(prompt(40), 12)
    assert world.generated(3) == greedy([*prompt(36), 1, 2], 4)
    assert world.stats(2).n_cached >= 36
    assert world.stats(3).n_cached == 36
    assert world.engine.n_computed - computed < 40


def test_a_shared_prompt_that_no_slot_holds_any_more(make_world: MakeWorld) -> None:
    """An engine that remembers the beginning of a conversation whose slot another one has taken computes the rest
    only; the text is the same, and the session's figures say what was reused."""
    system = prompt(30, seed=1)
    computed = {}
    for engine in (HistoryEngine(1, 128, 40), RememberingEngine(1)):
        world = make_world()
        world.engine = engine
        world.build()
        world.open(1, [*system, 1, 2, 3])
        world.open(2, prompt(40, seed=2))
        world.run()
        before = engine.n_computed
        world.open(3, [*system, 4, 5, 6])
        world.run()
        assert world.generated(3) == greedy([*system, 4, 5, 6], 12)
        computed[type(engine)] = engine.n_computed - before, world.stats(3).n_cached
    assert computed == {HistoryEngine: (33 + 11, 0), RememberingEngine: (33 - 28 + 11, 28)}


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_remembered_no_text_changes(make_world: MakeWorld, seed: int) -> None:
    """Sessions with one of four beginnings, two at a time, some with wrong proposals, some cancelled."""
    chance = random.Random(seed)
    world = make_world()
    world.engine = RememberingEngine(2)
    world.build()
    expected: dict[int, list[int]] = {}
    for session in range(10):
        tokens = [*prompt(22, seed=chance.randint(90, 93)), *prompt(chance.randint(1, 15), seed=session)]
        expected[session] = greedy(tokens, chance.randint(1, 12))
        world.open(session, tokens, max_tokens=len(expected[session]))
    for session in (3, 6):
        for _ in range(chance.randint(1, 6)):
            world.draft_badly(expected, chance)
            world.stepper.step()
        if not world.finished(session):
            world.stepper.receive(Close(session))
    world.run(lambda: world.draft_badly(expected, chance))
    for session, text in expected.items():
        done = world.generated(session)
        assert done == (text[: len(done)] if session in (3, 6) else text)
    assert world.engine.n_gained > 0
    for slot, held in enumerate(world.engine.held):
        assert world.stepper._slots.cached(slot).tolist() == held


# -- room --


def paged(make_world: MakeWorld, n_pages: int, n_slots: int = 2) -> World:
    world = make_world()
    world.engine = PagedEngine(n_pages, n_slots)
    world.build()
    return world


def test_what_ended_sessions_left_makes_room(make_world: MakeWorld) -> None:
    """A session that grows beyond the free pages goes on in those of one that has ended, which nobody reuses then."""
    world = paged(make_world, n_pages=12)
    world.open(1, prompt(20, seed=1))
    world.run()
    world.open(2, prompt(20, seed=2), max_tokens=24)
    world.run()
    assert world.generated(2) == greedy(prompt(20, seed=2), 24)
    assert world.engine.held[0] == []
    world.open(3, prompt(20, seed=1))
    world.run()
    assert world.stats(3).n_cached == 0
    assert world.generated(3) == greedy(prompt(20, seed=1), 12)


def test_no_more_is_evicted_than_needed(make_world: MakeWorld) -> None:
    """Of two conversations that have ended, the older one is dropped and the other one goes on where it was."""
    world = paged(make_world, n_pages=21, n_slots=3)
    for session in (1, 2):
        world.open(session, prompt(20, seed=session))
        world.run()
    world.open(3, prompt(20, seed=3))
    world.run()
    assert world.engine.held[0] == []
    world.open(4, world.texts[2], max_tokens=1)
    world.run()
    assert world.stats(4).n_cached == 31


@pytest.mark.parametrize("n_max", [0, 4])
def test_of_two_that_do_not_fit_the_newer_is_refused(make_world: MakeWorld, n_max: int) -> None:
    """It ends with the engine's error; the text of the other is what it is alone, and what waits is served later."""
    world = paged(make_world, n_pages=10)
    expected = {session: greedy(prompt(16, seed=session), 20) for session in (1, 2, 3, 4)}
    for session in expected:
        world.open(session, prompt(16, seed=session), max_tokens=20, n_max=n_max)
    chance = random.Random(n_max)
    while not world.errors:
        world.draft_badly(expected, chance)
        world.stepper.step()
    assert not world.finished(1)
    assert world.errors == [Error(2, "out_of_pages", "the pool is full", "raise kv_pages", 1)]
    assert world.generated(2) == expected[2][: len(world.generated(2))]
    for _ in range(3):
        world.stepper.step()
    assert world.commits[3] == [], "nothing starts while it would be refused next"
    world.run(lambda: world.draft_badly(expected, chance))
    assert world.generated(1) == expected[1]
    assert [error.ref for error in world.errors] == [2, 4]
    assert world.generated(3) == expected[3]
    assert world.sampler._clients[b"verifier"].sessions == {}
    world.errors.clear()


def test_what_can_never_fit_is_refused_alone(make_world: MakeWorld) -> None:
    """A prompt larger than the pool ends with the engine's error, without a word of trying again; others are served."""
    world = paged(make_world, n_pages=10)
    world.open(1, prompt(60))
    world.run()
    assert world.errors == [Error(1, "out_of_pages", "the pool is full", "raise kv_pages")]
    world.errors.clear()
    world.open(2, prompt(20))
    world.run()
    assert world.generated(2) == greedy(prompt(20), 12)


@pytest.mark.parametrize("seed", range(8))
def test_whoever_is_refused_no_text_changes(make_world: MakeWorld, seed: int) -> None:
    """Sessions of all sizes in a small pool, some with a common beginning: each ends, with its own text or an error
    after a part of it; the first is never refused, and no slot holds what the table could not evict."""
    chance = random.Random(seed)
    world = paged(make_world, n_pages=chance.randint(12, 24), n_slots=3)
    expected: dict[int, list[int]] = {}
    for session in range(10):
        tokens = [*prompt(chance.choice((0, 17)), seed=99), *prompt(chance.randint(1, 15), seed=session)]
        expected[session] = greedy(tokens, chance.randint(1, 12))
        world.open(session, tokens, max_tokens=len(expected[session]))
    world.run(lambda: world.draft_badly(expected, chance))
    refused = {error.ref for error in world.errors}
    assert {error.code for error in world.errors} <= {"out_of_pages"}
    world.errors.clear()
    assert 0 not in refused
    for session, text in expected.items():
        done = world.generated(session)
        assert world.finished(session) == (session not in refused)
        assert done == (text[: len(done)] if session in refused else text)
    for slot, held in enumerate(world.engine.held):
        assert world.stepper._slots.cached(slot).tolist() == held


def test_a_cancelled_session_leaves_what_can_be_evicted(world: World) -> None:
    """What its slot holds of refused proposals, which the table does not know of, is dropped."""
    world.open(1, prompt(9))
    world.stepper.step()
    world.propose(1, [(token + 1) % N_VOCAB for token in greedy(prompt(9), 4)[1:]])
    world.stepper.step()
    assert len(world.engine.held[0]) == 9 + 1 + 3
    world.stepper.receive(Close(1))
    assert world.engine.held[0] == [*prompt(9), *greedy(prompt(9), 1)]


def test_other_errors_of_the_engine_are_fatal(world: World) -> None:
    """An engine that fails otherwise is not asked again."""
    world.open(1, prompt(9))
    world.engine.forward = Mock(side_effect=EngineError("the GPU is gone", code="device_failed"))
    with pytest.raises(EngineError, match="the GPU is gone"):
        world.stepper.step()
    assert world.engine.forward.call_count == 1


# -- ends --


def test_a_stop_token_ends_the_generation(world: World) -> None:
    """The stop token is the last one committed, also in the middle of an accepted run."""
    expected = greedy(prompt(10), 12)
    stop = expected[4]
    end = expected.index(stop) + 1
    world.open(1, prompt(10), stop=[stop])
    world.stepper.step()
    world.propose(1, expected[1:9])
    world.run()
    assert world.generated(1) == expected[:end]
    assert world.commits[1][-1].finish == "stop"
    assert world.commits[1][-1].n_accepted > 0


def test_the_context_ends_the_generation(make_world: MakeWorld) -> None:
    """A generation stops where the context is full, whatever it was allowed, with proposals up to the end."""
    world = make_world(n_ctx=30)
    expected = greedy(prompt(20), 10)
    world.open(1, prompt(20), max_tokens=1000)

    def draft() -> None:
        done = len(world.generated(1))
        world.propose(1, [*expected[done:], 0, 0, 0, 0])

    world.run(draft)
    assert world.generated(1) == expected
    assert world.commits[1][-1].finish == "length"
    full = make_world(n_ctx=30)
    full.open(1, prompt(29), max_tokens=5)
    full.run()
    assert len(full.generated(1)) == 1


def test_a_limit_cuts_an_accepted_run(world: World) -> None:
    """No token is generated beyond the limit, however many proposals were right."""
    expected = greedy(prompt(10), 12)
    world.open(1, prompt(10), max_tokens=3)
    world.stepper.step()
    world.propose(1, expected[1:9])
    world.run()
    assert world.generated(1) == expected[:3]
    assert world.commits[1][-1].n_accepted == 1


# -- trouble --


def test_a_restarted_sampler_changes_nothing(world: World, plain: Callable[..., list[int]]) -> None:
    """A sampler that has forgotten the sessions is told again, in mid-generation; the text is the same."""
    expected = plain(prompt(9), sampling=PENALIZED)
    world.open(1, prompt(9), sampling=PENALIZED)
    world.run(world.sampler._clients.clear)
    assert world.generated(1) == expected


def test_a_verifier_that_was_silent_for_long_goes_on(
    world: World, plain: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler forgets who has not been heard for long, and nobody else; sessions are opened again if need be."""
    expected = plain(prompt(9), sampling=PENALIZED)
    world.open(1, prompt(9), sampling=PENALIZED)
    world.stepper.step()
    world.sampler._forget_silent()
    assert world.sampler.held()["sessions"] == 1
    monkeypatch.setattr("services.sampler.service.CLIENT_S", 0.0)
    world.sampler._forget_silent()
    assert world.sampler.held()["sessions"] == 0
    world.run()
    assert world.generated(1) == expected


def test_a_lost_question_is_asked_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that does not answer is asked again after a while, and the step goes on as if nothing were."""
    monkeypatch.setattr("services.verifier.sampler_client._RETRY_MS", 0)
    world.open(1, prompt(9), max_tokens=3)
    world.stepper.step()
    world.link.silent = 2
    world.run()
    assert world.generated(1) == greedy(prompt(9), 3)


def test_a_sampler_that_is_away_for_long_changes_nothing(
    world: World, plain: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes back without its sessions, to many copies of a question, is told of them once, and goes on."""
    expected = plain(prompt(9), sampling=PENALIZED)
    monkeypatch.setattr("services.verifier.sampler_client._RETRY_MS", 0)
    world.open(1, prompt(9), sampling=PENALIZED)
    world.stepper.step()
    world.link.away = 20
    world.run()
    assert world.generated(1) == expected


def test_the_end_of_the_process_ends_the_wait(world: World) -> None:
    """A verifier that is told to stop does not wait for a sampler that is gone."""
    world.open(1, prompt(9))
    world.link.silent = 1000
    world.alive = False
    with pytest.raises(Stopped):
        world.stepper.step()


def test_proposals_outside_the_vocabulary_are_dropped(world: World) -> None:
    """A worker that proposes impossible ids does not reach the engine with them."""
    world.open(1, prompt(9), max_tokens=6)
    world.stepper.step()
    world.propose(1, [1, N_VOCAB])
    world.propose(1, [2**31 - 1])
    world.run()
    assert world.generated(1) == greedy(prompt(9), 6)
    assert world.stats(1).n_proposed == 0
    assert world.stats(1).n_stale == 3


def test_a_session_that_cannot_be_decided_ends_alone(make_world: MakeWorld) -> None:
    """A session whose parameters the sampler refuses ends with its error; the others lose a step and no token."""
    world = make_world(n_slots=3)
    world.open(1, prompt(9, seed=1))
    world.open(2, prompt(9, seed=2), sampling=SamplingParams(logit_bias=((1, np.inf),)))
    world.open(3, prompt(9, seed=1), sampling=COUPLED)
    world.run()
    assert [(error.ref, error.code) for error in world.errors] == [(2, "bad_request")]
    world.errors.clear()
    assert world.commits[2] == []
    assert world.generated(1) == greedy(prompt(9, seed=1), 12)
    assert len(world.generated(3)) == 12
    world.open(4, prompt(9, seed=2))
    world.run()
    assert world.generated(4) == greedy(prompt(9, seed=2), 12), "its slot is free, and true"


def test_banning_everything_ends_the_session(world: World) -> None:
    """A request that leaves no token to choose gets an error instead of a verifier that asks for ever."""
    world.open(1, prompt(9), sampling=SamplingParams(logit_bias=tuple((t, -np.inf) for t in range(N_VOCAB))))
    world.run()
    assert [error.ref for error in world.errors] == [1]
    world.errors.clear()
