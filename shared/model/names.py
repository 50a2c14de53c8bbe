"""Where models are: the names of the embedded pair, and paths.

Invariant: `resolve_model` returns a path to an existing file or raises a `ModelError` that says what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Final

from shared.errors import ModelError

EMBEDDED_PREFIX: Final = "embedded:"
EMBEDDED_MODELS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "embedded:target": "pymoe-64m-a18m-Q4_K_M.gguf",
        "embedded:draft": "pymoe-11m-a2m-draft-Q4_K_M.gguf",
    }
)
PROMPTS_FILE: Final = "prompts.jsonl"
COPY_PROMPTS_FILE: Final = "copy_prompts.jsonl"


@dataclass(frozen=True, slots=True)
class EmbeddedPrompt:
    """One prompt of the embedded set, which no training document contains.

    id: its number in the file.
    kind: "code" or "docs".
    source, path: the project and the file in it that the text was taken from.
    licence: of that project.
    text: the prompt.
    """

    id: int
    kind: str
    source: str
    path: str
    licence: str
    text: str


def resolve_model(name: str) -> Path:
    """The file of a model: "embedded:target", "embedded:draft", or a path ("~" is expanded).

    Raises:
        ModelError: no such embedded model, or no such file.
    """
    if name.startswith(EMBEDDED_PREFIX):
        file_name = EMBEDDED_MODELS.get(name)
        if file_name is None:
            raise ModelError(
                f"there is no embedded model {name!r}",
                f"use one of {', '.join(EMBEDDED_MODELS)}, or the path of a GGUF file",
                "model_not_found",
            )
        return _embedded_file(file_name)
    if not name:
        raise ModelError("the model's name is empty", "give embedded:target or a path to a GGUF", "model_not_found")
    try:
        path = Path(name).expanduser()
        exists, is_directory = path.exists(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{name!r} is no usable path: {error}", "give the path of a GGUF", "model_not_found") from None
    if not exists:
        raise ModelError(
            f"there is no model file {path}",
            f"give the path of a GGUF (the first file of a split one), or {', '.join(EMBEDDED_MODELS)}",
            "model_not_found",
        )
    if is_directory:
        raise ModelError(f"{path} is a directory", "give the GGUF file in it", "model_not_found")
    return path


def model_file_name(name: str) -> str:
    """The name of a model's file without its directory, of an embedded one too; for what people read."""
    return PurePath(EMBEDDED_MODELS.get(name, name)).name


def embedded_prompts() -> Path:
    """The file of the embedded prompts, one JSON object a line.

    Raises:
        ModelError: the installation lacks it.
    """
    return _embedded_file(PROMPTS_FILE)


def embedded_copy_prompts() -> Path:
    """The file of prompts whose continuation repeats much of them, in the same format.

    Raises:
        ModelError: the installation lacks it.
    """
    return _embedded_file(COPY_PROMPTS_FILE)


def load_prompts(path: Path | None = None) -> tuple[EmbeddedPrompt, ...]:
    """The prompts of a file in the embedded set's format; of the embedded set itself without a path.

    Raises:
        ModelError: the file is missing, or a line is no prompt (the line is named).
    """
    path = embedded_prompts() if path is None else path
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read the prompts in {path}: {error}", code="bad_prompts") from None
    return tuple(_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip())


def _prompt(line: str, where: str) -> EmbeddedPrompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ModelError(f"{where}: no JSON: {error}", code="bad_prompts") from None
    expected = {"id": int, "kind": str, "source": str, "path": str, "licence": str, "text": str}
    if not isinstance(value, dict):
        raise ModelError(f"{where}: a prompt is a JSON object with {', '.join(expected)}", code="bad_prompts")
    for key, kind in expected.items():
        if not isinstance(value.get(key), kind):
            raise ModelError(f"{where}: {key!r} must be a {kind.__name__}", code="bad_prompts")
    return EmbeddedPrompt(**{key: value[key] for key in expected})


def _embedded_file(file_name: str) -> Path:
    """The file in the installed package, else in the checkout."""
    here = Path(__file__).resolve()
    folders = (here.parent / "embedded", here.parents[2] / "deploy" / "models")
    for folder in folders:
        if (folder / file_name).is_file():
            return folder / file_name
    raise ModelError(
        f"this installation lacks the embedded file {file_name} (looked in {folders[0]} and {folders[1]})",
        "install Draftwire again from a complete checkout or wheel",
        "model_not_found",
    )
