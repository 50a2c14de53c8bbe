"""Which pages of the KV pool hold which slot's tokens, and which full pages a new session may take over.

Plain bookkeeping on the host. Invariants: a page has as many references as slots that name it; without any it is free
or, while the index knows it, cached. A page is written only by a slot that alone refers to it, and not while it is in
the index: what the index finds holds the keys and values of exactly the tokens that were asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.errors import EngineError
from shared.kernels.attention import PAGE_TOKENS

Int32 = npt.NDArray[np.int32]

_BEGIN = -1
"""Stands for the page before a sequence's first one."""


class PageTable:
    """Pages of all slots, and the index of full ones.

    The index is a tree of pages: a page is found by the page before it and its own tokens, all of them, so that no two
    prefixes are ever mistaken for each other. A page that leaves the index takes those that continue it along.

    table: [n_slots, max_pages] int32, the page of each PAGE_TOKENS tokens of a slot; entries beyond its pages mean
        nothing. The device holds a copy, which `changed` says is out of date.
    """

    def __init__(self, n_slots: int, max_pages: int, n_pages: int) -> None:
        self.table: Int32 = np.zeros((n_slots, max_pages), np.int32)
        self.changed = True
        self._held = [0] * n_slots  # pages of each slot
        self._references = [0] * n_pages
        self._free = list(range(n_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the page that was given back first comes first
        # The index: which pages continue a page, by their tokens; and where in it a page is, None: nowhere.
        self._following: list[dict[bytes, int]] = [{} for _ in range(n_pages + 1)]  # the last is that of _BEGIN
        self._place: list[tuple[int, bytes] | None] = [None] * n_pages

    @property
    def n_free(self) -> int:
        """Pages that no slot refers to: free ones, and cached ones, which go when there are no others."""
        return len(self._free) + len(self._cached)

    def prepare(self, spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """Let the slots of a batch hold what it writes, and no more.

        What they hold from `start` on is given back first, so that it counts for the batch, and no page is copied from
        and to.

        Args:
            spans: (slot, start, length), no slot twice: it holds `start` tokens or more, and will hold `length`, of
                which those from `start` on are about to be written.

        Returns:
            (source, target) pages whose contents must be copied before anything is written, at once or in any order.

        Raises:
            EngineError: there are too few pages (code out_of_pages); nothing is changed then.
        """
        references = self._references.copy()
        free, needed = self.n_free, 0
        for slot, start, _ in spans:
            for page in self.table[slot, _pages(start) : self._held[slot]].tolist():
                references[page] -= 1
                free += references[page] == 0
        for slot, start, length in spans:
            needed += _pages(length) - _pages(start)
            if start % PAGE_TOKENS:
                page = self.table[slot, start // PAGE_TOKENS]
                if references[page] > 1:
                    references[page] -= 1
                    needed += 1
        if needed > free:
            raise EngineError(
                f"the batch needs {needed} pages of {PAGE_TOKENS} tokens, the KV pool has {free} free",
                "end or shorten sessions, or raise kv_pages",
                "out_of_pages",
            )
        for slot, start, _ in spans:
            self.truncate(slot, start)
        copies = []
        for slot, start, length in spans:
            if start % PAGE_TOKENS:
                page = int(self.table[slot, start // PAGE_TOKENS])
                if self._references[page] > 1:
                    self._references[page] -= 1
                    copies.append((page, self._take(slot, start // PAGE_TOKENS)))
                else:
                    self._forget(page)
            for i in range(_pages(start), _pages(length)):
                self._take(slot, i)
            self._held[slot] = _pages(length)
        return copies

    def truncate(self, slot: int, length: int) -> None:
        """Give back the pages of a slot that its first `length` tokens do not need.

        The last one comes first, so that a cached page is dropped before those that it continues.
        """
        for i in reversed(range(_pages(length), self._held[slot])):
            page = int(self.table[slot, i])
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._place[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None
        self._held[slot] = min(self._held[slot], _pages(length))

    def share(self, source: int, target: int, length: int) -> None:
        """Let `target` hold the pages of the first `length` tokens of `source`, and nothing else."""
        self.hold(target, self.table[source, : _pages(length)].tolist())

    def hold(self, slot: int, pages: Sequence[int]) -> None:
        """Let a slot hold these pages, which another one holds or `find` has found, and nothing else."""
        for page in pages:
            self._references[page] += 1
            self._cached.pop(page, None)
        self.truncate(slot, 0)
        self.table[slot, : len(pages)] = pages
        self._held[slot] = len(pages)
        self.changed = True

    def register(self, slot: int, tokens: Int32) -> None:
        """Put the full pages of a slot into the index, where other pages with the same tokens do not stand already.

        Args:
            tokens: [n] int32, what the slot holds; computed, as far as pages are full.
        """
        before = _BEGIN
        pages = self.table[slot, : len(tokens) // PAGE_TOKENS].tolist()
        for page, key in zip(pages, _keys(tokens), strict=True):
            known = self._following[before].setdefault(key, page)
            if known == page:
                self._place[page] = before, key
            before = known

    def find(self, tokens: Int32) -> list[int]:
        """The pages of the longest prefix of `tokens`, [n] int32, that the index knows: full ones."""
        pages: list[int] = []
        before = _BEGIN
        for key in _keys(tokens):
            known = self._following[before].get(key)
            if known is None:
                break
            pages.append(known)
            before = known
        return pages

    def _take(self, slot: int, i: int) -> int:
        """Make a free page the slot's page `i`, or else the cached one that has been unused for longest."""
        if not self._free:
            self._forget(next(iter(self._cached)))
        page = self._free.pop()
        self._references[page] = 1
        self.changed |= bool(self.table[slot, i] != page)
        self.table[slot, i] = page
        return page

    def _forget(self, page: int) -> None:
        """Take a page out of the index, with those that continue it; what was cached of them is free."""
        place = self._place[page]
        if place is None:
            return
        before, key = place
        del self._following[before][key]
        lost = [page]
        while lost:
            page = lost.pop()
            lost += self._following[page].values()
            self._following[page].clear()
            self._place[page] = None
            if page in self._cached:
                del self._cached[page]
                self._free.append(page)


def _pages(length: int) -> int:
    return -(-length // PAGE_TOKENS)


def _keys(tokens: Int32) -> list[bytes]:
    """The tokens of each full page."""
    return [tokens[at - PAGE_TOKENS : at].tobytes() for at in range(PAGE_TOKENS, len(tokens) + 1, PAGE_TOKENS)]
