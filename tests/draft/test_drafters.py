"""What can draft, and the worker's loop around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.draft.drafters import MODELLESS_SLOTS, Drafter, GarbageDrafter, ModelDrafter, NgramDrafter, modelless
from services.draft.worker import Worker
from shared.engine.dense import DenseLogits
from shared.engine.interface import Chunk, EngineInfo, EngineSettings, Proposed
from shared.engine.ngram import propose
from shared.engine.null import FIRST_ID, NullEngine, next_token
from shared.engine.slots import check_chunks, check_prefix
from shared.errors import EngineError
from shared.messages import Close, Commit, Error, Message, OpenDraft, Proposal
from shared.prefix import TokenPrefix
from shared.sampling.drafting import DraftToken, draft
from shared.sampling.params import SamplingParams
from shared.speculation.draft_session import HOPELESS, DraftSession

N_VOCAB = 64
GREEDY = SamplingParams(temperature=0.0)


class HistoryEngine:
    """An engine whose logits depend on every token that its cache really holds: a wrong cache shows in the tokens."""

    def __init__(self, n_slots: int = 2, n_ctx: int = 64, n_batch: int = 32) -> None:
        self.info = EngineInfo("history", "", "", N_VOCAB, n_ctx, n_slots, n_batch, "f", True)
        self.held: list[list[int]] = [[] for _ in range(n_slots)]
        self.batches: list[int] = []

    def forward(self, chunks: Sequence[Chunk]) -> DenseLogits:
        self.batches.append(
            check_chunks(chunks, [len(h) for h in self.held], self.info.n_ctx, self.info.n_batch),
        )
        rows = []
        for chunk in chunks:
            held = self.held[chunk.slot]
            del held[chunk.start :]
            for index, token in enumerate(chunk.tokens.tolist()):
                held.append(token)
                if index >= len(chunk.tokens) - chunk.rows:
                    rows.append(row_after(held))
        return DenseLogits(np.array(rows, np.float32).reshape(-1, N_VOCAB))

    def length(self, slot: int) -> int:
        return len(self.held[slot])

    def truncate(self, slot: int, length: int) -> None:
        check_prefix([len(h) for h in self.held], slot, length)
        del self.held[slot][length:]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        check_prefix([len(h) for h in self.held], source, length)
        self.held[target] = self.held[source][:length]

    def close(self) -> None:
        self.held = []


class ProposingEngine(HistoryEngine):
    """The same with tokens that the engine chooses itself."""

    max_proposals = 3

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked: list[int] = []

    def can_propose(self, params: SamplingParams) -> bool:
        return params.acceptance == "coupled"

    def propose(self, chunks: Sequence[Chunk], params: Sequence[SamplingParams], n: int) -> Proposed:
        assert 1 <= n <= self.max_proposals
        self.asked.append(n)
        chosen: list[list[DraftToken]] = [[] for _ in chunks]
        for _ in range(n):
            logits = self.forward(chunks)
            following = []
            for row, (chunk, p) in enumerate(zip(chunks, params, strict=True)):
                held = self.held[chunk.slot]
                chosen[row].append(draft(p, logits.dense(row), held, len(held)))
                following.append(Chunk(chunk.slot, len(held), np.array([chosen[row][-1].token], np.int32), 1))
            chunks = following
        return Proposed(
            np.array([[d.token for d in row] for row in chosen], np.int32),
            np.array([[d.confidence for d in row] for row in chosen], np.float32),
        )


PAGE = 4


class PagedEngine(HistoryEngine):
    """The first with pages of a few tokens, which all slots take from one pool."""

    n_pages = 12

    def forward(self, chunks: Sequence[Chunk]) -> DenseLogits:
        self.find_room(chunks, 0)
        return super().forward(chunks)

    def find_room(self, chunks: Sequence[Chunk], more: int) -> None:
        lengths = [len(h) for h in self.held]
        for chunk in chunks:
            lengths[chunk.slot] = chunk.start + len(chunk.tokens) + more
        if sum(-(-length // PAGE) for length in lengths) > self.n_pages:
            raise EngineError("the pool is full", "raise kv_pages", "out_of_pages")


class PagedProposingEngine(ProposingEngine, PagedEngine):
    """And the second."""

    def propose(self, chunks: Sequence[Chunk], params: Sequence[SamplingParams], n: int) -> Proposed:
        self.find_room(chunks, n - 1)
        return super().propose(chunks, params, n)


class RememberingEngine(HistoryEngine):
    """The first; the first 16 tokens of every text that a slot has ever held can be had again."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.known: set[tuple[int, ...]] = set()

    def forward(self, chunks: Sequence[Chunk]) -> DenseLogits:
        logits = super().forward(chunks)
        self.known |= {tuple(held[:16]) for held in self.held}
        return logits

    def reuse_prefix(self, slot: int, tokens: np.ndarray) -> int:
        beginning = tuple(tokens[:16].tolist())
        if len(self.held[slot]) < 16 < len(tokens) and beginning in self.known:
            self.held[slot] = list(beginning)
        return len(self.held[slot])


def row_after(text: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(TokenPrefix(text).hash).normal(0, 3, N_VOCAB).astype(np.float32)


def greedy_after(text: Sequence[int], n: int) -> list[int]:
    out = list(text)
    for _ in range(n):
        out.append(int(row_after(out).argmax()))
    return out[len(text) :]


def open_draft(
    session: int, prompt: Sequence[int], window: int = 4, sampling: SamplingParams = GREEDY, stop: Sequence[int] = ()
) -> OpenDraft:
    return OpenDraft(session, np.array(prompt, np.int32), sampling, tuple(stop), window)


class Harness:
    """A worker with what it has sent, and the commits of a target."""

    def __init__(self, drafter: Drafter) -> None:
        self.sent: list[Message] = []
        self.worker = Worker(drafter, self.sent.extend)
        self.texts: dict[int, list[int]] = {}

    def open(self, session: int, prompt: Sequence[int], **options: Any) -> None:
        self.texts[session] = list(prompt)
        self.worker.receive(open_draft(session, prompt, **options))

    def run(self) -> None:
        """Let the worker draft until it has nothing to do."""
        for _ in range(1000):
            if not self.worker.turn():
                return
        raise AssertionError("the worker never comes to rest")

    def commit(self, session: int, tokens: Sequence[int]) -> None:
        text = self.texts[session]
        known = len(text) + len(tokens) + 99
        prefix_hash = TokenPrefix(text).hash
        self.worker.receive(Commit(session, len(text), prefix_hash, tuple(tokens), 0, known))
        text += tokens

    def proposed(self, session: int) -> list[int]:
        """The worker's own continuation of the committed text, from the messages sent so far."""
        text = self.texts[session]
        own = TokenPrefix(text)
        for message in self.sent:
            if isinstance(message, Proposal) and message.session == session:
                skip = len(own) - message.start
                fits = 0 <= skip <= len(message.tokens) and own.hashes[message.start] == message.prefix_hash
                if fits and own.agreement(message.start, message.tokens) == skip:
                    own.append(message.tokens[skip:])
        return own.tokens[len(text) :]

    def errors(self) -> list[Error]:
        return [message for message in self.sent if isinstance(message, Error)]


# -- the model drafter --


def test_a_model_drafts_its_own_continuation() -> None:
    """The proposals are the draft model's own tokens, one message a token, up to the window."""
    harness = Harness(ModelDrafter(HistoryEngine(), 8))
    harness.open(1, [1, 2, 3], window=4)
    harness.run()
    assert harness.proposed(1) == greedy_after([1, 2, 3], 4)
    assert [len(m.tokens) for m in harness.sent if isinstance(m, Proposal)] == [1] * 4


def test_after_an_accepted_run_the_cache_holds_its_own_last_token() -> None:
    """When every proposal was accepted, the next proposals are a fresh session's (not those of a cache with a hole)."""
    engine = HistoryEngine()
    harness = Harness(ModelDrafter(engine, 8))
    harness.open(1, [1, 2, 3], window=3)
    for bonus in (7, 8, 9):
        harness.run()
        accepted = harness.proposed(1)
        assert len(accepted) == 3
        harness.commit(1, [*accepted, bonus])
    harness.run()
    assert harness.proposed(1) == greedy_after(harness.texts[1], 3)
    text = harness.texts[1] + harness.proposed(1)
    assert engine.held[0] == text[:-1], "all but the last proposal, which no one has asked to continue"


@pytest.mark.parametrize("engine", [HistoryEngine, ProposingEngine])
@settings(deadline=None, max_examples=60)
@given(
    rounds=st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.integers(0, N_VOCAB - 1), min_size=1, max_size=3)), max_size=5
    ),
    window=st.integers(1, 5),
    sampling=st.sampled_from((GREEDY, SamplingParams(seed=3, top_k=0, top_p=1.0, min_p=0.0))),
)
def test_any_rollback_equals_a_fresh_session(
    engine: type[HistoryEngine], rounds: list[tuple[int, list[int]]], window: int, sampling: SamplingParams
) -> None:
    """After any accepted runs and refusals the worker proposes what one that starts with this text would."""
    harness = Harness(ModelDrafter(engine(), 8))
    harness.open(1, [1, 2, 3], window=window, sampling=sampling)
    for n_accepted, then in rounds:
        harness.run()
        harness.commit(1, [*harness.proposed(1)[:n_accepted], *then])
    harness.run()
    fresh = Harness(ModelDrafter(HistoryEngine(), 8))
    fresh.open(1, harness.texts[1], window=window, sampling=sampling)
    fresh.run()
    assert harness.proposed(1) == fresh.proposed(1)
    confidences = [c for message in fresh.sent if isinstance(message, Proposal) for c in message.confidence]
    assert len(harness.proposed(1)) == len(confidences)
    # Up to the window, or up to the first token that makes it hopeless.
    assert math.prod(confidences[:-1]) >= HOPELESS
    assert len(confidences) == window or math.prod(confidences) < HOPELESS


def test_an_engine_that_proposes_is_asked_for_several_tokens() -> None:
    """As many as it can give and the window has room for; the message carries them all, the cache lacks the last."""
    engine = ProposingEngine()
    harness = Harness(ModelDrafter(engine, 8))
    harness.open(1, [1, 2, 3], window=5)
    harness.run()
    assert engine.asked == [3, 2]
    assert [len(m.tokens) for m in harness.sent if isinstance(m, Proposal)] == [3, 2]
    text = [1, 2, 3, *greedy_after([1, 2, 3], 5)]
    assert harness.proposed(1) == text[3:]
    assert engine.held[0] == text[:-1]


def test_what_an_engine_proposes_after_a_stop_token_is_dropped() -> None:
    """The proposals end with the stop token, and the next commit goes on from there."""
    first, second, *_ = greedy_after([1, 2, 3], 3)
    harness = Harness(ModelDrafter(ProposingEngine(), 8))
    harness.open(1, [1, 2, 3], window=5, stop=[second])
    harness.run()
    assert harness.proposed(1) == [first, second]
    harness.commit(1, [first, 5])
    harness.run()
    assert harness.proposed(1) == greedy_after([1, 2, 3, first, 5], 5)


def test_an_engine_is_not_asked_for_what_it_cannot_propose() -> None:
    """Beside a session with rejection sampling all are drafted for from the logits."""
    engine = ProposingEngine()
    harness = Harness(ModelDrafter(engine, 8))
    harness.open(1, [1, 2, 3], window=2)
    harness.open(2, [9, 8], window=2, sampling=SamplingParams(acceptance="rejection"))
    harness.run()
    assert engine.asked == []
    assert harness.proposed(1) == greedy_after([1, 2, 3], 2)


def test_the_null_engine_drafts_like_a_null_target() -> None:
    """A null draft says exactly what a null target will, round after round: every proposal is accepted."""
    engine = NullEngine(EngineSettings(engine="null", n_slots=1), N_VOCAB)
    harness = Harness(ModelDrafter(engine, 8))
    harness.open(1, [20, 21], window=4)
    for _ in range(5):
        harness.run()
        expected = list(harness.texts[1])
        for _ in range(5):
            expected.append(next_token(expected[-1], len(expected) - 1, N_VOCAB))
        new = expected[len(harness.texts[1]) :]
        assert harness.proposed(1) == new[:4]
        harness.commit(1, new)
    assert min(harness.texts[1]) >= FIRST_ID


def test_several_sessions_share_a_forward_pass() -> None:
    """Sessions are drafted for together and do not influence each other."""
    engine = HistoryEngine()
    harness = Harness(ModelDrafter(engine, 8))
    harness.open(1, [1, 2, 3])
    harness.open(2, [9, 8])
    harness.run()
    assert harness.proposed(1) == greedy_after([1, 2, 3], 4)
    assert harness.proposed(2) == greedy_after([9, 8], 4)
    assert engine.batches == [5, 2, 2, 2]


def test_a_long_prompt_takes_several_passes() -> None:
    """A prompt longer than the batch is computed in parts, and nobody waits forever beside it."""
    engine = HistoryEngine(n_batch=8)
    harness = Harness(ModelDrafter(engine, 8))
    harness.open(1, range(30))
    harness.open(2, [9, 8])
    harness.run()
    assert harness.proposed(1) == greedy_after(range(30), 4)
    assert harness.proposed(2) == greedy_after([9, 8], 4)
    assert max(engine.batches) <= 8


def test_slots_are_given_back() -> None:
    """A session too many is refused with a reason; when another is closed, its slot is free again."""
    harness = Harness(ModelDrafter(HistoryEngine(n_slots=1), 8))
    harness.open(1, [1, 2, 3])
    harness.open(2, [1, 2])
    assert [(e.ref, e.code) for e in harness.errors()] == [(2, "no_slot")]
    harness.worker.receive(Close(1))
    harness.open(2, [1, 2])
    harness.run()
    assert harness.proposed(2) == greedy_after([1, 2], 4)
    assert harness.worker.n_sessions == 1
    harness.worker.forget_all()
    assert harness.worker.n_sessions == 0


def test_a_prompt_that_the_engine_remembers_is_not_computed_again() -> None:
    """Although no slot holds it any more; the proposals are the same."""
    engine = RememberingEngine(n_slots=1)
    harness = Harness(ModelDrafter(engine, 8))
    for session, prompt, computed in ((1, range(20), 20), (2, range(30, 50), 20), (3, [*range(18), 40, 41], 4)):
        engine.batches.clear()
        harness.open(session, prompt)
        harness.run()
        assert engine.batches[0] == computed
        assert harness.proposed(session) == greedy_after(prompt, 4)
        harness.worker.receive(Close(session))


@pytest.mark.parametrize("engine", [PagedEngine, PagedProposingEngine])
def test_what_ended_sessions_left_makes_room(engine: type[PagedEngine]) -> None:
    """A session that grows beyond the free pages goes on in those of one that has ended, which nobody reuses then."""
    harness = Harness(ModelDrafter(engine(), 8))
    harness.open(1, range(20))
    harness.run()
    harness.worker.receive(Close(1))
    harness.open(2, range(30, 50))
    for _ in range(6):
        harness.run()
        assert harness.proposed(2) == greedy_after(harness.texts[2], 4)
        harness.commit(2, [*harness.proposed(2)[:3], 1])
    harness.worker.receive(Close(2))
    harness.open(1, range(20))
    harness.run()
    assert harness.proposed(1) == greedy_after(range(20), 4)
    assert harness.errors() == []


@pytest.mark.parametrize("engine", [PagedEngine, PagedProposingEngine])
def test_of_two_that_do_not_fit_the_newer_is_refused(engine: type[PagedEngine]) -> None:
    """It ends with the engine's error, also while its window is full; the other drafts on as if alone."""
    harness = Harness(ModelDrafter(engine(), 8))
    harness.open(1, range(18))
    harness.open(2, range(30, 48))
    for _ in range(5):
        harness.run()
        assert harness.proposed(1) == greedy_after(harness.texts[1], 4)
        harness.commit(1, [*harness.proposed(1)[:3], 1])
    assert harness.errors() == [Error(2, "out_of_pages", "the pool is full", "raise kv_pages")]
    assert harness.proposed(2) == greedy_after(range(30, 48), 4)
    assert harness.worker.n_sessions == 1
    harness.commit(2, [1])
    harness.run()
    assert len(harness.errors()) == 1


def test_a_prompt_that_can_never_fit_is_refused() -> None:
    """A prompt larger than the pool ends with the engine's error and leaves its slot to others."""
    harness = Harness(ModelDrafter(PagedEngine(n_slots=1), 8))
    harness.open(1, range(60))
    harness.run()
    assert [(e.ref, e.code) for e in harness.errors()] == [(1, "out_of_pages")]
    harness.open(2, range(20))
    harness.run()
    assert harness.proposed(2) == greedy_after(range(20), 4)


def test_a_closed_session_leaves_what_can_be_evicted() -> None:
    """What its slot holds beyond the tokens that the table knows of is dropped."""
    engine = HistoryEngine()
    harness = Harness(ModelDrafter(engine, 8))
    harness.open(1, range(20))
    harness.run()
    harness.commit(1, [63])
    assert len(engine.held[0]) == 23
    harness.worker.receive(Close(1))
    assert engine.held[0] == list(range(20))


def test_other_errors_of_the_engine_are_fatal() -> None:
    """An engine that fails otherwise is not asked again."""
    engine: Any = HistoryEngine()
    harness = Harness(ModelDrafter(engine, 8))
    harness.open(1, range(20))
    engine.forward = Mock(side_effect=EngineError("the GPU is gone", code="device_failed"))
    with pytest.raises(EngineError, match="the GPU is gone"):
        harness.worker.turn()
    assert engine.forward.call_count == 1


def test_a_cached_prompt_is_not_computed_again() -> None:
    """A session with a prompt that a slot holds already starts there, and drafts the same."""
    engine = HistoryEngine()
    harness = Harness(ModelDrafter(engine, 8))
    prompt = list(range(25))
    harness.open(1, prompt)
    harness.run()
    harness.worker.receive(Close(1))
    engine.batches.clear()
    harness.open(2, prompt)
    harness.run()
    assert harness.proposed(2) == greedy_after(prompt, 4)
    assert engine.batches[0] == 1


def test_opening_a_session_again_replaces_it() -> None:
    """A worker that gets the same session with more tokens goes on from there."""
    harness = Harness(ModelDrafter(HistoryEngine(n_slots=1), 8))
    harness.open(1, [1, 2, 3])
    harness.run()
    harness.open(1, [1, 2, 3, 4, 5])
    harness.run()
    assert harness.errors() == []
    assert harness.proposed(1) == greedy_after([1, 2, 3, 4, 5], 4)


def test_the_context_is_respected() -> None:
    """A text that does not fit is refused with a reason; drafting stops where the cache is full."""
    harness = Harness(ModelDrafter(HistoryEngine(n_ctx=8), 8))
    harness.open(1, range(8))
    assert [(e.ref, e.code) for e in harness.errors()] == [(1, "context_exceeded")]
    harness.open(2, range(6), window=5)
    harness.run()
    assert len(harness.proposed(2)) == 2
    harness.commit(2, [1, 2, 3, 4, 5])
    harness.run()
    assert harness.proposed(2) == []


def test_a_lost_commit_is_reported() -> None:
    """A worker that has missed a commit says so, forgets the session, and ignores what follows."""
    harness = Harness(ModelDrafter(HistoryEngine(), 8))
    harness.open(1, [1, 2, 3])
    harness.run()
    harness.texts[1] += [4]
    harness.commit(1, [5])
    assert [(e.ref, e.code) for e in harness.errors()] == [(1, "lost_commit")]
    assert harness.worker.n_sessions == 0
    harness.commit(1, [6])
    assert not harness.worker.turn()
    assert len(harness.errors()) == 1


def test_rejection_drafting_sends_what_it_drew_from() -> None:
    """Each token comes with a distribution of at most q_top_k entries that sums to 1 and contains it."""
    sampling = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, acceptance="rejection", seed=5)
    harness = Harness(ModelDrafter(HistoryEngine(), 8))
    harness.open(1, [1, 2, 3], sampling=sampling)
    harness.run()
    proposals = [message for message in harness.sent if isinstance(message, Proposal)]
    assert len(proposals) == 4
    for proposal in proposals:
        assert proposal.q_counts == (8,)
        assert len(proposal.q_ids) == len(proposal.q_probs) == 8
        assert proposal.tokens[0] in proposal.q_ids
        assert float(proposal.q_probs.sum()) == pytest.approx(1, abs=1e-5)
        at = proposal.q_ids.tolist().index(proposal.tokens[0])
        assert proposal.confidence[0] == pytest.approx(float(proposal.q_probs[at]))


def test_a_stop_token_ends_a_models_continuation() -> None:
    """A token that ends the generation is proposed, and nothing after it."""
    stop = greedy_after([1, 2, 3], 2)[1]
    harness = Harness(ModelDrafter(HistoryEngine(), 8))
    harness.open(1, [1, 2, 3], stop=(stop,))
    harness.run()
    assert harness.proposed(1) == greedy_after([1, 2, 3], 2)


def test_the_engine_time_is_reported() -> None:
    """A prompt's time counts as prefill, a token's as decode, each once."""
    harness = Harness(ModelDrafter(HistoryEngine(), 8))
    harness.open(1, range(20))
    session: DraftSession = harness.worker._sessions[1]
    harness.run()
    first, *later = [message for message in harness.sent if isinstance(message, Proposal)]
    assert first.prefill_us > 0
    assert first.n_prefilled == 20
    assert first.decode_us == 0
    assert all(message.prefill_us == 0 for message in later)
    assert (session.cost.prefill_us, session.cost.decode_us) == (0, 0)


# -- the drafters without a model --

small_run = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), small_run), max_size=8),
    st.integers(1, 6),
)
def test_ngram_rollback_equals_a_fresh_session(
    prompt: list[int], rounds: list[tuple[bool, int, list[int]]], window: int
) -> None:
    """After any agreements and a refusal the index holds the text and nothing refused: prompt lookup's own answer."""
    harness = Harness(NgramDrafter())
    harness.open(1, prompt, window=window)
    for agrees, n_accepted, then in [*rounds, (False, 1, [0])]:
        harness.run()
        own = harness.proposed(1)
        if agrees and own:
            harness.commit(1, own[: max(1, n_accepted)])
            continue
        wrong = [own[n_accepted] + 1] if n_accepted < len(own) else []
        harness.commit(1, [*own[:n_accepted], *wrong, *then])
    harness.run()
    assert harness.proposed(1) == propose(harness.texts[1], window)


def test_ngram_copies_what_came_before() -> None:
    """A text that repeats itself is continued as it went the last time, all of the window in one message."""
    harness = Harness(NgramDrafter())
    harness.open(1, [1, 2, 3, 4, 5, 1, 2], window=3)
    harness.run()
    assert harness.proposed(1) == [3, 4, 5]
    assert [m.tokens for m in harness.sent if isinstance(m, Proposal)] == [(3, 4, 5)]
    harness.commit(1, [3, 9])
    harness.run()
    assert harness.proposed(1) == []
    harness.commit(1, [4, 5])
    harness.run()
    assert harness.proposed(1) == [1, 2, 3]


def test_ngram_stops_at_a_stop_token() -> None:
    """What followed a stop token the last time is not proposed."""
    harness = Harness(NgramDrafter())
    harness.open(1, [1, 2, 3, 9, 4, 5, 1, 2], window=6, stop=(9,))
    harness.run()
    assert harness.proposed(1) == [3, 9]


def test_garbage_fills_the_window_with_known_tokens() -> None:
    """Random tokens are from the vocabulary as far as the prompt shows it, and the window holds."""
    harness = Harness(GarbageDrafter())
    harness.open(1, [1, 2, 30], window=5)
    harness.run()
    own = harness.proposed(1)
    assert len(own) == 5
    assert set(own) <= set(range(31))
    harness.commit(1, [31])
    harness.run()
    assert len(harness.proposed(1)) == 5


@pytest.mark.parametrize("kind", ["ngram", "garbage"])
def test_drafters_without_a_model_fit_any_target(kind: Any) -> None:
    """They have no vocabulary of their own, many slots, and free what a closed session held."""
    drafter = modelless(kind)
    assert drafter.info.vocab_fingerprint == ""
    assert drafter.info.n_slots == MODELLESS_SLOTS
    harness = Harness(drafter)
    harness.open(1, [1, 2, 1, 2])
    harness.run()
    harness.worker.receive(Close(1))
    harness.worker.receive(Close(1))
    assert harness.worker.n_sessions == 0
    assert not harness.worker.turn()
    drafter.shut()
