"""`draftwire generate`: one completion from a running fleet, and how tokens and figures are shown to a person."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from dataclasses import dataclass
from typing import Any, TextIO

from shared.errors import DraftwireError
from shared.settings import Settings
from tools.fleet import Credentials, open_gateway

_ACCEPTED, _PLAIN = "\x1b[4;32m", "\x1b[0m"


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What to ask for; None leaves a parameter to the gateway's default."""

    prompt: str
    max_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    draft: str = "auto"
    acceptance: str = "coupled"

    def body(self, stream: bool) -> dict[str, Any]:
        """The request for POST /completion."""
        body: dict[str, Any] = {
            "prompt": self.prompt,
            "n_predict": self.max_tokens,
            "stream": stream,
            "draft": self.draft,
            "acceptance": self.acceptance,
            "return_tokens": True,
        }
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            value = getattr(self, name)
            if value is not None:
                body[name] = value
        return body


def wants_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours, and the user has not asked for none (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class TextWriter:
    """Writes a completion as it comes; `marks` shows which tokens the draft had proposed.

    With colour, accepted tokens are green and underlined; without, runs of them stand in ‹ ›. A terminal gets no
    control characters that a model may have written.
    """

    def __init__(self, stream: TextIO, marks: bool, colour: bool) -> None:
        self._stream = stream
        self._marks = marks
        self._colour = colour
        self._safe = stream.isatty()
        self._inside = False
        self._empty = True

    def chunk(self, event: dict[str, Any]) -> None:
        """Write one chunk of the gateway's stream."""
        content, pieces = str(event.get("content", "")), event.get("pieces")
        if not self._marks or not isinstance(pieces, list) or "".join(pieces) != content:
            self._write(content, False)
        else:
            n_accepted = int(event.get("n_accepted", 0))
            self._write("".join(pieces[:n_accepted]), True)
            self._write("".join(pieces[n_accepted:]), False)
        self._stream.flush()

    def end(self) -> None:
        """Close what is open and end the line, if there is one."""
        self._switch(False)
        if not self._empty:
            self._stream.write("\n")
            self._stream.flush()

    def _write(self, text: str, accepted: bool) -> None:
        if text:
            self._empty = False
            self._switch(accepted)
            self._stream.write(printable(text) if self._safe else text)

    def _switch(self, accepted: bool) -> None:
        if accepted != self._inside:
            self._inside = accepted
            if self._colour:
                self._stream.write(_ACCEPTED if accepted else _PLAIN)
            else:
                self._stream.write("‹" if accepted else "›")


def printable(text: str) -> str:
    """Text without control characters other than line feed and tab."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def figures_line(final: dict[str, Any]) -> str:
    """One line for the final chunk of a completion: tokens, speed and what speculation did."""
    timings, draftwire = final.get("timings", {}), final.get("draftwire", {})
    line = (
        f"{timings.get('predicted_n', 0)} tokens in {timings.get('predicted_ms', 0) / 1000:.2f} s, "
        f"{timings.get('predicted_per_second', 0):.1f} tokens/s"
    )
    if "seed" in final:
        line += f", seed {final['seed']}"
    if not timings.get("draft_n"):
        return f"{line}; no proposals were verified"
    line += (
        f"; {draftwire.get('rounds', 0)} rounds, {timings.get('draft_n_accepted', 0)} of {timings['draft_n']} "
        f"proposals accepted ({100 * draftwire.get('acceptance_rate', 0):.0f} %), "
        f"{draftwire.get('mean_acceptance_length', 0):.2f} tokens a round"
    )
    return f"{line}; draft worker {draftwire['worker']}" if draftwire.get("worker") else line


def run_generate(
    settings: Settings,
    options: GenerateOptions,
    *,
    url: str,
    marks: bool,
    as_json: bool,
    credentials: Credentials | None = None,
) -> None:
    """Ask the gateway and print the answer. Errors: `DraftwireError`."""
    gateway = open_gateway(settings, settings.gateway.request_timeout_s + 10, url, credentials)
    if as_json:
        print(json.dumps(gateway.post("/completion", options.body(stream=False)), ensure_ascii=False, indent=2))
        return
    writer = TextWriter(sys.stdout, marks, wants_colour(sys.stdout))
    final: dict[str, Any] = {}
    try:
        for event in gateway.stream("/completion", options.body(stream=True)):
            writer.chunk(event)
            final = event
    except (DraftwireError, KeyboardInterrupt):
        writer.end()
        raise
    writer.end()
    print(f"draftwire: {figures_line(final)}", file=sys.stderr)
