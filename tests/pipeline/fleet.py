"""A fleet of real processes for the pipeline tests, and what they ask of it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shared.model.names import resolve_model
from shared.settings import load_settings
from tools.fleet import Gateway, find_gateway, is_serving, router_status

START_S = 120
N_TOKENS = 32
CLI = ("-m", "tools.cli")
MODES: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.8}}


@dataclass(frozen=True)
class Completion:
    """What a client got: the tokens, the text, and the figures of the last event."""

    tokens: tuple[int, ...]
    text: str
    final: dict[str, Any]


class Process:
    """A child process whose output lines can be waited for.

    Args:
        program: what Python runs with the arguments.
    """

    def __init__(self, arguments: Sequence[str], program: Sequence[str] = CLI) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            # Where the tests run in the background of a shell, Ctrl-C is ignored, and children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self._queue.put(line)
        self._queue.put(None)

    def wait_for(self, text: str) -> str:
        """The next line with this text; fails when the process ends, or says nothing for too long."""
        while True:
            line = self._queue.get(timeout=START_S)
            if line is None:
                pytest.fail(f"the process ended before it said {text!r}:\n{''.join(self.lines[-30:])}")
            if text in line:
                return line

    def logged(self, event: str) -> dict[str, Any]:
        """The last log line of this kind so far."""
        line = next(line for line in reversed(self.lines) if f'"event": "{event}"' in line)
        entry: dict[str, Any] = json.loads(line[line.index("{") :])
        return entry

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> int:
        """SIGTERM, and wait for the end; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._reader.join(10)
            assert self.process.stdout is not None
            self.process.stdout.close()
        return status


class Fleet:
    """A running `draftwire up`, and draft workers started beside it."""

    def __init__(self, run_dir: Path, overrides: Sequence[str]) -> None:
        self.overrides = ["gateway.port=0", *overrides]
        self.run_dir = run_dir
        self.settings = load_settings(None, [*self.overrides, f'run_dir="{run_dir}"'], {})
        self.process = Process(["up", *self.options()])
        self.process.wait_for(": ready after")
        self.gateway = Gateway(find_gateway(self.settings), 120)

    def options(self, *more: str) -> list[str]:
        """This fleet's settings, and more, as command-line options."""
        return ["--run-dir", str(self.run_dir), *(part for o in (*self.overrides, *more) for part in ("--set", o))]

    @property
    def model_path(self) -> Path:
        return resolve_model(self.settings.verifier.engine.model)

    def wait_until_serving(self) -> None:
        """Wait until every part has found the others again."""
        deadline = time.monotonic() + START_S
        while not is_serving(self.settings) or not any(p.role == "draft" for p in self.status().peers):
            assert time.monotonic() < deadline, "".join(self.process.lines[-30:])
            time.sleep(0.1)

    def start_draft(self, instance: str, *overrides: str) -> Process:
        """A draft worker that the test owns; returns when the router has registered it."""
        draft = Process(["service", "draft", "--instance", instance, *self.options(*overrides)])
        draft.wait_for("router_connected")
        return draft

    def complete(self, prompt: str, **fields: Any) -> Completion:
        """One streamed completion of N_TOKENS tokens."""
        return collect(self.stream(prompt, **fields))

    def stream(self, prompt: str, **fields: Any) -> Iterator[dict[str, Any]]:
        body = {"prompt": prompt, "n_predict": N_TOKENS, "stream": True, "return_tokens": True, "ignore_eos": True}
        return self.gateway.stream("/completion", {**body, **fields})

    def status(self) -> Any:
        return router_status(self.settings, 5)

    def stop(self) -> int:
        return self.process.stop()


def collect(events: Iterator[dict[str, Any]]) -> Completion:
    """All events of a stream as one completion."""
    tokens: list[int] = []
    text: list[str] = []
    event: dict[str, Any] = {}
    for event in events:
        if not event["stop"]:
            tokens.extend(event["tokens"])
        text.append(event["content"])
    return Completion(tuple(tokens), "".join(text), event)


@contextmanager
def running_fleet(*overrides: str) -> Iterator[Fleet]:
    """A fleet in a run directory of its own (short: socket paths are limited), stopped and checked at the end."""
    with tempfile.TemporaryDirectory(prefix="dw-") as run_dir:
        fleet = Fleet(Path(run_dir), overrides)
        try:
            yield fleet
        finally:
            status = fleet.stop()
        assert status == 0, "".join(fleet.process.lines[-30:])
