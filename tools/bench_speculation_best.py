"""How near the adaptive policy came to the best one: policies simulated over the trace of what a scene has measured.

The simulated machines and network are the scene's, without what the processes themselves take beyond the time of a
plain step; so it is an upper bound, and what lies between is theirs as well as the controller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shared.engine.emulated import find_pace
from shared.engine.registry import load_engine
from shared.sampling.params import SamplingParams
from shared.settings import DraftSettings
from shared.speculation.cost import StepCost
from tools.bench_speculation import SceneResult
from tools.bench_speculation_figures import Record
from tools.draft_trace import Trace, record
from tools.simulation import Adaptive, Machine, best, oracles, play, thresholds


def best_policy(result: SceneResult) -> list[str]:
    """Lines that compare `adaptive` with the best simulated policy; none where the scene does not allow it.

    It needs emulated models, one generation at a time, and the coupled rule or greedy decoding.
    """
    plain = [r for r in result.records if r.policy == "plain" and len(r.tokens) > 1]
    adaptive = [r for r in result.records if r.policy == "adaptive" and len(r.tokens) > 1]
    worker = _emulated_draft(result)
    if worker is None or not plain or not adaptive or result.scene.concurrency > 1:
        return []
    machine = _machine(result, worker, plain)
    traces = _traces(worker, plain)
    policy, outcome = best(traces, machine, thresholds(machine))
    _, oracle = best(traces, machine, oracles(machine))
    own = play(traces, machine, Adaptive())
    plain_rate, measured = rate(plain), rate(adaptive)
    n = sum(map(len, traces))
    hits = sum(proposed.hit for trace in traces for proposed in trace)
    waits = f"waits up to {1e3 * policy.most_wait_s:.0f} ms" if policy.most_wait_s < 1e6 else "waits for it"
    return [
        f"Simulated over this run's trace ({len(traces)} texts, {n:,} positions, the draft right at {hits / n:.3f} of "
        "them), tokens/s after the first token and times plain:",
        f"  best of the fixed overlapped policies: {outcome.rate:.3f} ({outcome.rate / plain_rate:.3f}x): verifies "
        f"while P(all right) >= {policy.least:g}, at most {policy.n_max}, {waits}",
        f"  adaptive: {own.rate:.3f} ({own.rate / plain_rate:.3f}x)",
        f"  an oracle that knows which proposals are right: {oracle.rate:.3f} ({oracle.rate / plain_rate:.3f}x)",
        f"Measured: adaptive {measured:.3f} ({measured / plain_rate:.3f}x), {100 * measured / outcome.rate:.1f} % of "
        f"the best fixed policy; plain {plain_rate:.3f}.",
    ]


def rate(records: Sequence[Record]) -> float:
    """Tokens a second after each completion's first token, of all together."""
    return sum(len(r.tokens) - 1 for r in records) / sum(len(r.tokens) / r.tokens_per_s for r in records)


def _emulated_draft(result: SceneResult) -> DraftSettings | None:
    """The model that drafts alone, if it and the target are emulated."""
    workers = list(result.settings.draft.values())
    if len(workers) != 1 or workers[0].drafter != "model":
        return None
    engines = (result.settings.verifier.engine.engine, workers[0].engine.engine)
    return workers[0] if engines == ("emulated", "emulated") else None


def _machine(result: SceneResult, worker: DraftSettings, plain: Sequence[Record]) -> Machine:
    target, draft = find_pace(result.settings.verifier.engine), find_pace(worker.engine)
    step = StepCost.linear(target.first_row_ms / 1e3, target.further_row_ms / target.first_row_ms)
    return Machine(
        step=step,
        draft_s=draft.first_row_ms / 1e3,
        rtt_s=result.scene.rtt_ms * result.time_scale / 1e3,
        overhead_s=max(0.0, 1 / rate(plain) - step.seconds(1)),
        window=result.settings.router.window,
    )


def _traces(worker: DraftSettings, plain: Sequence[Record]) -> list[Trace]:
    engine = load_engine(replace(worker.engine, engine=worker.engine.computing, n_slots=1))
    try:
        return [record(engine, _sampling(text), text.prompt_tokens, text.tokens) for text in plain]
    finally:
        engine.close()


def _sampling(text: Record) -> SamplingParams:
    return SamplingParams(
        temperature=text.temperature, top_k=text.top_k, top_p=text.top_p, min_p=text.min_p, seed=text.seed
    )
