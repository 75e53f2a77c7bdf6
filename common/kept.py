"""Arrays that took long to compute, kept in a folder under what they follow from.

Each is one file, written whole or not at all, named by a hash of its key and holding a hash of its
content. A process that is killed loses only what it was computing, and the next one that asks for
the same finds it. A damaged file counts as missing, and is written anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        follows_from: what all keys of this folder have in common: model, trace, versions.
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

        with atomic(path) as temporary:
            temporary.write_bytes(save(dict(arrays), metadata={"sha256": _digest(arrays)}))

    def clear(self) -> None:
        """Remove the folder with all that it holds."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: tuple[object, ...]) -> Path | None:
        if self.folder is None:
            return None
        text = json.dumps([repr(part) for part in (*self.follows_from, *key)])
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


NOTHING_KEPT = Kept()


def _digest(arrays: Mapping[str, Any]) -> str:
    """Hash of names, types, shapes and content."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
