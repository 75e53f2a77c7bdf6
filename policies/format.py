"""How what stays is stored: the contract of a format.

A format stores one tensor, the keys or the values of one KV head. ``bound`` says without data how
many bytes that takes, so that a plan can be made; ``encode`` gives the buffers themselves and
``decode`` reads them back. Formats are compared and looked up as objects: two formats are the same
when they are equal, and nothing is read from their names or from their number of bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvtune.policies.packed import Sections
from kvtune.policies.registry import find, registered

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "kvtune.policies.formats"
Role = Literal["keys", "values"]


@dataclass(frozen=True)
class Stored:
    """The buffers of one head's keys or values.

    Args:
        buffers: by name, packed as they would lie in memory.
        tokens: how many tokens they hold.
    """

    buffers: Mapping[str, Tensor]
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers; exact."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers.values())


@dataclass(frozen=True)
class Format(ABC):
    """Stores the keys or the values of one KV head.

    A class states its ``name``, its ``source`` and ``bits``: those of an element's code, without
    scales. ``exact_first`` says how many of the first kept tokens it leaves in 16 bits.
    ``page_tokens`` share scales where a stack stores tokens as they come: a page that is not full
    is read back and stored again with each of them.
    ``bytes_vary`` marks formats whose bytes depend on the data; ``bound`` is then an upper bound.
    ``projects`` says that storing what was read back changes no more than the rounding of scales,
    ``keeps_constants`` that a tensor of one number comes back as it was.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    bits: ClassVar[int]
    bytes_vary: ClassVar[bool] = False
    page_tokens: ClassVar[int] = 1
    projects: ClassVar[bool] = True
    keeps_constants: ClassVar[bool] = True

    @abstractmethod
    def bound(self, tokens: int, head_dim: int, role: Role) -> int:
        """Bytes that ``tokens`` tokens take at most, scales included; runs without torch."""

    @abstractmethod
    def encode(self, tensor: Tensor, role: Role) -> Stored:
        """The buffers of one head's tokens ``[n, D]``; of ``bound`` bytes unless ``bytes_vary``."""

    @abstractmethod
    def decode(self, stored: Stored, head_dim: int, role: Role) -> Tensor:
        """What a reader gets back, ``[n, D]`` float32."""

    @abstractmethod
    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """``decode`` of ``encode`` for many heads at once, without packing; same shape and dtype.

        Args:
            tensor: ``[..., n, D]``; of row r only the first ``counts[r]`` tokens are real.
            counts: ``[...]`` int64. What lies beyond never
                matters; its output is finite and otherwise undefined.
            role: keys or values, which may be grouped along different axes.
        """

    def packed(self, tokens: int, head_dim: int, role: Role) -> Sections | None:
        """How a kernel reads the buffers of so many tokens as they lie; None where none does."""
        return None

    @property
    def exact_tokens(self) -> int:
        """How many of the first kept tokens stay in 16 bits."""
        return 0

    def newest(self, tokens: int, role: Role) -> int:
        """How many of the newest of so many tokens, without the first ones, stay in 16 bits too."""
        return 0

    @property
    def coded(self) -> Format:
        """What stores the tokens that do not stay in 16 bits, where a kernel knows it."""
        return self

    @property
    def code_bits(self) -> float:
        """Bits of an element's code in the mean, without scales."""
        return self.bits

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
