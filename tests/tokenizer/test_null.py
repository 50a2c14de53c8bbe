"""The null engine's vocabulary."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.tokenizer.null import NullVocabulary
from shared.engine.interface import EngineSettings
from shared.engine.null import FIRST_ID, NullEngine
from shared.errors import RequestError

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For machines that others use too."""


def test_it_is_the_null_engines_vocabulary() -> None:
    """Size and fingerprint agree, so that the fleet finds tokenizer, target and draft alike."""
    engine, vocabulary = NullEngine(EngineSettings()).info, NullVocabulary()
    assert (vocabulary.fingerprint, vocabulary.n_vocab) == (engine.vocab_fingerprint, engine.n_vocab)


@unhurried
@given(st.text(max_size=40), st.integers(1, 7))
def test_text_comes_back_whatever_the_calls(text: str, size: int) -> None:
    """decode(encode(text)) is the text, also when the tokens come a few at a time."""
    vocabulary = NullVocabulary()
    tokens = vocabulary.encode(text, parse_special=True).tolist()
    out, carry = "", b""
    for at in range(0, len(tokens), size):
        piece, carry = vocabulary.decode(tokens[at : at + size], carry, first=at == 0)
        out += piece
    assert out + vocabulary.flush(carry) == text


def test_every_id_that_the_engine_gives_has_a_printable_piece() -> None:
    """What a null fleet generates can be read; control tokens show only when asked for."""
    vocabulary = NullVocabulary()
    pieces = [vocabulary.decode([token], first=False)[0] for token in range(FIRST_ID + 256, vocabulary.n_vocab)]
    assert all(piece.isprintable() and piece for piece in pieces)
    assert len(set(pieces)) == len(pieces)
    assert vocabulary.decode([0], first=False) == ("", b"")
    assert vocabulary.decode([0], first=False, special=True)[0] != ""


@pytest.mark.parametrize("token", [-1, 8192])
def test_an_id_outside_is_refused(token: int) -> None:
    """A RequestError, as from a real vocabulary."""
    with pytest.raises(RequestError):
        NullVocabulary().decode([token], first=False)
