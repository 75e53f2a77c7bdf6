"""Arrays that took long to compute, kept in a folder under what they follow from.

Each is one file, written whole or not at all, named by a hash of its key and holding a hash of its
content. A process that is killed loses only what it was computing, and the next one that asks for
the same finds it. A damaged file counts as missing, and is written anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvtune
from kvtune.common.errors import KvtuneError
from kvtune.common.files import atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class Kept:
    """A folder of computed arrays.

    Args:
        folder: made when the first are put there; None to keep nothing.
        follows_from: what all keys of this folder have in common: model, trace, device. kvtune's
            version need not be named: another one finds nothing of this one's.
    """

    folder: Path | None = None
    follows_from: tuple[object, ...] = ()

    def get(self, *key: object) -> dict[str, Array] | None:
        """The arrays that were put under a key; None where there are none, or damaged ones."""
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                written = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError, ValueError, TypeError, AttributeError):
            return None
        return arrays if written == _digest(arrays) else None

    def put(self, arrays: Arrays, *key: object) -> None:
        """Keep arrays under a key.

        Raises:
            KvtuneError: the folder cannot be written.
        """
        path = self._path(key)
        if path is None:
            return
        from safetensors.numpy import save

        data = save(dict(arrays), metadata={"sha256": _digest(arrays)})
        try:
            _write(path, data)
        except KvtuneError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            _write(path, data)  # another process has just cleared the folder

    def clear(self) -> None:
        """Remove what was put here, and the folder unless another process is writing to it."""
        if self.folder is None:
            return
        with suppress(OSError):
            for path in self.folder.glob("[!.]*.safetensors"):
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _path(self, key: tuple[object, ...]) -> Path | None:
        if self.folder is None:
            return None
        name = said((kvtune.__version__, *self.follows_from, *key))
        return self.folder / f"{name}.safetensors"


def said(parts: Iterable[object]) -> str:
    """A hash, 32 hexadecimal digits, of the ``repr`` of all parts of a key.

    It names files, and stands for long parts within other keys.
    """
    text = json.dumps([repr(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


NOTHING_KEPT = Kept()


def _write(path: Path, data: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def _digest(arrays: Mapping[str, Any]) -> str:
    """Hash of names, types, shapes and content."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
