"""Measuring an engine by itself: the code behind `draftwire bench engine`.

What the pipeline needs to know of an engine is how its cost grows with the rows of a step, so that is measured: one
forward pass of n rows, all n rows' logits wanted, at a given length of context. Every pass is repeated with the others
in turn, so that a machine that slows down slows all of them down alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from shared.engine.interface import Chunk, Engine, EngineInfo, EngineSettings, Int32
from shared.engine.registry import load_engine
from shared.errors import EngineError

READ_TOP = 128  # what a verifier reads of each row


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one quantity."""

    median: float
    least: float
    most: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class RowCost:
    """One forward pass of `rows` tokens of a session.

    forward_ms: the pass itself.
    read_ms: taking the top 128 and the log-sum-exp of every row; for an engine on a device, also waiting for it.
    relative: median of both together, relative to one row's.
    """

    rows: int
    forward_ms: Spread
    read_ms: Spread
    relative: float


@dataclass(frozen=True, slots=True)
class EngineBench:
    """What was measured.

    context: tokens in the cache before each pass of `rows` and before decoding.
    prefill_tokens: length of the prompt behind `prefill_per_second`.
    decode_per_second: greedy decoding of `decode_tokens` tokens, one row a pass, the choice of the token included.
    """

    info: EngineInfo
    threads: int
    load_seconds: float
    context: int
    prefill_tokens: int
    prefill_per_second: Spread
    decode_tokens: int
    decode_per_second: Spread
    rows: tuple[RowCost, ...]


def bench_engine(
    settings: EngineSettings,
    *,
    context: int = 256,
    prefill_tokens: int = 512,
    decode_tokens: int = 32,
    rows: Sequence[int] = tuple(range(1, 17)),
    repeats: int = 7,
    load: Callable[[EngineSettings], Engine] = load_engine,
) -> EngineBench:
    """Load an engine, measure it and close it.

    Args:
        context: tokens in the cache before each measured pass, >= 1.
        rows: how many rows to measure; 1 is added where it is missing.
        repeats: measurements of everything, after one that does not count.
        load: builds the engine.

    The prompt is pseudo-random; what is decoded and verified is the model's own greedy continuation, so that expert
    selection is as it is in use.

    Raises:
        EngineError: the sizes do not fit the engine's context or batch.
    """
    rows = sorted({1, *rows})
    if context < 1 or prefill_tokens < 1 or decode_tokens < 1 or repeats < 1 or rows[0] < 1:
        raise EngineError("context, prefill, decode tokens, rows and repeats all start at 1", code="bad_settings")
    started = time.perf_counter()
    engine = load(settings)
    load_seconds = time.perf_counter() - started
    try:
        info = engine.info
        n_tokens = max(decode_tokens, rows[-1])
        if max(prefill_tokens, context + n_tokens) > info.n_ctx or rows[-1] > info.n_batch:
            raise EngineError(
                f"{context} + {n_tokens} and {prefill_tokens} tokens, {rows[-1]} rows do not fit an engine with "
                f"{info.n_ctx} tokens of context and {info.n_batch} a batch",
                "raise n_ctx or n_batch, or measure less",
                "context_exceeded",
            )
        prompt = np.random.default_rng(0).integers(0, info.n_vocab, max(prefill_tokens, context)).astype(np.int32)
        prefill_seconds = [_prefill(engine, prompt[:prefill_tokens]) for _ in range(repeats + 1)][1:]
        _prefill(engine, prompt[:context])
        continuation = _decode(engine, context, int(prompt[context - 1]), n_tokens)
        decode_seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            _decode(engine, context, int(prompt[context - 1]), decode_tokens)
            decode_seconds.append(time.perf_counter() - started)
        costs = _row_costs(engine, context, continuation, rows, repeats)
    finally:
        engine.close()
    return EngineBench(
        info=info,
        threads=settings.threads,
        load_seconds=load_seconds,
        context=context,
        prefill_tokens=prefill_tokens,
        prefill_per_second=Spread.of([prefill_tokens / seconds for seconds in prefill_seconds]),
        decode_tokens=decode_tokens,
        decode_per_second=Spread.of([decode_tokens / seconds for seconds in decode_seconds]),
        rows=costs,
    )


def _prefill(engine: Engine, tokens: Int32) -> float:
    """Seconds to compute `tokens` from an empty slot 0, the last row's logits wanted."""
    engine.truncate(0, 0)
    n_batch = engine.info.n_batch
    started = time.perf_counter()
    for first in range(0, len(tokens), n_batch):
        part = tokens[first : first + n_batch]
        last = first + len(part) == len(tokens)
        logits = engine.forward([Chunk(0, first, part, int(last))])
    logits.top(1)
    return time.perf_counter() - started


def _decode(engine: Engine, start: int, last: int, n: int) -> Int32:
    """The `n` tokens that greedily follow the first `start` tokens of slot 0, of which `last` is the last one."""
    out = np.empty(n, np.int32)
    token = np.array([last], np.int32)
    for i in range(n):
        ids, _ = engine.forward([Chunk(0, start - 1 + i, token, 1)]).top(1)
        out[i] = ids[0, 0]
        token = out[i : i + 1]
    return out


def _row_costs(engine: Engine, context: int, tokens: Int32, rows: Sequence[int], repeats: int) -> tuple[RowCost, ...]:
    forward: dict[int, list[float]] = {n: [] for n in rows}
    read: dict[int, list[float]] = {n: [] for n in rows}
    for repeat in range(repeats + 1):
        for n in rows:
            engine.truncate(0, context)
            started = time.perf_counter()
            logits = engine.forward([Chunk(0, context, tokens[:n], n)])
            computed = time.perf_counter()
            logits.top(READ_TOP)
            logits.log_sum_exp()
            done = time.perf_counter()
            if repeat:
                forward[n].append((computed - started) * 1e3)
                read[n].append((done - computed) * 1e3)
    total = {n: median(a + b for a, b in zip(forward[n], read[n], strict=True)) for n in rows}
    return tuple(RowCost(n, Spread.of(forward[n]), Spread.of(read[n]), total[n] / total[1]) for n in rows)


def engine_table(bench: EngineBench) -> Table:
    """The cost of n rows as a table, with what else was measured above it."""
    info = bench.info
    prefill, decode = bench.prefill_per_second, bench.decode_per_second
    table = Table(
        title=(
            f"{info.engine}: {info.model} ({info.architecture}), loaded in {bench.load_seconds:.2f} s\n"
            f"prefill of {bench.prefill_tokens}: {_spread(prefill, 0)} tokens/s; "
            f"decode at {bench.context}: {_spread(decode, 1)} tokens/s"
        ),
        caption=f"median (least to most) of {bench.rows[0].forward_ms.n} runs, after {bench.context} tokens of context",
    )
    for heading in ("rows", "forward ms", f"read top {READ_TOP} ms", "relative", "rows/s"):
        table.add_column(heading, justify="right")
    for cost in bench.rows:
        total = cost.forward_ms.median + cost.read_ms.median
        table.add_row(
            str(cost.rows),
            _spread(cost.forward_ms, 2),
            _spread(cost.read_ms, 2),
            f"{cost.relative:.2f}",
            f"{cost.rows / total * 1e3:.0f}",
        )
    return table


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.least:.{digits}f} to {spread.most:.{digits}f})"


def print_engine_bench(bench: EngineBench, console: Console | None = None) -> None:
    """Print the table."""
    (console or Console()).print(engine_table(bench))
