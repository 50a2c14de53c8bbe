"""Seeded runs in which parts of a fleet fail: what fails, and after which token, is drawn from the run's number.

A `Site` is a fleet without a supervisor, so that a run itself kills, stops and starts its processes; a `Schedule` is
what one seed stands for; `run` generates while the faults happen and checks what may be relied on:

* text and tokens are those of plain decoding, or the client has got one clear error where the schedule allows one;
* afterwards no session is left, and every part is there again.
"""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import DraftwireError
from shared.settings import load_settings
from tests.pipeline.fleet import CLI, MODES, START_S, Completion, Process
from tests.pipeline.liar import LIES, Liar, flap, join_with_another_vocabulary
from tools.fleet import Gateway, find_gateway, is_serving, router_status
from tools.lan import Conditions, Lan

N_TOKENS = 40
N_PROMPTS = 3
SILENCE_S = 45
"""How long a client waits for the next token or an error: whatever fails, it hears of it sooner."""

WORKERS = ("model", "ngram", "garbage")
"""Draft workers with a process; "model" is behind an emulated link. The fourth one is the liar."""

START_ORDER = ("sampler", "tokenizer", "router", "verifier", *WORKERS, "gateway")
"""Of the processes; ended the other way round, nobody waits for what has gone."""

HOLDING = {
    "gateway": ("requests", "generations", "questions"),
    "verifier": ("sessions", "slots"),
    **dict.fromkeys(WORKERS, ("sessions",)),
}
"""What a process holds of sessions, and says so when it is told to stop."""

SETTINGS = (
    # Rows of the inner engine do not depend on the batch, so that texts must be the same to the token; its pace gives
    # a fault the time to come between two tokens.
    "verifier.engine.engine=emulated",
    "verifier.engine.inner=numpy",
    "verifier.engine.model=embedded:draft",
    "verifier.engine.pace.first_row_ms=8",
    "verifier.engine.pace.further_row_ms=1",
    "verifier.engine.pace.prefill_per_second=100000",
    "verifier.engine.n_slots=2",
    "verifier.engine.n_ctx=256",
    "verifier.engine.n_batch=128",
    "draft.model.engine.engine=numpy",
    "draft.model.engine.n_ctx=256",
    "draft.model.engine.n_slots=4",
    "draft.ngram.drafter=ngram",
    "draft.garbage.drafter=garbage",
    "draft.liar.drafter=garbage",  # the test's own processes: a request may name them before they have come
    "draft.flapper.drafter=garbage",
    "router.heartbeat_ms=250",
    "router.deadline_beats=12",
    "router.window=16",
    "gateway.port=0",
)

WEATHER = (
    Conditions(delay_s=0.002, jitter_s=0.003),
    Conditions(delay_s=0.01, loss=0.05, rto_s=0.05),
    Conditions(jitter_s=0.03, bytes_per_s=1e5),
)

ERRORS = {
    "router": {"router_lost", "service_unavailable"},
    "verifier": {"verifier_lost", "no_verifier", "overloaded"},
    "tokenizer": {"service_unavailable"},
}
"""What a client may be told, by the part that was killed. A fault of any other kind is to stay unnoticed."""


class Site:
    """See the module's docstring. A context manager; at its end every process has ended in good order, and empty."""

    def __init__(self, *overrides: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="dw-")
        self.run_dir = Path(self._directory.name)
        self._overrides = [*SETTINGS, *overrides]
        self.settings = load_settings(None, [*self._overrides, f'run_dir="{self.run_dir}"'], {})
        self.lan = Lan()
        self.processes: dict[str, Process] = {}
        self._stopped: set[str] = set()
        self._starting: set[str] = set()
        self.plain: dict[tuple[str, int], Completion] = {}

    def __enter__(self) -> Site:
        self.lan.__enter__()
        self.link = self.lan.link(self.settings.endpoint("drafts"))
        self.liar = Liar(self.settings.endpoint("drafts"))
        try:
            for name in START_ORDER:
                self.start(name)
            self.settle()
        except BaseException:
            self.end()
            raise
        return self

    @property
    def gateway(self) -> Gateway:
        return Gateway(find_gateway(self.settings), SILENCE_S)

    def __exit__(self, *_: object) -> None:
        statuses = self.end()
        assert not any(statuses.values()), f"{statuses}\n{self.log_tail()}"
        held = {name: process.logged("draining") for name, process in self.processes.items() if name in HOLDING}
        for name, line in held.items():
            kinds = {kind: line[kind] for kind in HOLDING[name]}
            assert not any(kinds.values()), f"{name} still holds {kinds}"

    def end(self) -> dict[str, int]:
        """End everything, in whatever state it is; the exit status of each process."""
        self.liar.close()
        for name in list(self._stopped):
            self.resume(name)
        statuses = {name: self.processes[name].stop() for name in reversed(START_ORDER) if name in self.processes}
        self.lan.__exit__()
        self._directory.cleanup()
        return statuses

    # -- processes --

    def start(self, name: str, program: Sequence[str] = CLI) -> Process:
        """Start a part; `settle` waits until it is ready."""
        service = ["draft", "--instance", name] if name in WORKERS else [name]
        overrides = list(self._overrides)
        if name == "model":
            overrides.append(f"endpoints.drafts={self.link.endpoint}")
        options = [part for override in overrides for part in ("--set", override)]
        process = Process(["service", *service, "--run-dir", str(self.run_dir), *options], program)
        self.processes[name] = process
        self._starting.add(name)
        return process

    def kill(self, name: str) -> None:
        """SIGKILL, and no trace of it is waited for."""
        self._stopped.discard(name)
        self.processes[name].kill()
        self.processes[name].stop()

    def restart(self, name: str, program: Sequence[str] = CLI) -> None:
        self.kill(name)
        self.start(name, program)

    def stop(self, name: str) -> None:
        """SIGSTOP: the process hangs, its connections stay."""
        self._stopped.add(name)
        self.processes[name].process.send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self._stopped.discard(name)
        self.processes[name].process.send_signal(signal.SIGCONT)

    def settle(self, patience_s: float = START_S) -> None:
        """Wait until no session is left anywhere and every part has found the others."""
        deadline = time.monotonic() + patience_s
        while (missing := self._missing()) and time.monotonic() < deadline:
            assert not missing.endswith("has ended"), f"{missing}\n{self.log_tail()}"
            time.sleep(0.02)
        assert not missing, f"{missing}\n{self.log_tail()}"

    def _missing(self) -> str:
        """What is not yet as it is between two generations; empty when all is."""
        for name, process in self.processes.items():
            if process.process.poll() is not None:
                return f"{name} has ended"
        for name in list(self._starting):
            # The router may take a predecessor that was killed for alive.
            event = '"ready"' if name in ("router", "sampler", "tokenizer") else '"router_connected"'
            if not any(event in line for line in self.processes[name].lines):
                return f"{name} is not there yet"
            self._starting.discard(name)
        status = router_status(self.settings, 1)
        if status is None:
            return "the router does not answer"
        if status.n_sessions or any(peer.n_sessions for peer in status.peers):
            return f"{status.n_sessions} sessions are left: {status.peers}"
        drafts = {peer.instance for peer in status.peers if peer.role == "draft" and peer.alive}
        if absent := {*WORKERS, "liar"} - drafts:
            return f"draft workers {absent} have not come back"
        if strangers := drafts - {*WORKERS, "liar"}:
            return f"draft workers {strangers} have not gone"
        return "" if is_serving(self.settings) else "the gateway does not serve"

    def log_tail(self) -> str:
        return "\n".join(f"{name}: {line[:400]}" for name, p in self.processes.items() for line in p.lines[-8:])

    # -- generations --

    def stream(self, mode: str, prompt: str, **fields: Any) -> Iterator[dict[str, Any]]:
        body = {"prompt": prompt, "n_predict": N_TOKENS, "stream": True, "return_tokens": True, "ignore_eos": True}
        return self.gateway.stream("/completion", {**body, **MODES[mode], "seed": 5, **fields})

    def learn(self, prompts: Sequence[str]) -> None:
        """What the target writes by itself, for every mode and prompt; the liar gets to know it too."""
        for index, prompt in enumerate(prompts):
            ids = self.gateway.post("/tokenize", {"content": prompt, "add_special": True})["tokens"]
            for mode in MODES:
                generated = Reader(self.stream(mode, prompt, draft="none")).read()
                assert len(generated.tokens) == N_TOKENS
                self.plain[mode, index] = generated
                self.liar.truths.append([*ids, *generated.tokens])


class Reader:
    """Reads a stream up to its end or its error, telling someone how many tokens have come."""

    def __init__(self, events: Iterator[dict[str, Any]], on_progress: Callable[[int], bool] = lambda _: True) -> None:
        self._events = events
        self._on_progress = on_progress
        self.tokens: list[int] = []
        self.text = ""
        self.final: dict[str, Any] | None = None
        self.error: DraftwireError | None = None

    def read(self) -> Completion:
        """The whole answer. Errors: whatever `DraftwireError` ended it."""
        self.follow()
        if self.error is not None:
            raise self.error
        assert self.final is not None
        return Completion(tuple(self.tokens), self.text, self.final)

    def follow(self) -> None:
        """Read until the end, the error, or until `on_progress` returns False: then the client goes away."""
        try:
            for event in self._events:
                self.text += event["content"]
                if event["stop"]:
                    self.final = event
                else:
                    self.tokens += event["tokens"]
                    if not self._on_progress(len(self.tokens)):
                        break
        except DraftwireError as error:
            self.error = error
        finally:
            close: Any = self._events
            close.close()


@dataclass(frozen=True)
class Fault:
    """What happens after `at` tokens, and ends `length` tokens later where it can.

    kind: a key of KINDS. what: the worker, the lie, or the conditions of the link.
    """

    kind: str
    at: int
    length: int
    what: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.what} after {self.at} for {self.length}".replace("  ", " ")


@dataclass(frozen=True)
class Schedule:
    """One seed. jobs: (mode, prompt) of each generation that runs at the same time; faults go by the first one's
    tokens. draft: the worker that the first one asks for.
    """

    seed: int
    jobs: tuple[tuple[str, int], ...]
    draft: str
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        jobs = ", ".join(f"{mode} {index}" for mode, index in self.jobs)
        return f"seed {self.seed}: {jobs}; draft {self.draft}; " + "; ".join(map(str, self.faults))

    @property
    def allowed_errors(self) -> set[str]:
        return set().union(*(ERRORS.get(fault.kind, set()) for fault in self.faults))

    @property
    def cancels(self) -> bool:
        return any(fault.kind == "cancel" for fault in self.faults)


KINDS = (
    "kill", "stall", "lie", "cut", "hole", "weather", "sampler", "lie", "mismatch", "flap", "cancel", "verifier", "lie",
    "router", "tokenizer",
)  # fmt: skip
"""Of faults: a worker killed or stopped, a liar, its link cut, silent or bad, a service killed, ..."""


def schedule(seed: int) -> Schedule:
    """The run of this number; seeds in a row go through all kinds of faults and all lies."""
    chance = random.Random(seed)
    n_faults = chance.randint(1, 3)
    first = KINDS[seed % len(KINDS)]
    kinds = [
        first,
        *chance.choices([kind for kind in KINDS if kind not in ERRORS and kind != "cancel"], k=n_faults - 1),
    ]
    faults = []
    for index, kind in enumerate(kinds):
        what = ""
        if kind in ("kill", "stall"):
            what = chance.choice(WORKERS)
        elif kind == "lie":
            what = LIES[seed // 2 % len(LIES)] if index == 0 else chance.choice(LIES)
        elif kind == "weather":
            what = str(chance.randrange(len(WEATHER)))
        faults.append(Fault(kind, chance.randint(1, N_TOKENS - 8), chance.randint(2, N_TOKENS // 2), what))
    victims = {"kill": faults[0].what, "stall": faults[0].what, "lie": "liar", "flap": "flapper"}
    victim = victims.get(first, "model" if first in ("cut", "hole", "weather") else "auto")
    draft = victim if chance.random() < 0.7 else "auto"
    jobs = tuple((chance.choice(list(MODES)), chance.randrange(N_PROMPTS)) for _ in range(chance.randint(1, 3)))
    return Schedule(seed, jobs, draft, tuple(sorted(faults, key=lambda fault: fault.at)))


class Injector:
    """Makes a schedule's faults happen as tokens come, and ends those that last."""

    def __init__(self, site: Site, plan: Schedule) -> None:
        self._site = site
        self._to_come = list(plan.faults)
        self._lasting: list[tuple[int, Callable[[], None]]] = []
        self.cancelled = False

    @property
    def all_begun(self) -> bool:
        return not self._to_come

    def progress(self, n_tokens: int) -> bool:
        """So many tokens have come; False: the client is to go away."""
        for ends_at, end in list(self._lasting):
            if n_tokens >= ends_at:
                self._lasting.remove((ends_at, end))
                end()
        while self._to_come and n_tokens >= self._to_come[0].at:
            self._begin(self._to_come.pop(0))
        return not self.cancelled

    def finish(self) -> None:
        """The generation is over: end what lasts."""
        for _, end in self._lasting:
            end()
        self._lasting.clear()

    def _begin(self, fault: Fault) -> None:
        site = self._site
        end: Callable[[], None] | None = None
        if fault.kind == "kill":
            site.restart(fault.what)
        elif fault.kind in ERRORS or fault.kind == "sampler":
            site.restart(fault.kind)
        elif fault.kind == "stall":
            site.stop(fault.what)
            end = lambda: site.resume(fault.what)  # noqa: E731
        elif fault.kind == "cut":
            site.link.cut()
            end = site.link.restore
        elif fault.kind == "hole":
            site.link.stall()
            end = site.link.restore
        elif fault.kind == "weather":
            site.link.conditions = WEATHER[int(fault.what)]
            end = lambda: setattr(site.link, "conditions", Conditions())  # noqa: E731
        elif fault.kind == "lie":
            site.liar.lie = fault.what
            end = lambda: setattr(site.liar, "lie", "")  # noqa: E731
        elif fault.kind == "mismatch":
            end = join_with_another_vocabulary(site.settings.endpoint("drafts"))
        elif fault.kind == "flap":
            flap(site.settings.endpoint("drafts"), fault.length)
        elif fault.kind == "cancel":
            self.cancelled = True
        if end is not None:
            self._lasting.append((fault.at + fault.length, end))


def run(site: Site, plan: Schedule, prompts: Sequence[str], patience_s: float = START_S) -> None:
    """One run of a schedule. patience_s: for everything to be as before."""
    injector = Injector(site, plan)
    readers = [
        Reader(
            site.stream(mode, prompts[index], draft=plan.draft if number == 0 else "auto"),
            injector.progress if number == 0 else lambda _: True,
        )
        for number, (mode, index) in enumerate(plan.jobs)
    ]
    with ThreadPoolExecutor(len(readers)) as pool:
        following = [pool.submit(reader.follow) for reader in readers]
        try:
            for one in following:
                one.result()
        finally:
            injector.finish()
    assert injector.all_begun or injector.cancelled or readers[0].error is not None, (
        "the generation ended before all faults had begun"
    )
    for number, (reader, job) in enumerate(zip(readers, plan.jobs, strict=True)):
        check(reader, site.plain[job], plan.allowed_errors, gone=number == 0 and plan.cancels)
    site.settle(patience_s)


def check(
    reader: Reader, plain: Completion, allowed_errors: set[str], *, n_tokens: int = N_TOKENS, gone: bool = False
) -> None:
    """What one client has got is plain decoding's, or the beginning of it before an allowed error or its own end."""
    tokens = tuple(reader.tokens)
    assert tokens == plain.tokens[: len(tokens)], f"other tokens than {plain.tokens}: {tokens}"
    if reader.error is not None:
        assert reader.error.code in allowed_errors, f"{reader.error.code}: {reader.error}"
    elif gone:
        assert reader.final is None, "the generation had ended before its client went away"
    else:
        assert len(tokens) == n_tokens
        assert reader.text == plain.text if n_tokens == N_TOKENS else plain.text.startswith(reader.text)
