"""Commands for watching a running fleet, and for orders about its draft workers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.cli_options import CONTEXT, ConfigOption, RunDirOption, SetOption, settings_of

if TYPE_CHECKING:
    from rich.console import Console

    from shared.messages import Status
    from shared.settings import Settings

workers_app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings=CONTEXT,
)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The draft worker's, as `draftwire workers` shows it.")
]


def _console() -> Console:
    """Rows that fit on no line of 80 are not broken for a pipe."""
    from rich.console import Console

    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)


def status_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, one object.")] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
) -> None:
    """Say whether all is well, and what is there.

    A verdict in one line, then a row for each process with its version, how long it has been running and the sessions
    that it has. Run it where the router runs.

    \b
    Exit status:
      0  all is well; draft workers that an operator has drained or banned count as well
      1  it serves, but a draft worker is away or demoted, or versions differ
      2  it does not serve: gateway, tokenizer, router, verifier or sampler is missing

    \b
    Examples:
      draftwire status
      draftwire status --json | jq -r '.problems[]'
      draftwire status > /dev/null || mail -s "draftwire needs a look" root
    """
    from tools.status import EXIT_STATUS, gather, judge, print_report, report_json

    settings = settings_of(config, overrides, run_dir)
    report = judge(settings, gather(settings))
    if as_json:
        print(json.dumps(report_json(report), indent=2))
    else:
        print_report(report, _console())
    raise typer.Exit(EXIT_STATUS[report.level])


def top_command(
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, metavar="SECONDS", help="Look again so often.")
    ] = 1.0,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, metavar="N", help="End after so many times.")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
) -> None:
    """Watch generations and draft workers live, until Ctrl-C.

    In a pipe it prints one snapshot after the other. While the router is away it says so, and goes on.

    \b
    Examples:
      draftwire top
      draftwire top --interval 0.2
      draftwire top --count 2 | tail -n 20
    """
    from tools.fleet import router_status
    from tools.top import run_top

    settings = settings_of(config, overrides, run_dir)
    run_top(lambda: router_status(settings), _console(), interval, count)


@workers_app.callback()
def workers_command(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, one object.")] = False,
    watch: Annotated[
        float | None, typer.Option("--watch", min=0.1, metavar="SECONDS", help="Show it again so often, until Ctrl-C.")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
) -> None:
    """Show how good the draft workers are, and order about them.

    \b
    state      ok; demoted, with the reason: it gets no generations for a while; probation: one, to prove itself;
               away: not connected; drained, banned, pinned: an operator's orders
    tokens/s   drafted for one generation, with as many as it has now
    accepted   of its proposals whose predecessors were right, how many were right (of how many)
    speed-up   expected with it, relative to plain decoding, for one generation more; ?: a guess, not measured yet

    Orders (drain, ban, pin) stand until `allow` takes them back, also when worker or router restart. None of them
    changes a text.

    \b
    Examples:
      draftwire workers
      draftwire workers --watch 2
      draftwire workers --json | jq '.workers[] | {instance, state, speed_up}'
      draftwire workers drain box2
      draftwire workers allow box2
    """
    if context.invoked_subcommand is not None:
        context.obj = config, overrides, run_dir
        return
    from tools.workers import print_workers, show_workers, workers_json

    console = _console()

    def show(status: Status) -> None:
        if as_json:
            print(json.dumps(workers_json(status), indent=None if watch else 2), flush=True)
        else:
            if watch and console.is_terminal:
                console.clear()
            print_workers(status, console)

    show_workers(settings_of(config, overrides, run_dir), show, watch)


def _settings(
    context: typer.Context, config: Path | None, overrides: list[str] | None, run_dir: Path | None
) -> Settings:
    """The options may stand before the verb as well as after it."""
    outer_config, outer_overrides, outer_run_dir = context.obj
    return settings_of(config or outer_config, [*(outer_overrides or ()), *(overrides or ())], run_dir or outer_run_dir)


@workers_app.command()
def drain(
    context: typer.Context,
    name: NameArgument,
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
) -> None:
    """Give a draft worker no generations.

    Those that it has move on at once. It stays connected, and stays drained until `allow`, also when it or the router
    restarts. For updating its host, for one.

    \b
    Examples:
      draftwire workers drain box2
    """
    from tools.workers import order

    print(order(_settings(context, config, overrides, run_dir), name, "drain"))


@workers_app.command()
def ban(
    context: typer.Context,
    name: NameArgument,
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
) -> None:
    """Refuse a draft worker altogether.

    As drain, and the router takes nothing from it. Its process goes on, with its model loaded, and asks every 10 s
    whether it may come back. A ban is about a name: to keep a host out, revoke its key.

    \b
    Examples:
      draftwire workers ban box2
    """
    from tools.workers import order

    print(order(_settings(context, config, overrides, run_dir), name, "ban"))


@workers_app.command()
def pin(
    context: typer.Context,
    name: NameArgument,
    session: Annotated[
        str, typer.Option("--session", metavar="ID", help="Only this generation, by its 16 digits; it moves at once.")
    ] = "",
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
) -> None:
    """Give all new generations to one draft worker.

    Whatever their score says, unless the request names its worker or wants none. While the pinned one is away, full or
    demoted, others draft, and `draftwire workers` says so. Pinning another worker takes the place of this order.

    \b
    Examples:
      draftwire workers pin box2
      draftwire workers pin box2 --session 1f3a5c7e9b2d4f60
    """
    from tools.explain import parse_session
    from tools.workers import order

    number = parse_session(session) if session else 0
    print(order(_settings(context, config, overrides, run_dir), name, "pin", number))


@workers_app.command()
def allow(
    context: typer.Context,
    name: NameArgument,
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
) -> None:
    """Take back any order about a draft worker.

    A drained or banned one gets generations again at once; a pinned one only those that it is best for.

    \b
    Examples:
      draftwire workers allow box2
    """
    from tools.workers import order

    print(order(_settings(context, config, overrides, run_dir), name, "allow"))
