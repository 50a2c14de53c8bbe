"""The emulated engine: another engine's results, a profile's time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog

from shared.engine.emulated import PROFILES, WARN_EVERY_S, EmulatedEngine, emulate, find_pace, pass_seconds
from shared.engine.interface import Chunk, EngineSettings, Int32, Logits, Pace, PrefixCache, Proposed, Proposer
from shared.engine.null import NullEngine, NullLogits
from shared.engine.registry import load_engine
from shared.errors import DraftwireError, EngineError, SettingsError
from shared.sampling.params import SamplingParams
from shared.settings import load_settings

SETTINGS = EngineSettings(engine="null", n_ctx=64, n_slots=3, n_batch=32)
PACE = Pace(first_row_ms=100, further_row_ms=40, prefill_per_second=200)


def tokens(*ids: int) -> Int32:
    return np.array(ids, np.int32)


class Clock:
    """Time that passes only in `sleep`, which may be cut short, and where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.most = float("inf")

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += min(seconds, self.most)


class SlowEngine(NullEngine):
    """Computes for `seconds`, and for `reading` more when its logits are read, as an engine on a device does."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(SETTINGS)
        self.clock = clock
        self.seconds = self.reading = 0.0

    def forward(self, chunks: Sequence[Chunk]) -> NullLogits:
        logits = super().forward(chunks)
        self.clock.now += self.seconds
        read, logits.top = logits.top, lambda k: self._read(read, k)  # type: ignore[method-assign]
        return logits

    def _read(self, read: Callable[[int], Any], k: int) -> Any:
        self.clock.now += self.reading
        self.reading = 0.0
        return read(k)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def slow(clock: Clock) -> SlowEngine:
    return SlowEngine(clock)


@pytest.fixture
def paced(slow: SlowEngine, clock: Clock) -> EmulatedEngine:
    return EmulatedEngine(slow, PACE, clock, clock.sleep)


# -- what a pass costs --


@pytest.mark.parametrize(
    ("n_rows", "n_rowless", "seconds"),
    [
        (1, 0, 0.100),
        (2, 0, 0.140),
        (5, 0, 0.260),
        (1, 50, 0.350),  # the end of a prompt
        (3, 10, 0.230),  # two sessions verify beside a short piece of a prompt
        (0, 50, 0.250),
        (0, 5, 0.100),  # no pass is cheaper than one row's
        (0, 20, 0.100),
        (0, 21, 0.105),
    ],
)
def test_a_pass_costs_its_rows_and_its_prompts(n_rows: int, n_rowless: int, seconds: float) -> None:
    """First row, further rows, and prompts at their own speed; a pass of prompts alone has the first row's as floor."""
    assert pass_seconds(PACE, n_rows, n_rowless) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("name", "n_rows", "target", "draft"),
    [
        ("ling-1t", 1, 160.0, 10.0),
        ("ling-1t", 4, 160.0 * (1 + 0.39 * 3), 25.0),
        ("qwen3-coder-480b", 1, 151.0, 8.0),
        ("qwen3-coder-480b", 8, 151.0 * (1 + 0.39 * 7), 36.0),
    ],
)
def test_profiles_are_what_users_measured(name: str, n_rows: int, target: float, draft: float) -> None:
    """A target's pass of n rows takes 1 + 0.39 (n - 1) times one row's, a draft 10 or 8 ms a token."""
    assert pass_seconds(PROFILES[name].target, n_rows, 0) == pytest.approx(target / 1e3)
    assert pass_seconds(PROFILES[name].draft, n_rows, 0) == pytest.approx(draft / 1e3)


# -- pacing --


def test_rows_and_prompts_of_all_chunks_count(paced: EmulatedEngine, clock: Clock) -> None:
    """A pass lasts what its rows and rowless tokens cost together, whoever's they are, from its call to its end."""
    paced.forward([Chunk(0, 0, tokens(*range(20, 50)), 0), Chunk(1, 0, tokens(1, 2), 2)])
    assert clock.now - 1000 == pytest.approx(0.140 + 0.150)
    paced.forward([Chunk(0, 30, tokens(5), 1), Chunk(1, 1, tokens(7, 8, 9), 3), Chunk(2, 0, tokens(3, 4), 1)])
    assert clock.now - 1000 == pytest.approx(0.290 + 0.100 + 4 * 0.040 + 0.005)
    assert (paced.passes, paced.overruns) == (2, 0)


def test_only_the_rest_is_slept(paced: EmulatedEngine, slow: SlowEngine, clock: Clock) -> None:
    """What the inner engine needs to compute, and to have its rows read, is part of the pass's time."""
    slow.seconds, slow.reading = 0.030, 0.020
    paced.forward([Chunk(0, 0, tokens(1), 1)])
    assert clock.slept == [pytest.approx(0.050)]
    assert clock.now - 1000 == pytest.approx(0.100)


def test_a_sleep_that_ends_early_goes_on(paced: EmulatedEngine, clock: Clock) -> None:
    """A pass never ends before its time."""
    clock.most = 0.030
    paced.forward([Chunk(0, 0, tokens(1), 1)])
    assert len(clock.slept) == 4
    assert clock.now - 1000 >= 0.0999


def test_real_time_passes() -> None:
    """With the real clock too, a pass takes no less than its cost."""
    engine = emulate(NullEngine(SETTINGS), Pace(30, 10, 1000))
    started = time.monotonic()
    engine.forward([Chunk(0, 0, tokens(1, 2), 2)])
    assert time.monotonic() - started >= 0.040


def test_a_refused_pass_takes_no_time(paced: EmulatedEngine, clock: Clock) -> None:
    """What the inner engine refuses is refused at once, and changes nothing."""
    with pytest.raises(EngineError) as caught:
        paced.forward([Chunk(0, 1, tokens(1), 1)])
    assert caught.value.code == "bad_start"
    assert (clock.slept, paced.passes, paced.length(0)) == ([], 0, 0)


# -- overruns --


def test_a_slower_inner_engine_is_counted_and_said_once(paced: EmulatedEngine, slow: SlowEngine, clock: Clock) -> None:
    """Passes that took too long are counted with their excess; a warning says by how much, again only after a while."""
    chunk = Chunk(0, 0, tokens(1), 1)
    with structlog.testing.capture_logs() as logs:
        paced.forward([chunk])
        assert logs == []
        slow.seconds = 0.250
        for _ in range(5):
            paced.forward([chunk])
        assert (paced.passes, paced.overruns) == (6, 5)
        assert paced.overrun_s == pytest.approx(5 * 0.150)
        [log] = logs
        assert (log["event"], log["log_level"], log["engine"]) == ("slower_than_emulated", "warning", "null")
        assert (log["took_ms"], log["profile_ms"], log["overruns"]) == (250, 100, 1)
        clock.now += WARN_EVERY_S
        paced.forward([chunk])
        assert [entry["overruns"] for entry in logs] == [1, 6]
        paced.close()
    assert (logs[-1]["event"], logs[-1]["passes"], logs[-1]["overruns"]) == ("emulation_ended", 7, 6)
    assert logs[-1]["overrun_ms"] == pytest.approx(900)
    assert len(clock.slept) == 1


def test_slow_reading_is_an_overrun_too(paced: EmulatedEngine, slow: SlowEngine) -> None:
    """An engine on a device that returns at once, and is not done in time, is found out."""
    slow.reading = 0.150
    paced.forward([Chunk(0, 0, tokens(1), 1)])
    assert paced.overruns == 1
    assert paced.overrun_s == pytest.approx(0.050)


# -- results are the inner engine's --


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Any, Any]]:
    """The same model computed twice: as it is, and emulated."""
    settings = EngineSettings(engine="numpy", model="embedded:draft", n_ctx=64, n_slots=2, n_batch=32)
    plain = load_engine(settings)
    emulated = load_engine(replace(settings, engine="emulated", inner="numpy", pace=Pace(0.001, 0.001, 1e6)))
    yield plain, emulated
    plain.close()
    emulated.close()


def assert_equal(a: Logits, b: Logits) -> None:
    assert (a.n_rows, a.n_vocab) == (b.n_rows, b.n_vocab)
    for x, y in zip(a.top(5), b.top(5), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(a.log_sum_exp(), b.log_sum_exp())
    for row in range(a.n_rows):
        np.testing.assert_array_equal(a.dense(row), b.dense(row))


def test_logits_are_the_inner_engines(pair: tuple[Any, Any]) -> None:
    """Prompts, batches, rollbacks, copied and truncated slots give the same bits and the same lengths."""
    steps: list[Callable[[Any], Any]] = [
        lambda e: e.forward([Chunk(0, 0, tokens(*range(100, 120)), 1)]),
        lambda e: e.forward([Chunk(0, 20, tokens(7, 8, 9), 3), Chunk(1, 0, tokens(50, 60), 0)]),
        lambda e: e.forward([Chunk(0, 21, tokens(11), 1), Chunk(1, 2, tokens(70), 1)]),
        lambda e: e.copy_prefix(0, 1, 10),
        lambda e: e.forward([Chunk(1, 10, tokens(1, 2), 2)]),
        lambda e: e.truncate(0, 5),
        lambda e: e.forward([Chunk(0, 5, tokens(3), 1)]),
    ]
    for step in steps:
        a, b = (step(engine) for engine in pair)
        if a is not None:
            assert_equal(a, b)
        assert [pair[0].length(slot) for slot in (0, 1)] == [pair[1].length(slot) for slot in (0, 1)]


def test_it_says_what_it_is(pair: tuple[Any, Any]) -> None:
    """It is the inner engine under another name, with the inner one's promises."""
    plain, emulated = pair
    assert emulated.info == replace(plain.info, engine="emulated (numpy)")
    assert plain.info.row_invariant


# -- optional capabilities --


class CleverEngine(NullEngine):
    """Remembers any prefix and chooses tokens itself."""

    @property
    def max_proposals(self) -> int:
        return 4

    def can_propose(self, params: SamplingParams) -> bool:
        del params
        return True

    def propose(self, chunks: Sequence[Chunk], params: Sequence[SamplingParams], n: int) -> Proposed:
        raise NotImplementedError

    def reuse_prefix(self, slot: int, tokens: Int32) -> int:
        del slot
        return len(tokens) - 1


def test_remembered_prefixes_are_passed_through() -> None:
    """An inner engine's memory is used, without cost; where it has none, the emulated engine has none."""
    engine = emulate(CleverEngine(SETTINGS), PACE)
    assert isinstance(engine, PrefixCache)
    assert engine.reuse_prefix(0, tokens(1, 2, 3)) == 2
    assert engine.passes == 0
    assert not isinstance(emulate(NullEngine(SETTINGS), PACE), PrefixCache)


def test_proposals_are_made_a_token_at_a_time() -> None:
    """An inner engine that could choose several tokens in one call is not asked to: each token has its own pass."""
    assert isinstance(CleverEngine(SETTINGS), Proposer)
    assert not isinstance(emulate(CleverEngine(SETTINGS), PACE), Proposer)


# -- settings --


def engine_settings(*overrides: str, draft: bool = False) -> EngineSettings:
    section = "draft.d.engine." if draft else "verifier.engine."
    settings = load_settings(None, [section + override for override in overrides], {})
    return settings.draft["d"].engine if draft else settings.verifier.engine


def test_a_profile_has_a_part_for_each_role() -> None:
    """One name serves both: the verifier takes the target's part, a draft worker the draft's, unless told otherwise."""
    assert find_pace(engine_settings("profile=ling-1t")) == PROFILES["ling-1t"].target
    assert find_pace(engine_settings("profile=ling-1t", draft=True)) == PROFILES["ling-1t"].draft
    assert find_pace(engine_settings("profile=ling-1t", "role=draft")) == PROFILES["ling-1t"].draft


def test_a_profile_of_ones_own() -> None:
    """Numbers stand for themselves, or in the place of a profile's."""
    own = engine_settings("pace.first_row_ms=90", "pace.further_row_ms=30.5", "pace.prefill_per_second=400")
    assert find_pace(own) == Pace(90, 30.5, 400)
    changed = engine_settings("profile=qwen3-coder-480b", "pace.further_row_ms=20")
    assert find_pace(changed) == replace(PROFILES["qwen3-coder-480b"].target, further_row_ms=20)


@pytest.mark.parametrize(
    ("settings", "code", "expected"),
    [
        (EngineSettings(profile="ling"), "unknown_profile", ("'ling'", "ling-1t, qwen3-coder-480b")),
        (EngineSettings(), "bad_settings", ("pace.first_row_ms, pace.further_row_ms, pace.prefill_per_second", "ling")),
        (EngineSettings(pace=Pace(1, 0, 5)), "bad_settings", ("no pace.further_row_ms (",)),
        (
            EngineSettings(profile="ling-1t", pace=Pace(-1, 0, 0)),
            "bad_settings",
            ("pace.first_row_ms is -1", "above 0"),
        ),
        (EngineSettings(pace=Pace(1, 1, float("nan"))), "bad_settings", ("pace.prefill_per_second is nan",)),
        (EngineSettings(profile="ling-1t", inner="emulated"), "bad_settings", ("inside another",)),
        (EngineSettings(profile="ling-1t", inner="cuda9"), "unknown_engine", ("'cuda9'",)),
    ],
)
def test_what_cannot_be_emulated_is_refused(settings: EngineSettings, code: str, expected: tuple[str, ...]) -> None:
    """With what is wrong and what would be right, and before a model is loaded."""
    with pytest.raises(DraftwireError) as caught:
        load_engine(replace(settings, engine="emulated", model="/nowhere.gguf"))
    assert caught.value.code == code
    assert isinstance(caught.value, SettingsError) == (code != "unknown_engine")  # starting again cannot help
    for part in expected:
        assert part in str(caught.value)


def test_it_is_loaded_by_name_with_the_settings_of_the_inner_one() -> None:
    """Sizes and everything else are for the engine inside, and a log line says what is emulated."""
    settings = replace(SETTINGS, engine="emulated", inner="null", profile="ling-1t")
    with structlog.testing.capture_logs() as logs:
        engine = load_engine(settings)
    assert engine.info == replace(NullEngine(SETTINGS).info, engine="emulated (null)")
    assert (logs[0]["event"], logs[0]["first_row_ms"], logs[0]["engine"]) == ("emulating", 160, "null")
    assert settings.computing == "null"
    assert replace(settings, engine="ik").computing == "ik"
