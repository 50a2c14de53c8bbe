"""The timings object and our own figures."""

from __future__ import annotations

from services.gateway.timings import configuration, speculation_report, timings
from shared.messages import DraftStats, ModelLabel, TargetStats


def test_timings_are_llama_servers() -> None:
    """Names, units and meanings are those that llama-server's clients know; cached tokens are not counted twice."""
    stats = TargetStats(
        n_prompt=10, n_cached=4, n_generated=12, n_proposed=9, n_accepted=7, by_depth=((5, 4), (4, 3)),
        prefill_us=30_000, decode_us=240_000,
    )  # fmt: skip
    assert timings(stats) == {
        "cache_n": 4,
        "prompt_n": 6,
        "prompt_ms": 30.0,
        "prompt_per_token_ms": 5.0,
        "prompt_per_second": 200.0,
        "predicted_n": 12,
        "predicted_ms": 240.0,
        "predicted_per_token_ms": 20.0,
        "predicted_per_second": 50.0,
        "draft_n": 9,
        "draft_n_accepted": 7,
        "draft_by_depth": [
            {"depth": 1, "draft_n": 5, "draft_n_accepted": 4},
            {"depth": 2, "draft_n": 4, "draft_n_accepted": 3},
        ],
    }


def test_a_generation_without_figures_has_zeros() -> None:
    """Nothing is divided by zero."""
    assert timings(TargetStats())["predicted_per_second"] == 0.0
    report = speculation_report(TargetStats(), DraftStats())
    assert report["acceptance_rate"] == 0.0
    assert report["mean_acceptance_length"] == 0.0


def test_stages_are_milliseconds_of_both_sides() -> None:
    """Each stage comes from the side that measured it, in milliseconds."""
    target = TargetStats(
        n_generated=12, rounds=5, n_proposed=8, n_accepted=6, n_stale=3, full_rows=2, queue_us=1500,
        prefill_us=2500, verify_us=3500, sample_us=4500, wire_us=5500, wait_us=6500,
    )  # fmt: skip
    report = speculation_report(target, DraftStats("w", 20, 7500, 8500, 1))
    assert report == {
        "rounds": 5,
        "acceptance_rate": 0.75,
        "mean_acceptance_length": 2.2,
        "stages_ms": {
            "queue": 1.5, "draft_prefill": 7.5, "draft_decode": 8.5, "target_prefill": 2.5, "verify": 3.5,
            "sample": 4.5, "wire": 5.5, "wait": 6.5,
        },
        "worker": "w",
        "worker_changes": 1,
        "full_rows": 2,
        "n_drafted": 20,
        "n_stale": 3,
        "session": "0000000000000000",
    }  # fmt: skip


def test_the_configuration_names_both_models() -> None:
    """What `draftwire journal report` groups by; what was not there is empty."""
    assert configuration(ModelLabel("big.gguf", "IQ4_KSS", "ik"), ModelLabel()) == {
        "target_model": "big.gguf",
        "target_quant": "IQ4_KSS",
        "target_engine": "ik",
        "draft_model": "",
        "draft_quant": "",
        "draft_engine": "",
    }
