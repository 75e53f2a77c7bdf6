"""``result.json`` as a search left it, by schema: other keys, types and figures are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtune.common.bounds import Name, Parameter
from kvtune.common.errors import KvtuneError
from kvtune.common.stored import checked, read_json
from kvtune.tuner.result import Figures

AGAIN = "run the same search again."


@dataclass(frozen=True, kw_only=True)
class StoredResult(Figures):
    """``result.json``: the figures, and whose they are; its policies are files beside it."""

    kvtune: Name
    model: Name
    gpu: Name
    policy: Name
    budget: dict[str, Any]

    @property
    def study(self) -> str:
        """Key of its question."""
        return str(self.provenance.get("study", ""))

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Of the chosen plan."""
        return next(point.parameters for point in self.front if point.chosen)

    @staticmethod
    def from_dict(plain: Any, where: str) -> StoredResult:
        """What the JSON data says.

        Raises:
            KvtuneError: other keys or values than a search writes.
        """
        found = checked(StoredResult, plain, where, AGAIN)
        if not found.baselines or sum(point.chosen for point in found.front) != 1:
            raise KvtuneError("it names no plan", where=where, hint=AGAIN)
        return found


def read_result(path: Path) -> StoredResult:
    """The result of a run directory.

    Raises:
        KvtuneError: it is not there, or damaged.
    """
    try:
        return StoredResult.from_dict(read_json(path, AGAIN), str(path))
    except KvtuneError as error:
        raise KvtuneError(
            f"this result is damaged, or of another version of kvtune ({error.message})",
            where=str(path),
            hint=AGAIN,
        ) from error
