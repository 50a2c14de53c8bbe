"""The null engine, and the registry of engines."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import structlog

from shared.engine import registry
from shared.engine.dense import DenseLogits
from shared.engine.interface import Chunk, EngineSettings
from shared.engine.null import FIRST_ID, NullEngine, NullLogits, next_token
from shared.engine.registry import available_engines, load_engine
from shared.errors import EngineError

SETTINGS = EngineSettings(engine="null", n_ctx=64, n_slots=2, n_batch=32)


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def test_the_next_token_depends_on_token_and_position_alone() -> None:
    """Two null engines, in other slots and other batches, continue a sequence alike: a draft is always accepted."""
    target, draft = NullEngine(SETTINGS), NullEngine(SETTINGS)
    target.forward([Chunk(1, 0, tokens(100, 200, 300), 0)])
    a = target.forward([Chunk(1, 3, tokens(5, 6, 7), 3)]).top(1)[0][:, 0]
    draft.forward([Chunk(0, 0, tokens(9, 9, 9), 0)])
    b = [draft.forward([Chunk(0, 3 + i, tokens(5 + i), 1)]).top(1)[0][0, 0] for i in range(3)]
    assert a.tolist() == b
    assert a.tolist() == [next_token(5 + i, 3 + i, 8192) for i in range(3)]


def test_generations_wander_and_never_end() -> None:
    """Ids are spread over the vocabulary, never below FIRST_ID, and a generation does not fall into a short loop."""
    seen = []
    token = 0
    for position in range(2000):
        token = next_token(token, position, 8192)
        seen.append(token)
    assert min(seen) >= FIRST_ID
    assert max(seen) < 8192
    assert len(set(seen)) > 1500


@pytest.mark.parametrize("n_vocab", [17, 18, 40])
def test_sparse_logits_equal_dense_ones(n_vocab: int) -> None:
    """top, gather and log_sum_exp answer as they would for the dense rows, ties by the lower id included."""
    peaks = [16, n_vocab - 1, (16 + n_vocab) // 2]
    sparse = NullLogits(peaks, n_vocab)
    dense = DenseLogits(np.stack([sparse.dense(row) for row in range(3)]))
    assert (sparse.n_rows, sparse.n_vocab) == (dense.n_rows, dense.n_vocab)
    for k in (1, 2, 3, n_vocab - 17, n_vocab - 16, n_vocab - 15, n_vocab, n_vocab + 5):
        if k < 1:
            continue
        for a, b in zip(sparse.top(k), dense.top(k), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
    np.testing.assert_allclose(sparse.log_sum_exp(), dense.log_sum_exp(), rtol=1e-7)
    ids = np.arange(n_vocab, dtype=np.int32)[::-1]
    for row in range(3):
        np.testing.assert_array_equal(sparse.gather(row, ids), dense.gather(row, ids))


def test_slots_are_kept_like_a_real_engines() -> None:
    """Lengths follow forward passes, rollbacks, truncation and copies; broken rules change nothing."""
    engine = NullEngine(SETTINGS)
    engine.forward([Chunk(0, 0, tokens(*range(20)), 1), Chunk(1, 0, tokens(1, 2), 2)])
    engine.forward([Chunk(0, 5, tokens(1), 1)])
    assert (engine.length(0), engine.length(1)) == (6, 2)
    engine.copy_prefix(0, 1, 4)
    engine.truncate(0, 3)
    assert (engine.length(0), engine.length(1)) == (3, 4)
    for code, chunk in (
        ("bad_start", Chunk(0, 4, tokens(1), 1)),
        ("bad_token", Chunk(0, 0, tokens(8192), 1)),
        ("bad_token", Chunk(0, 0, tokens(-1), 1)),
        ("context_exceeded", Chunk(1, 4, tokens(*range(61)), 1)),
    ):
        with pytest.raises(EngineError) as caught:
            engine.forward([chunk])
        assert caught.value.code == code
        assert (engine.length(0), engine.length(1)) == (3, 4)


def test_sizes_that_make_no_sense_are_refused() -> None:
    """No slots, or a vocabulary without any id that may be produced."""
    with pytest.raises(EngineError, match="n_slots"):
        NullEngine(EngineSettings(n_slots=0))
    with pytest.raises(EngineError, match="vocabulary"):
        NullEngine(SETTINGS, n_vocab=16)


def set_gpu(monkeypatch: pytest.MonkeyPatch, missing: EngineError | None) -> None:
    """Make this machine one with a GPU (None), or one that lacks what `missing` says."""
    monkeypatch.setitem(sys.modules, "shared.kernels.gpu", SimpleNamespace(cuda_unavailable=lambda: missing))


def test_engines_are_loaded_by_name() -> None:
    """A known name gives that engine; an unknown one an error that lists the names."""
    assert load_engine(SETTINGS).info.engine == "null"
    with pytest.raises(EngineError, match="auto, ik, numpy, cuda, null, emulated") as caught:
        load_engine(EngineSettings(engine="cuda9"))
    assert caught.value.code == "unknown_engine"


def test_auto_falls_back_to_numpy_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ik, "auto" runs the numpy engine, and a log line gives the reason."""
    missing = EngineError("the ik engine is not installed", "pip install it", "engine_unavailable")
    monkeypatch.setattr(registry, "ik_unavailable", lambda: missing)
    set_gpu(monkeypatch, None)
    with structlog.testing.capture_logs() as logs:
        engine = load_engine(EngineSettings(model="embedded:draft", n_ctx=32, n_slots=1))
    assert engine.info.engine == "numpy"
    engine.close()
    assert [(log["event"], log["engine"], log["reason"]) for log in logs] == [
        ("engine_chosen", "numpy", "the ik engine is not installed")
    ]
    state = {engine.name: engine for engine in available_engines()}
    assert list(state) == ["ik", "numpy", "cuda", "null", "emulated"]
    assert not state["ik"].usable
    assert state["ik"].remedy == "pip install it"
    assert state["numpy"].usable
    assert state["null"].usable


def test_cuda_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA can be used the engine is listed as usable; elsewhere with the reason and the remedy."""
    set_gpu(monkeypatch, None)
    assert {engine.name: engine.usable for engine in available_engines()}["cuda"]
    set_gpu(monkeypatch, EngineError("there is no NVIDIA driver", "install one", "engine_unavailable"))
    cuda = {engine.name: engine for engine in available_engines()}["cuda"]
    assert (cuda.usable, cuda.reason, cuda.remedy) == (False, "there is no NVIDIA driver", "install one")


def test_cuda_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "cuda" builds the CUDA engine with the settings as they are, and its module is imported no earlier."""
    monkeypatch.setitem(sys.modules, "shared.engine.cuda.engine", SimpleNamespace(CudaEngine=lambda settings: settings))
    settings = EngineSettings(engine="cuda", devices=(1, 2), kv_pages=100)
    assert load_engine(settings) is settings  # type: ignore[comparison-overlap]
