"""What a draft would have proposed along texts that the target has written: the ground for comparing policies.

With the target's text given, what the draft proposes at a position depends on the prefix alone, so a trace holds all
that a policy could have met: at each position the draft's token, right or wrong, and where it was wrong what the draft
would have gone on with, which is what lies in the verifier's hands until the target contradicts it. `tools.simulation`
plays policies on it. Nothing is paced: a trace says what, not when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.engine.interface import Chunk, Engine, Float32
from shared.sampling.drafting import draft
from shared.sampling.params import SamplingParams

AHEAD = 32
"""Proposals recorded after a wrong one: the window in which a draft may run ahead."""


@dataclass(frozen=True, slots=True)
class Proposed:
    """The draft's token at one position of a text. hit: it is the text's.

    lost: confidences of what it goes on with after its own wrong token; empty after a right one.
    """

    confidence: float
    hit: bool
    lost: tuple[float, ...] = ()


Trace = tuple[Proposed, ...]
"""One text: a `Proposed` for each generated position, in order."""


def record(engine: Engine, sampling: SamplingParams, prompt: Sequence[int], text: Sequence[int]) -> Trace:
    """Let the draft propose at each position of `text`, which continues `prompt`.

    Args:
        engine: the draft's, not paced; its slot 0 is used, and left empty.
        sampling: of the request; under coupled sampling the draft shares its noise with the target.
    """
    tokens = [*prompt, *text]
    rows = rows_along(engine, prompt, text)
    proposed = []
    for i, token in enumerate(text):
        drafted = draft(sampling, rows[i], tokens[: len(prompt) + i], len(prompt) + i)
        proposed.append((drafted.token, drafted.confidence, drafted.token == token))
    trace = [Proposed(confidence, hit) for _, confidence, hit in proposed]
    # From the last one on, so that the cache below a position still holds the text.
    for i in reversed(range(len(text))):
        token, confidence, hit = proposed[i]
        if not hit:
            at = len(prompt) + i
            trace[i] = Proposed(confidence, hit, _go_on(engine, sampling, [*tokens[:at], token]))
    engine.truncate(0, 0)
    return tuple(trace)


def rows_along(engine: Engine, prompt: Sequence[int], text: Sequence[int]) -> list[Float32]:
    """Logits [n_vocab] for each position of `text`, given the prompt and the text before it; by the engine's slot 0."""
    tokens = [*prompt, *text]
    rows: list[Float32] = []
    engine.truncate(0, 0)
    at, end = 0, len(tokens) - 1
    while at < end:
        chunk = np.array(tokens[at : min(end, at + engine.info.n_batch)], np.int32)
        wanted = max(0, min(len(chunk), at + len(chunk) - len(prompt) + 1))
        logits = engine.forward([Chunk(0, at, chunk, wanted)])
        rows += [logits.dense(row).copy() for row in range(wanted)]
        at += len(chunk)
    return rows


def _go_on(engine: Engine, sampling: SamplingParams, tokens: list[int]) -> tuple[float, ...]:
    """Confidences of what the draft proposes after `tokens`, of which the cache holds all but the last."""
    confidences: list[float] = []
    engine.truncate(0, len(tokens) - 1)
    while len(confidences) < AHEAD and len(tokens) < engine.info.n_ctx:
        logits = engine.forward([Chunk(0, len(tokens) - 1, np.array(tokens[-1:], np.int32), 1)])
        drafted = draft(sampling, logits.dense(0), tokens, len(tokens))
        confidences.append(drafted.confidence)
        tokens.append(drafted.token)
    return tuple(confidences)
