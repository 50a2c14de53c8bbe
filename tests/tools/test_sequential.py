"""Drafting and verifying in turn: the same text as the target alone, and the passes that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from shared.engine.interface import Chunk, Engine, EngineSettings, Logits
from shared.engine.null import NullEngine, next_token
from shared.engine.registry import load_engine
from shared.model.names import load_prompts, resolve_model
from shared.model.vocabulary import Vocabulary
from shared.sampling.params import SamplingParams
from tools.fleet import Gateway, find_gateway
from tools.sequential import SequentialCompletion, SequentialDecoder
from tools.temporary import temporary_fleet

N_TOKENS = 24
NULL = EngineSettings(engine="null", n_ctx=256, n_slots=1, n_batch=64)
GREEDY = SamplingParams(temperature=0.0)


class Recorder:
    """An engine that notes its passes as (start, number of tokens, rows)."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner
        self.info = inner.info
        self.passes: list[tuple[int, int, int]] = []

    def forward(self, chunks: Sequence[Chunk]) -> Logits:
        [chunk] = chunks
        self.passes.append((chunk.start, len(chunk.tokens), chunk.rows))
        return self._inner.forward(chunks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def null_text(prompt: Sequence[int], n: int) -> tuple[int, ...]:
    """What the null engine writes greedily."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens[-1], len(tokens) - 1, NullEngine(NULL).info.n_vocab))
    return tuple(tokens[len(prompt) :])


PROMPT = list(range(20, 30))


def decode(n_max: int, p_min: float, max_tokens: int = 9) -> tuple[SequentialCompletion, Recorder, Recorder]:
    target, draft = Recorder(NullEngine(NULL)), Recorder(NullEngine(NULL))
    done = SequentialDecoder(target, draft, n_max, p_min).complete(PROMPT, GREEDY, max_tokens)
    return done, target, draft


def test_a_draft_that_agrees_is_accepted_and_its_last_token_computed_later() -> None:
    """After a fully accepted run the draft computes its own last proposal first, beside the bonus token."""
    done, target, draft = decode(n_max=3, p_min=0.0)
    assert done.tokens == null_text(PROMPT, 9)
    assert done.by_depth == ((2, 2), (2, 2), (2, 2))
    assert (done.rounds, done.n_drafted) == (2, 6)
    assert [n for _, n in done.times_s] == [1, 4, 4]
    assert target.passes == [(0, 10, 1), (10, 4, 4), (14, 4, 4)]
    assert draft.passes == [(0, 10, 1), (10, 1, 1), (11, 1, 1), (12, 1, 1), (13, 2, 1), (15, 1, 1), (16, 1, 1)]


def test_no_token_beyond_the_last_is_drafted() -> None:
    """A round drafts no more than can be committed before its own last token."""
    done, target, _ = decode(n_max=16, p_min=0.0, max_tokens=4)
    assert done.tokens == null_text(PROMPT, 4)
    assert target.passes == [(0, 10, 1), (10, 3, 3)]


def test_a_proposal_under_p_min_is_not_verified() -> None:
    """The draft is asked once a round, finds its token too improbable, and the target decodes plainly."""
    done, target, draft = decode(n_max=16, p_min=1.5, max_tokens=4)  # more than any probability
    assert done.tokens == null_text(PROMPT, 4)
    assert done.by_depth == ()
    assert done.n_drafted == 2  # none for the last token, which needs no proposal
    assert target.passes == [(0, 10, 1), (10, 1, 1), (11, 1, 1), (12, 1, 1)]
    assert draft.passes == [(0, 10, 1), (10, 1, 1), (11, 1, 1)]


def test_a_long_prompt_is_cut_into_batches() -> None:
    """Both engines get the prompt in passes that they accept."""
    target, draft = Recorder(NullEngine(NULL)), Recorder(NullEngine(NULL))
    prompt = list(range(20, 170))
    done = SequentialDecoder(target, draft, 4, 0.0).complete(prompt, GREEDY, 1)
    assert done.tokens == null_text(prompt, 1)
    assert target.passes == draft.passes == [(0, 64, 0), (64, 64, 0), (128, 22, 1)]


def test_a_stop_token_ends_the_text() -> None:
    """What was accepted after a stop token is dropped, and nothing follows."""
    expected = null_text(PROMPT, 6)
    target, draft = NullEngine(NULL), NullEngine(NULL)
    done = SequentialDecoder(target, draft, 16, 0.0).complete(PROMPT, GREEDY, 40, stop_tokens=(expected[-1],))
    assert done.tokens == expected


# --- the pipeline's own text ------------------------------------------------------------------------------------------

SETTINGS = ("verifier.engine.engine=numpy", "verifier.engine.n_slots=1", "verifier.engine.n_ctx=256", "draft={}")
SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(temperature=0.7, top_p=0.95, seed=11),
    "unfiltered": SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=12),
    "penalized": SamplingParams(temperature=0.8, repeat_penalty=1.2, seed=13),
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    vocabulary = Vocabulary.open(resolve_model("embedded:target"))
    return [vocabulary.encode(p.text[:160], parse_special=True).tolist() for p in load_prompts()[:2]]


@pytest.fixture(scope="module")
def plain(prompts: list[list[int]]) -> dict[tuple[str, int], tuple[int, ...]]:
    """What the pipeline writes without a draft."""
    texts = {}
    with temporary_fleet(None, SETTINGS) as settings:
        gateway = Gateway(find_gateway(settings), 120)
        for name, sampling in SAMPLINGS.items():
            for index, prompt in enumerate(prompts):
                body = {"prompt": prompt, "n_predict": N_TOKENS, "stream": True, "seed": sampling.seed}
                body |= {key: getattr(sampling, key) for key in ("temperature", "top_k", "top_p", "min_p")}
                body["repeat_penalty"] = sampling.repeat_penalty
                texts[name, index] = tuple(t for event in gateway.stream("/completion", body) for t in event["tokens"])
    return texts


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Engine, Engine]]:
    """The embedded target with rows that do not depend on the batch, and its draft."""
    settings = EngineSettings(engine="numpy", n_ctx=256, n_slots=1)
    target = load_engine(settings)
    draft = load_engine(EngineSettings(model="embedded:draft", n_ctx=256, n_slots=1, role="draft"))
    yield target, draft
    draft.close()
    target.close()


@pytest.mark.pipeline
@pytest.mark.parametrize(("p_min", "greedy_drafts"), [(0.0, False), (0.75, False), (0.5, True)])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_text_is_the_pipelines(
    pair: tuple[Engine, Engine],
    prompts: list[list[int]],
    plain: dict[tuple[str, int], tuple[int, ...]],
    name: str,
    p_min: float,
    greedy_drafts: bool,
) -> None:
    """Greedy or sampled, with filters or penalties, long runs or cautious ones: the target's own text, to the token."""
    n_accepted = 0
    for index, prompt in enumerate(prompts):
        done = SequentialDecoder(*pair, 8, p_min, greedy_drafts).complete(prompt, SAMPLINGS[name], N_TOKENS, (0, 2))
        assert done.tokens == plain[name, index]
        n_accepted += sum(accepted for _, accepted in done.by_depth)
    assert n_accepted > 0


@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_the_draft_proposes_as_a_fresh_one_would(
    prompts: list[list[int]], pair: tuple[Engine, Engine], name: str
) -> None:
    """What is proposed, its most probable tokens, depends on the text, not on what the cache has been through.

    A cache that lacked a token, or kept a refused one, would cost proposals without any other sign.
    """
    decoder = SequentialDecoder(*pair, 4, 0.0, greedy_drafts=True)
    done = decoder.complete(prompts[0], SAMPLINGS[name], N_TOKENS, (0, 2))
    text = [*prompts[0], *done.tokens]
    verified, accepted = [0] * 4, [0] * 4
    position = len(prompts[0]) + 1
    while position < len(text):
        sequence = text[:position]
        for depth in range(min(4, len(prompts[0]) + N_TOKENS - position - 1)):
            chunk = Chunk(0, 0, np.array(sequence, np.int32), 1)
            sequence.append(int(pair[1].forward([chunk]).top(1)[0][0, 0]))
            verified[depth] += 1
            accepted[depth] += sequence == text[: len(sequence)]
        position += 1 + next(
            (i for i, t in enumerate(sequence[position:]) if t != text[position + i]), len(sequence) - position
        )
    assert done.by_depth == tuple(zip(verified, accepted, strict=True))
    assert 0 < sum(accepted) < sum(verified)
