"""`draftwire keys`: this host's key, and those that may connect here."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Annotated

import typer

from tools.cli_options import CONTEXT, ConfigOption, SetOption, settings_of

keys_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings=CONTEXT)

DirOption = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="Directory of the keys (the setting network.keys)."),
]


@keys_app.callback()
def keys() -> None:
    """Make and list network keys: who may connect here.

    Sockets that leave a host are encrypted and authenticated (CURVE). Each host has one key; a host where something
    listens (the router, for draft workers elsewhere) has a list of the keys that may connect, each with its roles; a
    host that connects knows the other's key as "server". Changes of the list take effect within a second where
    something listens, also for who is connected; a new key of this host needs a restart of its services.

    \b
    draft      a draft worker: may connect to endpoints.drafts
    verifier, gateway, operator (the CLI)    may connect to endpoints.router, .tokenizer, .sampler as they need
    server     whom this host's services connect to

    \b
    Two hosts, in four commands:
      target$  draftwire keys init
      draft$   draftwire keys init
      target$  draftwire keys authorize draft-box 5d1e...  --role draft      what `draftwire keys host` printed there
      draft$   draftwire keys authorize target-box 9a0b... --role server
    """


def _directory(directory: Path | None, config: Path | None, overrides: list[str] | None) -> Path:
    return directory or settings_of(config, overrides, None).network.key_path


@keys_app.command("init")
def init(
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="This host's name; default: its host name.")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Replace the key that is there: others must learn it.")
    ] = False,
    directory: DirOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Make this host's key.

    \b
    Examples:
      sudo draftwire keys init
      draftwire keys init --dir ~/keys --name laptop
    """
    from shared.errors import SettingsError
    from shared.keys import host_key_path, new_host_key, write_host_key

    place = _directory(directory, config, overrides)
    present = host_key_path(place)
    if present is not None and not force:
        raise SettingsError(
            f"this host has a key already: {present}", "`draftwire keys host` prints it; --force replaces it"
        )
    key = new_host_key(name or socket.gethostname().partition(".")[0] or "host")
    path = write_host_key(place, key)
    typer.echo(f"wrote {path}")
    _print_host(key.name, key.public)


@keys_app.command("host")
def host(
    as_json: Annotated[bool, typer.Option("--json", help="Print name and public key as JSON.")] = False,
    directory: DirOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Print this host's public key, and what to type on the other host."""
    from shared.errors import SettingsError
    from shared.keys import load_host_key

    place = _directory(directory, config, overrides)
    key = load_host_key(place)
    if key is None:
        raise SettingsError(f"this host has no key in {place}", "make one: draftwire keys init")
    if as_json:
        typer.echo(json.dumps({"name": key.name, "public": key.public}))
    else:
        _print_host(key.name, key.public)


def _print_host(name: str, public: str) -> None:
    typer.echo(f"public key of {name}: {public}")
    typer.echo("on a host that it connects to as a draft worker:")
    typer.echo(f"  draftwire keys authorize {name} {public} --role draft")
    typer.echo("on a host whose services connect to it:")
    typer.echo(f"  draftwire keys authorize {name} {public} --role server")


@keys_app.command("authorize")
def authorize(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What that host is to be called here.")],
    public: Annotated[str, typer.Argument(metavar="KEY", help="Its public key, 64 hexadecimal digits.")],
    roles: Annotated[
        list[str],
        typer.Option(
            "--role", "-r", metavar="ROLE", help="draft, verifier, gateway, operator, server; may be given again."
        ),
    ],
    directory: DirOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Let another host's key in, or change its roles.

    \b
    Examples:
      sudo draftwire keys authorize draft-box 5d1e... --role draft
      sudo draftwire keys authorize draft-box 5d1e... --role draft --role operator
    """
    from shared.keys import authorize as add

    key = add(_directory(directory, config, overrides), name, public, roles)
    typer.echo(f"{key.name} may now connect as {', '.join(key.roles)}")


@keys_app.command("list")
def list_keys(
    as_json: Annotated[bool, typer.Option("--json", help="Print the keys as JSON, one object.")] = False,
    directory: DirOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """List the keys that are known here, revoked ones too."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from shared.errors import SettingsError
    from shared.keys import load_authorized, load_host_key

    place = _directory(directory, config, overrides)
    try:
        own = load_host_key(place)
    except SettingsError as error:  # the list is for everybody's eyes, the secret is not
        own = None
        typer.echo(f"this host's key: {error}", err=True)
    entries = load_authorized(place)
    if as_json:
        mine = None if own is None else {"name": own.name, "public": own.public}
        typer.echo(json.dumps({"host": mine, "keys": [asdict(key) for key in entries]}, indent=2))
        return
    if own is not None:
        typer.echo(f"this host: {own.name} {own.public}")
    if not entries:
        typer.echo(f"no other key is known in {place}")
        return
    table = Table()
    for heading in ("name", "roles", "public key", "added", "state"):
        table.add_column(heading, overflow="fold")
    for key in entries:
        state = f"revoked {key.revoked}" if key.revoked else "ok"
        table.add_row(key.name, ", ".join(key.roles), key.public, key.added, state)
    Console(markup=False, highlight=False).print(table)


@keys_app.command("revoke")
def revoke(
    which: Annotated[str, typer.Argument(metavar="NAME|KEY", help="Whose key is to be shut out.")],
    directory: DirOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Shut a key out, for good: also who is connected with it, within a second.

    It stays on record, so that its attempts are logged by name. That host can make a new key: keys init --force.
    """
    from shared.keys import revoke as shut_out

    key = shut_out(_directory(directory, config, overrides), which)
    typer.echo(f"{key.name} is revoked since {key.revoked}")
