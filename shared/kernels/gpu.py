"""An NVIDIA GPU as a device: CuPy compiles and loads kernels and owns memory, the driver launches them.

Launches go to the driver's cuLaunchKernelEx rather than through CuPy for programmatic dependent launch: a kernel may
start while the one before it drains (see wait_for_previous in machine.cuh). CuPy is imported only when it is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import EngineError
from shared.kernels.device import AnyArray, Argument, Buffer, Device, Graph, Kernel
from shared.kernels.launching import (
    SOURCES,
    StagingArrays,
    check_copy,
    check_device_copy,
    fingerprint,
    grid_of,
    include_folders,
    pack,
)

# cp.async and mma of halves with k = 16.
LEAST_CAPABILITY = (8, 0)
DEPENDENT_LAUNCH_CAPABILITY = (9, 0)

# Of cuda.h.
CUDA_ERROR_OUT_OF_MEMORY = 2
CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint64 * 8))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("n_attributes", ctypes.c_uint),
    )


def cuda_unavailable(index: int = 0) -> EngineError | None:
    """Why there can be no `CudaDevice(index)` here, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a missing toolkit, which the checks below find
        try:
            import cupy
            from cupy.cuda import nvrtc
        except ImportError as e:
            remedy = "pip install 'draftwire[cuda12]' or 'draftwire[cuda13]', whichever the driver supports"
            return EngineError(f"CuPy is not installed: {_line(e)}", remedy, code="device_failed")
        try:
            count = cupy.cuda.runtime.getDeviceCount()
            if index >= count:
                remedy = "indexes start at 0, and count those that CUDA_VISIBLE_DEVICES leaves"
                return EngineError(f"there is no GPU {index}: {count} found", remedy, code="device_failed")
            properties = cupy.cuda.runtime.getDeviceProperties(index)
        except RuntimeError as e:
            remedy = "nvidia-smi tells whether a driver and a GPU are there"
            return EngineError(f"no NVIDIA GPU can be used: {_line(e)}", remedy, code="device_failed")
        try:
            nvrtc.getVersion()
        except RuntimeError as e:
            remedy = "install the CUDA toolkit, or pip install 'cupy-cuda12x[ctk]' or 'cupy-cuda13x[ctk]'"
            return EngineError(f"CUDA's compiler NVRTC is missing: {_line(e)}", remedy, code="device_failed")
    major, minor = properties["major"], properties["minor"]
    if (major, minor) < LEAST_CAPABILITY:
        message = f"GPU {index} ({properties['name'].decode()}) has compute capability {major}.{minor}"
        return EngineError(message, "kernels need at least 8.0 (Ampere)", code="device_failed")
    return None


def _line(error: Exception) -> str:
    """The first line of an error: CuPy's have many."""
    return next((line.strip() for line in str(error).splitlines() if line.strip(" =")), type(error).__name__)


class _Driver:
    """libcuda, its errors as `EngineError`."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        if not self.has("cuLaunchKernelEx"):
            raise EngineError("the NVIDIA driver is too old", "CUDA 11.8 or newer is needed", code="device_failed")

    def has(self, function: str) -> bool:
        return hasattr(self._library, function)

    def result(self, function: str, *arguments: Any) -> int:
        """Its error code; handles and sizes among the arguments must be ctypes values."""
        return int(getattr(self._library, function)(*arguments))

    def call(self, function: str, *arguments: Any) -> None:
        result = self.result(function, *arguments)
        if result != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(result, ctypes.byref(text))
            code = "out_of_memory" if result == CUDA_ERROR_OUT_OF_MEMORY else "device_failed"
            raise EngineError(f"{function}: {(text.value or b'unknown error').decode()} ({result})", code=code)


class CudaKernel:
    """A loaded kernel."""

    def __init__(self, name: str, owner: Any, parameters: str | None) -> None:
        """owner: CuPy's RawKernel; it keeps the module loaded. parameters: see `launching.pack`."""
        self.name = name
        self.owner = owner
        self.handle = ctypes.c_void_p(owner.kernel.ptr)
        self.parameters = parameters
        # The most dynamic shared memory that the driver has been told of.
        self.shared = 0


class CudaGraph:
    """A captured graph. kept: what owns the memory that its launches and copies use."""

    def __init__(self, device: CudaDevice, graph: Any, kept: list[object]) -> None:
        self._device = device
        self._graph = graph
        self._kept = kept

    def replay(self) -> None:
        self._device.replay(self._graph)


class CudaDevice:
    """See `shared.kernels.device.Device`. May be used from any thread, by one at a time.

    Args:
        index: the GPU's number, as CUDA_VISIBLE_DEVICES orders them.
        pdl: use programmatic dependent launch where the GPU has it.
        sources: the folder of the kernels' files.
    """

    def __init__(self, index: int = 0, pdl: bool = True, sources: Path = SOURCES) -> None:
        reason = cuda_unavailable(index)
        if reason is not None:
            raise reason
        import cupy

        self._cuda = cupy.cuda
        self._raw_module = cupy.RawModule
        self._cupy_errors = (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError)
        self._driver = _Driver()
        self._sources = sources
        self._kernels: dict[tuple[str, str], CudaKernel] = {}
        self._staging = StagingArrays()
        # What a capture uses, while there is one.
        self._kept: list[object] | None = None
        self._context = ctypes.c_void_p()
        self._index = index
        with cupy.cuda.Device(index):
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._event = cupy.cuda.Event(disable_timing=True)
            self._cuda.runtime.memGetInfo()
            self._driver.call("cuCtxGetCurrent", ctypes.byref(self._context))
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        self.name = f"GPU {index} ({properties['name'].decode()})"
        self.n_multiprocessors = int(properties["multiProcessorCount"])
        self._attributes = (_LaunchAttribute * 1)()
        self._attributes[0].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        self._attributes[0].value[0] = 1
        dependent = pdl and (properties["major"], properties["minor"]) >= DEPENDENT_LAUNCH_CAPABILITY
        self._n_attributes = 1 if dependent else 0

    def memory(self) -> tuple[int, int]:
        with self._current():
            free, total = self._cuda.runtime.memGetInfo()
        return int(free), int(total)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        kind = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        self._refuse_in_capture("allocate")
        try:
            with self._current():
                memory = self._cuda.Memory(max(1, nbytes))
        except EngineError as e:
            if e.code != "out_of_memory":
                raise
            free, total = (n / 2**30 for n in self.memory())
            need = nbytes / 2**30
            message = f"{self.name} has no room for {need:.2f} GiB more: {free:.2f} of {total:.2f} GiB are free"
            remedy = f"about {max(need - free, 0.01):.2f} GiB are missing; a smaller context or fewer slots take less"
            raise EngineError(message, remedy, code="out_of_memory") from e
        return Buffer(int(memory.ptr), shape, kind, memory)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        buffer = self.empty(shape, dtype)
        self.fill(buffer, 0)
        return buffer

    def staging(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> AnyArray:
        kind = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        self._refuse_in_capture("allocate")
        with self._current():
            memory = self._cuda.PinnedMemoryPointer(self._cuda.PinnedMemory(max(1, nbytes)), 0)
        array = np.frombuffer(memory, np.uint8, nbytes)
        array[:] = 0
        return self._staging.add(array, shape, kind)

    def write(self, target: Buffer, source: AnyArray) -> None:
        check_copy(target, source)
        staged = self._check_recordable(source)
        self._keep(target.owner, source)
        runtime = self._cuda.runtime
        with self._current():
            runtime.memcpyAsync(
                target.address, source.ctypes.data, source.nbytes, runtime.memcpyHostToDevice, self._stream.ptr
            )
            if not staged:
                self._stream.synchronize()

    def read(self, target: AnyArray, source: Buffer) -> None:
        check_copy(source, target)
        self._check_recordable(target)
        self._keep(target, source.owner)
        runtime = self._cuda.runtime
        with self._current():
            runtime.memcpyAsync(
                target.ctypes.data, source.address, target.nbytes, runtime.memcpyDeviceToHost, self._stream.ptr
            )

    def copy_to(self, device: Device, target: Buffer, source: Buffer) -> None:
        assert isinstance(device, CudaDevice)
        check_device_copy(target, source)
        self._refuse_in_capture("copy to another device")
        device._refuse_in_capture("copy from another device")
        runtime = self._cuda.runtime
        # On this one's stream, where the copy follows what wrote the source.
        self._wait_for(device)
        with self._current():
            if device._index == self._index:
                runtime.memcpyAsync(
                    target.address, source.address, source.nbytes, runtime.memcpyDeviceToDevice, self._stream.ptr
                )
            else:
                runtime.memcpyPeerAsync(
                    target.address, device._index, source.address, self._index, source.nbytes, self._stream.ptr
                )
        device._wait_for(self)

    def fill(self, target: Buffer, byte: int) -> None:
        self._keep(target.owner)
        with self._current():
            self._cuda.runtime.memsetAsync(target.address, byte, target.nbytes, self._stream.ptr)

    def kernel(self, file: str, name: str) -> CudaKernel:
        self.prepare([(file, name)])
        return self._kernels[file, name]

    def prepare(self, kernels: Sequence[tuple[str, str]]) -> None:
        files: dict[str, list[str]] = {}
        for file, name in dict.fromkeys(kernels):
            if (file, name) not in self._kernels:
                files.setdefault(file, []).append(name)
        for file, names in files.items():
            self._load(file, names)

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], block: int, arguments: Sequence[Argument], shared: int = 0
    ) -> None:
        assert isinstance(kernel, CudaKernel)
        # `values` must live until the driver has copied them.
        pointers, values = pack(kernel.name, kernel.parameters, arguments)
        self._keep(kernel, *(a.owner for a in arguments if isinstance(a, Buffer)))
        config = _LaunchConfig(
            grid_of(grid, block), (block, 1, 1), shared, self._stream.ptr, self._attributes, self._n_attributes
        )
        with self._current():
            self._allow_shared(kernel, shared)
            self._driver.call("cuLaunchKernelEx", ctypes.byref(config), kernel.handle, pointers, None)
        del values

    def blocks_per_multiprocessor(self, kernel: Kernel, block: int, shared: int = 0) -> int:
        assert isinstance(kernel, CudaKernel)
        count = ctypes.c_int()
        with self._current():
            self._allow_shared(kernel, shared)
            self._driver.call(
                "cuOccupancyMaxActiveBlocksPerMultiprocessor",
                ctypes.byref(count),
                kernel.handle,
                ctypes.c_int(block),
                ctypes.c_size_t(shared),
            )
        return count.value

    def capture(self, record: Callable[[], None]) -> Graph:
        self._refuse_in_capture("capture")
        kept: list[object] = []
        with self._current():
            self._stream.begin_capture()
            self._kept = kept
            try:
                record()
            except BaseException:
                with contextlib.suppress(*self._cupy_errors):
                    self._stream.end_capture()
                raise
            finally:
                self._kept = None
            graph = self._stream.end_capture()
            graph.upload(self._stream)
        return CudaGraph(self, graph, kept)

    def replay(self, graph: Any) -> None:
        """Launch CuPy's graph; `CudaGraph.replay` calls it."""
        self._refuse_in_capture("replay")
        with self._current():
            graph.launch(self._stream)

    def synchronize(self) -> None:
        self._refuse_in_capture("wait")
        with self._current():
            self._stream.synchronize()

    def close(self) -> None:
        self.synchronize()
        self._kernels.clear()

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Makes the GPU's context the calling thread's, and CuPy's errors `EngineError`."""
        self._driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        except self._cupy_errors as e:
            code = "out_of_memory" if e.status == CUDA_ERROR_OUT_OF_MEMORY else "device_failed"
            raise EngineError(f"{self.name}: {e}", code=code) from e
        finally:
            self._driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _wait_for(self, other: CudaDevice) -> None:
        """Let what is asked for from now on come after all that the other device has been asked for."""
        # Waiting refers to the event as it is now: it can be recorded again at once.
        with other._current():
            other._event.record(other._stream)
        with self._current():
            self._stream.wait_event(other._event)

    def _keep(self, *owners: object) -> None:
        if self._kept is not None:
            self._kept += owners

    def _refuse_in_capture(self, what: str) -> None:
        if self._kept is not None:
            raise ValueError(f"cannot {what} inside a capture")

    def _check_recordable(self, array: AnyArray) -> bool:
        """Whether an array is staging memory, as it must be in a capture."""
        staged = array in self._staging
        if self._kept is not None and not staged:
            raise ValueError("a captured copy needs staging memory")
        return staged

    def _allow_shared(self, kernel: CudaKernel, shared: int) -> None:
        """Asks for dynamic shared memory; without asking, a block gets up to 48 KiB, the static kind included."""
        if shared > kernel.shared:
            attribute = ctypes.c_int(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
            self._driver.call("cuFuncSetAttribute", kernel.handle, attribute, ctypes.c_int(shared))
            kernel.shared = shared

    def _load(self, file: str, names: Sequence[str]) -> None:
        """Compiles kernels of a file as one module, or takes it from CuPy's cache."""
        if not (self._sources / file).is_file():
            raise EngineError(f"there is no kernel file {self._sources / file}", code="device_failed")
        # CuPy's cache looks at the options, but not into what a source includes.
        folders = (f"-I{folder}" for folder in include_folders(self._sources))
        options = ("-std=c++17", "-default-device", f"-DDRAFTWIRE_SOURCES={fingerprint(self._sources, file)}", *folders)
        module = self._raw_module(code=f'#include "{file}"\n', options=options, name_expressions=tuple(names))
        with self._current():
            for name in names:
                try:
                    owner = module.get_function(name)
                except self._cuda.compiler.CompileException as e:
                    errors = [line for line in str(e).splitlines() if "error" in line][:5]
                    shown = "\n".join(errors or str(e).splitlines()[:5])
                    raise EngineError(f"{file} does not compile with NVRTC:\n{shown}", code="device_failed") from e
                self._kernels[file, name] = CudaKernel(name, owner, self._parameters(owner.kernel.ptr))

    def _parameters(self, function: int) -> str | None:
        """The sizes of a kernel's parameters; None where the driver is too old (before CUDA 12.4) to tell."""
        if not self._driver.has("cuFuncGetParamInfo"):
            return None
        sizes = ""
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        out = ctypes.byref(offset), ctypes.byref(size)
        while (
            self._driver.result("cuFuncGetParamInfo", ctypes.c_void_p(function), ctypes.c_size_t(len(sizes)), *out) == 0
        ):
            sizes += str(size.value)
        return sizes
