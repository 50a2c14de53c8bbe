"""The quant type table and the NumPy codecs, against the `gguf` package and ik's own library."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import ik_llama_cpp
import numpy as np
import pytest
from gguf.quants import dequantize as gguf_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ModelError
from shared.quant import types
from shared.quant.codecs import dequantize, has_codec
from shared.quant.types import BY_ID, BY_NAME, PRIMARY, QuantType

CODECS = [quant for quant in BY_ID.values() if has_codec(quant)]

# Byte offsets of the float16 scales of a block, which random tests must keep finite.
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
IK_NAMES = {"Q2_K": "q2_K", "Q3_K": "q3_K", "Q4_K": "q4_K", "Q5_K": "q5_K", "Q6_K": "q6_K"}

# Types that mainline has and ik 0.1.5 has not.
MAINLINE_ONLY = {"TQ1_0", "TQ2_0"}


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    """ik_llama.cpp's libggml."""
    library = ctypes.CDLL(str(Path(ik_llama_cpp.__file__).parent / "lib" / "libggml.so"))
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = (ctypes.c_int, ctypes.c_int64)
    # The first context fills ggml's table of float16 values, which its codecs read.
    library.ggml_init.restype = ctypes.c_void_p
    library.ggml_init.argtypes = (InitParams,)
    library.ggml_free.argtypes = (ctypes.c_void_p,)
    library.ggml_free(library.ggml_init(InitParams(1 << 16, None, False)))
    return library


def random_blocks(quant: QuantType, n: int, seed: int) -> np.ndarray:
    """Random blocks whose scales (and, for float types, values) are finite: [n * bytes_per_block] uint8."""
    rng = np.random.default_rng(seed)
    if quant in (types.F32, types.F16, types.BF16):
        values = rng.standard_normal(n).astype(np.float32)
        if quant is types.BF16:
            return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        return values.astype("<f4" if quant is types.F32 else "<f2").view(np.uint8)
    blocks = rng.integers(0, 256, (n, quant.bytes_per_block), dtype=np.uint8)
    for at in SCALES[quant.name]:
        blocks[:, at : at + 2] = rng.standard_normal(n).astype("<f2").view(np.uint8).reshape(n, 2)
    return blocks.reshape(-1)


@pytest.mark.parametrize("quant", BY_ID.values(), ids=lambda quant: quant.name)
def test_sizes_are_those_of_ggml(ggml: ctypes.CDLL, quant: QuantType) -> None:
    """Name, block size, bytes per block and the row header of every type agree with ik's library."""
    if quant.name in MAINLINE_ONLY:
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(quant.id)] == (quant.block_size, quant.bytes_per_block)
        return
    assert ggml.ggml_type_name(quant.id).decode().upper() == quant.name.upper()
    assert ggml.ggml_blck_size(quant.id) == quant.block_size
    assert ggml.ggml_type_size(quant.id) == quant.bytes_per_block
    for n_blocks in (1, 2, 17):
        n = n_blocks * quant.block_size
        assert ggml.ggml_row_size(quant.id, n) == quant.bytes_per_row(n)


def test_primary_types_are_those_promised() -> None:
    """Every type that the project promises to run is in the table under its GGML id."""
    promised = (
        "F32 0, F16 1, BF16 30, Q4_0 2, Q4_1 3, Q5_0 6, Q5_1 7, Q8_0 8, Q2_K 10, Q3_K 11, Q4_K 12, Q5_K 13, Q6_K 14, "
        "IQ4_NL 20, IQ4_XS 23, IQ2_K 137, IQ3_K 138, IQ4_K 139, IQ5_K 140, IQ6_K 141, IQ4_KS 144, IQ2_KS 145, "
        "IQ4_KSS 146, IQ5_KS 152, IQ2_KT 153, IQ3_KT 154, IQ4_KT 155, IQ3_KS 156, IQ2_KL 157, IQ1_KT 158"
    )
    assert {f"{quant.name} {quant.id}" for quant in PRIMARY} == set(promised.split(", "))
    assert all(BY_NAME[quant.name] is BY_ID[quant.id] is quant for quant in PRIMARY)
    assert len(BY_ID) == len(BY_NAME)


@pytest.mark.parametrize("n", [-256, 1, 255, 257])
def test_a_row_has_whole_blocks(n: int) -> None:
    """The size of a row that is no whole number of blocks is refused, not rounded."""
    with pytest.raises(ValueError, match="multiple of 256"):
        types.Q4_K.bytes_per_row(n)


@pytest.mark.parametrize("quant", CODECS, ids=lambda quant: quant.name)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40))
def test_codecs_equal_the_gguf_package(quant: QuantType, seed: int, n: int) -> None:
    """Dequantized values are bit-equal to those of the `gguf` package."""
    raw = random_blocks(quant, n, seed)
    expected = gguf_dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType(quant.id)).astype(np.float32).reshape(-1)
    values = dequantize(raw, quant, "x")
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("quant", [q for q in CODECS if q.name in SCALES], ids=lambda quant: quant.name)
def test_codecs_equal_ik(ggml: ctypes.CDLL, quant: QuantType) -> None:
    """Dequantized values are those of ik's dequantize_row, up to the rounding of a fused multiply-add."""
    n = 64
    raw = random_blocks(quant, n, seed=7)
    expected = np.empty(n * quant.block_size, np.float32)
    function = getattr(ggml, f"dequantize_row_{IK_NAMES.get(quant.name, quant.name.lower())}")
    function.restype = None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function(raw.ctypes.data, expected.ctypes.data, expected.size)
    scale = np.abs(expected.reshape(n, -1)).max(axis=1, keepdims=True)
    assert (scale > 0).all()
    error = np.abs(dequantize(raw, quant, "x") - expected).reshape(n, -1)
    assert (error <= 4e-7 * scale).all()


def test_pieces_join_seamlessly() -> None:
    """A tensor larger than what is decoded at a time decodes as its blocks do one by one."""
    n = 2500
    raw = random_blocks(types.Q6_K, n, seed=3)
    whole = dequantize(raw, types.Q6_K, "x").reshape(n, 256)
    for block in (0, 1023, 1024, 2047, 2048, n - 1):
        alone = dequantize(raw[block * 210 : block * 210 + 210], types.Q6_K, "x")
        np.testing.assert_array_equal(whole[block], alone)


def test_infinite_scales_are_no_warnings() -> None:
    """A damaged block whose scale is infinite decodes without raising."""
    raw = np.zeros(34, np.uint8)
    raw[:2] = np.array([np.inf], "<f2").view(np.uint8)
    assert np.isnan(dequantize(raw, types.Q8_0, "x")).all()


def test_a_type_without_a_codec_is_refused() -> None:
    """The error for a type that only ik decodes names the tensor and the type, and says to use the ik engine."""
    with pytest.raises(ModelError, match=r"blk\.3\.ffn_up_exps.*IQ2_KL.*ik engine") as caught:
        dequantize(np.zeros(88, np.uint8), types.IQ2_KL, "blk.3.ffn_up_exps")
    assert caught.value.code == "unsupported_quant_type"


def test_a_part_of_a_block_is_refused() -> None:
    """Bytes that are no whole number of blocks are an error that names the tensor."""
    with pytest.raises(ModelError, match=r"'x' has 145 bytes"):
        dequantize(np.zeros(145, np.uint8), types.Q4_K, "x")
