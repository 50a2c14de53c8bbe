"""A token sequence with a rolling 64-bit hash of each of its prefixes.

The hash names a prefix on the wire: a proposal is used only when the verifier's own hash at its start is equal, which
covers late, duplicated and reordered messages and workers that come back from the dead. It is no cryptographic hash:
a worker is trusted not to forge (at worst its tokens are refused by the target).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

EMPTY = 0x6A09E667F3BCC908
_MASK = (1 << 64) - 1


def extend(prefix_hash: int, token: int) -> int:
    """The hash of a prefix followed by one token: one splitmix64 step over both (Steele, Lea, Flood 2014)."""
    z = (prefix_hash + 0x9E3779B97F4A7C15 * (token + 1)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class TokenPrefix:
    """Tokens and the hash of every prefix. Invariant: `len(hashes) == len(tokens) + 1`."""

    __slots__ = ("hashes", "tokens")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self.hashes: list[int] = [EMPTY]
        self.append(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def hash(self) -> int:
        """The hash of the whole sequence."""
        return self.hashes[-1]

    def append(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            self.hashes.append(extend(self.hashes[-1], token))

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        del self.tokens[length:]
        del self.hashes[length + 1 :]

    def agreement(self, start: int, tokens: Sequence[int]) -> int:
        """How many of `tokens` equal this sequence's own from `start` on, up to its end."""
        own = self.tokens
        count = 0
        for index in range(min(len(tokens), len(own) - start)):
            if own[start + index] != tokens[index]:
                break
            count += 1
        return count
