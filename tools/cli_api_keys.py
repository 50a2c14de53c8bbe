"""`draftwire api-keys`: who may ask the gateway. As in `tools/cli.py`, commands import what they need when they run."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.errors import SettingsError
from tools.cli_options import CONTEXT, ConfigOption, SetOption, settings_of

if TYPE_CHECKING:
    from shared.api_keys import ApiKey, KeyLimits

api_keys_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings=CONTEXT)

FileOption = Annotated[
    Path | None,
    typer.Option("--file", "-f", metavar="FILE", help="The file of keys; default: the setting gateway.api_keys."),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, - and _; it is in the log.")]
MaxRequestsOption = Annotated[
    int | None, typer.Option("--max-requests", metavar="N", help="Most requests at a time; 0: no limit.")
]
RequestsOption = Annotated[
    int | None, typer.Option("--requests-per-minute", metavar="N", help="Most requests a minute; 0: no limit.")
]
TokensOption = Annotated[
    int | None,
    typer.Option("--tokens-per-minute", metavar="N", help="Most tokens a minute, of prompts and answers; 0: no limit."),
]
ExpiresOption = Annotated[
    str | None,
    typer.Option(
        "--expires", metavar="WHEN", help="2027-01-31 (at 00:00 UTC), 2027-01-31T18:00:00+01:00, 90d or never."
    ),
]


@api_keys_app.callback()
def api_keys() -> None:
    """Say who may ask the gateway, and how much.

    The file holds hashes, not keys. A running gateway sees a change within a second, and needs no restart.

    \b
    Examples:
      draftwire api-keys add alice --file /etc/draftwire/api-keys.toml
      draftwire api-keys add ci --requests-per-minute 30 --expires 90d
      draftwire api-keys list
      draftwire api-keys limits alice --tokens-per-minute 20000
      draftwire api-keys revoke alice
    """


@api_keys_app.command("add")
def add_command(
    name: NameArgument,
    file: FileOption = None,
    max_requests: MaxRequestsOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    expires: ExpiresOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Make a key and print it, this once.

    The key goes to stdout, everything else to stderr.

    \b
    Examples:
      draftwire api-keys add alice --file /etc/draftwire/api-keys.toml
      draftwire api-keys add ci --max-requests 2 --tokens-per-minute 20000 --expires 2027-01-31
      draftwire api-keys add laptop > ~/.config/draftwire-key
    """
    from shared.api_keys import ApiKey, KeyLimits, changed_keys, hash_key, is_name, new_key

    if not is_name(name):
        raise SettingsError(f"{name!r} is no name for a key", "letters, digits, '-' and '_', at most 40")
    path = _path(file, config, overrides)
    now = _now()
    ends = _time(expires, now)
    limits = _limits(KeyLimits(), max_requests, requests_per_minute, tokens_per_minute)
    key = new_key()
    with changed_keys(path) as keys:
        if name in keys and keys[name].revoked is None:
            remedy = f"choose another name, or revoke it: draftwire api-keys revoke {name}"
            raise SettingsError(f"{path} has a key {name} already", remedy)
        keys[name] = ApiKey(name, hash_key(key.encode()), now, ends, None, limits)
    print(key)
    print(f"draftwire: key {name} is in {path}, as a hash: this is the only time that it is shown", file=sys.stderr)


@api_keys_app.command("list")
def list_command(
    file: FileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Show the keys by name, with their limits.

    \b
    Examples:
      draftwire api-keys list
      draftwire api-keys list --file /etc/draftwire/api-keys.toml --json | jq '.[] | select(.state == "ok") | .name'
    """
    from shared.api_keys import read_keys

    path = _path(file, config, overrides)
    now = _now()
    entries = [_entry(key, now) for key in read_keys(path).values()]
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    header = ("name", "state", "created", "expires", "at a time", "requests/min", "tokens/min")
    rows = [header, *(tuple(str(value or "-") for value in entry.values()) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@api_keys_app.command("revoke")
def revoke_command(
    name: NameArgument, file: FileOption = None, config: ConfigOption = None, overrides: SetOption = None
) -> None:
    """Let a key open nothing any more.

    What it has running goes on. The name stays in the file, so that the log can say who still tries; it may be given
    to a new key.

    \b
    Examples:
      draftwire api-keys revoke alice
      draftwire api-keys revoke alice --file /etc/draftwire/api-keys.toml
    """
    from dataclasses import replace

    from shared.api_keys import changed_keys

    path = _path(file, config, overrides)
    with changed_keys(path) as keys:
        key = _known(keys, name, path)
        if key.revoked is not None:
            raise SettingsError(f"key {name} is revoked already", "it opens nothing")
        keys[name] = replace(key, revoked=_now())
    print(f"draftwire: key {name} is revoked; a running gateway knows within a second", file=sys.stderr)


@api_keys_app.command("limits")
def limits_command(
    name: NameArgument,
    file: FileOption = None,
    max_requests: MaxRequestsOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    expires: ExpiresOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Change what a key may have; what is not given stays.

    \b
    Examples:
      draftwire api-keys limits alice --tokens-per-minute 20000
      draftwire api-keys limits alice --max-requests 0 --expires never
    """
    from dataclasses import replace

    from shared.api_keys import changed_keys

    if all(value is None for value in (max_requests, requests_per_minute, tokens_per_minute, expires)):
        raise SettingsError("no limit given", "such as --max-requests 4, or --expires never")
    path = _path(file, config, overrides)
    with changed_keys(path) as keys:
        key = _known(keys, name, path)
        limits = _limits(key.limits, max_requests, requests_per_minute, tokens_per_minute)
        ends = key.expires if expires is None else _time(expires, _now())
        keys[name] = replace(key, limits=limits, expires=ends)


def _path(file: Path | None, config: Path | None, overrides: list[str] | None) -> Path:
    if file is not None:
        return file
    configured = settings_of(config, overrides, None).gateway.api_keys
    if not configured:
        raise SettingsError("which file of API keys?", "give --file FILE, or set gateway.api_keys")
    return Path(configured)


def _known(keys: dict[str, ApiKey], name: str, path: Path) -> ApiKey:
    if name not in keys:
        raise SettingsError(f"{path} has no key {name}", f"known there: {', '.join(keys) or 'none'}")
    return keys[name]


def _limits(before: KeyLimits, *given: int | None) -> KeyLimits:
    from dataclasses import replace

    from shared.api_keys import LIMIT_BOUNDS

    changes = {field: value for field, value in zip(LIMIT_BOUNDS, given, strict=True) if value is not None}
    for field, value in changes.items():
        if not LIMIT_BOUNDS[field].low <= value <= LIMIT_BOUNDS[field].high:
            option = "--" + field.replace("_", "-")
            raise SettingsError(f"{option} is {value}", f"from 0 to {LIMIT_BOUNDS[field].high:.0f}")
    return replace(before, **changes)


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)


def _time(text: str | None, now: datetime) -> datetime | None:
    """When a key ends; None: never. Errors: `SettingsError`."""
    if text in (None, "never"):
        return None
    assert text is not None
    try:
        if text.endswith("d"):
            when = now + timedelta(days=int(text[:-1]))
        else:
            when = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)
            when = when.replace(tzinfo=timezone.utc) if when.tzinfo is None else when.astimezone(timezone.utc)
    except (ValueError, OverflowError):
        raise SettingsError(f"--expires is {text!r}", "2027-01-31, 2027-01-31T18:00:00Z, 90d or never") from None
    if when <= now:
        raise SettingsError(f"--expires is {text!r}, which is over", "give a time to come")
    return when.replace(microsecond=0)


def _entry(key: ApiKey, now: datetime) -> dict[str, str | int]:
    from shared.api_keys import format_time

    return {
        "name": key.name,
        "state": key.state(now),
        "created": format_time(key.created),
        "expires": format_time(key.expires) if key.expires is not None else "",
        "max_requests": key.limits.max_requests,
        "requests_per_minute": key.limits.requests_per_minute,
        "tokens_per_minute": key.limits.tokens_per_minute,
    }
