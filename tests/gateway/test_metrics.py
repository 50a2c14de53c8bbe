"""/metrics: read with Prometheus' own parser, against figures that are known."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from services.gateway.metrics import MOST_WORKERS, Counters, Present, render
from services.gateway.timings import timings
from shared.histograms import BOUNDS_S, Times, cumulative
from shared.messages import Histogram, Status, TargetStats, Totals, WorkerStatus
from tests.gateway.fleet import DRAFT, STATS, MakeFleet, answer, refuse, verifier

WORKER = WorkerStatus("a", "cuda", "m", "ok", "", 0, 3, 1, 4, 900, 5000, 800, 0.75, 40, 1.4, there=True)
LLAMA = {
    *("prompt_tokens_total", "prompt_seconds_total", "tokens_predicted_total", "tokens_predicted_seconds_total"),
    *("prompt_tokens_seconds", "predicted_tokens_seconds", "requests_processing", "requests_deferred"),
    *("n_decode_total", "n_busy_slots_per_decode", "spec_decode_num_drafts_total"),
    *("spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total"),
    "spec_decode_num_accepted_tokens_per_pos_total",
}

Series = dict[str, dict[tuple[tuple[str, str], ...], float]]


def parsed(text: str) -> Series:
    """Every sample by its name and labels; no sample comes twice, and every family has a type and a text."""
    series: Series = {}
    for family in text_string_to_metric_families(text):
        assert family.type in ("counter", "gauge", "histogram"), family
        assert family.documentation
        for sample in family.samples:
            key = tuple(sorted(sample.labels.items()))
            assert key not in series.setdefault(sample.name, {}), sample
            series[sample.name][key] = sample.value
    return series


def status(*workers: WorkerStatus) -> Status:
    busy = replace(verifier(), n_sessions=6, n_steps=10, n_step_sessions=25)
    return Status(1, "1", 5, 6, (busy,), workers, (), Totals(n_drafted=77, n_failed=2))


def rendered(counters: Counters, *workers: WorkerStatus) -> Series:
    return parsed(render(counters, Present("1.2", 9, 3, True, status(*workers))).decode())


def test_counters_are_the_sums_of_the_timings() -> None:
    """What llama-server's names say is what the answers' `timings` add up to."""
    other = replace(STATS, n_prompt=7, n_cached=7, by_depth=((2, 1),), n_proposed=2, n_accepted=1)
    counters = Counters()
    for stats in (STATS, other, TargetStats()):
        counters.add(200, 0.5, stats, DRAFT)
    series = rendered(counters)
    answers = [timings(stats) for stats in (STATS, other)]
    for name, field, scale in (
        *(("prompt_tokens_total", "prompt_n", 1), ("prompt_seconds_total", "prompt_ms", 1e-3)),
        *(("tokens_predicted_total", "predicted_n", 1), ("tokens_predicted_seconds_total", "predicted_ms", 1e-3)),
        ("spec_decode_num_draft_tokens_total", "draft_n", 1),
        ("spec_decode_num_accepted_tokens_total", "draft_n_accepted", 1),
    ):
        assert series[f"llamacpp:{name}"][()] == pytest.approx(scale * sum(a[field] for a in answers)), name
    assert series["llamacpp:spec_decode_num_drafts_total"][()] == 5 + 2
    by_position = series["llamacpp:spec_decode_num_accepted_tokens_per_pos_total"]
    assert by_position == {(("position", "0"),): 5, (("position", "1"),): 3}
    assert series["llamacpp:predicted_tokens_seconds"][()] == pytest.approx(24 / 0.48)
    assert series["draftwire:requests_total"] == {(("status", "200"),): 3}
    assert series["draftwire:stage_seconds_total"][(("stage", "verify"),)] == pytest.approx(0.2)


def test_llama_servers_names_are_there() -> None:
    """All of them, from the first scrape on; only positions appear as they are reached."""
    names = {name.removeprefix("llamacpp:") for name in rendered(Counters()) if name.startswith("llamacpp:")}
    assert names == LLAMA - {"spec_decode_num_accepted_tokens_per_pos_total"}


def test_every_name_is_documented() -> None:
    """docs/watching.md has a row for each family, with its type, and none for what is gone."""
    counters = Counters()
    counters.add(200, 1.0, STATS, DRAFT)
    text = render(counters, Present("1", 1, 0, True, status(WORKER))).decode()
    families = {
        f"{f.name}_total" if f.type == "counter" else f.name: f.type for f in text_string_to_metric_families(text)
    }
    page = (Path(__file__).resolve().parents[2] / "docs" / "watching.md").read_text("utf-8")
    documented = {}
    for names, kind in re.findall(r"^\| (`(?:llamacpp|draftwire):[^|]+) \| (\w+) \|", page, re.MULTILINE):
        documented |= dict.fromkeys(re.findall(r"`([^`]+)`", names), kind)
    assert documented == families


def test_what_the_router_knows() -> None:
    """Generations with and without a slot, passes of the target, and how workers fare."""
    round_trip = Times()
    for seconds in (0.0001, 0.003, 0.004, 1000.0):
        round_trip.observe(seconds)
    worker = replace(WORKER, round_trip=round_trip.message())
    series = rendered(Counters(), worker, replace(WORKER, instance="b", state="drained", n_judged=0))
    assert series["llamacpp:requests_processing"][()] == 4
    assert series["llamacpp:requests_deferred"][()] == 2
    assert series["llamacpp:n_decode_total"][()] == 10
    assert series["llamacpp:n_busy_slots_per_decode"][()] == 2.5
    assert series["draftwire:drafted_tokens_total"][()] == 77
    states = series["draftwire:worker_state"]
    assert [labels for labels, value in states.items() if value] == [
        (("state", "ok"), ("worker", "a")),
        (("state", "drained"), ("worker", "b")),
    ]
    buckets = series["draftwire:worker_round_trip_seconds_bucket"]
    of_a = {dict(labels)["le"]: value for labels, value in buckets.items() if ("worker", "a") in labels}
    assert (of_a["0.0001"], of_a["0.002"], of_a["0.005"], of_a["300.0"], of_a["+Inf"]) == (1, 1, 3, 3, 4)
    assert series["draftwire:worker_round_trip_seconds_count"][(("worker", "a"),)] == 4
    assert series["draftwire:worker_round_trip_seconds_sum"][(("worker", "a"),)] == pytest.approx(1000.0071)
    assert series["draftwire:worker_acceptance_ratio"] == {(("worker", "a"),): 0.75}  # b's is an assumption


def test_without_a_router_nothing_is_made_up() -> None:
    """What only the router knows is left out; that it is missing is said."""
    series = parsed(render(Counters(), Present("1", 1, 0, True, None)).decode())
    assert series["draftwire:up"][(("part", "router"),)] == 0
    assert "llamacpp:requests_processing" not in series
    assert not any(name.startswith("draftwire:worker_s") for name in series)


def test_series_are_bounded() -> None:
    """Whatever number of names and statuses there were; workers that are there come first."""
    counters = Counters()
    for code in range(100, 999):
        counters.add(code, 1.0, STATS, DRAFT)
    away = [replace(WORKER, instance=f"a{n}", there=False) for n in range(500)]
    series = rendered(counters, *away, replace(WORKER, instance="z"))
    assert len(series["draftwire:worker_slots"]) == MOST_WORKERS
    assert (("worker", "z"),) in series["draftwire:worker_slots"]
    assert series["draftwire:workers_left_out"][()] == 501 - MOST_WORKERS
    statuses = series["draftwire:requests_total"]
    assert len(statuses) <= 65
    assert sum(statuses.values()) == 899


@given(st.text(max_size=200))
def test_any_name_is_a_label(name: str) -> None:
    """Workers choose their names; the text stays one that Prometheus reads."""
    # What its own parser in Python does not do: carriage returns and the like end a line for it, not for Prometheus.
    printable = "".join(c for c in name if c == "\n" or len(f"a{c}a".splitlines()) == 1)
    series = rendered(Counters(), replace(WORKER, instance=printable))
    assert [dict(labels)["worker"] for labels in series["draftwire:worker_slots"]] == [printable]


# -- histograms --


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 50)), max_size=30))
def test_a_histogram_counts_what_was_observed(observed: list[tuple[float, int]]) -> None:
    """Each bucket holds all that took at most its bound."""
    times = Times()
    for seconds, n in observed:
        times.observe(seconds, n)
    buckets = cumulative(times.message())
    assert [bound for bound, _ in buckets] == [*map(str, BOUNDS_S), "+Inf"]
    for bound, count in buckets:
        assert count == sum(n for seconds, n in observed if seconds <= float(bound))
    assert times.message().sum_us / 1e6 == pytest.approx(sum(s * n for s, n in observed), abs=1e-4)


def test_a_histogram_of_other_bounds_counts_as_empty() -> None:
    assert {count for _, count in cumulative(Histogram((1, 2, 3), 5))} == {0}


def test_absurd_times_fit_into_a_message() -> None:
    """A worker may claim anything."""
    times = Times()
    for _ in range(4):
        times.observe(2**53 / 1e6, 1000)
    assert times.message().sum_us == 2**53


# -- at the gateway --


def test_the_gateway_serves_them(make_fleet: MakeFleet) -> None:
    """As text that Prometheus scrapes; requests that failed are counted by their status."""
    fleet = make_fleet()
    fleet.router.script = answer("hello")
    assert fleet.post("/completion", prompt="x").status_code == 200
    fleet.router.script = refuse("no_verifier", 1)
    assert fleet.post("/completion", prompt="x").status_code == 503
    assert fleet.post("/v1/completions", prompt="x", temperature="hot").status_code == 400
    response = fleet.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    series = parsed(response.text)
    assert series["draftwire:requests_total"] == {
        (("status", "200"),): 1,
        (("status", "400"),): 1,
        (("status", "503"),): 1,
    }
    assert series["llamacpp:tokens_predicted_total"][()] == STATS.n_generated
    assert series["draftwire:up"][(("part", "verifier"),)] == 1
    assert series["draftwire:requests_in_progress"][()] == 0


def test_they_can_be_switched_off(make_fleet: MakeFleet) -> None:
    assert make_fleet("gateway.metrics=false").http.get("/metrics").status_code == 404
