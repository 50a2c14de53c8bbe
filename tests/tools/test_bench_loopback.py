"""`draftwire bench loopback`: legs of real rounds, each as long as the time between its ends."""

from __future__ import annotations

import numpy as np
import pytest

from shared.trace import Mark
from tools.bench_loopback import _edges, _rounds, bench_loopback


def round_marks(at: int) -> list[Mark]:
    """One step: plan 100, engine 200, top-K 300, send 400, there 500, decide 600, back 700 microseconds."""
    us = 1000
    return [
        Mark(at + 100 * us, 200 * us, "verifier.forward", 0, 0),
        Mark(at + 600 * us, 1900 * us + 300 * us, "verifier.ask", 0, 0),
        Mark(at + 1000 * us, 0, "verifier.asked", 0, 0),
        Mark(at + 1500 * us, 600 * us, "sampler.decide", 0, 0),
    ]


def test_legs_are_the_times_between_marks() -> None:
    """From one verdict to the next; the first step, before any verdict, is no round."""
    first, second, third = (round_marks(10_000_000 * i) for i in (1, 2, 3))
    hops, n = _rounds(_edges([*third, *first, *second]))
    assert n == 2
    assert [round(hop.percentile(50)) for hop in hops[1:7]] == [200, 300, 400, 500, 600, 700]
    assert hops[7].times_us.tolist() == [10_000.0, 10_000.0]


@pytest.mark.pipeline
@pytest.mark.timeout(120)
def test_a_real_fleet_is_measured() -> None:
    """Every leg of every path was travelled, and the critical path's legs add up to the round."""
    bench = bench_loopback(prompts=3, tokens=400)
    assert bench.n_rounds > 0
    for hop in (*bench.rounds, *bench.turnaround):
        assert len(hop.times_us) > 0, hop.name
        assert (hop.times_us >= 0).all()
    legs = np.sum([hop.times_us for hop in bench.rounds[:-1]], axis=0)
    np.testing.assert_allclose(legs, bench.rounds[-1].times_us)
