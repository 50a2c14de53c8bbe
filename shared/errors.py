"""Errors that a person is meant to read: what is wrong with which thing, and what to do about it.

Invariant: every error that bad input can cause is a `DraftwireError`; the CLI prints it as one line and exits
non-zero, a service answers it as an `Error` message, the gateway as JSON in OpenAI's shape.
"""

from __future__ import annotations


class DraftwireError(Exception):
    """An error with a remedy.

    Args:
        message: what is wrong, naming the file, field, endpoint or value.
        remedy: what the reader can do about it; may be empty where nothing can be done.
        code: a short, stable, snake_case word for programs (`model_not_found`, `context_exceeded`, ...).
    """

    code = "error"

    def __init__(self, message: str, remedy: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class SettingsError(DraftwireError):
    """A configuration file, environment variable or flag is wrong."""

    code = "bad_settings"


class ModelError(DraftwireError):
    """A model file is missing, damaged, or of a kind that the chosen engine cannot run."""

    code = "bad_model"


class EngineError(DraftwireError):
    """An engine cannot be started, or refuses a batch (no slot, no room in the context)."""

    code = "engine_error"


class WireError(DraftwireError):
    """A message is malformed: wrong version, type, field, range or size."""

    code = "bad_message"


class RequestError(DraftwireError):
    """A request cannot be served as it stands (prompt too long, parameter out of range, nothing free)."""

    code = "bad_request"
