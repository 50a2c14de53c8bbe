"""How near the adaptive policy came to the best one: from records to lines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared.settings import Settings, load_settings
from tools.bench_speculation import SceneResult
from tools.bench_speculation_best import best_policy, rate
from tools.bench_speculation_figures import STAGES, Record
from tools.bench_speculation_scenes import Scene

TEXT = (311, 40, 9, 77, 1024, 5, 6, 7, 2048, 12)


def record(policy: str, tokens_per_s: float) -> Record:
    return Record(
        scene="s",
        policy=policy,
        turn=0,
        prompt=0,
        repeat=0,
        prompt_tokens=(0, 17, 400),
        tokens=TEXT,
        seed=1,
        temperature=0.0,
        top_k=40,
        top_p=0.95,
        min_p=0.05,
        acceptance="coupled",
        cached_tokens=0,
        tokens_per_s=tokens_per_s,
        ttft_ms=1.0,
        intervals_ms=(),
        rounds=9,
        proposed=0,
        accepted=0,
        by_depth=(),
        stale=0,
        drafted=0,
        worker="",
        stages_ms=dict.fromkeys(STAGES, 0.0),
    )


def settings(*more: str) -> Settings:
    emulated = [f"{table}.engine.{key}" for table in ("verifier", "draft.model") for key in (
        "engine=emulated", "inner=numpy", "profile=ling-1t", "n_ctx=64", "threads=1",
    )]  # fmt: skip
    return load_settings(None, [*emulated, *more], {})


def result(**changes: object) -> SceneResult:
    # 10 tokens in 9 steps of 162 ms, and of 150.
    records = (record("plain", 10 / (9 * 0.162)), record("adaptive", 10 / (9 * 0.150)))
    shown = SceneResult(Scene("s", "", rtt_ms=0.2), 1.0, 1, 10, 1, "e", False, records, (), False, settings())
    return replace(shown, **changes)  # type: ignore[arg-type]


def test_rates_are_of_the_tokens_after_the_first() -> None:
    assert rate([record("plain", 10 / (9 * 0.162))]) == pytest.approx(1 / 0.162)


def test_the_lines_compare_what_was_measured_with_the_simulated_best() -> None:
    lines = best_policy(result())
    assert "1 texts, 10 positions" in lines[0]
    assert "plain 6.173" in lines[-1]
    assert f"adaptive {1 / 0.150:.3f} ({0.162 / 0.150:.3f}x)" in lines[-1]
    fastest = float(lines[1].split(": ")[1].split(" ")[0])
    assert fastest >= 0.97 * 6.173, "a policy that verifies nothing is among them, nearly"
    assert f"{100 / 0.150 / fastest:.1f} % of" in lines[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"scene": Scene("s", "", concurrency=4)},
        {"settings": settings("draft.more.drafter=ngram")},
        {"settings": settings("draft.model.engine.engine=numpy")},
        {"settings": settings("draft={}")},
        {"records": (record("plain", 6.0),)},
    ],
)
def test_where_it_cannot_be_said_nothing_is(changes: dict[str, object]) -> None:
    assert best_policy(result(**changes)) == []
