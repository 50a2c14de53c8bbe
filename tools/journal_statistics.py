"""What requests add up to, by configuration: speed, acceptance, by depth, over time, and what speculation gained.

A *configuration* is what computed: target and draft, each by model, quant and engine. Kept of a request is a row of a
few numbers. Definitions:

* acceptance: accepted / proposed tokens of a request, of those with proposals. tokens/s: its predicted_per_second,
  where that is more than 0. Both are what the scripts in the field take from the same lines.
* mode: the most frequent value after rounding to 1 % or 0.1 tokens/s, halves up; of several the smallest. std: that of
  a sample (n - 1). overall: of all tokens together, so that long generations count more.
* gain: mean tokens/s, over the mean of the same target's requests that had no draft; with the interval that holds the
  true ratio of means in 95 % of such samples (delta method; of independent requests, and enough of them).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from tools.journal import NO_MODEL, Done, Label

By = Literal["hour", "day", "worker"]
UNITS: Final[dict[str, By]] = {"hour": "hour", "day": "day", "worker": "worker"}
Float64 = npt.NDArray[np.float64]
Indexes = npt.NDArray[np.intp]

CLIENT_GONE: Final = 499
_QUARTER_S: Final = 900
"""Offsets of time zones are multiples of it."""
_Z95: Final = 1.959964


@dataclass(frozen=True, slots=True)
class Spread:
    """How values are distributed; see the module's docstring. std: None for a single value."""

    n: int
    mean: float
    median: float
    mode: float
    std: float | None
    min: float
    max: float


@dataclass(frozen=True, slots=True)
class Gain:
    """What the draft gained, over n plain requests. ratio: of means, low to high its interval (None: too few).

    plain_decode_s: how long the same tokens would have taken at the plain requests' overall speed.
    """

    n_plain: int
    ratio: float
    low: float | None
    high: float | None
    plain_decode_s: float


@dataclass(slots=True)
class Group:
    """The requests of one configuration, a row each. depths: [proposed, accepted] from depth 1 on."""

    target: Label
    draft: Label
    time: array[float] = field(default_factory=lambda: array("d"))
    proposed: array[int] = field(default_factory=lambda: array("Q"))
    accepted: array[int] = field(default_factory=lambda: array("Q"))
    tokens: array[int] = field(default_factory=lambda: array("Q"))
    decode_ms: array[float] = field(default_factory=lambda: array("d"))
    speed: array[float] = field(default_factory=lambda: array("d"))
    worker: array[int] = field(default_factory=lambda: array("L"))
    status: array[int] = field(default_factory=lambda: array("Q"))
    prompt_tokens: int = 0
    depths: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.time)

    def add(self, done: Done, worker: int) -> None:
        self.time.append(done.time)
        self.proposed.append(done.proposed)
        self.accepted.append(done.accepted)
        self.tokens.append(done.tokens)
        self.decode_ms.append(done.decode_ms)
        self.speed.append(done.speed)
        self.worker.append(worker)
        self.status.append(done.status)
        self.prompt_tokens += done.prompt
        while len(self.depths) < len(done.by_depth):
            self.depths.append([0, 0])
        for total, (proposed, accepted) in zip(self.depths, done.by_depth, strict=False):
            total[0] += proposed
            total[1] += accepted

    def acceptances(self) -> Float64:
        """Of the requests that had proposals: [n] float64, 0 to 1."""
        proposed = np.asarray(self.proposed, np.float64)
        return np.asarray(self.accepted, np.float64)[proposed > 0] / proposed[proposed > 0]

    def speeds(self) -> Float64:
        """Tokens/s of the requests that have some: [n] float64."""
        speed = np.asarray(self.speed, np.float64)
        return speed[speed > 0]

    def points(self) -> tuple[Float64, Float64]:
        """Acceptance and tokens/s of the requests that have both: [n] float64 each."""
        proposed, speed = np.asarray(self.proposed, np.float64), np.asarray(self.speed, np.float64)
        both = (proposed > 0) & (speed > 0)
        return np.asarray(self.accepted, np.float64)[both] / proposed[both], speed[both]


@dataclass(frozen=True, slots=True)
class Summary:
    """A configuration, or a part of its requests. gain: None without plain requests to compare with."""

    target: Label
    draft: Label
    n: int
    n_failed: int
    n_cancelled: int
    tokens: int
    decode_s: float
    proposed: int
    accepted: int
    acceptance: Spread | None
    speed: Spread | None
    by_depth: tuple[tuple[int, int], ...] = ()
    prompt_tokens: int = 0
    gain: Gain | None = None

    @property
    def acceptance_overall(self) -> float | None:
        return self.accepted / self.proposed if self.proposed else None

    @property
    def speed_overall(self) -> float | None:
        return self.tokens / self.decode_s if self.decode_s else None


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a configuration's requests: of an hour or a day, or of a worker, as `name` says."""

    name: str
    summary: Summary


@dataclass(slots=True)
class Requests:
    """All requests that were read, by configuration; lost: that ended without what would have computed them."""

    groups: dict[tuple[Label, Label], Group] = field(default_factory=dict)
    lost: Group = field(default_factory=lambda: Group(NO_MODEL, NO_MODEL))
    workers: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self._all()))

    def _all(self) -> list[Group]:
        return [self.lost, *self.groups.values()]

    def add(self, done: Done) -> None:
        if done.target == NO_MODEL and not done.tokens:
            self.lost.add(done, 0)
            return
        group = self.groups.get((done.target, done.draft))
        if group is None:
            group = self.groups[done.target, done.draft] = Group(done.target, done.draft)
        group.add(done, self.workers.setdefault(done.worker, len(self.workers)))

    def known(self) -> list[Group]:
        """The configurations, by target; of each first the plain one, then the most used."""
        return sorted(self.groups.values(), key=lambda g: (g.target, g.draft != NO_MODEL, -len(g), g.draft))

    def period(self) -> tuple[float, float] | None:
        """When the first and the last was done."""
        times = [t for group in self._all() for t in _extent(np.asarray(group.time, np.float64))]
        return (min(times), max(times)) if times else None


def collect(requests: Iterable[Done]) -> Requests:
    result = Requests()
    for done in requests:
        result.add(done)
    return result


def summaries(requests: Requests) -> list[Summary]:
    """A summary of every configuration, with gains."""
    groups = requests.known()
    plain = {group.target: group for group in groups if group.draft == NO_MODEL}
    return [summary(group, None, plain.get(group.target)) for group in groups]


def summary(group: Group, rows: Indexes | None = None, plain: Group | None = None) -> Summary:
    """Of all requests of a configuration, or of some rows of it."""
    part = group if rows is None else _selected(group, rows)
    status = np.asarray(part.status, np.int64)
    n_cancelled = int(np.count_nonzero(status == CLIENT_GONE))
    return Summary(
        group.target,
        group.draft,
        len(part),
        int(np.count_nonzero(status >= 400)) - n_cancelled,
        n_cancelled,
        sum(part.tokens),
        sum(part.decode_ms) / 1000,
        sum(part.proposed),
        sum(part.accepted),
        spread(part.acceptances(), _rounded_acceptances(part)),
        spread(part.speeds(), _rounded_speeds(part)),
        tuple((proposed, accepted) for proposed, accepted in part.depths),
        part.prompt_tokens,
        _gain(part, plain) if plain is not None and group.draft != NO_MODEL else None,
    )


def spread(values: Float64, rounded: Float64) -> Spread | None:
    """None without values. rounded: the same for the mode."""
    if not len(values):
        return None
    modes, counts = np.unique(rounded, return_counts=True)
    return Spread(
        len(values),
        float(values.mean()),
        float(np.median(values)),
        float(modes[counts.argmax()]),
        float(values.std(ddof=1)) if len(values) > 1 else None,
        float(values.min()),
        float(values.max()),
    )


def parts(requests: Requests, by: By, zone: tzinfo | None) -> list[Part]:
    """The requests of each configuration by hour, day or worker, in this order; what has no time is left out."""
    found: list[Part] = []
    names = list(requests.workers)
    for group in requests.known():
        for name, rows in _by_worker(group, names) if by == "worker" else _by_time(group, by, zone):
            found.append(Part(name, summary(group, rows)))
    return sorted(found, key=lambda part: part.name)


def usual_unit(requests: Requests) -> By:
    """Hours for up to two days, else days."""
    period = requests.period()
    return "hour" if period is None or period[1] - period[0] <= 2 * 86400 else "day"


def _by_worker(group: Group, names: Sequence[str]) -> Iterator[tuple[str, Indexes]]:
    worker = np.asarray(group.worker, np.int64)
    for number in np.unique(worker).tolist():
        yield names[number], np.flatnonzero(worker == number)


def _by_time(group: Group, by: By, zone: tzinfo | None) -> Iterator[tuple[str, Indexes]]:
    quarters = np.floor(np.asarray(group.time, np.float64) / _QUARTER_S)
    order = np.argsort(quarters, kind="stable")[: np.count_nonzero(np.isfinite(quarters))]  # NaN is last
    starts, at = np.unique(quarters[order], return_index=True)
    runs: dict[str, list[Indexes]] = {}
    for start, run in zip(starts.tolist(), np.split(order, at[1:]), strict=False):
        local = datetime.fromtimestamp(start * _QUARTER_S, zone)
        runs.setdefault(f"{local:%Y-%m-%d %H}:00" if by == "hour" else f"{local:%Y-%m-%d}", []).append(run)
    for name, members in runs.items():
        yield name, np.concatenate(members)


def _rounded_acceptances(group: Group) -> Float64:
    """To 1 %, halves up, exactly: by whole numbers."""
    proposed, accepted = np.asarray(group.proposed, np.int64), np.asarray(group.accepted, np.int64)
    some = proposed > 0
    return (200 * accepted[some] + proposed[some]) // (2 * proposed[some]) / 100


def _rounded_speeds(group: Group) -> Float64:
    """To 0.1, halves up; log lines have six decimals, so that a half is one there and not in binary."""
    rounded: Float64 = np.floor((np.rint(group.speeds() * 1e6) + 5e4) / 1e5) / 10
    return rounded


def _gain(group: Group, plain: Group) -> Gain | None:
    fast, slow = group.speeds(), plain.speeds()
    if not len(fast) or not len(slow) or not sum(plain.tokens):
        return None
    ratio, low, high = float(fast.mean() / slow.mean()), None, None
    if len(fast) > 1 and len(slow) > 1:
        relative = fast.var(ddof=1) / len(fast) / fast.mean() ** 2 + slow.var(ddof=1) / len(slow) / slow.mean() ** 2
        margin = _Z95 * ratio * math.sqrt(relative)
        low, high = ratio - margin, ratio + margin
    plain_s = sum(group.tokens) * sum(plain.decode_ms) / 1000 / sum(plain.tokens)
    return Gain(len(slow), ratio, low, high, plain_s)


def _selected(group: Group, rows: Indexes) -> Group:
    """Without depths and prompt tokens, which are not kept by request."""
    part = Group(group.target, group.draft)
    for name in _COLUMNS:
        column = getattr(group, name)
        setattr(part, name, array(column.typecode, np.asarray(column)[rows].tobytes()))
    return part


def _extent(times: Float64) -> tuple[float, ...]:
    finite = times[np.isfinite(times)]
    return (float(finite.min()), float(finite.max())) if len(finite) else ()


_COLUMNS: Final = ("time", "proposed", "accepted", "tokens", "decode_ms", "speed", "worker", "status")
