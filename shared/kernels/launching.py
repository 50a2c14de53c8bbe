"""What the devices share: which sources a kernel is made of, its packed arguments, and checks of what callers ask.

Invariant: a call that would be wrong on one device is refused by each of them, as far as it can know.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.kernels.device import AnyArray, Argument, Buffer

SOURCES = Path(__file__).resolve().parent / "cuda"
HOST_SOURCES = Path(__file__).resolve().parent / "host"

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)

# Kinds of parameters; "8" and "4" are what a GPU's driver tells of them.
NAMES = {
    "p": "a pointer",
    "i": "an int32",
    "u": "a uint32",
    "l": "an int64",
    "m": "a uint64",
    "f": "a float32",
    "8": "a pointer or another 8 bytes",
    "4": "an int32, a float32 or another 4 bytes",
}
POINTERS = "p8"
FLOATS = "f4"
INTEGERS = {
    "i": (-(2**31), 2**31 - 1),
    "u": (0, 2**32 - 1),
    "l": (-(2**63), 2**63 - 1),
    "m": (0, 2**64 - 1),
    "8": (-(2**63), 2**64 - 1),
    "4": (-(2**31), 2**32 - 1),
}


def include_folders(sources: Path) -> tuple[Path, ...]:
    """Where the files of `sources` find what they include."""
    return tuple(dict.fromkeys((sources, SOURCES, SOURCES / "codecs")))


def fingerprint(sources: Path, file: str) -> str:
    """A hash over the text of a file and of all that it includes: compilers' caches do not look into headers."""
    folders = (*include_folders(sources), HOST_SOURCES)
    digest = hashlib.sha256()
    seen: set[Path] = set()

    def visit(path: Path) -> None:
        if path in seen:
            return
        seen.add(path)
        text = path.read_text("utf-8")
        digest.update(f"{path.name}\0{text}\0".encode())
        for name in INCLUDE.findall(text):
            for folder in (path.parent, *folders):
                if (folder / name).is_file():
                    visit((folder / name).resolve())
                    break

    visit((sources / file).resolve())
    return digest.hexdigest()


def pack(kernel: str, parameters: str | None, arguments: Sequence[Argument]) -> tuple[Any, list[Any]]:
    """An array of pointers to the arguments' values, and the values, which must outlive its use.

    Args:
        parameters: a letter for each (`NAMES`); None where the device cannot tell.
    """
    if parameters is None:
        parameters = "".join("8" if a is None or isinstance(a, Buffer) else "4" for a in arguments)
    if len(arguments) != len(parameters):
        wanted = ", ".join(NAMES[p] for p in parameters)
        raise TypeError(f"{kernel} takes {len(parameters)} arguments ({wanted}), got {len(arguments)}")
    values = [_value(kernel, i, p, a) for i, (p, a) in enumerate(zip(parameters, arguments, strict=True))]
    return (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, values)), values


def _value(kernel: str, position: int, parameter: str, argument: Argument) -> Any:
    if isinstance(argument, Buffer) or argument is None:
        if parameter in POINTERS:
            return ctypes.c_void_p(argument.address if argument is not None else None)
    elif isinstance(argument, float):
        if parameter in FLOATS:
            return ctypes.c_float(argument)
    elif parameter in INTEGERS:
        lowest, highest = INTEGERS[parameter]
        if lowest <= argument <= highest:
            return ctypes.c_int64(argument) if highest >= 2**32 else ctypes.c_int32(argument)
    shown = "a buffer" if isinstance(argument, Buffer) else repr(argument)
    raise TypeError(f"{kernel}: argument {position} is {shown}, but the parameter is {NAMES[parameter]}")


def grid_of(grid: tuple[int, ...], block: int) -> tuple[int, int, int]:
    """The three dimensions of a grid, checked."""
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise ValueError(f"a grid has one to three dimensions of at least 1, got {grid}")
    if not 32 <= block <= 1024 or block % 32:
        raise ValueError(f"a block has 32 to 1024 threads, in whole warps, got {block}")
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


def check_copy(buffer: Buffer, array: AnyArray) -> None:
    """Refuses a copy between a buffer and an array that do not fit."""
    if not array.flags.c_contiguous:
        raise ValueError("an array to copy must be C-contiguous")
    if array.nbytes != buffer.nbytes:
        raise ValueError(f"cannot copy between {array.nbytes} bytes of an array and a buffer of {buffer.nbytes}")


def check_device_copy(target: Buffer, source: Buffer) -> None:
    """Refuses a copy between buffers that do not fit."""
    if target.nbytes != source.nbytes:
        raise ValueError(f"cannot copy a buffer of {source.nbytes} bytes into one of {target.nbytes}")


class StagingArrays:
    """Knows the arrays that a device made as staging memory, and their views."""

    def __init__(self) -> None:
        self._roots: weakref.WeakValueDictionary[int, AnyArray] = weakref.WeakValueDictionary()

    def add(self, memory: AnyArray, shape: tuple[int, ...], dtype: np.dtype[Any]) -> AnyArray:
        """The staging array over `memory`, which has its bytes."""
        self._roots[id(memory)] = memory
        return memory.view(dtype).reshape(shape)

    def __contains__(self, array: AnyArray) -> bool:
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        return self._roots.get(id(root)) is root
