"""`draftwire doctor`: what it finds, and what it advises."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from shared.engine.interface import EngineSettings
from shared.errors import EngineError
from shared.settings import DraftSettings, GatewaySettings, Settings, VerifierSettings
from tools import doctor
from tools.doctor import (
    Finding,
    check_cores,
    check_engines,
    check_fleet,
    check_memory,
    check_models,
    check_sockets,
    examine,
)


def by_name(findings: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}  # type: ignore[attr-defined]


def set_gpu(monkeypatch: pytest.MonkeyPatch, missing: EngineError | None) -> None:
    """Make this machine one with a GPU (None), or one that lacks what `missing` says."""
    monkeypatch.setitem(sys.modules, "shared.kernels.gpu", SimpleNamespace(cuda_unavailable=lambda: missing))


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpu(monkeypatch, EngineError("there is no NVIDIA driver", "none needed for CPU use", "engine_unavailable"))


def set_nvidia_smi(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Make a shell script the only nvidia-smi."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_default_configuration_passes(tmp_path: Path) -> None:
    """In a working installation nothing is FAIL, and every finding that is not OK has a remedy."""
    findings = list(examine(None, [f'run_dir="{tmp_path}/run"', "gateway.port=0"]))
    assert [finding for finding in findings if finding.level == "FAIL"] == []
    assert all(finding.remedy for finding in findings if finding.level != "OK")
    assert {"python", "packages", "settings", "model target", "vocabulary model", "run directory"} <= set(
        by_name(findings)
    )


def test_json_and_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints all findings; the exit status says whether any is FAIL."""
    overrides = [f'run_dir="{tmp_path}/run"', "gateway.port=0"]
    assert doctor.run_doctor(None, overrides, as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert {"name": "settings", "level": "OK", "detail": "defaults (no --config)", "remedy": ""} in answer["checks"]
    assert doctor.run_doctor(None, [*overrides, "gateway.prot=1"], as_json=True) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert answer["checks"][-1]["level"] == "FAIL"
    assert "did you mean gateway.port?" in answer["checks"][-1]["remedy"]


def test_remedies_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """For people: a line for each thing, its remedy below, a count at the end."""
    assert doctor.run_doctor(None, ["log_level=loud"], as_json=False) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = next(i for i, line in enumerate(lines) if line.startswith("FAIL"))
    assert "log_level is 'loud'" in lines[failed]
    assert "one of 'debug'" in lines[failed + 1]
    assert "1 failed" in lines[-1]


def test_missing_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that cannot be imported is FAIL with the command that installs it; nothing after it is tried."""
    monkeypatch.setitem(sys.modules, "msgpack", None)
    findings = list(examine())
    failed = [finding for finding in findings if finding.level == "FAIL"]
    assert [finding.remedy for finding in failed] == ["pip install --upgrade msgpack"]
    assert "settings" not in by_name(findings)


def test_no_gpu_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA there is one line about it, which says what is missing and fails nothing."""
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    [finding] = doctor.check_gpu()
    assert (finding.name, finding.level) == ("gpu", "INFO")
    assert finding.detail == "the cuda engine cannot be used: there is no NVIDIA driver"
    assert finding.remedy == "none needed for CPU use"
    assert "engine cuda" not in by_name(check_engines())


def test_a_gpu_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU without CuPy: the reason, the GPU, and the remedy."""
    set_gpu(monkeypatch, EngineError("CuPy is not\ninstalled", "pip install cupy", "engine_unavailable"))
    set_nvidia_smi(monkeypatch, tmp_path, "echo 'NVIDIA H100, 81559 MiB, 550.90.07, 9.0'")
    [finding] = doctor.check_gpu()
    assert finding.level == "INFO"
    assert "CuPy is not installed (there is NVIDIA H100, 81559 MiB, driver 550" in finding.detail
    assert finding.remedy == "pip install cupy"


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Name, memory, driver and compute capability of each GPU, as nvidia-smi gives them when asked for these."""
    set_gpu(monkeypatch, None)
    columns = "--query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader"
    rows = "NVIDIA H200, 143771 MiB, 570.1, 9.0\\nNVIDIA A2, 15356 MiB, 570.1, 8.6\\n"
    set_nvidia_smi(monkeypatch, tmp_path, f"[ \"$*\" = '{columns}' ] && printf '{rows}'")
    [finding] = doctor.check_gpu()
    assert (finding.level, finding.detail) == (
        "OK",
        "NVIDIA H200, 143771 MiB, driver 570.1, compute capability 9.0; "
        "NVIDIA A2, 15356 MiB, driver 570.1, compute capability 8.6",
    )


@pytest.mark.parametrize("script", ["exit 9", "true", "echo 'unexpected'; exit 0"])
def test_gpu_without_a_description_is_usable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """A broken nvidia-smi does not make a usable GPU unusable."""
    set_gpu(monkeypatch, None)
    set_nvidia_smi(monkeypatch, tmp_path, script)
    [finding] = doctor.check_gpu()
    assert (finding.level, finding.detail) == ("OK", "usable, though not described: nvidia-smi finds no GPU")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda _path: None, "there is no model file"),
        (lambda path: path.write_bytes(b"GGUF\x03\x00"), "ends inside its header"),
        (lambda path: path.write_text("not a model"), "is not a GGUF"),
    ],
    ids=["missing", "truncated", "other"],
)
def test_model_that_cannot_be_read(tmp_path: Path, make: object, expected: str) -> None:
    """A missing, truncated or foreign target file is FAIL with a remedy; the draft's check goes on."""
    path = tmp_path / "model.gguf"
    make(path)  # type: ignore[operator]
    settings = Settings(verifier=VerifierSettings(engine=EngineSettings(model=str(path))))
    findings = by_name(check_models(settings))
    assert findings["model target"].level == "FAIL"
    assert expected in findings["model target"].detail
    assert findings["model target"].remedy
    assert findings["model draft model"].level == "OK"


def test_draft_with_another_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that the router would refuse is FAIL before anything runs."""
    monkeypatch.setattr(doctor, "_model", lambda name: (1, name.replace("embedded:", "") * 3, "a model"))
    finding = by_name(check_models(Settings()))["vocabulary model"]
    assert finding.level == "FAIL"
    assert "not the target's" in finding.detail
    assert "draft.model.drafter" in finding.remedy


def test_drafts_without_a_model() -> None:
    """An n-gram draft needs no model; no draft at all is worth a warning."""
    ngram = by_name(check_models(Settings(draft={"lookup": DraftSettings(drafter="ngram")})))
    assert ngram["draft lookup"].level == "OK"
    assert "vocabulary lookup" not in ngram
    assert by_name(check_models(Settings(draft={})))["drafts"].level == "WARN"


class FakeDevice:
    """GPU 0 and 1 are there."""

    def __init__(self, index: int) -> None:
        if index > 1:
            raise EngineError(f"there is no GPU {index}: 2 found", "indexes start at 0", "device_failed")
        self.name = f"GPU {index} (NVIDIA H100)"
        self._free = 10 * (index + 1)

    def memory(self) -> tuple[int, int]:
        return self._free << 30, 80 << 30


def devices_found(monkeypatch: pytest.MonkeyPatch, *devices: int, engine: str = "cuda") -> dict[str, Finding]:
    """What is found where target and draft are to be on these GPUs; each model has 1 GB."""
    gpu = SimpleNamespace(CudaDevice=FakeDevice)
    monkeypatch.setitem(sys.modules, "shared.kernels.gpu", gpu)
    monkeypatch.setattr(doctor, "_model", lambda _name: (10**9, "f" * 32, "a model"))
    on_gpus = EngineSettings(engine=engine, devices=devices)
    settings = Settings(verifier=VerifierSettings(on_gpus), draft={"model": DraftSettings(engine=on_gpus)})
    return by_name(check_models(settings))


def test_the_gpus_of_a_model_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the cuda engine: each GPU that its settings name, with its free memory; a model there takes no other."""
    found = devices_found(monkeypatch, 1, 0)
    assert (found["devices target"].level, found["devices target"].detail) == (
        "OK",
        "GPU 1 (NVIDIA H100), 20.0 of 80.0 GiB free; GPU 0 (NVIDIA H100), 10.0 of 80.0 GiB free",
    )
    assert found["devices draft model"].level == "OK"
    assert "take 0.0 MB" in found["memory"].detail
    found = devices_found(monkeypatch, 1, 0, engine="ik")
    assert "devices target" not in found
    assert "take 2.0 GB" in found["memory"].detail


def test_an_emulated_engine_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pace is told, or why it has none; its model is where the engine inside computes."""
    monkeypatch.setattr(doctor, "_model", lambda _name: (10**9, "f" * 32, "a model"))
    monkeypatch.setitem(sys.modules, "shared.kernels.gpu", SimpleNamespace(CudaDevice=FakeDevice))
    emulated = EngineSettings(engine="emulated", inner="cuda", profile="ling-1t")
    draft = EngineSettings(engine="emulated", profile="ling")
    settings = Settings(verifier=VerifierSettings(emulated), draft={"model": DraftSettings(engine=draft)})
    found = by_name(check_models(settings))
    assert (found["pace target"].level, found["pace target"].detail) == (
        "OK",
        "160 ms a pass, 62.4 for each further row, prefill 269 tokens/s",
    )
    assert found["pace draft model"].level == "FAIL"
    assert "ling-1t" in found["pace draft model"].remedy
    assert found["devices target"].level == "OK"
    assert "take 1.0 GB" in found["memory"].detail


@pytest.mark.parametrize(
    ("devices", "detail"), [((0, 2), "there is no GPU 2: 2 found"), ((0, 0), "names a GPU twice"), ((), "names no GPU")]
)
def test_gpus_that_cannot_be_used_fail(monkeypatch: pytest.MonkeyPatch, devices: tuple[int, ...], detail: str) -> None:
    """With a remedy; an engine that is to use them would not start."""
    finding = devices_found(monkeypatch, *devices)["devices target"]
    assert finding.level == "FAIL"
    assert detail in finding.detail
    assert finding.remedy


def test_memory_and_cores() -> None:
    """Models larger than the free memory, and a single core, are warnings."""
    assert check_memory(10, 20).level == "OK"
    assert check_memory(20, 10).level == "WARN"
    assert check_memory(20, None).level == "WARN"
    assert check_cores(1).level == "WARN"
    assert check_cores(2).level == "OK"


def test_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """A run directory under a file is FAIL; one that is to be created is OK and is not created by looking."""
    (tmp_path / "file").write_text("")
    assert by_name(check_sockets(Settings(run_dir=str(tmp_path / "file/run"))))["run directory"].level == "FAIL"
    assert by_name(check_sockets(Settings(run_dir=str(tmp_path / "new"))))["run directory"].level == "OK"
    assert not (tmp_path / "new").exists()
    too_long = by_name(check_sockets(Settings(run_dir=str(tmp_path / ("x" * 100)))))
    assert too_long["sockets"].level == "FAIL"


def test_port_that_is_taken(tmp_path: Path) -> None:
    """A gateway port that another program holds is FAIL and says how to take another."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        settings = Settings(run_dir=str(tmp_path), gateway=GatewaySettings(port=port))
        finding = by_name(check_fleet(settings))["gateway port"]
    assert finding.level == "FAIL"
    assert "in use" in finding.detail
    assert "gateway.port" in finding.remedy
    assert by_name(check_fleet(settings))["gateway port"].level == "OK"


def test_dead_router_is_no_fleet(tmp_path: Path) -> None:
    """A socket file that nobody serves any more counts as no running fleet, soon."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "router.sock"))
    finding = by_name(check_fleet(Settings(run_dir=str(tmp_path), gateway=GatewaySettings(port=0))))["fleet"]
    assert (finding.level, finding.detail) == ("OK", "none is running in this run directory")


def test_an_open_gateway_without_keys_is_a_failure(tmp_path: Path) -> None:
    """Such a gateway does not start, so its configuration is FAIL, with the remedy."""
    settings = Settings(run_dir=str(tmp_path), gateway=GatewaySettings(host="0.0.0.0", port=0))
    finding = by_name(check_fleet(settings))["gateway port"]
    assert finding.level == "FAIL"
    assert "open to the network" in finding.detail
    assert "api-keys" in finding.remedy
