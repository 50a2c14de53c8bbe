"""`draftwire units`: the systemd units of this host. As in `tools/cli.py`, they import what they need when they run."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.errors import DraftwireError, SettingsError
from tools.cli_options import CONTEXT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.units import Change, Host, Parts

units_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings=CONTEXT)

ROOT = Path("/")

PartsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PARTS]...", help="target (gateway, tokenizer, router, verifier, sampler), draft@NAME."),
]
ExecOption = Annotated[
    Path | None,
    typer.Option("--exec", metavar="PATH", help="The draftwire that the units run; default: this one."),
]
ConfigPathOption = Annotated[
    Path,
    typer.Option("--config", "-c", metavar="FILE", help="The settings that the services read."),
]
UserOption = Annotated[str, typer.Option("--user", metavar="NAME", help="The user that the services run as.")]
RootOption = Annotated[
    Path,
    typer.Option("--root", metavar="DIR", help="Work on the tree at DIR, and leave the running systemd alone."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would change, and change nothing.")]
YesOption = Annotated[
    bool, typer.Option("--yes", "-y", help="Do not ask: also files that were changed by hand (kept as FILE.old).")
]


@units_app.callback()
def units() -> None:
    """Make, install and remove the systemd units of this host.

    \b
    Examples:
      sudo draftwire units install target draft@model   a host with the target and one draft worker
      sudo draftwire units install draft@gpu0           a host that only drafts
      draftwire units install --dry-run                 do the units still fit the settings?
      sudo draftwire units uninstall
    """


@units_app.command()
def render(
    parts: PartsArgument = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Write them there instead.")] = None,
    executable: ExecOption = None,
    config: ConfigPathOption = Path("/etc/draftwire/draftwire.toml"),
    user: UserOption = "draftwire",
) -> None:
    """Print the units, or write them into a directory.

    Without PARTS: the target and every draft worker of the settings.

    \b
    Examples:
      draftwire units render
      draftwire units render target --to /tmp/units && systemd-analyze verify /tmp/units/*.service
      draftwire units render draft@gpu0 --exec /opt/draftwire/bin/draftwire
    """
    from tools.units import SYSTEM, Change, Parts, parse_parts
    from tools.units import render as render_units

    host, _ = _host(ROOT, executable, config, user)
    wanted = parse_parts(parts or ()) or Parts(True, tuple(host.settings.draft))
    for path, text in render_units(host, wanted).items():
        name = path.removeprefix(f"{SYSTEM}/") if path.startswith(SYSTEM) else "draftwire.sysusers.conf"
        if to is None:
            typer.echo(f"# ===== /{path}\n{text}")
        else:
            Change(to / name, "create", "", text).apply()
            typer.echo(to / name)


@units_app.command()
def install(
    parts: PartsArgument = None,
    executable: ExecOption = None,
    config: ConfigPathOption = Path("/etc/draftwire/draftwire.toml"),
    user: UserOption = "draftwire",
    root: RootOption = ROOT,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
) -> None:
    """Install the units of the parts that this host runs, and start them at boot.

    Makes the user draftwire, and an example /etc/draftwire/draftwire.toml if there is none; nothing is started. Run it
    again, without PARTS but with the same options, after changing endpoints, engines, run_dir or drain_s, which are
    rendered in, and after moving the installation: what is right already stays as it is.

    \b
    Examples:
      sudo draftwire units install target draft@model
      sudo draftwire units install                        bring what is installed up to date
      draftwire units install --dry-run                   show what that would change
      draftwire units install target --root /tmp/package --exec /opt/draftwire/bin/draftwire
    """
    from tools import units

    host, configured = _host(root, executable, config, user)
    wanted = units.parse_parts(parts or ()) | units.installed_parts(root)
    if not wanted:
        raise SettingsError("no units are installed here yet", "say what this host runs: target, draft@NAME, or both")
    changes = units.plan_install(root, host, wanted)
    if dry_run:
        _show(changes)
        if not configured:
            typer.echo(f"{units.under(root, config)}: would be made from the example")
        return
    _require_root(root, "install", parts, executable)
    if root == ROOT and not os.access(host.executable, os.X_OK):
        raise SettingsError(f"{host.executable} is no program", "give --exec PATH, that of an installed draftwire")
    chosen = _ask(changes, yes)
    for change in chosen:
        change.apply()
    _report(changes, chosen)
    made = units.write_example_config(root, config)
    typer.echo(f"{units.under(root, config)}: {'made from the example' if made else 'unchanged'}")
    if root == ROOT:
        changed = any(change.kind != "unchanged" for change in chosen)
        units.make_user(host.user, host.config)
        enabled = units.activate(changed, wanted)
        typer.echo(f"enabled: {' '.join(enabled)}" if enabled else "enabled: unchanged")
        _warn(host, wanted, configured or made)
        if changed or enabled:
            typer.echo(f"start, or apply the changes: systemctl restart {units.TARGET}")


@units_app.command()
def uninstall(
    purge: Annotated[bool, typer.Option("--purge", help="Remove /etc/draftwire too, with settings and keys.")] = False,
    root: RootOption = ROOT,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
) -> None:
    """Stop the services, and remove the units and all that `units install` made.

    Drop-ins of your own stay, and so does the user, who may own files.

    \b
    Examples:
      sudo draftwire units uninstall
      draftwire units uninstall --dry-run
      sudo draftwire units uninstall --purge --yes
    """
    import shutil

    from shared.settings import CONFIG_PATH
    from tools import units

    settings_folder = units.under(root, CONFIG_PATH.parent)
    changes = units.plan_uninstall(root)
    if dry_run:
        for change in changes:
            typer.echo(f"{change.path}: would be removed{' (changed by hand)' if change.touched else ''}")
        if purge and settings_folder.exists():
            typer.echo(f"{settings_folder}: would be removed")
        return
    _require_root(root, "uninstall", None, None)
    chosen = _ask(changes, yes)
    purge = purge and settings_folder.exists()
    if purge and not yes and not _confirm(f"Remove {settings_folder}, with settings and keys?"):
        purge = False
    if root == ROOT and (changes or units.enabled_units(root)):
        units.deactivate(sorted(units.enabled_units(root)))
    for change in chosen:
        change.apply()
        if change.path.parent.match("systemd/system/*.d") and not any(change.path.parent.iterdir()):
            change.path.parent.rmdir()
    _report(changes, chosen)
    if purge:
        shutil.rmtree(settings_folder)
        typer.echo(f"{settings_folder}: removed")
    if root == ROOT and chosen:
        units.call("systemctl", "daemon-reload")
    if not changes:
        typer.echo("nothing is installed")


def _host(root: Path, executable: Path | None, config: Path, user: str) -> tuple[Host, bool]:
    from tools.units import Host, default_executable, settings_for

    settings, configured = settings_for(config.absolute(), root)
    return Host(settings, (executable or default_executable()).absolute(), config.absolute(), user), configured


def _require_root(root: Path, command: str, parts: Sequence[str] | None, executable: Path | None) -> None:
    from tools.units import systemd_runs

    if root != ROOT:
        return
    if not systemd_runs():
        raise DraftwireError(
            "systemd does not run this machine", "--root DIR only writes the files; without systemd: draftwire up"
        )
    if os.geteuid() != 0:
        words = [os.path.abspath(sys.argv[0]), "units", command, *(parts or ())]
        words += ["--exec", str(executable)] if executable else []
        raise DraftwireError(f"units {command} needs root", f"sudo {shlex.join(words)}")


def _ask(changes: Sequence[Change], yes: bool) -> list[Change]:
    """The changes to make: of files that were changed by hand, those that the operator agrees to."""
    touched = [change for change in changes if change.touched]
    if yes or not touched:
        return list(changes)
    if not sys.stdin.isatty():
        names = ", ".join(str(change.path) for change in touched)
        raise DraftwireError(
            f"changed by hand: {names}", "move the change into a drop-in (systemctl edit), or overwrite it with --yes"
        )
    refused: set[Path] = set()
    for change in touched:
        typer.echo(change.diff(), nl=False)
        verb = "Remove" if change.kind == "remove" else "Overwrite"
        if not _confirm(f"{change.path} was changed by hand. {verb} it (a copy stays as .old)?"):
            refused.add(change.path)
    return [change for change in changes if change.path not in refused]


def _confirm(question: str) -> bool:
    if not sys.stdin.isatty():
        raise DraftwireError(f"this would ask: {question}", "answer with --yes, or run it in a terminal")
    return typer.confirm(question)


def _report(changes: Sequence[Change], chosen: Sequence[Change]) -> None:
    words = {"create": "created", "update": "updated", "remove": "removed", "unchanged": "unchanged"}
    paths = {change.path for change in chosen}
    for change in changes:
        typer.echo(f"{change.path}: {words[change.kind] if change.path in paths else 'kept, changed by hand'}")


def _show(changes: Sequence[Change]) -> None:
    for change in changes:
        if change.kind != "unchanged":
            typer.echo(change.diff(), nl=False)
    for change in changes:
        hand = ", although it was changed by hand" if change.touched else ""
        does = "unchanged" if change.kind == "unchanged" else f"would {change.kind}{hand}"
        typer.echo(f"{change.path}: {does}")


def _warn(host: Host, parts: Parts, configured: bool) -> None:
    from tools.units import access_problems, settings_for

    settings = settings_for(host.config)[0] if configured else host.settings
    for name in parts.drafts:
        if name not in settings.draft:
            known = ", ".join(settings.draft) or "none"
            _warning(f"{host.config} has no table [draft.{name}]", f"add it before starting; there are: {known}")
    for problem, remedy in access_problems(host, parts):
        _warning(problem, remedy)


def _warning(what: str, remedy: str) -> None:
    print(f"draftwire: warning: {what} ({remedy})", file=sys.stderr, flush=True)
