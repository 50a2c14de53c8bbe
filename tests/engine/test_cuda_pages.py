"""Pages of the cuda engine's KV pool, against a model that knows what each token's place should hold."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shared.engine.cuda.pages import PAGE_TOKENS, PageTable
from shared.errors import EngineError

MAX_PAGES = 4
MAX_LENGTH = MAX_PAGES * PAGE_TOKENS
LENGTHS = st.one_of(
    st.integers(0, MAX_LENGTH),
    st.sampled_from([0, 1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1, 2 * PAGE_TOKENS, MAX_LENGTH]),
)
UNWRITTEN = -1


def n_pages_of(length: int) -> int:
    return -(-length // PAGE_TOKENS)


class Pages(RuleBasedStateMachine):
    """A pool with contents. Each write puts a new number at a token's place; `expected` is what every slot must then
    read, whoever shares its pages."""

    @initialize(n_slots=st.integers(1, 4), n_pages=st.integers(1, 10))
    def begin(self, n_slots: int, n_pages: int) -> None:
        self.pages = PageTable(n_slots, MAX_PAGES, n_pages)
        self.n_pages = n_pages
        self.pool = np.full((n_pages, PAGE_TOKENS), UNWRITTEN)
        self.expected: list[list[int]] = [[] for _ in range(n_slots)]
        # What a device would have been told.
        self.told = self.pages.table.copy()
        self.clock = 0

    # --- the rules ----------------------------------------------------------------------------------------------------

    @rule(data=st.data(), slot=st.integers(0, 3), length=LENGTHS)
    def write(self, data: st.DataObject, slot: int, length: int) -> None:
        """As a pass does: from `start`, at most the slot's length, to `length`."""
        slot %= len(self.expected)
        held = len(self.expected[slot])
        length = max(1, length)
        start = data.draw(st.integers(max(0, min(held, length - 1) - 70), min(held, length - 1)), "start")
        self.pages.truncate(slot, length)
        del self.expected[slot][length:]
        self.ensure(slot, start, length)

    def ensure(self, slot: int, start: int, length: int) -> None:
        needed, free = self.pages.pages_needed(slot, start, length), self.pages.n_free
        assert needed == self.model_needs(slot, start, length)
        before = self.snapshot()
        if needed > free:
            with pytest.raises(
                EngineError, match=f"needs {needed} pages of 64 tokens, the KV pool has {free} free"
            ) as e:
                self.pages.ensure(slot, start, length)
            assert e.value.code == "out_of_pages"
            assert self.snapshot() == before
            return
        changed, self.pages.changed = self.pages.changed, False
        copies = self.pages.ensure(slot, start, length)
        assert self.pages.n_free == free - needed
        assert self.pages.changed == (needed > 0)
        self.pages.changed |= changed
        self.copy(copies)
        self.put(slot, start, length)

    @rule(data=st.data(), slots=st.lists(st.integers(0, 3), min_size=2, max_size=4, unique=True))
    def write_together(self, data: st.DataObject, slots: list[int]) -> None:
        """A batch: what it gives back counts for it, its copies are made at once, and then everything is written."""
        spans = []
        for slot in dict.fromkeys(slot % len(self.expected) for slot in slots):
            held = len(self.expected[slot])
            start = data.draw(st.integers(0, min(held, MAX_LENGTH - 1)), "start")
            length = data.draw(st.integers(start + 1, min(start + 80, MAX_LENGTH)), "length")
            spans.append((slot, start, length))
        # As many as there are references to what stays, and a page for each that is written to by one of several.
        kept = Counter(page for slot, _, length in spans for page in self.pages_of(slot)[: n_pages_of(length)])
        rest = set(range(len(self.expected))) - {slot for slot, _, _ in spans}
        kept.update(page for slot in rest for page in self.pages_of(slot))
        needed, in_use = 0, len(kept)
        for slot, start, length in spans:
            own = self.pages_of(slot)[: n_pages_of(length)]
            needed += n_pages_of(length) - len(own)
            for page in own[start // PAGE_TOKENS :]:
                needed += kept[page] > 1
                kept[page] -= kept[page] > 1
        before = self.snapshot()
        if needed > self.n_pages - in_use:
            with pytest.raises(EngineError, match=f"the batch needs {needed} pages") as caught:
                self.pages.prepare(spans)
            assert caught.value.code == "out_of_pages"
            assert self.snapshot() == before
            return
        copies = self.pages.prepare(spans)
        assert self.pages.n_free == self.n_pages - in_use - needed
        assert not {source for source, _ in copies} & {target for _, target in copies}
        assert len({target for _, target in copies}) == len(copies)
        self.copy(copies)
        for slot, start, length in spans:
            del self.expected[slot][length:]
            self.put(slot, start, length)

    @rule(data=st.data(), slot=st.integers(0, 3))
    def truncate(self, data: st.DataObject, slot: int) -> None:
        slot %= len(self.expected)
        length = data.draw(st.integers(0, len(self.expected[slot])), "length")
        self.pages.truncate(slot, length)
        del self.expected[slot][length:]

    @precondition(lambda self: len(self.expected) > 1)
    @rule(data=st.data(), source=st.integers(0, 3), step=st.integers(1, 3))
    def share(self, data: st.DataObject, source: int, step: int) -> None:
        n_slots = len(self.expected)
        source %= n_slots
        target = (source + 1 + step % (n_slots - 1)) % n_slots
        length = data.draw(st.integers(0, len(self.expected[source])), "length")
        free, held = self.pages.n_free, self.held(target)
        self.pages.share(source, target, length)
        assert free <= self.pages.n_free <= free + held
        self.expected[target] = self.expected[source][:length]

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        counts = self.counts()
        assert self.pages.n_free == self.n_pages - len(counts)
        assert self.pages._references == [counts[page] for page in range(self.n_pages)]
        free = self.pages._free
        assert len(set(free)) == len(free)
        assert not set(free) & set(counts)

    @invariant()
    def slots_hold_as_many_pages_as_they_need(self) -> None:
        for slot, values in enumerate(self.expected):
            assert self.held(slot) == n_pages_of(len(values))
            own = self.pages_of(slot)
            assert len(set(own)) == len(own)

    @invariant()
    def slots_read_what_they_wrote(self) -> None:
        for slot, values in enumerate(self.expected):
            read = self.pool[self.pages_of(slot)].reshape(-1)[: len(values)]
            assert read.tolist() == values

    @invariant()
    def the_device_knows_the_pages(self) -> None:
        """Pages that slots hold are where the device was last told, unless `changed` is set."""
        if self.pages.changed:
            self.told = self.pages.table.copy()
            self.pages.changed = False
        for slot in range(len(self.expected)):
            assert self.told[slot, : self.held(slot)].tolist() == self.pages_of(slot)

    # --- the model ----------------------------------------------------------------------------------------------------

    def held(self, slot: int) -> int:
        return self.pages._held[slot]

    def pages_of(self, slot: int) -> list[int]:
        return [int(page) for page in self.pages.table[slot, : self.held(slot)]]

    def counts(self) -> Counter[int]:
        """How many slots name each page."""
        return Counter(page for slot in range(len(self.expected)) for page in self.pages_of(slot))

    def model_needs(self, slot: int, start: int, length: int) -> int:
        """New pages, and those written to that others hold too."""
        own, counts = self.pages_of(slot)[: n_pages_of(length)], self.counts()
        return n_pages_of(length) - len(own) + sum(counts[page] > 1 for page in own[start // PAGE_TOKENS :])

    def snapshot(self) -> tuple[object, ...]:
        pages = self.pages
        return (pages.table.tobytes(), pages.changed, [*pages._held], [*pages._references], [*pages._free])

    def copy(self, copies: list[tuple[int, int]]) -> None:
        """All at once, as the kernel does."""
        before = self.pool.copy()
        for source, target in copies:
            self.pool[target] = before[source]

    def put(self, slot: int, start: int, length: int) -> None:
        own, counts = self.pages_of(slot), self.counts()
        values = list(range(self.clock, self.clock + length - start))
        self.clock += length - start
        for at, value in zip(range(start, length), values, strict=True):
            page = own[at // PAGE_TOKENS]
            assert counts[page] == 1, "written to by one slot, seen by another"
            self.pool[page, at % PAGE_TOKENS] = value
        self.expected[slot][start:] = values


Pages.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPages = Pages.TestCase


def test_only_the_page_that_is_continued_is_copied() -> None:
    """Pages that are overwritten from their first token need no copy, and those before `start` stay shared."""
    pages = PageTable(2, MAX_PAGES, 8)
    assert pages.ensure(0, 0, 200) == []
    pages.share(0, 1, 200)
    assert pages.n_free == 4
    first, second, third, _ = pages.table[0].tolist()
    copies = pages.ensure(1, 70, 200)
    assert [source for source, _ in copies] == [second]
    assert pages.table[1, 0] == first
    assert len({*pages.table[0].tolist(), *pages.table[1].tolist()}) == 7
    pages.truncate(1, 0)
    pages.share(0, 1, 129)
    assert pages.pages_needed(1, 128, 129) == 1
    assert pages.ensure(1, 128, 129) == []
    assert pages.table[1, 2] != third


def test_sharing_with_itself_by_way_of_another_returns() -> None:
    """A prefix that goes to another slot and back leaves the pages in one place."""
    pages = PageTable(2, MAX_PAGES, 4)
    pages.ensure(0, 0, 256)
    pages.share(0, 1, 100)
    pages.truncate(0, 0)
    assert pages.n_free == 2
    pages.share(1, 0, 64)
    pages.truncate(1, 0)
    assert pages.n_free == 3


@given(n_slots=st.integers(1, 5), lengths=st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=5))
def test_a_full_pool_is_enough_for_full_slots(n_slots: int, lengths: list[int]) -> None:
    """With n_slots * max_pages pages, unshared slots never run out."""
    pages = PageTable(n_slots, MAX_PAGES, n_slots * MAX_PAGES)
    for slot, length in zip(range(n_slots), lengths, strict=False):
        pages.ensure(slot, 0, length)
        pages.truncate(slot, length // 2)
    for slot in range(n_slots):
        pages.ensure(slot, 0, MAX_LENGTH)
    assert pages.n_free == 0
