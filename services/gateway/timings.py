"""What a generation took, under the names that llama-server's clients and scripts know. Pure."""

from __future__ import annotations

from typing import Any

from shared.messages import DraftStats, ModelLabel, TargetStats


def timings(target: TargetStats) -> dict[str, Any]:
    """llama-server's `timings` object, with ik_llama.cpp's `draft_by_depth`.

    Prompt figures are of the tokens that were computed, without those found in the cache.
    """
    prompt_n = max(0, target.n_prompt - target.n_cached)
    return {
        "cache_n": target.n_cached,
        **_speed("prompt", prompt_n, target.prefill_us),
        **_speed("predicted", target.n_generated, target.decode_us),
        "draft_n": target.n_proposed,
        "draft_n_accepted": target.n_accepted,
        "draft_by_depth": [
            {"depth": depth, "draft_n": proposed, "draft_n_accepted": accepted}
            for depth, (proposed, accepted) in enumerate(target.by_depth, 1)
        ],
    }


def speculation_report(target: TargetStats, draft: DraftStats) -> dict[str, Any]:
    """Our own figures of one generation; the mean acceptance length includes the recovered or bonus token.

    The first token comes out of prefill, before the first round.
    """
    return {
        "rounds": target.rounds,
        "acceptance_rate": _ratio(target.n_accepted, target.n_proposed),
        "mean_acceptance_length": _ratio(max(0, target.n_generated - 1), target.rounds),
        "stages_ms": {
            "queue": _ms(target.queue_us),
            "draft_prefill": _ms(draft.prefill_us),
            "draft_decode": _ms(draft.decode_us),
            "target_prefill": _ms(target.prefill_us),
            "verify": _ms(target.verify_us),
            "sample": _ms(target.sample_us),
            "wire": _ms(target.wire_us),
            "wait": _ms(target.wait_us),
        },
        "worker": draft.worker,
        "worker_changes": draft.worker_changes,
        "full_rows": target.full_rows,
        "n_drafted": draft.n_drafted,
        "n_stale": target.n_stale,
        "session": f"{target.session:016x}",
    }


def configuration(target: ModelLabel, draft: ModelLabel) -> dict[str, str]:
    """What computed a generation, by which `draftwire journal report` groups; empty where nothing did."""
    return {
        **{f"target_{name}": getattr(target, name) for name in ("model", "quant", "engine")},
        **{f"draft_{name}": getattr(draft, name) for name in ("model", "quant", "engine")},
    }


def _speed(name: str, n: int, us: int) -> dict[str, Any]:
    return {
        f"{name}_n": n,
        f"{name}_ms": _ms(us),
        f"{name}_per_token_ms": round(us / 1000 / n, 6) if n else 0.0,
        f"{name}_per_second": round(n * 1e6 / us, 6) if us else 0.0,
    }


def _ms(us: int) -> float:
    return round(us / 1000, 3)


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0
