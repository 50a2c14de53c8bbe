"""The numpy engine: bitwise row invariance, its arithmetic, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from shared.engine.interface import Chunk, EngineSettings
from shared.engine.numpy import NumpyEngine, ops
from shared.engine.numpy.engine import _available_bytes, _check_memory
from shared.errors import EngineError, ModelError

N_TOKENS = 48


@pytest.fixture(scope="module")
def target() -> Iterator[NumpyEngine]:
    engine = NumpyEngine(EngineSettings(engine="numpy", model="embedded:target", n_slots=3, n_ctx=256, n_batch=64))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(3, 8192, N_TOKENS).astype(np.int32)


@pytest.fixture(scope="module")
def reference(target: NumpyEngine, tokens: np.ndarray) -> np.ndarray:
    """Every position's logits computed one token at a time: [N_TOKENS, n_vocab]."""
    target.truncate(0, 0)
    return np.stack([rows(target, Chunk(0, at, tokens[at : at + 1], 1))[0] for at in range(N_TOKENS)])


def rows(engine: NumpyEngine, *chunks: Chunk) -> np.ndarray:
    """All wanted rows of one forward pass: [n_rows, n_vocab] float32."""
    logits = engine.forward(chunks)
    assert logits.n_rows == sum(chunk.rows for chunk in chunks)
    return np.array([logits.dense(row) for row in range(logits.n_rows)], np.float32).reshape(-1, logits.n_vocab)


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))


def test_info_says_what_runs(target: NumpyEngine) -> None:
    """`info` names the model and its limits, and promises row invariance after checking the BLAS."""
    info = target.info
    assert (info.engine, info.model, info.architecture) == ("numpy", "embedded:target", "qwen3moe")
    assert info.quant == "Q4_K_M"
    assert (info.n_vocab, info.n_ctx, info.n_slots, info.n_batch) == (8192, 256, 3, 64)
    assert len(info.vocab_fingerprint) == 32
    assert info.row_invariant


@pytest.mark.parametrize("n", range(1, 18))
def test_rows_of_a_batch_equal_single_tokens(
    target: NumpyEngine, tokens: np.ndarray, reference: np.ndarray, n: int
) -> None:
    """Each row of a batch of n has bitwise the logits of decoding one token at a time."""
    start = 20
    target.truncate(0, 0)
    rows(target, Chunk(0, 0, tokens[:start], 0))
    assert_same_bits(rows(target, Chunk(0, start, tokens[start : start + n], n)), reference[start : start + n])


def test_other_slots_in_the_batch_change_nothing(
    target: NumpyEngine, tokens: np.ndarray, reference: np.ndarray
) -> None:
    """Rows keep their bits beside rows of other slots, in any order of chunks and in any slot."""
    for slot in range(3):
        target.truncate(slot, 0)
        rows(target, Chunk(slot, 0, tokens[: 10 + slot], 0))
    other = tokens[::-1].copy()
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        chunks = [Chunk(slot, 10 + slot, (tokens if slot else other)[10 + slot : 17 + 2 * slot], 2) for slot in order]
        got = rows(target, *chunks)
        for index, slot in enumerate(order):
            if slot:
                assert_same_bits(got[2 * index : 2 * index + 2], reference[15 + 2 * slot : 17 + 2 * slot])
            target.truncate(slot, 10 + slot)


@pytest.mark.parametrize("sizes", [(47,), (1, 46), (16, 16, 15), (7,) * 6 + (5,), (33, 14), (2, 3, 5, 8, 13, 16)])
def test_chunking_of_the_prefix_changes_nothing(
    target: NumpyEngine, tokens: np.ndarray, reference: np.ndarray, sizes: tuple[int, ...]
) -> None:
    """However the prefix is cut into batches, the next token's logits have the same bits."""
    assert sum(sizes) == N_TOKENS - 1
    target.truncate(1, 0)
    at = 0
    for size in sizes:
        rows(target, Chunk(1, at, tokens[at : at + size], 0))
        at += size
    assert_same_bits(rows(target, Chunk(1, at, tokens[at:], 1)), reference[at:])


def test_rollback_changes_nothing(target: NumpyEngine, tokens: np.ndarray, reference: np.ndarray) -> None:
    """After wrong tokens are rolled back, by an earlier start or by truncation, the bits are as if never computed."""
    wrong = tokens[::-1].copy()
    target.truncate(0, 0)
    rows(target, Chunk(0, 0, np.concatenate([tokens[:12], wrong[:9]]), 0))
    assert_same_bits(rows(target, Chunk(0, 12, tokens[12:20], 8)), reference[12:20])
    assert target.length(0) == 20
    rows(target, Chunk(0, 20, wrong[:5], 5))
    target.truncate(0, 18)
    assert target.length(0) == 18
    assert_same_bits(rows(target, Chunk(0, 18, tokens[18:22], 4)), reference[18:22])


def test_copied_prefixes_change_nothing(target: NumpyEngine, tokens: np.ndarray, reference: np.ndarray) -> None:
    """A slot that got its prefix by copying goes on with the same bits, and the source keeps its own."""
    target.truncate(0, 0)
    target.truncate(2, 0)
    rows(target, Chunk(0, 0, tokens[:25], 0))
    rows(target, Chunk(2, 0, tokens[::-1][:30].copy(), 0))
    target.copy_prefix(0, 2, 17)
    assert (target.length(0), target.length(2)) == (25, 17)
    got = rows(target, Chunk(2, 17, tokens[17:30], 3), Chunk(0, 25, tokens[25:28], 3))
    assert_same_bits(got, np.concatenate([reference[27:30], reference[25:28]]))
    target.copy_prefix(0, 0, 5)
    assert target.length(0) == 5


def test_few_wanted_rows_are_the_last_ones(target: NumpyEngine, tokens: np.ndarray, reference: np.ndarray) -> None:
    """`rows` picks the last tokens' logits, none at all included."""
    target.truncate(0, 0)
    assert rows(target, Chunk(0, 0, tokens[:10], 0)).shape == (0, 8192)
    assert_same_bits(rows(target, Chunk(0, 10, tokens[10:20], 3)), reference[17:20])


def test_linear_is_a_product_per_row() -> None:
    """`linear` agrees with a float64 product, and its rows do not depend on each other or on addresses."""
    rng = np.random.default_rng(2)
    for m, k in ((768, 512), (16, 512), (512, 256), (1, 96), (129, 65)):
        weight = rng.standard_normal((m, k)).astype(np.float32)
        x = rng.standard_normal((5, k)).astype(np.float32)
        np.testing.assert_allclose(ops.linear(weight, x), x.astype(float) @ weight.T.astype(float), atol=1e-4)
        assert ops.rows_are_independent(weight)


def test_dependent_rows_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check for row invariance fails when a product depends on the number of rows."""
    honest = ops.linear

    def by_size(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
        return honest(weight, x) if len(x) == 1 else (x[:, ::-1].copy() @ weight.T[::-1]).astype(np.float32)

    monkeypatch.setattr(ops, "linear", by_size)
    assert not ops.rows_are_independent(np.random.default_rng(3).standard_normal((64, 333)).astype(np.float32))


def test_select_experts() -> None:
    """The k largest scores win, lower ids first among equals, with softmax weights that sum to one if asked for."""
    scores = np.log(np.array([[1, 4, 2, 1], [3, 3, 3, 3]], np.float32))
    ids, weights = ops.select_experts(scores, 2, normalize=True, scale=1.0)
    assert ids.tolist() == [[1, 2], [0, 1]]
    np.testing.assert_allclose(weights, [[4 / 6, 2 / 6], [0.5, 0.5]], rtol=1e-6)
    _, weights = ops.select_experts(scores, 2, normalize=False, scale=2.0)
    np.testing.assert_allclose(weights, [[1.0, 0.5], [0.5, 0.5]], rtol=1e-6)


def test_silu_product_at_extremes() -> None:
    """silu(gate) * up is finite and right for gates far from zero."""
    got = ops.silu_product(np.array([[-1000, -1, 0, 1, 1000, 2, 2, 2, 2, 2]], np.float32))
    np.testing.assert_allclose(got[0], [0, -2 / (1 + np.e), 0, 2 / (1 + 1 / np.e), 2000], rtol=1e-6)


def test_rotations_are_those_of_complex_numbers() -> None:
    """NORM rotates pairs of neighbours, NEOX pairs half a rotation apart; what is beyond the rotated part stays."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, 2, 10)).astype(np.float32)
    angles = rng.standard_normal((3, 1, 4))
    cos, sin, turn = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), np.exp(1j * angles)
    norm, neox = ops.rotate_norm(x, cos, sin), ops.rotate_neox(x, cos, sin)
    np.testing.assert_allclose(
        norm[..., 0:8:2] + 1j * norm[..., 1:8:2], (x[..., 0:8:2] + 1j * x[..., 1:8:2]) * turn, atol=1e-6
    )
    np.testing.assert_allclose(neox[..., :4] + 1j * neox[..., 4:8], (x[..., :4] + 1j * x[..., 4:8]) * turn, atol=1e-6)
    np.testing.assert_array_equal(norm[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(neox[..., 8:], x[..., 8:])


BAD_CHUNKS = {
    "bad_slot": [Chunk(3, 0, np.array([5], np.int32), 1)],
    "duplicate_slot": [Chunk(0, 0, np.array([5], np.int32), 1), Chunk(0, 1, np.array([5], np.int32), 1)],
    "empty_chunk": [Chunk(0, 0, np.array([], np.int32), 0)],
    "bad_start": [Chunk(0, 5, np.array([5], np.int32), 1)],
    "bad_rows": [Chunk(0, 0, np.array([5], np.int32), 2)],
    "bad_token": [Chunk(0, 0, np.array([5, 8192], np.int32), 1)],
    "batch_too_large": [Chunk(0, 0, np.full(65, 5, np.int32), 1)],
    "empty_batch": [],
}


@pytest.mark.parametrize("code", BAD_CHUNKS)
def test_batches_that_are_refused(target: NumpyEngine, tokens: np.ndarray, code: str) -> None:
    """A batch that breaks a rule is refused with its code, and no slot is changed."""
    target.truncate(0, 0)
    rows(target, Chunk(0, 0, tokens[:4], 0))
    with pytest.raises(EngineError) as caught:
        target.forward(BAD_CHUNKS[code])
    assert caught.value.code == code
    assert target.length(0) == 4


def test_negative_tokens_are_refused(target: NumpyEngine) -> None:
    """A negative token id does not count from the vocabulary's end."""
    target.truncate(0, 0)
    with pytest.raises(EngineError, match="-1") as caught:
        target.forward([Chunk(0, 0, np.array([-1], np.int32), 1)])
    assert caught.value.code == "bad_token"


def test_the_context_can_be_filled_but_not_exceeded() -> None:
    """A slot takes n_ctx tokens and not one more."""
    engine = NumpyEngine(EngineSettings(model="embedded:draft", n_slots=1, n_ctx=8))
    rows(engine, Chunk(0, 0, np.arange(3, 11, dtype=np.int32), 1))
    assert engine.length(0) == 8
    with pytest.raises(EngineError) as caught:
        engine.forward([Chunk(0, 8, np.array([5], np.int32), 1)])
    assert caught.value.code == "context_exceeded"
    engine.close()


def test_slots_and_lengths_that_are_refused(target: NumpyEngine, tokens: np.ndarray) -> None:
    """`length`, `truncate` and `copy_prefix` refuse slots that do not exist and tokens that are not held."""
    target.truncate(0, 0)
    rows(target, Chunk(0, 0, tokens[:4], 0))
    for code, call in (
        ("bad_slot", lambda: target.length(3)),
        ("bad_slot", lambda: target.length(-1)),
        ("bad_slot", lambda: target.truncate(3, 0)),
        ("bad_length", lambda: target.truncate(0, 5)),
        ("bad_length", lambda: target.truncate(0, -1)),
        ("bad_slot", lambda: target.copy_prefix(3, 0, 0)),
        ("bad_slot", lambda: target.copy_prefix(0, 3, 0)),
        ("bad_length", lambda: target.copy_prefix(0, 1, 5)),
    ):
        with pytest.raises(EngineError) as caught:
            call()
        assert caught.value.code == code
    assert target.length(0) == 4


def test_context_defaults_to_the_model_s_own() -> None:
    """n_ctx 0 takes the model's context length, and a closed engine computes nothing more."""
    engine = NumpyEngine(EngineSettings(model="embedded:draft", n_slots=1))
    assert engine.info.n_ctx == 2048
    engine.close()
    engine.close()
    with pytest.raises(EngineError) as caught:
        engine.forward([Chunk(0, 0, np.array([5], np.int32), 1)])
    assert caught.value.code == "engine_closed"


@pytest.mark.parametrize(
    "change",
    [
        {"cache_type_k": "q8_0"},
        {"cache_type_v": "q4_0"},
        {"flash_attention": True},
        {"n_gpu_layers": 1},
        {"n_cpu_moe": 1},
        {"override_tensors": ("exps=CPU",)},
        {"n_ctx": -1},
        {"n_slots": 0},
        {"n_batch": 0},
        {"threads": -1},
    ],
)
def test_settings_that_cannot_be_honoured(change: dict[str, object]) -> None:
    """A setting that the engine would ignore or cannot use is refused by name."""
    settings = dataclasses.replace(EngineSettings(model="embedded:draft"), **change)
    with pytest.raises(EngineError, match=next(iter(change))) as caught:
        NumpyEngine(settings)
    assert caught.value.code == "bad_settings"


def test_too_large_a_model_is_refused_with_what_is_missing() -> None:
    """A model that would not fit is refused with the missing memory; an unknown amount of memory refuses nothing."""
    gib = 1 << 30
    _check_memory(2 * gib, gib, Path("m.gguf"), 3 * gib)
    _check_memory(2 * gib, gib, Path("m.gguf"), None)
    with pytest.raises(EngineError, match=r"m\.gguf needs 2\.0 GiB .* 1\.0 GiB .* 0\.5 GiB") as caught:
        _check_memory(2 * gib, gib, Path("m.gguf"), 5 * gib // 2)
    assert caught.value.code == "out_of_memory"
    with pytest.raises(EngineError) as caught:
        NumpyEngine(EngineSettings(model="embedded:draft", n_slots=1 << 40))
    assert caught.value.code == "out_of_memory"


def test_available_memory(tmp_path: Path) -> None:
    """Available memory is read from meminfo, and is unknown where that is missing or odd."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemAvailable:     123 kB\n")
    assert _available_bytes(meminfo) == 123 * 1024
    meminfo.write_text("MemTotal:  900 kB\nMemAvailable:\n")
    assert _available_bytes(meminfo) is None
    assert _available_bytes(tmp_path / "missing") is None


def write_model(
    path: Path,
    architecture: str,
    *,
    drop: str = "",
    extra: str = "",
    change: Callable[[gguf.GGUFWriter], object] = lambda _: None,
) -> Path:
    """A random model: 2 layers, width 64, 4 heads over 2 key-value heads, 50 tokens, 6 experts top-3; float32."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "qwen3moe":
        writer.add_expert_count(6)
        writer.add_expert_used_count(3)
        writer.add_expert_feed_forward_length(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(50)])
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (50, 64), "output_norm": (64,)}
    for layer in range(2):
        block = {
            "attn_norm": (64,),
            "attn_q": (64, 64),
            "attn_k": (32, 64),
            "attn_v": (32, 64),
            "attn_output": (64, 64),
        }
        block |= {"ffn_norm": (64,)}
        if architecture == "qwen3moe":
            block |= {"ffn_gate_inp": (6, 64), "ffn_gate_exps": (6, 32, 64), "ffn_up_exps": (6, 32, 64)}
            block |= {"ffn_down_exps": (6, 64, 32)}
        else:
            block |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
        if architecture != "llama":
            block |= {"attn_q_norm": (16,), "attn_k_norm": (16,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    if extra:
        shapes[extra] = (8,)
    for name, shape in shapes.items():
        if name != drop:
            scale = 1.0 if len(shape) == 1 else 0.3
            writer.add_tensor(f"{name}.weight", (rng.standard_normal(shape) * scale).astype(np.float32))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def float64_reference(path: Path, tokens: np.ndarray, *, neox: bool) -> np.ndarray:
    """The whole sequence at once in float64, written independently of the engine: [n, 50]."""
    w = {t.name.removesuffix(".weight"): np.array(t.data, float) for t in gguf.GGUFReader(path).tensors}
    n = len(tokens)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[name]

    def rope(x: np.ndarray) -> np.ndarray:
        turn = np.exp(1j * np.arange(n)[:, None] * 10000.0 ** (-np.arange(8) / 8))[:, None]
        if neox:
            z = (x[..., :8] + 1j * x[..., 8:]) * turn
            return np.concatenate([z.real, z.imag], -1)
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
        g = x @ gate.T
        return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T

    def ffn(x: np.ndarray, b: str) -> np.ndarray:
        if b + "ffn_gate" in w:
            return swiglu(x, *(w[b + f"ffn_{name}"] for name in ("gate", "up", "down")))
        out = np.zeros_like(x)
        for i, probs in enumerate(np.exp(x @ w[b + "ffn_gate_inp"].T)):
            best = sorted(range(6), key=lambda e: -probs[e])[:3]
            for e in best:
                part = swiglu(x[i], *(w[b + f"ffn_{name}_exps"][e] for name in ("gate", "up", "down")))
                out[i] += probs[e] / probs[best].sum() * part
        return out

    x = w["token_embd"][tokens]
    for layer in range(2):
        b = f"blk.{layer}."
        h = norm(x, b + "attn_norm")
        q, k, v = ((h @ w[b + f"attn_{name}"].T).reshape(n, -1, 16) for name in "qkv")
        if b + "attn_q_norm" in w:
            q, k = norm(q, b + "attn_q_norm"), norm(k, b + "attn_k_norm")
        q, k, v = rope(q), rope(k).repeat(2, axis=1), v.repeat(2, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / 4 + np.triu(np.full((n, n), -np.inf), 1)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", probs, v).reshape(n, 64) @ w[b + "attn_output"].T
        x = x + ffn(norm(x, b + "ffn_norm"), b)
    return norm(x, "output_norm") @ w["token_embd"].T


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3moe"])
def test_models_equal_a_float64_reference(tmp_path: Path, architecture: str) -> None:
    """Each architecture gives the logits of an independent float64 computation, bit-stable over batches."""
    path = write_model(tmp_path / "m.gguf", architecture)
    tokens = np.random.default_rng(6).integers(0, 50, 20).astype(np.int32)
    engine = NumpyEngine(EngineSettings(model=str(path), n_slots=1))
    assert engine.info.architecture == architecture
    got = rows(engine, Chunk(0, 0, tokens, 20))
    expected = float64_reference(path, tokens, neox=architecture != "llama")
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    assert_same_bits(rows(engine, Chunk(0, 7, tokens[7:8], 1)), got[7:8])
    engine.close()


def test_models_with_tensors_to_spare_or_missing(tmp_path: Path) -> None:
    """A tensor that would be ignored, and one that is missing, are refused by name."""
    with pytest.raises(ModelError, match=r"attn_sinks\.weight") as caught:
        NumpyEngine(EngineSettings(model=str(write_model(tmp_path / "a.gguf", "llama", extra="blk.0.attn_sinks"))))
    assert (caught.value.code, caught.value.remedy) == ("unsupported_variant", "use the ik engine")
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight") as caught:
        NumpyEngine(EngineSettings(model=str(write_model(tmp_path / "b.gguf", "llama", drop="blk.1.ffn_up"))))
    assert caught.value.code == "missing_tensor"
    with pytest.raises(ModelError, match=r"attn_q_norm\.weight"):
        NumpyEngine(EngineSettings(model=str(write_model(tmp_path / "c.gguf", "qwen3", drop="blk.0.attn_q_norm"))))


@pytest.mark.parametrize(("factor", "same_as"), [(2.0, 2), (4.0, 4)])
def test_scaled_positions(tmp_path: Path, factor: float, same_as: int) -> None:
    """Linear scaling by f puts position f p where p was; llama3's factors, all equal to f, do the same."""
    plain = write_model(tmp_path / "plain.gguf", "llama")
    linear = write_model(
        tmp_path / "linear.gguf",
        "llama",
        change=lambda writer: (
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
            writer.add_rope_scaling_factor(factor),
        ),
    )
    llama3 = write_model(
        tmp_path / "llama3.gguf",
        "llama",
        change=lambda writer: writer.add_tensor("rope_freqs.weight", np.full(8, factor, np.float32)),
    )
    tables = []
    for path in (plain, linear, llama3):
        engine = NumpyEngine(EngineSettings(model=str(path), n_slots=1))
        tables.append((engine._cos, engine._sin))
        engine.close()
    for cos, sin in tables[1:]:
        np.testing.assert_allclose(cos[::same_as], tables[0][0][: len(cos[::same_as])], atol=1e-6)
        np.testing.assert_allclose(sin[::same_as], tables[0][1][: len(sin[::same_as])], atol=1e-6)
