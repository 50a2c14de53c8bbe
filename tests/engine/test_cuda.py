"""The cuda engine: its logits against the numpy engine's, bitwise row invariance, slots and pages, what it refuses.

Everything runs on the CPU's emulator ("host") and, marked `gpu`, on an NVIDIA GPU, where more is tried.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from shared.engine.cuda import passes
from shared.engine.cuda.engine import CudaEngine, _check_model
from shared.engine.cuda.passes import MAX_CHAIN
from shared.engine.cuda.weights import LoadingLog
from shared.engine.dense import DenseLogits
from shared.engine.interface import Chunk, EngineSettings, Logits, PrefixCache
from shared.engine.slots import SlotTable, place_session, with_eviction
from shared.errors import EngineError, ModelError
from shared.kernels.attention import PAGE_TOKENS
from shared.kernels.gpu import CudaDevice
from shared.kernels.host.device import HostDevice
from shared.kernels.weights import CODECS
from shared.model.config import ModelConfig
from shared.model.gguf import GGUFFile
from shared.model.names import resolve_model
from shared.model.vocabulary import Vocabulary
from shared.quant.types import BY_ID
from shared.sampling.drafting import draft
from shared.sampling.params import SamplingParams
from tests.engine.conftest import MakeEngine, ModelPath, open_device
from tests.engine.references import (
    DENSE,
    divergences,
    kernel_roundings,
    numpy_engine,
    numpy_rows,
    relative_errors,
    steady_tokens,
)
from tests.engine.tiny_models import TinyModel, write_tiny_model
from tests.kernels.conftest import require
from tools.perplexity import measure_perplexity

gpu = pytest.mark.gpu

MIXED = TinyModel(types=(("attn_v", "Q6_K"), ("ffn_down_exps", "Q5_K"), ("output", "Q6_K")))
"""As llama-quantize's recipes mix types."""
DRAFT, TARGET = "embedded:draft", "embedded:target"
N_ROWS = {"host": 150, "gpu": 300}
"""Length of the sequence that invariance is tried on: pages end at 64 tokens, attention's splits at 128."""


def rows(engine: CudaEngine, *chunks: Chunk) -> np.ndarray:
    """All wanted rows of one forward pass: [n_rows, n_vocab] float32."""
    logits = engine.forward(chunks)
    assert logits.n_rows == sum(chunk.rows for chunk in chunks)
    return np.array([logits.dense(row) for row in range(logits.n_rows)], np.float32).reshape(-1, logits.n_vocab)


def feed(engine: CudaEngine, slot: int, tokens: np.ndarray, sizes: Sequence[int] = (), start: int = 0) -> np.ndarray:
    """Every row of tokens[start:], computed in pieces of `sizes`, then as many as go at a time."""
    out, at = [np.empty((0, engine.info.n_vocab), np.float32)], start
    for size in itertools.chain(sizes, itertools.repeat(engine.info.n_batch)):
        part = tokens[at : at + size]
        if not len(part):
            break
        out.append(rows(engine, Chunk(slot, at, part, len(part))))
        at += len(part)
    return np.concatenate(out)


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))


def random_tokens(n: int, seed: int = 1, n_vocab: int = 300) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n_vocab, n).astype(np.int32)


# --- the numbers ------------------------------------------------------------------------------------------------------

HOST_MODELS = [
    replace(MIXED, tied=True, types=MIXED.types[:2]),
    TinyModel("qwen3moe", "F16"),
    TinyModel("qwen3", "Q8_0", rope_dim=32),
    TinyModel("llama", "F32", rope_factors=True),
    TinyModel("llama", "IQ4_NL", n_embd=288, n_ff=160, heads=(3, 1, 96), n_vocab=301),
    TinyModel("qwen3", "Q2_K", heads=(2, 1, 128)),
]
GPU_MODELS = [
    *(TinyModel(a, BY_ID[i].name) for a in ("qwen3moe", "qwen3", "llama") for i in CODECS),
    *(
        TinyModel("llama", quant, n_embd=288, n_ff=160, heads=(3, 1, 96), n_vocab=301)
        for quant in ("F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0")
    ),
    TinyModel("qwen3moe", "Q4_0", n_embd=288, n_ff=96, n_expert=40, n_expert_used=5),
    TinyModel("qwen3moe", "Q8_0", n_expert=1, n_expert_used=1),
    TinyModel("qwen3", "F16", heads=(8, 2, 32), tied=True),
    TinyModel("qwen3moe", "F32", heads=(2, 2, 256)),
    TinyModel("llama", "Q4_K", heads=(8, 1, 32), n_vocab=9001),
]
CASES = [("host", m) for m in HOST_MODELS] + [("gpu", m) for m in dict.fromkeys([*HOST_MODELS, *GPU_MODELS])]
MODELS = [pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=[gpu] * (case[0] == "gpu")) for case in CASES]
QUANTIZED = [param for case, param in zip(CASES, MODELS, strict=True) if case[1].quant not in DENSE]
N_COMPARED = 40


@pytest.mark.parametrize(("name", "model"), MODELS)
def test_logits_are_those_of_the_numpy_engine(name: str, model: TinyModel, model_path: ModelPath) -> None:
    """Every row of a sequence, in batches of up to 8, for every architecture and type.

    Float types differ by the halves of attention alone: a row's relative error stays under 2e-3, and under 6e-4 of the
    numpy engine with these roundings. With quantized types, activations in 8 bits cost 1 to 3 % (6 % at most) of a row
    of a random model, and a median divergence of 0.004.
    """
    require(name)
    path = model_path(model)
    tokens = steady_tokens(path, N_COMPARED)
    reference = numpy_engine(path)
    truth = numpy_rows(reference, tokens)
    with kernel_roundings(reference, dense=True):
        rounded = numpy_rows(reference, tokens)
    reference.close()
    engine = CudaEngine(EngineSettings(model=str(path), n_ctx=128, n_slots=1, n_batch=8), devices=[open_device(name)])
    got = feed(engine, 0, tokens, (1, 7, 5))
    engine.close()
    assert np.isfinite(got).all()
    errors, kl = relative_errors(got, truth), divergences(got, truth)
    if model.quant in DENSE:
        assert errors.max() < 2e-3
        assert relative_errors(got, rounded).max() < 6e-4
        assert kl.max() < 5e-5
    else:
        assert errors.max() < 0.08
        assert np.median(errors) < 0.04
        assert np.median(kl) < 0.01


@pytest.mark.parametrize(("name", "model"), QUANTIZED)
def test_one_layer_has_the_documented_roundings(name: str, model: TinyModel, model_path: ModelPath) -> None:
    """A layer is the numpy engine's with activations in 8 bits, halves in attention, and no other loss.

    Where no number lies on the edge between two roundings, a row agrees to 2e-5, orders of summation apart; one that
    does costs its row about a percent, as rounding itself does. A quarter of the rows has to agree.
    """
    require(name)
    path = model_path(replace(model, n_layer=1))
    tokens = steady_tokens(path, N_COMPARED)
    reference = numpy_engine(path)
    with kernel_roundings(reference, dense=False):
        rounded = numpy_rows(reference, tokens)
    reference.close()
    engine = CudaEngine(EngineSettings(model=str(path), n_ctx=128, n_slots=1, n_batch=8), devices=[open_device(name)])
    errors = relative_errors(feed(engine, 0, tokens), rounded)
    engine.close()
    assert np.quantile(errors, 0.25) < 5e-5
    assert errors.max() < 0.05


@pytest.mark.parametrize(("kind", "bound"), [("q8_0", 0.03), ("q4_0", 0.3)])
def test_quantized_caches(backend: str, make_engine: MakeEngine, kind: str, bound: float) -> None:
    """Keys and values in 8 or 4 bits change a row of a random model with two layers by 1 to 2 % or 10 to 20 %."""
    model = TinyModel("llama", "F32")
    tokens = random_tokens(70, seed=3)
    plain = feed(make_engine(backend, model, n_ctx=128, n_slots=1, n_batch=8), 0, tokens)
    caches = {"cache_type_k": kind, "cache_type_v": kind}
    got = feed(make_engine(backend, model, n_ctx=128, n_slots=1, n_batch=8, **caches), 0, tokens)
    errors = relative_errors(got, plain)
    assert bound / 30 < np.median(errors) < bound
    assert errors[0] < bound


# --- row invariance ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """An engine with empty slots, a sequence, and each of its rows computed alone: [n, n_vocab]."""

    backend: str
    engine: CudaEngine
    tokens: np.ndarray
    truth: np.ndarray


@pytest.fixture(scope="module")
def make_lab(make_engine: MakeEngine) -> Callable[[str, str], Lab]:
    """A lab by backend and cache type; the same one with empty slots when asked for again."""
    labs: dict[tuple[str, str], Lab] = {}

    def make(backend: str, kind: str) -> Lab:
        require(backend)
        n_batch = 64 if backend == "host" else 256
        caches = {"cache_type_k": kind, "cache_type_v": kind}
        engine = make_engine(backend, MIXED, n_ctx=384, n_slots=4, n_batch=n_batch, **caches)
        if (backend, kind) not in labs:
            tokens = random_tokens(N_ROWS[backend])
            labs[backend, kind] = Lab(backend, engine, tokens, feed(engine, 0, tokens, (1,) * len(tokens)))
            engine.truncate(0, 0)
        return labs[backend, kind]

    return make


@pytest.fixture
def lab(backend: str, make_lab: Callable[[str, str], Lab]) -> Lab:
    return make_lab(backend, "f16")


CACHES = [pytest.param("host", kind, id=f"host-{kind}") for kind in ("f16", "q4_0")]
CACHES += [pytest.param("gpu", kind, id=f"gpu-{kind}", marks=gpu) for kind in ("f16", "q8_0", "q4_0")]
every_cache = pytest.mark.parametrize(("name", "kind"), CACHES)


def sizes_to_try(lab: Lab) -> list[int]:
    return [2, 7, 8, 9, 16, 17, 31, 32, 33, 50] if lab.backend == "host" else [*range(1, 34), 64, 65, 129]


@every_cache
def test_rows_of_a_batch_equal_single_tokens(make_lab: Callable[[str, str], Lab], name: str, kind: str) -> None:
    """Each row of a batch, of any size, has bitwise the logits of decoding one token at a time."""
    lab = make_lab(name, kind)
    start = 97
    feed(lab.engine, 0, lab.tokens[:start])
    for n in sizes_to_try(lab):
        part = lab.tokens[start : start + n]
        assert_same_bits(rows(lab.engine, Chunk(0, start, part, n)), lab.truth[start : start + n])
    if lab.backend == "gpu":
        assert_same_bits(rows(lab.engine, Chunk(0, 0, lab.tokens[:256], 256)), lab.truth[:256])


@pytest.mark.parametrize("n", [3, 9, 32])
def test_a_row_s_place_in_the_batch_changes_nothing(lab: Lab, n: int) -> None:
    """One token of a slot, at every position among rows of slots at other lengths."""
    at, others = 70, lab.tokens[::-1].copy()
    feed(lab.engine, 0, lab.tokens[:at])
    feed(lab.engine, 1, others[:11])
    feed(lab.engine, 2, others[:90])
    places = range(n) if lab.backend == "gpu" or n < 32 else (0, 1, 8, 16, 30, 31)
    for place in places:
        before, after = others[11 : 11 + place], others[90 : 89 + n - place]
        chunks = [Chunk(0, at, lab.tokens[at : at + 1], 1)]
        if place:
            chunks.insert(0, Chunk(1, 11, before, place // 2))
        if len(after):
            chunks.append(Chunk(2, 90, after, 0))
        assert sum(len(chunk.tokens) for chunk in chunks) == n
        got = rows(lab.engine, *chunks)
        assert_same_bits(got[-1:], lab.truth[at : at + 1])


def test_other_slots_in_the_batch_change_nothing(lab: Lab) -> None:
    """Rows of several slots at different lengths, in any order of chunks, each wanted or not."""
    other = lab.tokens[::-1].copy()
    starts = {0: 63, 1: 10, 2: 127, 3: 0}
    lengths = {0: 4, 1: 5, 2: 3, 3: 6}
    for slot, start in starts.items():
        feed(lab.engine, slot, (other if slot == 1 else lab.tokens)[:start])
    orders = list(itertools.permutations(range(4)))
    for order in orders[:: 1 if lab.backend == "gpu" else 5]:
        chunks = []
        for slot in order:
            tokens = other if slot == 1 else lab.tokens
            chunks.append(Chunk(slot, starts[slot], tokens[starts[slot] : starts[slot] + lengths[slot]], 3))
        got = rows(lab.engine, *chunks)
        for i, slot in enumerate(order):
            if slot != 1:
                end = starts[slot] + lengths[slot]
                assert_same_bits(got[3 * i : 3 * i + 3], lab.truth[end - 3 : end])


@every_cache
@pytest.mark.parametrize("sizes", [(64, 64), (1, 63, 1, 63), (33,) * 4, (7, 16, 31, 2, 8, 60), (5,) * 13])
def test_chunking_of_the_prefix_changes_nothing(
    make_lab: Callable[[str, str], Lab], name: str, kind: str, sizes: tuple[int, ...]
) -> None:
    """However a prompt is cut into passes, every row has the same bits."""
    lab = make_lab(name, kind)
    tokens = lab.tokens[: sum(sizes) + 8]
    assert_same_bits(feed(lab.engine, 1, tokens, sizes), lab.truth[: len(tokens)])


@every_cache
def test_rollback_changes_nothing(make_lab: Callable[[str, str], Lab], name: str, kind: str) -> None:
    """After wrong tokens are rolled back, by an earlier start or by truncation, the bits are as if never computed."""
    lab = make_lab(name, kind)
    wrong = random_tokens(40, seed=2)
    for at, n in ((13, 1), (63, 2), (64, 9), (97, 33), (126, 4)):
        lab.engine.truncate(0, 0)
        feed(lab.engine, 0, np.concatenate([lab.tokens[:at], wrong[:n]]))
        assert_same_bits(rows(lab.engine, Chunk(0, at, lab.tokens[at : at + 8], 8)), lab.truth[at : at + 8])
        rows(lab.engine, Chunk(0, at + 8, wrong[:5], 5))
        lab.engine.truncate(0, at + 3)
        assert lab.engine.length(0) == at + 3
        part = lab.tokens[at + 3 : at + 9]
        assert_same_bits(rows(lab.engine, Chunk(0, at + 3, part, 6)), lab.truth[at + 3 : at + 9])


@every_cache
@pytest.mark.parametrize("length", [1, 63, 64, 101])
def test_copied_prefixes_change_nothing(make_lab: Callable[[str, str], Lab], name: str, kind: str, length: int) -> None:
    """A slot with a copied prefix goes on with the same bits, and the source keeps its own, whoever writes first."""
    lab = make_lab(name, kind)
    wrong = random_tokens(30, seed=2)
    for first in (0, 2):
        for slot in range(4):
            lab.engine.truncate(slot, 0)
        feed(lab.engine, 0, lab.tokens[:105])
        feed(lab.engine, 2, wrong[:9])
        lab.engine.copy_prefix(0, 2, length)
        assert (lab.engine.length(0), lab.engine.length(2)) == (105, length)
        # The other slot diverges within the shared pages, and comes back.
        other = 2 - first
        apart = length if other == 2 else length - 1
        rows(lab.engine, Chunk(other, apart, wrong[:7], 1))
        assert_same_bits(
            rows(lab.engine, Chunk(other, apart, lab.tokens[apart : apart + 5], 5)), lab.truth[apart : apart + 5]
        )
        start = 105 if first == 0 else length
        part = lab.tokens[start : start + 5]
        assert_same_bits(rows(lab.engine, Chunk(first, start, part, 5)), lab.truth[start : start + 5])


def test_page_layouts_change_nothing(lab: Lab) -> None:
    """Slots that grow, shrink and share in turns get scattered pages, and the same bits."""
    others = random_tokens(384, seed=4)
    n = len(lab.tokens)
    at = {0: 0, 1: 0, 2: 0}
    rng = np.random.default_rng(5)
    while at[0] < n - 8:
        for slot, tokens in ((1, others), (0, lab.tokens), (2, others)):
            end = min(at[slot] + int(rng.integers(20, 60)), len(tokens))
            if end > at[slot]:
                feed(lab.engine, slot, tokens[:end], start=at[slot])
            at[slot] = end
        at[1] = int(rng.integers(0, at[1]))
        lab.engine.truncate(1, at[1])
        if at[2] > 100:
            lab.engine.copy_prefix(1, 2, at[1] // 2)
            at[2] = at[1] // 2
    assert_same_bits(
        rows(lab.engine, Chunk(0, at[0] - 8, lab.tokens[at[0] - 8 : at[0]], 8)), lab.truth[at[0] - 8 : at[0]]
    )
    held = lab.engine._pages.table[0, : -(-at[0] // PAGE_TOKENS)]
    assert (np.diff(held) != 1).any()
    assert (np.diff(held) != -1).any()


@pytest.mark.parametrize(
    "change", [{"graphs": False}, {"n_batch": 20}, {"n_ctx": 200}, {"n_slots": 1}, {"kv_pages": 5}], ids=str
)
def test_engines_for_the_same_model_agree(lab: Lab, make_engine: MakeEngine, change: dict[str, object]) -> None:
    """Graphs, and how much room an engine has, change no bit."""
    info, cache = lab.engine.info, lab.engine._passes._stages[0]._layout.kind  # type: ignore[union-attr]
    settings = {"n_ctx": info.n_ctx, "n_slots": 4, "n_batch": info.n_batch, "graphs": True, **change}
    other = make_engine(lab.backend, MIXED, cache_type_k=cache, cache_type_v=cache, **settings)
    tokens = lab.tokens[:150]
    assert_same_bits(feed(other, 0, tokens, (20, 1, 3, 17)), lab.truth[:150])
    assert_same_bits(rows(other, Chunk(0, 140, tokens[140:], 10)), lab.truth[140:150])


@pytest.mark.gpu
def test_dependent_launches_change_nothing(model_path: ModelPath) -> None:
    """Kernels that start while the ones before them drain, as graphs or not, give the bits of kernels one by one."""
    require("gpu")
    settings = EngineSettings(model=str(model_path(MIXED)), n_ctx=512, n_slots=3, n_batch=64)
    results = []
    for pdl, graphs in ((False, False), (True, False), (True, True)):
        engine = CudaEngine(settings, devices=[CudaDevice(pdl=pdl)], graphs=graphs)
        rng = np.random.default_rng(3)
        lengths = [0, 0, 0]
        out = []
        for _ in range(150):
            slots = [slot for slot in range(3) if rng.random() < 0.7] or [0]
            chunks = []
            for slot in slots:
                start = int(rng.integers(max(0, lengths[slot] - 3), lengths[slot] + 1))
                n = int(rng.choice([1, 1, 2, 5, 17]))
                start = start if start + n <= 512 else 0
                chunks.append(Chunk(slot, start, rng.integers(0, 300, n).astype(np.int32), 1))
                lengths[slot] = start + n
            logits = engine.forward(chunks)
            out.append(np.concatenate([logits.dense(row) for row in range(len(chunks))]))
        # Chains, whose passes follow each other without the host; of all widths, which take turns.
        for n, slots in ((8, (0, 1, 2)), (1, (0,)), (16, (1, 2)), (5, (0, 1, 2))):
            chunks = [Chunk(slot, 40, np.array([7 + slot], np.int32), 1) for slot in slots]
            out.append(engine.propose(chunks, [SamplingParams(temperature=0.0)] * len(slots), n).confidences.ravel())
            wide = rng.integers(0, 300, (len(slots), 11 + n)).astype(np.int32)
            logits = engine.forward([Chunk(slot, 30, row, 1) for slot, row in zip(slots, wide, strict=True)])
            out.append(np.concatenate([logits.dense(row) for row in range(len(slots))]))
            for slot in slots:
                engine.forward([Chunk(slot, 30, rng.integers(0, 300, 10).astype(np.int32), 0)])
        results.append(np.concatenate(out))
        engine.close()
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_both_ways_of_attention_agree(lab: Lab, monkeypatch: pytest.MonkeyPatch, model_path: ModelPath) -> None:
    """A small batch whose splits would need too much memory is computed like a large one, with the same bits."""
    monkeypatch.setattr(passes, "_SPLIT_BYTES", 1)
    cache = lab.engine._passes._stages[0]._layout.kind  # type: ignore[union-attr]
    settings = EngineSettings(
        model=str(model_path(MIXED)), n_ctx=384, n_slots=1, n_batch=64, cache_type_k=cache, cache_type_v=cache
    )
    engine = CudaEngine(settings, devices=[open_device(lab.backend)])
    assert_same_bits(feed(engine, 0, lab.tokens[:150], (64, 64, 1, 8)), lab.truth[:150])
    engine.close()


@gpu
@pytest.mark.parametrize("model", [m for m in GPU_MODELS if m.architecture != "qwen3"], ids=str)
def test_rows_are_independent_for_every_type(model: TinyModel, model_path: ModelPath) -> None:
    """Every type and shape: rows in batches of 2 to 128 have the bits of single ones."""
    require("gpu")
    settings = EngineSettings(model=str(model_path(model)), n_ctx=192, n_slots=1, n_batch=128)
    engine = CudaEngine(settings, devices=[CudaDevice()])
    tokens = random_tokens(192)
    truth = feed(engine, 0, tokens, (1,) * 192)
    for n in (2, 3, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128):
        assert_same_bits(rows(engine, Chunk(0, 50, tokens[50 : 50 + n], n)), truth[50 : 50 + n])
    engine.close()


# --- slots and pages --------------------------------------------------------------------------------------------------


@pytest.fixture
def small(backend: str, make_engine: MakeEngine) -> CudaEngine:
    """Four slots of up to 256 tokens that share 7 pages."""
    return make_engine(backend, MIXED, n_ctx=256, n_slots=4, n_batch=64, kv_pages=7)


def test_info_says_what_runs(small: CudaEngine) -> None:
    """The model, its sizes, and the promise that rows do not depend on the batch."""
    info = small.info
    assert (info.engine, info.architecture, info.n_vocab) == ("cuda", "qwen3moe", 300)
    assert (info.n_ctx, info.n_slots, info.n_batch, info.row_invariant) == (256, 4, 64, True)
    assert len(info.vocab_fingerprint) == 32


def test_prefixes_share_pages(small: CudaEngine) -> None:
    """A copied prefix takes no page; who writes first into a shared page gets its own; truncation gives pages back."""
    tokens = random_tokens(256)
    feed(small, 0, tokens[:100])
    assert small._pages.n_free == 5
    small.copy_prefix(0, 1, 100)
    small.copy_prefix(0, 2, 64)
    assert small._pages.n_free == 5
    rows(small, Chunk(1, 100, tokens[:3], 1))
    assert small._pages.n_free == 4
    rows(small, Chunk(0, 100, tokens[100:103], 1))
    assert small._pages.n_free == 4
    rows(small, Chunk(2, 64, tokens[:1], 1))
    assert small._pages.n_free == 3
    small.truncate(0, 64)
    assert small._pages.n_free == 4
    small.truncate(0, 0)
    assert small._pages.n_free == 4
    small.truncate(1, 0)
    assert small._pages.n_free == 5
    small.copy_prefix(2, 2, 5)
    assert (small.length(2), small._pages.n_free) == (5, 6)
    small.copy_prefix(1, 2, 0)
    assert (small.length(2), small._pages.n_free) == (0, 7)


def test_two_heirs_of_a_page_go_their_own_ways(small: CudaEngine) -> None:
    """Both write into what was a shared page, in one batch, in any order, and neither sees the other's tokens."""
    tokens, other = random_tokens(256), random_tokens(256, seed=2)
    expected = []
    for tail in (tokens, other):
        expected.append(feed(small, 0, np.concatenate([tokens[:90], tail[90:98]]))[90:])
        small.truncate(0, 0)
    for order in ((0, 1), (1, 0)):
        feed(small, 0, tokens[:100])
        small.copy_prefix(0, 1, 90)
        got = rows(small, *(Chunk(slot, 90, (tokens, other)[slot][90:98], 8) for slot in order))
        for i, slot in enumerate(order):
            assert_same_bits(got[8 * i : 8 * i + 8], expected[slot])
        small.truncate(0, 0)
        small.truncate(1, 0)


def test_a_page_is_not_copied_from_and_to_at_once(small: CudaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a batch run together, so a page that one chunk leaves must not take another chunk's copy: slot 0 goes
    on in a page shared with slot 1, which in the same batch rolls back into the page before it."""
    assert small._passes is not None
    seen: list[tuple[int, int]] = []
    copy = small._passes.copy_pages

    def watch(copies: Sequence[tuple[int, int]]) -> None:
        seen.extend(copies)
        copy(copies)

    monkeypatch.setattr(small._passes, "copy_pages", watch)
    tokens = random_tokens(120)
    truth = feed(small, 0, tokens)
    small.truncate(0, 100)
    small.copy_prefix(0, 1, 100)
    got = rows(small, Chunk(0, 100, tokens[100:104], 4), Chunk(1, 10, tokens[10:14], 4))
    assert seen
    assert not {source for source, _ in seen} & {target for _, target in seen}
    assert_same_bits(got, np.concatenate([truth[100:104], truth[10:14]]))


def test_a_batch_that_finds_no_page_is_refused(small: CudaEngine) -> None:
    """Too small a pool refuses the batch as a whole, by its code, and nothing changes; after room is made, it runs."""
    tokens = random_tokens(256)
    truth = feed(small, 0, tokens[:200])
    feed(small, 1, tokens[:128])
    feed(small, 2, tokens[:64])
    assert small._pages.n_free == 0
    small.copy_prefix(2, 3, 30)
    table = small._pages.table.copy()
    for chunks in (
        [Chunk(1, 128, tokens[128:129], 1)],
        [Chunk(0, 200, tokens[200:203], 1), Chunk(2, 64, tokens[64:65], 1)],
        [Chunk(3, 30, tokens[30:31], 1)],
    ):
        with pytest.raises(EngineError, match="1 pages of 64 tokens, the KV pool has 0 free") as caught:
            small.forward(chunks)
        assert caught.value.code == "out_of_pages"
        assert "kv_pages" in str(caught.value.remedy)
    assert [small.length(slot) for slot in range(4)] == [200, 128, 64, 30]
    np.testing.assert_array_equal(small._pages.table, table)
    assert_same_bits(rows(small, Chunk(0, 192, tokens[192:200], 8)), truth[192:])
    assert_same_bits(rows(small, Chunk(1, 127, tokens[127:128], 1)), truth[127:128])
    small.truncate(2, 0)
    assert_same_bits(rows(small, Chunk(3, 30, tokens[30:31], 1)), truth[30:31])
    small.truncate(3, 0)
    assert_same_bits(rows(small, Chunk(1, 128, tokens[128:129], 1)), truth[128:129])


def test_pages_that_a_batch_gives_back_count_for_it(small: CudaEngine) -> None:
    """A batch that rolls one slot back and lets another grow needs no more pages than it leaves in use."""
    tokens = random_tokens(256)
    truth = feed(small, 1, tokens[:129])
    small.truncate(1, 128)
    feed(small, 0, tokens[:256])
    feed(small, 2, tokens[:64])
    assert small._pages.n_free == 0
    got = rows(small, Chunk(0, 10, tokens[10:11], 1), Chunk(1, 128, tokens[128:129], 1))
    assert_same_bits(got, truth[[10, 128]])


def test_the_context_can_be_filled_but_not_exceeded(small: CudaEngine) -> None:
    """A slot takes n_ctx tokens and not one more."""
    tokens = random_tokens(257)
    feed(small, 0, tokens[:256])
    assert small.length(0) == 256
    with pytest.raises(EngineError) as caught:
        small.forward([Chunk(0, 256, tokens[256:], 1)])
    assert caught.value.code == "context_exceeded"
    assert small.length(0) == 256


def tokens_of(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


BAD_CHUNKS = {
    "bad_slot": [Chunk(4, 0, tokens_of(5), 1)],
    "duplicate_slot": [Chunk(0, 0, tokens_of(5), 1), Chunk(0, 1, tokens_of(5), 1)],
    "empty_chunk": [Chunk(0, 0, tokens_of(), 0)],
    "bad_start": [Chunk(0, 5, tokens_of(5), 1)],
    "bad_rows": [Chunk(0, 0, tokens_of(5), 2)],
    "bad_token": [Chunk(1, 0, tokens_of(5), 1), Chunk(0, 0, tokens_of(5, 300), 1)],
    "batch_too_large": [Chunk(0, 0, np.full(65, 5, np.int32), 1)],
    "empty_batch": [],
}


@pytest.mark.parametrize("code", BAD_CHUNKS)
def test_batches_that_are_refused(small: CudaEngine, code: str) -> None:
    """A batch that breaks a rule is refused with its code, and no slot is changed."""
    rows(small, Chunk(0, 0, tokens_of(1, 2, 3, 4), 0))
    with pytest.raises(EngineError) as caught:
        small.forward(BAD_CHUNKS[code])
    assert caught.value.code == code
    assert [small.length(slot) for slot in range(4)] == [4, 0, 0, 0]
    with pytest.raises(EngineError, match="-1"):
        small.forward([Chunk(0, 0, tokens_of(-1), 1)])


def test_slots_and_lengths_that_are_refused(small: CudaEngine) -> None:
    """`length`, `truncate` and `copy_prefix` refuse slots that do not exist and tokens that are not held."""
    rows(small, Chunk(0, 0, tokens_of(1, 2, 3, 4), 0))
    for code, call in (
        ("bad_slot", lambda: small.length(4)),
        ("bad_slot", lambda: small.length(-1)),
        ("bad_slot", lambda: small.truncate(4, 0)),
        ("bad_length", lambda: small.truncate(0, 5)),
        ("bad_length", lambda: small.truncate(0, -1)),
        ("bad_slot", lambda: small.copy_prefix(4, 0, 0)),
        ("bad_slot", lambda: small.copy_prefix(0, 4, 0)),
        ("bad_length", lambda: small.copy_prefix(0, 1, 5)),
    ):
        with pytest.raises(EngineError) as caught:
            call()
        assert caught.value.code == code
    assert small.length(0) == 4


def test_a_closed_engine_computes_nothing(backend: str, model_path: ModelPath) -> None:
    """After close, which may come twice, everything is refused, logits from before included; and the memory is given
    back. n_ctx 0 is the model's own."""
    engine = CudaEngine(EngineSettings(model=str(model_path(MIXED)), n_slots=1), devices=[open_device(backend)])
    assert engine.info.n_ctx == 1024
    logits = engine.forward([Chunk(0, 0, tokens_of(5), 1)])
    held = weakref.ref(engine._passes)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        logits.top(1)
    for call in (
        lambda: engine.propose([Chunk(0, 0, tokens_of(5), 1)], [SAMPLED], 1),
        lambda: engine.forward([Chunk(0, 0, tokens_of(5), 1)]),
        lambda: engine.truncate(0, 0),
        lambda: engine.copy_prefix(0, 0, 0),
        lambda: engine.reuse_prefix(0, tokens_of(5)),
    ):
        with pytest.raises(EngineError) as caught:
            call()
        assert caught.value.code == "engine_closed"
    del logits
    assert held() is None


# --- prefixes that no slot holds any more -----------------------------------------------------------------------------


def reused(engine: CudaEngine, slot: int, tokens: np.ndarray) -> int:
    """How much of a prompt a slot gets without computing; it keeps nothing."""
    length = engine.reuse_prefix(slot, tokens)
    assert engine.length(slot) == length
    engine.truncate(slot, 0)
    return length


def fresh_rows(engine: CudaEngine, slot: int, tokens: np.ndarray) -> np.ndarray:
    """Every row, computed from an empty slot, which is empty again afterwards."""
    engine.truncate(slot, 0)
    truth = feed(engine, slot, tokens)
    engine.truncate(slot, 0)
    return truth


def test_a_system_prompt_is_computed_once(small: CudaEngine) -> None:
    """After another conversation has taken the slot, a third one with the first one's beginning takes over its whole
    pages and goes on with the bits of computing everything."""
    system, other = random_tokens(150, seed=21), random_tokens(100, seed=22)
    prompt = np.concatenate([system, random_tokens(30, seed=23)])
    truth = fresh_rows(small, 3, np.concatenate([prompt, prompt[:1]]))
    feed(small, 0, np.concatenate([system, random_tokens(20, seed=24)]))
    feed(small, 0, other)
    assert small.reuse_prefix(1, prompt) == small.length(1) == 128
    assert_same_bits(feed(small, 1, prompt, start=128), truth[128:-1])
    # Now the slot itself holds more than whole pages; the last token is left to compute.
    assert small.reuse_prefix(1, prompt) == small.length(1) == 179
    assert_same_bits(feed(small, 1, prompt, start=179), truth[179:-1])
    assert small.reuse_prefix(1, np.concatenate([prompt[:140], other])) == small.length(1) == 140
    assert_same_bits(feed(small, 1, prompt, start=140), truth[140:-1])
    assert small.reuse_prefix(1, prompt[:128]) == small.length(1) == 127
    assert reused(small, 2, prompt[:128]) == 64
    assert reused(small, 2, prompt[:129]) == 128
    assert reused(small, 0, prompt[:1]) == 0
    assert small.reuse_prefix(1, other[1:]) == small.length(1) == 0


def test_a_page_that_was_written_over_is_not_found(small: CudaEngine) -> None:
    """After a rollback into a full page and other tokens there, those are found and the old ones are not."""
    old, tail = random_tokens(192, seed=31), random_tokens(60, seed=32)
    new = np.concatenate([old[:100], tail])
    truth = fresh_rows(small, 3, new)
    feed(small, 0, old)
    feed(small, 0, new[:127], start=100)
    assert reused(small, 1, old) == 64
    feed(small, 0, new, start=127)
    assert reused(small, 1, old) == 64
    assert small.reuse_prefix(1, new) == 128
    assert_same_bits(feed(small, 1, new, start=128), truth[128:])
    # The same by truncation, and while another slot holds the page.
    small.truncate(0, 90)
    feed(small, 0, old[:128], start=90)
    assert reused(small, 2, old) == 128
    assert reused(small, 2, new) == 128


def test_prefixes_go_when_pages_run_short(small: CudaEngine) -> None:
    """Free pages are taken first, then those of the conversation unused for longest, from its end; pages in use never:
    then the batch is refused, and what is kept of idle slots counts as room as soon as they are emptied."""
    first, second, running, taking = (random_tokens(200, seed=seed) for seed in (41, 42, 43, 44))
    for tokens in (first, second):
        feed(small, 0, tokens[:128])
        small.truncate(0, 0)
    feed(small, 1, running[:129])
    assert small._pages.n_free == 4
    feed(small, 2, taking[:64])
    assert [reused(small, 0, tokens) for tokens in (first, second)] == [64, 128]
    feed(small, 2, taking[:128], start=64)
    assert [reused(small, 0, tokens) for tokens in (first, second)] == [0, 128]
    assert small.reuse_prefix(0, second) == 128
    with pytest.raises(EngineError, match="needs 1 pages of 64 tokens, the KV pool has 0 free") as caught:
        small.forward([Chunk(3, 0, first[:1], 1)])
    assert caught.value.code == "out_of_pages"
    last = rows(small, Chunk(1, 129, running[129:130], 1))
    small.truncate(0, 0)
    rows(small, Chunk(3, 0, first[:1], 1))
    assert [reused(small, 0, tokens) for tokens in (second, running, taking)] == [64, 128, 128]
    assert_same_bits(last, fresh_rows(small, 1, running[:130])[129:])


def test_proposed_tokens_are_part_of_a_prefix(small: CudaEngine) -> None:
    """A page that proposals fill is found by them, but for the last one, which has not been computed."""
    prompt = random_tokens(61, seed=51)
    for n, expected in ((3, 0), (4, 64)):
        proposed = small.propose([Chunk(2, 0, random_tokens(3), 1), Chunk(0, 0, prompt, 1)], [SAMPLED] * 2, n)
        text = np.concatenate([prompt, proposed.tokens[1], prompt[:2]])
        assert reused(small, 1, text) == expected
        small.truncate(0, 0)
    truth = fresh_rows(small, 3, text)
    assert small.reuse_prefix(0, text) == 64
    assert_same_bits(feed(small, 0, text, start=64), truth[64:])


def test_copied_prefixes_count(small: CudaEngine) -> None:
    """What a slot has copied is part of the prefix that it then goes on with."""
    tokens = random_tokens(190, seed=61)
    feed(small, 0, random_tokens(190, seed=62))
    feed(small, 1, tokens[:100])
    small.copy_prefix(1, 0, 80)
    small.truncate(1, 0)
    feed(small, 0, tokens[:128], start=80)
    small.truncate(0, 0)
    assert reused(small, 2, tokens) == 128


def test_a_pass_that_fails_leaves_what_was_computed(small: CudaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slot holds what it held before the chunk, nothing of the pass is found later, and everything goes on."""
    tokens = random_tokens(192, seed=71)
    truth = fresh_rows(small, 3, tokens)
    other = np.concatenate([tokens[:70], random_tokens(122, seed=72)])
    passes = small._passes
    assert passes is not None
    for name, call in (
        ("run", lambda: small.forward([Chunk(0, 70, other[70:130], 1)])),
        ("propose", lambda: small.propose([Chunk(0, 70, other[70:130], 1)], [SAMPLED], 3)),
        ("write_pages", lambda: small.forward([Chunk(0, 70, other[70:130], 1)])),
    ):
        small.truncate(0, 0)
        feed(small, 0, tokens[:130])
        with monkeypatch.context() as patch:
            patch.setattr(passes, name, Mock(side_effect=RuntimeError("no memory for a graph")))
            small._pages.changed = True
            with pytest.raises(RuntimeError, match="a graph"):
                call()
        assert small.length(0) == 70
        assert reused(small, 1, other) == 64
        assert_same_bits(feed(small, 0, tokens, start=70), truth[70:])
        assert reused(small, 1, np.append(tokens, 0)) == 192


def test_idle_slots_make_room_and_are_still_found(small: CudaEngine) -> None:
    """A session that needs the pages of an idle slot gets them; what it leaves of them serves the next session."""
    table = SlotTable(4)
    tokens, other = random_tokens(200, seed=81), random_tokens(256, seed=82)
    assert place_session(small, table, "a", tokens) == (0, 0)
    feed(small, 0, tokens)
    table.release("a", tokens)
    assert place_session(small, table, "b", other) == (1, 0)
    for at in range(0, 256, 64):
        with_eviction(small, table, partial(small.forward, [Chunk(1, at, other[at : at + 64], 0)]))
    assert small.length(0) == 0
    placed = place_session(small, table, "c", tokens)
    assert placed is not None
    slot, length = placed
    assert small.length(slot) == length == 192
    assert table.cached(slot).tolist() == tokens[:192].tolist()
    assert small._pages.n_free == 0


def test_prefixes_that_are_refused(small: CudaEngine) -> None:
    """No such slot, and no token: nothing changes."""
    rows(small, Chunk(0, 0, tokens_of(1, 2, 3, 4), 0))
    for code, call in (
        ("bad_slot", lambda: small.reuse_prefix(4, tokens_of(1, 2))),
        ("bad_slot", lambda: small.reuse_prefix(-1, tokens_of(1, 2))),
        ("empty_chunk", lambda: small.reuse_prefix(0, tokens_of())),
    ):
        with pytest.raises(EngineError) as caught:
            call()
        assert caught.value.code == code
    assert small.length(0) == 4
    assert isinstance(small, PrefixCache)


# --- logits -----------------------------------------------------------------------------------------------------------

LOGITS_MODELS = {"tiny": MIXED, "twins": TinyModel("qwen3", "Q8_0", twins=True), "draft": DRAFT}


@pytest.fixture(params=LOGITS_MODELS)
def five_rows(request: pytest.FixtureRequest, backend: str, make_engine: MakeEngine) -> tuple[Logits, DenseLogits]:
    """Five rows of logits, and the same rows on the host."""
    engine = make_engine(backend, LOGITS_MODELS[request.param], n_ctx=64, n_slots=2, n_batch=8)
    chunks = [Chunk(1, 0, random_tokens(3), 3), Chunk(0, 0, random_tokens(4, seed=2), 2)]
    logits = engine.forward(chunks)
    return logits, DenseLogits(np.stack([logits.dense(row) for row in range(5)]))


@pytest.mark.parametrize("k", [1, 2, 40, 128, 129, 299, 1 << 20])
def test_top(five_rows: tuple[Logits, DenseLogits], k: int) -> None:
    """The k best of each row, ties by the lower id, also more than the device selects and more than there are."""
    (ids, values), (expected_ids, expected) = (logits.top(k) for logits in five_rows)
    assert ids.dtype == np.int32
    assert values.dtype == np.float32
    np.testing.assert_array_equal(ids, expected_ids)
    assert_same_bits(np.ascontiguousarray(values), np.ascontiguousarray(expected))


def test_log_sum_exp(five_rows: tuple[Logits, DenseLogits]) -> None:
    """Over the whole vocabulary, in float64."""
    got, expected = (logits.log_sum_exp() for logits in five_rows)
    assert got.dtype == np.float64
    assert got.shape == (5,)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_gather(five_rows: tuple[Logits, DenseLogits]) -> None:
    """Single logits: among the best, outside them, mixed, repeated, none, and more than go at a time."""
    logits, dense = five_rows
    ordered, _ = dense.top(logits.n_vocab)
    assert logits.gather(0, ordered[0, :0]).shape == (0,)
    for row in (0, 4):
        best, rest = ordered[row, :128], ordered[row, 128:]
        many = np.resize(ordered[row], 3000)
        for ids in (best[5:6], best[::-1], rest[:1], rest[-3:], np.concatenate([best[:4], rest[:4], best[:4]]), many):
            got = logits.gather(row, ids)
            assert got.dtype == np.float32
            assert_same_bits(got, dense.gather(row, ids))


def test_what_is_no_row(five_rows: tuple[Logits, DenseLogits]) -> None:
    """A row that was not wanted is refused, although the device has room for it."""
    logits, _ = five_rows
    for row in (5, 7):
        with pytest.raises(IndexError):
            logits.dense(row)
        with pytest.raises(IndexError):
            logits.gather(row, tokens_of(1))


def test_a_pass_without_wanted_rows(small: CudaEngine) -> None:
    """No rows: empty answers of the right shapes."""
    logits = small.forward([Chunk(0, 0, tokens_of(1, 2, 3), 0)])
    assert logits.n_rows == 0
    for k in (5, 200):
        ids, values = logits.top(k)
        assert (ids.shape, values.shape) == ((0, k), (0, k))
    assert logits.log_sum_exp().shape == (0,)


def test_stale_logits_are_refused(small: CudaEngine) -> None:
    """Logits of a pass before the last one are refused, whether they had been looked at or not."""
    seen = small.forward([Chunk(0, 0, tokens_of(1, 2), 2)])
    seen.top(1)
    unseen = small.forward([Chunk(0, 2, tokens_of(3), 1)])
    last = small.forward([Chunk(0, 3, tokens_of(4), 1)])
    ask: list[Callable[[Logits], object]] = [
        lambda logits: logits.top(1),
        lambda logits: logits.log_sum_exp(),
        lambda logits: logits.gather(0, tokens_of(1)),
        lambda logits: logits.dense(0),
    ]
    for old, question in itertools.product((seen, unseen), ask):
        with pytest.raises(EngineError) as caught:
            question(old)
        assert caught.value.code == "stale_logits"
    assert last.dense(0).shape == (300,)


def test_handed_out_rows_stay(small: CudaEngine) -> None:
    """Arrays that were handed out are not changed by later passes."""
    logits = small.forward([Chunk(0, 0, tokens_of(1, 2), 2)])
    arrays: list[np.ndarray] = [
        *logits.top(9),
        logits.log_sum_exp(),
        logits.dense(1),
        logits.gather(0, np.arange(200, dtype=np.int32)),
    ]
    copies = [array.copy() for array in arrays]
    rows(small, Chunk(0, 0, tokens_of(7, 8), 2))
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"n_gpu_layers": 1},
        {"n_cpu_moe": 1},
        {"override_tensors": ("exps=CPU",)},
        {"cache_type_k": "q8_0"},
        {"cache_type_v": "q8_0"},
        {"cache_type_k": "f32", "cache_type_v": "f32"},
        {"devices": ()},
        {"devices": (1, 0, 1)},
        {"devices": (0, -1)},
        {"n_ctx": -1},
        {"n_slots": 0},
        {"n_batch": 0},
        {"n_batch": 1025},
        {"kv_pages": -1},
    ],
    ids=str,
)
def test_settings_that_cannot_be_honoured(change: dict[str, object]) -> None:
    """A setting that the engine would ignore or cannot use is refused by name, before a device or a file is touched."""
    settings = replace(EngineSettings(model="no such file"), **change)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=next(iter(change))) as caught:
        CudaEngine(settings)
    assert caught.value.code == "bad_settings"
    assert caught.value.remedy


class TinyDevice(HostDevice):
    """A host that claims little memory."""

    free = 0

    def memory(self) -> tuple[int, int]:
        return self.free, 2 << 30


def test_too_large_a_model_is_refused_with_what_is_missing(model_path: ModelPath) -> None:
    """The message says what weights, cache and scratch memory need, and how many GiB are missing."""
    require("host")
    settings = EngineSettings(model=str(model_path(MIXED)), n_slots=512, n_ctx=16384)
    device = TinyDevice()
    device.free = 1 << 30
    # 2 layers, keys and values in halves, 2 heads of 64, 8 Mi tokens: 8 GiB.
    with pytest.raises(
        EngineError, match=r"8\.0 GiB of KV cache .* [78]\.\d GiB are missing on host \(1\.0 of 2\.0"
    ) as e:
        CudaEngine(settings, devices=[device])
    assert e.value.code == "out_of_memory"
    assert "n_ctx" in str(e.value.remedy)


@pytest.mark.parametrize("kind", ["attn_q", "ffn_down_exps", "token_embd", "output"])
def test_a_type_without_a_codec_is_refused_by_the_tensor_s_name(kind: str, tmp_path: Path) -> None:
    """Q4_1 has no codec in the kernels."""
    require("host")
    path = write_tiny_model(tmp_path / "m.gguf", replace(MIXED, types=((kind, "Q4_1"),)))
    with pytest.raises(ModelError, match=rf"{kind}\.weight.*Q4_1") as caught:
        CudaEngine(EngineSettings(model=str(path)), devices=[HostDevice()])
    assert caught.value.code == "unsupported_quant_type"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"value_dim": 32}, "64 for keys and 32 for values"),
        ({"head_dim": 48, "value_dim": 48}, "heads of 48"),
        ({"n_embd": 272}, "width 272"),
        ({"n_embd": 16416}, "width 16416"),
        ({"n_expert": 513}, "513 experts"),
        ({"n_expert": 64, "n_expert_used": 17}, "17 a token"),
    ],
    ids=str,
)
def test_dimensions_that_no_kernel_is_made_for(change: dict[str, int], what: str, model_path: ModelPath) -> None:
    """What the kernels cannot compute is refused by what it is."""
    with GGUFFile.open(model_path(MIXED)) as file:
        config = ModelConfig.read(file)
    _check_model(config, "m.gguf")
    with pytest.raises(EngineError, match=what) as caught:
        _check_model(replace(config, **change), "m.gguf")  # type: ignore[arg-type]
    assert caught.value.code == "unsupported_variant"


def test_models_with_tensors_to_spare_or_missing(tmp_path: Path) -> None:
    """A tensor that would be ignored, one that is missing, and one of another shape are refused by name."""
    require("host")
    for i, (change, code) in enumerate(
        (
            ({"extra": "blk.0.attn_sinks"}, "unsupported_variant"),
            ({"drop": "blk.1.attn_q_norm"}, "missing_tensor"),
            ({"drop": "blk.1.ffn_up_exps"}, "missing_tensor"),
            ({"drop": "blk.1.ffn_norm", "extra": "blk.1.ffn_norm"}, "bad_metadata"),
        )
    ):
        path = write_tiny_model(tmp_path / f"{i}.gguf", replace(MIXED, **change))  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=rf"{next(iter(change.values()))}\.weight") as caught:
            CudaEngine(EngineSettings(model=str(path)), devices=[HostDevice()])
        assert caught.value.code == code


def test_progress_is_reported_now_and_then() -> None:
    """At the end in any case, with the share done and the device."""
    seen: list[tuple[float, str]] = []
    log = LoadingLog(lambda share, _speed, device: seen.append((share, device)), every=0.0)
    log(1, 4, "a")
    log(4, 4, "b")
    assert seen == [(0.25, "a"), (1.0, "b")]
    quiet = LoadingLog(lambda share, _speed, device: seen.append((share, device)), every=1e9)
    quiet(1, 4, "c")
    quiet(4, 4, "d")
    assert seen[2:] == [(1.0, "d")]


# --- the embedded pair ------------------------------------------------------------------------------------------------

PROMPT = "def fibonacci(n: int) -> int:\n"
NEAR_TIE = 0.15
"""The best two logits of the numpy engine's row lie closer than this many standard deviations of the row, where 8-bit
activations (1 to 2 % of that deviation) may choose otherwise."""


@pytest.mark.parametrize(
    ("name", "model", "n"),
    [
        pytest.param("host", DRAFT, 16, id="host-draft"),
        pytest.param("gpu", DRAFT, 60, id="gpu-draft", marks=gpu),
        pytest.param("gpu", TARGET, 60, id="gpu-target", marks=gpu),
    ],
)
def test_greedy_text_is_the_numpy_engine_s(name: str, model: str, n: int, make_engine: MakeEngine) -> None:
    """Along the numpy engine's greedy continuation, the same token is best at every position but near-ties, and the
    rows are close: 5 % in the median, with a divergence of 0.005."""
    require(name)
    engine = make_engine(name, model, n_ctx=128, n_slots=2, n_batch=8)
    vocabulary = Vocabulary.open(resolve_model(model))
    tokens = [0, *vocabulary.encode(PROMPT, parse_special=False, add_bos=False).tolist()]
    reference = numpy_engine(resolve_model(model), n_ctx=128)
    n_prompt = len(tokens)
    truth: list[np.ndarray] = []
    for _ in range(n):
        start = len(tokens) - 1 if truth else 0
        logits = reference.forward([Chunk(0, start, tokens_of(*tokens[start:]), 1)])
        truth.append(logits.dense(0).copy())
        tokens.append(int(truth[-1].argmax()))
    reference.close()
    expected = np.stack(truth)
    feed(engine, 0, tokens_of(*tokens[: n_prompt - 1]))
    steps = [rows(engine, Chunk(0, at, tokens_of(tokens[at]), 1)) for at in range(n_prompt - 1, len(tokens) - 1)]
    got = np.concatenate(steps)
    ordered = np.sort(expected, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > NEAR_TIE * expected.std(axis=1)
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(got.argmax(axis=1)[clear], expected.argmax(axis=1)[clear])
    assert np.median(relative_errors(got, expected)) < 0.05
    assert np.median(divergences(got, expected)) < 0.005
    # The same in one pass of a few rows.
    last = tokens_of(*tokens[-9:-1])
    assert_same_bits(rows(engine, Chunk(0, len(tokens) - 9, last, 8)), got[-8:])


@gpu
def test_perplexity_of_the_target() -> None:
    """Of the first 3,000 tokens of the bundled prompts, within 0.5 % of what the ik engine measures.

    The ik engine's figure was computed with `measure_perplexity(EngineSettings(engine="ik", model="embedded:target",
    threads=1, n_batch=256, n_ctx=1024), limit=3000)` of ik-llama-cpp-python 0.1.5 (4.5890 with n_batch=8; the numpy
    engine, float32, has 4.5945).
    """
    require("gpu")
    settings = EngineSettings(engine="cuda", model=TARGET, n_batch=256, n_ctx=1024)
    result = measure_perplexity(settings, limit=3000, load=CudaEngine)
    assert result.n_tokens == 3000
    assert result.perplexity.mean == pytest.approx(4.5908, rel=0.005)


# --- tokens that the engine chooses itself ----------------------------------------------------------------------------

SAMPLED = SamplingParams(temperature=0.9, seed=5)


@pytest.mark.parametrize("n", [1, 4, MAX_CHAIN])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SAMPLED], ids=["greedy", "coupled"])
def test_proposals_are_those_of_passes_and_drafts(small: CudaEngine, params: SamplingParams, n: int) -> None:
    """A chain gives the tokens and confidences of one pass and one draft after the other, and fills the slot alike."""
    prompt = random_tokens(20)
    proposed = small.propose([Chunk(1, 0, prompt, 1)], [params], n)
    assert small.length(1) == len(prompt) + n - 1

    text = prompt.tolist()
    chunk = Chunk(0, 0, prompt, 1)
    for i in range(n):
        drafted = draft(params, small.forward([chunk]).dense(0), text, len(text))
        assert proposed.tokens[0, i] == drafted.token
        np.testing.assert_allclose(proposed.confidences[0, i], drafted.confidence, rtol=1e-5)
        chunk = Chunk(0, len(text), np.array([drafted.token], np.int32), 1)
        text.append(drafted.token)
    last = np.array(text[-1:], np.int32)
    rows = [small.forward([Chunk(slot, len(text) - 1, last, 1)]).dense(0).copy() for slot in (0, 1)]
    np.testing.assert_array_equal(rows[0].view(np.int32), rows[1].view(np.int32))


def test_sessions_propose_together_as_alone(small: CudaEngine) -> None:
    """Two slots of different lengths and requests in one chain get what each gets by itself."""
    prompts = random_tokens(50), random_tokens(5, seed=2)
    params = SAMPLED, SamplingParams(temperature=0.0)
    chunks = [Chunk(slot, 0, prompt, 1) for slot, prompt in enumerate(prompts)]
    together = small.propose(chunks, params, 5)
    for i, chunk in enumerate(chunks):
        alone = small.propose([chunk], [params[i]], 5)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        np.testing.assert_array_equal(alone.confidences[0], together.confidences[i])


def test_proposals_that_are_refused(small: CudaEngine) -> None:
    """Too many tokens, chunks that want no row, requests that the engine cannot honour, no room: nothing changes."""
    tokens = random_tokens(4)
    chunk = Chunk(0, 0, tokens, 1)
    small.forward([chunk])
    rejection = SamplingParams(acceptance="rejection")
    penalized = SamplingParams(repeat_penalty=1.1)
    for chunks, params, n, code in [
        ([chunk], [SAMPLED], 0, "bad_rows"),
        ([chunk], [SAMPLED], MAX_CHAIN + 1, "bad_rows"),
        ([Chunk(0, 0, tokens, 0)], [SAMPLED], 1, "bad_rows"),
        ([chunk], [rejection], 1, "bad_params"),
        ([chunk], [penalized], 1, "bad_params"),
        ([Chunk(0, 9, tokens, 1)], [SAMPLED], 1, "bad_start"),
    ]:
        with pytest.raises(EngineError) as caught:
            small.propose(chunks, params, n)
        assert caught.value.code == code
        assert small.length(0) == 4
    filled = random_tokens(small.info.n_ctx - 2)
    for start in range(0, len(filled), small.info.n_batch):
        small.forward([Chunk(1, start, filled[start : start + small.info.n_batch], 0)])
    with pytest.raises(EngineError) as caught:
        small.propose([Chunk(1, len(filled), tokens[:1], 1)], [SAMPLED], 3)
    assert caught.value.code == "context_exceeded"
    assert small.propose([Chunk(1, len(filled), tokens[:1], 1)], [SAMPLED], 2).tokens.shape == (1, 2)
    assert not small.can_propose(rejection)
    assert not small.can_propose(penalized)
