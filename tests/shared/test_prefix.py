"""The rolling hash of token prefixes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.prefix import EMPTY, TokenPrefix, extend

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=12)
few = st.lists(st.integers(0, 2), max_size=8)


@given(few, few)
def test_hashes_are_equal_exactly_for_equal_tokens(a: list[int], b: list[int]) -> None:
    """Two sequences have one hash if and only if they are the same sequence."""
    assert (TokenPrefix(a).hash == TokenPrefix(b).hash) == (a == b)


def test_no_collisions_among_many_short_sequences() -> None:
    """All sequences of up to 6 of 7 tokens, zero among them, have hashes of their own, as do longer runs of one."""
    level, seen, count = [EMPTY], {EMPTY}, 1
    for _ in range(6):
        level = [extend(h, token) for h in level for token in range(7)]
        seen.update(level)
        count += len(level)
    assert len(seen) == count
    for token in (0, 1, 2**31 - 1):
        assert len(set(TokenPrefix([token] * 1000).hashes)) == 1001


@given(tokens)
def test_a_hash_fits_the_wire_and_depends_on_the_tokens_alone(sequence: list[int]) -> None:
    """Hashes are unsigned 64-bit, and one token at a time gives the same ones as all at once."""
    prefix = TokenPrefix()
    for token in sequence:
        prefix.append((token,))
    assert prefix.hashes == TokenPrefix(sequence).hashes
    assert all(0 <= h < 2**64 for h in prefix.hashes)


def test_the_hash_is_fixed() -> None:
    """Processes of different versions must agree: the value for a known sequence never changes."""
    assert TokenPrefix().hash == 0x6A09E667F3BCC908
    assert TokenPrefix((1, 2, 3)).hash == 0xB50803DD40C6ACFD


@given(tokens, st.lists(st.one_of(st.integers(0, 12), tokens), max_size=8))
def test_any_history_equals_a_fresh_prefix(start: list[int], history: list[int | list[int]]) -> None:
    """After any appends and truncations, tokens and hashes are those of the sequence built afresh."""
    prefix, expected = TokenPrefix(start), list(start)
    for step in history:
        if isinstance(step, int):
            prefix.truncate(min(step, len(prefix)))
            del expected[step:]
        else:
            prefix.append(step)
            expected += step
        assert prefix.tokens == expected
        assert prefix.hashes == TokenPrefix(expected).hashes
        assert len(prefix) == len(expected)
        assert prefix.hash == prefix.hashes[-1]


@given(few, few, st.integers(0, 8))
def test_agreement_counts_the_common_run(own: list[int], other: list[int], start: int) -> None:
    """`agreement` is the length of the longest run that both have from `start` on, up to the end of its own tokens."""
    start = min(start, len(own))
    expected = 0
    while expected < len(other) and own[start : start + expected + 1] == other[: expected + 1]:
        expected += 1
    assert TokenPrefix(own).agreement(start, other) == expected
