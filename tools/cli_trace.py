"""`draftwire trace`: the command. As in `tools/cli.py`, it imports what it needs when it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import DraftwireError, SettingsError
from tools.cli_options import ConfigOption, RunDirOption, SetOption, settings_of


def trace_command(
    session: Annotated[
        str, typer.Argument(metavar="[SESSION]", help="Its 16 digits, as in request_done and `draftwire workers`.")
    ] = "",
    last: Annotated[bool, typer.Option("--last", help="The session opened last (the default).")] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the trace goes; -: to stdout.")
    ] = Path("trace.json"),
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="How long a process may take to answer.")
    ] = 5.0,
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
) -> None:
    """Write a picture of what every process did for a generation.

    A Chrome / Perfetto trace of one of the last sessions, also while it runs; nothing needs to be switched on before.
    Run it on the target's host, and open the file at ui.perfetto.dev (nothing is uploaded) or chrome://tracing.
    docs/trace.md explains the picture. It holds times, positions and counts, no text and no token.

    A table says what each process gave and how far its clock is from the router's; who does not answer is named there
    and left out.

    \b
    Examples:
      draftwire trace                                       the last one, into trace.json
      draftwire trace 1f3a5c7e9b2d4f60 -o slow.json
      draftwire trace -o - | jq '[.traceEvents[] | select(.name == "round")] | length'
    """
    from rich.console import Console

    from tools.explain import parse_session
    from tools.trace import collect, print_collected, trace_json

    if session and last:
        raise SettingsError("a session and --last exclude each other", "give one of them")
    settings = settings_of(config, overrides, run_dir)
    collected = collect(settings, parse_session(session) if session else 0, timeout_s)
    text = json.dumps(trace_json(collected), separators=(",", ":")) + "\n"
    to_stdout = str(output) == "-"
    console = Console(markup=False, highlight=False, stderr=to_stdout)
    if to_stdout:
        sys.stdout.write(text)
    else:
        try:
            output.write_text(text, "utf-8")
        except OSError as error:
            raise DraftwireError(f"cannot write {output}: {error.strerror}", "choose another file with -o") from None
    print_collected(collected, console)
    if not to_stdout:
        console.print(f"{output}: open it at https://ui.perfetto.dev or chrome://tracing", soft_wrap=True)
