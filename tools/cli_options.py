"""What commands of `draftwire` have in common: the options that say which settings are meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shared.settings import Settings

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


def all_overrides(overrides: list[str] | None, run_dir: Path | None) -> list[str]:
    result = list(overrides or ())
    if run_dir is not None:
        result.append(f"run_dir={json.dumps(str(run_dir))}")
    return result


def config_path(config: Path | None) -> Path | None:
    """The configuration file: the one given, else the host's; None where there is none."""
    from shared.settings import CONFIG_PATH

    return CONFIG_PATH if config is None and CONFIG_PATH.exists() else config


def settings_of(config: Path | None, overrides: list[str] | None, run_dir: Path | None) -> Settings:
    from shared.settings import load_settings

    return load_settings(config_path(config), all_overrides(overrides, run_dir))
