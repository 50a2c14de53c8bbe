"""A session in the verifier, whatever arrives in whatever order; and together with the draft's side of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import wire
from shared.messages import MAX_CONTEXT, MAX_RUN, Commit, Limits, OpenDraft, Proposal, Speculation
from shared.prefix import TokenPrefix
from shared.sampling.drafting import DraftToken
from shared.sampling.params import SamplingParams
from shared.speculation.draft_session import DraftSession, LostCommit
from shared.speculation.target_session import TargetSession

NO_IDS, NO_PROBS = np.empty(0, np.int32), np.empty(0, np.float32)
PROMPT = [5, 6, 7]
MAX_PARKED = 16


def open_target(prompt: Sequence[int] = PROMPT, sampling: SamplingParams | None = None) -> TargetSession:
    return TargetSession(1, np.array(prompt, np.int32), sampling or SamplingParams(), Limits(1000), Speculation(), 0)


def propose(tokens: Sequence[int], start: int, run: Sequence[int], **q: Any) -> Proposal:
    """What a worker whose sequence is `tokens` says about the positions from `start` on."""
    return Proposal(1, start, TokenPrefix(tokens[:start]).hash, tuple(run), **q)


def chain(session: TargetSession) -> list[int]:
    return [p.token for p in session.chain]


def test_the_request_s_bounds_hold() -> None:
    """No more than n_max; none from the first on in which the draft has less confidence than p_min."""
    bounds = Speculation(n_max=3, n_min=2, p_min=0.5)
    session = TargetSession(1, np.array(PROMPT, np.int32), SamplingParams(), Limits(1000), bounds, 0)
    for run, confidence, usable in (([1], (0.9,), 1), ([2, 3, 4], (0.5, 0.6, 0.7), 3)):
        session.offer(propose([*PROMPT, *chain(session)], session.known, run, confidence=confidence))
        assert session.usable == len(session.candidate().reach) == usable
    assert session.candidate().room == 0
    assert session.candidate().least == 2
    session.commit([9])
    session.offer(propose([*PROMPT, 9], 4, [1, 2, 3], confidence=(0.9, 0.4, 0.9)))
    assert session.usable == len(session.candidate().reach) == 1
    assert session.candidate().room == 0, "to wait for more is of no use"
    session.offer(propose([*PROMPT, 9], 4, [5, 6], confidence=()))
    assert session.usable == 2, "what has no confidence is not under it"


# -- single offers --


def test_a_proposal_for_the_prefix_waits() -> None:
    """A proposal that continues the committed tokens is there for the next step, and one that continues it too."""
    session = open_target()
    assert session.offer(propose(PROMPT, 3, [1, 2]))
    assert session.offer(propose([*PROMPT, 1, 2], 5, [3]))
    assert chain(session) == [1, 2, 3]
    assert session.known == 6
    assert [p.token for p in session.proposals(2)] == [1, 2]


def test_duplicates_change_nothing() -> None:
    """The same proposal again, whole or in part, leaves the chain as it is."""
    session = open_target()
    for _ in range(3):
        assert session.offer(propose(PROMPT, 3, [1, 2, 3]))
        assert session.offer(propose([*PROMPT, 1], 4, [2]))
        assert chain(session) == [1, 2, 3]


def test_a_late_proposal_gives_what_is_not_committed_yet() -> None:
    """Of a proposal that began before the last commit and agrees with it, the rest is used."""
    session = open_target()
    session.commit([1, 2])
    assert session.offer(propose(PROMPT, 3, [1, 2, 3, 4]))
    assert chain(session) == [3, 4]
    assert session.counters.n_stale == 0


@pytest.mark.parametrize(
    ("tokens", "start", "run"),
    [(PROMPT, 3, [1, 9, 3]), (PROMPT, 3, [1]), ([5, 6, 8, 1, 2], 5, [3]), ([9], 1, [6, 7, 1, 2, 3]), ([], 0, [4, 4])],
    ids=["contradicts the commit", "is all committed", "other prefix", "other prompt", "from the start"],
)
def test_a_stale_proposal_is_refused(tokens: list[int], start: int, run: list[int]) -> None:
    """What was drafted for another prefix, or adds nothing, is refused and counted."""
    session = open_target()
    session.commit([1, 2])
    assert not session.offer(propose(tokens, start, run))
    assert chain(session) == []
    assert session.counters.n_stale == len(run)


def test_a_changed_mind_replaces_the_rest() -> None:
    """A worker that has rolled back replaces its own earlier proposals from there on."""
    session = open_target()
    session.offer(propose(PROMPT, 3, [1, 2, 3]))
    assert session.offer(propose([*PROMPT, 1], 4, [8, 9]))
    assert chain(session) == [1, 8, 9]
    assert not session.offer(propose([*PROMPT, 1, 2, 3], 6, [4])), "its prefix is not the chain any more"


def test_an_early_proposal_waits_for_the_one_before_it() -> None:
    """Reordered proposals come together as if they had come in order."""
    session = open_target()
    text = [*PROMPT, 1, 2, 3, 4]
    assert session.offer(propose(text, 6, [4]))
    assert session.offer(propose(text, 5, [3]))
    assert chain(session) == []
    assert session.offer(propose(text, 3, [1, 2]))
    assert chain(session) == [1, 2, 3, 4]


def test_a_commit_may_replace_a_lost_proposal() -> None:
    """A proposal that waits for a lost one is used when the target itself has committed the lost one's token."""
    session = open_target()
    session.offer(propose([*PROMPT, 1], 4, [2, 3]))
    session.offer(propose([*PROMPT, 1, 2, 3], 6, [4]))
    session.commit([1])
    assert chain(session) == [2, 3, 4]
    other = open_target()
    other.offer(propose([*PROMPT, 1], 4, [2, 3]))
    other.commit([9])
    assert chain(other) == []


def test_a_commit_keeps_what_it_confirms() -> None:
    """Proposals beyond an accepted run go on waiting; a contradicted or overtaken chain is dropped."""
    session = open_target()
    session.offer(propose(PROMPT, 3, [1, 2, 3]))
    session.commit([1])
    assert chain(session) == [2, 3]
    assert session.offer(propose([*PROMPT, 1, 2, 3], 6, [4]))
    session.commit([2, 9])
    assert chain(session) == []
    assert session.counters.n_stale == 2
    session.offer(propose(session.prefix.tokens, 6, [1]))
    session.commit([1, 2])
    assert chain(session) == []
    assert session.known == len(session.prefix) == 8


def test_the_chain_is_bounded() -> None:
    """However much arrives, at most MAX_RUN proposals wait, and they are the first ones."""
    session = open_target()
    text = list(PROMPT)
    for token in range(3 * MAX_RUN):
        session.offer(propose(text, len(text), [token]))
        text.append(token)
    assert chain(session) == list(range(MAX_RUN))


def test_what_waits_for_its_predecessor_is_bounded() -> None:
    """Proposals from far ahead do not pile up."""
    session = open_target()
    for start in range(10, 1000):
        session.offer(propose([], start, [1]))
    assert len(session._parked) <= MAX_PARKED
    session.commit(range(2000))
    assert not session._parked


def test_what_never_fits_does_not_keep_out_what_will() -> None:
    """A worker that filled the places of early proposals with nonsense does not hinder the one that replaces it."""
    session = open_target()
    for start in range(8, 3 + MAX_RUN):
        session.offer(propose([], start, [9]))
    assert session.offer(propose([*PROMPT, 1, 2], 5, [3]))
    assert session.offer(propose(PROMPT, 3, [1, 2]))
    assert chain(session) == [1, 2, 3]


def test_a_flood_ends_with_the_next_commit() -> None:
    """Of a worker's contradicting proposals only so many are looked at; after a commit a worker is heard again."""
    session = open_target()
    for number in range(1000):
        session.offer(propose(PROMPT, 3, [number]))
    assert chain(session) == [4 * MAX_RUN - 1]
    assert session.counters.n_stale == 1000 - 4 * MAX_RUN
    session.commit([8])
    assert session.offer(propose([*PROMPT, 8], 4, [1]))
    assert chain(session) == [1]


def test_after_hours_of_a_flood_the_figures_can_be_sent() -> None:
    """However much was stale, the last commit's figures are a message that its reader takes."""
    session = open_target()
    session.counters.n_stale = 2**40
    commit = Commit(1, 3, 0, (), 0, 3, "cancelled", session.stats(0))
    assert wire.decode([bytes(frame) for frame in wire.encode(commit)]) == commit


def test_a_position_that_no_window_reaches_is_stale() -> None:
    """Proposals beyond it, or beyond any context, are counted and not kept."""
    session = open_target()
    for start in (3 + MAX_RUN + 1, MAX_CONTEXT):
        assert not session.offer(propose([], start, [1]))
    assert not session._parked
    assert session.counters.n_stale == 2


@pytest.mark.parametrize("confidence", [float("nan"), float("inf"), -1.0, 1.5, 1e300])
def test_a_confidence_that_is_no_probability_counts_as_none(confidence: float) -> None:
    """Expectations stay probabilities, whatever a worker claims."""
    session = open_target()
    assert session.offer(propose(PROMPT, 3, [1, 2], confidence=(confidence, 0.5)))
    assert [p.confidence for p in session.chain] == [None, 0.5]
    assert all(0 <= share <= 1 for share in session.candidate().reach)


# -- distributions of proposals --


REJECTION = SamplingParams(acceptance="rejection")


@pytest.mark.parametrize("p_min", [0.0, 0.5])
def test_whether_a_drawn_proposal_is_verified_does_not_depend_on_which_it_is(p_min: float) -> None:
    """Else likely tokens would be taken too often, and rejection sampling would no longer be exact."""
    seen = []
    for token, probability in ((1, 0.7), (2, 0.2), (3, 0.1)):
        bounds = Speculation(p_min=p_min)
        session = TargetSession(1, np.array(PROMPT, np.int32), REJECTION, Limits(1000), bounds, 0)
        q = np.array([1, 2, 3], np.int32), np.array([0.7, 0.2, 0.1], np.float32)
        assert session.offer(
            propose(PROMPT, 3, [token], confidence=(probability,), q_counts=(3,), q_ids=q[0], q_probs=q[1])
        )
        seen.append((session.usable, session.candidate().reach, session.candidate().typical))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0] == 1


def q(counts: Sequence[int], ids: Sequence[int], probs: Sequence[float]) -> dict[str, Any]:
    return {"q_counts": tuple(counts), "q_ids": np.array(ids, np.int32), "q_probs": np.array(probs, np.float32)}


def test_each_proposal_keeps_its_distribution() -> None:
    """Under rejection sampling a token comes with the ids and probabilities that it was drawn from, also late ones."""
    session = open_target(sampling=REJECTION)
    session.commit([1])
    assert session.offer(propose(PROMPT, 3, [1, 2, 3], **q((1, 2, 1), (1, 2, 9, 3), (1, 0.25, 0.75, 1))))
    assert chain(session) == [2, 3]
    assert [(p.q[0].tolist(), p.q[1].tolist()) for p in session.chain if p.q] == [([2, 9], [0.25, 0.75]), ([3], [1.0])]


def test_proposals_without_distributions_are_certain() -> None:
    """A drafter that does not draw at random sends none, under rejection sampling too."""
    session = open_target(sampling=REJECTION)
    assert session.offer(propose(PROMPT, 3, [1, 2]))
    assert [p.q for p in session.chain] == [None, None]


@pytest.mark.parametrize(
    "lie",
    [
        q((1,), (1,), (1,)),
        q((1, 1, 1), (1, 2, 3), (1, 1, 1)),
        q((1, 2), (1, 2), (1, 1)),
        q((1, 0), (1,), (1,)),
        q((1, 1), (1, 2), (1, 0.5)),
        q((1, 1), (1, 2), (1, np.nan)),
        q((1, 2), (1, 2, 3), (1, 2, -1)),
        q((1, 2), (1, 2, 2), (1, 0.5, 0.5)),
        q((1, 1), (1, 3), (1, 1)),
        q((1, 1), (1, 2), (1,)),
        q((1, 1025), range(1, 1027), [1.0] + [1 / 1025] * 1025),
    ],
    ids=[
        "too few", "too many", "more than sent", "empty", "sum", "nan", "negative", "twice", "impossible token",
        "ids without probabilities", "too long",
    ],
)  # fmt: skip
def test_a_lie_about_distributions_is_refused_here(lie: dict[str, Any]) -> None:
    """What the sampler would refuse the whole step for never reaches it; without rejection sampling it is not read."""
    session = open_target(sampling=REJECTION)
    assert not session.offer(propose(PROMPT, 3, [1, 2], **lie))
    assert session.chain == []
    coupled = open_target()
    assert coupled.offer(propose(PROMPT, 3, [1, 2], **lie))
    assert [p.q for p in coupled.chain] == [None, None]


# -- any history --

token = st.integers(0, 3)
run = st.lists(token, min_size=1, max_size=5)
event = st.one_of(
    st.tuples(st.just("propose"), st.integers(0, 6), run),
    st.tuples(st.just("foreign"), st.integers(0, 12), run),
    st.tuples(st.just("garbage"), st.integers(0, 40), run),
    st.tuples(st.just("again"), st.integers(0, 99), st.just([0])),
    st.tuples(st.just("commit own"), st.integers(0, 5), run),
    st.tuples(st.just("commit"), st.just(0), run),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(event, max_size=40))
def test_the_chain_is_what_a_worker_said_about_this_very_prefix(history: list[tuple[str, int, list[int]]]) -> None:
    """Whatever arrives: each waiting token was proposed after exactly the tokens before it, and commits stand."""
    session = open_target()
    committed = list(PROMPT)
    claims: set[tuple[int, int]] = set()
    sent: list[Proposal] = []

    def offer(proposal: Proposal) -> None:
        claim = TokenPrefix()
        claim.hashes[0] = proposal.prefix_hash
        for proposed in proposal.tokens:
            claims.add((claim.hash, proposed))
            claim.append((proposed,))
        sent.append(proposal)
        session.offer(proposal)

    for kind, number, tokens in history:
        text = committed + chain(session)
        if kind == "propose":  # an honest worker, in agreement with some part of the chain
            start = max(0, len(text) - number)
            offer(propose(text, start, tokens))
        elif kind == "foreign":  # a worker that believes in another text
            offer(propose([3 - t for t in text] + [0] * 12, number, tokens))
        elif kind == "garbage":  # a hash of nothing
            offer(Proposal(1, number, 12345 + number, tuple(tokens)))
        elif kind == "again" and sent:  # late or doubled
            session.offer(sent[number % len(sent)])
        elif kind == "commit own":  # a verdict: a run is accepted, one token follows
            tokens = chain(session)[:number] + tokens[:1]
        if kind.startswith("commit"):
            session.commit(tokens)
            committed += tokens

        assert session.prefix.tokens == committed
        assert session.prefix.hashes == TokenPrefix(committed).hashes
        walk = TokenPrefix(committed)
        for proposed in chain(session):
            assert (walk.hash, proposed) in claims
            walk.append((proposed,))
        assert session.known == len(committed) + len(session.chain)
        assert session.pending == len(committed) - session.cached
        assert len(session.chain) <= MAX_RUN
        assert len(session._parked) <= MAX_PARKED


@settings(deadline=None, max_examples=100)
@given(st.lists(run, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_order_does_not_matter(runs: list[list[int]], chance: random.Random) -> None:
    """All proposals of a run of text, shuffled and doubled, make the chain that they make in order."""
    text, proposals = list(PROMPT), []
    for part in runs:
        proposals.append(propose(text, len(text), part))
        text += part
    session = open_target()
    shuffled = [*proposals, chance.choice(proposals)]
    chance.shuffle(shuffled)
    for proposal in shuffled:
        session.offer(proposal)
    assert chain(session) == text[len(PROMPT) :]


# -- both ends of a lossy channel --


def target_token(text: Sequence[int]) -> int:
    return hash((tuple(text[-3:]), len(text))) % 50


class Drafter:
    """A draft worker that is right about most tokens."""

    def __init__(self, tokens: Sequence[int], window: int, skill: float, chance: random.Random) -> None:
        self._window, self._skill, self._chance = window, skill, chance
        self.open(tokens)

    def open(self, tokens: Sequence[int]) -> None:
        self.session = DraftSession(
            OpenDraft(1, np.array(tokens, np.int32), SamplingParams(), (), self._window), 1 << 20
        )

    def draft(self) -> Proposal | None:
        """One token more, as the worker's turn does it."""
        session = self.session
        if not session.room:
            return None
        start = len(session.prefix)
        right = self._chance.random() < self._skill
        drafted = target_token(session.prefix.tokens) if right else self._chance.randrange(50)
        session.append(DraftToken(drafted, 1.0, NO_IDS, NO_PROBS))
        return session.proposal(start)


class Pair:
    """A target session and a draft session with a bad channel between them, and a reliable one back."""

    def __init__(self, chance: random.Random, window: int, skill: float, loss: float) -> None:
        self.chance, self.loss = chance, loss
        self.target = open_target()
        self.drafter = Drafter(PROMPT, window, skill, chance)
        self.channel: list[Proposal] = []
        self.n_accepted = 0

    def send(self, proposal: Proposal | None) -> None:
        if proposal is not None and self.chance.random() >= self.loss:
            self.channel.append(proposal)
            if self.chance.random() < self.loss:
                self.channel.append(proposal)

    def deliver(self) -> None:
        if self.channel:
            at = self.chance.randrange(len(self.channel)) if self.chance.random() < self.loss else 0
            self.target.offer(self.channel.pop(at))

    def step(self, most: int, lose_commit: bool = False) -> None:
        """The verifier's step, and the worker's answer to its commit."""
        target = self.target
        start, prefix_hash = len(target.prefix), target.prefix.hash
        text, tokens = list(target.prefix.tokens), []
        for proposed in target.proposals(most):
            if proposed.token != target_token(text + tokens):
                break
            tokens.append(proposed.token)
        self.n_accepted += len(tokens)
        tokens.append(target_token(text + tokens))
        target.commit(tokens)
        commit = Commit(1, start, prefix_hash, tuple(tokens), len(tokens) - 1, target.known)
        if lose_commit:
            return
        try:
            self.send(self.drafter.session.commit(commit))
        except LostCommit:
            self.drafter.open(target.prefix.tokens)


def plain(n: int) -> list[int]:
    text = list(PROMPT)
    while len(text) < n:
        text.append(target_token(text))
    return text


@pytest.mark.parametrize("window", [1, 2, 8, 64])
@pytest.mark.parametrize("loss", [0.0, 0.3, 0.9])
def test_text_and_speed_survive_a_bad_channel(window: int, loss: float) -> None:
    """The text is the target's own through any loss; when the losses end, so does their effect."""
    chance = random.Random(window * 10 + int(loss * 10))
    for _ in range(10):
        pair = Pair(chance, window, chance.choice((1.0, 0.8)), loss)
        for _ in range(200):
            action = chance.random()
            if action < 0.5:
                pair.send(pair.drafter.draft())
            elif action < 0.8:
                pair.deliver()
            else:
                pair.step(chance.randint(0, MAX_RUN), lose_commit=chance.random() < loss / 4)
            assert pair.target.prefix.tokens == plain(len(pair.target.prefix))
            assert len(pair.drafter.session.prefix) - pair.drafter.session.committed <= window
        pair.loss = 0.0
        pair.drafter._skill = 1.0
        pair.channel.clear()
        before = 0
        for step in range(2 * window + 8):
            while (proposal := pair.drafter.draft()) is not None:
                pair.send(proposal)
            while pair.channel:
                pair.deliver()
            if step == 2 * window + 7:
                before = pair.n_accepted
                assert len(pair.target.chain) == window
            pair.step(MAX_RUN if step == 2 * window + 7 else 1)
        assert pair.n_accepted - before == window
        assert pair.target.prefix.tokens == plain(len(pair.target.prefix))


def test_all_lost_proposals_are_sent_again() -> None:
    """When nothing has arrived, the second commit makes the worker repeat itself, from the commit's end on."""
    pair = Pair(random.Random(0), window=4, skill=1.0, loss=0.0)
    while pair.drafter.draft() is not None:
        pass
    pair.step(0)
    assert pair.channel == [], "they may still be on their way"
    while pair.drafter.draft() is not None:
        pass
    pair.step(0)
    pair.deliver()
    assert chain(pair.target) == plain(9)[5:8]
    assert pair.target.counters.n_stale == 0
