"""What `draftwire bench speculation` measures: policies, prompts, and the scenes of its suites, as data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from shared.engine.emulated import find_pace
from shared.engine.interface import EngineSettings, Pace
from shared.errors import SettingsError
from shared.messages import MAX_RUN
from shared.model.names import embedded_copy_prompts, load_prompts
from shared.sampling.params import SamplingParams
from shared.settings import DrafterKind, DraftSettings, Settings, load_settings

PolicyKind = Literal["plain", "adaptive", "fixed", "sequential"]
POLICY_FORMS = "plain, adaptive[:N], fixed:N or sequential:N:P[+greedy]"


@dataclass(frozen=True, slots=True)
class Policy:
    """How proposals are used.

    plain: not at all. adaptive: the pipeline chooses how many are verified, up to n_max (0: as configured). fixed: all
    that are there, up to n_max. sequential: see `tools/sequential.py`, with p_min.
    worker: who drafts, "auto" for the router's choice. rejection: the acceptance rule, else coupled. greedy: sequential
    drafts the most probable tokens, whatever the target samples.
    """

    name: str
    kind: PolicyKind
    n_max: int = 0
    p_min: float = 0.0
    worker: str = "auto"
    rejection: bool = False
    greedy: bool = False


PLAIN = Policy("plain", "plain")


def parse_policy(text: str) -> Policy:
    """A policy by its name: KIND[:N[:P]][@WORKER][+RULE].

    Raises:
        SettingsError: it is none.
    """
    rest, plus, rule = text.partition("+")
    rest, at, worker = rest.partition("@")
    kind, *numbers = rest.split(":")
    counts = {"plain": (0,), "adaptive": (0, 1), "fixed": (1,), "sequential": (2,)}
    try:
        if len(numbers) not in counts[kind] or (plus and rule not in ("rejection", "greedy")) or (at and not worker):
            raise ValueError
        n_max = int(numbers[0]) if numbers else 0
        p_min = float(numbers[1]) if len(numbers) > 1 else 0.0
    except (KeyError, ValueError):
        raise SettingsError(
            f"{text!r} is no policy",
            f"{POLICY_FORMS}; then @WORKER to name one, +rejection for that rule",
        ) from None
    if numbers and not 1 <= n_max <= MAX_RUN:
        raise SettingsError(f"policy {text!r}: {n_max} proposals", f"from 1 to {MAX_RUN}")
    if not 0 <= p_min < 1:
        raise SettingsError(f"policy {text!r}: a probability of {p_min:g}", "from 0 to below 1")
    if kind == "plain" and (plus or at):
        raise SettingsError(f"policy {text!r}: plain decoding has no draft", "give plain alone")
    if kind == "sequential" and rule == "rejection":
        raise SettingsError(f"policy {text!r}: sequential accepts by the coupled rule only", "leave +rejection away")
    if kind != "sequential" and rule == "greedy":
        raise SettingsError(
            f"policy {text!r}: the pipeline's drafts follow the request", "only sequential takes +greedy"
        )
    policy: PolicyKind = kind  # type: ignore[assignment]  # the keys of counts
    return Policy(text, policy, n_max, p_min, worker or "auto", rule == "rejection", rule == "greedy")


@dataclass(frozen=True, slots=True)
class Event:
    """From that share of a scene's turns on, a worker is so far away. rtt_ms: None: it cannot be reached at all."""

    share: float
    worker: str
    rtt_ms: float | None


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing to measure: policies against each other, all else being equal.

    policies: by name; plain is measured whether listed or not. engine, profile: of target and draft models; empty: as
    configured. drafts: workers, by name or kind; none: as configured. rtt_ms: between draft workers and router, both
    ways together. rtts: of those workers that are at another distance. events: what happens in between. copies: prompts
    that ask for repetition, instead of the bundled ones. changes: settings, as --set.
    """

    name: str
    title: str
    policies: tuple[str, ...] = ("plain", "adaptive")
    engine: str = ""
    profile: str = ""
    drafts: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 0.95
    rtt_ms: float = 0.0
    rtts: tuple[tuple[str, float], ...] = ()
    events: tuple[Event, ...] = ()
    concurrency: int = 1
    copies: bool = False
    changes: tuple[str, ...] = ()

    @property
    def parsed(self) -> tuple[Policy, ...]:
        """The policies, plain first. Errors: `SettingsError`, also for what does not go together."""
        policies = [parse_policy(name) for name in dict.fromkeys(self.policies)]
        for policy in policies:
            if policy.kind == "sequential" and self.concurrency > 1:
                raise SettingsError(
                    f"{policy.name} completes one prompt at a time", "leave it out, or set --concurrency 1"
                )
            if (policy.rejection or policy.greedy) and self.temperature == 0:
                raise SettingsError(f"{policy.name}: at temperature 0 there is but one rule", "set --temperature")
        return (PLAIN, *(policy for policy in policies if policy.kind != "plain"))

    def rtt_of(self, worker: str) -> float:
        """Its milliseconds to the router and back, at first."""
        return dict(self.rtts).get(worker, self.rtt_ms)

    def events_at(self, turn: int, n_turns: int) -> list[Event]:
        """What happens before this turn of so many."""
        return [event for event in self.events if round(event.share * n_turns) == turn]

    def sampling(self, seed: int) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, top_p=self.top_p, seed=seed)


_LING = Scene("", "", profile="ling-1t", drafts=("model",), rtt_ms=0.2)
_SAMPLED = replace(_LING, temperature=0.7)
_POLICIES = ("plain", "adaptive", "fixed:4", "sequential:16:0.75")


def _choice(name: str, title: str, workers: tuple[str, str], slow: str, **what: Any) -> Scene:
    """Two workers with the same draft, of which one takes 90 ms a token: what the router makes of it."""
    return replace(
        _LING,
        name=name,
        title=title,
        drafts=workers,
        policies=("plain", "adaptive", *(f"adaptive@{worker}" for worker in workers)),
        changes=(
            *(f'draft.{worker}.drafter="model"' for worker in workers),
            f"draft.{slow}.engine.pace.first_row_ms=90",
        ),
        **what,
    )


SUITES: dict[str, tuple[Scene, ...]] = {
    "paper": (
        replace(_LING, name="greedy", title="a 1T target in RAM, its draft on another machine", policies=_POLICIES),
        replace(
            _SAMPLED,
            name="sampled",
            title="the same at T = 0.7, top_p 0.95",
            policies=(*_POLICIES, "sequential:16:0.75+greedy"),
        ),
        replace(_LING, name="garbage", title="a draft that is of no use at all", drafts=("garbage",)),
        replace(
            _LING,
            name="slow-draft",
            title="a draft slower than the target: 400 ms a token against 160",
            changes=("draft.model.engine.pace.first_row_ms=400",),
        ),
        *(
            replace(_LING, name=f"rtt-{rtt:g}", title=f"a network of {rtt:g} ms there and back", rtt_ms=rtt)
            for rtt in (0.2, 1.0, 5.0, 20.0, 50.0)
        ),
        *(
            replace(_LING, name=f"concurrent-{n}", title=f"{n} generation{'s' * (n > 1)} at a time", concurrency=n)
            for n in (1, 4, 16)
        ),
        replace(
            _LING,
            name="copies",
            title="copy-heavy prompts, with a model and prompt lookup side by side",
            profile="qwen3-coder-480b",
            drafts=("model", "ngram"),
            policies=("plain", "adaptive", "adaptive@model", "adaptive@ngram"),
            copies=True,
        ),
        _choice(
            "near-far",
            "a slow draft worker nearby, a fast one far away",
            ("near", "far"),
            slow="near",
            rtts=(("far", 30.0),),
        ),
        _choice(
            "degrading",
            "two draft workers, of which the faster one comes to be far away",
            ("good", "steady"),
            slow="steady",
            events=(Event(0.4, "good", 600.0),),
        ),
        _choice(
            "flapping",
            "two draft workers, of which the faster one comes and goes",
            ("good", "steady"),
            slow="steady",
            events=tuple(Event(0.1 * tenth, "good", None if tenth % 4 == 2 else 0.2) for tenth in range(2, 10, 2)),
        ),
        replace(
            _SAMPLED,
            name="wire",
            title="bytes on the draft's wire, by acceptance rule",
            policies=("plain", "adaptive", "adaptive+rejection"),
            changes=("draft.model.q_top_k=64",),
        ),
    ),
}


def find_scenes(suite: str, names: Sequence[str]) -> tuple[Scene, ...]:
    """The scenes of a suite, or those that are named.

    Raises:
        SettingsError: there is no such suite or scene.
    """
    if suite not in SUITES:
        raise SettingsError(f"there is no suite {suite!r}", f"one of {', '.join(SUITES)}")
    known = {scene.name: scene for scene in SUITES[suite]}
    for name in names:
        if name not in known:
            raise SettingsError(f"there is no scene {name!r} in suite {suite}", f"one of {', '.join(known)}")
    return tuple(known[name] for name in names) if names else SUITES[suite]


# --- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prompts:
    """Where prompts come from: the bundled sets, or `given`. count: how many of them; 0: all that are given."""

    count: int
    given: tuple[str, ...] = ()

    def choose(self, scene: Scene) -> tuple[str, ...]:
        """The texts for a scene: at least as many as it has generations at a time, some of them twice if need be."""
        texts = self.given or tuple(
            prompt.text for prompt in load_prompts(embedded_copy_prompts() if scene.copies else None)
        )
        wanted = max(self.count or len(texts), scene.concurrency)
        return tuple(texts[i % len(texts)] for i in range(wanted))


def read_prompts(text: str) -> Prompts:
    """What --prompts says: a number of bundled prompts, or a file with prompts of the user's own.

    A .jsonl holds an object with "prompt" or "text" on each line; any other file is one prompt.

    Raises:
        SettingsError: the file cannot be read, or holds no prompt (the line is named).
    """
    if text.isdecimal():
        if int(text) < 1:
            raise SettingsError("--prompts 0", "at least 1, or a file")
        return Prompts(int(text))
    path = Path(text)
    try:
        content = path.read_text("utf-8")
    except OSError as error:
        raise SettingsError(f"cannot read the prompts in {path}: {error.strerror}", "a number, or a file") from None
    except UnicodeDecodeError:
        raise SettingsError(f"the prompts in {path} are not UTF-8", "save it as UTF-8") from None
    if path.suffix != ".jsonl":
        if not content.strip():
            raise SettingsError(f"{path} holds no text", "put a prompt there")
        return Prompts(0, (content,))
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise SettingsError(f"{path} holds no prompts", 'put {"prompt": "..."} on each line')
    return Prompts(0, tuple(_prompt(line, f"{path}:{number}") for number, line in lines))


def _prompt(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise SettingsError(f"{where}: no JSON: {error}", 'put {"prompt": "..."} on each line') from None
    text = (value.get("prompt") or value.get("text")) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise SettingsError(f'{where}: no "prompt" and no "text"', 'put {"prompt": "..."} on each line')
    return text


# --- settings of the fleets -------------------------------------------------------------------------------------------


def scene_settings(scene: Scene, time_scale: float, config: Path | None, overrides: Sequence[str]) -> Settings:
    """A fleet's settings for a scene; the user's own overrides win. One slot for each generation at a time.

    Raises:
        SettingsError: a draft worker that is neither configured nor a kind, or nothing to scale.
    """
    configured = load_settings(config, [*scene.changes, *overrides])
    changes = []
    engine = scene.engine or ("emulated" if scene.profile else "")
    drafts = scene.drafts or tuple(configured.draft)
    tables = ["verifier"]
    for name in drafts:
        if name not in configured.draft and name not in get_args(DrafterKind):
            raise SettingsError(
                f"there is no draft worker {name!r}",
                f"a kind ({', '.join(get_args(DrafterKind))}) or one of the configured ones: "
                f"{', '.join(configured.draft) or 'none'}",
            )
        kind = configured.draft[name].drafter if name in configured.draft else name
        changes.append(f'draft.{name}.drafter="{kind}"')
        if kind == "model":
            tables.append(f"draft.{name}")
    for table in tables:
        if engine:
            changes.append(f'{table}.engine.engine="{engine}"')
        if scene.profile:
            changes.append(f'{table}.engine.profile="{scene.profile}"')
    settings = load_settings(config, [*changes, *scene.changes, *overrides])
    emulated = [settings.verifier.engine, *(worker.engine for worker in settings.draft.values())]
    if time_scale != 1 and not any(engine.engine == "emulated" for engine in emulated):
        raise SettingsError(
            f"--time-scale {time_scale:g}, and no engine is emulated", "give --profile or --engine emulated"
        )

    def fit(engine: EngineSettings) -> EngineSettings:
        return replace(_scaled(engine, time_scale), n_slots=scene.concurrency)

    return replace(
        settings,
        verifier=replace(settings.verifier, engine=fit(settings.verifier.engine)),
        draft={
            name: replace(settings.draft[name], engine=fit(settings.draft[name].engine))
            if settings.draft[name].drafter == "model"
            else settings.draft[name]
            for name in drafts
        },
    )


def _scaled(engine: EngineSettings, time_scale: float) -> EngineSettings:
    if engine.engine != "emulated":
        return engine
    pace = find_pace(engine)  # of a profile that there is
    return replace(
        engine,
        pace=Pace(
            pace.first_row_ms * time_scale, pace.further_row_ms * time_scale, pace.prefill_per_second / time_scale
        ),
    )


def fleet_overrides(settings: Settings, policy: Policy) -> list[str]:
    """The --set that give a fleet these settings for one policy; its draft workers are the policy's alone."""
    verifier = replace(
        settings.verifier,
        length="fixed" if policy.kind == "fixed" else "adaptive",
        n_max=policy.n_max or settings.verifier.n_max,
    )
    draft = {} if policy.kind == "plain" else {name: asdict(worker) for name, worker in settings.draft.items()}
    return [f"verifier={_toml(asdict(verifier))}", f"draft={_toml(draft)}"]


def drafting_model(settings: Settings, wanted: str = "auto") -> DraftSettings:
    """The draft worker of this name that is a model, or the first one. Errors: `SettingsError`: there is none."""
    for name, worker in settings.draft.items():
        if worker.drafter == "model" and wanted in ("auto", name):
            return worker
    which = "no draft worker" if wanted == "auto" else f"no draft worker {wanted!r} that"
    raise SettingsError(f"{which} is a model", "give --draft NAME of one that is")


def _toml(value: Any) -> str:
    """A value in TOML's syntax, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    write: Callable[[Any], str] = partial(json.dumps, ensure_ascii=False) if isinstance(value, (str, bool)) else repr
    return write(value)
