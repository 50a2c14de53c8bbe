"""Log lines: one JSON object a line on stdout, for journald and for people with `jq`.

Under systemd each line starts with a `<6>`-style priority, which journald takes off again. No prompt, no generated
text and no local variables ever enter a log line.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any, Literal, cast

import structlog

LogLevel = Literal["debug", "info", "warning", "error"]

_PRIORITY = {"critical": "<2>", "error": "<3>", "warning": "<4>", "info": "<6>", "debug": "<7>"}

Logger = structlog.typing.FilteringBoundLogger


def configure(service: str, instance: str, level: LogLevel) -> Logger:
    """Set up this process's log and return a logger bound to the service and its instance."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(),
            *([_add_priority] if "JOURNAL_STREAM" in os.environ else []),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stdout),
        cache_logger_on_first_use=True,
    )
    return cast(Logger, structlog.get_logger().bind(service=service, instance=instance, pid=os.getpid()))


def _add_priority(_logger: object, method: str, line: str | bytes | MutableMapping[str, Any]) -> str:
    priority = _PRIORITY["error" if method == "exception" else method]
    return f"{priority}{line!s}"
