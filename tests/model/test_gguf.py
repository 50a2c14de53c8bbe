"""The GGUF reader, the embedded models' names and the vocabulary's fingerprint."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import ModelError
from shared.model.config import ModelConfig
from shared.model.gguf import GGUFFile, recipe_name, vocabulary_fingerprint
from shared.model.names import EMBEDDED_MODELS, embedded_prompts, load_prompts, model_file_name, resolve_model
from shared.quant.recipes import RECIPES

TOKENS = ["<|end|>", "a", "b", "Ġc", "é"]


def write_tiny(
    path: Path, change: Callable[[gguf.GGUFWriter], None] | None = None, *, tokens: list[str] = TOKENS
) -> Path:
    """A valid qwen3 model of one layer; `change` adds to it before it is written."""
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_eos_token_id(0)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_array("tiny.floats", [0.5, 1.5])
    writer.add_array("tiny.flags", [True, False])
    writer.add_int64("tiny.int64", -5)
    rng = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.standard_normal((len(tokens), 32)).astype(np.float32))
    quantized = gguf.quants.quantize(rng.standard_normal((4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def read_everything(path: Path) -> None:
    """Open a file and touch all that it offers."""
    with GGUFFile.open(path) as file:
        for key in file.metadata:
            file.metadata[key]
        for name, info in file.tensors.items():
            assert len(file.raw(name)) == info.n_bytes
        vocabulary_fingerprint(file)
        ModelConfig.read(file)


def refusal(path: Path) -> ModelError:
    """The error that opening the file gives."""
    with pytest.raises(ModelError) as caught:
        read_everything(path)
    return caught.value


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_embedded_models_read_as_by_the_gguf_package(name: str) -> None:
    """Every metadata value, tensor shape, type, offset and byte is what the `gguf` package reads."""
    path = resolve_model(name)
    oracle = gguf.GGUFReader(path)
    with GGUFFile.open(path) as file:
        expected = {key: field for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
        assert list(file.metadata) == list(expected)
        for key, field in expected.items():
            value = file.metadata[key]
            if isinstance(value, (tuple, np.ndarray)):
                assert list(value) == field.contents()
            else:
                assert value == field.contents()
                assert type(value) is type(field.contents())
        assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
        for tensor in oracle.tensors:
            info = file.tensors[tensor.name]
            assert info.shape == tuple(tensor.shape)
            assert info.quant.id == tensor.tensor_type
            assert (info.offset, info.n_bytes, info.part) == (tensor.data_offset, tensor.n_bytes, 0)
            assert info.n_elements == tensor.n_elements
            assert info.n_rows * info.shape[0] == tensor.n_elements
            np.testing.assert_array_equal(file.raw(tensor.name), tensor.data.reshape(-1).view(np.uint8))


def test_every_kind_of_value(tiny: Path) -> None:
    """Scalars come as Python values, strings as str, string arrays as tuples, other arrays as read-only arrays."""
    with GGUFFile.open(tiny) as file:
        assert file.path == tiny
        assert file.metadata["general.architecture"] == "qwen3"
        assert file.metadata["tokenizer.ggml.tokens"] == tuple(TOKENS)
        assert file.metadata["tokenizer.ggml.add_bos_token"] is False
        assert file.metadata["tiny.int64"] == -5
        floats, flags = file.metadata["tiny.floats"], file.metadata["tiny.flags"]
        assert isinstance(floats, np.ndarray)
        assert isinstance(flags, np.ndarray)
        assert floats.tolist() == [0.5, 1.5]
        assert flags.tolist() == [True, False]
        assert not floats.flags.writeable
        assert not file.raw("q.weight").flags.writeable
        assert "nothing" not in file.metadata
        with pytest.raises(KeyError):
            file.metadata["nothing"]
        with pytest.raises(ModelError, match="no tensor 'nothing'"):
            file.raw("nothing")


def test_large_vocabularies_are_complete(tmp_path: Path) -> None:
    """A vocabulary of 150,000 tokens is read without loss or reordering."""
    tokens = [f"t{i}" * (1 + i % 3) for i in range(150_000)]
    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_token_list(tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        assert file.metadata["tokenizer.ggml.tokens"] == tuple(tokens)


def test_arrays_outlive_the_file(tiny: Path) -> None:
    """After `close`, views handed out and values read before stay valid; anything new is refused as closed."""
    file = GGUFFile.open(tiny)
    raw = file.raw("q.weight")
    copy = raw.copy()
    assert file.metadata["tiny.int64"] == -5
    file.close()
    file.close()
    np.testing.assert_array_equal(raw, copy)
    assert file.metadata["tiny.int64"] == -5
    for read in (
        lambda: file.raw("q.weight"),
        lambda: file.metadata["tiny.floats"],
        lambda: file.raw_metadata("tiny.floats"),
    ):
        with pytest.raises(ModelError) as caught:
            read()
        assert caught.value.code == "closed"


def test_missing_file_and_directory(tmp_path: Path) -> None:
    """A missing file and a directory are named, with what to do."""
    assert refusal(tmp_path / "no.gguf").code == "model_not_found"
    error = refusal(tmp_path)
    assert (error.code, str(tmp_path) in error.message) == ("model_not_found", True)
    assert error.remedy


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "truncated"),
        (b"GG", "truncated"),
        (b"GGUF", "truncated"),
        (b"GGUF\x03\0\0\0", "truncated"),
        (b"GGUF\x03\0\0\0" + bytes(15), "truncated"),
        (b"PK\x03\x04 something else entirely", "not_gguf"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "unsupported_version"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "unsupported_version"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big_endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "bad_count"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "bad_count"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62) + bytes(32), "bad_gguf"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sII", 1, b"k", 9, 8) + b"\xff" * 8, "bad_count"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sII", 1, b"k", 9, 10) + b"\xff" * 8, "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1) + bytes(32), "bad_gguf"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIQ", 1, b"k", 99, 1), "bad_gguf"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q2sIQ", 2, b"\xff\xfe", 4, 1), "bad_utf8"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, data: bytes, code: str) -> None:
    """Each kind of broken header has its own stable code, and the file is named."""
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    error = refusal(path)
    assert error.code == code
    assert str(path) in error.message
    assert error.remedy


def tensor_table(*entries: bytes, alignment: int = 32, data: int = 256) -> bytes:
    """A GGUF without metadata that has the given tensor table."""
    table = b"GGUF" + struct.pack("<IQQ", 3, len(entries), 0) + b"".join(entries)
    return table + bytes(-len(table) % alignment) + bytes(data)


def entry(name: bytes, shape: tuple[int, ...], type_id: int, offset: int) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + dimensions + struct.pack("<IQ", type_id, offset)


@pytest.mark.parametrize(
    ("table", "code", "words"),
    [
        ((entry(b"w", (8,), 77, 0),), "unknown_quant_type", ("'w'", "77")),
        ((entry(b"w", (8,), 0, 0), entry(b"w", (8,), 0, 32)), "duplicate_tensor", ("'w'",)),
        ((entry(b"v", (8, 2), 0, 0), entry(b"w", (8,), 0, 32)), "bad_gguf", ("'v'", "'w'", "overlap")),
        ((entry(b"w", (65,), 0, 0),), "truncated", ("'w'", "4 bytes")),
        ((entry(b"w", (8,), 0, 2**63),), "truncated", ("'w'",)),
        ((entry(b"w", (2**63, 2**63, 2**63, 2**63), 0, 0),), "truncated", ("'w'",)),
        ((entry(b"w", (8,), 0, 4),), "bad_gguf", ("'w'", "alignment")),
        ((entry(b"w", (33,), 8, 0),), "bad_gguf", ("'w'", "Q8_0")),
        ((entry(b"w", (0,), 0, 0),), "bad_gguf", ("'w'", "empty")),
        ((entry(b"w", (), 0, 0) + bytes(8),), "bad_gguf", ("'w'", "0 dimensions")),
        ((entry(b"w", (1, 1, 1, 1, 1), 0, 0),), "bad_gguf", ("'w'", "5 dimensions")),
        ((entry(b"\xff", (8,), 0, 0),), "bad_utf8", ("name",)),
    ],
)
def test_tensor_tables_that_are_refused(tmp_path: Path, table: tuple[bytes, ...], code: str, words: tuple[str]) -> None:
    """A wrong tensor table is refused with the tensor's name and what is wrong with it."""
    path = tmp_path / "model.gguf"
    path.write_bytes(tensor_table(*table))
    error = refusal(path)
    assert error.code == code
    assert all(word in error.message for word in words), error.message


def test_missing_bytes_are_counted(tiny: Path, tmp_path: Path) -> None:
    """A file cut short anywhere is refused as truncated; in the data, with the number of bytes that are missing."""
    data = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    with GGUFFile.open(tiny) as file:
        end = max(info.offset + info.n_bytes for info in file.tensors.values())
    path.write_bytes(data[: end - 11])
    error = refusal(path)
    assert error.code == "truncated"
    assert "11 bytes are missing" in error.message
    for size in range(0, end, 41):
        path.write_bytes(data[:size])
        assert refusal(path).code in ("truncated", "bad_count")


def test_alignment_must_be_a_power_of_two(tmp_path: Path) -> None:
    """`general.alignment` is honoured, and a nonsensical one refused."""
    good = write_tiny(tmp_path / "good.gguf", lambda writer: writer.add_custom_alignment(256))
    with GGUFFile.open(good) as file:
        assert all(info.offset % 256 == 0 for info in file.tensors.values())
    bad = write_tiny(tmp_path / "bad.gguf", lambda writer: writer.add_uint32("general.alignment", 24))
    assert refusal(bad).code == "bad_gguf"


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    """A model of two tensors in three files, the first of which holds the metadata alone."""
    paths = [tmp_path / f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(str(path), "qwen3")
        if number == 0:
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(TOKENS)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", 2)
        if number:
            writer.add_tensor(f"blk.{number}.w", np.full((2, 8), number, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_split_files_open_as_one(split: list[Path]) -> None:
    """The first part opens the whole: all tensors, each with its part, and the first part's metadata."""
    with GGUFFile.open(split[0]) as file:
        assert file.paths == tuple(split)
        assert file.metadata["tokenizer.ggml.tokens"] == tuple(TOKENS)
        assert [(info.name, info.part) for info in file.tensors.values()] == [("blk.1.w", 1), ("blk.2.w", 2)]
        for number in (1, 2):
            assert file.raw(f"blk.{number}.w").view(np.float32).tolist() == [number] * 16


def test_split_files_that_do_not_fit(split: list[Path], tmp_path: Path) -> None:
    """A part other than the first, a missing part, a renamed one and a doubled one are each refused by name."""
    assert split[0].name in refusal(split[1]).remedy
    other = tmp_path / "other.gguf"
    shutil.copy(split[0], other)
    assert refusal(other).code == "bad_split"
    saved = split[2].read_bytes()
    shutil.copy(split[1], split[2])
    error = refusal(split[0])
    assert (error.code, split[2].name in error.message) == ("bad_split", True)
    split[2].unlink()
    error = refusal(split[0])
    assert (error.code, split[2].name in error.message) == ("model_not_found", True)
    # Both parts say that they hold the tensor blk.1.w.
    split[2].write_bytes(saved.replace(b"blk.2.w", b"blk.1.w"))
    assert refusal(split[0]).code == "duplicate_tensor"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_corruption_is_a_model_error(tiny: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Flipped, overwritten and cut bytes give values or a ModelError, and never an allocation out of proportion."""
    good = tiny.read_bytes()
    content = bytearray(good)
    with GGUFFile.open(tiny) as file:
        header = min(info.offset for info in file.tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        patch = data.draw(
            st.sampled_from([b"\xff", b"\0", b"\xff" * 8, b"\0" * 8, b"\x7f"]) | st.binary(min_size=1, max_size=8)
        )
        content[at : at + len(patch)] = patch
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with contextlib.suppress(ModelError):
            read_everything(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50 * len(good) + 200_000


def test_every_single_byte_flip_is_a_model_error(tiny: Path, tmp_path: Path) -> None:
    """Inverting any one byte before the tensors' data gives values or a ModelError."""
    good = tiny.read_bytes()
    with GGUFFile.open(tiny) as file:
        header = min(info.offset for info in file.tensors.values())
    path = tmp_path / "flip.gguf"
    refused = 0
    for at in range(header):
        content = bytearray(good)
        content[at] ^= 0xFF
        path.write_bytes(content)
        try:
            read_everything(path)
        except ModelError:
            refused += 1
    # Counts, kinds, lengths, names and types are most of a header.
    assert refused > header // 4


def test_fingerprint_of_the_embedded_pair_agrees() -> None:
    """The embedded target and draft share one vocabulary, and so one fingerprint."""
    prints = []
    for name in EMBEDDED_MODELS:
        with GGUFFile.open(resolve_model(name)) as file:
            prints.append(vocabulary_fingerprint(file))
    assert len(prints) == 2
    assert prints[0] == prints[1]
    assert len(bytes.fromhex(prints[0])) == 16


def test_fingerprint_covers_the_vocabulary_alone(tmp_path: Path) -> None:
    """Tokens, their order, their types and the special ids change the fingerprint; other metadata does not."""

    def fingerprint(change: Callable[[gguf.GGUFWriter], None] | None = None, tokens: list[str] = TOKENS) -> str:
        with GGUFFile.open(write_tiny(tmp_path / "f.gguf", change, tokens=tokens)) as file:
            return vocabulary_fingerprint(file)

    base = fingerprint()
    assert fingerprint() == base
    assert fingerprint(lambda writer: writer.add_string("general.name", "other")) == base
    assert fingerprint(lambda writer: writer.add_token_merges(["a b"])) == base
    different = [
        fingerprint(tokens=[*TOKENS[:-1], "è"]),
        fingerprint(tokens=[TOKENS[0], TOKENS[2], TOKENS[1], *TOKENS[3:]]),
        fingerprint(tokens=[*TOKENS[:-2], "Ġcé", ""]),
        fingerprint(lambda writer: writer.add_eot_token_id(0)),
        fingerprint(lambda writer: writer.add_bos_token_id(0)),
    ]
    assert len({base, *different}) == 1 + len(different)


def test_a_file_without_vocabulary_has_no_fingerprint(tmp_path: Path) -> None:
    """A GGUF without tokens is refused, not fingerprinted."""
    path = tmp_path / "no-vocabulary.gguf"
    path.write_bytes(tensor_table(entry(b"w", (8,), 0, 0)))
    with GGUFFile.open(path) as file, pytest.raises(ModelError, match="no vocabulary"):
        vocabulary_fingerprint(file)


@pytest.mark.parametrize(
    ("number", "name"), [(15, "Q4_K_M"), (148, "IQ4_KSS"), (None, "F32"), (1024, "F32"), (-1, "F32"), (True, "F32")]
)
def test_the_recipe_is_named_as_by_llama_cpp(tmp_path: Path, number: int | None, name: str) -> None:
    """By the number in the file; where that is missing or unknown, by the type that holds most of the bytes."""

    def change(writer: gguf.GGUFWriter) -> None:
        if isinstance(number, bool):
            writer.add_bool("general.file_type", number)
        elif number is not None:
            writer.add_int32("general.file_type", number)
        writer.add_tensor("most", np.zeros((64, 64), np.float32))

    with GGUFFile.open(write_tiny(tmp_path / "m.gguf", change=change)) as file:
        assert recipe_name(file) == name


def test_recipes_are_those_of_llama_cpp_and_of_ik() -> None:
    """Every number that either of them gives has the name that it gives."""
    for member in gguf.LlamaFileType:
        if member.value in RECIPES and member.name not in ("MOSTLY_MXFP4_MOE", "GUESSED"):
            assert RECIPES[member.value] == member.name.partition("_")[2]
    ik_llama_cpp = pytest.importorskip("ik_llama_cpp")
    quantize = Path(ik_llama_cpp.__file__).parent / "bin" / "llama-quantize"
    usage = subprocess.run([quantize, "--help"], capture_output=True, text=True, check=False)
    rows = re.findall(r"^ *(\d+) +or +(\w+) *:(?! alias)", usage.stdout + usage.stderr, re.MULTILINE)
    assert len(rows) > 60
    assert {int(number): name for number, name in rows}.items() <= RECIPES.items()


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedded names and paths resolve; unknown names, missing files and directories are refused with a remedy."""
    assert resolve_model("embedded:target").name == "pymoe-64m-a18m-Q4_K_M.gguf"
    assert resolve_model("embedded:draft").name == "pymoe-11m-a2m-draft-Q4_K_M.gguf"
    model = tmp_path / "m.gguf"
    model.write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(os.fspath(model)) == model
    assert resolve_model("~/m.gguf") == model
    assert model_file_name(os.fspath(model)) == model_file_name("m.gguf") == "m.gguf"
    assert model_file_name("embedded:draft") == "pymoe-11m-a2m-draft-Q4_K_M.gguf"
    for name in (
        "embedded:huge",
        "embedded:",
        "",
        os.fspath(tmp_path / "no.gguf"),
        os.fspath(tmp_path),
        "a\0b",
        "x" * 5000,
    ):
        with pytest.raises(ModelError) as caught:
            resolve_model(name)
        assert caught.value.code == "model_not_found"
        assert caught.value.remedy


def test_embedded_prompts_are_typed(tmp_path: Path) -> None:
    """All 200 embedded prompts load; a line that is no prompt is refused by its number."""
    prompts = load_prompts()
    assert [prompt.id for prompt in prompts] == list(range(200))
    assert {prompt.kind for prompt in prompts} == {"code", "docs"}
    assert all(prompt.text and prompt.source and prompt.licence for prompt in prompts)
    good = embedded_prompts().read_text(encoding="utf-8").split("\n")[0]
    path = tmp_path / "prompts.jsonl"
    for line in ("{", "[]", json.dumps({**json.loads(good), "text": 5}), json.dumps({"id": 1})):
        path.write_text(f"{good}\n{line}\n", encoding="utf-8")
        with pytest.raises(ModelError, match=r"prompts\.jsonl:2"):
            load_prompts(path)
    with pytest.raises(ModelError, match="cannot read"):
        load_prompts(tmp_path / "missing.jsonl")


def test_random_bytes_after_the_magic(tmp_path: Path) -> None:
    """Files of random bytes behind a valid header are refused, never crash the reader."""
    rng = random.Random(5)
    path = tmp_path / "random.gguf"
    for _ in range(300):
        counts = struct.pack("<IQQ", 3, rng.randrange(4), rng.randrange(1, 4))
        path.write_bytes(b"GGUF" + counts + rng.randbytes(rng.randrange(200)))
        refusal(path)
