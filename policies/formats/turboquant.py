"""TurboQuant: rotated to be nearly normal, then the best codes for normal numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.blocks import Blocks
from kvtune.policies.format import Role
from kvtune.policies.formats.blocked import BlockCodes, BlockFormat
from kvtune.policies.formats.hadamard import hadamard
from kvtune.policies.formats.normal_codes import magnitudes, nearest_codes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TurboQuant(BlockFormat):
    """One length a token and head, and codes of the rotated direction.

    u = x H / sqrt(D), r = the root mean square of u
    codes = nearest of Lloyd and Max's levels c of u / r; read back as c scaled to the length of x,
    by one number that holds both lengths

    Source: Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion
    Rate", arXiv 2504.19874, the variant of least squared error. Differs: the rotation is a Hadamard
    matrix, as serving engines use, not a random one; the length read back is exact ("norm
    correction" there); without the one-bit sketch of the error that makes scores unbiased.
    """

    source = "Zandieh et al., arXiv 2504.19874"
    projects = False
    keeps_constants = False  # a constant token becomes one large channel, beyond the levels

    @property
    def blocks(self) -> Blocks:
        """A token's head, rotated; levels of a normal number and 16 bits."""
        return Blocks("normal", self.bits, 0, "half", "hadamard")

    def fit(self, rows: Tensor, head: Tensor | None = None) -> BlockCodes:
        """The codes of each row's rotated direction, and what scales their levels to its length."""
        import torch

        size = rows.square().mean(-1, keepdim=True).sqrt()
        codes = nearest_codes(hadamard(rows) / size.clamp_min(1e-30), self.bits)
        some = torch.tensor(magnitudes(self.bits), device=rows.device)[codes % 2 ** (self.bits - 1)]
        scale = size / some.square().mean(-1, keepdim=True).sqrt()
        return BlockCodes(codes.to(torch.uint8), (scale.half(),))

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """All heads at once: a token needs no other."""
        import torch

        first, rows = self.exact_first, tensor[..., self.exact_first :, :].float()
        fit = self.fit(rows)
        stored = self.blocks.numbers(fit.codes, fit.scales).nan_to_num()
        return torch.cat([tensor[..., :first, :], stored.to(tensor.dtype)], -2)


@dataclass(frozen=True)
class TurboQuant4(TurboQuant):
    """4 bits an element; see ``TurboQuant``."""

    name = "turboquant4"
    bits = 4


@dataclass(frozen=True)
class TurboQuant3(TurboQuant):
    """3 bits an element; see ``TurboQuant``."""

    name = "turboquant3"
    bits = 3


@dataclass(frozen=True)
class TurboQuant2(TurboQuant):
    """2 bits an element; see ``TurboQuant``."""

    name = "turboquant2"
    bits = 2


@dataclass(frozen=True)
class TurboQuant1(TurboQuant):
    """One bit an element, its sign; see ``TurboQuant``. For values, beside keys of more bits."""

    name = "turboquant1"
    bits = 1
