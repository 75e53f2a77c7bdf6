"""Files written whole or not at all, hashed, and never outside the folder they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from kvtune.common.errors import KvtuneError


@dataclass
class Written:
    """Files that this process has finished, so that an interrupt can say whether any is kept."""

    files: int = 0


WRITTEN = Written()


def cache_dir() -> Path:
    """Where models, traces and tables are kept: ``$KVTUNE_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("KVTUNE_CACHE") or platformdirs.user_cache_dir("kvtune"))


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there only if the block ends well.

    Raises:
        KvtuneError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _flush(temporary)
        temporary.replace(path)
        WRITTEN.files += 1
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> KvtuneError:
    """What to raise where a file or folder could not be written: a full disk, no permission."""
    return KvtuneError(
        f"cannot write here: {error.strerror or error}",
        where=str(path),
        hint=f"free some space, or {other_folder(path)}",
    )


def other_folder(path: Path) -> str:
    """What to do where ``path`` cannot be written."""
    if path.absolute().is_relative_to(cache_dir().absolute()):
        return "set KVTUNE_CACHE to a folder that can be written."
    return "choose a folder that can be written."


def _flush(path: Path) -> None:
    """Have the content on the disk before the name points to it: a power cut leaves no empty file.

    Raises:
        OSError: the disk has no room for it.
    """
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def append_text(path: Path, text: str) -> None:
    """Add whole lines to a file.

    Raises:
        KvtuneError: it cannot be written; what was written of ``text`` is then taken back.
    """
    try:
        with path.open("ab", buffering=0) as file:
            before, rest = file.tell(), text.encode()
            try:
                while rest:  # a disk that is nearly full takes a part first
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(before)
                raise
            WRITTEN.files += 1
    except OSError as error:
        raise unwritable(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, keys in the given order."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def inside(root: Path, relative: str) -> Path:
    """``root / relative``, refused where it would leave ``root`` (absolute, ``..``, links)."""
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise KvtuneError(f"{relative!r} leads out of its folder", where=str(root))
    return path
