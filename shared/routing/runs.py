"""What one draft worker proposed for one session, held against what became final.

Says of each proposal whether it was right, given that all before it were (the acceptance that counts, also of those
that came too late to be verified), and which messages no honest worker can have sent. Pure. Invariant: a hit or a miss
is only counted for a token whose whole prefix is known to be the session's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.prefix import extend

_SAVED_ALLOWANCE = 16
"""Windows of proposals that a worker may send at once, after commits that it answered late."""


@dataclass(frozen=True, slots=True)
class Received:
    """What the router makes of a proposal. offence: why no honest worker can have sent it, else empty. continued: it
    continues the worker's last one, which nothing has contradicted. anew: it has nothing to do with the last ones."""

    offence: str = ""
    continued: bool = False
    anew: bool = False


class ProposedRun:
    """See the module's docstring.

    Args:
        opened: how many tokens the worker was given at first.
        window: how many tokens it may run ahead of the last commit.
    """

    def __init__(self, opened: int, window: int) -> None:
        self._opened = opened
        self._window = window
        self._committed = opened
        # Of the final text what became final since: tokens from position `opened` on, and the hash before each of them
        # and after the last one; the first hash comes with the first commit.
        self._final: list[int] = []
        self._final_hashes: list[int] = []
        # The worker's latest run: where it starts, its tokens, the hash before each and after the last.
        self._start = opened
        self._tokens: list[int] = []
        self._hashes: list[int] = []
        self._right = True
        self._judged = opened  # tokens before this position have been counted
        self._allowance = 2 * window

    @property
    def end(self) -> int:
        """The position after the last token of the run that is not contradicted."""
        return max(self._committed, self._start + len(self._tokens)) if self._right else self._committed

    @property
    def alive(self) -> bool:
        """Whether nothing final contradicts the run, as far as is known."""
        return self._right

    @property
    def room(self) -> int:
        """How many more tokens the worker may propose now."""
        return max(0, self._window - (self.end - self._committed))

    @property
    def last_token(self) -> int | None:
        """Of the run as far as it goes beyond the last commit."""
        return self._tokens[-1] if self.end > self._committed else None

    def propose(self, start: int, prefix_hash: int, tokens: Sequence[int]) -> Received:
        """Take a proposal in.

        One whose hash is wrong is followed all the same, as a run of its own: it may be a lie, or the first after one
        that was lost, and in that case those after it are to be recognized.
        """
        if start < self._opened:
            return Received(f"position {start} lies before what it was given")
        if start + len(tokens) > self._committed + self._window:
            return Received(f"position {start + len(tokens)} lies beyond its window")
        self._allowance -= len(tokens)
        if self._allowance < 0:
            return Received("it floods: more proposals than its window allows")
        end, offence = self._start + len(self._tokens), ""
        if self._hashes and self._start <= start <= end and self._hashes[start - self._start] == prefix_hash:
            continued, anew = start == end and self._right, False
            keep = start - self._start
            del self._tokens[keep:]
            del self._hashes[keep + 1 :]
        else:
            final = self._final_hash(start)
            if final is not None and final != prefix_hash:
                offence = "its prefix hash is not that of the session"
            elif final is None and self._tokens and self._start <= start <= end:
                offence = "its prefix hash is not that of its own proposals"
            continued, anew = False, True
            self._start, self._tokens, self._hashes, self._right = start, [], [prefix_hash], True
        for token in tokens:
            self._tokens.append(token)
            self._hashes.append(extend(self._hashes[-1], token))
        return Received(offence, continued, anew)

    def commit(self, prefix_hash: int, tokens: Sequence[int]) -> list[bool]:
        """Take the next final tokens in; returns a hit or a miss for each proposal that this decides."""
        if not self._final_hashes:
            self._final_hashes.append(prefix_hash)
        for token in tokens:
            self._final.append(token)
            self._final_hashes.append(extend(self._final_hashes[-1], token))
        self._committed += len(tokens)
        # After each commit a worker may send its window anew, and what has been lost of it once more.
        self._allowance = min(self._allowance + 2 * self._window, _SAVED_ALLOWANCE * self._window)
        return self._judge()

    def _judge(self) -> list[bool]:
        if not self._tokens or not self._right or self._start > self._committed:
            return []
        if self._final_hash(self._start) != self._hashes[0]:
            self._right = False
            return []
        trials: list[bool] = []
        for position in range(self._start, min(self._committed, self._start + len(self._tokens))):
            hit = self._tokens[position - self._start] == self._final[position - self._opened]
            if position >= self._judged:
                trials.append(hit)
                self._judged = position + 1
            if not hit:
                self._right = False
                return trials
        decided = min(self._committed - self._start, len(self._tokens))
        del self._tokens[:decided]
        del self._hashes[:decided]
        self._start += decided
        return trials

    def _final_hash(self, position: int) -> int | None:
        """Of the final tokens before a position; None where it is not known."""
        index = position - self._opened
        return self._final_hashes[index] if 0 <= index < len(self._final_hashes) else None
