"""Traces of what a draft would have proposed, against drafting anew for each prefix."""

from __future__ import annotations

import numpy as np
import pytest

from shared.engine.interface import Chunk, Engine, EngineSettings
from shared.engine.registry import load_engine
from shared.sampling.drafting import draft
from shared.sampling.params import SamplingParams
from tools.draft_trace import AHEAD, record, rows_along

PROMPT = [0, 211, 1043, 77, 912, 5, 300]
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, top_k=0, top_p=0.95, min_p=0.0, seed=7)


@pytest.fixture(scope="module")
def engine() -> Engine:
    settings = EngineSettings(engine="numpy", model="embedded:draft", n_ctx=256, n_slots=1, n_batch=5, threads=1)
    return load_engine(settings)


def fresh(engine: Engine, params: SamplingParams, tokens: list[int]) -> tuple[int, float]:
    """What the draft proposes after these tokens, all of them computed anew."""
    engine.truncate(0, 0)
    for at in range(0, len(tokens), 5):
        chunk = np.array(tokens[at : at + 5], np.int32)
        logits = engine.forward([Chunk(0, at, chunk, int(at + 5 >= len(tokens)))])
    drafted = draft(params, logits.dense(0).copy(), tokens, len(tokens))
    return drafted.token, drafted.confidence


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_each_position_is_what_the_draft_says_there(engine: Engine, params: SamplingParams) -> None:
    """Right or wrong, how sure, and after a wrong token what follows it; in a text that is its own in part."""
    text: list[int] = []
    for i in range(9):
        token, _ = fresh(engine, params, [*PROMPT, *text])
        text.append(token if i not in (3, 4, 7) else (token + 1) % 8192)
    trace = record(engine, params, PROMPT, text)
    assert [proposed.hit for proposed in trace] == [i not in (3, 4, 7) for i in range(9)]
    for i, proposed in enumerate(trace):
        token, confidence = fresh(engine, params, [*PROMPT, *text[:i]])
        assert proposed.confidence == pytest.approx(confidence, rel=1e-5)
        assert proposed.hit == (token == text[i])
        assert len(proposed.lost) == (0 if proposed.hit else AHEAD)
        own = [*PROMPT, *text[:i], token]
        for lost in proposed.lost[:3]:
            token, confidence = fresh(engine, params, own)
            assert lost == pytest.approx(confidence, rel=1e-5)
            own.append(token)


def test_rows_along_are_those_of_each_prefix(engine: Engine) -> None:
    """Whatever the size of a batch is, there is a row for each position of the text."""
    text = [9, 8, 7, 6, 5, 4]
    rows = rows_along(engine, PROMPT, text)
    assert len(rows) == len(text)
    for i, row in enumerate(rows):
        assert int(row.argmax()) == fresh(engine, GREEDY, [*PROMPT, *text[:i]])[0]
