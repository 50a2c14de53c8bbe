"""Generations through the gateway of a host, and what becomes of them."""

from __future__ import annotations

import threading
from typing import Any

from shared.errors import DraftwireError
from tests.pipeline.fleet import Completion, collect
from tests.systemd.containers import Host, until

PROMPT = "def fibonacci(n):\n    "
N_TOKENS = 48
SERVICES = ("gateway", "tokenizer", "router", "verifier", "sampler")


def complete(host: Host, **fields: Any) -> Completion:
    """One greedy completion, streamed. Errors: `DraftwireError`."""
    return collect(host.gateway().stream("/completion", _body(fields)))


def _body(fields: dict[str, Any]) -> dict[str, Any]:
    greedy = {"prompt": PROMPT, "n_predict": N_TOKENS, "temperature": 0.0, "ignore_eos": True}
    return {**greedy, "stream": True, "return_tokens": True, **fields}


class Running:
    """A completion on a thread of its own. completion, error: how it ended, one of them."""

    def __init__(self, host: Host, **fields: Any) -> None:
        self.completion: Completion | None = None
        self.error: DraftwireError | None = None
        self.n_tokens = 0
        self._gateway = host.gateway()
        self._fields = fields
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.completion = collect(self._watched())
        except DraftwireError as error:
            self.error = error

    def _watched(self) -> Any:
        for event in self._gateway.stream("/completion", _body(self._fields)):
            self.n_tokens += len(event["tokens"])
            yield event

    def reaches(self, n_tokens: int) -> None:
        """Wait until so many tokens have come."""
        until(lambda: self.n_tokens >= n_tokens or not self._thread.is_alive(), f"{n_tokens} tokens")
        assert self._thread.is_alive(), f"it ended early: {self.error or self.completion}"

    def end(self) -> None:
        """Wait for the end."""
        self._thread.join(120)
        assert not self._thread.is_alive()


def serves(host: Host) -> bool:
    """Whether the gateway says that it, and all it needs, is there."""
    try:
        return bool(host.gateway().get("/health").get("status") == "ok")
    except DraftwireError:
        return False


def wait_drafting(host: Host, worker: str) -> Completion:
    """Complete until a draft worker takes part; the completion in which it did."""

    def drafted() -> Completion | None:
        try:
            completion = complete(host, draft=worker)
        except DraftwireError:
            return None
        return completion if completion.final["timings"].get("draft_n", 0) > 0 else None

    done: Completion = until(drafted, f"{worker} to draft for {host.name}")
    return done
