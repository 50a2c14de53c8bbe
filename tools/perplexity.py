"""`draftwire perplexity`: how well a model predicts a text, and how closely two engines agree on it.

Texts are tokenized as plain text and cut into chunks: the document-start token (BOS), which the embedded models were
trained with before each document, and the next `chunk - 1` tokens of one text. Each chunk is computed from an empty
slot, and *every* token of text is scored, once, as in the model card (llama.cpp scores the second half of each window
only, so its figures are lower). A vocabulary without BOS leaves the first token of each chunk unscored. Chunks do not
reach over the end of a text.

Invariant: two engines are given the same passes, so what they differ in is the engine alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from shared.engine.interface import Chunk, Engine, EngineInfo, EngineSettings, Float32, Int32, Logits
from shared.engine.registry import load_engine
from shared.errors import EngineError, SettingsError
from shared.model.names import load_prompts, resolve_model
from shared.model.vocabulary import Vocabulary

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error, as if all values were independent of each other."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Float64) -> Estimate:
        return cls(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)))

    def exp(self) -> Estimate:
        """Of exp(x), the error to first order."""
        with np.errstate(over="ignore"):
            mean = float(np.exp(self.mean))
        return Estimate(mean, mean * self.error)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an engine's distributions differ from those of a reference, over the scored tokens.

    nll: the reference's own, in nats a token.
    kl: KL(reference || engine), nats a token; kl_median, kl_99 (percentile) and kl_most of the single tokens.
    same_top: share of the positions at which both have the same best token.
    ratio: the engine's perplexity over the reference's.
    """

    info: EngineInfo
    nll: Estimate
    seconds: float
    kl: Estimate
    kl_median: float
    kl_99: float
    kl_most: float
    same_top: Estimate
    ratio: Estimate


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """What was measured.

    n_tokens: scored tokens, as many as were computed; n_bytes: of text that they stand for.
    nll: negative log likelihood, nats a token.
    seconds: in the engine, the reading of its logits included, without loading.
    """

    info: EngineInfo
    source: str
    n_texts: int
    chunk: int
    n_chunks: int
    n_tokens: int
    n_bytes: int
    nll: Estimate
    load_seconds: float
    seconds: float
    against: Agreement | None

    @property
    def perplexity(self) -> Estimate:
        return self.nll.exp()

    @property
    def bits_per_token(self) -> float:
        return self.nll.mean / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        return self.bits_per_token * self.n_tokens / self.n_bytes

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens / self.seconds


def measure_perplexity(
    settings: EngineSettings,
    *,
    path: Path | None = None,
    chunk: int = 1024,
    limit: int = 0,
    against: str = "",
    console: Console | None = None,
    load: Callable[[EngineSettings], Engine] = load_engine,
) -> PerplexityResult:
    """Score a text with an engine, and compare it with another one.

    Args:
        settings: of the engine; one slot is enough and is what it gets.
        path: a text, or with the ending .jsonl an object with "text" on each line; None: the embedded prompts.
        chunk: most tokens of a chunk, the document-start token included.
        limit: most tokens of text, from the beginning; 0: all.
        against: the engine to compare with, on the same model and settings; empty: none.
        console: where a progress bar may be drawn.
        load: builds an engine.

    Raises:
        EngineError: no text (empty_text), less than two tokens to score (too_few_tokens), a chunk that the engine's
            context cannot hold (context_exceeded), an engine that is unknown, unavailable or refuses its settings.
        SettingsError: the file cannot be read.
        ModelError: the model's file is missing or damaged.
    """
    if chunk < 2 or limit < 0:
        raise EngineError(f"chunk is {chunk}, limit {limit}", "chunk starts at 2, limit at 0", "bad_settings")
    if "null" in (settings.engine, against):
        raise EngineError("the null engine has no model to measure", "use another engine", "bad_settings")
    source = str(path) if path is not None else "embedded prompts"
    texts = [text for text in read_texts(path) if text]
    if not texts:
        raise EngineError(f"{source}: there is no text in it", "give a file with text", "empty_text")
    vocabulary = Vocabulary.open(resolve_model(settings.model))
    encoded = (vocabulary.encode(text, parse_special=False, add_bos=False) for text in texts)
    chunks, n_texts = cut_chunks(encoded, vocabulary.bos_id, chunk, limit)
    n_tokens = sum(len(tokens) - 1 for tokens in chunks)
    if n_tokens < 2:
        raise EngineError(
            f"{source}: {n_tokens} tokens to score are too few, a standard error needs 2",
            "give more text, or raise --limit",
            "too_few_tokens",
        )
    with ExitStack() as stack:
        started = time.perf_counter()
        engine = load(replace(settings, n_slots=1))
        stack.callback(engine.close)
        load_seconds = time.perf_counter() - started
        engines = [engine]
        if against:
            engines.append(load(replace(settings, n_slots=1, engine=against)))
            stack.callback(engines[1].close)
        for info in (engine.info for engine in engines):
            if max(map(len, chunks)) > info.n_ctx:
                raise EngineError(
                    f"a chunk of {max(map(len, chunks))} tokens is longer than the {info.n_ctx} of the {info.engine} "
                    "engine's context",
                    f"give --chunk {info.n_ctx}, or --set verifier.engine.n_ctx=N",
                    "context_exceeded",
                )
        scores = _score(engines, chunks, n_tokens, console)
        info = engine.info
        reference = engines[1].info if against else None
    nll = [np.array(values) for values in scores.nll]
    return PerplexityResult(
        info=info,
        source=source,
        n_texts=n_texts,
        chunk=chunk,
        n_chunks=len(chunks),
        n_tokens=n_tokens,
        n_bytes=sum(len(vocabulary.token_bytes(int(token))) for tokens in chunks for token in tokens[1:]),
        nll=Estimate.of(nll[0]),
        load_seconds=load_seconds,
        seconds=scores.seconds[0],
        against=None if reference is None else _agreement(reference, nll[0], nll[1], scores),
    )


def read_texts(path: Path | None) -> list[str]:
    """The texts of a file, see `measure_perplexity`, line ends and all. Errors: `SettingsError`."""
    if path is None:
        return [prompt.text for prompt in load_prompts()]
    try:
        whole = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror or error}", "give a file with text") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is no UTF-8 text: byte {error.start}", "convert it to UTF-8") from None
    if path.suffix != ".jsonl":
        return [whole]
    texts = []
    for number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise SettingsError(f"{path}:{number}: no JSON: {error}", 'each line is {"text": "..."}') from None
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise SettingsError(f'{path}:{number}: not an object with "text"', 'each line is {"text": "..."}')
        texts.append(entry["text"])
    return texts


def cut_chunks(texts: Iterable[Int32], start: int | None, size: int, limit: int = 0) -> tuple[list[Int32], int]:
    """The chunks to compute, and of how many texts they are. In each all tokens but the first are to be scored.

    Args:
        texts: token ids of each.
        start: the document-start token, put before every chunk; None: there is none.
        size: most tokens of a chunk. limit: most tokens of text; 0: all.
    """
    head = np.array([] if start is None else [start], np.int32)
    width = size - len(head)
    left = limit or None
    chunks: list[Int32] = []
    n_texts = 0
    for text in texts:
        tokens = text[:left]
        pieces = [np.concatenate([head, tokens[i : i + width]]) for i in range(0, len(tokens), width)]
        pieces = [piece for piece in pieces if len(piece) > 1]
        chunks += pieces
        n_texts += bool(pieces)
        if left is not None:
            left -= len(tokens)
            if left == 0:
                break
    return chunks, n_texts


class _Scores:
    """What is collected: nll, its total and seconds for each engine; nll, kl and same_top token by token."""

    def __init__(self, n_engines: int) -> None:
        self.nll: list[list[float]] = [[] for _ in range(n_engines)]
        self.total = [0.0] * n_engines
        self.seconds = [0.0] * n_engines
        self.kl: list[float] = []
        self.same_top: list[bool] = []


def _score(engines: Sequence[Engine], chunks: Sequence[Int32], n_tokens: int, console: Console | None) -> _Scores:
    scores = _Scores(len(engines))
    step = min(engine.info.n_batch for engine in engines)
    hidden = console is None or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("perplexity", total=n_tokens)
        for tokens in chunks:
            for engine in engines:
                engine.truncate(0, 0)
            for first in range(0, len(tokens) - 1, step):
                part, following = tokens[first : min(first + step, len(tokens) - 1)], tokens[first + 1 :]
                passes = []
                for i, engine in enumerate(engines):
                    started = time.perf_counter()
                    logits = engine.forward([Chunk(0, first, part, len(part))])
                    nll = _negative_log_likelihoods(logits, following[: len(part)])
                    scores.seconds[i] += time.perf_counter() - started
                    scores.nll[i] += nll.tolist()
                    scores.total[i] += float(nll.sum())
                    if not np.isfinite(nll).all():
                        raise EngineError(f"the {engine.info.engine} engine's logits are not finite", code="bad_logits")
                    passes.append(logits)
                if len(passes) == 2:
                    scores.kl += [kl_divergence(passes[1].dense(row), passes[0].dense(row)) for row in range(len(part))]
                    scores.same_top += (passes[0].top(1)[0][:, 0] == passes[1].top(1)[0][:, 0]).tolist()
                bits = scores.total[0] / len(scores.nll[0]) / math.log(2)
                progress.update(bar, advance=len(part), description=f"{bits:.4f} bits a token")
    return scores


def _negative_log_likelihoods(logits: Logits, following: Int32) -> Float64:
    """Of the token that follows each row: [n_rows] float64."""
    chosen = [float(logits.gather(row, following[row : row + 1])[0]) for row in range(len(following))]
    out: Float64 = logits.log_sum_exp() - np.array(chosen)
    return out


def kl_divergence(reference: Float32, other: Float32) -> float:
    """KL(reference || other) in nats, of the distributions that two rows of logits mean, in float64."""
    p, q = _log_softmax(reference), _log_softmax(other)
    possible = np.isfinite(p)
    return max(0.0, float(np.sum(np.exp(p[possible]) * (p[possible] - q[possible]))))


def _log_softmax(logits: Float32) -> Float64:
    shifted = logits.astype(np.float64) - float(logits.max())
    out: Float64 = shifted - np.log(np.exp(shifted).sum())
    return out


def _agreement(info: EngineInfo, nll: Float64, reference_nll: Float64, scores: _Scores) -> Agreement:
    kl = np.array(scores.kl)
    return Agreement(
        info=info,
        nll=Estimate.of(reference_nll),
        seconds=scores.seconds[1],
        kl=Estimate.of(kl),
        kl_median=float(np.median(kl)),
        kl_99=float(np.percentile(kl, 99)),
        kl_most=float(kl.max()),
        same_top=Estimate.of(np.array(scores.same_top, np.float64)),
        ratio=Estimate.of(nll - reference_nll).exp(),
    )


def perplexity_lines(result: PerplexityResult) -> list[str]:
    """The result for people: one line, and two more for a comparison."""
    info, ppl = result.info, result.perplexity
    lines = [
        f"{info.model} ({info.engine}): perplexity {ppl.mean:.4f} +/- {ppl.error:.4f}, "
        f"{result.bits_per_token:.4f} bits a token, {result.bits_per_byte:.4f} bits a byte; "
        f"{result.n_tokens:,} tokens scored ({result.source}: {_count(result.n_texts, 'text')}, "
        f"{_count(result.n_chunks, 'chunk')} of at most {result.chunk}), {result.tokens_per_second:,.0f} tokens/s"
    ]
    if result.against is not None:
        other = result.against
        name, reference = other.info.engine, other.nll.exp()
        lines += [
            f"against {name}: its perplexity {reference.mean:.4f} +/- {reference.error:.4f}, "
            f"{result.n_tokens / other.seconds:,.0f} tokens/s; "
            f"perplexity ratio {other.ratio.mean:.5f} +/- {other.ratio.error:.5f}",
            f"KL({name} || {info.engine}): mean {other.kl.mean:.6f} +/- {other.kl.error:.6f} nats, "
            f"median {other.kl_median:.6f}, 99 % {other.kl_99:.6f}, most {other.kl_most:.6f}; "
            f"same top token {100 * other.same_top.mean:.3f} +/- {100 * other.same_top.error:.3f} %",
        ]
    return lines


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def perplexity_json(result: PerplexityResult) -> dict[str, Any]:
    """The result for programs: the fields of `PerplexityResult`, with what follows from them."""
    out = asdict(result)
    out["perplexity"] = asdict(result.perplexity)
    for name in ("bits_per_token", "bits_per_byte", "tokens_per_second"):
        out[name] = getattr(result, name)
    if result.against is not None:
        out["against"]["perplexity"] = asdict(result.against.nll.exp())
        out["against"]["tokens_per_second"] = result.n_tokens / result.against.seconds
    return out
