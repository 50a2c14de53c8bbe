"""The router's choices played out: workers with speeds that it does not know, and what it makes of them.

Sessions, workers and a target whose rates are those of `shared/speculation/cost.py` with the *true* figures. The router
sees what it would see of them (proposals that arrive, verdicts on them, its pings) and decides with the very code of
the service, `shared/routing`. Beside it an *oracle* decides by the true figures, and contrasts do not look: the nearest
worker, a random one, each in turn. Demotion is not played.

Time passes in ticks, in which a session decodes at its worker's true rate. Pure, and the same for a seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rich.table import Table

from shared.routing.figures import SessionFigures, WorkerFigures
from shared.routing.policy import (
    MOST_REVIEW_COMMITS,
    REVIEW_COMMITS,
    SOON_COMMITS,
    TRIAL_COMMITS,
    Asked,
    Candidate,
    Policy,
)
from shared.routing.score import STEP_PRIOR, Drafting, after_prefill, beside, expected_rate
from shared.speculation.cost import StepCost

TICK_S = 0.5
ORACLE = "oracle"
ROUTER = "router"
NEAREST, RANDOM, IN_TURN = "nearest", "random", "in turn"
WAYS = (ORACLE, ROUTER, NEAREST, RANDOM, IN_TURN)


@dataclass(frozen=True, slots=True)
class TrueWorker:
    """A worker as it is. token_s: of one session alone; each further one makes it so much slower (`per_session`).

    prefill: tokens a second. changes: from these times on, token_s is another one. absent: times (from, to) at which it
    is not there.
    """

    name: str
    token_s: float
    acceptance: float
    rtt_s: float = 0.001
    prefill: float = 2000.0
    n_slots: int = 8
    per_session: float = 0.3
    changes: tuple[tuple[float, float], ...] = ()
    absent: tuple[tuple[float, float], ...] = ()

    def token_s_at(self, now: float, load: int) -> float:
        seconds = self.token_s
        for since, changed in self.changes:
            if now >= since:
                seconds = changed
        return seconds * (1 + self.per_session * (load - 1))

    def present(self, now: float) -> bool:
        return not any(begin <= now < end for begin, end in self.absent)


@dataclass(frozen=True, slots=True)
class Scene:
    """What is played. sessions_at_once: as one ends the next begins. spread: how much the texts differ in how easy they
    are to draft, in acceptance. n_tokens: of a session, from half to twice as many; n_prompt likewise."""

    name: str
    workers: tuple[TrueWorker, ...]
    sessions_at_once: int = 2
    seconds: float = 1200.0
    n_tokens: int = 400
    n_prompt: int = 800
    spread: float = 0.05
    step: StepCost = STEP_PRIOR


SCENES = (
    Scene(
        "near and slow, far and fast",
        (TrueWorker("near", 0.15, 0.8, 0.0005), TrueWorker("far", 0.01, 0.8, 0.03)),
    ),
    Scene(
        "fast and stupid, slow and clever",
        (TrueWorker("stupid", 0.004, 0.45), TrueWorker("clever", 0.03, 0.85)),
    ),
    Scene(
        "eight mixed",
        tuple(
            TrueWorker(f"w{i}", token_s, acceptance, rtt_s, n_slots=2)
            for i, (token_s, acceptance, rtt_s) in enumerate(
                [
                    *((0.01, 0.85, 0.02), (0.02, 0.9, 0.001), (0.1, 0.8, 0.0005), (0.005, 0.5, 0.001)),
                    *((0.03, 0.75, 0.05), (0.2, 0.9, 0.001), (0.01, 0.6, 0.2), (0.015, 0.8, 0.01)),
                ]
            )
        ),
        sessions_at_once=4,
    ),
    Scene(
        "one degrades",
        (TrueWorker("first", 0.01, 0.85, changes=((400.0, 0.5),)), TrueWorker("second", 0.03, 0.8)),
    ),
    Scene(
        "one degrades and recovers",
        (TrueWorker("first", 0.01, 0.9, changes=((200.0, 0.5), (400.0, 0.01))), TrueWorker("second", 0.08, 0.7)),
        seconds=2400.0,
    ),
    Scene(
        "one flaps",
        (
            TrueWorker("flapping", 0.01, 0.85, absent=tuple((60.0 * i, 60.0 * i + 20) for i in range(1, 20))),
            TrueWorker("steady", 0.03, 0.8),
        ),
    ),
)


@dataclass(slots=True)
class _Session:
    n_prompt: int
    n_tokens: int
    ease: float
    done: float = 0.0
    worker: TrueWorker | None = None
    ready_at: float = 0.0  # when its worker has read the text
    figures: SessionFigures = field(default_factory=SessionFigures)
    commits: float = 0.0
    review_in: float = REVIEW_COMMITS
    n_moves: int = 0

    def acceptance(self, worker: TrueWorker) -> float:
        return min(0.97, max(0.0, worker.acceptance + self.ease))


@dataclass(frozen=True, slots=True)
class Played:
    """tokens_per_s: of all sessions together. moves: of sessions to another worker."""

    tokens_per_s: float
    moves: int


def play(scene: Scene, way: str, seed: int = 1, explore: float = 0.05) -> Played:
    """One run of a scene, decided in one of WAYS."""
    return _Play(scene, way, seed, explore).run()


class _Play:
    """One run. The sessions' lengths and texts come from the seed alone, so that all ways play the same."""

    def __init__(self, scene: Scene, way: str, seed: int, explore: float) -> None:
        self.scene = scene
        self.way = way
        self.now = 0.0
        self.texts = random.Random(seed)
        self.chance = random.Random(seed + 1)
        self.policy = Policy(explore if way == ROUTER else 0.0, random.Random(seed + 2))
        self.known = {w.name: WorkerFigures("cuda") for w in scene.workers}
        self.sessions: list[_Session] = []
        self.tokens = 0.0
        self.moves = 0
        self.turn = 0
        self.there: set[str] = set()
        self.step = beside(scene.step, scene.sessions_at_once - 1)
        self.plain = 1 / self.step.seconds(1)

    def run(self) -> Played:
        while self.now < self.scene.seconds:
            self._come_and_go()
            while len(self.sessions) < self.scene.sessions_at_once:
                self.sessions.append(self._new_session())
            for session in self.sessions:
                if session.worker is None:
                    self._assign(session)
            for session in self.sessions:
                self._decode(session)
            self.sessions = [s for s in self.sessions if s.done < s.n_tokens]
            self.now += TICK_S
        return Played(self.tokens / self.scene.seconds, self.moves)

    def _new_session(self) -> _Session:
        n_prompt = round(self.scene.n_prompt * self.texts.uniform(0.5, 2))
        n_tokens = round(self.scene.n_tokens * self.texts.uniform(0.5, 2))
        return _Session(n_prompt, n_tokens, self.texts.gauss(0, self.scene.spread))

    def _come_and_go(self) -> None:
        there = {w.name for w in self.scene.workers if w.present(self.now)}
        for session in self.sessions:
            if session.worker is not None and session.worker.name not in there:
                session.worker = None
        if there - self.there:
            for session in self.sessions:
                session.review_in = min(session.review_in, SOON_COMMITS)
        self.there = there
        for worker in self.scene.workers:  # pings
            if worker.name in there:
                self.known[worker.name].rtt_s = worker.rtt_s

    # -- deciding --

    def _load(self, worker: TrueWorker, without: _Session | None = None) -> int:
        return sum(s.worker is worker and s is not without for s in self.sessions)

    def _asked(self, session: _Session) -> Asked:
        return Asked(
            figures=session.figures,
            n_tokens=session.n_prompt + round(session.done),
            tokens_left=max(1, session.n_tokens - round(session.done)),
            ease=session.figures.ease(self.known, self.now),
            step=self.step,
        )

    def _candidates(self, session: _Session) -> list[Candidate]:
        return [
            Candidate(w.name, self.known[w.name], self._load(w, session), w.n_slots)
            for w in self.scene.workers
            if w.name in self.there
        ]

    def _assign(self, session: _Session) -> None:
        free = [w for w in self.scene.workers if w.name in self.there and self._load(w) < w.n_slots]
        if not free:
            return
        trial = False
        if self.way == ROUTER:
            choice = self.policy.first(self._asked(session), self._candidates(session), self.now)
            assert choice is not None
            worker, trial = self._named(choice.instance), choice.trial
        elif self.way == ORACLE:
            worker = max(free, key=lambda w: self._after_move(session, w))
        elif self.way == NEAREST:
            worker = min(free, key=lambda w: w.rtt_s)
        elif self.way == RANDOM:
            worker = self.chance.choice(free)
        else:
            worker, self.turn = free[self.turn % len(free)], self.turn + 1
        self._give(session, worker)
        if trial:
            session.review_in = TRIAL_COMMITS

    def _give(self, session: _Session, worker: TrueWorker) -> None:
        session.worker = worker
        n_tokens = session.n_prompt + round(session.done)
        session.ready_at = self.now + n_tokens / worker.prefill
        session.review_in = min(MOST_REVIEW_COMMITS, REVIEW_COMMITS << min(session.n_moves, 10))

    def _review(self, session: _Session, worker: TrueWorker) -> None:
        session.review_in = min(MOST_REVIEW_COMMITS, REVIEW_COMMITS << min(session.n_moves, 10))
        to: TrueWorker | None = None
        if self.way == ROUTER:
            current = Candidate(worker.name, self.known[worker.name], self._load(worker, session), worker.n_slots)
            choice = self.policy.again(self._asked(session), current, self._candidates(session), self.now)
            to = self._named(choice.instance) if choice is not None else None
        elif self.way == ORACLE:
            others = [
                w for w in self.scene.workers if w.name in self.there and w is not worker and self._load(w) < w.n_slots
            ]
            best = max(others, key=lambda w: self._after_move(session, w), default=None)
            if best is not None and self._after_move(session, best) > self._true_rate(session, worker):
                to = best
        if to is not None:
            session.n_moves += 1
            self.moves += 1
            self._give(session, to)

    def _named(self, name: str) -> TrueWorker:
        return next(w for w in self.scene.workers if w.name == name)

    # -- what is true --

    def _true_rate(self, session: _Session, worker: TrueWorker) -> float:
        token_s = worker.token_s_at(self.now, self._load(worker, session) + 1)
        return expected_rate(self.step, Drafting(token_s, worker.rtt_s, (session.acceptance(worker),)))

    def _after_move(self, session: _Session, worker: TrueWorker) -> float:
        prefill_s = (session.n_prompt + session.done) / worker.prefill
        return after_prefill(self._true_rate(session, worker), self.plain, prefill_s, session.n_tokens - session.done)

    def _decode(self, session: _Session) -> None:
        """A tick of a session, and what the router sees of it."""
        worker = session.worker
        drafting = worker is not None and self.now >= session.ready_at
        rate = self._true_rate(session, worker) if drafting and worker is not None else self.plain
        tokens = min(rate * TICK_S, session.n_tokens - session.done)
        session.done += tokens
        self.tokens += tokens
        if not drafting or worker is None:
            return
        load = self._load(worker)
        commits = TICK_S / self.step.seconds(3)
        figures = self.known[worker.name]
        if session.commits == 0:
            figures.prefilled(session.n_prompt, session.n_prompt / worker.prefill, self.now)
        session.commits += commits
        n_drafted = min(32, max(1, round(TICK_S / worker.token_s_at(self.now, load))))
        token_s = worker.token_s_at(self.now, load) * self.chance.uniform(0.8, 1.2)
        figures.drafted(n_drafted, n_drafted * token_s, load, self.now)
        figures.arrived(n_drafted, n_drafted * token_s, load, self.now)
        trials = max(1, round(tokens))
        hits = sum(self.chance.random() < session.acceptance(worker) for _ in range(trials))
        figures.judged(hits, trials, self.now)
        session.figures.judged(worker.name, hits, trials, self.now)
        session.review_in -= commits
        if session.review_in <= 0:
            self._review(session, worker)


def compare(scene: Scene, seeds: Sequence[int] = (1, 2, 3), ways: Sequence[str] = WAYS) -> dict[str, Played]:
    """Each way's mean of several runs."""
    return {way: _mean([play(scene, way, seed) for seed in seeds]) for way in ways}


def _mean(runs: Sequence[Played]) -> Played:
    return Played(sum(r.tokens_per_s for r in runs) / len(runs), round(sum(r.moves for r in runs) / len(runs)))


def routing_table(results: dict[str, dict[str, Played]]) -> Table:
    """A row for each scene: tokens/s of the oracle, and of each way as a share of that."""
    table = Table(caption="tokens/s with an oracle that knows the true figures, and what others reach of that")
    table.add_column("workers")
    for way in WAYS:
        table.add_column(way, justify="right", no_wrap=True)
    for name, played in results.items():
        most = played[ORACLE].tokens_per_s
        shares = [f"{100 * played[way].tokens_per_s / most:.1f} %" for way in WAYS if way != ORACLE]
        table.add_row(name, f"{most:.2f}", *shares)
    return table


def bench_routing(
    scenes: Sequence[Scene] = SCENES, seeds: Sequence[int] = (1, 2, 3), seconds: float | None = None
) -> dict[str, dict[str, Played]]:
    """All scenes in all ways, by their names. seconds: of simulated time, instead of the scenes' own."""
    return {s.name: compare(s if seconds is None else replace(s, seconds=seconds), seeds) for s in scenes}
