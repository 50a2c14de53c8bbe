"""`draftwire bench speculation`: policies against each other and against plain decoding, in one run.

Each policy has a fleet of its own (what one learns must not help another), and sequential drafting its engines; only
one of them is busy at a time. They take turns prompt by prompt, so that a machine that slows down does so for all.
Draft workers reach their router through a link of `tools/lan.py`, which delays and counts.

Invariant: whatever happens, no process and no directory is left, and what was measured until then is returned.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shared.engine.emulated import EmulatedEngine
from shared.engine.registry import load_engine
from shared.model.names import load_prompts, resolve_model
from shared.model.vocabulary import Vocabulary
from shared.sampling.params import SamplingParams
from shared.settings import Settings
from tools.bench_speculation_figures import Overruns, Record
from tools.bench_speculation_scenes import (
    Event,
    Policy,
    Prompts,
    Scene,
    drafting_model,
    fleet_overrides,
    scene_settings,
)
from tools.fleet import Gateway, find_gateway, joined_workers
from tools.lan import Conditions, Lan, Link
from tools.sequential import SequentialDecoder
from tools.temporary import temporary_fleet

_SILENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """tokens: of each completion, at most. repeats: of every prompt, each with another seed. seed: of the first.
    time_scale: what paces and round trips are multiplied by. warm_up_tokens: that every policy completes beforehand.
    """

    prompts: Prompts
    tokens: int = 64
    repeats: int = 1
    seed: int = 0
    time_scale: float = 1.0
    warm_up_tokens: int = 16
    config: Path | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SceneResult:
    """What came out of a scene. target, row_invariant: as the verifier says. interrupted: not all was measured.
    settings: of the fleets, but for what a policy changes.
    """

    scene: Scene
    time_scale: float
    n_prompts: int
    tokens: int
    repeats: int
    target: str
    row_invariant: bool
    records: tuple[Record, ...]
    overruns: tuple[Overruns, ...]
    interrupted: bool
    settings: Settings


@dataclass(frozen=True, slots=True)
class _Job:
    """One completion to make. prompt, repeat: their numbers."""

    prompt: int
    repeat: int
    tokens: Sequence[int]
    max_tokens: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class _Timed:
    """A completion's record, and when its first and last token were there, on the monotonic clock."""

    record: Record
    first_s: float
    last_s: float


class _Contestant(Protocol):
    """What runs one policy."""

    policy: Policy

    def complete(self, job: _Job) -> _Timed: ...

    def happens(self, event: Event) -> None:
        """Something changes on the network."""

    def wire_bytes(self) -> int | None:
        """What its links have carried since they exist."""


def run_scenes(scenes: Sequence[Scene], options: BenchOptions, console: Console) -> Iterator[SceneResult]:
    """Measure one scene after the other, each given as soon as it has ended; ends early, with what there is, on Ctrl-C.

    Raises:
        SettingsError: something about any of them cannot be; before the first one begins.
        DraftwireError: a fleet does not start, or fails.
    """
    for scene in scenes:
        _check(scene, options)
    for scene in scenes:
        result = _run_scene(scene, options, console)
        yield result
        if result.interrupted:
            return


def _check(scene: Scene, options: BenchOptions) -> None:
    settings = scene_settings(scene, options.time_scale, options.config, options.overrides)
    for policy in scene.parsed:
        if policy.kind == "sequential":
            drafting_model(settings, policy.worker)
    options.prompts.choose(scene)


def _run_scene(scene: Scene, options: BenchOptions, console: Console) -> SceneResult:
    settings = scene_settings(scene, options.time_scale, options.config, options.overrides)
    texts = options.prompts.choose(scene)
    records: list[Record] = []
    overruns: list[Overruns] = []
    target = ("", False)
    interrupted = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with ExitStack() as stack:
            progress = stack.enter_context(Progress(*columns, TimeRemainingColumn(), console=console, transient=True))
            task = progress.add_task(scene.name, total=len(texts) * options.repeats * len(scene.parsed))
            stopping = threading.Event()
            lan = stack.enter_context(Lan())
            contestants: list[_Contestant] = []
            for policy in scene.parsed:
                progress.update(task, description=f"{scene.name}: starting {policy.name}")
                if policy.kind == "sequential":
                    contestants.append(stack.enter_context(_engines(scene, policy, settings, overruns)))
                else:
                    running = _fleet(scene, policy, settings, options, lan, stopping, overruns)
                    contestants.append(stack.enter_context(running))
            plain = contestants[0]
            assert isinstance(plain, _Fleet)
            target = plain.target
            tokens = plain.encode(load_prompts()[-1].text)
            warm_up = _Job(0, 0, tokens, options.warm_up_tokens, scene.sampling(options.seed))
            for contestant in contestants:
                progress.update(task, description=f"{scene.name}: warming up {contestant.policy.name}")
                contestant.complete(warm_up)
            progress.update(task, description=scene.name)
            jobs = _jobs(scene, options, [plain.encode(text) for text in texts])
            starts = range(0, len(jobs), scene.concurrency)
            for turn, start in enumerate(starts):
                group = jobs[start : start + scene.concurrency]
                for contestant in contestants:
                    for event in scene.events_at(turn, len(starts)):
                        contestant.happens(event)
                    records += _take_turn(contestant, group, turn, stopping)
                    progress.advance(task, len(group))
    except KeyboardInterrupt:
        interrupted = True
    return SceneResult(
        scene,
        options.time_scale,
        len(texts),
        options.tokens,
        options.repeats,
        *target,
        tuple(records),
        tuple(overruns),
        interrupted,
        settings,
    )


def _jobs(scene: Scene, options: BenchOptions, prompts: Sequence[Sequence[int]]) -> list[_Job]:
    """All completions, in the order of turns; whole turns of different prompts."""
    return [
        _Job(
            number,
            repeat,
            prompt,
            options.tokens,
            scene.sampling(options.seed + repeat * len(prompts) + number),
        )
        for repeat in range(options.repeats)
        for number, prompt in enumerate(prompts)
    ]


def _take_turn(contestant: _Contestant, group: Sequence[_Job], turn: int, stopping: threading.Event) -> list[Record]:
    """A policy's completions of a group of prompts, all at the same time."""
    before = contestant.wire_bytes()
    done = _at_once(contestant.complete, group, stopping)
    after = contestant.wire_bytes()
    busy = max(timed.last_s for timed in done) - min(timed.first_s for timed in done)
    n_tokens = sum(len(timed.record.tokens) for timed in done)
    n_bytes = None if before is None or after is None else after - before
    return [
        replace(timed.record, turn=turn, turn_busy_s=busy, turn_tokens=n_tokens, turn_wire_bytes=n_bytes)
        for timed in done
    ]


def _at_once(complete: Callable[[_Job], _Timed], group: Sequence[_Job], stopping: threading.Event) -> list[_Timed]:
    if len(group) == 1:
        return [complete(group[0])]
    with ThreadPoolExecutor(len(group)) as pool:
        try:
            return list(pool.map(complete, group))
        except BaseException:
            stopping.set()  # or the others would be waited for
            raise


# --- a policy of the pipeline -----------------------------------------------------------------------------------------


class _Fleet:
    """A fleet. links: of its draft workers. stopping: set when completions under way are to be given up."""

    def __init__(
        self,
        scene: Scene,
        policy: Policy,
        settings: Settings,
        links: Mapping[str, Link],
        time_scale: float,
        stopping: threading.Event,
    ) -> None:
        self.policy = policy
        self._scene = scene
        self._links = links
        self._time_scale = time_scale
        status = joined_workers(settings)
        verifier = next(peer for peer in status.peers if peer.role == "verifier")
        self.target = verifier.engine, verifier.row_invariant
        self._gateway = Gateway(find_gateway(settings), _SILENCE_S)
        self._stopping = stopping

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens, as the gateway itself would have them."""
        tokens: list[int] = self._gateway.post("/tokenize", {"content": text, "add_special": True})["tokens"]
        return tokens

    def happens(self, event: Event) -> None:
        link = self._links.get(event.worker)
        if link is None:  # plain decoding has no workers
            return
        if event.rtt_ms is None:
            link.cut()
        else:
            link.conditions = _conditions(event.rtt_ms, self._time_scale)
            link.restore()

    def wire_bytes(self) -> int | None:
        return sum(link.n_bytes for link in self._links.values()) if self._links else None

    def complete(self, job: _Job) -> _Timed:
        sampling = replace(job.sampling, acceptance="rejection" if self.policy.rejection else "coupled")
        body: dict[str, Any] = {
            "prompt": list(job.tokens),
            "n_predict": job.max_tokens,
            "stream": True,
            "return_tokens": True,
            "draft": "none" if self.policy.kind == "plain" else self.policy.worker,
            **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")},
            "acceptance": sampling.acceptance,
        }
        started = time.monotonic()
        tokens: list[int] = []
        arrivals: list[float] = []
        final: dict[str, Any] = {}
        for event in self._gateway.stream("/completion", body):
            if self._stopping.is_set():
                raise KeyboardInterrupt
            if event["stop"]:
                final = event
            elif event["tokens"]:
                arrivals.append(time.monotonic())
                tokens += event["tokens"]
        arrivals = arrivals or [time.monotonic()]  # a text that has ended before it began
        timings, report = final["timings"], final["draftwire"]
        record = Record(
            **_common(self._scene, self.policy, job, sampling),
            tokens=tuple(tokens),
            cached_tokens=timings["cache_n"],
            tokens_per_s=timings["predicted_per_second"] if len(tokens) > 1 else 0.0,
            **_times(started, arrivals),
            rounds=report["rounds"],
            proposed=timings["draft_n"],
            accepted=timings["draft_n_accepted"],
            by_depth=tuple((entry["draft_n"], entry["draft_n_accepted"]) for entry in timings["draft_by_depth"]),
            stale=report["n_stale"],
            drafted=report["n_drafted"],
            worker=report["worker"],
            stages_ms=report["stages_ms"],
        )
        return _Timed(record, arrivals[0], arrivals[-1])


@contextmanager
def _fleet(
    scene: Scene,
    policy: Policy,
    settings: Settings,
    options: BenchOptions,
    lan: Lan,
    stopping: threading.Event,
    overruns: list[Overruns],
) -> Iterator[_Fleet]:
    """A running fleet for a policy; adds what it says of overruns when it has ended."""
    links: dict[str, Link] = {}

    def through(worker: str, endpoint: str) -> str:
        links[worker] = lan.link(endpoint, _conditions(scene.rtt_of(worker), options.time_scale))
        return links[worker].endpoint

    changes = [*options.overrides, "drain_s=1", *fleet_overrides(settings, policy)]
    with tempfile.TemporaryDirectory(prefix="draftwire-logs-") as logs:
        with temporary_fleet(
            options.config,
            changes,
            log_dir=Path(logs),
            drafts_through=None if policy.kind == "plain" else through,
        ) as running:
            yield _Fleet(scene, policy, running, links, options.time_scale, stopping)
        for path in sorted(Path(logs).glob("*.log")):
            if (found := _logged_overruns(path.read_text("utf-8", "replace"))) is not None:
                overruns.append(replace(found, process=f"{path.stem} of {policy.name}"))


def _conditions(rtt_ms: float, time_scale: float) -> Conditions:
    return Conditions(delay_s=rtt_ms * time_scale / 2e3)


def _logged_overruns(log: str) -> Overruns | None:
    """The last that an emulated engine said of itself; None in the log of a process without one."""
    last: dict[str, Any] | None = None
    for line in log.splitlines():
        if '"emulation_ended"' in line or '"slower_than_emulated"' in line:
            last = json.loads(line)
    return None if last is None else Overruns("", last["passes"], last["overruns"], last["overrun_ms"])


# --- drafting in turn -------------------------------------------------------------------------------------------------


class _Sequential:
    """Target and draft in this process."""

    def __init__(self, scene: Scene, policy: Policy, decoder: SequentialDecoder, stop_tokens: Sequence[int]) -> None:
        self.policy = policy
        self._scene = scene
        self._decoder = decoder
        self._stop_tokens = stop_tokens

    def happens(self, event: Event) -> None:
        pass  # it has no network

    def wire_bytes(self) -> int | None:
        return None

    def complete(self, job: _Job) -> _Timed:
        started = time.monotonic()
        done = self._decoder.complete(job.tokens, job.sampling, job.max_tokens, self._stop_tokens)
        arrivals = [started + at for at, _ in done.times_s]
        busy = arrivals[-1] - arrivals[0]
        record = Record(
            **_common(self._scene, self.policy, job, job.sampling),
            tokens=done.tokens,
            cached_tokens=0,
            tokens_per_s=len(done.tokens) / busy if busy else 0.0,
            **_times(started, arrivals),
            rounds=done.rounds,
            proposed=sum(verified for verified, _ in done.by_depth),
            accepted=sum(accepted for _, accepted in done.by_depth),
            by_depth=done.by_depth,
            stale=0,
            drafted=done.n_drafted,
            worker="",
            stages_ms={
                "draft_prefill": done.draft_prefill_s * 1e3,
                "draft_decode": done.draft_s * 1e3,
                "target_prefill": done.target_prefill_s * 1e3,
                "verify": done.verify_s * 1e3,
            },
        )
        return _Timed(record, arrivals[0], arrivals[-1])


@contextmanager
def _engines(scene: Scene, policy: Policy, settings: Settings, overruns: list[Overruns]) -> Iterator[_Sequential]:
    """The engines that a fleet of these settings has, loaded here."""
    target_settings = settings.verifier.engine
    with ExitStack() as stack:
        engines = []
        for name, engine_settings in (
            ("target", target_settings),
            ("draft", drafting_model(settings, policy.worker).engine),
        ):
            engine = load_engine(engine_settings)
            stack.callback(engine.close)
            engines.append((name, engine))
        stops: Sequence[int] = ()
        if target_settings.computing != "null":  # which has no model file, and never ends by itself
            stops = Vocabulary.open(resolve_model(target_settings.model)).eog_ids
        (_, target), (_, draft) = engines
        decoder = SequentialDecoder(target, draft, policy.n_max, policy.p_min, policy.greedy)
        yield _Sequential(scene, policy, decoder, stops)
        overruns.extend(
            Overruns(f"{name} of {policy.name}", engine.passes, engine.overruns, engine.overrun_s * 1e3)
            for name, engine in engines
            if isinstance(engine, EmulatedEngine)
        )


def _common(scene: Scene, policy: Policy, job: _Job, sampling: SamplingParams) -> dict[str, Any]:
    """What a record says of the job."""
    return {
        "scene": scene.name,
        "policy": policy.name,
        "turn": 0,
        "prompt": job.prompt,
        "repeat": job.repeat,
        "prompt_tokens": tuple(job.tokens),
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "acceptance": sampling.acceptance,
    }


def _times(started: float, arrivals: Sequence[float]) -> dict[str, Any]:
    return {
        "ttft_ms": (arrivals[0] - started) * 1e3,
        "intervals_ms": tuple((b - a) * 1e3 for a, b in pairwise(arrivals)),
    }
