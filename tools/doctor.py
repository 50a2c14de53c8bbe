"""`draftwire doctor`: what is right and wrong with this machine and configuration, each with a remedy.

Invariant: a check never ends the program; what it cannot find out is a finding too.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from shared.engine.interface import EngineSettings
from shared.errors import DraftwireError, SettingsError
from shared.settings import Settings, load_settings
from tools.fleet import open_gateway, router_status
from tools.supervisor import read_gateway_file

Level = Literal["OK", "INFO", "WARN", "FAIL"]
"""INFO: nothing is wrong, but there could be more."""

# Distribution and the module to import.
PACKAGES = (
    ("pyzmq", "zmq"),
    ("msgpack", "msgpack"),
    ("numpy", "numpy"),
    ("uvloop", "uvloop"),
    ("structlog", "structlog"),
    ("typer", "typer"),
    ("rich", "rich"),
    ("starlette", "starlette"),
    ("uvicorn", "uvicorn"),
    ("tokenizers", "tokenizers"),
)
OLDEST_PYTHON = (3, 10)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. remedy: what to do about it; empty when it is OK."""

    name: str
    level: Level
    detail: str
    remedy: str = ""


def run_doctor(config: Path | None, overrides: Sequence[str], as_json: bool) -> int:
    """Check everything and print the findings; exit status 1 if any is FAIL."""
    findings: list[Finding] = []
    for finding in examine(config, overrides):
        findings.append(finding)
        if not as_json:
            print(_line(finding), flush=True)
    n_failed = sum(finding.level == "FAIL" for finding in findings)
    if as_json:
        print(json.dumps({"ok": n_failed == 0, "checks": [asdict(finding) for finding in findings]}, indent=2))
    else:
        n_warned = sum(finding.level == "WARN" for finding in findings)
        print(f"{len(findings)} checks: {n_failed} failed, {n_warned} with a warning.")
    return 1 if n_failed else 0


def _line(finding: Finding) -> str:
    line = f"{finding.level:4}  {finding.name:18}  {finding.detail}"
    return f"{line}\n{'':26}-> {finding.remedy}" if finding.remedy else line


def examine(config: Path | None = None, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """All findings, in the order in which things depend on each other."""
    yield check_python()
    packages = list(check_packages())
    yield from packages
    if any(finding.level == "FAIL" for finding in packages):
        return
    yield from check_engines()
    yield from check_gpu()
    try:
        settings = load_settings(config, overrides)
    except DraftwireError as error:
        yield _failed("settings", error)
        return
    yield Finding("settings", "OK", str(config) if config is not None else "defaults (no --config)")
    checks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (check_models, check_sockets, check_fleet)
    for check in checks:
        yield from check(settings)


def check_python() -> Finding:
    """Whether this Python is new enough."""
    detail = f"{platform.python_version()} ({sys.executable}) on {sys.platform} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("python", "FAIL", detail, f"use Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer")
    return Finding("python", "OK", detail)


def check_packages() -> Iterator[Finding]:
    """Whether every required package can be imported."""
    found: list[str] = []
    for distribution, module in PACKAGES:
        try:
            importlib.import_module(module)
            found.append(f"{distribution} {metadata.version(distribution)}")
        except Exception as error:  # a broken binary package may raise anything
            yield Finding("packages", "FAIL", f"{distribution}: {error}", f"pip install --upgrade {distribution}")
    yield Finding("packages", "OK", ", ".join(found))


def check_engines() -> Iterator[Finding]:
    """Which engines run here."""
    from shared.engine.registry import available_engines

    for engine in available_engines():
        if engine.name == "cuda":
            continue  # `check_gpu` says more of it
        level: Level = "OK" if engine.usable else "WARN"
        yield Finding(f"engine {engine.name}", level, engine.reason, engine.remedy)


def check_gpu() -> Iterator[Finding]:
    """Whether the cuda engine can be used, and on which GPUs."""
    from shared.kernels.gpu import cuda_unavailable

    missing = cuda_unavailable()
    gpus, trouble = _describe_gpus()
    if missing is None:
        yield Finding("gpu", "OK", "; ".join(gpus) or f"usable, though not described: {trouble}")
        return
    detail = f"the cuda engine cannot be used: {' '.join(missing.message.split())}"
    if gpus:
        detail += f" (there is {'; '.join(gpus)})"
    yield Finding("gpu", "INFO", detail, missing.remedy or "none needed: models run on the CPU")


def _describe_gpus() -> tuple[list[str], str]:
    """A line for each GPU that nvidia-smi knows (name, memory, driver, compute capability), or why there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], "there is no nvidia-smi"
    query = [program, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not work ({error})"
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    gpus = [
        f"{name}, {memory}, driver {driver}, compute capability {capability}"
        for name, memory, driver, capability in (row for row in rows if len(row) == 4)
    ]
    if answer.returncode != 0 or not gpus:
        return [], "nvidia-smi finds no GPU"
    return gpus, ""


def check_models(settings: Settings) -> Iterator[Finding]:
    """Whether the models can be read, fit this machine or find their GPUs, and share one vocabulary."""
    wanted = {"target": settings.verifier.engine}
    wanted |= {f"draft {name}": draft.engine for name, draft in settings.draft.items() if draft.drafter == "model"}
    fingerprints: dict[str, str] = {}
    n_bytes = 0
    for name, engine in wanted.items():
        if engine.engine == "emulated":
            yield check_pace(name, engine)
        if engine.computing == "null":
            yield Finding(f"model {name}", "OK", "none (null engine)")
            continue
        try:
            size, fingerprints[name], detail = _model(engine.model)
        except DraftwireError as error:
            yield _failed(f"model {name}", error)
            continue
        yield Finding(f"model {name}", "OK", f"{engine.model}: {detail}")
        if engine.computing == "cuda":
            yield check_devices(name, engine.devices)
        else:
            n_bytes += size
    target = fingerprints.get("target")
    for name, fingerprint in fingerprints.items():
        if name == "target" or target is None:
            continue
        if fingerprint == target:
            yield Finding(f"vocabulary {name[6:]}", "OK", f"the target's ({fingerprint[:12]})")
        else:
            yield Finding(
                f"vocabulary {name[6:]}",
                "FAIL",
                f"{fingerprint[:12]} is not the target's {target[:12]}: the router would refuse this draft worker",
                f"draft with a model of the target's family, or set draft.{name[6:]}.drafter to ngram",
            )
    for name in (name for name, draft in settings.draft.items() if draft.drafter != "model"):
        yield Finding(f"draft {name}", "OK", f"{settings.draft[name].drafter}: needs no model")
    if not settings.draft:
        yield Finding(
            "drafts", "WARN", "no draft worker is configured: plain decoding only", "add a [draft.NAME] table"
        )
    yield check_memory(n_bytes, _available_bytes())
    yield check_cores(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def check_pace(name: str, engine: EngineSettings) -> Finding:
    """Whether the emulated engine knows how fast to be."""
    from shared.engine.emulated import find_pace

    try:
        pace = find_pace(engine)
    except DraftwireError as error:
        return _failed(f"pace {name}", error)
    detail = (
        f"{pace.first_row_ms:g} ms a pass, {pace.further_row_ms:g} for each further row, "
        f"prefill {pace.prefill_per_second:g} tokens/s"
    )
    return Finding(f"pace {name}", "OK", detail)


def check_devices(name: str, devices: Sequence[int]) -> Finding:
    """Whether the GPUs that a model is to be on can be used, and how much of their memory is free."""
    from shared.engine.cuda import placement
    from shared.kernels.gpu import CudaDevice

    found: list[str] = []
    try:
        placement.check_devices(devices)
        for index in devices:
            device = CudaDevice(index)
            free, total = (n / 2**30 for n in device.memory())
            found.append(f"{device.name}, {free:.1f} of {total:.1f} GiB free")
    except DraftwireError as error:
        return _failed(f"devices {name}", error)
    return Finding(f"devices {name}", "OK", "; ".join(found))


def _model(name: str) -> tuple[int, str, str]:
    """A model's size in bytes, its vocabulary's fingerprint, and a description."""
    from shared.model.gguf import GGUFFile, vocabulary_fingerprint
    from shared.model.names import resolve_model

    path = resolve_model(name)
    with GGUFFile.open(path) as file:
        size = sum(part.stat().st_size for part in file.paths)
        architecture = file.metadata.get("general.architecture", "unknown architecture")
        detail = f"{architecture}, {len(file.tensors)} tensors, {_megabytes(size)} ({path})"
        return size, vocabulary_fingerprint(file), detail


def check_memory(model_bytes: int, available_bytes: int | None) -> Finding:
    """Whether the models that are not on a GPU fit in the memory that is free now."""
    if available_bytes is None:
        return Finding("memory", "WARN", "how much memory is free cannot be found out here", "check it yourself")
    detail = f"{_megabytes(available_bytes)} available, models outside GPUs take {_megabytes(model_bytes)}"
    if model_bytes > available_bytes:
        return Finding("memory", "WARN", detail, "weights that do not fit are read from disk at every step: use less")
    return Finding("memory", "OK", detail)


def check_cores(n: int) -> Finding:
    """Whether target and draft have cores of their own."""
    if n < 2:
        return Finding("cpu", "WARN", "1 core: draft and target take turns on it", "draft on another machine")
    return Finding("cpu", "OK", f"{n} cores")


def _available_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def check_sockets(settings: Settings) -> Iterator[Finding]:
    """Whether the run directory and the endpoints can be used."""
    try:
        endpoints = [settings.endpoint(name) for name in ("router", "drafts", "tokenizer", "sampler")]
    except DraftwireError as error:
        yield _failed("sockets", error)
        return
    path = settings.run_path
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding("run directory", "FAIL", f"cannot write {existing}", "choose another with --run-dir")
    elif existing != path:
        yield Finding("run directory", "OK", f"{path} (will be created)")
    elif path.stat().st_uid != os.geteuid():
        yield Finding("run directory", "FAIL", f"{path} belongs to another user", "choose another with --run-dir")
    else:
        yield Finding("run directory", "OK", str(path))
    yield Finding("endpoints", "OK", ", ".join(endpoints))


def check_fleet(settings: Settings) -> Iterator[Finding]:
    """Whether a fleet runs here, and whether the gateway's port is free or its own."""
    running = False
    try:
        status = router_status(settings) if _may_listen(settings.endpoint("router")) else None
    except DraftwireError as error:
        yield _failed("fleet", error)
    else:
        running = status is not None
        if status is None:
            yield Finding("fleet", "OK", "none is running in this run directory")
        else:
            peers = ", ".join(
                f"{peer.role} {peer.instance}" + ("" if peer.alive else " (not alive)") for peer in status.peers
            )
            yield Finding("fleet", "OK", f"router up for {status.uptime_s} s, {status.n_sessions} sessions, {peers}")
            if not any(peer.role == "verifier" and peer.alive for peer in status.peers):
                yield Finding(
                    "verifier", "WARN", "none is registered at the router", "is it still loading? see its log"
                )
    yield _check_port(settings, running)


def _may_listen(endpoint: str) -> bool:
    return not endpoint.startswith("ipc://") or Path(endpoint[len("ipc://") :]).exists()


def _check_port(settings: Settings, running: bool) -> Finding:
    host, port = settings.gateway.host, settings.gateway.port
    name = "gateway port"
    own = None
    if running:
        try:
            own = read_gateway_file(settings.run_path)
            if own is not None:
                open_gateway(settings, 5).get("/health")
                return Finding(name, "OK", f"{own.url}, our gateway answers")
        except DraftwireError as error:
            return _failed(name, error, "WARN")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        settings.gateway.is_open(str(address[0]), settings.network.insecure)
        if port == 0:
            return Finding(name, "OK", "any free one")
        with socket.socket(family, kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except SettingsError as error:
        return _failed(name, error)
    except OSError as error:
        reason = error.strerror or str(error)
        return Finding(name, "FAIL", f"{host}:{port}: {reason}", "choose another with --set gateway.port=N (0: any)")
    return Finding(name, "OK", f"{host}:{port} is free")


def _failed(name: str, error: DraftwireError, level: Level = "FAIL") -> Finding:
    return Finding(name, level, " ".join(error.message.split()), error.remedy)


def _megabytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
