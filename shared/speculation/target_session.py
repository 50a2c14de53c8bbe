"""One session's state in the verifier: its committed tokens, and the proposals that continue them.

Pure bookkeeping. Invariant: `chain` continues `prefix`; a proposal enters it only when the hash of the prefix that it
was drafted for equals the session's own, so late, duplicated, reordered or foreign proposals change nothing but speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.engine.interface import Float32, Int32
from shared.errors import WireError
from shared.messages import MAX_Q, MAX_RUN, Limits, Proposal, Speculation, TargetStats
from shared.prefix import TokenPrefix, extend
from shared.sampling.acceptance import ProposalDistribution
from shared.sampling.params import SamplingParams
from shared.speculation.lengths import Arrivals, Calibration, Candidate

_MAX_PARKED = 16
_MAX_OFFERS = 4 * MAX_RUN
"""Proposals looked at between two commits: a worker with the widest window sends a token at a time, and all again."""
Distribution = tuple[Int32, Float32]
"""A draft's sparse distribution for one token: ids [k] int32, probabilities [k] float32."""


@dataclass(slots=True)
class Proposed:
    """A proposed token. q: what it was drawn from, under rejection sampling. confidence: how sure the draft
    is of it, None where it did not say."""

    token: int
    q: Distribution | None = None
    confidence: float | None = None


@dataclass(slots=True)
class Counters:
    """What one generation has cost so far; see `shared.messages.TargetStats`."""

    n_cached: int = 0
    rounds: int = 0
    n_proposed: int = 0
    n_accepted: int = 0
    by_depth: list[list[int]] = field(default_factory=list)
    n_stale: int = 0
    full_rows: int = 0
    queue_us: int = 0
    prefill_us: int = 0
    verify_us: int = 0
    sample_us: int = 0
    wire_us: int = 0


class TargetSession:
    """See the module's docstring.

    Args:
        speculation: the request's bounds; its n_max is the verifier's, where that is lower.
        opened_us: monotonic time of its arrival.
        calibration: what is known of other sessions' proposals.
    """

    def __init__(
        self,
        session: int,
        prompt: Int32,
        sampling: SamplingParams,
        limits: Limits,
        speculation: Speculation,
        opened_us: int,
        calibration: Calibration | None = None,
    ) -> None:
        self.id = session
        self.sampling = sampling
        self.limits = limits
        self.speculation = speculation
        self.prefix = TokenPrefix(prompt.tolist())
        self.n_prompt = len(prompt)
        self.chain: list[Proposed] = []
        self.counters = Counters()
        self.calibration = Calibration(calibration)
        self.arrivals = Arrivals()
        self.opened_us = opened_us
        self.first_commit_us = 0
        self.slot = -1
        self.cached = 0
        """How many positions of the slot's cache hold the prefix."""
        self._chain_hashes = [self.prefix.hash]
        self._parked: dict[int, Proposal] = {}
        self._n_offers = 0

    @property
    def known(self) -> int:
        """The position after the last proposal that waits here."""
        return len(self.prefix) + len(self.chain)

    @property
    def pending(self) -> int:
        """Committed tokens that the cache lacks; at least one, the last."""
        return len(self.prefix) - self.cached

    def offer(self, proposal: Proposal, at_us: int = 0) -> bool:
        """Take a proposal in, which arrived at `at_us`; False when it is stale: its prefix is not this session's."""
        known = self.known
        self._n_offers += 1
        if self._n_offers > _MAX_OFFERS or not self._offer(proposal):
            self.counters.n_stale += len(proposal.tokens)
            self.arrivals.stale(at_us / 1e6)
            return False
        self._unpark()
        if self.known > known:
            self.arrivals.arrive(at_us / 1e6, self.known - known)
        return True

    def candidate(self, now_us: int | None = None) -> Candidate:
        """What the length controller wants to know. now_us: for what is expected of the draft, None where that is not
        needed."""
        most, usable = self.most, self.usable
        return Candidate(
            self._reach(usable),
            next_s=None if now_us is None else self.arrivals.expected(now_us / 1e6),
            token_s=self.arrivals.token_s or 0.0,
            typical=self.calibration.typical(len(self.chain)),
            kept=self.arrivals.kept,
            room=most - len(self.chain) if usable == len(self.chain) else 0,
            least=self.speculation.n_min,
        )

    @property
    def most(self) -> int:
        """Proposals that may be verified at most; never one past the last token wanted."""
        generated = len(self.prefix) - self.n_prompt
        return max(0, min(self.speculation.n_max, self.limits.max_tokens - generated - 1))

    @property
    def usable(self) -> int:
        """Proposals that are there and may be verified: the request's p_min ends them."""
        most = min(self.most, len(self.chain))
        for depth, proposed in enumerate(self.chain[:most]):
            if proposed.confidence is not None and proposed.confidence < self.speculation.p_min:
                return depth
        return most

    def _reach(self, count: int) -> list[float]:
        """Of the first `count` proposals, the probability that each and all before it are accepted; in doubt more."""
        reach, shares = 1.0, []
        for depth, proposed in enumerate(self.chain[:count]):
            reach *= self.calibration.hopeful(depth, proposed.confidence)
            shares.append(reach)
        return shares

    def _unpark(self) -> None:
        """Take in what has waited for the proposals before it."""
        while self._parked and (parked := self._parked.pop(self.known, None)) is not None:
            self._offer(parked)

    def _offer(self, proposal: Proposal) -> bool:
        committed, start = len(self.prefix), proposal.start
        if start > committed + MAX_RUN:
            return False  # no window reaches so far
        if start > self.known:
            self._parked[start] = proposal
            if len(self._parked) > _MAX_PARKED:
                del self._parked[max(self._parked)]  # the one that will be reached last, if ever
            return True
        if start >= committed:
            if self._chain_hashes[start - committed] != proposal.prefix_hash:
                return False
            skip = 0
        else:
            if self.prefix.hashes[start] != proposal.prefix_hash:
                return False
            skip = committed - start
            if self.prefix.agreement(start, proposal.tokens) < skip:
                return False
        entries = self._entries(proposal)
        if entries is None:
            return False
        depth = start + skip - committed
        new = entries[skip:]
        same = 0
        for own, other in zip(self.chain[depth:], new, strict=False):
            if own.token != other.token:
                break
            own.confidence = other.confidence
            own.q = other.q  # the newest counts, equal or not: which q is used must not depend on what was drawn
            same += 1
        if same == len(new):
            return True
        del self.chain[depth + same :]
        del self._chain_hashes[depth + same + 1 :]
        for proposed in new[same : MAX_RUN - len(self.chain) + same]:
            self.chain.append(proposed)
            self._chain_hashes.append(extend(self._chain_hashes[-1], proposed.token))
        return True

    def _entries(self, proposal: Proposal) -> list[Proposed] | None:
        """The proposed tokens, under rejection sampling with what they were drawn from; None where that is garbage.

        Garbage must end here: the sampler would refuse the whole step for it.
        """
        counts = proposal.q_counts
        confidence = [c if 0.0 <= c <= 1.0 else None for c in proposal.confidence]
        if len(confidence) != len(proposal.tokens):
            confidence = [None] * len(proposal.tokens)
        if not counts or self.sampling.acceptance != "rejection" or self.sampling.greedy:
            return [Proposed(token, None, c) for token, c in zip(proposal.tokens, confidence, strict=True)]
        n_entries = sum(counts)
        if len(counts) != len(proposal.tokens) or not n_entries == len(proposal.q_ids) == len(proposal.q_probs):
            return None
        entries = []
        end = 0
        for token, count in zip(proposal.tokens, counts, strict=True):
            start, end = end, end + count
            if count > MAX_Q:
                return None
            distribution = ProposalDistribution(proposal.q_ids[start:end], proposal.q_probs[start:end])
            try:
                distribution.check(token)
            except WireError:
                return None
            # Without a confidence: that is the drawn token's probability, and whether a token is verified must not
            # depend on which one was drawn, or likely ones would be taken too often.
            entries.append(Proposed(token, (distribution.ids, distribution.probs)))
        return entries

    def proposals(self, count: int) -> list[Proposed]:
        """The first `count` proposals, or as many as there are."""
        return self.chain[:count]

    def commit(self, tokens: Sequence[int], at_us: int = 0) -> None:
        """Make tokens final; the proposals that they contradict are dropped, the others go on waiting."""
        self._n_offers = 0
        n_waiting, agreed = len(self.chain), 0
        for proposed, token in zip(self.chain, tokens, strict=False):
            if proposed.token != token:
                break
            agreed += 1
        self.prefix.append(tokens)
        if agreed == len(tokens):
            del self.chain[:agreed]
            del self._chain_hashes[:agreed]
        else:
            self.counters.n_stale += max(0, len(self.chain) - agreed)
            self.chain.clear()
            self._chain_hashes = [self.prefix.hash]
        self.arrivals.commit(at_us / 1e6, agreed < min(n_waiting, len(tokens)), len(self.chain))
        if self._parked:
            # The commit itself may be what one has waited for: the proposals before it were lost, the target made up.
            self._parked = {start: p for start, p in self._parked.items() if start >= len(self.prefix)}
            self._unpark()

    def count_round(self, n_proposed: int, n_accepted: int) -> None:
        """Of the first n_proposed proposals n_accepted were; before they become final."""
        for depth, proposed in enumerate(self.chain[: min(n_proposed, n_accepted + 1)]):
            self.calibration.observe(depth, proposed.confidence, depth < n_accepted)
        counters = self.counters
        counters.rounds += 1
        counters.n_proposed += n_proposed
        counters.n_accepted += n_accepted
        while len(counters.by_depth) < n_proposed:
            counters.by_depth.append([0, 0])
        for depth in range(n_proposed):
            counters.by_depth[depth][0] += 1
            counters.by_depth[depth][1] += depth < n_accepted

    def stats(self, now_us: int) -> TargetStats:
        c = self.counters
        decode_us = max(0, now_us - self.first_commit_us) if self.first_commit_us else 0
        return TargetStats(
            n_prompt=self.n_prompt,
            n_cached=c.n_cached,
            n_generated=len(self.prefix) - self.n_prompt,
            rounds=c.rounds,
            n_proposed=c.n_proposed,
            n_accepted=c.n_accepted,
            by_depth=tuple((p, a) for p, a in c.by_depth),
            n_stale=min(c.n_stale, 2**32 - 1),  # a flood may go on for hours; the message must stay one
            full_rows=c.full_rows,
            queue_us=c.queue_us,
            prefill_us=c.prefill_us,
            decode_us=decode_us,
            verify_us=c.verify_us,
            sample_us=c.sample_us,
            wire_us=c.wire_us,
            wait_us=max(0, decode_us - c.verify_us - c.sample_us - c.wire_us),
            session=self.id,
        )
