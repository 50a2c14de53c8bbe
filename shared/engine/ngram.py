"""Drafting by prompt lookup: what followed the last time the sequence ended like this.

The match is the longest suffix of `min_ngram` to `max_ngram` tokens that occurs earlier in the sequence, and of its
occurrences the latest. What followed it is proposed; where that runs into the end of the sequence, it goes on through
the proposal itself, so a loop is continued as a loop. `propose` is the definition; `NgramIndex` gives the same answer
in constant time per token. Its invariant: after any extends and truncates it equals an index built afresh.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

MIN_NGRAM = 2
MAX_NGRAM = 5


def propose(tokens: Sequence[int], n: int, max_ngram: int = MAX_NGRAM, min_ngram: int = MIN_NGRAM) -> list[int]:
    """Up to `n` tokens that may follow `tokens`: n of them, or none when no suffix has occurred before.

    Scans the whole sequence; for a growing one, use `NgramIndex`.
    """
    tokens = list(tokens)
    end = len(tokens)
    for length in range(min(max_ngram, end - 1), min_ngram - 1, -1):
        suffix = tokens[end - length :]
        for start in range(end - length - 1, -1, -1):
            if tokens[start : start + length] == suffix:
                return _continue(tokens, start + length, n)
    return []


def _continue(tokens: Sequence[int], position: int, n: int) -> list[int]:
    """The `n` tokens from `position` on, through the end of the sequence into themselves."""
    out = list(tokens[position : position + n])
    if 0 < len(out) < n:
        period = len(out)
        out += [out[i % period] for i in range(period, n)]
    return out


class NgramIndex:
    """The sequence of one session with every n-gram's occurrences.

    Args:
        max_ngram, min_ngram: lengths of suffix to look up, longest first; 1 <= min_ngram <= max_ngram.
    """

    def __init__(self, max_ngram: int = MAX_NGRAM, min_ngram: int = MIN_NGRAM) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"n-gram lengths {min_ngram}..{max_ngram}")
        self._tokens: list[int] = []
        self._levels = [_Level(length) for length in range(max_ngram, min_ngram - 1, -1)]

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> Sequence[int]:
        """The sequence so far; not to be written to."""
        return self._tokens

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        start = len(self._tokens)
        self._tokens.extend(int(token) for token in tokens)
        for level in self._levels:
            level.extend(self._tokens, start)

    def truncate(self, length: int) -> None:
        """Drop the tokens at `length` and after; 0 <= length <= len(self)."""
        if not 0 <= length <= len(self._tokens):
            raise ValueError(f"length {length} of {len(self._tokens)} tokens")
        for level in self._levels:
            level.truncate(self._tokens, length)
        del self._tokens[length:]

    def propose(self, n: int) -> list[int]:
        """Up to `n` tokens that may follow: n of them, or none."""
        end = len(self._tokens)
        for level in self._levels:
            if end and (position := level.previous[end - 1]) > 0:
                return _continue(self._tokens, position, n)
        return []


class _Level:
    """Occurrences of the n-grams of one length.

    latest: n-gram -> the position after its latest occurrence.
    previous: for each token, the position after the occurrence before the one that ends with this token; 0 if none.
    """

    __slots__ = ("latest", "length", "previous")

    def __init__(self, length: int) -> None:
        self.length = length
        self.latest: dict[tuple[int, ...], int] = {}
        self.previous = array("q")

    def extend(self, tokens: list[int], start: int) -> None:
        length, latest, previous = self.length, self.latest, self.previous
        for end in range(start + 1, len(tokens) + 1):
            if end < length:
                previous.append(0)
                continue
            ngram = tuple(tokens[end - length : end])
            previous.append(latest.get(ngram, 0))
            latest[ngram] = end

    def truncate(self, tokens: list[int], size: int) -> None:
        length, latest, previous = self.length, self.latest, self.previous
        for end in range(len(tokens), max(size, length - 1), -1):
            ngram = tuple(tokens[end - length : end])
            if before := previous[end - 1]:
                latest[ngram] = before
            else:
                del latest[ngram]
        del previous[size:]
