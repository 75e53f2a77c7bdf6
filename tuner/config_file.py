"""``config.json`` of a run directory, read back: what the search was asked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from kvtune.common.bounds import Count, Exact, Name, NotNegative, Whole
from kvtune.common.errors import KvtuneError
from kvtune.common.stored import checked, read_json
from kvtune.tuner.explore import PLANS_FILE

CONFIG = "config.json"
_REMEDY = (
    "run the same search again with --run-dir on this folder: it writes the file anew and uses "
    "what is finished; or put the file back from a copy."
)


@dataclass(frozen=True)
class Config:
    """The entries that commands read of it, None where the file has none.

    Searches write more, and older ones wrote fewer.
    """

    model: Name | None = None
    shape: Name | None = None
    gpu: Name | None = None
    memory_bytes: Count | None = None
    weights: Name | None = None
    context_tokens: Count | None = None
    longest_context: Count | None = None
    generated_tokens: Whole | None = None
    sequences: Count | None = None
    largest_kl: NotNegative | None = None
    trials: Whole | None = None
    seed: Exact | None = None
    workload: Name | None = None
    menu: Name | None = None
    stack: Name | None = None
    read_bytes: Count | None = None
    moved_bytes: Count | None = None
    heads: Name | None = None
    texts: list[Name] | None = None
    lengths: list[Count] | None = None
    stand_in: bool | None = None


def read_config(folder: Path) -> Config:
    """What the search in a run directory was asked; nothing where there is no such file.

    Raises:
        KvtuneError: the file is damaged; with what to do.
    """
    path = folder / CONFIG
    if not path.is_file():
        return Config()
    found = read_json(path, _REMEDY)
    if not isinstance(found, dict):
        raise KvtuneError("this search's configuration is damaged", where=str(path), hint=_REMEDY)
    known = {field.name: found[field.name] for field in fields(Config) if field.name in found}
    return checked(Config, known, str(path), _REMEDY)


def config_beside(policy: Path) -> Config:
    """What the search was asked that left a policy file in its run directory; else nothing.

    Raises:
        KvtuneError: the file is damaged.
    """
    return read_config(policy.parent) if (policy.parent / PLANS_FILE).is_file() else Config()


def check_run(folder: Path) -> None:
    """Refuse a run directory whose configuration is damaged; any other folder is not looked into.

    Raises:
        KvtuneError: the file is damaged.
    """
    config_beside(folder / "policy.yaml")
