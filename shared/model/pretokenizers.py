r"""How text is cut into words before byte-level BPE, by the name in a GGUF's `tokenizer.ggml.pre`.

Invariant: an entry stands here only when it was found equal to llama.cpp, cut for cut. Two comments mark where
llama.cpp itself is coarser than the pattern that the model was trained with; there the entry follows llama.cpp.

ik_llama.cpp differs from these patterns in two places, both its own mistakes, which are not copied: it lowercases by a
binary search in an unsorted table, so that `'Some` is one word in the llama3, qwen2 and kimi-k2 families where the
pattern says `'S` and `ome`; and in deepseek-v3 it does not count `~` among the symbols. Its Unicode tables are also
older than those of `tokenizers`: letters assigned since then are no letters to it.

Each pattern of an entry cuts the pieces that the pattern before it left; what a pattern does not match stays a piece
of its own. The syntax is Oniguruma's, through HF `tokenizers`: `&&` inside a class is an intersection.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """The word patterns of one family of vocabularies, and the defaults that llama.cpp attaches to its name.

    `ignore_merges`: a word that is itself a token becomes that token, without looking at merges.
    `add_bos`: the default where the file has no `tokenizer.ggml.add_bos_token`.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_NEWLINES = r"\s*[\r\n]+"
_SPACES = r"\s+(?!\S)|\s+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
_LLAMA3 = "|".join((_CONTRACTION, _WORD, r"\p{N}{1,3}", _SYMBOLS, _NEWLINES, _SPACES))
_QWEN2 = "|".join((_CONTRACTION, _WORD, r"\p{N}", _SYMBOLS, _NEWLINES, _SPACES))
# Combining marks belong to words.
_QWEN35 = "|".join(
    (
        _CONTRACTION,
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        _NEWLINES,
        _SPACES,
    )
)
# One newline a piece, where the others take the whole run of blank lines.
_BAILING = "|".join((_CONTRACTION, _WORD, r"\p{N}", _SYMBOLS, r"\s*[\r\n]", _SPACES))
_SEED_CODER = "|".join((_CONTRACTION, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _NEWLINES, _SPACES))

# llama.cpp tells upper from lower case only in ASCII here; any other letter counts as both, and marks are no letters.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%(tail)s|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%(tail)s|"
    r"\p{N}%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _NEWLINES + "|" + _SPACES
)
_TEKKEN = _CASED % {"tail": "", "digits": ""}
_GPT4O = _CASED % {"tail": _CONTRACTION + "?", "digits": "{1,3}"}

_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]\^_`{|}~][A-Za-z]+|"
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _NEWLINES + "|" + _SPACES,
)

_HAN = (
    r"\x{4e00}-\x{9fff}\x{3400}-\x{4dbf}\x{20000}-\x{2a6df}\x{2a700}-\x{2b73f}\x{2b740}-\x{2b81f}"
    r"\x{2b820}-\x{2ceaf}\x{2ceb0}-\x{2ebef}\x{f900}-\x{faff}\x{2f800}-\x{2fa1f}"
)
# Kimi's own pattern also cuts at a change of case; llama.cpp's does not.
_KIMI_K2 = "|".join(
    (
        rf"[{_HAN}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+{_CONTRACTION}?",
        r"\p{N}{1,3}",
        _SYMBOLS,
        _NEWLINES,
        _SPACES,
    )
)

_FAMILIES: tuple[tuple[tuple[str, ...], PreTokenizer], ...] = (
    (
        ("default",),
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    ),
    (("falcon",), PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    (
        (
            *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "mellum"),
            *("a.x-4.0", "exaone4"),
        ),
        PreTokenizer((_GPT2,)),
    ),
    (
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        PreTokenizer((r"\p{N}", _GPT2)),
    ),
    (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    (("glm4", "chatglm-bpe", "dbrx", "smaug-bpe"), PreTokenizer((_LLAMA3,))),
    (
        ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2", "kormo"),
        PreTokenizer((_QWEN2,)),
    ),
    (("qwen35",), PreTokenizer((_QWEN35,))),
    (("bailingmoe", "bailingmoe2", "llada-moe"), PreTokenizer((_BAILING,))),
    (("seed-coder",), PreTokenizer((_SEED_CODER,))),
    (("deepseek-v3", "hunyuan-dense", "joyai-llm"), PreTokenizer(_DEEPSEEK3)),
    (("tekken",), PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True)),
    (("gpt-4o", "llama4", "kanana2", "minimax-m2"), PreTokenizer((_GPT4O,))),
    (("kimi-k2",), PreTokenizer((_KIMI_K2,))),
)

PRETOKENIZERS: dict[str, PreTokenizer] = {name: entry for names, entry in _FAMILIES for name in names}
"""Pre-tokenizer by the name in `tokenizer.ggml.pre`; "default" is also that of a file without the key."""
