"""A PostgreSQL server for one test: its own folder, a socket, no network, gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def programs() -> Path | None:
    """Where PostgreSQL's server programs are, by Debian's folders or the path; None without."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).parent if on_path else None


@contextmanager
def postgres() -> Iterator[str]:
    """A running server's URL for SQLAlchemy with psycopg."""
    where = programs()
    assert where is not None
    with tempfile.TemporaryDirectory(prefix="kvtune-pg-") as name:
        folder = Path(name)
        user = _prepare_owner(folder)
        _run(user, where / "initdb", "-D", folder / "data", "-A", "trust", "-U", "kvtune")
        options = f"-c listen_addresses='' -k {folder} -c fsync=off -c max_connections=60"
        control = (where / "pg_ctl", "-D", folder / "data", "-w")
        _run(user, *control, "-o", options, "-l", folder / "log", "start")
        try:
            yield f"postgresql+psycopg://kvtune@/postgres?host={folder}"
        finally:
            _run(user, *control, "-m", "immediate", "stop")


def _prepare_owner(folder: Path) -> str | None:
    """The server refuses to run as root: then the folder and it belong to Debian's own user."""
    if os.geteuid() != 0:
        return None
    shutil.chown(folder, "postgres")
    folder.chmod(0o755)
    return "postgres"


def _run(user: str | None, *command: str | Path) -> None:
    words = [str(word) for word in command]
    if user is not None:
        words = ["runuser", "-u", user, "--", *words]
    subprocess.run(  # noqa: S603
        words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
    )
