"""An engine that computes with another one and takes the time of a hardware profile: the pipeline as on other machines.

Tokens and logits are the inner engine's own. Every forward pass ends no sooner than the profile's machine would end it;
where the inner engine itself takes longer, that is counted and said, since figures are then not the profile's.

The cost of a pass. Each token of a pass costs about the same, wanted row or not, but a machine has two ways of
computing: few tokens at a time, when each brings its own experts to be read, and whole prompts, when all experts are
read anyway. Which of the two a token belongs to is taken from its row: whoever decodes or verifies wants one for every
token, a prompt wants none but its last. So, for R rows and P tokens whose row is not wanted:

    R >= 1: first_row_ms + (R - 1) * further_row_ms + P / prefill_per_second
    R == 0: P / prefill_per_second, but at least first_row_ms: most of the weights are read whatever is asked

The context's length, and batches of prompts too small for the prefill speed, are not modelled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import structlog

from shared.engine.interface import Chunk, Engine, EngineInfo, EngineSettings, Int32, Logits, Pace, PrefixCache
from shared.errors import SettingsError

WARN_EVERY_S = 60.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Profile:
    """A machine and its pair of models, as somebody has measured them: the pace of each."""

    target: Pace
    draft: Pace


# Both pairs were measured by users of ik_llama.cpp at home: the target's experts in RAM, the draft on a GPU.
#
# Target: the time of a plainly decoded token; a pass of n tokens was seen to cost 1 + 0.39 (n - 1) of it. These are
# whole steps of that program, its sampling included, so that this pipeline's own exchange comes on top of them.
# Draft: 10 and 8 ms a token; drafts were seen to decode at 80 to 120 tokens/s. What further rows cost (tokens of other
# sessions) is in no user's log: half of the first is what ik took on an H200 for up to 8 rows of Qwen3-30B-A3B with
# 2-bit experts (0.47 and 0.54).
# Prefill: 269 tokens/s of the target alone, in one log, which does not say of which pair; 182 with draft and target one
# after the other. The draft's is what explains the difference: 1 / (1 / 182 - 1 / 269) = 563.
PROFILES = {
    "ling-1t": Profile(Pace(160.0, 62.4, 269.0), Pace(10.0, 5.0, 563.0)),
    "qwen3-coder-480b": Profile(Pace(151.0, 58.89, 269.0), Pace(8.0, 4.0, 563.0)),
}
"""ling-1t: Ling-1T smol-IQ4_KSS with Ling-flash-2.0 IQ1_KT. qwen3-coder-480b: Qwen3-Coder-480B-A35B at 5.15 bits a
weight with Qwen3-Coder-30B-A3B IQ1_KT."""


def pass_seconds(pace: Pace, n_rows: int, n_rowless: int) -> float:
    """What a pass of so many rows, and of tokens whose rows are not wanted, takes: see the module's docstring."""
    prefill = n_rowless / pace.prefill_per_second
    if n_rows == 0:
        return max(pace.first_row_ms / 1e3, prefill)
    return (pace.first_row_ms + (n_rows - 1) * pace.further_row_ms) / 1e3 + prefill


def find_pace(settings: EngineSettings) -> Pace:
    """The pace that the settings ask for: the profile's part for their role, with the numbers given in its place.

    Raises:
        SettingsError: there is no such profile, a number is not above 0, or one is missing.
    """
    given = {field.name: getattr(settings.pace, field.name) for field in fields(Pace)}
    for name, value in given.items():
        if not 0 <= value < float("inf"):
            raise SettingsError(f"pace.{name} is {value:g}", "it must be a number above 0")
    wanted = {name: value for name, value in given.items() if value}
    if settings.profile:
        profile = PROFILES.get(settings.profile)
        if profile is None:
            raise SettingsError(
                f"there is no profile {settings.profile!r}",
                f"one of {', '.join(PROFILES)}, or none and a pace of your own",
                "unknown_profile",
            )
        return replace(profile.draft if settings.role == "draft" else profile.target, **wanted)
    missing = [f"pace.{name}" for name in given if name not in wanted]
    if missing:
        raise SettingsError(
            f"the emulated engine has no profile and no {', '.join(missing)}",
            f"set profile to one of {', '.join(PROFILES)}, or all numbers of pace above 0",
        )
    return settings.pace


class EmulatedEngine:
    """See the module's docstring. It proposes nothing itself, even where the inner engine could: the machines of the
    profiles choose a token after each pass, and send it on then and not with those after it.

    Args:
        inner: computes; closed with this engine.
        clock, sleep: in seconds; for tests.
    """

    def __init__(
        self,
        inner: Engine,
        pace: Pace,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._inner = inner
        self._pace = pace
        self._clock = clock
        self._sleep = sleep
        self._info = replace(inner.info, engine=f"emulated ({inner.info.engine})")
        self._warned: float | None = None
        self.passes = 0
        self.overruns = 0
        """Passes that took the inner engine longer than the profile's machine."""
        self.overrun_s = 0.0
        """By how much, all of them together."""

    @property
    def info(self) -> EngineInfo:
        return self._info

    def forward(self, chunks: Sequence[Chunk]) -> Logits:
        started = self._clock()
        logits = self._inner.forward(chunks)
        if logits.n_rows:
            logits.top(1)  # an engine on a device returns before it has computed, and waits when it is read
        n_rows = sum(chunk.rows for chunk in chunks)
        n_tokens = sum(len(chunk.tokens) for chunk in chunks)
        self._wait(started, pass_seconds(self._pace, n_rows, n_tokens - n_rows))
        return logits

    def _wait(self, started: float, seconds: float) -> None:
        """Sleep until `seconds` after `started`, or note that it is too late."""
        self.passes += 1
        now = self._clock()
        if (excess := now - started - seconds) > 0:
            self.overruns += 1
            self.overrun_s += excess
            if self._warned is None or now - self._warned >= WARN_EVERY_S:
                self._warned = now
                _log.warning(
                    "slower_than_emulated",
                    engine=self._inner.info.engine,
                    took_ms=round((now - started) * 1e3, 3),
                    profile_ms=round(seconds * 1e3, 3),
                    **self._counts(),
                    remedy="figures are not those of the profile: a smaller model, more threads or less load",
                )
            return
        while (left := started + seconds - self._clock()) > 0:
            self._sleep(left)

    def _counts(self) -> dict[str, float]:
        return {"passes": self.passes, "overruns": self.overruns, "overrun_ms": round(self.overrun_s * 1e3, 3)}

    def length(self, slot: int) -> int:
        return self._inner.length(slot)

    def truncate(self, slot: int, length: int) -> None:
        self._inner.truncate(slot, length)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self._inner.copy_prefix(source, target, length)

    def close(self) -> None:
        _log.info("emulation_ended", engine=self._inner.info.engine, **self._counts())
        self._inner.close()


class EmulatedPrefixCacheEngine(EmulatedEngine):
    """An emulated engine whose inner one remembers prefixes: what is reused is not computed and costs nothing."""

    def __init__(self, inner: Engine, remembering: PrefixCache, pace: Pace) -> None:
        super().__init__(inner, pace)
        self._remembering = remembering

    def reuse_prefix(self, slot: int, tokens: Int32) -> int:
        return self._remembering.reuse_prefix(slot, tokens)


def emulate(inner: Engine, pace: Pace) -> EmulatedEngine:
    """An engine that computes what `inner` does, at a pace."""
    _log.info(
        "emulating", engine=inner.info.engine, **{field.name: getattr(pace, field.name) for field in fields(pace)}
    )
    # Callers ask whether an engine is a PrefixCache by its methods, so one that is not must not have them.
    return (
        EmulatedPrefixCacheEngine(inner, inner, pace) if isinstance(inner, PrefixCache) else EmulatedEngine(inner, pace)
    )
