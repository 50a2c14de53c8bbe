"""`draftwire bench agreement`: how often a draft's token is the target's, and how often it could be at best.

Along texts that the target samples, with the same prefix for both, and no pipeline. Three ways of drafting are compared
with the most that any way can reach, 1 - TV: one minus the total variation distance of the two models' filtered
distributions, which rejection sampling attains (Leviathan et al. 2023). *Coupled*: both share their noise, at least
(1 - TV) / (1 + TV) (Daliri, Musco, Suresh 2024). *Greedy*: the draft's most probable token against a sampled target, as
servers draft today.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from shared.engine.interface import Chunk, Engine, EngineSettings, Float32
from shared.engine.registry import load_engine
from shared.errors import SettingsError
from shared.model.names import load_prompts, resolve_model
from shared.model.vocabulary import Vocabulary
from shared.sampling.acceptance import probabilities
from shared.sampling.drafting import draft
from shared.sampling.filters import Float64, candidates
from shared.sampling.params import SamplingParams
from shared.sampling.rows import choose_from_row
from tools.draft_trace import rows_along


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over n positions: shares at which a draft's token is the target's, and their standard errors."""

    temperature: float
    n: int
    coupled: float
    greedy: float
    best: float
    coupled_error: float
    greedy_error: float


def bench_agreement(
    target: EngineSettings,
    drafting: EngineSettings,
    *,
    temperatures: Sequence[float],
    top_p: float,
    n_prompts: int,
    n_tokens: int,
    console: Console,
) -> list[Agreement]:
    """Measure it at each temperature, along the target's own samples after bundled prompts; filters: top_p alone.

    Raises:
        SettingsError: a temperature at which nothing is sampled.
        ModelError, EngineError: a model cannot be used.
    """
    if not all(0 < temperature < math.inf for temperature in temperatures):
        raise SettingsError("the temperatures must be above 0", "greedy agreement is what `bench acceptance` shows")
    vocabulary = Vocabulary.open(resolve_model(target.model))
    prompts = [vocabulary.encode(p.text, parse_special=True).tolist() for p in load_prompts()[:n_prompts]]
    engines = [load_engine(replace(settings, n_slots=1)) for settings in (target, drafting)]
    try:
        results = []
        for temperature in temperatures:
            params = SamplingParams(temperature=temperature, top_k=0, top_p=top_p, min_p=0.0)
            coupled: list[float] = []
            greedy: list[float] = []
            best: list[float] = []
            for seed, prompt in enumerate(track(prompts, f"T = {temperature:g}", console=console, transient=True)):
                seeded = replace(params, seed=seed)
                text, rows = _sample(engines[0], seeded, prompt, n_tokens, vocabulary.eog_ids)
                for i, (own, other) in enumerate(zip(rows, rows_along(engines[1], prompt, text), strict=True)):
                    position = len(prompt) + i
                    ours, theirs = _distribution(own, seeded), _distribution(other, seeded)
                    coupled.append(draft(seeded, other, (), position).token == text[i])
                    greedy.append(float(ours[int(other.argmax())]))
                    best.append(float(np.minimum(ours, theirs).sum()))
            results.append(
                Agreement(
                    temperature,
                    len(best),
                    *(float(np.mean(values)) for values in (coupled, greedy, best)),
                    *(float(np.std(values) / math.sqrt(len(values))) for values in (coupled, greedy)),
                )
            )
        return results
    finally:
        for engine in engines:
            engine.close()


def _sample(
    engine: Engine, params: SamplingParams, prompt: Sequence[int], n_tokens: int, stop: Sequence[int]
) -> tuple[list[int], list[Float32]]:
    """The target's continuation, and its logits at each of the continuation's positions."""
    tokens = list(prompt)
    rows: list[Float32] = []
    pending = np.array(prompt, np.int32)
    engine.truncate(0, 0)
    while len(rows) < n_tokens and len(tokens) < engine.info.n_ctx:
        for at in range(0, len(pending), engine.info.n_batch):
            chunk = pending[at : at + engine.info.n_batch]
            start = len(tokens) - len(pending) + at
            logits = engine.forward([Chunk(0, start, chunk, int(at + len(chunk) == len(pending)))])
        rows.append(logits.dense(0).copy())
        tokens.append(choose_from_row(params, rows[-1], None, 0, len(tokens)))
        pending = np.array(tokens[-1:], np.int32)
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :], rows


def _distribution(row: Float32, params: SamplingParams) -> Float64:
    """[n_vocab] float64, after filters and temperature."""
    kept = candidates(params, row, None, 0)
    probs = np.zeros(len(row))
    probs[kept.ids] = probabilities(params, kept)
    return probs


def print_agreement(results: Sequence[Agreement], console: Console) -> None:
    """The table."""
    table = Table(title="A draft's token is the target's, at the same prefix", title_justify="left")
    for name in ("T", "positions", "coupled", "greedy draft", "best possible", "coupled behind the best"):
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(
            f"{result.temperature:g}",
            f"{result.n:,}",
            f"{result.coupled:.3f} ± {result.coupled_error:.3f}",
            f"{result.greedy:.3f} ± {result.greedy_error:.3f}",
            f"{result.best:.3f}",
            f"{result.best - result.coupled:.3f}",
        )
    console.print(table)
