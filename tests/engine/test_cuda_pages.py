"""Pages of the cuda engine's KV pool, against a model that knows what each token's place should hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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
    st.integers(1, MAX_LENGTH),
    st.sampled_from([1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1, 2 * PAGE_TOKENS, MAX_LENGTH]),
)
TOKENS = st.integers(0, 1)
"""What a chunk repeats: few, so that the same prefixes come again and again."""
UNWRITTEN = -1
BROKEN = -2

Span = tuple[int, int, int]


def n_pages_of(length: int) -> int:
    return -(-length // PAGE_TOKENS)


class Pages(RuleBasedStateMachine):
    """A pool with contents. What belongs at a token's place is a number for all tokens up to it, as keys and values
    depend on them; that is what every slot must read, whoever has computed its pages."""

    @initialize(n_slots=st.integers(1, 4), n_pages=st.integers(1, 10))
    def begin(self, n_slots: int, n_pages: int) -> None:
        self.pages = PageTable(n_slots, MAX_PAGES, n_pages)
        self.n_pages = n_pages
        self.pool = np.full((n_pages, PAGE_TOKENS), UNWRITTEN)
        self.tokens: list[list[int]] = [[] for _ in range(n_slots)]
        self.numbers: dict[tuple[int, int], int] = {}
        # Slots whose last pass has failed: they have pages for it.
        self.failed: set[int] = set()
        # What a device would have been told.
        self.told = self.pages.table.copy()

    # --- the rules ----------------------------------------------------------------------------------------------------

    @rule(data=st.data(), slots=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), token=TOKENS)
    def write(self, data: st.DataObject, slots: list[int], token: int) -> None:
        """As a pass does: each slot from `start`, at most its length, to `length`."""
        spans = []
        for slot in dict.fromkeys(slot % len(self.tokens) for slot in slots):
            length = data.draw(LENGTHS, "length")
            latest = min(len(self.tokens[slot]), length - 1)
            start = data.draw(st.integers(max(0, latest - 70), latest), "start")
            spans.append((slot, start, length))
        if not self.prepare(spans):
            return
        for slot, start, length in spans:
            self.put(slot, start, [token] * (length - start))
        for slot, _, _ in spans:
            self.register(slot)

    @rule(data=st.data(), slot=st.integers(0, 3), more=st.integers(1, 100))
    def fail(self, data: st.DataObject, slot: int, more: int) -> None:
        """A pass that has written something, of which nothing may be used, before it fails."""
        slot %= len(self.tokens)
        start = data.draw(st.integers(0, min(len(self.tokens[slot]), MAX_LENGTH - 1)), "start")
        length = min(MAX_LENGTH, start + more)
        if self.prepare([(slot, start, length)]):
            own = self.pages_of(slot)
            for at in range(start, length):
                self.pool[own[at // PAGE_TOKENS], at % PAGE_TOKENS] = BROKEN
            self.failed.add(slot)

    @rule(data=st.data(), slot=st.integers(0, 3))
    def truncate(self, data: st.DataObject, slot: int) -> None:
        slot %= len(self.tokens)
        length = data.draw(st.integers(0, len(self.tokens[slot])), "length")
        self.pages.truncate(slot, length)
        self.failed.discard(slot)
        del self.tokens[slot][length:]

    @precondition(lambda self: len(self.tokens) > 1)
    @rule(data=st.data(), source=st.integers(0, 3), step=st.integers(1, 3))
    def share(self, data: st.DataObject, source: int, step: int) -> None:
        n_slots = len(self.tokens)
        source %= n_slots
        target = (source + 1 + step % (n_slots - 1)) % n_slots
        length = data.draw(st.integers(0, len(self.tokens[source])), "length")
        free, held = self.pages.n_free, self.held(target)
        self.pages.share(source, target, length)
        assert free <= self.pages.n_free <= free + held
        self.failed.discard(target)
        self.tokens[target] = self.tokens[source][:length]

    @rule(slot=st.integers(0, 3), runs=st.lists(st.tuples(TOKENS, st.integers(1, 150)), max_size=3))
    def reuse(self, slot: int, runs: list[tuple[int, int]]) -> None:
        """What is found is held, and read, as if computed."""
        slot %= len(self.tokens)
        tokens = [token for token, n in runs for _ in range(n)][:MAX_LENGTH]
        found = self.pages.find(np.array(tokens, np.int32))
        assert len(found) * PAGE_TOKENS <= len(tokens)
        self.pages.hold(slot, found)
        self.failed.discard(slot)
        self.tokens[slot] = tokens[: len(found) * PAGE_TOKENS]

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        """Each is free, cached or referred to by as many slots as name it, and never two of these."""
        counts = self.counts()
        free, cached = self.pages._free, self.pages._cached
        assert self.pages._references == [counts[page] for page in range(self.n_pages)]
        assert sorted([*free, *cached, *counts]) == list(range(self.n_pages))
        assert self.pages.n_free == len(free) + len(cached)

    @invariant()
    def slots_hold_as_many_pages_as_they_need(self) -> None:
        for slot, tokens in enumerate(self.tokens):
            if slot in self.failed:
                assert self.held(slot) >= n_pages_of(len(tokens))
            else:
                assert self.held(slot) == n_pages_of(len(tokens))
            own = self.pages_of(slot)
            assert len(set(own)) == len(own)

    @invariant()
    def slots_read_what_their_tokens_are(self) -> None:
        for slot, tokens in enumerate(self.tokens):
            read = self.pool[self.pages_of(slot)].reshape(-1)[: len(tokens)]
            assert read.tolist() == self.contents(tokens)

    @invariant()
    def the_index_leads_to_what_it_says(self) -> None:
        """Along every way from the beginning, pages hold the tokens they are found by; no other page is in it, no free
        one, and every cached one."""
        reached = self.registered()
        for page, tokens in reached.items():
            assert self.pool[page].tolist() == self.contents(tokens)[-PAGE_TOKENS:]
        assert {page for page, place in enumerate(self.pages._place) if place is not None} == set(reached)
        assert {page for page in range(self.n_pages) if self.pages._following[page]} <= set(reached)
        assert not set(self.pages._free) & set(reached)
        assert set(self.pages._cached) <= set(reached)

    @invariant()
    def the_device_knows_the_pages(self) -> None:
        """Pages that slots hold are where the device was last told, unless `changed` is set."""
        if self.pages.changed:
            self.told = self.pages.table.copy()
            self.pages.changed = False
        for slot in range(len(self.tokens)):
            assert self.told[slot, : self.held(slot)].tolist() == self.pages_of(slot)

    # --- the model ----------------------------------------------------------------------------------------------------

    def prepare(self, spans: Sequence[Span]) -> bool:
        """Check a batch's room, and its copies, which are made at once; False if it is refused."""
        # In use are the pages that slots keep, and one more for each kept one that is written to beside others.
        rest = set(range(len(self.tokens))) - {slot for slot, _, _ in spans}
        kept = Counter(page for slot in rest for page in self.pages_of(slot))
        kept.update(page for slot, start, _ in spans for page in self.pages_of(slot)[: n_pages_of(start)])
        needed, in_use = 0, len(kept)
        written = []
        for slot, start, length in spans:
            needed += n_pages_of(length) - n_pages_of(start)
            if start % PAGE_TOKENS:
                page = self.pages_of(slot)[start // PAGE_TOKENS]
                if kept[page] == 1:
                    written.append(page)
                else:
                    kept[page] -= 1
                    needed += 1
        before, registered, plenty = self.snapshot(), self.registered(), needed <= len(self.pages._free)
        if needed > self.n_pages - in_use:
            with pytest.raises(EngineError, match=f"the batch needs {needed} pages of 64 tokens") as caught:
                self.pages.prepare(spans)
            assert f"has {self.n_pages - in_use} free" in caught.value.message
            assert caught.value.code == "out_of_pages"
            assert self.snapshot() == before
            return False
        copies = self.pages.prepare(spans)
        assert self.pages.n_free == self.n_pages - in_use - needed
        assert not {source for source, _ in copies} & {target for _, target in copies}
        assert len({target for _, target in copies}) == len(copies)
        contents = self.pool.copy()
        for source, target in copies:
            self.pool[target] = contents[source]
        for slot, start, _ in spans:
            del self.tokens[slot][start:]
            self.failed.discard(slot)
        if plenty:  # nothing is lost but what is written to, and what continues that
            beginnings = [registered[page] for page in written if page in registered]
            for page in set(registered) - set(self.registered()):
                assert any(registered[page][: len(tokens)] == tokens for tokens in beginnings)
        return True

    def put(self, slot: int, start: int, tokens: list[int]) -> None:
        own, counts = self.pages_of(slot), self.counts()
        self.tokens[slot] += tokens
        contents = self.contents(self.tokens[slot])
        for at in range(start, start + len(tokens)):
            page = own[at // PAGE_TOKENS]
            assert counts[page] == 1, "written to by one slot, seen by another"
            assert self.pages._place[page] is None, "written to, and still found"
            self.pool[page, at % PAGE_TOKENS] = contents[at]

    def register(self, slot: int) -> None:
        tokens = np.array(self.tokens[slot], np.int32)
        table = self.pages.table.copy()
        self.pages.register(slot, tokens)
        assert len(self.pages.find(tokens)) == len(tokens) // PAGE_TOKENS
        np.testing.assert_array_equal(self.pages.table, table)

    def contents(self, tokens: Sequence[int]) -> list[int]:
        """For each token a number that stands for it and all before it."""
        out, number = [], UNWRITTEN
        for token in tokens:
            number = self.numbers.setdefault((number, token), len(self.numbers))
            out.append(number)
        return out

    def registered(self) -> dict[int, list[int]]:
        """The tokens up to its end of every page that can be found."""
        reached: dict[int, list[int]] = {}
        ways: list[tuple[int, list[int]]] = [(-1, [])]
        while ways:
            before, tokens = ways.pop()
            for key, page in self.pages._following[before].items():
                assert page not in reached
                reached[page] = [*tokens, *np.frombuffer(key, np.int32).tolist()]
                ways.append((page, reached[page]))
        return reached

    def held(self, slot: int) -> int:
        return self.pages._held[slot]

    def pages_of(self, slot: int) -> list[int]:
        return [int(page) for page in self.pages.table[slot, : self.held(slot)]]

    def counts(self) -> Counter[int]:
        """How many slots name each page."""
        return Counter(page for slot in range(len(self.tokens)) for page in self.pages_of(slot))

    def snapshot(self) -> tuple[object, ...]:
        p = self.pages
        return p.table.tobytes(), p.changed, [*p._held], [*p._references], [*p._free], [*p._cached], [*p._place]


Pages.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPages = Pages.TestCase


def text(first: int, n: int = MAX_LENGTH) -> np.ndarray:
    """A sequence of its own for every first token."""
    return np.arange(first, first + n, dtype=np.int32)


def fill(pages: PageTable, slot: int, tokens: np.ndarray, start: int = 0) -> list[tuple[int, int]]:
    """A pass over tokens[start:]."""
    copies = pages.prepare([(slot, start, len(tokens))])
    pages.register(slot, tokens)
    return copies


def found(pages: PageTable, tokens: np.ndarray) -> int:
    """How many tokens of a sequence can be taken over."""
    return len(pages.find(tokens)) * PAGE_TOKENS


def test_only_the_page_that_is_continued_is_copied() -> None:
    """Pages that are overwritten from their first token need no copy, and those before `start` stay shared."""
    pages = PageTable(2, MAX_PAGES, 8)
    assert pages.prepare([(0, 0, 200)]) == []
    pages.share(0, 1, 200)
    assert pages.n_free == 4
    first, second, third, _ = pages.table[0].tolist()
    copies = pages.prepare([(1, 70, 200)])
    assert [source for source, _ in copies] == [second]
    assert pages.table[1, 0] == first
    assert len({*pages.table[0].tolist(), *pages.table[1].tolist()}) == 7
    pages.share(0, 1, 129)
    assert pages.n_free == 4
    assert pages.prepare([(1, 128, 129)]) == []
    assert pages.n_free == 3
    assert pages.table[1, 2] != third


def test_sharing_with_itself_by_way_of_another_returns() -> None:
    """A prefix that goes to another slot and back leaves the pages in one place."""
    pages = PageTable(2, MAX_PAGES, 4)
    pages.prepare([(0, 0, 256)])
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
        pages.prepare([(slot, 0, length)])
        pages.truncate(slot, length // 2)
    for slot in range(n_slots):
        pages.prepare([(slot, 0, MAX_LENGTH)])
    assert pages.n_free == 0


def test_full_pages_are_found_after_their_slot_is_gone() -> None:
    """Whole pages, by all tokens up to their end: neither a page that is not full nor one after another beginning."""
    pages = PageTable(2, MAX_PAGES, 8)
    fill(pages, 0, text(0, 200))
    pages.truncate(0, 0)
    assert pages.n_free == 8
    assert found(pages, text(0)) == 192
    assert found(pages, text(0, 191)) == 128
    other = text(0)
    other[0] = 99
    assert found(pages, other) == 0
    other = text(0)
    other[64] = 99
    assert found(pages, other) == 64
    pages.hold(1, pages.find(text(0)))
    assert pages.n_free == 5


def test_free_pages_go_first_then_what_has_been_unused_for_longest() -> None:
    """Of what was given back, and taken over in between, the ends of the oldest go first, a page at a time; pages in
    use never."""
    pages = PageTable(4, MAX_PAGES, 8)
    for slot, first in enumerate((1000, 2000, 3000)):
        fill(pages, slot, text(first, 128))
    for slot in (1, 0, 2):
        pages.truncate(slot, 0)
    pages.hold(2, pages.find(text(3000)))
    pages.hold(1, pages.find(text(2000)))
    pages.truncate(1, 0)
    # Free are two pages; cached, the oldest first, those of 1000 and 2000; 3000 is in use.
    left = []
    for length in range(64, 257, 64):
        pages.prepare([(3, length - 64, length)])
        left.append([found(pages, text(first)) for first in (1000, 2000, 3000)])
    assert left == [[128, 128, 128], [128, 128, 128], [64, 128, 128], [0, 128, 128]]
    pages.prepare([(0, 0, 128)])
    assert [found(pages, text(first)) for first in (2000, 3000)] == [0, 128]
    with pytest.raises(EngineError, match="needs 1 pages of 64 tokens, the KV pool has 0 free"):
        pages.prepare([(1, 0, 1)])


def test_what_is_written_over_is_found_no_longer() -> None:
    """After a rollback into a full page, other tokens there are found, the old ones are not, nor what continued them;
    a slot that shares the page keeps it, and its place in the index."""
    pages = PageTable(2, MAX_PAGES, 8)
    new = np.concatenate([text(0, 100), text(5000, 92)])
    fill(pages, 0, text(0))
    fill(pages, 0, new[:101], start=100)
    assert found(pages, text(0)) == 64
    fill(pages, 0, new, start=101)
    assert (found(pages, text(0)), found(pages, new)) == (64, 192)
    pages.share(0, 1, 192)
    assert fill(pages, 1, text(0, 128), start=100)
    assert (found(pages, text(0)), found(pages, new)) == (128, 192)


def test_what_is_rolled_back_at_a_page_s_edge_stays() -> None:
    """Pages that a slot leaves whole are not written over while there are others."""
    pages = PageTable(1, MAX_PAGES, 8)
    new = np.concatenate([text(0, 64), text(5000, 192)])
    fill(pages, 0, text(0))
    fill(pages, 0, new, start=64)
    assert (found(pages, text(0)), found(pages, new)) == (256, 256)
    assert pages.n_free == 4


def test_the_same_tokens_twice_stand_in_the_index_once() -> None:
    """The other pages are ordinary ones; they take the place when the first ones have gone."""
    pages = PageTable(3, MAX_PAGES, 5)
    fill(pages, 0, text(0, 128))
    first = pages.find(text(0))
    fill(pages, 1, text(0, 130))
    assert pages.n_free == 0
    assert pages.find(text(0)) == first
    pages.truncate(0, 0)
    pages.prepare([(2, 0, 128)])
    assert found(pages, text(0)) == 0
    pages.truncate(2, 0)
    fill(pages, 1, text(0, 192), start=130)
    assert pages.find(text(0)) == pages.table[1, :3].tolist()


def test_a_page_goes_with_what_continues_it() -> None:
    """Also what another slot holds: it is then found again as soon as that slot has its own beginning in the index."""
    pages = PageTable(3, MAX_PAGES, 6)
    fill(pages, 0, text(0, 64))
    fill(pages, 1, text(0, 128))  # the first page twice; the second one continues the first slot's
    pages.truncate(0, 0)
    pages.prepare([(2, 0, 256)])
    assert found(pages, text(0)) == 0
    pages.truncate(2, 0)
    fill(pages, 1, text(0, 192), start=128)
    assert found(pages, text(0)) == 192


def test_long_contexts() -> None:
    """The index is as deep as a context is long."""
    n = 5000
    pages = PageTable(2, n, n + 1)
    tokens = text(0, n * PAGE_TOKENS)
    fill(pages, 0, tokens)
    assert found(pages, tokens) == len(tokens)
    pages.prepare([(0, 10, 11)])
    assert found(pages, tokens) == 0
    assert pages.n_free == n
