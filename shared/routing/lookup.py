"""How prompt lookup would have fared on a session's text, whoever drafts for it: a shadow of the n-gram worker.

Its proposals are rare and depend on the text alone, so that a trial would tell late and cost much; looking its answers
up along the way costs microseconds a token. The end of the prompt is looked up too: what ends in a copy of what came
before mostly goes on as one. Pure. Invariant: a prompt is read in pieces, one at first and one a commit, so that no
call takes longer than its own piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.engine.ngram import NgramIndex

_PIECE = 1024
"""Tokens that are read at once, in 3 to 6 ms."""
_MOST_PROMPT = 8192
"""Tokens of a prompt that are read, its last ones; what is further back is repeated less."""
_FORETOLD = 128
"""Tokens at the end of the prompt that are looked up, in what comes before them."""
_MOST_FORETOLD = 10.0
"""As how many positions of the text they count."""
_FADE = 0.97
"""Of old positions, for each new one: about the last thirty count."""
_SLOW_FADE = 0.99
"""The same of what a worker is held against: about the last hundred."""


@dataclass(frozen=True, slots=True)
class LookupShares:
    """coverage: the share of positions where there was something to propose. first: how often that was right. further:
    how often it was, where it had been at the position before. weight: how many positions stand behind it. lasting: how
    often what there was to propose was right, over a longer time."""

    coverage: float
    first: float
    further: float
    weight: float
    lasting: float


PRIOR = LookupShares(0.5, 0.4, 0.7, 2.0, 0.4)
"""Before anything was looked up: code and prose of a session of average repetition. This, the fading and the weight of
the prompt were chosen by log-loss (docs/measuring.md)."""


class LookupFigures:
    """See the module's docstring.

    Args:
        prompt: the session's tokens so far.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._index = NgramIndex()
        self._waiting = list(prompt[-_MOST_PROMPT:])
        self._positions = self._covered = self._right = self._after_right = self._right_again = 0.0
        self._lasting_covered = self._lasting_right = 0.0
        self._was_right = False
        self._read()

    def commit(self, tokens: Sequence[int]) -> None:
        """The next final tokens: foretell each, as soon as the prompt has been read."""
        if self._waiting:
            self._waiting += tokens
            self._read()
        else:
            self._foretell(tokens)

    def _read(self) -> None:
        """The next piece of the prompt."""
        left = len(self._waiting)
        piece = self._waiting[: _PIECE if left <= _PIECE else min(_PIECE, left - _FORETOLD)]
        del self._waiting[: len(piece)]
        if self._waiting:
            self._index.extend(piece)
            return
        # Of a short prompt the first half is what there is to look up in.
        read = max(len(piece) - _FORETOLD, 0 if len(self._index) else len(piece) // 2)
        self._index.extend(piece[:read])
        self._foretell(piece[read:])
        share = min(1.0, _MOST_FORETOLD / self._positions) if self._positions else 0.0
        self._positions *= share
        self._covered *= share
        self._right *= share
        self._after_right *= share
        self._right_again *= share

    def _foretell(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._see(self._index.propose(1), token)
            self._index.extend((token,))

    def _see(self, proposed: list[int], token: int) -> None:
        covered = bool(proposed)
        right = covered and proposed[0] == token
        self._positions = self._positions * _FADE + 1
        self._covered = self._covered * _FADE + covered
        self._right = self._right * _FADE + right
        self._after_right = self._after_right * _FADE + (self._was_right and covered)
        self._right_again = self._right_again * _FADE + (self._was_right and right)
        self._lasting_covered = self._lasting_covered * _SLOW_FADE + covered
        self._lasting_right = self._lasting_right * _SLOW_FADE + right
        self._was_right = right

    def shares(self, prior: LookupShares = PRIOR) -> LookupShares:
        """What it came to, with the prior where little is known."""
        w = prior.weight
        return LookupShares(
            (self._covered + w * prior.coverage) / (self._positions + w),
            (self._right + w * prior.coverage * prior.first) / (self._covered + w * prior.coverage),
            (self._right_again + w * prior.coverage * prior.further) / (self._after_right + w * prior.coverage),
            self._positions,
            (self._lasting_right + w * prior.coverage * prior.lasting) / (self._lasting_covered + w * prior.coverage),
        )
