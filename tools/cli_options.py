"""What commands of `draftwire` have in common: the options that say which settings are meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shared.settings import Settings
    from tools.fleet import Credentials

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="DRAFTWIRE_CONFIG",
        metavar="FILE",
        help="TOML file with this host's settings; default: /etc/draftwire/draftwire.toml, if it is there.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Override one setting; may be given again."),
]
RunDirOption = Annotated[
    Path | None,
    typer.Option("--run-dir", metavar="DIR", help="Private directory of this fleet's sockets (the setting run_dir)."),
]


ApiKeyOption = Annotated[
    str,
    typer.Option(
        "--api-key",
        envvar="DRAFTWIRE_API_KEY",
        metavar="KEY",
        help="The gateway's key for you. Others on this machine see it in the list of processes: rather a file.",
    ),
]
ApiKeyFileOption = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="A file that holds the key and nothing else.")
]
CacertOption = Annotated[
    Path | None,
    typer.Option("--cacert", metavar="FILE", help="With --url https://: PEM file of an issuer to believe in."),
]


def credentials_of(api_key: str, api_key_file: Path | None, cacert: Path | None) -> Credentials:
    """What these options say; a file wins over the variable. Errors: `SettingsError`."""
    from shared.errors import SettingsError
    from tools.fleet import Credentials

    if api_key_file is not None:
        try:
            api_key = api_key_file.read_text("ascii").strip()
        except OSError as error:
            raise SettingsError(f"cannot read {api_key_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            api_key = ""
        if not api_key or len(api_key.split()) > 1:
            raise SettingsError(f"{api_key_file} does not hold one API key", "write the key there and nothing else")
    return Credentials(api_key, cacert)


def all_overrides(overrides: list[str] | None, run_dir: Path | None) -> list[str]:
    result = list(overrides or ())
    if run_dir is not None:
        result.append(f"run_dir={json.dumps(str(run_dir))}")
    return result


def config_path(config: Path | None) -> Path | None:
    """The configuration file: the one given, else the host's; None where there is none. Errors: `SettingsError`."""
    from shared.errors import SettingsError
    from shared.settings import CONFIG_PATH

    if config is not None:
        return config
    try:
        CONFIG_PATH.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError(
            f"cannot read this host's configuration {CONFIG_PATH}: {error.strerror}", "use sudo, or give --config FILE"
        ) from None
    return CONFIG_PATH


def settings_of(config: Path | None, overrides: list[str] | None, run_dir: Path | None) -> Settings:
    from shared.settings import load_settings

    return load_settings(config_path(config), all_overrides(overrides, run_dir))
