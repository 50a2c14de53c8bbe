"""The typed configuration of a host: one TOML file or none, then the environment, then `--set` flags.

Invariant: a `Settings` is complete and valid; whoever holds one need not check it again.
"""

from __future__ import annotations

import difflib
import os
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from shared.engine.interface import EngineSettings
from shared.errors import SettingsError
from shared.fields import Range
from shared.logs import LogLevel
from shared.messages import MAX_RUN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENVIRONMENT_PREFIX = "DRAFTWIRE_"
DrafterKind = Literal["model", "ngram", "garbage"]


def default_run_dir() -> Path:
    """A private directory for the sockets of one user's fleet."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "draftwire" if base else Path(tempfile.gettempdir()) / f"draftwire-{os.getuid()}"


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """host, port: where HTTP is served; port 0 takes a free one. max_requests: generations in progress at a time.
    max_body_bytes: of a request. request_timeout_s: longest wait for the next token before the client gets an error.
    metrics: whether /metrics is served.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 8080
    max_requests: Annotated[int, Range(1, 10_000)] = 64
    max_body_bytes: Annotated[int, Range(1024, 1 << 30)] = 8 << 20
    request_timeout_s: Annotated[float, Range(1, 86_400)] = 600.0
    metrics: bool = True


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """heartbeat_ms: between pings; a peer not heard for deadline_beats of them is treated as dead.
    window: how many tokens a draft may run ahead of the last commit. max_sessions: at a time; more are refused.
    exploration: the share of new sessions that may try a draft worker whose figures are old. demotion_s: how long a
    draft worker that misbehaves is kept out the first time, then twice as long, and so on; 0: never.
    """

    heartbeat_ms: Annotated[int, Range(10, 60_000)] = 500
    deadline_beats: Annotated[int, Range(2, 100)] = 6
    window: Annotated[int, Range(1, MAX_RUN)] = 32
    max_sessions: Annotated[int, Range(1, 10_000)] = 64
    exploration: Annotated[float, Range(0, 1)] = 0.05
    demotion_s: Annotated[float, Range(0, 600)] = 2.0


@dataclass(frozen=True, slots=True)
class VerifierSettings:
    """engine: the target's. n_max: most proposals verified in one step of a session; 0 turns speculation off.
    length: "adaptive": as many of them as bring most tokens a second, by what steps have cost and proposals were worth
    so far, after a short wait where that is worth it; "fixed": all that are there.
    max_waiting: sessions that wait for a slot; more are refused.
    top_k_rows: how many logits of a row travel to the sampler. prefill_chunk: prompt tokens in one forward pass.
    """

    engine: EngineSettings = field(default_factory=EngineSettings)
    n_max: Annotated[int, Range(0, MAX_RUN)] = 16
    length: Literal["adaptive", "fixed"] = "adaptive"
    max_waiting: Annotated[int, Range(0, 10_000)] = 64
    top_k_rows: Annotated[int, Range(1, 4096)] = 128
    prefill_chunk: Annotated[int, Range(1, 8192)] = 256


@dataclass(frozen=True, slots=True)
class DraftSettings:
    """One draft worker. drafter: "model" (its engine drafts), "ngram" (prompt lookup), "garbage" (random tokens: for
    tests, and to measure what a useless draft costs). q_top_k: entries of a draft distribution under rejection
    sampling.
    """

    drafter: DrafterKind = "model"
    engine: EngineSettings = field(default_factory=lambda: EngineSettings(model="embedded:draft", role="draft"))
    q_top_k: Annotated[int, Range(1, 1024)] = 64


@dataclass(frozen=True, slots=True)
class Endpoints:
    """ZeroMQ endpoints. Empty: a socket file in the run directory. Only ipc:// and loopback tcp:// are open."""

    router: str = ""
    drafts: str = ""
    tokenizer: str = ""
    sampler: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a host's services need. draft: a table per draft worker, [draft.NAME]; none: one named "model".
    trace_dir: where each process writes its trace when it ends (`shared/trace.py`); empty: no trace.
    """

    run_dir: str = ""
    log_level: LogLevel = "info"
    trace_dir: str = ""
    drain_s: Annotated[float, Range(0, 3600)] = 10.0
    endpoints: Endpoints = field(default_factory=Endpoints)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    verifier: VerifierSettings = field(default_factory=VerifierSettings)
    draft: dict[str, DraftSettings] = field(default_factory=lambda: {"model": DraftSettings()})

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir) if self.run_dir else default_run_dir()

    def endpoint(self, name: Literal["router", "drafts", "tokenizer", "sampler"]) -> str:
        """A socket's endpoint; errors: `SettingsError` for one that would be open to the network."""
        configured = cast(str, getattr(self.endpoints, name))
        if configured:
            return _check_endpoint(f"endpoints.{name}", configured)
        path = str(self.run_path / f"{name}.sock")
        if len(path.encode()) > _MAX_SOCKET_PATH:
            raise SettingsError(
                f"the socket path {path} is longer than {_MAX_SOCKET_PATH} bytes", "choose a shorter run_dir"
            )
        return f"ipc://{path}"


_MAX_SOCKET_PATH = 103


def load_settings(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Read and check the configuration.

    Args:
        path: a TOML file; None means defaults.
        overrides: "section.key=value" with the value in TOML syntax (a bare word counts as a string); these win.
        environment: defaults to os.environ; DRAFTWIRE_SECTION__KEY=value overrides the file.

    Raises:
        SettingsError: names the file, the key and what is expected there.
    """
    table: dict[str, Any] = {}
    source = "the settings"
    if path is not None:
        source = str(path)
        try:
            table = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise SettingsError(f"no configuration file {path}", "create it, or leave --config away") from None
        except OSError as error:
            raise SettingsError(f"cannot read {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path} is not valid TOML: {error}") from None
    for name, text in sorted((os.environ if environment is None else environment).items()):
        if name.startswith(ENVIRONMENT_PREFIX) and name != f"{ENVIRONMENT_PREFIX}CONFIG":
            keys = name[len(ENVIRONMENT_PREFIX) :].lower().split("__")
            _set(table, keys, text, name)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise SettingsError(f"--set {override}: not of the form section.key=value")
        _set(table, key.split("."), text, f"--set {override}")
    return cast(Settings, _build(Settings(), table, source, ""))


def _set(table: dict[str, Any], keys: list[str], text: str, source: str) -> None:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"{source}: {key} is not a table")
        table = inner
    table[keys[-1]] = value


def _build(defaults: Any, table: Any, source: str, prefix: str) -> Any:
    """`defaults`, an instance of a settings class, with what the table says instead."""
    if not isinstance(table, dict):
        raise SettingsError(f"{source}: {prefix.rstrip('.') or 'the top level'} must be a table")
    hints = get_type_hints(type(defaults), include_extras=True)
    known = {f.name for f in fields(defaults)}
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            remedy = f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(sorted(known))}"
            raise SettingsError(f"{source}: unknown key {prefix}{key}", remedy)
    values = {
        key: _value(hints[key], getattr(defaults, key), value, source, prefix + key) for key, value in table.items()
    }
    return replace(defaults, **values)


def _value(hint: Any, default: Any, value: Any, source: str, key: str) -> Any:
    number: Any = value
    bounds: Range | None = None
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
        bounds = next((mark for mark in marks if isinstance(mark, Range)), None)
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _build(default, value, source, key + ".")
    if origin is dict:
        if not isinstance(value, dict):
            raise SettingsError(f"{source}: {key} must be a table")
        for name in value:
            if not _is_name(name):
                raise SettingsError(f"{source}: {key}.{name}: names are letters, digits, '-' and '_', at most 40")
        # Each entry is a table of its own, with the defaults of its class.
        return {name: _build(arguments[1](), entry, source, f"{key}.{name}.") for name, entry in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise SettingsError(f"{source}: {key} is {value!r}", f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            example = "[0]" if arguments[0] is int else '["text"]'
            raise SettingsError(f"{source}: {key} must be a list", f"such as {key.rsplit('.', 1)[-1]}={example}")
        return tuple(_value(arguments[0], None, entry, source, f"{key}[{i}]") for i, entry in enumerate(value))
    if origin in (Union, types.UnionType):
        return _value(arguments[0], default, value, source, key)
    accepted: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
    if not isinstance(value, accepted[hint]) or (isinstance(value, bool) and hint is not bool):
        raise SettingsError(f"{source}: {key} is {value!r}", f"it must be of type {hint.__name__}")
    if bounds is not None and not bounds.low <= number <= bounds.high:
        raise SettingsError(f"{source}: {key} is {value}", f"from {bounds.low:g} to {bounds.high:g}")
    return float(number) if hint is float else value


def _is_name(name: str) -> bool:
    return 0 < len(name) <= 40 and all(c.isascii() and (c.isalnum() or c in "-_") for c in name)


def _check_endpoint(key: str, endpoint: str) -> str:
    if endpoint.startswith("ipc://") and len(endpoint) > len("ipc://"):
        return endpoint
    if endpoint.startswith("tcp://"):
        host, separator, port = endpoint[len("tcp://") :].rpartition(":")
        if not separator or not port.isdigit() or not 0 < int(port) < 65536:
            raise SettingsError(f"{key}: {endpoint} is not tcp://HOST:PORT")
        if host.startswith("127.") or host in ("localhost", "[::1]"):
            return endpoint
        raise SettingsError(
            f"{key}: {endpoint} is open to the network and this version has no keys to protect it",
            "use ipc:// or a loopback address, and an SSH tunnel between hosts",
        )
    raise SettingsError(f"{key}: {endpoint} is no endpoint", "ipc://PATH or tcp://127.0.0.1:PORT")
