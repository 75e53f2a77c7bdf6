"""16 bits an element: the model's own precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Format, Role, Stored
from kvtune.policies.packed import Sections, numbers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Bf16(Format):
    """Stored as the model gives it; two bytes an element (bf16 or fp16 alike)."""

    name = "bf16"
    source = "the uncompressed cache"
    bits = 16

    def bound(self, tokens: int, head_dim: int, role: Role) -> int:
        """Two bytes an element."""
        return 2 * tokens * head_dim

    def encode(self, tensor: Tensor, role: Role) -> Stored:
        """The numbers themselves, in bf16 where the model computes wider."""
        import torch

        narrow = tensor if tensor.element_size() == 2 else tensor.to(torch.bfloat16)
        return Stored({"numbers": narrow}, len(tensor))

    def packed(self, tokens: int, head_dim: int, role: Role) -> Sections | None:
        """The numbers as they are."""
        return numbers(0, tokens, "numbers")

    def decode(self, stored: Stored, head_dim: int, role: Role) -> Tensor:
        """The numbers as they were stored."""
        return stored.buffers["numbers"].float()

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """Nothing is lost."""
        return tensor
