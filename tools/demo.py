"""`draftwire demo`: a fleet of its own, one prompt plainly and speculatively, what came out and what it cost; then the
same on an emulated machine that is slow enough for speculation to pay.

Invariant: whatever happens, its processes and its directory are gone when it returns.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.engine.emulated import PROFILES
from shared.errors import DraftwireError
from shared.messages import Status
from shared.settings import Settings, load_settings
from tools.bench_speculation import BenchOptions, SceneResult, run_scenes
from tools.bench_speculation_figures import STAGES, summarize
from tools.bench_speculation_scenes import Prompts, Scene
from tools.fleet import Gateway, find_gateway, joined_workers
from tools.generate import GenerateOptions, TextWriter, printable, wants_colour
from tools.supervisor import Supervisor
from tools.temporary import PRIVATE_GATEWAY

BUNDLED_PROMPT = '''class Stack:
    """A last-in, first-out stack of items."""

    def __init__(self):
        self.items = []

    def push(self, item):
        """Put an item on top of the stack."""
        self.items.append(item)

    def pop(self):
        """Remove the item on top of the stack and return it."""
'''

REPEATS = 3
WARM_UP_TOKENS = 16
SCENE_PROFILE, SCENE_TOKENS, SCENE_WARM_UP_TOKENS, SCENE_RTT_MS = "ling-1t", 32, 6, 0.2
BUDGET_S = 25.0
"""No further repeat begins after so long; a slow engine gets fewer."""

_NO_FASTER = {
    "ik": "This pair shows that the text is right and how much is accepted, not the speed. On two idle cores its "
    "target was measured at 1.4 ms a token and 2.6 times that for 4 rows, and the draft needs the same cores, so that "
    "speculation about breaks even. It pays when a step is long because many weights must be read.",
    "cuda": "A step of this small target takes a third of a millisecond on a GPU, and the processes between two steps "
    "take as long. Speculation pays where a step is longer.",
    "numpy": "The numpy engine is the reference that others are checked with: it computes, and verifying more rows "
    "costs more, where engines made for speed wait for weights. Speculation pays with those.",
}
"""Why speculation does not win here, by engine; as measured with the embedded pair."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """prompt: None takes the bundled one. draft: "none", "model" or "ngram". engine: of target and draft model. scene:
    whether to end on the emulated machine, where engine and draft are the default ones."""

    prompt: str | None = None
    temperature: float = 0.0
    seed: int = 1
    max_tokens: int = 96
    draft: str = "model"
    engine: str = "auto"
    scene: bool = True


@dataclass(frozen=True, slots=True)
class Completion:
    """One measured completion: its text, and the gateway's last chunk."""

    text: str
    final: dict[str, Any]

    @property
    def tokens_per_s(self) -> float:
        return float(self.final["timings"]["predicted_per_second"])

    def figure(self, name: str) -> float:
        return float(self.final["draftwire"][name])

    def stage_ms(self, name: str) -> float:
        return float(self.final["draftwire"]["stages_ms"][name])


class Interrupted(Exception):
    """The user has had enough."""


def run_demo(options: DemoOptions, config: Path | None, overrides: Sequence[str]) -> int:
    """Run the demo; the exit status. Errors: `DraftwireError`."""
    run_dir = Path(tempfile.mkdtemp(prefix="draftwire-demo-"))
    try:
        changes = [*overrides, *_changes(options, run_dir)]
        settings = load_settings(config, changes)
        settings.endpoint("tokenizer")
        status = asyncio.run(_Demo(options, settings, Supervisor(
            settings, config, changes, log_dir=run_dir / "logs", say=_say, restart=False,
        )).run())  # fmt: skip
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
    if status == 0 and options.scene and options.engine == "auto" and options.draft == "model":
        return _show_scene(options, config, overrides)
    return status


def _changes(options: DemoOptions, run_dir: Path) -> list[str]:
    changes = [
        f'run_dir="{run_dir}"',
        "endpoints={}",
        *PRIVATE_GATEWAY,
        "drain_s=2",
        f'verifier.engine.engine="{options.engine}"',
    ]
    if options.draft == "none":
        changes.append("draft={}")
    else:
        changes.append(f'draft.{options.draft}.drafter="{options.draft}"')
    if options.draft == "model":
        changes += ['draft.model.engine.engine="' + options.engine + '"']
    return changes


def _show_scene(options: DemoOptions, config: Path | None, overrides: Sequence[str]) -> int:
    """Plain and speculative at the pace of a machine that speculation is for; the exit status."""
    pace = PROFILES[SCENE_PROFILE]
    target, draft = pace.target, pace.draft
    print(
        f"""
And as if on another machine: the same pair, slowed down to the pace of Ling-1T in RAM ({target.first_row_ms:.0f} ms a
token, {target.further_row_ms:.0f} more for each one verified beside it), with a draft of {draft.first_row_ms:.0f} ms
a token behind a network of {SCENE_RTT_MS:g} ms. The machine is emulated: its models' time is
slept. Processes, messages and text are real.
""",
        flush=True,
    )
    _say("starting a fleet for each, and letting them warm up")
    scene = Scene(
        "emulated",
        "",
        profile=SCENE_PROFILE,
        drafts=("model",),
        temperature=options.temperature,
        rtt_ms=SCENE_RTT_MS,
    )
    bench = BenchOptions(
        Prompts(1, (BUNDLED_PROMPT if options.prompt is None else options.prompt,)),
        tokens=min(SCENE_TOKENS, options.max_tokens),
        seed=options.seed,
        warm_up_tokens=SCENE_WARM_UP_TOKENS,
        config=config,
        overrides=tuple(overrides),
    )
    [result] = run_scenes((scene,), bench, Console(stderr=True))
    _say("all processes have ended")
    if result.interrupted:
        return 130
    print("\n".join(scene_lines(result)))
    return 0


def scene_lines(result: SceneResult) -> list[str]:
    """What came out on the emulated machine."""
    plain, speculative = summarize(result.records)
    if plain.all_tokens_per_s is None or speculative.all_tokens_per_s is None:
        return ["The text is too short to measure."]
    lines = [
        f"plain {plain.all_tokens_per_s:.2f} tokens/s, speculative {speculative.all_tokens_per_s:.2f}: "
        f"{speculative.speed_up:.2f}x; {speculative.accepted} of {speculative.proposed} verified proposals accepted, "
        f"{'the same text' if speculative.same else 'texts that differ by a near-tie'}.",
        f"One completion of {speculative.n_tokens} tokens each; for more: "
        f"draftwire bench speculation --profile {SCENE_PROFILE}",
    ]
    late = [found for found in result.overruns if found.overruns]
    if late:
        worst = max(late, key=lambda found: found.overrun_ms)
        lines.append(
            f"This machine was too slow for it at times ({worst.process}: {worst.overruns} of {worst.passes} passes, "
            f"by {worst.overrun_ms:.0f} ms in all): the figures are not quite the emulated one's."
        )
    return lines


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


class _Demo:
    def __init__(self, options: DemoOptions, settings: Settings, supervisor: Supervisor) -> None:
        self._options = options
        self._settings = settings
        self._supervisor = supervisor
        self._console = Console(highlight=False, markup=False, soft_wrap=True, no_color=not wants_colour(sys.stdout))
        self._interrupted = False
        prompt = BUNDLED_PROMPT if options.prompt is None else options.prompt
        self._plain = GenerateOptions(
            prompt, options.max_tokens, temperature=options.temperature, seed=options.seed, draft="none"
        )
        self._speculative = replace(self._plain, draft="auto")

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupt)
        try:
            _say("starting the services as separate processes, talking over ipc:// in a private directory")
            await self._supervisor.start()
            if not await self._supervisor.ready():
                raise self._failed()
            show = asyncio.create_task(asyncio.to_thread(self._show))
            ended = asyncio.create_task(self._supervisor.until(lambda: self._interrupted or self._failed_already))
            await asyncio.wait((show, ended), return_when=asyncio.FIRST_COMPLETED)
            if not show.done():
                raise self._failed()
            ended.cancel()
            await show
        except Interrupted:
            return 130
        finally:
            await self._supervisor.stop()
        _say("all processes have ended")
        return 0

    def _interrupt(self) -> None:
        self._interrupted = True
        self._supervisor.request_stop()

    @property
    def _failed_already(self) -> bool:
        return bool(self._supervisor.failure)

    def _failed(self) -> Exception:
        if self._interrupted:
            return Interrupted()
        return DraftwireError(f"the demo's fleet has ended: {self._supervisor.failure}", "see `draftwire doctor`")

    # -- in a thread of its own, since HTTP here is blocking --

    def _show(self) -> None:
        gateway = Gateway(find_gateway(self._settings), timeout_s=60)
        status = joined_workers(self._settings)
        _say("warming up")
        for options in (self._plain, self._speculative):
            self._complete(gateway, replace(options, max_tokens=min(WARM_UP_TOKENS, options.max_tokens)))
        speculating = self._options.draft != "none"
        self._legend(speculating)
        plain: list[Completion] = []
        speculative: list[Completion] = []
        writer = TextWriter(sys.stdout, marks=speculating, colour=wants_colour(sys.stdout))
        text = self._plain.prompt
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        first = self._complete(gateway, self._speculative, writer)
        writer.end()
        (speculative if speculating else plain).append(first)
        started = time.monotonic()
        while len(plain) < REPEATS and (not plain or time.monotonic() - started < BUDGET_S):
            plain.append(self._complete(gateway, self._plain))
            if speculating and len(speculative) < REPEATS:
                speculative.append(self._complete(gateway, self._speculative))
        self._report(plain, speculative, status)

    def _complete(self, gateway: Gateway, options: GenerateOptions, writer: TextWriter | None = None) -> Completion:
        text: list[str] = []
        final: dict[str, Any] = {}
        for event in gateway.stream("/completion", options.body(stream=True)):
            text.append(event["content"])
            final = event
            if writer is not None:
                writer.chunk(event)
        return Completion("".join(text), final)

    def _legend(self, speculating: bool) -> None:
        print()
        if not speculating:
            legend = Text("The prompt, and the target's continuation:")
        elif wants_colour(sys.stdout):
            legend = Text.assemble(
                "The prompt, then ",
                ("proposed by the draft and accepted", "green underline"),
                ", or the target's own:",
            )
        else:
            legend = Text("The prompt, then ‹proposed by the draft and accepted›, or the target's own:")
        self._console.print(legend)
        print("-" * 72, flush=True)

    def _report(self, plain: list[Completion], speculative: list[Completion], status: Status) -> None:
        print("-" * 72)
        self._console.print(_table(plain, speculative))
        target = next(peer for peer in status.peers if peer.role == "verifier")
        print(f"Target engine: {target.engine}. {os.cpu_count()} CPU cores.")
        texts = {completion.text for completion in (*plain, *speculative)}
        if speculative:
            print(_sameness(plain, speculative, target.engine, target.row_invariant))
            if median(c.tokens_per_s for c in speculative) < 1.15 * median(c.tokens_per_s for c in plain):
                print(_NO_FASTER.get(target.engine, "Here, verifying several tokens costs more than it saves."))
        if len(texts) > 1 and target.row_invariant:
            raise DraftwireError(
                f"{len(texts)} different texts from one seed, though the {target.engine} engine promises one",
                "this is a defect: please report it with this output",
                "texts_differ",
            )


def _sameness(plain: list[Completion], speculative: list[Completion], engine: str, row_invariant: bool) -> str:
    texts = [completion.text for completion in (*plain, *speculative)]
    if len(set(texts)) == 1:
        return f"The text is identical in all {len(texts)} completions, plain and speculative: same target, same seed."
    reference = plain[0].text
    same = sum(text == reference for text in texts)
    if row_invariant:
        return f"The texts differ: only {same} of {len(texts)} equal the first plain one."
    other = next(text for text in texts if text != reference)
    pairs = enumerate(zip(reference, other, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(reference), len(other)))
    return (
        f"{same} of {len(texts)} texts equal the first plain one; one leaves it after {at} characters. The {engine} "
        "engine's logits change in their last digits with the number of rows computed at a time, so that a near-tie "
        "between two tokens can tip over. Both are texts of the target; with --engine numpy they are always the same."
    )


def _acceptance(completions: list[Completion]) -> str:
    """Accepted of verified proposals, of all completions together: one of them alone verifies too few for a rate."""
    accepted = sum(completion.final["timings"]["draft_n_accepted"] for completion in completions)
    proposed = sum(completion.final["timings"]["draft_n"] for completion in completions)
    return f"{100 * accepted / proposed:.1f} % ({accepted} of {proposed})" if proposed else "no proposals"


def _table(plain: list[Completion], speculative: list[Completion]) -> Table:
    """The figures: medians over the repeats, and the acceptance rate over all of them."""
    columns = [column for column in (plain, speculative) if column]

    def middle(completions: list[Completion], name: str) -> float:
        return median(completion.figure(name) for completion in completions)

    table = Table(title=f"Medians of {' and '.join(str(len(c)) for c in columns)} completions", title_justify="left")
    table.add_column("")
    table.add_column("plain", justify="right")
    if speculative:
        table.add_column("speculative", justify="right")

    def row(name: str, *values: str) -> None:
        table.add_row(name, *values[: len(columns)])

    row("tokens", *(f"{median(c.final['timings']['predicted_n'] for c in column):.0f}" for column in columns))
    speeds = [median(c.tokens_per_s for c in column) for column in columns]
    row("tokens/s", *(f"{speed:.1f}" for speed in speeds))
    if speculative:
        row("speed-up", "1.00x", f"{speeds[1] / speeds[0]:.2f}x" if speeds[0] else "-")
    row("rounds", *(f"{middle(column, 'rounds'):.0f}" for column in columns))
    row("acceptance rate", "-", *(_acceptance(column) for column in columns[1:]))
    row("mean acceptance length", *(f"{middle(column, 'mean_acceptance_length'):.2f}" for column in columns))
    table.add_section()
    for stage in STAGES:
        name = f"{stage.replace('_', ' ')} ms"
        row(name, *(f"{median(c.stage_ms(stage) for c in column):.1f}" for column in columns))
    return table
