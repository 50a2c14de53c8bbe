"""The typed configuration of a host: a TOML file and its drop-ins or none, then the environment, then `--set` flags.

Invariant: a `Settings` is complete and valid; whoever holds one need not check it again.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from shared.engine.interface import EngineSettings
from shared.errors import SettingsError
from shared.fields import LIVE, Live, Range
from shared.logs import LogLevel
from shared.messages import MAX_RUN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENVIRONMENT_PREFIX = "DRAFTWIRE_"
CONFIG_PATH = Path("/etc/draftwire/draftwire.toml")
"""Where the `draftwire` command looks for a host's configuration if none is given."""
KEY_DIR = Path("/etc/draftwire/keys")
NO_SETTINGS = ("DRAFTWIRE_CONFIG", "DRAFTWIRE_API_KEY")
"""Variables with the prefix that are options of commands."""
DrafterKind = Literal["model", "ngram", "garbage"]


def default_run_dir() -> Path:
    """A private directory for the sockets of one user's fleet."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "draftwire" if base else Path(tempfile.gettempdir()) / f"draftwire-{os.getuid()}"


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """host, port: where HTTP is served; port 0 takes a free one. max_requests: generations in progress at a time.
    max_body_bytes: of a request. request_timeout_s: longest wait for the next token before the client gets an error.
    api_keys: file of the keys that may ask (`shared/api_keys.py`); empty: nobody needs one. tls_cert, tls_key: PEM
    files, read once at the start; empty: plain HTTP. forwarded: believe X-Forwarded-For of a proxy on loopback.
    metrics: whether /metrics is served.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 8080
    max_requests: Annotated[int, Range(1, 10_000), LIVE] = 64
    max_body_bytes: Annotated[int, Range(1024, 1 << 30), LIVE] = 8 << 20
    request_timeout_s: Annotated[float, Range(1, 86_400), LIVE] = 600.0
    api_keys: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    forwarded: bool = False
    metrics: bool = True

    def is_open(self, address: str, insecure: bool) -> bool:
        """Whether the network reaches this address; errors: `SettingsError` where it must not without keys."""
        if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            return False
        if not self.api_keys and not insecure:
            raise SettingsError(
                f"gateway.host: {self.host} is open to the network, and anybody could ask without a key",
                "make keys with `draftwire api-keys add NAME --file FILE` and set gateway.api_keys to that file, or "
                "serve at 127.0.0.1; network.insecure = true opens it to everybody",
            )
        return True


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
    max_sessions: Annotated[int, Range(1, 10_000), LIVE] = 64
    exploration: Annotated[float, Range(0, 1), LIVE] = 0.05
    demotion_s: Annotated[float, Range(0, 600), LIVE] = 2.0


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
    """ZeroMQ endpoints. Empty: a socket file in the run directory. tcp:// beyond loopback needs keys."""

    router: str = ""
    drafts: str = ""
    tokenizer: str = ""
    sampler: str = ""


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """keys: directory of this host's keys (`shared/keys.py`); empty: /etc/draftwire/keys. server: name of the
    authorized key that TCP endpoints must prove to have; empty: the only one with the role "server", or, without
    one, this host's own. insecure: let sockets that are open to the network start without keys, with a warning at
    every start.
    """

    keys: str = ""
    server: str = ""
    insecure: bool = False

    @property
    def key_path(self) -> Path:
        return Path(self.keys) if self.keys else KEY_DIR


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a host's services need. draft: a table per draft worker, [draft.NAME]; none: one named "model".
    trace_dir: where each process writes its marks when it ends (`shared/trace.py`); empty: nowhere.
    """

    run_dir: str = ""
    log_level: Annotated[LogLevel, LIVE] = "info"
    trace_dir: str = ""
    drain_s: Annotated[float, Range(0, 3600), LIVE] = 10.0
    endpoints: Endpoints = field(default_factory=Endpoints)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    verifier: VerifierSettings = field(default_factory=VerifierSettings)
    draft: Annotated[dict[str, DraftSettings], LIVE] = field(default_factory=lambda: {"model": DraftSettings()})

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir) if self.run_dir else default_run_dir()

    def endpoint(self, name: Literal["router", "drafts", "tokenizer", "sampler"]) -> str:
        """A socket's endpoint, "ipc://PATH" or "tcp://HOST:PORT". Errors: `SettingsError`."""
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


@dataclass(frozen=True, slots=True)
class Effective:
    """Settings with where each came from. origins: a file, a variable or a flag by key ("verifier.n_max"); what is
    not in it is a default. files: those that were read, in order.
    """

    settings: Settings
    origins: Mapping[str, str]
    files: tuple[Path, ...]


def load_settings(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of `load_effective`."""
    return load_effective(path, overrides, environment).settings


def load_effective(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Effective:
    """Read and check the configuration.

    Args:
        path: a TOML file, whose drop-ins are the files PATH.d/*.toml by name; None means defaults.
        overrides: "section.key=value" with the value in TOML syntax (a bare word counts as a string); these win.
        environment: defaults to os.environ; DRAFTWIRE_SECTION__KEY=value overrides the files.

    Raises:
        SettingsError: names the file, the key and what is expected there.
    """
    layers = _Layers()
    files = () if path is None else (path, *drop_ins(path))
    for file in files:
        layers.merge(_read(file), str(file))
    for name, text in sorted((os.environ if environment is None else environment).items()):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in NO_SETTINGS:
            layers.set(name[len(ENVIRONMENT_PREFIX) :].lower().split("__"), text, name)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise SettingsError(f"--set {override}: not of the form section.key=value")
        layers.set(key.split("."), text, f"--set {override}")
    settings = cast(Settings, _build(Settings(), layers.table, layers, ""))
    return Effective(settings, layers.leaves(), files)


def drop_ins(path: Path) -> tuple[Path, ...]:
    """The files in PATH.d that end in .toml, by name. Errors: `SettingsError` when the directory cannot be read."""
    directory = path.with_name(f"{path.name}.d")
    try:
        return tuple(sorted(p for p in directory.iterdir() if p.suffix == ".toml"))
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise SettingsError(f"cannot read {directory}: {error.strerror}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", tomllib.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        raise SettingsError(f"no configuration file {path}", "create it, or leave --config away") from None
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None


class _Layers:
    """One table made of several sources, later ones on top, and which source each key came from last."""

    def __init__(self) -> None:
        self.table: dict[str, Any] = {}
        self._origins: dict[str, str] = {}

    def merge(self, table: Mapping[str, Any], source: str) -> None:
        """Put a whole table on top."""
        self._merge(self.table, table, source, "")

    def _merge(self, below: dict[str, Any], table: Mapping[str, Any], source: str, prefix: str) -> None:
        for key, value in table.items():
            self._origins[prefix + key] = source
            if isinstance(value, dict):
                inner = below.get(key)
                if not isinstance(inner, dict):
                    inner = below[key] = {}
                self._merge(inner, value, source, f"{prefix}{key}.")
            else:
                below[key] = value

    def set(self, keys: list[str], text: str, source: str) -> None:
        """Put one value, in TOML syntax or a bare word, in the place of what is there; also a whole table."""
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        table = self.table
        for n, key in enumerate(keys[:-1], 1):
            inner = table.setdefault(key, {})
            if not isinstance(inner, dict):
                raise SettingsError(f"{source}: {key} is not a table")
            table = inner
            self._origins[".".join(keys[:n])] = source
        table.pop(keys[-1], None)
        self._merge(table, {keys[-1]: value}, source, "".join(f"{key}." for key in keys[:-1]))

    def source(self, key: str) -> str:
        """Where a key came from, or "the settings" for the table as a whole."""
        return self._origins.get(key.rstrip("."), "the settings")

    def leaves(self) -> dict[str, str]:
        """The sources of values that are no tables."""

        def walk(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
            for key, value in table.items():
                if isinstance(value, dict) and value:
                    yield from walk(value, f"{prefix}{key}.")
                else:
                    yield prefix + key

        return {key: self._origins[key] for key in walk(self.table, "")}


def _build(defaults: Any, table: Any, layers: _Layers, prefix: str) -> Any:
    """`defaults`, an instance of a settings class, with what the table says instead."""
    if not isinstance(table, dict):
        raise SettingsError(f"{layers.source(prefix)}: {prefix.rstrip('.')} must be a table")
    hints = get_type_hints(type(defaults), include_extras=True)
    known = {f.name for f in fields(defaults)}
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            remedy = f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(sorted(known))}"
            raise SettingsError(f"{layers.source(prefix + key)}: unknown key {prefix}{key}", remedy)
    values = {
        key: _value(hints[key], getattr(defaults, key), value, layers, prefix + key) for key, value in table.items()
    }
    return replace(defaults, **values)


def _value(hint: Any, default: Any, value: Any, layers: _Layers, key: str) -> Any:
    number: Any = value
    source = layers.source(key.partition("[")[0])
    bounds: Range | None = None
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
        bounds = next((mark for mark in marks if isinstance(mark, Range)), None)
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _build(default, value, layers, key + ".")
    if origin is dict:
        if not isinstance(value, dict):
            raise SettingsError(f"{source}: {key} must be a table")
        for name in value:
            if not _is_name(name):
                raise SettingsError(f"{source}: {key}.{name}: names are letters, digits, '-' and '_', at most 40")
        # Each entry is a table of its own, with the defaults of its class.
        return {name: _build(arguments[1](), entry, layers, f"{key}.{name}.") for name, entry in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise SettingsError(f"{source}: {key} is {value!r}", f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            example = "[0]" if arguments[0] is int else '["text"]'
            raise SettingsError(f"{source}: {key} must be a list", f"such as {key.rsplit('.', 1)[-1]}={example}")
        return tuple(_value(arguments[0], None, entry, layers, f"{key}[{i}]") for i, entry in enumerate(value))
    if origin in (Union, types.UnionType):
        return _value(arguments[0], default, value, layers, key)
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
        if not separator or not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise SettingsError(f"{key}: {endpoint} is not tcp://HOST:PORT")
        return endpoint
    raise SettingsError(f"{key}: {endpoint} is no endpoint", "ipc://PATH or tcp://HOST:PORT")


def is_loopback(endpoint: str) -> bool:
    """Whether only this host's processes can reach an endpoint."""
    if not endpoint.startswith("tcp://"):
        return True
    host = endpoint[len("tcp://") :].rpartition(":")[0]
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name that may resolve to anything


# --- Reloading --------------------------------------------------------------------------------------------------------


def flatten(settings: Settings) -> dict[str, tuple[Any, bool]]:
    """Every setting by its key ("draft.model.engine.n_ctx"), with its value and whether it can change while running."""
    out: dict[str, tuple[Any, bool]] = {}

    def walk(value: Any, prefix: str, live: bool) -> None:
        hints = get_type_hints(type(value), include_extras=True)
        for f in fields(value):
            inner, key = getattr(value, f.name), prefix + f.name
            marked = live or any(isinstance(mark, Live) for mark in getattr(hints[f.name], "__metadata__", ()))
            if is_dataclass(inner):
                walk(inner, f"{key}.", live)
            elif isinstance(inner, dict):
                for name, entry in inner.items():
                    walk(entry, f"{key}.{name}.", live)
            else:
                out[key] = inner, marked

    walk(settings, "", False)
    return out


def changed_keys(old: Settings, new: Settings) -> dict[str, bool]:
    """The keys that two settings differ in, and whether each can change while services run.

    A draft worker's table that comes or goes can, by the key of the table; what stands in one that stays cannot.
    """
    before, after = flatten(old), flatten(new)
    tables = {f"draft.{name}": True for name in old.draft.keys() ^ new.draft.keys()}
    out = dict(tables)
    for key in before.keys() | after.keys():
        if before.get(key) != after.get(key) and ".".join(key.split(".")[:2]) not in tables:
            out[key] = (after.get(key) or before[key])[1]
    return dict(sorted(out.items()))


def with_live(old: Settings, new: Settings) -> Settings:
    """`old` with what can change while services run as in `new`."""

    def merge(before: Any, after: Any) -> Any:
        hints = get_type_hints(type(before), include_extras=True)
        values: dict[str, Any] = {}
        for f in fields(before):
            mine, theirs = getattr(before, f.name), getattr(after, f.name)
            if any(isinstance(mark, Live) for mark in getattr(hints[f.name], "__metadata__", ())):
                values[f.name] = (
                    {name: mine.get(name, entry) for name, entry in theirs.items()}
                    if isinstance(mine, dict)
                    else theirs
                )
            elif is_dataclass(mine):
                values[f.name] = merge(mine, theirs)
        return replace(before, **values)

    return cast(Settings, merge(old, new))
