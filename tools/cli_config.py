"""`draftwire config`: what a host's settings are, and where each came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.cli_options import CONTEXT, ConfigOption, RunDirOption, SetOption, all_overrides, config_path

if TYPE_CHECKING:
    from shared.settings import Effective

config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings=CONTEXT)


@config_app.callback()
def config_group() -> None:
    """Check and show the configuration of this host.

    One TOML file and its drop-ins, then the environment, then flags: later ones win.

    Without --config and $DRAFTWIRE_CONFIG it is /etc/draftwire/draftwire.toml, if there is one. Drop-ins are the files
    FILE.d/*.toml, by name, each on top of those before.
    """


def _load(config: Path | None, overrides: list[str] | None, run_dir: Path | None) -> Effective:
    from shared.settings import load_effective

    return load_effective(config_path(config), all_overrides(overrides, run_dir))


@config_app.command("check")
def check(config: ConfigOption = None, overrides: SetOption = None, run_dir: RunDirOption = None) -> None:
    """Say whether the configuration is good: keys, types and ranges, endpoints, and the network's keys.

    The first thing that is wrong is named with the file that it stands in, and the exit status is 78. Nothing is
    started, and no model is opened (`draftwire doctor` looks at those).

    \b
    Examples:
      draftwire config check
      draftwire config check --config new.toml && sudo cp new.toml /etc/draftwire/draftwire.toml
    """
    from shared.curve import check_endpoints

    effective = _load(config, overrides, run_dir)
    check_endpoints(
        effective.settings,
        lambda _event, **fields: typer.echo(f"warning: {fields['endpoint']}: {fields['reason']}", err=True),
    )
    read = ", ".join(map(str, effective.files)) or "no file: all defaults"
    typer.echo(f"good ({read})")


@config_app.command("show")
def show(
    effective: Annotated[
        bool, typer.Option("--effective", help="Every setting with where it came from, defaults too.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON: value, origin, and whether a reload changes it.")
    ] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
) -> None:
    """Print the settings that are not defaults; with --effective all of them.

    What says "live" changes with a reload (SIGHUP, systemctl reload); the rest needs a restart of the service.

    \b
    Examples:
      draftwire config show
      draftwire config show --effective | grep n_max
      DRAFTWIRE_VERIFIER__N_MAX=8 draftwire config show
    """
    from shared.settings import flatten

    loaded = _load(config, overrides, run_dir)
    rows = []
    for key, (value, live) in flatten(loaded.settings).items():
        origin = _origin(loaded, key)
        if effective or origin != "default":
            rows.append((key, list(value) if isinstance(value, tuple) else value, origin, live))
    if as_json:
        table = {key: {"value": value, "origin": origin, "live": live} for key, value, origin, live in rows}
        typer.echo(json.dumps(table, indent=2))
        return
    assignments = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value, _, _ in rows]
    width = min(60, max(map(len, assignments), default=0))
    for text, (_, _, origin, live) in zip(assignments, rows, strict=True):
        typer.echo(f"{text:<{width}}  # {origin}{', live' if live else ''}")
    if not rows:
        typer.echo("# all settings are defaults; --effective prints them")


def _origin(loaded: Effective, key: str) -> str:
    """Where a setting came from: the source of its own key, or the table that brought it along."""
    if key in loaded.origins:
        return loaded.origins[key]
    name = ".".join(key.split(".")[:2])
    written = next((source for leaf, source in loaded.origins.items() if leaf == name), None)
    return written or "default"
