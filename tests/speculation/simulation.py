"""Speculative decoding played out event by event: the independent truth that `shared/speculation/cost.py` must meet.

A target, a draft worker and two directions of a network, each event with its own time on one heap. Knows no formula:
whether a drafted token agrees with the target is a random number of its own, held against the acceptance at the depth
at which the target meets it.
"""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Measured(NamedTuple):
    """Tokens/s, and the standard error of it from independent runs."""

    rate: float
    error: float


@dataclass
class Machines:
    """chance: by depth, from 1 on, the probability that a proposal is accepted if those before it were; the last one
    goes for all that are deeper."""

    step_s: Callable[[int], float]
    draft_s: float
    rtt_s: float
    chance: Sequence[float]

    def chance_at(self, depth: int) -> float:
        return self.chance[min(depth, len(self.chance)) - 1]


@dataclass
class Draft:
    """The worker: `run` numbers its restarts, `luck` has a number for each position that this run has drafted."""

    run: int = 0
    position: int = 0
    luck: dict[int, float] = field(default_factory=dict)


def simulate(machines: Machines, n: int, wait_for: int, *, steps: int, runs: int, seed: int) -> Measured:
    """Overlapped: several runs of so many target steps each, from a cold start."""
    rates = [_overlapped(machines, n, wait_for, steps, random.Random(seed + i)) for i in range(runs)]
    return Measured(statistics.fmean(rates), statistics.stdev(rates) / runs**0.5)


def _overlapped(machines: Machines, n: int, wait_for: int, steps: int, rng: random.Random) -> float:
    events: list[tuple[float, int, Callable[[], None]]] = []
    order = itertools.count()
    now = 0.0

    def after(seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(events, (now + seconds, next(order), action))

    draft = Draft()
    committed = 0
    needed: dict[int, float] = {}  # for each committed position, what luck a draft's token must be below to be equal
    inbox: dict[int, float] = {}  # at the target: the luck of the newest run's proposals, by position
    newest = 0
    idle, done = True, 0

    def draft_next(run: int) -> None:
        if run == draft.run:
            luck = rng.random()
            position = draft.position
            draft.luck[position] = luck
            draft.position += 1
            after(machines.rtt_s / 2, lambda: arrive(run, position, luck))
            after(machines.draft_s, lambda: draft_next(run))

    def arrive(run: int, position: int, luck: float) -> None:
        nonlocal newest
        if run > newest:
            newest = run
            inbox.clear()
        inbox[position] = luck
        begin_step()

    def hear(start: int, end: int) -> None:
        """The draft worker hears of a commit."""
        agrees = all(p in draft.luck and draft.luck[p] < needed[p] for p in range(start, end))
        if not agrees:
            draft.run += 1
            draft.position = end
            draft.luck = {}
            run = draft.run
            after(machines.draft_s, lambda: draft_next(run))

    def begin_step() -> None:
        nonlocal idle
        if not idle:
            return
        proposals: list[float] = []
        # The prefix hash: every token of the run that has been committed since must be the committed one.
        if all(luck < needed[p] for p, luck in inbox.items() if p < committed):
            while len(proposals) < n and (luck := inbox.get(committed + len(proposals))) is not None:
                proposals.append(luck)
        if len(proposals) >= wait_for:
            idle = False
            after(machines.step_s(len(proposals) + 1), lambda: end_step(proposals))

    def end_step(proposals: list[float]) -> None:
        nonlocal committed, idle, done
        accepted = 0
        while accepted < len(proposals) and proposals[accepted] < machines.chance_at(accepted + 1):
            accepted += 1
        start, end = committed, committed + accepted + 1
        for position in range(start, end):
            needed[position] = machines.chance_at(position - start + 1)
        committed = end
        done += 1
        idle = True
        after(machines.rtt_s / 2, lambda: hear(start, end))
        begin_step()

    after(machines.draft_s, lambda: draft_next(0))
    begin_step()
    while done < steps:
        now, _, action = heapq.heappop(events)
        action()
    return committed / now


def simulate_sequential(machines: Machines, n: int, *, rounds: int, runs: int, seed: int) -> Measured:
    """Target and draft in turn."""
    rates = []
    for i in range(runs):
        rng = random.Random(seed + i)
        now, committed = 0.0, 0
        for _ in range(rounds):
            for _ in range(n):
                now += machines.draft_s
            now += machines.rtt_s / 2  # proposals travel
            now += machines.step_s(n + 1)
            now += machines.rtt_s / 2  # the verdict travels
            accepted = 0
            while accepted < n and rng.random() < machines.chance_at(accepted + 1):
                accepted += 1
            committed += accepted + 1
        rates.append(committed / now)
    return Measured(statistics.fmean(rates), statistics.stdev(rates) / runs**0.5)
