"""What requests add up to, against the same computed apart."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from datetime import datetime, timedelta, timezone
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from zoneinfo import ZoneInfo

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tools.journal import NO_MODEL, Done, Label
from tools.journal_statistics import Summary, collect, parts, summaries, usual_unit

TARGET, OTHER = Label("big.gguf", "IQ4_KSS", "ik"), Label("other.gguf", "Q8_0", "cuda")
SMALL, NGRAM = Label("small.gguf", "Q4_K_M", "cuda"), Label("", "", "ngram")


def done(
    proposed: int = 10,
    accepted: int = 8,
    speed: float = 7.0,
    tokens: int = 100,
    *,
    target: Label = TARGET,
    draft: Label = SMALL,
    status: int = 200,
    time: float = 0.0,
    worker: str = "gpu",
    by_depth: tuple[tuple[int, int], ...] = (),
) -> Done:
    decode_ms = round(1000 * tokens / speed, 3) if speed else 0.0
    return Done(time, target, draft, worker, status, proposed, accepted, 50, tokens, decode_ms, speed, by_depth)


def only(requests: list[Done]) -> Summary:
    [found] = summaries(collect(requests))
    return found


counts = st.tuples(st.integers(0, 400), st.integers(0, 400)).map(sorted)
speeds = st.integers(0, 300_000_000).map(lambda micro: micro / 1e6)


@given(st.lists(st.tuples(counts, speeds), min_size=1, max_size=60))
def test_statistics_are_those_of_the_standard_library(rows: list[tuple[list[int], float]]) -> None:
    """Mean, median, std, least and most of acceptance and of tokens/s; mode as it is defined, by exact numbers."""
    found = only([done(proposed, accepted, speed) for (accepted, proposed), speed in rows])
    shares = [Fraction(accepted, proposed) for (accepted, proposed), _ in rows if proposed]
    exact = [Decimal(repr(speed)) for _, speed in rows if speed]
    for spread, values, rounded in (
        (found.acceptance, [float(s) for s in shares], [_half_up(s * 100) / 100 for s in shares]),
        (found.speed, [float(s) for s in exact], [float(s.quantize(Decimal("0.1"), ROUND_HALF_UP)) for s in exact]),
    ):
        if not values:
            assert spread is None
            continue
        assert spread is not None
        assert spread.n == len(values)
        assert spread.mean == pytest.approx(statistics.fmean(values))
        assert spread.median == pytest.approx(statistics.median(values))
        assert (spread.min, spread.max) == (min(values), max(values))
        if len(values) > 1:
            assert spread.std == pytest.approx(statistics.stdev(values), abs=1e-9)
        else:
            assert spread.std is None
        often = Counter(rounded)
        assert spread.mode == pytest.approx(min(value for value in often if often[value] == max(often.values())))
    assert found.proposed == sum(proposed for (_, proposed), _ in rows)
    assert found.tokens == 100 * len(rows)


def _half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def test_overall_weighs_by_tokens() -> None:
    """All accepted over all proposed, all tokens over all time."""
    found = only([done(10, 10, 10.0, 10), done(90, 0, 1.0, 90)])
    assert found.acceptance_overall == 0.1
    assert found.acceptance is not None
    assert found.acceptance.mean == 0.5
    assert found.speed_overall == pytest.approx(100 / 91)


def test_what_has_no_figure_is_in_no_mean() -> None:
    """A request without proposals has no acceptance, one that failed no speed; both are requests."""
    found = only([done(), done(0, 0, 5.0), done(0, 0, 0.0, 0, status=502), done(4, 2, 3.0, status=499)])
    assert (found.n, found.n_failed, found.n_cancelled) == (4, 1, 1)
    assert found.acceptance is not None
    assert found.speed is not None
    assert (found.acceptance.n, found.speed.n) == (2, 3)


def test_requests_are_grouped_by_configuration() -> None:
    """By model, quant and engine of both; plain decoding first, then what was used most."""
    requants = Label("small.gguf", "IQ1_KT", "cuda")
    found = summaries(
        collect(
            [
                done(),
                done(draft=NGRAM),
                done(draft=requants),
                done(draft=requants),
                done(0, 0, draft=NO_MODEL, worker=""),
                done(target=OTHER),
            ]
        )
    )
    assert [(s.target, s.draft, s.n) for s in found] == [
        (TARGET, NO_MODEL, 1),
        (TARGET, requants, 2),
        (TARGET, NGRAM, 1),
        (TARGET, SMALL, 1),
        (OTHER, SMALL, 1),
    ]


def test_requests_that_reached_no_target_are_apart() -> None:
    """Refused or lost ones are in no configuration; those of earlier versions, which do not say it, are in one."""
    refused = done(0, 0, 0.0, 0, target=NO_MODEL, draft=NO_MODEL, status=429, worker="")
    old = done(target=NO_MODEL)
    requests = collect([refused, old, done()])
    assert len(requests) == 3
    assert len(requests.lost) == 1
    assert [s.target for s in summaries(requests)] == [NO_MODEL, TARGET]


def test_depths_add_up() -> None:
    """Proposed and accepted at each depth, over requests that reached different ones."""
    found = only([done(by_depth=((5, 4), (4, 3))), done(by_depth=((7, 7), (7, 1), (1, 0)))])
    assert found.by_depth == ((12, 11), (11, 4), (1, 0))
    assert found.prompt_tokens == 100


def test_the_gain_is_the_ratio_of_means() -> None:
    """Over the same target's plain requests, with what the same tokens would have taken plainly."""
    plain = [done(0, 0, speed, 60, draft=NO_MODEL, worker="") for speed in (6.0, 6.5)]
    found = summaries(collect([*plain, done(speed=7.0), done(speed=8.0), done(target=OTHER)]))
    gain = found[1].gain
    assert gain is not None
    assert gain.n_plain == 2
    assert gain.ratio == pytest.approx(7.5 / 6.25)
    assert gain.plain_decode_s == pytest.approx(200 * (60 / 6 + 60 / 6.5) / 120, rel=1e-6)
    assert found[0].gain is None
    assert found[2].gain is None  # there is nothing to compare with


def test_the_interval_of_the_gain_holds_the_truth_as_often_as_it_says() -> None:
    """In 95 of 100 samples of two distributions with known means; the ratio is not far off in any."""
    chance = scipy.stats.norm(0, 1)
    noise = iter(chance.rvs(400 * 60, random_state=7).tolist())
    n_held = 0
    for _ in range(400):
        plain = [done(0, 0, 6.0 + 0.5 * next(noise), draft=NO_MODEL, worker="") for _ in range(30)]
        fast = [done(speed=7.5 + next(noise)) for _ in range(30)]
        gain = summaries(collect([*plain, *fast]))[1].gain
        assert gain is not None
        assert gain.low is not None
        assert gain.high is not None
        n_held += gain.low <= 7.5 / 6.0 <= gain.high
    assert 0.91 < n_held / 400 < 0.985


def test_single_requests_have_a_gain_without_interval() -> None:
    gain = summaries(collect([done(0, 0, 5.0, draft=NO_MODEL, worker=""), done(speed=6.0)]))[1].gain
    assert gain is not None
    assert (gain.ratio, gain.low, gain.high) == (pytest.approx(1.2), None, None)


times = st.floats(1.7e9, 1.7e9 + 40 * 86400) | st.just(math.nan)


@pytest.mark.parametrize("zone", [timezone.utc, ZoneInfo("Asia/Kathmandu"), ZoneInfo("Europe/Berlin")], ids=str)
@given(rows=st.lists(st.tuples(times, st.booleans()), max_size=40))
def test_every_request_with_a_time_is_in_its_hour_and_day(
    zone: timezone | ZoneInfo, rows: list[tuple[float, bool]]
) -> None:
    """Of the local clock, whatever its offset; each configuration apart; the figures are those of these requests."""
    found = [
        done(10, i % 11, 1.0 + i, time=time, draft=SMALL if drafted else NGRAM)
        for i, (time, drafted) in enumerate(rows)
    ]
    requests = collect(found)
    for by, pattern in (("hour", "%Y-%m-%d %H:00"), ("day", "%Y-%m-%d")):
        expected: dict[tuple[str, Label], list[Done]] = defaultdict(list)
        for request in found:
            if not math.isnan(request.time):
                expected[f"{datetime.fromtimestamp(request.time, zone):{pattern}}", request.draft].append(request)
        got = parts(requests, by, zone)  # type: ignore[arg-type]
        assert [part.name for part in got] == sorted(name for name, _ in expected)
        for part in got:
            members = expected.pop((part.name, part.summary.draft))
            assert part.summary.n == len(members)
            assert part.summary.accepted == sum(m.accepted for m in members)
            assert part.summary.speed is not None
            assert part.summary.speed.mean == pytest.approx(statistics.fmean(m.speed for m in members))
        assert not expected


def test_parts_by_worker() -> None:
    found = parts(collect([done(worker="b"), done(worker="a"), done(worker="b", speed=9.0)]), "worker", None)
    assert [(part.name, part.summary.n) for part in found] == [("a", 1), ("b", 2)]


def test_days_are_shown_for_long_periods() -> None:
    two = timedelta(days=2).total_seconds()
    assert usual_unit(collect([done(time=0), done(time=two)])) == "hour"
    assert usual_unit(collect([done(time=0), done(time=two + 1)])) == "day"
    assert usual_unit(collect([done(time=math.nan)])) == "hour"
