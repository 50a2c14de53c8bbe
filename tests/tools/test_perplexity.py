"""`draftwire perplexity`: its figures against independent computations, what it prints, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats

from shared.engine.dense import DenseLogits
from shared.engine.ik import ik_unavailable
from shared.engine.interface import Chunk, EngineSettings
from shared.engine.null import NullEngine
from shared.engine.numpy.engine import NumpyEngine
from shared.engine.registry import load_engine
from shared.errors import EngineError, SettingsError
from shared.model.names import load_prompts, resolve_model
from shared.model.vocabulary import Vocabulary
from tools.perplexity import (
    PerplexityResult,
    cut_chunks,
    kl_divergence,
    measure_perplexity,
    perplexity_json,
    perplexity_lines,
    read_texts,
)

ROOT = Path(__file__).resolve().parents[2]
NUMPY = EngineSettings(engine="numpy", model="embedded:draft", n_ctx=64, n_batch=7)
TEXTS = ("def add(a, b):\n    return a + b\n", "import os\n\nprint(os.getcwd(), 'é')  # <|endoftext|>\n", "x")
needs_ik = pytest.mark.skipif(ik_unavailable() is not None, reason=f"{ik_unavailable()}")


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS))
    return path


def encode(text: str, model: str = "embedded:draft") -> list[int]:
    vocabulary = Vocabulary.open(resolve_model(model))
    return vocabulary.encode(text, parse_special=False, add_bos=False).tolist()


def independent_nll(settings: EngineSettings, texts: list[str], chunk: int) -> np.ndarray:
    """Each text token's negative log likelihood after token 0 and what precedes it in its piece, in float64."""
    engine = load_engine(replace(settings, n_slots=1))
    out = []
    for text in texts:
        tokens = encode(text, settings.model)
        while tokens:
            piece, tokens = [0, *tokens[: chunk - 1]], tokens[chunk - 1 :]
            engine.truncate(0, 0)
            for at in range(0, len(piece) - 1, settings.n_batch):
                part = np.array(piece[at : at + settings.n_batch], np.int32)[: len(piece) - 1 - at]
                logits = engine.forward([Chunk(0, at, part, len(part))])
                for row in range(len(part)):
                    dense = logits.dense(row).astype(np.float64)
                    out.append(scipy.special.logsumexp(dense) - dense[piece[at + row + 1]])
    engine.close()
    return np.array(out)


# --- the figures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 6, 64])
def test_perplexity_is_that_of_an_independent_computation(jsonl: Path, chunk: int) -> None:
    """Every token of every text is scored once, after BOS and what precedes it in its chunk; in any passes."""
    result = measure_perplexity(NUMPY, path=jsonl, chunk=chunk)
    nll = independent_nll(replace(NUMPY, n_batch=64), list(TEXTS), chunk)
    lengths = [len(encode(text)) for text in TEXTS]
    assert result.n_tokens == sum(lengths) == len(nll)
    assert result.n_chunks == sum(math.ceil(n / (chunk - 1)) for n in lengths)
    assert result.n_texts == 3
    assert result.n_bytes == sum(len(text.encode()) for text in TEXTS)
    assert result.nll.mean == pytest.approx(nll.mean(), rel=1e-6)
    assert result.nll.error == pytest.approx(scipy.stats.sem(nll), rel=1e-6)
    assert result.perplexity.mean == pytest.approx(math.exp(nll.mean()), rel=1e-6)
    assert result.perplexity.error == pytest.approx(math.exp(nll.mean()) * scipy.stats.sem(nll), rel=1e-6)
    assert result.bits_per_token == pytest.approx(nll.mean() / math.log(2))
    assert result.bits_per_byte == pytest.approx(nll.sum() / math.log(2) / result.n_bytes)


@needs_ik
def test_ik_scores_the_embedded_target() -> None:
    """Over the first 1,500 embedded tokens ik's perplexity is that of its own rows, and of the model card's order.

    The card's 4.11 is over windows of 1,024 tokens; a snippet's first tokens have little to go by.
    """
    settings = EngineSettings(engine="ik", model="embedded:target", threads=1)
    result = measure_perplexity(settings, limit=1500)
    texts = [prompt.text for prompt in load_prompts()]
    nll = independent_nll(settings, texts[: result.n_texts - 1], 1024)
    whole = measure_perplexity(settings, limit=len(nll))
    assert whole.nll.mean == pytest.approx(nll.mean(), abs=2e-3)  # ik's rows depend on where they lie in its cache
    assert result.n_tokens == 1500
    assert 4 < result.perplexity.mean < 6
    draft = measure_perplexity(replace(settings, model="embedded:draft"), limit=1500)
    assert result.perplexity.mean < draft.perplexity.mean


def test_an_engine_agrees_with_itself(jsonl: Path) -> None:
    """A row-invariant engine against itself: no divergence, all top tokens the same, ratio 1 without an error."""
    result = measure_perplexity(NUMPY, path=jsonl, against="numpy")
    other = result.against
    assert other is not None
    assert (other.kl.mean, other.kl_most, other.same_top.mean, other.ratio.mean) == (0, 0, 1, 1)
    assert other.ratio.error == 0
    assert other.nll == result.nll


class FakeEngine(NullEngine):
    """Its rows are normal noise of its own seed, scaled; passes as noted. One that is closed says so."""

    def __init__(self, settings: EngineSettings, seed: int, scale: float = 1.0) -> None:
        super().__init__(settings)
        self._rng = np.random.default_rng(seed)
        self._scale = scale
        self.rows: list[np.ndarray] = []
        self.passes: list[tuple[int, list[int]]] = []
        self.closed = False

    def forward(self, chunks: Any) -> Any:
        [chunk] = chunks
        super().forward(chunks)
        self.passes.append((chunk.start, chunk.tokens.tolist()))
        rows = (self._scale * self._rng.standard_normal((len(chunk.tokens), self.info.n_vocab))).astype(np.float32)
        self.rows += list(rows)
        return DenseLogits(rows)

    def close(self) -> None:
        self.closed = True


def test_agreement_is_that_of_an_independent_computation(jsonl: Path) -> None:
    """KL from the second engine to the first, its spread, same top tokens, and the paired ratio, as scipy has them."""
    engines = {
        "numpy": FakeEngine(replace(NUMPY, n_batch=5), 1),
        "ik": FakeEngine(NUMPY, 2, 0.5),
    }
    engines["ik"]._rng = np.random.default_rng(1)  # the same noise, half as large: the same top tokens
    result = measure_perplexity(NUMPY, path=jsonl, against="ik", load=lambda settings: engines[settings.engine])
    first, second = (np.stack(engines[name].rows).astype(np.float64) for name in ("numpy", "ik"))
    targets = [token for text in TEXTS for token in encode(text)]
    assert engines["numpy"].passes == engines["ik"].passes
    assert max(len(tokens) for _, tokens in engines["ik"].passes) == 5
    p, q = scipy.special.softmax(second, axis=1), scipy.special.softmax(first, axis=1)
    kl = scipy.special.rel_entr(p, q).sum(axis=1)
    nll, reference = (-scipy.special.log_softmax(x, axis=1)[np.arange(len(x)), targets] for x in (first, second))
    other = result.against
    assert other is not None
    assert other.kl.mean == pytest.approx(kl.mean())
    assert other.kl.error == pytest.approx(scipy.stats.sem(kl))
    assert (other.kl_median, other.kl_99, other.kl_most) == pytest.approx((*np.percentile(kl, [50, 99]), kl.max()))
    assert other.same_top.mean == 1
    assert other.ratio.mean == pytest.approx(result.perplexity.mean / other.nll.exp().mean)
    ratio = math.exp((nll - reference).mean())
    assert other.ratio.mean == pytest.approx(ratio, rel=1e-5)
    assert other.ratio.error == pytest.approx(ratio * scipy.stats.sem(nll - reference), rel=1e-5)
    assert all(engine.closed for engine in engines.values())


@needs_ik
def test_ik_and_numpy_agree() -> None:
    """On the same file ik rounds activations to 8 bits: a small divergence, nearly always the same top token."""
    settings = EngineSettings(engine="ik", model="embedded:draft", threads=1)
    result = measure_perplexity(settings, limit=600, against="numpy")
    assert result.against is not None
    assert result.against.info.engine == "numpy"
    assert 0 < result.against.kl.mean < 0.01
    assert 0.95 < result.against.same_top.mean <= 1
    assert result.against.ratio.mean == pytest.approx(1, abs=0.01)


def test_kl_divergence_of_impossible_tokens() -> None:
    """What the reference rules out costs nothing; what only the other rules out costs everything."""
    ruled_out = np.array([0, 1, -np.inf], np.float32)
    full = np.array([0, 1, 2], np.float32)
    expected = scipy.special.rel_entr(scipy.special.softmax([0.0, 1.0, -np.inf]), scipy.special.softmax([0.0, 1, 2]))
    assert kl_divergence(ruled_out, full) == pytest.approx(expected.sum())
    assert kl_divergence(full, ruled_out) == math.inf
    assert kl_divergence(full, full + np.float32(1000)) == pytest.approx(0, abs=1e-12)


# --- texts and chunks -------------------------------------------------------------------------------------------------


def cut(texts: list[list[int]], start: int | None, size: int, limit: int = 0) -> tuple[list[list[int]], int]:
    chunks, n_texts = cut_chunks([np.array(text, np.int32) for text in texts], start, size, limit)
    return [chunk.tolist() for chunk in chunks], n_texts


def test_chunks_begin_with_the_start_token_and_hold_one_text() -> None:
    """No chunk reaches into the next text, and every token of text stands in exactly one."""
    assert cut([[1, 2, 3, 4, 5], [], [6], [7, 8]], 0, 3) == ([[0, 1, 2], [0, 3, 4], [0, 5], [0, 6], [0, 7, 8]], 3)


def test_chunks_without_a_start_token() -> None:
    """Without BOS the first token of a chunk is context only, so that a chunk of one token is none."""
    assert cut([[1, 2, 3, 4], [5], [6, 7]], None, 3) == ([[1, 2, 3], [6, 7]], 2)


def test_the_limit_counts_tokens_of_text() -> None:
    """The first `limit` tokens count, wherever they end; texts behind them are not even tokenized."""

    def texts() -> Iterator[np.ndarray]:
        yield np.array([1, 2, 3], np.int32)
        yield np.array([4, 5, 6], np.int32)
        raise AssertionError

    chunks, n_texts = cut_chunks(texts(), 0, 10, 5)
    assert ([chunk.tolist() for chunk in chunks], n_texts) == ([[0, 1, 2, 3], [0, 4, 5]], 2)
    assert cut([[1, 2, 3], [4]], 0, 10, 3) == ([[0, 1, 2, 3]], 1)


def test_a_text_is_read_as_it_is(tmp_path: Path) -> None:
    """One text, its line ends untouched; without a file the embedded prompts."""
    (tmp_path / "text.txt").write_bytes("a\r\nb\né".encode())
    assert read_texts(tmp_path / "text.txt") == ["a\r\nb\né"]
    assert len(read_texts(None)) == 200


def test_lines_of_a_jsonl_are_texts(tmp_path: Path) -> None:
    """Empty lines are passed over; line separators that only Unicode knows do not end a line."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n{"id": 3, "text": ""}\n', "utf-8")
    assert read_texts(path) == ["a\u2028b", ""]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff", "is no UTF-8 text: byte 0"),
        (b'{"text": "a"}\n{', "texts.jsonl:2: no JSON"),
        (b'"a"', 'texts.jsonl:1: not an object with "text"'),
        (b'{"text": 1}', 'texts.jsonl:1: not an object with "text"'),
    ],
)
def test_files_that_hold_no_texts(tmp_path: Path, content: bytes, expected: str) -> None:
    """The file, and in a .jsonl the line, are named, with a remedy."""
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_texts(path)
    assert expected in caught.value.message
    assert caught.value.remedy


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file and a folder."""
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(SettingsError, match="cannot read"):
            read_texts(path)


@pytest.mark.parametrize(
    ("text", "settings", "options", "code"),
    [
        ("", {}, {}, "empty_text"),
        ("x", {}, {}, "too_few_tokens"),
        ("a b c d", {}, {"limit": 1}, "too_few_tokens"),
        ("a b c d " * 40, {}, {"chunk": 65}, "context_exceeded"),
        ("a b c d", {"engine": "cuda9"}, {}, "unknown_engine"),
        ("a b c d", {}, {"against": "cuda9"}, "unknown_engine"),
        ("a b c d", {"engine": "null"}, {}, "bad_settings"),
        ("a b c d", {}, {"against": "null"}, "bad_settings"),
        ("a b c d", {}, {"chunk": 1}, "bad_settings"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, text: str, settings: dict[str, Any], options: dict[str, Any], code: str
) -> None:
    """One line that says what is wrong and what to do, with a code of its own."""
    path = tmp_path / "text.txt"
    path.write_text(text)
    with pytest.raises(EngineError) as caught:
        measure_perplexity(replace(NUMPY, **settings), path=path, **options)
    assert caught.value.code == code
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_a_chunk_that_the_text_does_not_fill_may_be_longer_than_the_context(jsonl: Path) -> None:
    """What must fit is the longest chunk that there is."""
    assert measure_perplexity(NUMPY, path=jsonl, chunk=4096).nll == measure_perplexity(NUMPY, path=jsonl, chunk=64).nll


def test_logits_that_are_no_numbers_are_refused_and_engines_closed(jsonl: Path) -> None:
    """An engine that computes NaN is an error, not a perplexity of NaN."""
    engine = FakeEngine(NUMPY, 1, math.nan)
    with pytest.raises(EngineError, match="logits are not finite") as caught:
        measure_perplexity(NUMPY, path=jsonl, load=lambda _: engine)
    assert caught.value.code == "bad_logits"
    assert engine.closed


# --- what is printed --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> PerplexityResult:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXTS[0] * 3)
    return measure_perplexity(NUMPY, path=path, against="numpy", load=lambda settings: NumpyEngine(settings))


def test_lines_for_people(result: PerplexityResult) -> None:
    """One line with the perplexity, its error, bits, tokens and tokens/s; two more for a comparison."""
    first, second, third = perplexity_lines(result)
    ppl = result.perplexity
    assert f"embedded:draft (numpy): perplexity {ppl.mean:.4f} +/- {ppl.error:.4f}, " in first
    assert f"{result.bits_per_token:.4f} bits a token" in first
    assert f"{result.n_tokens} tokens scored" in first
    assert ": 1 text, 1 chunk of at most 1024), " in first
    assert first.endswith(" tokens/s")
    assert "perplexity ratio 1.00000 +/- 0.00000" in second
    assert third.startswith("KL(numpy || numpy): mean 0.000000")
    assert "same top token 100.000" in third


def test_json_for_programs(result: PerplexityResult) -> None:
    """Every figure of the lines is in the JSON, which survives a round trip."""
    value = json.loads(json.dumps(perplexity_json(result)))
    assert value["perplexity"] == {"mean": result.perplexity.mean, "error": result.perplexity.error}
    assert value["info"]["engine"] == "numpy"
    assert value["n_tokens"] == result.n_tokens
    assert value["bits_per_token"] == result.bits_per_token
    assert value["tokens_per_second"] > 0
    assert value["against"]["kl"]["mean"] == 0
    assert value["against"]["perplexity"] == value["perplexity"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "tools.cli", "perplexity", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_measures(tmp_path: Path) -> None:
    """Result on stdout and nothing on stderr where that is no terminal; --json prints an object alone."""
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[0])
    arguments = ("embedded:draft", "--engine", "numpy", "--file", str(path), "--chunk", "64")
    ended = command(*arguments, "--set", "verifier.engine.n_ctx=64")
    assert (ended.returncode, ended.stderr, ended.stdout.count("\n")) == (0, "", 1)
    ended = command(*arguments, "--json", "--limit", "5")
    assert (ended.returncode, ended.stderr) == (0, "")
    value = json.loads(ended.stdout)
    assert (value["n_tokens"], value["chunk"], value["source"], value["against"]) == (5, 64, str(path), None)


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("embedded:draft", "--engine", "cuda9"), 1, "there is no engine 'cuda9' (use one of auto"),
        (("embedded:draft", "--file", "none.txt"), 78, "cannot read none.txt"),
        (("none.gguf",), 78, "there is no model file none.gguf"),
        (("embedded:draft", "--engine", "numpy", "--file", "/dev/null"), 1, "/dev/null: there is no text in it"),
        (
            ("embedded:draft", "--engine", "numpy", "--set", "verifier.engine.n_ctx=32"),
            1,
            "longer than the 32 of the numpy engine's context (give --chunk 32, or --set verifier.engine.n_ctx=N)",
        ),
    ],
    ids=["engine", "file", "model", "empty", "context"],
)
def test_the_command_refuses_in_one_line(arguments: tuple[str, ...], status: int, expected: str) -> None:
    """Nothing on stdout, one line on stderr."""
    ended = command(*arguments)
    assert (ended.returncode, ended.stdout) == (status, "")
    assert ended.stderr.startswith("draftwire: error: ")
    assert ended.stderr.count("\n") == 1
    assert expected in ended.stderr
