"""How a request wants its tokens chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from shared.fields import Range

Acceptance = Literal["coupled", "rejection"]

MAX_PENALTY_WINDOW = 4096
MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters with llama-server's names, meanings and defaults.

    Order, as in llama.cpp: logit_bias, penalties, top_k, top_p, min_p, temperature.

    temperature: 0 is greedy: the largest logit after bias and penalties, ties to the lower id.
    top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.
    repeat_penalty: divides positive and multiplies negative logits of tokens in the window; 1 is off.
    presence_penalty, frequency_penalty: subtracted once, and once per occurrence, in the window; 0 is off.
    repeat_last_n: size of the penalty window in tokens, prompt included; 0 is off.
    logit_bias: (token id, added logit) pairs with distinct ids; -inf bans a token.
    seed: with the position and the token id, all that the noise depends on.
    acceptance: "coupled" (same text for any drafter) or "rejection" (Leviathan/Chen).
    """

    temperature: Annotated[float, Range(0.0, 100.0)] = 0.8
    top_k: Annotated[int, Range(0, 2**31 - 1)] = 40
    top_p: Annotated[float, Range(0.0, 1.0)] = 0.95
    min_p: Annotated[float, Range(0.0, 1.0)] = 0.05
    repeat_penalty: Annotated[float, Range(0.01, 100.0)] = 1.0
    presence_penalty: Annotated[float, Range(-100.0, 100.0)] = 0.0
    frequency_penalty: Annotated[float, Range(-100.0, 100.0)] = 0.0
    repeat_last_n: Annotated[int, Range(0, MAX_PENALTY_WINDOW)] = 64
    logit_bias: Annotated[tuple[tuple[int, float], ...], Range(0, MAX_LOGIT_BIAS)] = ()
    seed: Annotated[int, Range(0, 2**64 - 1)] = 0
    acceptance: Acceptance = "coupled"

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """Whether tokens in the window change logits."""
        return self.repeat_last_n > 0 and (
            self.repeat_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        )
