"""Kernel tables that others measured: the parquet files of NVIDIA's ``aiconfigurator-core``.

They lie under ``systems/data/SYSTEM/OP/STACK/VERSION/FILE.parquet``; the wheel is an optional
dependency (``pip install kvtune[aiconfigurator]``) and nothing of it is imported or copied.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from kvtune.common.errors import KvtuneError

Stack = Literal["vllm", "sglang", "trtllm"]
STACKS: tuple[Stack, ...] = get_args(Stack)
StackChoice = Literal["kvtune", Stack]
"""Whose kernels: our own or the datasheet's, or a stack's."""
PACKAGE = "aiconfigurator_core"

SYSTEM_OF_CARD = {
    "a100-80-sxm": "a100_sxm", "b60": "b60", "b200": "b200_sxm", "b300": "b300_sxm",
    "gb200": "gb200", "gb300": "gb300", "h100-sxm": "h100_sxm", "h200": "h200_sxm",
    "l40s": "l40s", "rtx-pro-6000": "rtx_pro_6000_server",
}  # fmt: skip
"""Folder of each card whose kernels the wheel has."""

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Table:
    """Columns of one table and where it is from.

    Args:
        columns: by name, of one length; ``latency`` is in milliseconds.
        version: of the serving stack whose kernels were measured.
    """

    columns: Columns
    version: str

    def where(self, **wanted: object) -> Table:
        """The rows whose columns have these values; a column that is missing counts as 0."""
        kept = np.ones(len(self.columns["latency"]), dtype=bool)
        for name, value in wanted.items():
            if name in self.columns:
                kept &= self.columns[name] == value
            elif value != 0:
                kept[:] = False
        return Table({name: column[kept] for name, column in self.columns.items()}, self.version)

    def of_most_used_kernel(self) -> Table:
        """The rows of the implementation that was measured at most points."""
        if "kernel_source" not in self.columns or not len(self):
            return self
        names, counts = np.unique(self.columns["kernel_source"], return_counts=True)
        return self.where(kernel_source=names[np.argmax(counts)])

    def fastest_of(self, *point: str) -> Table:
        """One row of each point: its fastest implementation, which is what the stacks pick."""
        order = np.argsort(self.columns["latency"], kind="stable")
        keys = np.stack([self.columns[name][order] for name in point], axis=-1)
        _, first = np.unique(keys, axis=0, return_index=True)
        chosen = order[first]
        return Table({name: values[chosen] for name, values in self.columns.items()}, self.version)

    @property
    def kernel(self) -> str:
        """Names of the implementations in it."""
        return "+".join(sorted(set(map(str, self.columns.get("kernel_source", ())))))

    def __len__(self) -> int:
        return len(self.columns["latency"])


def systems_folder() -> Path | None:
    """The installed wheel's ``systems`` folder; None where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    folder = Path(places[0]) / "systems" if places else None
    return folder if folder is not None and folder.is_dir() else None


def require_systems_folder() -> Path:
    """The folder of systems, where the package has to be installed.

    Raises:
        KvtuneError: it is not installed.
    """
    folder = systems_folder()
    if folder is None:
        raise KvtuneError(
            "the kernel tables of vLLM, SGLang and TensorRT-LLM are not installed",
            hint="pip install 'kvtune[aiconfigurator]' brings NVIDIA's measured tables (82 MB).",
        )
    return folder


def read_table(
    folder: Path,
    system: str,
    op: str,
    stack: str,
    file: str,
    equal: Mapping[str, object] | None = None,
) -> Table | None:
    """The newest version of a table that has such rows, None where the system and stack have none.

    Args:
        folder: as :func:`systems_folder` gives it.
        system: for example ``h200_sxm``.
        op: for example ``attention``.
        stack: one of :data:`STACKS`, or ``nccl``.
        file: name of the table without its ending.
        equal: values that columns must have, so that only those rows are read.

    Raises:
        KvtuneError: pyarrow is missing, or the file is no table of this kind.
    """
    for path in sorted(
        (folder / "data" / system / op / stack).glob(f"*/{file}.parquet"),
        key=lambda place: _version_key(place.parent.name),
        reverse=True,
    ):
        table = _read(path, equal or {})
        if len(table):
            return table
    return None


_Tables = TypeVar("_Tables", bound="StackTables")


@dataclass(frozen=True)
class StackTables:
    """Where the tables of one system and stack lie.

    Args:
        folder: the wheel's ``systems`` folder.
        system: for example ``h200_sxm``.
        stack: whose kernels.
    """

    folder: Path
    system: str
    stack: Stack

    def read(self, op: str, file: str, equal: Mapping[str, object] | None = None) -> Table | None:
        """A table of this stack, as :func:`read_table` finds it."""
        return read_table(self.folder, self.system, op, self.stack, file, equal)

    def own_first(self: _Tables) -> list[_Tables]:
        """These tables and those of the other stacks on the system."""
        others = (stack for stack in STACKS if stack != self.stack)
        return [self, *(replace(self, stack=stack) for stack in others)]


def _read(path: Path, equal: Mapping[str, object]) -> Table:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        hint = "pip install 'kvtune[aiconfigurator]'"
        raise KvtuneError("reading these tables needs pyarrow", hint=hint) from error
    try:
        held = set(parquet.read_schema(path).names)
        rows = [(name, "=", value) for name, value in equal.items() if name in held]
        table = parquet.read_table(path, filters=rows or None)
        columns = {name: _column(table[name]) for name in table.column_names}
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise KvtuneError(f"this is no kernel table: {error}", where=str(path)) from error
    if "latency" not in columns:
        raise KvtuneError("the column 'latency' is missing", where=str(path))
    return Table(columns, path.parent.name)


def _column(column: Any) -> npt.NDArray[Any]:
    """Numbers as they are, texts as numpy's, which compare fast."""
    values = column.to_numpy()
    return values.astype(str) if values.dtype == object else np.asarray(values)


def _version_key(name: str) -> tuple[tuple[int, str], ...]:
    """Versions in order: numbers by value, a release candidate before its release."""
    parts = re.findall(r"\d+|[a-z]+", name.lower())
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)
