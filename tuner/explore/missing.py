"""What is said where a run directory holds no study; it costs nothing to import."""

from __future__ import annotations

from pathlib import Path

from kvtune.common.errors import KvtuneError

FIRST_SEARCH = "kvtune search --model llama-8b --gpu 4090 --mem 16GB begins one."


def no_study(folder: Path) -> KvtuneError:
    """Why a folder is no study: it is not there, holds none, or an old run's result alone."""
    if (folder / "result.json").exists():
        return KvtuneError(
            "this run was made before plans were recorded",
            where=str(folder),
            hint="run the same search again; it takes up what it has.",
        )
    return KvtuneError(
        "there is no study here" if folder.is_dir() else "there is no such folder",
        where=str(folder),
        hint=FIRST_SEARCH,
    )
