"""What the gateway counts, and all that `/metrics` says, in Prometheus' text format.

The llamacpp: names are llama-server's and mean the same; what is ours is called draftwire:. Pure. Invariant: how many
time series there are is bounded, whatever workers call themselves and clients send.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, get_args

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.histograms import Times, cumulative
from shared.messages import (
    MAX_RUN,
    PROTOCOL_VERSION,
    DraftStats,
    Histogram,
    Status,
    TargetStats,
    WorkerState,
    WorkerStatus,
)

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

MOST_WORKERS: Final = 64
"""Draft workers with series of their own; those that are there come first."""

_MOST_STATUSES = 64
_STAGES: Final = ("queue", "draft_prefill", "draft_decode", "target_prefill", "verify", "sample", "wire", "wait")


@dataclass(slots=True)
class Counters:
    """What completion requests have added up to since the gateway's start. Times are microseconds.

    n_drafts: steps that verified proposals. by_position: accepted proposals, by how many were before them.
    """

    by_status: Counter[int] = field(default_factory=Counter)
    seconds: Times = field(default_factory=Times)
    n_prompt: int = 0
    n_cached: int = 0
    prompt_us: int = 0
    n_predicted: int = 0
    predicted_us: int = 0
    n_rounds: int = 0
    n_drafts: int = 0
    n_proposed: int = 0
    n_accepted: int = 0
    by_position: list[int] = field(default_factory=list)
    worker_changes: int = 0
    stages_us: Counter[str] = field(default_factory=Counter)

    def add(self, status: int, seconds: float, target: TargetStats, draft: DraftStats) -> None:
        """A request has ended, with these figures (those of its `timings`)."""
        self.by_status[status if status in self.by_status or len(self.by_status) < _MOST_STATUSES else 0] += 1
        self.seconds.observe(seconds)
        self.n_prompt += max(0, target.n_prompt - target.n_cached)
        self.n_cached += target.n_cached
        self.prompt_us += target.prefill_us
        self.n_predicted += target.n_generated
        self.predicted_us += target.decode_us
        self.n_rounds += target.rounds
        self.n_drafts += target.by_depth[0][0] if target.by_depth else 0
        self.n_proposed += target.n_proposed
        self.n_accepted += target.n_accepted
        for position, (_, accepted) in enumerate(target.by_depth[:MAX_RUN]):
            if position == len(self.by_position):
                self.by_position.append(0)
            self.by_position[position] += accepted
        self.worker_changes += draft.worker_changes
        times = (
            *(target.queue_us, draft.prefill_us, draft.decode_us, target.prefill_us),
            *(target.verify_us, target.sample_us, target.wire_us, target.wait_us),
        )
        self.stages_us.update(dict(zip(_STAGES, times, strict=True)))


@dataclass(frozen=True, slots=True)
class Present:
    """How things stand at this moment. n_requests: at this gateway. router: its status, None while it is silent."""

    version: str
    uptime_s: int
    n_requests: int
    tokenizer: bool
    router: Status | None


def render(counters: Counters, present: Present) -> bytes:
    """The body of `/metrics`."""
    return generate_latest(_Collected((*_counted(counters), *_standing(present), *_fleet(present.router))))


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counted(c: Counters) -> Iterator[Metric]:
    """What this gateway's requests have added up to."""
    prompt_s, predicted_s = c.prompt_us / 1e6, c.predicted_us / 1e6
    yield _counter("llamacpp:prompt_tokens", "Prompt tokens processed, without those found in the cache.", c.n_prompt)
    yield _counter("llamacpp:prompt_seconds", "Time spent on prompts.", prompt_s)
    yield _counter("llamacpp:tokens_predicted", "Tokens generated.", c.n_predicted)
    yield _counter("llamacpp:tokens_predicted_seconds", "Time spent on generating.", predicted_s)
    yield _gauge(
        "llamacpp:prompt_tokens_seconds",
        "Average prompt throughput in tokens/s, since the start.",
        c.n_prompt / prompt_s if prompt_s else 0.0,
    )
    yield _gauge(
        "llamacpp:predicted_tokens_seconds",
        "Average generation throughput in tokens/s, since the start.",
        c.n_predicted / predicted_s if predicted_s else 0.0,
    )
    yield _counter("llamacpp:spec_decode_num_drafts", "Steps of a generation that verified proposals.", c.n_drafts)
    yield _counter("llamacpp:spec_decode_num_draft_tokens", "Proposals verified.", c.n_proposed)
    yield _counter("llamacpp:spec_decode_num_accepted_tokens", "Proposals accepted.", c.n_accepted)
    positions = CounterMetricFamily(
        "llamacpp:spec_decode_num_accepted_tokens_per_pos",
        "Proposals accepted, by their position in a step, the first being 0.",
        labels=["position"],
    )
    for position, accepted in enumerate(c.by_position):
        positions.add_metric([str(position)], accepted)
    yield positions

    requests = CounterMetricFamily(
        "draftwire:requests", "Completion requests that have ended, by HTTP status.", labels=["status"]
    )
    for status, n in sorted(c.by_status.items()):
        requests.add_metric([str(status)], n)
    yield requests
    seconds = HistogramMetricFamily("draftwire:request_seconds", "From a completion request's arrival to its end.")
    _add(seconds, [], c.seconds.message())
    yield seconds
    yield _counter("draftwire:rounds", "Steps of a generation after its prompt.", c.n_rounds)
    yield _counter("draftwire:prompt_tokens_cached", "Prompt tokens found in the cache.", c.n_cached)
    yield _counter("draftwire:worker_changes", "Times that a generation changed its draft worker.", c.worker_changes)
    stages = CounterMetricFamily(
        "draftwire:stage_seconds", "Time of generations by stage, as in request_done.", labels=["stage"]
    )
    for stage in _STAGES:
        stages.add_metric([stage], c.stages_us[stage] / 1e6)
    yield stages


def _standing(present: Present) -> Iterator[Metric]:
    """What is there, and what it is."""
    build = GaugeMetricFamily("draftwire:build_info", "Always 1.", labels=["version", "protocol"])
    build.add_metric([present.version, str(PROTOCOL_VERSION)], 1)
    yield build
    yield _gauge("draftwire:uptime_seconds", "Of the gateway.", present.uptime_s)
    yield _gauge("draftwire:requests_in_progress", "Completion requests at this gateway.", present.n_requests)
    up = GaugeMetricFamily("draftwire:up", "How many of a part are there and answer.", labels=["part"])
    peers = present.router.peers if present.router is not None else ()
    up.add_metric(["tokenizer"], int(present.tokenizer))
    up.add_metric(["router"], int(present.router is not None))
    up.add_metric(["verifier"], sum(p.role == "verifier" and p.alive for p in peers))
    up.add_metric(["draft"], sum(p.role == "draft" and p.alive for p in peers))
    yield up


def _fleet(status: Status | None) -> Iterator[Metric]:
    """What the router says; while it is silent, what would have to be guessed is left out."""
    if status is None:
        return
    verifiers = [peer for peer in status.peers if peer.role == "verifier"]
    n_steps = sum(peer.n_steps for peer in verifiers)
    yield _gauge(
        "llamacpp:requests_processing",
        "Generations that have a slot of a verifier.",
        sum(min(peer.n_sessions, peer.n_slots) for peer in verifiers),
    )
    yield _gauge(
        "llamacpp:requests_deferred",
        "Generations that wait for a slot.",
        sum(max(0, peer.n_sessions - peer.n_slots) for peer in verifiers),
    )
    yield _counter("llamacpp:n_decode", "Passes of the targets, prefill included.", n_steps)
    yield _gauge(
        "llamacpp:n_busy_slots_per_decode",
        "Average number of generations in a pass.",
        sum(peer.n_step_sessions for peer in verifiers) / n_steps if n_steps else 0.0,
    )
    yield _counter("draftwire:drafted_tokens", "Tokens that draft workers proposed.", status.totals.n_drafted)
    yield _counter("draftwire:generations_failed", "Generations that ended with an error.", status.totals.n_failed)
    yield from _of_workers(sorted(status.workers, key=lambda worker: (not worker.there, worker.instance)))


def _of_workers(workers: Sequence[WorkerStatus]) -> Iterator[Metric]:
    yield _gauge(
        "draftwire:workers_left_out",
        f"Draft workers without series of their own, which {MOST_WORKERS} have.",
        max(0, len(workers) - MOST_WORKERS),
    )
    workers = workers[:MOST_WORKERS]
    state = GaugeMetricFamily(
        "draftwire:worker_state", "1 for the state that a draft worker is in, else 0.", labels=["worker", "state"]
    )
    for worker in workers:
        for name in get_args(WorkerState):
            state.add_metric([worker.instance, name], int(worker.state == name))
    yield state
    measured = [worker for worker in workers if worker.n_judged]
    values: Mapping[str, float]
    for name, text, values in (
        ("sessions", "Generations that it drafts for.", {w.instance: w.n_sessions for w in workers}),
        ("slots", "Generations that it can draft for.", {w.instance: w.n_slots for w in workers}),
        (
            "acceptance_ratio",
            "Right proposals of those whose predecessors were right.",
            {w.instance: w.acceptance for w in measured},
        ),
        ("speed_up_ratio", "Expected tokens/s relative to plain decoding.", {w.instance: w.speed_up for w in measured}),
    ):
        gauge = GaugeMetricFamily(f"draftwire:worker_{name}", text, labels=["worker"])
        for instance, value in values.items():
            gauge.add_metric([instance], value)
        yield gauge
    demotions = CounterMetricFamily(
        "draftwire:worker_demotions", "Times that it was demoted for misbehaving.", labels=["worker"]
    )
    for worker in workers:
        demotions.add_metric([worker.instance], worker.n_demotions)
    yield demotions
    for name, text, times in (
        ("round_trip", "From router to draft worker and back, by pings.", [w.round_trip for w in workers]),
        ("token", "Time that a draft worker took for a token, as it says itself.", [w.token for w in workers]),
        ("reply", "From a commit that contradicts a draft worker to its next proposal.", [w.reply for w in workers]),
    ):
        histogram = HistogramMetricFamily(f"draftwire:worker_{name}_seconds", text, labels=["worker"])
        for worker, observed in zip(workers, times, strict=True):
            _add(histogram, [worker.instance], observed)
        yield histogram


def _add(family: HistogramMetricFamily, labels: list[str], observed: Histogram) -> None:
    family.add_metric(labels, buckets=cumulative(observed), sum_value=observed.sum_us / 1e6)
