"""Measuring an engine by itself: the code behind `draftwire bench engine`.

What the pipeline needs to know of an engine is how its cost grows with the rows of a step, so that is measured: one
forward pass of n rows, all n rows' logits wanted, at a given length of context. Every pass is repeated with the others
in turn, so that a machine that slows down slows all of them down alike. An engine on a device may return from a pass
before it is computed: what counts is the time until its logits have been read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from shared.engine.interface import Chunk, Engine, EngineInfo, EngineSettings, Int32
from shared.engine.registry import load_engine
from shared.errors import EngineError, SettingsError

READ_TOP = 128  # what a verifier reads of each row
MOST_SIZES = 1024


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
    total_ms: both together.
    relative: median of total_ms, relative to one row's.
    """

    rows: int
    forward_ms: Spread
    read_ms: Spread
    total_ms: Spread
    relative: float


@dataclass(frozen=True, slots=True)
class ContextCost:
    """What was measured with `context` tokens in the cache.

    decode_per_second: greedy decoding from there on, one row a pass, the choice of the token included.
    """

    context: int
    decode_per_second: Spread
    rows: tuple[RowCost, ...]


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """A prompt of `tokens`, computed from an empty cache in passes of n_batch, the last row's best token read."""

    tokens: int
    per_second: Spread


@dataclass(frozen=True, slots=True)
class EngineBench:
    """What was measured. decode_tokens: how many were decoded in each measurement of `decode_per_second`."""

    info: EngineInfo
    threads: int
    load_seconds: float
    decode_tokens: int
    prefills: tuple[PrefillCost, ...]
    contexts: tuple[ContextCost, ...]


def bench_engine(
    settings: EngineSettings,
    *,
    contexts: Sequence[int] = (256,),
    prefills: Sequence[int] = (512,),
    decode_tokens: int = 32,
    rows: Sequence[int] = tuple(range(1, 17)),
    repeats: int = 7,
    random_tokens: bool = False,
    load: Callable[[EngineSettings], Engine] = load_engine,
) -> EngineBench:
    """Load an engine, measure it and close it.

    Args:
        contexts: tokens in the cache before each measured pass; 0 is an empty cache.
        prefills: lengths of prompts.
        rows: how many rows to measure; 1 is added where it is missing.
        repeats: measurements of everything, after one that does not count.
        random_tokens: passes of rows take fresh random tokens, for models with random weights: their continuation
            repeats itself, and so do its experts.
        load: builds the engine.

    The prompt is pseudo-random; what is decoded and, unless told otherwise, verified is the model's own greedy
    continuation, so that expert selection is as it is in use.

    Raises:
        EngineError: the sizes do not fit the engine's context or batch.
    """
    rows = sorted({1, *rows})
    if not contexts or not prefills or min(contexts) < 0:
        raise EngineError("there must be contexts and prefills, and contexts start at 0", code="bad_settings")
    if min(*prefills, decode_tokens, repeats, rows[0]) < 1:
        raise EngineError("prefill, decode tokens, rows and repeats all start at 1", code="bad_settings")
    started = time.perf_counter()
    engine = load(settings)
    load_seconds = time.perf_counter() - started
    try:
        info = engine.info
        n_tokens = max(decode_tokens, rows[-1])
        if max(*prefills, max(contexts) + n_tokens) > info.n_ctx or rows[-1] > info.n_batch:
            raise EngineError(
                f"{max(contexts)} + {n_tokens} and {max(prefills)} tokens, {rows[-1]} rows do not fit an engine with "
                f"{info.n_ctx} tokens of context and {info.n_batch} a batch",
                "raise n_ctx or n_batch, or measure less",
                "context_exceeded",
            )
        prompt = np.random.default_rng(0).integers(0, info.n_vocab, max(*prefills, *contexts)).astype(np.int32)
        prefill_costs = _prefill_costs(engine, prompt, prefills, repeats)
        context_costs = tuple(
            _context_cost(engine, prompt[:context], decode_tokens, n_tokens, rows, repeats, random_tokens)
            for context in contexts
        )
    finally:
        engine.close()
    return EngineBench(info, settings.threads, load_seconds, decode_tokens, prefill_costs, context_costs)


def _prefill_costs(engine: Engine, prompt: Int32, lengths: Sequence[int], repeats: int) -> tuple[PrefillCost, ...]:
    per_second: dict[int, list[float]] = {n: [] for n in lengths}
    for repeat in range(repeats + 1):
        for n, values in per_second.items():
            started = time.perf_counter()
            _prefill(engine, prompt[:n])
            if repeat:
                values.append(n / (time.perf_counter() - started))
    return tuple(PrefillCost(n, Spread.of(values)) for n, values in per_second.items())


def _context_cost(
    engine: Engine,
    prompt: Int32,
    decode_tokens: int,
    n_tokens: int,
    rows: Sequence[int],
    repeats: int,
    random_tokens: bool,
) -> ContextCost:
    """Decoding and passes of rows after `prompt`; the greedy continuation is `n_tokens` long."""
    context = len(prompt)
    first = _prefill(engine, prompt)
    continuation = np.concatenate([first, _decode(engine, context, first, n_tokens)])
    per_second = []
    for _ in range(repeats):
        engine.truncate(0, context)
        started = time.perf_counter()
        _decode(engine, context, first, decode_tokens)
        per_second.append(decode_tokens / (time.perf_counter() - started))
    rng = np.random.default_rng(1)

    def draw(n: int) -> Int32:
        return rng.integers(0, engine.info.n_vocab, n).astype(np.int32) if random_tokens else continuation[:n]

    return ContextCost(context, Spread.of(per_second), _row_costs(engine, context, draw, rows, repeats))


def _prefill(engine: Engine, tokens: Int32) -> Int32:
    """Compute `tokens` from an empty slot 0; the token that follows greedily, as [1] (after no tokens: id 0)."""
    engine.truncate(0, 0)
    following: Int32 = np.zeros(1, np.int32)
    n_batch = engine.info.n_batch
    for first in range(0, len(tokens), n_batch):
        part = tokens[first : first + n_batch]
        last = first + len(part) == len(tokens)
        logits = engine.forward([Chunk(0, first, part, int(last))])
        if last:
            following = logits.top(1)[0][0].copy()
    return following


def _decode(engine: Engine, context: int, token: Int32, n: int) -> Int32:
    """The `n` tokens that greedily follow `token`, which comes after the first `context` tokens of slot 0."""
    out = np.empty(n, np.int32)
    for i in range(n):
        ids, _ = engine.forward([Chunk(0, context + i, token, 1)]).top(1)
        out[i] = ids[0, 0]
        token = out[i : i + 1]
    return out


def _row_costs(
    engine: Engine, context: int, draw: Callable[[int], Int32], rows: Sequence[int], repeats: int
) -> tuple[RowCost, ...]:
    forward: dict[int, list[float]] = {n: [] for n in rows}
    read: dict[int, list[float]] = {n: [] for n in rows}
    for repeat in range(repeats + 1):
        for n in rows:
            engine.truncate(0, context)
            tokens = draw(n)
            started = time.perf_counter()
            logits = engine.forward([Chunk(0, context, tokens, n)])
            computed = time.perf_counter()
            logits.top(READ_TOP)
            logits.log_sum_exp()
            done = time.perf_counter()
            if repeat:
                forward[n].append((computed - started) * 1e3)
                read[n].append((done - computed) * 1e3)
    total = {n: Spread.of([a + b for a, b in zip(forward[n], read[n], strict=True)]) for n in rows}
    return tuple(
        RowCost(n, Spread.of(forward[n]), Spread.of(read[n]), total[n], total[n].median / total[1].median) for n in rows
    )


def parse_sizes(option: str, text: str, least: int = 1) -> tuple[int, ...]:
    """The numbers of a list such as "1-4,8,16", ascending, each once.

    Raises:
        SettingsError: naming `option`: no such list, a number below `least`, a range that runs backwards, too many.
    """
    sizes: set[int] = set()
    for part in text.split(","):
        low, dash, high = (piece.strip() for piece in part.partition("-"))
        ends = [low, high] if dash else [low, low]
        if not all(end.isascii() and end.isdigit() and len(end) < 10 for end in ends):
            raise SettingsError(f"{option} is {text!r}", "numbers and ranges, such as 1,2,4 or 1-8,16")
        first, last = map(int, ends)
        if first < least or last < first or last - first >= MOST_SIZES:
            raise SettingsError(
                f"{option} is {text!r}", f"numbers from {least}, ranges upwards, of at most {MOST_SIZES} numbers"
            )
        sizes.update(range(first, last + 1))
    return tuple(sorted(sizes))


def engine_tables(bench: EngineBench) -> list[Table]:
    """The cost of n rows, a table for each context."""
    tables = []
    for cost in bench.contexts:
        table = Table(
            title=(
                f"after {cost.context} tokens of context: "
                f"decoding {bench.decode_tokens}, {_spread(cost.decode_per_second, 1)} tokens/s"
            ),
            caption=(
                f"medians (least to most) of {cost.decode_per_second.n} runs; read: top {READ_TOP} and log-sum-exp of "
                "each row"
            ),
        )
        for heading in ("rows", "forward ms", "read ms", "total ms", "relative", "rows/s"):
            table.add_column(heading, justify="right")
        for row in cost.rows:
            table.add_row(
                str(row.rows),
                f"{row.forward_ms.median:.2f}",
                f"{row.read_ms.median:.2f}",
                _spread(row.total_ms, 2),
                f"{row.relative:.2f}",
                f"{row.rows / row.total_ms.median * 1e3:.0f}",
            )
        tables.append(table)
    return tables


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.least:.{digits}f} to {spread.most:.{digits}f})"


def print_engine_bench(bench: EngineBench, console: Console | None = None) -> None:
    """Print what was measured."""
    console = console or Console(markup=False, highlight=False)
    info = bench.info
    console.print(f"{info.engine}: {info.model} ({info.architecture}), loaded in {bench.load_seconds:.2f} s")
    for prefill in bench.prefills:
        console.print(f"prefill of {prefill.tokens}: {_spread(prefill.per_second, 0)} tokens/s")
    for table in engine_tables(bench):
        console.print(table)


def write_json(path: Path, bench: EngineBench | None) -> None:
    """Write all figures to a file; None only makes sure that it can be written. Errors: `SettingsError`."""
    try:
        with path.open("a" if bench is None else "w", encoding="utf-8") as file:
            if bench is not None:
                json.dump(asdict(bench), file, indent=2)
                file.write("\n")
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}", "give --json another file") from None
