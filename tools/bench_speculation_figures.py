"""What `draftwire bench speculation` notes of each completion, and the statistics over them. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

STAGES = ("queue", "draft_prefill", "draft_decode", "target_prefill", "verify", "sample", "wire", "wait")


@dataclass(frozen=True, slots=True)
class Record:
    """One completion. With its prompt, tokens, seed and sampling, what it would have cost otherwise can be found out.

    turn: number of the policy's turn; completions of one turn ran at the same time. prompt: its number. cached_tokens:
    of the prompt, not computed again.
    tokens_per_s: generated tokens over the time from the first one to the end. ttft_ms: from the request to the first
    token. intervals_ms: between chunks that brought tokens.
    rounds: passes of the target after the prompt. proposed, accepted: proposals verified, and accepted; by_depth the
    same for each depth. stale: proposals that came too late to be verified. drafted: tokens that the draft chose.
    stages_ms: as in the gateway's report.
    turn_busy_s: from the turn's first token to its last, of all its completions. turn_tokens: of all of them.
    turn_wire_bytes: what the link between draft workers and router carried in that turn, both ways; None: no link.
    """

    scene: str
    policy: str
    turn: int
    prompt: int
    repeat: int
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    acceptance: str
    cached_tokens: int
    tokens_per_s: float
    ttft_ms: float
    intervals_ms: tuple[float, ...]
    rounds: int
    proposed: int
    accepted: int
    by_depth: tuple[tuple[int, int], ...]
    stale: int
    drafted: int
    worker: str
    stages_ms: dict[str, float]
    turn_busy_s: float = 0.0
    turn_tokens: int = 0
    turn_wire_bytes: int | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Equal for completions of the same prompt with the same seed under different policies."""
        return self.prompt, self.repeat

    @property
    def acceptance_rate(self) -> float | None:
        return self.accepted / self.proposed if self.proposed else None

    @property
    def verified_rows(self) -> int:
        """Rows of the target after the prompt: the last committed token's of each round, and the proposals'."""
        return self.rounds + self.proposed

    @property
    def wasted_rows(self) -> int:
        """Proposals that were verified and refused."""
        return self.proposed - self.accepted


@dataclass(frozen=True, slots=True)
class Spread:
    """std: of the sample, 0 for a single value."""

    n: int
    mean: float
    median: float
    std: float
    least: float
    most: float


def spread(values: Iterable[float]) -> Spread | None:
    """None of no values."""
    found = list(values)
    if not found:
        return None
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    return Spread(len(found), statistics.fmean(found), statistics.median(found), deviation, min(found), max(found))


def percentile(values: Sequence[float], share: float) -> float | None:
    """By linear interpolation; share from 0 to 1. None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Overruns:
    """Passes of an emulated engine that took longer than the machine it emulates, warm-up included."""

    process: str
    passes: int
    overruns: int
    overrun_ms: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A policy in a scene. None: nothing to tell.

    tokens_per_s: over completions. speed_ups: of each over the plain one of the same prompt and seed.
    speed_up: all tokens over all turns' busy time, against plain's: what a user of the whole set would see, and the
    only one that knows of generations beside each other. all_tokens_per_s: that speed itself.
    itl_p50_ms, itl_p99_ms: over all intervals. rows, wasted, stale and drafted are divided by the tokens that rounds
    committed, so without each completion's first one; bytes and stages by all tokens.
    same: completions with the plain one's tokens, of how many compared; None where the rule does not promise that.
    """

    policy: str
    n: int
    n_tokens: int
    tokens_per_s: Spread | None
    all_tokens_per_s: float | None
    speed_up: float | None
    speed_ups: Spread | None
    ttft_ms: Spread | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    proposed: int
    accepted: int
    by_depth: tuple[tuple[int, int], ...]
    mean_acceptance_length: float | None
    rows_per_token: float | None
    wasted_per_token: float | None
    stale_per_token: float | None
    drafted_per_token: float | None
    wire_bytes_per_token: float | None
    stages_ms_per_token: dict[str, float] = field(default_factory=dict)
    same: int | None = None
    compared: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        return self.accepted / self.proposed if self.proposed else None


def summarize(records: Sequence[Record]) -> list[Summary]:
    """One for each policy of a scene, in the order in which they come."""
    plain = {record.key: record for record in records if record.policy == "plain"}
    plain_speed = _pooled_speed(list(plain.values()))
    names = dict.fromkeys(record.policy for record in records)
    return [_summary([record for record in records if record.policy == name], plain, plain_speed) for name in names]


def _summary(records: Sequence[Record], plain: dict[tuple[int, int], Record], plain_speed: float | None) -> Summary:
    n_tokens = sum(len(record.tokens) for record in records)
    decoded = sum(max(0, len(record.tokens) - 1) for record in records)  # without each one's first
    speed = _pooled_speed(records)
    intervals = [interval for record in records for interval in record.intervals_ms]
    pairs = [(record, plain[record.key]) for record in records if record.key in plain]
    promised = all(record.acceptance == "coupled" or record.temperature == 0 for record in records)

    def per_token(total: int) -> float | None:
        return total / decoded if decoded else None

    rounds = sum(record.rounds for record in records)
    return Summary(
        policy=records[0].policy,
        n=len(records),
        n_tokens=n_tokens,
        tokens_per_s=spread(record.tokens_per_s for record in records if record.tokens_per_s),
        all_tokens_per_s=speed,
        speed_up=speed / plain_speed if speed and plain_speed else None,
        speed_ups=spread(
            one.tokens_per_s / other.tokens_per_s for one, other in pairs if one.tokens_per_s and other.tokens_per_s
        ),
        ttft_ms=spread(record.ttft_ms for record in records),
        itl_p50_ms=percentile(intervals, 0.5),
        itl_p99_ms=percentile(intervals, 0.99),
        proposed=sum(record.proposed for record in records),
        accepted=sum(record.accepted for record in records),
        by_depth=pooled_depths(records),
        mean_acceptance_length=decoded / rounds if rounds else None,
        rows_per_token=per_token(sum(record.verified_rows for record in records)),
        wasted_per_token=per_token(sum(record.wasted_rows for record in records)),
        stale_per_token=per_token(sum(record.stale for record in records)),
        drafted_per_token=per_token(sum(record.drafted for record in records)),
        wire_bytes_per_token=_wire_bytes_per_token(records),
        stages_ms_per_token={
            stage: sum(record.stages_ms.get(stage, 0.0) for record in records) / max(1, n_tokens) for stage in STAGES
        },
        same=sum(one.tokens == other.tokens for one, other in pairs) if promised and pairs else None,
        compared=len(pairs),
    )


def pooled_depths(records: Iterable[Record]) -> tuple[tuple[int, int], ...]:
    """(verified, accepted) for each depth, summed."""
    sums: list[list[int]] = []
    for record in records:
        for depth, (verified, accepted) in enumerate(record.by_depth):
            if depth == len(sums):
                sums.append([0, 0])
            sums[depth][0] += verified
            sums[depth][1] += accepted
    return tuple((verified, accepted) for verified, accepted in sums)


def _turns(records: Iterable[Record]) -> list[Record]:
    """One record of each turn."""
    return list({record.turn: record for record in records}.values())


def _pooled_speed(records: Sequence[Record]) -> float | None:
    """Tokens over busy time, of turns that decoded at all."""
    turns = [record for record in _turns(records) if record.turn_busy_s > 0]
    seconds = sum(turn.turn_busy_s for turn in turns)
    return sum(turn.turn_tokens for turn in turns) / seconds if seconds else None


def _wire_bytes_per_token(records: Sequence[Record]) -> float | None:
    turns = [(turn.turn_wire_bytes, turn.turn_tokens) for turn in _turns(records) if turn.turn_wire_bytes is not None]
    tokens = sum(n for _, n in turns)
    return sum(n_bytes for n_bytes, _ in turns) / tokens if tokens else None


# --- one line for each completion -------------------------------------------------------------------------------------

_LEFT_OUT = ("prompt_tokens", "tokens", "intervals_ms", "stages_ms", "by_depth")
CSV_COLUMNS = (
    *(f.name for f in fields(Record) if f.name not in _LEFT_OUT),
    "n_prompt_tokens",
    "n_tokens",
    "acceptance_rate",
    "verified_rows",
    "wasted_rows",
    "itl_p50_ms",
    "itl_p99_ms",
    *(f"{stage}_ms" for stage in STAGES),
    "speed_up",
    "same_as_plain",
)


def csv_rows(records: Sequence[Record]) -> list[dict[str, object]]:
    """Completions of any scenes, by CSV_COLUMNS; a cell is empty where there is nothing to tell."""
    plain = {(record.scene, *record.key): record for record in records if record.policy == "plain"}
    rows = []
    for record in records:
        other = plain.get((record.scene, *record.key))
        row: dict[str, object] = {f.name: getattr(record, f.name) for f in fields(Record) if f.name not in _LEFT_OUT}
        row |= {f"{stage}_ms": record.stages_ms.get(stage, 0.0) for stage in STAGES}
        row |= {
            "n_prompt_tokens": len(record.prompt_tokens),
            "n_tokens": len(record.tokens),
            "acceptance_rate": record.acceptance_rate,
            "verified_rows": record.verified_rows,
            "wasted_rows": record.wasted_rows,
            "itl_p50_ms": percentile(record.intervals_ms, 0.5),
            "itl_p99_ms": percentile(record.intervals_ms, 0.99),
            "speed_up": record.tokens_per_s / other.tokens_per_s if other and other.tokens_per_s else None,
            "same_as_plain": None if other is None else record.tokens == other.tokens,
        }
        rows.append({name: "" if row[name] is None else row[name] for name in CSV_COLUMNS})
    return rows
