"""`draftwire estimate`: what speculation would bring, before any of it is installed. The model is
`shared/speculation/cost.py`; this turns options into it, and its figures into a table and words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.table import Table

from shared.errors import SettingsError
from shared.messages import MAX_RUN
from shared.speculation.cost import Acceptance, Speculation, StepCost, best_length, break_even

MOST = 1e9
"""No figure is larger, nor a speed smaller than its inverse: beyond are typing errors, and at last overflows."""

Rate = Callable[[Speculation, int], float]

WAYS: dict[str, Rate] = {
    "sequential": Speculation.sequential,
    "overlapped": Speculation.overlapped,
    "waiting": lambda speculation, n: speculation.overlapped(n, wait_for=n),
    "ideal": Speculation.ideal,
}
"""Ways of working, in the order of the table's columns."""


@dataclass(frozen=True, slots=True)
class Row:
    """n proposals a step. tokens: committed in one step that has them all. per_second: tokens/s by way of working."""

    n: int
    tokens: float
    per_second: dict[str, float]


@dataclass(frozen=True, slots=True)
class Best:
    """The best of one way of working.

    n: the length, 0 if speculation does not pay. speed_up: over plain decoding. break_even: the acceptance, the same
    for every proposal, from which on it pays with some length up to the longest; None if it does at none.
    """

    n: int
    per_second: float
    speed_up: float
    break_even: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """plain: tokens/s without speculation. rows: a length each, from 0. best: by way of working."""

    plain: float
    rows: tuple[Row, ...]
    best: dict[str, Best]


def parse_speculation(target_tps: float, draft_tps: float, acceptance: str, rtt_ms: float, slope: float) -> Speculation:
    """The options of the command as a model of it.

    Raises:
        SettingsError: naming the option that cannot be.
    """
    for option, value in (("--target-tps", target_tps), ("--draft-tps", draft_tps)):
        if not 1 / MOST <= value <= MOST:
            raise SettingsError(f"{option} is {value:g}", "tokens/s, above 0; `draftwire bench engine` measures it")
    if not 0 <= rtt_ms <= MOST:
        raise SettingsError(f"--rtt is {rtt_ms:g}", "milliseconds, from 0 on; `ping` shows them")
    if not 0 <= slope <= MOST:
        raise SettingsError(
            f"--slope is {slope:g}", "what a further row costs, from 0 (nothing) over 0.39 to 1 (as much as the first)"
        )
    step = StepCost.linear(1 / target_tps, slope)
    return Speculation(step, 1 / draft_tps, rtt_ms / 1000, parse_acceptance(acceptance))


def parse_acceptance(text: str) -> Acceptance:
    """Acceptance from one probability, or one for each depth: "0.85" or "0.86,0.75,0.69". Errors: `SettingsError`."""
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(
            f"--acceptance is {text!r}", "a probability such as 0.85, or one for each depth such as 0.86,0.75,0.69"
        ) from None
    for share in shares:
        if not 0 <= share <= 1:
            raise SettingsError(f"--acceptance has {share:g}", "probabilities lie between 0 and 1; 85 % is 0.85")
    try:
        return Acceptance(shares)
    except ValueError as error:
        raise SettingsError(
            f"--acceptance is {text!r}, but {error}", "where it rises, repeat the lower value"
        ) from None


def estimate(speculation: Speculation, n_max: int) -> Estimate:
    """All lengths from 0 to n_max, and the best of each way of working. Errors: `SettingsError` for n_max."""
    if not 1 <= n_max <= MAX_RUN:
        raise SettingsError(f"--n-max is {n_max}", f"from 1 to {MAX_RUN}")
    rows = tuple(
        Row(n, speculation.acceptance.tokens(n), {name: rate(speculation, n) for name, rate in WAYS.items()})
        for n in range(n_max + 1)
    )
    return Estimate(speculation.plain(), rows, {name: _best(speculation, n_max, rate) for name, rate in WAYS.items()})


def _best(speculation: Speculation, n_max: int, rate: Rate) -> Best:
    def length(speculation: Speculation) -> int:
        return best_length(lambda n: rate(speculation, n), n_max)

    n = length(speculation)
    least = break_even(lambda acceptance: length(replace(speculation, acceptance=Acceptance((acceptance,)))) > 0)
    per_second = rate(speculation, n)
    return Best(n, per_second, per_second / speculation.plain(), least)


def estimate_table(result: Estimate) -> Table:
    """A row for each length; a star marks the best of a column."""
    table = Table(caption="tokens/s and speed-up, * the best; tokens: committed by a step that has all n proposals")
    for heading in ("n", "tokens", *WAYS):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        cells = [
            f"{value:.2f} {value / result.plain:.2f}x{'*' if result.best[name].n == row.n else ' '}"
            for name, value in row.per_second.items()
        ]
        table.add_row(str(row.n), f"{row.tokens:.2f}", *cells)
    return table


def estimate_lines(result: Estimate) -> list[str]:
    """What the table means, in words: does speculation pay, and from which acceptance on does it?"""
    lines = []
    for name in ("sequential", "overlapped", "waiting"):
        best = result.best[name]
        if best.n:
            verdict = f"pays, {best.per_second:.2f} tokens/s instead of {result.plain:.2f} with n = {best.n}"
        else:
            verdict = "does not pay"
        if best.break_even is None:
            threshold = "nor would it at any acceptance"
        else:
            threshold = f"{'it does' if best.n else 'it would'} from an acceptance of {best.break_even:.2f} on"
        lines.append(f"{name}: speculation {verdict}; {threshold}")
    return lines


def print_estimate(result: Estimate, console: Console | None = None) -> None:
    """Print the table and what it means."""
    console = console or Console(markup=False, highlight=False)
    console.print(estimate_table(result))
    for line in estimate_lines(result):
        console.print(line, soft_wrap=True)


def estimate_json(result: Estimate) -> dict[str, object]:
    """All figures, with the names of `Estimate`."""
    return asdict(result)
