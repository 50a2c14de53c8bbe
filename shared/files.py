"""Files that are replaced as a whole.

Invariant: whoever reads one sees the old or the new, also after a crash; no temporary file is left behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def make_directory(path: Path) -> None:
    """A directory that everybody may enter, whatever the umask is; one that exists stays as it is. Errors: OSError."""
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            folder.mkdir()
            folder.chmod(0o755)


def replace_file(path: Path, text: str, mode: int, owner: tuple[int, int] = (-1, -1)) -> None:
    """Write a file in the place of the one that is there, in a directory that exists. Errors: OSError.

    owner: user and group, -1 for one that is not to be changed; where this process may not, it stays the writer's.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode())
            file.flush()
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, *owner)
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        fresh.replace(path)
    except BaseException:  # whatever ended it, the half-written file goes
        fresh.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
