"""`draftwire bench loopback`: what one speculative round costs outside the engines.

A fleet with engines that take no time generates; every process records when what happened, on the machine's one
clock. A *round* is one verification step; its critical path is the exchange with the sampler and the verifier's own
work, since the next step may start as soon as the verdict is there. The way from a commit through router and draft
worker to the next proposal runs beside the next step; it is the *turnaround* and bounds how soon a draft can react.
"""

from __future__ import annotations

import bisect
import itertools
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from shared import trace
from shared.trace import Mark
from tools.fleet import Gateway, find_gateway
from tools.temporary import temporary_fleet


@dataclass(frozen=True, slots=True)
class Hop:
    """One leg of a path: microseconds, one for each time it was travelled."""

    name: str
    times_us: npt.NDArray[np.float64]

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.times_us, q)) if len(self.times_us) else float("nan")


@dataclass(frozen=True, slots=True)
class LoopbackBench:
    """rounds: legs of the critical path, then their sum. turnaround: legs from a commit to the next proposal, then
    their sum. n_rounds: steps measured. accepted: mean proposals accepted a round.
    """

    rounds: tuple[Hop, ...]
    turnaround: tuple[Hop, ...]
    n_rounds: int
    accepted: float


_ROUND = (
    ("plan: take messages, choose rows", "verifier.ask end", "verifier.forward begin"),
    ("engine (takes no time)", "verifier.forward begin", "verifier.forward end"),
    ("top-K, message", "verifier.forward end", "verifier.ask begin"),
    ("encode, send", "verifier.ask begin", "verifier.asked end"),
    ("verifier -> sampler", "verifier.asked end", "sampler.decide begin"),
    ("sampler: decode, decide", "sampler.decide begin", "sampler.decide end"),
    ("sampler -> verifier", "sampler.decide end", "verifier.ask end"),
)
_TURNAROUND = (
    ("engine thread -> event loop", "verifier.ask end", "verifier.commit begin"),
    ("verifier -> router", "verifier.commit begin", "router.commit begin"),
    ("router -> draft", "router.commit begin", "draft.commit begin"),
    ("draft: wake, draft a token", "draft.commit begin", "draft.draft end"),
    ("draft -> router", "draft.draft end", "router.proposal begin"),
    ("router -> verifier", "router.proposal begin", "verifier.proposal begin"),
)


@dataclass(frozen=True, slots=True)
class Edge:
    """A mark's begin or end. name: the mark's, then "begin" or "end"."""

    time_ns: int
    name: str
    session: int
    position: int


def _edges(marks: Iterable[Mark]) -> list[Edge]:
    """Of all marks, in the order of time."""
    edges = [
        Edge(time_ns, f"{mark.name} {which}", mark.session, mark.position)
        for mark in marks
        for time_ns, which in ((mark.begin_ns, "begin"), (mark.end_ns, "end"))
    ]
    return sorted(edges, key=lambda edge: edge.time_ns)


def bench_loopback(
    *,
    prompts: int = 8,
    tokens: int = 400,
    temperature: float = 0.0,
    config: Path | None = None,
    overrides: Sequence[str] = (),
) -> LoopbackBench:
    """Run the fleet and measure.

    Args:
        prompts: generations, one after the other. tokens: of each. temperature: above 0, each row's leading logits
            travel and are filtered, and noise is drawn; at 0 only the largest travels.
    """
    with tempfile.TemporaryDirectory(prefix="draftwire-trace-") as directory:
        changes = [
            'verifier.engine.engine="null"',
            'draft.model.engine.engine="null"',
            *overrides,
            f'trace_dir="{directory}"',
        ]
        accepted: list[float] = []
        with temporary_fleet(config, changes) as settings:
            gateway = Gateway(find_gateway(settings), 60)
            for seed in range(prompts):
                body = {"prompt": "abc", "n_predict": tokens, "temperature": temperature, "seed": seed, "stream": True}
                for event in gateway.stream("/completion", body):
                    if event["stop"]:
                        accepted.append(event["draftwire"]["mean_acceptance_length"] - 1)
        edges = _edges(trace.read(Path(directory)))
    rounds, n_rounds = _rounds(edges)
    return LoopbackBench(rounds, _turnaround(edges), n_rounds, float(np.mean(accepted)))


def print_loopback(bench: LoopbackBench, console: Console) -> None:
    """The table, hop by hop."""
    table = Table(title=f"One speculative round outside the engines, microseconds; {bench.n_rounds} rounds")
    for column in ("leg", "p50", "p99"):
        table.add_column(column, justify="left" if column == "leg" else "right")
    for title, hops in (("critical path", bench.rounds), ("turnaround, beside the next step", bench.turnaround)):
        table.add_section()
        table.add_row(title, "", "")
        for hop in hops:
            table.add_row(f"  {hop.name}", f"{hop.percentile(50):.0f}", f"{hop.percentile(99):.0f}")
    console.print(table)
    console.print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {bench.accepted:.2f} proposals accepted a round."
    )


def _rounds(edges: Sequence[Edge]) -> tuple[tuple[Hop, ...], int]:
    """Legs of every whole cycle verdict -> verdict."""
    order = [start for _, start, _ in _ROUND] + ["verifier.ask end"]
    legs: list[list[float]] = [[] for _ in _ROUND]
    totals: list[float] = []
    times: list[int] = []
    for edge in edges:
        if times and edge.name == order[len(times)]:
            times.append(edge.time_ns)
            if len(times) == len(order):
                for leg, (start, end) in zip(legs, itertools.pairwise(times), strict=True):
                    leg.append((end - start) / 1e3)
                totals.append((times[-1] - times[0]) / 1e3)
                times = [edge.time_ns]
        elif edge.name == "verifier.ask end":
            times = [edge.time_ns]  # a session's first verdict: its prefill is no round
        elif edge.name == "verifier.forward end" and times and len(times) < 2:
            times = []
    hops = [Hop(name, np.array(leg)) for (name, _, _), leg in zip(_ROUND, legs, strict=True)]
    return (*hops, Hop("round", np.array(totals))), len(totals)


def _turnaround(edges: Sequence[Edge]) -> tuple[Hop, ...]:
    """Legs from each verdict's commit to the first proposal after it."""
    by_name: dict[str, list[int]] = defaultdict(list)
    for edge in edges:
        by_name[edge.name].append(edge.time_ns)
    commits = {(e.session, e.position): e.time_ns for e in edges if e.name == "router.commit begin"}
    arrived = {(e.session, e.position): e.time_ns for e in edges if e.name == "draft.commit begin"}
    legs: list[list[float]] = [[] for _ in _TURNAROUND]
    totals: list[float] = []
    for committing in (e for e in edges if e.name == "verifier.commit begin"):
        key = (committing.session, committing.position)
        if key not in commits or key not in arrived:
            continue
        times = [
            _last(by_name["verifier.ask end"], committing.time_ns),
            committing.time_ns,
            commits[key],
            arrived[key],
        ]
        for name in ("draft.draft end", "router.proposal begin", "verifier.proposal begin"):
            times.append(_next(by_name[name], times[-1]))
        if None in times:
            continue
        whole = [time for time in times if time is not None]
        for leg, (start, end) in zip(legs, itertools.pairwise(whole), strict=True):
            leg.append((end - start) / 1e3)
        totals.append((whole[-1] - whole[0]) / 1e3)
    hops = [Hop(name, np.array(leg)) for (name, _, _), leg in zip(_TURNAROUND, legs, strict=True)]
    return (*hops, Hop("turnaround", np.array(totals)))


def _last(times: Sequence[int], at: int) -> int | None:
    index = bisect.bisect_right(times, at)
    return times[index - 1] if index else None


def _next(times: Sequence[int], at: int | None) -> int | None:
    if at is None:
        return None
    index = bisect.bisect_left(times, at)
    return times[index] if index < len(times) else None
