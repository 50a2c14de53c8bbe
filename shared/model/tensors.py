"""Taking a model's tensors out of its file, by name and shape, with none left over."""

from __future__ import annotations

from shared.errors import ModelError
from shared.model.gguf import GGUFFile, TensorInfo


class TensorNames:
    """The tensors of a file that nobody has asked for yet.

    Args:
        engine: named in the errors.
    """

    def __init__(self, file: GGUFFile, engine: str) -> None:
        self._file = file
        self._engine = engine
        self._left = set(file.tensors)

    def take(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """A tensor of this name and shape (as in the GGUF, row length first).

        Raises:
            ModelError: it is missing (missing_tensor), or has another shape (bad_metadata).
        """
        info = self._file.tensors.get(name)
        if info is None:
            raise ModelError(
                f"{self._file.path} lacks the tensor {name!r}", "convert the model again", "missing_tensor"
            )
        if info.shape != shape:
            raise ModelError(
                f"{self._file.path}: tensor {name!r} has shape {info.shape}, its metadata imply {shape}",
                "convert the model again",
                "bad_metadata",
            )
        self._left.discard(name)
        return info

    def finish(self) -> None:
        """Refuse tensors that were not taken: the result would not be this model's.

        Raises:
            ModelError: unsupported_variant.
        """
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"{self._file.path} has tensors that the {self._engine} engine would ignore: "
                f"{', '.join(names[:3])}{more}",
                "use the ik engine",
                "unsupported_variant",
            )
