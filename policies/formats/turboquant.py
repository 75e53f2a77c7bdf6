"""TurboQuant: rotated to be nearly normal, then the best codes for normal numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtune.policies.format import Role
from kvtune.policies.formats.coded import Coded
from kvtune.policies.formats.hadamard import hadamard
from kvtune.policies.formats.normal_codes import nearest_codes, numbers_of
from kvtune.policies.formats.packing import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TurboQuant(Coded):
    """One length a token and head, and codes of the rotated direction.

    u = x H / sqrt(D), r = the root mean square of u
    codes = nearest of Lloyd and Max's levels c of u / r; read back as c scaled to the length of x

    Source: Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion
    Rate", arXiv 2504.19874, the variant of least squared error. Differs: the rotation is a Hadamard
    matrix, as serving engines use, not a random one; the length read back is exact ("norm
    correction" there); without the one-bit sketch of the error that makes scores unbiased.
    """

    source = "Zandieh et al., arXiv 2504.19874"
    projects = False
    keeps_constants = False  # a constant token becomes one large channel, beyond the levels

    def code_bytes(self, tokens: int, head_dim: int, role: Role) -> int:
        """Packed codes of a token, and its length in 16 bits."""
        return tokens * (-(-head_dim * self.bits // 8) + 2)

    def codes(self, rows: Tensor, role: Role) -> Mapping[str, Tensor]:
        """The codes of each row's rotated direction, and its length."""
        size = rows.square().mean(-1, keepdim=True).sqrt()
        unit = hadamard(rows) / size.clamp_min(1e-30)
        return {"codes": pack(nearest_codes(unit, self.bits), self.bits), "sizes": size.half()}

    def roundtrip(self, tensor: Tensor, counts: Tensor, role: Role) -> Tensor:
        """All heads at once: a token needs no other."""
        import torch

        first, rows = self.exact_first, tensor[..., self.exact_first :, :].float()
        length = rows.square().mean(-1, keepdim=True).sqrt()
        codes = nearest_codes(hadamard(rows) / length.clamp_min(1e-30), self.bits)
        stored = self._read(codes, length.half()).nan_to_num()
        return torch.cat([tensor[..., :first, :], stored.to(tensor.dtype)], -2)

    def _read(self, codes: Tensor, sizes: Tensor) -> Tensor:
        some = numbers_of(codes, self.bits)
        some = some / some.square().mean(-1, keepdim=True).sqrt()
        return hadamard(some * sizes.float())

    def numbers(self, buffers: Mapping[str, Tensor], shape: tuple[int, int], role: Role) -> Tensor:
        """Levels scaled to the length that was stored, rotated back."""
        return self._read(unpack(buffers["codes"], self.bits, shape[1]), buffers["sizes"])


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
