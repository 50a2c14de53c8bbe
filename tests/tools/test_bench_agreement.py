"""`draftwire bench agreement`: its three figures against what must hold for them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from shared.engine.interface import EngineSettings
from shared.errors import SettingsError
from tools.bench_agreement import bench_agreement, print_agreement

CONSOLE = Console(file=io.StringIO(), width=160)


def engine(model: str) -> EngineSettings:
    return EngineSettings(engine="numpy", model=f"embedded:{model}", n_ctx=1024, threads=1)


def test_a_model_agrees_with_itself() -> None:
    """Of the target's own tokens all are proposed by coupled sampling, and the best possible is 1; a greedy draft is
    right as often as the target takes its most probable token."""
    (result,) = bench_agreement(
        engine("draft"), engine("draft"), temperatures=[1.0], top_p=0.95, n_prompts=1, n_tokens=24, console=CONSOLE
    )
    assert result.n == 24
    assert (result.coupled, result.best) == (1.0, pytest.approx(1.0))
    assert 0 < result.greedy < 1


def test_no_way_beats_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    """Coupled sampling stays under 1 - TV but for chance, and above (1 - TV) / (1 + TV)."""
    results = bench_agreement(
        engine("target"), engine("draft"), temperatures=[0.7], top_p=0.95, n_prompts=2, n_tokens=30, console=CONSOLE
    )
    (result,) = results
    distance = 1 - result.best
    chance = 4 * result.coupled_error
    assert (1 - distance) / (1 + distance) - chance <= result.coupled <= result.best + chance
    assert result.greedy <= result.best
    print_agreement(results, Console(width=160))
    assert f"{result.best:.3f}" in capsys.readouterr().out


def test_nothing_is_sampled_at_temperature_0() -> None:
    with pytest.raises(SettingsError, match="above 0"):
        bench_agreement(
            engine("target"), engine("draft"), temperatures=[0.0], top_p=1.0, n_prompts=1, n_tokens=1, console=CONSOLE
        )
