"""`draftwire bench acceptance`: how much of what a draft proposes is accepted, and whether the text stays the same.

Runs the real pipeline over the bundled prompts. The *flip rate* is how many completions differ from the target's own
plain one with the same seed: zero for a row-invariant target under greedy and coupled sampling; for others it measures
how often a near-tie falls to the other side. Rejection sampling promises the distribution, not the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from shared.model.names import load_prompts
from tools.fleet import Gateway, find_gateway
from tools.temporary import temporary_fleet


@dataclass(frozen=True, slots=True)
class ModeResult:
    """One sampling mode over all prompts.

    by_depth: (proposed, accepted) for each depth. flips: completions that differ from the plain one, None where the
    same text is not promised. compared: equal tokens up to the first difference, summed over completions.
    """

    mode: str
    by_depth: tuple[tuple[int, int], ...]
    rounds: int
    n_generated: int
    n_completions: int
    flips: int | None
    compared: int

    @property
    def acceptance_rate(self) -> float:
        proposed = sum(p for p, _ in self.by_depth)
        return sum(a for _, a in self.by_depth) / proposed if proposed else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        return (self.n_generated - self.n_completions) / self.rounds if self.rounds else 0.0


def bench_acceptance(
    console: Console,
    *,
    n_prompts: int,
    n_tokens: int,
    temperature: float,
    config: Path | None = None,
    overrides: Sequence[str] = (),
) -> list[ModeResult]:
    """Complete the bundled prompts in every mode.

    Args:
        n_prompts: of the bundled ones, in their order. n_tokens: of each completion. temperature: of sampled modes.
    """
    prompts = [prompt.text for prompt in load_prompts()[:n_prompts]]
    modes: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        f"T={temperature:g} coupled": {"temperature": temperature},
        f"T={temperature:g} rejection": {"temperature": temperature, "acceptance": "rejection"},
    }
    results = []
    with temporary_fleet(config, overrides) as settings, Progress(console=console, transient=True) as progress:
        gateway = Gateway(find_gateway(settings), 300)
        task = progress.add_task("completions", total=len(prompts) * 5)
        plain: dict[tuple[str, int], list[int]] = {}
        for mode, fields in modes.items():
            promised = "acceptance" not in fields
            by_depth: list[list[int]] = []
            rounds = n_generated = flips = compared = 0
            for seed, prompt in enumerate(prompts):
                body = {"prompt": prompt, "n_predict": n_tokens, "seed": seed, **fields}
                if promised:
                    plain[mode, seed], _ = _complete(gateway, {**body, "draft": "none"})
                    progress.advance(task)
                tokens, final = _complete(gateway, body)
                progress.advance(task)
                rounds += final["draftwire"]["rounds"]
                n_generated += len(tokens)
                for entry in final["timings"]["draft_by_depth"]:
                    while len(by_depth) < entry["depth"]:
                        by_depth.append([0, 0])
                    by_depth[entry["depth"] - 1][0] += entry["draft_n"]
                    by_depth[entry["depth"] - 1][1] += entry["draft_n_accepted"]
                if promised:
                    same = _common(tokens, plain[mode, seed])
                    compared += same
                    flips += tokens != plain[mode, seed]
            results.append(
                ModeResult(
                    mode,
                    tuple((p, a) for p, a in by_depth),
                    rounds,
                    n_generated,
                    len(prompts),
                    flips if promised else None,
                    compared,
                )
            )
    return results


def _complete(gateway: Gateway, body: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    tokens: list[int] = []
    final: dict[str, Any] = {}
    for event in gateway.stream("/completion", {**body, "stream": True, "return_tokens": True}):
        if event["stop"]:
            final = event
        else:
            tokens.extend(event["tokens"])
    return tokens, final


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def print_acceptance(results: Sequence[ModeResult], console: Console) -> None:
    """The table."""
    depth = max((len(result.by_depth) for result in results), default=0)
    table = Table(title="Acceptance")
    table.add_column("mode")
    for name in ("accepted", "length", *(f"depth {d + 1}" for d in range(depth)), "texts changed", "flips/1,000"):
        table.add_column(name, justify="right")
    for result in results:
        cells = [f"{a / p:.3f} of {p}" for p, a in result.by_depth]
        cells += [""] * (depth - len(cells))
        if result.flips is None:
            sameness = ["not promised", ""]
        else:
            per_thousand = 1000 * result.flips / max(1, result.compared)
            sameness = [f"{result.flips} of {result.n_completions}", f"{per_thousand:.2f}"]
        table.add_row(
            result.mode, f"{result.acceptance_rate:.3f}", f"{result.mean_acceptance_length:.2f}", *cells, *sameness
        )
    console.print(table)
