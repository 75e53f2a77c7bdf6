"""Files written whole or not at all, hashed, and never outside the folder they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from kvtune.common.errors import KvtuneError


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
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise KvtuneError(
            f"cannot write here: {error.strerror}",
            where=str(path.parent),
            hint="choose another folder with --out or KVTUNE_CACHE.",
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
