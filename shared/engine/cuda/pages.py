"""Which pages of the KV pool hold which slot's tokens.

Plain bookkeeping on the host. Invariants: a page belongs to the free list or has as many references as slots that
name it; a page is written only by a slot that alone refers to it (`ensure` hands out copies of shared ones first).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.errors import EngineError
from shared.kernels.attention import PAGE_TOKENS


class PageTable:
    """Pages of all slots.

    table: [n_slots, max_pages] int32, the page of each PAGE_TOKENS tokens of a slot; entries beyond its pages mean
        nothing. The device holds a copy, which `changed` says is out of date.
    """

    def __init__(self, n_slots: int, max_pages: int, n_pages: int) -> None:
        self.table: npt.NDArray[np.int32] = np.zeros((n_slots, max_pages), np.int32)
        self.changed = True
        self._held = [0] * n_slots  # pages of each slot
        self._references = [0] * n_pages
        self._free = list(range(n_pages - 1, -1, -1))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def pages_needed(self, slot: int, start: int, length: int) -> int:
        """How many free pages `ensure` would take."""
        held = min(self._held[slot], _pages(length))
        pages: list[int] = self.table[slot, start // PAGE_TOKENS : held].tolist()
        shared = sum(self._references[page] > 1 for page in pages)
        return _pages(length) - held + shared

    def ensure(self, slot: int, start: int, length: int) -> list[tuple[int, int]]:
        """Let a slot hold `length` tokens, of which those from `start` on are about to be written.

        Returns:
            (source, target) pages whose contents must be copied before anything is written.

        Raises:
            EngineError: there are too few pages (code out_of_pages); nothing is changed then.
        """
        needed = self.pages_needed(slot, start, length)
        if needed > len(self._free):
            raise EngineError(
                f"slot {slot} needs {needed} pages of {PAGE_TOKENS} tokens, the KV pool has {len(self._free)} free",
                "end or shorten sessions, or raise kv_pages",
                "out_of_pages",
            )
        copies = []
        for i in range(start // PAGE_TOKENS, _pages(length)):
            if i < self._held[slot]:
                page = int(self.table[slot, i])
                if self._references[page] == 1:
                    continue
                self._references[page] -= 1
                if start > i * PAGE_TOKENS:
                    copies.append((page, self._free[-1]))
            else:
                self._held[slot] = i + 1
            self.table[slot, i] = self._free.pop()
            self._references[self.table[slot, i]] = 1
            self.changed = True
        return copies

    def prepare(self, spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """Let the slots of a batch hold what it writes, and no more.

        All truncations come first, so that pages given back count for the batch, and no page is copied from and to.

        Args:
            spans: (slot, start, length), no slot twice: it will hold `length` tokens, written from `start` on.

        Returns:
            As `ensure`, for all of them; the copies may be made at once or in any order.

        Raises:
            EngineError: there are too few pages (code out_of_pages); nothing is changed then.
        """
        references = self._references.copy()
        free, needed = len(self._free), 0
        for slot, _, length in spans:
            for page in self.table[slot, _pages(length) : self._held[slot]].tolist():
                references[page] -= 1
                free += references[page] == 0
        for slot, start, length in spans:
            held = min(self._held[slot], _pages(length))
            needed += _pages(length) - held
            for page in self.table[slot, start // PAGE_TOKENS : held].tolist():
                if references[page] > 1:
                    references[page] -= 1
                    needed += 1
        if needed > free:
            raise EngineError(
                f"the batch needs {needed} pages of {PAGE_TOKENS} tokens, the KV pool has {free} free",
                "end or shorten sessions, or raise kv_pages",
                "out_of_pages",
            )
        for slot, _, length in spans:
            self.truncate(slot, length)
        return [pair for span in spans for pair in self.ensure(*span)]

    def truncate(self, slot: int, length: int) -> None:
        """Give back the pages of a slot that its first `length` tokens do not need."""
        for i in range(_pages(length), self._held[slot]):
            self._release(int(self.table[slot, i]))
        self._held[slot] = min(self._held[slot], _pages(length))

    def share(self, source: int, target: int, length: int) -> None:
        """Let `target` hold the pages of the first `length` tokens of `source`, and nothing else."""
        n = _pages(length)
        for i in range(n):
            self._references[self.table[source, i]] += 1
        self.truncate(target, 0)
        self.table[target, :n] = self.table[source, :n]
        self._held[target] = n
        self.changed = True

    def _release(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)


def _pages(length: int) -> int:
    return -(-length // PAGE_TOKENS)
