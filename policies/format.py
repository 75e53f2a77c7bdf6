"""How what stays is stored: the contract of a format.

A format stores one tensor, the keys or the values of one KV head, and says to the byte what that
takes. ``roundtrip`` gives what a reader gets back; the packed codes themselves belong to the
runtime's kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvtune.policies.registry import find, registered

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "kvtune.policies.formats"
Role = Literal["keys", "values"]


@dataclass(frozen=True)
class Format(ABC):
    """Stores the keys or the values of one KV head.

    A class states its ``name``, its ``source`` and ``bits``: those of an element's code, without
    scales.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    bits: ClassVar[int]

    @abstractmethod
    def footprint(self, tokens: int, head_dim: int, role: Role) -> int:
        """Bytes that ``tokens`` tokens take, scales included; runs without torch."""

    @abstractmethod
    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """Store ``[..., n, D]`` and read it back, same shape and dtype.

        Args:
            tensor: rows of tokens; of row r only the first ``counts[r]`` tokens are real.
            counts: ``[...]`` int64. What lies beyond never
                matters; its output is finite and otherwise undefined.
            role: keys or values, which may be grouped along different axes.
        """

    @property
    def label(self) -> str:
        """Short text for tables and plots, for example ``int4``."""
        return self.name


def find_format(name: str) -> type[Format]:
    """The format called ``name``."""
    return find(PACKAGE, Format, name)  # type: ignore[type-abstract]


def formats() -> dict[str, type[Format]]:
    """Every format, by name."""
    return dict(registered(PACKAGE, Format))
