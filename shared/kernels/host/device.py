"""The CPU as a device: kernels compiled with g++ against emulator.h, in NumPy memory.

Everything happens at once, in the caller's thread. What a GPU would pass over in silence is an error here: see
emulator.h, and `HostDevice.launch` for writes past a buffer.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.errors import EngineError
from shared.kernels.device import AnyArray, Argument, Buffer, Device, Graph, Kernel
from shared.kernels.launching import (
    HOST_SOURCES,
    SOURCES,
    StagingArrays,
    check_copy,
    check_device_copy,
    fingerprint,
    grid_of,
    include_folders,
    pack,
)

ALIGNMENT = 256
POISON = 0xA5
# Bytes before and after each buffer that no kernel may write.
MARGIN = 4096

# The emulator keeps a launch's state in static variables.
_running = threading.Lock()


class _Memory:
    """The bytes of a buffer between two margins."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = np.full(MARGIN + ALIGNMENT + nbytes + MARGIN, POISON, np.uint8)
        base = self._bytes.ctypes.data
        start = -(-(base + MARGIN) // ALIGNMENT) * ALIGNMENT - base
        self.address = base + start
        self._margins = self._bytes[start - MARGIN : start], self._bytes[start + nbytes : start + nbytes + MARGIN]

    def intact(self) -> bool:
        return all(bool((margin == POISON).all()) for margin in self._margins)


@dataclass(frozen=True, slots=True)
class HostKernel:
    """A kernel in a shared library. parameters: a letter for each, as in `launching.NAMES`."""

    name: str
    parameters: str
    run: Callable[..., bytes | None]


class HostGraph:
    """Recorded calls."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self._calls = calls

    def replay(self) -> None:
        for call in self._calls:
            call()


class HostDevice:
    """See `shared.kernels.device.Device` and the module's docstring.

    Args:
        sources: the folder of the kernels' files.
        n_multiprocessors: how many it claims to have, for kernels whose grid depends on it.
    """

    def __init__(self, sources: Path = SOURCES, n_multiprocessors: int = 4) -> None:
        self.name = "host"
        self.n_multiprocessors = n_multiprocessors
        self._sources = sources
        self._kernels: dict[tuple[str, str], HostKernel] = {}
        self._staging = StagingArrays()
        self._record: list[Callable[[], object]] | None = None

    def memory(self) -> tuple[int, int]:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free, total = (int(fields[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
        return free, total

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        self._refuse_in_capture("allocate")
        kind = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        try:
            memory = _Memory(nbytes)
        except MemoryError:
            message = f"the host has no memory for another {nbytes / 2**30:.2f} GiB"
            raise EngineError(message, "a smaller model or context fits", code="out_of_memory") from None
        return Buffer(memory.address, shape, kind, memory)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        buffer = self.empty(shape, dtype)
        self.fill(buffer, 0)
        return buffer

    def staging(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> AnyArray:
        self._refuse_in_capture("allocate")
        kind = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        return self._staging.add(np.zeros(nbytes, np.uint8), shape, kind)

    def write(self, target: Buffer, source: AnyArray) -> None:
        check_copy(target, source)
        self._check_recordable(source)
        self._do(lambda: ctypes.memmove(target.address, source.ctypes.data, source.nbytes))

    def read(self, target: AnyArray, source: Buffer) -> None:
        check_copy(source, target)
        self._check_recordable(target)
        self._do(lambda: ctypes.memmove(target.ctypes.data, source.address, source.nbytes))

    def copy_to(self, device: Device, target: Buffer, source: Buffer) -> None:
        assert isinstance(device, HostDevice)
        check_device_copy(target, source)
        self._refuse_in_capture("copy to another device")
        device._refuse_in_capture("copy from another device")
        ctypes.memmove(target.address, source.address, source.nbytes)

    def fill(self, target: Buffer, byte: int) -> None:
        self._do(lambda: ctypes.memset(target.address, byte, target.nbytes))

    def kernel(self, file: str, name: str) -> HostKernel:
        self.prepare([(file, name)])
        return self._kernels[file, name]

    def prepare(self, kernels: Sequence[tuple[str, str]]) -> None:
        files: dict[str, list[str]] = {}
        for file, name in dict.fromkeys(kernels):
            if (file, name) not in self._kernels:
                files.setdefault(file, []).append(name)
        if not files:
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for file, paths in zip(files, pool.map(self._build, files, files.values()), strict=True):
                for name, path in zip(files[file], paths, strict=True):
                    self._kernels[file, name] = _load(path, name)

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], block: int, arguments: Sequence[Argument], shared: int = 0
    ) -> None:
        """See `Device.launch`. A write just outside a buffer that is an argument is an error."""
        assert isinstance(kernel, HostKernel)
        x, y, z = grid_of(grid, block)
        pointers, values = pack(kernel.name, kernel.parameters, arguments)
        kept = tuple(arguments)

        def run(_values: object = values) -> None:
            with _running:
                problem = kernel.run(x, y, z, block, shared, pointers)
            if problem is not None:
                raise EngineError(f"{kernel.name}: {problem.decode()}", code="device_failed")
            for i, argument in enumerate(kept):
                memory = argument.owner if isinstance(argument, Buffer) else None
                if isinstance(memory, _Memory) and not memory.intact():
                    message = f"{kernel.name} wrote outside the buffer of argument {i}"
                    raise EngineError(message, code="device_failed")

        self._do(run)

    def blocks_per_multiprocessor(self, kernel: Kernel, block: int, shared: int = 0) -> int:  # noqa: ARG002
        """What threads and shared memory allow on an H100; registers are not known here."""
        return min(2048 // block, (228 << 10) // (shared + 1024))

    def capture(self, record: Callable[[], None]) -> Graph:
        self._refuse_in_capture("capture")
        calls: list[Callable[[], object]] = []
        self._record = calls
        try:
            record()
        finally:
            self._record = None
        return HostGraph(calls)

    def synchronize(self) -> None:
        self._refuse_in_capture("wait")

    def close(self) -> None:
        self._kernels.clear()

    def _do(self, call: Callable[[], object]) -> None:
        if self._record is None:
            call()
        else:
            self._record.append(call)

    def _refuse_in_capture(self, what: str) -> None:
        if self._record is not None:
            raise ValueError(f"cannot {what} inside a capture")

    def _check_recordable(self, array: AnyArray) -> None:
        if self._record is not None and array not in self._staging:
            raise ValueError("a captured copy needs staging memory")

    def _build(self, file: str, names: Sequence[str]) -> list[Path]:
        """The libraries of a file's kernels; those that the cache lacks are compiled together."""
        if not (self._sources / file).is_file():
            raise EngineError(f"there is no kernel file {self._sources / file}", code="device_failed")
        command = _compiler()
        for folder in (*include_folders(self._sources), HOST_SOURCES):
            command += ["-I", str(folder)]
        text = fingerprint(self._sources, file)
        common = "\0".join([*command, _compiler_version(command[0]), text, file])
        keys = [_hash(f"{common}\0{name}") for name in names]
        folder = _cache_folder()
        paths = [folder / f"{key}.so" for key in keys]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        if missing:
            library = folder / f"{_hash(*(keys[i] for i in missing))}-library.so"
            _compile(command, file, [names[i] for i in missing], library)
            if fingerprint(self._sources, file) != text:  # edited meanwhile
                return self._build(file, names)
            for i in missing:
                # A name's link appears at once, for other processes may be compiling the same.
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    link = Path(scratch) / "link"
                    link.symlink_to(library.name)
                    link.replace(paths[i])
        return paths


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def _symbol(name: str) -> str:
    return _hash(name)[:16]


@functools.cache
def _compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _compiler() -> list[str]:
    """The compiler's command line without its input and output."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise EngineError("g++ is not installed", "it compiles kernels for the CPU", code="device_failed")
    command = [compiler, "-O2", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-DDRAFTWIRE_EMULATE"]
    if platform.machine() == "x86_64":
        # The emulator changes stacks, which a shadow stack would refuse.
        command.append("-fcf-protection=none")
        flags = Path("/proc/cpuinfo").read_text("utf-8").split()
        command += [f"-m{feature}" for feature in ("avx2", "fma") if feature in flags]
    return command


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "draftwire" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        remedy = "set XDG_CACHE_HOME to a folder that can be written"
        raise EngineError(f"cannot keep kernels in {folder}: {e}", remedy, code="device_failed") from e
    return folder


def _compile(command: list[str], file: str, names: Sequence[str], library: Path) -> None:
    """A library that exports, by a hash of each name, how to launch a kernel and what it takes."""
    lines = [f'#include "{file}"']
    for name in names:
        symbol = _symbol(name)
        lines += [
            f'extern "C" const char* signature_{symbol}() {{ return emulator::signature(&{name}); }}',
            f'extern "C" const char* launch_{symbol}(unsigned x, unsigned y, unsigned z, unsigned block, size_t shared,'
            f" void** arguments) {{ return emulator::launch(&{name}, x, y, z, block, shared, arguments); }}",
        ]
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        source, output = Path(scratch) / "kernels.cpp", Path(scratch) / "kernels.so"
        source.write_text("\n".join(lines) + "\n", "utf-8")
        done = subprocess.run([*command, "-o", str(output), str(source)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line][:5]
            shown = "\n".join(errors or done.stderr.splitlines()[:5])
            raise EngineError(f"{file} does not compile with g++:\n{shown}", code="device_failed")
        output.replace(library)


def _load(path: Path, name: str) -> HostKernel:
    library = ctypes.CDLL(str(path))
    signature, run = library[f"signature_{_symbol(name)}"], library[f"launch_{_symbol(name)}"]
    signature.restype = run.restype = ctypes.c_char_p
    run.argtypes = [*[ctypes.c_uint] * 4, ctypes.c_size_t, ctypes.c_void_p]
    return HostKernel(name, signature().decode(), run)
