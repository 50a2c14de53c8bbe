"""The router's choices played out against an oracle that knows what it has to find out."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from tools.routing_simulation import (
    IN_TURN,
    NEAREST,
    ORACLE,
    RANDOM,
    ROUTER,
    SCENES,
    WAYS,
    Played,
    Scene,
    TrueWorker,
    compare,
    play,
    routing_table,
)

BY_NAME = {scene.name: scene for scene in SCENES}


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_the_router_comes_close_to_an_oracle(scene: Scene) -> None:
    """With figures that it has to learn, the router loses at most 5 % of the tokens/s."""
    played = compare(scene, ways=(ORACLE, ROUTER))
    assert played[ROUTER].tokens_per_s > 0.95 * played[ORACLE].tokens_per_s


@pytest.mark.parametrize("name", ["near and slow, far and fast", "fast and stupid, slow and clever", "eight mixed"])
def test_it_is_better_than_not_to_look(name: str) -> None:
    """Where workers differ, neither the nearest nor a random one nor each in turn comes near it."""
    played = compare(BY_NAME[name], seeds=(4,))
    blind = max(played[way].tokens_per_s for way in (NEAREST, RANDOM, IN_TURN))
    assert played[ROUTER].tokens_per_s > 1.03 * blind


def test_a_worker_that_degrades_is_left_and_one_that_recovers_is_found_again() -> None:
    """The sessions move away within a tenth of the time, and the recovered worker does most of the work in the end."""
    scene = BY_NAME["one degrades"]
    healthy = replace(scene, workers=(replace(scene.workers[0], changes=()), scene.workers[1]))
    without = replace(scene, workers=scene.workers[1:])
    degraded, best, least = (play(s, ROUTER, 5) for s in (scene, healthy, without))
    assert degraded.moves >= 2
    assert degraded.tokens_per_s > 0.97 * (best.tokens_per_s * 400 + least.tokens_per_s * 800) / 1200


def test_equal_workers_are_not_moved_between() -> None:
    """Noise in the figures is no reason to move: hardly any session changes its worker."""
    twins = tuple(TrueWorker(name, 0.02, 0.8) for name in ("a", "b"))
    played = play(Scene("twins", twins, sessions_at_once=2, seconds=1200), ROUTER)
    n_sessions = played.tokens_per_s * 1200 / 500
    assert played.moves < 0.1 * n_sessions


def test_without_workers_all_ways_are_plain() -> None:
    nobody = Scene("nobody", (TrueWorker("away", 0.01, 0.9, absent=((0.0, 1e9),)),), seconds=100)
    played = compare(nobody, seeds=(1,))
    assert len({p.tokens_per_s for p in played.values()}) == 1
    assert played[ORACLE].tokens_per_s > 0


def test_the_table_has_a_row_for_each_scene() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(routing_table({"pair": {way: Played(2.0 if way == ORACLE else 1.0, 3) for way in WAYS}}))
    assert isinstance(console.file, io.StringIO)
    row = next(line for line in console.file.getvalue().splitlines() if "pair" in line)
    assert row.count("50.0 %") == len(WAYS) - 1
    assert "2.00" in row
